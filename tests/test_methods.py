"""The choice of method: what is chosen, that every one is exact, and what is held."""

import gc
import weakref
from contextlib import nullcontext
from functools import lru_cache

import pytest
import reference
import torch
from torch import nn

from perexample import (
    ConfigurationError,
    Extension,
    ExtensionError,
    LossError,
    MemoryBoundWarning,
    ParameterView,
    Rule,
    _conv,
    _norms,
    extend,
    perex,
    plan,
    register_rule,
    terms,
)
from perexample import methods as choosing
from perexample._conv import Geometry, examples_as_groups, one_by_one
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad
from perexample.methods import Choice, Method, choose, forget_choices, settled
from perexample.terms import Formed, Outer, Windows
from perexample.terms import windows as of_windows


@pytest.fixture(autouse=True)
def fresh():
    forget_choices()
    yield
    forget_choices()


def outer(n=3, t=40, o=50, i=60, dtype=torch.float64):
    torch.manual_seed(0)
    return Outer(torch.randn(n, 1, t, o, dtype=dtype), torch.randn(n, 1, t, i, dtype=dtype), torch.Size((o, i)))


def windows(*, c=4, o=6, size=9, k=3, stride=1, dilation=1, groups=1, dims=2, sides=None, mode="zeros"):
    torch.manual_seed(0)
    geometry = Geometry(torch.Size((o, c // groups, *[k] * dims)), (stride,) * dims, (dilation,) * dims, groups)
    sides = sides or [(1, 1)] * dims
    length = (size + sum(sides[0]) - dilation * (k - 1) - 1) // stride + 1
    x = torch.randn(3, c, *[size] * dims, dtype=torch.float64)
    g = torch.randn(3, o, *[length] * dims, dtype=torch.float64)
    return Windows(x, g, geometry, sides, mode)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": 2, "size": 10},
    "stride-3-k5": {"stride": 3, "k": 5, "size": 14},
    "dilated": {"dilation": 2},
    "strided-dilated": {"stride": 2, "dilation": 3, "size": 12},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "o": 4},
    "depthwise-doubled": {"groups": 4, "o": 8},
    "1x1": {"k": 1, "sides": [(0, 0)] * 2},
    "1d": {"dims": 1},
    "1d-strided": {"dims": 1, "stride": 2, "size": 11},
    "3d": {"dims": 3, "size": 5},
    "3d-strided": {"dims": 3, "size": 6, "stride": 2},
    "3d-stride-divides": {"dims": 3, "k": 4, "size": 7, "stride": 2},
    "stride-divides": {"k": 4, "stride": 2, "size": 10},
    "stride-divides-grouped": {"k": 4, "stride": 2, "size": 11, "groups": 2},
    "patches": {"k": 3, "stride": 3, "size": 10, "sides": [(0, 0)] * 2},
    "lopsided": {"sides": [(2, 1), (2, 1)]},
    "reflect": {"mode": "reflect"},
    "circular": {"mode": "circular"},
    "window-as-large-as-the-image": {"k": 9, "sides": [(0, 0)] * 2},
    "reaches-not-all": {"stride": 4, "size": 10, "sides": [(0, 0)] * 2},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("unfolded", "native"), [(1, 1024), (2**21, 8), (2**21, 1)])
def test_every_method_of_a_convolution_agrees_with_the_unfolded_product(name, unfolded, native, monkeypatch):
    monkeypatch.setattr(_norms, "_UNFOLDED", unfolded)
    monkeypatch.setattr(_conv, "_AT_ONCE", native)
    term = windows(**CONVOLUTIONS[name])
    wanted = term.unfolded().dense()
    norms, w = wanted.flatten(1).square().sum(1), torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    names = [method.name for method in term.methods()]
    assert len(set(names)) == len(names) >= 5
    for method in term.methods():
        l2, kept = method.run()
        reference.assert_close_report(l2, norms, 1e-12, f"norms by {method.name}")
        reference.assert_close_report(kept.dense(), wanted, 1e-12, f"gradients after {method.name}")
        total = torch.tensordot(w, wanted, 1)
        reference.assert_close_report(kept.weighted_sum(w), total, 1e-12, f"sum after {method.name}")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_windows_that_are_copied_are_those_that_are_looked_up(name, monkeypatch):
    term, found = windows(**CONVOLUTIONS[name]), []
    for few in (0, 10**9):
        monkeypatch.setattr(_conv, "_FEW", few)
        found.append(term.unfolded().x)
    assert torch.equal(*found)


def strided(stride=2, dilation=1, pad=0, n=2, size=10, dtype=torch.float64, mode="zeros"):
    """Convolutions with kernels of 4 and outputs of 4, by different ways there."""
    geometry = Geometry(torch.Size((3, 2, 4, 4)), (stride,) * 2, (dilation,) * 2, 1)
    x, g = torch.randn(n, 2, size, size, dtype=dtype), torch.randn(n, 3, 4, 4, dtype=dtype)
    return Windows(x, g, geometry, [(pad, pad)] * 2, mode)


def test_a_choice_is_taken_again_only_for_what_is_the_same(monkeypatch):
    lopsided = strided(pad=1, size=8)
    lopsided.sides = [(2, 0), (0, 2)]
    other_layout = outer()
    other_layout.g = other_layout.g.mT.contiguous().mT
    found = [outer(), outer(n=4), outer(t=41), other_layout, Outer(outer().g.float(), outer().x.float(), outer().shape)]
    found += [strided(), strided(1, 2), strided(pad=1, size=8), strided(pad=1, size=8, mode="reflect"), lopsided]
    found += [strided(n=3), strided(dtype=torch.float32)]
    choices = [Choice(), Choice("model"), Choice(sums=True), Choice(room=2.0)]
    asked = []
    monkeypatch.setattr(choosing, "choose", lambda term, choice: asked.append(1) or choose(term, choice))
    for _ in range(2):
        for term in found:
            for choice in choices:
                settled(term, choice)
    assert len(asked) == len(found) * len(choices)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        settled(found[0], choices[0])
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == len(found) * len(choices) + 1
    forget_choices()
    settled(found[0], choices[0])
    assert len(asked) == len(found) * len(choices) + 2


def test_only_so_many_choices_are_remembered(monkeypatch):
    monkeypatch.setattr(choosing, "_MOST", 3)
    for t in range(2, 12):
        settled(outer(t=t), Choice("model"))
        assert len(choosing._TAKEN) <= 3


@pytest.mark.parametrize("make", [outer, windows, strided])
def test_a_method_is_run_again_by_its_name(make, monkeypatch):
    ran = []
    for owner in (Outer, Windows):
        for name in ("_by_gram", "_kept", "_dropped", "_by_pixels", "_by_windows"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, lambda self, name=name: ran.append(name))
    term = make()
    for method in term.methods():
        ran.clear()
        method.run()
        directly = list(ran)
        ran.clear()
        term.run(method.name)
        assert ran == directly


@pytest.mark.parametrize("first", [True, False])
def test_a_term_with_other_methods_is_asked_each_time(first):
    class Mine(Outer):
        def methods(self):
            return [Method("mine", lambda: (torch.full((self.n,), 7.0), self))]

    known = outer()
    mine, choice = Mine(known.g, known.x, known.shape), Choice("model")
    for term in (known, mine, known, mine) if first else (mine, known, mine, known):
        assert (settled(term, choice)[0] == 7.0).all() == (term is mine)


@pytest.mark.parametrize("most", [10**9, 1])
def test_large_gradients_are_formed_in_their_own_order(most, monkeypatch):
    """To bring them into another one takes as much room again."""
    offered = []
    monkeypatch.setattr(of_windows, "choose", lambda term, choice, methods: offered.extend(methods) or methods[0])
    monkeypatch.setattr(of_windows, "_ARRANGED", most)
    term = windows()
    reference.assert_close_report(term.formed(Choice()), term.unfolded().dense(), 1e-12, "gradients")
    arranged = [m.name for m in offered if "kernel offsets" in m.name or "kernel rows" in m.name]
    assert len(arranged) == (2 if most > 1 else 0)


def test_where_to_look_is_computed_once_for_small_windows(monkeypatch):
    """And is as good for images of another size, and for large windows."""
    monkeypatch.setattr(_conv, "_FEW", 10**9)
    computed, places = [], _conv._places
    for kept in (0, 2**14):
        monkeypatch.setattr(_conv, "_KEPT", kept)
        monkeypatch.setattr(_conv, "_places", lambda *a: computed.append(a) or places(*a))
        monkeypatch.setattr(_conv, "_places_kept", lru_cache(_conv._places))
        computed.clear()
        for size in (8, 9, 8):
            monkeypatch.setattr(_conv, "_FEW", 10**9)
            found = windows(size=size)
            looked_up = found.unfolded().x
            monkeypatch.setattr(_conv, "_FEW", 0)
            assert torch.equal(looked_up, found.unfolded().x)
        assert len(computed) == (2 if kept else 3)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_alone_are_formed_by_the_way_that_is_chosen(name, monkeypatch):
    term = windows(**CONVOLUTIONS[name])
    wanted, ways = term.unfolded().dense(), [way.forming(term) for way in term._ways()]
    assert not {way.name for way in ways} & {method.name for method in term.methods()}
    for way in ways:
        reference.assert_close_report(way.run()[0], wanted, 1e-12, way.name)
    monkeypatch.setattr(of_windows, "choose", lambda term, choice, methods: methods[-1])
    found = term.formed(Choice("measure", sums=True))
    assert torch.equal(found, ways[-1].run()[0])


@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("name", [name for name, options in CONVOLUTIONS.items() if "groups" not in options])
def test_sums_of_convolutions_as_one_product_with_the_windows(name, n):
    """A few images at a time, as their windows take more room than the images."""
    one = windows(**CONVOLUTIONS[name])
    x, g = (torch.randn(n, *t.shape[1:], dtype=torch.float64) for t in (one.x, one.g))
    term = one._like(x, g)
    for found in (term._sum_of_windows(), term._sum_native()):
        assert found.is_contiguous()
        reference.assert_close_report(found, term.unfolded().dense().sum(0), 1e-12, name)


def test_windows_for_a_sum_take_no_more_room_than_the_weight_or_the_factors(monkeypatch):
    sizes, unfold = [], of_windows.windows_by_taps
    monkeypatch.setattr(of_windows, "windows_by_taps", lambda *args: sizes.append(len(args[0])) or unfold(*args))
    windows(size=3)._sum_of_windows()  # 3 images of 36 numbers, 54 of the gradient, 324 of the windows; the weight 216
    windows(size=3, o=54)._sum_of_windows()  # the weight 1944
    assert sizes == [1, 1, 1, 3]


def test_the_way_of_a_sum_is_chosen_for_few_positions_and_remembered(monkeypatch):
    asked = []

    def choose(term, choice, methods):
        asked.append((choice.strategy, [method.name for method in methods]))
        return methods[-1]

    def total(term, strategy="measure"):
        _, kept = term.settled(Choice(strategy, sums=True))
        return kept.weighted_sum(torch.ones(3, dtype=torch.float64))

    monkeypatch.setattr(of_windows, "choose", choose)
    monkeypatch.setattr(Windows, "run", lambda self, name: Windows._by_windows(self))
    ways = [of_windows._SUM_NATIVE, of_windows._SUM_OF_WINDOWS]
    for strategy in ("measure", "measure", "model", "model"):
        term = windows(size=8)
        reference.assert_close_report(total(term, strategy), term.unfolded().dense().sum(0), 1e-12, strategy)
    assert asked == [("measure", ways), ("model", ways)]
    for options in ({"size": 9}, {"size": 8, "groups": 2}):  # too many positions; no product for groups
        total(windows(**options))
    nobody = windows(size=8).select(torch.zeros(3, dtype=torch.bool))
    assert not nobody.weighted_sum(torch.ones(0, dtype=torch.float64)).any()
    assert len(asked) == 2
    total(windows(size=8, o=7))
    assert len(asked) == 3


def test_the_model_takes_a_product_for_many_channels_over_few_positions():
    few, more = windows(c=128, o=128, size=2), windows(c=64, o=64, size=8)
    few = few._like(few.x.repeat(20, 1, 1, 1), few.g.repeat(20, 1, 1, 1))
    ways = [min(term._sums(), key=lambda method: method.seconds(term.g.device)).name for term in (few, more)]
    assert ways == [of_windows._SUM_OF_WINDOWS, of_windows._SUM_NATIVE]
    for method in few._sums():
        total, term = method.run()
        reference.assert_close_report(total, few.unfolded().dense().sum(0), 1e-12, method.name)
        assert term is few


def test_what_the_choice_of_a_sum_takes_does_not_count(monkeypatch):
    """It is made when a sum is asked for first, which methods of norms are timed with."""
    clock, known = [0.0], []

    class Asking(Outer):
        def methods(self):
            return [
                Method("a", lambda: self._spent(0.1), 2e9, held=1),
                Method("b", lambda: self._spent(0.3), 1e9, held=1),
            ]

        def _spent(self, seconds):
            clock[0] += seconds
            return torch.zeros(self.n), Formed(self.dense()[None].flatten(2), self.shape) if seconds > 0.2 else self

        def weighted_sum(self, w):
            clock[0] += 0.01 if known else 1.0
            known.append(w)
            return torch.zeros(self.shape)

    monkeypatch.setattr(choosing, "_now", lambda device: clock[0])
    one = outer()
    assert choose(Asking(one.g, one.x, one.shape), Choice(sums=True)).name == "a"


@pytest.mark.parametrize("before", [0, 1, 3, 7])
@pytest.mark.parametrize("behind", [0, 2, 7])
@pytest.mark.parametrize(("k", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (4, 3, 2), (2, 5, 1), (3, 1, 3)])
def test_gram_matrices_of_pixels_without_what_is_padded(k, stride, dilation, before, behind):
    size, reach = 5, dilation * (k - 1) + 1
    positions = max(0, size + before + behind - reach) // stride + 1
    geometry = Geometry(torch.Size((2, 3, k, k)), (stride,) * 2, (dilation,) * 2, 1)
    torch.manual_seed(0)
    x, g = (torch.randn(3, c, s, s, dtype=torch.float64) for c, s in ((3, size), (2, positions)))
    term = Windows(x, g, geometry, [(before, max(behind, reach - size - before))] * 2)
    wanted = term.unfolded().dense().flatten(1).square().sum(1)
    reference.assert_close_report(_conv.pixel_gram(x, g, geometry, [before] * 2).l2, wanted, 1e-12, "norms")


@pytest.mark.parametrize("cached", [1, 3500, 2**20])
@pytest.mark.parametrize("make", [outer, windows, lambda: windows(groups=2)], ids=["outer", "windows", "grouped"])
def test_gram_matrices_of_a_few_examples_at_once(make, cached, monkeypatch):
    term = make()
    wanted = term.dense().flatten(1).square().sum(1)
    monkeypatch.setattr(_norms, "_CACHED", cached)
    for method in term.methods():
        if method.name.startswith("Gram"):
            reference.assert_close_report(method.run()[0], wanted, 1e-12, method.name)
    nobody = torch.zeros(3, dtype=torch.bool)
    assert all(method.run()[0].shape == (0,) for method in term.select(nobody).methods() if "Gram" in method.name)


@pytest.mark.parametrize(("threads", "several"), [(1, 21), (2, 22), (4, 24), (64, 64)])
def test_images_that_are_unfolded_at_once_are_shared_out_evenly(threads, several, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert _norms.unfold_block(torch.zeros(1), 10**5) == several
    assert _norms.unfold_block(torch.zeros(1), 0) % threads == 0
    assert _norms.unfold_block(torch.zeros(1, device="meta"), 10**6) == 16


@pytest.mark.parametrize("name", ["unfolded", "windows"])
def test_few_images_are_unfolded_at_once(name, monkeypatch):
    """The windows of all images take the size of the kernel times their room."""
    monkeypatch.setattr(_norms, "_UNFOLDED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    term, seen, unfolded = windows(), [], Windows.unfolded
    monkeypatch.setattr(Windows, "unfolded", lambda self: seen.append(self.n) or unfolded(self))
    for method in term.methods():
        if method.name.endswith(name):
            method.run()
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("power", [0, -6, -9, -10, -10.5, -11, -12, -15, -18, -19, -20, -22, -30, 12])
@pytest.mark.parametrize("ratio", [0, 6, 15])
def test_gram_norms_of_factors_whose_products_are_lost_in_float32(power, ratio):
    """Squares and products of small factors underflow, and a norm that is too small clips too little."""
    torch.manual_seed(0)
    g, x = torch.randn(4, 1, 16, 40) * 10 ** (power - ratio), torch.randn(4, 1, 16, 50) * 10.0 ** (power + ratio)
    g[1, :, 3:] = 0  # padding
    x[2, :, :5] = 0
    g[3] = 0
    term = Outer(g, x, torch.Size((40, 50)))
    (gram,) = [method for method in term.methods() if method.name.startswith("Gram")]
    found, exact = gram.run()[0].sqrt(), term.double().dense().flatten(1).norm(dim=1)
    assert (found >= exact * (1 - 1e-6)).all()
    assert (found <= exact * (1 + 1e-4)).all()
    assert found[3] == 0


@pytest.mark.parametrize(("of_x", "of_g"), [(1e-24, 1e18), (1e-24, 1.0), (1e-12, 1e-12), (1e-19, 1e10), (1e-30, 1e-3)])
def test_gram_norms_of_convolutions_whose_products_are_lost_in_float32(of_x, of_g):
    term = windows(size=6)
    x, g = (term.x * of_x).float(), (term.g * of_g).float()
    x[2] = 0
    term = Windows(x, g, term.geometry, term.sides)
    exact = term.unfolded().double().dense().flatten(1).norm(dim=1)
    for method in term.methods():
        if method.name.startswith("Gram"):
            found = method.run()[0].sqrt()
            assert (found >= exact * (1 - 1e-6)).all(), method.name
            assert (found <= exact * (1 + 1e-4)).all(), method.name


OWNERS = {
    "as-many-each": [0, 0, 0, 1, 1, 1],
    "in-any-order": [1, 0, 1, 0, 0, 1],
    "not-as-many": [1, 0, 0, 0, 2, 0],
    "nobodys": [1, -1, 0, 0, -1, 1],
    "none-for-one": [2, 2, 0, 0, 2, 0],
    "nobodys-at-all": [-1] * 6,
    "one-has-most": [0, 1, 2, 3, 4, 4],
}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_several_images_of_one_example_are_added_up_by_every_method(name, owner):
    one = windows(**CONVOLUTIONS[name])
    x, g = (torch.cat([t, torch.randn_like(t)]) for t in (one.x, one.g))
    rows, of = Windows(x, g, one.geometry, one.sides, one.mode), torch.tensor(OWNERS[owner])
    n = max(2, int(of.max()) + 1)
    wanted = torch.zeros(n, *one.shape, dtype=torch.float64)
    for row, gradient in zip(OWNERS[owner], rows.unfolded().dense(), strict=True):
        if row >= 0:
            wanted[row] += gradient
    term, w = rows.regrouped(of, n), torch.linspace(0.5, -2, n, dtype=torch.float64)
    some = torch.arange(n) > 0
    assert isinstance(term, Windows) == (one.x.dim() < 5 and owner not in ("nobodys-at-all",))
    for method in term.methods():
        l2, kept = method.run()
        reference.assert_close_report(l2, wanted.flatten(1).square().sum(1), 1e-12, f"norms by {method.name}")
        reference.assert_close_report(kept.dense(), wanted, 1e-12, f"gradients after {method.name}")
        total = torch.tensordot(w, wanted, 1)
        reference.assert_close_report(kept.weighted_sum(w), total, 1e-12, f"sum after {method.name}")
        reference.assert_close_report(kept.select(some).dense(), wanted[1:], 1e-12, f"some after {method.name}")
    assert (term.magnitude_bound() >= term.magnitude() * (1 - 1e-12)).all()
    assert (term.magnitude() >= wanted.flatten(1).norm(dim=1) * (1 - 1e-12)).all()


def test_the_model_knows_that_every_kernel_offset_reads_the_factors():
    """Large kernels over few channels: offsets need no more products than other ways, and are several times slower."""
    geometry = Geometry(torch.Size((16, 1, 8, 8)), (2, 2), (1, 1), 1)
    term = Windows(torch.randn(64, 1, 28, 28), torch.randn(64, 16, 14, 14), geometry, [(3, 3)] * 2)
    estimates = {way.method.name: way.method.seconds(term.g.device) for way in term._ways()}
    slowest = sorted(estimates, key=estimates.get)[-2:]
    assert slowest == ["per-example gradients, kernel offsets", "per-example gradients, products by kernel offset"]


def test_the_methods_are_those_that_the_documentation_names():
    every = outer(), windows(), windows(size=3, c=64, o=64), windows(c=4, o=4, groups=4)
    found = {method.name for term in every for method in term.methods()}
    assert found == {
        "Gram matrices of the positions", "per-example gradients, kept", "per-example gradients",
        "Gram matrices of the pixels", "Gram matrices of the windows", "per-example gradients, kernel offsets",
        "per-example gradients, unfolded", "per-example gradients, kernel rows",
        "per-example gradients, one by one", "per-example gradients, examples as groups",
        "per-example gradients, products by kernel offset",
    }  # fmt: skip


class Timed:
    """A term whose methods take as long as they say."""

    n, dtype, device, grams = 2, torch.float64, torch.device("cpu"), None

    def __init__(self, seconds, held=(1, 1), estimated=(1e9, 1e9)):
        self.seconds, self.held, self.estimated, self.runs = seconds, held, estimated, []

    def form(self):
        return ("timed",)

    def methods(self):
        return [
            Method(name, lambda name=name: (self.runs.append(name), self), products, held=held)
            for name, products, held in zip("ab", self.estimated, self.held, strict=True)
        ]

    def weighted_sum(self, w):
        pass


def pretend(monkeypatch, seconds):
    """Let methods take these seconds, by their names."""
    monkeypatch.setattr(choosing, "_timed", lambda method, *_, **__: choosing.Timed(seconds(method.name), 0.0, False))


def test_what_was_measured_to_be_fastest_is_taken_and_remembered(monkeypatch):
    term = Timed((2.0, 1.0))
    pretend(monkeypatch, lambda name: dict(zip("ab", term.seconds, strict=True))[name])
    assert choose(term, Choice()).name == "b"
    term.seconds = (1.0, 2.0)
    assert choose(term, Choice()).name == "b"
    forget_choices()
    assert choose(term, Choice()).name == "a"


def test_the_model_decides_without_running_anything():
    term = Timed((0, 0), estimated=(2e9, 1e9))
    assert choose(term, Choice("model")).name == "b"
    assert not term.runs


def test_nothing_without_a_chance_is_tried_and_nothing_small_measured():
    term = Timed((0, 0), estimated=(1e9, 1e12))
    assert choose(term, Choice()).name == "a"
    small = Timed((0, 0), estimated=(100, 200))
    assert choose(small, Choice()).name == "a"
    assert not term.runs
    assert not small.runs


def test_what_would_hold_much_until_the_weights_are_known_is_left_out():
    term = Timed((0, 0), held=(10**7, 10), estimated=(1e9, 2e9))
    assert choose(term, Choice("model", sums=True)).name == "b"
    assert choose(term, Choice("model", sums=False)).name == "a"


@pytest.mark.parametrize(("room", "name"), [(1, "b"), (4.9, "b"), (5, "a"), (1e6, "a")])
def test_room_is_how_many_times_the_least_may_be_held(room, name):
    term = Timed((0, 0), held=(50, 10), estimated=(1e9, 2e9))
    assert choose(term, Choice("model", sums=True, room=room)).name == name


@pytest.mark.parametrize(
    ("arguments", "room"), [({}, 1.6), ({"room": 7}, 7.0), ({"max_memory": 10**9}, 1.0), ({"room": 1}, 1.0)]
)
def test_room_that_a_context_gives(arguments, room, monkeypatch):
    asked = []
    monkeypatch.setattr(terms.base, "settled", lambda term, choice: asked.append(choice) or settled(term, choice))
    model = extend(nn.Linear(3, 2))
    with perex(ClippedGrad(1.0), grad=False, **arguments):
        model(torch.ones(4, 5, 3)).square().sum((1, 2)).mean().backward()
    assert {choice.room for choice in asked} == {room}


def test_plan_shows_what_is_taken_with_room(monkeypatch):
    pretend(monkeypatch, lambda name: 0.0 if "kept" in name else 1.0)
    monkeypatch.setattr(choosing, "_SHORT", 0.0)
    layer, x = nn.Linear(80, 70, bias=False), torch.randn(4, 9, 80)
    norms = [plan(layer, x, room=room)[0].norm for room in (1, 1e6)]
    assert norms[0] != norms[1] == "per-example gradients, kept"
    with pytest.raises(ConfigurationError, match=r"room must be a finite number, 1 or more, not 0\.5"):
        plan(layer, x, room=0.5)


def test_gradients_are_kept_where_there_is_room_and_it_is_faster(monkeypatch):
    """With room for them the sum comes from the gradients that gave the norms, and is the same."""
    pretend(monkeypatch, lambda name: 0.0 if "kept" in name else 1.0)
    monkeypatch.setattr(choosing, "_SHORT", 0.0)
    torch.manual_seed(0)
    model, x, found = extend(nn.Linear(80, 70)), torch.randn(4, 9, 80), []
    used = []
    sums = Formed.weighted_sum
    monkeypatch.setattr(Formed, "weighted_sum", lambda self, w: used.append(self) or sums(self, w))
    for room in (None, 100):
        clipping = ClippedGrad(1.0)
        with perex(clipping, grad=False, room=room):
            model(x).square().sum((1, 2)).mean().backward()
        found.append((clipping.norms, model.weight.clipped_sum))
        assert len(used) == (room is not None)
    for one, other in zip(*found, strict=True):
        reference.assert_close_report(one, other, 3e-5, "without and with room")  # norms are raised by either way's own


def test_a_method_for_which_there_is_no_memory_is_not_taken():
    def fails():
        raise torch.OutOfMemoryError("too much")

    found = choosing._timed(Method("none", fails), Timed(None), torch.ones(2), sums=True)
    assert found.norms == found.sum == float("inf")


def test_methods_that_form_the_same_sum_are_compared_by_their_norms(monkeypatch):
    """The time of the sum is the same, and its noise would hide the difference."""
    found = {"a": (1.0, 10.0, True), "b": (2.0, 8.0, True), "c": (9.5, 0.0, False)}
    monkeypatch.setattr(choosing, "_timed", lambda method, *_, **__: choosing.Timed(*found[method.name]))
    methods = [Method(name, lambda: None, 1e9) for name in found]
    assert choosing._measured(Timed(None), methods, Choice(sums=True)) == "a"
    found["c"] = 8.5, 0.0, False
    assert choosing._measured(Timed(None), methods, Choice(sums=True)) == "c"


def test_what_is_timed_is_told_apart(monkeypatch):
    """Norms, the sum after them, and whether that is the sum of what was there before."""
    clock = iter([0.0, 1.0, 3.0, 10.0, 10.5, 14.0, 20.0, 22.0, 23.0])
    monkeypatch.setattr(choosing, "_now", lambda device: next(clock))
    monkeypatch.setattr(choosing, "_LONG", 100.0)
    term, other = Timed(None), Timed(None)
    found = choosing._timed(Method("", lambda: (None, term)), term, torch.ones(2), sums=True)
    assert (found.norms, found.sum, found.of_factors) == (0.5, 1.0, True)
    clock = iter([0.0, 1.0, 3.0] * 3)
    found = choosing._timed(Method("", lambda: (None, other)), term, torch.ones(2), sums=False)
    assert (found.norms, found.sum, found.of_factors) == (1.0, 0.0, False)


@pytest.mark.parametrize("strategy", ["fastest", "", None])
def test_unknown_strategies(strategy):
    with pytest.raises(ConfigurationError, match="strategy must be one of"):
        perex(BatchGrad(), strategy=strategy)


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, groups=32), nn.ReLU(),
        nn.Conv2d(32, 64, 1), nn.Flatten(2), nn.Linear(25, 40), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 40, 3),
    )  # fmt: skip


