// From sums to results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "plan.h"
#include "vectors.h"

namespace {

// Output row of `in` from sums, maximum and sum of weights.
inline void finish(const Arguments& in, const Item& item, int row, const float* sums, float maximum, float weight) {
  int64_t head = item.first_head + row % item.head_count, token = item.first_token + row / item.head_count;
  float factor = 1.0f;
  if (in.sinks) {
    float sink = in.sinks[head], both = std::max(maximum, sink);
    if (both > -INF) {
      factor = std::exp(maximum - both);
      weight = weight * factor + std::exp(sink - both);
    }
  }
  factor = weight > 0 ? factor / weight : 0.0f;
  if (in.v_scale_kind == 1) factor *= in.v_scale[0];
  if (in.v_scale_kind == 2) factor *= in.v_scale[item.kv_head];
  int64_t outer = in.block_table ? in.query_start_loc[item.sequence] * in.out_at.token : item.sequence * in.out_at.outer;
  int64_t at = outer + token * in.out_at.token + head * in.out_at.head;
  if (in.dtype == F32T) {
    float* to = static_cast<float*>(in.out) + at;
    for (int64_t d = 0; d < in.v_dim; ++d) to[d] = sums[d] * factor;
  } else if (in.dtype == BF16T) {
    uint16_t* to = static_cast<uint16_t*>(in.out) + at;
    for (int64_t d = 0; d < in.v_dim; ++d) to[d] = to_bf16(sums[d] * factor);
  } else {
    _Float16* to = static_cast<_Float16*>(in.out) + at;
    for (int64_t d = 0; d < in.v_dim; ++d) to[d] = _Float16(sums[d] * factor);
  }
}

}  // namespace
