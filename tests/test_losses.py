"""Losses that join examples in the way they say, and those that couple them through a common divisor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perexample import LossError, extend, perex
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
    equal = torch.tensor([[0, -100], [2, -100], [-100, 1], [3, -100], [-100, 0]])
    each = run_tokens(lambda total: total, equal, loss_reduction="sum")
    torch.testing.assert_close(run_tokens(lambda total: total / 10, equal), each / 2)
