"""AdaptiveClippedGrad: C follows a quantile of the norms, and the step costs what it cost without."""

import copy
import datetime
import math

import naive
import pytest
import torch
import torch.distributed as dist
from naive import assert_bitwise, assert_same, fields, mse, randn
from torch import nn

from perexample import (
    DP_SGD,
    ConfigurationError,
    NonFiniteExampleWarning,
    StaleGradientError,
    extend,
    perex,
    privatize,
)
from perexample.extensions import AdaptiveClippedGrad, ClippedGrad
from perexample.privacy import Processes

ONE = Processes()


def none(std):
    """A draw of noise 0."""
    return 0.0


def lengths(norms, repeats=1, clipping=None):
    """One backward in which the examples' gradients have these norms; returns the clipping and the model."""
    model = extend(nn.Linear(3, 1, bias=False).double())
    model.weight.data.zero_()
    clipping = clipping or AdaptiveClippedGrad(1.0, expected_batch_size=10.0)
    add(model, clipping, norms, repeats)
    return clipping, model


def rows(norms):
    """Inputs whose gradients have these norms, in directions that are not all the same."""
    x = torch.zeros(len(norms), 3, dtype=torch.float64)
    for i, norm in enumerate(norms):
        x[i, i % 3] = norm
    return x


def add(model, clipping, norms, repeats=1):
    with perex(clipping, grad=False, loss_reduction="sum"):
        loss = model(rows(norms)).sum()
        for i in range(repeats):
            loss.backward(retain_graph=i < repeats - 1)


def step(clipping, model, draw=none):
    """What a private optimizer does with the clipping, without noise on the gradients."""
    clipping.consume(list(model.parameters()))
    clipping.after_step(draw, ONE)
    return clipping.max_norm


# ------------------------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize(
    ("norms", "size", "share"),
    [
        ([0.5, 0.9, 1.1, 3.0], 4.0, 0.5),
        ([0.5, 0.9, 1.0, 3.0], 4.0, 0.75),  # at most C, not less
        ([2.0, 2.0, 2.0, 2.0], 4.0, 0.0),
        ([0.0, 0.1, 0.2, 0.3], 4.0, 1.0),
        ([0.5, 0.9, 1.1], 4.0, 0.5 + 0.5 / 4),  # the divisor is the expected size, and centred before
        ([2.0] * 6, 4.0, 0.5 - 3 / 4),
        ([], 4.0, 0.5),
    ],
)
@pytest.mark.parametrize(("rate", "quantile"), [(0.2, 0.5), (1.0, 0.9), (0.05, 0.1)])
def test_the_update_by_hand(norms, size, share, rate, quantile):
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=size, learning_rate=rate, quantile=quantile)
    clipping, model = lengths(norms, clipping=clipping)
    moved = step(clipping, model)
    assert clipping.share == pytest.approx(share, rel=1e-14)
    assert moved == pytest.approx(math.exp(-rate * (share - quantile)), rel=1e-14)
    assert clipping.sensitivity() == moved


@pytest.mark.parametrize("noise", [3.0, -0.7, 0.0])
def test_noise_enters_the_count(noise):
    asked = []

    def draw(std):
        asked.append(std)
        return noise

    clipping = AdaptiveClippedGrad(2.0, expected_batch_size=10.0, count_noise=1.5)
    clipping, model = lengths([1.0, 1.0, 3.0], clipping=clipping)
    step(clipping, model, draw)
    assert asked == [1.5]
    assert clipping.share == pytest.approx(0.5 + (0.5 + noise) / 10)
    assert clipping.max_norm == pytest.approx(2.0 * math.exp(-0.2 * (0.5 + noise) / 10))


def test_the_count_starts_anew_after_a_step():
    clipping, model = lengths([0.5] * 7)
    first = step(clipping, model)
    add(model, clipping, [0.5] * 3)
    assert step(clipping, model) == pytest.approx(first * math.exp(-0.2 * 0.15))
    assert clipping.share == pytest.approx(0.5 + 1.5 / 10)


