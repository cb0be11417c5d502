// What a thread needs beside the logits: one block, the tokens of one interval, and a few sums per block. It is kept
// from call to call.
#pragma once

#include <cstdint>
#include <vector>

#include "guess.h"
#include "logits.h"

constexpr int ROOM = 4096;    // tokens of an interval that are gathered and searched directly
constexpr int ROOM_USED = ROOM * 3 / 4;  // by a guess of how many there will be
constexpr int PACKED = 1024;  // logits whose larger ones are packed at a time

struct Scratch {
  alignas(64) float block[BLOCK];
  alignas(64) float packed[PACKED + GROUPS];
  alignas(64) float values[ROOM + 32];  // tokens in ascending order of id
  alignas(64) int32_t ids[ROOM + 32];
  alignas(64) double weights[ROOM + 32];
  int n = 0;
  // Of the row, in the first thread's scratch; one element per block.
  Groups groups;
  Touched touched;
  std::vector<float> maxima;
  std::vector<double> from, above;
  std::vector<int64_t> inside, beyond;

  // `weights` as twice as many float32 numbers.
  float* narrow_weights() { return reinterpret_cast<float*>(weights); }

  void resize(int64_t blocks) {
    groups.resize(blocks);
    maxima.resize(blocks), from.resize(blocks), above.resize(blocks), inside.resize(blocks), beyond.resize(blocks);
  }
};

// Loops over tokens, written so that the compiler vectorises them.
inline int64_t count_from(const float* z, int n, float from) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += z[i] >= from ? 1 : 0;
  return sum;
}

// The values from `low` on, in their order, to `out`, which has room for 16 more than n; returns how many. FEW: that is
// what to expect. (Were it no constant, the compiler would look at `in` first, whose branch is as good as random.)
template <bool FEW>
int pack(const float* z, int n, float low, float* out) {
  int m = 0;
#ifdef __AVX512F__
  __m512 lows = _mm512_set1_ps(low);
  for (int i = 0; i < n; i += 16) {
    __m512 v = _mm512_loadu_ps(z + i);
    __mmask16 in = _mm512_cmp_ps_mask(v, lows, _CMP_GE_OQ);
    if (FEW && !in) continue;  // a branch pays where it is nearly always taken
    _mm512_storeu_ps(out + m, _mm512_maskz_compress_ps(in, v));
    m += __builtin_popcount(in);
  }
#else
  for (int i = 0; i < n; ++i) out[m] = z[i], m += z[i] >= low;
#endif
  return m;
}

// Fills n values up with -inf to a multiple of 32, for which there is room; returns how many they are then.
inline int pad(float* z, int n) {
  int all = (n + GROUPS - 1) / GROUPS * GROUPS;
  std::fill(z + n, z + all, -INF);
  return all;
}

// How many of n values, a multiple of 32, are not below `from`, and the values next to it on either side, or infinities.
struct Sides {
  int64_t count;
  float least, most;
};
inline Sides sides(const float* z, int n, float from) {
#ifdef __AVX512F__
  __m512 least = _mm512_set1_ps(INF), most = _mm512_set1_ps(-INF);
  int count = 0;
  for (int i = 0; i < n; i += 16) {
    __m512 v = _mm512_loadu_ps(z + i);
    __mmask16 in = _mm512_cmp_ps_mask(v, _mm512_set1_ps(from), _CMP_GE_OQ);
    least = _mm512_mask_min_ps(least, in, least, v), most = _mm512_mask_max_ps(most, ~in, most, v);
    count += __builtin_popcount(in);
  }
  return {count, _mm512_reduce_min_ps(least), _mm512_reduce_max_ps(most)};
#else
  int32_t count = 0;
  float least = INF, most = -INF;
#pragma omp simd reduction(+ : count) reduction(min : least) reduction(max : most)
  for (int i = 0; i < n; ++i) {
    bool in = z[i] >= from;
    count += in ? 1 : 0;
    float up = in ? z[i] : INF, down = in ? -INF : z[i];
    least = up < least ? up : least;
    most = down > most ? down : most;
  }
  return {count, least, most};
#endif
}

// The sum of those of n weights that stand beside values from `from` on.
inline double sum_from(const float* z, const float* w, int n, float from) {
#ifdef __AVX512F__
  __m512d even = _mm512_setzero_pd(), odd = even;
  for (int i = 0; i < n; i += 16) {
    __mmask16 there = n - i < 16 ? __mmask16((1 << (n - i)) - 1) : __mmask16(-1);
    __mmask16 in = _mm512_mask_cmp_ps_mask(there, _mm512_loadu_ps(z + i), _mm512_set1_ps(from), _CMP_GE_OQ);
    __m512 v = _mm512_maskz_loadu_ps(in, w + i);
    even = _mm512_add_pd(even, low_half(v)), odd = _mm512_add_pd(odd, high_half(v));
  }
  return _mm512_reduce_add_pd(_mm512_add_pd(even, odd));
#else
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += z[i] >= from ? double(w[i]) : 0.0;
  return sum;
#endif
}