def found(strategy, dtype=torch.float64):
    model, x = extend(cnn().to(dtype)), torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    with perex(ClippedGrad(0.1), BatchL2Grad(), BatchGrad(), strategy=strategy, grad=False):
        model(x).square().sum(1).mean().backward()
    return {
        f"{field} of {name}": getattr(p, field)
        for name, p in model.named_parameters()
        for field in ("clipped_sum", "batch_l2", "grad_batch")
    }


def test_strategies_agree_in_all_but_rounding():
    measured, modelled = found("measure"), found("model")
    for name, value in measured.items():
        reference.assert_close_report(value, modelled[name], 1e-10, name)


def test_the_model_gives_the_same_bits_again():
    first, second = found("model", torch.float32), found("model", torch.float32)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_plan_says_what_is_taken():
    x = torch.randn(6, 3, 12, 12)
    rows = {row.path: row.norm for row in plan(cnn(), x, strategy="model")}
    assert rows["10"] == "weight: product of the factors' norms; bias: per-example gradients"
    assert "Gram" in rows["7"] or "gradients" in rows["7"]
    assert rows["3"].startswith("weight: per-example gradients, ")


def test_plan_says_how_a_sum_is_formed_where_that_is_chosen_too(monkeypatch):
    model, x = nn.Conv2d(32, 64, 3, padding=1, bias=False), torch.randn(4, 32, 2, 2)
    kept = {of_windows._BY_PIXELS: ", then product with the windows", of_windows._UNFOLDED: ""}
    for norms, then in kept.items():
        monkeypatch.setattr(terms.base, "choose", lambda term, choice, norms=norms: Method(norms, None))
        monkeypatch.setattr(of_windows, "choose", lambda term, choice, methods: methods[-1])
        assert plan(model, x, strategy="model")[0].norm == norms + then


