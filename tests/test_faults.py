"""The known ways in which private training went wrong elsewhere, each with the test that catches it here."""

import copy
import math
import warnings

import naive
import pytest
import torch
import torch.nn.functional as F
from naive import Lambda, assert_bitwise, assert_same, fields, mse, randn, tensors_alive
from torch import nn
from torch.utils.checkpoint import checkpoint

from perexample import (
    DP_SGD,
    BatchAxisError,
    ConfigurationError,
    CrossExampleError,
    GenericRule,
    LossError,
    NonFiniteExampleWarning,
    PerExampleError,
    Rule,
    RuleContractError,
    StaleGradientError,
    UnsupportedModuleError,
    check,
    extend,
    perex,
    privatize,
    register_rule,
    unextend,
)
from perexample.extensions import Automatic, BatchGrad, BatchL2Grad, ClippedGrad, Global


def clipped_sum(model, loss, *batch, bound=1.0, grad=False, **settings):
    """All clipped sums of one backward, by name."""
    clipping = ClippedGrad(bound)
    with perex(clipping, grad=grad, **settings):
        loss(model, *batch).backward()
    return fields(model, "clipped_sum")


def grad_batch(model, loss, *batch, **settings):
    with perex(BatchGrad(), **settings):
        loss(model, *batch).backward()
    return fields(model, "grad_batch")


def assert_all_fields(model, loss, *batch, bound=1.0):
    """Gradients, norms and clipped sums, against one backward per example."""
    wanted = naive.rows(model, loss, *batch)
    with perex(BatchGrad(), BatchL2Grad(), ClippedGrad(bound)):
        loss(extend(model), *batch).backward()
    assert_same(fields(model, "grad_batch"), wanted)
    assert_same(fields(model, "batch_l2"), {n: g.flatten(1).square().sum(1) for n, g in wanted.items()})
    assert_same(fields(model, "clipped_sum"), naive.clipped(wanted, bound))


