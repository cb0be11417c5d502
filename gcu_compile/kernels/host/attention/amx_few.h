// Few rows (decode) by tiles: keys are not packed, nor are values for eight rows or fewer.
//
//   scores^T [16 keys, 16 rows] = K [16 keys, dim] Q^T, transposed by exchanges: keys are the left operand as they lie
//   sums [8 rows, 2, size / 2] += P [8 rows, 2, 16 keys, 2] V: values are the right one. A step of a product takes two numbers
//   of a column, here those of two columns of a key: P has each row twice, for the one and for the other, with zeros
//   between. For more rows V is packed in groups of 32 keys and 64 columns, which stay in L1.
//
// Sixteen keys or values that do not lie at even distances, and those of a size that is no multiple of 32, are copied first.
// Meanwhile rows that come are prefetched (`Coming`). An int8 cache is amx_digits.h's.
#pragma once

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

// Rows key to key + 15, `stride` bytes apart: where they lie, or at `copy`, each filled up to d numbers, with rows of zeros
// behind the last one.
inline const char* sixteen(const Source& from, int key, int64_t d, uint16_t* copy, int64_t& stride) {
  const char* at = from.keys[key].at;
  stride = from.stride;
  if (from.even && key + 15 < from.n && from.keys[key + 15].at - at == 15 * stride) return at;
  at = reinterpret_cast<const char*>(copy), stride = 2 * d;
  for (int i = key; i < key + 16; ++i, copy += d)
    for (int64_t c = 0; c < d; c += 32)
      _mm512_storeu_si512(copy + c, i < from.n ? BF16::pairs<false>(from.keys[i], c, BF16::first(from.dim - c)) : _mm512_setzero_si512());
  return at;
}

// Scores of 16 keys and 16 rows, stored at `to`. Tiles 1, 2, 3 and 6 hold the first 128 numbers of the queries.
[[gnu::always_inline]] inline void key_tile(const char* keys, int64_t stride, const uint16_t* turned, int64_t d, float* to) {
  amx::fence();
  _tile_zero(0);
  _tile_loadd(4, keys, stride);
  _tile_dpbf16ps(0, 4, 1);
  if (d > 32) _tile_loadd(5, keys + 64, stride);
  if (d > 32) _tile_dpbf16ps(0, 5, 2);
  if (d > 64) _tile_loadd(4, keys + 128, stride);
  if (d > 64) _tile_dpbf16ps(0, 4, 3);
  if (d > 96) _tile_loadd(5, keys + 192, stride);
  if (d > 96) _tile_dpbf16ps(0, 5, 6);
  for (int64_t c = 128; c < d; c += 32) {
    _tile_loadd(4, keys + 2 * c, stride);
    _tile_loadd(7, turned + 16 * c, 64);
    _tile_dpbf16ps(0, 4, 7);
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

// Up to 128 columns of eight rows' sums, ldo apart. p: tiles of 16 keys; add: to what the sums are.
inline void weighed_columns(const uint16_t* p, const Source& values, int64_t d, uint16_t* copy, float* o, int64_t ldo, bool add,
                            Coming& coming) {
  const int64_t left = ldo - d, step = ldo * 2;  // bytes between the two halves of a row
  o += d / 2;
  amx::fence();
  if (add) {
    _tile_loadd(0, o, step);
    if (left > 32) _tile_loadd(1, o + 16, step);
    if (left > 64) _tile_loadd(2, o + 32, step);
    if (left > 96) _tile_loadd(3, o + 48, step);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int key = 0; key < values.n; key += 16, p += 512) {
    int64_t stride;
    const char* at = sixteen(values, key, ldo, copy, stride) + 2 * d;
    coming.fetch<16>();
    amx::fence();
    _tile_loadd(4, p, 64);
    _tile_loadd(5, at, stride);
    _tile_dpbf16ps(0, 4, 5);
    if (left > 32) _tile_loadd(6, at + 64, stride);
    if (left > 32) _tile_dpbf16ps(1, 4, 6);
    if (left > 64) _tile_loadd(7, at + 128, stride);
    if (left > 64) _tile_dpbf16ps(2, 4, 7);
    if (left > 96) _tile_loadd(5, at + 192, stride);
    if (left > 96) _tile_dpbf16ps(3, 4, 5);
    amx::fence();
  }
  _tile_stored(0, o, step);
  if (left > 32) _tile_stored(1, o + 16, step);
  if (left > 64) _tile_stored(2, o + 32, step);
  if (left > 96) _tile_stored(3, o + 48, step);
  amx::fence();
}

void AmxBF16::weigh(const uint16_t* p, int rows, const Source& values, uint16_t* doubled, uint16_t* copy, float* o, int64_t ldo, bool add, Coming& coming) {
  for (int row = 0; row < rows; ++row)
    for (int key = 0; key < values.n; key += 16) {
      __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + row * TILE_KEYS + key)));
      _mm512_storeu_si512(doubled + 32 * key + 64 * row, x);
      _mm512_storeu_si512(doubled + 32 * key + 64 * row + 32, _mm512_slli_epi32(x, 16));
    }
  for (int64_t d = 0; d < ldo; d += 128) weighed_columns(doubled, values, d, copy, o, ldo, add, coming);
}

