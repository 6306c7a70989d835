"""Recorded steps whose operations torch.compile fuses leave what a backward leaves, in float64 to the last digits."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_recorded import (
    MODELS,
    MOVES,
    TABLE,
    N,
    fields,
    made,
    moving,
    near,
    of_table,
    per_class,
    replayed_and_usual,
    texts,
    usual,
)  # fmt: skip
from test_tape import FUNCTIONS, recorded
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from perexample import (
    ConfigurationError,
    NonFiniteExampleWarning,
    RecordedModel,
    RecordedStep,
    StaleGradientError,
    _fused,
    extend,
    perex,
    privatize,
)
from perexample._fused import OPTIONS, DoesNotHold
from perexample._tape import Tape
from perexample._tree import map_tensors
from perexample.extensions import AdaptiveClippedGrad, BatchGrad, BatchL2Grad, ClippedGrad
from perexample.privacy import make_private

pytestmark = [
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
    ),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="torch before 2.13 rounds otherwise when it compiles"),
]


def compiled(model, losses, *batch, **options):
    """A step of fused operations, also where it is slower."""
    return RecordedStep(model, losses, *batch, strategy="model", compiled=True, **options)


def test_an_older_torch_does_not_compile(monkeypatch):
    monkeypatch.setattr("perexample._fused._TOO_OLD", True)
    model, x, y = made("mlp", torch.float64)
    with pytest.warns(UserWarning, match=r"not compiled: torch .* takes torch 2\.13\.$"):
        step = compiled(model, per_class(model), x, y, extensions=BatchGrad())
    step(x, y)
    assert not step.compiled


@pytest.mark.parametrize("name", [name for name in MODELS if name != "lstm"])
def test_the_same_as_a_backward_for_any_number_of_examples(name):
    model, x, y = made(name, torch.float64)
    rows = [BatchGrad(), BatchL2Grad()]
    clipping, other = ClippedGrad(1.0), ClippedGrad(1.0)
    names = [e.field for e in (*rows, clipping)]
    step = compiled(model, per_class(model), x, y, extensions=[*rows, clipping])
    assert step.compiled
    for n in (N, 2, 1, N):
        torch.manual_seed(n)
        some = torch.randperm(N)[:n]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)
        losses = step(x[some], y[some])
        found, norms = fields(model, *names), clipping.norms
        clipping.zero_grad()
        torch.testing.assert_close(losses, usual(model, x[some], y[some], *rows, other))
        near(found, fields(model, *names), 1e-11)
        torch.testing.assert_close(norms, other.norms, rtol=1e-11, atol=1e-12)
        other.zero_grad()
    assert step(x[:0], y[:0]).shape == (0,)
    assert all(bool((p.clipped_sum == 0).all()) for p in model.parameters())
    assert step.repeated == 0


WEIGHT = torch.nn.Parameter(torch.ones(4, 3))


def written_through_layouts(x):
    """Results in places that are not in one piece, and a weight and views of it that were there before."""
    room = torch.empty(4, 2, 3)
    torch.mul(x, 2, out=room[:, 0].T)
    torch.mm(x.T, x, out=room[:3, 1].new_empty(4, 4))
    room[:, 1].copy_(WEIGHT)
    return room, room[:, 0] @ WEIGHT.T.exp()


def test_a_fused_tape_does_the_same():
    functions = [*FUNCTIONS, written_through_layouts]

    def every(x):
        return [function(x) for function in functions]

    program, _ = recorded(every, torch.randn(3, 4))
    assert program.fuse([torch.randn(3, 4)], always=True) is None
    for _ in range(3):
        with torch.no_grad():
            WEIGHT.mul_(1.5)
            x = torch.randn(3, 4)
            found = program.replay([x.clone()])
            torch.testing.assert_close(found, every(x))
            map_tensors(lambda t: t.fill_(7), found)  # belongs to whoever asked


@pytest.mark.parametrize("kind", [ClippedGrad, AdaptiveClippedGrad])
def test_private_training_is_the_same(kind):
    def trained(fuse):
        model, x, y = made("cnn")
        options = {"expected_batch_size": N} if kind is AdaptiveClippedGrad else {}
        clipping = kind(0.5, **options)
        noise = torch.Generator().manual_seed(3)
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        optimizer = privatize(sgd, clipping=clipping, noise_multiplier=0.1, expected_batch_size=N, generator=noise)
        step = compiled(model, per_class(model), x, y, extensions=clipping) if fuse else None
        bounds = []
        for n in (N, 3, 5, N, 1, N):
            for piece in (slice(0, n // 2), slice(n // 2, n)):
                if step is None:
                    usual(model, x[piece], y[piece], clipping)
                else:
                    step(x[piece], y[piece])
            optimizer.step()
            bounds.append(clipping.max_norm)
            if n == 5 and kind is ClippedGrad:
                clipping.max_norm = 0.25
        return {name: p.detach() for name, p in model.named_parameters()}, bounds

    (found, bounds), (wanted, other) = trained(True), trained(False)
    assert bounds == pytest.approx(other)
    assert len(set(bounds)) > 1
    near(found, wanted, 1e-4)


@pytest.mark.usefixtures("noise_of_any_sums")
def test_a_recorded_training_may_be_compiled():
    def trained(fuse):
        torch.manual_seed(0)
        model, data = made()[0], TensorDataset(torch.randn(40, 7), torch.randint(11, (40,)))
        private = make_private(
            model, torch.optim.SGD(model.parameters(), 0.1), data, noise_multiplier=1.0, target_delta=1e-3, epochs=2,
            batch_size=10, public_size=40, max_norm=1.0, sampling_generator=torch.Generator().manual_seed(5),
            strategy="model", noise_generator=torch.Generator().manual_seed(4),
        )  # fmt: skip
        backward = private.recorded(per_class(model), compiled=fuse)
        assert not backward.compiled
        for x, y in private:
            backward(x, y)
            private.step()
        assert backward.compiled is fuse
        return {name: p.detach() for name, p in model.named_parameters()}

    near(trained(True), trained(False), 1e-4)


def test_norms_in_doubt_and_examples_that_are_not_finite():
    torch.manual_seed(0)
    model = extend(nn.Linear(16, 12, bias=False))
    g = torch.randn(N, 1, 12) * (-1.0) ** torch.arange(32).view(1, -1, 1)
    x = torch.randn(N, 1, 16) * (1 + 1e-5 * torch.randn(N, 32, 1))

    def losses(x, g):
        return (model(x) * g).sum((1, 2))

    clipping = ClippedGrad(1e-6)
    step = compiled(model, losses, torch.randn_like(x), torch.randn_like(g), extensions=clipping)
    step(x, g)
    true = torch.linalg.matrix_norm(g.double().mT @ x.double())
    assert step.repeated == 1
    assert (clipping.norms / true - 1).abs().max() < 1e-4
    assert (clipping.norms / true - 1).min() > -1e-6
    clipping.zero_grad()
    x, g = torch.randn_like(x), torch.randn_like(g)
    step(x, g)
    assert step.repeated == 1
    clipping.zero_grad()
    x[1, 3, 2] = float("nan")
    with pytest.warns(NonFiniteExampleWarning):
        step(x, g)
    assert step.repeated == 2
    assert clipping.nonfinite == 1
    assert model.weight.clipped_sum.isfinite().all()


@pytest.mark.parametrize("length", [3000, 20000])
def test_norms_over_long_sums_are_not_too_small(length):
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)))
    clipping = ClippedGrad(1.0)

    def losses(x):
        return model(x).square().mean((1, 2))

    step = compiled(model, losses, torch.rand(3, length, 3), extensions=[clipping, BatchL2Grad()])
    x = torch.rand(3, length, 3) + 0.5
    step(x)
    assert step.repeated == 0
    rows = BatchGrad()
    with torch.no_grad():
        model.double()
    usual_losses(lambda x: model(x).square().mean((1, 2)), x.double(), rows)
    true = torch.stack([p.grad_batch.flatten(1).norm(dim=1) for p in model.parameters()]).norm(dim=0)
    assert (clipping.norms / true - 1).min() > -1e-6
    assert (clipping.norms / true - 1).max() < 1e-4


def usual_losses(losses, x, *extensions):
    with perex(*extensions, loss_reduction="sum", grad=False):
        losses(x).sum().backward()


def test_chance_is_as_without_it():
    def losses(model):
        def of_each(x, y):
            output = model(x + 0.1 * torch.randn_like(x))
            return F.cross_entropy(F.dropout(output * torch.rand_like(output), 0.4, True), y, reduction="none")

        return of_each

    found = []
    for fuse in (True, False):
        model, x, y = made("cnn")
        clipping = ClippedGrad(1.0)
        if fuse:
            step = compiled(model, losses(model), x, y, extensions=clipping)
            assert step.compiled
        else:
            step = RecordedStep(model, losses(model), x, y, extensions=clipping)
        for seed in (5, 6):
            torch.manual_seed(seed)
            step(x, y)
            found.append(fields(model, "clipped_sum") | {("", "norms"): clipping.norms, ("", "next"): torch.rand(3)})
            clipping.zero_grad()
    for one, other in zip(found[:2], found[2:], strict=True):
        near(one, other)


def test_what_is_not_worth_compiling_is_not():
    model, x, y = made("lstm")
    ids = x.repeat(1, 4)
    with pytest.warns(UserWarning, match="not compiled: more than 16 times results are written into parts"):
        step = compiled(model, per_class(model), ids, y, extensions=ClippedGrad(1.0))
    assert not step.compiled
    clipping = ClippedGrad(1.0)
    step(ids, y)
    found = fields(model, "clipped_sum")
    usual(model, ids, y, clipping)
    near(found, fields(model, "clipped_sum"))


@pytest.mark.parametrize("faster", [True, False])
def test_what_is_not_faster_is_not_used(monkeypatch, faster):
    model, x, y = made()
    medians = iter([1.0, 2.0] if faster else [2.0, 1.0])  # of fused operations, and of the others
    monkeypatch.setattr(_fused.statistics, "median", lambda seconds: next(medians))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = RecordedStep(model, per_class(model), x, y, extensions=ClippedGrad(1.0), compiled=True)
    assert step.compiled is faster
    assert any("fused they take longer" in str(one.message) for one in caught) is not faster
    step(x, y)


def test_what_has_changed_is_an_error():
    model, x, y = made()
    step = compiled(model, per_class(model), x, y, extensions=ClippedGrad(1.0))
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(StaleGradientError, match="has changed since the step was recorded"):
        step(x, y)


@torch.library.custom_op("perexample_tests::unknown_shape", mutates_args=())
def unknown_shape(x: torch.Tensor) -> torch.Tensor:
    """An operation of which torch.compile knows no shapes."""
    return x.clone()


@torch.library.custom_op("perexample_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """An operation that torch.compile can only call."""
    return 2 * x


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


def test_operations_of_others():
    model, x, y = made()
    clipping, other = ClippedGrad(1.0), ClippedGrad(1.0)

    def losses(x, y):
        return F.cross_entropy(model(doubled(x)), y, reduction="none")

    step = compiled(model, losses, x, y, extensions=clipping)
    step(x.flip(0), y)
    found = fields(model, "clipped_sum")
    clipping.zero_grad()
    usual(model, 2 * x.flip(0), y, other)
    near(found, fields(model, "clipped_sum"))


def test_operations_that_cannot_be_compiled():
    model, x, y = made()

    def losses(x, y):
        return F.cross_entropy(model(unknown_shape(x)), y, reduction="none")

    with pytest.raises(ConfigurationError, match=r"This step cannot be compiled: torch.compile failed .*compiled=True"):
        compiled(model, losses, x, y, extensions=ClippedGrad(1.0))


def test_batches_of_inference_tensors_are_taken():
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    step = compiled(model, per_class(model), x, y, extensions=clipping)
    with torch.inference_mode():
        own = x * 1.0
    step(own, y)
    found = fields(model, "clipped_sum")
    clipping.zero_grad()
    usual(model, x, y, clipping)
    near(found, fields(model, "clipped_sum"))


class Counting(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operations_one_by_one():
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    step = compiled(model, per_class(model), x, y, extensions=clipping)
    step(x, y)
    found = fields(model, "clipped_sum")
    clipping.zero_grad()
    with Counting() as counting:
        step(x, y)
    assert counting.count > 30
    near(found, fields(model, "clipped_sum"))


def test_other_settings_of_torch_compile_nothing_anew(monkeypatch):
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    step = compiled(model, per_class(model), x, y, extensions=clipping)
    step(x, y)
    found = fields(model, "clipped_sum")
    threads = torch.get_num_threads()
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    try:
        torch.set_num_threads(1)
        for context in (torch.device("cpu"), torch.inference_mode(), torch.enable_grad(), UserFunctions()):
            clipping.zero_grad()
            with context:
                step(x, y)
            near(found, fields(model, "clipped_sum"))
    finally:
        torch.set_num_threads(threads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
    assert step.repeated == 0


def test_what_was_not_compiled_to_be_deterministic_is_not_used_then(monkeypatch):
    model, x, y = made()
    step = compiled(model, per_class(model), x, y, extensions=ClippedGrad(1.0))

    def used(*tensors):
        raise AssertionError("compiled operations are used")

    monkeypatch.setattr(_fused.Fused, "__call__", used)
    try:
        torch.use_deterministic_algorithms(True)
        step(x, y)
        assert step.repeated == 0
    finally:
        torch.use_deterministic_algorithms(False)


class UserFunctions(TorchFunctionMode):
    """A mode of the user's, which lets everything pass."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["scattered", "written"])
