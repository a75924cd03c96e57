"""The arguments of `from_pretrained` that split a model over ranks, held against the strategy, which does it.

The strategy's mesh decides. An argument that says the same is taken, and one that says something else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from nucleate import Strategy
from nucleate.dimensions import TensorParallel
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh
from nucleate.strategies import Parallel
from nucleate_transformers.tensor_plan import concrete_plan

#: The axis of each size in a `DistributedConfig`.
_AXES = {
    "tp_size": "tp",
    "fsdp_size": "dp_shard",
    "dp_replicate_size": "dp_replicate",
    "pp_size": "pp",
    "ep_size": "ep",
}
#: The argument of nucleate for each other field.
_INSTEAD = {
    "fsdp_plan": "FullyShard(wrap=...) says the units",
    "fsdp_cpu_offload": "FullyShard(cpu_offload=True) does it",
    "fsdp_mixed_precision": "Runtime(precision='bf16-mixed') or FullyShard(mixed_precision=...) does it",
    "enable_sequence_parallel": "transformers does not implement it",
    "enable_expert_parallel": "nucleate has no axis for experts yet",
    "ep_plan": "nucleate has no axis for experts yet",
    "ep_implementation": "nucleate has no axis for experts yet",
}
_NAMES = ("tp_plan", "tp_size", "distributed_config")


class ParallelArguments:
    """The arguments of one call of `from_pretrained` that split the model.

    Args:
        strategy: The strategy of the runtime.
        world_size: The number of processes.
        arguments: The keywords of the call.

    Raises:
        ConfigurationError: An argument says something else than the strategy, or two arguments say the same thing.
    """

    def __init__(self, strategy: Strategy, world_size: int, arguments: Mapping[str, Any]) -> None:
        self._strategy = strategy
        self._mesh = strategy.mesh_for(world_size) if isinstance(strategy, Parallel) else Mesh((), ())
        asked = {name: arguments[name] for name in _NAMES if arguments.get(name) is not None}
        config = asked.pop("distributed_config", None)
        if config is not None and asked:
            raise ConfigurationError(
                f"from_pretrained got distributed_config and {', '.join(asked)}. Give one of them: distributed_config "
                "has fields of these names."
            )
        fields_asked = asked if config is None else _fields(config)
        self._rules: Any = fields_asked.pop("tp_plan", None)
        self._check_sizes(fields_asked)
        self._check_plan()

    @staticmethod
    def remove(arguments: MutableMapping[str, Any]) -> None:
        """Remove the arguments from the keywords of a call: transformers would split the model itself."""
        for name in _NAMES:
            arguments.pop(name, None)

    def add_rules(self, model: PreTrainedModel) -> None:
        """Add the rules of `tp_plan` to the plan of a model.

        Raises:
            ConfigurationError: A rule matches nothing, or its style is unknown.
        """
        if isinstance(self._rules, Mapping):
            concrete_plan(model, max(2, self._mesh.size_of("tp")), self._rules)

    def _check_sizes(self, asked: Mapping[str, Any]) -> None:
        for name, value in asked.items():
            if name not in _AXES:
                raise ConfigurationError(
                    f"from_pretrained(distributed_config=...) has {name}={value!r} inside init_module. Leave it out: "
                    f"{_INSTEAD.get(name, 'the runtime decides it')}."
                )
            if value != self._mesh.size_of(_AXES[name]):
                self._refuse(f"{name}={value!r}", asked)

    def _check_plan(self) -> None:
        rules = self._rules
        if rules is None:
            return
        if rules != "auto" and not (isinstance(rules, Mapping) and rules):
            raise ConfigurationError(
                f"from_pretrained(tp_plan={rules!r}) inside init_module. Give 'auto', or rules that replace some of "
                "the model's plan, such as {'lm_head': 'colwise_gather_output'}. Without an axis tp nothing is split."
            )
        dimensions = getattr(self._strategy, "dimensions", ())
        found = next((dimension for dimension in dimensions if isinstance(dimension, TensorParallel)), None)
        if found is None:
            self._refuse(f"tp_plan={rules!r}", {})
        if not found.is_auto:
            raise ConfigurationError(
                f"from_pretrained(tp_plan={rules!r}) inside init_module, and the strategy has {found!r} with a plan of "
                "its own. Leave tp_plan out, or give TensorParallel(plan='auto')."
            )

    def _refuse(self, argument: str, asked: Mapping[str, Any]) -> NoReturn:
        if any(asked.get(name, 1) != 1 for name in ("pp_size", "ep_size")):
            raise ConfigurationError(
                f"from_pretrained({argument}) inside init_module, and nucleate has no axis for it yet. Leave it out."
            )
        name = _strategy_name(self._mesh, asked)
        mesh = f"has the mesh {self._mesh}" if self._mesh.axes else "does not split models"
        raise ConfigurationError(
            f"from_pretrained({argument}) inside init_module, and the strategy {self._strategy.name!r} {mesh}. The "
            f"strategy decides: leave the argument out, or choose Runtime(strategy={name!r})."
        )


def refuse_in_config(arguments: Mapping[str, Any]) -> None:
    """Refuse the arguments where transformers itself does not take them, as in `from_config`.

    Raises:
        ConfigurationError: One of them is there.
    """
    for name in (*_NAMES, "device_mesh"):
        if arguments.get(name) is not None:
            raise ConfigurationError(
                f"from_config takes no {name}. Leave it out: the axis tp of the strategy splits the model, such as "
                "Runtime(strategy='tp=2') or 'fsdp+tp=2'."
            )


def _fields(config: Any) -> dict[str, Any]:
    """Return the fields of a `distributed_config` that say something."""
    if isinstance(config, Mapping):
        known = {field.name for field in fields(DistributedConfig)}
        unknown = sorted(config.keys() - known)
        if unknown:
            raise ConfigurationError(
                f"from_pretrained(distributed_config=...) has the unknown fields {unknown}. Fields: {sorted(known)}."
            )
        return {name: value for name, value in config.items() if value is not None and value is not False}
    if not isinstance(config, DistributedConfig):
        raise ConfigurationError(f"distributed_config={config!r} is neither a DistributedConfig nor a dict.")
    # The object has sizes that nobody gave: it fills them in with 1.
    silent = {field.name: (field.default, 1 if field.name in _AXES else MISSING) for field in fields(config)}
    return {name: value for name, value in vars(config).items() if name in silent and value not in silent[name]}


def _strategy_name(mesh: Mesh, asked: Mapping[str, Any]) -> str:
    """Return the name of a strategy that does what a call asks for."""
    sizes = {axis: asked.get(name, mesh.size_of(axis)) for name, axis in _AXES.items()}
    parts = []
    if sizes["dp_shard"] > 1:
        parts = ["fsdp", *([f"dp_replicate={sizes['dp_replicate']}"] if sizes["dp_replicate"] > 1 else [])]
    elif sizes["dp_replicate"] > 1:
        parts = ["ddp"]
    tp = sizes["tp"] if "tp_size" in asked or sizes["tp"] > 1 else 2
    return "+".join([*parts, *([f"tp={tp}"] if tp > 1 else [])]) or "auto"
