"""Recorded steps leave what a backward leaves; on a GPU they are CUDA graphs, on a CPU they run without a look."""

from __future__ import annotations

import copy
import random
import re
import threading
import warnings
from operator import itemgetter

import cases
import elsewhere
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perexample import (
    BatchAxisError,
    ConfigurationError,
    CrossExampleError,
    Extension,
    ExtensionError,
    LossError,
    NonFiniteExampleWarning,
    RecordedStep,
    StaleGradientError,
    extend,
    perex,
    privatize,
)
from perexample._looks import blind, noting
from perexample._tree import map_tensors
from perexample.extensions import (
    AdaptiveClippedGrad,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    SumGradSquared,
    Variance,
)

DEVICE = elsewhere.device()
N = 6


class Tied(nn.Module):
    """Tokens in, the next ones out, by one table."""

    def __init__(self):
        super().__init__()
        self.tokens, self.place = nn.Embedding(11, 8, padding_idx=3), nn.Embedding(5, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.body(self.tokens(ids) + self.place(torch.arange(5, device=ids.device)))).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.lstm, self.head = nn.Embedding(11, 8), nn.LSTM(8, 9, 2, batch_first=True), nn.Linear(9, 11)

    def forward(self, ids):
        return self.head(self.lstm(self.tokens(ids))[0][:, -1])


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, 2, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(72, 11),
    )  # fmt: skip


def images(n):
    return torch.randn(n, 3, 8, 8)


def tokens(n):
    return torch.randint(11, (n, 5))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 11)), lambda n: torch.randn(n, 7)),
    "cnn": (cnn, images),
    "tied": (Tied, tokens),
    "lstm": (Recurrent, tokens),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(7, 9)), nn.PReLU(), nn.Linear(9, 11)),
        lambda n: torch.randn(n, 7),
    ),
    "layers by positions": (lambda: nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 9), nn.Flatten(), nn.Linear(45, 11)),
                            lambda n: torch.randn(n, 5, 7)),
}  # fmt: skip


def made(name="mlp", dtype=torch.float32):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = extend(make().to(DEVICE, dtype))
    x, y = inputs(N).to(DEVICE), torch.randint(11, (N,), device=DEVICE)
    return model, x.to(dtype) if x.is_floating_point() else x, y


def per_class(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def usual(model, x, y, *extensions):
    with perex(*extensions, loss_reduction="sum", grad=False):
        losses = per_class(model)(x, y)
        losses.sum().backward()
    return losses.detach()


def fields(model, *names):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {(name, field): getattr(p, field).clone() for name, p in named for field in names}


def near(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    scale = max(t.abs().max().item() for t in wanted.values() if t.numel())
    for key, value in wanted.items():
        assert found[key].shape == value.shape, key
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance * max(scale, 1e-3), msg=str(key))


class Looks(TorchDispatchMode):
    """Raises where the host would wait for a value."""

    NAMES = ("_local_scalar_dense", "nonzero", "_unique2", "equal", "masked_select", "bincount", "masked_scatter")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        masks = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert not masks, "a mask as an index looks at values"
        assert name not in self.NAMES, f"{name} looks at values"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_a_backward_for_any_number_of_examples(name):
    model, x, y = made(name)
    rows = [BatchGrad(), BatchL2Grad(), SumGradSquared(), BatchDotGrad()]
    clipping, other = ClippedGrad(1.0), ClippedGrad(1.0)
    names = [e.field for e in (*rows, clipping)]
    step = RecordedStep(model, per_class(model), x, y, extensions=[*rows, clipping])
    assert not fields_left(model)
    for n in (N, 2, 5, 1, N):
        torch.manual_seed(n)
        some = torch.randperm(N, device=DEVICE)[:n]
        losses = step(x[some], y[some])
        found, norms = fields(model, *names), clipping.norms
        assert clipping.examples == n
        clipping.zero_grad()
        torch.testing.assert_close(losses, usual(model, x[some], y[some], *rows, other))
        near(found, fields(model, *names))
        torch.testing.assert_close(norms, other.norms, rtol=1e-5, atol=1e-6)
        other.zero_grad()
    assert step.repeated == 0


def test_a_loop_over_the_examples():
    """A function without a rule of its own is given them one by one."""

    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.randn(11, 7)), nn.Tanh()

        def forward(self, x):
            return self.act(torch.stack([torch.mv(self.weight, row) for row in x]))

    model, x, y = extend(OneByOne().to(DEVICE)), torch.randn(N, 7, device=DEVICE), torch.arange(N, device=DEVICE)
    step = RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())
    torch.testing.assert_close(step(x.flip(0), y), usual(model, x.flip(0), y, BatchGrad()))
    wanted = fields(model, "grad_batch")
    step(x.flip(0), y)
    near(fields(model, "grad_batch"), wanted)