class Watch(Extension):
    """Notes which tensors are alive when a parameter is complete."""

    field = "watched"

    def __init__(self, references):
        self.references, self.alive = references, {}

    def compute(self, view):
        gc.collect()
        self.alive[view.name] = [reference() is not None for reference in self.references]


def test_inputs_are_freed_as_the_backward_goes():
    """Nothing holds a layer's input once its norms are there and its gradients take less room."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    inputs = []
    for layer in (model[2], model[4]):
        layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    watch = Watch(inputs)
    with perex(ClippedGrad(1.0), watch, grad=False, strategy="model"):
        loss = model(torch.randn(3, 100, 4)).square().sum((1, 2)).mean()
        loss.backward()
    assert watch.alive["0.weight"][1] is False


def test_two_joint_extensions_may_both_ask_at_the_end():
    torch.manual_seed(0)
    model, x = extend(nn.Linear(4, 3)), torch.randn(5, 7, 4)
    small, large = ClippedGrad(0.1), ClippedGrad(1e6)
    large.field = "other_sum"
    with perex(small, large, grad=False):
        model(x).square().sum((1, 2)).mean().backward()
    with perex(BatchGrad(), grad=False):
        model(x).square().sum((1, 2)).mean().backward()
    for p in model.parameters():
        torch.testing.assert_close(p.other_sum, p.grad_batch.sum(0))
        assert p.clipped_sum.norm() < p.other_sum.norm()


@pytest.mark.parametrize("size", [16, 32])
def test_float32_norms_of_convolutions_are_not_below_the_truth(size):
    """Images all of one value, whose long sums drift in float32, and ordinary ones."""
    for make in (torch.full_like, lambda t, _: torch.randn_like(t)):
        x, g = make(torch.empty(2, 8, size, size), 0.7), make(torch.empty(2, 8, size, size), 0.3)
        geometry = Geometry(torch.Size((8, 8, 3, 3)), (1, 1), (1, 1), 1)
        term = Windows(x, g, geometry, [(1, 1)] * 2)
        true = term.double().unfolded().dense().flatten(1).norm(dim=1)
        for method in term.methods():
            norms = method.run()[0].sqrt()
            assert (norms >= true * (1 - 1e-6)).all(), method.name
            assert (norms <= true * (1 + 1e-4)).all(), method.name


# ------------------------------------------------------------------------------------------------------ max_memory


class Tied(nn.Module):
    """An embedding that is the output layer too, a layer used twice, and a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.words, self.layer, self.norm = nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.gain, self.lstm = nn.Parameter(torch.rand(6)), nn.LSTM(6, 6, batch_first=True)

    def forward(self, ids):
        h = self.lstm(self.layer(self.layer(self.words(ids)).tanh()))[0]
        return self.norm(h) @ (self.words.weight * self.gain.exp()).T


