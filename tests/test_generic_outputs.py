"""The generic rule on modules with several outputs, and under activation checkpoints."""

import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from perexample import extend, perex
from perexample.extensions import BatchGrad, ClippedGrad

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Both:
    first: torch.Tensor
    second: torch.Tensor


class Two(torch.autograd.Function):
    """Not to be seen through."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w, x * x * w

    @staticmethod
    def backward(ctx, g, h):
        x, w = ctx.saved_tensors
        return g * w + 2 * h * x * w, (g * x + h * x * x).sum(0)


class Leaf(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.randn(4)), make

    def forward(self, x):
        return self.make(*Two.apply(x, self.weight))


class Net(nn.Module):
    def __init__(self, make, take):
        super().__init__()
        self.layer, self.leaf, self.take = nn.Linear(4, 4), Leaf(make), take

    def forward(self, x):
        first, second = self.take(self.leaf(self.layer(x)))
        return first.sin() + second


class Checkpointed(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)


def assert_exact(model, x, grad, scale=None):
    model, clipping = extend(model.double()), ClippedGrad(0.5)
    reduction = {"loss_reduction": "sum"} if scale is None else {}
    with perex(BatchGrad(), clipping, grad=grad, **reduction):
        losses = model(x).square().flatten(1).sum(1)
        (losses.sum() if scale is None else losses.mean()).backward()
    rows = []
    for one in x.split(1):
        grads = torch.autograd.grad(model(one).square().sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows)
    found = torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1)
    torch.testing.assert_close(found, rows)
    total = torch.cat([p.clipped_sum.flatten() for p in model.parameters()])
    torch.testing.assert_close(total, (0.5 / rows.norm(dim=1)).clamp(max=1) @ rows, rtol=1e-6, atol=1e-9)


MAKES = {
    "tuple": (lambda a, b: (a, b), lambda out: out),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda out: (out["a"], out["b"])),
    "namedtuple": (Pair, lambda out: out),
    "dataclass": (Both, lambda out: (out.first, out.second)),
}


@pytest.mark.parametrize(("make", "take"), MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("scale", [None, "mean"])
def test_several_outputs(make, take, grad, scale):
    assert_exact(Net(make, take), torch.randn(5, 4, dtype=torch.float64), grad, scale)


def one_output(a, b):
    return a.sin() + b


@pytest.mark.parametrize(
    "make",
    [
        lambda: Checkpointed(Leaf(one_output)),
        lambda: Checkpointed(nn.Sequential(Leaf(one_output))),
        lambda: Checkpointed(nn.Sequential(Leaf(one_output), nn.Linear(4, 4))),
        lambda: nn.Sequential(nn.Linear(4, 4), Checkpointed(Leaf(one_output))),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_a_checkpoint_around_a_module_that_is_given_the_data(make, grad):
    assert_exact(make(), torch.randn(5, 4, dtype=torch.float64), grad, "mean")
