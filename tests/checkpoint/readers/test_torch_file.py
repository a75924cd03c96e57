"""Torch files: where every kind of tensor lies, and that nothing in them is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint.readers import open_checkpoint
from nucleate.checkpoint.state.tree import join
from nucleate.errors import CheckpointError, CheckpointNotFoundError
from tests.checkpoint.readers.reading import same_bits, tensor_at, whole
from tests.checkpoint.trees import same, trees

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Evil:
    """Leaves a trace where its code is run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.trace),))


class Fancy(Tensor):
    pass


@both_formats
@given(tree=trees)
@settings(deadline=None)
def test_any_state_is_read_as_torch_loads_it(tmp_path_factory: pytest.TempPathFactory, zipped: bool, tree: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "a.pt"
    state = {"": tree, "x": [tree]}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    try:
        contents = open_checkpoint(path)
    except CheckpointError as error:
        # Such as state[""]["a"] and state["."]["a"], or state[1] and state["1"].
        assume("two tensors called" not in str(error))
        raise

    def tensor(place: Any) -> Tensor | None:
        return tensor_at(contents, *place) if place in contents.keys else None

    assert same(join(contents.skeleton, (), tensor), torch.load(path, weights_only=True))


TENSORS = {
    "transposed": lambda: torch.randn(5, 7).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "every other": lambda: torch.randn(9, 6)[1::2, ::3],
    "part of a larger one": lambda: torch.randn(100)[30:40],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "scalar": lambda: torch.randn(4)[2],
    "without elements": lambda: torch.randn(3, 0, 2),
    "parameter": lambda: nn.Parameter(torch.randn(3)),
    "parameter with attributes": lambda: _with_attribute(nn.Parameter(torch.randn(3))),
    "conjugate": lambda: torch.randn(3, 2, dtype=torch.complex64).conj(),
    "conjugate, transposed": lambda: torch.randn(3, 2, dtype=torch.complex64).conj().t(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "not a number": lambda: torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]),
    "with a gradient": lambda: torch.randn(3, requires_grad=True),
}


def _with_attribute(tensor: Tensor) -> Tensor:
    tensor.tag = "kept by torch"  # type: ignore[attr-defined]
    return tensor


