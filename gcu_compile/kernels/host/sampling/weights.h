// A token's weight exp((z - max) / T), to a common factor: in float32 with a proven error, or in float64.
//
// The float32 weight of z is 2^(z c / 32 - m) with c = 32 log2(e) / T and m an integer, the exponent of a value near the
// maximum:
//   n = rint(z c_hi); r = z c_hi - n + z c_lo by two fused multiply-adds, |r| <= 1/2 + 2^-4 where |z| c < 2^20
//   w = t + t p(r), t = 2^(n / 32 - m) of a table of 32 and the exponent, p a polynomial of degree 2
// Relative error: of t, 2^-24; of p by its coefficients, (0.5625 ln 2 / 32)^3 / 24 = 2^-23.7; of the last addition, 2^-24;
// of r and the steps before, below 2^-27. Together below 2e-7 < ERROR.
// Weights below 2^-120 count as 0; the sums' slack in `Row::excess` covers them.
//
// Sums are of two kinds. `sum` adds float64 numbers. `quick_sum` first adds two float32 weights, which costs at most
// ROUNDED of it.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "exact.h"
#include "order.h"
#include "stream.h"

#ifdef __FP_FAST_FMAF
constexpr bool HAS_FMA = true;
#else
constexpr bool HAS_FMA = false;  // without it the reduction above is not exact: float64 throughout
#endif

// The float32 numbers 2^(j / 32) as integers, less j times what shifting n by 18 adds to them.
alignas(64) constexpr uint32_t POWERS[32] = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
      0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
      0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
      0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};

#ifdef __AVX512F__
inline __m512d low_half(__m512 w) { return _mm512_cvtps_pd(_mm512_castps512_ps256(w)); }
inline __m512d high_half(__m512 w) {
  return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(w), 1)));
}
#endif

struct Weights {
  static constexpr double ERROR = 2.1e-7;  // relative, of a float32 weight
  static constexpr double ROUNDED = 6.1e-8;  // relative, of a quick sum beside that of its weights
  static constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float P1 = 2.166125178e-02f, P2 = 2.345961984e-04f;  // minimax of 2^(r / 32) - 1 on |r| <= 0.5625
  static constexpr double REACH = 60;  // largest z - around, in powers of 2: sums stay far from overflow
  float max = 0, floor = 0, cutoff = 0, hi = 0, lo = 0, magic = MAGIC;
  double inverse = 1;
  bool narrow = false;  // float32 weights are good for this row

  Weights() = default;
  // Tokens below `floor` weigh nothing. `exact`: float64 is wanted. `around`: float32 weights are in units of its own.
  Weights(float max, float temperature, float floor, bool exact, float around)
      : max(max), floor(floor), inverse(1.0 / temperature) {
    double c = inverse * 1.4426950408889634, most = std::max(std::fabs(double(max)), std::fabs(double(around)));
    narrow = HAS_FMA && !exact && most * c < 0x1p15 && c < 0x1p60 && c > 0x1p-60;
    narrow = narrow && (double(max) - double(around)) * c < REACH;
    if (!narrow) return;
    hi = float(32 * c), lo = float(32 * c - double(hi));
    magic = MAGIC - 32 * float(std::rint(double(around) * c));  // the low bits then hold n - 32 m
    cutoff = std::max(floor, std::nextafterf(float(double(around) - 120 / c), INF));
  }
  Weights(float max, float temperature, float floor, bool exact) : Weights(max, temperature, floor, exact, max) {}

  float approximate(float z) const {
    float y = z < cutoff ? cutoff : z;
    float shifted = std::fmaf(y, hi, magic);
    float n = shifted - magic;
    float r = std::fmaf(y, lo, std::fmaf(y, hi, -n));
    uint32_t bits = std::bit_cast<uint32_t>(shifted);
    float t = std::bit_cast<float>(POWERS[bits % 32] + (bits << 18));
    float w = std::fmaf(t, r * std::fmaf(P2, r, P1), t);
    return z < cutoff ? 0.0f : w;
  }
  double exact(float z) const {
    double w = exp_negative((double(z) - double(max)) * inverse);
    return z < floor ? 0.0 : z == max ? 1.0 : w;
  }
  double operator()(float z) const { return narrow ? double(approximate(z)) : exact(z); }

