"""A recorded model in an ordinary loop leaves what the model itself leaves, for any loss of its outputs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_recorded import DEVICE, MODELS, N, fields, made, near
from torch import nn
from torch.utils.hooks import RemovableHandle

from perexample import (
    BatchAxisError,
    ConfigurationError,
    CrossExampleError,
    LossError,
    NonFiniteExampleWarning,
    RecordedModel,
    StaleGradientError,
    extend,
    perex,
    privatize,
    unextend,
)
from perexample.extensions import (
    AdaptiveClippedGrad,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    SumGradSquared,
    Variance,
)

ALL = (BatchGrad, BatchL2Grad, BatchDotGrad, SumGradSquared, lambda: ClippedGrad(0.3))


def mean_loss(out, y):
    return F.cross_entropy(out, y) if len(y) else out.sum()


def backward(call, batch, *extensions, loss=mean_loss, reduction="mean", scale=1.0):
    x, y = batch
    with perex(*extensions, grad=False, loss_reduction=reduction, loss_scale=scale):
        out = call(x)
        (loss(out, y) * scale).backward()
    return out.detach().clone() if isinstance(out, torch.Tensor) else None


def both(model, x, y, batches, make=ALL, **how):
    """Fields of a recorded model and of the model itself, on some batches."""
    own, other = [one() for one in make], [one() for one in make]
    recorded = RecordedModel(model, x, extensions=own)
    names = [extension.field for extension in own]
    for batch in batches:
        out = backward(recorded, batch, *own, **how)
        found = fields(model, *names)
        expected = backward(model, batch, *other, **how)
        wanted = fields(model, *names)
        for extension in (*own, *other):
            if isinstance(extension, ClippedGrad):
                extension.zero_grad()
        yield (out, found), (expected, wanted), (own, other)
    assert not recorded.repeated


def agree(model, x, y, batches, make=ALL, **how):
    for (out, found), (expected, wanted), (own, other) in both(model, x, y, batches, make, **how):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        near(found, wanted, 1e-4)
        for a, b in zip(own, other, strict=True):
            if isinstance(a, ClippedGrad):
                torch.testing.assert_close(a.norms, b.norms, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_the_model_for_any_number_of_examples(name):
    model, x, y = made(name)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
    agree(model, x, y, [(x[order][:n], y[order][:n]) for n in (N, 4, 1, N, 0)])


@pytest.mark.parametrize("loss", [
    lambda out, y: (F.mse_loss(out, torch.ones_like(out), reduction="none").mean(1) * 3).mean(),
    lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1) + 0.1 * out.square().mean(),
    lambda out, y: torch.stack([F.cross_entropy(out[i], y[i]) for i in range(len(y))]).mean(),
    lambda out, y: -(out.log_softmax(1)[torch.arange(len(y)), y] * torch.linspace(0, 1, len(y), device=DEVICE)).mean(),
])  # fmt: skip
def test_losses_of_all_kinds(loss):
    model, x, y = made("cnn")
    agree(model, x, y, [(x, y), (x[:3], y[:3])], loss=loss)


def test_a_sum_of_losses():
    model, x, y = made()
    sum_loss = lambda out, y: F.cross_entropy(out, y, reduction="sum")  # noqa: E731
    agree(model, x, y, [(x, y), (x[:4], y[:4])], loss=sum_loss, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_on_the_loss_is_divided_out(dtype):
    model, x, y = made()
    model.to(dtype)
    own, other = [BatchL2Grad(), ClippedGrad(0.1)], [BatchL2Grad(), ClippedGrad(0.1)]
    recorded = RecordedModel(model, x.to(dtype), extensions=own)
    backward(recorded, (x.to(dtype), y), *own, scale=1024.0)
    found = fields(model, "clipped_sum", "batch_l2")
    backward(model, (x.to(dtype), y), *other, scale=1024.0)
    near(found, fields(model, "clipped_sum", "batch_l2"), 1e-4 if dtype == torch.float32 else 3e-2)
    assert recorded.repeated == (dtype != torch.float32)  # whose gradients would be rounded twice


def test_double_precision():
    model, x, y = made("cnn", torch.float64)
    for (_, found), (_, wanted), _ in both(model, x, y, [(x, y), (x[:2], y[:2])]):
        near(found, wanted, 1e-11)


class Several(nn.Module):
    """Returns a dictionary, of which a loss may use some: with gradients, without, and of other types."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(7, 9), nn.Linear(9, 11), nn.Linear(9, 3)

    def forward(self, x, shift=None, *, scale):
        h = self.body(x if shift is None else x + shift).tanh()
        out = self.head(h) * scale
        return {"out": out, "pair": (self.other(h), out.argmax(1)), "hidden": h, "kept": h.detach(), "none": None}


