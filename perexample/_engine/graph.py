"""What autograd's graph between the loss and the taps tells: its nodes, their kinds, shapes and axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from .._private import is_named_by_kind, metadata, ones_for, output_shape, saved, value_of
from .kinds import names
from .tap import KEY, RETURNED, Tap
from .walk import Walk

EACH = names(  # nodes of functions of each entry
    "Add Sub Rsub Mul Div Neg Exp Exp2 Expm1 Log Log1P Log2 Log10 Pow Sqrt Rsqrt Square Reciprocal Abs Sign Sigmoid "
    "Tanh Relu LeakyRelu Elu Gelu Silu Mish Softplus LogSigmoid Hardtanh Hardsigmoid Hardswish Clamp ClampMin ClampMax "
    "Maximum Minimum Where MaskedFill Erf Sin Cos Tan Atan Asin Acos Sinh Cosh Xlogy Xlog1Py Lerp Addcmul Addcdiv "
    "Lgamma Digamma Copy ToCopy Clone Alias NativeDropout Fmod Remainder Trunc Round Floor Ceil NanToNum "
    "Atan2 Hypot Logaddexp Logaddexp2 Copysign"
)
LINEAR = names(  # of one tensor that has a graph, whatever else they are given: sums of its entries times numbers
    "Add Sub Rsub Neg Mul Div View UnsafeView Reshape Flatten Unflatten Transpose Permute T Expand Unsqueeze Squeeze "
    "Select Slice Index IndexSelect Gather Sum Mean Nanmean Nansum Cat Stack Unbind Split SplitWithSizes Chunk Clone "
    "Alias Copy ToCopy Mm Addmm Bmm Baddbmm Mv Addmv Dot Vdot Cumsum Flip Roll Repeat RepeatInterleave Scatter "
    "ScatterAdd IndexAdd IndexPut IndexCopy MaskedFill MaskedSelect MaskedScatter ConstantPadNd AsStrided Diagonal "
    "Trace Tril Triu Where Lerp Addcmul NativeDropout Detach Unfold AvgPool1D AvgPool2D AdaptiveAvgPool2D Movedim Real "
    "Imag Convolution Take Put Trapezoid FftR2C FftC2R FftC2C NanToNum torch::autograd::CopySlices"
)
_MOST = 4096  # forms that are remembered
_FEW = 2**22  # entries of the largest tensor up to which a part of a graph is differentiated once more

Near = tuple[GradientEdge, Tap, int]  # an edge at which a tap is, and which of its outputs that is


_KINDS: dict[type, str] = {}


def kind_of(node: Node) -> str:
    """The operation that a graph node differentiates, without the number of its variant."""
    kind = _KINDS.get(type(node))
    if kind is None:
        kind = node.name().partition("Backward")[0]
        if is_named_by_kind(node):
            _KINDS[type(node)] = kind
    return kind


def shape_of(node: Node | None, number: int) -> torch.Size | None:
    """Shape of a tensor, as far as the graph tells it."""
    return None if node is None else output_shape(node, number)


def dims_of(node: Node, axes: int) -> set[int]:
    """The axes that an operation goes along; all of them if it does not tell."""
    dims = saved(node, "dim")
    if dims is None and kind_of(node) == "Transpose":
        dims = saved(node, "dim0"), saved(node, "dim1")
    if dims is None or dims == ():
        return set(range(axes))
    wrapped = [dims] if isinstance(dims, int) else dims
    return {(d - 2**64 if d >= 2**63 else d) % axes for d in wrapped}


def number_of(node: Node) -> float | None:
    """What a product or quotient is multiplied with or divided by, if it is a single number, be it a tensor."""
    other = saved(node, "other")  # no tensor where torch itself has divided
    if other is None and kind_of(node) == "Mul":
        other = saved(node, "self")  # the one in front
    if isinstance(other, Tensor):
        return value_of(other) if other.numel() == 1 else None
    return float(other) if isinstance(other, (int, float)) else None


def nearest_taps(edge: GradientEdge) -> Iterator[Near]:
    """The taps that are reached first."""
    stack: list[tuple[Node | None, int]] = [(edge.node, edge.output_nr)]
    seen: set[tuple[Node, int]] = set()
    while stack:
        node, number = stack.pop()
        if node is None or (node, number) in seen:
            continue
        seen.add((node, number))
        tapped = metadata(node).get(KEY, {})
        if number in tapped:
            tap, index = tapped[number]
            yield GradientEdge(node, number), tap, index
        else:
            stack.extend(node.next_functions)


def live_taps(edge: GradientEdge, found: Walk) -> list[Near]:
    """Those of them that the loss depends on."""
    return [(at, tap, index) for at, tap, index in nearest_taps(edge) if index in found.taps.get(tap, ())]


def examples_of(edge: GradientEdge, found: Walk, weights: Tensor | None = None) -> int:
    """On how many examples a tensor depends, or its sum with some weights."""
    return len(owners_of(edge, found, weights))


def owners_of(edge: GradientEdge, found: Walk, weights: Tensor | None = None) -> set[int]:
    """The examples on which a tensor depends, or its sum with some weights, by its gradients at the nearest taps."""
    taps = list(nearest_taps(edge))
    if not taps:
        return set()
    edges = [at for at, _, _ in taps]
    weights = ones_for(edge) if weights is None else weights
    grads = torch.autograd.grad(edge, edges, weights, retain_graph=True, allow_unused=True)
    owners = set[int]()
    for (_, tap, index), g in zip(taps, grads, strict=True):
        if g is not None and index in found.taps.get(tap, ()):
            place = tap.places[index]
            rows = (place.rows_first(tap.in_shape(index, g)) != 0).unsqueeze(-1).flatten(1).any(1)
            owners.update(place.space.owners(rows.device)[rows].tolist())
    return owners - {-1}


def nodes_to_taps(edge: GradientEdge, *, behind_models: bool = False) -> list[Node]:
    """The nodes between a tensor and the nearest taps.

    Args:
        edge: Of the tensor.
        behind_models: Only those that are behind what a forward has returned, in which all is known.

    Returns:
        The nodes, in an order that is the same for the same graph.
    """
    stack: list[tuple[Node | None, int]] = [(edge.node, edge.output_nr)]
    seen: dict[Node, None] = {}
    while stack:
        node, number = stack.pop()
        if node is None or node in seen:
            continue
        notes = metadata(node)
        if number in notes.get(KEY, {}) or (behind_models and number in notes.get(RETURNED, ())):
            continue
        seen[node] = None
        stack += node.next_functions
    return list(seen)


def is_light(nodes: Sequence[Node]) -> bool:
    """Whether to differentiate once more takes time only: what users wrote may do anything, large tensors take room."""
    largest = max((shape.numel() for node in nodes if (shape := shape_of(node, 0)) is not None), default=0)
    return largest <= _FEW and not any(isinstance(node, BackwardCFunction) for node in nodes)


class Seldom:
    """Counts forms of what is to be looked at ever more seldom, for each model."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()

    def is_due(self, model: nn.Module | None, form: int) -> bool:
        """Whether it is the first, second, fourth, ... of a form; always, if nothing can be remembered."""
        if model is None:
            return True
        counts = self._counts.setdefault(model, {})
        if len(counts) >= _MOST:
            counts.clear()
        count = counts[form] = counts.get(form, 0) + 1
        return count & (count - 1) == 0

    def forget(self, model: nn.Module | None, form: int) -> None:
        """It is due the next time too."""
        if model is not None:
            self._counts.get(model, {}).pop(form, None)
