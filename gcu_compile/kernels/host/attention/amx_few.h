// Few rows (decode) by tiles: keys are the rows of A as they lie, queries the columns of B, so that keys are not packed.
//
//   scores^T [16 keys, 16 rows] = K [16 keys, dim] Q^T, four tiles of keys at once; each is transposed by exchanges
//   sums [16 rows, size] += P [16 rows, keys] V, V's rows in pairs (pack_v)
//
// Keys that do not lie at even distances, integers, and sizes that are no multiple of 32 are copied as bf16 first.
#pragma once

namespace {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512bw,avx512vl,avx512dq")

template <bool BYTES>
inline void copy_keys(const Source& from, int key, int64_t d, uint16_t* to) {
  for (int i = key; i < std::min(key + 16, from.n); ++i, to += d)
    for (int64_t at = 0; at < d; at += 32)
      _mm512_storeu_si512(to + at, BF16::pairs<BYTES>(from.keys[i], at, BF16::first(from.dim - at)));
}

void AmxBF16::scores(const uint16_t* turned, int rows, const Source& from, int64_t d, uint16_t* copy, float* s, Ahead ahead) {
  alignas(64) float result[4][16][16];
  for (int key = 0; key < from.n; key += 64) {
    const int tiles = (std::min(64, from.n - key) + 15) / 16;
    const void* at[4];
    int64_t stride[4];
    for (int i = 0; i < tiles; ++i) {
      int first = key + 16 * i, last = first + 15;
      ahead.fetch(first, last + 1);
      bool as_they_lie = from.even && last < from.n && from.keys[last].at - from.keys[first].at == 15 * from.stride;
      if (as_they_lie) { at[i] = from.keys[first].at, stride[i] = from.stride; continue; }
      uint16_t* to = copy + 16 * i * d;
      from.bytes ? copy_keys<true>(from, first, d, to) : copy_keys<false>(from, first, d, to);
      at[i] = to, stride[i] = 2 * d;
    }
    fence();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < d; c += 32) {
      _tile_loadd(4, turned + 16 * c, 64);
      _tile_loadd(5, static_cast<const uint16_t*>(at[0]) + c, stride[0]);
      _tile_dpbf16ps(0, 5, 4);
      if (tiles == 1) continue;
      _tile_loadd(6, static_cast<const uint16_t*>(at[1]) + c, stride[1]);
      _tile_dpbf16ps(1, 6, 4);
      if (tiles == 2) continue;
      _tile_loadd(7, static_cast<const uint16_t*>(at[2]) + c, stride[2]);
      _tile_dpbf16ps(2, 7, 4);
      if (tiles == 3) continue;
      _tile_loadd(5, static_cast<const uint16_t*>(at[3]) + c, stride[3]);
      _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, result[0], 64);
    _tile_stored(1, result[1], 64);
    _tile_stored(2, result[2], 64);
    _tile_stored(3, result[3], 64);
    fence();
    for (int i = 0; i < tiles; ++i) {
      Int columns[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) columns[k] = as_int(load(result[i][k]));
      transpose(columns);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r)
        if (r < rows) store(s + r * TILE_KEYS + key + 16 * i, as_float(columns[r]));
    }
  }
}

#pragma GCC pop_options

}  // namespace
