"""Checkpoints of any format, of one model or of a whole training state, for any strategy.

The entry points are `save`, `load` and `load_raw`. They use the subpackages. `state` takes a state apart and names its
tensors. `disk` makes a checkpoint whole or absent, and keeps the last few. `rules` rename, join, split and transpose
tensors between a file and a model. `stored` describes tensors in files. `readers` list the contents of a file or
folder. `loading` compares the contents with a model and fills the model. `saving` holds a state at one moment, and the
boxes that this rank writes. `writers` write the formats. `tools` work on files alone: `convert`, `verify`, `inspect`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nucleate.checkpoint.loader import load as load
    from nucleate.checkpoint.loading.report import Finding as Finding
    from nucleate.checkpoint.loading.report import LoadReport as LoadReport
    from nucleate.checkpoint.loading.stored_form import StoredForm as StoredForm
    from nucleate.checkpoint.loading.stored_form import StoredSources as StoredSources
    from nucleate.checkpoint.raw_loader import load_raw as load_raw
    from nucleate.checkpoint.readers import Reader as Reader
    from nucleate.checkpoint.readers import open_checkpoint as open_checkpoint
    from nucleate.checkpoint.rules.functions import concatenate as concatenate
    from nucleate.checkpoint.rules.functions import drop as drop
    from nucleate.checkpoint.rules.functions import inverse as inverse
    from nucleate.checkpoint.rules.functions import permute_heads as permute_heads
    from nucleate.checkpoint.rules.functions import rename as rename
    from nucleate.checkpoint.rules.functions import split as split
    from nucleate.checkpoint.rules.functions import stack as stack
    from nucleate.checkpoint.rules.functions import transpose as transpose
    from nucleate.checkpoint.rules.functions import unstack as unstack
    from nucleate.checkpoint.rules.key_map import KeyMap as KeyMap
    from nucleate.checkpoint.rules.key_map import add_prefix as add_prefix
    from nucleate.checkpoint.rules.key_map import strip_prefix as strip_prefix
    from nucleate.checkpoint.rules.rule import Rule as Rule
    from nucleate.checkpoint.rules.rules_file import read_rules as read_rules
    from nucleate.checkpoint.saver import save as save
    from nucleate.checkpoint.saving.handle import SaveHandle as SaveHandle
    from nucleate.checkpoint.tools.converter import ConvertReport as ConvertReport
    from nucleate.checkpoint.tools.converter import convert as convert
    from nucleate.checkpoint.tools.selection import Selection as Selection
    from nucleate.checkpoint.tools.verifier import VerifyReport as VerifyReport
    from nucleate.checkpoint.tools.verifier import verify as verify

# The public names, and the modules that define them. A module is imported when a name is first used: a script that
# loads weights needs neither the converter nor the writers.
_PUBLIC = {
    "ConvertReport": "tools.converter",
    "Finding": "loading.report",
    "KeyMap": "rules.key_map",
    "LoadReport": "loading.report",
    "Reader": "readers",
    "Rule": "rules.rule",
    "SaveHandle": "saving.handle",
    "Selection": "tools.selection",
    "StoredForm": "loading.stored_form",
    "StoredSources": "loading.stored_form",
    "VerifyReport": "tools.verifier",
    "add_prefix": "rules.key_map",
    "concatenate": "rules.functions",
    "convert": "tools.converter",
    "drop": "rules.functions",
    "inverse": "rules.functions",
    "load": "loader",
    "load_raw": "raw_loader",
    "open_checkpoint": "readers",
    "permute_heads": "rules.functions",
    "read_rules": "rules.rules_file",
    "rename": "rules.functions",
    "save": "saver",
    "split": "rules.functions",
    "stack": "rules.functions",
    "strip_prefix": "rules.key_map",
    "transpose": "rules.functions",
    "unstack": "rules.functions",
    "verify": "tools.verifier",
}

__all__ = [*sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
