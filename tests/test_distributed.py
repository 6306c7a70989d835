"""Several processes: sums that are the same everywhere, noise once, and errors that reach all instead of a hang."""

import math

import pytest
import torch
from distributed_workers import (
    SHARDS,
    WRAPS,
    Pool,
    agreement,
    all_fields,
    equal_generators,
    failing_together,
    identity,
    mixed_totals,
    noise_alone,
    noisy_totals,
    one_leaves,
    out_of_step,
    same_tensors,
    sampled,
    totals,
    trained,
    two_groups,
    unequal_sums,
    unsupported,
    wrong_steps,
)
from naive import assert_bitwise, assert_same

from perexample.privacy import Processes

SIZES = [2, 3]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = Pool(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.stop()


def assert_errors(found, kind, *texts):
    """The same error in every process."""
    assert len(set(found)) == 1, found
    assert found[0][0] == kind, found
    for text in texts:
        assert text in found[0][1], found


# ---------------------------------------------------------------------------------------------------------- Processes


def test_alone():
    processes = Processes()
    assert (processes.rank, processes.size) == (0, 1)
    processes.agree(x=1.0)
    processes.agree_on({"weight": torch.ones(2)})
    with pytest.raises(ZeroDivisionError), processes.together():
        _ = 1 // 0
    mine = torch.ones(2)
    (total,) = processes.total([mine], lambda t: t.double() + 2.0)
    assert torch.equal(total, torch.full((2,), 3.0, dtype=torch.float64))
    assert torch.equal(mine, torch.ones(2))
    assert processes.total([], None) == []


@pytest.mark.parametrize("size", SIZES)
def test_rank_and_size(pool, size):
    assert pool.run(identity, size) == [(rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_values_that_differ_are_one_error_in_all_processes(pool, size):
    found = list(zip(*pool.run(agreement, size), strict=True))
    assert_errors(found[0], "ConfigurationError", "noise_multiplier", "1.0 in process 0, 2.0 in process 1")
    assert_errors(found[1], "ConfigurationError", "steps", "missing in process 0, 3.0 in process 1")
    assert_errors(found[2], "ConfigurationError", "tiny", "1.0000000000000002 in process 1")
    assert_errors(found[3], "ConfigurationError", "nan", "0.0 in process 0, nan in process 1")


@pytest.mark.parametrize("size", SIZES)
def test_tensors_that_differ_in_one_bit(pool, size):
    found = list(zip(*pool.run(same_tensors, size), strict=True))
    assert_errors(found[0], "ConfigurationError", "`bias`", f"processes 0 and {size - 1}")
    assert_errors(found[1], "ConfigurationError", "`weight` of shape [2, 2]", "`weight` of shape [2, 3]")
    assert_errors(found[2], "ConfigurationError", "0 and 1 of them")
    assert_errors(found[3], "ConfigurationError", "`zero`")


def test_what_fails_in_one_process_fails_in_all(pool):
    found = pool.run(failing_together, 3)
    assert found[1] == ("KeyError", "'no sum'")
    assert_errors([found[0], found[2]], "PerExampleError", "Process 1 failed", "KeyError: 'no sum'")


@pytest.mark.parametrize("size", SIZES)
def test_processes_that_do_different_things(pool, size):
    assert_errors(pool.run(out_of_step, size), "PerExampleError", "agree in process 0, total in process 1")


def test_a_process_that_is_gone_is_an_error_at_once(pool):
    found = pool.run(one_leaves, 3, timeout=20)
    assert found[0] == ("KeyError", "'own'")
    assert found[2][0] not in ("no error", "left")


@pytest.mark.parametrize("bucket", [None, 5], ids=["one bucket", "small buckets"])
@pytest.mark.parametrize("size", SIZES)
def test_totals_are_right_and_the_same_to_the_last_bit(pool, size, bucket):
    shapes = [(3, 4), (), (0, 2), (7,), (2, 1, 2)]
    found = pool.run(totals, size, shapes, bucket)
    for number, shape in enumerate(shapes):
        wanted = sum(summands[number].double() for summands, _ in found)
        results = [results[number] for _, results in found]
        assert all(t.dtype is torch.float64 and t.shape == torch.Size(shape) for t in results)
        assert all(torch.equal(t, results[0]) for t in results)
        assert torch.allclose(results[0], wanted, rtol=1e-13, atol=0)


def test_sums_that_do_not_fit_each_other(pool):
    found = list(zip(*pool.run(unequal_sums, 2), strict=True))
    assert_errors(found[0], "ConfigurationError", "1 and 2 of them")
    assert_errors(found[1], "ConfigurationError", "[2, 3]", "[2, 4]")
    assert found[2][0] == ("ValueError", "no entropy")
    assert_errors(found[2][1:], "PerExampleError", "Process 0 failed", "no entropy")
    assert_errors(found[3], "no error")


@pytest.mark.parametrize("equal_seeds", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_noise_is_drawn_once(pool, size, equal_seeds):
    """The seeds are fixed; for a random one the bound of 5 standard errors would fail once in 1.7 million times."""
    numbers = 20_000
    found = pool.run(noisy_totals, size, equal_seeds, numbers)
    assert [calls for _, calls in found] == [1] + [0] * (size - 1)
    assert all(torch.equal(noise, found[0][0]) for noise, _ in found)
    assert found[0][0].std().item() == pytest.approx(3.0, rel=5 / math.sqrt(2 * numbers))


@pytest.mark.parametrize("size", SIZES)
def test_totals_of_sums_in_shards(pool, size):
    found = pool.run(mixed_totals, size)
    wanted = [torch.full((5,), float(sum(range(size + 1)))), torch.ones(1, 4), torch.full((2,), size), torch.arange(21)]
    for sums, errors in found:
        assert all(torch.equal(t.flatten(), w.double().flatten()) for t, w in zip(sums, wanted, strict=False))
        assert torch.equal(sums[4], found[0][0][4])
        assert len(sums[4].unique()) == 21
        assert_errors(errors, "ConfigurationError", "draw the same noise")


def test_groups(pool):
    found = pool.run(two_groups, 3)
    assert [one[:3] for one in found] == [[0, 2, 103.0], [1, 2, 103.0], [0, 1, 103.0]]
    assert_errors([one[3] for one in found], "ConfigurationError", "not in the group")


# -------------------------------------------------------------------------------------------------- training together

SIZES_OF_2 = [[[4], [3]], [[0], [5]], [[6], [0]], [[0], [0]], [[2], [2]]]
SIZES_OF_3 = [[[4], [3], [1]], [[0], [5], [2]], [[3], [3], [3]]]
PIECES_OF_2 = [[[2, 3], [4]], [[1], [2, 0, 3]], [[0], [4, 1]]]
EVEN_PIECES_OF_2 = [[[2, 3], [4, 0]], [[1, 0], [2, 3]]]


def assert_as_one_process(pool, size, how, kind, optimizer, sizes):
    """Parameters are the same to the last bit in all processes, and up to rounding those of one process."""
    found = pool.run(trained, size, how, kind, optimizer, sizes)
    wanted = trained("plain", kind, optimizer, sizes)
    for step, state in enumerate(wanted):
        for other in found[1:]:
            assert_bitwise(other[step], found[0][step])
        assert_same(found[0][step], {name: state[name] for name in found[0][step]}, tolerance=1e-11)


@pytest.mark.parametrize("how", WRAPS)
def test_two_processes_train_as_one(pool, how):
    assert_as_one_process(pool, 2, how, "mlp", "sgd", SIZES_OF_2)


@pytest.mark.parametrize("how", WRAPS)
def test_processes_may_cut_their_batches_into_different_numbers_of_pieces(pool, how):
    assert_as_one_process(pool, 2, how, "mlp", "adamw", PIECES_OF_2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("how", ["plain", "ddp", "whole", "layers"])
def test_three_processes_train_as_one(pool, how, optimizer):
    assert_as_one_process(pool, 3, how, "mlp", optimizer, SIZES_OF_3)


@pytest.mark.parametrize("how", SHARDS)
def test_parameters_in_shards(pool, how):
    assert_as_one_process(pool, 2, how, "mlp", "adamw", SIZES_OF_2)


@pytest.mark.parametrize("how", SHARDS)
def test_parameters_in_shards_with_pieces(pool, how):
    assert_as_one_process(pool, 2, how, "mlp", "sgd", EVEN_PIECES_OF_2)


@pytest.mark.parametrize("how", SHARDS)
def test_modules_of_all_kinds_in_shards(pool, how):
    assert_as_one_process(pool, 2, how, "all kinds", "sgd", SIZES_OF_2[:2])


def test_rules_that_read_parameters_late(pool):
    assert_as_one_process(pool, 2, "layers", "late", "sgd", SIZES_OF_2[:2])


def test_other_fields_of_parameters_in_shards(pool):
    pool.run(all_fields, 2)


@pytest.mark.parametrize("how", ["ddp", "layers", "copies"])
def test_poisson_samples_cut_between_processes(pool, how):
    found, (wanted, ledger) = pool.run(sampled, 2, how), sampled("plain")
    for states, written in found:
        assert written == ledger == "Ledger(6 steps of Release(noise_multiplier=0.0, sample_rate=0.05))"
        for state, other, first in zip(states, wanted, found[0][0], strict=True):
            assert_same(state, other, tolerance=1e-11)
            assert_bitwise(state, first)


# -------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("equal_seeds", [True, False])
@pytest.mark.parametrize("how", ["plain", "ddp", "whole", "copies"])
@pytest.mark.parametrize("size", SIZES)
def test_noise_of_a_step(pool, size, how, equal_seeds):
    """40000 numbers, std within 2%, which is 5.7 standard errors: fails once in 5e7 times; correlations once in 1e6."""
    found = pool.run(noise_alone, size, how, equal_seeds, "", 2)
    for other in found[1:]:
        for moved, same in zip(other, found[0], strict=True):
            assert_bitwise(moved, same)
    first, second = (moved["0.weight"] for moved in found[0])
    assert first.std().item() == pytest.approx(1.5, rel=0.02)
    assert second.std().item() == pytest.approx(1.5, rel=0.02)
    assert abs(correlation(first, second)) < 5 / math.sqrt(first.numel())
    parts = first.chunk(size)[:-1]  # of equal size, as shards are
    for a, b in zip(parts, first.chunk(size)[1:], strict=True):
        assert abs(correlation(a[: len(b)], b)) < 5 / math.sqrt(b.numel())


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_a_generator_gives_the_noise_of_one_process(pool):
    wanted = noise_alone("plain", True, "equal", 3)
    for moved in pool.run(noise_alone, 2, "ddp", False, "equal", 3):
        for a, b in zip(moved, wanted, strict=True):
            assert torch.allclose(a["0.weight"], b["0.weight"], rtol=0, atol=1e-13)


def test_equal_generators_for_shards_are_refused(pool):
    for found in zip(*pool.run(equal_generators, 3), strict=True):
        assert_errors(found, "ConfigurationError", "The processes 0 and 1 draw the same noise")
    pool.run(noise_alone, 3, "layers", False, "unequal")


# ------------------------------------------------------------------------------------------------------------- errors


def test_processes_that_step_differently(pool):
    noise, missing, frozen, group, sizes, *fine = zip(*pool.run(wrong_steps, 2), strict=True)
    assert_errors(noise, "ConfigurationError", "noise_multiplier", "1.0 in process 0, 2.0 in process 1")
    assert missing[0][0] == "PerExampleError"
    assert "Process 1 failed" in missing[0][1]
    assert missing[1][0] == "StaleGradientError"
    assert_errors(frozen, "ConfigurationError", "train different parameters")
    assert all(kind == "ConfigurationError" and "group" in text for kind, text in group)
    assert_errors(sizes, "ConfigurationError", "data_size must be the same", "6.0 in process 0, 7.0 in process 1")
    for found in fine:
        assert_errors(found, "no error")


def test_what_is_not_supported_in_shards_is_a_clear_error(pool):
    found = pool.run(unsupported, 2)
    assert found[0] == found[1]
    wanted = {
        "max_memory": ("ConfigurationError", "max_memory"),
        "part": ("UnsupportedModuleError", "the whole has to be extended"),
        "tensor": ("UnsupportedModuleError", "tensor parallelism"),
        "tensor after": ("UnsupportedModuleError", "tensor parallelism"),
        "both": ("UnsupportedModuleError", "tensor parallelism"),
        "one": ("UnsupportedModuleError", "use torch.distributed.fsdp.fully_shard"),
        "one inside": ("UnsupportedModuleError", "use torch.distributed.fsdp.fully_shard"),
        "nested": ("UnsupportedModuleError", "call fully_shard on `0`"),
        "gone": ("UnsupportedModuleError", "resharded"),
        "dropped": ("UnsupportedModuleError", "resharded"),
        "dropped but kept": ("UnsupportedModuleError", "resharded"),
    }
    assert {name: kind for name, (kind, _) in found[0].items()} == {name: kind for name, (kind, _) in wanted.items()}
    for name, (_, text) in wanted.items():
        assert text in found[0][name][1]
