"""FSDP2's units: their choice, the classes, hooks and copies that `fully_shard` needs, and the step of shards."""

__all__: list[str] = []
