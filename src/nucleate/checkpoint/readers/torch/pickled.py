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
from nucleate.checkpoint.readers.torch.pickle_keys import MAX_TEXT, KeyBudget
from nucleate.checkpoint.readers.torch.pickle_notes import Maker as Maker
from nucleate.checkpoint.readers.torch.pickle_notes import PickleRefusedError, Step, Unmade, is_note
from nucleate.errors import CheckpointError, CheckpointUnreadableError


class Buildable(Protocol):
    """An object from a `Maker` that the pickle may give a state afterwards."""

    def build(self, state: Any) -> None:
        """Take the state."""
        ...


class SparseMemo(dict[int, Any]):
    """The memo of a pickle that does not number its values 0, 1, 2 and so on. All others have a list, which is faster.

    A number may be as large as 2**32, so a list must not reach to it.
    """

    def append(self, value: Any) -> None:
        """Remember a value under the number of values, as MEMOIZE asks for."""
        self[len(self)] = value


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
        self._memo: list[Any] | SparseMemo = []
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
        try:
            return self._run()
        except (EndOfPickleError, CheckpointUnreadableError):
            raise
        except PickleRefusedError as error:
            raise CheckpointUnreadableError(f"{self._name} cannot be read: {_short(error)}.") from error
        except Exception as error:
            if self.position >= len(self._data) and isinstance(error, (IndexError, struct.error)):
                raise self._cut_short() from error
            # Random bytes can cause any error.
            raise CheckpointError(
                f"{self._name} is damaged: its pickle cannot be read at byte {self.position} "
                f"({type(error).__name__}: {_short(error)}). Copy it again."
            ) from error

    def _run(self) -> Any:
        """Run the opcodes until the pickle stops, and return its value.

        This loop is long on purpose. An index of a large checkpoint has millions of opcodes, and a call of a method
        costs more than most opcodes do. So the loop itself does the frequent opcodes, with local variables, and the
        table has the methods for all others. An `if` for the range of the code comes before the `if` for each code, and
        in each range the most frequent code comes first. `position` moves before anything can fail, so that an error
        at the end of the data is found there.
        """
        data, size, memo, marks, handlers = self._data, len(self._data), self._memo, self._marks, _HANDLERS
        stack, position, no_args = self._stack, self.position, ()
        buildable: type[Any] | None = None
        call, persistent, check_key = self._called, self._persistent, self._keys.check
        try:
            while True:
                opcode = data[position]
                position += 1
                if opcode >= 0x80:
                    if opcode == 0x94:  # MEMOIZE
                        memo.append(stack[-1])
                        continue
                    if opcode == 0x85:  # TUPLE1
                        stack[-1] = (stack[-1],)
                        continue
                    if opcode == 0x86:  # TUPLE2
                        second = stack.pop()
                        stack[-1] = (stack[-1], second)
                        continue
                    if opcode == 0x81:  # NEWOBJ
                        if stack[-1] is no_args and type(maker := stack[-2]) is Maker:
                            del stack[-1]
                            stack[-1] = maker.function()
                            continue
                    elif opcode == 0x89:  # NEWFALSE
                        stack.append(False)
                        continue
                    elif opcode == 0x8C:  # SHORT_BINUNICODE
                        begin = position + 1
                        position = begin + data[position]
                        if position > size:
                            raise self._cut_short()
                        stack.append(data[begin:position].decode("utf-8", "surrogatepass"))
                        continue
                    elif opcode == 0x8A:  # LONG1
                        begin = position + 1
                        position = begin + data[position]
                        if position > size:
                            raise self._cut_short()
                        stack.append(int.from_bytes(data[begin:position], "little", signed=True))
                        continue
                    elif opcode == 0x87:  # TUPLE3
                        third, second = stack.pop(), stack.pop()
                        stack[-1] = (stack[-1], second, third)
                        continue
                elif opcode >= 0x60:
                    if opcode == 0x6A:  # LONG_BINGET
                        position += 4
                        stack.append(memo[_read_4(data, position - 4)[0]])
                        continue
                    if opcode == 0x68:  # BINGET
                        position += 1
                        stack.append(memo[data[position - 1]])
                        continue
                    if opcode == 0x72:  # LONG_BINPUT
                        position += 4
                        if (number := _read_4(data, position - 4)[0]) == len(memo):
                            memo.append(stack[-1])
                        else:
                            memo = self._remember(stack, number)
                        continue
                    if opcode == 0x75:  # SETITEMS
                        if isinstance(holder := marks[-1][-1], dict) and not len(stack) % 2:
                            pairs = iter(stack)
                            stack = marks.pop()
                            for key in pairs:
                                # A string keeps its hash, and has more bytes in the pickle than parts for the budget.
                                if type(key) is not str or len(key) > MAX_TEXT:
                                    check_key(key)
                                holder[key] = next(pairs)
                            continue
                    elif opcode == 0x62:  # BUILD
                        state = stack.pop()
                        target = stack[-1]
                        if type(target) is not buildable:
                            if not hasattr(target, "build"):
                                raise ValueError(f"it gives a state to a {type(target).__name__}")
                            buildable = type(target)
                        target.build(state)
                        continue
                    elif opcode == 0x7D:  # EMPTY_DICT
                        stack.append({})
                        continue
                    elif opcode == 0x74:  # TUPLE
                        items = tuple(stack)
                        stack = marks.pop()
                        stack.append(items)
                        continue
                    elif opcode == 0x71:  # BINPUT
                        position += 1
                        if (number := data[position - 1]) == len(memo):
                            memo.append(stack[-1])
                        else:
                            memo = self._remember(stack, number)
                        continue
                elif opcode == 0x4B:  # BININT1
                    position += 1
                    stack.append(data[position - 1])
                    continue
                elif opcode == 0x4D:  # BININT2
                    position += 2
                    stack.append(data[position - 2] | data[position - 1] << 8)
                    continue
                elif opcode == 0x28:  # MARK
                    marks.append(stack)
                    stack = []
                    continue
                elif opcode == 0x52:  # REDUCE
                    args = stack.pop()
                    stack[-1] = call(stack[-1], args)
                    continue
                elif opcode == 0x29:  # EMPTY_TUPLE
                    stack.append(no_args)
                    continue
                elif opcode == 0x58:  # BINUNICODE
                    begin = position + 4
                    position = begin + int.from_bytes(data[position:begin], "little")
                    if position > size:
                        raise self._cut_short()
                    stack.append(data[begin:position].decode("utf-8", "surrogatepass"))
                    continue
                elif opcode == 0x4A:  # BININT
                    position += 4
                    stack.append(_read_signed_4(data, position - 4)[0])
                    continue
                elif opcode == 0x51:  # BINPERSID
                    if persistent is not None:
                        stack[-1] = persistent(stack[-1])
                        continue
                elif opcode == 0x2E:  # STOP
                    return stack.pop()
                self._stack, self.position = stack, position
                handlers[opcode](self)
                stack, position = self._stack, self.position
        finally:
            # A method that failed may have moved the place on. No opcode moves it back.
            self.position = max(self.position, position)

    # --- stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

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

    def _remember(self, stack: list[Any], number: int) -> list[Any] | SparseMemo:
        """Remember the last value of the stack under a number that is not the next one, and return the memo."""
        if isinstance(self._memo, list) and number > len(self._memo):
            self._memo = SparseMemo(enumerate(self._memo))
        self._memo[number] = stack[-1]
        return self._memo

    # --- numbers and text

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _long4(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(4)), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _text1(self) -> None:
        self._stack.append(self._text(self._number(1)))

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

    def _list(self) -> None:
        self._stack.append([])

    def _append(self) -> None:
        item = self._stack.pop()
        self._put_into(list, Step.APPENDED, [item])

    def _appends(self) -> None:
        items = self._since_mark()
        self._put_into(list, Step.APPENDED, items)

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

    def _new(self) -> None:
        args = self._stack.pop()
        self._stack[-1] = self._called(self._stack[-1], args, is_new=True)

    def _new_with_keywords(self) -> None:
        keywords = self._stack.pop()
        if type(keywords) is not dict or not all(type(name) is str for name in keywords):
            raise ValueError("it makes a call with keywords that are not names")
        args = self._stack.pop()
        self._stack[-1] = self._called(self._stack[-1], args, keywords, is_new=True)

    def _called(self, function: Any, args: Any, keywords: dict[str, Any] | None = None, is_new: bool = False) -> Any:
        """Make the call of a `Maker` and return its result. For any other function, return a note of the call."""
        if type(args) is not tuple:
            raise ValueError("it makes a call without arguments")
        if type(function) is not Maker or keywords:
            return Unmade(function, args, keywords, is_new)
        for arg in args:
            if type(arg) is not int and isinstance(arg, _COPIED):
                self._budget -= len(arg)
        if self._budget < 0:
            raise PickleRefusedError("it copies the same value over and over")
        try:
            return function.function(*args)
        except (ValueError, TypeError):
            if not any(map(_has_note, args)):
                raise
            # An argument is an object that is not made yet, such as a number of NumPy in a size.
            return Unmade(function, args, None, is_new)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise ValueError("it asks for a part of another file")
        self._stack.append(self._persistent(self._stack.pop()))

    def _unknown(self) -> None:
        code = self._data[self.position - 1]
        if code in _OLD_CODES and self._data[self._start] != 0x80:
            raise PickleRefusedError("its pickle has protocol 0 or 1; save it again with protocol 2 or later")
        raise ValueError(f"it has the unknown code {code}")


