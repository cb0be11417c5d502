// Where a threshold will lie, from two values of each group of the row: its maximum and one other.
//
// A group's mass is estimated as w(maximum) + size w(other), the latter unless it is the maximum: unbiased, and exact
// in the few large weights that make most of the mass. A histogram of these over [max - range, max] tells the mass and
// count from a value on; what a pass learns of an interval corrects the sampled part of it, or, where the goal is nearer
// to the interval's lower end, the sampled tokens alone tell how far. Guesses are checked by exact sums: a bad one costs a
// pass, never a wrong result.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "logits.h"
#include "stream.h"
#include "weights.h"

struct Interval {
  int32_t low, high;  // keys: low <= threshold < high
};

struct Groups {
  std::vector<float> maxima, others;  // [blocks * GROUPS]
  std::vector<float> sizes;           // [blocks]: of its groups

  void resize(int64_t blocks) {
    maxima.resize(blocks * GROUPS), others.resize(blocks * GROUPS), sizes.resize(blocks);
  }

  // Reads block b, n values and the touched ones; returns its maximum, NaN aside. `weights`, or null: puts its quick sum at
  // `mass`.
#ifdef __AVX512F__
  template <Dtype DTYPE>
  float take(int64_t b, Stream<DTYPE> stream, int n, Touched::List touched, const Weights* weights, double& mass) {
    __m512 m0 = _mm512_set1_ps(-INF), m1 = m0, m2 = m0, m3 = m0;  // in turn: they wait less for each other
    auto both = [&](int i) __attribute__((always_inline)) {
      Both v = stream.both(i);
      m0 = _mm512_max_ps(v.first, m0), m1 = _mm512_max_ps(v.second, m1);  // of NaN and a number, the second operand
      return v;
    };
    if (weights) {
      mass = weights->quick_sum32(both, n, -FLT_MAX);
    } else {
      int i = 0;
      for (; i + 2 * GROUPS <= n; i += 2 * GROUPS) {
        both(i);
        Both v = stream.both(i + GROUPS);
        m2 = _mm512_max_ps(v.first, m2), m3 = _mm512_max_ps(v.second, m3);
      }
      if (i < n) both(i);
      m0 = _mm512_max_ps(m0, m2), m1 = _mm512_max_ps(m1, m3);
    }
    for (int j = 0; j < touched.n; j += GROUPS) {
      alignas(64) float some[GROUPS];
      std::fill(std::copy_n(touched.values + j, std::min(GROUPS, touched.n - j), some), some + GROUPS, -INF);
      m0 = _mm512_max_ps(_mm512_load_ps(some), m0), m1 = _mm512_max_ps(_mm512_load_ps(some + 16), m1);
      if (weights) mass += weights->quick_sum(some, GROUPS, -FLT_MAX);
    }
    float* m = maxima.data() + b * GROUPS;
    _mm512_storeu_ps(m, m0), _mm512_storeu_ps(m + 16, m1);
    int place = int(b * 37 % (n / GROUPS)) * GROUPS;
    float* other = others.data() + b * GROUPS;
    Both v = stream.both(place);
    _mm512_storeu_ps(other, _mm512_max_ps(v.first, _mm512_set1_ps(-INF)));
    _mm512_storeu_ps(other + 16, _mm512_max_ps(v.second, _mm512_set1_ps(-INF)));
    sizes[b] = float(n / GROUPS);
    return _mm512_reduce_max_ps(_mm512_max_ps(m0, m1));
  }
#else
  float take(int64_t b, const float* z, int n, Touched::List, const Weights* weights, double& mass) {  // all are among z
    if (weights) mass = weights->quick_sum(z, n, -FLT_MAX);
    alignas(64) float m[GROUPS];
    std::copy(z, z + GROUPS, m);
    typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
    Vector m0 = *reinterpret_cast<const Vector*>(z), m1 = *reinterpret_cast<const Vector*>(z + 16);
    for (int i = GROUPS; i < n; i += GROUPS) {
      Vector v0 = *reinterpret_cast<const Vector*>(z + i), v1 = *reinterpret_cast<const Vector*>(z + i + 16);
      m0 = v0 > m0 ? v0 : m0, m1 = v1 > m1 ? v1 : m1;
    }
    std::memcpy(m, &m0, sizeof m0), std::memcpy(m + 16, &m1, sizeof m1);
    int place = int(b * 37 % (n / GROUPS)) * GROUPS;
    std::copy(m, m + GROUPS, maxima.data() + b * GROUPS);
    std::copy(z + place, z + place + GROUPS, others.data() + b * GROUPS);
    sizes[b] = float(n / GROUPS);
    return *std::max_element(m, m + GROUPS);
  }
#endif
};

class Guess {
 public:
  static constexpr int BINS = 128;
  static constexpr double SPREAD = 1.9;  // standard deviations: too narrow a guess costs a pass, a wide one its search
  static constexpr int FEW = 512;

  // By mass where `weights` are given, else by count. `max` is finite.
  Guess(const Groups& groups, float max, const Weights* weights, float floor)
      : max_(max), by_mass_(weights) {
    float least = std::min(max, least_of(groups.maxima, floor));
    if (weights) {
      least = std::min(least, least_of(groups.others, floor));
      least = std::max(least, float(max - 22.0 / weights->inverse));  // e^-22 of the largest weighs nothing
    }
    double range = std::max(double(max) - least, 1e-30 + std::fabs(double(max)) * 1e-7);
    scale_ = float(BINS / range * 0.9999);
    for (size_t b = 0; b < groups.sizes.size(); ++b) {
      const float *m = groups.maxima.data() + b * GROUPS, *z = groups.others.data() + b * GROUPS;
      alignas(64) float both[2 * GROUPS];
      for (int i = 0; i < GROUPS; ++i) {
        both[i] = m[i] >= floor ? m[i] : -INF;
        both[GROUPS + i] = z[i] >= floor && z[i] < m[i] ? z[i] : -INF;
      }
      add(both, groups.sizes[b], weights);
    }
  }

