"""Models that use parameters outside of modules with a rule: bare, functional, folded; and those that mix examples.

N is 1, 2 or 4 and the traps of a row; other sizes are 3 positions, 5 heads, 15 features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix, Rearrange, Reduce
from harness import Net, Row, par, pos, rand
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from perexample import BatchAxisError, CrossExampleError, PerExampleError, UncoveredParameterError

T, H, D = 3, 5, 15
K = D // H
V = 7
SETTINGS = ("batch_dim", "axes", "out_axis", "forward", "traps", "empty", "deep")


def tokens(n: int) -> tuple:
    return (rand(n, T, D),)


def two(n: int) -> tuple:
    return rand(n, T, D), rand(n, T, D)


def vectors(n: int) -> tuple:
    return (rand(n, D),)


def words(n: int) -> tuple:
    return (torch.randint(V, (n, T)),)


def image(n: int) -> tuple:
    return (rand(n, 6, 6, 9),)


def signal(n: int) -> tuple:
    return (rand(n, 6, 9),)


def volume(n: int) -> tuple:
    return (rand(n, 6, 3, 5, 3),)


def masked_tokens(n: int) -> tuple:
    return rand(n, T, D), torch.rand(n, T) < 0.5


def net(name: str, function: Callable, inputs: Callable = tokens, **parts: Any) -> Row:
    """A row of a `Net`: a shape stands for a parameter of it, any function for what it returns.

    ``batch_dim``, ``axes``, ``out_axis``, ``forward``, ``traps``, ``empty`` and ``deep`` are those of `Row`.
    """
    settings = {key: parts.pop(key) for key in list(parts) if key in SETTINGS}

    def make() -> nn.Module:
        built = {key: par(*part) if isinstance(part, tuple) else part() for key, part in parts.items()}
        return Net(function, **built)

    return Row(name, make, inputs, **settings)


def linear(i: int = D, o: int = D, **options: Any) -> nn.Linear:
    return nn.Linear(i, o, **options)


# ------------------------------------------------------------------------------------------------- elementwise

ARITHMETIC: dict[str, Callable] = {
    "x+p": lambda x, p: x + p,
    "p+x": lambda x, p: p + x,
    "x-p": lambda x, p: x - p,
    "p-x": lambda x, p: p - x,
    "x*p": lambda x, p: x * p,
    "p*x": lambda x, p: p * x,
    "x/p": lambda x, p: x / p,
    "p/x": lambda x, p: p / (1 + x * x),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "[1]": (1,),
    "[d]": (D,),
    "[T,1]": (T, 1),
    "[T,d]": (T, D),
    "[1,1,d]": (1, 1, D),
    "[1,T,d]": (1, T, D),
}


def arithmetic(name: str, shape: str, empty: bool = False) -> Row:
    function, size = ARITHMETIC[name], SHAPES[shape]
    return Row(f"{name}-{shape}", lambda: Net(lambda m, x: function(x, m.p), p=pos(*size)), tokens, empty=empty)


def elementwise(name: str, function: Callable, *size: int, inputs: Callable = tokens, **more: Any) -> Row:
    """A function of ``(p, *inputs)`` with one parameter, of shape ``[d]`` if none is given."""
    return Row(name, lambda: Net(lambda m, *x: function(m.p, *x), p=pos(*(size or (D,)))), inputs, **more)


def inplace(name: str, function: Callable, *size: int, **more: Any) -> list[Row]:
    """Change a temporary in place: the sine of the input, or the output of a linear layer."""

    def changed(p, h):
        result = function(h, p)
        return h if result is None else result

    return [
        Row(
            f"inplace-{name}-temporary",
            lambda: Net(lambda m, x: changed(m.p, x.sin()).tanh(), p=pos(*(size or (D,)))),
            tokens,
            **more,
        ),
        Row(
            f"inplace-{name}-output",
            lambda: Net(lambda m, x: changed(m.p, m.a(x)), a=linear(), p=pos(*(size or (D,)))),
            tokens,
            **more,
        ),
    ]


def _iadd(h, p):
    h += p


def _isub(h, p):
    h -= p


def _imul(h, p):
    h *= p


def _idiv(h, p):
    h /= p


def _slice_add(h, p):
    h[:, 1:] += p


def _slice_mul(h, p):
    h[:, 1] *= p


def _slice_set(h, p):
    h[:, 0] = p


def _slice_set_computed(h, p):
    h[..., 1:4] = h[..., 2:5].clone() * p


def _view_mul(h, p):
    h.view(-1, D).mul_(p)


def _twice(h, p):
    h.mul_(p).add_(p)


def _out_of_order(h, p):
    part = h[:, 0]
    h.mul_(p)
    return h + part.unsqueeze(1)


def _no_grad_part(m, x):
    with torch.no_grad():
        scale = x * m.p
    return m.a(x) + scale


def _straight_through(m, x):
    hard = (x * m.p).round()
    soft = (x * m.p).tanh()
    return soft + (hard - soft).detach()


def _polynomial(m, x):
    for p in m.ps:
        x = (x * p + 1).tanh()
    return x


def _parameter_dict() -> nn.ParameterDict:
    return nn.ParameterDict({"a": par(D), "b": par(T, D)})


def _frozen(*shape: int) -> nn.Parameter:
    return par(*shape).requires_grad_(False)


def _scaled() -> Net:
    return Net(lambda m, x: m.a(x) * m.p, a=linear(), p=par(D))


ELEMENTWISE = [
    *(arithmetic(name, shape, empty=shape == "[T,d]") for name in ARITHMETIC for shape in SHAPES),
    net("x*p-channels", lambda m, x: x * m.p, image, p=(6, 1, 1), traps=(6,), empty=True),
    net("x+p-channels", lambda m, x: x + m.p, image, p=(1, 6, 1, 1), traps=(6,)),
    net("x+p-whole-image", lambda m, x: x + m.p, image, p=(6, 6, 9), traps=(6,)),
    net("x*p+q-affine", lambda m, x: x * m.p.view(-1, 1, 1) + m.q[:, None, None], image, p=(6,), q=(6,)),
    elementwise("torch.add-alpha", lambda p, x: torch.add(x, p, alpha=0.3)),
    elementwise("torch.sub-other-first", lambda p, x: torch.sub(p, x, alpha=2)),
    elementwise("torch.mul", lambda p, x: torch.mul(input=x, other=p)),
    elementwise("torch.addcmul-factor", lambda p, x, y: torch.addcmul(x, y, p, value=0.5), inputs=two),
    elementwise("torch.addcmul-first", lambda p, x, y: torch.addcmul(p, x, y), inputs=two),
    elementwise("torch.addcdiv", lambda p, x, y: torch.addcdiv(x, y, p), inputs=two),
    net("torch.addcmul-two", lambda m, x: torch.addcmul(m.q, x, m.p), p=(D,), q=(T, 1)),
    elementwise("torch.lerp-end", lambda p, x: torch.lerp(x, p, 0.3)),
    elementwise("torch.lerp-weight", lambda p, x, y: torch.lerp(x, y, p), inputs=two),
    elementwise("torch.where-other", lambda p, x: torch.where(x > 0, x, p)),
    elementwise("torch.where-first", lambda p, x: torch.where(x > 0, p, x.square())),
    elementwise("torch.where-both-computed", lambda p, x: torch.where(x > 0, x * p, p - x)),
    elementwise("torch.where-condition-alone", lambda p, x: torch.where(x > 0, p, 0.5)),
    elementwise("clamp-min", lambda p, x: x.clamp(min=p - 1.5)),
    elementwise("clamp-min-max", lambda p, x: torch.clamp(x, -p / 3, p / 2)),
    elementwise("maximum", lambda p, x: torch.maximum(x, p - 1.5)),
    elementwise("minimum", lambda p, x: torch.minimum(p - 1.5, x)),
    elementwise("x**p", lambda p, x: (x.square() + 0.5) ** p),
    elementwise("p**x", lambda p, x: p ** x.tanh()),
    elementwise("pow-scalar", lambda p, x: torch.pow(x.square() + 0.5, p), 1),
    elementwise("atan2", torch.atan2),
    elementwise("hypot", torch.hypot),
    elementwise("logaddexp", torch.logaddexp),
    elementwise("logit-scale", lambda p, x: (p - 1.5).exp() * F.normalize(x, dim=-1), 1),
    elementwise("softplus-of-p", lambda p, x: F.softplus(p) * x),
    elementwise("p-squared", lambda p, x: p * p * x),
    elementwise("p-used-twice", lambda p, x: torch.tanh(x * p) - p),
    elementwise("p-used-thrice", lambda p, x: p * torch.tanh(p * torch.tanh(p * x))),
    net("sgn", lambda m, x: torch.sgn(x * m.p) + (m.q.sgn() * x).cumsum(-1), p=(D,), q=(D,)),
    net("sgn-alone", lambda m, x: torch.sgn(x * m.p), p=(D,)),
    elementwise("masked-fill-by-a-scalar", lambda p, x: x.masked_fill(x > 0, p.sum())),
    elementwise("negated-and-sliced", lambda p, x: x[..., :6] * -p[3:9]),
    elementwise("unbound", lambda p, x: sum(x * q for q in p.unbind()), 2),
    elementwise("items-of-p", lambda p, x: p[0] * x + p[1] * x.square() + p[2] * x**3, 3),
    elementwise("power-series", lambda p, x: (x.tanh().unsqueeze(-1) ** torch.arange(1, 4) * p).sum(-1), 3),
    elementwise("snake", lambda p, x: x + (p * x).sin().square() / p),
    elementwise("swish-beta", lambda p, x: x * torch.sigmoid(p * x)),
    elementwise("gated-residual", lambda p, x, y: x * (1 - (p - 1)) + y * (p - 1), inputs=two),
    elementwise("sigmoid-gate", lambda p, x, y: torch.sigmoid(p) * x + (1 - torch.sigmoid(p)) * y, inputs=two),
    elementwise("layer-scale", lambda p, x: x + p * x.tanh(), empty=True),
    elementwise("rezero", lambda p, x: x + (p - p.detach()) * x.tanh(), 1),
    elementwise("scale-at-two-places", lambda p, x: (p * x).tanh().flip(-1) * p),
    elementwise("cdist-to-prototypes", lambda p, x: torch.cdist(x, p.expand(len(x), -1, -1)), 7, D),
    elementwise("distance-to-prototypes", lambda p, x: (x.unsqueeze(2) - p).square().sum(-1), 7, D),
    elementwise("cosine-similarity", lambda p, x: F.cosine_similarity(x.unsqueeze(2), p, dim=-1), 7, D),
    elementwise("cosine-classifier", lambda p, x: F.linear(F.normalize(x, dim=-1), F.normalize(p, dim=-1)), 7, D),
    elementwise("softmax-pooling", lambda p, x: (x * (x @ p).softmax(1).unsqueeze(-1)).sum(1)),
    elementwise(
        "mixing-of-layers", lambda p, x: (torch.stack([x, x.tanh(), x.sin()]) * p.softmax(0)).sum(0), 3, 1, 1, 1
    ),
    elementwise("cumsum-of-p", lambda p, x: x + p.cumsum(0)),
    elementwise("causal-decay", lambda p, x: x * (-F.softplus(p) * torch.arange(T).view(T, 1)).exp()),
    elementwise("temperature-on-vectors", lambda p, x: x / p, 1, inputs=vectors, traps=(D,), empty=True),
    elementwise("bias-on-vectors", lambda p, x: x + p, inputs=vectors, traps=(D,), empty=True),
    elementwise("gain-on-scalars", lambda p, x: x * p, 1, inputs=lambda n: (rand(n),), traps=(3,), deep=False),
    net("no-grad-part", _no_grad_part, p=(D,), a=linear),
    net("detached-part", lambda m, x: m.a(x) + m.p.detach() * x, p=(D,), a=linear),
    net("straight-through", _straight_through, p=(D,)),
    net("ragged-branch", lambda m, x: x * m.p if x.dim() == 3 else x * m.q, p=(D,), q=(D,)),
    net("parameter-list", _polynomial, ps=lambda: nn.ParameterList([par(D), par(1), par(T, D)])),
    net("parameter-dict", lambda m, x: x * m.ps["a"] + m.ps["b"], ps=_parameter_dict),
    net("nested-containers", lambda m, x: m.inner(x) * m.p, p=(D,), inner=_scaled),
    net("frozen-part", lambda m, x: (x * m.p + m.q).tanh() * m.p, p=lambda: _frozen(D), q=(D,)),
    *inplace("mul_", lambda h, p: h.mul_(p), empty=True),
    *inplace("add_", lambda h, p: h.add_(p, alpha=0.5)),
    *inplace("sub_", lambda h, p: h.sub_(p), T, D),
    *inplace("div_", lambda h, p: h.div_(p), 1, T, D),
    *inplace("+=", _iadd),
    *inplace("-=", _isub, T, D),
    *inplace("*=", _imul, 1),
    *inplace("/=", _idiv, 1, 1, D),
    *inplace("addcmul_", lambda h, p: h.addcmul_(p, p)),
    *inplace("lerp_", lambda h, p: h.lerp_(p.expand_as(h), 0.3)),
    *inplace("clamp_", lambda h, p: h.clamp_(min=p - 1.5)),
    *inplace("slice+=", _slice_add),
    *inplace("slice*=", _slice_mul),
    *inplace("slice=p", _slice_set),
    *inplace("slice=computed", _slice_set_computed, 3),
    *inplace("view.mul_", _view_mul),
    *inplace("mul_.add_", _twice),
    *inplace("view-taken-before", _out_of_order),
    *inplace("masked_fill_", lambda h, p: h.masked_fill_(h > 0, p.mean())),
    *inplace("copy_", lambda h, p: h.clone().copy_(p) * h),
]


# -------------------------------------------------------------------------------------- tokens, tables, queries


def _interpolated(m, x):
    table = F.interpolate(m.p.view(1, 2, 2, D).permute(0, 3, 1, 2), (1, T), mode="bilinear")
    return x + table.flatten(2).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])).softmax(-1) @ keys


def _in_the_middle(m, x):
    return torch.cat([x[:, :1], m.p.expand(len(x), -1, -1), x[:, 1:], m.p.expand(len(x), -1, -1)], 1)


def _masked_token(m, h, mask):
    h = h.clone()
    h[mask] = m.token
    return m.a(h).tanh()


def _masked_token_where(m, h, mask):
    return m.a(torch.where(mask[..., None], m.token, h)).tanh()


def _masked_token_product(m, h, mask):
    w = mask.unsqueeze(-1).type_as(h)
    return h * (1 - w) + m.token.expand(len(h), T, -1) * w


def _first_token(m, h):
    h = 1.5 * h
    h[:, 0] = m.token
    return m.a(h)


def _index_put(m, h):
    index = torch.tensor([0, 2])
    return h.index_copy(1, index, m.p.expand(len(h), -1, -1)) * h


def _scattered(m, h):
    return torch.zeros_like(h).scatter_add(1, torch.zeros_like(h, dtype=torch.long), h * m.p)


class Perceiver(nn.Module):
    """Learned queries attend to the inputs, as in Perceiver, DETR and Q-Former."""

    def __init__(self, expanded: bool, many: int = 6) -> None:
        super().__init__()
        self.queries, self.expanded = par(1, many, D), expanded
        self.q, self.k, self.v, self.o = (linear() for _ in range(4))

    def heads(self, t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], H, K).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1) if self.expanded else self.queries
        q, k, v = self.heads(self.q(queries)), self.heads(self.k(x)), self.heads(self.v(x))
        out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2)) + queries


def _in_bags(*begins: int, rest: Callable = lambda i: ()) -> Callable:
    """Ids in one row; the bags of each example begin at these words."""

    def function(m, i):
        offsets = torch.arange(0, i.numel(), T).unsqueeze(1) + torch.tensor(begins)
        return m.e(i.flatten(), offsets.flatten(), *rest(i)).view(-1, len(begins), D).sin()

    return function


def _in_bags_by_function(m, i):
    offsets = torch.arange(0, i.numel(), T).repeat_interleave(2)  # the first of two is empty
    return F.embedding_bag(i.flatten(), m.e.weight, offsets).view(-1, 2, D).sin() * m.p


_BAGS = (
    [
        net("bags-of-ids-in-a-row-by-function", _in_bags_by_function, words, e=lambda: nn.Embedding(V, D), p=(D,)),
        net(
            "bags-of-ids-in-a-row-of-a-frozen-table",
            _in_bags_by_function,
            words,
            p=(D,),
            e=lambda: nn.Embedding(V, D).requires_grad_(False),
        ),
    ]
    + [
        net(f"{name}-of-ids-in-a-row-{mode}", function, words, e=lambda mode=mode: nn.EmbeddingBag(V, D, mode=mode))
        for mode in ("sum", "mean", "max")
        for name, function in (("bag", _in_bags(0)), ("two-bags", _in_bags(0, 1)))
    ]
    + [
        net(
            "weighted-bags-of-ids-in-a-row",
            _in_bags(0, 2, rest=lambda i: ((i.flatten() * 0.7).double().cos(),)),
            words,
            e=lambda: nn.EmbeddingBag(V, D, mode="sum"),
        )
    ]
)


TOKENS = [
    net("cls-expand-cat", lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1), p=(1, 1, D), empty=True),
    net(
        "cls-expand-cat-linear",
        lambda m, x: m.a(torch.cat([m.p.expand(x.shape[0], -1, -1), x], 1)),
        p=(1, 1, D),
        a=linear,
        traps=(4, 3),
    ),
    net("cls-repeat", lambda m, x: torch.cat((m.p.repeat(len(x), 1, 1), x), 1), p=(1, 1, D)),
    net("cls-einops-repeat", lambda m, x: torch.cat((einops.repeat(m.p, "d -> n 1 d", n=len(x)), x), 1), p=(D,)),
    net("cls-plus-zeros", lambda m, x: torch.cat([m.p + x.new_zeros(len(x), 1, D), x], 1), p=(D,)),
    net("cls-times-ones", lambda m, x: torch.cat([torch.ones_like(x[:, :1]) * m.p, x], 1), p=(D,)),
    net("cls-broadcast-to", lambda m, x: torch.hstack([torch.broadcast_to(m.p, (len(x), 1, D)), x]), p=(D,)),
    net("cls-stacked-list", lambda m, x: torch.cat([torch.stack([m.p] * len(x)), x], 1) * 1.5, p=(1, D)),
    net("stack", lambda m, x: torch.stack([m.p.expand_as(x), x], 1), p=(D,)),
    net("stack-last", lambda m, x: torch.stack([x, m.p.expand_as(x)], -1).sin(), p=(T, D)),
    net("prompts-in-the-middle", _in_the_middle, p=(2, D)),
    net("cat-features", lambda m, x: torch.cat([x, m.p.expand(len(x), T, 5)], -1), p=(5,)),
    net("pad-token", lambda m, x: torch.cat([F.pad(m.p, (0, 6)).expand_as(x), x], 1), p=(9,)),
    net(
        "cls-and-positions",
        lambda m, x: (torch.cat([m.c.expand(len(x), -1, -1), x], 1) + m.p).tanh(),
        c=(1, 1, D),
        p=(1, T + 1, D),
        traps=(4,),
        empty=True,
    ),
    net(
        "position-embedding-[1,T]",
        lambda m, x: x + m.e(torch.arange(x.shape[1]).unsqueeze(0)),
        e=lambda: nn.Embedding(9, D),
        empty=True,
    ),
    net("position-embedding-[T]", lambda m, x: x + m.e(torch.arange(x.shape[1])), e=lambda: nn.Embedding(9, D)),
    net(
        "position-embedding-[N,T]",
        lambda m, x: x + m.e(torch.arange(T).expand(len(x), T)),
        e=lambda: nn.Embedding(9, D),
    ),
    net(
        "position-embedding-of-a-buffer",
        lambda m, x: x * m.e(m.ids[:, :T]),
        e=lambda: nn.Embedding(9, D),
        ids=lambda: torch.arange(9)[None],
    ),
    net(
        "token-type-embedding",
        lambda m, x: x + m.e(torch.zeros(x.shape[:2], dtype=torch.long)) + m.f(torch.arange(T)),
        e=lambda: nn.Embedding(2, D),
        f=lambda: nn.Embedding(9, D),
    ),
    net(
        "words-and-positions",
        lambda m, i: m.a(m.e(i) + m.f(torch.arange(i.shape[1]))).tanh(),
        words,
        e=lambda: nn.Embedding(V, D),
        f=lambda: nn.Embedding(9, D),
        a=linear,
        empty=True,
    ),
    net("positions-sliced", lambda m, x: x + m.p[:T], p=(9, D), empty=True),
    net("positions-sliced-[1,T]", lambda m, x: x + m.p[:, : x.size(1)], p=(1, 9, D)),
    net("positions-narrow", lambda m, x: x + m.p.narrow(0, 2, T), p=(9, D)),
    net("positions-interpolated", _interpolated, p=(4, D)),
    net(
        "positions-projected",
        lambda m, x: x + m.a(m.table),
        a=lambda: linear(6, D),
        table=lambda: rand(T, 6),
        empty=True,
    ),
    net(
        "positions-by-an-mlp",
        lambda m, x: x + m.b(m.a(m.table).tanh()).tanh(),
        a=lambda: linear(2, 6),
        b=lambda: linear(6, D),
        table=lambda: rand(T, 2),
    ),
    net("axial-positions", lambda m, x: x + m.p + m.q, image, p=(6, 6, 1), q=(6, 1, 9), traps=(6,)),
    Row("queries-expanded", lambda: Perceiver(True), tokens, traps=(3, 5, 6), empty=True),
    Row("queries-shared", lambda: Perceiver(False), tokens, traps=(3, 5, 6), empty=True),
    net("queries-bare", lambda m, x: _attend(m.p.repeat(len(x), 1, 1), x), p=(1, 6, D), traps=(6,)),
    net("queries-broadcast", lambda m, x: _attend(m.p, m.a(x)), p=(6, D), a=linear, traps=(6,)),
    net("query-of-one", lambda m, x: _attend(m.p, x).flatten(1), p=(1, D)),
    net(
        "queries-zeros-plus-positions",
        lambda m, x: m.a(torch.zeros(len(x), 6, D).double() + m.p).tanh() @ x.transpose(1, 2),
        p=(6, D),
        a=linear,
        traps=(6,),
    ),
    net("memory-slots", lambda m, x: _attend(x, m.p.expand(len(x), -1, -1)), p=(6, D), traps=(6,)),
    net("memory-slots-shared", lambda m, x: _attend(x, m.p), p=(6, D), traps=(6,)),
    net("masked-token-setitem", _masked_token, masked_tokens, token=(D,), a=linear, deep=False),
    net("masked-token-setitem-behind", _masked_token, masked_tokens, token=(D,), a=linear),
    net("masked-token-where", _masked_token_where, masked_tokens, token=(D,), a=linear, empty=True),
    net("masked-token-product", _masked_token_product, masked_tokens, token=(1, 1, D)),
    net("first-token-setitem", _first_token, token=(D,), a=linear),
    net("index-copy", _index_put, p=(2, D)),
    net("scatter-add", _scattered, p=(D,)),
    net("table-by-getitem", lambda m, i: m.p[i].sin(), words, p=(V, D), traps=(3, 7), empty=True),
    net("table-by-getitem-vectors", lambda m, i: m.p[i[:, 0]].sin(), words, p=(V, D), traps=(3, 7)),
    net("table-by-F.embedding", lambda m, i: F.embedding(i, m.p, 2).sin(), words, p=(V, D), empty=True),
    net(
        "table-by-index_select",
        lambda m, i: torch.index_select(m.p, 0, i.flatten()).view(*i.shape, D).sin(),
        words,
        p=(V, D),
    ),
    net("table-by-one-hot", lambda m, i: (F.one_hot(i, V).double() @ m.p).sin(), words, p=(V, D)),
    net(
        "table-by-gather",
        lambda m, i: m.p.expand(len(i), V, D).gather(1, i.unsqueeze(-1).expand(-1, -1, D)).sin(),
        words,
        p=(V, D),
        traps=(3, 7),
    ),
    *_BAGS,
    net("table-by-embedding_bag", lambda m, i: F.embedding_bag(i, m.p, mode="mean").sin(), words, p=(V, D)),
    net("table-by-two-indices", lambda m, i: m.p[i, torch.arange(T)].sin(), words, p=(V, T, D)),
    net(
        "table-by-indices-of-two-shapes",
        lambda m, x, i, y: x * m.p[i, y.unsqueeze(1)].unsqueeze(-1),
        lambda n: (rand(n, 6, D), torch.randint(6, (n, 6)), torch.randint(4, (n,))),
        p=(6, 6),
        traps=(6,),
    ),
    net("scalar-by-index", lambda m, i: m.p[i].sin(), words, p=(V,), traps=(3, 7)),
    net(
        "class-conditional-gain",
        lambda m, x, i: x * m.p[i].unsqueeze(1),
        lambda n: (rand(n, T, D), torch.randint(V, (n,))),
        p=(V, D),
        traps=(3, 7),
    ),
]


# ------------------------------------------------------------------------------------------- biases of attention


def windows(x: Tensor, w: int) -> Tensor:
    """``[N, Y, X, d] -> [N * windows, w * w, d]``, as in Swin."""
    n, y, xs, d = x.shape
    return x.view(n, y // w, w, xs // w, w, d).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, d)


def unwindowed(x: Tensor, w: int, y: int, xs: int) -> Tensor:
    """The inverse of `windows`."""
    n = x.shape[0] // (y * xs // w // w)
    return x.view(n, y // w, xs // w, w, w, D).permute(0, 1, 3, 2, 4, 5).contiguous().view(n, y, xs, D)


def relative_index(w: int) -> Tensor:
    """``[w * w, w * w]`` numbers of the relative positions in a window."""
    places = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
    offsets = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + w - 1
    return offsets[..., 0] * (2 * w - 1) + offsets[..., 1]


class Swin(nn.Module):
    """Window attention with a table of relative positions (or an MLP over them), shifted and masked or not."""

    def __init__(self, masked: bool = False, shifted: bool = False, continuous: bool = False) -> None:
        super().__init__()
        w = self.w = 3
        self.masked, self.shifted, self.continuous = masked, shifted, continuous
        self.qkv, self.proj = linear(D, 3 * D), linear()
        self.register_buffer("index", relative_index(w))
        if continuous:
            self.register_buffer("coordinates", rand((2 * w - 1) ** 2, 2))
            self.cpb = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, H, bias=False))
            self.logit_scale = par(H, 1, 1)
        else:
            self.table = par((2 * w - 1) ** 2, H)
        self.register_buffer("mask", torch.where(torch.rand(6, w * w, w * w) < 0.3, -100.0, 0.0).double())

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if not self.continuous:
            bias = self.table[self.index.view(-1)].view(*self.index.shape, H).permute(2, 0, 1).contiguous()
            return q @ k.transpose(-2, -1) / math.sqrt(K) + bias.unsqueeze(0)
        table = self.cpb(self.coordinates).view(-1, H)
        bias = 16 * torch.sigmoid(table[self.index.view(-1)].view(*self.index.shape, H).permute(2, 0, 1))
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * self.logit_scale.clamp(max=4.6).exp() + bias.unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(x, (-1, -1), (1, 2)) if self.shifted else x
        h = windows(x, self.w)
        b, t, _ = h.shape
        q, k, v = self.qkv(h).reshape(b, t, 3, H, K).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k)
        if self.masked:
            scores = scores.view(b // 6, 6, H, t, t) + self.mask[:, None]
            scores = scores.view(-1, H, t, t)
        h = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, D))
        h = unwindowed(h, self.w, *x.shape[1:3])
        return x + (torch.roll(h, (1, 1), (1, 2)) if self.shifted else h)


class Biased(nn.Module):
    """Two layers of attention whose scores get one bias, ``[1, H, T, T]`` or so, computed by ``bias``."""

    def __init__(self, bias: Callable[[nn.Module], Tensor], layers: int = 1, fused: bool = False, **parts: Any) -> None:
        super().__init__()
        self.bias, self.fused = bias, fused
        self.layers = nn.ModuleList(linear(D, 3 * D) for _ in range(layers))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(self)
        for layer in self.layers:
            q, k, v = layer(x).view(*x.shape[:2], 3, H, K).permute(2, 0, 3, 1, 4)
            if self.fused:
                h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            else:
                h = (q @ k.transpose(-1, -2) / math.sqrt(K) + bias).softmax(-1) @ v
            x = x + h.transpose(1, 2).flatten(2)
        return x


def _offsets() -> Tensor:
    return torch.arange(T)[:, None] - torch.arange(T)[None, :] + T - 1


def _t5_bias(m: nn.Module) -> Tensor:
    return m.table(_offsets()).permute(2, 0, 1).unsqueeze(0)


def _alibi(m: nn.Module) -> Tensor:
    return -m.slope.exp().view(1, H, 1, 1) * _offsets().double().abs()


def grid(n: int) -> tuple:
    return (rand(n, 6, 9, D),)


def biased(name: str, bias: Callable, parts: Callable[[], dict], **options: Any) -> Row:
    return Row(name, lambda: Biased(bias, **options, **parts()), tokens, traps=(3, 5))


def _relative_keys(m, x):
    """Relative position representations of Shaw et al.: a table of vectors, looked up by offset."""
    q, r = m.a(x), m.p[_offsets()]
    scores = q @ x.transpose(1, 2) + torch.einsum("nqd,qkd->nqk", q, r)
    return scores.softmax(-1) @ x


ATTENTION_BIAS = [
    Row("swin", lambda: Swin(), grid, traps=(6, 5), empty=True),
    Row("swin-masked", lambda: Swin(masked=True), grid, traps=(6, 5)),
    Row("swin-shifted-masked", lambda: Swin(masked=True, shifted=True), grid, traps=(6,)),
    Row("swin-v2", lambda: Swin(continuous=True), grid, traps=(6,)),
    Row("swin-v2-masked", lambda: Swin(masked=True, continuous=True), grid, traps=(6,)),
    biased("t5-bias", _t5_bias, lambda: {"table": nn.Embedding(9, H)}),
    biased("t5-bias-shared", _t5_bias, lambda: {"table": nn.Embedding(9, H)}, layers=3),
    biased("t5-bias-shared-sdpa", _t5_bias, lambda: {"table": nn.Embedding(9, H)}, layers=2, fused=True),
    biased("alibi-slope", _alibi, lambda: {"slope": par(H)}),
    biased("alibi-slope-shared", _alibi, lambda: {"slope": par(H)}, layers=2),
    biased("alibi-slope-sdpa", _alibi, lambda: {"slope": par(H)}, fused=True),
    biased("bias-[T,T]", lambda m: m.p, lambda: {"p": par(T, T)}),
    biased("bias-[H,1,1]", lambda m: m.p, lambda: {"p": par(H, 1, 1)}),
    biased("bias-of-keys", lambda m: m.p, lambda: {"p": par(1, H, 1, T)}),
    biased("sdpa-bias-[T,T]", lambda m: m.p, lambda: {"p": par(T, T)}, fused=True),
    biased("sdpa-bias-[H,T,T]", lambda m: m.p, lambda: {"p": par(H, T, T)}, fused=True),
    biased("sdpa-bias-[1,H,T,T]", lambda m: m.p, lambda: {"p": par(1, H, T, T)}, layers=2, fused=True),
    net(
        "sdpa-bias-expanded",
        lambda m, x: F.scaled_dot_product_attention(x, m.a(x), x, attn_mask=m.p.expand(len(x), T, T)),
        p=(1, T, T),
        a=linear,
        empty=True,
    ),
    net(
        "sdpa-learned-queries",
        lambda m, x: F.scaled_dot_product_attention(m.p.expand(len(x), 6, D), x, m.a(x)),
        p=(6, D),
        a=linear,
        traps=(6,),
    ),
    net(
        "sdpa-learned-keys-and-values",
        lambda m, x: F.scaled_dot_product_attention(
            x, torch.cat([x, m.k.expand(len(x), 2, D)], 1), torch.cat([x, m.v.expand(len(x), 2, D)], 1)
        ),
        k=(2, D),
        v=(2, D),
    ),
    net(
        "sdpa-bias-times-distance",
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=-torch.cdist(x, x) * m.p),
        p=lambda: pos(1),
    ),
    net("relative-keys", _relative_keys, a=linear, p=(2 * T - 1, D)),
]


# -------------------------------------------------------------------------------------------------- products


def _folded_mm(m, x):
    return torch.mm(x.reshape(-1, D), m.w).view(*x.shape[:2], m.w.shape[1])


def _conv1d_of_gpt2(m, x):
    return torch.addmm(m.b, x.view(-1, D), m.w).view(*x.shape[:-1], m.w.shape[1])


def _multi_dot(m, x):
    return torch.linalg.multi_dot([x.reshape(-1, D), m.v, m.w]).view(*x.shape[:2], -1)


def _low_rank(m, x):
    return x @ m.v @ m.w


def _baddbmm(m, x):
    return torch.baddbmm(m.b.expand(len(x), T, 6), x, m.w.expand(len(x), D, 6))


def _tensordot_first(m, x):
    return torch.tensordot(m.w, x, dims=([1], [2])).permute(1, 2, 0)


def _transposed_vectors(m, x):
    return (m.w @ x.T).T


def _hyper(m, x):
    """The weight is made by a layer from a learned code."""
    return F.linear(x, m.make(m.code).view(6, D))


def _per_head(m, x):
    return torch.einsum("nthk,hkj->nthj", x.view(*x.shape[:2], H, K), m.w).flatten(2)


def _experts(m, x):
    gates = m.router(x).softmax(-1)
    return torch.einsum("nte,edo,ntd->nto", gates, m.w, x)


def _merged_lora(m, x):
    return F.linear(x, m.base.weight + 0.5 * m.b @ m.a, m.base.bias)


def _row_scaled(m, x):
    return F.linear(x, m.w / m.w.norm(dim=1, keepdim=True) * m.g)


def _quantised(m, x):
    """Straight-through rounding of a weight."""
    w = m.w + ((m.w * 8).round() / 8 - m.w).detach()
    return F.linear(x, w)


def _masked_weight(m, x):
    return x @ (m.w * torch.ones(D, D).tril())


def _skew(m, x):
    return x @ torch.matrix_exp(m.w - m.w.T)


def _circulant(m, x):
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(m.p), n=D)


def _batchnorm_folded(m, x):
    return F.linear(x, m.gain.unsqueeze(1) * m.a.weight, m.gain * m.a.bias)


EINSUMS = {
    "ntd,de->nte": (D, 6),
    "ntd,ed->nte": (6, D),
    "ntd,hde->nhte": (H, D, 6),
    "ntd,st->nsd": (7, T),
    "ntd,d->nt": (D,),
    "ntd,d->ntd": (D,),
    "ntd,td->n": (T, D),
    "ntd,tde->nte": (T, D, 6),
    "...d,de->...e": (D, 6),
    "ntd,...->ntd": (1,),
}


def einsum(pattern: str, shape: tuple[int, ...]) -> list[Row]:
    """Both orders of the operands."""
    left, right = pattern.split("->")[0].split(",")
    swapped = f"{right},{left}->{pattern.split('->')[1]}"
    return [
        net(f"einsum-{pattern}", lambda m, x: torch.einsum(pattern, x, m.p).sin(), p=shape),
        net(f"einsum-{swapped}", lambda m, x: torch.einsum(swapped, m.p, x).sin(), p=shape),
    ]


def _with_bias(layer: nn.Linear, bias: nn.Parameter) -> nn.Linear:
    layer.bias = bias
    return layer


PRODUCTS = [
    net("F.linear", lambda m, x: F.linear(x, m.w), w=(6, D), traps=(3, 6), empty=True),
    net("F.linear-bias", lambda m, x: F.linear(x, m.w, m.b), w=(6, D), b=(6,), empty=True),
    net("F.linear-by-name", lambda m, x: F.linear(weight=m.w, input=x, bias=m.b), w=(6, D), b=(6,)),
    net("F.linear-vectors", lambda m, x: F.linear(x, m.w, m.b), vectors, w=(6, D), b=(6,), traps=(6, D), empty=True),
    net("F.linear-bias-of-p", lambda m, x: F.linear(x, m.w, m.b.tanh()), w=(6, D), b=(6,)),
    net("F.linear-twice", lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w.T), w=(6, D)),
    net("F.linear-frozen-weight", lambda m, x: F.linear(x, m.w, m.b), w=lambda: _frozen(6, D), b=(6,)),
    net("x@W", lambda m, x: x @ m.w, w=(D, 6), traps=(3, 6), empty=True),
    net("x@W-square", lambda m, x: x @ m.w, lambda n: (rand(n, T, T),), w=(T, T)),
    net("x@W.T", lambda m, x: x @ m.w.T, w=(6, D)),
    net("W@x", lambda m, x: m.w @ x, w=(7, T), traps=(3, 7), empty=True),
    net("W@x.mT", lambda m, x: (m.w @ x.mT).mT, w=(6, D)),
    net("W@x.T-vectors", _transposed_vectors, vectors, w=(6, D), traps=(6, D), empty=True),
    net("x@W-[1,d,e]", lambda m, x: x @ m.w, w=(1, D, 6)),
    net("x@w-vector", lambda m, x: x @ m.w, w=(D,)),
    net("x@w-vectors", lambda m, x: x @ m.w, vectors, w=(D,), traps=(D,)),
    net("w@x-vector", lambda m, x: m.w @ x, w=(T,)),
    net("matmul", lambda m, x: torch.matmul(x, m.w), w=(D, 6)),
    net("matmul-4d", lambda m, x: torch.matmul(x.view(-1, T, H, K).transpose(1, 2), m.w), w=(H, K, 6), traps=(3, 5)),
    net("matmul-positions", lambda m, x: torch.matmul(m.w, x), w=(1, 7, T), traps=(3, 7)),
    net("mm-folded", _folded_mm, w=(D, 6), empty=True),
    net("mm-vectors", lambda m, x: x.mm(m.w), vectors, w=(D, 6), traps=(6, D)),
    net("mm-weights-first", lambda m, x: torch.mm(m.w, x.t()).t(), vectors, w=(6, D), traps=(6, D)),
    net("addmm", _conv1d_of_gpt2, w=(D, 6), b=(6,), empty=True),
    net("addmm-one-bias", lambda m, x: torch.addmm(m.b, x, m.w), vectors, w=(D, 6), b=(1,), traps=(6, D)),
    net("linear-one-bias", lambda m, x: F.linear(x, m.w, m.b), w=(6, D), b=(1,)),
    net("linear-bias-of-no-axis", lambda m, x: F.linear(x, m.w, m.b), vectors, w=(6, D), b=()),
    net("linear-bias-of-positions", lambda m, x: F.linear(x, m.w, m.b), w=(6, D), b=(T, 6)),
    net("linear-module-one-bias", lambda m, x: m.a(x), a=lambda: _with_bias(linear(), par(1))),
    net("addmm-method", lambda m, x: m.b.addmm(x, m.w), vectors, w=(D, 6), b=(6,), traps=(6, D)),
    net("addmm-alpha", lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2), vectors, w=(D, 6), b=(1, 6)),
    net("addmm-data-first", lambda m, x: torch.addmm(x, x, m.w), vectors, w=(D, D), traps=(D,)),
    net("mv-folded", lambda m, x: torch.mv(x.reshape(-1, D), m.w).view(-1, T), w=(D,)),
    net("vecdot", lambda m, x: torch.linalg.vecdot(x, m.w), w=(D,)),
    net("inner", lambda m, x: torch.inner(x, m.w), w=(6, D)),
    net("multi_dot", _multi_dot, v=(D, 6), w=(6, 7)),
    net("low-rank", _low_rank, v=(D, 6), w=(6, D)),
    *(row for pattern, shape in EINSUMS.items() for row in einsum(pattern, shape)),
    net("einsum-nd,oc->..", lambda m, x: torch.einsum("nd,od->on", x, m.w).T, vectors, w=(6, D), traps=(6, D)),
    net("einsum-per-head", _per_head, w=(H, K, 6), traps=(3, 5)),
    net("einsum-two-parameters", lambda m, x: torch.einsum("ntd,de,e->nte", x, m.w, m.g), w=(D, 6), g=(6,)),
    net("einsum-of-experts", _experts, router=lambda: linear(D, 7), w=(7, D, 6), traps=(3, 7)),
    net("einsum-sublists", lambda m, x: torch.einsum(x, [0, 1, 2], m.w, [2, 3], [0, 1, 3]), w=(D, 6)),
    net("einops.einsum", lambda m, x: einops.einsum(x, m.w, "n t d, d e -> n t e"), w=(D, 6)),
    net(
        "einops.einsum-first", lambda m, x: einops.einsum(m.w, x, "h d e, n t d -> n h t e"), w=(H, D, 6), traps=(3, 5)
    ),
    net("bmm-expanded", lambda m, x: torch.bmm(x, m.w.expand(len(x), D, 6)), w=(D, 6), empty=True),
    net("bmm-repeated", lambda m, x: torch.bmm(x, m.w.unsqueeze(0).repeat(len(x), 1, 1)), w=(D, 6)),
    net("bmm-weights-first", lambda m, x: torch.bmm(m.w.expand(len(x), 7, T), x), w=(7, T)),
    net("baddbmm", _baddbmm, w=(1, D, 6), b=(1, T, 6)),
    net("tensordot", lambda m, x: torch.tensordot(x, m.w, dims=1), w=(D, 6)),
    net("tensordot-two-axes", lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [0, 1])), w=(T, D, 6)),
    net("tensordot-weights-first", _tensordot_first, w=(6, D)),
    net("F.bilinear", lambda m, x, y: F.bilinear(x, y, m.w, m.b), two, w=(6, D, D), b=(6,)),
    net("F.bilinear-with-itself", lambda m, x: F.bilinear(x, x, m.w), w=(6, D, D)),
    net("hypernetwork", _hyper, make=lambda: linear(7, 6 * D), code=(7,)),
    net("merged-lora", _merged_lora, base=linear, a=(K, D), b=(D, K)),
    net("weight-norm-by-hand", _row_scaled, w=(6, D), g=(6, 1)),
    net("quantised-weight", _quantised, w=(6, D)),
    net("masked-weight", _masked_weight, w=(D, D)),
    net("matrix-exponential", _skew, w=(D, D)),
    net("circulant-by-fft", _circulant, p=(D,)),
    net("gain-folded-into-weight", _batchnorm_folded, gain=(D,), a=linear),
    net("outer-product-weight", lambda m, x: x @ torch.outer(m.p, m.q), p=(D,), q=(6,)),
    net("kronecker-weight", lambda m, x: x @ torch.kron(m.p, m.q), p=(H, H), q=(K, K)),
    net("diagonal-weight", lambda m, x: x @ torch.diag(m.p), p=(D,)),
    net("weights-concatenated", lambda m, x: F.linear(x, torch.cat([m.p, m.q])), p=(6, D), q=(7, D)),
    net("weight-chunked", lambda m, x: sum(F.linear(x, w) for w in m.p.chunk(3)), p=(18, D)),
]


# ----------------------------------------------------------------------------- convolutions, norms and the like


def conv(name: str, function: Callable, weight: tuple, inputs: Callable, bias: int = 0, **settings: Any) -> Row:
    """A functional convolution with a raw weight, and a raw bias of ``bias`` numbers."""
    parts = {"b": (bias,)} if bias else {}
    options = {key: settings.pop(key) for key in list(settings) if key not in SETTINGS}
    shown = "".join(f"-{key}={value}".replace(" ", "") for key, value in options.items())
    return net(
        f"{name}{shown}{'-bias' if bias else ''}",
        lambda m, x: function(x, m.w, m.b if bias else None, **options),
        inputs,
        w=weight,
        **parts,
        **settings,
    )


CONVOLUTIONS = [
    conv("conv1d", F.conv1d, (7, 6, 3), signal, 7, traps=(6, 7), empty=True),
    conv("conv1d", F.conv1d, (7, 6, 3), signal, padding="same", dilation=2),
    conv("conv1d", F.conv1d, (6, 1, 3), signal, 6, groups=6, padding=1),
    conv("conv2d", F.conv2d, (7, 6, 3, 3), image, traps=(6, 7), empty=True),
    conv("conv2d", F.conv2d, (7, 6, 3, 3), image, 7, padding=1),
    conv("conv2d", F.conv2d, (7, 6, 3, 3), image, 7, stride=(2, 3), padding=(1, 0)),
    conv("conv2d", F.conv2d, (7, 6, 3, 1), image, padding="same"),
    conv("conv2d", F.conv2d, (7, 6, 3, 3), image, 7, padding="valid", dilation=(1, 2)),
    conv("conv2d", F.conv2d, (9, 2, 3, 3), image, 9, groups=3, padding=1),
    conv("conv2d", F.conv2d, (6, 1, 3, 3), image, groups=6, stride=2),
    conv("conv3d", F.conv3d, (7, 6, 3, 3, 3), volume, 7, padding=1),
    conv("conv3d", F.conv3d, (6, 2, 1, 3, 1), volume, groups=3),
    conv("conv_transpose1d", F.conv_transpose1d, (6, 7, 3), signal, 7, stride=2),
    conv("conv_transpose2d", F.conv_transpose2d, (6, 7, 3, 3), image, 7, stride=2, padding=1, output_padding=1),
    conv("conv_transpose2d", F.conv_transpose2d, (6, 3, 3, 3), image, groups=2),
    conv("conv_transpose3d", F.conv_transpose3d, (6, 3, 2, 2, 2), volume),
]


def _standardised(m, x):
    w = m.conv.weight
    mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True)
    return F.conv2d(x, (w - mean) / (var + 1e-5).sqrt() * m.gain, m.conv.bias, padding=1)


def _local_response(m, x):
    return F.local_response_norm(x, 3) * m.p


def _evaluated_batch_norm(m, x):
    return F.batch_norm(x, m.mean, m.var, m.w, m.b, training=False)


def _blurred(m, x):
    kernel = torch.outer(m.p, m.p).softmax(0).expand(6, 1, 3, 3)
    return F.conv2d(x, kernel, groups=6, padding=1)


def _gabor(m, x):
    at = torch.arange(-2, 3).double()
    kernel = (-(at**2) / m.width.square()).exp() * (m.frequency * at).cos()
    return F.conv1d(x, kernel.unsqueeze(1).repeat(1, 6, 1))


def _rms_norm(m, x):
    variance = x.pow(2).mean(-1, keepdim=True)
    return m.weight * (x * torch.rsqrt(variance + 1e-6))


def _rms_norm_of_llama(m, x):
    """With the casts of LLaMA's, to float64 here so that the comparison is exact."""
    dtype = x.dtype
    x = x.to(torch.float64)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.weight * x.to(dtype)


