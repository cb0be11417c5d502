// A layer of 4- or 8-bit weights as the kernel is given it.
//
// Weights are tiles of 64 outputs: [N / 64][K / codes per word][64] words of 32 bits, so that a vector of words holds
// the same inputs k of neighbouring outputs and a thread reads its tiles front to back.
#pragma once

#include <algorithm>

#include "codes.h"
#include "jobs.h"

// Field order is that of `Arguments` in host/dequant_gemm.py.
struct Arguments {
  const void* x;          // [m, k], rows `x_stride` elements apart
  const int32_t* weight;  // tiles
  const void *scales, *zeros;  // [groups, n]; zeros in the codes' range, or null
  const int32_t* g_idx;        // [k], or null
  const void* bias;            // [n], or null
  void* y;                     // [m, n], dtype of x
  int64_t m, k, n, groups, x_stride;
  int32_t x_dtype, scales_dtype, zeros_dtype, bias_dtype, bits, threads;
};

namespace {

constexpr int TILE = 64;  // outputs

template <int BITS>
class Layer : public Job {
 public:
  explicit Layer(const Arguments& in) : in_(in), words_((in.k + PER_WORD<BITS> - 1) / PER_WORD<BITS>) {}

  int64_t rows() const override { return in_.m; }

 protected:
  int64_t tiles() const { return (in_.n + TILE - 1) / TILE; }

  const int32_t* words(int64_t tile, int64_t word) const { return in_.weight + (tile * words_ + word) * TILE; }

  // One row of scales or zeros for the outputs of a tile; zero beyond n.
  void row_of(const void* p, int32_t dtype, int64_t group, int64_t tile, float* out) const {
    int count = int(std::min<int64_t>(TILE, in_.n - tile * TILE));
    std::fill(out + count, out + TILE, 0.0f);
    if (count == TILE)  // a count that the compiler knows makes vectors of it
      to_floats(p, dtype, group * in_.n + tile * TILE, TILE, out);
    else
      to_floats(p, dtype, group * in_.n + tile * TILE, count, out);
  }

  // Scales and zeros of one tile lie a row apart, and each would be waited for where it is used: so a thread reads all
  // of its own first, in the order of memory, and then fetches them from the second cache a tile ahead.
  void read_factors(int64_t tile, int64_t end) const {
    auto read = [&](const void* p, int64_t size) {
      for (int64_t group = 0; group < in_.groups; ++group) {
        const char* row = static_cast<const char*>(p) + group * in_.n * size;
        for (int64_t at = tile * TILE * size; at < std::min(in_.n, end * TILE) * size; at += 64)
          static_cast<void>(*static_cast<const volatile char*>(row + at));  // a prefetch gets lost without its page
      }
    };
    read(in_.scales, size_of(in_.scales_dtype));
    if (in_.zeros) read(in_.zeros, size_of(in_.zeros_dtype));
  }

  void fetch_factors(int64_t tile, int64_t group) const {
    auto fetch = [&](const void* p, int64_t size) {
      const char* row = static_cast<const char*>(p) + (group * in_.n + tile * TILE) * size;
      for (int64_t at = 0; at < TILE * size; at += 64) __builtin_prefetch(row + at);
    };
    fetch(in_.scales, size_of(in_.scales_dtype));
    if (in_.zeros) fetch(in_.zeros, size_of(in_.zeros_dtype));
  }

  // scale and scale * (zero - midpoint) of a group.
  void factors(int64_t tile, int64_t group, float* scale, float* shift) const {
    fetch_factors(tile + 1, group);
    row_of(in_.scales, in_.scales_dtype, group, tile, scale);
    if (!in_.zeros) return;
    row_of(in_.zeros, in_.zeros_dtype, group, tile, shift);
    for (int i = 0; i < TILE; ++i) shift[i] = (shift[i] - MIDPOINT<BITS>) * scale[i];
  }

  // Results of `rows` rows from their sums; `scale` where those are still to be scaled.
  void finish(int64_t tile, int64_t first, int rows, float* c, const float* scale = nullptr) const {
    int count = int(std::min<int64_t>(TILE, in_.n - tile * TILE));
    float bias[TILE] = {};
    if (in_.bias) to_floats(in_.bias, in_.bias_dtype, tile * TILE, count, bias);
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; scale && i < count; ++i) c[r * TILE + i] *= scale[i];
      for (int i = 0; i < count; ++i) c[r * TILE + i] += bias[i];
      from_floats(c + r * TILE, count, in_.y, in_.x_dtype, (first + r) * in_.n + tile * TILE);
    }
  }

  Arguments in_;
  int64_t words_;  // of a row of inputs
};

}  // namespace
