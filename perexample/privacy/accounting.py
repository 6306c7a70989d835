"""What noisy sums cost: epsilon of a run, and the noise or the number of steps that a budget allows.

Google's ``dp-accounting`` (extra ``privacy``, imported when first needed) makes and composes the privacy loss
distributions (PLD) and the Renyi divergences (RDP). Here is what it leaves open: the grid, so that PLD is both tight
and quick; upper bounds where floating point or memory give out; and the searches. Every number is an upper bound:

* PLD rounds losses so that epsilon can only grow (connect the dots, arXiv:2207.04380). The grid follows the spread of
  the loss of one step, 1/4 to 1/40 of it. The Fourier transforms that compose the steps may lose some delta to
  roundoff (measured against extended precision in some 60 configurations: up to ``0.83 steps 2^-52``, and 1.13 where
  delta is above 1e-6); twice ``steps 2^-52`` is taken off delta beforehand. That is a margin, no proof.
* Steps that are not amplified are one Gaussian together, whose epsilon is known in closed form (arXiv:1805.06530). The
  same, as if no step were amplified, bounds every epsilon.
* Where PLD would be too large (epsilon above 600) or too rough (delta near roundoff), RDP takes over.
* More than 128 different releases (RDP: 16), as a noise schedule makes them, are put in that many groups, each counted
  with its least noise and its largest sample rate.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .._arguments import is_word, positive, real, shown, whole
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from .ledger import Release

ACCOUNTANTS = ("pld", "rdp")
NEIGHBOURS = ("add-or-remove", "replace")

CLOSE = 1.002  # how far above the best noise multiplier a search may end
LEAST_NOISE, MOST_NOISE, MOST_STEPS = 0.01, 1e8, 10**9  # where the searches end
ROUNDOFF = 2.0**-51  # of delta, for one composition
LARGEST = 600.0  # epsilon by PLD; near 700 its e^-epsilon underflows
POINTS = 1_000_000  # of a PLD, about
BLOCK = 512  # steps composed at once where there are more than its square
TAIL = 1e-6  # of delta, that may be cut off a PLD and counted as infinite loss
GROUPS = {"pld": 128, "rdp": 16}

FRACTIONS = [1.02, 1.05, *(1 + x / 10 for x in range(1, 100))]
ORDERS = [*FRACTIONS, *range(11, 64), *(round(64 * 1.25**k) for k in range(20))]  # up to 4441
FEW_ORDERS = [1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48, 57]
FEW_ORDERS += [round(68 * 1.2**k) for k in range(16)]  # up to 1048


class Event(NamedTuple):
    """``steps`` equal releases; a rate of 1 is one that is not amplified."""

    noise: float
    rate: float
    steps: int


def epsilon(
    delta: float,
    *,
    noise_multiplier: float,
    sample_rate: float | None,
    steps: int,
    accountant: str = "pld",
    neighbours: str = "add-or-remove",
) -> float:
    """Privacy that ``steps`` noisy sums of clipped gradients cost.

    The least epsilon >= 0, up to rounding upwards, with ``P(M(D) in S) <= e^epsilon P(M(D') in S) + delta`` for all
    neighbouring data sets D, D' and all S, where M shows every sum of the run.

    Args:
        delta: Probability with which the bound may fail; in (0, 1), and far below 1 / size of the data.
        noise_multiplier: Standard deviation of the noise in units of the sensitivity C. 0 costs infinity.
        sample_rate: Probability with which every example, by itself, is in a batch (Poisson sampling). ``None`` or 1:
            no amplification, as for shuffled batches. If these have one size, an example that is added or removed gives
            others another batch; epsilon is then for data sets of the same length, in one of which it has no gradient.
        steps: Number of noisy sums.
        accountant: ``"pld"`` (privacy loss distributions: tight) or ``"rdp"`` (Renyi: looser).
        neighbours: ``"add-or-remove"`` one example, or ``"replace"`` one by another, which moves the sum by up to 2 C
            (``"pld"`` only).

    Returns:
        Epsilon, rounded upwards; infinite where there is no bound, never NaN. It does not decrease with ``steps``
        (where delta is below 1e6 * steps * 2^-52, up to roundoff).

    Raises:
        ConfigurationError: If an argument makes no sense; the message names it.
        ImportError: If dp-accounting is not installed.

    References:
        Koskela et al. 2020, arXiv:1906.03049 (PLD); Doroshenko et al. 2022, arXiv:2207.04380 (its grid);
        Mironov et al. 2019, arXiv:1908.10530 (RDP).

    Example:
        >>> from perexample.privacy import epsilon
        >>> round(epsilon(1e-5, noise_multiplier=1.0, sample_rate=0.1, steps=10), 2)
        2.85
        >>> round(epsilon(1e-5, noise_multiplier=1.0, sample_rate=0.1, steps=10, accountant="rdp"), 2)
        3.44
    """
    event = Event(_noise(noise_multiplier), _rate(sample_rate), _whole("steps", steps))
    return _spent([event], _delta(delta), *_ways(accountant, neighbours))


def epsilon_of(
    runs: Iterable[tuple[Release, int]],
    delta: float,
    accountant: str = "pld",
    neighbours: str = "add-or-remove",
) -> float:
    """Privacy that releases of any kind cost together.

    Args:
        runs: Releases with how often each was made, such as `Ledger.runs`.
        delta: As for `epsilon`.
        accountant: As for `epsilon`.
        neighbours: As for `epsilon`.

    Returns:
        Epsilon, rounded upwards: 0 for no releases, infinite if one had no noise.

    Raises:
        ConfigurationError: If an argument makes no sense; the message names it.

    Example:
        >>> from perexample.privacy import Release, epsilon_of
        >>> halved = [(Release(2.0, 0.01), 500), (Release(1.0, 0.01), 500)]
        >>> round(epsilon_of(halved, 1e-5), 1)
        1.4
    """
    ways = _ways(accountant, neighbours)
    events = [Event(_noise(r.noise_multiplier), _rate(r.sample_rate), _whole("count", n)) for r, n in _pairs(runs)]
    return _spent(events, _delta(delta), *ways)


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    *,
    sample_rate: float | None,
    steps: int,
    accountant: str = "pld",
    neighbours: str = "add-or-remove",
) -> float:
    """The least noise with which a run keeps within a budget.

    Args:
        epsilon: The budget, > 0.
        delta: As for `epsilon`.
        sample_rate: As for `epsilon`.
        steps: Number of noisy sums, at least 1.
        accountant: As for `epsilon`.
        neighbours: As for `epsilon`.

    Returns:
        A noise multiplier whose `epsilon` is at most the budget, always: it was computed. 0.2% less noise would exceed
        it, or the result is 0.01, the least there is.

    Raises:
        ConfigurationError: If an argument makes no sense, or no noise is enough (for RDP with delta near 0).

    Example:
        >>> from perexample.privacy import epsilon, noise_multiplier_for
        >>> sigma = noise_multiplier_for(3.0, 1e-5, sample_rate=0.01, steps=1000)
        >>> round(sigma, 2), epsilon(1e-5, noise_multiplier=sigma, sample_rate=0.01, steps=1000) <= 3.0
        (0.81, True)
    """
    target, delta, rate = _budget(epsilon), _delta(delta), _rate(sample_rate)
    count, ways = _whole("steps", steps, least=1), _ways(accountant, neighbours)

    def cost(precision: float, fine: bool) -> float:
        return _spent([Event(1 / precision, rate, count)], delta, *ways, fine=fine)

    precision = _largest(cost, target, _likely_precision(target, delta, rate, count), 1 / MOST_NOISE, 1 / LEAST_NOISE)
    if precision is None:
        raise ConfigurationError(
            f"epsilon={epsilon} with delta={delta} cannot be reached in {steps} steps by any noise_multiplier up to "
            f"{MOST_NOISE:g} ({accountant}). Allow a larger epsilon or delta{_advice(accountant)}."
        )
    return 1 / precision


def steps_for(
    epsilon: float,
    delta: float,
    *,
    noise_multiplier: float,
    sample_rate: float | None,
    accountant: str = "pld",
    neighbours: str = "add-or-remove",
) -> int:
    """How many steps a budget allows.

    Args:
        epsilon: The budget, > 0.
        delta: As for `epsilon`.
        noise_multiplier: As for `epsilon`.
        sample_rate: As for `epsilon`.
        accountant: As for `epsilon`.
        neighbours: As for `epsilon`.

    Returns:
        The largest number of steps whose `epsilon` is at most the budget; 0 if one step exceeds it.

    Raises:
        ConfigurationError: If an argument makes no sense, or the budget allows more than 10^9 steps.

    Example:
        >>> from perexample.privacy import epsilon, steps_for
        >>> steps = steps_for(3.0, 1e-5, noise_multiplier=0.9, sample_rate=0.01)
        >>> [epsilon(1e-5, noise_multiplier=0.9, sample_rate=0.01, steps=n) <= 3.0 for n in (steps, steps + 1)]
        [True, False]
    """
    target, delta = _budget(epsilon), _delta(delta)
    noise, rate, ways = _noise(noise_multiplier), _rate(sample_rate), _ways(accountant, neighbours)
    if noise == 0:
        return 0

    def cost(steps: float, fine: bool) -> float:
        return _spent([Event(noise, rate, int(steps))], delta, *ways, fine=fine)

    if cost(MOST_STEPS, True) <= target:
        raise ConfigurationError(
            f"noise_multiplier={noise_multiplier} with sample_rate={sample_rate} allows more than {MOST_STEPS} steps "
            f"for epsilon={epsilon}; lower one of epsilon and noise_multiplier."
        )
    likely = (_likely_distance(target, delta) / max(_spread(noise, rate), 1e-9)) ** 2
    return int(_largest(cost, target, likely, 1, MOST_STEPS, whole=True) or 0)


# ------------------------------------------------------------------------------------------------------- the arguments


def _ways(accountant: str, neighbours: str) -> tuple[str, str]:
    for name, value, known in (("accountant", accountant, ACCOUNTANTS), ("neighbours", neighbours, NEIGHBOURS)):
        if not is_word(value, known):
            raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, known))}, not {shown(value)}.")
    if (accountant, neighbours) == ("rdp", "replace"):
        raise ConfigurationError(
            "accountant='rdp' knows no bound for neighbours='replace' with Poisson sampling; use accountant='pld'."
        )
    return accountant, neighbours


def _delta(value: Any) -> float:
    return real("delta", value, "a number above 0 and below 1 (far below 1 / size of the data)", lambda x: 0 < x < 1)


def _budget(value: Any) -> float:
    return positive("epsilon", value, "a finite number > 0")


def _noise(value: Any) -> float:
    noise = real("noise_multiplier", value, "a finite number >= 0", lambda x: x >= 0)
    return 0.0 if noise < 1e-100 else min(noise, 1e100)  # so that its square is a float; either costs no less


def _rate(value: Any) -> float:
    wanted = "a probability in [0, 1], or None for no amplification"
    return 1.0 if value is None else real("sample_rate", value, wanted, lambda x: 0 <= x <= 1)


def _whole(name: str, value: Any, least: int = 0) -> int:
    return whole(name, value, f"a whole number, {least} or more (up to 2^53)", least, 2**53)


def _pairs(runs: Any) -> list[tuple[Any, Any]]:
    try:
        pairs = [(release, count) for release, count in runs]
    except (TypeError, ValueError):
        pairs = [(None, runs)]
    for release, _ in pairs:
        if not hasattr(release, "noise_multiplier") or not hasattr(release, "sample_rate"):
            raise ConfigurationError(f"runs must be pairs (Release, count), such as Ledger.runs, not {runs!r}.")
    return pairs


def _advice(accountant: str) -> str:
    return ", or use accountant='pld'" if accountant == "rdp" else ""


# ------------------------------------------------------------------------------------------------------------ the cost


def _spent(events: list[Event], delta: float, accountant: str, neighbours: str, fine: bool = True) -> float:
    """Epsilon of valid events; with ``fine=False`` quicker and looser."""
    events = [event for event in events if event.steps]
    if any(event.noise == 0 for event in events):
        return math.inf
    merged = _merged(event for event in events if event.rate > 0)
    return _cost(merged, delta, accountant, neighbours, fine) if merged else 0.0


def _merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal ones together, in an order of their own; those without amplification are one Gaussian."""
    counts: dict[tuple[float, float], int] = {}
    plain = []
    for noise, rate, count in events:
        if rate < 1:
            counts[noise, rate] = counts.get((noise, rate), 0) + count
        else:
            plain.append(Event(noise, rate, count))
    merged = [Event(noise, rate, count) for (noise, rate), count in sorted(counts.items())]
    return (*merged, Event(1 / _distance(sorted(plain)), 1.0, 1)) if plain else tuple(merged)


def _distance(events: Iterable[Event]) -> float:
    """``sqrt(sum count / noise^2)``: distance of the means in standard deviations if every step saw every example."""
    return math.hypot(*(math.sqrt(event.steps) / event.noise for event in events))


@lru_cache(maxsize=1024)
def _cost(events: tuple[Event, ...], delta: float, accountant: str, neighbours: str, fine: bool) -> float:
    with _quiet():
        if accountant == "rdp":
            return _rdp_epsilon(events, delta, fine)
        if all(event.rate == 1 for event in events):
            return _gaussian_epsilon(_distance(events), delta, neighbours)
        bounds = [_gaussian_epsilon(_distance(events), delta, neighbours)]
        bounds.append(_pld_epsilon(events, delta, neighbours, fine))
        if bounds[-1] > LARGEST:
            bounds[-1] = math.inf if neighbours == "replace" else _rdp_epsilon(events, delta, fine)
        return min(bounds)


def _pld_epsilon(events: tuple[Event, ...], delta: float, neighbours: str, fine: bool) -> float:
    """By composing discretised privacy loss distributions; infinite where they would be too large or too rough."""
    events = _grouped(events, GROUPS["pld"])
    steps = sum(event.steps for event in events)
    step, left = _grid(events, neighbours, fine), delta - ROUNDOFF * (steps + 4 * len(events))
    if step is None or left <= 0:
        return math.inf
    library = _library("dp_accounting.pld.privacy_loss_distribution")
    relation = _library("dp_accounting").NeighboringRelation
    total, tail = library.identity(step), TAIL * delta / len(events)
    try:
        for noise, rate, count in events:
            one = library.from_gaussian_mechanism(
                noise,
                value_discretization_interval=step,
                log_mass_truncation_bound=math.log(TAIL * delta / steps),
                sampling_prob=rate,
                neighboring_relation=relation.REPLACE_ONE if neighbours == "replace" else relation.ADD_OR_REMOVE_ONE,
            )
            total = total.compose(_repeated(one, count, tail), tail)
        return _bound(total.get_epsilon_for_delta(left))
    except (ArithmeticError, ValueError):  # what its own functions raise where floats overflow or lose their order
        return math.inf


def _repeated(one: Any, count: int, tail: float) -> Any:
    """``count`` times one PLD, in blocks where that is often: a short PLD takes its size to the power of ``count``."""
    blocks, rest = divmod(count, BLOCK)
    if blocks < BLOCK:
        return one.self_compose(count, tail)
    many = one.self_compose(BLOCK, tail / (2 * blocks)).self_compose(blocks, tail / 2)
    return many.compose(one.self_compose(rest, tail / 2), tail / 2) if rest else many


def _grid(events: tuple[Event, ...], neighbours: str, fine: bool) -> float | None:
    """Width of the grid of losses, a power of two; None if no grid is both narrow enough and small enough."""
    # It grows with rate, steps and 1 / noise, and the coarser of two grids is part of the finer: epsilon is monotone.
    amplified = [event for event in events if event.rate < 1]
    distance = 2 if neighbours == "replace" else 1
    variance = sum(event.steps * _spread(event.noise, event.rate) ** 2 for event in amplified)
    spread = math.sqrt(variance / sum(event.steps for event in amplified))
    reach = max(_reach(event.noise / distance, event.rate) for event in events)
    if not 0 < variance * distance**2 < 4000 or reach == 0:
        return None
    width = min(spread / 4, max(spread / 20, reach / 10_000))
    width = width if fine else min(4 * width, spread / 2)
    variance *= distance**2
    # of all steps together: mean and tails, whose bound by dp-accounting is rough where the steps are many
    extent = 2 * reach + variance + max(14 * math.sqrt(variance), variance / (2 * reach))
    width = max(width, extent / POINTS, 2.0**-30)  # narrower than that, differences of delta are roundoff
    return None if width > spread else 2.0 ** math.floor(math.log2(width))


def _spread(noise: float, rate: float) -> float:
    """About the standard deviation of the privacy loss of one step (the second is less where noise is little)."""
    return math.sqrt(min(rate**2 * math.expm1(min(noise**-2, 700.0)), rate * noise**-2))


def _reach(noise: float, rate: float) -> float:
    """Privacy loss of one step where the noise is 9.6 standard deviations off (probability 4e-22)."""
    exponent = (19.2 * noise + 1) / (2 * noise**2)
    return math.log1p(rate * math.expm1(exponent)) if exponent < 700 else exponent


def _rdp_epsilon(events: tuple[Event, ...], delta: float, fine: bool) -> float:
    """By adding up Renyi divergences, each a little more than computed for what roundoff may have taken."""
    events = _grouped(events, GROUPS["rdp"])
    rows = [[event.steps * value for value in _divergences(event.noise, event.rate, fine)] for event in events]
    orders = ORDERS if fine else FEW_ORDERS
    total = [sum(at) for at in zip(*rows, strict=True)]
    return _bound(_library("dp_accounting.rdp").compute_epsilon(orders, total, delta)[0])


@lru_cache(maxsize=4096)
def _divergences(noise: float, rate: float, fine: bool) -> tuple[float, ...]:
    """Renyi divergence of one step at each order, rounded upwards."""
    orders, library = ORDERS if fine else FEW_ORDERS, _library("dp_accounting")
    event = library.GaussianDpEvent(noise)
    accountant = _library("dp_accounting.rdp").RdpAccountant(orders)
    try:
        accountant.compose(event if rate == 1 else library.PoissonSampledDpEvent(rate, event))
        values = [max(_bound(value), 0.0) for value in accountant.rdp]
    except ArithmeticError:  # a noise so small that its square vanishes
        values = [math.inf] * len(orders)
    return tuple(map(_roundoff_added, orders, _chords_taken(orders, values)))


def _chords_taken(orders: list[float], values: list[float]) -> list[float]:
    """No more than the convexity of ``(order - 1) * divergence`` allows between whole orders; it is 0 at order 1."""
    # At broken orders dp-accounting adds up a series by absolute values, which can be a thousand times too much, or it
    # finds no convergence; whole orders are finite sums.
    whole = {1: 0.0} | {int(a): (a - 1) * value for a, value in zip(orders, values, strict=True) if a == int(a)}
    chords = []
    for a, value in zip(orders, values, strict=True):
        below, share = int(a), a - int(a)
        chord = whole[below] + share * (whole[below + 1] - whole[below]) if share else math.inf
        chords.append(min(value, _bound(chord / (a - 1))))
    return chords


def _roundoff_added(order: float, value: float) -> float:
    """What floats may have lost: of the value, and of log-gammas of the order that cancel, divided by order - 1."""
    return value * (1 + 2.0**-48) + 2.0**-50 * (1 + math.log(order) + 1 / (order - 1))


def _gaussian_epsilon(distance: float, delta: float, neighbours: str) -> float:
    """In closed form, of two Gaussians with means ``distance`` standard deviations apart (Balle & Wang 2018)."""
    distance *= 2 if neighbours == "replace" else 1
    if math.erf(distance / math.sqrt(8)) <= delta:  # their total variation
        return 0.0
    if distance < 1e-8:  # there the closed form is a difference of nearly equal numbers; this is never less
        return distance * (distance / 2 + math.sqrt(-2 * math.log(delta)))
    try:
        value = _library("dp_accounting.gaussian_mechanism").get_epsilon_gaussian(1 / distance, delta)
    except (ArithmeticError, ValueError):
        return math.inf
    return _bound(value) * (1 + 1e-12) + 2e-12  # what its root finder may be off


def _bound(value: Any) -> float:
    """A float; what is not a number bounds nothing."""
    return math.inf if math.isnan(value) else float(value)


def _grouped(events: tuple[Event, ...], most: int) -> tuple[Event, ...]:
    """At most so many different events, which cost no less: each group with its least noise and its largest rate."""
    octaves = 1024.0
    groups: dict[tuple[int, int], list[Event]] = {(0, i): [event] for i, event in enumerate(events)}
    while len(groups) > most:
        octaves, groups = octaves / 2, {}
        for event in events:
            cell = math.floor(octaves * math.log2(event.noise)), math.ceil(octaves * math.log2(event.rate))
            cell = cell if event.rate < 1 else (0, 1)  # the one that is not amplified stays by itself
            groups.setdefault(cell, []).append(event)
    return tuple(
        Event(min(e.noise for e in group), max(e.rate for e in group), sum(e.steps for e in group))
        for group in groups.values()
    )


# ---------------------------------------------------------------------------------------------------------- the search


def _largest(
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


def _likely_distance(target: float, delta: float) -> float:
    """Distance of the means of two Gaussians whose epsilon is about the target: ``d^2 / 2 + d sqrt(2 ln 1/delta)``."""
    slope = math.sqrt(-2 * math.log(delta))
    return 2 * target / (math.sqrt(slope**2 + 2 * target) + slope)


def _likely_precision(target: float, delta: float, rate: float, steps: int) -> float:
    """About ``1 / noise_multiplier`` for the target, had the privacy loss the Gaussian distribution it tends to."""
    variance = _likely_distance(target, delta) ** 2 / steps
    if rate == 0 or variance / rate**2 == 0:
        return 1.0
    return math.sqrt(max(math.log1p(variance / rate**2), variance / rate))


# --------------------------------------------------------------------------------------------------------- the library


def _library(name: str) -> Any:
    """A module of dp-accounting (or numpy, which it needs)."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Accounting needs dp-accounting, which cannot be imported ({error}); pip install dp-accounting"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep dp-accounting's warnings of numbers that did not converge, which bounds here allow for, to itself.

    Of this thread and of that library only; all is as before when it ends.
    """
    errstate, _ = _library("numpy").errstate(all="ignore"), _library("dp_accounting")
    logger, ours = logging.getLogger("absl"), _OfLibrary()
    logger.addFilter(ours)
    try:
        with errstate:
            yield
    finally:
        logger.removeFilter(ours)


class _OfLibrary(logging.Filter):
    """Rejects what dp-accounting logs in the thread that made this filter."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread or "dp_accounting" not in record.pathname
