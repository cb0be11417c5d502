// Lengths and tables of a paged call.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arguments.h"

namespace {

// Whether lengths and the table entries that will be read are in range; attention/checks.py names what is not.
bool valid(const Arguments& in) {
  if (!in.block_table) return true;
  if (in.query_start_loc[0] < 0) return false;
  for (int64_t s = 0; s < in.sequences; ++s) {
    int64_t begin = in.query_start_loc[s], end = in.query_start_loc[s + 1], length = in.seq_lens[s];
    if (end < begin || end > in.tokens) return false;
    if (length < 0 || (in.causal && end > begin && length < end - begin)) return false;
    if (length > in.table_blocks * in.block_size) return false;
    if (end == begin) continue;
    int64_t first = in.window ? std::max<int64_t>(0, length - (end - begin) - in.window + 1) : 0;
    for (int64_t j = first / in.block_size; j * in.block_size < length; ++j) {
      int64_t block = in.block_table[s * in.table_stride + j];
      if (block < 0 || block >= in.num_blocks) return false;
    }
  }
  return true;
}

}  // namespace
