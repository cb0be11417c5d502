// The product of many rows of bf16 on AMX: a weight is scaled when it is unpacked, and rounded to bf16 like the rows.
//
// For some tiles of outputs and up to MOST_ROWS rows, a block of inputs after the other. Its weights are unpacked while
// the block before is multiplied: the products have a unit of their own, beside that of the vectors. Sums are float32
// from the first input to the last; between two blocks they rest in memory. Where there is one group, its scale is
// applied to the sum, and the weights are the codes less their zeros.
#pragma once

#include <vector>

#include "amx_tiles.h"
#include "fetch.h"
#include "layer.h"
#include "../room.h"
#include "step.h"

#if defined(__AMX_TILE__) && defined(__AVX512BF16__)

namespace {

template <int BITS>
class ScaledProduct : public Layer<BITS> {
  using Base = Layer<BITS>;
  using Base::finish, Base::in_, Base::row_of, Base::tiles, Base::words, Base::words_;
  using Step = ::Step<BITS>;
  static constexpr int WORDS = Step::WORDS, PAIRS = Step::PAIRS;
  static constexpr int STEP = TILE * 16;  // pairs of a step of a tile's weights
  static constexpr int64_t DEPTH = 16;  // steps of a block: two tiles of its rows stay in the L1 cache
  static constexpr int64_t WIDE = 4;    // tiles of outputs that go by them; their weights and sums stay in the L2 cache
  static constexpr int64_t MOST_ROWS = 512;

 public:
  explicit ScaledProduct(const Arguments& in)
      : Base(in), steps_(Step::count(in.k)), blocks_((steps_ + DEPTH - 1) / DEPTH),
        height_(amx::tile_rows(in.m)), row_tiles_((in.m + height_ - 1) / height_),
        scaled_(in.g_idx || in.groups > 1),
        apart_(in.g_idx || (in.groups > 1 && in.k / in.groups % PER_WORD<BITS>)),
        x_(row_tiles_ * height_ * steps_ * 16) {
    if (in.g_idx) group_of_.assign(in.g_idx, in.g_idx + in.k);
    for (int64_t group = 0; !in.g_idx && group < in.groups; ++group)
      group_of_.insert(group_of_.end(), in.k / in.groups, int32_t(group));
    group_of_.resize(words_ * PER_WORD<BITS>, group_of_.back());
  }

  int64_t tasks() const override { return tiles() * chunks(); }
  int64_t weights_cost() const override { return 40; }

  void lay_out(int64_t row, int64_t end) override {
    if (end == in_.m) end = row_tiles_ * height_;
    for (; row < end; ++row) lay_out(row);
  }

  void work(int64_t task, int64_t end) const override {
    amx::Tiles registers(height_);
    int64_t wide = std::min(WIDE, tiles()), depth = std::min(DEPTH, steps_);
    Room<float> sums(wide * std::min(MOST_ROWS + 16, row_tiles_ * height_) * TILE);
    Room<float> factors(2 * 2 * wide * in_.groups * TILE);
    const int64_t size = wide * depth * STEP;
    Room<int32_t> unpacked(2 * size);
    Set set = set_at(task, end);
    set.take(*this, factors.get());
    int turn = 0;
    Unpacking(*this, set, 0, {}, 0, unpacked.get()).rest();
    for (int side = 1; set.many; side ^= 1) {
      Set next = set_at(task += set.many, end);
      next.take(*this, factors.get() + side * 2 * wide * in_.groups * TILE);
      auto at = [&](int64_t block) { return block < blocks_ ? set : next; };
      for (int64_t block = 0; block < blocks_; ++block, turn ^= 1) {
        Unpacking unpacking(*this, at(block + 1), (block + 1) % blocks_, at(block + 2), (block + 2) % blocks_,
                            unpacked.get() + (turn ^ 1) * size);
        multiply(set, block, unpacked.get() + turn * size, unpacking, sums.get());
        unpacking.rest();
      }
      finish(set, sums.get());
      set = next;
    }
  }

 private:
  // Tiles of outputs and of rows that are worked at together.
  struct Set {
    int64_t tile = 0, many = 0, first = 0, end = 0;
    const float *scale = nullptr, *zero = nullptr;  // [many][groups][TILE]; zeros less the midpoint

