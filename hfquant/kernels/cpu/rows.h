// Products of few tokens. Each weight row is streamed once, as stored, one vector at a time along its columns; input
// codes are reordered to match the order in which weight codes are unpacked from a vector.
#pragma once

#include "tiles.h"

namespace hfquant {
namespace HFQUANT_ISA {

// How a vector of stored weight is unpacked to codes, and in how many operations.
// Nibbles: first the low codes of all bytes, then the high ones, so the input's even codes come before the odd ones.
struct Nibbles {
  static constexpr int CODES = 2 * BYTES, STORED = BYTES, VECTORS = 2, OPERATIONS = 3;
  static void read(const uint8_t* p, Ints w[]) {
    const Ints bytes = load(p);
    w[0] = field(bytes, 0, 0x08080808, 0x0f0f0f0f);
    w[1] = field(bytes, 4, 0x08080808, 0x0f0f0f0f);
  }
};
// Codes of other widths, which may straddle bytes, unpacked in order.
template <int BITS>
struct Straddling {
  static constexpr int CODES = BYTES, STORED = BYTES / 8 * BITS, VECTORS = 1, OPERATIONS = 12;
  static void read(const uint8_t* p, Ints w[]) { w[0] = unpack<BITS>(p); }
};
struct Eights {
  static constexpr int CODES = BYTES, STORED = BYTES, VECTORS = 1, OPERATIONS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = flip(load(p)); }
};
// 8-bit codes widened to signed 16 bits, for CPUs whose 8-bit dot products are not exact.
struct Wide {
  static constexpr int CODES = BYTES / 2, STORED = BYTES / 2, VECTORS = 1, OPERATIONS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = widen(p); }
};

// One vector of a row that is multiplied by input codes; those outside columns [begin, end) count as zero.
struct Visit {
  int32_t step, begin, end;
};

// How a row's vectors are multiplied: one after another, or group by group (whole), where vectors that two groups share
// are visited twice.
struct Steps {
  bool fit = true;    // each lane's columns share one weight scale and one input scale
  bool whole = false;
  std::vector<int32_t> group;  // unless whole: first group of each vector
  std::vector<int32_t> lanes;  // [LANES] per vector: each lane's group, relative to the first
  std::vector<Visit> visits;   // if whole
  std::vector<int32_t> ends;   // of each group's visits

  int64_t count() const { return whole ? visits.size() : group.size(); }
  Visit visit(const Job& job, int64_t i) const {
    return whole ? visits[i] : Visit{static_cast<int32_t>(i), 0, static_cast<int32_t>(job.K)};
  }

  template <class Format>
  static Steps of(const Job& job, const std::vector<Block>& blocks) {
    constexpr int LANE = Format::CODES / LANES;
    const int64_t count = (job.K + Format::CODES - 1) / Format::CODES, groups = blocks.size();
    Steps steps;
    int64_t visits = 0;
    for (const Block& b : blocks) {
      steps.fit = steps.fit && b.start % LANE == 0;
      visits += (b.start + b.size - 1) / Format::CODES - b.start / Format::CODES + 1;
    }
    // Lane by lane, the sums of each vector are scaled; group by group, those of each group. If groups are not whole
    // lanes, tiles are the alternative: they unpack each vector once, at the cost of multiplying it about MOST times.
    constexpr int64_t MULTIPLY = Format::OPERATIONS + Format::VECTORS, SCALE = 4, SCALE_GROUP = 5, MOST = 48;
    const bool pays = steps.fit ? visits * MULTIPLY + groups * SCALE_GROUP < count * (MULTIPLY + SCALE)
                                : visits * job.M <= count * MOST;
    steps.whole = groups > 1 && groups == job.G && !long_codes(job) && pays;
    if (steps.whole) {
      steps.visits.reserve(visits);
      steps.ends.reserve(groups);
      for (const Block& b : blocks) {
        for (int32_t step = b.start / Format::CODES; step * Format::CODES < b.start + b.size; ++step)
          steps.visits.push_back({step, b.start, b.start + b.size});
        steps.ends.push_back(steps.visits.size());
      }
      return steps;
    }
    steps.group.resize(count);
    steps.lanes.resize(count * LANES);
    for (const Block& b : blocks) {
      const int64_t end = (b.start + b.size + LANE - 1) / LANE;
      std::fill(steps.lanes.begin() + b.start / LANE, steps.lanes.begin() + end, b.group);
    }
    for (int64_t i = 0; i < count; ++i) {
      int32_t* lanes = steps.lanes.data() + i * LANES;
      steps.group[i] = lanes[0];
      for (int lane = 0; lane < LANES; ++lane) lanes[lane] = std::max(lanes[lane] - steps.group[i], 0);
    }
    return steps;
  }
};

