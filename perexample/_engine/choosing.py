"""Indices that depend on the batch: an example may choose entries of its own, or constants, and none of another's.

With the owner of each number of an index as an index of one axis more, torch itself puts who has chosen an entry beside
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._looks import holds
from ..place import Place, entry_owners
from .kinds import base_name, names
from .table import place_of

_INDEXED = names("__getitem__ __setitem__ index_put index_put_")
_SLICES = names(
    "index_select index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_reduce index_reduce_"
)
_ALONG = names("gather scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_")
_NAMED = {"input": 0, "dim": 1, "axis": 1, "indices": 1, "index": 2}


class Index(NamedTuple):
    """What a call chooses entries by.

    Attributes:
        parts: The index as ``values[parts]`` has it, or what stands in its place for ``values.gather``.
        along: The axis of ``values.gather``.
    """

    parts: tuple
    along: int | None = None


def index_of(func: Callable, args: tuple, kwargs: dict) -> Index | None:
    """The index of a call; ``None`` if nothing in it depends on the batch."""
    given = dict(enumerate(args)) | {_NAMED[key]: value for key, value in kwargs.items() if key in _NAMED}
    name, values, first, second = base_name(func), given.get(0), given.get(1), given.get(2)
    index = Index(())
    if name in _INDEXED:
        index = Index(first if isinstance(first, tuple) else tuple(first or ()) if "index" in name else (first,))
    elif isinstance(values, Tensor) and isinstance(first, int) and name in _SLICES:
        index = Index((*[slice(None)] * (first % max(1, values.dim())), second))
    elif isinstance(first, int) and name in _ALONG:
        index = Index((second,), first)
    return index if any(map(_chooses, index.parts)) else None


def _chooses(part: Any) -> bool:
    return isinstance(part, Tensor) and isinstance(place_of(part), Place)


def _choosers(index: Index, table: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """By each part of an index that depends on the batch: the part, what it chooses of a table, and who has chosen."""
    for part in filter(_chooses, index.parts):
        place, is_mask = place_of(part), part.dtype == torch.bool
        owner = entry_owners(part, place if isinstance(place, Place) else None)
        if index.along is not None:
            yield part, table.gather(index.along, part), owner
        elif is_mask and len(index.parts) == 1:  # what it does not show is chosen by nobody
            shown = owner.masked_fill(~part, -1)
            yield part, table, shown.view(*part.shape, *[1] * (table.dim() - part.dim())).expand_as(table)
        else:
            at = ((owner[part] if is_mask else owner) + 1, *index.parts)
            numbers = torch.arange(-1, rows, device=owner.device).view(-1, *[1] * table.dim())
            shape = (rows + 1, *table.shape)
            yield part, table.expand(shape)[at], numbers.expand(shape)[at]


def own(index: Index, tables: list[Tensor], rows: int, sizes: set[int]) -> bool:
    """Whether all entries are chosen by those they belong to; an order of all rows may come from anyone.

    Args:
        index: An index.
        tables: Owners of what is chosen of, and of what was written to.
        rows: Number of examples.
        sizes: How long an axis of rows is.

    Returns:
        Whether they are.
    """
    for table in tables:
        for part, owner, chooser in _choosers(index, table, rows):
            alike = ((chooser < 0) | (owner < 0) | (chooser == owner)).all()
            for size in sizes:
                alike = alike | _is_order(part, size)
            if not holds(alike):
                return False
    return True


def _is_order(index: Tensor, size: int) -> Tensor | bool:
    """Whether an index has each number below a size equally often."""
    if index.dtype == torch.bool or not size or index.numel() % size:
        return False
    numbers = torch.arange(size, device=index.device).repeat_interleave(index.numel() // size)
    return (index.flatten().sort().values == numbers).all()


def written_by(index: Index, values: Tensor, rows: int) -> list[Tensor]:
    """Owners of constants among which constants were written: those who chose where; empty if two chose one entry."""
    top = torch.full((values.numel(),), -1, device=values.device)
    bottom = top + rows + 1
    numbers = torch.arange(values.numel(), device=values.device).view(values.shape)
    for _, entry, chooser in _choosers(index, numbers, rows):
        top = top.scatter_reduce(0, entry.flatten(), chooser.flatten(), "amax")
        bottom = bottom.scatter_reduce(0, entry.flatten(), chooser.flatten() % (rows + 1), "amin")
    return [top.view(values.shape)] if holds((top < 0) | (top == bottom)) else []


def read_by(index: Index, values: Tensor, rows: int) -> list[Tensor]:
    """Owners of what was chosen of constants, who chose it; empty if two chose one entry."""
    found = []
    for part, entry, chooser in _choosers(index, values, rows):
        alone = part.dtype == torch.bool and entry is values  # the mask was not needed yet
        found.append(chooser[part] if alone else chooser)
    both = torch.stack(torch.broadcast_tensors(*found))
    top, bottom = both.amax(0), (both % (rows + 1)).amin(0)
    return [top] if holds((top < 0) | (top == bottom)) else []
