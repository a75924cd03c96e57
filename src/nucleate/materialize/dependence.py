"""The dependence of a plan's bits on facts of a process: its CPU's capability, its number of threads, and so on.

The recorded steps show this dependence. An unknown operation counts as dependent on every fact. Small tensors that are
computed without randomness, such as tables of frequencies, are made in a trial instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from nucleate.cluster.numerics import (
    BUILD,
    CAPABILITY,
    DEVICE,
    FILLS,
    LIBRARIES,
    THREADS,
    Numerics,
    fingerprint,
    read_facts,
)
from nucleate.deferred.elements import fill_from
from nucleate.deferred.replay import backward_slice, view
from nucleate.deferred.tape import Constant, Run, Step, TensorRef, map_leaves
from nucleate.materialize.plan import Group, Plan

#: torch splits an operation on more elements over threads (`at::internal::GRAIN_SIZE`, aten/src/ATen/Parallel.h), and
#: then the ends of each part may be computed by other instructions.
GRAIN_NUMEL = 1 << 15
#: A recipe without randomness that touches at most this number of elements is made in a trial.
TRIAL_NUMEL = 1 << 16

# Names of operations, without the underscore of those in place: copies, choices and comparisons; arithmetic that
# IEEE 754 defines to the last bit; and draws that torch turns into numbers by such arithmetic only.
_EXACT_NAMES = """
    empty empty_strided empty_like new_empty new_empty_strided empty_permuted
    zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full zero fill eye scalar_tensor
    copy _to_copy clone cat stack index index_select index_put _unsafe_index gather scatter select_scatter slice_scatter
    diagonal_scatter index_fill index_copy masked_fill masked_scatter where tril triu flip roll repeat
    constant_pad_nd diag_embed sort topk view_as_real view_as_complex complex
    mul div add sub rsub neg abs sqrt sign relu clamp clamp_min clamp_max maximum minimum max min amax amin
    argmax argmin
    eq ne lt le gt ge logical_not logical_and logical_or isnan isinf isfinite round floor ceil trunc reciprocal
    rand rand_like random randint randint_like randperm bernoulli
"""
_EXACT = frozenset(_EXACT_NAMES.split())
_SCALED = frozenset(("add", "sub", "rsub"))
_NORMAL = frozenset(("normal", "randn", "randn_like", "normal_functional"))
# Elementwise operations that torch does not tag as such.
_ELEMENTWISE = frozenset(("arange", "linspace", "logspace", "exponential", "cauchy", "log_normal", "geometric"))

_EVERYTHING = frozenset((CAPABILITY, THREADS, LIBRARIES))


def numerics_of(plan: Plan, device: torch.device) -> Numerics:
    """Find the facts that the bits of a plan depend on, and their values in this process.

    Args:
        plan: The plan, before materialization.
        device: The device on which values are going to be made.
    """
    reader = _Reader()
    numerics = Numerics()
    with ExitStack() as stack:
        # Without the caller's modes, as in materialization.
        for record in plan.records:
            stack.enter_context(record.making())
        for group in plan.groups:
            fqn = group.targets[0].fqn
            facts = reader.facts(group)
            if LIBRARIES in facts and _can_be_tried(reader.slice(group)):
                storage = group.source.make(device)
                numerics.trials[fqn] = fingerprint(
                    [view(storage, target.ref).resolve_conj().resolve_neg().cpu() for target in group.targets]
                )
                continue
            for fact in facts:
                numerics.examples.setdefault(fact, fqn)
        if numerics.examples or numerics.trials:
            numerics.facts.update(read_facts(device))
    return numerics


class _Reader:
    """A reader of the steps of recipes. It reads the steps that lead to a position in the random stream only once."""

    def __init__(self) -> None:
        self._runs: dict[Run, frozenset[str]] = {}

    def slice(self, group: Group) -> list[Step]:
        """Return the steps that a group's storage depends on."""
        return backward_slice(group.source.record.tape, [group.source.storage])

    def facts(self, group: Group) -> frozenset[str]:
        """Return the facts that the bits of a group's storage depend on."""
        found: set[str] = set()
        for step in self.slice(group):
            found |= facts_of(step)
            if step.position is not None:
                found |= self._facts_of_run(step.position.run) | {BUILD}
        if group.source.record.device.type != "cpu":
            return frozenset((BUILD, DEVICE)) if found else frozenset()
        return frozenset(found | {BUILD} if found else found)

    def _facts_of_run(self, run: Run) -> frozenset[str]:
        # The number of draws of a rejection loop depends on the drawn numbers.
        unknown = []
        while run not in self._runs:
            unknown.append(run)
            if run.behind is None:
                break
            run = run.behind[0].run
        for run in reversed(unknown):
            if run.behind is None:
                self._runs[run] = frozenset()
            else:
                self._runs[run] = self._runs[run.behind[0].run] | facts_of(run.behind[1])
        return self._runs[unknown[0] if unknown else run]


