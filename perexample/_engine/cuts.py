"""How the rows that a loss is a mean over came about: which were chosen or cut out of those of all examples.

A node of the graph does not tell whether examples have as many rows each. This follows them from the mean up, along
their axis, to the nearest tap, whose place tells it, or to what chose or cut.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import GradientEdge, Node

from .._private import metadata, saved
from ..place import Place
from .graph import dims_of, kind_of, shape_of
from .kinds import names
from .tap import KEY

_CHOOSES = names("Index MaskedSelect Topk Take IndexSelect Embedding PackPaddedSequence")
_ALONG_AN_AXIS = names("IndexSelect Topk")
_CUTS = names("Slice Split SplitWithSizes")
_VIEWS = names("View UnsafeView Reshape Flatten Unflatten Squeeze Unsqueeze")
_TURNS = names("Transpose T Permute")
_GATHERS = names("IndexAdd IndexCopy IndexPut IndexReduce Scatter ScatterAdd ScatterReduce MaskedScatter SegmentReduce")
_PRODUCTS = {"Mm": 0, "Mv": 0, "Bmm": 0, "Addmm": 1, "Addmv": 1, "Baddbmm": 1}  # which input has the rows
_LOOKED_THROUGH = 256  # nodes


def comes_from_rows(edge: GradientEdge) -> bool:
    """Whether a number comes from a part of what is there for all examples, along the first axis."""
    stack: list[tuple[Node | None, int]] = [(edge.node, edge.output_nr)]
    seen = set[Node]()
    while stack and len(seen) < _LOOKED_THROUGH:
        node, number = stack.pop()
        if node is None or node in seen or number in metadata(node).get(KEY, {}):
            continue
        seen.add(node)
        kind = kind_of(node)
        if kind in ("Unbind", "Split", "SplitWithSizes", "Index", "IndexSelect", "MaskedSelect"):
            return True
        if kind in ("Select", "Slice") and saved(node, "dim") in (0, None):
            return True
        stack += node.next_functions
    return False


def entries_chosen(node: Node | None, number: int, n: int) -> int:
    """How many entries were chosen on the way to a mean, where examples may not have as many each.

    What was chosen behind the model has lost its owners: there a multiple of N is taken to be as many of each.

    Returns:
        Their number, 0 if none were or all examples have as many.
    """
    shape = whole = shape_of(node, number)
    laid_out = False  # otherwise than on the first axis: then all entries must be there still
    for _ in range(_LOOKED_THROUGH):  # what acts on each of them leaves their number as it is
        if node is None or not shape or not whole:
            return 0
        if shape.numel() != whole.numel() if laid_out else shape[0] != whole[0]:
            return 0
        tapped = metadata(node).get(KEY, {}).get(number)
        if tapped is not None:
            return _rows_unlike(tapped[0].places[tapped[1]], n)
        kind = kind_of(node)
        if kind in _CHOOSES and (kind not in _ALONG_AN_AXIS or dims_of(node, len(shape)) == {0}):
            return 0 if laid_out or shape[0] % n == 0 or _of_another_axis(node, len(shape)) else shape[0]
        if _moves_rows(node) or (kind in _TURNS and shape.numel() != whole.numel()):
            return 0
        node, number = _first_input(node)
        shape = shape_of(node, number)
        if kind in _TURNS or (kind in _VIEWS and shape and shape[0] != whole[0]):
            whole, laid_out = shape, True
    return 0


def rows_cut_out(node: Node | None, number: int, n: int) -> int:
    """How many rows were cut out of those of all examples on the way to a mean, by their places.

    Returns:
        Their number; 0 if none were, or such a part as a half, which may be one of two views of each example.
    """
    shape = shape_of(node, number)
    for _ in range(_LOOKED_THROUGH):
        if node is None or not shape or number in metadata(node).get(KEY, {}):
            return 0
        kind, rows, cuts = kind_of(node), shape[0], dims_of(node, len(shape)) == {0}
        if kind in _TURNS or _moves_rows(node):
            return 0
        node, number = _first_input(node)
        shape = shape_of(node, number)
        if kind in _CUTS and cuts and shape:
            even = rows % n == 0 or (rows and shape[0] % rows == 0)
            return 0 if even or shape[0] % n or not _holds_examples(node, number, 0) else rows
        if kind not in _VIEWS and (not shape or shape[0] != rows):
            return 0
    return 0


def _of_another_axis(node: Node, axes: int) -> bool:
    """Whether rows were chosen along an axis that holds no examples, such as steps of time."""
    before = _first_input(node)
    shape = shape_of(*before)
    return shape is not None and len(shape) == axes and _holds_examples(*before, 0) is False


def _holds_examples(node: Node | None, number: int, axis: int) -> bool | None:
    """Whether an axis of a tensor holds the examples, by the place of the nearest tap; ``None`` if that is not seen."""
    folded = False
    for _ in range(_LOOKED_THROUGH):
        shape = shape_of(node, number)
        if node is None or not shape:
            return None
        tapped = metadata(node).get(KEY, {}).get(number)
        if tapped is not None:
            place = tapped[0].places[tapped[1]]
            leads = place.axis == axis and (place.outer == 1 or not folded)
            return leads or (None if folded or place.axis is None else False)
        kind, size, along = kind_of(node), shape[axis], node
        if kind in _TURNS:
            dims = saved(node, "dims") or sorted(dims_of(node, len(shape)))
            axis = dims[axis] if kind == "Permute" else {dims[0]: dims[-1], dims[-1]: dims[0]}.get(axis, axis)
        node, number = _first_input(node)
        before = shape_of(node, number)
        if saved(along, "dim") is not None and before and axis in dims_of(along, len(before)):
            return None
        if kind in _VIEWS and axis == 0:
            folded = folded or not before or before[0] != size
        elif not before or axis >= len(before) or before[axis] != size or (axis and len(before) != len(shape)):
            return None
    return None


def _first_input(node: Node) -> tuple[Node | None, int]:
    """The first that an operation was given of what has a graph."""
    return next(((one, at) for one, at in node.next_functions if one is not None), (None, 0))


def _rows_unlike(place: Place, n: int) -> int:
    """How many rows there are, if some examples have more of them than others; else 0."""
    if place.axis is None or place.space.owner is None:
        return 0
    each = torch.bincount(place.space.owner[place.space.owner >= 0], minlength=n)
    return 0 if bool((each == each[0]).all()) else place.space.rows


def _moves_rows(node: Node) -> bool:
    """Whether an operation may give as many rows as it was given, each of which is made of several, or none."""
    kind = kind_of(node)
    at = _PRODUCTS.get(kind)
    return kind in _GATHERS or (at is not None and node.next_functions[at][0] is None)
