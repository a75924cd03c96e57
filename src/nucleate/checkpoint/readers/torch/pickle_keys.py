"""Keys of dicts and items of sets from a pickle: the types that are allowed, within a budget.

Python computes the hash of a tuple from all of its parts each time, and the hash of a large number from all of its
digits. A few bytes of a pickle may put a tuple into a tuple many times. So the parts that are hashed are counted.
"""

from __future__ import annotations

from typing import Any, Final

from nucleate.checkpoint.readers.torch.pickle_notes import refuse

_PLAIN: Final = frozenset({str, float, bool, bytes, complex, type(None)})
_MAX_DEPTH = 20
# Python refuses to write longer numbers as text (`sys.get_int_max_str_digits`), and a key is a part of a name.
_MAX_BITS = 10_000
#: The most characters of a text that is a key.
MAX_TEXT: Final = 10_000
# Numbers of up to 64 bits hardly share hashes. Larger ones may be chosen so that all of them do, and then each key is
# compared with all others.
_MAX_LARGE_NUMBERS = 5_000


class KeyBudget:
    """The work that the keys of one pickle may still cause.

    Args:
        num_parts: The number of keys and their parts.
    """

    def __init__(self, num_parts: int) -> None:
        self._num_parts = num_parts
        self._num_large = _MAX_LARGE_NUMBERS

    def check(self, key: Any, depth: int = 0) -> None:
        """Make sure that `key` may be the key of a dict.

        Raises:
            PickleRefusedError: `key` has a type that is not allowed, is nested too deep, or is too long; or the pickle
                has too many keys for its length.
        """
        self._num_parts -= 1
        if self._num_parts < 0:
            refuse("its keys are tuples that hold one another over and over")
        kind = type(key)
        if kind in _PLAIN:
            if kind in (str, bytes) and len(key) > MAX_TEXT:
                refuse(f"a text of {len(key)} characters is a key; at most {MAX_TEXT} are read")
            return
        if kind is int:
            self._check_number(key)
        elif kind is tuple:
            if depth >= _MAX_DEPTH or len(key) >= 1000:
                refuse("a key is a tuple that is nested too deep or too long")
            for part in key:
                self.check(part, depth + 1)
        elif getattr(kind, "__hash__", None) is not object.__hash__ and kind.__module__ != "torch":
            # A dtype, a device and a size of torch are keys.
            refuse(f"a {kind.__name__} is a key")

    def _check_number(self, key: int) -> None:
        bits = key.bit_length()
        if bits > _MAX_BITS:
            refuse(f"a number of {bits} bits is a key; at most {_MAX_BITS} are read")
        if bits > 64:
            self._num_large -= 1
            if self._num_large < 0:
                refuse(f"more than {_MAX_LARGE_NUMBERS} keys are numbers of more than 64 bits")
