// Vectors of 32-bit lanes for the instruction set that this file is compiled for, and conversions of element types.
//
// One source, three builds: AVX-512 (16 lanes), AVX2 (8), and whatever the compiler makes of 4 lanes elsewhere.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <bit>
#include <cstdint>
#include <cstring>

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, I8 = 3, U8 = 4, I16 = 5, I32 = 6, NONE = -1 };

constexpr int64_t size_of(int32_t dtype) { return dtype == F32 || dtype == I32 ? 4 : dtype == I8 || dtype == U8 ? 1 : 2; }

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));

template <class T>
inline T load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
inline void store(void* p, T value) { std::memcpy(p, &value, sizeof value); }
inline vf splat(float x) { return vf{} + x; }
inline vi splat(int32_t x) { return vi{} + x; }
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// a * b + c, with one rounding where the machine has that instruction.
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

inline uint16_t to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t u = std::bit_cast<uint32_t>(x);
  return uint16_t(x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float from_f16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float x = magnitude >= 0x7c00 ? std::bit_cast<float>(0x7f800000 | (magnitude & 0x3ff) << 13)
                                : std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) | sign);
#endif
}

inline uint16_t to_f16(float x) {  // round to nearest even
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  uint32_t u = std::bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000)  // subnormal: adding 0.5 leaves the rounded significand in the low bits
    return uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
#endif
}

// out[i] = float of element `first + i` of `p`, for i < count.
inline void to_floats(const void* p, int32_t dtype, int64_t first, int count, float* out) {
  auto each = [&](auto convert) {
    for (int i = 0; i < count; ++i) out[i] = convert(first + i);
  };
  switch (dtype) {
    case F32: return each([&](int64_t i) { return static_cast<const float*>(p)[i]; });
    case BF16: return each([&](int64_t i) { return from_bf16(static_cast<const uint16_t*>(p)[i]); });
    case F16: return each([&](int64_t i) { return from_f16(static_cast<const uint16_t*>(p)[i]); });
    case I8: return each([&](int64_t i) { return float(static_cast<const int8_t*>(p)[i]); });
    case U8: return each([&](int64_t i) { return float(static_cast<const uint8_t*>(p)[i]); });
    case I16: return each([&](int64_t i) { return float(static_cast<const int16_t*>(p)[i]); });
    default: return each([&](int64_t i) { return float(static_cast<const int32_t*>(p)[i]); });
  }
}

// Element `first + i` of `p` = in[i], rounded to the dtype (F32, BF16 or F16), for i < count.
inline void from_floats(const float* in, int count, void* p, int32_t dtype, int64_t first) {
  for (int i = 0; i < count; ++i) {
    if (dtype == F32) static_cast<float*>(p)[first + i] = in[i];
    if (dtype == BF16) static_cast<uint16_t*>(p)[first + i] = to_bf16(in[i]);
    if (dtype == F16) static_cast<uint16_t*>(p)[first + i] = to_f16(in[i]);
  }
}
