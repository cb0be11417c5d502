// The queries of one KV head of a work item against its keys, tile by tile of keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "finish.h"
#include "keys.h"
#include "matmul.h"
#include "partials.h"
#include "parts.h"
#include "plan.h"
#include "rows.h"

namespace {

// What a thread's tiles use in turn.
template <class P>
struct Buffers {
  using A = typename P::A;

  explicit Buffers(const Arguments& in) {
    int64_t d = rounded(in.head_dim, 2 * LANES), dv = rounded(in.v_dim, LANES);
    memory.take(k, TILE_KEYS * d), memory.take(v, TILE_KEYS * dv);
    memory.take(p, P::BLOCK * TILE_KEYS), memory.take(s, P::BLOCK * TILE_KEYS);
    memory.allocate();
  }

  Buffers(const Buffers&) = delete;

  Parts memory;
  A *k, *v, *p;
  float* s;
  Keys keys[2], *now = &keys[0], *next = &keys[1];
};

template <class P>
class Tile {
  using A = typename P::A;

 public:
  // rows: of queries, at most.
  Tile(const Arguments& in, Partials& partials, Buffers<P>& buffers, int64_t rows)
      : in_(in), partials_(partials), buffers_(buffers), k_(buffers.k), v_(buffers.v), p_(buffers.p), s_(buffers.s) {
    size_ = size_of_number(in);
    d_ = rounded(in.head_dim, 2 * LANES), dv_ = rounded(in.v_dim, LANES);
    memory_.take(q_, rows * rounded(d_, 64)), memory_.take(o_, rows * rounded(in.v_dim, 64));
    memory_.allocate();
  }

  // What is common to all keys. packed: values are, though rows be few.
  void begin(const Item& item, bool packed) {
    item_ = item, packed_ = packed;
    rows_ = int(item.rows());
    paged_ = in_.block_table != nullptr;
    start_ = paged_ ? in_.query_start_loc[item.sequence] : 0;
    int64_t q_len = paged_ ? in_.query_start_loc[item.sequence + 1] - start_ : in_.q_len;
    offset_ = paged_ ? in_.seq_lens[item.sequence] - q_len : in_.offset;
    ldo_ = digits() ? rounded(in_.v_dim, 64) : doubled() ? rounded(in_.v_dim, 32) : dv_;
    load_queries();
    prepare();
    std::fill_n(maximum_, rows_, -INF), std::fill_n(weight_, rows_, 0.0f), std::fill(std::begin(started_), std::end(started_), false);
    if (digits()) std::fill_n(o_, rows_ * ldo_, 0.0f), started_[0] = true;
  }

  // Keys `now` of the buffers, the first of which is number `key` of the sequence.
  void add(int64_t key) {
    if (are_few()) few(key);
    else many(key);
  }

  // False: nothing is written, and the item is to be done again with packed values.
  bool end() {
    for (int row = 0; row < rows_; row += P::BLOCK)
      if (!started_[row / P::BLOCK]) std::fill_n(o_ + row * ldo_, std::min(P::BLOCK, rows_ - row) * ldo_, 0.0f);
    if constexpr (P::FEW > 0)
      if (lazy())
        for (int row = 0; row < rows_; ++row) {
          maximum_[row] = softmax_.maximum(row), weight_[row] = softmax_.weight(row);
          settle(o_ + row * ldo_);
        }
    if (doubled() && !finite()) return false;
    if (item_.partial >= 0) keep();
    else finish_all();
    return true;
  }

