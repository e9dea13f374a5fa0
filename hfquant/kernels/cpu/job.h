// The job of one call, in plain pointers and sizes; native.cpp checks them before any kernel reads them.
#pragma once

#include <cstdint>

namespace hfquant {

enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Floats of the model's dtype.
struct Floats {
  const void* data = nullptr;
  Type type = FLOAT32;
};

enum Format { INTEGERS = 0, FP8_E4M3 = 1, FP8_E5M2 = 2, FP16 = 3, BF16 = 4, INT16 = 5, FP32 = 6 };

// The format whose codes are floats of this type.
inline Format format_of(Type type) { return type == FLOAT32 ? FP32 : type == BFLOAT16 ? BF16 : FP16; }

// Bits per code of a format that is decoded to floats.
inline int code_bits(Format format) { return format == FP32 ? 32 : format >= FP16 ? 16 : 8; }

// Columns [start, start + size), which share weight scale number `group` and input scale number `segment`.
struct Block {
  int32_t start, size, group, segment;
};

struct Job {
  // y [M, N] = x [M, K] W^T
  int64_t M, N, K;
  Floats x;
  void* y;
  Type y_type;

  // Format of the weight codes; unless these are integers, weight and input are both converted to floats.
  Format format;

  // Codes of 2 to 8 bits, packed low bits first, rows padded to bytes; scales [N, G] as float32, or as bytes times
  // scale_row [N]; zero points [N, G], packed like codes, or null.
  int bits;
  const uint8_t* weight;
  int64_t row_bytes;
  int64_t G, group_size;  // group_size 0: one scale per segment
  const float* scale;
  const uint8_t* scale_code;
  const float* scale_row;
  const uint8_t* zero;
  int64_t zero_bytes;

  // Input codes, integers or FP8; 0 bits for a weight-only product. Static scales [segments], or null.
  Format input_format;
  int input_bits;
  bool per_token;
  int64_t segments;
  const int64_t* segment;  // sizes
  const int64_t* dual;     // flags
  bool any_dual;
  const float* input_scale;
  const float* input_scale_neg;
  const float* divisor;  // [K] or null
  const float* inverse;  // [K], reciprocals of the divisor; null if not computed or out of range
  int64_t rotation;      // size of the blocks rotated after the division, a power of two, or 0

  // Epilogue: adds (x down^T) up^T, with down [rank, K] and up [N, rank], and bias [N]; narrow [M, rank] is x down^T.
  int64_t rank;
  Floats down, up, bias;
  const float* narrow;
};

// A Body runs iterations [begin, end) of a loop; ParallelFor spreads the loop over torch's threads.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, void* context);

struct Isa {
  const char* name;
  // Computes a job.
  void (*run)(const Job&, ParallelFor);
};

}  // namespace hfquant
