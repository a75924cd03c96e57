"""Seeds: one call seeds every random number generator, and the generators' states can be saved and restored.

It also derives several seeds from one, such as a seed for the workers of each rank.
"""

from __future__ import annotations

import hashlib
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from nucleate.cluster.settings import global_seed, hand_down_seed
from nucleate.devices import default_generator, devices_taken, hooks_of, is_present
from nucleate.devices.generators import ModuleGenerator
from nucleate.devices.kinds import is_kind
from nucleate.errors import CheckpointKeyError, ConfigurationError

_logger = logging.getLogger(__name__)

_MAX_SEED = 2**32 - 1  # The largest seed that numpy takes.
# The keys of the host's generators in a saved state. The other keys are kinds of device.
_HOST_STATES = frozenset(("python", "torch", "numpy"))

_seed: int | None = None
_seeds_workers = False


def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
    """Seed Python's `random`, numpy if it is installed, and torch on every device.

    The seed also goes into the environment variable `PL_GLOBAL_SEED`, and `workers` into `PL_SEED_WORKERS`, for the
    processes that this process starts. Lightning uses the same variables.

    Args:
        seed: From 0 to 2**32 - 1. None takes the seed in `PL_GLOBAL_SEED`. Without that variable it is 0, with a
            warning.
        workers: Whether to derive the seeds of data loader workers from `seed` too, a different one for each rank,
            worker and epoch. Otherwise torch draws them. None means True.
        verbose: Whether to log the seed at level `INFO`, and to give the warning.

    Returns:
        The seed.

    Raises:
        ConfigurationError: `seed` is out of range or not an integer, or `PL_GLOBAL_SEED` is not.

    >>> seed_everything(42)
    42
    """
    global _seed, _seeds_workers
    if seed is None:
        seed = global_seed()
    if seed is None:
        seed = 0
        if verbose:
            warnings.warn(
                "seed_everything() got no seed, and PL_GLOBAL_SEED is not set, so the seed is 0. Pass a seed.",
                stacklevel=2,
            )
    workers = True if workers is None else bool(workers)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _MAX_SEED:
        raise ConfigurationError(f"the seed is {seed!r}; it must be an integer from 0 to {_MAX_SEED}.")
    _seed, _seeds_workers = seed, workers
    random.seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed)
    torch.manual_seed(seed)
    hand_down_seed(seed, workers)
    if verbose:
        _logger.info("Seed set to %d.", seed)
    return seed


def last_seed() -> int | None:
    """Return the last seed that `seed_everything` got, or None."""
    return _seed


def seeds_workers() -> bool:
    """Return whether the last call of `seed_everything` seeds data loader workers too."""
    return _seeds_workers


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed that is derived from `parts`, and differs if any part differs.

    >>> derive_seed(1, 2) == derive_seed(1, 2) != derive_seed(2, 1)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch's CPU inside, and restore their states afterwards."""
    before = host_states()
    _seed_host(seed)
    try:
        yield
    finally:
        set_host_states(before)


def host_states(only_torch: bool = False) -> dict[str, Any]:
    """Return the states of the host's generators, as tensors, numbers, tuples and strings.

    Args:
        only_torch: Leave out the generators of Python and numpy.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if only_torch:
        return state
    state["python"] = random.getstate()
    if (numpy := _numpy()) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (str(name), torch.tensor(keys.tolist(), device="cpu"), *rest)
    return state


def set_host_states(state: dict[str, Any]) -> None:
    """Set the host's generators to states that `host_states` has returned. A generator without one stays as it is."""
    torch.set_rng_state(state["torch"].cpu())
    if "python" in state:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
    if "numpy" in state and (numpy := _numpy()) is not None:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.tolist(), *rest))


class RandomState:
    """The random number generators of every rank, as an entry of the state that `runtime.save` saves.

    Every rank must call `state_dict` and `load_state_dict`. The values are tensors, numbers, tuples and strings, so
    that `torch.load(weights_only=True)` reads them.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return `{"rank_0": ..., "rank_1": ...}`, the same on every rank."""
        mine = host_states()
        mine.update(_device_states())
        states = [mine]
        if _is_distributed():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, mine)
            states = gathered
        return {f"rank_{rank}": state for rank, state in enumerate(states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the generators of this rank.

        Raises:
            CheckpointKeyError: Fewer ranks saved the state.
        """
        key = f"rank_{torch.distributed.get_rank() if _is_distributed() else 0}"
        if key not in state:
            raise CheckpointKeyError(
                f"there is no random state for {key}: it was saved by {len(state)} ranks. Resume with as many ranks, "
                "or leave the random state out and seed again."
            )
        set_host_states(state[key])
        _restore_devices(state[key])


def _numpy() -> ModuleType | None:
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def _seed_host(seed: int) -> None:
    random.seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.random.seed(seed & _MAX_SEED)
    torch.default_generator.manual_seed(seed)


def _device_states() -> dict[str, Any]:
    """Return the states of this rank's devices, by their kind and then by their index as a string."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for device in devices_taken():
        state = hooks_of(device).random_state_of(device)
        if state is not None:
            states.setdefault(device.type, {})[str(device.index)] = state
    return states


def _restore_devices(state: dict[str, Any]) -> None:
    devices = devices_taken()
    for kind in state.keys() - _HOST_STATES:
        used = [device for device in devices if device.type == kind]
        pairs, num_saved = _pair(kind, state[kind], used)
        for device, value in pairs:
            _set_state(device, value)
        if len(pairs) < num_saved:
            warnings.warn(
                f"the random state was saved with {num_saved} {kind!r} device(s), and this process uses {len(used)}; "
                f"the states of {num_saved - len(pairs)} are not restored, so random numbers drawn on a device do not "
                "continue their streams. Use the same devices as the process that saved the state.",
                stacklevel=3,
            )


def _pair(kind: str, saved: Any, used: list[torch.device]) -> tuple[list[tuple[torch.device, torch.Tensor]], int]:
    """Return pairs of a device and the saved state that it gets, and the number of saved states.

    Args:
        kind: The kind of device.
        saved: The states by index. Formerly, one state was saved, or several in the order in which the accelerators
            were made.
        used: The devices of this kind that this process uses.
    """
    if not used and is_kind(kind):
        # This process has not used this kind of device so far.
        indices = saved if isinstance(saved, dict) and len(saved) > 1 else (None,)
        places = [torch.device(kind if index is None else f"{kind}:{index}") for index in indices]
        used = [device for device in places if is_present(device)]
    if isinstance(saved, dict) and (len(saved) > 1 or len(used) > 1):
        return [(device, saved[str(device.index)]) for device in used if str(device.index) in saved], len(saved)
    # A single device gets a single state, also where their indices differ.
    states = list(saved.values()) if isinstance(saved, dict) else saved
    states = states if isinstance(states, (list, tuple)) else [states]
    return list(zip(used, states, strict=False)), len(states)


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    if hooks_of(device).is_initialized(device.type):
        default_generator(device).set_state(state.cpu())
    else:
        # torch keeps the state until the device is used, and does not initialize the device for it.
        ModuleGenerator(device).set_state(state.cpu())


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