 private:
  // A tile of keys, packed; the queries block by block, each against the keys that one of it sees.
  void many(int64_t key) {
    const Keys& at = *buffers_.now;
    int64_t n = at.n, all = rounded(n, LANES), depth = P::DEPTH;
    Panel<A> k{k_, rounded((in_.head_dim + depth - 1) / depth, P::STEPS), all, {}, {}};
    Panel<A> v{v_, rounded((n + depth - 1) / depth, P::STEPS), dv_, {}, {0, dv_}};
    k.step = {0, k.steps};
    P::pack_k(at.k, at.n, in_.cache_dtype, in_.head_dim, k_);
    P::pack_v(at.v, at.n, in_.cache_dtype, in_.v_dim, v_);
    for (int row = 0; row < rows_; row += P::BLOCK) {
      int count = std::min(P::BLOCK, rows_ - row);
      int64_t first = item_.first_token + row / item_.head_count + offset_ - key;  // positions from the tile's first key
      int64_t last = item_.first_token + (row + count - 1) / item_.head_count + offset_ - key;
      int64_t end = rounded(in_.causal ? std::clamp<int64_t>(last + 1, 0, n) : n, 32);
      int64_t begin = in_.window ? std::clamp<int64_t>(first - in_.window + 1, 0, n) / P::STRIP * P::STRIP : 0;
      if (begin >= end) continue;
      k.column = {begin, std::min(end, all)};
      v.step = {begin / depth, std::min(end / depth, v.steps)};
      bool& started = started_[row / P::BLOCK];
      if constexpr (P::BY_TILES) {
        weights_by_tiles(row, count, key, k, first, last);
        P::products(p_, TILE_KEYS, v, o_ + row * dv_, dv_, count, started, [](int, int) {});
      } else {
        matmul<P>(q_ + row * d_, d_, k, s_, TILE_KEYS, count, nullptr);
        for (int i = 0; i < count; ++i) soften(row + i, i, key, begin, end);
        matmul<P>(p_, TILE_KEYS, v, o_ + row * dv_, dv_, count, started ? alpha_ + row : nullptr);
      }
      started = true;
    }
  }

  // Scores of a block's rows and the keys of `k`, 64 at a time, while the 64 before become weights. first, last: positions of
  // the block's first and last row, from the tile's first key.
  void weights_by_tiles(int row, int count, int64_t key, const Panel<A>& k, int64_t first, int64_t last) {
    const int64_t all = rounded(k.column.end, 32);
    float* scores[] = {s_, s_ + P::BLOCK * 64};
    Panel<A> part = k;
    int now = 0;
    auto soften_rows = [&](float* s, int64_t begin, int from, int to) __attribute__((always_inline)) {
      int64_t end = std::min(begin + 64, all);
      bool seen = (!in_.causal || first + 1 >= end) && (!in_.window || last - in_.window < begin) && end <= buffers_.now->n;
      if (plain_ && seen && end == begin + 64) {
        const float* v_factor = in_.v_scale_kind == 3 ? buffers_.now->v_factor + begin : nullptr;
        auto raise = [&](int at, float by) { this->raise(at, p_ + (at - row) * TILE_KEYS, begin, by); };
        int i = from;
        for (; i + 2 <= to; i += 2)
          softmax_.template weigh<2, 4>(row + i, s + i * 64, 64, p_ + i * TILE_KEYS + begin, TILE_KEYS, factor_, v_factor, raise);
        if (i < to) softmax_.template weigh<1, 4>(row + i, s + i * 64, 64, p_ + i * TILE_KEYS + begin, TILE_KEYS, factor_, v_factor, raise);
      } else {
        for (int i = from; i < to; ++i) weigh(row + i, s + i * 64 - begin, p_ + i * TILE_KEYS, key, begin, end);
      }
    };
    for (int64_t strip = k.column.begin; strip < k.column.end; strip += 64, now ^= 1) {
      part.column = {strip, std::min(strip + 64, k.column.end)};
      P::products(q_ + row * d_, d_, part, scores[now], 64, count, false, [&](int i, int n) __attribute__((always_inline)) {
        if (strip > k.column.begin) soften_rows(scores[now ^ 1], strip - 64, count * i / n, count * (i + 1) / n);
      });
    }
    soften_rows(scores[now ^ 1], k.column.begin + (k.column.end - 1 - k.column.begin) / 64 * 64, 0, count);
  }

