// Few rows (decode) of an int8 cache without zero points: decode.h's products, for which bytes become bfloat16 by tables,
// 64 at a time: 8 instructions, where the way through float32 takes 14 and the products of four rows are 8. Part of
// decode.h, whose sums it uses.
//
// A bfloat16's two bytes are looked up apart and then interleaved, which leaves numbers in an order of its own:
//   queries are brought into it beforehand (`order`); sums of columns are brought back in the end (`settle`)
#pragma once

#if defined(__AVX512F__) && defined(__AVX512VBMI2__)  // no CPU has it without VBMI

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "keys.h"

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512vbmi")

// One byte each of the bfloat16 numbers 0 to 127.
struct ByteTable { alignas(64) uint8_t at[128]; };
constexpr ByteTable byte_table(int shift) {
  ByteTable table{};
  for (int i = 0; i < 128; ++i) table.at[i] = uint8_t(std::bit_cast<uint32_t>(float(i)) >> shift);
  return table;
}
constexpr ByteTable LOW_BYTES = byte_table(16), HIGH_BYTES = byte_table(24);

class ByteTables {
  static constexpr int CHUNK = 64, ROWS = 4;  // whose sums stay in registers

 public:
  // More rows take two passes over the values: no faster than by way of float32.
  static bool takes(const Arguments& in, int rows) {
    return rows <= ROWS && in.cache_dtype == I8T && !in.k_zero && !in.v_zero && in.head_dim % CHUNK == 0 && in.v_dim % CHUNK == 0;
  }

  // Queries in the order in which 64 numbers of a key come.
  static void order(const uint16_t* q, int rows, int64_t d, uint16_t* to) {
    for (int64_t i = 0; i < rows * d; i += CHUNK) {
      const __m512i a = _mm512_loadu_si512(q + i), b = _mm512_loadu_si512(q + i + 32);
      _mm512_storeu_si512(to + i, _mm512_shuffle_i64x2(a, b, 0x88));
      _mm512_storeu_si512(to + i + 32, _mm512_shuffle_i64x2(a, b, 0xDD));
    }
  }

  // q: as `order` has left them; scores are TILE_KEYS apart.
  static void scores(const uint16_t* q, int rows, const Row* keys, int n, int64_t d, float* s, Coming& coming) {
    for_rows(rows, [&]<int R>() {
      if constexpr (R <= ROWS) scores<R>(q, rows, keys, n, d, s, coming);
    });
  }

  // o = p V, or with `add` o += p V, columns in an order that `settle` undoes.
  static void weigh(const uint16_t* p, int rows, const Row* values, int n, int64_t dim, float* o, int64_t ldo, bool add, Coming& coming) {
    const int64_t passes = dim / CHUNK, pair = divided(2 * (Coming::ROW - Coming::LEFT), passes);
    for (int from = 0; from < n; from += PIECE) {
      for_rows(rows, [&]<int R>() {
        if constexpr (R <= ROWS)
          for (int64_t pass = 0; pass < passes; ++pass)
            add_weighed<R>(p + from, rows, values + from, std::min(PIECE, n - from), pass * CHUNK, o + pass * CHUNK, ldo, add || from, coming, pair);
      });
    }
  }

  // Sums of a row of n columns in their order: quarter i of four vectors is the columns 16 i to 16 i + 15.
  static void settle(float* o, int64_t n) {
    for (; n > 0; n -= CHUNK, o += CHUNK) {
      const __m512 a = _mm512_loadu_ps(o), b = _mm512_loadu_ps(o + 16), c = _mm512_loadu_ps(o + 32), d = _mm512_loadu_ps(o + 48);
      const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
      const __m512 ab2 = _mm512_shuffle_f32x4(a, b, 0xEE), cd2 = _mm512_shuffle_f32x4(c, d, 0xEE);
      _mm512_storeu_ps(o, _mm512_shuffle_f32x4(ab, cd, 0x88));
      _mm512_storeu_ps(o + 16, _mm512_shuffle_f32x4(ab, cd, 0xDD));
      _mm512_storeu_ps(o + 32, _mm512_shuffle_f32x4(ab2, cd2, 0x88));
      _mm512_storeu_ps(o + 48, _mm512_shuffle_f32x4(ab2, cd2, 0xDD));
    }
  }

 private:
  // 64 numbers, in two vectors.
  [[gnu::always_inline]] static void read(const char* at, __m512i& first, __m512i& second) {
    const __m512i x = _mm512_loadu_si512(at), size = _mm512_abs_epi8(x), sign = _mm512_set1_epi8(-128);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(LOW_BYTES.at), size, _mm512_load_si512(LOW_BYTES.at + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(HIGH_BYTES.at), size, _mm512_load_si512(HIGH_BYTES.at + 64));
    high = _mm512_ternarylogic_epi32(high, x, sign, 0xF8);  // a | b & c
    high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(x, sign), _mm512_set1_epi8(char(0xC3)));  // -128 has no place in a table
    first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
  }

  template <int R>
  static void scores(const uint16_t* q, int rows, const Row* keys, int n, int64_t d, float* s, Coming& coming) {
    constexpr int K = 16 / R;
    for (int key = 0; key < n; key += K) {
      coming.advance<std::min(K, 4)>(K * (Coming::ROW - Coming::LEFT));
      __m512 sum[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
      for (int64_t c = 0; c < d; c += CHUNK)
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          __m512i first, second;
          read(keys[std::min(key + k, n - 1)].at + c, first, second);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            sum[r * K + k] = _mm512_dpbf16_ps(sum[r * K + k], (__m512bh)first, (__m512bh)_mm512_loadu_si512(q + r * d + c));
            sum[r * K + k] = _mm512_dpbf16_ps(sum[r * K + k], (__m512bh)second, (__m512bh)_mm512_loadu_si512(q + r * d + c + 32));
          }
        }
      store_scores<K>(sum, rows, s + key);
    }
  }

  // 64 columns of R rows. pair: what two keys let `coming` advance.
  template <int R>
  static void add_weighed(const uint16_t* p, int rows, const Row* values, int n, int64_t d, float* o, int64_t ldo, bool add,
                          Coming& coming, int64_t pair) {
    __m512 sum[R * 4];
    load_sums<R, 4, true>(sum, o, rows, CHUNK, ldo, add);
    for (int key = 0; key < n; key += 2) {
      coming.advance<4>(pair);
      __m512i a, b, c, e;
      read(values[key].at + d, a, b);
      read(values[std::min(key + 1, n - 1)].at + d, c, e);  // its weight is 0 past the end
      const __m512bh columns[] = {(__m512bh)_mm512_unpacklo_epi16(a, c), (__m512bh)_mm512_unpackhi_epi16(a, c),
                                  (__m512bh)_mm512_unpacklo_epi16(b, e), (__m512bh)_mm512_unpackhi_epi16(b, e)};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t weights;
        std::memcpy(&weights, p + r * TILE_KEYS + key, 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[4 * r + i] = _mm512_dpbf16_ps(sum[4 * r + i], (__m512bh)_mm512_set1_epi32(weights), columns[i]);
      }
    }
    store_sums<R, 4, true>(sum, o, rows, CHUNK, ldo);
  }
};

#pragma GCC pop_options

}  // namespace

#endif
