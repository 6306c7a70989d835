"""Positions and other tensors one step away from a parameter: exact, and without the graph where it is not needed."""

import itertools
import warnings

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import par, rand
from operation_cases import D, T, V, linear, net, words
from test_rules import same_term
from torch import nn
from torch.utils.checkpoint import checkpoint

from perexample import extend, perex
from perexample._engine import backward
from perexample.extensions import BatchGrad, ClippedGrad
from perexample.terms import Dense
from perexample.terms.placed import Placed, merged

SIZES = (0, 1, 2, T, 4)
HERE = torch.arange(T)
TWICE = torch.tensor([2, 0, 2])


def table(rows=9, **options):
    return lambda: nn.Embedding(rows, D, **options)


def bare(rows=9, width=D):
    return {"p": (rows, width)}


def of_all(x, ids=HERE):
    """The same ids for every example, ``[N, T]``."""
    return ids.expand(len(x), T)


def _tied(m, i):
    return F.linear((m.e(i) + m.e(of_all(i, TWICE))).tanh(), m.e.weight)


def _tied_transposed(m, i):
    return (m.e(i) + m.f(HERE)).tanh() @ m.e.weight.T


def _prompts(m, x):
    return torch.cat([m.e(of_all(x, TWICE)), x], 1).sin()


def _in_two_places(m, x):
    where = m.e(of_all(x))
    return (m.a(x + where).tanh() + where).sin() * where


