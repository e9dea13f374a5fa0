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
  static void read(const uint8_t* p, Ints w[]) { unpack4(load(p), w[0], w[1]); }
};
struct Sixes {
  static constexpr int CODES = BYTES, STORED = BYTES / 4 * 3, VECTORS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = unpack6(p); }
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

// Whether every lane of a vector lies within one group of columns, and groups within one segment.
template <class Format>
bool lanes_fit(const Job& job) {
  constexpr int LANE = Format::CODES / LANES;
  const int64_t g = job.group_size;
  if (job.segments > 1) return false;
  return g == 0 || g >= job.K || g % Format::CODES == 0 || (Format::CODES % g == 0 && g % LANE == 0);
}

// Codes of a token in a row's order, and what goes with them.
struct Lines {
  int64_t bytes;   // of a plane of a token
  int8_t* codes;   // [count][planes][bytes]
  float* scale;    // [count][scales]
  int64_t scales;
  float* sum;      // [count][G]: sums of a group's codes, in units of the scale where there are many
  int32_t* total;  // [count]: sums of all codes
};

template <class Format, int PLANES>
void layout_line(const Job& job, const int16_t* codes, int64_t m, Lines& lines) {
  int8_t* planes = lines.codes + m * PLANES * lines.bytes;
  std::memset(planes, 0, PLANES * lines.bytes);
  int16_t even_odd[Format::CODES];
  for (int64_t k = 0, at = 0; k < job.K; k += Format::CODES, at += Format::VECTORS * BYTES) {
    const int size = std::min<int64_t>(Format::CODES, job.K - k);
    if constexpr (std::is_same_v<Format, Wide>) {
      std::memcpy(planes + at, codes + k, size * sizeof(int16_t));
      continue;
    }
    std::memset(even_odd, 0, sizeof(even_odd));
    if constexpr (std::is_same_v<Format, Nibbles>) {
      for (int i = 0; i < size; ++i) even_odd[i % 2 * BYTES + i / 2] = codes[k + i];
    } else {
      std::memcpy(even_odd, codes + k, size * sizeof(int16_t));
    }
    int8_t* low = planes + (PLANES - 1) * lines.bytes + at;
    for (int i = 0; i < Format::CODES; ++i) low[i] = static_cast<int8_t>(even_odd[i]);
    if (PLANES == 2)
      for (int i = 0; i < Format::CODES; ++i) planes[at + i] = static_cast<int8_t>((even_odd[i] - low[i]) >> 8);
  }
  lines.total[m] = 0;
  for (int64_t g = 0; g < job.G; ++g) lines.sum[m * job.G + g] = 0;
  for (const Block& b : blocks_of(job)) {
    int32_t sum = 0;
    for (int i = 0; i < b.size; ++i) sum += codes[b.start + i];
    lines.total[m] += sum;
    lines.sum[m * job.G + b.group] += sum * (lines.scales > 1 ? lines.scale[m * lines.scales + b.segment] : 1.0f);
  }
}

// One vector of the weight by T tokens.
template <class Format, int PLANES, int T>
inline void multiply(const uint8_t* weight, const int8_t* x, int64_t stride, int64_t plane, Ints sums[T]) {
  Ints w[Format::VECTORS];
  Format::read(weight, w);
  for (int t = 0; t < T; ++t) {
    for (int p = 0; p < PLANES; ++p) {
      if (p) sums[t] = times256(sums[t]);
      for (int v = 0; v < Format::VECTORS; ++v) {
        const Ints codes = load(x + t * stride + p * plane + v * BYTES);
        sums[t] = std::is_same_v<Format, Wide> ? dot_shorts(sums[t], w[v], codes) : dot_bytes(sums[t], w[v], codes);
      }
    }
  }
}

