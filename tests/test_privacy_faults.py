"""The known ways in which private training went wrong elsewhere, from sampling to the step, each with its test.

Those of gradients and clipping are in `test_faults.py`. All runs here go the way of users: `make_private`, or `extend`,
`ClippedGrad`, `perex` and `privatize`. Numbers are seeded; where the system's own are drawn, the probability to fail by
chance is stated.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from naive import assert_bitwise, assert_same, mse, randn, values
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, TensorDataset

from perexample import (
    DP_SGD,
    ConfigurationError,
    LossError,
    NonFiniteExampleWarning,
    PerExampleError,
    PrivacyBudgetError,
    UnsupportedModuleError,
    extend,
    perex,
    privatize,
)
from perexample.extensions import AdaptiveClippedGrad, ClippedGrad
from perexample.privacy import Ledger, Noise, PhysicalBatches, PoissonBatchSampler, Release, epsilon, make_private
from perexample.privacy.distributed import Processes
from perexample.privacy.privatizer import Privatizer

N, SIZE, C, SIGMA = 40, 10.0, 0.5, 1.0  # examples, expected batch size, bound, noise multiplier


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = N) -> TensorDataset:
    """Inputs, targets, and how much the loss of each example weighs."""
    x, y = naive.batch(N, seed=3)
    return TensorDataset(x[:n], y[:n], torch.ones(n, dtype=torch.float64))


def private(dataset: Any = None, make: Any = torch.optim.SGD, model: nn.Module | None = None, **options: Any) -> Any:
    """A run of 12 steps with noise and samples that come again; ``None`` for a generator gives the system's."""
    model = naive.mlp() if model is None else model
    settings = {
        "batch_size": SIZE, "public_size": N, "max_norm": C, "noise_multiplier": SIGMA, "target_delta": 1e-3,
        "epochs": 3, "sampling_generator": generator(1), "noise_generator": generator(2),
    } | options  # fmt: skip
    return make_private(model, make(model.parameters(), lr=0.1), data() if dataset is None else dataset, **settings)


def backward(p: Any, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
    with p:
        ((p.model(x) - y).square().mean(1) * weight).mean().backward()


def train(p: Any, epochs: int = 1) -> Iterator[bool]:
    """Run it, and stop after each batch to say whether there was a step."""
    for _ in range(epochs):
        for batch in p.loader:
            backward(p, *batch)
            yield p.step()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning of examples that are not finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """Shape and standard deviation of every draw of noise."""
    draws, plus = [], Noise.plus
    monkeypatch.setattr(Noise, "plus", lambda self, t, std: draws.append((tuple(t.shape), std)) or plus(self, t, std))
    return draws


# --------------------------------------------------------------------------------------------------------- F12 to F20


@pytest.mark.parametrize("groups", ["all", "per-parameter"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_f12_an_example_that_is_not_finite_is_dropped_as_a_whole(groups, value):
    """The weight's gradient is not finite, the bias's is: of both nothing is added."""
    layer = extend(nn.Linear(2, 1).double())
    x = torch.tensor([[1.0, value], [1.0, 2.0]], dtype=torch.float64)
    found = []
    for rows in (x, x[1:]):
        clipping = ClippedGrad(C, groups=groups)
        with perex(clipping, grad=False), quiet():
            layer(rows).mean().backward()
        found.append({name: s.clone() for name, s in naive.fields(layer, "clipped_sum").items()})
        clipping.zero_grad()
    assert_bitwise(*found)
    assert found[0]["bias"] != 0


@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e300])
def test_f15_a_batch_that_is_not_finite_is_a_step(bad, drawn):
    """A step that is skipped for an infinite gradient tells that there was one."""
    model, clipping = extend(naive.mlp()), ClippedGrad(C)
    optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=SIZE)
    x, y = naive.batch()
    x[2] = bad
    before = values(model)
    with perex(clipping, loss_scale=65536.0), warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        (65536.0 * mse(model, x, y)).backward()
    optimizer.step()
    assert len(drawn) == 4
    assert optimizer.ledger.runs == [(Release(SIGMA), 1)]
    assert all((p != before[name]).all() for name, p in model.named_parameters())


