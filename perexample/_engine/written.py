"""Data that a forward leaves in buffers and parameters, where it reaches the model past all gradients."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from .record import Record
from .state import STATE, Frame
from .table import forget_memory, place_of


def refuse_written(frame: Frame, inner: nn.Module | None) -> None:
    """Data that a forward writes into a buffer or parameter reaches the model past all gradients.

    Most modules write their own; all others are looked at when the outermost call ends, if data was written.
    """
    record = frame.record
    if record is None or not (inner is None and record.wrote):
        named = [(frame.name, frame.module)]
    else:
        named = [(path or frame.name, module) for path, module in frame.module.named_modules()]
    for path, module in named:
        written = [
            (name, "buffer", t) for name, t in module._buffers.items() if t is not None and place_of(t) is not None
        ]
        for name, p in module._parameters.items():  # in a functional call there is something else in its place
            if isinstance(p, nn.Parameter) and place_of(p) is not None:
                written.append((name, "parameter", p))
        for name, what, t in written:
            if record is not None and record.was_given(t):
                continue
            forget_memory(t)
            if record is not None:
                reason = (
                    f"({type(module).__name__}) has a {what} `{name}` that the forward changes according to the data, "
                    f"past all gradients; keep data out of buffers and parameters, or call .eval() if they are then "
                    f"left alone"
                )
                record.refused.append((path, reason))
    if record is not None:
        _refuse_replaced(frame, record)


def touched(now: Collection[Any], before: tuple[Any, ...]) -> bool:
    """Whether a parameter is another one, or holds data; asked of every module that has some."""
    if len(now) != len(before):
        return True
    for p, old in zip(now, before, strict=True):  # noqa: SIM110 - a generator takes twice as long
        if p is not old or (p is not None and place_of(p) is not None):
            return True
    return False


def _refuse_replaced(frame: Frame, record: Record) -> None:
    """A parameter that a forward makes anew may be made of data, which is not seen."""
    own = frame.module._parameters
    if len(own) != len(frame.parameters):
        return  # it has got or lost some, which the optimizer does not know
    for (name, now), before in zip(own.items(), frame.parameters, strict=True):
        if now is before or not isinstance(now, nn.Parameter) or not isinstance(before, nn.Parameter):
            continue
        root = STATE.frames[0].module if STATE.frames else frame.module
        others = (p for m in root.modules() for key, p in m._parameters.items() if (m, key) != (frame.module, name))
        if not any(now is p for p in others):  # else it was tied to another one
            reason = (
                f"({type(frame.module).__name__}) has a parameter `{name}` that the forward replaces by a new one, "
                f"which may be made of the data, past all gradients; keep the parameter, and compute what is to be "
                f"used instead in the forward"
            )
            record.refused.append((frame.name, reason))