def test_the_new_bound_is_used_and_the_old_one_until_then():
    clipping, model = lengths([5.0, 0.1])
    assert model.weight.clipped_sum.tolist() == [[1.0, 0.1, 0.0]]
    step(clipping, model, lambda std: 20.0)
    bound = clipping.max_norm
    assert bound < 0.9
    add(model, clipping, [5.0])
    torch.testing.assert_close(model.weight.clipped_sum, torch.tensor([[bound, 0.0, 0.0]]).double())
    assert clipping.sensitivity() == bound
    add(model, clipping, [0.8])
    step(clipping, model)
    assert clipping.share == 0.5 - 1 / 10  # 0.8 was below the first C, and is above this one


@pytest.mark.parametrize("clip", ["flat", "automatic", "global", lambda norms: 0.3 / (1 + norms)])
def test_clip_functions_are_those_of_clipped_grad(clip):
    model, fixed = extend(naive.mlp()), ClippedGrad(0.7, clip=clip)
    clipping = AdaptiveClippedGrad(0.7, expected_batch_size=6, clip=clip)
    for one in (fixed, clipping):
        with perex(one, grad=False):
            mse(model, *naive.batch()).backward()
        if one is fixed:
            wanted = fields(model, "clipped_sum")
            for p in model.parameters():
                del p.clipped_sum
    assert_bitwise(fields(model, "clipped_sum"), wanted)
    assert clipping.sensitivity() == fixed.sensitivity() == 0.7


BOUNDS = {
    "least": ((0.9, 2.0), 100.0, 0.9),
    "largest": ((0.5, 1.2), -100.0, 1.2),
    "far-below": ((1e-3, 2.0), 1e9, 1e-3),
    "far-above": ((1e-3, 1e3), -1e9, 1e3),
    "fixed": ((1.0, 1.0), 3.0, 1.0),
}


@pytest.mark.parametrize(("bounds", "noise", "wanted"), BOUNDS.values(), ids=BOUNDS)
def test_bounds_hold(bounds, noise, wanted):
    clipping, model = lengths([0.5], clipping=AdaptiveClippedGrad(1.0, expected_batch_size=10, bounds=bounds))
    assert step(clipping, model, lambda std: noise) == wanted
    assert clipping.sensitivity() == wanted


@pytest.mark.parametrize(("norm", "wanted"), [(0.0, 1e-10), (1e30, 1e10)])
def test_by_default_c_stays_a_number(norm, wanted):
    """With gradients that are all zero, or never below C."""
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=2, learning_rate=10.0)
    clipping, model = lengths([norm] * 2, clipping=clipping)
    for _ in range(20):
        step(clipping, model)
        add(model, clipping, [norm] * 2)
    assert clipping.max_norm == wanted


# --------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(("start", "quantile"), [(1e-3, 0.5), (1e3, 0.5), (1e3, 0.2), (1e-3, 0.8)])
def test_the_quantile_of_a_stationary_set_is_found(start, quantile):
    """Through the private optimizer, with its noise: a standard deviation of 0.05 on the share.

    The share falls by 0.28 or more for each unit of log C around these quantiles of log-normal norms of scale 1, so
    that the mean of log C over 150 steps has a standard error of 0.05 / 0.28 / 150^0.5 = 0.015. The tolerance is 5 of
    them, exceeded with a probability of 6e-7 if the seed were not fixed.
    """
    norms = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    x = rows(norms.tolist())
    model = extend(nn.Linear(3, 1, bias=False).double())
    clipping = AdaptiveClippedGrad(start, expected_batch_size=200, quantile=quantile)
    optimizer = DP_SGD(
        model.parameters(), lr=0.0, clipping=clipping, noise_multiplier=1.0, expected_batch_size=200,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    found = []
    for _ in range(300):
        optimizer.zero_grad()
        with perex(clipping, grad=False, loss_reduction="sum"):
            model(x).sum().backward()
        optimizer.step()
        found.append(math.log(clipping.max_norm))
    assert abs(sum(found[-150:]) / 150 - math.log(norms.quantile(quantile).item())) < 0.075


def test_without_noise_c_ends_between_the_middle_norms():
    clipping, model = lengths([1.0, 2.0, 3.0, 4.0], clipping=AdaptiveClippedGrad(100.0, expected_batch_size=4))
    for _ in range(100):
        step(clipping, model)
        add(model, clipping, [1.0, 2.0, 3.0, 4.0])
    assert 2.0 <= clipping.max_norm < 3.0


# -------------------------------------------------------------------------------------------------------------- share


@pytest.mark.parametrize("z", [1e-6, 0.3, 1.0, 4.0, 9.9, 9.999999])
@pytest.mark.parametrize("count_noise", [5.0, 17.0, 1e9, 1e200])
def test_accounting_identity(z, count_noise):
    """1/z^2 = 1/z_gradients^2 + 1/(2 sigma)^2: gradients and count together cost as much as z alone."""
    share = AdaptiveClippedGrad(1.0, expected_batch_size=100, count_noise=count_noise).noise_share(z)
    assert share >= z
    assert math.hypot(1 / share, 1 / (2 * count_noise)) == pytest.approx(1 / z, rel=1e-14)


def test_the_default_count_noise_is_the_papers():
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=100)
    assert clipping.count_noise == 5.0
    assert clipping.noise_share(1.0) == pytest.approx((1 - 0.01) ** -0.5, rel=1e-15)
    assert clipping.noise_share(0.0) == 0.0