def _layer_norm_by_hand(m, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.g + m.b


def _response_norm(m, x):
    """Global response normalisation of ConvNeXt V2, channels last."""
    energy = x.norm(dim=(1, 2), keepdim=True)
    return m.g * (x * energy / (energy.mean(-1, keepdim=True) + 1e-6)) + m.b + x


def _film(m, x, condition):
    gain, shift = m.a(condition).unsqueeze(1).chunk(2, -1)
    return F.layer_norm(x, (D,)) * (1 + gain + m.p) + shift


NORMS = [
    net("F.layer_norm", lambda m, x: F.layer_norm(x, (D,), m.w, m.b), w=(D,), b=(D,), empty=True),
    net("F.layer_norm-no-bias", lambda m, x: F.layer_norm(x, (D,), m.w), w=(D,)),
    net("F.layer_norm-two-axes", lambda m, x: F.layer_norm(x, x.shape[1:], m.w, m.b), w=(T, D), b=(T, D)),
    net("F.rms_norm", lambda m, x: F.rms_norm(x, (D,), m.w), w=(D,), empty=True),
    net("F.group_norm", lambda m, x: F.group_norm(x, 3, m.w, m.b), image, w=(6,), b=(6,), traps=(6, 3), empty=True),
    net("F.group_norm-1", lambda m, x: F.group_norm(x, 1, weight=m.w), image, w=(6,)),
    net("torch.layer_norm", lambda m, x: torch.layer_norm(x, (D,), m.w, m.b), w=(D,), b=(D,)),
    net("torch.rms_norm", lambda m, x: torch.rms_norm(x, (D,), m.w), w=(D,)),
    net("torch.group_norm", lambda m, x: torch.group_norm(x, 3, m.w, m.b), image, w=(6,), b=(6,), traps=(6, 3)),
    net("F.instance_norm", lambda m, x: F.instance_norm(x, weight=m.w, bias=m.b), image, w=(6,), b=(6,), traps=(6,)),
    net("F.local_response_norm", _local_response, image, p=(6, 1, 1)),
    net(
        "F.batch_norm-evaluated",
        _evaluated_batch_norm,
        image,
        w=(6,),
        b=(6,),
        mean=lambda: rand(6),
        var=lambda: rand(6).square() + 1,
    ),
    net("F.prelu", lambda m, x: F.prelu(x, m.w), image, w=(6,), traps=(6,), empty=True),
    net("F.prelu-scalar", lambda m, x: F.prelu(x, m.w), w=(1,)),
    net("leaky-by-hand", lambda m, x: torch.where(x > 0, x, m.w * x), w=(D,)),
    net("rms-norm-by-hand", _rms_norm, weight=(D,), empty=True),
    net("rms-norm-of-llama", _rms_norm_of_llama, weight=(D,)),
    net("layer-norm-by-hand", _layer_norm_by_hand, g=(D,), b=(D,)),
    net("response-norm", _response_norm, lambda n: grid(n), g=(D,), b=(D,)),
    net("film", _film, lambda n: (rand(n, T, D), rand(n, D)), a=lambda: linear(D, 2 * D), p=(D,)),
    net("weight-standardisation", _standardised, image, conv=lambda: nn.Conv2d(6, 7, 3), gain=(7, 1, 1, 1)),
    net("learned-blur", _blurred, image, p=(3,)),
    net("learned-filters", _gabor, signal, width=(7, 1), frequency=(7, 1)),
]


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w + w.tanh()


class Gated(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate = par(size, 1)

    def forward(self, w: Tensor) -> Tensor:
        return w * self.gate.sigmoid()


class Merged(nn.Module):
    """LoRA as a parametrisation."""

    def __init__(self, o: int, i: int) -> None:
        super().__init__()
        self.a, self.b = par(2, i), par(o, 2)

    def forward(self, w: Tensor) -> Tensor:
        return w + self.b @ self.a


def parametrized(name: str, layer: Callable, apply: Callable, inputs: Callable = tokens, **more: Any) -> Row:
    """A parametrised layer between two activations."""

    def make() -> nn.Module:
        model = Net(lambda m, x: m.layer(x.tanh()).sin(), layer=layer().double())
        apply(model.layer)
        return model.eval()

    return Row(f"parametrized-{name}", make, inputs, **more)


def _parametrize(make: Callable, name: str = "weight") -> Callable:
    return lambda layer: parametrize.register_parametrization(layer, name, make())


def _thrice(layer: nn.Module) -> None:
    for part in (Doubled(), Gated(6), Doubled()):
        parametrize.register_parametrization(layer, "weight", part)


def _six() -> nn.Linear:
    return linear(D, 6)


def _doubled() -> nn.Linear:
    return parametrize.register_parametrization(linear(), "weight", Doubled())


def _doubled_embedding() -> nn.Embedding:
    return parametrize.register_parametrization(nn.Embedding(V, D), "weight", Doubled())


def _cached(m, x):
    with parametrize.cached():
        return m.a(m.a(x).tanh()) * m.p


PARAMETRIZED = [
    parametrized("weight_norm", _six, parametrizations.weight_norm, empty=True),
    parametrized("weight_norm-dim-none", _six, lambda layer: parametrizations.weight_norm(layer, dim=None)),
    parametrized("weight_norm-conv", lambda: nn.Conv1d(6, 7, 3), parametrizations.weight_norm, signal),
    parametrized("spectral_norm", _six, parametrizations.spectral_norm),
    parametrized("spectral_norm-conv", lambda: nn.Conv2d(6, 7, 3), parametrizations.spectral_norm, image),
    parametrized("orthogonal", _six, parametrizations.orthogonal),
    parametrized("orthogonal-cayley", linear, lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley")),
    parametrized(
        "orthogonal-householder", _six, lambda m: parametrizations.orthogonal(m, orthogonal_map="householder")
    ),
    parametrized("custom", _six, _parametrize(Doubled)),
    parametrized("custom-bias", _six, _parametrize(Doubled, "bias")),
    parametrized("custom-parameter", _six, _parametrize(lambda: Gated(6))),
    parametrized("custom-chain", _six, _thrice),
    parametrized("lora", _six, _parametrize(lambda: Merged(6, D))),
    net("parametrized-embedding", lambda m, i: m.e(i).sin(), words, e=_doubled_embedding),
    net("parametrized-layer-used-twice", lambda m, x: m.a(m.a(x).tanh()), a=_doubled),
    net("parametrized-cached", _cached, a=_doubled, p=(D,)),
    net("parametrized-weight-outside", lambda m, x: m.a(x) @ m.a.weight, a=_doubled),
    net("parametrized-and-original", lambda m, x: m.a(x) @ m.a.parametrizations.weight.original, a=_doubled),
]


# ---------------------------------------------------------------------------------------------- tying and modules


class LanguageModel(nn.Module):
    """Words, positions, one layer and a head tied to the word table, as a module or functionally."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.words, self.places, self.layer = nn.Embedding(V, D), par(1, 9, D), linear()
        self.head_kind = head
        if head == "module":
            self.head = linear(D, V)
            self.head.weight = self.words.weight
        else:
            self.bias = par(V)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.layer(self.words(ids) + self.places[:, : ids.shape[1]]).tanh()
        if self.head_kind == "module":
            return self.head(h)
        if self.head_kind == "functional":
            return F.linear(h, self.words.weight, self.bias)
        return h @ self.words.weight.T / math.sqrt(D) + self.bias


class CubeOld(torch.autograd.Function):
    """Of the old form, without rules for vmap."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * w) ** 3

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        common = 3 * (x * w) ** 2 * g
        return common * w, (common * x).flatten(0, -2).sum(0)


class CubeNew(torch.autograd.Function):
    """Of the new form, which vmap may trace."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return (x * w) ** 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        common = 3 * (x * w) ** 2 * g
        return common * w, (common * x).sum_to_size(w.shape)


class FunctionLeaf(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.weight, self.apply_function = par(D), function.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_function(x, self.weight)


class BareLeaf(nn.Module):
    """A leaf module with parameters that is no registered type."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.g = par(D, D), par(D), par(T, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w + self.b).relu() * self.g


class LinearTwice(nn.Linear):
    """A subclass that calls the forward it inherits, and uses the weight once more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x).tanh()) + x @ self.weight


def _shared_by_two(m, x):
    return m.b(m.a(x).tanh())


def _share() -> Net:
    model = Net(_shared_by_two, a=linear(), b=linear())
    model.b.weight = model.a.weight
    return model


def _rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs of the first four features of ``[N, H, T, K]`` by angles ``[T, 1]``."""
    first, second, rest = x[..., :1], x[..., 1:2], x[..., 2:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1)


def _rotary_attention(m, x):
    q, k, v = (layer(x).view(*x.shape[:2], H, K).transpose(1, 2) for layer in (m.q, m.k, m.v))
    angles = torch.arange(T).double().view(T, 1) * m.frequency
    h = F.scaled_dot_product_attention(_rotary(q, angles), _rotary(k, angles), v, is_causal=True)
    return m.o(h.transpose(1, 2).flatten(2))


def _glu(m, x):
    value, gate = (x @ m.w + m.b).chunk(2, -1)
    return value * gate.sigmoid()


def _swiglu(m, x):
    return m.down(F.silu(F.linear(x, m.gate)) * F.linear(x, m.up))


def _selective_scan(m, x):
    """A state space model by a loop over the positions, as Mamba's slow path."""
    step, state, out = F.softplus(m.dt(x)), x.new_zeros(len(x), D, K), []
    b, c = m.bc(x).chunk(2, -1)
    decay = -m.a_log.exp()
    for t in range(x.shape[1]):
        change = (step[:, t, :, None] * decay).exp()
        state = change * state + (step[:, t] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
        out.append((state * c[:, t].unsqueeze(1)).sum(-1))
    return torch.stack(out, 1) + m.d * x


def _cell_loop(m, x):
    h = m.h0.expand(len(x), -1)
    states = []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t], h)
        states.append(h)
    return torch.stack(states, 1)


def _lstm_by_hand(m, x):
    h, c = m.h0.repeat(len(x), 1), m.c0.repeat(len(x), 1)
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ m.wx + h @ m.wh + m.b).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return torch.cat([h, c], -1)


def _learned_state(m, x):
    state = m.h0.unsqueeze(1).expand(-1, len(x), -1).contiguous()
    out, last = m.gru(x, state)
    return torch.cat([out, last.transpose(0, 1)], 1)


def _dense_block(m, x):
    features = [x]
    for p in (m.p, m.q):
        features.append(torch.cat(features, -1) @ p)
    return torch.cat(features, -1)


def _conditional_layers(m, x):
    """A plain loop over layers with a gate each, as a module list and a parameter of one number per layer."""
    for layer, gate in zip(m.layers, m.gates, strict=True):
        x = x + gate * layer(x).tanh()
    return x


def _layers() -> nn.ModuleList:
    return nn.ModuleList([linear(), linear(), linear()])


MODULES = [
    Row("tied-head-module", lambda: LanguageModel("module"), words, traps=(3, 7), empty=True),
    Row("tied-head-functional", lambda: LanguageModel("functional"), words, traps=(3, 7), empty=True),
    Row("tied-head-matmul", lambda: LanguageModel("matmul"), words, traps=(3, 7)),
    net("module-and-its-weight", lambda m, x: F.linear(m.a(m.a(x).tanh()), m.a.weight), a=linear, empty=True),
    net("its-weight-then-module", lambda m, x: m.a((x @ m.a.weight).tanh()) + m.a.bias, a=linear),
    net("conv-and-its-weight", lambda m, x: m.c(x) + F.conv2d(x, m.c.weight), image, c=lambda: nn.Conv2d(6, 7, 3)),
    net("norm-and-its-weight", lambda m, x: m.c(x) * m.c.weight, c=lambda: nn.LayerNorm(D)),
    Row("two-modules-one-weight", _share, tokens),
    net("module-twice-and-bare-gain", lambda m, x: m.a((m.a(x) * m.p).tanh()) * m.p, a=linear, p=(D,)),
    net("module-only-functionally", lambda m, x: torch.addmm(m.a.bias, x, m.a.weight.T), vectors, a=linear),
    net("function-leaf-old", lambda m, x: m.leaf(x.tanh()), leaf=lambda: FunctionLeaf(CubeOld)),
    net("function-leaf-new", lambda m, x: m.leaf(x.tanh()), leaf=lambda: FunctionLeaf(CubeNew)),
    net("bare-leaf", lambda m, x: m.leaf(m.leaf(x)), leaf=BareLeaf, empty=True),
    Row("bare-leaf-as-the-model", BareLeaf, tokens),
    net("subclass-of-linear", lambda m, x: m.a(x), a=lambda: LinearTwice(D, D)),
    net("rotary", _rotary_attention, **dict.fromkeys("qkvo", linear), frequency=(1,), traps=(3, 5)),
    net("glu", _glu, w=(D, 12), b=(12,)),
    net("swiglu", _swiglu, gate=(6, D), up=(6, D), down=lambda: linear(6, D)),
    net(
        "selective-scan",
        _selective_scan,
        dt=linear,
        bc=lambda: linear(D, 2 * K),
        a_log=(D, K),
        d=(D,),
    ),
    net("cell-with-learned-state", _cell_loop, cell=lambda: nn.GRUCell(D, 6), h0=(1, 6), traps=(3, 6)),
    net("rnn-cell-with-learned-state", _cell_loop, cell=lambda: nn.RNNCell(D, 6), h0=(6,), empty=True),
    net("lstm-by-hand", _lstm_by_hand, wx=(D, 24), wh=(6, 24), b=(24,), h0=(1, 6), c0=(1, 6)),
    net("gru-with-learned-state", _learned_state, gru=lambda: nn.GRU(D, 6, batch_first=True), h0=(1, 6)),
    net("dense-connections", _dense_block, p=(D, 6), q=(D + 6, 7)),
    net("gates-per-layer", _conditional_layers, layers=_layers, gates=(3,)),
]


# ------------------------------------------------------------------------------------------ folding and layouts


def _folded(pattern: str) -> Callable:
    """A layer on examples and positions (or heads) folded into one axis, in the order of the pattern."""

    def forward(m, x):
        sizes = {"b": len(x), "t": T}
        h = einops.rearrange(x, f"b t d -> {pattern}", **sizes)
        return einops.rearrange((m.a(h) * m.p).tanh(), f"{pattern} -> b t d", **sizes)

    return forward


def _folded_heads(pattern: str) -> Callable:
    def forward(m, x):
        sizes = {"b": len(x), "t": T, "h": H}
        h = einops.rearrange(x, f"b t (h k) -> {pattern}", **sizes)
        h = F.linear(h, m.w) + m.a(h)
        return einops.rearrange(h.tanh() * m.p, f"{pattern} -> b t (h k)", **sizes)

    return forward


def _folded_conv(pattern: str) -> Callable:
    """A convolution on frames of clips, folded with the examples."""

    def forward(m, x):
        h = einops.rearrange(x, f"b t c y x -> {pattern} c y x")
        h = m.c(h) + F.conv2d(h, m.w, padding=1)
        return einops.rearrange(h, f"{pattern} c y x -> b t c y x", b=len(x), t=T)

    return forward


def clips(n: int) -> tuple:
    return (rand(n, T, 6, 5, 5),)


def _by_reshape(m, x):
    h = x.transpose(0, 1).reshape(-1, D)
    return (m.a(h) * m.p).view(T, len(x), D).transpose(0, 1)


def _time_major(m, x):
    """As XLNet: the batch is on axis 1 inside."""
    h = x.transpose(0, 1).contiguous()
    h = h + m.places[: len(h), None]
    q, k, v = (torch.einsum("tnd,dhk->tnhk", h, w) for w in (m.q, m.k, m.v))
    scores = torch.einsum("inhk,jnhk->ijnh", q + m.u, k) / math.sqrt(K)
    out = torch.einsum("ijnh,jnhk->inhk", scores.softmax(1), v)
    out = torch.einsum("inhk,dhk->ind", out, m.o)
    return m.norm(m.ff(out) + h).transpose(0, 1)


def _time_major_conv(m, x):
    return m.c(x.permute(1, 0, 2).permute(1, 2, 0)).permute(2, 0, 1).transpose(0, 1)


def _one_by_one(m, x):
    return torch.stack([(m.a(x[i]) * m.p).tanh() for i in range(len(x))])


def _one_by_one_kept(m, x):
    return torch.cat([(m.a(x[i : i + 1]) * m.p).tanh() for i in range(len(x))])


def _by_iteration(m, x):
    return torch.stack([F.linear(one, m.w).tanh() for one in x])


def _by_unbind(m, x):
    return torch.stack([m.a(one) + m.p for one in x.unbind(0)])


def _chunked(m, x):
    return torch.cat([m.a(part) * m.p for part in x.chunk(2)])


def _split(m, x):
    return torch.cat([m.a(part) * m.p for part in x.split(2)])


def _two_halves(m, x):
    """Both halves of the batch concatenated behind a common layer, as contrastive models do."""
    h = m.a(torch.cat([x, x.tanh()], 0)) * m.p
    return h[: len(x)] + h[len(x) :].sin()


def _flipped(m, x):
    return (m.a(x.flip(0)) * m.p).flip(0)


def _rolled(m, x):
    return (m.a(x.roll(1, 0)) * m.p).roll(-1, 0)


def _permuted(m, x):
    order = torch.arange(len(x)).flip(0).roll(1)
    return (m.a(x[order]) * m.p)[order.argsort()]


def _sorted_by_length(m, x):
    order = x.flatten(1).sum(1).argsort()
    h = (m.a(x.index_select(0, order)) * m.p).tanh()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(x))
    return h.index_select(0, back)


