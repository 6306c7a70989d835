"""Ways of a tensor's values to the host that no operation shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._private import dispatch_is_off, whole_arguments
from ._tree import tensors_of
from .errors import ConfigurationError

_HOST_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)  # past all operations
_NUMBERS = (Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__bool__, Tensor.__complex__)
_OF_LISTS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new)


class no_host_reads(TorchFunctionMode):  # noqa: N801 - named as a function is
    """What takes values to the host past all operations is an error."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Let everything else pass; what a tensor is made of is looked at before, so that it is noted."""
        unseen = func in _NUMBERS and dispatch_is_off()  # as by torch.Tensor([t])
        split = func is torch.tensor_split and any(isinstance(a, Tensor) for a in args[1:])
        if func in _HOST_READS or unseen or split:
            raise ConfigurationError(
                f"This step cannot be recorded: the model or its loss looks at values ({func.__name__}). Run it as "
                f"usual."
            )
        if func in _OF_LISTS:
            for t in tensors_of([a for a in (*args, *(kwargs or {}).values()) if isinstance(a, (list, tuple))]):
                for number in t.detach().flatten().unbind():
                    number.item()
        return func(*args, **whole_arguments(func, kwargs or {}))


__all__ = ["no_host_reads"]
