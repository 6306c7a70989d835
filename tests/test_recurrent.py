"""Recurrent layers and cells in all their options, against one `torch.autograd.grad` per example."""

import itertools

import naive
import pytest
import torch
from naive import assert_same, randn
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from perexample._tree import map_tensors, tensors_in
from perexample.errors import UnsupportedModuleError
from perexample.rule import Call, at_least_float32, rule_for
from perexample.rules import recurrent
from perexample.terms import Dense, Outer

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

N, T, I, H = 4, 5, 3, 6  # noqa: E741
LENGTHS = [3, 5, 1, 3]
LAYERS = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "proj": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
}
CELLS = {
    "tanh": (nn.RNNCell, {}),
    "relu": (nn.RNNCell, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTMCell, {}),
    "gru": (nn.GRUCell, {}),
}


def build(kind, layers=1, **options):
    """A layer with weights so large that its gates are far from linear."""
    torch.manual_seed(0)
    cls, fixed = LAYERS[kind]
    module = cls(I, H, layers, **fixed, **options).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.7 * torch.randn_like(p))
    return module


def initial(module, n):
    """Initial states, as the module wants them."""
    count = module.num_layers * (1 + module.bidirectional)
    h = randn(count, n, module.proj_size or H, seed=2).requires_grad_()
    return (h, randn(count, n, H, seed=3).requires_grad_()) if isinstance(module, nn.LSTM) else h


def padded(module, n=N, t=T):
    x = randn(n, t, I, seed=1)
    return x if module.batch_first else x.transpose(0, 1).contiguous()


def packed(module, lengths=LENGTHS):
    """A packed sequence; its examples are not sorted if the lengths are not."""
    x = randn(len(lengths), max(lengths), I, seed=1)
    is_sorted = lengths == sorted(lengths, reverse=True)
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=is_sorted)


def losses(module, outputs):
    """A curved loss of all outputs of each example, ``[N]``; zeros add nothing."""
    out, *states = outputs
    if isinstance(out, PackedSequence):
        out = pad_packed_sequence(out, batch_first=True)[0]
    elif not module.batch_first:
        out = out.transpose(0, 1)
    total = 0
    for i, part in enumerate([out, *(state.transpose(0, 1) for state in tensors_in(states))]):
        weights = randn(*part.shape[1:], seed=10 + i).to(part.dtype)
        total = total + (weights * part.sin() + part.square()).flatten(1).sum(1)
    return total


same = recurrent._same


def repeats(out, call):
    """Whether an output is that of the forward to the last bit."""
    return torch.equal(recurrent._fingerprint(out), call.saved["print"])


class Ran:
    """One forward of a module: what its rule is told, and the reference."""

    def __init__(self, module, x, *hx, loss=losses):
        self.module, self.rule = module, rule_for(module)
        saved = self.rule.before(module, (x, *hx), {}) if hasattr(self.rule, "before") else {}
        output = module(x, *hx)
        saved |= self.rule.capture(module, (x, *hx), {}, output)
        saved = map_tensors(lambda t: at_least_float32(t.detach().clone()), saved)
        # A cell computes h from c inside: views part what arrives at c from outside from that, as the engine does.
        output = map_tensors(lambda t: t.view_as(t), output)
        outputs = [t for t in tensors_in(output) if t.requires_grad]
        each = loss(module, output if isinstance(output, tuple) else (output,))
        g = torch.autograd.grad(each.sum(), outputs, retain_graph=True)
        self.g = tuple(map(at_least_float32, g)) if len(g) > 1 else at_least_float32(g[0])
        self.params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        rows = [torch.autograd.grad(row, list(self.params.values()), retain_graph=True) for row in each]
        self.wanted = {name: torch.stack(c) for name, c in zip(self.params, zip(*rows, strict=True), strict=True)}
        self.call = Call(module, "net.rnn", len(each), self.params, saved)

    def terms(self, g=None):
        with torch.no_grad():
            return self.rule.terms(self.call, self.g if g is None else g)

    def check(self, tolerance=1e-12):
        """All quantities of all terms against the reference."""
        terms = self.terms()
        w = randn(self.call.n, seed=7)
        for name, term in terms.items():
            assert isinstance(term, Dense if "bias" in name else Outer), name
            assert not term.dense().requires_grad
        found = {name: term.dense() for name, term in terms.items()}
        assert_same(found, self.wanted, tolerance)
        norms = {name: term.batch_l2() for name, term in terms.items()}
        assert_same(norms, {name: g.double().flatten(1).square().sum(1) for name, g in self.wanted.items()}, tolerance)
        sums = {name: term.weighted_sum(w.to(term.dense().dtype)) for name, term in self.terms().items()}
        assert_same(sums, {name: torch.tensordot(w.to(g.dtype), g, 1) for name, g in self.wanted.items()}, tolerance)
        return terms


