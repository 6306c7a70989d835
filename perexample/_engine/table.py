"""Which tensors of running forwards depend on the batch, and where they hold the examples."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .._private import handed_through, inside_functorch, metadata
from ..place import Lost, Place, entry_owners, from_owners

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


# Between a look at an entry of a tensor that is gone and taking it out another thread may make one with its identity.
_LOCK = threading.RLock()
_PLACES: dict[int, _Entry] = {}
_ORIGINS: dict[int, _Entry] = {}
_MADE: dict[int, _Entry] = {}


def _drop(entry: Any) -> None:
    key = entry.key
    with _LOCK:
        for table in (_PLACES, _ORIGINS, _MADE):
            if table.get(key) is entry:
                table.pop(key, None)


def known_place(tensor: Tensor) -> Place | Lost | None:
    """What was noted of this very tensor object."""
    entry = _PLACES.get(id(tensor))
    return entry.known if entry is not None and entry() is tensor else None


def place_of(tensor: Tensor) -> Place | Lost | None:
    """Where a tensor holds the examples; ``None`` if it does not depend on the batch, as far as was seen."""
    entry = _PLACES.get(id(tensor))
    if entry is not None and entry() is tensor:
        return entry.known
    if _WRITTEN and (found := _by_storage(tensor)) is not None:
        put(tensor, found)
        return found
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
    entry = _Entry(tensor, place)
    with _LOCK:
        _PLACES[entry.key] = entry


def put_all_on_edges() -> None:
    """The same for all tensors that are known now."""
    for entry in _PLACES.copy().values():
        if (tensor := entry()) is not None:
            put_on_edge(tensor)


class _Written:
    """A piece of memory that data was written into, through one of the tensors that show it.

    Attributes:
        storage: The memory, held weakly.
        writes: What shows which part of it, and where it holds the examples; later ones count.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = StorageWeakRef(storage)
        self.writes: list[tuple[tuple, Place | Lost]] = []

    def place(self, tensor: Tensor) -> Place | Lost | None:
        """Where a tensor that shows a part of the memory holds the examples."""
        lost = [place for _, place in self.writes if isinstance(place, Lost)]
        if lost:
            return lost[0]
        place = self.writes[-1][1]
        assert isinstance(place, Place)
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = torch.full((size,), -1, device="cpu")
        for (shape, stride, offset), known in self.writes:
            assert isinstance(known, Place)
            flat.as_strided(shape, stride, offset).copy_(
                entry_owners(torch.empty((), device="cpu").expand(shape), known)
            )
        owner = flat.as_strided(*_geometry(tensor))
        if not bool((owner >= 0).any()):
            return None
        whole = place.space.record.space
        found = from_owners(owner, whole, one_example=False)
        where, why = "a write into part of a tensor", "leaves no axis that tells the examples apart"
        return found or Lost(whole.record, where, why, False)


_WRITTEN: dict[int, _Written] = {}


def _geometry(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()


def _by_storage(tensor: Tensor) -> Place | Lost | None:
    if tensor.layout != torch.strided or inside_functorch(tensor):
        return None
    written = _WRITTEN.get(tensor.untyped_storage()._cdata)
    return None if written is None or written.storage.expired() else written.place(tensor)


def wrote(tensor: Tensor, before: Place | Lost | None, after: Place | Lost) -> None:
    """Note that a tensor was written to, if it holds the examples elsewhere since: so do all that show its memory."""
    if isinstance(before, Place) and isinstance(after, Place) and (before is after or _equal(before, after)):
        return
    storage = tensor.untyped_storage()
    for key in [key for key, written in _WRITTEN.copy().items() if written.storage.expired()]:
        _WRITTEN.pop(key, None)
    written = _WRITTEN.setdefault(storage._cdata, _Written(storage))
    for entry in _PLACES.copy().values():  # other threads and the garbage collector change it
        other = entry()
        if other is None or other is tensor or other.layout != torch.strided:
            continue
        if other.untyped_storage()._cdata == storage._cdata:
            written.writes.append((_geometry(other), entry.known))
            forget(other)  # found again by its memory
    if before is not None:
        written.writes.append((_geometry(tensor), before))
    written.writes.append((_geometry(tensor), after))


def _equal(a: Place, b: Place) -> bool:
    return a.axis == b.axis and a.agrees(b)


def forget(tensor: Tensor) -> None:
    """A tensor does not depend on the batch any more, or must not be known after the forward."""
    _PLACES.pop(id(tensor), None)


def origin_of(tensor: Tensor) -> Tensor:
    """The tensor that this one only repeats, if it was expanded; else the tensor itself."""
    entry = _ORIGINS.get(id(tensor))
    return tensor if entry is None or entry() is not tensor else entry.known


def put_made(tensor: Any) -> None:
    """Note that a tensor was made in a forward and told to need a gradient, so that no optimizer can have it."""
    if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.is_leaf:
        entry = _Entry(tensor, True)
        with _LOCK:
            _MADE[entry.key] = entry


def made_inside(tensor: Tensor) -> bool:
    """Whether a leaf of the graph was made in a forward; nobody asks for its gradient."""
    entry = _MADE.get(id(tensor))
    return entry is not None and entry() is tensor


def forget_memory(tensor: Tensor) -> None:
    """The same, and nothing that shows its memory does either."""
    forget(tensor)
    _WRITTEN.pop(tensor.untyped_storage()._cdata, None)


def put_origin(tensor: Tensor, source: Tensor) -> None:
    """Note that a tensor repeats another one along axes of size 1."""
    entry = _Entry(tensor, source)
    with _LOCK:
        _ORIGINS[entry.key] = entry
