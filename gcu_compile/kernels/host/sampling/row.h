// One row: from logits to a token id. The meaning is that of sampling/eager.py.
//
//   maximum, two values of each group, and, where the whole mass matters, each block's   one pass over memory
//   top-k / top-p: an interval that holds the threshold is guessed; one pass counts and weighs what is
//     above it and gathers the few tokens inside, which are then searched
//   one uniform number walks the blocks' weights, then one block's tokens
//
// Masses are first sums of float32 weights with a proven error (weights.h). A comparison that comes nearer than the
// error makes the row `unsure`, and it is done again in float64: the result is always the one of float64.
#pragma once

#include "passes.h"
#include "philox.h"
#include "verify.h"

constexpr float GREEDY = 1e-5f;  // temperatures below mean greedy, as in vLLM

class Row : public Passes {
 public:
  using Passes::Passes;

  int64_t sample() {
    float temperature = in_.temperature ? in_.temperature[row_] : 0.0f;
    bool greedy = !(temperature >= GREEDY);
    if (greedy || limits_count() || in_.draft_probabilities || (in_.min_p && in_.min_p[row_] > 0)) maximum();
    else survey(temperature);
    if (max_ == -INF) return write(Kept{INT32_MAX, -1}), 0;  // nothing left: documented as id 0
    if (greedy) return first_of_maximum();
    int64_t id = chain(temperature, false);
    return unsure_ ? chain(temperature, true) : id;
  }

 protected:
  int64_t chain(float temperature, bool exact) {
    Kept kept = cut(temperature, exact);
    write(kept);
    if (in_.draft_probabilities) return Verify(in_, row_, logits_, weights_, kept, own_).token();
    double u = uniform(in_.seeds[row_], in_.positions[row_]);
    return complete_ ? draw_candidates(u) : draw_blocks(kept, u);
  }

  bool limits_count() const { return in_.top_k && in_.top_k[row_] > 0 && in_.top_k[row_] < in_.vocab; }

  // What min-p, top-k and top-p keep.
  Kept cut(float temperature, bool exact) {
    bool surveyed = surveyed_ && !exact && max_ < INF;
    unsure_ = complete_ = false, blocks_weighed_ = quick_total_ = surveyed;
    total_ = surveyed ? sum(own_.from) : -1;
    weights_ = Weights(max_, temperature, -FLT_MAX, true);
    float floor = std::max(-FLT_MAX, min_p_floor());
    weights_ = Weights(max_, temperature, floor, exact || max_ == INF, surveyed ? around_ : max_);
    Kept kept{key_of(floor), ALL_TIES};
    double p = in_.top_p ? in_.top_p[row_] : 1.0;
    if (limits_count()) kept = limit_count(kept, in_.top_k[row_]);
    return p < 1.0 ? limit_mass(kept, p) : kept;
  }

  Kept settle(float temperature) {
    Kept kept = cut(temperature, false);
    return unsure_ ? cut(temperature, true) : kept;
  }

  int64_t first_of_maximum() {
    int64_t b = std::find(own_.maxima.begin(), own_.maxima.end(), max_) - own_.maxima.begin();
    int n = logits_.load(b, own_.block);
    int64_t id = b * BLOCK + (std::find(own_.block, own_.block + n, max_) - own_.block);
    write(Kept{key_of(max_), id});
    return id;
  }

  // The smallest z whose probability is at least min_p of the largest.
  float min_p_floor() const {
    double p = in_.min_p ? in_.min_p[row_] : 0.0;
    if (!(p > 0)) return -INF;
    if (p >= 1 || max_ == INF) return max_;
    float z = std::min(float(double(max_) + std::log(p) / weights_.inverse), max_);
    while (weights_.exact(z) < p) z = std::nextafterf(z, INF);
    while (z > -FLT_MAX && weights_.exact(std::nextafterf(z, -INF)) >= p) z = std::nextafterf(z, -INF);
    return z;
  }

  Kept limit_count(const Kept& within, int64_t k) {
    return select(within, nullptr, [k](int64_t count, double) { return count >= k; },
                  [k](const Guess& guess, int32_t low, int32_t high) { return guess.count(k, low, high, ROOM_USED); },
                  double(k));
  }

  Kept limit_mass(const Kept& within, double p) {
    if (complete_) {  // few tokens: float64 at once
      weights_.narrow = false;
      weigh_candidates();
      total_ = 0;
      for (int i = 0; i < own_.n; ++i) total_ += own_.weights[i];
    } else if (total_ < 0) {
      total_ = weigh_blocks(within, false);
    }
    double shared = quick_total_ ? total_ : 0;
    blocks_weighed_ = false;
    double goal = p * total_;
    return select(within, &weights_, [&](int64_t count, double mass) { return count > 0 && excess(mass, p, shared) >= 0; },
                  [&](const Guess& guess, int32_t low, int32_t high) {
                    return guess.part(goal, total_, low, high, ROOM_USED);
                  }, goal);
  }

