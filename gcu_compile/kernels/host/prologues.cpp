// What runs before an int8 product, one pass over memory: norm or activation, then codes and a scale for each token.
// See prologues/eager.py.
//
// A row is read, summed and kept as floats in the first caches, made into what is quantised there, and leaves as codes.
#include <omp.h>

#include <array>

#include "exp.h"
#include "pairs.h"
#include "quantize.h"
#include "room.h"

// Field order is that of `Arguments` in host/prologues.py.
struct Arguments {
  const void* x;         // [rows, size]: the hidden states, or the gate; rows `x_stride` elements apart
  const void* other;     // the residual (or null), or up
  const void* weight;    // [size] of the norm
  int8_t* codes;         // [rows, size]
  float* scales;         // [rows]
  void* residual_out;    // [rows, size]; null without a residual
  int64_t rows, size, x_stride, other_stride;
  double eps;
  int32_t dtype, weight_dtype, threads;
};

namespace {

template <int32_t DTYPE>
inline Two<vf> read(const char* row, int64_t at, int64_t size) {
  return reading<size_of(DTYPE)>(row + at * size_of(DTYPE), size - at, read_pair<DTYPE>);
}

// Row r of rows `stride` elements apart; null stays null.
template <int32_t DTYPE>
inline char* row_at(const void* p, int64_t r, int64_t stride) {
  return p ? static_cast<char*>(const_cast<void*>(p)) + r * stride * size_of(DTYPE) : nullptr;
}

// Rows that are read step by step, fetched AHEAD of that: the CPU's own prefetcher falls behind where a step is long (a
// gate's, not a norm's), and stops at the end of a page.
constexpr int64_t AHEAD = 4096;  // bytes

template <int32_t DTYPE>
class ReadAhead {
 public:
  // Behind the row follows the next one, `stride` elements from it.
  ReadAhead(const char* row, int64_t size, int64_t stride)
      : row_(row), size_(size * size_of(DTYPE)), next_((stride - size) * size_of(DTYPE)) {}

  template <int64_t COUNT>
  void fetch(int64_t at) const {
    int64_t from = at * size_of(DTYPE) + AHEAD;
    if (from >= size_) from += next_;
    for (int64_t b = 0; b < COUNT * size_of(DTYPE); b += 64) __builtin_prefetch(row_ + from + b, 0, 2);
  }

 private:
  const char* row_;
  int64_t size_, next_;
};

// Results of more rows than this are not in a first or second cache any more when they are wanted: sums by the next norm,
// many products later, codes by the product behind, which walks over them again and again.
constexpr int64_t PAST_CACHES = int64_t(1) << 20;  // bytes

// Whether rows are to be written so, `step` bytes at once: they consist of whole lines and steps.
inline bool go_past_caches(const void* to, int64_t row_bytes, int64_t rows, int64_t step) {
  const int64_t whole = std::max<int64_t>(step, 64);
  return row_bytes * rows > PAST_CACHES && row_bytes % whole == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// To cache lines, which are not read first, nor take the place of others.
template <size_t BYTES>
inline void write_past(const char (&lines)[BYTES], char* p) {
  static_assert(BYTES % sizeof(vf) == 0);
  for (size_t at = 0; at < BYTES; at += sizeof(vf)) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p + at), _mm512_load_si512(lines + at));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + at), _mm256_load_si256(reinterpret_cast<const __m256i*>(lines + at)));
#else
    std::memcpy(p + at, lines + at, sizeof(vf));
#endif
  }
}

inline void written_past() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

inline Two<vf> kept(const float* row) { return {load<vf>(row), load<vf>(row + LANES)}; }

inline void keep(float* row, Two<vf> x) {
  store(row, x.a);
  store(row + LANES, x.b);
}

inline void take_larger(Two<vi>& most, Two<vf> x) {
  most = {larger_magnitude(most.a, x.a), larger_magnitude(most.b, x.b)};
}

