"""Poisson sampling: the statistics, the loader, the handshake with an optimizer, resuming, empty batches, cutting."""

import collections
import copy
import dataclasses
import itertools
import operator
import pickle
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistic import poisson_faults
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset, default_collate

from perexample import ConfigurationError, StaleGradientError
from perexample.privacy import EmptyBatches, PhysicalBatches, PoissonBatchSampler, sampling, split_batch

N, Q, DRAWS = 53, 0.1, 4000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampler(data_size=40, sample_rate=0.2, steps=5, seed=0, claimed=False, **shard):
    result = PoissonBatchSampler(data_size, sample_rate, steps, generator=seeded(seed), **shard)
    if claimed:
        result.claim()
    return result


# ------------------------------------------------------------------------------ statistics: 2e-5 to fail for a new seed


@pytest.mark.parametrize(("data_size", "rate", "seed"), [(N, Q, 0), (N, Q, 1), (20, 0.5, 2), (100, 0.03, 3)])
def test_batches_are_poisson_samples(data_size, rate, seed):
    assert poisson_faults(list(sampler(data_size, rate, DRAWS, seed)), data_size, rate) == []


def test_iterations_follow_each_other_as_batches_do():
    batches = sampler(N, Q, 10, seed=4)
    assert poisson_faults([batch for _ in range(DRAWS // 10) for batch in batches], N, Q) == []


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)], ids=["equal", "different"])
def test_the_union_of_ranks_is_a_poisson_sample(seeds):
    ranks = [list(sampler(N, Q, DRAWS, seed, rank=rank, world_size=3)) for rank, seed in enumerate(seeds)]
    for rank, batches in enumerate(ranks):
        assert all(index % 3 == rank for batch in batches for index in batch)
    union = [sorted(itertools.chain(*batches)) for batches in zip(*ranks, strict=True)]
    assert poisson_faults(union, N, Q) == []
    if len(set(seeds)) == 1:
        assert union == list(sampler(N, Q, DRAWS))