def test_outputs_in_a_structure_and_arguments_by_name():
    torch.manual_seed(0)
    model = extend(Several().to(DEVICE))
    x, scale, y = torch.randn(N, 7, device=DEVICE), torch.rand(N, 1, device=DEVICE), torch.randint(11, (N,)).to(DEVICE)
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, shift=x, scale=scale, extensions=own)
    for n in (N, 2):
        found = []
        for call, extension in ((recorded, own), (model, other)):
            with perex(extension, grad=False):
                got = call(x[:n], shift=x[:n], scale=scale[:n])
                assert got["pair"][1].dtype == torch.long
                assert not got["kept"].requires_grad
                assert got["none"] is None
                loss = F.cross_entropy(got["out"], y[:n]) + got["hidden"].square().mean()  # and not of "pair"
                loss.backward()
            found.append(fields(model, "clipped_sum"))
            extension.zero_grad()
        near(*found)
        assert not found[0]["other.weight", "clipped_sum"].any()
    assert torch.equal(recorded(x, scale=scale, shift=2 * x)["out"], recorded(x, shift=2 * x, scale=scale)["out"])
    with pytest.raises(BatchAxisError, match="RecordedModel was recorded with"):
        recorded(x, scale=scale)
    with pytest.raises(BatchAxisError, match=r"\{'shift': \[6, 7\] \(float32\), 'scale'.*called with \(\(\), \{'x'"):
        recorded(x=x, shift=x, scale=scale)
    with pytest.raises(BatchAxisError, match="RecordedModel was recorded with"):
        recorded(x[:, :3], shift=x, scale=scale)


def test_several_calls_may_wait_at_once():
    model, x, y = made("cnn")
    own, other = BatchGrad(), BatchGrad()
    recorded = RecordedModel(model, x, extensions=own)
    batches = [(x.roll(k, 0)[:n], y.roll(k, 0)[:n]) for k, n in ((0, N), (1, 3), (2, 5), (3, N))]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        waiting = [F.cross_entropy(recorded(x), y) for x, y in batches]
        for k in order:
            with perex(own, grad=False):
                waiting[k].backward()
            found = fields(model, "grad_batch")
            backward(model, batches[k], other)
            near(found, fields(model, "grad_batch"))


def test_sums_are_added_up_over_several_backwards():
    model, x, y = made()
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own)
    found = []
    for call, clipping in ((recorded, own), (model, other)):
        for n in (N, 3, 1):
            backward(call, (x[:n], y[:n]), clipping)
        found.append(fields(model, "clipped_sum"))
    near(*found)
    assert own.examples == other.examples == N + 4
    assert own.sensitivity() == other.sensitivity() == 0.3


def test_a_bound_may_change():
    model, x, y = made()
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own)
    own.max_norm = other.max_norm = 0.01
    backward(recorded, (x, y), own)
    found = fields(model, "clipped_sum")
    backward(model, (x, y), other)
    near(found, fields(model, "clipped_sum"))


