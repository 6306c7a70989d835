"""The per-example gradient of one parameter, summed over all its taps, as extensions see it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from .._looks import blind, holds
from .._private import version
from .._shards import is_sharded, summed_into_shards
from .._trust import blocks
from ..errors import ExtensionError
from ..methods import Choice
from ..terms import Term, combine

_TINY = 1e-30  # a weight below this loses digits in float32


_EARLY = "too early: it is complete when `compute` is called for it; ask there, or with joint = True in `finish`"
_LET_GO = (
    "too late: gradients are let go when `compute` has seen them; set joint = True on the extension to ask for them in "
    "`finish`, and ask for nothing after `let_go`"
)
_POSTPONED = (
    "too late: with perex(max_memory=...) only sums, and norms that `compute` has asked for, are there in `finish`; "
    "ask in `compute` (view.batch_l2(), which the view keeps), or leave max_memory out"
)


_at_least_float32 = lru_cache(partial(torch.promote_types, torch.float32))


class Weights:
    """Weights ``[N]`` of a sum over examples, with what has to be known of them, found out once.

    Args:
        values: The weights.
        most: What no ``|w_n g_n|`` exceeds, if that is known from the norms of the gradients.
        largest: What no weight exceeds, if that is known.

    Attributes:
        values: The weights.
        all: Whether all are used.
        none: Whether none is.
        tiny: Which are too small for float32, ``None`` if none is.
    """

    SAFE = 1e30  # a sum of lengths below this does not overflow in float32

    def __init__(self, values: Tensor, most: float = math.inf, largest: float | None = None) -> None:
        """Look at the weights."""
        if not isinstance(values, Tensor) or values.is_complex():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise ExtensionError(f"Weights takes a tensor of real numbers, one for each example, [N]; not {got}.")
        if not values.is_floating_point():  # which examples, or how often
            values = values.double()
        self.values, self.all, self.none = values, True, not values.numel()
        self.tiny: Tensor | None = None
        self._scaled: dict[tuple[torch.device, float, torch.dtype], Tensor] = {}
        self._most, self._largest = most * values.numel(), math.inf if largest is None else largest
        if self.none:
            return
        if largest is None and not blind():
            self._largest = values.max().item()
        if holds(values.min().double() >= _TINY):  # mostly so; in float16 it would be 0
            return
        used = self.used
        self.all, self.none = bool(used.all()), not bool(used.any())
        tiny = used & (values.abs() < _TINY)
        self.tiny = tiny if bool(tiny.any()) else None

    @property
    def used(self) -> Tensor:
        """Which are not zero."""
        return self.values != 0

    def cannot_overflow(self, scale: float) -> bool:
        """Whether no sum of gradients times these weights and a factor can leave float32, in no order of summation.

        No factor of a gradient grows by a weight of at most 1, and the pieces of a gradient whose norm is trusted are
        not so much longer than itself as to matter here.

        Args:
            scale: The factor.

        Returns:
            Whether that is sure.
        """
        return self._most <= self.SAFE and self._largest * scale <= 1.0

    def scaled(self, device: torch.device, scale: float, dtype: torch.dtype) -> Tensor:
        """The weights times a factor, the same for many parameters."""
        key = device, scale, dtype
        if key not in self._scaled:
            values = self.values.to(device)
            self._scaled[key] = (values if scale == 1.0 else values * scale).to(dtype)
        return self._scaled[key]


@dataclass
class _Late:
    """A sum that is filled in later: where, with which weights, and what it is added to."""

    out: Tensor
    w: Weights
    onto: Tensor | None


def _unfilled(one: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of this shape, and no view, that takes the memory of one element until it is set to another."""
    return one.new_empty(0).set_(one.untyped_storage(), 0, shape, (0,) * len(shape))


def _summed(term: Term, rows: Tensor | None, w: Tensor) -> Tensor:
    """The weighted sum over some of the term's examples, or all."""
    return term.weighted_sum(w) if rows is None else term.select(rows).weighted_sum(w[rows])


def _times(term: Term, scale: float, choice: Choice) -> Tensor:
    """The gradients times a factor, without a second tensor of their size where they are new."""
    dense = term.formed(choice)
    if scale == 1.0:
        return dense
    own = dense.untyped_storage().data_ptr()
    held = any(t.untyped_storage().data_ptr() == own for t in term.factors())
    return dense * scale if held else dense.mul_(scale)


