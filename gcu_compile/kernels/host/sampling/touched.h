// The tokens of a row that a bias or a penalty touches, and what becomes of their logits: found once, before the passes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "order.h"

class Touched {
 public:
  struct List {
    const int32_t* ids;  // ascending
    const float* values;
    int n;
  };

  // `logit(id)`: the token's, under its mask. Lists of blocks of `size` logits are wanted.
  template <class Logit>
  void find(const Arguments& in, int64_t row, int64_t size, Logit logit) {
    values_.clear(), merged_.clear();
    int64_t h = in.history_offsets ? in.history_offsets[row] : 0, end = in.history_offsets ? in.history_offsets[row + 1] : 0;
    if (in.bias_offsets && in.bias_offsets[row] < in.bias_offsets[row + 1]) {
      merge(in, row, h, end, logit);
    } else if (h < end) {
      ids_ = in.history_ids + h;
      values_.resize(end - h);
      for (int64_t j = h; j < end; ++j) values_[j - h] = logit(in.history_ids[j]);
      penalise(in, row, in.history_counts + h, values_.data(), end - h);
    }
    if (values_.empty()) return;
    begins_.resize((in.vocab + size - 1) / size + 1);
    for (size_t b = 0, at = 0; b < begins_.size(); ++b) {
      at = std::lower_bound(ids_ + at, ids_ + values_.size(), int64_t(b) * size) - ids_;
      begins_[b] = int32_t(at);
    }
  }

  List of(int64_t block) const {
    if (values_.empty()) return {nullptr, nullptr, 0};
    int32_t from = begins_[block];
    return {ids_ + from, values_.data() + from, begins_[block + 1] - from};
  }

 private:
  template <class Logit>
  void merge(const Arguments& in, int64_t row, int64_t h, int64_t end, Logit logit) {
    int64_t b = in.bias_offsets[row], last = in.bias_offsets[row + 1];
    while (b < last || h < end) {
      int32_t id = std::min(b < last ? in.bias_ids[b] : INT32_MAX, h < end ? in.history_ids[h] : INT32_MAX);
      float value = logit(id);
      for (; b < last && in.bias_ids[b] == id; ++b) {
        value += in.bias_values[b];
        if (value != value) value = -INF;  // +inf forbidden
      }
      if (h < end && in.history_ids[h] == id) penalise(in, row, in.history_counts + h++, &value, 1);
      merged_.push_back(id), values_.push_back(value);
    }
    ids_ = merged_.data();
  }

  // Rounded as in the eager meaning: the products are stored, so that none becomes a fused multiply-add.
  [[gnu::noinline]] static void penalise(const Arguments& in, int64_t row, const int32_t* counts, float* z, int64_t n) {
    constexpr int64_t SOME = 256;
    float repetition = in.repetition[row], frequency = in.frequency[row], presence = in.presence[row];
    float products[SOME];
    for (; n > 0; counts += SOME, z += SOME, n -= SOME) {
      int some = int(std::min(n, SOME));
#pragma omp simd
      for (int i = 0; i < some; ++i) products[i] = frequency * float(counts[i]);
#pragma omp simd
      for (int i = 0; i < some; ++i) {
        float value = z[i] > 0 ? z[i] / repetition : z[i] * repetition;
        value = value - products[i];
        value = value - (counts[i] > 0 ? presence : 0.0f);
        z[i] = value == value ? value : -INF;
      }
    }
  }

  const int32_t* ids_ = nullptr;
  std::vector<int32_t> merged_, begins_;  // begins_: of each block the first of its tokens, and their end
  std::vector<float> values_;
};
