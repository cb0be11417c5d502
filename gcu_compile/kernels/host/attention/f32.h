// The arithmetic of any instruction set: float32 in GCC vectors.
//
// What an arithmetic does: hold rows of Q or P as `A`, pack K and V, multiply. It names the rows of a work item (TILE_ROWS
// at most; at least LEAST_ROWS before more items are worth more), those that go from scores to weights at once (BLOCK),
// and what a thread holds meanwhile (Thread). Up to FEW rows go another way, for which queries take the place of
// ROWS_OF_FEW rows; TABLES and `Digits` are ways of their own for int8. Panels are cut into strips of STRIP
// columns (the last one into whole vectors); a strip is [step][column], a step being one or two products deep.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matmul.h"
#include "rows.h"

namespace {

struct F32 {
  using A = float;
  static constexpr bool BY_TILES = false;
  static constexpr int DEPTH = 1, FEW = 0, ROWS_OF_FEW = 0, STEPS = 1, STRIP = ::STRIP;
  static constexpr int TILE_ROWS = 4 * ::TILE_ROWS, LEAST_ROWS = ::TILE_ROWS, BLOCK = ::TILE_ROWS;  // many, for packing costs
  struct Thread {};
  struct Softmax {};
  struct Digits {};
  static constexpr bool TABLES = false;

  static void copy(const Row& row, int dtype, int64_t n, float* to) {
    for (int64_t d = 0; d < n; d += LANES) store(to + d, numbers(row, dtype, d, n - d));
  }

  static void strip(const float* a, int64_t lda, const float* b, int64_t steps, int64_t width, int64_t, float* c, int64_t ldc,
                    int m, const float* alpha) {
    strip_by_rows<F32>(a, lda, b, steps, width, c, ldc, m, alpha);
  }

  template <int M, int V>
  static void multiply(const float* a, int64_t lda, const float* b, int64_t steps, float* c, int64_t ldc, const float* alpha) {
    Vec sum[M][V];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[i][j] = alpha ? load(c + i * ldc + j * LANES) * alpha[i] : Vec{};
    for (int64_t s = 0; s < steps; ++s, b += V * LANES) {
      Vec columns[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) columns[j] = load(b + j * LANES);
#pragma GCC unroll 6
      for (int i = 0; i < M; ++i) {
        Vec x = splat(a[i * lda + s]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] += x * columns[j];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) store(c + i * ldc + j * LANES, sum[i][j]);
  }

  static void pack_k(const Row* keys, int n, int dtype, int64_t dim, float* panel) {
    for (int strip = 0; strip < n; strip += STRIP) {
      int width = std::min(STRIP, (n - strip + LANES - 1) / LANES * LANES);
      for (int lane = 0; lane < width; lane += LANES)
        for (int64_t d = 0; d < dim; d += LANES) {
          Int rows[LANES];
          for (int i = 0; i < LANES; ++i) {
            int key = strip + lane + i;
            rows[i] = key < n ? as_int(numbers(keys[key], dtype, d, dim - d)) : Int{};
          }
          transpose(rows);
          int64_t count = std::min<int64_t>(LANES, dim - d);
          for (int64_t i = 0; i < count; ++i) store(panel + (d + i) * width + lane, as_float(rows[i]));
        }
      panel += width * dim;
    }
  }

  static void pack_v(const Row* keys, int n, int dtype, int64_t dim, float* panel) {
    for (int64_t strip = 0; strip < dim; strip += STRIP) {
      int64_t width = std::min<int64_t>(STRIP, (dim - strip + LANES - 1) / LANES * LANES);
      for (int key = 0; key < n; ++key)
        for (int64_t d = 0; d < width; d += LANES)
          store(panel + key * width + d, numbers(keys[key], dtype, strip + d, dim - strip - d));
      panel += width * n;
    }
  }
};

}  // namespace
