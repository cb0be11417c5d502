// Few rows (decode): K and V are used as they lie, since packing would cost more than the products.
//
//   scores: 16 at a time, R rows of 16 / R keys, each a vector of partial sums; a transpose's exchanges add them up
//   weigh: 16 vectors of output rows; two keys side by side are one step of the dot products of pairs
//
// Rows that come are prefetched one after the other between those that are read (`Coming`).
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
    Row at[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) at[k] = keys[std::min(key + k, n - 1)];
    __m512 sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
    if constexpr (CHUNKS > 0) {
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {  // key by key, in the order of memory
        coming.advance<(BYTES ? 8 : 4) / CHUNKS>(Coming::ROW - Coming::LEFT);
#pragma GCC unroll 8
        for (int c = 0; c < CHUNKS; ++c) {
          const __m512bh x = (__m512bh)numbers_of<BYTES, true>(at[k], 32 * c, ~0u);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r * K + k] = _mm512_dpbf16_ps(sum[r * K + k], held[r][c], x);
        }
      }
    } else {
      coming.advance<std::min(K, 4)>(K * (Coming::ROW - Coming::LEFT));
      for (int64_t d = 0; d < whole; d += 32) add_products<R, BYTES, true>(sum, q, ldq, at, d, ~0u);
      if (whole < dim) add_products<R, BYTES, false>(sum, q, ldq, at, whole, BF16::first(dim - whole));
    }
    store_scores<K>(sum, rows, s + key);
  }
}

constexpr int PIECE = 32;  // keys whose values are passed over for all rows and columns before those that follow

// R rows of V vectors of sums, which begin at `o`; of the row `left` columns are there. add: to what they are.
template <int R, int V, bool WHOLE>
[[gnu::always_inline]] inline void load_sums(__m512 (&sum)[R * V], const float* o, int rows, int64_t left, int64_t ldo, bool add) {
#pragma GCC unroll 16
  for (int i = 0; i < R * V; ++i) {
    const int r = i / V, v = i % V;
    sum[i] = add && r < rows && (WHOLE || 16 * v < left) ? _mm512_loadu_ps(o + r * ldo + 16 * v) : _mm512_setzero_ps();
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

// Columns d to d + 32 C of R output rows. pair: what two keys let `coming` advance; WHOLE: all columns are there.
template <int R, int C, bool BYTES, bool WHOLE>
void add_weighed(const uint16_t* p, int rows, const Row* values, int n, int64_t dim, int64_t d, float* o, int64_t ldo, bool add, Coming& coming, int64_t pair) {
  const __m512i first = _mm512_load_si512(BF16::FIRST_WORDS), second = _mm512_load_si512(BF16::SECOND_WORDS);
  const bool in_order = !WHOLE && dim - d <= 16;  // see `settle`
  __m512 sum[R * 2 * C];
  load_sums<R, 2 * C, WHOLE>(sum, o + d, rows, ldo - d, ldo, add);
  for (int key = 0; key < n; key += 2) {
    coming.advance<BYTES ? 4 : 2>(pair);
    const bool alone = key + 1 == n;
    const Row even = values[key], odd = values[key + !alone];
    __m512bh columns[2 * C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      __mmask32 in = WHOLE ? ~0u : BF16::first(dim - d - 32 * c);
      const __m512i a = numbers_of<BYTES, WHOLE>(even, d + 32 * c, in);
      const __m512i b = alone ? _mm512_setzero_si512() : numbers_of<BYTES, WHOLE>(odd, d + 32 * c, in);
      columns[2 * c] = (__m512bh)(in_order ? _mm512_permutex2var_epi16(a, first, b) : _mm512_unpacklo_epi16(a, b));
      columns[2 * c + 1] = (__m512bh)(in_order ? _mm512_permutex2var_epi16(a, second, b) : _mm512_unpackhi_epi16(a, b));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t weights;
      std::memcpy(&weights, p + r * TILE_KEYS + key, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(weights);
#pragma GCC unroll 8
      for (int c = 0; c < 2 * C; ++c) sum[r * 2 * C + c] = _mm512_dpbf16_ps(sum[r * 2 * C + c], x, columns[c]);
    }
  }
  store_sums<R, 2 * C, WHOLE>(sum, o + d, rows, ldo - d, ldo);
}

// R rows, C columns of 32 at once, and a few keys after the other: what is passed over again, for other columns, is in the
// first cache by then.
template <int R, int C, bool BYTES>
void weigh(const uint16_t* p, int rows, const Row* values, int n, int64_t dim, float* o, int64_t ldo, bool add, Coming& coming) {
  const int64_t whole = dim / (32 * C), passes = whole + (dim - 32 * C * whole + 31) / 32;
  const int64_t pair = divided(2 * (Coming::ROW - Coming::LEFT), passes);
  for (int key = 0; key < n; key += PIECE) {
    auto columns = [&](auto add_columns, int64_t d) {
      add_columns(p + key, rows, values + key, std::min(PIECE, n - key), dim, d, o, ldo, add || key, coming, pair);
    };
    int64_t d = 0;
    for (; d + 32 * C <= dim; d += 32 * C) columns(add_weighed<R, C, BYTES, true>, d);
    for (; d < dim; d += 32) columns(add_weighed<R, 1, BYTES, false>, d);
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

void BF16::weigh(const uint16_t* p, int rows, const Row* values, int n, int dtype, int64_t dim, float* o, int64_t ldo, bool add, Coming& coming) {
  auto run = [&]<bool BYTES>() {
    for_rows(rows, [&]<int R>() {
      constexpr int MOST = std::min(8 / R, 4);  // whose sums stay in registers
      auto of = dim >= 128 ? ::weigh<R, MOST, BYTES> : dim >= 64 ? ::weigh<R, std::min(MOST, 2), BYTES> : ::weigh<R, 1, BYTES>;
      of(p, rows, values, n, dim, o, ldo, add, coming);
    });
  };
  dtype == I8T ? run.template operator()<true>() : run.template operator()<false>();
}

#pragma GCC pop_options

}  // namespace

#include "byte_tables.h"
