"""Private optimizers: what they add to an ordinary step, the noise, and the clip functions they stand on."""

import copy
import math
import warnings

import naive
import pytest
import torch
from naive import Lambda, assert_bitwise, assert_same, fields, mse, randn, values
from scipy import stats
from torch import nn

from perexample import (
    DP_SGD,
    ConfigurationError,
    Extension,
    NonFiniteExampleWarning,
    StaleGradientError,
    extend,
    perex,
    privatize,
)
from perexample.extension import Weights
from perexample.extensions import Automatic, BatchGrad, Clip, ClippedGrad, Flat, Global
from perexample.extensions.clip import bounded

NORMS = torch.tensor([0.0, 1e-300, 1e-30, 0.3, 1.0, 1.7, 1e4, 1e30, 1e300], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def private(model, clipping=None, noise=0.0, size=4.0, params=None, **settings):
    return DP_SGD(
        model.parameters() if params is None else params,
        clipping=clipping or ClippedGrad(1.0),
        noise_multiplier=noise,
        expected_batch_size=size,
        **({"lr": 0.1, "generator": generator()} | settings),
    )


def backward(model, clipping, *batch, **settings):
    with perex(clipping, **({"grad": False} | settings)):
        mse(model, *(batch or naive.batch())).backward()


def train(model, optimizer, clipping, steps=5, scheduler=None, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, clipping, *naive.batch(5, seed=step))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values(model)


def reference(make, steps=5, bound=1.0, size=4.0, schedule=None, groups=None, start=0):
    """An ordinary optimizer on the naive clipped sums divided by the size."""
    model = naive.mlp()
    optimizer = make(model.parameters() if groups is None else groups(model))
    scheduler = None if schedule is None else schedule(optimizer)
    for step in range(start, start + steps):
        sums = naive.clipped(naive.rows(model, mse, *naive.batch(5, seed=step)), bound)
        for name, p in model.named_parameters():
            p.grad = sums[name] / size
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values(model)


# ----------------------------------------------------------------------------------- the step is that of the optimizer

SGD = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight_decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "all": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}


@pytest.mark.parametrize("settings", SGD.values(), ids=SGD)
def test_dp_sgd_is_sgd_on_the_clipped_sum(settings):
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    found = train(model, private(model, clipping, **settings), clipping)
    assert_same(found, reference(lambda params: torch.optim.SGD(params, lr=0.1, **settings)))


def by_layer(model):
    return [
        {"params": list(model[0].parameters()), "lr": 0.3},
        {"params": [model[2].weight], "momentum": 0.5},
        {"params": [model[2].bias], "weight_decay": 0.2},
    ]


def test_param_groups_with_settings_of_their_own():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    found = train(model, private(model, clipping, params=by_layer(model)), clipping)
    assert_same(found, reference(lambda groups: torch.optim.SGD(groups, lr=0.1), groups=by_layer))


def test_the_joint_norm_is_that_of_all_groups():
    model, clipping = extend(naive.mlp()), ClippedGrad(1e-3)
    optimizer = private(model, clipping, params=by_layer(model), size=1.0)
    x, y = naive.batch()
    backward(model, clipping, x[:1], y[:1])
    optimizer.step()
    norms = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norms.item() == pytest.approx(1e-3, rel=1e-12)


OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "AdamW-amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "SGD-foreach": lambda params: torch.optim.SGD(params, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_privatize_any_optimizer(make):
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = make(model.parameters())
    kind = type(optimizer)
    private = privatize(optimizer, clipping=clipping, noise_multiplier=0.0, expected_batch_size=4.0)
    assert private is optimizer
    assert type(private) is kind
    assert_same(train(model, optimizer, clipping), reference(make))


SCHEDULES = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "Cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=8, cycle_momentum=False),
    "Lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_learning_rate_schedules_are_obeyed(schedule):
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = private(model, clipping)
    found = train(model, optimizer, clipping, scheduler=schedule(optimizer))
    assert_same(found, reference(lambda params: torch.optim.SGD(params, lr=0.1), schedule=schedule))
    constant = reference(lambda params: torch.optim.SGD(params, lr=0.1))
    assert (found["0.weight"] - constant["0.weight"]).norm() > 1e-3