def fields_left(model):
    return [field for p in model.parameters() for field in vars(p)]


@pytest.mark.parametrize("name", MODELS)
def test_no_value_is_looked_at(name):
    model, x, y = made(name)
    step = RecordedStep(model, per_class(model), x, y, extensions=ClippedGrad(1.0))
    with Looks():
        step._run()


def test_what_looks_at_values_is_noticed():
    model, x, y = made("tied")
    usual(model, x, y, ClippedGrad(1.0))  # operations are tried in the first forward
    with pytest.raises(AssertionError, match="looks at values"), Looks():
        usual(model, x, y, ClippedGrad(1.0))


def test_no_example_at_all():
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    step(x, y)
    clipping.zero_grad()
    assert step(x[:0], y[:0]).shape == (0,)
    assert clipping.examples == 0
    assert clipping.norms.shape == (0,)
    assert all(bool((p.clipped_sum == 0).all()) for p in model.parameters())


@pytest.mark.parametrize("pieces", [[3, 3], [N, 2, 1], [1, 0, 4]])
def test_sums_of_several_pieces_add_up(pieces):
    model, x, y = made()
    clipping, other = ClippedGrad(0.3), ClippedGrad(0.3)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    for _ in range(2):
        for n in pieces:
            step(x[:n], y[:n])
        found = fields(model, "clipped_sum")
        assert clipping.examples == sum(pieces)
        clipping.zero_grad()
        for n in pieces:
            usual(model, x[:n], y[:n], other)
        near(found, fields(model, "clipped_sum"))
        other.zero_grad()


def test_a_recorded_piece_and_a_usual_one_add_up():
    model, x, y = made()
    clipping, other = ClippedGrad(0.3), ClippedGrad(0.3)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    step(x, y)
    usual(model, x[:2], y[:2], clipping)
    step(x[:1], y[:1])
    found = fields(model, "clipped_sum")
    clipping.zero_grad()
    for n in (N, 2, 1):
        usual(model, x[:n], y[:n], other)
    near(found, fields(model, "clipped_sum"))


def test_a_sum_that_was_written_to_is_not_added_to():
    model, x, y = made()
    clipping = ClippedGrad(0.3)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    step(x, y)
    model[0].weight.clipped_sum.mul_(2)
    with pytest.raises(StaleGradientError, match="written to"):
        step(x, y)


@pytest.mark.parametrize("kind", [ClippedGrad, AdaptiveClippedGrad])
def test_private_training_is_the_same(kind):
    def trained(recorded):
        model, x, y = made()
        options = {"expected_batch_size": N} if kind is AdaptiveClippedGrad else {}
        clipping = kind(0.5, **options)
        noise = torch.Generator(DEVICE).manual_seed(3)
        sgd = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        optimizer = privatize(sgd, clipping=clipping, noise_multiplier=0.1, expected_batch_size=N, generator=noise)
        step = RecordedStep(model, per_class(model), x, y, extensions=clipping) if recorded else None
        bounds = []
        for n in (N, 3, 5, N, 1, N):
            if step is None:
                usual(model, x[:n], y[:n], clipping)
            else:
                step(x[:n], y[:n])
            optimizer.step()
            bounds.append(clipping.max_norm)
            if n == 5 and kind is ClippedGrad:
                clipping.max_norm = 0.25
        return dict(model.named_parameters()), bounds, step

    found, bounds, step = trained(True)
    wanted, other, _ = trained(False)
    assert bounds == pytest.approx(other)
    assert len(set(bounds)) > 1
    near({k: p.detach() for k, p in found.items()}, {k: p.detach() for k, p in wanted.items()})
    assert step.repeated == 0


