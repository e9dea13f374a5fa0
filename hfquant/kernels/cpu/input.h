// Quantizes the input one token at a time, with the results of formats/inputs.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "job.h"
#include "rotation.h"
#include "scratch.h"

namespace hfquant {
namespace HFQUANT_ISA {

constexpr float NAN_ = std::numeric_limits<float>::quiet_NaN();
constexpr float MIN_SCALE = 1.1754943508222875e-38f;  // 2^-126
// Weight-only products convert float inputs to 16-bit integers, with one scale per 128 columns. The error is at most
// 2^-16 of the largest value: relative to the norm of the 128, typically 2e-5 and at worst 1.8e-4. The range is what
// two signed bytes, 256 high + low, reach on both sides.
constexpr int FLOAT_BLOCK = 128;
constexpr float FLOAT_LIMIT = 32639;
constexpr int CODE_LIMIT = 32639;

// Number of input scales per token.
inline int64_t input_scales(const Job& job) {
  return job.input_bits || job.format != INTEGERS ? job.segments : (job.K + FLOAT_BLOCK - 1) / FLOAT_BLOCK;
}

struct Range {
  float low, high;
  bool finite;
};

// Compares bit patterns: as integers, positive floats are ordered, and so are negative ones once their sign is flipped.
// NaN and infinities compare above everything else.
inline Range range_of(const float* x, int64_t count) {
  const Ints sign = repeat(INT32_MIN);
  Ints above = zeros(), below = zeros();
  auto see = [&](Ints bits) {
    above = most(above, bits);
    below = most(below, add(bits, sign));
  };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) see(load(x + i));
  if (i < count) see(load_lanes(x + i, count - i));
  const int32_t high = largest(above), low = largest(below);
  return {-of_bits(low), of_bits(high), std::max(high, low) < 0x7f800000};
}

// Rounds half to even; from 2^22 on only approximately.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// NaN maps to the lower limit; its token's scale is NaN.
inline int16_t code_of(float quotient, float limit) {
  float rounded = round_even(quotient);
  rounded = rounded > -limit ? rounded : -limit;
  rounded = rounded < limit ? rounded : limit;
  return static_cast<int16_t>(static_cast<int32_t>(rounded));
}

// Quotients are computed as x times the reciprocal. If one is so close to a rounding boundary that its last bit
// decides, this many quotients are recomputed by division.
constexpr int64_t QUOTIENTS = 128;
constexpr float CLOSE = 0.4999f;

// Rounds to FP8 values (not codes), half to even, saturated. Adding 1.5 * 2^23 steps leaves no bits below one step.
struct ToFp8 {
  float limit, smallest, epsilon;  // largest number, smallest normal number, step from 1 to the next