// Times the largest sum that a row can have, this is still far below float32's maximum.
constexpr float LARGEST_UNIT = 1e20f;

// Token codes in the order of a row's unpacked codes, with their scales and sums.
struct Lines {
  int64_t planes, bytes;  // bytes per plane of a token
  int8_t* codes;          // [count][planes][bytes]: high bytes first if there are two planes
  float* scale;           // [count][scales]
  int64_t scales, groups;
  float* unit;     // [count][steps][LANES]: input scales of the lanes; [count][groups] of groups if steps are whole
  float* sum;      // [count][groups]: minus the sums of a group's codes times their scales; padded to whole vectors
  int32_t* offset; // [count][parts][LANES]: where integer sums start; minus the codes' sums times a common zero point
  int32_t* total;  // [count]: minus the sum of the last block's codes; used if sums stay integers, with a single block
  Steps steps;

  int64_t units() const { return steps.whole ? groups : steps.lanes.size(); }
  int64_t parts() const { return steps.whole ? steps.ends.size() : steps.group.size(); }
};

// Dot product accumulate of one unpacked vector w of the weight and a token's codes.
template <class Format, int PLANES>
inline Ints dot(const Ints w[Format::VECTORS], const int8_t* x, int64_t plane, Ints sum) {
  UNROLL for (int p = 0; p < PLANES; ++p) {
    if (p) sum = shift_left(sum, 8);
    UNROLL for (int v = 0; v < Format::VECTORS; ++v) {
      const Ints codes = load(x + p * plane + v * BYTES);
      sum = std::is_same_v<Format, Wide> ? dot_shorts(sum, w[v], codes) : dot_bytes(sum, w[v], codes);
    }
  }
  return sum;
}

// A row's first zero point, relative to the codes as they are multiplied.
template <class Format>
int zero_of(const Job& job, int64_t row) {
  return zero_at(job, row, 0) - (std::is_same_v<Format, Wide> ? 1 << (job.bits - 1) : 0);
}

