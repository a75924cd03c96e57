#include "memory.h"

#include "device.h"
#include "lock.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>

namespace sim {
namespace {

// NaN in every floating point type and -1 in every integer type.
constexpr int kRubbish = 0xFF;
constexpr size_t kAlignment = 64;
constexpr size_t kTotalBytes = size_t(8) << 30;

using Blocks = std::map<const char*, BlockPtr>;

// Never destroyed: tensors are freed while the process ends.
Blocks& device_blocks() {
  static auto* instance = new Blocks;
  return *instance;
}

Blocks& pinned_blocks() {
  static auto* instance = new Blocks;
  return *instance;
}

c10::CachingAllocator::Stat& statistics_of(c10::DeviceIndex device) {
  static auto* instance = new std::array<c10::CachingAllocator::Stat, kNumDevices>;
  return instance->at(device);
}

BlockPtr find(const Blocks& blocks, const void* pointer) {
  Lock lock(mutex());
  auto address = static_cast<const char*>(pointer);
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return nullptr;
  auto block = std::prev(next)->second;
  return address < static_cast<const char*>(block->data) + block->size ? block : nullptr;
}

BlockPtr take(Blocks& blocks, const void* data) {
  auto found = blocks.find(static_cast<const char*>(data));
  if (found == blocks.end()) return nullptr;
  auto block = std::move(found->second);
  blocks.erase(found);
  return block;
}

BlockPtr new_block(size_t size) {
  auto block = std::make_shared<Block>();
  block->size = size;
  TORCH_CHECK(posix_memalign(&block->data, kAlignment, size) == 0, "sim: out of memory (", size, " bytes)");
  return block;
}

void give_back(const BlockPtr& block) {
  block->given_back = true;
  std::memset(block->data, kRubbish, block->size);
}

// A block that is freed while copies wait. The next allocation on its stream may get it, as CUDA's caching allocator
// does it: what that stream is told to do from then on writes to the block, and what other streams still do to it is a
// race, unless `Tensor.record_stream` named them before.
struct Freed {
  BlockPtr block;
  std::vector<Place> places;
};

std::list<Freed>& freed_blocks() {
  static auto* instance = new std::list<Freed>;
  return *instance;
}

void reuse_freed(const c10::Stream& stream) {
  auto& freed = freed_blocks();
  bool all = idle();
  for (auto it = freed.begin(); it != freed.end();) {
    bool own = it->block->device == stream.device_index() && it->block->stream == stream.id();
    if (!own && !all) {
      ++it;
      continue;
    }
    auto [block, places] = std::move(*it);
    it = freed.erase(it);
    if (own) places.push_back(end_of(stream));
    when_reached(std::move(places), [block = block] { give_back(block); });
  }
}

void free_device(void* data) {
  Lock lock(mutex());
  auto block = take(device_blocks(), data);
  if (!block) return;
  statistics_of(block->device).decrease(block->size);
  if (idle()) return give_back(block);
  Freed freed{block, {}};
  for (auto& stream : block->other_streams) freed.places.push_back(end_of(stream));
  freed_blocks().push_back(std::move(freed));
}

void free_pinned(void* data) {
  Lock lock(mutex());
  // Copies that are still queued hold the block, as CUDA's host allocator does by events.
  take(pinned_blocks(), data);
}

c10::DataPtr register_on_device(BlockPtr block, c10::DeviceIndex device) {
  Lock lock(mutex());
  auto stream = current_stream(device);
  reuse_freed(stream);
  block->device = device;
  block->stream = stream.id();
  statistics_of(device).increase(block->size);
  auto data = block->data;
  device_blocks()[static_cast<const char*>(data)] = std::move(block);
  return {data, data, &free_device, c10::Device(kDeviceType, device)};
}

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override { return allocate_on(current_device(), size); }
  c10::DeleterFnPtr raw_deleter() const override { return &free_device; }
  void copy_data(void* target, const void* source, size_t size) const override {
    auto block = device_block(target);
    run_current_stream(block ? block->device : current_device());
    std::memcpy(target, source, size);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override {
    Lock lock(mutex());
    if (auto block = device_block(pointer.get())) block->other_streams.push_back(stream);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats result;
    // Nothing is cached, so what is reserved is what is allocated.
    auto aggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    result.allocated_bytes[aggregate] = result.reserved_bytes[aggregate] = result.active_bytes[aggregate] =
        memory_statistics(device);
    return result;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    Lock lock(mutex());
    statistics_of(device).reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex device) override { reset_peak(device); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {kTotalBytes - memory_statistics(device).current, kTotalBytes};
  }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, c10::Device(c10::kCPU)};
    Lock lock(mutex());
    auto block = new_block(size);
    auto data = block->data;
    pinned_blocks()[static_cast<const char*>(data)] = std::move(block);
    return {data, data, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};

DeviceAllocator the_device_allocator;
PinnedAllocator the_pinned_allocator;
REGISTER_ALLOCATOR(kDeviceType, &the_device_allocator)

}  // namespace

Block::~Block() {
  if (!owner) std::free(data);
}

c10::DeviceAllocator* device_allocator() { return &the_device_allocator; }
c10::Allocator* pinned_allocator() { return &the_pinned_allocator; }

c10::DataPtr allocate_on(c10::DeviceIndex device, size_t size) {
  if (size == 0) return {nullptr, c10::Device(kDeviceType, device)};
  auto block = new_block(size);
  std::memset(block->data, kRubbish, size);
  return register_on_device(std::move(block), device);
}

c10::DataPtr adopt_memory(c10::Storage cpu_storage, c10::DeviceIndex device) {
  if (cpu_storage.nbytes() == 0) return {nullptr, c10::Device(kDeviceType, device)};
  auto block = std::make_shared<Block>();
  block->data = cpu_storage.mutable_data();
  block->size = cpu_storage.nbytes();
  block->owner = std::move(cpu_storage);
  return register_on_device(std::move(block), device);
}

BlockPtr device_block(const void* pointer) { return find(device_blocks(), pointer); }
BlockPtr pinned_block(const void* pointer) { return find(pinned_blocks(), pointer); }

void resize_storage(const c10::Storage& storage, size_t size) {
  auto device = storage.device().index();
  run_current_stream(device);
  auto fresh = allocate_on(device, size);
  auto kept = std::min(size, storage.nbytes());
  if (kept) std::memcpy(fresh.get(), storage.data(), kept);
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(size);
}

c10::CachingAllocator::Stat memory_statistics(c10::DeviceIndex device) {
  Lock lock(mutex());
  return statistics_of(device);
}

void reset_peak(c10::DeviceIndex device) {
  Lock lock(mutex());
  statistics_of(device).reset_peak();
}

}  // namespace sim