  static ToFp8 of(Format format) {
    return format == FP8_E4M3 ? ToFp8{448, 0x1p-6f, 0x1p-3f} : ToFp8{57344, 0x1p-14f, 0x1p-2f};
  }
  float step(float quotient) const {
    const float power = of_bits(bits_of(quotient) & 0x7f800000);
    return (power > smallest ? power : smallest) * epsilon;
  }
  float operator()(float quotient) const {
    quotient = quotient > -limit ? quotient : -limit;
    quotient = quotient < limit ? quotient : limit;
    const float large = step(quotient) * 0x1.8p23f;
    return std::copysign((std::fabs(quotient) + large) - large, quotient);
  }
  bool close(float quotient) const {
    return std::fabs(quotient - (*this)(quotient)) > CLOSE * step(quotient);
  }
};

// Rounds x / scale to integers in [-limit, limit]; NaN maps to the lower limit, and its token's scale is NaN. Writes
// whole vectors of codes, zero beyond the last.
inline void to_codes(const float* x, int64_t count, float scale, float limit, int16_t* codes) {
  const Reals inverse = repeat(1.0f / scale), high = repeat(limit), low = repeat(-limit);
  for (int64_t start = 0; start < count; start += QUOTIENTS) {
    const int64_t end = std::min(start + QUOTIENTS, count);
    Reals apart = repeat(0.0f);
    auto code = [&](int64_t i, auto... quotients) {
      constexpr int COUNT = sizeof...(quotients);
      Reals q[COUNT] = {quotients...};
      Ints rounded[COUNT];
      UNROLL for (Reals& v : q) v = least(most(v, low), high);
      UNROLL for (int v = 0; v < COUNT; ++v) rounded[v] = nearest(q[v]);
      UNROLL for (int v = 0; v < COUNT; ++v) store_shorts(codes + i + v * LANES, rounded[v]);
      UNROLL for (int v = 0; v < COUNT; ++v) q[v] = sub(q[v], to_reals(rounded[v]));
      UNROLL for (const Reals& v : q) apart = most(apart, mul(v, v));
    };
    auto each = [&](auto quotient) {
      int64_t i = start;
      auto at = [&](int v) { return quotient(load_reals(x + i + v * LANES)); };
      for (; i + 4 * LANES <= end; i += 4 * LANES) code(i, at(0), at(1), at(2), at(3));
      for (; i + LANES <= end; i += LANES) code(i, at(0));
      if (i < end) code(i, quotient(as_reals(load_lanes(x + i, end - i))));
    };
    each([&](Reals v) { return mul(v, inverse); });
    if (any_above(apart, CLOSE * CLOSE)) each([&](Reals v) { return div(v, repeat(scale)); });
  }
}

// Rounds x / scale to FP8 values; `out` must not alias `x`.
inline void to_fp8(const float* x, int64_t count, float scale, ToFp8 round, float* __restrict out) {
  const float inverse = 1.0f / scale;
  for (int64_t start = 0; start < count; start += QUOTIENTS) {
    const int64_t end = std::min(start + QUOTIENTS, count);
    int close = 0;
    for (int64_t i = start; i < end; ++i) {
      const float quotient = x[i] * inverse;
      close |= round.close(quotient);
      out[i] = round(quotient);
    }
    for (int64_t i = start; close && i < end; ++i) out[i] = round(x[i] / scale);
  }
}

// amax / qmax, or 1 if amax is 0. As in formats/base.py, amax is clipped a millionth below float32's maximum.
inline float scale_of(float amax, float qmax) {
  constexpr float MOST = std::numeric_limits<float>::max() * (1 - 0x1p-20f);
  const float scale = (amax < MOST ? amax : MOST) / qmax;
  return amax == 0 ? 1.0f : scale > MIN_SCALE ? scale : MIN_SCALE;
}

// floor(log2(high / -low)), clamped to [0, most].
inline int dual_exponent(float low, float high, int most) {
  low = low < 0 ? -low : 0;
  high = high > 0 ? high : 0;
  if (high == 0) return 0;
  if (low == 0) return most;
  int i, j;
  const float m = std::frexp(high, &i), n = std::frexp(low, &j);
  const int e = i - j - (m < n);
  return e < 0 ? 0 : e > most ? most : e;
}

struct Scales {
  float positive, negative;
};

inline Scales scales_of(const Job& job, int64_t segment, Range range) {
  if (job.input_scale) {
    const float positive = job.input_scale[segment];
    return {positive, job.input_scale_neg ? job.input_scale_neg[segment] : positive};
  }
  const float qmax = (1 << (job.input_bits - 1)) - 1;
  const float scale = scale_of(-range.low > range.high ? -range.low : range.high, qmax);
  if (!job.dual[segment]) return {scale, scale};
  const float negative = std::ldexp(scale, -dual_exponent(range.low, range.high, 16 - job.input_bits));
  return {scale, negative < MIN_SCALE ? scale : negative};
}

// Dual scale: each sign has its own scale; positive codes are scaled up to the negative side's.
inline void to_dual_codes(const float* x, int64_t count, Scales scales, float limit, int16_t* codes) {
  const int ratio = static_cast<int>(scales.positive / scales.negative);
  const int most = CODE_LIMIT / static_cast<int>(limit);
  const int factor = ratio < 1 ? 1 : ratio > most ? most : ratio;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t code = code_of(x[i] / (x[i] < 0 ? scales.negative : scales.positive), limit);
    codes[i] = static_cast<int16_t>(code < 0 ? code : code * factor);
  }
}

// Writes the divisor's reciprocals to `out` [K]; returns null if a divisor or reciprocal is too large or too small.
inline const float* inverse_of(const Job& job, float* out) {
  float high = 1, low = 1;
  for (int64_t k = 0; k < job.K; ++k) {
    out[k] = 1 / job.divisor[k];
    high = std::max(high, job.divisor[k]);
    low = std::min(low, job.divisor[k]);
  }
  return high < 0x1p60f && low > 0x1p-60f ? out : nullptr;
}

// Returns the token's input as floats, divided and rotated; in `buffer` [K] unless x can be read in place.
inline const float* floats_of(const Job& job, int64_t token, float* buffer) {
  const float* x = static_cast<const float*>(job.x.data) + token * job.K;
  if (job.x.type != FLOAT32) {
    to_floats(job.x, token * job.K, job.K, buffer);
    x = buffer;
  }
  if (job.divisor) {
    int64_t k = 0;
    for (; job.inverse && k + LANES <= job.K; k += LANES) {
      const Reals divisor = load_reals(job.divisor + k), inverse = load_reals(job.inverse + k);
      store_reals(buffer + k, quotient(load_reals(x + k), divisor, inverse));
    }
    for (; k < job.K; ++k) buffer[k] = x[k] / job.divisor[k];
    x = buffer;
  }
  if (!job.rotation) return x;
  rotate(x, job.K, job.rotation, buffer);
  return buffer;
}

