"""An audit: how well a release tells whether an example took part, bounded from below by counting.

Each canary has a gradient of length 10 in one coordinate of its own, so that this coordinate of a release depends on it
only: canary (o, i) has input i and output o of a linear layer, whose weight has a coordinate for each. A fair coin
decides for each whether it takes part, and every coordinate of every release is one independent trial of the same test:
is it above half of the signal? Its rates of true and false positives, bounded by Clopper and Pearson, give a lower
bound of mu, the distance of two unit Gaussians that are as hard to tell apart, and so of epsilon. The claim, of one
release that saw every example, is ``mu = 1 / noise_multiplier``.

Everything runs through `extend`, `ClippedGrad`, `perex` and `DP_SGD`, and the release is what the parameters show.

References:
    Nasr et al. 2023, arXiv:2302.07956 (canaries in gradients, bounds by Gaussian differential privacy); Dong et al.
    2022, arXiv:1905.02383, corollary 2.13 (mu and epsilon).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import optimize, stats
from torch import Tensor, nn

from perexample import DP_SGD, extend, perex
from perexample.extensions import ClippedGrad

SIDE = 100  # inputs, and outputs, so that a batch is SIDE numbers for each canary and not as many as there are canaries
CANARIES, REPLICAS = SIDE**2, 10
LENGTH = 10.0  # of a canary's gradient in each layer
BOUND = 1.0
NOISE_MULTIPLIER = 1.0
EXPECTED = CANARIES / 2  # expected_batch_size
DELTA = 1e-5
ERROR = 0.01  # probability that the lower bound is too high


def save_scores(name: str, scores: Any) -> None:
    """Leave figures for a scorecard in the folder that the environment names, if it does."""
    folder = os.environ.get("PEREXAMPLE_SCORES")
    if folder:
        Path(folder, f"{name}.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- mechanisms


def unchanged(optimizer: torch.optim.Optimizer, clipping: ClippedGrad, generator: torch.Generator) -> None:
    """No fault."""


@dataclass(frozen=True)
class Mechanism:
    """What is audited; the last five say how it may be broken.

    Attributes:
        settings: Arguments of `ClippedGrad` but the bound.
        layers: Number of linear layers whose outputs are added up; each canary has a gradient in all of them.
        dtype: Of the parameters.
        arguments: Those of `perex`.
        sensitivity: What one example may add to all sums, in units of the bound.
        clipping: What is used in place of `ClippedGrad`.
        tamper: Changes the optimizer.
        patched: Changes the library.
        passes: How often the batch is run before a step.
        steps: Releases; with two a canary can be part of the first only, and the difference of both is looked at.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    layers: int = 1
    dtype: torch.dtype = torch.float64
    arguments: dict[str, Any] = field(default_factory=dict)
    sensitivity: float = 1.0
    clipping: Callable[..., ClippedGrad] = ClippedGrad
    tamper: Callable[[Any, ClippedGrad, torch.Generator], None] = unchanged
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext
    passes: int = 1
    steps: int = 1


class Layers(nn.Module):
    """Sum of linear layers."""

    def __init__(self, inputs: int, outputs: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)


class Run:
    """A mechanism at work."""

    def __init__(
        self, mechanism: Mechanism, generator: torch.Generator | None, inputs: int = SIDE, outputs: int = SIDE
    ) -> None:
        self.mechanism = mechanism
        self.model = extend(Layers(inputs, outputs, mechanism.layers).to(mechanism.dtype))
        self.clipping = mechanism.clipping(BOUND, **mechanism.settings)
        self.optimizer = DP_SGD(
            self.model.parameters(),
            lr=1.0,
            clipping=self.clipping,
            noise_multiplier=NOISE_MULTIPLIER,
            expected_batch_size=EXPECTED,
            generator=generator,
        )
        mechanism.tamper(self.optimizer, self.clipping, generator)

    def release(self, x: Tensor, outputs: Tensor) -> Tensor:
        """What a step shows of the sums in each layer, ``[layers, outputs * inputs]``: how far it moved the parameters.

        Args:
            x: Inputs of the examples.
            outputs: The one output of each that its loss is about.
        """
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
        self.optimizer.zero_grad()
        with perex(self.clipping, grad=False, **self.mechanism.arguments):
            for _ in range(self.mechanism.passes):
                self.model(x).gather(1, outputs[:, None]).neg().mean().backward()
        self.optimizer.step()
        return EXPECTED * torch.stack([p.detach().double().flatten() for p in self.model.parameters()])


