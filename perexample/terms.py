"""Per-example gradients of one parameter at one tap, kept in the form that is cheapest to hold.

A `Term` stands for a tensor ``[N, *p.shape]`` that may never be formed. `Dense` is that tensor; `Outer` is a sum of
outer products over positions (linear layers; convolutions once unfolded); `Rows` touches few rows of a table
(embeddings). `combine` adds the terms of all taps of a parameter, so that a shared weight is exact, cross terms
included, without forming what need not be formed.

Norms come in two steps. A term offers `Method` objects, exact ways that differ in time and memory; `perexample.methods`
chooses one. It returns the norms and the term to go on with for the weighted sum: the same factors, or the gradients if
these were formed anyway and take less room, so that no product is computed twice and the other can be freed.

Squared norms from Gram matrices (Goodfellow 2015, arXiv:1510.01799, section 4; Li et al. 2022, arXiv:2110.05679,
section 4) cancel in float32 where positions oppose each other. Every such norm is therefore compared with the sum of
the norms of its pieces, and recomputed in float64 where digits may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from ._grams import Grams
from ._looks import blind, holds, look
from ._norms import (
    BLOCK,
    Inner,
    gram_drift,
    gram_norms,
    norms_of,
    norms_of_each,
    short_drift,
    squared_norms,
    summed_products,
)
from ._trust import TRUSTED, blocks, direct, inner, unit_of_products
from .errors import RuleContractError
from .methods import Choice, Method, choose, likeness, sameness, settled


class Term:
    """Per-example gradient ``[N, *shape]`` of one parameter from one tap, not yet evaluated.

    A subclass gives `factors`, `dense`, `select` and `double`; the rest has defaults derived from these. What `dense`
    returns is new, or one of the factors: only then may it be scaled in place.

    Attributes:
        n: Number of examples N.
        shape: Shape of the parameter.
    """

    n: int
    shape: Size
    doubtful: Tensor | None = None  # examples whose norm was recomputed; their sum must be computed so too
    grams: Grams | None = None  # of inputs that other terms have too

    def dense(self) -> Tensor:
        """The gradients themselves, ``[N, *shape]``."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> Term:
        """The same for some examples only; ``rows`` is a boolean mask ``[N]``."""
        raise NotImplementedError

    def double(self) -> Term:
        """The same in float64."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """In what the gradients are computed."""
        return self.factors()[0].dtype

    @property
    def device(self) -> torch.device:
        """Where."""
        return self.factors()[0].device

    def factors(self) -> list[Tensor]:
        """The tensors that are held."""
        raise NotImplementedError

    def form(self) -> tuple[Any, ...]:
        """What the time of a method depends on: terms of one form are computed alike.

        Sizes count up to a factor of 1.2: Poisson batches, and texts padded to the longest, have another size in every
        step, and to measure each anew takes longer than the best choice saves.

        Returns:
            Something hashable.
        """
        return (type(self), self.shape, *(likeness(t) for t in self.factors()))

    def methods(self) -> list[Method]:
        """The ways to the squared norms."""
        return [Method("per-example gradients", lambda: (squared_norms(self.dense()), self))]

    def settled(self, choice: Choice) -> tuple[Tensor, Term]:
        """Squared norms ``[N]`` in float64, by the method that was chosen, and the term to go on with."""
        return settled(self, choice)

    def sameness(self) -> Any:
        """All that `methods` depends on, so that the one that was taken once can be `run` again by its name.

        Returns:
            Something hashable; ``None`` if they are to be asked each time.
        """
        return None

    def described(self, choice: Choice) -> str:
        """The method that is chosen, for `plan`; with that of the sum, where the factors leave a choice."""
        return choose(self, choice).name

    def run(self, name: str) -> tuple[Tensor, Term]:
        """What the method of this name returns."""
        return next(method for method in self.methods() if method.name == name).run()

    def formed(self, choice: Choice) -> Tensor:
        """What `dense` returns, by the fastest of several ways, where there are several."""
        return self.dense()

    def batch_l2(self) -> Tensor:
        """Squared L2 norm of each example's gradient, ``[N]``, in float64."""
        return self.settled(Choice())[0]

    def weighted_sum(self, w: Tensor) -> Tensor:
        """``sum_n w_n G_n`` for weights ``[N]``, ``[*shape]``."""
        dense = self.dense()
        if dense.dim() == 2:
            return torch.mv(dense.T, w.to(dense.dtype))
        return torch.tensordot(w.to(dense.dtype), dense, dims=1)

    def batch_dot(self) -> Tensor:
        """Inner products ``<G_n, G_m>``, ``[N, N]``."""
        flat = self.dense().reshape(self.n, self.shape.numel())
        return flat @ flat.T

    def regrouped(self, owner: Tensor, n: int) -> Term:
        """The same with the rows of each example added up: row m belongs to example ``owner[m]``, -1 for none."""
        kept = owner >= 0
        return Regrouped(self, owner, n) if holds(kept) else Regrouped(self.select(kept), owner[kept], n)

    def magnitude(self) -> Tensor:
        """Sum of the norms of the pieces that are added up, ``[N]``, float64; at least the norm itself."""
        return self.batch_l2().sqrt()

    def magnitude_bound(self) -> Tensor:
        """An upper bound of `magnitude` that costs little, ``[N]``, float64."""
        return self.magnitude()

    def unit(self) -> float:
        """Share of the squared magnitude that rounding may add to or take off a squared norm from inner products."""
        return torch.finfo(self.dtype).eps / 2

    def drift(self) -> float:
        """Share of a gradient by which `dense` may be off, where all the pieces that it adds up are alike."""
        return 0.0


