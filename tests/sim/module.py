"""`torch.sim`, the names that torch and its users expect of a device's module."""

from __future__ import annotations

import types
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch

Device = torch.device | str | int | None


def make_module(extension: ModuleType) -> ModuleType:
    """Return a module for `torch._register_device_module` over the compiled `extension`."""
    module = types.ModuleType("torch.sim", "A simulated device of CPU memory.")
    for name, value in vars(_Functions(extension)).items():
        setattr(module, name, value)
    return module


class _Functions:
    """The functions of the module, as attributes."""

    def __init__(self, extension: Any) -> None:
        accelerator = torch.accelerator

        def index_of(device: Device) -> int:
            if device is None:
                return int(extension.current_device())
            if isinstance(device, int):
                return device
            device = torch.device(device)
            if device.type != "sim":
                raise ValueError(f"expected a device of type sim, got {device}")
            return int(extension.current_device()) if device.index is None else device.index

        def generator(device: Device) -> torch.Generator:
            return self.default_generators[index_of(device)]

        class device(AbstractContextManager[None]):  # noqa: N801, torch's name
            """Make a device current within a `with` block; None or a negative index changes nothing."""

            def __init__(self, device: Device) -> None:
                self.idx = -1 if device is None else index_of(device)

            def __enter__(self) -> None:
                self.before = extension.current_device()
                if self.idx >= 0:
                    extension.set_device(self.idx)

            def __exit__(self, *_: object) -> None:
                extension.set_device(self.before)

        class device_of(device):  # noqa: N801
            def __init__(self, tensor: torch.Tensor) -> None:
                super().__init__(tensor.device if tensor.device.type == "sim" else None)

        class stream(AbstractContextManager[None]):  # noqa: N801
            """Make a stream current within a `with` block; None changes nothing."""

            def __init__(self, stream: torch.Stream | None) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                if self.stream is not None:
                    self.stream.__enter__()

            def __exit__(self, *error: Any) -> None:
                if self.stream is not None:
                    self.stream.__exit__(*error)

        def seed_all() -> None:
            seed = self.default_generators[0].seed()
            manual_seed_all(seed)

        def manual_seed(seed: int) -> None:
            generator(None).manual_seed(int(seed))

        def manual_seed_all(seed: int) -> None:
            for each in self.default_generators:
                each.manual_seed(int(seed))

        def get_rng_state(device: Device = "sim") -> torch.Tensor:
            return generator(device).get_state()

        def set_rng_state(new_state: torch.Tensor, device: Device = "sim") -> None:
            generator(device).set_state(new_state.cpu())

        def get_rng_state_all() -> list[torch.Tensor]:
            return [each.get_state() for each in self.default_generators]

        def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
            for index, state in enumerate(new_states):
                set_rng_state(state, index)

        def get_device_name(device: Device = None) -> str:
            index_of(device)
            return "Simulated device"  # As of real devices: those of one kind have one name.

        def get_device_properties(device: Device = None) -> types.SimpleNamespace:
            total = accelerator.get_memory_info(index_of(device))[1]
            return types.SimpleNamespace(name=get_device_name(device), total_memory=total)

        self.default_generators = tuple(extension.default_generator(index) for index in range(2))
        self.device, self.device_of, self.stream = device, device_of, stream
        self.Stream, self.Event, self.Generator = torch.Stream, torch.Event, torch.Generator
        self.is_available = extension.available
        self.is_initialized = lambda: True
        self.init = self._lazy_init = lambda: None
        self._is_in_bad_fork = lambda: False
        self.device_count = extension.device_count
        self.current_device = extension.current_device
        self.set_device = lambda device: extension.set_device(index_of(device))
        self.synchronize = lambda device=None: accelerator.synchronize(index_of(device))
        self.current_stream = lambda device=None: accelerator.current_stream(index_of(device))
        self.default_stream = lambda device=None: torch.Stream(
            stream_id=0, device_index=index_of(device), device_type=_device_type()
        )
        self.set_stream = accelerator.set_stream
        self.get_device_name, self.get_device_properties = get_device_name, get_device_properties
        self.initial_seed = lambda: generator(None).initial_seed()
        self.seed = lambda: generator(None).seed()
        self.seed_all = seed_all
        self.manual_seed, self.manual_seed_all = manual_seed, manual_seed_all
        self.get_rng_state, self.set_rng_state = get_rng_state, set_rng_state
        self.get_rng_state_all, self.set_rng_state_all = get_rng_state_all, set_rng_state_all
        self.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        self.is_bf16_supported = lambda including_emulation=True: True
        self.empty_cache = accelerator.empty_cache
        self.mem_get_info = lambda device=None: accelerator.get_memory_info(index_of(device))
        for name in (
            "memory_stats",
            "memory_allocated",
            "max_memory_allocated",
            "memory_reserved",
            "max_memory_reserved",
            "reset_peak_memory_stats",
            "reset_accumulated_memory_stats",
        ):
            setattr(self, name, _of_device(getattr(accelerator, name), index_of))


def _of_device(function: Any, index_of: Any) -> Any:
    return lambda device=None: function(index_of(device))


def _device_type() -> int:
    return torch.Stream("sim").device_type
