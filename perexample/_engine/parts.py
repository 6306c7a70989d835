"""What is computed from parameters alone, and brought to the shape of data: each row of it is that row's example's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from .._private import dispatched, undispatched
from ..place import Place, broadcast
from .table import place_of, put


def tied(t: Tensor, place: Place) -> Tensor:
    """A tensor of nobody's whose rows shall be those of a place, by an addition of zeros that is tapped."""
    zeros = t.new_zeros(()).expand(t.shape).clone()
    put(zeros, place)
    with dispatched():
        return torch.add(t, zeros)


def _expanded(t: Tensor, shape: Size, data: Sequence[Tensor]) -> Tensor:
    """A tensor in the shape of data; by itself, so that what is computed from parameters alone is told from data."""
    out = t.expand(shape)
    with undispatched():
        if not out.requires_grad or place_of(t) is not None:
            return out
        known = [(place_of(other), other.shape) for other in data]
        places = [(place, own) for place, own in known if isinstance(place, Place) and place.space.owner is None]
        if len(places) < sum(place is not None for place, _ in known):
            return out  # what has the shape of a part of the examples may be for all of them
        place = broadcast(places, shape)
        return tied(out, place) if place is not None and repeats(t.shape, shape, place.axis) else out


def repeats(before: Size, after: Size, axis: int | None) -> bool:
    """Whether an expansion from one shape to another shows the same all along an axis."""
    own = None if axis is None else axis - (len(after) - len(before))
    return own is None or own < 0 or before[own] == 1


def _expand_as(t: Tensor, other: Tensor) -> Tensor:
    return _expanded(t, other.shape, [other])


def _broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    given: Any = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    return tuple(_expanded(t, shape, given) for t in given)


# In other words than torch's.
PARTS: dict[Any, Any] = {torch.broadcast_tensors: _broadcast_tensors, Tensor.expand_as: _expand_as}