def test_one_cycle_of_the_momentum():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = private(model, clipping, momentum=0.9)

    def schedule(o):
        return torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=8)

    found = train(model, optimizer, clipping, scheduler=schedule(optimizer))
    assert_same(found, reference(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), schedule=schedule))


@pytest.mark.parametrize("kind", ["DP_SGD", "AdamW"])
def test_state_dict_round_trip_continues_identically(kind):
    def build(model, noise_source):
        clipping = ClippedGrad(1.0)
        if kind == "DP_SGD":
            return private(model, clipping, noise=1.0, momentum=0.9, generator=noise_source), clipping
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        settings = {"noise_multiplier": 1.0, "expected_batch_size": 4.0, "generator": noise_source}
        return privatize(optimizer, clipping=clipping, **settings), clipping

    source = generator(3)
    model = extend(naive.mlp())
    optimizer, clipping = build(model, source)
    train(model, optimizer, clipping, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), source.get_state()))
    wanted = train(model, optimizer, clipping, 3, start=3)

    other, source = extend(naive.mlp(seed=9)), generator(8)
    optimizer, clipping = build(other, source)
    other.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    source.set_state(saved[2])
    assert_bitwise(train(other, optimizer, clipping, 3, start=3), wanted)


def test_the_settings_travel_in_the_state_dict():
    model = extend(naive.mlp())
    state = private(model, noise=1.5, size=7.0).state_dict()
    assert [(g["noise_multiplier"], g["expected_batch_size"]) for g in state["param_groups"]] == [(1.5, 7.0)]
    other = private(model, noise=0.5, size=2.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["noise_multiplier"] == 1.5


def test_the_noise_multiplier_can_be_scheduled():
    model, clipping = extend(nn.Linear(100, 100, bias=False).double()), ClippedGrad(1.0)
    optimizer = private(model, clipping, size=1.0, noise=1.0)
    for sigma in (1.0, 3.0, 0.0):
        optimizer.param_groups[0]["noise_multiplier"] = sigma
        optimizer.zero_grad()
        backward(model, clipping, randn(0, 100), randn(0, 100))
        optimizer.step()
        assert model.weight.grad.std().item() == pytest.approx(sigma, rel=0.05)


@pytest.mark.parametrize("bad", ["lr", "momentum"])
def test_errors_of_the_optimizer_itself_stay(bad):
    with pytest.raises(ValueError, match="Invalid"):
        private(naive.mlp(), **{bad: -1.0})


def test_step_returns_none_and_keeps_parameters_dtype():
    model, clipping = extend(naive.mlp(torch.bfloat16)), ClippedGrad(1.0)
    optimizer = private(model, clipping, noise=1.0)
    backward(model, clipping, *naive.batch(4, torch.bfloat16))
    assert optimizer.step() is None
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


# -------------------------------------------------------------------------------------------------------------- noise


def noise_of(model, optimizer, clipping, n=0):
    """The noise of one step on an empty batch: the gradient that it wrote."""
    optimizer.zero_grad()
    with perex(clipping, grad=False):
        model(randn(n, model[0].in_features)).square().mean().backward()
    optimizer.step()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def wide():
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(320, 313, bias=False), nn.Linear(313, 320, bias=False)).double())


@pytest.mark.parametrize(("sigma", "bound", "size"), [(1.0, 1.0, 1.0), (0.7, 3.0, 1.0), (2.5, 0.01, 16.0)])
def test_scale_and_distribution_of_the_noise(sigma, bound, size):
    """1e5 draws: the standard deviation within 1%, normal, and told from noise of 2% more or less."""
    model, clipping = wide(), ClippedGrad(bound)
    draws = noise_of(model, private(model, clipping, noise=sigma, size=size, generator=generator(1)), clipping)
    standard = draws["0.weight"].flatten().numpy() * size / (sigma * bound)
    assert standard.size > 1e5
    assert abs(standard.std() - 1) < 0.01
    assert stats.kstest(standard, "norm").pvalue > 0.01
    for scale in (0.98, 1.02):
        assert stats.kstest(standard * scale, "norm").pvalue < 0.01


def test_noise_is_independent_over_steps_and_parameters():
    model, clipping = wide(), ClippedGrad(1.0)
    optimizer = private(model, clipping, noise=1.0, lr=0.0, generator=None)
    draws = [noise_of(model, optimizer, clipping) for _ in range(3)]
    flat = [g.flatten() for d in draws for g in d.values()]
    for i, a in enumerate(flat):
        for b in flat[:i]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / len(a) ** 0.5
    successive = flat[0]
    assert abs(torch.corrcoef(torch.stack([successive[1:], successive[:-1]]))[0, 1]) < 5 / len(successive) ** 0.5