def remembering(term: Term, found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Term]:
    """Norms, and the term, which knows from now on which of its examples were in doubt."""
    l2, term.doubtful = found
    return l2, term


def keeping(term: Term, formed: Formed, drift: float | None = None) -> tuple[Tensor, Term]:
    """Norms of gradients that were formed, which take the place of the term; only what was in doubt stays behind."""
    l2, doubtful = direct(term, formed.squares(), term.drift() if drift is None else drift)
    formed.doubtful = doubtful
    if doubtful is not None:
        formed.exact = term.select(doubtful).double()
    return l2, formed


def blockwise(term: Term, form: Callable[[Any], Tensor], drift: float | None = None) -> tuple[Tensor, Term]:
    """Norms of gradients that are formed block by block and let go; ``drift`` is that of the term by default."""
    masks = [torch.ones(term.n, dtype=torch.bool)] if blind() else blocks(term)
    parts = [squared_norms(form(term.select(one) if len(masks) > 1 else term)) for one in masks]
    l2 = torch.cat(parts) if parts else term.factors()[0].new_zeros(0, dtype=torch.float64)
    return remembering(term, direct(term, l2, term.drift() if drift is None else drift))


class Dense(Term):
    """Gradients that are already there, ``[N, *shape]``."""

    def __init__(self, value: Tensor) -> None:
        """Keep the gradients ``[N, *shape]``."""
        self.value, self.n, self.shape = value, value.shape[0], value.shape[1:]

    def factors(self) -> list[Tensor]:
        """The gradients."""
        return [self.value]

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
        value, owner = (self.value, owner) if holds(kept) else (self.value[kept], owner[kept])
        return Dense(added(value, owner, n))


class Formed(Term):
    """Gradients that were formed for their norms and are kept for the sum, in the order in which they came.

    Args:
        value: The gradients, ``[A, N, B]``; ``A * B`` is the number of the parameter's elements.
        shape: Shape of the parameter.
        arrange: Brings them into ``[N, *shape]``; by default ``A`` is 1 and they are.
        exact: The term in float64 of the examples that are ``doubtful``.
    """

    def __init__(self, value: Tensor, shape: Size, arrange: Callable[[Tensor], Tensor] | None = None) -> None:
        """Keep them as they are."""
        self.value, self.n, self.shape, self.arrange = value, value.shape[1], shape, arrange
        self.exact: Term | None = None

    def factors(self) -> list[Tensor]:
        """The gradients."""
        return [self.value]

    def squares(self) -> Tensor:
        """Squared norms of what was formed, ``[N]``, float64."""
        return norms_of(self.value).square().sum(0)

    def methods(self) -> list[Method]:
        """Their norms; what was in doubt is known exactly."""
        return [Method("per-example gradients", self._norms)]

    def _norms(self) -> tuple[Tensor, Term]:
        l2 = self.squares()
        if self.exact is not None and self.doubtful is not None:
            l2 = l2.masked_scatter(self.doubtful, self.exact.batch_l2())
        return l2, self

    def dense(self) -> Tensor:
        """The gradients in the order of the parameter."""
        if self.arrange is not None:
            return self.arrange(self.value)
        return self.value.reshape(self.n, *self.shape)

    def select(self, rows: Tensor) -> Term:
        """Some examples only."""
        rows = rows.to(self.value.device)
        chosen = Formed(self.value[:, rows], self.shape, self.arrange)
        if self.exact is not None and self.doubtful is not None and bool((rows & self.doubtful).any()):
            chosen.doubtful = self.doubtful[rows]
            chosen.exact = self.exact.select(rows[self.doubtful])
        return chosen

    def double(self) -> Term:
        """In float64; what was in doubt from its factors."""
        value = self.value.double()
        if self.exact is not None and self.doubtful is not None:
            if bool(self.doubtful.all()):
                return self.exact
            return Dense(self.dense().double().masked_scatter(_like(self.doubtful, self.shape), self.exact.dense()))
        return Formed(value, self.shape, self.arrange)

    def weighted_sum(self, w: Tensor) -> Tensor:
        """One matrix product with the gradients as they lie."""
        total = torch.matmul(w.to(self.value.dtype), self.value).unsqueeze(1)
        return (total.reshape(1, *self.shape) if self.arrange is None else self.arrange(total))[0]


