"""Recorded steps and models with ``grad=True`` leave in ``p.grad`` what a backward without any of this leaves."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_recorded import DEVICE, MODELS, N, fields, made, near, per_class
from torch import nn

from perexample import (
    ConfigurationError,
    Extension,
    NonFiniteExampleWarning,
    RecordedModel,
    RecordedStep,
    StaleGradientError,
    extend,
    perex,
)
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

MANY = (N, 2, 5, 1, N)


def gradients(model):
    found = {(name, "grad"): p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plainly(model, x, y, loss):
    """Gradients of a loss, without anything of this library."""
    model.zero_grad()
    loss(model(x), y).backward()
    return gradients(model)


def step_of(model, x, y, *extensions, **how):
    return RecordedStep(model, per_class(model), x, y, extensions=extensions, grad=True, **how)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_step_leaves_gradients(name, reduction):
    model, x, y = made(name)
    norms = BatchL2Grad()
    step = step_of(model, x, y, norms, loss_reduction=reduction)
    for n in MANY:
        step(x[:n], y[:n])
        found, squared = gradients(model), fields(model, norms.field)
        near(found, plainly(model, x[:n], y[:n], lambda out, y: F.cross_entropy(out, y, reduction=reduction)))
        with perex(norms, loss_reduction=reduction, grad=False):
            F.cross_entropy(model(x[:n]), y[:n], reduction=reduction).backward()
        near(squared, fields(model, norms.field))
    assert not step.repeated


LOSSES = {
    "mean": ("mean", 1.0, F.cross_entropy),
    "sum": ("sum", 1.0, lambda out, y: F.cross_entropy(out, y, reduction="sum")),
    "scaled": ("mean", 64.0, lambda out, y: 64.0 * F.cross_entropy(out, y)),
    "of its own": ("mean", 1.0, lambda out, y: (out[:, 0].sigmoid() * out.square().mean(1)).mean()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_model_leaves_gradients(name, kind):
    model, x, y = made(name)
    reduction, scale, loss = LOSSES[kind]
    own, other = [[BatchGrad(), ClippedGrad(0.3)] for _ in range(2)]
    recorded = RecordedModel(model, x, extensions=own, grad=True)
    for n in MANY:
        with perex(*own, loss_reduction=reduction, loss_scale=scale):
            loss(recorded(x[:n]), y[:n]).backward()
        found, rows = gradients(model), fields(model, "grad_batch", "clipped_sum")
        near(found, plainly(model, x[:n], y[:n], loss))
        with perex(*other, loss_reduction=reduction, loss_scale=scale, grad=False):
            loss(model(x[:n]), y[:n]).backward()
        near(rows, fields(model, "grad_batch", "clipped_sum"))
        own[1].zero_grad(), other[1].zero_grad()
    assert not recorded.repeated


def calls_of(kind, model, x, y, extension, **how):
    """A function that takes a recorded step with p.grad of a mean, of one of two kinds; and what was recorded."""
    if kind is RecordedStep:
        step = step_of(model, x, y, extension, loss_reduction="mean", **how)
        return step, step
    recorded = RecordedModel(model, x, extensions=extension, grad=True, **how)

    def call(x, y):
        with perex(extension):
            out = recorded(x)
            (F.cross_entropy(out, y) if len(y) else out.sum()).backward()

    return call, recorded


KINDS = pytest.mark.parametrize("kind", [RecordedStep, RecordedModel])


@KINDS
def test_gradients_add_up_until_they_are_set_to_zero(kind):
    model, x, y = made()
    call, _ = calls_of(kind, model, x, y, BatchL2Grad())
    before = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    places = {}
    for name, p in model.named_parameters():
        p.grad = before[name].clone()
        places[name] = p.grad.data_ptr()
    call(x, y)
    call(x[:4], y[:4])
    assert places == {name: p.grad.data_ptr() for name, p in model.named_parameters()}
    found = gradients(model)
    whole, part = plainly(model, x, y, F.cross_entropy), plainly(model, x[:4], y[:4], F.cross_entropy)
    near(found, {key: before[key[0]] + whole[key] + part[key] for key in whole})


@KINDS
def test_gradients_that_were_there_when_it_was_recorded_stay(kind):
    model, x, y = made()
    kept = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = kept[name]
    calls_of(kind, model, x, y, BatchL2Grad())
    assert all(p.grad is kept[name] for name, p in model.named_parameters())


@KINDS
def test_a_gradient_that_is_kept_is_left_alone_by_later_steps(kind):
    model, x, y = made()
    call, _ = calls_of(kind, model, x, y, BatchL2Grad())
    call(x, y)
    first = {key: (g, g.clone()) for key, g in gradients(model).items()}
    call(x.flip(0) * 2, y)
    assert all(torch.equal(g, was) for g, was in first.values())


@KINDS
def test_a_training_is_the_same(kind):
    model, x, y = made("cnn")
    other = copy.deepcopy(model)
    call, _ = calls_of(kind, model, x, y, BatchL2Grad())
    own, usual = (torch.optim.Adam(m.parameters(), 0.01) for m in (model, other))
    for n in MANY:
        own.zero_grad(), usual.zero_grad()
        call(x[:n], y[:n])
        own.step()
        F.cross_entropy(other(x[:n]), y[:n]).backward()
        usual.step()
    near(dict(model.named_parameters()), dict(other.named_parameters()), 1e-3)


@KINDS
def test_what_has_no_gradient_gets_none(kind):
    model, x, y = made()
    model[0].weight.requires_grad_(False)
    call, _ = calls_of(kind, model, x, y, BatchL2Grad())
    call(x[:5], y[:5])
    assert model[0].weight.grad is None
    near(gradients(model), plainly(model, x[:5], y[:5], F.cross_entropy))


@KINDS
def test_no_example_at_all_gives_zeros(kind):
    model, x, y = made()
    call, _ = calls_of(kind, model, x, y, BatchL2Grad())
    call(x[:0], y[:0])
    assert all(not p.grad.count_nonzero() for p in model.parameters())


@KINDS
def test_what_is_run_as_usual_leaves_gradients_too(kind):
    model, x, y = made()
    call, recorded = calls_of(kind, model, x, y, BatchL2Grad())
    wrong = x.clone()
    wrong[1] = float("nan")
    call(wrong, y)
    assert recorded.repeated == 1
    assert all(p.grad.isnan().any() for p in model.parameters())
    model.zero_grad()
    more, labels = torch.cat([x, x * 2]), torch.cat([y, y])
    (recorded.as_usual if kind is RecordedStep else call)(more, labels)
    near(gradients(model), plainly(model, more, labels, F.cross_entropy))


def test_a_clipped_sum_without_an_example_that_is_not_finite_beside_its_gradient():
    """As in an ordinary step: the sum leaves the example out, the gradient is NaN."""
    model, x, y = made()
    clipping = ClippedGrad(1.0)
    call, recorded = calls_of(RecordedModel, model, x, y, clipping)
    x[1] = float("inf")
    with pytest.warns(NonFiniteExampleWarning):
        call(x, y)
    assert recorded.repeated == 1
    assert all(p.clipped_sum.isfinite().all() and not p.grad.isfinite().all() for p in model.parameters())


@KINDS
def test_fewer_examples_are_as_usual_where_those_of_the_recording_have_infinite_slopes(kind):
    """A loss of 0 at an infinite slope has a gradient of NaN, which a sum over all would show."""

    class Root(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs().sqrt()

    torch.manual_seed(0)
    model = extend(Root(3, 2, bias=False).to(DEVICE))
    x, y = torch.randn(4, 3).to(DEVICE), torch.randint(2, (4,)).to(DEVICE)
    x[3] = 0
    call, _ = calls_of(kind, model, x, y, BatchL2Grad())
    call(x[:3], y[:3])
    near(gradients(model), plainly(model, x[:3], y[:3], F.cross_entropy))


@KINDS
def test_hooks_that_wait_for_gradients_are_refused(kind):
    model, x, y = made()
    handle = model[0].bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ConfigurationError, match=r"`0.bias` has a hook .*register_post_accumulate_grad_hook"):
        calls_of(kind, model, x, y, BatchL2Grad())
    handle.remove()
    call, _ = calls_of(kind, model, x, y, BatchL2Grad())
    model[0].bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(StaleGradientError, match="has changed"):
        call(x, y)


def test_a_context_that_wants_something_else_is_an_error():
    model, x, y = made()
    norms = BatchL2Grad()
    without = RecordedModel(model, x, extensions=norms)
    recorded = RecordedModel(model, x, extensions=norms, grad=True)
    with perex(norms), pytest.raises(ConfigurationError, match=r"recorded without p.grad.*grad=False.*grad=True"):
        F.cross_entropy(without(x), y).backward()
    with perex(norms, grad=False), pytest.raises(ConfigurationError, match="grad=True, and perex has False"):
        F.cross_entropy(recorded(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_arguments_without_meaning():
    model, x, y = made()
    with pytest.raises(ConfigurationError, match="grad must be True or False"):
        RecordedStep(model, per_class(model), x, y, extensions=BatchL2Grad(), grad="mean")
    with pytest.raises(ConfigurationError, match="loss_reduction must be 'mean' or 'sum'"):
        step_of(model, x, y, BatchL2Grad(), loss_reduction="none")


class Nothing(Extension):
    """Asks for nothing, so that p.grad alone tells whether replays are right."""

    field = "nothing"

    def compute(self, view):
        return None


def test_gradients_that_depend_on_how_many_examples_there_are_are_refused():
    model, x, y = made()

    def losses(x, y):
        each = per_class(model)(x, y)
        return each.detach() + (each - each.detach()) / len(x)

    RecordedStep(model, losses, x, y, extensions=Nothing())
    with pytest.raises(ConfigurationError, match="other gradients of the loss"):
        RecordedStep(model, losses, x, y, extensions=Nothing(), grad=True)


@pytest.mark.skipif(DEVICE not in ("cpu", "cuda"), reason="the device that is made of the CPU has no sparse tensors")
@KINDS
def test_sparse_gradients_of_tables_stay_sparse(kind):
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 5)).to(DEVICE))
    x, y = torch.randint(9, (N, 3), device=DEVICE), torch.randint(5, (N,), device=DEVICE)
    call, recorded = calls_of(kind, model, x, y, BatchL2Grad())
    for n in MANY:
        call(x[:n], y[:n])
        assert model[0].weight.grad.is_sparse
        model[0].weight.grad = model[0].weight.grad.to_dense()
        near(gradients(model), dense(plainly(model, x[:n], y[:n], F.cross_entropy)))
    assert not recorded.repeated


def dense(found):
    return {key: g.to_dense() for key, g in found.items()}


def test_a_leaf_of_the_loss_gets_its_gradient():
    model, x, y = made()
    norms, scale = BatchL2Grad(), torch.tensor(1.5, requires_grad=True)
    recorded = RecordedModel(model, x, extensions=norms, grad=True)
    found = []
    for call in (recorded, model):
        with perex(norms):
            F.cross_entropy(call(x) * scale, y).backward()
        found.append((scale.grad.clone(), gradients(model)))
        scale.grad = None
    torch.testing.assert_close(found[0][0], found[1][0])
    near(found[0][1], found[1][1])


@KINDS
def test_a_warning_that_other_processes_do_not_take_part(kind, monkeypatch):
    model, x, y = made()
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.warns(UserWarning, match="p.grad is that of this process alone"):
        calls_of(kind, model, x, y, BatchL2Grad())
    RecordedStep(model, per_class(model), x, y, extensions=BatchL2Grad())  # without p.grad there is nothing to say
