// A tile of keys: where they and their values lie, and the scales and zero points of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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

  // Zero points that all keys of a head share.
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
      const int count = int(std::min<int64_t>(n - i, block_size - slot));
      spread(k + i, count, k_block + slot * in.k_at.token * size, in.k_at.token * size);
      spread(v + i, count, v_block + slot * in.v_at.token * size, in.v_at.token * size);
      auto own = [&](const float* scale, const int32_t* zero, const Strides& s, Row* rows, float* factors, float* numbers) {
        const int64_t at = block * s.outer + head * s.head + slot * s.token;
        if (s.token == 1) std::memcpy(factors + i, scale + at, count * sizeof(float));
        for (int j = 0; j < count && s.token != 1; ++j) factors[i + j] = scale[at + j * s.token];
        for (int j = 0; j < count && zero; ++j) numbers[i + j] = float(rows[i + j].zero = zero[at + j * s.token]);
      };
      if (in.k_scale_kind == 3) own(in.k_scale, in.k_zero, in.k_scale_at, k, k_factor, k_zero);
      if (in.v_scale_kind == 3) own(in.v_scale, in.v_zero, in.v_scale_at, v, v_factor, v_zero);
      i += count;
    }
    for (int i = n; i < step && of_their_own; ++i) k_factor[i] = v_factor[i] = k_zero[i] = v_zero[i] = 0;
  }

 private:
  // Rows `step` bytes apart; their zero points stay, of which all or none are alike, and then written next.
  static void spread(Row* rows, int n, const char* at, int64_t step) {
    typedef int64_t Four __attribute__((vector_size(4 * sizeof(Row)), aligned(8), may_alias));
    static_assert(sizeof(Row) == 16);
    const int64_t a = reinterpret_cast<int64_t>(at), zero = rows[0].zero;
    Four four = {a, zero, a + step, zero, a + 2 * step, zero, a + 3 * step, zero};
    const Four by = {4 * step, 0, 4 * step, 0, 4 * step, 0, 4 * step, 0};
    int i = 0;
    for (; i + 4 <= n; i += 4, four += by) *reinterpret_cast<Four*>(rows + i) = four;
    for (; i < n; ++i) rows[i].at = at + i * step;
  }
};

// Rows that are read soon, in the order in which a tile's keys, its values and the next tile's keys are: prefetched before
// their turn, a few at a time between pieces of arithmetic. The CPU's own prefetcher does not see the order of blocks, and
// fetches the other line of a pair only sometimes.
//
// LOCALITY: of the cache, as __builtin_prefetch wants it.
template <int AHEAD, int LOCALITY>
class Fetched {
 public:
  Fetched(const Keys& now, const Keys& next, int64_t k_bytes, int64_t v_bytes) {
    const int ahead = rows_ahead(k_bytes);
    parts_[0] = {now.k + std::min(ahead, now.n), now.k + now.n, k_bytes};
    parts_[1] = {now.v, now.v + now.n, v_bytes};
    parts_[2] = {next.k, next.k + std::min(ahead, next.n), k_bytes};
  }

  // Up to COUNT rows.
  template <int COUNT>
  [[gnu::always_inline]] void fetch() {
    Part& part = parts_[at_];
    if (part.end - part.row < COUNT) [[unlikely]] return across(COUNT);
    const char* at = part.row->at;
    if (part.row[COUNT - 1].at - at == (COUNT - 1) * part.bytes) {  // one behind the other
      for (const char* end = at + COUNT * part.bytes; at < end; at += 256) line(at), line(at + 64), line(at + 128), line(at + 192);
    } else {
      for (int i = 0; i < COUNT; ++i) row(part.row[i].at, part.bytes);
    }
    part.row += COUNT;
  }

  // The first rows of all.
  static void begin(const Keys& keys, int64_t bytes) {
    for (int i = 0; i < std::min(rows_ahead(bytes), keys.n); ++i) row(keys.k[i].at, bytes);
  }

 private:
  struct Part {
    const Row *row, *end;
    int64_t bytes;
  };

  static int rows_ahead(int64_t bytes) { return int(std::clamp<int64_t>(AHEAD / bytes, 8, TILE_KEYS_DECODE)); }

  static void line(const char* at) { __builtin_prefetch(at, 0, LOCALITY); }

  static void row(const char* at, int64_t bytes) {
    line(at), line(at + bytes - 1);
    for (int64_t b = 64; b < bytes - 64; b += 64) line(at + b);
  }

  [[gnu::noinline]] void across(int count) {
    for (; count > 0; --count) {
      while (at_ < 2 && parts_[at_].row == parts_[at_].end) ++at_;
      if (parts_[at_].row == parts_[at_].end) return;
      row(parts_[at_].row++->at, parts_[at_].bytes);
    }
  }

  Part parts_[3];
  int at_ = 0;
};

// Rows that are due by parts, for evenly spaced ones take less time than several at once (measured).
template <class Rows>
class ByParts : public Rows {
 public:
  // A row, as a number for `advance`, and what of it is left to the softmax: memory would rest meanwhile.
  static constexpr int64_t ROW = 1 << 16, LEFT = ROW / 16;

  using Rows::Rows;

  // A part of a row more is due; COUNT rows at once, so that they have a few lines.
  template <int COUNT>
  [[gnu::always_inline]] void advance(int64_t part) {
    for (due_ += part; due_ >= COUNT * ROW; due_ -= COUNT * ROW) Rows::template fetch<COUNT>();
  }

 private:
  int64_t due_ = 0;
};

// How far ahead is measured. With AMX, 4 KB into the first cache: tiles that are loaded from the second are waited for, and
// so are many rows at once; what comes earlier is gone again where another thread shares the cache. Without (Zen 4), 24 KB
// into the second, and 4 KB from there: the first takes too few lines at a time from memory, whose time and that of
// arithmetic would add up.
constexpr int FIRST_CACHE = 3, SECOND_CACHE = 2;
#ifdef __AMX_TILE__
using Coming = ByParts<Fetched<4096, FIRST_CACHE>>;
#else
class Twice {
 public:
  Twice(const Keys& now, const Keys& next, int64_t k_bytes, int64_t v_bytes)
      : far_(now, next, k_bytes, v_bytes), near_(now, next, k_bytes, v_bytes) {}
  template <int COUNT>
  [[gnu::always_inline]] void fetch() {
    far_.fetch<COUNT>();
    near_.fetch<COUNT>();
  }
  static void begin(const Keys& keys, int64_t bytes) { Far::begin(keys, bytes); }

 private:
  using Far = Fetched<24576, SECOND_CACHE>;
  Far far_;
  Fetched<4096, FIRST_CACHE> near_;
};
using Coming = ByParts<Twice>;
#endif

}  // namespace
