"""How time and peak memory grow with examples, positions, width, depth and image size, and what batch fits in memory.

Time is measured with the systems in turns; peak memory in a process for each point. Points are taken from small to
large over all sweeps until the minutes are up. Writes ``growth.json``, tables in ``docs/performance.rst``, and plots::

    python gallery/benchmarks/growth.py
    python gallery/benchmarks/growth.py --quick --sweeps mlp-width vgg-size
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measure
import report
import torch
from models import Case, Encoder, images, mlp, tokens, vectors, vgg
from systems import Problem
from torch import nn
from tqdm import tqdm

NAMES = ["plain", "ClippedGrad", "Opacus hooks", "Opacus ghost", "vmap"]
FITTED = ["plain", "ClippedGrad", "Opacus hooks", "Opacus ghost"]


def mlp_case(n: int = 128, width: int = 512, depth: int = 2) -> Case:
    """An MLP of any width and depth."""
    return Case("MLP", partial(mlp, width, depth), vectors(784), n)


def encoder_case(n: int = 8, length: int = 64) -> Case:
    """A Transformer encoder of two layers."""
    return Case("Transformer encoder", partial(Encoder, 2, 256, length), tokens(length, 1000), n)


def any_size(depth: int) -> nn.Module:
    """VGG with a mean over positions before its head, for images of any size."""
    *features, flatten, head = vgg(depth)
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), flatten, head)


def vgg_case(n: int = 8, size: int = 32) -> Case:
    """VGG-11 for images of any size."""
    return Case("VGG-11", partial(any_size, 11), images(3, size), n)


def vgg19_case(n: int) -> Case:
    """VGG-19, whose largest batch is looked for."""
    return Case("VGG-19", partial(vgg, 19), images(3, 32), n)


@dataclass(frozen=True)
class Sweep:
    """One setting of a model that grows while all else stays."""

    label: str
    case: Callable[..., Case]
    key: str
    values: tuple[int, ...]

    def problem(self, value: int) -> Problem:
        """The model and batch of one point."""
        return Problem.of(self.case(**{self.key: value}))


SWEEPS = {
    "mlp-n": Sweep("MLP: examples", mlp_case, "n", (16, 64, 256, 1024)),
    "mlp-width": Sweep("MLP: width", mlp_case, "width", (128, 256, 512, 1024, 2048)),
    "mlp-depth": Sweep("MLP: depth", mlp_case, "depth", (1, 2, 4, 8, 16)),
    "transformer-n": Sweep("Transformer: examples", encoder_case, "n", (4, 8, 16, 32)),
    "transformer-t": Sweep("Transformer: positions", encoder_case, "length", (16, 32, 64, 128, 256)),
    "vgg-n": Sweep("VGG-11: examples", vgg_case, "n", (4, 8, 16, 32)),
    "vgg-size": Sweep("VGG-11: image size", vgg_case, "size", (32, 48, 64, 96, 128)),
}


def point(name: str, value: int, options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Seconds and peak memory of all systems at one point."""
    found = measure.timings(SWEEPS[name].problem(value), options.systems, options.repeats, options.seconds)
    if options.memory:
        peak = ["--peak", name, str(value), "--threads", str(options.threads)]
        peaks = measure.in_process(Path(__file__), *peak, "--systems", *options.systems)
        for system, entry in found.items():
            if "failed" not in entry:
                amount = peaks.get(system, peaks.get("failed"))
                entry["peak_failed" if isinstance(amount, str) else "peak"] = amount
    return found


def sweep(data: dict, options: argparse.Namespace, deadline: float) -> None:
    """Measure points from small to large, all sweeps in turn, until the time is up."""
    longest = max(len(SWEEPS[name].values) for name in options.sweeps)
    points = [
        (name, SWEEPS[name].values[number])
        for number in range(2 if options.quick else longest)
        for name in options.sweeps
        if number < len(SWEEPS[name].values)
    ]
    for name in options.sweeps:
        data["sweeps"][name] = {}
    data["left_out"] = []
    for name, value in tqdm(points, desc="points", disable=None):
        if time.monotonic() > deadline:
            data["left_out"].append(f"{name}={value}")
            continue
        data["sweeps"][name][str(value)] = point(name, value, options)
        store(data, options)