SCALED = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "fused": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "AdamW": torch.optim.AdamW,
}


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("grad", [True, False])
def test_f15_a_grad_scaler_skips_no_step(make, grad):
    """``GradScaler.step`` decides by the raw gradients: the same must come of all data, a whole step or an error."""
    found = [scaled_step(make, grad, first) for first in (1.0, math.inf)]
    assert found[0] == found[1]
    assert found[0] == (1, True) or isinstance(found[0], type)


def scaled_step(make: Callable, grad: bool, first: float) -> Any:
    """What is seen of a step that a scaler takes: its noise, its size and its entry; or an error of the library."""
    model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(C)
    optimizer = make(model.parameters())
    privatize(optimizer, clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=SIZE, generator=generator())
    scaler, x = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.ones(4, 3)
    x[0] *= first
    before = values(model)
    with perex(clipping, grad=grad, loss_scale=scaler), warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        scaler.scale(model(x).square().mean()).backward()
    try:
        scaler.step(optimizer)
    except PerExampleError as error:
        return type(error)
    moved = naive.vector(values(model)) - naive.vector(before)
    return optimizer.ledger.steps, bool((moved.abs() > 1e-4).any())


@pytest.mark.parametrize("physical", [None, 3])
def test_f17_the_divisor_is_the_same_for_neighbours(physical):
    """The sum over a batch is divided by a constant, however many examples came."""
    p = private(noise_multiplier=0.0, physical_batch_size=physical)
    sizes, count = set(), 0
    for x, y, weight in p.loader:
        backward(p, x, y, weight)
        count += len(x)
        sums = {name: w.clipped_sum.clone() for name, w in p.model.named_parameters()}
        if p.step():
            assert_bitwise(gradients(p.model), {name: s / SIZE for name, s in sums.items()})
            sizes.add(count)
            count = 0
    assert len(sizes) > 2


def test_f18_what_is_public_is_not_computed_from_the_data():
    """Noise, rate, divisor and number of steps for n examples and for n - 1."""
    runs = [private(data(n), noise_multiplier=None, target_epsilon=3.0) for n in (N, N - 1)]
    seen = [
        (p.noise_multiplier, p.sample_rate, p.expected_batch_size, p.planned_steps, len(p.loader), p.sampler.steps,
         {k: v for k, v in p.optimizer.param_groups[0].items() if k != "params"})
        for p in runs
    ]  # fmt: skip
    assert seen[0] == seen[1]
    with pytest.raises(ConfigurationError, match="needs public_size"):
        private(public_size=None)


def test_f19_only_poisson_samples_are_amplified():
    """Shuffled batches of one size, whatever made them, are accounted as steps that saw all examples."""
    dataset = data()
    order = RandomSampler(dataset, generator=generator())
    for loader in (
        DataLoader(dataset, 10, shuffle=True, generator=generator()),
        DataLoader(dataset, 10, shuffle=True, drop_last=True, generator=generator()),
        DataLoader(dataset, batch_sampler=BatchSampler(order, 10, False)),
        DataLoader(dataset, 10, sampler=DistributedSampler(dataset, 2, 0)),
    ):
        model, clipping = extend(naive.mlp()), ClippedGrad(C)
        optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=SIZE)
        for x, y, _ in loader:
            with perex(clipping, grad=False):
                mse(model, x, y).backward()
            optimizer.step()
        assert optimizer.ledger.runs == [(Release(SIGMA, None), len(loader))]
        assert optimizer.ledger.epsilon(1e-3) >= epsilon(
            1e-3, noise_multiplier=SIGMA / math.sqrt(len(loader)), sample_rate=1.0, steps=1
        )
        for wrong in (order, loader.batch_sampler, loader):
            with pytest.raises(ConfigurationError, match="must be a PoissonBatchSampler or PhysicalBatches"):
                privatize(
                    torch.optim.SGD(model.parameters()), clipping=ClippedGrad(C), noise_multiplier=SIGMA,
                    expected_batch_size=SIZE, sampler=wrong,
                )  # fmt: skip