  // The sign of mass - share * total_. Both sums hold the same weights, so that an error in one is an error in the
  // other: what counts is (1 - share) * mass against share * rest.
  // `shared`: mass that the whole knows by a quick sum and `mass` by another.
  double excess(double mass, double share, double shared = 0) {
    if (!weights_.narrow) return mass - share * total_;
    double in = (1 - share) * mass, out = share * (total_ - mass);
    double error = Weights::ERROR * (std::fabs(in) + std::fabs(out)) + Weights::ROUNDED * shared;
    error += total_ * double(BLOCK + blocks_) * 0x1p-53;
    if (std::fabs(in - out) <= error) unsure_ = true;
    return in - out;
  }

  // The shortest prefix, by descending z and ascending id, of the set `within` that `reached(count, mass)`.
  // `weights`: null where only counts matter. `guess_of(guess, low, high)` gives a first interval; the others follow
  // from `goal`, the mass or count at which it is reached.
  template <class Reached, class GuessOf>
  Kept select(const Kept& within, const Weights* weights, Reached reached, GuessOf guess_of, double goal) {
    int32_t low = within.key, high = key_of(max_) + 1;  // low <= threshold < high
    if (complete_) return pick(within, low, high, 0, 0, reached);
    int64_t count_low = INT64_MAX, count_high = 0;
    double from_low = weights ? total_ : -1, from_high = 0;  // masses or counts
    Interval next{high - 1, high};
    alignas(Guess) char memory[sizeof(Guess)];
    const Guess* guess = nullptr;
    if (max_ < INF && int64_t(high) - low > 1) {
      guess = new (memory) Guess(own_.groups, max_, weights, float_of(low));
      next = guess_of(*guess, low, high);
    }
    for (int tries = 0;; ++tries) {
      int32_t l = std::clamp(next.low, low, high - 1), h = std::clamp(next.high, l + 1, high);
      bool fits = scan(float_of(l), h == key_of(max_) + 1 ? NONE : float_of(h), weights);
      int64_t above = sum(own_.beyond), from = above + sum(own_.inside);
      double mass_above = sum(own_.above), mass_from = sum(own_.from);
      if (h < high && reached(above, mass_above)) {
        low = h, count_low = above, from_low = weights ? mass_above : double(above);
      } else if (l == low || reached(from, mass_from)) {
        if (fits) {
          complete_ = count_high == 0 && above == 0;
          return pick(within, l, h, above, mass_above, reached);
        }
        if (int64_t(h) - l == 1) return split_ties(within, l, above, mass_above, reached);
        low = l, count_low = from, from_low = weights ? mass_from : double(from);
        high = h, count_high = above, from_high = weights ? mass_above : double(above);
        guess = nullptr;  // it was wrong about the room: by halves from here on
      } else {
        high = l, count_high = from, from_high = weights ? mass_from : double(from);
      }
      if (count_low - count_high <= ROOM) next = {low, high};
      else if (tries > 3 || !guess) next = {middle(low, high), high};
      else next = guess->part(goal - from_high, from_low < 0 ? -1 : from_low - from_high, low, high, ROOM_USED);
    }
  }

  // Searches the gathered tokens, all those of [low, high); `above` and `mass_above` are those from `high` on.
  template <class Reached>
  Kept pick(const Kept& within, int32_t low, int32_t high, int64_t above, double mass_above, Reached reached) {
    if (within.last != ALL_TIES) keep_candidates(within);
    int64_t count = above;
    double mass = mass_above;
    int n = own_.n;
    const float* z = own_.values;
    const double* w = own_.weights;
    while (int64_t(high) - low > 1) {
      float from = float_of(middle(low, high));
      int32_t some = 0;
      double weight = 0;
      float least = INF, most = -INF;  // the values next to `from` on either side: no threshold lies between
#pragma omp simd reduction(+ : some, weight) reduction(min : least) reduction(max : most)
      for (int i = 0; i < n; ++i) {
        bool in = z[i] >= from;
        some += in ? 1 : 0;
        weight += in ? w[i] : 0.0;
        float up = in ? z[i] : INF, down = in ? -INF : z[i];
        least = up < least ? up : least;
        most = down > most ? down : most;
      }
      if (reached(above + some, mass_above + weight)) low = key_of(least);
      else high = std::max(low, key_of(most)) + 1, count = above + some, mass = mass_above + weight;
    }
    float tie = float_of(low);
    Kept kept{low, -1};
    for (int i = 0; i < n; ++i) {
      if (z[i] != tie) continue;
      mass += w[i], kept.last = own_.ids[i];
      if (reached(++count, mass)) break;
    }
    if (complete_) keep_candidates(kept);
    else if (total_ >= 0) add_candidates(kept);
    if (kept.last >= 0) kept.last = id_of(kept.last);
    return kept;
  }

  void keep_candidates(const Kept& kept) {
    int m = 0;
    for (int i = 0; i < own_.n; ++i) {
      own_.values[m] = own_.values[i], own_.ids[m] = own_.ids[i], own_.weights[m] = own_.weights[i];
      m += kept(own_.values[i], own_.ids[i]);
    }
    own_.n = m;
  }