// Lays out a token's codes in the order of visits. If rows have no zero points of their own, sums are already multiplied
// by the common one.
template <class Format, int PLANES>
void layout_line(const Job& job, const std::vector<Block>& blocks, const int16_t* codes, int64_t m, Lines& lines) {
  static thread_local Scratch of_sums;
  constexpr int LANE = Format::CODES / LANES;
  const Steps& steps = lines.steps;
  int8_t* __restrict line = lines.codes + m * PLANES * lines.bytes;
  int32_t* of_lanes = of_sums.get<int32_t>(steps.count() * LANES);
  int32_t* of_visit = of_lanes;
  Ints ones[Format::VECTORS];
  for (Ints& v : ones) v = repeat(std::is_same_v<Format, Wide> ? 0x00010001 : 0x01010101);
  for (int64_t i = 0; i < steps.count(); ++i) {
    const Visit visit = steps.visit(job, i);
    const int32_t first = visit.step * Format::CODES, last = first + Format::CODES;
    const int16_t* from = codes + first;
    int16_t part[Format::CODES];
    if (first < visit.begin || last > visit.end) {
      const int32_t begin = std::max(first, visit.begin), end = std::min(last, visit.end);
      std::memset(part, 0, sizeof(part));
      std::memcpy(part + begin - first, codes + begin, (end - begin) * sizeof(int16_t));
      from = part;
    }
    if constexpr (std::is_same_v<Format, Wide>) {
      std::memcpy(line, from, BYTES);
    } else {
      int8_t* __restrict low = line + (PLANES - 1) * lines.bytes;
      for (int v = 0; v < Format::VECTORS; ++v)
        for (int k = 0; k < BYTES; ++k) low[v * BYTES + k] = static_cast<int8_t>(from[k * Format::VECTORS + v]);
      for (int v = 0; PLANES == 2 && v < Format::VECTORS; ++v)
        for (int k = 0; k < BYTES; ++k)
          line[v * BYTES + k] = static_cast<int8_t>((from[k * Format::VECTORS + v] + 128) >> 8);
    }
    store(of_visit, dot<Format, PLANES>(ones, line, lines.bytes, zeros()));
    of_visit += LANES, line += Format::VECTORS * BYTES;
  }
  const int zero = job.zero ? 1 : zero_of<Format>(job, 0);
  int32_t* offset = lines.offset + m * lines.parts() * LANES;
  for (int64_t part = 0, visit = 0; part < lines.parts(); ++part) {
    Ints sum = zeros();
    for (const int64_t end = steps.whole ? steps.ends[part] : part + 1; visit < end; ++visit)
      sum = add(sum, load(of_lanes + visit * LANES));
    store(offset + part * LANES, times(sum, repeat(job.zero ? 0 : -zero)));
  }
  float *sums = lines.sum + m * lines.groups, *units = lines.unit + m * lines.units();
  std::memset(sums, 0, lines.groups * sizeof(float));
  std::memset(units, 0, lines.units() * sizeof(float));
  int64_t lane = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& b = blocks[i];
    const float unit = lines.scale[m * lines.scales + b.segment];
    const int64_t end = steps.whole ? steps.ends[i] * LANES : (b.start + b.size + LANE - 1) / LANE;
    int32_t sum = 0;
    if (steps.whole) units[i] = unit;
    for (; lane < end; ++lane) {
      sum -= of_lanes[lane];
      if (!steps.whole) units[lane] = unit;
    }
    lines.total[m] = sum * zero;
    sums[b.group] += sum * unit * zero;
  }
}

// Scales and zero points of LANES weight rows.
struct Factors {
  alignas(64) float row[LANES];     // remaining scale of each row, by which its sum is multiplied
  alignas(64) int32_t zero[LANES];  // zero points of rows that have one each, or 1
  float* scale;                     // [LANES][G]
  float* shift;                     // [LANES][G]: scales times zero points, if rows have those
  float* product;                   // [2][LANES][groups]: scales times input scales of two tokens, if steps are whole
};

// Fills in the products of `tokens` tokens from m for `count` rows.
inline void fill_products(const Job& job, const Lines& lines, int64_t count, int64_t m, int64_t tokens,
                          Factors& factors) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < count; ++r)
      for (int64_t g = 0; g < lines.groups; g += LANES) {
        const Reals unit = load_reals(lines.unit + (m + t) * lines.groups + g);
        const Reals product = mul(load_reals(factors.scale + r * job.G + g), unit);
        store_reals(factors.product + (t * LANES + r) * lines.groups + g, product);
      }
}

template <class Format>
void fill_shifts(const Job& job, int64_t n, int64_t count, Factors& factors) {
  const Ints less = repeat(std::is_same_v<Format, Wide> ? -128 : 0);  // its codes are signed
  // If rows need no padding, the zero points of all rows are contiguous.
  const int64_t rows = job.G * job.bits % 8 ? 1 : count;
  for (int64_t r = 0; r < count; r += rows) {
    const uint8_t* zero = job.zero + (n + r) * job.zero_bytes;
    const int64_t left = (job.N - n - r) * job.zero_bytes, first = r * job.G;
    for (int64_t g = 0; g < rows * job.G; g += BYTES) {
      uint8_t codes[BYTES];
      store(codes, codes_in_order(zero, left, g, job.bits));
      for (int64_t j = 0; j < BYTES && g + j < rows * job.G; j += LANES) {
        const Reals scale = load_reals(factors.scale + first + g + j);
        store_reals(factors.shift + first + g + j, mul(scale, to_reals(add(widen_bytes(codes + j), less))));
      }
    }
  }
}

