// What Python hands over: 8 bytes a field, in the order of `FIELDS` in host/attention.py; null pointers: not asked for.
#pragma once

#include <cstdint>

enum Dtype : int64_t { F32T = 0, BF16T = 1, F16T = 2, I8T = 3, BOOLT = 4 };

struct Strides {
  int64_t outer, head, token;  // dense: outer is the batch; caches: the block, and token the slot in it
};

struct Arguments {
  // What changes from step to step. kernels/attention/layer.py writes this part anew and keeps the rest of a layer.
  const void* q;
  void* out;
  Strides q_at, out_at;  // in elements; values of one head are adjacent
  int64_t tokens, sequences;
  // Paged: tables. Dense: q_len, kv_len, offset, and one "block" per sequence.
  const int32_t *block_table, *query_start_loc, *seq_lens;
  int64_t table_stride, table_blocks, causal, threads;
  // What a layer keeps.
  const void *k, *v;
  Strides k_at, v_at;
  int64_t heads, kv_heads, head_dim, v_dim, block_size, num_blocks;
  int64_t q_len, kv_len, offset;
  const float *k_scale, *v_scale;  // kind 1: one number, 2: [kv_heads], 3: per token and head, by the strides
  const int32_t *k_zero, *v_zero;
  int64_t k_scale_kind, v_scale_kind;
  Strides k_scale_at, v_scale_at;
  const void* bias;
  int64_t bias_dtype, bias_batch, bias_head, bias_query, bias_key;  // strides
  const float *alibi_slopes, *sinks;  // [heads]
  double scale, soft_cap;
  int64_t window;  // 0: none
  int64_t dtype, cache_dtype;
  int8_t* quantised;       // [tokens, heads, v_dim], or null
  float* quantised_scale;  // [tokens]
};

// Bytes of a number of the cache.
inline int64_t size_of_number(const Arguments& in) { return in.cache_dtype == F32T ? 4 : in.cache_dtype == I8T ? 1 : 2; }