def test_entries_may_be_moved_as_the_data_say(name):
    model, losses = moving(MOVES[name])
    step = compiled(model, losses, *texts(N, 1), extensions=[BatchGrad(), BatchL2Grad()])
    for n, seed in ((N, 2), (N, 3), (4, 4), (1, 5)):
        found, wanted = replayed_and_usual(step, model, losses, texts(n, seed))
        torch.testing.assert_close(found[0], wanted[0])
        near(found[1], wanted[1])
    assert step.repeated == 0


def written_indices(t, i):
    """Indices that are others after their first use."""
    i = i.clone()
    first = t[i]
    i += 1
    return first + t[i]


# Of a table [9, 4] and indices [5, 4] below 4.
INDEXED = {
    "embedding": lambda t, i: F.embedding(i, t),
    "nll": lambda t, i: F.nll_loss(t[:5], i[:, 0], reduction="none"),
    "nll of places": lambda t, i: F.nll_loss(t[:5].T[None].expand(2, 4, 5), i.T[:2], reduction="none"),
    "gather": lambda t, i: t.gather(0, i),
    "take": lambda t, i: t.take(i),
    "bags": lambda t, i: F.embedding_bag(i, t),
    "index": lambda t, i: t[:4][:, i],
    "two": lambda t, i: t[i, i.flip(0)],
    "written to": written_indices,
    "index_select": lambda t, i: t.index_select(1, i[:, 1]),
    "index_fill": lambda t, i: t.index_fill(0, i[0], 2.0),
    "index_add": lambda t, i: t[:5].index_add(1, i[0], t[4:]),
    "index_put": lambda t, i: t.index_put((i,), torch.ones(4), accumulate=True),
    "scatter": lambda t, i: t.scatter(1, i, 1.0),
    "scatter_add": lambda t, i: t.clone().scatter_add_(0, i, t),
}


