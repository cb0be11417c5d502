// The passes over one row's logits, by one thread or several, and what they leave: per block maxima, masses, counts.
#pragma once

#include <omp.h>

#include "scratch.h"

class Passes {
 public:
  // `pool`: a scratch per thread that works on this row.
  Passes(const Arguments& in, int64_t row, Scratch* const* pool, int threads)
      : in_(in), row_(row), logits_(in, row), blocks_(logits_.blocks()), pool_(pool), threads_(threads), own_(*pool[0]) {
    own_.resize(blocks_);
  }

 protected:
  template <class Body>
  void each_block(Body body) {
    if (threads_ == 1) {
      for (int64_t b = 0; b < blocks_; ++b) body(b, own_.block, logits_.load(b, own_.block), own_);
      return;
    }
#pragma omp parallel num_threads(threads_)
    {
      int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
      Scratch& scratch = *pool_[t];
      for (int64_t b = blocks_ * t / of; b < blocks_ * (t + 1) / of; ++b) {
        body(b, scratch.block, logits_.load(b, scratch.block), scratch);
      }
    }
  }

  void maximum() {
    each_block([&](int64_t b, const float* z, int n, Scratch&) { own_.maxima[b] = own_.groups.take(b, z, n); });
    max_ = *std::max_element(own_.maxima.begin(), own_.maxima.end());
  }

  // The maximum and, in the same pass, the blocks' masses, for rows whose whole mass will be asked for: own_.from, by
  // quick sums in units of a value near the maximum. Whether they are good is `surveyed_`.
  void survey(float temperature) {
    int n = logits_.load(0, own_.block);
    around_ = *std::max_element(own_.block, own_.block + n);
    Weights weights(around_, temperature, -FLT_MAX, false);
    if (!weights.narrow) return maximum();
    each_block([&](int64_t b, const float* z, int n, Scratch&) {
      own_.maxima[b] = own_.groups.take(b, z, n);
      own_.from[b] = weights.quick_sum(z, n, -FLT_MAX);
    });
    max_ = *std::max_element(own_.maxima.begin(), own_.maxima.end());
    surveyed_ = Weights(max_, temperature, -FLT_MAX, false, around_).narrow;
  }

  // One pass: per block the mass from `low` on and from `high` on, the number of tokens from `high` on and in
  // [low, high), and the tokens of [low, high); returns whether they had room.
  //
  // Where masses of few tokens are asked for, those from `low` on are packed first, so that no other is weighed. A
  // gathered token's id is then that of its place in the packed block: `id_of` finds the token.
  bool scan(float low, float high, const Weights* weights) {
    for (int t = 0; t < threads_; ++t) pool_[t]->n = 0;
    const std::vector<float>& sample = own_.groups.others;
    bool packs = weights && count_from(sample.data(), int(sample.size()), low) < int64_t(sample.size()) / 2;
    packed_from_ = packs ? low : NONE;
    each_block([&](int64_t b, const float* z, int n, Scratch& scratch) {
      own_.from[b] = own_.above[b] = 0;
      own_.inside[b] = own_.beyond[b] = 0;
      if (own_.maxima[b] < low) return;
      auto take = [&](const float* values, int count, int64_t id) {
        if (weights) {
          Weights::Sums sums = weights->sums(values, count, low, high);
          own_.from[b] += sums.all, own_.above[b] += sums.above;
        }
        sift(values, count, id, low, high, scratch, own_.inside[b], own_.beyond[b]);
      };
      if (!packs) return take(z, n, b * BLOCK);
      bool few = count_from(own_.groups.maxima.data() + b * GROUPS, GROUPS, low) < GROUPS / 4;
      int64_t place = b * BLOCK;
      for (int at = 0; at < n; at += PACKED) {
        int some = pack(z + at, std::min(PACKED, n - at), low, few, scratch.packed);
        int padded = (some + GROUPS - 1) / GROUPS * GROUPS;
        std::fill(scratch.packed + some, scratch.packed + padded, -INF);
        take(scratch.packed, padded, place);
        place += some;
      }
    });
    return gather(weights);
  }

  // The id of a token that the last scan gathered.
  int64_t id_of(int64_t gathered) {
    if (!(packed_from_ <= INF)) return gathered;
    int64_t begin = gathered / BLOCK * BLOCK, left = gathered - begin;
    logits_.load(gathered / BLOCK, own_.block);
    for (int64_t at = 0;; ++at) {
      if (own_.block[at] >= packed_from_ && left-- == 0) return begin + at;
    }
  }

  // The threads' tokens of an interval, together, and their weights; whether they had room.
  bool gather(const Weights* weights) {
    for (int t = 1; t < threads_; ++t) {
      if (own_.n + pool_[t]->n > ROOM) return false;
      std::copy_n(pool_[t]->values, pool_[t]->n, own_.values + own_.n);
      std::copy_n(pool_[t]->ids, pool_[t]->n, own_.ids + own_.n);
      own_.n += pool_[t]->n;
    }
    if (own_.n > ROOM) return false;
    if (weights) weigh_candidates();
    return true;
  }

  void weigh_candidates() { weights_.each(own_.values, own_.n, own_.weights); }

  template <class T>
  static T sum(const std::vector<T>& values) {
    T s = 0;
    for (T v : values) s += v;
    return s;
  }

  // Per block the mass of a kept set, in own_.from; returns the whole. `quick`: by quick sums.
  double weigh_blocks(const Kept& kept, bool quick) {
    float tie = float_of(kept.key), from = kept.last == ALL_TIES ? tie : float_of(kept.key + 1);
    double w = weights_(tie);
    each_block([&](int64_t b, const float* z, int n, Scratch&) {
      double mass = own_.maxima[b] < from ? 0.0 : quick ? weights_.quick_sum(z, n, from) : weights_.sum(z, n, from);
      if (from != tie && b * BLOCK <= kept.last) {
        int64_t ties = 0, end = std::min<int64_t>(n, kept.last - b * BLOCK + 1);
        for (int i = 0; i < end; ++i) ties += z[i] == tie;
        mass += double(ties) * w;
      }
      own_.from[b] = mass;
    });
    return sum(own_.from);
  }

  const Arguments& in_;
  int64_t row_;
  Logits logits_;
  int64_t blocks_;
  Scratch* const* pool_;
  int threads_;
  Scratch& own_;
  Weights weights_;
  float max_ = -INF, around_ = -INF, packed_from_ = NONE;
  double total_ = -1;
  bool unsure_ = false, complete_ = false, surveyed_ = false, quick_total_ = false, blocks_weighed_ = false;
};
