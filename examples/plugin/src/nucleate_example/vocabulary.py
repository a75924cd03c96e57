"""Vocabulary parallel: each rank keeps the rows of some words of the embedding and of the head.

The two tables are often the largest weights of a model: 128,256 words of 4,096 numbers are 2.1 GB in float32, each. The
blocks stay whole, so this dimension needs no plan for them. It works beside `FullyShard` and `Replicate`, which take
what it has left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import nn

from nucleate.dimensions import Dimension, Placements, share_random_stream
from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh, Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@final
class VocabularyParallel(Dimension):
    """Splits an embedding and a head over the axis `vocab`, by rows. They may be tied.

    An embedding looks up the words that a rank has, and the ranks add their results up. The ranks gather the logits of
    the head, so the loss is computed as usual.

    Args:
        embedding: The FQN of the embedding.
        head: The FQN of the linear layer that makes logits; None for a model without one.
    """

    name = "vocabulary_parallel"
    axes = ("vocab",)
    # These dimensions wrap around this one. They do not know it, so it says so itself.
    before = ("activation_checkpointing", "compile", "replicate", "fully_shard")
    # Both would split the same tables.
    excludes = ("tensor_parallel",)
    lays_out = True

    def __init__(self, *, embedding: str = "embedding", head: str | None = "head") -> None:
        self.embedding = embedding
        self.head = head

    def check_model(self, model: nn.Module, mesh: Mesh) -> None:
        """Refuse a model without these modules, or whose number of words the ranks do not divide.

        Raises:
            ConfigurationError: The message gives the FQNs.
        """
        modules = dict(model.named_modules())
        for fqn, kind in self._kinds().items():
            if not isinstance(modules.get(fqn), kind):
                like = [name for name, module in modules.items() if isinstance(module, kind)]
                raise ConfigurationError(
                    f"VocabularyParallel splits {fqn!r}, and {type(model).__name__} has no {kind.__name__} of that "
                    f"name. It has {', '.join(like) or 'none'}. Name the module: VocabularyParallel(embedding=..., "
                    "head=...)."
                )
            rows, size = modules[fqn].get_parameter("weight").shape[0], mesh.size_of("vocab")
            if rows % size:
                raise ConfigurationError(
                    f"{fqn} has {rows} words, and vocab={size} does not divide them. Choose another size, or pad the "
                    f"vocabulary to {rows + -rows % size} words."
                )

    def placements(self, model: nn.Module, mesh: Mesh) -> Placements:
        """Return a split of the rows of each table, and of the head's bias."""
        return {
            f"{fqn}.{key}": {"vocab": Shard(0)}
            for fqn in self._kinds()
            for key, _ in model.get_submodule(fqn).named_parameters()
        }

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Let torch split the tables. It makes no values here: `src_data_rank=None` keeps it from exchanging any."""
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        for fqn, kind in self._kinds().items():
            module = model.get_submodule(fqn)
            trains = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
            style = (
                RowwiseParallel(input_layouts=Replicate())
                if kind is nn.Embedding
                else ColwiseParallel(output_layouts=Replicate())
            )
            parallelize_module(module, mesh["vocab"], style, src_data_rank=None)
            # torch makes new parameters, which require gradients.
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(trains[key])

    def enclose(self, model: nn.Module) -> nn.Module:
        """Let the ranks drop the same values: all of them compute the blocks on the same data."""
        share_random_stream(model, self.mesh.group(self.device.type, self.axes), self.device)
        return model

    def _kinds(self) -> dict[str, type[nn.Embedding] | type[nn.Linear]]:
        found: dict[str, type[nn.Embedding] | type[nn.Linear]] = {self.embedding: nn.Embedding}
        if self.head is not None:
            found[self.head] = nn.Linear
        return found

    def __repr__(self) -> str:
        return f"VocabularyParallel(embedding={self.embedding!r}, head={self.head!r})"
