"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, which come with the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit(
        'The digits come with scikit-learn, which is not installed: pip install -e ".[examples-all]"'
    ) from error

#: Images that no training sees. 360 = 2 * 2 * 2 * 3 * 3 * 5: 2, 3, 4, 5, 6 or 8 processes get equal shares.
NUM_HELD_OUT = 360


def read_digits() -> tuple[Tensor, Tensor]:
    """Return the images `(1797, 1, 8, 8)` with values from -1 to 1, and the digits they show `(1797,)`, shuffled."""
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 8 - 1, torch.tensor(digits)[order]


def split_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return images with their digits to train on, and held-out ones."""
    images, digits = read_digits()
    training = TensorDataset(images[NUM_HELD_OUT:], digits[NUM_HELD_OUT:])
    return training, TensorDataset(images[:NUM_HELD_OUT], digits[:NUM_HELD_OUT])