def clipped(max_memory, *, steps=1, grad=False, model=None):
    torch.manual_seed(0)
    model = extend((model or Tied()).double())
    x = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(1))
    clipping = ClippedGrad(0.05)
    with perex(clipping, BatchL2Grad(), max_memory=max_memory, grad=grad):
        for _ in range(steps):
            model(x).square().sum((1, 2)).mean().backward()
    names = ("clipped_sum", "batch_l2", *(["grad"] if grad else []))
    return {f"{field} of {name}": getattr(p, field) for name, p in model.named_parameters() for field in names}


@pytest.mark.parametrize("max_memory", [0, 5000, 1e9])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_a_bound_on_memory_changes_no_result(max_memory, steps, grad):
    wanted = clipped(None, steps=steps, grad=grad)
    for name, value in clipped(max_memory, steps=steps, grad=grad).items():
        reference.assert_close_report(value, wanted[name], 1e-11, name)


def test_what_does_not_fit_is_freed_before_the_sums():
    """With nothing to be held, no input of a layer lives until the norms are known."""
    torch.manual_seed(0)
    model, inputs, seen = extend(nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9))), [], []
    model[2].register_forward_pre_hook(lambda module, args: inputs.append(args[0]) and None)

    class Spy(ClippedGrad):
        def finish(self, views):
            seen.extend(view.held() for view in views)
            return super().finish(views)

    for bound in (None, 0):
        seen.clear()
        with perex(Spy(1.0), grad=False, max_memory=bound):
            model(torch.randn(4, 9)).square().sum(1).mean().backward()
        assert (sum(seen) == 0) == (bound == 0)


