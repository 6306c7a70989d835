"""The comparisons of two predecessors, with their strategies written anew beside this library's.

* gradcnn (Rochette, Manoel and Tramel 2019, arXiv:1912.06015), its Figure 1: CNNs of several depths over the rate at
  which channels grow; one backward per example (``naive``), one copy of the model per example (``multi``), and
  per-example gradients by convolutions with a group for each example (``crb``).
* fastgc (Lee and Kifer 2021): models of several kinds; one backward per example (``naive``), one ``autograd.grad`` per
  example after a single forward (``multi``), and two backward passes, for norms and for the weighted loss
  (``reweight``).

Each strategy is checked against one backward per example before it is timed. Writes ``seeds.json``, tables in
``docs/performance.rst``, and plots::

    python gallery/benchmarks/seeds.py
"""

from __future__ import annotations

import argparse
import copy
import warnings
from functools import partial
from pathlib import Path

import measure
import report
import torch
import torch.nn.functional as F
from models import Case, Encoder, images, mlp, seed_cnn, tokens, vectors
from systems import BOUND, Loop, OursClipped, OursNorms, Problem, System, clip_and_sum
from torch import Tensor, nn
from tqdm import tqdm

from perexample import perex


class Rows(System):
    """A strategy that forms per-example gradients, and then clips and sums them."""

    def rows(self) -> dict[str, Tensor]:
        """Per-example gradients."""
        raise NotImplementedError

    def zero(self) -> None:
        super().zero()
        self.sums: dict[str, Tensor] = {}

    def step(self) -> None:
        self.zero()
        self.sums = clip_and_sum(self.rows())

    def clipped(self) -> dict[str, Tensor]:
        return self.sums


class Copies(Rows):
    """A copy of the model for each example; all copies share the values of the parameters."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        shared = {id(p): p.data for p in self.model.parameters()}
        memo = [{id(p): nn.Parameter(shared[id(p)]) for p in self.model.parameters()} for _ in range(len(self.x))]
        self.copies = nn.ModuleList(copy.deepcopy(self.model, each) for each in memo)

    def zero(self) -> None:
        super().zero()
        self.copies.zero_grad(set_to_none=True)

    def rows(self) -> dict[str, Tensor]:
        pairs = zip(self.copies, self.x.split(1), self.y.split(1), strict=True)
        torch.cat([self.problem.case.losses(model(x), y) for model, x, y in pairs]).sum().backward()
        each = [dict(model.named_parameters()) for model in self.copies]
        return {name: torch.stack([found[name].grad for found in each]) for name in self.parameters}


class GroupedConvolutions(Rows):
    """Gradients of a convolution's weight for all examples as one convolution that has a group for each."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.found: dict[nn.Parameter, Tensor] = {}
        for module in self.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(self.watch)

    def watch(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Ask for the gradient of a layer's output."""
        x = inputs[0].detach()
        output.register_hook(lambda g: self.keep(module, x, g))

    def keep(self, module: nn.Module, x: Tensor, g: Tensor) -> None:
        """Per-example gradients of a layer."""
        if isinstance(module, nn.Linear):
            self.found[module.weight], self.found[module.bias] = torch.einsum("no,ni->noi", g, x), g
            return
        n, outputs = g.shape[:2]
        # Channels of the input are the batch, examples the groups; stride and dilation change places.
        whole = F.conv2d(
            x.transpose(0, 1),
            g.reshape(n * outputs, 1, *g.shape[2:]),
            padding=module.padding,
            stride=module.dilation,
            dilation=module.stride,
            groups=n,
        )
        height, width = module.kernel_size
        rows = whole[..., :height, :width].unflatten(1, (n, outputs)).permute(1, 2, 0, 3, 4)
        self.found[module.weight], self.found[module.bias] = rows, g.sum((2, 3))

    def zero(self) -> None:
        super().zero()
        self.found.clear()

    def rows(self) -> dict[str, Tensor]:
        self.losses().sum().backward()
        return {name: self.found[p] for name, p in self.parameters.items()}


class OneForward(Rows):
    """One forward, and then the gradient of each example's loss by itself."""

    def rows(self) -> dict[str, Tensor]:
        parameters = list(self.parameters.values())
        grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in self.losses()]
        return {name: torch.stack(each) for name, each in zip(self.parameters, zip(*grads, strict=True), strict=True)}


class Reweight(OursNorms):
    """Two backward passes: norms (this library's), then the gradient of the weighted loss."""

    def step(self) -> None:
        self.zero()
        losses = self.losses()
        with perex(self.asked, grad=False):
            losses.mean().backward(retain_graph=True)
        factors = (BOUND / self.norms()).clamp(max=1.0)
        (factors * losses).sum().backward()

    def clipped(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items()}


