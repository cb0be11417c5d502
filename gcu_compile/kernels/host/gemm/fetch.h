// Sums that rest in memory between two parts of the inputs, fetched beside the products before them.
#pragma once

#include <initializer_list>

namespace {

// Two rows of 128 bytes, 256 apart, which are read and then written; `next` goes on to the two behind them.
inline void fetch_sums(const void*& next) {
  auto* p = static_cast<const char*>(next);
  for (int at : {0, 64, 256, 320}) __builtin_prefetch(p + at, 1);
  next = p + 512;
}

}  // namespace
