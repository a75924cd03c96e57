"""Folders that torch.distributed.checkpoint wrote. `nucleate.registry` names the reader."""

__all__: list[str] = []
