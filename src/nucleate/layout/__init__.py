"""Layout: which rank holds which part of a tensor. Only `agreement` talks to other ranks."""

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