SHORT = [  # nothing is asked of the graph
    net("[T]", lambda m, x: x + m.e(HERE), e=table()),
    net("[1,T]", lambda m, x: x + m.e(HERE[None]), e=table()),
    net("[N,T]", lambda m, x: x + m.e(of_all(x)), e=table()),
    net("[N,T]-contiguous", lambda m, x: x + m.e(of_all(x).contiguous()), e=table()),
    net("[N,T]-product", lambda m, x: (x * m.e(of_all(x))).sin(), e=table()),
    net("[N,T]-difference", lambda m, x: torch.sub(x, m.e(of_all(x)), alpha=2).sin(), e=table()),
    net("[N,T]-in-place", lambda m, x: (x * 1).add_(m.e(of_all(x))).sin(), e=table()),
    net("int32", lambda m, x: x + m.e(of_all(x).int()), e=table()),
    net("a-number", lambda m, x: (x + m.e(torch.tensor(3))).sin(), e=table()),
    net("[N,1]", lambda m, x: (x + m.e(torch.ones(len(x), 1).long())).sin(), e=table()),
    net("repeated-[T]", lambda m, x: (x + m.e(TWICE)).sin(), e=table()),
    net("repeated-[N,T]", lambda m, x: (x + m.e(of_all(x, TWICE))).sin(), e=table()),
    net("padding-[T]", lambda m, x: (x + m.e(TWICE)).sin(), e=table(padding_idx=2)),
    net("padding-[N,T]", lambda m, x: (x + m.e(of_all(x, TWICE))).sin(), e=table(padding_idx=2)),
    net("padding-from-the-end", lambda m, x: (x + F.embedding(TWICE, m.p, -7)).sin(), **bare()),
    net("no-padding-given", lambda m, x: (x + torch.embedding(m.p, TWICE)).sin(), **bare()),
    net("all-is-padding", lambda m, x: x + m.e(torch.zeros(T).long()) + m.c, e=table(padding_idx=0), c=(D,)),
    net("sparse", lambda m, x: (x + m.e(of_all(x, TWICE))).sin(), e=table(sparse=True)),
    net("getitem-[T]", lambda m, x: (x + m.p[TWICE]).sin(), **bare()),
    net("getitem-[N,T]", lambda m, x: (x + m.p[of_all(x, TWICE)]).sin(), **bare()),
    net("index_select", lambda m, x: (x + m.p.index_select(0, TWICE)).sin(), **bare()),
    net("tied-with-words", lambda m, i: (m.e(i) + m.e(of_all(i, TWICE))).tanh(), words, e=table(V)),
    net("tied-with-head", _tied, words, e=table(V), traps=(3, 7)),
    net("tied-with-head-transposed", _tied_transposed, words, e=table(V), f=table(), traps=(3, 7)),
    net("several-tables", lambda m, i: m.e(i) * m.f(of_all(i)) - m.g(TWICE), words, e=table(V), f=table(), g=table()),
    net("prompts", _prompts, e=table()),
    net("prompts-stacked", lambda m, x: torch.stack([m.e(of_all(x)), x], 1).sin(), e=table()),
    net("prompts-twice", lambda m, x: (lambda e: torch.cat([e, x, e], 1))(m.e(of_all(x))).sin(), e=table()),
    net("in-two-places", _in_two_places, e=table(), a=linear),
    net("batch_dim-1", lambda m, x: x + m.e(HERE[:, None]), lambda n: (rand(T, n, D),), e=table(), batch_dim=1),
    net(
        "batch_dim-1-[T,N]",
        lambda m, x: (x + m.e(TWICE[:, None].expand(x.shape[:2]))).sin(),
        lambda n: (rand(T, n, D),),
        e=table(),
        batch_dim=1,
    ),
    net(
        "folded-[N*T]",
        lambda m, x: (x.flatten(0, 1) + m.e(TWICE.repeat(len(x)))).sin().view(len(x), T, D),
        e=table(),
    ),
    net("frozen-beside-trained", lambda m, x: x + m.e(HERE) + m.f(of_all(x)), e=table(), f=lambda: frozen(table()())),
    net("transposed", lambda m, x: F.linear(x, m.p.t()).sin(), p=(D, 4), traps=(3, 4)),
    net("transposed-square", lambda m, x: (x @ m.p.mT).sin(), p=(D, D)),
    net("not-transposed", lambda m, x: F.linear(x, m.p.permute(0, 1)).sin(), p=(D, D)),
    net("transposed-row", lambda m, x: F.linear(x, m.p.t()).sin(), p=(D, 1)),
    net("transposed-added", lambda m, x: (x + m.p.T).sin(), p=(D, T)),
    net("transposed-in-both", lambda m, x: (lambda w: (x @ w).tanh() @ w)(m.p.T), p=(D, D)),
    net("sliced", lambda m, x: (x + m.p[1 : T + 1]).sin(), p=(9, D)),
    net("sliced-by-steps", lambda m, x: (x * m.p[::3]).sin(), p=(9, D)),
    net("sliced-columns", lambda m, x: (x * m.p[:, 2 : 2 + D]).sin(), p=(T, D + 4)),
    net("sliced-weight", lambda m, x: F.linear(x, m.p[2:6]).sin(), p=(9, D), traps=(3, 4)),
    net("selected", lambda m, x: (x * m.p[1]).sin() + m.p[2], p=(4, D)),
    net("chunks", lambda m, x: (lambda a, b: (x * a).sin() + b)(*m.p.chunk(2)), p=(2, D)),
    net("unbound", lambda m, x: (lambda a, b: (x * a).sin() + b)(*m.p.unbind()), p=(2, D)),
    net("viewed", lambda m, x: (x * m.p.view(T, D)).sin(), p=(T * D,)),
    net("unsqueezed", lambda m, x: (x + m.p[None]).sin(), p=(T, D)),
    net("squeezed", lambda m, x: (x + m.p.squeeze(0)).sin(), p=(1, T, D)),
    net("expanded", lambda m, x: (m.p.expand(len(x), -1, -1) @ x.mT).sin(), p=(1, 4, D), traps=(3, 4)),
    net("rows-of-the-batch", lambda m, x: (m.p[: len(x)] * x[:, 0]).sin() * m.c, p=(9, D), c=(D,), traps=()),
]  # fmt: skip
ROWS_OF_THE_BATCH = SHORT.pop()  # an example's gradient depends on its number


def frozen(module):
    return module.requires_grad_(False)


def runs(rows):
    return [pytest.param(row, n, id=f"{row.id}-n{n}") for row in rows for n in sorted({*SIZES, *row.traps})]


