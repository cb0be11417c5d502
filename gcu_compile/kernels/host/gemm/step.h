// A step of a product of tiles of bf16: 32 inputs, which are 16 pairs of a row of x and of each output's weights.
#pragma once

#include <array>

#include "layer.h"

#if defined(__AMX_TILE__) && defined(__AVX512BF16__)

namespace {

template <int BITS>
struct Step {
  static constexpr int INPUTS = 32;
  static constexpr int WORDS = INPUTS / PER_WORD<BITS>;
  static constexpr int PAIRS = PER_WORD<BITS> / 2;  // of a word

  static int64_t count(int64_t inputs) { return (inputs + INPUTS - 1) / INPUTS; }

  // `count` inputs of a row, zeros behind them.
  static __m512i inputs(const uint16_t* x, int64_t count) {
    return _mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << count) - 1), x);
  }

  // Inputs in the order of the pairs that are unpacked from the words of their codes.
  static __m512i as_unpacked(__m512i inputs) {
    alignas(64) static constexpr auto ORDER = [] {
      std::array<uint16_t, INPUTS> order{};
      for (int i = 0; i < INPUTS; ++i) order[i] = uint16_t(BITS == 4 ? i / 8 * 8 + i % 2 * 4 + i % 8 / 2 : i);
      return order;
    }();
    return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER.data()), inputs);
  }
};

}  // namespace

#endif