def test_a_sum_serves_one_step():
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = privatize(sgd, clipping=clipping, noise_multiplier=0.0, expected_batch_size=N)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    with pytest.raises(StaleGradientError):
        optimizer.step()  # what was run to record it is nobody's
    step(x, y)
    optimizer.step()
    with pytest.raises(StaleGradientError):
        optimizer.step()
    step(x, y)
    optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_an_example_that_is_not_finite_is_left_out(value):
    model, x, y = made()
    clipping, other = ClippedGrad(1.0), ClippedGrad(1.0)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    bad = x.clone()
    bad[1] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        step(bad, y)
        found, norms, nonfinite = fields(model, "clipped_sum"), clipping.norms, clipping.nonfinite
        clipping.zero_grad()
        usual(model, bad, y, other)
    near(found, fields(model, "clipped_sum"))
    assert nonfinite == other.nonfinite
    torch.testing.assert_close(norms, other.norms, equal_nan=True)
    repeated = step.repeated
    assert repeated == (value != 1e30)
    clipping.zero_grad()
    step(x[:1], y[:1])  # the row that was not finite is not part of it, whatever lies there
    assert step.repeated == repeated
    assert clipping.nonfinite == 0
    assert torch.isfinite(clipping.norms).all()


def test_norms_of_positions_that_cancel_are_exact():
    torch.manual_seed(0)
    model = extend(nn.Linear(16, 12, bias=False).to(DEVICE))
    g = torch.randn(N, 1, 12, device=DEVICE) * (-1.0) ** torch.arange(32, device=DEVICE).view(1, -1, 1)
    x = torch.randn(N, 1, 16, device=DEVICE) * (1 + 1e-5 * torch.randn(N, 32, 1, device=DEVICE))

    def losses(x, g):
        return (model(x) * g).sum((1, 2))

    clipping = ClippedGrad(1e-6)
    step = RecordedStep(model, losses, torch.randn_like(x), torch.randn_like(g), extensions=clipping)
    step(x, g)
    true = torch.linalg.matrix_norm(g.double().mT @ x.double())
    assert step.repeated == 1
    assert (clipping.norms / true - 1).abs().max() < 1e-4
    assert (clipping.norms / true - 1).min() > -1e-6


def test_a_warning_if_that_happens_often():
    model, x, y = made()
    step = RecordedStep(model, per_class(model), x, y, extensions=(clipping := ClippedGrad(1.0)))
    x[0] = float("nan")
    with pytest.warns(NonFiniteExampleWarning):
        step(x, y)
    for _ in range(8):
        step(x, y)
    with pytest.warns(UserWarning, match="10 batches as usual"):
        step(x, y)
    assert clipping.nonfinite == 1
    step(x, y)
    assert step.repeated == 11


@pytest.mark.parametrize("groups", ["per-parameter", "per-module", {"0": "first", "2": "second"}])
@pytest.mark.parametrize("clip", ["automatic", "global", lambda norms: 1 / (1 + norms)])
def test_groups_and_clip_functions(groups, clip):
    model, x, y = made()
    clipping, other = (ClippedGrad(0.2, clip=clip, groups=groups) for _ in range(2))
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    step(x[:4], y[:4])
    found = fields(model, "clipped_sum")
    assert clipping.sensitivity() > 0
    clipping.zero_grad()
    usual(model, x[:4], y[:4], other)
    near(found, fields(model, "clipped_sum"))
    for group, norms in other.group_norms.items():
        torch.testing.assert_close(clipping.group_norms[group], norms)


def test_batches_may_be_nested_and_the_model_compute_in_less():
    model, x, y = made("cnn")

    def losses(batch):
        with torch.autocast(DEVICE, torch.bfloat16):
            return F.cross_entropy(model(batch["x"]).float(), batch["y"][0], reduction="none")

    clipping, other = ClippedGrad(1.0), ClippedGrad(1.0)
    step = RecordedStep(model, losses, {"x": x, "y": (y,)}, extensions=clipping)
    step({"x": x[:3], "y": (y[:3],)})
    found = fields(model, "clipped_sum")
    clipping.zero_grad()
    with perex(other, loss_reduction="sum", grad=False):
        losses({"x": x[:3], "y": (y[:3],)}).sum().backward()
    near(found, fields(model, "clipped_sum"), 3e-2)


def test_frozen_parameters_and_what_is_left_alone():
    model, x, y = made()
    model[0].weight.requires_grad_(False)
    model[2].bias.clipped_sum = kept = torch.ones(3)
    step = RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())
    step(x, y)
    assert not hasattr(model[0].weight, "grad_batch")
    assert model[2].bias.clipped_sum is kept
    assert all(p.grad is None for p in model.parameters())


class Remembering(Extension):
    field = "remembered"

    def compute(self, view):
        return view.batch_l2()

    def commit(self):
        self.done = True


