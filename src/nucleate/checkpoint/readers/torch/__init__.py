"""Files that `torch.save` wrote, read without running code from them. `nucleate.registry` names the reader."""

from nucleate.checkpoint.readers.torch.torch_archive import prefix_of
from nucleate.checkpoint.readers.torch.zip_directory import ZipDirectory

__all__ = ["ZipDirectory", "prefix_of"]