def test_wrong_indices_are_told_where_operations_one_by_one_raise():
    torch.manual_seed(0)
    table, good = torch.randn(9, 4), [torch.randint(4, (5, 4)) for _ in INDEXED]
    program, _ = recorded(
        lambda t, *all_of: [f(t, i) for f, i in zip(INDEXED.values(), all_of, strict=True)], table, *good
    )
    assert program.fuse([table, *good], always=True) is None
    good = [torch.randint(4, (5, 4)) for _ in INDEXED]
    places = {name: place for place, name in enumerate(INDEXED)}
    good[places["nll"]][2, 0] = -100
    good[places["index"]][1, 1] = good[places["index_fill"]][0, 2] = -4
    one_by_one = program._code
    torch.testing.assert_close(program.replay([table, *good]), list(one_by_one(table, *good)))
    for name, place in places.items():
        for wrong in (50, -50):
            bad = [t.clone() for t in good]
            bad[place][0] = wrong
            with pytest.raises(DoesNotHold):
                pytest.fail(f"{name}: {program.replay([table, *bad])}")
            with pytest.raises((IndexError, RuntimeError), match=r"out of .*(bounds|range)|not in the valid range"):
                one_by_one(table, *bad)


def test_indices_of_two_axes_are_checked_for_both():
    table, i = torch.randn(9, 4), torch.tensor([3, 0, 2])
    program, _ = recorded(lambda t, i: t.T[i, i], table, i)
    assert program.fuse([table, i], always=True) is None
    torch.testing.assert_close(program.replay([table, i.flip(0)]), table.diagonal()[i.flip(0)])
    with pytest.raises(DoesNotHold):
        program.replay([table, i + 3])  # right for one of them


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda t, i: F.max_unpool2d(t[:4, None, :1, None], i.view(4, 1, 1, 1), (1, 4)), "max_unpool2d"),
        (lambda t, i: F.multi_margin_loss(t[:4], i), "multi_margin_loss"),
        (lambda t, i: torch.segment_reduce(t, "sum", lengths=i), "segment_reduce"),
    ],
    ids=["max_unpool2d", "multi_margin_loss", "segment_reduce"],
)
def test_indices_of_which_nothing_is_known_are_not_compiled(function, name):
    table, i = torch.randn(9, 4), torch.tensor([3, 0, 3, 3])
    program, _ = recorded(function, table, i)
    assert f"{name} may take indices" in program.fuse([table, i], always=True)
    torch.testing.assert_close(program.replay([table, i]), function(table, i))


