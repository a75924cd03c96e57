"""Files that people take for checkpoints: named for what they are, whatever their names, and never called damaged."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nucleate.checkpoint
from nucleate import Runtime
from nucleate.checkpoint import verify
from nucleate.checkpoint.readers import open_checkpoint
from nucleate.cli import main
from nucleate.errors import CheckpointUnreadableError


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)


def mobile(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))._save_for_lite_interpreter(str(path))


def package(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.package.PackageExporter(path) as exporter:
            exporter.extern("torch.**")
            exporter.save_pickle("model", "model.pkl", nn.Linear(2, 2))


def archive(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, b"{}")

    return write


def numpy_archive(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(2), b=np.ones(3))


def numpy_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.ones(2))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def compressed(path: Path) -> None:
    data = io.BytesIO()
    torch.save({"a": torch.ones(1)}, data)
    path.write_bytes(gzip.compress(data.getvalue()))


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "TorchScript": (torchscript, r"a TorchScript program, .*`torch\.jit\.load\(path\)\.state_dict\(\)`"),
    "TorchScript for phones": (mobile, "a TorchScript program"),
    "torch.package": (package, r"a torch\.package, .*`torch\.package\.PackageImporter\(path\)`"),
    "torch.export": (archive("m/archive_format", "m/models/model.json"), r"a program of torch\.export"),
    "Keras": (archive("metadata.json", "config.json", "model.weights.h5"), "a model of Keras"),
    "npz": (numpy_archive, r"an archive of NumPy arrays.*torch\.from_numpy"),
    "wheel": (archive("x/__init__.py", "x-1.dist-info/WHEEL"), r"a Python package \(a wheel\)"),
    "Stable-Baselines3": (archive("data", "policy.pth", "_stable_baselines3_version"), "a model of Stable-Baselines3"),
    "a zip of checkpoints": (archive("a/b.pt", "c.txt"), r"a zip archive that holds a/b\.pt, .*Unpack it"),
    "any zip": (archive("x/text"), r"a zip archive, but not a file of `torch\.save`.*x/text"),
    "npy": (numpy_array, "one NumPy array"),
    "HDF5": (content(b"\x89HDF\r\n\x1a\n" + bytes(100)), "an HDF5 file"),
    "GGUF": (content(b"GGUF" + bytes(100)), "a GGUF file"),
    "gzip": (compressed, "gzip compressed.*gunzip"),
    "tar": (tar, "a tar archive"),
    "a pointer": (content(b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS.*git lfs pull"),
    "a web page": (content(b"\n<!DOCTYPE html><html>"), "a web page.*Download the file again"),
}


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".model", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_named_for_its_kind_under_any_name(tmp_path: Path, kind: str, suffix: str) -> None:
    write, message = KINDS[kind]
    path = tmp_path / f"file{suffix}"
    write(path)
    with pytest.raises(CheckpointUnreadableError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) <= 1000
    assert "damaged" not in str(error.value)
    report = verify(path)
    assert (report.damage, report.is_good) == ([], False)
    assert report.unreadable == str(error.value)


def test_a_pickle_of_another_program_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointUnreadableError, match=r"a pickle that `torch\.save` did not write"):
        open_checkpoint(tmp_path / "a.pt")


def test_verify_has_three_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(9), "args": {np.float64: 1}}, tmp_path / "whole.pt")
    torchscript(tmp_path / "other.jit")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    found = {}
    for name in ("whole.pt", "other.jit", "cut.pt"):
        status = main(["verify", str(tmp_path / name)])
        found[name] = status, capsys.readouterr().out.splitlines()[-1].rpartition(": ")[2]
    assert found == {"whole.pt": (0, "whole"), "other.jit": (3, "not readable"), "cut.pt": (1, "damaged")}


def test_inspect_shows_what_it_passes_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": nn.Linear(1, 1).state_dict(), "where": Path("x")}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 0
    assert "where  <pathlib.PosixPath, not read>" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--prefix", "model."]) == 0
    assert "passed over: where (pathlib.PosixPath)" in capsys.readouterr().out


def test_long_names_and_halves_of_characters_make_short_messages(tmp_path: Path) -> None:
    runtime = Runtime(accelerator="cpu")
    for key in ("k" * 9000, "\udcff"):
        torch.save({key: Path("x"), "w": torch.ones(1)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointUnreadableError, match=r"a\.pt is a pathlib") as error:
            runtime.load(tmp_path / "a.pt")
        assert len(str(error.value).encode("utf-8")) <= 1000


PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "checkpoints.md"


@pytest.mark.skipif(not PAGE.exists(), reason="needs the repository, not an installed package")
def test_the_page_has_the_words_of_the_messages() -> None:
    table = PAGE.read_text().partition("## Files of others")[2].partition("\n## ")[0]
    promised = [name for names in re.findall(r"refused: ([^|]+) \|", table) for name in names.split(", ")]
    assert len(promised) > 8
    source = Path(nucleate.checkpoint.__file__).parent
    messages = " ".join(
        path.read_text() for folder in ("readers", "loading") for path in (source / folder).rglob("*.py")
    )
    assert [name for name in promised if name not in re.sub(r'"\s+"', "", messages)] == []
