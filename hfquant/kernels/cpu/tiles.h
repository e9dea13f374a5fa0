// Products of many tokens by integers, or by numbers that bfloat16 holds. A panel of weight rows is unpacked and packed
// once, with the words of its rows side by side in lanes; tiles of tokens then run over it, multiplying each word of a
// token's codes by a vector of rows. Integer sums stay integers within a block and are floats across blocks.
#pragma once

#include "dots.h"
#include "panel.h"

namespace hfquant {
namespace HFQUANT_ISA {

// Codes per word, and per stored word of the weight if they fill it.
template <class Dot>
constexpr int CODES = 4 / sizeof(typename Dot::Code);
template <int BITS>
constexpr int STORED = 32 / BITS;
// Words unpacked from a stored word: byte (or short) j of word i is code i of those stored in byte (or short) j.
template <class Dot, int BITS>
constexpr int EACH = STORED<BITS> / CODES<Dot>;

// Zero point of the codes as they are multiplied. 16-bit codes are signed; 8-bit codes are unsigned and are shifted to
// a common zero point if they still fit a byte. Negative if they do not: zero points are then applied separately.
template <class Dot>
int common_zero(const Job& job) {
  constexpr int MOST = EXACT_BYTES ? 8 : 7;
  if (CODES<Dot> == 2) return 0;
  return !job.zero ? 1 << (job.bits - 1) : job.bits < MOST ? 1 << job.bits : -1;
}

// Where each block's words begin; blocks are padded to whole words, or to whole stored words.
struct Layout {
  std::vector<Block> blocks;
  std::vector<int64_t> start;  // first word of each block, and the end
  std::vector<int64_t> runs;   // first block of each run that shares an input scale, and the end
  int64_t words;               // per row, padded to whole vectors
  bool as_stored;              // whether each stored word of the weight lies within a block
  std::vector<int32_t> group;  // of each stored word if so, padded to whole vectors

  Layout(const Job& job, int codes) : blocks(blocks_of(job)) {
    as_stored = job.format == INTEGERS && (job.bits == 4 || job.bits == 8);
    const int stored = 32 / job.bits;
    for (const Block& b : blocks) as_stored = as_stored && b.start % stored == 0;
    const int whole = as_stored ? stored : codes;
    int64_t at = 0;
    for (const Block& b : blocks) {
      start.push_back(at);
      at += (b.size + whole - 1) / whole * whole / codes;
    }
    start.push_back(at);
    for (size_t b = 0; b < blocks.size(); ++b)
      if (!b || blocks[b].segment != blocks[b - 1].segment) runs.push_back(b);
    runs.push_back(blocks.size());
    if (as_stored) {
      for (const Block& b : blocks) group.resize((b.start + b.size + stored - 1) / stored, b.group);
      group.resize((group.size() + LANES - 1) / LANES * LANES, blocks.back().group);
    }
    words = std::max<int64_t>((at + LANES - 1) / LANES * LANES, group.size() * (stored / codes));
  }

