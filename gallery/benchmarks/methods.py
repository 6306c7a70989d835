"""Every method for the norms and the clipped sum of one layer, beside the layer's plain weight gradient.

Each time is that of the norms, and of the weighted sum from what the method has kept. Writes ``methods.json`` and the
table in ``docs/performance.rst``::

    python gallery/benchmarks/methods.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import report
import torch
from torch import Size, Tensor
from tqdm import tqdm

from perexample._conv import Geometry, native
from perexample.terms import Outer, Term, Windows

# C_in, C_out, height and width, kernel, stride, groups
CONVOLUTIONS = [
    (64, 64, 32, 3, 1, 1), (128, 128, 16, 3, 1, 1), (256, 256, 8, 3, 1, 1), (512, 512, 4, 3, 1, 1),
    (64, 128, 32, 3, 2, 1), (64, 64, 32, 1, 1, 1), (64, 64, 32, 3, 1, 64), (256, 256, 8, 3, 1, 256),
    (1, 16, 28, 8, 2, 1),
]  # fmt: skip
# The same of those whose sums alone are timed: over few positions
SUMS = [
    (512, 512, 2, 3, 1, 1), (512, 512, 4, 3, 1, 1), (256, 512, 4, 3, 1, 1), (256, 512, 8, 3, 2, 1),
    (256, 256, 8, 3, 1, 1),
]  # fmt: skip
# N, T, I, O
LINEAR = [(16, 128, 256, 1024), (8, 512, 256, 1024), (64, 64, 192, 768), (32, 16, 512, 512)]
N = 32
HOPELESS = 20  # times the least estimate, beyond which a method is not tried


def convolution(c: int, o: int, size: int, k: int, stride: int, groups: int) -> tuple[Term, Callable[[], Tensor]]:
    """The term of a convolution, and its plain weight gradient."""
    pad = (k - 1) // 2
    length = (size + 2 * pad - k) // stride + 1
    x, g = torch.randn(N, c, size, size), torch.randn(N, o, length, length)
    geometry = Geometry(Size((o, c // groups, k, k)), (stride, stride), (1, 1), groups)
    return Windows(x, g, geometry, [(pad, pad)] * 2), lambda: native(x, g, geometry, pad)


def linear(n: int, t: int, i: int, o: int) -> tuple[Term, Callable[[], Tensor]]:
    """The term of a linear layer, and its plain weight gradient."""
    x, g = torch.randn(n, 1, t, i), torch.randn(n, 1, t, o)
    return Outer(g, x, Size((o, i))), lambda: g.view(-1, o).T @ x.view(-1, i)


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median over some calls, after one."""
    action()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measured(term: Term, plain: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds of the plain weight gradient and of each method with its sum."""
    w = torch.rand(term.n)
    found = {"plain": 1e3 * seconds(plain, repeats)}
    methods = term.methods()
    device = torch.device("cpu")
    least = min(method.seconds(device) for method in methods)
    for method in methods:
        if method.seconds(device) > HOPELESS * least:
            continue
        found[method.name] = 1e3 * seconds(lambda method=method: method.run()[1].weighted_sum(w), repeats)
    return found


def described(c: int, o: int, size: int, k: int, stride: int, groups: int) -> str:
    """A convolution in words."""
    name = f"conv {c} to {o}, {size}x{size}, k={k}" + (f", stride {stride}" if stride > 1 else "")
    return name + (f", {groups} groups" if groups > 1 else "")


def sums(args: tuple[int, int, int, int, int, int], repeats: int) -> dict[str, float]:
    """Milliseconds of each way to the weighted sum of a convolution, without the weights."""
    term, _ = convolution(*args)
    return {method.name: 1e3 * seconds(method.run, repeats) for method in term._sums()}


def cases() -> dict[str, Callable[[], tuple[Term, Callable[[], Tensor]]]]:
    """All layers by their description."""
    found: dict[str, Callable[[], tuple[Term, Callable[[], Tensor]]]] = {}
    for c, o, size, k, stride, groups in CONVOLUTIONS:
        name = described(c, o, size, k, stride, groups)
        found[name] = lambda *a, args=(c, o, size, k, stride, groups): convolution(*args)
    for n, t, i, o in LINEAR:
        found[f"linear {i} to {o}, N={n}, T={t}"] = lambda *a, args=(n, t, i, o): linear(*args)
    return found


SHORT = {
    "plain": "plain", "Gram matrices of the positions": "Gram", "per-example gradients, kept": "kept",
    "per-example gradients": "let go", "Gram matrices of the pixels": "Gram of pixels",
    "Gram matrices of the windows": "Gram of windows", "per-example gradients, kernel offsets": "offsets",
    "per-example gradients, unfolded": "unfolded", "per-example gradients, kernel rows": "rows",
    "per-example gradients, one by one": "one by one",
    "per-example gradients, examples as groups": "as groups",
}  # fmt: skip


def rst(data: dict) -> list[str]:
    """A table for convolutions, one for linear layers, and one for the sums of convolutions."""
    lines: list[str] = []
    for start in ("conv", "linear"):
        rows = {name: found for name, found in data["milliseconds"].items() if name.startswith(start)}
        columns = [name for name in SHORT if any(name in found for found in rows.values())]
        table = [["layer", *(SHORT[name] for name in columns)]]
        for name, found in rows.items():
            least = min(value for key, value in found.items() if key != "plain")
            table.append([name, *(cell(found.get(key), found.get(key) == least) for key in columns)])
        lines += [*report.rst_table(table), ""]
    ways = list(next(iter(data["sums"].values())))
    table = [["sum of", *ways]]
    for name, found in data["sums"].items():
        table.append([name, *(cell(found[way], found[way] == min(found.values())) for way in ways)])
    lines += [*report.rst_table(table), ""]
    rule = (
        f"Convolutions have N={N}. A method is left out where the model expects over {HOPELESS} times the least time."
    )
    return [*lines, report.sentence("methods.py", data["system"]).replace("`", "``") + " " + rule]


def cell(value: float | None, best: bool) -> str:
    """Milliseconds, strong for the fastest method."""
    if value is None:
        return ""
    return f"**{value:.1f}**" if best else f"{value:.1f}"


def everything(repeats: int) -> dict:
    """All layers."""
    times = {name: measured(*make(), repeats) for name, make in tqdm(cases().items())}
    return {"milliseconds": times, "sums": {described(*args): sums(args, repeats) for args in tqdm(SUMS)}}


def tables(data: dict, options: argparse.Namespace) -> None:
    """The tables, for the documentation."""
    report.put(report.PAGE, "methods", rst(data), options.out)


if __name__ == "__main__":
    report.time_products("methods", __doc__, 7, everything, tables)
