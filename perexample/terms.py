"""Per-example gradients of one parameter at one tap, kept in the form that is cheapest to hold.

A `Term` stands for a tensor ``[N, *p.shape]`` that may never be formed. `Dense` is that tensor; `Outer` is a sum of
outer products over positions (linear layers; convolutions once unfolded); `Rows` touches few rows of a table
(embeddings). `combine` adds the terms of all taps of a parameter, so that a shared weight is exact, cross terms
included, without forming what need not be formed.

Squared norms from Gram matrices (Goodfellow 2015, arXiv:1510.01799, section 4; Li et al. 2022, arXiv:2110.05679,
section 4) cancel in float32 where positions oppose each other. Every such norm is therefore compared with the sum of
the norms of its pieces, and recomputed in float64 where digits may be missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Size, Tensor

from ._norms import BLOCK, gram_norms, norms_of, squared_norms, summed_products


class Term:
    """Per-example gradient ``[N, *shape]`` of one parameter from one tap, not yet evaluated.

    A subclass gives `dense`, `select` and `double`; the rest has defaults derived from these.

    Attributes:
        n: Number of examples N.
        shape: Shape of the parameter.
    """

    n: int
    shape: Size
    doubtful: Tensor | None = None  # examples whose norm was recomputed; their sum must be computed so too

    def dense(self) -> Tensor:
        """The gradients themselves, ``[N, *shape]``."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> Term:
        """The same for some examples only; ``rows`` is a boolean mask ``[N]``."""
        raise NotImplementedError

    def double(self) -> Term:
        """The same in float64."""
        raise NotImplementedError

    def batch_l2(self) -> Tensor:
        """Squared L2 norm of each example's gradient, ``[N]``, in float64."""
        return squared_norms(self.dense())

    def weighted_sum(self, w: Tensor) -> Tensor:
        """``sum_n w_n G_n`` for weights ``[N]``, ``[*shape]``."""
        return torch.tensordot(w, self.dense(), dims=1)

    def batch_dot(self) -> Tensor:
        """Inner products ``<G_n, G_m>``, ``[N, N]``."""
        flat = self.dense().reshape(self.n, self.shape.numel())
        return flat @ flat.T

    def norm_method(self) -> str:
        """How `batch_l2` will be computed, in words."""
        return "per-example gradients"

    def regrouped(self, owner: Tensor, n: int) -> Term:
        """The same with the rows of each example added up: row m belongs to example ``owner[m]``, -1 for none."""
        kept = owner >= 0
        return Regrouped(self, owner, n) if bool(kept.all()) else Regrouped(self.select(kept), owner[kept], n)

    def magnitude(self) -> Tensor:
        """Sum of the norms of the pieces that are added up, ``[N]``, float64; at least the norm itself."""
        return self.batch_l2().sqrt()

    def magnitude_bound(self) -> Tensor:
        """An upper bound of `magnitude` that costs little, ``[N]``, float64."""
        return self.magnitude()


def keeps(gradient: int, factors: int) -> bool:
    """Whether a gradient formed for its norm is kept for the weighted sum: if it takes little more than its factors."""
    return gradient <= 2 * factors


def mended(term: Term, l2: Tensor, pieces: int, limit: float = float("inf")) -> Tensor:
    """Replace norms that cancellation may have spoiled by ones computed in float64.

    The term remembers these examples as ``doubtful``. Rounding errors are proportional to the sum of the norms of the
    pieces. For pieces that do not conspire, its square is about ``pieces`` times the squared norm; where it is far
    more, or more than the proven ``limit``, digits may be missing.

    Returns:
        The squared norms, ``[N]``, float64.
    """
    limit = min(4 * max(pieces, 8), limit)
    doubtful = ~(term.magnitude_bound().square() <= limit * l2) | ~torch.isfinite(l2)
    if doubtful.any():
        some = term.select(doubtful)
        enough = some.magnitude().square() <= limit * l2[doubtful]
        doubtful[doubtful.clone()] = ~enough | ~torch.isfinite(l2[doubtful])
    if doubtful.any():
        term.doubtful = doubtful
        chosen = term.select(doubtful).double()
        parts = [squared_norms(chosen.select(one).dense()) for one in _blocks(chosen)]
        l2 = l2.masked_scatter(doubtful, torch.cat(parts))
    return l2


