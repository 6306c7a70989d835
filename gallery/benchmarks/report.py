"""Tables between markers, plots that are readable on white and on black, and what the numbers were measured on."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "performance.rst"
PLOTS = ROOT / "docs" / "_static"
NOT_YET = "Not measured yet."
GRAY = "#8a8f98"
COLOURS = {
    "plain": "#8a8f98",
    "plain, recorded": "#b9bdc4",
    "plain, compiled": "#d6d9de",
    "ClippedGrad": "#c8664f",
    "ClippedGrad, recorded model": "#b6573f",
    "ClippedGrad, compiled model": "#93402d",
    "ClippedGrad, recorded": "#a34a36",
    "ClippedGrad, compiled": "#7c2f1f",
    "ClippedGrad, roomy": "#e39b8a",
    "BatchL2Grad": "#d99a4e",
    "BatchGrad": "#b0728f",
    "Opacus hooks": "#5b7fa6",
    "Opacus functorch": "#7aa3c9",
    "Opacus ghost": "#3f9aa8",
    "BackPACK": "#4c9a6a",
    "vmap": "#8f7cc0",
    "loop": "#a08b6a",
}
OURS = "ClippedGrad"
PEERS = ("opacus", "backpack-for-pytorch")  # packages
MARKERS = dict(zip(COLOURS, [*"oh8s", (4, 1, 0), (6, 1, 0), *"H*pDPv^<>Xd"], strict=True))


def system_info(device: str, threads: int) -> dict[str, object]:
    """Versions and the kind of machine."""
    versions = {}
    for package in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": threads,
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        **versions,
    }


def cpu_name() -> str:
    """The processor's model."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def sentence(script: str, info: dict[str, object]) -> str:
    """Where a table comes from; its code quotes are those of Markdown."""
    peers = [f"Opacus {info['opacus']}"] if "opacus" in info else []
    peers += [f"BackPACK {info['backpack-for-pytorch']}"] if "backpack-for-pytorch" in info else []
    place = str(info["cpu"]) if info["device"] == "cpu" else str(info["device"])
    parts = [f"torch {info['torch']}", *peers, f"Python {info['python']}", f"{info['threads']} CPU threads, {place}"]
    return f"Written by `python gallery/benchmarks/{script}` with {', '.join(parts)}."


Rows = Sequence[Sequence[str]]


def markdown_table(rows: Rows) -> list[str]:
    """The first row is the head."""
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|---" * len(rows[0]) + "|", *rest]


def rst_table(rows: Rows) -> list[str]:
    """The first row is the head."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}".rstrip() for number, cell in enumerate(row)]
    return lines


def rst_text(text: str) -> str:
    """What a system has said, without marks of reStructuredText."""
    return re.sub(r"[*|\\]|_(?=\W|$)", lambda found: "\\" + found[0], text.replace("`", "'"))


def rst_image(name: str, alt: str) -> list[str]:
    """A picture of the folder of plots."""
    return [f".. image:: _static/{name}", f"   :alt: {alt}", ""]


def between(text: str, name: str, suffix: str) -> str:
    """What is between the markers now."""
    start, end = _markers(name, suffix)
    return text.partition(start)[2].partition(end)[0].strip()


def put(path: Path, name: str, lines: Sequence[str], out: Path | None) -> None:
    """Write lines between the markers of a page, or to a file of their own in the folder ``out``."""
    body = "\n".join(lines).strip()
    if out is not None:
        (out / f"{name}{path.suffix}").write_text(body + "\n")
        return
    start, end = _markers(name, path.suffix)
    text = path.read_text()
    if start not in text or end not in text:
        raise ValueError(f"{path.name} has no markers {start} and {end}")
    gap = "\n\n" if path.suffix == ".rst" else "\n"
    path.write_text(text.partition(start)[0] + start + gap + body + gap + end + text.partition(end)[2])


def _markers(name: str, suffix: str) -> tuple[str, str]:
    """The comments around a table."""
    if suffix == ".md":
        return f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    return f".. {name}:start", f".. {name}:end"


def load(path: Path) -> dict:
    """The numbers so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def rounded(data: dict) -> dict:
    """The numbers as a file keeps them, of which tables are made."""
    return json.loads(json.dumps(data), parse_float=lambda text: float(f"{float(text):.5g}"))


def save(path: Path, data: dict) -> None:
    """Replace the numbers at once, so that a run that is stopped leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(rounded(data), indent=1) + "\n")
    os.replace(beside, path)


@contextlib.contextmanager
def drawing(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[list[plt.Axes]]:
    """Axes to draw on, which become an SVG file without a background."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    style = {
        "svg.hashsalt": "perexample", "font.size": 9, "text.color": GRAY, "axes.labelcolor": GRAY,
        "axes.edgecolor": GRAY, "xtick.color": GRAY, "ytick.color": GRAY, "grid.color": GRAY, "grid.alpha": 0.25,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "legend.frameon": False,
        "legend.fontsize": 8.5,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        yield list(axes.flat)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def style_of(name: str) -> dict[str, object]:
    """Colour and marker of a system."""
    return {"color": COLOURS.get(name, GRAY), "marker": MARKERS.get(name, "o"), "zorder": 3 if name == OURS else 2}


def figures(axis: plt.Axes, which: str) -> None:
    """Numbers such as 0.5, 1, 2 and 20 along a logarithmic axis, instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    target = axis.xaxis if which == "x" else axis.yaxis
    target.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    target.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    target.set_minor_formatter(NullFormatter())


def time_products(
    name: str,
    text: str | None,
    repeats: int,
    measured: Callable[[int], dict],
    tables: Callable[[dict, argparse.Namespace], None],
) -> None:
    """What a script does that times products by themselves: options, numbers, tables.

    Args:
        name: Of the script and of its file of numbers.
        text: Its help.
        repeats: How often it calls each product, unless asked otherwise.
        measured: Measures, given that number.
        tables: Writes the tables.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"calls of each product (default: {repeats})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--out", type=Path, help="write to this folder instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = (options.out or HERE) / f"{name}.json"
    data = load(path)
    if not options.tables:
        torch.manual_seed(0)
        system = system_info("cpu", options.threads)
        data = measured(options.repeats)
        data["system"] = {key: value for key, value in system.items() if key not in PEERS}
        save(path, data)
    tables(rounded(data), options)
