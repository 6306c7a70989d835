"""How the loss joins the examples: as a sum of their own losses, or in a way in which one changes how others count.

Once they are joined in one number, that may be scaled by constants and added to others. Its root, its logarithm, or its
ratio to another sum over the batch is no sum of losses that examples have of their own, and no clipping bounds what one
example does to it. The graph shows this for what is done after the first sum; what comes before is for `check`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .._private import is_python_number, loss_reduction_of, metadata, saved
from ..errors import LossError
from .cuts import comes_from_rows, entries_chosen, rows_cut_out
from .graph import examples_of, kind_of, number_of, owners_of, shape_of
from .kinds import is_pointwise, names
from .tap import KEY
from .walk import Walk

_BENT = names(  # besides functions of each entry
    "Hardswish LogSigmoid Logsumexp Softmax LogSoftmax Norm LinalgVectorNorm Dist Std Var Prod Max Min Amax Amin "
    "Aminmax Median Nanmedian Mode Kthvalue Topk MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D "
    "AdaptiveMaxPool3D FractionalMaxPool2D FractionalMaxPool3D"
)
_REDUCING = names("SegmentReduce ScatterReduce IndexReduce")  # by a sum, or otherwise
# Of those, what is linear, or has no gradient of its own.
_STRAIGHT = names(
    "Add Sub Rsub Neg Mul Div Where MaskedFill Lerp Addcmul Addcdiv Clone Copy ToCopy Alias Fill Zero NativeDropout "
    "NanToNum Rad2Deg Deg2Rad Real Imag Conj ConjPhysical Floor Ceil Round Trunc Frac Sign Sgn Heaviside"
)
_MOST = 16  # doubts that are looked into, the nearest to the loss first: a loop over the examples has one for each


def check_joins(loss: Tensor, found: Walk, n: int) -> None:
    """Refuse losses in which the examples, once joined, count by what the others are.

    Args:
        loss: The loss.
        found: The graph below it.
        n: Number of examples; of fewer than two none is joined with another.

    Raises:
        LossError: If there is such an operation, and several examples meet in it.
    """
    if n < 2:
        return
    _refuse(((node, _doubt(node, n) or _uneven(node, found, n)) for node in single_numbers(loss)), found)


def check_cuts(loss: Tensor, found: Walk, n: int) -> None:
    """The same for means over some of the rows, by their places, where that is no other error.

    Args:
        loss: The loss.
        found: The graph below it.
        n: Number of examples.

    Raises:
        LossError: If there is such a mean.
    """
    if n > 1:
        _refuse(((node, _over_a_part(node, n)) for node in single_numbers(loss)), found)


def _refuse(doubts: Iterator[tuple[Node, str]], found: Walk) -> None:
    """Raise for the first of these that several examples meet in."""
    for node, why in itertools.islice(((node, why) for node, why in doubts if why), _MOST):
        each = [owners_of(edge, found) for edge in _inputs(node)]
        apart = _beside_each_other(node) is not None
        together = max(map(len, each), default=0) if apart else len(set[int]().union(*each))
        if together > 1:
            raise LossError(
                f"The loss {why} ({node.name()}), where {together} examples are joined already: how much one of them "
                f"counts depends on the others, so none has a loss of its own. Do this to each example's own loss, "
                f"then take the mean; a constant divisor may be a Python number."
            )


def single_numbers(loss: Tensor) -> Iterator[Node]:
    """The nodes between the loss and the last tensors of more than one entry, not beyond taps; the nearest first."""
    waiting: deque[tuple[Node | None, int]] = deque([(loss.grad_fn, loss.output_nr)])
    seen: set[Node] = set()
    while waiting:
        node, number = waiting.popleft()
        if node is None or node in seen or number in metadata(node).get(KEY, {}):
            continue
        seen.add(node)
        if _entries(node, number) == 1 or _beside_each_other(node) is not None:
            yield node
            waiting.extend(node.next_functions)


def _entries(node: Node | None, number: int) -> int:
    """How many entries a tensor has."""
    shape = shape_of(node, number)
    return 0 if shape is None else shape.numel()


def _beside_each_other(node: Node) -> Node | None:
    """Where single numbers were put beside each other, if a tensor is these or a function of each of them."""
    entries = _entries(node, 0)
    for _ in range(_MOST):
        if entries == 1 or _entries(node, 0) != entries or metadata(node).get(KEY):
            return None
        before = [(one, number) for one, number in node.next_functions if one is not None]
        if kind_of(node) in ("Stack", "Cat"):
            return node if all(_entries(one, number) == 1 for one, number in before) else None
        if len(before) != 1:
            return None
        node = before[0][0]
    return None


def _inputs(node: Node) -> list[GradientEdge]:
    """What an operation was given: of numbers that were put beside each other each by itself."""
    beside = _beside_each_other(node)
    edges = (node if beside is None else beside).next_functions[:_MOST]
    return [GradientEdge(before, number) for before, number in edges if before is not None]


@functools.cache
def _is_bent(kind: str) -> bool:
    """Whether a kind of node is that of a function that is not linear; those of each entry are none, but for some."""
    name = re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()
    return kind in _BENT or (kind not in _STRAIGHT and is_pointwise(name))


def _doubt(node: Node, n: int) -> str:
    """What may be wrong with an operation that gives one number, if several examples meet in it."""
    kind, inputs = kind_of(node), node.next_functions
    if _is_bent(kind) or (kind in _REDUCING and saved(node, "reduce") != "sum"):
        return "" if kind == "Pow" and saved(node, "exponent") == 1 else "takes a function that is not linear"
    if kind == "Mul" and len(inputs) == 2 and inputs[0][0] is not None and inputs[1][0] is not None:
        return "multiplies two numbers that depend on the parameters"
    if kind == "Div":
        if len(inputs) == 2 and inputs[1][0] is not None:
            return "divides by a number that depends on the parameters"
        divisor = saved(node, "other")
        if isinstance(divisor, Tensor) and divisor.numel() == 1 and not is_python_number(divisor):
            value = float(divisor)
            return "" if _multiple(value, n) else f"divides by a tensor, {value:g}"
        over = _averaged(node)
        divisor = number_of(node)
        if over is not None and divisor is not None and divisor % n and entries_chosen(*over, n) % n:
            return f"divides by {divisor:g}, the number of entries that were chosen"
    if loss_reduction_of(node) is not None and inputs[0][0] is not None and _entries(*inputs[0]) == 1:
        return "is computed from a mean over the examples"
    if kind == "Mean" or loss_reduction_of(node) == "mean":
        rows = entries_chosen(*inputs[0], n)
        return f"takes the mean of {rows} entries that were chosen" if rows else ""
    return ""


def _over_a_part(node: Node, n: int) -> str:
    """What is wrong with a mean over rows that were cut out of all, if it is one."""
    mean = kind_of(node) == "Mean" or loss_reduction_of(node) == "mean"
    over = node.next_functions[0] if mean else _averaged(node)
    rows = 0 if over is None else rows_cut_out(*over, n)
    return f"takes the mean of {rows} rows that are cut out of all" if rows else ""


def _averaged(node: Node) -> tuple[Node | None, int] | None:
    """What a number is the sum of, that is divided by how many rows or entries it has; ``None`` if it is none."""
    if kind_of(node) != "Div":
        return None
    summed = node.next_functions[0][0]
    while summed is not None and kind_of(summed) == "Neg":
        summed = summed.next_functions[0][0]
    if summed is None or (kind_of(summed) != "Sum" and loss_reduction_of(summed) != "sum"):
        return None
    over = summed.next_functions[0]
    shape = shape_of(*over)
    return over if shape and number_of(node) in (shape[0], shape.numel()) else None


def _uneven(node: Node, found: Walk, n: int) -> str:
    """What is wrong with a mean over numbers that each come from one example, if some have more of them than others."""
    before, entries = node.next_functions[0][0] if node.next_functions else None, _entries(*node.next_functions[0])
    if kind_of(node) == "Div" and before is not None:
        parts, sizes = _added_sums(before)
        if number_of(node) == sum(sizes) and sum(sizes) % n and _are_of_one_each(parts, found):
            return f"divides by {sum(sizes)}, how many numbers all examples have together"
    if kind_of(node) != "Mean" or before is None or kind_of(before) not in ("Stack", "Cat") or entries % n == 0:
        return ""
    parts = [GradientEdge(one, number) for one, number in before.next_functions if one is not None][:_MOST]
    if not _are_of_one_each(parts, found):
        return ""  # of several losses, each of all examples
    return f"takes the mean of {entries} numbers, of which some examples have more than others"


def _are_of_one_each(parts: Sequence[GradientEdge], found: Walk) -> bool:
    """Whether numbers each come from a single example."""
    return all(map(comes_from_rows, parts)) and all(examples_of(part, found) < 2 for part in parts)


def _added_sums(node: Node) -> tuple[list[GradientEdge], list[int]]:
    """The first of the sums that are added up, as in a loop, and over how many rows each goes; none if others are."""
    parts, rows, stack = list[GradientEdge](), list[int](), [(node, 0)]
    while stack:
        one, number = stack.pop()
        if kind_of(one) in ("Add", "Neg"):
            stack += [(before, at) for before, at in one.next_functions if before is not None]
            continue
        shape = shape_of(*one.next_functions[0]) if one.next_functions else None
        if not shape or (kind_of(one) != "Sum" and loss_reduction_of(one) != "sum"):
            return [], []
        parts.append(GradientEdge(one, number))
        rows.append(shape[0])
    return parts[:_MOST], rows


def _multiple(value: float, n: int) -> bool:
    """Whether a divisor can be the same for batches of n examples whatever they are: so many entries of each."""
    return value >= n and abs(value / n - round(value / n)) < 1e-6
