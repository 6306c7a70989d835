"""Initial states, and other inputs beside the first, that hold the rows of other examples than the first does."""

import pytest
import torch
from harness import Net, assert_exact, assert_refused, jittered, par, rand
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from perexample import BatchAxisError, GenericRule, register_rule

N, T, I, H = 4, 5, 3, 4  # noqa: E741
LENGTHS = torch.tensor([2, 5, 3, 4])
WRONG = {
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "index": lambda h: h[torch.arange(len(h) - 1, -1, -1)],
    "one": lambda h: h[:1].expand(len(h), -1),
    "repeated": lambda h: h[-1].repeat(len(h), 1),
    "before": lambda h: torch.cat([torch.zeros_like(h[:1]), h[:-1]]),
}
RIGHT = {
    "as it is": lambda h: h,
    "there and back": lambda h: h.flip(0).tanh().flip(0),
    "chosen": lambda h: h[torch.arange(len(h))],
    "constant": lambda h: h.new_ones(len(h), h.shape[1]),
}


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, w):
        ctx.save_for_backward(x, h, w)
        return (x * h) @ w

    @staticmethod
    def backward(ctx, g):
        x, h, w = ctx.saved_tensors
        back = g @ w.t()
        return back * h, back * x, ((x * h).flatten(0, -2).t() @ g.flatten(0, -2))


class Leaf(nn.Module):
    """A module that is taken as a whole, as a function of its own is called in it."""

    def __init__(self):
        super().__init__()
        self.w = par(H, 2)

    def forward(self, x, h):
        return _Times.apply(x, h, self.w)


