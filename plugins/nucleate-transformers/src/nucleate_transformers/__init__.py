"""Support for unchanged models of Hugging Face transformers, under every strategy of nucleate.

The plugin works without any call once it is installed and `transformers` has been imported: `from_config` and
`from_pretrained` inside `runtime.init_module()` then make deferred models. `save_pretrained` writes a model that is set
up as a folder for `from_pretrained`.
"""

from nucleate_transformers.folder import save_pretrained
from nucleate_transformers.integration import TransformersIntegration
from nucleate_transformers.tensor_plan import declare_plans

__all__ = ["TransformersIntegration", "declare_plans", "save_pretrained"]
