"""The communication between ranks: a thin layer over torch.distributed, which a single process does not need.

This module decides how values of every type and shape travel, and how a failure on one rank reaches the others.
`environment.py` knows the ranks, and `process_group.py` starts the group.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nucleate.cluster.environment import Environment
from nucleate.cluster.ranks import Ranks
from nucleate.cluster.watch import CALLS
from nucleate.errors import ConfigurationError, RankDisagreementError, RankFailedError, UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
#: The ranks of a collective; None means all.
Group = Any

# The allowed operations, and the names of the operations of torch.distributed that do them.
_OPS = {"mean": "SUM", "sum": "SUM", "min": "MIN", "max": "MAX", "product": "PRODUCT"}
_ALIASES = {"avg": "mean", "prod": "product"}

# Numbers the `all_or_none` blocks of this process. All ranks enter them in the same order, so the numbers agree.
_blocks = count()


class Communicator(Ranks):
    """The collectives of one process. In a run of one process, each returns at once, in the same shape and type.

    Every rank must call every method, in the same order.
    """

    def __init__(self, environment: Environment, device: torch.device) -> None:
        """Remember the place of this process and its device.

        Args:
            environment: The place of this process among all processes.
            device: The device on which numbers become tensors, and which receives accelerator tensors.
        """
        self.environment = environment
        self.device = device

    @property
    def rank(self) -> int:
        """The number of this process among all processes."""
        return self.environment.global_rank

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.environment.world_size

    def meeting(self, name: str) -> AbstractContextManager[bool]:
        """Return the context of a call that begins when every rank has entered it.

        A rank that enters another call, or ends, is an error on all ranks within seconds. A meeting inside another call
        does nothing.

        Args:
            name: The name of the call.

        Raises:
            RankDisagreementError: The ranks have entered different calls.
            RankFailedError: A rank has ended or died.
        """
        return CALLS.meeting(name)

    def exchange(self, name: str, counts: bool = True) -> AbstractContextManager[bool]:
        """Return the context of a call whose own collectives wait for the other ranks. Nothing is exchanged for it.

        Args:
            name: The name of the call.
            counts: Whether every rank makes this call. Otherwise only the end of a rank is noticed.

        Raises:
            RankDisagreementError: A rank waits in another call.
            RankFailedError: A rank has ended or died.
        """
        return CALLS.exchange(name, counts)

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank has called this method.

        Args:
            name: A name for messages.
        """
        with CALLS.meeting("barrier" if name is None else f"barrier({name!r})") as has_met:
            if self.world_size > 1 and not has_met:
                dist.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank `src`'s object on every rank.

        Tensors inside dicts, lists, tuples and dataclasses arrive on this rank's device if they were on an
        accelerator, else on the CPU. They carry no gradient history. Everything else is pickled.

        Args:
            obj: Any object that can be pickled. Only the object of rank `src` matters.
            src: The rank that sends its object.

        Raises:
            ConfigurationError: There is no rank `src`.
            RankFailedError: Rank `src` could not send its object, for example because it cannot be pickled.
        """
        if not 0 <= src < self.world_size:
            raise ConfigurationError(f"broadcast from rank {src}, but the ranks are 0 to {self.world_size - 1}.")
        if self.world_size == 1:
            return obj
        with CALLS.meeting("broadcast"):
            return self._broadcast(obj, src)

    def _broadcast(self, obj: T, src: int) -> T:
        # Imported here: it imports a parser of version numbers, which a single process does not need.
        from lightning_utilities.core.apply_func import apply_to_collection

        tensors: list[Tensor] = []
        skeleton: Any = None
        with self.all_or_none("broadcast"):
            if self.rank == src:
                # Pickled here and not by torch, so that a failure comes before any rank waits for the message.
                skeleton = pickle.dumps(apply_to_collection(obj, Tensor, lambda tensor: _Slot.put(tensor, tensors)))
        message = [skeleton]
        dist.broadcast_object_list(message, src=src)
        if self.rank == src:
            for tensor in tensors:
                dist.broadcast(_as_bytes(tensor.to(self.device) if tensor.device.type != "cpu" else tensor), src=src)
            return obj

        def receive(slot: _Slot) -> Tensor:
            tensor = torch.empty(slot.shape, dtype=slot.dtype, device=self.device if slot.on_accelerator else "cpu")
            if tensor.numel() > 0:
                dist.broadcast(_as_bytes(tensor), src=src)
            return tensor

        return cast(T, apply_to_collection(pickle.loads(message[0]), _Slot, receive))

    def gather_objects(self, obj: T, group: Group = None) -> list[T]:
        """Return every rank's object, by rank. The objects are pickled.

        Args:
            obj: This rank's object.
            group: The ranks; None means all.
        """
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, obj, group=group)
        return gathered

    def all_gather(self, data: Any, sync_grads: bool = False, group: Group = None) -> Any:
        """Return every rank's `data` stacked along a new leading axis.

        Args:
            data: A tensor, a number, or a collection of them; each becomes a tensor `(world_size, *shape)`.
                Anything else in the collection stays as it is on this rank.
            sync_grads: Whether gradients flow back to the rank that each slice came from. Then every rank must run
                backward.
            group: The ranks that take part, as `torch.distributed.new_group` returns them; None means all. Every rank
                of the group calls this method, and `world_size` is the size of the group.

        Raises:
            RankDisagreementError: The ranks' tensors differ in number, shape, dtype or kind of device.
            UsageError: This rank is not in the group.
        """
        self._check_group(group, "all_gather")

        def gather(tensor: Tensor) -> Tensor:
            if not sync_grads:
                tensor = tensor.detach()
            if self.world_size == 1:
                return torch.stack([tensor])
            return cast(Tensor, _AllGather.apply(tensor, group))  # type: ignore[no-untyped-call]

        with _call("all_gather", group):
            return _Leaves(self, data, "all_gather", sync_grads, group).map(gather)

    def all_reduce(self, data: Any, reduce_op: Any = "mean", group: Group = None) -> Any:
        """Return the combined `data` of all ranks, equal on every rank. `data` itself does not change.

        The result carries no gradient history. Integers keep every digit: sums and products of integers are int64, as
        with `torch.sum`, and their mean has the default floating point dtype. Half precision is summed in float32.

        Args:
            data: A tensor, a number, or a collection of them. Anything else in the collection stays as it is.
            reduce_op: One of `"mean"` (or `"avg"`), `"sum"`, `"min"`, `"max"`, `"product"` (or `"prod"`), in lower or
                upper case; or the member of `torch.distributed.ReduceOp` of the same meaning.
            group: The ranks that take part, as `torch.distributed.new_group` returns them; None means all. Every rank
                of the group calls this method.

        Raises:
            ConfigurationError: `reduce_op` is not one of these.
            RankDisagreementError: The ranks' tensors differ in number, shape, dtype or kind of device.
            UsageError: This rank is not in the group.
        """
        operation = _operation(reduce_op)
        self._check_group(group, "all_reduce")
        with _call("all_reduce", group):
            leaves = _Leaves(self, data, "all_reduce", False, group)
            return leaves.map(lambda tensor: self._reduce(tensor.detach(), operation, group))

    def _check_group(self, group: Any, what: str) -> None:
        if group is None:
            return
        if not isinstance(group, dist.ProcessGroup):
            if group is dist.GroupMember.NON_GROUP_MEMBER:
                raise UsageError(f"{what}: rank {self.rank} is not in the group. Call it only on the group's ranks.")
            raise ConfigurationError(
                f"{what}: group is {group!r}; it must be None, a group that `torch.distributed.new_group` returned, "
                "or the name of an axis of the strategy's mesh. Pass other arguments by their names."
            )

    def _reduce(self, tensor: Tensor, reduce_op: str, group: Group) -> Tensor:
        if tensor.is_complex():
            if reduce_op not in ("mean", "sum"):
                raise ConfigurationError(
                    f"reduce_op {reduce_op!r} does not work on complex tensors; use 'sum' or 'mean'."
                )
            return torch.view_as_complex(self._reduce(torch.view_as_real(tensor), reduce_op, group))
        extremum = reduce_op in ("min", "max")
        floating = tensor.is_floating_point()
        wide = torch.int64 if not floating else torch.float64 if tensor.dtype == torch.float64 else torch.float32
        # gloo knows neither float8 nor int16, and a sum in the narrow dtype would round or wrap around.
        total = tensor.to(wide, copy=True, memory_format=torch.contiguous_format)
        if self.world_size > 1:
            dist.all_reduce(total, op=getattr(dist.ReduceOp, _OPS[reduce_op]), group=group)
        if reduce_op == "mean":
            total = total / (dist.get_world_size(group) if self.world_size > 1 else 1)
        return total.to(tensor.dtype) if floating or extremum else total

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """Surround work that every rank must finish, so that a failure of one rank is an error on all ranks.

        The rank that fails raises its own error at once; the others raise an error when they reach the end. The message
        travels through the group's store and not by a collective, so it cannot mix with a running collective.

        Args:
            what: The name of the work, for the message.

        Raises:
            RankFailedError: Another rank failed. The message carries its number and traceback.
        """
        if self.world_size == 1:
            yield
            return
        CALLS.refuse()
        store = dist.distributed_c10d._get_default_store()
        prefix = f"nucleate/all_or_none/{next(_blocks)}"
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException as error:
            # `compare_set` keeps the first failure and returns it.
            mine = f"{self.rank}\n{''.join(traceback.format_exception(error))}"
            first = store.compare_set(f"{prefix}/failed", "", mine).decode()
            store.set(f"{prefix}/done", "failed")
            if first != mine and not isinstance(error, RankFailedError):
                rank, _, description = first.partition("\n")
                error.add_note(f"Rank {rank} failed first in the same work: {what}.\n{description}")
            raise
        if store.add(f"{prefix}/arrived", 1) == self.world_size:
            store.set(f"{prefix}/done", "whole")
        try:
            with CALLS.waiting_for(prefix):
                outcome = store.get(f"{prefix}/done").decode()
        except dist.DistError as error:
            raise RankFailedError(f"{what}: not every rank reached the end before the timeout.") from error
        if outcome == "failed":
            rank, _, description = store.get(f"{prefix}/failed").decode().partition("\n")
            raise RankFailedError(f"{what} failed on rank {rank}:\n{description}")


def _call(name: str, group: Group) -> AbstractContextManager[bool]:
    """Return the context of a collective: all ranks meet in it, unless it is one of some ranks."""
    return CALLS.meeting(name) if group is None else CALLS.exchange(name, counts=False)


class _Leaves:
    """The tensors and numbers of a collection. Their dtypes, shapes and kinds of device are equal on all ranks."""

    def __init__(self, communicator: Communicator, data: Any, what: str, sync_grads: bool, group: Group) -> None:
        from lightning_utilities.core.apply_func import apply_to_collection

        self.data = data
        self.device = communicator.device
        self._tensors: list[Tensor] = []
        apply_to_collection(data, (Tensor, int, float), self._tensors_of)
        if communicator.world_size > 1:
            self._agree(communicator, what, sync_grads, group)

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Return the collection with `function` applied to each leaf, in the order that all ranks share."""
        from lightning_utilities.core.apply_func import apply_to_collection

        tensors = iter(self._tensors)
        return apply_to_collection(self.data, (Tensor, int, float), lambda _: function(next(tensors)))

    def _tensors_of(self, leaf: Any) -> None:
        tensor = leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, device=self.device)
        # A sharded tensor stands for its whole value, not for the shard that this rank happens to hold.
        self._tensors.append(tensor.full_tensor() if _is_dtensor(tensor) else tensor)

    def _agree(self, communicator: Communicator, what: str, sync_grads: bool, group: Group) -> None:
        mine = [
            f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device.type}"
            + (" with gradient" if sync_grads and tensor.requires_grad else "")
            for tensor in self._tensors
        ]
        all_ranks = communicator.gather_objects(mine, group)
        for rank, theirs in enumerate(all_ranks):
            if len(theirs) != len(all_ranks[0]):
                raise RankDisagreementError(
                    f"{what}: rank 0 brings {len(all_ranks[0])} tensors but rank {rank} brings {len(theirs)}. Every "
                    "rank must bring the same collection."
                )
            for index, (first, other) in enumerate(zip(all_ranks[0], theirs, strict=True)):
                if first != other:
                    raise RankDisagreementError(
                        f"{what}: tensor {index} is {first} on rank 0 but {other} on rank {rank}. Every rank must "
                        "bring the same shapes and dtypes: pad what differs, or gather it as objects."
                    )


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in a pickled collection. The tensor itself follows by a collective."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_accelerator: bool

    @classmethod
    def put(cls, tensor: Tensor, tensors: list[Tensor]) -> _Slot:
        if _is_dtensor(tensor):
            raise UsageError("a DTensor cannot be broadcast: it is spread over the ranks. Send `.full_tensor()`.")
        if tensor.numel() > 0:
            tensors.append(tensor.detach())
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type != "cpu")


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
        if tensor.numel() > 0:
            dist.all_gather([_as_bytes(part) for part in gathered], _as_bytes(tensor), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        if grad.numel() > 0:
            dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def _operation(reduce_op: Any) -> str:
    """Return the name of an operation that is given by its name or as a member of torch's `ReduceOp`."""
    if isinstance(reduce_op, str):
        name = reduce_op.lower()
    else:
        names = ("AVG", "SUM", "MIN", "MAX", "PRODUCT")
        name = next((known.lower() for known in names if reduce_op == getattr(dist.ReduceOp, known)), "")
    name = _ALIASES.get(name, name)
    if name not in _OPS:
        raise ConfigurationError(
            f"reduce_op is {reduce_op!r}; allowed are {', '.join(map(repr, (*_OPS, *_ALIASES)))}, and the members of "
            "torch.distributed.ReduceOp with these names."
        )
    return name


def _as_bytes(tensor: Tensor) -> Tensor:
    """View a tensor as flat bytes, which every backend can send for every dtype."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.contiguous().view(-1).view(torch.uint8)


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    if type(tensor) is Tensor:
        return False
    # Imported here: the import is slow, and a program without sharded tensors never needs it.
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
