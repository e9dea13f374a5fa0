// The dot products that tiles of tokens are made of, and how the codes of an input or a weight row are made for each.
#pragma once

#include "weight.h"

namespace hfquant {
namespace HFQUANT_ISA {

// Dot products of words: four unsigned 8-bit weight codes by signed input codes, two signed 16-bit codes by two, or two
// bfloat16 numbers by two. `real` converts sums to float32; `encode` makes a token's codes [K] and scales, and
// `unpack_row` those of a weight row.
struct IntegersDot {
  static Reals real(Ints sum) { return to_reals(sum); }
  static void encode(const Job& job, int64_t token, const std::vector<Range>& shared, float* buffer, int16_t* codes,
                     float* scales) {
    quantize(job, token, shared, buffer, codes, scales);
  }
  using Stored = uint8_t;
  static void unpack_row(const Job& job, const uint8_t* row, uint8_t* codes) {
    for (int64_t k = 0; k < job.K; k += BYTES) store(codes + k, codes_in_order(row, job.row_bytes, k, job.bits));
  }
};
struct BytesDot : IntegersDot {
  using Code = int8_t;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_bytes(sum, weights, repeat(x)); }
  static Ints shift(Ints words, Ints by) { return add_bytes(words, by); }
  static constexpr int32_t word_of(int32_t code) { return static_cast<int32_t>((code & 0xff) * 0x01010101u); }
};
struct ShortsDot : IntegersDot {
  using Code = int16_t;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_shorts(sum, weights, repeat(x)); }
  static Ints shift(Ints words, Ints by) { return add_shorts(words, by); }
  static constexpr int32_t word_of(int32_t code) { return static_cast<int32_t>((code & 0xffff) * 0x00010001u); }
};
#if defined(__AVX512BF16__)
struct Bfloat16sDot {
  using Code = int16_t;
  using Stored = int16_t;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_bfloat16s(sum, weights, repeat(x)); }
  static Reals real(Ints sum) { return as_reals(sum); }
  static Ints shift(Ints words, Ints) { return words; }
  static constexpr int32_t word_of(int32_t) { return 0; }
  // Whether bfloat16 holds all weight codes, and all inputs or their codes.
  static bool exact(const Job& job) {
    const bool raw = job.x.type == BFLOAT16 && !job.divisor && !job.rotation;
    return (job.format == FP8_E4M3 || job.format == FP8_E5M2 || job.format == BF16) && (job.input_bits || raw);
  }
  static void truncate(const float* __restrict from, int64_t count, int16_t* __restrict to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<int16_t>(bits_of(from[i]) >> 16);
  }
  static void encode(const Job& job, int64_t token, const std::vector<Range>& shared, float* buffer, int16_t* codes,
                     float* scales) {
    if (!job.input_bits) {
      std::memcpy(codes, static_cast<const int16_t*>(job.x.data) + token * job.K, job.K * sizeof(int16_t));
      std::fill(scales, scales + job.segments, 1.0f);
      return;
    }
    static thread_local Scratch of_rounded;
    float* rounded = of_rounded.get<float>(job.K);
    round_to_fp8(job, token, shared, buffer, rounded, scales);
    truncate(rounded, job.K, codes);
  }
  static void unpack_row(const Job& job, const uint8_t* row, int16_t* codes) {
    static thread_local Scratch of_floats;
    float* floats = of_floats.get<float>(job.K);
    decode(row, job.K, job.format, 1, floats);
    truncate(floats, job.K, codes);
  }
};
#endif

}  // namespace HFQUANT_ISA
}  // namespace hfquant
