"""Gradients of a tensor each of whose entries belongs to one example, as those of positions looked up for every one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._looks import holds
from .._norms import norms_of
from ..methods import Method
from .base import Term


class Placed(Term):
    """``G_n`` is ``value`` where an axis counts entries of example n, and zero elsewhere; N times smaller than `Dense`.

    Args:
        value: The gradients of all examples, in the shape of the parameter.
        axis: The axis that counts the examples' entries.
        owner: Example of each entry on that axis, -1 for none.
        n: Number of examples.
    """

    def __init__(self, value: Tensor, axis: int, owner: Tensor, n: int) -> None:
        """Keep the gradients as they are."""
        self.value, self.axis, self.owner, self.n, self.shape = value, axis, owner, n, value.shape

    def factors(self) -> list[Tensor]:
        """The gradients of all examples."""
        return [self.value]

    def _along(self, entries: Tensor) -> Tensor:
        """One number or truth per entry of the axis, ``[..., size]``, so that it broadcasts against the gradients."""
        return entries.view(*entries.shape, *[1] * (len(self.shape) - self.axis - 1))

    def dense(self) -> Tensor:
        """The gradients themselves."""
        own = self.owner == torch.arange(self.n, device=self.owner.device).unsqueeze(1)  # [N, size]
        shape = [1] * len(self.shape)
        shape[self.axis] = self.owner.numel()
        return torch.where(own.view(self.n, *shape), self.value, 0)

    def select(self, rows: Tensor) -> Placed:
        """Some examples only; the entries of the others belong to nobody."""
        rows = rows.to(self.owner.device)
        numbers = torch.where(rows, torch.cumsum(rows, 0) - 1, -1)
        return Placed(self.value, self.axis, self._renamed(numbers), int(rows.sum()))

    def double(self) -> Placed:
        """In float64."""
        return Placed(self.value.double(), self.axis, self.owner, self.n)

    def regrouped(self, owner: Tensor, n: int) -> Placed:
        """The entries of the rows, counted to their examples."""
        return Placed(self.value, self.axis, self._renamed(owner.to(self.owner.device)), n)

    def _renamed(self, numbers: Tensor) -> Tensor:
        """What was example n is ``numbers[n]``."""
        if not self.n:
            return self.owner
        return torch.where(self.owner >= 0, numbers[self.owner.clamp_min(0)], -1)

    def methods(self) -> list[Method]:
        """Nothing is added up but squares."""
        return [Method("entries of the examples", lambda: (self._squares(), self))]

    def _squares(self) -> Tensor:
        entries = norms_of(self.value.movedim(self.axis, 0).flatten(1)) if self.value.dim() > 1 else self.value.double()
        known = self.owner >= 0
        squares = entries.new_zeros(self.n)
        return squares.index_add_(0, self.owner[known], entries[known].square())

    def weighted_sum(self, w: Tensor) -> Tensor:
        """Each entry with the weight of its example."""
        if not self.n:
            return torch.zeros_like(self.value)
        total = self.value * self._along(w[self.owner.clamp_min(0)])
        known = self.owner >= 0
        return total if holds(known) else torch.where(self._along(known), total, 0)

    def batch_dot(self) -> Tensor:
        """No two examples share an entry; what is not finite is not zero times zero either."""
        l2 = self._squares()
        dot = (l2 + l2.unsqueeze(1)) * 0
        dot.diagonal().copy_(l2)
        return dot.to(self.value.dtype)

    def like(self, other: Term) -> bool:
        """Whether another term has the entries of each example in the same places."""
        same = isinstance(other, Placed) and (self.axis, self.n, self.shape) == (other.axis, other.n, other.shape)
        return same and torch.equal(self.owner, other.owner)  # type: ignore[attr-defined]


def merged(terms: Sequence[Term]) -> list[Term]:
    """The same sum of fewer terms: those that have the examples in the same places are added."""
    out: list[Term] = []
    for term in terms:
        at = next((i for i, t in enumerate(out) if isinstance(t, Placed) and t.like(term)), None)
        if at is None:
            out.append(term)
        else:
            first = out[at]
            out[at] = Placed(first.value + term.value, first.axis, first.owner, first.n)  # type: ignore[attr-defined]
    return out
