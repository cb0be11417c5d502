// What the parts of an item leave for the merge.
#pragma once

#include <vector>

namespace {

// Partial results of an item: float32 sums, and per row the maximum and the sum of weights.
struct Partials {
  std::vector<float> sums, maxima, weights;
};

}  // namespace