@pytest.fixture
def only_fast(monkeypatch):
    """The slow way is forbidden."""

    def fail(*args):
        raise AssertionError("the forward was not reproduced")

    monkeypatch.setattr(recurrent, "_one_by_one", fail)


OPTIONS = list(itertools.product([1, 3], [False, True], [True, False], [False, True], [False, True]))


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("layers", "bidirectional", "bias", "batch_first", "state"), OPTIONS)
def test_padded(kind, layers, bidirectional, bias, batch_first, state):
    module = build(kind, layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    Ran(module, padded(module), *([initial(module, N)] if state else [])).check()


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("lengths", [LENGTHS, [5, 3, 3, 1], [2, 2, 2], [4]], ids=str)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "state"), list(itertools.product([1, 2], [False, True], [False, True]))
)
def test_packed(kind, lengths, layers, bidirectional, state):
    module = build(kind, layers, bidirectional=bidirectional, batch_first=layers == 2)
    x = packed(module, lengths)
    terms = Ran(module, x, *([initial(module, len(lengths))] if state else [])).check()
    for name, term in terms.items():
        for n, length in enumerate(lengths):
            if "weight_ih" in name:  # nothing is left beyond the end of a sequence
                assert not term.g[n, 0, length:].any()
                assert not term.x[n, 0, length:].any()


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind):
    if kind == "lstm":
        naive.lstm_in_bfloat16()
    module = build(kind, 2, dropout=0.2).float()
    with torch.autocast("cpu", torch.bfloat16):
        ran = Ran(module, padded(module).float())
    assert_same({name: term.dense() for name, term in ran.terms().items()}, ran.wanted, 0.1)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_the_slow_way(kind, monkeypatch):
    if kind == "lstm":
        naive.lstm_in_bfloat16()
    answers = iter([False, True])
    monkeypatch.setattr(recurrent, "_same", lambda out, call: next(answers) and repeats(out, call))
    module = build(kind, 2, dropout=0.2).float()
    with torch.autocast("cpu", torch.bfloat16):
        ran = Ran(module, padded(module).float())
    assert_same({name: term.dense() for name, term in ran.terms().items()}, ran.wanted, 0.02)


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_gives_what_padding_each_example_alone_gives(kind):
    module = build(kind, 2, bidirectional=True, batch_first=True)
    h = initial(module, N)
    found = {name: term.dense() for name, term in Ran(module, packed(module), h).terms().items()}
    x = randn(N, T, I, seed=1)
    for n, length in enumerate(LENGTHS):
        one = map_tensors(lambda t, n=n: t[:, n : n + 1], h)
        out, states = module(x[n : n + 1, :length], one)
        full = torch.cat([out, out.new_zeros(1, T - length, out.shape[2])], 1)
        grads = torch.autograd.grad(losses(module, (full, states)), list(module.parameters()))
        rows = dict(zip(dict(module.named_parameters()), grads, strict=True))
        assert_same({name: g[n] for name, g in found.items()}, rows, 1e-12)


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 4), (3, 1)])
def test_a_single_example_or_step(kind, n, t):
    module = build(kind, 2, bidirectional=True)
    Ran(module, padded(module, n, t), initial(module, n)).check()


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", ["batch_first", "time_major", "packed", "one_step"])
def test_dropout_draws_the_same_numbers(kind, dtype, form):
    module = build(kind, 3, bidirectional=True, dropout=0.4, batch_first=form == "batch_first").to(dtype)
    x = packed(module) if form == "packed" else padded(module, t=1 if form == "one_step" else T)
    torch.manual_seed(3)
    ran = Ran(module, x.to(dtype))
    state = torch.get_rng_state()
    if dtype == torch.bfloat16:
        ran.terms()
    else:
        ran.check(1e-12 if dtype == torch.float64 else 1e-4)
    assert torch.equal(state, torch.get_rng_state())


