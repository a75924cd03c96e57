#include "alias.h"

#include "device.h"
#include "memory.h"

#include <c10/core/CPUAllocator.h>

namespace sim {
namespace {

using Keep = std::shared_ptr<void>;

void drop(void* keep) { delete static_cast<Keep*>(keep); }

c10::Storage storage_over(const c10::Storage& storage, Keep keep = nullptr) {
  c10::DataPtr memory(storage.mutable_data(), new Keep(std::move(keep)), &drop, c10::Device(c10::kCPU));
  // Kernels resize what they write to; the memory that they take for it is adopted afterwards.
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true};
}

at::Tensor with_storage(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  auto result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  result._set_conj(tensor.is_conj());
  result._set_neg(tensor.is_neg());
  return result;
}

c10::Storage device_storage_of(const c10::Storage& cpu, c10::DeviceIndex device) {
  auto size = cpu.nbytes();
  return {c10::Storage::use_byte_size_t(), size, adopt_memory(cpu, device), device_allocator(), true};
}

c10::DispatchKeySet above_kernels() {
  using c10::DispatchKey;
  return c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset | c10::python_ks |
      c10::functorch_transforms_ks | c10::functorch_batched_ks |
      c10::DispatchKeySet({DispatchKey::PythonDispatcher, DispatchKey::PreDispatch, DispatchKey::Functionalize,
                           DispatchKey::Tracer, DispatchKey::VmapMode});
}

}  // namespace

KernelsOnly::KernelsOnly() : guard_(above_kernels()) {}

bool is_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDeviceType; }

at::Tensor cpu_view(const at::Tensor& tensor, Keep keep) {
  if (!tensor.defined()) return tensor;
  return with_storage(tensor, storage_over(tensor.storage(), std::move(keep)), c10::DispatchKey::CPU);
}

at::Tensor adopt(const at::Tensor& cpu, c10::DeviceIndex device) {
  if (!cpu.defined() || !cpu.is_cpu()) return cpu;
  return with_storage(cpu, device_storage_of(cpu.storage(), device), c10::DispatchKey::PrivateUse1);
}

c10::Storage Aliases::cpu_storage(const c10::Storage& device_storage) {
  for (auto& [device, cpu] : storages_) {
    if (device.unsafeGetStorageImpl() == device_storage.unsafeGetStorageImpl()) return cpu;
  }
  auto cpu = storage_over(device_storage);
  storages_.emplace_back(device_storage, cpu);
  return cpu;
}

at::Tensor Aliases::to_cpu(const at::Tensor& tensor) {
  if (!is_device(tensor)) return tensor;
  for (auto& [device, cpu] : tensors_) {
    if (device.is_same(tensor)) return cpu;
  }
  auto cpu = with_storage(tensor, cpu_storage(tensor.storage()), c10::DispatchKey::CPU);
  tensors_.emplace_back(tensor, cpu);
  return cpu;
}

at::Tensor Aliases::to_device(const at::Tensor& result) {
  if (!result.defined() || !result.is_cpu()) return result;
  TORCH_CHECK_NOT_IMPLEMENTED(
      result.layout() == c10::kStrided, "sim: a kernel returned a tensor of layout ", result.layout(),
      "; this device has strided tensors only");
  for (auto& [device, cpu] : tensors_) {
    if (cpu.is_same(result)) return device;
  }
  for (auto& [device, cpu] : storages_) {
    if (cpu.unsafeGetStorageImpl() == result.storage().unsafeGetStorageImpl()) {
      return with_storage(result, device, c10::DispatchKey::PrivateUse1);
    }
  }
  // Known from now on: two results may be views of one storage.
  storages_.emplace_back(device_storage_of(result.storage(), device_), result.storage());
  return with_storage(result, storages_.back().first, c10::DispatchKey::PrivateUse1);
}

void Aliases::take_over_changes() {
  for (auto& [device, cpu] : tensors_) {
    auto& from = cpu.storage();
    auto& to = device.storage();
    if (from.data() != to.data()) {
      auto size = from.nbytes();
      to.unsafeGetStorageImpl()->set_data_ptr_noswap(adopt_memory(from, device.device().index()));
      to.unsafeGetStorageImpl()->set_nbytes(size);
    }
    if (cpu.sizes() != device.sizes() || cpu.strides() != device.strides() ||
        cpu.storage_offset() != device.storage_offset()) {
      device.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }
}

}  // namespace sim
