"""Losses that join examples in the way they say, and those that couple them through a common divisor."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perexample import BatchAxisError, CrossExampleError, LossError, RecordedStep, extend, perex
from perexample._engine import couplings, graph
from perexample.extensions import BatchGrad


def run(loss_fn, **options):
    torch.manual_seed(0)
    model = extend(nn.Linear(3, 4).double())
    with perex(BatchGrad(), **options):
        loss_fn(model(torch.randn(5, 3, dtype=torch.float64))).backward()
    return model.weight.grad_batch


TARGET = torch.tensor([0, 1, 2, 3, 0])


def test_mean_sum_and_a_scaled_loss_give_the_examples_own_gradients():
    mean = run(lambda out: F.cross_entropy(out, TARGET))
    torch.testing.assert_close(
        run(lambda out: F.cross_entropy(out, TARGET, reduction="sum"), loss_reduction="sum"), mean
    )
    torch.testing.assert_close(run(lambda out: 65536 * F.cross_entropy(out, TARGET), loss_scale=65536.0), mean)
    torch.testing.assert_close(run(lambda out: F.cross_entropy(out, TARGET), loss_reduction="sum"), mean / 5)


@pytest.mark.parametrize(
    "options",
    [{"ignore_index": 2}, {"weight": torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)}],
    ids=["ignored", "class weights"],
)
def test_a_common_divisor_is_refused(options):
    with pytest.raises(LossError, match=r"divisor .* over 5 targets.*reduction='none'"):
        run(lambda out: F.cross_entropy(out, TARGET, **options))


@pytest.mark.parametrize("options", [{"ignore_index": 2}, {"weight": torch.tensor([1.0, 2.0, 1.0, 1.0]).double()}])
def test_a_common_divisor_of_a_sum_is_refused(options):
    """A mean times the number of examples is the sum of their own losses only if they all count alike."""
    with pytest.raises(LossError, match=r"divisor .* over 5 targets.*reduction='none'"):
        run(lambda out: F.cross_entropy(out, TARGET, **options) * 5, loss_reduction="sum")


def _by_itself(out, labels, **options):
    return F.cross_entropy(out, labels, **options)


def _counted(out, labels, **options):
    return F.cross_entropy(out, labels, reduction="sum", **options) / (labels >= 0).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "one", [_by_itself, _counted, functools.partial(_by_itself, weight=torch.arange(1.0, 5).double())]
)
@pytest.mark.parametrize("inside", [False, True], ids=["in the loss", "in the model"])
def test_a_divisor_of_each_examples_own_tokens_is_fine(one, reduction, inside):
    """A loop over the examples, each of which averages over its own targets."""

    def each(out):
        return torch.stack([one(*pair) for pair in zip(out, labels, strict=True)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4).double()

        def forward(self, x):
            return each(self.inner(x)) if inside else self.inner(x)

    labels = torch.arange(30).remainder(4).view(5, 6)
    for i in range(5):
        labels[i, : i + 1] = -100
    model, x = Model(), torch.randn(5, 6, 3, dtype=torch.float64)
    wanted = [torch.autograd.grad(one(model.inner(x[i]), labels[i]), model.inner.weight)[0] for i in range(5)]
    extend(model)
    with perex(BatchGrad(), loss_reduction=reduction):
        out = model(x)
        getattr(out if inside else each(out), reduction)().backward()
    torch.testing.assert_close(model.inner.weight.grad_batch, torch.stack(wanted))


class Labelled(nn.Module):
    """Losses of the examples that a model computes itself."""

    def __init__(self, width, ignored):
        super().__init__()
        self.inner, self.ignored = nn.Linear(width, 3), ignored

    def forward(self, x, labels):
        return F.cross_entropy(self.inner(x).mT, labels, reduction="none", ignore_index=self.ignored).sum(1)


def test_a_batch_whose_labels_are_all_ignored():
    model, x, labels = extend(Labelled(11, -100)), torch.randn(4, 5, 11), torch.arange(20).remainder(3).view(4, 5)
    for known in (torch.full_like(labels, -100), labels):
        with perex(BatchGrad()):
            model(x, known).mean().backward()
        assert (model.inner.weight.grad_batch.abs().amax((1, 2)) > 0).tolist() == [known is labels] * 4


def test_a_batch_that_shows_nothing_is_not_remembered():
    model, x, labels = extend(Labelled(13, 9)), torch.randn(4, 5, 13), torch.arange(20).remainder(3).view(4, 5)
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match=r"`cross_entropy` .* no trial could change"):
        model(x, torch.full_like(labels, 9)).mean().backward()
    with perex(BatchGrad()):
        model(x, labels).mean().backward()


def test_ignored_targets_with_a_mean_of_each_example():
    def loss(out):
        losses = F.cross_entropy(out, TARGET, ignore_index=2, reduction="none")
        return losses.mean()

    gradients = run(loss)
    assert gradients[2].abs().max() == 0
    torch.testing.assert_close(gradients[0], run(lambda out: F.cross_entropy(out, TARGET))[0])


def test_a_sum_declared_as_mean_is_refused():
    with pytest.raises(LossError, match="loss_reduction='sum'"):
        run(lambda out: F.cross_entropy(out, TARGET, reduction="sum"))


def test_a_sum_of_one_example_declared_as_mean_is_refused_too():
    """The next batch may have more."""
    model = extend(nn.Linear(3, 4))
    with pytest.raises(LossError, match=r"sums over its elements.*loss_reduction='sum'"), perex(BatchGrad()):
        F.cross_entropy(model(torch.randn(1, 3)), TARGET[:1], reduction="sum").backward()


class Weighted(nn.Module):
    """Losses of each example, of which torch keeps the weights from those who look on."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x, y, weight):
        return F.l1_loss(self.inner(x), y, reduction="none", weight=weight)


@pytest.mark.parametrize("where", ["in a loss", "in a model", "recorded"])
def test_weights_of_absolute_errors(where):
    model, y, weight = Weighted().double(), torch.zeros(5, 4).double(), torch.arange(20.0).double().view(5, 4)
    x = torch.randn(5, 3).double()
    wanted = [torch.autograd.grad((model.inner(x[i]).abs() * weight[i]).sum(), model.inner.weight)[0] for i in range(5)]
    extend(model)
    if where == "recorded":
        RecordedStep(model, lambda *args: model(*args).sum(1), x, y, weight, extensions=BatchGrad())(x, y, weight)
    else:
        with perex(BatchGrad()):
            of_each = model(x, y, weight)
            if where == "in a loss":
                of_each = F.l1_loss(model.inner(x), y, reduction="none", weight=weight)
            of_each.sum(1).mean().backward()
    torch.testing.assert_close(model.inner.weight.grad_batch, torch.stack(wanted))


