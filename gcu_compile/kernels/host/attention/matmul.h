// A product by a packed panel, strip by strip.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sizes.h"

namespace {

struct Range { int64_t begin, end; };

// B: strips of STRIP columns, the last one of the rest; a strip is [step][column].
template <class A>
struct Panel {
  const A* at;
  int64_t steps, columns;
  Range step, column;  // what takes part: whole strips are left out, columns in front of or behind them are not
};

// C [m, columns] = alpha C + A B; without alpha, A B. Columns count whole vectors. C holds what lies in `column`.
template <class P>
void matmul(const typename P::A* a, int64_t lda, const Panel<typename P::A>& b, float* c, int64_t ldc, int m, const float* alpha) {
  const typename P::A* at = b.at;
  for (int64_t strip = 0; strip < b.columns; strip += STRIP) {
    int64_t width = std::min<int64_t>(STRIP, b.columns - strip);
    if (strip + width > b.column.begin && strip < b.column.end) {
      const typename P::A* from = at + P::DEPTH * b.step.begin * width;
      int64_t count = std::min(width, b.column.end - strip);
      P::strip(a + P::DEPTH * b.step.begin, lda, from, b.step.end - b.step.begin, width, count, c + strip, ldc, m, alpha);
    }
    at += P::DEPTH * b.steps * width;
  }
}

// A strip by micro-kernels of up to ROWS rows, P::multiply; all of its columns.
template <class P>
void strip_by_rows(const typename P::A* a, int64_t lda, const typename P::A* b, int64_t steps, int64_t width, float* c,
                   int64_t ldc, int m, const float* alpha) {
  using Kernel = void (*)(const typename P::A*, int64_t, const typename P::A*, int64_t, float*, int64_t, const float*);
#define ROW(M) {P::template multiply<M, 1>, P::template multiply<M, 2>, P::template multiply<M, VECTORS - 1>, P::template multiply<M, VECTORS>}
  static constexpr Kernel kernels[ROWS][4] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};
#undef ROW
  int vectors = int(width / LANES), column = vectors == VECTORS ? 3 : vectors - 1;
  for (int row = 0; row < m; row += ROWS) {
    int rows = std::min(ROWS, m - row);
    kernels[rows - 1][column](a + row * lda, lda, b, steps, c + row * ldc, ldc, alpha ? alpha + row : nullptr);
  }
}

}  // namespace