@pytest.fixture
def asked(monkeypatch):
    """How often the graph was asked."""
    calls, real = [], backward.pulled_back
    monkeypatch.setattr(backward, "pulled_back", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize(("row", "n"), runs(SHORT))
def test_exact_without_the_graph(row, n, asked):
    model, inputs = row.build(n, deep=n != 2)
    harness.assert_exact(model, inputs, **row.settings())
    assert not asked


LONG = [  # only the graph knows
    net("hook", lambda m, x: x + hooked(m.e(HERE)), e=table()),
    net("of-a-product", lambda m, x: x + F.embedding(HERE, m.p * 2), **bare()),
    net("two-steps", lambda m, x: (x + m.e(TWICE).flip(0)).sin(), e=table()),
    net("two-slices", lambda m, x: (x + m.p[1 : T + 1, 1 : D + 1]).sin(), p=(9, D + 2)),
    net("by-a-mask", lambda m, x: (x + m.p[torch.arange(9) % 3 == 0]).sin(), **bare()),
    net("from-the-end", lambda m, x: (x + m.p[HERE - 2]).sin(), **bare()),
    net("columns", lambda m, x: (x[..., :3] + m.p[:, TWICE]).sin(), p=(T, 9)),
    net("columns-selected", lambda m, x: (x[..., :3] + m.p.index_select(1, TWICE)).sin(), p=(T, 9)),
    net("vector", lambda m, x: (x[..., 0] + m.p[TWICE]).sin(), p=(9,)),
    net("of-matrices", lambda m, x: (x[:, None] + m.p[TWICE]).sin(), p=(9, T, D)),
    net("negated-view", lambda m, x: (x + torch.complex(m.p, m.q)[0].conj().imag).sin(), p=(4, D), q=(4, D)),
    net("not-contiguous", lambda m, x: (x + m.w[:T]).sin(), w=lambda: nn.Parameter(par(D, 9).data.t())),
]


def hooked(t):
    """A tensor whose gradient is doubled by a hook."""
    if t.requires_grad:
        t.register_hook(lambda g: 2 * g)
    return t


@pytest.mark.parametrize(("row", "n"), runs(LONG))
def test_exact_by_the_graph(row, n, asked):
    model, inputs = row.build(n, deep=n != 2)
    harness.assert_exact(model, inputs, **row.settings())
    assert asked or not n


def test_scaled_by_frequency_is_left_to_the_graph(asked):
    """One row of ids has the same frequencies for each example alone."""
    row = net("scaled", lambda m, x: (x + F.embedding(TWICE, m.p, scale_grad_by_freq=True)).sin(), **bare())
    harness.assert_exact(*row.build(4), **row.settings())
    assert asked


def test_entries_of_a_parameter_that_belong_to_examples():
    """Row n of the parameter meets example n only."""
    row = ROWS_OF_THE_BATCH
    model, (x,) = row.build(4)
    extend(model)
    with perex(BatchGrad(), loss_reduction="sum"):
        values = harness.losses(model(x))
        values.sum().backward()
    for n in range(4):
        wanted = torch.autograd.grad(harness.losses(model(x))[n], list(model.parameters()))
        for p, rows in zip(model.parameters(), wanted, strict=True):
            assert torch.allclose(p.grad_batch[n], rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_a_lookup_inside_of_a_checkpoint(grad):
    def forward(m, x):
        return checkpoint(lambda t: (t + m.e(of_all(t, TWICE))).sin(), m.a(x), use_reentrant=False)

    row = net("c", forward, e=table(), a=linear)
    for n in (1, 2, T):
        harness.assert_exact(*row.build(n), grads=[grad], **row.settings())


@pytest.mark.parametrize("grad", [False, True])
def test_a_lookup_in_front_of_a_checkpoint_needs_no_graph(grad, asked):
    def forward(m, x):
        return checkpoint(m.a, x + m.e(of_all(x, TWICE)), use_reentrant=False).sin()

    row = net("c", forward, e=table(), a=linear)
    harness.assert_exact(*row.build(4), grads=[grad], **row.settings())
    assert not asked


def test_offloaded_ids():
    row = net("o", lambda m, x: (x + m.e(of_all(x, TWICE))).sin(), e=table())

    def forward(model, *inputs):
        with torch.autograd.graph.save_on_cpu():
            return model(*inputs)

    harness.assert_exact(*row.build(4), forward=forward)


def test_ids_that_were_written_to_are_an_error():
    """The graph notices; what was looked up is not known any more."""
    ids = HERE.clone()
    row = net("w", lambda m, x: x + m.e(ids), e=table())
    model, inputs = row.build(2)
    extend(model)
    with perex(BatchGrad(), grad=False):
        loss = harness.losses(model(*inputs)).mean()
        ids.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_with_new_data_is_left_to_the_graph(asked):
    row = net("d", lambda m, x: x * m.p[:T], p=(9, D))
    model, inputs = row.build(4)
    wanted = harness.Problem(model, inputs).wanted()["p"]
    extend(model)
    with perex(BatchGrad(), grad=False):
        loss = harness.losses(model(*inputs)).mean()
        model.p.data = model.p.detach().clone().t().contiguous().t()
        loss.backward()
    assert asked
    assert torch.allclose(model.p.grad_batch, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_of_one_example_stays_with_it(dtype):
    """Nothing else becomes NaN, and rows that were not looked up stay zero."""
    row = net("n", lambda m, x: m.a(x + m.e(of_all(x)) + m.f(HERE)), e=table(), f=table(), a=linear)
    model, (x,) = row.build(4)
    model.to(dtype)
    extend(model)
    x = x.to(dtype)
    x[1] = float("nan")
    with perex(BatchGrad(), grad=False):
        harness.losses(model(x).float()).mean().backward()
    for p in (model.e.weight, model.f.weight):
        bad = p.grad_batch.isnan().flatten(1)
        assert bad.any(1).tolist() == [False, True, False, False]
        assert not p.grad_batch[1, T:].isnan().any(), "rows that were not looked up have no gradient"


def test_the_norm_of_one_example_is_nan():
    row = net("n", lambda m, x: (x + m.e(of_all(x))) * m.c, e=table(), c=(D,))
    model, (x,) = row.build(4)
    extend(model)
    x[1] = float("nan")
    clip = ClippedGrad(1.0)
    with warnings.catch_warnings(), perex(clip, grad=False):
        warnings.simplefilter("ignore")
        harness.losses(model(x)).mean().backward()
    assert clip.norms.isnan().tolist() == [False, True, False, False]


# ------------------------------------------------------------------------------------------------- the term itself

OWNERS = {
    "in-order": [0, 1, 2, 3],
    "folded": [0, 0, 1, 1, 2, 2, 3, 3],
    "mixed": [2, 0, 3, 1, 1, 0, 2, 3],
    "nobody's": [-1, 0, 2, -1, 3],
}


def placed(owner, axis):
    torch.manual_seed(0)
    shape = [3, 2]
    shape.insert(axis, len(owner))
    return Placed(rand(*shape), axis, torch.tensor(owner, dtype=torch.long), 4)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS.keys())
def test_placed_entries_are_what_their_gradients_say(owner, axis):
    term, w = placed(owner, axis), torch.linspace(-1, 2, 4, dtype=torch.float64)
    plain = Dense(torch.stack([
        torch.stack([row if o == n else row * 0 for o, row in zip(owner, term.value.unbind(axis), strict=True)], axis)
        for n in range(4)
    ]))  # fmt: skip
    same_term(term, plain, w, "the term")
    for rows in ([True, False, True, True], [False] * 4, [True] * 4):
        mask = torch.tensor(rows)
        same_term(term.select(mask), plain.select(mask), w[mask], "some")
        same_term(term.select(mask).select(mask[mask]), plain.select(mask), w[mask], "some of some")
    for of, n in (([1, 0, 1, 0], 2), ([0, -1, 0, 2], 3), ([0, 0, 0, 0], 1)):
        groups = torch.tensor(of)
        same_term(term.regrouped(groups, n), plain.regrouped(groups, n), w[:n], "groups")
    assert (term.magnitude() >= plain.batch_l2().sqrt() * (1 - 1e-12)).all()


def test_placed_of_one_axis():
    term = Placed(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0, torch.tensor([0, 1, 1, 0]), 2)
    assert term.batch_l2().tolist() == [17, 13]
    assert term.double().dtype == torch.float64


def test_placed_norms_neither_overflow_nor_underflow():
    for scale in (1e25, 1e-25):
        term = Placed(torch.full((2, 3), scale), 0, torch.tensor([0, 1]), 2)
        assert torch.allclose(term.batch_l2().sqrt(), torch.full((2,), scale * 3**0.5).double(), rtol=1e-6)


def test_what_is_not_finite_stays_with_its_example():
    term = placed(OWNERS["mixed"], 0)
    term.value[0] = float("nan")  # of example 2
    assert term.batch_l2().isnan().tolist() == [False, False, True, False]
    assert not term.select(torch.tensor([True, True, False, True])).weighted_sum(torch.ones(3).double()).isnan().any()
    assert term.batch_dot().isnan().equal(Dense(term.dense()).batch_dot().isnan())


def test_terms_with_the_same_owners_are_added():
    one, other, third = placed(OWNERS["mixed"], 0), placed(OWNERS["mixed"], 0), placed([0, 0, 1, 1, 2, 2, 3, 3], 0)
    dense = Dense(rand(4, 8, 3, 2))
    kept = merged([one, dense, other, third])
    assert [type(t) for t in kept] == [Placed, Dense, Placed]
    same_term(kept[0], Dense(one.dense() + other.dense()), torch.ones(4).double(), "the sum")


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (0, 2), (3, 0, 0)], ids=str)
def test_as_many_ids_as_bags(lengths, by_function):
    """That they could be one of each example says nothing: the offsets tell whose they are."""
    row = net("bags", lambda m, i, o: F.embedding_bag(i, m.e.weight, o) if by_function else m.e(i, o), words,
              e=lambda: nn.EmbeddingBag(V, D))  # fmt: skip
    model, _ = row.build(1)
    ids, ends = torch.randint(V, (sum(lengths),)), torch.tensor([0, *lengths]).cumsum(0)
    extend(model)
    with perex(BatchGrad()):
        harness.losses(model(ids, ends[:-1])).mean().backward()
    for got, begin, end in zip(model.e.weight.grad_batch, ends[:-1], ends[1:], strict=True):
        own = harness.losses(model(ids[begin:end], torch.tensor([0])))[0]
        (wanted,) = torch.autograd.grad(own, model.e.weight)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_offsets_that_a_model_computes_of_lengths(by_function, frozen):
    """Two tables, of which the first may be frozen: bag n is example n's in both."""

    def forward(m, ids, lengths):
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])
        if not by_function:
            return m.a(m.e(ids, offsets) * m.f(ids, offsets))
        return m.a(F.embedding_bag(ids, m.e.weight, offsets) * F.embedding_bag(ids, m.f.weight, offsets))

    row = net("lengths", forward, words, a=linear, e=lambda: nn.EmbeddingBag(V, D), f=lambda: nn.EmbeddingBag(V, D))
    model, _ = row.build(1)
    model.e.requires_grad_(not frozen)
    lengths = torch.tensor([2, 3, 0, 1])
    ids, ends = torch.randint(V, (6,)), torch.tensor([0, 2, 5, 5, 6])
    extend(model)
    with perex(BatchGrad()):
        harness.losses(model(ids, lengths)).mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for n, (begin, end) in enumerate(itertools.pairwise(ends)):
        wanted = torch.autograd.grad(harness.losses(model(ids[begin:end], lengths[n : n + 1]))[0], trained)
        for p, rows in zip(trained, wanted, strict=True):
            torch.testing.assert_close(p.grad_batch[n], rows)


