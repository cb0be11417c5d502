// What a mixture's experts gave a token, summed in float32: out[t] = sum_j weights[t, j] * y[place[t, j]].
#include <cstdint>

#include "simd.h"

// Field order is that of `Arguments` in host/weighted_sum.py.
struct Arguments {
  const void* y;         // [rows, size]
  const int64_t* place;  // [tokens, top_k]: a row of y
  const float* weights;  // [tokens, top_k]
  void* out;             // [tokens, size], dtype of y
  int64_t tokens, top_k, size;
  int32_t dtype, threads;
};

namespace {

constexpr int PART = 512;  // numbers of a row whose sums stay in the L1 cache

void sum(const Arguments& in, int64_t token) {
  float sums[PART], row[PART];
  for (int64_t first = 0; first < in.size; first += PART) {
    int count = int(in.size - first < PART ? in.size - first : PART);
    for (int i = 0; i < count; ++i) sums[i] = 0;
    for (int64_t j = token * in.top_k; j < (token + 1) * in.top_k; ++j) {
      to_floats(in.y, in.dtype, in.place[j] * in.size + first, count, row);
      float weight = in.weights[j];
      for (int i = 0; i < count; ++i) sums[i] += weight * row[i];
    }
    from_floats(sums, count, in.out, in.dtype, token * in.size + first);
  }
}

}  // namespace

extern "C" void gcu_weighted_sum(const Arguments* in) {
#pragma omp parallel for schedule(static) num_threads(in->threads)
  for (int64_t token = 0; token < in->tokens; ++token) sum(*in, token);
}
