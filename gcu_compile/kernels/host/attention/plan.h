// Work items, and the order in which they are done.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "sizes.h"

namespace {

// One work item: the queries of one KV head, or, where those are few, of several KV heads side by side. What it says of
// heads, and of its partial result, is the first one's.
struct Item {
  int64_t sequence, kv_head, first_head, head_count, first_token, token_count;  // tokens within the sequence
  int64_t first_key, last_key;  // half open
  int64_t partial;              // index of its partial result, or -1: writes the output itself
  int64_t kv_heads = 1;         // side by side

  int64_t rows() const { return head_count * token_count; }  // of a KV head

  // The i-th KV head alone, or the first of those from there on.
  Item of(int64_t i) const {
    Item one = *this;
    one.kv_head += i, one.first_head += i * head_count, one.kv_heads = 1;
    if (partial >= 0) one.partial += i * rows();
    return one;
  }
};

int64_t queries(const Arguments& in, int64_t sequence) {
  return in.block_table ? in.query_start_loc[sequence + 1] - in.query_start_loc[sequence] : in.q_len;
}

// Rows of an item: fewer than P allows where queries and sums would fill the cache, or threads be without work.
template <class P>
int64_t rows_of_items(const Arguments& in) {
  int64_t rows = P::TILE_ROWS;
  while (rows / 2 >= P::LEAST_ROWS && rows * (2 * in.head_dim + 4 * in.v_dim) > HELD) rows /= 2;
  for (; rows / 2 >= P::LEAST_ROWS; rows /= 2) {
    int64_t count = 0;
    for (int64_t s = 0; s < in.sequences; ++s) count += (queries(in, s) * in.heads / in.kv_heads + rows - 1) / rows * in.kv_heads;
    if (count >= ITEMS * in.threads) break;
  }
  return rows;
}

// KV heads whose few rows share a walk over the keys: as many as is even, for what is kept of each is in the second cache.
inline int64_t side_by_side(int64_t kv_heads) {
  const int64_t walks = (kv_heads + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE;
  return (kv_heads + walks - 1) / walks;
}

// Items in the order of the work: the longest first. `split`: the parts of each item that was cut.
template <class P>
std::vector<Item> plan(const Arguments& in, std::vector<std::vector<Item>>& split, int64_t& partial_rows) {
  int64_t rows = rows_of_items<P>(in);
  int64_t group = in.heads / in.kv_heads, head_count = std::min<int64_t>(group, rows);
  int64_t token_count = rows / head_count;
  std::vector<Item> items;
  for (int64_t s = 0; s < in.sequences; ++s) {
    int64_t q_len = queries(in, s);
    int64_t kv_len = in.block_table ? in.seq_lens[s] : in.kv_len;
    int64_t offset = in.block_table ? kv_len - q_len : in.offset;
    const int64_t side = q_len * group <= P::FEW ? side_by_side(in.kv_heads) : 1;
    for (int64_t h = 0; h < in.kv_heads; h += side)
      for (int64_t g = 0; g < group; g += head_count)
        for (int64_t t = 0; t < q_len; t += token_count) {
          int64_t tokens = std::min(token_count, q_len - t);
          int64_t last = in.causal ? std::clamp<int64_t>(t + tokens + offset, 0, kv_len) : kv_len;
          int64_t first = in.window ? std::clamp<int64_t>(t + offset - in.window + 1, 0, last) : 0;
          items.push_back({s, h, h * group + g, std::min(head_count, group - g), t, tokens, first, last, -1, std::min(side, in.kv_heads - h)});
        }
  }
  auto work = [](const Item& i) { return (i.last_key - i.first_key) * (i.rows() + 16) * i.kv_heads; };
  int64_t sum = 0;
  for (const Item& item : items) sum += work(item);
  // An item that would keep one thread busy for longer than a quarter of its share is cut; one of several KV heads for
  // longer than half of it (the last ones are cut anyway): its keys, then its heads.
  std::vector<Item> result;
  for (const Item& item : items) {
    const int64_t keys = item.last_key - item.first_key;
    const int64_t shares = in.threads > 1 ? (item.kv_heads > 1 ? 2 : 4) * in.threads : 1;
    const int64_t wanted = std::max<int64_t>(1, shares * work(item) / std::max<int64_t>(sum, 1));
    const int64_t parts = std::max<int64_t>(1, std::min(keys / PART_KEYS, wanted));
    const int64_t heads = std::max<int64_t>(1, item.kv_heads * parts / wanted);
    const int64_t size = parts > 1 ? rounded((keys + parts - 1) / parts, TILE_KEYS_DECODE) : std::max<int64_t>(keys, 1);
    for (int64_t head = 0; head < item.kv_heads; head += heads) {
      Item some = item.of(head);
      some.kv_heads = std::min(heads, item.kv_heads - head);
      if (parts < 2) { result.push_back(some); continue; }
      split.emplace_back();
      for (int64_t key = item.first_key; key < item.last_key; key += size) {
        Item part = some;
        part.first_key = key, part.last_key = std::min(item.last_key, key + size), part.partial = partial_rows;
        partial_rows += part.rows() * part.kv_heads;
        split.back().push_back(part), result.push_back(part);
      }
    }
  }
  std::stable_sort(result.begin(), result.end(), [&](const Item& a, const Item& b) { return work(a) > work(b); });
  // The last ones in pieces, so that threads come to their ends together.
  const size_t last = in.threads > 1 ? std::min<size_t>(result.size(), in.threads) : 0;
  for (size_t at = result.size() - last, end = result.size(); at < end; ++at) {
    const Item item = result[at];
    result[at].kv_heads = std::min<int64_t>(item.kv_heads, LAST_HEADS);
    for (int64_t head = LAST_HEADS; head < item.kv_heads; head += LAST_HEADS) {
      result.push_back(item.of(head));
      result.back().kv_heads = std::min(LAST_HEADS, item.kv_heads - head);
    }
  }
  return result;
}

}  // namespace