@pytest.mark.parametrize("option", [{"drop_last": True}, {"shuffle": True}, {"sampler": []}, {"batch_sampler": []}])
def test_f20_options_that_make_no_poisson_samples_are_refused(option):
    with pytest.raises(ConfigurationError, match=f"option '{next(iter(option))}', which it sets itself"):
        private(**option)


@pytest.mark.parametrize("ranks", [1, 3])
def test_f20_the_last_example_comes_as_often_as_others(ranks):
    """Within 4.5 standard errors, for the first, the last and one between; seeded."""
    draws, rate = 1500, 0.2
    samplers = [
        PoissonBatchSampler(N, rate, draws, generator=generator(7), rank=r, world_size=ranks) for r in range(ranks)
    ]
    batches = [list(itertools.chain(*parts)) for parts in zip(*samplers, strict=True)]
    for index in (0, N // 2, N - 1):
        count = sum(index in batch for batch in batches)
        assert abs(count - draws * rate) < 4.5 * (draws * rate * (1 - rate)) ** 0.5
    assert all(len(set(batch)) == len(batch) for batch in batches)


# --------------------------------------------------------------------------------------------------------- F21 to F26


@pytest.mark.usefixtures("noise_of_any_sums")
@pytest.mark.parametrize("physical", [1, 2, 7])
def test_f21_one_noise_for_any_number_of_pieces(physical, drawn):
    """Pieces of a batch give what the whole batch gives, noise and all."""
    whole, cut = private(), private(physical_batch_size=physical)
    for _ in train(whole):
        pass
    wanted, first = gradients(whole.model), list(drawn)
    drawn.clear()
    assert len(list(train(cut))) > 4
    assert drawn == first == [(tuple(p.shape), SIGMA * C) for _ in range(4) for p in whole.model.parameters()]
    assert_same(gradients(cut.model), wanted, 1e-11)


def test_f21_accumulation_by_hand_draws_one_noise(drawn):
    for parts in (1, 2, 7):
        model, clipping = extend(naive.mlp()), ClippedGrad(C)
        optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=SIZE)
        for x, y in zip(*(t.chunk(parts) for t in naive.batch(14)), strict=True):
            with perex(clipping, grad=False):
                mse(model, x, y).backward()
        assert drawn == []
        optimizer.step()
        assert drawn == [(tuple(p.shape), SIGMA * C) for p in model.parameters()]
        drawn.clear()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_f22_nothing_moves_before_the_last_piece(make, drawn):
    p = private(make=make, physical_batch_size=3)
    waited = 0
    before, kept, steps, noise = values(p.model), copy.deepcopy(p.optimizer.state_dict()["state"]), 0, 0
    for stepped in train(p, 2):
        state = p.optimizer.state_dict()["state"]
        if not stepped:
            waited += 1
            assert_bitwise(values(p.model), before)
            assert str(state) == str(kept)
            assert (p.steps, len(drawn)) == (steps, noise)
        before, kept, steps, noise = values(p.model), copy.deepcopy(state), p.steps, len(drawn)
    assert waited > 5
    assert (steps, noise) == (8, 32)


SCHEDULES: dict[str, dict[str, Any]] = {
    "whole batches": {},
    "pieces": {"physical_batch_size": 3},
    "single examples": {"physical_batch_size": 1},
    "mostly empty": {"batch_size": 0.5},
    "empty, in pieces": {"batch_size": 0.5, "physical_batch_size": 1},
    "all examples": {"batch_size": N, "physical_batch_size": 7},
}


