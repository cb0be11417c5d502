// Every operation runs as the CPU's own kernel, on tensors that alias the card's memory: nothing is copied, and views,
// writes, resized outputs and random draws keep their meaning.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/zeros.h>

#include <unordered_map>

#include "runtime.h"

namespace gcu {

// The tensors of one call, as the CPU sees them and back.
class Call {
 public:
  explicit Call(c10::DeviceIndex device) : device_(device) {}

  at::Tensor to_host(const at::Tensor& tensor) {
    for (const auto& pair : pairs_) {
      if (pair.card.is_same(tensor)) return pair.host;
    }
    auto host = at::detail::make_tensor<c10::TensorImpl>(host_storage(tensor.storage()),
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    storages_.at(tensor.storage().unsafeGetStorageImpl()).keys = tensor.key_set() -
        c10::DispatchKeySet({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
    auto* impl = host.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    host._set_conj(tensor.is_conj());
    host._set_neg(tensor.is_neg());
    pairs_.push_back({tensor, host});
    return host;
  }

  c10::Storage host_storage(const c10::Storage& card) {
    auto& entry = storages_[card.unsafeGetStorageImpl()];
    if (!entry.host) {
      c10::DataPtr borrowed(const_cast<void*>(card.data()), c10::Device(c10::DeviceType::CPU));
      entry = {card, c10::Storage(c10::Storage::use_byte_size_t(), card.nbytes(), std::move(borrowed),
                                  c10::GetCPUAllocator(), /*resizable=*/true), std::nullopt};
    }
    return entry.host;
  }

  // What the CPU's kernel did to the arguments themselves: resized, set to other storage, or left to be conjugated.
  void update_arguments() {
    for (auto& [card, host] : pairs_) {
      auto* impl = card.unsafeGetTensorImpl();
      auto storage = card_storage(host.storage());
      if (storage.unsafeGetStorageImpl() != card.storage().unsafeGetStorageImpl()) {
        impl->set_storage_keep_dtype(std::move(storage));
      }
      const bool same = host.sizes() == card.sizes() && host.strides() == card.strides() &&
          host.storage_offset() == card.storage_offset();
      if (!same) impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      if (host.is_conj() != card.is_conj()) card._set_conj(host.is_conj());
      if (host.is_neg() != card.is_neg()) card._set_neg(host.is_neg());
    }
  }

  at::Tensor to_card(const at::Tensor& host) {
    if (!host.defined() || !host.has_storage() || !host.device().is_cpu()) return host;
    for (const auto& pair : pairs_) {
      if (pair.host.is_same(host)) return pair.card;
    }
    if (host._is_zerotensor()) return at::zeros(host.sizes(), host.options().device(kType, device_));
    auto card = make_card_tensor(host);
    auto* impl = card.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    card._set_conj(host.is_conj());
    card._set_neg(host.is_neg());
    return card;
  }

 private:
  struct TensorPair {
    at::Tensor card, host;
  };
  struct StoragePair {
    c10::Storage card, host;
    std::optional<c10::DispatchKeySet> keys;  // of the argument that it came with
  };

  // A view of an argument is an inference tensor if that is one; what is new, if the mode says so.
  at::Tensor make_card_tensor(const at::Tensor& host) {
    auto storage = card_storage(host.storage());
    const auto& keys = storages_.at(storage.unsafeGetStorageImpl()).keys;
    if (keys) {
      return at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), *keys, host.dtype());
    }
    return at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                    c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.dtype());
  }

  c10::Storage card_storage(const c10::Storage& host) {
    for (auto& [_, pair] : storages_) {
      if (pair.host.unsafeGetStorageImpl() != host.unsafeGetStorageImpl()) continue;
      if (host.data() != pair.card.data()) {  // resized: the CPU's allocator gave it new memory
        pair.card.set_data_ptr_noswap(take(host));
      }
      pair.card.unsafeGetStorageImpl()->set_nbytes(host.nbytes());
      return pair.card;
    }
    c10::Storage card(c10::Storage::use_byte_size_t(), host.nbytes(), take(host), &allocator(), /*resizable=*/true);
    storages_[card.unsafeGetStorageImpl()] = {card, host, std::nullopt};
    return card;
  }

