"""The systems that are compared: each makes the same clipped sums of the same model, loss and batch in its own way.

A system that cannot do a model raises while it is made or in its first step; the reason is recorded.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from models import Case
from torch import Tensor, nn

from perexample import RecordedModel, RecordedStep, extend, perex
from perexample._tape import Tape
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

BOUND = 1.0  # the norm that gradients are clipped to


class NotInstalledError(Exception):
    """A peer that is not there."""


@dataclass(frozen=True)
class Problem:
    """One model with one batch, the same for all systems."""

    case: Case
    model: nn.Module
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, case: Case, n: int | None = None, device: str = "cpu") -> Problem:
        """The case with N examples, by default its own number."""
        torch.manual_seed(0)
        model = case.make().to(device)
        x, y = case.batch(case.n if n is None else n)
        return cls(case, model, x.to(device), y.to(device))

    def double(self) -> Problem:
        """The same in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        return Problem(self.case, copy.deepcopy(self.model).double(), x, self.y)


class System:
    """The plain step, and the interface of all others.

    A step is zeroing, forward and backward with all that the system needs for its result, without an optimizer.

    Attributes:
        note: What was changed in the model so that the system can do it.
        own_peak: Peak memory in MiB where steps run in memory that was taken before.
    """

    note = ""
    own_peak: float | None = None

    def __init__(self, problem: Problem) -> None:
        self.problem, self.x, self.y = problem, problem.x, problem.y
        self.model = copy.deepcopy(problem.model).train()
        self.parameters = dict(self.model.named_parameters())

    def losses(self) -> Tensor:
        """The loss of each example."""
        return self.problem.case.losses(self.model(self.x), self.y)

    def zero(self) -> None:
        """Forget the results of the step before."""
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step."""
        self.zero()
        self.losses().mean().backward()

    def clipped(self) -> dict[str, Tensor] | None:
        """Clipped sums by the parameters' names in the plain model, if the system has made any."""
        return None

    def grad_batch(self) -> dict[str, Tensor] | None:
        """Per-example gradients, likewise."""
        return None

    def norms(self) -> Tensor | None:
        """Norms of the examples' gradients, likewise."""
        return None

    def gradients(self) -> dict[str, Tensor] | None:
        """``p.grad`` of the mean of the losses, likewise."""
        return None

    def left(self) -> dict[str, Tensor]:
        """What there is of it."""
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