def _packed_tokens(m, h, mask):
    """Only the tokens that a mask selects go through the layer."""
    out = torch.zeros_like(h)
    out[mask] = (m.a(h[mask]) * m.p).tanh()
    return out + h


def _packed_by_nonzero(m, h, mask):
    rows = mask.flatten().nonzero().squeeze(1)
    picked = m.a(h.reshape(-1, D).index_select(0, rows)) * m.p
    return torch.zeros_like(h).view(-1, D).index_add(0, rows, picked).view_as(h)


def _packed_by_scatter(m, h, mask):
    return torch.zeros_like(h).masked_scatter(mask.unsqueeze(-1), m.a(h[mask]) * m.p)


def _mixture_of_experts(m, x):
    """Each token goes to one expert."""
    h = x.reshape(-1, D)
    gates = m.router(h).softmax(-1)
    weight, chosen = gates.max(-1)
    out = torch.zeros_like(h)
    for number, expert in enumerate(m.layers):
        rows = (chosen == number).nonzero().squeeze(1)
        out = out.index_add(0, rows, expert(h[rows]) * weight[rows].unsqueeze(-1))
    return (out * m.p).view_as(x)


def nodes_and_edges(n: int) -> tuple:
    """Features of nodes, and the two ends of each graph's edges."""
    return rand(n, T, D), torch.randint(T, (n, 2, 7))


