// What Python hands over, 8 bytes a field in the order of FIELDS in host/sample.py; null pointers: not asked for.
#pragma once

#include <cstdint>

enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

struct Arguments {
  const void* logits;  // [rows, vocab], `stride` elements from row to row
  int64_t rows, vocab, stride;
  int64_t dtype, threads;
  const float* temperature;  // [rows]
  const int32_t* top_k;      // [rows]; 0 or >= vocab: all
  const float* top_p;        // [rows]
  const float* min_p;        // [rows]
  const uint8_t* forbidden;  // [rows, vocab]
  const int64_t* bias_offsets;     // [rows + 1]
  const int32_t* bias_ids;         // ascending within a row
  const float* bias_values;
  const int64_t* history_offsets;  // [rows + 1]
  const int32_t* history_ids;      // ascending and unique within a row
  const int32_t* history_counts;   // occurrences in the output; 0: only in the prompt
  const float *repetition, *frequency, *presence;  // [rows]
  const int64_t *seeds, *positions;  // [rows]: key and counter of the row's random number
  int64_t* ids;                      // [rows], written
  uint8_t* kept;                     // [rows, vocab], written; or null
  int64_t bias_count, history_count; // lengths of the flat lists
  const int64_t* draft_ids;          // [rows]; with the next: the draft token is verified instead of one drawn
  const float* draft_probabilities;  // [rows, vocab]
};
