"""Epsilon against closed forms and other accountants; searches that never round the wrong way; a quiet terminal."""

import logging
import math
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perexample import ConfigurationError
from perexample.privacy import accounting, composition
from perexample.privacy.accounting import epsilon, epsilon_of, noise_multiplier_for, steps_for

dp_accounting = pytest.importorskip("dp_accounting", reason="accounting needs dp-accounting (extra `privacy`)")
from dp_accounting.pld import PLDAccountant  # noqa: E402
from dp_accounting.rdp import RdpAccountant  # noqa: E402
from scipy import optimize, special, stats  # noqa: E402

REPLACE = dp_accounting.NeighboringRelation.REPLACE_ONE
PLD, RDP, BOTH = ("pld", "add-or-remove"), ("rdp", "add-or-remove"), ("pld", "replace")
WAYS = {"pld": PLD, "rdp": RDP, "pld-replace": BOTH}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def cost(delta, sigma, rate, steps, way=PLD):
    return epsilon(delta, noise_multiplier=sigma, sample_rate=rate, steps=steps, accountant=way[0], neighbours=way[1])


def release(sigma, rate=None):
    return SimpleNamespace(noise_multiplier=sigma, sample_rate=rate)


def event(sigma, rate):
    gaussian = dp_accounting.GaussianDpEvent(sigma)
    return gaussian if rate is None else dp_accounting.PoissonSampledDpEvent(rate, gaussian)


# ------------------------------------------------------------------------------------------------------- closed forms


def gaussian_delta(eps, distance):
    """Balle & Wang 2018, arXiv:1805.06530, theorem 8."""
    above = stats.norm.cdf(distance / 2 - eps / distance)
    return above - math.exp(eps + stats.norm.logcdf(-distance / 2 - eps / distance))


def gaussian_epsilon(delta, distance):
    if gaussian_delta(0, distance) <= delta:
        return 0.0
    return optimize.brentq(lambda eps: gaussian_delta(eps, distance) - delta, 0, distance**2 + 20 * distance)


GAUSSIANS = [(s, n) for s in (0.5, 1.0, 5.0, 80.0) for n in (1, 10, 1000, 10**5) if math.sqrt(n) / s < 30]


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-10])
@pytest.mark.parametrize(("sigma", "steps"), GAUSSIANS)
def test_without_amplification_it_is_the_gaussian_mechanism(sigma, steps, delta):
    expected = gaussian_epsilon(delta, math.sqrt(steps) / sigma)
    for rate in (None, 1, 1.0):
        assert cost(delta, sigma, rate, steps) == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert cost(delta, sigma, None, steps) >= expected * (1 - 1e-11)
    assert expected * (1 - 1e-9) <= cost(delta, sigma, None, steps, RDP) <= 1.6 * expected + 0.05
    assert cost(delta, 2 * sigma, None, steps, BOTH) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-10])
@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 10), (20.0, 1000), (100.0, 10**5), (1000.0, 10**5)])
def test_the_grid_is_an_upper_bound_and_tight_where_nearly_every_example_is_drawn(sigma, steps, delta):
    """Not the closed form but discretised and composed; what roundoff of its FFT may take is 4e-11 for 1e5 steps."""
    expected = gaussian_epsilon(delta, math.sqrt(steps) / sigma)
    most = gaussian_epsilon(delta - 1.5 * steps * 2**-51, math.sqrt(steps) / sigma) * (1 + 1e-3)
    if expected:
        for way, scale in ((PLD, 1), (BOTH, 2)):
            found = cost(delta, scale * sigma, 1 - 1e-9, steps, way)
            assert expected * (1 - 1e-7) <= found <= most


def mixture_delta(eps, sigma, upper, lower):
    """P(loss > eps) - e^eps Q(loss > eps) of two mixtures [(weight, mean), ...] with a loss that grows."""

    def log_density(mixture, x):
        return special.logsumexp([-((x - m) ** 2) / (2 * sigma**2) for _, m in mixture], b=[w for w, _ in mixture])

    def loss(x):
        return log_density(upper, x) - log_density(lower, x) - eps

    low, high = -40 * sigma - 1, 40 * sigma + 1
    x = low if loss(low) > 0 else high if loss(high) < 0 else optimize.brentq(loss, low, high, xtol=1e-13)
    tails = [sum(w * stats.norm.sf((x - m) / sigma) for w, m in mixture) for mixture in (upper, lower)]
    return tails[0] - math.exp(eps) * tails[1]


