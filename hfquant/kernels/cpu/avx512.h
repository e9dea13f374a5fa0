// The vector operations on AVX512-VNNI, and bfloat16 products where the file is compiled for them; see vector.h.
#pragma once

#include "halves.h"

namespace hfquant {
namespace HFQUANT_ISA {

using Ints = __m512i;
using Reals = __m512;
constexpr int LANES = 16;
// Register blocking, tokens by vectors of rows: enough accumulators to keep both ports busy that still fit registers.
constexpr int TOKENS = 8, VECTORS = 2;
// Integer tiles take WIDER times the vectors and 1 / WIDER of the tokens if there are enough rows: that reads less, as
// long as registers hold one column of all rows.
constexpr int WIDER = 2;
constexpr bool EXACT_BYTES = true;

inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Reals load_reals(const float* p) { return _mm512_loadu_ps(p); }
inline void store_reals(float* p, Reals v) { _mm512_storeu_ps(p, v); }
inline Ints zeros() { return _mm512_setzero_si512(); }
inline Ints repeat(int32_t word) { return _mm512_set1_epi32(word); }
inline Reals repeat(float value) { return _mm512_set1_ps(value); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints add_bytes(Ints a, Ints b) { return _mm512_add_epi8(a, b); }
inline Ints add_shorts(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
inline Ints times(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Reals to_reals(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Reals as_reals(Ints a) { return _mm512_castsi512_ps(a); }
inline Ints as_ints(Reals a) { return _mm512_castps_si512(a); }
inline Reals add(Reals a, Reals b) { return _mm512_add_ps(a, b); }
inline Reals mul(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
inline Reals fma(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
inline Reals sub(Reals a, Reals b) { return _mm512_sub_ps(a, b); }
inline Reals div(Reals a, Reals b) { return _mm512_div_ps(a, b); }
inline Reals fnma(Reals a, Reals b, Reals c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
// Both return b if either is NaN.
inline Reals least(Reals a, Reals b) { return _mm512_min_ps(a, b); }
inline Reals most(Reals a, Reals b) { return _mm512_max_ps(a, b); }
inline Ints most(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints nearest(Reals a) { return _mm512_cvtps_epi32(a); }  // half to even
// Loads the first `count` lanes; the others are zero.
inline Ints load_lanes(const void* p, int64_t count) { return _mm512_maskz_loadu_epi32((1u << count) - 1, p); }
inline void store_shorts(int16_t* p, Ints v) {  // narrows each lane to 16 bits
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
template <int HALF>
inline Reals swap(Reals a) {  // swaps lanes HALF apart, a power of two
  if constexpr (HALF >= 4) return _mm512_shuffle_f32x4(a, a, HALF == 4 ? 0xb1 : 0x4e);
  return _mm512_permute_ps(a, HALF == 1 ? 0xb1 : 0x4e);
}
// In assembly: with intrinsics, GCC copies the accumulator to another register and back.
inline Ints dot_bytes(Ints sum, Ints weights, Ints x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
}
inline Ints dot_shorts(Ints sum, Ints weights, Ints x) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
}
#if defined(__AVX512BF16__)
// The order in which two vectors' shorts alternate.
struct Alternately {
  alignas(64) int16_t of[32];
  constexpr Alternately() : of() {
    for (int i = 0; i < 32; ++i) of[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
  }
};
static constexpr Alternately ALTERNATELY;
// Adds two products of bfloat16 numbers per lane to float32 sums. Subnormal numbers count as zero.
inline Ints dot_bfloat16s(Ints sum, Ints weights, Ints x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
}
// Multiplies the two signed shorts of each lane by its scale and rounds to bfloat16.
inline Ints round_to_bfloat16s(Ints shorts, Reals scale) {
  const Reals low = mul(to_reals(_mm512_srai_epi32(_mm512_slli_epi32(shorts, 16), 16)), scale);
  const Reals high = mul(to_reals(_mm512_srai_epi32(shorts, 16)), scale);
  const Ints both = (Ints)_mm512_cvtne2ps_pbh(high, low);
  return _mm512_permutexvar_epi16(load(ALTERNATELY.of), both);
}
#endif
inline Ints widen_bytes(const uint8_t* p) {  // zero-extends LANES bytes, one per lane
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints shift_left(Ints a, int bits) { return _mm512_slli_epi32(a, bits); }
inline float total(Reals a) { return _mm512_reduce_add_ps(a); }
inline int32_t total(Ints a) { return _mm512_reduce_add_epi32(a); }
inline int32_t largest(Ints a) { return _mm512_reduce_max_epi32(a); }
inline bool any_above(Reals a, float limit) { return _mm512_cmp_ps_mask(a, repeat(limit), _CMP_GT_OQ); }
inline Reals pick(const float* table, Ints lanes) { return _mm512_permutexvar_ps(lanes, load_reals(table)); }
// Lane r of each four lanes is the sum of those of vector r.
inline Ints quad_totals(Ints a, Ints b, Ints c, Ints d) {
  a = add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  c = add(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return add(_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c));
}
inline Reals quad_totals(Reals a, Reals b, Reals c, Reals d) {
  a = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  c = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return add(_mm512_shuffle_ps(a, c, 0x44), _mm512_shuffle_ps(a, c, 0xee));
}
inline Ints in_first_quad(Ints a) {  // adds up quads; the others become zero
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  return _mm512_zextsi128_si512(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
// Stores the sums over quads of their four lanes, times `scale`.
inline void store_quads(float* p, Reals a, const float* scale) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(p, _mm_mul_ps(sum, _mm_loadu_ps(scale)));
}
inline Ints flip(Ints bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
// Shifts each 16 bits right, then computes (v ^ sign) & mask.
inline Ints field(Ints v, int shift, int32_t sign, int32_t mask) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, shift), repeat(sign), repeat(mask), 0x28);
}
// Unpacks nibbles to unsigned bytes, the low ones of all bytes first.
inline void unpack_nibbles(Ints v, Ints w[2]) {
  w[0] = field(v, 0, 0x08080808, 0x0f0f0f0f);
  w[1] = field(v, 4, 0x08080808, 0x0f0f0f0f);
}
inline Ints widen(const uint8_t* p) {  // sign-extends half a vector of bytes to 16 bits
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Unpacks BYTES codes of less than 8 bits from BYTES / 8 * BITS bytes to unsigned bytes: multiplies the two bytes that
// hold a code to move it to the top of 16 bits, then shifts it down. May read up to BYTES bytes.
template <int BITS>
inline Ints unpack(const uint8_t* p) {
  if constexpr (BITS == 4) {
    const Ints pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return field(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), 0, 0x08080808, 0x0f0f0f0f);
  }
  static constexpr Halves<BITS> EVEN(0), ODD(1);
  auto sixteen = [p](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * BITS * i)); };
  Ints v = _mm512_castsi128_si512(sixteen(0));
  v = _mm512_inserti32x4(v, sixteen(1), 1);
  v = _mm512_inserti32x4(v, sixteen(2), 2);
  v = _mm512_inserti32x4(v, sixteen(3), 3);
  auto codes = [v](const Halves<BITS>& h) {
    const Ints order = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(h.order)));
    const Ints factor = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(h.factor)));
    return _mm512_srli_epi16(_mm512_mullo_epi16(_mm512_shuffle_epi8(v, order), factor), 16 - BITS);
  };
  const Ints both = _mm512_or_si512(codes(EVEN), _mm512_slli_epi16(codes(ODD), 8));
  return _mm512_xor_si512(both, _mm512_set1_epi8(1 << (BITS - 1)));
}
inline void transpose(Ints r[16]) {
  Ints t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
    t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    r[j + 4] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0x88);
    r[j + 12] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0xdd);
  }
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