def _finite(total: Tensor) -> bool:
    """Whether a sum has no NaN or infinity, for which its own sum is enough; False also where that overflows."""
    return holds(total.sum().abs() < math.inf)


class ParameterView:
    """Per-example gradient of one parameter: of each example's own loss, over every use of the parameter.

    Attributes:
        name: Name of the parameter in the extended model.
        param: The parameter, as the optimizer holds it; one that is kept in shards (FSDP2) is a ``DTensor``.
        n: Number of examples N.
        forwards: Tokens of the forwards that the loss depends on, the same for all views of a backward.
        late: Sums that were asked for in `Extension.finish` and are filled in after it.
        users: How many joint extensions have not let go yet.
        sharded: Whether the parameter is kept in shards.
    """

    def __init__(
        self,
        name: str,
        param: Tensor,
        n: int,
        scale: float = 1.0,
        forwards: frozenset[object] = frozenset(),
        choice: Choice | None = None,
    ) -> None:
        """A parameter that nothing has reached yet: its gradients are zero."""
        self.name, self.param, self.n, self.forwards = name, param, n, forwards
        self._dtype, self.sharded = _at_least_float32(param.dtype), is_sharded(param)
        self._scale, self._choice = scale, choice or Choice()
        self.late: list[_Late] = []  # sums that are filled in after `finish`
        self._gone = ""  # why nothing can be asked now
        self._doubtful: Tensor | None = None
        self.users = 0  # joint extensions that may still ask
        self._terms: list[Term] = []
        self._combined: Term | None = None
        self._grad_batch: Tensor | None = None
        self._l2: Tensor | None = None
        self._counts: dict[str, int] = {}  # how often what is shared by all extensions was written to

    def add(self, term: Term) -> None:
        """Add the term of one more tap."""
        self._terms.append(term)
        self._combined = self._grad_batch = self._l2 = None

    def wait(self) -> None:
        """Let nothing be asked before `complete`: it would be of some of the taps, or of none."""
        self._gone = _EARLY

    def complete(self) -> None:
        """All terms are there."""
        self._gone = ""

    def drop(self) -> None:
        """Let go of everything that is held but norms; to ask for more is an error."""
        self._terms, self._combined, self._grad_batch, self._gone = [], None, None, _LET_GO

    def held(self) -> int:
        """Bytes of what is kept for the end."""
        term = self.term
        return 0 if term is None else sum(t.nbytes for t in term.factors())

    def postpone(self) -> None:
        """Let go of all but the norms; sums that are asked for are filled in when the terms have come again."""
        term = self.term
        if term is None:
            return  # zeros need no second pass
        self._doubtful = term.doubtful
        self.drop()
        self._gone = _POSTPONED

    def fulfil(self) -> None:
        """Fill in the sums that were asked for, now that the terms are there again."""
        self._gone = ""
        if self.term is not None:
            self.term.doubtful = self._doubtful
        for late in self.late:
            total = self.weighted_sum(late.w, late.onto).contiguous()
            late.out.set_(total.untyped_storage(), total.storage_offset(), total.shape, total.stride())
        self.late = []
        self.drop()

    def let_go(self) -> None:
        """For `Extension.finish`: no more will be asked of this view; freed when all joint extensions have said so."""
        self.users -= 1
        if self.users == 0:
            self.drop()

    @property
    def term(self) -> Term | None:
        """The sum over all taps, unevaluated; ``None`` if every gradient is zero."""
        if self._combined is None and self._terms and self.n:
            self._combined = combine(self._terms)
        return self._combined if self.n else None

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros on the parameter's device, in at least float32."""
        return torch.zeros(shape, dtype=dtype or self._dtype, device=self.param.device)

    def grad_batch(self) -> Tensor:
        """Gradients of the examples' own losses, ``[N, *p.shape]``."""
        if self._grad_batch is None:
            self._refuse_gone("grad_batch")
            term = self.term
            if term is None:
                self._grad_batch = self.zeros(self.n, *self.param.shape)
            else:
                self._grad_batch = _times(term, self._scale, self._choice)
            self._counts["grad_batch"] = version(self._grad_batch)
        return self._grad_batch

    def batch_l2(self) -> Tensor:
        """Their squared L2 norms, ``[N]``, in float64."""
        if self._l2 is None:
            self._refuse_gone("batch_l2")
            term = self.term
            if term is None:
                self._l2 = self.zeros(self.n, dtype=torch.float64)
            else:
                l2, self._combined = term.settled(self._choice)
                self._terms, self._l2 = [self._combined], l2 if self._scale == 1.0 else l2 * self._scale**2
            self._counts["batch_l2"] = version(self._l2)
        return self._l2

    def written(self) -> str:
        """Which of the tensors that all extensions share was written to, if one was."""
        for what, t in (("grad_batch", self._grad_batch), ("batch_l2", self._l2)):
            if t is not None and version(t) != self._counts[what]:
                return what
        return ""

    def weighted_sum(self, w: Tensor | Weights, onto: Tensor | None = None) -> Tensor:
        """``sum_n w_n g_n``, ``[*p.shape]``; an example of weight 0 contributes exactly 0, even if it is not finite.

        Args:
            w: Weights ``[N]``, or `Weights` made of them once for many views.
            onto: A tensor ``[*p.shape]`` that the sum is added to; it stays as it is.

        Returns:
            The sum, a new tensor in at least float32. Under ``perex(max_memory=...)`` it may be filled in after
            `Extension.finish`; until then nothing can be written to it.

        Raises:
            ExtensionError: If there is not one weight for each example.
        """
        if not isinstance(w, Weights) and (not isinstance(w, Tensor) or w.is_complex()):
            got = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise ExtensionError(f"weighted_sum of `{self.name}` takes a tensor of real weights, not {got}.")
        w = w if isinstance(w, Weights) else Weights(w)
        if w.values.shape != (self.n,):
            raise ExtensionError(
                f"weighted_sum of `{self.name}` takes one weight for each of {self.n} examples, [{self.n}], and was "
                f"given {list(w.values.shape)}."
            )
        if self._gone == _POSTPONED and not w.none:
            self.late.append(_Late(_unfilled(self.zeros(1), self.param.shape), w, onto))
            return self.late[-1].out
        if self._gone != _POSTPONED:
            self._refuse_gone("weighted_sum")
        total = self._sum(w)
        return total if onto is None else total + onto

    def _sum(self, w: Weights) -> Tensor:
        term = self.term
        if term is None or w.none:
            return self.zeros(*self.param.shape)
        device, dtype = self.param.device, term.dtype
        used = None if w.all else w.used.to(device)
        # Where a norm needed float64, so does the sum: the rounding errors of float32 could exceed the bound. The same
        # where a weight is too small for float32.
        doubtful = term.doubtful
        if w.tiny is not None:
            doubtful = w.tiny if doubtful is None else doubtful | w.tiny.to(doubtful.device)
        if doubtful is None:
            total = _summed(term, used, w.scaled(device, self._scale, dtype))
            if (self._l2 is not None and w.cannot_overflow(self._scale)) or _finite(total):
                return total.to(self._dtype)
            doubtful = torch.ones_like(w.used)  # a factor times a weight was too large, their product is not
        values = w.scaled(device, self._scale, torch.float64)
        doubtful = doubtful.to(device) & (True if used is None else used)
        rest = ~doubtful & (True if used is None else used)
        total = self.zeros(*self.param.shape)
        if rest.any():
            part = _summed(term, rest, values.to(dtype))
            total = total + (part if _finite(part) else _summed(term.double(), rest, values))
        if doubtful.any():
            exact, chosen = term.select(doubtful).double(), values[doubtful].double()
            for one in blocks(exact):  # of the gradients that gave the norms: another order of summation is another sum
                total = total + torch.tensordot(chosen[one], exact.select(one).dense(), dims=1)
        return total.to(self._dtype)

    def summed(self, w: Tensor | Weights, onto: Tensor | None = None) -> Tensor:
        """`weighted_sum`, for an optimizer: of a parameter in shards over all processes, each its own shard.

        Args:
            w: Weights ``[N]`` of the examples of this process, or `Weights` made of them.
            onto: What it is added to, as it was returned by an earlier call.

        Returns:
            The sum, in at least float32; a ``DTensor`` where the parameter is one. Then all processes must ask.
        """
        if not self.sharded:
            return self.weighted_sum(w, onto)
        total = summed_into_shards(self.weighted_sum(w), self.param)
        return total if onto is None else total + onto

    def _refuse_gone(self, what: str) -> None:
        if self._gone:
            raise ExtensionError(f"`{what}` of `{self.name}` was asked for {self._gone}.")

    def batch_dot(self) -> Tensor:
        """Inner products of the examples' gradients, ``[N, N]``."""
        self._refuse_gone("batch_dot")
        term = self.term
        return self.zeros(self.n, self.n) if term is None else term.batch_dot() * self._scale**2
