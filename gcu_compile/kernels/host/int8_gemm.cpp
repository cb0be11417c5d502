// Linear layer in integers: y = sum_k (xq - xz) (wq - wz) * x_scale * scale + bias, and the quantisation of activations
// to int8. See dequant_gemm/eager.py.
//
// Weights are tiles of 64 outputs in VNNI order: [N / 64][K / 4][64] words of four neighbouring inputs.
#include "gemm/int8_tiles.h"
#include "gemm/int8_vectors.h"

// Of gcu_quantize; field order is that of `Quantize` in host/int8_gemm.py.
struct Quantize {
  const void* x;  // [rows, k], rows `x_stride` elements apart
  int8_t* codes;  // [rows, k]
  float* scales;  // [rows, k / group]
  int32_t* zeros;
  int64_t rows, k, group, x_stride;
  int32_t x_dtype, symmetric, threads;
};

namespace {

std::unique_ptr<Job> product(const Arguments& in) {
#if defined(__AMX_TILE__)
  constexpr int64_t TILES_FROM = 4;  // fewer rows take as long without
  if (in.m >= TILES_FROM) return std::make_unique<TileProduct>(in);
#endif
  return std::make_unique<VectorProduct>(in);
}

// What expert e multiplies. Its activations have a scale (and a zero) a row, or one that is the expert's.
Arguments of_expert(Arguments one, int64_t e, int64_t first, int64_t rows) {
  one.m = rows;
  advance(one.x, first * one.x_stride, one.x_dtype);
  advance(one.y, first * one.n, one.y_dtype);
  advance(one.x_scales, one.scale_step ? first : e, F32);
  advance(one.x_zeros, one.zero_step ? first : e, I32);
  advance(one.weight, e * ((one.n + TILE - 1) / TILE * TILE) * ((one.k + 3) / 4), I32);
  advance(one.scales, e * one.n, F32);
  advance(one.zeros, e * one.n, I32);
  advance(one.bias, e * one.n, one.bias_dtype);
  return one;
}

}  // namespace

extern "C" void gcu_int8_gemm(const Arguments* in) {
  Jobs jobs;
  jobs.push_back(product(*in));
  run(jobs, in->threads);
}

extern "C" void gcu_int8_gemm_grouped(const Grouped<Arguments>* in) {
  run(*in, [&](int64_t e, int64_t first, int64_t rows) { return product(of_expert(in->all, e, first, rows)); });
}

extern "C" void gcu_quantize(const Quantize* in) {
  int64_t groups = in->k / in->group;
#pragma omp parallel for schedule(static) num_threads(in->threads)
  for (int64_t row = 0; row < in->rows; ++row) {
    std::vector<float> buffer;
    const float* x = row_of(in->x, in->x_dtype, row * in->x_stride, in->k, buffer);
    for (int64_t g = 0; g < groups; ++g) {
      const float* group = x + g * in->group;
      quantize_group(group, in->group, largest_of(group, in->group), in->symmetric,
                     in->codes + row * in->k + g * in->group, in->scales[row * groups + g], in->zeros[row * groups + g]);
    }
  }
}
