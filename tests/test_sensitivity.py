"""The promise of `ClippedGrad`, on random models and values: one example more or less changes all sums by at most C.

``||S(D) - S(D')|| <= C (1 + tau) + B C eps`` where C is what `sensitivity` reports, ``tau`` is 1e-6 in float32 and
1e-12 in float64, and ``B C eps`` is left for adding up B examples in another order. Replacing an example is removing
one and adding one: ``2 C (1 + tau) + B C eps``. What an example adds when it is alone has no such term:
``||S({n})|| <= C (1 + tau)``.

The bound is one on what the library does. Where torch itself computes another gradient for an example that stays, as
its kernels round otherwise for batches of another size and the model magnifies that, so much is allowed, if it is seen
with autograd alone, and in at most 1% of the cases.

Under bfloat16 autocast an example alone still adds at most ``C (1 + 1e-6)``, since norms, factors and sums are those of
the same rounded factors, in float32. But the gradients of the others may be rounded otherwise in a batch of another
size: what is left for them is ``B C eps`` with the ``eps`` of bfloat16, 2^-7. It is a bound for the shallow and small
models here, not for all models, since a model can turn a rounding error into any change of a gradient. Measured over
500 cases: 1.000003 C where nothing divides by the size of the batch before bfloat16 rounds, 1.0057 C where a mean does.

``PEREX_CASES=20000 pytest tests/test_sensitivity.py -m slow`` runs more.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from audit import save_scores
from grammar import Case, Example, Leaf, Net, Residual, Sizes, cases
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perexample import NonFiniteExampleWarning, extend, perex, terms
from perexample.extensions import ClippedGrad

ORDINARY, NIGHTLY = 200, int(os.environ.get("PEREX_CASES", "2000"))
TAU = {torch.float32: 1e-6, torch.float64: 1e-12}
SCORES: dict[str, float] = {"cases": 0, "excused": 0, "worst_float32": 0.0, "worst_float64": 0.0, "worst_bf16": 0.0}
Sums = tuple[Tensor, float]  # all clipped sums in one vector, and the sensitivity

# Faults that these tests found: what is marked with one fails until it is mended.


# --------------------------------------------------------------------------------------------------------- ways to clip

CLIPS: dict[str, Any] = {
    "flat": "flat",
    "automatic": "automatic",
    "global": "global",
    "inverse": lambda norms: 1 / (1 + norms),
    "too-large": lambda norms: torch.full_like(norms, 1e9),
    "not-finite": lambda norms: norms.log(),  # negative, and -inf for a norm of 0
}
GROUPS: dict[str, tuple[Any, Callable[[str], str]]] = {
    "all": ("all", lambda name: "all"),
    "per-parameter": ("per-parameter", lambda name: name),
    "per-module": ("per-module", lambda name: name.rpartition(".")[0]),
    "mapping": ({"layers": "body", "head": "head"}, lambda name: name.partition(".")[0]),
}


def _gram(term: Any, choice: Any) -> Any:
    """Norms from Gram matrices wherever there are any, which these models are too small for."""
    methods = term.methods()
    return next((method for method in methods if "Gram" in method.name), methods[-1]).run()


METHODS: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "measured": ({}, nullcontext),
    "model": ({"strategy": "model"}, nullcontext),
    "second backward": ({"max_memory": 0}, nullcontext),
    "roomy": ({"room": 1e6, "strategy": "model"}, nullcontext),
    "Gram": ({}, lambda: mock.patch.object(terms.base, "settled", _gram)),
}


@dataclass(frozen=True)
class Way:
    """How sums are clipped and computed; the names are keys of `CLIPS`, `GROUPS` and `METHODS`."""

    bound: float
    clip: str
    groups: str
    method: str
    reduction: str

    def sensitivity(self, model: nn.Module) -> float:
        """What the object must report."""
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return self.bound * math.sqrt(len(set(map(GROUPS[self.groups][1], names))))


@dataclass(frozen=True)
class Setting:
    """In what is computed."""

    dtype: torch.dtype
    low: bool = False  # bfloat16 autocast

    @property
    def eps(self) -> float:
        """Of the lowest precision."""
        return torch.finfo(torch.bfloat16 if self.low else self.dtype).eps

    @property
    def name(self) -> str:
        return "bf16" if self.low else str(self.dtype).removeprefix("torch.")

    def autocast(self) -> torch.autocast:
        """Context of the forward."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.low)


FLOAT32, FLOAT64, LOW = Setting(torch.float32), Setting(torch.float64), Setting(torch.float32, low=True)


def ways() -> st.SearchStrategy[Way]:
    return st.builds(
        Way,
        bound=st.sampled_from([1.0, 1e-3, 1e3]),
        clip=st.sampled_from([*["flat"] * 3, *CLIPS]),
        groups=st.sampled_from([*["all"] * 3, *GROUPS]),
        method=st.sampled_from(list(METHODS)),
        reduction=st.sampled_from(["mean", "sum"]),
    )