def test_arguments_without_meaning():
    model, x, y = made()
    losses = per_class(model)
    with pytest.raises(LossError, match=r"returned \[\] for 6 examples"):
        RecordedStep(model, lambda x, y: losses(x, y).mean(), x, y, extensions=BatchGrad())
    with pytest.raises(LossError, match="returned int"):
        RecordedStep(model, lambda x, y: 3, x, y, extensions=BatchGrad())
    with pytest.raises(BatchAxisError, match="one example or more"):
        RecordedStep(model, losses, x[:0], y[:0], extensions=BatchGrad())
    with pytest.raises(BatchAxisError, match="on the first axis of each"):
        RecordedStep(model, losses, x, y[:2], extensions=BatchGrad())
    with pytest.raises(ExtensionError, match="Remembering remembers"):
        RecordedStep(model, losses, x, y, extensions=Remembering())
    with pytest.raises(ExtensionError, match="at least one extension"):
        RecordedStep(model, losses, x, y, extensions=[])
    clipping = ClippedGrad(1.0)
    usual(model, x, y, clipping)
    with pytest.raises(StaleGradientError, match="no step has used"):
        RecordedStep(model, losses, x, y, extensions=clipping)


def test_models_on_no_device_or_several():
    for model in (nn.ReLU(), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])):
        with pytest.raises(ConfigurationError, match="needs a model on one device"):
            RecordedStep(extend(model), lambda x: x, torch.ones(2, 2), extensions=BatchGrad())


def test_nothing_is_written_if_an_extension_cannot_tell_its_field():
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    step = RecordedStep(model, per_class(model), x, y, extensions=[clipping, BatchGrad(), Variance()])
    with pytest.raises(ExtensionError, match="Variance does not tell"):
        step(x[:2], y[:2])
    assert not fields_left(model)
    assert clipping.examples == 0


def test_batches_of_another_form():
    model, x, y = made()
    step = RecordedStep(model, per_class(model), x, y, extensions=Variance())
    step(x, y)
    for batch in [(torch.cat([x, x]), torch.cat([y, y])), (x[:, :3], y), (x.double(), y), (x,), (x, y[:2])]:
        with pytest.raises(BatchAxisError, match=r"recorded with .*was called with"):
            step(*batch)
    with pytest.raises(ExtensionError, match=r"Variance does not tell.*take this batch without it \(step.as_usual"):
        step(x[:2], y[:2])
    step.as_usual(x[:2], y[:2])


def test_a_model_that_has_changed():
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    model.eval()
    with pytest.raises(StaleGradientError, match="`training` of Sequential"):
        step(x, y)
    model.train()
    step(x, y)
    clipping.clip = copy.copy(clipping.clip)
    with pytest.raises(StaleGradientError, match="`clip` of ClippedGrad"):
        step(x, y)
    step = RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())
    model[0].bias.requires_grad_(False)
    with pytest.raises(StaleGradientError, match="a parameter or buffer of `0`"):
        step(x, y)
    model[0].bias.requires_grad_(True)
    step(x, y)
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(StaleGradientError, match="a parameter or buffer of `0`"):
        step(x, y)
    step = RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())
    model[1] = nn.ReLU()
    with pytest.raises(StaleGradientError, match="`1` \\(ReLU\\) has changed"):
        step(x, y)
    model[2] = extend(nn.Linear(9, 11).to(DEVICE))
    with pytest.raises(StaleGradientError, match="`1` \\(ReLU\\) has changed"):
        step(x, y)


def test_sizes_that_depend_on_values():
    torch.manual_seed(0)
    lstm, head = nn.LSTM(4, 5), nn.Linear(5, 3)
    model = extend(nn.ModuleList([lstm, head]).to(DEVICE))
    lengths = torch.tensor([5, 3, 2])

    def losses(x):
        packed = nn.utils.rnn.pack_padded_sequence(x.transpose(0, 1), lengths)
        return head(lstm(packed)[1][0][-1]).square().sum(1)

    with pytest.raises((ConfigurationError, RuntimeError)):
        RecordedStep(model, losses, torch.randn(3, 5, 4, device=DEVICE), extensions=BatchGrad())


def test_double_precision():
    model, x, y = made("cnn", torch.float64)
    clipping, other = ClippedGrad(1.0), ClippedGrad(1.0)
    step = RecordedStep(model, per_class(model), x, y, extensions=clipping)
    step(x[:4], y[:4])
    found = fields(model, "clipped_sum")
    clipping.zero_grad()
    usual(model, x[:4], y[:4], other)
    near(found, fields(model, "clipped_sum"), 1e-12)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.on = nn.Linear(7, 11), True
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.count.add_(1)
        return self.layer(x)