def facts_of(step: Step) -> frozenset[str]:
    """Return the facts that the result of one operation on the CPU depends on, given its arguments' bits.

    Args:
        step: A recorded step.
    """
    func = step.func
    if func is fill_from:
        return frozenset()
    if not isinstance(func, torch._ops.OpOverload):
        # The function fills by `normal_` until all values are inside the bounds. Before torch 2.12 it used an `erfinv_`
        # that gives the same bits with every capability.
        return frozenset((FILLS,)) if getattr(func, "__name__", "") == "_no_grad_trunc_normal_" else _EVERYTHING
    name = func.overloadpacket.__name__
    name = name.rstrip("_") if not name.startswith("__") else name
    refs = list(_tensors(step))
    if name in _NORMAL or (name == "uniform" and not _scales_exactly(step)):
        return frozenset((FILLS,))
    if name in _EXACT or name == "uniform":
        # A factor on the second operand, or a complex product, may be fused with the addition.
        scaled = name in _SCALED and (len(step.args) > 2 or step.kwargs.get("alpha", 1) != 1)
        complex_product = name in ("mul", "div", "abs", "sqrt", "reciprocal") and any(r[0].is_complex for r in refs)
        if not scaled and not complex_product:
            return frozenset()
    if not any(dtype.is_floating_point or dtype.is_complex for dtype, _ in refs):
        return frozenset()
    tags = func.tags
    if name in _ELEMENTWISE or torch.Tag.pointwise in tags or torch.Tag.reduction in tags:
        is_large = any(numel > GRAIN_NUMEL for _, numel in refs)
        return frozenset((CAPABILITY, LIBRARIES, *((THREADS,) if is_large else ())))
    return _EVERYTHING


def _scales_exactly(step: Step) -> bool:
    """Return whether a `uniform_` rounds at most once, so that its bits are the same if its operations are fused."""
    # x * (to - from) + from: `uniform_real` in aten/src/ATen/core/TransformationHelper.h, torch 2.13.
    given = dict(zip(("from", "to"), step.args[1:], strict=False)) | step.kwargs
    first, last = given.get("from", 0.0), given.get("to", 1.0)
    return isinstance(first, (int, float)) and (first == 0 or math.frexp(last - first)[0] == 0.5)


def _can_be_tried(steps: list[Step]) -> bool:
    if any(step.position is not None for step in steps):
        # A trial would first have to find the step's position in the stream.
        return False
    return sum(numel for step in steps for _, numel in _tensors(step)) <= TRIAL_NUMEL


def _tensors(step: Step) -> Iterator[tuple[torch.dtype, int]]:
    """Yield the dtype and number of elements of each tensor that a step touches."""
    found: list[tuple[torch.dtype, int]] = [(ref.dtype, ref.numel) for ref in step.outputs]

    def look(leaf: object) -> object:
        if isinstance(leaf, TensorRef):
            found.append((leaf.dtype, leaf.numel))
        elif isinstance(leaf, Constant):
            found.append((leaf.tensor.dtype, leaf.tensor.numel()))
        return leaf

    map_leaves((step.args, step.kwargs), look)
    yield from found
