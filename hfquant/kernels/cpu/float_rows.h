// Few tokens by weights that are not integers: a row's codes become floats a piece at a time, in the nearest cache.
#pragma once

#include "rows.h"

namespace hfquant {
namespace HFQUANT_ISA {

// The product of one row with T tokens from m, x [K] each, block by block; to y [T][pitch].
template <int T>
void row_of_floats(const Job& job, const std::vector<Block>& blocks, const float* x, int64_t n, float* y,
                   int64_t pitch) {
  constexpr int64_t PIECE = 16 * LANES;
  const int64_t width = job.bits / 8;
  alignas(64) float piece[PIECE] = {};
  Reals sums[T];
  UNROLL for (int t = 0; t < T; ++t) sums[t] = repeat(0.0f);
  for (const Block& b : blocks) {
    const Reals scale = repeat(scale_at(job, n, b.group));
    for (int64_t start = 0; start < b.size; start += PIECE) {
      const int64_t k = b.start + start, count = std::min<int64_t>(PIECE, b.size - start);
      decode(job.weight + n * job.row_bytes + k * width, count, job.format, piece);
      Reals part[T][2];
      UNROLL for (int t = 0; t < T; ++t) part[t][0] = part[t][1] = repeat(0.0f);
      int64_t i = 0;
      for (; i + 2 * LANES <= count; i += 2 * LANES)
        UNROLL for (int t = 0; t < T; ++t) UNROLL for (int h = 0; h < 2; ++h)
          part[t][h] = fma(load_reals(piece + i + h * LANES), load_reals(x + t * job.K + k + i + h * LANES), part[t][h]);
      float rest[T] = {};
      for (; i < count; ++i)
        for (int t = 0; t < T; ++t) rest[t] += piece[i] * x[t * job.K + k + i];
      UNROLL for (int t = 0; t < T; ++t) {
        sums[t] = fma(part[t][0], scale, fma(part[t][1], scale, sums[t]));
        y[t * pitch] += rest[t] * scale_at(job, n, b.group);
      }
    }
  }
  UNROLL for (int t = 0; t < T; ++t) y[t * pitch] += total(sums[t]);
}

inline void by_float_rows(const Job& job, ParallelFor parallel_for) {
  static thread_local Scratch of_x;
  const std::vector<Block> blocks = blocks_of(job);
  float* x = of_x.get<float>(job.M * job.K);
  for (int64_t m = 0; m < job.M; ++m) {
    const float* line = floats_of(job, m, x + m * job.K);
    if (line != x + m * job.K) std::memcpy(x + m * job.K, line, job.K * sizeof(float));
  }
  auto multiply_rows = [&](int64_t begin, int64_t end) {
    static thread_local Scratch of_y, of_up;
    const int64_t pitch = end - begin;
    float* y = of_y.get<float>(job.M * pitch);
    std::memset(y, 0, job.M * pitch * sizeof(float));
    for (int64_t n = begin; n < end; ++n) {
      int64_t m = 0;
      for (; m + 4 <= job.M; m += 4) row_of_floats<4>(job, blocks, x + m * job.K, n, y + m * pitch + n - begin, pitch);
      for (; m < job.M; ++m) row_of_floats<1>(job, blocks, x + m * job.K, n, y + m * pitch + n - begin, pitch);
    }
    float* added = of_up.get<float>(std::max(job.rank, pitch));
    for (int64_t m = 0; m < job.M; ++m) finish(job, m, begin, pitch, y + m * pitch, added);
  };
  run_parallel(parallel_for, job.N, std::max<int64_t>(16, 32768 / job.row_bytes), multiply_rows);
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
