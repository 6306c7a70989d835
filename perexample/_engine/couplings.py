"""Whether a loss couples the examples: whether one example's gradient changes with what another one is.

What the loss function does to the model's outputs is not followed. Where its graph has operations that might let
examples meet, it is differentiated twice: it is a sum of the examples' own losses only if ``d^2 loss / dz_n dz_m`` is
zero for the outputs ``z`` of any two examples. For half of the examples at a time, those whose number has a bit set,
the gradients are summed with random weights and differentiated by the outputs of the other half; each two examples
differ in a bit. That is done at the first backward of each form of the graph, at the second, the fourth, and so on, as
examples may have to do with each other by a permutation that is drawn, or only beyond a threshold. Where a function has
kinks, second derivatives are zero though examples meet in it; there first derivatives tell.

Nothing is differentiated where each operation is known to leave the examples side by side on the first axis, as most
losses do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from .._private import ones_for, options_of, saved
from ..errors import CrossExampleError
from ..place import Place
from .graph import (
    EACH,
    LINEAR,
    Near,
    Seldom,
    dims_of,
    examples_of,
    is_light,
    kind_of,
    live_taps,
    nearest_taps,
    nodes_to_taps,
    shape_of,
)
from .kinds import names
from .state import STATE
from .walk import Walk

_LOSSES = names(  # of each entry or row, and then a sum over everything, or none
    "NllLoss NllLoss2D MseLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss SmoothL1Loss SoftMarginLoss "
    "MultiMarginLoss MultilabelMarginLoss"
)
_ALONG = names(
    "Sum Mean Softmax LogSoftmax Logsumexp LinalgVectorNorm Norm Std Var Amax Amin Max Min Gather Select Slice "
    "Unsqueeze Squeeze Cumsum Prod Transpose"
)
_SHAPES = names("View UnsafeView Reshape Flatten Unflatten")
_PRODUCTS = {"Mm": 0, "Addmm": 1, "Bmm": 0, "Baddbmm": 1}  # which input has the rows
_SCALED = names("Add Sub Neg Mul Div ToCopy Clone View Squeeze Stack Cat Sum Mean")  # numbers that are added
_SOME = 8  # entries that are tried one by one, of tensors of which torch knows no second derivative
_SMOOTH = names(  # what examples do to each other in these shows in second derivatives
    "Exp Exp2 Expm1 Log Log1P Log2 Log10 Pow Sqrt Rsqrt Square Reciprocal Sigmoid Tanh Softmax LogSoftmax Logsumexp "
    "Softplus LogSigmoid Gelu Silu Mish Erf Erfc Sin Cos Tan Atan Asin Acos Sinh Cosh Var Std NativeLayerNorm "
    "NativeGroupNorm ScaledDotProductFlashAttentionForCpu"
)
_NOT_KINKED = LINEAR | _SMOOTH
_MASKS = names("Where MaskedFill MaskedSelect IndexPut")
_ORDERING = names("Amax Amin Aminmax Max Min Sort Median Nanmedian Kthvalue Topk Cummax Cummin Mode")
_MOST = 4096  # nodes, and forms that are remembered
_SMALL = 8  # numbers below are axes and the like; larger ones are sizes, which differ from batch to batch
_AXES = 3  # up to which a number that N divides may well be an axis
# How many backwards of a model there were of each form in which examples may have met.
_SEEN = Seldom()


def check_couplings(loss: Tensor, found: Walk, n: int) -> None:
    """Refuse losses in which examples meet before they are joined.

    Nothing is differentiated where the graph shows that they do not, or a function that a user wrote; where the forward
    ran outside of the context; or where a hook was put on a tensor inside of it.

    Args:
        loss: The loss.
        found: The graph below it.
        n: Number of examples.

    Raises:
        CrossExampleError: If a second derivative across two examples is not zero.
    """
    if n < 2 or STATE.once or STATE.opened is None:
        return
    assert loss.grad_fn is not None
    edge = GradientEdge(loss.grad_fn, loss.output_nr)
    nodes, by_rows = nodes_to_taps(edge), all(_is_by_rows(tap.places[index]) for _, tap, index in nearest_taps(edge))
    places = [node for node in nodes if not _apart(node, n)] if len(nodes) <= _MOST else []
    taps = live_taps(edge, found) if places or not by_rows else []
    if not taps or any(tap.record.opened is not STATE.opened for tap in found.taps):
        return
    form = hash(frozenset(_with_inputs(node, n) for node in nodes))  # of a loop over the examples one of each kind
    model = taps[0][1].record.root()
    if not _SEEN.is_due(model, form) or not _can_be_differentiated(nodes, taps, loss):
        return
    if _couples(loss, taps, n) or (places and _meet_at_kinks(nodes, loss, taps, found, n)):
        _SEEN.forget(model, form)
        where = f", for which {places[-1].name()} is a likely place" if places else ""
        raise CrossExampleError(
            f"The loss couples examples: the gradient of one changes with the outputs of others{where}, so none has a "
            f"loss of its own, and clipping bounds nothing. Contrastive losses, statistics and distances over the "
            f"batch have no per-example gradients; use a loss of each example's own outputs, or let one example be a "
            f"whole group that is compared within itself. Two views of each example belong in its row: call the model "
            f"for each view, or put them on an axis of their own, [N, 2, ...]; not one behind the other as 2 N rows."
        )


def _is_by_rows(place: Place) -> bool:
    """Whether a place has the examples one after another on the first axis."""
    return place.axis == 0 and place.outer == 1 and place.space.owner is None


def _apart(node: Node, n: int) -> bool:
    """Whether an operation surely leaves the examples one after another on the first axis, where they were before."""
    kind, shape = kind_of(node), shape_of(node, 0)
    given = [edge for edge in node.next_functions if edge[0] is not None]
    shapes = [shape_of(*edge) for edge in given]
    if kind in _LOSSES:
        return len(set(shapes)) == 1
    if shape is None or None in shapes or not shapes:
        return False
    if shape.numel() == 1 and kind in _SCALED:  # single numbers have a check of their own; others would grow by them
        return True
    if kind in EACH:
        return all(known == shape for known in shapes)
    before = shapes[0]
    assert before is not None
    if len(shapes) > 1 or not before or not shape:
        return False
    if kind in _ALONG:
        return 0 not in dims_of(node, len(before))
    if kind in _SHAPES:
        return shape[0] % n == before[0] % n == 0
    return kind in _PRODUCTS and node.next_functions[_PRODUCTS[kind]][0] is not None


def _with_inputs(node: Node, n: int) -> Any:
    return _form(node, n), frozenset(_form(one, n) for one, _ in node.next_functions if one is not None)


def _form(node: Node, n: int) -> Any:
    """What makes one loss like another: its operations with their options; of sizes whether they count examples."""

    def relative(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(relative, value))
        if type(value) is int and value and value % n == 0 and n > _AXES:
            return "N"
        return "size" if type(value) is int and abs(value) >= _SMALL else str(value)

    given = tuple(before is not None for before, _ in node.next_functions)
    some = given if len(given) < _SMALL else frozenset(given)  # of a loop over the examples there are N
    return node.name(), relative(shape_of(node, 0)), some, relative(options_of(node))


def _can_be_differentiated(nodes: list[Node], taps: list[Near], loss: Tensor) -> bool:
    """Whether nothing but time is spent."""
    several = len({id(tap) for _, tap, _ in taps}) > 1
    more = _between(loss, {edge.node for edge, _, _ in taps}) if several else []
    return is_light(nodes) and not any(isinstance(node, BackwardCFunction) for node in more)


def _between(loss: Tensor, ends: set[Node]) -> list[Node]:
    """All nodes on the way from the loss to some of them: one tap may lie below another."""
    order, stack, seen = list[Node](), [(loss.grad_fn, False)], set[Node]()
    while stack:
        node, over = stack.pop()
        if node is None:
            continue
        if over:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in node.next_functions]
    reached = set[Node]()
    for node in order:  # what is below comes first
        if any(before in ends or before in reached for before, _ in node.next_functions):
            reached.add(node)
    return list(reached)


def _couples(loss: Tensor, taps: list[Near], n: int) -> bool:
    """Whether a second derivative across two examples is not zero, as far as torch can differentiate twice."""
    node = loss.grad_fn
    assert node is not None
    whole = GradientEdge(node, loss.output_nr)
    found = _coupled(whole, taps, n)
    if found is None:  # of what is added there may be parts that can be
        return any(_coupled(part, taps, n) for part in _added(whole))
    return found


def _added(edge: GradientEdge) -> list[GradientEdge]:
    """The numbers of which a number is the sum, but for constants."""
    parts, stack = list[GradientEdge](), [(edge.node, edge.output_nr)]
    while stack and len(parts) < _MOST:
        node, number = stack.pop()
        given = [(before, at) for before, at in node.next_functions if before is not None]
        single = all((shape := shape_of(*one)) is not None and shape.numel() == 1 for one in given)
        if given and single and kind_of(node) in _SCALED and (kind_of(node) != "Mul" or len(given) == 1):
            stack += given
        else:
            parts.append(GradientEdge(node, number))
    return parts if len(parts) > 1 else []


def _coupled(number: GradientEdge, taps: list[Near], n: int) -> bool | None:
    """The same of one number; ``None`` if it cannot be differentiated twice."""
    edges = [edge for edge, _, _ in taps]
    try:
        with torch.enable_grad():
            ones = ones_for(number)
            gradients = torch.autograd.grad(number, edges, ones, create_graph=True, allow_unused=True)
            draws = torch.Generator().manual_seed(0)
            rows = [_rows(near, g) for near, g in zip(taps, gradients, strict=True) if g is not None]
            sums = [((r * _noise(r, draws)).sum(1), owner) for r, owner in rows if r.requires_grad]
            return any(_across(taps, sums, bit) for bit in range((n - 1).bit_length())) if sums else False
    except (RuntimeError, NotImplementedError):  # what has no second derivative, or no room for it
        return None


def _rows(near: Near, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a tap's output by rows, ``[M, F]``, and the example of each."""
    _, tap, index = near
    place = tap.places[index]
    return place.rows_first(tap.in_shape(index, g)).unsqueeze(-1).flatten(1), place.space.owners(g.device)


