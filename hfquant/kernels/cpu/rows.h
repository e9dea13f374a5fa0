// Products of few tokens. Four weight rows at a time are streamed once, as stored, one vector along their columns after
// another; input codes are reordered to match the order in which weight codes are unpacked from a vector.
#pragma once

#include "tiles.h"

namespace hfquant {
namespace HFQUANT_ISA {

// How a vector of stored weight is unpacked to codes.
// Nibbles: first the low codes of all bytes, then the high ones, so the input's even codes come before the odd ones.
struct Nibbles {
  static constexpr int CODES = 2 * BYTES, STORED = BYTES, VECTORS = 2;
  static void read(const uint8_t* p, Ints w[]) { unpack_nibbles(load(p), w); }
};
// Codes of other widths, which may straddle bytes, unpacked in order.
template <int BITS>
struct Straddling {
  static constexpr int CODES = BYTES, STORED = BYTES / 8 * BITS, VECTORS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = unpack<BITS>(p); }
};
struct Eights {
  static constexpr int CODES = BYTES, STORED = BYTES, VECTORS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = flip(load(p)); }
};
// 8-bit codes widened to signed 16 bits, for CPUs whose 8-bit dot products are not exact.
struct Wide {
  static constexpr int CODES = BYTES / 2, STORED = BYTES / 2, VECTORS = 1;
  static void read(const uint8_t* p, Ints w[]) { w[0] = widen(p); }
};

// Four lanes: each adds up columns of a single block, so four rows' sums of a vector fit one vector.
constexpr int QUAD = 4, QUADS = LANES / QUAD;

// Consecutive vectors of a row that are visited with integer sums, because they have the same blocks.
struct Part {
  int32_t step, visits;              // the first vector, and how many there are
  int32_t block[QUADS];              // of each quad
  int32_t group;                     // of the first quad
  bool wide = false;                 // whether quads are added as integers, since float32 may not hold the sum
  alignas(64) int32_t lanes[LANES];  // where a lane's factors lie among those of 4 rows from that group on

  Part(const std::vector<Block>& blocks, int32_t step, int32_t visits, const int32_t* of_quads)
      : step(step), visits(visits), group(blocks[of_quads[0]].group) {
    std::copy_n(of_quads, QUADS, block);
    for (int i = 0; i < LANES; ++i) lanes[i] = (blocks[block[i / QUAD]].group - group) * QUAD + i % QUAD;
  }
};

// Whether each quad's columns lie in one block.
template <class Format>
bool fits_quads(const std::vector<Block>& blocks) {
  for (const Block& b : blocks)
    if (b.start % (Format::CODES / QUADS)) return false;
  return true;
}

// How a row's vectors are multiplied. If quads do not fit, vectors that blocks share are visited once for each block.
template <class Format>
std::vector<Part> parts_of(const Job& job, const std::vector<Block>& blocks) {
  const int32_t last = static_cast<int32_t>(blocks.size()) - 1;
  const int64_t exact = long_codes(job) ? job.K : 1 << (25 - job.bits - job.input_bits);
  std::vector<Part> parts;
  int32_t of_quads[QUADS];
  const bool fits = fits_quads<Format>(blocks);
  for (int32_t step = 0, at = 0; fits && step * Format::CODES < job.K; ++step) {
    for (int32_t quad = 0; quad < QUADS; ++quad) {
      const int32_t column = step * Format::CODES + quad * (Format::CODES / QUADS);
      while (at < last && blocks[at + 1].start <= column) ++at;
      of_quads[quad] = at;
    }
    if (!parts.empty() && parts.back().block[0] == at)
      parts.back().visits += 1;
    else
      parts.emplace_back(blocks, step, 1, of_quads);
  }
  for (int32_t i = 0; !fits && i <= last; ++i) {
    std::fill_n(of_quads, QUADS, i);
    const int32_t step = blocks[i].start / Format::CODES, stop = blocks[i].start + blocks[i].size;
    parts.emplace_back(blocks, step, (stop - 1) / Format::CODES - step + 1, of_quads);
  }
  for (Part& part : parts) part.wide = part.visits * Format::CODES > exact && part.block[0] == part.block[QUADS - 1];
  return parts;
}

// Times the largest sum that a row can have, this is still far below float32's maximum.
constexpr float LARGEST_UNIT = 1e20f;

// What a token's sums of one part begin with or are multiplied by.
struct Edge {
  int32_t offset[LANES];  // minus the lane's codes' sum, times the zero point that rows share
  int32_t sum[LANES];     // minus the quad's codes' sum, by which rows' own zero points are multiplied
  float unit[LANES];      // input scale
};

