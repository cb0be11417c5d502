// The product of some rows of bf16 with codes of 4 bits, in integers, on AMX: a mask makes bytes of codes, where bf16
// takes a look at a table and twice the memory.
//
//   x = unit * (256 d1 + d0), digits of 8 bits, with a unit for each row and part of a group, 2^-14 of its largest or less
//   w = (code - 8) * 16, which is what the upper half of a byte says
// An x above 2^-7 of the largest loses nothing. What the others lose is taken as an x of its own where it could be seen
// (`keep`). What that loses in its turn, and rows with infinities, NaN or what is nearly as large, are multiplied input by
// input (`Single`).
//
// A thread takes a tile of outputs through all inputs, a part after the other. Beside the products, which have a unit of
// their own, the vectors unpack the part that comes next, and add the last sums to those of the parts before: a few
// instructions behind each one of tiles, because a wait for a tile holds up all that comes behind.
#pragma once

#include <cmath>
#include <vector>

#include "amx_tiles.h"
#include "layer.h"
#include "../room.h"

#if defined(__AMX_TILE__)

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

class DigitTiles : public Layer<4> {
  static constexpr int INPUTS = amx::LINE, WORDS = INPUTS / PER_WORD<4>;  // of a step
  static constexpr int MOST_STEPS = 2;                // of a part: its sums times 256 stay below 2^31
  static constexpr int DIGITS = 2, WIDE = 2;          // column tiles whose sums are made together
  static constexpr int STEP = amx::COLUMNS * amx::TILE_BYTES;  // unpacked weights of a step
  static constexpr int SUMS = 16 * 16;                // of a tile
  static constexpr int SLOTS = 8;                     // of a step: between its instructions of tiles
  static constexpr int AHEAD = 2048;                  // words that a stream is fetched before its use: two pages
  static constexpr int BITS = 15;                     // of an x, and its sign
  static constexpr int LARGE = (115 + 127) << 23;     // 2^115, a float's bits: 128 such x times 16 are still a float

 public:
  static bool takes(const Arguments& in) {
    return in.x_dtype == BF16 && !in.g_idx && (in.groups == 1 || in.k / in.groups % INPUTS == 0);
  }

  explicit DigitTiles(const Arguments& in)
      : Layer(in), group_(in.groups == 1 ? in.k : in.k / in.groups),
        steps_(in.groups > 1 && group_ % (MOST_STEPS * INPUTS) ? 1 : MOST_STEPS),
        parts_((in.k + inputs() - 1) / inputs()), height_(amx::tile_rows(in.m)),
        row_tiles_((in.m + height_ - 1) / height_), rows_(row_tiles_ * height_), x_(2 * parts_ * x_bytes()),
        units_(2 * parts_ * rows_), sums_(in.zeros ? 2 * parts_ * rows_ : 0), again_(parts_ * rows_), plain_(rows_),
        singles_(rows_) {}

  int64_t tasks() const override { return tiles(); }
  int64_t weights_cost() const override { return 40; }

  void lay_out(int64_t row, int64_t end) override {
    if (end == in_.m) end = rows_;
    for (; row < end; ++row) {
      for (int64_t part = 0; part < parts_; ++part) lay_out_part(row, part);
      if (plain_[row]) lay_out_plain(row);
    }
  }

  void work(int64_t task, int64_t end) const override {
    if (in_.zeros)
      steps_ == 1 ? work<1, true>(task, end) : work<2, true>(task, end);
    else
      steps_ == 1 ? work<1, false>(task, end) : work<2, false>(task, end);
  }

 private:
  int64_t inputs() const { return steps_ * INPUTS; }  // of a part
  int64_t x_bytes() const { return rows_ * DIGITS * inputs(); }

  // x lies as [2: itself, what it lost][parts][row tiles][digits][steps][rows of a tile][64 bytes].
  char* x(int lost, int64_t part, int64_t row_tile) const {
    return x_.get() + (lost * parts_ + part) * x_bytes() + row_tile * height_ * DIGITS * inputs();
  }

