"""The recurrent layers' own forward on a CPU: what it gives, its backward, and what it hands to the rule."""

import copy
import gc
import itertools
import weakref
from contextlib import contextmanager

import pytest
import torch
from naive import Lambda, assert_same, fields, randn
from test_recurrent import LAYERS, LENGTHS, H, I, N, T, build, initial
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from perexample import extend, perex
from perexample._tree import map_tensors, tensors_in
from perexample.errors import StaleGradientError
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad
from perexample.rules import recurrent_forward
from perexample.rules.unrolled import Unrolled

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


def run(self, x, *hx):
    """A linear layer, the recurrent one on ``[N, T, I]``, padded or packed, and all that it gives, ``[N, -1]``."""
    x, rnn = self.first(x), self.rnn
    hx = map_tensors(lambda t: t.transpose(0, 1).contiguous(), hx)
    if self.lengths is not None:
        x = pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True, enforce_sorted=False)
    elif not rnn.batch_first:
        x = x.transpose(0, 1).contiguous()
    out, states = rnn(x, *([] if not hx else hx if len(hx) == 1 else [hx]))
    if self.lengths is not None:
        out = pad_packed_sequence(out, batch_first=True)[0]
    elif not rnn.batch_first:
        out = out.transpose(0, 1)
    parts = [out, *(state.transpose(0, 1) for state in tensors_in(states))]
    return torch.cat([part.flatten(1) for part in parts], 1)


def pair(kind, layers=1, lengths=None, dtype=torch.float64, seen=run, **options):
    """A model, and an extended copy."""
    rnn = build(kind, layers, **options)
    model = Lambda(seen, first=nn.Linear(I, I).double(), rnn=rnn).to(dtype)
    model.lengths = lengths
    return model, extend(copy.deepcopy(model))


def states(module):
    """Initial states of the examples, the examples first."""
    h = initial(module, N)
    return [t.detach().transpose(0, 1).contiguous().requires_grad_() for t in tensors_in(h)]


def losses(y):
    """A curved loss of each example, ``[N]``."""
    return (y.sin() + y.square()).sum(1)


