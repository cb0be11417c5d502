// What runs before an int8 product, one pass over memory: norm or activation, then codes and a scale for each token.
// See prologues/eager.py.
//
// A row is read, summed and kept as floats in the first cache, made into what is quantised there, and leaves as codes.
#include <omp.h>

#include "exp.h"
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

typedef uint16_t Half __attribute__((vector_size(LANES * 2)));

// `count` (at most LANES) elements from `at` on, zeros behind them.
template <int32_t DTYPE>
inline vf read(const void* p, int64_t at, int64_t count) {
  if (count >= LANES) {
    if constexpr (DTYPE == F32) return load<vf>(static_cast<const float*>(p) + at);
    if constexpr (DTYPE == BF16) {
      return std::bit_cast<vf>(__builtin_convertvector(load<Half>(static_cast<const uint16_t*>(p) + at), vu) << 16);
    }
    count = LANES;
  }
  alignas(64) float values[LANES] = {};
  if (count == LANES)  // a count that the compiler knows makes vectors of it
    to_floats(p, DTYPE, at, LANES, values);
  else
    to_floats(p, DTYPE, at, int(count), values);
  return load<vf>(values);
}

template <int32_t DTYPE>
inline void write(vf x, void* p, int64_t at, int64_t count) {
  if (count >= LANES) {
    if constexpr (DTYPE == F32) return store(static_cast<float*>(p) + at, x);
    if constexpr (DTYPE == BF16) {  // to_bf16 of every lane
      vu bits = std::bit_cast<vu>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      rounded = x == x ? rounded : vu{} + 0x7fc0;
      return store(static_cast<uint16_t*>(p) + at, __builtin_convertvector(rounded, Half));
    }
    count = LANES;
  }
  alignas(64) float values[LANES];
  store(values, x);
  from_floats(values, int(count), p, DTYPE, at);
}

inline float largest_lane(vi bits) {
  int32_t most = 0;
  for (int i = 0; i < LANES; ++i) most = std::max(most, bits[i]);
  return std::bit_cast<float>(most);
}

// Row r of rows `stride` elements apart; null stays null.
template <int32_t DTYPE>
inline const void* row_at(const void* p, int64_t r, int64_t stride) {
  return p ? static_cast<const char*>(p) + r * stride * size_of(DTYPE) : nullptr;
}

// step(at, left, v) for every vector of `size` values, with `left` values from `at` on; v counts 0 .. 3 over vectors
// that follow each other, so that what a step adds to need not wait for the step before.
template <class F>
inline void each_vector(int64_t size, F step) {
  int64_t at = 0;
  for (; at + 4 * LANES <= size; at += 4 * LANES) {
    step(at, LANES, 0);
    step(at + LANES, LANES, 1);
    step(at + 2 * LANES, LANES, 2);
    step(at + 3 * LANES, LANES, 3);
  }
  for (; at < size; at += LANES) step(at, size - at, 0);
}

inline float largest(const vi (&most)[4]) { return largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3]))); }

// s = x + residual, its norm in `row`; the largest magnitude.
template <int32_t DTYPE>
float norm(const Arguments& in, int64_t r, const float* weight, float* row) {
  const void *x = row_at<DTYPE>(in.x, r, in.x_stride), *other = row_at<DTYPE>(in.other, r, in.other_stride);
  void* total = const_cast<void*>(row_at<DTYPE>(in.residual_out, r, in.size));
  vf squares[4] = {};
  each_vector(in.size, [&](int64_t at, int64_t left, int v) {
    vf s = read<DTYPE>(x, at, left);
    if (other) {
      s += read<DTYPE>(other, at, left);
      write<DTYPE>(s, total, at, left);
    }
    squares[v] = fma(s, s, squares[v]);
    store(row + at, s);
  });
  vf all = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  double sum = 0;
  for (int i = 0; i < LANES; ++i) sum += all[i];
  float factor = float(1.0 / std::sqrt(sum / double(in.size) + in.eps));
  vi most[4] = {};
  each_vector(in.size, [&](int64_t at, int64_t, int v) {
    vf y = load<vf>(row + at) * factor * load<vf>(weight + at);
    store(row + at, y);
    most[v] = larger_magnitude(most[v], y);
  });
  return largest(most);
}

// gate * sigmoid(gate) * up. A row takes as long as the instructions of this: with AVX-512 the exponential may overflow,
// for gate / infinity is the 0 that it should be, and so the sign of the gate needs no care.
inline vf silu_mul(vf gate, vf up) {
#if defined(__AVX512DQ__)
  constexpr float MAGIC = 12582912.0f;  // as in exp_negative
  vf x = (vf)_mm512_range_ps((__m512)gate, (__m512)splat(128.0f), 2);  // what is nearer to 0, with the sign of the gate
  vf n = fma(x, splat(-1.44269504f), splat(MAGIC)) - MAGIC, f = fma(x, splat(-1.44269504f), -n);
  vf power = fma(f, splat(1.5337445e-4f), splat(1.3399992e-3f));  // 2^f for |f| <= 1/2, relative error below 2e-9
  power = fma(fma(power, f, splat(9.6185211e-3f)), f, splat(5.5503287e-2f));
  power = fma(fma(power, f, splat(2.4022647e-1f)), f, splat(6.9314721e-1f));
  power = fma(power, f, splat(1.0f));
  return gate / ((vf)_mm512_scalef_ps((__m512)power, (__m512)n) + 1.0f) * up;
#else
  vf small = exp_negative(-magnitude(gate));
  return (gate > 0.0f ? gate : gate * small) / (small + 1.0f) * up;
#endif
}

// Of a row, in `row`; the largest magnitude.
template <int32_t DTYPE>
float gated(const Arguments& in, int64_t r, const float*, float* row) {
  const void *x = row_at<DTYPE>(in.x, r, in.x_stride), *other = row_at<DTYPE>(in.other, r, in.other_stride);
  vi most[4] = {};
  each_vector(in.size, [&](int64_t at, int64_t left, int v) {
    vf gate = read<DTYPE>(x, at, left), up = read<DTYPE>(other, at, left);
    vf y = silu_mul(gate, up);
    store(row + at, y);
    most[v] = larger_magnitude(most[v], y);
  });
  return largest(most);
}

template <class F>
void each_row(const Arguments& in, F make) {
  int64_t padded = (in.size + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(in.threads)
  {
    std::vector<float> weight(padded), row(padded);
    if (in.weight) to_floats(in.weight, in.weight_dtype, 0, int(in.size), weight.data());
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; ++r) {
      int32_t zero;
      quantize_group(row.data(), in.size, make(r, weight.data(), row.data()), true, in.codes + r * in.size,
                     in.scales[r], zero);
    }
  }
}

template <int32_t DTYPE>
void run(const Arguments& in) {
  each_row(in, [&](int64_t r, const float* weight, float* row) {
    return in.weight ? norm<DTYPE>(in, r, weight, row) : gated<DTYPE>(in, r, weight, row);
  });
}

}  // namespace

extern "C" void gcu_prologue(const Arguments* in) {
  switch (in->dtype) {
    case F32: return run<F32>(*in);
    case BF16: return run<BF16>(*in);
    default: return run<F16>(*in);
  }
}
