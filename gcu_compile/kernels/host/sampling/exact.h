// exp in float64.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <bit>
#include <cstdint>

#ifdef __AVX512F__
// The float64 numbers 2^(j / 16) as integers, less j times what shifting n by 48 adds to them.
alignas(64) constexpr uint64_t SIXTEENTHS[16] = {
    0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238,
    0x3fef06fe0a31b715, 0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429,
    0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090,
    0x3feee89f995ad3ad, 0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da};

// exp(x) for x <= 0, error below 2^-51; 0 below -708: 2^(n / 16) of the table and the exponent, times a Taylor polynomial
// of degree 7 on |r| <= ln(2) / 32.
inline __m512d exp_negative(__m512d x) {
  auto all = [](double c) { return _mm512_set1_pd(c); };
  const __m512d magic = all(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  __m512d shifted = _mm512_fmadd_pd(x, all(23.083120654223414), magic), n = _mm512_sub_pd(shifted, magic);
  __m512d r = _mm512_fnmadd_pd(n, all(0.04332169875851832), x);
  r = _mm512_fnmadd_pd(n, all(2.6478258536308025e-11), r);
  __m512d y = _mm512_fmadd_pd(all(1.0 / 5040), r, all(1.0 / 720));
  for (double c : {1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0}) y = _mm512_fmadd_pd(y, r, all(c));
  __m512i bits = _mm512_castpd_si512(shifted);
  __m512i power = _mm512_permutex2var_epi64(_mm512_load_si512(SIXTEENTHS), bits, _mm512_load_si512(SIXTEENTHS + 8));
  __m512d t = _mm512_castsi512_pd(_mm512_add_epi64(power, _mm512_slli_epi64(bits, 48)));
  __mmask8 in = _mm512_cmp_pd_mask(x, all(-708.0), _CMP_GT_OQ);
  return _mm512_maskz_fmadd_pd(in, t, _mm512_mul_pd(y, r), t);
}
inline double exp_negative(double x) { return _mm512_cvtsd_f64(exp_negative(_mm512_set1_pd(x))); }
#else
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
#endif
