// The memory of the device and pinned memory of the host: ordinary memory of the process, in blocks that are known.
#pragma once

#include "queue.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <memory>
#include <vector>

namespace sim {

// Memory of the device or pinned memory. Whoever holds a block keeps its memory mapped, not its contents: as on a real
// device, the next allocation on its stream may use a freed block again. Here it is filled with rubbish then, and a copy
// that comes later and uses it is an error.
struct Block {
  void* data = nullptr;
  size_t size = 0;
  // Where and on which stream it was allocated; pinned memory has neither.
  c10::DeviceIndex device = -1;
  c10::StreamId stream = 0;
  // Other streams that `Tensor.record_stream` named.
  std::vector<c10::Stream> other_streams;
  // What owns the memory, where this block does not.
  c10::Storage owner;
  bool given_back = false;

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();
};

using BlockPtr = std::shared_ptr<Block>;

// The allocator of the current device.
c10::DeviceAllocator* device_allocator();
c10::Allocator* pinned_allocator();

// Memory of `device`, which need not be the current one.
c10::DataPtr allocate_on(c10::DeviceIndex device, size_t size);
// Makes the memory of a CPU storage a block of the device, without a copy.
c10::DataPtr adopt_memory(c10::Storage cpu_storage, c10::DeviceIndex device);
// The block of the device or of pinned memory that a pointer lies in; null where there is none.
BlockPtr device_block(const void* pointer);
BlockPtr pinned_block(const void* pointer);
// Gives a storage of the device new memory of `size` bytes with the old contents, as far as they fit.
void resize_storage(const c10::Storage& storage, size_t size);

c10::CachingAllocator::Stat memory_statistics(c10::DeviceIndex device);
void reset_peak(c10::DeviceIndex device);

}  // namespace sim
