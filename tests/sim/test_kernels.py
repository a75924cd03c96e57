"""Layers, optimizers and precisions run on the device; where the CPU's kernels do the work, the bits are the CPU's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5)),
    "conv transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, bias=False), (2, 3, 5, 5)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(8), (4, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "rms norm": (lambda: nn.RMSNorm(8), (4, 8)),
    "gelu": (nn.GELU, (4, 8)),
    "softmax": (lambda: nn.Softmax(-1), (4, 8)),
}


def trained(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return [out.detach().cpu(), x.grad.cpu(), *(p.grad.cpu() for p in module.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_bits_of_the_cpu(sim: Any, name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    for ours, theirs in zip(trained(copy.deepcopy(module).to("sim"), x.to("sim")), trained(module, x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_agrees_with_the_cpu(sim: Any, kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x = kind(5, 7, **options), torch.randn(3, 4, 5)
    torch.testing.assert_close(trained(copy.deepcopy(module).to("sim"), x.to("sim")), trained(module, x))


def test_attention_agrees_with_the_cpu(sim: Any) -> None:
    torch.manual_seed(0)
    module, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 4, 8)
    torch.testing.assert_close(trained(copy.deepcopy(module).to("sim"), x.to("sim")), trained(module, x))


@pytest.mark.parametrize("way", ["foreach", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_has_the_bits_of_the_cpu(sim: Any, kind: type[torch.optim.Optimizer], way: str) -> None:
    torch.manual_seed(0)
    here, x = nn.Linear(40, 40), torch.randn(4, 40)
    there = copy.deepcopy(here).to("sim")
    for module, device in ((here, "cpu"), (there, "sim")):
        optimizer = kind(module.parameters(), lr=0.01, **{way: True})
        for _ in range(3):
            optimizer.zero_grad()
            module(x.to(device)).square().sum().backward()
            optimizer.step()
    for ours, theirs in zip(there.parameters(), here.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_embedding_and_cross_entropy_train(sim: Any) -> None:
    embedding = nn.Embedding(10, 4, padding_idx=0, device="sim")
    F.cross_entropy(embedding(torch.tensor([1, 2], device="sim")), torch.tensor([0, 3], device="sim")).backward()
    assert embedding.weight.grad.cpu().abs().sum(1).nonzero().flatten().tolist() == [1, 2]


def test_initializations_draw_on_the_device(sim: Any) -> None:
    weight = torch.empty(20, 20, device="sim")
    nn.init.orthogonal_(weight)
    torch.testing.assert_close((weight @ weight.T).cpu(), torch.eye(20), atol=1e-5, rtol=0)
    for init in (nn.init.trunc_normal_, nn.init.xavier_uniform_, nn.init.kaiming_normal_):
        before = torch.sim.get_rng_state()
        init(weight)
        assert not torch.equal(torch.sim.get_rng_state(), before)
    assert weight.erfinv_().isfinite().any()
    assert sorted(torch.randperm(5, device="sim").tolist()) == list(range(5))


def test_lazy_conjugates_and_negatives_are_resolved(sim: Any) -> None:
    cpu = torch.randn(4, dtype=torch.complex64)
    conjugate = cpu.to("sim").conj()
    assert conjugate.is_conj()
    assert torch.equal(conjugate.cpu(), cpu.conj())
    assert torch.equal((conjugate * 2).cpu(), cpu.conj() * 2)
    assert torch.equal(conjugate.imag.cpu(), cpu.conj().imag)
    target = torch.zeros(4, dtype=torch.complex64, device="sim")
    target.conj().copy_(conjugate)
    assert torch.equal(target.cpu(), cpu)
    assert torch.equal(torch.view_as_real(target).cpu(), torch.view_as_real(cpu))


def test_results_that_are_views_share_memory(sim: Any) -> None:
    x = torch.arange(24.0, device="sim").reshape(2, 3, 4)
    x[:, 1].zero_()
    x.diagonal().mul_(2)
    torch.view_as_complex(x.view(-1, 2)).mul_(2)
    y = torch.arange(24.0).reshape(2, 3, 4)
    y[:, 1].zero_()
    y.diagonal().mul_(2)
    torch.view_as_complex(y.view(-1, 2)).mul_(2)
    assert torch.equal(x.cpu(), y)
    out = torch.empty(0, device="sim")
    torch.add(x, 1, out=out)
    assert torch.equal(out.cpu(), y + 1)


def test_autocast_follows_the_lists_of_cuda(sim: Any) -> None:
    x = torch.ones(2, 4, device="sim")
    q = torch.ones(1, 1, 2, 4, device="sim")
    linear, conv = nn.Linear(4, 4, device="sim"), nn.Conv2d(1, 1, 1, device="sim")
    with torch.autocast("sim", torch.bfloat16):
        half = linear(x)
        low = [half, x @ x.T, torch.addmm(x, x, linear.weight), torch.bmm(q[0], q[0].mT), conv(q)]
        low.append(F.scaled_dot_product_attention(q, q, q))
        target = torch.tensor([0, 1], device="sim")
        full = [F.layer_norm(half, (4,)), half.softmax(-1), half.sum(), F.mse_loss(half, half), half.norm()]
        full.append(F.cross_entropy(half, target))
    assert {t.dtype for t in low} == {torch.bfloat16}
    assert {t.dtype for t in full} == {torch.float32}
    half.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_the_gradient_scaler_skips_an_infinite_step(sim: Any) -> None:
    module = nn.Linear(4, 4, device="sim")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("sim", init_scale=4.0, growth_interval=1)
    for value, scale, moves in ((1.0, 8.0, True), (float("inf"), 4.0, False)):
        before = module.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(module(torch.full((2, 4), value, device="sim")).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
        assert torch.equal(before, module.weight) is not moves
