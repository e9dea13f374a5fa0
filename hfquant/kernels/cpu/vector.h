// The few vector operations that the kernels use, for the instruction set that this file is compiled for. Lanes are 32
// bits wide. A word is what one lane multiplies: four codes of 8 bits or two of 16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Arrays of vectors stay in registers only if every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 16")

namespace hfquant {
namespace HFQUANT_ISA {

// Positions of the two bytes that hold each code within the 2 * BITS bytes of sixteen codes, and the factor that moves
// it to the top of those 16 bits: for even codes (first = 0) or odd ones (first = 1).
template <int BITS>
struct Halves {
  alignas(16) int8_t order[16];
  alignas(16) int16_t factor[8];

  constexpr explicit Halves(int first) : order(), factor() {
    for (int i = 0; i < 8; ++i) {
      const int bit = (2 * i + first) * BITS;
      order[2 * i] = static_cast<int8_t>(bit / 8);
      order[2 * i + 1] = static_cast<int8_t>(bit / 8 + 1);
      factor[i] = static_cast<int16_t>(1 << (16 - BITS - bit % 8));
    }
  }
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
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
// Adds two products of bfloat16 numbers per lane to float32 sums. Subnormal float32 results become zero.
inline Ints dot_bfloat16s(Ints sum, Ints weights, Ints x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
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
inline Ints flip(Ints bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
// Shifts each 16 bits right, then computes (v ^ sign) & mask.
inline Ints field(Ints v, int shift, int32_t sign, int32_t mask) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, shift), repeat(sign), repeat(mask), 0x28);
}
inline Ints widen(const uint8_t* p) {  // sign-extends half a vector of bytes to 16 bits
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Unpacks BYTES codes of less than 8 bits from BYTES / 8 * BITS bytes to unsigned bytes: multiplies the two bytes that
// hold a code to move it to the top of 16 bits, then shifts it down. May read up to BYTES bytes.
template <int BITS>
inline Ints unpack(const uint8_t* p) {
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

#elif defined(__AVX2__)
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
// Addition in assembly: GCC would do all multiplications first and run out of registers.
inline Ints add_in_place(Ints sum, Ints more) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(more));
  return sum;
}
inline Ints dot_bytes(Ints sum, Ints weights, Ints x) {
  return add_in_place(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, x), _mm256_set1_epi16(1)));
}
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
inline Ints flip(Ints bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
inline Ints field(Ints v, int shift, int32_t sign, int32_t mask) {
  return _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(v, shift), repeat(sign)), repeat(mask));
}
inline Ints widen(const uint8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <int BITS>
inline Ints unpack(const uint8_t* p) {
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

#else
// Any CPU, through the compiler's generic 128-bit vectors.
typedef int32_t Ints __attribute__((vector_size(16)));
typedef float Reals __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));
typedef uint32_t UInts __attribute__((vector_size(16)));
constexpr int LANES = 4;
constexpr int TOKENS = 4, VECTORS = 2, WIDER = 1;
constexpr bool EXACT_BYTES = true;

