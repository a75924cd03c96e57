"""Dimensions of parallelism, for `nucleate.strategies.Parallel`. A new one implements `Dimension`, under this name."""

from nucleate.dimensions.base import Dimension, Placements
from nucleate.dimensions.checkpointing import ActivationCheckpointing
from nucleate.dimensions.common_stream import share_random_stream
from nucleate.dimensions.compiling import Compile
from nucleate.dimensions.fully_shard import FullyShard
from nucleate.dimensions.model_plan import ModelPlan, declare_plan
from nucleate.dimensions.replicate import Replicate
from nucleate.dimensions.tensor import TensorParallel

__all__ = [
    "ActivationCheckpointing",
    "Compile",
    "Dimension",
    "FullyShard",
    "ModelPlan",
    "Placements",
    "Replicate",
    "TensorParallel",
    "declare_plan",
    "share_random_stream",
]
