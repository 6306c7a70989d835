"""Outputs [N, 1] beside targets [N] are errors: every output would meet every target, and no derivative shows it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perexample import CrossExampleError, check, extend, perex
from perexample.extensions import BatchGrad, ClippedGrad

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")
N = 8
FUSED = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "poisson": F.poisson_nll_loss,
    "gaussian": lambda z, y: F.gaussian_nll_loss(z, y, torch.ones_like(y)),
    "kl": lambda z, y: F.kl_div(z, y, reduction="sum") / len(y),
    "mse of each": lambda z, y: F.mse_loss(z, y, reduction="none").mean(),
}
BY_HAND = {
    "square": lambda z, y: ((z - y) ** 2).mean(),
    "product": lambda z, y: (z * y).mean(),
    "by rows": lambda z, y: (z - y).square().mean(1).mean(),
    "log": lambda z, y: -(y * F.logsigmoid(z)).mean(),
    "where": lambda z, y: torch.where(y > 0.5, z, -z).mean(),
    "row": lambda z, y: (z[:, 0] - y[:, None]).square().mean(),
    "hypot": lambda z, y: torch.hypot(z, y).mean(),
    "outer": lambda z, y: torch.outer(z[:, 0], y).square().mean(),
    "in place": lambda z, y: z.repeat(1, 2)[:, :1].sub(y).square_().mean(),
    "distribution": lambda z, y: -torch.distributions.Normal(z, 1.0).log_prob(y).mean(),
}


class Own(nn.Module):
    """A model that computes its own loss."""

    def __init__(self, loss):
        super().__init__()
        self.linear, self.loss = nn.Linear(4, 1), loss

    def forward(self, x, y):
        return self.loss(self.linear(x), y)


def backward(model, loss, n=N):
    with perex(ClippedGrad(1.0), grad=False):
        loss(model(torch.randn(n, 4)), torch.rand(n)).backward()


@pytest.mark.parametrize("name", FUSED | BY_HAND)
def test_outputs_that_meet_the_targets_of_others_are_an_error(name):
    loss = (FUSED | BY_HAND)[name]
    with pytest.raises(CrossExampleError, match=r"outputs \[8(, 1)?\] .* which gives \[8, 8\] .*unsqueeze\(1\)"):
        backward(extend(nn.Linear(4, 1)), loss)


@pytest.mark.parametrize("name", FUSED | BY_HAND)
def test_so_they_are_in_the_loss_of_a_model(name):
    model = extend(Own((FUSED | BY_HAND)[name]))
    with pytest.raises(CrossExampleError, match="mixes examples"), perex(BatchGrad()):
        model(torch.randn(N, 4), torch.rand(N)).backward()


@pytest.mark.parametrize("name", FUSED | {"hinge": F.hinge_embedding_loss})
def test_losses_of_one_shape_are_taken(name):
    loss = (FUSED | {"hinge": F.hinge_embedding_loss})[name]
    x, y = torch.randn(N, 4), torch.rand(N, 1)
    assert check(nn.Linear(4, 1), loss, x, y).ok
    model = extend(Own(loss))
    for n in (N, 3):  # looked at, and remembered
        with perex(BatchGrad()):
            model(x[:n], y[:n]).backward()
        assert model.linear.weight.grad_batch.shape == (n, 1, 4)


def test_a_hook_in_the_context_hides_nothing():
    """It may keep a loss from being differentiated twice, which is not done here."""
    model = extend(nn.Linear(4, 1))
    with perex(BatchGrad()):
        z = model(torch.randn(N, 4))
        z.retain_grad()
        loss = (z - torch.rand(N)).square().mean()
        with pytest.raises(CrossExampleError, match="with something of another shape"):
            loss.backward()


def to_a_grid(z, y):
    return (z - torch.arange(5.0)).square().mean()


def test_sizes_that_are_the_same_in_every_batch_are_no_examples():
    model = extend(nn.Linear(4, 1))
    with pytest.raises(CrossExampleError, match=r"outputs.repeat"):
        backward(model, to_a_grid, 5)
    for n in (3, 5, 10, 1):
        backward(model, to_a_grid, n)
    with pytest.raises(CrossExampleError, match="with something of another shape"):
        backward(extend(nn.Linear(4, 1)), to_a_grid, 5)  # nothing is known of other models


def test_repeated_outputs_are_taken_for_what_they_are():
    backward(extend(nn.Linear(4, 1)), lambda z, y: to_a_grid(z.repeat(1, 5), y), 5)


def test_in_a_forward_it_is_known_what_belongs_to_examples():
    model = extend(Own(lambda z, y: (z - torch.arange(8.0)).square().mean(1)))
    with perex(BatchGrad()):
        model(torch.randn(N, 4), torch.rand(N)).mean().backward()
    assert model.linear.weight.grad_batch.shape == (N, 1, 4)


def keys(z):
    """Of another view, by a model without gradients."""
    return z.detach().roll(1, 1).tanh()


IN_BATCH = {
    "negatives": lambda z: F.cross_entropy(z @ keys(z).T, torch.arange(len(z))),
    "the other way round": lambda z: F.cross_entropy((keys(z) @ z.T).T, torch.arange(len(z))),
    "by an einsum": lambda z: F.cross_entropy(torch.einsum("nc,mc->nm", z, keys(z)), torch.arange(len(z))),
    "by a layer": lambda z: F.cross_entropy(F.linear(z, keys(z)), torch.arange(len(z))),
    "distances": lambda z: torch.cdist(z, keys(z)).exp().mean(),
    "cosines": lambda z: F.cosine_similarity(z[:, None], keys(z)[None], dim=2).exp().mean(),
    "of two kinds": lambda z: (z @ torch.cat([keys(z), keys(z).flip(1)]).T).logsumexp(1).mean(),
}
OF_EACH = {
    "a part that is picked": lambda z: (z @ keys(z).T).diagonal().exp().mean(),
    "distances that are picked": lambda z: torch.cdist(z, keys(z)).diagonal().exp().mean(),
    "their own candidates": lambda z: (z[:, None] @ keys(z)[:, :, None].expand(-1, -1, 3)).logsumexp(2).mean(),
    "prototypes": lambda z: F.cross_entropy(z @ torch.ones(3, 6), torch.arange(len(z)) % 6),
    "sums over the batch": lambda z: (torch.ones(2, len(z)) @ z.exp()).mean() / len(z),
    "grids": lambda z: (z[:, :, None].expand(-1, -1, 6) - torch.arange(6.0)).exp().mean(),
}


@pytest.mark.parametrize("name", IN_BATCH)
def test_what_each_output_is_compared_with_must_not_follow_the_batch(name):
    model = extend(nn.Linear(4, 3))
    backward(model, lambda z, y: IN_BATCH[name](z), 6)
    for n in (7, 9, 9):
        with pytest.raises(CrossExampleError, match=rf"as many others .* in batches of 6 and {n}: \w+ gives \[.*{n}"):
            backward(model, lambda z, y: IN_BATCH[name](z), n)


@pytest.mark.parametrize("name", OF_EACH)
def test_what_does_not_follow_the_batch_may_be_as_large(name):
    model = extend(nn.Linear(4, 3))
    for n in (6, 12, 3, 6, 5):
        backward(model, lambda z, y: OF_EACH[name](z), n)


def test_candidates_of_another_number_in_each_batch():
    model = extend(nn.Linear(4, 3))
    for n, count in ((6, 6), (8, 16), (4, 8), (5, 10)):
        backward(model, lambda z, y, k=count: (z[:, None] @ torch.ones(len(z), 3, k)).logsumexp(2).mean(), n)
