"""Sampler, ledger and optimizer together, through `make_private` and by hand."""

import copy
import itertools
import math
import os
import pickle
import warnings
from ast import literal_eval

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from perexample import (
    DP_SGD,
    ConfigurationError,
    CrossExampleError,
    ExtensionError,
    PerExampleError,
    PrivacyBudgetError,
    StaleGradientError,
    UnsupportedModuleError,
    extend,
    perex,
    privatize,
)
from perexample._private import hooks_after_gradient
from perexample.extensions import AdaptiveClippedGrad, BatchL2Grad, Clip, ClippedGrad
from perexample.privacy import (
    EmptyBatches,
    Ledger,
    Noise,
    PhysicalBatches,
    PoissonBatchSampler,
    Release,
    epsilon,
    make_optimizer,
    make_private,
    noise_multiplier_for,
)

N, RATE = 40, 0.25


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data(n=N, seed=1):
    g = generator(seed)
    return TensorDataset(torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(0, 2, (n,), generator=g))


def network(seed=2, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2)).double()


def private(model=None, dataset=None, make=torch.optim.SGD, **options):
    model, dataset = model or network(), data() if dataset is None else dataset
    settings = {
        "batch_size": RATE * N,
        "public_size": N,
        "max_norm": 0.5,
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "epochs": 3,
        "sampling_generator": generator(3),
        "noise_generator": generator(4),
    } | options
    return make_private(model, make(model.parameters(), lr=0.5), dataset, **settings)


