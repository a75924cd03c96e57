"""The accelerator of any kind of device of torch, on the simulated one: both indices, alone and at once."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from nucleate import Accelerator, RandomState, Runtime
from nucleate.accelerators import TorchAccelerator
from nucleate.accelerators.placement import place
from nucleate.cluster import process_group
from nucleate.deferred import deferred
from nucleate.devices import default_generator, hooks_of
from nucleate.errors import ConfigurationError, UsageError
from nucleate.precision import HalfPrecision
from nucleate.testing import AcceleratorSuite
from nucleate.wrappers.dataloader import move
from tests.accelerators.outsider import Outsider

CPU = torch.device("cpu")
# torch's name of the device before it is installed; it is the same one.
SIM = torch.device("privateuseone", 0)
OTHER = torch.device("privateuseone", 1)


class TestSim(AcceleratorSuite):
    def make_accelerator(self) -> Accelerator:
        return TorchAccelerator("sim")


class TestFirstIndex(AcceleratorSuite):
    def make_accelerator(self) -> Accelerator:
        return TorchAccelerator("sim", index=0)


class TestSecondIndex(AcceleratorSuite):
    def make_accelerator(self) -> Accelerator:
        return TorchAccelerator("sim", index=1)


class TestOutsider(AcceleratorSuite):
    """A class as others wrote it before there was `TorchAccelerator`."""

    def make_accelerator(self) -> Accelerator:
        return SimOutsider()


class SimOutsider(Outsider):
    name, backend, pins_memory = "sim", "cpu:gloo,sim:simccl", True

    def __init__(self) -> None:
        super().__init__("sim")

    def count(self) -> int:
        return 2

    def select(self, local_rank: int) -> torch.device:
        torch.sim.set_device(local_rank)  # type: ignore[attr-defined]
        return torch.device("sim", local_rank)

    def module_init_context(self) -> Any:
        return SIM

    def setup(self, model: nn.Module) -> nn.Module:
        return place(model, SIM)

    def random_state(self) -> Tensor:
        state: Tensor = torch.sim.get_rng_state(SIM)  # type: ignore[attr-defined]
        return state

    def set_random_state(self, state: Tensor) -> None:
        torch.sim.set_rng_state(state, SIM)  # type: ignore[attr-defined]


# -- names and choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sim", "auto"])
def test_a_runtime_takes_the_device_by_its_name_and_by_itself(name: str) -> None:
    runtime = Runtime(accelerator=name)
    assert type(runtime.accelerator) is TorchAccelerator
    assert runtime.device == SIM
    assert runtime.accelerator.backend == "cpu:gloo,sim:simccl"
    assert hooks_of(OTHER) is runtime.accelerator


def test_auto_takes_the_cpu_where_the_device_is_switched_off(sim: Any) -> None:
    sim.set_available(False)
    assert Runtime().device == CPU
    with pytest.raises(ConfigurationError, match="'sim' was asked for, but torch sees no device: check its driver"):
        Runtime(accelerator="sim")


def test_an_index_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="index=2 was given, and torch sees 2: give an index below 2"):
        Runtime(accelerator=TorchAccelerator("sim", index=2))


def test_without_a_backend_gloo_alone_is_used_and_several_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(dist.Backend.default_device_backend_map, "sim")
    runtime = Runtime(accelerator="sim", strategy="ddp")
    assert runtime.accelerator.backend == "gloo"
    try:
        runtime.launch()
        assert dist.get_backend() == "gloo"
        runtime.barrier()
    finally:
        process_group.stop()


# -- the device's own answers ----------------------------------------------------------------------------------------


def test_memory_is_counted_on_the_index_that_was_selected() -> None:
    first, second = TorchAccelerator("sim", index=0), TorchAccelerator("sim", index=1)
    device = second.select(0)
    before = first.peak_memory_bytes(), second.peak_memory_bytes()
    torch.accelerator.reset_peak_memory_stats(1)
    tensor = torch.ones(2**20, device=device)
    after = second.peak_memory_bytes()
    assert after is not None
    assert after >= tensor.nbytes
    assert first.peak_memory_bytes() == before[0]


def test_a_device_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.sim, "is_bf16_supported", lambda: False, raising=False)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="'bf16-true' needs bfloat16, which .* does not have"):
        Runtime(accelerator="sim", precision=HalfPrecision())
    with pytest.raises(ConfigurationError, match="'bf16-mixed' needs bfloat16"):
        Runtime(accelerator="sim", precision="bf16-mixed")
    assert Runtime(accelerator="sim", precision="16-true").precision.name == "16-true"


@pytest.mark.parametrize("device", [CPU, SIM, OTHER], ids=str)
def test_deferred_tensors_answer_for_their_kind_and_move_by_its_methods(device: torch.device) -> None:
    here = device.type == "sim"
    with deferred(device), device:
        tensor = torch.empty(2)
        assert tensor.is_sim is here  # type: ignore[attr-defined]
        assert tensor.is_cpu is not here
        assert tensor.is_cuda is False
        assert tensor.is_xpu is False
        assert tensor.type() == ("torch.sim.FloatTensor" if here else "torch.FloatTensor")
        if here:
            assert tensor.sim(device.index) is tensor  # type: ignore[attr-defined]
            assert tensor.sim(device=device) is tensor  # type: ignore[attr-defined]
        model = nn.Linear(2, 2)
    assert model.weight.is_sim is here  # type: ignore[attr-defined]
    assert model.weight.is_cpu is not here
    if here:
        model.sim(device.index)  # type: ignore[operator]
    else:
        with pytest.raises(RuntimeError, match="sim"):
            model.sim()  # type: ignore[operator]


# -- moving real models ----------------------------------------------------------------------------------------------


class Scaled(Tensor):
    """A subclass without a layout of its own."""


class Everything(nn.Module):
    """Ties, views of one storage, hooks, a subclass, a frozen parameter, weak references, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.rnn = nn.LSTM(3, 2)
        whole = torch.arange(12.0).view(3, 4)
        self.whole, self.turned = nn.Parameter(whole), nn.Parameter(whole.t())
        self.register_buffer("row", whole[1])
        self.scaled = nn.Parameter(torch.ones(3).as_subclass(Scaled))
        self.norm.weight.requires_grad_(False)
        self.first.weight.note = "kept"  # type: ignore[assignment]
        self.calls: list[str] = []
        self.first.bias.register_post_accumulate_grad_hook(lambda _: self.calls.append("accumulated"))
        self.last.bias.register_hook(lambda _: self.calls.append("gradient"))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x)))
        return result


