"""What several releases cost together, by one of two accountants.

Google's ``dp-accounting`` (extra ``privacy``, imported when first needed) makes and composes the privacy loss
distributions (PLD) and the Renyi divergences (RDP). Here is what it leaves open: the grid, so that PLD is both tight
and quick, and upper bounds where floating point or memory give out. Every number is an upper bound:

* PLD rounds losses so that epsilon can only grow (connect the dots, arXiv:2207.04380). The grid follows the spread of
  the loss of one step, 1/4 to 1/40 of it. The Fourier transforms that compose the steps may lose some delta to
  roundoff (measured against extended precision in some 60 configurations: up to ``0.83 steps 2^-52``, and 1.13 where
  delta is above 1e-6); twice ``steps 2^-52`` is taken off delta beforehand. That is a margin, no proof.
* Steps that are not amplified are one Gaussian together, whose epsilon is known in closed form (arXiv:1805.06530). The
  same, as if no step were amplified, bounds every epsilon.
* Where PLD would be too large (epsilon above 600) or too rough (delta near roundoff), RDP takes over. Where the
  grid has to be wider than the spread, as for tiny sample rates, the lesser of both is taken. RDP knows nothing of
  examples that are replaced; in its place their epsilon is that of one that is removed, and one that is added.
* More than 128 different releases (RDP: 16), as a noise schedule makes them, are put in that many groups, each counted
  with its least noise and its largest sample rate.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

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


def spent(events: list[Event], delta: float, accountant: str, neighbours: str, fine: bool = True) -> float:
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
            bounds[-1] = _otherwise(events, delta, neighbours, fine)
        return min(bounds)


def _otherwise(events: tuple[Event, ...], delta: float, neighbours: str, fine: bool) -> float:
    """An upper bound that needs no grid as fine as the PLD's; infinite where there is none."""
    if neighbours != "replace":
        return _rdp_epsilon(events, delta, fine)
    # (e, d) twice, as to a third data set and on from it, is (2 e, (1 + exp(e)) d).
    for most in (0.1, 0.2, 0.4, 0.7, 3.0, 10.0):
        one = _cost(events, delta / (1 + math.exp(most)), "pld", "add-or-remove", fine)
        if one <= most:
            return 2 * one
    return math.inf


def _pld_epsilon(events: tuple[Event, ...], delta: float, neighbours: str, fine: bool) -> float:
    """By composing discretised privacy loss distributions; infinite where they would be too large or too rough."""
    events = _grouped(events, GROUPS["pld"])
    steps = sum(event.steps for event in events)
    (step, rough), left = _grid(events, neighbours, fine), delta - ROUNDOFF * (steps + 4 * len(events))
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
        found = _bound(total.get_epsilon_for_delta(left))
    except (ArithmeticError, ValueError):  # what its own functions raise where floats overflow or lose their order
        return math.inf
    return min(found, _otherwise(events, delta, neighbours, fine)) if rough else found


def _repeated(one: Any, count: int, tail: float) -> Any:
    """``count`` times one PLD, in blocks where that is often: a short PLD takes its size to the power of ``count``."""
    blocks, rest = divmod(count, BLOCK)
    if blocks < BLOCK:
        return one.self_compose(count, tail)
    many = one.self_compose(BLOCK, tail / (2 * blocks)).self_compose(blocks, tail / 2)
    return many.compose(one.self_compose(rest, tail / 2), tail / 2) if rest else many


def _grid(events: tuple[Event, ...], neighbours: str, fine: bool) -> tuple[float | None, bool]:
    """Width of the grid of losses, a power of two, None if they are too large; and whether it is rough beside them."""
    # It grows with rate, steps and 1 / noise, and the coarser of two grids is part of the finer: epsilon is monotone.
    amplified = [event for event in events if event.rate < 1]
    distance = 2 if neighbours == "replace" else 1
    variance = sum(event.steps * loss_deviation(event.noise, event.rate) ** 2 for event in amplified)
    spread = math.sqrt(variance / sum(event.steps for event in amplified))
    reach = max(_reach(event.noise / distance, event.rate) for event in events)
    if not 0 < variance * distance**2 < 4000 or reach == 0:
        return None, False
    width = min(spread / 4, max(spread / 20, reach / 10_000))
    width = width if fine else min(4 * width, spread / 2)
    variance *= distance**2
    # of all steps together: mean and tails, whose bound by dp-accounting is rough where the steps are many
    extent = 2 * reach + variance + max(14 * math.sqrt(variance), variance / (2 * reach))
    # Narrower than 2^-30, differences of delta are roundoff. What that adds to the mass of a step, about 2e-17 of
    # reach / width^2, is here held to a third for all steps together; where it grows, compositions never end.
    steps = sum(event.steps for event in events)
    width = max(width, extent / POINTS, 2.0**-30, 2.0**-27 * math.sqrt(steps * reach))
    rough = width > spread
    width = max(width, reach / 100_000) if rough else width
    return (None, False) if width > 8192 * spread else (2.0 ** math.floor(math.log2(width)), rough)


def loss_deviation(noise: float, rate: float) -> float:
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
