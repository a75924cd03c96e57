"""Stored form: a module whose tensors lie in a checkpoint in another form than it holds them in.

A quantized layer may be given its own codes, those that another library wrote under other names, or the weight before
it was quantized. It says itself what it makes of what is stored. Nothing is read before everything has been compared,
and a deferred layer is bound like any other module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from nucleate.deferred import Given


@dataclass(frozen=True, slots=True)
class Taken:
    """What a module makes of what is stored for it.

    Attributes:
        given: The name of each parameter or buffer of the module that is filled, to the elements that fill it.
        used: The stored names that this takes, others are unexpected.
        missing: The names that should be stored and are not.
    """

    given: Mapping[str, Given]
    used: frozenset[str]
    missing: tuple[str, ...] = field(default=())


class StoredForm(ABC):
    """A module that says itself how it is filled from a checkpoint. A base beside `torch.nn.Module`."""

    @abstractmethod
    def take_stored(self, stored: Mapping[str, Given]) -> Taken:
        """Say how the module is filled. Called before anything has changed, on deferred and on real modules.

        Small values may be read to see what they say; what is large is read by whoever called.

        Args:
            stored: What the checkpoint holds for it, by the names behind the module's own, such as `"weight"`.

        Raises:
            CheckpointError: It cannot be filled from that. Whoever catches it adds the module's name.
        """
