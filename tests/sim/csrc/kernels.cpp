// The kernels that must be the device's own: what makes memory, views it, resizes it and reads from it.
#include "alias.h"
#include "counts.h"
#include "device.h"
#include "memory.h"
#include "queue.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/_local_scalar_dense_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace sim {
namespace {

using c10::IntArrayRef;

void check_not_pinned(std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
}

at::Tensor empty(
    IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device> device,
    std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  check_not_pinned(pin_memory);
  c10::DeviceGuard guard(with_index(device));
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, device_allocator(), keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool> pin_memory) {
  check_not_pinned(pin_memory);
  c10::DeviceGuard guard(with_index(device));
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, device_allocator(), keys, c10::dtype_or_default(dtype));
}

void grow(const c10::Storage& storage, size_t size) {
  if (size > storage.nbytes()) resize_storage(storage, size);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  auto* tensor = self.unsafeGetTensorImpl();
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  if (self.sizes() == size && !format) return self;
  auto offset = static_cast<size_t>(tensor->storage_offset());
  grow(tensor->storage(), at::detail::computeStorageNbytesContiguous(size, tensor->dtype().itemsize(), offset));
  tensor->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) tensor->empty_tensor_restride(*format);
  return self;
}

at::Tensor& set_with_geometry(
    at::Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  at::native::checkSetStorage(self, storage, offset, size, stride);
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_offset(offset);
  auto itemsize = tensor->dtype().itemsize();
  if (stride.data() == nullptr) {
    grow(storage, at::detail::computeStorageNbytesContiguous(size, itemsize, offset));
    tensor->set_sizes_contiguous(size);
  } else {
    grow(storage, at::detail::computeStorageNbytes(size, stride, itemsize, offset));
    tensor->set_sizes_and_strides(size, stride);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  auto numel = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_with_geometry(self, std::move(storage), 0, {numel}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  if (self.is_same(source)) return self;
  return set_with_geometry(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  auto memory = allocate_on(self.device().index(), 0);
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, std::move(memory), device_allocator(), true);
  return set_with_geometry(self, std::move(storage), 0, {0}, {});
}

at::Scalar read_one(const at::Tensor& self) {
  count("aten::_local_scalar_dense");
  run_current_stream(self.device().index());
  return at::cpu::_local_scalar_dense(cpu_view(self));
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  count("aten::record_stream");
  device_allocator()->recordStream(self.storage().data_ptr(), stream);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::cpu::as_strided);
  library.impl("view", at::cpu::view);
  library.impl("_reshape_alias", at::cpu::_reshape_alias);
  library.impl("unfold", at::cpu::unfold);
  library.impl("resize_", resize_);
  library.impl("set_", set_nothing);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_with_geometry);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("_local_scalar_dense", read_one);
  library.impl("record_stream", record_stream);
}

}  // namespace
}  // namespace sim
