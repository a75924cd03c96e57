"""4-bit and 8-bit linear layers for nucleate. Importing this package does not import bitsandbytes."""

from nucleate_bitsandbytes.precision import BitsandbytesPrecision

__all__ = ["BitsandbytesPrecision"]