    void take(const ScaledProduct& of, float* room) {
      int64_t groups = of.in_.groups, count = many * groups * TILE;
      float* zeros = room + count;
      for (int64_t t = 0; t < many; ++t)
        for (int64_t group = 0; group < groups; ++group)
          of.row_of(of.in_.scales, of.in_.scales_dtype, group, tile + t, room + (t * groups + group) * TILE);
      scale = room;
      if (!of.in_.zeros) return;
      for (int64_t t = 0; t < many; ++t)
        for (int64_t group = 0; group < groups; ++group)
          of.row_of(of.in_.zeros, of.in_.zeros_dtype, group, tile + t, zeros + (t * groups + group) * TILE);
      for (int64_t i = 0; i < count; ++i) zeros[i] -= MIDPOINT<BITS>;
      zero = zeros;
    }
  };

  int64_t chunks() const { return (row_tiles_ * height_ + MOST_ROWS - 1) / MOST_ROWS; }  // of rows

  Set set_at(int64_t task, int64_t end) const {
    if (task >= end) return {};
    int64_t chunk = task / tiles(), tile = task % tiles();
    return {tile, std::min({end - task, tiles() - tile, WIDE}), row_tiles_ * chunk / chunks(),
            row_tiles_ * (chunk + 1) / chunks()};
  }

  int64_t depth(int64_t block) const { return std::min(DEPTH, steps_ - block * DEPTH); }

  // x lies as [blocks][row tiles][steps of a block][rows of a tile][16 pairs].
  int32_t* x(int64_t row_tile, int64_t block) const {
    return x_.get() + (block * DEPTH * row_tiles_ + row_tile * depth(block)) * height_ * 16;
  }

  void lay_out(int64_t row) {
    const uint16_t* from = static_cast<const uint16_t*>(in_.x) + row * in_.x_stride;
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t step = 0; step < depth(block); ++step) {
        int64_t k = (block * DEPTH + step) * Step::INPUTS;
        int64_t count = row < in_.m ? std::min<int64_t>(Step::INPUTS, in_.k - k) : 0;
        ::store(x(row / height_, block) + (step * height_ + row % height_) * 16, Step::as_unpacked(Step::inputs(from + k, count)));
      }
  }

  // Weights of a block on their way to [tiles][steps][column tiles][16][16] pairs, a word of 16 outputs at a time.
  class Unpacking {
   public:
    Unpacking(const ScaledProduct& of, const Set& set, int64_t block, const Set& after, int64_t block_after,
              int32_t* out)
        : of_(of), set_(set), first_(block * DEPTH * WORDS), steps_(of.depth(block)),
          all_(set.many * steps_ * 4 * WORDS), left_(all_), out_(out) {
      if (!all_) return;
      from_ = of.words(set.tile, first_);
      ahead_ = after.many ? of.words(after.tile, block_after * DEPTH * WORDS) : from_;
    }

    // One of `parts` equal parts of the work.
    void part(int64_t parts) {
      for (share_ += all_; share_ >= parts && left_; share_ -= parts) one();
    }
    void rest() {
      while (left_) one();
      amx::fence();
    }

   private:
    void one() {
      if (of_.apart_)
        set_.zero ? one<true, true, true>() : one<true, false, true>();
      else if (set_.zero)
        of_.scaled_ ? one<false, true, true>() : one<false, true, false>();
      else
        of_.scaled_ ? one<false, false, true>() : one<false, false, false>();
      --left_, out_ += PAIRS * 16;
      if (++word_ < WORDS) return;
      word_ = 0;
      if (++v_ < 4) return;
      v_ = 0;
      if (++step_ < steps_) return;
      step_ = 0, ++tile_, from_ += of_.words_ * TILE, ahead_ += of_.words_ * TILE;
    }

