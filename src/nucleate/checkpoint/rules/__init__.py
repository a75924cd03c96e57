"""Rules: tensors that are renamed, joined, split, transposed and permuted between a file and a model.

`functions` are the rules as users write them, `pattern` finds and makes names, `rule` is their base. `renames`,
`permutations` and `joins` (with `sized`) say what is done, and `rules_file` reads rules for the command line. They are
applied in `loading/tensor_map.py` (reading) and `saving/moved.py` (writing).
"""

__all__: list[str] = []
