"""Compilation by blocks, as a dimension: blocks of one kind share their compiled code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from nucleate.dimensions.base import Dimension
from nucleate.dimensions.module_policy import ModulePolicy, check_policy, select
from nucleate.dimensions.parts import has_forward
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh
from nucleate.shells import named_modules

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Compile(Dimension):
    """`torch.compile` of the blocks of a model, or of the whole model, inside the units that exchange tensors.

    The hooks that gather parameters stay outside of compiled code. Names in `state_dict` do not change, because the
    modules themselves are compiled (`nn.Module.compile`).

    Args:
        per_block: Compile each block. Blocks of one kind share their compiled code, so that compilation takes the time
            of one block. False compiles the whole model.
        blocks: The blocks: `"auto"` finds repeated ones; or classes of modules; or a function of a module's name and
            the module.
        options: Further keywords of `torch.compile`, such as `backend` and `mode`.

    Raises:
        ConfigurationError: `blocks` is not valid, or stands beside `per_block=False`.
    """

    name = "compile"
    after = ("activation_checkpointing",)
    # torch 2.13 returns wrong gradients, or fails, where an eager layer with a style meets a compiled block.
    excludes = ("tensor_parallel",)

    def __init__(self, *, per_block: bool = True, blocks: ModulePolicy = "auto", **options: Any) -> None:
        check_policy(blocks, "blocks")
        if not per_block and blocks != "auto":
            raise ConfigurationError(f"per_block=False compiles the whole model, so blocks={blocks!r} has no meaning.")
        self.per_block = per_block
        self.blocks = blocks
        self.options = options

    def check_model(self, model: nn.Module, mesh: Mesh) -> None:
        """Refuse a model in which no block is found.

        Raises:
            ConfigurationError: No module is a block.
        """
        if not self._chosen(model):
            raise ConfigurationError(
                f"Compile(blocks={self.blocks!r}) finds no block in {type(model).__name__}. Name the classes of the "
                "blocks, or give per_block=False."
            )

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Compile the blocks. torch compiles at the first forward."""
        for module in self._chosen(model):
            module.compile(**self.options)

    def _chosen(self, model: nn.Module) -> list[nn.Module]:
        if not self.per_block:
            return [model]
        names = select(model, self.blocks, "blocks")
        found = {id(m): m for name, m in named_modules(model) if name and name in names and has_forward(m)}
        return list(found.values())