// Fills in the factors of `count` rows from n.
template <class Format, bool GROUPED>
void fill_factors(const Job& job, int64_t n, int64_t count, Factors& factors) {
  if constexpr (!GROUPED) {
    for (int64_t r = 0; r < count; ++r) {
      factors.row[r] = scale_at(job, n + r, 0);
      factors.zero[r] = job.zero ? zero_of<Format>(job, n + r) : 1;
    }
    return;
  }
  for (int64_t r = 0; r < count; ++r) factors.row[r] = job.scale_code ? job.scale_row[n + r] : 1;
  const int64_t size = count * job.G, at = n * job.G;
  int64_t i = 0;
  if (job.scale_code) {
    for (; i < size && at + i + LANES <= job.N * job.G; i += LANES)
      store_reals(factors.scale + i, scale_values(job.scale_code + at + i));
    for (; i < size; ++i) factors.scale[i] = scale_value(job.scale_code[at + i]);
  } else {
    std::memcpy(factors.scale, job.scale + at, size * sizeof(float));
  }
  if (job.zero) fill_shifts<Format>(job, n, count, factors);
}

// Accumulator of a row: integers throughout, or floats if the row has several scales (GROUPED) or input codes have 16
// bits (LONG).
template <bool LONG, bool GROUPED>
auto no_sum() {
  if constexpr (LONG || GROUPED) return repeat(0.0f);
  else return zeros();
}
template <bool LONG, bool GROUPED>
using Sum = decltype(no_sum<LONG, GROUPED>());

template <class Format, bool LONG>
constexpr int PLANES_OF = LONG && !std::is_same_v<Format, Wide> ? 2 : 1;

// Prefetch distances in bytes, into L2 and into L1: the hardware prefetcher starts anew in each row.
constexpr int64_t FAR = 8192, NEAR = 2048;

// Adds the zero points' share to the sums of R rows from `first`, which counts from the factors' first row.
template <int R, int T>
[[gnu::always_inline]] inline void add_shifts(const Job& job, const Lines& lines, const Factors& factors,
                                              int64_t first, int64_t m, Reals (&sums)[R][T]) {
  const float* shifts = (job.zero ? factors.shift : factors.scale) + first * job.G;
  for (int64_t i = 0; i < job.G; i += LANES)
    UNROLL for (int t = 0; t < T; ++t) {
      const Reals sum = load_reals(lines.sum + (m + t) * lines.groups + i);
      // Exclude the next row's shifts: an infinite one times the padding's zeros would be NaN.
      UNROLL for (int r = 0; r < R; ++r) {
        const Ints shift = load_lanes(shifts + r * job.G + i, std::min<int64_t>(job.G - i, LANES));
        sums[r][t] = fma(as_reals(shift), sum, sums[r][t]);
      }
    }
}

// Prefetches the rows that are streamed, once per cache line.
template <class Format, int R>
[[gnu::always_inline]] inline void prefetch(const uint8_t* from, int64_t row_bytes, int64_t step) {
  constexpr int STEPS_OF_LINE = std::max(1, 64 / Format::STORED);
  UNROLL for (int r = 0; r < R && step % STEPS_OF_LINE == 0; ++r) {
    __builtin_prefetch(from + r * row_bytes + FAR, 0, 2);
    __builtin_prefetch(from + r * row_bytes + NEAR, 0, 3);
  }
}

