// Panels of WIDTH weight rows, packed side by side with one row per lane; the float micro-kernel and the epilogue.
#pragma once

#include "weight.h"

namespace hfquant {
namespace HFQUANT_ISA {

constexpr int WIDTH = VECTORS * LANES;  // rows per panel

template <class Function>
void run_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, Function& function) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<Function*>(f))(begin, end); }, &function);
}

// Transposes LANES lines of words, `pitch` words apart: word i of all lines becomes the vector at out + i * step. Reads
// and writes whole vectors.
inline void interleave(const void* lines, int64_t pitch, int64_t count, void* out, int64_t step) {
  const int32_t* from = static_cast<const int32_t*>(lines);
  int32_t* to = static_cast<int32_t*>(out);
  for (int64_t k = 0; k < count; k += LANES) {
    Ints tile[LANES];
    for (int lane = 0; lane < LANES; ++lane) tile[lane] = load(from + lane * pitch + k);
    transpose(tile);
    for (int i = 0; i < LANES; ++i) store(to + (k + i) * step, tile[i]);
  }
}

// Prefetches the outputs of `count` tokens from m and `rows` rows from n for writing: each token's outputs lie on a
// page of their own, and a store that misses stalls those behind it. (Forced inline: GCC considers calls to a function
// that only prefetches to have no effect.)
[[gnu::always_inline]] inline void prefetch_outputs(const Job& job, int64_t m, int64_t count, int64_t n,
                                                    int64_t rows) {
  const int64_t bytes = job.y_type == FLOAT32 ? 4 : 2;
  for (int64_t t = m; t < m + count; ++t)
    for (int64_t i = 0; i < rows * bytes; i += 64)
      __builtin_prefetch(static_cast<const char*>(job.y) + (t * job.N + n) * bytes + i, 1);
}

// Loads the bias of rows [n, n + rows), or zeros if there is none.
inline void bias_of(const Job& job, int64_t n, int64_t rows, float* bias) {
  if (job.bias.data)
    to_floats(job.bias, n, rows, bias);
  else
    std::memset(bias, 0, rows * sizeof(float));
}

// Adds the bias [rows] to sums [count][pitch] of tokens from m and rows [n, n + rows), and stores them. `sums` may
// alias the output.
inline void store_sums(const Job& job, int64_t m, int64_t count, int64_t n, int64_t rows, const float* bias,
                       float* sums, int64_t pitch) {
  for (int64_t i = 0; i < count; ++i, sums += pitch) {
    const int64_t at = (m + i) * job.N + n;
    float* y = job.y_type == FLOAT32 ? static_cast<float*>(job.y) + at : sums;
    int64_t j = 0;
    for (; j + LANES <= rows; j += LANES) store_reals(y + j, add(load_reals(sums + j), load_reals(bias + j)));
    for (; j < rows; ++j) y[j] = sums[j] + bias[j];
    if (job.y_type != FLOAT32) from_floats(sums, rows, job.y, job.y_type, at);
  }
}

// Columns of a float panel: together with the tokens' columns, it fits a core's L1 cache.
constexpr int64_t PIECE = 128;

// Decodes columns [start, start + count) of a weight row to scaled floats; `at` is the first column's block.
inline void decode_scaled(const Job& job, std::vector<Block>::const_iterator at, int64_t row, int64_t start,
                          int64_t count, float* out) {
  const uint8_t* codes = job.weight + row * job.row_bytes;
  for (int64_t k = start; k < start + count; ++at) {
    const int64_t size = std::min<int64_t>(at->start + at->size, start + count) - k;
    decode(codes + k * (job.bits / 8), size, job.format, scale_at(job, row, at->group), out + k - start);
    k += size;
  }
}

// A term of the output: x [.., columns], contiguous, times rows of codes. `scaled` is true for the weight only.
struct Term {
  const float* x;
  int64_t columns;
  const uint8_t* codes;
  Format format;
  bool scaled;
};

// Packs columns [start, start + count) of V vectors of rows from n into panel [count][V * LANES].
template <int V>
void fill_floats(const Job& job, const std::vector<Block>& blocks, const Term& term, int64_t n, int64_t start,
                 int64_t count, float* panel) {
  const int64_t width = code_bits(term.format) / 8;
  alignas(64) float square[LANES][PIECE] = {};
  const auto here = std::partition_point(blocks.begin(), blocks.end(),
                                         [&](const Block& b) { return b.start + b.size <= start; });
  for (int v = 0; v < V; ++v) {
    for (int lane = 0; lane < LANES; ++lane) {
      // Lanes beyond the last row repeat it; their results are not stored.
      const int64_t row = std::min(n + v * LANES + lane, job.N - 1);
      if (term.scaled)
        decode_scaled(job, here, row, start, count, square[lane]);
      else
        decode(term.codes + (row * term.columns + start) * width, count, term.format, 1, square[lane]);
    }
    interleave(square, PIECE, count, panel + v * LANES, V * LANES);
  }
}

// Micro-kernel: multiplies T lines of x by a panel [count][V * LANES] and adds to the accumulators sums [T][V * LANES].
// The next tile's lines start `next` floats further on.
template <int T, int V>
void float_tile(const float* const x[T], const float* panel, int64_t count, int64_t next, float* sums) {
  Reals s[T][V];
  UNROLL for (int i = 0; i < T; ++i)
    UNROLL for (int j = 0; j < V; ++j) s[i][j] = load_reals(sums + (i * V + j) * LANES);
  constexpr int64_t LINE = 16;  // floats per cache line
  for (int64_t k = 0; k < count;) {
    // Prefetch for the next tile: lines and sums are too short for the hardware prefetcher to catch up in time.
    UNROLL for (int i = 0; i < T; ++i) __builtin_prefetch(x[i] + k + next);
    UNROLL for (int j = 0; j < V; ++j) __builtin_prefetch(sums + ((T + k / LINE) * V + j) * LANES, 1);
    for (const int64_t end = std::min(k + LINE, count); k < end; ++k, panel += V * LANES) {
      UNROLL for (int i = 0; i < T; ++i) {
        const Reals factor = repeat(x[i][k]);
        UNROLL for (int j = 0; j < V; ++j) s[i][j] = fma(load_reals(panel + j * LANES), factor, s[i][j]);
      }
    }
  }
  UNROLL for (int i = 0; i < T; ++i)
    UNROLL for (int j = 0; j < V; ++j) store_reals(sums + (i * V + j) * LANES, s[i][j]);
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