def leaves(model):
    """The parameters' gradients by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rows(model, *inputs):
    """One backward for each example."""
    each = losses(model(*inputs))
    params = list(model.parameters())
    grads = [torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True) for loss in each]
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(column) for name, column in zip(names, zip(*grads, strict=True), strict=True)}


def node_of(t):
    """The node in a graph that makes the steps here, if there is one."""
    found, waiting = set(), [t.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            if node.name() == "_RecurrenceBackward":
                return node
            found.add(node)
            waiting += [edge[0] for edge in node.next_functions]
    return None


def replaced(t):
    """Whether an output comes from the steps that are made here."""
    return node_of(t) is not None


@pytest.fixture
def pulls(monkeypatch):
    """Counts how often a gradient goes back through a layer."""
    count = []
    pull = Unrolled.pull
    monkeypatch.setattr(Unrolled, "pull", lambda self, *args: count.append(self) or pull(self, *args))
    return count


OPTIONS = list(itertools.product([1, 3], [False, True], [True, False], [False, True], [False, True], [None, LENGTHS]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("layers", "bidirectional", "bias", "batch_first", "state", "lengths"), OPTIONS)
def test_outputs_and_gradients_are_those_of_torch(kind, layers, bidirectional, bias, batch_first, state, lengths):
    """Of plain backward, and of perex, with and without gradients for all."""
    plain, ours = pair(kind, layers, lengths, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
    x, hx = randn(N, T, I), states(plain.rnn) if state else []
    y, wanted = ours(x, *hx), plain(x, *hx)
    assert replaced(y)
    assert not replaced(wanted)
    assert_same({"y": y}, {"y": wanted}, 1e-13)
    losses(wanted).sum().backward()
    of_states = [t.grad.clone() for t in hx]
    for t in hx:
        t.grad = None
    losses(y).sum().backward(retain_graph=True)
    assert_same(leaves(ours), leaves(plain), 1e-12)
    for t, g in zip(hx, of_states, strict=True):
        assert_same({"state": t.grad}, {"state": g}, 1e-12)
    each = rows(plain, x, *hx)
    for grad in (False, True):
        ours.zero_grad()
        with perex(BatchGrad(), BatchL2Grad(), loss_reduction="sum", grad=grad):
            losses(ours(x, *hx)).sum().backward()
        assert_same(fields(ours, "grad_batch"), each, 1e-11)
        assert_same(leaves(ours), leaves(plain) if grad else {}, 1e-12)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_lie_in_memory_at_least_as_well(kind, batch_first):
    module = build(kind, 2, bidirectional=True, batch_first=batch_first)
    x = randn(N, T, I) if batch_first else randn(T, N, I)
    wanted = module(x)
    outputs = extend(module, batch_dim=0 if batch_first else 1)(x)
    assert type(outputs) is type(wanted)
    assert type(outputs[1]) is type(wanted[1])
    for t, before in zip(tensors_in(outputs), tensors_in(wanted), strict=True):
        assert t.shape == before.shape
        assert t.is_contiguous() or not before.is_contiguous()
        t.mul_(2)  # nothing that the backward needs


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_draws_the_same_numbers(kind, lengths, dtype):
    plain, ours = pair(kind, 3, lengths, dtype, dropout=0.4, bidirectional=True)
    x = randn(N, T, I).to(dtype)
    torch.manual_seed(3)
    wanted = plain(x)
    after = torch.get_rng_state()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for grad in (False, True):
        torch.manual_seed(3)
        y = ours(x)
        assert replaced(y)
        assert torch.equal(torch.get_rng_state(), after)
        assert_same({"y": y}, {"y": wanted}, tolerance)
        with perex(BatchGrad(), loss_reduction="sum", grad=grad):
            losses(y).sum().backward()
        torch.manual_seed(3)
        assert_same(fields(ours, "grad_batch"), rows(plain, x), tolerance)
    losses(wanted).sum().backward()
    assert_same(leaves(ours), leaves(plain), tolerance)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_a_gradient_can_be_differentiated_again(kind, lengths):
    plain, ours = pair(kind, 2, lengths, bidirectional=True, dropout=0.3)
    found = []
    for model in (plain, ours):
        x, hx = randn(N, T, I).requires_grad_(), states(model.rnn)
        torch.manual_seed(3)
        y = model(x, *hx)
        state = torch.get_rng_state()
        first = torch.autograd.grad(losses(y).sum(), [x, *hx, model.rnn.weight_hh_l0], create_graph=True)
        assert torch.equal(torch.get_rng_state(), state)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *hx, *model.parameters()])
        found.append(dict(enumerate([*first, *second])))
    assert_same(found[1], found[0], 1e-11)


def test_one_parameter_in_two_places():
    plain = nn.GRU(H, H).double()
    plain.weight_hh_l0 = plain.weight_ih_l0
    ours, x = extend(copy.deepcopy(plain), batch_dim=1), randn(T, N, H)
    assert ours.weight_hh_l0 is ours.weight_ih_l0
    for model in (plain, ours):
        loss = model(x)[0].sin().sum()
        loss.backward(retain_graph=True)
        g = torch.autograd.grad(loss, model.weight_ih_l0, create_graph=True)[0]
        g.square().sum().backward()
    assert_same(leaves(ours), leaves(plain), 1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_way_back_for_the_rule_and_the_graph(kind, pulls):
    plain, ours = pair(kind, 2, bidirectional=True)
    x = randn(N, T, I)
    losses(plain(x)).sum().backward()
    for grad in (False, True):
        pulls.clear()
        with perex(BatchL2Grad(), loss_reduction="sum", grad=grad):
            losses(ours(x)).sum().backward()
        assert len(pulls) == 4
    assert_same(leaves(ours), leaves(plain), 1e-12)


def test_only_what_is_wanted_is_computed(pulls):
    _, ours = pair("lstm", 3)
    for p in ours.parameters():
        p.requires_grad_(False)
    ours.rnn.weight_hh_l2.requires_grad_()
    with perex(BatchL2Grad(), grad=False):
        losses(ours(randn(N, T, I))).mean().backward()
    assert len(pulls) == 1
    pulls.clear()
    losses(ours(randn(N, T, I))).mean().backward()
    assert len(pulls) == 1
    for p in ours.rnn.parameters():
        p.requires_grad_()
    called = []
    gradient = Unrolled.gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unrolled, "gradient", lambda self, kind: called.append(kind) or gradient(self, kind))
        x = randn(N, T, I).requires_grad_()
        y = ours(x)
        torch.autograd.grad(losses(y).sum(), x, retain_graph=True)
        assert not called
        torch.autograd.grad(losses(y).sum(), ours.rnn.weight_hh_l1, retain_graph=True)
        assert called == ["weight_hh"]
        losses(y).sum().backward(inputs=[ours.rnn.bias_ih_l0])
        assert called == ["weight_hh", "bias_ih"]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_that_is_retained(kind):
    plain, ours = pair(kind, 2)
    x = randn(N, T, I)
    each, y = rows(plain, x), ours(x)
    losses(plain(x)).sum().backward()
    for retain in (True, True, False):
        ours.zero_grad()
        with perex(BatchGrad(), loss_reduction="sum", grad=True):
            losses(y).sum().backward(retain_graph=retain)
        assert_same(fields(ours, "grad_batch"), each, 1e-11)
        assert_same(leaves(ours), leaves(plain), 1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        losses(y).sum().backward()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_a_gradient_that_changes_on_its_way(lengths, pulls):
    """The rule sees what the user's hooks on the output make of it, the node also what hooks on the node do."""
    _, ours = pair("lstm", 2, lengths)
    x = randn(N, T, I).requires_grad_()
    losses(ours(x)).sum().backward()
    wanted = x.grad.clone()
    for change in (lambda gs: tuple(2 * g for g in gs), lambda gs: tuple(g.mul_(2) for g in gs)):
        x.grad, pulls[:] = None, []
        y = ours(x)
        node_of(y).register_prehook(change)
        with perex(BatchL2Grad(), loss_reduction="sum"):
            losses(y).sum().backward()
        assert len(pulls) == 4
        assert_same({"x": x.grad}, {"x": 2 * wanted}, 1e-12)