def dp_sgd(model, clipping, noise=0.0, size=1.0, lr=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DP_SGD(
        model.parameters(),
        lr=lr,
        clipping=clipping,
        noise_multiplier=noise,
        expected_batch_size=size,
        generator=generator,
    )


class TiedScorer(nn.Module):
    """A module of no registered type that uses a weight it shares with another module."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T


# ---------------------------------------------------------------------------------------------------- the findings


def cancelling(n, positions, width, noise, size=1.0):
    """Nearly equal tokens ``x`` and alternating upstream gradients ``g``, and the true norms of weight and bias."""
    base, direction = randn(n, 1, width, seed=1), randn(n, 1, width, seed=2)
    order = torch.randperm(positions, generator=torch.Generator().manual_seed(5))
    signs = torch.tensor([1.0, -1.0]).repeat(positions // 2)[order].view(1, -1, 1)
    x = (size * (base + noise * randn(n, positions, width, seed=3))).float()
    g = (signs * direction + noise * randn(n, positions, width, seed=4)).float()
    weight = torch.einsum("nto,nti->noi", g.double(), x.double()).flatten(1).norm(dim=1)
    return x, g, weight, g.double().sum(1).norm(dim=1)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(("positions", "width"), [(32, 256), (64, 600), (8, 64)])
def test_finding_1_gram_norms_do_not_cancel(positions, width, noise):
    """Nearly equal tokens with alternating upstream gradients: the float32 Gram norm is 0, the clipped row 77 C."""
    n = 16
    layer = extend(nn.Linear(width, width))
    x, g, weight, bias = cancelling(n, positions, width, noise)
    clipping = ClippedGrad(1.0, groups="per-parameter")
    with perex(clipping, grad=False):
        (layer(x) * g).sum().div(n).backward()
    joint = (weight**2 + bias**2).sqrt()
    # the plain sum over the positions rounds too: eps times the sum of the norms of what is added
    rounding = 1.2e-7 * x.double().norm(dim=-1).mul(g.double().norm(dim=-1)).sum(1)
    assert (clipping.group_norms["weight"] >= weight * (1 - 1e-6)).all()
    assert (clipping.norms >= joint * (1 - 1e-6) - rounding / width**0.5).all()
    assert (clipping.norms <= joint * 1.05 + rounding).all()


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-6, 1e-2])
@pytest.mark.parametrize(("size", "bound"), [(1.0, 1.0), (1e4, 1.0), (1e4, 1e-4)])
def test_finding_1_clipped_rows_are_no_longer_than_the_bound(noise, size, bound):
    """Where the pieces of a gradient cancel, the clipped sum's own rounding must not exceed C either."""
    layer = extend(nn.Linear(256, 256, bias=False))
    x, g, weight, _ = cancelling(4, 32, 256, noise, size)
    for i in range(4):
        with perex(ClippedGrad(bound), grad=False):
            (layer(x[i : i + 1]) * g[i : i + 1]).sum().backward()
        row = layer.weight.clipped_sum.double().norm().item()
        assert row <= bound * (1 + 1e-5), f"{row / bound:.4g} C, with a true norm of {weight[i]:.1e}"


def test_finding_2_tied_weight_in_a_module_without_rule_of_its_own():
    """A tied weight whose second user is no registered type: norms reported at 0.58 of the truth."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 4, bias=False)
    model = extend(nn.Sequential(linear, nn.Tanh(), TiedScorer(linear.weight)).double())
    x, y = randn(5, 4), 3 * randn(5, 4, seed=2)
    wanted = naive.rows(model, mse, x, y)
    clipping = ClippedGrad(0.1)
    with perex(clipping, BatchGrad(), BatchL2Grad()):
        mse(model, x, y).backward()
    assert_same(fields(model, "grad_batch"), wanted)
    torch.testing.assert_close(clipping.norms, naive.norms(wanted), rtol=1e-12, atol=0)
    assert_same(fields(model, "clipped_sum"), naive.clipped(wanted, 0.1))


@pytest.mark.parametrize("make", [naive.mlp, naive.cnn])
def test_finding_3_one_nan_example_contributes_exactly_nothing(make):
    """One NaN example: all coordinates of the clipped sum non-finite, or an exact noiseless zero after nan_to_num."""
    x, y = naive.batch() if make is naive.mlp else (randn(6, 2, 6, 6), randn(6, 3, seed=2))
    poisoned = x.clone()
    poisoned[2] = float("nan")
    rest = [0, 1, 3, 4, 5]
    model = extend(make())
    clipping = ClippedGrad(1.0)
    with perex(clipping), pytest.warns(NonFiniteExampleWarning, match="had a NaN"):
        mse(model, poisoned, y).backward()
    assert clipping.nonfinite == 1
    found = fields(model, "clipped_sum")
    assert_same(found, naive.clipped(naive.rows(model, mse, x[rest], y[rest]), 1.0))
    assert all((value != 0).any() for value in found.values())


def test_finding_4_hand_written_batch_mean():
    """``h - h.mean(0)`` passes validators that go by the name of modules."""
    model = Lambda(lambda self, x: self.b((h := self.a(x)) - h.mean(0)), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    with pytest.raises(CrossExampleError, match=r"`mean` in `Lambda` \(Lambda\) mixes examples"):
        check(model, nn.MSELoss(), *naive.batch())


def test_finding_4_a_module_with_parameters_that_subtracts_the_batch_mean(registry):
    """The same inside a module with a parameter of its own: the backward itself notices."""

    class Centre(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return (x - x.mean(0)) * self.gain

    model = extend(nn.Sequential(Centre(), nn.Linear(5, 3)).double())
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match=r"`mean` in `0` \(Centre\)"):
        mse(model, *naive.batch()).backward()


@pytest.mark.parametrize("make", [naive.mlp, naive.cnn])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_finding_5_sum_of_rows_is_the_gradient(make, reduction):
    """The free oracle: the sum over the examples is the gradient of the sum of their losses."""
    x, y = naive.batch() if make is naive.mlp else (randn(6, 2, 6, 6), randn(6, 3, seed=2))
    model = extend(make())
    with perex(BatchGrad(), loss_reduction=reduction):
        (mse(model, x, y) * (6 if reduction == "sum" else 1)).backward()
    scale = 6 if reduction == "mean" else 1
    assert_same({n: g.sum(0) / scale for n, g in fields(model, "grad_batch").items()}, fields(model, "grad"))


def test_finding_5_a_weight_used_by_its_module_and_functionally_is_no_silent_omission():
    """Half of the uses counted, without error."""
    torch.manual_seed(0)
    model = Lambda(lambda self, x: F.linear(self.a(x).tanh(), self.a.weight), a=nn.Linear(4, 4)).double()
    assert_all_fields(model, mse, randn(5, 4), randn(5, 4, seed=2))


@pytest.mark.parametrize("how", [torch.bfloat16, torch.float16, "autocast", torch.float32, torch.float64])
def test_finding_9_low_precision_does_not_overshoot(how):
    """Clipped to 1.0055 C in bfloat16: factors, norms and sums stay in at least float32 here."""
    dtype = torch.float32 if how == "autocast" else how
    model = extend(naive.mlp(dtype))
    x, y = naive.batch(8, dtype)
    for i in range(8):
        clipping = ClippedGrad(0.01)
        with perex(clipping, grad=False), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            out = model(x[i : i + 1])
            (out.float() - y[i : i + 1].float()).square().mean().backward()
        sums = fields(model, "clipped_sum")
        assert {s.dtype for s in sums.values()} == {torch.float64 if how is torch.float64 else torch.float32}
        assert abs(naive.vector(sums).norm().item() / 0.01 - 1) < 1e-5
        assert naive.vector(sums).norm() <= 0.01 * (1 + 1e-6)


def test_finding_10_state_after_an_aborted_forward():
    """A forward that is aborted, or has no backward, must not change the next one."""
    wanted = grad_batch(extend(naive.mlp()), mse, *naive.batch())

    class Abort(nn.Module):
        on = False

        def forward(self, x):
            if self.on:
                raise MemoryError("abort")
            return x

    model = naive.mlp()
    model.append(Abort())
    extend(model)
    with perex(BatchGrad()):
        model(naive.batch()[0])  # without a backward
        Abort.on = True
        with pytest.raises(MemoryError):
            model(naive.batch()[0])
        Abort.on = False
        mse(model, *naive.batch()).backward()
    assert_bitwise(fields(model, "grad_batch"), wanted)


# -------------------------------------------------------------------------------------------------------- F2 to F16


def test_f02_clip_each_gradient_not_their_mean():
    """Clipping the averaged gradient: two orthogonal examples of norm 10 must give a sum of norm sqrt(2) C."""
    layer = extend(nn.Linear(2, 1, bias=False).double())
    sums = clipped_sum(layer, lambda m, x: m(x).mean(), 10 * torch.eye(2, dtype=torch.float64))
    assert naive.vector(sums).norm().item() == pytest.approx(math.sqrt(2), rel=1e-12)


def test_f03_one_bound_for_all_parameters():
    """Per-layer or per-parameter clipping billed as a global C."""
    model, (x, y) = extend(naive.mlp()), naive.batch()
    for i in range(len(x)):
        sums = clipped_sum(model, mse, x[i : i + 1], y[i : i + 1], bound=0.01)
        assert naive.vector(sums).norm().item() == pytest.approx(0.01, rel=1e-12)
    split = ClippedGrad(0.01, groups="per-parameter")
    with perex(split, grad=False):
        mse(model, x[:1], y[:1]).backward()
    assert naive.vector(fields(model, "clipped_sum")).norm().item() == pytest.approx(0.02, rel=1e-12)
    assert split.sensitivity() == pytest.approx(0.01 * math.sqrt(4))


@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_f04_the_bound_holds_on_every_path(bound, grad, alone):
    """max_grad_norm ignored by an alternate path."""
    model, batch = extend(naive.cnn()), (randn(6, 2, 6, 6), 5 * randn(6, 3, seed=2))
    wanted = naive.clipped(naive.rows(model, mse, *batch), bound)
    others = () if alone else (BatchGrad(), BatchL2Grad())
    with perex(ClippedGrad(bound), *others, grad=grad):
        mse(model, *batch).backward()
    assert_same(fields(model, "clipped_sum"), wanted)


@pytest.mark.parametrize("frozen", ["weight", "bias", None])
@pytest.mark.parametrize("shape", [(5, 4), (5, 1, 4), (5, 9, 4)])
def test_f05_norm_of_the_bias(frozen, shape):
    """The bias's norm wrong under ghost clipping."""
    layer = nn.Linear(4, 3).double()
    if frozen:
        getattr(layer, frozen).requires_grad_(False)
    wanted = naive.rows(layer, naive.mean, randn(*shape))
    with perex(BatchL2Grad()):
        naive.mean(extend(layer), randn(*shape)).backward()
    assert_same(fields(layer, "batch_l2"), {n: g.flatten(1).square().sum(1) for n, g in wanted.items()})


def _tied_embedding():
    model = Lambda(lambda self, x: self.out(self.emb(x).tanh()), emb=nn.Embedding(7, 4), out=nn.Linear(4, 7))
    model.out.weight = model.emb.weight
    return model, torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(0))