LABELS = torch.tensor([[0, 1], [2, -100], [3, 1], [-100, -100], [0, -100]])  # -100 is left out
COUNTED = int((LABELS >= 0).sum())


def run_tokens(loss_fn, labels=LABELS, **options):
    """Gradients of a sum over the tokens of all examples that was made a loss, ``[N, O, I]``."""
    torch.manual_seed(0)
    model = extend(nn.Linear(3, 4).double())
    with perex(BatchGrad(), **options):
        out = model(torch.randn(5, 2, 3, dtype=torch.float64))
        loss_fn(F.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum")).backward()
    return model.weight.grad_batch


SHARED = [
    ("mean", lambda total: total / COUNTED),  # as a Trainer with num_items_in_batch
    ("sum", lambda total: total / COUNTED),
    ("mean", lambda total: 0.1 * total / COUNTED + 0.0),
    ("sum", lambda total: (total / COUNTED).sqrt()),
]


@pytest.mark.parametrize(("reduction", "loss"), SHARED)
def test_a_sum_over_tokens_is_not_divided_by_their_number(reduction, loss):
    """It depends on the labels of all, so that no example has a loss of its own."""
    with pytest.raises(LossError, match=r"times .* 5 examples have different numbers of targets .*\(6 of 10\)"):
        run_tokens(loss, loss_reduction=reduction)


def test_a_sum_over_tokens_may_be_divided_by_a_constant():
    """The number of examples, or anything where every example has as many labels; a scale is divided out."""
    wanted = run_tokens(lambda total: total, loss_reduction="sum")
    assert wanted[3].abs().max() == 0
    torch.testing.assert_close(run_tokens(lambda total: total / 5), wanted)
    torch.testing.assert_close(run_tokens(lambda total: 8 * total / 5, loss_scale=8.0), wanted)
    for half in (lambda total: total / LABELS.numel(), lambda total: 0.5 * (total / 5)):  # beside another loss, say
        torch.testing.assert_close(run_tokens(half), wanted / 2)
    equal = torch.tensor([[0, -100], [2, -100], [-100, 1], [3, -100], [-100, 0]])
    each = run_tokens(lambda total: total, equal, loss_reduction="sum")
    torch.testing.assert_close(run_tokens(lambda total: total / 10, equal), each / 2)


# -- what is done to a number in which several examples are joined already -------------------------------------------

N, MASK = 5, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
CLASSES, AIMS = torch.tensor([0, 3, 1, 2, 3]), torch.linspace(-1, 1, 20).view(5, 4)
TWO, LENGTHS = torch.arange(10) % 2, (2, 1, 4, 3, 1)


def each(out):
    return F.cross_entropy(out, CLASSES, reduction="none")


COUPLED = {
    "sum over a mask, by its size": lambda out: (each(out) * MASK).sum() / MASK.sum(),
    "mean over a mask": lambda out: each(out)[MASK > 0].mean(),
    "mean over a selection": lambda out: each(out).masked_select(MASK > 0).mean(),
    "squared error over a mask": lambda out: F.mse_loss(out[MASK > 0], AIMS[MASK > 0]),
    "the largest two": lambda out: each(out).topk(2).values.mean(),
    "root of a mean": lambda out: F.mse_loss(out, AIMS).sqrt(),
    "norm": lambda out: torch.linalg.norm(out - AIMS),
    "distance": lambda out: torch.dist(out, AIMS),
    "deviation": lambda out: each(out).std(),
    "log of a sum of exponentials": lambda out: each(out).logsumexp(0),
    "maximum": lambda out: each(out).max(),
    "the largest one": lambda out: each(out).topk(1).values.sum(),
    "the largest by pooling": lambda out: F.max_pool1d(each(out).view(1, 1, -1), N).squeeze(),
    "the largest of both ends": lambda out: torch.aminmax(each(out)).max,
    "the largest of a segment": lambda out: torch.segment_reduce(each(out), "max", lengths=torch.tensor([N])).sum(),
    "the largest of two": lambda out: torch.maximum(each(out)[0], each(out)[1]),
    "the most frequent": lambda out: each(out).mode().values,
    "gamma": lambda out: each(out).mean().lgamma(),
    "smooth steps": lambda out: F.mish(each(out).mean()) + F.hardswish(each(out).mean()),
    "what is left": lambda out: torch.remainder(each(out)[0], each(out)[1]),
    "median": lambda out: each(out).median(),
    "flooding": lambda out: (each(out).mean() - 0.1).abs() + 0.1,
    "square": lambda out: each(out).mean() ** 2,
    "inverse": lambda out: 1 / each(out).mean(),
    "hinge": lambda out: F.relu(each(out).mean() - 100),
    "ratio": lambda out: each(out).mean() / out.mean(),
    "by its own size": lambda out: each(out).mean() / each(out).mean().detach(),
    "product": lambda out: each(out).mean() * out.mean(),
    "cross-entropy over a mask": lambda out: F.cross_entropy(out[MASK > 0], CLASSES[MASK > 0]),
    "absolute error over a mask": lambda out: (out[MASK > 0] - AIMS[MASK > 0]).abs().mean(),
    "squared error of a mean": lambda out: F.mse_loss(out.mean(), torch.tensor(0.3)),
    "two, squared": lambda out: torch.stack([F.mse_loss(out, AIMS), each(out).mean()]).pow(2).sum(),
    "two, weighted by themselves": lambda out: torch.stack([F.mse_loss(out, AIMS), each(out).mean()]).softmax(0)[0],
    "root of the mean of a stack": lambda out: torch.stack([each(out)[i] for i in range(N)]).mean().sqrt(),
    "one of two": lambda out: torch.stack([F.mse_loss(out, AIMS).sqrt(), each(out).mean()]).sum(),
    "those that are there": lambda out: torch.stack([each(out)[i] for i in (0, 2, 3)]).mean(),
    "the first of two kinds": lambda out: F.cross_entropy(out[:2], CLASSES[:2]) + F.mse_loss(out[2:], AIMS[2:]) / N,
    "all but the last": lambda out: each(out)[:-2].mean(),
    "rows across examples": lambda out: F.cross_entropy(out.reshape(-1, 2)[:-1], TWO[1:]),
    "parts": lambda out: sum(part.mean() for part in out.split(2)) / 3,
    "sum of a part, by its size": lambda out: each(out)[:3].sum() / 3,
    "soft labels over a mask": lambda out: F.cross_entropy(out[MASK > 0], AIMS[MASK > 0].softmax(1)),
    "sum of errors over a mask, by its size": lambda out: (
        F.mse_loss(out[MASK > 0], AIMS[MASK > 0], reduction="sum") / int(MASK.sum())
    ),
    "sums of each, by the number of all": lambda out: sum(out[i, :k].exp().sum() for i, k in enumerate(LENGTHS)) / 11,
    "all tokens of those": lambda out: torch.cat([out[0, :3], out[2], out[3, :1]]).mean(),
}
LINEAR = {
    "two": lambda out: 0.3 * each(out).mean() + 2 * F.mse_loss(out, AIMS) - 1,
    "a mean of two": lambda out: torch.stack([F.mse_loss(out, AIMS), each(out).mean()]).mean(),
    "by their number": lambda out: each(out).sum() / torch.tensor(N),
    "by a number": lambda out: each(out).mean() / 2.5,
    "by a tensor": lambda out: each(out).mean() * torch.tensor(3.0),
    "axis by axis": lambda out: (out - AIMS).square().mean(0).mean(),
    "weights": lambda out: torch.dot(each(out), torch.full((N,), 1 / N)),
    "power of one": lambda out: each(out).mean() ** 1,
    "no infinity": lambda out: each(out).mean().nan_to_num(),
    "a segment": lambda out: torch.segment_reduce(each(out), "sum", lengths=torch.tensor([N])).sum() / N,
    "the largest, one by one": lambda out: sum(out[i].topk(1).values.squeeze() for i in range(N)) / N,
    "other types": lambda out: each(out).mean().double().float().view(1).squeeze(),
    "norms of each": lambda out: (out - AIMS).norm(dim=1).mean(),
    "one of each": lambda out: out[torch.arange(N), CLASSES].mean(),
    "a sum over a mask": lambda out: out[MASK > 0].sum(0).mean() / N,
    "steps of time but one": lambda out: (out.t()[1:] - AIMS.t()[1:]).square().mean(),
    "functions of each, beside each other": lambda out: torch.stack([each(out)[i] for i in range(N)]).pow(2).mean(),
    "a long loop": lambda out: sum(each(out)[i % N].exp() for i in range(40)) / 40,
    "roots one by one": lambda out: sum(F.mse_loss(out[i], AIMS[i]).sqrt() for i in range(N)) / N,
    "norms one by one": lambda out: torch.stack([torch.linalg.norm(out[i] - AIMS[i]) for i in range(N)]).mean(),
    "masks one by one": lambda out: sum((out[i] * MASK[:4]).sum() / MASK[:4].sum() for i in range(N)) / N,
    "a mean of those that count": lambda out: torch.stack(
        [(each(out) * CLASSES.eq(c)).mean() for c in (0, 1, 2)]
    ).mean(),
    "a mean of several, of all": lambda out: torch.stack([each(out).mean(), out.mean(), F.mse_loss(out, AIMS)]).mean(),
    "classes by their numbers": lambda out: out.t()[torch.tensor([0, 1, 3])].mean(),
    "classes by their numbers, elsewhere": lambda out: out[:, :3].t().index_select(1, NEXT).mean(),
    "the largest classes": lambda out: out.t().topk(3, 0).values.mean(),
    "two views of each": lambda out: each(out.repeat(2, 1)[:5]).mean() + out.repeat(2, 1)[5:].square().mean(),
    "parts one by one": lambda out: sum(out[i : i + 1, :3].mean() for i in range(N)) / N,
    "own tokens of each": lambda out: sum(out.flatten()[4 * i : 4 * i + 3].mean() for i in range(N)) / N,
    "as many of each": lambda out: torch.cat([out[i, :2] for i in range(N)]).mean(),
    "sums of each, by a constant": lambda out: sum(out[i, :k].sum() for i, k in enumerate(LENGTHS)) / 5,
    "sums of two, by the number of all": lambda out: (out.exp().sum() + out[:, :2].square().sum()) / 30,
    "choices one by one": lambda out: sum(out[i][MASK[:4] > 0].mean() for i in range(N)) / N,
}


def joined(loss_fn, **options):
    torch.manual_seed(0)
    model, x = extend(nn.Linear(3, 4)), torch.randn(N, 3)
    with perex(BatchGrad(), **options):
        loss_fn(model(x)).backward()
    return model.weight.grad_batch, model.weight.grad


@pytest.mark.parametrize("loss", COUPLED.values(), ids=COUPLED)
def test_once_they_are_joined_examples_do_not_change_how_others_count(loss):
    with pytest.raises(LossError, match=r"where [235] examples are joined already.*each example's own loss"):
        joined(loss)


@pytest.mark.parametrize("loss", LINEAR.values(), ids=LINEAR)
def test_sums_of_the_examples_own_losses_are_no_cause_for_doubt(loss):
    rows, grad = joined(loss)
    torch.testing.assert_close(rows.mean(0), grad)


# -- what examples have to do with each other before they are joined ------------------------------------------------

ANGLES, NEXT = torch.linspace(0, 1, 20).view(5, 4), torch.tensor([1, 2, 3, 4, 0])


def similarities(out):
    unit = F.normalize(out, dim=1)
    return unit @ unit.T / 0.5


WEIGHTS = torch.tensor([1.0, 1.0, torch.inf, 1.0, 1.0])[:, None]


def alignment(out):
    steps = out.view(N, 2, 2).log_softmax(2).transpose(0, 1)
    return F.ctc_loss(steps, torch.ones(N, 1, dtype=torch.long), (2,) * N, (1,) * N)


def many_hinges(out):
    for _ in range(20):
        out = F.relu(out + 0.3)
    return out.mean()


def in_place(out):
    total = torch.zeros(4, N)
    total[1:3] = out.t()[1:3]
    total[0].add_(out.t()[3])
    return total


def solved(out, right=None):
    """One system of equations for each example."""
    return torch.linalg.solve(
        2 * torch.eye(out.shape[1]) + out[:, :, None] * out[:, None], out if right is None else right
    )


def pairs(out):
    return 0.1 - (out[:, None, 0] - out[None, :, 0])


def written(out):
    out[out < 0] = 0.0
    return out


MEETING = {
    "contrastive": lambda out: F.cross_entropy(similarities(out).fill_diagonal_(-9.0), NEXT),
    "two sides": lambda out: F.cross_entropy(out[:, :2] @ out[:, 2:].T, torch.arange(N)),
    "roots of means": lambda out: (out - AIMS).square().mean(0).sqrt().sum(),
    "covariance": lambda out: (out.T @ out / N - torch.eye(4)).square().sum(),
    "around the mean": lambda out: (out - out.mean(0)).square().mean(),
    "distances": lambda out: torch.cdist(out, out + ANGLES).mean(),
    "differences": lambda out: (out[:, None] - out[None]).square().sum(-1).neg().exp().mean(),
    "softmax over the batch": lambda out: out.log_softmax(0)[:, 0].mean(),
    "batch norm": lambda out: F.batch_norm(out, None, None, training=True).pow(3).mean(),
    "neighbours": lambda out: (out - out.roll(1, 0)).square().mean(),
    "partners": lambda out: (out * out[NEXT]).sum(1).mean(),
    "deviations": lambda out: out.std(0).mean(),
    "sums of exponentials": lambda out: out.logsumexp(0).mean(),
    "running sums": lambda out: out.cumsum(0).exp().mean(),
    "turned": lambda out: out.t().softmax(1)[0].mean(),
    "a single pair": lambda out: each(out).mean() + out[1] @ out[3],
    "rows as batches": lambda out: torch.bmm(out[None], out.T[None]).exp().mean(),
    "around the mean of all": lambda out: (out - out.mean()).square().mean(),
    "relative": lambda out: F.softplus(out[:, 1].mean() - out[:, 0]).mean(),
    "by the sum of all": lambda out: (out.exp() / out.exp().sum()).square().mean(),
    "pairs, repeated": lambda out: (out.repeat(N, 1) * out[:, None].expand(-1, N, -1).reshape(-1, 4)).mean(),
    "pairs, looked up": lambda out: (F.embedding(NEXT, out) * out).mean(),
    "one normalisation": lambda out: F.layer_norm(out, out.shape).pow(3).mean(),
    "singular values": lambda out: torch.linalg.svdvals(out).sum(),
    "frequencies": lambda out: torch.fft.fft(out, dim=0).abs().mean(),
    "the next": lambda out: (out[1:] * out[:-1]).sum() / N,
    "beside what has no second derivative": lambda out: 0.5 * (alignment(out) + 2 * out.std(0).mean()),
    "hinges of pairs": lambda out: F.relu(1 - out[:, :1] + out[:, 0]).mean(),
    "ranks": lambda out: F.margin_ranking_loss(out[:-1], out[1:], torch.ones(N - 1, 4), margin=0.5),
    "absolute differences": lambda out: (out[:, None] - out[None]).abs().mean(),
    "total variation": lambda out: (out[1:] - out[:-1]).abs().sum() / N,
    "the largest of each column": lambda out: out.amax(0).mean(),
    "in order": lambda out: (out.sort(0).values - AIMS).abs().mean(),
    "clamped differences": lambda out: (out - out.flip(0)).clamp(-0.5, 0.5).square().mean(),
    "the larger of two": lambda out: torch.maximum(out, out[NEXT]).mean(),
    "all pairs": lambda out: F.relu(0.5 - (out[:, None, 0] - out[None, :, 0])).mean(),
    "variation of all in a row": lambda out: out.flatten().diff().abs().mean(),
    "rows that cross examples": lambda out: out[:, :2].flatten()[1:-1].view(-1, 4).max(1).values.mean(),
    "norms of differences": lambda out: torch.linalg.vector_norm(out - out.roll(1, 0), ord=1, dim=1).mean(),
    "ranges": lambda out: torch.stack(torch.aminmax(out, dim=0)).mean(),
    "one pair before many hinges": lambda out: many_hinges(F.relu(1 + out - 0.1 * out.roll(1, 0))),
    "smooth absolute differences": lambda out: F.smooth_l1_loss(9 * out, 9 * out.roll(1, 0)),
    "large smooth differences": lambda out: F.smooth_l1_loss(1e6 * out, 1e6 * out.roll(1, 0)),
    "one or the other": lambda out: torch.where(out > out.roll(1, 0), out, out.roll(1, 0)).mean(),
    "a system of all": lambda out: torch.linalg.solve(torch.eye(4) + out.T @ out, out.T).square().mean(),
    "systems of neighbours": lambda out: solved(F.pad(out, (0, 1)), F.pad(out.roll(1, 0), (0, 1))).square().mean(),
    "beside what is infinite": lambda out: out[1] @ out[3] + (out * WEIGHTS).square().sum(1).mean(),
}
MEETING |= {  # at kinks that are made of masks
    "hinges of pairs, by a product": lambda out: (pairs(out) * (pairs(out) > 0)).mean(),
    "hinges of pairs, written": lambda out: written(pairs(out)).mean(),
    "hinges of pairs, filled": lambda out: pairs(out).masked_fill(pairs(out) < 0, 0.0).mean(),
    "hinges of pairs, or zero": lambda out: torch.where(pairs(out) > 0, pairs(out), 0.0).mean(),
    "hinges of pairs, chosen": lambda out: pairs(out).masked_select(pairs(out) > 0).sum() / N,
    "hinges of neighbours": lambda out: (lambda d: d * (d > 0).float())(out - out.roll(1, 0)).mean(),
    "some of the pairs": lambda out: ((CLASSES[:, None] > CLASSES[None]) * pairs(out)).sum() / N,
}
APART = {
    "a part of the pairs": lambda out: (out @ out.T * torch.eye(N)).sum().mul(0.1) / N,
    "hinges by masks": lambda out: (out * (out > 0)).mean() + written(out * 1.0).mean(),
    "sums over all, some of them": lambda out: (out.mean(0) * torch.tensor([1.0, 0.0, 1.0, 1.0])).sum(),
    "roots of each": lambda out: (out - AIMS).square().mean(1).sqrt().mean(),
    "trace": lambda out: (out.T @ out / N).trace(),
    "mixed targets": lambda out: 0.3 * each(out).mean() + 0.7 * F.cross_entropy(out, CLASSES[NEXT]),
    "another order": lambda out: F.cross_entropy(out[NEXT], CLASSES[NEXT]),
    "turned": lambda out: (out.t() * AIMS.t()).sum(0).exp().mean(),
    "products of each": lambda out: torch.bmm(out[:, None], out[:, :, None]).exp().mean(),
    "infinite masks": lambda out: out.masked_fill(AIMS > 0.9, -torch.inf).logsumexp(1).mean(),
    "differences in each": lambda out: (out[:, :, None] - out[:, None]).square().exp().mean(),
    "order in each": lambda out: out.sort(1).values[:, 0].exp().mean(),
    "distances to constants": lambda out: torch.cdist(out, AIMS).exp().mean(),
    "by constants": lambda out: (AIMS @ out.T).diagonal().exp().mean(),
    "means that are not followed": lambda out: (out - out.mean(0).detach()).square().mean(),
    "no second derivative": alignment,
    "distances of partners": lambda out: torch.cdist(out, out + ANGLES).diagonal().exp().mean(),
    "parts of each": lambda out: out.view(2 * N, 2).log_softmax(1)[:, 0].mean(),
    "a constant of all": lambda out: (out - out.mean().detach()).square().mean(),
    "hinges of each": lambda out: F.relu(1 - out[:, :1] + out[:, 1:]).mean(),
    "hinges of each, turned": lambda out: F.relu(out.t()[1:] - out.t()[:1]).mean(),
    "the largest of each": lambda out: out.t().amax(0).mean(),
    "in order, in each": lambda out: (out.t().sort(0).values - AIMS.t()).abs().mean(),
    "differences from constants": lambda out: (out[:, None] - AIMS[None, :3]).abs().mean(),
    "one or the other of each": lambda out: torch.where(AIMS > 0, out, out.flip(1)).mean(),
    "sums over some": lambda out: torch.where(torch.arange(4) > 1, out.mean(0), 0.0).sum(),
    "written in place": lambda out: in_place(out).mean(),
    "pooled over classes": lambda out: F.max_pool1d(out[NEXT][:, None], 2).mean(),
    "systems of each, as many as they are large": lambda out: solved(F.pad(out, (0, 1))).square().mean(),
    "kinks of a table that all share": lambda out: (out[NEXT] - out[NEXT].detach().roll(1, 0)).abs().mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", MEETING.values(), ids=MEETING)
def test_examples_that_meet_in_the_loss_are_an_error(loss, dtype):
    for _ in range(4):  # and nothing is remembered of it
        with pytest.raises(CrossExampleError, match=r"couples examples.*Backward.*own outputs"):
            joined(lambda out: loss(out.to(dtype).float()))


@pytest.mark.parametrize("loss", APART.values(), ids=APART)
def test_what_only_looks_as_if_examples_met_is_no_cause_for_doubt(loss):
    rows, grad = joined(loss)
    torch.testing.assert_close(rows.mean(0), grad)


@pytest.mark.parametrize(
    "loss",
    [
        lambda out: (out[0] * out[1]).mean(),
        lambda out: (out.t()[:, 1:] * out.t()[:, :-1]).mean(),
        lambda out: out.movedim(0, 1).prod(1).mean(),
        lambda out: F.avg_pool1d(out.t(), 2).exp().mean(),
        lambda out: (out[:, :4] * out[:, :4].t()).mean(),
        lambda out: (out[:, :4] * out[:, 5]).mean(),
        lambda out: (out.view(8, 4)[:4] * out.view(8, 4)[4:]).mean(),
        lambda out: out.view(2, 16).softmax(1).log().mean(),
    ],
)
def test_sizes_that_examples_divide_hide_nothing(loss):
    model = extend(nn.Linear(3, 8))
    with pytest.raises(CrossExampleError, match="couples examples"), perex(BatchGrad()):
        loss(model(torch.randn(4, 3))).backward()


def test_two_views_of_each_example_belong_in_its_row():
    """One behind the other they would be 2 N examples that meet in pairs; the error says what to write."""
    model, views = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()), torch.randn(2, 5, 3).double()
    weight = model[0].weight

    def losses(one, two):
        return F.pairwise_distance(one, two).square()

    with perex(BatchGrad()):
        with pytest.raises(CrossExampleError, match=r"call the model for each view, or .* \[N, 2, \.\.\.\]; not"):
            losses(*model(views.flatten(0, 1)).chunk(2)).mean().backward()
        losses(*map(model, views)).mean().backward()
        called = weight.grad_batch
        losses(*model(views.transpose(0, 1)).unbind(1)).mean().backward()
    wanted = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses(*map(model, views))]
    torch.testing.assert_close(called, torch.stack(wanted))
    torch.testing.assert_close(weight.grad_batch, called)


