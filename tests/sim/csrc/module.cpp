// What Python sees.
#include "collectives.h"
#include "counts.h"
#include "device.h"
#include "generator.h"
#include "guard.h"
#include "memory.h"
#include "queue.h"

#include <torch/csrc/utils/pybind.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  sim::register_hooks();
  // Without Python's lock: the device's lock is taken within.
  using Released = py::call_guard<py::gil_scoped_release>;

  module.def("set_late", &sim::set_late, Released(), "Let copies wait in their stream's queue, or run them at once.");
  module.def("late", &sim::late);
  module.def("synchronize", &sim::run_all, Released(), "Run the queues of all streams of both devices.");
  module.def("queued", [](int device) { return sim::queued(device); }, Released(), "Count the tasks that wait.");

  module.def("set_device", [](int device) { sim::set_device(device); });
  module.def("current_device", [] { return int(sim::current_device()); });
  module.def("device_count", [] { return sim::available() ? int(sim::kNumDevices) : 0; });
  module.def("available", &sim::available);
  module.def("set_available", &sim::set_available, "Say whether torch.accelerator finds the device.");

  module.def("allocated", [](int device) { return sim::memory_statistics(device).current; }, Released());
  module.def("peak", [](int device) { return sim::memory_statistics(device).peak; }, Released());
  module.def("reset_peak", [](int device) { sim::reset_peak(device); }, Released());

  module.def("counts", &sim::counts, Released(), "Return the counters by name.");
  module.def("reset_counts", &sim::reset_counts, Released());

  module.def("default_generator", [](int device) { return sim::default_generator(device); });
  sim::bind_collectives(module);
}