def _messages(m, x, edges):
    """Two rounds of messages, the nodes of all graphs in one list."""
    h = x.flatten(0, 1)
    sources, goals = (edges + torch.arange(len(x)).view(-1, 1, 1) * T).transpose(0, 1).flatten(1)
    for _ in range(2):
        h = m.cell(torch.zeros_like(h).index_add_(0, goals, m.a(h[sources])), h)
    return h.view_as(x) * m.p


def _marks(write: Callable) -> Callable:
    """A mask of the outputs that is made by writing ones among zeros where the data says."""
    return lambda m, x: (h := m.a(x) * m.p) * write(h, torch.zeros_like(h.detach()))


def _mark_flat(h, marks):
    """The largest of each example by their number in all."""
    largest = h.flatten(1).topk(30, 1).indices + torch.arange(len(h)).unsqueeze(1) * T * D
    return marks.flatten().index_fill(0, largest.flatten(), 1.0).view_as(h)


def _mark_examples(h, marks):
    marks[(h.mean((1, 2)) > 0).nonzero().squeeze(1)] = 1.0
    return marks


def _mark_entries(h, marks):
    rows, columns = torch.where(h[:, 0] > 0)
    return marks.index_put((rows, torch.zeros_like(rows), columns), torch.ones(()).double())