@pytest.mark.parametrize(
    "make", [lambda: ClippedGrad(0.3, groups="per-module"), lambda: AdaptiveClippedGrad(0.3, expected_batch_size=N)]
)
def test_other_ways_of_clipping(make):
    model, x, y = made("cnn")
    agree(model, x, y, [(x, y), (x[:4], y[:4])], make=(make,))


def test_a_field_that_cannot_be_told_of_fewer_is_an_error():
    model, x, y = made()
    agree(model, x, y, [(x, y)], make=(Variance,))
    own = Variance()
    recorded = RecordedModel(model, x, extensions=own)
    from perexample import ExtensionError

    with pytest.raises(ExtensionError, match="Variance does not tell"):
        backward(recorded, (x[:3], y[:3]), own)


def test_more_examples_are_run_as_usual():
    model, x, y = made()
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x[:4], extensions=own)
    assert recorded.size == 4
    backward(recorded, (x, y), own)
    found = fields(model, "clipped_sum")
    backward(model, (x, y), other)
    near(found, fields(model, "clipped_sum"))
    assert recorded.repeated == 1


def test_a_warning_if_batches_are_often_larger():
    model, x, y = made()
    own = ClippedGrad(0.3)
    recorded = RecordedModel(model, x[:4], extensions=own)
    for k in range(10):
        with pytest.warns(UserWarning, match="6 in place of 4. Record it with more") if k == 9 else nullcontext():
            backward(recorded, (x[: 5 + k % 2], y[: 5 + k % 2]), own)


def test_values_that_a_replay_cannot_trust_are_run_as_usual():
    model, x, y = made("layers by positions")
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own)
    x = x.clone().index_fill_(0, torch.tensor(2, device=DEVICE), float("nan"))
    found = []
    for call, clipping in ((recorded, own), (model, other)):
        with perex(clipping, grad=False):
            loss = F.cross_entropy(call(x), y)
            with pytest.warns(NonFiniteExampleWarning), torch.no_grad():  # a backward may be called there too
                loss.backward()
        found.append(fields(model, "clipped_sum"))
        assert clipping.nonfinite == 1
    near(*found)
    assert all(t.isfinite().all() for t in found[0].values())
    assert recorded.repeated == 1
    backward(recorded, (x[:2], y[:2]), own)
    assert recorded.repeated == 1


def test_batches_are_brought_to_the_device():
    """Also those that are run as usual: with more examples, and again."""
    model, x, y = made()
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    own._warned = other._warned = True
    recorded = RecordedModel(model, x[:4].cpu(), extensions=own)
    spoiled = x.cpu().clone().index_fill_(0, torch.tensor(2), float("nan"))
    for batch in (x.cpu()[:4], x.cpu(), spoiled[:3]):
        backward(recorded, (batch, y[: len(batch)]), own)
        found = fields(model, "clipped_sum")
        own.zero_grad()
        backward(model, (batch.to(DEVICE), y[: len(batch)]), other)
        near(found, fields(model, "clipped_sum"))
        other.zero_grad()
    assert recorded.repeated == 2


@pytest.mark.parametrize("spoil", [False, True])
def test_dropout_is_that_of_the_model(spoil):
    """Also where a batch is run again, between which and its forward others may have drawn."""
    model, x, y = made()
    model.insert(1, nn.Dropout(0.5))
    extend(model.to(DEVICE))
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own)
    if spoil:
        x = x.clone().index_fill_(0, torch.tensor(2, device=DEVICE), float("nan"))
    found, after = [], []
    for call, clipping in ((recorded, own), (model, other)):
        torch.manual_seed(3)
        with perex(clipping, grad=False):
            out = call(x)
            torch.rand(5), torch.rand(5, device=DEVICE)
            clipping._warned = True
            F.cross_entropy(out, y).backward()
        found.append(fields(model, "clipped_sum"))
        after.append((torch.rand(2), torch.rand(2, device=DEVICE)))
    near(*found)
    assert recorded.repeated == spoil
    assert all(map(torch.equal, *after))