def test_eigenvectors_whose_phases_the_loss_does_not_depend_on():
    """A single entry of them has no derivative."""
    model, x = nn.Linear(5, 5).double(), torch.randn(3, 5, 5, dtype=torch.float64)

    def losses(out):
        values, vectors = torch.linalg.eig(out)
        return values.abs().sum(1) + (vectors.abs() * torch.arange(5)).sum((1, 2))

    wanted = [torch.autograd.grad(losses(model(x[i : i + 1])).sum(), model.weight)[0] for i in range(3)]
    extend(model)
    with perex(BatchGrad()):
        losses(model(x)).mean().backward()
    torch.testing.assert_close(model.weight.grad_batch, torch.stack(wanted))


class Scaled(nn.Module):
    """One number for each example."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 1), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.inner(x).squeeze(1) * self.scale


@pytest.mark.parametrize("model", [Scaled(), nn.LSTM(3, 4, batch_first=True)], ids=["numbers", "sequences"])
def test_outputs_of_any_number_of_axes(model):
    model, x = extend(model), torch.randn(N, 3) if isinstance(model, Scaled) else torch.randn(N, 5, 3)

    def output():
        out = model(x)
        return out[0] if isinstance(out, tuple) else out

    with perex(BatchGrad()):
        F.softplus(-output()[torch.arange(N)]).mean().backward()
        with pytest.raises(CrossExampleError, match="couples examples"):
            output().softmax(0).square().mean().backward()
        with pytest.raises((CrossExampleError, LossError)):  # of single numbers it is a function of one
            output().std(0).mean().backward()


def counting(calls):
    """A function of a user, which notes what its backward is given."""

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            calls.append(g)
            return g

    return Counting.apply


def test_functions_below_another_output_are_called_once():
    """An output may be computed from another one, of which the gradient goes through a function of a user."""
    calls = []

    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            z = self.encoder(x)
            return z, self.decoder(counting(calls)(z) * 1.0)

    model = extend(Coder())
    with perex(BatchGrad()):
        z, out = model(torch.randn(N, 3))
        (z.square().mean(0).sum() + out.square().mean(0).sum()).backward()
    assert len(calls) == 1


def test_examples_that_meet_on_another_axis():
    model, x = extend(nn.LSTM(3, 4), batch_dim=1), torch.randn(6, N, 3)
    with perex(BatchGrad()):
        model(x)[0].softmax(2).log().mean().backward()  # of each
        with pytest.raises(CrossExampleError, match="couples examples"):
            model(x)[0].softmax(1).log().mean().backward()


def test_chosen_rows_may_have_as_many_entries_as_there_are_examples():
    model = extend(nn.Linear(3, 2))
    with perex(BatchGrad()):
        (model(torch.randn(6, 3))[torch.tensor([0, 2, 3])].square().sum() / 6).backward()
        with pytest.raises(LossError, match="divides by 8"):
            (model(torch.randn(6, 3))[torch.tensor([0, 2, 3, 5])].square().sum() / 8).backward()


def test_a_part_of_another_axis_is_no_part_of_the_examples():
    model, x = extend(nn.LSTM(3, 4), batch_dim=1), torch.randn(2 * N, N, 3)
    with perex(BatchGrad()):
        (model(x)[0][1:].square().mean() + model(x)[0].transpose(1, 2)[1:].mean()).backward()
        model(x)[0][torch.tensor([0, 3, 4])].square().mean().backward()  # steps of time
        model(x)[0].index_select(1, torch.tensor([1, 0, 2, 4, 3])).square().mean().backward()
        (model(x)[0][torch.tensor([0, 3, 4])].square().sum() / 60).backward()


def test_two_forwards_of_the_same_examples_may_meet():
    """Example n of one with example n of the other."""
    model, x = extend(nn.Linear(3, 4)), torch.randn(2, N, 3)
    with perex(BatchGrad()):
        F.mse_loss(model(x[0]), model(x[1])).backward()
        F.cosine_similarity(model(x[0]), model(x[1]), dim=1).mean().backward()
        with pytest.raises(CrossExampleError, match="couples examples"):
            F.cosine_similarity(model(x[0])[:, None], model(x[1])[None], dim=2).mean().backward()


TOKENS = torch.arange(15).view(5, 3) % 4
ORDINARY = {
    "classes": lambda out: F.cross_entropy(out[:, 0], CLASSES),
    "tokens": lambda out: F.cross_entropy(out.flatten(0, 1), TOKENS.flatten()),
    "tokens, classes first": lambda out: F.cross_entropy(out.transpose(1, 2), TOKENS, reduction="none").mean(1).mean(),
    "the next token": lambda out: F.cross_entropy(out[:, :-1].reshape(-1, 4), TOKENS[:, 1:].reshape(-1)),
    "by hand": lambda out: -out.log_softmax(2).gather(2, TOKENS[:, :, None]).squeeze(2).mean(1).mean(),
    "squares": lambda out: F.mse_loss(out, torch.ones(5, 3, 4)),
    "squares of each": lambda out: (out - 1).square().sum((1, 2)).mean(),
    "two": lambda out: F.mse_loss(out, out.detach() + 1) + 0.1 * out.abs().mean(),
}


@pytest.mark.parametrize("loss", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_losses_are_differentiated_once(loss, monkeypatch):
    """A second time takes as much memory again."""
    monkeypatch.setattr(couplings, "_couples", lambda *args: pytest.fail("was differentiated twice"))
    model = extend(
        nn.Sequential(nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 4))
    )
    with perex(BatchGrad()):
        loss(model(torch.randn(5, 3, 3))).backward()


def test_a_form_of_a_loss_is_looked_at_ever_more_seldom(monkeypatch):
    asked = []
    monkeypatch.setattr(couplings, "_couples", lambda *args: asked.append(args) or False)
    model = extend(nn.Linear(3, 4))

    other = extend(nn.Linear(3, 4))

    def step(n, loss, model=model):
        with perex(BatchGrad()):
            loss(model(torch.randn(n, 3))).backward()

    looks = []
    for n in (5, 7, 5, 6, 9, 5, 5, 8, 5):
        step(n, lambda out: out.square().mean(0).sum())
        looks.append(len(asked))
    assert looks == [1, 2, 2, 3, 3, 3, 3, 4, 4]
    step(5, lambda out: out.square().mean(1).sum())  # along each example: no cause for doubt
    assert len(asked) == 4
    step(5, lambda out: out.square().mean(0, keepdim=True).sum())
    step(5, lambda out: out.roll(1, 0).exp().mean())
    step(5, lambda out: out.roll(2, 0).exp().mean())
    assert len(asked) == 7
    for looked in (8, 9, 9):  # another model is another matter
        step(5, lambda out: out.square().mean(0).sum(), other)
        assert len(asked) == looked
    seen = couplings._SEEN._counts[model]
    monkeypatch.setattr(graph, "_MOST", len(seen))
    step(5, lambda out: out.roll(3, 0).exp().mean())
    assert len(seen) == 1


def test_examples_that_begin_to_meet_are_found():
    """A loss of one form, in which they meet only once they are near."""
    model = extend(nn.Linear(3, 4))
    near = torch.randn(1, 3) + 0.1 * torch.randn(N, 3)

    def steps(count, x):
        for _ in range(count):
            with perex(BatchGrad(), grad=False):
                out = model(x)
                F.relu(1 - (out - out.roll(1, 0)).square().sum(1)).mean().backward()

    steps(5, 100 * torch.randn(N, 3))
    with pytest.raises(CrossExampleError, match="couples examples"):
        steps(4, near)


def test_hooks_of_users_are_called_once():
    model, x, calls = extend(nn.Linear(3, 4)), torch.randn(N, 3), []

    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x):
            out = self.inner(x) * 1.0
            out.register_hook(lambda g: calls.append(g))
            return out

    inside = extend(Kept())
    for _ in range(2):
        with perex(BatchGrad()):
            doubled = model(x) * 2
            doubled.retain_grad()
            doubled.std(0).mean().backward()  # not looked at, for the hook's sake
        assert doubled.grad.abs().max() < 1
        wanted = torch.autograd.grad((again := doubled.detach().requires_grad_()).std(0).mean(), again)[0]
        torch.testing.assert_close(doubled.grad, wanted)
    with perex(BatchGrad()):
        inside(x).std(0).mean().backward()
    assert len(calls) == 1
    out = model(x)
    with perex(BatchGrad()):
        out.std(0).mean().backward()  # nor where what happened before the context is not known


def test_functions_of_users_are_called_once():
    calls = []

    joined(lambda out: counting(calls)(out).std(0).mean())
    assert len(calls) == 1


def test_a_single_example_is_joined_with_none():
    model = extend(nn.Linear(3, 4))
    with perex(BatchGrad()):
        F.mse_loss(model(torch.randn(1, 3)), torch.zeros(1, 4)).sqrt().backward()
    torch.testing.assert_close(model.weight.grad_batch[0], model.weight.grad)


def test_a_plain_sum_of_losses_declared_as_mean_is_refused():
    with pytest.raises(LossError, match="loss_reduction='sum'"):
        joined(lambda out: each(out).sum())
    assert joined(lambda out: each(out).sum(), loss_reduction="sum")[0].any()
    assert joined(lambda out: (each(out) / N).sum())[0].any()


@pytest.mark.parametrize(
    "losses",
    [
        lambda out: (out - 1).square(),
        lambda out: (out - 1).square().sum(1),
        lambda out: (out[:, 0] - 1).abs(),
        lambda out: -out.log_softmax(1)[:, 1],
        lambda out: -out.log_softmax(1).gather(1, torch.ones(len(out), 1, dtype=torch.long)).squeeze(1),
        lambda out: out.norm(dim=1),
    ],
)
def test_a_sum_by_hand_declared_as_mean_is_refused(losses):
    for total in (
        lambda out: losses(out).sum(),
        lambda out: 0.5 * losses(out).sum(),
        lambda out: -1 * losses(out).sum(),
        lambda out: (0.5 * losses(out)).sum(),
    ):
        with pytest.raises(LossError, match=f"sums over {N} examples.*loss_reduction='sum'"):
            joined(total)
        assert joined(total, loss_reduction="sum")[0].any()
    for mean in (
        lambda out: (losses(out) / N).sum(),
        lambda out: losses(out).sum() / N,
        lambda out: 10 * losses(out).sum() / N,
        lambda out: losses(out).mean(),
    ):
        assert joined(mean)[0].any()
    model = extend(nn.Linear(3, 4))
    with perex(BatchGrad()):
        losses(model(torch.randn(1, 3))).sum().backward()  # of one example it is the mean
    torch.testing.assert_close(model.weight.grad_batch[0], model.weight.grad)


def divergence(out):
    """Of each example, as of a variational autoencoder."""
    return -0.5 * (1 + out[:, :2] - out[:, 2:].square() - out[:, :2].exp()).sum(1)


def squares(out):
    return (out - 1).square()


SUMS = {  # of which the graph does not tell what they are
    "kl_div": lambda out, **how: F.kl_div(out.log_softmax(1), out.detach().softmax(1), **how),
    "gaussian_nll_loss": lambda out, **how: F.gaussian_nll_loss(out[:, 0], torch.ones(N), out[:, 1].exp(), **how),
    "poisson_nll_loss": lambda out, **how: F.poisson_nll_loss(out, torch.ones_like(out), **how),
    "cosine_embedding_loss": lambda out, **how: F.cosine_embedding_loss(out, out.detach() + 1, torch.ones(N), **how),
    "cross_entropy": lambda out, **how: F.cross_entropy(out, torch.ones(N, dtype=int), label_smoothing=0.1, **how),
    "cross_entropy of probabilities": lambda out, **how: F.cross_entropy(out, out.detach().softmax(1), **how),
    "a module": lambda out, **how: nn.KLDivLoss(**how)(out, out.detach().softmax(1)),
}


@pytest.mark.parametrize("loss", SUMS.values(), ids=SUMS)
def test_a_loss_of_torch_that_was_told_to_add_up_declared_as_mean_is_refused(loss):
    with pytest.raises(LossError, match="loss_reduction='sum'"):
        joined(lambda out: loss(out, reduction="sum"))
    with pytest.raises(LossError, match=f"sums over {N} examples.*loss_reduction='sum'"):
        joined(lambda out: divergence(out).mean() + loss(out, reduction="sum"))
    for mean in (lambda out: loss(out, reduction="sum") / N, lambda out: loss(out, reduction="none").mean()):
        rows, grad = joined(mean)
        torch.testing.assert_close(rows.mean(0), grad)
    assert joined(lambda out: loss(out, reduction="sum"), loss_reduction="sum")[0].any()


@pytest.mark.parametrize(
    "total",
    [
        lambda out: F.mse_loss(out, torch.ones_like(out), reduction="sum") + divergence(out).sum(),
        lambda out: divergence(out).sum() + F.mse_loss(out, torch.ones_like(out), reduction="sum"),
        lambda out: 0.5 * squares(out).sum() + divergence(out).sum(),
        lambda out: squares(out).sum() + 0.01 * divergence(out).sum(),
        lambda out: squares(out).sum() + divergence(out).mean(),
        lambda out: divergence(out).mean() - squares(out).sum(),
    ],
)
def test_a_sum_beside_other_losses_declared_as_mean_is_refused(total):
    with pytest.raises(LossError, match=f"sums over {N} examples.*loss_reduction='sum'"):
        joined(total)


@pytest.mark.parametrize(
    "mean",
    [
        lambda out: squares(out).sum() / N + 3 * divergence(out).sum() / N,
        lambda out: (squares(out).sum() + divergence(out).sum()) / N,
        lambda out: (squares(out).sum() + divergence(out).sum()) * (1 / N),
        lambda out: squares(out).sum() * (1 / N) + divergence(out).sum() * (5 / N),
        lambda out: divergence(out).mean() + squares(out).mean(0).sum(),
        lambda out: divergence(out).mean() + sum(squares(out).sum(1)[i] * (1 / N) for i in range(N)),
        lambda out: squares(out).mean() + (divergence(out) / N).sum(),
    ],
)
def test_means_of_several_losses_may_be_written_as_sums(mean):
    rows, grad = joined(mean)
    torch.testing.assert_close(rows.mean(0), grad)


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_scaled_sum_of_a_loss_of_torch_declared_as_mean_is_refused(loss, reduction):
    def total(out):
        found = loss(out, torch.ones_like(out), reduction=reduction)
        return found.sum() if reduction == "none" else found

    for scaled in (lambda out: 0.5 * total(out), lambda out: total(out) / 3, lambda out: -2 * -total(out)):
        with pytest.raises(LossError, match=f"sums over {N} examples.*loss_reduction='sum'"):
            joined(scaled)
    for mean in (lambda out: total(out) / N, lambda out: 3 * total(out) / out.numel(), lambda out: 7 * total(out) / N):
        assert joined(mean)[0].any()


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "loss",
    [lambda out: 0.5 * out.square().mean(), lambda out: (out.square() / len(out)).sum()],
    ids=["after", "before"],
)
def test_dispatch_modes_may_look_on(loss):
    model = extend(nn.Linear(3, 4))
    with Looking(), perex(BatchGrad()):
        loss(model(torch.randn(N, 3))).backward()
    torch.testing.assert_close(model.weight.grad_batch.mean(0), model.weight.grad)


# -- means over rows that the model itself has chosen --------------------------------------------------------------

KEPT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 0, 1, 0]]).bool()  # 3 + 1 + 3 + 2
BY_CHANCE = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()  # 8, a multiple of 4
FOUR = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]).bool()
TWO_EACH = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()


class Chosen(nn.Module):
    """The head sees those tokens only that are predicted."""

    def __init__(self, loss=None, packed=False):
        super().__init__()
        self.embedding, self.head, self.loss = nn.Embedding(9, 3), nn.Linear(3, 5), loss
        self.layer = nn.LSTM(3, 3, batch_first=True) if packed else nn.Identity()
        self.packed = packed

    def forward(self, ids, kept):
        if self.packed:
            h = nn.utils.rnn.pack_padded_sequence(self.embedding(ids), kept.sum(1), True, enforce_sorted=False)
            out = self.head(self.layer(h)[0].data)
        else:
            out = self.head(self.embedding(ids)[kept])
        return out if self.loss is None else self.loss(out, kept)


def labels_of(out):
    return torch.arange(len(out)) % out.shape[-1]


def pooled(out, kept):
    """The mean of each example's own tokens."""
    owner = torch.arange(len(kept)).repeat_interleave(kept.sum(1))
    sums = torch.zeros(len(kept), out.shape[-1]).index_add(0, owner, out.square())
    return (sums / kept.sum(1, keepdim=True).clamp(min=1)).mean()


