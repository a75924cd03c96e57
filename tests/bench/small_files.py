"""Small torch files: `load_raw` and `setup` beside `torch.load` and `load_state_dict`, each in a fresh process.

`python -m tests.bench.small_files nucleate FILE` is the program that is timed; the function `small_files` times it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

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
#: The goals: the largest share of torch's time, for the median of the files, and for each file.
ALLOWED_MEDIAN, ALLOWED_EACH = 1.0, 1.5


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
        f"{size_mb} MB, {num_tensors} tensors, {library}": partial(
            in_process, "-m", "tests.bench.small_files", library, str(_path(folder, size_mb, num_tensors))
        )
        for size_mb, num_tensors in FILES
        for library in LIBRARIES
    }
    taken = take(measurements, runs, what="small files")
    rows, ratios = [], []
    for size_mb, num_tensors in FILES:
        name = f"{size_mb} MB, {num_tensors} tensors"
        ours, theirs = (taken[f"{name}, {library}"].median("wall_s") for library in LIBRARIES)
        ratios.append(ours / theirs)
        times = [f"{1000 * each:.1f}" for each in (ours, theirs)]
        rows.append([name, *times, f"{ours / theirs:.2f}"])
    rows.append(["median of the ratios", "", "", f"{median(ratios):.2f}"])
    faults = [f"small files, {each}: {one.failure}" for each, one in taken.items() if one.failure]
    header = ["a torch file", "nucleate, ms", "torch, ms", "ratio"]
    return Section(table(header, rows), taken, faults)


def _numel(size_mb: int, num_tensors: int) -> int:
    return size_mb * 1_000_000 // 4 // num_tensors


def _path(folder: Path, size_mb: int, num_tensors: int) -> Path:
    return folder / f"{size_mb}-{num_tensors}.pt"


def main(library: str, file: str) -> None:
    size_mb, num_tensors = map(int, Path(file).stem.split("-"))
    numel = _numel(size_mb, num_tensors)
    model: Any
    if library == "nucleate":
        from nucleate import Runtime

        runtime = Runtime(accelerator="cpu")
        with runtime.init_module(empty_init=True):
            model = Bag(num_tensors, numel)
        start = time.perf_counter()
        runtime.load_raw(file, model)
        model = runtime.setup(model)
    else:
        model = Bag(num_tensors, numel)
        start = time.perf_counter()
        model.load_state_dict(torch.load(file, weights_only=True))
    wall_s = time.perf_counter() - start
    torch.manual_seed(size_mb)
    assert torch.equal(next(model.parameters()), torch.randn(numel // 64, 64)), "other weights"
    report({"wall_s": wall_s})


if __name__ == "__main__":
    main(*sys.argv[1:])
