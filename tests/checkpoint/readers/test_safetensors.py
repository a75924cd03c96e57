"""Safetensors: every header and every index that is wrong is refused by name, whatever else reads them."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from nucleate.checkpoint.readers import open_checkpoint
from nucleate.checkpoint.readers.safetensors_file import DTYPES
from nucleate.checkpoint.state.values import encode
from nucleate.errors import CheckpointError, CheckpointKeyError, CheckpointNotFoundError
from tests.checkpoint.readers.reading import entry, same_bits, tensor_at, whole, write_raw

INDEX = "model.safetensors.index.json"


def values(**keys: Any) -> bytes:
    skeleton = {"model": dict.fromkeys(keys["model"]), "step": 3}
    state = {
        "skeleton": skeleton,
        "keys": {("model", key): f"model.{key}" for key in keys["model"]},
        "sharded": {f"model.{keys['model'][0]}": [0]},
        "modules": [("model",)],
    }
    return bytes(encode(state).tolist())


def write_shards(folder: Path, weight_map: Any, shards: dict[str, list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, keys in shards.items():
        safetensors.torch.save_file({key: torch.full((2,), float(len(key))) for key in keys}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# --- one file


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_format_is_read_as_the_safetensors_package_reads_it(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    shape = [2, 6] if name == "F4" else [2, 3]
    data = bytes(range(1, 6 * dtype.itemsize + 1)) if name != "BOOL" else bytes([1, 0, 1, 1, 0, 0])
    path = write_raw(tmp_path / "a.safetensors", {"a": entry(0, len(data), shape, name)}, data)
    assert same_bits(tensor_at(open_checkpoint(path), "a"), safetensors.torch.load_file(path)["a"])


def test_every_dtype_that_the_package_reads_is_known() -> None:
    assert set(safetensors.torch._TYPES) <= DTYPES.keys()


def test_the_metadata_is_shown(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt", "by": "me"})
    assert open_checkpoint(tmp_path / "a.safetensors").notes == {"format": "pt", "by": "me"}


E8, F16 = (1 << 64) - 1, 1 << 63


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "is a? ?\\[\\] instead of an object"),
        (b"17", "17 instead of an object"),
        (b"", "not valid JSON"),
        (b'{"a":', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"9" * 10_000, "not valid JSON"),
        (b'{"a": {"dtype":"U8","shape":[8],"data_offsets":[0,8]}, "a": 1}', "it holds 'a' twice"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        ({"a": 1}, "a has no dtype, shape and data_offsets"),
        ({"a": {"dtype": "U8", "shape": [8]}}, "a has no dtype, shape and data_offsets"),
        ({"a": entry(0, 8, dtype="U9")}, "a in .* has the dtype 'U9'.*The known dtypes are F64,"),
        ({"a": entry(0, 8, dtype=None)}, "has the dtype None"),
        ({"a": entry(0, 8, dtype=["U8"])}, "has the dtype \\['U8'\\]"),
        ({"a": entry(0, 8, [-8])}, "a has the shape \\[-8\\]"),
        ({"a": entry(0, 8, [8.0])}, "a has the shape \\[8.0\\]"),
        ({"a": entry(0, 8, [True, 8])}, "a has the shape \\[True, 8\\]"),
        ({"a": entry(0, 8, "8")}, "a has the shape '8'"),
        ({"a": entry(0, 8, [1] * 65)}, "a has the shape a list of 65"),
        ({"a": entry(0, 8, [1 << 62, 1 << 62, 16])}, "in 8 bytes"),
        ({"a": entry(0, 8, [1 << 70])}, "a has the shape"),
        ({"a": entry(0, 8, [9])}, "a has the shape \\[9\\] and the dtype U8 in 8 bytes"),
        ({"a": entry(0, 8, [2, 4], "F4")}, "in 8 bytes"),
        ({"a": entry(0, 8, [16, 1], "F4")}, "last dim must be even"),
        ({"a": {**entry(0, 8), "data_offsets": [8, 0]}}, "data_offsets \\[8, 0\\]"),
        ({"a": {**entry(0, 8), "data_offsets": [0, 8, 8]}}, "data_offsets \\[0, 8, 8\\]"),
        ({"a": {**entry(0, 8), "data_offsets": [False, 8]}}, "data_offsets \\[False, 8\\]"),
        ({"a": {**entry(0, 8), "data_offsets": [-1, 7]}}, "data_offsets \\[-1, 7\\]"),
        ({"a": {**entry(0, 8), "data_offsets": [0, E8]}}, "data_offsets"),
        ({"a": entry(0, 9)}, "a lies at bytes 0 to 9 of the data of .*, which has 8"),
        ({"a": entry(F16 - 9, F16 - 1)}, "a lies at bytes"),
        ({"a": entry(0, 6), "b": entry(4, 8)}, "b, at bytes 4 to 8, overlaps with a"),
        ({"a": entry(0, 3), "b": entry(4, 8)}, "b, at bytes 4 to 8, leaves a gap of 1 bytes after a"),
        ({"a": entry(1, 8)}, "a, at bytes 1 to 8, leaves a gap of 1 bytes after the header"),
        ({"a": entry(0, 7)}, "1 bytes after a belong to no tensor"),
        ({}, "8 bytes after the header"),
        ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, "`__metadata__`"),
        ({"__metadata__": [], "a": entry(0, 8)}, "`__metadata__`"),
    ],
)
def test_a_wrong_header_is_refused_by_name(tmp_path: Path, header: Any, message: str) -> None:
    path = write_raw(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(7) + b"\x7f", b"\xff" * 8, (9).to_bytes(8, "little")])
def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="a.safetensors .*Copy it again"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_header_longer_than_the_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="announces a header of 100000001 bytes; the limit is 100000000"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_tensors_without_elements_may_lie_anywhere_between(tmp_path: Path) -> None:
    header = {"z": entry(4, 4, [0, 3], "F64"), "a": entry(0, 4), "b": entry(4, 8), "y": entry(8, 8, [0])}
    contents = open_checkpoint(write_raw(tmp_path / "a.safetensors", header, b"abcdefgh"))
    assert whole(contents.tensors["b"]).tolist() == list(b"efgh")
    assert whole(contents.tensors["z"]).shape == (0, 3)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.integers(0, 40), max_size=6))
def test_whatever_the_package_writes_is_read(tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int]) -> None:
    tensors = {key: torch.arange(size) for key, size in sizes.items() if key != "__metadata__"}
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    safetensors.torch.save_file(tensors, path)
    contents = open_checkpoint(path)
    assert {key: whole(stored).tolist() for key, stored in contents.tensors.items()} == {
        key: tensor.tolist() for key, tensor in tensors.items()
    }


# --- folders


def test_a_folder_with_one_file_needs_no_index(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_any_single_index_is_taken_and_the_models_before_others(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": ["a"]})
    os.rename(tmp_path / INDEX, tmp_path / "adapter.safetensors.index.json")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"2 checkpoints: adapter.*, other.*Give the path of the one"):
        open_checkpoint(tmp_path)
    assert list(open_checkpoint(tmp_path / "adapter.safetensors.index.json").tensors) == ["a"]
    os.rename(tmp_path / "adapter.safetensors.index.json", tmp_path / INDEX)
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {}, {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files, but no .*index.*1\.safetensors, 2\.safetensors"):
        open_checkpoint(tmp_path)


def test_the_usual_name_of_a_model_is_taken_before_other_files(tmp_path: Path) -> None:
    safetensors.torch.save_file({"b": torch.ones(1)}, tmp_path / "adapter.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    contents = open_checkpoint(tmp_path)
    assert list(contents.tensors) == ["a"]
    assert "adapter.safetensors" in contents.notes["ignored files"]


@pytest.mark.parametrize("name", ["../1.safetensors", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\0b/c"])
def test_an_index_that_names_a_place_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path / "f", {"a": name}, {})
    with pytest.raises(CheckpointError, match="not the name of a file beside it"):
        open_checkpoint(tmp_path / "f")


def test_shards_may_be_links_as_in_the_cache_of_hugging_face(tmp_path: Path) -> None:
    write_shards(tmp_path / "f", {"a": "1.safetensors"}, {"1.safetensors": ["a"]})
    os.rename(tmp_path / "f" / "1.safetensors", tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "f" / "1.safetensors")
    assert tensor_at(open_checkpoint(tmp_path / "f"), "a").tolist() == [1.0, 1.0]
    (tmp_path / "blob").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"1\.safetensors"):
        open_checkpoint(tmp_path / "f")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "b": "3.safetensors"}, r"1 are missing: 3\.safetensors \(b is in 3"),
        ({"a": "a\0b", "b": "1.safetensors"}, "missing"),
        ({"a": "2.safetensors", "b": "2.safetensors", "c": "2.safetensors"}, r"a is in 2.*, but none of its files"),
        ({"b": "1.safetensors", "a": "2.safetensors"}, r"b is in 1\.safetensors, but it is in 2\.safetensors"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, r"omits 1 tensors that its files hold: c in 2\.safetensors"),
        ({"a": "1.safetensors", "b": "2.safetensors", "c": 5}, "gives no file name for 'c', but 5"),
        ({"a": "1.safetensors", "b": "2.safetensors", "c": None}, "gives no file name for 'c', but None"),
        ([], "no `weight_map`"),
        (None, "no `weight_map`"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    write_shards(tmp_path, weight_map, {"1.safetensors": ["a"], "2.safetensors": ["b", "c"]})
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(
        tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": ["a"], "2.safetensors": ["a", "b"]}
    )
    with pytest.raises(CheckpointKeyError, match=r"a is in 2 files of .*: 1\.safetensors, 2\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", [b"", b"[]", b"{}", b"\xff", b'{"weight_map": {"a": "1", "a": "2"}}', b"[" * 100_000, b'{"weight_map": "']
)
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, index: bytes) -> None:
    write_shards(tmp_path, {}, {"1.safetensors": ["a"]})
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(tmp_path)


def test_a_stale_file_that_the_index_does_not_name_is_ignored_and_noted(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "1.safetensors"}, {"1.safetensors": ["a"], "model-00001-of-00009.safetensors": ["a"]})
    contents = open_checkpoint(tmp_path)
    assert list(contents.tensors) == ["a"]
    assert "model-00001-of-00009.safetensors" in contents.notes["ignored files"]


def test_parts_that_the_ranks_of_torch_wrote_are_put_together(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(4, 3)
    for rank, part in enumerate(weight.split(3)):
        info = {"weight": {"saved_offsets": [3 * rank, 0]}}
        safetensors.torch.save_file(
            {"weight": part.contiguous()},
            tmp_path / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"},
        )
    contents = open_checkpoint(tmp_path)
    assert torch.equal(tensor_at(contents, "weight"), weight)
    os.unlink(tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="weight is damaged.*12 elements.*hold 3"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("info", ["", "[]", "{", '{"weight": 1}', '{"weight": {"saved_offsets": [-1]}}', "[" * 9999])
def test_parts_whose_place_cannot_be_told_are_refused(tmp_path: Path, info: str) -> None:
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": info})
    with pytest.raises(CheckpointError, match="a.safetensors"):
        open_checkpoint(tmp_path)


# --- what `save` writes


def test_a_single_file_with_values_is_complete(tmp_path: Path) -> None:
    packed = base64.b64encode(values(model=["weight", "bias"])).decode()
    tensors = {"model.weight": torch.ones(2), "model.bias": torch.zeros(1)}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "nucleate": packed})
    contents = open_checkpoint(path)
    assert contents.is_complete
    assert contents.skeleton == {"model": {"weight": None, "bias": None}, "step": 3}
    assert (contents.modules, contents.sharded) == ((("model",),), {"model.weight": [0]})
    assert contents.notes == {"format": "pt"}
    assert torch.equal(tensor_at(contents, "model", "weight"), torch.ones(2))


@pytest.mark.parametrize("packed", ["", "#", "AAAA", "é"])
def test_damaged_values_are_refused(tmp_path: Path, packed: str) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"nucleate": packed})
    with pytest.raises(CheckpointError, match="a.safetensors"):
        open_checkpoint(tmp_path / "a.safetensors")


def write_folder(folder: Path, keys: list[str], held: list[str]) -> Path:
    folder.mkdir()
    safetensors.torch.save_file({f"model.{key}": torch.ones(1) for key in held}, folder / "model.safetensors")
    packed = torch.frombuffer(bytearray(values(model=keys)), dtype=torch.uint8)
    safetensors.torch.save_file({"nucleate.values": packed}, folder / "nucleate.values.safetensors")
    (folder / "nucleate.json").write_text(json.dumps({"version": 1}))
    return folder


def test_a_folder_with_values_is_complete(tmp_path: Path) -> None:
    contents = open_checkpoint(write_folder(tmp_path / "f", ["a", "b"], ["a", "b"]))
    assert contents.is_complete
    assert contents.format == "safetensors"
    assert list(contents.tensors) == ["model.a", "model.b"]
    assert contents.skeleton["step"] == 3


def test_a_folder_that_lacks_a_tensor_or_its_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks model\.b"):
        open_checkpoint(write_folder(tmp_path / "less", ["a", "b"], ["a"]))
    folder = write_folder(tmp_path / "no values", ["a"], ["a"])
    (folder / "nucleate.values.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks nucleate\.values\.safetensors"):
        open_checkpoint(folder)


def test_a_folder_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", ["a"], ["a"])
    (folder / "nucleate.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(CheckpointError, match=r"version 99.*Upgrade nucleate"):
        open_checkpoint(folder)
