"""One case, made eagerly and deferred from the same seed, and what came of it.

Both are made on the device that `NUCLEATE_TEST_DEVICE` names; see `tests/device.py`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nucleate import Runtime
from nucleate.deferred import Record, deferred, handle_of, held_tensors, resumed
from nucleate.deferred.replay.replayer import backward_slice
from nucleate.deferred.tape.coverage import is_written
from nucleate.deferred.tape.steps import Step
from nucleate.deferred.tape.tape import Tape
from nucleate.materialize import materialize
from nucleate.materialize.vacancies import vacancies
from tests.architectures.case import Case, Family, NotBuildable
from tests.deferred.equality import bits, differences, named_attributes, named_tensors, seed_everything, streams
from tests.device import ACCELERATOR, device, on_device

SEED = 1234

#: The outcomes. `HEAP`: equal but for parameters that eager construction leaves as heap memory, which has been shown.
EXACT, HEAP, DIFFERENT, UNBUILDABLE = "exact", "eager leaves heap memory", "different", "not buildable eagerly"


@dataclass(slots=True)
class Verdict:
    """What came of one case.

    Attributes:
        name: The case.
        outcome: One of the outcomes above.
        details: Differences, the eager error, or the names of what eager construction leaves as heap memory.
        early: Where values were made while recording: `(what asked, for what, how many elements, is a parameter)`.
        num_parameters: How many elements its parameters have.
        num_tensors: How many tensors were compared.
        eager_s: Seconds that eager construction took.
        recording_s: Seconds that deferred construction took.
        note: The case's own.
    """

    name: str
    outcome: str
    details: list[str] = field(default_factory=list)
    early: list[tuple[str, str, int, bool]] = field(default_factory=list)
    num_parameters: int = 0
    num_tensors: int = 0
    eager_s: float = 0.0
    recording_s: float = 0.0
    note: dict[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge(family: Family, name: str) -> Verdict:
    """Make a case both ways and compare."""
    verdict = Verdict(name, UNBUILDABLE)
    try:
        case = family.case(name)
        verdict.note = case.note
        # Once for what is done only the first time, such as imports and caches.
        seed_everything(SEED)
        _made(case)
        seed_everything(SEED)
        started = time.perf_counter()
        eager = _made(case)
        verdict.eager_s = time.perf_counter() - started
        if case.by_hand is not None:
            case.by_hand(eager)
    except NotBuildable as error:
        verdict.details = [str(error)]
        return verdict
    except Exception as error:
        verdict.details = [f"{type(error).__name__}: {str(error)[:500]}"]
        return verdict
    after = streams()
    verdict.num_parameters = sum(parameter.numel() for parameter in eager.parameters() if not is_lazy(parameter))
    verdict.num_tensors = len(named_tensors(eager)) + len(named_attributes(eager))
    try:
        _compare(case, eager, after, verdict)
    except Exception as error:
        verdict.outcome = DIFFERENT
        frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        verdict.details = [f"{type(error).__name__}: {str(error)[:600]}", " < ".join(reversed(frames[-12:]))]
    return verdict


def _compare(case: Case, eager: nn.Module, after: tuple[Any, ...], verdict: Verdict) -> None:
    seed_everything(SEED)
    started = time.perf_counter()
    with on_device(), deferred(device()) as record, _noticed(record, verdict.early) as mark_parameters:
        model = case.make()
        mark_parameters(model)
    verdict.recording_s = time.perf_counter() - started
    found = []
    # What is made by hand draws after construction.
    if streams() != after and case.by_hand is None:
        found.append("construction leaves a random stream elsewhere")
    # Else the modules' own methods would fill what eager construction leaves as heap memory.
    unwritten = _fill_unwritten(model, record) if case.by_hand is None and vacancies(model) else []
    if case.by_hand is not None:
        Runtime(accelerator=ACCELERATOR, strategy="single_device").setup(model)
    else:
        materialize(model, device())
    if streams() != after and not found:
        found.append("materialization moves a random stream")
    found += [line for line in differences(eager, model) if not any(line.startswith(f"{n}:") for n in unwritten)]
    if unwritten:
        written = _not_poisoned(case, unwritten)
        found += [f"{name}: refused as never written, but eager construction writes it" for name in written]
    if case.forward is not None and not found and not unwritten and _output(case, eager) != _output(case, model):
        found.append("forward: other values")
    verdict.outcome = DIFFERENT if found else HEAP if unwritten else EXACT
    verdict.details = found[:20] if found else unwritten


def _output(case: Case, model: nn.Module) -> bytes:
    """Return the bits of what a model answers, from the same random state each time."""
    assert case.forward is not None
    seed_everything(SEED)
    with on_device():
        return bits(case.forward(model))


def _made(case: Case) -> nn.Module:
    with on_device():
        return case.make()


def _fill_unwritten(model: nn.Module, record: Record) -> list[str]:
    """Give what nothing initializes a value, so that the rest can be made, and return its names."""
    names: list[str] = []
    with torch._C.DisableTorchFunctionSubclass():
        held = [
            (f"{prefix}.{name}" if prefix else name, tensor)
            for prefix, module in model.named_modules()
            for _, name, tensor in held_tensors(module)
            if handle_of(tensor) is not None
        ]
        unwritten = {name for name, tensor in held if not is_written(record.tape, record.tape.ref(tensor))}
    with resumed(model):
        for name, tensor in held:
            if name in unwritten:
                names.append(name)
                with torch.no_grad():
                    tensor.zero_()
    return list(dict.fromkeys(names))


def _not_poisoned(case: Case, names: list[str]) -> list[str]:
    """Return those of `names` that eager construction writes: new memory is filled with NaN, and they hold none."""
    seed_everything(SEED)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        model = _made(case)
    finally:
        torch.use_deterministic_algorithms(False)
    tensors = {**named_tensors(model), **named_attributes(model)}
    return [name for name in names if name in tensors and not _holds_poison(tensors[name])]


def _holds_poison(tensor: Tensor) -> bool:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(tensor.isnan().any())
    return bool((tensor == (True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)).any())


@contextmanager
def _noticed(record: Record, early: list[tuple[str, str, int, bool]]) -> Iterator[Callable[[nn.Module], None]]:
    """Note each value that is made while recording, and who wanted it."""
    replayer, tape = record.replayer, record.tape
    contents, execute = replayer.contents, replayer.execute_unrecorded
    made: list[tuple[str, str, int, set[int]]] = []

    def noticed_contents(
        steps: list[Step], storages: Sequence[int], device: torch.device | None = None
    ) -> dict[int, torch.UntypedStorage]:
        size = max(map(tape.size_bytes, storages), default=0)
        made.append((_asker(), _caller(), size // 4, {*storages, *_touched(steps)}))
        return contents(steps, storages, device)

    def noticed_execute(step: Any) -> Any:
        read = sorted({*step.reads, *step.writes} - set(step.overwrites))
        storages = _needed(tape, read)
        size = max((tape.size_bytes(storage) for storage in storages), default=0)
        made.append((str(step.func), _caller(), size // 4, storages))
        return execute(step)

    def mark_parameters(model: nn.Module) -> None:
        held = {tape.number(parameter) for parameter in model.parameters()}
        early.extend((asker, caller, numel, bool(storages & held)) for asker, caller, numel, storages in made)

    replayer.contents, replayer.execute_unrecorded = noticed_contents, noticed_execute  # type: ignore[method-assign]
    try:
        yield mark_parameters
    finally:
        del replayer.contents, replayer.execute_unrecorded  # type: ignore[method-assign]


def _needed(tape: Tape, storages: list[int]) -> set[int]:
    """Return the storages that are made to make `storages`, with these."""
    return {*storages, *_touched(backward_slice(tape, storages))}


def _touched(steps: list[Step]) -> set[int]:
    return {storage for step in steps for storage in (*step.creates, *step.writes)}


_PACKAGE = str(Path(sys.modules["nucleate"].__file__ or "").parent)
_TORCH = str(Path(torch.__file__).parent)


def _asker() -> str:
    """Return which of the recorder's functions wanted a value, and for which operation."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name in (
        "_construct",
        "<lambda>",
        "map_leaves",
        "<listcomp>",
        "<dictcomp>",
        "_resolve",
    ):
        frame = frame.f_back
    func = frame.f_locals.get("func")
    return f"{frame.f_code.co_name}({getattr(func, '__name__', func)})"


def _caller() -> str:
    """Return the line of the constructor that leads here."""
    frame = sys._getframe(2)
    here = (__file__, _PACKAGE, _TORCH)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
