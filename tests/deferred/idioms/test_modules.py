"""Constructors that rework modules: parametrizations, pruning, hooks, lazy and shared parts."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def weights_are_parametrized(m: Any) -> None:
    m.a = parametrizations.weight_norm(nn.Linear(5, 6))
    m.b = parametrizations.orthogonal(nn.Linear(5, 5))
    m.c = parametrizations.spectral_norm(nn.Linear(5, 6))
    m.d = parametrizations.orthogonal(nn.Linear(5, 3), orthogonal_map="householder")
    m.e = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley", use_trivialization=False)
    m.f = parametrizations.weight_norm(nn.Conv2d(2, 3, 3), dim=None)
    m.g = parametrizations.spectral_norm(nn.Conv2d(2, 3, 3), n_power_iterations=3)


@idiom
def weights_are_normed_the_old_way(m: Any) -> None:
    m.a = nn.utils.spectral_norm(nn.Linear(5, 6))
    m.b = nn.utils.weight_norm(nn.Linear(3, 4))
    m.c = nn.utils.weight_norm(nn.Conv1d(3, 4, 3), dim=1)
    m.d = nn.utils.remove_weight_norm(nn.utils.weight_norm(nn.Linear(3, 4)))
    m.e = nn.utils.remove_spectral_norm(nn.utils.spectral_norm(nn.Linear(3, 4)))
    nn.init.normal_(m.b.weight_v)


class _Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.triu()


class _Skew(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu(1) - x.triu(1).transpose(-1, -2)


class _Exponential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("identity", torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.identity + x, self.identity - x)


@idiom
def weights_are_parametrized_by_own_modules(m: Any) -> None:
    m.a = nn.Linear(4, 4)
    parametrize.register_parametrization(m.a, "weight", _Skew())
    parametrize.register_parametrization(m.a, "weight", _Exponential())
    m.b = nn.Linear(4, 4)
    parametrize.register_parametrization(m.b, "weight", _Symmetric())
    m.b.weight = torch.rand(4, 4)
    with parametrize.cached():
        hold(m, first=m.a.weight.detach(), again=m.a.weight.detach() + m.a.weight.detach())
    m.c = nn.Linear(4, 4)
    parametrize.register_parametrization(m.c, "weight", _Symmetric())
    parametrize.remove_parametrizations(m.c, "weight")
    m.d = nn.Linear(4, 4)
    parametrize.register_parametrization(m.d, "weight", _Symmetric())
    parametrize.remove_parametrizations(m.d, "weight", leave_parametrized=False)
    m.e = copy.deepcopy(m.b)


@idiom
def weights_are_pruned(m: Any) -> None:
    m.a = prune.l1_unstructured(nn.Linear(5, 6), "weight", 0.3)
    m.b = prune.random_unstructured(nn.Linear(5, 6), "weight", amount=7)
    m.c = prune.ln_structured(nn.Conv2d(3, 4, 3), "weight", amount=0.5, n=2, dim=0)
    m.d = prune.remove(prune.l1_unstructured(nn.Linear(5, 6), "weight", 0.3), "weight")
    m.e, m.f = nn.Linear(3, 4), nn.Linear(4, 5)
    prune.global_unstructured([(m.e, "weight"), (m.f, "weight")], pruning_method=prune.L1Unstructured, amount=0.4)
    m.g = prune.custom_from_mask(nn.Linear(3, 3), "weight", torch.rand(3, 3) > 0.5)
    m.h = prune.random_structured(prune.identity(nn.Linear(3, 3), "weight"), "weight", 1, 0)


@idiom
def modules_and_parameters_are_copied(m: Any) -> None:
    m.a = nn.Linear(3, 4)
    m.b = copy.deepcopy(m.a)
    m.c = nn.Parameter(copy.deepcopy(m.a.weight))
    m.d = nn.Linear(3, 4)
    m.d.load_state_dict(m.a.state_dict())
    m.e = nn.Parameter(m.a.weight.detach().clone())
    with torch.no_grad():
        m.e.mul_(2)
    m.f = copy.copy(m.a)
    m.g = copy.deepcopy(nn.Sequential(m.a, m.b, nn.BatchNorm1d(4), nn.LSTM(2, 3)))
    tied = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    tied[1].weight = tied[0].weight
    m.h = copy.deepcopy(tied)


@idiom
def tensors_are_copied(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    m.b = copy.copy(m.a)
    with torch.no_grad():
        m.b.mul_(2)
    x = torch.randn(4)
    y, z = copy.copy(x), copy.deepcopy(x)
    y.add_(1)
    view = copy.deepcopy(x[1:])
    both = copy.deepcopy([x, x[:2], x])
    hold(m, x=x, y=y, z=z, view=view, first=both[0], second=both[1], same=both[0] is both[2])


@idiom
def lazy_modules_are_run_dry(m: Any) -> None:
    m.conv = nn.Conv2d(1, 3, 3)
    with torch.no_grad():
        size = m.conv(torch.zeros(1, 1, 8, 8)).numel()
        scale = m.conv(torch.randn(1, 1, 8, 8)).std()
    m.head = nn.Linear(size, 2)
    m.scale = nn.Parameter(scale.clone())
    m.lazy = nn.LazyLinear(3)
    m.lazy(torch.ones(2, 6))
    m.net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    m.net(torch.rand(2, 1, 5, 5))
    m.net.eval()
    m.net(torch.rand(1, 1, 5, 5))


@idiom
def lists_and_dicts_of_parameters(m: Any) -> None:
    m.a = nn.ParameterList([torch.randn(2), nn.Parameter(torch.randn(3))])
    m.a.append(torch.rand(2))
    m.a.extend(nn.Parameter(torch.ones(i)) for i in range(3))
    m.a[0] = nn.Parameter(torch.zeros(4))
    m.b = nn.ParameterDict({"x": torch.randn(2), "y": nn.Parameter(torch.randn(3))})
    m.b["z"] = torch.rand(1)
    m.b.update({"w": nn.Parameter(torch.rand(2))})
    m.b.pop("x")
    m.c = m.b.fromkeys([str(i) for i in range(3)], m.b["y"])
    m.d = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.ModuleList([nn.Linear(1, 1)] * 2)})


@idiom
def buffers_of_every_kind(m: Any) -> None:
    m.register_buffer("a", torch.randn(3), persistent=False)
    m.b = nn.Buffer(torch.randn(3))
    m.c = nn.Buffer(torch.randn(3), persistent=False)
    m.register_buffer("d", None)
    m.d = torch.arange(4)
    m.register_buffer("e", torch.ones(2, 2).tril().bool())
    m.e = m.e.logical_not()
    m.register_buffer("f", torch.randn(2))
    del m.f
    m.register_buffer("f", torch.rand(3))
    m._buffers["g"] = torch.randn(2)
    m.register_parameter("h", None)
    m.h = nn.Parameter(torch.randn(1))
    m._parameters["i"] = nn.Parameter(torch.rand(2))


@idiom
def gradients_are_switched_and_frozen(m: Any) -> None:
    m.a = nn.Linear(4, 4)
    m.a.requires_grad_(False)
    m.a.weight.mul_(0.5)
    m.a.bias.requires_grad_()
    m.b = nn.Parameter(torch.zeros(3), requires_grad=False)
    torch.nn.init.normal_(m.b)
    m.c = nn.Linear(2, 2)
    m.c.weight.requires_grad = False
    m.d = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    for p in m.parameters():
        if p.is_floating_point():
            p.requires_grad_(p.numel() > 3)
    m.register_buffer("e", torch.rand(2, requires_grad=True))


@idiom
def values_are_written_under_no_grad(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3, 3))
    with torch.no_grad():
        m.a.copy_(torch.eye(3))
        m.a[0] = 1
        m.a.add_(m.a.t().clone())
        m.a *= 2
    m.a.data[1] = 5
    m.a.detach().sub_(1)
    with torch.set_grad_enabled(False):
        m.a.clamp_(max=4)


@idiom
def hooks_run_in_the_constructor(m: Any) -> None:
    m.a = nn.Linear(3, 3)
    seen: list[Tensor] = []
    m.a.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    m.a.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    m.a.weight.register_hook(lambda gradient: gradient * 2)
    m.a(torch.rand(2, 3)).sum().backward()
    hold(m, seen=seen[0], gradient=m.a.weight.grad)
    m.a.weight.grad = None
    m.a.bias.grad = None


@idiom
def parts_are_shared_between_models(m: Any) -> None:
    shared = nn.Linear(2, 2)
    m.a = nn.Sequential(shared, nn.ReLU(), shared)
    m.b = nn.ModuleList([shared, nn.Linear(2, 2)])
    m.b[1].bias = shared.bias
    m.c = nn.Module()
    m.c.weight = m.b[1].weight


@idiom
def initialization_is_skipped_and_done_later(m: Any) -> None:
    m.a = nn.utils.skip_init(nn.Linear, 3, 4)
    nn.init.normal_(m.a.weight)
    nn.init.zeros_(m.a.bias)
    m.b = nn.Linear(3, 3, device="meta").to_empty(device="cpu")
    m.b.reset_parameters()
    m.c = nn.Linear(2, 2).to_empty(device="cpu")
    nn.init.ones_(m.c.weight)
    nn.init.ones_(m.c.bias)
    with torch.device("meta"):
        m.d = nn.BatchNorm1d(3)
    m.d.to_empty(device="cpu").reset_parameters()


@idiom
def threads_copy_layers_that_are_there(m: Any) -> None:
    layers = [nn.Linear(3, 3) for _ in range(4)]
    m.layers = nn.ModuleList(layers)
    with ThreadPoolExecutor(2) as pool:
        names = list(pool.map(lambda layer: tuple(layer.weight.shape), layers))
    m.names = names


@idiom
def threads_build_constants(m: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        tables = list(pool.map(lambda n: torch.arange(n).float() / 7, range(1, 4)))
        layers = list(pool.map(lambda n: nn.init.constant_(torch.empty(n), 2.0), range(1, 4)))
    hold(m, **{f"t{i}": t for i, t in enumerate(tables)}, **{f"l{i}": t for i, t in enumerate(layers)})
    m.sum = nn.Parameter(tables[2] + torch.rand(3))
    with torch.no_grad():
        tables[0].add_(torch.rand(1))


@idiom
def a_thread_builds_layers(m: Any) -> None:
    m.first = nn.Linear(3, 3)
    with ThreadPoolExecutor(1) as pool:
        m.layers = nn.ModuleList(pool.map(lambda n: nn.Linear(n, 3), range(1, 4)))
        m.copy = pool.submit(copy.deepcopy, m.first).result()
    m.after = nn.Linear(2, 2)


_POOL = ThreadPoolExecutor(1)
_POOL.submit(int).result()


@idiom
def a_pool_that_was_there_before_builds_layers(m: Any) -> None:
    m.layers = nn.ModuleList(_POOL.map(lambda n: nn.Linear(n, 3), range(1, 4)))
    m.after = nn.Linear(2, 2)


@idiom
def models_are_converted(m: Any) -> None:
    m.a = nn.Linear(3, 3).half()
    m.b = nn.Linear(3, 3).double()
    m.c = nn.Linear(3, 3).to(torch.bfloat16).float()
    m.d = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(
        memory_format=torch.channels_last, dtype=torch.float16
    )
    m.e = nn.Linear(3, 3).type(torch.float64)
    m.f = nn.Embedding(3, 3).bfloat16()
    m.g = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    m.h = nn.utils.fuse_conv_bn_eval(nn.Conv2d(1, 2, 3).eval(), nn.BatchNorm2d(2).eval())
    m.i = nn.utils.fuse_linear_bn_eval(nn.Linear(2, 3).eval(), nn.BatchNorm1d(3).eval())
    m.j = nn.Linear(2, 2).eval().train().apply(lambda module: nn.init.ones_(module.weight))


@idiom
def an_average_of_models_is_kept(m: Any) -> None:
    m.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    m.ema = torch.optim.swa_utils.AveragedModel(m.net, use_buffers=True)
    m.ema.update_parameters(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    for p, q in zip(m.net.parameters(), m.ema.module.parameters(), strict=True):
        q.data.lerp_(p.data, 0.5)


@idiom
def an_optimizer_makes_steps(m: Any) -> None:
    m.net = nn.Linear(3, 2)
    x, y = torch.rand(8, 3), torch.rand(8, 2)
    for optimizer in (
        torch.optim.SGD(m.net.parameters(), 0.1, momentum=0.9),
        torch.optim.AdamW(m.net.parameters(), 0.1),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(m.net(x), y).backward()
            optimizer.step()
    nn.utils.clip_grad_norm_(m.net.parameters(), 0.1)
    optimizer.zero_grad()


class _Marked(nn.Parameter):
    pass


class _Logged(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class _Tagged(nn.Parameter):
    def __new__(cls, data: Tensor, tag: str = "") -> _Tagged:
        self = super().__new__(cls, data, True)
        self.tag = tag
        return self


@idiom
def parameters_have_classes_of_their_own(m: Any) -> None:
    m.a = _Marked(torch.randn(3))
    m.a.decay = False
    m.b = _Tagged(torch.randn(3), "x")
    assert m.b.tag == "x"
    m.register_buffer("c", torch.randn(3).as_subclass(_Logged))
    m.d = nn.Parameter(torch.randn(3).as_subclass(_Logged))
    hold(m, e=(m.c * 2).abs(), f=(m.c * 2).as_subclass(Tensor), g=m.d.detach().clone(), h=m.c.sum().item())
    assert isinstance(m.c + 1, _Logged)
    m.i = nn.Parameter(m.c + torch.rand(3))


class _WithTable(nn.Module):
    table: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        if _WithTable.table is None:
            _WithTable.table = torch.arange(4.0) * 2
        self.weight = nn.Parameter(_WithTable.table + torch.rand(4))
        self.register_buffer("shared", _WithTable.table)


@idiom
def a_class_keeps_a_table_for_all_its_instances(m: Any) -> None:
    _WithTable.table = None
    m.a, m.b = _WithTable(), _WithTable()


_GLOBAL = torch.tensor([1.0, 2.0, 3.0])


@idiom
def a_global_tensor_is_read_and_written(m: Any) -> None:
    _GLOBAL.copy_(torch.tensor([1.0, 2.0, 3.0]))
    m.a = nn.Parameter(_GLOBAL * torch.rand(3))
    _GLOBAL.mul_(2)
    m.b = nn.Parameter(_GLOBAL + torch.ones(3))
    _GLOBAL.add_(torch.rand(3))
    m.c = nn.Parameter(_GLOBAL.clone())
    _GLOBAL[0] = torch.rand(())
    _GLOBAL.data = torch.rand(3)
    m.register_buffer("d", _GLOBAL.clone())
    _GLOBAL.data = torch.tensor([1.0, 2.0, 3.0])


@idiom.each
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_modules_are_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
