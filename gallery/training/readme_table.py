"""Run the digits training on five seeds and write the table of the README."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from digits import parse_arguments, run

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- digits:start -->", "<!-- digits:end -->"


def table(results: list[dict[str, float]], options: object) -> str:
    """Mean and range of what the runs have printed, as Markdown."""

    def span(key: str, form: str) -> str:
        values = [result[key] for result in results]
        return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    lines = [
        f"| digits, {len(results)} seeds | test accuracy | epsilon at delta {options.delta:g} | training, seconds |",
        "|---|---|---|---|",
        f"| private (DP-SGD) | {span('accuracy', '.1%')} | {results[0]['epsilon']:.2f} | {span('seconds', '.1f')} |",
        f"| not private | {span('plain_accuracy', '.1%')} | none | {span('plain_seconds', '.1f')} |",
        "",
        f"Mean (least to most); written by `python gallery/training/readme_table.py` with torch "
        f"{torch.__version__.partition('+')[0]}, Python {platform.python_version()} and {torch.get_num_threads()} "
        f"CPU cores.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the table between the README's markers."""
    results = [run(parse_arguments(["--seed", str(seed)])) for seed in range(5)]
    before, _, rest = README.read_text().partition(START)
    text = table(results, parse_arguments([]))
    README.write_text(f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
