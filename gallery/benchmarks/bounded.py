"""What a bound on memory costs: time and peak of clipped sums with ``perex(max_memory=...)``.

The bound is on what is held until the clip factors are known. With one below what a step may need nothing is held, and
a second backward forms the sums, so that any such bound is as good as 0. Writes ``bounded.json`` and a table in
``docs/performance.rst``::

    python gallery/benchmarks/bounded.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import measure
import report
import torch
from models import SUITE
from systems import OursClipped, Problem, System
from tqdm import tqdm

from perexample import perex

MODELS = ("mlp", "resnet18", "vgg11", "transformer", "gpt", "vit")
BOUNDS = (None, 0.0)


class Bounded(OursClipped):
    """Clipped sums with a bound."""

    def __init__(self, problem: Problem, bound: float | None) -> None:
        super().__init__(problem)
        self.bound = bound

    def step(self) -> None:
        self.zero()
        with perex(self.asked, grad=False, max_memory=self.bound):
            self.losses().mean().backward()


def peak(problem: Problem, number: int) -> float:
    """Peak memory of the plain step (-1), or that with one of the bounds."""
    return measure.peak_of(System(problem) if number < 0 else Bounded(problem, BOUNDS[number]))


def measured(options: argparse.Namespace) -> dict[str, dict]:
    """Ratios of time and peak memory."""
    found: dict[str, dict] = {}
    for model in tqdm(options.models, desc="models", disable=None):
        problem = Problem.of(SUITE[model], options.n)
        check, systems = measure.Check(problem), {}
        for number, bound in enumerate(BOUNDS):
            system = systems[str(number)] = Bounded(problem, bound)
            system.step()
            worst = check.worst(system)
            if not worst <= measure.TOLERANCE:
                raise RuntimeError(f"{model}, {bound}: relative difference {worst:.1e}")
            system.zero()
        times = measure.compare(systems, System(problem), options.repeats, options.seconds)
        found[model] = {"bounds": list(BOUNDS), "times": [times[str(number)] for number in range(len(BOUNDS))]}
        if options.memory:
            settings = ["--n", str(options.n)] if options.n else []
            numbers = range(-1, len(BOUNDS))
            peaks = [measure.in_process(Path(__file__), "--peak", model, str(i), *settings) for i in numbers]
            found[model]["peaks"] = [entry["peak"] for entry in peaks]
    return found


def rst(data: dict) -> list[str]:
    """The table."""
    rows = [["model", "bound", "time / plain step", "peak / plain step's"]]
    for name, entry in data["models"].items():
        plain, *peaks = entry.get("peaks") or [None] * (1 + len(entry["bounds"]))
        for bound, times, most in zip(entry["bounds"], entry["times"], peaks, strict=True):
            low, middle, high = times["ratio"]
            rows.append([
                SUITE[name].name, "none" if bound is None else f"{bound:g}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})", "" if plain is None else f"{most / plain:.2f}",
            ])  # fmt: skip
    return [*report.rst_table(rows), "", report.sentence("bounded.py", data["system"]).replace("`", "``")]


def tables(data: dict, options: argparse.Namespace) -> None:
    """Write it."""
    report.put(report.PAGE, "bounded", rst(data) if data.get("models") else [report.NOT_YET], options.out)


def own_options(parser: argparse.ArgumentParser) -> None:
    """Add those that only this script has."""
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks (default)")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "NUMBER"), help="print one peak memory as JSON")


def main() -> None:
    """Measure, and write what was found."""
    options = measure.options_of(__doc__, list(SUITE), MODELS, 5, 5.0, own_options)
    torch.set_num_threads(options.threads)
    if options.peak:
        model, number = options.peak
        print(json.dumps({"peak": round(peak(Problem.of(SUITE[model], options.n), int(number)), 2)}))
        return
    measure.keep_memory()
    path = (options.out or report.HERE) / "bounded.json"
    data = {"system": report.system_info("cpu", options.threads), "command": "python gallery/benchmarks/bounded.py"}
    data["models"] = measured(options)
    report.save(path, data)
    print("\n".join(rst(report.rounded(data))))
    tables(report.rounded(data), options)


if __name__ == "__main__":
    main()
