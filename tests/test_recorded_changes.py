"""What a recorded step would not know of: chance, settings, what is written, what examples do to each other."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import pickle
import random
import re
import sys
import threading
import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any

import elsewhere
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from perexample import (
    BatchAxisError,
    ConfigurationError,
    Extension,
    ExtensionError,
    LossError,
    RecordedModel,
    RecordedStep,
    StaleGradientError,
    extend,
    perex,
)
from perexample._looks import blind, holds, noting
from perexample._watched import without_chance
from perexample.extensions import BatchGrad, BatchL2Grad, Clip, ClippedGrad, SumGradSquared, Variance

DEVICE = elsewhere.device()
N = 6
X, Y = torch.linspace(-1, 1, 7 * N).view(N, 7).sin().to(DEVICE), (torch.arange(N) % 5).to(DEVICE)


def cross_entropy(output, y):
    return F.cross_entropy(output, y, reduction="none")


def mlp():
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).to(DEVICE))


def per_class(model):
    return lambda x, y: cross_entropy(model(x), y)


def usual(losses, batch, *extensions):
    with perex(*extensions, loss_reduction="sum", grad=False):
        found = losses(*batch)
        found.sum().backward()
    return found.detach()


def same_as_usual(step, losses, batch, field, tolerance=1e-5):
    """Take the step both ways, with the same random numbers."""
    model = step.model
    torch.manual_seed(3)
    found = step(*batch)
    fields = {name: getattr(p, field).clone() for name, p in model.named_parameters() if hasattr(p, field)}
    for extension in step.extensions:
        if hasattr(extension, "zero_grad"):
            extension.zero_grad()
    torch.manual_seed(3)
    torch.testing.assert_close(found, usual(losses, batch, *step.extensions), equal_nan=True)
    others = {name: getattr(p, field) for name, p in model.named_parameters() if hasattr(p, field)}
    assert fields.keys() == others.keys()
    for name, value in others.items():
        torch.testing.assert_close(fields[name], value, rtol=tolerance, atol=tolerance, equal_nan=True)


# --------------------------------------------------------------------------------------------------------------- chance


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA graph draws other numbers, and cannot be asked")
@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_on_a_drawn_number_is_taken_as_often_as_without_recording(taken):
    model = mlp()

    def losses(x, y):
        return cross_entropy(model(x), y) * (100.0 if torch.rand(()) < 0.3 else 1.0)

    for seed in range(99):
        torch.manual_seed(seed)
        if bool(torch.rand(()) < 0.3) == taken:
            break
    torch.manual_seed(seed)
    step = RecordedStep(model, losses, X, Y, extensions=BatchL2Grad())
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is run as usual that often
        found = [step(X, Y) for _ in range(40)]
    torch.manual_seed(1)
    torch.testing.assert_close(found, [usual(losses, (X, Y), BatchL2Grad()) for _ in range(40)])
    assert 0 < step.repeated < 40


def test_a_step_that_is_run_as_usual_draws_the_same_numbers():
    model = mlp()
    model.insert(1, nn.Dropout(0.5))
    extend(model)
    step = RecordedStep(model, per_class(model), X, Y, extensions=ClippedGrad(1.0))
    bad = X.clone()
    bad[1, 0] = float("nan")
    with pytest.warns(UserWarning, match="NaN"):
        same_as_usual(step, per_class(model), (bad, Y), "clipped_sum")
    assert step.repeated == 1


DRAWS = {
    "bernoulli of a number": lambda: torch.bernoulli(torch.full((), 0.5)).item(),
    "in place": lambda: float(torch.zeros(()).uniform_() < 0.5),
    "like another": lambda: float(torch.rand_like(torch.zeros(())) < 0.5),
    "of weights": lambda: torch.multinomial(torch.ones(4), 1).item(),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA graph cannot be asked")
@pytest.mark.parametrize("name", DRAWS)
def test_chance_is_not_frozen(name):
    model, draw = mlp(), DRAWS[name]

    def losses(x, y):
        return cross_entropy(model(x), y) * (1 + draw())

    step = RecordedStep(model, losses, X, Y, extensions=BatchGrad())
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [step(X, Y) for _ in range(12)]
    assert len({one[0].item() for one in found}) > 1
    torch.manual_seed(1)
    torch.testing.assert_close(found, [usual(losses, (X, Y), BatchGrad()) for _ in range(12)])


def test_random_numbers_without_chance():
    with without_chance():
        assert torch.rand(3).tolist() == [0.5] * 3
        assert torch.zeros(2).bernoulli_(0.5).tolist() == [0.5] * 2
        assert torch.randperm(4).tolist() == [0, 1, 2, 3]
        assert torch.randint(5, (2,)).tolist() == [0, 0]
        x = torch.ones(4)
        assert torch.native_dropout(x, 0.5, True)[0].tolist() == [2.0] * 4
        assert F.rrelu(-x, training=True).lt(0).all()
        assert (F.dropout(x, 0.5) - 1).abs().max() < 1e-6
    assert len(set(torch.rand(9).tolist())) > 1


# --------------------------------------------------------------------------------------- what examples do to each other


DEPENDENT = {
    "their number": lambda model, x, y: cross_entropy(model(x), y) / len(x),
    "their mean": lambda model, x, y: cross_entropy(model(x - x.mean(0)), y),
    "a little of their mean": lambda model, x, y: cross_entropy(model(x - 1e-3 * x.mean(0)), y),
    "a little of their number": lambda model, x, y: cross_entropy(model(x), y) * (1 + 0.005 * len(x)),
    "even or odd": lambda model, x, y: cross_entropy(model(x if len(x) % 2 else -x), y),
}


def seeded(model, x, y):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn(7).to(x)
    return cross_entropy(model(x + noise), y)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize("name", [*DEPENDENT, "a seed"])
def test_what_depends_on_all_examples_is_refused(name, size, dropout):
    if DEVICE == "cuda" and dropout:
        pytest.skip("random numbers of a CUDA graph cannot be replaced")
    function = DEPENDENT.get(name, seeded)
    model = mlp()
    if dropout:
        model.insert(1, nn.Dropout(1e-6))
        extend(model)
    with pytest.raises(ConfigurationError, match=r"gives something else than as usual|cannot be called by itself"):
        RecordedStep(model, lambda x, y: function(model, x, y), X[:size], Y[:size], extensions=BatchGrad())


@pytest.mark.parametrize("make", [mlp, lambda: extend(mlp().insert(1, nn.Dropout(0.3)))])
def test_what_depends_on_each_example_is_not(make):
    model = make()
    step = RecordedStep(model, per_class(model), X, Y, extensions=[BatchGrad(), ClippedGrad(0.1)])
    assert step(X[:4], Y[:4]).shape == (4,)
    assert step.repeated == 0


def test_an_example_that_is_not_there_adds_no_infinity():
    """Its loss is 0, and the gradient 0 times infinity."""
    torch.manual_seed(0)
    model = extend(nn.Linear(7, 1).to(DEVICE))

    def losses(x, y):
        return F.poisson_nll_loss(model(x).squeeze(1), y, reduction="none")

    x, y = X.clone(), torch.ones(N, device=DEVICE)
    x[5] *= 20
    extensions = [SumGradSquared(), BatchGrad()]
    step = RecordedStep(model, losses, x, y, extensions=extensions)
    with torch.no_grad():
        model.weight.copy_(x[5:] / x[5].norm() * 40)
    for field in ("sum_grad_squared", "grad_batch"):
        same_as_usual(step, losses, (0.1 * X[:3], y[:3]), field)
    assert model.weight.sum_grad_squared.isfinite().all()
    assert step.repeated > 0


# ------------------------------------------------------------------------------------------------- settings that change


class Setting:
    def __init__(self):
        self.scale = 1.0


class Settings(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act, self.scales = nn.Linear(7, 5), torch.tanh, [1.0]
        self.table, self.object, self.pair, self.nan = {"scale": 1.0}, Setting(), (1.0,), float("nan")
        self.kept: Any = None
        self.calls, self.seen = 0, []
        self.more, self.on, self.tensor = {"a": [[1.0]]}, True, torch.ones((), device=DEVICE)
        self.history, self.names = [], {"a"}

    def unread(self):
        return self.history

    def factor(self):
        return self.more["a"][0][0] * self.tensor if self.on and "a" in self.names else self.nan

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.kept = self.layer(x)
        return (
            self.act(self.kept)
            * self.scales[0]
            * self.table["scale"]
            * self.object.scale
            * self.pair[0]
            * self.factor()
        )


SETTINGS = {
    "act": lambda m: setattr(m, "act", torch.relu),
    "scales": lambda m: setattr(m, "scales", [3.0]),
    "table": lambda m: m.table.update(scale=3.0),
    "object": lambda m: setattr(m.object, "scale", 3.0),
    "pair": lambda m: setattr(m, "pair", (3.0,)),
    "a hook or the forward": lambda m: m.register_full_backward_pre_hook(lambda module, g: (g[0] * 2,)),
    "nan": lambda m: setattr(m, "nan", 0.0),
    "more": lambda m: m.more["a"][0].__setitem__(0, 2.0),
    "on": lambda m: setattr(m, "on", False),
    "tensor": lambda m: setattr(m, "tensor", torch.ones((), device=DEVICE)),
    "names": lambda m: m.names.add("b"),
}


class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.shift = nn.Linear(7, 5), 1.0, 0.0

    def forward(self, x):
        return scaled_by(self, x)


def scaled_by(module, x):
    return module.layer(x) * module.scale


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_settings_that_helpers_read(name):
    """Of functions beside the class, and of those around the losses."""
    torch.manual_seed(0)
    model = extend(Helped().to(DEVICE))

    def shifted(x):
        return model(x) + model.shift

    step = RecordedStep(model, lambda x, y: cross_entropy(shifted(x), y), X, Y, extensions=BatchGrad())
    step(X, Y)
    setattr(model, name, 3.0)
    with pytest.raises(StaleGradientError, match=f"`{name}` of Helped"):
        step(X, Y)


FACTOR, TABLE, WEIGHT, CALLS, SEEN = 1.0, {"factor": 1.0, 3: 1.0}, torch.ones((), device=DEVICE), 0, []


class Owner:
    def __init__(self, model):
        self.model, self.own, self.other = model, 1.0, 1.0

    def losses(self, x, y):
        return cross_entropy(self.model(x), y) * self.own


class OfClass(nn.Linear):
    factor, other = 1.0, 1.0

    def forward(self, x):
        return self.act(super().forward(x)) * self.factor * getattr(self, f"scale_{self.kind}")


def reads_globals(model):
    return lambda x, y: cross_entropy(model(x), y) * FACTOR * TABLE["factor"] * WEIGHT


def counts(model):
    def losses(x, y):
        global CALLS
        CALLS += 1
        SEEN.append(CALLS)
        return cross_entropy(model(x), y)

    return losses


def closed_over(model):
    factor, table = 1.0, [1.0]

    def put(value):
        nonlocal factor
        factor = value

    def losses(x, y):
        return cross_entropy(model(x), y) * factor * table[0]

    losses.put, losses.table = put, table
    return losses


HERE = __name__
AROUND = {
    "FACTOR": (reads_globals, lambda f, m, put: put(sys.modules[HERE], "FACTOR", 3.0)),
    "TABLE": (reads_globals, lambda f, m, put: put(sys.modules[HERE], "TABLE", TABLE | {"factor": 3.0})),
    "WEIGHT": (reads_globals, lambda f, m, put: put(sys.modules[HERE], "WEIGHT", torch.ones((), device=DEVICE))),
    "own": (lambda model: Owner(model).losses, lambda f, m, put: put(f.__self__, "own", 3.0)),
    "factor": (per_class, lambda f, m, put: put(OfClass, "factor", 3.0)),
    "scale_a": (per_class, lambda f, m, put: setattr(m, "scale_a", 3.0)),
    "shift": (per_class, lambda f, m, put: setattr(m, "shift", 3.0)),
    "factor of the variables around": (closed_over, lambda f, m, put: f.put(3.0)),
    "table": (closed_over, lambda f, m, put: f.table.append(3.0)),
}
NOT_READ = {
    "a counter": (counts, lambda f, m, put: (put(sys.modules[HERE], "CALLS", 9), SEEN.append(3))),
    "an entry": (reads_globals, lambda f, m, put: TABLE.update(other=3.0)),
    "a number": (reads_globals, lambda f, m, put: TABLE.update({3: 3.0})),
    "an attribute": (lambda model: Owner(model).losses, lambda f, m, put: put(f.__self__, "other", 3.0)),
    "one of a class": (per_class, lambda f, m, put: put(OfClass, "other", 3.0)),
}


def of_class():
    torch.manual_seed(0)
    model = OfClass(7, 5).to(DEVICE)
    model.kind, model.scale_a, model.shift = "a", 1.0, 0.0
    model.act = lambda t: t + model.shift
    return extend(model)


def changed_around(make, change, put):
    """A step that was taken once, after a change."""
    model = of_class()
    losses = make(model)
    step = RecordedStep(model, losses, X, Y, extensions=BatchGrad())
    step(X, Y)
    change(losses, model, put)
    return step


@pytest.mark.parametrize("name", AROUND)
def test_variables_around_functions_may_not_be_bound_anew(name, monkeypatch):
    step = changed_around(*AROUND[name], monkeypatch.setattr)
    with pytest.raises(StaleGradientError, match=f"`{name.replace(' of', '` of')}.* or keep it in a tensor"):
        step(X, Y)


class Config:
    factor, other = 1.0, 1.0


class Annealed:
    """A weight that grows."""

    def __init__(self):
        self.step, self.other, self.inner = 1.0, 1.0, SimpleNamespace(kind=Config)

    def weight(self):
        return self.step * GROWTH

    @property
    def half(self):
        return self.step / 2

    def __float__(self):
        return self.step


class Part(nn.Module):
    """A criterion that is not of the model."""

    def __init__(self):
        super().__init__()
        self.factor, self.calls, self.other = 1.0, 0, 1.0

    def forward(self, losses):
        self.calls += 1
        return losses * self.factor


class Whole(nn.Module):
    """Holds a model, as those of Lightning do, and what is not used for its losses."""

    def __init__(self, model):
        super().__init__()
        self.model, self.part, self.metric, self.factor, self.epoch = model, Part(), Part(), 1.0, 0

    def forward(self, x, y):
        return self.part(cross_entropy(self.model(x), y)) * self.factor


class Level(enum.Enum):
    LOW = 1


@dataclasses.dataclass
class Slotted:
    __slots__ = ("factor",)
    factor: float


def times_factor(factor, losses):
    return losses * factor.factor


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) * GROWTH

    return wrapper


GROWTH, KEY, SHIFT = 1.0, "factor", torch.relu


def held():
    """What the functions below read."""
    return SimpleNamespace(
        annealed=Annealed(), part=Part(), slotted=Slotted(1.0),
        table={"factor": 1.0, "other": 1.0, 3: 1.0, Level.LOW: 1.0},
        array=np.ones(2), chosen={"a"}, queue=deque([1.0]), calls={"calls": 0, "factor": 1.0},
        functions={"factor": lambda losses: losses * GROWTH}, ce=nn.CrossEntropyLoss(reduction="none"),
    )  # fmt: skip


def reads(weigh):
    """Losses that a function of them and of what is held weighs, whose variables lie around it."""

    def make(model, own):
        return lambda x, y: weigh(cross_entropy(model(x), y), own)

    return make


def counted(losses, own):
    own.calls["calls"] += 1
    return losses * own.calls["factor"]


def by_default(model, own):
    def losses(x, y, given=own.slotted):
        return cross_entropy(model(x), y) * given.factor

    return losses


def rebind(name, value):
    return lambda own, put: put(sys.modules[HERE], name, value)


HELD = {
    "an attribute of a class": (reads(lambda t, own: t * Config.factor), lambda own, put: put(Config, "factor", 3.0)),
    "a variable of a module": (
        reads(lambda t, own: t * elsewhere.FACTOR),
        lambda own, put: put(elsewhere, "FACTOR", 3.0, raising=False),
    ),
    "a method": (reads(lambda t, own: t * own.annealed.weight()), lambda own, put: put(own.annealed, "step", 3.0)),
    "a variable of a method": (reads(lambda t, own: t * own.annealed.weight()), rebind("GROWTH", 3.0)),
    "a property": (reads(lambda t, own: t * own.annealed.half), lambda own, put: put(own.annealed, "step", 3.0)),
    "a sign": (reads(lambda t, own: t * float(own.annealed)), lambda own, put: put(own.annealed, "step", 3.0)),
    "inside": (reads(lambda t, own: t * own.annealed.inner.kind.factor), lambda own, put: put(Config, "factor", 3.0)),
    "a criterion": (reads(lambda t, own: own.part(t)), lambda own, put: put(own.part, "factor", 3.0)),
    "another criterion": (reads(lambda t, own: own.part(t)), lambda own, put: put(own, "part", Part())),
    "one of torch": (
        lambda model, own: lambda x, y: own.ce(model(x), y),
        lambda own, put: put(own.ce, "label_smoothing", 0.5),
    ),
    "a key": (reads(lambda t, own: t * own.table[KEY]), lambda own, put: own.table.update(factor=3.0)),
    "a number as key": (reads(lambda t, own: t * own.table[3]), lambda own, put: own.table.update({3: 3.0})),
    "an enum as key": (
        reads(lambda t, own: t * own.table[Level.LOW]),
        lambda own, put: own.table.update({Level.LOW: 3.0}),
    ),
    "all values": (reads(lambda t, own: t * sum(own.table.values())), lambda own, put: own.table.update(other=3.0)),
    "slots": (reads(lambda t, own: t * own.slotted.factor), lambda own, put: put(own.slotted, "factor", 3.0)),
    "an array": (reads(lambda t, own: t * float(own.array[0])), lambda own, put: own.array.fill(3.0)),
    "a set": (reads(lambda t, own: t * (3.0 if "b" in own.chosen else 1.0)), lambda own, put: own.chosen.add("b")),
    "a queue": (reads(lambda t, own: t * own.queue[0]), lambda own, put: own.queue.append(3.0)),
    "beside a counter": (reads(counted), lambda own, put: own.calls.update(factor=3.0)),
    "a function": (reads(lambda t, own: SHIFT(t)), rebind("SHIFT", torch.tanh)),
    "of a function in a table": (reads(lambda t, own: own.functions[KEY](t)), rebind("GROWTH", 3.0)),
    "of a decorator": (lambda model, own: decorated(per_class(model)), rebind("GROWTH", 3.0)),
    "given beforehand": (
        lambda model, own: lambda x, y: functools.partial(times_factor, own.slotted)(cross_entropy(model(x), y)),
        lambda own, put: put(own.slotted, "factor", 3.0),
    ),
    "given by a partial": (
        lambda model, own: functools.partial(lambda own, x, y: cross_entropy(model(x), y) * own.factor, own.slotted),
        lambda own, put: put(own.slotted, "factor", 3.0),
    ),
    "given by default": (by_default, lambda own, put: put(own.slotted, "factor", 3.0)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def factor_elsewhere(monkeypatch):
    monkeypatch.setattr(elsewhere, "FACTOR", 1.0, raising=False)


@pytest.mark.parametrize("name", HELD)
def test_what_variables_hold_may_not_change(name, monkeypatch):
    make, change = HELD[name]
    own = held()
    step = RecordedStep(model := mlp(), make(model, own), X, Y, extensions=BatchGrad())
    step(X, Y)
    own.annealed.other, own.part.other, own.part.calls = 3.0, 3.0, 5  # which nothing reads
    monkeypatch.setattr(Config, "other", 3.0)
    step(X, Y)
    change(own, monkeypatch.setattr)
    with pytest.raises(StaleGradientError, match="has changed since the step was recorded"):
        step(X, Y)


class Attributes(dict):
    """Attributes are entries, and no others: asked for one it has not, it raises KeyError."""

    __getattr__ = dict.__getitem__


def test_dictionaries_whose_attributes_are_entries():
    model, own = mlp(), Attributes(factor=1.0, other=1.0)
    step = RecordedStep(model, reads(lambda t, own: t * own.factor)(model, own), X, Y, extensions=BatchGrad())
    own.update(other=3.0, more=1.0)
    step(X, Y)
    own.update(factor=3.0)
    with pytest.raises(StaleGradientError, match=r"`own` of the variables around"):
        step(X, Y)


def test_a_cache_may_grow():
    model, cache = mlp(), {}

    def ones(n):
        if n not in cache:
            cache[n] = torch.ones(n, device=DEVICE)
        return cache[n][0] + 1

    step = RecordedStep(model, lambda x, y: cross_entropy(model(x), y) * ones(7), X, Y, extensions=BatchGrad())
    ones(1)  # of a number that the functions know
    step(X, Y)


@pytest.mark.parametrize("change", [
    lambda whole: setattr(whole, "factor", 3.0),
    lambda whole: setattr(whole.part, "factor", 3.0),
    lambda whole: setattr(whole, "part", Part()),
])  # fmt: skip
@pytest.mark.parametrize("method", [False, True])
def test_a_module_around_the_model_whose_losses_are_recorded(change, method):
    whole = Whole(mlp())
    step = RecordedStep(whole.model, whole.forward if method else whole, X, Y, extensions=BatchGrad())
    step(X, Y)
    whole.epoch += 1
    whole.metric(torch.ones(()))
    whole.eval()
    whole.train()
    step(X, Y)
    change(whole)
    with pytest.raises(StaleGradientError, match="of `Whole`"):
        step(X, Y)


def test_the_default_dtype_may_not_change():
    step = RecordedStep(model := mlp(), per_class(model), X, Y, extensions=BatchGrad())
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(StaleGradientError, match=r"default dtype has changed .* make a new RecordedStep\.$"):
            step(X, Y)
    finally:
        torch.set_default_dtype(torch.float32)
    step(X, Y)


def test_a_number_that_is_kept_in_a_tensor_may_change():
    factor = torch.ones((), device=DEVICE)
    model = mlp()
    step = RecordedStep(model, lambda x, y: cross_entropy(model(x), y) * factor, X, Y, extensions=BatchGrad())
    before = step(X, Y)
    factor.fill_(3.0)
    torch.testing.assert_close(step(X, Y), 3 * before)


class Noting(nn.Linear):
    """Keeps a counter beside settings."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.kept, self.table = SimpleNamespace(scale=1.0, calls=0, rows=[]), {"calls": 0, "inner": {"shift": 0.0}}

    def forward(self, x):
        self.kept.calls, self.table["calls"] = self.kept.calls + 1, self.kept.calls
        self.kept.rows.append(len(x))
        return super().forward(x) * self.kept.scale + self.table["inner"]["shift"]


