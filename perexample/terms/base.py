"""What a term is, and those of gradients that are there already, or of rows that are grouped to examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor

from .._grams import Grams
from .._looks import blind, holds
from .._norms import norms_of, squared_norms
from .._private import in_memory
from .._trust import blocks, direct
from ..methods import Choice, Method, choose, likeness, settled
from .grouping import added


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
    masks = [torch.ones(term.n, dtype=torch.bool, device="cpu")] if blind() else blocks(term)
    parts = [squared_norms(form(term.select(one) if len(masks) > 1 else term)) for one in masks]
    l2 = torch.cat(parts) if parts else term.factors()[0].new_zeros(0, dtype=torch.float64)
    return remembering(term, direct(term, l2, term.drift() if drift is None else drift))


class Dense(Term):
    """Gradients that are already there, ``[N, *shape]``."""

    def __init__(self, value: Tensor) -> None:
        """Keep the gradients ``[N, *shape]``."""
        self.value, self.n, self.shape = in_memory(value), value.shape[0], value.shape[1:]

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
        masks = blocks(self.inner)
        if len(masks) == 1:
            return added(self.inner.dense(), self.owner, self.n)
        return torch.stack([added(self.inner.select(one).dense(), self.owner[one], self.n) for one in masks]).sum(0)

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