def by_a_matrix(out, kept):
    owner = torch.arange(len(kept)).repeat_interleave(kept.sum(1))
    return (F.one_hot(owner, len(kept)).float().t() @ out.square()).mean()


UNEVEN = {
    "cross-entropy": lambda out, kept: F.cross_entropy(out, labels_of(out)),
    "mean": lambda out, kept: out.square().mean(),
    "mean of means": lambda out, kept: out.square().mean(1).mean(),
    "flat": lambda out, kept: out.reshape(-1).square().mean(),
    "turned": lambda out, kept: out.t().exp().mean(),
    "squared error": lambda out, kept: F.mse_loss(out, torch.zeros_like(out)),
    "absolute error": lambda out, kept: F.l1_loss(out, torch.zeros_like(out)),
    "a part": lambda out, kept: F.smooth_l1_loss(out[:, :2], out.detach()[:, :2] + 1) + 0.1 * out.square().sum() / 4,
    "many steps": lambda out, kept: functools.reduce(lambda a, _: a * 0.5, range(40), out.exp()).mean(),
}
OVER_ROWS = {
    "sum": lambda out, kept: out.square().sum() / len(out),
    "batchmean": lambda out, kept: F.kl_div(out.log_softmax(1), torch.full_like(out, 0.2), reduction="batchmean"),
}
OF_EACH = {
    "pooled": pooled,
    "by a matrix": by_a_matrix,
    "summed over, then turned": lambda out, kept: out.t().sum(1).mean() / len(kept),
    "a sum over all": lambda out, kept: out.square().sum() / len(kept),
}