@pytest.mark.parametrize("z", [2.4, 2.4000001, 100.0])
def test_too_little_count_noise_names_the_numbers(z):
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=24)
    text = rf"count_noise=1\.2\): .* noise_multiplier {z:g} .* greater than half of it, {z / 2:g}; .* larger batches"
    with pytest.raises(ConfigurationError, match=text):
        clipping.noise_share(z)
    model = extend(nn.Linear(2, 1))
    with pytest.raises(ConfigurationError, match=r"count_noise=1\.2"):
        DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=z, expected_batch_size=24)


def test_just_enough_count_noise_is_enough():
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=24)
    z = math.nextafter(2.4, 0)
    assert 1e6 < clipping.noise_share(z) < math.inf


def test_a_noise_multiplier_that_grows_too_large_stops_the_step_before_anything_is_used():
    model, clipping = extend(naive.mlp()), AdaptiveClippedGrad(1.0, expected_batch_size=24)
    optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=1.0, expected_batch_size=24)
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    optimizer.param_groups[0]["noise_multiplier"] = 3.0
    with pytest.raises(ConfigurationError, match=r"count_noise=1\.2"):
        optimizer.step()
    assert optimizer.ledger.steps == 0
    assert clipping.max_norm == 1.0
    optimizer.param_groups[0]["noise_multiplier"] = 1.0
    optimizer.step()
    assert clipping.max_norm != 1.0


# -------------------------------------------------------------------------------------------------------- sensitivity


def release(norms, z, repeats=1, pieces=1, bound=1.0):
    """What a step releases, in units of its noise: the sums and the count, as one vector."""
    clipping = AdaptiveClippedGrad(bound, expected_batch_size=10.0)
    model = extend(nn.Linear(3, 1, bias=False).double())
    model.weight.data.zero_()
    for part in torch.arange(len(norms)).chunk(pieces) if norms else [[]]:
        add(model, clipping, [norms[i] for i in part], repeats)
    std = clipping.noise_share(z) * clipping.sensitivity()
    count_std = []
    sums = clipping.consume([model.weight])[0].flatten() / std
    clipping.after_step(lambda std: count_std.append(std) or 0.0, ONE)
    count = (clipping.share - 0.5) * repeats * 10.0 / count_std[0]
    return torch.cat([sums, torch.tensor([count]).double()])


VALUES = [0.0, 1e-300, 0.3, 1.0, math.nextafter(1.0, 2), 7.0, 1e200, math.inf, math.nan]