class Whole(nn.Module):
    """A module that is taken as a whole, as it has the generic rule."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, 2)

    def forward(self, x, h):
        return self.linear(x * h)


register_rule(Whole)(GenericRule)


def _layer(kind):
    def forward(self, x):
        h = self.how(self.init(x[:, 0]))[None]
        return self.layer(x, (h, h.tanh()) if kind is nn.LSTM else h)[0]

    return forward, kind(I, H, batch_first=True), (rand(N, T, I),)


def _time_major(self, x):
    return self.layer(x.transpose(0, 1), self.how(self.init(x[:, 0]))[None])[0].transpose(0, 1)


def _cell(kind):
    def forward(self, x):
        h = self.how(self.init(x))
        return self.layer(x, (torch.zeros_like(h), h))[0] if kind is nn.LSTMCell else self.layer(x, h)

    return forward, kind(I, H), (rand(N, I),)


def _module(module):
    return lambda self, x: self.layer(self.first(x), self.how(self.init(x))), module, (rand(N, I),)


FORMS = {
    **{kind.__name__: lambda kind=kind: _layer(kind) for kind in (nn.RNN, nn.LSTM, nn.GRU)},
    "time-major": lambda: (_time_major, nn.GRU(I, H), (rand(N, T, I),)),
    **{kind.__name__: lambda kind=kind: _cell(kind) for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)},
    "leaf": lambda: _module(Leaf()),
    "generic rule": lambda: _module(Whole()),
}


def build(form, how):
    torch.manual_seed(0)
    forward, layer, inputs = FORMS[form]()
    return jittered(Net(forward, layer=layer, init=nn.Linear(I, H), first=nn.Linear(I, H), how=how)), inputs


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("form", FORMS)
def test_states_of_other_examples_are_refused(form, how):
    model, inputs = build(form, WRONG[how])
    assert_refused(model, inputs, BatchAxisError, "`layer`.* holds rows of other examples")


@pytest.mark.parametrize("how", RIGHT)
@pytest.mark.parametrize("form", FORMS)
def test_states_of_the_same_examples_are_exact(form, how):
    model, inputs = build(form, RIGHT[how])
    assert_exact(model, inputs)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_one(form):
    model, (x,) = build(form, RIGHT["as it is"])
    assert_exact(model, (x[:1],))


def _sorted_by_hand(self, x, lengths):
    order = lengths.argsort(descending=True)
    packed = pack_padded_sequence(x[order], lengths[order], batch_first=True)
    h = self.init(x[:, 0])
    return self.layer(packed, (h[order] if self.how else h)[None])[1][0][order.argsort()]


def _sorted_by_torch(self, x, lengths):
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    h = self.init(x[:, 0])
    return self.layer(packed, (h if self.how else h[lengths.argsort(descending=True)])[None])[1][0]


@pytest.mark.parametrize("function", [_sorted_by_hand, _sorted_by_torch])
@pytest.mark.parametrize("right", [True, False])
def test_states_of_packed_sequences(function, right):
    torch.manual_seed(0)
    model = jittered(Net(function, layer=nn.GRU(I, H, batch_first=True), init=nn.Linear(I, H), how=right))
    inputs = (rand(N, T, I), LENGTHS)
    if right:
        assert_exact(model, inputs)
    else:
        assert_refused(model, inputs, BatchAxisError, "`layer` .* holds rows of other examples")


WITH_STATES = {
    "windows": lambda self, x: self.layer(
        x.unflatten(1, (2, 2)).flatten(0, 1), self.init(x[:, 0]).repeat_interleave(2, 0)[None]
    )[0].unflatten(0, (-1, 2)),
    "bidirectional": lambda self, x: self.both(x, torch.stack([self.init(x[:, 0]), self.init(x[:, 1]).tanh()]))[0],
    "two layers": lambda self, x: self.layer(x, self.layer(x)[1])[0],
    "layers as a batch": lambda self, x: self.layer(x, self.init(x[:, :1]).transpose(0, 1).contiguous())[0],
    "no data": lambda self, x: self.layer(x.new_ones(len(x), 2, I), self.init(x[:, 0])[None])[0],
    "learned": lambda self, x: self.layer(x, self.learned.expand(1, len(x), -1).contiguous())[0],
    "learned for the cell": lambda self, x: self.cell(x[:, 0], self.learned[0].expand(len(x), -1)),
    "steps": lambda self, x: self.cell(x[:, 1], self.cell(x[:, 0], self.cell(x[:, 2]))),
}


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", WITH_STATES)
def test_ways_to_the_same_examples(name, n):
    torch.manual_seed(0)
    parts = {
        "layer": nn.GRU(I, H, batch_first=True),
        "both": nn.GRU(I, H, batch_first=True, bidirectional=True),
        "cell": nn.GRUCell(I, H),
        "init": nn.Linear(I, H),
        "learned": par(1, 1, H),
    }
    assert_exact(jittered(Net(WITH_STATES[name], **parts)), (rand(n, 4, I),))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_states_given_to_the_model_with_as_many_layers_as_examples(kind, n):
    def forward(self, x, h):
        return self.layer(x, (h, h.clone() if len(h) != x.shape[0] else h) if kind is nn.LSTM else h)[0]

    model = jittered(Net(forward, layer=kind(I, H, 2, batch_first=True)))
    assert_exact(model, (rand(n, T, I), rand(2, n, H)), axes=(0, 1), out_axis=0)


def test_states_of_which_it_is_not_known_whether_they_are_layers_or_examples():
    def build():
        parts = {"layer": nn.GRU(I, H, 2, batch_first=True), "init": nn.Linear(H, H)}
        return jittered(Net(lambda self, x, h: self.layer(x, self.init(h))[0], **parts))

    settings = {"axes": (0, 1), "out_axis": 0}
    assert_exact(build(), (rand(3, T, I), rand(2, 3, H)), **settings)
    assert_refused(build(), (rand(2, T, I), rand(2, 2, H)), BatchAxisError, "batches of another size", **settings)


@pytest.mark.parametrize("n", [2, 3])
def test_states_of_an_encoder_that_the_loss_calls(n):
    torch.manual_seed(0)
    models = {"encoder": nn.GRU(I, H, 2, batch_first=True), "decoder": nn.GRU(I, H, 2, batch_first=True)}
    model = jittered(nn.ModuleDict(models))
    assert_exact(model, (rand(n, T, I), rand(n, T, I)), forward=lambda m, x, y: m["decoder"](y, m["encoder"](x)[1])[0])


def test_another_axis_of_a_module_that_is_taken_as_a_whole():
    torch.manual_seed(0)
    model = jittered(Net(lambda self, x: self.leaf(x, x.transpose(0, 1)), leaf=Leaf()))
    assert_refused(model, (rand(N, N, H),), BatchAxisError, "`leaf` .*axis 1", axes=(0,))


class OtherAxisRule(GenericRule):
    """One that takes the second input on axis 1."""

    def axes(self, call, tensors):
        return [0, 1]


class Crossed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, 2)

    def forward(self, x, h):
        return self.linear(x * h.transpose(0, 1))


register_rule(Crossed)(OtherAxisRule)


def test_a_rule_that_takes_its_second_input_on_another_axis():
    torch.manual_seed(0)
    right, wrong = (Net(None, crossed=Crossed()) for _ in range(2))
    x = rand(N, 2, H)
    right.function = lambda self, x: self.crossed(x, x.tanh().transpose(0, 1))
    wrong.function = lambda self, x: self.crossed(x, x.tanh()[:, :1].expand(-1, N, -1))
    assert_exact(jittered(right), (x,))
    assert_refused(jittered(wrong), (rand(N, N, H),), BatchAxisError, "`crossed` .*axis 0, but takes them on axis 1")
