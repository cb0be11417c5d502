// Blocks that nothing adjusts, from where they lie into registers: 16 logits at a time as float32, or, to find those from
// a value on, 32 at a time as the 16-bit numbers that they are.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>

#include <cstdint>

#include "arguments.h"
#include "order.h"

// Values of a block, NaN among them: at(i) are those from i to i + 15, both(i) those from i to i + 31 in some order, which
// is the same for all i.
struct Both {
  __m512 first, second;
};
template <Dtype DTYPE>
struct Stream {
  const char* p;
  __m512 at(int i) const {
    if constexpr (DTYPE == F32) return _mm512_loadu_ps(p + i * 4);
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i * 2));
    if constexpr (DTYPE == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  Both both(int i) const {
    constexpr int AHEAD = 2048;  // bytes: the next block's first lines are not waited for
    _mm_prefetch(p + i * (DTYPE == F32 ? 4 : 2) + AHEAD, _MM_HINT_T0);
    if constexpr (DTYPE != BF16) return {at(i), at(i + 16)};
    __m512i v = _mm512_loadu_si512(p + i * 2);  // even ones, odd ones: each at the cost of one instruction
    __m512i odd = _mm512_and_si512(v, _mm512_set1_epi32(int32_t(0xffff0000)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_castsi512_ps(odd)};
  }
};

// `body(stream)` for a block that lies at `plain`.
template <class Body>
void with_stream(const void* plain, Dtype dtype, Body body) {
  const char* p = static_cast<const char*>(plain);
  if (dtype == BF16) body(Stream<BF16>{p});
  else if (dtype == F16) body(Stream<F16>{p});
  else body(Stream<F32>{p});
}

// Which of 32 values of a 16-bit dtype are of [low, infinity]. Signed as integers, floats of one sign are ordered, and
// negative ones come before the others; unsigned, they come behind them, with the greatest first.
class From16 {
 public:
  From16(Dtype dtype, float low) : positive_(low > 0) {
    uint16_t image;  // of the least value that is not below `low`; zero as -0
    if (dtype == BF16) image = uint16_t((std::bit_cast<uint32_t>(low) + (positive_ ? 0xffff : 0)) >> 16);
    else image = _cvtss_sh(low, _MM_FROUND_TO_POS_INF);
    if (low == 0) image = 0x8000;
    uint16_t most = dtype == BF16 ? 0x7f80 : 0x7c00;
    limit_ = _mm512_set1_epi16(int16_t(image)), infinity_ = _mm512_set1_epi16(int16_t(most));
    span_ = _mm512_set1_epi16(int16_t(most - image));
  }
  // Without NaN, whose bits are beyond infinity's, or beyond those of -infinity.
  __mmask32 operator()(__m512i v) const {
    return positive_ ? _mm512_cmple_epu16_mask(_mm512_sub_epi16(v, limit_), span_)
                     : _mm512_mask_cmple_epu16_mask(_mm512_cmple_epi16_mask(v, infinity_), v, limit_);
  }

 private:
  bool positive_;
  __m512i limit_, infinity_, span_;
};

// `body(i)` for those i, multiples of 32, where one of the values i ... i + 31 is of [low, infinity]. n is a multiple of 32.
template <class Body>
void each_hit(const void* z, int n, Dtype dtype, float low, Body body) {
  const From16 from(dtype, low);
  const char* p = static_cast<const char*>(z);
  for (int i = 0; i < n; i += 32) {
    if (from(_mm512_loadu_si512(p + i * 2))) body(i);
  }
}

#ifdef __AVX512VBMI2__
// Of n values of a 16-bit dtype, n a multiple of 32, those of [low, infinity] in their order to `out`, which has room for
// 31 more; returns how many. FEW: that is what to expect.
template <bool FEW>
int pack16(const void* z, int n, Dtype dtype, float low, uint16_t* out) {
  const From16 from(dtype, low);
  const char* p = static_cast<const char*>(z);
  int m = 0;
  for (int i = 0; i < n; i += 32) {
    __m512i v = _mm512_loadu_si512(p + i * 2);
    __mmask32 in = from(v);
    if (FEW && !in) continue;  // a branch pays where it is nearly always taken
    _mm512_storeu_si512(out + m, _mm512_maskz_compress_epi16(in, v));
    m += __builtin_popcount(in);
  }
  return m;
}
#endif
#endif

// What `Groups::take` reads of a block that was loaded.
#ifdef __AVX512F__
inline Stream<F32> stream_of(const float* z) { return {reinterpret_cast<const char*>(z)}; }
#else
inline const float* stream_of(const float* z) { return z; }
#endif