  // From a value on there are at least k tokens, for k up to a part of the groups: their maxima alone tell.
  Interval count(int64_t k, int32_t low, int32_t high, int64_t room) const {
    double groups = 0, sum = 0;
    for (const Bin& bin : bins_) groups += bin[KNOWN];
    if (double(k) * 2 > groups) return part(double(k), -1, low, high, room);
    int at = 0;
    while (at < BINS - 1 && (sum += bins_[at][KNOWN]) < double(k)) ++at;
    return {edge(at), high};
  }

  // From a value of [low, high) on the mass, or count, within comes to `goal`. `whole` is that of [low, high), to which
  // what was sampled is scaled; negative: not known.
  Interval part(double goal, double whole, int32_t low, int32_t high, int64_t room) const {
    int first = bin_of(float_of(high - 1)), at = first;
    int last = std::max(first, bin_of(std::min(float_of(low) + 0.02f / scale_, max_)));  // not one that is hardly within
    double known = 0, sampled = 0;
    for (int i = first; i <= last; ++i) known += bins_[i][KNOWN], sampled += bins_[i][SAMPLED];
    double scale = whole >= 0 && sampled > 0 ? std::max(0.0, whole - known) / sampled : 1;
    double share = std::clamp(goal / std::max(known + scale * sampled, DBL_MIN), 0.0, 1.0);
    double sum = 0, above = 0, below = 0;
    bool from_below = whole >= 0 && share >= 0.5;
    // Then the rest, whole - goal, is what to look for: its tokens weigh little each, so that a sample of them tells more
    // than one of the others, whose sum hangs on a few.
    if (from_below) goal = known + sampled - (whole - goal), scale = share = 1;
    for (; at < last && sum + mass(at, scale) < goal; ++at) sum += mass(at, scale), above += bins_[at][SQUARE];
    for (int i = at; i <= last; ++i) below += bins_[i][SQUARE];
    double spread = SPREAD * scale * std::sqrt((1 - share) * (1 - share) * above + share * share * below);
    return around(goal, spread, scale, first, last, low, high, room);
  }

 private:
  // The least value that is not below `floor`, or infinity.
  static float least_of(const std::vector<float>& values, float floor) {
    float least = INF;
    const float* z = values.data();
    int n = int(values.size());
#pragma omp simd reduction(min : least)
    for (int i = 0; i < n; ++i) {
      float some = z[i] >= floor ? z[i] : INF;
      least = some < least ? some : least;
    }
    return least;
  }

  enum { KNOWN, SAMPLED, SQUARE, COUNT };  // of a bin: the maxima's mass, the others' and its squares; added at once
  typedef double Bin __attribute__((vector_size(32)));

  void add(const float* z, float size, const Weights* weights) {
    alignas(64) int32_t at[2 * GROUPS];
    alignas(64) double w[2 * GROUPS];
    float max = max_, scale = scale_;
#pragma omp simd
    for (int i = 0; i < 2 * GROUPS; ++i) at[i] = int32_t(std::min((max - z[i]) * scale, float(BINS - 1)));
    if (weights) weights->each(z, 2 * GROUPS, w);
    else std::fill(w, w + 2 * GROUPS, 1.0);
    const double s = size;
    const Bin known{1, 0, 0, 0}, one{0, 0, 0, 1}, sampled{0, s, 0, 0}, square{0, 0, s * s, 0}, all{0, 0, 0, s};
    for (int i = 0; i < GROUPS; ++i) {
      if (z[i] != -INF) bins_[at[i]] += w[i] * known + one;
    }
    for (int i = GROUPS; i < 2 * GROUPS; ++i) {
      if (z[i] != -INF) bins_[at[i]] += w[i] * (w[i] * square + sampled) + all;
    }
  }
  int bin_of(float z) const { return z <= max_ ? int(std::min((max_ - z) * scale_, float(BINS - 1))) : 0; }
  int32_t edge(int bin) const { return key_of(max_ - (bin + 1.01f) / scale_); }

  double mass(int bin, double scale) const { return bins_[bin][KNOWN] + scale * bins_[bin][SAMPLED]; }

  // The bins of first ... last in which the sum comes to `goal`, give or take `spread`.
  Interval around(double goal, double spread, double scale, int first, int last, int32_t low, int32_t high,
                  int64_t room) const {
    double sum = 0, above = 0, inside = 0;
    int begin = first, end;
    for (; begin < last && sum + mass(begin, scale) < goal - spread; ++begin) {
      sum += mass(begin, scale), above += bins_[begin][COUNT];
    }
    for (end = begin; end < last && sum + mass(end, scale) < goal + spread; ++end) {
      sum += mass(end, scale), inside += bins_[end][COUNT];
    }
    inside += bins_[end][COUNT];
    // The whole set, if it has room; of masses, if it costs no more to weigh and search than what a part would leave.
    double whole = by_mass_ ? std::min<double>(room, FEW) : double(room);
    if (above + inside <= whole) return {end == last ? low : edge(end), high};
    while (inside > double(room) && end > begin) {  // too wide: take the ends off in turn
      if ((end - begin) % 2) inside -= bins_[end--][COUNT];
      else inside -= bins_[begin++][COUNT];
    }
    return {end == last ? low : edge(end), begin == first ? high : edge(begin - 1)};
  }

  float max_, scale_ = 1;
  bool by_mass_;
  Bin bins_[BINS] = {};
};
