// The device's identity: its type, its two indices, and which index and which stream are current in this thread.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

namespace sim {

constexpr c10::DeviceType kDeviceType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kNumDevices = 2;

c10::DeviceIndex current_device();
// Raises for an index that does not exist.
void set_device(c10::DeviceIndex index);
// Sets `index` and returns the index that was current before.
c10::DeviceIndex exchange_device(c10::DeviceIndex index);
// Gives a device without an index the current one.
c10::Device with_index(std::optional<c10::Device> device);

c10::Stream current_stream(c10::DeviceIndex index);
c10::Stream default_stream(c10::DeviceIndex index);
c10::Stream new_stream(c10::DeviceIndex index);
// Makes `stream` current on its device and returns the one that was.
c10::Stream exchange_stream(c10::Stream stream);

// Whether torch.accelerator says that the device is there. Its tensors work either way.
bool available();
void set_available(bool value);

}  // namespace sim
