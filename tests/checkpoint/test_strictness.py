"""What does not fit is refused, all of it listed, before anything changes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.checkpoint import load, save
from nucleate.cluster import Communicator
from nucleate.errors import (
    CheckpointError,
    CheckpointKeyError,
    CheckpointNotFoundError,
    ConfigurationError,
    ShapeMismatchError,
    UsageError,
)
from tests.device import equal

pytestmark = pytest.mark.usefixtures("factories_on_device")


def bits(module: nn.Module) -> bytes:
    return pickle.dumps(module.state_dict())


def test_missing_unexpected_and_mismatched_are_told_together_before_anything_changes(
    tmp_path: Path, solo: Communicator
) -> None:
    save(tmp_path / "c", {"model": nn.ModuleDict({"same": nn.Linear(2, 2), "old": nn.Linear(2, 2)}), "step": 1}, solo)
    model = nn.ModuleDict({"same": nn.Linear(2, 3), "new": nn.Linear(2, 2)})
    before = bits(model)
    state = {"model": model, "step": 0, "absent": 0}
    with pytest.raises(CheckpointKeyError) as error:
        load(tmp_path / "c", state, solo)
    message = str(error.value)
    assert "3 missing in the checkpoint: absent, model.new.weight, model.new.bias" in message
    assert "2 unexpected in the checkpoint: model.old.weight, model.old.bias" in message
    assert "2 of another shape or dtype: model.same.weight is (3, 2) here but (2, 2) in the checkpoint" in message
    assert "Nothing was changed." in message
    assert bits(model) == before
    assert state["step"] == 0


def test_long_lists_are_cut(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {"model": nn.Module()}, solo)
    with pytest.raises(CheckpointKeyError, match=r"40 missing in the checkpoint: .*\.\.\. \(40 in all\)"):
        load(tmp_path / "c", {"model": nn.ModuleList(nn.Linear(1, 1) for _ in range(20))}, solo)


def test_not_strict_loads_what_is_in_both_and_hands_over_the_rest(tmp_path: Path, solo: Communicator) -> None:
    saved = nn.ModuleDict({"same": nn.Linear(2, 2), "old": nn.Linear(2, 2)})
    save(tmp_path / "c", {"model": saved}, solo)
    model = nn.ModuleDict({"same": nn.Linear(2, 2), "new": nn.Linear(2, 2)})
    kept = model["new"].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"not in it: model\.new\.weight, model\.new\.bias"):
        rest = load(tmp_path / "c", {"model": model}, solo, strict=False)
    assert torch.equal(model["same"].weight, saved["same"].weight)
    assert torch.equal(model["new"].weight, kept)
    assert equal(rest["model"]["old.weight"], saved["old"].weight)


def test_another_shape_is_refused_and_left_alone_where_that_was_asked_for(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {"model": nn.Linear(2, 2), "t": torch.ones(3)}, solo)
    target = torch.zeros(2)
    with pytest.raises(ShapeMismatchError, match=r"t is \(2,\) here but \(3,\) in the checkpoint"):
        load(tmp_path / "c", {"t": target}, solo)
    with pytest.raises(ShapeMismatchError, match=r"model\.weight is \(3, 2\) here but \(2, 2\)"):
        load(tmp_path / "c", {"model": nn.Linear(2, 3)}, solo)
    with pytest.warns(UserWarning, match=r"not fitting: t \(\(2,\) here but \(3,\) in the checkpoint\)"):
        report = load(tmp_path / "c", {"t": target}, solo, strict=False)
    assert [one.key for one in report.mismatched] == ["t"]
    assert not target.any()


@pytest.mark.parametrize(("saved", "here"), [(torch.int64, torch.float32), (torch.float32, torch.int64)])
def test_a_cast_that_changes_the_kind_of_number_is_refused(
    tmp_path: Path, solo: Communicator, saved: torch.dtype, here: torch.dtype
) -> None:
    save(tmp_path / "c", {"t": torch.ones(2, dtype=saved)}, solo)
    with pytest.raises(CheckpointError, match=rf"t is {here} here but {saved} in the checkpoint"):
        load(tmp_path / "c", {"t": torch.ones(2, dtype=here)}, solo)


def test_things_of_another_kind_are_refused(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "c", {"a": 1, "b": 2}, solo)
    with pytest.raises(CheckpointError, match="a is a module here but not") as error:
        load(tmp_path / "c", {"a": nn.Linear(1, 1), "b": torch.ones(1)}, solo)
    assert "b is a tensor here but not in the checkpoint" in str(error.value)


def test_an_untied_checkpoint_is_refused_by_a_tied_model(tmp_path: Path, solo: Communicator, make_tied: Any) -> None:
    untied = make_tied()
    untied.head.weight = nn.Parameter(torch.zeros_like(untied.head.weight))
    save(tmp_path / "c", {"model": untied}, solo)
    with pytest.raises(CheckpointError, match=r"model\.head\.weight is tied to model\.embed\.weight here but not"):
        load(tmp_path / "c", {"model": make_tied()}, solo)


def test_a_model_without_data_is_neither_saved_nor_loaded_into(tmp_path: Path, solo: Communicator) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"model\.weight has no data.*runtime\.setup"):
        save(tmp_path / "c", {"model": model}, solo)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "c", {"model": nn.Linear(2, 2)}, solo)
    with pytest.raises(UsageError, match=r"model\.weight has no data"):
        load(tmp_path / "c", {"model": model}, solo)


def test_a_value_that_cannot_be_saved_is_refused_before_the_old_checkpoint_is_touched(
    tmp_path: Path, solo: Communicator
) -> None:
    save(tmp_path / "c", {"step": 1}, solo)
    with pytest.raises(CheckpointError, match=r"config\.rate is a decimal\.Decimal, which a checkpoint cannot hold"):
        save(tmp_path / "c", {"step": 2, "config": {"rate": Decimal(1)}}, solo)
    with pytest.raises(CheckpointError, match=r"models\.0 is a torch\.nn\..*Linear.*only as items of a dict"):
        save(tmp_path / "c", {"models": [nn.Linear(1, 1)]}, solo)
    assert load(tmp_path / "c", None, solo) == {"step": 1}
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
        {"a": [{0: torch.ones(1), "0": torch.zeros(1)}]},
        {"nucleate": {"values": torch.ones(1)}},
    ],
)
def test_two_tensors_of_one_name_are_refused(tmp_path: Path, solo: Communicator, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="are both called"):
        save(tmp_path / "c", state, solo)


def test_a_state_that_is_not_a_dict_is_refused(tmp_path: Path, solo: Communicator) -> None:
    with pytest.raises(ConfigurationError, match="the state is a list; it must be a dict"):
        save(tmp_path / "c", [nn.Linear(1, 1)], solo)  # type: ignore[arg-type]


def test_no_checkpoint_is_an_error_that_a_caller_would_catch(tmp_path: Path, solo: Communicator) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "c", None, solo)
    assert isinstance(error.value, CheckpointNotFoundError)


@pytest.fixture
def saved(tmp_path: Path, solo: Communicator) -> Path:
    save(tmp_path / "c", {"t": torch.ones(1000), "step": 1}, solo)
    return tmp_path / "c"


def data_file(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def test_a_file_that_was_cut_short_is_noticed_before_anything_changes(saved: Path, solo: Communicator) -> None:
    os.truncate(data_file(saved), data_file(saved).stat().st_size - 1)
    target = torch.zeros(1000)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp, which has \d+ bytes: .* cut short"):
        load(saved, {"t": target}, solo)
    assert not target.any()


def test_a_file_that_is_gone_is_named(saved: Path, solo: Communicator) -> None:
    data_file(saved).unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp .*is missing"):
        load(saved, None, solo)


def test_bytes_that_were_overwritten_are_an_error_of_ours(saved: Path, solo: Communicator) -> None:
    data = bytearray(data_file(saved).read_bytes())
    data[:] = bytes(len(data))
    data_file(saved).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        load(saved, None, solo)


def test_an_index_that_would_run_code_is_not_run(saved: Path, solo: Communicator, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "made"),))

    (saved / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        load(saved, None, solo)
    assert not (tmp_path / "made").exists()


def test_an_index_that_points_outside_the_folder_is_not_followed(
    saved: Path, solo: Communicator, tmp_path: Path
) -> None:
    shutil.copy(data_file(saved), tmp_path / "elsewhere")
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for item in metadata.storage_data.values():
        item.relative_path = "../elsewhere"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names files outside of its folder: .*elsewhere"):
        load(saved, None, solo)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_a_damaged_index_is_an_error_of_ours(saved: Path, solo: Communicator, content: bytes) -> None:
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        load(saved, None, solo)


def test_a_newer_format_asks_for_an_upgrade(saved: Path, solo: Communicator) -> None:
    marker = saved / "nucleate.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match=r"format version 99.*Upgrade nucleate"):
        load(saved, None, solo)


def test_a_damaged_marker_is_an_error_of_ours(saved: Path, solo: Communicator) -> None:
    (saved / "nucleate.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"nucleate\.json cannot be read"):
        load(saved, None, solo)