@both_formats
@pytest.mark.parametrize("kind", TENSORS)
def test_every_kind_of_tensor_is_read_as_torch_loads_it(tmp_path: Path, kind: str, zipped: bool) -> None:
    torch.save({"a": TENSORS[kind]()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    contents = open_checkpoint(tmp_path / "a.pt")
    expected = torch.load(tmp_path / "a.pt", weights_only=True)["a"].detach()
    assert same_bits(tensor_at(contents, "a"), expected)
    out = torch.empty(expected.numel(), dtype=expected.dtype)
    for start in range(expected.numel()):
        contents.tensors["a"].read(start, out[start:])
        assert same_bits(out[start:], expected.reshape(-1)[start:].resolve_conj())


@both_formats
def test_tied_tensors_are_the_same_bytes(tmp_path: Path, zipped: bool) -> None:
    weight = torch.randn(4)
    torch.save({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    contents = open_checkpoint(tmp_path / "a.pt")
    a, b, c = (contents.tensors[key] for key in "abc")
    assert a.is_same(b)
    assert not a.is_same(c)
    assert contents.size_bytes == a.size_bytes + c.size_bytes


def test_storages_may_have_numbers_for_names(tmp_path: Path) -> None:
    # litgpt's `incremental_save` writes such files, and torch reads them.
    class Numbered(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, 7, "cpu", 3) if isinstance(obj, torch.storage.TypedStorage) else None

    path, tensor = tmp_path / "model.pth", torch.arange(3.0)
    data = io.BytesIO()
    Numbered(data, protocol=2).dump({"weight": tensor})
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", data.getvalue(), len(data.getvalue()))
    writer.write_record("data/7", tensor.untyped_storage(), 12)
    writer.write_end_of_file()
    assert torch.equal(torch.load(path)["weight"], tensor)
    assert torch.equal(tensor_at(open_checkpoint(path), "weight"), tensor)


def test_modules_are_recognized_by_what_their_state_dict_leaves(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(1, 1).state_dict(), "other": {"x": torch.ones(1)}}, tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt").modules == (("model",),)
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "b.pt")
    assert open_checkpoint(tmp_path / "b.pt").modules == ((),)
    torch.save({"weight": torch.ones(1)}, tmp_path / "c.pt")
    assert open_checkpoint(tmp_path / "c.pt").modules == ((),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_kind_are_kept(tmp_path: Path, protocol: int) -> None:
    state = {
        "numbers": [0, -1, 255, 65536, -(2**31), 2**40, -(2**70), 2**3000, 0.5, float("inf"), 1 + 2j, True, None],
        "text": ["", "é", "x" * 300, "\0"],
        "bytes": [b"", b"\xff" * 300, bytearray(b"abc")],
        "torch": [torch.float8_e5m2, torch.device("cuda", 3), torch.device("cpu"), torch.Size([1, 2]), torch.strided],
        "containers": [(), (1,), (1, 2, 3, 4), [], {}, {1, 2}, set(), OrderedDict(b=1, a=2), Counter("aab")],
        ("a", 1): {1.5: "a", None: "b", True: "c", torch.float32: "d"},
    }
    torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
    skeleton = open_checkpoint(tmp_path / "a.pt").skeleton
    assert repr(skeleton) == repr(state)
    assert same(skeleton, state)


# --- what is refused


@both_formats
@pytest.mark.parametrize("nest", [lambda x: {"a": [x]}, lambda x: {"a": {x: 1}}, lambda x: {"a": (x,)}])
def test_code_is_never_run_and_named_with_its_place(tmp_path: Path, nest: Any, zipped: bool) -> None:
    torch.save(nest(Evil(tmp_path / "trace")), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"a(\.0)? in .*a\.pt is a posix\.mkdir.*running code.*weights_only=False"
    ):
        open_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "trace").exists()


def test_a_class_that_the_user_allowed_is_made_as_torch_would(tmp_path: Path) -> None:
    torch.save({"a": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"is a pathlib\.PosixPath"):
        open_checkpoint(tmp_path / "a.pt")
    with torch.serialization.safe_globals([type(Path())]):
        assert open_checkpoint(tmp_path / "a.pt").skeleton == {"a": Path("x")}


def refused_states() -> dict[str, tuple[Any, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
    return {
        "sparse": ({"s": torch.eye(2).to_sparse()}, r"s in .* is a sparse tensor; save `tensor.to_dense\(\)`"),
        "quantized": ({"q": quantized}, r"q in .* is a quantized tensor"),
        "meta": ({"m": [torch.ones(2, device="meta")]}, r"m\.0 in .* is a tensor on the meta device"),
        "subclass": ({"f": torch.ones(2).as_subclass(Fancy)}, r"f in .* is a .*Fancy, whose numbers only that class"),
        "storage": ({"s": torch.ones(2).untyped_storage()}, r"s in .* is a bare storage"),
        "module": ({"m": nn.Linear(1, 1)}, r"m in .* is a torch\.nn\.modules\.linear\.Linear"),
        "list": ([torch.ones(1)], "holds a list. A checkpoint must be a dict"),
        "tensor": (torch.ones(1), "holds one tensor. A checkpoint must be a dict"),
        "twins": ({"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}, "holds two tensors called a.b"),
        "expanded": ({"e": torch.ones(1).expand(1 << 40)}, r"e in .* has the shape \(1099511627776,\).*expanded"),
    }


@pytest.mark.parametrize("kind", refused_states())
def test_what_cannot_be_read_is_refused_by_its_key(tmp_path: Path, kind: str) -> None:
    state, message = refused_states()[kind]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(error.value)


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["again"] = [state]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds itself"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_state_that_grows_without_end_when_walked_through_is_refused(tmp_path: Path) -> None:
    value: Any = [0] * 10
    for _ in range(30):
        value = [value] * 10
    torch.save({"a": value}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="nested too deep, or holds itself"):
        open_checkpoint(tmp_path / "a.pt")


def test_a_plain_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match="`torch.save` did not write"):
        open_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"])
def test_something_else_of_that_name_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.bin"):
        open_checkpoint(tmp_path / "a.bin")


def test_an_archive_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("x/text", b"")
    with pytest.raises(CheckpointError, match="not a file of `torch.save`"):
        open_checkpoint(tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(tmp_path / "b.pt")


def repack(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.rpartition("/")[2]
            new.writestr(info.filename, records.get(name, old.read(info)))


def test_archives_that_are_compressed_or_too_short_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", tmp_path / "compressed.pt", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(tmp_path / "compressed.pt")
    repack(tmp_path / "a.pt", tmp_path / "short.pt", **{"0": b"abc"})
    with pytest.raises(CheckpointError, match="storage 0 has 3 bytes instead of 4"):
        open_checkpoint(tmp_path / "short.pt")
    repack(tmp_path / "a.pt", tmp_path / "same.pt")
    assert tensor_at(open_checkpoint(tmp_path / "same.pt"), "a").tolist() == [1.0]


def test_a_file_of_a_big_endian_machine_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    saved = {
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "float": torch.randn(4, 5).t(),
        "double": torch.randn(3, dtype=torch.float64),
        "long": torch.arange(5)[1:4],
        "bytes": torch.arange(5, dtype=torch.uint8),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "empty": torch.empty(0, 2),
    }
    torch.save(saved, tmp_path / "little.pt")
    order = {str(number): tensor for number, tensor in enumerate(saved.values())}
    with zipfile.ZipFile(tmp_path / "little.pt") as archive:
        records = {name.split("/data/")[-1]: archive.read(name) for name in archive.namelist() if "/data/" in name}
    swapped = {}
    for number, data in records.items():
        dtype = order[number].dtype
        size = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        swapped[number] = b"".join(data[place : place + size][::-1] for place in range(0, len(data), size))
    repack(tmp_path / "little.pt", tmp_path / "big.pt", byteorder=b"big", **swapped)
    expected = torch.load(tmp_path / "big.pt", weights_only=True)
    found = Runtime(accelerator="cpu").load(tmp_path / "big.pt")
    for name, tensor in saved.items():
        assert same_bits(expected[name].resolve_conj(), tensor.resolve_conj()), name
        assert same_bits(found[name], tensor.resolve_conj()), name


def test_a_file_of_a_big_endian_machine_is_bound_and_read_in_parts(tmp_path: Path) -> None:
    weight = torch.randn(8, 4)
    torch.save({"weight": weight}, tmp_path / "little.pt")
    data = weight.numpy().byteswap().tobytes()
    repack(tmp_path / "little.pt", tmp_path / "big.pt", byteorder=b"big", **{"0": data})
    runtime = Runtime(accelerator="cpu", precision="bf16-true")
    with runtime.init_module(empty_init=True):
        model = nn.Linear(4, 8, bias=False)
    runtime.load_raw(tmp_path / "big.pt", model)
    assert torch.equal(runtime.setup(model).weight, weight.bfloat16())


# Pickles that make a less careful reader take gigabytes, minutes, or the process.
BOMBS = {
    "a bytearray as long as it says": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.",
    "a memo of billions": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a text of 4 GiB": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes of 16 EiB": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a tuple without end as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "a list without end": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "a dict of dicts": b"\x80\x02" + b"}N" * 200_000 + b".",
    "one list copied over and over": b"\x80\x02]("
    + b"N" * 50_000
    + b"eq\x00c__builtin__\nset\nq\x010"
    + b"h\x01h\x00\x85R" * 50_000
    + b".",
    "a size that is none": b"\x80\x02ctorch\nSize\n(J\xff\xff\xff\xfft\x85R.",
    "a mark that was never set": b"\x80\x02t.",
    "nothing": b"\x80\x02.",
    "a state for a number": b"\x80\x02K\x01}b.",
    "unknown": b"\x80\x02\xff.",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_that_is_made_to_harm_is_refused_in_no_time_and_no_memory(tmp_path: Path, kind: str) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    repack(tmp_path / "a.pt", tmp_path / "bomb.pt", **{"data.pkl": BOMBS[kind]})
    before = _peak_kib()
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        open_checkpoint(tmp_path / "bomb.pt")
    assert _peak_kib() - before < 300 << 10


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


# --- folders, and what `save` writes


def test_a_folder_with_one_file_or_the_usual_name_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "any.pt")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    torch.save({"b": torch.ones(1)}, tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match=r"2 checkpoints, any\.pt, training_args\.bin. Give the path"):
        open_checkpoint(tmp_path)
    torch.save({"c": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).tensors) == ["c"]


def test_shards_must_agree_with_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "1.bin")
    torch.save({"b": torch.ones(1)}, tmp_path / "2.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "1.bin"}}))
    with pytest.raises(CheckpointError, match=r"b is in 1\.bin, but none"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "3.bin"}}))
    with pytest.raises(CheckpointNotFoundError, match=r"3\.bin"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.bin"}}))
    assert "2.bin" in open_checkpoint(tmp_path).notes["ignored files"]


def test_what_save_adds_makes_a_file_complete_with_ties_known_by_their_first_name(tmp_path: Path) -> None:
    weight = torch.randn(2)
    own = {"version": 1, "sharded": {"model.a": [0]}, "modules": [["model"]]}
    state = {"model": {"a": weight, "b": weight, "e": torch.zeros(0), "f": torch.zeros(0)}, "step": 3, "nucleate": own}
    torch.save(state, tmp_path / "a.pt")
    contents = open_checkpoint(tmp_path / "a.pt")
    assert contents.is_complete
    assert contents.skeleton == {"model": dict.fromkeys("abef"), "step": 3}
    assert list(contents.tensors) == ["model.a", "model.e", "model.f"]
    assert contents.keys["model", "b"] == "model.a"
    assert (contents.modules, contents.sharded) == ((("model",),), {"model.a": [0]})
    assert torch.equal(whole(contents.tensors["model.a"]), weight)


@pytest.mark.parametrize("own", [{"version": 2}, {"version": "1"}, {"version": 1}, {"version": 1, "sharded": 3}])
def test_what_save_did_not_add_is_refused(tmp_path: Path, own: Any) -> None:
    torch.save({"nucleate": own, "a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        open_checkpoint(tmp_path / "a.pt")
