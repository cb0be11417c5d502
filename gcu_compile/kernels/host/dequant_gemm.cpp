// Linear layer of 4- and 8-bit weights: y = x @ ((code - zero) * scale).T + bias. See dequant_gemm/eager.py.
//
// Weights are tiles of 64 outputs: [N / 64][K / codes per word][64] words of 32 bits, so that a vector of words holds
// the same inputs k of neighbouring outputs and a thread reads its tiles front to back.
//
//   up to 8 rows:  codes go from memory to registers to fma; the read is the cost
//   more rows:     a block of inputs is unpacked once into L1/L2, then a register-tiled product runs over all rows
//
// Codes are small integers, exact in bf16. So bf16 activations are multiplied as they are (vdpbf16ps: exact products,
// float32 sums) and a group's scale and zero are applied to its float32 sum:
//   sum_k x (code - zero) scale = scale * (sum_k x (code - mid) - (zero - mid) * sum_k x)
// Groups that cut words, and act-order, are dequantised input by input into float32 instead.
#include <algorithm>
#include <memory>
#include <vector>

#include "gemm/codes.h"
#include "gemm/jobs.h"

// Field order is that of `Arguments` in host/dequant_gemm.py.
struct Arguments {
  const void* x;          // [m, k], rows `x_stride` elements apart
  const int32_t* weight;  // tiles
  const void *scales, *zeros;  // [groups, n]; zeros in the codes' range, or null
  const int32_t* g_idx;        // [k], or null
  const void* bias;            // [n], or null
  void* y;                     // [m, n], dtype of x
  int64_t m, k, n, groups, x_stride;
  int32_t x_dtype, scales_dtype, zeros_dtype, bias_dtype, bits, threads;
};

namespace {

constexpr int TILE = 64;       // outputs
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
class Product : public Job {
  static constexpr int STEPS = PER_WORD<BITS> / P::PER_LANE;  // lanes of x per word

 public:
  Product(const Arguments& in, bool apart)
      : in_(in), apart_(apart), words_((in.k + PER_WORD<BITS> - 1) / PER_WORD<BITS>), lanes_(words_ * STEPS),
        group_(apart ? words_ : (in.k / in.groups + PER_WORD<BITS> - 1) / PER_WORD<BITS>),
        spans_(apart || !in.zeros ? 0 : in.groups), x_(new int32_t[in.m * lanes_]), sums_(in.m * spans_) {
    int64_t most = BLOCK / STEPS;
    if (!apart && in.m <= DIRECT_ROWS) most = words_;
    for (int64_t begin = 0, end; begin < words_; begin = end) {  // whole groups, or a part of one
      end = begin + std::max<int64_t>(1, most / group_) * group_;
      if (group_ > most) end = std::min(begin + most, (begin / group_ + 1) * group_);
      blocks_.push_back({begin, end = std::min(end, words_)});
    }
  }

  int64_t rows() const override { return in_.m; }
  int64_t tasks() const override { return (in_.n + TILE - 1) / TILE * chunks(); }

  void lay_out(int64_t row, int64_t end) override {
    for (; row < end; ++row) lay_out(row);
  }

