// A queue per stream. Copies wait in it until something that torch promises to wait for them runs them: a kernel of the
// same stream, a synchronization, or another stream that waits for an event. Nothing else runs them, so that a missing
// event or synchronization gives wrong bytes every time.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace sim {

using Task = std::function<void()>;

// A place in a stream's queue: reached when the first `number` tasks of that stream have run.
struct Place {
  c10::DeviceIndex device = 0;
  c10::StreamId stream = 0;
  uint64_t number = 0;
};

// Whether copies wait in their queue. Turning it off runs all queues.
bool late();
void set_late(bool value);

void submit(const c10::Stream& stream, Task task);
// Lets `stream` run nothing that is submitted from now on before `place` is reached.
void wait_in(const c10::Stream& stream, Place place);
// The place behind all that is in the queue now.
Place end_of(const c10::Stream& stream);
bool reached(const Place& place);
// `reached`, for programs that poll: asked often enough in vain, it lets the stream make one step after its answer.
bool poll(const Place& place);
// Runs `action` as soon as all places are reached, whoever runs their queues.
void when_reached(std::vector<Place> places, Task action);

void run_until(const Place& place);
void run_stream(const c10::Stream& stream);
void run_current_stream(c10::DeviceIndex device);
void run_device(c10::DeviceIndex device);
void run_all();
// How many tasks wait on a device.
uint64_t queued(c10::DeviceIndex device);
// Whether no task waits anywhere.
bool idle();

}  // namespace sim
