// The process group backend "simccl": gloo on the device's memory.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace sim {

void bind_collectives(pybind11::module& module);

}  // namespace sim
