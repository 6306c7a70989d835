"""What is computed from parameters alone, and brought to the shape of data: each row of it is that row's example's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from .._private import dispatched, undispatched
from .._tree import map_tensors, tensors_in
from ..place import Place, broadcast
from ..rule import Rule
from .state import STATE, Frame
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


def has_no_states(rule: Rule) -> bool:
    return type(rule).states is Rule.states


def with_tied_states(rule: Rule, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The arguments with learned states brought to the rows of the data, by an addition of zeros that is tapped."""
    states = rule.states(module, args, kwargs)
    learned = {id(t): axis for t, axis in states if t.requires_grad and place_of(t) is None}
    if not learned:
        return None
    x = next(tensors_in((args, kwargs)))
    located = rule.locate(module, args, kwargs, [x], place_of) if isinstance(place_of(x), Place) else ""
    if isinstance(located, str):
        return None
    place = located[0]

    def in_rows(t: Tensor) -> Tensor:
        axis = learned.get(id(t))
        if axis is None or t.shape[axis] != place.size:
            return t
        return tied(t, place.at(axis))

    return map_tensors(in_rows, args), map_tensors(in_rows, kwargs)


def with_tied_outputs(frame: Frame, output: Any) -> Any:
    """The output of a model with what only repeats parameters for each example brought to the rows of these."""
    record = frame.record
    if record is None or frame.rule is not None or frame.inside:
        return output
    repeated = {id(t) for t in tensors_in(output) if record.repeats_for_each(t)}
    if not repeated:
        return output
    STATE.frames.append(frame)  # so that the addition is named
    try:
        place = Place(record.space, record.batch_dim)
        return map_tensors(lambda t: tied(t, place) if id(t) in repeated else t, output)
    finally:
        STATE.frames.pop()
