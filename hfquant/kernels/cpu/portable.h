// The vector operations in portable C++, on vectors of 128 bits; see vector.h.
#pragma once

#include "halves.h"

namespace hfquant {
namespace HFQUANT_ISA {

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
inline Ints as_ints(Reals a) { return (Ints)a; }
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
inline Ints quad_totals(Ints a, Ints b, Ints c, Ints d) { return Ints{total(a), total(b), total(c), total(d)}; }
inline Reals quad_totals(Reals a, Reals b, Reals c, Reals d) { return Reals{total(a), total(b), total(c), total(d)}; }
inline Ints in_first_quad(Ints a) { return a; }
inline void store_quads(float* p, Reals a, const float* scale) { store_reals(p, a * load_reals(scale)); }
inline Ints flip(Ints bytes) { return (Ints)((Bytes)bytes ^ 128); }
inline Ints field(Ints v, int shift, int32_t sign, int32_t mask) {
  return ((Ints)((Words)v >> shift) ^ sign) & mask;
}
// Unpacks nibbles to unsigned bytes, the low ones of all bytes first.
inline void unpack_nibbles(Ints v, Ints w[2]) {
  w[0] = field(v, 0, 0x08080808, 0x0f0f0f0f);
  w[1] = field(v, 4, 0x08080808, 0x0f0f0f0f);
}
inline Ints widen(const uint8_t* p) {
  int16_t out[8];
  for (int i = 0; i < 8; ++i) out[i] = static_cast<int8_t>(p[i]);
  return load(out);
}
template <int BITS>
inline Ints unpack(const uint8_t* p) {
  if constexpr (BITS == 4) {
    uint8_t __attribute__((vector_size(8))) bytes;
    std::memcpy(&bytes, p, 8);
    const Words pairs = __builtin_convertvector(bytes, Words);
    return field((Ints)(pairs | pairs << 4), 0, 0x08080808, 0x0f0f0f0f);
  }
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

}  // namespace HFQUANT_ISA
}  // namespace hfquant
