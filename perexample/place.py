"""Where a tensor holds the examples: which of its entries belong to which example.

A `Place` says that one axis of a tensor, seen as ``[outer, M, inner]``, counts the M rows of a `Space`, and the space
says to which example each row belongs. That covers an axis of N examples anywhere in the tensor, axes folded into it on
either side (``[N * windows, ...]``, ``[heads * N, ...]``), and rows in any order or number (packed sequences, tokens
chosen by a mask). `Lost` stands for a tensor that depends on the batch in a way that gives no example its own entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Space:
    """Rows, each belonging to one example of one forward.

    Attributes:
        record: The forward, as the engine knows it.
        rows: Number of rows M.
        owner: Example of each row, ``[M]``, -1 for none; ``None`` if row n is example n.
        made: The operation that has chosen the rows, for messages.
        beside: Whether entries of nobody were put beside those of a single example, and are taken to be its own.
    """

    __slots__ = ("beside", "made", "owner", "record", "rows")

    def __init__(self, record: Any, rows: int, owner: Tensor | None = None, made: str = "") -> None:
        """Rows of a forward."""
        self.record, self.rows, self.owner, self.made = record, rows, owner, made
        self.beside = False

    def with_constants(self) -> Space:
        """The same, with a note that there are constants beside it."""
        noted = Space(self.record, self.rows, self.owner, self.made)
        noted.beside = True
        return noted

    def owners(self, device: Any = "cpu") -> Tensor:
        """Example of each row, ``[M]``."""
        return torch.arange(self.rows, device=device) if self.owner is None else self.owner.to(device)

    def same(self, other: Space) -> bool:
        """Whether the rows of another space belong to the same examples in the same order, be it of another forward."""
        if self is other:
            return True
        if self.rows != other.rows or (self.owner is None) != (other.owner is None):
            return self.rows == other.rows == 1 and bool(self.owners()[0] == other.owners()[0])
        if self.owner is None:
            return True
        return torch.equal(self.owners(), other.owners())


class Place:
    """Where one tensor holds the rows of a space.

    Attributes:
        space: The rows.
        axis: The axis that counts them; ``None`` if there is just one row, to which everything belongs, or none at all.
        outer: How many times the rows are repeated on this axis.
        inner: How many entries follow each other in a row.
    """

    __slots__ = ("axis", "inner", "outer", "space")

    def __init__(self, space: Space, axis: int | None, outer: int = 1, inner: int = 1) -> None:
        """The axis has ``outer * space.rows * inner`` entries; with fewer than two rows it does not matter."""
        self.space, self.axis = space, axis if space.rows > 1 else None
        self.outer, self.inner = outer, inner

    @property
    def size(self) -> int:
        """Entries on the axis."""
        return self.outer * self.space.rows * self.inner

    def at(self, axis: int) -> Place:
        """The same on another axis."""
        return Place(self.space, axis, self.outer, self.inner)

    def agrees(self, other: Place) -> bool:
        """Whether another place divides its axis into the same rows, wherever that axis is."""
        return (self.outer, self.inner) == (other.outer, other.inner) and self.space.same(other.space)

    def row_of_entry(self, device: Any = "cpu") -> Tensor:
        """Row of each entry of the axis, ``[outer * M * inner]``."""
        rows = torch.arange(self.space.rows, device=device).view(1, -1, 1)
        return rows.expand(self.outer, -1, self.inner).reshape(-1)

    def owner_of_entry(self, device: Any = "cpu") -> Tensor:
        """Example of each entry of the axis, ``[outer * M * inner]``."""
        return self.space.owners(device)[self.row_of_entry(device)]

    def rows_first(self, tensor: Tensor) -> Tensor:
        """``[M, ...]``: rows on axis 0, what was folded around them on axes of its own."""
        if self.axis is None:
            return tensor.unsqueeze(0)
        if self.outer == self.inner == 1:
            return tensor.movedim(self.axis, 0) if self.axis else tensor
        split = tensor.unflatten(self.axis, (self.outer, self.space.rows, self.inner))
        return split.movedim(self.axis + 1, 0)

    def sliced(self, tensor: Tensor) -> Tensor:
        """``[M, *shape of one row]``: axis 0 counts the rows, and the axis keeps what was folded around them."""
        if self.axis is None:
            return tensor.unsqueeze(0)
        return self.rows_first(tensor).flatten(self.axis + 1, self.axis + 2) if self.folded else self._thin(tensor)

    def _thin(self, tensor: Tensor) -> Tensor:
        assert self.axis is not None
        return tensor.movedim(self.axis, 0).unsqueeze(self.axis + 1)

    def each(self, axis: int, size: int) -> Place:
        """The same with every entry of an axis of this size as a row of its own."""
        if self.axis is None:
            if size == self.space.rows:
                return self
            owner = self.space.owners()[:1].expand(size)
            return Place(Space(self.space.record, size, owner, self.space.made), axis)
        if not self.folded:
            return self
        return Place(Space(self.space.record, self.size, self.owner_of_entry(), self.space.made), axis)

    @property
    def folded(self) -> bool:
        """Whether other axes are folded into that of the rows."""
        return self.outer != 1 or self.inner != 1

    def __repr__(self) -> str:
        """For messages and tables: ``axis 0``, ``axis 1 [2 x N x 4]``."""
        if self.axis is None:
            return "one row" if self.space.rows == 1 else "empty"
        rows = "N" if self.space.owner is None else f"{self.space.rows} rows"
        parts = [str(self.outer)] * (self.outer > 1) + [rows] + [str(self.inner)] * (self.inner > 1)
        return f"axis {self.axis}" + (f" [{' x '.join(parts)}]" if len(parts) > 1 or rows != "N" else "")


class Lost:
    """A tensor that depends on the batch, but in which the examples cannot be told apart.

    Attributes:
        record: The forward.
        where: The operation and the module.
        why: What went wrong there.
        mixes: Whether examples were seen to be mixed, as opposed to an axis that cannot be known.
        error: What is to be raised, where it is known already.
        meets: Whether rows of different examples met before they were joined, so that a single number of them is no
            sum of what each has of its own.
        beside: Whether its entries are single numbers, such as losses, that were put beside each other.
    """

    __slots__ = ("beside", "error", "meets", "mixes", "record", "where", "why")

    def __init__(
        self, record: Any, where: str, why: str, mixes: bool, error: Exception | None = None, *, meets: bool = False
    ) -> None:
        """Remember where it happened first; what is computed from the tensor is lost for the same reason."""
        self.record, self.where, self.why, self.mixes, self.error = record, where, why, mixes, error
        self.meets, self.beside = meets, False

    def whose_entries_are(self, beside: bool) -> Lost:
        """The same, as what is lost in another tensor."""
        lost = Lost(self.record, self.where, self.why, self.mixes, self.error, meets=self.meets)
        lost.beside = beside
        return lost

    def __repr__(self) -> str:
        """For tables."""
        return "mixed" if self.mixes else "unknown"


def reshaped(place: Place, before: torch.Size, after: torch.Size) -> Place | None:
    """The place after a reshape: entries keep their order, so the step from row to row stays what it was.

    Returns:
        The place, or ``None`` if no single axis of the new shape counts the rows.
    """
    if place.axis is None:
        return place
    rows = place.space.rows
    step = place.inner * before[place.axis + 1 :].numel()  # entries from one row to the next
    suffix = 1
    for axis in range(len(after) - 1, -1, -1):
        size = after[axis]
        if suffix <= step < suffix * size:
            inner, rest = divmod(step, suffix)
            if rest or size % (inner * rows):
                return None
            return Place(place.space, axis, size // (inner * rows), inner)
        suffix *= size
    return None


def widened(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    """A shape with as many axes, as broadcasting makes it."""
    return (1,) * (dims - len(shape)) + tuple(shape)


def broadcast(places: list[tuple[Place, torch.Size]], shape: torch.Size) -> Place | None:
    """The place of an elementwise result, whose axes are aligned from the right with those of its arguments.

    Returns:
        The place, or ``None`` if the arguments do not agree.
    """
    first: Place | None = None
    for place, own in places:
        if place.axis is None:
            aligned = place
        else:
            axis = place.axis + len(shape) - len(own)
            if axis < 0 or own[place.axis] != shape[axis]:
                return None
            aligned = place.at(axis)
        if first is None:
            first = aligned
        elif first.axis != aligned.axis or not first.agrees(aligned):
            return None
    return first


def entry_owners(t: Tensor, place: Place | None) -> Tensor:
    """Example of each entry, in the tensor's shape."""
    if place is None:
        return torch.full((), -1, device=t.device).expand(t.shape)
    if place.axis is None:
        owner = place.space.owners(t.device)
        return (owner[0] if owner.numel() else torch.full((), -1, device=t.device)).expand(t.shape)
    shape = [1] * t.dim()
    shape[place.axis] = -1
    return place.owner_of_entry(t.device).view(shape).expand(t.shape)


