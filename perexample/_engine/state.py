"""What is under way in this thread: module calls, and whether the engine itself is computing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._precision import full_precision, reduced
from .._private import undispatched

if TYPE_CHECKING:
    from ..rule import Rule
    from .follow import Follow
    from .record import Record


@dataclass(slots=True)
class Frame:
    """A module call under way.

    Attributes:
        module: The module.
        record: The outermost forward; ``None`` where a checkpoint repeats a part of it.
        name: Its path, with a number from the second call on.
        inside: Whether it is below a call that is tapped as a whole, or where hooks must stay silent.
        rule: The rule that will answer for the call.
        named: Whether the call is there for its name only.
        opaque: Whether the call may be tapped as a whole if its parts cannot be followed.
        before: State before the call that the rule asked for.
        parameters: Those that the module owned when it was called.
        follow: What follows the operations, for the outermost call.
    """

    module: nn.Module
    record: Record | None
    name: str
    inside: bool
    rule: Rule | None = None
    named: bool = False
    opaque: bool = False
    before: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[Any, ...] = ()
    follow: Follow | None = None

    @property
    def called(self) -> str:
        """How messages name it."""
        return f"`{self.name}` ({type(self.module).__name__})"


class _State(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.quiet = 0
        self.listener: Callable[..., None] | None = None
        self.opened: object = None  # stands for the context that is open
        self.once = False  # whether its losses must not be differentiated but once
        self.hints: dict[str, None] = {}  # what in the last forward may be why a later use cannot be followed

    def silent(self) -> bool:
        """Whether operations are none of our business now."""
        if self.quiet:
            return True
        if not self.frames:
            return False
        top = self.frames[-1]
        return top.inside or top.rule is not None

    def hinted(self) -> str:
        """What in the last forward may be the cause of an error, for its message."""
        return f" In the last forward there was: {'; '.join(self.hints)}." if self.hints else ""


STATE = _State()


@contextmanager
def once() -> Iterator[None]:
    """Inside of a context: losses are differentiated once, whatever they look like."""
    before, STATE.once = STATE.once, True
    try:
        yield
    finally:
        STATE.once = before


class quiet:  # noqa: N801 - named as a function is; a class, as it is entered often
    """Rules may call modules and functions: no taps then."""

    def __enter__(self) -> None:
        """No taps."""
        STATE.quiet += 1

    def __exit__(self, *exc: object) -> None:
        """Taps again."""
        STATE.quiet -= 1


class plain:  # noqa: N801
    """Rules and extensions compute without gradients, taps, function modes or lower precision on these devices."""

    def __init__(self, devices: Iterable[str]) -> None:
        """What is off already is not switched off."""
        self._open: list[Any] = [undispatched(), quiet()]
        if torch.is_grad_enabled():
            self._open.append(torch.no_grad())
        self._open += [torch.autocast(kind, enabled=False) for kind in devices if torch.is_autocast_enabled(kind)]
        if reduced(devices):
            self._open.append(full_precision())

    def __enter__(self) -> None:
        """All at once."""
        for context in self._open:
            context.__enter__()

    def __exit__(self, *exc: object) -> None:
        """And back."""
        for context in reversed(self._open):
            context.__exit__(None, None, None)


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