def _pooled(ids, weight, offsets):
    return F.embedding_bag(ids, weight, offsets)


class Pooled(nn.Module):
    """Bags in a function that the forward names, or in a method of the model."""

    def __init__(self, *, by_method):
        super().__init__()
        self.table, self.head, self.by_method = nn.Embedding(V, D), nn.Linear(D, 2), by_method

    def of_bags(self, ids, offsets):
        return F.embedding_bag(ids, self.table.weight, offsets)

    def forward(self, ids, offsets):
        pooled = self.of_bags(ids, offsets) if self.by_method else _pooled(ids, self.table.weight, offsets)
        return self.head(pooled)


@pytest.mark.parametrize("by_method", [False, True])
def test_bags_in_what_a_forward_calls(by_method):
    model = Pooled(by_method=by_method).double()
    ids, ends = torch.randint(V, (6,)), torch.tensor([0, 2, 5, 5, 6])
    extend(model)
    with perex(BatchGrad()):
        harness.losses(model(ids, ends[:-1])).mean().backward()
    for got, begin, end in zip(model.table.weight.grad_batch, ends[:-1], ends[1:], strict=True):
        own = harness.losses(model(ids[begin:end], torch.tensor([0])))[0]
        torch.testing.assert_close(got, torch.autograd.grad(own, model.table.weight)[0])
