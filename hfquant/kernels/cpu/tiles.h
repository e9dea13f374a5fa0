// Products of many tokens. A panel of the weight's rows is unpacked once, words of its rows side by side in lanes;
// tiles of tokens then run over it, each word of a token's codes multiplying a vector of rows. Sums are integers within
// a block and floats beyond.
#pragma once

#include "weight.h"

namespace hfquant {
namespace HFQUANT_ISA {

constexpr int WIDTH = VECTORS * LANES;  // rows of a panel

// Sums stay in registers where every loop over them is unrolled.
#define UNROLL _Pragma("GCC unroll 16")

template <class Function>
void run_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, Function& function) {
  parallel_for(
      count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<Function*>(f))(begin, end); }, &function);
}

// The words of one multiplication: four unsigned codes by four signed bytes, or two signed codes by two of 16 bits.
struct BytesDot {
  static constexpr int CODES = 4;
  static constexpr bool UNSIGNED = true;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_bytes(sum, weights, repeat(x)); }
};
struct ShortsDot {
  static constexpr int CODES = 2;
  static constexpr bool UNSIGNED = false;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_shorts(sum, weights, repeat(x)); }
};

// Where a block's words begin; blocks are padded to whole words.
struct Layout {
  std::vector<Block> blocks;
  std::vector<int64_t> start;  // one more than blocks
  int64_t words;               // of a row, padded to whole vectors
  bool in_order;               // no padding between blocks

  Layout(const Job& job, int codes) : blocks(blocks_of(job)), in_order(true) {
    int64_t at = 0;
    for (const Block& b : blocks) {
      start.push_back(at);
      in_order = in_order && at * codes == b.start;
      at += (b.size + codes - 1) / codes;
    }
    start.push_back(at);
    words = (at + LANES - 1) / LANES * LANES;
  }
};

// Codes of tokens as words, with what goes with them; a token a row.
struct Tokens {
  int64_t count, planes, words;
  uint32_t* codes;      // [count][planes][words]: high bytes first, where there are two planes
  uint32_t* negated;    // [count][blocks]: minus the sum of a block's codes, as a pair (low 7 bits, the others)
  float* scale;         // [count][scales]
  int64_t blocks, scales;
};

template <class Dot>
void layout_token(const Layout& layout, const int16_t* codes, int64_t m, Tokens& tokens) {
  uint32_t* words = tokens.codes + m * tokens.planes * tokens.words;
  const int64_t planes = tokens.planes, plane = tokens.words;
  for (size_t b = 0; b < layout.blocks.size(); ++b) {
    const int size = layout.blocks[b].size;
    const int16_t* __restrict from = codes + layout.blocks[b].start;
    int32_t sum = 0;
    for (int i = 0; i < size; ++i) sum -= from[i];
    tokens.negated[m * tokens.blocks + b] =
        (static_cast<uint32_t>(sum >> 7) << 16) | (static_cast<uint32_t>(sum) & 127);
    uint32_t* to = words + layout.start[b];
    const int64_t last = layout.start[b + 1] - layout.start[b] - 1;
    for (int64_t p = 0; p < planes; ++p) to[p * plane + last] = 0;
    if (!Dot::UNSIGNED) {
      std::memcpy(to, from, size * sizeof(int16_t));
      continue;
    }
    int8_t* __restrict low = reinterpret_cast<int8_t*>(to + (planes - 1) * plane);
    for (int i = 0; i < size; ++i) low[i] = static_cast<int8_t>(from[i]);
    if (planes == 1) continue;
    int8_t* __restrict high = reinterpret_cast<int8_t*>(to);
    for (int i = 0; i < size; ++i) high[i] = static_cast<int8_t>((from[i] - static_cast<int8_t>(from[i])) >> 8);
  }
}

// WIDTH rows of the weight.
struct Panel {
  Ints* words;      // [words][VECTORS]
  float* scale;     // [blocks][WIDTH]
  uint32_t* zero;   // [blocks][WIDTH]: the zero point and 128 times it, as a pair
  float* up;        // [rank][WIDTH]
  float bias[WIDTH];
};

