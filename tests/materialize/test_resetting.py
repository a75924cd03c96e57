"""Resetting: tensors without a recipe are made by their modules' own methods, bit for bit as by hand."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.deferred import deferred, handle_of
from nucleate.errors import DeferredEditError, DeferredUseError, UninitializedError, UsageError
from nucleate.materialize import Plan, materialize, reset
from nucleate.testing import peak_memory
from tests.by_hand import made_by_hand, reset_by_hand
from tests.deferred.equality import assert_same_model, bits, named_tensors
from tests.device import ACCELERATOR, cpu_only, device

pytestmark = pytest.mark.usefixtures("factories_on_device")

SEED = 11


class Table(nn.Module):
    """A parameter and a buffer that only `reset_parameters` fills, by operations that torch has no meta kernels for."""

    def __init__(self, size: int = 20) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, size))
        self.basis = nn.Parameter(torch.empty(size, size))
        self.register_buffer("scale", torch.empty(size))

    def reset_parameters(self) -> None:
        assert self.weight.device == device()
        assert not self.weight.is_meta
        nn.init.trunc_normal_(self.weight, std=0.7, a=-1, b=1)
        nn.init.orthogonal_(self.basis)
        with torch.no_grad():
            self.weight.div_(self.weight.abs().max().item())
            self.scale.copy_(self.weight.detach().square().mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6, padding_idx=3)
        self.body = nn.ModuleList([Table(6), nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))])
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight


class Named(nn.Module):
    """Fills its parameter by a method of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 5))
        setattr(self, name, self.fill)

    def fill(self) -> None:
        nn.init.normal_(self.weight)


