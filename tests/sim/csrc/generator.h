// The random generators of the device.
#pragma once

#include <ATen/core/Generator.h>

namespace sim {

at::Generator& default_generator(c10::DeviceIndex device);
at::Generator new_generator(c10::DeviceIndex device);
// The CPU generator for one kernel that draws `numel` numbers; it moves `generator`, one of the device's, on.
at::Generator generator_for_kernel(const at::Generator& generator, int64_t numel);

}  // namespace sim
