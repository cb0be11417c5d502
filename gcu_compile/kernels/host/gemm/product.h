// The product on vectors.
//
//   up to 8 rows:  codes go from memory to registers to fma; the read is the cost
//   more rows:     a block of inputs is unpacked once into L1/L2, beside the products of the first rows, and a register-tiled
//                  product runs over the others
#pragma once

#include <memory>
#include <vector>

#include "layer.h"
#include "../room.h"

namespace {

constexpr int BLOCK = 64;      // lanes of x per unpacked block: 16 KiB of weights; sums and rows share the L1 cache
constexpr int ROWS = 192;      // rows of x that share one unpacking
constexpr int DIRECT_ROWS = 8;
constexpr int AHEAD = 2048;    // words that a stream is fetched before its use: two pages, where the machine's own
                               // prefetcher stops at each
#if defined(__AVX512F__)
constexpr int NV = 4, MR = 6;  // vectors x rows of a register tile: 24 sums, 4 weights, 1 activation of 32 registers
#elif defined(__AVX2__)
constexpr int NV = 2, MR = 6;
#else
constexpr int NV = 2, MR = 4;
#endif
constexpr int SUB = NV * LANES;  // outputs of a register tile

template <class P, int BITS>
class Product : public Layer<BITS> {
  using Base = Layer<BITS>;
  using Base::factors, Base::finish, Base::in_, Base::read_factors, Base::row_of, Base::words, Base::words_;
  static constexpr int STEPS = PER_WORD<BITS> / P::PER_LANE;  // lanes of x per word

 public:
  Product(const Arguments& in, bool apart)
      : Base(in), apart_(apart), lanes_(words_ * STEPS),
        group_(apart ? words_ : (in.k / in.groups + PER_WORD<BITS> - 1) / PER_WORD<BITS>),
        spans_(apart || !in.zeros ? 0 : in.groups), x_(new int32_t[in.m * lanes_]), sums_(in.m * spans_) {
    int64_t most = BLOCK / STEPS;
    if (!apart && in.m <= DIRECT_ROWS) most = words_;
    for (int64_t begin = 0, end; begin < words_; begin = end) {  // whole groups, or a part of one
      end = begin + std::max<int64_t>(1, most / group_) * group_;
      if (group_ > most) end = std::min(begin + most, (begin / group_ + 1) * group_);
      blocks_.push_back({begin, end = std::min(end, words_)});
      most_ = std::max(most_, blocks_.back().lanes());
    }
  }

  int64_t tasks() const override { return Base::tiles() * chunks(); }

  void lay_out(int64_t row, int64_t end) override {
    for (; row < end; ++row) lay_out(row);
  }

  void work(int64_t task, int64_t end) const override {
    Room<int32_t> unpacked(most_ * TILE);
    Room<float> c(ROWS * TILE);
    read_factors(task / chunks(), (end - 1) / chunks() + 1);
    for (; task < end; ++task) {
      int64_t tile = task / chunks(), first = in_.m * (task % chunks()) / chunks();
      int rows = int(in_.m * (task % chunks() + 1) / chunks() - first);
      std::fill_n(c.get(), rows * TILE, 0.0f);
      if (!apart_ && in_.m <= DIRECT_ROWS)
        direct(tile, first, rows, c.get());
      else
        blocked(tile, first, rows, c.get(), unpacked.get());
      finish(tile, first, rows, c.get());
    }
  }

 private:
  struct Block {
    int64_t begin, end;  // words
    int64_t lanes() const { return (end - begin) * STEPS; }
  };

  int64_t chunks() const { return (in_.m + ROWS - 1) / ROWS; }  // of rows

  // Lanes of a row in a block. Blocks lie apart, so that the rows of one do not share their place in a cache.
  int32_t* lanes(int64_t row, Block block) const { return x_.get() + block.begin * STEPS * in_.m + row * block.lanes(); }

