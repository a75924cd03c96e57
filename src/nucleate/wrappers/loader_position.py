"""The position of a data loader in its data, and its form in a saved state."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from nucleate.errors import UsageError
from nucleate.seed import derive_seed, seeded
from nucleate.wrappers.order_generators import OrderGenerators, States, innermost, makes_plain_batches
from nucleate.wrappers.passes import Passes
from nucleate.wrappers.sampler import ShareSampler


@dataclass(frozen=True)
class LoaderPosition:
    """A place in the data of a loader.

    Attributes:
        epoch: The number of the epoch.
        batches: The number of batches of the epoch that were delivered.
        start: The random states that the order of the epoch was drawn under; None if nothing was drawn yet, or if the
            order is not random.
        own: The state of the loader itself, for a loader that saves its own.
    """

    epoch: int = 0
    batches: int = 0
    start: States | None = None
    own: Any = None

    def written(
        self, loader: DataLoader[Any], generators: OrderGenerators, passes: Passes, num_replicas: int
    ) -> dict[str, Any]:
        """Return the position as plain values and tensors, the same on every rank.

        Args:
            loader: The loader of this rank.
            generators: The generators that the order of its samples is drawn from.
            passes: The passes over the loader.
            num_replicas: The number of ranks that share its samples.
        """
        num_samples, step_size = _sizes(loader, num_replicas)
        own = self.own
        if own is None and self.batches and _saves_itself(loader):
            own = passes.own_state()
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "start": passes.of_ranks(self.start) if self.batches and passes.differ_by_rank else self.start,
            "generators": generators.own_states(),
            "num_samples": num_samples,
            "step_size": step_size,
            "loader": own,
        }


def read_position(
    state: dict[str, Any], loader: DataLoader[Any], generators: OrderGenerators, passes: Passes, num_replicas: int
) -> LoaderPosition:
    """Return the position that a saved state holds, and set the generators that the loader and its samplers hold.

    Args:
        state: As `LoaderPosition.written` returns it; or the epoch, the batches and a seed, as nucleate saved it
            formerly.
        loader: The loader of this rank.
        generators: The generators that the order of its samples is drawn from.
        passes: The passes over the loader.
        num_replicas: The number of ranks that share its samples.

    Raises:
        UsageError: The state does not belong to such a loader.
    """
    try:
        epoch, batches = int(state["epoch"]), int(state["batches"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            "this is not the state of a data loader that `setup_dataloaders` returned: it has no epoch and no number "
            f"of batches ({type(error).__name__}: {error}). Save `loader.state_dict()`, or the loader in a state of "
            "`runtime.save`."
        ) from error
    if "seed" in state:
        return _former(state, epoch, batches, generators)
    if batches:
        _check_sizes(state, _sizes(loader, num_replicas))
    start, own = state["start"], state["loader"] if _saves_itself(loader) else None
    if batches and passes.differ_by_rank:
        start = passes.of_this_rank(start)
    if own is not None:
        passes.of_this_rank(own)
    generators.set_own(state["generators"])
    return LoaderPosition(epoch, batches, start, own)


def _former(state: dict[str, Any], epoch: int, batches: int, generators: OrderGenerators) -> LoaderPosition:
    """Return the position of a state whose order follows from a seed and the epoch."""
    if not batches or not generators.is_random:
        return LoaderPosition(epoch, batches)
    if generators.own_states():
        raise UsageError(
            f"this state was saved by an older nucleate, after {batches} batches of epoch {epoch}, whose order did not "
            "follow from the generator of the loader. The rest of that epoch cannot be drawn again. Call "
            f"`loader.set_epoch({epoch})` instead of loading the state, to begin the epoch at its start."
        )
    with seeded(derive_seed(int(state["seed"]), epoch)):
        return LoaderPosition(epoch, batches, generators.states())


def _saves_itself(loader: DataLoader[Any]) -> bool:
    """Return whether the loader's own state says where its dataset is, as that of torchdata's loader does."""
    has_state = callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
    stateful = isinstance(loader.dataset, IterableDataset) or callable(getattr(loader.dataset, "state_dict", None))
    return has_state and stateful


def _sizes(loader: DataLoader[Any], num_replicas: int) -> tuple[int | None, int | None]:
    """Return the number of samples of an epoch, and of a step of all ranks; batches of the user's count as one."""
    if isinstance(loader.dataset, IterableDataset):
        return None, None
    leaf, batches = innermost(loader), loader.batch_sampler
    source = leaf.source if isinstance(leaf, ShareSampler) else leaf
    num_samples = len(source) if isinstance(source, Sized) else None
    batch_size = batches.batch_size if batches is not None and makes_plain_batches(batches) else 1  # type: ignore[attr-defined]
    return num_samples, batch_size * num_replicas


def _check_sizes(state: dict[str, Any], present: tuple[int | None, int | None]) -> None:
    for name, words, mine in zip(
        ("num_samples", "step_size"), ("samples in an epoch", "samples in a step of all ranks"), present, strict=True
    ):
        saved = state[name]
        if None not in (saved, mine) and saved != mine:
            raise UsageError(
                f"this loader has {mine} {words}, but the state is of a loader with {saved}, after {state['batches']} "
                f"batches of epoch {state['epoch']}: to continue would give some samples twice and others never. Use "
                "the same data, and divide the batch size by the number of ranks. Or call "
                f"`loader.set_epoch({state['epoch']})` instead of loading the state, to begin the epoch at its start."
            )
