"""What torch code on given tensors makes is read in ranges, from any thread, without a whole being held."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nucleate.deferred import ComputedSource, ElementSource, bind, deferred, eager, handle_of
from nucleate.materialize import materialize
from nucleate.materialize.plan import Plan
from tests.deferred.test_given import Held

Op = Callable[[list[Tensor]], Tensor]


def held(*shape: int, dtype: torch.dtype = torch.float32) -> Held:
    return Held(torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).view(shape).to(dtype))


def stand_ins(files: list[Held]) -> list[Tensor]:
    """Return deferred tensors that hold what is given; to be called while recording."""
    found = []
    for file in files:
        tensor = torch.empty(file.shape, dtype=file.dtype)
        bind(tensor, file)
        found.append(tensor)
    return found


def computed(files: list[Held], op: Op) -> ComputedSource:
    with deferred():
        return ComputedSource(op(stand_ins(files)))


def whole_of(given: ElementSource) -> Tensor:
    out = torch.empty(math.prod(given.shape), dtype=given.dtype)
    given.read(0, out)
    return out.view(given.shape)


def _moved(draw: Any, tensors: list[Tensor]) -> Callable[[list[Tensor]], Tensor]:
    """Return one operation that fits tensors of these shapes, as a function that appends its result."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    number = draw(st.integers(0, len(shapes) - 1))
    shape = shapes[number]
    dim = draw(st.integers(0, len(shape) - 1))
    kind = draw(
        st.sampled_from(
            ["transpose", "permute", "narrow", "split", "reshape", "cat", "stack", "clone", "to", "write", "interleave"]
        )
    )
    if kind == "transpose":
        other = draw(st.integers(0, len(shape) - 1))
        return lambda now: now[number].transpose(dim, other)
    if kind == "permute":
        order = draw(st.permutations(range(len(shape))))
        return lambda now: now[number].permute(order)
    if kind == "narrow":
        start = draw(st.integers(0, shape[dim] - 1))
        length = draw(st.integers(1, shape[dim] - start))
        return lambda now: now[number].narrow(dim, start, length)
    if kind == "split":
        size = draw(st.integers(1, shape[dim]))
        return lambda now: now[number].split(size, dim)[-1]
    if kind == "reshape":
        divisors = [n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]
        first = draw(st.sampled_from(divisors))
        if draw(st.booleans()):
            return lambda now: now[number].reshape(*shape[:dim], first, shape[dim] // first, *shape[dim + 1 :])
        return lambda now: now[number].reshape(-1, shape[-1])
    if kind == "cat":
        rest = (*shape[:dim], *shape[dim + 1 :])
        fitting = [
            place
            for place, other in enumerate(shapes)
            if len(other) == len(shape) and (*other[:dim], *other[dim + 1 :]) == rest
        ]
        places = draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=4))
        return lambda now: torch.cat([now[place] for place in places], dim)
    if kind == "stack":
        places = [place for place, other in enumerate(shapes) if other == shape][:3]
        return lambda now: torch.stack([now[place] for place in places], dim)
    if kind == "clone":
        memory_format = draw(st.sampled_from([torch.contiguous_format, torch.preserve_format]))
        return lambda now: now[number].clone(memory_format=memory_format)
    if kind == "to":
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
        return lambda now: now[number].to(dtype)
    if kind == "interleave":
        size = draw(st.integers(1, shape[0]))
        return lambda now: torch.cat([part for pair in [now[number].split(size)] * 2 for part in pair])
    start = draw(st.integers(0, shape[dim]))
    stop = draw(st.integers(start, shape[dim]))

    def write(now: list[Tensor]) -> Tensor:
        target = torch.zeros(shape, dtype=now[number].dtype)
        target.narrow(dim, start, stop - start).copy_(now[number].narrow(dim, start, stop - start))
        return target

    return write


@forall(st.data())
@settings(max_examples=300, deadline=None)
def test_any_range_of_any_chain_is_torchs(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3))
    files = [held(*shape) for shape in shapes]
    with deferred():
        real = [file.tensor for file in files]
        now = stand_ins(files)
        for _ in range(data.draw(st.integers(1, 6))):
            op = _moved(data.draw, now)
            now.append(op(now))
            with eager():
                real.append(op(real))
        given = ComputedSource(now[-1])
    assert (given.dtype, given.shape) == (real[-1].dtype, tuple(real[-1].shape))
    expected = real[-1].reshape(-1)
    for _ in range(3):
        start = data.draw(st.integers(0, expected.numel()))
        stop = data.draw(st.integers(start, expected.numel()))
        out = torch.full((stop - start,), -1, dtype=given.dtype)
        given.read(start, out)
        assert torch.equal(out, expected[start:stop])


