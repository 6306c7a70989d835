"""Time and peak memory of this library and its peers on the suite's models, as ratios to the plain step.

All systems take turns in one process, after each was checked against one backward per example; peak memory is measured
in a process for each. Writes ``suite.json``, tables in the README and in ``docs/performance.rst``, and plots. A run of
some models or systems replaces only their numbers::

    python gallery/benchmarks/suite.py
    python gallery/benchmarks/suite.py --models mlp vgg11 --systems ClippedGrad "Opacus ghost"
    python gallery/benchmarks/suite.py --tables
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from pathlib import Path

import measure
import report
import torch
from models import SUITE
from systems import SYSTEMS, Problem
from tqdm import tqdm

OTHERS = [name for name in SYSTEMS if name != "plain"]


def sized(model: str, options: argparse.Namespace) -> int:
    """Number of examples."""
    return options.n or options.times * SUITE[model].n


def times(data: dict, options: argparse.Namespace) -> None:
    """Measure seconds of all that was asked for."""
    for model in tqdm(options.models, desc="time", disable=None):
        problem = Problem.of(SUITE[model], sized(model, options), options.device)
        found = measure.timings(problem, options.systems, options.repeats, options.seconds, options.device)
        entries = data["models"].setdefault(model, {})
        for name, entry in found.items():
            kept = {key: value for key, value in entries.get(name, {}).items() if key.startswith("peak")}
            entries[name] = entry if "failed" in entry else entry | kept
        store(data, options)


def memory(data: dict, options: argparse.Namespace) -> None:
    """Measure peak memory of all that was asked for and that works."""
    for model in tqdm(options.models, desc="memory", disable=None):
        entries = data["models"].setdefault(model, {})
        for name in tqdm(options.systems, desc=model, leave=False, disable=None):
            entry = entries.setdefault(name, {})
            if "failed" in entry:
                continue
            if options.device != "cpu":  # whose allocator keeps the records of peaks
                gc.collect()
                torch.cuda.empty_cache()
                problem = Problem.of(SUITE[model], sized(model, options), options.device)
                found = measure.peaks(problem, [name], options.device)
                entry["peak_failed" if isinstance(found[name], str) else "peak"] = found[name]
                store(data, options)
                continue
            more = [] if options.n is None else ["--n", str(options.n)]
            settings = ["--device", options.device, "--threads", str(options.threads), *more]
            found = measure.in_process(Path(__file__), "--peak", model, name, *settings)
            peak = found.get(name, found.get("failed"))
            entry["peak_failed" if isinstance(peak, str) else "peak"] = peak
            entry.pop("peak" if isinstance(peak, str) else "peak_failed", None)
            store(data, options)


def cell(entry: dict, key: str, spread: bool) -> str:
    """One ratio, or in a word why there is none."""
    if "failed" in entry:
        why = entry["failed"]
        return "wrong" if why.startswith("wrong") else "" if why.endswith("is not installed") else "no"
    if key not in entry:
        return ""
    if spread and isinstance(entry[key], list):
        low, middle, high = entry[key]
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return f"{ratio(entry, key):.2f}"


def ratio(entry: dict, key: str) -> float:
    """The median of a ratio."""
    return entry[key][1] if isinstance(entry[key], list) else entry[key]


def with_ratios(data: dict) -> dict[str, dict[str, dict]]:
    """The entries in the suite's order, with the ratio of peak memory."""
    found: dict[str, dict[str, dict]] = {}
    for model in SUITE:
        entries = data.get("models", {}).get(model, {})
        plain = entries.get("plain", {}).get("peak")
        found[model] = {
            name: entry | ({"peak_ratio": entry["peak"] / plain} if plain and "peak" in entry else {})
            for name, entry in entries.items()
        }
    return {model: entries for model, entries in found.items() if entries}


def shown(model: str, data: dict) -> str:
    """The model's name, with the number of examples."""
    case, times = SUITE[model], data.get("times", 1)
    return case.name if times == 1 else case.name.replace(f"N={case.n}", f"N={times * case.n}")


def rows(data: dict, key: str, spread: bool = False) -> list[list[str]]:
    """The table of one ratio: a row for each model, and geometric means over the models that a system can do."""
    entries = with_ratios(data)
    plain_key, plain_name = ("seconds", "plain, ms") if key == "ratio" else ("peak", "plain, MiB")
    names = [name for name in OTHERS if any(name in found for found in entries.values())]
    table = [["model", plain_name, *names]]
    for model, found in entries.items():
        plain = found.get("plain", {})
        amount = ratio(plain, plain_key) * (1e3 if key == "ratio" else 1.0) if plain_key in plain else None
        cells = [cell(found.get(name, {}), key, spread) for name in names]
        digits = 2 if amount is not None and amount < 10 else 0
        table.append([shown(model, data), "" if amount is None else f"{amount:.{digits}f}", *cells])
    last = ["geometric mean", ""]
    for name in names:
        ratios = [ratio(found[name], key) for found in entries.values() if key in found.get(name, {})]
        counted = f" ({len(ratios)} of {len(entries)})" if len(ratios) < len(entries) else ""
        last.append(f"{measure.geometric_mean(ratios):.2f}{counted}" if ratios else "")
    return [*table, last]


