"""Gram matrices of inputs that several calls share, as the layers for queries, keys and values do: formed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

from torch import Tensor


class Grams:
    """``x x^T`` of each input that more than one call has kept, for as long as one of these is to come.

    Args:
        kept: What each call has kept.
    """

    def __init__(self, kept: Mapping[Hashable, Iterable[Tensor]]) -> None:
        """Find out which tensors are kept more than once, by where they lie in memory."""
        places = {call: {t.data_ptr() for t in tensors if t.numel()} for call, tensors in kept.items()}
        counts = Counter(place for own in places.values() for place in own)
        self._users = {place: count for place, count in counts.items() if count > 1}
        self._calls = {call: shared for call, own in places.items() if (shared := own & self._users.keys())}
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def __bool__(self) -> bool:
        """Whether anything is shared."""
        return bool(self._users)

    def of(self, x: Tensor) -> Tensor | None:
        """``x x^T`` of ``[..., T, I]``; ``None`` if it is wanted only once, or would take more room than x."""
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
        """A call has its norms."""
        for place in self._calls.pop(call, ()):
            self._users[place] -= 1
            if not self._users[place]:
                del self._users[place]
                self._found.pop(place, None)
