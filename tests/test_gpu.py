"""The tables of the tests on a GPU, against one backward per example on the CPU: ``pytest tests/test_gpu.py``.

Where there is no GPU, `test_elsewhere` runs the tables on a device that is made of the CPU.
"""

from __future__ import annotations

import copy
import itertools

import cases
import elsewhere
import harness
import pytest
import reference
import torch
import torch.nn.functional as F
from operation_cases import ROWS
from torch import Tensor, nn

from perexample import check, extend, perex, plan, privatize, register_rule
from perexample._precision import full_precision
from perexample.errors import CrossExampleError
from perexample.extension import Extension
from perexample.extensions import (
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    SumGradSquared,
    Variance,
)
from perexample.privacy import Noise, PoissonBatchSampler
from perexample.rules.generic import GenericRule
from perexample.terms import Dense

DEVICE = elsewhere.device()
if DEVICE == "cpu":
    pytest.skip("needs a GPU", allow_module_level=True)

TOLERANCE = 1e-9
of_gpus = pytest.mark.skipif(DEVICE != "cuda", reason="about GPUs, not about where tensors lie")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
]


def ids(case):
    return case.id


def on_gpu(model: nn.Module, inputs: tuple) -> tuple[nn.Module, tuple]:
    model = model.cuda() if DEVICE == "cuda" else elsewhere.moved(model)
    return model, reference.rebuilt(inputs, [t.to(DEVICE) for t in reference.tensors(inputs)])


def skip_what_makes_tensors_on_the_cpu(run) -> None:
    """A row of the table may be written for one device; that has to be seen in a plain forward."""
    try:
        with torch.no_grad():
            run()
    except RuntimeError as error:
        if "same device" in str(error) or "cpu" in str(error).lower():
            pytest.skip(f"the row itself is for the CPU: {str(error).splitlines()[0][:80]}")
        raise


def on_cpu_too(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in tensors.items()}


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    assert all(t.device.type == DEVICE for t in tensors.values())
    return {name: t.cpu() for name, t in tensors.items()}


@pytest.mark.parametrize("case", cases.CASES, ids=ids)
def test_all_quantities(case):
    reference_on_gpu = "weight-norm" in case.id  # of which torch's kernel is less exact than float64
    gradients = on_cpu_too(case.reference(*(on_gpu(*case.build()) if reference_on_gpu else case.build())))
    bound = reference.bound_near_median(gradients, case.n)
    model, inputs = on_gpu(*case.build())
    skip_what_makes_tensors_on_the_cpu(lambda: case.run(*on_gpu(*case.build())))
    extend(model, batch_dim=case.batch_dim)
    clipping = ClippedGrad(bound)
    extensions = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad(), clipping]
    with perex(*extensions, grad=False):
        case.loss(model, inputs, "mean").backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {
        "grad_batch": gradients,
        "batch_l2": {name: reference.batch_l2(g) for name, g in gradients.items()},
        "sum_grad_squared": {name: reference.sum_grad_squared(g) for name, g in gradients.items()},
        "variance": {name: reference.variance(g) for name, g in gradients.items()},
        "batch_dot": {name: reference.batch_dot(g) for name, g in gradients.items()},
        "clipped_sum": reference.clipped_sum(gradients, case.n, bound),
    }
    for field, by_name in wanted.items():
        found = on_cpu({name: getattr(p, field) for name, p in named.items()})
        for name, value in by_name.items():
            reference.assert_close_report(found[name], value, TOLERANCE, f"{field} of {name}")
    reference.assert_close_report(clipping.norms.cpu(), reference.joint_norms(gradients, case.n), TOLERANCE, "norms")


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_operations(row):
    n = 4
    model, inputs = row.build(n, deep=True)
    if "weight_norm" in row.id:
        model, inputs = on_gpu(model, inputs)
    wanted = on_cpu_too(harness.Problem(model, inputs, **row.settings()).wanted())
    bound = reference.bound_near_median(wanted, n)
    plain = harness.Problem(*on_gpu(*row.build(n, deep=True)), **row.settings())
    skip_what_makes_tensors_on_the_cpu(lambda: plain.run(*plain.inputs))
    problem = harness.Problem(*on_gpu(*row.build(n, deep=True)), **row.settings())
    found, clipping = problem.found(bound, False)
    harness.assert_near(on_cpu(found["grad_batch"]), wanted, TOLERANCE, "grad_batch")
    norms = {name: reference.batch_l2(rows) for name, rows in wanted.items()}
    harness.assert_near(on_cpu(found["batch_l2"]), norms, TOLERANCE, "batch_l2")
    sums = reference.clipped_sum(wanted, n, bound)
    harness.assert_near(on_cpu(found["clipped_sum"]), sums, TOLERANCE, "clipped_sum")
    reference.assert_close_report(clipping.norms.cpu(), reference.joint_norms(wanted, n), TOLERANCE, "norms")


