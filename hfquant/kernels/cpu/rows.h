// Products of few tokens. Each row of the weight is read once, as it is stored, a vector at a time along its columns;
// the input's codes are put into the order in which the weight's come out of a vector.
#pragma once

#include "tiles.h"

namespace hfquant {
namespace HFQUANT_ISA {

// How a vector of the weight becomes factors.
// Nibbles: the low codes of its bytes, then the high ones, so the input's even codes come before the odd ones.
struct Nibbles {
  static constexpr int CODES = 2 * BYTES, STORED = BYTES, VECTORS = 2;
  static void read(const uint8_t* p, Ints w[]) {
    const Ints bytes = load(p);
    w[0] = field(bytes, 0, 0x08080808, 0x0f0f0f0f);
    w[1] = field(bytes, 4, 0x08080808, 0x0f0f0f0f);
  }
};
// Codes that straddle bytes, in order.
template <int BITS>
struct Straddling {
  static constexpr int CODES = BYTES, STORED = BYTES / 8 * BITS, VECTORS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = unpack<BITS>(p); }
};
struct Eights {
  static constexpr int CODES = BYTES, STORED = BYTES, VECTORS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = flip(load(p)); }
};
// Signed codes by signed codes of 16 bits, where products of 8 bits are not exact.
struct Wide {
  static constexpr int CODES = BYTES / 2, STORED = BYTES / 2, VECTORS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = widen(p); }
};

// What the columns of each vector of a row share: the number of their first group, and of the input's scale.
struct Steps {
  std::vector<int32_t> group, unit;
  int32_t lane_group[LANES];  // the groups of a vector's lanes, from the vector's first
  bool fit;                   // every lane lies within one group, every vector within one of the input's scales

  template <class Format>
  static Steps of(const Job& job, const std::vector<Block>& blocks) {
    constexpr int CODES = Format::CODES, LANE = CODES / LANES;
    const int64_t g = job.group_size, count = (job.K + CODES - 1) / CODES;
    const bool small = g && g < CODES;
    const bool fit = !small || (CODES % g == 0 && g % LANE == 0);
    Steps steps{std::vector<int32_t>(count), std::vector<int32_t>(count), {}, fit};
    for (int i = 0; small && i < LANES; ++i) steps.lane_group[i] = i * LANE / g;
    for (const Block& b : blocks) {
      // A block begins where a vector does, or somewhere within one all of whose groups are of the same size.
      const int64_t first = (b.start + CODES - 1) / CODES, end = (b.start + b.size + CODES - 1) / CODES;
      const bool same_unit = b.start % CODES == 0 || steps.unit[b.start / CODES] == b.segment;
      const bool same_group = b.start % CODES == 0 || small || steps.group[b.start / CODES] == b.group;
      steps.fit = steps.fit && same_unit && same_group && (!small || b.start % g == 0);
      std::fill(steps.group.begin() + first, steps.group.begin() + end, b.group);
      std::fill(steps.unit.begin() + first, steps.unit.begin() + end, b.segment);
    }
    return steps;
  }
};

// Times any sum that a row can have, this is far from float32's largest number.
constexpr float LARGEST_UNIT = 1e20f;

// Codes of a token in a row's order, and what goes with them. Sums of a group are padded to whole vectors.
struct Lines {
  int64_t planes, bytes;  // bytes of a plane of a token
  int8_t* codes;          // [count][planes][bytes]: high bytes first, where there are two planes
  float* scale;           // [count][scales]
  int64_t scales, groups;
  float* sum;             // [count][groups]: sums of a group's codes times their scales
  int32_t* total;         // [count]: sums of all codes
  Steps steps;
};