def from_owners(owner: Tensor, whole: Space, made: str = "", *, one_example: bool = True) -> Place | None:
    """The place of a tensor whose entries are the examples they belong to, -1 for none.

    Args:
        owner: Integers of the tensor's shape.
        whole: The space of all examples, used where the rows turn out to be these.
        made: The operation that has chosen the entries.
        one_example: Whether entries of nobody beside those of a single example are taken to be its own.

    Returns:
        The place; ``None`` if more than one axis is needed to tell the examples.
    """
    if whole.rows <= 1:
        return Place(whole, None)
    known = owner[owner >= 0]
    written = known.numel() < owner.numel() and not one_example
    if known.numel() == 0 or (not written and bool((known == known[0]).all())):
        one = known[:1].cpu() if known.numel() else torch.full((1,), -1, device="cpu")
        alone = Space(whole.record, 1, one, made)
        return Place(alone if known.numel() == owner.numel() else alone.with_constants(), None)
    for axis in range(owner.dim()):
        flat = owner.movedim(axis, 0).reshape(owner.shape[axis], -1)
        top = flat.amax(1)
        if bool(((flat == top.unsqueeze(1)) | (flat < 0)).all()):
            return _regular(top, axis, whole) or Place(Space(whole.record, top.numel(), top, made), axis)
    return None


def _regular(owner: Tensor, axis: int, whole: Space) -> Place | None:
    """A place in the space of all examples, if the owners repeat 0 ... N-1 in order, where they are known."""
    # A constant may have been written over all that was an example's: its owner is then the one that is missing.
    size, n = owner.numel(), whole.rows
    if n < 2 or size % n or whole.owner is not None:
        return None
    known, found = owner >= 0, []
    if size > n and size in whole.record.other_axes and owner[known].unique().numel() == 1:
        return None  # a tensor that is as long as an example may be that of one alone
    for inner in (i for i in range(1, size // n + 1) if size // n % i == 0):
        place = Place(whole, axis, size // (n * inner), inner)
        if torch.equal(place.row_of_entry(owner.device)[known], owner[known]):
            found.append(place)
    return found[0] if len(found) == 1 else None
