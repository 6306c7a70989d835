"""Norms and sums in float32: long sums of like products, layouts, and sums that overflow."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perexample import _norms, _trust, extend, perex, terms
from perexample._conv import Geometry
from perexample._engine.state import listening
from perexample._engine.tap import Tap
from perexample._engine.view import ParameterView, Weights
from perexample._norms import drift, gram_drift, norms_of, norms_of_each, short_drift, short_sums
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad
from perexample.rules import norm
from perexample.terms import Dense, Outer, Regrouped, Sum, Windows

LIKE = torch.linspace(0.05, 1, 25)  # each rounds in another way


@pytest.mark.parametrize("length", [64, 128, 300, 512, 1000, 4096, 10_000])
@pytest.mark.parametrize(("o", "i"), [(1, 1), (1, 8), (8, 1), (2, 2), (40, 30)])
def test_no_kernel_drifts_more_than_norms_are_raised(length, o, i):
    left = LIKE.view(-1, 1, 1).expand(-1, o, length).contiguous()
    true = LIKE.double().view(-1, 1, 1) * length
    for at_hand in (None, torch.empty(len(LIKE), o, i)):
        found = short_sums(left, torch.ones(len(LIKE), length, i), at_hand)
        assert ((found - true).abs() / true).max() <= short_drift(length, left)


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("length", [300, 4096])
def test_norms_of_like_positions_are_not_too_small(outputs, length):
    """A product with a single row is a vector's, whose kernel goes on from what it is added to."""
    layer = extend(nn.Linear(8, outputs, bias=False))
    with perex(BatchL2Grad(), strategy="model"):
        (layer(torch.ones(len(LIKE), length, 8)).sum((1, 2)) * LIKE).mean().backward()
    ratio = layer.weight.batch_l2.sqrt() / (LIKE.double() * length * (8 * outputs) ** 0.5)
    assert (ratio - 1).min() > -1e-6
    assert (ratio - 1).max() < 3e-5


LOST = 0.49 * 2.0**-23  # what is added to one, and rounded off, again and again


@pytest.mark.parametrize("arguments", [{"strategy": "model"}, {"room": 1e6}, {"max_memory": 0}])
@pytest.mark.parametrize(
    ("length", "o", "i"),
    [(256, 1, 1), (256, 8, 8), (257, 2, 3), (512, 1, 1), (2000, 2, 2), (9000, 3, 2), (2, 2048, 2048), (8, 600, 700)],
)
def test_norms_of_many_small_positions_after_a_large_one(length, o, i, arguments):
    along = length > o  # else along the features, of which Gram matrices are sums
    x, g = torch.full((2, length, i), 1.0 if along else LOST**0.5), torch.full((2, length, o), LOST)
    if along:
        g[:, 0] = 1.0
    else:
        g = torch.full((2, length, o), LOST**0.5)
        x[:, :, 0] = g[:, :, 0] = 1.0
    layer, clipping = extend(nn.Linear(i, o, bias=False)), ClippedGrad(0.5)
    with perex(clipping, loss_reduction="sum", grad=False, **arguments):
        (layer(x) * g).sum().backward()
    true = torch.einsum("to,ti->oi", g[0].double(), x[0].double()).norm()
    assert ((clipping.norms / true - 1).abs() < 1e-4).all()
    assert (clipping.norms / true - 1).min() > -1e-6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", [8, 22, 40])