class Views(nn.Module):
    """Two parameters on one storage."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.empty(6, 4)
        self.first, self.second = nn.Parameter(memory[:2]), nn.Parameter(memory[2:])

    def reset_parameters(self) -> None:
        nn.init.normal_(self.first)
        nn.init.uniform_(self.second)


def transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(40, 30),
    "embedding": lambda: nn.Embedding(30, 7, padding_idx=2),
    "batch norm": lambda: nn.BatchNorm2d(5),
    "layer norm": lambda: nn.LayerNorm(5),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "lstm": lambda: nn.LSTM(4, 5, 2, bidirectional=True),
    "gru": lambda: nn.GRU(4, 5),
    "transformer": transformer,
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 3, 2)),
    "table": Table,
    "tied": Tied,
    "shared": lambda: nn.Sequential(*[nn.Linear(5, 5)] * 2, nn.Linear(5, 5)),
    "init_weights": lambda: Named("init_weights"),
    "_init_weights": lambda: Named("_init_weights"),
    "_reset_parameters": lambda: Named("_reset_parameters"),
}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    with torch.device("meta"):
        return make()


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device")


# -- the same bits as by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_model_built_on_meta_is_what_the_calls_make_by_hand(make: Callable[[], nn.Module]) -> None:
    expected = made_by_hand(make, SEED)
    after = torch.rand(3)
    model = on_meta(make)
    objects = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    materialize(model, device())
    assert torch.equal(torch.rand(3), after)
    assert {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)} == objects
    assert_same_model(expected, model)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("verify", [False, "all"])
def test_setup_does_it_wherever_the_model_was_built(inside: bool, verify: bool | str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device", verify=verify)
    expected = made_by_hand(Tied, SEED)
    after = torch.rand(3)
    torch.manual_seed(SEED)
    if inside:
        with runtime.init_module(empty_init=True), torch.device("meta"):
            model = Tied()
    else:
        model = on_meta(Tied)
    runtime.setup(model)
    assert torch.equal(torch.rand(3), after)
    assert_same_model(expected, model)
    assert model.head.weight is model.embed.weight


def test_parameters_that_the_constructor_leaves_empty_are_made_after_it(runtime: Runtime) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), Table(), nn.Linear(4, 4))

    torch.manual_seed(SEED)
    expected = make()
    expected[1].reset_parameters()
    after = torch.rand(3)
    torch.manual_seed(SEED)
    with runtime.init_module(empty_init=True):
        model = make()
    runtime.setup(model)
    assert torch.equal(torch.rand(3), after)
    assert_same_model(expected, model)


def test_views_of_one_storage_stay_views_of_one() -> None:
    memory = torch.empty(6, 4)
    expected = Views()
    torch.manual_seed(SEED)
    expected.reset_parameters()
    model = on_meta(Views)
    materialize(model, device())
    assert bits(model.first) == bits(expected.first)
    assert bits(model.second) == bits(expected.second)
    assert model.first.untyped_storage().data_ptr() == model.second.untyped_storage().data_ptr()
    assert model.second.untyped_storage().nbytes() == memory.untyped_storage().nbytes()


def test_a_model_that_needs_nothing_is_not_touched(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Linear) -> None:
        raise AssertionError("called")

    torch.manual_seed(SEED)
    expected = nn.Linear(4, 4)
    after = torch.rand(3)
    torch.manual_seed(SEED)
    with runtime.init_module(empty_init=True):
        model = nn.Linear(4, 4)
    monkeypatch.setattr(nn.Linear, "reset_parameters", refuse)
    runtime.setup(model)
    assert torch.equal(torch.rand(3), after)
    assert_same_model(expected, model)


@cpu_only("NumPy writes into the host's memory only")
def test_a_method_may_write_through_numpy_and_data_and_with_a_seed_of_its_own() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Parameter(torch.empty(3)) for _ in range(3))

        def reset_parameters(self) -> None:
            self.first.detach().numpy()[:] = 5
            self.second.data = torch.randn(3)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                nn.init.normal_(self.third)

    expected = made_by_hand(Odd, SEED)
    after = torch.rand(3)
    model = on_meta(Odd)
    materialize(model, device())
    assert torch.equal(torch.rand(3), after)
    assert_same_model(expected, model)


def test_parts_of_several_recordings_are_made_together(runtime: Runtime) -> None:
    expected = nn.Sequential(Named("init_weights"), Named("init_weights"), Named("init_weights"))
    torch.manual_seed(SEED)
    for part in expected:
        part.init_weights()  # type: ignore[operator]
    parts = []
    for _ in range(2):
        with runtime.init_module(empty_init=True):
            parts.append(Named("init_weights"))
    model = nn.Sequential(*parts, on_meta(lambda: Named("init_weights")))
    torch.manual_seed(SEED)
    runtime.setup(model)
    assert_same_model(expected, model)


# -- which method ----------------------------------------------------------------------------------------------------


class Ruled(nn.Module):
    """A model with a rule for its modules, as transformers, timm and nanoGPT have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Scale()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 2), nn.LayerNorm(2)))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Scale):
            nn.init.constant_(module.weight, 3)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6))


def test_the_rule_of_the_model_around_comes_after_a_modules_own_method() -> None:
    expected = made_empty(Ruled)
    torch.manual_seed(SEED)
    first, (second, norm) = expected.body[0], expected.body[1]
    expected._init_weights(expected.norm)
    for module in (first, second, norm):
        module.reset_parameters()
        expected._init_weights(module)
    after = torch.rand(3)
    model = on_meta(Ruled)
    materialize(model, device())
    assert torch.equal(torch.rand(3), after)
    assert_same_model(expected, model)


