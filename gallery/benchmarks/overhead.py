"""What the machinery costs by itself, and the least that clipped sums and per-example gradients can cost.

The machinery is following the forward, taps, the walk of the graph, hooks, and what rules form at once (gradients of
biases and norm layers), without norms, gradients of weights or sums. It is measured with an extension that asks for
nothing, as a ratio to the plain step, with ``p.grad`` computed in both. Beside it stands what hooks and a function
mode cost that do nothing, without which Python cannot see a forward. The least that per-example gradients can cost is
taken to be a forward, the gradients of the layers' outputs, and one batched product for each layer, written by hand
for networks of linear layers and convolutions.

The least that a clipped sum can cost by the methods that are known here is taken to be a step without gradients of
parameters, and for each parameter its fastest method for the norms and the weighted sum after it, run again and again
on the same tensors by itself. What is more than that in a real step is Python, gradients of biases and norm layers, and
tensors that have left the caches. Writes ``overhead.json`` and tables in ``docs/performance.rst``::

    python gallery/benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import measure
import report
import torch
import torch.nn.functional as F
from models import SUITE
from systems import OursClipped, OursRows, Problem, System
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from perexample import Extension, ParameterView, RecordedModel, RecordedStep, extend, perex
from perexample._engine.state import listening
from perexample.methods import ROOM, Method
from perexample.terms import Term, combine
from perexample.terms.placed import merged

BY_HAND = ("mlp", "seed_cnn", "vgg11")  # linear layers and convolutions, and nothing else with parameters


class Nothing(Extension):
    """Asks for nothing."""

    field = "nothing"

    def compute(self, view: ParameterView) -> None:
        """Nothing."""


class Machinery(System):
    """The plain step in a context that asks for nothing."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        extend(self.model)
        self.asked = Nothing()

    def step(self) -> None:
        self.zero()
        with perex(self.asked):
            self.losses().mean().backward()

    def gradients(self) -> dict[str, Tensor]:
        return self.left()


class MachineryModel(Machinery):
    """The same with a recorded model."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.recorded = RecordedModel(self.model, self.x, extensions=self.asked, grad=True)

    def losses(self) -> Tensor:
        return self.problem.case.losses(self.recorded(self.x), self.y)


class MachineryStep(Machinery):
    """The same by a recorded step."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)

        def losses(x: Tensor, y: Tensor) -> Tensor:
            return problem.case.losses(self.model(x), y)

        self.recorded = RecordedStep(
            self.model, losses, self.x, self.y, extensions=self.asked, grad=True, loss_reduction="mean"
        )

    def step(self) -> None:
        self.zero()
        self.recorded(self.x, self.y)


class Through(TorchFunctionMode):
    """Lets everything pass."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The function itself."""
        return func(*args, **(kwargs or {}))


class EmptyHooks(System):
    """The plain step with hooks on modules and outputs, and a function mode, that do nothing."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        for module in self.model.modules():
            module.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
            module.register_forward_hook(_hooked, with_kwargs=True)

    def losses(self) -> Tensor:
        with Through():
            return super().losses()


def _hooked(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    for t in output if isinstance(output, tuple) else (output,):
        if module._parameters and isinstance(t, Tensor) and t.requires_grad:
            t.register_hook(lambda g: None)


class NoParameters(System):
    """The step of a model whose parameters are frozen, but for what lets gradients go back all the way.

    That is the bias of the first module, or embeddings, or else the input.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.model.requires_grad_(False)
        first = next(
            module for module in self.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
        )
        if isinstance(first, nn.Embedding):
            first.requires_grad_(True)
        elif first.bias is not None:
            first.bias.requires_grad_(True)
        else:
            self.x = self.x.clone().requires_grad_()

    def zero(self) -> None:
        super().zero()
        self.x.grad = None


def least_seconds(problem: Problem, repeats: int) -> dict[str, float]:
    """Seconds of norms and sums of all parameters, by the fastest method for each.

    Returns:
        Of those that hold little memory, as `ClippedGrad` takes them, and of all.
    """
    terms: dict[int, list[Term]] = {}

    def listen(tap: Any, rule: Any, found: dict[str, Term]) -> None:
        for name, term in found.items():
            terms.setdefault(id(tap.params[name]), []).append(term)

    system = OursClipped(problem)
    with listening(listen):
        system.step()
    total = {"little memory": 0.0, "any memory": 0.0}
    for parts in tqdm(list(terms.values()), desc="parameters", leave=False, disable=None):
        term = combine(merged(parts))
        methods = term.methods()
        little = [m for m in methods if m.held <= ROOM * min(m.held for m in methods)]
        seconds = {m.name: seconds_of(term, m, repeats) for some in (methods, little) for m in likely(some)}
        total["any memory"] += min(seconds.values())
        total["little memory"] += min(seconds[m.name] for m in likely(little))
    return total


def likely(methods: list[Method]) -> list[Method]:
    """Those that are worth trying."""
    seconds = [m.seconds(torch.device("cpu")) for m in methods]
    return [m for m, estimate in zip(methods, seconds, strict=True) if estimate <= 6 * min(seconds)]


def seconds_of(term: Term, method: Method, repeats: int) -> float:
    """Median seconds of the norms by a method, and of the sum after them."""
    w = torch.ones(term.n, dtype=term.dtype)

    def both() -> None:
        method.run()[1].weighted_sum(w)

    with torch.no_grad():
        both()
        return statistics.median(measure.seconds_of(both, "cpu") for _ in range(repeats))


