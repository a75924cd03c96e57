"""Constructors that save, load and pickle."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def real_tensors_go_through_a_file(m: Any) -> None:
    m.teacher = copy.deepcopy(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    file = io.BytesIO()
    torch.save({"weight": torch.from_numpy(np.arange(6.0)), "bias": torch.tensor([1.0])}, file)
    file.seek(0)
    loaded = torch.load(file)
    m.weight = nn.Parameter(loaded["weight"] * 2)
    m.bias = nn.Parameter(loaded["bias"])


@idiom
def deferred_tensors_go_through_a_file_in_memory(m: Any) -> None:
    m.net = nn.Linear(3, 3)
    file = io.BytesIO()
    torch.save(m.net.state_dict(), file)
    file.seek(0)
    m.other = nn.Linear(3, 3)
    m.other.load_state_dict(torch.load(file))
    m.after = nn.Parameter(torch.randn(3))


@idiom
def deferred_tensors_go_through_a_file(m: Any) -> None:
    m.net = nn.Linear(3, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        torch.save(
            {"net": m.net.state_dict(), "tied": (m.net.weight, m.net.weight), "view": m.net.weight.data[1:]}, path
        )
        loaded = torch.load(path, weights_only=True, map_location="cpu")
        mapped = torch.load(path, mmap=True)
        m.other = nn.Linear(3, 3)
        m.other.load_state_dict(mapped["net"])
        m.assigned = nn.Linear(3, 3)
        m.assigned.load_state_dict(loaded["net"], assign=True)
        hold(m, tied=loaded["tied"][0] is loaded["tied"][1], view=loaded["view"])
        del mapped


@idiom
def the_old_file_format_is_used(m: Any) -> None:
    m.net = nn.Linear(3, 3)
    file = io.BytesIO()
    torch.save(m.net.state_dict(), file, _use_new_zipfile_serialization=False)
    file.seek(0)
    m.other = nn.Linear(3, 3)
    m.other.load_state_dict(torch.load(file))


@idiom
def whole_modules_go_through_a_file(m: Any) -> None:
    file = io.BytesIO()
    torch.save(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), file)
    file.seek(0)
    m.net = torch.load(file, weights_only=False)
    m.net[0].weight.data.mul_(2)


@idiom
def deferred_tensors_are_pickled(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    x = torch.randn(2, 3).t()
    y, z = pickle.loads(pickle.dumps((x, x[1:])))
    y.add_(1)
    m.b = pickle.loads(pickle.dumps(m.a))
    m.c = pickle.loads(pickle.dumps(nn.Linear(2, 2)))
    hold(m, y=y, z=z, w=pickle.loads(pickle.dumps(torch.rand(3, dtype=torch.bfloat16), protocol=2)))
    m.d = pickle.loads(pickle.dumps(nn.Parameter(torch.rand(3), requires_grad=False)))
    m.after = nn.Parameter(torch.randn(2))


@idiom
def state_is_loaded_in_every_way(m: Any) -> None:
    m.a, m.b, m.c, m.d = (nn.Linear(3, 3) for _ in range(4))
    state = m.a.state_dict()
    m.b.load_state_dict(state, assign=True)
    m.c.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.from_numpy(np.ones(3, dtype=np.float32))})
    m.d.load_state_dict(
        {"weight": torch.ones(3, 3, dtype=torch.float64), "bias": torch.from_numpy(np.ones(3))}, assign=True
    )
    m.e = nn.Linear(3, 3)
    m.e.load_state_dict(OrderedDict((k, v.clone() * 2) for k, v in state.items()))
    m.f = nn.Linear(3, 3)
    m.f.load_state_dict({"weight": torch.zeros(3, 3)}, strict=False)
    state["weight"].mul_(3)
    m.g = nn.BatchNorm1d(3)
    m.g.load_state_dict(nn.BatchNorm1d(3).state_dict())


@idiom
def state_is_loaded_into_modules_made_on_meta(m: Any) -> None:
    with torch.device("meta"):
        m.a = nn.Linear(3, 3)
        m.b = nn.Linear(3, 3)
    m.a.load_state_dict(nn.Linear(3, 3).state_dict(), assign=True)
    m.b.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.zeros(3)}, assign=True)


@idiom
def a_failing_load_is_caught(m: Any) -> None:
    m.a = nn.Linear(3, 3)
    try:
        m.a.load_state_dict({"weight": torch.ones(4, 3), "bias": torch.ones(3)})
    except RuntimeError:
        m.failed = True


@idiom
def a_tensor_lies_in_a_file(m: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "raw")
        np.arange(6, dtype=np.float32).tofile(path)
        x = torch.from_file(path, size=6)
        m.a = nn.Parameter(x.view(2, 3) * 2)
        m.b = nn.Parameter(x)
        y = torch.from_file(path, shared=True, size=6)
        y[0] = torch.rand(())
        hold(m, z=torch.from_file(path, size=6).clone())
        del x, y


@idiom.each
def test_serialization_is_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
