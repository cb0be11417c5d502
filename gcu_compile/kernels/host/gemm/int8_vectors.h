// Integer products with vectors: vpdpbusd where there is one, else what the instruction set has.
//
// vpdpbusd wants activations unsigned, so they carry 128 on top. A row of ones runs along as row 0 of every task: its
// sums are the sums of the weights, with which the 128 and the zeros of x are taken off again.
#pragma once

#include "int8_product.h"

namespace {

constexpr int ROWS = 191;    // rows of x in a task; with the row of ones a multiple of every MR
constexpr int AHEAD = 2048;  // words that a stream is fetched before its use: two pages
constexpr int BLOCK = 512;   // words of inputs in a pass over the rows: 128 KiB of weights
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

class VectorProduct : public Int8Product {
 public:
  explicit VectorProduct(const Arguments& in)
      : Int8Product(in), x_(new int32_t[in.m * words_]), ones_(words_, 0x01010101) {}

  int64_t tasks() const override { return tiles_ * chunks(); }

  void work(int64_t task, int64_t end) const override {
    std::vector<int32_t> c;
    for (; task < end; ++task) {
      int64_t tile = task / chunks(), first = in_.m * (task % chunks()) / chunks();
      int rows = int(in_.m * (task % chunks() + 1) / chunks() - first);
      c.resize((rows + 1) * TILE);
      multiply(tile, first, rows + 1, c.data());
      finish(tile, 1, first, rows, c.data() + TILE, 0, c.data(), OFFSET);
    }
  }

 private:
  int64_t chunks() const { return (in_.m + ROWS - 1) / ROWS; }  // of rows

  void keep(int64_t row, const int8_t* codes) override {
    auto* out = reinterpret_cast<uint8_t*>(x_.get() + row * words_);
    const int64_t count = words_ * 4;  // bytes may alias anything: a bound in memory would be read in every round
    for (int64_t k = 0; k < count; ++k) out[k] = uint8_t(codes[k] + OFFSET);  // behind the row weights are zero
  }

  const int32_t* row(int64_t first, int r) const { return r ? x_.get() + (first + r - 1) * words_ : ones_.data(); }

  void multiply(int64_t tile, int64_t first, int rows, int32_t* c) const {
    int pieces = (rows + MR - 1) / MR, height = rows / pieces, higher = rows % pieces;  // register tiles
    for (int64_t begin = 0; begin < words_; begin += BLOCK) {
      int64_t end = std::min(words_, begin + BLOCK);
      for (int at = 0; at < TILE; at += SUB)
        for (int piece = 0, r = 0, count; piece < pieces; ++piece, r += count) {
          count = height + (piece < higher);
          some(count, weights(tile) + at, begin, end, first, r, c + r * TILE + at);
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

  std::unique_ptr<int32_t[]> x_;  // [m, words]
  std::vector<int32_t> ones_;
};

}  // namespace
