// Memory that a thread keeps between products: what the allocator gives back to the system and takes again costs page
// faults, which take longer than a small product.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace {

// An array of numbers, without values, on a cache line of its own. The newest room that ends gives its memory to the
// next; that of the others is handed out anew when the last has ended.
template <class T>
class Room {
 public:
  explicit Room(size_t count) : bytes_((count * sizeof(T) + 63) / 64 * 64), data_(kept().take(bytes_)) {}
  ~Room() { kept().end(data_, bytes_); }
  Room(const Room&) = delete;
  T* get() const { return reinterpret_cast<T*>(data_); }

 private:
  struct Kept {
    static constexpr size_t PAGE = size_t(2) << 20, MOST = size_t(64) << 20;  // more than that is given back
    std::vector<char*> chunks;
    size_t size = 0, used = 0, all = 0, rooms = 0;  // of the last chunk; of all chunks

    ~Kept() { clear(); }
    void clear() {
      for (char* chunk : chunks) std::free(chunk);
      chunks.clear();
      size = used = all = 0;
    }
    char* take(size_t bytes) {
      if (chunks.empty() || used + bytes > size) add(bytes);
      ++rooms;
      return chunks.back() + std::exchange(used, used + bytes);
    }
    void add(size_t bytes) {
      bytes = (std::max<size_t>(bytes, 1) + PAGE - 1) / PAGE * PAGE;
      auto* chunk = static_cast<char*>(std::aligned_alloc(PAGE, bytes));
      if (!chunk) throw std::bad_alloc();
#if defined(__linux__)
      madvise(chunk, bytes, MADV_HUGEPAGE);  // if it can be had
#endif
      chunks.push_back(chunk);
      size = bytes, used = 0, all += bytes;
    }
    void end(char* data, size_t bytes) {
      if (data + bytes == chunks.back() + used) used -= bytes;
      if (--rooms) return;
      size_t total = all;
      used = 0;
      if (chunks.size() > 1 || total > MOST) clear();
      if (chunks.empty() && total <= MOST) add(total);  // next time in one piece
    }
  };
  static Kept& kept() {
    thread_local Kept kept;
    return kept;
  }

  size_t bytes_;
  char* data_;
};

}  // namespace