def run(p, epochs=1, until=None):
    """Train; how many batches came, and at which of them a step was taken."""
    taken = []
    for _ in range(epochs):
        for x, y in p.loader:
            with p:
                F.cross_entropy(p.model(x), y).backward()
            taken.append(p.step())
            if until is not None and len(taken) == until:
                return taken
    return taken


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_bitwise(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------------------- what it promises


def test_the_whole_plan_is_within_the_budget_and_a_step_more_is_refused():
    p = private(noise_multiplier=None, target_epsilon=2.0)
    assert p.planned_steps == 12
    assert p.noise_multiplier == noise_multiplier_for(2.0, 1e-3, sample_rate=RATE, steps=12)
    assert p.epsilon() == 0.0
    assert run(p, 3) == [True] * 12
    assert p.ledger.runs == [(Release(p.noise_multiplier, RATE), 12)]
    assert 1.9 < p.epsilon() <= 2.0
    assert p.epsilon() == epsilon(1e-3, noise_multiplier=p.noise_multiplier, sample_rate=RATE, steps=12)
    before = parameters(p.model)
    with pytest.raises(PrivacyBudgetError):
        run(p)
    assert_bitwise(parameters(p.model), before)


def test_batches_come_from_the_sampler_and_sums_are_divided_by_the_expected_size():
    p = private(noise_multiplier=0.0, epochs=1)
    reference, seen = network(), iter(PoissonBatchSampler(N, RATE, generator=generator(3)))
    x, y = data().tensors
    for some, _ in p.loader:
        rows = next(seen)
        assert torch.equal(some, x[rows])
        with p:
            F.cross_entropy(p.model(x[rows]), y[rows]).backward()
        p.step()
        sums = [torch.zeros_like(w) for w in reference.parameters()]
        for i in rows:
            loss = F.cross_entropy(reference(x[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(loss, list(reference.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            for total, g in zip(sums, grads, strict=True):
                total += g * (0.5 / norm).clamp(max=1.0)
        with torch.no_grad():
            for w, total in zip(reference.parameters(), sums, strict=True):
                w -= 0.5 * total / (RATE * N)
        for one, other in zip(parameters(p.model), parameters(reference), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert p.epsilon() == math.inf


@pytest.mark.usefixtures("noise_of_any_sums")
@pytest.mark.parametrize("physical", [1, 3, 10, 100])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_pieces_change_nothing(physical, make):
    whole, cut = private(make=make), private(make=make, physical_batch_size=physical)
    assert run(whole, 3) == [True] * 12
    taken = run(cut, 3)
    assert sum(taken) == 12
    assert len(taken) > 12 or physical == 100
    assert cut.ledger.runs == whole.ledger.runs
    for one, other in zip(parameters(whole.model), parameters(cut.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


@pytest.mark.usefixtures("noise_of_any_sums")
@pytest.mark.parametrize("physical", [None, 1, 3, 100])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_recorded_training_is_the_same(physical, adaptive):
    def options():
        if not adaptive:
            return {"physical_batch_size": physical, "loss_reduction": "sum"}  # of the context, and not of this
        clipping = AdaptiveClippedGrad(0.5, expected_batch_size=RATE * N, count_noise=2.0)
        return {"physical_batch_size": physical, "clipping": clipping, "max_norm": None}

    usual, p = private(**options() | {"loss_reduction": "mean"}), private(**options())
    run(usual, 3)
    backward = p.recorded(losses_of(p.model))
    counts = []
    for x, y in p:
        before = parameters(p.model)
        found = backward(x, y)
        assert found.shape == (len(x),)
        assert_bitwise(before, parameters(p.model))
        p.step()
        counts.append(len(x))
    assert backward.size == {None: 16, 1: 1, 3: 3, 100: 16}[physical]
    assert backward._step.repeated == 0
    assert p.steps == usual.steps == 12
    assert p.ledger.runs == usual.ledger.runs
    assert p.clipping.max_norm == pytest.approx(usual.clipping.max_norm)
    for one, other in zip(parameters(usual.model), parameters(p.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_empty_and_large_batches_of_a_recorded_training():
    usual, p = (private(sampling_generator=generator(8), epochs=30) for _ in range(2))
    run(usual, 30)
    backward = p.recorded(losses_of(p.model))
    backward.size = 11  # many batches are larger
    x, y = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    assert backward(x, y).shape == (0,)
    assert backward._step is None
    p.zero_grad()
    counts = []
    for x, y in p:
        backward(x, y)
        p.step()
        counts.append(len(x))
    assert min(counts) < 11 < max(counts)
    for one, other in zip(parameters(usual.model), parameters(p.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_large_batch_does_not_hide_what_has_changed():
    p = private()
    backward = p.recorded(losses_of(p.model))
    backward.size = 4
    x, y = next(iter(p))
    backward(x[:4], y[:4])
    p.clipping.zero_grad()
    p.model.eval()
    for n in (5, 4):
        with pytest.raises(StaleGradientError, match="`training` of"):
            backward(x[:n], y[:n])


def test_a_recorded_training_begins_with_empty_batches_and_single_examples():
    p = private()
    backward = p.recorded(losses_of(p.model))
    x, y = next(iter(p))
    assert backward(x[:0], y[:0]).shape == (0,)
    assert backward._step is None
    both = p.recorded(lambda x, y: (losses_of(p.model)(x, y), x))
    assert [len(t) for t in both(x[:0], y[:0])] == [0, 0]
    picky = p.recorded(lambda x, y: losses_of(p.model)(x, y) + x[0].sum())  # as many models, fails on nothing
    assert picky(x[:0], y[:0]).shape == (0,)
    p.clipping.zero_grad()
    backward(x[:1], y[:1])
    assert backward._step is None
    p.clipping.zero_grad()
    backward(x[:2], y[:2])
    assert backward._step.size == 16


def test_a_recorded_training_that_cannot_be():
    p = private()
    backward = p.recorded(lambda x, y: losses_of(p.model)(x, y) * (1 + sum(y.tolist())))
    x, y = next(iter(p))
    with pytest.raises(ConfigurationError, match="looks at values"):
        backward(x, y)


def test_a_resumed_run_may_be_recorded(tmp_path):
    """Recording draws no random number and leaves no sum behind."""

    def trained(stop):
        torch.manual_seed(7)
        p = private(network(dropout=0.5), physical_batch_size=16)
        backward = p.recorded(losses_of(p.model))
        for x, y in p:
            if p.steps == stop and p.steps:
                p.save(tmp_path / "state")
                q = private(network(seed=5, dropout=0.5), physical_batch_size=16)
                q.load(tmp_path / "state")
                return trained_on(q)
            backward(x, y)
            p.step()
        return parameters(p.model)

    def trained_on(q):
        backward = q.recorded(losses_of(q.model))
        for x, y in q:
            backward(x, y)
            q.step()
        return parameters(q.model)

    assert_bitwise(trained(None), trained(5))


@pytest.mark.parametrize("physical", [None, 2])
def test_noise_is_drawn_once_for_each_logical_batch(physical, monkeypatch):
    drawn = []
    plus = Noise.plus
    monkeypatch.setattr(Noise, "plus", lambda self, t, std: drawn.append((t.shape, std)) or plus(self, t, std))
    p = private(physical_batch_size=physical)
    run(p)
    assert drawn == [(w.shape, 0.5) for _ in range(4) for w in p.model.parameters()]


def test_the_public_numbers_do_not_depend_on_the_data():
    """F18: one example more or less."""
    with_one, without = private(dataset=data(N)), private(dataset=data(N - 1))
    for name in ("noise_multiplier", "sample_rate", "expected_batch_size", "planned_steps", "_plan"):
        assert getattr(with_one, name) == getattr(without, name)
    assert len(with_one.loader) == len(without.loader)
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in p.optimizer.param_groups] for p in (with_one, without)
    ]
    assert groups[0] == groups[1]


def test_empty_batches_are_steps():
    p = private(batch_size=0.01, public_size=100, epochs=None, steps=20)
    before = parameters(p.model)
    batches = iter(p.loader)
    for _ in range(20):
        x, y = next(batches)
        assert x.shape == (0, 3)
        with p:
            F.cross_entropy(p.model(x), y).backward()
        assert p.step()
    assert p.steps == 20
    assert not torch.equal(parameters(p.model)[0], before[0])


class Together(Dataset):
    """Gives several examples at once, as those of `datasets`, by a transform that cannot be given none."""

    classes = ("zero", "one")

    def __init__(self):
        self.x, self.y = data().tensors

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        x = torch.stack([self.x[i] for i in indices])
        return [(row, self.y[i]) for row, i in zip(x, indices, strict=True)]


@pytest.mark.parametrize("dataset", [Together(), torch.utils.data.Subset(Together(), range(N))], ids=["own", "subset"])
@pytest.mark.parametrize("workers", [0, 1])
def test_examples_that_come_together_may_be_none(dataset, workers):
    p = private(dataset=dataset, batch_size=0.5, steps=20, epochs=None, num_workers=workers)
    assert len(p.loader.dataset) == N
    again = pickle.loads(pickle.dumps(p.loader.dataset))
    for inner in (p.loader.dataset, again, copy.deepcopy(again)):
        assert len(inner) == N
        assert vars(inner).keys() == {"dataset"}
        assert not hasattr(inner, "none such")
        assert getattr(inner, "classes", None) == getattr(dataset, "classes", None)  # the dataset's own
    sizes = []
    for x, y in p:
        sizes.append(len(x))
        with p:
            F.cross_entropy(p.model(x), y).backward()
        p.step()
    assert p.steps == 20
    assert 0 in sizes
    assert 1 in sizes
    others = data(), torch.utils.data.Subset(data(), range(N))  # which need nothing
    assert [private(dataset=other).loader.dataset for other in others] == list(others)


def test_workers():
    alone, many = private(), private(num_workers=2)
    run(alone, 2)
    run(many, 2)
    assert_bitwise(parameters(alone.model), parameters(many.model))


@pytest.mark.parametrize("noise", ["torch", "os"])
def test_another_default_device(noise):
    """As of `torch.set_default_device("cuda")`; batches are drawn on the CPU, sums are where the parameters are."""
    clipping = AdaptiveClippedGrad(0.5, expected_batch_size=RATE * N, count_noise=5.0)
    p = private(clipping=clipping, max_norm=None, noise=noise, noise_generator=None)
    with torch.device("meta"):
        x, y = next(iter(p.loader))
    with p:
        F.cross_entropy(p.model(x), y).backward()
    with torch.device("meta"):
        assert p.step()


def test_steps_instead_of_epochs_and_a_file_for_the_ledger(tmp_path):
    p = private(epochs=None, steps=3, ledger=tmp_path / "steps.jsonl")
    with pytest.raises(PrivacyBudgetError):
        run(p)
    assert Ledger(tmp_path / "steps.jsonl").runs == [(Release(1.0, RATE), 3)]


def test_an_extension_of_your_own_and_a_sum_loss():
    p = private(max_norm=None, clipping=ClippedGrad(0.5, clip="automatic"), loss_reduction="sum")
    x, y = next(iter(p.loader))
    with p:
        F.cross_entropy(p.model(x), y, reduction="sum").backward()
    assert p.step()
    assert p.clipping.norms.shape == (len(x),)


@pytest.mark.parametrize("physical", [None, 3])
def test_iteration_over_the_whole_plan(physical):
    p, q = (private(epochs=2.5, physical_batch_size=physical) for _ in range(2))
    assert p.planned_steps == 10
    for x, y in p:
        with p:
            F.cross_entropy(p.model(x), y).backward()
        p.step()
    assert p.steps == 10
    with pytest.warns(UserWarning, match="All 10 planned steps have been taken.*all epochs"):
        assert list(p) == []
    with pytest.raises(PrivacyBudgetError):
        run(q, 3)
    assert_bitwise(parameters(p.model), parameters(q.model))


def test_a_schedule_does_not_lower_the_noise_below_the_budget():
    p = private(target_epsilon=3.0, noise_multiplier=None)
    run(p, until=1)
    group = p.optimizer.param_groups[0]
    group["noise_multiplier"] *= 1.5  # more is no harm
    run(p, until=1)
    group["noise_multiplier"] *= 0.5
    before = parameters(p.model)
    with pytest.raises(PrivacyBudgetError, match=r"noise_multiplier=.* budget needs .* in each.*no target_epsilon"):
        run(p, until=1)
    assert_bitwise(parameters(p.model), before)
    assert p.steps == 2
    q = private(noise_multiplier=1.0)
    q.optimizer.param_groups[0]["noise_multiplier"] = 0.5  # a schedule of one's own
    run(q, until=1)
    assert q.epsilon() > private(noise_multiplier=1.0).epsilon()


def test_an_adaptive_clip_norm_counts_in_the_same_batches():
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=200)
    with pytest.raises(ConfigurationError, match=r"expected_batch_size=200, and the private optimizer divides by 10"):
        private(clipping=clipping, max_norm=None)


def first_piece(p):
    for x, y in p.loader:
        with p:
            F.cross_entropy(p.model(x), y).backward()
        assert not p.step()
        return


INTERRUPTED = {
    "a new loop": lambda p: None,
    "zero_grad before it": lambda p: p.zero_grad(),
    "the state before": lambda p: p.load_state_dict(p.state_dict()),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("between", INTERRUPTED.values(), ids=INTERRUPTED)
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_batch_that_is_interrupted_is_begun_anew(size, between, adaptive):
    """What was summed of it does not count twice: the step is that of the whole batch."""
    options = {"batch_size": N, "noise_multiplier": 0.0, "max_norm": 0.5}
    if adaptive:
        clipping = [AdaptiveClippedGrad(0.5, expected_batch_size=N) for _ in range(2)]
        options |= {"max_norm": None, "noise_multiplier": 1.0}
    p, q = (
        private(physical_batch_size=size, **options, **({"clipping": clipping[i]} if adaptive else {}))
        for i in range(2)
    )
    first_piece(p)
    between(p)
    for one in (p, q):
        for x, y in one.loader:
            with one:
                F.cross_entropy(one.model(x), y).backward()
            if one.step():
                break
    assert_bitwise(parameters(p.model), parameters(q.model))
    assert p.steps == 1


def summed():
    """A model, its clipping and its optimizer, with sums under way."""
    model = extend(nn.Linear(3, 2).double())
    clipping = ClippedGrad(1.0)
    optimizer = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=0.0, expected_batch_size=4)
    with perex(clipping, grad=False):
        model(torch.ones(4, 3, dtype=torch.float64)).square().mean().backward()
    return model, clipping, optimizer


def test_sums_under_way_are_forgotten_when_a_state_is_loaded():
    _, clipping, optimizer = summed()
    optimizer.load_state_dict(optimizer.state_dict())
    assert clipping.examples == 0
    with pytest.raises(StaleGradientError, match="no clipped sum"):
        optimizer.step()


def test_noise_does_not_come_again_on_another_batch():
    """The difference of two releases with the same noise would be that of their sums."""
    p = private(sampling_generator=None, noise_multiplier=100.0)
    state, draws = p.state_dict(), []
    for _ in range(2):
        p.load_state_dict(state)
        before = p.optimizer.param_groups[0]["params"][0].detach().clone()
        run(p, until=1)
        draws.append(p.optimizer.param_groups[0]["params"][0].detach() - before)
    # Sums alone, each of some twenty examples of norm 0.5, differ by less; noise of norm 50 in 12 entries by more.
    assert (draws[0] - draws[1]).norm() * 10 / 0.5 > 20

    def stream(**options):
        q = private(**options)
        q.load_state_dict(q.state_dict())
        return torch.randn(5, generator=options["noise_generator"])

    torch.testing.assert_close(*(stream(noise_generator=generator(4)) for _ in range(2)))
    assert not torch.equal(*(stream(noise_generator=generator(4), sampling_generator=None) for _ in range(2)))


@pytest.mark.parametrize("release", [Release(0.3, None), Release(0.3, 0.25), Release(100.0, 0.5)])
def test_a_budget_is_not_shared_with_other_steps(release):
    book = Ledger()
    book.record(release)
    with pytest.raises(PrivacyBudgetError, match=r"knows 1 steps with less noise.*ledger of its own"):
        private(target_epsilon=3.0, noise_multiplier=None, ledger=book)
    assert private(noise_multiplier=1.0, ledger=book).epsilon() > 0  # counts them


@pytest.mark.parametrize("groups", ["all", "per-parameter", "per-module", {"0": "first", "3": "second"}])
def test_the_first_batch_may_be_empty(groups):
    """The noise of the step is that of the groups, although no backward has shown them."""
    p = private(batch_size=1e-6, epochs=None, steps=2, max_norm=None, clipping=ClippedGrad(0.5, groups=groups))
    expected = 0.5 * {"all": 1, "per-parameter": 4}.get(str(groups), 2) ** 0.5
    assert p.clipping.sensitivity() == pytest.approx(expected)
    assert next(iter(p.loader))[0].shape[0] == 0
    assert p.step()


def test_a_ledger_of_the_same_training_is_continued(tmp_path):
    first = private(target_epsilon=3.0, noise_multiplier=None, ledger=tmp_path / "ledger")
    run(first, until=3)
    again = private(target_epsilon=3.0, noise_multiplier=None, ledger=tmp_path / "ledger")
    assert again.steps == 3
    run(again, until=2)
    assert again.steps == 5


def test_more_examples_than_planned_do_not_pass():
    p = private(target_epsilon=3.0, noise_multiplier=None)
    p.sampler._rate = 1.0
    with pytest.raises(PrivacyBudgetError, match=r"sample_rate=1\.0, and the privacy budget was calibrated for 0\.25"):
        run(p, until=1)


def test_a_clipped_sum_that_was_written_to_is_not_used():
    model, _, optimizer = summed()
    model.weight.clipped_sum.mul_(100)
    with pytest.raises(StaleGradientError, match="`weight` was written to after the backward"):
        optimizer.step()


def test_batches_cannot_be_left_out():
    for physical in (None, 3):
        p = private(physical_batch_size=physical)
        for number, (x, y) in enumerate(p):
            if number == 2:
                break
            with p:
                F.cross_entropy(p.model(x), y).backward()
            p.step()
        with pytest.raises(StaleGradientError, match=r"no backward in `with private:` and no private.step\(\)"):
            for _ in p:
                pass
        run(p, until=1)  # the loop may begin anew


def test_iteration_without_steps_does_not_go_on_for_ever():
    def forgetful(p):
        for x, y in p:
            with p:
                F.cross_entropy(p.model(x), y).backward()

    with pytest.raises(StaleGradientError, match="no step was taken"):
        forgetful(private())


class Broken(TensorDataset):
    """Fails once in a while."""

    read = 0

    def __getitem__(self, i):
        self.read += 1
        if self.read % 23 == 0:
            raise OSError("the disk")
        return super().__getitem__(i)


@pytest.mark.parametrize("physical", [None, 1, 3])
def test_no_batch_takes_the_place_of_one_that_cannot_be_read(physical):
    p = private(dataset=Broken(*data().tensors), physical_batch_size=physical)
    failures = 0
    while p.steps < p.planned_steps:
        batches, seen = iter(p.loader), []
        while True:
            try:
                x, y = next(batches)
            except OSError:
                failures += 1
                continue
            except StopIteration:
                break
            seen += x.tolist()
            with p:
                F.cross_entropy(p.model(x), y).backward()
            if p.step():
                assert len(set(map(tuple, seen))) == len(seen)  # examples of one sample
                seen = []
    assert failures > 2


def test_repr():
    p = private()
    run(p, until=2)
    assert repr(p) == ("Private(SGD, noise_multiplier=1, sample_rate=0.25, expected_batch_size=10, steps=2 of 12)")


# ------------------------------------------------------------------------------------- only what was drawn is amplified


def by_hand(sampler=None, batches=None, **settings):
    """Model, optimizer, clipping, loader."""
    model, clipping, dataset = extend(network()), ClippedGrad(0.5), data()
    optimizer = DP_SGD(
        model.parameters(),
        0.5,
        clipping=clipping,
        noise_multiplier=1.0,
        expected_batch_size=10,
        sampler=sampler,
        **settings,
    )
    loader = DataLoader(dataset, batch_sampler=batches or sampler, collate_fn=EmptyBatches(example=dataset[0]))
    return model, optimizer, clipping, loader


def backward(model, clipping, x, y):
    with perex(clipping, grad=False):
        F.cross_entropy(model(x), y).backward()


def sampler():
    return PoissonBatchSampler(N, RATE, generator=generator(3))


def test_without_a_sampler_nothing_is_amplified():
    model, optimizer, clipping, _ = by_hand(batches=sampler())
    x, y = data().tensors
    for _ in range(4):
        backward(model, clipping, x[:10], y[:10])
        optimizer.step()
    assert optimizer.ledger.runs == [(Release(1.0, None), 4)]
    plain, amplified = (epsilon(1e-3, noise_multiplier=1.0, sample_rate=q, steps=4) for q in (None, RATE))
    assert optimizer.ledger.epsilon(1e-3) == plain > 2 * amplified


def test_what_steps_without_a_sampler_are_accounted_for():
    """One example without a gradient, or another one, in data of the same length; not one that is removed."""

    def sums(x):
        model, clipping, found = extend(nn.Linear(1, 1, bias=False)), ClippedGrad(1.0), []
        for (part,) in DataLoader(TensorDataset(x), batch_size=2):
            with perex(clipping, grad=False):
                model(part).mean().backward()
            found.append(model.weight.clipped_sum.item())
            clipping.zero_grad()
        return torch.tensor(found)

    x = torch.tensor([1.0, 1.0, -1.0, -1.0] * 3).unsqueeze(1)
    for other, most in ((0.0, 1.0), (-1.0, 2.0)):
        changed = x.clone()
        changed[0] = other
        assert (sums(x) - sums(changed)).abs().tolist() == [most, 0, 0, 0, 0, 0]
    assert (sums(x) - sums(x[1:])).abs().tolist() == [2, 2, 2, 2, 2, 1]


def test_a_batch_of_another_loader_is_refused():
    model, optimizer, clipping, _ = by_hand(sampler())
    x, y = data().tensors
    backward(model, clipping, x[:10], y[:10])
    with pytest.raises(StaleGradientError, match="did not come from this sampler"):
        optimizer.step()
    assert optimizer.ledger.steps == 0


@pytest.mark.parametrize("change", [lambda x: x[1:], lambda x: torch.cat([x, x[:1]])], ids=["dropped", "repeated"])
def test_a_batch_that_was_changed_is_refused(change):
    model, optimizer, clipping, loader = by_hand(sampler())
    x, y = next(iter(loader))
    before = parameters(model)
    backward(model, clipping, change(x), change(y))
    with pytest.raises(
        StaleGradientError, match=rf"drew a batch of {len(x)} examples, the backward saw {len(change(x))}"
    ):
        optimizer.step()
    assert_bitwise(parameters(model), before)
    assert optimizer.ledger.steps == 0


def test_a_skipped_batch_is_noticed():
    model, optimizer, clipping, loader = by_hand(sampler())
    batches = iter(loader)
    first, second = next(batches), next(batches)
    assert len(first[0]) != len(second[0])
    backward(model, clipping, *second)
    with pytest.raises(StaleGradientError, match="the backward saw"):
        optimizer.step()


def test_several_views_of_an_example_are_refused():
    """Augmented twice, an example would have twice the sensitivity."""
    model, optimizer, clipping, loader = by_hand(sampler())
    x, y = next(iter(loader))
    backward(model, clipping, x.repeat(2, 1), y.repeat(2))
    with pytest.raises(StaleGradientError, match="the backward saw"):
        optimizer.step()


def test_two_backwards_of_one_forward_count_their_examples_once():
    model, optimizer, clipping, loader = by_hand(sampler())
    x, y = next(iter(loader))
    with perex(clipping, grad=False):
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
    assert clipping.examples == len(x)
    assert clipping.sensitivity() == 1.0
    optimizer.step()


def test_accumulation_by_hand_is_one_step():
    model, optimizer, clipping, loader = by_hand(sampler())
    for x, y in loader:
        optimizer.zero_grad()
        for rows in torch.arange(len(x)).chunk(3):
            backward(model, clipping, x[rows], y[rows])
        assert clipping.examples == len(x)
        optimizer.step()
        assert clipping.examples == 0
    assert optimizer.ledger.runs == [(Release(1.0, RATE), 4)]


def test_one_sampler_for_one_optimizer():
    s = sampler()
    by_hand(s)
    with pytest.raises(ConfigurationError, match="belongs to another private optimizer"):
        by_hand(s)


@pytest.mark.parametrize("wrong", [torch.utils.data.RandomSampler(data()), [[0, 1], [2]], object()])
def test_other_samplers_are_no_poisson_samplers(wrong):
    with pytest.raises(ConfigurationError, match="must be a PoissonBatchSampler or PhysicalBatches"):
        by_hand(wrong)


# --------------------------------------------------------------------------------------------------------------- pieces


def test_schedulers_with_pieces():
    """Made before or after the optimizer is private, a scheduler finds the steps it looks for."""
    for order in ("before", "after"):
        model, clipping, dataset = extend(network()), ClippedGrad(0.5), data()
        batches = PhysicalBatches(sampler(), 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        make = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)  # noqa: E731
        scheduler = make(optimizer) if order == "before" else None
        privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=10, sampler=batches)
        scheduler = scheduler or make(optimizer)
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=EmptyBatches(example=dataset[0]))
        for x, y in loader:
            before = optimizer.ledger.steps
            backward(model, clipping, x, y)
            optimizer.step()
            if optimizer.ledger.steps > before:
                scheduler.step()
        assert optimizer.ledger.steps == 4
        assert optimizer.param_groups[0]["lr"] == 0.5 * 0.5**4


def test_zero_grad_between_pieces_keeps_them():
    with_it, without = private(physical_batch_size=3), private(physical_batch_size=3)
    for x, y in with_it.loader:
        with_it.optimizer.zero_grad()
        with with_it:
            F.cross_entropy(with_it.model(x), y).backward()
        with_it.step()
    run(without)
    assert_bitwise(parameters(with_it.model), parameters(without.model))


def test_a_piece_without_backward_is_an_error_and_not_a_lost_step():
    p = private(physical_batch_size=3)
    batches = iter(p.loader)
    for x, y in (next(batches), next(batches)):
        F.cross_entropy(p.model(x), y)
        with pytest.raises(
            StaleGradientError, match=r"0 examples have come since the last call, where the next piece has [123]:"
        ):
            p.step()
        with p:
            F.cross_entropy(p.model(x), y).backward()
        assert not p.step()
    with pytest.raises(
        StaleGradientError, match=r"0 examples have come since the last call, where the next piece has [123]:"
    ):
        p.step()


def test_a_piece_too_much():
    p = private(physical_batch_size=3)
    x, y = next(iter(p.loader))
    with p:
        for _ in range(20):
            F.cross_entropy(p.model(x), y).backward()
    with pytest.raises(
        StaleGradientError, match="60 examples have come since the last call, where the next piece has 3"
    ):
        p.step()


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_the_first_piece_of_a_batch_takes_the_place_of_none(left_out):
    """Though it may be as large as the one that is missing."""
    p = private(physical_batch_size=3)

    def train():
        for number, (x, y) in enumerate(p.loader):
            if number != left_out:
                with p:
                    F.cross_entropy(p.model(x), y).backward()
                p.step()

    with pytest.raises(StaleGradientError, match="examples have come since the last call"):
        train()
    assert p.steps <= 1


class Wrapping(torch.optim.SGD):
    """Steps by another optimizer."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.base_optimizer = torch.optim.Adam(self.param_groups)


def test_more_than_the_sums_of_a_training():
    """A context does not open within another; what the error says to write in its place is the same training."""
    p, q = private(), private()
    for x, y in p:
        with (
            pytest.raises(
                ExtensionError, match=r"perex\(private\.clipping, BatchL2Grad\(\), grad=False\) in its place"
            ),
            p,
        ):
            perex(BatchL2Grad()).__enter__()
        with perex(p.clipping, BatchL2Grad(), grad=False):
            F.cross_entropy(p.model(x), y).backward()
        norms = sum(parameter.batch_l2 for parameter in p.model.parameters()).sqrt()
        torch.testing.assert_close(norms, p.clipping.norms)
        p.step()
    run(q, 3)
    assert_bitwise(parameters(p.model), parameters(q.model))


def test_a_tuple_of_arrays_is_no_data_set():
    """Its length is 2, and each of these would be an example."""
    for arrays in (data().tensors, tuple(t.numpy() for t in data().tensors)):
        with pytest.raises(ConfigurationError, match=r"tuple of 2 arrays.*TensorDataset\(\*tensors\)"):
            private(dataset=arrays)
    assert len(private(dataset=list(zip(*data().tensors, strict=True))).loader.dataset) == N


def test_more_steps_than_planned_with_noise_of_ones_own():
    p = private(epochs=1)
    run(p)
    with pytest.raises(
        PrivacyBudgetError, match=r"plan as many as there may be, and stop where epsilon\(\) has reached"
    ):
        run(p)


def test_an_optimizer_inside_of_another_is_not_overlooked():
    with pytest.raises(ConfigurationError, match="This Wrapping has an optimizer of its own in `base_optimizer`"):
        private(make=Wrapping)


class Halving(torch.optim.SGD):
    """Calls the step of its base class, of which torch has hooked both as soon as there was an SGD."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] /= 2
        return super().step(closure)


@pytest.mark.parametrize("physical", [None, 3])
def test_an_optimizer_that_calls_the_step_of_its_base_class(physical):
    torch.optim.SGD([torch.zeros(1)])
    one, two = private(make=Halving, physical_batch_size=physical), private(physical_batch_size=physical)
    run(one, epochs=3)
    for x, y in two:
        with two:
            F.cross_entropy(two.model(x), y).backward()
        two.optimizer.param_groups[0]["lr"] = 0.5 / 2 ** (two.steps + 1)
        two.step()
    assert one.steps == two.steps == 12
    assert_bitwise(parameters(one.model), parameters(two.model))


def test_such_optimizers_may_share_the_sums():
    torch.optim.SGD([torch.zeros(1)])
    model, clipping = extend(network()), ClippedGrad(0.5)
    both = [
        privatize(Halving(model[i].parameters()), clipping=clipping, noise_multiplier=1.0, expected_batch_size=10)
        for i in (0, 3)
    ]
    for _ in range(2):
        backward(model, clipping, *data().tensors)
        for optimizer in both:
            optimizer.step()
    assert [optimizer.ledger.steps for optimizer in both] == [2, 2]


def test_sums_that_come_within_a_step_are_made_private_too():
    """A step that runs a backward of its own, and then that of its base class again."""

    class Twice(torch.optim.SGD):
        def step(self):
            super().step()
            backward(model, clipping, *data().tensors)
            super().step()

    torch.optim.SGD([torch.zeros(1)])
    model, clipping = extend(network()), ClippedGrad(0.5)
    optimizer = privatize(Twice(model.parameters()), clipping=clipping, noise_multiplier=1.0, expected_batch_size=10)
    backward(model, clipping, *data().tensors)
    optimizer.step()
    assert optimizer.ledger.steps == 2
    with pytest.raises(StaleGradientError, match="was used by an earlier step already"):
        optimizer.step()


@pytest.mark.parametrize("hooked", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_plain_backward_within_a_step_is_an_error(first, hooked):
    class Base(torch.optim.SGD):
        def step(self):
            super().step()

    class Extra(Base):
        def step(self):
            if not first:
                super().step()
            if self.again:
                F.cross_entropy(model(x), y).backward()
            super().step()

    if hooked:
        Base([torch.zeros(1)])
    (x, y), model, clipping = data().tensors, extend(network()), ClippedGrad(0.5)
    optimizer = privatize(Extra(model.parameters()), clipping=clipping, noise_multiplier=1.0, expected_batch_size=10)
    for again in (False, True, False):
        optimizer.again = again
        backward(model, clipping, x, y)
        if again:
            with pytest.raises(PerExampleError, match=r"Extra\.step runs a backward of its own"):
                optimizer.step()
            F.cross_entropy(model(x), y).backward()  # no step is under way
            model.zero_grad()
        else:
            optimizer.step()
            assert not any(map(hooks_after_gradient, model.parameters()))
    assert optimizer.ledger.steps == 3


def test_a_divisor_that_counts_the_examples_is_an_error():
    p = private(sampling_generator=generator(3))
    with pytest.raises(ConfigurationError, match=r"expected_batch_size was 10 in the first step, and is \d+ now"):  # noqa: PT012
        for number, (x, y) in enumerate(p):
            if number:
                p.optimizer.param_groups[0]["expected_batch_size"] = float(len(x))
            with p:
                F.cross_entropy(p.model(x), y).backward()
            p.step()


def test_the_name_of_another_library_is_told_apart():
    with pytest.raises(ConfigurationError, match="Was max_norm meant, of make_private"):
        private(max_grad_norm=1.0)
    with pytest.raises(ConfigurationError, match=r"no option 'max_grad_norm'.*Was max_norm meant, of make_private"):
        private(max_grad_norm=1.0, max_norm=None, public_size=None)


def test_a_second_training_of_a_model_is_not_all_of_it(tmp_path):
    model = network()
    first = private(model, ledger=tmp_path / "steps.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private(model)  # nothing was trained yet
        first = private(model, ledger=tmp_path / "steps.jsonl")
        run(first, until=2)
        assert private(model, ledger=tmp_path / "steps.jsonl").steps == 2
        assert private(model, ledger=first.ledger).steps == 2
    with pytest.warns(UserWarning, match="has been trained by 2 private steps that the new ledger does not know"):
        private(model)


@pytest.mark.parametrize("kept", ["file", "state"])
def test_a_further_training_of_a_model_is_counted_as_its_warning_says(tmp_path, kept):
    model = network()
    first = private(model, ledger=tmp_path / "steps.jsonl")
    run(first, epochs=3)
    with pytest.raises(ConfigurationError, match=r"held to 12 steps.* and 24 are planned, those that it knows"):
        private(model, ledger=first.ledger, epochs=6)
    ledger = tmp_path / "steps.jsonl"
    if kept == "state":
        ledger = Ledger()
        ledger.load_state_dict(first.ledger.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = private(model, ledger=ledger, epochs=6)
    run(second, epochs=3)
    assert second.steps == second.planned_steps == 24
    assert second.epsilon() == epsilon(1e-3, noise_multiplier=1.0, sample_rate=RATE, steps=24)


@pytest.mark.parametrize("again", [True, False])
def test_a_piece_that_is_run_twice_is_an_error(again):
    p = private(physical_batch_size=3)
    x, y = next(iter(p.loader))
    for _ in range(1 + again):
        with p:
            F.cross_entropy(p.model(x), y).backward()
    if again:
        with pytest.raises(
            StaleGradientError, match="6 examples have come since the last call, where the next piece has 3"
        ):
            p.step()
    else:
        assert not p.step()


# ------------------------------------------------------------------------------------------------------ save and resume


@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 7])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, physical, at):
    options = {"physical_batch_size": physical, "make": torch.optim.AdamW}
    whole = private(network(dropout=0.3), **options)
    torch.manual_seed(9)
    run(whole, 3)
    first = private(network(dropout=0.3), **options)
    torch.manual_seed(9)
    if at:
        run(first, 3, until=at)
    first.save(tmp_path / "run.pt")
    second = private(network(7, dropout=0.3), **options | {"sampling_generator": None})
    torch.manual_seed(10)
    second.load(tmp_path / "run.pt")
    if physical is None:
        while second.steps < second.planned_steps:
            run(second)
        assert_bitwise(parameters(whole.model), parameters(second.model))
    else:  # masks of the pieces that came again are others
        while second.steps < second.planned_steps:
            run(second)
    assert second.ledger.runs == whole.ledger.runs
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def noise_of_steps(p, count):
    """The noise of some steps, and their sums, one row each."""
    noise, sums = [], []
    while True:
        for x, y in p.loader:
            with p:
                F.cross_entropy(p.model(x), y).backward()
            sums.append(torch.cat([q.clipped_sum.flatten() for q in p.model.parameters()]))
            p.step()
            noise.append(torch.cat([q.grad.flatten() for q in p.model.parameters()]) * RATE * N - sums[-1])
            if len(sums) == count:
                return torch.stack(noise), torch.stack(sums)


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_noise_that_comes_again_comes_beside_the_same_sums(tmp_path, rate):
    """Else the difference of two releases would be that of their sums."""
    first = private()
    run(first, until=2)
    first.save(tmp_path / "run.pt")
    noise, sums = noise_of_steps(first, 3)
    second = private(network(7))
    second.load(tmp_path / "run.pt")
    second.optimizer.param_groups[0]["lr"] = rate
    again, others = noise_of_steps(second, 3)
    same = (sums == others).all(1)
    assert same.tolist() == [True, rate == 0.5, rate == 0.5]
    for one, other, alike in zip(noise, again, same, strict=True):
        assert torch.allclose(one, other) if alike else (one - other).abs().min() > 1e-3


def test_noise_of_a_run_that_is_begun_again_is_not_beside_other_sums():
    """Its batches are others, as they have no generator."""
    noise, sums = noise_of_steps(private(sampling_generator=None), 2)
    again, others = noise_of_steps(private(sampling_generator=None), 2)
    assert (sums != others).any()
    assert (noise - again).abs().min() > 1e-6


@pytest.mark.parametrize("repeatable", [True, False])
def test_batches_of_a_run_that_is_begun_again(tmp_path, repeatable):
    """Alike only together with their noise: else they are no new samples, as which they are accounted."""

    def batches(count):
        p = private(ledger=tmp_path / "steps.jsonl", **({} if repeatable else {"noise_generator": None}))
        found = []
        for x, y in p:
            with p:
                F.cross_entropy(p.model(x), y).backward()
            p.step()
            found.append(tuple(x[:, 0].tolist()))
            if len(found) == count:
                return found, p.steps

    (first, _), (second, steps) = batches(3), batches(2)
    assert steps == 5
    assert (first[:2] == second) is repeatable
    assert repeatable or not set(first) & set(second)


def test_noise_without_a_sampler_does_not_come_again():
    """Nothing says that a loader of another kind gives the same batches."""

    def made():
        model = network()
        clipping, sgd = ClippedGrad(0.5), torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer = privatize(
            sgd, clipping=clipping, noise_multiplier=1.0, expected_batch_size=4, generator=generator(4)
        )
        return extend(model), clipping, optimizer

    def noise(model, clipping, optimizer):
        with perex(clipping, grad=False):
            (0.0 * F.cross_entropy(model(torch.ones(4, 3).double()), torch.zeros(4, dtype=torch.long))).backward()
        optimizer.step()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    first, second = made(), made()
    second[2].load_state_dict(first[2].state_dict())
    assert (noise(*first) - noise(*second)).abs().min() > 1e-6


def test_noise_of_the_system_is_not_repeated_by_a_resumed_run(tmp_path):
    first = private(noise_generator=None)
    run(first, until=2)
    first.save(tmp_path / "run.pt")
    ends = []
    for _ in range(2):
        second = private(noise_generator=None)
        second.load(tmp_path / "run.pt")
        run(second, until=1)
        ends.append(parameters(second.model)[0])
    assert not torch.equal(*ends)


def test_steps_after_the_checkpoint_stay_counted_with_a_file(tmp_path):
    first = private(ledger=tmp_path / "steps.jsonl")
    run(first, until=2)
    first.save(tmp_path / "run.pt")
    run(first, until=3)
    second = private(ledger=tmp_path / "steps.jsonl")
    second.load(tmp_path / "run.pt")
    assert second.steps == 5


def test_going_back_in_one_process_does_not_forget_steps(tmp_path):
    p = private()
    run(p, until=1)
    p.save(tmp_path / "run.pt")
    run(p, until=2)
    p.load(tmp_path / "run.pt")
    assert p.steps == 3


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"noise_multiplier": 2.0}, "noise_multiplier"),
        ({"batch_size": 5}, "sample_rate"),
        ({"epochs": 4}, "planned_steps"),
    ],
)
def test_a_run_is_resumed_with_its_own_plan(other, name):
    with pytest.raises(ConfigurationError, match=f"The saved run has {name}="):
        private(**other).load_state_dict(private().state_dict())


@pytest.mark.parametrize("factor", [1 - 1e-12, 1 + 1e-12])
@pytest.mark.parametrize("file", [True, False])
def test_a_run_is_resumed_on_another_machine(tmp_path, monkeypatch, factor, file):
    """Which calibrates the noise to other last digits, as its Fourier transforms round otherwise."""
    settings = {"target_epsilon": 3.0, "noise_multiplier": None, "ledger": tmp_path / "steps.jsonl" if file else None}
    first = private(**settings)
    run(first, until=3)
    first.save(tmp_path / "run.pt")
    here = noise_multiplier_for(3.0, 1e-3, sample_rate=RATE, steps=12)
    monkeypatch.setattr("perexample.privacy.accounting.noise_multiplier_for", lambda *_, **__: here * factor)
    second = private(**settings)
    second.load(tmp_path / "run.pt")
    run(second, epochs=3)
    assert second.ledger.runs == [(Release(here, RATE), 12)]


def test_a_state_without_ledger_is_refused():
    _, optimizer, _, _ = by_hand(sampler())
    plain = torch.optim.SGD(network().parameters(), 0.5).state_dict()
    with pytest.raises(StaleGradientError, match="would not be accounted"):
        optimizer.load_state_dict(plain)


def test_a_state_with_and_a_run_without_a_sampler():
    _, one, _, _ = by_hand(sampler())
    _, other, _, _ = by_hand(batches=sampler())
    with pytest.raises(ConfigurationError, match="saved with a sampler"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ConfigurationError, match="saved without a sampler"):
        one.load_state_dict(other.state_dict())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    p = private()
    p.save(tmp_path / "run.pt")
    old = (tmp_path / "run.pt").read_bytes()
    run(p, until=1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        p.save(tmp_path / "run.pt")
    assert (tmp_path / "run.pt").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------------ any optimizer


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_make_optimizer(cls):
    made = make_optimizer(cls)
    assert issubclass(made, cls)
    assert made.__name__ == f"DP_{cls.__name__}"
    model, other = extend(network()), extend(network())
    one, two = ClippedGrad(0.5), ClippedGrad(0.5)
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 10}
    a = made(model.parameters(), lr=0.1, clipping=one, generator=generator(), **settings)
    b = privatize(cls(other.parameters(), lr=0.1), clipping=two, generator=generator(), **settings)
    x, y = data().tensors
    for _ in range(3):
        backward(model, one, x, y)
        backward(other, two, x, y)
        a.step()
        b.step()
    assert_bitwise(parameters(model), parameters(other))


@pytest.mark.parametrize("wrong", [torch.nn.Linear, "Adam", torch.optim.SGD([torch.zeros(1)])])
def test_make_optimizer_of_what_is_none(wrong):
    with pytest.raises(ConfigurationError, match="make_optimizer takes a class of optimizers"):
        make_optimizer(wrong)


def test_make_optimizer_of_lbfgs():
    model = extend(network())
    with pytest.raises(ConfigurationError, match="needs a closure"):
        make_optimizer(torch.optim.LBFGS)(
            model.parameters(), clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=1
        )


# ------------------------------------------------------------------------------------------------------------- refusals


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield 1


class NoLength(Dataset):
    def __getitem__(self, index):
        return index

    def __len__(self):
        return 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"public_size": None}, "needs public_size"),
        ({"public_size": 5}, "batch_size=10.0 is more than public_size=5"),
        ({"batch_size": 0}, "batch_size must be a finite number greater than 0"),
        ({"batch_size": math.nan}, "batch_size must be"),
        ({"public_size": "many"}, "public_size must be"),
        ({"epochs": None}, "needs one of epochs and steps"),
        ({"steps": 3}, "needs one of epochs and steps"),
        ({"epochs": 0}, "epochs must be"),
        ({"epochs": None, "steps": 2.5}, "steps must be a whole number"),
        ({"max_norm": None}, "needs one of max_norm and clipping"),
        ({"clipping": ClippedGrad(1.0)}, "needs one of max_norm and clipping"),
        ({"max_norm": -1.0}, "max_norm must be a finite number greater than 0"),
        ({"target_epsilon": 1.0}, "needs one of target_epsilon and noise_multiplier"),
        ({"noise_multiplier": None}, "needs one of target_epsilon and noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"target_delta": 0.0}, "delta"),
        ({"target_delta": 1.0}, "delta"),
        ({"accountant": "moments"}, "accountant"),
        ({"physical_batch_size": 0}, "size must be an integer >= 1"),
        ({"noise": "secure"}, "'torch' or 'os'"),
        ({"noise": "os"}, "takes no generator"),
        ({"shuffle": True}, "option 'shuffle'"),
        ({"drop_last": True}, "option 'drop_last'"),
        ({"dataset": Stream()}, "Stream is no such thing"),
        ({"dataset": NoLength()}, "dataset is empty"),
        ({"dataset": DataLoader(data())}, "DataLoader is no such thing"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_arguments_without_meaning(options, message):
    with pytest.raises(ConfigurationError, match=message):
        private(**options)


def test_the_optimizer_must_hold_the_models_parameters():
    model, other = network(), network()
    make = lambda *params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    settings = {"batch_size": 10, "public_size": N, "max_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-3}
    with pytest.raises(ConfigurationError, match=r"`3\.bias` is trainable, and the optimizer does not have it"):
        make_private(model, make(*list(model.parameters())[:-1]), data(), epochs=1, **settings)
    with pytest.raises(ConfigurationError, match=r"a parameter of shape \[2\] that is not the model's"):
        make_private(model, make(*model.parameters(), other[3].bias), data(), epochs=1, **settings)
    with pytest.raises(ConfigurationError, match=r"optimizer must be a torch\.optim\.Optimizer, not type"):
        make_private(model, torch.optim.SGD, data(), epochs=1, **settings)


def test_a_count_is_released_once():
    """Steps on empty batches, without a backward, have a count of zero, and not that of the step before."""
    model = extend(nn.Linear(3, 2).double())
    clipping = AdaptiveClippedGrad(1e6, expected_batch_size=4, count_noise=1e-9)
    sampler = PoissonBatchSampler(40, 1e-12)
    optimizer = DP_SGD(
        model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=0.0, expected_batch_size=4, sampler=sampler
    )
    shares = []
    for batch in list(itertools.islice(sampler, 3)):
        assert not batch
        clipping._count = clipping._count or 6.0 * (not shares)  # as a step before would have left it
        clipping.zero_grad()
        optimizer.step()
        shares.append(clipping.share)
    assert shares == pytest.approx([0.5] * 3)
    plain = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=0.0, expected_batch_size=4)
    with perex(clipping, grad=False):
        model(torch.ones(6, 3, dtype=torch.float64)).square().mean().backward()
    plain.step()
    assert clipping.share == pytest.approx(0.5 + 3 / 4)
    assert clipping._count == 0


def test_an_empty_batch_has_the_noise_of_the_present_bound():
    p = private(batch_size=1e-6, epochs=None, steps=3, clipping=ClippedGrad(0.5), max_norm=None)
    batches = iter(p.loader)
    stds = []
    for bound in (0.5, 50.0):
        p.clipping.max_norm = bound
        next(batches)
        before = parameters(p.model)
        p.step()
        stds.append(torch.cat([(a - b).flatten() for a, b in zip(before, parameters(p.model), strict=True)]).std())
    assert 20 < stds[1] / stds[0] < 500
    assert p.clipping.sensitivity() == 50.0


def test_batches_come_in_their_order():
    with pytest.raises(ConfigurationError, match=r"in_order=False: batches have to come in the order"):
        private(in_order=False, num_workers=2)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (1, 2)])
def test_the_sampler_is_that_of_the_process(rank, world_size):
    sampler = PoissonBatchSampler(40, 0.25, rank=rank, world_size=world_size)
    with pytest.raises(ConfigurationError, match=rf"of process {rank} of 2, and the optimizer belongs to"):
        DP_SGD(
            network().parameters(), lr=0.1, clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=10,
            sampler=sampler,
        )  # fmt: skip


def test_a_sum_that_was_written_to_is_not_added_to():
    model, clipping = extend(nn.Linear(3, 2).double()), ClippedGrad(1.0)
    for again in range(2):
        with perex(clipping, grad=False):
            loss = model(torch.ones(4, 3, dtype=torch.float64)).square().mean()
            if again:
                with pytest.raises(StaleGradientError, match="written to after the backward"):
                    loss.backward()
            else:
                loss.backward()
                model.weight.clipped_sum.mul_(50)


def test_a_budget_holds_for_what_a_state_brings():
    loud = private(noise_multiplier=0.3)
    run(loud, until=2)
    p = private(target_epsilon=3.0, noise_multiplier=None)
    with pytest.raises(PrivacyBudgetError, match="budget needs"):
        p.optimizer.load_state_dict(loud.optimizer.state_dict())


def test_a_ledger_file_stays_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    book = Ledger("ledger")
    monkeypatch.chdir(tmp_path / "elsewhere")
    book.record(Release(1.0, 0.1))
    assert Ledger(tmp_path / "ledger").steps == 1


def test_a_clip_of_ones_own_looks_at_each_norm_by_itself():
    class Largest(Clip):
        def __call__(self, norms, bound):
            return bound / norms.max().expand_as(norms)

    model = extend(nn.Linear(3, 2).double())
    with perex(ClippedGrad(1.0, clip=Largest()), grad=False), pytest.raises(CrossExampleError, match="its own example"):
        model(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forked_processes_have_numbers_of_their_own():
    p = private(sampling_generator=None, noise_generator=None)
    run(p, until=1)
    source = p.optimizer._optimizer_step_pre_hooks

    def drawn():
        pipe = os.pipe()
        if os.fork() == 0:
            noise = next(iter(source.values())).noise.like(torch.zeros(4), 1.0)
            os.write(pipe[1], repr((noise.tolist(), next(iter(p.sampler)))).encode())
            os._exit(0)
        os.wait()
        return os.read(pipe[0], 10_000)

    first, second = drawn(), drawn()
    noises = [literal_eval(text.decode())[0] for text in (first, second)]
    batches = [literal_eval(text.decode())[1] for text in (first, second)]
    assert noises[0] != noises[1]
    assert batches[0] != batches[1]


# ------------------------------------------------------------------------- what a second reader broke, and stays whole


def test_processes_must_be_those_of_the_beginning(monkeypatch):
    """torch.distributed set up later would count every example once in each process."""
    p = private()
    x, y = next(iter(p.loader))
    with p:
        F.cross_entropy(p.model(x), y).backward()
    monkeypatch.setattr("perexample.privacy.distributed.Processes.size", property(lambda self: 2))
    monkeypatch.setattr("perexample.privacy.distributed.Processes._exchange", lambda self, kind, mine: [mine, mine])
    before = parameters(p.model)
    with pytest.raises(
        ConfigurationError, match=r"in process 0 of 1, and steps in process 0 of 2.*before make_private"
    ):
        p.step()
    assert_bitwise(before, parameters(p.model))
    assert p.steps == 0


@pytest.mark.parametrize("bound", [float("nan"), 0.0, -1.0, float("inf"), "1", None])
def test_a_bound_that_is_no_number_is_never_a_step_without_noise(bound):
    p = private(physical_batch_size=4)
    with pytest.raises(ConfigurationError, match="max_norm must be a finite number greater than 0"):  # noqa: PT012
        for number, (x, y) in enumerate(p):
            p.clipping.max_norm = bound if not number else 1.0
            with p:
                F.cross_entropy(p.model(x), y).backward()
            p.step()


class Careless(ClippedGrad):
    """An extension of somebody's own, whose bound is no number."""

    def sensitivity(self):
        return float("nan")


def test_a_sensitivity_that_is_no_number_is_refused():
    p = private(max_norm=None, clipping=Careless(1.0))
    with pytest.raises(ConfigurationError, match="standard deviation nan"):
        run(p, until=1)
    assert p.steps == 0


def moved_by(p, steps=1):
    before = parameters(p.model)
    run(p, until=steps)
    return torch.cat([(a - b).flatten() for a, b in zip(parameters(p.model), before, strict=True)])


def test_steps_that_are_taken_again_in_one_process_have_other_noise_and_batches():
    """With another learning rate the same noise would be on other sums."""
    p = private(noise_multiplier=100.0)
    run(p, until=2)
    state = p.state_dict()
    run(p, until=1)
    p.load_state_dict(state)
    first = moved_by(p)
    p.load_state_dict(state)
    assert (torch.nn.functional.cosine_similarity(first, moved_by(p), dim=0)).abs() < 0.9
    assert p.steps == 5


def test_batches_alone_do_not_come_again(tmp_path):
    """The same batches with other noise are no new samples, as which they are accounted."""

    def batches():
        p = private(noise_generator=None, epochs=9)
        p.load(tmp_path / "state")
        return [tuple(x[:, 0].tolist()) for x, _ in itertools.islice(p.loader, 4)]

    p = private(noise_generator=None, epochs=9)
    run(p, until=3)
    p.save(tmp_path / "state")
    first, second = batches(), batches()
    assert not set(first) & set(second)


def test_a_state_is_that_of_its_moment():
    p = private()
    run(p, until=2)
    state, before = p.state_dict(), parameters(p.model)
    run(p, until=5)
    other = private()
    other.load_state_dict(state)
    assert_bitwise(parameters(other.model), before)
    assert other.steps == 2


def test_a_state_of_the_optimizer_goes_on_with_its_weights():
    """As torch's own: what is saved later has the steps that the weights have taken."""
    p = private()
    run(p, until=2)
    state = p.optimizer.state_dict()
    run(p, until=5)
    assert sum(count for *_, count in state["privacy"]["ledger"]["runs"]) == p.steps > 2


def test_a_state_of_the_beginning_goes_on_too():
    p = private()
    state = p.optimizer.state_dict()
    run(p, until=3)
    p.optimizer.param_groups[0]["noise_multiplier"] = 2.0
    run(p, until=2)
    assert state["privacy"]["ledger"]["runs"] == [[1.0, RATE, 3], [2.0, RATE, p.steps - 3]]
    assert p.steps > 3


def test_a_state_that_went_on_repeats_no_noise():
    """Its ledger and weights are of now, its random numbers of then."""
    p = private(epochs=9)
    run(p, until=3)
    state, old = p.optimizer.state_dict(), copy.deepcopy(p.optimizer.state_dict())
    run(p, until=3)
    for other, loaded, repeats in (
        (p, state, False),
        (private(epochs=9), state, False),
        (private(epochs=9), old, True),
    ):
        other.optimizer.load_state_dict(loaded)
        privatizer = next(iter(other.optimizer._optimizer_step_pre_hooks.values()))
        assert torch.equal(privatizer.noise.state(), old["privacy"]["noise"]) == repeats
        drawn = privatizer.sampler.state_dict()["generator"]
        assert torch.equal(drawn, old["privacy"]["sampler"]["generator"]) == repeats


@pytest.mark.parametrize("physical", [None, 3])
def test_what_does_not_fit_is_said_before_anything_is_loaded(physical):
    p, q = (private(dataset=data(n), physical_batch_size=physical) for n in (40, 39))
    run(p, until=2)
    before = q.optimizer.state_dict()["param_groups"][0]["lr"]
    p.optimizer.param_groups[0]["lr"] = 0.125
    with pytest.raises(ConfigurationError, match="data_size"):
        q.optimizer.load_state_dict(p.optimizer.state_dict())
    assert q.optimizer.param_groups[0]["lr"] == before
    assert q.steps == 0


def test_torch_may_fail_to_load_its_part():
    p = private(make=torch.optim.Adam)
    run(p, until=2)
    state = p.optimizer.state_dict()
    broken = {**state, "param_groups": []}
    run(p, until=1)
    noise = p.optimizer._optimizer_step_pre_hooks[next(iter(p.optimizer._optimizer_step_pre_hooks))].noise
    before = noise.state()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        p.optimizer.load_state_dict(broken)
    assert torch.equal(noise.state(), before)
    run(p, until=1)


@pytest.mark.parametrize("name", ["data_size", "sample_rate", "steps", "rank", "world_size"])
def test_what_batches_are_drawn_with_cannot_be_changed(name):
    with pytest.raises(AttributeError):
        setattr(private().sampler, name, 1)


@pytest.mark.parametrize("name", ["noise_multiplier", "sample_rate", "expected_batch_size", "planned_steps"])
def test_the_plan_cannot_be_changed(name):
    with pytest.raises(AttributeError):
        setattr(private(), name, 1)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(20, 200, bias=False), nn.Linear(200, 2, bias=False)

    def forward(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.usefixtures("noise_of_any_sums")
@pytest.mark.parametrize("kind", ["repeats", "unfrozen", "frozen", "adaptive"])
def test_noise_does_not_tell_that_a_batch_was_empty(kind):
    """An empty batch without a backward has the noise of one example whose gradient is zero."""

    def deviation(n):
        torch.manual_seed(0)
        model = extend(Wide())
        clipping = AdaptiveClippedGrad(1.0, expected_batch_size=1, count_noise=9.0) if kind == "adaptive" else (
            ClippedGrad(1.0, groups="all" if kind == "repeats" else "per-parameter")
        )  # fmt: skip
        model.a.weight.requires_grad_(kind != "unfrozen")
        clipping.know(model.named_parameters())
        sampler = PoissonBatchSampler(50, 0.5, steps=10, generator=generator(1))
        optimizer = privatize(
            torch.optim.SGD(model.parameters(), lr=0.0), clipping=clipping, noise_multiplier=1.0,
            expected_batch_size=1, sampler=sampler, generator=generator(5),
        )  # fmt: skip
        for count in (5, n):
            sampler._pending.clear()
            sampler._pending.append(type(sampler).__iter__.__globals__["_Drawn"](count, sampler._generator.get_state()))
            if count:
                with perex(clipping, grad=False):
                    loss = model(torch.randn(count, 20) * (count > 1)).square().sum(1).mean()
                    loss.backward(retain_graph=True)
                    if kind in ("repeats", "adaptive"):
                        loss.backward()
            optimizer.step()
            if kind in ("unfrozen", "frozen"):
                model.a.weight.requires_grad_(kind == "unfrozen")
        return model.b.weight.grad.std().item(), clipping.max_norm

    (std, bound), (other, another) = deviation(0), deviation(1)
    assert std == pytest.approx(other, rel=1e-6)
    assert bound == pytest.approx(another, rel=0.2) if kind == "adaptive" else True


def test_settings_of_a_group_are_not_overruled_in_silence():
    model, clipping = extend(network()), ClippedGrad(1.0)
    sgd = torch.optim.SGD([{"params": model.parameters(), "noise_multiplier": 0.1}], lr=0.1)
    settings = {"clipping": clipping, "expected_batch_size": 4}
    with pytest.raises(ConfigurationError, match=r"5, and a group of this one has 0\.1 already"):
        privatize(sgd, noise_multiplier=5.0, **settings)
    with pytest.raises(ConfigurationError, match="loaded after privatize or make_private"):
        privatize(sgd, noise_multiplier=0.1, **settings)


def test_what_could_not_be_made_private_is_as_it_was():
    sampler = PoissonBatchSampler(40, 0.25)
    sampler.claim()
    model, clipping = extend(network()), ClippedGrad(1.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"clipping": clipping, "expected_batch_size": 4, "noise_multiplier": 1.0}
    with pytest.raises(ConfigurationError, match="belongs to another private optimizer"):
        privatize(sgd, sampler=sampler, **settings)
    assert privatize(sgd, **settings).ledger.steps == 0


@pytest.mark.parametrize("name", ["noise_generator", "sampling_generator"])
def test_generators_that_nobody_has_seeded_are_public(name):
    with pytest.raises(ConfigurationError, match="never seeded"):
        private(**{name: torch.Generator()})


def test_a_ledger_belongs_to_one_budget(tmp_path):
    book = Ledger()
    private(target_epsilon=3.0, noise_multiplier=None, ledger=book)
    with pytest.raises(PrivacyBudgetError, match="belongs to another training"):
        private(target_epsilon=8.0, noise_multiplier=None, ledger=book)
    p = private(ledger=tmp_path / "book")
    run(p, until=1)
    (tmp_path / "book").unlink()
    with pytest.raises(StaleGradientError, match="is gone, and with it 1 steps"):
        run(p, until=1)


def test_a_delta_that_means_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"more than 1 / public_size"):
        private(target_delta=0.5)


def mixed_up(examples):
    x, y = torch.utils.data.default_collate(examples)
    share = torch.rand(())
    return share * x + (1 - share) * x.roll(1, 0), y


def centred(examples):
    x, y = torch.utils.data.default_collate(examples)
    return {"x": x - x.mean(0), "y": y}


def seldom_mixed(examples):
    x, y = torch.utils.data.default_collate(examples)
    return (x + 0.5 * x.roll(1, 0) if torch.rand(()) < 0.25 else x), y


def beside_the_originals(examples):
    x, y = torch.utils.data.default_collate(examples)
    return torch.cat([x, x + x.flip(0)]), torch.cat([y, y])


def with_texts(examples):
    x, y = torch.utils.data.default_collate(examples)
    return {"x": x + x.roll(1, 0), "y": y, "text": np.array(["a", "b", "c"][: len(x)])}


def time_first(examples):
    x, y = torch.utils.data.default_collate(examples)
    return torch.stack([x, 2 * x]), y


def cropped(examples):
    """Padded to the longest, and cut by chance to as many."""
    x, y = torch.utils.data.default_collate(examples)
    start = int(torch.randint(2, ()))
    return x[:, start : start + 2] + torch.randn(2, dtype=x.dtype), y


def ragged(examples):
    return {"list": [x[: 1 + i % 2] for i, (x, _) in enumerate(examples)], "y": torch.stack([y for _, y in examples])}


def shuffled(examples):
    x, y = torch.utils.data.default_collate(examples)
    order = torch.randperm(len(x))
    return x[order], y[order]


def noisy(examples):
    x, y = torch.utils.data.default_collate(examples)
    return x + torch.randn(x.shape, dtype=x.dtype), y


def of_its_own(examples):
    x, y = torch.utils.data.default_collate(examples)
    return x + torch.randn(x.shape, dtype=x.dtype, generator=OWN), y


OWN = torch.Generator().manual_seed(3)


@pytest.mark.parametrize("collate", [mixed_up, centred, seldom_mixed, beside_the_originals, with_texts])
def test_examples_that_are_mixed_before_the_model(collate):
    with pytest.raises(CrossExampleError, match=r"collate_fn mixes examples.*MixUp"):
        private(collate_fn=collate)


@pytest.mark.parametrize(
    "collate", [shuffled, noisy, of_its_own, torch.utils.data.default_collate, time_first, cropped, ragged]
)
def test_examples_that_are_not(collate):
    """Nor are random numbers drawn for that, of which a training might know."""
    model, dataset, states = network(), data(), torch.get_rng_state()
    private(model, dataset, collate_fn=collate)
    drawing = (shuffled, noisy, cropped)  # which draw some themselves
    assert torch.equal(torch.get_rng_state(), states) or collate in drawing


class Codebook(nn.Module):
    """Follows the data, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 2), how
        self.book = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.inner = nn.Embedding(2, 3)
        self.inner.weight.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            self.how(self, x)
        return self.layer(x + self.book + self.inner.weight[0])


def in_place(self, x):
    self.book.mul_(0.9).add_(0.1 * x.mean(0))


def by_data(self, x):
    self.book.data = 0.9 * self.book.data + 0.1 * x.mean(0)


def of_another_module(self, x):
    self.inner.weight.data[0] = x.mean(0)


def anew(self, x):
    self.book = nn.Parameter(0.9 * self.book + 0.1 * x.mean(0), requires_grad=False)


def trained(self, x):
    self.layer.weight.copy_(x[:1].expand(2, 3))


@pytest.mark.parametrize("physical", [None, 1])
@pytest.mark.parametrize("how", [in_place, by_data, of_another_module, anew, trained])
def test_data_in_parameters(how, physical):
    model = Codebook(how).double()
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    p = private(model, make=lambda params, lr: sgd, physical_batch_size=physical)
    with pytest.raises(UnsupportedModuleError, match=r"parameter `(book|weight)` that the forward"):
        run(p, until=1)


class Tying(nn.Module):
    """Ties its weights in each forward, and lends another module a tensor made of the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.scale = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        self.b.weight = self.a.weight
        weights = {"weight": self.scale(x).unsqueeze(2) * torch.eye(3, dtype=x.dtype)}
        with torch.no_grad():
            self.a.weight.mul_(1.0)  # by a number
        return (self.b(self.a(x)).unsqueeze(1) @ weights["weight"]).squeeze(1)[:, :2]


def test_parameters_that_hold_no_data():
    model = extend(Tying())
    clipping = ClippedGrad(1.0)
    with perex(clipping):
        F.cross_entropy(model(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
    assert clipping.examples == 4