SINGLE = [(q, s) for q in (1e-3, 0.01, 0.2, 0.7) for s in (0.4, 0.8, 2.0, 10.0)]


@pytest.mark.parametrize("neighbours", ["add-or-remove", "replace"])
@pytest.mark.parametrize(("rate", "sigma"), SINGLE)
def test_one_step_has_the_hockey_stick_divergence_of_its_mixtures(rate, sigma, neighbours):
    drawn, other, nothing = [(1 - rate, 0), (rate, 1)], [(1 - rate, 0), (rate, -1)], [(1, 0)]
    mirrored = [(1 - rate, 0), (rate, -1)]
    pairs = [(drawn, other)] if neighbours == "replace" else [(drawn, nothing), (nothing, mirrored)]
    for delta in (1e-9, 1e-6, 1e-3):
        found = cost(delta, sigma, rate, 1, ("pld", neighbours))
        exact = [mixture_delta(found, sigma, *pair) for pair in pairs]
        assert max(exact) <= delta * (1 + 1e-6)
        if found > 0:
            tighter = found * (1 - 2e-3)
            assert max(mixture_delta(tighter, sigma, *pair) for pair in pairs) > delta


def test_published_figures():
    assert cost(1e-5, 1.0, 0.1, 10) == pytest.approx(2.855, abs=1e-3)
    assert cost(1e-5, 1.0, 0.1, 10, RDP) == pytest.approx(3.442, abs=1e-3)
    assert cost(1e-5, 1.0, None, 1) == pytest.approx(4.377, abs=1e-3)


# --------------------------------------------------------------------------------------------------- other accountants

COMMON = [(0.01, 1.0, 1000), (0.004, 0.8, 5000), (0.1, 3.0, 500), (0.5, 20.0, 1000), (0.001, 0.9, 2000)]


@pytest.mark.parametrize(("rate", "sigma", "steps"), COMMON)
def test_google_s_accountant_with_a_fine_grid_agrees(rate, sigma, steps):
    for way, relation in ((PLD, {}), (BOTH, {"neighboring_relation": REPLACE})):
        direct = PLDAccountant(value_discretization_interval=1e-4, **relation).compose(event(sigma, rate), steps)
        assert cost(1e-6, sigma, rate, steps, way) == pytest.approx(direct.get_epsilon(1e-6), rel=3e-3)


@pytest.mark.parametrize(("rate", "sigma", "steps"), COMMON)
def test_opacus_accountants_agree(rate, sigma, steps):
    accountants = pytest.importorskip("opacus.accountants", reason="the second oracle needs opacus")
    renyi, prv = accountants.RDPAccountant(), accountants.PRVAccountant()
    renyi.history = prv.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upper = prv.get_epsilon(1e-6, eps_error=0.01)
        by_renyi = renyi.get_epsilon(1e-6)
    found = cost(1e-6, sigma, rate, steps)
    assert upper - 0.021 <= found <= upper + 0.005
    assert cost(1e-6, sigma, rate, steps, RDP) == pytest.approx(by_renyi, rel=0.03)


def log_moment(rate, sigma, order):
    """``log E[(density ratio)^order]`` for a whole order, the binomial sum of Mironov et al. 2019, arXiv:1908.10530.

    The weights of the binomial sum to 1, so that each exponential may be taken minus 1: nothing cancels.
    """
    k = np.arange(2, order + 1)
    logs = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    logs += k * math.log(rate) + (order - k) * math.log1p(-rate)
    exponent = (k * k - k) / (2 * sigma**2)
    logs += np.where(exponent < 1, np.log(np.expm1(np.minimum(exponent, 1))), exponent + np.log1p(-np.exp(-exponent)))
    return np.logaddexp(0, special.logsumexp(logs))


MOMENTS = [(1e-4, 1.0), (1e-4, 1000.0), (0.01, 0.5), (0.1, 1.0), (0.1, 50.0), (0.5, 3.0), (0.9, 1e4), (0.99, 0.7)]