@pytest.mark.parametrize(("name", "change"), [
    ("kept", lambda model: setattr(model.kept, "scale", 3.0)),
    ("table", lambda model: model.table["inner"].update(shift=3.0)),
])  # fmt: skip
def test_settings_beside_a_counter(name, change):
    torch.manual_seed(0)
    model = extend(Noting(7, 5).to(DEVICE))
    step = RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    step(X, Y)
    with torch.no_grad():
        model(X[:3])
    step(X, Y)
    change(model)
    with pytest.raises(StaleGradientError, match=f"`{name}` of Noting has changed"):
        step(X, Y)


@pytest.mark.parametrize("name", NOT_READ)
def test_variables_that_are_not_read_may(name, monkeypatch):
    step = changed_around(*NOT_READ[name], monkeypatch.setattr)
    step(X, Y)


def test_settings_that_a_forward_of_the_object_reads():
    model = mlp()
    model.scale = 1.0
    model.forward = lambda x: model[2](model[1](model[0](x))) * model.scale
    step = RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    step(X, Y)
    model.scale = 2.0
    with pytest.raises(StaleGradientError, match="`scale` of Sequential"):
        step(X, Y)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(7, 5), 1.0

    def encode(self, x):
        return self.layer(x) * self.scale

    def forward(self, x):
        return self.layer(x)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x):
        return self.encoder.encode(x)