def _noise(like: Tensor, draws: torch.Generator) -> Tensor:
    """Random weights."""
    return torch.randn(like.shape, generator=draws, device="cpu").to(like.device, like.dtype)


def _across(taps: list[Near], sums: list[tuple[Tensor, Tensor]], bit: int) -> bool:
    """Whether what is computed from the gradients of half of the examples depends on the others."""
    total = torch.stack([of_rows[_half(owner, bit)].sum() for of_rows, owner in sums]).sum()
    found = torch.autograd.grad(total, [edge for edge, _, _ in taps], retain_graph=True, allow_unused=True)
    largest, others, share = 0.0, 0.0, 1e-5
    for near, h in zip(taps, found, strict=True):
        if h is None or not h.numel():
            continue
        rows, owner = _rows(near, h.detach())
        size = rows.abs().amax(1)
        known = size.isfinite() & (owner >= 0)  # it is not where masks are infinite
        half, share = _half(owner, bit), min(share, torch.finfo(h.dtype).eps ** 0.75)
        largest = max([largest, *size[known].tolist()])
        others = max([others, *size[known & ~half].tolist()])
    return others > share * largest


def _half(owner: Tensor, bit: int) -> Tensor:
    """Which rows belong to examples whose number has a bit set."""
    return (owner >= 0) & (owner.bitwise_right_shift(bit) % 2 == 1)


