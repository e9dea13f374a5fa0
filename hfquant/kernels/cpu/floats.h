// Products of floats: by weights that are not integers, and by the low-rank branch. A row's codes become floats a piece
// at a time, in the nearest cache: for few tokens as they come, for more as panels of rows side by side. For many tokens
// torch's product is so much faster than panels that whole rows may become floats before it.
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

// Columns of a panel: with the tokens' it fits a core's nearest cache.
constexpr int64_t PIECE = 128;
// Where there are too few panels for threads, so many tokens use a piece of a panel before the next takes its place.
constexpr int64_t SOME_TOKENS = 128, FEW_PANELS = 8;
// Converted tokens that are kept at once.
constexpr int64_t CONVERTED_BYTES = 8 << 20;

// Columns [start, start + count) of a row of the weight, as floats; `at` is the first column's block.
inline void decode_scaled(const Job& job, std::vector<Block>::const_iterator at, int64_t row, int64_t start,
                          int64_t count, float* out) {
  const uint8_t* codes = job.weight + row * job.row_bytes;
  for (int64_t k = start; k < start + count; ++at) {
    const int64_t size = std::min<int64_t>(at->start + at->size, start + count) - k;
    decode(codes + k * (job.bits / 8), size, job.format, scale_at(job, row, at->group), out + k - start);
    k += size;
  }
}

// A term of a sum of products: x [.., columns], lines one after another, by rows of codes. Only the weight has scales.
struct Term {
  const float* x;
  int64_t columns;
  const uint8_t* codes;
  Format format;
  bool scaled;
};

// V vectors of rows from n, columns [start, start + count), a column's rows side by side: panel [count][V * LANES].
template <int V>
void fill_floats(const Job& job, const std::vector<Block>& blocks, const Term& term, int64_t n, int64_t start,
                 int64_t count, float* panel) {
  const int64_t width = code_bits(term.format) / 8;
  alignas(64) float square[LANES][PIECE] = {};
  const auto here = std::partition_point(blocks.begin(), blocks.end(),
                                         [&](const Block& b) { return b.start + b.size <= start; });
  for (int v = 0; v < V; ++v) {
    for (int lane = 0; lane < LANES; ++lane) {
      // Lanes beyond the last row repeat it; what they give is not stored.
      const int64_t row = std::min(n + v * LANES + lane, job.N - 1);
      if (term.scaled)
        decode_scaled(job, here, row, start, count, square[lane]);
      else
        decode(term.codes + (row * term.columns + start) * width, count, term.format, 1, square[lane]);
    }
    for (int64_t k = 0; k < count; k += LANES) {
      Ints tile[LANES];
      for (int lane = 0; lane < LANES; ++lane) tile[lane] = load(&square[lane][k]);
      transpose(tile);
      for (int i = 0; i < LANES; ++i) store(panel + ((k + i) * V + v) * LANES, tile[i]);
    }
  }
}

// Adds TOKENS lines of x by a panel [count][V * LANES] to sums [TOKENS][V * LANES]. The lines after them are `next`
// floats further.
template <int V>
void float_tile(const float* const x[TOKENS], const float* panel, int64_t count, int64_t next, float* sums) {
  Reals s[TOKENS][V];
  UNROLL for (int i = 0; i < TOKENS; ++i)
    UNROLL for (int j = 0; j < V; ++j) s[i][j] = load_reals(sums + (i * V + j) * LANES);
  constexpr int64_t LINE = 16;  // floats that a line of the cache holds
  for (int64_t k = 0; k < count;) {
    // The next tile's, which the hardware's own prefetching does not find in time: lines and sums are short.
    UNROLL for (int i = 0; i < TOKENS; ++i) __builtin_prefetch(x[i] + k + next);
    UNROLL for (int j = 0; j < V; ++j) __builtin_prefetch(sums + ((TOKENS + k / LINE) * V + j) * LANES, 1);
    for (const int64_t end = std::min(k + LINE, count); k < end; ++k, panel += V * LANES) {
      UNROLL for (int i = 0; i < TOKENS; ++i) {
        const Reals factor = repeat(x[i][k]);
        UNROLL for (int j = 0; j < V; ++j) s[i][j] = fma(load_reals(panel + j * LANES), factor, s[i][j]);
      }
    }
  }
  UNROLL for (int i = 0; i < TOKENS; ++i)
    UNROLL for (int j = 0; j < V; ++j) store_reals(sums + (i * V + j) * LANES, s[i][j]);
}

// Rows [n, n + rows) of the output of tokens [0, count), of which the first is the job's token `first`.
template <int V>
void float_panel(const Job& job, const std::vector<Block>& blocks, const std::vector<Term>& terms, int64_t first,
                 int64_t count, int64_t n, int64_t rows) {
  static thread_local Scratch of_panel, of_sums, of_bias;
  float* panel = of_panel.get<float>(PIECE * WIDTH);
  const int64_t padded = (count + TOKENS - 1) / TOKENS * TOKENS;
  float* sums = of_sums.get<float>(padded * V * LANES);
  std::memset(sums, 0, padded * V * LANES * sizeof(float));
  for (const Term& term : terms)
    for (int64_t k = 0; k < term.columns; k += PIECE) {
      const int64_t size = std::min(PIECE, term.columns - k);
      fill_floats<V>(job, blocks, term, n, k, size, panel);
      for (int64_t m = 0; m < count; m += TOKENS) {
        const float* x[TOKENS];
        for (int i = 0; i < TOKENS; ++i) x[i] = term.x + std::min(m + i, count - 1) * term.columns + k;
        float_tile<V>(x, panel, size, TOKENS * term.columns, sums + m * V * LANES);
      }
    }
  float* bias = of_bias.get<float>(WIDTH);
  for (int64_t m = 0; m < count; ++m) add_bias(job, first + m, n, rows, sums + m * V * LANES, bias);
}

