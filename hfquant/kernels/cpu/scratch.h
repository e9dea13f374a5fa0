// Per-thread scratch memory that is kept between calls, and conversions between float types.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "job.h"

namespace hfquant {
namespace HFQUANT_ISA {

// Grows to the largest request and is reused; has 64 bytes of slack, since vector loads run past the last element.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(std::aligned_alloc(ALIGNMENT, bytes)));
      if (!data_) throw std::bad_alloc();
      std::memset(data_.get(), 0, bytes);
      size_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  static constexpr size_t ALIGNMENT = 64;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

inline float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Rounds half to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

#if defined(__F16C__)
inline float from_float16(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t to_float16(float value) { return _cvtss_sh(value, 0); }
#else
inline float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = static_cast<uint32_t>(half & 0x7fff) << 13;
  // Exponent biases differ by 112; infinities and NaN keep the largest exponent.
  const float value = rest >= 0x7c00u << 13 ? of_bits(rest | 0x7f800000) : of_bits(rest) * 0x1p112f;
  return of_bits(bits_of(value) | sign);
}
// Rounds half to even.
inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) return sign | (bits_of(of_bits(rest) + 0.5f) - 0x3f000000);  // subnormal: units of 2^-24
  return sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
#endif

// Converts float16 to float32 and multiplies by `unit`.
inline void from_float16s(const uint16_t* p, int64_t count, float unit, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m512 values = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)));
    _mm512_storeu_ps(to + i, _mm512_mul_ps(values, _mm512_set1_ps(unit)));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    _mm256_storeu_ps(to + i, _mm256_mul_ps(values, _mm256_set1_ps(unit)));
  }
#endif
  for (; i < count; ++i) to[i] = from_float16(p[i]) * unit;
}

inline void to_floats(Floats from, int64_t start, int64_t count, float* to) {
  if (from.type == FLOAT32) {
    std::memcpy(to, static_cast<const float*>(from.data) + start, count * sizeof(float));
  } else if (from.type == BFLOAT16) {
    const uint16_t* p = static_cast<const uint16_t*>(from.data) + start;
    for (int64_t i = 0; i < count; ++i) to[i] = of_bits(static_cast<uint32_t>(p[i]) << 16);
  } else {
    from_float16s(static_cast<const uint16_t*>(from.data) + start, count, 1, to);
  }
}

inline void from_floats(const float* from, int64_t count, void* to, Type type, int64_t start) {
  if (type == FLOAT32) {
    float* p = static_cast<float*>(to) + start;
    if (p != from) std::memcpy(p, from, count * sizeof(float));
  } else if (type == BFLOAT16) {
    uint16_t* p = static_cast<uint16_t*>(to) + start;
    for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat16(from[i]);
  } else {
    uint16_t* p = static_cast<uint16_t*>(to) + start;
    for (int64_t i = 0; i < count; ++i) p[i] = to_float16(from[i]);
  }
}

}  // namespace HFQUANT_ISA
}  // namespace hfquant