class Unused(nn.Module):
    """A layer that the loss depends on, one that it does not, and one that is not called."""

    def __init__(self):
        super().__init__()
        self.used, self.cut, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = self.used(x)
        self.cut(h)
        return h


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_sums_of_a_second_pass_are_tensors_that_can_be_written_to(n, weight):
    """Also where no gradient arrives: an optimizer adds noise to them."""
    model, clipping = extend(Unused()), ClippedGrad(1.0)
    with perex(clipping, grad=False, loss_reduction="sum", max_memory=0):
        for _ in range(2):
            (weight * model(torch.randn(n, 3)).square().sum()).backward()
    for name, p in model.named_parameters():
        assert p.clipped_sum.any() == bool(n and weight and name.startswith("used"))
        p.clipped_sum.add_(1)


def backwards_of(model, x, bound):
    """How many times a step goes back through the last module, and whether all inputs were held until the norms."""
    calls, held = [], []
    model[-1].register_full_backward_pre_hook(lambda *_: calls.append(1) and None)

    class Spy(ClippedGrad):
        def finish(self, views):
            held.append(sum(view.held() for view in views))
            return super().finish(views)

    with perex(Spy(1.0), grad=False, max_memory=bound):
        model(x).square().sum(1).mean().backward()
    return len(calls), held[0]