def _called_twice():
    return Lambda(lambda self, x: self.a(self.a(x).tanh()), a=nn.Linear(4, 4)), randn(5, 4)


def _unregistered():
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.Tanh(), TiedScorer(linear.weight)), randn(5, 4)


@pytest.mark.parametrize("make", [_tied_embedding, _called_twice, _unregistered])
def test_f06_tied_weights(make):
    """The norm of a tied weight summed per use, without cross terms."""
    torch.manual_seed(0)
    model, x = make()
    assert_all_fields(model.double(), naive.mean, x, bound=0.5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use", [F.linear, torch.matmul, lambda h, w: h @ w.T, lambda h, w: h * w.sum(1)])
def test_f06_tied_functionally(use, bias):
    """The fourth pattern, a module and a function call; without a bias, and with it."""
    torch.manual_seed(0)
    model = Lambda(lambda self, x: use(self.a(x), self.a.weight), a=nn.Linear(4, 4, bias=bias)).double()
    assert_all_fields(model, naive.mean, randn(3, 4), bound=0.5)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cell", [nn.Linear, nn.RNNCell, nn.GRUCell])
def test_f07_recurrent_calls(calls, cell):
    """A module called k times stacked as k N examples."""

    def forward(self, x):
        h = x
        for _ in range(calls):
            h = self.cell(h).tanh() if cell is nn.Linear else self.cell(x, h)
        return h

    torch.manual_seed(0)
    model = extend(Lambda(forward, cell=cell(4, 4)).double())
    x, y = randn(5, 4), randn(5, 4, seed=2)
    wanted = naive.rows(model, mse, x, y)
    assert_same(grad_batch(model, mse, x, y), wanted)
    assert_same(clipped_sum(model, mse, x, y, bound=0.1), naive.clipped(wanted, 0.1))


def test_f08_calls_of_one_loss_pair_up_row_by_row():
    """The same network called several times in a loss: row n of every call is example n."""
    model, (x, y) = extend(naive.mlp()), naive.batch()
    z = randn(6, 5, seed=5)

    def both(model, x, z, y):
        return ((model(x) - y).square() + (model(z) - y).square()).mean()

    assert_same(grad_batch(model, both, x, z, y), naive.rows(model, both, x, z, y))


def test_f08_n_calls_of_batch_one_are_one_example():
    """So N calls with one row each are ONE example: its gradient is that of the whole loss, clipped once."""
    model, (x, y) = extend(naive.mlp()), naive.batch()

    def one_by_one(model, x, y):
        return torch.stack([mse(model, x[i : i + 1], y[i : i + 1]) for i in range(6)]).mean()

    found = grad_batch(model, one_by_one, x, y)
    assert_same(found, {name: g.mean(0, keepdim=True) for name, g in naive.rows(model, mse, x, y).items()})
    assert naive.vector(clipped_sum(model, one_by_one, x, y, bound=0.01)).norm().item() == pytest.approx(0.01)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_f09_reductions(reduction):
    """Sum and mean confused: quantities are those of the example's own loss in both cases."""
    model, x = extend(naive.mlp()), naive.batch()[0]
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    wanted = naive.rows(model, lambda m, x, t: F.cross_entropy(m(x), t), x, labels)
    for own in ("torch", "hand"):

        def loss(model, x, t, own=own):
            if own == "torch":
                return F.cross_entropy(model(x), t, reduction=reduction)
            return getattr(F.cross_entropy(model(x), t, reduction="none"), reduction)()

        assert_same(grad_batch(model, loss, x, labels, loss_reduction=reduction), wanted)
        assert_same(
            clipped_sum(model, loss, x, labels, loss_reduction=reduction, bound=0.1), naive.clipped(wanted, 0.1)
        )


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "mse_loss", "smooth_l1_loss", "huber_loss"])
def test_f09_a_sum_declared_as_mean_fails_loudly(name):
    """Where the loss node remembers its reduction, the wrong declaration is an error."""
    model, (x, y) = extend(naive.mlp()), naive.batch()
    target = torch.tensor([0, 1, 2, 0, 1, 2]) if name in ("cross_entropy", "nll_loss") else y
    with perex(BatchGrad()), pytest.raises(LossError, match="loss_reduction='sum'"):
        getattr(F, name)(model(x), target, reduction="sum").backward()


