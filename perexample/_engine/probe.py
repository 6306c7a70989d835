"""Where the examples are: a forward on another number of examples shows which axis follows their number.

Sizes alone cannot tell an axis of N examples from one of T = N positions, nor a table of N positions that all examples
share from one row per example. So the first backward through a model runs its forward once more, on two or three of
the examples, without gradients, and compares the shape of every tapped output with the original one.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor, nn

from .._tree import map_tensors, tensors_in

if TYPE_CHECKING:
    from .record import Record


@dataclass(frozen=True)
class Place:
    """What a forward on another number of examples showed of one tapped output.

    Attributes:
        axis: The axis that follows the number of examples, if it is exactly that number.
        shared: Whether no axis follows it, so that one output serves all examples.
    """

    axis: int | None = None
    shared: bool = False


class Places:
    """Places of one module's tapped outputs, by call; ``failed`` if its forward cannot be run again."""

    def __init__(self) -> None:
        """Nothing known yet."""
        self.by_call: dict[str, list[Place]] = {}
        self.failed = False

    def known(self, call: str) -> bool:
        """Whether another forward would tell no more."""
        return self.failed or call in self.by_call


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Places]] = weakref.WeakKeyDictionary()


def places_of(record: Record) -> Places:
    """What is known of the calls inside such an outermost forward."""
    return _KNOWN.setdefault(record.module, {}).setdefault(record.signature, Places())


def forget_places(model: nn.Module) -> None:
    """Forget what was known, as the model may have changed."""
    for module in model.modules():
        _KNOWN.pop(module, None)


def explore(record: Record, n: int, run: Any) -> None:
    """Fill in the places for a forward of ``n`` examples.

    Args:
        record: The forward to be repeated.
        n: Its number of examples, at least 1.
        run: Repeats the forward on given arguments and returns the shapes of the outputs of every call.
    """
    places = places_of(record)
    count = 2 if n != 2 else 3
    for only_first in (False, True):
        try:
            shapes = run(*_fewer(record, n, count, only_first))
        except Exception:  # noqa: BLE001 - whatever a model raises on other inputs: then sizes must decide
            continue
        for call, before in record.shapes.items():
            after = shapes.get(call, [])
            places.by_call[call] = [_place(a, b, n, count) for a, b in zip(before, after, strict=False)]
        return
    places.failed = True


def _fewer(record: Record, n: int, count: int, only_first: bool) -> tuple[tuple, dict]:
    """The arguments with ``count`` examples instead of ``n``; each tensor of size n, or only the first, is cut."""
    rows = torch.arange(count) % n
    cut: list[Tensor] = []

    def shorten(t: Tensor) -> Tensor:
        t = t.detach()
        if t.dim() <= record.batch_dim or t.shape[record.batch_dim] != n or (only_first and cut):
            return t
        cut.append(t)
        return t.index_select(record.batch_dim, rows.to(t.device))

    return map_tensors(shorten, record.arguments)


def _place(before: Size, after: Size, n: int, count: int) -> Place:
    if before == after:
        return Place(shared=True)
    if len(before) != len(after):
        return Place()
    changed = [axis for axis, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if len(changed) == 1 and before[changed[0]] == n and after[changed[0]] == count:
        return Place(axis=changed[0])
    return Place()


def tensors_of(tree: Any) -> list[Size]:
    """Shapes of all tensors of a structure."""
    return [t.shape for t in tensors_in(tree)]
