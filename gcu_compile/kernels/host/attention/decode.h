// Few rows (decode): K and V are used as they lie, since packing would cost more than the products.
//
//   scores: 16 at a time, R rows of 16 / R keys, each a vector of partial sums; a transpose's exchanges add them up
//   weigh: 16 vectors of output rows; two keys side by side are one step of the dot products of pairs
//
// Rows that come are prefetched as many at a time as were read (`Coming`).
//
// Both are memory bound on a cache that is larger than the CPU's, provided that the 16 vectors stay in registers: hence
// `always_inline` wherever an array of vectors is handed over, and tails as separate code.
#pragma once

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl")

// Lane i of the result: the sum of x[i].
[[gnu::always_inline]] inline __m512 sums(__m512 (&x)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) x[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[i], x[i + 1]), _mm512_unpackhi_ps(x[i], x[i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    __m512d a = _mm512_castps_pd(x[i]), b = _mm512_castps_pd(x[i + 2]);
    x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8) x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xEE));
  return _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[8], 0x88), _mm512_shuffle_f32x4(x[0], x[8], 0xDD));
}

// Scores of K keys from 16 vectors of partial sums, row by row, rows TILE_KEYS apart.
template <int K>
[[gnu::always_inline]] inline void store_scores(__m512 (&sum)[16], int rows, float* s) {
  alignas(64) float values[16];
  _mm512_store_ps(values, sums(sum));
  for (int r = 0; r < rows; ++r) std::memcpy(s + r * TILE_KEYS, values + r * K, 4 * K);
}

// of.operator()<R>(), R the power of two that so many rows fit into.
template <class F>
void for_rows(int rows, F of) {
  if (rows == 1) of.template operator()<1>();
  else if (rows == 2) of.template operator()<2>();
  else if (rows <= 4) of.template operator()<4>();
  else of.template operator()<8>();
}

// 32 numbers of a row; WHOLE: all of them are in it.
template <bool BYTES, bool WHOLE>
[[gnu::always_inline]] inline __m512i numbers_of(const Row& row, int64_t from, __mmask32 in) {
  if constexpr (!BYTES) return WHOLE ? _mm512_loadu_si512(row.at + 2 * from) : _mm512_maskz_loadu_epi16(in, row.at + 2 * from);
  return BF16::pairs<BYTES>(row, from, WHOLE ? ~0u : in);
}

template <int R, bool BYTES, bool WHOLE>
[[gnu::always_inline]] inline void add_products(__m512 (&sum)[16], const uint16_t* q, int64_t ldq, const Row (&keys)[16 / R], int64_t d, __mmask32 in) {
  __m512bh row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = (__m512bh)_mm512_loadu_si512(q + r * ldq + d);
#pragma GCC unroll 16
  for (int k = 0; k < 16 / R; ++k) {
    __m512bh x = (__m512bh)numbers_of<BYTES, WHOLE>(keys[k], d, in);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r * (16 / R) + k] = _mm512_dpbf16_ps(sum[r * (16 / R) + k], row[r], x);
  }
}

// CHUNKS: of 32 numbers, those of a row, so that most of the queries stay in registers; 0: any number of them.
template <int R, int CHUNKS, bool BYTES>
void scores(const uint16_t* q, int64_t ldq, int rows, const Row* keys, int n, int64_t dim, float* s, Coming& coming) {
  constexpr int K = 16 / R;
  const int64_t whole = dim / 32 * 32;
  [[maybe_unused]] __m512bh held[R][std::max(CHUNKS, 1)];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < CHUNKS; ++c) held[r][c] = (__m512bh)_mm512_loadu_si512(q + r * ldq + 32 * c);
  for (int key = 0; key < n; key += K) {
    coming.fetch<K>();
    Row at[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) at[k] = keys[std::min(key + k, n - 1)];
    __m512 sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
    if constexpr (CHUNKS > 0) {
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k)  // key by key, in the order of memory
#pragma GCC unroll 8
        for (int c = 0; c < CHUNKS; ++c) {
          const __m512bh x = (__m512bh)numbers_of<BYTES, true>(at[k], 32 * c, ~0u);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r * K + k] = _mm512_dpbf16_ps(sum[r * K + k], held[r][c], x);
        }
    } else {
      for (int64_t d = 0; d < whole; d += 32) add_products<R, BYTES, true>(sum, q, ldq, at, d, ~0u);
      if (whole < dim) add_products<R, BYTES, false>(sum, q, ldq, at, whole, BF16::first(dim - whole));
    }
    store_scores<K>(sum, rows, s + key);
  }
}

constexpr int PIECE = 32;  // keys whose values are passed over for all rows and columns before those that follow

// What becomes of sums that are there: nothing is, they are multiplied by the rows' alpha, or stay.
enum class Old { NONE, SCALED, KEPT };

// R rows of V vectors of sums, which begin at `o`; of the row `left` columns are there.
template <int R, int V, bool WHOLE>
[[gnu::always_inline]] inline void load_sums(__m512 (&sum)[R * V], const float* o, int rows, int64_t left, int64_t ldo, Old old, const float* alpha) {
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) {
    const int r = i / V, v = i % V;
    const bool is = old != Old::NONE && r < rows && (WHOLE || 16 * v < left);
    sum[i] = is ? _mm512_loadu_ps(o + r * ldo + 16 * v) : _mm512_setzero_ps();
    if (is && old == Old::SCALED) sum[i] = _mm512_mul_ps(sum[i], _mm512_set1_ps(alpha[r]));
  }
}