template <class Format>
void layout_line(const Job& job, const std::vector<Block>& blocks, const int16_t* codes, int64_t m, Lines& lines) {
  int8_t* planes = lines.codes + m * lines.planes * lines.bytes;
  std::memset(planes, 0, lines.planes * lines.bytes);
  int16_t ordered[Format::CODES];
  for (int64_t k = 0, at = 0; k < job.K; k += Format::CODES, at += Format::VECTORS * BYTES) {
    const int size = std::min<int64_t>(Format::CODES, job.K - k);
    if constexpr (std::is_same_v<Format, Wide>) {
      std::memcpy(planes + at, codes + k, size * sizeof(int16_t));
      continue;
    }
    std::memset(ordered, 0, sizeof(ordered));
    if constexpr (std::is_same_v<Format, Nibbles>) {
      for (int i = 0; i < size / 2; ++i) {
        ordered[i] = codes[k + 2 * i];
        ordered[BYTES + i] = codes[k + 2 * i + 1];
      }
      if (size % 2) ordered[size / 2] = codes[k + size - 1];
    } else {
      std::memcpy(ordered, codes + k, size * sizeof(int16_t));
    }
    int8_t* low = planes + (lines.planes - 1) * lines.bytes + at;
    for (int i = 0; i < Format::CODES; ++i) low[i] = static_cast<int8_t>(ordered[i]);
    if (lines.planes == 1) continue;
    int8_t* high = planes + at;
    for (int i = 0; i < Format::CODES; ++i)
      high[i] = static_cast<int8_t>((ordered[i] - static_cast<int8_t>(ordered[i])) >> 8);
  }
  float* sums = lines.sum + m * lines.groups;
  std::memset(sums, 0, lines.groups * sizeof(float));
  lines.total[m] = 0;
  for (const Block& b : blocks) {
    int32_t sum = 0;
    for (int i = 0; i < b.size; ++i) sum += codes[b.start + i];
    lines.total[m] += sum;
    sums[b.group] += sum * lines.scale[m * lines.scales + b.segment];
  }
}

// One vector of the weight by T tokens.
template <class Format, int PLANES, int T>
inline void multiply(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t plane, Ints sums[T]) {
  Ints w[Format::VECTORS];
  Format::read(weight, w);
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int p = 0; p < PLANES; ++p) {
      if (p) sums[t] = times256(sums[t]);
      UNROLL for (int v = 0; v < Format::VECTORS; ++v) {
        const Ints codes = load(x + t * stride + p * plane + v * BYTES);
        sums[t] = std::is_same_v<Format, Wide> ? dot_shorts(sums[t], w[v], codes) : dot_bytes(sums[t], w[v], codes);
      }
    }
  }
}

// What R rows of the weight have of their own, padded to whole vectors: scales, and minus the scaled zero points.
struct Factors {
  int64_t groups;
  float* scale;  // [R][groups]
  float* shift;  // [R][groups]
};

// The zero point that goes with a row's codes as they are multiplied.
template <class Format>
int zero_of(const Job& job, int64_t row, int64_t group) {
  return zero_at(job, row, group) - (std::is_same_v<Format, Wide> ? 1 << (job.bits - 1) : 0);
}

