"""Checkpoints of models with shells have the plain model's keys, and keys with a shell's part still load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint.loading.shell_keys import plain_keys, plain_versions
from nucleate.errors import CheckpointKeyError
from tests.test_shells import PLACES, body, compiled, every_shell, wrapped

FORMATS = ("c", "c.safetensors", "c.pt")


def runtime() -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device")


def filled(value: float) -> nn.Module:
    model = body()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)
    return model


def is_filled(model: nn.Module, value: float) -> bool:
    return all((tensor == value).all() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_a_checkpoint_has_the_plain_models_keys_and_loads_into_any_model(
    tmp_path: Path, shell: Any, at: str, name: str
) -> None:
    plain = runtime()
    model = wrapped(shell, at)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(2)
    plain.save(tmp_path / name, model)
    report = plain.load(tmp_path / name)
    assert list(report) == list(body().state_dict())
    for target in (filled(0), wrapped(shell, at), plain.setup(filled(0)), plain.setup(wrapped(shell, at))):
        assert plain.load(tmp_path / name, target).is_exact
        assert is_filled(target, 2)
        with torch.no_grad():
            for tensor in (*target.parameters(), *target.buffers()):
                tensor.fill_(0)
        assert plain.load_raw(tmp_path / name, target).is_exact
        assert is_filled(target, 2)


@pytest.mark.parametrize("late", [False, True])
@every_shell
def test_a_training_state_names_the_plain_model(tmp_path: Path, shell: Any, late: bool) -> None:
    plain = runtime()
    if late:
        model: Any = plain.setup(body())
        model.module[0] = shell(model.module[0])
        model = shell(model)
    else:
        model = plain.setup(wrapped(shell, "all"))
    optimizer = plain.setup_optimizers(torch.optim.AdamW(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plain.save(tmp_path / "c", {"model": model, "optimizer": optimizer})
    saved = plain.load(tmp_path / "c")
    names = [f"model.{name}" for name, _ in body().named_parameters()]
    assert saved["optimizer"]["param_groups"][0]["params"] == names
    assert list(saved["optimizer"]["state"]) == names
    other = plain.setup(body())
    resumed = plain.setup_optimizers(torch.optim.AdamW(other.parameters()))
    assert plain.load(tmp_path / "c", {"model": other, "optimizer": resumed}).is_exact
    assert len(resumed.state) == len(names)
    assert plain.load(tmp_path / "c", {"model": model, "optimizer": optimizer}).is_exact


@pytest.mark.parametrize("empty_init", [True, False])
@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_weights_load_before_setup(tmp_path: Path, shell: Any, at: str, empty_init: bool) -> None:
    plain = runtime()
    save_file({name: tensor.clone() for name, tensor in filled(3).state_dict().items()}, tmp_path / "m.safetensors")
    with plain.init_module(empty_init=empty_init):
        model = wrapped(shell, at)
    assert plain.load_raw(tmp_path / "m.safetensors", model).is_exact
    assert is_filled(plain.setup(model), 3)


@every_shell
def test_a_state_dict_with_the_shells_parts_still_loads(tmp_path: Path, shell: Any) -> None:
    plain = runtime()
    for at in PLACES:
        stored = wrapped(shell, at).state_dict()
        torch.save({key: torch.full_like(tensor, 4) for key, tensor in stored.items()}, tmp_path / "m.pt")
        for target in (filled(0), plain.setup(filled(0)), wrapped(shell, "leaf")):
            assert plain.load_raw(tmp_path / "m.pt", target).is_exact, at
            assert is_filled(target, 4)
        torch.save({"net": stored}, tmp_path / "inside.pt")
        assert plain.load_raw(tmp_path / "inside.pt", filled(0), prefix="net.").is_exact
        # The versions of the modules are found too: no counter of a batch norm is missing.
        torch.save(stored, tmp_path / "versions.pt")
        assert plain.load_raw(tmp_path / "versions.pt", filled(0)).is_exact


class Prefixed(nn.Module):
    """A model whose keys are those that an old save of a compiled model has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


@pytest.mark.parametrize("name", FORMATS)
def test_a_training_state_of_a_compiled_model_with_its_prefix_still_loads(tmp_path: Path, name: str) -> None:
    plain = runtime()
    old = Prefixed(filled(6))
    optimizer = torch.optim.AdamW(old.parameters())
    for parameter in old.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plain.save(tmp_path / name, {"model": old, "optimizer": optimizer})
    assert "_orig_mod.0.weight" in plain.load(tmp_path / name)["model"]
    model = plain.setup(compiled(body()))
    resumed = plain.setup_optimizers(torch.optim.AdamW(model.parameters()))
    assert plain.load(tmp_path / name, {"model": model, "optimizer": resumed}).is_exact
    assert torch.equal(model.get_parameter("0.weight"), old._orig_mod[0].weight)
    state = resumed.state[model.get_parameter("0.weight")]
    assert torch.equal(state["exp_avg"], optimizer.state[old._orig_mod[0].weight]["exp_avg"])


