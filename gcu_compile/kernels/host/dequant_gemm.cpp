// Linear layer of 4- and 8-bit weights: y = x @ ((code - zero) * scale).T + bias. See dequant_gemm/eager.py.
//
// Codes are small integers, exact in bf16. So bf16 activations are multiplied as they are (exact products, float32
// sums) and a group's scale and zero are applied to its float32 sum:
//   sum_k x (code - zero) scale = scale * (sum_k x (code - mid) - (zero - mid) * sum_k x)
// Groups that cut words, and act-order, are dequantised input by input into float32 instead. With AMX its tiles make
// the products of bf16, but for one or two rows. For many rows it multiplies weights that are scaled and rounded to bf16
// when they are unpacked: applying a scale to the sums of each group takes as long as their products. Few rows and
// codes of 4 bits are multiplied as integers, where there is an instruction for it.
#include "gemm/digit_product.h"
#include "gemm/digit_tiles.h"
#include "gemm/product.h"
#include "gemm/scaled_product.h"
#include "gemm/tile_product.h"

namespace {

constexpr int VECTOR_ROWS = 2;   // up to so many, a product on vectors ends before the weights are unpacked for AMX
constexpr int DIGITS_TO = 128;   // up to so many, codes of 4 bits are multiplied as bytes
constexpr int SCALED_FROM = 65;  // from so many, scaling the weights takes less than scaling the sums of their groups
template <int BITS>
std::unique_ptr<Job> product(const Arguments& in) {
#if defined(__AVX512VNNI__)
  if (BITS == 4 && DigitProduct::takes(in)) return std::make_unique<DigitProduct>(in);
#endif
#if defined(__AMX_TILE__) && defined(__AVX512BF16__)
  if (BITS == 4 && in.m > VECTOR_ROWS && in.m <= DIGITS_TO && DigitTiles::takes(in))
    return std::make_unique<DigitTiles>(in);
  if (in.m >= SCALED_FROM && in.x_dtype == BF16) return std::make_unique<ScaledProduct<BITS>>(in);
  if (in.m > VECTOR_ROWS && TileProduct<BITS>::takes(in)) return std::make_unique<TileProduct<BITS>>(in);
#endif
  bool apart = in.g_idx || (in.groups > 1 && in.k / in.groups % PER_WORD<BITS>);
#if defined(__AVX512BF16__)
  // With 8 bits and few rows the plain product does less work per code.
  if (in.x_dtype == BF16 && !apart && (BITS == 4 || in.m > 4)) return std::make_unique<Product<Pairs, BITS>>(in, apart);
#endif
  return std::make_unique<Product<Float, BITS>>(in, apart);
}

std::unique_ptr<Job> product(const Arguments& in) { return in.bits == 4 ? product<4>(in) : product<8>(in); }

// What expert e multiplies.
Arguments of_expert(Arguments one, int64_t e, int64_t first, int64_t rows) {
  int64_t per_word = 32 / one.bits;
  one.m = rows;
  advance(one.x, first * one.x_stride, one.x_dtype);
  advance(one.y, first * one.n, one.x_dtype);
  advance(one.weight, e * ((one.n + TILE - 1) / TILE * TILE) * ((one.k + per_word - 1) / per_word), I32);
  advance(one.scales, e * one.groups * one.n, one.scales_dtype);
  advance(one.zeros, e * one.groups * one.n, one.zeros_dtype);
  advance(one.g_idx, e * one.k, I32);
  advance(one.bias, e * one.n, one.bias_dtype);
  return one;
}

}  // namespace

extern "C" void gcu_dequant_gemm(const Arguments* in) {
  Jobs jobs;
  jobs.push_back(product(*in));
  run(jobs, in->threads);
}

extern "C" void gcu_dequant_gemm_grouped(const Grouped<Arguments>* in) {
  run(*in, [&](int64_t e, int64_t first, int64_t rows) { return product(of_expert(in->all, e, first, rows)); });
}
