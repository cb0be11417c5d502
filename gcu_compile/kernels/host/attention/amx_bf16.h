// The arithmetic of AMX: products of tiles, for bfloat16 queries on a bfloat16 or int8 cache. Panels are those of bf16.h,
// whose strips are tiles as they lie: 16 steps (pairs) of 16 columns. f32.h says what an arithmetic does.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "../amx.h"
#include "amx_digits.h"
#include "bf16.h"
#include "keys.h"
#include "lazy_softmax.h"
#include "matmul.h"

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

struct AmxBF16 : BF16 {
  static constexpr bool BY_TILES = true;
  static constexpr int FEW = 16, ROWS_OF_FEW = 48;  // their queries: as they are, and as a panel of digits
  static constexpr int TILE_ROWS = 512, LEAST_ROWS = 64;  // many, for packing a tile of keys costs as much as 20 of them
  static constexpr int BLOCK = 32;                        // rows whose scores stay in L1 until they are weights
  static constexpr int STEPS = 16, STRIP = 32;            // of panels: whole tiles, two side by side
  using Thread = amx::Tiles;
  using Softmax = LazySoftmax<TILE_ROWS, 16>;
  using Digits = ::Digits;
  static constexpr bool TABLES = false;

  static void pack_k(const Row* keys, int n, int dtype, int64_t dim, uint16_t* panel) {
    auto pack = dtype == I8T ? BF16::pack_k<true, STEPS, STRIP> : BF16::pack_k<false, STEPS, STRIP>;
    pack(keys, n, dim, panel);
  }

  // Keys 2s and 2s + 1 side by side. Of bfloat16 the cheapest exchange leaves the 32 columns of a strip in an order of its
  // own, which `settle` undoes in the sums.
  static void pack_v(const Row* values, int n, int dtype, int64_t dim, uint16_t* panel) {
    auto pack = dtype == I8T ? pack_pairs<true> : pack_pairs<false>;
    pack(values, n, dim, panel);
  }

  // A strip's step of 32 columns of two rows, the second half `half` behind the first.
  template <bool ORDERED>
  [[gnu::always_inline]] static void put(__m512i x, __m512i y, uint16_t* to, int64_t half) {
    _mm512_storeu_si512(to, ORDERED ? _mm512_permutex2var_epi16(x, _mm512_load_si512(FIRST_WORDS), y) : _mm512_unpacklo_epi16(x, y));
    _mm512_storeu_si512(to + half, ORDERED ? _mm512_permutex2var_epi16(x, _mm512_load_si512(SECOND_WORDS), y) : _mm512_unpackhi_epi16(x, y));
  }