@pytest.mark.filterwarnings("ignore::perexample.NonFiniteExampleWarning")
@pytest.mark.parametrize("z", [0.2, 0.7, 0.99])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("bound", [1.0, 1e-3])
def test_neighbours_differ_by_at_most_the_accounted_sensitivity(z, repeats, bound):
    """Add or remove any one example: the joint release moves by at most 1/z, and by exactly that at worst.

    The examples' gradients are along axes, so that an example of norm C is the worst case by construction.
    """
    others = [0.5, 2.0, 3.0, 0.1]
    whole = release(others, z, repeats, bound=bound)
    worst = 0.0
    for value in [v * bound for v in VALUES]:
        for place in (0, 4):
            more = [*others[:place], value, *others[place:]]
            for pieces in (1, 2):
                difference = release(more, z, repeats, pieces, bound) - rotated(others, place, z, repeats, bound)
                worst = max(worst, difference.norm().item())
    assert whole.isfinite().all()
    assert worst <= (1 + 1e-12) / z
    assert worst >= (1 - 1e-12) / z


def rotated(others, place, z, repeats, bound):
    """The release without the example, the others in the directions that they have beside it."""
    zero = [*others[:place], 0.0, *others[place:]]
    without = release(zero, z, repeats, bound=bound)
    without[3] -= 0.5 / (10.0 / 20)  # the example of norm 0 is below C, and is counted
    return without


def test_replacing_an_example_moves_at_most_twice_as_much():
    z = 0.7
    for a in (0.0, 1.0, 5.0):
        for b in (-1.0, 0.3, 8.0):
            difference = release([0.5, a], z) - release([0.5, b], z)
            assert difference.norm() <= 2 * (1 + 1e-12) / z


def test_the_optimizer_adds_the_noise_that_is_left():
    """1e5 draws: the gradients get z_gradients C, 5% more than z C here, with a standard error of 0.2%."""
    model = extend(nn.Linear(320, 320, bias=False).double())
    clipping = AdaptiveClippedGrad(3.0, expected_batch_size=10.0, count_noise=1.6)
    optimizer = DP_SGD(
        model.parameters(), lr=0.0, clipping=clipping, noise_multiplier=1.0, expected_batch_size=10.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with perex(clipping, grad=False):
        model(randn(0, 320)).square().mean().backward()
    optimizer.step()
    left = (1 - 1 / 3.2**2) ** -0.5
    assert 10 * model.weight.grad.std().item() / 3.0 == pytest.approx(left, rel=0.01)
    assert left > 1.05
    assert [release.noise_multiplier for release, _ in optimizer.ledger.runs] == [1.0]
    source = torch.Generator().manual_seed(0)
    torch.randn(320, 320, generator=source, dtype=torch.float64)
    after = torch.randn((), generator=source, dtype=torch.float64).item()
    assert clipping.share == pytest.approx(0.5 + 1.6 * after / 10, rel=1e-14)


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("pieces", [1, 2, 3, 7])
def test_accumulation_equals_one_batch(pieces):
    x, y = naive.batch(14)
    found = []
    for count in (1, pieces):
        model = extend(naive.mlp())
        norms = naive.norms(naive.rows(model, mse, x, y))
        bound = norms.quantile(0.4).item()
        clipping = AdaptiveClippedGrad(bound, expected_batch_size=14)
        optimizer = DP_SGD(
            model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=0.6, expected_batch_size=14,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        for part in torch.arange(14).chunk(count):
            with perex(clipping, grad=False):
                mse(model, x[part], y[part]).backward()
            assert clipping.max_norm == bound
        assert 0 < (norms <= bound).sum() < 14
        optimizer.step()
        found.append((clipping.max_norm, {name: p.detach() for name, p in model.named_parameters()}))
    assert found[0][0] == found[1][0] != bound
    assert_same(found[0][1], found[1][1], 1e-12)


@pytest.mark.parametrize("scope", ["clipping", "optimizer", "parameters"])
def test_zero_grad_forgets_the_count(scope):
    clipping, model = lengths([0.5] * 9)
    optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=0.0, expected_batch_size=10.0)
    if scope == "optimizer":
        optimizer.zero_grad()
    else:
        clipping.zero_grad(*([list(model.parameters())] if scope == "parameters" else []))
    add(model, clipping, [5.0] * 2)
    step(clipping, model)
    assert clipping.share == 0.5 - 1 / 10


def test_zero_grad_of_a_part_keeps_the_count_and_the_rest_cannot_be_mixed():
    model, clipping = extend(naive.mlp()), AdaptiveClippedGrad(1.0, expected_batch_size=10)
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    clipping.zero_grad([model[0].weight])
    with pytest.raises(StaleGradientError), perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()


def test_fields_that_are_gone_begin_a_new_count():
    clipping, model = lengths([0.5] * 9)
    del model.weight.clipped_sum
    add(model, clipping, [5.0] * 2)
    step(clipping, model)
    assert clipping.share == 0.5 - 1 / 10


def test_a_backward_that_fails_counts_nothing():
    clipping, model = lengths([0.5] * 4)

    class Failing(ClippedGrad):
        field = "failing"

        def finish(self, views):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), perex(clipping, Failing(1.0), grad=False, loss_reduction="sum"):
        model(rows([0.5] * 5)).sum().backward()
    step(clipping, model)
    assert clipping.share == 0.5 + 2 / 10


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_several_backwards_through_one_forward(repeats):
    """An example is counted as often as its gradient is added, and noise of count and sums grows alike."""
    asked = []
    clipping, model = lengths([0.5, 0.5, 0.5, 5.0], repeats)
    assert clipping.sensitivity() == repeats * 1.0
    step(clipping, model, lambda std: asked.append(std) or 0.3)
    assert asked == [repeats * 0.5]
    assert clipping.share == pytest.approx(0.5 + (1.0 * repeats + 0.3) / (10 * repeats))
    add(model, clipping, [0.5])
    asked.clear()
    step(clipping, model, lambda std: asked.append(std) or 0.0)
    assert asked == [0.5]
    assert clipping.sensitivity() == clipping.max_norm


