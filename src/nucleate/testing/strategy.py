"""The strategy suite: tests for every strategy, which a plugin's test class inherits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from nucleate.checkpoint.loader import load
from nucleate.checkpoint.saver import save
from nucleate.cluster.communicator import Communicator
from nucleate.cluster.environment import Environment
from nucleate.errors import NonFiniteGradientError, RankDisagreementError, UsageError
from nucleate.layout import local_of
from nucleate.runtime import Runtime
from nucleate.testing.beside_eager import SEED, BesideEager, factories_on, full, named_tensors, ties_of
from nucleate.testing.models import TinyModel, TinyOdd


class StrategySuite(BesideEager):
    """The suite of strategies. Inherit it, name the class `Test...`, and implement `make_strategy`.

    Plain pytest runs the suite in one process. For several processes, run the same class under torchrun:

        torchrun --nproc-per-node 2 -m pytest -x tests/test_my_strategy.py

    A strategy with a plan gives the models that its plan fits. Some tests then run on fewer models:

        class TestMyPlan(StrategySuite):
            models = (TinyGPT,)

            def make_strategy(self) -> Strategy:
                return Parallel(mesh={"tp": -1}, dimensions=[TensorParallel(TinyGPT.plan)])

    Attributes:
        accelerator: The accelerator of the tests.
        rtol: The allowed relative difference of losses and gradient norms from those of a plain loop on the whole
            batch.
        models: The tiny models of the tests. Each is built without arguments; your own `TinyModel` may be among them.
        skipped_models: Models of `models` that this strategy cannot support.
        splits: Whether the strategy splits tensors over the ranks of this run; the suite then wants that some tensors
            of each model are split. None stands for `Strategy.shards`.
    """

    # --- the contract

    def test_it_has_a_name_and_a_kind(self, runtime: Runtime) -> None:
        assert runtime.strategy.name
        assert runtime.strategy.kind == "strategy"

    def test_it_knows_its_device_and_its_part_of_the_data(self, runtime: Runtime) -> None:
        strategy = runtime.strategy
        assert strategy.device == runtime.device
        assert 0 <= strategy.data_parallel_rank < strategy.data_parallel_size <= runtime.world_size

    def test_its_context_ends_also_by_an_error(self, runtime: Runtime) -> None:
        before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
        with pytest.raises(ZeroDivisionError), runtime.strategy.module_init_context():
            raise ZeroDivisionError
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before

    # --- exactness: every rank has another seed, and still gets the values of an eager model with rank 0's seed

    @pytest.mark.parametrize("empty_init", [True, False, None])
    def test_a_model_equals_the_eager_one_bit_for_bit(
        self, runtime: Runtime, model_class: type[TinyModel], empty_init: bool | None
    ) -> None:
        expected, expected_next = self._eager(model_class)
        torch.manual_seed(SEED + runtime.global_rank)
        with runtime.init_module(empty_init=empty_init):
            model: nn.Module = model_class()
        model = runtime.setup(model)
        actual_next = torch.rand(3)
        assert torch.equal(actual_next, expected_next), "the random stream ends at another position than the eager one"
        values = named_tensors(model)
        assert list(values) == list(expected)
        for name, value in expected.items():
            assert values[name].dtype == value.dtype, name
            assert torch.equal(values[name], value), name

    def test_ties_and_flags_are_kept(self, runtime: Runtime, model_class: type[TinyModel]) -> None:
        eager = model_class()
        model = self._model(runtime, model_class)
        assert ties_of(model) == ties_of(eager)
        flags = {name: p.requires_grad for name, p in eager.named_parameters()}
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    def test_each_rank_holds_the_parts_that_its_layout_says(
        self, runtime: Runtime, model_class: type[TinyModel]
    ) -> None:
        expected, _ = self._eager(model_class)
        model = self._model(runtime, model_class)
        layout = runtime.layout(model)
        shown = runtime.strategy.shards_shown(model) or nullcontext()
        with shown:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                held = local_of(tensor)
                boxes = layout[name].boxes(runtime.global_rank)
                assert layout[name].local_shape(runtime.global_rank) == tuple(held.shape), name
                assert sum(box.numel for box in boxes) == held.numel(), name
                for box in boxes:
                    assert torch.equal(box.of_local(held), box.of_whole(expected[name])), f"{name}: {box}"
        if self._splits(runtime):
            sizes = {name: (layout[name].local_bytes(runtime.global_rank), layout[name].size_bytes) for name in layout}
            assert any(local < whole for local, whole in sizes.values()), f"no tensor is split: {sizes}"

    def test_nothing_is_left_without_memory(self, runtime: Runtime, model_class: type[TinyModel]) -> None:
        model = self._model(runtime, model_class)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert not tensor.is_meta, name

    def test_a_real_model_keeps_its_values(self, runtime: Runtime, small_class: type[TinyModel]) -> None:
        model: nn.Module = small_class()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
        model = runtime.setup(model)
        values = named_tensors(model)
        assert all((values[name] == 0.25).all() for name, _ in model.named_parameters())

    # --- the module that is returned

    def test_keys_of_the_state_have_no_prefix(self, runtime: Runtime, model_class: type[TinyModel]) -> None:
        assert list(self._model(runtime, model_class).state_dict()) == list(model_class().state_dict())

    def test_the_users_module_stays_at_hand(self, runtime: Runtime, small_class: type[TinyModel]) -> None:
        with runtime.init_module(empty_init=True):
            model = small_class()
        wrapped = runtime.setup(model)
        assert wrapped.module is model
        assert wrapped.train().training
        assert not wrapped.eval().training
        assert not model.training

    def test_setup_twice_is_refused(self, runtime: Runtime, small_class: type[TinyModel]) -> None:
        model = self._model(runtime, small_class)
        for again in (model, model.module):
            with pytest.raises(UsageError, match="already"):
                runtime.setup(again)

    # --- training

    @pytest.mark.parametrize("joint", [True, False], ids=["setup(model, optimizer)", "setup_optimizers"])
    def test_losses_follow_those_of_a_plain_loop(
        self, runtime: Runtime, model_class: type[TinyModel], joint: bool
    ) -> None:
        expected = self._plain_losses(runtime, model_class, torch.optim.Adam, num_steps=6)
        model, optimizer = self._trainable(runtime, model_class, torch.optim.Adam, joint=joint)
        actual = [self._step(runtime, model, optimizer, seed) for seed in range(6)]
        self._compare_losses(actual, expected)

    def test_gradients_and_trained_weights_are_those_of_a_plain_loop(
        self, runtime: Runtime, model_class: type[TinyModel]
    ) -> None:
        plain = self._plain(runtime, model_class)
        before = named_tensors(plain)
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
        model, optimizer = self._trainable(runtime, model_class, torch.optim.SGD)
        for seed in range(3):
            self._plain_step(runtime, plain, plain_optimizer, seed)
            self._step(runtime, model, optimizer, seed)
            self._compare_gradients(model, plain)
        trained = named_tensors(model)
        for name, parameter in plain.named_parameters():
            assert parameter.requires_grad or torch.equal(trained[name], before[name]), f"{name} is frozen"

    def test_a_parameter_that_comes_after_setup_is_noticed(
        self, runtime: Runtime, small_class: type[TinyModel]
    ) -> None:
        model, optimizer = self._trainable(runtime, small_class, torch.optim.SGD)
        self._step(runtime, model, optimizer, 0)
        model.module.register_parameter("late", nn.Parameter(torch.zeros(2, device=runtime.device)))
        with pytest.raises(UsageError, match="late came into the model after `setup`"):
            runtime.layout(model)
        with pytest.raises(UsageError, match="late came into the model after `setup`"):
            self._step(runtime, model, optimizer, 1)

    def test_an_optimizer_that_setup_did_not_get_trains_the_model_or_fails_by_name(
        self, runtime: Runtime, small_class: type[TinyModel]
    ) -> None:
        with runtime.init_module(empty_init=True):
            model = small_class()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped = runtime.setup(model)
        before = named_tensors(wrapped)
        runtime.backward(wrapped.loss(wrapped(self._batch(runtime, model, 0))))
        message = None
        try:
            optimizer.step()
        except UsageError as error:
            message = str(error)
        if message is not None:
            assert any(name in message for name, _ in wrapped.named_parameters())
            return
        after = named_tensors(wrapped)
        trained = [name for name, parameter in wrapped.named_parameters() if parameter.grad is not None]
        assert trained
        assert not [name for name in trained if torch.equal(before[name], after[name])]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_training_is_the_same_after_an_evaluation(
        self, runtime: Runtime, deep_class: type[TinyModel], mode: Callable[[], AbstractContextManager[None]]
    ) -> None:
        expected = self._plain_losses(runtime, deep_class, torch.optim.Adam, num_steps=3)
        model = self._model(runtime, deep_class)
        with mode():
            model.eval()(self._batch(runtime, model.module, 0))
        # The parameters that are seen now must be those that train.
        optimizer = runtime.setup_optimizers(torch.optim.Adam(model.train().parameters(), lr=0.01))
        actual = [self._step(runtime, model, optimizer, seed) for seed in range(3)]
        self._compare_losses(actual, expected)

    def test_a_model_without_a_forward_trains_by_its_parts(self, runtime: Runtime) -> None:
        if TinyOdd not in self.models:
            pytest.skip("a plan for the models of this suite does not fit the parts of this one")

        def build() -> nn.ModuleDict:
            torch.manual_seed(SEED)
            return nn.ModuleDict({"first": TinyOdd(), "second": nn.Linear(7, 7)})

        with factories_on(runtime.device):
            eager = build()
        with runtime.init_module(empty_init=True):
            model = build()
        wrapped = runtime.setup(model)
        first = TinyOdd()
        whole = self._whole_batch(runtime, first, 0)
        eager["second"](eager["first"](whole)).square().mean().backward()
        batch = self._batch(runtime, first, 0)
        runtime.backward(model["second"](model["first"](batch)).square().mean())
        self._compare_gradients(wrapped, eager)

    def test_gradients_accumulate_without_being_exchanged(self, runtime: Runtime, small_class: type[TinyModel]) -> None:
        expected = self._plain_losses(runtime, small_class, torch.optim.SGD, num_steps=2, repeats=2)
        model, optimizer = self._trainable(runtime, small_class, torch.optim.SGD)
        actual = []
        for seed in range(2):
            optimizer.zero_grad()
            batch = self._batch(runtime, model.module, seed)
            for is_accumulating in (True, False):
                with runtime.no_backward_sync(model, enabled=is_accumulating):
                    loss = model.loss(model(batch))
                    runtime.backward(loss)
            optimizer.step()
            actual.append(runtime.all_reduce(loss.detach()).item())
        self._compare_losses(actual, expected)

    @pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
    def test_gradients_are_clipped_by_their_norm_over_all_ranks(
        self, runtime: Runtime, clipped_class: type[TinyModel], norm_type: float
    ) -> None:
        eager = self._plain(runtime, clipped_class)
        eager.loss(eager(self._whole_batch(runtime, eager, 0))).backward()
        expected = torch.nn.utils.clip_grad_norm_(eager.parameters(), 1e-3, norm_type)
        model, optimizer = self._trainable(runtime, clipped_class, torch.optim.SGD)
        runtime.backward(model.loss(model(self._whole_batch(runtime, model.module, 0))))
        norm = runtime.clip_gradients(model, optimizer, max_norm=1e-3, norm_type=norm_type)
        assert norm is not None
        torch.testing.assert_close(full(norm).cpu(), expected.cpu(), rtol=max(self.rtol, 1e-4), atol=1e-6)
        again = runtime.clip_gradients(model, optimizer, max_norm=1.0, norm_type=norm_type)
        assert again is not None
        assert full(again).item() <= 1.01e-3

    def test_gradients_are_clipped_by_value_as_eagers(self, runtime: Runtime, clipped_class: type[TinyModel]) -> None:
        eager = self._plain(runtime, clipped_class)
        eager.loss(eager(self._whole_batch(runtime, eager, 0))).backward()
        elements = torch.cat([p.grad.abs().flatten() for p in eager.parameters() if p.grad is not None])
        limit = elements.median().item()
        torch.nn.utils.clip_grad_value_(eager.parameters(), limit)
        model, optimizer = self._trainable(runtime, clipped_class, torch.optim.SGD)
        runtime.backward(model.loss(model(self._batch(runtime, model.module, 0))))
        assert runtime.clip_gradients(model, optimizer, clip_val=limit) is None
        self._compare_gradients(model, eager)

    def test_a_norm_that_is_not_finite_is_refused_before_gradients_change(
        self, runtime: Runtime, small_class: type[TinyModel]
    ) -> None:
        model, optimizer = self._trainable(runtime, small_class, torch.optim.SGD)
        runtime.backward(model.loss(model(self._batch(runtime, model.module, 0))) * float("inf"))
        before = [None if p.grad is None else full(p.grad).clone() for p in model.parameters()]
        with pytest.raises(NonFiniteGradientError):
            runtime.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            if gradient is not None:
                torch.testing.assert_close(full(parameter.grad), gradient, rtol=0, atol=0, equal_nan=True)

    # --- checkpoints

    def test_a_resumed_run_goes_on_exactly(
        self, runtime: Runtime, resumed_class: type[TinyModel], tmp_path: Path
    ) -> None:
        # Every rank of a test has its own temporary folder, but the ranks write one checkpoint in one folder.
        folder = Path(runtime.broadcast(str(tmp_path))) / "checkpoint"
        model, optimizer = self._trainable(runtime, resumed_class, torch.optim.AdamW)
        for seed in range(2):
            self._step(runtime, model, optimizer, seed)
        runtime.save(folder, {"model": model, "optimizer": optimizer, "step": 2})
        expected = [self._step(runtime, model, optimizer, seed) for seed in range(2, 5)]

        fresh = self.make_runtime()
        torch.manual_seed(SEED + 99)
        resumed, optimizer = self._trainable(fresh, resumed_class, torch.optim.AdamW, seed=SEED + 99)
        state = {"model": resumed, "optimizer": optimizer, "step": 0}
        fresh.load(folder, state)
        assert state["step"] == 2
        assert [self._step(fresh, resumed, optimizer, seed) for seed in range(2, 5)] == expected

    def test_a_training_goes_on_in_one_process_and_comes_back(
        self, runtime: Runtime, deep_class: type[TinyModel], tmp_path: Path
    ) -> None:
        folder = Path(runtime.broadcast(str(tmp_path)))
        alone = Communicator(Environment(), runtime.device)
        model, optimizer = self._trainable(runtime, deep_class, torch.optim.AdamW)
        self._step(runtime, model, optimizer, 0)
        runtime.save(folder / "ours", {"model": model, "optimizer": optimizer}, format="safetensors")

        plain = self._plain(runtime, deep_class, seed=SEED + 99)
        trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
        plain_optimizer = torch.optim.AdamW(trained, lr=0.01)
        load(folder / "ours", {"model": plain, "optimizer": plain_optimizer}, alone)
        values = named_tensors(plain)
        for name, value in named_tensors(model).items():
            assert torch.equal(value, values[name]), name
        expected = [self._plain_step(runtime, plain, plain_optimizer, seed) for seed in (1, 2)]
        self._compare_losses([self._step(runtime, model, optimizer, seed) for seed in (1, 2)], expected)

        if runtime.is_global_zero:
            save(folder / "plain", {"model": plain, "optimizer": plain_optimizer}, alone, format="safetensors")
        runtime.barrier()
        fresh = self.make_runtime()
        model, optimizer = self._trainable(fresh, deep_class, torch.optim.AdamW, seed=SEED + 98)
        fresh.load(folder / "plain", {"model": model, "optimizer": optimizer})
        saved = named_tensors(plain)
        for name, value in named_tensors(model).items():
            assert torch.equal(value, saved[name]), name
        self._compare_losses(
            [self._step(fresh, model, optimizer, seed) for seed in (3, 4)],
            [self._plain_step(runtime, plain, plain_optimizer, seed) for seed in (3, 4)],
        )

    def test_keys_that_differ_by_rank_are_refused(
        self, runtime: Runtime, small_class: type[TinyModel], tmp_path: Path
    ) -> None:
        if runtime.world_size == 1:
            pytest.skip("needs several ranks")
        folder = Path(runtime.broadcast(str(tmp_path))) / "checkpoint"
        state = {"model": self._model(runtime, small_class), f"only{runtime.global_rank}": torch.ones(2)}
        with pytest.raises(RankDisagreementError, match="only"):
            runtime.save(folder, state)
        assert not folder.exists()
