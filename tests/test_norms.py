"""Norms and sums in float32: long sums of like products, layouts, and sums that overflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perexample import extend, perex
from perexample._engine.view import ParameterView, Weights
from perexample._norms import norms_of, norms_of_each, short_drift, short_sums
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad
from perexample.terms import Outer

LIKE = torch.linspace(0.05, 1, 25)  # each rounds in another way


@pytest.mark.parametrize("length", [64, 128, 300, 512, 1000, 4096, 10_000])
@pytest.mark.parametrize(("o", "i"), [(1, 1), (1, 8), (8, 1), (2, 2), (40, 30)])
def test_no_kernel_drifts_more_than_norms_are_raised(length, o, i):
    left = LIKE.view(-1, 1, 1).expand(-1, o, length).contiguous()
    true = LIKE.double().view(-1, 1, 1) * length
    for at_hand in (None, torch.empty(len(LIKE), o, i)):
        found = short_sums(left, torch.ones(len(LIKE), length, i), at_hand)
        assert ((found - true).abs() / true).max() <= short_drift(length, torch.float32)


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("length", [300, 4096])
def test_norms_of_like_positions_are_not_too_small(outputs, length):
    """A product with a single row is a vector's, whose kernel goes on from what it is added to."""
    layer = extend(nn.Linear(8, outputs, bias=False))
    with perex(BatchL2Grad(), strategy="model"):
        (layer(torch.ones(len(LIKE), length, 8)).sum((1, 2)) * LIKE).mean().backward()
    ratio = layer.weight.batch_l2.sqrt() / (LIKE.double() * length * (8 * outputs) ** 0.5)
    assert (ratio - 1).min() > -1e-6
    assert (ratio - 1).max() < 1e-5


def test_norms_over_all_axes_however_they_lie():
    t = torch.randn(5, 1, 7, 40)
    true = torch.linalg.vector_norm(t.double().flatten(1), dim=1)
    for laid in (t, t.transpose(0, 2).contiguous().transpose(0, 2), t.expand(5, 1, 7, 40)[:, :, ::2].contiguous()):
        same = true if laid.shape == t.shape else torch.linalg.vector_norm(laid.double().flatten(1), dim=1)
        torch.testing.assert_close(norms_of_each(laid), same, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms_of(t).square().sum((1, 2)).sqrt(), true, rtol=1e-6, atol=0)


def time_first(t: Tensor) -> Tensor:
    """The same numbers with the examples of one time side by side."""
    return t.transpose(0, 2).contiguous().transpose(0, 2)


@pytest.mark.parametrize(("o", "i"), [(3, 7), (7, 3), (4, 4)])
@pytest.mark.parametrize("of_g", [time_first, lambda t: t, lambda t: t.mT.contiguous().mT])
@pytest.mark.parametrize("of_x", [time_first, lambda t: t, lambda t: t[:, :, :1].expand(t.shape)])
def test_weighted_sums_of_factors_in_any_layout(o, i, of_g, of_x):
    g, x, w = of_g(torch.randn(5, 1, 6, o)), of_x(torch.randn(5, 1, 6, i)), torch.rand(5)
    true = torch.einsum("n,nto,nti->oi", *(t.double() for t in (w, g[:, 0], x[:, 0])))
    found = Outer(g, x, torch.Size((o, i))).weighted_sum(w)
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


