"""The reader suite: tests for every reader, which a plugin's test class inherits."""

from __future__ import annotations

import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from nucleate.checkpoint.readers import Reader, open_checkpoint
from nucleate.checkpoint.stored import Contents, StoredTensor
from nucleate.errors import CheckpointError

ALL_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
#: The seconds that a reader may take for one small checkpoint: an endless file, or a pipe, must not block it.
SECONDS = 10.0


def random_bits(dtypes: Iterable[torch.dtype]) -> dict[str, Tensor]:
    """Return a tensor `(2, 3)` of random bits for each dtype, by the dtype's name. Every call returns the same bits."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in dtypes:
        data = torch.randint(256, (6 * dtype.itemsize,), dtype=torch.uint8, generator=generator, device="cpu")
        data = data & 1 if dtype is torch.bool else data
        tensors[str(dtype).removeprefix("torch.")] = data.view(dtype).view(2, 3)
    return tensors


class ReaderSuite(ABC):
    """The suite of readers. Inherit it, name the class `Test...`, and implement `make_reader` and `write`.

    Attributes:
        dtypes: The dtypes that the format can hold.
        suffix: The end of a checkpoint's name; empty for folders.
        num_damages: The number of files that are damaged at random.
    """

    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    suffix: str = ""
    num_damages: int = 200

    @abstractmethod
    def make_reader(self) -> Reader:
        """Return a new reader with the options to test."""

    @abstractmethod
    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint with these tensors, by any program that writes the format.

        Args:
            path: The path of the checkpoint, which does not exist yet.
            tensors: Contiguous tensors on the CPU that do not share memory.
        """

    @pytest.fixture
    def reader(self) -> Reader:
        """A new reader."""
        return self.make_reader()

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """The path of a test's checkpoint."""
        return tmp_path / f"checkpoint{self.suffix}"

    def sample(self) -> dict[str, Tensor]:
        """Return tensors of every dtype on the CPU, with random bits, and an empty tensor and a scalar."""
        tensors = {f"layer.{name}": tensor for name, tensor in random_bits(self.dtypes).items()}
        first = self.dtypes[0]
        tensors["layer.empty"] = torch.zeros(0, 3, dtype=first, device="cpu")
        tensors["layer.scalar"] = torch.ones(1, dtype=first, device="cpu").view(())
        return tensors

    # --- the contract

    def test_it_has_a_name_and_a_kind(self, reader: Reader) -> None:
        assert reader.name
        assert reader.kind == "reader"

    def test_its_checkpoints_are_recognized(self, reader: Reader, path: Path) -> None:
        self.write(path, self.sample())
        assert reader.claims(path)
        assert open_checkpoint(path).format == reader.name

    def test_it_claims_nothing_else(self, reader: Reader, tmp_path: Path) -> None:
        for name, content in {"text.txt": b"{}", "empty": b"", "zeros.dat": bytes(100)}.items():
            (tmp_path / name).write_bytes(content)
            assert not reader.claims(tmp_path / name), name
        (tmp_path / "folder").mkdir()
        assert not reader.claims(tmp_path / "folder")

    # --- reading

    def test_every_tensor_has_its_dtype_shape_and_bits(self, reader: Reader, path: Path) -> None:
        tensors = self.sample()
        self.write(path, tensors)
        contents = reader.read(path)
        assert sorted(contents.keys.values()) == sorted(tensors)
        assert contents.tensors.keys() == tensors.keys()
        for key, tensor in tensors.items():
            stored = contents.tensors[key]
            assert (stored.dtype, stored.shape) == (tensor.dtype, tuple(tensor.shape)), key
            stored.check()
            assert _bits(_whole(stored)) == _bits(tensor), key

    def test_any_range_of_a_tensor_is_read_by_itself(self, reader: Reader, path: Path) -> None:
        tensor = torch.arange(60, device="cpu").to(self.dtypes[0]).view(3, 4, 5)
        self.write(path, {"weight": tensor})
        stored = reader.read(path).tensors["weight"]
        for start in range(0, 60, 7):
            for stop in range(start, 61, 3):
                out = torch.empty(stop - start, dtype=tensor.dtype, device="cpu")
                stored.read(start, out)
                assert _bits(out) == _bits(tensor.flatten()[start:stop]), (start, stop)

    def test_a_checkpoint_without_tensors_is_one(self, reader: Reader, path: Path) -> None:
        self.write(path, {})
        assert reader.read(path).tensors == {}

    def test_places_and_tensors_belong_together(self, reader: Reader, path: Path) -> None:
        self.write(path, self.sample())
        contents = reader.read(path)
        assert contents.path == path
        assert set(contents.keys.values()) == set(contents.tensors)
        for place in contents.keys:
            assert contents.has(place)
            assert contents.at(place) is None

    def test_reading_the_headers_reads_no_tensor(self, path: Path) -> None:
        self.write(path, {"weight": torch.zeros(1 << 24, dtype=torch.uint8, device="cpu").view(self.dtypes[0])})
        before = _bytes_read()
        self.make_reader().read(path)
        assert _bytes_read() - before < 1 << 22, "it read the numbers themselves"

    # --- damage

    def test_a_file_that_was_cut_short_is_refused_by_name(self, reader: Reader, path: Path, tmp_path: Path) -> None:
        self.write(path, self.sample())
        expected = self._everything(reader.read(path))
        for file, size_bytes in _files(path):
            for length in _lengths(size_bytes):
                copy = _copy(path, tmp_path / f"cut{self.suffix}")
                os.truncate(_inside(copy, path, file), length)
                self._must_refuse_or_equal(reader, copy, expected, f"{file.name} cut to {length} of {size_bytes} bytes")

    def test_a_file_that_is_cut_short_after_it_was_opened_is_an_error(self, reader: Reader, path: Path) -> None:
        self.write(path, {"weight": torch.ones(1 << 16, dtype=torch.uint8, device="cpu").view(self.dtypes[0])})
        stored = reader.read(path).tensors["weight"]
        for file, _ in _files(path):
            os.truncate(file, 0)
        with pytest.raises(CheckpointError, match="cut short"):
            _whole(stored)

    def test_damaged_files_are_refused_and_nothing_worse(self, reader: Reader, path: Path, tmp_path: Path) -> None:
        self.write(path, self.sample())
        random = Random(0)
        files = [file for file, size_bytes in _files(path) if size_bytes]
        for number in range(self.num_damages):
            copy = _copy(path, tmp_path / f"damaged{self.suffix}")
            file = random.choice(files)
            data = bytearray(file.read_bytes())
            _damage(data, random)
            _inside(copy, path, file).write_bytes(data)
            self._must_refuse_or_equal(reader, copy, None, f"damage {number} to {file.name}")

    def test_what_is_missing_is_an_error(self, reader: Reader, path: Path, tmp_path: Path) -> None:
        self.write(path, self.sample())
        expected = self._everything(reader.read(path))
        files = [file for file, _ in _files(path)]
        for file in files if path.is_dir() else []:
            copy = _copy(path, tmp_path / f"less{self.suffix}")
            _inside(copy, path, file).unlink()
            self._must_refuse_or_equal(reader, copy, expected, f"without {file.name}")

    def test_the_readers_errors_name_the_file(self, reader: Reader, path: Path) -> None:
        self.write(path, self.sample())
        largest = max(_files(path), key=lambda item: item[1])[0]
        os.truncate(largest, 20)
        with pytest.raises(CheckpointError) as error:
            self._everything(reader.read(path))
        assert str(largest) in str(error.value) or str(path) in str(error.value)

    def _everything(self, contents: Contents) -> dict[str, bytes]:
        return {key: _bits(_whole(stored)) for key, stored in contents.tensors.items()}

    def _must_refuse_or_equal(self, reader: Reader, path: Path, expected: dict[str, bytes] | None, what: str) -> None:
        """Read everything. A damage may be harmless, but then all tensors must equal the written ones."""
        found: list[dict[str, bytes] | BaseException] = []

        def read() -> None:
            try:
                contents = reader.read(path)
                if sum(stored.size_bytes for stored in contents.tensors.values()) > 1 << 26:
                    raise AssertionError("it promises more than a damaged small file can hold")
                found.append(self._everything(contents))
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(SECONDS)
        assert found, f"{what}: still reading after {SECONDS} s"
        result = found[0]
        if isinstance(result, BaseException):
            assert isinstance(result, CheckpointError), f"{what}: {type(result).__name__}: {result}"
        elif expected is not None:
            assert result == expected, f"{what}: it was read as if nothing had happened"


