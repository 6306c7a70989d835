"""An example that is not finite spoils its own row only, also where the whole batch is differentiated at once."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perexample import GenericRule, extend, perex, register_rule
from perexample.extensions import BatchGrad, ClippedGrad

BAD = [float("nan"), float("inf"), -float("inf")]


class Queries(nn.Module):
    """Learned queries that look at the data, as in Perceiver, Q-Former and DETR."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 6))
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.attention(self.queries.expand(len(x), -1, -1), x, x, need_weights=False)[0])


class Expanded(nn.Module):
    """A function that is given one copy of the weight for each example."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return torch.baddbmm(x[..., :2], x, self.weight.expand(len(x), -1, -1)).exp()


class Drawn(nn.Module):
    """The same, and random numbers are drawn."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(1, 1, 5, 6))

    def forward(self, x):
        return F.scaled_dot_product_attention(x[:, None], self.keys, self.keys, dropout_p=0.3)


class Times(torch.autograd.Function):
    """Not to be seen through."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w, (g * x * x).flatten(0, -2).sum(0)


class Opaque(nn.Module):
    """A leaf with such a function."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return Times.apply(x, self.weight)


class Noisy(nn.Module):
    """Handled by the generic rule, with random numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return F.dropout(self.layer(x), 0.3).square()


register_rule(Noisy)(GenericRule)


def sums(model, x):
    clipping = ClippedGrad(1.0)
    torch.manual_seed(1)
    with perex(clipping, BatchGrad(), grad=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x).square().flatten(1).sum(1).mean().backward()
    rows = torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1)
    return torch.cat([p.clipped_sum.flatten() for p in model.parameters()]), rows, clipping


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", [Queries, Expanded, Drawn, Opaque, Noisy])
@pytest.mark.parametrize("n", [3, 7, 33])
def test_the_rows_of_the_others_stay(make, n, bad):
    torch.manual_seed(0)
    model, x = extend(make().double()), torch.randn(n, 5, 6, dtype=torch.float64)
    _, rows, clipping = sums(model, x)
    assert clipping.nonfinite == 0
    x[1, 2, 3] = bad
    total, spoiled, clipping = sums(model, x)
    others = torch.arange(n) != 1
    assert clipping.nonfinite == 1
    assert not spoiled[1].isfinite().all()
    torch.testing.assert_close(spoiled[others], rows[others])
    scale = (1 / rows[others].norm(dim=1)).clamp(max=1)
    torch.testing.assert_close(total, scale @ rows[others], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [Queries, Expanded, Drawn, Opaque, Noisy])
def test_where_all_are_spoiled_none_is_left(make):
    model = extend(make())
    total, _, clipping = sums(model, torch.full((4, 5, 6), torch.nan))
    assert clipping.nonfinite == 4
    assert not total.any()


def test_a_module_that_draws_no_numbers_is_repeated_example_by_example(monkeypatch):
    def refuse(*_):
        raise AssertionError("the whole batch was pulled back for each example")

    monkeypatch.setattr(GenericRule, "_masked", refuse)
    assert sums(extend(Opaque()), torch.randn(4, 5, 6))[1].isfinite().all()
