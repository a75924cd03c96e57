"""Rules: tensors that are renamed, joined, split, transposed and permuted between a file and a model.

`functions` are the rules as users write them, `pattern` finds and makes names, `rule` is their base. `renames`,
`permutations` and `joins` (with `sized`) say what is done, and `rules_file` reads rules for the command line. They are
applied in `checkpoint/tensor_map.py` (reading) and `checkpoint/moved.py` (writing).
"""

from nucleate.checkpoint.rules.functions import (
    concatenate,
    drop,
    inverse,
    permute_heads,
    rename,
    split,
    stack,
    transpose,
    unstack,
)
from nucleate.checkpoint.rules.rule import CountedMove, Move, Rule
from nucleate.checkpoint.rules.rules_file import read_rules

__all__ = [
    "CountedMove",
    "Move",
    "Rule",
    "concatenate",
    "drop",
    "inverse",
    "permute_heads",
    "read_rules",
    "rename",
    "split",
    "stack",
    "transpose",
    "unstack",
]
