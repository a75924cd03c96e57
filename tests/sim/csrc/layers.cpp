// Kernels that torch asks devices other than the CPU for: convolutions under their own name, dropout,
// and the cells of LSTM and GRU.
#include "alias.h"
#include "counts.h"
#include "device.h"
#include "generator.h"
#include "queue.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace sim {
namespace {

using at::Tensor;
using c10::IntArrayRef;
using OptionalTensor = std::optional<Tensor>;

// The frame of a kernel: what is queued before it has run, and torch computes on CPU tensors over the same memory.
class Kernel {
 public:
  Kernel(const char* name, const Tensor& first) : device_(first.device()), guard_(device_) {
    count(name);
    run_current_stream(device_.index());
  }
  Tensor in(const Tensor& tensor) const { return cpu_view(tensor); }
  OptionalTensor in(const OptionalTensor& tensor) const {
    return tensor && tensor->defined() ? OptionalTensor(cpu_view(*tensor)) : std::nullopt;
  }
  Tensor out(const Tensor& tensor) const { return adopt(tensor, device_.index()); }

 private:
  c10::Device device_;
  c10::DeviceGuard guard_;
  KernelsOnly kernels_only_;
};

Tensor plus(const Tensor& tensor, const OptionalTensor& bias) { return bias ? tensor + *bias : tensor; }

Tensor convolution(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  Kernel kernel("aten::convolution_overrideable", input);
  return kernel.out(at::convolution(
      kernel.in(input), kernel.in(weight), kernel.in(bias), stride, padding, dilation, transposed, output_padding,
      groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  Kernel kernel("aten::convolution_backward_overrideable", input);
  int64_t bias_size[] = {grad.size(1)};
  auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
      kernel.in(grad), kernel.in(input), kernel.in(weight), at::OptionalIntArrayRef(bias_size), stride, padding,
      dilation, transposed, output_padding, groups, mask);
  return {kernel.out(grad_input), kernel.out(grad_weight), kernel.out(grad_bias)};
}

// The CPU's kernel takes no generator, so it would draw from the CPU's.
std::tuple<Tensor, Tensor> dropout(const Tensor& input, double probability, std::optional<bool> train) {
  Kernel kernel("aten::native_dropout", input);
  auto from = kernel.in(input);
  auto mask = at::ones_like(from, at::kBool);
  if (!train.value_or(true)) return {kernel.out(from.clone()), kernel.out(mask)};
  double kept = 1 - probability;
  mask.bernoulli_(kept, generator_for_kernel(default_generator(input.device().index()), input.numel()));
  return {kernel.out(from * mask * (kept > 0 ? 1 / kept : 0)), kernel.out(mask)};
}

// The formulas of both cells are those of aten/src/ATen/native/cuda/RNN.cu; so is the contents of the workspaces.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cell, const OptionalTensor& input_bias,
    const OptionalTensor& hidden_bias) {
  Kernel kernel("aten::_thnn_fused_lstm_cell", input_gates);
  auto from_input = plus(kernel.in(input_gates), kernel.in(input_bias));
  auto from_hidden = plus(kernel.in(hidden_gates), kernel.in(hidden_bias));
  auto gates = (from_input + from_hidden).chunk(4, 1);
  auto input = gates[0].sigmoid(), forget = gates[1].sigmoid(), candidate = gates[2].tanh(), out = gates[3].sigmoid();
  auto new_cell = forget * kernel.in(cell) + input * candidate;
  auto hidden = out * new_cell.tanh();
  auto workspace = at::cat({input, forget, candidate, out}, 1);
  return {kernel.out(hidden), kernel.out(new_cell), kernel.out(workspace)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(
    const OptionalTensor& grad_hidden, const OptionalTensor& grad_new_cell, const Tensor& cell, const Tensor& new_cell,
    const Tensor& workspace, bool has_bias) {
  Kernel kernel("aten::_thnn_fused_lstm_cell_backward_impl", cell);
  auto gates = kernel.in(workspace).chunk(4, 1);
  auto input = gates[0], forget = gates[1], candidate = gates[2], out = gates[3];
  auto squashed = kernel.in(new_cell).tanh();
  auto from_hidden = kernel.in(grad_hidden).value_or(at::zeros_like(squashed));
  auto from_cell = kernel.in(grad_new_cell).value_or(at::zeros_like(squashed));
  auto grad_cell = from_hidden * out * (1 - squashed * squashed) + from_cell;
  auto grad_gates = at::cat(
      {grad_cell * candidate * input * (1 - input), grad_cell * kernel.in(cell) * forget * (1 - forget),
       grad_cell * input * (1 - candidate * candidate), from_hidden * squashed * out * (1 - out)},
      1);
  auto grad_bias = has_bias ? grad_gates.sum(0) : Tensor();
  return {kernel.out(grad_gates), kernel.out(grad_cell * forget), kernel.out(grad_bias)};
}

std::tuple<Tensor, Tensor> gru_cell(
    const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hidden, const OptionalTensor& input_bias,
    const OptionalTensor& hidden_bias) {
  Kernel kernel("aten::_thnn_fused_gru_cell", input_gates);
  auto from_input = plus(kernel.in(input_gates), kernel.in(input_bias)).chunk(3, 1);
  auto from_hidden = plus(kernel.in(hidden_gates), kernel.in(hidden_bias)).chunk(3, 1);
  auto before = kernel.in(hidden);
  auto reset = (from_input[0] + from_hidden[0]).sigmoid();
  auto update = (from_input[1] + from_hidden[1]).sigmoid();
  auto candidate = (from_input[2] + reset * from_hidden[2]).tanh();
  auto workspace = at::cat({reset, update, candidate, before, from_hidden[2]}, 1);
  return {kernel.out(candidate + update * (before - candidate)), kernel.out(workspace)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(
    const Tensor& grad, const Tensor& workspace, bool has_bias) {
  Kernel kernel("aten::_thnn_fused_gru_cell_backward", grad);
  auto parts = kernel.in(workspace).chunk(5, 1);
  auto reset = parts[0], update = parts[1], candidate = parts[2], before = parts[3], from_hidden = parts[4];
  auto grad_hidden = kernel.in(grad);
  auto grad_update = grad_hidden * (before - candidate) * (1 - update) * update;
  auto grad_candidate = grad_hidden * (1 - update) * (1 - candidate * candidate);
  auto grad_reset = grad_candidate * from_hidden * (1 - reset) * reset;
  auto grad_input_gates = at::cat({grad_reset, grad_update, grad_candidate}, 1);
  auto grad_hidden_gates = at::cat({grad_reset, grad_update, grad_candidate * reset}, 1);
  auto input_bias = has_bias ? grad_input_gates.sum(0) : Tensor();
  auto hidden_bias = has_bias ? grad_hidden_gates.sum(0) : Tensor();
  return {
      kernel.out(grad_input_gates), kernel.out(grad_hidden_gates), kernel.out(grad_hidden * update),
      kernel.out(input_bias), kernel.out(hidden_bias)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("native_dropout", dropout);
  library.impl("_thnn_fused_lstm_cell", lstm_cell);
  library.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  library.impl("_thnn_fused_gru_cell", gru_cell);
  library.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
}

}  // namespace
}  // namespace sim
