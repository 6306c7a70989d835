"""The largest number whose cost is within a budget, in few looks at the cost, and where it most likely is."""

from __future__ import annotations

import math
from collections.abc import Callable

CLOSE = 1.002  # how far above the best noise multiplier a search may end


def largest(
    cost: Callable[[float, bool], float], target: float, guess: float, least: float, most: float, whole: bool = False
) -> float | None:
    """The largest x whose cost is at most the target, to 0.2% or to 1; None if it is below ``least``."""
    for fine, factor in ((False, 1.3), (True, CLOSE)):  # a rough cost finds the place, the fine one decides

        def affordable(x: float, fine: bool = fine) -> bool:
            return cost(x, fine) <= target

        low, high = _bracket(affordable, guess, least, most, factor, whole)
        while low is not None and high is not None and (high - low > 1 if whole and fine else high > low * CLOSE):
            x = _between(low, high, cost(low, fine), cost(high, fine), target, whole)
            if not low < x < high:
                break
            low, high = (x, high) if affordable(x) else (low, x)
        guess = least if low is None else low
    return low


def _bracket(
    affordable: Callable[[float], bool], x: float, least: float, most: float, factor: float, whole: bool
) -> tuple[float | None, float | None]:
    """Two numbers of which the first is affordable and the second is not; None where there is none in the range."""
    x = min(max(math.floor(x) if whole else x, least), most)
    if affordable(x):
        while x < most:
            low, x = x, min(most, max(x + 1, math.floor(x * factor)) if whole else x * factor)
            if not affordable(x):
                return low, x
            factor = min(factor**2, 100)
        return x, None
    while x > least:
        high, x = x, max(least, min(x - 1, math.ceil(x / factor)) if whole else x / factor)
        if affordable(x):
            return x, high
        factor = min(factor**2, 100)
    return None, x


def _between(low: float, high: float, cost_low: float, cost_high: float, target: float, whole: bool) -> float:
    """Where to look next: beside the place where a line through both ends, in logarithms, crosses the target."""
    if whole and high <= low * CLOSE:  # a step aside is then more than half of what is left
        return (low + high) // 2
    width = math.log(high / low)
    if cost_low > 0 and cost_high < math.inf and cost_low < cost_high and width < 1:
        crossing = math.log(target / cost_low) / math.log(cost_high / cost_low) * width
    else:
        crossing = width / 2
    beside = math.log(CLOSE) / 3  # towards the farther end, which so comes near
    at = crossing - beside if crossing > width / 2 else crossing + beside
    x = low * math.exp(min(max(at, width / 20), width * 19 / 20))
    if whole:
        x = min(max(math.floor(x) if crossing > width / 2 else math.ceil(x), low + 1), high - 1)
    return x


def likely_distance(target: float, delta: float) -> float:
    """Distance of the means of two Gaussians whose epsilon is about the target: ``d^2 / 2 + d sqrt(2 ln 1/delta)``."""
    slope = math.sqrt(-2 * math.log(delta))
    return 2 * target / (math.sqrt(slope**2 + 2 * target) + slope)


def likely_precision(target: float, delta: float, rate: float, steps: int) -> float:
    """About ``1 / noise_multiplier`` for the target, had the privacy loss the Gaussian distribution it tends to."""
    variance = likely_distance(target, delta) ** 2 / steps
    if rate == 0 or variance / rate**2 == 0:
        return 1.0
    return math.sqrt(max(math.log1p(variance / rate**2), variance / rate))
