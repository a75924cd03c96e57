// What torch asks a device for: its hooks, and the guard that knows devices, streams and events.
#include "guard.h"

#include "counts.h"
#include "device.h"
#include "generator.h"
#include "memory.h"
#include "queue.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>

namespace sim {
namespace {

using Clock = std::chrono::steady_clock;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return available(); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return available() ? kNumDevices : 0; }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchange_device(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override { return new_generator(device); }
  at::Device getDeviceFromPtr(void* data) const override {
    auto block = device_block(data);
    TORCH_CHECK(block, "sim: the pointer is not memory of this device");
    return {kDeviceType, block->device};
  }
  bool isPinnedPtr(const void* data) const override { return pinned_block(data) != nullptr; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    resize_storage(storage, size);
  }
};

struct Event {
  Place place;
  Clock::time_point time;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDeviceType; }
  // The autograd engine starts a thread for each device that it is told of here, once in a process. So this does not
  // depend on whether the device is available at that moment.
  c10::DeviceIndex deviceCount() const noexcept override { return kNumDevices; }
  c10::Device getDevice() const override { return {kDeviceType, current_device()}; }
  void setDevice(c10::Device device) const override { set_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange_device(device.index()); }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kDeviceType, exchange_device(device.index())};
  }

  c10::Stream getStream(c10::Device device) const override { return current_stream(device.index()); }
  c10::Stream getDefaultStream(c10::Device device) const override { return default_stream(device.index()); }
  c10::Stream getNewStream(c10::Device device, int) const override { return new_stream(device.index()); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return new_stream(device.index()); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return exchange_stream(stream); }
  bool queryStream(const c10::Stream& stream) const override { return poll(end_of(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override {
    count("stream.synchronize");
    run_stream(stream);
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    count("device.synchronize");
    run_device(device < 0 ? current_device() : device);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    device_allocator()->recordStream(data, stream);
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    count("event.record");
    if (!*event) *event = new Event;
    *static_cast<Event*>(*event) = {end_of(stream), Clock::now()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    count("event.block");
    if (event) wait_in(stream, static_cast<Event*>(event)->place);
  }
  bool queryEvent(void* event) const override {
    count("event.query");
    return !event || poll(static_cast<Event*>(event)->place);
  }
  void synchronizeEvent(void* event) const override {
    count("event.synchronize");
    if (event) run_until(static_cast<Event*>(event)->place);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    std::chrono::duration<double, std::milli> elapsed =
        static_cast<Event*>(second)->time - static_cast<Event*>(first)->time;
    return elapsed.count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

void register_hooks() {
  static auto* hooks = new Hooks;
  at::RegisterPrivateUse1HooksInterface(hooks);
}

}  // namespace sim
