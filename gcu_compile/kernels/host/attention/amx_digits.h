// Few rows (decode) of an int8 cache by tiles of int8, so that neither keys nor values are converted. The other operand
// is made of digits to base 256, of a number's fixed-point form n, each a signed byte: n = 256^2 a + 256 b + c.
//
//   scores^T [16 keys, 3 digits of 4 rows] = K [16 keys, dim] Q^T    Q: three digits, relative to a row's largest number
//   sums [2 digits of 4 rows, 2, size / 2] = P [.., 32 keys] V       P: two, relative to the largest of 128 weights
//
// A step of a product takes four numbers of a column. Two keys side by side are packed with half the exchanges of four: a
// step is two columns of them then, and P has each row twice, for the one and for the other column, with zeros between.
//
// Sums of digits are exact. Numbers of a query down to 2^-14 of its largest are, too, and smaller ones are off by 2^-22 of
// that; a weight is off by 2^-16 of the largest of its 128, whereas bfloat16 would be by 2^-9 of itself.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../amx.h"
#include "keys.h"

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

struct Digits {
  static constexpr int KEYS = TILE_KEYS_DECODE, CHUNK = 64;  // bytes of a row of a tile
  static constexpr int OF_Q = 3, ROWS = 4;                   // rows whose digits share a tile
  static constexpr int OF_P = KEYS * 32;                     // bytes of four rows' weights