// R rows from n by T tokens from m, to y [T][pitch]. LONG: the input's codes have 16 bits. GROUPED: a row has several
// scales. With neither, sums stay integers to the end.
template <class Format, bool LONG, bool GROUPED, int R, int T>
void rows_by_tokens(const Job& job, const Lines& lines, const Factors& factors, int64_t n, int64_t m, float* y,
                    int64_t pitch) {
  constexpr int PLANES = LONG && !std::is_same_v<Format, Wide> ? 2 : 1;
  constexpr bool PLAIN = !LONG && !GROUPED;
  const int64_t stride = PLANES * lines.bytes;
  const int8_t* x = lines.codes + m * stride;
  const float* units = lines.scale + m * lines.scales;
  const Ints lane_group = load(lines.steps.lane_group);
  Ints exact[R][T];
  Reals sums[R][T];
  UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) {
    exact[r][t] = zeros();
    sums[r][t] = repeat(0.0f);
  }
  // A vector of each row by the input's codes.
  auto multiply_step = [&](const uint8_t* const from[R], int64_t step) {
    UNROLL for (int r = 0; r < R; ++r) {
      if constexpr (PLAIN) {
        multiply<Format, PLANES, T>(from[r], x, stride, lines.bytes, exact[r]);
      } else {
        UNROLL for (int t = 0; t < T; ++t) exact[r][t] = zeros();
        multiply<Format, PLANES, T>(from[r], x, stride, lines.bytes, exact[r]);
        UNROLL for (int t = 0; t < T; ++t) {
          const float unit = units[t * lines.scales + lines.steps.unit[step]];
          const float* scale = factors.scale + r * factors.groups;
          const Reals both =
              GROUPED ? mul(repeat(unit), pick(scale + lines.steps.group[step], lane_group)) : repeat(unit * *scale);
          sums[r][t] = fma(to_reals(exact[r][t]), both, sums[r][t]);
        }
      }
    }
    x += Format::VECTORS * BYTES;
  };
  const uint8_t* from[R];
  UNROLL for (int r = 0; r < R; ++r) from[r] = job.weight + (n + r) * job.row_bytes;
  const int64_t steps = lines.steps.group.size();
  // Bytes from the last of the rows to the end of the weight: what lies beyond a row's own meets codes that are zero.
  int64_t step = 0, left = (job.N - n - R + 1) * job.row_bytes;
  for (; step < steps && left >= BYTES; ++step, left -= Format::STORED) {
    // The same place in the rows that come next: the hardware's own prefetching starts anew in each row.
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(from[r] + R * job.row_bytes, 0, 3);
    multiply_step(from, step);
    UNROLL for (int r = 0; r < R; ++r) from[r] += Format::STORED;
  }
  for (; step < steps; ++step, left -= Format::STORED) {
    // Vectors that reach beyond the weight.
    uint8_t ends[R][BYTES];
    const uint8_t* copies[R];
    UNROLL for (int r = 0; r < R; ++r) {
      std::memset(ends[r], 0, BYTES);
      std::memcpy(ends[r], from[r], left);
      copies[r] = ends[r];
      from[r] += Format::STORED;
    }
    multiply_step(copies, step);
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int t = 0; t < T; ++t) {
      if constexpr (PLAIN) {
        const int32_t sum = total(exact[r][t]) - zero_of<Format>(job, n + r, 0) * lines.total[m + t];
        y[t * pitch + r] = static_cast<float>(sum) * scale_at(job, n + r, 0) * lines.scale[m + t];
      } else {
        const float *shift = factors.shift + r * factors.groups, *sum = lines.sum + (m + t) * lines.groups;
        for (int64_t i = 0; i < factors.groups; i += LANES)
          sums[r][t] = fma(load_reals(shift + i), load_reals(sum + i), sums[r][t]);
        y[t * pitch + r] = total(sums[r][t]);
      }
    }
  }
}

// A row's scales [groups] and shifts [groups].
template <class Format>
void fill_factors(const Job& job, int64_t row, int64_t groups, float* __restrict scale, float* __restrict shift) {
  scales_of_row(job, row, groups, scale);
  if (!job.zero) {
    const Reals zero = repeat(static_cast<float>(-zero_of<Format>(job, row, 0)));
    for (int64_t i = 0; i < groups; i += LANES) store_reals(shift + i, mul(zero, load_reals(scale + i)));
    return;
  }
  constexpr int less = std::is_same_v<Format, Wide> ? 128 : 0;  // those codes are signed
  uint8_t codes[BYTES];
  for (int64_t g = 0; g < job.G; g += BYTES) {
    store(codes, codes_in_order(job.zero + row * job.zero_bytes, job.zero_bytes, g, job.bits));
    const int64_t count = std::min<int64_t>(BYTES, job.G - g);
    for (int64_t i = 0; i < count; ++i) shift[g + i] = (less - codes[i]) * scale[g + i];
  }
}

// Adds the low-rank branch and the bias to outputs [M][count] of rows from n on, and stores them.
[[gnu::noinline]] inline void finish(const Job& job, int64_t n, int64_t count, float* y) {
  static thread_local Scratch of_up;
  float* up = of_up.get<float>(job.rank);
  for (int64_t i = 0; job.rank && i < count; ++i) {
    to_floats(job.up, (n + i) * job.rank, job.rank, up);
    for (int64_t m = 0; m < job.M; ++m) {
      const float* narrow = job.narrow + m * job.rank;
      Reals sums = repeat(0.0f);
      int64_t r = 0;
      for (; r + LANES <= job.rank; r += LANES) sums = fma(load_reals(narrow + r), load_reals(up + r), sums);
      float sum = total(sums);
      for (; r < job.rank; ++r) sum += narrow[r] * up[r];
      y[m * count + i] += sum;
    }
  }
  store_sums(job, 0, job.M, n, count, y, count);
}