def made_empty(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make().to_empty(device=device())


def test_the_nearest_rule_counts() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def init_weights(self, m: Any) -> None:
            nn.init.ones_(m.weight)

    class Outer(Ruled):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

    model = materialize(on_meta(Outer))
    assert bool((model.inner.scale.weight == 1).all())
    assert bool((model.norm.weight == 3).all())


def test_a_rule_may_look_into_a_module_for_its_children() -> None:
    # As those of GPT-2 and T5 in transformers do.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
            self.other = nn.Sequential(nn.ReLU())
            self.seen: list[nn.Module] = []

        def _init_weights(self, module: nn.Module) -> None:
            self.seen.append(module)
            if module is self.block[1]:
                nn.init.ones_(module[0].weight)  # type: ignore[index,arg-type]

    with deferred(device()):
        model = Model()
    with torch.device("meta"):
        model.block[1][0] = nn.Linear(2, 2)  # type: ignore[index,operator]
    kept = model.block[0]
    materialize(model, device())
    assert bool((model.block[1][0].weight == 1).all())  # type: ignore[index]
    inner: Any = model.block[1]
    assert [id(module) for module in model.seen] == [id(inner[0]), id(inner), id(model.block), id(model)]
    assert model.block[0] is kept


def test_a_module_around_may_fill_what_it_holds() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def reset_parameters(self) -> None:
            nn.init.constant_(self.scale.weight, 2)

    assert bool((materialize(on_meta(lambda: nn.Sequential(Block())))[0].scale.weight == 2).all())


@pytest.mark.parametrize("wanted", ["std: float", "*, std: float"])
def test_a_method_that_wants_something_else_is_not_called(wanted: str) -> None:
    # torchtitan's modules have such an `init_weights`.
    names: dict[str, Any] = {}
    exec(f"def init_weights(self, {wanted}): raise AssertionError('called')", names)
    cls: Any = type("Odd", (Scale,), {"init_weights": names["init_weights"]})
    with pytest.raises(UninitializedError, match=r"`def reset_parameters\(self\)` to Odd"):
        materialize(on_meta(cls))


def test_each_module_is_called_once_children_first() -> None:
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str, *children: nn.Module) -> None:
            super().__init__()
            self.inner = nn.ModuleList(children)
            self.weight = nn.Parameter(torch.empty(2))
            self.name = name

        def reset_parameters(self) -> None:
            order.append(self.name)
            nn.init.zeros_(self.weight)

    def make() -> nn.Module:
        shared = Noted("shared")
        return Noted("root", Noted("a", shared), shared, Noted("b"))

    materialize(on_meta(make))
    assert order == ["shared", "a", "b", "root"]


def test_a_later_method_may_write_again_what_an_earlier_one_wrote() -> None:
    # As in `nn.MultiheadAttention`, whose method fills the bias of its child.
    attention = materialize(on_meta(lambda: nn.MultiheadAttention(8, 2)))
    assert bool((attention.out_proj.bias == 0).all())


def test_a_method_may_put_new_tensors_in_the_place_of_old_ones(runtime: Runtime) -> None:
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))
            self.register_buffer("table", torch.empty(3))

        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.randn(3))
            self.table = torch.arange(3.0)

    torch.manual_seed(SEED)
    expected = Replacing()
    expected.reset_parameters()
    model = on_meta(Replacing)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapped, optimizer = runtime.setup(model, optimizer)
    assert_same_model(expected, model)
    wrapped.weight.sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, expected.weight - 1)


# -- nothing is wiped ------------------------------------------------------------------------------------------------


def test_a_weight_that_was_loaded_is_kept_and_the_stream_moves_as_by_hand(runtime: Runtime, tmp_path: Path) -> None:
    stored = {"0.weight": torch.full((5, 5), 7.0), "1.weight": torch.full((20, 20), 8.0)}
    save_file(stored, tmp_path / "part.safetensors")

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 5), Table(), nn.Linear(5, 5))

    expected = made_by_hand(make, SEED)
    after = torch.rand(3)
    model = on_meta(make)
    with pytest.warns(UserWarning, match="not in it"):
        runtime.load_raw(tmp_path / "part.safetensors", model, strict=False)
    runtime.setup(model)
    assert torch.equal(torch.rand(3), after)
    expected.load_state_dict(stored, strict=False)
    assert_same_model(expected, model)


def given_values(kind: str, model: Any) -> None:
    """Give the weight of a linear layer on meta a value."""
    value = torch.full((5, 5), 7.0)
    if kind == "assigned":
        model.load_state_dict({"weight": value}, strict=False, assign=True)
    elif kind == "parameter":
        model.weight = nn.Parameter(value)
    elif kind == "deferred":
        with deferred(device()):
            model.weight = nn.Parameter(torch.full((5, 5), 7.0))
    elif kind == "frozen":
        model.weight = nn.Parameter(value, requires_grad=False)