@pytest.mark.parametrize(("rate", "sigma"), MOMENTS)
def test_renyi_divergences_at_whole_orders_are_the_binomial_sums_and_never_less(rate, sigma):
    orders = composition.ORDERS
    for order, found in zip(orders, composition._divergences(sigma, rate, True), strict=True):
        if order == int(order):
            exact = log_moment(rate, sigma, int(order)) / (order - 1)
            assert exact * (1 - 1e-11) <= found <= exact * (1 + 1e-10) + 1e-14


@pytest.mark.parametrize(("rate", "sigma"), MOMENTS)
def test_renyi_divergences_at_broken_orders_are_upper_bounds(rate, sigma):
    """Of the integral, by the trapezoid rule, which converges exponentially for it; and not above the next order's."""
    shifts = np.arange(-40, 40, 0.02)
    found = dict(zip(composition.ORDERS, composition._divergences(sigma, rate, True), strict=True))
    for order in (1.02, 1.1, 1.5, 1.9, 2.5, 4.3, 9.9):
        at = min(found, key=lambda a, order=order: abs(a - order))
        z = np.concatenate([sigma * shifts, at + sigma * shifts]) if at > 5 * sigma else sigma * shifts
        z = np.unique(z)
        loss = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
        weights = np.gradient(z) / sigma
        exact = special.logsumexp(at * loss + stats.norm.logpdf(z / sigma), b=weights) / (at - 1)
        assert found[at] >= exact - 2e-8 * max(1, exact) / (at - 1)
        assert found[at] <= found[math.ceil(at)] * (1 + 1e-9) + 1e-13


@pytest.mark.parametrize(("rate", "sigma", "steps"), [*COMMON, (0.3, 0.5, 30), (1e-3, 0.4, 1000), (0.9, 60.0, 10**4)])
def test_rdp_is_no_looser_than_whole_orders_by_hand_and_no_tighter_than_pld(rate, sigma, steps):
    for delta in (1e-9, 1e-5, 1e-2):
        by_hand = min(
            steps * log_moment(rate, sigma, a) / (a - 1) + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
            for a in range(2, 300)
        )
        found = cost(delta, sigma, rate, steps, RDP)
        assert found <= max(by_hand, 0) * (1 + 5e-3)
        assert cost(delta, sigma, rate, steps) <= found * (1 + 1e-9)


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"), [(1e-8, 100.0, 100), (1e-6, 1e4, 10**4), (1e-12, 1e5, 1), (0.1, 1e8, 7)]
)
def test_tiny_losses_are_not_lost_in_roundoff(rate, sigma, steps):
    """Where every quantity is near 2^-52, a sum of many small losses (here Gaussian) must not come out as none."""
    distance = rate * math.sqrt(steps) / sigma
    for delta in (distance / 30, distance / 1e4):
        exact = gaussian_epsilon(1e-3, 1.0)  # a check of the helper, that it can be above 0
        assert exact > 0
        floor = distance * stats.norm.isf(delta / distance) / 2  # far below the true one
        for way in WAYS.values():
            assert cost(delta, sigma, rate, steps, way) > floor > 0


@pytest.mark.parametrize(("rate", "steps"), [(1e-5, 10**5), (1e-6, 10**5), (1e-8, 10**6)])
def test_tiny_rates_cost_little(rate, steps):
    """Where losses are smaller than any grid for them may be, the bound is rough, and not that of no amplification."""
    for way, variance in ((PLD, math.e - 1), (BOTH, 2 * math.e - 2 / math.e)):  # of one loss under N(0, 1), over rate^2
        limit = gaussian_epsilon(1e-7, rate * math.sqrt(steps * variance))  # to which so many small losses tend
        assert 0.99 * limit < cost(1e-7, 1.0, rate, steps, way) < 100 * limit


def test_a_rough_grid_is_used_where_it_says_more_than_renyi_divergences():
    accountant = PLDAccountant(value_discretization_interval=1e-4).compose(event(0.5, 1e-6), 10**5)
    found, by_rdp = (cost(1e-7, 0.5, 1e-6, 10**5, way) for way in (PLD, RDP))
    assert found == pytest.approx(accountant.get_epsilon(1e-7), rel=0.05)
    assert found < by_rdp / 10