class Seen(nn.Module):
    """Keeps what its output's gradient was when the layer had it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x.register_hook(lambda g: setattr(self, "of_input", g))
        return self.inner(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_upstream_gradients_that_lie_otherwise(bias, grad):
    """Tokens' cross-entropy gives the output layer a transposed gradient, which is copied once for autograd and us."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Seen(nn.Linear(4, 9, bias=bias)))
    x, y = torch.randn(5, 7, 6), torch.randint(9, (5, 7))

    def loss() -> Tensor:
        return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1).mean()

    loss().backward()
    plain, of_input = [p.grad for p in model.parameters()], model[1].of_input
    model.zero_grad()
    extend(model)
    with perex(BatchGrad(), BatchL2Grad(), grad=grad):
        loss().backward()
    for p, known in zip(model.parameters(), plain, strict=True):
        assert grad == (p.grad is not None)
        if grad:
            torch.testing.assert_close(p.grad, known, rtol=0, atol=0)
        torch.testing.assert_close(p.grad_batch.mean(0), known)
        torch.testing.assert_close(p.batch_l2, p.grad_batch.flatten(1).square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(model[1].of_input * (1 if grad else 1 / 5), of_input)


def test_hooks_see_upstream_gradients_as_they_are():
    """What is laid out anew is the same numbers, for hooks before and after, and for what retains gradients."""
    layer, seen = extend(nn.Linear(4, 9, bias=False)), []
    x = torch.randn(5, 7, 4)
    with perex(BatchGrad()):
        y = layer(x)
        y.retain_grad()
        y.register_hook(seen.append)
        (y.transpose(1, 2) * torch.arange(7.0)).sum((1, 2)).mean().backward()
    true = (torch.arange(7.0) / 5)[None, :, None].expand(5, 7, 9)
    torch.testing.assert_close(y.grad, true)
    torch.testing.assert_close(seen[0], true)


def test_hooks_may_still_change_upstream_gradients():
    layer = extend(nn.Linear(4, 9, bias=False))
    x = torch.randn(5, 7, 4)
    with perex(BatchGrad()):
        y = layer(x)
        y.register_hook(lambda g: 2 * g)
        y.transpose(1, 2).sum((1, 2)).mean().backward()
    true = 2 * x.sum(1)[:, None, :].expand(5, 9, 4)
    torch.testing.assert_close(layer.weight.grad_batch, true)


def view_of(g: Tensor, x: Tensor, scale: float = 1.0) -> ParameterView:
    """A view of a weight with one position of each example."""
    view = ParameterView("weight", torch.empty(g.shape[1], x.shape[1]), len(g), scale)
    view.add(Outer(g[:, None, None], x[:, None, None], view.param.shape))
    return view


def test_sums_are_looked_at_only_where_they_may_overflow(monkeypatch):
    looked = []
    monkeypatch.setattr("perexample._engine.view._finite", lambda total: looked.append(1) or True)
    g, x = torch.randn(4, 3), torch.randn(4, 2)

    def looks(w: Weights, *, norms: bool = True, scale: float = 1.0) -> bool:
        looked.clear()
        view = view_of(g, x, scale)
        if norms:
            view.batch_l2()
        view.weighted_sum(w)
        return bool(looked)

    ones = torch.ones(4)
    assert not looks(Weights(ones, most=1.0))
    assert looks(Weights(ones))  # nothing is known of the norms
    assert looks(Weights(ones, most=1e30))
    assert looks(Weights(2 * ones, most=1.0))  # a factor times a weight may overflow
    assert looks(Weights(ones, most=1.0), scale=2.0)
    assert looks(Weights(ones, most=1.0), norms=False)  # nor whether they can be trusted


@pytest.mark.parametrize("scale", [1e38, 1e30, 1.0, 1e-30])
@pytest.mark.parametrize("clip", ["flat", "automatic"])
@pytest.mark.parametrize("positions", [1, 3])
def test_clipped_sums_of_gradients_near_the_end_of_float32(scale, clip, positions):
    """Sums stay finite and exact, whatever the factors are."""
    torch.manual_seed(0)
    layer, clipping = nn.Linear(4, 3, bias=False), ClippedGrad(2.0, clip=clip)
    extend(layer)
    x, up = torch.randn(6, positions, 4), torch.randn(6, positions, 3).sign() * scale
    with perex(clipping, grad=False):
        (layer(x) * up).sum((1, 2)).mean().backward()
    rows = torch.einsum("nto,nti->noi", up.double(), x.double())
    norms = rows.flatten(1).norm(dim=1)
    factors = (2.0 / norms).clamp_max(1.0) if clip == "flat" else 2.0 / (norms + 0.01)
    true = (factors[:, None, None] * rows).sum(0)
    torch.testing.assert_close(layer.weight.clipped_sum.double(), true, rtol=1e-4, atol=2e-5 * min(1.0, scale))
