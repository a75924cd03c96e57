"""Materialization: every deferred tensor of a model gets its value once, in its final place."""

from nucleate.materialize.execute import execute, materialize
from nucleate.materialize.plan import Plan
from nucleate.materialize.resetting import reset

__all__ = ["Plan", "execute", "materialize", "reset"]