// Micro-kernel: multiplies weight rows n + [first, count), R at a time while at least R are left, by T tokens from m;
// writes the sums to out [T][LANES]. The factors start at row n. Returns the first row that is left.
template <class Format, bool LONG, bool GROUPED, int R, int T>
int64_t rows_by_tokens(const Job& job, const Lines& lines, const Factors& factors, int64_t n, int64_t first,
                       int64_t count, int64_t m, Sum<LONG, GROUPED>* out) {
  constexpr int PLANES = PLANES_OF<Format, LONG>;
  constexpr bool PLAIN = !LONG && !GROUPED;
  const int64_t stride = PLANES * lines.bytes, plane = lines.bytes, lanes = lines.units();
  const int64_t steps = lines.steps.group.size(), row_bytes = job.row_bytes, groups = job.G;
  const int8_t* const codes = lines.codes + m * stride;
  const float* const units = lines.unit + m * lanes;
  const int32_t* const offsets = lines.offset + m * steps * LANES;
  const int32_t *const group = lines.steps.group.data(), *const lane_group = lines.steps.lanes.data();
  for (; first + R <= count; first += R) {
    const float* scale = factors.scale + first * groups;
    Sum<LONG, GROUPED> sums[R][T];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) sums[r][t] = no_sum<LONG, GROUPED>();
    // Multiplies one vector of each row by the input codes.
    auto multiply_step = [&](const uint8_t* from, int64_t pitch, int64_t step) {
      const int8_t* x = codes + step * Format::VECTORS * BYTES;
      UNROLL for (int r = 0; r < R; ++r) {
        Ints w[Format::VECTORS];
        Format::read(from + r * pitch, w);
        if constexpr (PLAIN) {
          UNROLL for (int t = 0; t < T; ++t) sums[r][t] = dot<Format, PLANES>(w, x + t * stride, plane, sums[r][t]);
        } else {
          Reals of_row;
          if (GROUPED) of_row = pick(scale + r * groups + group[step], load(lane_group + step * LANES));
          UNROLL for (int t = 0; t < T; ++t) {
            const Reals unit = load_reals(units + t * lanes + step * LANES);
            const Ints offset = LONG ? zeros() : load(offsets + (t * steps + step) * LANES);
            const Ints exact = dot<Format, PLANES>(w, x + t * stride, plane, offset);
            sums[r][t] = fma(to_reals(exact), GROUPED ? mul(of_row, unit) : unit, sums[r][t]);
          }
        }
      }
    };
    const uint8_t* from = job.weight + (n + first) * row_bytes;
    // Bytes from the last of the R rows to the end of the weight. Loads past the end of a row meet zero codes.
    int64_t step = 0, left = (job.N - n - first - R + 1) * row_bytes;
    for (; step < steps && left >= BYTES; ++step, left -= Format::STORED, from += Format::STORED) {
      prefetch<Format, R>(from, row_bytes, step);
      multiply_step(from, row_bytes, step);
    }
    for (; step < steps; ++step, left -= Format::STORED, from += Format::STORED) {
      // Vectors that would run past the end of the weight.
      uint8_t ends[R][BYTES] = {};
      UNROLL for (int r = 0; r < R; ++r) std::memcpy(ends[r], from + r * row_bytes, left);
      multiply_step(ends[0], BYTES, step);
    }
    if constexpr (GROUPED)
      if (LONG || job.zero) add_shifts(job, lines, factors, first, m, sums);
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) out[t * LANES + first + r] = sums[r][t];
  }
  return first;
}