inline Ints load(const void* p) {
  Ints v;
  std::memcpy(&v, p, 16);
  return v;
}
inline void store(void* p, Ints v) { std::memcpy(p, &v, 16); }
inline Reals load_reals(const float* p) {
  Reals v;
  std::memcpy(&v, p, 16);
  return v;
}
inline void store_reals(float* p, Reals v) { std::memcpy(p, &v, 16); }
inline Ints zeros() { return Ints{}; }
inline Ints repeat(int32_t word) { return Ints{word, word, word, word}; }
inline Reals repeat(float value) { return Reals{value, value, value, value}; }
inline Ints add(Ints a, Ints b) { return (Ints)((UInts)a + (UInts)b); }
inline Ints add_bytes(Ints a, Ints b) { return (Ints)((Bytes)a + (Bytes)b); }
inline Ints add_shorts(Ints a, Ints b) { return (Ints)((Words)a + (Words)b); }
inline Ints times(Ints a, Ints b) { return a * b; }
inline Reals to_reals(Ints a) { return __builtin_convertvector(a, Reals); }
inline Reals as_reals(Ints a) { return (Reals)a; }
inline Reals add(Reals a, Reals b) { return a + b; }
inline Reals mul(Reals a, Reals b) { return a * b; }
inline Reals fma(Reals a, Reals b, Reals c) { return a * b + c; }
inline Reals sub(Reals a, Reals b) { return a - b; }
inline Reals div(Reals a, Reals b) { return a / b; }
inline Reals least(Reals a, Reals b) { return a < b ? a : b; }
inline Reals most(Reals a, Reals b) { return a > b ? a : b; }
inline Ints most(Ints a, Ints b) { return a > b ? a : b; }
// Adding 1.5 * 2^23 leaves no fractional bits.
inline Ints nearest(Reals a) { return __builtin_convertvector((a + 12582912.0f) - 12582912.0f, Ints); }
inline Ints load_lanes(const void* p, int64_t count) {
  Ints v = {};
  std::memcpy(&v, p, 4 * count);
  return v;
}
inline void store_shorts(int16_t* p, Ints v) {
  for (int i = 0; i < LANES; ++i) p[i] = static_cast<int16_t>(v[i]);
}
template <int HALF>
inline Reals swap(Reals a) {
  return HALF == 1 ? Reals{a[1], a[0], a[3], a[2]} : Reals{a[2], a[3], a[0], a[1]};
}
// Products of two bytes fit 16 bits, so the even bytes of all lanes are multiplied at once, then the odd ones.
inline Ints dot_bytes(Ints sum, Ints weights, Ints x) {
  const Shorts w = (Shorts)weights, c = (Shorts)x;
  const Ints even = (Ints)((w & 255) * (c << 8 >> 8)), odd = (Ints)((Shorts)((Words)w >> 8) * (c >> 8));
  return sum + ((even << 16 >> 16) + (even >> 16)) + ((odd << 16 >> 16) + (odd >> 16));
}
inline Ints dot_shorts(Ints sum, Ints weights, Ints x) {
  int16_t w[8], c[8];
  std::memcpy(w, &weights, 16);
  std::memcpy(c, &x, 16);
  for (int i = 0; i < 8; ++i) sum[i / 2] += w[i] * c[i];
  return sum;
}
inline Ints widen_bytes(const uint8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
inline Ints shift_left(Ints a, int bits) { return (Ints)((UInts)a << bits); }
inline float total(Reals a) { return (a[0] + a[1]) + (a[2] + a[3]); }
inline int32_t total(Ints a) { return (a[0] + a[1]) + (a[2] + a[3]); }
inline int32_t largest(Ints a) { return std::max(std::max(a[0], a[1]), std::max(a[2], a[3])); }
inline bool any_above(Reals a, float limit) { return largest(a > limit ? repeat(1) : zeros()); }
inline Reals pick(const float* table, Ints lanes) {
  return Reals{table[lanes[0]], table[lanes[1]], table[lanes[2]], table[lanes[3]]};
}
inline Ints flip(Ints bytes) { return (Ints)((Bytes)bytes ^ 128); }
inline Ints field(Ints v, int shift, int32_t sign, int32_t mask) {
  return ((Ints)((Words)v >> shift) ^ sign) & mask;
}
inline Ints widen(const uint8_t* p) {
  int16_t out[8];
  for (int i = 0; i < 8; ++i) out[i] = static_cast<int8_t>(p[i]);
  return load(out);
}
template <int BITS>
inline Ints unpack(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 2; ++i, p += BITS) {
    uint64_t v = 0;
    for (int j = 0; j < BITS; ++j) v |= static_cast<uint64_t>(p[j]) << 8 * j;
    for (int j = 0; j < 8; ++j) out[8 * i + j] = (v >> (BITS * j) & ((1 << BITS) - 1)) ^ (1 << (BITS - 1));
  }
  return (Ints)out;
}
inline void transpose(Ints r[4]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const int32_t kept = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = kept;
    }
}
#endif

constexpr int BYTES = 4 * LANES;

// a / b from b's reciprocal, in a quarter of a division's time. The first correction leaves an error below one ulp, so
// the second has an exact remainder and gives the division's result (P. Markstein, IBM J. Res. Dev. 34, 1990), unless
// the remainder underflows, for a below 2^-78.
inline Reals quotient(Reals a, Reals b, Reals inverse) {
#if defined(__FMA__)
  Reals q = mul(a, inverse);
  for (int i = 0; i < 2; ++i) q = fma(fnma(q, b, a), inverse, q);
  return q;
#else
  return div(a, b);
#endif
}

inline Reals scale_values(const uint8_t* p) {  // decodes bytes of scales, see scale_value
  return as_reals(add(shift_left(widen_bytes(p), 18), repeat((127 - 7) << 23)));
}

// Horizontal sums of LANES vectors, one per lane; overwrites v.
template <class Vector>
inline Vector totals(Vector v[LANES]) {
  Ints bits[LANES];
  for (int i = 0; i < LANES; ++i) bits[i] = load(v + i);
  transpose(bits);
  for (int i = 0; i < LANES; ++i) store(v + i, bits[i]);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = add(v[i], v[i + half]);
  return v[0];
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
