"""Whether a loss couples the examples: whether one example's gradient changes with what another one is.

What the loss function does to the model's outputs is not followed. Where its graph shows an operation in which examples
may meet (products of outputs, softmax over the batch, means over the batch, permutations), the loss is differentiated
twice: it is a sum of the examples' own losses only if ``d^2 loss / dz_n dz_m`` is zero
for the outputs ``z`` of any two examples. For half of the examples at a time, those whose number has a bit set, the
gradients are summed with random weights and differentiated by the outputs of the other half; each two examples differ
in a bit. That is done at the first backward of each form of the graph, at the second, the fourth, and so on, as
examples may have to do with each other by a permutation that is drawn, or only beyond a threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from .._private import metadata, ones_for, options_of, saved
from ..errors import CrossExampleError
from .joins import examples_of, kind_of, nearest_taps, shape_of
from .kinds import names
from .state import STATE
from .tap import KEY
from .walk import Walk

_MIXES = names(
    "Index IndexSelect Gather TakeAlongDim Take Roll Flip Sort Msort IndexAdd IndexReduce ScatterAdd ScatterReduce Put "
    "SegmentReduce NativeBatchNorm CudnnBatchNorm MiopenBatchNorm Cdist EuclideanDist Pdist Dot Mv Addmv Addr Ger "
    "LinalgVecdot Bilinear Cov Corrcoef"
)
_ALONG = names(
    "Sum Mean Nansum Prod Std Var StdMean VarMean Softmax LogSoftmax Logsumexp Norm LinalgVectorNorm Amax Amin Max Min "
    "Median Nanmedian Kthvalue Mode Topk Cumsum Cumprod Logcumsumexp Cummax Cummin Renorm Unfold"
)
_HARMLESS = names(  # by the names of their nodes, which tell sums over everything from others
    "MeanBackward0 SumBackward0 NllLossBackward0 NllLoss2DBackward0 MseLossBackward0 BinaryCrossEntropyBackward0 "
    "BinaryCrossEntropyWithLogitsBackward0 HuberLossBackward0 SmoothL1LossBackward0"
)
_PRODUCTS = {"Mm": 0, "Addmm": 1, "Matmul": 0, "Bmm": 0, "Baddbmm": 1, "Addbmm": 1}  # which input has the rows
_DISTANCES = names("Cdist Pdist")  # which torch differentiates only once
_FEW = 2**24  # entries of the largest tensor up to which a loss is differentiated twice
_MOST = 4096  # nodes, and forms that are remembered
_SOME = 4  # entries of distances that are looked at
_SHARE = 1e-5  # of the largest second derivative: what is below is rounding
_SEEN: dict[Any, int] = {}  # how many backwards there were of each form in which examples may have met


def check_couplings(loss: Tensor, found: Walk, n: int) -> None:
    """Refuse losses in which examples meet before they are joined.

    Nothing is differentiated where the graph shows no such operation, or one that a user wrote; where the forward ran
    outside of the context; or where a hook was put on a tensor inside of it.

    Args:
        loss: The loss.
        found: The graph below it.
        n: Number of examples.

    Raises:
        CrossExampleError: If a second derivative across two examples is not zero.
    """
    if n < 2 or STATE.once or STATE.opened is None:
        return
    nodes = list(_nodes(loss))
    places = [node for node in nodes if _may_couple(node, n)] if len(nodes) <= _MOST else []
    if not places or any(tap.record.opened is not STATE.opened for tap in found.taps):
        return
    form = tuple(_form(node, n) for node in nodes)
    if not _is_due(form) or not _can_be_differentiated(nodes):
        return
    if _couples(loss, found, n) or any(_meet_in(node, found) for node in places if kind_of(node) in _DISTANCES):
        del _SEEN[form]  # it is due the next time too
        raise CrossExampleError(
            f"The loss couples examples: the gradient of one changes with the outputs of others, for which "
            f"{places[-1].name()} is the likely place, so none has a loss of its own, and clipping bounds nothing. "
            f"Contrastive losses, statistics and distances over the batch have no per-example gradients; use a loss of "
            f"each example's own outputs, or let one example be a whole group that is compared within itself."
        )


def _is_due(form: Any) -> bool:
    """Whether it is the first, second, fourth, ... loss of a form."""
    if len(_SEEN) >= _MOST:
        _SEEN.clear()
    count = _SEEN[form] = _SEEN.get(form, 0) + 1
    return count & (count - 1) == 0


def _nodes(loss: Tensor) -> Iterator[Node]:
    """The nodes between the loss and the taps."""
    stack: list[tuple[Node | None, int]] = [(loss.grad_fn, loss.output_nr)]
    seen: set[Node] = set()
    while stack:
        node, number = stack.pop()
        if node is None or node in seen or number in metadata(node).get(KEY, {}):
            continue
        seen.add(node)
        yield node
        stack += node.next_functions


def _may_couple(node: Node, n: int) -> bool:
    """Whether examples may meet in an operation, as far as shapes tell; they are thought to be on the first axis."""
    if node.name() in _HARMLESS:
        return False
    shape, inputs = shape_of(node, 0), node.next_functions
    if shape is None:
        return False
    kind, given = kind_of(node), [edge for edge in inputs if edge[0] is not None]
    if kind in _MIXES:
        return True
    if kind in _PRODUCTS:
        return [edge[0] is not None for edge in inputs].index(True) != _PRODUCTS[kind] or len(given) > 1
    shapes = [known for edge in given if (known := shape_of(*edge)) is not None]
    if kind in _ALONG and shapes and len(shapes[0]) and (shape.numel() > 1 or kind not in ("Sum", "Mean")):
        return 0 in _dims(node, len(shapes[0])) or _lost(shapes[0], n)
    grown = len(shapes) > 1 and all(known != shape and known.numel() > 1 for known in shapes)
    return grown or (shape.numel() > 1 and _lost(shape, n) and any(not _lost(known, n) for known in shapes))


def _lost(shape: torch.Size, n: int) -> bool:
    """Whether the first axis cannot count the examples."""
    return not shape or shape[0] % n != 0


def _dims(node: Node, axes: int) -> set[int]:
    """The axes that an operation goes along; all of them if it does not tell."""
    dims = saved(node, "dim")
    if dims is None or dims == ():
        return set(range(axes))
    wrapped = [dims] if isinstance(dims, int) else dims
    return {(d - 2**64 if d >= 2**63 else d) % axes for d in wrapped}


def _form(node: Node, n: int) -> Any:
    """What makes one loss like another: its operations with their options, and sizes up to the number of examples."""

    def relative(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(relative, value))
        return (value // n, "N") if type(value) is int and value and value % n == 0 else str(value)

    given = tuple(before is not None for before, _ in node.next_functions)
    return node.name(), relative(shape_of(node, 0)), given, relative(options_of(node))


def _can_be_differentiated(nodes: list[Node]) -> bool:
    """Whether nothing but time is spent: what users wrote may do anything, and large tensors may leave no room."""
    largest = max((shape.numel() for node in nodes if (shape := shape_of(node, 0)) is not None), default=0)
    return largest <= _FEW and not any(isinstance(node, BackwardCFunction) for node in nodes)


def _couples(loss: Tensor, found: Walk, n: int) -> bool:
    """Whether a second derivative across two examples is not zero, as far as torch can differentiate twice."""
    node = loss.grad_fn
    assert node is not None
    taps = [near for near in nearest_taps(GradientEdge(node, loss.output_nr)) if near[2] in found.taps.get(near[1], ())]
    edges = [edge for edge, _, _ in taps]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
            draws = torch.Generator().manual_seed(0)
            rows = [_rows(near, g) for near, g in zip(taps, gradients, strict=True) if g is not None]
            sums = [((r * _noise(r, draws)).flatten(1).sum(1), owner) for r, owner in rows if r.requires_grad]
            return any(_across(taps, edges, sums, bit) for bit in range((n - 1).bit_length())) if sums else False
    except (RuntimeError, NotImplementedError):  # what has no second derivative, or no room for it
        return False


def _meet_in(node: Node, found: Walk) -> bool:
    """Whether an entry of what an operation gives depends on several examples; some entries are looked at."""
    edge = GradientEdge(node, 0)
    ones = ones_for(edge)
    chosen = [torch.zeros_like(ones) for _ in range(min(_SOME, ones.numel()))]
    for number, weights in enumerate(chosen):
        weights.view(-1)[min(ones.numel() * number // len(chosen) + number % 2, ones.numel() - 1)] = 1.0
    return any(examples_of(edge, found, weights) > 1 for weights in chosen)


def _rows(near: tuple[GradientEdge, Any, int], g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a tap's output by rows, and the example of each."""
    _, tap, index = near
    place = tap.places[index]
    return place.rows_first(tap.in_shape(index, g)), place.space.owners(g.device)


def _noise(like: Tensor, draws: torch.Generator) -> Tensor:
    """Random weights."""
    return torch.randn(like.shape, generator=draws).to(like.device, like.dtype)


def _across(taps: list, edges: list[GradientEdge], sums: list[tuple[Tensor, Tensor]], bit: int) -> bool:
    """Whether what is computed from the gradients of half of the examples depends on the others."""
    total = torch.stack([of_rows[_half(owner, bit)].sum() for of_rows, owner in sums]).sum()
    found = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
    largest, others = 0.0, 0.0
    for near, h in zip(taps, found, strict=True):
        if h is None or not h.numel():
            continue
        rows, owner = _rows(near, h.detach())
        size = rows.abs().flatten(1).amax(1)
        if not bool(size.isfinite().all()):  # as of masks that are infinite
            return False
        largest = max(largest, size.max().item())
        others = max([others, *size[~_half(owner, bit) & (owner >= 0)].tolist()])
    return others > _SHARE * largest


def _half(owner: Tensor, bit: int) -> Tensor:
    """Which rows belong to examples whose number has a bit set."""
    return (owner >= 0) & (owner.bitwise_right_shift(bit) % 2 == 1)
