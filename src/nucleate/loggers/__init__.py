"""Loggers: where the metrics of a run are written. `Runtime(loggers=...)` takes these, and any object like them."""

from nucleate.loggers.base import Logger
from nucleate.loggers.csv_logger import CSVLogger
from nucleate.loggers.mlflow import MLFlowLogger
from nucleate.loggers.tensorboard import TensorBoardLogger
from nucleate.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]
