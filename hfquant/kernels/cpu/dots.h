// The dot products that tiles of tokens are made of, and how the codes of an input or a weight row are made for each.
#pragma once

#include "weight.h"

namespace hfquant {
namespace HFQUANT_ISA {

// Dot products of words: four unsigned 8-bit weight codes by signed input codes, two signed 16-bit codes by two, or two
// bfloat16 numbers by two. `real` converts sums to float32; `encode` makes a token's codes [K] and scales, and
// `unpack_row` the codes of a weight row; `packed` finishes words of unpacked codes, whose rows have the scales `scale`.
// If SCALED, codes include the scales of their groups. RUN words are multiplied before their sums are added in 32 bits.
struct IntegersDot {
  static constexpr bool SCALED = false;
  static constexpr int RUN = 1;
  static Reals real(Ints sum) { return to_reals(sum); }
  static void encode(const Job& job, int64_t token, const std::vector<Range>& shared, float* buffer, int16_t* codes,
                     float* scales) {
    quantize(job, token, shared, buffer, codes, scales);
  }
  using Stored = uint8_t;
  static void unpack_row(const Job& job, int64_t n, uint8_t* codes) {
    const uint8_t* row = job.weight + n * job.row_bytes;
    for (int64_t k = 0; k < job.K; k += BYTES) store(codes + k, codes_in_order(row, job.row_bytes, k, job.bits));
  }
};
struct BytesDot : IntegersDot {
  using Code = int8_t;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_bytes(sum, weights, repeat(x)); }
  static Ints packed(Ints words, Ints by, const float*) { return add_bytes(words, by); }
  static constexpr int32_t word_of(int32_t code) { return static_cast<int32_t>((code & 0xff) * 0x01010101u); }
};
#if defined(HFQUANT_PAIRS)
// Bytes with so few bits that the sums of RUN words fit 16 bits: one instruction multiplies a word instead of two.
template <int WORDS>
struct PairsDot : BytesDot {
  static constexpr int RUN = WORDS;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_pairs(sum, weights, repeat(x)); }
};
#endif
struct ShortsDot : IntegersDot {
  using Code = int16_t;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_shorts(sum, weights, repeat(x)); }
  static Ints packed(Ints words, Ints by, const float*) { return add_shorts(words, by); }
  static constexpr int32_t word_of(int32_t code) { return static_cast<int32_t>((code & 0xffff) * 0x00010001u); }
};
#if defined(__AVX512BF16__)
struct Bfloat16sDot {
  static constexpr bool SCALED = false;
  static constexpr int RUN = 1;
  using Code = int16_t;
  using Stored = int16_t;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return dot_bfloat16s(sum, weights, repeat(x)); }
  static Reals real(Ints sum) { return as_reals(sum); }
  static Ints packed(Ints words, Ints, const float*) { return words; }
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
  static void unpack_row(const Job& job, int64_t n, int16_t* codes) {
    static thread_local Scratch of_floats;
    float* floats = of_floats.get<float>(job.K);
    decode(job.weight + n * job.row_bytes, job.K, job.format, 1, floats);
    truncate(floats, job.K, codes);
  }
};
// Integer weights times bfloat16 inputs: dequantized weights, and inputs that are divided or rotated, are rounded to
// bfloat16, as those of a bfloat16 model are.
struct ScaledDot : ShortsDot {
  static constexpr bool SCALED = true;
  static Ints dot(Ints sum, Ints weights, int32_t x) { return Bfloat16sDot::dot(sum, weights, x); }
  static Reals real(Ints sum) { return Bfloat16sDot::real(sum); }
  static bool takes(const Job& job) { return job.format == INTEGERS && !job.input_bits && job.x.type == BFLOAT16; }
  static void encode(const Job& job, int64_t token, const std::vector<Range>&, float* buffer, int16_t* codes,
                     float* scale) {
    if (job.divisor || job.rotation)
      from_floats(floats_of(job, token, buffer), job.K, codes, BFLOAT16, 0);
    else
      std::memcpy(codes, static_cast<const int16_t*>(job.x.data) + token * job.K, job.K * sizeof(int16_t));
    constexpr int16_t EXPONENT = 0x7f80;
    int16_t largest = 0;
    for (int64_t k = 0; k < job.K; ++k) largest = std::max<int16_t>(largest, codes[k] & EXPONENT);
    *scale = largest == EXPONENT ? NAN_ : 1.0f;
  }
  static Ints packed(Ints words, Ints by, const float* scale) {
    return round_to_bfloat16s(add_shorts(words, by), load_reals(scale));
  }
};
#endif

}  // namespace HFQUANT_ISA
}  // namespace hfquant