class Criterion:
    def __init__(self, model):
        self.model = model

    def __call__(self, x, y):
        return cross_entropy(self.model.encoder.layer(x) * self.model.encoder.scale, y)


def hooked(model):
    model.encoder.layer.register_forward_hook(lambda layer, x, out: out * model.encoder.scale)
    return lambda x, y: cross_entropy(model.encoder(x), y)


READERS = {
    "a method that the loss calls": lambda model: lambda x, y: cross_entropy(model.encoder.encode(x), y),
    "a bound one": lambda model: (lambda encode: lambda x, y: cross_entropy(encode(x), y))(model.encoder.encode),
    "a method of another module": per_class,
    "an object that is called": Criterion,
    "one that the loss calls": lambda model: (lambda f: lambda x, y: f(x, y))(Criterion(model)),
    "a hook": hooked,
}


@pytest.mark.parametrize("name", READERS)
def test_settings_that_are_read_elsewhere_than_in_forwards(name):
    torch.manual_seed(0)
    model = extend(Around().to(DEVICE))
    step = RecordedStep(model, READERS[name](model), X, Y, extensions=BatchGrad())
    step(X, Y)
    model.encoder.scale = 3.0
    with pytest.raises(StaleGradientError, match="`scale` of `encoder`"):
        step(X, Y)