OURS = "ClippedGrad"
GRADCNN = {"plain": System, "naive": Loop, "multi": Copies, "crb": GroupedConvolutions, OURS: OursClipped}
FASTGC = {"plain": System, "naive": Loop, "multi": OneForward, "reweight": Reweight, OURS: OursClipped}
COLOURS = {"naive": "loop", "multi": "Opacus hooks", "crb": "BackPACK", "reweight": "Opacus ghost"}


def rate_cnn(layers: int, rate: float, size: int, first: int = 25, kernel: int = 5) -> nn.Module:
    """Convolutions whose channels grow by a rate, each two followed by pooling, and one linear layer."""
    modules: list[nn.Module] = []
    before = 3
    for number in range(layers):
        after = round(first * rate**number)
        modules += [nn.Conv2d(before, after, kernel), nn.ReLU()]
        size -= kernel - 1
        if number % 2:
            modules.append(nn.MaxPool2d(2))
            size //= 2
        before = after
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(before * size**2, 10))


class Recurrent(nn.Module):
    """A recurrent layer over the rows of an image, and a head on its last output."""

    def __init__(self, kind: type[nn.RNN] | type[nn.LSTM], width: int = 128) -> None:
        super().__init__()
        self.layer, self.head = kind(28, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def rows_of_images(n: int) -> tuple[Tensor, Tensor]:
    """Random images of one channel as 28 rows."""
    return torch.randn(n, 28, 28), torch.randint(10, (n,))


def kinds(n: int) -> dict[str, Case]:
    """The models of fastgc's comparison, small."""
    return {
        "MLP": Case("MLP 784-128-128-10", partial(mlp, 128), vectors(784), n),
        "CNN": Case("CNN, 28x28", seed_cnn, images(1, 28), n),
        "RNN": Case("RNN, 128, T=28", partial(Recurrent, nn.RNN), rows_of_images, n),
        "LSTM": Case("LSTM, 128, T=28", partial(Recurrent, nn.LSTM), rows_of_images, n),
        "Transformer": Case("Transformer, 1 layer, d=128, T=64", partial(Encoder, 1, 128, 64), tokens(64, 1000), n),
    }


def run(data: dict, options: argparse.Namespace) -> None:
    """Measure both comparisons."""
    for layers in tqdm(options.layers, desc="gradcnn", disable=None):
        for rate in options.rates:
            make = partial(rate_cnn, layers, rate, options.size)
            case = Case(f"{layers} layers", make, images(3, options.size), options.cnn_batch)
            data["gradcnn"][f"{layers}, {rate:g}"] = timings(case, GRADCNN, options)
    for name, case in tqdm(kinds(options.batch).items(), desc="fastgc", disable=None):
        data["fastgc"][name] = timings(case, FASTGC, options)


def timings(case: Case, strategies: dict[str, type[System]], options: argparse.Namespace) -> dict[str, dict]:
    """Checked and timed."""
    problem = Problem.of(case)
    return measure.timings(problem, list(strategies), options.repeats, options.seconds, kinds=strategies)


def cell(strategy: str, entry: dict) -> str:
    """Milliseconds and the ratio to the plain step."""
    if "failed" in entry:
        return "wrong" if entry["failed"].startswith("wrong") else "no"
    if "seconds" not in entry:
        return ""
    ratio = "" if strategy == "plain" else f" ({entry['ratio'][1]:.2f} x)"
    return f"{1e3 * entry['seconds'][1]:.1f}{ratio}"


def table(found: dict[str, dict], head: str, strategies: dict[str, type[System]]) -> list[str]:
    """Milliseconds of a step of each strategy."""
    rows = [[head, *strategies]]
    rows += [[name, *(cell(each, entries.get(each, {})) for each in strategies)] for name, entries in found.items()]
    return report.rst_table(rows)


def rst(data: dict) -> list[str]:
    """The tables of the documentation."""
    why = [
        "* " + report.rst_text(f"{strategy}, {name}: {entry['failed']}")
        for part in ("gradcnn", "fastgc")
        for name, entries in data[part].items()
        for strategy, entry in entries.items()
        if "failed" in entry
    ]
    settings = data["settings"]
    return [
        'Milliseconds of a step, and the median ratio to the plain step beside it; "plain" does not clip.',
        "",
        f"The comparison of gradcnn (Rochette, Manoel and Tramel 2019): CNNs on {settings['size']}x{settings['size']} "
        f'images, N={settings["cnn_batch"]}, by number of layers and channel rate. "naive" is one backward per '
        f'example, "multi" one copy of the model per example, "crb" convolutions with a group per example.',
        "",
        *report.rst_image("seeds-gradcnn.svg", "Milliseconds of a step over the channel rate, for each depth"),
        *table(data["gradcnn"], "layers, rate", GRADCNN),
        "",
        f'The comparison of fastgc (Lee and Kifer 2021), N={settings["batch"]}: "multi" is one forward and a gradient '
        f'per example, "reweight" a backward for norms (this library\'s) and one of the weighted loss.',
        "",
        *report.rst_image("seeds-fastgc.svg", "Ratio to the plain step of each strategy on each model"),
        *table(data["fastgc"], "model", FASTGC),
        "",
        *([*why, ""] if why else []),
        report.sentence("seeds.py", data["system"]).replace("`", "``"),
    ]


def style_of(strategy: str) -> dict[str, object]:
    """Colour and marker of a strategy, those of the system it is like."""
    return report.style_of(COLOURS.get(strategy, strategy))


def plot_gradcnn(data: dict, path: Path) -> None:
    """Milliseconds over the channel rate, a picture for each depth."""
    depths = list(dict.fromkeys(name.partition(",")[0] for name in data["gradcnn"]))
    with report.drawing(path, 1, len(depths), (2.8 * len(depths) + 0.4, 3.0)) as axes:
        for axis, depth in zip(axes, depths, strict=True):
            for strategy in GRADCNN:
                points = [
                    (float(name.partition(",")[2]), 1e3 * entries[strategy]["seconds"][1])
                    for name, entries in data["gradcnn"].items()
                    if name.startswith(f"{depth},") and "seconds" in entries.get(strategy, {})
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), markersize=4.5, label=strategy, **style_of(strategy))
            axis.set_yscale("log")
            report.figures(axis, "y")
            axis.set_title(f"{depth} layers", color=report.GRAY)
            axis.set_xlabel("channel rate")
            axis.grid()
        axes[0].set_ylabel("ms")
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(GRADCNN))


