// The product of bf16 activations on AMX.
//
// For some tiles of outputs and all rows at once, a block of inputs after the other: the block of a tile's weights is
// unpacked into the L1 cache, where the rows pass by it. Sums of a group's products leave their registers as they are.
// Beside the products, which have a unit of their own, the vector units unpack the block that comes next, multiply the
// last sums by their group's scale and add them up.
#pragma once

#include <vector>

#include "amx_tiles.h"
#include "layer.h"
#include "../room.h"
#include "step.h"

#if defined(__AMX_TILE__) && defined(__AVX512BF16__)

namespace {

template <int BITS>
class TileProduct : public Layer<BITS> {
  using Base = Layer<BITS>;
  using Base::factors, Base::finish, Base::in_, Base::read_factors, Base::words, Base::words_;
  using Step = ::Step<BITS>;
  static constexpr int WORDS = Step::WORDS, PAIRS = Step::PAIRS;
  static constexpr int MOST_STEPS = 4;                     // of a block: 16 KiB of weights, and the next beside them
  static constexpr int PART_STEPS = 16;                    // of a larger group's parts: sums are folded in after each
  static constexpr int FEW_ROWS = 32;                      // up to so many, larger parts would only leave the L1 cache
  static constexpr int64_t MOST_ROWS = 512;  // of a task; its sums and its block of x share the L2 cache
  static constexpr int NEAR = 4;         // row tiles that pass by one group's weights while their sums stay in L1
  static constexpr int WIDE = 4;         // tiles of outputs whose sums are kept at a time: x is read anew for the next

 public:
  static bool takes(const Arguments& in) {
    return in.x_dtype == BF16 && !in.g_idx && (in.groups == 1 || in.k / in.groups % Step::INPUTS == 0);
  }

  explicit TileProduct(const Arguments& in)
      : Base(in), steps_(Step::count(in.k)), group_(Step::count(in.k / in.groups)),
        height_(amx::tile_rows(in.m)), row_tiles_((in.m + height_ - 1) / height_),
        x_(row_tiles_ * height_ * steps_ * 16),
        sums_(in.zeros ? row_tiles_ * height_ * in.groups : 0) {
    int64_t part = in.m > FEW_ROWS ? PART_STEPS : MOST_STEPS;
    for (int64_t begin = 0, end; begin < steps_; begin = end) {  // whole groups, or a part of one
      end = begin + std::max<int64_t>(1, MOST_STEPS / group_) * group_;
      if (group_ > part) end = std::min(begin + part, (begin / group_ + 1) * group_);
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
    amx::Tiles tiles(height_);
    Scratch s(std::min<int64_t>(WIDE, Base::tiles()) * std::min(MOST_ROWS + 16, row_tiles_ * height_) * TILE);
    Unpacking(*this, {task % Base::tiles(), 0}, {}, s.unpacked[0]).rest();
    while (task < end) {
      int64_t chunk = task / Base::tiles(), tile = task % Base::tiles();
      int64_t many = std::min({end - task, Base::tiles() - tile, int64_t(WIDE)});
      read_factors(tile, tile + many);
      task += many;
      several(tile, many, task < end ? task % Base::tiles() : -1, row_tiles_ * chunk / chunks(),
              row_tiles_ * (chunk + 1) / chunks(), s);
    }
  }

 private:
  struct Block {
    int64_t begin, end;  // steps
  };

  struct Scratch {
    explicit Scratch(size_t sums) : c(sums) {}
    alignas(64) int32_t unpacked[2][PART_STEPS * TILE * 16];
    int turn = 0;  // the one that is multiplied; the other is filled meanwhile
    alignas(64) float sums[2][32 * 32], scale[MOST_STEPS][TILE], shift[MOST_STEPS][TILE];
    Room<float> c;
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
    for (Block block : blocks_)
      for (int64_t step = block.begin; step < block.end; ++step) {
        int64_t count = row < in_.m ? std::min<int64_t>(Step::INPUTS, in_.k - step * Step::INPUTS) : 0;
        __m512i inputs = Step::inputs(x + step * Step::INPUTS, count);
        if (sums) {
          __m512 low = (__m512)_mm512_slli_epi32(inputs, 16), high = (__m512)((vu)inputs & 0xffff0000u);
          sums[step / group_] += _mm512_reduce_add_ps(low + high);
        }
        ::store(tile_of(row / height_, block, step - block.begin) + row % height_ * 16, Step::as_unpacked(inputs));
      }
  }

  // A block of a tile's weights.
  struct Item {
    int64_t tile = -1;
    size_t block = 0;
  };

  // Weights on their way to [steps][column tiles][16][16] pairs, a word of each output at a time.
  class Unpacking {
   public:
    Unpacking(const TileProduct& of, Item item, Item after, int32_t* out) : out_(out) {
      if (item.tile < 0) return;
      Block block = of.blocks_[item.block];
      from_ = of.words(item.tile, block.begin * WORDS);
      ahead_ = after.tile < 0 ? from_ : of.words(after.tile, of.blocks_[after.block].begin * WORDS);
      words_ = std::min(block.end * WORDS, of.words_) - block.begin * WORDS;
      if (int64_t all = (block.end - block.begin) * WORDS; words_ < all)  // zeros behind the last
        std::fill(out + (all / WORDS - 1) * TILE * 16, out + all / WORDS * TILE * 16, 0);
    }

    // One of `parts` equal parts of the work.
    void part(int64_t parts) {
      for (share_ += words_; share_ >= parts && word_ < words_; share_ -= parts) one();
    }
    void rest() {
      while (word_ < words_) one();
      amx::fence();
    }

   private:
    void one() {
      int32_t* out = out_ + word_ / WORDS * TILE * 16 + word_ % WORDS * PAIRS * 16;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        vi packed = ::load<vi>(from_ + word_ * TILE + v * 16);
        __builtin_prefetch(ahead_ + word_ * TILE + v * 16);
#pragma GCC unroll 4
        for (int i = 0; i < PAIRS; ++i) ::store(out + v * 256 + i * 16, Pairs::weights<BITS>(packed, i));
      }
      ++word_;
    }

    const int32_t *from_ = nullptr, *ahead_ = nullptr;
    int32_t* out_;
    int64_t words_ = 0, word_ = 0, share_ = 0;
  };

