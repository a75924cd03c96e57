"""A pickle read as data: the unpickler notes the calls that the pickle asks for, and makes only those of `Maker`s.

torch's own `weights_only` unpickler is safe from code, but not from a damaged file: it makes `bytearray(n)` as long as
the file says, and its faster cousin in C takes memory for as many memo entries as the file names. This unpickler makes
containers, numbers and strings, and takes no more memory and time than a multiple of the pickle's length. The caller
decides the meaning of each name. The unpickler calls `Maker`s. All other names and calls stay notes (`pickle_notes`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, Protocol

from nucleate.checkpoint.readers.torch.pickle_bytes import EndOfPickleError, PickleBytes
from nucleate.checkpoint.readers.torch.pickle_keys import KeyBudget
from nucleate.checkpoint.readers.torch.pickle_notes import Maker as Maker
from nucleate.checkpoint.readers.torch.pickle_notes import PickleRefusedError, Step, Unmade, is_note
from nucleate.errors import CheckpointError, CheckpointUnreadableError


class Buildable(Protocol):
    """An object from a `Maker` that the pickle may give a state afterwards."""

    def build(self, state: Any) -> None:
        """Take the state."""
        ...


class Unpickler(PickleBytes):
    """A reader of one pickle, of protocols 2 to 5.

    Args:
        data: The bytes that hold the pickle.
        find: Returns the object for a module and a name.
        persistent: Returns the object for a persistent id.
        name: The name of the pickle in messages.
        start: The place in `data` where the pickle begins.
    """

    def __init__(
        self,
        data: bytes,
        find: Callable[[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
        *,
        name: str,
        start: int = 0,
    ) -> None:
        super().__init__(data, name, start)
        self._start = start
        self._find = find
        self._persistent = persistent
        self._found: dict[tuple[str, str], Any] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # A call may copy its arguments, and many calls may copy the same long list.
        self._budget = 1000 + 16 * len(data)
        self._keys = KeyBudget(10_000 + 4 * len(data))

    def load(self) -> Any:
        """Return the pickled value, and move `position` to the end of the pickle.

        Raises:
            EndOfPickleError: `data` ends before the pickle does.
            CheckpointUnreadableError: The pickle is not damaged, but holds something that cannot be read.
            CheckpointError: The pickle is damaged.
        """
        data, handlers = self._data, _HANDLERS
        try:
            while True:
                opcode = data[self.position]
                self.position += 1
                if opcode == 0x2E:  # STOP
                    return self._stack.pop()
                handlers[opcode](self)
        except (EndOfPickleError, CheckpointUnreadableError):
            raise
        except PickleRefusedError as error:
            raise CheckpointUnreadableError(f"{self._name} cannot be read: {_short(error)}.") from error
        except Exception as error:
            if self.position >= len(data) and isinstance(error, IndexError):
                raise self._cut_short() from error
            # Random bytes can cause any error.
            raise CheckpointError(
                f"{self._name} is damaged: its pickle cannot be read at byte {self.position} "
                f"({type(error).__name__}: {_short(error)}). Copy it again."
            ) from error

    # --- stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._marks.pop()

    def _skip_int(self) -> None:
        self._take(1)

    def _skip_frame(self) -> None:
        self._take(8)

    # --- memo

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self) -> None:
        self._memo[self._number(1)] = self._stack[-1]

    def _long_put(self) -> None:
        self._memo[self._number(4)] = self._stack[-1]

    def _get(self) -> None:
        self._stack.append(self._memo[self._number(1)])

    def _long_get(self) -> None:
        self._stack.append(self._memo[self._number(4)])

    # --- numbers and text

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    def _int1(self) -> None:
        self._stack.append(self._data[self.position])
        self.position += 1

    def _int2(self) -> None:
        self._stack.append(self._number(2))

    def _int4(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _long1(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def _long4(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(4)), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _text1(self) -> None:
        self._stack.append(self._text(self._number(1)))

    def _text4(self) -> None:
        self._stack.append(self._text(self._number(4)))

    def _text8(self) -> None:
        self._stack.append(self._text(self._number(8)))

    def _bytes1(self) -> None:
        self._stack.append(self._take(self._number(1)))

    def _bytes4(self) -> None:
        self._stack.append(self._take(self._number(4)))

    def _bytes8(self) -> None:
        self._stack.append(self._take(self._number(8)))

    def _bytearray8(self) -> None:
        self._stack.append(bytearray(self._take(self._number(8))))

    # --- containers

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple1(self) -> None:
        self._stack[-1] = (self._stack[-1],)

    def _tuple2(self) -> None:
        second = self._stack.pop()
        self._stack[-1] = (self._stack[-1], second)

    def _tuple3(self) -> None:
        third, second = self._stack.pop(), self._stack.pop()
        self._stack[-1] = (self._stack[-1], second, third)

    def _tuple(self) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _list(self) -> None:
        self._stack.append([])

    def _append(self) -> None:
        item = self._stack.pop()
        self._put_into(list, Step.APPENDED, [item])

    def _appends(self) -> None:
        items = self._since_mark()
        self._put_into(list, Step.APPENDED, items)

    def _dict(self) -> None:
        self._stack.append({})

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._put_into(dict, Step.ITEMS, [key, value])

    def _set_items(self) -> None:
        items = self._since_mark()
        if len(items) % 2:
            raise ValueError("it sets a key without a value")
        self._put_into(dict, Step.ITEMS, items)

    def _set(self) -> None:
        self._stack.append(set())

    def _add_items(self) -> None:
        items = self._since_mark()
        self._put_into(set, Step.ADDED, items)

    def _put_into(self, kind: type[Any], step: Step, items: list[Any]) -> None:
        """Put items into the container on the stack, or note that the pickle puts them into an object."""
        holder: Any = self._stack[-1]
        if isinstance(holder, Unmade):
            holder.steps.append((step, items))
        elif not isinstance(holder, kind):
            raise ValueError(f"it puts items into a {type(holder).__name__}")
        elif step is Step.APPENDED:
            holder.extend(items)
        elif step is Step.ADDED:
            for item in items:
                self._keys.check(item)
            holder.update(items)
        else:
            for place in range(0, len(items), 2):
                self._keys.check(items[place])
                holder[items[place]] = items[place + 1]

    # --- names and calls

    def _global(self) -> None:
        module = self._line()
        self._stack.append(self._named(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise ValueError("it asks for a name that is not a string")
        self._stack.append(self._named(module, name))

    def _named(self, module: str, name: str) -> Any:
        if (module, name) not in self._found:
            self._found[module, name] = self._find(module, name)
        return self._found[module, name]

    def _call(self) -> None:
        self._make({}, is_new=False)

    def _new(self) -> None:
        self._make({}, is_new=True)

    def _new_with_keywords(self) -> None:
        keywords = self._stack.pop()
        if type(keywords) is not dict or not all(type(name) is str for name in keywords):
            raise ValueError("it makes a call with keywords that are not names")
        self._make(keywords, is_new=True)

    def _make(self, keywords: dict[str, Any], is_new: bool) -> None:
        args = self._stack.pop()
        function = self._stack[-1]
        if type(args) is not tuple:
            raise ValueError("it makes a call without arguments")
        if type(function) is not Maker or keywords:
            self._stack[-1] = Unmade(function, args, keywords, is_new)
            return
        for arg in args:
            if isinstance(arg, (str, bytes, bytearray, tuple, list, dict)):
                self._budget -= len(arg)
        if self._budget < 0:
            raise PickleRefusedError("it copies the same value over and over")
        try:
            self._stack[-1] = function.function(*args)
        except (ValueError, TypeError):
            if not any(map(_has_note, args)):
                raise
            # An argument is an object that is not made yet, such as a number of NumPy in a size.
            self._stack[-1] = Unmade(function, args, None, is_new)

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        build = getattr(target, "build", None)
        if build is None:
            raise ValueError(f"it gives a state to a {type(target).__name__}")
        build(state)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise ValueError("it asks for a part of another file")
        self._stack.append(self._persistent(self._stack.pop()))

    def _unknown(self) -> None:
        code = self._data[self.position - 1]
        if code in _OLD_CODES and self._data[self._start] != 0x80:
            raise PickleRefusedError("its pickle has protocol 0 or 1; save it again with protocol 2 or later")
        raise ValueError(f"it has the unknown code {code}")


# The codes that only pickles of protocol 0 and 1 have. These begin without a number of their protocol.
_OLD_CODES: Final = frozenset(b"FILSTVPiodgp")

_HANDLERS: Final[list[Callable[[Unpickler], None]]] = [Unpickler._unknown] * 256
for _code, _handler in {
    b"\x80": Unpickler._skip_int,  # PROTO
    b"\x95": Unpickler._skip_frame,
    b"(": Unpickler._mark,
    b"0": Unpickler._pop,
    b"1": Unpickler._since_mark,
    b"\x94": Unpickler._memoize,
    b"q": Unpickler._put,
    b"r": Unpickler._long_put,
    b"h": Unpickler._get,
    b"j": Unpickler._long_get,
    b"N": Unpickler._none,
    b"\x88": Unpickler._true,
    b"\x89": Unpickler._false,
    b"K": Unpickler._int1,
    b"M": Unpickler._int2,
    b"J": Unpickler._int4,
    b"\x8a": Unpickler._long1,
    b"\x8b": Unpickler._long4,
    b"G": Unpickler._float,
    b"\x8c": Unpickler._text1,
    b"X": Unpickler._text4,
    b"\x8d": Unpickler._text8,
    b"U": Unpickler._text1,  # a Python 2 string
    b"C": Unpickler._bytes1,
    b"B": Unpickler._bytes4,
    b"\x8e": Unpickler._bytes8,
    b"\x96": Unpickler._bytearray8,
    b")": Unpickler._empty_tuple,
    b"\x85": Unpickler._tuple1,
    b"\x86": Unpickler._tuple2,
    b"\x87": Unpickler._tuple3,
    b"t": Unpickler._tuple,
    b"]": Unpickler._list,
    b"a": Unpickler._append,
    b"e": Unpickler._appends,
    b"}": Unpickler._dict,
    b"s": Unpickler._set_item,
    b"u": Unpickler._set_items,
    b"\x8f": Unpickler._set,
    b"\x90": Unpickler._add_items,
    b"c": Unpickler._global,
    b"\x93": Unpickler._stack_global,
    b"R": Unpickler._call,
    b"\x81": Unpickler._new,
    b"\x92": Unpickler._new_with_keywords,
    b"b": Unpickler._build,
    b"Q": Unpickler._persistent_id,
}.items():
    _HANDLERS[_code[0]] = _handler  # type: ignore[assignment]


def _has_note(value: Any) -> bool:
    """Return whether an argument is a note, or a short tuple or list that holds one."""
    if type(value) in (tuple, list) and len(value) < 100:
        return any(map(is_note, value))
    return is_note(value)


def _short(error: Exception) -> str:
    return str(error)[:200]
