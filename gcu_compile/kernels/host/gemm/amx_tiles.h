// Register-tiled products of bf16 on AMX.
//
// Operands lie as tiles, one after another, in the order in which they are read:
//   x        [row tiles][steps][rows of a tile][64 bytes]
//   weights  [steps][4 column tiles][16][64 bytes]
// A step is 64 bytes of inputs, 32 bf16. Two row tiles times two column tiles load the least for the
// products that they make; where one row tile is left, or there is no other, it takes all four column tiles.
#pragma once

#include "../amx.h"

#if defined(__AMX_TILE__)

namespace amx {

constexpr int LINE = 64, TILE_BYTES = 16 * LINE, COLUMNS = 4;  // COLUMNS: tiles of the 64 outputs of a weight tile

// The instructions, for tiles whose numbers the compiler knows.
template <int T>
inline void load(const void* p, int64_t stride = LINE) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "n"(T));
}
template <int T>
inline void stream(const void* p, int64_t stride = LINE) {  // leaves what is in the first cache there
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "n"(T));
}
template <int T>
inline void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "n"(T) : "memory");
}
template <int T>
inline void zero() { asm volatile("tilezero %%tmm%c0" : : "n"(T)); }

template <int C, int A, int B>
inline void dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(C), "n"(A), "n"(B)); }

// Rows of a tile such that `rows` fill their tiles: a product takes as long as its tiles have rows.
inline int tile_rows(int64_t rows) {
  int64_t tiles = (rows + 15) / 16;
  return tiles ? int((rows + tiles - 1) / tiles) : 1;
}

// Sums of R row tiles (of `rows` rows) times V column tiles, in tiles r * V + v, from the start: 0, or where they were
// left off in rows that lie `pitch` bytes apart.
template <int R, int V>
inline void begin() {
  static_assert((R == 2 && V == 2) || (R == 1 && V <= 4));
  zero<0>();
  if constexpr (R * V > 1) zero<1>();
  if constexpr (R * V > 2) zero<2>();
  if constexpr (R * V > 3) zero<3>();
}
template <int R, int V, class Take>
inline void each_sum(int rows, int64_t pitch, Take take) {
  take.template operator()<0>(0);
  if constexpr (V > 1) take.template operator()<1>(LINE);
  if constexpr (V > 2) take.template operator()<2>(2 * LINE);
  if constexpr (V > 3) take.template operator()<3>(3 * LINE);
  if constexpr (R == 2) {
    take.template operator()<2>(rows * pitch);
    take.template operator()<3>(rows * pitch + LINE);
  }
}
template <int R, int V>
inline void resume(const void* sums, int rows, int64_t pitch) {
  auto* p = static_cast<const char*>(sums);
  each_sum<R, V>(rows, pitch, [&]<int T>(int64_t at) { load<T>(p + at, pitch); });
}
template <int R, int V>
inline void store(void* sums, int rows, int64_t pitch) {
  auto* p = static_cast<char*>(sums);
  each_sum<R, V>(rows, pitch, [&]<int T>(int64_t at) { store<T>(p + at, pitch); });
}

// Adds the products of some steps. x tiles lie `x_tile` bytes apart, their steps are of `rows` rows. STREAM: weights
// come from the second cache. between(step) runs beside the products of that step: they take a unit of their own.
template <int R, int V, bool STREAM, class Between>
inline void multiply(const char* x, int64_t x_tile, int rows, const char* w, int steps, Between between) {
  auto weights = [&]<int T>(int v) { STREAM ? stream<T>(w + v * TILE_BYTES) : load<T>(w + v * TILE_BYTES); };
  for (int step = 0; step < steps; ++step, x += rows * LINE, w += COLUMNS * TILE_BYTES) {
    weights.template operator()<6>(0);
    pause();
    load<4>(x);
    pause();
    dot<0, 4, 6>();
    pause();
    if constexpr (R == 2) {
      load<5>(x + x_tile);
      pause();
      dot<2, 5, 6>();
      pause();
      weights.template operator()<7>(1);
      pause();
      dot<1, 4, 7>();
      pause();
      dot<3, 5, 7>();
    } else {
      if constexpr (V > 1) weights.template operator()<7>(1), pause(), dot<1, 4, 7>(), pause();
      if constexpr (V > 2) weights.template operator()<6>(2), pause(), dot<2, 4, 6>(), pause();
      if constexpr (V > 3) weights.template operator()<7>(3), pause(), dot<3, 4, 7>();
    }
    between(step);
  }
}

}  // namespace amx

#endif
