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
#include "touched.h"

constexpr int BLOCK = 4096;  // logits per block: 16 KiB of float32, half of an L1 cache or less
constexpr int GROUPS = 32;   // a block's values at the same place modulo GROUPS are a group

class Logits {
 public:
  Logits(const Arguments& in, int64_t row, Touched& touched) : in_(in), row_(row), touched_(touched) {
    touched.find(in, row, BLOCK, [this](int64_t id) { return one(id); });
  }

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
    Touched::List touched = touched_.of(b);
    for (int j = 0; j < touched.n; ++j) z[touched.ids[j] - begin] = touched.values[j];
    int padded = (n + GROUPS - 1) / GROUPS * GROUPS;
    std::fill(z + n, z + padded, -INF);
    return padded;
  }

  // Block b where it lies, if it is whole and nothing adjusts it; else null.
  const void* plain(int64_t b) const {
    if (in_.forbidden || (b + 1) * BLOCK > in_.vocab || touched_.of(b).n) return nullptr;
    int64_t at = row_ * in_.stride + b * BLOCK;
    return static_cast<const char*>(in_.logits) + at * (in_.dtype == F32 ? 4 : 2);
  }

  // Block b as 16-bit numbers, -infinity where a token is forbidden or not there and, with `holes`, where it is touched:
  // where it lies, if that is as it should be, else in `room`. With its length, a multiple of GROUPS, and the touched
  // tokens.
  struct Narrow {
    const void* at;
    int n;
    Touched::List touched;
  };
  Narrow narrow(int64_t b, float* room, bool holes) const {
    int64_t begin = b * BLOCK;
    int n = int(std::min<int64_t>(BLOCK, in_.vocab - begin)), padded = (n + GROUPS - 1) / GROUPS * GROUPS;
    const uint16_t* source = static_cast<const uint16_t*>(in_.logits) + row_ * in_.stride + begin;
    Touched::List touched = touched_.of(b);
    if (!in_.forbidden && n == padded && !(holes && touched.n)) return {source, n, touched};
    uint16_t* z = reinterpret_cast<uint16_t*>(room);
    const uint16_t least = in_.dtype == BF16 ? 0xff80 : 0xfc00;
    if (in_.forbidden) {
      const uint8_t* forbidden = in_.forbidden + row_ * in_.vocab + begin;
#pragma omp simd
      for (int i = 0; i < n; ++i) z[i] = forbidden[i] ? least : source[i];
    } else {
      std::memcpy(z, source, n * sizeof *z);
    }
    for (int j = 0; holes && j < touched.n; ++j) z[touched.ids[j] - begin] = least;
    std::fill(z + n, z + padded, least);
    return {z, padded, touched};
  }
  bool wide() const { return in_.dtype == F32; }
  Dtype dtype() const { return Dtype(in_.dtype); }

 private:
  // A logit under its mask alone.
  float one(int64_t id) const {
    int64_t at = row_ * in_.stride + id;
    float z;
    if (in_.dtype == F32) z = static_cast<const float*>(in_.logits)[at];
    else if (in_.dtype == BF16) z = std::bit_cast<float>(uint32_t(static_cast<const uint16_t*>(in_.logits)[at]) << 16);
    else z = float(static_cast<const _Float16*>(in_.logits)[at]);
    return z != z || (in_.forbidden && in_.forbidden[row_ * in_.vocab + id]) ? -INF : z;
  }

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

  const Arguments& in_;
  int64_t row_;
  const Touched& touched_;
};
