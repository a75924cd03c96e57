"""Values cross to a device through pinned buffers: exact however late copies run, each byte once, nothing pageable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from nucleate.deferred import ComputedSource, Conversion, bind, convert, deferred, resumed
from nucleate.deferred.elements.conversion import Layout, Output, converted
from nucleate.deferred.elements.element_source import fill_from
from nucleate.deferred.elements.tensor_source import TensorSource
from nucleate.devices import DeviceHooks, Staging, move, staging, use_hooks
from nucleate.devices import table as hooks_table
from nucleate.errors import DeferredEditError
from nucleate.materialize import Plan, device_parts, execute, making, materialize
from nucleate.materialize.reading import read_into
from tests.deferred.test_given import Held
from tests.deferred.test_load_state_dict import LAYOUTS

SIM, OTHER = "sim:0", "sim:1"
BUFFER_BYTES = 64 << 10


class Copies:
    """What was copied from the host to a device since the last reset."""

    def __init__(self, controls: Any) -> None:
        self._controls = controls
        self.reset = controls.reset_counts

    @property
    def number(self) -> int:
        return int(self._controls.counts()["h2d.copies"])

    @property
    def size_bytes(self) -> int:
        return int(self._controls.counts()["h2d.bytes"])

    @property
    def pageable_bytes(self) -> int:
        return int(self._controls.counts()["h2d.pageable.bytes"])

    @property
    def num_late(self) -> int:
        return int(self._controls.counts()["late"])


@pytest.fixture
def copies(sim: Any) -> Copies:
    return Copies(sim)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let buffers be small, and several threads fill them."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", BUFFER_BYTES)
    monkeypatch.setattr(device_parts, "MAX_ROW_NUMEL", BUFFER_BYTES // 16)
    monkeypatch.setattr(making, "MIN_NUMEL_PER_THREAD", 1 << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    numel = math.prod(shape)
    if dtype == torch.bool:
        return (torch.arange(numel) % 3 == 0).view(shape)
    if dtype.is_complex:
        return torch.complex(torch.arange(numel).float(), -torch.arange(numel).float()).to(dtype).view(shape)
    wrapped = torch.arange(numel, dtype=torch.float64) % 251
    return (wrapped / 7 if dtype.is_floating_point else wrapped % 120).to(dtype).view(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def same(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(bits(left), bits(right))


def peak_of(run: Any) -> int:
    """Return how many bytes of the device were taken at once on top of those before."""
    torch.accelerator.synchronize(SIM)
    torch.accelerator.reset_peak_memory_stats(SIM)
    before = torch.accelerator.memory_allocated(SIM)
    run()
    return int(torch.accelerator.max_memory_allocated(SIM) - before)


def test_a_tensor_larger_than_the_ring_arrives_though_copies_run_late() -> None:
    source = Held(torch.randn(12, 3_000_000))  # 137 MiB
    out = torch.zeros(12, 3_000_000, device=SIM)
    read_into([(out, source)])
    assert same(out, source.tensor)
    assert source.num_read == source.tensor.numel()


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("num_buffers", [1, 2, 3, 7, 40])
def test_each_byte_crosses_once_from_pinned_memory(num_buffers: int, copies: Copies) -> None:
    source = Held(torch.randn(num_buffers * BUFFER_BYTES // 4 - 5))
    out = torch.zeros(source.shape, device=SIM)
    read_into([(out, source)])
    assert same(out, source.tensor)
    assert copies.size_bytes == out.numel() * 4
    assert copies.pageable_bytes == 0
    assert num_buffers <= copies.number <= num_buffers + 1
    assert copies.num_late == copies.number, "copies do not block"


@pytest.mark.usefixtures("ring")
def test_many_small_tensors_share_buffers(monkeypatch: pytest.MonkeyPatch, copies: Copies) -> None:
    turns: list[int] = []
    original = Staging.buffer
    monkeypatch.setattr(Staging, "buffer", lambda self: turns.append(1) or original(self))
    sizes = [number % 37 + 1 for number in range(500)]
    pairs = [(torch.zeros(size, 3, device=SIM), Held(numbers(size, 3))) for size in sizes]
    read_into(pairs)
    assert all(same(out, source.tensor) for out, source in pairs)
    assert copies.size_bytes == sum(sizes) * 12
    assert copies.pageable_bytes == 0
    assert len(turns) <= sum(staging.aligned(size * 12) for size in sizes) // BUFFER_BYTES + 1


_DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64, torch.uint8,
    torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_every_dtype_arrives_as_it_is(dtype: torch.dtype) -> None:
    source = Held(numbers(70, 1001, dtype=dtype))
    out, scattered = torch.zeros(70, 1001, dtype=dtype, device=SIM), torch.zeros(1001, 70, dtype=dtype, device=SIM).t()
    read_into([(out, source), (scattered, source)])
    assert same(out, source.tensor)
    assert same(scattered, source.tensor)


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize(
    ("source", "target", "crossing"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.int8, torch.float32, torch.int8),
        (torch.float16, torch.int64, torch.int64),
        (torch.float32, torch.complex64, torch.float32),
        (torch.bool, torch.float32, torch.bool),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_deferred", [False, True])
def test_values_cross_in_the_smaller_dtype_with_the_bits_of_the_host(
    source: torch.dtype, target: torch.dtype, crossing: torch.dtype, is_deferred: bool, copies: Copies
) -> None:
    given = Held(numbers(60, 1003, dtype=source))
    if is_deferred:
        with deferred():
            model = nn.Module()
            model.register_buffer("value", torch.empty(given.shape, dtype=target))
        bind(model.value, given)
        out = materialize(model, SIM).value
    else:
        out = torch.zeros(given.shape, dtype=target, device=SIM)
        read_into([(out, given)])
    assert out.device == torch.device(SIM)
    assert same(out, given.tensor.to(target))
    assert copies.size_bytes == out.numel() * crossing.itemsize
    assert copies.pageable_bytes == 0


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_targets_of_any_strides_are_filled(dtype: torch.dtype, copies: Copies) -> None:
    base = torch.zeros(40, 5000, dtype=dtype, device=SIM)
    targets = [
        torch.zeros(300, 201, dtype=dtype, device=SIM).t(),
        base[:, 10:4900],
        torch.zeros(6, 7, 8, 9, dtype=dtype, device=SIM).permute(3, 0, 2, 1),
        torch.zeros((), dtype=dtype, device=SIM),
        torch.zeros(0, 4, dtype=dtype, device=SIM),
        torch.zeros(4, 0, dtype=dtype, device=SIM).t(),
        torch.zeros(30_000, 2, dtype=dtype, device=SIM)[:, 1],
        torch.zeros(1, 70_000, 2, dtype=dtype, device=SIM)[..., 0],
    ]
    pairs = [(target, Held(numbers(*target.shape))) for target in targets]
    read_into(pairs)
    for target, source in pairs:
        assert same(target, source.tensor.to(dtype))
    assert not base[:, :10].any()
    assert not base[:, 4900:].any()
    assert copies.pageable_bytes == 0
    assert copies.size_bytes == sum(t.numel() for t in targets) * min(4, dtype.itemsize)


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_takes_what_is_given_goes_the_same_way(dtype: torch.dtype, copies: Copies) -> None:
    for target in (torch.zeros(30, 5000, dtype=dtype, device=SIM), torch.zeros(5000, 30, dtype=dtype, device=SIM).t()):
        source = Held(numbers(30, 5000))
        fill_from(target, source)
        assert same(target, source.tensor.to(dtype))
    assert copies.pageable_bytes == 0
    assert copies.size_bytes == 2 * 150_000 * dtype.itemsize


class Failing(Held):
    def read(self, start: int, out: Tensor) -> None:
        if start > 0:
            raise OSError("the disk fails")
        super().read(start, out)


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("way", ["read_into", "take", "materialize"])
def test_an_error_while_reading_arrives_and_the_device_works_on(way: str) -> None:
    good, bad = Held(numbers(100_000)), Failing(numbers(100, 1000))
    outs = [torch.zeros(100_000, device=SIM), torch.zeros(100, 1000, device=SIM)]
    with deferred():
        model = nn.Linear(1000, 100, bias=False)
    bind(model.weight, bad)
    ways = {
        "read_into": lambda: read_into([(outs[0], good), (outs[1], bad)]),
        "take": lambda: fill_from(outs[1], bad),
        "materialize": lambda: materialize(model, SIM),
    }
    before = torch.accelerator.current_stream(), torch.accelerator.current_device_index()
    with pytest.raises(OSError, match="the disk fails"):
        ways[way]()
    assert (torch.accelerator.current_stream(), torch.accelerator.current_device_index()) == before
    read_into([(outs[0], good)])
    assert same(outs[0], good.tensor)


@pytest.mark.usefixtures("ring")
def test_another_device_than_the_current_one_is_filled_and_the_current_one_stays(copies: Copies) -> None:
    torch.accelerator.set_device_index(0)
    mine = torch.Stream(device=OTHER)
    with torch.accelerator.device_index(1):
        torch.accelerator.set_stream(mine)
    torch.accelerator.set_device_index(0)
    before = torch.accelerator.current_stream(SIM), torch.accelerator.current_stream(OTHER)
    pairs = [(torch.zeros(100_000, device=device), Held(numbers(100_000) + index)) for index, device in
             enumerate((OTHER, SIM, OTHER))]  # fmt: skip
    scattered = torch.zeros(300, 301, dtype=torch.float64, device=OTHER).t()
    source = Held(numbers(301, 300))
    peak = peak_of(lambda: read_into([*pairs, (scattered, source)]))
    assert all(same(out, given.tensor) for out, given in pairs)
    assert same(scattered, source.tensor.double())
    assert torch.accelerator.current_device_index() == 0
    assert (torch.accelerator.current_stream(SIM), torch.accelerator.current_stream(OTHER)) == before
    assert peak == 0, "what arrives on one device takes memory on another"
    with deferred():
        model = nn.Linear(300, 300)
    assert materialize(model, OTHER).weight.device == torch.device(OTHER)


@pytest.mark.usefixtures("ring")
def test_inference_tensors_are_filled() -> None:
    source = Held(numbers(90_000))
    with torch.inference_mode():
        out = torch.zeros(90_000, device=SIM)
        double = torch.zeros(90_000, dtype=torch.float64, device=SIM)
        read_into([(out, source), (double, source)])
        assert same(out, source.tensor)
        assert same(double, source.tensor.double())
        with deferred():
            model = nn.Linear(300, 300)
        materialize(model, SIM)
        assert float(model.weight.std()) > 0


class Net(nn.Module):
    """Recipes of every kind: fills, constants, computed ones, one that is made whole, ties, a cast."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(501, 65)
        self.head = nn.Linear(65, 501, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(65)
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(65, 65)))
        self.scaled = nn.Parameter(torch.randn(300, 65) * 0.02)
        self.rounded = nn.Parameter(torch.randn(300, 65, dtype=torch.bfloat16).float())
        self.register_buffer("places", torch.arange(65))
        self.register_buffer("flags", torch.ones(65, dtype=torch.bool))


