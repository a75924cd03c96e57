// Collectives in flight.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <functional>
#include <mutex>
#include <vector>

namespace sim {

using Tensors = std::vector<at::Tensor>;

// Gloo's work on CPU tensors, seen as work on the device's tensors.
class Work final : public c10d::Work {
 public:
  // `finish` is called once, when gloo is done and before anybody sees a result; `results` are what torch gets.
  Work(c10::intrusive_ptr<c10d::Work> inner, Tensors results, std::function<void()> finish);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  int sourceRank() const override;
  Tensors result() override;
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout) override;
  void abort() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  void finish();

  c10::intrusive_ptr<c10d::Work> inner_;
  Tensors results_;
  std::function<void()> finish_;
  std::once_flag finished_;
};

// Several collectives that are waited for as one.
class CoalescedWork final : public c10d::Work {
 public:
  explicit CoalescedWork(std::vector<c10::intrusive_ptr<c10d::Work>> parts);

  bool isCompleted() override;
  Tensors result() override;
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout) override;

 private:
  std::vector<c10::intrusive_ptr<c10d::Work>> parts_;
};

}  // namespace sim
