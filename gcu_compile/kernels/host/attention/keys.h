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

  Keys() {
    for (int i = 0; i < TILE_KEYS; ++i) k[i].zero = v[i].zero = 0;
  }

  // Zero points that all keys of the item share.
  void prepare(const Arguments& in, const Item& item) {
    auto share = [&](const int32_t* zero, int64_t kind, Row* rows, float* numbers) {
      if (!zero || kind == 3) return;
      const int32_t point = zero[kind == 2 ? item.kv_head : 0];
      for (int i = 0; i < TILE_KEYS; ++i) rows[i].zero = point, numbers[i] = float(point);
    };
    share(in.k_zero, in.k_scale_kind, k, k_zero), share(in.v_zero, in.v_scale_kind, v, v_zero);
  }

  // Up to `step` keys of the item from `key` on, block by block. size: bytes of one number of the cache.
  void locate(const Arguments& in, const Item& item, int64_t size, int64_t key, int step) {
    n = int(std::clamp<int64_t>(item.last_key - key, 0, step));
    const bool paged = in.block_table, of_their_own = in.k_scale_kind == 3 || in.v_scale_kind == 3;
    const int64_t head = item.kv_head, block_size = paged ? in.block_size : in.kv_len;
    const char *k_head = static_cast<const char*>(in.k) + head * in.k_at.head * size;
    const char *v_head = static_cast<const char*>(in.v) + head * in.v_at.head * size;
    for (int i = 0; i < n;) {
      int64_t j = key + i, slot = j % block_size, block = item.sequence;
      if (paged) block = in.block_table[item.sequence * in.table_stride + j / block_size];
      const char *k_block = k_head + block * in.k_at.outer * size, *v_block = v_head + block * in.v_at.outer * size;
      const int stop = int(std::min<int64_t>(n, i + block_size - slot));
      if (!of_their_own) {
        const int64_t k_step = in.k_at.token * size, v_step = in.v_at.token * size;
        const char *k_row = k_block + slot * k_step, *v_row = v_block + slot * v_step;
        for (; i < stop; ++i, k_row += k_step, v_row += v_step) k[i].at = k_row, v[i].at = v_row;
        continue;
      }
      auto at = [&](const Strides& s) { return block * s.outer + head * s.head + slot * s.token; };
      for (; i < stop; ++i, ++slot) {
        k[i].at = k_block + slot * in.k_at.token * size, v[i].at = v_block + slot * in.v_at.token * size;
        if (in.k_scale_kind == 3) k_factor[i] = in.k_scale[at(in.k_scale_at)];
        if (in.v_scale_kind == 3) v_factor[i] = in.v_scale[at(in.v_scale_at)];
        if (in.k_scale_kind == 3 && in.k_zero) k_zero[i] = float(k[i].zero = in.k_zero[at(in.k_scale_at)]);
        if (in.v_scale_kind == 3 && in.v_zero) v_zero[i] = float(v[i].zero = in.v_zero[at(in.v_scale_at)]);
      }
    }
    for (int i = n; i < step && of_their_own; ++i) k_factor[i] = v_factor[i] = k_zero[i] = v_zero[i] = 0;
  }
};

// Rows of the next block, to be prefetched into the second cache a few at a time between pieces of arithmetic: the CPU's own
// prefetcher does not see the order of blocks, and many at once would only be waited for. Every line is named: that the CPU
// fetches lines in pairs holds for a part of them only.
class Coming {
 public:
  Coming(const Keys& keys, int64_t k_bytes, int64_t v_bytes) : keys_(keys), k_bytes_(k_bytes), v_bytes_(v_bytes) {}

  [[gnu::always_inline]] void fetch(int count) {
    for (const int stop = std::min(at_ + count, 2 * keys_.n); at_ < stop; ++at_) {
      const bool value = at_ >= keys_.n;
      const char* row = value ? keys_.v[at_ - keys_.n].at : keys_.k[at_].at;
      for (int64_t b = 0; b < (value ? v_bytes_ : k_bytes_); b += 64) __builtin_prefetch(row + b, 0, 2);
    }
  }

 private:
  const Keys& keys_;
  int64_t k_bytes_, v_bytes_;
  int at_ = 0;
};

}  // namespace
