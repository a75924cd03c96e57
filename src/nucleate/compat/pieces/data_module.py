"""The base class of data modules: the hooks that a script calls by itself, without a trainer."""

from __future__ import annotations

from typing import Any


class LightningDataModule:
    """A base class for objects that prepare data and make data loaders. Each hook does nothing by default."""

    def prepare_data(self) -> None:
        """Download and prepare files, on one rank."""

    def setup(self, stage: str) -> None:
        """Read what the loaders need, on every rank.

        Args:
            stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        """

    def train_dataloader(self) -> Any:
        """Return the loader for training."""
        raise NotImplementedError(f"{type(self).__name__} has no train_dataloader().")

    def val_dataloader(self) -> Any:
        """Return the loader for validation."""
        return []

    def test_dataloader(self) -> Any:
        """Return the loader for tests."""
        return []

    def predict_dataloader(self) -> Any:
        """Return the loader for predictions."""
        return []

    def teardown(self, stage: str) -> None:
        """Free what `setup` has read."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved state."""