// Token codes in the order of a row's unpacked codes.
struct Lines {
  std::vector<Part> parts;
  int64_t bytes;  // per plane of a token
  int8_t* codes;  // [count][planes][bytes]: high bytes first if there are two planes
  int64_t scales;
  float* scale;   // [count][scales]
  Edge* edges;    // [count][parts]
};

// Dot product accumulate of one unpacked vector w of the weight and a plane of a token's codes.
template <class Format>
inline Ints dot(const Ints w[Format::VECTORS], const int8_t* x, Ints sum) {
#if defined(HFQUANT_PAIRS)
  if constexpr (std::is_same_v<Format, Nibbles>) {  // 16 bits hold four products
    return add_pairs(sum, dot_pairs(pairs_of(w[0], load(x)), w[1], load(x + BYTES)));
  }
#endif
  UNROLL for (int v = 0; v < Format::VECTORS; ++v) {
    const Ints codes = load(x + v * BYTES);
    sum = std::is_same_v<Format, Wide> ? dot_shorts(sum, w[v], codes) : dot_bytes(sum, w[v], codes);
  }
  return sum;
}

// Lays out a token's codes in the order of visits; columns outside a part's blocks become zero.
template <class Format, int PLANES>
void layout_line(const Job& job, const std::vector<Block>& blocks, const int16_t* codes, int64_t m, Lines& lines) {
  int8_t* __restrict line = lines.codes + m * PLANES * lines.bytes;
  Ints ones[Format::VECTORS];
  for (Ints& v : ones) v = repeat(std::is_same_v<Format, Wide> ? 0x00010001 : 0x01010101);
  const int32_t zero = job.zero || std::is_same_v<Format, Wide> ? 0 : 1 << (job.bits - 1);
  Edge* edge = lines.edges + m * lines.parts.size();
  for (const Part& part : lines.parts) {
    const Block &head = blocks[part.block[0]], &tail = blocks[part.block[QUADS - 1]];
    Ints sum = zeros();
    for (int32_t i = 0; i < part.visits; ++i, line += Format::VECTORS * BYTES) {
      const int32_t first = (part.step + i) * Format::CODES, last = first + Format::CODES;
      const int32_t begin = std::max(first, head.start), end = std::min(last, tail.start + tail.size);
      const int16_t* from = codes + first;
      int16_t inside[Format::CODES];
      if (first < begin || last > end) {
        std::memset(inside, 0, sizeof(inside));
        std::memcpy(inside + begin - first, codes + begin, (end - begin) * sizeof(int16_t));
        from = inside;
      }
      if constexpr (std::is_same_v<Format, Wide>) {
        std::memcpy(line, from, BYTES);
        sum = dot<Format>(ones, line, sum);
      } else {
        int8_t* __restrict low = line + (PLANES - 1) * lines.bytes;
        for (int v = 0; v < Format::VECTORS; ++v)
          for (int k = 0; k < BYTES; ++k) low[v * BYTES + k] = static_cast<int8_t>(from[k * Format::VECTORS + v]);
        sum = dot<Format>(ones, low, sum);
        for (int v = 0; PLANES == 2 && v < Format::VECTORS; ++v)
          for (int k = 0; k < BYTES; ++k)
            line[v * BYTES + k] = static_cast<int8_t>((from[k * Format::VECTORS + v] + 128) >> 8);
        if (PLANES == 2) sum = add(sum, shift_left(dot<Format>(ones, line, zeros()), 8));
      }
    }
    store(edge->offset, times(sum, repeat(-zero)));
    Ints totals = quad_totals(sum, sum, sum, sum);
    if (part.wide) totals = in_first_quad(totals);
    store(edge->sum, times(totals, repeat(-1)));
    for (int lane = 0; lane < LANES; ++lane)
      edge->unit[lane] = lines.scale[m * lines.scales + blocks[part.block[lane / QUAD]].segment];
    ++edge;
  }
}

// Interleaves four lines of `count` elements: out[i][line] = lines[line][i]. Reads and writes multiples of SIXTEEN.
constexpr int64_t SIXTEEN = 16;
template <class T>
inline void by_fours(const T* const lines[QUAD], int64_t count, T* __restrict out) {
  const T *a = lines[0], *b = lines[1], *c = lines[2], *d = lines[3];
  for (int64_t start = 0; start < count; start += SIXTEEN)
    for (int64_t i = start; i < start + SIXTEEN; ++i)  // compiled to a few shuffles
      out[4 * i] = a[i], out[4 * i + 1] = b[i], out[4 * i + 2] = c[i], out[4 * i + 3] = d[i];
}

