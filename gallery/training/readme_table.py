"""Train on the digits with twenty seeds, by the command of the README, and write the table that is under it."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path

import torch
from train import main

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- digits:start -->", "<!-- digits:end -->"
SEEDS = 20
Results = list[dict[str, float | None]]


def span(results: Results, key: str, form: str) -> str:
    """Mean and range."""
    values = [float(result[key] or 0) for result in results]
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(private: Results, plain: Results) -> str:
    """What the runs have come to, as Markdown."""
    version = torch.__version__.split("+")[0]
    epsilon = max(float(result["epsilon"] or 0) for result in private)
    private_row, plain_row = (
        (span(rows, "test_accuracy", ".1%"), span(rows, "total_seconds", ".1f")) for rows in (private, plain)
    )
    return "\n".join([
        f"| digits, {SEEDS} seeds | test accuracy | epsilon at delta 0.0001 | training, seconds |",
        "|---|---|---|---|",
        f"| private (DP-SGD) | {private_row[0]} | {epsilon:.2f} | {private_row[1]} |",
        f"| not private | {plain_row[0]} | none | {plain_row[1]} |",
        "",
        f"Mean (least to most); written by `python gallery/training/readme_table.py` with torch {version}, "
        f"Python {platform.python_version()} and {torch.get_num_threads()} CPU cores.",
    ])  # fmt: skip


def write() -> None:
    """Run and write."""
    with tempfile.TemporaryDirectory() as folder:
        results = main(["--repeat", str(SEEDS), "--out", f"{folder}/runs"])
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    text = f"{before}{START}\n{table(results['clipped'], results['plain'])}\n{END}{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
