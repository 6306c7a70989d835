"""How much an example counts must not follow from how many there are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perexample import LossError, extend, perex
from perexample.extensions import BatchGrad, ClippedGrad

B = 64
PAIRS = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.3, 0.1, 3.0]])


def some(losses):
    return losses[torch.arange(len(losses)) % 3 > 0]


FOLLOWING = {
    "short batches": lambda losses: losses.mean() * len(losses) / B,
    "a factor": lambda losses: (len(losses) / B) * losses.mean(),
    "a sum of one's own": lambda losses: losses.sum() / B,
    "two parts": lambda losses: 0.5 * (losses.mean() + losses.square().mean()) * (len(losses) / B),
    "one of two parts": lambda losses: losses.mean() + losses.square().sum() / B,
    "divided": lambda losses: losses.mean() / len(losses),
    "of classes": lambda losses: losses.mean(0).sum() * len(losses) / B,
    "of summed classes": lambda losses: losses.sum(0).mean() / B,
    "by an einsum": lambda losses: torch.einsum("nc,nc->n", losses, losses).mean() * len(losses),
    "negative": lambda losses: -(losses.mean() * -len(losses)),
    "one minus": lambda losses: 1 - losses.sum() / B,
    "of some": lambda losses: some(losses).sum() / B,
    "by a tensor": lambda losses: losses.mean() * torch.tensor(len(losses) / B),
    "twice": lambda losses: losses.sum() / len(losses) ** 2,
    "divided before the sum": lambda losses: (losses / B).sum(),
    "divided before the mean": lambda losses: (losses / len(losses)).mean(),
    "by a tensor in front": lambda losses: torch.tensor(len(losses) / B) * losses.mean(),
    "by ones": lambda losses: torch.ones(len(losses)) @ losses.sum(1),
    "by ones, all": lambda losses: torch.dot(losses.flatten(), torch.ones(losses.numel())) / B,
    "into one": lambda losses: torch.zeros(1).index_add(0, torch.zeros(len(losses), dtype=torch.long), losses[:, 0])[0],
    "by ones, as complex numbers": lambda losses: torch.vdot(losses[:, 0], torch.ones(len(losses))),
    "by ones, added": lambda losses: torch.addmv(torch.ones(1), losses[None, :, 1], torch.ones(len(losses)))[0],
    "of a segment": lambda losses: torch.segment_reduce(losses[:, 0], "sum", lengths=torch.tensor([len(losses)]))[0],
    "of products": lambda losses: torch.einsum("nc,nc->", losses, losses),
    "of products with a matrix": lambda losses: (losses.T @ losses * PAIRS).sum(),
    "of classes, by products": lambda losses: torch.einsum("nc,nc->", losses, F.one_hot(losses.argmax(1), 3).float()),
    "a loop": lambda losses: sum(row.exp().mean() for row in losses),
    "a loop, divided": lambda losses: sum(F.softplus(row.mean()) / B for row in losses),
    "entries one by one": lambda losses: sum(losses.exp().mean(1)),
    "a loop over two": lambda losses: sum(row.exp().mean() + 0.1 * row.sin().sum() for row in losses),
    "a loop beside another": lambda losses: sum(row.exp().mean() for row in losses) + losses.mean(),
}
STEADY = {
    "mean": lambda losses: losses.mean(),
    "sum over their number": lambda losses: losses.sum() / len(losses),
    "some factor": lambda losses: 0.37 * losses.mean() + losses.square().mean() / B,
    "of classes": lambda losses: losses.mean(0).sum() / B,
    "of classes, over their number": lambda losses: losses.sum(0).mean() / len(losses),
    "by an einsum": lambda losses: torch.einsum("nc,nc->", losses, losses) / len(losses),
    "by a trace": lambda losses: (losses.T @ losses).trace() / len(losses),
    "of some": lambda losses: some(losses).sum() / len(losses),
    "of two kinds": lambda losses: (some(losses).sum() + losses[:, 0].square().sum()) / len(losses),
    "by classes": lambda losses: torch.zeros(2).index_add(0, losses.argmax(1) // 2, losses[:, 0]).sum() / len(losses),
    "by weights of each": lambda losses: (losses.T @ torch.arange(1.0, len(losses) + 1)).mean() / len(losses),
    "of copies in front": lambda losses: losses.expand(2, -1, -1).sum(1).mean() / len(losses),
    "over a tensor": lambda losses: losses.sum() / torch.tensor(len(losses)),
    "smoothed labels": lambda losses: F.cross_entropy(losses, losses.argmax(1), label_smoothing=0.1),
    "soft labels": lambda losses: F.cross_entropy(losses, losses.detach().softmax(1)),
    "beside what does not count": lambda losses: losses.mean() + 0.0 * losses.sum(),
    "divided before the sum": lambda losses: (losses / len(losses)).sum(),
    "divided before the sum over classes": lambda losses: (losses * (1 / len(losses))).sum(1).sum() / B,
    "times a number, over their number": lambda losses: 100 * losses.sum() / len(losses),
    "by weights of one over their number": lambda losses: (
        losses.T * torch.full((len(losses),), 1 / len(losses))
    ).sum(),
    "by a tensor of their number": lambda losses: (losses / torch.full_like(losses, 2 * len(losses))).sum(),
    "by ones, over their number": lambda losses: torch.ones(len(losses)) @ losses.sum(1) / len(losses),
    "by ones over their number": lambda losses: torch.full((len(losses),), 1 / len(losses)) @ losses.sum(1),
    "of losses beside each other": lambda losses: torch.stack([losses[:, 0], losses[:, 1].exp()]).sum(0).mean(),
    "of weighted ones": lambda losses: (torch.stack([losses[:, 0], losses[:, 1]]) * torch.rand(2, 1)).sum(0).mean(),
    "of losses one behind the other": lambda losses: torch.cat([losses, losses.exp()]).sum() / len(losses),
    "of classes, by products": lambda losses: (
        torch.einsum("nc,nc->", losses, F.one_hot(losses.argmax(1), 3).float()) / len(losses)
    ),
    "of some, by a product": lambda losses: (torch.arange(len(losses)) % 3 > 0).float() @ losses[:, 0] / len(losses),
    "by other weights": lambda losses: torch.arange(1.0, len(losses) + 1) @ losses.sum(1) / len(losses),
    "of products, over their number": lambda losses: torch.einsum("nc,nc->", losses, losses) / len(losses),
    "of products with a matrix, over their number": lambda losses: (
        (losses.T @ losses / len(losses) * PAIRS[: losses.shape[1]]).sum()
        + torch.einsum("nc,cd,nd->", losses, PAIRS, losses) / len(losses)
    ),
    "of a segment, over their number": lambda losses: (
        torch.segment_reduce(losses[:, 0], "sum", lengths=torch.tensor([len(losses)]))[0] / len(losses)
    ),
    "by other weights, in another way": lambda losses: (
        torch.vdot(losses[:, 0], torch.arange(1.0, len(losses) + 1)) / len(losses)
    ),
    "several by weights of a schedule": lambda losses: (
        0.1 * losses.mean() + torch.rand(()) * losses.sin().mean() + 3 * losses.cos().mean()
    ),
    "a loop": lambda losses: sum(row.exp().mean() for row in losses) / len(losses),
    "a loop, divided": lambda losses: sum(F.softplus(row.mean()) / len(losses) for row in losses),
    "entries one by one": lambda losses: sum(losses.exp().mean(1)) / len(losses),
    "a loop over steps": lambda losses: sum(losses[:, k % 3].mean() for k in range(12)),
    "of classes as many as examples": lambda losses: losses.repeat(1, 12).mean(0).sum() / B,
}


def backwards(loss, numbers, extension=ClippedGrad, **options):
    model = extend(nn.Linear(4, 3))
    for n in numbers:
        with perex(extension(1.0) if extension is ClippedGrad else extension(), **options):
            loss(model(torch.randn(n, 4)).square()).backward()


def weighted(steps):
    """Backwards of one model with two losses, one of which has a weight of its own in each."""
    model = extend(nn.Linear(4, 3))
    for n, weight in steps:
        with perex(ClippedGrad(1.0)):
            outputs = model(torch.randn(n, 4))
            (outputs.square().mean() + weight * outputs.sin().mean()).backward()


@pytest.mark.parametrize("loss", FOLLOWING.values(), ids=FOLLOWING)
@pytest.mark.parametrize("numbers", [(64, 37), (32, 33), (64, 64, 32, 16), (2, 4, 8)], ids=str)
def test_factors_that_follow_the_number_of_examples_are_an_error(loss, numbers):
    with pytest.raises(LossError, match=rf"batches of \d+ and {numbers[-1]} .*plain mean"):
        backwards(loss, numbers)


@pytest.mark.parametrize("loss", STEADY.values(), ids=STEADY)
@pytest.mark.parametrize("numbers", [(64, 37, 12), (12, 5, 1), (4, 2, 1)], ids=str)
def test_factors_that_do_not_are_taken(loss, numbers):
    backwards(loss, numbers)


def test_sums_that_were_said_to_be_sums():
    backwards(lambda losses: losses.sum(), (64, 37, 12), loss_reduction="sum")
    backwards(lambda losses: losses.sum() / B, (64, 37, 12), loss_reduction="sum")
    with pytest.raises(LossError, match="batches of 64 and 37"):
        backwards(lambda losses: losses.sum() / len(losses), (64, 37), loss_reduction="sum")
    with pytest.raises(LossError, match="batches of 64 and 37"):
        backwards(lambda losses: (losses / len(losses)).sum(), (64, 37), loss_reduction="sum")
    backwards(lambda losses: losses.sum(0).mean(), (3, 6, 9), loss_reduction="sum")


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (lambda z: z.square().sum() / len(z), {}),
        (lambda z: z.square().mean(), {}),
        (lambda z: z.square().sum(), {"loss_reduction": "sum"}),
    ],
)
def test_sequences_of_another_length_in_each_batch(loss, options):
    model = extend(nn.Linear(4, 3))
    for n, length in ((32, 5), (29, 7), (37, 6), (33, 5)):
        with perex(ClippedGrad(1.0), **options):
            loss(model(torch.randn(n, length, 4))).backward()


def test_weights_that_are_divided_by_the_number_are_told_where_to_be():
    """They differ, so that nothing tells them from such as are not divided."""
    with pytest.raises(LossError, match=r"\(weights \* losses\)\.mean\(\) where each has a weight"):
        backwards(lambda losses: (torch.rand(len(losses)) / len(losses) * losses.sum(1)).sum(), (64, 37))
    backwards(lambda losses: (torch.rand(len(losses)) * losses.sum(1)).mean(), (64, 37, 12))


def test_one_loss_may_be_half_of_another():
    """An auxiliary loss on some of the examples, beside the main one."""
    model = extend(nn.Linear(4, 3))
    for n, factor in ((8, 1.0), (4, 0.5), (8, 1.0), (4, 0.5), (7, 1.0)):
        with perex(ClippedGrad(1.0)):
            (factor * model(torch.randn(n, 4)).square().mean()).backward()


def test_factors_may_change_otherwise():
    model = extend(nn.Linear(4, 3))
    for n, factor in ((64, 0.1), (37, 0.2), (50, 0.3), (64, 0.4), (37, 0.5)):
        with perex(ClippedGrad(1.0)):
            (factor * model(torch.randn(n, 4)).square().mean()).backward()


@pytest.mark.parametrize(
    "steps",
    [
        ((7, 0.3), (4, 0.04), (5, 0.05), (6, 0.06), (8, 0.08)),
        ((9, 0.3), (10, 0.09), (9, 0.081)),
        ((10, 0.1), (7, 0.2), (10, 0.14)),
    ],
    ids=["three before", "another for the same number", "of two"],
)
def test_a_schedule_meets_ratios_of_numbers_by_chance(steps):
    """As the growing weight of a divergence beside another loss, with Poisson batches."""
    weighted(steps)


def test_a_factor_that_follows_late_is_an_error():
    """Behind batches in which it did not."""
    late = [(n, n / B) for n in (37, 16, 50, 30, 20)]
    with pytest.raises(LossError, match=r"batches of \d+ and \d+"):
        weighted([(64, 1.0), (37, 1.0), (50, 1.0), (64, 1.0), *late])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.mse_loss(z, torch.zeros_like(z)),
        lambda z: z.square().mean(),
        lambda z: torch.var_mean(z.square(), correction=0)[1],
        lambda z: torch.std_mean(z.square().sum(1), correction=0)[1],
    ],
)
def test_a_mean_that_is_to_be_clipped_was_not_said_to_be_a_sum(loss):
    for scale in (1.0, 8.0):
        with pytest.raises(LossError, match="is a mean over 5 examples, but perex was told loss_reduction='sum'"):
            backwards(lambda z, s=scale: s * loss(z), (5,), loss_reduction="sum", loss_scale=scale)
    backwards(loss, (1,), loss_reduction="sum")
    backwards(lambda z: len(z) * (loss(z) + 0.2 * z.mean()), (5,), loss_reduction="sum")
    backwards(loss, (5,), extension=BatchGrad, loss_reduction="sum")  # BackPACK's quantities


def test_a_sum_and_a_mean_of_one_model_are_two_losses():
    """As of a recorded step beside a usual one."""
    model = extend(nn.Linear(3, 2).double())
    for n, reduction in ((11, "sum"), (1, "mean"), (13, "mean"), (1, "sum")):
        losses = model(torch.randn(n, 3).double()).square().sum(1)
        with perex(ClippedGrad(1.0), grad=False, loss_reduction=reduction):
            (losses.sum() if reduction == "sum" else losses.mean()).backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda losses: losses.mean(),
        lambda losses: (losses.sum(1) / losses.shape[1]).mean(),
        lambda losses: (losses.sum(1) / losses.shape[1]).sum() / len(losses),
        lambda losses: losses.sum() / losses.numel(),
        lambda losses: (losses / losses.numel()).sum(),
    ],
)
def test_batches_of_as_many_tokens(loss):
    """The length of the sequences follows the number of examples."""
    model = extend(nn.Linear(4, 3))
    for n, t in ((32, 8), (64, 4), (16, 16), (128, 2)):
        with perex(ClippedGrad(1.0)):
            loss(model(torch.randn(n, t, 4)).square().sum(2)).backward()


@pytest.mark.parametrize(
    "loss", [lambda losses: losses.sum() / B, lambda losses: losses.mean() * len(losses) / B], ids=["sum", "mean"]
)
def test_a_constant_divisor_is_divided_out_again(loss):
    """As the docs say."""
    model = extend(nn.Linear(4, 3))
    for n in (B, 37, 12, 1):
        x = torch.randn(n, 4)
        with perex(BatchGrad(), ClippedGrad(1.0), loss_reduction="sum", loss_scale=1 / B):
            loss(model(x).square().sum(1)).backward()
        (own,) = torch.autograd.grad(model(x[:1]).square().sum(), model.weight)
        torch.testing.assert_close(model.weight.grad_batch[0], own)


LOOPS = {  # over the examples, whose own losses are means of as many entries as there are examples, or twice as many
    "squares": lambda out: sum(row.square().mean() for row in out),
    "a loss of torch": lambda out: sum(F.mse_loss(row, torch.ones(len(row))) for row in out),
    "cross-entropies": lambda out: sum(F.cross_entropy(out[i : i + 1], torch.tensor([1])) for i in range(len(out))),
}


def each_added(out):
    return sum(F.cross_entropy(out, torch.ones(len(out), dtype=torch.long), reduction="none"))


@pytest.mark.parametrize("loss", [LOOPS["a loss of torch"], LOOPS["cross-entropies"], each_added])
def test_a_loop_that_was_said_to_be_a_mean_is_refused_in_the_first_backward(loss):
    for scaled in (loss, lambda out: 0.5 * loss(out), lambda out: loss(out) / 3):
        with pytest.raises(LossError, match=r"sums over 5 examples.*loss_reduction='sum'"), perex(ClippedGrad(1.0)):
            scaled(extend(nn.Linear(4, 6))(torch.randn(5, 4))).backward()
    backwards(lambda out: 2 * loss(out) / len(out), (5, 3))


def test_weights_of_their_own_in_a_loop_are_those_of_a_sum_too():
    """They are about 1, and not 1 / n."""

    def loss(out):
        return sum((0.5 + 0.3 * i) * F.mse_loss(row, torch.ones(len(row))) for i, row in enumerate(out))

    with pytest.raises(LossError, match=r"sums over 5 examples.*with a factor in front of that: 5 \* losses\.mean"):
        backwards(loss, (5,))
    backwards(lambda out: loss(out) / len(out), (5, 3, 8))
    backwards(loss, (5, 3, 8), loss_reduction="sum")


WEIGHTED = {
    "in front": lambda losses, w: (w * losses).sum(),
    "behind": lambda losses, w: -(losses * -w).sum(),
    "returns": lambda losses, w: ((20 * w).detach() * losses).sum(),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_sums_with_weights_of_their_own_are_seen_where_a_mean_of_many_would_hardly_have_them(name):
    def loss(out, divisor=1.0):
        losses = F.cross_entropy(out, out.argmax(1), reduction="none")
        return WEIGHTED[name](losses, (0.6 + torch.rand(len(out))) / divisor)

    with pytest.raises(LossError, match="sums over 40 examples"):
        backwards(loss, (40,))
    if name != "returns":
        backwards(lambda out: loss(out, len(out)), (40,))
        backwards(loss, (3,))
    backwards(lambda out: loss(out) / len(out), (40, 37, 3))
    backwards(loss, (40, 37, 3), loss_reduction="sum")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
def test_masks_of_any_dtype(dtype):
    """The same as one of float32: an error of the library, or right."""

    def loss(out):
        mask = (torch.arange(len(out)) % 8 > 0).to(dtype)
        return F.cross_entropy(out, out.argmax(1), reduction="none") * mask

    with pytest.raises(LossError, match="sums over 40 examples"):
        backwards(lambda out: loss(out).sum(), (40,))
    backwards(lambda out: loss(out).sum() / 35, (40,))
    backwards(lambda out: loss(out).sum() / len(out), (40, 37, 3))
    backwards(lambda out: loss(out).mean(), (40, 37, 3))
    backwards(lambda out: loss(out).sum(), (40, 37, 3), loss_reduction="sum")


def test_a_power_of_one_is_none():
    with pytest.raises(LossError, match="sums over 5 examples"):
        backwards(lambda out: out.abs().nansum(), (5,))
    for power in (1, 1.0):
        with pytest.raises(LossError, match="sums over 5 examples"):
            backwards(lambda out, power=power: out.abs().sum() ** (1 / power), (5,))
        backwards(lambda out, power=power: (out.abs().sum() / len(out)) ** (1 / power), (5, 3, 8))


@pytest.mark.parametrize("loss", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("n", [3, 6])
def test_a_sum_of_means_of_each_example_is_a_sum(loss, n):
    model, x = extend(nn.Linear(4, 6)), torch.randn(n, 4)
    with perex(BatchGrad(), ClippedGrad(1.0), loss_reduction="sum"):
        loss(model(x)).backward()
    for row, got in zip(x, model.weight.grad_batch, strict=True):
        (own,) = torch.autograd.grad(loss(model(row[None])), model.weight)
        torch.testing.assert_close(got, own)


def test_a_sum_of_means_of_each_class_is_a_mean():
    model = extend(nn.Linear(4, 2))
    with pytest.raises(LossError, match="mean over 3 examples"), perex(ClippedGrad(1.0), loss_reduction="sum"):
        sum(column.square().mean() for column in model(torch.randn(3, 4)).T).backward()


@pytest.mark.parametrize("inside", [True, False])
def test_hooks_of_users_are_called_once(inside):
    """Of a sum that is measured, and of as many losses as there are examples, which might be a loop over these."""
    calls, model, x = [], extend(nn.Linear(4, 3)), torch.randn(2 if inside else 3, 4)

    def loss():
        out = model(x)
        out.register_hook(calls.append)
        losses = out.square().sum(1)
        losses.register_hook(calls.append)
        return torch.ones(len(x)) @ losses / len(x) + F.mse_loss(out, x[:, :3]) + F.mse_loss(out, x[:, 1:])

    total = None if inside else loss()
    with perex(BatchGrad()):
        (loss() if total is None else total).backward()
    assert len(calls) == 2
