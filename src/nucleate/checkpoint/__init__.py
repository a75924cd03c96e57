"""Checkpoints of any format, of one model or of a whole training state, into any strategy.

`save`, `load` and `load_raw` are the way in. The rest of the package is theirs. Reading: `readers` say what a file or
folder holds, as `contents` made of `stored` tensors in `files`; `plan` compares it with what is asked for, `key_map`
gives other names to keys, `rules` join, split and transpose tensors on the way (`renaming`, `tensor_map`, `moved`),
`own_ways` runs the code that a module has for its loading, with `capture`. `load_report` lists the result. A module
that holds other tensors than it stores has a `stored_form`. Writing: `snapshot` is the state that is written, `held` is
this rank's part, `writers` are the formats, `folder` and
`single_file` make a checkpoint whole or absent, `retention` keeps the last few. Both: `entries` says what a state
consists of, `tree` and `values` take it apart, `optimizer_state` gives names to an optimizer's numbers. `convert` and
`verify` work on files alone: `selection` chooses, `sweep` reads.
"""

from nucleate.checkpoint.converter import ConvertReport, convert
from nucleate.checkpoint.handle import SaveHandle
from nucleate.checkpoint.key_map import KeyMap, add_prefix, strip_prefix
from nucleate.checkpoint.load_report import Finding, LoadReport
from nucleate.checkpoint.loader import load
from nucleate.checkpoint.raw import load_raw
from nucleate.checkpoint.readers import Reader, open_checkpoint
from nucleate.checkpoint.rules import (
    Rule,
    concatenate,
    drop,
    inverse,
    permute_heads,
    read_rules,
    rename,
    split,
    stack,
    transpose,
    unstack,
)
from nucleate.checkpoint.selection import Selection
from nucleate.checkpoint.stored_form import StoredForm, Taken
from nucleate.checkpoint.verifier import VerifyReport, verify
from nucleate.checkpoint.writer import save

__all__ = [
    "ConvertReport",
    "Finding",
    "KeyMap",
    "LoadReport",
    "Reader",
    "Rule",
    "SaveHandle",
    "Selection",
    "StoredForm",
    "Taken",
    "VerifyReport",
    "add_prefix",
    "concatenate",
    "convert",
    "drop",
    "inverse",
    "load",
    "load_raw",
    "open_checkpoint",
    "permute_heads",
    "read_rules",
    "rename",
    "save",
    "split",
    "stack",
    "strip_prefix",
    "transpose",
    "unstack",
    "verify",
]