// Scales and zero points of up to BATCH weight rows, those of four rows side by side.
constexpr int64_t BATCH = 16;
struct Factors {
  float row[BATCH];  // remaining scale of each row, by which its sum is multiplied
  float* scale;      // [BATCH / QUAD][pitch]: [G][QUAD]
  float* zero;       // the same: the bits of integers, relative to the codes as they are multiplied; or null
  int64_t pitch;
};

// Fills in the factors of `count` rows from n; fours that are not full repeat the last row.
template <class Format>
void fill_factors(const Job& job, int64_t n, int64_t count, Factors& factors) {
  static thread_local Scratch of_copy, of_codes, of_bytes;
  const int64_t G = job.G;
  for (int64_t r = 0; r < BATCH; ++r) {
    const int64_t row = n + std::min(r, count - 1);
    factors.row[r] = G == 1 ? scale_at(job, row, 0) : job.scale_code ? job.scale_row[row] : 1;
  }
  // The rows from n of a table [N][G]; a copy if whole vectors would run past its end.
  auto rows_of = [&](auto* table) {
    if ((n + count) * G + SIXTEEN <= job.N * G) return table + n * G;
    auto* copy = of_copy.get<std::remove_const_t<std::remove_pointer_t<decltype(table)>>>(count * G + SIXTEEN);
    return static_cast<decltype(table)>(std::copy_n(table + n * G, count * G, copy) - count * G);
  };
  auto interleave_four = [&](auto* rows, int64_t pitch, int64_t first, auto* out) {
    decltype(rows) lines[QUAD];
    for (int64_t r = 0; r < QUAD; ++r) lines[r] = rows + std::min(first + r, count - 1) * pitch;
    by_fours(lines, G, out);
  };
  uint8_t* bytes = of_bytes.get<uint8_t>(QUAD * (G + SIXTEEN));
  float* scale = factors.scale;
  for (int64_t first = 0; first < count; first += QUAD, scale += factors.pitch) {
    if (G == 1) {
      store_reals(scale, repeat(1.0f));
    } else if (job.scale_code) {
      interleave_four(rows_of(job.scale_code), G, first, bytes);
      for (int64_t i = 0; i < QUAD * G; i += LANES) store_reals(scale + i, scale_values(bytes + i));
    } else {
      interleave_four(rows_of(job.scale), G, first, scale);
    }
  }
  if (!job.zero) return;
  const bool together = G * job.bits % 8 == 0;  // rows need no padding
  const int64_t pitch = together ? G : (G + BYTES - 1) / BYTES * BYTES, size = together ? count * G : G;
  uint8_t* codes = of_codes.get<uint8_t>(count * pitch + BYTES);
  for (int64_t r = 0; r < (together ? 1 : count); ++r)
    for (int64_t g = 0; g < size; g += BYTES) {
      const int64_t left = (job.N - n - r) * job.zero_bytes;
      store(codes + r * pitch + g, codes_in_order(job.zero + (n + r) * job.zero_bytes, left, g, job.bits));
    }
  const Ints less = repeat(std::is_same_v<Format, Wide> ? -128 : 0);  // its codes are signed
  float* zero = factors.zero;
  for (int64_t first = 0; first < count; first += QUAD, zero += factors.pitch) {
    interleave_four(codes, pitch, first, bytes);
    for (int64_t i = 0; i < QUAD * G; i += LANES) store(zero + i, add(widen_bytes(bytes + i), less));
  }
}

// How far weights are prefetched, in bytes, into L2: the hardware prefetcher starts anew on each page. At least as far as
// the four rows that are read side by side, or the last of them would come too late.
constexpr int64_t AHEAD = 8192;

