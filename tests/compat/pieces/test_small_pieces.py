"""The small parts that scripts import beside Fabric."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nucleate.compat.pieces.attribute_dict import AttributeDict
from nucleate.compat.pieces.instantiation import instantiate_class
from nucleate.compat.pieces.lazy_load import lazy_load
from nucleate.compat.pieces.meta_tensors import materialize_meta_tensors
from nucleate.compat.pieces.num_workers import suggested_max_num_workers
from nucleate.compat.pieces.reset_methods import call_assigned_reset_methods
from nucleate.deferred import deferred
from nucleate.materialize import materialize


def test_keys_of_an_attribute_dict_are_attributes() -> None:
    state = AttributeDict(step=1)
    state.step += 1
    state.loss = 0.5
    assert state == {"step": 2, "loss": 0.5}
    del state.loss
    with pytest.raises(AttributeError, match=r"no key 'loss'. It has step"):
        _ = state.loss


def test_a_class_path_and_arguments_make_an_object() -> None:
    layer = instantiate_class((3,), {"class_path": "torch.nn.Linear", "init_args": {"out_features": 2}})
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (2, 3)


def test_a_lazily_loaded_file_gives_its_tensors(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.arange(3.0)}}, tmp_path / "file.pth")
    assert lazy_load(tmp_path / "file.pth")["model"]["weight"].tolist() == [0, 1, 2]


def test_modules_on_the_meta_device_get_values() -> None:
    model = nn.Linear(3, 3, device="meta")
    materialize_meta_tensors(model, torch.device("cpu"))
    assert model.weight.std() > 0


def test_loader_workers_leave_a_core() -> None:
    assert suggested_max_num_workers(1) >= 1
    with pytest.raises(ValueError, match="local_world_size=0"):
        suggested_max_num_workers(0)


def test_an_assigned_reset_method_makes_the_values_of_its_deferred_module() -> None:
    with deferred():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].reset_parameters = lambda: nn.init.ones_(model[0].weight)
        call_assigned_reset_methods(model)
    materialize(model)
    assert model[0].weight.sum() == 4
    assert model[1].weight.sum() != 4