def test_integers_that_are_no_indices_are_compiled():
    x = torch.randint(9, (4, 4))
    program, _ = recorded(
        lambda x: (x.sort(1)[0].cumsum(0).flip(1), torch.cat([x, x.T]).topk(2)[1], x.roll(1).sum(0)), x
    )
    assert program.fuse([x], always=True) is None


def test_constant_indices_are_looked_at_like_those_of_the_data():
    table, memory = torch.randn(9, 4), np.array([3, 1, 8])
    order = torch.from_numpy(memory)
    program, _ = recorded(lambda t: t[order].exp(), table)
    assert program.fuse([table], always=True) is None
    for number in (5, -9):
        memory[1] = number  # which counts no write to the tensor
        assert program._fused.fits
        torch.testing.assert_close(program.replay([table]), table[order].exp())
    for wrong in (9, -10):
        order.data[1] = wrong
        with pytest.raises(DoesNotHold):
            program.replay([table])


def test_a_constant_that_lies_elsewhere_is_read_there():
    x, w = torch.randn(3, 4), torch.randn(3, 4)
    program, _ = recorded(lambda x: (x * w).exp(), x)
    assert program.fuse([x], always=True) is None
    assert program._fused.fits
    for other in (torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(4)):
        w.data = other
        assert not program._fused.fits
        torch.testing.assert_close(program.replay([x]), (x * w).exp())