@pytest.mark.parametrize(("rate", "steps"), [(1e-7, 10**9), (1e-8, 10**9), (1e-5, 10**8), (1e-6, 10**7)])
def test_to_replace_is_no_more_than_to_remove_and_to_add(rate, steps):
    """Also where its own grid is too rough, or there is none: twice (e, d) is (2 e, (1 + exp(e)) d)."""
    for most in (0.2, 0.7, 3.0):
        if cost(1e-6 / (1 + math.exp(most)), 1.0, rate, steps) <= most:
            break
    assert cost(1e-6, 1.0, rate, steps) < cost(1e-6, 1.0, rate, steps, BOTH) <= 2 * most
    assert cost(1e-6, 1.0, rate, steps // 10, BOTH) <= cost(1e-6, 1.0, rate, steps, BOTH)


# ------------------------------------------------------------------------------------------------------------ monotone

RUN = {
    "sigma": st.floats(-0.5, 2).map(lambda x: 10**x),
    "rate": st.floats(-2.5, 0).map(lambda x: 10**x),
    "steps": st.integers(1, 3000),
    "delta": st.floats(-8, -2).map(lambda x: 10**x),
    "way": st.sampled_from(list(WAYS.values())),
}
quick = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SAME = 1 + 1e-9


@quick
@given(more=st.sampled_from([1, 2, 100, 3000]), **RUN)
def test_more_steps_cost_no_less(sigma, rate, steps, delta, way, more):
    assert cost(delta, sigma, rate, steps, way) <= cost(delta, sigma, rate, steps + more, way) * SAME


@quick
@given(factor=st.sampled_from([1.0001, 1.01, 1.5, 10.0]), **RUN)
def test_more_noise_costs_no_more(sigma, rate, steps, delta, way, factor):
    assert cost(delta, sigma * factor, rate, steps, way) <= cost(delta, sigma, rate, steps, way) * SAME


@quick
@given(factor=st.sampled_from([0.9999, 0.99, 0.5, 0.1]), **RUN)
def test_smaller_rates_cost_no_more(sigma, rate, steps, delta, way, factor):
    assert cost(delta, sigma, rate * factor, steps, way) <= cost(delta, sigma, rate, steps, way) * SAME


@quick
@given(factor=st.sampled_from([1.0001, 1.01, 1.5, 10.0]), **RUN)
def test_larger_deltas_cost_no_more(sigma, rate, steps, delta, way, factor):
    assert cost(delta * factor, sigma, rate, steps, way) <= cost(delta, sigma, rate, steps, way) * SAME


@quick
@given(**{name: values for name, values in RUN.items() if name != "way"})
def test_replacing_costs_no_less_than_adding_and_pld_no_more_than_rdp(sigma, rate, steps, delta):
    assert cost(delta, sigma, rate, steps) <= cost(delta, sigma, rate, steps, BOTH) * (1 + 1e-3)
    assert cost(delta, sigma, rate, steps) <= cost(delta, sigma, rate, steps, RDP) * SAME


@ways
def test_asking_twice_changes_nothing(way):
    found = []
    for _ in range(2):
        composition._cost.cache_clear()
        composition._divergences.cache_clear()
        found += [cost(1e-5, 1.1, 0.02, 300, way), cost(1e-5, 1.1, 0.02, 300, way)]
    assert len(set(found)) == 1


# --------------------------------------------------------------------------------------------------- many kinds of step

SCHEDULE = [(0.8, 0.01, 200), (1.3, 0.01, 300), (2.0, 0.05, 100), (1.3, 0.01, 50), (30.0, 0.2, 40)]


def mixed(runs, way=PLD, delta=1e-6):
    return epsilon_of([(release(sigma, rate), count) for sigma, rate, count in runs], delta, *way)


@pytest.mark.parametrize("plain", [[], [(9.0, None, 1), (40.0, 1.0, 30)]], ids=["amplified", "mixed"])
def test_a_schedule_costs_what_google_s_accountant_says(plain):
    runs = SCHEDULE + plain
    for way, relation in ((PLD, {}), (BOTH, {"neighboring_relation": REPLACE})):
        direct = PLDAccountant(value_discretization_interval=4e-4, **relation)
        for sigma, rate, count in runs:
            direct.compose(event(sigma, rate), count)
        assert mixed(runs, way) == pytest.approx(direct.get_epsilon(1e-6), rel=3e-3)
    renyi = RdpAccountant(composition.ORDERS)
    for sigma, rate, count in runs:
        renyi.compose(event(sigma, rate), count)
    assert mixed(runs, RDP) == pytest.approx(renyi.get_epsilon(1e-6), rel=1e-9)


@ways
def test_neither_order_nor_pieces_matter(way):
    pieces = [(sigma, rate, 1) for sigma, rate, count in SCHEDULE for _ in range(count)]
    assert mixed(SCHEDULE, way) == mixed(SCHEDULE[::-1], way) == mixed(pieces, way)
    assert mixed([(1.1, 0.02, 300)], way) == mixed([(1.1, 0.02, 150)] * 2, way) == cost(1e-6, 1.1, 0.02, 300, way)


def test_gaussians_of_different_noise_are_one():
    found = mixed([(2.0, None, 3), (5.0, 1.0, 10)])
    assert found == pytest.approx(gaussian_epsilon(1e-6, math.sqrt(3 / 4 + 10 / 25)), rel=1e-9)


@ways
def test_another_release_costs_more(way):
    assert mixed(SCHEDULE, way) < mixed([*SCHEDULE, (1.0, 0.01, 100)], way)
    assert mixed(SCHEDULE, way) < mixed([*SCHEDULE, (3.0, None, 1)], way)


@ways
def test_what_saw_nothing_or_never_happened_is_free_and_what_had_no_noise_is_not(way):
    assert epsilon_of([], 1e-5, *way) == cost(1e-5, 1.0, 0.1, 0, way) == cost(1e-5, 0.0, 0.1, 0, way) == 0.0
    assert cost(1e-5, 1.0, 0.0, 100, way) == 0.0
    assert mixed([*SCHEDULE, (0.0, 0.1, 0), (1.0, 0, 9)], way) == mixed(SCHEDULE, way)
    for rate in (None, 0.1, 1.0):
        assert cost(1e-5, 0.0, rate, 1, way) == math.inf
        assert mixed([*SCHEDULE, (0.0, rate, 1)], way) == math.inf


@ways
def test_groups_of_similar_releases_cost_no_less_and_little_more(way, monkeypatch):
    runs = [(1 + i / 40, 0.02 + i / 4000, 5) for i in range(12)] + [(25.0, None, 2)]
    exact = mixed(runs, way)
    monkeypatch.setitem(composition.GROUPS, way[0], 5)
    composition._cost.cache_clear()
    found = mixed(runs, way)
    composition._cost.cache_clear()
    worst = mixed([(1.0, 0.02 + 11 / 4000, 60), runs[-1]], way)
    assert exact * 0.9999 <= found < worst
    assert len(composition._grouped(composition._merged(composition.Event(*run[:2], 1) for run in runs[:-1]), 5)) <= 5


@pytest.mark.slow
def test_a_noise_schedule_of_a_thousand_kinds_by_rdp():
    runs = [(1 + i / 1000, 0.01, 1) for i in range(1000)]
    assert cost(1e-6, 2.0, 0.01, 1000, RDP) <= mixed(runs, RDP) <= cost(1e-6, 1.0, 0.01, 1000, RDP)


@pytest.mark.slow
def test_a_noise_schedule_of_a_thousand_kinds_by_pld():
    """Within 3% of Google's accountant, which takes the steps in blocks of ten of the same noise, more and less."""
    runs, bounds = [(1 + i / 1000, 0.01, 1) for i in range(1000)], []
    for first in (0, 9):
        direct = PLDAccountant(value_discretization_interval=5e-4)
        for i in range(0, 1000, 10):
            direct.compose(event(1 + (i + first) / 1000, 0.01), 10)
        bounds.append(direct.get_epsilon(1e-6))
    assert bounds[1] * 0.999 <= mixed(runs) <= bounds[0] * 1.03


# ------------------------------------------------------------------------------------------------------------ searches

# rate, epsilon, steps, delta
PLANS = [
    (0.004, 3.0, 5000, 1e-5),
    (0.01, 8.0, 1000, 1e-5),
    (0.01, 50.0, 1000, 1e-2),
    (0.1, 0.1, 1, 1e-8),
    (0.3, 8.0, 300, 1e-5),
    (0.3, 50.0, 1, 1e-5),
    (None, 1.0, 1, 1e-5),
    (None, 0.01, 1, 1e-2),
    (1.0, 50.0, 10**5, 1e-10),
]
HEAVY = [
    (0.001, 1.0, 10**4, 1e-6),
    (0.01, 0.01, 10**5, 1e-10),
    (0.9, 3.0, 1000, 1e-6),
    (1e-4, 0.01, 1, 1e-5),
    (1e-4, 1.0, 10**5, 1e-5),
    (1e-4, 1.0, 1000, 1e-10),
    (1e-4, 8.0, 10**4, 1e-6),
    (1e-4, 50.0, 10**5, 1e-2),
    (0.01, 1.0, 10**5, 1e-10),
    (0.3, 1.0, 10**5, 1e-10),
    (0.3, 50.0, 10**5, 1e-2),
    (0.99, 0.01, 10**5, 1e-5),
]
plans = pytest.mark.parametrize(
    ("rate", "target", "steps", "delta"), [*PLANS, *(pytest.param(*plan, marks=pytest.mark.slow) for plan in HEAVY)]
)


@ways
@plans
def test_calibrated_noise_keeps_the_budget_and_is_nearly_the_least(rate, target, steps, delta, way):
    named = {"sample_rate": rate, "steps": steps, "accountant": way[0], "neighbours": way[1]}
    sigma = noise_multiplier_for(target, delta, **named)
    composition._cost.cache_clear()
    assert cost(delta, sigma, rate, steps, way) <= target
    assert cost(delta, sigma * 0.995, rate, steps, way) > target


@ways
@plans
def test_affordable_steps_are_the_most(rate, target, steps, delta, way):
    sigma = 1.003 * noise_multiplier_for(
        target, delta, sample_rate=rate, steps=steps, accountant=way[0], neighbours=way[1]
    )
    found = steps_for(target, delta, noise_multiplier=sigma, sample_rate=rate, accountant=way[0], neighbours=way[1])
    assert type(found) is int
    assert found >= steps
    assert cost(delta, sigma, rate, found, way) <= target < cost(delta, sigma, rate, found + 1, way)


@settings(quick, max_examples=8)
@given(target=st.floats(-1, 1.5).map(lambda x: 10**x), **RUN | {"steps": st.integers(1, 300)})
def test_no_search_rounds_down(target, sigma, rate, steps, delta, way):
    named = {"sample_rate": rate, "accountant": way[0], "neighbours": way[1]}
    found = noise_multiplier_for(target, delta, steps=steps, **named)
    assert cost(delta, found, rate, steps, way) <= target
    if found > accounting.LEAST_NOISE:
        assert cost(delta, found * 0.995, rate, steps, way) > target
    most = steps_for(target, delta, noise_multiplier=sigma, **named)
    assert cost(delta, sigma, rate, most, way) <= target < cost(delta, sigma, rate, most + 1, way)


def test_the_least_noise_is_found_where_sampling_alone_is_enough():
    """One step with rate 1e-4 is (0, 1e-4)-private whatever the noise."""
    found = noise_multiplier_for(1.0, 1e-2, sample_rate=1e-4, steps=1)
    assert found == accounting.LEAST_NOISE
    assert cost(1e-2, found, 1e-4, 1) <= 1.0


@ways
def test_no_step_is_affordable_without_noise_or_budget(way):
    named = {"sample_rate": 0.5, "accountant": way[0], "neighbours": way[1]}
    assert steps_for(1.0, 1e-5, noise_multiplier=0.0, **named) == 0
    assert steps_for(0.01, 1e-5, noise_multiplier=0.3, **named) == 0


def test_what_cannot_be_reached_is_an_error():
    with pytest.raises(
        ConfigurationError, match=r"epsilon=0\.01 with delta=1e-300 cannot be reached .*accountant='pld'\.$"
    ):
        noise_multiplier_for(0.01, 1e-300, sample_rate=0.1, steps=10, accountant="rdp")
    with pytest.raises(ConfigurationError, match=r"epsilon=1e-12 .* cannot be reached"):
        noise_multiplier_for(1e-12, 1e-14, sample_rate=None, steps=10**6)
    with pytest.raises(ConfigurationError, match="more than 1000000000 steps"):
        steps_for(1.0, 1e-5, noise_multiplier=1e7, sample_rate=1e-3)
    with pytest.raises(ConfigurationError, match="more than 1000000000 steps"):
        steps_for(1.0, 1e-5, noise_multiplier=1.0, sample_rate=0)


# ------------------------------------------------------------------------------------------------------------- extremes


@ways
@pytest.mark.parametrize("sigma", [1e-300, 1e-30, 0.02, 1.0, 1e9, 1e300])
@pytest.mark.parametrize("rate", [None, 1e-300, 1e-9, 0.5, 1 - 1e-16])
def test_no_extreme_gives_nan_or_a_traceback(sigma, rate, way):
    for steps in (1, 10**5, 10**15):
        for delta in (1e-300, 1e-12, 0.5):
            found = cost(delta, sigma, rate, steps, way)
            assert found >= 0
            if sigma < 1e-20 and rate is None:
                assert found > 1e30


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(0.05, 0.1, 10**5), (0.3, 0.5, 10**5), (1.0, 0.9, 3000)])
def test_where_pld_would_be_too_large_rdp_or_no_amplification_bounds_it(sigma, rate, steps):
    found = cost(1e-5, sigma, rate, steps)
    plain = gaussian_epsilon(1e-5, math.sqrt(steps) / sigma)
    assert found > composition.LARGEST
    assert found == pytest.approx(min(cost(1e-5, sigma, rate, steps, RDP), plain), rel=1e-9)
    assert cost(1e-5, sigma, rate, steps, BOTH) == pytest.approx(cost(1e-5, sigma / 2, None, steps), rel=1e-9)