@pytest.mark.parametrize("kind", ["assigned", "parameter", "deferred", "frozen"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_tensor_with_a_value_keeps_it(kind: str, precision: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device", precision=precision)
    expected: Any = made_by_hand(lambda: nn.Linear(5, 5), SEED)
    after = torch.rand(3)
    model: Any = on_meta(lambda: nn.Linear(5, 5))
    given_values(kind, model)
    weight = model.weight
    version = weight._version
    runtime.setup(model)
    assert torch.equal(torch.rand(3), after)
    assert model.weight is weight
    assert bool((model.weight == 7).all())
    assert model.weight._version == version or kind == "deferred"
    assert torch.equal(model.bias, expected.bias.to(runtime.precision.dtype))
    assert model.weight.requires_grad == (kind != "frozen")


def test_ties_and_attributes_of_what_is_kept_are_put_back() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 5.0))
            self.other = self.weight
            self.listed = [self.weight, {"inner": self.weight}]
            self.table = torch.full((3,), 6.0)
            self.left = nn.Parameter(torch.empty(3))

        def reset_parameters(self) -> None:
            for tensor in (self.weight, self.table, self.left):
                nn.init.zeros_(tensor)
            assert bool((self.other == 0).all())
            assert bool((self.listed[1]["inner"] == 0).all())  # type: ignore[call-overload,index]

    with deferred(device()):
        model = Holder()
    listed, weight = model.listed, model.weight
    materialize(model, device())
    assert model.listed is listed
    assert model.other is weight is model.weight is listed[0] is listed[1]["inner"]  # type: ignore[call-overload,index]
    assert bool((model.weight == 5).all())
    assert bool((model.table == 6).all())
    assert bool((model.left == 0).all())


@pytest.mark.parametrize("real", [False, True])
def test_a_value_computed_from_one_that_is_kept_sees_what_the_method_sees(real: bool) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4, 4), 2.0))
            self.norm = nn.Parameter(torch.empty(4))

        def reset_parameters(self) -> None:
            with torch.no_grad():
                self.norm.copy_(self.weight.norm(dim=1))
                self.weight.zero_()

    with deferred(device()):
        model = Normalized()
    if real:
        model.weight = nn.Parameter(torch.full((4, 4), 2.0))
    materialize(model, device())
    assert bool((model.norm == 4).all())
    assert bool((model.weight == 2).all())


def test_a_real_model_around_a_part_on_meta_is_left_as_it_is(runtime: Runtime) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.added = nn.Parameter(torch.empty(3, device="meta"))

        def reset_parameters(self) -> None:
            self.body.reset_parameters()
            nn.init.ones_(self.added)

    model = Whole()
    before = {name: tensor.clone() for name, tensor in model.body.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.body.named_parameters()}
    runtime.setup(model)
    assert bool((model.added == 1).all())
    assert places == {name: tensor.data_ptr() for name, tensor in model.body.named_parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.body.state_dict().items())


@cpu_only("the simulated device has strided tensors only")
def test_a_tensor_that_cannot_be_protected_is_not_overwritten_in_silence() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.eye(3).to_sparse())
            self.weight = nn.Parameter(torch.empty(3, device="meta"))

        def reset_parameters(self) -> None:
            self.kept.mul_(2)
            nn.init.zeros_(self.weight)

    with pytest.raises(DeferredEditError, match=r"has overwritten Sparse\.kept"):
        materialize(Sparse())


def test_weights_of_a_recurrent_layer_are_kept_one_by_one() -> None:
    model: Any = on_meta(lambda: nn.LSTM(3, 4))
    model.weight_ih_l0 = nn.Parameter(torch.ones(16, 3))
    materialize(model, device())
    assert bool((model.weight_ih_l0 == 1).all())
    assert [id(weight) for weight in model._flat_weights] == [id(weight) for weight in model.parameters()]
    assert model(torch.ones(2, 3))[0].isfinite().all()