def test_a_key_that_would_be_ambiguous_is_left_alone(tmp_path: Path) -> None:
    stored = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "_orig_mod.weight": torch.zeros(2, 2)}
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointKeyError, match=r"1 unexpected in the checkpoint: _orig_mod\.weight"):
        runtime().load_raw(tmp_path / "m.safetensors", nn.Linear(2, 2))


def test_a_models_own_part_of_that_name_is_kept(tmp_path: Path) -> None:
    inner = nn.Module()
    inner.module = nn.Linear(2, 2)
    stored = {key: torch.full_like(tensor, 7) for key, tensor in nn.DataParallel(inner).state_dict().items()}
    assert list(stored) == ["module.module.weight", "module.module.bias"]
    save_file(stored, tmp_path / "m.safetensors")
    assert runtime().load_raw(tmp_path / "m.safetensors", inner).is_exact
    assert (inner.module.weight == 7).all()
    missing = {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}
    save_file(missing, tmp_path / "other.safetensors")
    assert runtime().load_raw(tmp_path / "other.safetensors", inner).is_exact


def test_other_prefixes_are_still_named(tmp_path: Path) -> None:
    stored = {"net.weight": torch.ones(2, 2), "net.bias": torch.ones(2), "head": torch.ones(1)}
    save_file(stored, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointKeyError, match=r"Pass prefix='net\.'"):
        runtime().load_raw(tmp_path / "m.safetensors", nn.Linear(2, 2))


def test_missing_and_unexpected_keys_are_plain(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(3, 3), "strange": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointKeyError) as error:
        runtime().load_raw(tmp_path / "m.safetensors", nn.Sequential(compiled(nn.Linear(3, 3))))
    assert "1 missing in the checkpoint: 0.bias" in str(error.value)
    assert "1 unexpected in the checkpoint: strange" in str(error.value)
    assert "_orig_mod" not in str(error.value)


class Renaming(nn.Module):
    """Older files call its weight `old`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.zeros(2))
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}old" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}old")


@pytest.mark.parametrize("empty_init", [True, False])
@every_shell
def test_a_module_that_loads_in_its_own_way_does_so_inside_a_shell(
    tmp_path: Path, shell: Any, empty_init: bool
) -> None:
    plain = runtime()
    for prefix in ("0.", "0._orig_mod.", "_orig_mod.0.", "module._orig_mod.0._checkpoint_wrapped_module."):
        stored = {f"{prefix}old": torch.ones(2), f"{prefix}bias": torch.ones(2)}
        save_file(stored, tmp_path / "m.safetensors")
        with plain.init_module(empty_init=empty_init):
            model = nn.Sequential(shell(Renaming()))
        assert plain.load_raw(tmp_path / "m.safetensors", model).is_exact
        assert is_filled(plain.setup(model), 1)


def test_parts_of_names_are_left_out_where_a_wanted_name_shows_them() -> None:
    wanted = {"a.weight", "a.bias", "module.x"}
    assert plain_keys(["_orig_mod.a.weight", "_orig_mod.other"], wanted) == {
        "_orig_mod.a.weight": "a.weight",
        "_orig_mod.other": "other",
    }
    assert plain_keys(["module.x", "module.a.weight"], wanted) == {"module.a.weight": "a.weight"}
    assert plain_keys(["module.module.x", "module.a.bias"], wanted) == {
        "module.module.x": "module.x",
        "module.a.bias": "a.bias",
    }
    assert plain_keys(["_orig_mod.b"], wanted) == {}
    assert plain_keys(["_orig_mod.a.weight", "module.a.weight"], wanted) == {}
    assert plain_keys([".".join(["module"] * 64)], wanted) == {}


def test_versions_are_found_by_plain_names() -> None:
    assert plain_versions({"": 1, "_orig_mod": 2, "_orig_mod.0": 3}, {"", "0"}) == {"": 2, "0": 3}
    assert plain_versions({"": 4, "module": 5}, {"", "module"}) == {"": 4, "module": 5}


def test_two_tensors_are_never_exchanged(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1))
            self.module = nn.ParameterDict({"x": torch.zeros(1)})

    # As `DistributedDataParallel` saves this model.
    save_file({"module.x": torch.ones(1), "module.module.x": torch.full((1,), 2.0)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointKeyError, match="1 missing in the checkpoint: x"):
        runtime().load_raw(tmp_path / "m.safetensors", model := Both())
    runtime().load_raw(tmp_path / "m.safetensors", model, prefix="module.")
    assert (model.x.item(), model.module["x"].item()) == (1, 2)