  // All columns as one block, for codes that include their scales.
  Layout whole() const {
    Layout one = *this;
    one.blocks = {{0, blocks.back().start + blocks.back().size, 0, 0}};
    one.start = {0, start.back()};
    one.runs = {0, 1};
    return one;
  }
};

// Token codes as words, with their scales and initial sums; one row per token.
struct Tokens {
  int64_t count, words, blocks, scales;
  uint32_t* codes;   // [count][words]
  int32_t* initial;  // [count][blocks]: minus the sum of a block's codes, times the common zero point
  float* scale;      // [count][scales]
};

// Reorders codes to match unpacked stored words; the last one is padded with zeros.
template <class Dot, int BITS>
void in_stored_order(const int16_t* __restrict from, int64_t size, typename Dot::Code* __restrict to) {
  constexpr int STEP = STORED<BITS>, APART = EACH<Dot, BITS>;
  auto order = [to](const int16_t* codes, int64_t at) {
    for (int i = 0; i < STEP; ++i)
      to[at + i] = static_cast<typename Dot::Code>(codes[i % CODES<Dot> * APART + i / CODES<Dot>]);
  };
  int64_t i = 0;
  for (; i + STEP <= size; i += STEP) order(from + i, i);
  if (i == size) return;
  int16_t last[STEP] = {};
  std::memcpy(last, from + i, (size - i) * sizeof(int16_t));
  order(last, i);
}

template <class Dot>
void layout_token(const Job& job, const Layout& layout, const int16_t* codes, int64_t m, Tokens& tokens) {
  uint32_t* words = tokens.codes + m * tokens.words;
  typename Dot::Code* to = reinterpret_cast<typename Dot::Code*>(words);
  if (layout.as_stored) {
    job.bits == 4 ? in_stored_order<Dot, 4>(codes, job.K, to) : in_stored_order<Dot, 8>(codes, job.K, to);
  } else {
    for (size_t b = 0; b < layout.blocks.size(); ++b) {
      const int16_t* __restrict from = codes + layout.blocks[b].start;
      const int size = layout.blocks[b].size;
      words[layout.start[b + 1] - 1] = 0;
      typename Dot::Code* __restrict block = to + layout.start[b] * CODES<Dot>;
      for (int i = 0; i < size; ++i) block[i] = static_cast<typename Dot::Code>(from[i]);
    }
  }
  if (CODES<Dot> == 2) return;
  const int zero = common_zero<Dot>(job), factor = zero < 0 ? -1 : -zero;
  for (size_t b = 0; b < layout.blocks.size(); ++b) {
    const int64_t end = layout.start[b + 1];
    Ints sum = zeros();
    int64_t w = layout.start[b];
    for (; w + LANES <= end; w += LANES) sum = dot_bytes(sum, repeat(0x01010101), load(words + w));
    sum = dot_bytes(sum, repeat(0x01010101), load_lanes(words + w, end - w));
    tokens.initial[m * tokens.blocks + b] = total(sum) * factor;
  }
}

// A packed panel of `width` weight rows. Groups are padded to whole vectors.
struct Panel {
  int64_t width, groups;
  uint32_t* words;  // [words][width]
  float* scale;     // [groups][width]
  int32_t* zero;    // [groups][width]: words that shift codes to the common zero point, or zero points; or null
  bool zeros_apart;  // whether those are zero points, applied separately
  float* up;        // [rank][width]
};

// Fills in the scales and zero points of rows from n.
template <class Dot>
void fill_groups(const Job& job, int64_t n, Panel& panel) {
  static thread_local Scratch of_scale, of_zero, of_codes;
  float* scale = of_scale.get<float>(LANES * panel.groups);
  int32_t* zero = of_zero.get<int32_t>(LANES * panel.groups);
  uint8_t* codes = of_codes.get<uint8_t>(job.G + BYTES);
  const int common = common_zero<Dot>(job);
  if (!job.zero) std::memset(codes, 1 << (job.bits - 1), job.G);
  for (int64_t v = 0; v < panel.width / LANES; ++v) {
    for (int lane = 0; lane < LANES; ++lane) {
      // Lanes beyond the last row repeat it; their results are not stored.
      const int64_t row = std::min(n + v * LANES + lane, job.N - 1);
      scales_of_row(job, row, panel.groups, scale + lane * panel.groups);
      if (!panel.zero) continue;
      for (int64_t g = 0; job.zero && g < job.G; g += BYTES)
        store(codes + g, codes_in_order(job.zero + row * job.zero_bytes, job.zero_bytes, g, job.bits));
      int32_t* out = zero + lane * panel.groups;
      for (int64_t g = 0; g < job.G; ++g) out[g] = common < 0 ? codes[g] : Dot::word_of(common - codes[g]);
    }
    interleave(scale, panel.groups, panel.groups, panel.scale + v * LANES, panel.width);
    if (panel.zero) interleave(zero, panel.groups, panel.groups, panel.zero + v * LANES, panel.width);
  }
}

// Packs LANES rows by transposing their stored words, which are fewer than the unpacked ones.
template <class Dot, int BITS>
void fill_stored(const Job& job, const Layout& layout, int64_t n, int64_t width, const int32_t* zero,
                 const float* scale, uint32_t* words) {
  constexpr int32_t SIGN = Dot::word_of(1 << (BITS - 1)), MASK = Dot::word_of((1 << BITS) - 1);
  for (int64_t at = 0; at < job.row_bytes; at += BYTES) {
    const int64_t size = std::min<int64_t>(BYTES, job.row_bytes - at);
    Ints tile[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      const uint8_t* from = job.weight + std::min(n + lane, job.N - 1) * job.row_bytes + at;
      __builtin_prefetch(from + LANES * job.row_bytes, 0, 2);  // of the next vector or panel
      tile[lane] = size == BYTES ? load(from) : load_first(from, size);
    }
    transpose(tile);
    const int32_t* group = layout.group.data() + at / 4;
    uint32_t* to = words + at / 4 * EACH<Dot, BITS> * width;
    UNROLL for (int w = 0; w < LANES; ++w) {
      const int64_t of_group = group[w] * width;
      const Ints by = zero ? load(zero + of_group) : zeros();
      UNROLL for (int i = 0; i < EACH<Dot, BITS>; ++i, to += width)
        store(to, Dot::packed(field(tile[w], i * BITS, SIGN, MASK), by, scale + of_group));
    }
  }
}

// Packs LANES rows of codes of any width, with any blocks.
template <class Dot>
void fill_any(const Job& job, const Layout& layout, int64_t n, int64_t width, const int32_t* zero,
              const float* scale, uint32_t* words) {
  static thread_local Scratch of_lines, of_row;
  typename Dot::Stored* row = of_row.get<typename Dot::Stored>(job.K + BYTES);
  uint32_t* lines = of_lines.get<uint32_t>(LANES * layout.words);
  for (int lane = 0; lane < LANES; ++lane) {
    Dot::unpack_row(job, std::min(n + lane, job.N - 1), row);
    for (size_t b = 0; b < layout.blocks.size(); ++b) {
      lines[lane * layout.words + layout.start[b + 1] - 1] = 0;  // padding: as a float, it could be NaN
      const int size = layout.blocks[b].size;
      const typename Dot::Stored* __restrict from = row + layout.blocks[b].start;
      auto* __restrict to = reinterpret_cast<typename Dot::Code*>(lines + lane * layout.words + layout.start[b]);
      for (int i = 0; i < size; ++i) to[i] = static_cast<typename Dot::Code>(from[i]);
    }
  }
  interleave(lines, layout.words, layout.words, words, width);
  for (size_t b = 0; (zero || Dot::SCALED) && b < layout.blocks.size(); ++b) {
    const int64_t group = layout.blocks[b].group * width;
    const Ints by = zero ? load(zero + group) : zeros();
    for (int64_t w = layout.start[b]; w < layout.start[b + 1]; ++w)
      store(words + w * width, Dot::packed(load(words + w * width), by, scale + group));
  }
}

// Fills a panel with rows from n.
template <class Dot>
void fill_panel(const Job& job, const Layout& layout, int64_t n, Panel& panel) {
  fill_groups<Dot>(job, n, panel);
  const bool moved = panel.zero && common_zero<Dot>(job) >= 0;
  auto fill = !layout.as_stored ? fill_any<Dot> : job.bits == 4 ? fill_stored<Dot, 4> : fill_stored<Dot, 8>;
  for (int64_t v = 0; v < panel.width; v += LANES)
    fill(job, layout, n + v, panel.width, moved ? panel.zero + v : nullptr, panel.scale + v, panel.words + v);
  if (Dot::SCALED) std::fill(panel.scale, panel.scale + panel.width, 1.0f);
}

// Micro-kernel: integer dot products of T tokens from m by V vectors of the panel's rows, over one block.
template <class Dot, int T, int V>
[[gnu::always_inline]] inline void dot_block(const Layout& layout, const Tokens& tokens, const Panel& panel, int64_t m,
                                             int64_t block, Ints (&exact)[T][V]) {
  const int64_t pitch = tokens.words;
  const int32_t* initial = tokens.initial + m * tokens.blocks + block;
  UNROLL for (int i = 0; i < T; ++i) {
    const Ints from = CODES<Dot> == 2 ? zeros() : repeat(initial[i * tokens.blocks]);
    UNROLL for (int j = 0; j < V; ++j) exact[i][j] = from;
  }
  if (CODES<Dot> == 4 && panel.zeros_apart) {
    const int32_t* zero = panel.zero + layout.blocks[block].group * V * LANES;
    UNROLL for (int i = 0; i < T; ++i)
      UNROLL for (int j = 0; j < V; ++j) exact[i][j] = times(exact[i][j], load(zero + j * LANES));
  }
  const uint32_t* x = tokens.codes + m * pitch + layout.start[block];
  const uint32_t* weights = panel.words + layout.start[block] * V * LANES;
  const uint32_t* const end = panel.words + layout.start[block + 1] * V * LANES;
  auto step = [&](Ints (&sums)[T][V]) {
    UNROLL for (int i = 0; i < T; ++i) {
      const int32_t word = static_cast<int32_t>(x[i * pitch]);
      UNROLL for (int j = 0; j < V; ++j) sums[i][j] = Dot::dot(sums[i][j], load(weights + j * LANES), word);
    }
    ++x, weights += V * LANES;
  };
  if constexpr (Dot::RUN == 1) {
    while (weights < end) step(exact);
  } else {
    while (weights < end) {
      const uint32_t* const stop = std::min(weights + Dot::RUN * V * LANES, end);
      Ints few[T][V] = {};
      while (weights < stop) step(few);
      UNROLL for (int i = 0; i < T; ++i)
        UNROLL for (int j = 0; j < V; ++j) exact[i][j] = add_pairs(exact[i][j], few[i][j]);
    }
  }
}

// Multiplies T tokens from m by the panel's V vectors of rows, over blocks [first, last) that share an input scale, and
// adds to sums [T][V * LANES]. With ONE block, no float accumulators take registers that the integer ones need. Each
// step is done for all sums before the next: instructions waiting for results would crowd out those that are ready.
template <class Dot, int T, int V, bool ONE>
[[gnu::noinline]] void tile(const Layout& layout, const Tokens& tokens, const Panel& panel, int64_t m, int64_t first,
                            int64_t last, float* __restrict sums) {
  Reals total[T][V];
  if constexpr (!ONE)
    UNROLL for (int i = 0; i < T; ++i)
      UNROLL for (int j = 0; j < V; ++j) total[i][j] = repeat(0.0f);
  for (int64_t b = first; b < (ONE ? first + 1 : last); ++b) {
    Ints exact[T][V];
    dot_block<Dot>(layout, tokens, panel, m, b, exact);
    const float* of_group = panel.scale + layout.blocks[b].group * V * LANES;
    if constexpr (ONE) {
      Reals scale[V];
      UNROLL for (int j = 0; j < V; ++j) scale[j] = load_reals(of_group + j * LANES);
      UNROLL for (int i = 0; i < T; ++i)
        UNROLL for (int j = 0; j < V; ++j) total[i][j] = mul(Dot::real(exact[i][j]), scale[j]);
    } else {
      UNROLL for (int j = 0; j < V; ++j) {
        const Reals scale = load_reals(of_group + j * LANES);
        UNROLL for (int i = 0; i < T; ++i) total[i][j] = fma(Dot::real(exact[i][j]), scale, total[i][j]);
      }
    }
  }
  const float* units = tokens.scale + m * tokens.scales + layout.blocks[first].segment;
  Reals unit[T];
  UNROLL for (int i = 0; i < T; ++i) unit[i] = repeat(units[i * tokens.scales]);
  UNROLL for (int i = 0; i < T; ++i)
    UNROLL for (int j = 0; j < V; ++j) {
      float* sum = sums + (i * V + j) * LANES;
      store_reals(sum, fma(total[i][j], unit[i], load_reals(sum)));
    }
}

// Multiplies all tokens by a panel, in tiles of T tokens by V vectors, and stores the outputs of `rows` rows from n.
// The first token is the job's token `first`.
template <class Dot, int T, int V>
void by_panel(const Job& job, const Layout& layout, const Tokens& tokens, const Panel& panel, int64_t first, int64_t n,
              int64_t rows) {
  alignas(64) float sums[T * V * LANES], bias[V * LANES];
  bias_of(job, n, rows, bias);
  for (int64_t m = 0; m < tokens.count; m += T) {
    const int64_t count = std::min<int64_t>(T, tokens.count - m);
    prefetch_outputs(job, first + m, count, n, rows);
    std::memset(sums, 0, sizeof(sums));
    for (size_t run = 0; run + 1 < layout.runs.size(); ++run) {
      const int64_t begin = layout.runs[run], end = layout.runs[run + 1];
      auto add = end - begin == 1 ? tile<Dot, T, V, true> : tile<Dot, T, V, false>;
      add(layout, tokens, panel, m, begin, end, sums);
    }
    if (job.rank) {
      const float* narrow[T];
      for (int i = 0; i < T; ++i)
        narrow[i] = job.narrow + (first + std::min<int64_t>(m + i, tokens.count - 1)) * job.rank;
      float_tile<T, V>(narrow, panel.up, job.rank, T * job.rank, sums);
    }
    store_sums(job, first + m, count, n, rows, bias, sums, V * LANES);
  }
}

// Bytes of token codes processed at a time: what fits a core's L2 cache beside a panel.
constexpr int64_t CHUNK_BYTES = 1 << 20;
// Tokens from which wide panels of 16-bit codes pay, although they do not fit L1.
constexpr int64_t MANY = 128;

template <class Dot>
void by_tiles(const Job& job, ParallelFor parallel_for) {
  static thread_local Scratch of_codes, of_initial, of_scales;
  const int64_t most_rows = CODES<Dot> == 4 || job.M >= MANY ? WIDER * WIDTH : WIDTH;
  const Layout stored(job, CODES<Dot>), layout = Dot::SCALED ? stored.whole() : stored;
  const std::vector<Range> shared = shared_ranges(job);
  Tokens tokens;
  tokens.words = layout.words;
  tokens.blocks = layout.blocks.size();
  tokens.scales = Dot::SCALED ? 1 : input_scales(job);
  const int64_t most = std::max<int64_t>(CHUNK_BYTES / 4 / tokens.words, 256) / TOKENS * TOKENS;
  const int64_t chunk = std::min(most, (job.M + TOKENS - 1) / TOKENS * TOKENS);
  tokens.codes = of_codes.get<uint32_t>(chunk * tokens.words);
  tokens.initial = of_initial.get<int32_t>(chunk * tokens.blocks);
  tokens.scale = of_scales.get<float>(chunk * tokens.scales);
  const Term branch = {job.narrow, job.rank, static_cast<const uint8_t*>(job.up.data), format_of(job.up.type), false};
  const bool apart = common_zero<Dot>(job) < 0, zeros = job.zero || (CODES<Dot> == 2 && job.format == INTEGERS);
  for (int64_t first = 0; first < job.M; first += chunk) {
    tokens.count = std::min(chunk, job.M - first);
    auto code = [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_floats, of_row;
      float* buffer = of_floats.get<float>(job.K);
      int16_t* codes = of_row.get<int16_t>(job.K);
      for (int64_t m = begin; m < end; ++m) {
        Dot::encode(job, first + m, shared, buffer, codes, tokens.scale + m * tokens.scales);
        layout_token<Dot>(job, stored, codes, m, tokens);
      }
    };
    run_parallel(parallel_for, tokens.count, std::max<int64_t>(1, 16384 / job.K), code);
    auto multiply = [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_words, of_scale, of_zero, of_up;
      Panel panel;
      panel.groups = (job.G + LANES - 1) / LANES * LANES;
      panel.words = of_words.get<uint32_t>(layout.words * most_rows);
      panel.scale = of_scale.get<float>(panel.groups * most_rows);
      panel.zero = zeros ? of_zero.get<int32_t>(panel.groups * most_rows) : nullptr;
      panel.zeros_apart = apart;
      panel.up = of_up.get<float>((job.rank + LANES) * most_rows);
      for (int64_t n = begin * most_rows; n < std::min(end * most_rows, job.N); n += most_rows) {
        const int64_t rows = std::min(most_rows, job.N - n);
        const bool wide = rows > WIDTH;
        panel.width = wide ? most_rows : WIDTH;
        fill_panel<Dot>(job, stored, n, panel);
        for (int64_t r = 0; r < job.rank; r += PIECE) {
          auto fill = wide ? fill_floats<WIDER * VECTORS> : fill_floats<VECTORS>;
          fill(job, layout.blocks, branch, n, r, std::min(PIECE, job.rank - r), panel.up + r * panel.width);
        }
        auto run = wide ? by_panel<Dot, TOKENS / WIDER, WIDER * VECTORS> : by_panel<Dot, TOKENS, VECTORS>;
        run(job, layout, tokens, panel, first, n, rows);
      }
    };
    run_parallel(parallel_for, (job.N + most_rows - 1) / most_rows, 1, multiply);
  }
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