@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_f24_as_many_entries_as_draws_of_noise(options, drawn, monkeypatch):
    """And each before the draw; pieces are no steps, and empty batches are."""
    entered, record = [], Ledger.record
    monkeypatch.setattr(Ledger, "record", lambda self, release: entered.append(len(drawn)) or record(self, release))
    p, taken = private(epochs=None, steps=9, **options), 0
    for stepped in train(p, 9):
        taken += stepped
        assert taken == p.steps == len(entered)
        assert len(drawn) == 4 * taken
        if taken == 9:
            break
    assert entered == [4 * i for i in range(9)]
    assert p.ledger.runs == [(Release(SIGMA, options.get("batch_size", SIZE) / N), 9)]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_f25_no_closure_runs_after_the_noise(make):
    """It would compute raw gradients in the place of the noisy ones."""
    p, calls = private(make=make), []
    backward(p, *next(iter(p.loader)))
    before = values(p.model)
    for given, named in (((lambda: calls.append(1),), {}), ((), {"closure": lambda: calls.append(1)})):
        with pytest.raises(PerExampleError, match="got a closure"):
            p.optimizer.step(*given, **named)
    assert not calls
    assert_bitwise(values(p.model), before)
    assert p.steps == 0
    assert p.step()
    with pytest.raises(ConfigurationError, match="LBFGS cannot be private"):
        private(make=torch.optim.LBFGS)


@pytest.mark.parametrize("physical", [3, 7])
def test_f26_nothing_is_left_over_at_the_end_of_an_epoch(physical):
    """Sums over an epoch in pieces are those of its examples, each clipped once; the next epoch begins with nothing."""
    p = private(noise_multiplier=0.0, physical_batch_size=physical)
    p.optimizer.param_groups[0]["lr"] = 0.0
    x, y, _ = data().tensors
    rows = naive.rows(naive.mlp(), mse, x, y)
    factors = (C / naive.norms(rows)).clamp_max(1.0)
    sampler = PoissonBatchSampler(N, SIZE / N, generator=generator(1))
    for _ in range(2):
        total = {name: torch.zeros_like(g[0]) for name, g in rows.items()}
        for stepped in train(p):
            if stepped:
                total = {name: t + SIZE * p.model.get_parameter(name).grad for name, t in total.items()}
        batches = list(sampler)
        assert any(len(batch) % physical for batch in batches)
        seen = torch.tensor(list(itertools.chain(*batches)))
        assert_same(total, {name: torch.tensordot(factors[seen], g[seen], dims=1) for name, g in rows.items()}, 1e-12)
        assert p.clipping.examples == 0


def test_f26_pieces_that_were_broken_off_are_not_carried_on():
    """Their batch is drawn again, so their sums go when it is."""
    p = private(physical_batch_size=3)
    backward(p, *next(iter(p.loader)))
    assert not p.step()
    assert (p.clipping.examples, p.steps) == (3, 0)
    iter(p.loader)
    assert p.clipping.examples == 0
    assert sum(train(p)) == 4


# --------------------------------------------------------------------------------------------------------- F28 to F31


def wide() -> nn.Module:
    """Two parameters of one shape, of 1e4 numbers each."""
    return nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)).double()


def noise_of_steps(steps: int, **options: Any) -> torch.Tensor:
    """What steps on empty batches release, in units of the noise: ``[steps * 2, 1e4]``."""
    dataset = TensorDataset(torch.zeros(N, 100, dtype=torch.float64))
    p = private(dataset, model=wide(), batch_size=1e-9, epochs=None, steps=steps, **options)
    found = []
    for (x,) in itertools.islice(p.loader, steps):
        with p:
            p.model(x).square().mean().backward()
        assert p.step()
        found += [w.grad.flatten() * 1e-9 / (SIGMA * C) for w in p.model.parameters()]
    return torch.stack(found)


SOURCES: dict[str, dict[str, Any]] = {
    "given": {},
    "torch": {"noise_generator": None},
    "os": {"noise_generator": None, "noise": "os"},
}


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_f28_noise_differs_between_steps_and_parameters(options):
    """15 pairs, to 6 standard errors: 3e-8 to fail by chance; so for the size of the noise, 2e-9 each."""
    found = noise_of_steps(3, **options)
    correlations = torch.corrcoef(found) - torch.eye(6)
    assert correlations.abs().max() < 6 / 100
    assert ((found.std(1) - 1).abs() < 6 / math.sqrt(2e4)).all()


