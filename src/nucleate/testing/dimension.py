"""The dimension suite: tests for every dimension, which a plugin's test class inherits."""

from __future__ import annotations

import math
import pickle
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nucleate.cluster.environment import Environment
from nucleate.dimensions.base import Dimension, Placements
from nucleate.dimensions.fully_shard import FullyShard
from nucleate.dimensions.replicate import Replicate
from nucleate.errors import ConfigurationError
from nucleate.layout import DATA_AXES, Layout, Partial, Shard, is_sharded, local_of
from nucleate.layout import Replicate as Whole
from nucleate.runtime import Runtime
from nucleate.strategies.base import Strategy
from nucleate.strategies.parallel import Parallel
from nucleate.testing.beside_eager import SEED
from nucleate.testing.models import TinyGPT, TinyModel
from nucleate.testing.strategy import StrategySuite

#: The number of ranks about which `placements` is asked in one process.
_MANY = 1024


class DimensionSuite(StrategySuite):
    """The suite of dimensions. Inherit it, name the class `Test...`, and implement `make_dimension`.

    It holds the dimension to its contract, and runs the whole `StrategySuite` with a `Parallel` of the dimension. In
    one process it asks about 1,024 ranks. On several ranks it also splits and trains; run it on 2 and on 4 of them:

        torchrun --nproc-per-node 2 -m pytest -x tests/test_my_dimension.py

    Attributes:
        models: The tiny models of the tests, which the dimension must be able to lay out over 2 ranks. Your own
            `TinyModel` may be among them.
        splits: Whether the dimension splits tensors; None if `lays_out` says so.
    """

    models: tuple[type[TinyModel], ...] = (TinyGPT,)
    _sizes: Mapping[str, int]

    @abstractmethod
    def make_dimension(self) -> Dimension:
        """Return a new dimension with the options to test."""

    def meshes(self, num_ranks: int) -> list[dict[str, int]]:
        """Return the meshes on which all tests run, each as the sizes of its axes, from the outer to the inner ones.

        By default all ranks are along the last axis of the dimension. On a multiple of 4 ranks there is a second mesh:
        2 ranks along that axis, and the others along `dp_shard` outside. Both hold for axes that do not split data.

        Args:
            num_ranks: The number of ranks of this run.
        """
        axes = self.make_dimension().axes
        if not axes:
            return [{"dp_shard": -1}]
        found = [{axes[-1]: -1}]
        if num_ranks % 4 == 0 and "dp_replicate" in axes[:-1]:
            found.append({"dp_replicate": 2, axes[-1]: -1})
        elif num_ranks % 4 == 0 and axes[-1] not in DATA_AXES:
            found.append({"dp_shard": -1, axes[-1]: 2})
        return found

    def make_others(self, sizes: Mapping[str, int]) -> list[Dimension]:
        """Return the other dimensions on a mesh: by default `FullyShard` or `Replicate`, if a data axis is free.

        Args:
            sizes: The sizes of the axes.
        """
        free = [axis for axis in sizes if axis in DATA_AXES and axis not in self.make_dimension().axes]
        if not free:
            return []
        return [FullyShard()] if "dp_shard" in free else [Replicate()]

    def make_strategy(self) -> Strategy:
        """Return a new `Parallel` with the dimension, on the mesh of the test."""
        return self._parallel(self._sizes)

    def _parallel(self, sizes: Mapping[str, int], dimension: Dimension | None = None) -> Parallel:
        own = self.make_dimension() if dimension is None else dimension
        return Parallel(mesh=sizes, dimensions=[own, *self.make_others(sizes)])

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test the models and meshes of this suite. pytest calls this method."""
        super().pytest_generate_tests(metafunc)
        if "mesh" in metafunc.fixturenames:
            meshes = self.meshes(Environment.detect().world_size)
            names = [" x ".join(f"{axis}={size}" for axis, size in sizes.items()) for sizes in meshes]
            metafunc.parametrize("mesh", meshes, ids=names, indirect=True)

    @pytest.fixture(autouse=True)
    def mesh(self, request: pytest.FixtureRequest) -> Mapping[str, int]:
        """The sizes of the axes of the test's mesh."""
        self._sizes = request.param
        return self._sizes

    # --- the contract

    def test_its_name_axes_and_order_are_words(self) -> None:
        dimension = self.make_dimension()
        assert dimension.kind == "dimension"
        assert dimension.name.isidentifier(), dimension.name
        for field in ("axes", "after", "before", "excludes"):
            names = getattr(dimension, field)
            assert isinstance(names, tuple), f"{field} is {names!r}, not a tuple"
            assert all(isinstance(name, str) and name.isidentifier() for name in names), f"{field}={names!r}"
            assert len(set(names)) == len(names), f"{field}={names!r}"
        assert dimension.name not in (*dimension.after, *dimension.before, *dimension.excludes)
        assert "\n" not in repr(dimension)

    def test_its_constructor_does_no_work(self) -> None:
        state, has_group = torch.get_rng_state(), torch.distributed.is_initialized()
        with _Operations() as seen:
            self.make_dimension()
        assert seen.names == [], "the constructor computes"
        assert torch.equal(torch.get_rng_state(), state), "the constructor draws random numbers"
        assert torch.distributed.is_initialized() == has_group, "the constructor starts a process group"

    def test_it_goes_to_another_process(self) -> None:
        dimension = self.make_dimension()
        assert repr(pickle.loads(pickle.dumps(dimension))) == repr(dimension)

    # --- placements, by arithmetic alone

    def test_placements_are_plain_data_for_a_thousand_ranks(self, model_class: type[TinyModel]) -> None:
        strategy = self._parallel(self._large())
        mesh, dimension = strategy.mesh_for(_MANY), self._own(strategy)
        model = self._meta(model_class)
        before = _objects(model)
        with _Operations() as seen:
            dimension.check_model(model, mesh)
            found = dimension.placements(model, mesh)
            again = dimension.placements(model, mesh)
        assert seen.names == [], "`placements` and `check_model` compute with tensors"
        assert _objects(model) == before, "`placements` or `check_model` changes the model"
        if found is None:
            return
        assert pickle.loads(pickle.dumps(found)) == found == again
        self._check_words(dimension, found, model)

    def test_a_thousand_ranks_together_hold_every_element_once(self, model_class: type[TinyModel]) -> None:
        model = self._meta(model_class)
        with _Operations() as seen:
            layout = self._parallel(self._large()).planned_layout(model, _MANY)
        assert seen.names == [], "the layout is computed with tensors"
        for name in layout or ():
            tensor = layout[name]  # type: ignore[index]
            boxes = {place for rank in range(_MANY) for place in _held(layout, name, rank)}  # type: ignore[arg-type]
            assert sum(math.prod(size) for _, size in boxes) == math.prod(tensor.shape), f"{name}: {tensor.where()}"

    def test_a_model_that_it_cannot_lay_out_is_refused_before_it_is_changed(self, runtime: Runtime) -> None:
        model = nn.Sequential(nn.Linear(3, 5)).to(runtime.device)
        before, refused = _objects(model), None
        try:
            runtime.setup(model)
        except ConfigurationError as error:
            refused = error
        assert refused is None or _objects(model) == before, (
            f"the model has changed, although it was refused: {refused}"
        )

    # --- the layout that `apply` makes

    def test_the_layout_is_the_one_that_placements_said(self, runtime: Runtime, model_class: type[TinyModel]) -> None:
        strategy = runtime.strategy
        assert isinstance(strategy, Parallel)
        announced = strategy.planned_layout(self._meta(model_class), runtime.world_size)
        if announced is None:
            pytest.skip("the placements are known only after `apply`")
        model = self._model(runtime, model_class)
        made = runtime.layout(model)
        assert list(made) == list(announced)
        for name in made:
            for rank in range(runtime.world_size):
                assert _held(made, name, rank) == _held(announced, name, rank), (
                    f"{name} on rank {rank}: `placements` says {announced[name].where()}, and `apply` has made "
                    f"{made[name].where()}"
                )
            assert made[name].tied_with == announced[name].tied_with, name
            assert made[name].trains == announced[name].trains, name

    def test_apply_exchanges_nothing_and_makes_no_values(
        self, runtime: Runtime, model_class: type[TinyModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dimension = self._own(runtime.strategy)
        apply, done = dimension.apply, []

        def observed(model: nn.Module, mesh: Any) -> None:
            deferred = {name for name, tensor in _tensors(model).items() if local_of(tensor).is_meta}
            state = torch.get_rng_state()
            with _Operations() as seen:
                apply(model, mesh)
            exchanges = [name for name in seen.names if name.startswith(_COLLECTIVES)]
            assert exchanges == [], f"`apply` exchanges values: {exchanges}"
            made = [name for name in deferred if not local_of(_tensors(model)[name]).is_meta]
            assert made == [], f"`apply` makes the values of {made}"
            assert torch.equal(torch.get_rng_state(), state), "`apply` draws random numbers"
            if any(map(is_sharded, _tensors(model).values())):
                assert dimension.lays_out, "tensors are DTensors, and `lays_out` is False"
            done.append(model)

        monkeypatch.setattr(dimension, "apply", observed)
        self._model(runtime, model_class)
        assert runtime.world_size == 1 or done, "`apply` was not called"

    def test_ranks_with_the_same_data_drop_the_same_values(self, runtime: Runtime) -> None:
        if TinyGPT not in self.models or runtime.strategy.data_parallel_size > 1:
            pytest.skip("needs a model with dropout, and ranks that have the same data")
        make = partial(TinyGPT, dropout=0.3)
        plain = self._plain(runtime, make)
        model, optimizer = self._trainable(runtime, make, torch.optim.SGD)
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
        torch.manual_seed(SEED)
        expected = [self._plain_step(runtime, plain, plain_optimizer, seed) for seed in range(3)]
        # A script may have given each rank a seed of its own. Rank 0's decides.
        torch.manual_seed(SEED + runtime.global_rank)
        self._compare_losses([self._step(runtime, model, optimizer, seed) for seed in range(3)], expected)
        self._compare_gradients(model, plain)

    # --- helpers of the tests

    def _own(self, strategy: Any) -> Dimension:
        """Return the dimension that is tested."""
        name = self.make_dimension().name
        found: Dimension = next(each for each in strategy.dimensions if each.name == name)
        return found

    def _large(self) -> dict[str, int]:
        """Return the mesh of the test for many ranks: 2 along the dimension's axis, which must divide, if it can be."""
        axes = self.make_dimension().axes
        if not axes or axes[-1] in DATA_AXES:
            return {"dp_replicate": 2, "dp_shard": -1} if "dp_shard" in (axes or ("dp_shard",)) else {axes[-1]: -1}
        return {"dp_shard": -1, axes[-1]: 2}

    def _meta(self, model_class: type[TinyModel]) -> TinyModel:
        with torch.device("meta"):
            return model_class()

    def _check_words(self, dimension: Dimension, found: Placements, model: nn.Module) -> None:
        tensors = _tensors(model)
        for name, placements in found.items():
            assert name in tensors, f"`placements` names {name}, which the model does not have"
            assert set(placements) <= set(dimension.axes), f"{name}: the axes are {dimension.axes}"
            for axis, placement in placements.items():
                assert isinstance(placement, (Shard, Whole, Partial)), f"{name} on {axis}: {placement!r}"
                if isinstance(placement, Shard):
                    assert 0 <= placement.dim < tensors[name].dim(), f"{name} on {axis}: {placement!r}"
        if found and not dimension.lays_out:
            assert not any(found.values()), "`placements` splits tensors, and `lays_out` is False"


class _Operations(TorchDispatchMode):
    """The names of the operations on tensors inside this context, collectives among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


#: The namespaces of collectives among torch's operations.
_COLLECTIVES = ("c10d", "_c10d_functional", "_dtensor")


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _objects(model: nn.Module) -> dict[str, tuple[int, torch.device]]:
    return {name: (id(tensor), tensor.device) for name, tensor in _tensors(model).items()}


def _held(layout: Layout, name: str, rank: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the places and sizes of the boxes that a rank holds."""
    return [(box.begin, box.size) for box in layout[name].boxes(rank)]