@pytest.mark.usefixtures("ring")
def test_recipes_of_the_cpu_are_made_there_and_moved(copies: Copies) -> None:
    torch.manual_seed(1)
    eager = Net()
    after = torch.rand(3)
    torch.manual_seed(1)
    with deferred():
        model = Net()
    assert torch.equal(torch.rand(3), after)
    states = torch.get_rng_state(), torch.sim.get_rng_state(SIM)  # type: ignore[attr-defined]
    materialize(model, SIM)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], torch.sim.get_rng_state(SIM))  # type: ignore[attr-defined]
    assert model.head.weight is model.embedding.weight
    for name, value in eager.state_dict().items():
        assert model.state_dict()[name].device == torch.device(SIM), name
        assert same(model.state_dict()[name], value), name
    assert copies.pageable_bytes == 0
    largest = sum(value.numel() * value.element_size() for value in [*eager.parameters(), *eager.buffers()])
    assert copies.size_bytes < largest, "constants are filled in on the device, and bfloat16 crosses as it is"


def test_recipes_of_another_device_are_not_drawn_or_computed_on_the_host() -> None:
    with torch.device(SIM), deferred(SIM):
        model = Net()
    bind(model.scaled, Held(numbers(300, 65)))
    maker = {group.targets[0].fqn: group.source.maker(SIM) for group in Plan.of(model).groups}
    assert {name for name, found in maker.items() if found is not None} == {
        "norm.weight", "norm.bias", "scaled", "flags",
    }  # fmt: skip


