// The output, quantised.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "vectors.h"

namespace {

// int8 of every token of `out`, one scale each.
void quantise(const Arguments& in) {
  int64_t n = in.heads * in.v_dim;
#pragma omp parallel for num_threads(in.threads)
  for (int64_t token = 0; token < in.tokens; ++token) {
    const char* at = static_cast<const char*>(in.out) + token * n * (in.dtype == F32T ? 4 : 2);
    auto value = [&](int64_t i) {
      if (in.dtype == F32T) return reinterpret_cast<const float*>(at)[i];
      if (in.dtype == BF16T) return to_float(reinterpret_cast<const uint16_t*>(at)[i]);
      return float(reinterpret_cast<const _Float16*>(at)[i]);
    };
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(value(i)));
    float scale = largest == 0 ? 1.0f : largest / 127;
    for (int64_t i = 0; i < n; ++i)
      in.quantised[token * n + i] = int8_t(std::clamp(std::nearbyint(value(i) / scale), -128.0f, 127.0f));
    in.quantised_scale[token] = scale;
  }
}

}  // namespace