def test_hooks_on_all_modules_and_on_parameters():
    model = mlp()
    step = RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    kinds = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    for kind in kinds:
        handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
        with pytest.raises(StaleGradientError, match="the list of hooks on all modules has changed"):
            step(X, Y)
        handle.remove()
    handle = model[0].bias.register_hook(lambda g: 2 * g)
    with pytest.raises(StaleGradientError, match="a parameter or buffer of `0`"):
        step(X, Y)
    handle.remove()
    step(X, Y)


def test_a_forward_that_is_replaced_in_its_class(monkeypatch):
    model = mlp()
    step = RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: torch.sin(x))
    with pytest.raises(StaleGradientError, match="a hook or the forward of `1`"):
        step(X, Y)


class Stateful(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.layer, self.state, self.after = nn.Linear(7, 5), torch.ones((), device=DEVICE), after

    def forward(self, x):
        h = self.layer(x) * self.state
        self.state = self.after(self, x, h.detach())
        return h


AFTER = {
    "states of the examples": lambda m, x, h: h.tanh(),
    "a mean over the steps": lambda m, x, h: 0.99 * m.state + 0.01,
    "weights of the step before": lambda m, x, h: m.layer.weight.detach().norm(),
    "a schedule, half way": lambda m, x, h: (torch.ones((), device=DEVICE) if m.state.dim() else m.state) + 1e-3,
}


@pytest.mark.parametrize("name", AFTER)
def test_what_a_run_leaves_to_the_next_is_refused(name):
    torch.manual_seed(0)
    model = extend(Stateful(AFTER[name]).to(DEVICE))
    with pytest.raises(ConfigurationError, match=r"has other losses in a second run|that the run before has left"):
        RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())