@pytest.mark.usefixtures("ring")
def test_joined_and_split_tensors_of_files_arrive(copies: Copies) -> None:
    files = [Held(numbers(100, 300, dtype=torch.bfloat16) + index) for index in range(3)]
    with deferred():
        tensors = [torch.empty(file.shape, dtype=torch.bfloat16) for file in files]
        for tensor, file in zip(tensors, files, strict=True):
            bind(tensor, file)
        joined = ComputedSource(torch.cat(tensors))
        turned = ComputedSource(tensors[0].t())
        part = ComputedSource(tensors[1][20:50])
    whole = torch.cat([file.tensor for file in files])
    expected = [whole, files[0].tensor.t(), files[1].tensor[20:50]]
    outs = [torch.zeros(given.shape, dtype=torch.float32, device=SIM) for given in (joined, turned, part)]
    read_into(list(zip(outs, (joined, turned, part), strict=True)))
    for out, value in zip(outs, expected, strict=True):
        assert same(out, value.float())
    assert copies.size_bytes == 2 * sum(value.numel() for value in expected)
    assert copies.pageable_bytes == 0


@pytest.mark.usefixtures("ring")
def test_a_state_dicts_tensors_arrive(copies: Copies) -> None:
    weight = torch.randn(300, 400)
    with deferred():
        model = nn.Linear(400, 300, bias=False)
    bind(model.weight, TensorSource(weight))
    materialize(model, SIM)
    assert same(model.weight, weight)
    assert (copies.size_bytes, copies.pageable_bytes) == (weight.numel() * 4, 0)


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("device", [SIM, OTHER], ids=str)
def test_a_state_dicts_tensors_that_are_on_a_device_are_copied_there(device: str, copies: Copies) -> None:
    weight = torch.randn(300, 400)
    resident = TensorSource(weight.to(device))
    with deferred():
        model = nn.Linear(400, 300, bias=False)
    bind(model.weight, resident)
    copies.reset()
    materialize(model, SIM)
    outs = [torch.zeros(300, 400, dtype=torch.float64, device=SIM), torch.zeros(400, 300, device=SIM).t()]
    read_into([(out, resident) for out in outs])
    fill_from(taken := torch.zeros(300, 400, device=SIM), resident)
    for out in (model.weight, *outs, taken):
        assert same(out, weight.to(out.dtype))
    assert copies.number == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_element_of_a_given_tensor_on_a_device_that_changes_is_noticed(layout: str, copies: Copies) -> None:
    whole = torch.randn(40, 51).to(SIM)
    loaded = LAYOUTS[layout](whole)
    copies.reset()
    given = TensorSource(loaded)
    given.check_unchanged()
    assert copies.number == 0
    kept = loaded.clone()
    for place in {(0,) * loaded.dim(), tuple(length - 1 for length in loaded.shape)}:
        loaded.data[place] = 3.0 if loaded.dtype != torch.bool else ~kept[place]
        with pytest.raises(DeferredEditError, match="changed in place"):
            given.check_unchanged()
        loaded.data[place] = kept[place]
        given.check_unchanged()


