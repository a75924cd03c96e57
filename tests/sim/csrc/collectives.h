// The process group backend "simccl".
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace sim {

// A backend for tensors of the device that hands their memory to `inner`, a gloo backend.
c10::intrusive_ptr<c10d::Backend> make_backend(c10::intrusive_ptr<c10d::Backend> inner);

}  // namespace sim