def centred(model, x, y):
    return per_class(model)(x - x.mean(0), y)


def weighted(model, x, y):
    losses = per_class(model)(x, y)
    return losses * (losses / losses.sum()).detach()


def split(model, x, y):
    a, b = torch.tensor_split(model(x), y[:1].cpu() % 3 + 1)
    return torch.cat([a.sum(1), b.sum(1) * 2])


COUPLED = {
    "a list": lambda model, x, y: per_class(model)(x, y) * torch.tensor([1.0 + v for v in y.tolist()], device=x.device),
    "numpy": lambda model, x, y: per_class(model)(x, y) * torch.from_numpy(y.cpu().numpy() + 1.0).to(x),
    "an array": lambda model, x, y: per_class(model)(x, y) * torch.from_numpy(np.asarray(y.cpu()) + 1.0).to(x),
    "random numbers of Python": lambda model, x, y: per_class(model)(x, y) * random.random(),
    "a view by a tensor": split,
    "another class": lambda model, x, y: per_class(model)((x * 2).as_subclass(torch.Tensor), y),
    "a parameter of data": lambda model, x, y: per_class(model)(nn.Parameter(x * 2, requires_grad=False), y),
    "the number of examples": lambda model, x, y: per_class(model)(x, y) / len(x),
    "a branch on it": lambda model, x, y: per_class(model)(x if len(x) > 3 else -x, y),
    "the mean of the batch": centred,
    "weights of the batch": weighted,
    "in place": lambda model, x, y: per_class(model)(x.div_(2), y),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_would_be_as_it_was_recorded_is_refused(name):
    model, x, y = made()
    with pytest.raises((ConfigurationError, RuntimeError)):
        RecordedStep(model, lambda x, y: COUPLED[name](model, x, y), x, y, extensions=ClippedGrad(0.5))


def test_a_buffer_that_counts_is_refused():
    model = extend(Counting().to(DEVICE))
    _, x, y = made()
    with pytest.raises(ConfigurationError, match="changes the buffer `count`"):
        RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())
    assert not fields_left(model)


def test_weights_that_were_computed_before_are_refused():
    model, x, y = made("weight norm")
    with nn.utils.parametrize.cached(), pytest.raises((ConfigurationError, RuntimeError)):
        RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())


