// Few rows (decode) by tiles: keys are the rows of A as they lie, queries the columns of B, so that keys are not packed.
//
//   scores^T [16 keys, 16 rows] = K [16 keys, dim] Q^T, transposed by exchanges
//   sums [16 rows, size] += P [16 rows, keys] V, V's rows in pairs (pack_v)
//
// Keys that do not lie at even distances, integers, and sizes that are no multiple of 32 are copied as bf16 first.
#pragma once

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

// Of 32 numbers, 0 to 15 and 16 to 31 in turns: the order in which integers are copied, for it costs no exchange.
void AmxBF16::halves_together(uint16_t* x, int64_t d) {
  for (int64_t at = 0; at < d; at += 32) {
    __m512i both = _mm512_loadu_si512(x + at), high = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(x + at, _mm512_permutex2var_epi16(both, _mm512_load_si512(FIRST_WORDS), high));
  }
}

template <bool BYTES>
inline void copy_keys(const Source& from, int key, int64_t d, uint16_t* to) {
  for (int i = key; i < std::min(key + 16, from.n); ++i, to += d)
    for (int64_t at = 0; at < d; at += 32) {
      const Row& row = from.keys[i];
      if (!BYTES) {
        _mm512_storeu_si512(to + at, BF16::pairs<BYTES>(row, at, BF16::first(from.dim - at)));
        continue;
      }
      // Behind the end queries are 0, and a byte is finite whatever it is, so that masks only keep the reads in the row.
      __m256i bytes = _mm256_maskz_loadu_epi8(BF16::first(from.dim - at), row.at + at);
      const __m512i zero = _mm512_set1_epi32(row.zero);
      _mm512_storeu_si512(to + at, AmxBF16::side_by_side(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1), zero, zero));
    }
}

// Scores of 16 keys and 16 rows, stored at `to`.
[[gnu::always_inline]] inline void key_tile(const char* keys, int64_t stride, const uint16_t* turned, int64_t d, float* to) {
  amx::fence();
  _tile_zero(0);
  for (int64_t c = 0; c < d; c += 32, keys += 64) {
    _tile_loadd(4, keys, stride);
    _tile_loadd(6, turned + 16 * c, 64);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, to, 64);
  amx::fence();
}

// Scores of 16 keys [16 keys, 16 rows] -> 16 rows, TILE_KEYS apart.
inline void turn(const float (&from)[16][16], float* to) {
  Int columns[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) columns[k] = as_int(load(from[k]));
  transpose(columns);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) store(to + r * TILE_KEYS, as_float(columns[r]));
}

// The same for the first four rows: keys 4 l + j in quarter l of vector j.
inline void turn_four(const float (&from)[16][16], float* to) {
  __m512 x[4], a[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    x[j] = _mm512_broadcast_f32x4(_mm_load_ps(from[j]));
    x[j] = _mm512_mask_broadcast_f32x4(x[j], 0x00F0, _mm_load_ps(from[4 + j]));
    x[j] = _mm512_mask_broadcast_f32x4(x[j], 0x0F00, _mm_load_ps(from[8 + j]));
    x[j] = _mm512_mask_broadcast_f32x4(x[j], 0xF000, _mm_load_ps(from[12 + j]));
  }
  for (int j = 0; j < 2; ++j) {
    a[2 * j] = _mm512_unpacklo_ps(x[2 * j], x[2 * j + 1]);
    a[2 * j + 1] = _mm512_unpackhi_ps(x[2 * j], x[2 * j + 1]);
  }
  for (int r = 0; r < 4; ++r) {
    __m512d low = _mm512_castps_pd(a[r / 2]), high = _mm512_castps_pd(a[2 + r / 2]);
    _mm512_storeu_pd(to + r * TILE_KEYS, r % 2 ? _mm512_unpackhi_pd(low, high) : _mm512_unpacklo_pd(low, high));
  }
}

void AmxBF16::scores(const uint16_t* turned, int rows, const Source& from, int64_t d, uint16_t* copy, float* s) {
  alignas(64) float result[4][16][16];
  for (int key = 0; key < from.n; key += 64) {
    const int tiles = (std::min(64, from.n - key) + 15) / 16;
    for (int i = 0; i < tiles; ++i) {
      int first = key + 16 * i, last = first + 15;
      const char* at = from.keys[first].at;
      int64_t stride = from.stride;
      if (!from.even || last >= from.n || from.keys[last].at - at != 15 * stride) {
        from.bytes ? copy_keys<true>(from, first, d, copy) : copy_keys<false>(from, first, d, copy);
        at = reinterpret_cast<const char*>(copy), stride = 2 * d;
      }
      key_tile(at, stride, turned, d, result[i][0]);
    }
    for (int i = 0; i < tiles; ++i) rows <= 4 ? turn_four(result[i], s + key + 16 * i) : turn(result[i], s + key + 16 * i);
  }
}

#pragma GCC pop_options

}  // namespace
