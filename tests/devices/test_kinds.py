"""torch's names of kinds of device are torch's to list."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from nucleate.devices import kinds as kinds_module
from nucleate.devices.kinds import is_kind, legacy_kind, legacy_types, module_moves, moves, questions


@pytest.mark.parametrize(("word", "known"), [("cpu", True), ("cuda", True), ("cuda:0", False), ("sparse", False)])
def test_a_kind_is_a_word_that_torch_takes_for_a_device(word: str, known: bool) -> None:
    assert is_kind(word) is known


def test_questions_and_moves_are_found_on_the_tensor() -> None:
    assert questions()[Tensor.is_cuda.__get__] == "cuda"  # type: ignore[attr-defined]
    assert questions()[Tensor.is_xpu.__get__] == "xpu"  # type: ignore[attr-defined]
    assert Tensor.is_meta.__get__ not in questions()  # type: ignore[attr-defined]
    assert moves()[Tensor.cuda] == "cuda"
    assert moves()[Tensor.xpu] == "xpu"
    assert moves()[Tensor.cpu] == "cpu"
    assert Tensor.to not in moves()
    assert set(module_moves()) >= {"cpu", "cuda", "xpu"}
    assert all(callable(getattr(nn.Module, name)) for name in module_moves())


def test_no_kind_is_passed_over_where_only_words_with_a_getter_are_tried() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {name.removeprefix("is_") for name in dir(Tensor) if is_kind(name.removeprefix("is_"))}
    assert set(questions().values()) == kinds - {"meta"}
    assert set(moves().values()) == {kind for kind in kinds if hasattr(Tensor, kind)}
    assert module_moves() == [name for name in dir(nn.Module) if is_kind(name)]


def test_few_words_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(kinds_module, "is_kind", lambda word: tried.append(word) is None and is_kind(word))
    kinds_module._known.__wrapped__("later", False)
    module_moves()
    assert 10 < len(tried) < 60, "each of the others costs an exception, and dir(Tensor) has 700"


def test_legacy_types_are_those_of_dense_tensors() -> None:
    found = {(module.__name__, name, kind) for module, name, kind in legacy_types(frozenset(("FloatTensor",)))}
    assert found == {("torch", "FloatTensor", "cpu"), ("torch.cuda", "FloatTensor", "cuda")}
    assert legacy_kind("torch.cuda.FloatTensor") == "cuda"
    assert legacy_kind("torch.FloatTensor") is None
    assert legacy_kind("torch.sparse.FloatTensor") is None


def test_the_methods_that_another_package_brings_are_found_after_it_came() -> None:
    program = """
import torch
from nucleate.deferred import deferred
from nucleate.devices.kinds import moves, questions
before = len(questions())
torch.utils.rename_privateuse1_backend("later")
torch.utils.generate_methods_for_privateuse1_backend()
assert questions()[torch.Tensor.is_later.__get__] == "later" and len(questions()) == before + 1
assert moves()[torch.Tensor.later] == "later"
with deferred():
    tensor = torch.empty(2)
    assert tensor.is_later is False and tensor.is_cpu
    assert tensor.cpu() is tensor
assert tensor.is_later is False
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_listing_them_warns_of_nothing() -> None:
    subprocess.run(
        [sys.executable, "-W", "error", "-c", "from nucleate.devices.kinds import moves; moves()"], check=True
    )
    assert torch.device("cpu").type == "cpu"
