"""Every rule in every option against one `torch.autograd.grad` per example, for every quantity at once."""

import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from perexample import Extension, extend, perex, registered_rules
from perexample._engine.backward import Backward
from perexample.extensions import (
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    SumGradSquared,
    Variance,
)
from perexample.rules import norm
from perexample.terms import Dense, Term, combine

TOLERANCE = 1e-10
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


def ids(case):
    return case.id


def wanted(gradients, case, bound):
    """All quantities from the reference gradients, by field and parameter."""
    return {
        "grad_batch": gradients,
        "batch_l2": {name: reference.batch_l2(g) for name, g in gradients.items()},
        "sum_grad_squared": {name: reference.sum_grad_squared(g) for name, g in gradients.items()},
        "variance": {name: reference.variance(g) for name, g in gradients.items()},
        "batch_dot": {name: reference.batch_dot(g) for name, g in gradients.items()},
        "clipped_sum": reference.clipped_sum(gradients, case.n, bound),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", cases.CASES, ids=ids)
def test_all_quantities(case, reduction):
    model, inputs = case.build()
    gradients = case.reference(model, inputs)
    bound = reference.bound_near_median(gradients, case.n)
    extend(model, batch_dim=case.batch_dim)
    extensions = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad(), ClippedGrad(bound)]
    for grad in (False, True):
        model.zero_grad()
        extensions[-1].zero_grad()
        with perex(*extensions, loss_reduction=reduction, grad=grad):
            case.loss(model, inputs, reduction).backward()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for field, by_name in wanted(gradients, case, bound).items():
            for name, p in named.items():
                reference.assert_close_report(getattr(p, field), by_name[name], TOLERANCE, f"{field} of {name}")
        for p in named.values():
            if not grad:
                assert p.grad is None, "grad=False leaves nothing behind"
    norms = reference.joint_norms(gradients, case.n)
    reference.assert_close_report(extensions[-1].norms, norms, TOLERANCE, "norms")
    same_as_a_plain_backward(case, named, reduction)


def same_as_a_plain_backward(case, named, reduction):
    """``p.grad`` next to the extensions is what torch computes without them."""
    plain, inputs = case.build()
    case.loss(plain, inputs, reduction).backward()
    for name, p in plain.named_parameters():
        if not p.requires_grad or not case.n:
            continue
        if p.grad is None:
            assert named[name].grad is None
        else:
            torch.testing.assert_close(named[name].grad.to_dense(), p.grad.to_dense(), rtol=1e-12, atol=1e-12)


class CompareTerms(Extension):
    """Compares what terms override with what `Term` derives from their gradients, in every form and selection."""

    field = "compared"
    joint = True

    def finish(self, views):
        for view in views:
            terms = list(view._terms)
            for term in [*terms, *([combine(terms)] if len(terms) > 1 else [])]:
                self.compare(term, view.name)
        return {}

    def compare(self, term, name):
        w = torch.linspace(-1, 2, term.n, dtype=torch.float64)
        rows = torch.arange(term.n) % 2 == 0
        plain = Dense(term.dense().clone())
        same_term(term, plain, w, name)
        same_term(term.select(rows), plain.select(rows), w[rows], f"{name}, selected")
        same_term(term.double(), plain, w, f"{name}, double")
        for method in term.methods():  # chosen by time, so each must do
            l2, kept = method.run()
            reference.assert_close_report(l2, plain.batch_l2(), TOLERANCE, f"norms of {name} by {method.name}")
            same_term(kept, plain, w, f"{name} after {method.name}")
            same_term(kept.select(rows), plain.select(rows), w[rows], f"{name} after {method.name}, selected")
        assert (term.magnitude() >= (1 - 1e-9) * plain.batch_l2().sqrt()).all()
        assert (term.magnitude_bound() >= (1 - 1e-9) * term.magnitude()).all()


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.n], ids=ids)
def test_fast_paths_are_the_defaults(case):
    model, inputs = case.build()
    extend(model, batch_dim=case.batch_dim)
    with perex(CompareTerms(), loss_reduction="sum", grad=False):
        case.loss(model, inputs, "sum").backward()


