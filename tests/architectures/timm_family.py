"""Every architecture file of timm: up to six of its models each, from the smallest to 30 million parameters."""

from __future__ import annotations

import functools

import timm
import torch

from tests.architectures.case import Case, Family, NotBuildable

BUDGET = 30_000_000
MODELS_PER_FILE = 6


class TimmFamily(Family):
    """The models of timm, as `file.0` for the smallest of a file, `file.1` for a larger one."""

    def names(self) -> list[str]:
        return [
            f"{module}.{index}"
            for module in sorted(timm.list_modules())
            for index in range(min(MODELS_PER_FILE, len(timm.list_models(module=module))))
        ]

    def case(self, name: str) -> Case:
        module, _, index = name.rpartition(".")
        models = _models(module)
        if not models:
            raise NotBuildable(f"no model of {module} has less than {BUDGET:,d} parameters")
        wanted = min(MODELS_PER_FILE, len(timm.list_models(module=module)))
        chosen = [models[place * len(models) // wanted] for place in range(wanted)]
        model = chosen[int(index)]
        return Case(lambda: timm.create_model(model), {"model": model})


@functools.cache
def _models(module: str) -> list[str]:
    """Return the models of a file that are small enough, smallest first; if none is, the smallest."""
    sizes = []
    for name in timm.list_models(module=module):
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception as error:
            if "meta" not in str(error).lower():
                continue
            model = timm.create_model(name)
        sizes.append((sum(parameter.numel() for parameter in model.parameters()), name))
    sizes.sort()
    return [name for size, name in sizes if size <= BUDGET] or [name for size, name in sizes[:1] if size < 10 * BUDGET]