def of_chosen(loss, kept, *, inside, **options):
    torch.manual_seed(0)
    model = extend(Chosen(loss if inside else None, **options))
    with perex(BatchGrad()):
        out = model(torch.randint(0, 9, (4, 4)), kept)
        (out if inside else loss(out, kept)).backward()
    return model.head.weight.grad_batch, model.head.weight.grad


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("kept", [KEPT, BY_CHANCE], ids=["nine", "eight"])
@pytest.mark.parametrize("name", UNEVEN)
def test_a_mean_over_rows_of_which_some_examples_have_more(name, kept, inside):
    """One example's tokens change how much those of all others count."""
    with pytest.raises(LossError, match=rf"mean of {int(kept.sum())} entries that were chosen .* each example's own"):
        of_chosen(UNEVEN[name], kept, inside=inside)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("name", OVER_ROWS)
def test_a_sum_divided_by_the_number_of_rows(name, inside):
    with pytest.raises(LossError, match="divides by 9, the number of entries that were chosen"):
        of_chosen(OVER_ROWS[name], KEPT, inside=inside)


def test_a_mean_over_the_steps_of_a_packed_sequence():
    with pytest.raises(LossError, match="mean of 9 entries that were chosen"):
        of_chosen(UNEVEN["cross-entropy"], KEPT, inside=False, packed=True)


