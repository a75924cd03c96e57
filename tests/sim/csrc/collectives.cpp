#include "collectives.h"

#include "alias.h"
#include "counts.h"
#include "queue.h"
#include "work.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include <optional>
#include <utility>

namespace sim {
namespace {

using TensorLists = std::vector<Tensors>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

// Gloo may still work on memory whose tensor is gone, so its tensors keep the device's storages.
at::Tensor view(const at::Tensor& tensor) {
  if (!is_device(tensor)) return tensor;
  return cpu_view(tensor, std::make_shared<c10::Storage>(tensor.storage()));
}

Tensors view(const Tensors& tensors) {
  Tensors result;
  for (auto& tensor : tensors) result.push_back(view(tensor));
  return result;
}

TensorLists view(const TensorLists& lists) {
  TensorLists result;
  for (auto& tensors : lists) result.push_back(view(tensors));
  return result;
}

Tensors flat(const TensorLists& lists) {
  Tensors result;
  for (auto& tensors : lists) result.insert(result.end(), tensors.begin(), tensors.end());
  return result;
}

class Backend final : public c10d::Backend {
 public:
  explicit Backend(BackendPtr inner) : c10d::Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)) {}

  const std::string getBackendName() const override { return "simccl"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return inner_->getBackendOptions(); }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }
  bool supportsSplitting() const override { return inner_->supportsSplitting(); }
  BackendPtr split(
      const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
      const c10::intrusive_ptr<Options>& options) override {
    // The group's backend for the CPU is split with the same store.
    auto own_store = c10::make_intrusive<c10d::PrefixStore>("simccl", store);
    auto part = inner_->split(own_store, ranks, options);
    if (!part) return nullptr;
    return c10::make_intrusive<Backend>(std::move(part));
  }
  // Between these two each collective starts at once; the end gives one work for all.
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override { coalesced_.emplace(); }
  WorkPtr endCoalescing() override {
    auto parts = std::exchange(coalesced_, std::nullopt);
    return c10::make_intrusive<CoalescedWork>(std::move(parts).value());
  }
  void abort() override { inner_->abort(); }
  void shutdown() override { inner_->shutdown(); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    start("broadcast", tensors);
    auto cpu = view(tensors);
    return work(inner_->broadcast(cpu, options), tensors);
  }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    start("allreduce", tensors);
    auto cpu = view(tensors);
    auto [summed, finish] = without_average(options, cpu);
    return work(inner_->allreduce(cpu, summed), tensors, finish);
  }

  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    start("allreduce_coalesced", tensors);
    auto cpu = view(tensors);
    auto [summed, finish] = without_average(options, cpu);
    return work(inner_->allreduce_coalesced(cpu, summed), tensors, finish);
  }

  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    start("reduce", tensors);
    auto cpu = view(tensors);
    auto [summed, finish] = without_average(options, getRank() == options.rootRank ? cpu : Tensors());
    return work(inner_->reduce(cpu, summed), tensors, finish);
  }

  WorkPtr allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    start("allgather", inputs);
    auto cpu_outputs = view(outputs);
    auto cpu_inputs = view(inputs);
    return work(inner_->allgather(cpu_outputs, cpu_inputs, options), flat(outputs));
  }

  WorkPtr allgather_coalesced(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    start("allgather_coalesced", inputs);
    auto cpu_outputs = view(outputs);
    auto cpu_inputs = view(inputs);
    return work(inner_->allgather_coalesced(cpu_outputs, cpu_inputs, options), flat(outputs));
  }

  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    start("_allgather_base", {input});
    auto cpu_output = view(output);
    auto cpu_input = view(input);
    return work(inner_->_allgather_base(cpu_output, cpu_input, options), {output});
  }

  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    start("allgather_into_tensor_coalesced", inputs);
    auto cpu_outputs = view(outputs);
    auto cpu_inputs = view(inputs);
    return work(inner_->allgather_into_tensor_coalesced(cpu_outputs, cpu_inputs, options), outputs);
  }

  WorkPtr gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    start("gather", inputs);
    auto cpu_outputs = view(outputs);
    auto cpu_inputs = view(inputs);
    return work(inner_->gather(cpu_outputs, cpu_inputs, options), flat(outputs));
  }

  WorkPtr scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override {
    start("scatter", outputs);
    auto cpu_outputs = view(outputs);
    auto cpu_inputs = view(inputs);
    return work(inner_->scatter(cpu_outputs, cpu_inputs, options), outputs);
  }

  WorkPtr reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override {
    start("reduce_scatter", outputs);
    auto cpu_outputs = view(outputs);
    auto cpu_inputs = view(inputs);
    auto [summed, finish] = without_average(options, cpu_outputs);
    return work(inner_->reduce_scatter(cpu_outputs, cpu_inputs, summed), outputs, finish);
  }

  WorkPtr _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    start("_reduce_scatter_base", {input});
    auto cpu_output = view(output);
    auto cpu_input = view(input);
    auto [summed, finish] = without_average(options, {cpu_output});
    return work(inner_->_reduce_scatter_base(cpu_output, cpu_input, summed), {output}, finish);
  }

  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    start("reduce_scatter_tensor_coalesced", inputs);
    auto cpu_outputs = view(outputs);
    auto cpu_inputs = view(inputs);
    auto [summed, finish] = without_average(options, cpu_outputs);
    return work(inner_->reduce_scatter_tensor_coalesced(cpu_outputs, cpu_inputs, summed), outputs, finish);
  }

  WorkPtr alltoall_base(
      at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes, std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& options) override {
    start("alltoall_base", {input});
    auto cpu_output = view(output);
    auto cpu_input = view(input);
    return work(inner_->alltoall_base(cpu_output, cpu_input, output_sizes, input_sizes, options), {output});
  }

  WorkPtr send(Tensors& tensors, int target, int tag) override {
    start("send", tensors);
    auto cpu = view(tensors);
    return work(inner_->send(cpu, target, tag), tensors);
  }

  WorkPtr recv(Tensors& tensors, int source, int tag) override {
    start("recv", tensors);
    auto cpu = view(tensors);
    return work(inner_->recv(cpu, source, tag), tensors);
  }

  WorkPtr recvAnysource(Tensors& tensors, int tag) override {
    start("recv", tensors);
    auto cpu = view(tensors);
    return work(inner_->recvAnysource(cpu, tag), tensors);
  }

  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    start("barrier", {});
    // The options may name a device, which gloo does not know.
    c10d::BarrierOptions inner_options;
    inner_options.timeout = options.timeout;
    return work(inner_->barrier(inner_options), {});
  }

 private:
  // Collectives are kernels: what is queued before them has run.
  void start(const std::string& name, const Tensors& tensors) {
    count("simccl." + name);
    for (auto& tensor : tensors) {
      if (is_device(tensor)) return run_current_stream(tensor.device().index());
    }
    run_current_stream(-1);
  }

  WorkPtr work(WorkPtr inner, Tensors results, std::function<void()> finish = nullptr) {
    auto result = c10::make_intrusive<Work>(std::move(inner), std::move(results), std::move(finish));
    if (coalesced_) coalesced_->push_back(result);
    return result;
  }

  // Gloo has no average: options that sum, and what divides the sums in `outputs` afterwards.
  template <class OptionsOfOne>
  std::pair<OptionsOfOne, std::function<void()>> without_average(OptionsOfOne options, Tensors outputs) {
    if (options.reduceOp != c10d::ReduceOp::AVG) return {options, nullptr};
    options.reduceOp = c10d::ReduceOp::SUM;
    return {options, [outputs = std::move(outputs), size = getSize()] {
              KernelsOnly guard;
              for (auto& output : outputs) output.div_(size);
            }};
  }

  BackendPtr inner_;
  std::optional<std::vector<WorkPtr>> coalesced_;
};

