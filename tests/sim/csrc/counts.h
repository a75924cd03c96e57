// Counters by name: copies and bytes by kind, kernels, events.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace sim {

using Counts = std::map<std::string, int64_t>;

void count(const std::string& name, int64_t amount = 1);
Counts counts();
void reset_counts();

}  // namespace sim