  // Queries [rows, d] as tiles of 64 numbers: a step of four numbers, 16 columns (first digits of four rows, second ...).
  void load(const uint16_t* q, int rows, int64_t d, int8_t* panel) {
    chunks_ = (d + CHUNK - 1) / CHUNK;
    std::memset(panel, 0, (rows + ROWS - 1) / ROWS * chunks_ * 1024);
    for (int row = 0; row < rows; ++row, q += d) {
      int32_t most = 0;  // bits without the sign; a NaN's are the largest
      for (int64_t i = 0; i < d; ++i) most = std::max(most, q[i] & 0x7FFF);
      const float largest = to_float(uint16_t(most));
      const int exponent = largest > 0x1p-100f && largest < INF ? std::ilogb(largest) : -100;
      const __m512 scale = _mm512_set1_ps(std::ldexp(1.0f, 21 - exponent));
      const __m512i half = _mm512_set1_epi32(128);
      __m512 sum = _mm512_setzero_ps();
      int8_t* to = panel + row / ROWS * chunks_ * 1024 + 4 * (row % ROWS);
      for (int64_t i = 0; i < d; i += 16, to += 4 * 64) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i)));
        __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), scale));
        __m512i b = _mm512_srai_epi32(_mm512_add_epi32(n, half), 8), a = _mm512_srai_epi32(_mm512_add_epi32(b, half), 8);
        sum = _mm512_add_ps(sum, _mm512_cvtepi32_ps(n));
        alignas(16) int8_t digits[OF_Q][16];
        _mm_store_si128(reinterpret_cast<__m128i*>(digits[0]), _mm512_cvtepi32_epi8(a));
        _mm_store_si128(reinterpret_cast<__m128i*>(digits[1]), _mm512_cvtepi32_epi8(b));
        _mm_store_si128(reinterpret_cast<__m128i*>(digits[2]), _mm512_cvtepi32_epi8(n));
        for (int digit = 0; digit < OF_Q; ++digit)
          for (int step = 0; step < 4; ++step) std::memcpy(to + step * 64 + 16 * digit, digits[digit] + 4 * step, 4);
      }
      unit_[row] = largest < INF ? std::ldexp(1.0f, exponent - 21) : NAN;
      of_one_[row] = _mm512_reduce_add_ps(sum);
    }
  }

  // Scores of `from`'s keys, rows TILE_KEYS apart. zeros: zero points of the keys, or null.
  void scores(const int8_t* panel, int rows, const Source& from, const float* zeros, char* copy, float* s, Coming& coming) const {
    alignas(64) int32_t sums[2][16][16];
    for (int row = 0; row < rows; row += ROWS, panel += chunks_ * 1024) {
      auto turn = [&](int key, int now) { together(sums[now], row, zeros ? zeros + key : nullptr, s + row * TILE_KEYS + key); };
      int now = 0, key = 0;
      amx::fence();
      _tile_loadd(6, panel, 64);
      if (chunks_ > 1) _tile_loadd(7, panel + 1024, 64);
      for (; key < from.n; key += 16, now ^= 1) {  // vectors work on the tile before
        const char* at = from.keys[key].at;
        int64_t stride = from.stride;
        if (row == 0) coming.fetch<16>();
        if (!from.even || key + 15 >= from.n || from.keys[key + 15].at - at != 15 * stride) {
          for (int k = key; k < std::min(key + 16, from.n); ++k)
            for (int64_t c = 0; c < chunks_ * CHUNK; c += CHUNK)
              _mm512_storeu_si512(copy + (k - key) * CHUNK * chunks_ + c, bytes(from.keys[k].at + c, from.dim - c));
          at = copy, stride = CHUNK * chunks_;
        }
        amx::fence();
        _tile_zero(0);
        _tile_loadd(4, at, stride);
        _tile_dpbssd(0, 4, 6);
        if (chunks_ > 1) _tile_loadd(5, at + CHUNK, stride);
        if (chunks_ > 1) _tile_dpbssd(0, 5, 7);
        for (int64_t c = 2; c < chunks_; ++c) {
          _tile_loadd(4, at + c * CHUNK, stride);
          _tile_loadd(5, panel + c * 1024, 64);
          _tile_dpbssd(0, 4, 5);
        }
        _tile_stored(0, sums[now], 64);
        amx::fence();
        if (key) turn(key - 16, now ^ 1);
      }
      turn(key - 16, now ^ 1);
    }
  }

  // Weights of 128 keys, rows TILE_KEYS apart, as tiles of 32 keys: for each row the digits of key s and of key s + 16 side
  // by side, first as the left half of 32 bits and then as the right one.
  void weights(const float* w, int rows, const float* zeros, int8_t* p) {
    const __m512i half = _mm512_set1_epi32(128), low_byte = _mm512_set1_epi32(255);
    for (int row = 0; row < rows; ++row, w += TILE_KEYS) {
      __m512i most = _mm512_setzero_si512();
      __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; i += 16) most = _mm512_max_epu32(most, _mm512_slli_epi32(_mm512_loadu_si512(w + i), 1));
      if (zeros)
        for (int i = 0; i < KEYS; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(w + i), _mm512_loadu_ps(zeros + i), sum);
      // A NaN's bits are larger than those of a number.
      float largest = std::bit_cast<float>(_mm512_reduce_max_epu32(most) >> 1);
      if (largest < 1e-33f) largest = 1e-33f;
      weight_unit_[row] = largest / 32512, of_zeros_[row] = zeros ? _mm512_reduce_add_ps(sum) : 0;
      const __m512 scale = _mm512_set1_ps(32512 / largest);
      int8_t* to = p + row / ROWS * OF_P + row % ROWS * 64;
      auto put = [&](__m512i a, __m512i b, int8_t* to) __attribute__((always_inline)) {
        __m512i both = _mm512_ternarylogic_epi32(a, _mm512_slli_epi32(b, 8), low_byte, 0xE4);  // c ? a : b
        both = _mm512_slli_epi32(both, 16);
        _mm512_storeu_si512(to, _mm512_srli_epi32(both, 16));
        _mm512_storeu_si512(to + 256, both);
      };
#pragma GCC unroll 4
      for (int i = 0; i < KEYS; i += 32, to += 1024) {
        __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + i), scale));
        __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(w + i + 16), scale));
        put(_mm512_srai_epi32(_mm512_add_epi32(a, half), 8), _mm512_srai_epi32(_mm512_add_epi32(b, half), 8), to);
        put(a, b, to + 512);
      }
    }
  }

  // o [rows, dim] += the weights' digits times the values; columns in an order that `settle` undoes.
  void weigh(const int8_t* p, int rows, const Row* values, int n, int64_t dim, char* packed, float* o, int64_t ldo, Coming& coming) const {
    alignas(64) int32_t sums[4][16][16];
    for (int64_t d = 0; d < dim; d += 2 * CHUNK, o += 2 * CHUNK) {
      const bool both = dim - d > CHUNK;
      const int64_t step = both ? 2 * CHUNK : CHUNK;  // bytes of a key, packed
      pack(values, n, 0, d, dim - d, packed, coming);
      for (int row = 0; row < rows; row += ROWS) {
        amx::fence();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int key = 0; key < n; key += 32) {
          const char* at = packed + key * step;
          if (row == 0 && key + 32 < n) pack(values, n, key + 32, d, dim - d, packed + (key + 32) * step, coming);  // what was packed before is in place
          amx::fence();
          _tile_loadd(4, p + row / ROWS * OF_P + key * 32, 64);
          _tile_loadd(6, at, 64);
          _tile_dpbssd(0, 4, 6);
          _tile_loadd(7, at + 1024, 64);
          _tile_dpbssd(1, 4, 7);
          if (both) {
            _tile_loadd(6, at + 2048, 64);
            _tile_dpbssd(2, 4, 6);
            _tile_loadd(7, at + 3072, 64);
            _tile_dpbssd(3, 4, 7);
          }
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        if (both) _tile_stored(2, sums[2], 64);
        if (both) _tile_stored(3, sums[3], 64);
        amx::fence();
        for (int r = row; r < std::min(row + ROWS, rows); ++r)
          for (int j = 0; j < (both ? 8 : 4); ++j) {
            float* to = o + r * ldo + 16 * j;
            const int32_t(*at)[16] = sums[j / 2] + r - row + j % 2 * ROWS;
            __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(at[0]));
            __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(at[2 * ROWS]));
            __m512 sum = _mm512_fmadd_ps(high, _mm512_set1_ps(256), low);
            __m512 before = _mm512_sub_ps(_mm512_loadu_ps(to), _mm512_set1_ps(of_zeros_[r]));
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(weight_unit_[r]), before));
          }
      }
    }
  }

  // Sums of a row of n columns in the order of the columns: of 64, quarter i of the first four vectors is the columns 16 i,
  // 16 i + 2 ..., 16 i + 1, 16 i + 3 ..., then the same from 16 i + 8 on.
  static void settle(float* o, int64_t n) {
    for (; n > 0; n -= CHUNK, o += CHUNK) {
      __m512 even = _mm512_loadu_ps(o), odd = _mm512_loadu_ps(o + 16), even2 = _mm512_loadu_ps(o + 32), odd2 = _mm512_loadu_ps(o + 48);
      __m512 a = _mm512_unpacklo_ps(even, odd), b = _mm512_unpackhi_ps(even, odd);
      __m512 c = _mm512_unpacklo_ps(even2, odd2), d = _mm512_unpackhi_ps(even2, odd2);
      __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
      __m512 ab2 = _mm512_shuffle_f32x4(a, b, 0xEE), cd2 = _mm512_shuffle_f32x4(c, d, 0xEE);
      _mm512_storeu_ps(o, _mm512_shuffle_f32x4(ab, cd, 0x88));
      _mm512_storeu_ps(o + 16, _mm512_shuffle_f32x4(ab, cd, 0xDD));
      _mm512_storeu_ps(o + 32, _mm512_shuffle_f32x4(ab2, cd2, 0x88));
      _mm512_storeu_ps(o + 48, _mm512_shuffle_f32x4(ab2, cd2, 0xDD));
    }
  }

 private:
  // 64 bytes of which `left` are there, the others 0.
  [[gnu::always_inline]] static __m512i bytes(const char* at, int64_t left) {
    if (left >= 64) return _mm512_loadu_si512(at);
    return _mm512_maskz_loadu_epi8((1ull << left) - 1, at);
  }

  // Sums of 16 keys and the digits of four rows -> scores of four rows; keys 4 l + j in quarter l of vector j.
  [[gnu::always_inline]] void together(const int32_t (&sums)[16][16], int row, const float* zeros, float* to) const {
    __m512 x[4], a[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512 digit[OF_Q];
#pragma GCC unroll 3
      for (int i = 0; i < OF_Q; ++i) {
        auto four = [&](int key) { return _mm_load_si128(reinterpret_cast<const __m128i*>(sums[key] + 4 * i)); };
        __m512i y = _mm512_broadcast_i32x4(four(j));
        y = _mm512_mask_broadcast_i32x4(y, 0x00F0, four(4 + j));
        y = _mm512_mask_broadcast_i32x4(y, 0x0F00, four(8 + j));
        digit[i] = _mm512_cvtepi32_ps(_mm512_mask_broadcast_i32x4(y, 0xF000, four(12 + j)));
      }
      x[j] = _mm512_fmadd_ps(digit[0], _mm512_set1_ps(65536), _mm512_fmadd_ps(digit[1], _mm512_set1_ps(256), digit[2]));
    }
    for (int j = 0; j < 2; ++j) {
      a[2 * j] = _mm512_unpacklo_ps(x[2 * j], x[2 * j + 1]);
      a[2 * j + 1] = _mm512_unpackhi_ps(x[2 * j], x[2 * j + 1]);
    }
    const __m512 z = zeros ? _mm512_loadu_ps(zeros) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      __m512d low = _mm512_castps_pd(a[r / 2]), high = _mm512_castps_pd(a[2 + r / 2]);
      __m512 sum = _mm512_castpd_ps(r % 2 ? _mm512_unpackhi_pd(low, high) : _mm512_unpacklo_pd(low, high));
      sum = _mm512_fnmadd_ps(z, _mm512_set1_ps(of_one_[row + r]), sum);
      _mm512_storeu_ps(to + r * TILE_KEYS, _mm512_mul_ps(sum, _mm512_set1_ps(unit_[row + r])));
    }
  }

  // Up to 128 columns from d on of 32 keys, as tiles of 32 columns: those of key s and of key s + 16 side by side. Behind the
  // last key are numbers of any key, for weights are 0 there.
  static void pack(const Row* values, int n, int key, int64_t d, int64_t left, char* to, Coming& coming) {
    const bool whole = key + 32 <= n;
    for (int k = key; k < key + 16; ++k, to += 64) {
      coming.fetch<2>();
      const char *first = values[whole ? k : std::min(k, n - 1)].at + d, *second = values[whole ? k + 16 : std::min(k + 16, n - 1)].at + d;
      auto put = [&](int64_t at) __attribute__((always_inline)) {
        __m512i a = bytes(first + at, left - at), b = bytes(second + at, left - at);
        _mm512_storeu_si512(to + 32 * at, _mm512_unpacklo_epi8(a, b));
        _mm512_storeu_si512(to + 32 * at + 1024, _mm512_unpackhi_epi8(a, b));
      };
      put(0);
      if (left > CHUNK) put(CHUNK);
    }
  }

  int64_t chunks_;
  float unit_[16] = {}, of_one_[16] = {};  // of a row's queries: a unit of n, and the sum of n, which is finite whatever they are
  float weight_unit_[16], of_zeros_[16];   // of a row's weights, and their sum times the values' zero points
};

#pragma GCC pop_options

}  // namespace