// Of 32 keys and 64 columns from d on, tiles of 16 columns: keys 2s and 2s + 1 side by side, columns in the order that
// `AmxBF16::settle` undoes, but for a last strip of 16.
[[gnu::always_inline]] inline void pack_group(const Row* values, int n, int64_t dim, int64_t d, uint16_t* to, Coming& coming) {
  if (n >= 32 && d + 64 <= dim) {
#pragma GCC unroll 2
    for (int s = 0; s < 16; ++s, to += 32) {
      const char *a = values[2 * s].at + 2 * d, *b = values[2 * s + 1].at + 2 * d;
      coming.fetch<2>();
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

// More than eight rows: each would stand in two tiles. 64 columns from d on, of which `strips` strips of 16 are there.
inline void packed_columns(const uint16_t* p, const Row* values, int n, int64_t dim, int64_t d, int strips, uint16_t* packed, float* c,
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

void AmxBF16::weigh_packed(const uint16_t* p, const Row* values, int n, int64_t dim, uint16_t* packed, float* o, int64_t ldo, bool add, Coming& coming) {
  for (int64_t d = 0; d < ldo; d += 64)
    packed_columns(p, values, n, dim, d, int(std::min<int64_t>(64, ldo - d) / 16), packed, o + d, ldo, add, coming);
}

void AmxBF16::settle_halves(float* o, int64_t n, float* copy) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  std::memcpy(copy, o, n * 4);
  for (int64_t i = 0; i < n; i += 32, copy += 16, o += 32) {
    __m512 even = _mm512_loadu_ps(copy), odd = _mm512_loadu_ps(copy + n / 2);
    _mm512_storeu_ps(o, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(o + 16, _mm512_permutex2var_ps(even, high, odd));
  }
}

void AmxBF16::scores(const uint16_t* turned, int rows, const Source& from, int64_t d, uint16_t* copy, float* s, Coming& coming) {
  alignas(64) float result[4][16][16];
  amx::fence();
  _tile_loadd(1, turned, 64);
  if (d > 32) _tile_loadd(2, turned + 512, 64);
  if (d > 64) _tile_loadd(3, turned + 1024, 64);
  if (d > 96) _tile_loadd(6, turned + 1536, 64);
  for (int key = 0; key < from.n; key += 64) {
    const int tiles = (std::min(64, from.n - key) + 15) / 16;
    for (int i = 0; i < tiles; ++i) {
      int64_t stride;
      const char* at = sixteen(from, key + 16 * i, d, copy, stride);
      coming.fetch<16>();
      key_tile(at, stride, turned, d, result[i][0]);
    }
    for (int i = 0; i < tiles; ++i) rows <= 4 ? turn_four(result[i], s + key + 16 * i) : turn(result[i], s + key + 16 * i);
  }
}

#pragma GCC pop_options

}  // namespace