  // A tile of keys against few rows.
  void few(int64_t key) {
    const Keys& at = *buffers_.now;
    Coming coming(at, *buffers_.next, in_.head_dim * size_, in_.v_dim * size_);
    if constexpr (P::BY_TILES) {
      const int64_t block_size = paged_ ? in_.block_size : in_.kv_len, end = rounded(at.n, 32);
      auto source = [&](const Row* rows, int64_t dim, const Strides& by) {
        return Source{rows, at.n, dim % (64 / size_) == 0 && block_size >= 16, dim, by.token * size_};
      };
      const Source keys = source(at.k, in_.head_dim, in_.k_at);
      auto weigh_rows = [&](auto* p) {
        for (int row = 0; row < rows_; ++row) weigh(row, s_ + row * TILE_KEYS, p + row * TILE_KEYS, key, end);
      };
      if (digits()) {
        digits_.scores(reinterpret_cast<int8_t*>(turned()), rows_, keys, in_.k_zero ? at.k_zero : nullptr,
                       reinterpret_cast<char*>(k_), s_, coming);
        weigh_rows(s_);
        for (int row = 0; row < rows_ && end < TILE_KEYS_DECODE; ++row) std::fill(s_ + row * TILE_KEYS + end, s_ + row * TILE_KEYS + TILE_KEYS_DECODE, 0.0f);
        digits_.weights(s_, rows_, in_.v_zero ? at.v_zero : nullptr, reinterpret_cast<int8_t*>(p_));
        digits_.weigh(reinterpret_cast<int8_t*>(p_), rows_, at.v, at.n, in_.v_dim, reinterpret_cast<char*>(v_), o_, ldo_, coming);
      } else {
        P::scores(turned(), rows_, keys, d_, k_, s_, coming);
        weigh_rows(p_);
        if (doubled()) P::weigh(p_, rows_, source(at.v, in_.v_dim, in_.v_at), k_, v_, o_, ldo_, started_[0], coming);
        else P::weigh_packed(p_, at.v, at.n, in_.v_dim, v_, o_, ldo_, started_[0], coming);
      }
    } else if constexpr (P::FEW > 0) {
      if constexpr (P::TABLES) {
        if (by_tables()) P::Tables::scores(turned(), rows_, at.k, at.n, d_, s_, coming);
      }
      if (!by_tables()) P::scores(q_, d_, rows_, at.k, at.n, in_.cache_dtype, in_.head_dim, s_, coming);
      for (int row = 0; row < rows_; ++row) {
        coming.advance<4>(divided(2 * at.n * Coming::LEFT, rows_));
        weigh(row, s_ + row * TILE_KEYS, p_ + row * TILE_KEYS, key, rounded(at.n, 32));
      }
      if constexpr (P::TABLES) {
        if (by_tables()) P::Tables::weigh(p_, rows_, at.v, at.n, in_.v_dim, o_, ldo_, started_[0], coming);
      }
      if (!by_tables()) P::weigh(p_, rows_, at.v, at.n, in_.cache_dtype, in_.v_dim, o_, ldo_, started_[0], coming);
    }
    started_[0] = true;
  }

  // Whether a row's weights are relative to a base of `LazySoftmax`'s, not to the largest score.
  bool lazy() const { return P::BY_TILES || are_few(); }

  bool are_few() const { return P::FEW && rows_ <= P::FEW; }

  // A row of sums in the order of the columns.
  void settle(float* o) {
    if constexpr (P::BY_TILES) {
      if (digits()) return P::Digits::settle(o, ldo_);
      if (doubled()) return P::settle_halves(o, ldo_, s_);
      if (in_.cache_dtype != BF16T) return;
    }
    if constexpr (P::TABLES) {
      if (by_tables()) return P::Tables::settle(o, ldo_);
    }
    P::settle(o, ldo_);
  }

  bool by_tables() const {
    if constexpr (P::TABLES) return P::Tables::takes(in_, rows_);
    return false;
  }

  bool digits() const { return P::BY_TILES && in_.cache_dtype == I8T && rows_ <= P::FEW; }

  bool doubled() const {
    if constexpr (P::BY_TILES) return in_.cache_dtype == BF16T && rows_ <= P::DOUBLED && !packed_;
    return false;
  }

  // Whether all sums are. Where weights stand beside zeros, an infinity or NaN of one column makes a NaN of its neighbour.
  bool finite() const {
    Vec none = {};
    for (int64_t i = 0; i < rows_ * ldo_; i += LANES) none += load(o_ + i) * 0.0f;
    return total(none) == 0;
  }

  A* turned() { return q_ + P::FEW * d_; }