def test_outputs_may_be_written_to():
    """Those that the backward of the model needs are copied: a sigmoid is differentiated by what it gave."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(7, 11), nn.Sigmoid()).to(DEVICE))
    x = torch.randn(N, 7, device=DEVICE)
    own, other = BatchGrad(), BatchGrad()
    recorded = RecordedModel(model, x, extensions=own)
    for n in (N, 3):
        with perex(own, grad=False):
            out = recorded(x[:n])
            loss = (out * 2).square().mean()
            out.detach().zero_()
            loss.backward()
        found = [fields(model, "grad_batch")]
        with perex(own, grad=False):
            recorded(x[:n]).mul_(2).square().mean().backward()
        found.append(fields(model, "grad_batch"))
        with perex(other, grad=False):
            (model(x[:n]) * 2).square().mean().backward()
        for one in found:
            near(one, fields(model, "grad_batch"))


def test_other_tensors_of_the_loss_have_their_gradients():
    model, x, y = made()
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own)
    found = []
    for call, clipping in ((recorded, own), (model, other)):
        factor = torch.ones((), device=DEVICE, requires_grad=True)
        with perex(clipping, grad=False):
            F.cross_entropy(call(x) * factor, y).backward()
        found.append({"factor": factor.grad, **fields(model, "clipped_sum")})
    near(*found)


class Shown(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        return out[:, :5], out[:, 5:], x


def test_outputs_that_are_views_may_be_written_to():
    torch.manual_seed(0)
    model = extend(Shown(7, 11).to(DEVICE))
    x = torch.randn(N, 7, device=DEVICE)
    own, other = BatchGrad(), BatchGrad()
    recorded = RecordedModel(model, x, extensions=own)
    for n in (N, 3):
        found = []
        for call, extension in ((recorded, own), (model, other)):
            with perex(extension, grad=False):
                out, more, given = call(x[:n])
                if call is recorded:
                    out.mul_(2), given.zero_()
                else:  # where out and more are views of one
                    out = out * 2
                (out.square().sum(1) + more.sum(1)).mean().backward()
            found.append(fields(model, "grad_batch"))
        near(*found)
    assert x.any()


class Ordered(nn.Linear):
    def forward(self, *args, **kwargs):
        return super().forward(sum((k + 1) * t for k, t in enumerate((*args, *kwargs.values()))))


def test_arguments_whose_order_says_something_keep_it():
    model = extend(Ordered(7, 11).to(DEVICE))
    x = torch.randn(N, 7, device=DEVICE)
    recorded = RecordedModel(model, x, one=x, other=x, extensions=ClippedGrad(0.3))
    with pytest.raises(BatchAxisError, match=r"'one': .* called with .*'other': .*'one'"):
        recorded(x, other=x, one=x)


@dataclass
class Answer:
    out: torch.Tensor
    more: object = None


class Answering(nn.Linear):
    def forward(self, x):
        return Answer(super().forward(x), self.__dict__.get("extra"))


def test_outputs_in_a_dataclass():
    torch.manual_seed(0)
    model = extend(Answering(7, 11).to(DEVICE))
    x, y = torch.randn(N, 7, device=DEVICE), torch.randint(11, (N,), device=DEVICE)
    own, other = BatchGrad(), BatchGrad()
    recorded = RecordedModel(model, x, extensions=own)
    found = []
    for call, extension in ((recorded, own), (model, other)):
        backward(lambda x: call(x).out, (x[:4], y[:4]), extension)  # noqa: B023
        found.append(fields(model, "grad_batch"))
    near(*found)
    model.extra = 3
    with pytest.raises(ConfigurationError, match="returns 3, which"):
        RecordedModel(model, x, extensions=own)


def test_outputs_that_are_kept_hold_nothing_else():
    model, x, y = made()
    own = ClippedGrad(0.3)
    own._warned = True
    recorded = RecordedModel(model, x, extensions=own)
    spoiled = x.clone().index_fill_(0, torch.tensor(2, device=DEVICE), float("nan"))
    waiting = [x * 1, spoiled]
    del spoiled
    while waiting:
        values = waiting.pop()
        reference = weakref.ref(values)
        with perex(own, grad=False):
            out = recorded(values)
            F.cross_entropy(out, y).backward()
        del values
        gc.collect()
        assert reference() is None
        assert out.requires_grad


def test_it_cannot_be_copied_or_saved():
    model, x, _ = made()
    recorded = RecordedModel(model, x, extensions=ClippedGrad(0.3))
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigurationError, match="A RecordedModel cannot be copied or saved"):
            how(recorded)


def test_hooks_on_outputs_change_the_gradient():
    model, x, y = made()
    own, other = BatchGrad(), BatchGrad()
    recorded = RecordedModel(model, x, extensions=own)
    found = []
    for call, extension in ((recorded, own), (model, other)):
        with perex(extension, grad=False):
            out = call(x)
            out.register_hook(lambda g: g * 3)
            F.cross_entropy(out, y).backward()
        found.append(fields(model, "grad_batch"))
    near(*found)


def test_without_gradients_it_is_the_model():
    model, x, _ = made()
    model.append(nn.Dropout(0.5))
    extend(model.to(DEVICE))
    recorded = RecordedModel(model, x, extensions=ClippedGrad(1.0))
    model.eval()
    with torch.no_grad():
        assert torch.equal(recorded(x), model(x))
    with torch.inference_mode():
        assert torch.equal(recorded(torch.cat([x, x])), model(torch.cat([x, x])))
    with pytest.raises(StaleGradientError, match=r"`training` of .* has changed since the step was recorded"):
        recorded(x)


@pytest.mark.parametrize(("change", "match"), [
    (lambda model: model[0].weight.requires_grad_(False), "a parameter or buffer of `0`"),
    (lambda model: model[2].register_forward_hook(lambda *a: None), "a hook or the forward of `2`"),
    (lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight * 2)), "a parameter or buffer of `0`"),
    (lambda model: model.eval(), "`training`"),
])  # fmt: skip
def test_a_model_that_has_changed_is_an_error(change, match):
    model, x, _ = made()
    recorded = RecordedModel(model, x, extensions=ClippedGrad(1.0))
    change(model)
    with pytest.raises(StaleGradientError, match=match):
        recorded(x)


def test_what_changes_between_forward_and_backward_is_an_error():
    model, x, y = made()
    own = ClippedGrad(1.0)
    recorded = RecordedModel(model, x, extensions=own)
    for what, written in (("0.bias", model[0].bias), ("tensor that", x)):
        with perex(own, grad=False):
            loss = F.cross_entropy(recorded(x), y)
            with torch.no_grad():
                written.add_(1.0)
            with pytest.raises(StaleGradientError, match=what):
                loss.backward()
    with perex(own, grad=False):
        loss = F.cross_entropy(recorded(x), y)
        own.clip = lambda norms, bound: norms * 0
        with pytest.raises(StaleGradientError, match="`clip` of ClippedGrad has changed"):
            loss.backward()
    assert not hasattr(model[0].weight, "clipped_sum")


def test_a_parameter_that_is_unfrozen_before_the_backward_is_an_error():
    model, x, y = made()
    model[0].weight.requires_grad_(False)
    own = ClippedGrad(1.0)
    recorded = RecordedModel(model, x, extensions=own)
    with perex(own, grad=False):
        loss = F.cross_entropy(recorded(x), y)
        model[0].weight.requires_grad_(True)
        with pytest.raises(StaleGradientError, match=r"`0\.weight` is trainable, and was not when"):
            loss.backward()


class Fixed(nn.Module):
    """Has a frozen layer, of which the backward needs the weight alone, and a buffer that it needs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(7, 9), nn.Linear(9, 11).requires_grad_(False)
        self.register_buffer("factor", torch.ones(11))

    def forward(self, x):
        return self.head(self.body(x).tanh()) * self.factor


