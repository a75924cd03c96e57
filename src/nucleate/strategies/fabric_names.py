"""Lightning Fabric's keywords of strategies: their meaning for `fully_shard` and DDP, and the reasons to refuse some.

The strategies accept the keywords that mean the same here. This file turns their values into ours. A keyword of Fabric
beside ours for the same thing is refused, because one of the two would be ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nucleate.dimensions.module_policy import ModulePolicy, check_policy
from nucleate.errors import ConfigurationError, name_list

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

_OF_RUNTIME = "is an argument of Runtime"
_FOR_FSDP = {
    "accelerator": _OF_RUNTIME,
    "precision": _OF_RUNTIME,
    "parallel_devices": "is not needed: each process has the device of its local rank",
    "cluster_environment": "is an argument of Runtime: give Runtime(plugins=Environment(...)), or start with torchrun",
    "activation_checkpointing": "has another name: activation_checkpointing_policy",
    "process_group": "is not supported: the strategy spans all processes. For HSDP give num_replicas",
    "ignored_modules": "is not supported: fully_shard takes parameters of all modules",
    "ignored_states": "is not supported: fully_shard takes parameters of all modules",
    "ignored_parameters": "is not supported: fully_shard takes parameters of all modules",
    "param_init_fn": "is not needed: `setup` makes the values that the constructor would make",
    "device_id": "is not needed: each process has the device of its local rank",
}
_FOR_DDP = {
    "accelerator": _OF_RUNTIME,
    "precision": _OF_RUNTIME,
    "parallel_devices": "is not needed: each process has the device of its local rank",
    "cluster_environment": "is an argument of Runtime: give Runtime(plugins=Environment(...)), or start with torchrun",
    "checkpoint_io": "is an argument of Runtime: give Runtime(plugins=...) a reader or a writer",
    "process_group": "is not supported: the strategy spans all processes",
    "device_ids": "is not needed: each process has the device of its local rank",
    "output_device": "is not needed: each process has the device of its local rank",
    "mixed_precision": "is not supported: give Runtime(precision='bf16-mixed') instead",
    "device_mesh": "is not supported: the strategy spans all processes",
}
#: Keywords of FSDP1, with the values that describe what fully_shard does anyway, and the reason to refuse others.
_AS_FULLY_SHARD_DOES: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_orig_params": ((True,), "fully_shard always keeps the model's own parameters"),
    "limit_all_gathers": (
        (True,),
        "fully_shard frees gathered parameters at fixed points, so memory never needs it off",
    ),
    "sync_module_states": ((True, False), ""),
    "forward_prefetch": ((False,), "fully_shard gathers the next unit ahead by itself, on a stream of its own"),
    "backward_prefetch": (("BACKWARD_PRE",), "fully_shard always gathers the next unit before the present gradients"),
}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """The meaning of the keywords that say how `fully_shard` shards.

    Attributes:
        reshard_after_forward: See `FSDPStrategy`.
        num_replicas: The number of replicas; None stands for one on each node.
        num_shards: The number of shards of a replica that the user gave, or None.
    """

    reshard_after_forward: bool | int | None
    num_replicas: int | None
    num_shards: int | None = None

    @classmethod
    def of(
        cls,
        reshard_after_forward: bool | int | None,
        num_replicas: int | None,
        sharding_strategy: object,
        device_mesh: object,
    ) -> Sharding:
        """Join our keywords and Fabric's.

        Raises:
            ConfigurationError: A value is not known, or two keywords say the same thing.
        """
        if num_replicas is not None and not _is_positive(num_replicas):
            raise ConfigurationError(f"num_replicas={num_replicas!r} must be an integer of at least 1.")
        name = _strategy_name(sharding_strategy)
        if name is not None and (reshard_after_forward is not None or num_replicas is not None):
            raise ConfigurationError(
                f"sharding_strategy={name!r} stands beside reshard_after_forward={reshard_after_forward!r} and "
                f"num_replicas={num_replicas!r}, which say the same. Give one or the others."
            )
        hybrid = name is not None and "HYBRID" in name
        replicas: int | None = None if hybrid else num_replicas or 1
        shards: int | None = None
        if device_mesh is not None:
            if num_replicas is not None or not (name is None or hybrid):
                raise ConfigurationError(
                    f"device_mesh={device_mesh!r} gives the numbers of replicas and shards for HYBRID_SHARD; it cannot "
                    f"stand beside num_replicas={num_replicas!r} and sharding_strategy={name!r}."
                )
            replicas, shards = _sizes(device_mesh)
        if name in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2"):
            reshard_after_forward = False
        return cls(reshard_after_forward=reshard_after_forward, num_replicas=replicas, num_shards=shards)


def joined_policy(wrap: ModulePolicy, auto_wrap_policy: ModulePolicy | None) -> ModulePolicy:
    """Return the wrap policy that either keyword gives.

    Raises:
        ConfigurationError: Both are given, or the policy is not valid.
    """
    if auto_wrap_policy is not None and not (isinstance(wrap, str) and wrap == "auto"):
        raise ConfigurationError(
            f"wrap={wrap!r} and auto_wrap_policy={auto_wrap_policy!r} are two names of one policy. Give one."
        )
    if auto_wrap_policy is not None:
        check_policy(auto_wrap_policy, "auto_wrap_policy")
        return auto_wrap_policy
    check_policy(wrap, "wrap")
    return wrap


def offloads(cpu_offload: object) -> bool:
    """Return whether shards stay in host memory: a bool, FSDP1's `CPUOffload` or FSDP2's `CPUOffloadPolicy` says so.

    Raises:
        ConfigurationError: The value is of another kind.
    """
    if cpu_offload is None or isinstance(cpu_offload, bool):
        return bool(cpu_offload)
    if isinstance(offloaded := getattr(cpu_offload, "offload_params", None), bool):
        return offloaded
    name = type(cpu_offload).__name__
    if name in ("OffloadPolicy", "CPUOffloadPolicy"):
        return name == "CPUOffloadPolicy"
    raise ConfigurationError(f"cpu_offload={cpu_offload!r} must be True, False, None or a CPUOffload of torch.")


def checked_mixed_precision(policy: MixedPrecisionPolicy | None) -> MixedPrecisionPolicy | None:
    """Return a policy of `fully_shard`.

    Raises:
        ConfigurationError: It is the policy of FSDP1, or something else.
    """
    if policy is None:
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if isinstance(policy, MixedPrecisionPolicy):
        return policy
    dtypes = [f"{key}={getattr(policy, key)}" for key in ("param_dtype", "reduce_dtype") if getattr(policy, key, None)]
    raise ConfigurationError(
        f"mixed_precision={policy!r} is not a MixedPrecisionPolicy of torch.distributed.fsdp. Give "
        f"MixedPrecisionPolicy({', '.join(dtypes)}), or leave it out and give Runtime(precision='bf16-mixed')."
    )


def checked_state_dict_type(value: str) -> Literal["full", "sharded"]:
    """Return the value.

    Raises:
        ConfigurationError: It is neither of the two words.
    """
    if value == "full":
        return "full"
    if value == "sharded":
        return "sharded"
    raise ConfigurationError(f"state_dict_type={value!r} must be 'sharded' or 'full'.")


def refuse_for_fsdp(others: Mapping[str, Any]) -> None:
    """Refuse the other keywords of Fabric's FSDP strategy, except those that describe what `fully_shard` does anyway.

    Raises:
        ConfigurationError: A keyword has no meaning here; the message gives the reason.
        TypeError: A keyword is unknown.
    """
    for name, value in others.items():
        if name in _AS_FULLY_SHARD_DOES:
            allowed, reason = _AS_FULLY_SHARD_DOES[name]
            if getattr(value, "name", value) not in allowed:
                raise ConfigurationError(f"FSDPStrategy({name}={value!r}): {reason}. Leave it out.")
        else:
            _refuse("FSDPStrategy", name, _FOR_FSDP)


def refuse_for_ddp(others: Mapping[str, Any]) -> None:
    """Refuse the other keywords of Fabric's DDP strategy.

    Raises:
        ConfigurationError: A keyword has no meaning here; the message gives the reason.
        TypeError: A keyword is unknown.
    """
    for name in others:
        _refuse("DDPStrategy", name, _FOR_DDP)


def _refuse(strategy: str, name: str, reasons: Mapping[str, str]) -> None:
    if name in reasons:
        raise ConfigurationError(f"{strategy}({name}=...): {name} {reasons[name]}.")
    raise TypeError(f"{strategy}() got an unexpected keyword argument {name!r}.")


def _strategy_name(value: object) -> str | None:
    """Return the name of a sharding strategy, given by its name or by torch's enum."""
    known = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
    if value is None:
        return None
    name = str(getattr(value, "name", value)).upper()
    if name == "NO_SHARD":
        raise ConfigurationError(
            "sharding_strategy='NO_SHARD' keeps a whole model on each rank. Use strategy='ddp' for that."
        )
    if name not in known:
        raise ConfigurationError(
            f"sharding_strategy={value!r} must be one of {name_list(map(repr, known[:3]))}, or None."
        )
    return name


def _sizes(device_mesh: object) -> tuple[int, int]:
    sizes = getattr(device_mesh, "shape", device_mesh)
    if isinstance(sizes, (tuple, list)) and len(sizes) == 2 and all(map(_is_positive, sizes)):
        if not isinstance(device_mesh, (tuple, list)):
            raise ConfigurationError(
                f"device_mesh is a {type(device_mesh).__name__}. The strategy makes its own mesh: give the two numbers "
                f"device_mesh={tuple(sizes)}."
            )
        return sizes[0], sizes[1]
    raise ConfigurationError(f"device_mesh={device_mesh!r} must be the two numbers (replicas, shards), such as (2, 4).")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