@pytest.mark.parametrize("small", [LOST, None])
def test_every_way_to_norms_of_a_convolution_is_not_too_small(side, small, groups):
    """Of positions that are all alike, and of small ones after a large one."""
    n, k = len(LIKE), 3
    g = LIKE.view(-1, 1, 1, 1).expand(n, 2, side, side).contiguous()
    if small is not None:
        g = torch.full_like(g, small)
        g[:, :, 0, 0] = 1.0
    geometry = Geometry(torch.Size((2, 2 // groups, k, k)), (1, 1), (1, 1), groups)
    term = Windows(torch.ones(n, 2, side + k - 1, side + k - 1), g, geometry, [(0, 0)] * 2)
    true = g.double().sum((2, 3))[:, 0] * (geometry.shape.numel()) ** 0.5
    names = [method.name for method in term.methods()]
    assert any("groups" in name for name in names)
    assert any("one by one" in name for name in names)
    for name in [*names, "per-example gradients"]:
        ratio = term.run(name)[0].sqrt() / true - 1
        assert ratio.min() > -1e-6, name
        assert ratio.max() < 1e-4, name


@pytest.mark.parametrize("length", [200, 512, 4096])
@pytest.mark.parametrize("wrap", ["let go", "regrouped", "first", "last"])
def test_norms_of_like_positions_that_are_part_of_other_terms(wrap, length):
    g = LIKE.view(-1, 1, 1, 1).expand(-1, 1, length, 1).contiguous()
    term, zero = Outer(g, torch.ones(len(LIKE), 1, length, 8), torch.Size((1, 8))), Dense(torch.zeros(len(LIKE), 1, 8))
    wrapped = {
        "let go": term, "regrouped": Regrouped(term, torch.arange(len(LIKE)), len(LIKE)), "first": Sum([term, zero]),
        "last": Sum([zero, term]),
    }[wrap]  # fmt: skip
    l2 = term.run("per-example gradients")[0] if wrap == "let go" else wrapped.batch_l2()
    ratio = l2.sqrt() / (LIKE.double() * length * 8**0.5) - 1
    assert wrapped.drift() == term.drift() > 0
    assert ratio.min() > -1e-6
    assert ratio.max() < 3e-5


def test_by_how_much_sums_of_each_kind_may_be_off():
    single, like = torch.float32, torch.empty(0)
    assert short_drift(100, like) == drift(100, single) == 50 * 2.0**-23
    assert short_drift(4096, like) == drift(128 + 32, single)
    assert short_drift(10**6, like) == drift(128 + 64, single)
    assert gram_drift(single, 100, 5000) == 25 * 2.0**-23 + drift(100 + 512 + 9, single)
    x, g = torch.ones(2, 1, 44, 44), torch.ones(2, 1, 40, 40)
    term = Windows(x, g, Geometry(torch.Size((1, 1, 5, 5)), (1, 1), (1, 1), 1))
    short = {Windows._by_rows: 1600, Windows._by_unfolding: 1600, Windows._by_offsets: 44 * 44}
    for form, length in short.items():
        assert term._drift_of(form) == short_drift(length, like)
    for form in (Windows._one_by_one, Windows._as_groups):
        assert term._drift_of(form) == drift(20 * 40 + 1, single)  # 20 rows at once
    assert term.drift() == term._likeliest().drift > 0


def test_norms_over_all_axes_however_they_lie():
    t = torch.randn(5, 1, 7, 40)
    true = torch.linalg.vector_norm(t.double().flatten(1), dim=1)
    for laid in (t, t.transpose(0, 2).contiguous().transpose(0, 2), t.expand(5, 1, 7, 40)[:, :, ::2].contiguous()):
        same = true if laid.shape == t.shape else torch.linalg.vector_norm(laid.double().flatten(1), dim=1)
        torch.testing.assert_close(norms_of_each(laid), same, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms_of(t).square().sum((1, 2)).sqrt(), true, rtol=1e-6, atol=0)


def time_first(t: Tensor) -> Tensor:
    """The same numbers with the examples of one time side by side."""
    return t.transpose(0, 2).contiguous().transpose(0, 2)


@pytest.mark.parametrize(("o", "i"), [(3, 7), (7, 3), (4, 4)])
@pytest.mark.parametrize("of_g", [time_first, lambda t: t, lambda t: t.mT.contiguous().mT])
@pytest.mark.parametrize("of_x", [time_first, lambda t: t, lambda t: t[:, :, :1].expand(t.shape)])
def test_weighted_sums_of_factors_in_any_layout(o, i, of_g, of_x):
    g, x, w = of_g(torch.randn(5, 1, 6, o)), of_x(torch.randn(5, 1, 6, i)), torch.rand(5)
    true = torch.einsum("n,nto,nti->oi", *(t.double() for t in (w, g[:, 0], x[:, 0])))
    found = Outer(g, x, torch.Size((o, i))).weighted_sum(w)
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


class Seen(nn.Module):
    """Keeps what its output's gradient was when the layer had it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x.register_hook(lambda g: setattr(self, "of_input", g))
        return self.inner(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_upstream_gradients_that_lie_otherwise(bias, grad):
    """Tokens' cross-entropy gives the output layer a transposed gradient, which is copied once for autograd and us."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), Seen(nn.Linear(4, 9, bias=bias)))
    x, y = torch.randn(5, 7, 6), torch.randint(9, (5, 7))

    def loss() -> Tensor:
        return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1).mean()

    loss().backward()
    plain, of_input = [p.grad for p in model.parameters()], model[1].of_input
    model.zero_grad()
    extend(model)
    with perex(BatchGrad(), BatchL2Grad(), grad=grad):
        loss().backward()
    for p, known in zip(model.parameters(), plain, strict=True):
        assert grad == (p.grad is not None)
        if grad:
            torch.testing.assert_close(p.grad, known, rtol=0, atol=0)
        torch.testing.assert_close(p.grad_batch.mean(0), known)
        torch.testing.assert_close(p.batch_l2, p.grad_batch.flatten(1).square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(model[1].of_input * (1 if grad else 1 / 5), of_input)


def test_hooks_see_upstream_gradients_as_they_are():
    """What is laid out anew is the same numbers, for hooks before and after, and for what retains gradients."""
    layer, seen = extend(nn.Linear(4, 9, bias=False)), []
    x = torch.randn(5, 7, 4)
    with perex(BatchGrad()):
        y = layer(x)
        y.retain_grad()
        y.register_hook(seen.append)
        (y.transpose(1, 2) * torch.arange(7.0)).sum((1, 2)).mean().backward()
    true = (torch.arange(7.0) / 5)[None, :, None].expand(5, 7, 9)
    torch.testing.assert_close(y.grad, true)
    torch.testing.assert_close(seen[0], true)


def test_hooks_may_still_change_upstream_gradients():
    layer = extend(nn.Linear(4, 9, bias=False))
    x = torch.randn(5, 7, 4)
    with perex(BatchGrad()):
        y = layer(x)
        y.register_hook(lambda g: 2 * g)
        y.transpose(1, 2).sum((1, 2)).mean().backward()
    true = 2 * x.sum(1)[:, None, :].expand(5, 9, 4)
    torch.testing.assert_close(layer.weight.grad_batch, true)


def view_of(g: Tensor, x: Tensor, scale: float = 1.0) -> ParameterView:
    """A view of a weight with one position of each example."""
    view = ParameterView("weight", torch.empty(g.shape[1], x.shape[1]), len(g), scale)
    view.add(Outer(g[:, None, None], x[:, None, None], view.param.shape))
    return view


def test_sums_are_looked_at_only_where_they_may_overflow(monkeypatch):
    looked = []
    monkeypatch.setattr("perexample._engine.view._finite", lambda total: looked.append(1) or True)
    g, x = torch.randn(4, 3), torch.randn(4, 2)

    def looks(w: Weights, *, norms: bool = True, scale: float = 1.0) -> bool:
        looked.clear()
        view = view_of(g, x, scale)
        if norms:
            view.batch_l2()
        view.weighted_sum(w)
        return bool(looked)

    ones = torch.ones(4)
    assert not looks(Weights(ones, most=1.0))
    assert looks(Weights(ones))  # nothing is known of the norms
    assert looks(Weights(ones, most=1e30))
    assert looks(Weights(2 * ones, most=1.0))  # a factor times a weight may overflow
    assert looks(Weights(ones, most=1.0), scale=2.0)
    assert looks(Weights(ones, most=1.0), norms=False)  # nor whether they can be trusted


@pytest.mark.parametrize("scale", [1e38, 1e30, 1.0, 1e-30])
@pytest.mark.parametrize("clip", ["flat", "automatic"])
@pytest.mark.parametrize("positions", [1, 3])
def test_clipped_sums_of_gradients_near_the_end_of_float32(scale, clip, positions):
    """Sums stay finite and exact, whatever the factors are."""
    torch.manual_seed(0)
    layer, clipping = nn.Linear(4, 3, bias=False), ClippedGrad(2.0, clip=clip)
    extend(layer)
    x, up = torch.randn(6, positions, 4), torch.randn(6, positions, 3).sign() * scale
    with perex(clipping, grad=False):
        (layer(x) * up).sum((1, 2)).mean().backward()
    rows = torch.einsum("nto,nti->noi", up.double(), x.double())
    norms = rows.flatten(1).norm(dim=1)
    factors = (2.0 / norms).clamp_max(1.0) if clip == "flat" else 2.0 / (norms + 0.01)
    true = (factors[:, None, None] * rows).sum(0)
    torch.testing.assert_close(layer.weight.clipped_sum.double(), true, rtol=1e-4, atol=2e-5 * min(1.0, scale))


@pytest.mark.parametrize("bound", [1e39, 3e38])
def test_sums_that_overflow_on_their_way_are_computed_again(bound):
    layer, clipping = extend(nn.Linear(1, 1, bias=False)), ClippedGrad(bound)
    up = torch.tensor([2e38, 2e38, -2e38, -2e38])[:, None]
    with perex(clipping, loss_reduction="sum", grad=False):
        (layer(torch.ones(4, 1)) * up).sum().backward()
    assert layer.weight.clipped_sum.item() == 0.0


def test_clipped_sums_need_no_look(monkeypatch):
    monkeypatch.setattr("perexample._engine.view._finite", lambda total: pytest.fail("looked"))
    layer, clipping = extend(nn.Linear(3, 2)), ClippedGrad(0.5)
    with perex(clipping, grad=False):
        layer(torch.randn(4, 3)).square().sum(1).mean().backward()
    assert layer.weight.clipped_sum.isfinite().all()


def test_the_gradient_of_an_output_is_laid_out_once(monkeypatch):
    """What the rule has is what autograd goes on with."""
    seen, own = [], Tap.laid_out
    monkeypatch.setattr(Tap, "laid_out", lambda self, g: seen.append((g, own(self, g))) or seen[-1][1])
    layer, held = extend(nn.Linear(4, 9, bias=False)), []
    x, weights = torch.randn(5, 7, 4, requires_grad=True), torch.randn(5, 9, 7)
    with perex(BatchGrad()), listening(lambda tap, rule, terms: held.extend(terms["weight"].factors())):
        (layer(x).transpose(1, 2) * weights).sum((1, 2)).mean().backward()
    (arrived, laid), *none = seen
    assert not none
    assert not arrived.is_contiguous()
    assert laid.is_contiguous()
    assert torch.equal(arrived, laid)
    assert held[0].data_ptr() == laid.data_ptr()


@pytest.mark.parametrize("lies", ["in order", "two axes", "time first"])
def test_gradients_that_lie_well_are_left_alone(lies, monkeypatch):
    seen, own = [], Tap.laid_out
    monkeypatch.setattr(Tap, "laid_out", lambda self, g: seen.append((g, own(self, g))) or seen[-1][1])
    layer = extend(nn.Linear(4, 9, bias=False), batch_dim=1 if lies == "time first" else 0)
    x = torch.randn(5, 4) if lies == "two axes" else torch.randn(5, 7, 4)
    with perex(BatchGrad()):
        out = layer(x)
        up = torch.randn(9, 5).T if lies == "two axes" else torch.randn(out.shape)
        (out * up).flatten(1).sum().mul(1 / x.shape[1 if lies == "time first" else 0]).backward()
    assert seen[0][0] is seen[0][1]


def test_rows_too_long_for_one_native_call_are_not_given_to_any():
    x, g = torch.ones(1, 1, 4, 2002), torch.ones(1, 1, 2, 2000)
    term = Windows(x, g, Geometry(torch.Size((1, 1, 3, 3)), (1, 1), (1, 1), 1), [(0, 0)] * 2)
    assert not any("groups" in method.name or "one by one" in method.name for method in term.methods())


def test_terms_of_factors_that_need_gradients_are_values():
    """As a rule's own test may make them of a model's tensors."""
    g, x, w = torch.randn(3, 1, 300, 4), torch.randn(3, 1, 300, 5), torch.rand(3)
    plain = Outer(g, x, torch.Size((4, 5)))
    term = Outer(g.clone().requires_grad_(), x.clone().requires_grad_(), plain.shape)
    torch.testing.assert_close(term.dense().detach(), plain.dense())
    torch.testing.assert_close(term.weighted_sum(w).detach(), plain.weighted_sum(w))
    torch.testing.assert_close(term.batch_l2().detach(), plain.batch_l2())


@pytest.mark.parametrize("share", [1e-4, 2e-5])
def test_doubt_is_found_in_one_look(share):
    numbers = [0.0, -0.0, 1e-300, 1.0, 1e4, 1e300, math.inf, math.nan]
    for error, of, other in itertools.product(numbers, numbers, [0.0, 1.0]):
        errors, wholes = (torch.tensor(pair, dtype=torch.float64) for pair in ((error, other), (of, 1.0)))
        wanted = ~((errors <= share * wholes) & torch.isfinite(wholes))
        found = _trust._in_doubt(errors - share * wholes, wholes)
        assert (found is None) == (not wanted.any())
        assert found is None or torch.equal(found, wanted), (error, of)
    nobody = torch.zeros(0, dtype=torch.float64)
    assert _trust._in_doubt(nobody, nobody) is None


def test_what_only_a_loose_bound_puts_in_doubt_is_not_computed_again():
    class Loose(terms.Dense):
        def select(self, rows):
            return Loose(self.value[rows])

        def magnitude(self):
            return self.value.double().flatten(1).norm(dim=1)

        def magnitude_bound(self):
            return self.magnitude() * 1e9

        def double(self):
            pytest.fail("was computed again")

    term = Loose(torch.randn(3, 4, 5))
    l2 = term.magnitude().square()
    raised, doubtful = _trust.direct(term, l2)
    assert doubtful is None
    reference.assert_close_report(raised, l2, 1e-5, "direct")
    raised, doubtful = _trust.inner(term, _norms.Inner(l2, term.magnitude_bound(), products=0))
    assert doubtful is None
    reference.assert_close_report(raised, l2, 1e-5, "inner")


@pytest.mark.parametrize("mean", [300.0, -300.0])
def test_means_far_from_zero_on_either_side_take_the_other_way(mean, monkeypatch):
    far, found = norm._far_from_zero, []
    monkeypatch.setattr(norm, "_far_from_zero", lambda call: found.append(far(call)) or found[-1])
    torch.manual_seed(0)
    model, x = extend(nn.GroupNorm(2, 4)), torch.randn(3, 4, 8)
    x[1, :2] += mean
    for batch in (x, x[::2].contiguous()):
        with perex(BatchGrad(), grad=False):
            model(batch).sin().sum((1, 2)).mean().backward()
    assert found[0].tolist() == [False, True, False]
    assert found[1] is None
