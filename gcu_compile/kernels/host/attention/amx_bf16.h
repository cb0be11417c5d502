// The arithmetic of AMX: products of tiles, for bfloat16 queries on a bfloat16 or int8 cache. Panels are those of bf16.h,
// whose strips are tiles as they lie: 16 steps (pairs) of 16 columns. f32.h says what an arithmetic does.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "../amx.h"
#include "bf16.h"
#include "matmul.h"

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

// GCC 12's tile loads do not say that they read memory: nothing may be moved across them.
[[gnu::always_inline]] inline void fence() { asm volatile("" : : : "memory"); }

struct AmxBF16 : BF16 {
  static constexpr bool BY_TILES = true;
  static constexpr int FEW = 16;
  static constexpr int TILE_ROWS = 256, LEAST_ROWS = 64;  // many rows: packing a tile of keys costs as much as 20 of them
  static constexpr int BLOCK = 32;                        // rows whose scores stay in L1 until they are weights
  static constexpr int STEPS = 16;                        // panels are filled up to whole tiles
  using Thread = amx::Tiles;

  static void pack_k(const Row* keys, int n, int dtype, int64_t dim, uint16_t* panel) {
    dtype == I8T ? BF16::pack_k<true, STEPS>(keys, n, dim, panel) : BF16::pack_k<false, STEPS>(keys, n, dim, panel);
  }
  static void pack_v(const Row* values, int n, int dtype, int64_t dim, uint16_t* panel, const Ahead& ahead = {}) {
    auto pack = dtype == I8T ? BF16::pack_v<true, STEPS> : BF16::pack_v<false, STEPS>;
    pack(values, n, dim, panel, ahead);
  }

  // 32 rows by 32 columns, or 16 rows by 64: what of them is in `rows` and `columns`, rounded up to whole tiles.
  // Rows of A and C beyond are read and written, and mean nothing.
  static void strip(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, int64_t width, int64_t columns, float* c,
                    int64_t ldc, int m, const float* alpha) {
    if (alpha) scale(c, ldc, m, columns, alpha);
    fence();
    int row = 0;
    for (; m - row > 16; row += 32) {
      int64_t j = 0;
      for (; j + 16 < columns; j += 32) two_by_two<true>(a + row * lda, lda, b + 2 * j, steps, width, c + row * ldc + j, ldc, alpha);
      if (j < columns) two_by_two<false>(a + row * lda, lda, b + 2 * j, steps, width, c + row * ldc + j, ldc, alpha);
    }
    if (row < m) one_by_four(a + row * lda, lda, b, steps, width, columns, c + row * ldc, ldc, alpha);
    fence();
  }

  static void scale(float* c, int64_t ldc, int m, int64_t columns, const float* alpha) {
    for (int row = 0; row < m; ++row) {
      if (alpha[row] == 1.0f) continue;
      __m512 factor = _mm512_set1_ps(alpha[row]);
      for (int64_t j = 0; j < columns; j += 16)
        _mm512_storeu_ps(c + row * ldc + j, _mm512_mul_ps(_mm512_loadu_ps(c + row * ldc + j), factor));
    }
  }

  template <bool TWO>
  static void two_by_two(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, int64_t width, float* c, int64_t ldc, bool add) {
    if (add) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      if (TWO) _tile_loadd(1, c + 16, ldc * 4);
      if (TWO) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(2);
      if (TWO) _tile_zero(1);
      if (TWO) _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += 16, b += 32 * width) {
      _tile_loadd(6, b, width * 4);
      _tile_loadd(4, a + 2 * s, lda * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + 2 * s + 16 * lda, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (!TWO) continue;
      _tile_loadd(7, b + 32, width * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    if (TWO) _tile_stored(1, c + 16, ldc * 4);
    if (TWO) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }

  static void one_by_four(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, int64_t width, int64_t columns, float* c, int64_t ldc, bool add) {
    const bool in1 = columns > 16, in2 = columns > 32, in3 = columns > 48;
    if (add) {
      _tile_loadd(0, c, ldc * 4);
      if (in1) _tile_loadd(1, c + 16, ldc * 4);
      if (in2) _tile_loadd(2, c + 32, ldc * 4);
      if (in3) _tile_loadd(3, c + 48, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += 16, b += 32 * width) {
      _tile_loadd(4, a + 2 * s, lda * 2);
      _tile_loadd(5, b, width * 4);
      _tile_dpbf16ps(0, 4, 5);
      if (!in1) continue;
      _tile_loadd(6, b + 32, width * 4);
      _tile_dpbf16ps(1, 4, 6);
      if (!in2) continue;
      _tile_loadd(7, b + 64, width * 4);
      _tile_dpbf16ps(2, 4, 7);
      if (!in3) continue;
      _tile_loadd(5, b + 96, width * 4);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, ldc * 4);
    if (in1) _tile_stored(1, c + 16, ldc * 4);
    if (in2) _tile_stored(2, c + 32, ldc * 4);
    if (in3) _tile_stored(3, c + 48, ldc * 4);
  }

  // Scores of few rows. turned: Q^T as a panel of 16 columns; d: dim, rounded up to 32; copy: room for 64 keys.
  static void scores(const uint16_t* turned, int rows, const Source& from, int64_t d, uint16_t* copy, float* s, Ahead ahead);

  // Largest of n scores, a multiple of 16.
  static float largest_of(const float* s, int64_t n) {
    __m512 top[4];
    for (int i = 0; i < 4; ++i) top[i] = _mm512_set1_ps(-INF);
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
      for (int j = 0; j < 4; ++j) top[j] = _mm512_max_ps(top[j], _mm512_loadu_ps(s + i + 16 * j));
    for (; i < n; i += 16) top[0] = _mm512_max_ps(top[0], _mm512_loadu_ps(s + i));
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
  }

  // p = bf16(2^(s factor - base) v_factor) of n numbers, a multiple of 32; their sum without v_factor. The power: relative
  // error below 4e-6, against 2e-3 of the rounding that follows.
  template <bool FACTORS>
  static float powers(const float* s, uint16_t* p, int64_t n, float factor, float base, const float* v_factor) {
    const __m512 f = _mm512_set1_ps(factor), b = _mm512_set1_ps(base);
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 32) {
      __m512 y[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s + i + 16 * j), f, b);
        __m512 r = _mm512_reduce_ps(x, 1);  // x - floor(x)
        y[j] = _mm512_fmadd_ps(r, _mm512_set1_ps(0.01342669f), _mm512_set1_ps(0.05224247f));
        y[j] = _mm512_fmadd_ps(y[j], r, _mm512_set1_ps(0.24128021f));
        y[j] = _mm512_fmadd_ps(y[j], r, _mm512_set1_ps(0.69304484f));
        y[j] = _mm512_fmadd_ps(y[j], r, _mm512_set1_ps(1.0f));
        y[j] = _mm512_scalef_ps(y[j], x);  // times 2^floor(x)
        sum[j] = _mm512_add_ps(sum[j], y[j]);
        if (FACTORS) y[j] = _mm512_mul_ps(y[j], _mm512_loadu_ps(v_factor + i + 16 * j));
      }
      _mm512_storeu_si512(p + i, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  }
};

#pragma GCC pop_options

}  // namespace

#include "amx_few.h"

#endif
