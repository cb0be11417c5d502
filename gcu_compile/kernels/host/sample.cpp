// Sampling without a sort: one row of logits -> one token id. See sampling/eager.py for the meaning.
//
//   load a block of logits into L1 as float32, adjusted (mask, bias, penalties)
//   -> maximum -> threshold of top-k / top-p by counting and weighing inside a shrinking interval
//   -> one uniform number walks the blocks' weights, then one block's tokens
//
// The vocabulary is never copied: every pass adjusts it again, block by block. Weights exp((z - max) / T) are
// float64, so that the kept set is the one of a float64 sort. Intervals come from a sample of the row and are
// checked by exact counts; a bad guess costs a pass, never a wrong result.

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int BLOCK = 4096;       // logits per block: 16 KiB of float32, half of an L1 cache
constexpr int SAMPLES = 1024;     // values of a row from which intervals are guessed
constexpr int CANDIDATES = 4096;  // an interval with no more than this is gathered and searched directly
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float GREEDY = 1e-5f;  // temperatures below mean greedy, as in vLLM

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

}  // namespace

// Field order is that of `Arguments` in host/sample.py. Null pointers stand for "not asked for".
struct Arguments {
  const void* logits;  // [rows, vocab], `stride` elements from row to row
  int64_t rows, vocab, stride;
  int32_t dtype, threads;
  const float* temperature;  // [rows]
  const int32_t* top_k;      // [rows]; 0 or >= vocab: all
  const float* top_p;        // [rows]
  const float* min_p;        // [rows]
  const uint8_t* forbidden;  // [rows, vocab]
  const int64_t* bias_offsets;     // [rows + 1]
  const int32_t* bias_ids;         // ascending within a row
  const float* bias_values;
  const int64_t* history_offsets;  // [rows + 1]
  const int32_t* history_ids;      // ascending and unique within a row
  const int32_t* history_counts;   // occurrences in the output; 0: only in the prompt
  const float *repetition, *frequency, *presence;  // [rows]
  const int64_t *seeds, *positions;  // [rows]: key and counter of the row's random number
  int64_t* ids;           // [rows], written
  uint8_t* kept;          // [rows, vocab], written; or null
};

namespace {

// exp(x) for x <= 0, error below 2^-51 (Taylor to degree 13 on |r| <= ln(2) / 2); 0 below -708.
inline double exp_negative(double x) {
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
  double shifted = x * 1.4426950408889634 + MAGIC;
  double n = shifted - MAGIC;
  double r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
  double y = 1.0 / 6227020800;
  y = y * r + 1.0 / 479001600;
  y = y * r + 1.0 / 39916800;
  y = y * r + 1.0 / 3628800;
  y = y * r + 1.0 / 362880;
  y = y * r + 1.0 / 40320;
  y = y * r + 1.0 / 5040;
  y = y * r + 1.0 / 720;
  y = y * r + 1.0 / 120;
  y = y * r + 1.0 / 24;
  y = y * r + 1.0 / 6;
  y = y * r + 0.5;
  y = y * r + 1.0;
  y = y * r + 1.0;
  int64_t bits = (std::bit_cast<int64_t>(shifted) + 1023) << 52;
  double result = y * std::bit_cast<double>(bits);
  return x > -708.0 ? result : 0.0;
}

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): 53 bits of the block with
// key `seed` and counter `position`, as a number in [0, 1).
double uniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
  uint32_t k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    uint64_t p = uint64_t(0xD2511F53u) * c[0], q = uint64_t(0xCD9E8D57u) * c[2];
    uint32_t next[4] = {uint32_t(q >> 32) ^ c[1] ^ k[0], uint32_t(q), uint32_t(p >> 32) ^ c[3] ^ k[1], uint32_t(p)};
    std::memcpy(c, next, sizeof c);
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  return double((uint64_t(c[0]) << 32 | c[1]) >> 11) * 0x1p-53;
}

