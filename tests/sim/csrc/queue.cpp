#include "queue.h"

#include "device.h"
#include "lock.h"

#include <algorithm>
#include <deque>
#include <list>
#include <map>
#include <utility>

namespace sim {
namespace {

// So many answers "not yet" does a place give before its stream makes a step: a loop that polls must end, and a program
// that asks a few times must not be helped.
constexpr uint64_t kPatience = 64;

struct Queue {
  std::deque<Task> tasks;
  uint64_t done = 0;
  uint64_t refusals = 0;
};

struct Pending {
  std::vector<Place> places;
  Task action;
};

using Queues = std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Queue>;

bool is_late = false;
// Never destroyed: tensors are freed while the process ends.
Queues& queues = *new Queues;
std::list<Pending>& pending = *new std::list<Pending>;

Queue& queue_of(const Place& place) { return queues[{place.device, place.stream}]; }
Place start_of(const c10::Stream& stream) { return {stream.device_index(), stream.id(), 0}; }

void run_pending() {
  std::vector<Task> ready;
  for (auto it = pending.begin(); it != pending.end();) {
    if (std::all_of(it->places.begin(), it->places.end(), reached)) {
      ready.push_back(std::move(it->action));
      it = pending.erase(it);
    } else {
      ++it;
    }
  }
  for (auto& action : ready) action();
}

void run_one(Queue& queue) {
  // Off the queue first: a task that raises has had its turn.
  auto task = std::move(queue.tasks.front());
  queue.tasks.pop_front();
  queue.done++;
  queue.refusals = 0;
  task();
  run_pending();
}

}  // namespace

bool late() { return is_late; }

void set_late(bool value) {
  Lock lock(mutex());
  run_all();
  is_late = value;
}

void submit(const c10::Stream& stream, Task task) {
  Lock lock(mutex());
  queue_of(start_of(stream)).tasks.push_back(std::move(task));
}

void wait_in(const c10::Stream& stream, Place place) {
  Lock lock(mutex());
  bool own = place.device == stream.device_index() && place.stream == stream.id();
  if (!own && !reached(place)) submit(stream, [place] { run_until(place); });
}

Place end_of(const c10::Stream& stream) {
  Lock lock(mutex());
  auto place = start_of(stream);
  auto& queue = queue_of(place);
  place.number = queue.done + queue.tasks.size();
  return place;
}

bool reached(const Place& place) {
  Lock lock(mutex());
  return queue_of(place).done >= place.number;
}

bool poll(const Place& place) {
  Lock lock(mutex());
  if (reached(place)) return true;
  auto& queue = queue_of(place);
  if (++queue.refusals >= kPatience) run_one(queue);
  return false;
}

void when_reached(std::vector<Place> places, Task action) {
  Lock lock(mutex());
  pending.push_back({std::move(places), std::move(action)});
  run_pending();
}

void run_until(const Place& place) {
  Lock lock(mutex());
  auto& queue = queue_of(place);
  // A task may run other streams, and those in turn an earlier part of this one, which has run by then.
  while (queue.done < place.number && !queue.tasks.empty()) run_one(queue);
}

void run_stream(const c10::Stream& stream) { run_until(end_of(stream)); }

void run_current_stream(c10::DeviceIndex device) { run_stream(current_stream(device)); }

void run_device(c10::DeviceIndex device) {
  Lock lock(mutex());
  for (auto& [key, queue] : queues) {
    if (key.first == device) run_until({key.first, key.second, queue.done + queue.tasks.size()});
  }
}

void run_all() {
  for (c10::DeviceIndex device = 0; device < kNumDevices; device++) run_device(device);
}

uint64_t queued(c10::DeviceIndex device) {
  Lock lock(mutex());
  uint64_t total = 0;
  for (auto& [key, queue] : queues) total += key.first == device ? queue.tasks.size() : 0;
  return total;
}

bool idle() {
  Lock lock(mutex());
  return std::all_of(queues.begin(), queues.end(), [](auto& entry) { return entry.second.tasks.empty(); });
}

}  // namespace sim