CHANGES = {
    "eps": ("layers by positions", lambda model: setattr(model[0], "eps", 1.0), "`eps` of `0`"),
    "hook": ("mlp", lambda model: model[0].register_forward_hook(lambda *a: a[2] * 2), "a hook or the forward of `0`"),
    "forward": ("mlp", lambda model: setattr(model[0], "forward", torch.sin), "a hook or the forward of `0`"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_have_changed(name):
    kind, change, match = CHANGES[name]
    model, x, y = made(kind)
    step = RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())
    step(x, y)
    change(model)
    with pytest.raises(StaleGradientError, match=match):
        step(x, y)


def test_clipping_that_has_changed():
    model, x, y = made()
    automatic, groups = ClippedGrad(1.0, clip="automatic"), {"0": "first", "2": "second"}
    grouped = ClippedGrad(1.0, groups=groups)
    steps = [RecordedStep(model, per_class(model), x, y, extensions=e) for e in (automatic, grouped)]
    automatic.clip.stability = 10.0
    groups["2"] = "first"
    for step, what in zip(steps, ("clip", "groups"), strict=True):
        with pytest.raises(StaleGradientError, match=f"`{what}` of ClippedGrad"):
            step(x, y)


def test_batches_of_another_structure():
    model, x, y = made()

    def losses(batch, scale):
        return scale * per_class(model)(batch["a"] - batch["b"].square(), y[: len(batch["a"])])

    step = RecordedStep(model, losses, {"a": x, "b": x * 2}, 1.0, extensions=ClippedGrad(1.0))
    step({"a": x, "b": x * 3}, 1.0)
    for batch, scale in [({"b": x, "a": x}, 1.0), ({"a": x, "b": x}, 2.0), ([x, x], 1.0)]:
        with pytest.raises(BatchAxisError, match="all that is no tensor must be the same"):
            step(batch, scale)
    with pytest.raises(ConfigurationError, match="a ndarray would be that of the recording"):
        RecordedStep(model, losses, {"a": x, "b": x}, np.ones(3), extensions=BatchGrad())
    with pytest.raises(ConfigurationError, match="without requires_grad"):
        step({"a": x.clone().requires_grad_(), "b": x}, 1.0)


def test_batches_that_lie_otherwise():
    model, x, y = made()

    def losses(a, b, y):
        return per_class(model)(a.as_strided((len(a), 7), (7, 1)) + b, y)

    step, clipping = None, ClippedGrad(1.0)
    step = RecordedStep(model, losses, x, x * 2, y, extensions=clipping)
    wide = torch.randn(2 * N, 7, device=DEVICE)
    for a, b in [(wide[N:], x), (x, x), (torch.randn(7, N, device=DEVICE).T, x), (x, wide[::2])]:
        step(a, b, y)
        found = fields(model, "clipped_sum")
        clipping.zero_grad()
        with perex(clipping, loss_reduction="sum", grad=False):
            per_class(model)(a + b, y).sum().backward()
        near(found, fields(model, "clipped_sum"))
        clipping.zero_grad()


def test_autocast_around_a_step():
    model, x, y = made()
    step = RecordedStep(model, per_class(model), x, y, extensions=ClippedGrad(1.0))
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(StaleGradientError, match="precision of autocast"):
        step(x, y)
    with torch.no_grad():
        step(x, y)
    assert model[0].weight.clipped_sum.dtype == torch.float32


@pytest.mark.skipif(
    DEVICE != "cpu", reason="autograd of devices computes in threads of its own, all of which look away"
)
def test_another_thread_looks_at_values_meanwhile():
    model, x, y = made()
    other, _, _ = made()
    clipping, inside, go_on = ClippedGrad(1.0), threading.Event(), threading.Event()

    def losses(x, y):
        inside.set()
        go_on.wait(10)
        return per_class(model)(x, y)

    def work():
        inside.wait(10)
        with noting(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteExampleWarning)
            go_on.set()
            bad = x.clone()
            bad[1] = float("nan")
        usual(other, bad, y, clipping)

    thread = threading.Thread(target=work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        thread.start()
        RecordedStep(model, losses, x, y, extensions=BatchGrad())
        thread.join()
    assert clipping.nonfinite == 1
    assert not blind()
    assert all(bool(torch.isfinite(p.clipped_sum).all()) for p in other.parameters())


TABLE = [case for case in cases.CASES if case.n > 1 and case.batch_dim == 0 and case.in_axes is None and not case.cut]
FIELDS = ("grad_batch", "batch_l2", "clipped_sum")


def of_table(case, **options):
    """Exact for every row of the table of rules, or refused."""
    model, inputs = case.build()
    inputs = map_tensors(torch.Tensor.detach, inputs)
    extend(model)
    extensions = [BatchGrad(), BatchL2Grad(), ClippedGrad(0.5)]
    try:
        step = RecordedStep(
            model, lambda *x: case.losses(case.run(model, x)), *inputs, extensions=extensions, **options
        )
    except (ConfigurationError, BatchAxisError) as refusal:
        error = str(refusal)
    else:
        error = ""
    if error:
        assert re.search("cannot be recorded|on the first axis", error)
        return
    for n in (case.n, case.n - 1):
        some = map_tensors(itemgetter(slice(n)), inputs)
        step(*some)
        found = fields(model, *FIELDS)
        extensions[-1].zero_grad()
        with perex(*extensions, loss_reduction="sum", grad=False):
            case.losses(case.run(model, some)).sum().backward()
        near(found, fields(model, *FIELDS), 1e-9)
        extensions[-1].zero_grad()


@pytest.mark.parametrize("case", TABLE[::5], ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore")
def test_rows_of_the_table_of_rules(case):
    of_table(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore")
def test_all_rows_of_the_table_of_rules(case):
    of_table(case)


def test_more_than_losses_may_be_returned():
    model, x, y = made()

    def losses(x, y):
        output = model(x)
        return F.cross_entropy(output, y, reduction="none"), output, {"right": output.argmax(1) == y}

    step = RecordedStep(model, losses, x, y, extensions=ClippedGrad(1.0))
    for some in (x[:4], x.clone().index_fill_(0, torch.tensor(1, device=DEVICE), float("nan"))[:4]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteExampleWarning)
            found = step(some, y[:4])
        with torch.no_grad():
            of_each, output, more = losses(some, y[:4])
        assert isinstance(found, tuple)
        assert not any(t.requires_grad for t in found[:2])
        torch.testing.assert_close(found, (of_each, output, more), equal_nan=True)
    assert step.repeated == 1
    for wrong in (lambda x, y: (losses(x, y)[0], losses(x, y)[0].mean()), lambda x, y: (losses(x, y)[0], x[:2])):
        with pytest.raises(LossError, match=r"returned \[.*\] behind the losses of 6 examples"):
            RecordedStep(model, wrong, x, y, extensions=ClippedGrad(1.0))
    frozen = [0.0]

    def counting(x, y):
        frozen[0] += 1
        return losses(x, y)[0], x + frozen[0]

    with pytest.raises(ConfigurationError, match="other losses in a second run, or other outputs"):
        RecordedStep(model, counting, x, y, extensions=ClippedGrad(1.0))


def test_pooling_to_one_pixel_where_channels_come_last():
    """Which gives what it has made other strides, in place."""
    last = torch.channels_last
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 11))
    model = extend(model.to(DEVICE, memory_format=last))
    x, y = images(N).to(DEVICE, memory_format=last), torch.randint(11, (N,), device=DEVICE)
    step = RecordedStep(model, per_class(model), x, y, extensions=BatchGrad())
    for n in (N, 2):
        step(x[:n], y[:n])
        found = fields(model, "grad_batch")
        usual(model, x[:n], y[:n], BatchGrad())
        near(found, fields(model, "grad_batch"))
    assert not step.repeated


def test_random_numbers_go_on_as_if_nothing_had_been_recorded():
    model, x, y = made()
    model.insert(1, nn.Dropout(0.5).to(DEVICE))
    extend(model)
    torch.manual_seed(5)
    wanted = torch.rand(3), torch.rand(3, device=DEVICE)
    torch.manual_seed(5)
    RecordedStep(model, per_class(model), x, y, extensions=ClippedGrad(1.0))
    assert torch.equal(torch.rand(3), wanted[0])
    assert torch.equal(torch.rand(3, device=DEVICE), wanted[1])


T, D = 5, 8


def last(h, lengths, ids):
    return h[torch.arange(len(h), device=h.device), lengths - 1]


def gathered(h, lengths, ids):
    return h.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, D))[:, 0]


