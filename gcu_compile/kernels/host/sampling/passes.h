// The passes over one row's logits, by one thread or several, and what they leave: per block maxima, masses, counts.
#pragma once

#include <omp.h>

#include "scratch.h"

// What is worth waking a second thread for, in logits that are compared; to weigh one costs as much as WEIGHED of them.
#ifdef __AVX512F__
constexpr int64_t WORTH_SPLITTING = 1 << 17;
#else
constexpr int64_t WORTH_SPLITTING = 1 << 15;
#endif
constexpr int WEIGHED = 4;

class Passes {
 public:
  // `pool`: a scratch per thread that works on this row.
  Passes(const Arguments& in, int64_t row, Scratch* const* pool, int threads)
      : in_(in), row_(row), logits_(in, row, pool[0]->touched), blocks_(logits_.blocks()), pool_(pool), threads_(threads), own_(*pool[0]) {
    own_.resize(blocks_);
  }

 protected:
  // `cost` of a logit: of comparing it, WEIGHED where all are weighed.
  template <class Body>
  void each_index(int cost, Body body) {
    if (threads_ == 1 || in_.vocab * cost < WORTH_SPLITTING) {
      for (int64_t b = 0; b < blocks_; ++b) body(b, own_);
      return;
    }
#pragma omp parallel num_threads(threads_)
    {
      int64_t t = omp_get_thread_num(), of = omp_get_num_threads();
      for (int64_t b = blocks_ * t / of; b < blocks_ * (t + 1) / of; ++b) body(b, *pool_[t]);
    }
  }
  template <class Body>
  void each_block(int cost, Body body) {
    each_index(cost, [&](int64_t b, Scratch& scratch) {
      int n = logits_.load(b, scratch.block);
      body(b, scratch.block, n, scratch);
    });
  }

  // Reads block b: its maximum and groups, and with `weights` its mass, in own_.from.
  void read(int64_t b, Scratch& scratch, const Weights* weights) {
    auto take = [&](auto at, int n, Touched::List touched) {
      own_.maxima[b] = own_.groups.take(b, at, n, touched, weights, own_.from[b]);
    };
#ifdef __AVX512F__
    if (!logits_.wide()) {
      Logits::Narrow block = logits_.narrow(b, scratch.block, true);
      return with_stream(block.at, logits_.dtype(), [&](auto stream) { take(stream, block.n, block.touched); });
    }
    if (const void* plain = logits_.plain(b)) return take(Stream<F32>{static_cast<const char*>(plain)}, BLOCK, {});
#endif
    int n = logits_.load(b, scratch.block);
    take(stream_of(scratch.block), n, {});
  }

  // The first pass: maxima, groups, and with `weights` each block's mass, in own_.from.
  void first_pass(const Weights* weights) {
    each_index(weights ? WEIGHED : 1, [&](int64_t b, Scratch& scratch) { read(b, scratch, weights); });
    max_ = *std::max_element(own_.maxima.begin(), own_.maxima.end());
  }

  void maximum() { first_pass(nullptr); }

  // The maximum and, in the same pass, the blocks' masses, for rows whose whole mass will be asked for: own_.from, by
  // quick sums in units of a value near the maximum. Whether they are good is `surveyed_`.
  void survey(float temperature) {
    read(0, own_, nullptr);
    around_ = own_.maxima[0];
    Weights weights(around_, temperature, -FLT_MAX, false);
    if (!weights.narrow) return maximum();
    first_pass(&weights);
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
    each_index(!weights ? 1 : packs ? 2 : WEIGHED, [&](int64_t b, Scratch& scratch) {
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
#ifdef __AVX512F__
      if (!weights && !logits_.wide() && hits(b, low) < GROUPS * 3 / 4) return sift_hits(b, low, high, scratch);
#endif
      if (!packs) {
        int n = logits_.load(b, scratch.block);
        return take(scratch.block, n, b * BLOCK);
      }
      bool few = hits(b, low) < GROUPS / 4;
      int64_t place = b * BLOCK;
      auto take_packed = [&](int some) {
        take(scratch.packed, pad(scratch.packed, some), place);
        place += some;
      };
#ifdef __AVX512VBMI2__
      if (const void* plain = logits_.wide() ? nullptr : logits_.plain(b)) {
        uint16_t* found = reinterpret_cast<uint16_t*>(scratch.block);
        int m = (few ? pack16<true> : pack16<false>)(plain, BLOCK, logits_.dtype(), low, found);
        with_stream(found, logits_.dtype(), [&](auto stream) {
          for (int begin = 0; begin < m; begin += PACKED) {
            int some = std::min(PACKED, m - begin);
            for (int i = 0; i < some; i += 16) _mm512_storeu_ps(scratch.packed + i, stream.at(begin + i));
            take_packed(some);
          }
        });
        return;
      }
#endif
      int n = logits_.load(b, scratch.block);
      for (int at = 0; at < n; at += PACKED) {
        take_packed((few ? pack<true> : pack<false>)(scratch.block + at, std::min(PACKED, n - at), low, scratch.packed));
      }
    });
    return gather();
  }

