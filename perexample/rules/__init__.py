"""The rules that come with the library; importing this package registers them."""

from . import conv, embedding, function, generic, linear, norm, prelu, recurrent
from .generic import GenericRule

__all__ = ["GenericRule", "conv", "embedding", "function", "generic", "linear", "norm", "prelu", "recurrent"]