template <int R, int V, bool WHOLE>
[[gnu::always_inline]] inline void store_sums(const __m512 (&sum)[R * V], float* o, int rows, int64_t left, int64_t ldo) {
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) {
    const int r = i / V, v = i % V;
    if (r < rows && (WHOLE || 16 * v < left)) _mm512_storeu_ps(o + r * ldo + 16 * v, sum[i]);
  }
}

// Columns d to d + 32 C of R output rows: the `pass`-th pass over the values of `passes`.
template <int R, int C, bool BYTES, bool WHOLE>
void add_weighed(const uint16_t* p, int rows, const Row* values, int n, int64_t dim, int64_t d, float* o, int64_t ldo, Old old, const float* alpha, Coming& coming, int64_t pass, int64_t passes) {
  const __m512i first = _mm512_load_si512(BF16::FIRST_WORDS), second = _mm512_load_si512(BF16::SECOND_WORDS);
  __m512 sum[R * 2 * C];
  load_sums<R, 2 * C, WHOLE>(sum, o + d, rows, ldo - d, ldo, old, alpha);
  int64_t turn = pass;
  for (int key = 0; key < n; key += 2) {
    if (--turn < 0) coming.fetch<2>(), turn = passes - 1;
    const bool alone = key + 1 == n;
    const Row even = values[key], odd = values[key + !alone];
    __m512bh columns[2 * C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      __mmask32 in = WHOLE ? ~0u : BF16::first(dim - d - 32 * c);
      const __m512i a = numbers_of<BYTES, WHOLE>(even, d + 32 * c, in);
      const __m512i b = alone ? _mm512_setzero_si512() : numbers_of<BYTES, WHOLE>(odd, d + 32 * c, in);
      columns[2 * c] = (__m512bh)_mm512_permutex2var_epi16(a, first, b);
      columns[2 * c + 1] = (__m512bh)_mm512_permutex2var_epi16(a, second, b);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, p + r * TILE_KEYS + key, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; ++c) sum[r * 2 * C + c] = _mm512_dpbf16_ps(sum[r * 2 * C + c], x, columns[c]);
    }
  }
  store_sums<R, 2 * C, WHOLE>(sum, o + d, rows, ldo - d, ldo);
}

// C: columns of 32 at once. As many rows at once as then fit into registers, and a few keys after the other: what is
// passed over again, for other rows or columns, is in the first cache by then.
template <int R, int C, bool BYTES>
void weigh(const uint16_t* p, int rows, const Row* values, int n, int64_t dim, float* o, int64_t ldo, const float* alpha, Coming& coming) {
  constexpr int ROWS = std::min(R, 8 / C), KEYS = BYTES ? TILE_KEYS_DECODE : PIECE;
  const int64_t whole = dim / (32 * C), passes = (rows + ROWS - 1) / ROWS * (whole + (dim - 32 * C * whole + 31) / 32);
  for (int key = 0; key < n; key += KEYS) {
    const Old old = key ? Old::KEPT : alpha ? Old::SCALED : Old::NONE;
    const int count = std::min(KEYS, n - key);
    int64_t pass = 0;
    for (int r = 0; r < rows; r += ROWS) {
      auto columns = [&](auto add, int64_t d) {
        add(p + r * TILE_KEYS + key, rows - r, values + key, count, dim, d, o + r * ldo, ldo, old, alpha ? alpha + r : alpha, coming, pass++, passes);
      };
      int64_t d = 0;
      for (; d + 32 * C <= dim; d += 32 * C) columns(add_weighed<ROWS, C, BYTES, true>, d);
      for (; d < dim; d += 32) columns(add_weighed<ROWS, 1, BYTES, false>, d);
    }
  }
}

void BF16::scores(const uint16_t* q, int64_t ldq, int rows, const Row* keys, int n, int dtype, int64_t dim, float* s, Coming& coming) {
  auto run = [&]<bool BYTES>() {
    for_rows(rows, [&]<int R>() {
      auto of = dim == 64 ? ::scores<R, 2, BYTES> : dim == 128 && R <= 4 ? ::scores<R, R <= 4 ? 4 : 0, BYTES> : ::scores<R, 0, BYTES>;
      of(q, ldq, rows, keys, n, dim, s, coming);
    });
  };
  dtype == I8T ? run.template operator()<true>() : run.template operator()<false>();
}

void BF16::weigh(const uint16_t* p, int rows, const Row* values, int n, int dtype, int64_t dim, float* o, int64_t ldo, const float* alpha, Coming& coming) {
  auto run = [&]<bool BYTES>() {
    for_rows(rows, [&]<int R>() {
      // Every pass exchanges numbers, and of bytes makes them: where that costs more than the order of memory brings, all
      // rows share one.
      constexpr int MOST = BYTES || R == 8 ? std::min(8 / R, 4) : 4;
      auto of = dim >= 128 ? ::weigh<R, MOST, BYTES> : dim >= 64 ? ::weigh<R, std::min(MOST, 2), BYTES> : ::weigh<R, 1, BYTES>;
      of(p, rows, values, n, dim, o, ldo, alpha, coming);
    });
  };
  dtype == I8T ? run.template operator()<true>() : run.template operator()<false>();
}

#pragma GCC pop_options

}  // namespace

#include "byte_tables.h"
