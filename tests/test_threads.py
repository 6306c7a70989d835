"""Threads: each finds to the last bit what it would find alone, and draws noise of its own.

Torch's global generator belongs to all threads, so nothing here draws from it while they run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from audit import correlation
from torch import Tensor, nn

from perexample import DP_SGD, PerExampleError, extend, perex
from perexample.extensions import ClippedGrad

THREADS, N = 4, 5


pytestmark = pytest.mark.usefixtures("no_collection")


class Attention(nn.Module):
    """Parameters of modules and bare ones, on ``[N, 4]`` seen as two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.randn(2)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unflatten(1, (2, 2)) * self.scale
        weights = (h @ self.layer(h).mT).softmax(-1)
        return (weights @ h).flatten(1)


MODELS: list[Callable[[], nn.Module]] = [
    lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)),
    Attention,
]


class Training:
    """One model in training, on batches and with noise of its own generator."""

    def __init__(self, number: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.clipping = extend(MODELS[number]()), ClippedGrad(0.1)
        self.data = torch.Generator().manual_seed(seed)
        self.optimizer = DP_SGD(
            self.model.parameters(),
            lr=0.1,
            clipping=self.clipping,
            noise_multiplier=0.5,
            expected_batch_size=N,
            generator=torch.Generator().manual_seed(seed + 1000),
        )
        self.sums: list[list[Tensor]] = []

    def step(self) -> None:
        x = torch.randn(N, 4, generator=self.data)
        self.optimizer.zero_grad()
        with perex(self.clipping, grad=False, strategy="model"):
            (self.model(x) - x.roll(1, 1)).square().sum(1).mean().backward()
        self.sums.append([p.clipped_sum.clone() for p in self.model.parameters()])
        self.optimizer.step()


def trainings(seed: int) -> list[Training]:
    """Both models."""
    return [Training(number, 10 * seed + number) for number in range(len(MODELS))]


def train(both: list[Training], steps: int) -> None:
    """The two in turns."""
    for _ in range(steps):
        for training in both:
            training.step()


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own, all at once; what they return, or the error they raise."""
    found: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(number: int) -> None:
        try:
            start.wait(timeout=60)
            found[number] = jobs[number]()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    return found


def mismatches(found: Training, wanted: Training) -> int:
    """Sums that differ in any bit, and parameters that do in the end."""
    pairs = [pair for a, b in zip(found.sums, wanted.sums, strict=True) for pair in zip(a, b, strict=True)]
    pairs += list(zip(found.model.parameters(), wanted.model.parameters(), strict=True))
    return sum(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("steps", [40, pytest.param(250, marks=pytest.mark.slow)])
def test_sums_of_threads_are_those_of_one(steps):
    """Four threads of two models each."""
    alone, threaded = ([trainings(seed) for seed in range(THREADS)] for _ in range(2))
    for both in alone:
        train(both, steps)
    assert together([lambda both=both: train(both, steps) for both in threaded]) == [None] * THREADS
    for both, wanted in zip(threaded, alone, strict=True):
        for found, model in zip(both, wanted, strict=True):
            assert len(found.sums) == steps
            assert mismatches(found, model) == 0
            assert not torch.equal(found.sums[0][0], found.sums[-1][0])


def test_a_difference_of_one_bit_is_a_mismatch():
    found, wanted = Training(0, 1), Training(0, 1)
    for training in (found, wanted):
        training.step()
    assert mismatches(found, wanted) == 0
    found.sums[0][1][0] = found.sums[0][1][0].nextafter(torch.tensor(9.0))
    assert mismatches(found, wanted) == 1


def noise(size: int) -> Callable[[], list[Tensor]]:
    """Three steps on empty batches, with noise that is seeded by the operating system."""
    model, clipping = extend(nn.Linear(size, 1, bias=False)), ClippedGrad(1.0)
    optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=1.0, expected_batch_size=1)

    def drawn() -> list[Tensor]:
        steps = []
        for _ in range(3):
            optimizer.zero_grad()
            with perex(clipping, grad=False):
                model(torch.zeros(0, size)).square().mean().backward()
            optimizer.step()
            steps.append(model.weight.grad[0].clone())
        return steps

    return drawn


def test_noise_of_threads_is_independent():
    """66 pairs; beyond 6 standard errors with a probability of 2e-9 each."""
    drawn = [step for steps in together([noise(20_000) for _ in range(THREADS)]) for step in steps]
    assert len(drawn) == 3 * THREADS
    assert max(abs(correlation(a, b)) for a, b in combinations(drawn, 2)) < 6
    assert all(abs(step.std().item() - 1) < 0.04 for step in drawn)  # 8 standard errors


def test_threads_at_one_model_find_their_own_sums_or_an_error():
    """The fields of its parameters belong to all, so that a thread may find them taken; never those of another."""
    model = extend(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)))
    batches = torch.randn(2, N, 4, generator=torch.Generator().manual_seed(1))

    def sums(x: Tensor) -> list[Tensor]:
        clipping = ClippedGrad(0.1)
        with perex(clipping, grad=False, strategy="model"):
            model(x).square().sum(1).mean().backward()
        return [total.clone() for total in clipping.consume(list(model.parameters()))]

    def often(x: Tensor) -> list[list[Tensor] | None]:
        found: list[list[Tensor] | None] = []
        for _ in range(40):
            try:
                found.append(sums(x))
            except PerExampleError:
                found.append(None)
        return found

    wanted = [sums(x) for x in batches]
    for found, right in zip(together([lambda x=x: often(x) for x in batches]), wanted, strict=True):
        assert isinstance(found, list), found
        assert all(torch.equal(a, b) for s in found if s is not None for a, b in zip(s, right, strict=True))
