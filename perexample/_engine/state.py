"""What is under way in this thread: module calls, and whether the engine itself is computing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ..rule import Rule
    from .follow import Follow
    from .record import Record


@dataclass
class Frame:
    """A module call under way.

    Attributes:
        module: The module.
        record: The outermost forward; ``None`` where a checkpoint repeats a part of it.
        name: Its path, with a number from the second call on.
        inside: Whether it is below a call that is tapped as a whole, or where hooks must stay silent.
        rule: The rule that will answer for the call.
        opaque: Whether the call may be tapped as a whole if its parts cannot be followed.
        before: State before the call that the rule asked for.
        follow: What follows the operations, for the outermost call.
    """

    module: nn.Module
    record: Record | None
    name: str
    inside: bool
    rule: Rule | None = None
    opaque: bool = False
    before: dict[str, Any] = field(default_factory=dict)
    follow: Follow | None = None


class _State(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.quiet = 0
        self.listener: Callable[..., None] | None = None

    def silent(self) -> bool:
        """Whether operations are none of our business now."""
        if self.quiet:
            return True
        if not self.frames:
            return False
        top = self.frames[-1]
        return top.inside or top.rule is not None


STATE = _State()


@contextmanager
def quiet() -> Iterator[None]:
    """Rules may call modules and functions: no taps then."""
    STATE.quiet += 1
    try:
        yield
    finally:
        STATE.quiet -= 1


@contextmanager
def resumed() -> Iterator[None]:
    """For a part of a forward that is run again: as if nothing else were under way."""
    kept, STATE.frames, STATE.quiet = (STATE.frames, STATE.quiet), [], 0
    try:
        yield
    finally:
        STATE.frames, STATE.quiet = kept


@contextmanager
def listening(listener: Callable[..., None]) -> Iterator[None]:
    """Tell of every tap that a backward completes: the tap, its rule and its terms."""
    before, STATE.listener = STATE.listener, listener
    try:
        yield
    finally:
        STATE.listener = before