  void lay_out_part(int64_t row, int64_t part) {
    const uint16_t* from = static_cast<const uint16_t*>(in_.x) + row * in_.x_stride + part * inputs();
    __m512 numbers[MOST_STEPS * 4];
    for (int i = 0; i < steps_ * 4; ++i) {
      int64_t count = row < in_.m ? std::clamp<int64_t>(in_.k - part * inputs() - i * 16, 0, 16) : 0;
      __m256i halves = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from + i * 16);
      numbers[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    const bool again = keep(0, row, part, numbers);
    again_[part * rows_ + row] = again;
    if (again) {
      if (keep(1, row, part, numbers)) {
        alignas(64) float left[MOST_STEPS * INPUTS];
        for (int i = 0; i < steps_ * 4; ++i) ::store(left + i * 16, numbers[i]);
        for (int i = 0; i < inputs(); ++i)
          if (left[i] != 0) singles_[row].push_back({part * inputs() + i, left[i]});
      }
    } else {  // its digits are any
      const int64_t at = (parts_ + part) * rows_ + row;
      units_[at] = 0;
      if (in_.zeros) sums_[at] = 0;
    }
  }

  // All of a row is singles, and its digits count for nothing.
  void lay_out_plain(int64_t row) {
    for (int64_t part = 0; part < 2 * parts_; ++part) units_[part * rows_ + row] = 0;
    singles_[row].clear();
    for (int64_t k = 0; k < in_.k; ++k)
      singles_[row].push_back({k, from_bf16(static_cast<const uint16_t*>(in_.x)[row * in_.x_stride + k])});
  }

  // Digits of numbers, which then are what they lose. Whether that could be seen: where the large inputs meet weights of
  // zero, the result is made of the small ones. So beside those that are less than an eighth of the largest, what is lost
  // is to be less than the rounding of the result.
  bool keep(int lost, int64_t row, int64_t part, __m512 (&numbers)[MOST_STEPS * 4]) {
    __m512 of_lost = {}, of_small = {};
    __m512i most = {};
    for (int i = 0; i < steps_ * 4; ++i)  // as integers, of which NaN are the largest
      most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(numbers[i])));
    const int largest = int(_mm512_reduce_max_epu32(most));
    if (largest >= LARGE) plain_[row] = 1;
    const int exponent = largest ? std::max((largest >> 23) - 127 - (BITS - 1), -145) : 0;  // of the unit, a float
    // Bytes of the even inputs of a word, then of the odd ones, as masks find them.
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    __m512i sum = {};
    for (int step = 0; step < steps_; ++step) {
      __m512i low = {}, high = {};
      auto quarter = [&]<int I>() {
        __m512& number = numbers[step * 4 + I];
        __m512 scaled = _mm512_scalef_ps(number, _mm512_set1_ps(float(-exponent)));
        __m512i whole = _mm512_cvtps_epi32(scaled);
        number = _mm512_sub_ps(scaled, _mm512_cvtepi32_ps(whole));
        of_lost = _mm512_fmadd_ps(number, number, of_lost);
        __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(scaled), _mm512_set1_ps(1 << (BITS - 4)), _CMP_LT_OQ);
        of_small = _mm512_mask3_fmadd_ps(scaled, scaled, of_small, small);
        sum = _mm512_add_epi32(sum, whole);
        low = _mm512_inserti32x4(low, _mm512_cvtepi32_epi8(whole), I);
        high = _mm512_inserti32x4(high, _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 8)), I);
      };
      quarter.template operator()<0>();
      quarter.template operator()<1>();
      quarter.template operator()<2>();
      quarter.template operator()<3>();
      char* out = x(lost, part, row / height_) + (step * height_ + row % height_) * INPUTS;
      ::store(out, _mm512_shuffle_epi8(low, order));
      ::store(out + steps_ * height_ * INPUTS, _mm512_shuffle_epi8(high, order));
    }
    const int64_t at = (lost * parts_ + part) * rows_ + row;
    units_[at] = std::ldexp(1.0f, exponent - 4);  // a weight is 16 times its number
    if (in_.zeros) sums_[at] = float(_mm512_reduce_add_epi32(sum));
    const float small = _mm512_reduce_add_ps(of_small);
    bool seen = _mm512_reduce_add_ps(of_lost) > small * 0x1p-20f;
    for (int i = 0; small == 0 && i < steps_ * 4; ++i)  // there are none, or their squares are too small for a float
      seen |= _mm512_cmp_ps_mask(numbers[i], __m512{}, _CMP_NEQ_UQ) != 0;
    if (!seen) return false;
    for (int i = 0; i < steps_ * 4; ++i) numbers[i] = _mm512_scalef_ps(numbers[i], _mm512_set1_ps(float(exponent)));
    return true;
  }

  // Weights of a part on their way to [steps][column tiles][16][16 words], a word of each output at a time.
  class Unpacking {
   public:
    Unpacking(const DigitTiles& of, int64_t tile, int64_t part, char* out) : out_(out) {
      if (tile < 0) return;
      const int64_t first = part * of.steps_ * WORDS, words = std::min(of.steps_ * WORDS, of.words_ - first);
      from_ = of.words(tile, first);
      end_ = from_ + words * TILE;
      if (words < of.steps_ * WORDS) std::memset(out + words / WORDS * STEP, 0, (of.steps_ - words / WORDS) * STEP);
    }

    ALWAYS_INLINE void one() {
      if (from_ == end_) return;
      const __m512i sign = _mm512_set1_epi8(char(0x88)), mask = _mm512_set1_epi8(char(0xf0));
      auto upper = [&](__m512i codes) { return _mm512_ternarylogic_epi32(codes, sign, mask, 0x28); };  // (a ^ b) & c
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        __m512i packed = ::load<__m512i>(from_ + v * 16);
        __builtin_prefetch(from_ + v * 16 + AHEAD);
        ::store(out_ + v * amx::TILE_BYTES, upper(_mm512_slli_epi32(packed, 4)));
        ::store(out_ + v * amx::TILE_BYTES + amx::LINE, upper(packed));
      }
      from_ += TILE;
      out_ += 2 * amx::LINE;
      if (++word_ % WORDS == 0) out_ += STEP - amx::TILE_BYTES;
    }
    void rest() {
      while (from_ != end_) one();
      amx::fence();
    }

   private:
    const int32_t *from_ = nullptr, *end_ = nullptr;
    char* out_;
    int word_ = 0;
  };

  // Sums of a part, on their way to c.
  struct Pending {
    const int32_t* sums = nullptr;  // [digits][WIDE][16][16]
    const float *scale = nullptr, *zero = nullptr, *units = nullptr, *x_sums = nullptr;
    float* c = nullptr;
    int rows = 0;

    // c += scale * unit * (sum - zero * (sum of x))
    template <bool ZEROS>
    ALWAYS_INLINE void add(int row) const {
      if (row >= rows) return;
      const vf unit = splat(units[row]);
#pragma GCC unroll 2
      for (int v = 0; v < WIDE; ++v) {
        const int32_t* of = sums + v * SUMS + row * 16;
        vf s = to_float((::load<vi>(of + WIDE * SUMS) << 8) + ::load<vi>(of));
        if constexpr (ZEROS) s = fma(::load<vf>(zero + v * 16), splat(-x_sums[row]), s);
        float* out = c + row * TILE + v * 16;
        ::store(out, fma(s * unit, ::load<vf>(scale + v * 16), ::load<vf>(out)));
      }
    }
    template <bool ZEROS>
    void all() {
      for (int row = 0; row < rows; ++row) add<ZEROS>(row);
      rows = 0;
    }
  };

  template <int STEPS, bool ZEROS>
  void work(int64_t task, int64_t end) const {
    amx::Tiles registers(height_);
    Room<float> c(rows_ * TILE);
    Room<char> unpacked(2 * STEPS * STEP);
    alignas(64) float factors[2][2][TILE];
    alignas(64) int32_t sums[2][DIGITS * WIDE * SUMS];
    read_factors(task, end);
    Unpacking(*this, task, 0, unpacked.get()).rest();
    Pending pending;
    int turn = 0, turn_of_sums = 0;
    const int64_t units = row_tiles_ * (amx::COLUMNS / WIDE), words = (STEPS * WORDS + units - 1) / units;
    const uint32_t due = words >= STEPS * SLOTS / 2 ? ~0u : spread(int(words), STEPS * SLOTS / 2);
    for (; task < end; ++task) {
      std::fill_n(c.get(), rows_ * TILE, 0.0f);
      for (int64_t part = 0; part < parts_; ++part, turn ^= 1) {
        const bool last = part + 1 == parts_;
        Unpacking unpacking(*this, last ? task + 1 < end ? task + 1 : -1 : task, last ? 0 : part + 1,
                            unpacked.get() + (turn ^ 1) * STEPS * STEP);
        const char* weights = unpacked.get() + turn * STEPS * STEP;
        const int64_t group = part * inputs() / group_;
        float *scale = factors[turn][0], *zero = factors[turn][1];
        fetch_factors(task + 1, group);
        row_of(in_.scales, in_.scales_dtype, group, task, scale);
        if constexpr (ZEROS) {
          row_of(in_.zeros, in_.zeros_dtype, group, task, zero);
          for (int i = 0; i < TILE; ++i) zero[i] = (zero[i] - MIDPOINT<4>) * 16;
        }
        for (int64_t row = 0; row < row_tiles_; ++row) {
          const uint8_t* again = &again_[part * rows_ + row * height_];
          const int times = std::any_of(again, again + height_, [](uint8_t a) { return a; }) ? 2 : 1;
          for (int lost = 0; lost < times; ++lost)
            for (int at = 0; at < amx::COLUMNS; at += WIDE, turn_of_sums ^= 1) {
              unit<STEPS, ZEROS>(x(lost, part, row), weights + at * amx::TILE_BYTES, sums[turn_of_sums], pending,
                                 unpacking, due);
              const int64_t first = (lost * parts_ + part) * rows_ + row * height_;
              pending = {sums[turn_of_sums], scale + at * 16, zero + at * 16, &units_[first],
                         ZEROS ? &sums_[first] : nullptr, c.get() + row * height_ * TILE + at * 16, height_};
            }
        }
        unpacking.rest();
      }
      pending.all<ZEROS>();
      for (int64_t row = 0; row < in_.m; ++row)
        if (!singles_[row].empty()) add_singles(task, singles_[row], c.get() + row * TILE);
      finish(task, 0, int(in_.m), c.get());
    }
  }

  // `count` of `slots` bits, at equal distances.
  static uint32_t spread(int count, int slots) {
    uint32_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= 1u << i * slots / count;
    return bits;
  }

  // Sums of a row tile and WIDE column tiles, in tiles digit * WIDE + column.
  template <int STEPS, bool ZEROS>
  void unit(const char* x, const char* w, int32_t* sums, const Pending& pending_, Unpacking& unpacking_,
            uint32_t due) const {
    const Pending pending = pending_;  // copies are in registers
    Unpacking unpacking = unpacking_;
    amx::zero<0>();
    amx::zero<1>();
    amx::zero<2>();
    amx::zero<3>();
    auto slot = [&]<int I>() __attribute__((always_inline)) {
      if constexpr (I % 2 == 0)
        if (due >> I / 2 & 1) unpacking.one();
      for (int row = I; row < 16; row += STEPS * SLOTS) pending.add<ZEROS>(row);
    };
    const int64_t digit = STEPS * height_ * INPUTS;
    auto step = [&]<int S>() __attribute__((always_inline)) {
      amx::load<6>(w);
      slot.template operator()<S * SLOTS>();
      amx::load<4>(x);
      slot.template operator()<S * SLOTS + 1>();
      dot<0, 4, 6, false>();
      slot.template operator()<S * SLOTS + 2>();
      amx::load<5>(x + digit);
      slot.template operator()<S * SLOTS + 3>();
      dot<2, 5, 6, true>();
      slot.template operator()<S * SLOTS + 4>();
      amx::load<7>(w + amx::TILE_BYTES);
      slot.template operator()<S * SLOTS + 5>();
      dot<1, 4, 7, false>();
      slot.template operator()<S * SLOTS + 6>();
      dot<3, 5, 7, true>();
      slot.template operator()<S * SLOTS + 7>();
      x += height_ * INPUTS, w += STEP;
    };
    step.template operator()<0>();
    if constexpr (STEPS > 1) step.template operator()<1>();
    unpacking_ = unpacking;
    amx::store<0>(sums, amx::LINE);
    amx::store<1>(sums + SUMS, amx::LINE);
    amx::store<2>(sums + 2 * SUMS, amx::LINE);
    amx::store<3>(sums + 3 * SUMS, amx::LINE);
  }

  // The upper digit has a sign, and so have weights.
  template <int C, int A, int B, bool SIGNED>
  static void dot() {
    if constexpr (SIGNED)
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(C), "n"(A), "n"(B));
    else
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(C), "n"(A), "n"(B));
  }

  struct Single {
    int64_t k;
    float x;
  };

  void add_singles(int64_t tile, const std::vector<Single>& singles, float* c) const {
    alignas(64) float scale[TILE], zero[TILE];
    std::fill_n(zero, TILE, MIDPOINT<4>);
    int64_t last = -1;
    for (const auto& [k, x] : singles) {
      if (int64_t group = k / group_; group != last) {
        row_of(in_.scales, in_.scales_dtype, group, tile, scale);
        if (in_.zeros) row_of(in_.zeros, in_.zeros_dtype, group, tile, zero);
        last = group;
      }
      const int32_t* codes = words(tile, k / PER_WORD<4>);
      for (int i = 0; i < TILE; ++i)
        c[i] += x * ((float(codes[i] >> (k % PER_WORD<4> * 4) & 15) - zero[i]) * scale[i]);
    }
  }

  int64_t group_, steps_, parts_;  // inputs of a group; steps of a part; parts of a row
  int height_;                     // rows of a tile
  int64_t row_tiles_, rows_;       // the last rows of the last tile may be of no row of x: zeros
  Room<char> x_;
  std::vector<float> units_, sums_;     // [2: x, what it lost][parts][rows]; sums of whole numbers, where zeros ask for them
  std::vector<uint8_t> again_, plain_;  // [parts][rows]: whether what it lost is wanted; [rows]
  std::vector<std::vector<Single>> singles_;  // [rows]
};

}  // namespace

#endif
