"""Terms of outer products: linear layers, and all that can be written as one."""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Size, Tensor

from .._norms import gram_norms, norms_of, norms_of_each, short_drift, summed_products
from .._trust import TRUSTED, inner, unit_of_products
from ..errors import RuleContractError
from ..methods import Method, sameness
from .base import Formed, Term, blockwise, keeping, remembering
from .grouping import rows_together

_GRAM = "Gram matrices of the positions"
_KEPT, _DROPPED = "per-example gradients, kept", "per-example gradients"


class Outer(Term):
    """Sum over positions of outer products: ``G_n[group] = sum_t g_nt x_nt^T``.

    Args:
        g: Left factors, ``[N, groups, T, O]``; `positions` makes this of ``[N, *T, O]``, without groups.
        x: Right factors, ``[N, groups, T, I]``.
        shape: Shape of the parameter, with ``groups * O * I`` elements in that order.

    Raises:
        RuleContractError: If the factors have other axes, or do not fit each other or the shape.

    Example:
        >>> from perexample.terms import Outer, positions
        >>> g, x = torch.randn(8, 5, 3), torch.randn(8, 5, 4)  # of a linear layer at five positions
        >>> Outer(positions(g), positions(x), torch.Size([3, 4])).dense().shape
        torch.Size([8, 3, 4])

    Cost:
        Norms by the Gram matrices of the positions take ``2 T^2 (O + I)`` operations and ``T^2`` memory per example,
        by the gradients themselves ``2 T O I`` and ``O I``; the cheaper one is taken.
    """

    def __init__(self, g: Tensor, x: Tensor, shape: Size) -> None:
        """Keep the factors."""
        if g.dim() != 4 or x.dim() != 4 or g.shape[:3] != x.shape[:3]:
            raise RuleContractError(
                f"Outer takes factors [N, groups, T, O] and [N, groups, T, I], and was given {list(g.shape)} and "
                f"{list(x.shape)}; perexample.terms.positions makes [N, 1, T, F] of [N, *T, F]."
            )
        left, right = g.shape[1] * g.shape[3], x.shape[3]
        if left * right != math.prod(shape) or left not in accumulate(shape, mul, initial=1):
            raise RuleContractError(
                f"Outer was given {left} left and {right} right factors for a parameter of shape {list(shape)}: its "
                f"first axes are those of the left factors, and the others those of the right ones."
            )
        self.g, self.x, self.n, self.shape = g, x, g.shape[0], shape

    def factors(self) -> list[Tensor]:
        """Both."""
        return [self.g, self.x]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, O and I; terms that agree in them can be joined along T."""
        return self.g.shape[1], self.g.shape[3], self.x.shape[3]

    def dense(self) -> Tensor:
        """The gradients themselves, one batched product."""
        return summed_products(self.g, self.x).reshape(self.n, *self.shape)

    def select(self, rows: Tensor) -> Term:
        """Some examples only."""
        rows = rows.to(self.g.device)
        return Outer(self.g[rows], self.x[rows], self.shape)

    def double(self) -> Outer:
        """In float64."""
        return Outer(self.g.double(), self.x.double(), self.shape)

    def regrouped(self, owner: Tensor, n: int) -> Term:
        """The rows of an example become positions of it, unless that would fill up much."""
        together = rows_together(owner, n)
        if together is None:
            return super().regrouped(owner, n)

        def positions_of(rows: Tensor) -> Tensor:
            return together(rows).transpose(1, 2).flatten(2, 3)  # from [N, K, groups, T, ...]

        return Outer(positions_of(self.g), positions_of(self.x), self.shape)

    def magnitude(self) -> Tensor:
        """``sum_t |g_nt| |x_nt|``."""
        return (norms_of(self.g) * norms_of(self.x)).sum((1, 2))

    def magnitude_bound(self) -> Tensor:
        """``|g_n| |x_n|``, by Cauchy and Schwarz."""
        return norms_of_each(self.g) * norms_of_each(self.x)

    def methods(self) -> list[Method]:
        """Gram matrices of the positions, or the gradients, which are kept or not."""
        groups, o, i = self.sizes
        n, positions = self.n, self.g.shape[2]
        if positions == 1:
            return [Method("product of the factors' norms", self._of_one_position, held=self._held)]
        rows, size = n * groups * positions, n * groups * o * i
        gram = Method(
            _GRAM, self._by_gram, rows * positions * (o + i) + rows * o * i, rows * (3 * positions + o), calls=6,
            held=self._held,
        )  # fmt: skip
        keep = Method(_KEPT, self._kept, rows * o * i, 2 * size, calls=3, held=size)
        drop = Method(_DROPPED, self._dropped, 2 * rows * o * i, size + rows * o, calls=4, held=self._held)
        return [gram, keep, drop] if positions * self.unit() < TRUSTED else [keep, drop]

    def sameness(self) -> Any:
        """The factors' sizes and how they lie."""
        if self.g.shape[2] == 1 or type(self).methods is not Outer.methods:
            return None
        return type(self), self.shape, sameness(self.g), sameness(self.x)

    def run(self, name: str) -> tuple[Tensor, Term]:
        """One of the methods."""
        own = {_GRAM: self._by_gram, _KEPT: self._kept, _DROPPED: self._dropped}
        return own[name]() if name in own else super().run(name)

    @property
    def _held(self) -> int:
        return self.g.numel() + self.x.numel()

    def unit(self) -> float:
        """By the lengths of the products."""
        _, o, i = self.sizes
        return unit_of_products(self.g.dtype, self.g.shape[2], o, i)

    def drift(self) -> float:
        """By the length of the products."""
        return short_drift(self.g.shape[2], self.g)

    def _of_one_position(self) -> tuple[Tensor, Term]:
        if self.g.shape[1] == 1:
            return (norms_of(_flat(self.g)) * norms_of(_flat(self.x))).square(), self
        return (norms_of(self.g) * norms_of(self.x)).square().sum((1, 2)), self

    def _by_gram(self) -> tuple[Tensor, Term]:
        of_x = None if self.grams is None else self.grams.of(self.x)
        return remembering(self, inner(self, gram_norms(self.g, self.x, of_x)))

    def _kept(self) -> tuple[Tensor, Term]:
        value = summed_products(self.g, self.x).reshape(1, self.n, -1)
        return keeping(self, Formed(value, self.shape))

    def _dropped(self) -> tuple[Tensor, Term]:
        return blockwise(self, lambda term: term.dense())

    def weighted_sum(self, w: Tensor) -> Tensor:
        """One matrix product over all examples and positions; no per-example gradient is formed."""
        if self.g.shape[1] == self.g.shape[2] == 1:
            g, x, w = _flat(self.g), _flat(self.x), w.unsqueeze(1)
            if x.shape[1] < g.shape[1]:
                return (g.T @ (x * w)).view(self.shape)
            return ((g * w).T @ x).view(self.shape)
        if self.g.shape[1] == 1:
            g, x = _weighted_side_by_side(self.g, self.x, w.to(self.g.dtype))
            return (g.T @ x).reshape(self.shape)
        if self.x.shape[-1] < self.g.shape[-1]:  # the smaller factor takes the weights
            return torch.einsum("ngto,ngti->goi", self.g, self.x * w.view(-1, 1, 1, 1)).reshape(self.shape)
        return torch.einsum("ngto,ngti->goi", self.g * w.view(-1, 1, 1, 1), self.x).reshape(self.shape)

    def batch_dot(self) -> Tensor:
        """For a single position the product of two Gram matrices of the batch."""
        if self.g.shape[2] != 1:
            return super().batch_dot()
        g, x = self.g.squeeze(2).transpose(0, 1), self.x.squeeze(2).transpose(0, 1)
        return ((g @ g.mT) * (x @ x.mT)).sum(0)