def test_a_tensor_on_a_device_that_changes_after_it_was_loaded_is_an_error_by_name() -> None:
    for is_inside in (False, True):
        with torch.device(SIM), deferred(SIM):
            model = nn.Linear(4, 4, bias=False)
        loaded = torch.ones(4, 4, device=SIM)
        with resumed(model) if is_inside else nullcontext():
            model.load_state_dict({"weight": loaded})
        loaded.data[2, 3] = 7
        with pytest.raises(DeferredEditError, match=r"changed in place \(weight\)"):
            materialize(model, SIM)


def test_a_given_tensor_that_is_freed_lasts_as_long_as_the_stream_that_copies_it() -> None:
    source = torch.randn(300, 300)
    for is_taken in (False, True):
        stream, given = torch.Stream(device=SIM), source.to(SIM)
        with torch.device(SIM), deferred(SIM):
            model = nn.Linear(300, 300, bias=False)
            model.load_state_dict({"weight": given})
            if is_taken:
                model.weight = nn.Parameter(torch.sin(model.weight))
        stream.wait_stream(torch.accelerator.current_stream())
        with stream:
            materialize(model, SIM)
        del given
        rubbish = torch.empty(300, 300, device=SIM).fill_(3.0)
        stream.synchronize()
        assert same(model.weight, torch.sin(source.to(SIM)) if is_taken else source)
        del rubbish


