// A token's weight exp((z - max) / T), to a common factor: in float32 with a proven error, or in float64.
//
// The float32 weight of z is 2^(z c - m) with c = log2(e) / T and m the integer nearest to max c:
//   n = rint(z c_hi); r = z c_hi - n + z c_lo by two fused multiply-adds, |r| <= 1/2 + 2^-8 where |z| c < 2^16
//   w = q(r) 2^(n - m), q a polynomial of degree 5
// Relative error: of r, absolute: 2^-26 + 2^-26 + 2^-30, times ln 2; of q: 2^-23.2 by its coefficients, and
// 2^-24 (1 + 1 + 0.2) by rounding its last steps. Together below 4.7 * 2^-24 < ERROR.
// Weights below 2^-120 count as 0; the sums' slack in `Row::excess` covers them.
//
// Sums are of two kinds. `sum` adds float64 numbers. `quick_sum` and `split` first add four float32 weights, which costs
// at most two roundings of 2^-24: SUMMED is the error of a weight with its share of these.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "order.h"

#ifdef __FP_FAST_FMAF
constexpr bool HAS_FMA = true;
#else
constexpr bool HAS_FMA = false;  // without it the reduction above is not exact: float64 throughout
#endif

// exp(x) for x <= 0, error below 2^-51 (Taylor to degree 13 on |r| <= ln(2) / 2); 0 below -708.
inline double exp_negative(double x) {
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  double shifted = x * 1.4426950408889634 + MAGIC;
  double n = shifted - MAGIC;
  double r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  double y = 1.0 / 6227020800;
  y = y * r + 1.0 / 479001600;
  y = y * r + 1.0 / 39916800;
  y = y * r + 1.0 / 3628800;
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  int64_t bits = (std::bit_cast<int64_t>(shifted) + 1023) << 52;
  double result = y * std::bit_cast<double>(bits);
  return x > -708.0 ? result : 0.0;
}

struct Weights {
  static constexpr double ERROR = 3.2e-7;  // relative, of a float32 weight
  static constexpr double ROUNDED = 1.3e-7;  // relative, of a quick sum beside that of its weights
  static constexpr double SUMMED = ERROR + ROUNDED;
  static constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float Q[] = {1.0f,           0.693146944046f,   0.240221038461f,
                                5.55072277784e-2f, 9.67643596232e-3f, 1.32755748928e-3f};  // minimax on |r| <= 0.504
  float max = 0, floor = 0, cutoff = 0, hi = 0, lo = 0, magic = MAGIC;
  double inverse = 1;
  bool narrow = false;  // float32 weights are good for this row

  Weights() = default;
  // Tokens below `floor` weigh nothing. `exact`: float64 is wanted.
  Weights(float max, float temperature, float floor, bool exact)
      : max(max), floor(floor), inverse(1.0 / temperature) {
    double c = inverse * 1.4426950408889634;
    narrow = HAS_FMA && !exact && std::fabs(double(max)) * c < 0x1p15 && c < 0x1p60 && c > 0x1p-60;
    if (!narrow) return;
    hi = float(c), lo = float(c - double(hi));
    magic = MAGIC - float(std::rint(double(max) * c));  // the low bits then hold n - m
    cutoff = std::max(floor, std::nextafterf(float(double(max) - 120 / c), INF));
  }

  float approximate(float z) const {
    float y = z < cutoff ? cutoff : z;
    float shifted = std::fmaf(y, hi, magic);
    float n = shifted - magic;
    float r = std::fmaf(y, lo, std::fmaf(y, hi, -n));
    float r2 = r * r;
    float q01 = std::fmaf(Q[1], r, Q[0]), q23 = std::fmaf(Q[3], r, Q[2]), q45 = std::fmaf(Q[5], r, Q[4]);
    float q = std::fmaf(std::fmaf(q45, r2, q23), r2, q01);
    float w = std::bit_cast<float>(std::bit_cast<uint32_t>(q) + (std::bit_cast<uint32_t>(shifted) << 23));
    return z < cutoff ? 0.0f : w;
  }
  double exact(float z) const {
    double w = exp_negative((double(z) - double(max)) * inverse);
    return z < floor ? 0.0 : z == max ? 1.0 : w;
  }
  double operator()(float z) const { return narrow ? double(approximate(z)) : exact(z); }

