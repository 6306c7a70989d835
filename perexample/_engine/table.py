"""Which tensors of running forwards depend on the batch, and where they hold the examples."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from .._private import handed_through, metadata
from ..place import Lost, Place

_EDGES = "perexample places"  # under which a graph node's metadata holds the places of its outputs


class _Entry(weakref.ref):
    """A weak reference to a tensor that takes itself out of the table, with what is known of the tensor."""

    __slots__ = ("key", "known")

    key: int
    known: Any

    def __new__(cls, tensor: Tensor, known: Any) -> _Entry:
        return super().__new__(cls, tensor, _drop)

    def __init__(self, tensor: Tensor, known: Any) -> None:
        super().__init__(tensor, _drop)  # type: ignore[call-arg]
        self.key, self.known = id(tensor), known


_PLACES: dict[int, _Entry] = {}
_ORIGINS: dict[int, _Entry] = {}


def _drop(entry: Any) -> None:
    key = entry.key
    for table in (_PLACES, _ORIGINS):
        if table.get(key) is entry:
            del table[key]


def place_of(tensor: Tensor) -> Place | Lost | None:
    """Where a tensor holds the examples; ``None`` if it does not depend on the batch, as far as was seen."""
    entry = _PLACES.get(id(tensor))
    if entry is not None and entry() is tensor:
        return entry.known
    return None if tensor.grad_fn is None else _adopted(tensor)


def _adopted(tensor: Tensor) -> Place | Lost | None:
    """The place that was noted of the tensor's edge in the graph, or of what was handed through there."""
    node, number = tensor.grad_fn, tensor.output_nr
    if node is None:
        return None
    place = metadata(node).get(_EDGES, {}).get(number)
    if place is None and handed_through(node):
        before, number = node.next_functions[number]
        place = metadata(before).get(_EDGES, {}).get(number) if before is not None else None
    if place is not None:
        put(tensor, place)
    return place


def put_on_edge(tensor: Tensor) -> None:
    """Note the place of a tensor by its edge in the graph, as another tensor will stand for it."""
    place = place_of(tensor)
    if place is not None and tensor.grad_fn is not None:
        metadata(tensor.grad_fn).setdefault(_EDGES, {})[tensor.output_nr] = place


def put(tensor: Tensor, place: Place | Lost) -> None:
    """Note where a tensor holds the examples."""
    _PLACES[id(tensor)] = _Entry(tensor, place)


def forget(tensor: Tensor) -> None:
    """A tensor does not depend on the batch any more, or must not be known after the forward."""
    _PLACES.pop(id(tensor), None)


def origin_of(tensor: Tensor) -> Tensor:
    """The tensor that this one only repeats, if it was expanded; else the tensor itself."""
    entry = _ORIGINS.get(id(tensor))
    return tensor if entry is None or entry() is not tensor else entry.known


def put_origin(tensor: Tensor, source: Tensor) -> None:
    """Note that a tensor repeats another one along axes of size 1."""
    _ORIGINS[id(tensor)] = _Entry(tensor, source)
