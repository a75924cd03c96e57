#include "work.h"

#include "alias.h"

#include <ATen/core/ivalue_inl.h>

#include <algorithm>

namespace sim {

Work::Work(c10::intrusive_ptr<c10d::Work> inner, Tensors results, std::function<void()> finish)
    : inner_(std::move(inner)), results_(std::move(results)), finish_(std::move(finish)) {}

void Work::finish() {
  std::call_once(finished_, [this] {
    if (finish_) finish_();
  });
}

bool Work::isCompleted() { return inner_->isCompleted(); }
bool Work::isSuccess() const { return inner_->isSuccess(); }
std::exception_ptr Work::exception() const { return inner_->exception(); }
int Work::sourceRank() const { return inner_->sourceRank(); }
Tensors Work::result() { return results_; }
void Work::synchronize() { wait(kNoTimeout); }
void Work::abort() { inner_->abort(); }

bool Work::wait(std::chrono::milliseconds timeout) {
  bool done = inner_->wait(timeout);
  finish();
  return done;
}

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
  std::vector<c10::Device> devices;
  for (auto& tensor : results_) {
    if (is_device(tensor) && std::find(devices.begin(), devices.end(), tensor.device()) == devices.end()) {
      devices.push_back(tensor.device());
    }
  }
  auto type = c10::ListType::create(c10::TensorType::get());
  auto future = c10::make_intrusive<c10::ivalue::Future>(type, devices);
  auto self = c10::intrusive_ptr<Work>::reclaim_copy(this);
  inner_->getFuture()->addCallback([self, future](c10::ivalue::Future& inner) {
    if (inner.hasError()) {
      future->setError(inner.exception_ptr());
      return;
    }
    self->finish();
    future->markCompleted(c10::IValue(self->results_));
  });
  return future;
}

CoalescedWork::CoalescedWork(std::vector<c10::intrusive_ptr<c10d::Work>> parts) : parts_(std::move(parts)) {}

bool CoalescedWork::isCompleted() {
  return std::all_of(parts_.begin(), parts_.end(), [](auto& part) { return part->isCompleted(); });
}

Tensors CoalescedWork::result() {
  Tensors results;
  for (auto& part : parts_) {
    for (auto& tensor : part->result()) results.push_back(tensor);
  }
  return results;
}

void CoalescedWork::synchronize() { wait(kNoTimeout); }

bool CoalescedWork::wait(std::chrono::milliseconds timeout) {
  bool done = true;
  for (auto& part : parts_) done = part->wait(timeout) && done;
  return done;
}

}  // namespace sim
