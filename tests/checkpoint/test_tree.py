"""Splitting nested state into tensors and a skeleton, and joining it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from nucleate.checkpoint.state.tree import has_data, join, key_of, split
from nucleate.errors import CheckpointError, UsageError
from tests.checkpoint.trees import same, trees
from tests.device import cpu_only

pytestmark = pytest.mark.usefixtures("factories_on_device")


@given(trees)
def test_join_gives_back_what_split_took_apart(tree: Any) -> None:
    tensors: dict[tuple[Any, ...], Tensor] = {}
    skeleton = split(tree, ("root",), tensors)
    assert same(join(skeleton, ("root",), tensors.get), tree)


@given(trees)
def test_no_tensor_is_left_in_a_skeleton(tree: Any) -> None:
    skeleton = split(tree, (), {})
    found: dict[tuple[Any, ...], Tensor] = {}
    split(skeleton, (), found)
    assert found == {}


def test_tensors_are_detached_but_share_memory() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    tensors: dict[tuple[Any, ...], Tensor] = {}
    split([parameter], ("list",), tensors)
    assert not tensors["list", 0].requires_grad
    assert tensors["list", 0].data_ptr() == parameter.data_ptr()


def test_a_key_names_the_whole_way() -> None:
    assert key_of(("optimizer", "param_groups", 0, "lr")) == "optimizer.param_groups.0.lr"


def test_a_tensor_without_data_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"model\.w has no data"):
        split({"w": torch.empty(2, device="meta")}, ("model",), {})


def test_a_meta_tensor_that_pretends_to_be_on_a_device_is_seen_through() -> None:
    class Pretender(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return (
                False if func == Tensor.is_meta.__get__ else super().__torch_function__(func, types, args, kwargs or {})
            )

    tensor = torch.empty(2, device="meta").as_subclass(Pretender)
    assert not tensor.is_meta
    assert not has_data(tensor)


@cpu_only("the simulated device has strided tensors only")
def test_a_sparse_tensor_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"grid is a tensor of layout torch\.sparse_coo"):
        split(torch.eye(2).to_sparse(), ("grid",), {})