class EveryMethod(Extension):
    """Each method of each term in float32 against the same factors in float64."""

    field = "every_method"
    joint = True

    def finish(self, views):
        self.count = 0
        for view in views:
            for term in view._terms:
                exact = Dense(term.double().dense())
                w = torch.linspace(0.1, 1, term.n, device=term.device)
                wanted = exact.batch_l2().sqrt()
                for method in term.methods():
                    l2, kept = method.run()
                    ratio = l2.sqrt() / wanted - 1
                    assert ratio.min() > -1e-6, (view.name, method.name, ratio.min().item())
                    assert ratio.max() < 1e-4, (view.name, method.name, ratio.max().item())
                    self.near(kept.weighted_sum(w), exact.weighted_sum(w.double()), (view.name, method.name))
                    self.count += 1
                for sums in getattr(term, "_sums", list)():
                    self.near(term.weighted_sum(w), exact.weighted_sum(w.double()), (view.name, sums.name))
        return {}

    def near(self, found, wanted, what):
        error = ((found.double() - wanted).norm() / wanted.norm()).item()
        assert error < 2e-6, (*what, error)


LAYERS = {
    "linear": (lambda: nn.Linear(48, 64), (16, 32, 48)),
    "linear, one position": (lambda: nn.Linear(300, 200), (16, 300)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 5, 2, 2), (8, 16, 100)),
    "conv2d": (lambda: nn.Conv2d(32, 48, 3, 1, 1), (8, 32, 16, 16)),
    "conv2d, few positions": (lambda: nn.Conv2d(64, 64, 3, 1, 1), (8, 64, 4, 4)),
    "conv2d, stride 2": (lambda: nn.Conv2d(16, 32, 4, 2), (8, 16, 21, 21)),
    "conv2d, depthwise": (lambda: nn.Conv2d(32, 32, 3, 1, 1, groups=32), (8, 32, 16, 16)),
    "conv2d, dilated": (lambda: nn.Conv2d(8, 8, 3, dilation=2, padding="same"), (8, 8, 24, 24)),
    "conv2d, large": (lambda: nn.Conv2d(3, 64, 7, 2, 3), (8, 3, 96, 96)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (6, 4, 8, 9, 10)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 24, 4, 2, 1), (8, 16, 9, 9)),
    "group norm": (lambda: nn.GroupNorm(4, 32), (8, 32, 16, 16)),
    "layer norm": (lambda: nn.LayerNorm(64), (8, 32, 64)),
    "lstm": (lambda: nn.LSTM(16, 24, 2, batch_first=True), (8, 20, 16)),
}


@pytest.fixture(params=["default", "high"])
def tf32(request):
    torch.set_float32_matmul_precision("high" if request.param == "high" else "highest")
    yield request.param
    torch.set_float32_matmul_precision("highest")


@of_gpus
@pytest.mark.parametrize("name", LAYERS)
def test_every_method_is_in_full_float32(name, tf32):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = extend(make().cuda())
    x = torch.randn(shape, device="cuda")
    output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    every = EveryMethod()
    with perex(every, loss_reduction="sum", grad=False):
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        (output * torch.randn_like(output)).sum().backward()
    assert every.count
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 == "high" else "highest")


LOST = 0.49 * 2.0**-23


@of_gpus
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 64, bias=False), lambda: nn.Conv1d(64, 64, 1, bias=False)])
@pytest.mark.parametrize("kind", ["alike", "small after large", "cancelling"])
@pytest.mark.parametrize("length", [64, 512, 4096])
def test_norms_are_not_too_small(make, kind, length, tf32):
    torch.manual_seed(0)
    n, layer = 4, extend(make().cuda())
    if kind == "alike":
        x, g = torch.ones(n, length, 64), torch.linspace(0.05, 1, n).view(-1, 1, 1).expand(n, length, 64)
    elif kind == "small after large":
        x, g = torch.ones(n, length, 64), torch.full((n, length, 64), LOST)
        g[:, 0] = 1.0
    else:
        x = torch.randn(n, 1, 64) * (1 + 1e-5 * torch.randn(n, length, 1))
        g = torch.randn(n, 1, 64) * (-1.0) ** torch.arange(length).view(1, -1, 1)
    true = torch.linalg.matrix_norm(g.double().mT @ x.double())
    x, g = (t.contiguous().cuda() for t in (x, g))
    if not isinstance(layer, nn.Linear):
        x, g = x.mT.contiguous(), g.mT.contiguous()
    clipping = ClippedGrad(0.5 * true.median().item())
    with perex(clipping, loss_reduction="sum", grad=False):
        (layer(x) * g).sum().backward()
    ratio = clipping.norms.cpu() / true - 1
    assert ratio.min() > -1e-6
    assert ratio.max() < 1e-4


