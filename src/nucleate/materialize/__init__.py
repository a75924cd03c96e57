"""Materialization: every deferred tensor of a model gets its value once, where it will live."""

from nucleate.materialize.execute import execute, materialize
from nucleate.materialize.plan import Plan
from nucleate.materialize.resetting import reset

__all__ = ["Plan", "execute", "materialize", "reset"]