class Halves(Conversion):
    """Blocks of numbers as bfloat16 and the largest of each block."""

    def __init__(self, block: int) -> None:
        self.block = block

    def __repr__(self) -> str:
        return f"Halves({self.block})"

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        blocks = -(-math.prod(shape) // self.block)
        return Layout(self.block, (Output(shape, torch.bfloat16, self.block), Output((blocks,), torch.float32, 1)))

    def convert(self, values: Tensor, outs: Any) -> None:
        outs[0].copy_(values)
        for number, first in enumerate(range(0, values.numel(), self.block)):
            outs[1][number] = values[first : first + self.block].abs().max()


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1000, 100_000])
@pytest.mark.parametrize("source", ["file", "drawn", "whole"])
def test_what_is_converted_arrives_in_pieces_and_is_converted_there(
    dtype: torch.dtype, block: int, source: str, copies: Copies
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(4)
        weight = torch.randn(351, 300)
        return nn.ParameterDict({"weight": nn.Parameter(nn.init.orthogonal_(weight) if source == "whole" else weight)})

    file = Held(numbers(351, 300, dtype=dtype))
    value = file.tensor.float() if source == "file" else make()["weight"].detach()
    expected = converted(value, Halves(block))
    with deferred():
        model = make()
        if source == "file":
            bind(model["weight"], file)
        outs = convert(model["weight"], Halves(block))
        held = nn.Module()
        held.register_buffer("codes", outs[0])
        held.register_buffer("scales", outs[1])
    peak = peak_of(lambda: materialize(held, SIM))
    assert same(held.codes, expected[0])
    assert same(held.scales, expected[1])
    crossing = dtype if source == "file" else torch.float32
    assert copies.size_bytes == value.numel() * crossing.itemsize
    assert copies.pageable_bytes == 0
    if block == 1000 and source != "whole":
        final = sum(out.numel() * out.element_size() for out in expected)
        assert peak <= final + BUFFER_BYTES + 8192, "one buffer, and little for each block"


@pytest.mark.usefixtures("ring")
def test_memory_is_that_of_the_values_and_one_buffer() -> None:
    files = [Held(numbers(200, 301, dtype=torch.bfloat16)) for _ in range(4)]
    with deferred():
        model = nn.ModuleList([nn.Linear(301, 200) for _ in range(8)])
    for line, file in zip(model, files, strict=False):
        bind(line.weight, file)
    final = sum(parameter.numel() * 4 for parameter in model.parameters())
    peak = peak_of(lambda: materialize(model, SIM))
    assert final <= peak <= final + BUFFER_BYTES


@pytest.mark.usefixtures("ring")
def test_a_value_that_is_made_whole_takes_its_own_memory_on_the_device() -> None:
    with deferred():
        model = nn.Module()
        for number in range(3):
            model.register_parameter(str(number), nn.Parameter(nn.init.orthogonal_(torch.empty(300, 301))))
    final = 3 * 300 * 301 * 4
    assert peak_of(lambda: materialize(model, SIM)) == final


def test_the_ring_is_pinned_at_most_three_buffers_and_as_small_as_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        made = original(*args, **kwargs)
        if kwargs.get("pin_memory"):
            pinned.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(torch, "empty", empty)
    read_into([(torch.zeros(1000, device=SIM), Held(numbers(1000)))])
    assert pinned == [staging.aligned(4000)]
    pinned.clear()
    monkeypatch.setattr(staging, "BUFFER_BYTES", BUFFER_BYTES)
    read_into([(torch.zeros(500_000, device=SIM), Held(numbers(500_000)))])
    assert pinned == [BUFFER_BYTES] * staging.NUM_BUFFERS
    assert staging.NUM_BUFFERS * (32 << 20) <= 96 << 20


class Unpinned(DeviceHooks):
    @property
    def pins_memory(self) -> bool:
        return False


@pytest.fixture
def _unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_table, "_chosen", dict(hooks_table._chosen))
    use_hooks("sim", Unpinned())