  // 16 numbers of two rows of integers side by side, as bf16.
  [[gnu::always_inline]] static __m512i side_by_side(__m128i low, __m128i high, __m512i low_zero, __m512i high_zero) {
    __m512i a = (__m512i)_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepi8_epi32(low), low_zero));
    __m512i b = (__m512i)_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepi8_epi32(high), high_zero));
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, _mm512_set1_epi32(int(0xffff0000)), 0xF8);  // a | b & c
  }

  template <bool BYTES>
  static void pack_pairs(const Row* values, int n, int64_t dim, uint16_t* panel) {
    const int64_t steps = rounded((n + 1) / 2, STEPS), whole = dim / 32 * 32;
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; ++s) {
      const bool in0 = 2 * s < n, in1 = 2 * s + 1 < n;
      const Row a = values[in0 ? 2 * s : 0], b = values[in1 ? 2 * s + 1 : 0];
      uint16_t* to = panel + 64 * s;
      int64_t d = 0;
      if (BYTES && in1) {
        const __m512i a_zero = _mm512_set1_epi32(a.zero), b_zero = _mm512_set1_epi32(b.zero);
        auto bytes = [](const Row& row, int64_t at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.at + at)); };
        for (; d < whole; d += 32, to += 64 * steps) {
          _mm512_storeu_si512(to, side_by_side(bytes(a, d), bytes(b, d), a_zero, b_zero));
          _mm512_storeu_si512(to + 32, side_by_side(bytes(a, d + 16), bytes(b, d + 16), a_zero, b_zero));
        }
      }
      for (; d < whole; d += 32, to += 64 * steps) {
        __m512i x = in0 ? pairs<BYTES>(a, d, ~0u) : zero, y = in1 ? pairs<BYTES>(b, d, ~0u) : zero;
        put<BYTES>(x, y, to, 32);
      }
      if (d == dim) continue;
      __m512i x = in0 ? pairs<BYTES>(a, d, first(dim - d)) : zero, y = in1 ? pairs<BYTES>(b, d, first(dim - d)) : zero;
      if (dim - d > 16) {
        put<BYTES>(x, y, to, 32);
      } else {  // a strip of 16 columns, in their own order
        _mm512_storeu_si512(panel + 2 * (steps * d + 16 * s), _mm512_permutex2var_epi16(x, _mm512_load_si512(FIRST_WORDS), y));
      }
    }
  }

  // C [m, b.column] (+)= A B for up to 32 rows; rows of A and C are read and written up to a multiple of 16, and mean
  // nothing there. between(i, n) is called n times, each behind a few products: tiles and vectors work at the same time
  // only as far as the CPU looks ahead, so that what vectors have to do meanwhile must stand between products.
  template <class Between>
  [[gnu::always_inline]] static void products(const uint16_t* a, int64_t lda, const Panel<uint16_t>& b, float* c, int64_t ldc,
                                              int m, bool add, Between&& between) {
    const int64_t steps = b.step.end - b.step.begin;
    const int calls = int(steps / 16 * ((b.column.end - b.column.begin + 31) / 32));
    int call = 0;
    auto next = [&]() __attribute__((always_inline)) { between(call++, calls); };
    a += 2 * b.step.begin;
    amx::fence();
    for (int64_t j = b.column.begin; j < b.column.end; j += 32, c += 32) {
      const int64_t width = std::min<int64_t>(32, b.columns - j);
      const uint16_t* at = b.at + 2 * (b.steps * j + b.step.begin * width);
      if (m > 16 && width == 32) tiles<2, 2>(a, lda, at, steps, c, ldc, add, next);
      else if (m > 16) tiles<2, 1>(a, lda, at, steps, c, ldc, add, next);
      else if (width == 32) tiles<1, 2>(a, lda, at, steps, c, ldc, add, next);
      else tiles<1, 1>(a, lda, at, steps, c, ldc, add, next);
    }
    amx::fence();
  }

  // M by N tiles of C.
  template <int M, int N, class Between>
  [[gnu::always_inline]] static void tiles(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, float* c, int64_t ldc,
                                           bool add, Between&& between) {
    float* c2 = c + 16 * ldc;
    if (add) {
      _tile_loadd(0, c, ldc * 4);
      if (N == 2) _tile_loadd(1, c + 16, ldc * 4);
      if (M == 2) _tile_loadd(2, c2, ldc * 4);
      if (M == 2 && N == 2) _tile_loadd(3, c2 + 16, ldc * 4);
    } else {
      _tile_zero(0);
      if (N == 2) _tile_zero(1);
      if (M == 2) _tile_zero(2);
      if (M == 2 && N == 2) _tile_zero(3);
    }
    for (int64_t s = 0; s < steps; s += 16, b += 512 * N) {
      _tile_loadd(6, b, 64 * N);
      amx::pause();
      _tile_loadd(4, a + 2 * s, lda * 2);
      amx::pause();
      _tile_dpbf16ps(0, 4, 6);
      amx::pause();
      if constexpr (M == 2) {
        _tile_loadd(5, a + 2 * s + 16 * lda, lda * 2);
        amx::pause();
        _tile_dpbf16ps(2, 5, 6);
        amx::pause();
      }
      if constexpr (N == 2) {
        _tile_loadd(7, b + 32, 64 * N);
        amx::pause();
        _tile_dpbf16ps(1, 4, 7);
        amx::pause();
      }
      if (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
      between();
    }
    _tile_stored(0, c, ldc * 4);
    if (N == 2) _tile_stored(1, c + 16, ldc * 4);
    if (M == 2) _tile_stored(2, c2, ldc * 4);
    if (M == 2 && N == 2) _tile_stored(3, c2 + 16, ldc * 4);
  }

  // Up to DOUBLED rows: weights times values. doubled: room for 128 keys of the weights' tiles; copy: for 16 values. The first
  // half of a row of sums is the even columns, until `settle_halves`.
  static constexpr int DOUBLED = 8;
  static void weigh(const uint16_t* p, int rows, const Source& values, uint16_t* doubled, uint16_t* copy, float* o, int64_t ldo, bool add, Coming& coming);
  static void settle_halves(float* o, int64_t n, float* copy);

  // The same for up to FEW rows, in the order of `settle`.
  static void weigh_packed(const uint16_t* p, const Row* values, int n, int64_t dim, uint16_t* packed, float* o, int64_t ldo, bool add, Coming& coming);

  // Scores of few rows. turned: Q^T as a panel of 16 columns; d: dim, rounded up to 32; copy: room for 16 keys.
  static void scores(const uint16_t* turned, int rows, const Source& from, int64_t d, uint16_t* copy, float* s, Coming& coming);
};

#pragma GCC pop_options

}  // namespace

#include "amx_few.h"

#endif