// A row's codes, each block padded to whole words.
template <class Dot>
void unpack_row(const Job& job, const Layout& layout, int64_t row, uint8_t* bytes, void* out) {
  const uint8_t* packed = job.weight + row * job.row_bytes;
  for (int64_t k = 0; k < job.K; k += BYTES) store(bytes + k, codes_in_order(packed, job.row_bytes, k, job.bits));
  for (size_t b = 0; b < layout.blocks.size(); ++b) {
    const Block& block = layout.blocks[b];
    if constexpr (Dot::UNSIGNED) {
      std::memcpy(static_cast<uint8_t*>(out) + layout.start[b] * 4, bytes + block.start, block.size);
    } else {
      int16_t* to = static_cast<int16_t*>(out) + layout.start[b] * 2;
      const int zero = zero_at(job, row, block.group);
      for (int i = 0; i < block.size; ++i) to[i] = static_cast<int16_t>(bytes[block.start + i] - zero);
    }
  }
}

// The words of a panel, a word of each row in the lanes of a vector.
template <class Dot>
void fill_words(const Job& job, const Layout& layout, int64_t first, Panel& panel, Scratch& scratch) {
  const int64_t words = layout.words;
  uint8_t* bytes = scratch.get<uint8_t>(job.K + BYTES + LANES * words * 4);
  uint8_t* unpacked = bytes + (job.K + BYTES - 1) / BYTES * BYTES;
  const bool direct = Dot::UNSIGNED && layout.in_order;
  for (int v = 0; v < VECTORS; ++v) {
    // Lanes beyond the last row repeat it; what they give is not stored.
    int64_t row[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      row[lane] = std::min(first + v * LANES + lane, job.N - 1);
      if (!direct) unpack_row<Dot>(job, layout, row[lane], bytes, unpacked + lane * words * 4);
    }
    for (int64_t w = 0; w < words; w += LANES) {
      Ints tile[LANES];
      for (int lane = 0; lane < LANES; ++lane)
        tile[lane] = direct ? codes_in_order(job.weight + row[lane] * job.row_bytes, job.row_bytes, w * 4, job.bits)
                            : load(unpacked + (lane * words + w) * 4);
      transpose(tile);
      for (int i = 0; i < LANES; ++i) panel.words[(w + i) * VECTORS + v] = tile[i];
    }
  }
}

template <class Dot>
void fill_panel(const Job& job, const Layout& layout, int64_t first, Panel& panel, Scratch& scratch) {
  const int64_t rows = std::min<int64_t>(WIDTH, job.N - first);
  fill_words<Dot>(job, layout, first, panel, scratch);
  for (int i = 0; i < WIDTH; ++i) {
    const int64_t row = std::min(first + i, job.N - 1);
    for (size_t b = 0; b < layout.blocks.size(); ++b) {
      const int group = layout.blocks[b].group;
      const uint32_t zero = Dot::UNSIGNED ? zero_at(job, row, group) : 0;
      panel.scale[b * WIDTH + i] = scale_at(job, row, group);
      panel.zero[b * WIDTH + i] = zero << 23 | zero;
    }
  }
  float up[WIDTH];
  if (job.bias.data) to_floats(job.bias, first, rows, panel.bias);
  for (int64_t i = 0; job.rank && i < rows; ++i)
    for (int64_t r = 0; r < job.rank; ++r) {
      to_floats(job.up, (first + i) * job.rank + r, 1, up);
      panel.up[r * WIDTH + i] = up[0];
    }
}