def test_f29_no_seed_of_torch_repeats_noise_or_samples():
    """Two runs in which every seed that users set is the same; 1e-8 to draw the same batches by chance."""
    batches, noise = [], []
    for _ in range(2):
        torch.manual_seed(0)
        p = private(sampling_generator=None, noise_generator=None)
        torch.manual_seed(0)
        batches.append([x[:, 0].tolist() for x, _, _ in p.loader])
        torch.manual_seed(0)
        noise.append(noise_of_steps(1, noise_generator=None))
    assert batches[0] != batches[1]
    assert not torch.equal(*noise)
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in noise]))[0, 1]) < 6 / math.sqrt(2e4)


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_f30_noise_is_of_53_bits(options):
    """Nearly no number of it is one of float32, or a multiple of the square root that 24 bits would give."""
    found = noise_of_steps(1, **options)
    assert (found.float().double() == found).double().mean() < 1e-3
    assert found.unique().numel() == found.numel()
    if options.get("noise") == "os":
        pairs = found.flatten()  # exp(-r^2 / 2) is a uniform number, a multiple of 2^-24 if it has no more bits
        halves = [part.view(2, -1) for part in pairs.view(2, -1)]
        uniform = torch.cat([torch.exp(-half.square().sum(0) / 2) for half in halves]) * 2**24
        assert ((uniform - uniform.round()).abs() < 1e-6).double().mean() < 0.01


def test_f31_cancelling_gradients_are_no_longer_than_the_bound():
    """Equal tokens with alternating upstream gradients: what one example moves is at most C, in float32 too."""
    torch.manual_seed(0)
    model, clipping = extend(nn.Linear(128, 128, bias=False)), ClippedGrad(C)
    optimizer = DP_SGD(model.parameters(), lr=0.0, clipping=clipping, noise_multiplier=0.0, expected_batch_size=SIZE)
    signs = torch.tensor([1.0, -1.0]).repeat(16).view(1, -1, 1)
    for noise in (0.0, 1e-7, 1e-5, 1e-3):
        x = (1e3 * (randn(1, 1, 128) + noise * randn(1, 32, 128, seed=2))).float()
        g = (1e3 * (signs * randn(1, 1, 128, seed=3) + noise * randn(1, 32, 128, seed=4))).float()
        with perex(clipping, grad=False):
            (model(x) * g).sum().backward()
        optimizer.step()
        assert SIZE * model.weight.grad.double().norm() <= C * (1 + 1e-5)


# --------------------------------------------------------------------------------------------------------- F42 to F48


def test_f42_epsilon_of_a_run():
    """Asking changes nothing; it grows with each step, ends within the budget, and PLD is the tighter of the two."""
    p, spent = private(noise_multiplier=None, target_epsilon=2.0), [0.0]
    for step, _ in enumerate(train(p, 3)):
        if step % 3 == 2:
            spent.append(p.epsilon())
            assert p.epsilon() == spent[-1]
    assert p.ledger.runs == [(Release(p.noise_multiplier, SIZE / N), 12)]
    assert all(a < b for a, b in itertools.pairwise(spent))
    assert 1.9 < spent[-1] <= 2.0
    assert spent[-1] <= p.ledger.epsilon(1e-3, accountant="rdp")
    assert spent[-1] <= p.ledger.epsilon(1e-3, neighbours="replace")


@pytest.mark.parametrize("steps", [1, 10])
def test_f42_a_gaussian_in_closed_form(steps):
    """Not amplified: ``delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)`` with ``mu = sqrt(T) / sigma``."""
    ledger, mu = Ledger(), math.sqrt(steps) / 3.0
    for _ in range(steps):
        ledger.record(Release(3.0, None))
    spent = ledger.epsilon(1e-5)
    normal = torch.distributions.Normal(0.0, torch.tensor(1.0, dtype=torch.float64))
    low, high = (normal.cdf(torch.tensor(sign * mu / 2 - spent / mu, dtype=torch.float64)).item() for sign in (-1, 1))
    assert high - math.exp(spent) * low == pytest.approx(1e-5, rel=1e-6)
    assert high - math.exp(spent) * low <= 1e-5


def test_f43_a_resumed_run_knows_what_was_spent(tmp_path):
    p = private(noise_multiplier=None, target_epsilon=2.0)
    assert sum(itertools.islice(train(p), 3)) == 3
    p.save(tmp_path / "run.pt")
    other = private(noise_multiplier=None, target_epsilon=2.0)
    other.load(tmp_path / "run.pt")
    assert (other.ledger.runs, other.epsilon()) == (p.ledger.runs, p.epsilon())
    assert sum(train(other)) == 1
    assert sum(train(other, 2)) == 8
    assert other.epsilon() <= 2.0
    with pytest.raises(PerExampleError, match="12 steps that were planned"):
        next(train(other))