def test_hooks_of_the_user_on_the_output():
    plain, ours = pair("lstm", 2, seen=lambda self, x: self.rnn(self.first(x))[0], batch_first=True)
    x = randn(N, T, I)
    found = []
    for model in (plain, ours):
        model.zero_grad()
        y = model(x)
        y.register_hook(lambda g: 3 * g)
        with perex(BatchGrad(), loss_reduction="sum") if model is ours else torch.enable_grad():
            losses(y.flatten(1)).sum().backward()
        found.append(leaves(model))
    assert_same(found[1], found[0], 1e-12)
    assert_same({name: g.sum(0) for name, g in fields(ours, "grad_batch").items()}, found[0], 1e-12)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_some_outputs_only(kind):
    """The others give the node no gradient, or one of zeros."""
    for part in range(3 if kind == "lstm" else 2):

        def one(self, x, part=part):
            out, state = self.rnn(self.first(x))
            return [out, *(t.transpose(0, 1) for t in tensors_in(state))][part].flatten(1)

        plain, ours = pair(kind, 2, seen=one, batch_first=True)
        x = randn(N, T, I)
        each = rows(plain, x)
        for grad in (False, True):
            with perex(BatchGrad(), loss_reduction="sum", grad=grad):
                losses(ours(x)).sum().backward()
            assert_same(fields(ours, "grad_batch"), each, 1e-11)
        losses(plain(x)).sum().backward()
        assert_same(leaves(ours), leaves(plain), 1e-12)


