#include "counts.h"

#include "lock.h"

namespace sim {
namespace {

// These are there even when they are zero, so that a test may read them without a default.
const char* const kAlways[] = {
    "h2d.copies", "h2d.bytes", "h2d.pinned.bytes", "h2d.pageable.bytes", "d2h.copies", "d2h.bytes", "d2h.pinned.bytes",
    "d2h.pageable.bytes", "d2d.copies", "d2d.bytes", "late", "fallbacks"};

Counts zeros() {
  Counts result;
  for (auto name : kAlways) result[name] = 0;
  return result;
}

Counts& all() {
  static auto* instance = new Counts(zeros());
  return *instance;
}

}  // namespace

void count(const std::string& name, int64_t amount) {
  Lock lock(mutex());
  all()[name] += amount;
}

Counts counts() {
  Lock lock(mutex());
  return all();
}

void reset_counts() {
  Lock lock(mutex());
  all() = zeros();
}

}  // namespace sim
