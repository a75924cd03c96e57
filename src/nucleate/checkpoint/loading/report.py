"""The report of a load, done or only planned: the same for every format and strategy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nucleate.errors import name_list
from nucleate.report.memory import format_bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """A key in a report, with its size and a detail.

    Attributes:
        key: The name in the model or state. An unexpected key is a name in the checkpoint.
        size_bytes: The tensor's size in the checkpoint, or in the model if the checkpoint lacks the tensor.
        detail: The difference, such as `"torch.float32 -> torch.bfloat16"`.
    """

    key: str
    size_bytes: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.key} ({self.detail})" if self.detail else self.key


class LoadReport(dict[str, Any]):
    """The findings of a load. As a dict, it holds the rest of the checkpoint, if the caller asked for the rest.

    Attributes:
        path: The checkpoint.
        format: The name of the reader that read the checkpoint.
        prefix: The beginning of the checkpoint's keys that the load removed; given, or found because all keys have it.
        loaded: Keys that the load read, or that `setup` of a deferred model will read.
        missing: Keys that the checkpoint lacks. Recipes make these deferred tensors; other tensors stay unchanged.
        unexpected: Keys of the checkpoint that the model has no place for.
        mismatched: Keys in both whose tensors do not fit. The load treats them as missing.
        cast: Keys whose values the load converts to another dtype.
        tied: Keys of tensors that the load reads under another key.
        passed_over: Values of the checkpoint that are not plain data, and that the load did not need. Nothing was made
            of them, and no code of them ran.
    """

    def __init__(self, path: Path, format: str) -> None:
        super().__init__()
        self.path = path
        self.format = format
        self.prefix = ""
        self.loaded: list[Finding] = []
        self.missing: list[Finding] = []
        self.unexpected: list[Finding] = []
        self.mismatched: list[Finding] = []
        self.cast: list[Finding] = []
        self.tied: list[Finding] = []
        self.passed_over: list[Finding] = []

    @property
    def is_exact(self) -> bool:
        """Whether the checkpoint and the model have the same keys, and all tensors fit."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format})" + (f", the keys without {self.prefix!r}" if self.prefix else "")]
        for name in ("loaded", "missing", "unexpected", "mismatched", "cast", "tied"):
            found: list[Finding] = getattr(self, name)
            if found or name == "loaded":
                size = format_bytes(sum(one.size_bytes for one in found))
                listed = "" if name == "loaded" else f": {name_list(map(str, found))}"
                lines.append(
                    f"  {name:<11}{len(found):>6} {'tensor ' if len(found) == 1 else 'tensors'} {size:>10}{listed}"
                )
        if self.passed_over:
            lines.append(f"  passed over{len(self.passed_over):>5} not read: {name_list(map(str, self.passed_over))}")
        return "\n".join(lines)

    __repr__ = __str__


def keys(findings: Iterable[Finding]) -> list[str]:
    """Return the keys of findings."""
    return [finding.key for finding in findings]
