"""Rules: they rename, join, split, transpose and permute tensors between a file and a model.

`functions` holds the functions that users call, `pattern` finds and makes names, and `rule` is the base of the rules.
`renames`, `permutations` and `joins` (with `sized`) do the work, and `rules_file` reads rules for the command line.
`loading/tensor_map.py` applies rules while reading, and `saving/moved.py` while writing.
"""

__all__: list[str] = []