def test_f43_a_resumed_run_draws_other_noise(tmp_path):
    """Noise of the system that came twice would be taken off by a difference."""
    p = private(noise_generator=None)
    next(train(p))
    p.save(tmp_path / "run.pt")
    found = []
    for _ in range(2):
        run = private(noise_generator=None)
        run.load(tmp_path / "run.pt")
        next(train(run))
        found.append(naive.vector(gradients(run.model)))
    assert ((found[0] - found[1]).abs() > 1e-12).all()


def changed(value: float, index: int = 7) -> TensorDataset:
    """The data with one example of this value."""
    x, y, weight = data().tensors
    x[index] = value
    return TensorDataset(x, y, weight)


@pytest.mark.parametrize("value", [0.0, 1e3, math.nan])
def test_f44_nothing_exact_is_in_the_state(value):
    """Norms and counts of examples are not public: what is saved beside the trained parameters is a neighbour's."""
    states = []
    for dataset in (data(), changed(value)):
        p = private(dataset, batch_size=N)
        with quiet():
            assert next(train(p))
        states.append((p.optimizer.state_dict()["privacy"], p.state_dict()["plan"], repr(p)))
    assert_equal(*states)


def assert_equal(one: Any, other: Any) -> None:
    """Nested structures of tensors and numbers."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_f44_the_share_is_noisy():
    """What `AdaptiveClippedGrad` shows is its count with noise, also if all examples are alike."""
    shares = []
    for seed in range(20):
        clipping = AdaptiveClippedGrad(1e9, expected_batch_size=N, count_noise=2.0)
        p = private(max_norm=None, clipping=clipping, batch_size=N, noise_generator=generator(seed))
        assert next(train(p))
        shares.append(clipping.share)
    noise = (torch.tensor(shares, dtype=torch.float64) - 1.0) * N / 2.0  # all examples are below C
    assert noise.unique().numel() == 20
    assert 0.5 < noise.std() < 1.7
    assert abs(noise.mean()) < 1.2


@pytest.mark.parametrize("how", ["before", "after"])
def test_f46_a_copy_of_the_model_is_independent(how):
    """It shares neither parameters nor sums, and the optimizer does not step with what the copy has."""
    p = private()
    batch = next(iter(p.loader))
    if how == "after":
        backward(p, *batch)
    other = copy.deepcopy(p.model)
    before = values(other)
    if how == "before":
        with p:
            (other(batch[0]) - batch[1]).square().mean().backward()
        with pytest.raises(PerExampleError, match="has no clipped sum of this ClippedGrad"):
            p.step()
        p.clipping.zero_grad()
        backward(p, *batch)
    assert p.step()
    assert_bitwise(values(other), before)
    with pytest.raises(ConfigurationError, match="is trainable, and the optimizer does not have it"):
        make_private(
            other, torch.optim.SGD(p.model.parameters()), data(), batch_size=SIZE, public_size=N, max_norm=C,
            noise_multiplier=SIGMA, target_delta=1e-3, epochs=1,
        )  # fmt: skip


def test_f47_a_compiled_model_is_refused():
    """No hook sees into it. The model itself may be private, and is then not to be compiled."""
    model = naive.mlp()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedModuleError, match="compiled model"):
        private(model=compiled)


@pytest.mark.parametrize("physical", [1, 3])
def test_f48_no_sample_is_cut(physical):
    """Not one that is much larger than expected, whatever fits in a piece; the accountant knows of no cut."""
    whole = list(PoissonBatchSampler(N, 0.1, 400, generator=generator(5)))
    assert max(map(len, whole)) >= 10
    sampler = PoissonBatchSampler(N, 0.1, 400, generator=generator(5))
    pieces = list(PhysicalBatches(sampler, physical))
    assert max(map(len, pieces)) == physical
    assert list(itertools.chain(*pieces)) == list(itertools.chain(*whole))
    sizes = torch.tensor([len(batch) for batch in whole], dtype=torch.float64)
    assert sizes.var() == pytest.approx(N * 0.1 * 0.9, rel=0.3)  # 4.2 standard errors


# ---------------------------------------------------------------------------------------------------------------- F49


FORMING = {"_zeros"}  # makes the sums of an empty batch, which come from the data as those of others do


class Log:
    """What a run does in its private steps, as far as others may see it.

    Noise with its shape and size, entries of the ledger, what the noisy sums are divided by, which parameters get a
    gradient, how often processes exchange something, and every line of the library's private step that is executed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
        self.events: list[Any] = []
        self.relative = relative  # noise in units of C, where that is found by noisy counts
        self.clipping: Any = None
        self.totals: list[torch.Tensor] = []
        for cls, name, note in (
            (Noise, "plus", lambda noise, t, std: ("noise", tuple(t.shape), self._std(std, t.dim()))),
            (Ledger, "record", lambda ledger, release: ("entry", release, ledger.steps)),
            (Processes, "agree", lambda processes, **values: ("agree", sorted(values))),
            (Processes, "total", lambda processes, sums, noised: ("total", len(sums), noised is not None)),
            (torch.optim.SGD, "step", lambda optimizer: ("step",)),
        ):
            monkeypatch.setattr(cls, name, self._noting(getattr(cls, name), note))
        monkeypatch.setattr(Privatizer, "__call__", self._traced(Privatizer.__call__))

    def _std(self, std: float, axes: int) -> float:
        return float(f"{std / self.clipping.max_norm:.12g}") if self.relative and axes else std

    def _noting(self, function: Callable, note: Callable) -> Callable:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.events.append(note(*args, **kwargs))
            result = function(*args, **kwargs)
            if function.__name__ == "total":
                self.totals += [t.clone() for t in result]  # the step goes on in place
            return result

        for name in ("hooked", "__wrapped__"):  # of torch's own wrapper of `step`
            if hasattr(function, name):
                setattr(noting, name, getattr(function, name))
        return noting

    def _divisors(self, optimizer: Any) -> Iterator[float | None]:
        """What the noisy sums were divided by, as the gradients show it; nothing for sums that are zero."""
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for p, total in zip(params, self.totals, strict=False):
            largest = int(p.grad.abs().argmax())
            yield float(f"{total.flatten()[largest] / p.grad.flatten()[largest]:.9g}") if total.any() else None

    def _traced(self, function: Callable) -> Callable:
        """The same, and the lines of the package that it executes."""

        def trace(frame: Any, kind: str, _: Any) -> Any:
            code = frame.f_code
            around = {code.co_name, frame.f_back.f_code.co_name}
            if "perexample/privacy/" not in code.co_filename or around & FORMING:
                return None
            if kind == "line":
                self.events.append((code.co_name, frame.f_lineno))
            return trace

        def traced(privatizer: Any, optimizer: Any, *args: Any) -> Any:
            self.totals = []
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                result = function(privatizer, optimizer, *args)
            finally:
                sys.settrace(before)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            self.events.append(("gradients", [p.grad is not None for p in params]))
            if any(event[0] == "noise" for event in self.events):
                self.events.append(("divisors", *self._divisors(optimizer)))
            return result

        return traced


