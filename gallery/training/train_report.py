"""What a run of `train.py` leaves behind: a table of its epochs, and a picture of them."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import torch

Row = dict[str, float | None]
COLUMNS = [
    "epoch", "steps", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "peak_mib", "epsilon",
]  # fmt: skip


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a table, whole or not at all."""
    beside = path.with_suffix(".partial")
    with beside.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows:
            table.writerow({name: "" if value is None else f"{value:.6g}" for name, value in row.items()})
    os.replace(beside, path)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a state, whole or not at all."""
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    os.replace(beside, path)


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Loss, accuracy and epsilon over the epochs."""
    from matplotlib.figure import Figure

    private = rows[-1]["epsilon"] is not None
    figure = Figure(figsize=(10 if private else 7, 3), layout="constrained")
    axes = figure.subplots(1, 3 if private else 2)
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) == 1 else None
    for axis, name in zip(axes, ("loss", "accuracy"), strict=False):
        axis.plot(epochs, [row[f"train_{name}"] for row in rows], label="training", color="C0", ls="--", marker=marker)
        axis.plot(epochs, [row[f"test_{name}"] for row in rows], label="test", color="C0", marker=marker)
        axis.set(xlabel="epoch", ylabel=name)
        axis.legend(frameon=False)
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if private:
        axes[2].plot(epochs, [row["epsilon"] for row in rows], color="C3", marker=marker)
        axes[2].set(xlabel="epoch", ylabel="epsilon spent", ylim=(0, None))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def peak_mib(device: str) -> float | None:
    """Most memory used so far: of the device, or of the whole process on CPU; nothing where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