  // Weight of the values from `from` on. n is a multiple of 32.
  double sum(const float* z, int n, float from) const {
    const Weights w = *this;
    double a = 0;
    if (narrow) {
#ifdef __AVX512F__
      return w.sum32(z, n, from);
#else
#pragma omp simd reduction(+ : a)
      for (int i = 0; i < n; ++i) a += z[i] >= from ? double(w.approximate(z[i])) : 0.0;
#endif
    } else {
#pragma omp simd reduction(+ : a)
      for (int i = 0; i < n; ++i) a += z[i] >= from ? w.exact(z[i]) : 0.0;
    }
    return a;
  }

  double quick_sum(const float* z, int n, float from) const {
#ifdef __AVX512F__
    if (narrow) return quick_sum32(z, n, from);
#endif
    return sum(z, n, from);
  }

  // Adds the weight of the values from `high` on to `above` and of those below `low` to `below`; high may be NaN: none.
  // n is a multiple of 32.
  void split(const float* z, int n, float low, float high, double& above, double& below) const {
    const Weights w = *this;
    double up = 0, down = 0;
    if (narrow) {
#ifdef __AVX512F__
      w.split32(z, n, low, high, up, down);
#else
#pragma omp simd reduction(+ : up, down)
      for (int i = 0; i < n; ++i) {
        double weight = double(w.approximate(z[i]));
        up += z[i] >= high ? weight : 0.0, down += z[i] < low ? weight : 0.0;
      }
#endif
    } else {
#pragma omp simd reduction(+ : up, down)
      for (int i = 0; i < n; ++i) {
        double weight = w.exact(z[i]);
        up += z[i] >= high ? weight : 0.0, down += z[i] < low ? weight : 0.0;
      }
    }
    above += up, below += down;
  }

