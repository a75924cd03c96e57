"""The built-in readers keep the contract that plugins keep."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from nucleate.checkpoint.readers import Reader
from nucleate.checkpoint.readers.dcp.dcp import DCPReader
from nucleate.checkpoint.readers.safetensors import SafetensorsReader
from nucleate.checkpoint.readers.torch.torch_file import TorchReader
from nucleate.testing import ReaderSuite
from nucleate.testing.reader import ALL_DTYPES

MORE_DTYPES = (
    *ALL_DTYPES,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


class TestSafetensorsFile(ReaderSuite):
    dtypes = MORE_DTYPES
    suffix = ".safetensors"

    def make_reader(self) -> Reader:
        return SafetensorsReader()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})


class TestSafetensorsShards(ReaderSuite):
    dtypes = MORE_DTYPES

    def make_reader(self) -> Reader:
        return SafetensorsReader()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        path.mkdir()
        weight_map = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(tensors)}
        for name in {*weight_map.values()}:
            shard = {key: tensors[key] for key in tensors if weight_map[key] == name}
            safetensors.torch.save_file(shard, path / name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


class TestTorchFile(ReaderSuite):
    dtypes = (*MORE_DTYPES, torch.complex128)
    suffix = ".pt"

    def make_reader(self) -> Reader:
        return TorchReader()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        torch.save(dict(tensors), path)


class TestLegacyTorchFile(ReaderSuite):
    # Those that torch can write and load in its older format.
    dtypes = tuple(dtype for dtype in ALL_DTYPES if "float8" not in str(dtype))
    suffix = ".pth"

    def make_reader(self) -> Reader:
        return TorchReader()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        torch.save(dict(tensors), path, _use_new_zipfile_serialization=False)


class TestTorchShards(ReaderSuite):
    def make_reader(self) -> Reader:
        return TorchReader()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        path.mkdir()
        weight_map = {key: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, key in enumerate(tensors)}
        for name in {*weight_map.values()}:
            torch.save({key: tensors[key] for key in tensors if weight_map[key] == name}, path / name)
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


class TestDCP(ReaderSuite):
    dtypes = (*MORE_DTYPES, torch.complex128)

    def make_reader(self) -> Reader:
        return DCPReader()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(tensors), checkpoint_id=path, no_dist=True)
