"""The layout of a model: for each tensor its dtype, shape, placements, ties, and whether it trains, as plain data.

All answers are arithmetic. They need neither a process group nor DTensors, and are right for any number of ranks in one
process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from nucleate.errors import UsageError, name_list
from nucleate.layout.boxes import Box
from nucleate.layout.holders import Dealer, holders_of, is_writer, parts_of
from nucleate.layout.mesh import Mesh
from nucleate.layout.placements import Placement, Replicate, Shard, boxes_at, local_shape_at


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The layout of one tensor.

    Attributes:
        dtype: The dtype.
        shape: The shape of the whole tensor.
        mesh: The ranks that hold the tensor.
        placements: The placement on each axis of the mesh.
        trains: Whether the tensor requires gradients.
        converted: Whether a conversion, such as a quantization, made the tensor.
        tied_with: The other FQNs of the same tensor.
        is_buffer: Whether the tensor is a buffer.
        is_plain: Whether each rank holds a plain tensor. Copies of a plain tensor may differ between ranks, as the
            statistics of a batch norm do.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    mesh: Mesh
    placements: tuple[Placement, ...]
    trains: bool = False
    converted: bool = False
    tied_with: tuple[str, ...] = ()
    is_buffer: bool = False
    is_plain: bool = True

    @property
    def size_bytes(self) -> int:
        """The size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def boxes(self, rank: int) -> tuple[Box, ...]:
        """Return the boxes that a rank holds, without empty ones."""
        coordinate = self.mesh.coordinate(rank)
        if coordinate is None:
            return ()
        found = boxes_at(self.shape, self.mesh.sizes, self.placements, coordinate)
        return tuple(box for box in found if box.numel)

    def local_shape(self, rank: int) -> tuple[int, ...] | None:
        """Return the shape of the tensor that a rank holds, or None if the rank is not in the mesh."""
        coordinate = self.mesh.coordinate(rank)
        if coordinate is None:
            return None
        return local_shape_at(self.shape, self.mesh.sizes, self.placements, coordinate)

    def local_bytes(self, rank: int) -> int:
        """Return the bytes that a rank holds."""
        shape = self.local_shape(rank)
        return 0 if shape is None else math.prod(shape) * self.dtype.itemsize

    def where(self) -> str:
        """Return a description of the placements, such as `"dp_shard: shard dim 0"`."""
        named = zip(self.mesh.axes, self.mesh.sizes, self.placements, strict=True)
        found = [f"{axis}: {placement}" for axis, size, placement in named if size > 1 and placement != Replicate()]
        return ", ".join(found) or "whole"

    def coordinate_of(self, box: Box) -> tuple[int, ...]:
        """Return the first place in the mesh whose rank holds a box.

        Raises:
            UsageError: No rank holds the box.
        """
        for coordinate in parts_of(self.mesh, self.placements):
            found = boxes_at(self.shape, self.mesh.sizes, self.placements, coordinate)
            if any((box.begin, box.size) == (other.begin, other.size) for other in found):
                return coordinate
        raise UsageError(f"no rank holds the box that begins at {box.begin} and has the size {box.size}.")


@dataclass(frozen=True)
class Layout:
    """The layout of a model: `runtime.layout(model)`. `print` shows it as a table.

    Attributes:
        tensors: The parameters and buffers by FQN, in the order of the model; a tied tensor stands under each name.
        world_size: The number of ranks.
    """

    tensors: Mapping[str, TensorLayout]
    world_size: int
    _writers: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    def __getitem__(self, fqn: str) -> TensorLayout:
        if fqn not in self.tensors:
            raise UsageError(f"the layout has no tensor {fqn!r}. It has {name_list(self.tensors)}.")
        return self.tensors[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def trained(self) -> tuple[str, ...]:
        """The FQNs of the tensors that require gradients."""
        return tuple(fqn for fqn, tensor in self.tensors.items() if tensor.trains)

    def boxes(self, fqn: str, rank: int) -> tuple[Box, ...]:
        """Return the boxes of a tensor that a rank holds; several for the parts of a fused weight.

        Raises:
            UsageError: The layout has no such name.
        """
        return self[fqn].boxes(rank)

    def holders(self, fqn: str, box: Box) -> tuple[int, ...]:
        """Return the ranks that hold a box, in ascending order.

        Args:
            fqn: The tensor.
            box: A box that `boxes` returned.

        Raises:
            UsageError: The layout has no such name, or no rank holds the box.
        """
        tensor = self[fqn]
        return holders_of(tensor.mesh, tensor.placements, tensor.coordinate_of(box))

    def writer(self, fqn: str, box: Box) -> int:
        """Return the rank that writes a box when the model is saved.

        The copies of a shard are dealt out evenly. The lowest holder writes a plain tensor, because copies of plain
        tensors may differ.

        Raises:
            UsageError: The layout has no such name, or no rank holds the box.
        """
        tensor = self[fqn]
        coordinate = tensor.coordinate_of(box)
        if tensor.is_plain:
            return holders_of(tensor.mesh, tensor.placements, coordinate)[0]
        if not self._writers:
            self._deal()
        chosen = self._writers[fqn]
        place = [
            mine if isinstance(placement, Shard) else other
            for placement, mine, other in zip(tensor.placements, coordinate, chosen, strict=True)
        ]
        assert is_writer(tensor.placements, chosen, place)
        return tensor.mesh.rank_at(tuple(place))

    def local_bytes(self, rank: int) -> int:
        """Return the bytes that a rank holds; a tied tensor counts once."""
        return sum(tensor.local_bytes(rank) for tensor in self._distinct().values())

    def _distinct(self) -> dict[str, TensorLayout]:
        """Return the tensors by their first names."""
        seen: set[str] = set()
        found = {}
        for fqn, tensor in self.tensors.items():
            if fqn not in seen:
                found[fqn] = tensor
            seen.update(tensor.tied_with)
        return found

    def _deal(self) -> None:
        dealer = Dealer()
        for fqn, tensor in self._distinct().items():
            if not tensor.is_plain:
                chosen = dealer.deal(tensor.mesh, tensor.placements, tensor.size_bytes)
                self._writers.update(dict.fromkeys((fqn, *tensor.tied_with), chosen))

    def __str__(self) -> str:
        distinct = self._distinct()
        rows = [("name", "dtype", "shape", "placements", "trains", "bytes on rank 0")]
        for fqn, tensor in distinct.items():
            names = " = ".join((fqn, *tensor.tied_with))
            dtype = str(tensor.dtype).removeprefix("torch.") + (" (converted)" if tensor.converted else "")
            kind = "buffer" if tensor.is_buffer else "yes" if tensor.trains else "no"
            rows.append((names, dtype, str(list(tensor.shape)), tensor.where(), kind, f"{tensor.local_bytes(0):,d}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = sum(tensor.size_bytes for tensor in distinct.values())
        meshes = name_list(dict.fromkeys(str(tensor.mesh) for tensor in distinct.values()))
        head = f"{len(distinct)} tensors on {meshes or 'one rank'}: {total / 2**20:.1f} MiB in all, "
        return "\n".join([f"{head}{self.local_bytes(0) / 2**20:.1f} MiB on rank 0", *lines])