inline float largest(Two<vi> most) {
  vi bits = larger(most.a, most.b);
  int32_t found = 0;
  for (int i = 0; i < LANES; ++i) found = std::max(found, bits[i]);
  return std::bit_cast<float>(found);
}

// A norm's weight as numbers up to 1, so that no product with one overflows, and the power of two that they lack. Of dtype
// `W`: bfloat16 if rows and weight are, for it takes half of the cache; else float32 in the order in which a row is kept.
struct Weight {
  char* values;
  double factor = 1;
};

template <int32_t DTYPE, int32_t W>
Weight weight_of(const Arguments& in, char* values) {
  Weight weight{values};
  auto from = [&](int64_t at) {
    if (in.weight_dtype == DTYPE) return read<DTYPE>(static_cast<const char*>(in.weight), at, in.size);
    float each[PAIR] = {};
    to_floats(in.weight, in.weight_dtype, at, int(std::min(in.size - at, PAIR)), each);
    Two<vf> w;
    for (int i = 0; i < LANES; ++i) {
      w.a[i] = each[DTYPE == BF16 ? 2 * i : i];
      w.b[i] = each[DTYPE == BF16 ? 2 * i + 1 : i + LANES];
    }
    return w;
  };
  Two<vi> most = {};
  for (int64_t at = 0; at < in.size; at += PAIR) take_larger(most, from(at));
  int exponent = 0;
  if (float found = largest(most); std::isfinite(found)) std::frexp(found, &exponent);
  exponent = std::max(exponent, -126);  // whose inverse is a float
  weight.factor = std::ldexp(1.0, exponent);
  float inverse = float(std::ldexp(1.0, -exponent));
  for (int64_t at = 0; at < in.size; at += PAIR) {
    Two<vf> w = from(at);
    write_pair<W>({w.a * inverse, w.b * inverse}, weight.values + at * size_of(W));
  }
  return weight;
}

