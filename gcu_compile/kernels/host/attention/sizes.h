// How the work is cut: registers, tiles and parts.
#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;  // of one strip: what a micro-kernel holds in registers beside its 6 rows
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int STRIP = LANES * VECTORS;
constexpr int ROWS = 6;        // of a micro-kernel
constexpr int TILE_ROWS = 96;  // query rows of a work item, where an arithmetic does not say otherwise
constexpr int ITEMS = 6;       // for each thread, before they are made larger
constexpr int TILE_KEYS = 256, TILE_KEYS_DECODE = 128;  // keys packed at once; few rows: all of it stays in L1
constexpr int64_t SIDE_BY_SIDE = 16, LAST_HEADS = 2;  // KV heads of an item, at most; of the last ones
constexpr int64_t HELD = 400000;  // bytes of an item's queries and sums
constexpr int64_t WAKE = 200000;    // fewer products take less time than waking other threads
constexpr int64_t PART_KEYS = 512;  // fewest keys that are worth a part of their own

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }  // upwards
int64_t rounded(int64_t n, int64_t to) { return divided(n, to) * to; }

}  // namespace
