"""The names of Fabric that nucleate carries, by module: each leads to `"module:attribute"` of nucleate.

The modules and their names are those of lightning 2.6. `finder.py` serves this table.
"""

from __future__ import annotations

#: The top-level packages that the stand-in takes the place of.
ROOTS = ("lightning", "lightning_fabric")

_PIECES = "nucleate.compat.pieces"
_RANK_ZERO = "lightning_utilities.core.rank_zero"

_TOP = {
    "Fabric": "nucleate.compat.runtime:Fabric",
    "seed_everything": "nucleate.seed:seed_everything",
}
_MODULES = {
    "LightningDataModule": f"{_PIECES}.data_module:LightningDataModule",
    "LightningModule": f"{_PIECES}.lightning_module:LightningModule",
}
_RANK_ZERO_NAMES = {
    name: f"{_RANK_ZERO}:{name}"
    for name in ("rank_zero_debug", "rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn")
}
_LOGGERS = {
    "CSVLogger": "nucleate.loggers:CSVLogger",
    "Logger": "nucleate.loggers:Logger",
    "TensorBoardLogger": "nucleate.loggers:TensorBoardLogger",
}
_PRECISIONS = {
    "BitsandbytesPrecision": f"{_PIECES}.precisions:BitsandbytesPrecision",
    "DoublePrecision": f"{_PIECES}.precisions:DoublePrecision",
    "HalfPrecision": f"{_PIECES}.precisions:HalfPrecision",
    "MixedPrecision": f"{_PIECES}.precisions:MixedPrecision",
    "Precision": "nucleate.precision:Precision",
}
_ENVIRONMENTS = {"ClusterEnvironment": "nucleate.cluster.environment:Environment"}
_THROUGHPUT = {
    "Throughput": "nucleate.report:Throughput",
    "ThroughputMonitor": "nucleate.report:ThroughputMonitor",
    "measure_flops": "nucleate.report:measure_flops",
}
_WRAPPERS = {
    "_FabricDataLoader": "nucleate.wrappers:DataLoaderWrapper",
    "_FabricModule": "nucleate.wrappers:ModuleWrapper",
    "_FabricOptimizer": "nucleate.wrappers:OptimizerWrapper",
    "_unwrap_objects": f"{_PIECES}.unwrapping:unwrap_objects",
    "is_wrapped": "nucleate.wrappers:is_wrapped",
}
_ACCELERATORS = {
    "Accelerator": "nucleate.accelerators:Accelerator",
    "CPUAccelerator": "nucleate.accelerators:CPUAccelerator",
    "CUDAAccelerator": "nucleate.accelerators:CUDAAccelerator",
}
_STRATEGIES = {
    "DDPStrategy": "nucleate.strategies:DDPStrategy",
    "FSDPStrategy": "nucleate.strategies:FSDPStrategy",
    "ModelParallelStrategy": "nucleate.strategies:ModelParallelStrategy",
    "SingleDeviceStrategy": "nucleate.strategies:SingleDeviceStrategy",
    "Strategy": "nucleate.strategies:Strategy",
}

