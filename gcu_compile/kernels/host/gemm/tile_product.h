// The product of bf16 activations on AMX.
//
// For some tiles of outputs and all rows at once, a block of inputs after the other: the block of a tile's weights is
// unpacked into the L1 cache, where the rows pass by it. Sums of a group's products leave their registers as they are;
// while the next are made, the vector units multiply them by the group's scale and add them up.
#pragma once

#include <memory>
#include <vector>

#include "amx_tiles.h"
#include "layer.h"

#if defined(__AMX_TILE__) && defined(__AVX512BF16__)

namespace {

template <int BITS>
class TileProduct : public Layer<BITS> {
  using Base = Layer<BITS>;
  using Base::factors, Base::finish, Base::in_, Base::read_factors, Base::words, Base::words_;
  static constexpr int PER_STEP = 32;                      // inputs
  static constexpr int WORDS = PER_STEP / PER_WORD<BITS>;  // of a step
  static constexpr int PAIRS = PER_WORD<BITS> / 2;         // of a word
  static constexpr int MOST_STEPS = 8, FEW_STEPS = 4;      // of a block, for many and for few rows
  static constexpr int FEW_ROWS = 32;
  static constexpr int MOST_ROWS = 512;  // of a task; its sums and its block of x share the L2 cache
  static constexpr int NEAR = 4;         // row tiles that pass by one group's weights while their sums stay in L1
  static constexpr int WIDE = 4;         // tiles of outputs whose sums are kept at a time: x is read anew for the next

 public:
  static bool takes(const Arguments& in) {
    return in.x_dtype == BF16 && !in.g_idx && (in.groups == 1 || in.k / in.groups % PER_STEP == 0);
  }

  explicit TileProduct(const Arguments& in)
      : Base(in), steps_((in.k + PER_STEP - 1) / PER_STEP), group_((in.k / in.groups + PER_STEP - 1) / PER_STEP),
        height_(amx::tile_rows(in.m)), row_tiles_((in.m + height_ - 1) / height_),
        x_(new (std::align_val_t(64)) int32_t[row_tiles_ * height_ * steps_ * 16]),
        sums_(in.zeros ? row_tiles_ * height_ * in.groups : 0) {
    int64_t most = in.m > FEW_ROWS ? MOST_STEPS : FEW_STEPS;
    for (int64_t begin = 0, end; begin < steps_; begin = end) {  // whole groups, or a part of one
      end = begin + std::max<int64_t>(1, most / group_) * group_;
      if (group_ > most) end = std::min(begin + most, (begin / group_ + 1) * group_);
      blocks_.push_back({begin, end = std::min(end, steps_)});
    }
  }

  int64_t tasks() const override { return Base::tiles() * chunks(); }
  int64_t weights_cost() const override { return 40; }

  void lay_out(int64_t row, int64_t end) override {
    if (end == in_.m) end = row_tiles_ * height_;
    for (; row < end; ++row) lay_out(row);
  }

  void work(int64_t task, int64_t end) const override {
    amx::ProductTiles tiles(height_);
    Scratch s;
    while (task < end) {
      int64_t chunk = task / Base::tiles(), tile = task % Base::tiles();
      int64_t many = std::min({end - task, Base::tiles() - tile, int64_t(WIDE)});
      read_factors(tile, tile + many);
      several(tile, many, row_tiles_ * chunk / chunks(), row_tiles_ * (chunk + 1) / chunks(), s);
      task += many;
    }
  }

 private:
  struct Block {
    int64_t begin, end;  // steps
  };
  struct Freed {
    void operator()(int32_t* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };

  struct Scratch {
    alignas(64) int32_t unpacked[MOST_STEPS * TILE * 16];
    alignas(64) float sums[2][32 * 32], scale[MOST_STEPS][TILE], shift[MOST_STEPS][TILE];
    std::vector<float> c;
  };

  // Sums of products of one group, on their way to c.
  template <int V>
  struct Pending {
    const float *sums = nullptr, *scale = nullptr, *shift = nullptr, *x_sums = nullptr;
    float* c = nullptr;
    int rows = 0;

    // Rows [first, end): c += scale * sum - shift * (sum of x).
    void add(int first, int end, int64_t spans) const {
      if (first == end) return;
      vf scales[V];
      for (int v = 0; v < V; ++v) scales[v] = ::load<vf>(scale + v * 16);
      for (int r = first; r < end; ++r)
        for (int v = 0; v < V; ++v) {
          float* out = c + r * TILE + v * 16;
          vf value = fma(::load<vf>(sums + (r * V + v) * 16), scales[v], ::load<vf>(out));
          if (shift) value = fma(::load<vf>(shift + v * 16), splat(-x_sums[r * spans]), value);
          ::store(out, value);
        }
    }
  };

  int64_t chunks() const { return (row_tiles_ * height_ + MOST_ROWS - 1) / MOST_ROWS; }  // of rows

  // Step of a block in the tile of rows that starts it.
  int32_t* tile_of(int64_t row_tile, Block block, int64_t step) const {
    return x_.get() + ((block.begin * row_tiles_ + row_tile * (block.end - block.begin)) + step) * height_ * 16;
  }