def neighbours() -> dict[str, TensorDataset]:
    """The data, and others that differ from it by an example; at last by all."""
    x, y, weight = data().tensors
    masked = weight.clone()
    masked[7] = 0.0
    result = {"all": data(), "removed": data(N - 1), "masked": TensorDataset(x, y, masked)}
    result |= {str(value): changed(value) for value in (math.nan, math.inf, 1e30, 1e200, 0.0)}
    result["one left"] = data(1)
    result["nothing but nan"] = TensorDataset(x * math.nan, y, weight)
    return result


RUNS: dict[str, dict[str, Any]] = {
    "whole batches": {},
    "pieces": {"physical_batch_size": 3},
    "mostly empty": {"batch_size": 0.5},
    "all examples": {"batch_size": N, "physical_batch_size": 15},
    "momentum": {"make": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, weight_decay=0.1)},
    "frozen": {"frozen": True},
    "adaptive": {
        "max_norm": None,
        "clipping": lambda: AdaptiveClippedGrad(C, expected_batch_size=SIZE, count_noise=2.0),
    },
    "groups": {"max_norm": None, "clipping": lambda: ClippedGrad(C, groups="per-parameter")},
    "no noise": {"noise_multiplier": 0.0},
}


def logged(dataset: TensorDataset, options: dict[str, Any]) -> list[Any]:
    """What a whole run does, to its end and one step beyond."""
    options = {"epochs": None, "steps": 6, **options}
    with pytest.MonkeyPatch.context() as patch, quiet():
        model = naive.mlp()
        model[0].bias.requires_grad_(not options.pop("frozen", False))
        if "clipping" in options:
            options["clipping"] = options["clipping"]()
        log = Log(patch, relative=isinstance(options.get("clipping"), AdaptiveClippedGrad))
        p = private(dataset, model=model, **options)
        log.clipping = p.clipping
        with pytest.raises(PerExampleError) as caught:
            for _ in train(p, 100):
                pass
        log.events.append((type(caught.value), p.steps))
    return log.events


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_f49_neighbours_cannot_be_told_by_what_is_done(options):
    """Runs on neighbouring data, with the same seeds, do the same things in the same order; so on any other data."""
    logs = {name: logged(dataset, options) for name, dataset in neighbours().items()}
    wanted = logs.pop("all")
    assert wanted[-1] == (PrivacyBudgetError, 6)
    assert sum(event[0] == "entry" for event in wanted) == 7
    assert sum(event[0] == "divisors" and None not in event for event in wanted) in (0, 6)
    assert any(event[0] == "noise" for event in wanted) == ("noise_multiplier" not in options)
    for name, found in logs.items():
        assert len(found) == len(wanted), name
        for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
            assert one == other, f"{name}: event {number} is {other}, not {one}"