_FABRIC: dict[str, dict[str, str]] = {
    "": {**_TOP, "is_wrapped": _WRAPPERS["is_wrapped"]},
    ".accelerators": _ACCELERATORS,
    ".fabric": {"Fabric": _TOP["Fabric"]},
    ".loggers": _LOGGERS,
    ".loggers.csv_logs": {"CSVLogger": _LOGGERS["CSVLogger"]},
    ".loggers.logger": {"Logger": _LOGGERS["Logger"]},
    ".loggers.tensorboard": {"TensorBoardLogger": _LOGGERS["TensorBoardLogger"]},
    ".plugins": {**_PRECISIONS, **_ENVIRONMENTS},
    ".plugins.environments": _ENVIRONMENTS,
    ".plugins.precision": _PRECISIONS,
    ".strategies": _STRATEGIES,
    ".strategies.ddp": {"DDPStrategy": _STRATEGIES["DDPStrategy"]},
    ".strategies.fsdp": {"FSDPStrategy": _STRATEGIES["FSDPStrategy"]},
    ".strategies.model_parallel": {"ModelParallelStrategy": _STRATEGIES["ModelParallelStrategy"]},
    ".strategies.single_device": {"SingleDeviceStrategy": _STRATEGIES["SingleDeviceStrategy"]},
    ".strategies.strategy": {"Strategy": _STRATEGIES["Strategy"]},
    ".utilities": {
        **{name: target for name, target in _RANK_ZERO_NAMES.items() if name != "rank_zero_debug"},
        **_THROUGHPUT,
        "AttributeDict": f"{_PIECES}.attribute_dict:AttributeDict",
        "LightningEnum": "lightning_utilities.core.enums:StrEnum",
        "move_data_to_device": "nucleate.wrappers.dataloader:move",
        "suggested_max_num_workers": f"{_PIECES}.num_workers:suggested_max_num_workers",
    },
    ".utilities.apply_func": {"move_data_to_device": "nucleate.wrappers.dataloader:move"},
    ".utilities.data": {
        "AttributeDict": f"{_PIECES}.attribute_dict:AttributeDict",
        "suggested_max_num_workers": f"{_PIECES}.num_workers:suggested_max_num_workers",
    },
    ".utilities.enums": {"LightningEnum": "lightning_utilities.core.enums:StrEnum"},
    ".utilities.init": {"_materialize_meta_tensors": f"{_PIECES}.meta_tensors:materialize_meta_tensors"},
    ".utilities.load": {
        "_NotYetLoadedTensor": f"{_PIECES}.lazy_load:NotYetLoadedTensor",
        "_lazy_load": f"{_PIECES}.lazy_load:lazy_load",
    },
    ".utilities.rank_zero": _RANK_ZERO_NAMES,
    ".utilities.seed": {"seed_everything": _TOP["seed_everything"]},
    ".utilities.throughput": _THROUGHPUT,
    ".utilities.types": {
        "LRScheduler": "torch.optim.lr_scheduler:LRScheduler",
        "Optimizable": "torch.optim:Optimizer",
        "ReduceLROnPlateau": "torch.optim.lr_scheduler:ReduceLROnPlateau",
    },
    ".wrappers": _WRAPPERS,
}

#: The names of each module.
MODULES: dict[str, dict[str, str]] = {
    "lightning": {**_TOP, **_MODULES},
    **{f"lightning.fabric{below}": names for below, names in _FABRIC.items()},
    **{f"lightning_fabric{below}": names for below, names in _FABRIC.items()},
    "lightning.pytorch": {**_MODULES, "seed_everything": _TOP["seed_everything"]},
    "lightning.pytorch.cli": {"instantiate_class": f"{_PIECES}.instantiation:instantiate_class"},
    "lightning.pytorch.utilities": {},
    "lightning.pytorch.utilities.model_helpers": {"is_overridden": f"{_PIECES}.lightning_module:is_overridden"},
    "lightning.pytorch.loggers": {
        **_LOGGERS,
        "MLFlowLogger": "nucleate.loggers:MLFlowLogger",
        "WandbLogger": "nucleate.loggers:WandbLogger",
    },
}

_TRAINER = "The Trainer is the real lightning's: run such a script without the stand-in, with nucleate-lightning."

#: Names that nucleate knows and does not carry, and the replacement for each.
ABSENT = {
    "Callback": "A callback is any object with the hooks' names as methods.",
    "DataParallelStrategy": "Use strategy='ddp'.",
    "DeepSpeedStrategy": "Use strategy='fsdp'.",
    "Trainer": _TRAINER,
    "TransformerEnginePrecision": "Use precision='bf16-mixed'.",
    "XLAAccelerator": "nucleate has no accelerator for TPUs.",
    "XLAStrategy": "nucleate has no accelerator for TPUs.",
}