def test_noise_cannot_be_predicted_from_the_global_seed():
    draws = []
    for _ in range(2):
        model, clipping = wide(), ClippedGrad(1.0)
        optimizer = private(model, clipping, noise=1.0, generator=None)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        draws.append(noise_of(model, optimizer, clipping)["0.weight"])
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(*draws)
    assert abs(torch.corrcoef(torch.stack([d.flatten() for d in draws]))[0, 1]) < 0.02


def test_two_optimizers_draw_different_noise():
    draws = []
    for _ in range(2):
        model, clipping = wide(), ClippedGrad(1.0)
        draws.append(noise_of(model, private(model, clipping, noise=1.0, generator=None), clipping)["0.weight"])
    assert not torch.equal(*draws)


def test_noise_is_repeatable_with_a_generator():
    draws = []
    for _ in range(2):
        model, clipping = wide(), ClippedGrad(1.0)
        optimizer = private(model, clipping, noise=1.0, generator=generator(7))
        draws.append([noise_of(model, optimizer, clipping) for _ in range(2)])
    for a, b in zip(*draws, strict=True):
        assert_bitwise(a, b)
    assert not torch.equal(draws[0][0]["0.weight"], draws[0][1]["0.weight"])


def test_noise_is_drawn_in_float64():
    """float32 normals end at 5.8 standard deviations, and have 2^24 values; a cast of float64 draws has both tails."""
    model, clipping = extend(nn.Linear(64, 64, bias=False)), ClippedGrad(1.0)
    optimizer = private(model, clipping, noise=1.0, size=1.0, lr=0.0, generator=generator(3))
    found = noise_of_float(model, optimizer, clipping)
    wanted = torch.randn(64, 64, generator=generator(3), dtype=torch.float64).float()
    assert torch.equal(found, wanted)


def noise_of_float(model, optimizer, clipping):
    with perex(clipping, grad=False):
        model(torch.zeros(0, 64)).square().mean().backward()
    optimizer.step()
    return model.weight.grad.clone()


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_accumulation_over_backwards(pieces):
    """The sum over micro-batches is the sum over the batch, and there is one noise for both."""
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    x, y = naive.batch(14)
    whole = naive.clipped(naive.rows(model, mse, x, y), 1.0)
    optimizer = private(model, clipping, noise=1.0, size=1.0, generator=generator(5))
    for part in torch.arange(14).chunk(pieces):
        backward(model, clipping, x[part], y[part])
    assert_same(fields(model, "clipped_sum"), whole, 1e-12)
    optimizer.step()
    source = generator(5)
    wanted = {
        name: whole[name] + torch.randn(p.shape, generator=source, dtype=torch.float64)
        for name, p in model.named_parameters()
    }
    assert_same({name: p.grad for name, p in model.named_parameters()}, wanted, 1e-12)


def test_accumulation_with_empty_and_interrupted_parts():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    x, y = naive.batch()
    for part in (slice(0, 0), slice(0, 4), slice(4, 4), slice(4, 6)):
        backward(model, clipping, x[part], y[part])
    assert_same(fields(model, "clipped_sum"), naive.clipped(naive.rows(model, mse, x, y), 1.0), 1e-12)


def test_a_step_on_an_empty_batch_is_noise_alone():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = private(model, clipping, noise=2.0, size=1.0, lr=1.0, generator=generator(5))
    before = values(model)
    backward(model, clipping, *naive.batch(0))
    assert all((s == 0).all() for s in fields(model, "clipped_sum").values())
    optimizer.step()
    source = generator(5)
    noise = {
        name: -2 * torch.randn(p.shape, generator=source, dtype=torch.float64) for name, p in model.named_parameters()
    }
    assert_same({name: p - before[name] for name, p in values(model).items()}, noise, 1e-9)


def test_unreached_parameters_get_noise_of_the_same_scale():
    layers = {"used": nn.Linear(5, 3), "unused": nn.Linear(300, 300, bias=False)}
    model, clipping = extend(Lambda(lambda self, x: self.used(x), **layers).double()), ClippedGrad(1.0)
    optimizer = private(model, clipping, noise=3.0, size=1.0)
    backward(model, clipping)
    optimizer.step()
    assert model.unused.weight.grad.std().item() == pytest.approx(3.0, rel=0.02)