def remarks(data: dict) -> list[list[str]]:
    """Why a system has no number, or what was changed so that it has."""
    table = [["system", "model", "remark"]]
    for name in SYSTEMS:
        models: dict[str, list[str]] = {}
        for model, entries in with_ratios(data).items():
            entry = entries.get(name, {})
            text = entry.get("failed") or entry.get("peak_failed") or entry.get("note")
            if text and not text.endswith("is not installed"):
                models.setdefault(report.rst_text(text), []).append(model)
        table += [[name, ", ".join(found), text] for text, found in models.items()]
    return table


MEANING = (
    "Ratios to the plain step beside each (median); 1 is the cost of training without clipping. ClippedGrad, "
    "BatchL2Grad (norms only) and BatchGrad (gradients only) are this library's; all others make clipped sums, in "
    "float32. Recorded model: an ordinary loop, with a RecordedModel in the place of the model; recorded: by "
    "RecordedStep, and the plain step recorded in the same way; compiled: the same with "
    "compiled=True, each where that is faster than without. Roomy: perex(room=1e6) lets "
    "per-example gradients be kept where that is faster, as most peers keep them. "
    "Before it is timed each is checked against one backward per example. Memory that is freed is kept by the "
    "process, as on a GPU; the system would clear it again in each step, which slows all that hold per-example "
    "gradients of large layers."
)
MEMORY = "Peak memory over that between steps, as a ratio to the plain step's."


def markdown(data: dict) -> list[str]:
    """The tables of the README."""
    lines = ["Time:", "", *report.markdown_table(rows(data, "ratio")), ""]
    if any("peak_ratio" in entry for found in with_ratios(data).values() for entry in found.values()):
        lines += ["Peak memory:", "", *report.markdown_table(rows(data, "peak_ratio")), ""]
    note = f"{MEANING} {MEMORY} {report.sentence('suite.py', data['system'])}"
    return [*lines, note + ' "no": the system cannot do the model, the reasons are in docs/performance.rst.']


def rst(data: dict) -> list[str]:
    """The tables of the documentation, with quartiles and remarks."""
    lines = [MEANING, "", *report.rst_image("suite-time.svg", "Time of each system on each model")]
    lines += [*report.rst_table(rows(data, "ratio", spread=True)), ""]
    if any("peak_ratio" in entry for found in with_ratios(data).values() for entry in found.values()):
        lines += [MEMORY, "", *report.rst_image("suite-memory.svg", "Peak memory of each system on each model")]
        lines += [*report.rst_table(rows(data, "peak_ratio")), ""]
    found = remarks(data)
    if len(found) > 1:
        lines += ["What systems cannot do, and what was changed for them:", "", *report.rst_table(found), ""]
    return [*lines, report.sentence("suite.py", data["system"]).replace("`", "``")]


def plot(data: dict, key: str, label: str, path: Path) -> None:
    """A dot for each system on each model's line."""
    entries = with_ratios(data)
    with report.drawing(path, 1, 1, (8.2, 1.4 + 0.42 * len(entries))) as (axis,):
        for name in OTHERS:
            points = [
                (ratio(found[name], key), y) for y, found in enumerate(entries.values()) if key in found.get(name, {})
            ]
            if points:
                style = report.style_of(name)
                axis.plot(*zip(*points, strict=True), linestyle="", markersize=6.5, alpha=0.9, label=name, **style)
        axis.axvline(1.0, color=report.GRAY, linewidth=1, linestyle="--")
        axis.set_xscale("log")
        report.figures(axis, "x")
        axis.set_yticks(range(len(entries)), [SUITE[model].name for model in entries])
        axis.invert_yaxis()
        axis.grid(axis="both")
        axis.set_xlabel(label)
        axis.figure.legend(loc="outside upper center", ncols=4)


ON_GPU = (
    "Ratios to the plain step beside each (median), on the GPU named below; recorded: the step as a CUDA graph, by "
    "torch.cuda.graph and by RecordedStep. All else is as in the table of the CPU. Convolutions of the models are in "
    "TF32 and matrix products in float32, as torch sets them; systems are checked without TF32. Peak memory is that of "
    "torch's allocator; of recorded steps it includes what it takes to record them."
)