  void work(int64_t task, int64_t end) const override {
    std::vector<int32_t> unpacked;
    std::vector<float> c;
    read_factors(task / chunks(), (end - 1) / chunks() + 1);
    for (; task < end; ++task) {
      int64_t tile = task / chunks(), first = in_.m * (task % chunks()) / chunks();
      int rows = int(in_.m * (task % chunks() + 1) / chunks() - first);
      c.assign(rows * TILE, 0.0f);
      if (!apart_ && in_.m <= DIRECT_ROWS)
        direct(tile, first, rows, c.data());
      else
        blocked(tile, first, rows, c.data(), unpacked);
      finish(tile, first, rows, c.data());
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

  const int32_t* words(int64_t tile, int64_t word) const { return in_.weight + (tile * words_ + word) * TILE; }

  // One row of scales or zeros for the outputs of a tile; zero beyond n.
  void row_of(const void* p, int32_t dtype, int64_t group, int64_t tile, float* out) const {
    int count = int(std::min<int64_t>(TILE, in_.n - tile * TILE));
    std::fill(out + count, out + TILE, 0.0f);
    if (count == TILE)  // a count that the compiler knows makes vectors of it
      to_floats(p, dtype, group * in_.n + tile * TILE, TILE, out);
    else
      to_floats(p, dtype, group * in_.n + tile * TILE, count, out);
  }

  // Scales and zeros of one tile lie a row apart, and each would be waited for where it is used: so a thread reads all
  // of its own first, in the order of memory, and then fetches them from the second cache a tile ahead.
  void read_factors(int64_t tile, int64_t end) const {
    auto read = [&](const void* p, int64_t size) {
      for (int64_t group = 0; group < in_.groups; ++group) {
        const char* row = static_cast<const char*>(p) + group * in_.n * size;
        for (int64_t at = tile * TILE * size; at < std::min(in_.n, end * TILE) * size; at += 64)
          static_cast<void>(*static_cast<const volatile char*>(row + at));  // a prefetch gets lost without its page
      }
    };
    read(in_.scales, size_of(in_.scales_dtype));
    if (in_.zeros) read(in_.zeros, size_of(in_.zeros_dtype));
  }

  void fetch_factors(int64_t tile, int64_t group) const {
    auto fetch = [&](const void* p, int64_t size) {
      const char* row = static_cast<const char*>(p) + (group * in_.n + tile * TILE) * size;
      for (int64_t at = 0; at < TILE * size; at += 64) __builtin_prefetch(row + at);
    };
    fetch(in_.scales, size_of(in_.scales_dtype));
    if (in_.zeros) fetch(in_.zeros, size_of(in_.zeros_dtype));
  }

  // scale and scale * (zero - midpoint) of a group.
  void factors(int64_t tile, int64_t group, float* scale, float* shift) const {
    fetch_factors(tile + 1, group);
    row_of(in_.scales, in_.scales_dtype, group, tile, scale);
    if (!spans_) return;
    row_of(in_.zeros, in_.zeros_dtype, group, tile, shift);
    for (int i = 0; i < TILE; ++i) shift[i] = (shift[i] - MIDPOINT<BITS>) * scale[i];
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

  void blocked(int64_t tile, int64_t first, int rows, float* c, std::vector<int32_t>& unpacked) const {
    alignas(64) float scale[TILE], shift[TILE];
    int pieces = (rows + MR - 1) / MR, height = rows / pieces, higher = rows % pieces;  // register tiles
    for (Block block : blocks_) {
      unpacked.resize(std::max<size_t>(unpacked.size(), block.lanes() * TILE));
      const int32_t* ahead = words(tile, block.end);
      apart_ ? dequantise(tile, block, unpacked.data()) : unpack(tile, block, unpacked.data());
      for (int64_t from = block.begin, to; from < block.end; from = to) {
        int64_t group = from / group_;
        to = std::min(block.end, (group + 1) * group_);
        if (apart_)
          std::fill(scale, scale + TILE, 1.0f);
        else
          factors(tile, group, scale, shift);
        Part part{unpacked.data() + (from - block.begin) * STEPS * TILE, lanes(first, block) + (from - block.begin) * STEPS,
                  block.lanes(), (to - from) * STEPS, first, group, scale,
                  spans_ && from % group_ == 0 ? shift : nullptr, ahead};
        for (int at = 0; at < TILE; at += SUB)
          for (int piece = 0, r = 0; piece < pieces; ++piece, part.ahead += part.steps * 16) {
            int count = height + (piece < higher);
            some(count, part, r, at, c + r * TILE);
            r += count;
          }
        ahead = part.ahead;
      }
    }
  }

  void unpack(int64_t tile, Block block, int32_t* out) const {
    for (int64_t word = block.begin; word < block.end; ++word, out += STEPS * TILE)
      for (int at = 0; at < TILE; at += LANES) {
        vi packed = load<vi>(words(tile, word) + at);
#pragma GCC unroll 8
        for (int step = 0; step < STEPS; ++step)
          store(out + step * TILE + at, P::template weights<BITS>(packed, step));
      }
  }

  // The same with every input's own zero and scale applied.
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
    const int32_t *weights, *x;  // unpacked [steps, TILE]; lanes of row `first`
    int64_t x_stride, steps, first, group;
    const float *scale, *shift;
    const int32_t* ahead;  // packed weights that come next: fetched meanwhile, a line per step
  };

  template <int M = MR>
  void some(int rows, const Part& part, int r0, int at, float* c) const {
    if constexpr (M > 1)
      if (rows < M) return some<M - 1>(rows, part, r0, at, c);
    vf sum[M][NV] = {};
    const int32_t *w = part.weights + at, *x = part.x + r0 * part.x_stride;
    for (int64_t step = 0; step < part.steps; ++step, w += TILE) {
      __builtin_prefetch(part.ahead + step * 16, 0, 2);
      vf value[NV];
      for (int v = 0; v < NV; ++v) value[v] = load<vf>(w + v * LANES);
      for (int r = 0; r < M; ++r)
        for (int v = 0; v < NV; ++v) sum[r][v] = P::add(sum[r][v], value[v], x[r * part.x_stride + step]);
    }
    fold<M, NV>(sum, at, part.first + r0, part.group, part.scale, part.shift, c);
  }

  void finish(int64_t tile, int64_t first, int rows, float* c) const {
    int count = int(std::min<int64_t>(TILE, in_.n - tile * TILE));
    float bias[TILE] = {};
    if (in_.bias) to_floats(in_.bias, in_.bias_dtype, tile * TILE, count, bias);
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < count; ++i) c[r * TILE + i] += bias[i];
      from_floats(c + r * TILE, count, in_.y, in_.x_dtype, (first + r) * in_.n + tile * TILE);
    }
  }

  Arguments in_;
  bool apart_;              // dequantised input by input
  int64_t words_, lanes_;  // of a row of inputs
  int64_t group_, spans_;  // words of a group; groups whose sum of x is needed
  std::unique_ptr<int32_t[]> x_;  // [blocks, m, lanes of a block]
  std::vector<float> sums_;  // [m, spans]
  std::vector<Block> blocks_;
};

template <int BITS>
std::unique_ptr<Job> product(const Arguments& in) {
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
