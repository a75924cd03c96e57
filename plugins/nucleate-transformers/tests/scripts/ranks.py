"""What is promised across ranks, checked on every rank of a real group; run by test_ranks.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import minilm
import pytest
import tiny
import torch
import torch.distributed as dist
import transformers as hf
from torch import nn
from torch.distributed.tensor import DTensor

from nucleate import Runtime, Strategy
from nucleate.checkpoint.stored import data_file
from nucleate.errors import CheckpointNotFoundError, RankFailedError, UsageError
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate_transformers import TransformersIntegration, save_pretrained


def strategies() -> Iterator[Strategy]:
    if dist.get_world_size() == 2:
        yield DDPStrategy()
    yield FSDPStrategy()
    if dist.get_world_size() == 4:
        yield FSDPStrategy(num_replicas=2)


def runtime_of(strategy: Strategy, precision: str = "32-true") -> Runtime:
    return Runtime(accelerator="cpu", strategy=strategy, precision=precision, plugins=[TransformersIntegration()])


def load(runtime: Runtime, name: str, path: Path, empty_init: bool | None = True) -> Any:
    torch.manual_seed(7 + runtime.global_rank)  # rank 0's counts
    with runtime.init_module(empty_init=empty_init):
        model = tiny.CLASSES[name].from_pretrained(path / name)
    return runtime.setup(model).eval()


def reference(name: str, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(7)
    return tiny.CLASSES[name].from_pretrained(path / name, dtype=dtype)


def owned_bytes(model: nn.Module) -> int:
    """Return how many bytes of what is saved of a model this rank holds, tied ones once."""
    tensors = model.state_dict(keep_vars=True).values()
    local = {id(t): t.to_local() if isinstance(t, DTensor) else t for t in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in local.values())


@contextmanager
def counted() -> Iterator[list[int]]:
    read: list[int] = []
    plain = data_file.DataFile.read_into

    def count(self: data_file.DataFile, address: int, size_bytes: int, offset: int) -> None:
        read.append(size_bytes)
        plain(self, address, size_bytes, offset)

    data_file.DataFile.read_into = count  # type: ignore[method-assign]
    try:
        yield read
    finally:
        data_file.DataFile.read_into = plain  # type: ignore[method-assign]


def every_architecture_is_equal_and_each_rank_reads_what_it_owns(path: Path) -> None:
    # What 2 ranks have shown of every architecture, 4 need not show again, nor ranks that have everything.
    some = ("mixtral", "clip")
    for strategy in strategies():
        for name in tiny.CLASSES if strategy.shards and dist.get_world_size() == 2 else some:
            runtime = runtime_of(strategy)
            with counted() as read:
                model = load(runtime, name, path)
            expected = reference(name, path)
            tiny.assert_same(model, expected)
            assert torch.equal(tiny.outputs_of(model, name), tiny.outputs_of(expected, name)), name
            # Of BERT's head the file has the bias twice, and the configuration ties it: it is read to be compared.
            compared = 2 * 96 * 4 if name == "bert" else 0
            assert sum(read) <= owned_bytes(model) + compared, (name, sum(read), owned_bytes(model))


def without_deferring_it_is_equal_as_well(path: Path) -> None:
    for strategy in strategies():
        for empty_init in (None, False):
            model = load(runtime_of(strategy), "mixtral", path, empty_init)
            tiny.assert_same(model, reference("mixtral", path))


def new_heads_are_eagers_with_rank_0s_seed(path: Path) -> None:
    for strategy in strategies():
        runtime = runtime_of(strategy)
        torch.manual_seed(7 + runtime.global_rank)
        with runtime.init_module(empty_init=True):
            model = hf.AutoModelForSequenceClassification.from_pretrained(path / "bert", num_labels=5)
        torch.manual_seed(7)
        expected = hf.AutoModelForSequenceClassification.from_pretrained(path / "bert", num_labels=5, dtype="float32")
        tiny.assert_same(runtime.setup(model).eval(), expected)


PRECISIONS = [("llama", "bf16-true"), ("t5", "32-true"), ("gpt2", "bf16-mixed")]


def text_is_generated_equally_also_where_ranks_end_at_different_times(path: Path) -> None:
    for strategy in strategies():
        for name, precision in PRECISIONS[: 3 if dist.get_world_size() == 2 else 1]:
            runtime = runtime_of(strategy, precision)
            model = load(runtime, name, path)
            expected = reference(name, path, runtime.precision.dtype)
            tokens = tiny.inputs_of(name)["input_ids"] + runtime.global_rank
            length = 3 + 4 * runtime.global_rank
            for way in ({}, {"do_sample": True}, {"num_beams": 2}):
                torch.manual_seed(1)
                mine = model.generate(tokens, max_new_tokens=length, **way)
                torch.manual_seed(1)
                with runtime.autocast():
                    theirs = expected.generate(tokens, max_new_tokens=length, **way)
                assert torch.equal(mine, theirs), (name, precision, way)


def training_goes_on_between_generating(path: Path) -> None:
    losses = []
    for strategy in strategies():
        runtime = runtime_of(strategy)
        model = load(runtime, "llama-tied", path).train()
        optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
        tokens = tiny.inputs_of("llama")["input_ids"]
        for _ in range(3):
            loss = model(input_ids=tokens, labels=tokens).loss
            runtime.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if strategy.shards or runtime.is_global_zero:  # where nothing is sharded one rank may do it alone
                model.generate(tokens, max_new_tokens=2, do_sample=False)
        losses.append(loss.item())
    assert losses[0] < 4.5
    assert max(losses) - min(losses) < 1e-4


def what_all_ranks_save_is_loaded_without_us(path: Path) -> None:
    for number, strategy in enumerate(strategies()):
        runtime = runtime_of(strategy, "bf16-true")
        model = load(runtime, "mixtral", path)
        folder = path / f"kept{number}"
        save_pretrained(runtime, folder, model, max_shard_size="60KB")
        again, report = hf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        tiny.assert_same(again, reference("mixtral", path, torch.bfloat16))
        if strategy.shards:
            with pytest.raises(UsageError, match=r"nucleate_transformers\.save_pretrained"):
                model.save_pretrained(folder)
        dist.barrier()


def one_ranks_failure_is_an_error_on_all(path: Path) -> None:
    for strategy in strategies():
        runtime = runtime_of(strategy)
        name = "llama" if runtime.global_rank == 0 else "nothing-here"
        wanted: Any = RankFailedError if runtime.global_rank == 0 else OSError
        with pytest.raises(wanted, match="nothing-here"), runtime.init_module(empty_init=True):
            hf.AutoModelForCausalLM.from_pretrained(path / name)
        with pytest.raises((CheckpointNotFoundError, RankFailedError), match="model-0"):
            with runtime.init_module(empty_init=True):
                hf.AutoModelForCausalLM.from_pretrained(path / "without-a-shard")


def embeddings_of_a_trained_model_are_those_of_transformers(path: Path) -> None:
    for strategy in strategies():
        runtime = runtime_of(strategy)
        with runtime.init_module(empty_init=True), counted() as read:
            model = hf.AutoModel.from_pretrained(minilm.folder())
        assert not read
        with counted() as read:
            model = runtime.setup(model).eval()
        assert sum(read) <= owned_bytes(model)
        assert torch.equal(minilm.embed(model), minilm.reference(torch.float32))


CHECKS = [
    every_architecture_is_equal_and_each_rank_reads_what_it_owns,
    without_deferring_it_is_equal_as_well,
    new_heads_are_eagers_with_rank_0s_seed,
    text_is_generated_equally_also_where_ranks_end_at_different_times,
    training_goes_on_between_generating,
    what_all_ranks_save_is_loaded_without_us,
    one_ranks_failure_is_an_error_on_all,
    embeddings_of_a_trained_model_are_those_of_transformers,
]
# Each check costs 4 ranks on few cores a lot: those in which their number matters.
CHECKS_ON_4 = [
    every_architecture_is_equal_and_each_rank_reads_what_it_owns,
    text_is_generated_equally_also_where_ranks_end_at_different_times,
    embeddings_of_a_trained_model_are_those_of_transformers,
]


def main(path: Path) -> None:
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    runtime = runtime_of(DDPStrategy())
    runtime.launch()
    if runtime.is_global_zero:
        for name in tiny.CLASSES:
            tiny.save(name, path / name, max_shard_size="40KB" if name == "mixtral" else "5GB")
        tiny.save("llama", path / "without-a-shard", max_shard_size="40KB")
        next((path / "without-a-shard").glob("model-0*")).unlink()
    dist.barrier()
    for check in CHECKS if runtime.world_size == 2 else CHECKS_ON_4:
        check(path)
        print(f"{check.__name__}: kept", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
