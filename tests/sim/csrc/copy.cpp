// Copies: between host and device, within a device and between two.
#include "alias.h"
#include "counts.h"
#include "device.h"
#include "memory.h"
#include "queue.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace sim {
namespace {

const char* const kUsedAfterFree =
    "sim: a copy that waited in a queue uses device memory that was freed before the copy ran. Keep the tensor until "
    "the copy has run, or call tensor.record_stream(stream).";

c10::DeviceIndex index_of(const at::Tensor& tensor) { return tensor.device().index(); }

void count_copy(const std::string& kind, int64_t bytes) {
  count(kind + ".copies");
  count(kind + ".bytes", bytes);
}

void copy_memory(const at::Tensor& source, const at::Tensor& target) {
  KernelsOnly guard;
  target.copy_(source);
}

// Queues the copy. The task keeps blocks, not tensors: it may run in a thread that does not hold Python's lock.
void copy_late(const at::Tensor& source, const at::Tensor& target, const c10::Stream& stream) {
  count("late");
  auto blocks = std::make_shared<std::vector<BlockPtr>>();
  for (auto& tensor : {source, target}) {
    auto memory = tensor.storage().data();
    if (auto block = is_device(tensor) ? device_block(memory) : pinned_block(memory)) blocks->push_back(block);
  }
  submit(stream, [blocks, source = cpu_view(source), target = cpu_view(target)] {
    for (auto& block : *blocks) TORCH_CHECK(!block->given_back, kUsedAfterFree);
    copy_memory(source, target);
  });
}

void copy_now(const at::Tensor& source, const at::Tensor& target, c10::DeviceIndex device) {
  run_current_stream(device);
  copy_memory(cpu_view(source), cpu_view(target));
}

void copy_within_devices(const at::Tensor& source, const at::Tensor& target) {
  count_copy("d2d", target.nbytes());
  auto from = current_stream(index_of(source));
  auto to = current_stream(index_of(target));
  if (!late()) {
    run_stream(to);
    copy_now(source, target, index_of(source));
    return;
  }
  // Between two devices the copy runs in the source's stream, and the target's stream waits for it, as on CUDA.
  wait_in(from, end_of(to));
  copy_late(source, target, from);
  wait_in(to, end_of(from));
}

// Torch converts types on the device where the copy does not block, and on the host where it does, which decides how
// many bytes cross (aten/src/ATen/native/cuda/Copy.cu).
void copy_across(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  bool to_device = is_device(target);
  auto& host = to_device ? source : target;
  auto device = index_of(to_device ? target : source);
  auto itemsize = (to_device == non_blocking ? source : target).element_size();
  auto bytes = static_cast<int64_t>(target.numel() * itemsize);
  bool pinned = pinned_block(host.storage().data()) != nullptr;
  std::string kind = to_device ? "h2d" : "d2h";
  count_copy(kind, bytes);
  count(kind + (pinned ? ".pinned.bytes" : ".pageable.bytes"), bytes);
  // A host tensor that is not contiguous goes through a contiguous one, which is not pinned.
  if (late() && non_blocking && pinned && host.is_contiguous()) {
    copy_late(source, target, current_stream(device));
  } else {
    copy_now(source, target, device);
  }
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  if (target.numel() == 0) return target;
  auto from = source._is_zerotensor() ? at::zeros(source.sizes(), source.options()) : source;
  if (from.sizes() != target.sizes()) from = from.expand(target.sizes());
  if (is_device(from) && is_device(target)) {
    copy_within_devices(from, target);
  } else {
    copy_across(from, target, non_blocking);
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
}

// A copy resolves lazy conjugation and negation itself. Torch's own way is a copy first, which would not end.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace sim