@pytest.mark.parametrize("name", ["head.weight", "factor"])
def test_what_is_frozen_must_stay_between_forward_and_backward(name):
    torch.manual_seed(0)
    model = extend(Fixed().to(DEVICE))
    x, y = torch.randn(N, 7, device=DEVICE), torch.randint(11, (N,), device=DEVICE)
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own)
    with perex(own, grad=False):
        loss = F.cross_entropy(recorded(x), y)
        with torch.no_grad():
            model.head.bias.add_(1.0)
        loss.backward()
        found = fields(model, "clipped_sum")
        loss = F.cross_entropy(recorded(x), y)
        with torch.no_grad():
            model.state_dict(keep_vars=True)[name].mul_(2.0)
        with pytest.raises(StaleGradientError, match=f"RecordedModel: `{name}` was changed in place between a forward"):
            loss.backward()
    with torch.no_grad():
        model.head.bias.sub_(1.0)
        model.state_dict(keep_vars=True)[name].div_(2.0)
    backward(model, (x, y), other)
    near(found, fields(model, "clipped_sum"))


@pytest.mark.parametrize(("change", "match"), [
    (lambda model: model.eval(), "`training` of Sequential has changed between a forward and its backward"),
    (lambda model: model[1].register_forward_hook(lambda *a: None), "a hook or the forward of `1`"),
    (lambda model: model[0].bias.add_(1), "`0.bias` was changed in place between"),
])  # fmt: skip
def test_a_call_that_is_run_again_is_that_of_the_forward(change, match):
    model, x, y = made()
    model[0].bias.requires_grad_(False)
    own = ClippedGrad(0.3)
    recorded = RecordedModel(model, x, extensions=own)
    for values in (x, x.clone().index_fill_(0, torch.tensor(2, device=DEVICE), float("nan"))):
        with perex(own, grad=False):
            loss = F.cross_entropy(recorded(values), y)
            undo = change(model)
            if values is x:
                loss.backward()  # which needs none of it
            else:
                with pytest.raises(StaleGradientError, match=match):
                    loss.backward()
        model.train()
        if isinstance(undo, RemovableHandle):
            undo.remove()


