// The few vector operations that the kernels use, for the instruction set that this file is compiled for. Lanes are 32
// bits wide. A word is what one lane multiplies: four codes of 8 bits or two of 16.
#pragma once

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "portable.h"
#endif

namespace hfquant {
namespace HFQUANT_ISA {

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

}  // namespace HFQUANT_ISA
}  // namespace hfquant