def test_one_forward_of_several_used_twice():
    """The most often used one decides."""
    asked = []
    clipping, model = lengths([0.5, 0.5], 1)
    add(model, clipping, [5.0], 2)
    step(clipping, model, lambda std: asked.append(std) or 0.0)
    assert asked == [2 * 0.5]
    assert clipping.share == pytest.approx(0.5 + (1.0 - 1.0) / 20)


# ---------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_examples_that_are_not_finite_count_as_longer_than_c(value):
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=10.0)
    with pytest.warns(NonFiniteExampleWarning):
        clipping, model = lengths([0.5, value, 0.5, 0.5], clipping=clipping)
    assert clipping.nonfinite == 1
    assert model.weight.clipped_sum.isfinite().all()
    step(clipping, model)
    assert clipping.share == 0.5 + 1.0 / 10


def test_a_warning_that_is_an_error_leaves_the_count_with_the_sums():
    """filterwarnings=error: the backward is complete when the warning comes."""
    clipping, model = lengths([0.5, 0.5])
    with pytest.raises(NonFiniteExampleWarning):
        add(model, clipping, [math.nan, 0.5, 0.5])
    step(clipping, model)
    assert clipping.share == 0.5 + 1.5 / 10


def test_an_empty_batch_moves_c_by_noise_alone():
    model = extend(naive.mlp())
    clipping = AdaptiveClippedGrad(1.0, expected_batch_size=10)
    optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=0.5, expected_batch_size=10)
    with perex(clipping, grad=False):
        mse(model, *naive.batch(0)).backward()
    optimizer.step()
    assert clipping.share != 0.5
    assert clipping.max_norm != 1.0
    assert optimizer.ledger.steps == 1


def test_memory_can_be_bounded():
    model = extend(naive.mlp())
    grads = naive.rows(model, mse, *naive.batch())
    bound = naive.norms(grads).quantile(0.3).item()
    clipping = AdaptiveClippedGrad(bound, expected_batch_size=6)
    with perex(clipping, grad=False, max_memory=0):
        mse(model, *naive.batch()).backward()
    assert_same(fields(model, "clipped_sum"), naive.clipped(grads, bound))
    step(clipping, model)
    below = (naive.norms(grads) <= bound).sum().item()
    assert 0 < below < 3
    assert clipping.share == pytest.approx(0.5 + (below - 3) / 6)


