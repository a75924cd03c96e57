"""What a load did, or would have done: the same for every format and strategy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nucleate.errors import name_list
from nucleate.report.memory import format_bytes


@dataclass(frozen=True, slots=True)
class Finding:
    """One key and what there is to say of it.

    Attributes:
        key: The name in the model or state; of what is unexpected, the name in the checkpoint.
        size_bytes: How large the tensor is: in the checkpoint, or where it has none in the model.
        detail: What differs, such as `"torch.float32 -> torch.bfloat16"`.
    """

    key: str
    size_bytes: int
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.key} ({self.detail})" if self.detail else self.key


class LoadReport(dict[str, Any]):
    """What a load did. As a dict: what the checkpoint holds besides, where the caller asked for it.

    Attributes:
        path: The checkpoint.
        format: The name of the reader that read it.
        loaded: What was read, or is going to be read when a deferred model is set up.
        missing: What the checkpoint lacks. Deferred tensors are made by their recipes, others stay as they are.
        unexpected: What the checkpoint holds and the model has no place for.
        mismatched: What is in both but does not fit, and is treated as missing.
        cast: What is read and converted to another dtype.
        tied: Further names of what is loaded under another one.
    """

    def __init__(self, path: Path, format: str) -> None:
        super().__init__()
        self.path = path
        self.format = format
        self.loaded: list[Finding] = []
        self.missing: list[Finding] = []
        self.unexpected: list[Finding] = []
        self.mismatched: list[Finding] = []
        self.cast: list[Finding] = []
        self.tied: list[Finding] = []

    @property
    def is_exact(self) -> bool:
        """Whether every key was in both and fitted."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.format})"]
        for name in ("loaded", "missing", "unexpected", "mismatched", "cast", "tied"):
            found: list[Finding] = getattr(self, name)
            if found or name == "loaded":
                size = format_bytes(sum(one.size_bytes for one in found))
                listed = "" if name == "loaded" else f": {name_list(map(str, found))}"
                lines.append(
                    f"  {name:<11}{len(found):>6} {'tensor ' if len(found) == 1 else 'tensors'} {size:>10}{listed}"
                )
        return "\n".join(lines)

    __repr__ = __str__


def keys(findings: Iterable[Finding]) -> list[str]:
    """Return the keys of findings."""
    return [finding.key for finding in findings]
