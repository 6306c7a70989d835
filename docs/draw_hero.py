"""Draw the README's first picture: what a backward leaves behind, and what it leaves in a context, on real digits."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "gallery" / "training"))
from digits import load_data, make_model

from perexample import extend, perex
from perexample.extensions import BatchL2Grad

INK, RED, GRAY = "#5b7fa6", "#c8664f", "#8a8f98"  # readable on white and on black
N, C = 56, 2.0


def trained_norms() -> tuple[torch.Tensor, float, torch.Tensor]:
    """Norms of some digits' gradients in a network that has learnt a little, that of their mean, and the images."""
    data, model, loss_fn = load_data(), extend(make_model("mlp", 0)), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model(data.x), data.y).backward()
        optimizer.step()
    optimizer.zero_grad()
    with perex(BatchL2Grad()):
        loss_fn(model(data.x[:N]), data.y[:N]).backward()
    total = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    return sum(p.batch_l2 for p in model.parameters()).sqrt(), total, data.x[:N, 0]


def main(path: Path) -> None:
    """Draw it to an SVG file."""
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "perexample"
    norms, mean, images = trained_norms()
    figure = plt.figure(figsize=(10, 2.9))
    left = figure.add_axes((0.065, 0.17, 0.13, 0.6))
    right = figure.add_axes((0.275, 0.17, 0.64, 0.6))
    top = float(norms.max()) * 1.12
    left.bar([0], [mean], color=GRAY, width=0.5)
    left.set(xlim=(-1, 1), xticks=[], ylim=(0, top), ylabel="norm of the gradient")
    left.text(0, mean + 0.02 * top, "p.grad", ha="center", va="bottom", color=GRAY, family="monospace", fontsize=9)
    left.text(0, -0.05 * top, "mean of all examples", ha="center", va="top", color=GRAY, fontsize=9)
    kept = norms.clamp(max=C)
    right.bar(range(N), kept, color=INK, width=0.72)
    right.bar(range(N), norms - kept, bottom=kept, color=RED + "55", edgecolor=RED, linewidth=0.6, width=0.72)
    right.axhline(C, color=RED, linestyle="--", linewidth=1.2)
    right.text(N + 0.3, C, "clipped to C", ha="left", va="center", color=RED, fontsize=9)
    right.set(xlim=(-0.8, N - 0.2), xticks=[], ylim=(0, top), yticklabels=[])
    right.text(
        N / 2, -0.05 * top, f"each of {N} digits: its own gradient", ha="center", va="top", color=GRAY, fontsize=9
    )
    for n in norms.topk(3).indices.tolist():
        inset = right.inset_axes((n - 1.3, float(norms[n]) + 0.01 * top, 2.6, 0.15 * top), transform=right.transData)
        inset.imshow(images[n], cmap="gray_r")
        inset.set(xticks=[], yticks=[])
        inset.spines[:].set_color(GRAY)
    code = {"family": "monospace", "fontsize": 10.5, "va": "bottom"}
    figure.text(0.02, 0.86, "loss.backward()", color=GRAY, **code)
    figure.text(
        0.275, 0.86, "with perex(BatchGrad(), BatchL2Grad(), ClippedGrad(C)): loss.backward()", color=INK, **code
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRAY)
        axis.tick_params(colors=GRAY, labelsize=8)
        axis.yaxis.label.set_color(GRAY)
        axis.set_facecolor("none")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(__file__).parent / "_static" / "hero.svg")
