"""Reader and writer keep their contracts: they give back what was written, and refuse what is damaged."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint.readers import Reader, open_checkpoint
from nucleate.checkpoint.writers import Writer
from nucleate.errors import CheckpointError
from nucleate.testing import ReaderSuite, WriterSuite
from nucleate_example.raw import DTYPES, RawReader, RawWriter, write


class TestRaw(ReaderSuite):
    dtypes = tuple(DTYPES.values())
    suffix = ".rawtensors"

    def make_reader(self) -> Reader:
        return RawReader()

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        write(path, tensors)


class TestRawWriter(WriterSuite):
    dtypes = tuple(DTYPES.values())
    suffix = ".rawtensors"

    def make_writer(self) -> Writer:
        return RawWriter()


def test_save_takes_it_by_the_ending_of_a_path_and_a_training_resumes_from_it(tmp_path: Path) -> None:
    runtime = Runtime(accelerator="cpu")
    model = runtime.setup(nn.Linear(2, 3))
    runtime.save(tmp_path / "a.rawtensors", {"model": model, "step": 7})
    wanted, step = model.weight.detach().clone(), {"model": model, "step": 0}
    nn.init.zeros_(model.weight)
    runtime.load(tmp_path / "a.rawtensors", step)
    assert step["step"] == 7
    assert torch.equal(model.weight, wanted)


def test_it_is_found_by_what_is_in_the_file(tmp_path: Path) -> None:
    write(tmp_path / "weights", {"a": torch.arange(3)})
    assert open_checkpoint(tmp_path / "weights").format == "rawtensors"


def test_it_can_be_asked_for_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "a.rawtensors", {"a": torch.arange(3)})
    assert list(open_checkpoint(tmp_path / "a.rawtensors", reader="rawtensors").tensors) == ["a"]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "3", '{"key": 3, "dtype": "uint8", "shape": []}', '{"key": "a", "dtype": "x", "shape": []}']
)
def test_a_line_that_tells_of_no_tensor_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.rawtensors").write_text(f"rawtensors 1\n{line}\n\n")
    with pytest.raises(CheckpointError, match=r"a\.rawtensors is damaged: the header line"):
        RawReader().read(tmp_path / "a.rawtensors")