class _Vanishing(torch.autograd.Function):
    """Identity that hands no gradient on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


def test_an_output_whose_gradient_never_arrives():
    """The rule is asked after the node has run, and makes the steps again."""

    def seen(self, x):
        out, (h, _) = self.rnn(self.first(x))
        return torch.cat([out.flatten(1), _Vanishing.apply(h).transpose(0, 1).flatten(1)], 1)

    plain, ours = pair("lstm", 2, seen=seen, batch_first=True, dropout=0.5)
    x = randn(N, T, I)
    torch.manual_seed(0)
    each = rows(plain, x)
    torch.manual_seed(0)
    y = ours(x)
    with perex(BatchGrad(), loss_reduction="sum"):
        losses(y).sum().backward()
    assert_same(fields(ours, "grad_batch"), each, 1e-11)


@contextmanager
def _checkpointed():
    yield lambda f, *inputs: checkpoint(f, *inputs, use_reentrant=False)


@contextmanager
def _offloaded():
    with torch.autograd.graph.save_on_cpu():
        yield lambda f, *inputs: f(*inputs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("around", [_checkpointed, _offloaded])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_saved_tensors_go_through_hooks(kind, around, lengths):
    def seen(self, x):
        with around() as call:
            return call(lambda x: run(self, x), x)

    plain, ours = pair(kind, 2, lengths, seen=seen, dropout=0.3)
    x = randn(N, T, I)
    torch.manual_seed(1)
    plain.function = run
    each = rows(plain, x)
    for grad in (False, True):
        ours.zero_grad()
        torch.manual_seed(1)
        y = ours(x)
        with perex(BatchGrad(), loss_reduction="sum", grad=grad):
            losses(y).sum().backward()
        assert_same(fields(ours, "grad_batch"), each, 1e-11)
    assert_same(leaves(ours), {name: g.sum(0) for name, g in each.items()}, 1e-11)
    ours.zero_grad()
    torch.manual_seed(1)
    losses(ours(x)).sum().backward()
    assert_same(leaves(ours), {name: g.sum(0) for name, g in each.items()}, 1e-11)


def test_a_checkpoint_keeps_no_gates():
    """Nothing large is held between forward and backward but the input."""
    sizes = []

    def seen(self, x):
        return checkpoint(lambda x: run(self, x), x, use_reentrant=False)

    _, ours = pair("lstm", 2, seen=seen)
    out = Unrolled._run

    def noted(self, into):
        out(self, into)
        sizes.append(weakref.ref(self.a))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unrolled, "_run", noted)
        y = ours(randn(N, T, I))
        gc.collect()
        assert len(sizes) == 2
        assert all(a() is None for a in sizes)
        with perex(BatchL2Grad()):
            losses(y).mean().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_waits_for_the_garbage_collector(kind):
    """Gates go with the graph, and what a backward computes as soon as it is over."""
    _, ours = pair(kind, 2, bidirectional=True)
    kept, init = [], Unrolled.__init__

    def noted(self, *args):
        init(self, *args)
        kept.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unrolled, "__init__", noted)
        gc.collect()
        gc.disable()
        try:
            loss = losses(ours(randn(N, T, I))).mean()
            assert [run() for run in kept] == [None] * 4
            with perex(BatchL2Grad(), grad=True):
                loss.backward()
            assert [run() for run in kept] == [None] * 8
        finally:
            gc.enable()


def test_memory_is_released():
    _, ours = pair("lstm", 2)
    x, kept = randn(N, T, I), []
    leave = recurrent_forward.Passing.leave

    def noted(self, upstream, gradients):
        kept.append(self)
        kept.extend(weakref.ref(t) for t in gradients if t is not None)
        leave(self, upstream, gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_forward.Passing, "leave", noted)
        y = ours(x)
        loss = losses(y).mean()
        with perex(ClippedGrad(1.0), grad=False):
            loss.backward()
    assert kept[0]._kept is None
    assert len(kept) == 2  # the gradient of the input only
    assert kept[1]() is None
    with pytest.raises(RuntimeError, match="second time"):
        _ = kept[0].node().saved_tensors
    node = weakref.ref(kept[0].node())
    del y, loss
    assert node() is None


def test_what_was_left_in_a_backward_that_failed_is_not_taken_up_later():
    """That one wanted no gradients of parameters."""
    plain, ours = pair("lstm", 2)
    x = randn(N, T, I)
    y = ours(x)
    loss = losses(y).sum()

    class Failing(BatchL2Grad):
        def compute(self, view):
            if view.name.startswith("rnn"):
                raise KeyError(view.name)

    with pytest.raises(KeyError), perex(Failing(), loss_reduction="sum", grad=False):
        loss.backward(retain_graph=True)
    loss.backward()
    losses(plain(x)).sum().backward()
    assert_same(leaves(ours), leaves(plain), 1e-12)


def test_examples_that_are_not_finite_stay_by_themselves():
    _, ours = pair("lstm", 2, bidirectional=True)
    x = randn(N, T, I)
    found = []
    for _ in range(2):
        with perex(BatchGrad(), loss_reduction="sum"):
            losses(ours(x)).sum().backward()
        found.append({name: g.clone() for name, g in fields(ours, "grad_batch").items()})
        x[1] = float("nan")
    good, bad = found
    for name, g in good.items():
        assert torch.equal(bad[name][[0, 2, 3]], g[[0, 2, 3]]), name
        assert bad[name][1].isnan().any(), name


@pytest.mark.parametrize("part", ["input", "weight"])
def test_what_is_written_to_before_the_backward_is_noticed(part):
    _, ours = pair("gru", 2, seen=lambda self, x: self.rnn(x)[0].flatten(1), batch_first=True)
    for plain in (True, False):
        x = randn(N, T, I)
        y = ours(x)
        with torch.no_grad():
            (x if part == "input" else ours.rnn.weight_hh_l0).mul_(1.1)
        if plain:
            with pytest.raises(RuntimeError, match="inplace"):
                losses(y).sum().backward()
        else:
            with pytest.raises(StaleGradientError), perex(BatchL2Grad()):
                losses(y).mean().backward()


def test_no_examples():
    _, ours = pair("lstm", 2, seen=lambda self, x: self.rnn(self.first(x))[0].flatten(1), batch_first=True)
    with perex(BatchGrad(), loss_reduction="sum"):
        losses(ours(randn(0, T, I))).sum().backward()
    assert all(g.shape[0] == 0 for g in fields(ours, "grad_batch").values())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of forward_ad
@pytest.mark.parametrize("kind", LAYERS)
def test_where_torch_does_it_itself(kind):
    plain, ours = pair(kind, 2)
    x = randn(N, T, I)
    assert replaced(ours(x))
    assert not replaced(plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not replaced(ours(x))
    _, half = pair(kind, 2, dtype=torch.bfloat16)
    assert not replaced(half(x.bfloat16()))
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    params = dict(ours.named_parameters())
    inner = {name: p.detach() for name, p in params.items()}
    grads = torch.func.grad(lambda p: losses(torch.func.functional_call(ours, p, (x,))).sum())(inner)
    losses(plain(x)).sum().backward()
    assert_same(grads, leaves(plain), 1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = [torch.autograd.forward_ad.unpack_dual(model(dual)).tangent for model in (plain, ours)]
    assert_same({"tangent": out[1]}, {"tangent": out[0]}, 1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_and_modified_layers(kind):
    """A layer that no rule answers for is left to torch; a forward of its own is left alone."""
    _, ours = pair(kind, 2)
    ours.rnn.requires_grad_(False)
    assert not replaced(ours(randn(N, T, I)))
    ours.rnn.requires_grad_(True)
    torch.nn.utils.parametrizations.weight_norm(ours.rnn, "weight_hh_l0")
    assert not replaced(ours(randn(N, T, I)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LAYERS)
def test_clipped_sums(kind, dtype):
    plain, ours = pair(kind, 2, dtype=dtype, bidirectional=True)
    x, clip = randn(N, T, I).to(dtype), ClippedGrad(1.0)
    each = rows(plain, x)
    norms = sum(g.double().flatten(1).square().sum(1) for g in each.values()).sqrt()
    wanted = {name: torch.tensordot((1 / norms).clamp_max(1), g.double(), 1) for name, g in each.items()}
    with perex(clip, loss_reduction="sum", grad=False):
        losses(ours(x)).sum().backward()
    assert_same(fields(ours, "clipped_sum"), wanted, 1e-10 if dtype == torch.float64 else 1e-4)
