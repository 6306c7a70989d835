"""Audits: correct code loses what it claims and no more, and of faults that were put in none goes unseen.

Coins and noise are seeded, so that the outcomes do not vary. With other seeds a bound would be above the claim of
correct code with a probability below 1% each; noise that is seeded by the operating system is held to limits that it
exceeds with a probability below 1e-6.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from audit import (
    BOUND,
    CANARIES,
    DELTA,
    EXPECTED,
    LENGTH,
    NOISE_MULTIPLIER,
    REPLICAS,
    Bounds,
    Mechanism,
    Run,
    audited,
    canaries,
    claimed_epsilon,
    correlation,
    epsilon_of,
    kolmogorov,
    rate,
    save_scores,
)  # fmt: skip
from torch import Tensor

from perexample import NonFiniteExampleWarning, ParameterView
from perexample.extensions import ClippedGrad, Global

SCORES: dict[str, Any] = {
    "trials": CANARIES * REPLICAS, "claimed_epsilon": claimed_epsilon(), "correct": {}, "faults": {},
}  # fmt: skip


def recorded(kind: str, name: str, found: Bounds) -> Bounds:
    """The same, left for a scorecard."""
    SCORES[kind][name] = {
        "mu": found.mu, "epsilon": found.epsilon, "violates": found.violates, "noise_deviations": found.deviations,
    }  # fmt: skip
    save_scores("audit", SCORES)
    return found


# --------------------------------------------------------------------------------------------------------- correct code

SINGLE, DOUBLE = torch.float32, torch.float64
CORRECT = {
    "flat": Mechanism(),
    "automatic": Mechanism({"clip": "automatic"}),
    "global": Mechanism({"clip": Global(1.001 * LENGTH)}),  # what is longer than the threshold would be dropped
    "custom": Mechanism({"clip": lambda norms: torch.full_like(norms, 1e3)}),  # cut to C / norm
    "per-parameter": Mechanism({"groups": "per-parameter"}, layers=2, sensitivity=math.sqrt(2)),
    "two layers": Mechanism(layers=2),
}
CORRECT |= {f"{name}, float32": replace(mechanism, dtype=SINGLE) for name, mechanism in CORRECT.items()}
CORRECT |= {
    "second backward": Mechanism(arguments={"max_memory": 0}),
    "strategy model": Mechanism(arguments={"strategy": "model"}),
    "two steps": Mechanism(steps=2),
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct_code_keeps_its_claim(name):
    """And not by much: the audit would see a little more."""
    mechanism = CORRECT[name]
    found = recorded("correct", name, audited(mechanism))
    assert not found.violates
    assert found.epsilon >= 0.85 * epsilon_of(1 / (NOISE_MULTIPLIER * math.sqrt(mechanism.steps)))
    assert found.scaled
    assert found.signal == pytest.approx(1, abs=0.02)


def test_the_epsilon_of_a_gaussian_release():
    """Against values of the exact formula that are known from elsewhere."""
    assert epsilon_of(1.0) == pytest.approx(4.377, abs=1e-3)
    assert [epsilon_of(mu) for mu in (-1.0, 0.0, 1e-6)] == [0.0] * 3
    assert epsilon_of(60.0) > 1000


def test_the_ledger_claims_what_is_audited():
    """One step without a sampler; PLD is an upper bound."""
    pytest.importorskip("dp_accounting")
    run = Run(Mechanism(), torch.Generator().manual_seed(1))
    run.release(*canaries(torch.ones(CANARIES), DOUBLE))
    claimed = run.optimizer.ledger.epsilon(DELTA)
    assert claimed_epsilon() <= claimed <= claimed_epsilon() + 1e-3


def test_bounds_of_rates_hold_as_often_as_they_say():
    """All outcomes of ten tosses, each with its probability."""
    for p in (0.0, 0.1, 0.5, 0.97):
        chance = [math.comb(10, k) * p**k * (1 - p) ** (10 - k) for k in range(11)]
        assert sum(c for k, c in enumerate(chance) if rate(k, 10, "low") > p) <= 0.005
        assert sum(c for k, c in enumerate(chance) if rate(k, 10, "high") < p) <= 0.005


# --------------------------------------------------------------------------------------------------------------- faults


def reporting(share: float) -> type[ClippedGrad]:
    """Reports a share of its sensitivity, on which the noise depends."""

    class Reporting(ClippedGrad):
        def sensitivity(self) -> float:
            return share * super().sensitivity()

    return Reporting


def clipping_at(factor: float) -> Callable[..., ClippedGrad]:
    """Clips at another bound than it reports."""
    return lambda bound, **settings: reporting(1 / factor)(factor * bound, **settings)


class AfterAveraging(ClippedGrad):
    """Clips the mean of the gradients instead of each."""

    def __init__(self, bound: float) -> None:
        super().__init__(1e9)
        self.bound = bound

    def sensitivity(self) -> float:
        return self.bound

    def consume(self, params: Any) -> list[Tensor]:
        means = [total / EXPECTED for total in super().consume(params)]
        norm = torch.cat([mean.flatten() for mean in means]).norm().item()
        return [EXPECTED * min(1.0, self.bound / norm) * mean for mean in means]


def under_reported(share: float) -> Any:
    """Norms that are too small."""
    plain = ParameterView.batch_l2
    return lambda: mock.patch.object(ParameterView, "batch_l2", lambda view: share**2 * plain(view))


def same_noise(optimizer: torch.optim.Optimizer, clipping: ClippedGrad, generator: torch.Generator) -> None:
    """The stream begins anew after each step."""
    optimizer.register_step_pre_hook(lambda *_: generator.manual_seed(5) and None)


def one_without_noise(optimizer: torch.optim.Optimizer, clipping: ClippedGrad, generator: torch.Generator) -> None:
    """The last parameter shows its sum as it is."""
    p = optimizer.param_groups[-1]["params"][-1]

    def overwrite(*_: Any) -> None:
        p.grad = p.clipped_sum / EXPECTED

    optimizer.register_step_pre_hook(overwrite)


FAULTS = {  # and what sees each: the audit, or the test of the noise's size
    "noise / sqrt 2": (Mechanism(clipping=reporting(1 / math.sqrt(2))), "both"),
    "noise x 0.95": (Mechanism(clipping=reporting(0.95)), "both"),
    "noise x 0.98": (Mechanism(clipping=reporting(0.98)), "size"),
    "noise / expected batch size": (Mechanism(clipping=reporting(1 / EXPECTED)), "both"),
    "noise of two micro-batches": (Mechanism(clipping=reporting(math.sqrt(2))), "size"),
    "no noise in one parameter": (Mechanism(layers=2, tamper=one_without_noise), "both"),
    "same noise in each step": (Mechanism(steps=2, tamper=same_noise), "both"),
    "clipped after averaging": (Mechanism(clipping=AfterAveraging), "audit"),
    "clipped at 2 C": (Mechanism(clipping=clipping_at(2)), "audit"),
    "not clipped": (Mechanism(clipping=clipping_at(1e6)), "audit"),
    "per layer, billed as C": (
        Mechanism({"groups": "per-parameter"}, layers=2, clipping=reporting(1 / math.sqrt(2))),
        "audit",
    ),
    "norms 6% too small": (Mechanism(patched=under_reported(0.94)), "audit"),
    "every example twice": (Mechanism(passes=2), "audit"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name):
    mechanism, seen_by = FAULTS[name]
    found = recorded("faults", name, audited(mechanism))
    assert found.violates == (seen_by in ("both", "audit"))
    assert found.scaled == (seen_by == "audit")


# ---------------------------------------------------------------------------------------------------- poisoned examples

POISONED = 1000  # examples, one of which is poisoned, or all
POISONS = (math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-30)


def telling(mechanism: Mechanism, value: float, whole: bool) -> int:
    """Coordinates of releases that are not finite, or exactly zero, where one example or all are poisoned."""
    run, found = Run(mechanism, torch.Generator().manual_seed(1), POISONED, outputs=1), 0
    x, outputs = LENGTH * torch.eye(POISONED, dtype=mechanism.dtype), torch.zeros(POISONED, dtype=torch.long)
    x[:, 0] = value if whole else x[:, 0]
    x[7, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        for _ in range(3):
            released = run.release(x, outputs)
            found += int((~released.isfinite() | (released == 0)).sum())
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("value", POISONS)
def test_a_poisoned_example_shows_in_no_coordinate(value, dtype, whole):
    """A NaN would, and so would a NaN that is made zero after the noise was added."""
    assert telling(Mechanism(dtype=dtype), value, whole) == 0


class Trusting(ClippedGrad):
    """Does not look whether an example is finite."""

    def consume(self, params: Any) -> list[Tensor]:
        return [total.put(torch.tensor([3]), torch.tensor([math.nan]).to(total)) for total in super().consume(params)]


def mended_late(optimizer: torch.optim.Optimizer, clipping: ClippedGrad, generator: torch.Generator) -> None:
    def mend(*_: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad.nan_to_num_(0.0)

    optimizer.register_step_pre_hook(mend)


def test_a_poisoned_example_that_shows_is_seen():
    assert telling(Mechanism(clipping=Trusting), math.nan, False) == 3
    assert telling(Mechanism(clipping=Trusting, tamper=mended_late), math.nan, False) == 3


# ---------------------------------------------------------------------------------------------------------------- noise


def noise(mechanism: Mechanism, generator: torch.Generator | None, size: int, steps: int = 1) -> list[Tensor]:
    """The noise of some steps on empty batches, in units of its claimed size, ``[layers, size]``."""
    run = Run(mechanism, generator, size, outputs=1)
    none = torch.zeros(0, size, dtype=mechanism.dtype), torch.zeros(0, dtype=torch.long)
    return [run.release(*none) / (NOISE_MULTIPLIER * BOUND) for _ in range(steps)]


def test_noise_of_a_given_generator_has_the_claimed_size():
    """1e5 numbers: within 1%, which is 4.5 standard errors."""
    drawn = noise(Mechanism(), torch.Generator().manual_seed(3), 100_000)[0]
    assert abs(drawn.std().item() - 1) < 0.01


def test_noise_of_the_operating_system_has_the_claimed_size_and_is_normal():
    """Numbers enough to tell it from noise of 2% more or less: that shifts the statistic by 6.8 at its limit of 2.7."""
    drawn = noise(Mechanism(), None, 2_000_000)[0]
    assert abs(drawn[0, :100_000].std().item() - 1) < 0.02  # 9 standard errors
    assert abs(drawn.std().item() - 1) < 0.005  # 10 standard errors
    assert kolmogorov(drawn) < 2.7
    for scale in (0.98, 1.02):
        assert kolmogorov(drawn, scale) > 2.7


def pairs(drawn: list[Tensor]) -> list[float]:
    """Correlations of steps, and of parameters of one shape."""
    flat = [row for step in drawn for row in step]
    return [correlation(a, b) for i, a in enumerate(flat) for b in flat[:i]]


def test_noise_is_independent_over_steps_and_parameters():
    """15 pairs; beyond 6 standard errors with a probability of 2e-9 each."""
    found = pairs(noise(Mechanism(layers=2), None, 50_000, steps=3))
    assert len(found) == 15
    assert max(map(abs, found)) < 6


def test_noise_that_comes_again_is_seen():
    again = noise(Mechanism(tamper=same_noise), torch.Generator().manual_seed(3), 50_000, steps=3)
    assert max(pairs(again)) > 200
