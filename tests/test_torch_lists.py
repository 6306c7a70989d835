"""All operations and modules of torch's own lists: exact, or refused as the tables below say.

Where a row of the result is that of the example alone, its gradients must be those of the example alone. Where it is
not, the call mixes examples, or gives no rows: then it must be refused, or the gradients must add up to those of a
plain backward, and none may change with another example. Slow; needs expecttest (extra ``test-torch``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from harness import Net
from torch import Tensor, nn

from perexample import PerExampleError, RecordedStep, extend, perex
from perexample.extensions import BatchGrad, ClippedGrad

pytest.importorskip("expecttest", reason="torch's own lists need expecttest (extra `test-torch`)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_lists
    from torch_lists import Module, Operation, Sample

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
N, RECORDED = 4, 2  # examples, batches
TOLERANCE = 1e-8
SMALL = 1e-4  # gradients below are zero but for rounding, as those of a norm by what it divides by

# Refused, although each row is that of its example, by the ways in which the operation is called.
REFUSED: dict[str, str] = {
    "broadcast_tensors": "each0 each1",  # of the shape of data already: rows of parameters alone
    "meshgrid.variadic_tensors": "x0",
    "repeat": "each",  # rows beside those that repeat nothing
    "nn.functional.pdist": "each",  # no pair
    "nn.functional.instance_norm": "alone each",  # writes statistics
    "to_sparse": "batch data each last",
    "masked.cumsum": "batch data",  # over the examples, all but one of which are masked
    "masked.cumprod": "batch data",
    "masked.logaddexp": "batch",
    # A result that does not depend on the data, as information about failures, or a matrix that is handed on.
    "cdist": "batch data p0 x0",
    "lu": "data out",
    "linalg.inv_ex": "data out",
    "linalg.lu_factor_ex": "data out",
    "linalg.solve_ex": "data",
    "linalg.solve_triangular": "data",
    "masked.norm": "axes batch data",
    "triangular_solve": "batch data out p0",
}
REFUSED_MODULES: dict[str, str] = {}
ON_THE_BATCH = ("batch", "axes", "p0", "x0", "data")  # ways that are gone with two samples; the first four recorded
OPERATIONS = {operation.name: operation for operation in torch_lists.operations()}


# --------------------------------------------------------------------------------------------------- comparison


def floats(output: Any) -> list[Tensor]:
    """The tensors of an output as dense real numbers."""
    found = [t if t.layout == torch.strided else t.to_dense() for t in reference.tensors(output)]
    found = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    return [t if t.is_floating_point() else t.double() for t in found]


def curved(rows: Tensor) -> Tensor:
    """One number for each row."""
    flat = rows.reshape(len(rows), -1)
    return (flat * torch.arange(1.0, flat.shape[1] + 1).mul(1.7).cos() + flat.square() / 2).sum(1)


class Case:
    """A model, inputs of N examples for several batches, and how their losses come of its outputs."""

    def __init__(self, make: Callable[[], nn.Module], batches: list[tuple], n: int = N) -> None:
        self.make, self.batches, self.n = make, batches, n
        self.model = make()
        self.axes = self._axes()

    def outputs(self, model: nn.Module, inputs: tuple) -> list[Tensor]:
        torch.manual_seed(0)
        return floats(model(*inputs))

    def _axes(self) -> list[int] | None:
        """Where the outputs hold the rows of the examples alone; ``None`` if they do not."""
        with torch.no_grad():
            together = self.outputs(self.model, self.batches[0])
            alone = [self.outputs(self.model, self.one(i)) for i in range(self.n)]
        if not together or any([t.dim() for t in out] != [t.dim() for t in together] for out in alone):
            return None
        axes = [self._axis(t, [out[k] for out in alone]) for k, t in enumerate(together)]
        return None if None in axes else axes

    def _axis(self, together: Tensor, alone: list[Tensor]) -> int | None:
        for axis in range(together.dim()):
            rows = together.split(1, axis)
            if len(rows) == self.n and all(_same(a, b) for a, b in zip(rows, alone, strict=True)):
                return axis
        return None

    def one(self, i: int) -> tuple:
        """The inputs of an example alone."""
        return reference.rebuilt(
            self.batches[0],
            [t[i : i + 1].clone() if self.has_rows(t) else t for t in reference.tensors(self.batches[0])],
        )

    def has_rows(self, t: Tensor) -> bool:
        return t.dim() > 0 and len(t) == self.n

    def losses(self, model: nn.Module, inputs: tuple) -> Tensor:
        """The losses of the examples; of what gives no rows one number."""
        outputs = self.outputs(model, inputs)
        if self.axes is None:
            return sum((t * torch.arange(t.numel()).mul(1.7).cos().view(t.shape)).sum() for t in outputs)
        return sum(curved(t.movedim(axis, 0)) for t, axis in zip(outputs, self.axes, strict=True))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of one number with respect to all parameters."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(grads, parameters, strict=True)]

    def fields(self, inputs: tuple) -> tuple[list[Tensor], list[Tensor]]:
        """What the library gives."""
        model = extend(self.make())
        with perex(BatchGrad(), ClippedGrad(1.0), grad=False, loss_reduction="sum"):
            self.losses(model, inputs).sum().backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        return [p.grad_batch for p in parameters], [p.clipped_sum for p in parameters]

    def outcome(self) -> str:
        """``"exact"``, ``"refused"`` or ``"mixed"``; empty if torch cannot do it either, or there is no gradient."""
        try:
            whole = self.gradients(self.losses(self.model, self.batches[0]).sum())
            rows = [self.gradients(self.losses(self.model, self.one(i)).sum()) for i in range(self.n)]
        except Exception:  # noqa: BLE001 - torch cannot do it either
            return ""
        known = [t for of_one in [whole, *rows] for t in of_one if t.numel()]
        if not known or not all(t.isfinite().all() and t.abs().max() < 1e8 for t in known):
            return ""
        wanted = [torch.stack(of_one) for of_one in zip(*rows, strict=True)]
        try:
            found, clipped = self.fields(self.batches[0])
        except PerExampleError as error:
            self.why = str(error)
            return "mixed" if self.axes is None else "refused"
        if self.axes is None:
            self.check_independence(found, whole)
            return "exact"
        assert_near(found, wanted)
        assert_near(clipped, reference.clipped_sum(dict(enumerate(wanted)), self.n, 1.0).values())
        return "exact"

    def check_independence(self, found: list[Tensor], whole: list[Tensor]) -> None:
        """Rows add up to the gradients of all, and do not change with other examples."""
        assert_near([rows.sum(0) for rows in found], whole)
        for j in range(self.n if all(isinstance(t, Tensor) for t in self.batches[0]) else 0):
            others = [i for i in range(self.n) if i != j]
            changed = tuple(t.clone() for t in self.batches[0])
            for t, other in zip(changed, self.batches[1], strict=True):
                if self.has_rows(t):
                    t[j] = other[j]
            assert_near([rows[others] for rows in self.fields(changed)[0]], [rows[others] for rows in found])

    def check_replays(self) -> None:
        """A recorded step gives for each batch what a usual one gives, or cannot be recorded."""
        model = extend(self.make())
        try:
            step = RecordedStep(model, lambda *x: self.losses(model, x), *self.batches[0], extensions=BatchGrad())
        except PerExampleError:
            return
        for batch in self.batches:
            try:
                wanted = self.fields(batch)[0]
            except PerExampleError:
                continue
            step(*batch)
            assert_near([p.grad_batch for p in model.parameters() if p.requires_grad], wanted)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


def assert_near(found: Any, wanted: Any) -> None:
    found, wanted = list(found), list(wanted)
    largest = max((t.abs().max().item() for t in wanted if t.numel()), default=0.0)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = max(b.abs().max().item() if b.numel() else 0.0, SMALL * largest, SMALL)
        assert not b.numel() or (a - b).abs().max() <= TOLERANCE * scale


# --------------------------------------------------------------------------------------------------- operations


def near_one(shape: Any) -> nn.Parameter:
    return nn.Parameter(1 - 0.04 * torch.rand(shape, generator=torch.Generator().manual_seed(5)))


def of_each(sample: Callable[[Tensor], Any], x: Tensor) -> Any:
    """A loop over the examples."""
    outputs = [floats(sample(row)) for row in x]
    return [torch.stack(column) for column in zip(*outputs, strict=True)]


def into(sample: Sample, x: Tensor) -> Any:
    """What the operation writes into tensors that are there."""
    with torch.no_grad():
        kept = reference.rebuilt(out := sample(x), [torch.empty_like(t) for t in reference.tensors(out)])
        sample(x, out=kept)
    return kept


def rows_of(samples: list[Sample], take: Callable[[Sample], Tensor]) -> list[tuple]:
    """Batches of what is taken from samples of other numbers."""
    rows = [take(sample).detach() for sample in samples]
    if any(row.shape != rows[0].shape for row in rows) or torch.equal(rows[0], rows[1]):
        rows = [rows[0] * (1 - 0.03 * k) for k in range(len(rows))]
    return [(torch.stack(rows[k * N : (k + 1) * N]),) for k in range(RECORDED)]


def ways(operation: Operation, samples: list[Sample]) -> Iterator[tuple[str, Callable, list[tuple], dict[str, Tensor]]]:
    """The ways in which an operation meets parameters and data: a name, the forward, batches and parameters."""
    one = samples[0]
    first, data = one.first.detach(), rows_of(samples, lambda s: s.first)
    gain, number, moved = {"w": near_one(first.shape)}, {"s": near_one(())}, one.behind_a_new_axis()
    yield "each", lambda m, x: of_each(lambda row: one(row * m.w), x), data, gain
    yield "batch", lambda m, x: one(x * m.w), data, gain
    if moved is not None:
        yield "axes", lambda m, x: moved(x * m.w), data, gain
    yield "last", lambda m, x: one((x * m.w).movedim(0, -1)), data, gain
    yield "data", lambda m, x: [t * m.s for t in floats(one(x))], data, number
    yield "alone", lambda m, x: [t * means(x, t.dim()) for t in floats(one(m.p * 1))], data, {"p": first}
    if operation.inplace is not None:
        written = Sample(operation.inplace, first, one.rest, one.args, one.kwargs, one.only)
        yield "inplace", lambda m, x: written(x * m.w), data, gain
    if operation.has_out:
        yield "out", lambda m, x: [t * m.s for t in floats(into(one, x))], data, number
    for key, t in list(one.floats().items())[:2]:
        beside = rows_of(samples, lambda s, key=key: s.argument(key))
        yield f"p{key}", lambda m, x, key=key: one.with_argument(key, m.p)(x), data, {"p": t}
        yield f"x{key}", lambda m, x, key=key: one.with_argument(key, x)(m.p), beside, {"p": first}
        yield f"each{key}", lambda m, x, key=key: of_each(one.with_argument(key, m.p), x), data, {"p": t}


def means(x: Tensor, axes: int) -> Tensor:
    """One number of each example, to be multiplied with what parameters gave."""
    return x.reshape(len(x), -1).mean(1).view(-1, *[1] * axes)


def case(function: Callable, batches: list[tuple], parts: dict[str, Tensor]) -> Case | None:
    """The model of a way; ``None`` if torch itself cannot go it."""
    try:
        return Case(lambda: Net(function, **{k: nn.Parameter(p.detach().clone()) for k, p in parts.items()}), batches)
    except Exception:  # noqa: BLE001 - whatever torch raises
        return None


def chosen(count: int, samples: list[Sample]) -> list[int]:
    """Some of the samples: the first of most axes, and the last."""
    most = max(range(count), key=lambda k: (samples[k].first.dim(), -k))
    return sorted({most, count - 1})


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    operation = OPERATIONS[name]
    drawn = [operation.samples(seed) for seed in range(N * RECORDED)]
    count, refused = min(map(len, drawn)), set()
    for nth, k in enumerate(chosen(count, drawn[0]) if count else []):
        for way, *given in ways(operation, [samples[k] for samples in drawn]):
            if nth and way not in ON_THE_BATCH:
                continue
            made = case(*given)
            outcome = "" if made is None else made.outcome()
            if outcome == "refused":
                refused.add(way)
                print(way, made.why)
            elif outcome == "exact" and made.axes is not None and not nth and way in ON_THE_BATCH[:4]:
                made.check_replays()
    assert refused == set(REFUSED.get(name, "").split())


class Gained(nn.Module):
    """A module behind a gain of its first number, with what it is given besides data."""

    def __init__(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.gain, self.kwargs = module.double(), near_one(()), kwargs

    def forward(self, x: Tensor, *inputs: Any) -> Any:
        return self.module(x * self.gain if x.is_floating_point() else x, *inputs, **self.kwargs)


def module_case(drawn: list[Module]) -> Case | None:
    """One of the ways in which torch's tests make a module; ``None`` for one without rows."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        return Gained(drawn[0].make(), drawn[0].kwargs).train(drawn[0].training)

    batches = [module.args for module in drawn]
    if not batches[0] or not isinstance(batches[0][0], Tensor) or batches[0][0].dim() < 2 or len(batches[0][0]) < 2:
        return None
    n = len(batches[0][0])
    if any(isinstance(t, Tensor) and t.shape == (n, n) for t in batches[0][1:]):
        return None  # it would be taken for a mask that all examples share
    try:
        return Case(make, batches, n)
    except Exception:  # noqa: BLE001 - whatever torch raises
        return None


@pytest.mark.parametrize("name", torch_lists.module_names())
def test_module(name):
    refused = set()
    for training in (True, False):
        drawn = [torch_lists.modules(name, seed, training) for seed in range(RECORDED)]
        count = min(map(len, drawn))
        for k in sorted({0, count // 2, count - 1}) if count else []:
            made = module_case([modules[k] for modules in drawn])
            outcome = "" if made is None else made.outcome()
            if outcome == "refused":
                refused.add("train" if training else "eval")
                print(training, k, made.why)
            elif outcome == "exact" and made.axes is not None:
                made.check_replays()
    assert refused == set(REFUSED_MODULES.get(name, "").split())


def test_the_tables_name_what_there_is():
    assert REFUSED.keys() <= OPERATIONS.keys()
    assert REFUSED_MODULES.keys() <= set(torch_lists.module_names())
