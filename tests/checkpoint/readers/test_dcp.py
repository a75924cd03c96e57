"""DCP folders: nucleate's own and anybody's, values and parts where they lie, and no code run."""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from nucleate.checkpoint import load, save, verify
from nucleate.checkpoint.readers import open_checkpoint
from nucleate.checkpoint.readers.dcp.dcp import DCPReader
from nucleate.checkpoint.stored import DataFile
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError, CheckpointNotFoundError
from tests.checkpoint.readers.reading import same_bits, tensor_at, whole


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


STATE = {
    "model": {"weight": torch.randn(3, 4), "bias": torch.randn(4).bfloat16()},
    "list": [torch.zeros(2), {"inner": torch.ones(1)}],
    "pair": (torch.arange(3), 5),
    "step": 3,
    "text": "x",
    "options": {"lr": 0.1, "betas": (0.9, 0.99)},
}


def test_a_state_of_anybodys_is_nested_as_it_was(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "c")
    contents = open_checkpoint(tmp_path / "c")
    assert contents.format == "dcp"
    assert not contents.is_complete
    assert contents.skeleton == {
        "model": {"weight": None, "bias": None},
        "list": [None, {"inner": None}],
        "pair": (None, 5),
        "step": 3,
        "text": "x",
        "options": {"lr": 0.1, "betas": (0.9, 0.99)},
    }
    assert same_bits(tensor_at(contents, "model", "weight"), STATE["model"]["weight"])
    assert same_bits(tensor_at(contents, "model", "bias"), STATE["model"]["bias"])
    assert same_bits(tensor_at(contents, "list", 1, "inner"), torch.ones(1))
    assert same_bits(tensor_at(contents, "pair", 0), torch.arange(3))


def test_a_state_dict_saved_without_nesting_is_a_module(tmp_path: Path) -> None:
    dcp.save(nn.Linear(2, 3).state_dict(), checkpoint_id=tmp_path / "c")
    contents = open_checkpoint(tmp_path / "c")
    assert contents.modules == ((),)
    assert set(contents.keys) == {("weight",), ("bias",)}


@pytest.mark.parametrize(
    "kind",
    [
        lambda: torch.randn(3, 5).t(),
        lambda: torch.randn(10)[2:5],
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(()),
        lambda: torch.zeros(0, 2),
    ],
)
def test_tensors_of_any_strides_are_read_as_dcp_loads_them(tmp_path: Path, kind: Any) -> None:
    tensor = kind()
    dcp.save({"a": tensor}, checkpoint_id=tmp_path / "c")
    target = {"a": torch.empty(tensor.shape)}
    dcp.load(target, checkpoint_id=tmp_path / "c")
    assert same_bits(tensor_at(open_checkpoint(tmp_path / "c"), "a"), target["a"])


def test_values_that_are_code_are_left_out_and_noted(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2), "loader": Evil(), "step": 1}, checkpoint_id=tmp_path / "c")
    contents = open_checkpoint(tmp_path / "c")
    assert contents.skeleton == {"a": None, "step": 1}
    assert "loader" in contents.notes["not read"]
    assert "posix.mkdir" in contents.notes["not read"]
    assert not Path("evil").exists()


def test_the_format_with_safetensors_inside_is_read(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.randn(3, 4), "bias": torch.randn(4)}, "step": 3}
    writer = FileSystemWriter(tmp_path / "c", serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save(state, storage_writer=writer)
    contents = open_checkpoint(tmp_path / "c")
    assert same_bits(tensor_at(contents, "model", "weight"), state["model"]["weight"])
    assert same_bits(tensor_at(contents, "model", "bias"), state["model"]["bias"])
    assert contents.skeleton["step"] == 3


@pytest.mark.parametrize("distributed", [False, True])
def test_what_torchs_hugging_face_writer_leaves_is_read(tmp_path: Path, distributed: bool) -> None:
    state = {"weight": torch.randn(3, 4), "bias": torch.randn(4)}
    mapping = None if distributed else {"weight": 1, "bias": 2}
    writer = HuggingFaceStorageWriter(str(tmp_path / "c"), mapping, save_distributed=distributed)
    (tmp_path / "c").mkdir()
    dcp.save(state, storage_writer=writer)
    contents = open_checkpoint(tmp_path / "c")
    assert contents.format == "safetensors"
    assert all(same_bits(whole(contents.tensors[key]), tensor) for key, tensor in state.items())


def test_a_checkpoint_of_ours_is_complete(tmp_path: Path, solo: Communicator) -> None:
    model = nn.Linear(2, 3)
    save(tmp_path / "c", {"model": model, "extra": [torch.ones(2), "x"], "step": 3}, solo)
    contents = open_checkpoint(tmp_path / "c")
    assert contents.is_complete
    assert contents.skeleton == {"model": {"weight": None, "bias": None}, "extra": [None, "x"], "step": 3}
    assert same_bits(tensor_at(contents, "model", "weight"), model.weight.detach())
    assert "nucleate.values" not in contents.tensors


def test_without_its_index_a_folder_was_not_saved_to_the_end(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"no \.metadata, which is written last"):
        open_checkpoint(tmp_path / "c")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"__0_0\.distcp of 1 files is missing"):
        open_checkpoint(tmp_path / "c")


def metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def rewrite(folder: Path, changed: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(changed))


def info_of(found: Any, key: str) -> Any:
    return next(info for index, info in found.storage_data.items() if index.fqn == key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(info_of(m, "a"), "relative_path", "../x"), r"files outside of its folder: '\.\./x'"),
        (lambda m: setattr(info_of(m, "a"), "relative_path", "/etc/passwd"), "outside of its folder"),
        (lambda m: setattr(info_of(m, "a"), "relative_path", 3), "not a string"),
        (lambda m: setattr(info_of(m, "a"), "offset", -1), r"an offset or a length in it is \(-1,"),
        (lambda m: setattr(info_of(m, "a"), "offset", 1), "a at bytes 1 to .* damaged"),
        (lambda m: setattr(info_of(m, "a"), "length", 1 << 40), "a lies at bytes"),
        (lambda m: setattr(info_of(m, "a"), "length", 0), "a at bytes"),
        (lambda m: setattr(info_of(m, "a"), "transform_descriptors", ["zstd"]), r"a was transformed by \['zstd'\]"),
        (lambda m: m.storage_data.clear(), "nothing says where .* lies"),
        (lambda m: setattr(m, "storage_data", None), "lacks a part"),
        (lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([2, 3])), "a is damaged: .* 6 elements"),
        (lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", torch.int32), "a is torch.int32 of shape"),
        (lambda m: m.state_dict_metadata["a"].chunks.clear(), "it names no part of a"),
        (lambda m: m.state_dict_metadata["a"].chunks.append(m.state_dict_metadata["a"].chunks[0]), "both hold"),
        (lambda m: m.planner_data.update(b=("a",)), "two tensors have the same place"),
        (lambda m: m.planner_data.update(b=("a", "b")), "a value and also holds other values"),
        (lambda m: setattr(m, "state_dict_metadata", 3), "lacks a part"),
        (lambda m: m.state_dict_metadata.update(a=5), "is damaged"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    dcp.save({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}, checkpoint_id=tmp_path / "c")
    changed = metadata(tmp_path / "c")
    change(changed)
    rewrite(tmp_path / "c", changed)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path / "c")
    assert str(tmp_path / "c") in str(error.value)


@pytest.mark.parametrize("index", [b"", pickle.dumps(Evil()), pickle.dumps({"a": 1}), b"x", pickle.dumps([Evil()])])
def test_an_index_that_is_something_else_is_refused_and_not_run(tmp_path: Path, index: bytes) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(index)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        open_checkpoint(tmp_path / "c")
    assert not Path("evil").exists()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small folders are read as large ones are."""
    monkeypatch.setattr("nucleate.checkpoint.readers.dcp.dcp.MOST_EAGER_CHUNKS", 0)


def _pages_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the name of the file of each read of a header."""
    read: list[str] = []
    pread = DataFile.read

    def noted(self: DataFile, offset: int, size_bytes: int) -> bytes:
        read.append(self.path.name)
        return pread(self, offset, size_bytes)

    monkeypatch.setattr(DataFile, "read", noted)
    return read


def test_opening_a_large_folder_reads_nothing_from_its_data_files(
    tmp_path: Path, late: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"layers.{n}.weight": torch.randn(3, 4).t() for n in range(20)}
    dcp.save(state, checkpoint_id=tmp_path / "c")
    read = _pages_read(monkeypatch)
    contents = open_checkpoint(tmp_path / "c")
    assert contents.size_bytes == 20 * 48
    assert {stored.describe() for stored in contents.tensors.values()}
    assert [stored.order(0) for stored in contents.tensors.values()]
    assert set(read) == {".metadata"}
    del read[:]
    for _ in range(2):
        assert same_bits(tensor_at(contents, "layers.7.weight"), state["layers.7.weight"])
    assert 0 < len(read) <= 2
    assert all(same_bits(tensor_at(contents, key), tensor) for key, tensor in state.items())


@pytest.mark.parametrize("kind", [SerializationFormat.TORCH_SAVE, SerializationFormat.SAFETENSORS])
def test_two_keys_of_a_large_folder_are_not_tied(tmp_path: Path, late: None, kind: SerializationFormat) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path / "c", serialization_format=kind))
    contents = open_checkpoint(tmp_path / "c")
    assert len(contents.distinct()) == 2
    assert all(same_bits(tensor_at(contents, key), tensor) for key, tensor in state.items())


