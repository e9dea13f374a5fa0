// Rotates blocks of channels by Sylvester's Hadamard matrix, like formats/rotation.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "vector.h"

namespace hfquant {
namespace HFQUANT_ISA {

// -1 in lanes whose index has the bit HALF set, else 1.
template <int HALF>
struct Alternating {
  float of[LANES];
  constexpr Alternating() : of() {
    for (int i = 0; i < LANES; ++i) of[i] = i & HALF ? -1.0f : 1.0f;
  }
};

// Butterflies within a vector: sums and differences of lanes HALF apart, then of lanes twice as far, and so on.
template <int HALF = 1>
inline Reals rotate_lanes(Reals x) {
  if constexpr (HALF == LANES) {
    return x;
  } else {
    alignas(64) static constexpr Alternating<HALF> SIGNS;
    return rotate_lanes<2 * HALF>(fma(x, load_reals(SIGNS.of), swap<HALF>(x)));
  }
}

// Rotates COUNT vectors of neighboring channels in registers.
template <int COUNT>
inline void rotate_vectors(const float* x, float* out, Reals unit) {
  Reals v[COUNT];
  UNROLL for (int i = 0; i < COUNT; ++i) v[i] = rotate_lanes(mul(load_reals(x + i * LANES), unit));
  UNROLL for (int half = 1; half < COUNT; half *= 2)
    UNROLL for (int i = 0; i < COUNT; ++i)
      if (!(i & half)) {
        const Reals a = v[i], b = v[i + half];
        v[i] = add(a, b);
        v[i + half] = sub(a, b);
      }
  UNROLL for (int i = 0; i < COUNT; ++i) store_reals(out + i * LANES, v[i]);
}

inline void rotate_block(const float* x, int64_t size, float* out) {
  const float unit = static_cast<float>(1 / std::sqrt(static_cast<double>(size)));
  int64_t half = 1;
  if (size < LANES) {
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * unit;
    for (; half < size; half *= 2)
      for (int64_t i = 0; i < size; ++i)
        if (!(i & half)) {
          const float a = out[i], b = out[i + half];
          out[i] = a + b;
          out[i + half] = a - b;
        }
    return;
  }
  half = std::min<int64_t>(size, 4 * LANES);
  auto turn = half == LANES ? rotate_vectors<1> : half == 2 * LANES ? rotate_vectors<2> : rotate_vectors<4>;
  for (int64_t i = 0; i < size; i += half) turn(x + i, out + i, repeat(unit));
  for (; half < size; half *= 2)
    for (int64_t start = 0; start < size; start += 2 * half)
      for (int64_t i = start; i < start + half; i += LANES) {
        const Reals a = load_reals(out + i), b = load_reals(out + i + half);
        store_reals(out + i, add(a, b));
        store_reals(out + i + half, sub(a, b));
      }
}

// Rotates blocks of `size`, a power of two, then the rest in smaller blocks; `out` may alias `x`.
inline void rotate(const float* x, int64_t count, int64_t size, float* out) {
  int64_t k = 0;
  for (; size > 1; size /= 2)
    for (; k + size <= count; k += size) rotate_block(x + k, size, out + k);
  if (k < count) out[k] = x[k];
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
