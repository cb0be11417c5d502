// Speculative decoding: a draft token against the target's distribution. See sampling/rejection_eager.py.
#pragma once

#include "philox.h"
#include "scratch.h"

class Verify {
 public:
  Verify(const Arguments& in, int64_t row, const Logits& logits, const Weights& weights, const Kept& kept,
         Scratch& scratch)
      : in_(in), row_(row), logits_(logits), weights_(weights), kept_(kept), scratch_(scratch),
        draft_(in.draft_ids[row]), q_(in.draft_probabilities + row * in.vocab) {
    weights_.narrow = false;
  }

  int64_t token() {
    double total = 0, p = 0;
    each([&](int64_t id, double w) { total += w, p += id == draft_ ? w : 0.0; });
    p /= total;
    double q = q_[draft_], u = uniform(in_.seeds[row_], in_.positions[row_], 1);
    if (q > 0 && p >= u * q) return draft_;
    double rest = 0;
    each([&](int64_t id, double w) { rest += left(w / total, id); });
    if (rest == 0) return draft_;  // nothing else is left: rounding
    double goal = uniform(in_.seeds[row_], in_.positions[row_]) * rest, sum = 0;
    int64_t chosen = -1, some = draft_;
    each([&](int64_t id, double w) {
      if (chosen >= 0) return;
      double r = left(w / total, id);
      if (r > 0) some = id;
      if ((sum += r) > goal) chosen = id;
    });
    return chosen >= 0 ? chosen : some;
  }

 private:
  double left(double p, int64_t id) const { return std::max(p - double(q_[id]), 0.0); }

  template <class Body>
  void each(Body body) {
    for (int64_t b = 0; b < logits_.blocks(); ++b) {
      if (key_of(scratch_.maxima[b]) < kept_.key) continue;
      int n = logits_.load(b, scratch_.block);
      weights_.each(scratch_.block, n, scratch_.weights);
      for (int i = 0; i < n; ++i) {
        if (kept_(scratch_.block[i], b * BLOCK + i)) body(b * BLOCK + i, scratch_.weights[i]);
      }
    }
  }

  const Arguments& in_;
  int64_t row_;
  const Logits& logits_;
  Weights weights_;
  Kept kept_;
  Scratch& scratch_;
  int64_t draft_;
  const float* q_;
};
