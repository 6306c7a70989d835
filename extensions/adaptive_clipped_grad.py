"""Clipped sums whose bound C follows a quantile of the gradients' norms, found privately."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perexample._arguments import positive, real
from perexample.errors import ConfigurationError, StaleGradientError

from .clip import Clip
from .clipped_grad import CLIP_ALIKE, ClippedGrad

_LARGEST_EXPONENT = 700.0  # exp of more is not a float64


class AdaptiveClippedGrad(ClippedGrad):
    """`ClippedGrad` whose C is moved after every step towards a quantile of the norms, within the same privacy cost.

    ``C <- C exp(-learning_rate (b - quantile))``, where b is the noisy share of the examples with ``||g_n|| <= C``:
    ``b = 1/2 + (sum_n (1[||g_n|| <= C] - 1/2) + N(0, count_noise^2)) / expected_batch_size``. An example of the step
    adds 1/2 or -1/2 to the sum, so that the presence of an example changes it by 1/2.

    Gradients and count together are one Gaussian mechanism of the optimizer's ``noise_multiplier`` z, and are accounted
    as that: the count takes a part of the budget, and the gradients get noise of ``z_gradients * C`` with
    ``1 / z_gradients^2 = 1 / z^2 - 1 / (2 count_noise)^2``. With the defaults that is little more than z.

    C is the same for all backwards of a step, and bounds the joint norm of all parameters. Several processes add up
    their counts and move C together. C travels in the state of the private optimizer.

    Args:
        max_norm: C to begin with; a public constant.
        expected_batch_size: What the count is divided by, over all processes: the constant given to the private
            optimizer, never the number of examples that came.
        quantile: Share of the examples that C is to leave unclipped, between 0 and 1.
        learning_rate: How fast log C moves; the paper's default.
        count_noise: Standard deviation of the noise on the count, more than half the noise multiplier; by default
            ``expected_batch_size / 20``, as in the paper.
        bounds: Least and largest C; public constants. Without them, gradients that are all zero would take C to zero.
        clip: As for `ClippedGrad`.
        groups: ``"all"``; with several groups a count would be needed for each.

    Attributes:
        max_norm: C, now. It is computed from noisy counts only, so it is as public as the trained model.
        share: The last noisy share b, ``None`` before the first step; public too, and not held to 0..1.

    Raises:
        ConfigurationError: For arguments without meaning; from the private optimizer, if ``count_noise`` is not more
            than half its noise multiplier.

    Guarantees:
        What is released in a step, ``(clipped sums / (z_gradients C), count / count_noise)``, changes by at most
        ``1/z`` in L2 norm if an example is added or removed. An example that is not finite adds nothing to the sums,
        and counts as longer than C.

    References:
        Andrew, Thakkar, McMahan, Ramaswamy 2021, arXiv:1905.03871, algorithm 1 and theorem 1.

    Example:
        >>> from perexample import DP_SGD, extend, perex
        >>> from perexample.extensions import AdaptiveClippedGrad
        >>> model = extend(nn.Linear(2, 1))
        >>> clipping = AdaptiveClippedGrad(1.0, expected_batch_size=100)
        >>> optimizer = DP_SGD(model.parameters(), lr=0.5, clipping=clipping, noise_multiplier=1.0,
        ...                    expected_batch_size=100)
        >>> with perex(clipping, grad=False):
        ...     model(5 * torch.ones(100, 2)).mean().backward()
        >>> optimizer.step()
        >>> clipping.max_norm > 1.0, round(clipping.noise_share(1.0), 3)  # every gradient was longer than C
        (True, 1.005)
    """

    max_norm: float

    def __init__(
        self,
        max_norm: float,
        *,
        expected_batch_size: float,
        quantile: float = 0.5,
        learning_rate: float = 0.2,
        count_noise: float | None = None,
        bounds: tuple[float, float] = (1e-10, 1e10),
        clip: str | Clip | Callable[[Tensor], Tensor] = "flat",
        groups: str = "all",
    ) -> None:
        """Check the arguments."""
        if not isinstance(groups, str) or groups != "all":
            raise ConfigurationError(
                f"AdaptiveClippedGrad has one C for all parameters jointly, so groups must be 'all', not {groups!r}; "
                f"use ClippedGrad for several groups."
            )
        super().__init__(positive("max_norm", max_norm), clip=clip)
        self.expected_batch_size = positive("expected_batch_size", expected_batch_size)
        self.learning_rate = positive("learning_rate", learning_rate)
        self.quantile = real("quantile", quantile, "a number above 0 and below 1", lambda x: 0 < x < 1)
        count_noise = self.expected_batch_size / 20 if count_noise is None else count_noise
        self.count_noise = positive("count_noise", count_noise)
        self.bounds = _checked_bounds(bounds)
        self._refuse_outside("max_norm", self.max_norm)
        self.share: float | None = None
        self._count = 0.0  # sum over the examples of 1/2 for a norm of at most C, and -1/2 for others
        self._device = torch.device("cpu")  # of the parameters, where processes may add up their counts

    def noise_share(self, noise_multiplier: float) -> float:
        """Noise multiplier left for the gradients: ``(z^-2 - (2 count_noise)^-2)^(-1/2)``; 0 if z is 0.

        Args:
            noise_multiplier: z, that of gradients and count together.

        Returns:
            Standard deviation of the gradients' noise in units of `sensitivity`.

        Raises:
            ConfigurationError: If the count alone would cost as much as the step as a whole may.
        """
        most = 2 * self.count_noise
        if noise_multiplier >= most:
            raise ConfigurationError(
                f"AdaptiveClippedGrad(count_noise={self.count_noise:g}): a step of noise_multiplier "
                f"{noise_multiplier:g} can only be had if count_noise is greater than half of it, "
                f"{noise_multiplier / 2:g}; the count alone would use up the step's privacy. Give more count_noise, or "
                f"use larger batches (the default is expected_batch_size / 20)."
            )
        return noise_multiplier / math.sqrt((most - noise_multiplier) / most * ((most + noise_multiplier) / most))

    def commit(self) -> None:
        """Remember the sums, and count the examples that C left alone; with a new sum begins a new count."""
        norms = self._staged.norms
        before = self._count if self._staged.continued else 0.0
        assert norms is not None  # `finish` has run
        # A comparison with NaN is false, and C is finite: what is not finite is not below it.
        self._count = before + int((norms <= self.max_norm).sum()) - len(norms) / 2
        super().commit()

    def zero_grad(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Forget the sums so far, of these parameters or of all, and the count with them."""
        super().zero_grad(params)
        if not self._under_way():
            self._count = 0.0

    def consume(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """The sums of these parameters, each to be used for one step only.

        Args:
            params: Trainable parameters, as the optimizer holds them; all that have a sum.

        Returns:
            One tensor for each parameter.

        Raises:
            StaleGradientError: If one is missing or was used already, or a sum would be left over for another step,
                where C is another one.
        """
        self._device = params[0].device if params else self._device
        taken = {id(p) for p in params}
        for key, entry in self._entries.items():
            p = entry.param()
            if key not in taken and not entry.used and entry.alive() and p is not None and p.requires_grad:
                raise StaleGradientError(
                    f"The clipped sum of `{entry.name}` is not for this optimizer, which does not hold the parameter. "
                    f"AdaptiveClippedGrad changes C after a step, so that one step must use all sums: give the "
                    f"parameter to the optimizer, or freeze it before the backward."
                )
        return super().consume(params)

    def after_step(self, draw: Callable[[float], float], processes: Any) -> None:
        """Move C by the noisy count of the step, the same in all processes.

        Several backwards through one forward count an example several times, as they add its gradient several times;
        then the noise grows with their number, as that of the gradients does.

        Args:
            draw: Gives one Gaussian number of the standard deviation it is called with.
            processes: The `Processes` that train together.
        """
        processes.agree(
            max_norm=self.max_norm,
            quantile=self.quantile,
            learning_rate=self.learning_rate,
            count_noise=self.count_noise,
            expected_batch_size=self.expected_batch_size,
            backwards_through_one_forward=self._repeats,
        )
        std = self._repeats * self.count_noise
        count = torch.tensor(self._count, dtype=torch.float64, device=self._device)
        [total] = processes.total([count], lambda t: t.double() + draw(std))
        self._count = 0.0  # a step without a backward, on an empty batch, has none
        self.share = 0.5 + total.item() / (self._repeats * self.expected_batch_size)
        self._move(-self.learning_rate * (self.share - self.quantile))

    def _move(self, exponent: float) -> None:
        """``C exp(exponent)``, held to the bounds."""
        least, largest = self.bounds
        moved = self.max_norm * math.exp(min(exponent, _LARGEST_EXPONENT))
        self._set(min(max(moved, least), largest))

    def _set(self, max_norm: float) -> None:
        self.max_norm, self._bounds = max_norm, {"all": max_norm}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: C, as it is after the last step; sums under way are not kept.

        Returns:
            ``{"max_norm": C}``.
        """
        return {"max_norm": self.max_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the C of a state; sums under way, which were clipped to another C, are forgotten.

        Args:
            state: From `state_dict`.

        Raises:
            ConfigurationError: If it holds no C, or one outside of the bounds.
        """
        max_norm = self.check_state(state)
        self.zero_grad()
        self._set(max_norm)

    def check_state(self, state: Mapping[str, Any]) -> float:
        """Raise what `load_state_dict` would raise, and return C."""
        if "max_norm" not in state:
            raise ConfigurationError(
                f"The state of AdaptiveClippedGrad holds no 'max_norm' but {sorted(state)}; it was saved with another "
                f"clipping. Resume with the one that the run began with."
            )
        max_norm = positive("max_norm (in the state of AdaptiveClippedGrad)", state["max_norm"])
        self._refuse_outside("max_norm (in the state of AdaptiveClippedGrad)", max_norm)
        return max_norm

    def _refuse_outside(self, name: str, max_norm: float) -> None:
        least, largest = self.bounds
        if not least <= max_norm <= largest:
            raise ConfigurationError(f"{name} is {max_norm:g}, outside of bounds=({least:g}, {largest:g}).")


CLIP_ALIKE.add(AdaptiveClippedGrad)


def _checked_bounds(bounds: Any) -> tuple[float, float]:
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise ConfigurationError(f"bounds must be two numbers, the least and the largest C, not {bounds!r}.")
    least, largest = positive("bounds[0]", bounds[0]), positive("bounds[1]", bounds[1])
    if least > largest:
        raise ConfigurationError(f"bounds must be the least and the largest C in this order, not {bounds!r}.")
    return least, largest
