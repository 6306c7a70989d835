"""Laws that hold whatever the model: sums, norms, permutations, independence, precision."""

import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perexample import extend, perex
from perexample.extensions import BatchDotGrad, BatchGrad, BatchL2Grad, ClippedGrad, SumGradSquared, Variance

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]
MOVABLE = [
    case for case in cases.CASES if case.n >= 2 and case.batch_dim == 0 and case.in_axes is None and not case.cut
]


def ids(case):
    return case.id


def gradients(case, model, inputs, reduction="mean"):
    with perex(BatchGrad(), loss_reduction=reduction):
        case.loss(model, inputs, reduction).backward()
    return {name: p.grad_batch for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", [case for case in cases.CASES if case.n], ids=ids)
def test_rows_add_up_to_the_gradient_and_norms_are_theirs(case):
    model, inputs = case.build()
    extend(model, batch_dim=case.batch_dim)
    with perex(BatchGrad(), BatchL2Grad()):
        case.loss(model, inputs, "mean").backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            total = torch.zeros_like(p) if p.grad is None else p.grad.to_dense() * case.n
            scale = p.grad_batch.abs().sum(0).max().clamp_min(1e-12)
            assert (p.grad_batch.sum(0) - total).abs().max() <= 1e-10 * scale, name
            norms = reference.batch_l2(p.grad_batch)
            reference.assert_close_report(p.batch_l2, norms, 1e-10, name)


@pytest.mark.parametrize("case", MOVABLE[::3], ids=ids)
def test_permuting_examples_permutes_rows(case):
    model, inputs = case.build()
    if any(t.shape[0] != case.n for t in reference.tensors(inputs)):
        pytest.skip("inputs are not one row per example")
    extend(model)
    order = torch.arange(case.n).flip(0)
    before = {name: g.clone() for name, g in gradients(case, model, inputs).items()}
    model.zero_grad()
    moved = reference.rebuilt(inputs, [t.detach()[order] for t in reference.tensors(inputs)])
    for name, rows in gradients(case, model, moved).items():
        reference.assert_close_report(rows, before[name][order], 1e-10, name)


@pytest.mark.parametrize("case", MOVABLE[1::3], ids=ids)
def test_changing_an_example_leaves_the_others_alone(case):
    model, inputs = case.build()
    if any(t.shape[0] != case.n for t in reference.tensors(inputs)):
        pytest.skip("inputs are not one row per example")
    extend(model)
    before = {name: g.clone() for name, g in gradients(case, model, inputs).items()}
    model.zero_grad()
    leaves = [t.detach().clone() for t in reference.tensors(inputs)]
    for t in leaves:
        t[0] = t[-1] * (2 if t.is_floating_point() else 1)
    for name, rows in gradients(case, model, reference.rebuilt(inputs, leaves)).items():
        reference.assert_close_report(rows[1:], before[name][1:], 1e-10, name)


def test_an_empty_batch_gives_zeros_of_the_right_shape():
    model = extend(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)))
    clipping = ClippedGrad(1.0)
    extensions = (BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad(), clipping)
    with perex(*extensions, grad=False):
        F.cross_entropy(model(torch.zeros(0, 1, 4, 4)), torch.zeros(0, dtype=torch.long)).backward()
    for p in model.parameters():
        shapes = {
            "grad_batch": (0, *p.shape), "batch_l2": (0,), "sum_grad_squared": p.shape, "variance": p.shape,
            "batch_dot": (0, 0), "clipped_sum": p.shape,
        }  # fmt: skip
        for field, shape in shapes.items():
            assert getattr(p, field).shape == shape, field
            assert not getattr(p, field).any(), field
    assert clipping.norms.shape == (0,)


FLOAT32 = [case for case in cases.CASES if case.n == 5][::9]