  void load_queries() {
    int64_t size = in_.dtype == F32T ? 4 : 2, filled = P::BY_TILES ? rounded(rows_, 16) : std::max(rows_, P::FEW);
    std::memset(q_, 0, filled * d_ * sizeof(A));
    for (int row = 0; row < rows_; ++row) {
      int64_t head = item_.first_head + row % item_.head_count, token = item_.first_token + row / item_.head_count;
      int64_t at = (paged_ ? start_ * in_.q_at.token : item_.sequence * in_.q_at.outer) + token * in_.q_at.token + head * in_.q_at.head;
      P::copy({static_cast<const char*>(in_.q) + at * size, 0}, in_.dtype, in_.head_dim, q_ + row * d_);
    }
    if constexpr (P::TABLES)
      if (by_tables()) return P::Tables::order(q_, rows_, d_, turned());
    if constexpr (P::BY_TILES) {
      if (rows_ > P::FEW) return;
      if (digits()) return digits_.load(q_, rows_, d_, reinterpret_cast<int8_t*>(turned()));
      Row rows[P::FEW];
      for (int i = 0; i < P::FEW; ++i) rows[i] = {reinterpret_cast<const char*>(q_ + i * d_), 0};
      P::pack_k(rows, P::FEW, BF16T, d_, turned());
    }
  }

  // What the item's scores have in common.
  void prepare() {
    scale_ = float(in_.scale);
    if (in_.k_scale_kind == 1) scale_ *= in_.k_scale[0];
    if (in_.k_scale_kind == 2) scale_ *= in_.k_scale[item_.kv_head];
    plain_ = scale_ > 0 && in_.k_scale_kind != 3 && in_.soft_cap <= 0 && !in_.alibi_slopes && !in_.bias;
    factor_ = (plain_ ? scale_ : 1.0f) * 1.44269504f;
    if constexpr (P::FEW > 0)
      if (lazy()) softmax_.clear(rows_);
  }

  // Scores of a row, number i of its block, and [from, to) of the tile's keys -> weights in p_, and what the sums so far
  // must be multiplied by.
  void soften(int row, int i, int64_t key, int64_t from, int64_t to) {
    float* s = s_ + i * TILE_KEYS;
    A* p = p_ + i * TILE_KEYS;
    masked(row, s, key, from, to);
    float scale = plain_ ? scale_ : 1.0f;
    Vec top = splat(-INF);
    for (int64_t j = from; j < to; j += LANES) top = maximum(top, load(s + j));
    float before = maximum_[row], now = std::max(before, largest(top) * scale), base = now == -INF ? 0.0f : now;
    if (plain_ && std::fabs(base) > 0x1p22f) {  // `base` is rounded: products that are not would be far from it, and above it
      for (int64_t j = from; j < to; j += LANES) store(s + j, load(s + j) * scale);
      scale = 1.0f;
    }
    Vec sum = {};
    for (int64_t j = from; j < to; j += LANES) {
      Vec x = exp_negative(load(s + j) * scale - base);
      sum += x;
      if (in_.v_scale_kind == 3) x *= load(buffers_.now->v_factor + j);
      if constexpr (std::is_same_v<A, float>) store(p + j, x);
      else store(s + j, x);
    }
    if constexpr (!std::is_same_v<A, float>) P::convert(s + from, p + from, to - from);
    alpha_[row] = before == now ? 1.0f : before == -INF ? 0.0f : std::exp(before - base);
    weight_[row] = weight_[row] * alpha_[row] + total(sum);
    maximum_[row] = now;
  }

  // The same for 32 or 64 keys; sums and earlier weights of the tile are multiplied at once where they must be.
  template <class W>
  void weigh(int row, float* s, W* p, int64_t key, int64_t from, int64_t to) {
    if constexpr (P::FEW > 0) {
      masked(row, s, key, from, to);
      const float* v_factor = in_.v_scale_kind == 3 ? buffers_.now->v_factor + from : nullptr;
      auto raise = [&](int, float by) { this->raise(row, p, from, by); };
      if (to - from == 64) softmax_.template weigh<1, 4>(row, s + from, 0, p + from, 0, factor_, v_factor, raise);
      else softmax_.template weigh<1, 2>(row, s + from, 0, p + from, 0, factor_, v_factor, raise);
    }
  }

  // Of keys [0, end).
  template <class W>
  void weigh(int row, float* s, W* p, int64_t key, int64_t end) {
    for (int64_t from = 0; from < end; from += 64) weigh(row, s, p, key, from, std::min(from + 64, end));
  }

  // Multiplies the sums of a row, and its weights in front of `from`.
  template <class W>
  [[gnu::noinline]] void raise(int row, W* p, int64_t from, float by) {
    if (started_[row / P::BLOCK]) P::Softmax::multiply(o_ + row * ldo_, ldo_, by);
    P::Softmax::multiply(p, from, by);
  }

