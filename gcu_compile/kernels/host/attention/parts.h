// One allocation, cut into arrays that start on cache lines.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sizes.h"

namespace {

class Parts {
 public:
  // `array` is to have so many elements; it has them when `allocate` was called.
  template <class T>
  void take(T*& array, int64_t count) {
    taken_.push_back({reinterpret_cast<char**>(&array), size_});
    size_ += rounded(count * sizeof(T), 64) + 64;  // arrays that are read together lie a line apart
  }

  void allocate() {
    memory_.reset(new char[size_ + 64]);
    char* first = reinterpret_cast<char*>(rounded(reinterpret_cast<int64_t>(memory_.get()), 64));
    for (auto [array, at] : taken_) *array = first + at;
  }

 private:
  struct Taken {
    char** array;
    int64_t at;
  };
  std::vector<Taken> taken_;
  int64_t size_ = 0;
  std::unique_ptr<char[]> memory_;
};

}  // namespace
