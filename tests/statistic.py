"""Whether batches look as independent Poisson samples do; knows nothing of the library."""

import math

import torch
from scipy import stats

LIMIT = 5.0  # standard errors; a sound sampler exceeds it with probability 6e-7 in each of the tests for a mean
LEVEL = 3e-7  # on each side of a chi-square
RATIO = (0.9, 1.1)  # of the variance of sizes: 4.5 standard errors for 4000 batches, 8e-6


def poisson_faults(batches, data_size, sample_rate):
    """What tells the batches from Poisson samples, in words; nothing, with probability > 1 - 2e-5, if they are such.

    Takes at least 2000 batches, better 4000, and 20 examples or more; needs sample_rate < 1.
    """
    if len(batches) < 2000:
        raise ValueError(f"{len(batches)} batches are too few to tell.")
    if any(sorted(set(batch)) != list(batch) or not set(batch) <= set(range(data_size)) for batch in batches):
        return ["indices: not ascending, repeated or out of range"]
    member = torch.zeros(len(batches), data_size, dtype=torch.float64)
    for row, batch in zip(member, batches, strict=True):
        row[batch] = 1.0
    return [fault for test in (_sizes, _inclusion, _ends, _pairs, _successors) for fault in test(member, sample_rate)]


def _sizes(member, q):
    (draws, n), sizes = member.shape, member.sum(1)
    ratio = sizes.var().item() / (n * q * (1 - q))
    if not RATIO[0] <= ratio <= RATIO[1]:
        yield f"size: variance is {ratio:.3f} of n q (1 - q)"
    yield from _off("size: mean", sizes.sum().item(), draws * n * q, draws * n * q * (1 - q))
    empty = (1 - q) ** n
    yield from _off("size: empty batches", (sizes == 0).sum().item(), draws * empty, draws * empty * (1 - empty))


def _inclusion(member, q):
    """Both sides: where every example comes once in an epoch, counts differ too little."""
    draws, n = member.shape
    statistic = ((member.sum(0) - draws * q) ** 2).sum().item() / (draws * q * (1 - q))
    yield from _tail("inclusion: counts of the examples", statistic, n)


def _ends(member, q):
    draws, n = member.shape
    for name, index in (("first", 0), ("last", n - 1)):
        yield from _off(f"inclusion: {name} example", member[:, index].sum().item(), draws * q, draws * q * (1 - q))


def _pairs(member, q):
    """Co-occurrence q^2; the products of centred inclusions are uncorrelated between pairs."""
    draws, n = member.shape
    upper = torch.triu_indices(n, n, 1)
    together = (member.T @ member)[upper[0], upper[1]]
    variance = q**2 * (1 - q**2) + 2 * (n - 2) * q**3 * (1 - q)  # of one pair, and with the pairs that share an example
    yield from _off(
        "pairs: in one batch", together.sum().item(), draws * len(together) * q**2, draws * len(together) * variance
    )
    centred = member - q
    products = (centred.T @ centred)[upper[0], upper[1]]
    yield from _tail("pairs: dependence", (products**2).sum().item() / (draws * (q * (1 - q)) ** 2), len(products))


def _successors(member, q):
    (draws, n), centred = member.shape, member - q
    for lag in (1, 2, 3):
        product = (centred[:-lag] * centred[lag:]).sum().item()
        yield from _off(f"successors: batches {lag} apart", product, 0.0, (draws - lag) * n * (q * (1 - q)) ** 2)


def _off(name, found, mean, variance):
    z = (found - mean) / math.sqrt(variance)
    if abs(z) > LIMIT:
        yield f"{name}: {z:+.1f} standard errors off"


def _tail(name, statistic, degrees):
    if not stats.chi2.ppf(LEVEL, degrees) <= statistic <= stats.chi2.isf(LEVEL, degrees):
        yield f"{name}: chi-square {statistic:.1f} with {degrees} degrees"
