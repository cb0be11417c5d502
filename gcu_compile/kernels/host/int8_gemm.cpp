// Linear layer in integers: y = sum_k (xq - xz) (wq - wz) * x_scale * scale + bias, and the quantisation of activations
// to int8. See dequant_gemm/eager.py.
//
// Weights are tiles of 64 outputs in VNNI order: [N / 64][K / 4][64] words of four neighbouring inputs. Activations
// are quantised (or copied) into words of four as well; vpdpbusd wants them unsigned, so they carry 128 on top.
// A row of ones runs along as row 0 of every task: its sums are the sums of the weights, with which
//   sum (xq - xz)(wq - wz) = sum xu wq - (128 + xz) sum wq - wz sum xq + K xz wz,      xu = xq + 128
// All of it is exact modulo 2^32; the Python side refuses K for which the left side could exceed it.
#include <memory>

#include "gemm/jobs.h"
#include "quantize.h"

// Field order is that of `Arguments` in host/int8_gemm.py.
struct Arguments {
  const void* x;              // [m, k], int8 or floating point, rows `x_stride` elements apart
  const float* x_scales;      // [m], or null: per token, from x
  const int32_t* x_zeros;     // [m], or null
  const int32_t* weight;      // tiles
  const float* scales;        // [n]
  const int32_t* zeros;       // [n], or null
  const void* bias;           // [n], or null
  void* y;                    // [m, n]
  int64_t m, k, n, x_stride;
  int32_t x_dtype, y_dtype, bias_dtype, threads;
};

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

constexpr int TILE = 64;      // outputs
constexpr int ROWS = 191;     // rows of x in a task; with the row of ones a multiple of every MR
constexpr int AHEAD = 2048;   // words that a stream is fetched before its use: two pages
constexpr int BLOCK = 512;    // words of inputs in a pass over the rows: 128 KiB of weights
#if defined(__AVX512F__)
constexpr int NV = 4, MR = 6;
#elif defined(__AVX2__)
constexpr int NV = 2, MR = 4;
#else
constexpr int NV = 2, MR = 2;
#endif
constexpr int SUB = NV * LANES;

#if defined(__AVX512VNNI__)
constexpr int OFFSET = 128;  // what activations carry on top of their code
#else
constexpr int OFFSET = 0;
#endif

// sum + the four products of bytes in every lane of w with the bytes of x.
inline vi dot(vi sum, vi w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  __m256i xs = _mm256_set1_epi32(x), ws = (__m256i)w;
  __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(ws, 8), 8),
                                   _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(ws, 8), _mm256_srai_epi16(xs, 8));
  return sum + (vi)even + (vi)odd;
#else
  for (int i = 0; i < 4; ++i) sum += ((w << (24 - 8 * i)) >> 24) * int32_t(int8_t(x >> (8 * i)));
  return sum;
#endif
}

class Product : public Job {
 public:
  explicit Product(const Arguments& in)
      : in_(in), words_((in.k + 3) / 4), x_(new int32_t[in.m * words_]), scales_(in.m), zeros_(in.m), sums_(in.m),
        ones_(words_, 0x01010101) {}

  int64_t rows() const override { return in_.m; }
  int64_t tasks() const override { return (in_.n + TILE - 1) / TILE * chunks(); }

  void lay_out(int64_t row, int64_t end) override {
    std::vector<float> buffer;
    std::vector<int8_t> codes(words_ * 4);
    for (; row < end; ++row) lay_out(row, buffer, codes);
  }

  void work(int64_t task, int64_t end) const override {
    std::vector<int32_t> c;
    for (; task < end; ++task) {
      int64_t tile = task / chunks(), first = in_.m * (task % chunks()) / chunks();
      int rows = int(in_.m * (task % chunks() + 1) / chunks() - first);
      c.resize((rows + 1) * TILE);
      multiply(tile, first, rows + 1, c.data());
      finish(tile, first, rows, c.data());
    }
  }

 private:
  int64_t chunks() const { return (in_.m + ROWS - 1) / ROWS; }  // of rows

  void lay_out(int64_t row, std::vector<float>& buffer, std::vector<int8_t>& codes) {
    const int8_t* from = codes.data();
    float scale = in_.x_scales ? in_.x_scales[row] : 0;
    int32_t zero = in_.x_zeros ? in_.x_zeros[row] : 0;
    if (in_.x_dtype == I8) {
      std::memcpy(codes.data(), static_cast<const int8_t*>(in_.x) + row * in_.x_stride, in_.k);
    } else {
      const float* x = row_of(in_.x, in_.x_dtype, row * in_.x_stride, in_.k, buffer);
      if (in_.x_scales)
        quantize_known(x, in_.k, scale, zero, codes.data());
      else
        quantize_group(x, in_.k, largest_of(x, in_.k), true, codes.data(), scale, zero);
    }
    scales_[row] = scale, zeros_[row] = zero;
    if (row + 1 < in_.m) fetch(in_.x, (row + 1) * in_.x_stride * size_of(in_.x_dtype), in_.k * size_of(in_.x_dtype));
    auto* out = reinterpret_cast<uint8_t*>(x_.get() + row * words_);
    int32_t sum = 0;
    const int64_t count = in_.k;  // bytes may alias anything: a bound in memory would be read in every round
    for (int64_t k = 0; k < count; ++k) {
      sum += from[k];
      out[k] = uint8_t(from[k] + OFFSET);
    }
    std::fill(out + count, out + words_ * 4, uint8_t(0));  // weights are zero there too
    sums_[row] = sum;
  }

