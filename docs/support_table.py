"""Write the table of supported modules from the registry of rules."""

from pathlib import Path

import torch
from torch import nn

import perexample


def _first_line(rule: object) -> str:
    return (type(rule).__doc__ or "").strip().splitlines()[0].rstrip(".")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    for row in (header, *rows):
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(row)]
    return [*lines, ""]


def supported() -> list[tuple[str, ...]]:
    """Classes of each rule, and what the rule says of itself."""
    by_rule: dict[type, list[str]] = {}
    described = {}
    for cls, rule in perexample.registered_rules().items():
        if cls.__module__.startswith("torch"):
            by_rule.setdefault(type(rule), []).append(cls.__name__)
            described[type(rule)] = _first_line(rule)
    return [(", ".join(names), f"``{rule.__name__}``", described[rule]) for rule, names in by_rule.items()]


def refused() -> list[tuple[str, ...]]:
    """Modules that are refused, with the reason that the error gives."""
    modules = {
        "BatchNorm1d, 2d, 3d, SyncBatchNorm in training mode": nn.BatchNorm1d(2),
        "BatchNorm without running statistics": nn.BatchNorm1d(2, track_running_stats=False).eval(),
        "InstanceNorm with tracked statistics in training mode": nn.InstanceNorm1d(2, track_running_stats=True),
        "Embedding, EmbeddingBag with ``scale_grad_by_freq``": nn.Embedding(2, 2, scale_grad_by_freq=True),
        "Embedding, EmbeddingBag with ``max_norm``": nn.Embedding(2, 2, max_norm=1.0),
    }
    rows = []
    for title, module in modules.items():
        try:
            perexample.extend(module)
        except perexample.UnsupportedModuleError as error:
            rows.append((title, str(error).partition(") ")[2]))
    assert len(rows) == len(modules)
    return rows


def main(path: Path) -> None:
    """Write both tables."""
    lines = ["Rules", "-----", "", f"As registered, with torch {torch.__version__.partition('+')[0]}.", ""]
    lines += _table(("modules", "rule", "what it computes"), supported())
    lines += ["Refused", "-------", ""]
    lines += _table(("module", "reason given"), refused())
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