def clip_and_sum(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the rows, each clipped to the bound over all parameters jointly."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()], 1).norm(dim=1)
    factors = (BOUND / norms).clamp(max=1.0)
    return {name: torch.einsum("n,n...->...", factors, g) for name, g in rows.items()}


class Loop(System):
    """A forward and backward for each example; what all others must agree with."""

    def zero(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.lengths: list[Tensor] = []

    def step(self) -> None:
        self.zero()
        self.sums = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.means = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for n in range(len(self.x)):
            loss = self.problem.case.losses(self.model(self.x[n : n + 1]), self.y[n : n + 1]).sum()
            grads = torch.autograd.grad(loss, list(self.parameters.values()))
            norm = torch.stack([g.norm() for g in grads]).norm()
            factor = (BOUND / norm).clamp(max=1.0)
            for total, mean, g in zip(self.sums.values(), self.means.values(), grads, strict=True):
                total.addcmul_(g, factor)
                mean.add_(g, alpha=1 / len(self.x))
            self.lengths.append(norm)

    def clipped(self) -> dict[str, Tensor]:
        return self.sums

    def gradients(self) -> dict[str, Tensor]:
        return self.means

    def norms(self) -> Tensor:
        return torch.stack(self.lengths)


class OursClipped(System):
    """This library's clipped sums."""

    extension: Callable[[], ClippedGrad | BatchGrad | BatchL2Grad] = functools.partial(ClippedGrad, BOUND)
    room: float | None = None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        extend(self.model)
        self.asked = type(self).extension()

    def zero(self) -> None:
        super().zero()
        if isinstance(self.asked, ClippedGrad):
            self.asked.zero_grad()
        for p in self.parameters.values():
            if hasattr(p, self.asked.field):
                delattr(p, self.asked.field)

    def step(self) -> None:
        self.zero()
        with perex(self.asked, grad=False, room=self.room):
            self.losses().mean().backward()

    def fields(self) -> dict[str, Tensor]:
        """What was asked for, of each parameter."""
        return {name: getattr(p, self.asked.field) for name, p in self.parameters.items()}

    def clipped(self) -> dict[str, Tensor] | None:
        return self.fields()

    def norms(self) -> Tensor | None:
        return self.asked.norms


@contextlib.contextmanager
def gpu_peak() -> Iterator[list[float]]:
    """Peak memory over what there was before, in MiB, as the only entry of the list when all is done."""
    found: list[float] = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    yield found
    torch.cuda.synchronize()
    found.append((torch.cuda.max_memory_allocated() - base) / 2**20)


class PlainRecorded(System):
    """The plain step, recorded as `RecordedStep` does it: a CUDA graph, or a tape."""

    compiled = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if not self.x.is_cuda:
            for _ in range(2):
                super().step()
            super().zero()
            tape = Tape()
            tape.record(self.once)
            if self.compiled:
                self.note = tape.program.fuse([], always=False) or ""
            self.replay = tape.program.replay
            return
        if self.compiled:
            raise NotImplementedError("on a CPU only")
        with gpu_peak() as peak:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    super().step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            super().zero()
            with torch.cuda.graph(graph):
                self.losses().mean().backward()
            self.replay = graph.replay
        self.own_peak = peak[0]

    def once(self) -> list[Tensor]:
        """The gradients."""
        return list(torch.autograd.grad(self.losses().mean(), list(self.parameters.values())))

    def zero(self) -> None:
        """Nothing: a replay overwrites, or makes new ones."""

    def step(self) -> None:
        self.replay()


class PlainCompiled(PlainRecorded):
    """The plain step, recorded, its operations fused by torch.compile where that is faster."""

    compiled = True


class OursRecorded(OursClipped):
    """This library's clipped sums by a recorded step."""

    compiled = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)

        def losses(x: Tensor, y: Tensor) -> Tensor:
            return problem.case.losses(self.model(x), y)

        with gpu_peak() if self.x.is_cuda else contextlib.nullcontext([None]) as peak:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                self.recorded = RecordedStep(
                    self.model, losses, self.x, self.y, extensions=self.asked, compiled=self.compiled
                )
            self.note = "; ".join(str(one.message) for one in told if "not compiled" in str(one.message))
        self.own_peak = peak[0]

    def step(self) -> None:
        self.zero()
        self.recorded(self.x, self.y)
        if self.recorded.repeated:
            raise RuntimeError("a step had to be run as usual")


class OursModel(OursClipped):
    """This library's clipped sums by an ordinary loop with a recorded model."""

    compiled = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.recorded = RecordedModel(self.model, self.x, extensions=self.asked, compiled=self.compiled)
        self.note = "; ".join(str(one.message) for one in told if "not compiled" in str(one.message))

    def losses(self) -> Tensor:
        return self.problem.case.losses(self.recorded(self.x), self.y)

    def step(self) -> None:
        super().step()
        if self.recorded.repeated:
            raise RuntimeError("a call had to be run as usual")


class OursCompiledModel(OursModel):
    """The same, its operations fused by torch.compile where that is faster."""

    compiled = True


class OursCompiled(OursRecorded):
    """The same, its operations fused by torch.compile where that is faster."""

    compiled = True


class OursRoomy(OursClipped):
    """The same where per-example gradients may be kept, however large, if that is faster."""

    room = 1e6


class OursRows(OursClipped):
    """This library's per-example gradients, not clipped."""

    extension = BatchGrad

    def clipped(self) -> None:
        return None

    def grad_batch(self) -> dict[str, Tensor]:
        return self.fields()

    def norms(self) -> None:
        return None


class OursNorms(OursClipped):
    """This library's norms alone."""

    extension = BatchL2Grad

    def clipped(self) -> None:
        return None

    def norms(self) -> Tensor:
        return torch.stack(list(self.fields().values())).sum(0).sqrt()


class LinearAttention(nn.Module):
    """Attention of batch-first inputs with a linear layer for each of query, key and value, as in Opacus' own."""

    batch_first = True

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.heads = original.num_heads
        self.qlinear, self.klinear, self.vlinear = original.qlinear, original.klinear, original.vlinear
        self.out_proj = original.out_proj

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: object) -> tuple[Tensor, None]:
        """The output, and no weights; there are no masks in the suite."""
        layers = (self.qlinear, self.klinear, self.vlinear)
        inputs = (query, key, value)
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f, x in zip(layers, inputs, strict=True))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


