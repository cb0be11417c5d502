// Floats as integers in the same order, and the set of tokens that a chain keeps.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NONE = std::numeric_limits<float>::quiet_NaN();  // as an upper limit: z >= NONE is false

// -0 and 0 have one key. The key after that of infinity gives NaN, above which nothing is: `z >= NaN` is false.
inline int32_t key_of(float z) {
  int32_t i = std::bit_cast<int32_t>(z + 0.0f);
  return i < 0 ? int32_t(uint32_t(INT32_MIN) - uint32_t(i)) : i;
}
inline float float_of(int32_t key) {
  return std::bit_cast<float>(key < 0 ? int32_t(uint32_t(INT32_MIN) - uint32_t(key)) : key);
}
inline int32_t middle(int32_t low, int32_t high) { return int32_t((int64_t(low) + int64_t(high)) >> 1); }

// Tokens by descending z and ascending id, up to one of them.
struct Kept {
  int32_t key;   // of the last token's z
  int64_t last;  // its id
  bool operator()(float z, int64_t id) const {
    int32_t k = key_of(z);
    return k > key || (k == key && id <= last);
  }
};
constexpr int64_t ALL_TIES = INT64_MAX;