def rare_words(n: int) -> tuple:
    """Labels, none of which is in the head of an adaptive softmax."""
    return rand(n, D), torch.randint(3, 10, (n,))


def _windows_major(m, x):
    """Pieces of the positions one after the other in the batch, all examples' first pieces first."""
    h = torch.cat(x.chunk(3, dim=1), 0)
    h = m.a(h) * m.p
    return torch.cat(h.chunk(3, dim=0), 1)


def _windows_major_stack(m, x):
    h = torch.stack(x.chunk(3, dim=1)).flatten(0, 1)
    h = (F.linear(h, m.w) + m.p).tanh()
    return h.unflatten(0, (3, len(x))).permute(1, 0, 2, 3).flatten(1, 2)


def _unfolded(m, x):
    patches = F.unfold(x, 3, stride=3).transpose(1, 2)
    return (patches @ m.w + m.places).tanh()


def _refolded(m, x):
    patches = F.unfold(x, 3, padding=1)
    return F.fold(m.w @ patches * m.p, x.shape[-2:], 3, padding=1)


def _patches_by_view(m, x):
    n = len(x)
    h = x.view(n, 6, 2, 3, 3, 3).permute(0, 2, 4, 1, 3, 5).reshape(n, 6, 54)
    return m.a(h) + m.places


