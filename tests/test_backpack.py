"""BackPACK as a second oracle where it is right: with ``loss_reduction="sum"`` on a mean loss the fields are its own.

Left out are its known errors: ``batch_l2`` of grouped convolutions, ``padding='same'``, other padding modes, shared
parameters and modules called twice.
"""

import copy
import warnings

import pytest
import reference
import torch
from torch import nn

from perexample import extend, perex
from perexample.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    backpack = pytest.importorskip(
        "backpack", reason="BackPACK (backpack-for-pytorch, installed with --no-deps) is missing"
    )
    from backpack import extensions as theirs

FIELDS = ("grad_batch", "batch_l2", "sum_grad_squared", "variance")


@pytest.fixture(autouse=True)
def _float64():
    """BackPACK unfolds volumes in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def head(*layers, features):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "linear-no-bias": (lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 3)), (5,)),
    "linear-positions": (lambda: head(nn.Linear(5, 4), nn.Tanh(), features=12), (3, 5)),
    "conv1d": (lambda: head(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.ReLU(), features=12), (2, 8)),
    "conv2d": (lambda: head(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), features=12), (2, 4, 4)),
    "conv2d-dilated": (lambda: head(nn.Conv2d(2, 3, (2, 3), dilation=(2, 1)), nn.ReLU(), features=36), (2, 6, 5)),
    "conv3d": (lambda: head(nn.Conv3d(1, 2, 2), nn.ReLU(), features=16), (1, 3, 3, 3)),
    "transposed1d": (lambda: head(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.ReLU(), features=27), (2, 4)),
    "transposed2d": (lambda: head(nn.ConvTranspose2d(2, 3, 2), nn.ReLU(), features=48), (2, 3, 3)),
    "transposed3d": (lambda: head(nn.ConvTranspose3d(1, 2, 2), nn.ReLU(), features=54), (1, 2, 2, 2)),
}
BATCH_GRAD_ONLY = {
    "grouped": (lambda: head(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), features=16), (4, 4, 4)),
}


def fields(model, extend_model, context, x, y):
    torch.manual_seed(0)
    model = extend_model(copy.deepcopy(model))
    loss_fn = nn.CrossEntropyLoss()
    if extend_model is backpack.extend:
        loss_fn = backpack.extend(loss_fn)
    with context:
        loss_fn(model(x), y).backward()
    return dict(model.named_parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*MODELS, *BATCH_GRAD_ONLY])
def test_same_fields(name):
    torch.manual_seed(0)
    make, shape = (MODELS | BATCH_GRAD_ONLY)[name]
    model = make().double()
    x, y = torch.randn(6, *shape, dtype=torch.float64), torch.randint(0, 3, (6,))
    ours = perex(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), loss_reduction="sum")
    found = fields(model, extend, ours, x, y)
    kinds = (theirs.BatchGrad(), theirs.BatchL2Grad(), theirs.SumGradSquared(), theirs.Variance())
    wanted = fields(model, backpack.extend, backpack.backpack(*kinds), x, y)
    for parameter, p in found.items():
        for field in FIELDS if name in MODELS else ("grad_batch", "sum_grad_squared"):
            value = getattr(wanted[parameter], field)
            reference.assert_close_report(getattr(p, field), value, 1e-10, f"{field} of {parameter}")


@pytest.mark.filterwarnings("ignore")
def test_same_fields_for_batch_norm_in_evaluation_mode_and_embedding():
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    norm(torch.randn(20, 5, dtype=torch.float64))
    table = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    for model, x in ((norm.eval(), torch.randn(6, 5, dtype=torch.float64)), (table, torch.randint(0, 7, (6, 3)))):
        y = torch.randint(0, 3, (6,))
        found = fields(model, extend, perex(BatchGrad(), loss_reduction="sum"), x, y)
        wanted = fields(model, backpack.extend, backpack.backpack(theirs.BatchGrad()), x, y)
        for parameter, p in found.items():
            reference.assert_close_report(p.grad_batch, wanted[parameter].grad_batch, 1e-10, parameter)