def largest(peak: Callable[[int], float], limit: float, start: int = 2, tries: int = 10) -> int:
    """The largest N whose peak is within the limit, to about 3 %: peaks are close to a line in N.

    Doubles until one is too large, and then looks where the line between both ends meets the limit.
    """
    low, high = (0, 0.0), (start, peak(start))
    while high[1] <= limit and tries > 0:
        slope = (high[1] - low[1]) / (high[0] - low[0])
        guess = high[0] + int((limit - high[1]) / slope * 1.05) if low[0] and slope > 0 else 2 * high[0]
        n = min(max(guess, high[0] + 1), 4 * high[0])  # small batches do not show the slope yet
        low, high = high, (n, peak(n))
        tries -= 1
    while high[1] > limit and high[0] - low[0] > max(1, 0.03 * low[0]) and tries > 0:
        share = (limit - low[1]) / (high[1] - low[1])
        n = low[0] + round((high[0] - low[0]) * min(max(share, 0.1), 0.9))
        n = min(max(n, low[0] + 1), high[0] - 1)
        found = (n, peak(n))
        low, high = (found, high) if found[1] <= limit else (low, found)
        tries -= 1
    return high[0] if high[1] <= limit else low[0]


def fit(data: dict, options: argparse.Namespace, deadline: float) -> None:
    """The largest batch of VGG-19 for each system that peaks within the memory given."""
    data["fits"] = {"limit": options.limit}
    for name in tqdm([n for n in FITTED if n in options.systems], desc="largest batch", disable=None):
        if time.monotonic() > deadline:
            data["left_out"].append(f"largest batch of {name}")
            continue

        def peak(n: int, name: str = name) -> float:
            arguments = ["--peak", "vgg19", str(n), "--threads", str(options.threads), "--systems", name]
            found = measure.in_process(Path(__file__), *arguments)
            amount = found.get(name, found.get("failed"))
            if isinstance(amount, str):
                raise RuntimeError(f"{name}, N={n}: {amount}")
            return amount

        data["fits"][name] = largest(peak, options.limit)
        store(data, options)


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of a line through the logarithms: 1 is linear, 2 quadratic."""
    if len(points) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def series(data: dict, name: str, system: str, key: str) -> list[tuple[float, float]]:
    """Seconds or MiB of a system along a sweep."""
    found = []
    for value, entries in data["sweeps"].get(name, {}).items():
        entry = entries.get(system, {})
        if key in entry:
            amount = entry[key]
            found.append((float(value), max(amount[1] if isinstance(amount, list) else amount, 0.1**6)))
    return sorted(found)


def exponents(data: dict, key: str) -> list[list[str]]:
    """The table of growth: an exponent, and the ratio to the plain step at the largest point of both."""
    table = [["what grows", "from, to", *NAMES]]
    for name, each in SWEEPS.items():
        plain = dict(series(data, name, "plain", key))
        if not plain:
            continue
        row = [each.label, f"{min(plain):g}, {max(plain):g}"]
        for system in NAMES:
            points = series(data, name, system, key)
            slope = exponent(points)
            last = f", {points[-1][1] / plain[points[-1][0]]:.1f} x" if points and points[-1][0] in plain else ""
            row.append("" if slope is None else f"{slope:.2f}{last}")
        table.append(row)
    return table


def remarks(data: dict) -> list[str]:
    """What could not be measured, and why."""
    found: dict[str, list[str]] = {}
    for name, points in data["sweeps"].items():
        for entries in points.values():
            for system, entry in entries.items():
                why = entry.get("failed") or entry.get("peak_failed")
                if why and not why.endswith("is not installed"):
                    found.setdefault(report.rst_text(f"{system}: {why}"), []).append(name)
    lines = [f"* {text} ({', '.join(dict.fromkeys(names))})" for text, names in found.items()]
    return [*lines, *(f"* not measured for lack of time: {what}" for what in data.get("left_out", []))]


def rst(data: dict) -> list[str]:
    """The tables of the documentation."""
    lines = [
        "Exponents of growth, as slopes of lines through the logarithms (1 is linear, 2 quadratic), and the ratio to "
        "the plain step at the largest point. Time:",
        "",
        *report.rst_image("growth-time.svg", "Seconds of a step as the model or batch grows"),
        *report.rst_table(exponents(data, "seconds")),
        "",
    ]
    if series(data, next(iter(data["sweeps"])), "plain", "peak"):
        lines += ["Peak memory over that between steps:", ""]
        lines += report.rst_image("growth-memory.svg", "Peak memory of a step as the model or batch grows")
        lines += [*report.rst_table(exponents(data, "peak")), ""]
    sizes = {name: size for name, size in data.get("fits", {}).items() if name != "limit"}
    if sizes:
        lines += [
            f"The largest batch of VGG-19, 32x32, whose step peaks within {data['fits']['limit']:g} MiB over what "
            f"there is between steps (to about 3 %):",
            "",
            *report.rst_table([["", *sizes], ["N", *map(str, sizes.values())]]),
            "",
        ]
    found = remarks(data)
    lines += [*found, ""] if found else []
    return [*lines, report.sentence("growth.py", data["system"]).replace("`", "``")]


def plot(data: dict, key: str, label: str, path: Path) -> None:
    """A small log-log picture for each sweep."""
    names = [name for name in SWEEPS if data["sweeps"].get(name)]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with report.drawing(path, rows, columns, (2.6 * columns + 0.4, 2.3 * rows + 0.5)) as axes:
        for axis, name in zip(axes, names, strict=False):
            for system in NAMES:
                points = series(data, name, system, key)
                if points:
                    style = report.style_of(system)
                    axis.plot(*zip(*points, strict=True), linewidth=1.3, markersize=4.5, label=system, **style)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(SWEEPS[name].values, map(str, SWEEPS[name].values), minor=False)
            axis.minorticks_off()
            report.figures(axis, "y")
            axis.grid()
            axis.set_title(SWEEPS[name].label, color=report.GRAY)
        for axis in axes[len(names) :]:
            axis.axis("off")
        for axis in axes[::columns]:
            axis.set_ylabel(label)
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(NAMES))


def tables(data: dict, options: argparse.Namespace) -> None:
    """Write tables and plots of all numbers there are."""
    if not any(data.get("sweeps", {}).values()):
        report.put(report.PAGE, "growth", [report.NOT_YET], options.out)
        return
    report.put(report.PAGE, "growth", rst(data), options.out)
    folder = options.out or report.PLOTS
    plot(data, "seconds", "seconds", folder / "growth-time.svg")
    plot(data, "peak", "MiB", folder / "growth-memory.svg")


def json_path(options: argparse.Namespace) -> Path:
    """Where the numbers are."""
    return (options.out or report.HERE) / "growth.json"


def store(data: dict, options: argparse.Namespace) -> None:
    """Keep the numbers so far."""
    if not options.dry:
        report.save(json_path(options), data)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), metavar="SWEEP")
    parser.add_argument("--systems", nargs="+", choices=NAMES, default=NAMES, metavar="SYSTEM")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each system at a point (default: 7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="cap for a system at a point (default: 3)")
    parser.add_argument("--minutes", type=float, default=15.0, help="no new point is begun after these (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--limit", type=float, default=1024.0, help="MiB for the largest batch (default: 1024)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks (default)")
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=True, help="find the largest batch")
    parser.add_argument("--quick", action="store_true", help="the two smallest points of each sweep, one repeat")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    parser.add_argument("--tables", action="store_true", help="only write tables and plots of the numbers there are")
    parser.add_argument("--out", type=Path, help="write everything to this folder instead")
    parser.add_argument("--peak", nargs=2, metavar=("SWEEP", "VALUE"), help="print peak memory of systems as JSON")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    if options.quick and not (options.dry or options.out):
        parser.error("quick numbers are not for the documentation: add --out or --dry")
    return options


def print_peaks(options: argparse.Namespace) -> None:
    """What `point` and `fit` ask of a process of its own."""
    name, value = options.peak
    if name == "vgg19":
        counts = {"warm": 1, "steps": 1}  # a large batch takes its time
        print(json.dumps(measure.peaks(Problem.of(vgg19_case(int(value))), options.systems, **counts)))
    else:
        print(json.dumps(measure.peaks(SWEEPS[name].problem(int(value)), options.systems)))


def main() -> None:
    """Measure, and write what was found."""
    options = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peaks(options)
        return
    data = report.load(json_path(options)) or {"sweeps": {}}
    if not options.tables:
        deadline = time.monotonic() + 60 * options.minutes
        data["system"] = report.system_info("cpu", options.threads)
        if options.fit:
            data["left_out"] = []
            fit(data, options, deadline)
        sweep(data, options, deadline)
        store(data, options)
    if any(data["sweeps"].values()):
        print("\n".join(rst(data)))
    if not options.dry:
        tables(report.rounded(data), options)


if __name__ == "__main__":
    main()
