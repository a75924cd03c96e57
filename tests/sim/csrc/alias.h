// CPU tensors over the memory of the device, and the other way round: kernels of the CPU work on the device's memory in
// place, so that nothing is copied but where the program copies.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace sim {

// Within this, calls of torch reach kernels at once: neither autograd nor autocast nor a mode of Python sees them. A
// queued copy may run in any thread, under whatever mode is active there.
class KernelsOnly {
  c10::impl::ExcludeDispatchKeyGuard guard_;

 public:
  KernelsOnly();
};

bool is_device(const at::Tensor& tensor);

// A CPU tensor with the memory and the geometry of `tensor`, also of a tensor of the host. `keep` lives as long as it
// does; else it holds nothing, and Python knows nothing about it.
at::Tensor cpu_view(const at::Tensor& tensor, std::shared_ptr<void> keep = nullptr);
// A device tensor that takes over the memory of a CPU tensor.
at::Tensor adopt(const at::Tensor& cpu, c10::DeviceIndex device);

// The aliases of one call of a kernel: tensors that share a storage share it on the CPU side as well, and a result that
// is an argument, or a view of one, becomes that argument, or a view of it, on the device.
class Aliases {
 public:
  explicit Aliases(c10::DeviceIndex device) : device_(device) {}

  at::Tensor to_cpu(const at::Tensor& tensor);
  // What the kernel returned, on the device.
  at::Tensor to_device(const at::Tensor& result);
  // Gives device tensors the size, and the memory, to which the kernel resized their aliases.
  void take_over_changes();

 private:
  c10::Storage cpu_storage(const c10::Storage& device_storage);

  c10::DeviceIndex device_;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // device, CPU
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // device, CPU
};

}  // namespace sim