inline double sum_of(vf x) {
  double parts[4] = {};
  for (int i = 0; i < LANES; ++i) parts[i % 4] += x[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// What a kept row has yet to be multiplied by, and its largest magnitude.
struct Kept {
  float largest;
  double factor;
};

// s = x + residual; s * weight in `row`, for its norm differs from that by one factor.
// past: sums go past the caches.
template <int32_t DTYPE, int32_t W>
Kept norm(const Arguments& in, int64_t r, const Weight& weight, float* row, bool past) {
  const int64_t size = in.size;
  const char *x = row_at<DTYPE>(in.x, r, in.x_stride), *other = row_at<DTYPE>(in.other, r, in.other_stride);
  char* total = row_at<DTYPE>(in.residual_out, r, size);
  Two<vf> squares = {};
  Two<vi> most = {};
  for (int64_t at = 0; at < size; at += PAIR) {
    Two<vf> s = read<DTYPE>(x, at, size), w = read_pair<W>(weight.values + at * size_of(W));
    if (other) {
      Two<vf> more = read<DTYPE>(other, at, size);
      s = {s.a + more.a, s.b + more.b};
      char* to = total + at * size_of(DTYPE);
      if (past) {
        alignas(64) char lines[PAIR * size_of(DTYPE)];
        write_pair<DTYPE>(s, lines);
        write_past(lines, to);
      } else {
        writing<size_of(DTYPE)>(to, size - at, [&](char* p) { write_pair<DTYPE>(s, p); });
      }
    }
    squares = {fma(s.a, s.a, squares.a), fma(s.b, s.b, squares.b)};
    Two<vf> y = {s.a * w.a, s.b * w.b};
    keep(row + at, y);
    take_larger(most, y);
  }
  double mean = (sum_of(squares.a) + sum_of(squares.b)) / double(size);
  return {largest(most), weight.factor / std::sqrt(mean + in.eps)};
}

constexpr int GATES = 4;  // vectors that are computed side by side

#if defined(__AVX512F__)
// Bits of 2^(j / 32), less what `n << 18` has of j where n % 32 is j: the sum of both is 2^(n / 32).
alignas(64) constexpr std::array<int32_t, 32> POWERS = [] {
  std::array<int32_t, 32> bits{};
  for (int j = 0; j < 32; ++j) bits[j] = std::bit_cast<int32_t>(__builtin_exp2f(float(j) / 32)) - (j << 18);
  return bits;
}();
#endif

// y = gate * sigmoid(gate) * up, where y is up before. A row takes as long as the instructions of this.
inline void silu_mul(const vf (&gate)[GATES], vf (&y)[GATES]) {
  auto each = [](auto step) {
    for (int v = 0; v < GATES; ++v) step(v);
  };
#if defined(__AVX512F__)
  // Step by step for all vectors: one chain of dependent instructions after the other would fill the scheduler.
  constexpr float MAGIC = 12582912.0f;  // as in exp_negative
  const __m512i low = _mm512_load_si512(POWERS.data()), high = _mm512_load_si512(POWERS.data() + 16);
  vf f[GATES], n[GATES], power[GATES], rest[GATES];
  each([&](int v) { f[v] = (vf)_mm512_min_ps((__m512)gate[v], (__m512)splat(87.0f)); });  // NaN: 87
  // exp(-f) = 2^(n / 32) * exp(-rest)
  each([&](int v) { n[v] = fma(f[v], splat(-46.1662413f), splat(MAGIC)); });
  each([&](int v) { rest[v] = fma(n[v] - MAGIC, splat(2.16608494e-2f), f[v]); });
  each([&](int v) {
    __m512i bits = (__m512i)n[v];
    power[v] = (vf)_mm512_add_epi32(_mm512_permutex2var_epi32(low, bits, high), _mm512_slli_epi32(bits, 18));
  });
  // exp(-rest) for |rest| <= log(2) / 64, relative error below 6e-8
  each([&](int v) { f[v] = fma(rest[v], splat(4.99999981e-1f), splat(-1.00001464f)); });
  each([&](int v) { f[v] = fma(f[v], rest[v], splat(1.0f)); });
  each([&](int v) { power[v] = fma(f[v], power[v], splat(1.0f)); });
  // A division takes as long as all that is before it. Below -87 the sigmoid is 0; -inf * 0 is NaN, as it should be.
  each([&](int v) { f[v] = (vf)_mm512_rcp14_ps((__m512)power[v]); });
  each([&](int v) { power[v] = fma(-power[v], f[v], splat(1.0f)); });
  each([&](int v) {
    __mmask16 inside = _mm512_cmp_ps_mask((__m512)gate[v], (__m512)splat(-87.0f), _CMP_NLT_UQ);
    f[v] = (vf)_mm512_maskz_fmadd_ps(inside, (__m512)f[v], (__m512)power[v], (__m512)f[v]);
  });
  each([&](int v) { f[v] *= gate[v]; });
  each([&](int v) { y[v] *= f[v]; });
#else
  each([&](int v) {
    vf small = exp_negative(-magnitude(gate[v]));
    y[v] *= (gate[v] > 0.0f ? gate[v] : gate[v] * small) / (small + 1.0f);
  });
#endif
}

template <int32_t DTYPE>
Kept gated(const Arguments& in, int64_t r, float* row) {
  const int64_t size = in.size;
  const char *x = row_at<DTYPE>(in.x, r, in.x_stride), *other = row_at<DTYPE>(in.other, r, in.other_stride);
  Two<vi> most = {};
  const ReadAhead<DTYPE> gates(x, size, in.x_stride), ups(other, size, in.other_stride);
  for (int64_t at = 0; at < size; at += 2 * PAIR) {
    gates.template fetch<2 * PAIR>(at), ups.template fetch<2 * PAIR>(at);
    Two<vf> a = read<DTYPE>(x, at, size), b = read<DTYPE>(x, at + PAIR, size);
    Two<vf> c = read<DTYPE>(other, at, size), d = read<DTYPE>(other, at + PAIR, size);
    vf gate[] = {a.a, a.b, b.a, b.b}, y[] = {c.a, c.b, d.a, d.b};
    silu_mul(gate, y);
    keep(row + at, {y[0], y[1]});
    keep(row + at + PAIR, {y[2], y[3]});
    take_larger(most, {y[0], y[1]});
    take_larger(most, {y[2], y[3]});
  }
  return {largest(most), 1};
}

// Codes and scale of a kept row; codes of 0 if the scale is not finite. past: they go past the caches.
template <int32_t DTYPE>
void quantize_kept(const float* row, int64_t size, Kept found, int8_t* codes, float& scale, bool past) {
  scale = float(found.largest * found.factor / 127);
  float step = found.largest / 127.0f, inverse = 1.0f / step;
  if (scale == 0 || step == 0 || !std::isfinite(scale)) return std::fill_n(codes, size, int8_t(0)), void();
  char* bytes = reinterpret_cast<char*>(codes);
  auto each = [&](auto code) {
    auto put = [&](int64_t at, char* to) {
      Two<vf> x = kept(row + at);
      write_low_bytes<DTYPE>({code(x.a), code(x.b)}, to);
    };
    // From the end on, which is in the first cache still.
    if (past) {
      for (int64_t at = size - 64; at >= 0; at -= 64) {
        alignas(64) char line[64];
        for (int64_t i = 0; i < 64; i += PAIR) put(at + i, line + i);
        write_past(line, bytes + at);
      }
    } else {
      for (int64_t at = (size - 1) / PAIR * PAIR; at >= 0; at -= PAIR)
        writing<1>(bytes + at, size - at, [&](char* to) { put(at, to); });
    }
  };
  if (inverse < 1e30f)  // the low byte of what is rounded like `round_even`
    each([&](vf x) { return std::bit_cast<vi>(fma(x, splat(inverse), splat(12582912.0f))); });
  else
    each([&](vf x) { return nearest(bounded(x / step)); });
}

template <int32_t DTYPE, int32_t W>
void run(const Arguments& in) {
  constexpr int64_t STEP = LANES * GATES;
  int64_t padded = (in.size + STEP - 1) / STEP * STEP, threads = std::min(in.rows, int64_t(in.threads));
  const bool sums_past = go_past_caches(in.residual_out, in.size * size_of(DTYPE), in.rows, PAIR * size_of(DTYPE));
  const bool codes_past = go_past_caches(in.codes, in.size, in.rows, 64);
  // In small parts: a thread that slept when the call began has its share done by the others.
  int64_t part = std::clamp(in.rows / std::max(threads * 8, int64_t(1)), int64_t(1), int64_t(4));
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
  {
    // On cache lines: a vector that lies across two takes as long as two.
    Room<float> row(padded);
    Room<char> values(in.weight ? padded * size_of(W) : 0);
    Weight weight = in.weight ? weight_of<DTYPE, W>(in, values.get()) : Weight{};
#pragma omp for schedule(dynamic, part)
    for (int64_t r = 0; r < in.rows; ++r) {
      Kept found = in.weight ? norm<DTYPE, W>(in, r, weight, row.get(), sums_past) : gated<DTYPE>(in, r, row.get());
      quantize_kept<DTYPE>(row.get(), in.size, found, in.codes + r * in.size, in.scales[r], codes_past);
    }
    written_past();
  }
}

}  // namespace

extern "C" void gcu_prologue(const Arguments* in) {
  switch (in->dtype) {
    case F32: return run<F32, F32>(*in);
    case BF16: return in->weight_dtype == BF16 ? run<BF16, BF16>(*in) : run<BF16, F32>(*in);
    default: return run<F16, F32>(*in);
  }
}