# The types of the arguments that a call may copy.
_COPIED: Final = (tuple, str, dict, list, bytes, bytearray)

_read_4: Final = struct.Struct("<I").unpack_from
_read_signed_4: Final = struct.Struct("<i").unpack_from

# The codes that only pickles of protocol 0 and 1 have. These begin without a number of their protocol.
_OLD_CODES: Final = frozenset(b"FILSTVPiodgp")

_HANDLERS: Final[list[Callable[[Unpickler], None]]] = [Unpickler._unknown] * 256
for _code, _handler in {
    b"\x80": Unpickler._skip_int,  # PROTO
    b"\x95": Unpickler._skip_frame,
    b"0": Unpickler._pop,
    b"1": Unpickler._since_mark,
    b"N": Unpickler._none,
    b"\x88": Unpickler._true,
    b"\x8b": Unpickler._long4,
    b"G": Unpickler._float,
    b"\x8c": Unpickler._text1,
    b"\x8d": Unpickler._text8,
    b"U": Unpickler._text1,  # a Python 2 string
    b"C": Unpickler._bytes1,
    b"B": Unpickler._bytes4,
    b"\x8e": Unpickler._bytes8,
    b"\x96": Unpickler._bytearray8,
    b"]": Unpickler._list,
    b"a": Unpickler._append,
    b"e": Unpickler._appends,
    b"s": Unpickler._set_item,
    b"u": Unpickler._set_items,
    b"\x8f": Unpickler._set,
    b"\x90": Unpickler._add_items,
    b"c": Unpickler._global,
    b"\x93": Unpickler._stack_global,
    b"\x81": Unpickler._new,
    b"\x92": Unpickler._new_with_keywords,
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