def pooled(pool, **options):
    """What a pool gives, from where, and what comes back there."""

    def every(x):
        found, places = pool(x, return_indices=True, **options)
        grad = found.masked_fill(found.isinf(), 0.5)
        kernel, stride = options["kernel_size"], options.get("stride", [])
        more = options.get("padding", 0), options.get("dilation", 1), options.get("ceil_mode", False)
        dims = 3 if pool is F.max_pool3d else 2
        back = getattr(torch.ops.aten, f"max_pool{dims}d_with_indices_backward")
        pairs = [[one] * dims if isinstance(one, int) else one for one in more[:2]]
        return found, places, back(grad, x, [kernel] * dims, stride and [stride] * dims, *pairs, more[2], places)

    return every


POOLS = {
    "padding": (pooled(F.max_pool2d, kernel_size=3, stride=2, padding=1), (2, 3, 8, 8)),
    "one axis of padding": (pooled(F.max_pool2d, kernel_size=3, padding=[0, 1]), (2, 3, 8, 8)),
    "channels, padding": (pooled(F.max_pool2d, kernel_size=3, padding=1), (3, 8, 8)),
    "large, padding": (pooled(F.max_pool2d, kernel_size=6, stride=1, padding=3), (2, 3, 8, 8)),
    "3d, padding": (pooled(F.max_pool3d, kernel_size=3, stride=2, padding=1), (2, 3, 4, 6, 6)),
    "none": (pooled(F.max_pool2d, kernel_size=3, stride=2), (2, 3, 8, 8)),
    "ceil_mode": (pooled(F.max_pool2d, kernel_size=3, stride=2, ceil_mode=True), (2, 3, 8, 8)),
    "dilation": (pooled(F.max_pool2d, kernel_size=2, stride=1, dilation=2), (2, 3, 8, 8)),
    "large": (pooled(F.max_pool2d, kernel_size=6, stride=1), (2, 3, 8, 8)),
    "3d": (pooled(F.max_pool3d, kernel_size=2), (2, 3, 4, 6, 6)),
}


@pytest.mark.parametrize("name", POOLS)
def test_windows_without_a_finite_entry(name):
    (function, shape), padded = POOLS[name], "padding" in name
    torch.manual_seed(0)
    program, _ = recorded(function, torch.randn(shape))
    assert program.fuse([torch.randn(shape)], always=True) is None
    x = torch.randn(shape).round()  # with ties
    x.flatten()[5] = float("nan")
    torch.testing.assert_close(program.replay([x]), function(x), equal_nan=True)
    x[..., 1:7, :3] = -float("inf")
    if padded:  # there is an entry at the place that would be found, another one
        with pytest.raises(DoesNotHold):
            program.replay([x])
    else:
        torch.testing.assert_close(program.replay([x]), function(x), equal_nan=True)
    x[...] = -float("inf")
    if padded:
        with pytest.raises(DoesNotHold):
            program.replay([x])
    else:
        torch.testing.assert_close(program.replay([x]), function(x))


