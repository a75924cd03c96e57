"""Models of Hugging Face transformers under every strategy of nucleate, as they are.

Installed, it needs no call: `from_config` and `from_pretrained` inside `runtime.init_module()` do the right thing once
`transformers` has been imported. `save_pretrained` writes a model that is set up as a folder for `from_pretrained`.
"""

from nucleate_transformers.folder import save_pretrained
from nucleate_transformers.integration import TransformersIntegration

__all__ = ["TransformersIntegration", "save_pretrained"]
