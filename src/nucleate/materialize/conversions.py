"""The conversions of a plan: every recorded conversion runs once, for all wanted parts of its outputs.

Where ranges of the source can be made, several threads make, convert and forget the ranges that this rank needs. Else
the source is made whole first. The wanted part of an output is the whole output, or a rank's shard, which is written
directly into its final place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nucleate.deferred import Conversion, Layout, RangeMaker, Record, StreamCursors
from nucleate.deferred.randomness import is_contiguous
from nucleate.deferred.replay import backward_slice, view
from nucleate.deferred.tape import Step, TensorRef
from nucleate.devices import Staging, casts_there
from nucleate.devices.staging import fits
from nucleate.errors import ConversionError
from nucleate.layout import flat_start, local_of
from nucleate.materialize.device_parts import parts_on
from nucleate.materialize.making import make_parts
from nucleate.materialize.parts import Part, Range
from nucleate.materialize.plan import Group
from nucleate.materialize.recipe import is_moved_to, maker_on_host, moved_to


@dataclass(slots=True)
class Wanted:
    """A range of an output, and the memory that receives it.

    Attributes:
        number: The number of the output.
        first: The first element.
        out: The memory that receives the range, one-dimensional.
    """

    number: int
    first: int
    out: Tensor


@dataclass(slots=True)
class Job:
    """One recorded conversion.

    Attributes:
        record: The recording.
        step: The step of the conversion on the recording's tape.
        fqn: The name of the converted tensor in messages.
        device: The device that converts.
        groups: The outputs that the model holds, by number.
        wanted: The ranges of outputs to make.
        whole: The storages of outputs that are made whole, by number.
    """

    record: Record
    step: Step
    fqn: str
    device: torch.device
    groups: dict[int, Group] = field(default_factory=dict)
    wanted: list[Wanted] = field(default_factory=list)
    whole: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        """Compute the layout of the conversion."""
        self.layout = self.conversion.layout(self.source.size, self.source.dtype)

    @property
    def source(self) -> TensorRef:
        """The tensor that is converted."""
        return self.step.args[0]  # type: ignore[no-any-return]

    @property
    def conversion(self) -> Conversion:
        """The conversion that the step records."""
        return self.step.args[1]  # type: ignore[no-any-return]

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of a staging buffer for a block that is sent in a dtype and may be cast on the device."""
        source = self.source.dtype
        return self.layout.block_numel * (dtype.itemsize + (0 if dtype == source else source.itemsize))

    def want_whole(self, number: int) -> None:
        """Add a whole output to the wanted ranges, and allocate its storage."""
        if number not in self.whole:
            output = self.layout.outputs[number]
            self.whole[number] = torch.UntypedStorage(output.numel * output.dtype.itemsize, device=self.device)
            self.wanted.append(Wanted(number, 0, self.flat(number)))

    def flat(self, number: int) -> Tensor:
        """Return the one-dimensional memory of an output that is made whole."""
        output, storage = self.layout.outputs[number], self.whole[number]
        return torch.empty(0, dtype=output.dtype, device=storage.device).set_(storage, 0, (output.numel,), (1,))

    def want_shards(self, number: int) -> bool:
        """Add this rank's shards of an output to the wanted ranges, directly in their places, if that is possible.

        Returns:
            Whether it is possible and all tensors of the output are sharded.
        """
        found: list[Wanted] = []
        for target in self.groups[number].targets:
            shards = target.shards()
            for shard in shards:
                local, ref = local_of(shard), target.ref
                start = flat_start(shard)
                plain = local.is_contiguous() and local.dtype == ref.dtype == self.layout.outputs[number].dtype
                if start is None or not plain or not is_contiguous(ref) or local.device != self.device:
                    return False
                found.append(Wanted(number, ref.offset + start, local.view(-1)))
            if not shards:
                return False
        self.wanted.extend(found)
        return True

    def blocks(self) -> list[tuple[int, int]]:
        """Return the ranges of blocks that the wanted ranges come from, without overlaps."""
        ranges = []
        for wanted in self.wanted:
            per_block = self.layout.outputs[wanted.number].per_block
            if wanted.out.numel():
                ranges.append((wanted.first // per_block, -(-(wanted.first + wanted.out.numel()) // per_block)))
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
            else:
                merged.append((first, last))
        return merged

    def places(self, first: int, last: int) -> Iterator[Tensor]:
        """Yield the memory for the wanted ranges of the blocks `[first, last)`."""
        for wanted in self.wanted:
            start, stop = self.layout.outputs[wanted.number].range(first, last)
            yield wanted.out[max(0, start - wanted.first) : max(0, stop - wanted.first)]

    def convert(self, values: Tensor, first: int, last: int) -> None:
        """Convert the blocks `[first, last)` into the wanted ranges.

        Args:
            values: The values of these blocks.
            first: The first block.
            last: The block behind the last one.
        """
        outs: list[Tensor] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for number, output in enumerate(self.layout.outputs):
            start, stop = output.range(first, last)
            out: Tensor | None = None
            for wanted in self.wanted:
                begin, end = max(start, wanted.first), min(stop, wanted.first + wanted.out.numel())
                if wanted.number != number or begin >= end:
                    continue
                place = wanted.out[begin - wanted.first : end - wanted.first]
                if out is None and (begin, end) == (start, stop):
                    out = place
                    continue
                # Blocks that are not wanted whole, or that are wanted twice.
                if out is None:
                    out = torch.empty(stop - start, dtype=output.dtype, device=values.device)
                copies.append((place, out[begin - start : end - start]))
            outs.append(torch.empty(stop - start, dtype=output.dtype, device=values.device) if out is None else out)
        try:
            self.conversion.convert(values, outs)
        except ConversionError as error:
            raise ConversionError(f"{self.fqn}: {error}") from error
        for place, part in copies:
            place.copy_(part)

    def convert_whole(self, values: Tensor) -> None:
        """Convert all wanted ranges from the one-dimensional values of the whole source."""
        for first, last in self.blocks():
            # An accelerator is quicker with a few large calls.
            step = self.layout.chunk_blocks if values.device.type == "cpu" else last - first
            for block in range(first, last, step):
                stop = min(last, block + step)
                part = values[block * self.layout.block_numel : stop * self.layout.block_numel]
                self.convert(part, block, stop)


@dataclass(frozen=True, slots=True)
class Blocks(Part):
    """Blocks of a source tensor that are made, converted and forgotten.

    Attributes:
        job: The conversion.
        first: The first block.
        last: The block behind the last one.
        numel: The number of elements in these blocks.
    """

    job: Job
    first: int
    last: int
    numel: int

    @property
    def device(self) -> torch.device:
        return self.job.device

    @property
    def size_bytes(self) -> int:
        return self.numel * self.maker.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.job.block_bytes(self.maker.dtype)

    @property
    def num_rows(self) -> int:
        return self.last - self.first

    @property
    def row_numel(self) -> int:
        return self.job.layout.block_numel

    @property
    def places(self) -> Iterator[Tensor]:
        return self.job.places(self.first, self.last)

    def cut(self, first: int, last: int) -> Part:
        begin, end = first * self.row_numel, min(self.numel, last * self.row_numel)
        return Blocks(self.maker, self.start + begin, self.job, self.first + first, self.first + last, end - begin)

    def make(self, cursors: StreamCursors) -> None:
        layout = self.job.layout
        buffer = torch.empty(min(self.numel, layout.chunk_blocks * layout.block_numel), dtype=self.maker.dtype)
        for block in range(self.first, self.last, layout.chunk_blocks):
            begin = (block - self.first) * layout.block_numel
            values = buffer[: self.numel - begin]
            self.maker.make(self.start + begin, values, cursors)
            self.job.convert(values, block, min(self.last, block + layout.chunk_blocks))

    def on_host(self, memory: Tensor) -> Part:
        return Range(self.maker, self.start, memory)

    def send(self, staging: Staging, memory: Tensor) -> None:
        # All blocks at once: an accelerator is quicker with a few large calls.
        staging.use(memory, self.job.source.dtype, lambda values: self.job.convert(values, self.first, self.last))


class Conversions:
    """The conversions that make groups of a plan.

    Args:
        groups: The groups.
        device: The device on which values are made.

    Attributes:
        rest: The groups that are not outputs of conversions.
    """

    def __init__(self, groups: Iterable[Group], device: torch.device) -> None:
        self._device = device
        self._jobs: dict[tuple[int, int], Job] = {}
        # For a conversion of another one's output: the other conversion and the number of the output.
        self._before: dict[tuple[int, int], tuple[Job, int]] = {}
        self._done: set[tuple[int, int]] = set()
        self.rest: list[Group] = []
        for group in groups:
            step = group.source.conversion()
            if step is None:
                self.rest.append(group)
                continue
            job = self._job(group.source.record, step, group.targets[0].fqn)
            job.groups[step.creates.index(group.source.storage)] = group
        for job in self._jobs.values():
            for number in job.groups:
                if number not in job.whole and not job.want_shards(number):
                    job.want_whole(number)

    def storages(self) -> Iterator[torch.UntypedStorage]:
        """Yield the memory of outputs that are made whole."""
        for job in self._jobs.values():
            yield from job.whole.values()

    def parts(self) -> Iterator[Part]:
        """Yield the parts that can be made in ranges. `finish` makes the others afterwards."""
        for key, job in self._jobs.items():
            maker = self._pieces(key, job)
            if maker is None:
                continue
            if self._device.type != "cpu":
                bare = maker.uncast()
                maker = bare if casts_there(self._device, bare.dtype, maker.dtype) else maker
                if not fits(job.block_bytes(maker.dtype)):
                    continue
            self._done.add(key)
            for first, last in job.blocks():
                start, stop = (min(job.source.numel, block * job.layout.block_numel) for block in (first, last))
                yield Blocks(maker, job.source.offset + start, job, first, last, stop - start)

    def finish(self) -> Iterator[tuple[Group, torch.UntypedStorage]]:
        """Run the remaining conversions, and yield the groups that are made whole, with their storages."""
        for key in sorted(self._jobs, key=lambda key: key[1]):
            job = self._jobs[key]
            if key not in self._done:
                job.convert_whole(self._values(key, job))
        for job in self._jobs.values():
            yield from ((group, job.whole[number]) for number, group in job.groups.items() if number in job.whole)

    def _job(self, record: Record, step: Step, fqn: str) -> Job:
        key = (id(record.tape), step.index)
        if key not in self._jobs:
            self._jobs[key] = job = Job(record, step, fqn, self._device)
            before = record.converted(job.source.storage)
            if before is not None:
                earlier = self._job(record, before, fqn)
                number = before.creates.index(job.source.storage)
                earlier.want_whole(number)
                self._before[key] = earlier, number
        return self._jobs[key]

    def _pieces(self, key: tuple[int, int], job: Job) -> RangeMaker | None:
        """Return the maker of ranges of the source in its state before the conversion, or None."""
        if key in self._before or not is_contiguous(job.source):
            return None
        maker = maker_on_host(job.record, job.source.storage, job.step.index)
        return maker if maker is not None and maker.dtype == job.source.dtype else None

    def _values(self, key: tuple[int, int], job: Job) -> Tensor:
        if key in self._before:
            earlier, number = self._before[key]
            return view(earlier.whole[number], job.source).reshape(-1)
        maker = self._pieces(key, job) if self._device.type != "cpu" else None
        if maker is not None:
            # A block is larger than a staging buffer.
            values = torch.empty(job.source.numel, dtype=job.source.dtype, device=self._device)
            size = tuple(values.shape)
            make_parts(list(parts_on(maker, job.source.offset, size, (0,), values)), torch.get_num_threads())
            return values
        storages = [job.source.storage]
        steps = backward_slice(job.record.tape, storages, job.step.index)
        moves = is_moved_to(job.record, self._device)
        made = job.record.replayer.contents(steps, storages, job.record.device if moves else self._device)[storages[0]]
        return view(moved_to(self._device, made) if moves else made, job.source).reshape(-1)