// Ranges of each segment over all tokens if scales are dynamic and per tensor; else empty.
inline std::vector<Range> shared_ranges(const Job& job) {
  std::vector<Range> ranges;
  if (!job.input_bits || job.input_scale || job.per_token) return ranges;
  std::vector<float> buffer(job.K);
  for (int64_t m = 0; m < job.M; ++m) {
    const float* x = floats_of(job, m, buffer.data());
    for (int64_t s = 0; s < job.segments; x += job.segment[s++]) {
      const Range r = range_of(x, job.segment[s]);
      if (m == 0) {
        ranges.push_back(r);
        continue;
      }
      Range& all = ranges[s];
      all = {r.low < all.low ? r.low : all.low, r.high > all.high ? r.high : all.high, all.finite && r.finite};
    }
  }
  return ranges;
}

// Quantizes a token to codes [K] and scales [input_scales]; a token with NaN or Inf gets NaN scales.
inline void quantize(const Job& job, int64_t token, const std::vector<Range>& shared, float* buffer, int16_t* codes,
                     float* scales) {
  const float* x = floats_of(job, token, buffer);
  if (!job.input_bits) {
    for (int64_t start = 0, i = 0; start < job.K; start += FLOAT_BLOCK, ++i) {
      const int64_t size = job.K - start < FLOAT_BLOCK ? job.K - start : FLOAT_BLOCK;
      const Range r = range_of(x + start, size);
      const float scale = scale_of(-r.low > r.high ? -r.low : r.high, FLOAT_LIMIT);
      to_codes(x + start, size, r.finite ? scale : 1, FLOAT_LIMIT, codes + start);
      scales[i] = r.finite ? scale : NAN_;
    }
    return;
  }
  // All scales before all codes, so that no segment's codes wait for their scale.
  static thread_local Scratch of_found;
  Scales* found = of_found.get<Scales>(job.segments);
  bool finite = true;
  for (int64_t s = 0, start = 0; s < job.segments; start += job.segment[s++]) {
    Range r = range_of(x + start, job.segment[s]);
    finite = finite && r.finite;
    if (!shared.empty()) {
      r = shared[s];
      finite = finite && r.finite;
    }
    found[s] = r.finite || job.input_scale ? scales_of(job, s, r) : Scales{1, 1};
    scales[s] = found[s].negative;
  }
  const float limit = (1 << (job.input_bits - 1)) - 1;
  for (int64_t s = 0, start = 0; s < job.segments; start += job.segment[s++])
    if (found[s].positive == found[s].negative)
      to_codes(x + start, job.segment[s], found[s].positive, limit, codes + start);
    else
      to_dual_codes(x + start, job.segment[s], found[s], limit, codes + start);
  if (!finite)
    for (int64_t s = 0; s < job.segments; ++s) scales[s] = NAN_;
}

// Rounds a token to FP8 values [K], as floats, and writes its scales [segments]; a token with NaN or Inf gets NaN
// scales. `buffer` [K] must not alias `out`.
inline void round_to_fp8(const Job& job, int64_t token, const std::vector<Range>& shared, float* buffer, float* out,
                         float* scales) {
  const float* x = floats_of(job, token, buffer);
  const ToFp8 round = ToFp8::of(job.input_format);
  bool finite = true;
  for (int64_t s = 0, start = 0; s < job.segments; start += job.segment[s++]) {
    const int64_t size = job.segment[s];
    const Range r = shared.empty() ? range_of(x + start, size) : shared[s];
    finite = finite && r.finite;
    const float found = scale_of(-r.low > r.high ? -r.low : r.high, round.limit);
    scales[s] = job.input_scale ? job.input_scale[s] : r.finite ? found : 1;
    to_fp8(x + start, size, scales[s], round, out + start);
  }
  if (!finite)
    for (int64_t s = 0; s < job.segments; ++s) scales[s] = NAN_;
}

// Writes the token's input [K] as floats, rounded to FP8 if that is its format: then a token with NaN or Inf is all
// NaN. `buffer` [K] must not alias `out`.
inline void to_factors(const Job& job, int64_t token, const std::vector<Range>& shared, float* buffer, float* out) {
  if (job.input_format == INTEGERS) {
    std::memcpy(out, floats_of(job, token, buffer), job.K * sizeof(float));
    return;
  }
  static thread_local Scratch of_scales;
  float* scales = of_scales.get<float>(job.segments);
  round_to_fp8(job, token, shared, buffer, out, scales);
  for (int64_t s = 0, start = 0; s < job.segments; start += job.segment[s++])
    for (int64_t i = start; i < start + job.segment[s]; ++i) out[i] *= scales[s];
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