def _contrastive(z, y):
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def _normalised(z, y):
    return ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1).sqrt() - y).square().mean()


def _batch_norm(z, y):
    return (F.batch_norm(z, None, None, training=True) - y).square().mean()


def _weighted(z, y):
    losses = (z - y).square().mean(1)
    return (losses.detach().softmax(0) * losses).sum()


def _hardest(z, y):
    return (z - y).square().mean(1).max()


@pytest.mark.parametrize("loss", [_contrastive, _normalised, _batch_norm, _weighted])
def test_f10_losses_that_are_not_separable(loss):
    """Contrastive, batch-normalised and batch-weighted losses have no per-example gradients."""
    with pytest.raises(CrossExampleError, match="Exchanging one example"):
        check(naive.mlp(), loss, *naive.batch())


def test_f10_the_largest_loss_of_the_batch():
    """Seen in the graph, by every backward."""
    with pytest.raises(LossError, match=r"not linear \(MaxBackward1\), where \d+ examples are joined"):
        check(naive.mlp(), _hardest, *naive.batch())


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(7), nn.BatchNorm1d(7, affine=False), nn.SyncBatchNorm(7), nn.SyncBatchNorm(7, affine=False)],
)
def test_f11_batchnorm_in_training_mode(norm):
    """Statistics of the batch mix the examples, with or without parameters of their own."""
    with pytest.raises(UnsupportedModuleError, match=r"`1` \(\w*BatchNorm"):
        extend(nn.Sequential(nn.Linear(5, 7), norm))


@pytest.mark.parametrize("affine", [True, False])
def test_f11_batchnorm_in_evaluation_mode(affine):
    """With running statistics it is per-example; these stay as they are, to the last byte."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(7, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = extend(nn.Sequential(nn.Linear(5, 7), norm, nn.Tanh(), nn.Linear(7, 3)).double().eval())
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert_same(grad_batch(model, mse, *naive.batch()), naive.rows(model, mse, *naive.batch()))
    assert_bitwise(dict(model.named_buffers()), before)


def test_f11_a_module_that_writes_its_buffers():
    """Running statistics of a module of one's own, such as those of a router."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))
            self.register_buffer("load", torch.zeros(5))

        def forward(self, x):
            self.load.add_(x.detach().float().mean(0))
            return x * self.gain

    model = extend(nn.Sequential(Router(), nn.Linear(5, 3)))
    with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=r"`0` \(Router\).*`load`"):
        model(torch.ones(3, 5)).mean().backward()


EXTREME = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e30": 1e30, "1e-30": 1e-30, "denormal": 1e-42}


