"""The errors page: every exception with code that raises it. The code is run when the documentation is built."""

from __future__ import annotations

import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import perexample


@dataclass(frozen=True)
class Example:
    """Code that ends in an error, and what one would write instead."""

    title: str
    wrong: str
    right: str


@dataclass(frozen=True)
class Entry:
    """An exception, what it means, and examples of it."""

    name: str
    meaning: str
    examples: tuple[Example, ...]


SETUP = """
from perexample import DP_SGD, Extension, GenericRule, Rule
from perexample import check, extend, perex, register_rule
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad
from perexample.privacy import Ledger, make_private, replace_batchnorm

F = nn.functional
x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
linear = lambda: extend(nn.Linear(4, 3))
"""

ENTRIES = (
    Entry(
        "UnsupportedModuleError",
        "A module cannot have per-example gradients as it is set up.",
        (
            Example(
                "BatchNorm in training mode",
                "extend(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))",
                "extend(replace_batchnorm(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16))))",
            ),
        ),
    ),
    Entry(
        "CrossExampleError",
        "An operation mixes examples, so that no example has a gradient of its own.",
        (
            Example(
                "Normalising over the batch",
                """
                class Centred(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.inner = nn.Linear(4, 3)

                    def forward(self, x):
                        return self.inner(x - x.mean(0))

                model = extend(Centred())
                with perex(BatchGrad()):
                    F.cross_entropy(model(x), y).backward()
                """,
                """
                model = linear()
                with perex(BatchGrad()):
                    F.cross_entropy(model(x - 0.5), y).backward()  # by a constant
                """,
            ),
        ),
    ),
    Entry(
        "UncoveredParameterError",
        "A trainable parameter reaches the loss where nothing could see it, or not at all where it should.",
        (
            Example(
                "A penalty in the loss",
                """
                model = linear()
                with perex(BatchGrad()):
                    (F.cross_entropy(model(x), y) + model.weight.square().sum()).backward()
                """,
                """
                model = linear()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=2.0)
                with perex(BatchGrad()):
                    F.cross_entropy(model(x), y).backward()
                """,
            ),
            Example(
                "A parameter in a method that is called by itself",
                """
                class Scaled(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

                    def logits(self, x):
                        return self.scale * self.layer(x)

                    def forward(self, x):
                        return self.logits(x)

                model = extend(Scaled())
                with perex(BatchGrad()):
                    F.cross_entropy(model.logits(x), y).backward()
                """,
                """
                class Scaled(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

                    def logits(self, x):
                        return self.scale * self.layer(x)

                    def forward(self, x):
                        return self.logits(x)

                model = extend(Scaled())
                with perex(BatchGrad()):
                    F.cross_entropy(model(x), y).backward()
                """,
            ),
            Example(
                "A derivative in the loss",
                """
                model = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
                points = x.clone().requires_grad_()
                with perex(BatchGrad()):
                    total = model(points).sum()
                    slope, = torch.autograd.grad(total, points, create_graph=True)
                    slope.square().mean().backward()
                """,
                """
                class Slope(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.network = nn.Sequential(nn.Linear(4, 3), nn.Tanh())

                    def forward(self, x):
                        points = x.detach().requires_grad_()
                        total = self.network(points).sum()
                        return torch.autograd.grad(total, points, create_graph=True)[0]

                register_rule(Slope)(GenericRule)
                model = extend(Slope())
                with perex(BatchGrad()):
                    model(x).square().mean().backward()
                """,
            ),
        ),
    ),
    Entry(
        "BatchAxisError",
        "The number of examples, or the axis they are on, cannot be told.",
        (
            Example(
                "Two inputs of different length",
                """
                class Pair(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.inner = nn.Linear(4, 3)

                    def forward(self, a, b):
                        return torch.cat([self.inner(a).mean(0, keepdim=True), self.inner(b)])

                model = extend(Pair())
                with perex(BatchGrad()):
                    model(x, x[:5]).square().sum(1).mean().backward()
                """,
                """
                model = linear()
                with perex(BatchGrad()):
                    F.cross_entropy(model(x), y).backward()
                """,
            ),
        ),
    ),
    Entry(
        "LossError",
        "The loss is not one that per-example gradients are defined for.",
        (
            Example(
                "A sum, where a mean was declared",
                """
                model = linear()
                with perex(BatchGrad()):
                    F.cross_entropy(model(x), y, reduction="sum").backward()
                """,
                """
                model = linear()
                with perex(BatchGrad(), loss_reduction="sum"):
                    F.cross_entropy(model(x), y, reduction="sum").backward()
                """,
            ),
            Example(
                "Losses that are not joined",
                """
                model = linear()
                with perex(BatchGrad()):
                    F.cross_entropy(model(x), y, reduction="none").backward(torch.ones(8))
                """,
                """
                model = linear()
                with perex(BatchGrad(), loss_reduction="sum"):
                    F.cross_entropy(model(x), y, reduction="none").sum().backward()
                """,
            ),
        ),
    ),
    Entry(
        "RuleContractError",
        "A rule returned something else than one gradient of shape ``[N, *p.shape]`` for each trainable parameter.",
        (
            Example(
                "A rule that forgets the examples",
                """
                class Scale(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.factor = nn.Parameter(torch.ones(4))

                    def forward(self, x):
                        return x * self.factor

                @register_rule(Scale)
                class ScaleRule(Rule):
                    def grad_batch(self, call, g):
                        return {"factor": (g * call.x).sum(0)}

                model = extend(Scale())
                with perex(BatchGrad()):
                    model(x).square().sum(1).mean().backward()
                """,
                """
                class Scale2(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.factor = nn.Parameter(torch.ones(4))

                    def forward(self, x):
                        return x * self.factor

                @register_rule(Scale2)
                class Scale2Rule(Rule):
                    def grad_batch(self, call, g):
                        return {"factor": g * call.x}

                model = extend(Scale2())
                with perex(BatchGrad()):
                    model(x).square().sum(1).mean().backward()
                """,
            ),
        ),
    ),
    Entry(
        "ExtensionError",
        "An extension, or the context it was given to, is used in a way that cannot work.",
        (
            Example("A class instead of an instance", "perex(BatchGrad)", "perex(BatchGrad())"),
            Example(
                "Contexts within each other",
                """
                with perex(BatchGrad()):
                    with perex(BatchL2Grad()):
                        pass
                """,
                "with perex(BatchGrad(), BatchL2Grad()):\n    pass",
            ),
        ),
    ),
    Entry(
        "StaleGradientError",
        "A clipped sum is missing, was used already, or belongs to a state that no longer exists.",
        (
            Example(
                "A second step on the same sums",
                """
                model, clipping = linear(), ClippedGrad(1.0)
                optimizer = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=1.0,
                                   expected_batch_size=8)
                with perex(clipping, grad=False):
                    F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.step()
                """,
                """
                model, clipping = linear(), ClippedGrad(1.0)
                optimizer = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=1.0,
                                   expected_batch_size=8)
                for _ in range(2):
                    with perex(clipping, grad=False):
                        F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                """,
            ),
        ),
    ),
    Entry(
        "PrivacyBudgetError",
        "Another step would cost more privacy than was planned.",
        (
            Example(
                "More steps than the ledger allows",
                """
                model, clipping = linear(), ClippedGrad(1.0)
                optimizer = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=1.0,
                                   expected_batch_size=8, ledger=Ledger(limit=1))
                for _ in range(2):
                    with perex(clipping, grad=False):
                        F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                """,
                """
                model, clipping = linear(), ClippedGrad(1.0)
                optimizer = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=1.0,
                                   expected_batch_size=8, ledger=Ledger(limit=2))
                for _ in range(2):
                    with perex(clipping, grad=False):
                        F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                """,
            ),
        ),
    ),
    Entry(
        "ConfigurationError",
        "An argument has a value that makes no sense. It is a ``ValueError``, too.",
        (Example("A bound of zero", "ClippedGrad(0.0)", "ClippedGrad(1.0)"),),
    ),
    Entry(
        "CheckFailedError",
        "``check`` found a difference to one backward per example. The report is in ``error.report``.",
        (
            Example(
                "A wrong rule",
                """
                class Shift(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.by = nn.Parameter(torch.zeros(4))

                    def forward(self, x):
                        return x + self.by

                @register_rule(Shift)
                class ShiftRule(Rule):
                    def grad_batch(self, call, g):
                        return {"by": 2 * g}

                check(Shift(), nn.CrossEntropyLoss(), x, y)
                """,
                "check(nn.Linear(4, 3), nn.CrossEntropyLoss(), x, y)",
            ),
        ),
    ),
)

