// Codes of 4 and 8 bits as numbers, and their products with activations.
#pragma once

#include "../simd.h"

namespace {

template <int BITS>
constexpr int PER_WORD = 32 / BITS;
template <int BITS>
constexpr float MIDPOINT = BITS == 4 ? 8 : 0;  // of host_int4 (0..15) and host_int8 (two's complement)

// Code number i of every word, as a float minus the midpoint.
template <int BITS>
inline vf unpacked(vi words, int i) {
  if constexpr (BITS == 4) {
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, 4 * i), table);  // looks at 4 bits only
#else
    return to_float((words >> (4 * i)) & 15) - 8.0f;
#endif
  } else {
    return to_float((words << (24 - 8 * i)) >> 24);
  }
}

// Products in float32; a lane of x is one activation, k in order.
struct Float {
  static constexpr int PER_LANE = 1;
  template <int BITS>
  static vf weights(vi words, int step) { return unpacked<BITS>(words, step); }
  static vf add(vf sum, vf w, int32_t x) { return fma(w, splat(std::bit_cast<float>(x)), sum); }
  template <int BITS>
  static int input(int step, int) { return step; }
};

#if defined(__AVX512BF16__)
// Products of bf16 pairs. A 16-bit half of a word of 4-bit codes holds the inputs k .. k + 3 or k + 4 .. k + 7, so a
// pair is (i, i + 4); x is laid out alike.
struct Pairs {
  static constexpr int PER_LANE = 2;
  template <int BITS>
  static vf weights(vi words, int step) {
    if constexpr (BITS == 4) {
      // bf16 of -8 .. 7, twice: the permutation looks at 5 bits, and the fifth belongs to the next code.
      const __m512i half = _mm512_castsi256_si512(_mm256_setr_epi16(
          0xc100 - 65536, 0xc0e0 - 65536, 0xc0c0 - 65536, 0xc0a0 - 65536, 0xc080 - 65536, 0xc040 - 65536,
          0xc000 - 65536, 0xbf80 - 65536, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
      const __m512i table = _mm512_shuffle_i64x2(half, half, 0x44);
      return (vf)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words, 4 * step), table);
    } else {
      vi low = (vi)unpacked<8>(words, 2 * step), high = (vi)unpacked<8>(words, 2 * step + 1);
      return (vf)(vi)((vu)low >> 16 | ((vu)high & 0xffff0000u));
    }
  }
  static vf add(vf sum, vf w, int32_t x) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
  }
  template <int BITS>
  static int input(int step, int half) { return BITS == 4 ? step + 4 * half : 2 * step + half; }
};
#endif

}  // namespace