@pytest.mark.parametrize("value", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("where", ["input", "target", "intermediate"])
@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e3])
def test_f12_extreme_examples(value, where, bound):
    """For any value of one example, the sum is finite and the example moves it by no more than C."""
    torch.manual_seed(0)
    model = extend(
        Lambda(lambda self, x, s: self.b(self.a(x).tanh() * s), a=nn.Linear(5, 7), b=nn.Linear(7, 3))
    )  # float32
    (x, y), s = naive.batch(6, torch.float32), torch.ones(6, 1)

    def loss(model, x, s, y):
        return (model(x, s) - y).square().mean()

    part = {"input": x, "target": y, "intermediate": s}[where]
    part[2] = value
    rest = [0, 1, 3, 4, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        found = naive.vector(clipped_sum(model, loss, x, s, y, bound=bound))
    without = naive.vector(clipped_sum(model, loss, x[rest], s[rest], y[rest], bound=bound))
    assert found.isfinite().all()
    assert (found - without).norm() <= bound * (1 + 1e-5) + 6 * bound * 2e-7
    if math.isnan(value):
        torch.testing.assert_close(found, without, rtol=1e-5, atol=1e-6 * bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f13_half_precision_norms(dtype):
    """Norms overflow or round in half precision."""
    layer = extend(nn.Linear(64, 64, bias=False).to(dtype))
    x = (200 * randn(4, 64)).to(dtype)  # squares exceed 65504, the largest float16
    g = (200 * randn(4, 64, seed=2)).to(dtype)
    clipping = ClippedGrad(1.0)
    with perex(clipping, grad=False, loss_reduction="sum"):
        (layer(x).float() * g.float()).sum().backward()
    true = x.double().norm(dim=1) * g.double().norm(dim=1)
    torch.testing.assert_close(clipping.norms, true, rtol=1e-6, atol=0)
    assert layer.weight.clipped_sum.dtype == torch.float32
    assert layer.weight.clipped_sum.double().norm() <= 4 * (1 + 1e-6)


def test_f13_an_infinite_gradient_in_half_precision_contributes_zero():
    """float16 upstream gradients that overflow are an example without contribution, not a NaN."""
    layer = extend(nn.Linear(4, 4).half())
    weights = torch.tensor([1.0, 1e9, 1.0]).view(3, 1)
    clipping = ClippedGrad(1.0)
    with perex(clipping, grad=False), pytest.warns(NonFiniteExampleWarning):
        (layer(torch.ones(3, 4, dtype=torch.float16)).float() * weights).mean().backward()
    assert clipping.nonfinite == 1
    assert naive.vector(fields(layer, "clipped_sum")).norm().item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("kind", ["number", "scaler"])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_f14_the_scale_of_the_loss_is_undone_before_clipping(scale, kind):
    """A GradScaler's factor left in: every norm is 65536 times too large, and all is clipped."""
    model, batch = extend(naive.mlp()), naive.batch()
    wanted = naive.rows(model, mse, *batch)
    given = scale if kind == "number" else torch.amp.GradScaler("cpu", init_scale=scale)

    def scaled(model, x, y):
        loss = mse(model, x, y)
        return loss * scale if kind == "number" else given.scale(loss)

    assert_same(clipped_sum(model, scaled, *batch, loss_scale=given), naive.clipped(wanted, 1.0))
    assert_same(grad_batch(model, scaled, *batch, loss_scale=given), wanted)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("make", [naive.mlp, naive.cnn])
def test_f16_empty_batch(n, make):
    """An empty Poisson batch crashes, or is skipped without noise."""
    model = extend(make())
    x, y = (randn(n, 5) if make is naive.mlp else randn(n, 2, 6, 6)), randn(n, 3)
    clipping = ClippedGrad(1.0)
    optimizer = dp_sgd(model, clipping, noise=1.0)
    before = naive.vector(dict(model.named_parameters()))
    with perex(clipping, BatchGrad(), BatchL2Grad(), grad=False):
        mse(model, x, y).backward()
    for p in model.parameters():
        assert p.grad_batch.shape == (n, *p.shape)
        assert p.batch_l2.shape == (n,)
        assert p.clipped_sum.shape == p.shape
        assert n or (p.clipped_sum == 0).all()
    assert clipping.norms.shape == (n,)
    optimizer.step()
    moved = naive.vector(dict(model.named_parameters())) - before
    assert moved.isfinite().all()
    assert (moved != 0).all()


# ------------------------------------------------------------------------------------------------------- F23 to F41


def test_f23_a_clipped_sum_serves_one_step():
    """Two steps without a backward between them use the same gradients twice."""
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = dp_sgd(model, clipping)
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StaleGradientError, match=r"`0\.weight` was used by an earlier step"):
        optimizer.step()
    assert_bitwise(model.state_dict(), before)
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    wanted = naive.clipped(naive.rows(model, mse, *naive.batch()), 1.0)
    assert_same(fields(model, "clipped_sum"), wanted)  # begins anew, also without zero_grad
    optimizer.step()


@pytest.mark.parametrize("between", ["eval", "no_grad", "train", "eval_grad"])
def test_f32_forwards_between_forward_and_backward(between):
    """A validation forward between forward and backward."""
    wanted = grad_batch(extend(naive.mlp()), mse, *naive.batch())
    model, (x, y) = extend(naive.mlp()), naive.batch()
    other = randn(3, 5, seed=7)
    with perex(BatchGrad()):
        loss = mse(model, x, y)
        if between in ("eval", "eval_grad"):
            model.eval()
        with torch.set_grad_enabled(between in ("train", "eval_grad")):
            model(other)
        model.train()
        loss.backward()
    assert_bitwise(fields(model, "grad_batch"), wanted)


def test_f32_captured_tensors_are_let_go():
    """Activations captured by forwards without a backward pile up."""
    model = extend(naive.mlp())

    x, y = naive.batch()
    with perex(BatchL2Grad()):
        mse(model, x, y).backward()
        before = tensors_alive()
        for _ in range(5):
            model(x)
            with torch.no_grad():
                model(x)
            mse(model, x, y).backward()
        assert tensors_alive() <= before


def test_f33_a_crash_in_the_forward_leaves_nothing():
    """A raise inside the forward; the next ``with`` equals a clean run bitwise."""

    class Crash(nn.Module):
        crash = True

        def forward(self, x):
            if self.crash:
                raise RuntimeError("crash")
            return x

    def build():
        model = naive.mlp()
        return extend(nn.Sequential(model[0], model[1], nn.Sequential(Crash(), model[2])))

    clean, crashed = build(), build()
    Crash.crash = False
    wanted = clipped_sum(clean, mse, *naive.batch())
    Crash.crash = True
    with pytest.raises(RuntimeError, match="crash"), perex(ClippedGrad(1.0)):
        mse(crashed, *naive.batch()).backward()
    assert not any(hasattr(p, "clipped_sum") or p.grad is not None for p in crashed.parameters())
    Crash.crash = False
    assert_bitwise(clipped_sum(crashed, mse, *naive.batch()), wanted)


def _inplace_residual(self, x):
    h = self.a(x).clone()
    h += x
    h.mul_(2).add_(1)
    return self.b(h.relu_())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
        lambda: nn.Sequential(nn.Linear(5, 5), nn.ELU(inplace=True), nn.Dropout(0.0, inplace=True), nn.Linear(5, 3)),
        lambda: Lambda(_inplace_residual, a=nn.Linear(5, 5), b=nn.Linear(5, 3)),
    ],
    ids=["relu", "elu", "residual"],
)
def test_f34_in_place_operations(make):
    """In-place activations right after a layer raise with full backward hooks."""
    torch.manual_seed(0)
    model = extend(make().double())
    assert_same(grad_batch(model, mse, *naive.batch()), naive.rows(model, mse, *naive.batch()))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, dropout=0.0):
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.block = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 7))
        self.b = nn.Linear(7, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.a(x)
        h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.b(h)


@pytest.mark.parametrize("grad", [True, False])
def test_f35_activation_checkpointing(grad):
    """The forward runs twice; the second run may neither be counted nor be missed."""
    torch.manual_seed(0)
    model = extend(Checkpointed(False).double())
    wanted = naive.rows(model, mse, *naive.batch())
    assert_same(clipped_sum(model, mse, *naive.batch(), bound=0.1, grad=grad), naive.clipped(wanted, 0.1))
    assert_same(grad_batch(model, mse, *naive.batch(), grad=grad), wanted)


@pytest.mark.parametrize("grad", [True, False])
def test_f35_dropout_inside_a_checkpoint(grad):
    """The mask of the second run is that of the first; without perex the gradient is the same."""
    torch.manual_seed(0)
    model = extend(Checkpointed(False, dropout=0.5).double())
    torch.manual_seed(3)
    mse(model, *naive.batch()).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(3)
    found = grad_batch(model, mse, *naive.batch(), grad=grad)
    assert_same({name: g.mean(0) for name, g in found.items()}, wanted)


def test_f35_reentrant_checkpoints_are_refused():
    """Their inner graph is hidden."""
    model = extend(Checkpointed(True).double())
    with perex(BatchGrad()), pytest.raises(LossError, match="use_reentrant=False"):
        mse(model, *naive.batch()).backward()


def test_f36_an_unused_parameter_gets_zeros_and_noise():
    """A parameter that the loss does not reach must not be told from others by its missing noise."""
    model = extend(Lambda(lambda self, x: self.used(x), used=nn.Linear(5, 3), unused=nn.Linear(4, 4)).double())
    clipping = ClippedGrad(1.0)
    optimizer = dp_sgd(model, clipping, noise=1.0)
    with perex(clipping, BatchGrad(), BatchL2Grad(), grad=False):
        mse(model, *naive.batch()).backward()
    assert torch.equal(model.unused.weight.grad_batch, torch.zeros(6, 4, 4, dtype=torch.float64))
    assert torch.equal(model.unused.bias.batch_l2, torch.zeros(6, dtype=torch.float64))
    assert torch.equal(model.unused.bias.clipped_sum, torch.zeros(4, dtype=torch.float64))
    before = model.unused.weight.detach().clone()
    optimizer.step()
    assert (model.unused.weight != before).all()


def test_f36_not_reached_in_one_backward_only():
    """Reached in the first, not in the second: zeros, not the old values."""
    model = extend(Lambda(lambda self, x, both: self.a(x) + (self.b(x) if both else 0), a=nn.Linear(5, 3)))
    model.b = nn.Linear(5, 3)
    extend(model)
    with perex(BatchGrad()):
        model(torch.ones(2, 5), True).mean().backward()
        assert (model.b.weight.grad_batch != 0).all()
        model(torch.ones(3, 5), False).mean().backward()
    assert torch.equal(model.b.weight.grad_batch, torch.zeros(3, 3, 5))


def test_f37_no_parameter_of_the_optimizer_is_updated_unclipped():
    """A parameter with a raw gradient but no clipped sum."""
    model, stray = extend(naive.mlp()), nn.Parameter(torch.ones(2, dtype=torch.float64))
    clipping = ClippedGrad(1.0)
    optimizer = privatize(
        torch.optim.Adam([*model.parameters(), stray]), clipping=clipping, noise_multiplier=0.0, expected_batch_size=6
    )
    stray.grad = torch.ones_like(stray)
    with perex(clipping, grad=False):
        mse(model, *naive.batch()).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StaleGradientError, match=r"parameter 4 \(shape \[2\]\)"):
        optimizer.step()
    assert_bitwise(model.state_dict(), before)
    assert torch.equal(stray, torch.ones(2, dtype=torch.float64))


