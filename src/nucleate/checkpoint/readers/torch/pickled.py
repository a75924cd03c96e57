"""A pickle read as data: the unpickler notes the calls that the pickle asks for, and makes only those of `Maker`s.

torch's own `weights_only` unpickler is safe from code, but not from a damaged file: it makes `bytearray(n)` as long as
the file says, and its faster cousin in C takes memory for as many memo entries as the file names. This unpickler makes
containers, numbers and strings, and takes no more memory than a multiple of the pickle's length. The caller decides
the meaning of each name. The unpickler calls `Maker`s. All other names and calls stay notes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, Protocol

from nucleate.errors import CheckpointError


class Maker:
    """A function that the pickle may call, or a class that it may make objects of.

    Args:
        function: The function. Its arguments come from the file, so it must check all of them.
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class Global:
    """A name that the pickle asks for, and that the unpickler does not look up.

    Attributes:
        name: The name with its module.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Unmade:
    """An object that only running code could make.

    Attributes:
        function: The function that the pickle wanted to call.
    """

    __slots__ = ("function",)

    def __init__(self, function: Any) -> None:
        self.function = function

    @property
    def name(self) -> str:
        """The name of the function that the pickle wanted to call."""
        inner = self.function
        while isinstance(inner, Unmade):
            inner = inner.function
        return inner.name if isinstance(inner, Global) else f"a {type(inner).__name__}"


class Buildable(Protocol):
    """An object from a `Maker` that the pickle may give a state afterwards."""

    def build(self, state: Any) -> None:
        """Take the state."""
        ...


class Unpickler:
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
        self.position = start
        self._data = data
        self._find = find
        self._persistent = persistent
        self._name = name
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # A call may copy its arguments, and many calls may copy the same long list.
        self._budget = 1000 + 16 * len(data)

    def load(self) -> Any:
        """Return the pickled value, and move `position` to the end of the pickle.

        Raises:
            EndOfPickleError: `data` ends before the pickle does.
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
        except EndOfPickleError:
            raise
        except Exception as error:
            if self.position >= len(data) and isinstance(error, IndexError):
                raise EndOfPickleError(f"{self._name} is damaged: its pickle was cut short. Copy it again.") from error
            # Random bytes can cause any error.
            raise CheckpointError(
                f"{self._name} is damaged: its pickle cannot be read at byte {self.position} ({_short(error)}). Copy "
                "it again."
            ) from error

    # --- bytes

    def _take(self, size_bytes: int) -> bytes:
        end = self.position + size_bytes
        if end > len(self._data):
            raise EndOfPickleError(f"{self._name} is damaged: its pickle was cut short. Copy it again.")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _number(self, size_bytes: int) -> int:
        return int.from_bytes(self._take(size_bytes), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position)
        if end < 0:
            raise EndOfPickleError(f"{self._name} is damaged: its pickle was cut short. Copy it again.")
        return self._take(end + 1 - self.position)[:-1].decode("utf-8")

    def _text(self, size_bytes: int) -> str:
        return self._take(size_bytes).decode("utf-8")

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
        self._holder(list).append(item)

    def _appends(self) -> None:
        items = self._since_mark()
        self._holder(list).extend(items)

    def _dict(self) -> None:
        self._stack.append({})

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        check_key(key)
        self._holder(dict)[key] = value

    def _set_items(self) -> None:
        items = self._since_mark()
        holder = self._holder(dict)
        for place in range(0, len(items), 2):
            check_key(items[place])
            holder[items[place]] = items[place + 1]

    def _set(self) -> None:
        self._stack.append(set())

    def _add_items(self) -> None:
        items = self._since_mark()
        for item in items:
            check_key(item)
        self._holder(set).update(items)

    def _holder(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"it puts items into a {type(self._stack[-1]).__name__}")
        return self._stack[-1]

    # --- names and calls

    def _global(self) -> None:
        module = self._line()
        self._stack.append(self._find(module, self._line()))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise ValueError("it asks for a name that is not a string")
        self._stack.append(self._find(module, name))

    def _call(self) -> None:
        args = self._stack.pop()
        function = self._stack[-1]
        if type(args) is not tuple:
            raise ValueError("it makes a call without arguments")
        if type(function) is not Maker:
            self._stack[-1] = Unmade(function)
            return
        for arg in args:
            if isinstance(arg, (str, bytes, bytearray, tuple, list, dict)):
                self._budget -= len(arg)
        if self._budget < 0:
            raise ValueError("it copies the same value over and over")
        self._stack[-1] = function.function(*args)

    def _call_with_keywords(self) -> None:
        if self._stack.pop() != {}:
            self._stack.pop()
            self._stack[-1] = Unmade(self._stack[-1])
        else:
            self._call()

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Unmade):
            return
        build = getattr(target, "build", None)
        if build is None:
            raise ValueError(f"it gives a state to a {type(target).__name__}")
        build(state)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise ValueError("it asks for a part of another file")
        self._stack.append(self._persistent(self._stack.pop()))

    def _unknown(self) -> None:
        raise ValueError(f"it has the unknown code {self._data[self.position - 1]}")


class EndOfPickleError(CheckpointError):
    """The error for data that ends before its pickle does."""


def check_key(key: Any, depth: int = 0) -> None:
    """Make sure that `key` may be the key of a dict. Hashing an endlessly nested value would end the process.

    Raises:
        ValueError: `key` has a type that is not allowed, or is nested too deep.
    """
    if type(key) in _PLAIN or getattr(type(key), "__hash__", None) is object.__hash__:
        return
    if type(key) is tuple and depth < 20 and len(key) < 1000:
        for part in key:
            check_key(part, depth + 1)
        return
    if type(key).__module__ == "torch":  # a dtype, a device, a size
        return
    raise ValueError(f"a {type(key).__name__} cannot be a key")


_PLAIN: Final = frozenset({str, int, float, bool, bytes, complex, type(None)})

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
    b"\x81": Unpickler._call,  # NEWOBJ
    b"\x92": Unpickler._call_with_keywords,
    b"b": Unpickler._build,
    b"Q": Unpickler._persistent_id,
}.items():
    _HANDLERS[_code[0]] = _handler  # type: ignore[assignment]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