def test_no_random_state_is_kept_where_nothing_is_drawn():
    rule = rule_for(build("gru"))
    for module in (build("gru", 2), build("gru", 2, dropout=0.5).eval()):
        assert not rule.before(module, (padded(module),), {})
    Ran(build("gru", 2, dropout=0.5).eval(), randn(T, N, I)).check()


@pytest.mark.usefixtures("only_fast")
def test_the_mode_of_the_forward_counts():
    module = build("lstm", 2, dropout=0.5)
    ran = Ran(module, padded(module))
    module.eval()
    ran.check()


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("pattern", ["_l0", "_l1", "weight_hh", "weight_hr", "bias", "bias_ih_l1_reverse", "_ih_l0"])
def test_only_trainable_parameters_are_answered_for(kind, pattern):
    module = build(kind, 2, bidirectional=True)
    for name, p in module.named_parameters():
        p.requires_grad_(pattern in name)
    if any(p.requires_grad for p in module.parameters()):
        Ran(module, padded(module)).check()


@pytest.mark.usefixtures("only_fast")
def test_a_cell_state_that_depends_on_no_trainable_parameter():
    module = build("proj")
    for name, p in module.named_parameters():
        p.requires_grad_(name == "weight_hr_l0")
    ran = Ran(module, padded(module, t=1), map_tensors(torch.detach, initial(module, N)))
    assert len(ran.g) == 2
    ran.check()


@pytest.mark.parametrize("fast", [True, False])
def test_one_parameter_under_two_names(fast, monkeypatch):
    answers = iter([fast, True])
    monkeypatch.setattr(recurrent, "_same", lambda out, call: next(answers))
    module = nn.GRU(H, H).double()
    module.weight_hh_l0 = module.weight_ih_l0
    x = randn(T, N, H)
    ran = Ran(module, x)
    ran.call.params = {"weight_ih_l0": module.weight_ih_l0, "weight_hh_l0": module.weight_ih_l0}
    both = ran.terms()
    assert_same({"weight_ih_l0": sum(t.dense() for t in both.values())}, {"weight_ih_l0": ran.wanted["weight_ih_l0"]})


