// Weights as stored: column blocks, and the codes, scales and zero points of a row.
#pragma once

#include <algorithm>
#include <vector>

#include "input.h"
#include "vector.h"

namespace hfquant {
namespace HFQUANT_ISA {

// Widest blocks whose sums fit 32-bit accumulators: 2^15 products of 8 x 8 bits, or 2^7 of 16 x 8 bits.
constexpr int64_t WIDEST = 1 << 15, WIDEST_LONG = 128;

// Whether input codes take more than 8 bits.
inline bool long_codes(const Job& job) { return job.format == INTEGERS && (!job.input_bits || job.any_dual); }

// Cuts the columns wherever the weight scale or the input scale changes, or a 32-bit accumulator could overflow.
inline std::vector<Block> blocks_of(const Job& job) {
  const int64_t widest = long_codes(job) ? WIDEST_LONG : WIDEST;
  std::vector<Block> blocks;
  int32_t group = 0;
  for (int64_t s = 0, start = 0; s < job.segments; ++s) {
    const int64_t end = start + job.segment[s], step = job.group_size ? job.group_size : end - start;
    for (; start < end; ++group) {
      const int64_t stop = std::min(end, start + step);
      while (start < stop) {
        // Float inputs have one scale per FLOAT_BLOCK columns, wherever groups begin.
        const bool apart = job.format == INTEGERS && !job.input_bits;
        const int64_t next = apart ? (start / FLOAT_BLOCK + 1) * FLOAT_BLOCK : start + widest;
        const int64_t size = std::min(stop, next) - start;
        const int64_t scale = apart ? start / FLOAT_BLOCK : s;
        blocks.push_back({static_cast<int32_t>(start), static_cast<int32_t>(size), group, static_cast<int32_t>(scale)});
        start += size;
      }
    }
  }
  return blocks;
}

// Decodes the byte of a scale; see formats/scales.py.
inline float scale_value(uint8_t code) { return of_bits((static_cast<uint32_t>(code) << 18) + ((127 - 7) << 23)); }

inline float scale_at(const Job& job, int64_t row, int64_t group) {
  const int64_t i = row * job.G + group;
  return job.scale ? job.scale[i] : !job.scale_code ? 1 : scale_value(job.scale_code[i]) * job.scale_row[row];
}

// Loads a row's scales, padded to `groups` with scales of the next row (not at the end of the weight).
inline void scales_of_row(const Job& job, int64_t row, int64_t groups, float* __restrict out) {
  const int64_t at = row * job.G, count = at + groups <= job.N * job.G ? groups : job.G;
  if (!job.scale_code) {
    for (int64_t i = 0; i < count; ++i) out[i] = job.scale ? job.scale[at + i] : 1;
    return;
  }
  const float unit = job.scale_row[row];
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store_reals(out + i, mul(scale_values(job.scale_code + at + i), repeat(unit)));
  for (; i < count; ++i) out[i] = scale_value(job.scale_code[at + i]) * unit;
}

// Code k of a packed row plus 2^(bits - 1), as an unsigned byte.
inline uint8_t code_at(const uint8_t* row, int64_t k, int bits) {
  const int64_t bit = k * bits;
  const int shift = bit % 8;
  uint32_t word = row[bit / 8];
  if (shift + bits > 8) word |= static_cast<uint32_t>(row[bit / 8 + 1]) << 8;
  return (word >> shift & ((1u << bits) - 1)) ^ (1u << (bits - 1));
}

// The zero point that matches unsigned codes.
inline int zero_at(const Job& job, int64_t row, int64_t group) {
  return job.zero ? code_at(job.zero + row * job.zero_bytes, group, job.bits) : 1 << (job.bits - 1);
}

// Loads the first `count` bytes from p; the others are zero.
inline Ints load_first(const uint8_t* p, int64_t count) {
  uint8_t bytes[BYTES] = {};
  std::memcpy(bytes, p, count);
  return load(bytes);
}

// Unpacks BYTES codes of a row from k, a multiple of BYTES, in order, to unsigned bytes.
inline Ints codes_in_order(const uint8_t* row, int64_t row_bytes, int64_t k, int bits) {
  const int64_t at = k * bits / 8;
  const uint8_t* from = row + at;
  uint8_t end[BYTES];
  if (at + BYTES > row_bytes) {  // the vector extends past the row
    std::memset(end, 0, BYTES);
    std::memcpy(end, from, row_bytes - at);
    from = end;
  }
  switch (bits) {
    case 2: return unpack<2>(from);
    case 3: return unpack<3>(from);
    case 4: return unpack<4>(from);
    case 5: return unpack<5>(from);
    case 6: return unpack<6>(from);
    case 7: return unpack<7>(from);
    default: return flip(load(from));
  }
}

// Decodes codes [count] (16-bit integers, or the bits of floats) to float32, times a scale. FP8 E5M2 is the upper byte
// of a float16; so is E4M3 in units of 2^8, with all but the sign one bit lower. E4M3's largest magnitude is NaN.
inline void decode(const void* codes, int64_t count, Format format, float scale, float* __restrict out) {
  if (format == INT16) {
    const int16_t* shorts = static_cast<const int16_t*>(codes);
    for (int64_t i = 0; i < count; ++i) out[i] = shorts[i] * scale;
    return;
  }
  if (format >= FP16) {
    to_floats({codes, format == FP32 ? FLOAT32 : format == BF16 ? BFLOAT16 : FLOAT16}, 0, count, out);
    for (int64_t i = 0; scale != 1 && i < count; ++i) out[i] *= scale;
    return;
  }
  constexpr int64_t CHUNK = 128;
  const uint8_t* bytes = static_cast<const uint8_t*>(codes);
  for (int64_t start = 0; start < count; start += CHUNK) {
    const int64_t size = std::min(CHUNK, count - start);
    uint16_t halves[CHUNK];
    if (format == FP8_E5M2) {
      for (int64_t i = 0; i < size; ++i) halves[i] = static_cast<uint16_t>(bytes[start + i] << 8);
      from_float16s(halves, size, scale, out + start);
      continue;
    }
    for (int64_t i = 0; i < size; ++i) {
      const uint16_t shifted = static_cast<uint16_t>(static_cast<int8_t>(bytes[start + i])) << 7;  // sign twice
      const uint16_t nan = (shifted & 0x3f80) == 0x3f80 ? 0x7c00 : 0;
      halves[i] = (shifted & 0xbf80) | nan;
    }
    from_float16s(halves, size, 256 * scale, out + start);  // finite, since 448 * scale is
  }
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
