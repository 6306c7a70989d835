"""Layers of which the weight, or what their forward calls, is replaced by something that was computed."""

import pytest
import torch
from harness import Net, assert_exact, jittered, par, rand
from torch import nn

from perexample import RecordedStep, check, extend
from perexample.extensions import BatchGrad

N, T, I, H = 4, 5, 3, 4  # noqa: E741


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


LAYERS = {
    "linear": (lambda: nn.Linear(I, H), "weight", (I,)),
    "bias": (lambda: nn.Linear(I, H), "bias", (I,)),
    "without bias": (lambda: nn.Linear(I, H, bias=False), "weight", (T, I)),
    "convolution": (lambda: nn.Conv1d(I, H, 3), "weight", (I, T)),
    "layer norm": (lambda: nn.LayerNorm(I), "weight", (T, I)),
    "rnn": (lambda: nn.RNN(I, H, batch_first=True), "weight_hh_l0", (T, I)),
    "lstm": (lambda: nn.LSTM(I, H, batch_first=True), "weight_hh_l0", (T, I)),
    "gru": (lambda: nn.GRU(I, H, 2, batch_first=True), "bias_hh_l1", (T, I)),
    "cell": (lambda: nn.LSTMCell(I, H), "weight_hh", (I,)),
}


class Dropped(nn.Module):
    """DropConnect, as AWD-LSTM does it: the parent computes a child's weight at every forward."""

    def __init__(self, layer, name, put):
        super().__init__()
        self.layer, self.name, self.put = layer, name, put
        self.raw = nn.Parameter(getattr(layer, name).detach().clone())
        self.register_buffer("mask", (torch.rand_like(self.raw) > 0.3) * 1.5)
        del layer._parameters[name]

    def forward(self, x):
        self.put(self.layer, self.name, self.raw * self.mask)
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def _among_parameters(layer, name, value):
    layer._parameters[name] = value


def dropped(layer, put=_among_parameters):
    make, name, shape = LAYERS[layer]
    return Dropped(make().double(), name, put), rand(N, *shape)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_computed_weight_among_the_parameters(layer):
    model, x = dropped(layer)
    model(x)  # and the weight of an earlier forward is still there
    assert_exact(model, (x,))


@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_a_computed_weight_among_the_parameters_is_checked(layer):
    model, x = dropped(layer)
    assert check(extend(model), lambda out: out.square().flatten(1).sum(1).mean(), x).ok


def test_a_computed_weight_among_the_parameters_in_a_recorded_step():
    model, x = dropped("linear")
    model(x)
    step = RecordedStep(extend(model), lambda x: model(x).square().sum(1), x, extensions=BatchGrad())
    step(x)
    losses = model(x).square().sum(1)
    for i in range(N):
        [wanted] = torch.autograd.grad(losses[i], [model.raw], retain_graph=True)
        torch.testing.assert_close(model.raw.grad_batch[i], wanted)


def test_a_merged_weight_that_is_put_back_or_not():
    class Merged(nn.Module):
        def __init__(self, back):
            super().__init__()
            self.layer, self.a, self.b, self.back = nn.Linear(I, H), par(H, 1), par(1, I), back
            self.weight = self.layer.weight

        def forward(self, x):
            self.layer._parameters["weight"] = self.weight + self.a @ self.b
            out = self.layer(x)
            if self.back:
                self.layer._parameters["weight"] = self.weight
            return out

    for back in (True, False):
        assert_exact(jittered(Merged(back)), (rand(N, I),))


def test_a_computed_weight_that_has_a_layer_before_and_behind():
    model = Dropped(nn.Linear(I, H), "weight", _among_parameters)
    net = jittered(
        Net(
            lambda self, x: self.last(self.model(self.first(x))),
            first=nn.Linear(2, I),
            model=model,
            last=nn.Linear(H, 2),
        )
    )
    assert_exact(net, (rand(N, 2),))