// R rows from n by T tokens from m. PLAIN: one scale a row and one a token, so that sums stay integers.
template <class Format, int PLANES, bool PLAIN, int R, int T>
void rows_by_tokens(const Job& job, const Lines& lines, int64_t n, int64_t m, float* scales, float* zeros_) {
  constexpr bool UNSIGNED = !std::is_same_v<Format, Wide>;
  const int64_t stride = PLANES * lines.bytes, pitch = job.G + LANES;
  const int64_t g = job.group_size && job.group_size < job.K ? job.group_size : 0;
  const int8_t* x = lines.codes + m * stride;
  Ints lane_group = zeros();
  if (g && g < Format::CODES) {
    int32_t numbers[LANES];
    for (int i = 0; i < LANES; ++i) numbers[i] = i * (Format::CODES / LANES) / g;
    lane_group = load(numbers);
  }
  Ints exact[R][T];
  Reals sums[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      exact[r][t] = zeros();
      sums[r][t] = repeat(0.0f);
    }
  const int64_t whole = (job.row_bytes - BYTES) / Format::STORED;  // vectors that end within a row
  const int64_t count = (job.K + Format::CODES - 1) / Format::CODES;
  for (int64_t c = 0; c < count; ++c) {
    const int8_t* xc = x + c * Format::VECTORS * BYTES;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* from = job.weight + (n + r) * job.row_bytes + c * Format::STORED;
      uint8_t end[BYTES];
      if (c > whole || job.row_bytes < BYTES) {
        std::memset(end, 0, BYTES);
        std::memcpy(end, from, job.row_bytes - c * Format::STORED);
        from = end;
      }
      if constexpr (PLAIN) {
        multiply<Format, PLANES, T>(from, xc, stride, lines.bytes, exact[r]);
      } else {
        for (int t = 0; t < T; ++t) exact[r][t] = zeros();
        multiply<Format, PLANES, T>(from, xc, stride, lines.bytes, exact[r]);
        const float* row = scales + r * pitch;
        const int64_t k = c * Format::CODES;
        const Reals scale = !g ? repeat(1.0f) : g < Format::CODES ? pick(row + k / g, lane_group) : repeat(row[k / g]);
        for (int t = 0; t < T; ++t) {
          const float* units = lines.scale + (m + t) * lines.scales;
          const Reals s = lines.scales > 1 ? mul(scale, repeat(units[k / FLOAT_BLOCK])) : scale;
          sums[r][t] = fma(to_reals(exact[r][t]), s, sums[r][t]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const float* row = scales + r * pitch;
    const float* zero = zeros_ + r * pitch;
    const float unit = g ? (job.scale ? 1 : job.scale_row[n + r]) : scale_at(job, n + r, 0);
    float bias = 0, up = 0;
    if (job.bias.data) to_floats(job.bias, n + r, 1, &bias);
    for (int t = 0; t < T; ++t) {
      float y;
      if constexpr (PLAIN) {
        const int offset = UNSIGNED ? static_cast<int>(zero[0]) : static_cast<int>(zero[0]) - (1 << (job.bits - 1));
        y = static_cast<float>(total(exact[r][t]) - offset * lines.total[m + t]);
      } else {
        float offset = 0;
        const float* sum = lines.sum + (m + t) * job.G;
        const float signed_code = UNSIGNED ? 0 : 1 << (job.bits - 1);
#pragma omp simd reduction(+ : offset)
        for (int64_t i = 0; i < job.G; ++i) offset += (g ? row[i] : 1.0f) * (zero[i] - signed_code) * sum[i];
        y = total(sums[r][t]) - offset;
      }
      y *= unit * (lines.scales > 1 ? 1 : lines.scale[(m + t) * lines.scales]);
      for (int64_t i = 0; i < job.rank; ++i) {
        to_floats(job.up, (n + r) * job.rank + i, 1, &up);
        y += job.narrow[(m + t) * job.rank + i] * up;
      }
      y += bias;
      from_floats(&y, 1, job.y, job.x.type, (m + t) * job.N + n + r);
    }
  }
}

template <class Format, int PLANES, bool PLAIN>
void by_rows(const Job& job, ParallelFor parallel_for) {
  static thread_local Scratch of_codes, of_scale, of_sum, of_total;
  Lines lines;
  lines.scales = input_scales(job);
  lines.bytes = (job.K + Format::CODES - 1) / Format::CODES * Format::VECTORS * BYTES;
  lines.codes = of_codes.get<int8_t>(job.M * PLANES * lines.bytes);
  lines.scale = of_scale.get<float>(job.M * lines.scales);
  lines.sum = of_sum.get<float>(job.M * job.G);
  lines.total = of_total.get<int32_t>(job.M);
  const std::vector<Range> shared = shared_ranges(job);
  static thread_local Scratch of_floats, of_row;
  float* buffer = of_floats.get<float>(job.K);
  int16_t* codes = of_row.get<int16_t>(job.K);
  for (int64_t m = 0; m < job.M; ++m) {
    quantize(job, m, shared, buffer, codes, lines.scale + m * lines.scales);
    layout_line<Format, PLANES>(job, codes, m, lines);
  }
  auto multiply_rows = [&](int64_t begin, int64_t end) {
    static thread_local Scratch of_scales, of_zeros;
    const int64_t pitch = job.G + LANES;
    constexpr int MOST = 4;
    float* scales = of_scales.get<float>(MOST * pitch);
    float* zeros_ = of_zeros.get<float>(MOST * pitch);
    auto block = [&](auto product, int64_t n, int64_t m) { product(job, lines, n, m, scales, zeros_); };
    for (int64_t n = begin; n < end;) {
      const int count = end - n >= MOST ? MOST : 1;
      for (int r = 0; r < count; ++r)
        for (int64_t i = 0; i < job.G; ++i) {
          const int64_t at = (n + r) * job.G + i;
          scales[r * pitch + i] = job.scale ? job.scale[at] : scale_value(job.scale_code[at]);
          zeros_[r * pitch + i] = zero_at(job, n + r, i);
        }
      int64_t m = 0;
      for (; count == MOST && m + 2 <= job.M; m += 2) block(rows_by_tokens<Format, PLANES, PLAIN, MOST, 2>, n, m);
      for (; count == MOST && m < job.M; ++m) block(rows_by_tokens<Format, PLANES, PLAIN, MOST, 1>, n, m);
      for (; m < job.M; ++m) block(rows_by_tokens<Format, PLANES, PLAIN, 1, 1>, n, m);
      n += count;
    }
  };
  run_parallel(parallel_for, job.N, std::max<int64_t>(16, 32768 / job.row_bytes / 4 * 4), multiply_rows);
}

// Computes the job by rows if its groups allow it.
template <class Format, int PLANES>
bool try_rows(const Job& job, ParallelFor parallel_for) {
  if (!lanes_fit<Format>(job)) return false;
  const bool one_group = !job.group_size || job.group_size >= job.K;
  if (PLANES == 1 && one_group && job.K <= WIDEST && !long_codes(job))
    by_rows<Format, PLANES, true>(job, parallel_for);
  else
    by_rows<Format, PLANES, false>(job, parallel_for);
  return true;
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