def test_the_noise_is_public_scale_whatever_the_batch():
    """Scale and divisor are the same for an empty batch, a small one, and one of NaN."""
    scales = []
    for n in (0, 3, 6):
        model, clipping = extend(nn.Linear(200, 200, bias=False).double()), ClippedGrad(1e-9)
        optimizer = private(model, clipping, noise=1e9, size=2.0)
        x = randn(n, 200) * (math.nan if n == 6 else 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteExampleWarning)
            with perex(clipping, grad=False):
                model(x).square().mean().backward()
        optimizer.step()
        scales.append(model.weight.grad.std().item())
    assert scales == pytest.approx([scales[0]] * 3, rel=1e-6)
    assert scales[0] == pytest.approx(0.5, rel=0.02)


def test_without_noise_no_number_is_drawn():
    model, clipping, source = extend(naive.mlp()), ClippedGrad(1.0), generator(1)
    optimizer = private(model, clipping, generator=source)
    state = source.get_state()
    backward(model, clipping)
    optimizer.step()
    assert torch.equal(source.get_state(), state)


# ------------------------------------------------------------------------------------------------------------- groups

GROUPS = {
    "all": ("all", lambda name: "all"),
    "per-parameter": ("per-parameter", lambda name: name),
    "per-module": ("per-module", lambda name: name.rpartition(".")[0]),
    "mapping": ({"0": "first", "2": "rest", "2.bias": "first"}, lambda n: "rest" if n == "2.weight" else "first"),
}


@pytest.mark.parametrize(("groups", "group_of"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_groups(groups, group_of, noise):
    """Each group clipped to C by itself; the sensitivity, and with it the noise, is the root of the squares' sum."""
    model, clipping = extend(naive.mlp()), ClippedGrad(0.5, groups=groups)
    backward(model, clipping)
    wanted = naive.rows(model, mse, *naive.batch())
    names = {group_of(name) for name in wanted}
    sums = {}
    for group in names:
        part = {name: g for name, g in wanted.items() if group_of(name) == group}
        sums |= naive.clipped(part, 0.5)
        assert_same({"norms": clipping.group_norms[group]}, {"norms": naive.norms(part)})
    assert_same({name: p.clipped_sum for name, p in model.named_parameters()}, {name: sums[name] for name in wanted})
    assert set(clipping.group_norms) == names
    assert_same({"norms": clipping.norms}, {"norms": naive.norms(wanted)})
    assert clipping.sensitivity() == pytest.approx(0.5 * len(names) ** 0.5)
    optimizer = private(model, clipping, noise=noise, size=1.0, generator=generator(5))
    optimizer.step()
    source, std = generator(5), noise * 0.5 * len(names) ** 0.5
    noisy = {
        name: sums[name] + (std * torch.randn(p.shape, generator=source, dtype=torch.float64) if noise else 0)
        for name, p in model.named_parameters()
    }
    assert_same({name: p.grad for name, p in model.named_parameters()}, noisy)


def test_bounds_by_group():
    model = extend(naive.mlp())
    clipping = ClippedGrad({"first": 0.1, "rest": 2.0}, groups={"0": "first", "2": "rest"})
    backward(model, clipping)
    wanted = naive.rows(model, mse, *naive.batch())
    for prefix, bound in (("0", 0.1), ("2", 2.0)):
        part = {name: g for name, g in wanted.items() if name.startswith(prefix)}
        assert_same({name: model.get_parameter(name).clipped_sum for name in part}, naive.clipped(part, bound))
    assert clipping.sensitivity() == pytest.approx(math.hypot(0.1, 2.0))


def test_a_bound_for_each_group_needs_groups():
    model, clipping = extend(naive.mlp()), ClippedGrad({"all": 0.5})
    backward(model, clipping)
    assert clipping.sensitivity() == 0.5
    assert_same(fields(model, "clipped_sum"), naive.clipped(naive.rows(model, mse, *naive.batch()), 0.5))


def test_parameters_that_take_part_in_some_of_the_accumulated_backwards():
    """Groups that come in or go under way: an error, or a sensitivity that counts all of them."""
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0, groups="per-module")
    model[0].requires_grad_(False)
    backward(model, clipping)
    assert clipping.sensitivity() == 1.0
    model[0].requires_grad_(True)
    with pytest.raises(StaleGradientError, match=r"`0\.\w+` takes part in some of them only.*zero_grad"):
        backward(model, clipping)
    clipping.zero_grad()
    backward(model, clipping)
    assert clipping.sensitivity() == pytest.approx(2**0.5)
    model[2].requires_grad_(False)
    with pytest.raises(StaleGradientError, match=r"`2\.\w+`"):
        backward(model, clipping)
    assert clipping.sensitivity() == pytest.approx(2**0.5)


# ----------------------------------------------------------------------------------------------------- clip functions

CLIPS = {
    "flat": Flat(),
    "automatic": Automatic(),
    "automatic-small": Automatic(1e-9),
    "global": Global(),
    "global-large": Global(100.0),
    "global-small": Global(1e-3),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e3])