MOVES: dict[str, tuple[list[tuple[int, ...]], Op]] = {
    "transposed": ([(512, 300)], lambda t: t[0].t()),
    "transposed copy": ([(512, 300)], lambda t: t[0].t().contiguous()),
    "cast": ([(512, 300)], lambda t: t[0].t().to(torch.bfloat16)),
    "joined": ([(64, 300), (32, 300)], lambda t: torch.cat(t)),
    "joined along the last dim": ([(64, 300), (64, 20)], lambda t: torch.cat(t, 1)),
    "joined transposed": ([(512, 300), (512, 100)], lambda t: torch.cat([t[0].t(), t[1].t()])),
    "transposed and joined along rows": ([(512, 30), (256, 30)], lambda t: torch.cat([t[0].t(), t[1].t()], 1)),
    "stacked": ([(64, 300), (64, 300)], lambda t: torch.stack(t, 1)),
    "split": ([(300, 512)], lambda t: t[0].split(256, 1)[1]),
    "heads": ([(8 * 16, 512)], lambda t: t[0].view(8, 2, 8, 512).transpose(1, 2).reshape(128, 512)),
    "interleaved": (
        [(8 * 16, 512), (4 * 16, 512)],
        lambda t: torch.cat([p for pair in zip(t[0].split(32), t[1].split(16), strict=True) for p in pair]),
    ),
    "transposed twice": ([(512, 300)], lambda t: t[0].t().contiguous().t().contiguous()),
    "expanded": ([(1, 300)], lambda t: t[0].expand(64, 300).contiguous()),
    "written into columns": ([(64, 300), (64, 20)], lambda t: _columns(t)),
}  # fmt: skip


def _columns(tensors: list[Tensor]) -> Tensor:
    target = torch.empty(64, 320)
    target[:, :300].copy_(tensors[0])
    target[:, 300:].copy_(tensors[1])
    return target


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_made_in_ranges_and_read_nothing_twice(name: str) -> None:
    shapes, op = MOVES[name]
    files = [held(*shape) for shape in shapes]
    given = computed(files, op)
    assert given.source() is not None, "it is made whole"
    assert torch.equal(whole_of(given), op([file.tensor for file in files]))
    assert sum(file.num_read for file in files) <= math.prod(given.shape)


@pytest.mark.parametrize("name", MOVES)
def test_half_of_the_rows_reads_about_half(name: str) -> None:
    shapes, op = MOVES[name]
    files = [held(*shape) for shape in shapes]
    given = computed(files, op)
    expected = op([file.tensor for file in files])
    rows = given.shape[0] // 2
    out = torch.empty(rows * math.prod(given.shape[1:]), dtype=given.dtype)
    given.read(out.numel(), out)
    assert torch.equal(out.view(rows, *given.shape[1:]), expected[rows : 2 * rows])
    assert sum(file.num_read for file in files) <= out.numel() + 300


def test_a_parameter_that_is_bound_to_it_is_made_of_it() -> None:
    files = [held(200, 300), held(100, 300)]
    with deferred():
        model = nn.Linear(300, 300)
    with deferred():
        joined = torch.cat(stand_ins(files))
    bind(model.weight, ComputedSource(joined))
    assert [file.ranges for file in files] == [[], []]
    materialize(model)
    assert torch.equal(model.weight, torch.cat([file.tensor for file in files]))
    assert [file.num_read for file in files] == [200 * 300, 100 * 300]


def test_the_record_of_the_model_may_be_that_of_the_files() -> None:
    files = [held(200, 300)]
    with deferred():
        model = nn.Linear(200, 300, bias=False)
        bind(model.weight, ComputedSource(stand_ins(files)[0].t()))
    assert Plan.of(model).digest()
    materialize(model)
    assert torch.equal(model.weight, files[0].tensor.t())


def test_a_parameter_that_lies_by_columns_is_made_of_it() -> None:
    file = held(20, 30)
    with deferred():
        model = nn.Module()
        model.weight = nn.Parameter(torch.empty(30, 20).t())
        bind(model.weight, ComputedSource(stand_ins([file])[0]))
    materialize(model)
    assert model.weight.stride() == (1, 20)
    assert torch.equal(model.weight, file.tensor)


def test_large_transpositions_are_made_by_several_threads() -> None:
    files = [held(2048, 1500)]
    with deferred():
        model = nn.Linear(2048, 1500, bias=False)
    bind(model.weight, computed(files, lambda tensors: tensors[0].t()))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        materialize(model)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(model.weight, files[0].tensor.t())
    assert files[0].num_read == 2048 * 1500