def _shuffled_pixels(m, x):
    return F.pixel_unshuffle(F.pixel_shuffle(F.conv2d(x, m.w, padding=1), 3) * m.p, 3)


def _channels_last(m, x):
    h = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(m.c(h), m.w) * m.p


def _channels_last_permuted(m, x):
    h = m.c(x).permute(0, 2, 3, 1)
    return x + (F.gelu(m.norm(h) @ m.w) * m.p).permute(0, 3, 1, 2)


def _warped(m, x):
    grid = F.affine_grid(m.theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False, padding_mode="border")


def _transformed(m, x):
    theta = m.a(x.flatten(1)).view(-1, 2, 3) * 0.1 + m.theta
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def _unbatched_attention(m, x):
    return torch.stack([m.mha(one, one, one)[0] for one in x])


def _grouped_by_frames(m, x):
    """A temporal shift: part of the channels moves to the next frame, frames folded with the examples."""
    n, t, c, y, w = x.shape
    h = x.view(n * t, c, y, w)
    h = h.view(n, t, c, y, w)
    moved = torch.cat([torch.zeros_like(h[:, :1, :2]), h[:, :-1, :2]], 1)
    h = torch.cat([moved, h[:, :, 2:]], 2).view(n * t, c, y, w)
    return (m.c(h) * m.p).view(n, t, -1, y, w)


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(D)


def _cell() -> nn.GRUCell:
    return nn.GRUCell(D, D)


def _conv() -> nn.Conv2d:
    return nn.Conv2d(6, 6, 3, padding=1)


def _turned(turn: Callable, back: Callable) -> Callable:
    """A view of a part is turned in place, and what it shows stays where it is."""

    def function(m, x):
        h = torch.stack([m.a(x), x], -1)
        part = h[..., 0]
        turn(part)
        return h * m.p.unsqueeze(-1) + back(part).unsqueeze(-1)

    return function


def _into(function: Callable) -> Callable:
    """The data is brought into tensors that were there before."""

    def into(m, x):
        with torch.no_grad():
            out = function(x)
            kept = torch.empty_like(out) if isinstance(out, Tensor) else [torch.empty_like(t) for t in out]
            function(x, out=kept)
        return (kept if isinstance(kept, Tensor) else torch.stack(kept, 1)) * m.p

    return into


def _handed_on(m, x):
    """A function that returns a tensor of one example beside a parameter and a constant, as they are."""
    rows = [torch.atleast_1d(row, m.p, m.c) for row in x]
    return torch.stack([row * p * c for row, p, c in rows])


