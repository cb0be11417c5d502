// Rows of floats to int8 with a scale (and a zero) of their own; see `quantize` in dequant_gemm/eager.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "pairs.h"

// The nearest integer, ties to even: adding 1.5 * 2^23 leaves it in the low bits. For small numbers only.
template <class T>
inline T round_even(T x) { return (x + 12582912.0f) - 12582912.0f; }

inline vi nearest(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)x);
#else
  return __builtin_convertvector(round_even(x), vi);
#endif
}

inline vf magnitude(vf x) { return std::bit_cast<vf>(std::bit_cast<vi>(x) & 0x7fffffff); }

inline vi larger(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

// The bits of the larger magnitude: NaN is above infinity and stays visible.
inline vi larger_magnitude(vi most, vf x) { return larger(most, std::bit_cast<vi>(magnitude(x))); }

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < LANES; ++i) found |= mask[i];
  return found;
#endif
}

// Lanes between -1024 and 1024, which the rounding wants; a NaN becomes one of them.
inline vf bounded(vf x) {
  x = x < 1024.0f ? x : splat(1024.0f);
  return x > -1024.0f ? x : splat(-1024.0f);
}

inline int8_t code_of(float x, float scale, int32_t zero) {
  float value = x / scale;
  value = value < 1024.0f ? value : 1024.0f;
  value = value > -1024.0f ? value : -1024.0f;
  return int8_t(std::min(127, std::max(-128, int32_t(round_even(value)) + zero)));
}

// The codes as bytes, clamped.
inline void store_codes(int8_t* codes, vi code) {
#if defined(__AVX512F__)
  store(codes, _mm512_cvtsepi32_epi8((__m512i)code));  // saturates
#else
  code = code < 127 ? code : splat(int32_t(127));
  code = code > -128 ? code : splat(int32_t(-128));
  store(codes, __builtin_convertvector(code, vb));
#endif
}

// Multiplies by the reciprocal, which is within 2^-22 of the quotient: less than 1e-4 for any that is not clamped. Where
// so much could decide between two codes it divides.
template <int V, bool FITS>
inline void quantize_vectors(const float* x, float scale, float inverse, int32_t zero, int8_t* codes) {
  vi code[V], off = {};
  for (int v = 0; v < V; ++v) {
    vf near = load<vf>(x + v * LANES) * inverse;
    if constexpr (!FITS) near = bounded(near);
    code[v] = nearest(near);
    off = larger_magnitude(off, near - to_float(code[v]));
  }
  if (any(off > std::bit_cast<int32_t>(0.4999f))) [[unlikely]]
    for (int v = 0; v < V; ++v) code[v] = nearest(bounded(load<vf>(x + v * LANES) / scale));
  for (int v = 0; v < V; ++v) store_codes(codes + v * LANES, FITS ? code[v] : code[v] + zero);
}

// codes[i] = clamp(rne(x[i] / scale) + zero). FITS: no quotient is beyond 127, and zero is 0.
template <bool FITS = false>
inline void quantize_known(const float* x, int64_t count, float scale, int32_t zero, int8_t* codes) {
  float inverse = 1.0f / scale;
  int64_t i = 0;
  if (std::isfinite(inverse) && std::fabs(inverse) > 1e-30f) {
    for (; i + 4 * LANES <= count; i += 4 * LANES) quantize_vectors<4, FITS>(x + i, scale, inverse, zero, codes + i);
    for (; i + LANES <= count; i += LANES) quantize_vectors<1, FITS>(x + i, scale, inverse, zero, codes + i);
  }
  for (; i < count; ++i) codes[i] = code_of(x[i], scale, zero);
}

// Codes, scale and zero of one group, whose largest magnitude is known (infinite or NaN: codes of 0).
inline void quantize_group(const float* x, int64_t count, float largest, bool symmetric, int8_t* codes, float& scale,
                           int32_t& zero) {
  zero = 0;
  scale = largest / 127.0f;
  if (!symmetric && std::isfinite(largest)) {
    float high = 0, low = 0;
    for (int64_t i = 0; i < count; ++i) high = std::max(high, x[i]), low = std::min(low, x[i]);
    scale = (high - low) / 255.0f;
    if (scale != 0) zero = int32_t(std::nearbyint(-128.0f - low / scale));
  }
  if (scale == 0 || !std::isfinite(scale))
    std::fill(codes, codes + count, int8_t(0));
  else if (symmetric)
    quantize_known<true>(x, count, scale, 0, codes);
  else
    quantize_known(x, count, scale, zero, codes);
}

// Largest magnitude; the maximum of the bits, in which NaN is above infinity and stays visible.
inline float largest_of(const float* x, int64_t count) {
  int32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  return std::bit_cast<float>(bits);
}

// A row as floats: itself, or a copy in `buffer`.
inline const float* row_of(const void* x, int32_t dtype, int64_t first, int64_t count, std::vector<float>& buffer) {
  if (dtype == F32) return static_cast<const float*>(x) + first;
  buffer.resize(count);
  to_floats(x, dtype, first, int(count), buffer.data());
  return buffer.data();
}
