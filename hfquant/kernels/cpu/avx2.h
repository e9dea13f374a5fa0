// The vector operations on AVX2, with AVX-VNNI's byte products where the file is compiled for them; see vector.h.
#pragma once

#include "halves.h"

namespace hfquant {
namespace HFQUANT_ISA {

using Ints = __m256i;
using Reals = __m256;
constexpr int LANES = 8;
constexpr int TOKENS = 6, VECTORS = 2, WIDER = 1;

inline Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Reals load_reals(const float* p) { return _mm256_loadu_ps(p); }
inline void store_reals(float* p, Reals v) { _mm256_storeu_ps(p, v); }
inline Ints zeros() { return _mm256_setzero_si256(); }
inline Ints repeat(int32_t word) { return _mm256_set1_epi32(word); }
inline Reals repeat(float value) { return _mm256_set1_ps(value); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints add_bytes(Ints a, Ints b) { return _mm256_add_epi8(a, b); }
inline Ints add_shorts(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
inline Ints times(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Reals to_reals(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Reals as_reals(Ints a) { return _mm256_castsi256_ps(a); }
inline Ints as_ints(Reals a) { return _mm256_castps_si256(a); }
inline Reals add(Reals a, Reals b) { return _mm256_add_ps(a, b); }
inline Reals mul(Reals a, Reals b) { return _mm256_mul_ps(a, b); }
inline Reals fma(Reals a, Reals b, Reals c) { return _mm256_fmadd_ps(a, b, c); }
inline Reals sub(Reals a, Reals b) { return _mm256_sub_ps(a, b); }
inline Reals div(Reals a, Reals b) { return _mm256_div_ps(a, b); }
inline Reals fnma(Reals a, Reals b, Reals c) { return _mm256_fnmadd_ps(a, b, c); }
inline Reals least(Reals a, Reals b) { return _mm256_min_ps(a, b); }
inline Reals most(Reals a, Reals b) { return _mm256_max_ps(a, b); }
inline Ints most(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Ints nearest(Reals a) { return _mm256_cvtps_epi32(a); }
inline Ints load_lanes(const void* p, int64_t count) {
  const Ints numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const Ints within = _mm256_cmpgt_epi32(repeat(static_cast<int32_t>(count)), numbers);
  return _mm256_maskload_epi32(static_cast<const int*>(p), within);
}
inline void store_shorts(int16_t* p, Ints v) {
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), shorts);
}
template <int HALF>
inline Reals swap(Reals a) {
  if constexpr (HALF == 4) return _mm256_permute2f128_ps(a, a, 1);
  return _mm256_permute_ps(a, HALF == 1 ? 0xb1 : 0x4e);
}
#if defined(__AVXVNNI__)
constexpr bool EXACT_BYTES = true;
// In assembly, as above.
inline Ints dot_bytes(Ints sum, Ints weights, Ints x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(x));
  return sum;
}
inline Ints dot_shorts(Ints sum, Ints weights, Ints x) {
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(x));
  return sum;
}
#else
// vpmaddubsw saturates sums of two products to 16 bits, so it is exact only for weights of up to 7 bits.
constexpr bool EXACT_BYTES = false;
#define HFQUANT_PAIRS  // so products of few bits are added in pairs, see dot_pairs
// Addition in assembly: GCC would do all multiplications first and run out of registers.
inline Ints add_in_place(Ints sum, Ints more) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(more));
  return sum;
}
// Multiplies pairs of bytes to sums in 16 bits, adds more of them to such sums, and adds those to sums in 32 bits.
inline Ints pairs_of(Ints weights, Ints x) { return _mm256_maddubs_epi16(weights, x); }
inline Ints dot_pairs(Ints sum, Ints weights, Ints x) {
  asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs_of(weights, x)));
  return sum;
}
inline Ints add_pairs(Ints sum, Ints pairs) { return add_in_place(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
inline Ints dot_bytes(Ints sum, Ints weights, Ints x) { return add_pairs(sum, pairs_of(weights, x)); }
inline Ints dot_shorts(Ints sum, Ints weights, Ints x) { return add_in_place(sum, _mm256_madd_epi16(weights, x)); }
#endif
inline Ints widen_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Ints shift_left(Ints a, int bits) { return _mm256_slli_epi32(a, bits); }
inline float total(Reals a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline int32_t total(Ints a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline int32_t largest(Ints a) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline bool any_above(Reals a, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, repeat(limit), _CMP_GT_OQ));
}
inline Reals pick(const float* table, Ints lanes) { return _mm256_permutevar8x32_ps(load_reals(table), lanes); }
inline Ints quad_totals(Ints a, Ints b, Ints c, Ints d) {
  return _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
}
inline Reals quad_totals(Reals a, Reals b, Reals c, Reals d) {
  return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
}
inline Ints in_first_quad(Ints a) {
  return _mm256_zextsi128_si256(_mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}
inline void store_quads(float* p, Reals a, const float* scale) {
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  _mm_storeu_ps(p, _mm_mul_ps(sum, _mm_loadu_ps(scale)));
}
inline Ints flip(Ints bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
inline Ints field(Ints v, int shift, int32_t sign, int32_t mask) {
  return _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(v, shift), repeat(sign)), repeat(mask));
}
// Unpacks nibbles to unsigned bytes, the low ones of all bytes first.
inline void unpack_nibbles(Ints v, Ints w[2]) {
  v = _mm256_xor_si256(v, repeat(static_cast<int32_t>(0x88888888)));
  w[0] = _mm256_and_si256(v, repeat(0x0f0f0f0f));
  w[1] = _mm256_and_si256(_mm256_srli_epi16(v, 4), repeat(0x0f0f0f0f));
}
inline Ints widen(const uint8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int BITS>
inline Ints unpack(const uint8_t* p) {
  if constexpr (BITS == 4) {
    const Ints pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return field(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), 0, 0x08080808, 0x0f0f0f0f);
  }
  static constexpr Halves<BITS> EVEN(0), ODD(1);
  auto sixteen = [p](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * BITS * i)); };
  const Ints v = _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(0)), sixteen(1), 1);
  auto codes = [v](const Halves<BITS>& h) {
    const Ints order = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(h.order)));
    const Ints factor = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(h.factor)));
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(v, order), factor), 16 - BITS);
  };
  const Ints both = _mm256_or_si256(codes(EVEN), _mm256_slli_epi16(codes(ODD), 8));
  return _mm256_xor_si256(both, _mm256_set1_epi8(1 << (BITS - 1)));
}
inline void transpose(Ints r[8]) {
  Ints t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x20);
    t[j + 4] = _mm256_permute2x128_si256(r[j], r[j + 4], 0x31);
  }
  for (int j = 0; j < 8; ++j) r[j] = t[j];
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