def test_one_backward_where_all_fits_and_nothing_held_where_not():
    torch.manual_seed(0)
    model, x = extend(nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9))), torch.randn(4, 9)
    most = 4 * 2 * (4 * 9 * 2 + 4 * 9)  # for each layer input, upstream gradient, and gradients of the bias
    assert backwards_of(model, x, most) == (1, most)
    model = extend(nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9)))
    assert backwards_of(model, x, most - 1) == (2, 0)


def test_a_graph_whose_gradients_fit_is_not_kept():
    """What the first layers keep for the backward is gone when the last gradient arrives."""
    model = extend(nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9)))
    alive, outputs = [], []
    model[3].register_forward_hook(lambda module, args, out: outputs.append(out.grad_fn) and None)
    model[0].register_forward_hook(
        lambda module, args, out: out.register_hook(lambda g: alive.append(_has_saved(outputs[-1]))) and None
    )
    for bound in (1e9, 0):
        with perex(ClippedGrad(1.0), grad=False, max_memory=bound):
            loss = model(torch.randn(4, 9)).square().sum(1).mean()
            loss.backward()
    assert alive == [False, True, False]


def _has_saved(node):
    try:
        return node._saved_result is not None
    except RuntimeError:
        return False


def test_a_rule_that_holds_more_than_it_says():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.gain

    @register_rule(Scale)
    class Greedy(Rule):
        def terms(self, call, g):
            product = (g * call.x)[:, None, None]
            return {"gain": Outer(product, call.x.new_ones(4, 1, 1, 1), call.params["gain"].shape)}

        def most_held(self, sizes):
            return 1

    model = extend(nn.Sequential(Scale()))
    with (
        pytest.warns(MemoryBoundWarning, match=r"max_memory=4.*`0.gain`.*most_held"),
        perex(ClippedGrad(1.0), grad=False, max_memory=4),
    ):
        model(torch.randn(4, 3)).square().sum(1).mean().backward()