// A token as one number: descending z, then ascending id.
inline int32_t ordered(float z) {
  int32_t i = std::bit_cast<int32_t>(z + 0.0f);  // -0 and 0 are one value
  return i < 0 ? int32_t(uint32_t(INT32_MIN) - uint32_t(i)) : i;
}
inline uint64_t candidate(float z, int64_t id) {
  return uint64_t(uint32_t(INT32_MAX) - uint32_t(ordered(z))) << 32 | uint64_t(id);
}
inline int32_t id_of(uint64_t c) { return int32_t(uint32_t(c)); }
inline float z_of(uint64_t c) {
  int32_t i = int32_t(uint32_t(INT32_MAX) - uint32_t(c >> 32));
  return std::bit_cast<float>(i < 0 ? int32_t(uint32_t(INT32_MIN) - uint32_t(i)) : i);
}

// The kept set: z > threshold, or z == threshold with an id up to `last`.
struct Kept {
  float threshold;
  int32_t last;
  bool operator()(float z, int64_t id) const { return z > threshold || (z == threshold && id <= last); }
};

struct Sums {
  std::vector<double> mass;
  std::vector<int64_t> count;
  explicit Sums(int64_t blocks) : mass(blocks), count(blocks) {}
  double total_mass() const { double s = 0; for (double m : mass) s += m; return s; }
  int64_t total_count() const { int64_t s = 0; for (int64_t c : count) s += c; return s; }
  void add(const Sums& other) {
    for (size_t b = 0; b < mass.size(); ++b) mass[b] += other.mass[b], count[b] += other.count[b];
  }
};

class Row {
 public:
  Row(const Arguments& arguments, int64_t row, int threads)
      : in_(arguments), row_(row), threads_(threads), blocks_((in_.vocab + BLOCK - 1) / BLOCK), base_(blocks_),
        above_(blocks_), reach_(blocks_), all_(blocks_), maxima_(blocks_) {}

  int64_t sample() {
    maximum();
    if (max_ == -INF) return fill(Kept{INF, -1}), 0;  // nothing left: documented as id 0
    float temperature = in_.temperature ? in_.temperature[row_] : 0.0f;
    if (temperature < GREEDY) return first_of_maximum();
    inverse_ = 1.0 / temperature;
    floor_ = std::max(-FLT_MAX, min_p_floor());
    Kept kept{std::nextafterf(floor_, -INF), -1};
    int64_t k = in_.top_k ? in_.top_k[row_] : 0;
    double p = in_.top_p ? in_.top_p[row_] : 1.0;
    bool limited = false;
    if (k > 0 && k < in_.vocab) {
      guess();
      kept = select(kept, true, [k](int64_t count, double) { return count >= k; },
                    [&](const std::vector<float>& s) { return double(k) * s.size() / in_.vocab; });
      limited = true;
    }
    if (p < 1.0) {
      if (!limited) guess();
      if (limited || in_.vocab <= CANDIDATES || floor_ >= max_ || max_ == INF) total_ = mass_of(limited);
      else total_ = -1;  // known after the selection's first pass
      kept = select(kept, false, [&](int64_t count, double mass) { return count > 0 && mass >= p * total_; },
                    [&](const std::vector<float>& s) { return rank_of_mass(s, p); });
      limited = true;
    }
    if (!limited) mass_of(false);
    fill(kept);
    return draw(kept);
  }

