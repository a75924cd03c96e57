"""Strategies: how one model is laid out over processes."""

from nucleate.strategies.base import Strategy

__all__ = ["Strategy"]