NAMES = {entry.name for entry in ENTRIES} | {"MemoryBoundWarning", "NonFiniteExampleWarning"}


def message(entry: Entry, example: Example) -> str:
    """What the wrong code says; what is right must run."""
    namespace: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(SETUP, namespace)
    exec(textwrap.dedent(example.right), namespace)
    try:
        exec(textwrap.dedent(example.wrong), namespace)
    except getattr(perexample, entry.name) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{entry.name}: {example.title!r} raises nothing")


def _wrapped(text: str) -> list[str]:
    """Long lines broken, those of a table left alone."""
    is_row = re.compile(r" \| |-\+-").search
    return [piece for line in text.splitlines() for piece in ([line] if is_row(line) else textwrap.wrap(line, 84))]


def page() -> list[str]:
    """A section for each exception."""
    lines: list[str] = []
    for entry in ENTRIES:
        lines += [
            f".. _error-{entry.name}:",
            "",
            entry.name,
            "-" * len(entry.name),
            "",
            f":class:`perexample.{entry.name}`: {entry.meaning}",
            "",
        ]
        for example in entry.examples:
            lines += [f"**{example.title}**", "", ".. code-block:: python", ""]
            lines += [textwrap.indent(textwrap.dedent(example.wrong).strip(), "   "), ""]
            lines += [".. code-block:: text", "   :class: message", ""]
            lines += [textwrap.indent("\n".join(_wrapped(message(entry, example))), "   "), ""]
            lines += ["Instead:", "", ".. code-block:: python", ""]
            lines += [textwrap.indent(textwrap.dedent(example.right).strip(), "   "), ""]
    return lines


def main(path: Path) -> None:
    """Write the sections for the page to include."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = "\n".join(page())
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    print("\n".join(page()))