// The same group by group: sums stay integers over a group's columns, and one factor scales them.
template <class Format, int R, int T>
int64_t rows_by_groups(const Job& job, const Lines& lines, const Factors& factors, int64_t n, int64_t first,
                       int64_t count, int64_t m, Reals* out) {
  const int64_t stride = lines.bytes, row_bytes = job.row_bytes, pitch = lines.groups;
  const Visit* const visits = lines.steps.visits.data();
  const int32_t *const ends = lines.steps.ends.data(), *const offsets = lines.offset + m * job.G * LANES;
  const int64_t last = lines.steps.visits.back().step;
  for (; first + R <= count; first += R) {
    const uint8_t* const rows = job.weight + (n + first) * row_bytes;
    const float* const scales = factors.product + first * pitch;
    // Bytes from the last of the R rows to the end of the weight.
    const int64_t left = (job.N - n - first - R + 1) * row_bytes;
    const bool inside = left >= last * Format::STORED + BYTES;
    const int8_t* x = lines.codes + m * stride;
    Reals sums[R][T];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) sums[r][t] = repeat(0.0f);
    for (int64_t group = 0, visit = 0; group < job.G; ++group) {
      Ints exact[R][T];
      UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t)
        exact[r][t] = load(offsets + (t * job.G + group) * LANES);
      int64_t step = visits[visit].step;
      for (; visit < ends[group]; ++visit, ++step, x += Format::VECTORS * BYTES) {
        const uint8_t* from = rows + step * Format::STORED;
        prefetch<Format, R>(from, row_bytes, step);
        UNROLL for (int r = 0; r < R; ++r) {
          Ints w[Format::VECTORS];
          if (__builtin_expect(inside, 1)) {
            Format::read(from + r * row_bytes, w);
          } else {  // vectors may run past the end of the weight
            uint8_t end[BYTES] = {};
            std::memcpy(end, from + r * row_bytes, std::min<int64_t>(BYTES, left - step * Format::STORED));
            Format::read(end, w);
          }
          UNROLL for (int t = 0; t < T; ++t) exact[r][t] = dot<Format, 1>(w, x + t * stride, 0, exact[r][t]);
        }
      }
      UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t)
        sums[r][t] = fma(to_reals(exact[r][t]), repeat(scales[(t * LANES + r) * pitch + group]), sums[r][t]);
    }
    if (job.zero) add_shifts(job, lines, factors, first, m, sums);
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int t = 0; t < T; ++t) out[t * LANES + first + r] = sums[r][t];
  }
  return first;
}

// Scales the sums of LANES rows to a token's outputs.
template <bool LONG, bool GROUPED>
Reals outputs(const Lines& lines, const Factors& factors, int64_t m, Sum<LONG, GROUPED> sums[LANES]) {
  const Reals row = load_reals(factors.row);
  const Ints zero = load(factors.zero);
  const auto sum = totals(sums);
  if constexpr (GROUPED) return mul(sum, row);
  else if constexpr (LONG) return mul(fma(to_reals(zero), repeat(lines.sum[m * lines.groups]), sum), row);
  else return mul(mul(to_reals(add(sum, times(zero, repeat(lines.total[m])))), row), repeat(lines.scale[m]));
}

// Epilogue: adds the low-rank branch and the bias to outputs [M][pitch] of `count` rows from n, and stores them.
[[gnu::noinline]] inline void finish(const Job& job, int64_t n, int64_t count, float* y, int64_t pitch) {
  static thread_local Scratch of_up, of_bias;
  float *up = of_up.get<float>(job.rank), *bias = of_bias.get<float>(count);
  for (int64_t i = 0; job.rank && i < count; ++i) {
    to_floats(job.up, (n + i) * job.rank, job.rank, up);
    for (int64_t m = 0; m < job.M; ++m) {
      const float* narrow = job.narrow + m * job.rank;
      Reals sums = repeat(0.0f);
      int64_t r = 0;
      for (; r + LANES <= job.rank; r += LANES) sums = fma(load_reals(narrow + r), load_reals(up + r), sums);
      float sum = total(sums);
      for (; r < job.rank; ++r) sum += narrow[r] * up[r];
      y[m * pitch + i] += sum;
    }
  }
  bias_of(job, n, count, bias);
  store_sums(job, 0, job.M, n, count, bias, y, pitch);
}