def test_delta_near_roundoff_is_not_trusted_to_pld():
    """1e5 steps lose up to 4e-11 of delta: below that the answer is that of RDP."""
    assert cost(2e-11, 1.0, 0.01, 10**5) == cost(2e-11, 1.0, 0.01, 10**5, RDP)
    assert cost(1e-9, 1.0, 0.01, 10**5) < cost(1e-9, 1.0, 0.01, 10**5, RDP)


@pytest.mark.parametrize("broken", [math.nan, OverflowError("math range error"), ValueError("not in order")], ids=repr)
def test_what_the_library_cannot_compute_bounds_nothing(broken, monkeypatch):
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    def fails(self, delta):
        if isinstance(broken, Exception):
            raise broken
        return broken

    monkeypatch.setattr(PrivacyLossDistribution, "get_epsilon_for_delta", fails)
    composition._cost.cache_clear()
    found = cost(1e-5, 1.23, 0.1, 10)
    composition._cost.cache_clear()
    assert found == cost(1e-5, 1.23, 0.1, 10, RDP)


# ----------------------------------------------------------------------------------------------------------- bad values

GOOD = {"delta": 1e-5, "noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "epsilon": 1.0}
NUMBERS = [math.nan, math.inf, -math.inf, -1, True, "1", [1.0], 1j]
BAD = {
    "delta": [*NUMBERS, None, 0, 0.0, 1, 1.0, 1.5],
    "epsilon": [*NUMBERS, None, 0, 0.0],
    "noise_multiplier": [*NUMBERS, None],
    "sample_rate": [*NUMBERS, 1.0001, 2],
    "steps": [*NUMBERS, None, 1.0, 2.5, 2**60],
    "accountant": ["gdp", "PLD", None, 1],
    "neighbours": ["add", "replace-one", None, 1],
}
USED = {
    epsilon: ["delta", "noise_multiplier", "sample_rate", "steps"],
    noise_multiplier_for: ["epsilon", "delta", "sample_rate", "steps"],
    steps_for: ["epsilon", "delta", "noise_multiplier", "sample_rate"],
}


CALLS = [
    pytest.param(function, name, value, id=f"{function.__name__}-{name}-{value}")
    for function, names in USED.items()
    for name in (*names, "accountant", "neighbours")
    for value in BAD[name]
]


@pytest.mark.parametrize(("function", "name", "value"), CALLS)
def test_bad_arguments_are_named(function, name, value):
    used = {argument: GOOD[argument] for argument in USED[function]}
    with pytest.raises(ConfigurationError, match=f"^{name} must be"):
        function(**used | {name: value})


def test_bad_arguments_are_named_even_where_the_answer_is_known():
    with pytest.raises(ConfigurationError, match=r"^delta must be"):
        epsilon(2.0, noise_multiplier=1.0, sample_rate=0.1, steps=0)
    with pytest.raises(ConfigurationError, match=r"^steps must be a whole number, 1 or more"):
        noise_multiplier_for(1.0, 1e-5, sample_rate=0.1, steps=0)
    with pytest.raises(ConfigurationError, match=r"^delta must be"):
        epsilon_of([], 0.0)
    with pytest.raises(ConfigurationError, match=r"^sample_rate must be"):
        steps_for(1.0, 1e-5, noise_multiplier=0.0, sample_rate=7)


@pytest.mark.parametrize("runs", [None, 3, [1], [(1.0, 2)], [(release(1.0, 0.1), 2, 3)], "ab"], ids=repr)
def test_runs_that_are_none(runs):
    with pytest.raises(ConfigurationError, match=r"^runs must be pairs"):
        epsilon_of(runs, 1e-5)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ((release(-1.0, 0.1), 2), "noise_multiplier"),
        ((release(1.0, 2), 2), "sample_rate"),
        ((release(1.0), 2.0), "count"),
    ],
)
def test_bad_entries_of_runs_are_named(run, name):
    with pytest.raises(ConfigurationError, match=f"^{name} must be"):
        epsilon_of([(release(1.0, 0.1), 3), run], 1e-5)