// Micro-kernel: multiplies four weight rows, `pitch` bytes apart, by T tokens from m; the rows' scales and zero points
// are laid out as in Factors. The outputs, one row per lane, are the sums of the quads of out [T]. Vectors may read
// past a row, where they meet zero codes.
template <class Format, int PLANES, int T>
[[gnu::always_inline]] inline void rows_by_tokens(const Lines& lines, const float* scales, const float* zero_points,
                                                  const uint8_t* rows, int64_t pitch, int64_t m, Reals out[T]) {
  const Part *part = lines.parts.data(), *const end = part + lines.parts.size();
  const int64_t plane = lines.bytes, stride = PLANES * plane, edges = lines.parts.size();
  const int8_t* x = lines.codes + m * stride;
  const Edge* edge = lines.edges + m * edges;
  const uint8_t* ahead = rows + std::max(AHEAD, QUAD * pitch);
  Reals sums[T];
  UNROLL for (int t = 0; t < T; ++t) sums[t] = repeat(0.0f);
  for (; part != end; ++part, ++edge) {
    Ints exact[QUAD][T];
    UNROLL for (int r = 0; r < QUAD; ++r)
      UNROLL for (int t = 0; t < T; ++t) exact[r][t] = load(edge[t * edges].offset);
    const uint8_t* from = rows + part->step * Format::STORED;
    for (int32_t i = part->visits; i; --i, from += Format::STORED, x += Format::VECTORS * BYTES) {
      UNROLL for (int r = 0; r < QUAD; ++r) {
        __builtin_prefetch(ahead, 0, 2);  // in the order of addresses
        ahead += Format::STORED;
        Ints w[Format::VECTORS];
        Format::read(from + r * pitch, w);
        UNROLL for (int t = 0; t < T; ++t) {
          const int8_t* codes = x + t * stride;
          if constexpr (PLANES == 1) {
            exact[r][t] = dot<Format>(w, codes, exact[r][t]);
          } else {
            const Ints high = shift_left(dot<Format>(w, codes, zeros()), 8);
            exact[r][t] = add(exact[r][t], dot<Format>(w, codes + plane, high));
          }
        }
      }
    }
    const Ints lanes = load(part->lanes);
    const Reals scale = pick(scales + part->group * QUAD, lanes);
    UNROLL for (int t = 0; t < T; ++t) {
      Ints total = quad_totals(exact[0][t], exact[1][t], exact[2][t], exact[3][t]);
      if (part->wide) total = in_first_quad(total);
      if (zero_points) {
        const Ints zero = as_ints(pick(zero_points + part->group * QUAD, lanes));
        total = add(total, times(zero, load(edge[t * edges].sum)));
      }
      sums[t] = fma(to_reals(total), mul(scale, load_reals(edge[t * edges].unit)), sums[t]);
    }
  }
  UNROLL for (int t = 0; t < T; ++t) out[t] = sums[t];
}

// Adds the low-rank branch to outputs [M][pitch] of `count` rows from n.
inline void add_branch(const Job& job, int64_t n, int64_t count, float* y, int64_t pitch) {
  static thread_local Scratch of_up;
  constexpr float ONES[QUAD] = {1, 1, 1, 1};
  for (int64_t i = 0; i < count; i += QUAD) {
    const int64_t rows = std::min<int64_t>(QUAD, count - i), at = (n + i) * job.rank;
    const float* up = static_cast<const float*>(job.up.data);
    if (job.up.type == FLOAT32) {
      up += at;
    } else {
      float* converted = of_up.get<float>(QUAD * job.rank);
      to_floats(job.up, at, rows * job.rank, converted);
      up = converted;
    }
    for (int64_t m = 0; m < job.M; ++m) {
      const float* narrow = job.narrow + m * job.rank;
      Reals sums[QUAD];
      for (int64_t r = 0; r < QUAD; ++r) {
        const float* line = up + std::min(r, rows - 1) * job.rank;
        sums[r] = repeat(0.0f);
        int64_t k = 0;
        for (; k + LANES <= job.rank; k += LANES)
          sums[r] = fma(load_reals(narrow + k), load_reals(line + k), sums[r]);
        if (const int64_t left = job.rank - k)
          sums[r] = fma(as_reals(load_lanes(narrow + k, left)), as_reals(load_lanes(line + k, left)), sums[r]);
      }
      float total[QUAD];
      store_quads(total, quad_totals(sums[0], sums[1], sums[2], sums[3]), ONES);
      for (int64_t r = 0; r < rows; ++r) y[m * pitch + i + r] += total[r];
    }
  }
}

// Epilogue: adds the low-rank branch and the bias to outputs [M][pitch] of `count` rows from n, and stores them.
[[gnu::noinline]] inline void finish(const Job& job, int64_t n, int64_t count, float* y, int64_t pitch) {
  static thread_local Scratch of_bias;
  float* bias = of_bias.get<float>(count);
  if (job.rank) add_branch(job, n, count, y, pitch);
  bias_of(job, n, count, bias);
  store_sums(job, 0, job.M, n, count, bias, y, pitch);
}

