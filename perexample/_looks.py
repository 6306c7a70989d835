"""Looks at values on a device, for each of which the host has to wait.

Where a step is recorded nothing can be looked at. What mostly holds is then taken to hold, and noted, so that one look
after the step tells whether it did.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError


class Notes:
    """What was taken to hold.

    Attributes:
        conditions: Boolean tensors that should be true.
        excesses: Tensors whose entries should be at most 0, and finite.
        norms: Tensors whose entries should be below `_LARGE`.
        found: What was found out by looking, one after the other.
        looks: Those of the conditions that say that the model or its loss would see the same again.
        by_model: Whether at one that comes from the batch, of all of it perhaps.
    """

    def __init__(self, before: Sequence[Any] | None = None) -> None:
        """Nothing yet, but what a run before has found out, if there was one."""
        self.conditions: list[Tensor] = []
        self.excesses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.found: list[Any] = []
        self.looks: list[Tensor] = []
        self.by_model = False
        self._before = before

    def found_out(self, finding: Callable[[], Any]) -> Any:
        """What looking finds out, or has found out at this place in the run before."""
        if self._before is None:
            with looking():
                value = finding()
        elif len(self.found) < len(self._before):
            value = self._before[len(self.found)]
        else:
            raise ConfigurationError(
                "This step cannot be recorded: its operations were others in each of the first runs. Run it as usual."
            )
        self.found.append(value)
        return value

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
_EVERYWHERE: list[Notes] = []


class _Here(threading.local):
    def __init__(self) -> None:
        self.notes: list[Notes] = []
        self.trying = False


_HERE = _Here()


def _notes() -> Notes | None:
    """Those of this thread, or of all."""
    if _HERE.trying:
        return None
    notes = _HERE.notes or _EVERYWHERE
    return notes[-1] if notes else None


class noting:  # noqa: N801 - named as a function is
    """Nothing is looked at inside; what was taken to hold is noted.

    Args:
        everywhere: In all threads, as autograd computes for GPUs in threads of its own; else in this one only.
        before: `Notes.found` of a run before, which is taken to be found again, as a GPU cannot be asked now.
    """

    def __init__(self, *, everywhere: bool = False, before: Sequence[Any] | None = None) -> None:
        """Nothing happens before ``with``."""
        self.stack, self.notes = _EVERYWHERE if everywhere else _HERE.notes, Notes(before)

    def __enter__(self) -> Notes:
        """Begin."""
        self.stack.append(self.notes)
        return self.notes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self.stack.remove(self.notes)


class looking:  # noqa: N801
    """Values may be looked at inside, in a step that is recorded too: what is tried there has no part in it."""

    def __enter__(self) -> None:
        """Forget for a while that anything is noted, in this thread."""
        self.before = _HERE.trying
        _HERE.trying = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """And remember."""
        _HERE.trying = self.before


def trying() -> bool:
    """Whether operations have no part in a step that is recorded."""
    return _HERE.trying


def blind(*, everywhere: bool = False) -> bool:
    """Whether nothing can be looked at; ``everywhere``: in no thread, as for a CUDA graph."""
    notes = _notes()
    return notes is not None and (not everywhere or notes in _EVERYWHERE)


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
    """Whether something is true that mostly is.

    Where a step is recorded nothing is looked at: it is taken to be true, and noted, so that a replay in which it is
    not is run as usual.

    Args:
        condition: Boolean, of any shape; all of it should be true.

    Returns:
        Whether it is, a Python bool.
    """
    if (notes := _notes()) is not None:
        notes.conditions.append(condition.all())
        return True
    return bool(condition if condition.dim() == 0 else condition.all())


def found_out(finding: Callable[[], Any]) -> Any:
    """What is found out by looking; in a step that is recorded, that it is so in each replay is to be noted."""
    notes = _notes()
    return finding() if notes is None else notes.found_out(finding)


def model_looks(same: Callable[[], Tensor], *, at_batch: bool) -> bool:
    """Note that the model has looked at a value.

    Args:
        same: Tells whether it would see the same again.
        at_batch: Whether it comes from the batch.

    Returns:
        Whether anything is noted now.
    """
    notes = _notes()
    if notes is None:
        return False
    notes.looks.append(same())
    notes.conditions.append(notes.looks[-1])
    notes.by_model |= at_batch
    return True


def would_see_the_same() -> Tensor | None:
    """Whether all that a model has looked at so far would be the same; ``None`` where nothing was, or is noted."""
    notes = _notes()
    return torch.stack(notes.looks).all() if notes is not None and notes.looks else None


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
