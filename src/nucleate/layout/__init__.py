"""The layout of a model: its tensors, the part of each that a rank holds, and whether it trains.

`mesh`, `placements`, `boxes`, `holders` and `layout` are plain data and arithmetic. `reading` reads live tensors, and
`live` follows a model that trains. Only `agreement` communicates with other ranks.
"""

from nucleate.layout.boxes import Box, merged, runs
from nucleate.layout.holders import Dealer, is_writer
from nucleate.layout.layout import Layout, TensorLayout
from nucleate.layout.live import LiveLayout
from nucleate.layout.mesh import AXES, DATA_AXES, Mesh
from nucleate.layout.placements import Partial, Placement, Replicate, Shard
from nucleate.layout.reading import (
    axes_of,
    boxes_of,
    cut,
    flat_start,
    gathered_from,
    held_values,
    is_partial,
    is_sharded,
    laid_out_like,
    layout_of,
    local_of,
    offsets_of,
    reduced_gradient,
    spread_of,
    whole_of,
    zeros_beside,
)

__all__ = [
    "AXES",
    "DATA_AXES",
    "Box",
    "Dealer",
    "Layout",
    "LiveLayout",
    "Mesh",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "TensorLayout",
    "axes_of",
    "boxes_of",
    "cut",
    "flat_start",
    "gathered_from",
    "held_values",
    "is_partial",
    "is_sharded",
    "is_writer",
    "laid_out_like",
    "layout_of",
    "local_of",
    "merged",
    "offsets_of",
    "reduced_gradient",
    "runs",
    "spread_of",
    "whole_of",
    "zeros_beside",
]
