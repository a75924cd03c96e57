// Every other operator: the CPU's kernel, on the device's memory.
#include "alias.h"
#include "counts.h"
#include "device.h"
#include "generator.h"
#include "queue.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <set>

namespace sim {
namespace {

using torch::jit::Stack;

// Operators that take CPU tensors beside the device's on CUDA as well.
const std::set<std::string> kMixed = {
    "aten::index",          "aten::index_put",       "aten::index_put_",
    "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put",
    "aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward"};

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : schema_(op.schema()), stack_(stack), begin_(stack->size() - schema_.arguments().size()) {
    for_each_tensor([this](const at::Tensor& tensor) { note_device(tensor); });
    for (size_t i = 0; device_ < 0 && i < size(); i++) {
      if (argument(i).isDevice()) device_ = with_index(argument(i).toDevice()).index();
    }
    if (device_ < 0) device_ = current_device();
    if (host_tensor_ && !kMixed.count(schema_.name())) {
      TORCH_CHECK(false, kTwoDevices, "sim:", int(device_), " and cpu! (when checking ", schema_.name(), ")");
    }
  }

  c10::DeviceIndex device() const { return device_; }

  void replace_arguments(Aliases& aliases) {
    // Generators first: how far one moves depends on a tensor.
    for (size_t i = 0; i < size(); i++) {
      if (is_generator(i)) argument(i) = generator(argument(i));
    }
    for (size_t i = 0; i < size(); i++) replace(argument(i), aliases);
  }

  // A kernel that refuses its arguments has drawn nothing.
  void give_generator_back() {
    if (moved_.first.defined()) moved_.first.unsafeGetGeneratorImpl()->set_state(*moved_.second);
  }

  void replace_results(Aliases& aliases) {
    aliases.take_over_changes();
    for (size_t i = stack_->size() - schema_.returns().size(); i < stack_->size(); i++) {
      auto& value = (*stack_)[i];
      if (value.isTensor()) {
        value = aliases.to_device(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> results;
        for (const at::Tensor& tensor : value.toTensorVector()) results.push_back(aliases.to_device(tensor));
        value = results;
      }
    }
  }

 private:
  static constexpr const char* kTwoDevices =
      "Expected all tensors to be on the same device, but found at least two devices, ";

  size_t size() const { return schema_.arguments().size(); }
  c10::IValue& argument(size_t i) { return (*stack_)[begin_ + i]; }

  bool is_generator(size_t i) const {
    auto type = schema_.arguments()[i].type();
    if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
    return type->kind() == c10::TypeKind::GeneratorType;
  }

  template <class Visit>
  void for_each_tensor(Visit visit) {
    for (size_t i = 0; i < size(); i++) {
      auto& value = argument(i);
      if (value.isTensor()) {
        visit(value.toTensor());
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) visit(tensor);
      } else if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
          if (tensor) visit(*tensor);
        }
      }
    }
  }

  void note_device(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    if (!is_device(tensor)) {
      // A CPU tensor without dimensions is a number, on CUDA as well.
      host_tensor_ |= tensor.is_cpu() && tensor.dim() > 0;
      return;
    }
    auto index = tensor.device().index();
    TORCH_CHECK(
        device_ < 0 || device_ == index, kTwoDevices, "sim:", int(device_), " and sim:", int(index),
        "! (when checking ", schema_.name(), ")");
    device_ = index;
  }

  at::Generator generator(const c10::IValue& given) {
    int64_t numel = -1;
    for_each_tensor([&](const at::Tensor& tensor) { numel = numel < 0 && tensor.defined() ? tensor.numel() : numel; });
    auto generator = given.isNone() ? default_generator(device_) : given.toGenerator();
    moved_ = {generator, generator.unsafeGetGeneratorImpl()->get_state()};
    return generator_for_kernel(generator, numel < 0 ? 1 : numel);
  }

  void replace(c10::IValue& value, Aliases& aliases) {
    if (value.isTensor()) {
      value = aliases.to_cpu(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(aliases.to_cpu(tensor));
      value = tensors;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        tensors.push_back(tensor ? std::make_optional(aliases.to_cpu(*tensor)) : std::nullopt);
      }
      value = tensors;
    } else if (value.isDevice() && value.toDevice().type() == kDeviceType) {
      value = c10::Device(c10::kCPU);
    }
  }

  const c10::FunctionSchema& schema_;
  Stack* stack_;
  size_t begin_;
  c10::DeviceIndex device_ = -1;
  bool host_tensor_ = false;
  // The generator that the kernel draws from, and its state before.
  std::pair<at::Generator, c10::intrusive_ptr<c10::TensorImpl>> moved_;
};

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  count("fallbacks");
  count(op.schema().name());
  Call call(op, stack);
  run_current_stream(call.device());
  c10::DeviceGuard device_guard(c10::Device(kDeviceType, call.device()));
  Aliases aliases(call.device());
  call.replace_arguments(aliases);
  try {
    KernelsOnly guard;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  } catch (...) {
    call.give_generator_back();
    throw;
  }
  call.replace_results(aliases);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// These have a composite kernel, which would be taken before the fallback. It rounds differently from the CPU's (norms)
// or resizes its own output with a warning (losses).
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  for (auto name : {"native_layer_norm", "native_group_norm", "mse_loss", "smooth_l1_loss"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

}  // namespace
}  // namespace sim
