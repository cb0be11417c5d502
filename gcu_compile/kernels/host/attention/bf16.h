// The arithmetic of AVX512-BF16: dot products of pairs with float32 sums. f32.h says what an arithmetic does; this one
// also has `scores` and `weigh`, which few rows (up to FEW) use in place of panels.
#pragma once

#ifdef __AVX512F__

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#include "keys.h"
#include "lazy_softmax.h"
#include "matmul.h"
#include "rows.h"

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl")
// Word i of a result: the high half of float32 i; words of a and b side by side, first and second 16.
struct Words { alignas(64) uint16_t at[32]; };
constexpr Words words(int kind) {
  Words w{};
  for (int i = 0; i < 32; ++i) w.at[i] = uint16_t(kind == 0 ? 2 * i + 1 : (kind - 1) * 16 + i / 2 + i % 2 * 32);
  return w;
}
constexpr Words WORDS[3] = {words(0), words(1), words(2)};

class ByteTables;

struct BF16 {
  using A = uint16_t;
  static constexpr bool BY_TILES = false;
  static constexpr int DEPTH = 2, FEW = 8, STEPS = 1, STRIP = ::STRIP;
  static constexpr int ROWS_OF_FEW = 16;  // their queries: as they are, and in the order of `ByteTables`
  static constexpr int TILE_ROWS = ::TILE_ROWS, LEAST_ROWS = ::TILE_ROWS, BLOCK = ::TILE_ROWS;
  struct Thread {};
  using Softmax = LazySoftmax<FEW, 1>;  // of few rows
  struct Digits {};
#if defined(__AVX512VBMI2__)
  static constexpr bool TABLES = true;
  using Tables = ByteTables;
#else
  static constexpr bool TABLES = false;
#endif
  static constexpr const uint16_t *ODD_WORDS = WORDS[0].at, *FIRST_WORDS = WORDS[1].at, *SECOND_WORDS = WORDS[2].at;

  static void convert(const float* from, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
  }
  static void copy(const Row& row, int, int64_t n, uint16_t* to) { std::memcpy(to, row.at, 2 * n); }
  static void strip(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, int64_t width, int64_t, float* c, int64_t ldc,
                    int m, const float* alpha) {
    strip_by_rows<BF16>(a, lda, b, steps, width, c, ldc, m, alpha);
  }

  template <int M, int V>
  static void multiply(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, float* c, int64_t ldc, const float* alpha) {
    __m512 sum[M][V];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j)
        sum[i][j] = alpha ? _mm512_mul_ps(_mm512_loadu_ps(c + i * ldc + j * 16), _mm512_set1_ps(alpha[i])) : _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s, b += V * 32) {
      __m512bh columns[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(b + j * 32);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * lda + 2 * s, 4);
        __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, columns[j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
  }

  static __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

  // 32 numbers of a row from element `from` on, zeros where `in` is not set. Integers become float32 and lose the low
  // half of it, which is zero.
  template <bool BYTES>
  static __m512i pairs(const Row& row, int64_t from, __mmask32 in) {
    if (!BYTES) return _mm512_maskz_loadu_epi16(in, row.at + 2 * from);
    __m256i bytes = _mm256_maskz_loadu_epi8(in, row.at + from);
    __m512i zero = _mm512_set1_epi32(row.zero);
    __m512i low = _mm512_sub_epi32(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)), zero);
    __m512i high = _mm512_sub_epi32(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)), zero);
    __m512i both = _mm512_permutex2var_epi16((__m512i)_mm512_cvtepi32_ps(low), _mm512_load_si512(ODD_WORDS),
                                             (__m512i)_mm512_cvtepi32_ps(high));
    return in == ~0u ? both : _mm512_maskz_mov_epi16(in, both);
  }

  static void pack_k(const Row* keys, int n, int dtype, int64_t dim, uint16_t* panel) {
    dtype == I8T ? pack_k<true, 1, STRIP>(keys, n, dim, panel) : pack_k<false, 1, STRIP>(keys, n, dim, panel);
  }
  static void pack_v(const Row* values, int n, int dtype, int64_t dim, uint16_t* panel) {
    dtype == I8T ? pack_v<true>(values, n, dim, panel) : pack_v<false>(values, n, dim, panel);
  }

  // The panel has a multiple of STEPS steps, zeros at the end.
  template <bool BYTES, int STEPS, int STRIP>
  static void pack_k(const Row* keys, int n, int64_t dim, uint16_t* panel) {
    int64_t steps = rounded((dim + 1) / 2, STEPS);
    for (int strip = 0; strip < n; strip += STRIP) {
      int width = std::min(STRIP, (n - strip + LANES - 1) / LANES * LANES);
      for (int lane = 0; lane < width; lane += LANES)
        for (int64_t s = 0; s < steps; s += LANES) {
          Int rows[LANES];
          __mmask32 in = first(dim - 2 * s);
          for (int i = 0; i < LANES; ++i) {
            int key = strip + lane + i;
            rows[i] = key < n ? std::bit_cast<Int>(pairs<BYTES>(keys[key], 2 * s, in)) : Int{};
          }
          transpose(rows);
          int64_t count = std::min<int64_t>(LANES, steps - s);
          for (int64_t i = 0; i < count; ++i)
            _mm512_storeu_si512(panel + 2 * ((s + i) * width + lane), std::bit_cast<__m512i>(rows[i]));
        }
      panel += 2 * width * steps;
    }
  }

  // Keys 2s and 2s + 1 side by side.
  template <bool BYTES>
  static void pack_v(const Row* values, int n, int64_t dim, uint16_t* panel) {
    int steps = (n + 1) / 2;
    for (int64_t strip = 0; strip < dim; strip += STRIP) {
      int64_t width = std::min<int64_t>(STRIP, (dim - strip + LANES - 1) / LANES * LANES);
      for (int64_t d = 0; d < width; d += 32) {
        __mmask32 in = first(dim - strip - d);
        for (int s = 0; s < steps; ++s) {
          __m512i a = pairs<BYTES>(values[2 * s], strip + d, in);
          __m512i b = 2 * s + 1 < n ? pairs<BYTES>(values[2 * s + 1], strip + d, in) : _mm512_setzero_si512();
          uint16_t* to = panel + 2 * (s * width + d);
          _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, _mm512_load_si512(FIRST_WORDS), b));
          if (d + 16 < width) _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, _mm512_load_si512(SECOND_WORDS), b));
        }
      }
      panel += 2 * width * steps;
    }
  }

  // Sums of a row of n columns, by groups of 32 in the order of `_mm512_unpacklo_epi16` and `_mm512_unpackhi_epi16`, in the order
  // of the columns; fewer than 32 at the end are in it already.
  static void settle(float* o, int64_t n) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (; n >= 32; n -= 32, o += 32) {
      __m512 a = _mm512_loadu_ps(o), b = _mm512_loadu_ps(o + 16);
      _mm512_storeu_ps(o, _mm512_permutex2var_ps(a, low, b));
      _mm512_storeu_ps(o + 16, _mm512_permutex2var_ps(a, high, b));
    }
  }

  static void scores(const uint16_t* q, int64_t ldq, int rows, const Row* keys, int n, int dtype, int64_t dim, float* s, Coming& coming);
  static void weigh(const uint16_t* p, int rows, const Row* values, int n, int dtype, int64_t dim, float* o, int64_t ldo, bool add, Coming& coming);
};
#pragma GCC pop_options

}  // namespace

#ifndef __AMX_TILE__  // which has its own way for few rows
#include "decode.h"
#endif

#endif
