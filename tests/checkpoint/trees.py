"""Any nesting of what a state may hold, for property tests."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.integers(0, 9).map(torch.tensor)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc") | st.integers(), inner, max_size=3)
        | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
