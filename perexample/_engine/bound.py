"""A bound on what is held until the clip factors are known, and what earlier backwards have shown of its use."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from .tap import Tap

_NEEDED: dict[Hashable, int] = {}  # bytes that all of a backward would have held, by its form
_MOST = 1024


def form_of(taps: Iterable[Tap], n: int, strategy: str) -> Hashable:
    """What the memory of a backward depends on."""
    return n, strategy, tuple((tap.name, type(tap.rule), tap.shapes, *tap.outputs) for tap in taps)


class Bound:
    """How much may be held in one backward.

    What does not fit comes back in a second backward, for which the graph must be kept, with all its activations. The
    first backward of a form holds what fits; in later ones it is known whether all does. Then no graph is kept; or else
    nothing is held, since the graph holds as much already.

    Args:
        most: Bytes.
        form: See `form_of`.

    Attributes:
        fits: Whether all that is to be held fits; ``None`` if no backward has shown it yet.
    """

    def __init__(self, most: int, form: Hashable) -> None:
        """Nothing is held yet."""
        needed = _NEEDED.get(form)
        self.most, self.form, self.fits = most, form, None if needed is None else needed <= most
        self._held = self._needed = 0

    def takes(self, size: int) -> bool:
        """Whether so many bytes more are to be held."""
        self._needed += size
        if self.fits is None and self._held + size <= self.most:
            self._held += size
            return True
        return self.fits is True or size == 0

    def remember(self) -> None:
        """Keep in mind what the backward would have held."""
        if len(_NEEDED) >= _MOST:
            _NEEDED.clear()
        _NEEDED[self.form] = self._needed


def forget_bounds() -> None:
    """Forget what backwards have shown."""
    _NEEDED.clear()
