// Memory of the emulated cards: host memory, counted and limited per card.
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/Storage.h>
#include <c10/util/Exception.h>

#include <map>
#include <mutex>
#include <vector>

namespace gcu {

constexpr auto kType = c10::DeviceType::PrivateUse1;

c10::DeviceIndex current_device();
c10::DeviceIndex device_count();

// One emulated card's memory: sizes are rounded up to the granule of the vendor's allocator; nothing is cached, so
// reserved and allocated are the same.
class Allocator final : public c10::DeviceAllocator {
 public:
  void configure(size_t devices, size_t limit, size_t granule) {
    limit_ = limit;
    granule_ = granule;
    stats_ = std::vector<c10::CachingDeviceAllocator::DeviceStats>(devices);
  }

  c10::DataPtr allocate(size_t bytes) override {
    const auto device = current_device();
    if (bytes == 0) return {nullptr, c10::Device(kType, device)};
    auto owner = c10::GetCPUAllocator()->allocate(reserve(bytes, device));
    return own(std::move(owner), bytes, device);
  }

  // Host memory that a CPU kernel allocated becomes memory of the card, without a copy.
  c10::DataPtr adopt(c10::DataPtr host, size_t bytes, c10::DeviceIndex device) {
    if (bytes == 0) return {nullptr, c10::Device(kType, device)};
    reserve(bytes, device);
    return own(std::move(host), bytes, device);
  }

  c10::Device device_of(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto next = blocks_.upper_bound(pointer);
    TORCH_CHECK(next != blocks_.begin(), "pointer is not memory of an emulated gcu");
    const auto& [start, block] = *--next;
    TORCH_CHECK(static_cast<const char*>(pointer) < static_cast<const char*>(start) + block.bytes,
                "pointer is not memory of an emulated gcu");
    return {kType, block.device};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return !stats_.empty(); }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_.at(device);
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    each(device, [](auto& stat) { stat.reset_accumulated(); });
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    each(device, [](auto& stat) { stat.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return {limit_ - stats_.at(device).allocated_bytes[0].current, limit_};
  }

 private:
  struct Block {
    c10::DataPtr host;
    size_t bytes;
    c10::DeviceIndex device;
  };

  size_t rounded(size_t bytes) const { return (bytes + granule_ - 1) / granule_ * granule_; }

  // Counts `bytes` against the card's limit; returns them rounded up.
  size_t reserve(size_t bytes, c10::DeviceIndex device) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& stats = stats_.at(device);
    const size_t size = rounded(bytes), used = stats.allocated_bytes[0].current;
    if (size > limit_ - used) {
      ++stats.num_ooms;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "GCU out of memory. Tried to allocate ", size, " bytes on emulated gcu:",
                       static_cast<int>(device), ", which has ", limit_, " bytes, ", limit_ - used,
                       " of them free. The capacity is fact dram_bytes of the target profile.");
    }
    for (auto* stat : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) (*stat)[0].increase(size);
    for (auto* stat : {&stats.allocation, &stats.segment, &stats.active}) (*stat)[0].increase(1);
    stats.requested_bytes[0].increase(bytes);
    ++stats.num_device_alloc;
    return size;
  }

  c10::DataPtr own(c10::DataPtr host, size_t bytes, c10::DeviceIndex device) {
    void* start = host.get();
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace(start, Block{std::move(host), bytes, device});
    return {start, start, &Allocator::release, c10::Device(kType, device)};
  }

  static void release(void* start);

  void free(void* start) {
    c10::DataPtr host;  // freed after the lock
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.find(start);
    auto& stats = stats_.at(found->second.device);
    const size_t size = rounded(found->second.bytes);
    for (auto* stat : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) (*stat)[0].decrease(size);
    for (auto* stat : {&stats.allocation, &stats.segment, &stats.active}) (*stat)[0].decrease(1);
    stats.requested_bytes[0].decrease(found->second.bytes);
    ++stats.num_device_free;
    host = std::move(found->second.host);
    blocks_.erase(found);
  }

  template <class Action>
  void each(c10::DeviceIndex device, Action action) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& stats = stats_.at(device);
    for (auto* stat : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes,
                       &stats.allocation, &stats.segment, &stats.active}) {
      action((*stat)[0]);
    }
  }

  std::mutex mutex_;
  size_t limit_ = 0, granule_ = 512;
  std::vector<c10::CachingDeviceAllocator::DeviceStats> stats_;
  std::map<const void*, Block> blocks_;
};

// Never destroyed: tensors may outlive it at exit.
inline Allocator& allocator() {
  static auto* instance = new Allocator();
  return *instance;
}

inline void Allocator::release(void* start) { allocator().free(start); }

// Page-locked memory is ordinary host memory that remembers that it was asked for.
class PinnedAllocator final : public at::HostAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto host = c10::GetCPUAllocator()->allocate(bytes ? bytes : 1);
    void* start = host.get();
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace(start, std::make_pair(std::move(host), bytes));
    return {start, start, &PinnedAllocator::release, c10::DeviceType::CPU};
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
  bool owns(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto next = blocks_.upper_bound(pointer);
    if (next == blocks_.begin()) return false;
    const auto& [start, block] = *--next;
    return static_cast<const char*>(pointer) < static_cast<const char*>(start) + std::max<size_t>(block.second, 1);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &PinnedAllocator::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void release(void* start);
  std::mutex mutex_;
  std::map<const void*, std::pair<c10::DataPtr, size_t>> blocks_;
};

inline PinnedAllocator& pinned_allocator() {
  static auto* instance = new PinnedAllocator();
  return *instance;
}

inline void PinnedAllocator::release(void* start) {
  auto& self = pinned_allocator();
  std::lock_guard<std::mutex> lock(self.mutex_);
  self.blocks_.erase(start);
}

}  // namespace gcu