@of_gpus
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)
    )
    model, x, y = extend(model.cuda()), torch.randn(8, 3, 8, 8, device="cuda"), torch.randint(10, (8,), device="cuda")

    def backward(clipping, x, y):
        with perex(BatchGrad(), clipping, grad=False), torch.autocast("cuda", dtype):
            F.cross_entropy(model(x), y).backward()
        return {name: p.grad_batch.clone() for name, p in model.named_parameters()}

    clipping = ClippedGrad(1.0)
    rows = backward(clipping, x, y)
    total = sum(r.double().flatten(1).square().sum(1) for r in rows.values()).sqrt()
    assert ((clipping.norms / total) - 1).abs().max() < 1e-4
    alone = [backward(ClippedGrad(1.0), x[i : i + 1], y[i : i + 1]) for i in range(8)]
    for name, found in rows.items():
        wanted = torch.cat([one[name] for one in alone])
        assert (found - wanted).norm() / wanted.norm() < 2e-2, name


@of_gpus
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("training", [True, False])
def test_recurrent_layers_of_cudnn(kind, training):
    torch.manual_seed(0)
    layer = kind(5, 7, 2, batch_first=True, bidirectional=True).train(training)
    x = torch.randn(4, 6, 5)
    double = copy.deepcopy(layer).double()
    wanted = reference.grad_batch(double, lambda out, _: out[0].square().sum(), (x.double(),), 4)
    layer = extend(layer.cuda())
    with perex(BatchGrad(), ClippedGrad(1.0), loss_reduction="sum", grad=False):
        if training:
            layer(x.cuda())[0].square().sum().backward()
        else:
            with torch.backends.cudnn.flags(enabled=False):  # its own backward wants training mode
                layer(x.cuda())[0].square().sum().backward()
    for name, p in layer.named_parameters():
        reference.assert_close_report(p.grad_batch.cpu(), wanted[name], 2e-3 if training else 1e-4, name)


def test_private_steps_go_on_from_a_checkpoint():
    x, y = torch.randn(64, 20, device=DEVICE), torch.randint(4, (64,), device=DEVICE)

    def made(seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)).to(DEVICE)
        sampler = PoissonBatchSampler(64, 0.25, steps=6, generator=torch.Generator().manual_seed(7 + seed))
        clipping = ClippedGrad(1.0)
        optimizer = privatize(
            torch.optim.Adam(extend(model).parameters(), 1e-2),
            clipping=clipping,
            sampler=sampler,
            noise_multiplier=0.7,
            expected_batch_size=16,
            generator=torch.Generator(DEVICE).manual_seed(5 + seed),
        )
        return model, clipping, optimizer, sampler

    def train(model, clipping, optimizer, sampler, steps):
        for rows in itertools.islice(sampler, steps):
            with perex(clipping, grad=False):
                F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first, second = made(), made(), made(1)
    train(*whole, 6)
    train(*first, 3)
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    train(*second, 3)
    assert all(p.device.type == DEVICE for p in whole[0].parameters())
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return F.dropout(x @ self.first.T, 0.5) * self.second


class Owner(Twice):
    pass


register_rule(Owner)(GenericRule)  # repeats its forward as a whole