def test_a_pool_of_masked_positions_is_as_usual():
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Conv1d(1, 3, 3, padding=1)))
    x, keep = torch.randn(6, 1, 16), torch.ones(6, 16, dtype=torch.bool)

    def losses(x, keep):
        h = model(x).masked_fill(~keep[:, None], -float("inf"))
        return torch.tanh(F.max_pool2d(h[:, :, None], (1, 3), (1, 2), (0, 1))).flatten(1).sum(1)

    clipping, other = ClippedGrad(1.0), ClippedGrad(1.0)
    step = compiled(model, losses, x, keep, extensions=clipping)
    keep[1, 4:] = keep[5] = False
    step(x, keep)
    assert step.compiled
    assert step.repeated == 1
    found = fields(model, "clipped_sum")
    usual_losses(lambda x: losses(x, keep), x, other)
    near(found, fields(model, "clipped_sum"))


# Of x [2, 3] and what is checked: functions, what is right, what is wrong.
EYES = torch.eye(3).repeat(2, 1, 1)
CHECKED = {
    "cholesky": (lambda x, c: x[:, None] @ torch.linalg.cholesky(c), 2 * EYES, -EYES),
    "solve": (lambda x, c: torch.linalg.solve(c, x), EYES, 0 * EYES),
    "inv": (lambda x, c: x[:, None] @ torch.linalg.inv(c), EYES, 0 * EYES),
    "cholesky_ex": (lambda x, c: x[:, None] @ torch.linalg.cholesky_ex(c, check_errors=True)[0], EYES, -EYES),
    "without use": (lambda x, c: x * bool(torch.linalg.inv_ex(c, check_errors=True)), EYES, 0 * EYES),
    "_assert_async": (lambda x, c: (torch._assert_async((c < 2).all()), x + 1)[1], EYES, 2 * EYES),
    "binary_cross_entropy": (lambda x, c: F.binary_cross_entropy(c, 0 * c), torch.rand(4), torch.linspace(-0.1, 1, 4)),
    "bernoulli": (lambda x, c: torch.bernoulli(c).sum() * 0 + x, EYES, 2 * EYES),
    "above one": (lambda x, c: F.binary_cross_entropy(c, 0 * c), torch.rand(4), torch.linspace(0, 1.1, 4)),
}


@pytest.mark.parametrize("name", CHECKED)
def test_what_operations_check_is_checked(name):
    function, right, wrong = CHECKED[name]
    x = torch.randn(2, 3)
    program, _ = recorded(function, x, right)
    right, wrong = right.clone(), wrong.clone()
    for fuse in (False, True):
        assert not fuse or program.fuse([x, right], always=True) is None
        torch.testing.assert_close(program.replay([x, right]), function(x, right))
        with pytest.raises(DoesNotHold if fuse else RuntimeError):
            program.replay([x, wrong])
    with pytest.raises(RuntimeError):
        function(x, wrong)


def test_what_checks_something_else_is_not_compiled():
    def function(x):
        torch.ops.aten._assert_tensor_metadata(x, [3, 4])
        return x + 1

    x = torch.randn(3, 4)
    program, _ = recorded(function, x)
    assert "_assert_tensor_metadata may raise" in program.fuse([x], always=True)
    torch.testing.assert_close(program.replay([x]), x + 1)


