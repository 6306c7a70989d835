"""Draw the picture of the architecture: how a batch flows through taps, walk, rules and terms to a private step."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK = "#5b7fa6"  # readable on white and on black
GREEN, RED, GRAY, VIOLET = "#4c9a6a", "#c8664f", "#8a8f98", "#9a6fb0"


def box(axis: plt.Axes, x: float, y: float, width: float, title: str, text: str, color: str = INK) -> None:
    """A box with a title and a line or two of text; x and y are its middle."""
    height = 1.25
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.06,rounding_size=0.14",
        facecolor=color + "22", edgecolor=color, linewidth=1.4,
    )  # fmt: skip
    axis.add_patch(shape)
    axis.text(x, y + 0.3, title, ha="center", va="center", fontsize=11, color=color, weight="bold")
    axis.text(x, y - 0.22, text, ha="center", va="center", fontsize=8.5, color=GRAY, linespacing=1.25)


def arrow(axis: plt.Axes, start: tuple, end: tuple, text: str = "", color: str = GRAY, bend: float = 0.0) -> None:
    """An arrow with a word at its middle."""
    style = f"arc3,rad={bend}"
    patch = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=color, lw=1.4, connectionstyle=style)
    axis.add_patch(patch)
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.17)
        axis.text(*middle, text, ha="center", va="center", fontsize=8.5, color=color)


def main(path: Path) -> None:
    """Draw it to an SVG file."""
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "perexample"
    figure, axis = plt.subplots(figsize=(10.4, 7.4))
    axis.set(xlim=(0, 15.6), ylim=(-2.9, 8.2))
    axis.axis("off")
    axis.text(0.2, 7.85, "forward: extend(model)", fontsize=10, color=INK)
    box(axis, 1.8, 6.7, 2.6, "model(x)", "modules as they are", GRAY)
    box(axis, 6.0, 6.7, 3.4, "follow", "every call and operation:\nwhere are the examples?")
    box(axis, 10.4, 6.7, 3.2, "tap", "parameters meet data;\nthe input is saved")
    box(axis, 14.1, 6.7, 2.2, "loss", "mean or sum", GRAY)
    arrow(axis, (3.2, 6.7), (4.2, 6.7))
    arrow(axis, (7.8, 6.7), (8.7, 6.7))
    arrow(axis, (12.1, 6.7), (12.9, 6.7))
    axis.text(0.2, 5.3, "backward: perex(...)", fontsize=10, color=GREEN)
    box(axis, 14.1, 4.1, 2.2, "walk", "live taps, N,\ncoverage", GREEN)
    box(axis, 10.4, 4.1, 3.2, "autograd", "once; without weight\ngradients if grad=False", GRAY)
    box(axis, 6.0, 4.1, 3.4, "rules", "(call, g) to terms, pulled\nback to the parameters", GREEN)
    box(axis, 1.8, 4.1, 2.6, "terms", "Outer, Rows, Dense ...\nnot evaluated", GREEN)
    arrow(axis, (14.1, 5.9), (14.1, 4.95))
    arrow(axis, (12.9, 4.1), (12.15, 4.1))
    arrow(axis, (8.7, 4.1), (7.85, 4.1), "g")
    arrow(axis, (4.2, 4.1), (3.25, 4.1))
    arrow(axis, (10.0, 5.95), (7.0, 4.92), bend=0.12)
    axis.text(8.35, 5.95, "saved x", ha="center", va="center", fontsize=8.5, color=GRAY)
    axis.text(0.2, 2.55, "fields", fontsize=10, color=RED)
    box(axis, 1.8, 1.3, 2.6, "view", "a parameter: the sum\nof all its terms", RED)
    box(axis, 6.0, 1.3, 3.4, "extensions", "ask views for gradients,\nnorms, weighted sums", RED)
    box(axis, 10.4, 1.3, 3.2, "p.grad_batch ...", "p.batch_l2, p.clipped_sum", RED)
    box(axis, 14.1, 1.3, 2.2, "privatize", "a hook before the\noptimizer's step", GRAY)
    arrow(axis, (1.8, 3.3), (1.8, 2.15))
    arrow(axis, (3.25, 1.3), (4.2, 1.3))
    arrow(axis, (7.85, 1.3), (8.7, 1.3))
    arrow(axis, (12.15, 1.3), (12.9, 1.3))
    axis.text(0.2, -0.2, "private step", fontsize=10, color=VIOLET)
    box(axis, 14.1, -1.5, 2.2, "sampler", "were as many\nexamples drawn?", VIOLET)
    box(axis, 10.4, -1.5, 3.2, "ledger", "what the step costs,\nwritten down first", VIOLET)
    box(axis, 6.0, -1.5, 3.4, "processes, noise", "clipped sums added up,\nnoise once, in float64", VIOLET)
    box(axis, 1.8, -1.5, 2.6, "optimizer", "its own step on\nsum / expected size", GRAY)
    arrow(axis, (14.1, 0.5), (14.1, -0.65))
    arrow(axis, (12.9, -1.5), (12.15, -1.5))
    arrow(axis, (8.7, -1.5), (7.85, -1.5))
    arrow(axis, (4.2, -1.5), (3.25, -1.5))
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(__file__).parent / "_static" / "architecture.svg")
