"""Patches of transformers while a model is constructed, and their removal.

`PreTrainedModel.from_pretrained` and `_from_config` get the dtype of the precision if the caller gives none and the
precision casts. They refuse arguments that the runtime decides. transformers 5.23 has one place between reading files
and converting their tensors: `_load_pretrained_model` opens the files and calls `convert_and_load_state_dict_in_model`
with their tensors. Here that function gets deferred tensors (`binding.py`). From there on, transformers itself renames,
merges, casts, ties and initializes them, and all these operations are recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from nucleate import Precision, Strategy
from nucleate.cluster import Communicator
from nucleate.deferred import is_recording, record_of
from nucleate_transformers.arguments import refuse_arguments, refuse_distributed
from nucleate_transformers.parallel_arguments import ParallelArguments, refuse_in_config
from nucleate_transformers.quantized import mark_loaded, quantization_of, refuse_unknown, take_quantized


@contextmanager
def construction(
    communicator: Communicator, device: torch.device, precision: Precision, strategy: Strategy
) -> Iterator[None]:
    """Let transformers construct models for a runtime. A nested context changes nothing.

    Args:
        communicator: The ranks that construct the model together.
        device: The device of the deferred tensors.
        precision: The precision. It decides the dtype of models, and may have layers for quantized checkpoints.
        strategy: The strategy. Arguments that split a model are held against it.
    """
    if getattr(PreTrainedModel.from_pretrained, "__func__", None) in _ours:
        yield
        return
    with ExitStack() as stack:
        together = _Together(communicator, strategy)
        # Each auto class has a copy of the function (`auto_class_update`), and reads the configuration before the model
        # class does.
        for auto in (_BaseAutoModelClass, *_BaseAutoModelClass.__subclasses__()):
            if "from_pretrained" in vars(auto):
                _patch(stack, auto, "from_pretrained", functools.partial(_from_auto, together))
        _patch(stack, PreTrainedModel, "from_pretrained", functools.partial(_from_pretrained, together, precision))
        _patch(stack, PreTrainedModel, "_from_config", functools.partial(_from_config, precision))
        _patch(stack, PreTrainedModel, "_load_pretrained_model", functools.partial(_load, device, precision))
        _patch(stack, modeling_utils, "get_hf_quantizer", functools.partial(_quantizer, device, precision))
        _patch(stack, modeling_utils, "check_and_set_device_map", functools.partial(_device_map, device))
        _patch(stack, modeling_utils, "get_distributed_checkpoint_dir", functools.partial(_distributed_folder, device))
        _patch(stack, modeling_utils, "_tied_params_are_equal", _are_equal)
        yield


#: Our functions that replace methods of a class; they show that a context is nested in another.
_ours: set[Any] = set()


def _patch(stack: ExitStack, owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Replace a function by another, as the same kind of method, until the stack is closed.

    Args:
        stack: Restores the original function.
        owner: A class or module.
        name: The function's name in the owner.
        ours: The new function. Its arguments are the original function, then the class (for a class method), then the
            caller's arguments.
    """
    original = vars(owner)[name]
    stack.callback(setattr, owner, name, original)
    plain = getattr(original, "__func__", original)

    @functools.wraps(plain)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ours(plain, *args, **kwargs)

    if isinstance(original, (classmethod, staticmethod)):
        _ours.add(replacement)
        stack.callback(_ours.discard, replacement)
        setattr(owner, name, type(original)(replacement))
    else:
        setattr(owner, name, replacement)


