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
    if (complete_) return pick(within, low, high, 0, 0, weights, reached);
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
          if (within.last != ALL_TIES) keep_candidates({within.key, place_of(within.last)}), count_candidates();
          return pick(within, l, h, above, mass_above, weights, reached);
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
  Kept pick(const Kept& within, int32_t low, int32_t high, int64_t above, double mass_above, const Weights* weights,
            Reached reached) {
    int64_t count = above;
    double mass = mass_above;
    // The values that may be the threshold, fewer each time; `count` and `mass` are those above. They are weighed once.
    float *z = own_.block, *w = nullptr;
    int n = pad(own_.values, own_.n);
    if (weights && weights->narrow) {
      w = own_.narrow_weights() + sizeof own_.values / sizeof *w;
      weights->each(own_.values, n, own_.narrow_weights());
      select_values(own_.values, n, float_of(low), NONE, w, own_.narrow_weights());
    }
    n = select_values(own_.values, n, float_of(low), NONE, z);
    auto keep = [&](float from, float to) {
      if (w) select_values(z, n, from, to, w, w);
      n = select_values(z, n, from, to, z);
    };
    while (int64_t(high) - low > 1) {
      float from = float_of(middle(low, high));
      n = pad(z, n);
      Sides found = sides(z, n, from);  // no threshold lies between the values next to `from`
      double weight = w ? sum_from(z, w, n, from) : weights ? weights->sum(z, n, from) : 0;
      if (reached(count + found.count, mass + weight)) {
        low = key_of(found.least);
        keep(from, NONE);
      } else {
        high = std::max(low, key_of(found.most)) + 1, count += found.count, mass += weight;
        keep(float_of(low), from);
      }
    }
    float tie = float_of(low);
    double one = weights ? (*weights)(tie) : 0;
    Kept kept{low, -1};
    int ties = 0;
    while (ties < n && (ties == 0 || !reached(count + ties, mass))) ++ties, mass += one;
    if (ties > 0) kept.last = own_.ids[nth(own_.values, tie, float_of(low + 1), ties)];
    if (complete_) keep_candidates(kept);
    else if (total_ >= 0) add_candidates(kept);
    if (kept.last >= 0) kept.last = id_of(kept.last);
    return kept;
  }

  void keep_candidates(const Kept& kept) {
    int32_t last = int32_t(std::min<int64_t>(kept.last, INT32_MAX));
    own_.n = select_tokens(own_.values, own_.ids, own_.n, float_of(kept.key), last);
  }

  // Adds the kept ones to what a pass left of each block: the masses from the interval's upper end on.
  void add_candidates(const Kept& kept) {
    float tie = float_of(kept.key), from = float_of(kept.key + 1);
    double w = weights_(tie);
    const float* z = own_.values;
    const int32_t* ids = own_.ids;
    int32_t last = int32_t(kept.last);
    int begin = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      int end = begin + int(own_.inside[b]);
      int32_t ties = 0;
#pragma omp simd reduction(+ : ties)
      for (int i = begin; i < end; ++i) ties += (z[i] == tie) & (ids[i] <= last) ? 1 : 0;
      own_.above[b] += double(ties) * w;
      if (weights_.narrow) {
        own_.above[b] += sum_from(z + begin, own_.narrow_weights() + begin, end - begin, from);
        begin = end;
      }
      for (; begin < end; begin += std::min(PACKED, end - begin)) {
        int n = std::min(PACKED, end - begin);
        std::copy_n(z + begin, n, own_.packed);
        own_.above[b] += weights_.sum(own_.packed, pad(own_.packed, n), from);
      }
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
    return id_of(own_.ids[walk(own_.n, u, 0, 0, [](int, int) {})]);
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
    float tie = float_of(kept.key);
    int last = int(std::clamp<int64_t>(kept.last - b * BLOCK, -1, BLOCK));
    return b * BLOCK + walk(own_.n, u, before, own_.from[b], [&](int begin, int n) {
      const float* z = own_.block + begin;
      double* w = own_.weights + begin;
      weights_.each(z, n, w);
      for (int i = 0; i < n; ++i) w[i] = (z[i] > tie) | ((z[i] == tie) & (begin + i <= last)) ? w[i] : 0.0;
    });
  }

  // The place among own_.weights[0 .. n), in total_ by `block`, at which the sum, `before` at first, exceeds u * total_.
  // `weigh(begin, some)` puts `some` of them there, from `begin` on.
  template <class Weigh>
  int walk(int n, double u, double before, double block, Weigh weigh) {
    constexpr int STEP = 64;
    const double* w = own_.weights;
    int at = 0, some = 0;
    double cumulative = before;
    for (; at + STEP < n; at += STEP) {
      double step = 0;
      weigh(at, STEP);
#pragma omp simd reduction(+ : step)
      for (int i = 0; i < STEP; ++i) step += w[at + i];
      if (cumulative + step > u * total_) break;
      if (step > 0) some = at;
      cumulative += step;
    }
    if (at + STEP >= n) weigh(at, n - at);
    for (int i = some; i < at; ++i) if (w[i] > 0) some = i;  // the last one that weighs, should rounding end the walk
    // Quick sums of whole blocks err by the same share each, as weights do.
    auto over = [&](double mass) { return excess(mass, u, block + (1 - u) * mass + u * (total_ - mass)); };
    over(cumulative);  // sure that the steps before are too little
    for (int weighed = std::min(at + STEP, n); at < n; ++at) {
      if (at == weighed) weigh(at, std::min(STEP, n - at)), weighed += STEP;
      if (w[at] == 0) continue;
      some = at;
      if (over(cumulative += w[at]) > 0) break;
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
