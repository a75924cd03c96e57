"""On 2 ranks: copies of sharded models, and torch's averages of weights, which copy."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn
from torch.utils._python_dispatch import TorchDispatchMode

from nucleate.errors import UsageError
from nucleate.testing import MODELS
from tests.multi.scripts.gathering import POLICIES, batch, plain, same, start, train, train_plain, whole


def pairs() -> Iterator[tuple[Any, Any, nn.Module]]:
    """Yield a runtime, a model and the same model in plain torch, for each policy."""
    for name, make in POLICIES.items():
        if name == "another's":  # torch refuses to copy what another strategy has sharded.
            continue
        runtime, model = start(make)
        expected = plain()
        train(runtime, model)
        train_plain(expected)
        yield runtime, model, expected


def a_copy_has_shards_of_its_own_and_runs(folder: Path) -> None:
    for _, model, expected in pairs():
        for twin in (copy.deepcopy(model), copy.deepcopy(model.module)):
            assert type(twin) is type(model) or isinstance(twin, FSDPModule)
            own, others = dict(twin.named_parameters()), dict(model.named_parameters())
            assert list(own) == list(others)
            for name, parameter in own.items():
                assert hasattr(parameter, "placements") == hasattr(others[name], "placements"), name
                assert parameter is not others[name]
                assert parameter.requires_grad == others[name].requires_grad
                assert torch.equal(whole(parameter), whole(others[name])), name
            for part, other in zip(twin.modules(), model.modules(), strict=True):
                for hooks in ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
                    # Hooks of the original would act on the original.
                    assert not {*map(id, vars(part)[hooks].values())} & {*map(id, vars(other)[hooks].values())}
            torch.testing.assert_close(twin(batch()), model(batch()))
            twin(batch()).square().mean().backward()
            with torch.no_grad():
                for parameter in own.values():
                    parameter.mul_(2)
            same(model, expected)
            assert all(parameter.grad is None for parameter in model.parameters())


def a_copy_may_be_made_at_any_time(folder: Path) -> None:
    for runtime, model, expected in pairs():
        fresh = copy.deepcopy(start()[1])
        assert fresh(batch()).shape == (4, 1)
        loss = model(batch()).square().mean()
        twin = copy.deepcopy(model)
        assert all(hasattr(parameter, "placements") for parameter in twin.parameters() if parameter.dim())
        loss.backward()
        expected(batch()).square().mean().backward()
        same(model, expected, gradients=True)
        same(twin, expected)
        with torch.inference_mode():
            model(batch())
        same(copy.deepcopy(model), expected)
        model.zero_grad()
        expected.zero_grad()
        train(runtime, model)
        train_plain(expected)
        same(model, expected)
        same(copy.deepcopy(copy.deepcopy(model)), expected)


def everything_but_fsdp_survives_in_a_copy(folder: Path) -> None:
    seen: list[nn.Module] = []
    for model_class in MODELS:
        runtime, model = start(build=model_class)
        seen.clear()
        model.module.register_forward_hook(lambda module, *_: seen.append(module))
        model.eval()
        next(iter(model.children())).requires_grad_(False)
        next(iter(model.parameters())).group = "first"
        twin = copy.deepcopy(model)
        with torch.device("cpu"):
            x = model.sample(4, 0).to(runtime.device)
        with torch.no_grad():
            assert torch.equal(twin(x), model(x))
        assert seen == [twin.module, model.module]
        assert not any(module.training for module in twin.modules())
        names = [
            [name for name, other in twin.named_parameters(remove_duplicate=False) if other is p]
            for p in twin.parameters()
        ]
        assert names == [
            [name for name, other in model.named_parameters(remove_duplicate=False) if other is p]
            for p in model.parameters()
        ]
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
        assert next(iter(twin.parameters())).group == "first"
        assert list(twin.state_dict()) == list(model.state_dict())
        twin.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD((p for p in twin.parameters() if p.requires_grad), lr=0.1)
        twin.train()
        twin.loss(twin(x)).backward()
        optimizer.step()


def marked_methods_of_a_copy_run_the_copy(folder: Path) -> None:
    for _, model, expected in pairs():
        model.mark_forward_method("score")
        model.mark_inference_method("generate")
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in (*twin.parameters(), *expected.parameters()):
                parameter.mul_(2)
        torch.testing.assert_close(twin.score(batch()), expected.score(batch()))
        torch.testing.assert_close(twin.eval().generate(batch()), expected.eval().generate(batch()))
        assert not any(p.dim() and not hasattr(p, "placements") for p in twin.module.parameters())


def parts_and_parents_of_a_model_are_copied(folder: Path) -> None:
    _, model = start()
    block = copy.deepcopy(model.module.blocks[0])
    torch.testing.assert_close(block(torch.ones(2, 7)), plain().blocks[0](torch.ones(2, 7)))
    blocks = copy.deepcopy(model.module.blocks)
    torch.testing.assert_close(blocks[1](torch.ones(2, 7)), plain().blocks[1](torch.ones(2, 7)))
    parent = nn.Sequential(model, nn.Tanh())
    torch.testing.assert_close(copy.deepcopy(parent)(batch()), plain()(batch()).tanh())


def gradients_of_a_copy_are_averaged(folder: Path) -> None:
    for _, model, expected in pairs():
        twin = copy.deepcopy(model)
        rank = torch.distributed.get_rank()
        sum(expected.eval()(batch(seed)).square().mean() / 2 for seed in range(2)).backward()
        twin.eval()(batch(rank)).square().mean().backward()
        same(twin, expected, gradients=True)


def a_copy_takes_no_more_memory_than_the_shards(folder: Path) -> None:
    _, model = start(build=lambda: nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not result.is_meta and not hasattr(result, "placements"):
                self.numel = max(self.numel, result.numel())
            return result

    with Largest() as largest:
        copy.deepcopy(model)
    assert 0 < largest.numel <= 512 * 512 // 2


def averages_of_torch_follow_a_sharded_model(folder: Path) -> None:
    averages: list[dict[str, Any]] = [
        {},
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": get_ema_avg_fn(0.9), "use_buffers": True},
    ]
    for options in averages:
        for runtime, model, expected in pairs():
            average, reference = AveragedModel(model, **options), AveragedModel(expected, **options)
            for _ in range(3):
                train(runtime, model)
                train_plain(expected)
                average.update_parameters(model)
                reference.update_parameters(expected)
            same(average, reference)
            data = [batch(seed) for seed in range(3)]
            update_bn(data, average)
            update_bn(data, reference)
            for left, right in zip(average.buffers(), reference.buffers(), strict=True):
                torch.testing.assert_close(left, right)
            with torch.no_grad():
                torch.testing.assert_close(average.eval()(batch()), reference.eval()(batch()), rtol=1e-4, atol=1e-5)
            assert list(average.state_dict()) == list(reference.state_dict())
            assert all(hasattr(p, "placements") for p in average.parameters() if p.dim())


def averages_are_saved_and_loaded(folder: Path) -> None:
    runtime, model = start()
    average, twin = AveragedModel(model), copy.deepcopy(model.module)
    for _ in range(2):
        train(runtime, model)
        average.update_parameters(model)
    runtime.save(folder / "state", {"model": model, "average": average, "copy": twin})
    other = AveragedModel(start()[1])
    again = copy.deepcopy(start()[1])
    runtime.load(folder / "state", {"average": other, "copy": again}, remainder=False)
    assert int(other.n_averaged) == 2
    for left, right in zip(other.parameters(), average.parameters(), strict=True):
        assert torch.equal(whole(left), whole(right))
    same(again, plain())
    runtime.save(folder / "average.safetensors", average)
    runtime.load(folder / "state", {"model": model}, remainder=False)


def a_model_that_copies_itself_is_refused_by_name(folder: Path) -> None:
    class Own(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
            return Own(self.in_features, self.out_features)

    for build in (lambda: Own(3, 3), lambda: nn.Sequential(Own(3, 3), Own(3, 3))):
        _, model = start(build=build)
        with pytest.raises(UsageError, match="Own copies .*Set up a second model"):
            copy.deepcopy(model)
        model(batch())


CHECKS: list[Callable[..., None]] = [
    a_copy_has_shards_of_its_own_and_runs,
    a_copy_may_be_made_at_any_time,
    everything_but_fsdp_survives_in_a_copy,
    marked_methods_of_a_copy_run_the_copy,
    parts_and_parents_of_a_model_are_copied,
    gradients_of_a_copy_are_averaged,
    a_copy_takes_no_more_memory_than_the_shards,
    averages_of_torch_follow_a_sharded_model,
    averages_are_saved_and_loaded,
    a_model_that_copies_itself_is_refused_by_name,
]

if __name__ == "__main__":
    for check in CHECKS:
        check(Path(sys.argv[1]))
        sys.stdout.write(f"{check.__name__}\n")
