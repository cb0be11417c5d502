// Attention of dense tensors and of a paged KV cache; see attention/dense.py and attention/paged.py for the meaning.
//
//   work item = (sequence, KV head, tile of query rows, part of the keys); a row is one query of one head, so that
//   the heads which share a KV head share its packed keys and values; KV heads with few rows are one item (worker.h)
//   -> for each tile of keys: pack K transposed and V -> S = Q K^T -> softmax, online -> O = alpha O + P V
//   -> O / sum; parts of the keys are merged afterwards
//
// Three arithmetics: F32 (any instruction set, GCC vectors), and for bfloat16 queries on a bfloat16 or int8 cache, with
// float32 sums, AmxBF16 (products of tiles, in builds for AMX) and BF16 (AVX512-BF16 dot products). Integers up to 256
// are exact in bfloat16, so int8 caches are read exactly, and their scales multiply scores, weights or the result in
// float32.
//
// The headers' code has internal linkage: builds for several instruction sets can be loaded into one process, and its
// loader would otherwise merge the static tables of their templates (STB_GNU_UNIQUE).

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention/amx_bf16.h"
#include "attention/arguments.h"
#include "attention/bf16.h"
#include "attention/checks.h"
#include "attention/f32.h"
#include "attention/finish.h"
#include "attention/partials.h"
#include "attention/plan.h"
#include "attention/quantised.h"
#include "attention/worker.h"

namespace {

// Merges the parts of an item: each sum is brought to the common maximum.
void merge(const Arguments& in, const std::vector<Item>& parts, const Partials& partials, int64_t dv) {
  std::vector<float> sums(dv);
  const Item& all = parts[0];
  for (int64_t row = 0; row < all.rows() * all.kv_heads; ++row) {
    float maximum = -INF, weight = 0;
    for (const Item& part : parts) maximum = std::max(maximum, partials.maxima[part.partial + row]);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (const Item& part : parts) {
      int64_t at = part.partial + row;
      if (partials.maxima[at] == -INF && partials.weights[at] == 0) continue;  // saw no key; a NaN has no maximum either
      float factor = std::exp(partials.maxima[at] - maximum);
      weight += partials.weights[at] * factor;
      for (int64_t d = 0; d < dv; ++d) sums[d] += partials.sums[at * dv + d] * factor;
    }
    finish(in, all.of(row / all.rows()), int(row % all.rows()), sums.data(), maximum, weight);
  }
}

template <class P>
void attend(const Arguments& in) {
  std::vector<std::vector<Item>> split;
  int64_t partial_rows = 0, dv = rounded(in.v_dim, LANES);
  std::vector<Item> items = plan<P>(in, split, partial_rows);
  int64_t products = 0;
  for (const Item& i : items)
    products += (i.last_key - i.first_key) * i.rows() * i.kv_heads * (in.head_dim + in.v_dim);
  bool parallel = in.threads > 1 && items.size() > 1 && products > WAKE;
  Partials partials;
  partials.sums.resize(partial_rows * dv), partials.maxima.resize(partial_rows), partials.weights.resize(partial_rows);
#pragma omp parallel num_threads(in.threads) if (parallel)
  {
    [[maybe_unused]] typename P::Thread thread;
    Worker<P> worker(in, partials);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); ++i) worker.run(items[i]);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < split.size(); ++i) merge(in, split[i], partials, dv);
  }
}

}  // namespace

// 0, or 1 if lengths or table entries are out of range; nothing is computed then.
extern "C" int32_t gcu_attention(const Arguments* arguments) {
  const Arguments& in = *arguments;
  if (!valid(in)) return 1;
  if (in.block_table) {  // tokens of no sequence are padding
    int64_t token = in.heads * in.v_dim * (in.dtype == F32T ? 4 : 2), end = in.query_start_loc[in.sequences];
    std::memset(in.out, 0, in.query_start_loc[0] * token);
    std::memset(static_cast<char*>(in.out) + end * token, 0, (in.tokens - end) * token);
  }
  [[maybe_unused]] bool exact = in.dtype == BF16T && (in.cache_dtype == BF16T || in.cache_dtype == I8T);
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
  if (exact) attend<AmxBF16>(in);
  else attend<F32>(in);
#elif defined(__AVX512F__)
  if (exact && __builtin_cpu_supports("avx512bf16")) attend<BF16>(in);
  else attend<F32>(in);
#else
  attend<F32>(in);
#endif
  if (in.quantised) quantise(in);
  return 0;
}