// Computes the job by rows; returns false if it cannot.
template <class Format, int PLANES>
bool by_rows(const Job& job, const std::vector<Block>& blocks, ParallelFor parallel_for) {
  static thread_local Scratch of_codes, of_scale, of_edges, of_floats, of_row;
  constexpr int TOGETHER = 2;   // tokens whose sums fit registers
  constexpr int64_t MOST = 24;  // visits per vector from which unpacking it once, for tiles, is faster
  Lines lines;
  lines.parts = parts_of<Format>(job, blocks);
  int64_t visits = 0;
  for (const Part& part : lines.parts) visits += part.visits;
  const int64_t vectors = (job.K + Format::CODES - 1) / Format::CODES;
  if (visits > vectors && visits * job.M > vectors * MOST) return false;
  const int64_t reach = (vectors - 1) * Format::STORED + BYTES;  // bytes of a row that vectors read
  lines.bytes = visits * Format::VECTORS * BYTES;
  lines.scales = input_scales(job);
  lines.codes = of_codes.get<int8_t>(job.M * PLANES * lines.bytes);
  lines.scale = of_scale.get<float>(job.M * lines.scales);
  lines.edges = of_edges.get<Edge>(job.M * lines.parts.size());
  const std::vector<Range> shared = shared_ranges(job);
  float* buffer = of_floats.get<float>(job.K);
  int16_t* codes = of_row.get<int16_t>(job.K);
  for (int64_t m = 0; m < job.M; ++m) {
    quantize(job, m, shared, buffer, codes, lines.scale + m * lines.scales);
    layout_line<Format, PLANES>(job, blocks, codes, m, lines);
  }
  // Scales are multiplied by the input scale before the sums here; that alone must not make them overflow.
  for (int64_t i = 0; i < job.M * lines.scales; ++i)
    if (lines.scale[i] > LARGEST_UNIT) return false;
  auto multiply_rows = [&](int64_t begin, int64_t end) {
    static thread_local Scratch of_scales, of_zeros, of_y, of_rows;
    Factors factors = {};
    factors.pitch = QUAD * ((job.G + SIXTEEN) / SIXTEEN * SIXTEEN);
    factors.scale = of_scales.get<float>(BATCH / QUAD * factors.pitch);
    if (job.zero) factors.zero = of_zeros.get<float>(BATCH / QUAD * factors.pitch);
    const int64_t pitch = (end - begin + LANES - 1) / LANES * LANES;
    float* y = of_y.get<float>(job.M * pitch);
    for (int64_t n = begin; n < end; n += QUAD) {
      const int64_t count = std::min<int64_t>(QUAD, end - n), within = (n - begin) % BATCH;
      if (!within) fill_factors<Format>(job, n, std::min(BATCH, end - n), factors);
      const uint8_t* rows = job.weight + n * job.row_bytes;
      int64_t apart = job.row_bytes;
      if (count < QUAD || (job.N - n - QUAD + 1) * apart < reach) {  // vectors would run past the weight's end
        apart = reach;
        uint8_t* copies = of_rows.get<uint8_t>(QUAD * apart);
        for (int64_t r = 0; r < count; ++r) std::copy_n(rows + r * job.row_bytes, job.row_bytes, copies + r * apart);
        rows = copies;
      }
      const float* scales = factors.scale + within / QUAD * factors.pitch;
      const float* zeros = job.zero ? factors.zero + within / QUAD * factors.pitch : nullptr;
      float* out = y + n - begin;
      Reals sums[TOGETHER];
      int64_t m = 0;
      for (; m + TOGETHER <= job.M; m += TOGETHER) {
        rows_by_tokens<Format, PLANES, TOGETHER>(lines, scales, zeros, rows, apart, m, sums);
        UNROLL for (int t = 0; t < TOGETHER; ++t) store_quads(out + (m + t) * pitch, sums[t], factors.row + within);
      }
      for (; m < job.M; ++m) {
        rows_by_tokens<Format, PLANES, 1>(lines, scales, zeros, rows, apart, m, sums);
        store_quads(out + m * pitch, sums[0], factors.row + within);
      }
    }
    finish(job, begin, end - begin, y, pitch);
  };
  run_parallel(parallel_for, job.N, std::max<int64_t>(16, 32768 / job.row_bytes / 16 * 16), multiply_rows);
  return true;
}

// Computes the job by rows if that pays; returns whether it did.
template <class Format>
bool try_rows(const Job& job, const std::vector<Block>& blocks, ParallelFor parallel_for) {
  constexpr int LONG = std::is_same_v<Format, Wide> ? 1 : 2;  // planes of codes of more than 8 bits
  return long_codes(job) ? by_rows<Format, LONG>(job, blocks, parallel_for)
                         : by_rows<Format, 1>(job, blocks, parallel_for);
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