// Returns whether it could.
template <class Format, bool LONG, bool GROUPED>
bool by_rows(const Job& job, const std::vector<Block>& blocks, Steps steps, ParallelFor parallel_for) {
  static thread_local Scratch of_codes, of_scale, of_sum, of_total, of_floats, of_row;
  Lines lines;
  lines.steps = std::move(steps);
  lines.planes = LONG && !std::is_same_v<Format, Wide> ? 2 : 1;
  lines.bytes = (job.K + Format::CODES - 1) / Format::CODES * Format::VECTORS * BYTES;
  lines.scales = input_scales(job);
  lines.groups = (job.G + LANES - 1) / LANES * LANES;
  lines.codes = of_codes.get<int8_t>(job.M * lines.planes * lines.bytes);
  lines.scale = of_scale.get<float>(job.M * lines.scales);
  lines.sum = of_sum.get<float>(job.M * lines.groups);
  lines.total = of_total.get<int32_t>(job.M);
  const std::vector<Range> shared = shared_ranges(job);
  float* buffer = of_floats.get<float>(job.K);
  int16_t* codes = of_row.get<int16_t>(job.K);
  for (int64_t m = 0; m < job.M; ++m) {
    quantize(job, m, shared, buffer, codes, lines.scale + m * lines.scales);
    layout_line<Format>(job, blocks, codes, m, lines);
  }
  // Here sums are multiplied by the input's scale before the weight's, which must not be what makes them overflow.
  for (int64_t i = 0; i < job.M * lines.scales; ++i)
    if (lines.scale[i] > LARGEST_UNIT) return false;
  auto multiply_rows = [&](int64_t begin, int64_t end) {
    static thread_local Scratch of_factors, of_shifts, of_y;
    constexpr int MOST = 4;
    Factors factors{lines.groups, of_factors.get<float>((MOST + 1) * lines.groups),
                    of_shifts.get<float>((MOST + 1) * lines.groups)};
    std::memset(factors.scale, 0, MOST * lines.groups * sizeof(float));
    std::memset(factors.shift, 0, MOST * lines.groups * sizeof(float));
    const int64_t pitch = end - begin;
    float* y = of_y.get<float>(job.M * pitch);
    auto product = [&](auto product_, int64_t n, int64_t m) {
      product_(job, lines, factors, n, m, y + m * pitch + n - begin, pitch);
    };
    for (int64_t n = begin; n < end;) {
      const int count = end - n >= MOST ? MOST : 1;
      for (int r = 0; (LONG || GROUPED) && r < count; ++r) {
        const int64_t at = r * lines.groups;
        fill_factors<Format>(job, n + r, lines.groups, factors.scale + at, factors.shift + at);
      }
      int64_t m = 0;
      for (; count == MOST && m + 2 <= job.M; m += 2) product(rows_by_tokens<Format, LONG, GROUPED, MOST, 2>, n, m);
      for (; count == MOST && m < job.M; ++m) product(rows_by_tokens<Format, LONG, GROUPED, MOST, 1>, n, m);
      for (; m < job.M; ++m) product(rows_by_tokens<Format, LONG, GROUPED, 1, 1>, n, m);
      n += count;
    }
    finish(job, begin, pitch, y);
  };
  run_parallel(parallel_for, job.N, std::max<int64_t>(16, 32768 / job.row_bytes / 4 * 4), multiply_rows);
  return true;
}

// Computes the job by rows if its groups allow it.
template <class Format>
bool try_rows(const Job& job, ParallelFor parallel_for) {
  const std::vector<Block> blocks = blocks_of(job);
  const bool grouped = job.G > 1;
  if (job.K > WIDEST && !grouped && !long_codes(job)) return false;
  Steps steps = Steps::of<Format>(job, blocks);
  if (!steps.fit) return false;
  if (long_codes(job))
    return grouped ? by_rows<Format, true, true>(job, blocks, std::move(steps), parallel_for)
                   : by_rows<Format, true, false>(job, blocks, std::move(steps), parallel_for);
  return grouped ? by_rows<Format, false, true>(job, blocks, std::move(steps), parallel_for)
                 : by_rows<Format, false, false>(job, blocks, std::move(steps), parallel_for);
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
