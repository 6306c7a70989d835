"""Gram matrices of inputs that several layers share are formed once, and are those of the right tensor."""

from __future__ import annotations

import gc
import weakref

import pytest
import reference
import torch
from torch import nn

from perexample import extend, perex
from perexample._grams import Grams
from perexample.errors import StaleGradientError
from perexample.extensions import BatchL2Grad, ClippedGrad
from perexample.methods import Choice, Method, choose, forget_choices
from perexample.terms import Outer


class Projections(nn.Module):
    """Queries, keys and values of one input, and a layer that nobody shares an input with."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.parts = nn.ModuleList([kind(24, size) for size in (24, 24, 40)])
        self.out = kind(24, 24)

    def forward(self, x):
        q, k, v = (part(x) for part in self.parts)
        return self.out(torch.softmax(q @ k.mT, -1) @ v[..., :24])


@pytest.fixture
def formed(monkeypatch):
    """Every Gram matrix that was handed out, with its input, where no other way to norms is taken."""
    found: list[tuple] = []
    of, methods = Grams.of, Outer.methods

    def noting(self, x):
        gram = of(self, x)
        found.append((x, gram))
        return gram

    monkeypatch.setattr(Grams, "of", noting)
    monkeypatch.setattr(Outer, "methods", lambda self: [one for one in methods(self) if "Gram" in one.name])
    return found


def norms(model, x, **options):
    with perex(BatchL2Grad(), ClippedGrad(1.0), grad=False, **options):
        model(x).square().sum((1, 2)).mean().backward()
    return {name: p.batch_l2 for name, p in model.named_parameters()}


def test_layers_with_one_input_share_its_gram_matrix(formed):
    torch.manual_seed(0)
    model, x = extend(Projections().double()), torch.randn(3, 7, 24, dtype=torch.float64)
    found = norms(model, x)
    for name, p in model.named_parameters():
        rows = [torch.autograd.grad(model(row[None]).square().sum(), p)[0] for row in x]
        reference.assert_close_report(found[name], torch.stack([row.square().sum() for row in rows]), 1e-12, name)
    shared = [gram for _, gram in formed if gram is not None]
    assert len(formed) == 4
    assert len(shared) == 3
    assert all(gram is shared[0] for gram in shared)


def test_a_matrix_larger_than_its_input_is_not_kept(formed):
    torch.manual_seed(0)
    model, x = extend(Projections()), torch.randn(3, 25, 24)
    norms(model, x)
    assert formed
    assert all(gram is None for _, gram in formed)


def test_what_was_formed_goes_with_its_last_call(formed):
    """And not only when the backward is over."""
    torch.manual_seed(0)
    model, x, alive = extend(Projections()), torch.randn(3, 7, 24), []

    class AtTheEnd(ClippedGrad):
        def finish(self, views):
            grams = [weakref.ref(gram) for _, gram in formed if gram is not None]
            formed.clear()
            gc.collect()
            alive.extend(gram() is not None for gram in grams)
            return super().finish(views)

    with perex(AtTheEnd(1.0), grad=False):
        model(x).square().sum((1, 2)).mean().backward()
    assert alive == [False] * 3


def test_parts_of_one_memory_are_told_apart():
    """A chunk begins where its whole begins."""
    whole = torch.randn(2, 1, 3, 8)
    part = whole[..., :4]
    grams = Grams({"a": ("l", [whole]), "b": ("l", [part]), "c": ("l", [whole])})
    assert torch.equal(grams.of(whole), whole @ whole.mT)
    assert grams.of(part) is None
    assert torch.equal(grams.of(whole), whole @ whole.mT)


def test_only_what_is_wanted_again_is_kept():
    x, y = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 8)
    grams = Grams({"a": ("l", [x, x]), "b": ("l", [x]), "c": ("l", [y])})
    assert grams
    assert grams.of(y) is None
    assert grams.of(x) is not None
    grams.done("a")
    grams.done("a")  # a second pass
    assert grams.of(x) is not None
    grams.done("b")
    assert grams.of(x) is None
    assert not grams
    last = Grams({"a": ("l", [x]), "b": ("l", [x])})
    last.done("a")
    assert last.of(x) is None  # nobody else will ask


def test_nothing_is_shared_by_nothing():
    empty = torch.zeros(0, 3)
    assert not Grams({"a": ("l", [empty]), "b": ("l", [empty]), "c": ("l", []), "d": ("l", [torch.randn(2, 3)])})


def test_calls_of_another_kind_do_not_count():
    """A norm layer that has the input of a linear layer asks for no Gram matrix."""
    x = torch.randn(2, 1, 3, 8)
    assert not Grams({"a": ("linear", [x]), "b": ("norm", [x])})
    grams = Grams({"a": ("linear", [x]), "b": ("norm", [x]), "c": ("linear", [x])})
    assert grams.of(x) is not None
    for call in "ac":
        grams.done(call)
    assert not grams


def test_sparse_inputs_have_no_place_in_memory():
    """An error of torch's, if it were asked for one."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))

        def forward(self, x):
            return torch.sparse.mm(x, self.weight)

    torch.manual_seed(0)
    model, x = extend(Graph()), torch.randn(4, 5, dtype=torch.float64)
    assert not Grams({"a": ("l", [x.to_sparse()]), "b": ("l", [x.to_sparse()])})
    with perex(BatchL2Grad(), grad=False):
        model(x.to_sparse()).square().sum(1).mean().backward()
    rows = [torch.autograd.grad((row[None] @ model.weight).square().sum(), model.weight)[0] for row in x]
    wanted = torch.stack([row.square().sum() for row in rows])
    reference.assert_close_report(model.weight.batch_l2, wanted, 1e-12, "norms")


def test_writing_into_a_shared_input_while_it_is_shared_is_noticed(formed):
    """The matrix that was formed before is not that of what is there now."""
    model, x = extend(Projections()), torch.randn(3, 7, 24, requires_grad=True)
    shared = x * 1.0
    with perex(ClippedGrad(1.0), grad=False):
        loss = model(shared).square().sum((1, 2)).mean()
        of = Grams.of

        def writing(self, t):
            gram = of(self, t)
            shared.data.add_(1.0)  # the version does not show that
            with torch.no_grad():
                shared.add_(1.0)
            return gram

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Grams, "of", writing)
            with pytest.raises(StaleGradientError, match="changed in place"):
                loss.backward()


@pytest.mark.parametrize("options", [{"max_memory": 0}, {"room": 1e6}, {}])
def test_sharing_changes_nothing(options, monkeypatch, formed):
    torch.manual_seed(0)
    model, x = extend(Projections().double()), torch.randn(4, 6, 24, dtype=torch.float64)
    shared = norms(model, x, **options)
    sums = {name: p.clipped_sum.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(Grams, "of", lambda self, x: None)
    for name, l2 in norms(model, x, **options).items():
        reference.assert_close_report(shared[name], l2, 1e-12, name)
    for name, p in model.named_parameters():
        reference.assert_close_report(sums[name], p.clipped_sum, 1e-12, name)


def test_what_others_have_formed_does_not_count_when_methods_are_compared():
    """A matrix that is there already would make its method seem faster than it is for the one that forms it."""
    term = Outer(torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 8), torch.Size((8, 8)))
    term.grams, seen = Grams({"a": ("l", [term.x]), "b": ("l", [term.x])}), []
    forget_choices()
    methods = [Method(name, lambda: (seen.append(term.grams), term), 1e9) for name in "ab"]
    choose(term, Choice(), methods)
    assert set(seen) == {None}
    assert term.grams