class OneProduct(System):
    """Per-example gradients of linear layers and convolutions, one batched product for each."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self.rows: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(
                    lambda module, args, output, name=name: self.calls.append((name, module, args[0].detach(), output))
                )

    def step(self) -> None:
        self.zero()
        self.rows, self.calls = {}, []
        gradients = torch.autograd.grad(self.losses().sum(), [output for *_, output in self.calls])
        for (name, module, x, _), g in zip(self.calls, gradients, strict=True):
            if isinstance(module, nn.Conv2d):
                g, x = g.flatten(2), windows(module, x)
                rows, bias = torch.bmm(g, x.mT), g.sum(2)
            else:
                rows, bias = g[:, :, None] * x[:, None, :], g
            self.rows[f"{name}.weight"] = rows.view(len(x), *module.weight.shape)
            self.rows[f"{name}.bias"] = bias

    def grad_batch(self) -> dict[str, Tensor]:
        return self.rows


class RowsRecorded(OursRows):
    """This library's per-example gradients by a recorded step."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)

        def losses(x: Tensor, y: Tensor) -> Tensor:
            return problem.case.losses(self.model(x), y)

        self.recorded = RecordedStep(self.model, losses, self.x, self.y, extensions=self.asked)

    def step(self) -> None:
        self.zero()
        self.recorded(self.x, self.y)


def windows(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The unfolded input, ``[N, C K, L]``; faster than ``F.unfold``."""
    high, wide = module.padding
    x = F.pad(x, (wide, wide, high, high))
    for axis, (size, step) in enumerate(zip(module.kernel_size, module.stride, strict=True), start=2):
        x = x.unfold(axis, size, step)
    return x.permute(0, 1, 4, 5, 2, 3).reshape(len(x), -1, x.shape[2] * x.shape[3])


KINDS = {
    "empty hooks": EmptyHooks, "machinery": Machinery, "recorded model": MachineryModel, "recorded step": MachineryStep,
    "no parameters": NoParameters, "ClippedGrad": OursClipped, "by hand": OneProduct, "BatchGrad": OursRows,
}  # fmt: skip


MACHINERY = ("empty hooks", "machinery", "recorded model", "recorded step")


def measured(options: argparse.Namespace) -> dict[str, dict]:
    """Quartiles of seconds and ratios of all models."""
    found = {}
    for model in tqdm(options.models, desc="models", disable=None):
        problem = Problem.of(SUITE[model], options.n, "cpu")
        names = [*MACHINERY, "no parameters", "ClippedGrad"]
        names += ["by hand", "BatchGrad"] if model in BY_HAND else []
        found[model] = measure.timings(problem, names, options.repeats, options.seconds, kinds=KINDS)
        failed = {name: entry["failed"] for name, entry in found[model].items() if "failed" in entry}
        if failed:
            raise RuntimeError(f"{model}: {failed}")
        found[model]["least"] = least_seconds(problem, options.repeats)
        if model in BY_HAND:
            rows = {"BatchGrad": OursRows(problem), "BatchGrad, recorded": RowsRecorded(problem)}
            pairs = measure.compare(rows, OneProduct(problem), options.repeats, options.seconds)
            found[model] |= {f"{name} / by hand": pairs[name] for name in rows}
    return found


def spread(entry: dict) -> str:
    """A ratio, with its quartiles."""
    low, middle, high = entry["ratio"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def floors(found: dict) -> list[str]:
    """Ratios that would be reached if nothing but the products took time."""
    step = found["no parameters"]
    plain = step["seconds"][1] / step["ratio"][1]
    return [f"{step['ratio'][1] + found['least'][kind] / plain:.2f}" for kind in ("little memory", "any memory")]


def rst(data: dict) -> list[str]:
    """The tables."""
    models = {name: data["models"][name] for name in SUITE if name in data["models"]}
    costs = [["model", *MACHINERY]]
    costs += [[SUITE[name].name, *(spread(found[kind]) for kind in MACHINERY)] for name, found in models.items()]
    beside = ("BatchGrad / by hand", "BatchGrad, recorded / by hand")
    rows = [["model", "BatchGrad / plain step", "by hand / plain step", *beside]]
    rows += [
        [SUITE[name].name, *(spread(found[key]) for key in ("BatchGrad", "by hand", *beside))]
        for name, found in models.items()
        if "by hand" in found
    ]
    least = [["model", "no gradients of parameters", "and the fastest methods", "with any memory", "ClippedGrad"]]
    least += [
        [SUITE[name].name, spread(found["no parameters"]), *floors(found), spread(found["ClippedGrad"])]
        for name, found in models.items()
        if "least" in found
    ]
    written = report.sentence("overhead.py", data["system"]).replace("`", "``")
    return [
        "A plain step with hooks and a function mode that do nothing, and the machinery, a plain step in a context",
        "that asks for nothing, as it is and recorded, as ratios to the plain step beside (medians, with quartiles):",
        "",
        *report.rst_table(costs), "",
        "The least that clipped sums can cost, as ratios to the plain step: a step without gradients of parameters;",
        "that and the fastest method for each parameter, of those that hold little memory or of all; and ClippedGrad:",
        "", *report.rst_table(least), "",
        "Per-example gradients, beside one batched product for each layer written by hand:", "",
        *report.rst_table(rows), "", written,
    ]  # fmt: skip


def tables(data: dict, options: argparse.Namespace) -> None:
    """Write them."""
    report.put(report.PAGE, "overhead", rst(data) if data.get("models") else [report.NOT_YET], options.out)


if __name__ == "__main__":
    measure.script("overhead", __doc__, list(SUITE), measured, rst, tables)