LAYOUTS = [
    net("inv_ex", lambda m, x: torch.linalg.inv_ex(x[:, :, :T] + m.p)[0], p=(T, T)),
    net("solve_ex", lambda m, x: torch.linalg.solve_ex(x[:, :, :T] @ m.c, m.p)[0], p=(T, 2), c=lambda: rand(T, T)),
    net("handed-on", _handed_on, p=(D,), c=lambda: rand(D)),
    net(
        "meshgrid",
        lambda m, x: torch.meshgrid(m.c, x[:, 0, 0] * m.p.sum(), indexing="xy")[1],
        p=(D,),
        c=lambda: rand(7),
    ),
    net("block_diag", lambda m, x: torch.block_diag(m.c, x * m.p)[2:, 3:], vectors, p=(D,), c=lambda: rand(2, 3)),
    *(
        net(f"turned-in-place-{name}", _turned(turn, back), a=linear, p=(D,))
        for name, turn, back in (
            ("unsqueeze_", lambda part: part.unsqueeze_(0), lambda part: part.squeeze(0)),
            ("transpose_", lambda part: part.transpose_(0, 1), lambda part: part.transpose(0, 1)),
        )
    ),
    *(
        net(f"out-{name}", _into(function), p=(D,), deep=False)
        for name, function in (
            ("stack-of-rows", lambda x, **out: torch.stack([*x], **out)),
            ("index_select", lambda x, **out: torch.index_select(x, 1, torch.tensor([1, 0, 1]), **out)),
            ("unbind_copy", lambda x, **out: torch.unbind_copy(x, 1, **out)),
        )
    ),
    *(net(f"folded-{p}", _folded(p), a=linear, p=(D,), empty=p == "(b t) d") for p in ("(b t) d", "(t b) d", "t b d")),
    *(
        net(f"folded-{p}", _folded_heads(p), a=lambda: linear(K, K), w=(K, K), p=(K,), traps=(3, 5))
        for p in ("(b h) t k", "(h b) t k", "b h t k", "h b t k", "(b t h) k", "(h t b) k", "(t b) h k", "h (t b) k")
    ),
    *(
        net(f"folded-conv-{p}", _folded_conv(p), clips, c=_conv, w=(6, 6, 3, 3), traps=(3, 6))
        for p in ("(b t)", "(t b)")
    ),
    net("folded-by-reshape", _by_reshape, a=linear, p=(D,), empty=True),
    net(
        "time-major",
        _time_major,
        **dict.fromkeys("qkvo", (D, H, K)),
        places=(9, D),
        u=(H, K),
        ff=linear,
        norm=_norm,
        traps=(3, 5),
    ),
    net("time-major-conv", _time_major_conv, c=lambda: nn.Conv1d(D, D, 3, padding=1)),
    Row(
        "time-major-model",
        lambda: Net(lambda m, x: (m.a(x) + m.p[: len(x), None]).tanh() * m.q, a=linear(), p=par(9, D), q=par(D)),
        lambda n: (rand(T, n, D),),
        batch_dim=1,
    ),
    net(
        "einops-rearrange-layer",
        lambda m, x: m.r(m.a(m.s(x)) * m.p),
        a=linear,
        p=(D,),
        **{"r": lambda: Rearrange("(b t) d -> b t d", t=T), "s": lambda: Rearrange("b t d -> (b t) d")},
    ),
    net("einops-reduce-layer", lambda m, x: m.r(x * m.p), p=(D,), r=lambda: Reduce("b t d -> b d", "mean")),
    net("einops-reduce", lambda m, x: einops.reduce(m.a(x) * m.p, "b t (h k) -> b h", "max", h=H), a=linear, p=(D,)),
    net("einops-mix", lambda m, x: m.mix(x).tanh(), mix=lambda: EinMix("b t d -> b t e", "d e", "e", d=D, e=6)),
    net(
        "einops-mix-positions",
        lambda m, x: m.mix(x).tanh(),
        mix=lambda: EinMix("b t (h k) -> b s (h k)", "h t s", h=H, t=T, s=7),
        traps=(3, 5, 7),
    ),
    net("einops-pack", lambda m, x: einops.pack([m.p.expand(len(x), D), x], "b * d")[0], p=(D,)),
    net("loop-over-examples", _one_by_one, a=linear, p=(D,)),
    net("loop-over-slices", _one_by_one_kept, a=linear, p=(D,)),
    net("loop-by-iteration", _by_iteration, w=(6, D)),
    net("loop-by-unbind", _by_unbind, a=linear, p=(D,)),
    net("loop-of-unbatched-attention", _unbatched_attention, mha=lambda: nn.MultiheadAttention(D, H)),
    net("batch-chunked", _chunked, a=linear, p=(D,)),
    net("batch-split", _split, a=linear, p=(D,)),
    net("batch-doubled", _two_halves, a=linear, p=(D,)),
    net("batch-flipped", _flipped, a=linear, p=(D,)),
    net("batch-rolled", _rolled, a=linear, p=(D,)),
    net("batch-permuted", _permuted, a=linear, p=(D,)),
    net("batch-sorted", _sorted_by_length, a=linear, p=(D,)),
    net("packed-tokens", _packed_tokens, masked_tokens, a=linear, p=(D,)),
    net("packed-by-nonzero", _packed_by_nonzero, masked_tokens, a=linear, p=(D,)),
    net("packed-by-scatter", _packed_by_scatter, masked_tokens, a=linear, p=(D,)),
    net("mixture-of-experts", _mixture_of_experts, router=lambda: linear(D, 3), layers=_layers, p=(D,)),
    net("marks-by-flat-numbers", _marks(_mark_flat), a=linear, p=(D,)),
    net("marks-on-examples", _marks(_mark_examples), a=linear, p=(D,)),
    net("marks-on-entries", _marks(_mark_entries), a=linear, p=(D,)),
    net(
        "adaptive-softmax",
        lambda m, x, y: m.s(m.a(x), y).output,
        rare_words,
        a=linear,
        s=lambda: nn.AdaptiveLogSoftmaxWithLoss(D, 10, [3, 6], div_value=2.0),
        traps=(3, 5, 7),
    ),
    net("messages-along-edges", _messages, nodes_and_edges, cell=_cell, a=linear, p=(D,), empty=True),
    net("windows-major", _windows_major, lambda n: (rand(n, 9, D),), a=linear, p=(D,), traps=(3, 9)),
    net("windows-major-stack", _windows_major_stack, lambda n: (rand(n, 9, D),), w=(D, D), p=(D,), traps=(3, 9)),
    net("unfold", _unfolded, image, w=(54, D), places=(6, D), traps=(6,), empty=True),
    net("unfold-fold", _refolded, image, w=(54, 54), p=(54, 1), traps=(6,)),
    net("patches-by-view", _patches_by_view, image, a=lambda: linear(54, D), places=(1, 6, D), traps=(6,)),
    net("pixel-shuffle", _shuffled_pixels, image, w=(9, 6, 3, 3), p=(18, 27), traps=(6,)),
    net("channels-last", _channels_last, image, c=_conv, w=(7, 6, 1, 1), p=(7, 1, 1)),
    net(
        "channels-last-input",
        _channels_last,
        lambda n: (image(n)[0].contiguous(memory_format=torch.channels_last),),
        c=_conv,
        w=(7, 6, 1, 1),
        p=(7, 1, 1),
        deep=False,
    ),
    net("convnext-block", _channels_last_permuted, image, c=_conv, norm=lambda: nn.LayerNorm(6), w=(6, 6), p=(6,)),
    net("grid-sample-learned", _warped, image, theta=(1, 2, 3)),
    net("grid-sample-of-a-network", _transformed, image, a=lambda: linear(324, 6), theta=(2, 3)),
    net("frames-shifted", _grouped_by_frames, clips, c=_conv, p=(6, 1, 1), traps=(3, 6)),
]


# ------------------------------------------------------------------------------------- attention of torch itself


W, HEADS = 18, 6  # an even number of heads, so that torch's fast path for inference would be taken


def wide(n: int) -> tuple:
    return (rand(n, T, W),)


def both(name: str, make: Callable[[], nn.Module], inputs: Callable, **more: Any) -> list[Row]:
    """In training (without dropout) and in evaluation mode."""
    return [
        Row(f"{name}-train", lambda: make().train(), inputs, **more),
        Row(f"{name}-eval", lambda: make().eval(), inputs, **more),
    ]


def _causal() -> Tensor:
    return torch.ones(T, T).triu(1).bool()


def _causal_float() -> Tensor:
    return torch.zeros(T, T).double().masked_fill(_causal(), float("-inf"))


def _padding(n: int) -> Tensor:
    """The last position of every other example is padding."""
    mask = torch.zeros(n, T, dtype=torch.bool)
    mask[::2, -1] = True
    return mask


def attention(name: str, call: Callable, inputs: Callable = wide, axes: Any = None, **options: Any) -> list[Row]:
    """`nn.MultiheadAttention` between a gain and a bias; ``call(mha, *inputs)``; with ``batch_first`` or without."""
    first = options.setdefault("batch_first", True)

    def make() -> nn.Module:
        return Net(
            lambda m, x, *rest: call(m.mha, x * m.gain, *rest)[0] + m.bias,
            mha=nn.MultiheadAttention(W, HEADS, **options),
            gain=pos(W),
            bias=par(W),
        )

    layout = {"batch_dim": 0 if first else 1, "axes": axes}
    return both(f"mha-{name}{'' if first else '-time-major'}", make, inputs, traps=(3, 6), **layout)


def time_major(n: int) -> tuple:
    return (rand(T, n, W),)


def crossed(n: int) -> tuple:
    return rand(n, T, W), rand(n, 7, W)


def crossed_time_major(n: int) -> tuple:
    return rand(T, n, W), rand(7, n, W)


def crossed_sizes(n: int) -> tuple:
    return rand(n, T, W), rand(n, 7, 6), rand(n, 7, 9)


def padded(n: int) -> tuple:
    return rand(n, T, W), _padding(n)


def padded_time_major(n: int) -> tuple:
    return rand(T, n, W), _padding(n)


def _some_mask(n: int) -> Tensor:
    """Random masks ``[N, T, T]`` that leave each query its own position."""
    return (torch.rand(n, T, T) < 0.4) & ~torch.eye(T, dtype=torch.bool)


def self_attention(**call: Any) -> Callable:
    return lambda mha, x: mha(x, x, x, **call)


def _attend_padded(mha, x, mask):
    return mha(x, x, x, key_padding_mask=mask)


def _attend_padded_and_causal(mha, x, mask):
    return mha(x, x, x, key_padding_mask=mask, attn_mask=_causal(), need_weights=False)


def _attend_3d(mha, x, mask):
    return mha(x, x, x, attn_mask=mask.repeat_interleave(HEADS, 0))


def _attend_3d_float(mha, x, mask):
    values = torch.zeros(mask.shape).double().masked_fill(mask, -3.0)
    return mha(x, x, x, attn_mask=values.repeat_interleave(HEADS, 0), need_weights=False)


def _attend_with_weights(mha, x):
    out, weights = mha(x, x, x, average_attn_weights=False)
    return (out + torch.einsum("nhqk,nkd->nqd", weights, x),)


def _attend_to_prefix(mha, x):
    """Learned keys in front of those of the data (the module's own bias for keys stands for them)."""
    return mha(x, torch.cat([x, mha.bias_k.expand(len(x), 1, W)], 1), torch.cat([x, x[:, :1]], 1))


MULTIHEAD = [
    row
    for rows in (
        attention("self", self_attention()),
        attention("self", self_attention(), time_major, batch_first=False),
        attention("self-no-weights", self_attention(need_weights=False)),
        attention("self-no-weights", self_attention(need_weights=False), time_major, batch_first=False),
        attention("weights-of-heads", _attend_with_weights),
        attention("no-bias", self_attention(), bias=False),
        attention("cross", lambda mha, x, y: mha(x, y, y), crossed),
        attention("cross", lambda mha, x, y: mha(x, y, y), crossed_time_major, batch_first=False),
        attention("cross-keyword", lambda mha, x, y: mha(value=y, key=y, query=x, need_weights=False), crossed),
        attention("kdim-vdim", lambda mha, x, k, v: mha(x, k, v), crossed_sizes, kdim=6, vdim=9),
        attention("bias-kv", self_attention(), add_bias_kv=True),
        attention("bias-kv", self_attention(need_weights=False), time_major, add_bias_kv=True, batch_first=False),
        attention("bias-kv-used-outside", _attend_to_prefix, add_bias_kv=True),
        attention("zero-attn", self_attention(), add_zero_attn=True),
        attention("padding", _attend_padded, padded),
        attention("padding", _attend_padded, padded_time_major, axes=(1, 0), batch_first=False),
        attention("padding-and-causal", _attend_padded_and_causal, padded),
        attention("mask-bool", lambda mha, x: mha(x, x, x, attn_mask=_causal())),
        attention("mask-float", lambda mha, x: mha(x, x, x, attn_mask=_causal_float())),
        attention(
            "mask-is-causal", lambda mha, x: mha(x, x, x, attn_mask=_causal(), is_causal=True, need_weights=False)
        ),
        attention("mask-3d-bool", _attend_3d, lambda n: (rand(n, T, W), _some_mask(n))),
        attention("mask-3d-float", _attend_3d_float, lambda n: (rand(n, T, W), _some_mask(n))),
    )
    for row in rows
]


def transformer(name: str, layer: Callable[[], nn.Module], call: Callable, inputs: Callable, **more: Any) -> list[Row]:
    """A layer of `nn.Transformer` behind learned positions; ``call(layer, *inputs)``."""
    axis = more.get("batch_dim", 0)

    def make() -> nn.Module:
        return Net(
            lambda m, x, *rest: call(m.layer, x + m.places.unsqueeze(axis), *rest), layer=layer(), places=par(T, W)
        )

    return both(name, make, inputs, traps=(3, 6), **more)


