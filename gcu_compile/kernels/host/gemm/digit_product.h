// The product of a row or two of bf16 with codes of 4 bits, in integers: vpdpbusd takes 64 codes where a dot product of
// bf16 takes 32, and masking bytes is all the unpacking that it wants.
//
//   x = step * (65536 d2 + 256 d1 + d0), digits of 8 bits, with a step for each group: 2^-21 of its largest or less
// What an x loses is less than float32 sums with that largest x would lose of it.
#pragma once

#include <cmath>
#include <vector>

#include "layer.h"

#if defined(__AVX512VNNI__)

namespace {

class DigitProduct : public Layer<4> {
  static constexpr int DIGITS = 3, LANES_OF_WORD = 2 * DIGITS, V = TILE / 16;
  // Words that a stream is fetched before its use, into the second cache and from there into the first, which takes too few
  // lines at a time from memory (measured: 1.02 to 1.2 times as fast as two pages into the first one).
  static constexpr int FAR = 3072, NEAR = 1024;

 public:
  static constexpr int64_t MOST_ROWS = 2;
  static constexpr int64_t MOST_INPUTS = 1 << 20;  // of a group: a digit is at most 128, a code 15, and sums are int32

  // No infinities and NaN, which have no digits.
  static bool takes(const Arguments& in) {
    const int64_t group = in.k / in.groups;
    if (in.x_dtype != BF16 || in.m > MOST_ROWS || in.g_idx || (in.groups > 1 && group % 8) || group > MOST_INPUTS)
      return false;
    uint32_t largest = 0;
    for (int64_t row = 0; row < in.m; ++row) {
      auto* x = static_cast<const uint16_t*>(in.x) + row * in.x_stride;
      for (int64_t k = 0; k < in.k; ++k) largest = std::max<uint32_t>(largest, x[k] & 0x7fff);
    }
    return largest < 0x7f80;
  }

  explicit DigitProduct(const Arguments& in)
      : Layer(in), group_((in.k / in.groups + 7) / 8), x_(in.m * words_ * LANES_OF_WORD),
        digits_(in.m * in.groups * DIGITS), steps_(in.m * in.groups), sums_(in.m * in.groups) {}

  int64_t tasks() const override { return tiles(); }

  void lay_out(int64_t row, int64_t end) override {
    for (; row < end; ++row)
      for (int64_t group = 0; group < in_.groups; ++group) lay_out_group(row, group);
  }

  void work(int64_t task, int64_t end) const override {
    read_factors(task, end);
    for (; task < end; ++task) {
      alignas(64) float c[MOST_ROWS * TILE] = {};
      in_.m == 1 ? tile<1>(task, c) : tile<2>(task, c);
      finish(task, 0, int(in_.m), c);
    }
  }

 private:
  // Inputs of a word as 16 bits.
  __m128i inputs(int64_t row, int64_t word) const {
    auto* x = static_cast<const uint16_t*>(in_.x) + row * in_.x_stride + word * 8;
    return _mm_maskz_loadu_epi16(uint8_t((1 << std::min<int64_t>(8, in_.k - word * 8)) - 1), x);
  }

  void lay_out_group(int64_t row, int64_t group) {
    const int64_t first = group * group_, end = std::min(words_, first + group_), at = row * in_.groups + group;
    __m128i most = {};
    for (int64_t word = first; word < end; ++word)
      most = _mm_max_epu16(most, _mm_and_si128(inputs(row, word), _mm_set1_epi16(0x7fff)));
    alignas(16) uint16_t each[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(each), most);
    const int exponent = *std::max_element(each, each + 8) / 128 - 127;  // all are below 2^(exponent + 1)
    const __m256 power = _mm256_set1_ps(float(21 - exponent));
    __m256i sums[DIGITS] = {};
    for (int64_t word = first; word < end; ++word) {
      __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(inputs(row, word)), 16));
      __m256i left = _mm256_cvtps_epi32(_mm256_scalef_ps(x, power));
      for (int digit = 0; digit < DIGITS; ++digit) {
        __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(left, 24), 24);
        left = _mm256_srai_epi32(_mm256_sub_epi32(left, low), 8);
        sums[digit] = _mm256_add_epi32(sums[digit], low);
        // Bytes of the even inputs, then of the odd ones, as masks find them in a word.
        const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
        __m128i bytes = _mm_shuffle_epi8(_mm256_cvtepi32_epi8(low), order);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(&x_[((row * words_ + word) * DIGITS + digit) * 2]), bytes);
      }
    }
    double sum = 0;
    for (int digit = 0; digit < DIGITS; ++digit) {
      alignas(32) int32_t lanes[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[digit]);
      int32_t total = 0;
      for (int32_t lane : lanes) total += lane;
      digits_[at * DIGITS + digit] = total;
      sum += std::ldexp(double(total), 8 * digit);
    }
    steps_[at] = std::ldexp(1.0f, exponent - 21);
    sums_[at] = float(std::ldexp(sum, exponent - 21));
  }

  template <int M>
  void tile(int64_t tile, float* c) const {
    alignas(64) float scale[TILE], shift[TILE];
    const vi mask = splat(int32_t(0x0f0f0f0f));
    for (int64_t group = 0; group < in_.groups; ++group) {
      factors(tile, group, scale, shift);
      vi sum[M][DIGITS][V];
      for (int r = 0; r < M; ++r)
        for (int digit = 0; digit < DIGITS; ++digit)
          for (int v = 0; v < V; ++v)
            sum[r][digit][v] = splat(-8 * digits_[(r * in_.groups + group) * DIGITS + digit]);
      const int64_t end = std::min(words_, (group + 1) * group_);
      for (int64_t word = group * group_; word < end; ++word) {
        const int32_t* w = words(tile, word);
        const int32_t* x = &x_[word * LANES_OF_WORD];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          __builtin_prefetch(w + v * 16 + FAR, 0, 2);
          __builtin_prefetch(w + v * 16 + NEAR);
          vi packed = load<vi>(w + v * 16), even = packed & mask, odd = (vi)((vu)packed >> 4) & mask;
#pragma GCC unroll 2
          for (int r = 0; r < M; ++r)
#pragma GCC unroll 3
            for (int digit = 0; digit < DIGITS; ++digit) {
              const int32_t* lane = x + r * words_ * LANES_OF_WORD + digit * 2;
              vi& s = sum[r][digit][v];
              s = (vi)_mm512_dpbusd_epi32((__m512i)s, (__m512i)even, _mm512_set1_epi32(lane[0]));
              s = (vi)_mm512_dpbusd_epi32((__m512i)s, (__m512i)odd, _mm512_set1_epi32(lane[1]));
            }
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          vf s = fma(to_float(sum[r][1][v]), splat(256.0f), to_float(sum[r][0][v]));
          s = fma(to_float(sum[r][2][v]), splat(65536.0f), s);
          vf y = fma(s * steps_[r * in_.groups + group], load<vf>(scale + v * 16), load<vf>(c + r * TILE + v * 16));
          if (in_.zeros) y = fma(load<vf>(shift + v * 16), splat(-sums_[r * in_.groups + group]), y);
          store(c + r * TILE + v * 16, y);
        }
    }
  }

  int64_t group_;                // words of a group
  std::vector<int32_t> x_;       // [m][words][digits][even, odd inputs]
  std::vector<int32_t> digits_;  // [m][groups][digits]: their sums, for codes are 8 more than what they stand for
  std::vector<float> steps_, sums_;  // [m][groups]: of x
};

}  // namespace

#endif
