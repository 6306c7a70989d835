"""Products that might be cheaper than those that are taken, and are not, beside those that are.

Gram matrices from bfloat16 parts of float32 factors, which some processors multiply much faster, with how far the norms
are off; one half of symmetric Gram matrices only, as blocks; products with the zeros that a ReLU or a pooling leaves.
Writes ``tried.json`` and the tables in ``docs/performance.rst``::

    python gallery/benchmarks/tried.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import report
import torch
from methods import seconds
from torch import Tensor
from tqdm import tqdm

# N, T, I, O
LAYERS = [(16, 128, 256, 1024), (8, 512, 256, 1024), (32, 64, 192, 768)]
BATCHES = [(4096, 512, 512), (2048, 256, 1024)]  # rows, inputs and outputs of a product for a weight's gradient
ZEROS = {"half, after a ReLU": 0.5, "three quarters, after a pooling of 2x2": 0.75}


@contextmanager
def bfloat16_inside() -> Iterator[None]:
    """Products of float32 from factors rounded to bfloat16, added up in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gram(x: Tensor) -> Tensor:
    """Of each example."""
    return x @ x.mT


def coarse(x: Tensor) -> Tensor:
    """From factors rounded to bfloat16."""
    with bfloat16_inside():
        return gram(x)


def from_parts(x: Tensor) -> Tensor:
    """From two bfloat16 parts of each factor, without the product of the lesser ones."""
    most = x.bfloat16().float()
    rest = x - most
    with bfloat16_inside():
        mixed = most @ rest.mT
        return gram(most).add_(mixed).add_(mixed.mT)


def halves(x: Tensor) -> Tensor:
    """Two blocks on the diagonal, and one beside it that counts twice."""
    above, below = x.chunk(2, 1)
    return torch.cat([t.flatten(1) for t in (gram(above), gram(below), above @ below.mT)], 1)


def norms(of_x: Tensor, of_g: Tensor) -> Tensor:
    """Of gradients with these Gram matrices."""
    return (of_x.double() * of_g.double()).sum((1, 2)).clamp_min(0).sqrt()


GRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": gram, "bfloat16": coarse, "bfloat16, two parts": from_parts, "float32, one half": halves,
}  # fmt: skip


def of_layer(n: int, t: int, i: int, o: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of both Gram matrices by each way, and the largest relative error of a norm."""
    x, g = torch.randn(n, t, i), torch.randn(n, t, o)
    exact = norms(gram(x.double()), gram(g.double()))
    found = {}
    for name, way in GRAMS.items():
        found[name] = {"ms": 1e3 * seconds(lambda way=way: (way(x), way(g)), repeats)}
        if way is not halves:
            found[name]["error"] = float(((norms(way(x), way(g)) - exact) / exact).abs().max())
    return found


def with_zeros(rows: int, i: int, o: int, share: float, repeats: int) -> dict[str, float]:
    """Milliseconds of a weight's gradient from an input with this share of zeros, dense, and sparse if given so."""
    x, g = torch.randn(i, rows), torch.randn(rows, o)
    x[torch.rand_like(x) < share] = 0
    sparse = x.to_sparse_csr()
    return {
        "dense": 1e3 * seconds(lambda: x @ g, repeats),
        "sparse": 1e3 * seconds(lambda: sparse @ g, repeats),
        "making it sparse": 1e3 * seconds(x.to_sparse_csr, repeats),
    }


def measured(repeats: int) -> dict:
    """All of it."""
    layers = {
        f"linear {i} to {o}, N={n}, T={t}": of_layer(n, t, i, o, repeats)
        for n, t, i, o in tqdm(LAYERS, "Gram matrices")
    }
    zeros = {
        f"{rows} rows, {i} to {o}, zeros: {name}": with_zeros(rows, i, o, share, repeats)
        for rows, i, o in tqdm(BATCHES, "zeros")
        for name, share in ZEROS.items()
    }
    return {"layers": layers, "zeros": zeros}


def rst(data: dict) -> list[str]:
    """Both tables."""
    names = list(next(iter(data["layers"].values())))
    lines = ["Both Gram matrices of a linear layer, in milliseconds, and the largest relative error of a norm:", ""]
    table = [["layer", *names]]
    for layer, found in data["layers"].items():
        table.append([layer, *(_cell(found[name]) for name in names)])
    lines += [*report.rst_table(table), "", "The gradient of a weight from an input with zeros, in milliseconds:", ""]
    names = list(next(iter(data["zeros"].values())))
    table = [
        ["product", *names],
        *([what, *(f"{found[n]:.1f}" for n in names)] for what, found in data["zeros"].items()),
    ]
    return [*lines, *report.rst_table(table), "", report.sentence("tried.py", data["system"]).replace("`", "``")]


def _cell(found: dict[str, float]) -> str:
    text = f"{found['ms']:.1f}"
    return f"{text} ({found['error']:.0e})" if "error" in found else text


def tables(data: dict, options: argparse.Namespace) -> None:
    """Both tables, for the documentation."""
    report.put(report.PAGE, "tried", rst(data), options.out)


if __name__ == "__main__":
    report.time_products("tried", __doc__, 15, measured, tables)