 private:
  // float32 logits of block b, adjusted as vLLM does: mask, bias, penalties. NaN counts as -inf.
  int load(int64_t b, float* z) const {
    int64_t begin = b * BLOCK;
    int n = int(std::min<int64_t>(BLOCK, in_.vocab - begin));
    int64_t at = row_ * in_.stride + begin;
    if (in_.dtype == F32) {
      std::memcpy(z, static_cast<const float*>(in_.logits) + at, n * sizeof(float));
    } else if (in_.dtype == BF16) {
      const uint16_t* source = static_cast<const uint16_t*>(in_.logits) + at;
#pragma omp simd
      for (int i = 0; i < n; ++i) z[i] = std::bit_cast<float>(uint32_t(source[i]) << 16);
    } else {
      const _Float16* source = static_cast<const _Float16*>(in_.logits) + at;
#pragma omp simd
      for (int i = 0; i < n; ++i) z[i] = float(source[i]);
    }
#pragma omp simd
    for (int i = 0; i < n; ++i) z[i] = z[i] == z[i] ? z[i] : -INF;
    if (in_.forbidden) {
      const uint8_t* forbidden = in_.forbidden + row_ * in_.vocab + begin;
#pragma omp simd
      for (int i = 0; i < n; ++i) z[i] = forbidden[i] ? -INF : z[i];
    }
    if (in_.bias_offsets) {
      for (int64_t j = first(in_.bias_offsets, in_.bias_ids, begin); j < in_.bias_offsets[row_ + 1]; ++j) {
        if (in_.bias_ids[j] >= begin + n) break;
        float& value = z[in_.bias_ids[j] - begin];
        value = value + in_.bias_values[j];
        if (value != value) value = -INF;  // +inf forbidden
      }
    }
    if (in_.history_offsets) {
      float repetition = in_.repetition[row_], frequency = in_.frequency[row_], presence = in_.presence[row_];
      for (int64_t j = first(in_.history_offsets, in_.history_ids, begin); j < in_.history_offsets[row_ + 1]; ++j) {
        if (in_.history_ids[j] >= begin + n) break;
        float& value = z[in_.history_ids[j] - begin];
        value = value > 0 ? value / repetition : value * repetition;
        float count = float(in_.history_counts[j]);
        value = value - frequency * count;
        value = value - (count > 0 ? presence : 0.0f);
      }
    }
    return n;
  }

  int64_t first(const int64_t* offsets, const int32_t* ids, int64_t begin) const {
    return std::lower_bound(ids + offsets[row_], ids + offsets[row_ + 1], begin) - ids;
  }

  template <class Body>
  void each_block(Body body) const {
#pragma omp parallel for num_threads(threads_) if (threads_ > 1) schedule(static)
    for (int64_t b = 0; b < blocks_; ++b) {
      alignas(64) float z[BLOCK];
      body(b, z, load(b, z));
    }
  }

  double weight(float z) const { return z == max_ ? 1.0 : exp_negative((double(z) - double(max_)) * inverse_); }

  void maximum() {
    each_block([&](int64_t b, const float* z, int n) {
      float m = -INF;
#pragma omp simd reduction(max : m)
      for (int i = 0; i < n; ++i) m = z[i] > m ? z[i] : m;
      maxima_[b] = m;
    });
    max_ = *std::max_element(maxima_.begin(), maxima_.end());
  }

  int64_t first_of_maximum() {
    alignas(64) float z[BLOCK];
    for (int64_t b = 0;; ++b) {
      if (maxima_[b] != max_) continue;
      load(b, z);
      int64_t id = b * BLOCK + (std::find(z, z + BLOCK, max_) - z);
      if (in_.kept) {
        std::memset(in_.kept + row_ * in_.vocab, 0, in_.vocab);
        in_.kept[row_ * in_.vocab + id] = 1;
      }
      return id;
    }
  }

  // The smallest z whose probability is at least min_p of the largest.
  float min_p_floor() const {
    double p = in_.min_p ? in_.min_p[row_] : 0.0;
    if (p <= 0) return -INF;
    if (p >= 1 || max_ == INF) return max_;
    float z = float(double(max_) + std::log(p) / inverse_);
    while (weight(z) < p) z = std::nextafterf(z, INF);
    while (z > -FLT_MAX && weight(std::nextafterf(z, -INF)) >= p) z = std::nextafterf(z, -INF);
    return std::min(z, max_);
  }

  // A sample of the row, descending.
  void guess() {
    int64_t step = std::max<int64_t>(1, in_.vocab / SAMPLES);
    samples_.assign(in_.vocab / step + 1, -INF);
    each_block([&](int64_t b, const float* z, int n) {
      int64_t begin = b * BLOCK;
      for (int64_t id = (begin + step - 1) / step * step; id < begin + n; id += step) samples_[id / step] = z[id - begin];
    });
    std::sort(samples_.begin(), samples_.end(), std::greater<float>());
  }

  double rank_of_mass(const std::vector<float>& samples, double p) const {
    double total = 0, sum = 0;
    for (float s : samples) total += weight(s);
    size_t rank = 0;
    while (rank < samples.size() && (sum += weight(samples[rank])) < p * total) ++rank;
    return double(rank);
  }

