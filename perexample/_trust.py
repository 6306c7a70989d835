"""Which float32 norms can be trusted: they are raised by what rounding may have taken off, or computed in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._looks import blind, within
from ._norms import BLOCK, Inner, squared_norms

if TYPE_CHECKING:
    from .terms import Term


def direct(term: Term, l2: Tensor, drift: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Norms of gradients that were formed: raised by rounding, and computed in float64 where they are in doubt.

    Returns:
        The squared norms, and which were in doubt, if any.
    """
    bound = term.magnitude_bound()
    raised, doubtful = direct_norms(l2, bound, drift, term.dtype)
    if doubtful is not None:  # the bound costs little, the magnitude itself is closer
        rows = doubtful.clone()
        raised[rows], closer = direct_norms(l2[rows], term.select(rows).magnitude(), drift, term.dtype)
        doubtful[rows] = False if closer is None else closer
    return mended(term, raised, doubtful)


def inner(term: Term, found: Inner) -> tuple[Tensor, Tensor | None]:
    """Norms from inner products of factors, raised by what rounding may have taken off.

    Each product is off by a share of about ``sqrt(length) eps``, in all directions unless the factors are all alike;
    that adds up to `Term.unit` of the squared magnitude. Where that is more than `TRUSTED` of the squared norm, the
    positions cancel and the norm is in doubt. Where they point one way instead, sums of products drift a little.
    Factors too small for their squares are in doubt as well.

    Returns:
        The squared norms, and which were in doubt, if any.
    """
    kind, l2 = torch.finfo(term.dtype), found.l2
    unit, lost = term.unit(), found.products * kind.tiny  # what products may underflow to

    def judged(l2: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor | None]:
        raised = torch.add(l2, magnitude.square(), alpha=unit).add_(lost)
        raised = torch.maximum(raised, l2 * (1 + found.drift))
        excess = torch.sub(raised, l2, alpha=1 / (1 - TRUSTED))  # above 0 where what was added is too large a share
        return raised, _in_doubt(excess.sub_(_NOTHING) if blind() else excess, raised)

    raised, doubtful = judged(l2, found.magnitude)
    if doubtful is not None:  # that magnitude is raised where a factor is zero, or too small for its square
        rows = doubtful.clone()
        magnitude = term.select(rows).magnitude()
        closer, still = judged(l2[rows], magnitude)
        still = torch.zeros_like(magnitude, dtype=torch.bool) if still is None else still
        if found.products:
            still |= found.magnitude[rows] > 2 * magnitude
        raised[rows] = closer.masked_fill(magnitude == 0, 0.0)
        doubtful[rows] = still & (magnitude != 0)
    return mended(term, raised, doubtful)


def _in_doubt(excess: Tensor, of: Tensor) -> Tensor | None:
    """Where an error is too large a share of a number, or that is not finite; ``None`` if nowhere, in one look."""
    return None if within(excess) else ~((excess <= 0) & (of < math.inf))  # NaN is in doubt too


_NOTHING = 1e-20  # squared norm below which a recorded step, that cannot look, takes what it is raised to for it
TRUSTED = 1e-4  # share of a squared norm that rounding may account for before it is computed again in float64


def unit_of_products(dtype: torch.dtype, positions: int, outputs: int, inputs: int) -> float:
    """`Term.unit` of a sum of outer products: errors of single products average out over many positions."""
    return torch.finfo(dtype).eps / 2 * max(1.0, (math.sqrt(outputs) + math.sqrt(inputs)) / max(1, 2 * positions))


def mended(term: Term, l2: Tensor, doubtful: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Replace the norms that are in doubt by ones of gradients that are formed in float64."""
    if doubtful is None or not doubtful.any():
        return l2, None
    chosen = term.select(doubtful).double()
    parts = [squared_norms(chosen.select(one).dense()) for one in blocks(chosen)]
    return l2.masked_scatter(doubtful, torch.cat(parts)), doubtful


def direct_norms(l2: Tensor, magnitude: Tensor, drift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Squared norms of gradients that were formed, raised by what rounding may have taken off.

    Errors of a formed gradient are of two kinds. Where all its pieces point one way, sums that run over many at once
    drift by a share of the result, at most ``drift``. Else they are about one unit of rounding of the ``magnitude``,
    the sum of the norms of the pieces; where that is no longer small, the pieces cancel and the norm is in doubt.

    Returns:
        Squared norms, and which of them are in doubt, if any.
    """
    norms, error = l2.sqrt(), torch.finfo(dtype).eps / 2 * magnitude
    excess = torch.sub(error, norms, alpha=_TRUSTED_SHARE)
    return torch.add(error, norms, alpha=1 + drift).square_(), _in_doubt(excess, norms)


_TRUSTED_SHARE = 2e-5  # share of a norm that rounding may account for before it is computed again in float64


def blocks(term: Term) -> list[Tensor]:
    """Masks that cut the examples into blocks whose gradients are small enough to form."""
    per_block = max(1, BLOCK // max(1, term.shape.numel()))
    if 0 < term.n <= per_block:
        return [torch.ones(term.n, dtype=torch.bool, device="cpu")]
    position = torch.arange(term.n, device="cpu")
    return [(position >= start) & (position < start + per_block) for start in range(0, term.n, per_block)]
