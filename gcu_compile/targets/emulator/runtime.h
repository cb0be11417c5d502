// Devices, streams, events and random generators of the emulated cards. Work is done before a call returns, so a
// stream is an id, an event a point in time, and waiting returns at once.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>

#include "memory.h"

namespace gcu {

inline c10::DeviceIndex devices = 0;
inline thread_local c10::DeviceIndex current = 0;
inline thread_local std::vector<c10::StreamId> current_streams;
inline std::atomic<c10::StreamId> next_stream{1};

inline c10::DeviceIndex current_device() { return current; }
inline c10::DeviceIndex device_count() { return devices; }

inline void set_device(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < devices, "invalid device ordinal gcu:", static_cast<int>(index), "; there are ",
              static_cast<int>(devices), " emulated cards");
  current = index;
}

inline c10::StreamId& stream_of(c10::DeviceIndex index) {
  if (current_streams.empty()) current_streams.resize(devices);
  return current_streams.at(index < 0 ? current : index);
}

inline double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kType;

  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto old = current;
    set_device(device.index());
    return {kType, old};
  }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }

  c10::Stream getStream(c10::Device device) const override { return stream(device, stream_of(device.index())); }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(device, next_stream++); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto old = stream(next.device(), stream_of(next.device_index()));
    stream_of(next.device_index()) = next.id();
    return old;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void* getStreamNativeHandle(const c10::Stream asked) const override { return reinterpret_cast<void*>(asked.id()); }

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new double;
    *static_cast<double*>(*event) = now_ms();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    TORCH_CHECK(first && second, "both events must be recorded before their distance is asked for");
    return *static_cast<double*>(second) - *static_cast<double*>(first);
  }

 private:
  static c10::Stream stream(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, {kType, device.index() < 0 ? current : device.index()}, id);
  }
};

// The CPU's generator under the card's name: after the same seed a card draws what the CPU draws.
struct Generator final : public at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) {
    device_ = {kType, index};
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

inline const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* all = new std::vector<at::Generator>([] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex i = 0; i < devices; ++i) made.push_back(at::make_generator<Generator>(i));
    return made;
  }());
  return all->at(index < 0 ? current : index);
}

struct Hooks final : public at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return devices > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return devices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_device(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto old = current;
    set_device(index);
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* data) const override { return pinned_allocator().owns(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  at::Device getDeviceFromPtr(void* data) const override { return allocator().device_of(data); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const auto before = current;
    set_device(storage.device().index());
    auto grown = allocator().allocate(bytes);
    current = before;
    if (bytes) std::memcpy(grown.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

}  // namespace gcu
