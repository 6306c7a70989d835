"""What following the forward costs: a training step of an extended model against the same step of the plain one.

Both run in one process in turn, no context is open, and the medians are compared. Writes a JSON file and the table in
``docs/performance.rst`` between its markers::

    python gallery/benchmarks/follow.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from perexample import extend, unextend

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "performance.rst"


class Block(nn.Module):
    """A residual block of ResNet-18 with group norms."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)
        same = stride == 1 and c_in == c_out
        self.short = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.short(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 32 x 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU()]
    width = 64
    for c_out, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        layers.append(Block(width, c_out, stride))
        width = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Transformer(nn.Module):
    """Twelve encoder layers with a bare position table and class token."""

    def __init__(self, layers: int = 12, width: int = 256, length: int = 128) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x + self.positions).mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "transformer, 12 layers, d=256, T=128, N=16": (Transformer, lambda: torch.randn(16, 128, 256)),
    "ResNet-18, 32x32, N=32": (resnet18, lambda: torch.randn(32, 3, 32, 32)),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return time.perf_counter() - start


def measure(make: Callable[[], nn.Module], data: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Median seconds of both, and the median ratio of neighbouring steps."""
    torch.manual_seed(0)
    model, x = make(), data()
    y = torch.randint(10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plain, followed, first = [], [], 0.0
    for number in tqdm(range(repeats + 2), leave=False):
        seconds = {}
        for kind in (unextend, extend) if number % 2 else (extend, unextend):  # neither always comes first
            kind(model)
            seconds[kind] = step(model, optimizer, x, y)
        a, b = seconds[unextend], seconds[extend]
        if number == 0:
            first = b
        if number >= 2:
            plain.append(a)
            followed.append(b)
    ratios = sorted(b / a for a, b in zip(plain, followed, strict=True))
    return {
        "plain": statistics.median(plain), "followed": statistics.median(followed), "first": first,
        "ratio": statistics.median(ratios), "low": ratios[len(ratios) // 4], "high": ratios[-len(ratios) // 4],
    }  # fmt: skip


def table(results: dict[str, dict[str, float]]) -> list[str]:
    """The results as a reStructuredText table."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    head = ("model", "plain step, ms", "extended, ms", "ratio (quartiles)", "first extended step, ms")
    rows = [head]
    for name, r in results.items():
        spread = f"{r['ratio']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
        rows.append((name, f"{1e3 * r['plain']:.0f}", f"{1e3 * r['followed']:.0f}", spread, f"{1e3 * r['first']:.0f}"))
    for row in rows:
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(row)]
    system = f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    lines += [
        "",
        f"Written by ``python gallery/benchmarks/follow.py`` with {system}, {torch.get_num_threads()} CPU threads.",
    ]
    return lines


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="steps of each kind (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: measure(make, data, options.repeats) for name, (make, data) in CASES.items()}
    lines = table(results)
    print("\n".join(lines))
    if not options.dry:
        (HERE / "follow.json").write_text(json.dumps(results, indent=2) + "\n")
        text = PAGE.read_text()
        before, after = text.partition(".. follow:start")[0], text.partition(".. follow:end")[2]
        PAGE.write_text(before + ".. follow:start\n\n" + "\n".join(lines) + "\n\n.. follow:end" + after)


if __name__ == "__main__":
    main()