def _broken(folder: Path) -> None:
    """Write other bytes where the archive of `b` begins."""
    info = info_of(metadata(folder), "b")
    with (folder / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\xff" * info.length)


def test_a_damaged_part_of_a_large_folder_is_found_before_a_tensor_changes(
    tmp_path: Path, late: None, solo: Communicator
) -> None:
    dcp.save({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}, checkpoint_id=tmp_path / "c")
    _broken(tmp_path / "c")
    mine = {"a": torch.full((2, 2), 5.0), "b": torch.full((2, 2), 5.0)}
    with pytest.raises(CheckpointError, match=r"b at bytes \d+ to .*__0_0\.distcp is damaged"):
        load(tmp_path / "c", mine, solo)
    assert all(torch.equal(tensor, torch.full((2, 2), 5.0)) for tensor in mine.values())
    load(tmp_path / "c", {"a": mine["a"]}, solo, remainder=False)
    assert torch.equal(mine["a"], torch.ones(2, 2))


def test_verify_looks_at_every_part_of_a_large_folder(tmp_path: Path, late: None) -> None:
    dcp.save({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}, checkpoint_id=tmp_path / "c")
    assert verify(tmp_path / "c").is_good
    _broken(tmp_path / "c")
    assert [damage.key for damage in verify(tmp_path / "c").damage] == ["b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(info_of(m, "a"), "length", 1 << 40), "a lies at bytes"),
        (lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([2, 3])), "a is damaged: .* 6 elements"),
        (lambda m: m.state_dict_metadata["a"].chunks.append(m.state_dict_metadata["a"].chunks[0]), "both hold"),
    ],
)
def test_the_index_of_a_large_folder_is_checked_against_the_sizes_of_its_files(
    tmp_path: Path, late: None, change: Any, message: str
) -> None:
    dcp.save({"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}, checkpoint_id=tmp_path / "c")
    changed = metadata(tmp_path / "c")
    change(changed)
    rewrite(tmp_path / "c", changed)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


@pytest.mark.long
def test_a_tensor_in_a_folder_of_20000_parts_takes_a_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 20_000
    values = torch.arange(2.0 * rows).view(rows, 2)
    dcp.save({"real": values[:1]}, checkpoint_id=tmp_path / "c")
    index = metadata(tmp_path / "c")
    place, info = next((key, value) for key, value in index.storage_data.items() if key.fqn == "real")
    entry = index.state_dict_metadata["real"]
    entry.size = torch.Size([rows, 2])
    # The other parts lie in a hole of a sparse file, so each of their archives is damaged.
    for row in range(1, rows):
        begin = torch.Size([row, 0])
        entry.chunks.append(type(entry.chunks[0])(begin, torch.Size([1, 2])))
        hole = type(info)(f"__{row % 64 + 1}_0.distcp", row * info.length, info.length)
        index.storage_data[type(place)("real", begin, row)] = hole
    for number in range(1, 65):
        with (tmp_path / "c" / f"__{number}_0.distcp").open("wb") as file:
            file.truncate(rows * info.length)
    rewrite(tmp_path / "c", index)
    read = _pages_read(monkeypatch)
    stored = open_checkpoint(tmp_path / "c").tensors["real"]
    assert set(read) == {".metadata"}
    out = torch.empty(1, 2)
    stored.read_box((0, 0), out)
    assert torch.equal(out, values[:1])
    assert [name for name in read if name != ".metadata"] == ["__0_0.distcp"] * (len(read) - read.count(".metadata"))
    assert len(read) <= 6
    with pytest.raises(CheckpointError, match="real at bytes"):
        stored.read_box((7, 0), out)


def test_thousands_of_parts_are_found_by_reading_little_of_them(tmp_path: Path) -> None:
    dcp.save({f"layers.{n}.weight": torch.zeros(100, 50 + n % 9) for n in range(500)}, checkpoint_id=tmp_path / "c")
    before = _bytes_read()
    assert len(DCPReader().read(tmp_path / "c").tensors) == 500
    assert _bytes_read() - before < 500 * 5000


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _nested_sizes(metadata: Any) -> None:
    box: list[Any] = []
    for _ in range(30):
        box = [box] * 10
    next(iter(metadata.state_dict_metadata.values())).size = box


def _shared_chunks(metadata: Any) -> None:
    first = metadata.state_dict_metadata["bias"]
    index, info = next((key, value) for key, value in metadata.storage_data.items() if key.fqn == "bias")
    first.chunks[:] = [first.chunks[0]] * 10_000
    for number in range(3000):
        metadata.state_dict_metadata[f"k{number}"] = first
        metadata.storage_data[type(index)(f"k{number}", index.offset, index.index)] = info


@pytest.mark.parametrize("change", [_nested_sizes, _shared_chunks])
def test_an_index_costs_no_more_than_its_size_allows(tmp_path: Path, change: Any) -> None:
    dcp.save(STATE["model"], checkpoint_id=tmp_path / "c")
    index = tmp_path / "c" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    change(metadata)
    index.write_bytes(pickle.dumps(metadata))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="metadata is damaged") as caught:
        DCPReader().read(tmp_path / "c")
    assert time.process_time() - begin < 5
    assert len(str(caught.value)) <= 1000
