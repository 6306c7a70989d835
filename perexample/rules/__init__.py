"""The rules that come with the library; importing this package registers them."""

from . import conv, embedding, generic, linear, norm, prelu, sequence
from .generic import GenericRule

__all__ = ["GenericRule", "conv", "embedding", "generic", "linear", "norm", "prelu", "sequence"]
