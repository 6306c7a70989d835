"""What a whole step of a private training costs: forward, backward, clipping, noise, and the step of the optimizer.

As a ratio to forward, backward and step of a training without privacy beside it, both with SGD at a learning rate of 0,
so that all systems see the same parameters for ever. Clipped sums are checked before, noise is not. Each system draws
its noise as it does by default, here in float64, by Opacus in float32. Writes ``training.json``, and tables in the
README and in ``docs/performance.rst``::

    python gallery/benchmarks/training.py
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import report
import torch
from models import SUITE
from systems import OpacusGhost, OpacusHooks, OursClipped, OursCompiledModel, OursModel, OursRecorded, Problem, System
from torch import nn
from tqdm import tqdm

from perexample import privatize

NOISE = 1.0


class Plain(System):
    """Without privacy."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def step(self) -> None:
        super().step()
        self.optimizer.step()


class Private:
    """A step of a private optimizer behind the sums of this library."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)  # type: ignore[call-arg]
        clipping: Any = self
        self.optimizer = privatize(
            torch.optim.SGD(clipping.model.parameters(), lr=0.0),
            clipping=clipping.asked,
            noise_multiplier=NOISE,
            expected_batch_size=len(problem.x),
        )

    def step(self) -> None:
        """Sums and noise."""
        super().step()  # type: ignore[misc]
        self.optimizer.step()


class Ours(Private, OursClipped):
    """This library, as it is."""


class OursByModel(Private, OursModel):
    """The same with a recorded model."""


class OursByCompiled(Private, OursCompiledModel):
    """The same, compiled."""


class OursByStep(Private, OursRecorded):
    """The same by a recorded step."""


class Hooks(OpacusHooks):
    """Opacus, per-example gradients by hooks."""

    def wrap(self, sgd: torch.optim.Optimizer) -> None:
        super().wrap(self.still(sgd))

    def still(self, sgd: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """An optimizer that leaves parameters where they are."""
        for group in sgd.param_groups:
            group["lr"] = 0.0
        return sgd

    def settings(self) -> dict[str, object]:
        return super().settings() | {"noise_multiplier": NOISE}

    def step(self) -> None:
        self.zero()
        self.losses().mean().backward()
        self.optimizer.step()


class Ghost(Hooks, OpacusGhost):
    """Opacus, ghost clipping."""

    def wrap(self, sgd: torch.optim.Optimizer) -> None:
        OpacusGhost.wrap(self, self.still(sgd))

    def step(self) -> None:
        OpacusGhost.step(self)
        self.sums = {id(p): p.grad for p in self.parameters.values()}
        self.optimizer.step()

    def clipped(self) -> dict[str, torch.Tensor]:
        def summed(p: nn.Parameter) -> torch.Tensor:
            return self.sums[id(p)]

        return self.by_name(summed)


KINDS = {
    "ClippedGrad": Ours,
    "recorded model": OursByModel,
    "compiled model": OursByCompiled,
    "recorded step": OursByStep,
    "Opacus hooks": Hooks,
    "Opacus ghost": Ghost,
}


def measured(options: argparse.Namespace) -> dict[str, dict]:
    """Quartiles of seconds and ratios of all models; why a system has none."""
    found: dict[str, dict] = {}
    for model in tqdm(options.models, desc="models", disable=None):
        problem = Problem.of(SUITE[model], options.n, "cpu")
        ready, failed = measure.make(problem, list(KINDS), KINDS)
        found[model] = measure.compare(ready, Plain(problem), options.repeats, options.seconds)
        found[model] |= {name: {"failed": why} for name, why in failed.items()}
    return found


def rows(data: dict) -> list[list[str]]:
    """The table."""
    models = {name: data["models"][name] for name in SUITE if name in data["models"]}
    kinds = [kind for kind in KINDS if any("ratio" in found.get(kind, {}) for found in models.values())]
    table = [["model", "plain, ms", *kinds]]
    for name, found in models.items():
        cells = [f"{found[kind]['ratio'][1]:.2f}" if "ratio" in found.get(kind, {}) else "no" for kind in kinds]
        first = found["ClippedGrad"]
        table.append([SUITE[name].name, f"{1e3 * first['seconds'][1] / first['ratio'][1]:.1f}", *cells])
    means = []
    for kind in kinds:
        ratios = [found[kind]["ratio"][1] for found in models.values() if "ratio" in found.get(kind, {})]
        counted = f" ({len(ratios)} of {len(models)})" if len(ratios) < len(models) else ""
        means.append(f"{measure.geometric_mean(ratios):.2f}{counted}")
    return [*table, ["geometric mean", "", *means]]


def shown(data: dict) -> list[str]:
    """The table as it is printed."""
    return report.markdown_table(rows(data))


def tables(data: dict, options: argparse.Namespace) -> None:
    """Write them."""
    if not data.get("models"):
        report.put(report.PAGE, "training", [report.NOT_YET], options.out)
        report.put(report.README, "training", [report.NOT_YET], options.out)
        return
    found, written = rows(data), report.sentence("training.py", data["system"])
    report.put(report.PAGE, "training", [*report.rst_table(found), "", written.replace("`", "``")], options.out)
    report.put(report.README, "training", [*report.markdown_table(found), "", written], options.out)


if __name__ == "__main__":
    measure.script("training", __doc__, list(SUITE), measured, shown, tables)
