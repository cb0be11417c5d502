// gcu::sample on the host: rows over the threads, or one row's vocabulary over them. See sampling/row.h.

#include <cstring>
#include <memory>
#include <vector>

#include "sampling/scores.h"

namespace {

// Of a list, in this order: its offsets, ids beyond the vocabulary, ids that do not ascend.
enum Fault : int32_t { FINE = 0, BIAS, HISTORY = BIAS + 3, TOKENS = HISTORY + 3 };

// Flat lists cut by offsets: whether they can be walked without leaving memory. `step`: by how much ids of a row rise at least.
int32_t check(const int64_t* offsets, const int32_t* ids, int64_t count, int64_t rows, int64_t vocab, int32_t step,
              int32_t fault) {
  if (!offsets) return FINE;
  bool cut = offsets[0] == 0 && offsets[rows] == count;
  for (int64_t r = 0; r < rows; ++r) cut &= offsets[r] <= offsets[r + 1];
  if (!cut) return fault;
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= ids[i] >= 0 && ids[i] < vocab;
  if (!inside) return fault + 1;
  bool ascending = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = offsets[r] + 1; i < offsets[r + 1]; ++i) ascending &= ids[i] - ids[i - 1] >= step;
  }
  return ascending ? FINE : fault + 2;
}

int32_t check(const Arguments* in) {
  int32_t fault = check(in->bias_offsets, in->bias_ids, in->bias_count, in->rows, in->vocab, 0, BIAS);
  if (fault) return fault;
  return check(in->history_offsets, in->history_ids, in->history_count, in->rows, in->vocab, 1, HISTORY);
}

// `body(row, scratches, threads)` of every row: rows over the threads, or, for few of them, each row over all threads.
template <class Body>
void each_row(const Arguments& in, Body body) {
  // Kept for the calling thread's next call; not shared between callers.
  static thread_local std::vector<std::unique_ptr<Scratch>> owned;
  int threads = in.rows * in.vocab * WEIGHED < WORTH_SPLITTING ? 1 : in.threads;
  while (int(owned.size()) < threads) owned.push_back(std::make_unique<Scratch>());
  std::vector<Scratch*> pool;
  for (auto& scratch : owned) pool.push_back(scratch.get());
  if (in.rows < threads) {
    for (int64_t row = 0; row < in.rows; ++row) body(row, pool.data(), threads);
    return;
  }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t row = 0; row < in.rows; ++row) body(row, &pool[omp_get_thread_num()], 1);
}

}  // namespace

extern "C" int32_t gcu_sample(const Arguments* in) {
  if (int32_t fault = check(in)) return fault;
  each_row(*in, [&](int64_t row, Scratch* const* pool, int threads) {
    in->ids[row] = Row(*in, row, pool, threads).sample();
  });
  return FINE;
}

// The same with arguments of which those that change from call to call are missing: places[1 ...], of which there are
// places[0], are the 8-byte fields that get `values`.
extern "C" int32_t gcu_sample_known(const Arguments* known, const int64_t* places, const int64_t* values) {
  int64_t fields[sizeof(Arguments) / 8];
  std::memcpy(fields, known, sizeof fields);
  for (int64_t i = 0; i < places[0]; ++i) fields[places[1 + i]] = values[i];
  Arguments in;
  std::memcpy(&in, fields, sizeof in);
  return gcu_sample(&in);
}

extern "C" int32_t gcu_logprobs(const Arguments* in, const Scored* out) {
  if (int32_t fault = check(in)) return fault;
  for (int64_t i = 0; i < in->rows * out->given; ++i) {
    if (out->tokens[i] < 0 || out->tokens[i] >= in->vocab) return TOKENS;
  }
  each_row(*in, [&](int64_t row, Scratch* const* pool, int threads) {
    Scores(*in, row, pool, threads).write_to(*out);
  });
  return FINE;
}

// For the tests: float32 and float64 weights of n values, as the kernel computes them.
extern "C" void gcu_sample_weights(const float* z, int64_t n, float max, float temperature, double* narrow, double* exact) {
  Weights weights(max, temperature, -FLT_MAX, false);
  weights.each(z, int(n), narrow);
  weights.narrow = false;
  weights.each(z, int(n), exact);
}
