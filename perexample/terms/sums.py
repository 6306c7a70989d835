"""Terms of one parameter from several taps, added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._norms import Inner, gram_drift
from .._trust import inner
from ..methods import Method
from .base import Dense, Term, blockwise, remembering
from .outer import Outer
from .rows import Rows


class Sum(Term):
    """Terms of different kinds for one parameter, added."""

    def __init__(self, parts: Sequence[Term]) -> None:
        """Keep the parts, which all have the same N and shape."""
        self.parts, self.n, self.shape = list(parts), parts[0].n, parts[0].shape

    def factors(self) -> list[Tensor]:
        """Those of all parts."""
        return [t for part in self.parts for t in part.factors()]

    def dense(self) -> Tensor:
        """The gradients themselves."""
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return total

    def select(self, rows: Tensor) -> Sum:
        """Some examples only."""
        return Sum([part.select(rows) for part in self.parts])

    def double(self) -> Sum:
        """In float64."""
        return Sum([part.double() for part in self.parts])

    def magnitude(self) -> Tensor:
        """Sum of the magnitudes of the parts."""
        return torch.stack([part.magnitude() for part in self.parts]).sum(0)

    def magnitude_bound(self) -> Tensor:
        """Sum of the bounds of the parts."""
        return torch.stack([part.magnitude_bound() for part in self.parts]).sum(0)

    def methods(self) -> list[Method]:
        """For a tied embedding and output layer through their cross term, for anything else the gradients."""
        rows, outer = self.parts[0], self.parts[-1]
        if len(self.parts) == 2 and isinstance(rows, Rows) and isinstance(outer, Outer) and outer.g.shape[1] == 1:
            return [Method("norms of the parts and their inner product", self._of_the_parts)]
        return [Method("per-example gradients", lambda: blockwise(self, lambda term: term.dense()))]

    def unit(self) -> float:
        """That of the parts."""
        return max(part.unit() for part in self.parts)

    def drift(self) -> float:
        """That of the parts."""
        return max(part.drift() for part in self.parts)

    def _of_the_parts(self) -> tuple[Tensor, Term]:
        rows, outer = self.parts
        assert isinstance(rows, Rows)
        assert isinstance(outer, Outer)
        l2, off = rows.batch_l2() + 2 * rows.inner(outer), gram_drift(self.dtype, self.shape[1])
        return remembering(self, inner(self, Inner(l2 + outer.batch_l2(), self.magnitude_bound(), 0, off)))

    def weighted_sum(self, w: Tensor) -> Tensor:
        """Sum of the weighted sums of the parts."""
        total = self.parts[0].weighted_sum(w)
        for part in self.parts[1:]:
            total = total + part.weighted_sum(w)
        return total


def combine(terms: Sequence[Term]) -> Term:
    """Add the terms of all taps of one parameter: like ones are joined, the rest becomes a `Sum`."""
    if len(terms) == 1:
        return terms[0]
    outers: dict[tuple[int, int, int], list[Outer]] = {}
    rows: list[Rows] = []
    rest: list[Term] = []
    for term in map(_unfolded, terms):
        if isinstance(term, Outer):
            outers.setdefault(term.sizes, []).append(term)
        elif isinstance(term, Rows):
            rows.append(term)
        else:
            rest.append(term)
    joined: list[Term] = [_joined_rows(rows)] if rows else []
    joined += [_summed_dense(rest)] if rest else []
    joined += [_joined_outers(like) for like in outers.values()]
    return joined[0] if len(joined) == 1 else Sum(joined)


def _unfolded(term: Term) -> Term:
    """A convolution as outer products, so that it can be joined with others."""
    return term.unfolded() if hasattr(term, "unfolded") else term


def _joined_outers(like: list[Outer]) -> Outer:
    if len(like) == 1:
        return like[0]
    return Outer(torch.cat([t.g for t in like], 2), torch.cat([t.x for t in like], 2), like[0].shape)


def _joined_rows(like: list[Rows]) -> Rows:
    first = like[0]
    example = torch.cat([t.example for t in like])
    ids, rows = torch.cat([t.ids for t in like]), torch.cat([t.rows for t in like])
    return Rows(example, ids, rows, first.n, first.shape)


def _summed_dense(rest: list[Term]) -> Term:
    return rest[0] if len(rest) == 1 else Dense(torch.stack([t.dense() for t in rest]).sum(0))
