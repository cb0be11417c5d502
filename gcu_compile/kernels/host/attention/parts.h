// One allocation, cut into arrays that start on cache lines.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>

#include "sizes.h"

namespace {

class Parts {
 public:
  // `array` is to have so many elements; it has them when `allocate` was called. Up to four arrays.
  template <class T>
  void take(T*& array, int64_t count) {
    taken_.at(count_++) = {&array, size_};
    size_ += rounded(count * sizeof(T), 64) + 64;  // arrays that are read together lie a line apart
  }

  void allocate() {
    memory_.reset(new char[size_ + 64]);
    char* first = reinterpret_cast<char*>(rounded(reinterpret_cast<int64_t>(memory_.get()), 64));
    for (int i = 0; i < count_; ++i) {
      char* at = first + taken_[i].at;
      std::memcpy(taken_[i].array, &at, sizeof at);  // pointers of any type look alike
    }
  }

 private:
  struct Taken {
    void* array;  // the pointer's place
    int64_t at;
  };
  std::array<Taken, 4> taken_;
  int count_ = 0;
  int64_t size_ = 0;
  std::unique_ptr<char[]> memory_;
};

}  // namespace