def seen(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return what must not change: objects, values, gradients, classes, flags and strides."""
    return [
        (id(t), t.detach().cpu().tolist(), None if t.grad is None else t.grad.cpu().tolist(), type(t), t.requires_grad,
         t.stride(), t.is_leaf)
        for t in (*model.parameters(), *model.buffers())
    ]  # fmt: skip


def test_a_real_model_moves_there_and_back_and_stays_what_it_is() -> None:
    torch.manual_seed(0)
    model = Everything()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = {weakref.ref(model.first.weight): model.first.weight, weakref.ref(model.norm.bias): model.norm.bias}
    model(torch.randn(4, 3)).sum().backward()
    for device in (SIM, OTHER, CPU, OTHER, SIM, CPU, SIM):
        before = seen(model)
        place(model, device)
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {device}
        assert all(p.grad is None or p.grad.device == device for p in model.parameters())
        assert seen(model) == before
        assert model.last.weight is model.first.weight
        assert model.first.weight.note == "kept"  # type: ignore[comparison-overlap]
        storages = {t.untyped_storage().data_ptr() for t in (model.whole, model.turned, model.row)}
        assert len(storages) == 1
        assert all(reference() is tensor for reference, tensor in held.items())
        assert not model.rnn._weights_have_changed()  # type: ignore[operator]
        model.calls.clear()
        weight = model.first.weight.detach().clone()
        model(torch.randn(4, 3, device=device)).sum().backward()
        assert sorted(model.calls) == ["accumulated", "gradient"]
        optimizer.step()
        assert not torch.equal(model.first.weight, weight), "the optimizer trains something else"


def test_a_tensor_that_a_graph_holds_is_refused_by_name_and_nothing_moves() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("doubled", model[1].weight * 2)
    with pytest.raises(UsageError, match=r"doubled cannot be moved to sim:0: .*before its forward runs"):
        place(model, SIM)
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {CPU}


def test_the_backward_of_what_was_computed_before_a_move_fails() -> None:
    model = nn.Linear(2, 2)
    loss = model(torch.ones(1, 2)).sum()
    place(model, SIM)
    with pytest.raises(RuntimeError, match="poisoned by swap_tensors"):
        loss.backward()


def test_an_eager_model_is_moved_by_setup_with_its_optimizer() -> None:
    torch.manual_seed(0)
    runtime = Runtime(accelerator="sim")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    weight = model[0].weight
    value = weight.detach().clone()
    wrapped, optimizer = runtime.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert model[0].weight is weight
    assert weight.device == SIM
    assert torch.equal(weight.cpu(), value)
    runtime.backward(wrapped(torch.ones(2, 3, device=SIM)).sum())
    optimizer.step()
    assert not torch.equal(weight.cpu(), value)
    assert wrapped.sim(0) is wrapped
    assert wrapped.cpu() is wrapped


# -- batches ---------------------------------------------------------------------------------------------------------


def test_batches_from_pinned_memory_are_copied_without_waiting(sim: Any) -> None:
    runtime = Runtime(accelerator="sim")
    data = torch.arange(12.0).view(6, 2)
    loader = runtime.setup_dataloaders(DataLoader(TensorDataset(data), batch_size=2, pin_memory=True))
    before = sim.counts()["late"]
    batches = [batch for (batch,) in loader]
    assert {batch.device for batch in batches} == {SIM}
    assert torch.equal(torch.cat(batches).cpu(), data)
    assert sim.counts()["late"] > before


def test_only_copies_from_pinned_memory_do_not_wait(sim: Any) -> None:
    sequences = [torch.ones(3, 2), torch.zeros(2, 2)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    for data, is_late in [
        (torch.ones(4), False),
        (torch.ones(4).pin_memory(), True),
        (packed, False),
        (packed._replace(data=packed.data.pin_memory()), False),
        (packed.pin_memory(), True),
    ]:
        before = sim.counts()["late"]
        moved = move([data], SIM)[0]
        assert (sim.counts()["late"] > before) is is_late
        assert torch.equal(moved.data.cpu(), data.data)


def test_packed_sequences_are_moved_as_well() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.zeros(2, 2)])
    moved: PackedSequence = move({"a": packed.pin_memory()}, OTHER)["a"]
    assert moved.data.device == OTHER
    assert torch.equal(moved.data.cpu(), packed.data)
    assert torch.equal(moved.batch_sizes, packed.batch_sizes)


# -- random numbers --------------------------------------------------------------------------------------------------


def test_the_devices_random_state_is_saved_and_restored() -> None:
    runtime = Runtime(accelerator=TorchAccelerator("sim", index=1))
    state = RandomState().state_dict()
    expected = torch.rand(3, device=runtime.device), torch.rand(3)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    RandomState().load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.rand(3, device=runtime.device), expected[0])
    assert torch.equal(torch.rand(3), expected[1])


def test_both_devices_of_a_process_are_saved_and_restored() -> None:
    runtimes = [Runtime(accelerator=TorchAccelerator("sim", index=index)) for index in (1, 0)]
    torch.rand(5, device=OTHER)
    state = RandomState().state_dict()
    expected = [torch.rand(3, device=runtime.device) for runtime in runtimes]
    RandomState().load_state_dict(state)
    assert all(torch.equal(torch.rand(3, device=r.device), e) for r, e in zip(runtimes, expected, strict=True))


def test_each_index_gets_its_own_state_whatever_the_order_of_the_runtimes(tmp_path: Path) -> None:
    runtimes = [Runtime(accelerator=TorchAccelerator("sim", index=index)) for index in (1, 0)]
    for index in (0, 1):
        default_generator(torch.device("sim", index)).manual_seed(100 + index)
    state = RandomState().state_dict()
    assert sorted(state["rank_0"]["sim"]) == ["0", "1"]
    runtimes[0].save(tmp_path / "saved", {"random": RandomState()})
    expected = [torch.rand(3, device=device).cpu() for device in (SIM, OTHER)]
    del runtimes
    gc.collect()
    again = [Runtime(accelerator=TorchAccelerator("sim", index=index)) for index in (0, 1)]
    RandomState().load_state_dict(state)
    assert_equal([torch.rand(3, device=device) for device in (SIM, OTHER)], expected)
    again[0].load(tmp_path / "saved", {"random": RandomState()})
    assert_equal([torch.rand(3, device=device) for device in (SIM, OTHER)], expected)


def test_the_state_of_an_index_that_is_not_used_now_is_left_out_and_said() -> None:
    runtimes = [Runtime(accelerator=TorchAccelerator("sim", index=index)) for index in (0, 1)]
    state = RandomState().state_dict()
    expected = torch.rand(3, device=OTHER)
    del runtimes
    gc.collect()
    alone = Runtime(accelerator=TorchAccelerator("sim", index=1))
    with pytest.warns(UserWarning, match=r"saved with 2 'sim' device\(s\), and this process uses 1; the states of 1"):
        RandomState().load_state_dict(state)
    assert_equal([torch.rand(3, device=alone.device)], [expected])


def test_a_rank_restores_the_state_of_its_one_device_to_the_one_that_it_uses_now() -> None:
    runtime = Runtime(accelerator=TorchAccelerator("sim", index=1))
    state = RandomState().state_dict()
    expected = torch.rand(3, device=runtime.device)
    del runtime
    gc.collect()
    runtime = Runtime(accelerator=TorchAccelerator("sim", index=0))
    RandomState().load_state_dict(state)
    assert_equal([torch.rand(3, device=runtime.device)], [expected])


def test_states_without_indices_are_read() -> None:
    runtimes = [Runtime(accelerator=TorchAccelerator("sim", index=index)) for index in (1, 0)]
    state = RandomState().state_dict()
    states = state["rank_0"]["sim"]
    expected = [torch.rand(3, device=device) for device in (SIM, OTHER)]
    # Several were saved in the order of the runtimes.
    state["rank_0"]["sim"] = (states["1"], states["0"])
    RandomState().load_state_dict(state)
    assert_equal([torch.rand(3, device=device) for device in (SIM, OTHER)], expected)
    state["rank_0"]["sim"] = states["1"]
    with torch.random.fork_rng(device_type="sim", devices=[0]):
        RandomState().load_state_dict(state)
    assert_equal([torch.rand(3, device=runtimes[0].device)], expected[1:])


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(f.cpu(), e.cpu()) for f, e in zip(found, expected, strict=True))


# -- two runtimes ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws in its constructor and in forward; says "sim" without an index, as scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8, device="sim"))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        result: Tensor = self.last(hidden * (torch.rand(8, device="sim") > 0.2)) * self.scale
        return result


class Run:
    """A model in training on one device."""

    def __init__(self, index: int, strategy: str) -> None:
        self.runtime = Runtime(accelerator=TorchAccelerator("sim", index=index), strategy=strategy)

    def construct(self) -> None:
        with self.runtime.init_module(empty_init=True):
            model = Noisy()
        self.model, self.optimizer = self.runtime.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        batch = self.runtime.to_device(torch.randn(4, 8, generator=generator))
        loss = self.model(batch).square().mean()
        self.runtime.backward(loss)
        self.runtime.clip_gradients(self.model, self.optimizer, max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_two_runtimes_train_at_once_as_each_does_alone(strategy: str) -> None:
    alone = []
    for index in (0, 1):
        run = Run(index, strategy)
        torch.manual_seed(0)
        run.construct()
        alone.append([run.step(number) for number in range(3)])
    first, second = Run(0, strategy), Run(1, strategy)
    torch.manual_seed(0)
    first.construct()
    second.construct()
    both = [(first.step(number), second.step(number)) for number in range(3)]
    assert [losses[0] for losses in both] == alone[0]
    assert [losses[1] for losses in both] == alone[1]