def epochs(data_size, size, drop_last, union=1):
    """Shuffled batches; ``union``: those of that many ranks of torch's DistributedSampler, put together."""
    data, batches = range(data_size), []
    for epoch in range(DRAWS * size // data_size + 2):
        ranks = []
        for rank in range(union):
            order = DistributedSampler(data, union, rank, seed=1, drop_last=drop_last)
            order.set_epoch(epoch)
            ranks.append(list(torch.utils.data.BatchSampler(order, size // union, drop_last)))
        batches += [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    return batches[:DRAWS]


def one_rank_of_two():
    batches = []
    for epoch in range(DRAWS * 5 // 25 + 1):
        order = DistributedSampler(range(50), 2, 0, seed=1)
        order.set_epoch(epoch)
        batches += [sorted(batch) for batch in torch.utils.data.BatchSampler(order, 5, False)]
    return batches[:DRAWS]


def draws(data_size=50, rate=Q, seed=5):
    return list(sampler(data_size, rate, DRAWS, seed))


def fixed_size():
    generator = seeded()
    return [sorted(torch.randperm(50, generator=generator)[:5].tolist()) for _ in range(DRAWS)]


def with_replacement():
    generator = seeded()
    return [sorted(torch.randint(50, (5,), generator=generator).tolist()) for _ in range(DRAWS)]


FAULTY = {  # batches, their data_size, tests that must see it; rates are right, unless the case is a wrong rate
    "shuffled": (lambda: epochs(50, 5, False), 50, {"size", "inclusion", "pairs", "successors"}),
    "shuffled, a smaller last batch": (lambda: epochs(53, 5, False), 53, {"size", "inclusion", "pairs", "successors"}),
    "drop_last": (lambda: epochs(53, 5, True), 53, {"size", "inclusion", "pairs"}),
    "DistributedSampler, two ranks": (lambda: epochs(60, 6, False, 2), 60, {"size", "inclusion", "pairs"}),
    "DistributedSampler, one rank": (one_rank_of_two, 50, {"size", "pairs", "successors"}),
    "of one size": (fixed_size, 50, {"size", "pairs"}),
    "with replacement": (with_replacement, 50, {"indices"}),
    "cut to at most 6": (lambda: [batch[:6] for batch in draws()], 50, {"size", "inclusion"}),
    "without the last example": (lambda: draws(49), 50, {"inclusion"}),
    "a third too seldom at the end": (
        lambda: [[i for i in batch if i < 49 or t % 3] for t, batch in enumerate(draws())],
        50,
        {"inclusion"},
    ),
    "empty batches left out": (lambda: [b for s in (5, 6) for b in draws(20, seed=s) if b][:DRAWS], 20, {"size"}),
    "each batch twice": (lambda: [b for b in draws()[: DRAWS // 2] for _ in "12"], 50, {"successors"}),
    "every second batch as the one before the last": (
        lambda: [b for pair in itertools.pairwise(draws()[: DRAWS // 2 + 1]) for b in pair],
        50,
        {"successors"},
    ),
    "pairs together": (
        lambda: [[i for j in batch for i in (2 * j, 2 * j + 1)] for batch in draws(25)],
        50,
        {"size", "pairs"},
    ),
    "a higher rate": (lambda: draws(rate=Q * 1.05), 50, {"size"}),
}


@pytest.mark.parametrize("case", FAULTY)
def test_the_statistics_reject(case):
    make, data_size, expected = FAULTY[case]
    batches = make()
    rate = Q if data_size in {20, 50} else sum(map(len, batches)) / len(batches) / data_size
    found = {fault.partition(":")[0] for fault in poisson_faults(batches, data_size, rate)}
    assert expected <= found, found


def test_the_statistics_accept_what_python_draws():
    """An oracle of their own, so that they do not only describe this sampler."""
    own = random.Random(0)
    assert poisson_faults([[i for i in range(50) if own.random() < Q] for _ in range(DRAWS)], 50, Q) == []


# ------------------------------------------------------------------------------------------------ sizes and rates


@pytest.mark.parametrize(
    ("data_size", "rate", "expected"), [(0, 0.5, []), (0, 1.0, []), (1, 1.0, [0]), (4, 1, [0, 1, 2, 3])]
)
def test_extreme_sizes_and_rates(data_size, rate, expected):
    assert list(sampler(data_size, rate, 3)) == [expected] * 3


def test_one_example_comes_at_the_rate():
    """5 standard errors: 6e-7."""
    count = sum(map(len, sampler(1, 0.3, 10_000)))
    assert abs(count - 3000) < 5 * (10_000 * 0.3 * 0.7) ** 0.5


def test_a_tiny_rate_gives_no_examples():
    """3e-7 to fail."""
    assert list(sampler(1000, 1e-10, 3)) == [[]] * 3


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 1), (0.9, 1), (0.6, 2), (0.3, 3), (0.01, 100), (256 / 50_000, 195)])
def test_an_iteration_is_about_an_epoch(rate, steps):
    batches = PoissonBatchSampler(10, rate)
    assert batches.steps == len(batches) == len(list(batches)) == steps


def test_what_was_given_can_be_read():
    batches = PoissonBatchSampler(np.int64(7), np.float32(0.5), np.int32(9))
    assert (batches.data_size, batches.sample_rate, batches.steps, batches.pieces) == (7, 0.5, 9, False)
    cut = PhysicalBatches(batches, 3)
    assert (cut.data_size, cut.sample_rate, cut.steps, cut.pieces, cut.size) == (7, 0.5, 9, True, 3)
    assert all(type(value) is int for value in (batches.data_size, batches.steps, cut.size))


def test_large_data_is_drawn_in_chunks(monkeypatch):
    assert 8 * sampling._CHUNK <= 16 << 20  # bytes
    sizes, rand = [], torch.rand

    def noted(size, **kwargs):
        assert kwargs["dtype"] is torch.float64  # a multiple of 2^-53; float32 would round the rate to 2^-24
        sizes.append(size)
        return rand(size, **kwargs)

    monkeypatch.setattr(torch, "rand", noted)
    monkeypatch.setattr(sampling, "_CHUNK", 7)
    assert list(sampler(23, 1.0, 1)) == [list(range(23))]
    assert sizes == [7, 7, 7, 2]
    ranks = [next(iter(sampler(23, 1.0, 1, rank=rank, world_size=3))) for rank in range(3)]
    assert ranks == [list(range(rank, 23, 3)) for rank in range(3)]
    assert poisson_faults(list(sampler(N, Q, DRAWS)), N, Q) == []


def test_more_processes_than_examples():
    ranks = [list(sampler(2, 1.0, 1, rank=rank, world_size=4)) for rank in range(4)]
    assert ranks == [[[0]], [[1]], [[]], [[]]]


# ------------------------------------------------------------------------------------------------ the generator


def fresh(**settings):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return list(PoissonBatchSampler(200, 0.5, 1, **settings))


def test_global_seeds_do_not_tell_the_samples():
    """2^-200 to fail."""
    assert fresh() != fresh()


def test_without_a_generator_of_yours_a_resumed_run_draws_new_batches():
    """Steps after the checkpoint were released: taken again, they are counted as independent samples."""
    sampler = PoissonBatchSampler(200, 0.25)
    sampler.claim()
    batches = iter(sampler)
    sampler.take(len(next(batches)))
    state = sampler.state_dict()
    assert state["generator"] is None
    lost = [next(batches) for _ in range(3)]
    resumed = PoissonBatchSampler(200, 0.25)
    resumed.load_state_dict(state)
    again = list(resumed)
    assert len(again) == 3
    assert all(one != other for one, other in zip(lost, again, strict=True))


def test_all_of_the_state_comes_from_the_operating_system():
    """A seed would give one of 2^32 streams: the state must not be one that a seed leads to."""
    state = PoissonBatchSampler(2, 0.5)._generator.get_state()
    generator = torch.Generator()
    generator.set_state(state)
    for seed in (generator.initial_seed(), int(state[24:28].view(torch.int32).item()) % 2**32):
        assert not torch.equal(state[24:5016], seeded(seed).get_state()[24:5016])


def test_drawing_leaves_global_generators_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(PoissonBatchSampler(10, 0.5, 3))
    list(sampler())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_given_generator_repeats():
    assert list(sampler(seed=3)) == list(sampler(seed=3))
    assert list(sampler(seed=3)) != list(sampler(seed=4))


def test_samplers_of_one_generator_differ_and_do_not_depend_on_its_later_use():
    shared = seeded()
    first, second = (PoissonBatchSampler(100, 0.5, 2, generator=shared) for _ in "12")
    alone = PoissonBatchSampler(100, 0.5, 2, generator=seeded())
    loader = DataLoader(range(100), batch_sampler=first, generator=shared)  # draws from it, too
    assert [batch.tolist() for batch in loader] == list(alone)
    assert list(first) != list(second)


@pytest.mark.parametrize("other", [seeded, sampling.system_generator])
def test_a_given_generator_is_worth_all_its_randomness(other):
    """Not only the 32 bits of a seed: the state is no seed's."""
    given = other()
    state = PoissonBatchSampler(2, 0.5, generator=given).state_dict()["generator"]
    word = int(state[24:28].view(torch.int32).item()) % 2**32
    assert not torch.equal(state[24:5016], seeded(word).get_state()[24:5016])


def test_default_device_and_dtype_change_nothing():
    expected = list(sampler())
    with torch.device("meta"):
        assert list(sampler()) == expected
    with torch.inference_mode():
        batches = sampler(claimed=True)
        first = next(iter(batches))
        state = batches.state_dict()
    assert first == expected[0]
    batches.load_state_dict(state)
    assert list(batches) == expected


# ------------------------------------------------------------------------------------------------ the loader

WORKERS = [
    {"num_workers": 0},
    pytest.param(
        {"num_workers": 2},
        marks=[
            pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
            pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
        ],
        id="2 workers",
    ),
    pytest.param(
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
        marks=[
            pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
            pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
        ],
        id="2 persistent workers",
    ),
]
DATA = TensorDataset(torch.arange(40), torch.arange(40.0).view(20, 2).repeat(2, 1))


def loader_of(batches, **workers):
    return DataLoader(DATA, batch_sampler=batches, collate_fn=EmptyBatches(example=DATA[0]), **workers)


def rows(loader, taken=None, look=True):
    """Indices of its batches, each stepped on by the sampler if one is given."""
    for indices, _ in loader:
        if taken is not None:
            assert not look or taken.due() == len(indices)
            taken.take(len(indices))
        yield indices.tolist()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("rate", [0.2, 0.02], ids=["full", "often empty"])
def test_a_loader_gives_the_batches_in_order(workers, rate):
    claimed = sampler(sample_rate=rate, steps=8, claimed=True)
    loader = loader_of(claimed, **workers)
    expected = sampler(sample_rate=rate, steps=8)
    for _ in range(2):
        assert len(loader) == 8
        assert list(rows(loader, claimed)) == list(expected)
        assert claimed.due() is None


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_that_nobody_stepped_on_come_again(workers):
    """Whatever the workers read ahead: what is trained on does not depend on it."""
    claimed, expected = sampler(claimed=True), list(sampler())
    loader = loader_of(claimed, **workers)
    iterator = rows(loader, claimed)
    assert [next(iterator), next(iterator)] == expected[:2]
    del iterator
    assert next(rows(loader)) == expected[2]
    assert list(rows(loader, claimed))[:3] == expected[2:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_spawned_workers_do_not_need_the_sampler():
    claimed = sampler(claimed=True)
    loader = loader_of(claimed, num_workers=2, multiprocessing_context="spawn")
    assert list(rows(loader, claimed)) == list(sampler())


@pytest.mark.parametrize("other", [{"drop_last": True}, {"shuffle": True}, {"batch_size": 4}, {"sampler": range(3)}])
def test_a_loader_takes_nothing_beside_it(other):
    with pytest.raises(ValueError, match="mutually exclusive"):
        DataLoader(DATA, batch_sampler=sampler(), **other)


def test_a_subset_of_data_with_empty_batches():
    data = Subset(DATA, range(10, 20))
    loader = DataLoader(data, batch_sampler=sampler(10, 0.02, 5), collate_fn=EmptyBatches(example=data[0]))
    sizes = [len(x) for x, _ in loader]
    assert sizes == list(map(len, sampler(10, 0.02, 5)))
    assert 0 in sizes


# ------------------------------------------------------------------------------------------------ accelerate


def test_accelerate_with_one_process():
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader
    for cut in (None, 3):
        claimed = sampler(claimed=True)
        batches = claimed if cut is None else PhysicalBatches(claimed, cut)
        loader = prepare(loader_of(batches), num_processes=1, process_index=0, put_on_device=True, device="cpu")
        if cut is None:
            assert list(rows(loader, claimed)) == list(sampler())
            assert len(loader) == 5
        else:
            assert list(rows(loader)) == list(PhysicalBatches(sampler(), 3))


@pytest.mark.parametrize("rank", [0, 1])
def test_accelerate_with_several_processes_is_noticed(rank):
    """It would give each process every second batch of what is a share already."""
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader
    claimed = sampler(steps=6, claimed=True, rank=rank, world_size=2)
    loader = prepare(loader_of(claimed), num_processes=2, process_index=rank)
    with pytest.raises(StaleGradientError, match=r"accelerate\.prepare with several processes"):
        list(rows(loader, claimed, look=False))


def test_accelerate_skipping_batches_is_noticed():
    skip = pytest.importorskip("accelerate").skip_first_batches
    claimed = sampler(claimed=True)
    indices, _ = next(iter(skip(loader_of(claimed), 2)))
    with pytest.raises(StaleGradientError, match="skip no batch"):
        claimed.take(len(indices))


def test_accelerate_splitting_batches_says_what_is_missing():
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader
    with pytest.raises(ValueError, match="batch_size"):
        prepare(loader_of(sampler()), num_processes=2, process_index=0, split_batches=True)


# ------------------------------------------------------------------------------------------------ the handshake


def test_an_optimizer_takes_the_batches_one_by_one():
    claimed = sampler(claimed=True)
    assert claimed.due() is None
    iterator = iter(claimed)
    first, second = next(iterator), next(iterator)
    assert len(first) != len(second)
    assert claimed.due() == len(first)
    claimed.take(len(first))
    assert claimed.due() == len(second)
    claimed.take(len(second))
    assert claimed.due() is None


def test_a_sampler_belongs_to_one_optimizer():
    claimed = sampler(claimed=True)
    for again in (claimed, PhysicalBatches(claimed, 2)):
        with pytest.raises(ConfigurationError, match="Make one sampler for each optimizer"):
            again.claim()
    through = sampler()
    PhysicalBatches(through, 2).claim()
    with pytest.raises(ConfigurationError, match="another private optimizer"):
        through.claim()


@pytest.mark.parametrize("claimed", [True, False])
def test_a_step_without_a_batch(claimed):
    batches = sampler(claimed=claimed)
    if not claimed:
        next(iter(PhysicalBatches(batches, 1)))  # the rest of the batch is still to come
        assert batches.due() is None
    for examples in (0, 8):
        with pytest.raises(StaleGradientError, match=r"did not come from this .*in private.*DataLoader\(batch_sampler"):
            batches.take(examples)


def test_a_step_too_many():
    claimed = sampler(claimed=True)
    size = len(next(iter(claimed)))
    claimed.take(size)
    with pytest.raises(StaleGradientError, match="did not come from this sampler"):
        claimed.take(size)


def test_batches_out_of_order():
    claimed = sampler(claimed=True)
    iterator = iter(claimed)
    first, second = next(iterator), next(iterator)
    text = rf"drew a batch of {len(first)} examples, the backward saw {len(second)}.*in_order=True.*zero_grad\(\)"
    with pytest.raises(StaleGradientError, match=text):
        claimed.take(len(second))
    claimed.take(len(first))  # nothing was taken by the error
    claimed.take(len(second))


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_batch_with_an_example_less_or_more(wrong):
    claimed = sampler(claimed=True)
    size = len(next(iter(claimed)))
    with pytest.raises(StaleGradientError, match="Do not drop or repeat examples"):
        claimed.take(size + wrong)
    assert claimed.due() == size


def test_an_empty_batch_must_be_stepped_on():
    claimed = sampler(0, claimed=True)
    next(iter(claimed))
    assert claimed.due() == 0
    with pytest.raises(StaleGradientError, match="drew a batch of 0 examples, the backward saw 3"):
        claimed.take(3)
    claimed.take(0)
    assert claimed.due() is None


@pytest.mark.parametrize("cut", [None, 2])
@pytest.mark.parametrize("claimed", [True, False])
def test_of_two_iterations_only_the_newer_is_valid(cut, claimed):
    batches = sampler(claimed=claimed)
    source = batches if cut is None else PhysicalBatches(batches, cut)
    older = iter(source)
    next(older)  # the cut one has pieces left
    newer = iter(source)
    next(newer)
    due = batches.due()
    with pytest.raises(StaleGradientError, match="A newer iteration"):
        next(older)
    assert batches.due() == due
    assert len(batches._pending) <= 1
    assert len(list(newer)) >= 4


def test_an_older_iteration_that_ended_is_over_too():
    """A loader with workers reads ahead to the end, and then hands out what it has."""
    batches = sampler()
    older = iter(batches)
    list(older)
    with pytest.raises(StopIteration):
        next(older)
    iter(batches)
    with pytest.raises(StaleGradientError, match="A newer iteration"):
        next(older)


@pytest.mark.parametrize("workers", WORKERS)
def test_two_iterators_of_a_loader(workers):
    if "persistent_workers" in workers:
        pytest.skip("such a loader has one iterator only")
    claimed = sampler(steps=30, claimed=True)
    loader = loader_of(claimed, **workers)
    older, newer = iter(loader), iter(loader)
    next(newer)
    with pytest.raises(StaleGradientError, match="A newer iteration"):
        next(older)


def test_privatizing_ends_the_iteration_under_way():
    batches = sampler()
    iterator = iter(batches)
    next(iterator)
    batches.claim()
    with pytest.raises(StaleGradientError, match="privatize"):
        next(iterator)
    assert len(list(batches)) == 5


def test_nothing_piles_up():
    for cut in (None, 3):
        batches = sampler(steps=200)
        for _ in batches if cut is None else PhysicalBatches(batches, cut):
            assert len(batches._pending) <= 1
        assert len(batches._pending) == 0
    claimed = sampler(claimed=True)
    for _ in range(20):
        list(claimed)  # without a step
    assert len(claimed._pending) == 5


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(claimed, make):
    batches = sampler(claimed=claimed)
    for refused in (batches, PhysicalBatches(batches, 2), loader_of(batches) if make is not copy.copy else batches):
        if make is copy.copy and isinstance(refused, PhysicalBatches):
            continue  # a view of the same sampler
        with pytest.raises(ConfigurationError, match=r"same samples again.*state_dict\(\)"):
            make(refused)


# ------------------------------------------------------------------------------------------------ pieces


@settings(deadline=None)
@given(
    data_size=st.integers(0, 30),
    rate=st.floats(0.01, 1.0),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    claimed=st.booleans(),
)
def test_pieces_are_the_logical_batches(data_size, rate, size, seed, claimed):
    batches = sampler(data_size, rate, 4, seed, claimed)
    pieces = iter(PhysicalBatches(batches, size))
    for expected in sampler(data_size, rate, 4, seed):
        found = []
        for _ in range(max(1, -(-len(expected) // size))):
            piece = next(pieces)
            assert len(piece) <= size
            assert piece or not expected
            found += piece
            assert not claimed or batches.due() == len(expected)
        assert found == expected
        if claimed:
            batches.take(len(found))
    assert next(pieces, None) is None


def test_the_number_of_pieces_is_not_known():
    cut = PhysicalBatches(sampler(), 3)
    for unknown in (cut, loader_of(cut)):
        with pytest.raises(TypeError, match="Use steps: 5 optimizer steps"):
            len(unknown)
        assert operator.length_hint(unknown, 7) == 7
    assert len(list(loader_of(cut))) == len(list(PhysicalBatches(sampler(), 3)))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_loader_of_pieces(workers):
    claimed = sampler(claimed=True)
    batch = []
    found = []
    for indices, _ in loader_of(PhysicalBatches(claimed, 3), **workers):
        batch += indices.tolist()
        if claimed.due() == len(batch):
            claimed.take(len(batch))
            found.append(batch)
            batch = []
    assert found == list(sampler())


# ------------------------------------------------------------------------------------------------ resuming


def saved(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def ahead(batches, number):
    """As a loader with workers does: reads before it hands out."""
    iterator = iter(batches)
    read = collections.deque(itertools.islice(iterator, number + 1))
    while read:
        yield read.popleft()
        read.extend(itertools.islice(iterator, 1))


def training(batches, number):
    """Trains for ever; read ahead by some batches."""
    while True:
        for batch in ahead(batches, number):
            if batches._claimed:
                batches.take(len(batch))
            yield batch


@pytest.mark.parametrize("stop", range(11))
@pytest.mark.parametrize(("claimed", "number"), [(True, 0), (True, 1), (True, 3), (True, 9), (False, 0)])
def test_resuming_at_every_position(stop, claimed, number, tmp_path):
    whole = list(itertools.islice(training(sampler(claimed=claimed), 0), 15))
    batches = sampler(claimed=claimed)
    before = list(itertools.islice(training(batches, number), stop))
    resumed = sampler(seed=9, claimed=claimed)
    resumed.load_state_dict(saved(batches.state_dict(), tmp_path / "state"))
    assert len(list(iter(resumed))) == 5 - stop % 5  # does not use up what is left, if nobody steps
    resumed.load_state_dict(batches.state_dict())
    after = list(itertools.islice(training(resumed, number), 15 - stop))
    assert before + after == whole


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("stop", [0, 2, 4, 5])
def test_resuming_with_workers(workers, stop):
    def steps(batches):
        loader = loader_of(batches, **workers)
        while True:
            yield from rows(loader, batches)

    whole = list(itertools.islice(steps(sampler(claimed=True)), 10))
    batches = sampler(claimed=True)
    run = steps(batches)
    before = list(itertools.islice(run, stop))
    state = batches.state_dict()
    del run
    resumed = sampler(seed=9, claimed=True)
    resumed.load_state_dict(state)
    assert before + list(itertools.islice(steps(resumed), 10 - stop)) == whole


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("stop", range(12))
def test_resuming_within_a_logical_batch(stop, claimed):
    """The batch under way is drawn again, whole; also in pieces of another size."""
    expected, batches = list(sampler()), sampler(claimed=claimed)
    done, batch = 0, []
    for piece in itertools.islice(PhysicalBatches(batches, 3), stop):
        batch += piece
        if batch == expected[done]:
            done, batch = done + 1, []
            if claimed:
                batches.take(len(expected[done - 1]))
    resumed = sampler(seed=9)
    PhysicalBatches(resumed, 5).load_state_dict(PhysicalBatches(batches, 3).state_dict())
    assert list(resumed) == (expected[done:] if done < 5 else list(batches))


def test_looking_at_a_loader_does_not_use_up_what_is_left():
    batches = sampler(claimed=True)
    list(itertools.islice(training(batches, 2), 3))
    resumed = sampler(claimed=True)
    resumed.load_state_dict(batches.state_dict())
    iter(resumed)
    next(iter(resumed))
    assert list(rows(loader_of(resumed), resumed)) == list(sampler())[3:]
    assert len(list(resumed)) == 5


def test_a_state_is_not_changed_by_what_follows():
    batches = sampler(claimed=True)
    state = batches.state_dict()
    before = state["generator"].clone()
    list(itertools.islice(training(batches, 2), 7))
    assert torch.equal(state["generator"], before)
    assert state["position"] == 0
    batches.load_state_dict(state)
    assert list(batches) == list(sampler())


def test_loading_ends_the_iteration_under_way():
    batches = sampler(claimed=True)
    iterator = iter(batches)
    next(iterator)
    batches.load_state_dict(batches.state_dict())
    assert batches.due() is None
    with pytest.raises(StaleGradientError, match="load_state_dict"):
        next(iterator)


STATES = {  # what is changed in a state, and what the message must name
    "data_size": ({"data_size": 41}, "data_size is 41 there and 40 here.*Make the sampler as it was"),
    "sample_rate": ({"sample_rate": 0.25}, "sample_rate is 0.25 there and 0.2 here"),
    "steps": ({"steps": 6}, "steps is 6 there and 5 here"),
    "rank": ({"rank": 1}, "rank is 1 there and 0 here.*Each rank loads the state of the same rank"),
    "world_size": ({"world_size": 2}, "world_size is 2 there and 1 here"),
    "two": ({"steps": 6, "sample_rate": 0.25}, "sample_rate is .*; steps is"),
    "a float": ({"steps": 5.0}, "steps is 5.0 there"),
    "a text": ({"data_size": "40"}, "data_size is '40' there"),
    "a negative position": ({"position": -1}, "position .* must be an integer >= 0"),
    "a position at the end": ({"position": 5}, "position .* must be less than steps, not 5"),
    "a position that is none": ({"position": None}, "position .* must be an integer"),
    "a short generator": ({"generator": torch.zeros(7, dtype=torch.uint8)}, "generator .* is not the state of"),
    "a generator of floats": ({"generator": torch.zeros(5056)}, "generator .* is not the state of"),
    "a generator that is none": ({"generator": "x"}, "generator .* is not the state of"),
    "a generator without sense": ({"generator": torch.full((5056,), 255, dtype=torch.uint8)}, "generator .* is not"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_of_other_samplers_are_refused(case):
    change, text = STATES[case]
    batches = sampler(claimed=True)
    iterator = iter(batches)
    first = next(iterator)
    with pytest.raises(ConfigurationError, match=text):
        batches.load_state_dict(batches.state_dict() | change)
    assert batches.due() == len(first)  # nothing was changed
    assert [first, *iterator] == list(sampler())


@pytest.mark.parametrize("state", [None, 3, [], {}, {"position": 1}, "state"])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ConfigurationError, match=r"not one of a PoissonBatchSampler: it has no .*generator"):
        sampler().load_state_dict(state)


# ------------------------------------------------------------------------------------------------ empty batches


class Pair(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass(frozen=True)
class Record:
    x: object
    text: object


class Masked(collections.UserDict):
    """A mapping of the kind of BatchEncoding."""


def records(examples):
    return Record(torch.stack([e.x for e in examples]), [e.text for e in examples])


def time_major(examples):
    return torch.stack(examples, 1)


def packed(examples):
    return {"tokens": torch.cat(examples), "scale": torch.tensor(2.0), "name": "packed", "sizes": (3, 4)}


def popping(examples):
    labels = [example.pop("label") for example in examples]
    return {"x": torch.stack([example["x"] for example in examples]), "label": torch.tensor(labels)}


X = torch.ones(3)
COLLATED = {  # example, collate_fn
    "tensor": (X, None),
    "half": (X.half(), None),
    "number": (3, None),
    "float": (0.5, None),
    "text": ("a", None),
    "tuple": ((X, 1), None),
    "nested": (((X, torch.ones(2, 2)), {"y": 1}), None),
    "dict": ({"x": X, "text": "a", "n": {"y": 0.5}}, None),
    "namedtuple": (Pair(X, "a"), None),
    "dataclass": (Record(X, "a"), records),
    "userdict": (Masked(x=X), lambda batch: Masked(default_collate([dict(e) for e in batch]))),
    "proxy": (X, lambda batch: MappingProxyType({"x": torch.stack(batch)})),
    "defaultdict": (X, lambda batch: collections.defaultdict(list, x=torch.stack(batch))),
    "numpy": (np.ones(3), np.stack),
    "numpy to tensor": (np.ones((3, 2), dtype=np.float32), None),
    "examples as they are": ((X, 1), list),
    "takes parts out": ({"x": X, "label": 1}, popping),
    "none": (X, lambda batch: {"x": torch.stack(batch), "mask": None}),
}


def shape_of(value):
    """The structure, with shapes in place of tensors."""
    if isinstance(value, Mapping):
        return type(value), {key: shape_of(child) for key, child in value.items()}
    if dataclasses.is_dataclass(value):
        return type(value), {f.name: shape_of(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return type(value), [shape_of(child) for child in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), value.dtype, tuple(value.shape)
    return value


def without_rows(shape, examples):
    """What `shape_of` gives for no examples, from that of three."""
    if isinstance(shape, tuple) and len(shape) == 2 and isinstance(shape[1], dict):
        return shape[0], {key: without_rows(child, examples) for key, child in shape[1].items()}
    if isinstance(shape, tuple) and len(shape) == 2 and isinstance(shape[1], list):
        plain = all(not isinstance(child, tuple) for child in shape[1])
        return shape[0], [] if plain else [without_rows(child, examples) for child in shape[1]]
    if isinstance(shape, tuple) and len(shape) == 3:
        assert shape[2][0] == examples
        return shape[0], shape[1], (0, *shape[2][1:])
    return shape


@pytest.mark.parametrize("case", COLLATED)
def test_empty_batches_have_the_structure_of_others(case):
    example, collate_fn = COLLATED[case]
    collate = EmptyBatches(collate_fn, example=example)
    three = shape_of((collate_fn or default_collate)([copy.deepcopy(example) for _ in "123"]))
    expected = (list, []) if case == "examples as they are" else without_rows(three, 3)
    assert shape_of(collate([])) == expected
    assert shape_of(collate([copy.deepcopy(example) for _ in "123"])) == three


def test_empty_batches_of_transformers():
    transformers = pytest.importorskip("transformers")

    def collate(examples):
        encoding = {"input_ids": torch.stack([e["input_ids"] for e in examples])}
        return transformers.BatchEncoding(encoding | {"labels": torch.tensor([e["labels"] for e in examples])})

    example = {"input_ids": torch.ones(7, dtype=torch.int64), "labels": 1}
    for empty in (EmptyBatches(collate, example=example)([]), pickled(collate, example)([])):
        assert type(empty) is transformers.BatchEncoding
        assert (empty.input_ids.shape, empty["labels"].shape, empty.input_ids.dtype) == ((0, 7), (0,), torch.int64)
        assert list(empty.to("cpu")) == ["input_ids", "labels"]
    pieces = split_batch(collate([example] * 5), 2)
    assert [type(piece) for piece in pieces] == [transformers.BatchEncoding] * 3
    assert [len(piece.labels) for piece in pieces] == [2, 2, 1]


def pickled(collate, example):
    """Only what can be pickled: the local function is put back by hand."""
    result = EmptyBatches(collate, example=example)
    result.collate_fn = None
    result = pickle.loads(pickle.dumps(result))
    result.collate_fn = collate
    return result


def test_empty_batches_along_other_axes_and_with_constants():
    assert EmptyBatches(time_major, example=torch.ones(5, 2))([]).shape == (5, 0, 2)
    assert EmptyBatches(time_major, example=torch.ones(1, 2))([]).shape == (1, 0, 2)
    empty = EmptyBatches(packed, example=torch.arange(4))([])
    assert empty["tokens"].shape == (0,)
    assert empty["tokens"].dtype == torch.int64
    assert (empty["scale"], empty["name"], empty["sizes"]) == (2.0, "packed", (3, 4))


def test_empty_batches_can_be_pickled_and_keep_no_example():
    secret = torch.full((50,), 0.7310586)
    data = pickle.dumps(EmptyBatches(example=(secret, "a secret")))
    assert secret.numpy().tobytes()[:16] not in data
    assert b"a secret" not in data
    assert shape_of(pickle.loads(data)([])) == (list, [(torch.Tensor, torch.float32, (0, 50)), (tuple, [])])


def test_empty_batches_are_new_each_time():
    collate = EmptyBatches(example={"x": X})
    collate([])["x"] = 3
    collate([])["y"] = 3
    assert shape_of(collate([])) == (dict, {"x": (torch.Tensor, torch.float32, (0, 3))})


def test_an_empty_batch_goes_through_a_model():
    collate = EmptyBatches(example=(X, 1))
    x, y = collate([])
    loss = nn.functional.cross_entropy(nn.Linear(3, 4)(x), y, reduction="sum")
    assert loss == 0


def lengths(examples):
    return {"x": torch.cat(examples), "ends": torch.tensor([0, *itertools.accumulate(map(len, examples))])}


def counting(examples):
    return {"x": torch.stack(examples), "sizes": torch.tensor([len(examples)] * 3)}


UNCLEAR = {  # collate_fn, example, what the message names
    "one row more": (lengths, X, r"batch\['ends'\].*shape \[2\] for one example and shape \[3\] for two"),
    "values": (counting, X, r"batch\['sizes'\].*Let collate_fn itself handle"),
    "a number": (lambda batch: {"x": torch.stack(batch), "n": len(batch)}, X, r"batch\['n'\]"),
    "packed sequence": (nn.utils.rnn.pack_sequence, X, r"batch\.batch_sizes"),
    "kinds": (lambda batch: {1: batch[0], 2: batch}[len(batch)], X, r"batch is.*failed: IndexError"),
    "keys": (lambda batch: {str(len(batch)): torch.stack(batch)}, X, "batch is"),
    "pairs": (lambda batch: torch.stack(batch) @ torch.stack(batch).T, X, r"shape \[1, 1\]"),
    "axes": (lambda batch: torch.ones([2] * len(batch or 0)), X, r"shape \[2\] for one"),
    "fails": (None, object(), "collate_fn failed for 1 x the given example.*TypeError"),
    "fails for two": (lambda batch: torch.ones(1 // (2 - len(batch))), X, "failed for 2 x.*ZeroDivisionError"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_structures_without_an_empty_batch(case):
    collate_fn, example, text = UNCLEAR[case]
    with pytest.raises(ConfigurationError, match=text):
        EmptyBatches(collate_fn, example=example)


def test_what_has_no_such_structure_is_collated_by_the_function_itself():
    """As the error says that it should be; the same function is a batch's, of packed sequences and of pairs."""

    def packed_or_none(batch):
        return {"x": nn.utils.rnn.pack_sequence(batch) if batch else None, "n": torch.tensor(len(batch)).view(1)}

    collate = EmptyBatches(packed_or_none, example=X)
    assert collate([]) == {"x": None, "n": torch.zeros(1)}
    assert collate([X, X])["x"].batch_sizes.tolist() == [2] * len(X)
    collate([])["n"] += 1
    assert collate([])["n"] == 0
    assert EmptyBatches(lambda batch: torch.ones(len(batch), len(batch)), example=X)([]).shape == (0, 0)


# ------------------------------------------------------------------------------------------------ cutting a batch


def batch_of(n):
    x = torch.arange(n * 2.0).view(n, 2)
    return {
        "x": x,
        "pair": Pair(x + 1, [str(i) for i in range(n)]),
        "record": Record(x.numpy(), tuple(range(n))),
        "nested": (x, {"y": x[:, 0]}),
        "scale": torch.tensor(2.0),
        "name": "batch",
        "none": None,
    }


def joined(values):
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values).tolist() if first.ndim else first.item()
    if isinstance(first, np.ndarray):
        return np.concatenate(values).tolist()
    if isinstance(first, Mapping):
        return {key: joined([value[key] for value in values]) for key in first}
    if dataclasses.is_dataclass(first):
        return {f.name: joined([getattr(value, f.name) for value in values]) for f in dataclasses.fields(first)}
    if isinstance(first, (list, tuple)):
        if all(isinstance(child, (str, int)) for child in first):
            return [child for value in values for child in value]
        return [joined(list(children)) for children in zip(*values, strict=True)]
    return first


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 100])
@pytest.mark.parametrize("n", [0, 1, 5, 6])
def test_pieces_of_a_batch(n, size):
    pieces = split_batch(batch_of(n), size)
    assert [len(piece["x"]) for piece in pieces] == ([min(size, n - i) for i in range(0, n, size)] or [0])
    assert joined(pieces) == joined([batch_of(n)])
    kinds = [[type(value) for value in piece.values()] for piece in pieces]
    assert kinds == [[type(value) for value in batch_of(n).values()]] * len(pieces)


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 2),
        [torch.ones(2, 2), torch.ones(2)],
        (torch.ones(2, 2), torch.ones(2)),
        ["a", "b"],
        Masked(x=torch.ones(2)),
    ],
)
def test_batches_as_large_as_their_structure(batch):
    """Two parts, two examples: lists at the top are structure if they hold tensors."""
    pieces = split_batch(batch, 1)
    assert [type(piece) for piece in pieces] == [type(batch)] * 2
    assert len(pieces) == 2


def test_pieces_are_views():
    x = torch.zeros(4)
    split_batch([x], 3)[1][0].fill_(1)
    assert x.tolist() == [0, 0, 0, 1]


CUTS = {
    "rows": ({"x": torch.ones(4), "y": {"z": torch.ones(3)}}, r"batch\['x'\] is for 4 .* batch\['y'\]\['z'\] for 3"),
    "texts": ((torch.ones(4), ["a"]), r"batch\[0\] is for 4 examples and batch\[1\] for 1"),
    "boxes": ((torch.ones(2, 3), [{"box": torch.ones(5, 4)}, {"box": torch.ones(1, 4)}]), r"\[1\]\[0\]\['box'\] for 5"),
    "unclear": (
        (torch.ones(2, 3), [torch.ones(2), torch.ones(2)]),
        r"batch\[1\] is a list of 2 parts.*PhysicalBatches",
    ),
    "nothing": ({"n": 3, "scale": torch.tensor(1.0)}, "no tensor, array or list"),
}


@pytest.mark.parametrize("case", CUTS)
def test_batches_that_cannot_be_cut(case):
    batch, text = CUTS[case]
    with pytest.raises(ConfigurationError, match=text):
        split_batch(batch, 1)


# ------------------------------------------------------------------------------------------------ arguments

ARGUMENTS = [
    (lambda: PoissonBatchSampler(-1, 0.1), "data_size must be an integer >= 0, not -1"),
    (lambda: PoissonBatchSampler(2.0, 0.1), "data_size must be an integer >= 0, not 2.0"),
    (lambda: PoissonBatchSampler(True, 0.1), "data_size must be an integer"),
    (lambda: PoissonBatchSampler(DATA, 0.1), "data_size .* not a TensorDataset. Give the length of the data set"),
    (lambda: PoissonBatchSampler(10, 0), "sample_rate .*0 < sample_rate <= 1, not 0;.*expected size"),
    (lambda: PoissonBatchSampler(10, -0.1), "sample_rate .*not -0.1"),
    (lambda: PoissonBatchSampler(10, 1.01), "sample_rate .*not 1.01"),
    (lambda: PoissonBatchSampler(10, 32), "sample_rate .*not 32;.*expected size of a batch divided by the size"),
    (lambda: PoissonBatchSampler(10, float("nan")), "sample_rate .*not nan"),
    (lambda: PoissonBatchSampler(10, float("inf")), "sample_rate .*not inf"),
    (lambda: PoissonBatchSampler(10, True), "sample_rate .*not True"),
    (lambda: PoissonBatchSampler(10, "0.1"), "sample_rate .*not '0.1'"),
    (lambda: PoissonBatchSampler(10, None), "sample_rate .*not None"),
    (lambda: PoissonBatchSampler(10, 5e-324), "steps must be given"),
    (lambda: PoissonBatchSampler(10, 0.1, 0), "steps must be an integer >= 1, not 0"),
    (lambda: PoissonBatchSampler(10, 0.1, -3), "steps must be an integer >= 1, not -3"),
    (lambda: PoissonBatchSampler(10, 0.1, 2.5), "steps must be an integer >= 1, not 2.5"),
    (lambda: PoissonBatchSampler(10, 0.1, generator=0), "generator must be a torch.Generator or None, not 0"),
    (lambda: PoissonBatchSampler(10, 0.1, generator=Elsewhere()), "generator must be on the CPU.*not on meta"),
    (lambda: PoissonBatchSampler(10, 0.1, rank=0), "rank and world_size must be given together"),
    (lambda: PoissonBatchSampler(10, 0.1, world_size=2), "rank and world_size must be given together"),
    (lambda: PoissonBatchSampler(10, 0.1, rank=2, world_size=2), "rank must be less than world_size, not 2 of 2"),
    (lambda: PoissonBatchSampler(10, 0.1, rank=-1, world_size=2), "rank must be an integer >= 0"),
    (lambda: PoissonBatchSampler(10, 0.1, rank=0, world_size=0), "world_size must be an integer >= 1"),
    (lambda: PhysicalBatches(sampler(), 0), "size must be an integer >= 1, not 0"),
    (lambda: PhysicalBatches(sampler(), 2.0), "size must be an integer >= 1, not 2.0"),
    (lambda: PhysicalBatches(range(3), 2), "sampler must be a PoissonBatchSampler, not range"),
    (lambda: PhysicalBatches(PhysicalBatches(sampler(), 4), 2), "sampler must be a PoissonBatchSampler"),
    (lambda: EmptyBatches(3, example=X), "collate_fn must be callable or None, not 3"),
    (lambda: split_batch(torch.ones(3), 0), "size must be an integer >= 1, not 0"),
    (lambda: split_batch(torch.ones(3), None), "size must be an integer >= 1, not None"),
]


class Elsewhere(torch.Generator):
    """As if on a GPU."""

    device = torch.device("meta")


@pytest.mark.parametrize(("make", "text"), ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_without_meaning(make, text):
    with pytest.raises(ConfigurationError, match=text):
        make()


def test_ranks_of_torch_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    batches = sampler(9, 1.0, 1)
    assert (batches.rank, batches.world_size, list(batches)) == (2, 3, [[2, 5, 8]])
    assert list(sampler(9, 1.0, 1, rank=0, world_size=1)) == [list(range(9))]