@pytest.mark.parametrize(
    "choose", [lambda rows, y: rows[y], lambda rows, y: F.embedding(y, rows)], ids=["[]", "embedding"]
)
def test_a_mean_over_others_that_choose_among_the_rows(choose):
    """Rows of a model that stand for classes, and the examples are constants in the loss."""
    model, constants, y = extend(nn.Linear(5, 3)), torch.randn(7, 3), torch.tensor([0, 1, 3, 2, 1, 0, 0])
    with pytest.raises(LossError, match="mean of 7 entries that were chosen"), perex(BatchGrad()):
        (constants * choose(model(torch.randn(4, 5)), y)).sum(1).mean().backward()


@pytest.mark.parametrize("kept", [KEPT, BY_CHANCE, FOUR], ids=["nine", "eight", "as many as examples"])
@pytest.mark.parametrize("loss", OF_EACH.values(), ids=OF_EACH)
def test_rows_that_are_joined_otherwise(loss, kept):
    rows, grad = of_chosen(loss, kept, inside=False)
    torch.testing.assert_close(rows.mean(0), grad)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("loss", [pooled, *UNEVEN.values(), *OVER_ROWS.values()], ids=["pooled", *UNEVEN, *OVER_ROWS])
def test_means_of_as_many_rows_of_each_example(loss, inside):
    rows, grad = of_chosen(loss, TWO_EACH, inside=inside)
    torch.testing.assert_close(rows.mean(0), grad)