def _meet_at_kinks(nodes: list[Node], loss: Tensor, taps: list[Near], found: Walk, n: int) -> bool:
    """Whether examples meet in a function that is not linear, be its second derivative zero, or unknown to torch.

    They do if an entry that it is given, or that it gives, changes with two of them, or if the largest is taken of
    entries that do: each by derivatives of all entries along random changes of half of the examples, and of the others.

    Args:
        nodes: Of the loss.
        loss: The loss.
        taps: The nearest.
        found: The graph.
        n: Number of examples.

    Returns:
        Whether they do.
    """
    kinked, masks = [node for node in nodes if _is_kinked(node)], [node for node in nodes if _masks(node)]
    inputs = {
        node: [GradientEdge(one, at) for one, at in node.next_functions if one is not None] for node in kinked + masks
    }
    edges = {_key(e): e for node in kinked for e in (*inputs[node], GradientEdge(node, 0)) if _is_large(e)}
    masked = {_key(e): e for node in masks for e in inputs[node] if _is_large(e)}
    looked, edges = set(edges), masked | edges
    if not edges:
        return False
    gradients = torch.autograd.grad(loss, list(edges.values()), retain_graph=True, allow_unused=True)
    used = {key: g != 0 for key, g in zip(edges, gradients, strict=True) if g is not None}
    moved = _moved([edges[key] for key in used], taps, n)
    if any(_entry_meets(edges[key], used[key], found) for key in (used.keys() - moved.keys()) & looked):
        return True
    if any(_meets_partly(moved[key], used[key]) for key in masked.keys() & moved.keys()):
        return True
    return any(_meet_in(node, [_key(e) for e in inputs[node]], moved, used) for node in kinked)


def _is_kinked(node: Node) -> bool:
    shape, given = shape_of(node, 0), [one for one, _ in node.next_functions if one is not None]
    if shape is None or not given:
        return False
    if shape.numel() == 1:  # these have a check of their own
        return kind_of(node) in _LOSSES and len(given) > 1
    return (len(given) > 1 and kind_of(node) == "Where") or kind_of(node) not in _NOT_KINKED


def _masks(node: Node) -> bool:
    """Whether an operation leaves some entries of what it is given, such as those above zero, and no others."""
    given = [one for one, _ in node.next_functions if one is not None]
    if len(given) != 1 or kind_of(node) != "Mul":
        return len(given) == 1 and kind_of(node) in _MASKS
    other = saved(node, "other")  # or the one in front
    other = saved(node, "self") if other is None else other
    if not isinstance(other, Tensor) or other.numel() < 2:
        return False
    shown = other == 1
    return bool(((other == 0) | shown).all() & shown.any() & ~shown.all())


