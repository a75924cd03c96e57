"""The processes of a run: the place of this process among them, and how they find each other and communicate."""

from nucleate.cluster.communicator import Communicator
from nucleate.cluster.environment import Environment

__all__ = ["Communicator", "Environment"]