DIVISIONS = {
    "trunc": lambda a, n: torch.div(a, n, rounding_mode="trunc"),
    "floor": lambda a, n: torch.div(a, n, rounding_mode="floor"),
    "number": lambda a, n: torch.div(12, n, rounding_mode="trunc") + a,
    "floor_divide": lambda a, n: a // n,
    "remainder": lambda a, n: a % n,
    "fmod": torch.fmod,
    "in place": lambda a, n: a.clone().floor_divide_(n),
    "remainder of a number": lambda a, n: 7 % n + a,
    "by itself": lambda a, n: (m := n.clone()).floor_divide_(m) + a,
    "bool": lambda a, n: a % (n > 0),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integers_divided_by_zero(dtype):
    a, n = torch.randint(1, 99, (40,)).to(dtype), torch.randint(1, 9, (40,)).to(dtype)
    program, _ = recorded(lambda a, *all_of: [f(a, m) for f, m in zip(DIVISIONS.values(), all_of, strict=True)], a,
                       *([n.clone() for _ in DIVISIONS]))  # fmt: skip
    good = [n.clone() for _ in DIVISIONS]
    assert program.fuse([a, *good], always=True) is None
    good = [n.flip(0) for _ in DIVISIONS]
    torch.testing.assert_close(program.replay([a, *good]), list(program._code(a, *good)))
    for place, name in enumerate(DIVISIONS):
        bad = [t.clone() for t in good]
        bad[place][3] = 0
        with pytest.raises(DoesNotHold):
            pytest.fail(f"{name}: {program.replay([a, *bad])}")
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            program._code(a, *bad)
    if dtype is not torch.uint8:
        a[3] = torch.iinfo(dtype).min
        bad = [n.clone() for _ in DIVISIONS]
        bad[3][3] = -1
        with pytest.raises(DoesNotHold):
            program.replay([a, *bad])


def test_divisors_that_are_no_integers_are_as_they_are():
    a, n = torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    program, _ = recorded(lambda a, n: (a // n, a % n, n % (a + 1), (0.5 + a) // 2, a // 2, torch.div(a, n)), a, n)
    assert program.fuse([a, n], always=True) is None
    n = torch.tensor([0.0, -1.0, float("nan"), 2.0])
    torch.testing.assert_close(program.replay([a, n]), program._code(a, n), equal_nan=True)


def test_nothing_is_drawn_twice_where_compiled_code_cannot_be_used():
    model, x, y = made("cnn")
    n = torch.arange(1, N + 1)

    def losses(x, y, n):
        h = F.dropout(model(x), 0.5, True)
        return F.cross_entropy(h, y, reduction="none") * torch.div(12, n, rounding_mode="trunc")

    clipping = ClippedGrad(1.0)
    step = compiled(model, losses, x, y, n, extensions=clipping)
    assert step.compiled
    n[2] = -1  # which is right for these
    torch.manual_seed(3)
    found = step(x, y, n), torch.rand(2)
    assert step.repeated == 1
    clipping.zero_grad()
    torch.manual_seed(3)
    with perex(clipping, loss_reduction="sum", grad=False):
        wanted = losses(x, y, n)
        wanted.sum().backward()
    torch.testing.assert_close(found, (wanted.detach(), torch.rand(2)))


@pytest.mark.parametrize("dims", [2, 3])
def test_grid_samplers_are_not_compiled(dims):
    x, grid = torch.randn(2, 1, *[4] * dims), torch.rand(2, *[4] * dims, dims)
    program, _ = recorded(lambda x, grid: F.grid_sample(x, grid, align_corners=False), x, grid)
    assert f"grid_sampler_{dims}d may find numbers where there is NaN" in program.fuse([x, grid], always=True)


def test_shrinking_keeps_nan():
    x = torch.tensor([[float("nan"), 1.0]])
    program, _ = recorded(F.softshrink, x)
    assert "softshrink may find numbers where there is NaN" in program.fuse([x], always=True)
    assert program.replay([x])[0, 0].isnan()


def test_what_is_rounded_to_16_bits_is_rounded_and_overflows():
    def function(x):
        return [(x.to(dtype) * 3).float() for dtype in (torch.bfloat16, torch.float16)]

    x = torch.tensor([[1.001, 1e5, -3.3333]])
    program, _ = recorded(function, x)
    assert program.fuse([x], always=True) is None
    found = program.replay([x])
    assert all(map(torch.equal, found, function(x)))
    assert found[1][0, 1].isinf()


def test_what_torch_compile_cannot_write_down_is_not_compiled():
    x = torch.randn(3, 4)
    default = torch.default_generator
    for function, name in (
        (lambda x: torch.empty_like(x).random_(0, 5) + x, "random_"),
        (lambda x: torch.rand(3, 4, generator=default) + x, "rand"),
    ):
        program, _ = recorded(function, x)
        assert f"{name} cannot be written" in program.fuse([x], always=True)
        torch.manual_seed(0)
        found = program.replay([x])
        torch.manual_seed(0)
        torch.testing.assert_close(found, function(x))


def spoiled(t):
    """Not to be trusted, which is no reason not to look at what is to be the same all the same."""
    return t * float("nan") if t.is_floating_point() else torch.zeros_like(t)


@pytest.mark.parametrize("other", [lambda t: t + t, spoiled])
def test_what_differs_only_as_compiled_is_not_compiled(other, monkeypatch):
    model, x, y = made()
    call, clipping = _fused.Fused.__call__, ClippedGrad(1.0)
    monkeypatch.setattr(_fused.Fused, "__call__", lambda *given: map_tensors(lambda t: t * 1, call(*given)))
    assert compiled(model, per_class(model), x, y, extensions=clipping).compiled
    monkeypatch.setattr(_fused.Fused, "__call__", lambda *given: map_tensors(other, call(*given)))
    with pytest.warns(UserWarning, match="not compiled: compiled they give something else than as usual"):
        step = compiled(model, per_class(model), x, y, extensions=clipping)
    assert not step.compiled
    step(x, y)
    assert step.repeated == 0
    found = fields(model, "clipped_sum")
    clipping.zero_grad()
    usual(model, x, y, clipping)
    near(found, fields(model, "clipped_sum"))
    clipping.zero_grad()
    with pytest.raises(ConfigurationError, match="for other numbers of examples it gives something else"):
        compiled(model, lambda x, y: per_class(model)(x, y) / len(x), x, y, extensions=clipping)


def test_indices_beyond_the_end_are_errors_as_usual():
    model, x, y = made("tied")
    clipping = ClippedGrad(1.0)
    step = compiled(model, per_class(model), x, y, extensions=clipping)
    bad = x.clone()
    bad[2, 1] = 11
    with pytest.raises(IndexError):
        step(bad, y)
    clipping.zero_grad()
    step(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore")
def test_rows_of_the_table_of_rules(case):
    of_table(case, compiled=True, strategy="model")


def test_options_are_known():
    assert set(OPTIONS) <= set(torch._inductor.list_options())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_are_refused():
    model, x, y = made()
    with pytest.raises(ConfigurationError, match="is for models on a CPU"):
        compiled(model, per_class(model), x, y, extensions=ClippedGrad(1.0))


def test_gradients_of_a_step():
    model, x, y = made(dtype=torch.float64)
    step = compiled(model, per_class(model), x, y, extensions=BatchL2Grad(), grad=True, loss_reduction="mean")
    assert step.compiled
    for n in (N, 4, 1):
        step(x[:n], y[:n])
        found = fields(model, "grad")
        model.zero_grad()
        F.cross_entropy(model(x[:n]), y[:n]).backward()
        near(found, fields(model, "grad"), 1e-11)
        model.zero_grad()
    assert not step.repeated


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("tied", marks=pytest.mark.slow), pytest.param("cnn", marks=pytest.mark.slow)]
)
def test_a_recorded_model(name):
    model, x, y = made(name, torch.float64)
    own, other = [BatchL2Grad(), ClippedGrad(0.3)], [BatchL2Grad(), ClippedGrad(0.3)]
    recorded = RecordedModel(model, x, extensions=own, strategy="model", grad=True, compiled=True)
    assert recorded.compiled
    for n in (N, 4, 1):
        results = []
        for call, extensions in ((recorded, own), (model, other)):
            with perex(*extensions, strategy="model"):
                out = call(x[:n])
                F.cross_entropy(out, y[:n]).backward()
            results.append((out.detach(), fields(model, "clipped_sum", "batch_l2", "grad")))
            extensions[1].zero_grad()
            model.zero_grad()
        torch.testing.assert_close(results[0][0], results[1][0])
        near(results[0][1], results[1][1], 1e-11)
    assert not recorded.repeated


@pytest.mark.filterwarnings("ignore:.*not compiled")  # torch 2.13 uses the mask before it is drawn
def test_outputs_of_a_recorded_model_with_dropout_behind_a_norm():
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Dropout(0.3), nn.Linear(9, 11)).double())
    x, own = torch.randn(N, 7, dtype=torch.float64), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own, strategy="model", compiled=True)
    found = []
    for call in (recorded, model):
        torch.manual_seed(1)
        found.append(call(x).detach())
    torch.testing.assert_close(*found)