  // Weight of the values from `from` on. n is a multiple of 32.
  double sum(const float* z, int n, float from) const { return sums(z, n, from, NONE).all; }

  // Weight of the values from `low` on, and of those from `high` on, which may be NONE. n is a multiple of 32.
  struct Sums {
    double all, above;
  };
  Sums sums(const float* z, int n, float low, float high) const {
    const Weights w = *this;
    double all = 0, above = 0;
    if (narrow) {
#ifdef __AVX512F__
      return high <= INF ? w.sums32<true>(z, n, low, high) : w.sums32<false>(z, n, low, high);
#else
#pragma omp simd reduction(+ : all, above)
      for (int i = 0; i < n; ++i) {
        double weight = double(w.approximate(z[i]));
        all += z[i] >= low ? weight : 0.0, above += z[i] >= high ? weight : 0.0;
      }
#endif
    } else {
#ifdef __AVX512F__
      return w.sums64(z, n, low, high);
#else
#pragma omp simd reduction(+ : all, above)
      for (int i = 0; i < n; ++i) {
        double weight = w.exact(z[i]);
        all += z[i] >= low ? weight : 0.0, above += z[i] >= high ? weight : 0.0;
      }
#endif
    }
    return {all, above};
  }

  double quick_sum(const float* z, int n, float from) const {
#ifdef __AVX512F__
    auto both = [z](int i) { return Both{_mm512_loadu_ps(z + i), _mm512_loadu_ps(z + i + 16)}; };
    if (narrow) return quick_sum32(both, n, from);
#endif
    return sum(z, n, from);
  }

#ifdef __AVX512F__
  // `quick_sum` of float32 weights: both(i) gives the values i ... i + 31, and is asked once for each.
  template <class Read>
  [[gnu::always_inline]] double quick_sum32(Read& both, int n, float from) const {
    return takes_all(from) ? quick_sum32<true>(both, n, from) : quick_sum32<false>(both, n, from);
  }
#endif

  // n numbers, a multiple of 16, are weighed in float32.
  void each(const float* z, int n, float* out) const {
    const Weights w = *this;
#ifdef __AVX512F__
    for (int i = 0; i < n; i += 16) {
      __m512 v = _mm512_loadu_ps(z + i);
      _mm512_storeu_ps(out + i, _mm512_maskz_mov_ps(w.from16(v, cutoff), w.approximate16(v)));
    }
#else
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = w.approximate(z[i]);
#endif
  }

