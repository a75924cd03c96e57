"""Small torch files: `load_raw` and `setup` beside `torch.load` and `load_state_dict`, each in a fresh process, twice.

`python -m tests.bench.small_files nucleate FILE` is the program that is timed; the function `small_files` times it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from tests.bench.markdown import table
from tests.bench.measure import in_process, report, take
from tests.bench.section import Section

#: The files: the size in MB and the number of tensors.
FILES = (
    (3, 1),
    (3, 60),
    (5, 312),
    (8, 20),
    (12, 500),
    (16, 1),
    (20, 100),
    (30, 200),
    (45, 150),
    (60, 400),
    (80, 40),
    (90, 500),
)
LIBRARIES = ("nucleate", "torch")


class Bag(nn.Module):
    """A model with parameters of one shape.

    Args:
        num_tensors: The number of parameters.
        numel: The number of elements of each parameter.
    """

    def __init__(self, num_tensors: int, numel: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(numel // 64, 64)) for _ in range(num_tensors)])


def small_files(runs: int, files: Path | None) -> Section:
    """Measure the time that a model takes to get its weights from a file."""
    folder = (files or Path(tempfile.gettempdir())) / "small-files"
    folder.mkdir(parents=True, exist_ok=True)
    for size_mb, num_tensors in FILES:
        torch.manual_seed(size_mb)
        tensors = {
            f"parts.{place}": torch.randn(_numel(size_mb, num_tensors) // 64, 64) for place in range(num_tensors)
        }
        torch.save(tensors, _path(folder, size_mb, num_tensors))
    measurements = {
        _name(size_mb, num_tensors, library): partial(
            in_process, "-m", "tests.bench.small_files", library, str(_path(folder, size_mb, num_tensors))
        )
        for size_mb, num_tensors in FILES
        for library in LIBRARIES
    }
    taken = take(measurements, runs, what="small files")
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {"again_s": [], "first_s": []}
    for size_mb, num_tensors in FILES:
        name = f"{size_mb} MB, {num_tensors} tensor{'s' * (num_tensors > 1)}"
        row = [name]
        for key, every in ratios.items():
            ours, theirs = (taken[_name(size_mb, num_tensors, library)].median(key) for library in LIBRARIES)
            every.append(ours / theirs)
            row += [f"{1000 * ours:.1f}", f"{1000 * theirs:.1f}", f"{ours / theirs:.2f}"]
        rows.append(row)
    rows.append(["median"] + [part for every in ratios.values() for part in ("", "", f"{median(every):.2f}")])
    faults = [f"small files, {each}: {one.failure}" for each, one in taken.items() if one.failure]
    columns = ["nucleate, ms", "torch, ms", "ratio"]
    header = ["a torch file", *columns, *(f"first: {column}" for column in columns)]
    return Section(table(header, rows), taken, faults)


def _name(size_mb: int, num_tensors: int, library: str) -> str:
    return f"{size_mb} MB, {num_tensors} tensors, {library}"


def _numel(size_mb: int, num_tensors: int) -> int:
    return size_mb * 1_000_000 // 4 // num_tensors


def _path(folder: Path, size_mb: int, num_tensors: int) -> Path:
    return folder / f"{size_mb}-{num_tensors}.pt"


def main(library: str, file: str) -> None:
    load = _nucleate if library == "nucleate" else _torch
    report({"first_s": load(file), "again_s": load(file)})


def _nucleate(file: str) -> float:
    from nucleate import Runtime

    size_mb, num_tensors = _parts(file)
    runtime = Runtime(accelerator="cpu")
    with runtime.init_module(empty_init=True):
        bag = Bag(num_tensors, _numel(size_mb, num_tensors))
    start = time.perf_counter()
    runtime.load_raw(file, bag)
    model = runtime.setup(bag)
    return _checked(model, file, time.perf_counter() - start)


def _torch(file: str) -> float:
    size_mb, num_tensors = _parts(file)
    bag = Bag(num_tensors, _numel(size_mb, num_tensors))
    start = time.perf_counter()
    bag.load_state_dict(torch.load(file, weights_only=True))
    return _checked(bag, file, time.perf_counter() - start)


def _checked(model: nn.Module, file: str, taken_s: float) -> float:
    """Return the time, if the model has the weights of the file."""
    size_mb, num_tensors = _parts(file)
    torch.manual_seed(size_mb)
    first = next(model.parameters())
    assert torch.equal(first, torch.randn(_numel(size_mb, num_tensors) // 64, 64)), "other weights"
    return taken_s


def _parts(file: str) -> tuple[int, int]:
    size_mb, num_tensors = Path(file).stem.split("-")
    return int(size_mb), int(num_tensors)


if __name__ == "__main__":
    main(*sys.argv[1:])
