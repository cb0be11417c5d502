// Rows of float32, bfloat16 or float16, two vectors at a time.
#pragma once

#include "simd.h"

typedef uint16_t Half __attribute__((vector_size(LANES * 2)));
typedef int8_t vb __attribute__((vector_size(LANES)));

// PAIR neighbours of a row. Of bfloat16 `a` are those at even places and `b` those at odd ones: a shift or a mask makes
// floats of them, where their own order takes a shuffle more for each vector. Of others `a` is the first half.
template <class V>
struct Two {
  V a, b;
};
constexpr int64_t PAIR = 2 * LANES;

inline vf halves_to_floats(Half x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  vf y;
  for (int i = 0; i < LANES; ++i) y[i] = from_f16(x[i]);
  return y;
#endif
}

inline Half floats_to_halves(vf x) {
#if defined(__AVX512F__)
  return (Half)_mm512_cvtps_ph((__m512)x, 0);
#elif defined(__AVX2__)
  return (Half)_mm256_cvtps_ph((__m256)x, 0);
#else
  Half y;
  for (int i = 0; i < LANES; ++i) y[i] = to_f16(x[i]);
  return y;
#endif
}

template <int32_t DTYPE>
inline Two<vf> read_pair(const char* p) {
  if constexpr (DTYPE == BF16) {
    vu bits = load<vu>(p);
#if defined(__AVX512BW__)  // a constant for `&` would be made anew in every step
    return {std::bit_cast<vf>(bits << 16), (vf)_mm512_maskz_mov_epi16(0xaaaaaaaa, (__m512i)bits)};
#else
    return {std::bit_cast<vf>(bits << 16), std::bit_cast<vf>(bits & 0xffff0000)};
#endif
  } else if constexpr (DTYPE == F32) {
    return {load<vf>(p), load<vf>(p + sizeof(vf))};
  } else {
    return {halves_to_floats(load<Half>(p)), halves_to_floats(load<Half>(p + sizeof(Half)))};
  }
}

// Of NaN as bfloat16 only those whose low 16 bits are 0 stay NaN for sure: such are all sums of two bfloat16.
template <int32_t DTYPE>
inline void write_pair(Two<vf> x, char* p) {
  if constexpr (DTYPE == BF16) {
    auto rounded = [](vf y) {  // as to_bf16
      vu bits = std::bit_cast<vu>(y);
      return bits + 0x7fff + ((bits >> 16) & 1);
    };
#if defined(__AVX512BW__)
    vu even = rounded(x.a) >> 16, odd = rounded(x.b);
    store(p, _mm512_mask_mov_epi16((__m512i)odd, 0x55555555, (__m512i)even));
#else
    store(p, (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000));
#endif
  } else if constexpr (DTYPE == F32) {
    store(p, x.a);
    store(p + sizeof(vf), x.b);
  } else {
    store(p, floats_to_halves(x.a));
    store(p + sizeof(Half), floats_to_halves(x.b));
  }
}

// The low byte of every lane. What gcc makes of `__builtin_convertvector` here takes every lane by itself at times.
template <int32_t DTYPE>
inline void write_low_bytes(Two<vi> x, char* p) {
  if constexpr (DTYPE == BF16) {
    vi both = (x.a & 0xff) | (x.b << 8);
#if defined(__AVX512F__)
    store(p, _mm512_cvtepi32_epi16((__m512i)both));
#else
    store(p, __builtin_convertvector(both, Half));
#endif
  } else {
#if defined(__AVX512F__)
    store(p, _mm512_cvtepi32_epi8((__m512i)x.a));
    store(p + LANES, _mm512_cvtepi32_epi8((__m512i)x.b));
#else
    store(p, __builtin_convertvector(x.a, vb));
    store(p + LANES, __builtin_convertvector(x.b, vb));
#endif
  }
}

// `from(p)` for the PAIR elements of SIZE bytes at `p`; if only `left` are there, for a copy with zeros behind them.
template <int64_t SIZE, class F>
inline auto reading(const char* p, int64_t left, F from) {
  if (left >= PAIR) [[likely]] return from(p);
  alignas(64) char last[PAIR * SIZE] = {};
  if (left > 0) std::memcpy(last, p, left * SIZE);
  return from(last);
}

// `to(p)` likewise, for what writes them.
template <int64_t SIZE, class F>
inline void writing(char* p, int64_t left, F to) {
  if (left >= PAIR) [[likely]] return to(p);
  alignas(64) char last[PAIR * SIZE];
  to(last);
  std::memcpy(p, last, left * SIZE);
}
