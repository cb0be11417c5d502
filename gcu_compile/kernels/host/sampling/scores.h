// gcu::logprobs for one row: scores of given tokens, of the `count` best, and the first given one's rank.
//
// A score is z / T or its log-probability among the kept tokens. Best comes first; equal logits stand in ascending order
// of ids, and tokens that are cut behind all others. No array of the vocabulary's size is made but for `count` of that
// size: the k-th largest of the groups' maxima bounds what can be among the k best.
#pragma once

#include "row.h"

// 8 bytes a field, in the order of SCORED in host/sample.py.
struct Scored {
  const int64_t* tokens;  // [rows, given]
  int64_t given, count;
  int64_t normalised;
  int32_t* ids;    // [rows, given + count], written
  float* scores;   // [rows, given + count], written
  int64_t* ranks;  // [rows], written
};

class Scores : public Row {
 public:
  using Row::Row;

  void write_to(const Scored& out) {
    maximum();
    float t = in_.temperature ? in_.temperature[row_] : 1.0f;
    temperature_ = t >= GREEDY ? t : 1.0f;  // greedy rows show their logits
    kept_ = max_ == -INF ? Kept{INT32_MAX, -1} : settle(temperature_);
    if (max_ > -INF && out.normalised) {
      weights_.narrow = weights_.narrow && in_.vocab > BLOCK;
      normaliser_ = std::log(weigh_blocks(kept_, true) / weights_(max_));
    }
    int64_t width = out.given + out.count, *rank = out.ranks + row_;
    int32_t* ids = out.ids + row_ * width;
    float* scores = out.scores + row_ * width;
    for (int64_t i = 0; i < out.given; ++i) {
      int64_t id = out.tokens[row_ * out.given + i], b = id / BLOCK;
      logits_.load(b, own_.block);
      float z = own_.block[id - b * BLOCK];
      ids[i] = int32_t(id), scores[i] = score(z, id, out.normalised);
      if (i == 0) *rank = kept_(z, id) ? rank_of(z) : in_.vocab;
    }
    std::vector<Token> best = find(std::min(out.count, in_.vocab));
    for (size_t i = 0; i < best.size(); ++i) {
      ids[out.given + i] = best[i].id;
      scores[out.given + i] = score(float_of(best[i].key), best[i].id, out.normalised);
    }
    for (int64_t id = 0, i = out.given + best.size(); i < width; ++id) {  // those that are cut, by id
      logits_.load(id / BLOCK, own_.block);
      int64_t end = std::min<int64_t>((id / BLOCK + 1) * BLOCK, in_.vocab);
      for (int64_t at = id; at < end && i < width; ++at) {
        if (!kept_(own_.block[at % BLOCK], at)) ids[i] = int32_t(at), scores[i++] = -INF;
      }
      id = end - 1;
    }
  }

 private:
  struct Token {
    int32_t key, id;
    bool operator<(const Token& other) const { return key > other.key || (key == other.key && id < other.id); }
  };

  float score(float z, int64_t id, bool normalised) const {
    if (!kept_(z, id)) return -INF;
    if (!normalised) return z / temperature_;
    double above = z == max_ ? 0.0 : (double(z) - double(max_)) / double(temperature_);
    return float(above - normaliser_);
  }

  // Kept tokens that are not below z, itself among them.
  int64_t rank_of(float z) {
    each_block(1, [&](int64_t b, const float* block, int n, Scratch&) {
      own_.inside[b] = 0;
      if (own_.maxima[b] < z) return;
      if (key_of(z) > kept_.key || kept_.last >= (b + 1) * BLOCK) own_.inside[b] = count_from(block, n, z);
      else for (int i = 0; i < n; ++i) own_.inside[b] += block[i] >= z && kept_(block[i], b * BLOCK + i);
    });
    return sum(own_.inside);
  }

  // The k best kept tokens, or all if there are fewer.
  std::vector<Token> find(int64_t k) {
    std::vector<Token> found;
    if (k == 0) return found;
    std::vector<float> maxima = own_.groups.maxima;
    float least = float_of(kept_.key);
    if (k <= int64_t(maxima.size())) {
      std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
      least = std::max(least, maxima[k - 1]);
    }
    int64_t ties = 0;  // of `least`: the first k by id are enough
    for (int64_t b = 0; b < blocks_; ++b) {
      if (own_.maxima[b] < least) continue;
      int n = logits_.load(b, own_.block);
      for (int i = 0; i < n; ++i) {
        float z = own_.block[i];
        if (!(z >= least) || !kept_(z, b * BLOCK + i) || (z == least && ++ties > k)) continue;
        found.push_back({key_of(z), int32_t(b * BLOCK + i)});
      }
    }
    size_t size = std::min<size_t>(k, found.size());
    std::partial_sort(found.begin(), found.begin() + size, found.end());
    found.resize(size);
    return found;
  }

  Kept kept_{};
  float temperature_ = 1;
  double normaliser_ = 0;  // log of the kept mass, the largest weight being 1
};
