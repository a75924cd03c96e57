"""`load_state_dict` on a deferred model: the tensors of a state dict become the sources of parameters."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nucleate.deferred import TensorSource, deferred, handle_of, resumed
from nucleate.deferred.elements import tensor_source
from nucleate.errors import CheckpointError, DeferredEditError, DeferredUseError
from nucleate.materialize import materialize
from tests.device import device, on_device


class Net(nn.Module):
    """Ties, buffers, a scalar, a bias that is a view of nothing: what state dicts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("table", torch.arange(6.0), persistent=False)


def weights(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        model.body[1].running_mean.normal_()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def inside(model: nn.Module) -> AbstractContextManager[object]:
    return resumed(model)


def outside(model: nn.Module) -> AbstractContextManager[object]:
    return nullcontext()


def lazy(seed: int = 2) -> Net:
    torch.manual_seed(seed)
    with deferred():
        return Net()


def same(model: nn.Module, expected: Mapping[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


where = pytest.mark.parametrize("where", [inside, outside])


@where
def test_the_values_are_bound_and_made_by_setup(where: Callable[[nn.Module], AbstractContextManager[object]]) -> None:
    model, state = lazy(), weights()
    # `torch.tensor` makes a real one.
    waiting = [tensor for tensor in (*model.parameters(), *model.buffers()) if handle_of(tensor) is not None]
    assert len(waiting) >= 10
    random = torch.get_rng_state()
    with where(model), warnings.catch_warnings(action="error"):
        result = model.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(handle_of(tensor) is not None for tensor in waiting)
    materialize(model)
    assert same(model, state)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.table, torch.arange(6.0))
    assert torch.equal(torch.get_rng_state(), random)


@where
def test_what_a_partial_state_dict_lacks_is_made_as_eager_makes_it(
    where: Callable[[nn.Module], AbstractContextManager[object]],
) -> None:
    state = weights()
    lacking = {name: state[name] for name in ("body.0.weight", "embed.weight")}
    model = lazy(seed=7)
    with where(model):
        result = model.load_state_dict({**lacking, "body.9.weight": torch.ones(1)}, strict=False)
    torch.manual_seed(7)
    eager = Net()
    expected = eager.load_state_dict({**lacking, "body.9.weight": torch.ones(1)}, strict=False)
    assert result == expected
    materialize(model)
    assert same(model, eager.state_dict())


def test_strict_loading_refuses_what_torch_refuses_in_its_words() -> None:
    state = weights()
    wrong: dict[str, dict[str, Tensor]] = {
        "missing": {name: state[name] for name in state if name != "body.0.bias"},
        "unexpected": {**state, "body.0.other": torch.ones(2)},
        "shape": {**state, "body.0.bias": torch.ones(31)},
    }
    for given in wrong.values():
        errors = []
        for model in (lazy(), Net()):
            with pytest.raises(RuntimeError) as error:
                model.load_state_dict(given)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_the_last_of_two_state_dicts_counts_and_edits_follow_it() -> None:
    model = lazy()
    model.load_state_dict(weights(3))
    model.load_state_dict(weights(4))
    with resumed(model):
        model.body[0].weight.data.mul_(2)
    model.to(torch.bfloat16)
    materialize(model)
    expected = weights(4)
    expected["body.0.weight"].mul_(2)
    assert torch.equal(model.body[0].weight, expected["body.0.weight"].bfloat16())
    assert torch.equal(model.embed.weight, expected["embed.weight"].bfloat16())


def test_other_dtypes_strides_and_kinds_of_memory_are_read_as_copy_would() -> None:
    torch.manual_seed(0)
    values = {
        "float64": torch.randn(32, 16, dtype=torch.float64),
        "transposed": torch.randn(16, 32).t(),
        "every second": torch.randn(64, 32)[::2, ::2],
        "one row, repeated": torch.randn(1, 16).expand(32, 16),
        "NumPy": torch.from_numpy(np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)),
        "negated": torch._neg_view(torch.randn(32, 16)),
        "integers": torch.arange(512).view(32, 16),
        "boolean": torch.randn(32, 16) > 0,
    }
    for value in values.values():
        eager, model = nn.Linear(16, 32, bias=False), None
        with deferred():
            model = nn.Linear(16, 32, bias=False)
        for each in (eager, model):
            each.load_state_dict({"weight": value})
        assert torch.equal(materialize(model).weight, eager.weight)


def test_any_range_of_a_tensor_of_any_strides_is_read() -> None:
    whole = torch.arange(5 * 7 * 600.0).view(5, 7, 600)
    for tensor in (whole, whole.transpose(0, 2), whole[:, ::2, 1:], whole[1:2], whole[0, 0, 0], whole.permute(2, 1, 0)):
        flat = tensor.reshape(-1)
        given = TensorSource(tensor)
        for start, stop in (
            (0, flat.numel()),
            (flat.numel() // 3, flat.numel() // 2),
            (flat.numel() - 1, flat.numel()),
        ):
            out = torch.empty(stop - start)
            given.read(start, out)
            assert torch.equal(out, flat[start:stop])


def test_a_large_row_is_read_in_parts() -> None:
    whole = torch.arange(2 * 3 * (1 << 18), dtype=torch.float32).view(3, 1 << 18, 2)
    given = TensorSource(whole.transpose(1, 2))
    flat = whole.transpose(1, 2).reshape(-1)
    out = torch.empty(flat.numel() - 10)
    given.read(7, out)
    assert torch.equal(out, flat[7:-3])


def test_assigned_tensors_are_the_models_own_afterwards() -> None:
    state = weights()
    model = lazy()
    model.load_state_dict(state, assign=True)
    assert model.body[0].weight.data_ptr() == state["body.0.weight"].data_ptr()
    materialize(model)
    assert same(model, state)
    assert torch.equal(model.table, torch.arange(6.0))


@pytest.mark.parametrize("shared", [True, False])
def test_assigning_does_not_untie_what_shares_its_memory(shared: bool) -> None:
    state = weights()
    if shared:
        state["head.weight"] = state["embed.weight"]
    model = lazy()
    model.load_state_dict(state, assign=True)
    materialize(model)
    assert (model.head.weight is model.embed.weight) == shared
    assert same(model, state)


def test_a_part_of_a_model_is_loaded_by_itself() -> None:
    state = weights()
    model = lazy(seed=6)
    model.body.load_state_dict({name.removeprefix("body."): state[name] for name in state if name.startswith("body.")})
    torch.manual_seed(6)
    expected = Net().state_dict() | {name: state[name] for name in state if name.startswith("body.")}
    assert same(materialize(model), expected)


def test_the_tensors_of_the_state_dict_are_let_go_when_the_model_is_made() -> None:
    model = lazy()
    state = weights()
    seen = [weakref.ref(state[name]) for name in ("body.0.weight", "body.1.running_mean")]
    model.load_state_dict(state)
    gc.disable()
    try:
        del state
        assert all(reference() is not None for reference in seen)
        materialize(model)
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()


def test_a_tensor_that_was_changed_before_setup_is_an_error_by_name() -> None:
    state = weights()
    model = lazy()
    model.load_state_dict(state)
    state["body.0.bias"].add_(1)
    with pytest.raises(DeferredEditError, match=r"shape \(32,\) was changed in place \(body\.0\.bias\)"):
        materialize(model)
    model.load_state_dict(state)
    assert same(materialize(model), state)


def test_a_tensor_that_is_changed_inside_the_context_after_it_was_loaded_comes_too_late() -> None:
    state = weights()
    before = {name: tensor.clone() for name, tensor in state.items()}
    with deferred():
        model = Net()
        model.load_state_dict(state)
        for tensor in state.values():
            tensor.zero_()
    assert same(materialize(model), before)


class OfFile(Mapping[str, Tensor]):
    """A file as a state dict that reads a tensor when somebody asks for it."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(path, "pt")
        self.names = list(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def saved(state: Mapping[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save(dict(state), path)


READS: dict[str, tuple[str, Callable[[Path], Mapping[str, Tensor]]]] = {
    "load_file": ("x.safetensors", load_file),
    "safe_open as a mapping": ("x.safetensors", OfFile),
    "torch.load, mapped": ("x.pt", lambda path: torch.load(path, mmap=True)),
}


@pytest.mark.parametrize("name", READS)
def test_a_mapped_file_is_the_source_and_is_watched(name: str, tmp_path: Path) -> None:
    file, read = READS[name]
    path = tmp_path / file
    state = weights()
    saved(state, path)
    model = lazy()
    model.load_state_dict(read(path))
    assert same(materialize(model), state)

    model = lazy()
    model.load_state_dict(read(path))
    saved(weights(9), tmp_path / f"new{path.suffix}")
    (tmp_path / f"new{path.suffix}").rename(path)
    with pytest.raises(CheckpointError, match=rf"{path.name} was replaced .*embed\.weight"):
        materialize(model)

    model.load_state_dict(read(path))
    path.write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{path.name} was written to .*embed\.weight"):
        materialize(model)
    model.load_state_dict(read(path))
    assert same(materialize(model), weights(9))


@where
def test_a_state_dict_without_values_is_refused_once_and_nothing_has_changed(
    where: Callable[[nn.Module], AbstractContextManager[object]],
) -> None:
    model = lazy()
    state = {name: tensor.to("meta") for name, tensor in weights().items()}
    with where(model), pytest.raises(DeferredUseError, match=r"embed\.weight cannot be loaded.*meta device") as error:
        model.load_state_dict(state)
    assert "body" not in str(error.value)
    torch.manual_seed(2)
    assert same(materialize(model), Net().state_dict())


def test_a_model_that_was_edited_through_an_alias_is_refused_once() -> None:
    with deferred():
        model = nn.Linear(4, 4)
    with torch._C.DisableTorchFunctionSubclass():
        model.weight.data.zero_()
        model.weight.detach().zero_()
    with pytest.raises(DeferredEditError, match=r"^weight was edited outside"):
        model.load_state_dict({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})


def test_hooks_before_and_after_loading_run_and_may_change_values() -> None:
    class Scaled(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel").t()
            super()._load_from_state_dict(state, prefix, *args)
            with torch.no_grad():
                self.bias += 1

    def double(module: nn.Module, keys: Any) -> None:
        keys.missing_keys.clear()
        with torch.no_grad():
            module.weight.mul_(2)

    models: list[nn.Module] = [Scaled(3, 5)]
    with deferred():
        models.append(Scaled(3, 5))
    kernel = torch.arange(15.0).view(3, 5)
    for model in models:
        model.register_load_state_dict_post_hook(double)
        model.load_state_dict({"kernel": kernel, "bias": torch.ones(5)})
    assert same(materialize(models[1]), models[0].state_dict())
    assert torch.equal(models[0].weight, 2 * kernel.t())


def test_a_state_dict_of_another_deferred_model_binds_to_its_recipes() -> None:
    first, second = lazy(5), lazy(6)
    second.load_state_dict(first.state_dict())
    materialize(second)
    torch.manual_seed(5)
    assert same(second, Net().state_dict())
    assert same(materialize(first), second.state_dict())


def test_swapping_conversion_binds_as_well() -> None:
    model, state = lazy(), weights()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert same(materialize(model), state)


@pytest.mark.parametrize("seed", [None, 3])
def test_methods_that_initialize_are_recorded_outside_the_context(seed: int | None) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(40, 30))
            self.other = nn.Parameter(torch.zeros(40, 30))
            self.linear = nn.Linear(30, 40)

        def reset_parameters(self) -> None:
            nn.init.trunc_normal_(self.weight, std=0.5, a=-0.6, b=0.6)
            nn.init.orthogonal_(self.other)
            self.linear.reset_parameters()
            with torch.no_grad():
                self.other[3].fill_(1)
                self.linear.weight.data *= self.weight.data.std()

    results = []
    for context in (nullcontext(), deferred()):
        torch.manual_seed(11)
        with context:
            model = Custom()
        if seed is not None:
            torch.manual_seed(seed)
        model.reset_parameters()
        random = torch.get_rng_state()
        results.append((materialize(model).state_dict(), random))
        assert torch.equal(torch.get_rng_state(), random)
    for name, value in results[0][0].items():
        assert torch.equal(results[1][0][name], value), name
    assert torch.equal(results[0][1], results[1][1])


def test_an_edit_in_a_function_of_that_name_is_refused_as_any_other() -> None:
    with deferred():
        model = nn.Linear(3, 3)

    def reset_parameters(weight: Tensor) -> None:
        nn.init.zeros_(weight)

    with pytest.raises(DeferredEditError, match="weight is deferred"):
        reset_parameters(model.weight)


LATER: dict[str, Callable[[nn.Module], object]] = {
    "cast": lambda source: source.half(),
    "freed": lambda source: [setattr(p, "data", torch.empty(0)) for p in source.parameters()],
    "replaced": lambda source: source.to_empty(device="cpu"),
}


@pytest.mark.parametrize("later", LATER)
def test_what_becomes_of_the_model_that_was_loaded_from_does_not_matter(later: str) -> None:
    source, model = nn.Linear(300, 200), None
    expected = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    with deferred():
        model = nn.Linear(300, 200)
    model.load_state_dict(dict(source.named_parameters()))
    LATER[later](source)
    junk = [torch.full((200, 300), 9.0) for _ in range(8)]
    assert same(materialize(model), expected)
    del junk


def test_memory_that_is_gone_is_an_error_by_name() -> None:
    state = weights()
    model = lazy()
    model.load_state_dict(state)
    state["body.0.weight"].untyped_storage().resize_(0)
    with pytest.raises(DeferredEditError, match=r"changed in place \(body\.0\.weight\)"):
        materialize(model)


STAGED: dict[str, Callable[[], tuple[Tensor, Callable[[float], object]]]] = {
    "data": lambda: (buffer := torch.zeros(4, 4), buffer.data.fill_),
    "numpy": lambda: (torch.from_numpy(array := np.zeros((4, 4), np.float32)), array.fill),
    "bytes": lambda: (
        torch.frombuffer(memory := bytearray(64), dtype=torch.float32).view(4, 4),
        lambda value: memory.__setitem__(slice(None), np.full(16, value, np.float32).tobytes()),
    ),
}


@pytest.mark.parametrize("kind", STAGED)
@where
def test_a_buffer_that_is_used_again_is_an_error_by_name(
    where: Callable[[nn.Module], AbstractContextManager[object]], kind: str
) -> None:
    with deferred():
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    buffer, fill = STAGED[kind]()
    with where(model):
        for number, layer in enumerate(model):
            fill(number + 1.0)
            layer.load_state_dict({"weight": buffer})
    if where is inside and kind == "data":
        # torch sees these writes, and they come too late for what was loaded.
        assert [layer.weight[0, 0].item() for layer in materialize(model)] == [1, 2]
        return
    with pytest.raises(DeferredEditError, match=r"\(0\.weight\)"):
        materialize(model)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda whole: whole,
    "transposed": lambda whole: whole.t(),
    "with gaps": lambda whole: whole[:, ::2],
    "repeated": lambda whole: whole[:, :1].expand(40, 7),
    "conjugated": lambda whole: torch.complex(whole, whole).conj(),
    "negated": lambda whole: torch._neg_view(whole),
    "from an odd place": lambda whole: whole.bfloat16().view(-1)[3:1002],
    "complex, with gaps": lambda whole: torch.complex(whole.double(), whole.double())[:, ::3],
    "flags": lambda whole: (whole > 0)[1:, 1:],
    "small numbers": lambda whole: whole.to(torch.float8_e5m2)[::3].t(),
    "one number": lambda whole: whole[3, 7],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_element_of_a_loaded_tensor_that_changes_behind_torch_is_noticed(layout: str) -> None:
    loaded = LAYOUTS[layout](torch.randn(40, 51))
    given = TensorSource(loaded)
    given.check_unchanged()
    for place in {(0,) * loaded.dim(), tuple(length - 1 for length in loaded.shape)}:
        kept = loaded[place].clone()
        loaded.data[place] = 3.0 if loaded.dtype != torch.bool else ~kept
        with pytest.raises(DeferredEditError, match="changed in place"):
            given.check_unchanged()
        loaded.data[place] = kept
        given.check_unchanged()


@pytest.mark.parametrize("is_turned", [False, True])
@where
def test_a_tensor_on_a_device_that_changes_behind_torch_is_an_error_by_name(
    where: Callable[[nn.Module], AbstractContextManager[object]], is_turned: bool
) -> None:
    with on_device(), deferred(device()):
        model = nn.Linear(4, 4, bias=False)
    loaded = torch.ones(4, 4, device=device())
    loaded = loaded.t() if is_turned else loaded
    with where(model):
        model.load_state_dict({"weight": loaded})
    loaded.data[2, 3] = 7
    with pytest.raises(DeferredEditError, match=r"changed in place \(weight\)"):
        materialize(model, device())


def test_a_turned_tensor_of_a_mapped_file_is_not_read_before_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.randn(16, 8)}, tmp_path / "x.safetensors")
    loaded = load_file(tmp_path / "x.safetensors")["weight"].t()
    monkeypatch.setattr(tensor_source, "_sum_of_words", lambda tensor: pytest.fail("read"))
    given = TensorSource(loaded)
    given.check_unchanged()
    save_file({"weight": torch.randn(16, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="since it was loaded"):
        given.check_unchanged()


def test_a_file_that_is_written_to_under_another_name_is_an_error(tmp_path: Path) -> None:
    saved(weights(), tmp_path / "x.safetensors")
    model = lazy()
    model.load_state_dict(load_file(tmp_path / "x.safetensors"))
    (tmp_path / "x.safetensors").rename(tmp_path / "y.safetensors")
    with (tmp_path / "y.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"12345678")
    with pytest.raises(CheckpointError, match=r"x\.safetensors was written to"):
        materialize(model)


def test_threads_may_load_models_of_one_block_at_once() -> None:
    with deferred():
        models = [nn.Sequential(*(nn.Linear(8, 8) for _ in range(40))) for _ in range(4)]
    states = [{n: torch.full(t.shape, float(i)) for n, t in m.state_dict().items()} for i, m in enumerate(models)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: pair[0].load_state_dict(pair[1]), zip(models, states, strict=True)))
    for model, state in zip(models, states, strict=True):
        assert same(materialize(model), state)


def test_loading_again_lets_the_first_tensors_go() -> None:
    model = lazy()
    first = weights(1)
    seen = weakref.ref(first["body.0.weight"])
    model.load_state_dict(first)
    del first
    model.load_state_dict(weights(2))
    assert seen() is None
    assert same(materialize(model), weights(2))