def _whole(stored: StoredTensor) -> Tensor:
    out = torch.empty(stored.numel, dtype=stored.dtype, device="cpu")
    stored.read(0, out)
    return out.view(stored.shape)


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def _files(path: Path) -> list[tuple[Path, int]]:
    """Return the files of a checkpoint and their sizes."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file, file.stat().st_size) for file in files]


def _copy(path: Path, copy: Path) -> Path:
    """Return a fresh copy of a checkpoint."""
    if path.is_file():
        shutil.copyfile(path, copy)
    else:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
    return copy


def _inside(copy: Path, path: Path, file: Path) -> Path:
    return copy if path.is_file() else copy / file.relative_to(path)


def _lengths(size_bytes: int) -> list[int]:
    """Return the lengths to cut a file to: all lengths near 0 and near its size, and some between."""
    ends = {*range(min(size_bytes, 64)), *range(max(0, size_bytes - 64), size_bytes)}
    return sorted(ends | set(range(0, size_bytes, max(1, size_bytes // 64))))


def _damage(data: bytearray, random: Random) -> None:
    kind, place = random.randrange(4), random.randrange(len(data))
    if kind == 0:
        data[place] ^= 1 << random.randrange(8)
    elif kind == 1:
        data[place : place + 8] = random.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, random.randbytes(8)])
    elif kind == 2:
        del data[place : place + random.randrange(1, 64)]
    else:
        data[place:place] = random.randbytes(random.randrange(1, 64))


def _bytes_read() -> int:
    """Return how many bytes this process has asked the system for."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