class Branches(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x):
        return tuple(model(x) for model in self.models)


def test_two_models_that_share_a_part_are_recorded_as_one():
    _, x, y = made()
    part = nn.Linear(x.shape[1], 4)
    one, other = (extend(nn.Sequential(part, nn.Tanh(), nn.Linear(4, 11))).to(DEVICE) for _ in range(2))
    with pytest.raises(
        ConfigurationError, match=r"which it shares parameters; give a module that holds .*whose forward"
    ):
        RecordedModel(one, x, extensions=BatchGrad())
    whole, extension = extend(Branches(one, other)), BatchGrad()
    recorded = RecordedModel(whole, x, extensions=extension)
    for index in (0, 1):
        backward(recorded, (x, y), extension, loss=lambda out, y, i=index: F.cross_entropy(out[i], y))
        own = fields(whole, extension.field)
        backward(whole, (x, y), extension, loss=lambda out, y, i=index: F.cross_entropy(out[i], y))
        near(own, fields(whole, extension.field))


def test_a_backward_that_is_not_the_one_recorded_is_an_error():
    (model, x, y), (other, *_) = made(), made()
    own = ClippedGrad(1.0)
    recorded = RecordedModel(model, x, extensions=own)

    def loss():
        return F.cross_entropy(recorded(x), y)

    with pytest.raises(ConfigurationError, match="in perex alone"):
        loss().backward()
    for p in model.parameters():  # whichever is asked for: without a node of its own it would be said to be unused
        with pytest.raises(ConfigurationError, match=r"torch.autograd.grad, call the model itself"):
            torch.autograd.grad(loss(), p, allow_unused=True)
    for context, match in (
        (perex(own), "recorded without p.grad"),
        (perex(ClippedGrad(1.0), grad=False), "other extensions"),
        (perex(own, BatchGrad(), grad=False), r"other extensions .*\(ClippedGrad\)"),
        (perex(own, grad=False, max_memory=1e9), "max_memory"),
        (perex(own, grad=False, room=3.0), "recorded with room=1.6, and perex has 3.0"),
    ):
        with context, pytest.raises(ConfigurationError, match=match):
            loss().backward()
    with perex(own, grad=False):
        with pytest.raises(ConfigurationError, match="several calls of a RecordedModel"):
            (loss() + loss()).backward()
        with pytest.raises(ConfigurationError, match="can be differentiated once"):
            loss().backward(retain_graph=True)
        with pytest.raises(ConfigurationError, match="and other extended models"):
            (loss() + F.cross_entropy(other(x), y)).backward()
    assert not hasattr(model[0].weight, "clipped_sum")