def _meets_partly(sides: Sides, used: Tensor) -> bool:
    """Whether an entry changes with several examples and not with all, as differences of two do, and no sums of all."""
    both = torch.stack([a & b for a, b in sides]) if sides else used.new_zeros((1, *used.shape))
    return bool((both.any(0) & ~both.all(0) & used).any())


Key = tuple[Node, int]
Sides = list[tuple[Tensor, Tensor]]  # for each bit: which entries change with examples that have it, and with others


def _key(edge: GradientEdge) -> Key:
    return edge.node, edge.output_nr


def _is_large(edge: GradientEdge) -> bool:
    shape = shape_of(edge.node, edge.output_nr)
    return shape is not None and shape.numel() > 1


def _moved(edges: list[GradientEdge], taps: list[Near], n: int) -> dict[Key, Sides]:
    """What the entries of these tensors change with; some may be left out, of which torch knows no derivative."""
    found: dict[Key, Sides] = {}
    groups = [edges]
    while groups:
        group = groups.pop()
        sides = _sides(group, taps, n) if group else []
        if sides is not None:
            found |= {_key(edge): side for edge, side in zip(group, sides, strict=True)}
        elif len(group) > 1:
            half = len(group) // 2
            groups += [group[:half], group[half:]]
    return found


def _sides(group: list[GradientEdge], taps: list[Near], n: int) -> list[Sides] | None:
    """The same of a few at once; ``None`` if it cannot be done."""
    sides: list[Sides] = [[] for _ in group]
    draws = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            directions = [ones_for(edge).requires_grad_() for edge in group]
            edges = [edge for edge, _, _ in taps]
            back = torch.autograd.grad(group, edges, directions, create_graph=True, allow_unused=True)
            rows = [_rows(near, h) for near, h in zip(taps, back, strict=True) if h is not None and h.requires_grad]
            sums = [((r * _noise(r, draws)).sum(1), owner) for r, owner in rows]
            for bit in range((n - 1).bit_length()) if sums else ():
                both = [_along_half(sums, directions, bit, chosen=chosen) for chosen in (True, False)]
                for side, a, b in zip(sides, *both, strict=True):
                    side.append((a, b))
    except (RuntimeError, NotImplementedError):
        return None
    return sides


def _along_half(sums: list[tuple[Tensor, Tensor]], directions: list[Tensor], bit: int, *, chosen: bool) -> list[Tensor]:
    """Which entries change with the examples that have a bit, or have it not."""
    halves = [s[(owner >= 0) & (_half(owner, bit) == chosen)].sum() for s, owner in sums]
    moves = torch.autograd.grad(torch.stack(halves).sum(), directions, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(d, dtype=torch.bool) if m is None else m != 0 for m, d in zip(moves, directions, strict=True)
    ]


def _meet_in(node: Node, inputs: list[Key], moved: dict[Key, Sides], used: dict[Key, Tensor]) -> bool:
    """Whether examples meet in what an operation is given, or gives."""
    known = [key for key in inputs if key in moved]
    for key in [*known, (node, 0)]:
        if any(bool((a & b & used[key]).any()) for a, b in moved.get(key, ())):
            return True
    if kind_of(node) in _ORDERING and any(_along(node, a, b) for key in known for a, b in moved[key]):
        return True
    if len(known) < 2:
        return False
    for sides in zip(*(moved[key] for key in known), strict=False):
        try:
            left, right = (torch.stack(torch.broadcast_tensors(*(pair[i] for pair in sides))).any(0) for i in (0, 1))
        except RuntimeError:  # no entry stands beside another
            return False
        if left.shape != shape_of(node, 0) and kind_of(node) not in _LOSSES:
            return False  # nor where entries of the result are not each of those at their place, as solutions are
        if bool((left & right).any()):
            return True
    return False


def _along(node: Node, a: Tensor, b: Tensor) -> bool:
    """Whether along the axes in which an order is sought there are entries of both sides."""
    dims = sorted(dims_of(node, a.dim()))
    return bool((a.amax(dims) & b.amax(dims)).any()) if dims else False


def _entry_meets(edge: GradientEdge, used: Tensor, found: Walk) -> bool:
    """Whether an entry of a tensor changes with several examples; some of those that the loss uses are tried."""
    entries = used.flatten().nonzero()[:, 0]
    for number in torch.randperm(len(entries), generator=torch.Generator().manual_seed(0), device="cpu")[
        :_SOME
    ].tolist():
        weights = torch.zeros_like(ones_for(edge))
        weights.view(-1)[int(entries[number])] = 1.0
        try:
            if examples_of(edge, found, weights) > 1:
                return True
        except RuntimeError:  # eigenvectors have a derivative only in what their phases do not change
            return False
    return False
