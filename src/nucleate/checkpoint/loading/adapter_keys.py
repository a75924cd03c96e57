"""Keys of LoRA adapters: a file with an adapter holds no weights of the model itself."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from nucleate.errors import CheckpointKeyError, name_list

# PEFT writes `lora_A` and `lora_B`, older diffusers `lora.down` and `lora.up`, kohya `lora_down` and `lora_up`.
_OF_AN_ADAPTER = re.compile(r"(?:^|[._])lora[._](?:A|B|up|down|embedding_A|embedding_B|magnitude_vector)(?:\.|$)")


def refuse_adapter(path: Path, stored: Collection[str], wanted: Collection[str]) -> None:
    """Make sure that a checkpoint for a model without adapters does not consist of an adapter.

    Args:
        path: The checkpoint.
        stored: The names of its tensors.
        wanted: The names of the model's tensors.

    Raises:
        CheckpointKeyError: None of the names is in the model, and most are those of an adapter.
    """
    if not stored or any(name in wanted for name in stored):
        return
    found = [name for name in stored if _OF_AN_ADAPTER.search(name)]
    if 2 * len(found) <= len(stored):
        return
    raise CheckpointKeyError(
        f"{path} holds a LoRA adapter ({name_list(found, 2)}), not the weights of a model. Load the base model's "
        "weights, and add the adapter with PEFT: `PeftModel.from_pretrained(model, folder)`. Or merge them with "
        "`merge_and_unload()` and save the result. A model that has the adapter already takes it by "
        "`model.load_adapter(folder, name)`."
    )
