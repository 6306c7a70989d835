"""Clip functions: from the norm of an example's gradient to the factor it is multiplied with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perexample._arguments import positive
from perexample._looks import blind
from perexample.errors import ConfigurationError, CrossExampleError


class Clip:
    """A function from norms ``[N]`` and a bound C to factors ``[N]`` with ``factor * norm <= C``.

    Each factor must depend on the norm of its own example only. `ClippedGrad` holds the factors of a subclass of your
    own to the bound.

    Example:
        >>> from perexample.extensions import Clip, ClippedGrad
        >>> class Capped(Clip):
        ...     def __call__(self, norms, bound):
        ...         return (bound / norms).clamp(max=2.0)
        >>> clipping = ClippedGrad(1.0, clip=Capped())
    """

    def __call__(self, norms: Tensor, bound: float) -> Tensor:
        """Factors for these norms."""
        raise NotImplementedError


class Flat(Clip):
    """``min(1, C / ||g||)``: long gradients are shortened to C, others left alone.

    References:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1.

    Example:
        >>> from perexample.extensions import Flat
        >>> Flat()(torch.tensor([0.5, 2.0]), 1.0)
        tensor([1.0000, 0.5000])
    """

    def __call__(self, norms: Tensor, bound: float) -> Tensor:
        """Factors for these norms."""
        return (bound / norms).clamp_(0.0, 1.0)  # C / -0.0 is below 0


class Automatic(Clip):
    """``C / (||g|| + stability)``: every gradient is scaled to nearly length C (AUTO-S).

    Args:
        stability: Keeps short gradients shorter than long ones; greater than 0.

    References:
        Bu et al. 2022, arXiv:2206.07136, equation 4.

    Example:
        >>> from perexample.extensions import Automatic
        >>> Automatic(stability=0.5)(torch.tensor([0.5, 2.0]), 1.0)
        tensor([1.0000, 0.4000])
    """

    def __init__(self, stability: float = 0.01) -> None:
        """Check the argument."""
        self.stability = positive("stability", stability)

    def __call__(self, norms: Tensor, bound: float) -> Tensor:
        """Factors for these norms."""
        return bound / (norms + self.stability)


class Global(Clip):
    """``C / Z`` for gradients no longer than Z, 0 for others: directions and ratios of what is kept stay as they are.

    Args:
        threshold: Z; by default the bound C, so that what is kept is left alone.

    References:
        Bu et al. 2021, arXiv:2106.07830, section 4.

    Example:
        >>> from perexample.extensions import Global
        >>> Global()(torch.tensor([0.5, 2.0]), 1.0)
        tensor([1., 0.])
    """

    def __init__(self, threshold: float | None = None) -> None:
        """Check the argument."""
        self.threshold = None if threshold is None else positive("threshold", threshold)

    def __call__(self, norms: Tensor, bound: float) -> Tensor:
        """Factors for these norms."""
        threshold = bound if self.threshold is None else self.threshold
        return (norms <= threshold).to(norms) * (bound / threshold)


class _Custom(Clip):
    """A user's function of the norms, held to the bound and to examples being independent."""

    def __init__(self, function: Callable[..., Tensor], *, of_norms: bool = False) -> None:
        self.function, self.of_norms = function, of_norms  # whether it takes no bound

    def _factors(self, norms: Tensor, bound: float) -> Tensor:
        return self.function(norms) if self.of_norms else self.function(norms, bound)

    def __call__(self, norms: Tensor, bound: float) -> Tensor:
        factors = self._factors(norms, bound)
        if not isinstance(factors, Tensor) or factors.shape != norms.shape:
            return factors  # what is wrong is said elsewhere
        if blind():  # it was tried before the step was recorded
            return factors
        half = len(norms) // 2
        parts = [self._factors(norms[:half], bound), self._factors(norms[half:], bound)] if half else [factors]
        if not _equal(parts, factors) or not _equal([_rolled(self._factors(norms.roll(1), bound))], factors):
            raise CrossExampleError(
                "ClippedGrad(clip=...): the function gives other factors for a part of the norms, or in another order, "
                "than for all; each factor must depend on the norm of its own example only, or the sensitivity is "
                "unknown."
            )
        return factors


def _rolled(factors: Tensor) -> Tensor:
    return factors.roll(-1) if isinstance(factors, Tensor) else factors


def _equal(parts: list[Tensor], whole: Tensor) -> bool:
    """Whether parts join to a whole, if they are tensors at all; their kind is checked elsewhere."""
    return not all(isinstance(t, Tensor) for t in (*parts, whole)) or torch.equal(
        torch.cat(parts).nan_to_num(), whole.nan_to_num()
    )


def bounded(clip: Clip, norms: Tensor, bound: float) -> Tensor:
    """Factors of any clip function, held to ``0 <= factor <= C / norm``; what is not finite becomes 0."""
    factors = clip(norms, bound)
    if not isinstance(factors, Tensor) or factors.shape != norms.shape:
        got = list(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ConfigurationError(
            f"ClippedGrad(clip=...): the function returned {got} for norms of shape {list(norms.shape)}; it must "
            f"return a tensor with one factor for each norm."
        )
    if type(clip) is Flat:  # within bounds already
        return factors.nan_to_num_(0.0)
    return factors.to(norms).clamp(min=0.0).minimum(bound / norms).nan_to_num(0.0, 0.0, 0.0)


_BY_NAME = {"flat": Flat, "automatic": Automatic, "global": Global}


def make_clip(clip: str | Clip | Callable[[Tensor], Tensor]) -> Clip:
    """The clip function for what a user passed."""
    if isinstance(clip, Clip):
        return clip if type(clip) in (*_BY_NAME.values(), _Custom) else _Custom(clip)
    if isinstance(clip, str) and clip in _BY_NAME:
        return _BY_NAME[clip]()
    if isinstance(clip, type):
        raise ConfigurationError(f"clip is the class {clip.__name__}; pass an instance: {clip.__name__}().")
    if not isinstance(clip, str) and callable(clip):
        return _Custom(clip, of_norms=True)
    raise ConfigurationError(
        f"clip must be one of {', '.join(map(repr, _BY_NAME))}, a Clip, or a function from norms [N] to factors [N]; "
        f"not {clip!r}."
    )