  // Scores that a row has with keys that it may not see become -inf, after what else becomes of scores.
  void masked(int row, float* s, int64_t key, int64_t from, int64_t to) {
    int64_t query = item_.first_token + row / item_.head_count, position = query + offset_, n = buffers_.now->n;
    if (!plain_) adjust(s, item_.first_head + row % item_.head_count, query, key, from, to);
    int64_t end = in_.causal ? std::min(position + 1 - key, n) : n, begin = in_.window ? position - in_.window + 1 - key : from;
    if (begin > from) std::fill(s + from, s + std::min(begin, to), -INF);
    if (end < to) std::fill(s + std::max(end, from), s + to, -INF);
  }

  // Scores of products: scaled, capped, moved by positions and bias.
  void adjust(float* s, int64_t head, int64_t query, int64_t key, int64_t from, int64_t to) const {
    bool cap = in_.soft_cap > 0;
    float slope = in_.alibi_slopes ? in_.alibi_slopes[head] : 0.0f, inverse = cap ? float(1 / in_.soft_cap) : 0.0f;
    int64_t position = query + offset_;
    Vec lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = float(i);
    for (int64_t i = from; i < to; i += LANES) {
      Vec x = load(s + i) * scale_;
      if (in_.k_scale_kind == 3) x *= load(buffers_.now->k_factor + i);
      if (cap) x = tangent(x * inverse) * float(in_.soft_cap);
      if (slope != 0) x += (lanes + float(key + i - position)) * slope;
      store(s + i, x);
    }
    if (in_.bias) add_bias(s, head, query, key, from, std::min<int64_t>(to, buffers_.now->n));
  }

  void add_bias(float* s, int64_t head, int64_t query, int64_t key, int64_t from, int64_t to) const {
    int64_t at = item_.sequence * in_.bias_batch + head * in_.bias_head + query * in_.bias_query + key * in_.bias_key;
    int64_t step = in_.bias_key;
    if (in_.bias_dtype == BOOLT) {
      const uint8_t* bias = static_cast<const uint8_t*>(in_.bias) + at;
      for (int64_t i = from; i < to; ++i) s[i] = bias[i * step] ? s[i] : -INF;
    } else if (in_.bias_dtype == F32T) {
      const float* bias = static_cast<const float*>(in_.bias) + at;
      for (int64_t i = from; i < to; ++i) s[i] += bias[i * step];
    } else if (in_.bias_dtype == BF16T) {
      const uint16_t* bias = static_cast<const uint16_t*>(in_.bias) + at;
      for (int64_t i = from; i < to; ++i) s[i] += to_float(bias[i * step]);
    } else {
      const _Float16* bias = static_cast<const _Float16*>(in_.bias) + at;
      for (int64_t i = from; i < to; ++i) s[i] += float(bias[i * step]);
    }
  }

  void finish_all() {
    for (int row = 0; row < rows_; ++row) finish(in_, item_, row, o_ + row * ldo_, maximum_[row], weight_[row]);
  }

  void keep() {
    for (int row = 0; row < rows_; ++row) {
      int64_t at = item_.partial + row;
      std::memcpy(&partials_.sums[at * dv_], o_ + row * ldo_, dv_ * 4);
      partials_.maxima[at] = maximum_[row], partials_.weights[at] = weight_[row];
    }
  }

  const Arguments& in_;
  Partials& partials_;
  Item item_;
  int64_t d_, dv_, ldo_, start_, offset_, size_;  // ldo_: from row to row of sums; size_: bytes of one number of the cache
  int rows_;
  float scale_, factor_;  // of products; of scores, for powers of two
  bool paged_, plain_, packed_;  // plain_: scores are products, times scale_; packed_: values are, though rows be few
  Buffers<P>& buffers_;
  Parts memory_;
  A *q_, *k_, *v_, *p_;
  float *s_, *o_;
  [[no_unique_address]] typename P::Softmax softmax_;
  [[no_unique_address]] typename P::Digits digits_;
  float maximum_[P::TILE_ROWS], weight_[P::TILE_ROWS], alpha_[P::TILE_ROWS];
  bool started_[P::TILE_ROWS / P::BLOCK];  // blocks whose sums have begun
};

}  // namespace
