#include "device.h"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>

namespace sim {
namespace {

thread_local c10::DeviceIndex current_index = 0;
thread_local std::array<c10::StreamId, kNumDevices> current_streams{};
std::atomic<c10::StreamId> last_stream{0};
std::atomic<bool> is_available{true};

void check_index(c10::DeviceIndex index) {
  TORCH_CHECK(
      index >= 0 && index < kNumDevices, "sim: device index ", int(index), " does not exist; there are ",
      int(kNumDevices), " devices.");
}

}  // namespace

c10::DeviceIndex current_device() { return current_index; }

void set_device(c10::DeviceIndex index) {
  check_index(index);
  current_index = index;
}

c10::DeviceIndex exchange_device(c10::DeviceIndex index) {
  auto before = current_index;
  // Guards pass a negative index for "leave it as it is".
  if (index >= 0) set_device(index);
  return before;
}

c10::Device with_index(std::optional<c10::Device> device) {
  if (!device || !device->has_index()) return {kDeviceType, current_index};
  check_index(device->index());
  return *device;
}

c10::Stream default_stream(c10::DeviceIndex index) {
  return c10::Stream(c10::Stream::DEFAULT, c10::Device(kDeviceType, index < 0 ? current_index : index));
}

c10::Stream current_stream(c10::DeviceIndex index) {
  if (index < 0) index = current_index;
  check_index(index);
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDeviceType, index), current_streams[index]);
}

c10::Stream new_stream(c10::DeviceIndex index) {
  if (index < 0) index = current_index;
  check_index(index);
  // Numbers are not used again, so that a stream nobody holds any more keeps the queue that it has.
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDeviceType, index), ++last_stream);
}

c10::Stream exchange_stream(c10::Stream stream) {
  auto before = current_stream(stream.device_index());
  current_streams[stream.device_index()] = stream.id();
  return before;
}

bool available() { return is_available; }
void set_available(bool value) { is_available = value; }

}  // namespace sim
