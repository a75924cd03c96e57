"""Which modules of a model without a forward its users call."""

from __future__ import annotations

from torch import Tensor, nn

from nucleate.strategies.parts import has_forward, parts_of
from nucleate.strategies.sharded_class import make_root


class Namespace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"second": nn.Sequential(nn.Linear(2, 2)), "third": nn.ReLU()})
        self.weights = nn.ParameterList()


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in parts_of(model)]


def test_a_model_with_a_forward_has_no_parts() -> None:
    assert names(nn.Sequential(nn.Linear(2, 2))) == []

    class Assigned(Namespace):
        def __init__(self) -> None:
            super().__init__()
            self.forward = self.first.forward

    assert names(Assigned()) == []


def test_parts_are_the_outermost_modules_with_a_forward() -> None:
    assert names(Namespace()) == ["first", "inner.second", "inner.third"]
    assert names(nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.ReLU()])])) == ["0", "1.0"]
    assert names(nn.ParameterDict()) == []


def test_a_module_in_two_places_is_one_part() -> None:
    layer = nn.Linear(2, 2)
    outer = nn.Sequential(layer)
    assert names(nn.ModuleList([layer, layer])) == ["0"]
    assert sorted(names(nn.ModuleDict({"a": outer, "b": layer}))) == ["a", "b"]
    assert sorted(names(nn.ModuleDict({"b": layer, "a": outer}))) == ["a", "b"]


def test_a_container_that_became_a_root_still_has_no_forward() -> None:
    class Called(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    make_root(model)
    assert type(model).forward is not nn.Module.forward
    assert not has_forward(model)
    assert type(model).__name__ == "ModuleDict"
    assert isinstance(model, nn.ModuleDict)
    for other in (Called(), Namespace(), nn.ParameterList()):
        cls = type(other)
        make_root(other)
        assert type(other) is cls