def canaries(taken: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of those that take part, in the order of the coordinates."""
    numbers = taken.nonzero().flatten()
    x = torch.zeros(len(numbers), SIDE, dtype=dtype)
    x.scatter_(1, (numbers % SIDE)[:, None], LENGTH)
    return x, numbers // SIDE


@dataclass(frozen=True)
class Trials:
    """Outcomes: which canaries took part, and the score of each, in units of the sensitivity."""

    included: Tensor
    scores: Tensor


def observe(mechanism: Mechanism, seed: int = 0) -> Trials:
    """Run it ``REPLICAS`` times, with the same coins and noise in every call."""
    generator, coins = (torch.Generator().manual_seed(2 * seed + k) for k in (0, 1))
    nobody = canaries(torch.zeros(CANARIES), mechanism.dtype)
    unit = BOUND * mechanism.sensitivity * math.sqrt(mechanism.layers)
    included, scores = [], []
    with mechanism.patched():
        run = Run(mechanism, generator)
        for _ in range(REPLICAS):
            taken = torch.rand(CANARIES, generator=coins) < 0.5
            score = run.release(*canaries(taken, mechanism.dtype)).sum(0) / unit
            if mechanism.steps == 2:
                score = score - run.release(*nobody).sum(0) / unit
            included.append(taken)
            scores.append(score)
    return Trials(torch.cat(included), torch.cat(scores))


# --------------------------------------------------------------------------------------------------------------- bounds


@dataclass(frozen=True)
class Bounds:
    """What the trials say.

    Attributes:
        mu: Lower bound of mu.
        epsilon: Lower bound of epsilon.
        deviations: By how many standard errors the standard deviation of the noise is off.
        signal: Mean score of canaries that took part, in units of the sensitivity.
    """

    mu: float
    epsilon: float
    deviations: float
    signal: float

    @property
    def violates(self) -> bool:
        """Whether more is lost than claimed."""
        return self.epsilon > claimed_epsilon()

    @property
    def scaled(self) -> bool:
        """Whether the noise is of the claimed size."""
        return abs(self.deviations) <= 4


def epsilon_of(mu: float, delta: float = DELTA) -> float:
    """The epsilon of a Gaussian mechanism of this mu."""
    if mu <= 0:
        return 0.0
    normal = stats.norm

    def excess(epsilon: float) -> float:
        # exp(epsilon) Phi(.) by its logarithm: the factors alone over- and underflow
        second = math.exp(epsilon + normal.logcdf(-epsilon / mu - mu / 2))
        return normal.cdf(-epsilon / mu + mu / 2) - second - delta

    return float(optimize.brentq(excess, 0.0, mu * (mu / 2 + 10))) if excess(0.0) > 0 else 0.0


def claimed_epsilon() -> float:
    """That of one release without amplification."""
    return epsilon_of(1 / NOISE_MULTIPLIER)


def rate(hits: int, trials: int, side: str) -> float:
    """Bound of a rate from below or above by Clopper and Pearson; both sides hold but with probability ``ERROR``."""
    if side == "low":
        return float(stats.beta.ppf(ERROR / 2, hits, trials - hits + 1)) if hits else 0.0
    return float(stats.beta.ppf(1 - ERROR / 2, hits + 1, trials - hits)) if hits < trials else 1.0


def bounds(trials: Trials, steps: int = 1) -> Bounds:
    """Bounds from the test whether a score is above half of the signal."""
    inside, outside = trials.scores[trials.included], trials.scores[~trials.included]
    true = rate(int((inside > 0.5).sum()), len(inside), "low")
    false = rate(int((outside > 0.5).sum()), len(outside), "high")
    mu = float(stats.norm.ppf(true) - stats.norm.ppf(false)) if true > 0 and false < 1 else 0.0
    std = outside.std().item() / (NOISE_MULTIPLIER * math.sqrt(steps))
    return Bounds(mu, epsilon_of(mu), (std - 1) * math.sqrt(2 * len(outside)), inside.mean().item())


def audited(mechanism: Mechanism) -> Bounds:
    """Bounds of a mechanism."""
    return bounds(observe(mechanism), mechanism.steps)


# ---------------------------------------------------------------------------------------------------------------- noise


def kolmogorov(values: Tensor, scale: float = 1.0) -> float:
    """``sqrt(n) sup |F_n - Phi|`` of the scaled values; above 2.7 with a probability of 1e-6 if they are normal."""
    ordered = scale * values.double().flatten().sort().values
    n = len(ordered)
    normal = torch.special.ndtr(ordered)
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - normal
    return math.sqrt(n) * max(above.max().item(), (1 / n - above).max().item())


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two tensors of one size, in standard errors."""
    return math.sqrt(a.numel()) * torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
