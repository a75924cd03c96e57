"""Stand-ins for the compiled parts of torchvision and torchaudio, where these were made for another build of torch.

PyPI has both for the CUDA build of torch only. Beside the CPU build their compiled operations do not load, and then
their imports fail. torchvision describes two of its operations to torch by name; declaring these two names is enough.
torchaudio loads its operations in the module `torchaudio._extension`, which also says whether there are any; one that
says no is enough. Constructors of models call none of these operations.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

_library: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Declare torchvision's operations where its compiled part cannot be loaded."""
    if _library or importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operation in ("nms", "qnms"):
            library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.append(library)
        import torchvision  # noqa: F401


def make_torchaudio_importable() -> None:
    """Import torchaudio without its compiled part, where this cannot be loaded."""
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is None:
        return
    try:
        import torchaudio
    except OSError as error:
        if "_torchaudio" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        # What torchaudio 2.11 imports of it.
        extension = types.ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
        extension.fail_if_no_align = _refused  # type: ignore[attr-defined]
        sys.modules[extension.__name__] = extension
        import torchaudio  # noqa: F401


def _refused(function: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"{function.__name__} needs the compiled part of torchaudio, which does not load")

    return refuse
