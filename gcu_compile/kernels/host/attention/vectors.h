// Vectors of 32-bit lanes: their types, functions of a lane, and exchanges between lanes.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <utility>

#include "sizes.h"

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Unsigned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t Byte __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec as_float(Int x) { return std::bit_cast<Vec>(x); }
inline Int as_int(Vec x) { return std::bit_cast<Int>(x); }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline float to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays one
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// exp(x) for x <= 0, relative error below 2e-7; 0 from -87 down.
inline Vec exp_negative(Vec x) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  Vec shifted = x * 1.44269504f + MAGIC;
  Vec n = shifted - MAGIC;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  Vec power = as_float((as_int(shifted) + 127) << 23);
  return x <= -87.0f ? Vec{} : y * power;  // NaN stays NaN
}

// tanh by Cephes' polynomial near 0, by the exponential elsewhere.
inline Vec tangent(Vec x) {
  Vec size = x < 0.0f ? -x : x, z = x * x;
  Vec small = ((((z * -5.70498872745e-3f + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
               3.33332819422e-1f) * z * x + x;
  Vec e = exp_negative(size * -2.0f), big = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0.0f ? -big : big);
}

// Lanes of (x, y): x's with bit STEP clear and y's shifted up by it, or x's shifted down and y's with the bit set.
template <int STEP, bool HIGH, int... J>
inline Int exchange(Int x, Int y, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(x, y, (HIGH ? (J & STEP ? LANES + J : J + STEP) : (J & STEP ? LANES + J - STEP : J))...);
}

template <int STEP, int... J>
inline Vec turned(Vec x, std::integer_sequence<int, J...>) { return __builtin_shufflevector(x, x, ((J + STEP) % LANES)...); }

// All lanes into one, by halves: one after the other would be waited for.
template <int STEP = LANES / 2, class F>
inline float folded(Vec x, F f) {
  x = f(x, turned<STEP>(x, std::make_integer_sequence<int, LANES>()));
  if constexpr (STEP > 1) return folded<STEP / 2>(x, f);
  return x[0];
}
inline float largest(Vec x) { return folded(x, maximum); }
inline float total(Vec x) { return folded(x, [](Vec a, Vec b) { return a + b; }); }

// LANES x LANES transpose of 32-bit units: one stage for each bit swaps it between row and lane.
template <int STEP = 1>
[[gnu::always_inline]] inline void transpose(Int* r) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    Int x = r[i], y = r[i + STEP];
    r[i] = exchange<STEP, false>(x, y, lanes), r[i + STEP] = exchange<STEP, true>(x, y, lanes);
  }
  if constexpr (2 * STEP < LANES) transpose<2 * STEP>(r);
}

}  // namespace