  void each(const float* z, int n, double* out) const {
    const Weights w = *this;
    if (narrow) {
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = double(w.approximate(z[i]));
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = w.exact(z[i]);
    }
  }

#ifdef __AVX512F__
 private:
  // `approximate`, operation by operation.
  __m512 approximate16(__m512 z) const {
    __m512 y = _mm512_max_ps(_mm512_set1_ps(cutoff), z);
    __m512 shifted = _mm512_fmadd_ps(y, _mm512_set1_ps(hi), _mm512_set1_ps(magic));
    __m512 n = _mm512_sub_ps(shifted, _mm512_set1_ps(magic));
    __m512 r = _mm512_fmadd_ps(y, _mm512_set1_ps(lo), _mm512_fmsub_ps(y, _mm512_set1_ps(hi), n));
    __m512 r2 = _mm512_mul_ps(r, r);
    __m512 q01 = _mm512_fmadd_ps(_mm512_set1_ps(Q[1]), r, _mm512_set1_ps(Q[0]));
    __m512 q23 = _mm512_fmadd_ps(_mm512_set1_ps(Q[3]), r, _mm512_set1_ps(Q[2]));
    __m512 q45 = _mm512_fmadd_ps(_mm512_set1_ps(Q[5]), r, _mm512_set1_ps(Q[4]));
    __m512 q = _mm512_fmadd_ps(_mm512_fmadd_ps(q45, r2, q23), r2, q01);
    __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(q), exponent));
  }

  // What is below `cutoff` counts as `cutoff`, less than 2^-119, where `from` does not leave it out.
  double sum32(const float* z, int n, float from) const {
    __m512d a0 = _mm512_setzero_pd(), a1 = a0, a2 = a0, a3 = a0;
    bool all = from <= cutoff && floor == -FLT_MAX;
    __m512 from16 = _mm512_set1_ps(from);
    for (int i = 0; i < n; i += 32) {
      __m512 u = _mm512_loadu_ps(z + i), v = _mm512_loadu_ps(z + i + 16), wu = approximate16(u), wv = approximate16(v);
      if (!all) {
        wu = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(u, from16, _CMP_GE_OQ), wu);
        wv = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, from16, _CMP_GE_OQ), wv);
      }
      a0 = _mm512_add_pd(a0, low(wu)), a1 = _mm512_add_pd(a1, high(wu));
      a2 = _mm512_add_pd(a2, low(wv)), a3 = _mm512_add_pd(a3, high(wv));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(a0, a1), _mm512_add_pd(a2, a3)));
  }
  // As `sum32`; four weights are added in float32.
  double quick_sum32(const float* z, int n, float from) const {
    __m512d a0 = _mm512_setzero_pd(), a1 = a0;
    bool all = from <= cutoff && floor == -FLT_MAX;
    __m512 from16 = _mm512_set1_ps(from);
    auto weight = [&](int i) {
      __m512 v = _mm512_loadu_ps(z + i), w = approximate16(v);
      return all ? w : _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, from16, _CMP_GE_OQ), w);
    };
    int i = 0;
    for (; i + 64 <= n; i += 64) {
      __m512 w = _mm512_add_ps(_mm512_add_ps(weight(i), weight(i + 16)), _mm512_add_ps(weight(i + 32), weight(i + 48)));
      a0 = _mm512_add_pd(a0, low(w)), a1 = _mm512_add_pd(a1, high(w));
    }
    if (i < n) {
      __m512 w = _mm512_add_ps(weight(i), weight(i + 16));
      a0 = _mm512_add_pd(a0, low(w)), a1 = _mm512_add_pd(a1, high(w));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(a0, a1));
  }

  void split32(const float* z, int n, float from, float to, double& up, double& down) const {
    __m512d u0 = _mm512_setzero_pd(), u1 = u0, d0 = u0, d1 = u0;
    __m512 from16 = _mm512_set1_ps(from), to16 = _mm512_set1_ps(to);
    __m512 floor16 = _mm512_set1_ps(floor), none = _mm512_setzero_ps();
    __m512 u = none, d = none;
    auto take = [&](int i, __m512& some_up, __m512& some_down) {
      __m512 v = _mm512_loadu_ps(z + i), w = approximate16(v);
      some_up = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, to16, _CMP_GE_OQ), w);
      __mmask16 some = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, floor16, _CMP_GE_OQ), v, from16, _CMP_LT_OQ);
      some_down = _mm512_maskz_mov_ps(some, w);
    };
    for (int i = 0; i < n; i += 64) {
      __m512 p, q, r, s, t, v, x = none, y = none;
      take(i, p, q), take(i + 16, r, s);
      u = _mm512_add_ps(p, r), d = _mm512_add_ps(q, s);
      if (i + 64 <= n) {
        take(i + 32, t, v), take(i + 48, x, y);
        u = _mm512_add_ps(u, _mm512_add_ps(t, x)), d = _mm512_add_ps(d, _mm512_add_ps(v, y));
      }
      u0 = _mm512_add_pd(u0, low(u)), u1 = _mm512_add_pd(u1, high(u));
      d0 = _mm512_add_pd(d0, low(d)), d1 = _mm512_add_pd(d1, high(d));
    }
    up = _mm512_reduce_add_pd(_mm512_add_pd(u0, u1)), down = _mm512_reduce_add_pd(_mm512_add_pd(d0, d1));
  }
  static __m512d low(__m512 w) { return _mm512_cvtps_pd(_mm512_castps512_ps256(w)); }
  static __m512d high(__m512 w) {
    return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(w), 1)));
  }
#endif
};