  // Sums over the tokens of [low, high): above_ those from a on, reach_ those from l on, all_ all masses.
  // An interval narrower than the row is first packed, so that only its own tokens cost an exponential.
  void measure(float low, float high, float l, float a, bool weighed = true) {
    bool whole = low <= floor_ && high > max_;
    each_block([&](int64_t b, const float* z, int n) {
      double above = 0, reach = 0, all = 0;
      int32_t above_count = 0, reach_count = 0;
      alignas(64) float packed[BLOCK + 16];
      if (maxima_[b] >= low && max_ < INF) {
        if (!whole && weighed) n = pack(z, n, low, high, packed, nullptr), z = packed;
        if (weighed) weigh(z, n, max_, inverse_, low, l, a, above, reach, all);
        above_count = count(z, n, a), reach_count = count(z, n, l);
        if (!whole && !weighed) {
          int32_t beyond = count(z, n, high);
          above_count -= beyond, reach_count -= beyond;
        }
      } else if (max_ == INF) {
        for (int i = 0; i < n; ++i) all += z[i] == INF;
        above = reach = all;
        above_count = reach_count = int32_t(all);
      }
      above_.mass[b] = above, above_.count[b] = above_count;
      reach_.mass[b] = reach, reach_.count[b] = reach_count;
      all_.mass[b] = all;
    });
  }

  // Weights of the values from `a`, from `l` and from `low` on. Values below all three weigh nothing.
  static void weigh(const float* z, int n, double max, double inverse, float low, float l, float a, double& above,
                    double& reach, double& all) {
    double sum_a = 0, sum_l = 0, sum = 0;
#pragma omp simd reduction(+ : sum_a, sum_l, sum)
    for (int i = 0; i < n; ++i) {
      double x = z[i];
      double w = exp_negative((x - max) * inverse);
      sum_a += x >= double(a) ? w : 0.0;
      sum_l += x >= double(l) ? w : 0.0;
      sum += x >= double(low) ? w : 0.0;
    }
    above = sum_a, reach = sum_l, all = sum;
  }

  static int32_t count(const float* z, int n, float from) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += z[i] >= from ? 1 : 0;
    return sum;
  }

  // The values of [low, high), and their places where asked for, one after the other; returns how many.
  // Written with intrinsics because compilers do not vectorise a loop that packs.
  static int pack(const float* z, int n, float low, float high, float* values, int32_t* places) {
    int m = 0, i = 0;
#ifdef __AVX512F__
    __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= n; i += 16) {
      __m512 v = _mm512_loadu_ps(z + i);
      __mmask16 in = _mm512_cmp_ps_mask(v, lows, _CMP_GE_OQ) & _mm512_cmp_ps_mask(v, highs, _CMP_LT_OQ);
      if (!in) continue;
      _mm512_storeu_ps(values + m, _mm512_maskz_compress_ps(in, v));
      if (places) _mm512_storeu_si512(places + m, _mm512_maskz_compress_epi32(in, _mm512_add_epi32(lanes, _mm512_set1_epi32(i))));
      m += __builtin_popcount(in);
    }