def test_f37_a_raw_gradient_never_reaches_the_step():
    """With grad=True, the step uses the clipped sum all the same; a frozen parameter's old gradient is dropped."""
    model, clipping = extend(naive.mlp()), ClippedGrad(1e-3)
    optimizer = dp_sgd(model, clipping)
    with perex(clipping, grad=True):
        mse(model, *naive.batch()).backward()
    model[0].bias.requires_grad_(False)
    wanted = {name: p.detach() - p.clipped_sum for name, p in model.named_parameters() if p.requires_grad}
    frozen = model[0].bias.detach().clone()
    optimizer.step()
    assert_same({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, wanted)
    assert torch.equal(model[0].bias, frozen)


def test_f38_freeze_unfreeze_and_add_between_steps():
    """Parameters frozen, unfrozen or added between steps."""
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = DP_SGD(model[2].parameters(), lr=1.0, clipping=clipping, noise_multiplier=0.0, expected_batch_size=1.0)

    def step():
        optimizer.zero_grad()
        wanted = naive.clipped(naive.rows(model, mse, *naive.batch()), 1.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with perex(clipping, grad=False):
            mse(model, *naive.batch()).backward()
        assert_same(fields(model, "clipped_sum"), wanted)
        optimizer.step()
        moved = {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}
        assert_same(moved, wanted, 1e-8)
        for name, p in model.named_parameters():
            assert p.requires_grad or torch.equal(p, before[name])
            assert p.requires_grad or not hasattr(p, "clipped_sum")

    model[0].requires_grad_(False)
    step()
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    step()
    model[2].bias.requires_grad_(False)
    step()
    model[2].bias.requires_grad_(True)
    step()


class Noisy(nn.Module):
    """A custom leaf with parameters that draws random numbers, handled by the generic rule."""

    def __init__(self, draw):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.draw = draw

    def forward(self, x):
        return self.draw(x @ self.weight.T)


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: F.dropout(h, 0.5),
        lambda h: h * torch.rand_like(h),
        lambda h: h + torch.randn(h.shape[1:], dtype=h.dtype) * h.square(),
        lambda h: F.rrelu(h, training=True),
    ],
    ids=["dropout", "rand", "shared", "rrelu"],
)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("followed", [True, False], ids=["followed", "repeated"])
def test_f39_random_masks_are_replayed(registry, draw, grad, followed):
    """The fallback draws the mask anew, or one for all examples, or gives an example the mask of another."""
    if not followed:  # its functions have rules of their own, so that it would never be run again
        register_rule(Noisy)(GenericRule)
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(5, 5), Noisy(draw), nn.Tanh(), Noisy(draw), nn.Linear(5, 3)).double())
    x, y = naive.batch()
    params = dict(model.named_parameters())
    torch.manual_seed(3)
    losses = (model(x) - y).square().mean(1)
    rows = [torch.autograd.grad(of_one, list(params.values()), retain_graph=True) for of_one in losses]
    wanted = {name: torch.stack(column) for name, column in zip(params, zip(*rows, strict=True), strict=True)}
    torch.manual_seed(3)
    loss = mse(model, x, y)
    torch.manual_seed(4)  # others draw numbers in between
    between = torch.get_rng_state()
    with perex(BatchGrad(), grad=grad):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), between)
    assert_same(fields(model, "grad_batch"), wanted)


