"""What norms of the examples' gradients cost beside an ordinary training, which wants ``p.grad`` as well.

The ratio to the plain step of a step that leaves both, by an ordinary loop, with a recorded model in it, and by a
recorded step. Each is checked before: norms and gradients against one backward per example.
Writes ``beside.json`` and a table in ``docs/performance.rst``::

    python gallery/benchmarks/beside.py
"""

from __future__ import annotations

import argparse

import measure
import report
from models import SUITE
from systems import OursNorms, Problem
from torch import Tensor
from tqdm import tqdm

from perexample import RecordedModel, RecordedStep, perex


class Beside(OursNorms):
    """Norms and gradients by an ordinary loop."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.prepare()

    def prepare(self) -> None:
        """Record, if there is anything to record."""

    def step(self) -> None:
        self.zero()
        with perex(self.asked):
            self.losses().mean().backward()

    def gradients(self) -> dict[str, Tensor]:
        return self.left()


class BesideModel(Beside):
    """The same with a recorded model."""

    def prepare(self) -> None:
        self.recorded = RecordedModel(self.model, self.x, extensions=self.asked, grad=True)

    def losses(self) -> Tensor:
        return self.problem.case.losses(self.recorded(self.x), self.y)


class BesideStep(Beside):
    """The same by a recorded step."""

    def prepare(self) -> None:
        def losses(x: Tensor, y: Tensor) -> Tensor:
            return self.problem.case.losses(self.model(x), y)

        self.recorded = RecordedStep(
            self.model, losses, self.x, self.y, extensions=self.asked, grad=True, loss_reduction="mean"
        )

    def step(self) -> None:
        self.zero()
        self.recorded(self.x, self.y)


KINDS = {"as it is": Beside, "recorded model": BesideModel, "recorded step": BesideStep}


def measured(options: argparse.Namespace) -> dict[str, dict]:
    """Quartiles of seconds and ratios of all models."""
    found = {}
    for model in tqdm(options.models, desc="models", disable=None):
        problem = Problem.of(SUITE[model], options.n, "cpu")
        found[model] = measure.timings(problem, list(KINDS), options.repeats, options.seconds, kinds=KINDS)
        failed = {name: entry["failed"] for name, entry in found[model].items() if "failed" in entry}
        if failed:
            raise RuntimeError(f"{model}: {failed}")
    return found


def rst(data: dict) -> list[str]:
    """The table."""
    models = {name: data["models"][name] for name in SUITE if name in data["models"]}
    table = [["model", *KINDS]]
    for name, found in models.items():
        spreads = ("{1:.2f} ({0:.2f} to {2:.2f})".format(*found[kind]["ratio"]) for kind in KINDS)
        table.append([SUITE[name].name, *spreads])
    means = (measure.geometric_mean([found[kind]["ratio"][1] for found in models.values()]) for kind in KINDS)
    table.append(["geometric mean", *(f"{mean:.2f}" for mean in means)])
    return [*report.rst_table(table), "", report.sentence("beside.py", data["system"]).replace("`", "``")]


def tables(data: dict, options: argparse.Namespace) -> None:
    """Write them."""
    report.put(report.PAGE, "beside", rst(data) if data.get("models") else [report.NOT_YET], options.out)


if __name__ == "__main__":
    measure.script("beside", __doc__, list(SUITE), measured, rst, tables)