#endif
    for (; i < n; ++i) {
      values[m] = z[i];
      if (places) places[m] = i;
      m += int(z[i] >= low) & int(z[i] < high);
    }
    return m;
  }

  // Mass of a kept set. base_ holds the blocks' masses when the set was `limited` by a selection before.
  double mass_of(bool limited) {
    if (!limited) {
      measure(floor_, std::nextafterf(max_, INF), floor_, floor_);
      base_ = reach_;
    }
    return base_.total_mass();
  }

  // The shortest prefix, by descending z and ascending id, of the set `within` that `reached(count, mass)`.
  // Leaves the blocks' masses of the result in base_. `counting`: by count alone, no weights needed. `rank` guesses the threshold's place among the samples.
  template <class Reached, class Rank>
  Kept select(const Kept& within, bool counting, Reached reached, Rank rank) {
    float low = within.last < 0 ? floor_ : within.threshold;  // low <= threshold < high
    float high = std::nextafterf(max_, INF);
    if (max_ == INF) return select_infinite(within, reached);
    Sums whole = base_;
    std::fill(base_.mass.begin(), base_.mass.end(), 0.0);
    std::fill(base_.count.begin(), base_.count.end(), 0);
    double place = rank(samples_);
    double spread = 3 * std::sqrt(place + 1) + 3;
    float a = place - spread < 0 ? high : samples_[size_t(place - spread)];
    float l = place + spread >= double(samples_.size()) ? low : samples_[size_t(place + spread)];
    int64_t known = in_.vocab;
    while (known > CANDIDATES && std::nextafterf(low, INF) < high) {
      a = std::clamp(a, std::nextafterf(low, INF), high);
      l = std::clamp(l, low, std::nextafterf(a, -INF));
      if (a == high && l == low) l = middle(low, high);
      measure(low, high, l, a, !counting);
      if (total_ < 0) total_ = all_.total_mass();
      int64_t count = above_.total_count(), reach = reach_.total_count();
      if (a < high && reached(base_.total_count() + count, base_.total_mass() + above_.total_mass())) {
        known = count;
        low = a;
      } else if (reached(base_.total_count() + reach, base_.total_mass() + reach_.total_mass())) {
        known = reach - count;
        low = l, high = a, base_.add(above_);
      } else if (l <= low) {  // all of it, and not enough
        if (within.last >= 0) {
          base_ = whole;
        } else {
          base_.add(reach_);
          if (counting) mass_of(false);
        }
        return within;
      } else {
        known = in_.vocab;
        high = l, base_.add(reach_);
      }
      std::vector<float> rest;
      for (float s : samples_) if (s >= low && s < high) rest.push_back(s);
      if (rest.size() >= 16) {  // samples left: a quarter around their middle; else halve the interval
        a = rest[rest.size() * 3 / 8], l = rest[rest.size() * 5 / 8];
      } else {
        a = high, l = middle(low, high);
      }
    }
    if (counting && base_.total_count() > 0) {  // so far only counted
      measure(high, std::nextafterf(max_, INF), high, high);
      base_ = reach_;
    }
    if (known > CANDIDATES) return split_ties(within, low, reached);
    return split_candidates(within, low, high, reached);
  }

  // Between low and high in the order of the floats' bit patterns, so that halving ends after 32 steps.
  static float middle(float low, float high) {
    int64_t key = (int64_t(ordered(low)) + int64_t(ordered(high))) >> 1;
    if (key == ordered(low)) ++key;
    return z_of(uint64_t(uint32_t(INT32_MAX) - uint32_t(int32_t(key))) << 32);
  }

  // All that is left has the value z: take them by id until it is enough.
  template <class Reached>
  Kept split_ties(const Kept& within, float z, Reached reached) {
    int64_t count = base_.total_count();
    double mass = base_.total_mass(), w = weight(z);
    int32_t last = -1;
    alignas(64) float block[BLOCK];
    for (int64_t b = 0; b < blocks_; ++b) {
      if (maxima_[b] < z) continue;
      int n = load(b, block);
      int64_t ties = 0;
      if (!(within.last >= 0 && within.threshold == z)) {  // a whole block at once, unless it reaches the goal
#pragma omp simd reduction(+ : ties)
        for (int i = 0; i < n; ++i) ties += block[i] == z ? 1 : 0;
        if (ties == 0 || !reached(count + ties, mass + ties * w)) {
          if (ties) last = int32_t(b * BLOCK + n - 1);
          base_.mass[b] += ties * w, base_.count[b] += ties;
          count += ties, mass += ties * w;
          continue;
        }
      }
      for (int i = 0; i < n; ++i) {
        if (block[i] != z || !within(z, b * BLOCK + i)) continue;
        last = int32_t(b * BLOCK + i);
        base_.mass[b] += w, base_.count[b] += 1;
        mass += w;
        if (reached(++count, mass)) return Kept{z, last};
      }
    }
    return Kept{z, last};
  }

  // Few are left: search them by halves, in their order.
  template <class Reached>
  Kept split_candidates(const Kept& within, float low, float high, Reached reached) {
    std::vector<uint64_t> all = gather(within, low, high);
    if (all.empty()) return within;
    int64_t count = base_.total_count();
    double mass = base_.total_mass();
    auto begin = all.begin(), end = all.end();
    while (end - begin > 32) {
      auto half = begin + (end - begin) / 2;
      std::nth_element(begin, half, end);
      double upper = 0;
      const uint64_t* c = &*begin;
      double max = max_, inverse = inverse_;
#pragma omp simd reduction(+ : upper)
      for (int i = 0; i < int(half - begin); ++i) upper += exp_negative((double(z_of(c[i])) - max) * inverse);
      if (reached(count + (half - begin), mass + upper)) {
        end = half;
      } else {
        count += half - begin, mass += upper, begin = half;
      }
    }
    std::sort(begin, end);
    auto last = begin;
    while (true) {
      mass += weight(z_of(*last));
      if (reached(++count, mass) || last + 1 == end) break;
      ++last;
    }
    Kept kept{z_of(*last), id_of(*last)};
    for (auto c = all.begin(); c != last + 1; ++c) {
      base_.mass[id_of(*c) / BLOCK] += weight(z_of(*c)), base_.count[id_of(*c) / BLOCK] += 1;
    }
    return kept;
  }

  std::vector<uint64_t> gather(const Kept& within, float low, float high) const {
    std::vector<int64_t> begin(blocks_ + 1, 0);
    each_block([&](int64_t b, const float* z, int n) {
      begin[b + 1] = maxima_[b] >= low ? count(z, n, low) - count(z, n, high) : 0;
    });
    for (int64_t b = 0; b < blocks_; ++b) begin[b + 1] += begin[b];
    std::vector<uint64_t> all(begin[blocks_]);
    each_block([&](int64_t b, const float* z, int n) {
      if (begin[b] == begin[b + 1]) return;
      alignas(64) float values[BLOCK + 16];
      alignas(64) int32_t places[BLOCK + 16];
      int m = pack(z, n, low, high, values, places);
      for (int i = 0; i < m; ++i) all[begin[b] + i] = candidate(values[i], b * BLOCK + places[i]);
    });
    std::erase_if(all, [&](uint64_t c) { return within.last >= 0 && !within(z_of(c), id_of(c)); });
    return all;
  }

  // Infinite logits share all the probability; the rest has none.
  template <class Reached>
  Kept select_infinite(const Kept& within, Reached reached) {
    std::fill(base_.mass.begin(), base_.mass.end(), 0.0);
    std::fill(base_.count.begin(), base_.count.end(), 0);
    return split_ties(within, INF, reached);
  }

  void fill(const Kept& kept) const {
    if (!in_.kept) return;
    each_block([&](int64_t b, const float* z, int n) {
      uint8_t* out = in_.kept + row_ * in_.vocab + b * BLOCK;
      for (int i = 0; i < n; ++i) out[i] = kept(z[i], b * BLOCK + i);
    });
  }

  // The first kept id whose cumulative weight exceeds uniform * total.
  int64_t draw(const Kept& kept) const {
    double goal = uniform(in_.seeds[row_], in_.positions[row_]) * base_.total_mass(), sum = 0;
    int64_t b = 0, some = 0;
    for (; b < blocks_; ++b) {
      if (base_.mass[b] > 0) some = b;
      if (sum + base_.mass[b] > goal) break;
      sum += base_.mass[b];
    }
    if (b == blocks_) {  // rounding of the last sum
      b = some;
      sum = goal - base_.mass[b];
    }
    alignas(64) float z[BLOCK];
    int n = load(b, z);
    int64_t chosen = 0;
    for (int i = 0; i < n; ++i) {
      int64_t id = b * BLOCK + i;
      if (!kept(z[i], id)) continue;
      double w = weight(z[i]);
      if (w > 0) chosen = id;
      if ((sum += w) > goal) break;
    }
    return chosen;
  }

  const Arguments& in_;
  int64_t row_;
  int threads_;
  int64_t blocks_;
  Sums base_, above_, reach_, all_;
  std::vector<float> maxima_, samples_;
  float max_ = -INF, floor_ = -INF;
  double inverse_ = 1.0, total_ = 0;
};

}  // namespace

extern "C" void gcu_sample(const Arguments* in) {
  if (in->rows >= in->threads) {
#pragma omp parallel for num_threads(in->threads) schedule(dynamic)
    for (int64_t row = 0; row < in->rows; ++row) in->ids[row] = Row(*in, row, 1).sample();
  } else {
    for (int64_t row = 0; row < in->rows; ++row) in->ids[row] = Row(*in, row, in->threads).sample();
  }
}
