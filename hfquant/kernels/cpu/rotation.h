// Blocks of channels times Sylvester's Hadamard matrix, as formats/rotation.py has it.
#pragma once

#include <cmath>
#include <cstdint>

#include "vector.h"

namespace hfquant {
namespace HFQUANT_ISA {

// The matrix of 16 channels: minus where the indices share an odd number of bits.
constexpr int64_t SIXTEEN = 16;
struct Signs {
  float of[SIXTEEN][SIXTEEN];
  constexpr Signs() : of() {
    for (int i = 0; i < SIXTEEN; ++i)
      for (int j = 0; j < SIXTEEN; ++j) {
        const int shared = i & j;
        of[i][j] = ((shared ^ shared >> 1 ^ shared >> 2 ^ shared >> 3) & 1) ? -1.0f : 1.0f;
      }
  }
};
inline constexpr Signs SIGNS;

// COUNT times sixteen neighboring channels, each a product with the matrix: vectors need no shuffles so, and sums that
// do not wait for each other hide what one takes.
template <int COUNT>
inline void rotate_sixteens(float* x, Reals unit) {
  constexpr int PARTS = SIXTEEN / LANES;
  Reals sums[COUNT][PARTS];
  for (int c = 0; c < COUNT; ++c)
    for (int part = 0; part < PARTS; ++part) sums[c][part] = to_reals(zeros());
  for (int64_t i = 0; i < SIXTEEN; ++i)
    for (int part = 0; part < PARTS; ++part) {
      const Reals signs = load_reals(SIGNS.of[i] + part * LANES);
      for (int c = 0; c < COUNT; ++c) sums[c][part] = fma(repeat(x[c * SIXTEEN + i]), signs, sums[c][part]);
    }
  for (int c = 0; c < COUNT; ++c)
    for (int part = 0; part < PARTS; ++part) store_reals(x + c * SIXTEEN + part * LANES, mul(sums[c][part], unit));
}

// What is wider than sixteen is made of sums and differences.
inline void rotate_block(float* x, int64_t size) {
  const float unit = static_cast<float>(1 / std::sqrt(static_cast<double>(size)));
  if (size < SIXTEEN) {
    for (int64_t i = 0; i < size; ++i) x[i] *= unit;
    for (int64_t half = 1; half < size; half *= 2)
      for (int64_t i = 0; i < size; ++i)
        if (!(i & half)) {
          const float a = x[i], b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
    return;
  }
  int64_t done = 0;
  for (; done + 4 * SIXTEEN <= size; done += 4 * SIXTEEN) rotate_sixteens<4>(x + done, repeat(unit));
  for (; done < size; done += SIXTEEN) rotate_sixteens<1>(x + done, repeat(unit));
  for (int64_t half = SIXTEEN; half < size; half *= 2)
    for (int64_t start = 0; start < size; start += 2 * half)
      for (int64_t i = start; i < start + half; i += LANES) {
        const Reals a = load_reals(x + i), b = load_reals(x + i + half);
        store_reals(x + i, fma(b, repeat(1.0f), a));
        store_reals(x + i + half, fma(b, repeat(-1.0f), a));
      }
}

// Blocks of `size`, a power of two, then the rest in smaller ones.
inline void rotate(float* x, int64_t count, int64_t size) {
  for (; size > 1; size /= 2)
    for (; count >= size; count -= size, x += size) rotate_block(x, size);
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
