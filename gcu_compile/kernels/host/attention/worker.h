// A thread's work: item by item, each a walk over its keys.
//
// KV heads with few rows are walked side by side, a tile of keys of each in turn: the keys of all heads of a block lie one
// behind the other, and reading them so takes less time than reading each head's through all blocks, with a new page of
// memory at every one (measured: docs/attention.md).
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "tile.h"

namespace {

template <class P>
class Worker {
 public:
  Worker(const Arguments& in, Partials& partials) : in_(in), partials_(partials), buffers_(in) {
    size_ = size_of_number(in);
    tiles_.push_back(std::make_unique<Tile<P>>(in, partials, buffers_, P::TILE_ROWS));
  }

  void run(const Item& item) {
    while (int64_t(tiles_.size()) < item.kv_heads)
      tiles_.push_back(std::make_unique<Tile<P>>(in_, partials_, buffers_, P::ROWS_OF_FEW));
    for (int64_t i = 0; i < item.kv_heads; ++i) tiles_[i]->begin(item.of(i), false);
    walk(item, 0);
    for (int64_t i = 0; i < item.kv_heads; ++i) {
      if (tiles_[i]->end()) continue;
      tiles_[i]->begin(item.of(i), true);
      walk(item.of(i), i);
      tiles_[i]->end();
    }
  }

 private:
  // All keys of the item's heads; `first` is the tile of the first one.
  void walk(const Item& item, int64_t first) {
    const bool few = P::FEW && item.rows() <= P::FEW;
    const int step = few ? TILE_KEYS_DECODE : TILE_KEYS;
    Keys *&now = buffers_.now, *&next = buffers_.next;
    for (Keys& keys : buffers_.keys) keys.prepare(in_, item);
    auto locate = [&](int64_t key, int64_t head) {
      const Item one = item.of(head);
      if (item.kv_heads > 1 && (in_.k_scale_kind == 2 || in_.v_scale_kind == 2)) next->prepare(in_, one);  // of each head
      next->locate(in_, one, size_, key, step);
    };
    locate(item.first_key, 0);
    if (few) Coming::begin(*next, in_.head_dim * size_);
    for (int64_t key = item.first_key; key < item.last_key; key += step)
      for (int64_t head = 0; head < item.kv_heads; ++head) {
        std::swap(now, next);
        head + 1 < item.kv_heads ? locate(key, head + 1) : locate(key + step, 0);
        tiles_[first + head]->add(key);
      }
  }

  const Arguments& in_;
  Partials& partials_;
  Buffers<P> buffers_;
  std::vector<std::unique_ptr<Tile<P>>> tiles_;
  int64_t size_;  // bytes of one number of the cache
};

}  // namespace
