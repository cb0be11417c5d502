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

inline vi later(vi most, vf x) {  // the larger magnitudes, as bits: NaN is above infinity
  vi bits = std::bit_cast<vi>(x) & 0x7fffffff;
  return most > bits ? most : bits;
}

// s = x + residual, its norm in `row`; the largest magnitude.
template <int32_t DTYPE>
float norm(const Arguments& in, int64_t r, const float* weight, float* row) {
  vf squares = {};
  for (int64_t at = 0; at < in.size; at += LANES) {
    int64_t left = in.size - at;
    vf s = read<DTYPE>(in.x, r * in.x_stride + at, left);
    if (in.other) {
      s += read<DTYPE>(in.other, r * in.other_stride + at, left);
      write<DTYPE>(s, in.residual_out, r * in.size + at, left);
    }
    squares = fma(s, s, squares);
    store(row + at, s);
  }
  double sum = 0;
  for (int i = 0; i < LANES; ++i) sum += squares[i];
  float factor = float(1.0 / std::sqrt(sum / double(in.size) + in.eps));
  vi most = {};
  for (int64_t at = 0; at < in.size; at += LANES) {
    vf y = load<vf>(row + at) * factor * load<vf>(weight + at);
    store(row + at, y);
    most = later(most, y);
  }
  return largest_lane(most);
}

// gate * sigmoid(gate) * up in `row`; the largest magnitude.
template <int32_t DTYPE>
float gated(const Arguments& in, int64_t r, const float*, float* row) {
  vi most = {};
  for (int64_t at = 0; at < in.size; at += LANES) {
    int64_t left = in.size - at;
    vf gate = read<DTYPE>(in.x, r * in.x_stride + at, left);
    vf small = exp_negative(gate > 0.0f ? -gate : gate);  // exp(-|gate|)
    vf y = (gate > 0.0f ? gate : gate * small) / (small + 1.0f) * read<DTYPE>(in.other, r * in.other_stride + at, left);
    store(row + at, y);
    most = later(most, y);
  }
  return largest_lane(most);
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
