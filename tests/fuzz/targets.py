"""What is fed with bytes at random: each must read them, or raise a CheckpointError, and nothing else.

`seeds` of each target is where the search begins: whole checkpoints, as the formats' own writers write them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from nucleate.checkpoint.readers import open_checkpoint
from nucleate.errors import CheckpointError

#: Tensors of more than this are not read: a file of a few bytes may hold a few bytes, often named.
MAX_BYTES = 1 << 22


def small_state() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(6.0).view(2, 3),
        "b": torch.ones((), dtype=torch.bfloat16),
        "c": torch.zeros(0, 2),
    }


def read_all(path: Path) -> None:
    """Read everything at `path`, or raise a CheckpointError."""
    contents = open_checkpoint(path)
    for stored in contents.tensors.values():
        stored.check()
        if stored.size_bytes <= MAX_BYTES:
            stored.read(0, torch.empty(stored.numel, dtype=stored.dtype))


@contextmanager
def folder() -> Iterator[Path]:
    """Yield a folder in memory, where there is room for one."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def _read_file(name: str) -> Callable[[bytes], bool]:
    def run(data: bytes) -> bool:
        with folder() as place:
            (place / name).write_bytes(data)
            return _is_read(place / name)

    return run


def _read_folder(files: Callable[[bytes], dict[str, bytes]]) -> Callable[[bytes], bool]:
    def run(data: bytes) -> bool:
        with folder() as place:
            for name, content in files(data).items():
                (place / name).write_bytes(content)
            return _is_read(place)

    return run


def _is_read(path: Path) -> bool:
    try:
        read_all(path)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    # It must be one that a terminal and a log can show, of a size that somebody reads.
    assert len(message.encode("utf-8")) < 10_000, message[:1000]
    return False


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    Attributes:
        run: Reads bytes, and returns whether there was nothing wrong with them.
        seeds: Makes bytes that are right.
    """

    run: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]


def _safetensors_seeds() -> list[bytes]:
    return [safetensors.torch.save(small_state(), {"format": "pt"}), safetensors.torch.save({})]


def _torch_seeds() -> list[bytes]:
    state = {
        "model": OrderedDict(small_state()),
        "step": 3,
        "tuple": (1.5, "x", b"y", {1, 2}),
        "t": torch.ones(2, 3).t(),
    }
    seeds = []
    for options in ({}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}):
        file = io.BytesIO()
        torch.save(state, file, **options)
        seeds.append(file.getvalue())
    return seeds


def _pickle_seeds() -> list[bytes]:
    return [_records(data)["data.pkl"] for data in _torch_seeds()[:2]]


def _records(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {info.filename.partition("/")[2]: file.read(info) for info in file.infolist()}


_PARTS: dict[str, dict[str, bytes]] = {}


def _pickle_in_archive(data: bytes) -> bool:
    """Read a torch file with this pickle: bytes at random seldom make an archive."""
    if "torch" not in _PARTS:
        _PARTS["torch"] = _records(_torch_seeds()[0])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {**_PARTS["torch"], "data.pkl": data}.items():
            archive.writestr(f"archive/{name}", content)
    return _read_file("a.pt")(file.getvalue())


def _dcp_files() -> dict[str, bytes]:
    if "dcp" not in _PARTS:
        with folder() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": small_state(), "step": 3}, checkpoint_id=place / "c", no_dist=True)
            _PARTS["dcp"] = {file.name: file.read_bytes() for file in (place / "c").iterdir()}
    return _PARTS["dcp"]


def _dcp_with(name: str) -> Callable[[bytes], dict[str, bytes]]:
    return lambda data: {**_dcp_files(), name: data}


def _shards() -> dict[str, bytes]:
    state = small_state()
    return {
        "1.safetensors": safetensors.torch.save({"a.weight": state["a.weight"]}),
        "2.safetensors": safetensors.torch.save({"b": state["b"], "c": state["c"]}),
    }


def _index_seeds() -> list[bytes]:
    weight_map = {"a.weight": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    return [json.dumps({"metadata": {}, "weight_map": weight_map}).encode()]


TARGETS = {
    "safetensors": Target(_read_file("a.safetensors"), _safetensors_seeds),
    "index": Target(_read_folder(lambda data: {**_shards(), "model.safetensors.index.json": data}), _index_seeds),
    "torch": Target(_read_file("a.pt"), _torch_seeds),
    "pickle": Target(_pickle_in_archive, _pickle_seeds),
    "dcp": Target(_read_folder(_dcp_with("__0_0.distcp")), lambda: [_dcp_files()["__0_0.distcp"]]),
    "metadata": Target(_read_folder(_dcp_with(".metadata")), lambda: [_dcp_files()[".metadata"]]),
}