# ---------------------------------------------------------------------------------------------------------------- F50


def _by_torch(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Losses of the labels, zero where they are ignored; torch's gradient there is zero, and 0 / 0 is not seen."""
    return F.cross_entropy(z.transpose(1, 2), y, reduction="none")


def _by_hand(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same, whose gradient is 0 times infinity in an example without labels."""
    losses = -z.log_softmax(2).gather(2, y.clamp_min(0).unsqueeze(2)).squeeze(2)
    return losses * (y != -100)


def tokens(ignored: bool) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    y = torch.randint(3, (4, 5))
    y[0, 2:], y[3, 1:] = -100, -100
    if ignored:
        y[2] = -100
    return extend(nn.Linear(6, 3).double()), randn(4, 5, 6), y


@pytest.mark.parametrize(("losses", "nonfinite"), [(_by_torch, 0), (_by_hand, 1)])
def test_f50_an_example_without_labels_adds_nothing(losses, nonfinite):
    """Its mean is 0 / 0: it adds exactly zero, and the others what they add without it."""
    model, x, y = tokens(True)
    clipping, without = ClippedGrad(C), ClippedGrad(C)
    rest = [0, 1, 3]

    def own_means(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (losses(model(x), y).sum(1) / (y != -100).sum(1)).mean()

    with perex(without, grad=False):
        own_means(x[rest], y[rest]).backward()
    wanted = {name: s.clone() for name, s in naive.fields(model, "clipped_sum").items()}
    without.zero_grad()
    with perex(clipping, grad=False), quiet():
        loss = own_means(x, y)
        loss.backward()
    assert loss.isnan()
    assert clipping.nonfinite == nonfinite
    assert_same(naive.fields(model, "clipped_sum"), wanted, 1e-13)


@pytest.mark.parametrize("ignored", [True, False])
def test_f50_a_mean_over_all_labels_that_count_is_refused(ignored):
    """There the weight of an example depends on how many labels of the others count."""
    model, x, y = tokens(ignored)
    with perex(ClippedGrad(C), grad=False), pytest.raises(LossError, match="which all examples share"):
        F.cross_entropy(model(x).transpose(1, 2), y).backward()
