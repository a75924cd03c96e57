"""The checkpoints of a runtime: the methods that save and load, and the layout of what they save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from nucleate.deferred import ElementSource, is_recording, resumed
from nucleate.errors import UsageError
from nucleate.layout import Layout
from nucleate.materialize.inference_tensors import replace_inference_tensors
from nucleate.materialize.vacancies import adopt_vacancies
from nucleate.precision.base import Precision
from nucleate.report.meter import metered
from nucleate.runtime.parts import Parts
from nucleate.shells import inside, without_shells
from nucleate.wrappers.known_models import layouts_in
from nucleate.wrappers.module import ModuleWrapper
from nucleate.wrappers.termination import repeatable

if TYPE_CHECKING:
    from nucleate.checkpoint import KeyMap, LoadReport
    from nucleate.checkpoint.saving import SaveHandle


class Checkpoints(Parts):
    """The methods of a `Runtime` that save and load."""

    @repeatable
    def save(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | nn.Module,
        filter: Mapping[str, Callable[[str, Any], bool]] | Callable[[str, Any], bool] | None = None,
        *,
        format: str | None = None,
        max_shard_size: int | str = "5GB",
        asynchronous: bool = False,
        keep_last: int | str | None = None,
        keys: KeyMap | None = None,
    ) -> SaveHandle | None:
        """Write a training state, or one model, to a folder or a file. Every rank calls this method.

        The checkpoint is whole or absent, at whatever moment a process is killed. See `nucleate.checkpoint.save`.

        Args:
            path: The endings `.safetensors`, `.pt`, `.pth`, `.bin` and `.ckpt` stand for one file, any other name for a
                folder.
            state: Modules, optimizers, objects with a `state_dict`, tensors and plain values by name; or one module.
            format: The format of a folder: `"dcp"` (the default), `"safetensors"`, which Hugging Face's libraries read,
                or the name of an installed writer.
            filter: For a name in `state`, a function of key and value that returns whether to save them.
            max_shard_size: The largest size of the files of a safetensors folder.
            asynchronous: Return as soon as the state is copied to CPU memory, and write in the background.
            keep_last: How many checkpoints stay in the same folder. The file `latest` leads to the newest.
            keys: Other names in the checkpoint, and rules, if the state is one module; see `load_raw`.

        Returns:
            A handle to wait for with `asynchronous`, else None.
        """
        from nucleate.checkpoint import save

        self.launch()
        for live in layouts_in(state, self._models):
            live.refuse_emptied("save")
        with self._communicator.meeting("save"), metered(self.is_global_zero):
            return save(
                path,
                state,
                self._communicator,
                format=format,
                filter=filter,
                max_shard_size=max_shard_size,
                asynchronous=asynchronous,
                keep_last=keep_last,
                keys=keys,
                writers=self._plugins.writers,
                one_file=self._strategy.saves_one_file,
            )

    def load(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | nn.Module | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        remainder: bool | None = None,
        reader: str | None = None,
    ) -> LoadReport:
        """Read a checkpoint into `state`, in place. See `nucleate.checkpoint.load`.

        Args:
            path: The path that was given to `save`.
            state: The state to load into, as it was given to `save`, or a part of that state.
            strict: Refuse keys that are missing, unexpected or of another shape or dtype, in the entries of `state`.
            weights_only: None and True read files as data, and never run code that a file names. False also restores
                the other objects of a torch file, such as an `argparse.Namespace`, as `torch.load` does. This runs code
                that the file chooses, so pass it only for files that you trust.
            remainder: Also return everything that `state` does not contain, whole on every rank. None means True only
                without a `state`, so that a rank that loads a model does not also hold a whole optimizer state.
            reader: The format's name, if the files do not show it.

        Returns:
            The report: the loaded keys, the missing keys and so on. As a dict, it holds the remainder.
        """
        from nucleate.checkpoint import load

        self.launch()
        wanted = state is None if remainder is None else remainder
        with self._communicator.meeting("load"), metered(self.is_global_zero):
            return load(
                path,
                state,
                self._communicator,
                strict=strict,
                remainder=wanted,
                reader=reader,
                readers=self._plugins.readers,
                trusted=weights_only is False,
                prepare=self._prepare_to_load,
            )

    def load_raw(
        self,
        path: str | PathLike[str],
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        prefix: str = "",
        keys: KeyMap | None = None,
        reader: str | None = None,
        mmap: bool = False,
    ) -> LoadReport:
        """Load a model's weights, or an optimizer's state, from any format. See `nucleate.checkpoint.load_raw`.

        A deferred model is bound to the files, and `setup` reads only this rank's shard of each tensor. Any other model
        is filled in place.

        Args:
            path: A safetensors or torch file, a Hugging Face folder, a folder of torch.distributed.checkpoint, or a
                checkpoint that `save` wrote.
            obj: The model, deferred, real or set up. Or an optimizer, for a file that holds its `state_dict()`.
            strict: Refuse keys that are missing, unexpected or of another shape or dtype. Otherwise deferred tensors
                that are missing are made by their recipes.
            weights_only: See `load`.
            prefix: Load only the keys that begin with this text, and remove it from the keys.
            keys: Other names for keys: a dict of regular expressions and replacements, a function, a rule that renames,
                joins, splits or transposes tensors (`nucleate.checkpoint.rename`, ...), or a list of these.
            reader: The format's name, if the files do not show it.
            mmap: Map deferred tensors on the CPU to the file's own pages, if possible.

        Returns:
            The report: the loaded, missing, unexpected, mismatched, cast and tied keys.
        """
        from nucleate.checkpoint import load_raw

        self.launch()
        with self._communicator.meeting("load_raw"), metered(self.is_global_zero):
            return load_raw(
                path,
                obj,
                self._communicator,
                strict,
                prefix=prefix,
                keys=keys,
                reader=reader,
                readers=self._plugins.readers,
                mmap=mmap,
                trusted=weights_only is False,
                prepare=self._prepare_to_load,
            )

    def layout(self, model: nn.Module) -> Layout:
        """Return the layout of a model that was set up: the dtype, shape and placements of each tensor.

        `print(runtime.layout(model))` shows it as a table.

        Args:
            model: The model that `setup` returned, or the user's model itself.

        Raises:
            UsageError: The model was not set up by this runtime, or parameters came into it since then.
        """
        for live in layouts_in(model, self._models):
            return live.layout
        raise UsageError(f"this {type(model).__name__} has no layout: it was not set up. Call `setup` first.")

    def _prepare_to_load(self, model: nn.Module, stored: Mapping[str, ElementSource]) -> None:
        """Let the precision change a model that is not set up to the form of its stored tensors."""
        if isinstance(inside(model, ModuleWrapper), ModuleWrapper) or inside(model) in self._models:
            return
        with without_shells(model) as plain:
            if not is_recording():
                # Tensors that were built on the meta device by hand are bound to files like deferred tensors.
                replace_inference_tensors(plain)
                adopt_vacancies(plain, self._device)
            if type(self._precision).before_load is Precision.before_load:
                return
            with resumed(plain):
                self._precision.before_load(plain, stored)
