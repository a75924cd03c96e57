"""Files that are read past the page cache have the same bytes, and leave the cache as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint.stored import direct
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.checkpoint.stored.direct import BLOCK_BYTES, MIN_DIRECT_BYTES, DirectFile, is_wanted
from nucleate.errors import CheckpointError
from tests.checkpoint.page_cache import cached_pages, drop

MIB = 1 << 20
SIZE = 2 * BLOCK_BYTES + 12_345


@pytest.fixture(scope="module")
def content() -> torch.Tensor:
    return torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path: Path, content: torch.Tensor) -> Path:
    """A file that is not in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(content.numpy().tobytes())
    drop(path)
    return path


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is larger than the memory that is left."""
    monkeypatch.setattr(direct, "available_bytes", lambda: 1)


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, SIZE),
        (0, MIN_DIRECT_BYTES),
        (4096, BLOCK_BYTES),
        (8, BLOCK_BYTES),
        (511, SIZE - 511),
        (SIZE - MIN_DIRECT_BYTES, MIN_DIRECT_BYTES),
        (4095, BLOCK_BYTES + 1),
        (1, SIZE - 2),
    ],
)
@pytest.mark.parametrize("shift", [0, 8, 64])
def test_any_range_has_the_files_bytes(path: Path, content: torch.Tensor, offset: int, size: int, shift: int) -> None:
    memory = torch.zeros(size + shift + 64, dtype=torch.uint8)
    out = memory[shift : shift + size]
    DataFile(path).read_into(out.data_ptr(), size, offset)
    assert torch.equal(out, content[offset : offset + size])
    assert not memory[:shift].any()
    assert not memory[shift + size :].any()
    assert cached_pages(path) == 0


@pytest.mark.usefixtures("wanted")
def test_pages_that_are_in_the_cache_are_read_from_there(path: Path, content: torch.Tensor, monkeypatch: Any) -> None:
    path.read_bytes()
    monkeypatch.setattr(DirectFile, "_pread", lambda *_: pytest.fail("the disk was asked"))
    out = torch.empty(SIZE, dtype=torch.uint8)
    DataFile(path).read_into(out.data_ptr(), SIZE, 0)
    assert torch.equal(out, content)
    assert cached_pages(path) > SIZE // 4096


def test_a_file_that_fits_beside_its_weights_stays_in_the_cache(path: Path, content: torch.Tensor) -> None:
    out = torch.empty(SIZE, dtype=torch.uint8)
    DataFile(path).read_into(out.data_ptr(), SIZE, 0)
    assert torch.equal(out, content)
    assert cached_pages(path) > SIZE // 4096


@pytest.mark.usefixtures("wanted")
def test_where_the_file_system_cannot_it_is_read_as_other_files_are(
    path: Path, content: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(DirectFile, "__init__", refuse)
    out = torch.empty(SIZE, dtype=torch.uint8)
    DataFile(path).read_into(out.data_ptr(), SIZE, 0)
    assert torch.equal(out, content)


@pytest.mark.usefixtures("wanted")
def test_a_read_that_the_disk_refuses_goes_through_the_cache(
    path: Path, content: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirectFile, "_pread", lambda *_: -1)
    out = torch.empty(SIZE, dtype=torch.uint8)
    DataFile(path).read_into(out.data_ptr(), SIZE, 0)
    assert torch.equal(out, content)


@pytest.mark.usefixtures("wanted")
def test_a_file_that_was_cut_short_is_an_error_that_names_it(path: Path) -> None:
    file = DataFile(path)
    os.truncate(path, BLOCK_BYTES)
    out = torch.empty(SIZE, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"file ends at byte 8388608.* was cut short after it was opened"):
        file.read_into(out.data_ptr(), SIZE, 0)


@pytest.mark.usefixtures("wanted")
def test_an_exchanged_file_does_not_change_what_is_read(path: Path, content: torch.Tensor) -> None:
    file = DataFile(path)
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.replace(path)
    out = torch.empty(SIZE, dtype=torch.uint8)
    file.read_into(out.data_ptr(), SIZE, 0)
    assert torch.equal(out, content)


@pytest.mark.parametrize(
    ("expected", "ranks", "available", "answer"),
    [
        (100, 1, 150, True),  # weights and cache do not fit
        (100, 1, 1000, False),
        (50, 2, 150, True),  # each rank reads its shards
        (100, 2, 150, False),  # each rank reads everything: the cache serves the second one
        (0, 2, 150, True),
        (100, 1, None, False),
    ],
)
def test_only_what_is_read_once_and_does_not_fit_is_read_past_the_cache(
    monkeypatch: pytest.MonkeyPatch, expected: int, ranks: int, available: int | None, answer: bool
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(direct, "available_bytes", lambda: available)
    assert is_wanted(expected, 100, 100) is answer


@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_model_is_loaded_past_the_cache(tmp_path: Path, precision: str) -> None:
    weights = {"0.weight": torch.randn(4096, 1024), "1.weight": torch.randn(4096, 1025)}
    save_file(weights, tmp_path / "model.safetensors")
    drop(tmp_path / "model.safetensors")
    runtime = Runtime(accelerator="cpu", precision=precision)
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(1024, 4096, bias=False), nn.Linear(1025, 4096, bias=False))
    runtime.load_raw(tmp_path, model)
    drop(tmp_path / "model.safetensors")  # the system reads ahead of a header
    loaded = runtime.setup(model).state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, weights[name].to(value.dtype)), name
    # The ends of stretches are too short.
    assert cached_pages(tmp_path / "model.safetensors") < 0.05 * 32 * MIB / 4096


def test_what_a_process_is_going_to_read_is_known_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr("nucleate.checkpoint.stored.data_file.is_wanted", lambda *sizes: asked.append(sizes) or False)
    for name in ("a", "b"):
        save_file({f"{name}.weight": torch.zeros(512, 512)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {f"{name}.weight": f"{name}.safetensors" for name in "ab"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    runtime = Runtime(accelerator="cpu")
    with runtime.init_module(empty_init=True):
        model = nn.ModuleDict({name: nn.Linear(512, 512, bias=False) for name in "ab"})
    runtime.load_raw(tmp_path, model)
    runtime.setup(model)
    size = (tmp_path / "a.safetensors").stat().st_size
    assert asked == [(MIB, size, 2 * size)] * 2
