"""Operations and modules that take a short way through the engine, and those beside them that must not."""

import pytest
import reference
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perexample import (
    CrossExampleError,
    GenericRule,
    UnsupportedModuleError,
    extend,
    perex,
    register_rule,
)
from perexample.extensions import BatchGrad


class Step(nn.Module):
    """A layer, and a function of what it gives."""

    def __init__(self, function, size=4):
        super().__init__()
        self.layer, self.function = nn.Linear(4, size), function

    def forward(self, x):
        return self.function(self.layer(x))


def losses(model, x):
    return model(x).square().flatten(1).sum(1)


def assert_exact(model, n=4):
    torch.manual_seed(0)
    model, x = extend(model.double()), torch.randn(n, 4, dtype=torch.float64)
    with perex(BatchGrad(), grad=False):
        losses(model, x).mean().backward()
    for name, p in model.named_parameters():
        rows = [torch.autograd.grad(losses(model, row[None]).sum(), p)[0] for row in x]
        reference.assert_close_report(p.grad_batch, torch.stack(rows), 1e-12, name)


def written_after_a_view(h):
    """The view was made before the write, and shows what was written."""
    h = h.clone()
    view = h[:, :2]
    h.add_(h.detach().clone().T)
    return view


@pytest.mark.parametrize(
    "mixes",
    [
        lambda h: h + h.transpose(0, 1),
        lambda h: h * h.mT,
        lambda h: h + h.flip(0),
        lambda h: torch.where(h > 0, h, h.T),
        written_after_a_view,
    ],
)
def test_places_that_differ_are_seen(mixes):
    """N is the number of features, so that shapes tell nothing."""
    model, x = extend(Step(mixes)), torch.randn(4, 4)
    with pytest.raises(CrossExampleError), perex(BatchGrad()):
        losses(model, x).mean().backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.t().relu().t(),
        lambda h: (h + h.sigmoid()).view(-1, 2, 2).permute(2, 0, 1).tanh().permute(1, 2, 0),
        lambda h: h.unflatten(1, (2, 2)).transpose(1, 2).reshape(-1, 4) * h,
        lambda h: h[:, None].expand(-1, 3, -1) + h[:, :1, None],
        lambda h: nn.functional.silu(h.clone(), inplace=True),
        lambda h: torch.cat([h, h.exp()], 1).unbind(1)[3][:, None] * h,
    ],
)
@pytest.mark.parametrize("n", [1, 4])
def test_operations_of_data_alone(function, n):
    assert_exact(Step(function), n)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Identity()), nn.Linear(4, 4)

    def inner(self, h):
        return self.last(self.between(h)) * h

    def outer(self, x):
        h = self.between(self.first(x)) * 2
        return checkpoint(self.inner, self.between(h), use_reentrant=False)

    def forward(self, x):
        return checkpoint(self.outer, x, use_reentrant=False)


def test_modules_and_operations_between_two_checkpoints():
    assert_exact(Nested())


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_modules_that_own_nothing(hook):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    for module in (model[1], model[2], model[2][1]):
        getattr(module, hook)(lambda *_: None)
    assert_exact(model)


class Seventh(nn.Sequential):
    pass


@register_rule(Seventh)
class SevenRule(GenericRule):
    def grad_batch(self, call, g):
        return {name: p.new_full((call.n, *p.shape), 7.0) for name, p in call.params.items()}


def test_a_rule_of_a_module_that_owns_nothing_itself_is_asked():
    model = extend(nn.Sequential(Seventh(nn.Linear(4, 4)), nn.Tanh()))
    with perex(BatchGrad()):
        losses(model, torch.randn(4, 4)).mean().backward()
    assert all((p.grad_batch == 4 * 7).all() for p in model.parameters())  # of the sum, N times that of the mean


class Keeping(nn.Sequential):
    def forward(self, x):
        self.register_buffer("seen", x.detach().mean(0))
        return super().forward(x)


def test_a_buffer_that_a_module_makes_of_data():
    model, x = extend(nn.Sequential(nn.Linear(4, 4), Keeping(nn.Linear(4, 4)))), torch.randn(4, 4)
    with pytest.raises(UnsupportedModuleError, match=r"`1` .*buffer `seen`"), perex(BatchGrad()):
        losses(model, x).mean().backward()


class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        loss = self.layer(x).square().sum(1).mean()
        loss.backward()
        return loss.detach()


def test_a_backward_inside_of_a_forward_is_the_contexts():
    model, x = extend(Greedy()), torch.randn(4, 4)
    with perex(BatchGrad()):
        model(x)
    torch.testing.assert_close(model.layer.weight.grad_batch.mean(0), model.layer.weight.grad)
