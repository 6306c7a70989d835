"""Modes that see what torch calls, and what they do not see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_UNDISPATCHED: dict[Any, Callable] = {}


def undispatched() -> AbstractContextManager:
    """No torch function modes, whose every call and look at an attribute takes a microsecond; dispatch modes stay."""
    return torch._C.DisableTorchFunction()


def dispatched() -> AbstractContextManager:
    """Torch function modes again, inside of `undispatched`."""
    return torch._C._EnableTorchFunction()


def function_modes() -> list[TorchFunctionMode]:
    """The torch function modes of this thread, outermost first."""
    return list(torch.overrides._get_current_function_mode_stack())


def without_dispatch(function: Callable) -> Callable:
    """A Python function of torch that does not hand itself to the modes, so that its parts do."""
    if function not in _UNDISPATCHED:
        code: Any = function
        names = {**code.__globals__, "has_torch_function": lambda *_: False}
        copy = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        copy.__kwdefaults__ = code.__kwdefaults__
        _UNDISPATCHED[function] = copy
    return _UNDISPATCHED[function]


def dispatch_modes_active() -> bool:
    """Whether there are dispatch modes, such as one that counts operations; none see into compiled code."""
    return torch._C._len_torch_dispatch_stack() > 0


def dispatch_is_off() -> bool:
    """Whether torch hides from dispatch modes what it does now, as while it makes a tensor of a list of others."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)


def inside_functorch(tensor: Tensor) -> bool:
    """Whether the tensor is a wrapper of ``torch.func`` (vmap, grad, ...), where hooks must stay silent."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def without_functorch(tensor: Tensor) -> Tensor:
    """What a wrapper of ``torch.func`` holds, which alone tells whether parameters are in it; others as they are."""
    while inside_functorch(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` is under way, whatever its tensors are."""
    return torch._C._are_functorch_transforms_active()


def is_operation(function: Any) -> bool:
    """Whether a function is one of `torch.ops`, which others may have registered, and written in Python."""
    return isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))


def operation_without_frame(operation: Any) -> Callable[..., Any]:
    """What an operation of `torch.ops` does, without the frame of a Python function for each call."""
    if type(operation).__call__ is not torch._ops.OpOverload.__call__:
        return cast("Callable[..., Any]", operation)
    return cast("Callable[..., Any]", operation._op)