# -------------------------------------------------------------------------------------------------- optimizers, state


def train(model, optimizer, clipping, steps, start=0):
    bounds = []
    for number in range(start, start + steps):
        optimizer.zero_grad()
        with perex(clipping, grad=False):
            mse(model, *naive.batch(8, seed=number)).backward()
        optimizer.step()
        bounds.append(clipping.max_norm)
    return bounds, {name: p.detach().clone() for name, p in model.named_parameters()}


def adam(model, clipping, source):
    return privatize(
        torch.optim.AdamW(model.parameters(), lr=0.01), clipping=clipping, noise_multiplier=0.5, expected_batch_size=8,
        generator=source,
    )  # fmt: skip


def test_the_bound_travels_in_the_state_of_the_optimizer():
    model, clipping = extend(naive.mlp()), AdaptiveClippedGrad(1.0, expected_batch_size=8)
    noise, other_noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(7)
    optimizer = adam(model, clipping, noise)
    train(model, optimizer, clipping, 4)
    saved, noise_then = copy.deepcopy((model.state_dict(), optimizer.state_dict())), noise.get_state()
    assert saved[1]["privacy"]["clipping"] == {"max_norm": clipping.max_norm}
    wanted = train(model, optimizer, clipping, 4, start=4)

    other, again = extend(naive.mlp(seed=5)), AdaptiveClippedGrad(1.0, expected_batch_size=8)
    optimizer = adam(other, again, other_noise)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    other_noise.set_state(noise_then)  # else it has noise of its own
    assert again.max_norm == again.sensitivity() == saved[1]["privacy"]["clipping"]["max_norm"]
    found = train(other, optimizer, again, 4, start=4)
    assert found[0] == wanted[0]
    assert len(set(found[0])) == 4
    assert_bitwise(found[1], wanted[1])


def test_a_state_forgets_sums_that_were_clipped_to_another_bound():
    clipping, model = lengths([0.5] * 9)
    clipping.load_state_dict({"max_norm": 4.0})
    assert clipping.sensitivity() == 4.0
    with pytest.raises(StaleGradientError):
        clipping.consume([model.weight])
    add(model, clipping, [3.0])
    assert model.weight.clipped_sum.norm() == 3.0
    step(clipping, model)
    assert clipping.share == 0.5 + 0.5 / 10


def test_the_state_round_trip_is_exact():
    clipping, model = lengths([0.5] * 9)
    step(clipping, model, lambda std: 0.123)
    other = AdaptiveClippedGrad(1.0, expected_batch_size=10.0)
    other.load_state_dict(clipping.state_dict())
    assert other.max_norm == other.sensitivity() == clipping.max_norm != 1.0


def test_a_parameter_that_the_optimizer_lacks_is_named():
    """C would change while the sum of this one is waiting."""
    model, clipping = extend(naive.mlp()), AdaptiveClippedGrad(1.0, expected_batch_size=6)
    optimizer = DP_SGD(model[2].parameters(), clipping=clipping, noise_multiplier=0.5, expected_batch_size=6)
    before = copy.deepcopy(model.state_dict())
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    with pytest.raises(StaleGradientError, match=r"The clipped sum of `0\.(weight|bias)` is not for this optimizer"):
        optimizer.step()
    assert_bitwise(model.state_dict(), before)
    assert clipping.max_norm == 1.0
    assert optimizer.ledger.steps == 0
    clipping.zero_grad()
    model[0].requires_grad_(False)
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    optimizer.step()
    assert clipping.max_norm != 1.0


def test_a_parameter_frozen_after_the_backward_is_left_out():
    model, clipping = extend(naive.mlp()), AdaptiveClippedGrad(1.0, expected_batch_size=6)
    optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=0.5, expected_batch_size=6)
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    model[0].bias.requires_grad_(False)
    optimizer.step()
    assert model[0].bias.grad is None


