// What the vector operations of every instruction set share: unrolling, and where codes lie in bytes.
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

}  // namespace HFQUANT_ISA
}  // namespace hfquant
