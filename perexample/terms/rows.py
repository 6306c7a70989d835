"""Terms of few rows of a table: embeddings."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from .._looks import blind, look
from .._norms import BLOCK, Inner, gram_drift, squared_norms
from .._trust import direct, inner
from ..errors import RuleContractError
from ..methods import Method
from .base import Term, remembering
from .grouping import MANY, padded_rows, rows_in_order, rows_together
from .outer import Outer


class Rows(Term):
    """Gradients that touch few rows of a table: ``G_n = sum over m with example_m = n of e_{id_m} row_m^T``.

    Args:
        example: Example of each entry, ``[M]``.
        ids: Row of the table that the entry touches, ``[M]``.
        rows: What is added there, ``[M, E]``.
        n: Number of examples.
        shape: Shape of the table, ``[V, E]``.

    Raises:
        RuleContractError: If the entries do not fit each other or the table.

    Example:
        >>> from perexample.terms import Rows
        >>> ids, g = torch.tensor([[0, 2], [1, 1]]), torch.ones(2, 2, 3)  # two examples that look up two rows each
        >>> example = torch.arange(2).repeat_interleave(2)
        >>> Rows(example, ids.flatten(), g.flatten(0, 1), 2, torch.Size([4, 3])).dense()[:, :, 0]
        tensor([[1., 0., 1., 0.],
                [0., 2., 0., 0.]])
    """

    def __init__(self, example: Tensor, ids: Tensor, rows: Tensor, n: int, shape: Size) -> None:
        """Keep the entries."""
        fits = len(shape) == 2 and ids.dim() == 1 and tuple(rows.shape) == (*ids.shape, *shape[1:])
        if not fits or example.shape != ids.shape:
            raise RuleContractError(
                f"Rows takes example [M], ids [M] and rows [M, E] for a table of shape [V, E], and was given "
                f"{list(example.shape)}, {list(ids.shape)} and {list(rows.shape)} for one of shape {list(shape)}; "
                f"flatten the positions: ids.flatten(), g.flatten(0, -2)."
            )
        self.example, self.ids, self.rows, self.n, self.shape = example, ids, rows, n, shape
        self.many = False  # whether so many rows meet that they are added in float64; found out with the norms

    def factors(self) -> list[Tensor]:
        """What is added to the rows."""
        return [self.rows]

    def _summed(self) -> tuple[Tensor, Tensor]:
        """Entries that meet in one row of one example added up: flat positions ``[U]`` and rows ``[U, E]``."""
        look("how many rows of a table were touched depends on the ids")
        flat = self.example * self.shape[0] + self.ids
        where, inverse, counts = torch.unique(flat, return_inverse=True, return_counts=True)
        self.many = bool(len(counts)) and counts.max().item() > MANY
        rows = self.rows.double() if self.many else self.rows
        return where, rows.new_zeros(where.shape[0], self.shape[1]).index_add_(0, inverse, rows)

    def dense(self) -> Tensor:
        """The gradients themselves; N times the size of the table."""
        out = self.rows.new_zeros(self.n * self.shape[0], self.shape[1])
        out.index_add_(0, self.example * self.shape[0] + self.ids, self.rows)
        return out.reshape(self.n, *self.shape)

    def select(self, rows: Tensor) -> Rows:
        """Some examples only."""
        rows = rows.to(self.example.device)
        kept = rows[self.example]
        renumbered = torch.cumsum(rows, 0) - 1
        example = renumbered[self.example[kept]]
        some = Rows(example, self.ids[kept], self.rows[kept], int(rows.sum()), self.shape)
        some.many = self.many
        return some

    def double(self) -> Rows:
        """In float64."""
        return Rows(self.example, self.ids, self.rows.double(), self.n, self.shape)

    def regrouped(self, owner: Tensor, n: int) -> Rows:
        """The entries of the rows, counted to their examples."""
        example = owner.to(self.example.device)[self.example]
        kept = example >= 0
        return Rows(example[kept], self.ids[kept], self.rows[kept], n, self.shape)

    def _per_example(self, values: Tensor, example: Tensor) -> Tensor:
        return values.new_zeros(self.n).index_add_(0, example, values)

    def magnitude(self) -> Tensor:
        """Sum of the norms of the entries."""
        return self._per_example(torch.linalg.vector_norm(self.rows, dim=1).double(), self.example)

    def methods(self) -> list[Method]:
        """From the rows that were touched, never over the whole table."""
        if blind():
            return [Method("inner products of the rows of each example", self._by_inner_products)]
        return [Method("rows that were touched", self._norms)]

    def _side_by_side(self) -> tuple[Tensor, Tensor]:
        """Ids ``[N, K]`` and rows ``[N, K, E]`` of each example, without a look at any value."""
        together = rows_together(self.example, self.n)
        assert together is not None
        return together(self.ids), together(self.rows)

    def _by_inner_products(self) -> tuple[Tensor, Term]:
        """``sum over m, k of example n with id_m = id_k of <row_m, row_k>``; sizes do not depend on the ids."""
        ids, rows = self._side_by_side()
        same = ids.unsqueeze(1) == ids.unsqueeze(2)
        l2 = (rows @ rows.mT).mul_(same).sum(2).sum(1, dtype=torch.float64).clamp_min_(0.0)
        self.many = True
        off = gram_drift(self.dtype, self.shape[1])
        return remembering(self, inner(self, Inner(l2, self.magnitude(), rows.shape[1] ** 2, off)))

    def _norms(self) -> tuple[Tensor, Term]:
        where, summed = self._summed()
        l2 = self._per_example(squared_norms(summed), where // self.shape[0])
        return remembering(self, direct(self, l2))

    def weighted_sum(self, w: Tensor) -> Tensor:
        """One scatter into the table."""
        out = self.rows.new_zeros(self.shape)
        if not self.many:
            return out.index_add_(0, self.ids, self.rows * w[self.example].unsqueeze(1))
        if blind():
            weighted = self.rows.double() * w[self.example].unsqueeze(1)
            return out.double().index_add_(0, self.ids, weighted).to(out.dtype)
        where, summed = self._summed()
        weighted = summed * w[where // self.shape[0]].unsqueeze(1)
        return out.index_add_(0, where % self.shape[0], weighted.to(out.dtype))

    def _table(self) -> Tensor:
        """The entries of each example, ``[N, K]``."""
        each = rows_in_order(self.example, self.n)
        if each:
            return torch.arange(self.n * each, device=self.example.device).view(self.n, each)
        return padded_rows(self.example, self.n)

    def inner(self, other: Outer) -> Tensor:
        """``<G_n, G'_n>`` with an `Outer` of the same table, as of a tied output layer, ``[N]``, float64."""
        table = self._table()  # [N, K]
        left, right = other.g[:, 0], other.x[:, 0]  # [N, S, V] and [N, S, E]
        sums, block = [], max(1, BLOCK // max(1, table.shape[1] * (right.shape[1] + right.shape[2])))
        for entries, g, x in zip(table.split(block), left.split(block), right.split(block), strict=True):
            rows = self.rows[entries.clamp_min(0)].masked_fill((entries < 0).unsqueeze(2), 0)
            ids = self.ids[entries.clamp_min(0)].unsqueeze(1).expand(-1, g.shape[1], -1)
            sums.append((x @ rows.mT).mul_(g.gather(2, ids)).sum((1, 2), dtype=torch.float64))
        return torch.cat(sums) if sums else left.new_zeros(0, dtype=torch.float64)