def test_bound_of_the_factors(clip, bound):
    factors = clip(NORMS, bound)
    assert factors.shape == NORMS.shape
    assert factors.isfinite().all()
    assert (factors >= 0).all()
    assert (factors * NORMS <= bound * (1 + 1e-12)).all()


def test_factors_by_hand():
    norms = torch.tensor([0.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(Flat()(norms, 1.0), torch.tensor([1, 1, 0.5, 0.25]).double())
    torch.testing.assert_close(Automatic(0.5)(norms, 1.0), 1 / (norms + 0.5))
    torch.testing.assert_close(Global()(norms, 2.0), torch.tensor([1.0, 1, 1, 0]).double())
    torch.testing.assert_close(Global(4.0)(norms, 2.0), torch.tensor([0.5, 0.5, 0.5, 0.5]).double())


CUSTOM = {
    "too-long": lambda norms: torch.full_like(norms, 1e6),
    "negative": lambda norms: -torch.ones_like(norms),
    "square-root": lambda norms: norms.rsqrt(),
    "nan": lambda norms: torch.full_like(norms, math.nan),
    "inf": lambda norms: torch.full_like(norms, math.inf),
    "integers": lambda norms: torch.ones_like(norms).int(),
    "float32": lambda norms: (1 / norms).float(),
}


@pytest.mark.parametrize("clip", [*CLIPS.values(), *CUSTOM.values()], ids=[*CLIPS, *CUSTOM])
@pytest.mark.parametrize("bound", [0.01, 1.0])
def test_no_clip_function_exceeds_the_bound(clip, bound):
    """Through the whole path: the clipped row of a single example is no longer than C."""
    model, (x, y) = extend(naive.mlp()), naive.batch()
    for i in range(6):
        clipping = ClippedGrad(bound, clip=clip)
        backward(model, clipping, x[i : i + 1], y[i : i + 1])
        row = naive.vector(fields(model, "clipped_sum"))
        assert row.isfinite().all()
        assert row.norm() <= bound * (1 + 1e-9)


def test_custom_factors_are_used():
    model = extend(naive.mlp())
    wanted = naive.rows(model, mse, *naive.batch())
    factors = 0.5 / (1 + naive.norms(wanted))
    backward(model, ClippedGrad(1.0, clip=lambda norms: 0.5 / (1 + norms)))
    sums = {name: torch.tensordot(factors, g, dims=1) for name, g in wanted.items()}
    assert_same(fields(model, "clipped_sum"), sums)


def test_own_subclass_of_clip_is_held_to_the_bound_or_trusted_with_it():
    """A `Clip` gets the bound, and is asked for ``factor * norm <= C`` by its contract."""

    class Half(Clip):
        def __call__(self, norms, bound):
            return 0.5 * (bound / norms).clamp_max(1.0)

    model = extend(naive.mlp())
    backward(model, ClippedGrad(1.0, clip=Half()))
    half = {name: 0.5 * s for name, s in naive.clipped(naive.rows(model, mse, *naive.batch()), 1.0).items()}
    assert_same(fields(model, "clipped_sum"), half)


@pytest.mark.parametrize("clip", [*CLIPS.values(), CUSTOM["square-root"], CUSTOM["too-long"]])
def test_zero_gradients(clip):
    """Norm 0: no 0/0."""
    model = extend(nn.Linear(5, 3).double())
    clipping = ClippedGrad(1.0, clip=clip)
    with perex(clipping, grad=False):
        (model(randn(4, 5)) * torch.tensor([1.0, 0, 0, 2]).double().unsqueeze(1)).sum(1).mean().backward()
    assert naive.vector(fields(model, "clipped_sum")).isfinite().all()
    assert clipping.norms[1:3].tolist() == [0, 0]
    with perex(clipping, grad=False):
        (model(randn(4, 5)) * 0).mean().backward()
    assert clipping.norms.tolist() == [0] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_factors_that_are_not_finite_become_zero(value):
    """As far as they are not held to the bound anyway."""
    norms = torch.tensor([0.0, 2.0]).double()
    found = bounded(lambda norms, bound: torch.full_like(norms, value), norms, 1.0)
    assert found.tolist() == [0.0, 0.5 if value == math.inf else 0.0]
    assert bounded(lambda norms, bound: torch.ones_like(norms), -norms[:1], 1.0).tolist() == [0.0]  # of -0.0


def test_flat_factors_are_within_bounds_as_they_are():
    norms = torch.tensor([0.0, -0.0, 1e-320, 0.5, 4.0, 1e300, math.inf, math.nan], dtype=torch.float64)
    assert bounded(Flat(), norms, 2.0).tolist() == [1.0, 0.0, 1.0, 1.0, 0.5, 2e-300, 0.0, 0.0]

    class Long(Flat):
        def __call__(self, norms, bound):
            return 3.0 * super().__call__(norms, bound)

    found = bounded(Long(), norms[3:6], 2.0)
    assert (found * norms[3:6] <= 2.0 * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    "values", [[-2.0, 1.0, 0.5], [-1e-40, 1.0, 0.5], [0.0, 1.0, 0.5], [1e-40, 1.0, 0.5], [0, 0, 0]]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_size_and_sign(values, dtype):
    """Most are looked at once; those with zeros, tiny or negative numbers among them again."""
    model, w = extend(nn.Linear(4, 3)), torch.tensor(values, dtype=dtype)

    class Summed(Extension):
        field, joint = "summed", True

        def finish(self, views):
            return {view.name: view.weighted_sum(Weights(w)) for view in views}

    x = randn(3, 4).float()
    with perex(Summed(), BatchGrad(), grad=False):
        model(x).square().sum(1).mean().backward()
    for name, p in model.named_parameters():
        wanted = torch.tensordot(w.double(), p.grad_batch.double(), dims=1)
        assert (p.summed - wanted).norm() <= 1e-6 * wanted.norm(), name
    assert Weights(w).all == bool((w != 0).all())
    assert Weights(w).none == bool((w == 0).all())
    assert (Weights(w).tiny is not None) == bool(((w != 0) & (w.double().abs() < 1e-30)).any())


# ---------------------------------------------------------------------------------------------------- extreme examples


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", ["flat", "automatic", "global", lambda norms: torch.full_like(norms, math.nan)])
def test_nonfinite_examples_contribute_exactly_zero(value, dtype, clip):
    if callable(clip):

        def clip(norms):
            return 1 / (1 + norms)

    model, (x, y) = extend(naive.mlp(dtype)), naive.batch(6, dtype)
    rest = [0, 1, 2, 4]
    backward(model, without := ClippedGrad(1.0, clip=clip), x[rest], y[rest])
    wanted = {name: s.clone() for name, s in fields(model, "clipped_sum").items()}
    without.zero_grad()
    x[3, 1], y[5, 2] = value, value
    clipping = ClippedGrad(1.0, clip=clip)
    with pytest.warns(NonFiniteExampleWarning, match="Some examples had a NaN or infinite gradient"):
        backward(model, clipping, x, y)
    assert clipping.nonfinite == 2
    assert_same(fields(model, "clipped_sum"), wanted, 1e-6 if dtype == torch.float32 else 1e-13)
    backward(model, clipping, x[:4], y[:4])  # counted again, but not warned again
    assert clipping.nonfinite == 1
    backward(model, clipping, x[:3], y[:3])
    assert clipping.nonfinite == 0


def test_a_batch_of_nothing_but_nan():
    model, (x, y) = extend(naive.mlp()), naive.batch()
    with pytest.warns(NonFiniteExampleWarning, match="had a NaN"):
        backward(model, ClippedGrad(1.0), x * math.nan, y)
    assert all((s == 0).all() for s in fields(model, "clipped_sum").values())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "groups", ["all", "per-parameter", {"weight": "weight", "bias": "bias"}], ids=["all", "each", "named"]
)
def test_nonfinite_in_one_parameter_only_drops_the_whole_example(value, groups):
    """The joint norm is infinite though the bias has a gradient of 1; groups of their own included."""

    def sums(*examples):
        layer, clipping = extend(nn.Linear(2, 1).double()), ClippedGrad(0.5, groups=groups)
        with perex(clipping, grad=False):
            layer(torch.tensor(examples).double()).mean().backward()
        return fields(layer, "clipped_sum"), clipping.nonfinite

    finite = [1.0, 2.0], [0.0, 0.1]
    wanted, none = sums(*finite)
    with pytest.warns(NonFiniteExampleWarning):
        found, dropped = sums([1.0, value], *finite)
    assert (none, dropped) == (0, 1)
    assert wanted["bias"].item() > 0
    assert_same(found, wanted, 1e-15)


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-18, 1e-30])
@pytest.mark.parametrize("positions", [1, 5, 40])
def test_very_large_and_very_small_gradients_are_exact(size, positions):
    """Squares over- and underflow in float32; norms and clipped rows do not."""
    width = 80 if positions == 5 else 6
    torch.manual_seed(0)
    layer = extend(nn.Linear(width, width, bias=False))
    x, g = randn(4, positions, width, dtype=torch.float32), size * randn(4, positions, width, seed=2)
    g = g.float()
    bound = size * 1e-2
    clipping = ClippedGrad(bound)
    with perex(clipping, BatchGrad() if positions == 40 else Unused(), grad=False, loss_reduction="sum"):
        (layer(x) * g).sum().backward()
    true = torch.einsum("nto,nti->noi", g.double(), x.double())
    norms = true.flatten(1).norm(dim=1)
    torch.testing.assert_close(clipping.norms, norms, rtol=1e-5, atol=0)
    wanted = torch.einsum("n,noi->oi", bound / norms, true)
    error = (layer.weight.clipped_sum.double() - wanted).norm() / wanted.norm()
    assert error < 1e-4 if size > 1e-20 else error < 1e-3  # 1e-32 is near the end of float32


