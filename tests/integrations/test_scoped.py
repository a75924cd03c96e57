"""A change to a library lasts from the first context to the last one."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from nucleate.integrations.scoped import Scoped, put


class Library:
    def answer(self) -> int:
        return 1


class Special(Library):
    pass


def install(stack: ExitStack) -> None:
    put(stack, Library, "answer", lambda self: 2)


def test_contexts_that_overlap_are_one() -> None:
    scoped = Scoped(install)
    first, second = scoped.entered(), scoped.entered()
    with ExitStack() as stack:
        stack.enter_context(first)
        late = ExitStack()
        late.enter_context(second)
    # The first one has ended.
    assert Library().answer() == 2
    late.close()
    assert Library().answer() == 1
    with scoped.entered():
        assert Library().answer() == 2
    assert Library().answer() == 1


def test_what_an_object_has_by_inheritance_only_is_taken_away_again() -> None:
    with ExitStack() as stack:
        put(stack, Special, "answer", lambda self: 3)
        assert Special().answer() == 3
    assert "answer" not in vars(Special)
    assert Special().answer() == 1


def test_an_error_while_the_change_is_made_undoes_what_was_made() -> None:
    library = SimpleNamespace(name="before")

    def fails(stack: ExitStack) -> None:
        put(stack, library, "name", "after")
        raise ZeroDivisionError

    scoped = Scoped(fails)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), scoped.entered():
            pass
        assert library.name == "before"
