"""Objects of allowed classes: made as torch's `weights_only` makes them, or refused without a word of damage."""

from __future__ import annotations

import argparse
import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nucleate.checkpoint.readers import open_checkpoint
from nucleate.errors import CheckpointError, CheckpointUnreadableError

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@dataclasses.dataclass
class Config:
    width: int
    inner: Any = None


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Both(Slots):
    """Has slots and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.b = 2


class Needy:
    def __new__(cls, name: str) -> Needy:
        made = super().__new__(cls)
        made.name = name  # type: ignore[attr-defined]
        return made

    def __getnewargs__(self) -> tuple[str]:
        return (self.name,)  # type: ignore[attr-defined]


class WithState:
    def __init__(self, value: int) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return [self.value]

    def __setstate__(self, state: Any) -> None:
        self.value = state[0] + 100


class Items(dict):  # type: ignore[type-arg]
    pass


class Names(list):  # type: ignore[type-arg]
    pass


class Broken:
    def __init__(self) -> None:
        self.a = 1

    def __setstate__(self, state: Any) -> None:
        raise AttributeError("no such thing")


def read(path: Path, value: Any, *allowed: Any, zipped: bool = True) -> Any:
    torch.save({"value": value}, path, _use_new_zipfile_serialization=zipped)
    with torch.serialization.safe_globals(list(allowed)):
        return open_checkpoint(path).skeleton["value"]


def attributes(value: Any) -> Any:
    return {
        name: getattr(value, name) for name in ("a", "b", "width", "inner", "name", "value") if hasattr(value, name)
    }


ARRAYS = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float64DType]
NUMBERS = [np._core.multiarray.scalar, np.dtype, np.dtypes.Float64DType]
OBJECTS = {
    "object": (argparse.Namespace(a=1, b=[None, (1, "x")]), [argparse.Namespace]),
    "in an object": (argparse.Namespace(a=argparse.Namespace(b=4)), [argparse.Namespace]),
    "in a list in an object": (argparse.Namespace(a=[{"k": argparse.Namespace(b=2)}]), [argparse.Namespace]),
    "dataclass": (Config(4, inner=Config(5)), [Config]),
    "slots": (Slots(), [Slots]),
    "slots and a dict": (Both(), [Both]),
    "arguments": (Needy("n"), [Needy]),
    "its own way": (WithState(3), [WithState]),
    "numpy array": (np.arange(6.0).reshape(2, 3), ARRAYS),
    "numpy number": (np.float64(0.5), NUMBERS),
    "a class itself": (argparse.Namespace, [argparse.Namespace]),
    "ordered dict in an object": (argparse.Namespace(a=nn.Linear(1, 1).state_dict()), [argparse.Namespace]),
}


@both_formats
@pytest.mark.parametrize("kind", OBJECTS)
def test_an_object_of_an_allowed_class_is_the_one_that_torch_makes(tmp_path: Path, kind: str, zipped: bool) -> None:
    value, allowed = OBJECTS[kind]
    got = read(tmp_path / "a.pt", value, *allowed, zipped=zipped)
    with torch.serialization.safe_globals(allowed):
        want = torch.load(tmp_path / "a.pt", weights_only=True)["value"]
    assert type(got) is type(want)
    assert repr(attributes(got)) == repr(attributes(want))
    if not isinstance(want, (Slots, Needy, WithState)) and kind != "ordered dict in an object":
        assert np.all(got == want)


@both_formats
def test_collections_of_allowed_classes_have_their_items(tmp_path: Path, zipped: bool) -> None:
    # torch refuses these: it sets items of plain dicts and lists only.
    path = tmp_path / "a.pt"
    got = read(path, Items(width=4, inner=Items(a=1)), Items, zipped=zipped)
    assert (type(got), type(got["inner"]), got) == (Items, Items, {"width": 4, "inner": {"a": 1}})
    got = read(path, Names(["a", Names("b")]), Names, zipped=zipped)
    assert (type(got), type(got[1]), got) == (Names, Names, ["a", ["b"]])
    got = read(path, collections.defaultdict(list, a=[1]), collections.defaultdict, list, zipped=zipped)
    assert (got.default_factory, got) == (list, {"a": [1]})
    assert read(path, collections.deque([1, 2], 5), collections.deque, zipped=zipped) == collections.deque([1, 2], 5)


@both_formats
def test_tensors_in_an_object_are_those_that_torch_loads(tmp_path: Path, zipped: bool) -> None:
    weight = torch.arange(6.0).view(2, 3)
    parts = [weight, weight.t(), weight[1:], nn.Parameter(weight, requires_grad=False), torch.ones(0, 2)]
    parts += [nn.Parameter(torch.ones(2)), (weight + 1j).conj(), torch.arange(3, dtype=torch.int8)]
    value = argparse.Namespace(a=parts, b={"again": weight})
    got = read(tmp_path / "a.pt", value, argparse.Namespace, zipped=zipped)
    with torch.serialization.safe_globals([argparse.Namespace]):
        want = torch.load(tmp_path / "a.pt", weights_only=True)["value"]
    for one, other in zip([*got.a, got.b["again"]], [*want.a, want.b["again"]], strict=True):
        assert torch.equal(one, other)
        assert (type(one), one.dtype, one.requires_grad) == (type(other), other.dtype, other.requires_grad)
    got.b["again"][1, 0] = 50.0
    assert got.a[1][0, 1] == 50.0, "they share memory, as when they were saved"
    assert got.a[2][0, 0] == 50.0


def test_an_object_in_two_places_is_one_object_and_may_hold_itself(tmp_path: Path) -> None:
    one = argparse.Namespace(a=1)
    one.itself = one
    got = read(tmp_path / "a.pt", [one, {"k": one}], argparse.Namespace)
    assert got[0] is got[1]["k"] is got[0].itself


def test_a_chain_of_objects_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    value: Any = None
    for _ in range(300):
        value = argparse.Namespace(a=value)
    with pytest.raises(CheckpointUnreadableError, match="value in .* nested too deep"):
        read(tmp_path / "a.pt", value, argparse.Namespace)


def test_an_error_of_an_allowed_class_is_not_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadableError, match=r"Broken raised AttributeError.*no such thing") as error:
        read(tmp_path / "a.pt", Broken(), Broken)
    assert "damage" not in str(error.value)


def test_an_object_that_holds_another_class_names_that_class(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadableError, match=r"is a argparse\.Namespace that holds a .*Slots"):
        read(tmp_path / "a.pt", argparse.Namespace(a=[Slots()]), argparse.Namespace)


def test_modules_of_the_system_are_never_allowed_as_in_torch(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            import os

            return (os.mkdir, (str(tmp_path / "trace"),))

    import os

    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        read(tmp_path / "a.pt", Evil(), os.mkdir)
    assert not (tmp_path / "trace").exists()