// Computes the job by rows; returns false if it cannot.
template <class Format, bool LONG, bool GROUPED>
bool by_rows(const Job& job, const std::vector<Block>& blocks, Steps steps, ParallelFor parallel_for) {
  static thread_local Scratch of_codes, of_scale, of_unit, of_sum, of_offset, of_total, of_floats, of_row;
  Lines lines;
  lines.steps = std::move(steps);
  lines.planes = PLANES_OF<Format, LONG>;
  lines.bytes = lines.steps.count() * Format::VECTORS * BYTES;
  lines.scales = input_scales(job);
  lines.groups = (job.G + LANES - 1) / LANES * LANES;
  lines.codes = of_codes.get<int8_t>(job.M * lines.planes * lines.bytes);
  lines.scale = of_scale.get<float>(job.M * lines.scales);
  lines.unit = of_unit.get<float>(job.M * lines.units());
  lines.sum = of_sum.get<float>(job.M * lines.groups);
  lines.offset = of_offset.get<int32_t>(job.M * lines.parts() * LANES);
  lines.total = of_total.get<int32_t>(job.M);
  const std::vector<Range> shared = shared_ranges(job);
  float* buffer = of_floats.get<float>(job.K);
  int16_t* codes = of_row.get<int16_t>(job.K);
  for (int64_t m = 0; m < job.M; ++m) {
    quantize(job, m, shared, buffer, codes, lines.scale + m * lines.scales);
    layout_line<Format, PLANES_OF<Format, LONG>>(job, blocks, codes, m, lines);
  }
  // Sums are multiplied by the input scale before the weight scale here; that alone must not make them overflow.
  for (int64_t i = 0; i < job.M * lines.scales; ++i)
    if (lines.scale[i] > LARGEST_UNIT) return false;
  auto multiply_rows = [&](int64_t begin, int64_t end) {
    static thread_local Scratch of_scales, of_shifts, of_products, of_y;
    constexpr int ROWS = 4;  // register blocking: enough to keep both ports busy
    Factors factors = {};
    factors.scale = of_scales.get<float>(GROUPED ? LANES * (job.G + 1) : 0);
    factors.shift = of_shifts.get<float>(GROUPED ? LANES * (job.G + 1) : 0);
    factors.product = of_products.get<float>(lines.steps.whole ? 2 * LANES * lines.groups : 0);
    const int64_t pitch = (end - begin + LANES - 1) / LANES * LANES;
    float* y = of_y.get<float>(job.M * pitch);
    Sum<LONG, GROUPED> sums[2 * LANES] = {};
    for (int64_t n = begin; n < end; n += LANES) {
      const int64_t count = std::min<int64_t>(LANES, end - n);
      fill_factors<Format, GROUPED>(job, n, count, factors);
      for (int64_t m = 0; m < job.M;) {
        const int64_t tokens = std::min<int64_t>(2, job.M - m);
        auto many = tokens == 2 ? rows_by_tokens<Format, LONG, GROUPED, ROWS, 2>
                                : rows_by_tokens<Format, LONG, GROUPED, ROWS, 1>;
        auto one = tokens == 2 ? rows_by_tokens<Format, LONG, GROUPED, 1, 2>
                               : rows_by_tokens<Format, LONG, GROUPED, 1, 1>;
        if constexpr (GROUPED && !LONG)
          if (lines.steps.whole) {
            fill_products(job, lines, count, m, tokens, factors);
            many = tokens == 2 ? rows_by_groups<Format, ROWS, 2> : rows_by_groups<Format, ROWS, 1>;
            one = tokens == 2 ? rows_by_groups<Format, 1, 2> : rows_by_groups<Format, 1, 1>;
          }
        one(job, lines, factors, n, many(job, lines, factors, n, 0, count, m, sums), count, m, sums);
        for (int64_t t = 0; t < tokens; ++t, ++m)
          store_reals(y + m * pitch + n - begin, outputs<LONG, GROUPED>(lines, factors, m, sums + t * LANES));
      }
    }
    finish(job, begin, end - begin, y, pitch);
  };
  run_parallel(parallel_for, job.N, std::max<int64_t>(16, 32768 / job.row_bytes / 16 * 16), multiply_rows);
  return true;
}

// Computes the job by rows if its groups allow it; returns whether it did.
template <class Format>
bool try_rows(const Job& job, ParallelFor parallel_for) {
  const std::vector<Block> blocks = blocks_of(job);
  const bool grouped = job.G > 1;
  if (job.K > WIDEST && !grouped && !long_codes(job)) return false;
  Steps steps = Steps::of<Format>(job, blocks);
  if (!steps.fit && !steps.whole) return false;
  if (long_codes(job))
    return grouped ? by_rows<Format, true, true>(job, blocks, std::move(steps), parallel_for)
                   : by_rows<Format, true, false>(job, blocks, std::move(steps), parallel_for);
  return grouped ? by_rows<Format, false, true>(job, blocks, std::move(steps), parallel_for)
                 : by_rows<Format, false, false>(job, blocks, std::move(steps), parallel_for);
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
