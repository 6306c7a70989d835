"""How a recorded operation is called: by torch's own function, which takes less time than `torch.ops` does.

A call of `torch.ops` is also a Python function's. From a long recorded step, whose variables may fill what Python keeps
for them to the last bit, each such call makes Python ask the system for memory and give it back, which takes far longer
than a short operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._calls import is_of_torch
from ._private import dispatched, operation_without_frame, undispatched

_COMPILED = (BuiltinFunctionType, MethodDescriptorType)  # and not written in Python, which takes longer


def direct(function: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """What does the same as an operation of these arguments, and of others of the same form, in less time.

    Args:
        function: The operation, as dispatch modes see it.
        args: What it is given; it is not run.
        kwargs: The same.

    Returns:
        A function of torch, if one is seen to call this operation, of the same arguments and nothing else; the
        operation without what Python does around it, if there is none; an operation of others as they wrote it.
    """
    if not is_of_torch(function):  # whose name tells nothing of what it does
        return _of_others(function)
    for other in _named_alike(function._schema.name.partition("::")[2]):
        if isinstance(other, _COMPILED) and _is_the_same(_first_call(other, args, kwargs), (function, args, kwargs)):
            return other
    return operation_without_frame(function)


def _of_others(function: Any) -> Callable[..., Any]:
    """An operation that may be written in Python, where modes and subclasses that it uses must see what they do."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with dispatched():
            return function(*args, **kwargs)

    return called


def _named_alike(name: str) -> Iterator[Any]:
    """Functions of torch that are called as an operation is."""
    for place, prefix in ((torch, ""), (Tensor, ""), (F, ""), (torch.linalg, "linalg_")):
        if name.startswith(prefix):
            yield getattr(place, name.removeprefix(prefix), None)
    if name == "_to_copy":
        yield Tensor.to


class _Called(Exception):  # noqa: N818 - nothing is wrong
    """An operation that was about to be done."""


class _Caught(TorchDispatchMode):
    """Does nothing, and tells of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Stop before it is done."""
        raise _Called(func, args, kwargs or {})


def _first_call(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The first operation that a function would do, and its arguments; nothing is done."""
    try:
        with undispatched(), _Caught():
            function(*args, **kwargs)
    except _Called as found:
        return found.args
    except Exception:  # noqa: BLE001 - whatever a function raises that takes other arguments
        return None
    return None


def _is_the_same(one: Any, other: Any) -> bool:
    """Whether two structures hold the same tensors, and equal numbers of the same types."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_is_the_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_the_same(value, other[key]) for key, value in one.items())
    if one is other:
        return True
    return type(one) is type(other) and not isinstance(one, Tensor) and repr(one) == repr(other)
