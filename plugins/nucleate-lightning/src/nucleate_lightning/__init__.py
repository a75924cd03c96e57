"""Models of nucleate's deferred initialization under the Trainer of PyTorch Lightning.

`Materialize` is a callback: it gives a deferred model its values before the Trainer's strategy takes the model.
`sharding` is a context for `configure_model`: each rank then makes only its shards.
"""

from nucleate_lightning.callback import Materialize
from nucleate_lightning.sharding import sharding

__all__ = ["Materialize", "sharding"]
