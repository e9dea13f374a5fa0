// What one call computes: plain pointers and sizes, checked by native.cpp before any of it is read.
#pragma once

#include <cstdint>

namespace hfquant {

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Floats of the model's dtype.
struct Floats {
  const void* data = nullptr;
  Type type = FLOAT32;
};

enum Format { INTEGERS = 0, FP8_E4M3 = 1, FP8_E5M2 = 2, FP16 = 3, BF16 = 4, INT16 = 5 };

// Columns [start, start + size) that share the weight's scale number `group` and the input's segment.
struct Block {
  int32_t start, size, group, segment;
};

struct Job {
  // y [M, N] = x [M, K] W^T
  int64_t M, N, K;
  Floats x;
  void* y;

  // Bits of floats where these are not integers; then the input is floats, too.
  Format format;

  // Codes of 4 to 8 bits, packed low bits first, rows padded to bytes; scales [N, G] as float32, or as bytes times
  // scale_row [N]; zero points [N, G] packed as codes are, or null.
  int bits;
  const uint8_t* weight;
  int64_t row_bytes;
  int64_t G, group_size;  // group_size 0: one scale a segment
  const float* scale;
  const uint8_t* scale_code;
  const float* scale_row;
  const uint8_t* zero;
  int64_t zero_bytes;

  // The input's codes: 0 bits for a weight-only product. Static scales [segments], or null.
  int input_bits;
  bool per_token;
  int64_t segments;
  const int64_t* segment;  // sizes
  const int64_t* dual;     // flags
  bool any_dual;
  const float* input_scale;
  const float* input_scale_neg;
  const float* divisor;  // [K] or null

  // What is added: narrow [M, rank] up^T, [N, rank], and bias [N].
  int64_t rank;
  const float* narrow;
  Floats up, bias;
};

// Runs begin..end of a loop on torch's threads.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct Isa {
  const char* name;
  // Computes a job; null where the compiler could not build it.
  void (*run)(const Job&, ParallelFor);
};

}  // namespace hfquant