def in_order(h, lengths, ids):
    return h.gather(1, h.argsort(1)).mul(torch.arange(T, device=h.device)[:, None]).sum(1)


def scattered(h, lengths, ids):
    where = (ids[..., None] % T).expand_as(h)
    return torch.zeros(len(h), T, D, device=h.device).scatter_add(1, where, h).square().sum(1)


def written(h, lengths, ids):
    out = torch.zeros(len(h), T, D, device=h.device)
    out[torch.arange(len(h), device=h.device)[:, None], ids % T] = h
    return out.cumsum(1).mean(1)


MOVES = {
    "last": last,
    "gathered": gathered,
    "in order": in_order,
    "taken": lambda h, lengths, ids: torch.take_along_dim(h, ids[..., None] % T, 1).mean(1),
    "selected": lambda h, lengths, ids: h.flatten(0, 1).index_select(
        0, torch.arange(len(h), device=h.device) * T + lengths - 1
    ),
    "scattered": scattered,
    "written": written,
    "rolled": lambda h, lengths, ids: h.sort(1, descending=True).values[:, :2].flatten(1)[:, :D],
}


class Moving(nn.Module):
    """Tokens in, one row for each text by what is done with their states."""

    def __init__(self, how):
        super().__init__()
        self.tokens, self.body, self.head, self.how = nn.Embedding(11, D), nn.Linear(D, D), nn.Linear(D, 11), how

    def forward(self, ids, lengths):
        return self.head(self.how(self.body(self.tokens(ids)), lengths, ids))


def texts(n, seed):
    torch.manual_seed(seed)
    return (torch.randint(11, (n, T)).to(DEVICE), torch.randint(1, T + 1, (n,)).to(DEVICE),
            torch.randint(11, (n,)).to(DEVICE))  # fmt: skip


def moving(how):
    torch.manual_seed(0)
    model = extend(Moving(how).to(DEVICE))
    return model, lambda ids, lengths, y: F.cross_entropy(model(ids, lengths), y, reduction="none")


def replayed_and_usual(step, model, losses, batch):
    """Losses and fields of the same batch both ways."""
    found = step(*batch)
    yield found, fields(model, "grad_batch", "batch_l2")
    with perex(BatchGrad(), BatchL2Grad(), loss_reduction="sum", grad=False):
        found = losses(*batch)
        found.sum().backward()
    yield found.detach(), fields(model, "grad_batch", "batch_l2")


