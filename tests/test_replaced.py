"""Layers of which the weight, or what their forward calls, is replaced by something that was computed."""

from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from harness import Net, assert_exact, assert_refused, jittered, par, rand
from torch import nn

from perexample import CrossExampleError, RecordedStep, check, extend
from perexample.extensions import BatchGrad
from perexample.rule import rule_for

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


@pytest.mark.parametrize("layer", LAYERS)
def test_a_computed_weight_as_an_attribute(layer):
    """As WeightDropout of fastai, and hypernetworks, do it."""
    model, x = dropped(layer, setattr)
    model(x)
    assert_exact(model, (x,))


def test_a_computed_weight_in_place_of_a_buffer():
    torch.manual_seed(0)
    net = Net(lambda self, x: self.layer(x), layer=nn.Linear(I, H), z=par(2), hyper=nn.Linear(2, H * I))
    del net.layer.weight
    net.layer.register_buffer("weight", torch.zeros(H, I))

    def forward(self, x):
        self.layer.weight = self.hyper(self.z).view(H, I)
        return self.layer(x)

    net.function = forward
    assert_exact(net.double(), (rand(N, I),))


@pytest.mark.parametrize("needs_a_gradient", [True, False])
def test_a_weight_made_of_all_examples_is_refused(needs_a_gradient):
    def forward(self, x):
        h = self.hyper(x).mean(0)
        self.layer.weight = (h if needs_a_gradient else h.detach()).view(H, I)
        return self.layer(x)

    net = Net(forward, layer=nn.Linear(I, H), hyper=nn.Linear(I, H * I)).double()
    del net.layer.weight
    assert_refused(net, (rand(N, I),), CrossExampleError, "mean")


def test_a_frozen_weight_as_an_attribute_or_buffer():
    for put in (setattr, nn.Module.register_buffer):
        layer = nn.Linear(I, H).double()
        weight = layer.weight.detach()
        del layer.weight
        put(layer, "weight", weight)
        assert_exact(nn.Sequential(layer), (rand(N, I),))


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


def _wrapped(self, x, weight, bias):
    x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


def _conv_of_its_own():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    conv._conv_forward = MethodType(_wrapped, conv)  # a widespread patch that makes pictures fit to themselves
    return conv, (2, 5, 5)


def _conv_of_another_size():
    conv = nn.Conv2d(2, 3, 3)
    conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w * 2, b)
    return conv, (2, 5, 5)


class ScaledInstanceNorm(nn.InstanceNorm1d):
    def _apply_instance_norm(self, x):
        return F.instance_norm(x, weight=self.weight * 2 + 1, bias=self.bias)


def _shown(function):
    """A parameter that the class shows as something that is computed from it."""

    def get(self):
        if self._parameters.get("weight") is None:
            raise AttributeError("weight")
        return function(self._parameters["weight"])

    return property(get)


class PositiveLinear(nn.Linear):
    weight = _shown(torch.exp)  # monotone networks: the parameter is the logarithm


class SquaredConv(nn.Conv1d):
    weight = _shown(torch.square)


class NormalisedEmbedding(nn.Embedding):
    weight = _shown(F.normalize)


class ShiftedNorm(nn.LayerNorm):
    weight = _shown(lambda p: 1 + p)


class Looked(nn.Linear):
    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        return found * 2 if name == "bias" else found


class WithoutChange(nn.InstanceNorm1d):
    def reset_running_stats(self):
        super().reset_running_stats()

    def extra_repr(self):
        return "mine"


REPLACED = {
    "a convolution's own function": _conv_of_its_own,
    "one for another size": _conv_of_another_size,
    "a function of a base's base": lambda: (ScaledInstanceNorm(3, affine=True), (3, T)),
    "linear": lambda: (PositiveLinear(I, H), (I,)),
    "convolution": lambda: (SquaredConv(I, H, 2), (I, T)),
    "layer norm": lambda: (ShiftedNorm(I), (T, I)),
    "looks": lambda: (Looked(I, H), (I,)),
}


def filled(model):
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return model


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_layer_calls_or_reads_is_replaced(name):
    layer, shape = REPLACED[name]()
    assert_exact(filled(nn.Sequential(layer)), (rand(N, *shape),))


def test_an_embedding_that_normalises():
    assert_exact(filled(nn.Sequential(NormalisedEmbedding(6, H))), (torch.randint(0, 6, (N, T)),))


def test_replaced_by_what_mixes_examples_is_refused():
    conv = nn.Conv1d(I, H, 1)
    conv._conv_forward = lambda x, w, b: F.conv1d(x - x.mean(0), w, b)
    assert_refused(filled(nn.Sequential(conv)), (rand(N, I, T),), CrossExampleError, "`mean` in `0`")


def test_what_takes_no_part_in_a_forward_may_be_replaced():
    lstm, norm = nn.LSTM(I, H), WithoutChange(3, affine=True)
    lstm.flatten_parameters = lambda: None  # as older DropConnects do
    assert rule_for(lstm) is not None
    assert rule_for(norm) is not None
    assert rule_for(nn.Conv2d(1, 1, 1)) is not None
