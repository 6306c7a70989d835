"""What noisy sums cost: epsilon of a run, and the noise or the number of steps that a budget allows.

What is given is checked here; what it costs is computed in `composition`, and what a budget allows is searched for in
`search`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .._arguments import is_word, positive, real, shown, whole
from ..errors import ConfigurationError
from .composition import Event, loss_deviation, spent
from .search import largest, likely_distance, likely_precision

if TYPE_CHECKING:
    from .ledger import Release

ACCOUNTANTS = ("pld", "rdp")
NEIGHBOURS = ("add-or-remove", "replace")
LEAST_NOISE, MOST_NOISE, MOST_STEPS = 0.01, 1e8, 10**9  # where the searches end


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
        delta: The delta of (epsilon, delta)-differential privacy; in (0, 1), and far below 1 / size of the data.
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
    return spent([event], _delta(delta), *_ways(accountant, neighbours))


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
    return spent(events, _delta(delta), *ways)


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
        return spent([Event(1 / precision, rate, count)], delta, *ways, fine=fine)

    precision = largest(cost, target, likely_precision(target, delta, rate, count), 1 / MOST_NOISE, 1 / LEAST_NOISE)
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
        return spent([Event(noise, rate, int(steps))], delta, *ways, fine=fine)

    if cost(MOST_STEPS, True) <= target:
        raise ConfigurationError(
            f"noise_multiplier={noise_multiplier} with sample_rate={sample_rate} allows more than {MOST_STEPS} steps "
            f"for epsilon={epsilon}; lower one of epsilon and noise_multiplier."
        )
    likely = (likely_distance(target, delta) / max(loss_deviation(noise, rate), 1e-9)) ** 2
    return int(largest(cost, target, likely, 1, MOST_STEPS, whole=True) or 0)


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