  // Row of x as lanes, and its sum over each group (for zeros).
  void lay_out(int64_t row) {
    float values[8];
    float* sums = spans_ ? &sums_[row * spans_] : nullptr;
    for (Block block : blocks_) {
      int32_t* out = lanes(row, block);
      for (int64_t word = block.begin; word < block.end; ++word, out += STEPS) {
        int64_t k = word * PER_WORD<BITS>;
#if defined(__AVX512BF16__)
        if constexpr (P::PER_LANE == 2 && BITS == 4)
          if (!sums && k + 8 <= in_.k) {  // (i, i + 4) of eight neighbours: the halves, interleaved
            __m128i x = load<__m128i>(static_cast<const uint16_t*>(in_.x) + row * in_.x_stride + k);
            store(out, _mm_unpacklo_epi16(x, _mm_unpackhi_epi64(x, x)));
            continue;
          }
#endif
        if (k + PER_WORD<BITS> <= in_.k) {  // a count that the compiler knows makes vectors of it
          to_floats(in_.x, in_.x_dtype, row * in_.x_stride + k, PER_WORD<BITS>, values);
        } else {
          std::fill(values, values + 8, 0.0f);
          to_floats(in_.x, in_.x_dtype, row * in_.x_stride + k, int(in_.k - k), values);
        }
        if (sums) {
          float sum = 0;
          for (int i = 0; i < PER_WORD<BITS>; ++i) sum += values[i];
          sums[word / group_] += sum;
        }
        for (int step = 0; step < STEPS; ++step) {
          uint32_t lane = std::bit_cast<uint32_t>(values[P::template input<BITS>(step, 0)]);
          if constexpr (P::PER_LANE == 2)  // both are bf16: their upper halves are all of them
            lane = lane >> 16 | (std::bit_cast<uint32_t>(values[P::template input<BITS>(step, 1)]) & 0xffff0000u);
          out[step] = int32_t(lane);
        }
      }
    }
  }