def positions(tensor: Tensor) -> Tensor:
    """``[N, *T, F]`` as ``[N, 1, T, F]``, the layout of `Outer` without groups.

    Args:
        tensor: Factors of all positions; of one where there is no axis of them.

    Returns:
        The same entries in the same order.
    """
    return tensor[:, None, None] if tensor.dim() == 2 else tensor.flatten(1, -2).unsqueeze(1)


def _flat(factor: Tensor) -> Tensor:
    """A factor of one group and position as a matrix; indices would take longer."""
    return factor.reshape(factor.shape[0], factor.shape[3])


@torch.no_grad()  # as it writes into a tensor in the order that is wanted
def _weighted_side_by_side(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, 1, T, O]`` and ``[N, 1, T, I]`` as matrices of all positions, one of them times the weights ``[N]``.

    Args:
        g: The left factor.
        x: The right one.
        w: The weights.

    Returns:
        Both, in the order of positions in which the larger lies in memory; the smaller has taken the weights.
    """
    larger, w = g if g.shape[3] > x.shape[3] else x, w.view(-1, 1, 1, 1)
    if larger.stride(0) < larger.stride(2):  # the examples follow each other, as in models that have time first
        g, x, w = g.transpose(0, 2), x.transpose(0, 2), w.transpose(0, 2)
    if g.shape[3] > x.shape[3]:
        x = torch.mul(x, w, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    else:
        g = torch.mul(g, w, out=torch.empty(g.shape, dtype=g.dtype, device=g.device))
    return g.reshape(-1, g.shape[3]), x.reshape(-1, x.shape[3])
