"""A grammar of small models and of batches with values at the ends of the number line, for hypothesis.

A model is a tree of layers on ``[N, T, D]``, at most four deep, in which layers may be used again, share their weights
with others, or be frozen. A batch says of each example what it is made of: normal numbers, zeros, infinities, NaN, huge
and tiny ones, in all its entries, in one, or in the weight or the target of its loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

DEPTH = 4
Layer = Callable[[Any, Tensor, Tensor], Tensor]  # module, h [N, T, D], ids [N, T] -> [N, T, D]


@dataclass(frozen=True)
class Sizes:
    """Positions T and width D; the width is even, since attention has two heads."""

    t: int
    d: int


@dataclass(frozen=True)
class Leaf:
    """One layer.

    Attributes:
        kind: A key of `LAYERS`, `SHARED` or `PLAIN`.
        frozen: ``"no"``, ``"all"`` of its parameters, or the ``"first"``.
    """

    kind: str
    frozen: str = "no"


@dataclass(frozen=True)
class Chain:
    """One after the other."""

    parts: tuple[Tree, ...]


@dataclass(frozen=True)
class Residual:
    """``h + part(h)``."""

    part: Tree


Tree = Leaf | Chain | Residual


class Bare(nn.Module):
    """Parameters of no layer: a scale, a shift and a square matrix."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(d)), nn.Parameter(torch.randn(d))
        self.matrix = nn.Parameter(torch.randn(d, d) / d**0.5)


def _attended(m: nn.Module, h: Tensor, _: Tensor) -> Tensor:
    q, k, v = (F.linear(h, m.matrix * m.scale), h * m.scale, h + m.shift)
    return F.scaled_dot_product_attention(q, k, v)


def _image(m: nn.Module, h: Tensor, _: Tensor) -> Tensor:
    return m(h.unflatten(2, (2, -1))).flatten(2)


LAYERS: dict[str, tuple[Callable[[Sizes], nn.Module], Layer]] = {
    "linear": (lambda s: nn.Linear(s.d, s.d), lambda m, h, ids: m(h)),
    "linear-without-bias": (lambda s: nn.Linear(s.d, s.d, bias=False), lambda m, h, ids: m(h)),
    "conv1d": (lambda s: nn.Conv1d(s.t, s.t, 3, padding=1), lambda m, h, ids: m(h)),
    "conv2d": (lambda s: nn.Conv2d(s.t, s.t, 3, padding=1), _image),
    "embedding": (lambda s: nn.Embedding(s.d, s.d), lambda m, h, ids: h + m(ids)),
    "layernorm": (lambda s: nn.LayerNorm(s.d), lambda m, h, ids: m(h)),
    "groupnorm": (lambda s: nn.GroupNorm(1, s.t), lambda m, h, ids: m(h)),
    "lstm": (lambda s: nn.LSTM(s.d, s.d, batch_first=True), lambda m, h, ids: m(h)[0]),
    "gru": (lambda s: nn.GRU(s.d, s.d, batch_first=True), lambda m, h, ids: m(h)[0]),
    "attention": (
        lambda s: nn.MultiheadAttention(s.d, 2, batch_first=True),
        lambda m, h, ids: m(h, h, h, need_weights=False)[0],
    ),
    "bare": (lambda s: Bare(s.d), lambda m, h, ids: (h * m.scale + m.shift) @ m.matrix),
    "bare-attention": (lambda s: Bare(s.d), _attended),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}
SHARED = ("again", "tied-module", "tied-function", "tied-embedding")


class Net(nn.Module):
    """The model of a tree, and a head."""

    def __init__(self, tree: Tree, sizes: Sizes) -> None:
        super().__init__()
        self.tree, self.sizes, self.number = tree, sizes, 0
        self.layers, self.calls = nn.ModuleList(), []
        self._build(tree)
        self.head = nn.Linear(sizes.d, 2)

    def _build(self, tree: Tree) -> None:
        if isinstance(tree, Leaf):
            self.calls.append(self._call(tree.kind))
            if tree.kind in LAYERS:
                _freeze(self.layers[-1], tree.frozen)
            return
        for part in tree.parts if isinstance(tree, Chain) else (tree.part,):
            self._build(part)

    def _call(self, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
        """What a leaf does; what shares something does nothing where there is nothing yet to be shared."""
        if kind in PLAIN:
            return lambda h, ids: PLAIN[kind](h)
        if kind in LAYERS:
            make, layer = LAYERS[kind]
            module = make(self.sizes)
            self.layers.append(module)
            return lambda h, ids: layer(module, h, ids)
        if kind == "again":
            return self.calls[0] if self.calls else lambda h, ids: h
        wanted = nn.Embedding if kind == "tied-embedding" else nn.Linear
        source = next((m for m in self.layers if type(m) is wanted), None)
        if source is None:
            return lambda h, ids: h
        if kind == "tied-module":
            module = nn.Linear(self.sizes.d, self.sizes.d)
            module.weight = source.weight
            self.layers.append(module)
            return lambda h, ids: module(h)
        return lambda h, ids: F.linear(h, source.weight)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        calls = iter(self.calls)
        return self.head(self._run(self.tree, calls, x, ids))

    def _run(self, tree: Tree, calls: Any, h: Tensor, ids: Tensor) -> Tensor:
        if isinstance(tree, Leaf):
            return next(calls)(h, ids)
        if isinstance(tree, Residual):
            return h + self._run(tree.part, calls, h, ids)
        for part in tree.parts:
            h = self._run(part, calls, h, ids)
        return h


def _freeze(module: nn.Module, frozen: str) -> None:
    params = list(module.parameters())
    for p in params if frozen == "all" else params[: frozen == "first"]:
        p.requires_grad_(False)


# -------------------------------------------------------------------------------------------------------------- batches

VALUES = ("normal", "0", "inf", "-inf", "nan", "1e30", "-1e30", "1e-30", "denormal", "any")
PLACES = ("all", "one", "weight", "target")
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # out and y [N, T, 2] -> [N]
    "squared": lambda out, y: (out - y).square().flatten(1).mean(1),
    "linear": lambda out, y: (out * y).flatten(1).sum(1),
    "huber": lambda out, y: F.huber_loss(out, y.expand_as(out), reduction="none").flatten(1).mean(1),
    "cross-entropy": lambda out, y: F.cross_entropy(out.flatten(1), _classes(y), reduction="none"),
}


