"""The layout of tensors: the part of each tensor that a rank holds. Only `agreement` communicates with other ranks."""

from nucleate.layout.holders import Dealer
from nucleate.layout.placements import (
    cut,
    flat_start,
    is_sharded,
    merged,
    offsets_of,
    runs,
    scattered,
    zeros_beside,
)

__all__ = ["Dealer", "cut", "flat_start", "is_sharded", "merged", "offsets_of", "runs", "scattered", "zeros_beside"]