def same_term(term: Term, plain: Dense, w, what):
    assert isinstance(term, Term)
    assert term.n == plain.n
    reference.assert_close_report(term.dense(), plain.dense(), TOLERANCE, f"dense of {what}")
    reference.assert_close_report(term.batch_l2(), plain.batch_l2(), TOLERANCE, f"batch_l2 of {what}")
    for _ in range(2):  # before and after the norms: gradients formed for them may be reused
        found = term.weighted_sum(w)
        scale = (w.abs() * plain.batch_l2().sqrt()).sum().item()
        assert (found - plain.weighted_sum(w)).abs().max() <= TOLERANCE * max(scale, 1e-12), f"weighted_sum of {what}"
    reference.assert_close_report(term.batch_dot(), plain.batch_dot(), TOLERANCE, f"batch_dot of {what}")


def test_there_are_at_least_300_module_configurations():
    assert len(cases.MODULE_CASES) >= 300
    assert len({case.id for case in cases.CASES}) == len(cases.CASES)


def test_every_rule_has_a_case():
    covered = set()
    for case in cases.MODULE_CASES:
        covered |= {case.covers} | {type(module) for module in case.build(0)[0].modules()}
    missing = {cls.__name__ for cls in registered_rules() if cls.__module__.startswith("torch")} - {
        cls.__name__ for cls in covered if cls is not None
    }
    assert not missing, f"no case in tests/cases.py for {sorted(missing)}"


def through(layer, x, g):
    extend(layer)
    with perex(BatchGrad(), loss_reduction="sum", grad=False):
        (layer(x) * g).sum().backward()
    return layer.weight.grad_batch, layer.bias.grad_batch


GROUP_NORMS = {
    "plain": ((3, 8, 6, 5), 4, 0.0, True),
    "long": ((3, 8, 40, 40), 4, 0.0, True),  # summed in parts
    "3d": ((3, 8, 4, 3, 2), 4, 0.0, True),
    "flat": ((3, 8), 1, 0.0, True),
    "some-mean": ((3, 8, 30), 4, 2.0, True),
    "large-mean": ((3, 8, 900), 4, 200.0, True),  # the kernel alone is off by 5e-5
    "one-position": ((3, 8, 1, 1), 2, 0.0, True),  # contiguous in either order of the axes
    "one-position-3d": ((3, 8, 1, 1, 1), 2, 0.0, True),
    "no-parts": ((3, 8, 1031), 4, 0.0, False),  # a prime number
}


