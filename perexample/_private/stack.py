"""What is under way on the Python stack."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_hooked: Any = torch.optim.Optimizer.profile_hook_step
_HOOKED_STEP = _hooked(lambda: None).__code__


def steps_under_way(optimizer: torch.optim.Optimizer, thread: int | None = None) -> int:
    """How many calls of an optimizer's step, each of which runs its hooks, are on the Python stack.

    Args:
        optimizer: The optimizer.
        thread: The thread whose stack is looked at; by default this one.

    Returns:
        The number; two where a subclass calls the step of its base class, if torch has hooked both, which it does to a
        class when the first object of it is made.
    """
    frame, count = sys._getframe(1) if thread is None else sys._current_frames().get(thread), 0
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and frame.f_locals["args"][0] is optimizer:
            count += 1
        frame = frame.f_back
    return count


def calls_under_way(module: nn.Module) -> int:
    """How many calls of a module are on the Python stack."""
    frame, count = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


def whole_arguments(func: Callable, kwargs: dict) -> dict:
    """The arguments by name that a function was called with: ``l1_loss`` keeps its weight from modes (torch 2.13)."""
    if func is not nn.functional.l1_loss or "weight" in kwargs:
        return kwargs
    code, frame = nn.functional.l1_loss.__code__, sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None else {**kwargs, "weight": weight}