@pytest.mark.usefixtures("only_fast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_half_precision_is_computed_in_float32(kind, dtype):
    module = build(kind, 2, bidirectional=True).to(dtype)
    ran = Ran(module, padded(module, 8, 40).to(dtype))
    exact = Ran(module.double(), padded(module, 8, 40).to(dtype).double())
    assert all(term.dense().dtype == torch.float32 for term in ran.terms().values())
    # the gradients of the outputs are rounded too, so only those of float32 are compared to the end
    if dtype == torch.float32:
        assert_same({k: t.dense() for k, t in ran.terms().items()}, exact.wanted, 1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", ["batch_first", "time_major", "packed", "sorted"])
def test_the_slow_way_gives_the_same(kind, form, monkeypatch):
    module = build(kind, 2, bidirectional=True, dropout=0.3, batch_first=form == "batch_first")
    x = (
        padded(module)
        if form in ("batch_first", "time_major")
        else packed(module, LENGTHS if form == "packed" else [5, 3, 2, 2])
    )
    ran = Ran(module, x, initial(module, N))
    answers = iter([False, True])
    monkeypatch.setattr(recurrent, "_same", lambda out, call: next(answers) and same(out, call))
    before, state, flat = dict(module.__dict__), torch.get_rng_state(), list(module._flat_weights)
    assert_same({name: term.dense() for name, term in ran.terms().items()}, ran.wanted, 1e-12)
    assert dict(module.__dict__) == before
    assert torch.equal(state, torch.get_rng_state())
    assert all(a is b for a, b in zip(flat, module._flat_weights, strict=True))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chaotic_forward_is_repeated_the_slow_way(dtype):
    """Only the module itself repeats it, since every rounding error is amplified."""
    module = build("gru", 2, batch_first=True)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(6)
    ran = Ran(module.to(dtype), padded(module, 3, 200).to(dtype))
    terms = ran.terms()
    assert all(isinstance(term, Dense) and term.dense().dtype == torch.float32 for term in terms.values())
    assert_same({name: term.dense() for name, term in terms.items()}, ran.wanted, 0.05)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_cannot_be_repeated_is_refused(kind, form):
    module = build(kind, 2, dropout=0.3)
    ran = Ran(module, packed(module) if form == "packed" else padded(module))
    kept = ran.call.saved["rng"]
    torch.manual_seed(99)
    ran.call.saved["rng"] = [torch.get_rng_state()]
    with pytest.raises(UnsupportedModuleError, match=r"`net\.rnn` .*cannot be drawn again"):
        ran.terms()
    ran.call.saved["rng"] = kept
    ran.check()
    with torch.no_grad():
        module.weight_hh_l1.mul_(1.01)
    with pytest.raises(UnsupportedModuleError, match=r"`net\.rnn` .*were changed"):
        ran.terms()


def test_examples_that_are_not_finite_stay_by_themselves():
    module = build("lstm", 2, bidirectional=True, batch_first=True)
    x = padded(module)
    good = {name: term.dense() for name, term in Ran(module, x).terms().items()}
    x[1] = float("nan")
    bad = {name: term.dense() for name, term in Ran(module, x).terms().items()}
    for name, g in good.items():
        assert torch.equal(bad[name][[0, 2, 3]], g[[0, 2, 3]]), name
        assert bad[name][1].isnan().any(), name


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_everything_the_rule_is_told_counts(kind, form):
    """The comparison above would notice if a part of it were left out."""
    module = build(kind, 2, bidirectional=True, dropout=0.3)
    h = initial(module, N)
    ran = Ran(module, packed(module) if form == "packed" else padded(module), h)
    right = ran.terms()
    for part in range(len(ran.g)):
        for example in range(N):
            # One step of one example in one gradient changes this example's gradients, and no others.
            g = [t.clone() for t in ran.g]
            if form == "packed" and part == 0:
                lengths, (_, order, _) = torch.tensor(LENGTHS), ran.call.saved["packed"]
                assert torch.equal(lengths[order], torch.tensor(sorted(LENGTHS, reverse=True)))
                g[part][order.tolist().index(example)] += 1.0  # row of its first step
            else:
                g[part][-1, example] += 1.0
            wrong = ran.terms(tuple(g))
            moved = [(wrong[k].dense() - right[k].dense()).flatten(1).abs().amax(1) for k in right]
            moved = torch.stack(moved).amax(0)
            assert (moved > 1e-9).tolist() == [i == example for i in range(N)]
    ran.call.saved["hx"] = map_tensors(lambda t: t * 1.001, ran.call.saved["hx"])
    with pytest.raises(UnsupportedModuleError):
        ran.terms()


def test_sequences_without_an_axis_of_examples_are_refused():
    module = build("gru")
    rule, x = rule_for(module), randn(T, I)
    saved = rule.capture(module, (x,), {}, module(x))
    with pytest.raises(UnsupportedModuleError, match=r"`net` \(GRU\) was called with \[T, I\]"):
        rule.terms(Call(module, "net", T, dict(module.named_parameters()), saved), (torch.ones(T, H),))


@pytest.mark.parametrize("kind", LAYERS)
def test_parameters_that_a_layer_does_not_know_are_left_to_others(kind):
    module = build(kind)
    rule = rule_for(module)
    assert type(rule) is recurrent.RecurrentRule
    assert rule.output_axes(module, [0] * 3) == [1, 1, 1]
    assert rule.output_axes(build(kind, batch_first=True), [0] * 3) == [0, 1, 1]
    module.scale = nn.Parameter(torch.ones(1))
    assert not rule.covers(module)
    assert rule_for(module) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, n, state, bias):
    torch.manual_seed(0)
    cls, fixed = CELLS[kind]
    module = cls(I, H, bias, **fixed).double()
    assert type(rule_for(module)) is recurrent.RecurrentCellRule
    h = randn(n, H, seed=2)
    hx = (h, randn(n, H, seed=3)) if kind == "lstm" else h

    def loss(module, outputs):
        return sum((i + t.sin() * t).square().sum(1) for i, t in enumerate(tensors_in(outputs)))

    Ran(module, randn(n, I), *([hx] if state else []), loss=loss).check()
    module.weight_ih.requires_grad_(False)
    Ran(module, randn(n, I), *([hx] if state else []), loss=loss).check()
    module.scale = nn.Parameter(torch.ones(1))
    assert rule_for(module) is None


@pytest.mark.parametrize("kind", CELLS)
def test_cells_without_an_axis_of_examples_are_refused(kind):
    module = CELLS[kind][0](I, H)
    rule, x = rule_for(module), torch.ones(I)
    saved = rule.capture(module, (x,), {}, module(x))
    with pytest.raises(UnsupportedModuleError, match=r"was called with \[I\]"):
        rule.terms(Call(module, "net", I, dict(module.named_parameters()), saved), torch.ones(H))