def test_sums_that_free_most_come_first(monkeypatch):
    """Else the peak of a step is between the sums: those of large weights beside the factors of all that follow."""
    asked, summed = {}, ParameterView.summed

    def noted(view, *args):
        asked[view.name] = 4 * view.param.numel() - view.held()
        return summed(view, *args)

    monkeypatch.setattr(ParameterView, "summed", noted)
    model = extend(nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 1, bias=False)))
    with perex(ClippedGrad(1.0), grad=False):
        model(torch.randn(8, 256)).sum(1).mean().backward()
    assert list(asked) == ["1.weight", "0.weight"]
    assert asked["1.weight"] < 0 < asked["0.weight"]
    asked.clear()
    model = extend(
        nn.Sequential(nn.Linear(4, 100, bias=False), nn.Linear(100, 100, bias=False))
    )  # the smaller one first
    with perex(ClippedGrad(1.0), grad=False):
        model(torch.randn(200, 4)).sum(1).mean().backward()
    assert list(asked) == ["1.weight", "0.weight"]


def test_a_second_pass_leaves_the_gradient_of_an_input_alone():
    torch.manual_seed(0)
    model, x = extend(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))), torch.randn(3, 4, requires_grad=True)
    grads = []
    for bound in (None, 0):
        x.grad = None
        with perex(ClippedGrad(1.0), max_memory=bound):
            model(x).square().sum(1).mean().backward()
        grads.append((x.grad.clone(), *(p.grad.clone() for p in model.parameters())))
        model.zero_grad()
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


def test_the_graph_is_gone_after_the_second_pass_unless_retained():
    model, x = extend(nn.Linear(4, 2)), torch.randn(3, 4)
    with perex(ClippedGrad(1.0), grad=False, max_memory=0):
        loss = model(x).square().sum(1).mean()
        loss.backward(retain_graph=True)
        first = model.weight.clipped_sum.clone()
        loss.backward()
        torch.testing.assert_close(model.weight.clipped_sum, 2 * first)
        with pytest.raises(RuntimeError):
            loss.backward()


@pytest.mark.parametrize("bound", [-1, float("inf"), float("nan"), "1GB", True])
def test_bounds_without_meaning(bound):
    with pytest.raises(ConfigurationError, match="max_memory must be a number of bytes"):
        perex(ClippedGrad(1.0), max_memory=bound)


def test_extensions_that_work_on_sums_are_refused_under_a_bound():
    class Total(Extension):
        field, joint = "total", True

        def finish(self, views):
            return {view.name: 2 * view.weighted_sum(torch.ones(view.n)) for view in views}

    with pytest.raises(ConfigurationError, match=r"Total\.finish.*late_sums"):
        perex(Total(), max_memory=0)


def test_what_is_computed_from_a_sum_that_is_not_there_yet_is_an_error():
    class Doubled(Extension):
        field, joint, late_sums = "doubled", True, True

        def finish(self, views):
            return {view.name: 2 * view.weighted_sum(torch.ones(view.n)) for view in views}

    model = extend(nn.Linear(4, 2))
    for bound in (1e9, 0):
        with perex(Doubled(), max_memory=bound):
            loss = model(torch.randn(3, 4)).square().sum(1).mean()
            if bound:
                loss.backward()
                continue
            with pytest.raises(ExtensionError, match=r"Doubled\.finish returned for `weight`.*onto"):
                loss.backward()


def test_a_sum_that_is_not_there_yet_is_for_nothing_but_its_field():
    class NormOfSum(Extension):
        field, joint, late_sums = "norm_of_sum", True, True
        fields = True

        def finish(self, views):
            self.norm = torch.stack([view.weighted_sum(torch.ones(view.n)).norm() for view in views]).norm()
            return {view.name: view.weighted_sum(torch.ones(view.n)) for view in views if self.fields}

    model, extension = extend(nn.Linear(4, 2)), NormOfSum()
    for extension.fields in (True, False):
        for bound, refused in ((1e9, nullcontext()), (0, pytest.raises(ExtensionError, match="return that alone"))):
            with perex(extension, max_memory=bound), refused:
                model(torch.randn(3, 4)).square().sum(1).mean().backward()
    assert extension.norm == 0  # what would have been taken for it