@pytest.mark.parametrize("name", MOVES)
def test_entries_may_be_moved_as_the_data_say(name):
    model, losses = moving(MOVES[name])
    step = RecordedStep(model, losses, *texts(N, 1), extensions=[BatchGrad(), BatchL2Grad()])
    for n, seed in ((N, 2), (N, 3), (4, 4), (1, 5)):
        found, wanted = replayed_and_usual(step, model, losses, texts(n, seed))
        torch.testing.assert_close(found[0], wanted[0])
        near(found[1], wanted[1])
    assert step.repeated == 0


def by_numbers(h, lengths, ids):
    """Rows of those examples that the data name: of its own, if that is how it is."""
    return h[ids[:, 0]].mean(1)


def test_examples_that_change_places_are_seen():
    """The recording has them in their places; what is done otherwise is run as usual, and refused as usual."""
    model, losses = moving(by_numbers)
    own = texts(N, 1)
    own[0][:, 0] = torch.arange(N, device=DEVICE)
    step = RecordedStep(model, losses, *own, extensions=[BatchGrad(), BatchL2Grad()])
    again = texts(N, 2)
    again[0][:, 0] = torch.arange(N, device=DEVICE)
    found, wanted = replayed_and_usual(step, model, losses, again)
    torch.testing.assert_close(found[0], wanted[0])
    near(found[1], wanted[1])
    assert step.repeated == 0
    again[0][:2, 0] = torch.tensor([1, 0], device=DEVICE)
    with pytest.raises(CrossExampleError, match="another order"):
        step(*again)
    assert step.repeated == 1


def if_any(h, lengths, ids):
    if (lengths < T).any():
        h = h * (torch.arange(T, device=h.device) < lengths[:, None])[..., None]
    return h.mean(1) * 2


LOOKS = {
    "if": if_any,
    "a number": lambda h, lengths, ids: h[:, : int(lengths.max())].mean(1),
    "equal": lambda h, lengths, ids: h.mean(1) if torch.equal(ids[0], ids[1]) else h.sum(1),
    "one hot": lambda h, lengths, ids: torch.einsum("nt,ntd->nd", F.one_hot(lengths - 1, T).to(h), h),
    "a check": lambda h, lengths, ids: h.mean(1) if float(ids.max()) < 11 else h,
}


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA graph cannot be asked")
@pytest.mark.parametrize("name", LOOKS)
def test_what_a_model_looks_at_must_be_as_it_was(name):
    """All of it, and of whole batches; anything else is run as usual."""
    model, losses = moving(LOOKS[name])
    own = texts(N, 1)
    own[1][0], own[1][1], own[0][0, 0] = T, 1, 10
    step = RecordedStep(model, losses, *own, extensions=[BatchGrad(), BatchL2Grad()])
    expected = 0
    for change in ("none", "looks", "fewer"):
        batch = texts(N, 2)
        batch[1][0], batch[1][1], batch[0][0, 0] = T, 1, 10
        if change == "looks":
            batch[1].fill_(T if name == "if" else 3)
            batch[0].fill_(4)
        if change == "fewer":
            batch = tuple(t[:3] for t in batch)
        found, wanted = replayed_and_usual(step, model, losses, batch)
        expected += change != "none" and (name != "one hot" or DEVICE == "cpu")  # elsewhere kernels look, not torch
        assert step.repeated == expected, change
        torch.testing.assert_close(found[0], wanted[0])
        near(found[1], wanted[1])


def added(h, lengths, ids):
    """In rows of all positions; where none is added, a row belongs to nobody."""
    rows = torch.arange(len(h), device=h.device)[:, None] * T + ids % T
    out = torch.zeros(len(h) * T, D, device=h.device).index_add(0, rows.flatten(), h.flatten(0, 1))
    return out.unflatten(0, (-1, T)).square().sum(1)


def test_rows_of_nobody_are_those_of_the_recording():
    model, losses = moving(added)
    own = texts(N, 1)
    own[0].copy_(torch.arange(T, device=DEVICE) + T * (own[0] % 2))
    step = RecordedStep(model, losses, *own, extensions=[BatchGrad(), BatchL2Grad()])
    for repeated in (0, 1):
        batch = texts(N, 2)
        if not repeated:
            batch[0].copy_(torch.arange(T - 1, -1, -1, device=DEVICE))
        found, wanted = replayed_and_usual(step, model, losses, batch)
        torch.testing.assert_close(found[0], wanted[0])
        near(found[1], wanted[1])
        assert step.repeated == repeated