  // How many groups of block b have a token from `low` on.
  int64_t hits(int64_t b, float low) const { return count_from(own_.groups.maxima.data() + b * GROUPS, GROUPS, low); }

#ifdef __AVX512F__
  // Sifts those of block b's 16-bit logits that stand near one from `low` on. What a touched token was before may be one.
  void sift_hits(int64_t b, float low, float high, Scratch& scratch) {
    Logits::Narrow block = logits_.narrow(b, scratch.block, false);
    const Touched::List touched = block.touched;
    int64_t begin = b * BLOCK;
    int j = 0;  // touched ones before it are done with
    with_stream(block.at, logits_.dtype(), [&](auto stream) {
      auto take = [&](int i) {
        float* z = scratch.packed;
        _mm512_store_ps(z, stream.at(i)), _mm512_store_ps(z + 16, stream.at(i + 16));
        for (; j < touched.n && touched.ids[j] < begin + i + GROUPS; ++j) {
          if (touched.ids[j] >= begin + i) z[touched.ids[j] - begin - i] = touched.values[j];
        }
        sift(z, GROUPS, begin + i, low, high, scratch, own_.inside[b], own_.beyond[b]);
      };
      auto take_touched = [&](int end) {  // those before place `end`
        while (j < touched.n && touched.ids[j] < begin + end) {
          if (touched.values[j] >= low) take(int(touched.ids[j] - begin) / GROUPS * GROUPS);
          else ++j;
        }
      };
      each_hit(block.at, block.n, logits_.dtype(), low, [&](int i) { take_touched(i), take(i); });
      take_touched(block.n);
    });
  }
#endif

  // The id of a token that the last scan gathered.
  int64_t id_of(int64_t gathered) {
    if (!(packed_from_ <= INF)) return gathered;
    int64_t begin = gathered / BLOCK * BLOCK;
    logits_.load(gathered / BLOCK, own_.block);
    return begin + nth(own_.block, packed_from_, NONE, int(gathered - begin) + 1);
  }

  // What a scan that gathers the token `id` calls it; for one that it does not, the one before it.
  int64_t place_of(int64_t id) {
    if (!(packed_from_ <= INF)) return id;
    int64_t begin = id / BLOCK * BLOCK;
    int n = logits_.load(id / BLOCK, own_.block);
    return begin + count_from(own_.block, int(std::min<int64_t>(n, id - begin + 1)), packed_from_) - 1;
  }

  // The threads' tokens of an interval, together; whether they had room.
  bool gather() {
    for (int t = 1; t < threads_; ++t) {
      if (own_.n + pool_[t]->n > ROOM) return false;
      std::copy_n(pool_[t]->values, pool_[t]->n, own_.values + own_.n);
      std::copy_n(pool_[t]->ids, pool_[t]->n, own_.ids + own_.n);
      own_.n += pool_[t]->n;
    }
    return own_.n <= ROOM;
  }

  void count_candidates() {
    std::fill(own_.inside.begin(), own_.inside.end(), 0);
    for (int i = 0; i < own_.n; ++i) ++own_.inside[own_.ids[i] / BLOCK];
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
    each_block(WEIGHED, [&](int64_t b, const float* z, int n, Scratch&) {
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
