"""What has to be declared so that torchvision imports beside a torch that its compiled part was not made for.

The torchvision of PyPI is made for the CUDA build of torch. Beside the CPU build its compiled operations do not load,
and then its import fails, because it describes two of them to torch by name. Declaring these two names is enough:
constructors of models do not call them.
"""

from __future__ import annotations

import importlib.util
import sys

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
