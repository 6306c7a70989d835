"""Looks at values on a device, for each of which the host has to wait.

Where a step is recorded nothing can be looked at. What mostly holds is then taken to hold, and noted, so that one look
after the step tells whether it did.
"""

from __future__ import annotations

import math
import threading
from types import TracebackType

import torch
from torch import Tensor

from .errors import ConfigurationError


class Notes:
    """What was taken to hold.

    Attributes:
        conditions: Boolean tensors that should be true.
        excesses: Tensors whose entries should be at most 0, and finite.
        norms: Tensors whose entries should be below `_LARGE`.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.conditions: list[Tensor] = []
        self.excesses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def all_hold(self, device: torch.device) -> Tensor:
        """Whether all of it does, a single boolean on the device."""
        held = [condition.to(device) for condition in self.conditions]
        if self.excesses:
            together = _together(self.excesses, device)
            held += [(together <= 0).all(), together.min() > -math.inf]
        if self.norms:
            held.append(_together(self.norms, device).max() < _LARGE)
        return torch.stack(held).all() if held else torch.ones((), dtype=torch.bool, device=device)


def _together(tensors: list[Tensor], device: torch.device) -> Tensor:
    """All their entries, in float64."""
    return torch.cat([t.to(device, torch.float64).flatten() for t in tensors])


_LARGE = 1e18  # norms above have squares that overflow in float32
_NOTING: list[tuple[int | None, Notes]] = []


def _notes() -> Notes | None:
    """Those of this thread."""
    if not _NOTING or _TRYING.now or (_NOTING[-1][0] is not None and _NOTING[-1][0] != threading.get_ident()):
        return None
    return _NOTING[-1][1]


class noting:  # noqa: N801 - named as a function is
    """Nothing is looked at inside; what was taken to hold is noted.

    Args:
        everywhere: In all threads, as autograd computes for GPUs in threads of its own; else in this one only.
    """

    def __init__(self, *, everywhere: bool = False) -> None:
        """Nothing happens before ``with``."""
        self.thread = None if everywhere else threading.get_ident()

    def __enter__(self) -> Notes:
        """Begin."""
        _NOTING.append((self.thread, Notes()))
        return _NOTING[-1][1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        _NOTING.pop()


class looking:  # noqa: N801
    """Values may be looked at inside, in a step that is recorded too: what is tried there has no part in it."""

    def __enter__(self) -> None:
        """Forget for a while that anything is noted, in this thread."""
        self.before = _TRYING.now
        _TRYING.now = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """And remember."""
        _TRYING.now = self.before


class _Trying(threading.local):
    now = False


_TRYING = _Trying()


def trying() -> bool:
    """Whether operations have no part in a step that is recorded."""
    return _TRYING.now


def blind(*, everywhere: bool = False) -> bool:
    """Whether nothing can be looked at; ``everywhere``: in no thread, as for a CUDA graph."""
    return _notes() is not None and not (everywhere and _NOTING[-1][0] is not None)


def look(why: str) -> None:
    """Say that values are about to be looked at whatever they are.

    Args:
        why: What for, an explanation that continues "This step cannot be recorded: ".

    Raises:
        ConfigurationError: If nothing can be looked at.
    """
    if blind():
        raise ConfigurationError(f"This step cannot be recorded: {why}. Run it as usual.")


def holds(condition: Tensor) -> bool:
    """Whether something is true that mostly is; ``condition`` is boolean, all of it should be true."""
    if (notes := _notes()) is not None:
        notes.conditions.append(condition.all())
        return True
    return bool(condition if condition.dim() == 0 else condition.all())


def not_large(norms: Tensor) -> bool:
    """Whether norms are so small that their squares do not overflow in float32; NaN is not."""
    if (notes := _notes()) is not None:
        notes.norms.append(norms)
        return True
    return bool((norms < _LARGE).all())


def within(excess: Tensor) -> bool:
    """Whether no entry is above 0, NaN or infinite, found in one look."""
    if not excess.numel():
        return True
    if (notes := _notes()) is not None:
        notes.excesses.append(excess)
        return True
    extremes = torch.aminmax(excess)
    least, most = (t.item() for t in extremes) if excess.device.type == "cpu" else torch.stack(extremes).tolist()
    return most <= 0.0 and least > -math.inf