def tables_of_gpus(data: dict, options: argparse.Namespace) -> None:
    """Write the tables of numbers that were measured on a GPU."""
    name = json_path(options).stem
    if not data.get("models"):
        report.put(report.PAGE, name, [report.NOT_YET], options.out)
        report.put(report.README, name, [report.NOT_YET], options.out)
        return
    lines = [ON_GPU, "", *report.rst_table(rows(data, "ratio", spread=True)), "", MEMORY, ""]
    lines += [*report.rst_table(rows(data, "peak_ratio")), ""]
    found = remarks(data)
    if len(found) > 1:
        lines += ["What systems cannot do, and what was changed for them:", "", *report.rst_table(found), ""]
    command = "suite.py --device cuda"
    lines.append(report.sentence(command, data["system"]).replace("`", "``"))
    report.put(report.PAGE, name, lines, options.out)
    names = ["plain, recorded", "ClippedGrad", "ClippedGrad, recorded", "Opacus hooks", "Opacus ghost", "vmap"]
    whole = rows(data, "ratio")
    columns = [0, 1, *(whole[0].index(one) for one in names)]
    short = report.markdown_table([[row[column] for column in columns] for row in whole])
    report.put(report.README, name, [*short, "", report.sentence(command, data["system"])], options.out)


def tables(data: dict, options: argparse.Namespace) -> None:
    """Write tables and plots of all numbers there are."""
    if options.device != "cpu":
        tables_of_gpus(data, options)
        return
    if not data.get("models"):
        report.put(report.README, "suite", [report.NOT_YET], options.out)
        report.put(report.PAGE, "suite", [report.NOT_YET], options.out)
        return
    report.put(report.README, "suite", markdown(data), options.out)
    report.put(report.PAGE, "suite", rst(data), options.out)
    folder = options.out or report.PLOTS
    plot(data, "ratio", "time, as a ratio to the plain step", folder / "suite-time.svg")
    plot(data, "peak_ratio", "peak memory, as a ratio to the plain step", folder / "suite-memory.svg")


def json_path(options: argparse.Namespace) -> Path:
    """Where the numbers are: those of GPUs, and those of larger batches, beside those of the CPU."""
    kind = "" if options.device == "cpu" else f"-{options.device}"
    return (options.out or report.HERE) / f"suite{kind}{f'-x{options.times}' if options.times > 1 else ''}.json"


def store(data: dict, options: argparse.Namespace) -> None:
    """Keep the numbers so far."""
    if not options.dry:
        report.save(json_path(options), data)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SUITE), default=list(SUITE), metavar="MODEL")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--repeats", type=int, default=11, help="turns of each system (default: 11)")
    parser.add_argument("--seconds", type=float, default=12.0, help="cap for a system and model (default: 12)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks (default)")
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True, help="measure time (default)")
    parser.add_argument("--n", type=int, help="examples (default: each model's own number)")
    parser.add_argument("--times", type=int, default=1, help="so many times each model's own number of examples")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    parser.add_argument("--smoke", action="store_true", help="two examples and one repeat, to see that all works")
    parser.add_argument("--tables", action="store_true", help="only write tables and plots of the numbers there are")
    parser.add_argument("--out", type=Path, help="write everything to this folder instead")
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "SYSTEM"), help="print the peak memory of one as JSON")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.n, options.repeats = options.n or 2, 1
    if options.times > 1 and not (options.dry or options.out):
        parser.error("the tables are of the suite's own batches: add --out or --dry")
    if options.n and not (options.dry or options.peak or options.out):
        parser.error("numbers of other batches do not belong with those of the suite: add --out or --dry")
    return options


def main() -> None:
    """Measure, and write what was found."""
    options = parse()
    if not options.peak:
        measure.keep_memory()
    warnings.simplefilter("ignore")  # peers warn about torch's interfaces and of slow paths of vmap
    torch.set_num_threads(options.threads)
    if options.peak:
        model, name = options.peak
        print(json.dumps(measure.peaks(Problem.of(SUITE[model], options.n, options.device), [name], options.device)))
        return
    data = report.load(json_path(options)) or {"models": {}}
    if not options.tables:
        data["system"] = report.system_info(options.device, options.threads)
        data["command"], data["times"] = "python gallery/benchmarks/suite.py", options.times
        if options.time:
            times(data, options)
        if options.memory:
            memory(data, options)
    if data["models"]:
        print("\n".join(markdown(data)))
    if not options.dry:
        tables(report.rounded(data), options)


if __name__ == "__main__":
    main()