def _like(rows: Tensor, shape: Size) -> Tensor:
    """A mask of rows over all their elements."""
    return rows.view(-1, *[1] * len(shape)).expand(-1, *shape)


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

    def factors(self) -> list[Tensor]:
        """Those of the rows."""
        return self.inner.factors()

    def dense(self) -> Tensor:
        """The gradients themselves; those of the rows are formed block by block."""
        if self.inner.n == 0:
            return self.inner.dense().new_zeros(self.n, *self.shape)
        parts = [added(self.inner.select(one).dense(), self.owner[one], self.n) for one in blocks(self.inner)]
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
        return added(self.inner.magnitude(), self.owner, self.n)

    def magnitude_bound(self) -> Tensor:
        """Sum of the bounds of the rows."""
        return added(self.inner.magnitude_bound(), self.owner, self.n)

    def drift(self) -> float:
        """That of the rows."""
        return self.inner.drift()

    def methods(self) -> list[Method]:
        """The sums are formed, block by block."""
        return [Method("per-example gradients", lambda: blockwise(self, lambda term: term.dense()))]

    def weighted_sum(self, w: Tensor) -> Tensor:
        """The rows' own weighted sum, each with the weight of its example."""
        return self.inner.weighted_sum(w[self.owner.to(w.device)])


def added(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """The rows of each example added up, ``[N, ...]``."""
    each = _each(owner, n)
    if each:
        return values.unflatten(0, (n, each)).sum(1)
    exact = values.double() if values.shape[0] > _MANY else values  # one after another they would drift in float32
    return exact.new_zeros(n, *values.shape[1:]).index_add_(0, owner.to(values.device), exact).to(values.dtype)


def _each(owner: Tensor, n: int) -> int:
    """How many rows follow each other in each of N examples; 0 if that is not how they lie."""
    each, rest = divmod(owner.numel(), max(1, n))
    if rest or not each:
        return 0
    in_order = owner.view(n, each) == torch.arange(n, device=owner.device).unsqueeze(1)
    return each if holds(in_order) else 0


def rows_together(owner: Tensor, n: int) -> Callable[[Tensor], Tensor] | None:
    """What brings ``[M, ...]`` into ``[N, K, ...]``, the rows of each example side by side, zeros for those missing.

    Returns:
        It; ``None`` if that would fill up much.
    """
    each = _each(owner, n)
    if each:
        return lambda rows: rows.unflatten(0, (n, each))
    look("examples have different numbers of rows")
    kept = owner[owner >= 0]
    most = int(torch.bincount(kept).max()) if kept.numel() else 0
    if most * n > 4 * max(owner.numel(), 1) or not most:
        return None
    table = padded_rows(torch.where(owner >= 0, owner, n), n + 1)[:n, :most]

    def together(rows: Tensor) -> Tensor:
        at = table.to(rows.device)
        missing = (at < 0).view(n, most, *[1] * (rows.dim() - 1))
        return rows[at.clamp_min(0)].masked_fill(missing, 0)

    return together


def padded_rows(owner: Tensor, n: int) -> Tensor:
    """Rows of each example, ``[N, K]``, filled up with -1 to the largest number of them."""
    look("examples have different numbers of entries")
    counts = torch.bincount(owner, minlength=n)
    order = torch.argsort(owner, stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.arange(owner.numel(), device=owner.device) - starts[owner[order]]
    table = owner.new_full((n, int(counts.max()) if counts.numel() else 0), -1)
    table[owner[order], column] = order
    return table


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


_MANY = 64  # float32 rows of one entry of the table that are added one after another


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
        self.many = bool(len(counts)) and counts.max().item() > _MANY
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
        each = _each(self.example, self.n)
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


def positions(tensor: Tensor) -> Tensor:
    """``[N, *T, F]`` as ``[N, 1, T, F]``, the layout of `Outer` without groups.

    Args:
        tensor: Factors of all positions; of one where there is no axis of them.

    Returns:
        The same entries in the same order.
    """
    return tensor[:, None, None] if tensor.dim() == 2 else tensor.flatten(1, -2).unsqueeze(1)
