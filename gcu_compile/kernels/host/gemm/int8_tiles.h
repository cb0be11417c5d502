// Integer products with AMX's tiles. The weights are its right operand as they lie.
//
// A task is up to HIGH rows of x and one tile of weights (64 outputs); a thread takes up to GROUP of them at once. DEPTH
// steps of their inputs at a time, of all rows, stay in the second cache, and between two such parts of the inputs the
// sums rest in memory. 32 rows stay in the first cache while the outputs of the group go by: the weights are loaded as a
// stream, or they would drive them out. Meanwhile the weights that come next are fetched.
#pragma once

#include "../amx.h"

#if defined(__AMX_TILE__)

#include "fetch.h"
#include "int8_product.h"
#include "../room.h"

namespace {

class TileProduct : public Int8Product {
 public:
  explicit TileProduct(const Arguments& in)
      : Int8Product(in), steps_((words_ + WORDS - 1) / WORDS), high_((in.m + 15) / 16),
        x_(steps_ * high_ * BYTES) {}

  int64_t tasks() const override { return tiles_ * chunks(); }

  void work(int64_t task, int64_t end) const override {
    amx::Tiles registers;
    Room<int32_t> sums(GROUP * std::min(HIGH, high_ * 16) * TILE);
    while (task < end) {
      int64_t chunk = task / tiles_, tile = task % tiles_, first = begin_of(chunk), pad = begin_of(chunk + 1) - first;
      int count = int(std::min({end - task, tiles_ - tile, pad > FEW ? GROUP : 1}));
      multiply(tile, count, first, pad, sums.get());
      int32_t of_weights[GROUP * TILE];
      for (int t = 0; in_.x_zeros && t < count; ++t) add_up(tile + t, of_weights + t * TILE);
      int rows = int(std::min(pad, in_.m - first));
      finish(tile, count, first, rows, sums.get(), pad * TILE, in_.x_zeros ? of_weights : nullptr);
      task += count;
    }
  }

 private:
  static constexpr int64_t HIGH = 512, GROUP = MOST, DEPTH = 16;
  static constexpr int64_t FEW = 64;  // rows whose product waits for its weights: they are read in one stream
  static constexpr int64_t WORDS = 16, BYTES = 1024;  // words of inputs in a step; of a tile of x

  // Weights that will be wanted, a few lines in every step.
  struct Ahead {
    const int32_t* next;
    int lines;
    void fetch() {
      for (int i = 0; i < lines; ++i, next += 16) __builtin_prefetch(next, 0, 2);
    }
  };

  // Rows are split evenly, in pairs of tiles.
  int64_t chunks() const { return (in_.m + HIGH - 1) / HIGH; }
  int64_t begin_of(int64_t chunk) const { return std::min((high_ + 1) / 2 * chunk / chunks() * 2, high_) * 16; }

  // x lies as [steps / DEPTH][rows / 16][DEPTH][16][64 bytes]: in one piece what is read together.
  char* x(int64_t row, int64_t step) const {
    int64_t begin = step / DEPTH * DEPTH, depth = std::min(DEPTH, steps_ - begin);
    return x_.get() + (begin * high_ + row / 16 * depth + step - begin) * BYTES;
  }

  void keep(int64_t row, const int8_t* codes) override {
    for (int64_t step = 0; step < steps_; ++step) {
      char* out = x(row, step) + row % 16 * 64;
      std::memcpy(out, codes + step * 64, 64);
      if (row % 16 < 15) __builtin_prefetch(out + 64, 1);  // of the next row
    }
  }

