// What the integer products of every instruction set have in common: activations become codes, sums become results.
//
//   y = sum_k (xq - xz) (wq - wz) * x_scale * scale + bias
//   sum (xq - xz)(wq - wz) = sum xq wq - xz sum wq - wz sum xq + K xz wz
// All of it is exact modulo 2^32; the Python side refuses K for which the left side could exceed it.
#pragma once

#include <memory>

#include "../quantize.h"
#include "jobs.h"

// Field order is that of `Arguments` in host/int8_gemm.py.
struct Arguments {
  const void* x;              // [m, k], int8 or floating point, rows `x_stride` elements apart
  const float* x_scales;      // [m], or null: per token, from x
  const int32_t* x_zeros;     // [m], or null
  const int32_t* weight;      // tiles: [n / 64][k / 4][64] words of four neighbouring inputs
  const float* scales;        // [n]
  const int32_t* zeros;       // [n], or null
  const void* bias;           // [n], or null
  void* y;                    // [m, n]
  int64_t m, k, n, x_stride;
  int32_t x_dtype, y_dtype, bias_dtype, threads;
  int32_t scale_step, zero_step;  // in x_scales and x_zeros from row to row: 1, or 0 where all rows have one
};

namespace {

constexpr int TILE = 64;  // outputs
constexpr int MOST = 4;   // tiles whose results are made together

class Int8Product : public Job {
 public:
  explicit Int8Product(const Arguments& in)
      : in_(in), words_((in.k + 3) / 4), tiles_((in.n + TILE - 1) / TILE), scales_(in.m), zeros_(in.m), sums_(in.m) {}

  int64_t rows() const override { return in_.m; }

  void lay_out(int64_t row, int64_t end) override {
    std::vector<float> buffer;
    std::vector<int8_t> codes((in_.k + 63) / 64 * 64);  // zeros behind the row
    for (; row < end; ++row) {
      quantize(row, buffer, codes.data());
      keep(row, codes.data());
    }
  }

 protected:
  // The codes of a row, with zeros behind them to a multiple of 64, are what `work` will read.
  virtual void keep(int64_t row, const int8_t* codes) = 0;

  const int32_t* weights(int64_t tile) const { return in_.weight + tile * words_ * TILE; }

  // Results of `rows` rows of some tiles, from sum xq wq [tiles][rows of each, `pitch` numbers in all][TILE] and sum wq
  // (null where no row has a zero). Row by row: what is next to each other in y is written together.
  void finish(int64_t tile, int tiles, int64_t first, int rows, const int32_t* products, int64_t pitch,
              const int32_t* weight_sums, uint32_t offset = 0) const {
    const int count = int(std::min<int64_t>(tiles * TILE, in_.n - tile * TILE));
    float scale[MOST * TILE] = {}, bias[MOST * TILE] = {}, y[MOST * TILE];
    uint32_t zero[MOST * TILE] = {}, sums[MOST * TILE] = {};  // unsigned: sums wrap around
    std::copy_n(in_.scales + tile * TILE, count, scale);
    if (in_.zeros) std::copy_n(in_.zeros + tile * TILE, count, zero);
    if (weight_sums) std::copy_n(weight_sums, count, sums);
    if (in_.bias) to_floats(in_.bias, in_.bias_dtype, tile * TILE, count, bias);
    const bool plain = !in_.zeros && !weight_sums;  // nothing to take off
    for (int r = 0; r < rows; ++r) {
      float x_scale = scales_[first + r];
      uint32_t xz = uint32_t(zeros_[first + r]), of_zero = uint32_t(sums_[first + r]) - uint32_t(in_.k) * xz;
      for (int at = 0; at < count; at += TILE) {
        const int32_t* sum = products + at / TILE * pitch + r * TILE;
        alignas(64) uint32_t left[TILE];
        std::memcpy(left, sum, sizeof left);
        if (!plain)
          for (int i = 0; i < TILE; ++i) left[i] -= (offset + xz) * sums[at + i] + zero[at + i] * of_zero;
        for (int i = 0; i < TILE; ++i)
          y[at + i] = float(int32_t(left[i])) * x_scale * scale[at + i] + bias[at + i];
      }
      from_floats(y, count, in_.y, in_.y_dtype, (first + r) * in_.n + tile * TILE);
    }
  }

  Arguments in_;
  int64_t words_, tiles_;
  std::vector<float> scales_;
  std::vector<int32_t> zeros_, sums_;

 private:
  void quantize(int64_t row, std::vector<float>& buffer, int8_t* codes) {
    float scale = in_.x_scales ? in_.x_scales[row * in_.scale_step] : 0;
    int32_t zero = in_.x_zeros ? in_.x_zeros[row * in_.zero_step] : 0;
    if (in_.x_dtype == I8) {
      std::memcpy(codes, static_cast<const int8_t*>(in_.x) + row * in_.x_stride, in_.k);
    } else {
      const float* x = row_of(in_.x, in_.x_dtype, row * in_.x_stride, in_.k, buffer);
      if (in_.x_scales)
        quantize_known(x, in_.k, scale, zero, codes);
      else
        quantize_group(x, in_.k, largest_of(x, in_.k), true, codes, scale, zero);
    }
    scales_[row] = scale, zeros_[row] = zero;
    if (row + 1 < in_.m) fetch((row + 1) * in_.x_stride * size_of(in_.x_dtype), in_.k * size_of(in_.x_dtype));
    if (!in_.zeros) return;
    int32_t sum = 0;
    for (int64_t k = 0, count = in_.k; k < count; ++k) sum += codes[k];
    sums_[row] = sum;
  }

  void fetch(int64_t from, int64_t bytes) const {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(in_.x) + from + at);
  }
};

}  // namespace