def test_gradients_that_are_gone_are_an_error():
    class Greedy(Extension):
        field, joint, late_sums = "greedy", True, True

        def finish(self, views):
            return {view.name: view.grad_batch() for view in views}

    model = extend(nn.Linear(4, 2))
    with (
        pytest.raises(ExtensionError, match=r"`grad_batch` of .* too late.*max_memory.*in `compute`"),
        perex(Greedy(), max_memory=0),
    ):
        model(torch.randn(3, 4)).square().sum(1).mean().backward()


@pytest.mark.parametrize("what", ["grad_batch", "batch_dot", "weighted_sum"])
def test_asking_at_the_end_without_having_said_so_is_an_error(what):
    """Gradients are gone by then; zeros would be wrong without a word."""

    class Late(Extension):
        field = "late"

        def finish(self, views):
            args = (torch.ones(views[0].n),) if what == "weighted_sum" else ()
            return {view.name: getattr(view, what)(*args) for view in views}

    model, x = extend(nn.Linear(4, 2)), torch.randn(3, 4)
    with (
        pytest.raises(ExtensionError, match=rf"`{what}` of `weight` was asked for too late.*joint = True"),
        perex(Late()),
    ):
        model(x).square().sum(1).mean().backward()
    Late.joint = True
    with perex(Late()):
        model(x).square().sum(1).mean().backward()
    assert model.weight.late.any()


def test_nothing_but_the_graph_keeps_the_tensors_of_a_forward():
    """No cycle of the library's own holds them until a garbage collection."""
    model = extend(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    gc.collect()
    gc.disable()
    try:
        references = []
        model.linear1.register_forward_hook(lambda module, args, out: references.append(weakref.ref(out)) and None)
        with perex(ClippedGrad(1.0), grad=False):
            model(torch.randn(5, 3, 8)).square().sum((1, 2)).mean().backward()
        with perex(BatchGrad(), grad=False):
            loss = model(torch.randn(5, 3, 8)).square().sum((1, 2)).mean()
        del loss
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(("x", "g"), [(0.7, 0.3), (1.1, 0.77), (0.123, 0.456), (0.1, 0.1), (1.7, 3.3)])
def test_float32_norms_of_long_constant_rows_are_not_below_the_truth(x, g):
    """Sums over thousands of like products drift, and all in one direction."""
    term = Outer(torch.full((1, 1, 2, 4096), g), torch.full((1, 1, 2, 2048), x), torch.Size((4096, 2048)))
    true = term.double().dense().flatten(1).norm(dim=1)
    for method in term.methods():
        norms = method.run()[0].sqrt()
        assert (norms >= true * (1 - 1e-6)).all(), method.name
        assert (norms <= true * (1 + 1e-4)).all(), method.name


def test_sums_of_what_cancels_are_in_float64_after_a_second_pass_too():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 64) + 1e-6 * torch.randn(1, 32, 64)
    g = torch.tensor([1.0, -1.0]).repeat(16).view(1, -1, 1) * torch.randn(1, 1, 64) + 1e-6 * torch.randn(1, 32, 64)
    layer = extend(nn.Linear(64, 64, bias=False))
    sums = []
    for bound in (None, 0):
        with perex(ClippedGrad(1e-3), grad=False, max_memory=bound):
            (layer(x) * g).sum().backward()
        sums.append(layer.weight.clipped_sum.double())
        layer.weight.clipped_sum = None
    assert sums[1].norm() <= 1e-3 * (1 + 1e-6)
    reference.assert_close_report(sums[1], sums[0], 1e-6, "clipped_sum")


def test_a_graph_that_was_kept_for_a_second_pass_in_vain_is_gone():
    model, x = extend(nn.Linear(4, 2)), torch.randn(3, 4)
    with perex(ClippedGrad(1.0), grad=False, max_memory=1e9):
        loss = model(x).square().sum(1).mean()
        loss.backward()
        with pytest.raises(LossError, match="earlier backward"):
            loss.backward()


def test_batches_of_nearby_sizes_are_measured_once(monkeypatch):
    """Poisson batches have another size in every step."""
    measured = []
    whole = choosing._measured
    monkeypatch.setattr(choosing, "_measured", lambda *a: measured.append(1) or whole(*a))
    forget_choices()
    for n in range(950, 1050, 7):
        choose(Outer(torch.randn(n, 1, 8, 96), torch.randn(n, 1, 8, 96), torch.Size((96, 96))), Choice(sums=True))
    assert 1 <= len(measured) <= 2
    choose(Outer(torch.randn(400, 1, 8, 96), torch.randn(400, 1, 8, 96), torch.Size((96, 96))), Choice(sums=True))
    assert len(measured) <= 3


def test_a_choice_among_other_methods_is_made_anew(monkeypatch):
    """What fits into memory may differ between sizes of one form: here `a` is fastest, and then takes too much."""

    class Three(Timed):
        def methods(self):
            return [Method(name, lambda: (None, self), 1e9, held=self.held["abc".index(name)]) for name in "abc"]

    pretend(monkeypatch, "abc".index)
    assert choose(Three(None, held=(1, 1, 1)), Choice(sums=True)).name == "a"
    assert choose(Three(None, held=(10, 1, 1)), Choice(sums=True)).name == "b"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_one_pixel_are_no_channels_that_come_last(dtype):
    """Their strides may be those of either, of which torch's own gradient of a weight refuses one."""
    x, g = torch.randn(3, 8, 1, 1, dtype=dtype), torch.randn(3, 8, 1, 1, dtype=dtype)
    other = x.as_strided(x.shape, (8, 1, 8, 8))
    geometry = Geometry(torch.Size((8, 8, 3, 3)), (1, 1), (1, 1), 1)
    for form in (examples_as_groups, one_by_one):
        torch.testing.assert_close(form(other, g, geometry, (1, 1)), form(x, g, geometry, (1, 1)))