def test_later_writes_do_not_count_and_the_record_stays_alive() -> None:
    file = held(5, 6)
    with deferred() as record:
        tensor = stand_ins([file])[0]
        given = ComputedSource(tensor)
        tensor.zero_()
    kept = weakref.ref(record)
    del tensor, record
    gc.collect()
    assert kept() is not None
    assert torch.equal(whole_of(given), file.tensor)


def test_it_stays_what_it_is_when_its_tape_joins_another() -> None:
    file = held(5, 6)
    with deferred():
        model = nn.Linear(3, 3)
    with deferred():
        tensor = torch.cat(stand_ins([file, file]))
        given = ComputedSource(tensor)
    described = given.describe()
    with deferred():
        # The three meet.
        torch.cat([model.weight.view(-1), tensor.view(-1)])
    assert ComputedSource(tensor).describe() == described
    assert torch.equal(whole_of(given), torch.cat([file.tensor, file.tensor]))


def test_what_can_only_be_made_whole_is_made_once_and_let_go() -> None:
    file = held(40, 30)
    given = computed([file], lambda tensors: tensors[0].flip(0).cumsum(0))
    expected = file.tensor.flip(0).cumsum(0)
    assert given.source() is None
    with ThreadPoolExecutor(3) as pool:
        outs = [torch.empty(30) for _ in range(40)]
        list(pool.map(lambda row: given.read(30 * row, outs[row]), range(40)))
    assert torch.equal(torch.stack(outs), expected)
    assert file.num_read == 40 * 30
    assert given._whole is None


@pytest.mark.parametrize("make", [lambda: torch.randn(37, 29), lambda: nn.init.orthogonal_(torch.empty(8, 9))])
def test_random_numbers_are_those_of_the_stream(make: Callable[[], Tensor]) -> None:
    torch.manual_seed(3)
    torch.rand(3)
    expected = make()
    torch.manual_seed(3)
    with deferred():
        torch.rand(3)
        given = ComputedSource(make().t())
    out = torch.empty(29 * 3 if expected.numel() > 72 else 24)
    given.read(8, out)
    assert torch.equal(out, expected.t().reshape(-1)[8 : 8 + out.numel()])


def test_a_tensor_that_is_just_what_is_given_says_so() -> None:
    files = [held(5, 6), held(5, 6)]
    for op in (lambda t: t[0], lambda t: t[0].clone(), lambda t: t[0].t().t(), lambda t: torch.Tensor.detach(t[0])):
        assert computed(files, op).given() is files[0]
    for op in (lambda t: t[0].t(), lambda t: t[0][1:], lambda t: t[0].to(torch.float64), lambda t: torch.cat(t)):
        assert computed(files, op).given() is None


def test_its_description_says_what_was_given_and_what_was_done() -> None:
    files, others = [held(5, 6), held(5, 6)], [held(5, 6), held(5, 6, dtype=torch.bfloat16)]
    same = [computed(files, torch.cat).describe(), computed([held(5, 6), held(5, 6)], torch.cat).describe()]
    assert same[0] == same[1]
    different = [
        computed([*others[:1], held(5, 6, dtype=torch.float64)], lambda t: torch.cat([t[0], t[1].float()])).describe(),
        computed(files, lambda t: torch.cat(t, 1)).describe(),
        computed(files, lambda t: torch.cat(t)[1:]).describe(),
        computed(files, lambda t: torch.cat(t).t()).describe(),
    ]
    assert len({*different, same[0]}) == 5


def test_nothing_holds_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    file = held(4096, 1024)
    given = computed([file], lambda tensors: torch.cat([tensors[0].t(), tensors[0].t()]).to(torch.bfloat16))
    largest = [0]
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = real(*args, **kwargs)
        largest[0] = max(largest[0], tensor.numel() * tensor.element_size())
        return tensor

    out = torch.empty(2 * 4096 * 1024, dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "empty", empty)
    given.read(0, out)
    monkeypatch.undo()
    assert torch.equal(out.view(2048, 4096), torch.cat([file.tensor.t(), file.tensor.t()]).to(torch.bfloat16))
    assert 0 < largest[0] <= 2 << 20


def test_the_handle_of_a_guarded_tensor_is_enough() -> None:
    file = held(5, 6)
    with deferred():
        tensor = stand_ins([file])[0].t()
    assert handle_of(tensor) is not None
    assert torch.equal(whole_of(ComputedSource(tensor)), file.tensor.t())