  // n numbers are weighed; `z` and `out` have room for the next multiple of 16.
  void each(const float* z, int n, double* out) const {
    const Weights w = *this;
    if (narrow) {
#ifdef __AVX512F__
      for (int i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(z + i);
        __m512 weight = _mm512_maskz_mov_ps(w.from16(v, cutoff), w.approximate16(v));
        _mm512_storeu_pd(out + i, low_half(weight)), _mm512_storeu_pd(out + i + 8, high_half(weight));
      }
#else
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = double(w.approximate(z[i]));
#endif
    } else {
#ifdef __AVX512F__
      for (int i = 0; i < n; i += 8) _mm512_storeu_pd(out + i, w.exact8(_mm256_loadu_ps(z + i)));
#else
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = w.exact(z[i]);
#endif
    }
  }

#ifdef __AVX512F__
 private:
  // `approximate`, operation by operation; NaN and what is below `cutoff` count as `cutoff`, less than 2^-119.
  __m512 approximate16(__m512 z) const {
    __m512 y = _mm512_max_ps(z, _mm512_set1_ps(cutoff));  // of NaN and a number, the second operand
    __m512 shifted = _mm512_fmadd_ps(y, _mm512_set1_ps(hi), _mm512_set1_ps(magic));
    __m512 n = _mm512_sub_ps(shifted, _mm512_set1_ps(magic));
    __m512 r = _mm512_fmadd_ps(y, _mm512_set1_ps(lo), _mm512_fmsub_ps(y, _mm512_set1_ps(hi), n));
    __m512i bits = _mm512_castps_si512(shifted);
    __m512i power = _mm512_permutex2var_epi32(_mm512_load_si512(POWERS), bits, _mm512_load_si512(POWERS + 16));
    __m512 t = _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(bits, 18)));
    __m512 p = _mm512_mul_ps(r, _mm512_fmadd_ps(_mm512_set1_ps(P2), r, _mm512_set1_ps(P1)));
    return _mm512_fmadd_ps(t, p, t);
  }
  static __mmask16 from16(__m512 z, float from) { return _mm512_cmp_ps_mask(z, _mm512_set1_ps(from), _CMP_GE_OQ); }
  bool takes_all(float from) const { return from <= cutoff && floor == -FLT_MAX; }

  // `exact`, operation by operation.
  __m512d exact8(__m256 z) const {
    __m512d difference = _mm512_sub_pd(_mm512_cvtps_pd(z), _mm512_set1_pd(max));
    __m512d w = exp_negative(_mm512_mul_pd(difference, _mm512_set1_pd(inverse)));
    w = _mm512_mask_mov_pd(w, _mm256_cmp_ps_mask(z, _mm256_set1_ps(max), _CMP_EQ_OQ), _mm512_set1_pd(1.0));
    return _mm512_maskz_mov_pd(_mm256_cmp_ps_mask(z, _mm256_set1_ps(floor), _CMP_GE_OQ), w);
  }
  Sums sums64(const float* z, int n, float low, float high) const {
    __m512d all = _mm512_setzero_pd(), above = all;
    for (int i = 0; i < n; i += 8) {
      __m256 v = _mm256_loadu_ps(z + i);
      __m512d w = exact8(v);
      all = _mm512_mask_add_pd(all, _mm256_cmp_ps_mask(v, _mm256_set1_ps(low), _CMP_GE_OQ), all, w);
      above = _mm512_mask_add_pd(above, _mm256_cmp_ps_mask(v, _mm256_set1_ps(high), _CMP_GE_OQ), above, w);
    }
    return {_mm512_reduce_add_pd(all), _mm512_reduce_add_pd(above)};
  }

  template <bool HIGH>
  Sums sums32(const float* z, int n, float low, float high) const {
    __m512d a0 = _mm512_setzero_pd(), a1 = a0, u0 = a0, u1 = a0;
    bool all = takes_all(low);
    for (int i = 0; i < n; i += 16) {
      __m512 v = _mm512_loadu_ps(z + i), w = approximate16(v);
      if (!all) w = _mm512_maskz_mov_ps(from16(v, low), w);
      a0 = _mm512_add_pd(a0, low_half(w)), a1 = _mm512_add_pd(a1, high_half(w));
      if (HIGH) {
        w = _mm512_maskz_mov_ps(from16(v, high), w);
        u0 = _mm512_add_pd(u0, low_half(w)), u1 = _mm512_add_pd(u1, high_half(w));
      }
    }
    return {_mm512_reduce_add_pd(_mm512_add_pd(a0, a1)), _mm512_reduce_add_pd(_mm512_add_pd(u0, u1))};
  }

  template <bool ALL, class Read>
  [[gnu::always_inline]] double quick_sum32(Read& both, int n, float from) const {  // in line, `both` keeps to registers
    __m512d a0 = _mm512_setzero_pd(), a1 = a0, a2 = a0, a3 = a0;
    const Weights w = *this;
    auto weight = [&](int i) __attribute__((always_inline)) {
      Both v = both(i);
      __m512 first = w.approximate16(v.first), second = w.approximate16(v.second);
      if (!ALL) first = _mm512_maskz_mov_ps(from16(v.first, from), first);
      if (!ALL) second = _mm512_maskz_mov_ps(from16(v.second, from), second);
      return _mm512_add_ps(first, second);
    };
    int i = 0;
    for (; i + 64 <= n; i += 64) {
      __m512 v = weight(i), w = weight(i + 32);
      a0 = _mm512_add_pd(a0, low_half(v)), a1 = _mm512_add_pd(a1, high_half(v));
      a2 = _mm512_add_pd(a2, low_half(w)), a3 = _mm512_add_pd(a3, high_half(w));
    }
    if (i < n) {
      __m512 v = weight(i);
      a0 = _mm512_add_pd(a0, low_half(v)), a1 = _mm512_add_pd(a1, high_half(v));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(a0, a2), _mm512_add_pd(a1, a3)));
  }
#endif
};