def _classes(y: Tensor) -> Tensor:
    """A class for each example, one of as many as it has targets."""
    positive = (y > 0).flatten(1)
    return positive.sum(1).clamp_max(positive.shape[1] - 1)


def number(value: str, dtype: torch.dtype) -> float:
    """The number of this name; the denormal one depends on the dtype."""
    return torch.finfo(dtype).tiny / 1024 if value == "denormal" else float(value)


def filled(shape: tuple[int, ...], value: str, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """A tensor of one value, of normal numbers, or of any values."""
    normal = torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)
    if value == "normal":
        return normal
    if value != "any":
        return torch.full(shape, number(value, dtype), dtype=dtype)
    pool = [number(v, dtype) for v in ("0", "1e30", "-1e30", "1e-30", "denormal", "1", "-1")]
    return torch.tensor(pool, dtype=dtype)[torch.randint(len(pool), shape, generator=source)]


@dataclass(frozen=True)
class Example:
    """What one example is made of: a value, where it stands, and the seed of everything else."""

    value: str
    place: str
    seed: int

    def tensors(self, sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Input ``[T, D]``, ids ``[T]``, weight of the loss ``[]``, target ``[T, 2]``."""
        source = torch.Generator().manual_seed(self.seed)
        x, y = (filled((sizes.t, width), "normal", dtype, source) for width in (sizes.d, 2))
        ids = torch.randint(sizes.d, (sizes.t,), generator=source)
        weight = torch.rand((), generator=source, dtype=torch.float64).to(dtype) + 0.5
        if self.place == "all":
            x = filled((sizes.t, sizes.d), self.value, dtype, source)
        elif self.place == "one":
            x[self.seed % sizes.t, self.seed % sizes.d] = filled((), self.value, dtype, source)
        elif self.place == "weight":
            weight = filled((), self.value, dtype, source)
        else:
            y = filled((sizes.t, 2), self.value, dtype, source)
        return x, ids, weight, y


@dataclass(frozen=True)
class Case:
    """A model, a batch, an example more, and a loss."""

    tree: Tree
    sizes: Sizes
    batch: tuple[Example, ...]
    other: Example
    position: int  # of the example that is removed, zeroed out and replaced
    loss: str
    gain: float
    seed: int

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The same in each call, with parameters ``gain`` times as large as usual."""
        torch.manual_seed(self.seed)
        model = Net(self.tree, self.sizes).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(self.gain)
        return model

    def tensors(self, examples: tuple[Example, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Inputs, ids, weights and targets of some examples."""
        none = (
            torch.zeros(0, self.sizes.t, self.sizes.d, dtype=dtype), torch.zeros(0, self.sizes.t, dtype=torch.long),
            torch.zeros(0, dtype=dtype), torch.zeros(0, self.sizes.t, 2, dtype=dtype),
        )  # fmt: skip
        if not examples:
            return none
        return tuple(map(torch.stack, zip(*(e.tensors(self.sizes, dtype) for e in examples), strict=True)))

    def losses(self, model: nn.Module, x: Tensor, ids: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        """``[N]``."""
        return LOSSES[self.loss](model(x, ids).to(x.dtype), y) * weight


SEEDS = st.integers(0, 2**20)


@cache
def trees(depth: int = DEPTH, without: tuple[str, ...] = ()) -> st.SearchStrategy[Tree]:
    """Trees of at most this depth, without some layers."""
    kinds = [kind for kind in (*LAYERS, *LAYERS, *SHARED, *PLAIN) if kind not in without]
    leaf = st.builds(Leaf, st.sampled_from(kinds), st.sampled_from(["no", "no", "no", "no", "first", "all"]))
    if depth == 1:
        return leaf
    below = trees(depth - 1, without)
    return st.one_of(st.builds(Chain, st.tuples(below, below)), st.builds(Residual, below), leaf)


def examples() -> st.SearchStrategy[Example]:
    """Examples; about half are ordinary."""
    return st.builds(Example, st.sampled_from([*VALUES, *["normal"] * 8]), st.sampled_from(PLACES), SEEDS)


def cases(without: tuple[str, ...] = ()) -> st.SearchStrategy[Case]:
    """Everything."""
    return st.builds(
        Case,
        tree=trees(without=without),
        sizes=st.sampled_from([Sizes(1, 4), Sizes(3, 4), Sizes(2, 8), Sizes(5, 2)]),
        batch=st.lists(examples(), min_size=1, max_size=4).map(tuple),
        other=examples(),
        position=st.integers(0, 3),
        loss=st.sampled_from(list(LOSSES)),
        gain=st.sampled_from([1.0, 0.1, 3.0]),
        seed=SEEDS,
    )