DRAWING = {
    "functions": Twice,
    "a module": Owner,
    **{
        kind.__name__: lambda kind=kind: kind(8, 5, 2, dropout=0.5, batch_first=True)
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
    },
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True),
}


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_repeated_draws_the_same_numbers(name):
    """A device has a generator of its own; per-example gradients add up to the gradient of the same forward."""
    torch.manual_seed(0)
    model, x = (
        extend(DRAWING[name]().to(DEVICE, torch.float64)),
        torch.randn(4, 3, 8, device=DEVICE, dtype=torch.float64),
    )
    with perex(BatchGrad()):
        out = model(x)
        (out if isinstance(out, torch.Tensor) else out[0]).square().flatten(1).sum(1).mean().backward()
    for p in model.parameters():
        torch.testing.assert_close(p.grad_batch.mean(0), p.grad)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 20), nn.ModuleList(nn.Linear(8, 8) for _ in range(20))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen, out = self.gate(tokens).topk(2).indices, torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mask = (chosen == number).any(1)
            out[mask] += expert(tokens[mask])
        return out.view_as(x)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(8, 5, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        lengths = torch.arange(1, len(x) + 1, device="cpu") % x.shape[1] + 1
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize("make", [Routed, Packed, DRAWING["encoder"], lambda: nn.Conv1d(3, 5, 2, padding=1)])
def test_a_default_device(make):
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model, x = extend(make().double()), torch.randn(5, 3, 8, dtype=torch.float64)
        with perex(BatchGrad(), BatchL2Grad(), ClippedGrad(1.0)):
            model(x).square().flatten(1).sum(1).mean().backward()
    for p in model.parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad_batch.mean(0), p.grad)
            torch.testing.assert_close(p.grad_batch.flatten(1).square().sum(1), p.batch_l2)


def test_a_default_device_and_losses_that_are_looked_at():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model, x = extend(nn.Linear(8, 5)), torch.randn(4, 8)
        with pytest.raises(CrossExampleError), perex(BatchGrad()):
            (model(x) @ model(x).T).softmax(1).diagonal().log().mean().backward()


def test_noise_on_a_gpu():
    zeros = torch.zeros(1_000_000, device=DEVICE)
    for noise in (Noise(), Noise(source="os"), Noise(torch.Generator(DEVICE).manual_seed(0))):
        drawn = noise.like(zeros, 2.0)
        assert drawn.device.type == DEVICE
        assert abs(drawn.std().item() / 2.0 - 1) < 5e-3
        assert abs(drawn.mean().item()) < 1e-2
    assert not torch.equal(Noise().like(zeros, 1.0), Noise().like(zeros, 1.0))


def test_check_on_a_gpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)).to(DEVICE)
    x, y = torch.randn(4, 3, 8, 8, device=DEVICE), torch.randint(10, (4,), device=DEVICE)
    check(model, F.cross_entropy, x, y)
    assert all(p.device.type == DEVICE for p in model.parameters())


def test_plan_on_a_gpu():
    model = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).to(DEVICE)
    assert [row.path for row in plan(model, torch.randn(4, 8, device=DEVICE))] == ["0", "2"]


@of_gpus
def test_memory_of_clipped_sums_is_near_that_of_a_plain_backward():
    torch.manual_seed(0)
    width = 1024
    model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(width, width), nn.ReLU()))).cuda()
    x = torch.randn(256, width, device="cuda")

    def peak(action):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            action()
            model.zero_grad()
            found = torch.cuda.max_memory_allocated() - base
        return found

    plain = peak(lambda: model(x).square().sum(1).mean().backward())
    extend(model)
    clipping = ClippedGrad(1.0)

    def clipped():
        clipping.zero_grad()
        with perex(clipping, grad=False):
            model(x).square().sum(1).mean().backward()

    rows = 256 * sum(p.numel() for p in model.parameters()) * 4
    assert peak(clipped) < 1.5 * plain < rows / 10


def test_a_model_on_two_devices_names_neither():
    """Parameters on the CPU and on the GPU in one model."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3).to(DEVICE)

        def forward(self, x):
            return self.b(self.a(x).to(DEVICE))

    torch.manual_seed(0)
    model, x = Split().double(), torch.randn(6, 4, dtype=torch.float64)
    wanted = reference.grad_batch(model, lambda out, _: out.square().sum(), (x,), 6)
    extend(model)
    clipping = ClippedGrad(0.5)
    with perex(BatchGrad(), clipping, loss_reduction="sum", grad=False):
        model(x).square().sum().backward()
    for name, p in model.named_parameters():
        reference.assert_close_report(p.grad_batch.cpu(), wanted[name].cpu(), TOLERANCE, name)
        assert p.clipped_sum.device == p.device


@of_gpus
def test_products_are_in_full_precision_inside_only():
    a = torch.randn(256, 256, device="cuda")
    exact = a.double() @ a.double()
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            inside = ((a @ a - exact).norm() / exact.norm()).item()
        outside = ((a @ a - exact).norm() / exact.norm()).item()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert inside < 1e-5 < outside