@pytest.mark.usefixtures("ring", "_unpinned")
def test_a_device_that_does_not_pin_memory_is_filled_by_copies_that_block(copies: Copies) -> None:
    sources = [Held(numbers(300, 301)), Held(numbers(300, 301, dtype=torch.bfloat16))]
    outs = [torch.zeros(300, 301, device=SIM), torch.zeros(301, 300, device=SIM).t()]
    read_into(list(zip(outs, sources, strict=True)))
    assert all(same(out, source.tensor.float()) for out, source in zip(outs, sources, strict=True))
    assert copies.pageable_bytes == copies.size_bytes > 0


@pytest.mark.usefixtures("ring")
def test_a_storage_is_moved_as_it_is(copies: Copies) -> None:
    source = numbers(100_001)
    target = torch.UntypedStorage(source.numel() * 4 + 100, device=SIM)
    move(source.untyped_storage(), target)
    found = torch.empty(0, device=SIM).set_(target, 0, (source.numel(),), (1,))
    assert same(found, source)
    assert (copies.size_bytes, copies.pageable_bytes) == (source.numel() * 4, 0)


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pending_work_still_finds_what_the_memory_held(dtype: torch.dtype) -> None:
    out = torch.full((50_000,), 3.0, dtype=dtype, device=SIM)
    before = torch.empty_like(out)
    before.copy_(out)  # It waits in the queue of the current stream.
    source = Held(numbers(50_000))
    read_into([(out, source)])
    assert same(before, torch.full((50_000,), 3.0, dtype=dtype))
    assert same(out, source.tensor.to(dtype))


@pytest.mark.usefixtures("ring")
def test_staging_works_from_a_stream_of_the_callers_own() -> None:
    source = Held(numbers(50_000))
    with torch.Stream(device=SIM):
        out = torch.zeros(50_000, dtype=torch.float64, device=SIM)
        stream = torch.accelerator.current_stream()
        read_into([(out, source)])
        assert torch.accelerator.current_stream() == stream
        twice = torch.empty_like(out)
        twice.copy_(out)
    assert same(out, source.tensor.double())
    torch.accelerator.synchronize()
    assert same(twice, source.tensor.double())