  // c[r] += scale * sum - shift * (sum of x); no shift (null) without zeros, and after a group's first part.
  template <int M, int V>
  void fold(vf (&sum)[M][V], int at, int64_t first, int64_t group, const float* scale, const float* shift,
            float* c) const {
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)  // unrolled: the sums stay in registers
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        float* out = c + r * TILE + at + v * LANES;
        store(out, fma(sum[r][v], load<vf>(scale + at + v * LANES), load<vf>(out)));
      }
    if (!shift) return;
    for (int r = 0; r < M; ++r)
      for (int v = 0; v < V; ++v) {
        float* out = c + r * TILE + at + v * LANES;
        store(out, (vf)(load<vf>(out) - load<vf>(shift + at + v * LANES) * sums_[(first + r) * spans_ + group]));
      }
  }

  void direct(int64_t tile, int64_t first, int rows, float* c) const {
    switch (rows) {
      case 1: return direct<1>(tile, first, c);
      case 2: return direct<2>(tile, first, c);
      case 3: return direct<3>(tile, first, c);
      case 4: return direct<4>(tile, first, c);
      case 5: return direct<5>(tile, first, c);
      case 6: return direct<6>(tile, first, c);
      case 7: return direct<7>(tile, first, c);
      default: return direct<8>(tile, first, c);
    }
  }

  template <int M>
  void direct(int64_t tile, int64_t first, float* c) const {
    constexpr int CHAINS = M == 1 ? 2 : 1;       // enough independent sums to cover the latency of one
    constexpr int V = M <= 4 ? NV : NV / 2;      // and no more of them than there are registers
    alignas(64) float scale[TILE], shift[TILE];
    for (int64_t begin = 0, group = 0; begin < words_; begin += group_, ++group) {
      factors(tile, group, scale, shift);
      int64_t end = std::min(words_, begin + group_);
      for (int at = 0; at < TILE; at += V * LANES) {
        vf sum[CHAINS][M][V] = {};
        const int32_t* w = words(tile, begin) + at;
        const int32_t* x = lanes(first, blocks_[0]) + begin * STEPS;
        for (int64_t word = begin; word < end; ++word, w += TILE, x += STEPS) {
          vi packed[V];
          for (int v = 0; v < V; ++v) {
            packed[v] = load<vi>(w + v * LANES);
            if (v * LANES % 16 == 0) __builtin_prefetch(w + v * LANES + AHEAD);
          }
#pragma GCC unroll 8
          for (int step = 0; step < STEPS; ++step)
            for (int v = 0; v < V; ++v) {
              vf value = P::template weights<BITS>(packed[v], step);
              for (int r = 0; r < M; ++r) {
                vf& s = sum[step % CHAINS][r][v];
                s = P::add(s, value, x[r * lanes_ + step]);
              }
            }
        }
        if constexpr (CHAINS == 2)
          for (int v = 0; v < V; ++v) sum[0][0][v] += sum[1][0][v];
        fold<M, V>(sum[0], at, first, group, scale, spans_ ? shift : nullptr, c);
      }
    }
  }

  void blocked(int64_t tile, int64_t first, int rows, float* c, int32_t* unpacked) const {
    alignas(64) float scale[TILE], shift[TILE];
    int pieces = (rows + MR - 1) / MR, height = rows / pieces, higher = rows % pieces;  // register tiles
    for (Block block : blocks_) {
      const int32_t* ahead = words(tile, block.end);
      if (apart_) dequantise(tile, block, unpacked);
      for (int64_t from = block.begin, to; from < block.end; from = to) {
        int64_t group = from / group_;
        to = std::min(block.end, (group + 1) * group_);
        if (apart_)
          std::fill(scale, scale + TILE, 1.0f);
        else
          factors(tile, group, scale, shift);
        Part part{words(tile, from), unpacked + (from - block.begin) * STEPS * TILE,
                  lanes(first, block) + (from - block.begin) * STEPS, block.lanes(), to - from, first, group, scale,
                  spans_ && from % group_ == 0 ? shift : nullptr, ahead};
        for (int at = 0; at < TILE; at += SUB)
          for (int piece = 0, r = 0; piece < pieces; ++piece, part.ahead += part.words * STEPS * 16) {
            int count = height + (piece < higher);
            piece || apart_ ? some<false>(count, part, r, at, c + r * TILE) : some<true>(count, part, r, at, c + r * TILE);
            r += count;
          }
        ahead = part.ahead;
      }
    }
  }

  // A block unpacked, with every input's own zero and scale applied.
  void dequantise(int64_t tile, Block block, int32_t* out) const {
    alignas(64) float scale[TILE] = {}, zero[TILE] = {};
    int64_t size = in_.k / in_.groups, last = -1;
    for (int64_t word = block.begin; word < block.end; ++word)
      for (int i = 0; i < PER_WORD<BITS>; ++i, out += TILE) {
        int64_t k = std::min(word * PER_WORD<BITS> + i, in_.k - 1), group = in_.g_idx ? in_.g_idx[k] : k / size;
        if (group != last) {
          row_of(in_.scales, in_.scales_dtype, group, tile, scale);
          if (in_.zeros) {
            row_of(in_.zeros, in_.zeros_dtype, group, tile, zero);
            for (float& z : zero) z -= MIDPOINT<BITS>;
          }
          last = group;
        }
        for (int at = 0; at < TILE; at += LANES) {
          vf code = unpacked<BITS>(load<vi>(words(tile, word) + at), i);
          store(out + at, (code - load<vf>(zero + at)) * load<vf>(scale + at));
        }
      }
  }

  // The inputs of one group in one block.
  struct Part {
    const int32_t* packed;
    int32_t* weights;  // unpacked: [words, STEPS, TILE]
    const int32_t* x;  // lanes of row `first`
    int64_t x_stride, words, first, group;
    const float *scale, *shift;
    const int32_t* ahead;  // packed weights that come next: fetched meanwhile, a line per step
  };

  // Some rows from r0 on. UNPACK: weights are unpacked here, for which there is time between products, and kept.
  template <bool UNPACK, int M = MR>
  void some(int rows, const Part& part, int r0, int at, float* c) const {
    if constexpr (M > 1)
      if (rows < M) return some<UNPACK, M - 1>(rows, part, r0, at, c);
    vf sum[M][NV] = {};
    const int32_t *x = part.x + r0 * part.x_stride, *ahead = part.ahead, *packed = part.packed + at;
    int32_t* w = part.weights + at;
    for (int64_t word = 0; word < part.words; ++word, x += STEPS, ahead += STEPS * 16, packed += TILE)
#pragma GCC unroll 8
      for (int step = 0; step < STEPS; ++step, w += TILE) {
        __builtin_prefetch(ahead + step * 16, 0, 2);
        vf value[NV];
        for (int v = 0; v < NV; ++v) {
          if constexpr (UNPACK) store(w + v * LANES, value[v] = P::template weights<BITS>(load<vi>(packed + v * LANES), step));
          else value[v] = load<vf>(w + v * LANES);
        }
        for (int r = 0; r < M; ++r)
          for (int v = 0; v < NV; ++v) sum[r][v] = P::add(sum[r][v], value[v], x[r * part.x_stride + step]);
      }
    fold<M, NV>(sum, at, part.first + r0, part.group, part.scale, part.shift, c);
  }

  bool apart_;             // dequantised input by input
  int64_t lanes_;          // of a row of inputs
  int64_t group_, spans_;  // words of a group; groups whose sum of x is needed
  std::unique_ptr<int32_t[]> x_;  // [blocks, m, lanes of a block]
  std::vector<float> sums_;  // [m, spans]
  std::vector<Block> blocks_;
  int64_t most_ = 0;  // lanes of a block
};

}  // namespace