class _Together:
    """A guard for loading on several ranks: if one rank cannot find or read a file, all ranks stop.

    Args:
        communicator: The ranks.
        strategy: The strategy.
    """

    def __init__(self, communicator: Communicator, strategy: Strategy) -> None:
        self._communicator = communicator
        self._strategy = strategy
        self._inside = False

    def checked(self, kwargs: Mapping[str, Any]) -> ParallelArguments:
        """Return the arguments of a call that split the model, after those that contradict the runtime are refused."""
        refuse_arguments(kwargs)
        return ParallelArguments(self._strategy, self._communicator.world_size, kwargs)

    @contextmanager
    def loading(self, cls: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Surround a call of `from_pretrained`. Inner calls do nothing: ranks that failed before would be missing."""
        if self._inside:
            yield
            return
        path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        self._inside = True
        try:
            with self._communicator.all_or_none(f"{cls.__name__}.from_pretrained({str(path)!r})"):
                yield
        finally:
            self._inside = False


def _from_auto(together: _Together, plain: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any) -> Any:
    together.checked(kwargs)
    with together.loading(cls, args, kwargs):
        return plain(cls, *args, **kwargs)


def _from_pretrained(
    together: _Together, precision: Precision, plain: Callable[..., Any], cls: Any, *args: Any, **kwargs: Any
) -> Any:
    parallel = together.checked(kwargs)
    parallel.remove(kwargs)
    _choose_dtype(precision, kwargs)
    with together.loading(cls, args, kwargs):
        loaded = plain(cls, *args, **kwargs)
        # With `output_loading_info` the model is the first of a pair.
        parallel.add_rules(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


def _from_config(precision: Precision, plain: Callable[..., Any], cls: Any, config: Any, **kwargs: Any) -> Any:
    refuse_in_config(kwargs)
    _choose_dtype(precision, kwargs)
    return plain(cls, config, **kwargs)


def _choose_dtype(precision: Precision, kwargs: dict[str, Any]) -> None:
    """Let a model be made in the precision's dtype, unless the caller gave a dtype or the precision casts nothing."""
    # Without an argument, transformers takes the dtype of the configuration, or else of the weights.
    if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None and not precision.keeps_dtypes:
        # The precision's context has made its dtype the default.
        kwargs["dtype"] = torch.get_default_dtype()


def _load(
    device: torch.device,
    precision: Precision,
    plain: Callable[..., Any],
    model: PreTrainedModel,
    state_dict: dict[str, Any] | None,
    checkpoint_files: list[str] | None,
    load_config: Any,
    expected_keys: list[str] | None = None,
) -> Any:
    if not _defers(device):
        return plain(model, state_dict, checkpoint_files, load_config, expected_keys)
    taken: dict[str, set[str]] = {}
    if state_dict is None:
        assert checkpoint_files is not None
        # Not at the top of the file: a model that is constructed from a configuration does not read a checkpoint.
        from nucleate_transformers.binding import Binding

        binding = Binding(checkpoint_files, load_config.sharded_metadata, device)
        if quantization_of(model.config) is not None:
            taken = take_quantized(model, binding.stored, precision, device)
        state_dict = binding.tensors(set().union(*taken.values()))
    with ExitStack() as stack:
        names = vars(core_model_loading)
        stack.callback(names.__setitem__, "ThreadPoolExecutor", names["ThreadPoolExecutor"])
        names["ThreadPoolExecutor"] = _Inline
        loaded = core_model_loading.convert_and_load_state_dict_in_model(model, state_dict, load_config)
    mark_loaded(model, taken, loaded[0].missing_keys)
    return loaded


def _quantizer(
    device: torch.device,
    precision: Precision,
    plain: Callable[..., Any],
    config: Any,
    quantization_config: Any,
    device_map: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if _defers(device) and quantization_of(config) is not None:
        refuse_unknown(config, precision)
        # The precision's layers replace the layers of transformers' quantizer.
        return None, config, device_map
    return plain(config, quantization_config, device_map, *args, **kwargs)


def _distributed_folder(device: torch.device, plain: Callable[..., Any], *args: Any) -> Any:
    folder = plain(*args)
    if folder is not None and _defers(device):
        refuse_distributed(folder)
    return folder


def _device_map(device: torch.device, plain: Callable[..., Any], device_map: Any) -> Any:
    # Deferred tensors are already on the runtime's device, so accelerate does not have to move them.
    if not _defers(device):
        return plain(device_map)
    return None if device.type == "cpu" else {"": device}


def _are_equal(plain: Callable[..., Any], source: torch.Tensor, target: torch.Tensor) -> bool:
    """Compare two tensors that the configuration ties. Tensors of the same bytes are equal without reading them."""
    with torch._C.DisableTorchFunction():
        same = source.is_meta and target.is_meta and _place(source) == _place(target)
    return same or bool(plain(source, target))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def _defers(device: torch.device) -> bool:
    """Return whether new tensors on a device are deferred now."""
    return is_recording() and record_of(torch.empty(1, device=device)) is not None


class _Inline:
    """A replacement for a thread pool that runs each function at once, so that all ranks record in the same order."""

    def __init__(self, max_workers: int | None = None) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass
