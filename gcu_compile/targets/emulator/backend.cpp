// The emulated `gcu` device as a PrivateUse1 backend of PyTorch. Built on demand by build.py.
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "fallback.h"

namespace gcu {

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "only strided tensors exist on gcu");
  const c10::DeviceGuard guard(device.value_or(c10::Device(kType, current)));
  return at::detail::empty_generic(size, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> layout, std::optional<at::Device> device, std::optional<bool>) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "only strided tensors exist on gcu");
  const c10::DeviceGuard guard(device.value_or(c10::Device(kType, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor on_host(Call& call, const at::Tensor& tensor) {
  return tensor.is_privateuseone() ? call.to_host(tensor) : tensor;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  Call call(current);
  on_host(call, to).copy_(on_host(call, from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

void record_stream(at::Tensor&, c10::Stream) {}

// The same memory as a CPU tensor: what Triton's interpreter is given.
at::Tensor host_view(const at::Tensor& tensor) {
  Call call(current);
  auto host = call.to_host(tensor);
  // The view keeps the card's memory alive.
  auto* keeper = new c10::Storage(tensor.storage());
  host.storage().set_data_ptr_noswap({const_cast<void*>(keeper->data()), keeper,
                                      [](void* p) { delete static_cast<c10::Storage*>(p); }, c10::DeviceType::CPU});
  host.unsafeGetTensorImpl()->storage().unsafeGetStorageImpl()->set_resizable(false);
  return host;
}

// Flash attention's choice of the CPU is not for a card: attention is decomposed.
int64_t math_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                       double, bool, std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("record_stream", &record_stream);
  m.impl("_fused_sdp_choice", &math_attention);
  // Their device-independent kernels would ask for a card's own, or compute in another order than the CPU's.
  for (const char* name : {"addr", "convolution", "convolution_backward", "mish_backward", "native_group_norm",
                           "native_layer_norm", "silu_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

// Resolving a lazy conjugate or negative is a copy, which takes both as they are.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY(gcu_emulator, m) {
  m.def("host_view(Tensor(a) tensor) -> Tensor(a)");
  m.impl("host_view", c10::DispatchKey::PrivateUse1, &host_view);
  m.def("default_generator(int card) -> Generator?", [](int64_t card) { return default_generator(card); });
}

}  // namespace gcu

// Called once, before any tensor is made.
extern "C" void gcu_emulator_start(int devices, size_t memory_limit, size_t granule) {
  gcu::devices = static_cast<c10::DeviceIndex>(devices);
  gcu::allocator().configure(devices, memory_limit, granule);
  c10::SetAllocator(gcu::kType, &gcu::allocator());
  at::setHostAllocator(gcu::kType, &gcu::pinned_allocator());
  static auto* hooks = new gcu::Hooks();
  at::RegisterPrivateUse1HooksInterface(hooks);
}