def test_a_counter_that_changes_little():
    model, calls = mlp(), [5000]

    def losses(x, y):
        calls[0] += 1
        return cross_entropy(model(x), y) * (calls[0] / 10000)

    with pytest.raises(ConfigurationError, match=r"goes on with what a run before has left"):
        RecordedStep(model, losses, X, Y, extensions=BatchGrad())


class Late(nn.Module):
    """Does something else after many calls, as its counter says, of whatever kind that is."""

    of_all = 0

    def __init__(self, count):
        super().__init__()
        self.layer, self.count = nn.Linear(7, 5), count
        self.calls, self.time, self.table, self.kept = 0, 0.0, {"calls": 0}, SimpleNamespace(calls=0)
        self.list = [0]

    def forward(self, x):
        return self.layer(x) * (2.0 if self.count(self) else 1.0)


def counts_calls(m):
    m.calls += 1
    return m.calls > 1000


def counts_in_turn(m):
    m.calls = (m.calls + 1) % 1000
    return not m.calls


def counts_time(m):
    m.time += 0.5
    return m.time / 2 > 1000


def counts_in_a_table(m):
    m.table["calls"] += 1
    return m.table["calls"] // 1000


def counts_in_an_object(m):
    m.kept.calls = 1 + m.kept.calls
    return -m.kept.calls < -1000


def counts_in_a_list(m):
    m.list[0] += 1
    return m.list[0] - 1000 >= 0


def counts_in_its_class(m):
    Late.of_all += 1
    return bool(Late.of_all // 1000)


COUNTERS = {
    "calls": counts_calls,
    "0 in a list": counts_in_a_list,
    "of_all": counts_in_its_class,
    "calls, in turn": counts_in_turn,
    "time": counts_time,
    "calls in a table": counts_in_a_table,
    "calls in an object": counts_in_an_object,
}


@pytest.mark.parametrize("kind", [RecordedStep, RecordedModel])
@pytest.mark.parametrize("name", COUNTERS)
def test_a_counter_that_would_tell_something_else_later_is_refused(name, kind):
    model = extend(Late(COUNTERS[name]).to(DEVICE))
    arguments = (X,) if kind is RecordedModel else (per_class(model), X, Y)
    match = rf"moves on `{re.split(',? ', name)[0]}` of (class `)?Late`? and compares it.*training loop count"
    with pytest.raises(ConfigurationError, match=match):
        kind(model, *arguments, extensions=BatchGrad())
    assert {type(n) for n in (model.calls, model.table["calls"], model.kept.calls, *model.list, Late.of_all)} == {int}
    assert type(model.time) is float


class LateLosses:
    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, x, y):
        self.calls += 1
        return cross_entropy(self.model(x), y) * (2.0 if self.calls > 1000 else 1.0)


def test_a_counter_around_the_losses_is_refused_too():
    global CALLS
    model, calls = mlp(), 0

    def around(x, y):
        nonlocal calls
        calls += 1
        return cross_entropy(model(x), y) * (2.0 if calls > 1000 else 1.0)

    def of_the_module(x, y):
        global CALLS
        CALLS += 1
        return cross_entropy(model(x), y) * (2.0 if CALLS > 1000 else 1.0)

    cases = [(around, "`calls` of the variables around"), (of_the_module, "`CALLS` of module")]
    cases += [(one, "`calls` of LateLosses") for one in (LateLosses(model), LateLosses(model).__call__)]
    for losses, match in cases:
        with pytest.raises(ConfigurationError, match=match):
            RecordedStep(model, losses, X, Y, extensions=BatchGrad())
    assert type(calls) is type(CALLS) is int


def test_a_flag_that_the_first_call_sets_is_none_of_these():
    def flag(m):
        m.table["calls"] = 1 if m.table["calls"] == 0 else m.table["calls"]

    model = extend(Late(flag).to(DEVICE))
    RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())(X, Y)