  // The memory of `host`, kept alive by `host` itself, as memory of the card.
  c10::DataPtr take(const c10::Storage& host) {
    auto* keeper = new c10::Storage(host);
    c10::DataPtr held(const_cast<void*>(host.data()), keeper, [](void* p) { delete static_cast<c10::Storage*>(p); },
                      c10::DeviceType::CPU);
    return allocator().adopt(std::move(held), host.nbytes(), device_);
  }

  c10::DeviceIndex device_;
  std::vector<TensorPair> pairs_;
  std::unordered_map<c10::StorageImpl*, StoragePair> storages_;
};

// Operations that take CPU tensors beside those of a card, as they do on any card.
inline bool takes_host_tensors(const c10::OperatorName& name) {
  static const std::unordered_set<std::string> names{
      "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_ctc_loss", "aten::_index_put_impl_",
      "aten::_pack_padded_sequence", "aten::copy_", "aten::index", "aten::index_put", "aten::index_put_",
      "aten::set_"};
  return name.name.rfind("aten::", 0) != 0 || names.count(name.name);
}

// The card that a call runs on: the one of its tensors, which must agree, else the one that it names.
inline c10::DeviceIndex device_of_call(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  std::optional<c10::DeviceIndex> found, named;
  bool host = false;
  auto see = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (!tensor.is_privateuseone()) {
      host |= tensor.is_cpu() && tensor.dim() > 0;
      return;
    }
    TORCH_CHECK(!found || *found == tensor.get_device() || takes_host_tensors(op.operator_name()),
                "Expected all tensors to be on the same device, but found at least two devices, gcu:",
                static_cast<int>(*found), " and gcu:", tensor.get_device(), "! (in ", op.operator_name().name, ")");
    if (!found) found = static_cast<c10::DeviceIndex>(tensor.get_device());
  };
  for (const auto& value : arguments) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorList()) see(tensor);
    if (value.isDevice() && value.toDevice().type() == kType) {
      named = value.toDevice().has_index() ? value.toDevice().index() : current_device();
    }
  }
  TORCH_CHECK(!found || !host || takes_host_tensors(op.operator_name()),
              "Expected all tensors to be on the same device, but found at least two devices, gcu:",
              static_cast<int>(found.value_or(0)), " and cpu! (in ", op.operator_name().name, ")");
  return found.value_or(named.value_or(current_device()));
}

// Lends a card's generator state to the CPU's default generator for one call that draws random numbers.
class RandomLoan {
 public:
  explicit RandomLoan(const at::Generator& card) : card_(card), host_(at::detail::getDefaultCPUGenerator()) {
    saved_ = host_.get_state();
    host_.set_state(card_.get_state());
  }
  ~RandomLoan() {
    card_.set_state(host_.get_state());
    host_.set_state(saved_);
  }

 private:
  at::Generator card_, host_;
  at::Tensor saved_;
};

inline void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  const auto device = device_of_call(op, c10::ArrayRef<c10::IValue>(*stack).slice(begin));
  Call call(device);
  std::optional<at::Generator> generator;
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_privateuseone()) {
      value = call.to_host(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> hosts;
      for (const at::Tensor& tensor : value.toTensorList()) {
        hosts.push_back(tensor.is_privateuseone() ? call.to_host(tensor) : tensor);
      }
      value = std::move(hosts);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> hosts;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        hosts.push_back(tensor && tensor->is_privateuseone() ? call.to_host(*tensor) : tensor);
      }
      value = std::move(hosts);
    } else if (value.isStorage() && value.toStorage().device_type() == kType) {
      value = call.host_storage(value.toStorage());
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      value = c10::Device(c10::DeviceType::CPU);
    } else if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().type() == kType, "Expected a 'gcu' device type for generator but found '",
                  value.toGenerator().device().type(), "'");
      generator = value.toGenerator();
      value = c10::IValue();
    }
  }
  {
    std::optional<RandomLoan> loan;
    if (op.hasTag(at::Tag::nondeterministic_seeded)) loan.emplace(generator ? *generator : default_generator(device));
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.update_arguments();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.to_card(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> cards;
      for (const at::Tensor& tensor : value.toTensorList()) cards.push_back(call.to_card(tensor));
      value = std::move(cards);
    }
  }
}

}  // namespace gcu