def _own_rule(result):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return x * self.gain

    @register_rule(Scale)
    class ScaleRule(Rule):
        def grad_batch(self, call, g):
            return result(g * call.x)

    return extend(nn.Sequential(nn.Linear(5, 5), Scale()))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda r: {"gain": r.sum(0)}, r"returned \[5\] for `gain`; it must be .*\[6, 5\]"),
        (lambda r: {"gain": r.T}, r"\[5, 6\].*\[6, 5\]"),
        (lambda r: {"gain": r.unsqueeze(1)}, r"\[6, 1, 5\]"),
        (lambda r: {"gain": r[:3]}, r"\[3, 5\]"),
        (lambda r: {"gain": None}, "NoneType"),
        (lambda r: {"weight": r}, r"names \['weight'\].*\['gain'\]"),
        (lambda r: {}, r"names \[\]"),
        (lambda r: r, "returned Tensor; return a dict"),
    ],
)
@pytest.mark.parametrize("extension", [BatchGrad, BatchL2Grad, lambda: ClippedGrad(1.0)])
def test_f40_shape_contract_of_custom_rules(registry, result, message, extension):
    """A custom rule with the wrong shape or batch axis; the message names rule and module."""
    model = _own_rule(result)
    with perex(extension()), pytest.raises(RuleContractError, match=rf"ScaleRule.* `1` \(Scale\).*{message}"):
        model(torch.ones(6, 5)).mean().backward()