// torch.distributed.split_group copies a backend's options before it uses them. Gloo's cannot be copied in Python.
struct CopiedOptions {
  c10::intrusive_ptr<c10d::Backend::Options> options;
};

// DDP takes the times of a step with the timer of its device type, and warns where there is none.
struct Timer final : c10d::Timer {
  explicit Timer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    auto from = getTimestamp(start), to = getTimestamp(end);
    return from && to && *to >= *from ? std::optional<int64_t>(*to - *from) : std::nullopt;
  }
};

BackendPtr make_backend(BackendPtr inner) { return c10::make_intrusive<Backend>(std::move(inner)); }

}  // namespace

void bind_collectives(pybind11::module& module) {
  pybind11::class_<CopiedOptions>(module, "CopiedOptions")
      .def("__deepcopy__", [](CopiedOptions& self, const pybind11::object&) { return self.options; });
  using Holder = c10::intrusive_ptr<Backend>;
  pybind11::class_<Backend, c10d::Backend, Holder>(module, "SimulatedCollectives")
      // For NCCL ranks that are not in a new group must take part in the split; gloo asks nothing of them.
      .def("perform_nocolor_split", [](Backend&, const pybind11::object&) {})
      .def_property_readonly("options", [](Backend& self) { return CopiedOptions{self.getBackendOptions()}; });
  module.def("make_backend", &make_backend, "Return a backend for the device that hands its memory to a gloo backend.");
}

}  // namespace sim

namespace c10d {
namespace {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kPrivateUse1, sim::Timer)
}  // namespace
}  // namespace c10d