  static void fetch(const void* p, int64_t from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + from + at);
  }

  const int32_t* row(int64_t first, int r) const { return r ? x_.get() + (first + r - 1) * words_ : ones_.data(); }

  void multiply(int64_t tile, int64_t first, int rows, int32_t* c) const {
    int pieces = (rows + MR - 1) / MR, height = rows / pieces, higher = rows % pieces;  // register tiles
    for (int64_t begin = 0; begin < words_; begin += BLOCK) {
      int64_t end = std::min(words_, begin + BLOCK);
      for (int at = 0; at < TILE; at += SUB)
        for (int piece = 0, r = 0, count; piece < pieces; ++piece, r += count) {
          count = height + (piece < higher);
          some(count, in_.weight + tile * words_ * TILE + at, begin, end, first, r, c + r * TILE + at);
        }
    }
  }

  template <int M = MR>
  void some(int rows, const int32_t* w, int64_t begin, int64_t end, int64_t first, int r0, int32_t* c) const {
    if constexpr (M > 1)
      if (rows < M) return some<M - 1>(rows, w, begin, end, first, r0, c);
    vi sum[M][NV] = {};
    const int32_t* x[M];
    for (int r = 0; r < M; ++r) x[r] = row(first, r0 + r);
    for (int64_t word = begin; word < end; ++word) {
      vi value[NV];
      for (int v = 0; v < NV; ++v) {
        value[v] = load<vi>(w + word * TILE + v * LANES);
        if (M <= 2 && v * LANES % 16 == 0) __builtin_prefetch(w + word * TILE + v * LANES + AHEAD);
      }
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < NV; ++v) sum[r][v] = dot(sum[r][v], value[v], x[r][word]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)  // unrolled: the sums stay in registers
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        int32_t* out = c + r * TILE + v * LANES;
        store(out, begin ? (vi)(load<vi>(out) + sum[r][v]) : sum[r][v]);
      }
  }

  void finish(int64_t tile, int64_t first, int rows, const int32_t* c) const {
    int count = int(std::min<int64_t>(TILE, in_.n - tile * TILE));
    float scale[TILE], bias[TILE] = {}, y[TILE];
    uint32_t zero[TILE] = {};  // unsigned: sums wrap around
    std::copy_n(in_.scales + tile * TILE, count, scale);
    if (in_.zeros) std::copy_n(in_.zeros + tile * TILE, count, zero);
    if (in_.bias) to_floats(in_.bias, in_.bias_dtype, tile * TILE, count, bias);
    for (int r = 0; r < rows; ++r) {
      uint32_t xz = uint32_t(zeros_[first + r]), sum = uint32_t(sums_[first + r]);
      float x_scale = scales_[first + r];
      const int32_t* products = c + (r + 1) * TILE;
      for (int i = 0; i < count; ++i) {
        uint32_t exact = uint32_t(products[i]) - (OFFSET + xz) * uint32_t(c[i]) - zero[i] * (sum - uint32_t(in_.k) * xz);
        y[i] = float(int32_t(exact)) * x_scale * scale[i] + bias[i];
      }
      from_floats(y, count, in_.y, in_.y_dtype, (first + r) * in_.n + tile * TILE);
    }
  }

  Arguments in_;
  int64_t words_;
  std::unique_ptr<int32_t[]> x_;  // [m, words]
  std::vector<float> scales_;
  std::vector<int32_t> zeros_, sums_, ones_;
};

// What expert e multiplies.
Arguments of_expert(Arguments one, int64_t e, int64_t first, int64_t rows) {
  one.m = rows;
  advance(one.x, first * one.x_stride, one.x_dtype);
  advance(one.y, first * one.n, one.y_dtype);
  advance(one.x_scales, first, F32);
  advance(one.weight, e * ((one.n + TILE - 1) / TILE * TILE) * ((one.k + 3) / 4), I32);
  advance(one.scales, e * one.n, F32);
  advance(one.bias, e * one.n, one.bias_dtype);
  return one;  // grouped products have no zeros
}

}  // namespace

extern "C" void gcu_int8_gemm(const Arguments* in) {
  Jobs jobs;
  jobs.push_back(std::make_unique<Product>(*in));
  run(jobs, in->threads);
}

extern "C" void gcu_int8_gemm_grouped(const Grouped<Arguments>* in) {
  run(*in, [&](int64_t e, int64_t first, int64_t rows) { return std::make_unique<Product>(of_expert(in->all, e, first, rows)); });
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