@pytest.mark.parametrize("name", GROUP_NORMS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_by_the_kernel_of_its_own_backward(name, channels_last, monkeypatch):
    shape, groups, mean, native = GROUP_NORMS[name]
    torch.manual_seed(0)
    x, g = torch.randn(shape) * 3 + 3 * mean, torch.randn(shape)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    found, used = norm._native_sums, []
    monkeypatch.setattr(norm, "_native_sums", lambda call, g: used.append(found(call, g)) or used[-1])
    single = through(nn.GroupNorm(groups, 8), x, g)
    assert len(used) == 1
    assert (used[0] is not None) == (native and x.is_contiguous())
    double = through(nn.GroupNorm(groups, 8).double(), x.double(), g.double())
    monkeypatch.setattr(norm, "_native_sums", lambda call, g: None)
    exact = through(nn.GroupNorm(groups, 8).double(), x.double(), g.double())
    for kind, one, other, wanted in zip(("weight", "bias"), single, double, exact, strict=True):
        reference.assert_close_report(other, wanted, 1e-12, kind)
        reference.assert_close_report(one.double(), wanted, 3e-6 if mean < 10 else 2e-5, f"{kind} in float32")


@pytest.mark.parametrize("shape", [(4, 1, 5, 3), (4, 1, 3, 4, 2), (4, 32, 1, 1)])
def test_group_norm_of_images_that_are_contiguous_with_channels_last_too(shape):
    """There torch's kernel would take another way, and crash, if it were given them as they are."""
    torch.manual_seed(0)
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    layer, x, g = nn.GroupNorm(1, shape[1]), torch.randn(shape).to(memory_format=order), torch.randn(shape)
    wanted = F.group_norm(x.double(), 1).mul(g.double()).flatten(2).sum(2)
    found = through(layer, x, g.to(memory_format=order))
    reference.assert_close_report(found[0].double(), wanted, 1e-5, "weight")


def test_group_norm_of_one_example_does_not_depend_on_the_mean_of_another():
    torch.manual_seed(0)
    x, g, found = torch.randn(3, 4, 9), torch.randn(3, 4, 9), []
    for mean in (0.0, 50.0, float("nan")):
        moved = x.clone()
        moved[2] += mean
        found.append(through(nn.GroupNorm(2, 4), moved, g))
    for kind in (0, 1):
        assert torch.equal(found[0][kind][:2], found[1][kind][:2])
        assert torch.equal(found[0][kind][:2], found[2][kind][:2])
    assert found[2][0][2].isnan().all()


def test_norm_layers_of_rows_that_no_example_has():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.group, self.layer = nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.LayerNorm(4)

        def forward(self, x):
            h = self.before(x)
            chosen = x[:, 0] > 9
            return h.index_put((chosen,), self.layer(self.group(h[chosen])))

    model = extend(Chosen())
    with perex(BatchGrad(), grad=False):
        model(torch.randn(3, 4)).square().sum(1).mean().backward()
    assert not model.group.weight.grad_batch.any()
    assert not model.layer.weight.grad_batch.any()
    assert model.before.weight.grad_batch.flatten(1).any(1).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_layer_norm_uses_the_statistics_of_its_forward(axis, monkeypatch):
    torch.manual_seed(0)
    layer, seen = extend(nn.LayerNorm(5), batch_dim=axis), []
    normalised = norm.LayerNormRule.normalised
    monkeypatch.setattr(
        norm.LayerNormRule, "normalised", lambda self, call: seen.append(dict(call.saved)) or normalised(self, call)
    )
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    layer.double()
    given, g = x.transpose(0, axis), torch.randn(3, 7, 5, dtype=torch.float64)
    with perex(BatchGrad(), loss_reduction="sum", grad=False):
        (layer(given) * g.transpose(0, axis)).sum().backward()
    assert [saved["rstd"].shape for saved in seen] == [(3, 7, 1)]
    wanted = (g * F.layer_norm(x, (5,))).sum(1)
    reference.assert_close_report(layer.weight.grad_batch, wanted, 1e-12, "weight")


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_layer_norm_with_the_statistics_of_its_forward(mean):
    torch.manual_seed(0)
    x, g = torch.randn(3, 7, 5) + mean, torch.randn(3, 7, 5)
    found = through(nn.LayerNorm(5), x, g)
    normalised = F.layer_norm(x.double(), (5,))
    reference.assert_close_report(
        found[0].double(), (g.double() * normalised).sum(1), 1e-6 if not mean else 1e-3, "weight"
    )
    reference.assert_close_report(found[1].double(), g.double().sum(1), 1e-6, "bias")


def assert_told(model, inputs, loss, batch_dim, monkeypatch):
    """What perex(max_memory=...) goes by; where more is held it warns, which is an error here."""
    told = []
    most = Backward._most_held
    monkeypatch.setattr(Backward, "_most_held", lambda self: told.append(most(self)) or told[-1])
    extend(model, batch_dim=batch_dim)
    for bound in (lambda: 1e15, lambda: told[0]):
        with perex(ClippedGrad(1.0), grad=False, max_memory=bound()):
            loss(model, inputs).backward()
    assert told[0] == told[1]


@pytest.mark.parametrize("case", cases.CASES, ids=ids)
def test_no_more_is_held_than_was_told(case, monkeypatch):
    model, inputs = case.build()
    assert_told(model, inputs, lambda m, x: case.loss(m, x, "mean"), case.batch_dim, monkeypatch)


class Chosen(nn.Module):
    """A layer on the tokens of unlike numbers for each example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 24)

    def forward(self, x):
        kept = torch.arange(x.shape[1]) < torch.tensor([1, 5, 1, 2])[:, None]
        return torch.zeros(*x.shape[:2], 24).masked_scatter(kept[:, :, None], self.layer(x[kept]).tanh())


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        lengths = torch.tensor([1, 5, 1, 2])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.ConvTranspose2d(1, 8, 3, padding=2), (4, 1, 4, 4)),  # most of the gradient is padding
        (Chosen, (4, 5, 16)),
        (Packed, (4, 5, 4)),
    ],
)
def test_no_more_is_held_than_was_told_where_much_is_filled_up(model, shape, monkeypatch):
    torch.manual_seed(0)
    assert_told(model(), torch.randn(shape), lambda m, x: m(x).square().flatten(1).sum(1).mean(), 0, monkeypatch)