BUILD = """
import torch
from torch import nn
from nucleate.deferred import deferred
from nucleate.materialize import materialize

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.large = nn.Linear(4096, 4096)
        self.scale = nn.Parameter(torch.empty(4096, device="meta"))

    def reset_parameters(self):
        self.large.reset_parameters()
        nn.init.ones_(self.scale)

with torch.device("meta"):
    warm = nn.Linear(4, 4)
materialize(warm)
"""


@pytest.mark.parametrize(("build", "kept_mib"), [("model = Model()", 0), ("with deferred():\n    model = Model()", 64)])
def test_keeping_what_has_a_value_takes_no_memory(build: str, kept_mib: int) -> None:
    added = peak_memory("materialize(model)", f"{BUILD}\n{build}\n").added_bytes
    assert added < (kept_mib + 12) * 2**20


# -- what else setup promises ----------------------------------------------------------------------------------------


def test_half_precision_casts_parameters_and_keeps_buffers() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device", precision="bf16-true")
    expected: Any = made_by_hand(Table, SEED)
    model: Any = on_meta(Table)
    runtime.setup(model)
    assert bits(model.weight) == bits(expected.weight.detach().bfloat16())
    assert model.scale.dtype == torch.float32
    assert bits(model.scale) == bits(expected.scale)


def test_what_the_precision_made_empty_in_its_own_dtype_is_filled_in_it() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device", precision="bf16-true")
    with runtime.init_module(empty_init=True):
        model = Named("reset_parameters")
    torch.manual_seed(SEED)
    runtime.setup(model)
    torch.manual_seed(SEED)
    assert bits(model.weight) == bits(nn.init.normal_(torch.empty(5, 5, dtype=torch.bfloat16)))


