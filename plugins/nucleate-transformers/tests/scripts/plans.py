"""What is promised of the plans of transformers on several ranks; run by test_plans.py on 2 ranks and on 4."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import transformers as hf
from scripts.ranks import counted
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from nucleate import Runtime
from nucleate.dimensions import FullyShard, TensorParallel
from nucleate.errors import ConfigurationError
from nucleate.layout import cut, is_sharded, layout_of, local_of
from nucleate.strategies import FSDPStrategy, Parallel
from nucleate_transformers import TransformersIntegration
from nucleate_transformers.tensor_plan import TransformersPlan

#: Dense, tied, experts, fused query, key and value, norms of single heads, and images; and one without a plan.
MODELS = ("llama", "llama-tied", "mixtral", "gpt-neox", "phi3", "qwen3", "deepseek-v3", "llava", "bart")
#: Each kind once, on one of the two numbers of ranks.
SOME = {2: ("llama-tied", "qwen3", "bart"), 4: ("gpt-neox", "mixtral", "llava")}


def strategy_here() -> Parallel:
    """Return a strategy that splits matrices over 2 ranks, and shards on 4."""
    if int(os.environ["WORLD_SIZE"]) == 2:
        return Parallel(mesh={"tp": 2}, dimensions=[TensorParallel()])
    return Parallel(mesh={"dp_shard": 2, "tp": 2}, dimensions=[FullyShard(), TensorParallel()])


def runtime_of(strategy: Parallel, **options: Any) -> Runtime:
    return Runtime(accelerator="cpu", strategy=strategy, plugins=[TransformersIntegration()], **options)


def construct(name: str) -> Any:
    model = tiny.construct(name).train()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # other numbers on each rank, rightly
    return model


def train(name: str, model: Any, optimizer: Any, runtime: Runtime | None = None) -> list[tuple[float, float]]:
    """Train for 3 steps of 2 backwards, and return the loss and the norm of the gradients of each step."""
    part = slice(None)
    if runtime is not None:
        part = slice(runtime.strategy.data_parallel_rank, None, runtime.strategy.data_parallel_size)
    found = []
    for step in range(3):
        loss = torch.zeros(())
        for half in range(2):
            batch = {key: value[part].contiguous() for key, value in batch_of(name, 2 * step + half).items()}
            output = model(**batch, use_cache=False).loss / 2
            loss += output.detach()
            if runtime is None:
                output.backward()
                continue
            with runtime.no_backward_sync(model, enabled=half == 0):
                runtime.backward(output)
        if runtime is None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            norm = runtime.clip_gradients(model, optimizer, max_norm=1.0)
            loss = runtime.all_reduce(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def batch_of(name: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(6, 90, (4, 20), generator=generator)
    if name != "llava":
        return {"input_ids": tokens, "labels": tokens.clone()}
    tokens[:, 1:17] = tiny.IMAGE_TOKEN
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    return {"input_ids": tokens, "labels": tokens.masked_fill(tokens == tiny.IMAGE_TOKEN, -100), "pixel_values": pixels}


def assert_equal_parts(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(tensors) == list(expected)
    for fqn, tensor in tensors.items():
        whole = expected[fqn]
        assert torch.equal(local_of(tensor), cut(tensor, whole) if is_sharded(tensor) else whole), fqn


def assert_placed(model: nn.Module, said: Mapping[str, Any]) -> None:
    """Compare what the plan said with what transformers made of it."""
    assert said
    for fqn, parameter in model.named_parameters():
        found = layout_of(parameter, dist.get_world_size())
        placement = dict(zip(found.mesh.axes, found.placements, strict=True)).get("tp")
        wanted = said.get(fqn)
        assert str(placement or "replicate") == str(wanted or "replicate"), (fqn, placement, wanted)


def training_is_that_of_one_process(path: Path) -> None:
    for name in MODELS if "all" in sys.argv else SOME[dist.get_world_size()]:
        torch.manual_seed(0)
        expected = construct(name)
        frozen = next(fqn for fqn, _ in expected.named_parameters() if "norm" in fqn)
        expected.get_parameter(frozen).requires_grad_(False)
        end = torch.rand(1)
        values = {fqn: t.clone() for fqn, t in [*expected.named_parameters(), *expected.named_buffers()]}
        strategy = FSDPStrategy() if name == "bart" else strategy_here()
        runtime = runtime_of(strategy, verify="all")
        torch.manual_seed(runtime.global_rank)  # rank 0's counts
        with runtime.init_module(empty_init=name != "qwen3"):  # one model with real tensors
            model = construct(name)
            model.get_parameter(frozen).requires_grad_(False)
        model = runtime.setup(model)
        assert torch.equal(torch.rand(1), end), name
        assert_equal_parts(model, values)
        assert [fqn for fqn, p in model.named_parameters() if not p.requires_grad] == [frozen]
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name in ("llama-tied", "bart"))
        if name != "bart":
            assert_placed(model, TransformersPlan().splits(expected) or {})
        # A large eps: a gradient near zero must not decide the sign of a step.
        optimizer = runtime.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))
        mine = train(name, model, optimizer, runtime)
        theirs = train(name, expected, torch.optim.AdamW(expected.parameters(), lr=1e-2, eps=1e-3))
        for (loss, norm), (wanted, wanted_norm) in zip(mine, theirs, strict=True):
            assert abs(loss - wanted) < 2e-6, (name, mine, theirs)
            assert abs(norm - wanted_norm) < 2e-5 * wanted_norm, (name, mine, theirs)


def files_are_loaded_with_the_arguments_of_transformers(path: Path) -> None:
    sizes = {"fsdp_size": 2} if dist.get_world_size() == 4 else {}
    ways: list[dict[str, Any]] = [
        {"tp_plan": "auto"},
        {"distributed_config": DistributedConfig(tp_size=2, **sizes)},
        {"tp_size": 2, "tp_plan": {"lm_head": "colwise_gather_output", "model.layers.*.mlp.gate_proj": "colwise"}},
    ]
    for name, way in zip(("mixtral", "llama-tied", "llama"), ways, strict=True):
        runtime = runtime_of(strategy_here())
        with runtime.init_module(empty_init=True), counted() as read:
            model = hf.AutoModelForCausalLM.from_pretrained(path / name, **way)
        assert not read
        model = runtime.setup(model)
        expected = tiny.CLASSES[name].from_pretrained(path / name)
        assert_equal_parts(model, dict([*expected.named_parameters(), *expected.named_buffers()]))
        assert model.module.tp_size == 2
    runtime = runtime_of(strategy_here())
    with runtime.init_module(empty_init=True):
        with pytest.raises(ConfigurationError, match=r"tp_size=4.*tp=2.*'(fsdp\+)?tp=4'"):
            hf.AutoModelForCausalLM.from_pretrained(path / "llama", tp_size=4)


def generate(model: Any, tokens: Tensor, **way: Any) -> Tensor:
    return model.generate(tokens, max_new_tokens=8, pad_token_id=0, **way)


def text_is_that_of_one_process_where_ranks_end_at_different_lengths(path: Path) -> None:
    here: list[Any] = [strategy_here()]
    if dist.get_world_size() == 2:
        here.append(FSDPStrategy())
    for strategy in here:
        runtime = runtime_of(strategy)
        with runtime.init_module(empty_init=True):
            model = hf.AutoModelForCausalLM.from_pretrained(path / "llama")
        model = runtime.setup(model).eval()
        expected = tiny.CLASSES["llama"].from_pretrained(path / "llama")
        prompts = tiny.inputs_of("llama")["input_ids"]
        mine = prompts[strategy.data_parallel_rank % 2][None]
        # What the second prompt is continued with after two tokens, and the first is not.
        texts = [generate(expected, prompt[None], do_sample=False, eos_token_id=None)[0, 9:] for prompt in prompts]
        assert int(texts[1][1]) not in texts[0].tolist()
        ends = {"eos_token_id": int(texts[1][1])}
        ways: list[dict[str, Any]] = [
            {"do_sample": False},
            {"do_sample": False, "num_beams": 2},
            {"do_sample": False, "use_cache": False},
            {"do_sample": False, "cache_implementation": "static"},
            {"do_sample": False, "cache_implementation": "static", "prefill_chunk_size": 4},
        ]
        for way in ways:
            assert torch.equal(generate(model, mine, **ends, **way), generate(expected, mine, **ends, **way)), way
        lengths = runtime.all_gather(torch.tensor(generate(model, mine, do_sample=False, **ends).shape[1])).tolist()
        assert len(set(lengths)) == strategy.data_parallel_size, lengths
        # Whoever knows that all end together may say so.
        generate(model, prompts[:1], do_sample=False, synced_gpus=False)
        torch.manual_seed(runtime.global_rank)
        sampled = generate(model, mine, do_sample=True, eos_token_id=None)
        if "tp" in strategy.axes:
            drawn = runtime.all_gather(sampled, group="tp")
            assert torch.equal(drawn[0], drawn[1])


def a_model_that_does_not_fit_is_refused_on_every_rank(path: Path) -> None:
    for name, sizes, message in (
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}, "num_attention_heads=3"),
        ("bart", {}, "no `tp_plan`"),
    ):
        runtime = runtime_of(strategy_here())
        config = tiny.config_of(name)
        for field, value in sizes.items():
            setattr(config, field, value)
        with runtime.init_module(empty_init=True):
            model = tiny.CLASSES[name](config)
        with pytest.raises(ConfigurationError, match=message):
            runtime.setup(model)
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    # Outside of init_module transformers splits the model itself.
    sizes = {"tp_size": 2, "fsdp_size": dist.get_world_size() // 2}
    model = hf.AutoModelForCausalLM.from_pretrained(path / "llama", distributed_config=DistributedConfig(**sizes))
    with pytest.raises(ConfigurationError, match=r"are DTensors already.*inside `runtime\.init_module"):
        runtime_of(strategy_here()).setup(model)


CHECKS = [
    training_is_that_of_one_process,
    files_are_loaded_with_the_arguments_of_transformers,
    text_is_that_of_one_process_where_ranks_end_at_different_lengths,
    a_model_that_does_not_fit_is_refused_on_every_rank,
]


def main(path: Path) -> None:
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    runtime = runtime_of(strategy_here())
    runtime.launch()
    if runtime.is_global_zero:
        for name in ("llama", "llama-tied", "mixtral"):
            tiny.save(name, path / name)
    dist.barrier()
    for check in CHECKS:
        check(path)
        print(f"{check.__name__}: kept", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
