"""Gram matrices of inputs that several calls share, as the layers for queries, keys and values do: formed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor


class Grams:
    """``x x^T`` of each input that several calls of one kind have kept, for as long as one of these is to come.

    Args:
        kept: The kind of each call, and what it has kept. Calls of other kinds may want nothing of the sort.
    """

    def __init__(self, kept: Mapping[Hashable, tuple[Hashable, Iterable[Tensor]]]) -> None:
        """Find out which tensors are kept more than once, by where they lie in memory."""
        self._users: dict[int, int] = {}
        self._calls: dict[Hashable, set[int]] = {}
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        places = [
            ((t.data_ptr(), kind), call)
            for call, (kind, tensors) in kept.items()
            for t in tensors
            if _lies_somewhere(t)
        ]
        if len({place for place, _ in places}) < len(places):  # mostly not so
            self._count(set(places))

    def _count(self, places: set[tuple[tuple[int, Hashable], Hashable]]) -> None:
        counts = Counter(place for place, _ in places)
        for (place, kind), call in places:
            if counts[place, kind] > 1:
                self._calls.setdefault(call, set()).add(place)
        self._users = dict(Counter(place for own in self._calls.values() for place in own))

    def __bool__(self) -> bool:
        """Whether anything is shared."""
        return bool(self._users)

    def of(self, x: Tensor) -> Tensor | None:
        """``x x^T`` of ``[..., T, I]``; ``None`` if nobody shares x, or it would take more room than x."""
        place = x.data_ptr()
        if place not in self._users or x.shape[-2] > x.shape[-1]:
            return None
        if place not in self._found:
            if self._users[place] < 2:
                return None
            self._found[place] = x, x @ x.mT  # with x, so that nothing else can come to lie there
        known, gram = self._found[place]
        same = (x.shape, x.stride(), x.dtype) == (known.shape, known.stride(), known.dtype)
        return gram if same else None

    def done(self, call: Hashable) -> None:
        """A call is over."""
        for place in self._calls.pop(call, ()):
            self._users[place] -= 1
            if not self._users[place]:
                del self._users[place]
                self._found.pop(place, None)


def _lies_somewhere(t: Tensor) -> bool:
    """Whether a tensor has a place in memory, as sparse ones and those of other classes do not."""
    return type(t) is Tensor and t.layout is torch.strided and t.numel() > 0