  // Rows of tiles [first, end) times `many` tiles of outputs; the next call begins with tile `next` (none: -1).
  void several(int64_t tile, int64_t many, int64_t next, int64_t first, int64_t end, Scratch& s) const {
    int64_t rows = (end - first) * height_, items = int64_t(blocks_.size()) * many;
    std::fill_n(s.c.get(), many * rows * TILE, 0.0f);
    auto item = [&](int64_t i) {
      return i < items ? Item{tile + i % many, size_t(i / many)} : Item{i == items ? next : -1, 0};
    };
    for (int64_t i = 0; i < items; ++i, s.turn ^= 1) {
      Unpacking unpacking(*this, item(i + 1), item(i + 2), s.unpacked[s.turn ^ 1]);
      multiply(item(i), first, end, unpacking, s, s.c.get() + i % many * rows * TILE);
      unpacking.rest();
    }
    for (int64_t i = 0; i < many; ++i)
      finish(tile + i, first * height_, int(std::min(rows, in_.m - first * height_)), s.c.get() + i * rows * TILE);
  }

  void multiply(Item item, int64_t first, int64_t end, Unpacking& unpacking, Scratch& s, float* c) const {
    Block block = blocks_[item.block];
    for (int64_t from = block.begin, part = 0; from < block.end; from = after(block, from), ++part)
      factors(item.tile, from / group_, s.scale[part], s.shift[part]);
    int64_t row = first, parts = (block.end - block.begin) * ((end - first));
    for (int64_t to; row + 1 < end; c += (to - row) * height_ * TILE, row = to) {
      to = row + std::min<int64_t>(NEAR, (end - row) / 2 * 2);
      pass<2, 2>(block, row, to, parts, unpacking, s, c);
    }
    pass<1, 4>(block, row, end, parts, unpacking, s, c);
  }

  // The step after the group that holds `step`, or after the block.
  int64_t after(Block block, int64_t step) const { return std::min(block.end, (step / group_ + 1) * group_); }

  // R tiles of rows times V of outputs at a time.
  template <int R, int V>
  void pass(Block block, int64_t first, int64_t end, int64_t parts, Unpacking& unpacking, Scratch& s,
            float* c) const {
    Pending<V> pending;
    int turn = 0;
    int64_t x_tile = (block.end - block.begin) * height_ * amx::LINE;
    for (int64_t from = block.begin, to, part = 0; from < block.end; from = to, ++part) {
      to = after(block, from);
      for (int64_t row = first; row < end; row += R)
        for (int at = 0; at < TILE; at += V * 16, turn ^= 1) {
          int steps = int(to - from), rows = pending.rows;
          auto* x = reinterpret_cast<const char*>(tile_of(row, block, from - block.begin));
          auto* w = reinterpret_cast<const char*>(s.unpacked[s.turn] + (from - block.begin) * TILE * 16 + at * 16);
          amx::begin<R, V>();
          amx::multiply<R, V, false>(x, x_tile, height_, w, steps, [&](int step) {
            pending.add(rows * step / steps, rows * (step + 1) / steps, in_.groups);
            unpacking.part(parts);
          });
          amx::store<R, V>(s.sums[turn], height_, V * amx::LINE);
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
  Room<int32_t> x_;        // [blocks][row tiles][steps of the block][rows of a tile][16 pairs]
  std::vector<float> sums_;  // [rows, groups], where zeros ask for them
  std::vector<Block> blocks_;
};

}  // namespace

#endif
