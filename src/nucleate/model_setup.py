"""The setup of one model: from recipes to the wrapped module that trains, on all ranks alike."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Collection, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.accelerators.base import Accelerator
from nucleate.cluster.agreement import share_generators, verify_same_model
from nucleate.cluster.communicator import Communicator
from nucleate.cluster.numerics import Numerics
from nucleate.composition import Components
from nucleate.deferred import is_recording, resumed
from nucleate.devices import made_current
from nucleate.dimensions.sharding.gathering import follow_units
from nucleate.errors import ConfigurationError, name_list
from nucleate.integrations.active import Integrations
from nucleate.layout import LiveLayout
from nucleate.materialize import Plan, reset
from nucleate.materialize.dependence import numerics_of
from nucleate.materialize.inference_tensors import replace_inference_tensors
from nucleate.materialize.lazy_modules import refuse_uninitialized
from nucleate.materialize.vacancies import vacancies
from nucleate.materialize.verification import Verification
from nucleate.report.meter import metered
from nucleate.shells import apply_inside, inside, named_buffers, named_parameters, uncompiled
from nucleate.strategies.base import Strategy
from nucleate.wrappers.former import FormerParameters
from nucleate.wrappers.free_parameters import FreeParameters, description, is_on, known_ids
from nucleate.wrappers.looks import shown_by
from nucleate.wrappers.module import ModuleWrapper, refuse_set_up
from nucleate.wrappers.parts import surround_parts


class ModelSetup:
    """The setup of one model.

    Each `all_or_none` block ends on all ranks together: a rank that fails tells the others, so that none waits for it.

    Args:
        parts: The plugins, and the place of this process.
        communicator: The communicator of this process.
        integrations: The integrations that know models of other libraries.
        verify: See `Runtime`.
        free: The parameters of optimizers that no model has.
    """

    def __init__(
        self,
        parts: Components,
        communicator: Communicator,
        integrations: Integrations,
        verify: bool | str,
        free: FreeParameters,
    ) -> None:
        self._accelerator, self._precision, self._strategy = parts.accelerator, parts.precision, parts.strategy
        self._device, self._world_size = parts.device, parts.environment.world_size
        self._is_global_zero = parts.environment.global_rank == 0
        self._communicator = communicator
        self._integrations = list(integrations)
        self._verify = verify
        self._free = free
        # The parameters of each optimizer that no model has.
        self._found: list[list[Tensor]] = []

    def run(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        known: Collection[nn.Module],
        moves: bool = True,
        compiles: bool = True,
    ) -> ModuleWrapper:
        """Set the model up, and point the optimizers to its parameters; see `Runtime.setup`.

        Args:
            model: The model.
            optimizers: Optimizers on its parameters.
            known: The models that were set up before, without shells.
            moves: Whether real tensors move to the device.
            compiles: Whether a compiled model is compiled again.
        """
        with self._communicator.all_or_none("setup"):
            refuse_set_up(model, known)
            # The strategy lays out the user's model; what it returns is compiled again.
            compiled, model = model if compiles else None, uncompiled(model)
            refuse_uninitialized(model)
            former = FormerParameters(model)
            for optimizer in optimizers:
                strangers = former.check(optimizer, model, self._strategy.shards)
                self._found.append(self._free.find(optimizer, strangers, known_ids(known)) if strangers else [])
                self._strategy.check_optimizer(optimizer)
            replace_inference_tensors(model)
            for integration in self._integrations:
                model = apply_inside(model, integration.setup)
            self._note_nothing_to_set_up(model)
            if not moves:
                self._refuse_elsewhere(model)
            vacant = [vacancy.fqn for vacancy in vacancies(model)]
            plan, facts = (None, None) if vacant else self._plan(model)
        self._compare_ranks(facts, vacant, model)
        if plan is None:
            plan = self._reset(model)
        with self._communicator.all_or_none("setup"):
            # Recording is on: the precision's operations on deferred parameters become part of their recipes.
            with resumed(model):
                model = apply_inside(model, self._precision.setup)
            former.refuse_frozen(optimizers, model)
            if moves:
                model = self._accelerator.setup(model)
            plan.renew(model)
        forward_module = self._laid_out(model, plan, former, optimizers)
        former.retire(model)
        for optimizer, found in zip(optimizers, self._found, strict=True):
            self._free.add(optimizer, found)
        shown = shown_by(self._strategy, forward_module)
        live = LiveLayout(inside(model), self._world_size, plan.converted(), shown)
        wrapped = ModuleWrapper(
            forward_module, model, self._precision, self._strategy, self._device, compiled=compiled, live=live
        )
        surround_parts(wrapped)
        for integration in self._integrations:
            for method in integration.inference_methods(inside(model)):
                wrapped.mark_inference_method(method)
        return wrapped

    def _laid_out(
        self, model: nn.Module, plan: Plan, former: FormerParameters, optimizers: Sequence[Optimizer]
    ) -> nn.Module:
        """Lay out and materialize the model, and return the module to call. All optimizers have its parameters then."""
        # This is a block of its own: a strategy exchanges tensors, and would wait for a rank that failed before.
        with self._communicator.all_or_none("setup"):
            verification = Verification(model, plan, self._verify == "all", self._device) if self._verify else None
            with metered(self._is_global_zero), made_current(self._device):
                if type(self._strategy).setup is Strategy.setup:
                    forward_module = self._strategy.finish(model, plan)
                else:  # It makes its own plan.
                    forward_module = self._strategy.setup(model)
                    if self._strategy.shards:
                        follow_units(model)
            former.repoint(optimizers, model)
            for optimizer in optimizers:
                self._strategy.setup_optimizer(optimizer)
        if verification is not None:
            verification.run(self._communicator)
        return forward_module

    def _plan(self, model: nn.Module) -> tuple[Plan, tuple[str, Numerics | None]]:
        """Return a model's plan, its fingerprint and, with other ranks, the facts that its bits depend on."""
        plan = Plan.of(model)
        plan.check_device(self._device)
        return plan, (plan.digest(), numerics_of(plan, self._device)) if self._world_size > 1 else ("", None)

    def _compare_ranks(
        self, facts: tuple[str, Numerics | None] | None, vacant: Sequence[str], model: nn.Module
    ) -> None:
        """Compare the facts of a plan, and the lists of vacant and frozen tensors, between the ranks."""
        if self._world_size > 1:
            frozen = [name for name, parameter in named_parameters(model) if not parameter.requires_grad]
            digest, numerics = facts or ("", None)
            settings = {"verify": self._verify, "precision": repr(self._precision)}
            settings["the list of the optimizers' parameters that no model has"] = description(self._found)
            settings["the list of tensors without a recipe"] = name_list(vacant)
            # Precisions and strategies treat frozen parameters in another way. The message cuts a long list.
            checksum = zlib.crc32("\n".join(frozen).encode())
            settings["the list of frozen parameters"] = f"{name_list(frozen)} (checksum {checksum:08x})"
            verify_same_model(digest, self._communicator, numerics, settings)

    def _reset(self, model: nn.Module) -> Plan:
        """Give recipes to the tensors without one, and return the plan. Every rank has found the same tensors."""
        agree_on_generators(self._communicator, self._accelerator)
        with self._communicator.all_or_none("setup"):
            resets = reset(model, self._device)
            if self._is_global_zero:
                resets.report()
            plan, facts = self._plan(model)
        self._compare_ranks(facts, (), model)
        return plan

    def _refuse_elsewhere(self, model: nn.Module) -> None:
        """Refuse real tensors on other devices, with which a strategy of several processes cannot work."""
        if not self._strategy.distributed:
            return
        named = (*named_parameters(model), *named_buffers(model))
        elsewhere = [f"{name} on {t.device}" for name, t in named if not t.is_meta and not is_on(t, self._device)]
        if elsewhere:
            raise ConfigurationError(
                f"strategy {self._strategy.name!r} needs the model on {self._device}, but with move_to_device=False "
                f"{name_list(elsewhere)} would stay there. Leave move_to_device out, or use strategy='single_device'."
            )

    def _note_nothing_to_set_up(self, model: nn.Module) -> None:
        """Warn about a model without parameters and buffers. It is set up anyway, because it may be a loss function."""
        is_empty = next(model.parameters(), None) is None and next(model.buffers(), None) is None
        if is_empty and self._is_global_zero:
            warnings.warn(
                f"setup: {type(model).__name__} has no parameter and no buffer. There is nothing to create, to shard "
                "or to train; only its forward goes through the precision.",
                stacklevel=5,  # the caller of `Runtime.setup`, which has a decorator
            )


def agree_on_generators(communicator: Communicator, accelerator: Accelerator) -> None:
    """Give every rank the generator states of rank 0.

    Args:
        communicator: The communicator of this process.
        accelerator: The accelerator, which has a generator too.
    """
    if communicator.world_size == 1 or is_recording():
        # Inside another `init_module` the ranks agree already, and the states are places in a recording.
        return
    share_generators(communicator, accelerator.random_state, accelerator.set_random_state)
