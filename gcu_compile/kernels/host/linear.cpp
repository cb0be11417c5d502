// Rows of bfloat16 times a weight that was packed: y[m, n] = sum_k x[m, k] * weight[n, k] + bias[n].
//
// The weight lies in strips of STRIP outputs; a strip has two inputs of each output side by side, a pair in 32 bits, and
// all outputs of a pair of inputs in one piece. So one row reads a strip from its first byte to its last, and many rows
// find it in the second cache. A group of up to ROWS rows has its sums in registers.
#include <algorithm>
#include <cstdint>
#include <utility>

#include "pairs.h"
#include "room.h"
#include "simd.h"

// Field order is that of `FIELDS` in host/linear.py.
struct Arguments {
  const void *x, *weight, *bias;  // [m, k]; [strips, (k + 1) / 2, STRIP, 2]; [n] or null
  void* y;                        // [m, n]
  int64_t m, k, n, stride;        // stride: of x, from row to row
  int32_t bias_dtype, threads;
};

namespace {

constexpr int STRIP = 32, VECTORS = STRIP / LANES;
constexpr int ROWS = LANES == 16 ? 12 : 2;  // whose sums fill the registers, with the weight's and one of x
constexpr int64_t NEAR = 1024, FAR = 16384;  // bytes that are fetched before their turn, into the first and second cache
constexpr int64_t GROUPS = 40;               // of rows, whose inputs are some MB
constexpr int64_t WAKE = 100000;             // fewer products take less time than waking other threads

// To a dot product of pairs numbers and products below the least normal float are 0. Rows whose largest magnitude is below
// this, as bfloat16, are multiplied in floats: what is lost of others is nothing beside their sums.
constexpr int32_t SMALL = (127 - 60) << 7;  // 2^-60

template <bool EXACT>
vf add(vf sum, const char* weight, int32_t pair) {
#if defined(__AVX512BF16__)
  if constexpr (!EXACT)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weight), (__m512bh)_mm512_set1_epi32(pair));
#endif
  const Two<vf> w = read_pair<BF16>(weight);
  const uint32_t bits = uint32_t(pair);
  return fma(w.a, splat(std::bit_cast<float>(bits << 16)), fma(w.b, splat(std::bit_cast<float>(bits & 0xffff0000)), sum));
}

// sums[r][i] of M rows that lie as `lay_out` has them, and one strip.
template <bool EXACT, int M>
void multiply(const int32_t* x, const char* strip, int64_t pairs, float (*sums)[STRIP]) {
  vf sum[M][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = splat(0.0f);
  for (int64_t p = 0; p < pairs; ++p, x += M, strip += 4 * STRIP) {
    for (int b = 0; b < 4 * STRIP; b += 64) {
      __builtin_prefetch(strip + NEAR + b, 0, 3);
      __builtin_prefetch(strip + FAR + b, 0, 2);
    }
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = add<EXACT>(sum[r][v], strip + v * sizeof(vf), x[r]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(sums[r] + v * LANES, sum[r][v]);
}

using Multiply = void (*)(const int32_t*, const char*, int64_t, float (*)[STRIP]);
template <int... M>
Multiply of_rows(int rows, bool exact, std::integer_sequence<int, M...>) {
  static constexpr Multiply all[2][ROWS] = {{multiply<false, M + 1>...}, {multiply<true, M + 1>...}};
  return all[exact][rows - 1];
}

// Pairs of inputs of `rows` rows, the rows of a pair side by side. Whether one of these rows is SMALL.
bool lay_out(const Arguments& in, int64_t first, int rows, int32_t* to) {
  const uint16_t* x[ROWS];
  for (int r = 0; r < rows; ++r) x[r] = static_cast<const uint16_t*>(in.x) + (first + r) * in.stride;
  for (int64_t k = 0; k + 1 < in.k; k += 2)
    for (int r = 0; r < rows; ++r) *to++ = load<int32_t>(x[r] + k);
  if (in.k % 2)
    for (int r = 0; r < rows; ++r) *to++ = x[r][in.k - 1];
  return std::any_of(x, x + rows, [&](const uint16_t* row) {
    int32_t most = 0;
    for (int64_t k = 0; k < in.k; ++k) most = std::max<int32_t>(most, row[k] & 0x7fff);
    return most < SMALL && most > 0;
  });
}

}  // namespace

extern "C" void gcu_linear(const Arguments* arguments) {
  const Arguments& in = *arguments;
  if (!in.m) return;
  const int64_t pairs = (in.k + 1) / 2, strips = (in.n + STRIP - 1) / STRIP, groups = (in.m + ROWS - 1) / ROWS;
  // Groups of equal size, or of one row less; parts of them whose inputs stay in a cache while strips go by, and more
  // where there would be too few strips for the threads.
  const int64_t wanted = strips ? (2 * in.threads + strips - 1) / strips : 1;
  const int64_t parts = std::max((groups + GROUPS - 1) / GROUPS, std::min(groups, wanted));
  auto begin = [&](int64_t group) { return group * in.m / groups; };
  Room<int32_t> laid_out(in.m * pairs);
  Room<bool> small(groups);
#pragma omp parallel num_threads(in.threads) if (in.threads > 1 && in.m * in.n * in.k > WAKE)
  {
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g)
      small.get()[g] = lay_out(in, begin(g), int(begin(g + 1) - begin(g)), laid_out.get() + begin(g) * pairs);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts * strips; ++task) {
      const int64_t part = task / strips, s = task % strips, first = s * STRIP;
      const int columns = int(std::min<int64_t>(STRIP, in.n - first));
      float bias[STRIP] = {}, sums[ROWS][STRIP];
      if (in.bias) to_floats(in.bias, in.bias_dtype, first, columns, bias);
      for (int64_t g = part * groups / parts; g < (part + 1) * groups / parts; ++g) {
        const int rows = int(begin(g + 1) - begin(g));
        of_rows(rows, small.get()[g], std::make_integer_sequence<int, ROWS>{})(
            laid_out.get() + begin(g) * pairs, static_cast<const char*>(in.weight) + s * pairs * 4 * STRIP, pairs, sums);
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < columns; ++c) sums[r][c] += bias[c];
          from_floats(sums[r], columns, in.y, BF16, (begin(g) + r) * in.n + first);
        }
      }
    }
  }
}
