// Rows of a cache or tensor, read as float32 numbers.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "arguments.h"
#include "vectors.h"

namespace {

// A row of a cache or tensor: where it is, and the zero point of its integers.
struct Row {
  const char* at;
  int32_t zero;
};

// Where the keys of a tile are.
struct Source {
  const Row* keys;
  int n;
  bool even;            // even: two keys that are some multiple of `stride` apart have the others between them
  int64_t dim, stride;  // in bytes, from key to key
};

// `n` float32 numbers of a row from element `from` on, zeros up to LANES.
inline Vec numbers(const Row& row, int dtype, int64_t from, int64_t n) {
  if (n >= LANES) {
    if (dtype == F32T) return load(reinterpret_cast<const float*>(row.at) + from);
    if (dtype == BF16T) {
      Half bits = *reinterpret_cast<const Half*>(row.at + 2 * from);
      return std::bit_cast<Vec>(__builtin_convertvector(bits, Unsigned) << 16);
    }
    if (dtype == I8T) {
      Byte bytes = *reinterpret_cast<const Byte*>(row.at + from);
      return __builtin_convertvector(__builtin_convertvector(bytes, Int) - row.zero, Vec);
    }
  }
  alignas(64) float values[LANES] = {};
  int64_t count = std::min<int64_t>(n, LANES);
  if (dtype == F32T) std::memcpy(values, reinterpret_cast<const float*>(row.at) + from, count * 4);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row.at) + from;
  if (dtype == BF16T) for (int i = 0; i < count; ++i) values[i] = to_float(halves[i]);
  if (dtype == F16T) for (int i = 0; i < count; ++i) values[i] = float(std::bit_cast<_Float16>(halves[i]));
  if (dtype == I8T) for (int i = 0; i < count; ++i) values[i] = float(int32_t(row.at[from + i]) - row.zero);
  return load(values);
}

}  // namespace