  // Adds the kept ones to what a pass left of each block: the masses from the interval's upper end on.
  void add_candidates(const Kept& kept) {
    float tie = float_of(kept.key);
    const float* z = own_.values;
    const double* w = own_.weights;
    const int32_t* ids = own_.ids;
    int32_t last = int32_t(kept.last);
    for (int i = 0; i < own_.n;) {
      int64_t b = ids[i] / BLOCK;
      int end = int(std::lower_bound(ids + i, ids + own_.n, (b + 1) * BLOCK) - ids);
      double mass = 0;
#pragma omp simd reduction(+ : mass)
      for (int j = i; j < end; ++j) mass += (z[j] > tie) | ((z[j] == tie) & (ids[j] <= last)) ? w[j] : 0.0;
      own_.above[b] += mass;
      i = end;
    }
    own_.from.swap(own_.above);
    blocks_weighed_ = true;
  }

  // All tokens of the interval have one value: they are taken by id until it is enough.
  template <class Reached>
  Kept split_ties(const Kept& within, int32_t key, int64_t count, double mass, Reached reached) {
    float z = float_of(key);
    double w = weights_(z);
    Kept kept{key, -1};
    int64_t end = key == within.key ? within.last : ALL_TIES;
    for (int64_t b = 0; b < blocks_ && b * BLOCK <= end; ++b) {
      if (own_.maxima[b] < z) continue;
      int n = logits_.load(b, own_.block);
      int64_t ties = count_from(own_.block, n, z) - count_from(own_.block, n, std::nextafterf(z, INF));
      if (z == INF) ties = count_from(own_.block, n, z);
      if (ties == 0) continue;
      if (end >= (b + 1) * BLOCK && !reached(count + ties, mass + double(ties) * w)) {  // a whole block at once
        count += ties, mass += double(ties) * w;
        kept.last = b * BLOCK + n - 1;
        continue;
      }
      for (int i = 0; i < n && b * BLOCK + i <= end; ++i) {
        if (own_.block[i] != z) continue;
        kept.last = b * BLOCK + i;
        mass += w;
        if (reached(++count, mass)) return kept;
      }
    }
    return kept;
  }

  // The first token whose cumulative weight exceeds u times the whole, among the gathered ones: all that are kept.
  int64_t draw_candidates(double u) {
    weights_.narrow = false;
    weigh_candidates();
    total_ = 0;
    for (int i = 0; i < own_.n; ++i) total_ += own_.weights[i];
    return id_of(own_.ids[walk(own_.n, u, 0, 0)]);
  }

  int64_t draw_blocks(const Kept& kept, double u) {
    total_ = blocks_weighed_ ? sum(own_.from) : weigh_blocks(kept, true);
    double before = 0;
    int64_t b = 0, some = 0;
    for (; b < blocks_; ++b) {
      if (own_.from[b] > 0) some = b;
      if (before + own_.from[b] > u * total_) break;
      before += own_.from[b];
    }
    if (b == blocks_) b = some, before -= own_.from[b];  // rounding of the last sum
    own_.n = logits_.load(b, own_.block);
    weights_.each(own_.block, own_.n, own_.weights);
    for (int i = 0; i < own_.n; ++i) own_.weights[i] = kept(own_.block[i], b * BLOCK + i) ? own_.weights[i] : 0.0;
    return b * BLOCK + walk(own_.n, u, before, own_.from[b]);
  }

  // The place among own_.weights[0 .. n), in total_ by `block`, at which the sum, `before` at first, exceeds u * total_.
  int walk(int n, double u, double before, double block) {
    constexpr int STEP = 64;
    const double* w = own_.weights;
    int at = 0, some = 0;
    double cumulative = before;
    for (; at + STEP < n; at += STEP) {
      double step = 0;
#pragma omp simd reduction(+ : step)
      for (int i = 0; i < STEP; ++i) step += w[at + i];
      if (cumulative + step > u * total_) break;
      if (step > 0) some = at;
      cumulative += step;
    }
    for (int i = some; i < at; ++i) if (w[i] > 0) some = i;  // the last one that weighs, should rounding end the walk
    excess(cumulative, u, block);  // sure that the steps before are too little
    for (; at < n; ++at) {
      if (w[at] == 0) continue;
      some = at;
      if (excess(cumulative += w[at], u, block) > 0) break;
    }
    return some;
  }

  void write(const Kept& kept) {
    if (!in_.kept) return;
    uint8_t* out = in_.kept + row_ * in_.vocab;
    for (int64_t b = 0; b < blocks_; ++b) {
      logits_.load(b, own_.block);
      int64_t n = std::min<int64_t>(BLOCK, in_.vocab - b * BLOCK);
      for (int i = 0; i < n; ++i) out[b * BLOCK + i] = kept(own_.block[i], b * BLOCK + i);
    }
  }
};
