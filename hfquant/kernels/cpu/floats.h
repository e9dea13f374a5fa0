// Float products, for weights that are not integers and for the low-rank branch. Codes are decoded to floats one
// L1-sized piece at a time: row by row for few tokens, packed into panels for more.
#pragma once

#include "rows.h"

namespace hfquant {
namespace HFQUANT_ISA {

// Multiplies row n by T tokens, x [T][K], block by block; adds to y [T][pitch].
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
      decode(job.weight + n * job.row_bytes + k * width, count, job.format, 1, piece);
      Reals part[T][2];
      UNROLL for (int t = 0; t < T; ++t) part[t][0] = part[t][1] = repeat(0.0f);
      int64_t i = 0;
      for (; i + 2 * LANES <= count; i += 2 * LANES)
        UNROLL for (int t = 0; t < T; ++t) UNROLL for (int h = 0; h < 2; ++h)
          part[t][h] =
              fma(load_reals(piece + i + h * LANES), load_reals(x + t * job.K + k + i + h * LANES), part[t][h]);
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
  static thread_local Scratch of_x, of_floats;
  const std::vector<Block> blocks = blocks_of(job);
  const std::vector<Range> shared = shared_ranges(job);
  float* x = of_x.get<float>(job.M * job.K);
  float* buffer = of_floats.get<float>(job.K);
  for (int64_t m = 0; m < job.M; ++m) to_factors(job, m, shared, buffer, x + m * job.K);
  auto multiply_rows = [&](int64_t begin, int64_t end) {
    static thread_local Scratch of_y;
    const int64_t pitch = end - begin;
    float* y = of_y.get<float>(job.M * pitch);
    std::memset(y, 0, job.M * pitch * sizeof(float));
    for (int64_t n = begin; n < end; ++n) {
      int64_t m = 0;
      for (; m + 4 <= job.M; m += 4) row_of_floats<4>(job, blocks, x + m * job.K, n, y + m * pitch + n - begin, pitch);
      for (; m < job.M; ++m) row_of_floats<1>(job, blocks, x + m * job.K, n, y + m * pitch + n - begin, pitch);
    }
    finish(job, begin, pitch, y, pitch);
  };
  run_parallel(parallel_for, job.N, std::max<int64_t>(16, 32768 / job.row_bytes), multiply_rows);
}

// Tokens that reuse a piece of a panel before the next one replaces it: fewer if there are too few panels to keep all
// threads busy.
constexpr int64_t MANY_TOKENS = 1024, SOME_TOKENS = 128, FEW_PANELS = 8;
// Bytes of converted tokens kept at a time.
constexpr int64_t CONVERTED_BYTES = 8 << 20;

// Panels that share a tile's tokens while these are in L1, once there are more tokens than fit L2 (MORE_TOKENS).
constexpr int64_t PANELS = 16, MORE_TOKENS = 256;

// Computes output rows [n, n + rows), at most PANELS panels of V vectors, for `count` tokens from the job's token
// `first`.
template <int V>
void float_panels(const Job& job, const std::vector<Block>& blocks, const std::vector<Term>& terms, int64_t first,
                  int64_t count, int64_t n, int64_t rows) {
  static thread_local Scratch of_panels, of_sums;
  constexpr int64_t ROWS = V * LANES, TILE = TOKENS * ROWS;
  const int64_t panels = (rows + ROWS - 1) / ROWS, tiles = (count + TOKENS - 1) / TOKENS;
  alignas(64) float bias[PANELS * ROWS];
  bias_of(job, n, rows, bias);
  float* panel = of_panels.get<float>(panels * PIECE * ROWS);
  float* sums = of_sums.get<float>(tiles * panels * TILE);
  std::memset(sums, 0, tiles * panels * TILE * sizeof(float));
  for (const Term& term : terms)
    for (int64_t k = 0; k < term.columns; k += PIECE) {
      const int64_t size = std::min(PIECE, term.columns - k);
      const bool last = &term == &terms.back() && k + size == term.columns;
      for (int64_t p = 0; p < panels; ++p)
        fill_floats<V>(job, blocks, term, n + p * ROWS, k, size, panel + p * PIECE * ROWS);
      float* sum = sums;
      for (int64_t m = 0; m < count; m += TOKENS) {
        const float* x[TOKENS];
        for (int i = 0; i < TOKENS; ++i) x[i] = term.x + std::min(m + i, count - 1) * term.columns + k;
        for (int64_t p = 0; p < panels; ++p, sum += TILE) {
          const int64_t lines = std::min<int64_t>(TOKENS, count - m), width = std::min(ROWS, rows - p * ROWS);
          if (last) prefetch_outputs(job, first + m, lines, n + p * ROWS, width);
          float_tile<TOKENS, V>(x, panel + p * PIECE * ROWS, size, TOKENS * term.columns, sum);
          if (last) store_sums(job, first + m, lines, n + p * ROWS, width, bias + p * ROWS, sum, ROWS);
        }
      }
    }
}

inline void by_float_tiles(const Job& job, ParallelFor parallel_for) {
  static thread_local Scratch of_x;
  const std::vector<Block> blocks = blocks_of(job);
  const std::vector<Range> shared = shared_ranges(job);
  const bool as_is = job.x.type == FLOAT32 && !job.divisor && !job.rotation && job.input_format == INTEGERS;
  const int64_t chunk = as_is ? job.M : std::min(job.M, std::max(CONVERTED_BYTES / 4 / job.K, SOME_TOKENS));
  float* converted = as_is ? nullptr : of_x.get<float>(chunk * job.K);
  const int64_t panels = (job.N + WIDTH - 1) / WIDTH, step = panels < FEW_PANELS ? SOME_TOKENS : MANY_TOKENS;
  for (int64_t first = 0; first < job.M; first += chunk) {
    const int64_t count = std::min(chunk, job.M - first), slices = (count + step - 1) / step;
    auto convert = [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_floats;
      float* buffer = of_floats.get<float>(job.K);
      for (int64_t m = begin; m < end; ++m) to_factors(job, first + m, shared, buffer, converted + m * job.K);
    };
    if (!as_is) run_parallel(parallel_for, count, std::max<int64_t>(1, 16384 / job.K), convert);
    auto multiply = [&](int64_t begin, int64_t end) {
      for (int64_t item = begin, taken; item < end; item += taken) {
        const int64_t n = item % panels * WIDTH, m = item / panels * step, tokens = std::min(step, count - m);
        taken = tokens > MORE_TOKENS ? std::min({PANELS, end - item, panels - item % panels}) : 1;
        const int64_t rows = std::min<int64_t>(taken * WIDTH, job.N - n);
        const float* x = as_is ? static_cast<const float*>(job.x.data) : converted;
        std::vector<Term> terms = {{x + m * job.K, job.K, job.weight, job.format, true}};
        if (job.rank) {
          const Format format = format_of(job.up.type);
          const uint8_t* up = static_cast<const uint8_t*>(job.up.data);
          terms.push_back({job.narrow + (first + m) * job.rank, job.rank, up, format, false});
        }
        auto run = [&](auto panels_of) { panels_of(job, blocks, terms, first + m, tokens, n, rows); };
        rows > LANES ? run(float_panels<VECTORS>) : run(float_panels<1>);
      }
    };
    run_parallel(parallel_for, panels * slices, 1, multiply);
  }
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
