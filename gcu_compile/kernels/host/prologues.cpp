// What runs before an int8 product, one pass over memory: norm or activation, then codes and a scale for each token.
// See prologues/eager.py.
//
// A row is read, summed and kept as floats in the first caches, made into what is quantised there, and leaves as codes.
#include <omp.h>

#include "exp.h"
#include "pairs.h"
#include "quantize.h"

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

// A norm's weight as floats, in the order in which a row of DTYPE is kept.
template <int32_t DTYPE>
void order_weight(const Arguments& in, float* weight) {
  if (in.weight_dtype == DTYPE) {
    for (int64_t at = 0; at < in.size; at += PAIR)
      keep(weight + at, read<DTYPE>(static_cast<const char*>(in.weight), at, in.size));
    return;
  }
  float values[PAIR];
  for (int64_t at = 0; at < in.size; at += PAIR) {
    int64_t left = std::min(in.size - at, PAIR);
    to_floats(in.weight, in.weight_dtype, at, int(left), values);
    std::fill(values + left, values + PAIR, 0.0f);
    for (int64_t i = 0; i < PAIR; ++i)
      weight[at + i] = values[DTYPE != BF16 ? i : i < LANES ? 2 * i : 2 * (i - LANES) + 1];
  }
}

// s = x + residual, its norm in `row`; the largest magnitude.
template <int32_t DTYPE>
float norm(const Arguments& in, int64_t r, const float* weight, float* row) {
  const int64_t size = in.size;
  const char *x = row_at<DTYPE>(in.x, r, in.x_stride), *other = row_at<DTYPE>(in.other, r, in.other_stride);
  char* total = row_at<DTYPE>(in.residual_out, r, size);
  Two<vf> squares = {};
  for (int64_t at = 0; at < size; at += PAIR) {
    Two<vf> s = read<DTYPE>(x, at, size);
    if (other) {
      Two<vf> more = read<DTYPE>(other, at, size);
      s = {s.a + more.a, s.b + more.b};
      writing<size_of(DTYPE)>(total + at * size_of(DTYPE), size - at, [&](char* p) { write_pair<DTYPE>(s, p); });
    }
    squares = {fma(s.a, s.a, squares.a), fma(s.b, s.b, squares.b)};
    keep(row + at, s);
  }
  vf all = squares.a + squares.b;
  double sum = 0;
  for (int i = 0; i < LANES; ++i) sum += all[i];
  float factor = float(1.0 / std::sqrt(sum / double(size) + in.eps));
  Two<vi> most = {};
  for (int64_t at = 0; at < size; at += PAIR) {
    Two<vf> s = kept(row + at), w = kept(weight + at), y = {s.a * factor * w.a, s.b * factor * w.b};
    keep(row + at, y);
    take_larger(most, y);
  }
  return largest(most);
}

// gate * sigmoid(gate) * up. A row takes as long as the instructions of this.
inline vf silu_mul(vf gate, vf up) {
#if defined(__AVX512F__)
  constexpr float MAGIC = 12582912.0f + 127.0f;  // as in exp_negative; the exponent's bias is in the low bits too
  vf x = (vf)_mm512_min_ps((__m512)gate, (__m512)splat(87.0f));  // NaN: 87
  vf shifted = fma(x, splat(-1.44269504f), splat(MAGIC));
  vf f = fma(x, splat(-1.44269504f), -(shifted - MAGIC));
  vf power = fma(f, splat(1.3264727e-3f), splat(9.6715128e-3f));  // 2^f for |f| <= 1/2, relative error below 1e-7
  power = fma(fma(power, f, splat(5.5507337e-2f)), f, splat(2.4022242e-1f));
  power = fma(fma(power, f, splat(6.9314698e-1f)), f, splat(1.0f));
  vf divisor = fma(power, std::bit_cast<vf>(std::bit_cast<vi>(shifted) << 23), splat(1.0f));
  // A division takes as long as all that is before it. Below -87 the sigmoid is 0; -inf * 0 is NaN, as it should be.
  vf near = (vf)_mm512_rcp14_ps((__m512)divisor);
  __mmask16 inside = _mm512_cmp_ps_mask((__m512)gate, (__m512)splat(-87.0f), _CMP_NLT_UQ);
  vf off = fma(-divisor, near, splat(1.0f));
  vf sigmoid = (vf)_mm512_maskz_fmadd_ps(inside, (__m512)near, (__m512)off, (__m512)near);
  return sigmoid * gate * up;
#else
  vf small = exp_negative(-magnitude(gate));
  return (gate > 0.0f ? gate : gate * small) / (small + 1.0f) * up;
#endif
}

// Of a row, in `row`; the largest magnitude.
template <int32_t DTYPE>
float gated(const Arguments& in, int64_t r, const float*, float* row) {
  const int64_t size = in.size;
  const char *x = row_at<DTYPE>(in.x, r, in.x_stride), *other = row_at<DTYPE>(in.other, r, in.other_stride);
  Two<vi> most = {};
  for (int64_t at = 0; at < size; at += PAIR) {
    Two<vf> gate = read<DTYPE>(x, at, size), up = read<DTYPE>(other, at, size);
    Two<vf> y = {silu_mul(gate.a, up.a), silu_mul(gate.b, up.b)};
    keep(row + at, y);
    take_larger(most, y);
  }
  return largest(most);
}

// Codes of a kept row and its scale; 0 if that is not finite.
template <int32_t DTYPE>
void quantize_kept(const float* row, int64_t size, float largest, int8_t* codes, float& scale) {
  scale = largest / 127.0f;
  if (scale == 0 || !std::isfinite(scale)) return std::fill_n(codes, size, int8_t(0)), void();
  auto each = [&](auto code) {
    for (int64_t at = 0; at < size; at += PAIR) {
      Two<vf> x = kept(row + at);
      Two<vi> both = {code(x.a), code(x.b)};
      writing<1>(reinterpret_cast<char*>(codes) + at, size - at, [&](char* p) { write_low_bytes<DTYPE>(both, p); });
    }
  };
  float inverse = 1.0f / scale;
  if (inverse < 1e30f)  // the low byte of what is rounded like `round_even`
    each([&](vf x) { return std::bit_cast<vi>(fma(x, splat(inverse), splat(12582912.0f))); });
  else
    each([&](vf x) { return nearest(bounded(x / scale)); });
}

template <int32_t DTYPE>
void run(const Arguments& in) {
  int64_t padded = (in.size + PAIR - 1) / PAIR * PAIR;
#pragma omp parallel num_threads(in.threads)
  {
    std::vector<float> weight(in.weight ? padded : 0), row(padded);
    if (in.weight) order_weight<DTYPE>(in, weight.data());
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; ++r) {
      auto make = in.weight ? norm<DTYPE> : gated<DTYPE>;
      float largest = make(in, r, weight.data(), row.data());
      quantize_kept<DTYPE>(row.data(), in.size, largest, in.codes + r * in.size, in.scales[r]);
    }
  }
}

}  // namespace

extern "C" void gcu_prologue(const Arguments* in) {
  switch (in->dtype) {
    case F32: return run<F32>(*in);
    case BF16: return run<BF16>(*in);
    default: return run<F16>(*in);
  }
}