  void multiply(int64_t tile, int count, int64_t first, int64_t pad, int32_t* sums) const {
    alignas(64) int32_t rest[GROUP][WORDS * TILE];
    int tiles = int(pad / 16), units = tiles / 2 * 2 + tiles % 2;
    for (int64_t begin = 0; begin < steps_; begin += DEPTH) {
      int steps = int(std::min(DEPTH, steps_ - begin));
      bool last = begin + steps == steps_, partial = last && words_ % WORDS;
      const void* coming = nullptr;  // sums
      Ahead ahead[GROUP];
      for (int t = 0; t < count; ++t) {
        const int32_t* next = last ? weights(tile + count + t) : weights(tile + t) + (begin + DEPTH) * WORDS * TILE;
        ahead[t] = {next, (64 + units - 1) / units};
        if (partial) take_rest(tile + t, rest[t]);
      }
      for (int r = 0; r < tiles; r += 2)
        for (int t = 0; t < count; ++t) {
          const int32_t *w = weights(tile + t) + begin * WORDS * TILE, *end = partial ? rest[t] : nullptr;
          int32_t* out = sums + (t * pad + r * 16) * TILE;
          const int32_t* after = t + 1 < count ? out + pad * TILE : sums + (r + 2) * 16 * TILE;
          const char* rows = x(first + r * 16, begin);
          auto between = [&] {
            ahead[t].fetch();
            fetch_sums(coming);
          };
          if (r + 1 < tiles) {
            coming = out + 32;
            unit<2>(rows, steps, w, end, begin == 0, out, between);
            coming = after;
            unit<2>(rows, steps, w + 32, end ? end + 32 : end, begin == 0, out + 32, between);
          } else {
            coming = after;
            unit<1>(rows, steps, w, end, begin == 0, out, between);
          }
        }
    }
  }

  // The last step of a tile whose words do not fill it, with zeros behind them.
  void take_rest(int64_t tile, int32_t* rest) const {
    int64_t count = words_ % WORDS * TILE;
    std::copy_n(weights(tile) + words_ * TILE - count, count, rest);
    std::fill(rest + count, rest + WORDS * TILE, 0);
    amx::fence();
  }

  // Two tiles of rows and two of outputs, or one and four: sums (+)= x w. `last`: the weights of the last step.
  template <int ROWS, class Between>
  static void unit(const char* x, int steps, const int32_t* w, const int32_t* last, bool fresh, int32_t* sums,
                   Between between) {
    constexpr int64_t PITCH = TILE * 4;
    int32_t *second = ROWS == 2 ? sums + 16 * TILE : sums + 32;
    if (fresh) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, PITCH);
      _tile_loadd(1, sums + 16, PITCH);
      _tile_loadd(2, second, PITCH);
      _tile_loadd(3, second + 16, PITCH);
    }
    const int64_t below = steps * BYTES;
    for (int step = 0; step < steps; ++step, x += BYTES, w += WORDS * TILE) {
      if (last && step == steps - 1) w = last;
      _tile_stream_loadd(6, w, PITCH);
      amx::pause();
      _tile_loadd(4, x, 64);
      amx::pause();
      _tile_dpbssd(0, 4, 6);
      amx::pause();
      if constexpr (ROWS == 2) {
        _tile_loadd(5, x + below, 64);
        amx::pause();
        _tile_dpbssd(2, 5, 6);
        amx::pause();
        _tile_stream_loadd(7, w + 16, PITCH);
        amx::pause();
        _tile_dpbssd(1, 4, 7);
        amx::pause();
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_stream_loadd(7, w + 16, PITCH);
        amx::pause();
        _tile_dpbssd(1, 4, 7);
        amx::pause();
        _tile_stream_loadd(6, w + 32, PITCH);
        amx::pause();
        _tile_dpbssd(2, 4, 6);
        amx::pause();
        _tile_stream_loadd(7, w + 48, PITCH);
        amx::pause();
        _tile_dpbssd(3, 4, 7);
      }
      between();
    }
    _tile_stored(0, sums, PITCH);
    _tile_stored(1, sums + 16, PITCH);
    _tile_stored(2, second, PITCH);
    _tile_stored(3, second + 16, PITCH);
  }

  // The sums of the weights of a tile.
  void add_up(int64_t tile, int32_t* out) const {
    const int32_t* w = weights(tile);
    std::fill(out, out + TILE, 0);
    for (int64_t word = 0; word < words_; ++word, w += TILE)
      for (int i = 0; i < TILE; ++i)
        for (int byte = 0; byte < 4; ++byte) out[i] += int8_t(w[i] >> (8 * byte));
  }

  int64_t steps_, high_;  // tiles of x
  Room<char> x_;
};

}  // namespace

#endif