def test_f40_batch_on_another_axis_is_no_guess():
    """A rule that expects axis 0 gets the examples there, or an error."""
    model = extend(Lambda(lambda self, x: self.conv(x.transpose(0, 1)), conv=nn.Conv1d(6, 2, 1)))
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match="`conv`"):
        model(torch.ones(6, 5, 4)).mean().backward()


def test_f41_norm_zero_needs_no_epsilon():
    """A factor C / (norm + eps), or 0 / 0."""
    model = extend(nn.Linear(5, 3, bias=False).double())
    x = randn(4, 5)
    x[1] = 0
    for clip in ("flat", "automatic", "global", lambda norms: 1 / norms):
        clipping = ClippedGrad(1.0, clip=clip)
        with perex(clipping, grad=False):
            model(x).square().sum(1).mean().backward()
        assert model.weight.clipped_sum.isfinite().all()
        assert clipping.norms[1] == 0
    exact = clipped_sum(model, naive.mean, x, bound=1e3)
    assert_same(exact, {n: g.sum(0) for n, g in naive.rows(model, naive.mean, x).items()}, 1e-14)


BAD = [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, "1", None, True, 1j, torch.tensor(1.0), [1.0]]
CONFIGURATIONS = [
    *[(f"max_norm={v!r}", lambda v=v: ClippedGrad(v), "max_norm") for v in BAD],
    *[(f"max_norm=[{v!r}]", lambda v=v: ClippedGrad({"a": v}, groups={"": "a"}), r"max_norm\['a'\]") for v in BAD],
    *[(f"stability={v!r}", lambda v=v: Automatic(v), "stability") for v in BAD],
    *[(f"threshold={v!r}", lambda v=v: Global(v), "threshold") for v in BAD if v is not None],
    *[(f"noise={v!r}", lambda v=v: _dp(noise_multiplier=v), "noise_multiplier") for v in BAD if v not in (0, 0.0)],
    *[(f"size={v!r}", lambda v=v: _dp(expected_batch_size=v), "expected_batch_size") for v in BAD],
    ("clip", lambda: ClippedGrad(1.0, clip="flatt"), "clip"),
    ("clip class", lambda: ClippedGrad(1.0, clip=Automatic), r"Automatic\(\)"),
    ("clip number", lambda: ClippedGrad(1.0, clip=1), "clip"),
    ("groups", lambda: ClippedGrad(1.0, groups="per-layer"), "groups"),
    ("groups none", lambda: ClippedGrad(1.0, groups=None), "groups"),
    ("generator", lambda: _dp(generator=3), "generator"),
    ("clipping", lambda: _dp(clipping=1.0), "clipping"),
    ("clipping class", lambda: _dp(clipping=ClippedGrad), "clipping"),
    ("reduction", lambda: perex(BatchGrad(), loss_reduction="none"), "loss_reduction"),
    ("reduction None", lambda: perex(BatchGrad(), loss_reduction=None), "loss_reduction"),
    *[(f"batch_dim={v!r}", lambda v=v: extend(naive.mlp(), batch_dim=v), "batch_dim") for v in (-1, 0.0, True, "0")],
]


def _dp(**changes):
    settings = {"lr": 0.1, "clipping": ClippedGrad(1.0), "noise_multiplier": 1.0, "expected_batch_size": 4.0}
    return DP_SGD(naive.mlp().parameters(), **(settings | changes))


@pytest.mark.parametrize(("make", "message"), [c[1:] for c in CONFIGURATIONS], ids=[c[0] for c in CONFIGURATIONS])
def test_f41_configurations_without_meaning(make, message):
    """C <= 0, sigma < 0, NaN, infinity, texts: refused where they are written, naming the argument."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        make()
    assert isinstance(caught.value, PerExampleError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "65536", None])
def test_f41_loss_scales_without_meaning(value):
    """A scale of zero, NaN or infinity is refused, naming the argument."""
    model = extend(naive.mlp())
    with pytest.raises(ConfigurationError, match="loss_scale"), perex(BatchGrad(), loss_scale=value):
        mse(model, *naive.batch()).backward()


def test_unextend_after_all_of_this():
    """An extended model that was taken back trains as if nothing had been."""
    model = extend(naive.mlp())
    clipped_sum(model, mse, *naive.batch())
    unextend(model)
    mse(model, *naive.batch()).backward()
    assert not any(hasattr(p, "clipped_sum") for p in model.parameters())
