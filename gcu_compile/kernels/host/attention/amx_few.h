// Few rows (decode) by tiles: keys are the rows of A as they lie, queries the columns of B, so that keys are not packed.
//
//   scores^T [16 keys, 16 rows] = K [16 keys, dim] Q^T, transposed by exchanges
//   sums [16 rows, size] += P [16 rows, keys] V, V's rows in pairs
//
// Keys that do not lie at even distances, and those of a size that is no multiple of 32, are copied first. V is packed in
// groups of 32 keys and 64 columns, which stay in L1. Meanwhile rows of the next block are prefetched (`Coming`),
// as many at a time as spread them over this one. An int8 cache is amx_digits.h's.
#pragma once

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

inline void copy_keys(const Source& from, int key, int64_t d, uint16_t* to) {
  for (int i = key; i < std::min(key + 16, from.n); ++i, to += d)
    for (int64_t at = 0; at < d; at += 32) _mm512_storeu_si512(to + at, BF16::pairs<false>(from.keys[i], at, BF16::first(from.dim - at)));
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

// Of 32 keys and 64 columns from d on, tiles of 16 columns: keys 2s and 2s + 1 side by side, columns in the order that
// `settle` undoes, but for a last strip of 16.
[[gnu::always_inline]] inline void pack_group(const Row* values, int n, int64_t dim, int64_t d, uint16_t* to, Coming& coming) {
  if (n >= 32 && d + 64 <= dim) {
#pragma GCC unroll 2
    for (int s = 0; s < 16; ++s, to += 32) {
      const char *a = values[2 * s].at + 2 * d, *b = values[2 * s + 1].at + 2 * d;
      coming.fetch(1);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        AmxBF16::put<false>(_mm512_loadu_si512(a + 64 * half), _mm512_loadu_si512(b + 64 * half), to + 1024 * half, 512);
    }
    return;
  }
  for (int s = 0; s < 16; ++s, to += 32)
    for (int half = 0; half < 2; ++half) {
      const int64_t at = d + 32 * half;
      auto row = [&](int key) { return key < n && at < dim ? BF16::pairs<false>(values[key], at, BF16::first(dim - at)) : _mm512_setzero_si512(); };
      auto put = dim - at <= 16 ? AmxBF16::put<true> : AmxBF16::put<false>;
      put(row(2 * s), row(2 * s + 1), to + 1024 * half, 512);
    }
}

// 64 columns from d on, of which `strips` strips of 16 are there.
inline void weighed_columns(const uint16_t* p, const Row* values, int n, int64_t dim, int64_t d, int strips, uint16_t* packed, float* c,
                            int64_t ldc, bool add, Coming& coming) {
  amx::fence();
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    if (strips > 1) _tile_loadd(1, c + 16, ldc * 4);
    if (strips > 2) _tile_loadd(2, c + 32, ldc * 4);
    if (strips > 3) _tile_loadd(3, c + 48, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  pack_group(values, n, dim, d, packed, coming);
  for (int key = 0; key < n; key += 32) {  // a group is packed while the one before is multiplied
    const uint16_t* b = packed + key / 32 % 2 * 2048;
    if (key + 32 < n) pack_group(values + key + 32, n - key - 32, dim, d, packed + (key / 32 + 1) % 2 * 2048, coming);
    amx::fence();
    _tile_loadd(4, p + key, TILE_KEYS * 2);
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (strips > 1) _tile_loadd(6, b + 512, 64);
    if (strips > 1) _tile_dpbf16ps(1, 4, 6);
    if (strips > 2) _tile_loadd(5, b + 1024, 64);
    if (strips > 2) _tile_dpbf16ps(2, 4, 5);
    if (strips > 3) _tile_loadd(6, b + 1536, 64);
    if (strips > 3) _tile_dpbf16ps(3, 4, 6);
    amx::fence();
  }
  _tile_stored(0, c, ldc * 4);
  if (strips > 1) _tile_stored(1, c + 16, ldc * 4);
  if (strips > 2) _tile_stored(2, c + 32, ldc * 4);
  if (strips > 3) _tile_stored(3, c + 48, ldc * 4);
  amx::fence();
}

void AmxBF16::weigh(const uint16_t* p, const Row* values, int n, int64_t dim, uint16_t* packed, float* o, int64_t ldo, bool add, Coming& coming) {
  for (int64_t d = 0; d < ldo; d += 64)
    weighed_columns(p, values, n, dim, d, int(std::min<int64_t>(64, ldo - d) / 16), packed, o + d, ldo, add, coming);
}

void AmxBF16::scores(const uint16_t* turned, int rows, const Source& from, int64_t d, uint16_t* copy, float* s, Coming& coming) {
  alignas(64) float result[4][16][16];
  for (int key = 0; key < from.n; key += 64) {
    const int tiles = (std::min(64, from.n - key) + 15) / 16;
    for (int i = 0; i < tiles; ++i) {
      int first = key + 16 * i, last = first + 15;
      const char* at = from.keys[first].at;
      int64_t stride = from.stride;
      if (!from.even || last >= from.n || from.keys[last].at - at != 15 * stride) {
        copy_keys(from, first, d, copy);
        at = reinterpret_cast<const char*>(copy), stride = 2 * d;
      }
      coming.fetch(12);
      key_tile(at, stride, turned, d, result[i][0]);
    }
    for (int i = 0; i < tiles; ++i) rows <= 4 ? turn_four(result[i], s + key + 16 * i) : turn(result[i], s + key + 16 * i);
  }
}

#pragma GCC pop_options

}  // namespace