@pytest.fixture
def mesh(sim: Any) -> Iterator[Any]:
    """The second of three ranks, without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        yield init_device_mesh("sim", (3,))
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("source", ["drawn", "file", "whole", "loaded later"])
def test_a_rank_makes_and_sends_its_shard_alone(dim: int, source: str, mesh: Any, copies: Copies) -> None:
    file = Held(numbers(300, 210))

    def make() -> nn.Module:
        torch.manual_seed(6)
        model = nn.Linear(210, 300, bias=False)
        if source == "whole":
            nn.init.orthogonal_(model.weight)
        return model

    whole = make().weight.detach() if source in ("drawn", "whole") else file.tensor
    with deferred():
        model = make()
    if source == "file":
        bind(model.weight, file)
    plan = Plan.of(model)
    plan.release()
    local = torch.empty([length // 3 if axis == dim else length for axis, length in enumerate((300, 210))],
                        device="meta")  # fmt: skip
    model.weight = nn.Parameter(
        DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()),
        requires_grad=False,
    )
    peak = peak_of(lambda: execute(plan, model, torch.device(SIM)))
    shard = model.weight.to_local()
    if source == "loaded later":
        copies.reset()
        read_into([(model.weight, file)])
    assert shard.device == torch.device(SIM)
    assert same(shard, whole.chunk(3, dim)[1])
    assert copies.pageable_bytes == 0
    assert copies.size_bytes == shard.numel() * 4
    assert peak <= shard.numel() * 4 + BUFFER_BYTES


_waits: list[tuple[int, int]] = []


class Noting(torch.Stream):
    """A stream that notes which stream waits for which."""

    def wait_stream(self, stream: Any) -> None:
        _waits.append((self.stream_id, stream.stream_id))
        super().wait_stream(stream)


class NotingHooks(DeviceHooks):
    def make_stream(self, device: torch.device) -> torch.Stream:
        return Noting(device=device)

    def current_stream(self, device: torch.device) -> torch.Stream:
        found = super().current_stream(device)
        return Noting(stream_id=found.stream_id, device_index=found.device_index, device_type=found.device_type)


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("fails", [False, True])
def test_streams_wait_for_one_another_wherever_memory_changes_hands(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_table, "_chosen", {"sim": NotingHooks()})
    _waits.clear()
    out = torch.zeros(10_000, dtype=torch.float64, device=SIM)
    with suppress(OSError), Staging(torch.device(SIM), 40_000) as ring:
        values = ring.buffer()[:40_000].view(torch.float32).copy_(numbers(10_000))
        begun = list(_waits)
        ring.send(values, out)
        ring.send(values, out)
        if fails:
            raise OSError
    ((side, current),) = begun
    # Memory for the cast comes from the current stream, once, and goes back to it.
    assert _waits == [(side, current), (side, current), (current, side)]
    assert same(out, numbers(10_000).double())


@pytest.mark.usefixtures("ring")
@pytest.mark.parametrize("function", [torch.sin, lambda value: value.t() @ value, torch.rand_like])
def test_what_the_device_computes_of_a_file_is_computed_there(function: Any, copies: Copies) -> None:
    file = Held(numbers(120, 110))
    torch.manual_seed(2)
    expected = function(file.tensor.to(SIM))
    torch.manual_seed(2)
    with deferred(SIM):
        tensor = torch.empty(file.shape, device=SIM)
        bind(tensor, file)
        given = ComputedSource(function(tensor))
    out = torch.zeros(given.shape, device=SIM)
    read_into([(out, given)])
    assert same(out, expected)
    out = torch.zeros(given.shape, dtype=torch.float64, device=SIM)
    fill_from(out, given)
    assert same(out, expected.double())