def test_a_second_backward_is_an_error():
    model, x, y = made()
    own = ClippedGrad(1.0)
    recorded = RecordedModel(model, x, extensions=own)
    with perex(own, grad=False):
        out = recorded(x)
        F.cross_entropy(out, y).backward()
        with pytest.raises(LossError, match="used by an earlier backward"):
            out.square().mean().backward()


def test_losses_that_join_examples_wrongly_are_errors():
    model, x, y = made()
    own = ClippedGrad(1.0)
    recorded = RecordedModel(model, x, extensions=own)
    for loss, kind in (
        (lambda out: F.cross_entropy(out, y, reduction="sum"), LossError),
        (lambda out: F.cross_entropy(out, y).sqrt(), LossError),
        (lambda out: (out @ out.T).log_softmax(1).diagonal().mean(), CrossExampleError),
        (lambda out: ((out - out.mean(0)) ** 2).mean(), CrossExampleError),
        (lambda out: (out[:, :1] - y.float()).square().mean(), CrossExampleError),
    ):
        with perex(own, grad=False), pytest.raises(kind):
            loss(recorded(x)).backward()


class Looking(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > 0 else 3)


class Knows(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if self.weight.sum() > 0 else 3)


class Scalar(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean()


class Frozen(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(("kind", "repeated"), [(Looking, (0, 1, 2, 2)), (Knows, (0, 0, 0, 1))])
def test_models_that_look_at_values(kind, repeated):
    """Where a call would see others it is that of the model, whose outputs are other ones."""
    torch.manual_seed(0)
    model = extend(kind(7, 11).to(DEVICE))
    x, y = torch.rand(N, 7, device=DEVICE), torch.randint(11, (N,), device=DEVICE)
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    with torch.no_grad():
        model.weight.abs_()
    recorded = RecordedModel(model, x, extensions=own)
    for batch, sign, count in zip((x, -x, x[:3], x), (1, 1, 1, -1), repeated, strict=True):
        with torch.no_grad():
            model.weight.mul_(sign)
        outputs, found = [], []
        for call, clipping in ((recorded, own), (model, other)):
            outputs.append(backward(call, (batch, y[: len(batch)]), clipping))
            found.append(fields(model, "clipped_sum"))
            clipping.zero_grad()
        torch.testing.assert_close(*outputs)
        near(*found)
        assert recorded.repeated == count


class Caching(nn.Linear):
    def forward(self, x):
        return super().forward(x), object()


@pytest.mark.parametrize(("kind", "match"), [
    (Scalar, "examples on the first axis"), (Caching, "returns a object, which would be that of the recording"),
    (Frozen, "no output of the model carries gradients"),
])  # fmt: skip
def test_models_that_cannot_be_recorded(kind, match):
    model = extend(kind(7, 11).to(DEVICE))
    with pytest.raises(ConfigurationError, match=match):
        RecordedModel(model, torch.randn(N, 7, device=DEVICE), extensions=BatchGrad())


class Masked(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x * mask)


def test_what_is_not_to_be_recorded():
    x = torch.randn(N, 7, device=DEVICE)
    with pytest.raises(ConfigurationError, match=r"call extend\(model\) before"):
        RecordedModel(nn.Linear(7, 2).to(DEVICE), x, extensions=BatchGrad())
    with pytest.raises(ConfigurationError, match="batch_dim=1"):
        RecordedModel(extend(nn.Linear(7, 2).to(DEVICE), batch_dim=1), x, extensions=BatchGrad())
    with pytest.raises(ConfigurationError, match=r"takes a torch\.nn\.Module, not function"):
        RecordedModel(lambda x: x, x, extensions=BatchGrad())
    whole = extend(nn.Sequential(nn.Linear(7, 2)).to(DEVICE))
    with pytest.raises(ConfigurationError, match="takes the model that was extended"):
        RecordedModel(whole[0], x, extensions=BatchGrad())
    recorded = RecordedModel(whole, x, extensions=BatchGrad())
    with pytest.raises(AttributeError, match=r"has no `parameters`; ask its model: recorded\.model\.parameters"):
        recorded.parameters()
    with pytest.raises(BatchAxisError, match=r"was given \[6, 7\] .*, \[7\] .* What all examples share"):
        RecordedModel(extend(Masked(7, 2).to(DEVICE)), x, x[0], extensions=BatchGrad())
    with pytest.raises(ConfigurationError, match="leaves no gradients of its inputs"):
        recorded(x.clone().requires_grad_())

    class Holds(nn.Module):
        def forward(self, x):
            return recorded(x)

    holds = Holds()
    holds.layer = whole
    with pytest.raises(ConfigurationError, match="inside of another extended model"):
        extend(holds)(x)


def test_autocast_goes_with_the_recording():
    model, x, y = made()
    own, other = ClippedGrad(0.3), ClippedGrad(0.3)
    cast = torch.autocast("cpu", torch.bfloat16)
    if torch.device(DEVICE).type != "cpu":
        pytest.skip("the tests' device has no bfloat16 of its own")
    with cast:
        recorded = RecordedModel(model, x, extensions=own)
    with pytest.raises(StaleGradientError, match="autocast"):
        recorded(x)
    found = []
    for values in (x, x.clone().index_fill_(0, torch.tensor(2), float("nan"))):
        for call, clipping in ((recorded, own), (model, other)):
            clipping._warned = True
            with perex(clipping, grad=False):
                with cast:
                    out = call(values)
                assert out.dtype == torch.bfloat16
                F.cross_entropy(out.float(), y).backward()
            found.append(fields(model, "clipped_sum"))
            clipping.zero_grad()
        near(*found[-2:], 1e-2)
    assert recorded.repeated == 1


def test_private_training_with_a_recorded_model():
    model, x, y = made("cnn")
    other = extend(copy.deepcopy(unextend(model)))
    extend(model)
    for m in (model, other):
        clipping = ClippedGrad(0.3)
        optimizer = privatize(
            torch.optim.SGD(m.parameters(), 0.1), clipping=clipping, noise_multiplier=1.0, expected_batch_size=N,
            generator=torch.Generator(DEVICE).manual_seed(1),
        )  # fmt: skip
        call = RecordedModel(m, x, extensions=clipping) if m is model else m
        for n in (N, 4, 5):
            optimizer.zero_grad()
            with perex(clipping, grad=False):
                F.cross_entropy(call(x[:n]), y[:n]).backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_call_without_a_backward_leaves_nothing_behind():
    model, x, _ = made()
    recorded = RecordedModel(model, x, extensions=ClippedGrad(1.0))
    out = recorded(x)
    tap = next(iter(out.grad_fn.metadata.values()))
    reference = weakref.ref(next(iter(tap.values()))[0] if isinstance(tap, dict) else out.grad_fn)
    del out, tap
    gc.collect()
    assert reference() is None