@pytest.mark.parametrize("case", FLOAT32, ids=ids)
def test_float32_is_close_to_float64(case):
    model, inputs = case.build()
    wanted = case.reference(model, inputs)
    model = model.float()
    extend(model, batch_dim=case.batch_dim)
    leaves = [t.detach().float() if t.is_floating_point() else t for t in reference.tensors(inputs)]
    with perex(BatchGrad(), BatchL2Grad()):
        case.loss(model, reference.rebuilt(inputs, leaves)).backward()
    scale = max(g.abs().max().item() for g in wanted.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad_batch.dtype == p.batch_l2.dtype == torch.float32
            assert (p.grad_batch - wanted[name]).abs().max() <= 3e-5 * scale, name


def cancelling(n=16, t=32, d=24, p=20, noise=1e-4):
    """Nearly equal tokens under gradients of alternating sign: pieces cancel to almost nothing."""
    torch.manual_seed(0)
    x = torch.randn(n, 1, d).expand(n, t, d) + noise * torch.randn(n, t, d)
    signs = torch.tensor([1.0, -1.0]).repeat(t // 2).view(1, t, 1)
    return x.contiguous(), signs * torch.randn(n, 1, p)


@pytest.mark.parametrize("size", [(24, 20), (300, 200)])  # the larger takes norms from Gram matrices
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
def test_float32_norms_are_never_too_small(noise, size):
    """Finding 1 of faults.md: reported norms of 0 for true norms of 60 to 79."""
    x, g = cancelling(d=size[0], p=size[1], noise=noise)
    layer, clipping = extend(nn.Linear(size[0], size[1], bias=False)), ClippedGrad(1.0)
    with perex(clipping, loss_reduction="sum", grad=False):
        (layer(x) * g).sum().backward()
    true = torch.linalg.matrix_norm(torch.einsum("nto,nti->noi", g.double(), x.double()))
    assert (clipping.norms >= true * (1 - 1e-6)).all()
    assert (clipping.norms <= true * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("t", [1, 8, 64])
def test_float32_norms_of_ordinary_inputs(t):
    torch.manual_seed(0)
    x, g = torch.randn(8, t, 256), torch.randn(8, t, 384)
    layer, clipping = extend(nn.Linear(256, 384, bias=False)), ClippedGrad(1.0)
    with perex(clipping, loss_reduction="sum", grad=False):
        (layer(x) * g).sum().backward()
    true = torch.linalg.matrix_norm(torch.einsum("nto,nti->noi", g.double(), x.double()))
    ratio = clipping.norms / true - 1  # raised by what small products after a large one could be lost by
    assert ratio.min() > -1e-6
    assert ratio.max() < 3e-5


def test_float32_norms_of_long_vectors():
    """Sums of a million squares in one go drift in float32; those of 700 products are raised by what they may drift."""
    layer, clipping = extend(nn.Linear(1000, 1000, bias=False)), ClippedGrad(1.0)
    with perex(clipping, loss_reduction="sum", grad=False):
        layer(torch.full((1, 700, 1000), 0.1)).sum().backward()
    assert -1e-6 < clipping.norms.item() / (70.0 * 1000) - 1 < 3e-5


LAYERS = st.sampled_from(["linear", "norm", "conv", "group", "prelu", "again"])


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(LAYERS, min_size=1, max_size=4),
    n=st.integers(0, 5),
    t=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_clipped_sums_of_random_models(layers, n, t, scale, seed):
    """Sequences of layers on ``[N, 4, T]``, some repeated, against clipping one by one."""
    torch.manual_seed(seed)
    made = []
    for layer in layers:
        if layer == "again" and made:
            made.append(made[0])
        elif layer == "linear":
            made.append(nn.Linear(t, t))
        elif layer == "norm":
            made.append(nn.LayerNorm([4, t]))
        elif layer == "group":
            made.append(nn.GroupNorm(2, 4, eps=0.1))
        elif layer == "prelu":
            made.append(nn.PReLU(4))
        else:
            made.append(nn.Conv1d(4, 4, 3, padding=1, groups=2))
    model = nn.Sequential(*(module for layer in made for module in (layer, nn.Tanh()))).double()
    x = scale * torch.randn(n, 4, t, dtype=torch.float64)

    def loss(output, _=None):
        return output.square().flatten(1).sum(1).mean()

    wanted = reference.grad_batch(model, loss, (x,), n)
    bound = reference.bound_near_median(wanted, n)
    extend(model)
    with perex(ClippedGrad(bound), grad=False):
        loss(model(x)).backward()
    for name, total in reference.clipped_sum(wanted, n, bound).items():
        found = model.get_parameter(name).clipped_sum
        assert (found - total).abs().max() <= 1e-9 * (1 + total.abs().max()), name