def clipped_sums(case: Case, model: nn.Module, batch: tuple[Tensor, ...], way: Way, setting: Setting) -> Sums:
    """All sums of one backward, and the sensitivity that goes with them."""
    clipping = ClippedGrad(way.bound, clip=CLIPS[way.clip], groups=GROUPS[way.groups][0])
    arguments, patched = METHODS[way.method]
    with warnings.catch_warnings(), patched():
        warnings.simplefilter("ignore", NonFiniteExampleWarning)
        with perex(clipping, grad=False, loss_reduction=way.reduction, **arguments):
            with setting.autocast():
                losses = case.losses(model, *batch)
            (losses.mean() if way.reduction == "mean" else losses.sum()).backward()
    sums = [p.clipped_sum.double().flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(sums), clipping.sensitivity()


# ------------------------------------------------------------------------------------------------------------ relations


def left_out(batch: tuple[Example, ...], position: int) -> tuple[Example, ...]:
    i = position % len(batch)
    return batch[:i] + batch[i + 1 :]


def zeroed(tensors: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    """The loss of an example weighs nothing."""
    weight = tensors[2].clone()
    weight[i] = 0.0
    return (*tensors[:2], weight, *tensors[3:])


def moved(case: Case, way: Way, setting: Setting, example: Example, places: list[tuple[int, int]]) -> float:
    """By how much of its norm the gradient of an example that stays changes as torch computes it.

    Kernels round otherwise for batches of another size, and a model may make anything of that: softmax of scores of
    1e60 picks one of several equal ones. Autograd alone is asked, with an ordinary example in all other places.
    """
    model = case.model(setting.dtype)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: list[dict[str, list[Tensor]]] = []
    for place, size in places:
        batch = [Example("normal", "all", 0)] * size
        batch[place] = example
        with setting.autocast():
            loss = case.losses(model, *case.tensors(tuple(batch), setting.dtype))[place]
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        found.append({})
        for name, gradient in zip(named, gradients, strict=True):
            found[-1].setdefault(GROUPS[way.groups][1](name), []).append(gradient.double().flatten())
    return max(_share(torch.cat(found[0][group]), torch.cat(found[1][group])) for group in found[0])


def _share(before: Tensor, after: Tensor) -> float:
    """Their distance by the norm of the larger, at most 1; squares may overflow."""
    scale = max(before.abs().max().item(), after.abs().max().item())
    if not 0 < scale < math.inf:
        return 0.0
    before, after = before / scale, after / scale
    return min(1.0, ((before - after).norm() / torch.minimum(before.norm(), after.norm()).clamp_min(1e-9)).item())


@dataclass
class Worst:
    """The largest ratios seen, of how many cases, and of how many neighbours the model itself is to blame."""

    ratio: float = 0.0
    alone: float = 0.0
    cases: int = 0
    excused: int = 0

    def examine(self, case: Case, way: Way, setting: Setting) -> None:
        """One case: each example alone, and a batch beside four neighbours of it."""
        dtype = setting.dtype
        model = extend(case.model(dtype))
        batch, others, i = case.batch, left_out(case.batch, case.position), case.position % len(case.batch)
        whole = case.tensors(batch, dtype)

        def sums(tensors: tuple[Tensor, ...]) -> Sums:
            return clipped_sums(case, model, tensors, way, setting)

        for example in (*batch, case.other):
            alone, bound = sums(case.tensors((example,), dtype))
            assert bound == pytest.approx(way.sensitivity(model), rel=1e-14)
            assert alone.isfinite().all(), f"alone: {example}"
            self.alone = max(self.alone, alone.norm().item() / bound)
            assert alone.norm() <= bound * (1 + TAU[dtype]), f"alone: {alone.norm() / bound} of {example}"

        total, bound = sums(whole)
        assert total.isfinite().all()
        neighbours = {
            "removed": (sums(case.tensors(others, dtype)), 1),
            "added": (sums(case.tensors((*batch, case.other), dtype)), 1),
            "zeroed out": (sums(zeroed(whole, i)), 1),
            "replaced": (sums(case.tensors((*batch[:i], case.other, *batch[i + 1 :]), dtype)), 2),
        }
        for relation, ((other, sensitivity), times) in neighbours.items():
            assert sensitivity == bound
            assert other.isfinite().all(), relation
            ratio = (total - other).norm().item() / (times * bound)
            allowed = 1 + TAU[dtype] + (len(batch) + 1) * setting.eps / times
            if ratio > allowed:
                change = self._change(case, way, setting, relation)
                assert ratio <= allowed + 2 * change / times, f"{relation}: {ratio}, {change} of it by the model"
                self.excused += 1
            else:
                self.ratio = max(self.ratio, ratio)
        self.cases += 1

    def _change(self, case: Case, way: Way, setting: Setting, relation: str) -> float:
        """What the examples that stay change by, all together; a clipped one by at most twice its share of C."""
        n, change = len(case.batch), 0.0
        i = case.position % n
        for j, example in enumerate(case.batch):
            if j != i or relation == "added":
                there = (j - (j > i), n - 1) if relation == "removed" else (j, n + (relation == "added"))
                change += moved(case, way, setting, example, [(j, n), there])
        return change


def run(count: int, number: int, setting: Setting) -> Worst:
    """Examine this many cases, the same in each run."""
    worst = Worst()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # cases are small, and take too long to be made smaller
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(("lstm",) if setting.low else ()), way=ways())  # torch has no such LSTM on every CPU
    def examined(case: Case, way: Way) -> None:
        worst.examine(case, way, setting)

    examined()
    name = f"worst_{setting.name}"
    SCORES[name] = max(SCORES[name], worst.ratio, worst.alone)
    SCORES["cases"] += worst.cases
    SCORES["excused"] += worst.excused
    save_scores("sensitivity", SCORES)
    return worst


def assert_tight(worst: Worst, count: int) -> None:
    """So many cases, and in some of them an example used up all that it may."""
    assert worst.cases >= count
    assert worst.ratio > 0.9999
    assert worst.alone > 0.9999
    assert worst.excused <= 0.01 * worst.cases


# ---------------------------------------------------------------------------------------------------------------- tests


SETTINGS = pytest.mark.parametrize("setting", [FLOAT32, FLOAT64], ids=["float32", "float64"])


@SETTINGS
def test_sensitivity(setting):
    assert_tight(run(ORDINARY // 2, 1, setting), ORDINARY // 2)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [FLOAT32, FLOAT64], ids=["float32", "float64"])
def test_sensitivity_of_many_models(setting):
    assert_tight(run(NIGHTLY // 2, 2, setting), NIGHTLY // 2)


def test_sensitivity_under_autocast():
    assert_tight(run(ORDINARY // 5, 3, LOW), ORDINARY // 5)


@pytest.mark.slow
def test_sensitivity_of_many_models_under_autocast():
    assert_tight(run(NIGHTLY // 4, 4, LOW), NIGHTLY // 4)


# --------------------------------------------------------------------------------------- faults that these tests found


@pytest.mark.parametrize(("value", "n", "clip"), [(1e37, 64, "flat"), (1e30, 4, lambda norms: 1e9 + 0 * norms)])
def test_a_huge_input_whose_gradient_is_zero(value, n, clip):
    """The example's norm is 0, so that it is no example that is not finite; it must add nothing."""
    torch.manual_seed(0)
    layer, x, weight = extend(nn.Linear(1, 3, bias=False)), torch.ones(n, 1), torch.ones(n)
    x[0], weight[0] = value, 0.0
    with perex(ClippedGrad(1.0, clip=clip), grad=False):
        (layer(x).tanh().sum(1) * weight).mean().backward()
    found = layer.weight.clipped_sum
    assert found.isfinite().all()
    assert found.norm() <= (n - 1) * (1 + 1e-6)


def test_positions_that_cancel_in_float64():
    """What is left is rounding, whose norm is known only where norm and sum are of the very same numbers."""
    torch.manual_seed(10)
    layer, x = extend(nn.Linear(2, 3).double()), torch.full((3, 8, 2), 1e30, dtype=torch.float64)
    with perex(ClippedGrad(1.0), grad=False):
        F.cross_entropy(layer(x).flatten(1), torch.tensor([21, 21, 21])).backward()
    assert layer.weight.clipped_sum.norm() <= 3 * (1 + 1e-12)  # 8.5 was found


def test_positions_that_cancel_in_a_larger_batch():
    """The same with a norm of 0 in a batch of three, and a sum of 5e13."""
    normal, huge = Example("normal", "all", 0), Example("1e30", "all", 100)
    case = Case(Residual(Leaf("lstm")), Sizes(5, 2), (normal, huge), normal, 0, "cross-entropy", 1.0, 0)
    Worst().examine(case, Way(1.0, "flat", "all", "measured", "mean"), FLOAT64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_example_of_many_equal_ones_under_autocast(reduction):
    """Rounding errors of equal examples add up: 1.2 C for 256, 2.9 C for 1024."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)))
    x = torch.randn(1, 16).expand(256, -1)

    def sums(x: Tensor) -> Tensor:
        with perex(ClippedGrad(1.0), grad=False, loss_reduction=reduction):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            losses = out.float().sin().sum(1)
            (losses.mean() if reduction == "mean" else losses.sum()).backward()
        return torch.cat([p.clipped_sum.double().flatten() for p in model.parameters()])

    assert (sums(x) - sums(x[1:])).norm() <= 1 + 1e-5


class Checking(TorchFunctionMode):
    """Refuses what torch does not check for an LSTM on a CPU, but reads and writes past the ends of tensors."""

    wrong = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") == "lstm" and args[0].shape[0] != args[1][0].shape[1]:
            self.wrong += 1
            raise ValueError("an input and states of different batches")
        return func(*args, **(kwargs or {}))


def test_a_frozen_lstm_is_never_run_on_states_of_another_batch():
    """It ends in a crash of the process, or in any numbers."""
    model = extend(Net(Leaf("lstm", "all"), Sizes(3, 4)))
    model.layers[0].requires_grad_(False)
    with Checking() as mode, perex(ClippedGrad(1.0), grad=False):
        model(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)).square().flatten(1).sum(1).mean().backward()
    assert mode.wrong == 0
