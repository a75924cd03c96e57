"""On 2 ranks: what happens to tensors and recipes that differ between ranks, and to hooks under FSDP."""

import copy

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import ConfigurationError, RankDisagreementError
from tests.multi.device import accelerator

for strategy in ("ddp", "fsdp"):
    runtime = Runtime(accelerator=accelerator(), strategy=strategy)
    rank = runtime.global_rank

    # Real tensors are taken from rank 0, down to a single element, buffers too.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256))
    with torch.no_grad():
        model[0].weight.view(-1)[40001] = rank
        model[1].running_mean[7] = rank
    expected = model[0].weight.detach().clone()
    expected.view(-1)[40001] = 0
    runtime.setup(model)
    weight = model[0].weight
    assert torch.equal(weight.full_tensor() if hasattr(weight, "full_tensor") else weight, expected)
    assert model[1].running_mean[7] == 0

    # A deferred model with a real buffer that differs is no fault of the recipes.
    with runtime.init_module(empty_init=True):
        model = nn.Linear(4, 4)
        model.register_buffer("rank", torch.tensor([float(rank)]))
    runtime.setup(model)
    assert model.rank == 0

    # Real tensors of other shapes are another model.
    with pytest.raises(
        RankDisagreementError, match=r"weight is torch.float32 of shape \(4, 4\) on rank 0, but .*\(5, 4\)"
    ):
        runtime.setup(nn.Linear(4, 4 + rank))

    # So are recipes with other constants.
    with runtime.init_module(empty_init=True):
        model = nn.Linear(4, 4)
        model.weight.data.copy_(torch.full((4, 4), 1.0) * torch.tensor([float(rank)]))
    with pytest.raises(RankDisagreementError, match="rank 1 constructed another model than rank 0"):
        runtime.setup(model)

    # A generator that only one rank has seeded does not matter.
    torch.manual_seed(rank)
    with runtime.init_module(empty_init=False):
        model = nn.Linear(4, 4)
    assert torch.equal(*runtime.all_gather(model.weight.detach()))

    # Blocks nest, models are copied, cast and edited before setup; what one rank copies besides does not matter.
    models = []
    for empty_init, seed in ((False, 7), (True, 7 + rank)):
        torch.manual_seed(seed)
        with runtime.init_module(empty_init=empty_init):
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            with runtime.init_module(empty_init=False):
                model.register_buffer("noise", torch.rand(3))
            with runtime.init_module(empty_init=empty_init):
                model.append(nn.Linear(8, 8))
        others = [copy.deepcopy(model) for _ in range(1 + rank)]
        model.to(torch.bfloat16)
        with runtime.init_module(empty_init=empty_init):
            nn.init.trunc_normal_(model[0].weight)
            model.append(nn.Linear(8, 8, dtype=torch.bfloat16))
        for each in (model, others[0]):
            runtime.setup(each)
            models.append([p.full_tensor() if hasattr(p, "full_tensor") else p for p in each.state_dict().values()])
    for expected_tensors, tensors in zip(models[:2], models[2:], strict=True):
        for expected, tensor in zip(expected_tensors, tensors, strict=True):
            assert expected.dtype == tensor.dtype
            assert torch.equal(expected, tensor)

runtime = Runtime(accelerator=accelerator(), strategy="fsdp")
calls = []
with runtime.init_module():
    model = nn.Linear(4, 4)
    model.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("post"))
wrapped = runtime.setup(model)
runtime.backward(wrapped(torch.ones(2, 4)).sum())
assert calls == ["post"]
with runtime.init_module():
    model = nn.Linear(4, 4)
    model.weight.register_hook(lambda grad: grad)
with pytest.raises(ConfigurationError, match="weight have hooks on their gradient"):
    runtime.setup(model)
print("the ranks agree")
