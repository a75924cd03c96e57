"""The plan of a load, made before anything changes: the tensors to fill, and everything that does not fit.

This file decides which tensors fit: shapes must be equal, and floating point dtypes may differ (the value is cast). The
loader decides what each kind of entry needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.loading.report import Finding, LoadReport, keys
from nucleate.checkpoint.loading.shared_memory import SharedMemory
from nucleate.checkpoint.state.plain_forms import from_plain
from nucleate.checkpoint.state.tree import KeyPath, join, key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.checkpoint.stored.mapped import Mapper
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import ElementSource, bind_all, handle_of, record_of
from nucleate.deferred.guards import refuse_stale
from nucleate.errors import CheckpointError, CheckpointKeyError, ConversionError, ShapeMismatchError, name_list
from nucleate.layout import boxes_of, is_sharded
from nucleate.materialize.reading import read_into


class _Named(ElementSource):
    """An element source that a module made from its stored tensors. Its conversion errors name the module.

    Args:
        given: The element source.
        name: The module's name.
    """

    def __init__(self, given: ElementSource, name: str) -> None:
        self.dtype, self.shape, self._given, self._name = given.dtype, given.shape, given, name

    def read(self, start: int, out: Tensor) -> None:
        try:
            self._given.read(start, out)
        except ConversionError as error:
            raise ConversionError(f"{self._name}: {error}") from error

    def order(self, start: int) -> tuple[int, int]:
        return self._given.order(start)

    def check_unchanged(self) -> None:
        self._given.check_unchanged()

    def describe(self) -> str:
        return self._given.describe()


class LoadPlan:
    """The plan of one load. `execute` makes the first change.

    Args:
        contents: The contents of the checkpoint.
        maps: Map deferred tensors to the file's own pages, if the file holds them in their final form.

    Attributes:
        contents: The contents of the checkpoint.
        tensors: The checkpoint's tensors by key, and the tensors that modules compute from them.
        report: The report of the load, filled while the plan is made.
        finish: Functions to call when the tensors are filled, each after its name for messages.
        leftover: The places of the items that `report.unexpected` names.
        unfit: Items that are of another kind in the checkpoint than here, as sentences. They are always refused.
    """

    def __init__(self, contents: Contents, maps: bool = False) -> None:
        self.contents = contents
        self.tensors: dict[str, StoredTensor] = dict(contents.tensors)
        self.report = LoadReport(contents.path, contents.format)
        self._note_passed_over()
        self.finish: list[tuple[str, Callable[[], object]]] = []
        self.leftover: list[KeyPath] = []
        self.unfit: list[str] = []
        self._wrong_shapes = False
        self._memory = self._shared_memory()
        self._mapper = Mapper() if maps else None
        self._binds = False
        self._deferred: list[tuple[Tensor, ElementSource]] = []
        self._real: list[tuple[Tensor, ElementSource]] = []

    def take(self, contents: Contents) -> None:
        """Take other contents of the same files, such as those with tensors that rules make."""
        self.contents = contents
        self.tensors = dict(contents.tensors)
        self._memory = self._shared_memory()
        self._note_passed_over()

    def _note_passed_over(self) -> None:
        objects = self.contents.objects
        self.report.passed_over = [Finding(key_of(place), 0, one.name) for place, one in objects.items()]

    def _shared_memory(self) -> SharedMemory:
        # Several names may stand for the same bytes, thousands in a file made for that.
        return SharedMemory(self.contents.tensors.values() if self.contents.format == "torch" else ())

    @contextmanager
    def closed_after_error(self) -> Iterator[None]:
        """Close the files if an error ends the context, unless deferred tensors are bound to them."""
        files = {file for stored in self.tensors.values() for file in stored.files if isinstance(file, DataFile)}
        try:
            yield
        except BaseException:
            # The error keeps frames alive, and they keep the files.
            if not self._binds:
                for file in files:
                    file.close()
            raise

    def fill(self, name: str, stored: StoredTensor, target: Tensor) -> None:
        """Read a tensor into `target`, or note that it does not fit.

        Args:
            name: The target's name for messages.
            stored: The stored tensor to read.
            target: A tensor with memory, which is written in place, or a deferred tensor.
        """
        if stored.shape != tuple(target.shape):
            self._wrong_shapes = True
            detail = f"{tuple(target.shape)} here but {stored.shape} in the checkpoint"
        elif stored.dtype != target.dtype and not (stored.dtype.is_floating_point and target.dtype.is_floating_point):
            detail = f"{target.dtype} here but {stored.dtype} in the checkpoint"
        else:
            if stored.dtype != target.dtype:
                self.report.cast.append(Finding(name, stored.size_bytes, f"{stored.dtype} -> {target.dtype}"))
            self.report.loaded.append(Finding(name, stored.size_bytes))
            self._read(stored, target)
            return
        self.report.mismatched.append(Finding(name, stored.size_bytes, detail))

    def add(self, name: str, given: ElementSource, target: Tensor, module: str) -> None:
        """Fill `target` from an element source that a module made from its stored tensors; see `StoredForm`.

        Args:
            name: The target's name for messages.
            given: The element source, with the target's shape.
            target: A tensor with memory, or a deferred tensor.
            module: The module's name for messages.
        """
        self.report.loaded.append(Finding(name, math.prod(given.shape) * given.dtype.itemsize))
        self._read(_Named(given, module), target)

    def whole(self, name: str, stored: StoredTensor, like: Tensor | None) -> Tensor | None:
        """Return a new tensor on the CPU that is filled when the plan is executed, or note that it does not fit.

        Args:
            name: The tensor's name for messages.
            stored: The stored tensor to read.
            like: The tensor that the new one replaces. The shapes must be equal. None accepts any shape.
        """
        if like is not None and stored.shape != tuple(like.shape):
            self._wrong_shapes = True
            detail = f"{tuple(like.shape)} here but {stored.shape} in the checkpoint"
            self.report.mismatched.append(Finding(name, stored.size_bytes, detail))
            return None
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        self.report.loaded.append(Finding(name, stored.size_bytes))
        self._read(stored, tensor)
        return tensor

    def miss(self, name: str, tensor: Tensor | None = None) -> None:
        """Note that the checkpoint does not hold `name`."""
        size_bytes = 0 if tensor is None else tensor.numel() * tensor.element_size()
        self.report.missing.append(Finding(name, size_bytes))

    def tie(self, name: str, first: str, stored: StoredTensor) -> None:
        """Note that a name is tied to the tensor that is loaded under the name `first`."""
        self.report.tied.append(Finding(name, stored.size_bytes, f"= {first}"))

    def tree(self, path: KeyPath, target: Callable[[KeyPath, torch.Size, torch.dtype], Tensor] | None = None) -> Any:
        """Return the entry that was saved at `path`. Executing the plan fills its tensors.

        Args:
            path: A place that the checkpoint holds.
            target: Returns a tensor to fill for a place, a shape and a dtype. None makes new tensors on the CPU.
        """

        def tensor_at(place: KeyPath) -> Tensor | None:
            key = self.contents.keys.get(place)
            if key is None:
                return None
            stored = self.contents.tensors[key]
            if target is None:
                return self._memory.tensor(stored, self._read)
            tensor = target(place, torch.Size(stored.shape), stored.dtype)
            self._read(stored, tensor)
            return tensor

        return from_plain(join(self.contents.at(path), path, tensor_at))

    def check(self, strict: bool) -> None:
        """Raise an error if the checkpoint does not fit the state.

        Args:
            strict: Refuse keys that are missing, unexpected or of another shape or dtype.

        Raises:
            CheckpointKeyError: Keys are missing or unexpected.
            ShapeMismatchError: Tensors have other shapes.
            CheckpointError: Something else does not fit, or a file was cut short after its header was read.
        """
        report = self.report
        wrong = [f"{one.key} is {one.detail}" for one in report.mismatched]
        problems = {
            "missing in the checkpoint": keys(report.missing) if strict else [],
            "unexpected in the checkpoint": keys(report.unexpected) if strict else [],
            "of another shape or dtype": wrong if strict else [],
            "of another kind": self.unfit,
        }
        lines = [f"  {len(found)} {what}: {name_list(found)}" for what, found in problems.items() if found]
        if not lines:
            self._check_files()
            self._check_deferred()
            return
        advice = "Nothing was changed."
        if not self.unfit:
            advice += " Pass strict=False to load only the tensors that are in both and fit."
        if not self.contents.is_complete and report.missing and not report.loaded:
            advice += " `save` did not write this checkpoint; `load_raw` loads the weights of others into a model."
        message = "\n".join([f"the checkpoint at {self.contents.path} does not fit:", *lines, advice])
        if strict and (report.missing or report.unexpected):
            raise CheckpointKeyError(message)
        if strict and self._wrong_shapes:
            raise ShapeMismatchError(message)
        raise CheckpointError(message)

    def _check_deferred(self) -> None:
        """Raise an error if a deferred tensor has an edit that was not recorded, before any tensor changes."""
        for tensor, _ in self._deferred:
            handle = handle_of(tensor)
            if handle is not None:
                refuse_stale(tensor, handle)

    def _check_files(self) -> None:
        """Raise an error if a file was cut short, or a chunk to read is damaged, before any tensor changes."""
        stored = [(target, given) for target, given in self._real if isinstance(given, StoredTensor)]
        for file in {id(file): file for _, given in stored for file in given.files}.values():
            if isinstance(file, DataFile):
                file.check_length()
        for target, given in stored:
            if is_sharded(target):
                for box in boxes_of(target):
                    given.locate(box.begin, box.size)
            else:
                given.locate()

    def execute(self) -> None:
        """Bind deferred tensors to the files, and read the values of all other tensors.

        Raises:
            CheckpointError: A file has changed after its headers were read, or the disk fails.
        """
        read_into(self._real)
        for tensor, _ in self._real:
            if not tensor.is_inference():
                # Reading bypassed autograd. Autograd must see the write, because old values that it saved are stale.
                torch.autograd.graph.increment_version(tensor)
        self._binds = bool(self._deferred)
        bind_all(self._deferred)

    def _read(self, given: ElementSource, target: Tensor) -> None:
        if record_of(target) is None:
            self._real.append((target, given))
            return
        maps = self._mapper is not None and isinstance(given, StoredTensor)
        self._deferred.append((target, self._mapper.given(given) if maps else given))  # type: ignore[union-attr, arg-type]

    @property
    def summary(self) -> str:
        """The tensors that were not loaded, as a sentence; empty if all were loaded."""
        report = self.report
        parts = [
            f"{what}: {name_list(map(str, found))}"
            for what, found in (("not in it", report.missing), ("not fitting", report.mismatched))
            if found
        ]
        return f"{'; '.join(parts)}; these are left as they were, or made by their recipes." if parts else ""
