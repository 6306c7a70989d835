"""Norms and sums are computed in full float32, whatever precision is allowed to the model's own products."""

import threading

import pytest
import torch
from torch import nn

from perexample import _private, extend, perex
from perexample._precision import full_precision, reduced
from perexample.extensions import BatchL2Grad, ClippedGrad

EVERY = [(library, what) for library in ("cuda", "mkldnn") for what in ("matmul", "conv", "rnn")]


def settings():
    return {setting: _private.float32_precision(*setting) for setting in EVERY}


def legacy():
    """What the older interface tells; it refuses where the newer one was used alone."""
    found = []
    for read in (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("refuses")
    return found


def allow(name):
    """Set what a user may set, by the older interface and by the newer."""
    if name in ("high", "medium"):
        torch.set_float32_matmul_precision(name)
    elif name == "all":
        torch.backends.fp32_precision = "tf32"
    elif name == "bf16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
    elif name == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif name == "convolutions only":
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
    elif name == "none":
        torch.backends.cudnn.allow_tf32 = False
    else:
        assert name == "default"


NAMES = ["default", "none", "high", "medium", "all", "bf16", "tf32", "convolutions only"]


@pytest.fixture(params=NAMES)
def allowed(request):
    allow(request.param)
    yield request.param
    torch.backends.fp32_precision = "none"
    torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def test_all_is_as_it_was_afterwards(allowed):
    before, before_legacy = settings(), legacy()
    with full_precision():
        assert set(settings().values()) <= {"none", "ieee"}
        with full_precision():
            assert set(settings().values()) <= {"none", "ieee"}
        assert set(settings().values()) <= {"none", "ieee"}
    assert settings() == before
    assert legacy() == before_legacy
    assert reduced(["cuda"]) == (allowed != "none")
    assert reduced(["cpu"]) == (allowed in ("high", "medium", "all", "bf16"))


def test_what_is_set_for_all_afterwards_still_holds():
    torch.backends.fp32_precision = "tf32"
    with full_precision():
        pass
    torch.backends.fp32_precision = "none"
    assert not reduced(["cpu"])


def test_one_thread_does_not_set_it_back_for_another():
    torch.set_float32_matmul_precision("medium")
    inside, go_on = threading.Event(), threading.Event()

    def first():
        with full_precision():
            inside.set()
            go_on.wait()

    thread = threading.Thread(target=first)
    try:
        thread.start()
        inside.wait()
        assert reduced(["cpu"])  # though nothing is lowered just now
        with full_precision():
            go_on.set()
            thread.join()
            assert set(settings().values()) <= {"none", "ieee"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


class Seen(nn.Linear):
    """Tells in which precision it is called."""

    def forward(self, x):
        self.precision = settings()
        x.register_hook(lambda g: setattr(self, "backward_precision", settings()))
        return super().forward(x)


def test_a_model_computes_in_the_precision_that_was_allowed(allowed):
    model = extend(nn.Sequential(nn.Linear(4, 4), seen := Seen(4, 4)))
    before = settings()
    with perex(ClippedGrad(1.0), grad=False):
        model(torch.randn(5, 4)).sum(1).mean().backward()
    assert seen.precision == seen.backward_precision == settings() == before


def batch(positions):
    """Inputs and upstream gradients; nearly opposed where a norm in few digits would miss what is left."""
    torch.manual_seed(0)
    x, g = torch.randn(4, 32, 40), torch.randn(4, 32, 30)
    if positions == "that cancel":
        x[:, 1::2], g[:, 1::2] = x[:, ::2] * (1 + 1e-3 * torch.randn(4, 16, 1)), -g[:, ::2]
    return x, g


MAKERS = [lambda: nn.Linear(40, 30), lambda: nn.Conv1d(40, 30, 1), lambda: nn.Conv1d(40, 30, 3)]


@pytest.mark.parametrize("options", [{"strategy": "model"}, {"room": 1e6}, {"max_memory": 0}])
@pytest.mark.parametrize("positions", ["of any kind", "that cancel"])
@pytest.mark.parametrize("make", MAKERS)
def test_norms_and_sums_are_those_of_full_float32(allowed, make, positions, options):
    x, g = batch(positions)
    layer, double = extend(make()), extend(make().double())
    if not isinstance(layer, nn.Linear):
        x, g = x.transpose(1, 2).contiguous(), g.transpose(1, 2)[:, :, layer.kernel_size[0] - 1 :].contiguous()
    clipping, exact = ClippedGrad(1e-2), ClippedGrad(1e-2)
    with perex(clipping, BatchL2Grad(), loss_reduction="sum", grad=False, **options):
        (layer(x) * g).sum().backward()
    with perex(exact, BatchL2Grad(), loss_reduction="sum", grad=False):
        (double(x.double()) * g.double()).sum().backward()
    ratio = (layer.weight.batch_l2 / double.weight.batch_l2).sqrt() - 1
    assert ratio.min() > -1e-6
    assert ratio.max() < 1e-4
    worst = (layer.weight.clipped_sum - double.weight.clipped_sum).abs().max()
    assert worst <= 1e-4 * double.weight.clipped_sum.abs().max()