def fit_for_opacus(model: nn.Module) -> tuple[nn.Module, str]:
    """The model with layers replaced as Opacus wants it, and what was replaced.

    Its attention is wrong with ``batch_first=True`` in 1.6.0 (opacus#825), and gets another forward.
    """
    from opacus.layers import DPMultiheadAttention
    from opacus.validators import ModuleValidator

    if not ModuleValidator.validate(model):
        return model, ""
    before = {name: type(module) for name, module in model.named_modules()}
    model = ModuleValidator.fix(model)
    notes = []
    for name, module in list(model.named_modules()):
        if before.get(name, type(module)) is type(module):
            continue
        notes.append(f"{before[name].__name__} replaced by {type(module).__name__}")
        if isinstance(module, DPMultiheadAttention):
            notes[-1] += ", whose batch-first forward is corrected (opacus#825)"
            model.set_submodule(name, LinearAttention(module))
    return model, "; ".join(dict.fromkeys(notes))


class OpacusHooks(System):
    """Opacus: per-example gradients by hooks, clipped and summed by its optimizer; layers replaced where it says so."""

    options: ClassVar[dict[str, bool]] = {"force_functorch": False}

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        try:
            import opacus  # noqa: F401
        except ImportError as error:
            raise NotInstalledError("Opacus is not installed") from error
        self.model, self.note = fit_for_opacus(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.wrap(torch.optim.SGD(self.model.parameters(), lr=1.0))

    def settings(self) -> dict[str, object]:
        """Those of the optimizer."""
        size = len(self.x)
        return {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "expected_batch_size": size, "loss_reduction": "mean"}

    def wrap(self, sgd: torch.optim.Optimizer) -> None:
        """Wrap the model and the optimizer."""
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.model = GradSampleModule(self.model, batch_first=True, loss_reduction="mean", **self.options)
        self.optimizer = DPOptimizer(sgd, **self.settings())

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.zero()
        self.losses().mean().backward()
        self.optimizer.clip_and_accumulate()

    def clipped(self) -> dict[str, Tensor]:
        return self.by_name(lambda p: p.summed_grad)

    def by_name(self, value: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Under the plain names: query, key and value, which Opacus splits, are joined."""
        found: dict[str, list[Tensor]] = {}
        for name, p in self.parameters.items():
            for part in ("qlinear.", "klinear.", "vlinear."):
                name = name.replace(part, "in_proj_")
            found.setdefault(name, []).append(value(p))
        return {name: torch.cat(parts) for name, parts in found.items()}


class OpacusFunctorch(OpacusHooks):
    """Opacus: per-example gradients of every layer by functorch."""

    options: ClassVar[dict[str, bool]] = {"force_functorch": True}


class Criterion:
    """A loss of each example as Opacus wants it: an object with a reduction."""

    reduction = "mean"

    def __init__(self, losses: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.losses = losses

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return self.losses(output, y)


class OpacusGhost(OpacusHooks):
    """Opacus: norms without gradients where it has them, then a second backward of the weighted loss."""

    def wrap(self, sgd: torch.optim.Optimizer) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self.model = GradSampleModuleFastGradientClipping(
            self.model, batch_first=True, loss_reduction="mean", max_grad_norm=BOUND, use_ghost_clipping=True
        )
        self.optimizer = DPOptimizerFastGradientClipping(sgd, **self.settings())
        criterion = Criterion(self.problem.case.losses)
        self.criterion = DPLossFastGradientClipping(self.model, self.optimizer, criterion, "mean")

    def step(self) -> None:
        self.zero()
        self.criterion(self.model(self.x), self.y).backward()

    def clipped(self) -> dict[str, Tensor]:
        return self.by_name(lambda p: p.grad)

    def norms(self) -> Tensor:
        return self.model.per_sample_gradient_norms


class BackPack(System):
    """BackPACK: per-example gradients, then clipped and summed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        try:
            import backpack
            from backpack.extensions import BatchGrad as Rows
        except ImportError as error:
            raise NotInstalledError("BackPACK is not installed") from error
        self.context = lambda: backpack.backpack(Rows())
        backpack.extend(self.model)

    def zero(self) -> None:
        super().zero()
        self.sums: dict[str, Tensor] = {}
        for p in self.parameters.values():
            if hasattr(p, "grad_batch"):
                del p.grad_batch

    def step(self) -> None:
        self.zero()
        with self.context():
            self.losses().sum().backward()  # of a mean its gradients would be those of loss / N
        missing = [name for name, p in self.parameters.items() if not hasattr(p, "grad_batch")]
        if missing:
            kinds = {type(self.model.get_submodule(name.rpartition(".")[0])).__name__ for name in missing}
            raise NotImplementedError(f"no gradients of parameters in {', '.join(sorted(kinds))}")
        self.sums = clip_and_sum({name: p.grad_batch for name, p in self.parameters.items()})

    def clipped(self) -> dict[str, Tensor]:
        return self.sums

    def grad_batch(self) -> dict[str, Tensor]:
        return {name: p.grad_batch for name, p in self.parameters.items()}


class Vmap(System):
    """``torch.func``: ``vmap(grad(loss of one example))``, then clipped and summed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.values = {name: p.detach() for name, p in self.parameters.items()}
        self.rows_of = torch.func.vmap(torch.func.grad(self.loss), in_dims=(None, 0, 0))

    def loss(self, values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The loss of one example."""
        return self.problem.case.losses(torch.func.functional_call(self.model, values, x[None]), y[None])[0]

    def zero(self) -> None:
        self.rows: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def step(self) -> None:
        self.zero()
        self.rows = self.rows_of(self.values, self.x, self.y)
        self.sums = clip_and_sum(self.rows)

    def clipped(self) -> dict[str, Tensor]:
        return self.sums

    def grad_batch(self) -> dict[str, Tensor]:
        return self.rows


SYSTEMS: dict[str, type[System]] = {
    "plain": System,
    "plain, recorded": PlainRecorded,
    "plain, compiled": PlainCompiled,
    "ClippedGrad": OursClipped,
    "ClippedGrad, recorded model": OursModel,
    "ClippedGrad, compiled model": OursCompiledModel,
    "ClippedGrad, recorded": OursRecorded,
    "ClippedGrad, compiled": OursCompiled,
    "ClippedGrad, roomy": OursRoomy,
    "BatchL2Grad": OursNorms,
    "BatchGrad": OursRows,
    "Opacus hooks": OpacusHooks,
    "Opacus functorch": OpacusFunctorch,
    "Opacus ghost": OpacusGhost,
    "BackPACK": BackPack,
    "vmap": Vmap,
    "loop": Loop,
}


def difference(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """Relative L2 difference; what is tiny within the whole (a key's bias, whose gradient is zero) counts as such."""
    return ((found.to(wanted) - wanted).norm() / torch.maximum(wanted.norm(), 1e-4 * scale)).item()


def disagreement(system: System, reference: Loop) -> float:
    """The greatest difference from the loop over all results of both, in relative L2 norm."""
    worst, norms = 0.0, system.norms()
    if norms is not None:
        wanted = reference.norms()
        worst = difference(norms, wanted, wanted.norm())
    rows, sums = system.grad_batch(), system.clipped()
    for found, every in (
        (sums, reference.clipped()),
        (clip_and_sum(rows) if rows is not None else None, reference.clipped()),
        (system.gradients(), reference.gradients()),
    ):
        whole = torch.stack([wanted.norm() for wanted in every.values()]).norm()
        for name, wanted in every.items() if found is not None else ():
            worst = max(worst, difference(found[name].detach(), wanted, whole))
    return worst