def test_rdp_has_no_bound_for_replacing():
    with pytest.raises(ConfigurationError, match=r"accountant='rdp' .* neighbours='replace' .* use accountant='pld'"):
        cost(1e-5, 1.0, 0.1, 10, ("rdp", "replace"))


def test_numbers_of_numpy_are_numbers():
    found = cost(np.float64(1e-5), np.float32(1.5), np.float64(0.125), np.int64(10))
    assert found == cost(1e-5, 1.5, 0.125, 10)
    assert type(found) is float


# --------------------------------------------------------------------------------------------------- quiet and optional

FLOODS = (0.5, 1.0)  # rate and noise for which dp-accounting warns of orders that do not converge


def test_the_terminal_stays_clean_and_logging_as_it_was(capfd, caplog):
    logger = logging.getLogger("absl")
    RdpAccountant(composition.ORDERS).compose(event(FLOODS[1], FLOODS[0]))
    assert "failed to converge" in caplog.text + capfd.readouterr().err  # else this test would show nothing
    caplog.clear()
    before = logger.level, list(logger.filters), list(logger.handlers), logger.propagate, logger.disabled
    levels, errors, shown = logging.root.level, np.geterr(), list(warnings.filters)
    composition._cost.cache_clear()
    composition._divergences.cache_clear()
    for way in WAYS.values():
        cost(1e-5, FLOODS[1], FLOODS[0], 5, way)
        cost(1e-10, 1.0, 0.9, 800, way)  # near the epsilon at which e^-epsilon underflows
    noise_multiplier_for(2.0, 1e-5, steps=5, sample_rate=FLOODS[0], accountant="rdp")
    assert (logger.level, list(logger.filters), list(logger.handlers), logger.propagate, logger.disabled) == before
    assert (logging.root.level, np.geterr(), list(warnings.filters)) == (levels, errors, shown)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_logging_is_as_it_was_after_an_error(monkeypatch):
    def fails(*_):
        raise MemoryError

    before = list(logging.getLogger("absl").filters)
    monkeypatch.setattr(composition, "_pld_epsilon", fails)
    with pytest.raises(MemoryError):
        cost(1e-5, 1.2345, 0.1, 10)
    assert logging.getLogger("absl").filters == before


def test_what_others_log_meanwhile_is_seen(caplog):
    """Messages of other threads, and of this one from elsewhere."""
    with composition._quiet():
        logging.getLogger("absl").warning("mine")
        thread = threading.Thread(target=lambda: RdpAccountant([1.02]).compose(event(FLOODS[1], FLOODS[0])))
        thread.start()
        thread.join()
        RdpAccountant([1.02]).compose(event(FLOODS[1], FLOODS[0]))
    assert [record.message[:10] for record in caplog.records] == ["mine", "_compute_l"]


def test_threads_agree_and_leave_nothing():
    before, expected = list(logging.getLogger("absl").filters), cost(1e-5, 1.0, 0.5, 10, RDP)
    composition._cost.cache_clear()
    composition._divergences.cache_clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(cost(1e-5, 1.0, 0.5, 10, RDP))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert logging.getLogger("absl").filters == before


def test_without_dp_accounting_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.rdp", None)
    composition._cost.cache_clear()
    with pytest.raises(ImportError, match=r"pip install dp-accounting"):
        cost(1e-5, 1.3, None, 10, RDP)


def test_it_is_imported_when_first_needed():
    code = "import sys, perexample.privacy.accounting; assert not {'dp_accounting', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
