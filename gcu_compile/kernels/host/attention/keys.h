// A tile of keys: where they and their values lie, and the scales and zero points of their own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "rows.h"

namespace {

struct Keys {
  int n;
  Row k[TILE_KEYS], v[TILE_KEYS];
  alignas(64) float k_factor[TILE_KEYS], v_factor[TILE_KEYS];
  alignas(64) float k_zero[TILE_KEYS], v_zero[TILE_KEYS];  // as numbers, where there are zero points

  // Zero points that all keys of the item share.
  void prepare(const Arguments& in, const Item& item) {
    if (in.k_zero && in.k_scale_kind != 3) std::fill_n(k_zero, TILE_KEYS, float(in.k_zero[in.k_scale_kind == 2 ? item.kv_head : 0]));
    if (in.v_zero && in.v_scale_kind != 3) std::fill_n(v_zero, TILE_KEYS, float(in.v_zero[in.v_scale_kind == 2 ? item.kv_head : 0]));
  }

  // Up to `step` keys of the item from `key` on, block by block. size: bytes of one number of the cache.
  void locate(const Arguments& in, const Item& item, int64_t size, int64_t key, int step) {
    n = int(std::clamp<int64_t>(item.last_key - key, 0, step));
    const bool paged = in.block_table, of_their_own = in.k_scale_kind == 3 || in.v_scale_kind == 3;
    const int64_t head = item.kv_head, block_size = paged ? in.block_size : in.kv_len;
    const char *k_head = static_cast<const char*>(in.k) + head * in.k_at.head * size;
    const char *v_head = static_cast<const char*>(in.v) + head * in.v_at.head * size;
    auto zero = [&](const int32_t* z, int64_t kind, int64_t at) { return !z ? 0 : kind == 1 ? z[0] : kind == 2 ? z[head] : z[at]; };
    for (int i = 0; i < n;) {
      int64_t j = key + i, slot = j % block_size, block = item.sequence;
      if (paged) block = in.block_table[item.sequence * in.table_stride + j / block_size];
      const char *k_block = k_head + block * in.k_at.outer * size, *v_block = v_head + block * in.v_at.outer * size;
      const int stop = int(std::min<int64_t>(n, i + block_size - slot));
      if (!of_their_own) {
        const char *k_row = k_block + slot * in.k_at.token * size, *v_row = v_block + slot * in.v_at.token * size;
        const int32_t k_point = zero(in.k_zero, in.k_scale_kind, 0), v_point = zero(in.v_zero, in.v_scale_kind, 0);
        for (; i < stop; ++i, k_row += in.k_at.token * size, v_row += in.v_at.token * size) k[i] = {k_row, k_point}, v[i] = {v_row, v_point};
        continue;
      }
      auto at = [&](const Strides& s) { return block * s.outer + head * s.head + slot * s.token; };
      for (; i < stop; ++i, ++slot) {
        k[i] = {k_block + slot * in.k_at.token * size, zero(in.k_zero, in.k_scale_kind, at(in.k_scale_at))};
        v[i] = {v_block + slot * in.v_at.token * size, zero(in.v_zero, in.v_scale_kind, at(in.v_scale_at))};
        if (in.k_scale_kind == 3) k_factor[i] = in.k_scale[at(in.k_scale_at)], k_zero[i] = float(k[i].zero);
        if (in.v_scale_kind == 3) v_factor[i] = in.v_scale[at(in.v_scale_at)], v_zero[i] = float(v[i].zero);
      }
    }
    for (int i = n; i < step && of_their_own; ++i) k_factor[i] = v_factor[i] = k_zero[i] = v_zero[i] = 0;
  }
};

}  // namespace