  void lay_out(int64_t row) {
    float* sums = in_.zeros ? &sums_[row * in_.groups] : nullptr;
    const uint16_t* x = static_cast<const uint16_t*>(in_.x) + row * in_.x_stride;
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = BITS == 4 ? i / 8 * 8 + i % 2 * 4 + i % 8 / 2 : i;
    for (Block block : blocks_)
      for (int64_t step = block.begin; step < block.end; ++step) {
        int64_t count = row < in_.m ? std::min<int64_t>(PER_STEP, in_.k - step * PER_STEP) : 0;
        __m512i inputs = _mm512_maskz_loadu_epi16(uint32_t((uint64_t(1) << count) - 1), x + step * PER_STEP);
        if (sums) {
          __m512 low = (__m512)_mm512_slli_epi32(inputs, 16), high = (__m512)((vu)inputs & 0xffff0000u);
          sums[step / group_] += _mm512_reduce_add_ps(low + high);
        }
        inputs = _mm512_permutexvar_epi16(_mm512_load_si512(order), inputs);
        ::store(tile_of(row / height_, block, step - block.begin) + row % height_ * 16, inputs);
      }
  }

  // [rows of tiles] x [tiles of outputs]
  void several(int64_t tile, int64_t many, int64_t first, int64_t end, Scratch& s) const {
    int64_t rows = (end - first) * height_;
    s.c.assign(many * rows * TILE, 0.0f);
    for (Block block : blocks_)
      for (int64_t i = 0; i < many; ++i) {
        const int32_t* next = i + 1 < many ? words(tile + i + 1, block.begin * WORDS) : words(tile, block.end * WORDS);
        unpack(tile + i, block, next, s.unpacked);
        multiply(tile + i, block, first, end, s, s.c.data() + i * rows * TILE);
      }
    for (int64_t i = 0; i < many; ++i)
      finish(tile + i, first * height_, int(std::min(rows, in_.m - first * height_)), s.c.data() + i * rows * TILE);
  }

  // [steps][column tiles][16][16] pairs; zeros behind the last word.
  void unpack(int64_t tile, Block block, const int32_t* ahead, int32_t* out) const {
    const int32_t* from = words(tile, block.begin * WORDS);
    for (int64_t step = block.begin; step < block.end; ++step, out += TILE * 16, from += WORDS * TILE) {
      if ((step + 1) * WORDS > words_) {
        std::fill(out, out + TILE * 16, 0);
        unpack_step(from, ahead, int(words_ - step * WORDS), out);
      } else {
        unpack_step(from, ahead, WORDS, out);
      }
      ahead += WORDS * TILE;
    }
    amx::fence();
  }

  static void unpack_step(const int32_t* from, const int32_t* ahead, int count, int32_t* out) {
    for (int word = 0; word < count; ++word, out += PAIRS * 16)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        vi packed = ::load<vi>(from + word * TILE + v * 16);
        __builtin_prefetch(ahead + word * TILE + v * 16);
#pragma GCC unroll 4
        for (int i = 0; i < PAIRS; ++i)
          ::store(out + v * 256 + i * 16, Pairs::weights<BITS>(packed, i));
      }
  }

  void multiply(int64_t tile, Block block, int64_t first, int64_t end, Scratch& s, float* c) const {
    for (int64_t from = block.begin, part = 0; from < block.end; from = after(block, from), ++part)
      factors(tile, from / group_, s.scale[part], s.shift[part]);
    int64_t row = first;
    for (int64_t to; row + 1 < end; c += (to - row) * height_ * TILE, row = to) {
      to = row + std::min<int64_t>(NEAR, (end - row) / 2 * 2);
      pass<2, 2>(block, row, to, s, c);
    }
    pass<1, 4>(block, row, end, s, c);
  }

  // The step after the group that holds `step`, or after the block.
  int64_t after(Block block, int64_t step) const { return std::min(block.end, (step / group_ + 1) * group_); }

  // R tiles of rows times V of outputs at a time.
  template <int R, int V>
  void pass(Block block, int64_t first, int64_t end, Scratch& s, float* c) const {
    Pending<V> pending;
    int turn = 0;
    int64_t x_tile = (block.end - block.begin) * height_ * amx::LINE;
    for (int64_t from = block.begin, to, part = 0; from < block.end; from = to, ++part) {
      to = after(block, from);
      for (int64_t row = first; row < end; row += R)
        for (int at = 0; at < TILE; at += V * 16, turn ^= 1) {
          int steps = int(to - from), rows = pending.rows;
          auto* x = reinterpret_cast<const char*>(tile_of(row, block, from - block.begin));
          auto* w = reinterpret_cast<const char*>(s.unpacked) + (from - block.begin) * 4 * amx::TILE_BYTES + at * 64;
          amx::multiply<R, V>(x, x_tile, height_, w, steps, [&](int step) {
            pending.add(rows * step / steps, rows * (step + 1) / steps, in_.groups);
          });
          amx::store<R, V>(s.sums[turn], height_);
          bool shifted = in_.zeros && from % group_ == 0;
          pending = {s.sums[turn], s.scale[part] + at, shifted ? s.shift[part] + at : nullptr,
                     shifted ? &sums_[row * height_ * in_.groups + from / group_] : nullptr,
                     c + (row - first) * height_ * TILE + at, R * height_};
        }
    }
    pending.add(0, pending.rows, in_.groups);
  }

  int64_t steps_, group_;  // of a row; of a group
  int height_;             // rows of a tile
  int64_t row_tiles_;      // the last rows of the last may be of no row of x: zeros
  std::unique_ptr<int32_t[], Freed> x_;  // [blocks][row tiles][steps of the block][rows of a tile][16 pairs]
  std::vector<float> sums_;              // [rows, groups], where zeros ask for them
  std::vector<Block> blocks_;
};

}  // namespace

#endif
