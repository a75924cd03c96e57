"""Kinds of files that people take for checkpoints, each with the remedy, told by their first bytes or their records.

A file of another kind is not damaged. So its message names the kind, and says how to get a checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nucleate.errors import CheckpointUnreadableError, name_list

#: The message for a module that was pickled whole; with the fields `what` and `name`.
WHOLE_MODULE = (
    "{what} is a {name}: a whole module, pickled with its class, and not a state dict. Loading it runs code that the "
    "file names. If you trust the file, save its weights alone: `torch.save(model.state_dict(), path)`, where `model` "
    "is that part of `torch.load(path, weights_only=False)`. `load_raw` with `prefix` takes weights that lie beside it."
)


@dataclass(frozen=True)
class FileKind:
    """A kind of file that is not a checkpoint.

    Attributes:
        name: The kind.
        cure: A sentence that says how to get a checkpoint.
        is_of_torch: Whether torch writes such files.
    """

    name: str
    cure: str
    is_of_torch: bool = False

    def refusal(self, path: object) -> CheckpointUnreadableError:
        """Return the error for a file of this kind."""
        return CheckpointUnreadableError(f"{path} is {self.name}, not a checkpoint. {self.cure}")


TORCHSCRIPT = FileKind("a TorchScript program", "Save `torch.jit.load(path).state_dict()` instead.", True)
TORCH_PACKAGE = FileKind(
    "a torch.package, a program with its weights",
    "If you trust it, load the model with `torch.package.PackageImporter(path)` and save `model.state_dict()`.",
    True,
)
EXPORTED = FileKind(
    "a program of torch.export", "Save `torch.export.load(path).state_dict` with `torch.save` instead.", True
)
KERAS = FileKind(
    "a model of Keras",
    "Load it with `keras.models.load_model(path)` and save its weights as tensors with `torch.save`.",
)
NPZ = FileKind(
    "an archive of NumPy arrays",
    "Save `{name: torch.from_numpy(array) for name, array in numpy.load(path).items()}` with `torch.save`.",
)
WHEEL = FileKind("a Python package (a wheel)", "Install it with pip, or unpack it and give the path of a file in it.")
STABLE_BASELINES = FileKind(
    "a model of Stable-Baselines3", "Unpack it, and load `policy.pth`: the weights are a torch file in the archive."
)

_BY_FIRST_BYTES: tuple[tuple[bytes, FileKind], ...] = (
    (
        b"\x89HDF\r\n\x1a\n",
        FileKind("an HDF5 file", "Read its arrays with `h5py`, and save them as tensors with `torch.save`."),
    ),
    (
        b"GGUF",
        FileKind(
            "a GGUF file of llama.cpp",
            "Load it with transformers (`from_pretrained(folder, gguf_file=name)`) and save the model again.",
        ),
    ),
    (
        b"\x93NUMPY",
        FileKind("one NumPy array", 'Save `{"name": torch.from_numpy(numpy.load(path))}` with `torch.save`.'),
    ),
    (b"\x1f\x8b", FileKind("a file that gzip compressed", "Unpack it with `gunzip`.")),
    (b"BZh", FileKind("a file that bzip2 compressed", "Unpack it with `bunzip2`.")),
    (b"\xfd7zXZ\0", FileKind("a file that xz compressed", "Unpack it with `unxz`.")),
    (b"(\xb5/\xfd", FileKind("a file that zstd compressed", "Unpack it with `unzstd`.")),
    (
        b"version https://git-lfs",
        FileKind("a pointer of Git LFS", "It only names the file. Get the file itself with `git lfs pull`."),
    ),
)
_WEB_PAGE = FileKind("a web page", "The server sent a page instead of the file. Download the file again.")
_TAR = FileKind("a tar archive", "Unpack it with `tar -xf`, and give the path of a file in it.")
_TFLITE = FileKind("a model of TensorFlow Lite", "Convert it where it was made; it holds no named tensors of torch.")


def kind_of_bytes(start: bytes) -> FileKind | None:
    """Return the kind of a file that begins with `start`, of 512 bytes if possible; or None if it is not known."""
    for magic, kind in _BY_FIRST_BYTES:
        if start.startswith(magic):
            return kind
    if start[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return _WEB_PAGE
    if start[257:262] == b"ustar":
        return _TAR
    return _TFLITE if start[4:8] == b"TFL3" else None


def kind_of_archive(names: Collection[str]) -> FileKind | None:
    """Return the kind of a zip archive with these records; None for a checkpoint of torch."""
    # Most archives are the few records of one tensor in a folder of torch.distributed.checkpoint.
    short = {name.partition("/")[2] or name for name in names if name.count("/") <= 2}
    if ".data/extern_modules" in short:
        return TORCH_PACKAGE
    if "constants.pkl" in short or "bytecode.pkl" in short:
        return TORCHSCRIPT
    if "data.pkl" in short:
        return None
    if "archive_format" in short or any(name.startswith("models/") and name.endswith(".json") for name in short):
        return EXPORTED
    if "model.weights.h5" in short:
        return KERAS
    if names and all(name.endswith(".npy") for name in names):
        return NPZ
    if any(name.endswith(".dist-info/WHEEL") for name in names):
        return WHEEL
    if "_stable_baselines3_version" in short:
        return STABLE_BASELINES
    inner = [name[:100] for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors"))]
    if inner:
        what = f"a zip archive that holds {name_list(inner, 3)}"
        return FileKind(what, "Unpack it, and give the path of such a file.")
    return FileKind(
        "a zip archive, but not a file of `torch.save`",
        f"It has no data.pkl, but {name_list((name[:50] for name in names), 5) or 'nothing'}.",
    )