class Unused(BatchGrad):
    """Another field, whose quantity is not asked for."""

    field = "unused"

    def compute(self, view):
        return None


def test_a_tiny_gradient_is_left_alone():
    layer = extend(nn.Linear(3, 2, bias=False))
    x = 1e-30 * torch.ones(1, 3)
    with perex(ClippedGrad(1.0), grad=False):
        layer(x).sum().backward()
    assert torch.equal(layer.weight.clipped_sum, x.expand(2, 3))


def test_a_huge_gradient_is_shortened_to_the_bound():
    layer = extend(nn.Linear(3, 2, bias=False))
    with perex(ClippedGrad(1.0), grad=False):
        layer(1e30 * torch.ones(1, 3)).sum().backward()
    torch.testing.assert_close(layer.weight.clipped_sum, torch.full((2, 3), 6**-0.5))


@pytest.mark.parametrize("bound", [1e-38, 1e38])
def test_extreme_bounds(bound):
    model, clipping = extend(naive.mlp()), ClippedGrad(bound)
    backward(model, clipping)
    assert_same(fields(model, "clipped_sum"), naive.clipped(naive.rows(model, mse, *naive.batch()), bound))


def test_settings_given_for_a_group_of_an_unknown_name():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0, groups={"0": "a", "3": "b"})
    with pytest.raises(ConfigurationError, match=r"`2\.weight` belongs to no group"):
        backward(model, clipping)


def test_gradients_lie_as_their_parameters_do():
    """Or optimizers take each entry by itself."""
    model = extend(nn.Conv2d(8, 64, 3).to(memory_format=torch.channels_last))  # many numbers, and few
    clipping = ClippedGrad(1.0)
    optimizer = private(model, clipping, noise=1.0, size=1.0, lr=0.0)
    with perex(clipping, grad=False):
        model(torch.randn(2, 8, 5, 5)).square().mean().backward()
    optimizer.step()
    assert model.weight.grad.stride() == model.weight.stride()
    assert model.weight.grad.is_contiguous(memory_format=torch.channels_last)