def _blocks(term: Term) -> list[Tensor]:
    """Masks that cut the examples into blocks whose gradients are small enough to form."""
    per_block = max(1, BLOCK // max(1, term.shape.numel()))
    position = torch.arange(term.n)
    return [(position >= start) & (position < start + per_block) for start in range(0, term.n, per_block)]


class Dense(Term):
    """Gradients that are already there, ``[N, *shape]``."""

    def __init__(self, value: Tensor) -> None:
        """Keep the gradients ``[N, *shape]``."""
        self.value, self.n, self.shape = value, value.shape[0], value.shape[1:]

    def dense(self) -> Tensor:
        """The gradients themselves."""
        return self.value

    def select(self, rows: Tensor) -> Dense:
        """Some examples only."""
        return Dense(self.value[rows.to(self.value.device)])

    def double(self) -> Dense:
        """In float64."""
        return Dense(self.value.double())

    def regrouped(self, owner: Tensor, n: int) -> Dense:
        """Added up at once."""
        owner = owner.to(self.value.device)
        kept = owner >= 0
        value, owner = (self.value, owner) if bool(kept.all()) else (self.value[kept], owner[kept])
        return Dense(value.new_zeros(n, *self.shape).index_add_(0, owner, value))


class Regrouped(Term):
    """Terms of rows, several of which belong to one example: ``G_n = sum over m with owner_m = n of G_m``.

    Args:
        inner: The term of the rows.
        owner: Example of each row, ``[M]``.
        n: Number of examples.
    """

    def __init__(self, inner: Term, owner: Tensor, n: int) -> None:
        """Keep the rows as they are."""
        self.inner, self.owner, self.n, self.shape = inner, owner, n, inner.shape

    def _added(self, values: Tensor, owner: Tensor) -> Tensor:
        return values.new_zeros(self.n, *values.shape[1:]).index_add_(0, owner.to(values.device), values)

    def dense(self) -> Tensor:
        """The gradients themselves; those of the rows are formed block by block."""
        if self.inner.n == 0:
            return self.inner.dense().new_zeros(self.n, *self.shape)
        parts = [self._added(self.inner.select(one).dense(), self.owner[one]) for one in _blocks(self.inner)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def select(self, rows: Tensor) -> Term:
        """Some examples only."""
        rows = rows.to(self.owner.device)
        kept = rows[self.owner]
        renumbered = torch.cumsum(rows, 0) - 1
        return Regrouped(self.inner.select(kept), renumbered[self.owner[kept]], int(rows.sum()))

    def double(self) -> Term:
        """In float64."""
        return Regrouped(self.inner.double(), self.owner, self.n)

    def magnitude(self) -> Tensor:
        """Sum of the magnitudes of the rows."""
        return self._added(self.inner.magnitude(), self.owner)

    def magnitude_bound(self) -> Tensor:
        """Sum of the bounds of the rows."""
        return self._added(self.inner.magnitude_bound(), self.owner)

    def batch_l2(self) -> Tensor:
        """Squared norms of the sums."""
        pieces = int(torch.bincount(self.owner, minlength=1).max()) if self.owner.numel() else 1
        l2 = torch.cat([squared_norms(self.select(one).dense()) for one in _blocks(self)])
        return mended(self, l2, pieces)

    def weighted_sum(self, w: Tensor) -> Tensor:
        """The rows' own weighted sum, each with the weight of its example."""
        return self.inner.weighted_sum(w[self.owner.to(w.device)])


def padded_rows(owner: Tensor, n: int) -> Tensor:
    """Rows of each example, ``[N, K]``, filled up with -1 to the largest number of them."""
    counts = torch.bincount(owner, minlength=n)
    order = torch.argsort(owner, stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.arange(owner.numel(), device=owner.device) - starts[owner[order]]
    table = owner.new_full((n, int(counts.max()) if counts.numel() else 0), -1)
    table[owner[order], column] = order
    return table


class Outer(Term):
    """Sum over positions of outer products: ``G_n[group] = sum_t g_nt x_nt^T``.

    Args:
        g: Left factors, ``[N, groups, T, O]``.
        x: Right factors, ``[N, groups, T, I]``.
        shape: Shape of the parameter, with ``groups * O * I`` elements in that order.

    Cost:
        Norms by the Gram matrices of the positions take ``2 T^2 (O + I)`` operations and ``T^2`` memory per example,
        by the gradients themselves ``2 T O I`` and ``O I``; the cheaper one is taken.
    """

    def __init__(self, g: Tensor, x: Tensor, shape: Size) -> None:
        """Keep the factors."""
        self.g, self.x, self.n, self.shape = g, x, g.shape[0], shape
        self._dense: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, O and I; terms that agree in them can be joined along T."""
        return self.g.shape[1], self.g.shape[3], self.x.shape[3]

    def dense(self) -> Tensor:
        """The gradients themselves, one batched product."""
        if self._dense is not None:
            return self._dense
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
        kept = owner[owner >= 0]
        most = int(torch.bincount(kept).max()) if kept.numel() else 0
        if most * n > 4 * max(owner.numel(), 1) or not most:
            return super().regrouped(owner, n)
        table = padded_rows(torch.where(owner >= 0, owner, n), n + 1)[:n, :most].to(self.g.device)
        missing = (table < 0).view(n, most, 1, 1, 1)

        def positions_of(t: Tensor) -> Tensor:
            rows = t[table.clamp_min(0)].masked_fill(missing, 0)  # [N, K, groups, T, O]
            return rows.transpose(1, 2).flatten(2, 3)

        return Outer(positions_of(self.g), positions_of(self.x), self.shape)

    def magnitude(self) -> Tensor:
        """``sum_t |g_nt| |x_nt|``."""
        return (norms_of(self.g) * norms_of(self.x)).sum((1, 2))

    def magnitude_bound(self) -> Tensor:
        """``|g_n| |x_n|``, by Cauchy and Schwarz."""
        return norms_of(self.g.flatten(1)) * norms_of(self.x.flatten(1))

    def batch_l2(self) -> Tensor:
        """Squared norms, by Gram matrices or by the gradients, mended where float32 cancelled."""
        _, o, i = self.sizes
        positions = self.g.shape[2]
        if positions == 1:
            return (norms_of(self.g) * norms_of(self.x)).square().sum((1, 2))
        # |error| <= (O + I + 2) eps magnitude^2, the last sum being in float64: below 2% of the squared norm it is
        # trusted, and one eps of the magnitude is added so that the norm errs, if at all, upwards.
        eps = torch.finfo(self.g.dtype).eps / 2
        limit = self._limit()
        if self._dense is None and self._few_positions():
            l2 = gram_norms(self.g, self.x) + eps * self.magnitude_bound().square()
            return mended(self, l2, positions, limit)
        return mended(self, self._norms_of_gradients(keeps(o * i, positions * (o + i))), positions)

    def _limit(self) -> float:
        """Number of positions up to which the rounding error of a Gram norm is trusted where nothing cancels."""
        _, o, i = self.sizes
        return 0.02 / ((o + i + 2) * torch.finfo(self.g.dtype).eps / 2)

    def _few_positions(self) -> bool:
        """Whether Gram matrices of the positions cost less than the gradients."""
        _, o, i = self.sizes
        positions = self.g.shape[2]
        return 2 * positions * (o + i) < o * i and positions < self._limit()

    def norm_method(self) -> str:
        """By the number of positions."""
        if self.g.shape[2] == 1:
            return "product of the factors' norms"
        return "Gram matrices of the positions" if self._few_positions() else "per-example gradients"

    def _norms_of_gradients(self, keep: bool) -> Tensor:
        """Form the gradients, all at once where they are kept for the weighted sum, else block by block."""
        if keep:
            self._dense = self.dense()
        if self._dense is not None:
            return squared_norms(self._dense)
        return torch.cat([squared_norms(self.select(rows).dense()) for rows in _blocks(self)])

    def weighted_sum(self, w: Tensor) -> Tensor:
        """One matrix product over all examples and positions; no per-example gradient is formed."""
        if self._dense is not None:
            return super().weighted_sum(w)
        weighted = self.g * w.view(-1, 1, 1, 1)
        if self.g.shape[1] == 1:
            left, right = weighted.reshape(-1, weighted.shape[-1]), self.x.reshape(-1, self.x.shape[-1])
            return (left.T @ right).reshape(self.shape)
        return torch.einsum("ngto,ngti->goi", weighted, self.x).reshape(self.shape)

    def batch_dot(self) -> Tensor:
        """For a single position the product of two Gram matrices of the batch."""
        if self.g.shape[2] != 1:
            return super().batch_dot()
        g, x = self.g.squeeze(2).transpose(0, 1), self.x.squeeze(2).transpose(0, 1)
        return ((g @ g.mT) * (x @ x.mT)).sum(0)


class Rows(Term):
    """Gradients that touch few rows of a table: ``G_n = sum over m with example_m = n of e_{id_m} row_m^T``.

    Args:
        example: Example of each entry, ``[M]``.
        ids: Row of the table that the entry touches, ``[M]``.
        rows: What is added there, ``[M, E]``.
        n: Number of examples.
        shape: Shape of the table, ``[V, E]``.
    """

    def __init__(self, example: Tensor, ids: Tensor, rows: Tensor, n: int, shape: Size) -> None:
        """Keep the entries."""
        self.example, self.ids, self.rows, self.n, self.shape = example, ids, rows, n, shape

    def _summed(self) -> tuple[Tensor, Tensor]:
        """Entries that meet in one row of one example added up: flat positions ``[U]`` and rows ``[U, E]``."""
        where, inverse = torch.unique(self.example * self.shape[0] + self.ids, return_inverse=True)
        summed = self.rows.new_zeros(where.shape[0], self.shape[1])
        return where, summed.index_add_(0, inverse, self.rows)

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
        return Rows(example, self.ids[kept], self.rows[kept], int(rows.sum()), self.shape)

    def double(self) -> Rows:
        """In float64."""
        return Rows(self.example, self.ids, self.rows.double(), self.n, self.shape)

    def regrouped(self, owner: Tensor, n: int) -> Rows:
        """The entries of the rows, counted to their examples."""
        example = owner.to(self.example.device)[self.example]
        kept = example >= 0
        return Rows(example[kept], self.ids[kept], self.rows[kept], n, self.shape)

    def norm_method(self) -> str:
        """Never over the whole table."""
        return "rows that were touched"

    def _per_example(self, values: Tensor, example: Tensor) -> Tensor:
        return values.new_zeros(self.n).index_add_(0, example, values)

    def magnitude(self) -> Tensor:
        """Sum of the norms of the entries."""
        return self._per_example(torch.linalg.vector_norm(self.rows, dim=1).double(), self.example)

    def batch_l2(self) -> Tensor:
        """Squared norms, from the rows that were touched only."""
        where, summed = self._summed()
        return mended(self, self._per_example(squared_norms(summed), where // self.shape[0]), self._longest())

    def _longest(self) -> int:
        """Largest number of entries of one example."""
        return int(torch.bincount(self.example, minlength=1).max()) if self.example.numel() else 1

    def weighted_sum(self, w: Tensor) -> Tensor:
        """One scatter into the table."""
        out = self.rows.new_zeros(self.shape)
        return out.index_add_(0, self.ids, self.rows * w[self.example].unsqueeze(1))

    def inner(self, other: Outer) -> Tensor:
        """``<G_n, G'_n>`` with an `Outer` of the same table, as of a tied output layer, ``[N]``, float64."""
        left, right = other.g[:, 0], other.x[:, 0]  # [N, S, V] and [N, S, E]
        block = max(1, BLOCK // max(1, right[0].numel()))
        sums = []
        for start in range(0, self.ids.shape[0], block):
            part = slice(start, start + block)
            scores = torch.einsum("me,mse->ms", self.rows[part], right[self.example[part]])
            sums.append((scores * left[self.example[part], :, self.ids[part]]).sum(1, dtype=torch.float64))
        return self._per_example(torch.cat(sums) if sums else left.new_zeros(0, dtype=torch.float64), self.example)


class Sum(Term):
    """Terms of different kinds for one parameter, added."""

    def __init__(self, parts: Sequence[Term]) -> None:
        """Keep the parts, which all have the same N and shape."""
        self.parts, self.n, self.shape = list(parts), parts[0].n, parts[0].shape

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

    def batch_l2(self) -> Tensor:
        """Squared norms; a tied embedding and output layer through their cross term, anything else by `dense`."""
        rows, outer = self.parts[0], self.parts[-1]
        if len(self.parts) == 2 and isinstance(rows, Rows) and isinstance(outer, Outer) and outer.g.shape[1] == 1:
            l2 = rows.batch_l2() + outer.batch_l2() + 2 * rows.inner(outer)
        else:
            l2 = squared_norms(self.dense())
        return mended(self, l2, len(self.parts))

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


def positions(tensor: Tensor) -> Tensor:
    """``[N, *T, F]`` as ``[N, 1, T, F]``, the layout of `Outer` without groups."""
    return rearrange(tensor, "n f -> n 1 1 f") if tensor.dim() == 2 else tensor.flatten(1, -2).unsqueeze(1)