def _options(**options: Any) -> dict[str, Any]:
    return {"dropout": 0.0, "dim_feedforward": 7, "batch_first": True, **options}


def _alone(layer, x):
    return layer(x)


def _with_memory(layer, x, memory):
    return layer(x, memory, tgt_mask=_causal_float())


LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "-norm-first": {"norm_first": True},
    "-gelu": {"activation": "gelu"},
    "-no-bias": {"bias": False},
    "-time-major": {"batch_first": False},
    "-time-major-norm-first-gelu": {"batch_first": False, "norm_first": True, "activation": F.gelu},
}


def _encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(W, HEADS, **_options(**options))


def _decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(W, HEADS, **_options(**options))


def _encoder(nested: bool, **options: Any) -> nn.Module:
    return nn.TransformerEncoder(_encoder_layer(**options), 2, norm=nn.LayerNorm(W), enable_nested_tensor=nested)


def _decoder(**options: Any) -> nn.Module:
    return nn.TransformerDecoder(_decoder_layer(**options), 2)


def _whole(**options: Any) -> nn.Module:
    return nn.Transformer(W, HEADS, 1, 1, **_options(**options))


def _layer_rows(name: str, options: dict[str, Any]) -> list[Row]:
    axis = 0 if options.get("batch_first", True) else 1
    x, pair = (wide, crossed) if axis == 0 else (time_major, crossed_time_major)
    return [
        *transformer(f"encoder-layer{name}", lambda: _encoder_layer(**options), _alone, x, batch_dim=axis),
        *transformer(f"decoder-layer{name}", lambda: _decoder_layer(**options), _with_memory, pair, batch_dim=axis),
    ]


def _encode_padded(encoder, x, mask):
    return encoder(x, src_key_padding_mask=mask)


TRANSFORMERS = [
    *(row for name, options in LAYER_OPTIONS.items() for row in _layer_rows(name, options)),
    *transformer("encoder", lambda: _encoder(False), _alone, wide),
    *transformer("encoder-nested-padding", lambda: _encoder(True), _encode_padded, padded),
    *transformer("encoder-padding", lambda: _encoder(False), _encode_padded, padded),
    *transformer(
        "encoder-time-major",
        lambda: _encoder(False, batch_first=False, norm_first=True),
        _alone,
        time_major,
        batch_dim=1,
    ),
    *transformer("decoder", _decoder, _with_memory, crossed),
    *transformer("transformer", _whole, lambda t, x, y: t(x, y), crossed),
    *transformer(
        "transformer-time-major",
        lambda: _whole(batch_first=False),
        lambda t, x, y: t(x, y),
        crossed_time_major,
        batch_dim=1,
        out_axis=1,
    ),
]

ROWS = [
    *ELEMENTWISE,
    *TOKENS,
    *ATTENTION_BIAS,
    *PRODUCTS,
    *CONVOLUTIONS,
    *NORMS,
    *PARAMETRIZED,
    *MODULES,
    *LAYOUTS,
    *MULTIHEAD,
    *TRANSFORMERS,
]


# ------------------------------------------------------------------------------------------ what is refused


@dataclass(frozen=True)
class Refused:
    """A model that must be refused, or (``exact_is_fine``) be exact or refused.

    Attributes:
        match: What the message names: the parameter, module or operation.
        extra: A further term of the loss, a function of the model.
    """

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple] = tokens
    error: type[PerExampleError] = CrossExampleError
    match: str = r"`"
    extra: Callable[[nn.Module], Tensor] | None = None
    exact_is_fine: bool = False
    n: int = 4


PLACE = r"`([^`]*\.)?(a|a\.weight|a\.bias|p)\b[^`]*`|`\w+` in `\w+`"  # a parameter or module, or an operation


def mixing(name: str, function: Callable, inputs: Callable = tokens, **more: Any) -> Refused:
    """A row with a linear layer ``a`` and a gain ``p``; the message names one of them, or the operation."""
    keys = ("error", "match", "extra", "exact_is_fine", "n")
    settings = {key: more.pop(key) for key in keys if key in more}
    match = settings.setdefault("match", PLACE)
    settings["match"] = match if "`" in match else f"{match}|{PLACE}"
    return Refused(name, net(name, function, inputs, a=linear, p=(D,), **more).make, inputs, **settings)


def _training_batch_norm(m, x):
    return F.batch_norm(x.flatten(1), None, None, m.w, m.b, training=True)


def _pairs(m, x):
    """Examples two by two on an axis of their own, not mixed."""
    return (m.a(x.view(2 - len(x) % 2, -1, T, D)) * m.p).view_as(x)


def _pairs_compared(m, x):
    h = m.a(x).view(2 - len(x) % 2, -1, T, D) * m.p
    return (h - h.mean(0)).view_as(x)


def _chosen(function: Callable) -> Callable:
    """What an example makes of the number that another one has chosen."""
    return lambda m, x: function(m.a(x).flatten(1), x.flatten(1).argmax(1).flip(0) % D).view(len(x), -1) * m.p[:1]


def _read_for_another(h, y):
    return h[torch.arange(len(h)), y]


def _written_for_another(h, y):
    return torch.zeros_like(h).scatter(1, y.unsqueeze(1), h[:, :1]) + h


def _marked_for_another(h, y):
    rows = (y >= 0).flip(0).nonzero().squeeze(1)
    marks = torch.zeros_like(h.detach())
    marks[rows, y] = 1.0
    return h * marks


def _numbered(m, x):
    """Kinds of examples numbered as they come; a trial does not change which there are."""
    kinds = (x.flatten(1).sum(1) > 0).long()
    return (m.a(x) * m.p).flatten(1) * torch.unique(kinds, return_inverse=True)[1].unsqueeze(1)


def _strided_rows(m, x):
    """A row is a view of the memory of all of them."""
    return torch.stack([row.as_strided((D,), (1,), 0) for row in m.a(x)]) * m.p


def _strided_columns(m, x):
    """Between the entries of one column there are those of another."""
    columns = torch.stack([m.a(x), x.flip(0)], -1)
    return columns[..., 0].as_strided((len(x), D), (2 * T * D, 1)) * m.p


def _gram(m, x):
    return (x @ x.T) @ m.a(x) * m.p


MIXED = [
    mixing("minus-mean-before-gain", lambda m, x: (x - x.mean(0)) * m.p + m.a(x), match="mean|sub|mul"),
    mixing("read-beyond-the-row", _strided_rows, error=BatchAxisError, match="as_strided"),
    mixing("read-between-the-rows", _strided_columns, error=BatchAxisError, match="as_strided"),
    mixing("minus-mean-before-layer", lambda m, x: m.a(x - x.mean(0)) * m.p, match="mean|sub"),
    mixing("minus-mean-between", lambda m, x: m.a((h := x * m.p) - h.mean(0)), match="mean|sub|mul"),
    mixing("minus-mean-of-the-output", lambda m, x: (h := m.a(x) * m.p) - h.mean(0), match="mean|sub"),
    mixing("minus-mean-of-the-input", lambda m, x: (m.a(x - x.mean(0)) * m.p).tanh(), match="mean|sub"),
    mixing("softmax-over-examples", lambda m, x: m.a(x.softmax(0)) * m.p, match="softmax"),
    mixing("softmax-of-a-gain", lambda m, x: m.a(x) * (x * m.p).softmax(0), match="softmax"),
    mixing("divided-by-the-norm", lambda m, x: m.a(F.normalize(x, dim=0)) * m.p, match="norm|div"),
    mixing("standardised", lambda m, x: m.a((x - x.mean()) / x.std()) * m.p, match="mean|std"),
    mixing("gram", _gram, vectors, match="matmul"),
    mixing("attention-over-examples", lambda m, x: (x @ x.T).softmax(-1) @ (m.a(x) * m.p), vectors, match="matmul"),
    mixing("einsum-of-pairs", lambda m, x: torch.einsum("nd,md->nm", m.a(x) * m.p, x), vectors, match="einsum"),
    mixing("cumsum", lambda m, x: m.a(x.cumsum(0)) * m.p, match="cumsum"),
    mixing("cumsum-of-the-output", lambda m, x: (m.a(x) * m.p).cumsum(0), match="cumsum"),
    mixing("neighbour", lambda m, x: m.a(x - x.roll(1, 0)) * m.p, match="roll"),
    mixing("mirror", lambda m, x: m.a(x + x.flip(0)) * m.p, match="flip"),
    mixing("first-example", lambda m, x: m.a(x) * m.p + x[:1], match="getitem"),
    mixing("first-example-of-the-output", lambda m, x: (h := m.a(x) * m.p) - h[:1], match="getitem"),
    mixing("gathered-for-another", _chosen(lambda h, y: h.gather(1, y.unsqueeze(1))), match="gather"),
    mixing("read-for-another", _chosen(_read_for_another), match="getitem"),
    mixing("written-for-another", _chosen(_written_for_another), match="scatter"),
    mixing("marked-for-another", _chosen(_marked_for_another), match="setitem|mul"),
    mixing(
        "table-of-pairs",
        lambda m, x: m.a(x) * m.p * m.t[(y := x.flatten(1).argmax(1) % D), y.flip(0)].view(-1, 1, 1),
        match="getitem",
        t=lambda: torch.rand(D, D, dtype=torch.float64),
    ),
    mixing(
        "bags-of-several",
        lambda m, x: m.a(x) * m.p + m.e((x[..., 0] > 0).long().flatten(), torch.tensor([0, 1])).sum(),
        match="several examples",
        e=lambda: nn.EmbeddingBag(V, D),
    ),
    mixing("numbered-by-kind", _numbered, match="unique", n=6),
    mixing("sorted", lambda m, x: m.a(x.sort(0).values) * m.p, match="sort"),
    mixing("maximum-of-all", lambda m, x: m.a(x / x.amax(0)) * m.p, match="amax"),
    mixing("gain-from-the-batch", lambda m, x: m.a(x) * (m.p * x.mean((0, 1))).exp(), match="mean|mul"),
    mixing("layer-of-the-mean", lambda m, x: x * m.p + m.a(x.mean(0)), match="mean"),
    mixing("one-loss-for-all", lambda m, x: (m.a(x) * m.p).square().mean().expand(len(x), 1), match="mean|loss"),
    mixing("shuffled-on-the-batch", lambda m, x: m.a(x.reshape(T, -1, D)).reshape(x.shape) * m.p, exact_is_fine=True),
    mixing("pairs-on-an-axis", _pairs, exact_is_fine=True),
    mixing("pairs-compared", _pairs_compared, error=PerExampleError, match="view|mean"),
    Refused(
        "batch-norm",
        lambda: Net(_training_batch_norm, w=par(T * D), b=par(T * D)),
        error=PerExampleError,
        match="batch_norm",
    ),
    Refused(
        "batch-norm-of-images",
        lambda: Net(
            lambda m, x: F.batch_norm(x, m.mean, m.var, m.w, training=True), w=par(6), mean=rand(6), var=pos(6).data
        ),
        image,
        PerExampleError,
        "batch_norm",
    ),
    mixing(
        "penalty-on-a-bare-parameter",
        lambda m, x: m.a(x) * m.p,
        error=UncoveredParameterError,
        match=r"`(.*\.)?p`",
        extra=lambda m: 0.1 * m.p.square().sum(),
    ),
    mixing(
        "penalty-on-a-weight",
        lambda m, x: m.a(x) * m.p,
        error=UncoveredParameterError,
        match=r"`(.*\.)?a\.weight`",
        extra=lambda m: 0.1 * m.a.weight.norm(),
    ),
    mixing(
        "penalty-on-a-computed-weight",
        lambda m, x: F.linear(x, m.a.weight * m.p),
        error=UncoveredParameterError,
        match=r"`(.*\.)?(a\.weight|p)`",
        extra=lambda m: (m.a.weight * m.p).abs().sum(),
    ),
    Refused(
        "function-in-a-container",
        lambda: Net(lambda m, x: CubeOld.apply(m.a(x), m.p), a=linear(), p=par(D)),
        error=PerExampleError,
        match=r"`(.*\.)?p`|Cube",
        exact_is_fine=True,
    ),
]
