"""What a state consists of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nucleate.checkpoint.state.entries import Entry, Kind, ParameterNames, agree, entries_of
from nucleate.errors import ConfigurationError, RankDisagreementError

pytestmark = pytest.mark.usefixtures("factories_on_device")


class FakeCommunicator:
    """Says what the other ranks would."""

    def __init__(self, *others: Any) -> None:
        self.others = others

    def gather_objects(self, obj: Any) -> list[Any]:
        return [obj, *self.others]


def kinds(state: dict[str, Any]) -> dict[str, Kind]:
    return {entry.key: entry.kind for entry in entries_of(state)}


def test_each_thing_is_known_for_what_it_is() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {"m": model, "o": optimizer, "s": scheduler, "t": torch.ones(2), "v": 3, "class": nn.Linear}
    assert list(kinds(state).values()) == [
        Kind.MODULE,
        Kind.OPTIMIZER,
        Kind.OBJECT,
        Kind.TENSOR,
        Kind.VALUE,
        Kind.VALUE,
    ]


def test_a_dict_is_looked_into_only_where_it_holds_more_than_values() -> None:
    state = {"train": {"deep": {"model": nn.Linear(1, 1)}, "step": 1}, "config": {"lr": 0.1, "more": {}}, "empty": {}}
    assert kinds(state) == {
        "train.deep.model": Kind.MODULE,
        "train.step": Kind.VALUE,
        "config": Kind.VALUE,
        "empty": Kind.VALUE,
    }


def test_an_entry_knows_the_dict_that_holds_it() -> None:
    state = {"train": {"model": nn.Linear(1, 1), "step": 1}}
    assert all(entry.holder is state["train"] for entry in entries_of(state))


@pytest.mark.parametrize("state", [[nn.Linear(1, 1)], 3, {0: 1}, {"": 1}, {"a": {1: torch.ones(1)}}])
def test_a_state_that_is_not_a_dict_of_names_is_refused(state: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"must be a dict|must be strings"):
        list(entries_of(state))


def test_ranks_with_other_entries_are_told_the_first_difference() -> None:
    entries = list(entries_of({"a": 1, "b": torch.ones(1)}))
    agree(entries, FakeCommunicator(["a: a plain value", "b: a tensor"]))  # type: ignore[arg-type]
    with pytest.raises(RankDisagreementError, match="rank 0 has b: a tensor where rank 2 has nothing"):
        agree(entries, FakeCommunicator(["a: a plain value", "b: a tensor"], ["a: a plain value"]))  # type: ignore[arg-type]
    with pytest.raises(RankDisagreementError, match="rank 0 has a: a plain value where rank 1 has b: a tensor"):
        agree(entries, FakeCommunicator(["b: a tensor", "a: a plain value"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("keep_vars", [True, False])
def test_a_tied_parameter_has_all_its_keys_and_one_first(keep_vars: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    names = ParameterNames({("net",): (model, model.state_dict(keep_vars=keep_vars))})
    assert names.keys(model[0].weight) == ["net.0.weight", "net.1.weight"]
    assert names.first(("net", "1.weight")) == "net.0.weight"
    assert names.first(("net", "other")) == "net.other"
    assert names.keys(nn.Parameter(torch.ones(1))) == []


def test_one_module_by_itself_is_an_entry_whose_keys_have_no_prefix() -> None:
    model = nn.Linear(1, 1)
    (entry,) = entries_of(model)
    assert (entry.path, entry.kind, entry.value, entry.key) == ((), Kind.MODULE, model, "")
    assert entry.title == "the model"


def test_an_entry_is_named_by_its_whole_path() -> None:
    assert Entry(("a", "b"), Kind.VALUE, 1, {}).key == Entry(("a", "b"), Kind.VALUE, 1, {}).title == "a.b"