// T tokens from m on by the panel's rows, which begin at n. GROUPED: more than one block.
template <class Dot, int T, bool GROUPED, int PLANES, bool MANY_SCALES>
void tile(const Job& job, const Layout& layout, const Tokens& tokens, const Panel& panel, int64_t m, int64_t first,
          int64_t n) {
  const int64_t stride = tokens.planes * tokens.words;
  const uint32_t* x = tokens.codes + m * stride;
  Reals sums[T][VECTORS];
  UNROLL for (int i = 0; i < T; ++i)
    UNROLL for (int j = 0; j < VECTORS; ++j) sums[i][j] = repeat(0.0f);
  const int64_t blocks = GROUPED ? tokens.blocks : 1;
  for (int64_t b = 0; b < blocks; ++b) {
    Ints exact[T][VECTORS];
    UNROLL for (int p = 0; p < PLANES; ++p) {
      UNROLL for (int i = 0; i < T; ++i)
        UNROLL for (int j = 0; j < VECTORS; ++j) {
          if constexpr (!Dot::UNSIGNED) {
            exact[i][j] = zeros();
          } else {
            exact[i][j] = p ? times256(exact[i][j]) : zeros();
            if (p == PLANES - 1)
              exact[i][j] = dot_shorts(exact[i][j], load(panel.zero + b * WIDTH + j * LANES),
                                       repeat(static_cast<int32_t>(tokens.negated[(m + i) * tokens.blocks + b])));
          }
        }
      const uint32_t* xp = x + p * tokens.words + layout.start[b];
      const Ints* weights = panel.words + layout.start[b] * VECTORS;
      const Ints* const end = panel.words + layout.start[b + 1] * VECTORS;
      for (; weights < end; weights += VECTORS, ++xp) {
        UNROLL for (int i = 0; i < T; ++i) {
          const int32_t word = static_cast<int32_t>(xp[i * stride]);
          UNROLL for (int j = 0; j < VECTORS; ++j) exact[i][j] = Dot::dot(exact[i][j], weights[j], word);
        }
      }
    }
    UNROLL for (int j = 0; j < VECTORS; ++j) {
      const Reals scale = load_reals(panel.scale + b * WIDTH + j * LANES);
      UNROLL for (int i = 0; i < T; ++i) {
        const Reals sum = to_reals(exact[i][j]);
        if constexpr (!GROUPED) {
          sums[i][j] = mul(sum, scale);
        } else if constexpr (MANY_SCALES) {
          const float unit = tokens.scale[(m + i) * tokens.scales + layout.blocks[b].segment];
          sums[i][j] = fma(sum, mul(scale, repeat(unit)), sums[i][j]);
        } else {
          sums[i][j] = fma(sum, scale, sums[i][j]);
        }
      }
    }
  }
  UNROLL for (int i = 0; !MANY_SCALES && i < T; ++i) {
    const Reals unit = repeat(tokens.scale[(m + i) * tokens.scales]);
    UNROLL for (int j = 0; j < VECTORS; ++j) sums[i][j] = mul(sums[i][j], unit);
  }
  for (int64_t r = 0; r < job.rank; ++r)
    UNROLL for (int j = 0; j < VECTORS; ++j) {
      const Reals up = load_reals(panel.up + r * WIDTH + j * LANES);
      UNROLL for (int i = 0; i < T; ++i) {
        const int64_t token = std::min(first + m + i, job.M - 1);
        sums[i][j] = fma(repeat(job.narrow[token * job.rank + r]), up, sums[i][j]);
      }
    }
  if (job.bias.data)
    UNROLL for (int j = 0; j < VECTORS; ++j) {
      const Reals bias = load_reals(panel.bias + j * LANES);
      UNROLL for (int i = 0; i < T; ++i) sums[i][j] = fma(repeat(1.0f), bias, sums[i][j]);
    }
  const int64_t rows = std::min<int64_t>(WIDTH, job.N - n);
  for (int i = 0; i < T && first + m + i < job.M; ++i) {
    const int64_t at = (first + m + i) * job.N + n;
    if (rows == WIDTH && job.y_type == FLOAT32) {
      UNROLL for (int j = 0; j < VECTORS; ++j) store_reals(static_cast<float*>(job.y) + at + j * LANES, sums[i][j]);
    } else {
      float line[WIDTH];
      UNROLL for (int j = 0; j < VECTORS; ++j) store_reals(line + j * LANES, sums[i][j]);
      from_floats(line, rows, job.y, job.y_type, at);
    }
  }
}

