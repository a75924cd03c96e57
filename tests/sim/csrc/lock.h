// One lock for all state of the device. Whoever holds it must not need Python's lock: threads that hold Python's free
// tensors, and take this one for it.
#pragma once

#include <mutex>

namespace sim {

using Lock = std::lock_guard<std::recursive_mutex>;

inline std::recursive_mutex& mutex() {
  // Never destroyed: tensors are freed while the process ends.
  static auto* instance = new std::recursive_mutex;
  return *instance;
}

}  // namespace sim
