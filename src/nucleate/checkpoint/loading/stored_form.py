"""Stored form: a module whose tensors have another form in a checkpoint than in the module.

A checkpoint may hold a quantized layer's own codes, the codes of another library under other names, or the weight
before it was quantized. The layer itself chooses from these. The load reads nothing before it has compared everything,
and it binds a deferred layer like any other module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from nucleate.deferred import ElementSource


@dataclass(frozen=True, slots=True)
class StoredSources:
    """The element sources that a module makes from its stored tensors.

    Attributes:
        given: The name of each parameter or buffer that gets its value from the checkpoint, to its element source.
        used: The stored names that the module uses. Other stored names are unexpected.
        missing: The names that should be stored and are not.
    """

    given: Mapping[str, ElementSource]
    used: frozenset[str]
    missing: tuple[str, ...] = field(default=())


class StoredForm(ABC):
    """A module that chooses by itself how a checkpoint fills it. A second base beside `torch.nn.Module`."""

    @abstractmethod
    def bind_stored(self, stored: Mapping[str, ElementSource]) -> StoredSources:
        """Return the element sources that fill the module.

        Loads call this before anything has changed, on deferred and on real modules. The method may read small values.
        The caller reads the large ones.

        Args:
            stored: The checkpoint's tensors for the module, by names without the module's own, such as `"weight"`.

        Raises:
            CheckpointError: These tensors cannot fill the module. The caller adds the module's name to the message.
        """
