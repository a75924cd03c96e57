#pragma once

namespace sim {

// Makes torch ask this device about generators, pinned memory and the rest. The guard registers itself.
void register_hooks();

}  // namespace sim