# -- several losses that a model itself puts beside each other ------------------------------------------------------


class Losses(nn.Module):
    """Two losses of all examples, and what is made of them in the forward."""

    def __init__(self, join):
        super().__init__()
        self.inner, self.join = nn.Linear(3, 4), join

    def forward(self, x):
        out = self.inner(x)
        return self.join(F.cross_entropy(out, labels_of(out)), out.square().mean())


BESIDE = {
    "mean": lambda *losses: torch.stack(losses).mean(),
    "weights": lambda *losses: (torch.stack(losses) * torch.tensor([0.3, 0.7])).sum(),
    "entries": lambda *losses: torch.cat([one.view(1) for one in losses]).unbind()[1] + torch.hstack(losses)[0],
    "returned": lambda *losses: torch.stack(losses),
}
BENT = {
    "roots": lambda *losses: torch.stack(losses).sqrt().sum(),
    "the largest": lambda *losses: torch.stack(losses).max(),
    "norm": lambda *losses: torch.stack(losses).norm(),
    "by themselves": lambda *losses: (torch.stack(losses).softmax(0) * torch.stack(losses)).sum(),
    "by themselves, detached": lambda *losses: (torch.stack(losses).detach() * torch.stack(losses)).sum(),
    "by one of them, detached": lambda one, other: (torch.stack([one, other]) * other.detach()).sum(),
    "product": lambda *losses: torch.stack(losses).prod(),
    "with itself": lambda *losses: torch.dot(torch.stack(losses), torch.stack(losses)),
    "repeated": lambda one, other: (torch.stack([one, other]) + torch.zeros(3, 2)).exp().sum(),
}


@pytest.mark.parametrize("join", BESIDE.values(), ids=BESIDE)
def test_a_model_may_put_its_losses_beside_each_other(join):
    model = extend(Losses(join).double())
    for n in (5, 2, 7):
        x = torch.randn(n, 3).double()
        with perex(BatchGrad()):
            model(x).sum().backward()
        got = model.inner.weight.grad_batch
        torch.testing.assert_close(got.mean(0), model.inner.weight.grad)
        model.zero_grad()


def test_numbers_beside_each_other_do_not_weigh_data():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            h = self.inner(x)
            return torch.stack([h.mean(), h.square().mean()]) @ x[0, :2]

    model = extend(Model())
    with pytest.raises(CrossExampleError, match="mixes examples"), perex(BatchGrad()):
        model(torch.randn(5, 3)).backward()


@pytest.mark.parametrize("join", BENT.values(), ids=BENT)
def test_what_bends_such_losses_is_refused(join):
    model = extend(Losses(join))
    with pytest.raises((CrossExampleError, LossError)), perex(BatchGrad()):
        model(torch.randn(5, 3)).sum().backward()
