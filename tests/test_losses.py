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
