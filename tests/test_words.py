"""Words that make a sentence hard to read for people whose language is not English: counted, and kept away."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
ROOTS = [REPOSITORY / "src", *sorted((REPOSITORY / "plugins").glob("*/src"))]
#: A phrase, and how often it may occur in all.
LIMITS = {
    r"\bshall\b": 0,
    r" (is|are) none\b": 0,
    r"\b(that|which) is no (?!longer\b)": 0,
    r"\bis no tensor\b": 0,
    r"\bof it\b": 10,
    r"\bof which\b": 10,
}

pytestmark = pytest.mark.skipif(not (REPOSITORY / "docs").exists(), reason="needs the repository, not a package")


def sources() -> list[Path]:
    return [path for root in ROOTS for path in sorted(root.rglob("*.py"))]


def prose() -> Iterator[tuple[Path, str]]:
    """Yield comments and strings of the sources, and the pages."""
    for path in sources():
        with open(path, encoding="utf-8") as file:
            tokens = list(tokenize.generate_tokens(io.StringIO(file.read()).readline))
        words = [token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING)]
        # A sentence may go on in the next line of a comment or in the next piece of a string.
        yield path, re.sub(r'["\']?\s*\n?\s*(#|f?["\'])?\s+', " ", " ".join(words))
    for path in (
        *sorted((REPOSITORY / "docs").rglob("*.md")),
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
    ):
        yield path, re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("phrase", "most"), LIMITS.items())
def test_a_phrase_is_rare(phrase: str, most: int) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}: ...{text[max(0, match.start() - 40) : match.end() + 30]}..."
        for path, text in prose()
        for match in re.finditer(phrase, text)
    ]
    assert len(found) <= most, "\n".join(found)


def test_a_modules_docstring_begins_with_its_noun() -> None:
    wrong = []
    for path in sources():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if text.split(" ")[0] in ("What", "Which", "How"):
            wrong.append(f"{path.relative_to(REPOSITORY)}: {text.splitlines()[0]}")
    assert wrong == []
