// The plan of a decode step, for test_plan.py. Assertions of the library say where a bound is above another.
#define _GLIBCXX_ASSERTIONS
#include "../../../gcu_compile/kernels/host/attention/plan.h"

namespace {

struct Few {
  static constexpr int TILE_ROWS = 96, LEAST_ROWS = 96, FEW = 8;
};

}  // namespace

// Items of one query for each sequence: [sequence, first KV head, KV heads, first key, last key, partial] each; how many.
extern "C" int64_t plan_items(int64_t sequences, const int32_t* lens, int64_t heads, int64_t kv_heads, int64_t threads,
                              int64_t* to, int64_t most) {
  std::vector<int32_t> starts(sequences + 1);
  for (int64_t i = 0; i <= sequences; ++i) starts[i] = int32_t(i);
  Arguments in{};
  in.sequences = sequences, in.seq_lens = lens, in.query_start_loc = starts.data(), in.block_table = lens;
  in.heads = heads, in.kv_heads = kv_heads, in.head_dim = in.v_dim = 64, in.causal = 1, in.threads = threads;
  std::vector<std::vector<Item>> split;
  int64_t partial_rows = 0, count = 0;
  for (const Item& item : plan<Few>(in, split, partial_rows)) {
    if (count == most) return -1;
    const int64_t row[] = {item.sequence, item.kv_head, item.kv_heads, item.first_key, item.last_key, item.partial};
    std::copy_n(row, 6, to + 6 * count++);
  }
  return count;
}
