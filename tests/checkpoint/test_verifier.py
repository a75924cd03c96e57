"""`verify`: all bytes are read, damage is told by file and key, and two checkpoints are compared bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nucleate.checkpoint import convert, open_checkpoint, verify
from nucleate.checkpoint.stored import data_file
from nucleate.checkpoint.tools import sweep
from nucleate.errors import CheckpointError, CheckpointNotFoundError

pytestmark = pytest.mark.usefixtures("factories_on_device")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {f"layers.{number}.w": torch.full((4, 6), float(number)) for number in range(3)}
    save_file({**tensors, "half": torch.arange(10).bfloat16()}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def differences(one: Path, two: Path) -> list[str]:
    report = verify(one, against=two)
    assert report.is_good == (not report.differences)
    return list(map(str, report.differences))


def test_a_whole_checkpoint_is_good(path: Path) -> None:
    report = verify(path)
    assert report.is_good
    assert (report.format, report.size_bytes, report.num_nan, report.num_inf) == ("safetensors", 3 * 96 + 20, 0, 0)
    assert set(report.tensors) == {"layers.0.w", "layers.1.w", "layers.2.w", "half"}
    assert report.sha256 == ""


def test_every_byte_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    read_into = data_file.DataFile.read_into

    def watch(self: data_file.DataFile, address: int, size_bytes: int, offset: int) -> None:
        seen.update(range(offset, offset + size_bytes))
        read_into(self, address, size_bytes, offset)

    monkeypatch.setattr(data_file.DataFile, "read_into", watch)
    monkeypatch.setattr(sweep, "RANGE_BYTES", 40)
    verify(path)
    begin = min(stored.chunks[0].offset for stored in open_checkpoint(path).tensors.values())
    assert seen == set(range(begin, path.stat().st_size))


def test_what_is_not_finite_is_counted_and_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "RANGE_BYTES", 64)
    values = torch.zeros(100)
    values[[3, 40, 99]] = torch.tensor([math.nan, math.inf, -math.inf])
    tensors = {str(dtype): values.to(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    tensors["complex"] = torch.complex(values, values)
    tensors["f8"] = (
        values.nan_to_num(posinf=0, neginf=0).index_fill(0, torch.tensor(3), math.nan).to(torch.float8_e4m3fn)
    )
    tensors["int"] = torch.full((9,), 2**31 - 1)
    save_file(tensors, tmp_path / "a.safetensors")
    report = verify(tmp_path / "a.safetensors")
    assert report.is_good
    found = {key: (check.num_nan, check.num_inf) for key, check in report.tensors.items()}
    assert found == {
        **{str(dtype): (1, 2) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)},
        "complex": (2, 4),
        "f8": (1, 0),
        "int": (0, 0),
    }


@pytest.mark.parametrize("size_bytes", [0, 7, 50, 500, -1])
def test_a_file_that_was_cut_short_is_damage_that_names_it(path: Path, size_bytes: int) -> None:
    os.truncate(path, size_bytes if size_bytes >= 0 else path.stat().st_size - 1)
    report = verify(path)
    assert not report.is_good
    assert "a.safetensors" in report.damage[0].message


def test_all_tensors_that_cannot_be_read_are_told_with_their_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_into = data_file.DataFile.read_into

    def fail(self: data_file.DataFile, address: int, size_bytes: int, offset: int) -> None:
        if size_bytes == 96:
            raise CheckpointError(f"reading {self.name} at byte {offset} failed: Input/output error.")
        read_into(self, address, size_bytes, offset)

    monkeypatch.setattr(data_file.DataFile, "read_into", fail)
    report = verify(path)
    assert sorted(one.key for one in report.damage) == ["layers.0.w", "layers.1.w", "layers.2.w"]
    assert {one.files for one in report.damage} == {(str(path),)}
    assert list(report.tensors) == ["half"]


def test_a_missing_shard_and_a_wrong_index_are_damage(tmp_path: Path, path: Path) -> None:
    convert(path, tmp_path / "folder", format="safetensors", max_shard_size=200)
    assert verify(tmp_path / "folder").is_good
    index = tmp_path / "folder" / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    shard = text["weight_map"]["half"]
    shutil.move(tmp_path / "folder" / shard, tmp_path / "away")
    assert shard in verify(tmp_path / "folder").damage[0].message
    shutil.move(tmp_path / "away", tmp_path / "folder" / shard)
    del text["weight_map"]["half"]
    index.write_text(json.dumps(text))
    assert "half" in verify(tmp_path / "folder").damage[0].message


def test_a_bit_that_changed_in_a_torch_file_is_found_by_its_check_sum(tmp_path: Path, path: Path) -> None:
    torch.save({"a": torch.arange(5.0), "b": torch.arange(7.0), "c": torch.ones(2)}, tmp_path / "a.pt")
    assert verify(tmp_path / "a.pt").is_good
    convert(path, tmp_path / "ours.pt")
    assert verify(tmp_path / "ours.pt").is_good
    offset = open_checkpoint(tmp_path / "a.pt").tensors["b"].chunks[0].offset
    with open(tmp_path / "a.pt", "r+b") as file:
        file.seek(offset + 9)
        file.write(b"\x01")
    report = verify(tmp_path / "a.pt")
    assert [one.key for one in report.damage] == ["b"]
    assert "some bits have changed" in report.damage[0].message


def test_a_torch_file_without_check_sums_is_good(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    torch.save({"a": torch.arange(5.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert verify(tmp_path / "a.pt", against=tmp_path / "old.pt").is_good
    assert verify(tmp_path / "old.pt").is_good


@pytest.mark.parametrize("name", ["dcp", "folder", "b.safetensors", "b.pt"])
def test_a_checkpoint_is_equal_to_itself_in_every_format_and_has_one_hash(
    tmp_path: Path, path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "RANGE_BYTES", 40)
    convert(path, tmp_path / name, format={"dcp": "dcp", "folder": "safetensors"}.get(name))
    one, two = verify(path, hashes=True), verify(tmp_path / name, hashes=True, against=path)
    assert two.is_good
    assert one.sha256 == two.sha256 != ""
    assert {key: check.sha256 for key, check in one.tensors.items()} == {
        key: check.sha256 for key, check in two.tensors.items()
    }


def test_a_hash_is_that_of_the_bytes_row_by_row(tmp_path: Path) -> None:
    whole = torch.arange(6.0).view(2, 3)
    torch.save({"t": whole.t().contiguous().t()}, tmp_path / "a.pt")
    mine = hashlib.sha256(bytes(whole.view(torch.uint8).flatten().tolist())).hexdigest()
    report = verify(tmp_path / "a.pt", hashes=True)
    assert report.tensors["t"].sha256 == mine
    assert report.sha256 == hashlib.sha256(f"t float32 [2,3] {mine}\n".encode()).hexdigest()


def test_one_bit_makes_a_difference(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "RANGE_BYTES", 40)
    shutil.copy(path, tmp_path / "b.safetensors")
    offset = open_checkpoint(path).tensors["layers.1.w"].chunks[0].offset
    with open(tmp_path / "b.safetensors", "r+b") as file:
        for place in (13, 20):
            file.seek(offset + 4 * place)
            file.write(b"\x01")
    assert differences(path, tmp_path / "b.safetensors") == [
        "layers.1.w: 2 of 24 elements differ, the first at [2, 1]",
    ]
    assert verify(path, hashes=True).sha256 != verify(tmp_path / "b.safetensors", hashes=True).sha256


def test_nan_is_equal_to_itself_and_zero_is_not_minus_zero(tmp_path: Path) -> None:
    for name, zero in (("a", 0.0), ("b", 0.0), ("c", -0.0)):
        save_file({"w": torch.tensor([math.nan, zero])}, tmp_path / f"{name}.safetensors")
    assert differences(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == []
    assert differences(tmp_path / "a.safetensors", tmp_path / "c.safetensors") == [
        "w: 1 of 2 elements differ, the first at [1]"
    ]


def test_other_keys_shapes_dtypes_and_values_are_differences(tmp_path: Path) -> None:
    torch.save(
        {
            "n": {"same": torch.ones(2), "s": torch.ones(2, 3), "d": torch.ones(2), "x": torch.ones(1)},
            "step": 1,
            "l": [],
        },
        tmp_path / "a.pt",
    )
    torch.save(
        {
            "n": {"same": torch.ones(2), "s": torch.ones(3, 2), "d": torch.ones(2).half(), "y": torch.ones(1)},
            "step": 2,
            "e": 1,
        },
        tmp_path / "b.pt",
    )
    assert differences(tmp_path / "a.pt", tmp_path / "b.pt") == [
        f"e: missing in {tmp_path}/a.pt, but 1 in {tmp_path}/b.pt",
        f"l: [], but missing in {tmp_path}/b.pt",
        f"n.d: float32 (2,) but float16 (2,) in {tmp_path}/b.pt",
        f"n.s: float32 (2, 3) but float32 (3, 2) in {tmp_path}/b.pt",
        f"n.x: float32 (1,), but missing in {tmp_path}/b.pt",
        f"n.y: missing in {tmp_path}/a.pt, but float32 (1,) in {tmp_path}/b.pt",
        "step: 1 but 2",
    ]


def test_a_tied_tensor_may_have_one_name_here_and_two_there(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    torch.save({"embed": weight, "head": weight}, tmp_path / "tied.pt")
    torch.save({"embed": weight, "head": weight.clone()}, tmp_path / "copies.pt")
    torch.save({"embed": weight, "head": weight + 1}, tmp_path / "other.pt")
    save_file({"head": weight}, tmp_path / "one.safetensors")
    assert differences(tmp_path / "tied.pt", tmp_path / "one.safetensors") == []
    assert differences(tmp_path / "one.safetensors", tmp_path / "tied.pt") == []
    assert differences(tmp_path / "tied.pt", tmp_path / "copies.pt") == []
    assert differences(tmp_path / "tied.pt", tmp_path / "other.pt") == [
        "head: 9 of 9 elements differ, the first at [0, 0]"
    ]


def test_a_second_checkpoint_that_cannot_be_read_is_a_difference_or_an_error(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(path, tmp_path / "b.safetensors")
    read_into = data_file.DataFile.read_into

    def fail(self: data_file.DataFile, address: int, size_bytes: int, offset: int) -> None:
        if self.path.name == "b.safetensors" and size_bytes == 20:
            raise CheckpointError("the disk failed.")
        read_into(self, address, size_bytes, offset)

    monkeypatch.setattr(data_file.DataFile, "read_into", fail)
    assert differences(path, tmp_path / "b.safetensors") == ["half: the disk failed."]
    os.truncate(tmp_path / "b.safetensors", 100)
    with pytest.raises(CheckpointError, match="b.safetensors"):
        verify(path, against=tmp_path / "b.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "nowhere")


def test_tensors_that_overlap_are_damage(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nucleate.checkpoint.stored.contents import Contents
    from nucleate.checkpoint.stored.data_file import DataFile
    from nucleate.checkpoint.stored.tensor import StoredTensor
    from nucleate.checkpoint.tools import verifier

    file = DataFile(path)
    tensors = {
        key: StoredTensor.whole(key, torch.float32, (4,), file, offset)
        for key, offset in (("a", 8), ("b", 20), ("c", 36))
    }
    monkeypatch.setattr(verifier, "open_checkpoint", lambda *_, **__: Contents.flat(path, "safetensors", tensors))
    assert [one.message for one in verify(path).damage] == [f"a and b overlap in {path} at byte 20."]
    # Views of one storage are the rule in a torch file.
    monkeypatch.setattr(verifier, "open_checkpoint", lambda *_, **__: Contents.flat(path, "torch", tensors))
    assert verify(path).is_good


def test_an_error_in_one_thread_stops_the_others_and_is_raised(path: Path) -> None:
    work = sweep.Sweep(0, "")

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work.run([fail] * 20)
    with pytest.raises(sweep.StoppedError):
        work.advance(1)
