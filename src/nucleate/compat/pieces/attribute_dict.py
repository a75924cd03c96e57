"""A dict whose keys are attributes too, as scripts use it for settings and states."""

from __future__ import annotations

from typing import Any

from nucleate.errors import name_list


class AttributeDict(dict[str, Any]):
    """A dict whose keys can be read, set and deleted as attributes.

    Example:
        >>> state = AttributeDict(step=0)
        >>> state.step += 1
        >>> state
        {'step': 1}
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this AttributeDict has no key {name!r}. It has {name_list(self)}.") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"this AttributeDict has no key {name!r}. It has {name_list(self)}.") from None
