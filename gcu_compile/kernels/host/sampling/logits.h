// One row of logits, a block at a time, as float32 in L1 after mask, bias and penalties. Nothing is copied whole.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "arguments.h"
#include "order.h"

constexpr int BLOCK = 4096;  // logits per block: 16 KiB of float32, half of an L1 cache or less
constexpr int GROUPS = 32;   // a block's values at the same place modulo GROUPS are a group

class Logits {
 public:
  Logits(const Arguments& in, int64_t row) : in_(in), row_(row) {}

  int64_t blocks() const { return (in_.vocab + BLOCK - 1) / BLOCK; }

  // Block b into z, padded with -inf to a multiple of GROUPS; returns how many with the padding. NaN counts as -inf.
  int load(int64_t b, float* z) const {
    int64_t begin = b * BLOCK;
    int n = int(std::min<int64_t>(BLOCK, in_.vocab - begin));
    convert(row_ * in_.stride + begin, n, z);
    if (in_.forbidden) {
      const uint8_t* forbidden = in_.forbidden + row_ * in_.vocab + begin;
#pragma omp simd
      for (int i = 0; i < n; ++i) z[i] = forbidden[i] ? -INF : z[i];
    }
    if (in_.bias_offsets) add_bias(begin, n, z);
    if (in_.history_offsets) penalise(begin, n, z);
    int padded = (n + GROUPS - 1) / GROUPS * GROUPS;
    std::fill(z + n, z + padded, -INF);
    return padded;
  }

  // Block b where it lies, if it is whole and nothing adjusts it; else null.
  const void* plain(int64_t b) const {
    if (in_.forbidden || (b + 1) * BLOCK > in_.vocab) return nullptr;
    if (in_.bias_offsets && names(in_.bias_offsets, in_.bias_ids, b)) return nullptr;
    if (in_.history_offsets && names(in_.history_offsets, in_.history_ids, b)) return nullptr;
    int64_t at = row_ * in_.stride + b * BLOCK;
    return static_cast<const char*>(in_.logits) + at * (in_.dtype == F32 ? 4 : 2);
  }
  bool adjusted() const { return in_.forbidden || in_.bias_offsets || in_.history_offsets; }
  Dtype dtype() const { return Dtype(in_.dtype); }

 private:
  void convert(int64_t at, int n, float* z) const {
    int i = 0;
    if (in_.dtype == F32) {
      const float* source = static_cast<const float*>(in_.logits) + at;
#pragma omp simd
      for (int j = 0; j < n; ++j) z[j] = source[j] == source[j] ? source[j] : -INF;
    } else if (in_.dtype == BF16) {
      const uint16_t* source = static_cast<const uint16_t*>(in_.logits) + at;
#ifdef __AVX512F__
      __m512 minus = _mm512_set1_ps(-INF);
      for (; i + 16 <= n; i += 16) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
        __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        _mm512_storeu_ps(z + i, _mm512_max_ps(v, minus));  // of NaN and -inf, the second operand
      }
#endif
#pragma omp simd
      for (int j = i; j < n; ++j) {
        float v = std::bit_cast<float>(uint32_t(source[j]) << 16);
        z[j] = v == v ? v : -INF;
      }
    } else {
      const _Float16* source = static_cast<const _Float16*>(in_.logits) + at;
#ifdef __AVX512F__
      for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(z + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
      }
#endif
      for (; i < n; ++i) z[i] = float(source[i]);
#pragma omp simd
      for (int j = 0; j < n; ++j) z[j] = z[j] == z[j] ? z[j] : -INF;
    }
  }

  void add_bias(int64_t begin, int n, float* z) const {
    int64_t end = in_.bias_offsets[row_ + 1];
    for (int64_t j = first(in_.bias_offsets, in_.bias_ids, begin); j < end && in_.bias_ids[j] < begin + n; ++j) {
      float value = z[in_.bias_ids[j] - begin] + in_.bias_values[j];
      z[in_.bias_ids[j] - begin] = value == value ? value : -INF;  // +inf forbidden
    }
  }

  void penalise(int64_t begin, int n, float* z) const {
    float repetition = in_.repetition[row_], frequency = in_.frequency[row_], presence = in_.presence[row_];
    int64_t end = in_.history_offsets[row_ + 1];
    int64_t j = first(in_.history_offsets, in_.history_ids, begin);
    for (; j < end && in_.history_ids[j] < begin + n; ++j) {
      float value = z[in_.history_ids[j] - begin], count = float(in_.history_counts[j]);
      value = value > 0 ? value / repetition : value * repetition;
      volatile float product = frequency * count;  // rounded as in the eager meaning: no fused multiply-add
      value = value - product;
      value = value - (count > 0 ? presence : 0.0f);
      z[in_.history_ids[j] - begin] = value == value ? value : -INF;
    }
  }

  int64_t first(const int64_t* offsets, const int32_t* ids, int64_t begin) const {
    return std::lower_bound(ids + offsets[row_], ids + offsets[row_ + 1], begin) - ids;
  }

  // Whether the row's list has a token of block b; a long one is not searched.
  bool names(const int64_t* offsets, const int32_t* ids, int64_t b) const {
    if (offsets[row_ + 1] - offsets[row_] > blocks()) return true;
    int64_t j = first(offsets, ids, b * BLOCK);
    return j < offsets[row_ + 1] && ids[j] < (b + 1) * BLOCK;
  }

  const Arguments& in_;
  int64_t row_;
};