    template <bool APART, bool ZEROS, bool SCALED>
    void one() {
      int64_t word = step_ * WORDS + word_;
      int32_t* out = out_;
      if (first_ + word >= of_.words_) {  // behind the last input
        std::fill_n(out, PAIRS * 16, 0);
        return;
      }
      const int32_t* group = &of_.group_of_[(first_ + word) * PER_WORD<BITS>];
      int64_t of_tile = tile_ * of_.in_.groups * TILE + v_ * 16;
      const float* scale = set_.scale + of_tile + group[0] * TILE;
      const float* zero = ZEROS ? set_.zero + of_tile + group[0] * TILE : nullptr;
      vi packed = ::load<vi>(from_ + word * TILE + v_ * 16);
      __builtin_prefetch(ahead_ + word * TILE + v_ * 16);
      auto number = [&](int input) {
        vf x = unpacked<BITS>(packed, input);
        int64_t at = APART ? of_tile + group[input] * TILE : 0;
        if constexpr (ZEROS) x -= ::load<vf>((APART ? set_.zero : zero) + at);
        if constexpr (SCALED) x *= ::load<vf>((APART ? set_.scale : scale) + at);
        return x;
      };
#pragma GCC unroll 4
      for (int i = 0; i < PAIRS; ++i) {
        vi pair;
        if constexpr (ZEROS || SCALED)
          pair = pairs(number(Pairs::input<BITS>(i, 0)), number(Pairs::input<BITS>(i, 1)));
        else
          pair = (vi)Pairs::weights<BITS>(packed, i);
        ::store(out + i * 16, pair);
      }
    }

    const ScaledProduct& of_;
    Set set_;
    int64_t first_, steps_, all_, left_, share_ = 0, word_ = 0, v_ = 0, step_ = 0, tile_ = 0;
    const int32_t *from_ = nullptr, *ahead_ = nullptr;
    int32_t* out_;
  };

  // Numbers as bf16: those of a lane are next to each other.
  static vi pairs(vf low, vf high) {
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (vi)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
  }

  void multiply(const Set& set, int64_t block, const int32_t* weights, Unpacking& unpacking, float* sums) const {
    constexpr int64_t PITCH = TILE * 4;  // bytes of a row of sums
    const int64_t tiles = set.end - set.first, rows = tiles * height_, steps = depth(block);
    const int64_t units = tiles / 2 * 2 + tiles % 2, parts = units * set.many * steps;
    const void* next = nullptr;  // sums
    auto between = [&](int) {
      unpacking.part(parts);
      fetch_sums(next);
    };
    for (int64_t row = 0; row < tiles; row += 2)
      for (int64_t t = 0; t < set.many; ++t) {
        auto* from = reinterpret_cast<const char*>(x(set.first + row, block));
        auto* w = reinterpret_cast<const char*>(weights + t * steps * STEP);
        float* out = sums + (t * rows + row * height_) * TILE;
        auto unit = [&]<int R, int V>(int at) {
          block ? amx::resume<R, V>(out + at, height_, PITCH) : amx::begin<R, V>();
          amx::multiply<R, V, true>(from, steps * height_ * amx::LINE, height_, w + at * amx::LINE, int(steps),
                                    between);
          amx::store<R, V>(out + at, height_, PITCH);
        };
        const float* after = t + 1 < set.many ? out + rows * TILE : sums + (row + 2) * height_ * TILE;
        if (row + 1 < tiles) {
          next = out + 32;
          unit.template operator()<2, 2>(0);
          next = after;
          unit.template operator()<2, 2>(32);
        } else {
          next = after;
          unit.template operator()<1, 4>(0);
        }
      }
  }

  void finish(const Set& set, float* sums) const {
    int64_t first = set.first * height_, rows = (set.end - set.first) * height_;
    for (int64_t t = 0; t < set.many; ++t)
      Base::finish(set.tile + t, first, int(std::min(rows, in_.m - first)), sums + t * rows * TILE,
                   scaled_ ? nullptr : set.scale + t * TILE);
  }

  int64_t steps_, blocks_;
  int height_;            // rows of a tile
  int64_t row_tiles_;     // the last rows of the last may be of no row of x: zeros
  bool scaled_, apart_;   // weights, when they are unpacked; inputs of a word are not of one group
  std::vector<int32_t> group_of_;  // each input
  Room<int32_t> x_;
};

}  // namespace

#endif
