// A product by a packed panel, cut into micro-kernels of an arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sizes.h"

namespace {

// C [m, n] = alpha C + A B, B a panel of `steps` steps. n counts whole vectors.
template <class P>
void matmul(const typename P::A* a, int64_t lda, const typename P::A* b, int64_t steps, float* c, int64_t ldc, int m,
            int64_t n, const float* alpha) {
  using Kernel = void (*)(const typename P::A*, int64_t, const typename P::A*, int64_t, float*, int64_t, const float*);
#define ROW(M) {P::template multiply<M, 1>, P::template multiply<M, 2>, P::template multiply<M, VECTORS - 1>, P::template multiply<M, VECTORS>}
  static constexpr Kernel kernels[ROWS][4] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};
#undef ROW
  for (int64_t strip = 0; strip < n; strip += STRIP) {
    int64_t width = std::min<int64_t>(STRIP, n - strip);
    int vectors = int(width / LANES), column = vectors == VECTORS ? 3 : vectors - 1;
    for (int row = 0; row < m; row += ROWS) {
      int rows = std::min(ROWS, m - row);
      kernels[rows - 1][column](a + row * lda, lda, b, steps, c + row * ldc + strip, ldc, alpha ? alpha + row : nullptr);
    }
    b += P::DEPTH * steps * width;
  }
}

}  // namespace