// The values of [low, high) among n, a multiple of 32, in their order to `out`, which may be z; or, instead of each, the
// `other` that stands beside it. Returns how many. high may be NaN: all from `low` on.
inline int select_values(const float* z, int n, float low, float high, float* out, const float* other = nullptr) {
  int m = 0;
  if (!other) other = z;
#ifdef __AVX512F__
  for (int i = 0; i < n; i += 16) {
    __m512 v = _mm512_loadu_ps(z + i);
    __mmask16 in = _mm512_cmp_ps_mask(v, _mm512_set1_ps(low), _CMP_GE_OQ);
    in = _mm512_mask_cmp_ps_mask(in, v, _mm512_set1_ps(high), _CMP_NGE_UQ);
    _mm512_storeu_ps(out + m, _mm512_maskz_compress_ps(in, _mm512_loadu_ps(other + i)));
    m += __builtin_popcount(in);
  }
#else
  for (int i = 0; i < n; ++i) {
    float v = z[i];
    out[m] = other[i], m += int(v >= low) & int(!(v >= high));
  }
#endif
  return m;
}

// Where the k-th value, from 1 on, of [low, high) is; there are as many, and z has room for 31 more values. high may be NaN.
inline int nth(const float* z, float low, float high, int k) {
  int i = 0;
#ifdef __AVX512F__
  for (;; i += 16) {
    __m512 v = _mm512_loadu_ps(z + i);
    __mmask16 in = _mm512_cmp_ps_mask(v, _mm512_set1_ps(low), _CMP_GE_OQ);
    in = _mm512_mask_cmp_ps_mask(in, v, _mm512_set1_ps(high), _CMP_NGE_UQ);
    int some = __builtin_popcount(in);
    if (some >= k) break;
    k -= some;
  }
#endif
  for (;; ++i) {
    if (z[i] >= low && !(z[i] >= high) && --k == 0) return i;
  }
}

// Keeps, of n tokens, those above `tie` and those equal to it with ids up to `last`; returns how many.
inline int select_tokens(float* z, int32_t* ids, int n, float tie, int32_t last) {
  int m = 0;
#ifdef __AVX512F__
  n = pad(z, n);
  for (int i = 0; i < n; i += 16) {
    __m512 v = _mm512_loadu_ps(z + i);
    __m512i id = _mm512_loadu_si512(ids + i);
    __mmask16 first = _mm512_cmple_epi32_mask(id, _mm512_set1_epi32(last));
    __mmask16 in = _mm512_cmp_ps_mask(v, _mm512_set1_ps(tie), _CMP_GT_OQ);
    in |= _mm512_mask_cmp_ps_mask(first, v, _mm512_set1_ps(tie), _CMP_EQ_OQ);
    _mm512_storeu_ps(z + m, _mm512_maskz_compress_ps(in, v));
    _mm512_storeu_si512(ids + m, _mm512_maskz_compress_epi32(in, id));
    m += __builtin_popcount(in);
  }
#else
  for (int i = 0; i < n; ++i) {
    float v = z[i];
    int32_t id = ids[i];
    z[m] = v, ids[m] = id;
    m += int(v > tie) | (int(v == tie) & int(id <= last));
  }
#endif
  return m;
}

// Counts the tokens of [low, high) and those from `high` on in values that begin at id `begin`. Appends the former
// while there is room (beyond that, to.n is more than ROOM). OPEN: there is no upper end, and high is NaN.
template <bool OPEN>
void sift(const float* z, int n, int64_t begin, float low, float high, Scratch& to, int64_t& inside, int64_t& beyond) {
  int64_t from = 0, up = 0;
#ifdef __AVX512F__
  __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
  __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int m = to.n;
  for (int i = 0; i < n; i += 16) {
    __m512 v = _mm512_loadu_ps(z + i);
    __mmask16 there = _mm512_cmp_ps_mask(v, lows, _CMP_GE_OQ), above = _mm512_cmp_ps_mask(v, highs, _CMP_GE_OQ);
    __mmask16 in = there & ~above;
    if (OPEN && !in) continue;  // elsewhere no branch: which of them lie inside is as good as random
    __m512i ids = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(begin) + i));
    _mm512_storeu_ps(to.values + m, _mm512_maskz_compress_ps(in, v));
    _mm512_storeu_si512(to.ids + m, _mm512_maskz_compress_epi32(in, ids));
    int some = __builtin_popcount(in);
    from += some, up += __builtin_popcount(above);
    m = std::min(m + some, ROOM + 1);
  }
  from += up;
  to.n = m;
#else
  from = count_from(z, n, low), up = high <= INF ? count_from(z, n, high) : 0;
  if (to.n + from - up > ROOM) {
    to.n = ROOM + 1;
  } else if (from > up) {
    int m = to.n;
    for (int i = 0; i < n; ++i) {
      to.values[m] = z[i], to.ids[m] = int32_t(begin + i);
      m += int(z[i] >= low) & int(!(z[i] >= high));
    }
    to.n = m;
  }
#endif
  inside += from - up, beyond += up;
}
inline void sift(const float* z, int n, int64_t begin, float low, float high, Scratch& to, int64_t& inside,
                 int64_t& beyond) {
  (high <= INF ? sift<false> : sift<true>)(z, n, begin, low, high, to, inside, beyond);
}
