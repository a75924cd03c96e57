"""Which process this is, how the processes find each other, and what they say to one another."""

from nucleate.cluster.communicator import Communicator
from nucleate.cluster.environment import Environment

__all__ = ["Communicator", "Environment"]