class Listing(nn.Linear):
    """Keeps what its counter was."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.calls, self.rate, self.kept = 0, 1.0, []

    def forward(self, x):
        self.calls, self.rate = self.calls + 1, self.rate * 0.5
        self.kept += [self.calls, self.rate]
        return super().forward(x)


def test_numbers_that_a_step_has_kept_are_saved_as_plain_ones():
    model = extend(Listing(7, 5).to(DEVICE))
    RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    for saved in (pickle.loads(pickle.dumps(model.kept)), copy.deepcopy(model.kept)):
        assert {type(one) for one in saved} == {int, float}
        assert saved == model.kept


def test_a_counter_that_is_only_shown_is_none_of_these():
    model, shown = extend(Late(lambda m: None).to(DEVICE)), []

    def count(m):
        m.calls += 1
        shown.append(
            f"{m.calls}: {m.calls / 2:.1f}, {m.table.get(m.calls)}, {X[: m.calls * 2].shape}, {X.sum() * m.calls}"
        )

    model.count = count
    RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())(X, Y)
    assert shown[-1].startswith(f"{model.calls}: {model.calls / 2:.1f}, None")


def test_what_is_left_for_others_to_read_is_no_state():
    model, left = mlp(), {}

    def losses(x, y):
        left["output"] = model(x)
        left["mean"] = left.get("mean", 0.0) * 0.9 + 0.1 * left["output"].detach().mean()  # which no loss depends on
        return cross_entropy(left["output"], y)

    RecordedStep(model, losses, X, Y, extensions=BatchGrad())(X[:3], Y[:3])


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_any_kind(name):
    torch.manual_seed(0)
    model = extend(Settings().to(DEVICE))
    step = RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    step(X, Y)
    with torch.no_grad():
        model(X)  # what a forward leaves behind is no setting
    extend(model)  # nor is this, or what no forward reads
    model.history.append(3.0)
    model.optimizer = torch.optim.SGD(model.parameters())
    step(X, Y)
    SETTINGS[name](model)
    with pytest.raises(StaleGradientError, match=f"{name}`? of Settings has changed"):
        step(X, Y)


def test_numbers_that_are_written_in_the_code_may_be_written_to():
    model = mlp()

    def losses(x, y):
        total, weights = torch.tensor(0.0), torch.tensor([1.0, 2.0])
        weights[0] = 3.0
        total += weights.sum()
        return cross_entropy(model(x), y) * total + x.new_tensor([2.0]).mul_(2)

    step = RecordedStep(model, losses, X, Y, extensions=BatchGrad())
    same_as_usual(step, losses, (X[:3], Y[:3]), "grad_batch")


class Factor(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(7, 5), make
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return self.layer(x) * self.make(self.scale)


LISTS = {
    "tensor": lambda scale: torch.tensor([scale, 2.0])[0],
    "as tensor": lambda scale: torch.as_tensor([scale], device=scale.device),
    "nested": lambda scale: torch.tensor(data=[(2.0, scale)])[0, 1],
    "like another": lambda scale: scale.new_tensor([scale]),
    "itself": torch.tensor,
}


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA graph cannot be asked")
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", LISTS)
def test_tensors_that_are_made_of_others(name):
    torch.manual_seed(0)
    model = extend(Factor(LISTS[name]).to(DEVICE))
    step = RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    same_as_usual(step, per_class(model), (X, Y), "grad_batch")
    model.scale.fill_(3.0)
    same_as_usual(step, per_class(model), (X, Y), "grad_batch")
    assert step.repeated == (name != "itself")


def test_tensors_that_are_made_of_others_unseen_are_refused():
    model = extend(Factor(lambda scale: torch.Tensor([scale]).to(scale)).to(DEVICE))
    with pytest.raises((ConfigurationError, RuntimeError), match=r"looks at values \(__float__\)|captur"):
        RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())


def test_random_numbers_of_python_are_refused():
    model = mlp()
    for draw in (random.random, np.random.rand):
        with pytest.raises(ConfigurationError, match="random numbers of Python or NumPy"):
            RecordedStep(
                model, lambda x, y, draw=draw: cross_entropy(model(x), y) * (1 + (draw() < 1e-9)), X, Y,
                extensions=BatchGrad(),
            )  # fmt: skip


def test_dropout_in_a_part_that_a_checkpoint_runs_again():
    model = nn.Sequential(nn.Linear(7, 9), nn.Dropout(0.003), nn.Linear(9, 5))
    extend(model.to(DEVICE))

    def losses(x, y):
        return cross_entropy(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), y)

    with pytest.raises((ConfigurationError, RuntimeError), match=r"checkpoint|captur"):
        RecordedStep(model, losses, X, Y, extensions=BatchGrad())


class Callable:
    def __init__(self):
        self.share = 0.5

    def __call__(self, norms):
        return self.share * 0.1 / (norms + self.share)


class Softly(Clip):
    def __init__(self):
        self.share = 0.5

    def __call__(self, norms, bound):
        return self.share * bound / (norms + self.share)


class Scaled(Extension):
    field = "scaled"

    def __init__(self):
        self.scale = 1.0

    def compute(self, view):
        return view.batch_l2() * self.scale

    def of_first(self, field, n):
        return field[:n]


def test_settings_of_clip_functions_and_extensions():
    model, clip, scaled = mlp(), Softly(), Scaled()
    step = RecordedStep(model, per_class(model), X, Y, extensions=ClippedGrad(0.1, clip=clip))
    step(X, Y)
    clip.share = 0.1
    with pytest.raises(StaleGradientError, match="`clip` of ClippedGrad"):
        step(X, Y)
    function = Callable()
    step = RecordedStep(model, per_class(model), X, Y, extensions=ClippedGrad(0.1, clip=function))
    step(X, Y)
    function.share = 0.1
    with pytest.raises(StaleGradientError, match="`clip` of ClippedGrad"):
        step(X, Y)
    step = RecordedStep(model, per_class(model), X, Y, extensions=scaled)
    step(X[:2], Y[:2])
    scaled.scale = 3.0
    with pytest.raises(StaleGradientError, match="`scale` of Scaled"):
        step(X, Y)


class Half(ClippedGrad):
    def _weights(self, *given):
        return super()._weights(*given) * 0.5


class Keeping(Extension):
    field, joint = "kept", True

    def finish(self, views):
        self.norms = torch.stack([view.batch_l2() for view in views]).sum(0)
        return {view.name: view.weighted_sum(torch.ones(view.n, device=DEVICE)) for view in views}

    def of_first(self, field, n):
        return field


def test_extensions_that_do_more_than_is_recorded():
    model = mlp()
    with pytest.raises(ExtensionError, match=r"Half is a subclass of ClippedGrad.*override recording"):
        RecordedStep(model, per_class(model), X, Y, extensions=Half(1.0))
    with pytest.raises(ExtensionError, match=r"Keeping remembers .*\(`norms`\)"):
        RecordedStep(model, per_class(model), X, Y, extensions=Keeping())


class GradSum(Extension):
    field = "grad_sum"

    def compute(self, view):
        return view.grad_batch().sum(0)

    def of_first(self, field, n):
        return field


class Running(GradSum):
    """Remembers sums, and a number that is no field."""

    stand_in: Any = GradSum

    def __init__(self):
        self.total, self.last, self.square, self.lengths = {}, {}, 0.0, torch.zeros(())

    def compute(self, view):
        self.last[view.name] = super().compute(view)
        self.lengths = self.lengths + view.batch_l2().sum()
        return self.last[view.name]

    def commit(self):
        for name, found in self.last.items():
            self.total[name] = self.total.get(name, 0) + found
        self.square, self.last, self.lengths = float(self.square + self.lengths), {}, torch.zeros(())

    def recording(self):
        return self.stand_in()

    def replayed(self, found, fields, n, size):
        self.last = {name: field.clone() for name, (_, field) in fields.items()}
        self.lengths = found["lengths"].clone() if found else self.lengths
        return self.last


class WithLengths(GradSum):
    """A stand-in that remembers what it was asked for last, and nothing else."""

    def start(self, views):
        self.lengths = torch.zeros((), device=DEVICE)

    def compute(self, view):
        self.lengths = self.lengths + view.batch_l2().sum()
        return super().compute(view)

    def for_replay(self):
        return {"lengths": self.lengths}


def test_an_extension_that_remembers_takes_over_what_replays_have_found():
    class Whole(Running):
        stand_in = WithLengths

    model = mlp()
    losses = per_class(model)
    extension, wanted = Whole(), Whole()
    step = RecordedStep(model, losses, X, Y, extensions=extension)
    assert not extension.total
    for n in (N, 3, 0, N):
        step(X[:n], Y[:n])
        usual(losses, (X[:n], Y[:n]), wanted)
    assert not step.repeated
    assert extension.square == pytest.approx(wanted.square, rel=1e-4)
    for name, total in wanted.total.items():
        torch.testing.assert_close(extension.total[name], total)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"recording": lambda self: self}, "Mine.recording returned itself, and would remember"),
        ({"recording": lambda self: None}, r"Mine.recording returned None; .* the same field, `grad_sum`"),
        ({"recording": lambda self: Variance()}, r"returned a Variance; .* the same field, `grad_sum`"),
        ({"replayed": Extension.replayed}, r"Mine remembers .* \(commit\).*override replayed"),
    ],
)
def test_stand_ins_that_cannot_be(own, message):
    mine, model = type("Mine", (Running,), own), mlp()
    with pytest.raises(ExtensionError, match=message):
        RecordedStep(model, per_class(model), X, Y, extensions=mine())


class AddingUp(GradSum):
    """What no stand-in may do."""

    def __init__(self):
        self.total = {}

    def compute(self, view):
        self.total[view.name] = self.total.get(view.name, 0) + super().compute(view)
        return self.total[view.name]


class OntoItsField(GradSum):
    """Remembers at the parameters."""

    def compute(self, view):
        return getattr(view.param, self.field, 0) + super().compute(view)


@pytest.mark.parametrize("stand_in", [AddingUp, OntoItsField])
def test_a_stand_in_that_adds_up_is_named(stand_in):
    mine, model = type("Mine", (Running,), {"stand_in": stand_in})(), mlp()
    message = rf"Mine \({stand_in.__name__}, which its recording returned\).*something else.*Mine.commit"
    with pytest.raises(ExtensionError, match=message):
        RecordedStep(model, per_class(model), X, Y, extensions=mine)


def test_an_extension_that_goes_on_with_its_field_remembers():
    model = mlp()
    with pytest.raises(ExtensionError, match=r"OntoItsField cannot be recorded.*at the parameters"):
        RecordedStep(model, per_class(model), X, Y, extensions=OntoItsField())
    assert not any(hasattr(p, "grad_sum") for p in model.parameters())


def test_what_replayed_returns_are_fields():
    class Mine(GradSum):
        def replayed(self, found, fields, n, size):
            return [field for _, field in fields.values()]

    model = mlp()
    step = RecordedStep(model, per_class(model), X, Y, extensions=Mine())
    with pytest.raises(ExtensionError, match=r"Mine\.replayed returned list; it must return a dictionary"):
        step(X, Y)


def test_what_an_extension_puts_into_a_dictionary_or_list_is_remembered_too():
    class Mine(GradSum):
        def __init__(self, kept):
            self.kept = kept

        def compute(self, view):
            if isinstance(self.kept, dict):
                self.kept[view.name] = view.batch_l2()
            else:
                self.kept.append(view.n)
            return super().compute(view)

    model = mlp()
    for kept in ({}, []):
        with pytest.raises(ExtensionError, match=r"Mine remembers what its backwards have found \(`kept`\)"):
            RecordedStep(model, per_class(model), X, Y, extensions=Mine(kept))


def test_what_an_extension_makes_once_is_no_memory():
    class Projected(Extension):
        field = "projected"

        def __init__(self):
            self.onto = {}

        def compute(self, view):
            if view.name not in self.onto:
                self.onto[view.name] = torch.linspace(-1, 1, view.param.numel(), device=DEVICE).view_as(view.param)
            return (view.grad_batch() * self.onto[view.name]).flatten(1).sum(1)

        def of_first(self, field, n):
            return field[:n]

    model = mlp()
    losses = per_class(model)
    step = RecordedStep(model, losses, X, Y, extensions=Projected())
    same_as_usual(step, losses, (X[:4].flip(0), Y[:4].flip(0)), "projected")


def test_a_field_that_of_first_tells_wrongly_is_named():
    class Mean(Extension):
        field = "grad_mean"

        def compute(self, view):
            return view.grad_batch().mean(0)

        def of_first(self, field, n):
            return field

    model = mlp()
    with pytest.raises(
        ConfigurationError, match=r"numbers of examples .* other `grad_mean` \(see whether Mean.of_first"
    ):
        RecordedStep(model, per_class(model), X, Y, extensions=Mean())


def test_a_mean_is_told_by_replayed_and_has_no_part_of_examples_that_are_not_there():
    class Mean(Extension):
        field = "grad_mean"

        def compute(self, view):
            return view.grad_batch().mean(0)

        def replayed(self, found, fields, n, size):
            return {name: field * (size / n) for name, (_, field) in fields.items()}

    model = extend(nn.Linear(7, 5, bias=False).to(DEVICE))

    def losses(x, y):
        return model(x).square().sum(1).sqrt()

    x = X.clone()
    x[:, 0] += 2
    step = RecordedStep(model, losses, x, Y, extensions=Mean())
    same_as_usual(step, losses, (x[:4], Y[:4]), "grad_mean")
    assert not step.repeated
    x[-1] = 0  # where the root has no derivative
    step = RecordedStep(model, losses, x, Y, extensions=Mean())
    same_as_usual(step, losses, (x[:4], Y[:4]), "grad_mean")
    assert step.repeated
    assert model.weight.grad_mean.isfinite().all()


def test_a_bound_beyond_what_sums_can_hold():
    torch.manual_seed(0)
    model, clipping = extend(nn.Linear(7, 5).to(DEVICE)), ClippedGrad(1.0)

    def losses(x, y, k):
        return cross_entropy(model(x), y) * k

    step = RecordedStep(model, losses, X, Y, torch.ones(N, device=DEVICE), extensions=clipping)
    clipping.max_norm = 1e39
    k = torch.tensor([3e38, 3e38, -3e38, -3e38, 1, 1], device=DEVICE)
    same = torch.randn(1, 7).to(DEVICE).repeat(N, 1)
    step(same, Y[:1].repeat(N), k)
    assert model.weight.clipped_sum.isfinite().all()
    assert step.repeated == 1


# ----------------------------------------------------------------------------------------------------- what is written


class Shrinking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.mul_(0.9)
        return self.layer(x)


def test_a_running_mean_outside_of_buffers():
    model, mean = mlp(), torch.zeros((), device=DEVICE)

    def losses(x, y):
        found = cross_entropy(model(x), y)
        mean.lerp_(found.detach().mean(), 0.1)
        return found - mean

    with pytest.raises(ConfigurationError, match=r"writes into a tensor of shape \[\] that was there before"):
        RecordedStep(model, losses, X, Y, extensions=BatchGrad())
    parts = torch.zeros(3, device=DEVICE)

    def by_name(x, y):
        torch.add(parts[:1], 1, out=parts[1:2])
        return cross_entropy(model(x), y)

    with pytest.raises(ConfigurationError, match="that was there before"):
        RecordedStep(model, by_name, X, Y, extensions=BatchGrad())


def test_weights_that_a_forward_writes():
    torch.manual_seed(0)
    model = extend(Shrinking().to(DEVICE))
    before = model.layer.weight.detach().clone()
    with pytest.raises(ConfigurationError, match=r"writes into the parameter `layer\.weight`"):
        RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())
    assert torch.equal(model.layer.weight, before)


def test_a_second_model_in_the_loss():
    first, second = extend(nn.Linear(7, 9).to(DEVICE)), extend(nn.Linear(9, 5).to(DEVICE))

    def losses(x, y):
        return cross_entropy(second(first(x).tanh()), y)

    with pytest.raises(ConfigurationError, match=r"depends on the parameter `weight.*a module that holds both"):
        RecordedStep(first, losses, X, Y, extensions=BatchGrad())
    both = extend(nn.Sequential(first, nn.Tanh(), second))
    RecordedStep(both, per_class(both), X, Y, extensions=BatchGrad())(X, Y)


def test_a_field_of_a_parameter_that_is_frozen_now():
    model = mlp()
    usual(per_class(model), (X, Y), BatchGrad())
    model[0].weight.requires_grad_(False)
    RecordedStep(model, per_class(model), X, Y, extensions=BatchGrad())(X[:2], Y[:2])
    assert not hasattr(model[0].weight, "grad_batch")
    assert model[0].bias.grad_batch.shape == (2, 9)


@pytest.mark.skipif(DEVICE == "cuda", reason="cuDNN cannot be asked")
@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_frozen_recurrent_layers_turn_their_outputs_in_place(layer):
    torch.manual_seed(0)
    frozen, head = layer(7, 6, batch_first=True).requires_grad_(False), nn.Linear(6, 5)
    model = extend(nn.ModuleList([frozen, head]).to(DEVICE))

    def losses(x, y):
        return cross_entropy(head(frozen(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1]), y)

    step = RecordedStep(model, losses, X, Y, extensions=BatchGrad())
    same_as_usual(step, losses, (X[:3].exp(), Y[:3]), "grad_batch")
    assert step.repeated == 0


# ------------------------------------------------------------------------------------------ batches and what comes back


@dataclasses.dataclass
class Batch:
    x: Any
    y: Any
    scale: float = 1.0
    plus: Any = None
    minus: Any = None


def test_batches_in_dataclasses():
    model = mlp()

    def losses(batch):
        h = batch.x * batch.scale
        h = h if batch.plus is None else h + batch.plus
        return cross_entropy(model(h if batch.minus is None else h - batch.minus), batch.y)

    step = RecordedStep(model, losses, Batch(X, Y, plus=X), extensions=BatchGrad())
    same_as_usual(step, losses, (Batch(X[:3], Y[:3], plus=X[1:4]),), "grad_batch")
    for other in (Batch(X, Y, 3.0, plus=X), Batch(X, Y, minus=X), Batch(X, Y)):
        with pytest.raises(BatchAxisError, match="all that is no tensor must be the same"):
            step(other)


@pytest.mark.parametrize(
    ("batch", "message"),
    [((X.cpu().to_sparse(), Y), "torch.sparse_coo"), ((X, Y, torch.ones((), device=DEVICE)), "one is a number")],
)
def test_batches_of_other_tensors(batch, message):
    model = mlp()
    with pytest.raises(ConfigurationError, match=f"dense tensors with the examples on their first axis.*{message}"):
        RecordedStep(model, lambda x, y, *more: per_class(model)(x.to_dense(), y), *batch, extensions=BatchGrad())


def test_what_is_returned_behind_the_losses():
    model = mlp()
    for more in (6, "text", {"rate": 0.1}):
        with pytest.raises(LossError, match="behind the losses, which would be that of the recording"):
            RecordedStep(model, lambda x, y, more=more: (per_class(model)(x, y), more), X, Y, extensions=BatchGrad())
    step = RecordedStep(model, lambda x, y: (per_class(model)(x, y), None, x), X, Y, extensions=ClippedGrad(1.0))
    bad = X.clone()
    bad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="NaN"):
        found = step(bad, Y)  # as usual
    assert found[1] is None
    assert found[2].data_ptr() != bad.data_ptr()


@pytest.mark.parametrize("offset", [0, -11])
def test_indices_from_the_end(offset):
    """Recorded with others, and in a usual step too."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.head = nn.Parameter(torch.randn(11, 8)), nn.Linear(8, 5)

        def forward(self, ids):
            return self.head(self.rows[ids].sum(1))

    torch.manual_seed(0)
    model, ids = extend(Rows().to(DEVICE)), torch.randint(11, (N, 4)).to(DEVICE)
    step = RecordedStep(model, per_class(model), ids, Y, extensions=[BatchGrad(), BatchL2Grad()])
    same_as_usual(step, per_class(model), (ids + offset, Y), "grad_batch")
    same_as_usual(step, per_class(model), (ids[:2] + offset, Y[:2]), "batch_l2")
    assert step.repeated == 0
    step(ids, Y)
    own = torch.autograd.grad(per_class(model)(ids[:1], Y[:1]).sum(), model.rows)[0]
    torch.testing.assert_close(model.rows.grad_batch[0], own)


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA graph reads what is there")
def test_what_cannot_be_replayed_is_run_as_usual():
    model = nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(32, 5))
    extend(model.to(DEVICE))
    ids = torch.randint(11, (N, 4), device=DEVICE)
    step = RecordedStep(model, per_class(model), ids, Y, extensions=Variance())
    step(ids, Y)
    before = model[0].weight.variance
    with pytest.raises(IndexError):
        step(ids + 20, Y)  # what is wrong is said as usual
    assert model[0].weight.variance is before
    replay = step._replay
    step._replay = lambda: replay() if step.repeated > 1 else torch.ones(2) @ torch.ones(3)
    same_as_usual(step, per_class(model), (ids, Y), "variance")
    assert step.repeated == 2


def test_notes_are_of_the_thread_that_makes_them():
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def work():
        with noting() as own:
            inside.set()
            go_on.wait(10)
            holds(torch.zeros(()) > 1)
        seen.append(own.conditions)

    thread = threading.Thread(target=work)
    with noting() as notes:
        thread.start()
        inside.wait(10)
        holds(torch.ones(2) > 0)
        assert blind()
    assert not blind()
    go_on.set()
    thread.join()
    assert [bool(c) for c in notes.conditions] == [True]
    assert [bool(c) for c in seen[0]] == [False]
