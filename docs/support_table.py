"""Write the table of supported modules from the registry of rules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import perexample
from perexample.extensions import BatchGrad


def _first_line(rule: object) -> str:
    return (type(rule).__doc__ or "").strip().splitlines()[0].rstrip(".")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto", ""]
    for row in (header, *rows):
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(row)]
    return [*lines, ""]


def supported() -> list[tuple[str, ...]]:
    """Classes and functions of each rule, and what the rule says of itself."""
    modules: dict[type, list[str]] = {}
    functions: dict[type, list[str]] = {}
    described = {}
    for cls, rule in perexample.registered_rules().items():
        if cls.__module__.startswith("torch"):
            modules.setdefault(type(rule), []).append(cls.__name__)
            described[type(rule)] = _first_line(rule)
    for function, rule in perexample.registered_functions().items():
        name = {"__getitem__": "table[ids]", "__matmul__": "x @ W"}.get(function.__name__, function.__name__)
        known = functions.setdefault(type(rule), [])
        known += [] if f"``{name}``" in known else [f"``{name}``"]
        described[type(rule)] = _first_line(rule)
    return [
        (", ".join(modules.get(rule, [])), ", ".join(functions.get(rule, [])), f"``{rule.__name__}``", text)
        for rule, text in described.items()
    ]


class MyModel(nn.Module):
    """A model of one operation before a layer."""

    def __init__(self, function: Callable, **parts: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(4, 4)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, self.layer(x))


class Doubled(torch.autograd.Function):
    """A function that operations do not show."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() * w.detach().numpy())

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(tuple(range(x.dim() - 1)))


OPERATIONS: dict[str, Callable] = {
    "statistics of the batch: ``x - x.mean(0)``": lambda m, x: m.layer(x - x.mean(0)),
    "an activation over the batch: ``x.softmax(0)``": lambda m, x: m.layer(x.softmax(0)),
    "products of examples: ``x @ x.T``": lambda m, x: (x[:, 0] @ x[:, 0].T).unsqueeze(-1) * m.layer.bias,
    "``F.batch_norm(x, None, None, training=True)``": lambda m, x: m.layer(F.batch_norm(x, None, None, training=True)),
    "neighbours: ``x + x.roll(1, 0)``": lambda m, x: m.layer(x + x.roll(1, 0)),
    "another order in the output: ``x.flip(0)``": lambda m, x: m.layer(x).flip(0),
    "the batch on two axes: ``x.view(2, N // 2, ...)``": lambda m, x: m.layer(x.view(2, len(x) // 2, 5, 4)).reshape(
        x.shape
    ),
    "a ``torch.autograd.Function`` with a parameter, in a module with children": lambda m, x: Doubled.apply(
        x, m.layer.bias
    ),
    "a penalty on parameters in the loss": lambda m, x: m.layer(x).square().mean() + m.other.weight.square().sum(),
    "``torch.compile`` of a part, where operations are hidden": lambda m, x: torch.compile(
        m.other, backend="aot_eager"
    )(m.layer(x)),
}


def refused_operations() -> list[tuple[str, ...]]:
    """What is refused in a forward, with the error that a backward gives."""
    rows = []
    for title, function in OPERATIONS.items():
        model = perexample.extend(MyModel(function, other=nn.Linear(4, 4)))
        try:
            with perexample.perex(BatchGrad()):
                model(torch.randn(6, 5, 4)).mean().backward()
        except perexample.PerExampleError as error:
            rows.append((title, f"``{type(error).__name__}``", str(error).partition(". ")[0].replace("`", "``")))
        else:
            raise AssertionError(f"not refused: {title}")
    return rows


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
    lines += _table(("modules", "functions", "rule", "what it computes"), supported())
    lines += ["Refused", "-------", ""]
    lines += _table(("module", "reason given"), refused())
    lines += ["In a forward, an operation is refused if the loss depends on its result:", ""]
    lines += _table(("operation", "error", "message"), refused_operations())
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