inline void by_float_tiles(const Job& job, ParallelFor parallel_for) {
  static thread_local Scratch of_x;
  const std::vector<Block> blocks = blocks_of(job);
  const std::vector<Range> shared = shared_ranges(job);
  const bool as_is = job.x.type == FLOAT32 && !job.divisor && !job.rotation && job.input_format == INTEGERS;
  const int64_t chunk = as_is ? job.M : std::min(job.M, std::max(CONVERTED_BYTES / 4 / job.K, SOME_TOKENS));
  float* converted = as_is ? nullptr : of_x.get<float>(chunk * job.K);
  const int64_t panels = (job.N + WIDTH - 1) / WIDTH, step = panels < FEW_PANELS ? SOME_TOKENS : chunk;
  for (int64_t first = 0; first < job.M; first += chunk) {
    const int64_t count = std::min(chunk, job.M - first), slices = (count + step - 1) / step;
    auto convert = [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_floats;
      float* buffer = of_floats.get<float>(job.K);
      for (int64_t m = begin; m < end; ++m) to_factors(job, first + m, shared, buffer, converted + m * job.K);
    };
    if (!as_is) run_parallel(parallel_for, count, std::max<int64_t>(1, 16384 / job.K), convert);
    auto multiply = [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / slices * WIDTH, m = item % slices * step;
        const int64_t rows = std::min<int64_t>(WIDTH, job.N - n), tokens = std::min(step, count - m);
        const float* x = as_is ? static_cast<const float*>(job.x.data) : converted;
        std::vector<Term> terms = {{x + m * job.K, job.K, job.weight, job.format, true}};
        if (job.rank) {
          const Format format = format_of(job.up.type);
          const uint8_t* up = static_cast<const uint8_t*>(job.up.data);
          terms.push_back({job.narrow + (first + m) * job.rank, job.rank, up, format, false});
        }
        auto run = [&](auto panel) { panel(job, blocks, terms, first + m, tokens, n, rows); };
        if (VECTORS > 2 && rows > 2 * LANES)
          run(float_panel<VECTORS>);
        else if (rows > LANES)
          run(float_panel<2>);
        else
          run(float_panel<1>);
      }
    };
    run_parallel(parallel_for, panels * slices, 1, multiply);
  }
}

// Rows of the weight that are floats at once: fewer would cost torch's product more than they save in caches.
constexpr int64_t DECODED_BYTES = 4 << 20, FEWEST_ROWS = 256;

// The low-rank branch adds its columns: [x, narrow] by [W, up].
inline void by_float_blocks(const Job& job, ParallelFor parallel_for, Gemm gemm) {
  static thread_local Scratch of_x, of_weight, of_y;
  const std::vector<Block> blocks = blocks_of(job);
  const std::vector<Range> shared = shared_ranges(job);
  const int64_t columns = job.K + job.rank;
  const bool as_is = job.x.type == FLOAT32 && !job.divisor && !job.rotation && !job.rank && job.input_format == INTEGERS;
  const int64_t most = std::max<int64_t>(DECODED_BYTES / 4 / columns, FEWEST_ROWS);
  const int64_t parts = (job.N + most - 1) / most, step = (job.N + parts - 1) / parts;
  const int64_t chunk = std::min(job.M, std::max(CONVERTED_BYTES / 4 / std::max(columns, step), SOME_TOKENS));
  float* converted = as_is ? nullptr : of_x.get<float>(chunk * columns);
  float* weight = of_weight.get<float>(step * columns);
  // Floats are stored where they belong.
  const bool direct = job.y_type == FLOAT32;
  float* product = direct ? nullptr : of_y.get<float>(chunk * step);
  for (int64_t first = 0; first < job.M; first += chunk) {
    const int64_t count = std::min(chunk, job.M - first);
    auto convert = [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_floats;
      float* buffer = of_floats.get<float>(job.K);
      for (int64_t m = begin; m < end; ++m) {
        to_factors(job, first + m, shared, buffer, converted + m * columns);
        const float* narrow = job.narrow + (first + m) * job.rank;
        if (job.rank) std::memcpy(converted + m * columns + job.K, narrow, job.rank * sizeof(float));
      }
    };
    if (!as_is) run_parallel(parallel_for, count, std::max<int64_t>(1, 16384 / job.K), convert);
    const float* x = as_is ? static_cast<const float*>(job.x.data) + first * job.K : converted;
    for (int64_t n = 0; n < job.N; n += step) {
      const int64_t rows = std::min(step, job.N - n);
      auto fill = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          decode_scaled(job, blocks.begin(), n + row, 0, job.K, weight + row * columns);
          if (job.rank) to_floats(job.up, (n + row) * job.rank, job.rank, weight + row * columns + job.K);
        }
      };
      run_parallel(parallel_for, rows, std::max<int64_t>(1, 32768 / columns), fill);
      float* y = direct ? static_cast<float*>(job.y) + first * job.N + n : product;
      const int64_t pitch = direct ? job.N : rows;
      gemm(x, weight, y, pitch, count, rows, columns);
      auto store = [&](int64_t begin, int64_t end) {
        static thread_local Scratch of_bias;
        float* bias = of_bias.get<float>(rows);
        for (int64_t m = begin; m < end; ++m) add_bias(job, first + m, n, rows, y + m * pitch, bias);
      };
      if (!direct || job.bias.data) run_parallel(parallel_for, count, std::max<int64_t>(1, 32768 / rows), store);
    }
  }
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