class Two:
    """Stands for two processes: a second one with the same settings and its own count."""

    def __init__(self, other):
        self.other, self.agreed = other, []

    def agree(self, **values):
        self.agreed.append(values)

    def total(self, sums, noised):
        (mine,) = sums
        return [self.other + noised(mine)]


def test_counts_of_several_processes_are_added_and_noise_once():
    clipping, model = lengths([0.5, 0.5, 5.0])
    clipping.consume([model.weight])
    asked, processes = [], Two(other=-1.5)
    clipping.after_step(lambda std: asked.append(std) or 0.25, processes)
    assert clipping.share == pytest.approx(0.5 + (0.5 - 1.5 + 0.25) / 10)
    assert asked == [0.5]
    names = {"max_norm", "quantile", "learning_rate", "count_noise", "expected_batch_size"}
    assert names < processes.agreed[0].keys()


def in_a_process(rank, store, pipes):
    """Three steps on this process's part of the batches, one with nothing for process 1."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", datetime.timedelta(seconds=60), 2, rank)
    model, clipping = extend(naive.mlp()), AdaptiveClippedGrad(20.0, expected_batch_size=12)
    optimizer = adam(model, clipping, torch.Generator().manual_seed(rank))
    found = [step_of(model, optimizer, clipping, *part) for part in parts(rank)]
    pipes[rank].send((found, {name: p.tolist() for name, p in model.named_parameters()}))
    dist.destroy_process_group()


def parts(rank):
    """Batches of 12, cut unevenly; the last one is all for process 0."""
    for seed, cut in enumerate((5, 2, 12)):
        x, y = naive.batch(12, seed=seed)
        yield (x[:cut], y[:cut]) if rank == 0 else (x[cut:], y[cut:])


def step_of(model, optimizer, clipping, x, y):
    optimizer.zero_grad()
    with perex(clipping, grad=False):
        mse(model, x, y).backward()
    optimizer.step()
    return clipping.share, clipping.max_norm


@pytest.mark.slow
def test_two_processes_move_c_as_one_does(tmp_path):
    """Bit by bit the same in both, and what one process alone does with the same noise, to rounding."""
    context = torch.multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    pipes = [there for _, there in pairs]
    workers = [
        context.Process(target=in_a_process, args=(rank, tmp_path / "store", pipes), daemon=True) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        assert all(here.poll(90) for here, _ in pairs)
        (first, parameters), (second, others) = [here.recv() for here, _ in pairs]
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    assert first == second
    assert parameters == others
    model, clipping = extend(naive.mlp()), AdaptiveClippedGrad(20.0, expected_batch_size=12)
    optimizer = adam(model, clipping, torch.Generator().manual_seed(0))
    alone = [step_of(model, optimizer, clipping, *naive.batch(12, seed=seed)) for seed in range(3)]
    assert [share for share, _ in alone] == pytest.approx([share for share, _ in first], rel=1e-9)
    assert [bound for _, bound in alone] == pytest.approx([bound for _, bound in first], rel=1e-9)
    wanted = {name: torch.tensor(p, dtype=torch.float64) for name, p in parameters.items()}
    assert_same({name: p.detach() for name, p in model.named_parameters()}, wanted, 1e-9)


# ------------------------------------------------------------------------------------------------------------- errors

SIZE = {"expected_batch_size": 10}
ERRORS = {
    "max_norm-0": (lambda: AdaptiveClippedGrad(0.0, **SIZE), r"max_norm must be a finite number greater than 0"),
    "max_norm-nan": (lambda: AdaptiveClippedGrad(math.nan, **SIZE), r"max_norm must be .* not nan"),
    "max_norm-mapping": (lambda: AdaptiveClippedGrad({"a": 1.0}, **SIZE), r"max_norm must be .* not \{'a': 1\.0\}"),
    "size-0": (lambda: AdaptiveClippedGrad(1.0, expected_batch_size=0), r"expected_batch_size must be .* not 0"),
    "size-true": (lambda: AdaptiveClippedGrad(1.0, expected_batch_size=True), r"expected_batch_size must .* not True"),
    "size-tensor": (
        lambda: AdaptiveClippedGrad(1.0, expected_batch_size=torch.tensor(4.0)),
        r"expected_batch_size must be a finite number",
    ),
    "quantile-0": (lambda: AdaptiveClippedGrad(1.0, quantile=0, **SIZE), r"quantile must be .* not 0"),
    "quantile-1": (lambda: AdaptiveClippedGrad(1.0, quantile=1, **SIZE), r"quantile must be .* below 1, not 1"),
    "quantile-50": (lambda: AdaptiveClippedGrad(1.0, quantile=50, **SIZE), r"quantile must be .* below 1, not 50"),
    "rate-0": (lambda: AdaptiveClippedGrad(1.0, learning_rate=0, **SIZE), r"learning_rate must be .* not 0"),
    "rate-negative": (lambda: AdaptiveClippedGrad(1.0, learning_rate=-1, **SIZE), r"learning_rate must .* not -1"),
    "noise-0": (lambda: AdaptiveClippedGrad(1.0, count_noise=0, **SIZE), r"count_noise must be .* not 0"),
    "noise-inf": (lambda: AdaptiveClippedGrad(1.0, count_noise=math.inf, **SIZE), r"count_noise must be .* not inf"),
    "bounds-order": (lambda: AdaptiveClippedGrad(1.0, bounds=(2, 1), **SIZE), r"bounds must be the least and the lar"),
    "bounds-one": (lambda: AdaptiveClippedGrad(1.0, bounds=(2,), **SIZE), r"bounds must be two numbers"),
    "bounds-number": (lambda: AdaptiveClippedGrad(1.0, bounds=2.0, **SIZE), r"bounds must be two numbers"),
    "bounds-text": (lambda: AdaptiveClippedGrad(1.0, bounds="12", **SIZE), r"bounds must be two numbers"),
    "bounds-0": (lambda: AdaptiveClippedGrad(1.0, bounds=(0, 2), **SIZE), r"bounds\[0\] must be .* greater than 0"),
    "bounds-inf": (lambda: AdaptiveClippedGrad(1.0, bounds=(1, math.inf), **SIZE), r"bounds\[1\] must be a finite"),
    "outside": (lambda: AdaptiveClippedGrad(3.0, bounds=(1, 2), **SIZE), r"max_norm is 3, outside of bounds=\(1, 2\)"),
    "groups": (
        lambda: AdaptiveClippedGrad(1.0, groups="per-parameter", **SIZE),
        r"groups must be 'all', not 'per-parameter'; use ClippedGrad",
    ),
    "groups-mapping": (lambda: AdaptiveClippedGrad(1.0, groups={"0": "a"}, **SIZE), r"groups must be 'all'"),
    "clip": (lambda: AdaptiveClippedGrad(1.0, clip="soft", **SIZE), r"clip must be one of"),
    "state-of-another": (
        lambda: AdaptiveClippedGrad(1.0, **SIZE).load_state_dict({}),
        r"holds no 'max_norm' but \[\]; it was saved with another clipping",
    ),
    "state-nan": (
        lambda: AdaptiveClippedGrad(1.0, **SIZE).load_state_dict({"max_norm": math.nan}),
        r"max_norm \(in the state of AdaptiveClippedGrad\) must be a finite number",
    ),
    "state-outside": (
        lambda: AdaptiveClippedGrad(1.0, bounds=(1, 2), **SIZE).load_state_dict({"max_norm": 5.0}),
        r"max_norm \(in the state of AdaptiveClippedGrad\) is 5, outside of bounds=\(1, 2\)",
    ),
}


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS)
def test_arguments_without_meaning(call, text):
    with pytest.raises(ConfigurationError, match=text):
        call()


def test_the_expected_batch_size_has_no_default():
    with pytest.raises(TypeError, match="expected_batch_size"):
        AdaptiveClippedGrad(1.0)


def test_a_state_that_is_refused_changes_nothing():
    clipping, model = lengths([0.5] * 9)
    with pytest.raises(ConfigurationError):
        clipping.load_state_dict({"max_norm": 1e20})
    assert clipping.max_norm == 1.0
    step(clipping, model)
    assert clipping.share == 0.5 + 4.5 / 10
