"""Whole training states on disk: one folder format for every strategy and number of ranks.

`save` and `load` are the way in. The rest of the package is theirs: `entries` says what a state consists of,
`tree` and `values` take it apart, `optimizer_state` gives names to an optimizer's numbers, `plan` compares,
`index` and `dcp` are the format, `folder` makes it whole or absent.
"""

from nucleate.checkpoint.loader import load
from nucleate.checkpoint.writer import save

__all__ = ["load", "save"]
