"""The exception tree: one root, every class also the builtin that a caller would catch."""

import inspect
import pickle
import re
import traceback

import pytest

from nucleate import errors

CLASSES = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, Exception) and member.__module__ == errors.__name__
]


def names_and_bases(drawing: str) -> dict[str, tuple[str, str | None]]:
    """Read the tree of the module's docstring: class -> (parent, builtins)."""
    tree: dict[str, tuple[str, str | None]] = {}
    parents = {0: "NucleateError"}
    for line in drawing.splitlines():
        match = re.match(r"^([│├└─ ]+) (\w+)(?: \(([\w, ]+)\))?", line)
        if match:
            depth = (len(match[1]) + 1) // 4
            tree[match[2]] = (parents[depth - 1], match[3])
            parents[depth] = match[2]
    return tree


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_caught_by_the_root(cls: type[Exception]) -> None:
    assert issubclass(cls, errors.NucleateError)


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = names_and_bases(errors.__doc__ or "")
    assert set(drawn) == {cls.__name__ for cls in CLASSES} - {"NucleateError"}
    for name, (parent, builtin) in drawn.items():
        bases = [base.__name__ for base in getattr(errors, name).__bases__]
        assert bases == [parent, *(builtin.split(", ") if builtin else [])]


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not errors.NucleateError])
def test_every_error_is_caught_without_knowing_nucleate(cls: type[Exception]) -> None:
    builtins = {base for base in cls.__mro__ if base.__module__ == "builtins"}
    assert builtins - {Exception, BaseException, object}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_carries_its_message(cls: type[Exception]) -> None:
    # LookupError's kin, KeyError above all, would print the repr of the message.
    assert str(cls("rank 1 of 2: 'x' is missing.\nAdd it.")) == "rank 1 of 2: 'x' is missing.\nAdd it."


@pytest.mark.parametrize("builtin", [RuntimeError, ValueError, TypeError])
def test_a_wrong_call_is_caught_by_the_builtin_that_fabric_raises(builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="set up already"):
        raise errors.UsageError("this model is set up already.")


def test_missing_keys_are_a_key_error_whose_traceback_shows_the_lines_of_the_message() -> None:
    with pytest.raises(KeyError) as caught:
        raise errors.CheckpointKeyError("does not fit:\n  1 missing")
    shown = "".join(traceback.format_exception_only(caught.value))
    assert shown == "nucleate.errors.CheckpointKeyError: does not fit:\n  1 missing\n"
    assert str(pickle.loads(pickle.dumps(caught.value))) == "does not fit:\n  1 missing"


@pytest.mark.parametrize(
    ("names", "limit", "text"),
    [
        ([], 10, ""),
        (["a"], 10, "a"),
        (["a", "b"], 2, "a, b"),
        (["a", "b", "c"], 2, "a, b, ... (3 in all)"),
        ((str(n) for n in range(12)), 10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (12 in all)"),
    ],
)
def test_a_long_list_is_cut_with_a_count(names: list[str], limit: int, text: str) -> None:
    assert errors.name_list(names, limit=limit) == text