class Ids(nn.Module):
    """Rows that are looked up, and outputs that the backward needs."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.table(ids)).sigmoid()


def test_a_recorded_model_of_ids_that_are_not_there():
    model = extend(Ids())
    ids, y = torch.randint(5, (N,)), torch.randint(3, (N,))
    own = ClippedGrad(0.3)
    recorded = RecordedModel(model, ids, extensions=own, strategy="model", compiled=True)
    assert recorded.compiled
    with pytest.raises(IndexError):
        recorded(ids + 5)
    with perex(own, grad=False, strategy="model"):
        out = recorded(ids)
        loss = F.cross_entropy(out, y)
        out.detach().zero_()
        loss.backward()
        found = fields(model, "clipped_sum")
        own.zero_grad()
        F.cross_entropy(model(ids), y).backward()
    near(found, fields(model, "clipped_sum"))
    assert recorded.repeated == 1


def test_what_is_written_over_a_pause_is_not_compiled():
    x, g = torch.randn(3, 4), torch.randn(3, 4)

    def function():
        y = x.exp()
        z = y * 2
        y.mul_(g)
        return z, (y + z).sum()

    tape = Tape()
    tape.record(function, [x, g], later=1)
    program = tape.program
    assert "written to in its backward" in program.fuse([x, g], always=True)
    x, g = torch.randn(3, 4), torch.randn(3, 4)
    shown, finish = program.begin([x])
    torch.testing.assert_close(shown, x.exp() * 2)
    torch.testing.assert_close(finish([g]), (x.exp() * g + x.exp() * 2).sum())
