"""Special methods of the model's class work on the wrapper, and no others."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate.strategies import SingleDeviceStrategy
from nucleate.wrappers import ModuleWrapper
from tests.device import ACCELERATOR, device

T = TypeVar("T")


def set_up(model: nn.Module, precision: str = "32-true") -> Any:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device", precision=precision).setup(model)


def test_a_sequential_is_indexed_counted_and_iterated() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    wrapper = set_up(model)
    assert wrapper[0] is model[0]
    assert wrapper[-1] is model[2]
    assert list(wrapper[:2]) == [model[0], model[1]]
    assert len(wrapper) == 3
    assert list(wrapper) == list(model)
    assert model[1] in wrapper
    assert nn.ReLU() not in wrapper
    wrapper[1] = nn.Tanh()
    assert isinstance(model[1], nn.Tanh)
    del wrapper[1]
    assert len(model) == 2
    assert list(wrapper + nn.Sequential(nn.ReLU()))[:2] == list(model)
    same = wrapper
    same += nn.Sequential(nn.ReLU())
    assert same is wrapper
    assert len(model) == 3
    assert isinstance(wrapper, Sized)
    assert isinstance(wrapper, Iterable)


def test_a_module_dict_is_a_mapping() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.ReLU()})
    wrapper = set_up(model)
    assert wrapper["a"] is model["a"]
    assert "b" in wrapper
    assert list(wrapper) == ["a", "b"]
    assert {**wrapper} == {**model}
    with pytest.raises(KeyError):
        _ = wrapper["c"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (len, r"has no len\(\)"),
        (iter, "is not iterable"),
        (reversed, "is not reversible"),
        (operator.itemgetter(0), "is not subscriptable"),
        (lambda x: 1 in x, "not iterable|not a container"),
        (int, "must be a string"),
        (lambda x: x + 1, "unsupported operand"),
        (lambda x: x < 1, "not supported"),
        (lambda x: x.__enter__, "__enter__"),
    ],
)
def test_what_the_models_class_does_not_have_fails_as_in_plain_torch(call: Callable[[Any], Any], message: str) -> None:
    for model in (nn.Linear(2, 2), set_up(nn.Linear(2, 2))):
        with pytest.raises((TypeError, AttributeError), match=message):
            call(model)
    assert type(set_up(nn.Linear(2, 2))) is ModuleWrapper


def test_a_model_is_as_true_as_in_plain_torch() -> None:
    class Flag(nn.Linear):
        def __bool__(self) -> bool:
            return False

    with pytest.warns(UserWarning, match="nothing to create"):
        assert not set_up(nn.Sequential())
    assert set_up(nn.Sequential(nn.Linear(1, 1)))
    assert set_up(nn.Linear(1, 1))
    assert not set_up(Flag(1, 1))
    # And it runs, although it is false.
    assert set_up(Flag(1, 1))(torch.ones(1, 1, device=device())).shape == (1, 1)


class Everything(nn.Module, Generic[T]):
    """Defines what Python asks of a class, in several ways."""

    __hash__ = None  # type: ignore[assignment]
    __iter__ = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[Any] = []
        self.__dict__["__len__"] = lambda: 99  # Python does not look at an instance.

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def __len__(self) -> int:
        return 5

    def __reversed__(self) -> Iterator[int]:
        return iter((2, 1))

    def __contains__(self, item: object) -> bool:
        return item == 7

    def __enter__(self) -> Any:
        self.seen.append("enter")
        return self

    def __exit__(self, *error: object) -> bool:
        self.seen.append(error[0])
        return True

    def __matmul__(self, other: Any) -> Any:
        return ("matmul", other)

    def __rmatmul__(self, other: Any) -> Any:
        return ("rmatmul", other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Everything)

    def __int__(self) -> int:
        return 3

    def __str__(self) -> str:
        return "everything"

    def __format__(self, text: str) -> str:
        return f"<{text}>"

    @classmethod
    def __float__(cls) -> float:
        return float(len(cls.__name__))

    @staticmethod
    def __index__() -> int:
        return 1


def test_every_special_method_is_found_as_python_finds_it() -> None:
    model: Everything[int] = Everything()
    wrapper = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    wrapped = ModuleWrapper(model, model, wrapper.precision, wrapper.strategy)
    assert len(wrapped) == 5  # type: ignore[arg-type]
    assert list(reversed(wrapped)) == [2, 1]  # type: ignore[call-overload]
    assert 7 in wrapped  # type: ignore[operator]
    assert 8 not in wrapped  # type: ignore[operator]
    with wrapped as entered:  # type: ignore[attr-defined]
        raise ZeroDivisionError
    assert entered is wrapped
    assert model.seen == ["enter", ZeroDivisionError]
    assert wrapped @ 4 == ("matmul", 4)  # type: ignore[operator]
    assert 4 @ wrapped == ("rmatmul", 4)  # type: ignore[operator]
    assert wrapped == Everything()
    assert wrapped == ModuleWrapper(Everything(), Everything(), wrapper.precision, wrapper.strategy)
    assert (wrapped @ wrapped)[1] is model  # type: ignore[operator]
    assert int(wrapped) == 3  # type: ignore[call-overload]
    assert [10, 11][wrapped] == 11  # type: ignore[call-overload]
    assert str(wrapped) == "everything"
    assert f"{wrapped:x}" == "<x>"
    assert float(wrapped) == 10.0  # type: ignore[arg-type]
    assert repr(wrapped).startswith("ModuleWrapper(Everything(")
    with pytest.raises(TypeError, match="not iterable"):
        iter(wrapped)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="unhashable"):
        hash(wrapped)


def test_the_type_is_still_that_of_a_wrapper() -> None:
    wrapper = set_up(nn.Sequential(nn.Linear(2, 2)))
    assert isinstance(wrapper, ModuleWrapper)
    assert isinstance(wrapper, nn.Module)
    assert not isinstance(wrapper, nn.Sequential)
    assert type(wrapper).__name__ == "ModuleWrapper"
    assert type(wrapper).__module__ == ModuleWrapper.__module__
    assert type(wrapper) is type(set_up(nn.Sequential(nn.ReLU(), nn.Linear(1, 1))))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_the_special_methods_too(copied: Callable[[Any], Any]) -> None:
    wrapper = set_up(nn.Sequential(OrderedDict(first=nn.Linear(2, 2), second=nn.ReLU())))
    clone = copied(wrapper)
    assert clone is not wrapper
    assert type(clone) is type(wrapper)
    assert len(clone) == 2
    data = torch.ones(1, 2, device=device())
    assert torch.equal(clone(data), wrapper(data))
    assert (clone[0].weight is wrapper[0].weight) is (copied is copy.copy)


def test_a_shallow_copy_wraps_the_same_model() -> None:
    wrapper = set_up(nn.Linear(2, 2))
    clone = copy.copy(wrapper)
    assert clone.module is wrapper.module
    clone.note = 1
    assert wrapper.note == 1


class Deep(nn.Sequential):
    def __getitem__(self, data: Any) -> Any:
        return self(data)


class Guarding(SingleDeviceStrategy):
    """A strategy that guards methods."""

    name = "guarding"

    def guards_methods(self, module: nn.Module) -> bool:
        return True

    def mark_forward_method(self, module: nn.Module, name: str) -> None:
        return None


def test_a_special_method_that_calls_forward_is_guarded_and_can_be_marked() -> None:
    runtime = Runtime(accelerator="cpu", precision="64-true", strategy="single_device")
    model = Deep(nn.Linear(2, 2).double())
    wrapper: Any = ModuleWrapper(model, model, runtime.precision, Guarding())
    with pytest.raises(UsageError, match=r"Deep.__getitem__\(\) calls forward by itself"):
        wrapper[torch.ones(1, 2).double()]
    wrapper.mark_forward_method("__getitem__")
    assert wrapper[torch.ones(1, 2)].shape == (1, 2)


def test_device_and_dtype_are_given_to_a_model_that_has_none() -> None:
    wrapper = set_up(nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2)), "bf16-true")
    assert wrapper.device == device()
    assert wrapper.dtype == torch.bfloat16
    assert {"device", "dtype"} <= set(dir(wrapper))
    assert not hasattr(wrapper.module, "device")
    with pytest.warns(UserWarning, match="nothing to create"):
        assert set_up(nn.ReLU(), "64-true").dtype == torch.float64


def test_a_models_own_device_and_dtype_win() -> None:
    class Model(nn.Linear):
        @property
        def device(self) -> str:
            return "mine"

        @property
        def dtype(self) -> str:
            raise AttributeError("this model cannot say")

    wrapper = set_up(Model(1, 1))
    assert wrapper.device == "mine"
    with pytest.raises(AttributeError, match="'Model' object has no attribute 'dtype'"):
        _ = wrapper.dtype
    other = set_up(nn.Linear(1, 1))
    other.device = "set"
    assert other.device == other.module.device == "set"
