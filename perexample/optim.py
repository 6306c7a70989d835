"""Private optimizers."""

from __future__ import annotations

from typing import Any

import torch

from .privacy.ledger import Ledger
from .privacy.optimizer import initialize_as, privatize
from .privacy.privatizer import Clipping, Sampling

__all__ = ["DP_SGD", "privatize"]


class DP_SGD(torch.optim.SGD):  # noqa: N801 - the field's name for it
    """Differentially private stochastic gradient descent.

    ``torch.optim.SGD`` on ``(sum of clipped gradients + noise) / expected_batch_size``; see `privatize`, which makes
    the same of any other optimizer. Momentum, weight decay, param groups, schedulers and ``state_dict`` are SGD's.

    Args:
        params: Parameters, or param groups, of an extended model.
        lr: Learning rate.
        clipping: The `ClippedGrad` used in ``perex``; holds C.
        noise_multiplier: Standard deviation of the noise in units of C.
        expected_batch_size: What the sum is divided by; a public constant.
        sampler: Where the batches come from; see `privatize`, and so for the next three.
        ledger: Where steps are written down.
        generator: Source of the noise.
        noise: ``"torch"`` or ``"os"``.
        momentum: As in SGD.
        dampening: As in SGD.
        weight_decay: As in SGD.
        nesterov: As in SGD.
        maximize: As in SGD.

    Attributes:
        ledger: Where steps are written down; ``ledger.epsilon(delta)`` says what they have cost.

    Raises:
        ConfigurationError: For values without meaning.
        StaleGradientError: From ``step``, if a clipped sum is missing or was used already, or the batch is not the
            sampler's.

    References:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1.

    Example:
        >>> from perexample import DP_SGD, extend, perex
        >>> from perexample.extensions import ClippedGrad
        >>> model, clipping = extend(torch.nn.Linear(2, 1)), ClippedGrad(1.0)
        >>> optimizer = DP_SGD(model.parameters(), lr=0.5, clipping=clipping, noise_multiplier=1.1,
        ...                    expected_batch_size=4)
        >>> with perex(clipping, grad=False):
        ...     model(torch.ones(4, 2)).mean().backward()
        >>> optimizer.step()
    """

    ledger: Ledger

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        clipping: Clipping,
        noise_multiplier: float,
        expected_batch_size: float,
        sampler: Sampling | None = None,
        ledger: Ledger | None = None,
        generator: torch.Generator | None = None,
        noise: str = "torch",
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        """Make an SGD optimizer private."""
        initialize_as(
            torch.optim.SGD,
            self,
            params,
            lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        privatize(
            self,
            clipping=clipping,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            sampler=sampler,
            ledger=ledger,
            generator=generator,
            noise=noise,
        )
