// The online softmax of few rows and beside products of tiles, in vectors of 16 scores and without sums across lanes.
//
// Weights are 2^(score - base). A row's base is a whole number near its largest score so far (in units of log2): it is
// raised only when a score is LAZY above it, for neither float32 nor bfloat16 minds weights of 2^LAZY; sums overflow so much
// sooner. What was summed is then multiplied by a power of two, which is exact.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

// A build for AVX-512 alone calls this only after it asked the CPU for the rest; its callers are compiled without, and the
// compiler refuses to inline into those.
#if defined(__AVX512BF16__)
#define LAZY_INLINE [[gnu::always_inline]] inline
#else
#define LAZY_INLINE inline
#endif

template <int ROWS_AT_MOST, int LAZY>
class LazySoftmax {
 public:
  static constexpr float MOST = LAZY + 1;

  void clear(int rows) {
    std::fill_n(base_, rows, 0.0f), std::fill_n(limit_, rows, -INF);
    std::memset(sums_, 0, rows * sizeof(sums_[0]));
  }

  // Of a row, in units of exp: what its weights are relative to, and their sum.
  float maximum(int row) const { return limit_[row] == -INF ? -INF : base_[row] * 0.693147181f; }
  float weight(int row) const { return _mm512_reduce_add_ps(_mm512_load_ps(sums_[row])); }

  // For ROWS rows from `row` on, `s_step` and `p_step` apart, and VECTORS vectors of scores each: raises bases where scores
  // times `factor` ask for it, and calls raise(row, by) then, with the factor for what was summed. Then
  // p = 2^(s factor - base) v_factor, as float32 or rounded to bf16. The power's relative error is below 9e-5, against 2e-3 of the rounding.
  // Two rows at once hide each other's latencies.
  template <int ROWS, int VECTORS, class W, class Raise>
  LAZY_INLINE void weigh(int row, const float* s, int64_t s_step, W* p, int64_t p_step, float factor, const float* v_factor,
                         Raise&& raise) {
    constexpr int N = ROWS * VECTORS;
    __m512 x[N], top[ROWS];
    const __m512 f = _mm512_set1_ps(factor);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = _mm512_loadu_ps(s + i / VECTORS * s_step + 16 * (i % VECTORS));
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
      top[r] = _mm512_max_ps(x[r * VECTORS], x[r * VECTORS + 1]);
      if (VECTORS == 4) top[r] = _mm512_max_ps(top[r], _mm512_max_ps(x[r * VECTORS + VECTORS - 2], x[r * VECTORS + VECTORS - 1]));
      if (_mm512_cmp_ps_mask(top[r], _mm512_set1_ps(limit_[row + r]), _CMP_GT_OQ)) [[unlikely]]
        raise(row + r, lift(row + r, _mm512_reduce_max_ps(top[r]), factor));
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      x[i] = _mm512_fmsub_ps(x[i], f, _mm512_set1_ps(base_[row + i / VECTORS]));
      x[i] = _mm512_min_ps(_mm512_set1_ps(MOST), x[i]);  // in this order a NaN stays one
      __m512 r = _mm512_reduce_ps(x[i], 1);  // x - floor(x)
      __m512 y = _mm512_fmadd_ps(r, _mm512_set1_ps(0.07706707f), _mm512_set1_ps(0.22764496f));
      y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.69511679f));
      y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
      x[i] = _mm512_scalef_ps(y, x[i]);  // times 2^floor(x)
    }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
      __m512 sum = _mm512_add_ps(x[r * VECTORS], x[r * VECTORS + 1]);
      if (VECTORS == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(x[r * VECTORS + VECTORS - 2], x[r * VECTORS + VECTORS - 1]));
      _mm512_store_ps(sums_[row + r], _mm512_add_ps(_mm512_load_ps(sums_[row + r]), sum));
    }
    if (v_factor)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) x[i] = _mm512_mul_ps(x[i], _mm512_loadu_ps(v_factor + 16 * (i % VECTORS)));
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 2) put(x[i], x[i + 1], p + i / VECTORS * p_step + 16 * (i % VECTORS));
  }

  // n numbers, a multiple of 16, times a power of two.
  static void multiply(float* x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(by)));
  }
  static void multiply(uint16_t* x, int64_t n, float by) {
    for (int64_t i = 0; i < n; i += 16) {
      __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))), 16);
      __m512 y = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(by));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + i), (__m256i)_mm512_cvtneps_pbh(y));
    }
  }

 private:
  static void put(__m512 low, __m512 high, uint16_t* to) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }
  static void put(__m512 low, __m512 high, float* to) { _mm512_storeu_ps(to, low), _mm512_storeu_ps(to + 16, high); }

  float lift(int row, float score, float factor) {
    float base = std::ceil(score * factor), limit = (base + LAZY) / factor;
    // Neighbours of a huge float are far apart. There the largest score's power is cut off at MOST, as are those that
    // float32 cannot tell from it, and every larger score raises the base.
    // An infinite score has no weight: as in the formula, it makes the row NaN.
    if (!(std::fabs(base) < 0x1p22f)) base = score == INF ? INF : std::nextafter(score * factor, -INF), limit = score;
    float by = limit_[row] == -INF ? 1.0f : std::exp2(base_[row] - base);
    base_[row] = base, limit_[row] = limit;
    multiply(sums_[row], 16, by);
    return by;
  }

  float base_[ROWS_AT_MOST], limit_[ROWS_AT_MOST];  // limit: the score, without factor, from which on the base is raised
  alignas(64) float sums_[ROWS_AT_MOST][16];
};

#undef LAZY_INLINE
#pragma GCC pop_options

}  // namespace