def test_an_optimizer_built_before_trains_what_was_made(runtime: Runtime) -> None:
    expected = made_by_hand(lambda: nn.Linear(4, 1), SEED)
    model = on_meta(lambda: nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wrapped, optimizer = runtime.setup(model, optimizer)
    reference = torch.optim.AdamW(expected.parameters(), lr=0.1)
    for net, step in ((wrapped, optimizer), (expected, reference)):
        for _ in range(3):
            net(torch.ones(2, 4)).square().sum().backward()
            step.step()
            step.zero_grad()
    assert_same_model(expected, model)


def test_a_model_is_reset_once(runtime: Runtime) -> None:
    model = on_meta(lambda: nn.Linear(4, 4))
    reset(model, device())
    state = torch.get_rng_state()
    assert not reset(model, device())
    runtime.setup(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_records_go_with_their_last_tensor() -> None:
    model = on_meta(Tied)
    reset(model, device())
    handle = handle_of(model.embed.weight)
    assert handle is not None
    tape = weakref.ref(handle.record.tape)
    del handle
    materialize(model, device())
    gc.collect()
    assert tape() is None


def test_not_while_the_model_is_constructed() -> None:
    with deferred(device()), pytest.raises(UsageError, match="inside the context"):
        materialize(nn.Linear(2, 2))


# -- reports and errors ----------------------------------------------------------------------------------------------


def test_a_report_says_whose_values_come_from_where(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"0.weight": torch.ones(5, 5)}, tmp_path / "part.safetensors")
    with deferred(device()):
        model = nn.Sequential(nn.Linear(5, 5), nn.Sequential())
    with torch.device("meta"):
        model[1].append(nn.Linear(5, 5))
        model[1].append(nn.MultiheadAttention(4, 1))
    with pytest.warns(UserWarning, match="not in it"):
        runtime.load_raw(tmp_path / "part.safetensors", model, strict=False)
    resets = reset(model, device())
    assert resets.by_method == {
        "Linear.reset_parameters": ["1.0.weight", "1.0.bias"],
        "MultiheadAttention._reset_parameters": ["1.1.in_proj_weight", "1.1.in_proj_bias", "1.1.out_proj.bias"],
        "NonDynamicallyQuantizableLinear.reset_parameters": ["1.1.out_proj.weight"],
    }
    model.half()
    plan = Plan.of(model)
    origins = plan.origins()
    assert origins["0.weight"] == "checkpoint"
    assert origins["0.bias"] == "constructor"
    assert origins["1.0.weight"] == "Linear.reset_parameters"
    assert origins["1.1.out_proj.bias"] == "MultiheadAttention._reset_parameters"
    assert "Linear.reset_parameters" in next(line for line in str(plan).splitlines() if line.startswith("1.0.bias"))
    with caplog.at_level(logging.INFO, "nucleate"):
        runtime.setup(on_meta(lambda: nn.Linear(2, 2)))
    assert "Linear.reset_parameters made weight, bias" in caplog.text


class Rotary(nn.Module):
    """A table that the constructor computes, which on the meta device makes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, 8, 2) / 8), persistent=False)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        if self.weight.requires_grad:
            nn.init.zeros_(self.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(2, 2), Rotary()),
            r"initializes 1\.inv_freq: .* 1 \(Rotary\) has no `reset_parameters` .*",
        ),
        (Rotary, r"initializes inv_freq: .* Rotary has no .* to Rotary, and write self\.inv_freq there"),
        (Idle, r"initializes weight: .*Idle\.reset_parameters\(\) was called, but did not write all of self\.weight\."),
        (lambda: nn.ModuleList(Rotary() for _ in range(9)), r"same holds for 4 more modules"),
    ],
)
def test_what_nothing_writes_is_an_error_with_the_cure(make: Callable[[], nn.Module], message: str) -> None:
    model = on_meta(make)
    with pytest.raises(UninitializedError, match=message):
        materialize(model, device())
    # As it was: it can be built by hand.
    assert not any(handle_of(tensor) for tensor in named_tensors(model).values())
    assert all("Deferred" not in type(tensor).__name__ for tensor in named_tensors(model).values())
    assert all(tensor.is_meta for tensor in named_tensors(model).values())
    model.to_empty(device=device())


def test_a_lazy_module_on_meta_is_refused() -> None:
    with pytest.raises(UninitializedError, match=r"no recipe: weight, bias\..*no sharded, lazy or sparse ones"):
        materialize(on_meta(lambda: nn.LazyLinear(3)))


def test_a_method_that_fails_is_named_with_the_tensors_it_was_called_for(runtime: Runtime) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3))
            self.ready = nn.Parameter(torch.ones(3))

        def reset_parameters(self) -> None:
            nn.init.zeros_(self.ready)
            raise ValueError("no such thing")

    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), Failing())
    state = torch.get_rng_state()
    message = r"Failing\.reset_parameters\(\) of 1 failed, .* initialize 1\.weight: ValueError: no such thing"
    with pytest.raises(UninitializedError, match=message) as raised:
        runtime.setup(model)
    assert isinstance(raised.value.__cause__, ValueError)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DeferredUseError, match=r"1\.ready"):
        model[1].ready.sum()
    with runtime.init_module(empty_init=True):
        nn.init.ones_(model[1].weight)
    runtime.setup(model)
    assert bool((model[1].ready == 1).all())


def test_a_strategy_that_fails_halfway_does_not_cost_what_was_loaded(runtime: Runtime) -> None:
    with deferred(device()):
        model = nn.Linear(2, 2)
    Plan.of(model).release()
    with pytest.raises(UninitializedError, match="no recipe: weight, bias"):
        runtime.setup(model)


# -- models without tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
@pytest.mark.parametrize("make", [nn.ReLU, nn.MSELoss, lambda: nn.Sequential(nn.Tanh())])
def test_setup_of_a_model_without_tensors_says_so(strategy: str, make: Callable[[], nn.Module]) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    model = make()
    name = type(model).__name__
    with pytest.warns(UserWarning, match=rf"setup: {name} has no parameter and no buffer") as caught:
        wrapped = runtime.setup(model)
    assert caught[0].filename == __file__
    inputs = (torch.ones(2, requires_grad=True), torch.zeros(2))[: 2 if isinstance(model, nn.MSELoss) else 1]
    runtime.backward(wrapped(*inputs).sum())
    assert inputs[0].grad is not None


def test_by_hand_is_what_the_reference_says() -> None:
    assert bool((reset_by_hand(made_empty(lambda: nn.LayerNorm(3))).weight == 1).all())  # type: ignore[union-attr,arg-type]