template <class Dot>
void all_tiles(const Job& job, const Layout& layout, const Tokens& tokens, const Panel& panel, int64_t first,
               int64_t n) {
  const bool grouped = layout.blocks.size() > 1, many = tokens.scales > 1;
  auto run = [&](auto tile, int step) {
    for (int64_t m = 0; m < tokens.count; m += step) tile(job, layout, tokens, panel, m, first, n);
  };
  constexpr int G = TOKENS_GROUPED;
  if (!grouped && tokens.planes == 1 && !many) {
    run(tile<Dot, TOKENS, false, 1, false>, TOKENS);
  } else if (tokens.planes == 1) {
    many ? run(tile<Dot, G, true, 1, true>, G) : run(tile<Dot, G, true, 1, false>, G);
  } else if constexpr (Dot::UNSIGNED) {
    many ? run(tile<Dot, G, true, 2, true>, G) : run(tile<Dot, G, true, 2, false>, G);
  }
}

// Codes of tokens that are worked on at once: what a core's second-level cache holds beside a panel.
constexpr int64_t CHUNK_BYTES = 1 << 20;

template <class Dot>
void by_tiles(const Job& job, ParallelFor parallel_for) {
  static thread_local Scratch of_codes, of_sums, of_scales;
  const Layout layout(job, Dot::CODES);
  const std::vector<Range> shared = shared_ranges(job);
  Tokens tokens;
  tokens.planes = Dot::UNSIGNED && long_codes(job) ? 2 : 1;
  tokens.words = layout.words;
  tokens.blocks = layout.blocks.size();
  tokens.scales = input_scales(job);
  constexpr int64_t STEP = TOKENS * TOKENS_GROUPED;
  const int64_t row = tokens.planes * tokens.words * 4;
  const int64_t most = std::max<int64_t>(CHUNK_BYTES / row, 64) / STEP * STEP;
  const int64_t chunk = std::min(most, (job.M + STEP - 1) / STEP * STEP);
  tokens.codes = of_codes.get<uint32_t>(chunk * tokens.planes * tokens.words);
  tokens.negated = of_sums.get<uint32_t>(chunk * tokens.blocks);
  tokens.scale = of_scales.get<float>(chunk * tokens.scales);
  for (int64_t first = 0; first < job.M; first += chunk) {
    const int64_t real = std::min(chunk, job.M - first);
    tokens.count = real;
    auto code = [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_floats, of_row;
      float* buffer = of_floats.get<float>(job.K);
      int16_t* codes = of_row.get<int16_t>(job.K);
      for (int64_t m = begin; m < end; ++m) {
        quantize(job, first + m, shared, buffer, codes, tokens.scale + m * tokens.scales);
        layout_token<Dot>(layout, codes, m, tokens);
      }
    };
    run_parallel(parallel_for, real, std::max<int64_t>(1, 16384 / job.K), code);
    auto multiply = [&](int64_t begin, int64_t end) {
      static thread_local Scratch of_words, of_scale, of_zero, of_up, of_bytes;
      Panel panel;
      panel.words = of_words.get<Ints>(layout.words * VECTORS);
      panel.scale = of_scale.get<float>(tokens.blocks * WIDTH);
      panel.zero = of_zero.get<uint32_t>(tokens.blocks * WIDTH);
      panel.up = of_up.get<float>(job.rank * WIDTH);
      for (int64_t p = begin; p < end; ++p) {
        fill_panel<Dot>(job, layout, p * WIDTH, panel, of_bytes);
        all_tiles<Dot>(job, layout, tokens, panel, first, p * WIDTH);
      }
    };
    run_parallel(parallel_for, (job.N + WIDTH - 1) / WIDTH, 1, multiply);
  }
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