def plot_fastgc(data: dict, path: Path) -> None:
    """A dot for each strategy on each model's line."""
    with report.drawing(path, 1, 1, (7.0, 2.6)) as (axis,):
        for strategy in list(FASTGC)[1:]:
            points = [
                (entries[strategy]["ratio"][1], y)
                for y, entries in enumerate(data["fastgc"].values())
                if "ratio" in entries.get(strategy, {})
            ]
            if points:
                axis.plot(*zip(*points, strict=True), linestyle="", label=strategy, **style_of(strategy))
        axis.axvline(1.0, color=report.GRAY, linewidth=1, linestyle="--")
        axis.set_xscale("log")
        report.figures(axis, "x")
        axis.set_yticks(range(len(data["fastgc"])), list(data["fastgc"]))
        axis.invert_yaxis()
        axis.set_xlabel("time, as a ratio to the plain step")
        axis.grid()
        axis.figure.legend(loc="outside upper center", ncols=len(FASTGC))


def tables(data: dict, options: argparse.Namespace) -> None:
    """Write tables and plots of all numbers there are."""
    if not data.get("gradcnn"):
        report.put(report.PAGE, "seeds", [report.NOT_YET], options.out)
        return
    report.put(report.PAGE, "seeds", rst(data), options.out)
    folder = options.out or report.PLOTS
    plot_gradcnn(data, folder / "seeds-gradcnn.svg")
    plot_fastgc(data, folder / "seeds-fastgc.svg")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 3, 4], help="numbers of convolutions")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 1.25, 1.5, 1.75, 2.0], help="channel rates")
    parser.add_argument("--size", type=int, default=64, help="of gradcnn's images (default: 64; its own: 256)")
    parser.add_argument("--cnn-batch", type=int, default=8, help="N of gradcnn's comparison (default: 8)")
    parser.add_argument("--batch", type=int, default=64, help="N of fastgc's comparison (default: 64)")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each strategy (default: 15)")
    parser.add_argument("--seconds", type=float, default=10.0, help="cap for a strategy and model (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--smoke", action="store_true", help="smallest settings and one repeat, to see that all works")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing")
    parser.add_argument("--tables", action="store_true", help="only write tables and plots of the numbers there are")
    parser.add_argument("--out", type=Path, help="write everything to this folder instead")
    options = parser.parse_args()
    if options.smoke:
        options.layers, options.rates, options.size, options.repeats = [2, 3], [1.0, 2.0], 24, 1
        options.cnn_batch, options.batch = 2, 4
    if options.smoke and not (options.dry or options.out):
        parser.error("numbers of small settings are not for the documentation: add --out or --dry")
    return options


def main() -> None:
    """Measure, and write what was found."""
    options = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    path = (options.out or report.HERE) / "seeds.json"
    data = report.load(path)
    if not options.tables:
        settings = {key: getattr(options, key) for key in ("size", "cnn_batch", "batch")}
        system = report.system_info("cpu", options.threads)
        system = {key: value for key, value in system.items() if key not in ("opacus", "backpack-for-pytorch")}
        data = {"gradcnn": {}, "fastgc": {}, "settings": settings, "system": system}
        run(data, options)
        if not options.dry:
            report.save(path, data)
    if data:
        print("\n".join(rst(data)))
    if not options.dry:
        tables(report.rounded(data), options)


if __name__ == "__main__":
    main()
