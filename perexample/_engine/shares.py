"""Losses in which an example counts by how many there are, as where a mean is scaled by ``len(x) / B``.

It is a constant to the graph of one backward. Of several with other numbers of examples it shows: how much each of them
counts changes as their number does, and one example more changes what all others add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .._private import loss_reduction_of, metadata, ones_for, saved
from ..errors import LossError
from .graph import LINEAR, dims_of, examples_of, kind_of, number_of, shape_of
from .kinds import names
from .state import STATE
from .tap import KEY, SUMMED
from .walk import Walk

_KEPT = 4  # losses of a model that are remembered, of different numbers of examples; a schedule meets few by chance
_PLAIN = 8  # ratios of such numbers, one loss may well be a half or two thirds of another by itself
_MOST = 4096  # nodes
_NEAR_ONE, _MANY = 0.5, 16  # weights that examples have on average in a sum, and hardly in a mean of so many
_PASSED = names("Mul Div Add Sub Rsub Neg View UnsafeView Reshape Squeeze ToCopy Clone")
_MOVED = names("Neg View UnsafeView Reshape Squeeze Unsqueeze Select Slice Unbind Index Gather Sum Nansum")
_LINEAR = _PASSED | _MOVED | names("Mean")
_PRODUCTS = names("Dot Vdot Mv Mm Bmm Addmv Addmm")  # of which a single number is a sum, as einsum("nc,nc->", a, b) is
_JOINS = {"Sum": "sum", "Nansum": "sum", "Mean": "mean", "VarMean": "mean", "StdMean": "mean"}  # variances are refused
_SUMS = names("SegmentReduce ScatterReduce IndexReduce")  # if they are no other reduction
_LOSSES = names("Pow Abs LogSoftmax LogSigmoid Softplus LinalgVectorNorm Norm")  # of what losses by hand are made


@dataclass(frozen=True)
class Share:
    """One of the numbers that a loss adds up.

    Attributes:
        factor: With what it is multiplied.
        joins: Whether it is a ``"sum"`` or a ``"mean"``; empty if that cannot be told.
        entries: Of how many.
        before: With what all of these were multiplied before, as far as that is known.
    """

    factor: float
    joins: str
    entries: int
    before: float = 1.0

    def whole(self) -> Share:
        """With all numbers in the factor."""
        return replace(self, factor=self.factor * self.before, before=1.0)

    def weight(self, n: int, *, mean: bool) -> float:
        """With what the loss of each of n examples is multiplied, if it joins these."""
        if mean:
            return self.factor * n if self.joins == "sum" else self.factor
        return self.factor / n if self.joins == "mean" else self.factor


_SHARES: WeakKeyDictionary[nn.Module, dict[bool, list[tuple[int, list[Share]]]]] = WeakKeyDictionary()


def shares_of(loss: Tensor, found: Walk, n: int) -> list[Share]:
    """The numbers that a loss adds up, of which those of a loop over the examples are one sum.

    Args:
        loss: The loss.
        found: The graph below it.
        n: Number of examples.

    Returns:
        How each is joined, as far as that can be told.
    """
    loops = n > 1 and not STATE.once  # a user's hook is not called more than once
    once = not loops or any(tap.record.opened is not STATE.opened for tap in found.taps)
    shares: list[Share] = []
    for group in _alike([*_joined(loss)], n):
        ends = {group[0][1], group[-1][1]}  # tell of a loop
        if loops and len(group) % n == 0 and all(examples_of(edge, found) == 1 for edge in ends):
            factor = sum(abs(share.factor) for share, _ in group) / len(group)
            shares.append(replace(group[0][0], factor=factor, joins="sum", entries=len(group)))
        else:
            found_out = [None if once else _measured(one, edge, n) for one, edge in group]
            shares += [one or _sure(*known) for one, known in zip(found_out, group, strict=True)]
    return shares


def _alike(numbers: list[tuple[Share, GradientEdge]], n: int) -> list[list[tuple[Share, GradientEdge]]]:
    """Numbers that came about in the same way, with one weight; those of n examples may have weights of their own."""
    by_weight: dict[tuple, list[tuple[Share, GradientEdge]]] = {}
    for share, edge in numbers:
        kinds = edge.node.name(), *(one.node.name() for one in _given(edge.node))
        by_weight.setdefault((kinds, share.factor), []).append((share, edge))
    by_kind: dict[tuple, list[tuple[Share, GradientEdge]]] = {}
    for (kinds, factor), group in by_weight.items():
        by_kind.setdefault((kinds, factor) if n > 1 and len(group) % n == 0 else kinds, []).extend(group)
    return [*by_kind.values()]


def refuse_means(loss: Tensor, found: Walk, n: int, scale: float) -> None:
    """Refuse a plain mean where gradients of a sum are clipped: each counts by how many there are.

    Args:
        loss: The loss, which was said to be the sum of the examples' own.
        found: The graph below it.
        n: Number of examples.
        scale: What the loss was said to be multiplied with.

    Raises:
        LossError: If it is a mean.
    """
    if n < 2:
        return
    means = [(share.whole(), edge) for share, edge in _joined(loss) if share.joins == "mean" and share.entries % n == 0]
    largest = max((abs(share.factor) for share, _ in means), default=0.0)
    if not math.isclose(largest, scale, rel_tol=1e-9):  # a smaller one may be n / B by chance
        return
    edges = [edge for share, edge in means if abs(share.factor) == largest]
    # A loop over the examples has one for each, over the entries of that alone: the first and the last tell.
    if any(examples_of(edge, found) > 1 for edge in {edges[0], edges[-1]}):
        raise LossError(
            f"The loss is a mean over {n} examples, but perex was told loss_reduction='sum': each gradient would "
            f"be divided by {n} before it is clipped, and one example more changes what all others add. Leave "
            f"loss_reduction out, or sum the losses."
        )


def refuse_sums(loss: Tensor, shares: list[Share], n: int, scale: float) -> None:
    """Refuse a sum that is written by hand or scaled, where a mean was said: nothing divides it by how many there are.

    Args:
        loss: The loss, which was said to be the mean of the examples' own.
        shares: The numbers that it adds up.
        n: Number of examples.
        scale: What the loss was said to be multiplied with.

    Raises:
        LossError: If it is a sum of squares, absolute values, log-probabilities or norms, or of a loss of torch.
    """
    shares = [share.whole() for share in shares]
    least = min((abs(share.factor) for share in shares), default=0.0) / scale
    undivided = least * n > 1 + 1e-6 and all(share.joins == "sum" and not share.entries % n for share in shares)
    for node, as_it_is in _added_up(loss, n, least) if n > 1 else ():
        told, _ = metadata(node).get(SUMMED, ("", 0))
        if (undivided or as_it_is) and (kind_of(node) in _LOSSES or saved(node, "reduction") is not None or told):
            by = kind_of(node) if loss_reduction_of(node) == "sum" else told or f"{kind_of(node)}, then Sum"
            raise LossError(
                f"The loss sums over {n} examples ({by}), but perex was told loss_reduction='mean'; pass "
                f"loss_reduction='sum', or take a mean over the examples (losses.mean(), losses.sum() / len(losses)), "
                f"with a factor in front of that: 5 * losses.mean(), not (5 / n) * losses.sum()."
            )


def _added_up(loss: Tensor, n: int, factor: float) -> list[tuple[Node, bool]]:
    """What a loss adds up, and whether over the examples and as it is; nothing if a multiple of n divides any of it."""
    found, seen = list[tuple[Node, bool]](), set[Node]()
    stack: list[tuple[Node | None, bool, bool, float]] = [(loss.grad_fn, False, False, factor)]
    while stack:
        node, scaled, summed, weight = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        summed = summed or _sums_examples(node, n)
        if summed and SUMMED in metadata(node):
            found.append((node, not scaled))
            continue
        if not _scales_all(node):
            weights = _weights_of(node)
            weight *= 0.0 if weights is None else float((weights * 1.0).abs().mean())  # masks too
            if weight <= _NEAR_ONE or weight * n <= _MANY:  # a mean may have divided by them; few come near one
                found.append((node, summed and not scaled))
                continue
            scaled = True
        number = number_of(node) if kind_of(node) in ("Mul", "Div") else saved(node, "alpha")
        if kind_of(node) == "Div" and not (number or 0.0) % n:
            return []  # 10 * losses.sum() / len(losses)
        before = [one for one, _ in node.next_functions]
        stack += [(one, scaled or number not in (None, 1), summed, weight) for one in reversed(before)]
    return found


def _sums_examples(node: Node, n: int) -> bool:
    """Whether an operation adds up a number of entries that n divides, along the first axis."""
    _, entries = metadata(node).get(SUMMED, ("", 0))
    if entries:
        return entries % n == 0
    shape = shape_of(*node.next_functions[0]) if node.next_functions else None
    if not shape or not shape.numel() or shape.numel() % n:
        return False
    return loss_reduction_of(node) == "sum" or (kind_of(node) == "Sum" and 0 in dims_of(node, len(shape)))


def check_shares(shares: list[Share], n: int, model: nn.Module | None, *, mean: bool) -> None:
    """Refuse losses whose factors change as the number of examples does.

    Args:
        shares: The numbers that it adds up.
        n: Number of examples.
        model: For which the last losses are remembered.
        mean: Whether the loss was said to be a mean of the examples' own.

    Raises:
        LossError: If they do in two backwards, or three where the numbers have a plain ratio.
    """
    if model is None:
        return
    known = _SHARES.setdefault(model, {})  # a sum and a mean of one model are two losses
    like = [(m, others) for m, others in known.get(mean, []) if len(others) == len(shares)]
    before = [(m, others) for m, others in like if m != n]
    # What is another for the same number follows something else: a schedule, whose ratios meet those of numbers.
    scheduled = any(m == n and not _same(shares, others, n, mean=mean) for m, others in like)
    for power in () if scheduled else (1, -1):
        alike = [m for m, others in before if _follow(shares, others, n, m, power, mean=mean)]
        # Numbers before the sum may be what makes it a mean, or follow something else, as the length of sequences.
        whole = {m: [share.whole() for share in others] for m, others in before}
        alike = [m for m in alike if _follow([s.whole() for s in shares], whole[m], n, m, power, mean=mean)]
        if alike and len(alike) == len(before) and (len(alike) > 1 or not _is_plain(n, alike[0])):
            raise LossError(
                f"Each example's own loss is multiplied with a number that follows how many there are, in batches of "
                f"{alike[0]} and {n} (loss * len(x) / B, or a sum over a batch, divided by a constant or not), so one "
                f"more changes what all others add. Take the plain mean of the examples' losses, which perex "
                f"multiplies by their number, (weights * losses).mean() where each has a weight, or their sum with "
                f"loss_reduction='sum', and loss_scale=1 / B where that is divided by a constant; the divisor of a "
                f"batch is the optimizer's expected_batch_size."
            )
    known[mean] = [*before, (n, shares)][-_KEPT:]


def _same(now: list[Share], before: list[Share], n: int, *, mean: bool) -> bool:
    """Whether n examples have the same weights in two losses."""
    pairs = zip(now, before, strict=True)
    return all(math.isclose(*(share.weight(n, mean=mean) for share in pair), rel_tol=1e-6) for pair in pairs)


def _follow(now: list[Share], before: list[Share], n: int, m: int, power: int, *, mean: bool) -> bool:
    """Whether the weights of n examples are those of m times a power of n / m, where they are not the same."""
    changed = False
    for one, other in zip(now, before, strict=True):
        if one.joins != other.joins:
            return False
        over = one.entries != other.entries  # the examples, be it that some were chosen, or filled up to another length
        weight = one.weight(n, mean=mean) if over else one.factor
        was = other.weight(m, mean=mean) if over else other.factor
        if math.isclose(weight, was, rel_tol=1e-6):
            continue
        if not math.isclose(weight, was * (n / m) ** power, rel_tol=1e-6):
            return False
        if not (over and one.joins) and power == (-1 if mean else 1):
            return False  # it may be a sum over the examples that becomes their mean so, or a mean their sum
        changed = True
    return changed


def _is_plain(n: int, m: int) -> bool:
    ratio = Fraction(n, m)
    return max(ratio.numerator, ratio.denominator) <= _PLAIN


def _scales_all(node: Node) -> bool:
    """Whether an operation at most moves and chooses entries, and multiplies them all with one number."""
    if kind_of(node) in ("Mul", "Div"):
        return len(_given(node)) == 1 and number_of(node) is not None
    return kind_of(node) in _MOVED or _passes(node)


def _weights_of(node: Node) -> Tensor | None:
    """The constants with which a product multiplies the entries of a tensor, of which it has several."""
    if kind_of(node) != "Mul" or sum(one is not None for one, _ in node.next_functions) != 1:
        return None
    found = [t for t in (saved(node, "other"), saved(node, "self")) if isinstance(t, Tensor) and t.numel() > 1]
    return found[0] if found else None


def _passes(node: Node) -> bool:
    """Whether a single number stays one that is a multiple of what it was, or is added to others."""
    return kind_of(node) in _PASSED or (kind_of(node) == "Pow" and saved(node, "exponent") == 1)


def _is_linear(node: Node) -> bool:
    """Whether an operation gives sums of entries times numbers, of what it was given of one tensor with a graph."""
    kind = kind_of(node)
    return kind in LINEAR or _passes(node) or (kind in _SUMS and saved(node, "reduce") == "sum")


def _joined(loss: Tensor) -> Iterator[tuple[Share, GradientEdge]]:
    """The numbers that a loss adds up, and where in the graph each of them is joined."""
    stack: list[tuple[Node | None, int, float]] = [(loss.grad_fn, loss.output_nr, 1.0)]
    for _ in range(_MOST):
        if not stack:
            return
        node, number, factor = stack.pop()
        if node is None:
            continue
        before = [(one, at) for one, at in node.next_functions if one is not None]
        shapes = [shape_of(*edge) for edge in before]
        passed = before and _passes(node) and number not in metadata(node).get(KEY, {})
        if not passed or not all(shape is not None and shape.numel() == 1 for shape in shapes):
            yield _share(GradientEdge(node, number), factor), GradientEdge(node, number)
            continue
        factor *= _number(node)
        stack += [(*edge, factor) for edge in before]


def _share(edge: GradientEdge, factor: float) -> Share:
    """What is known of a number by the operations that joined it."""
    join = _join(edge.node)
    shape = shape_of(*join.next_functions[0]) if join.next_functions else None
    return Share(factor, _kind(join), 0 if shape is None else shape.numel(), _numbers_before(join))


def _sure(share: Share, edge: GradientEdge) -> Share:
    """What is known for certain: along the first axis there may be classes, or several losses of each example."""
    return share if _join(edge.node) is edge.node else replace(share, joins="")


def _measured(share: Share, edge: GradientEdge, n: int) -> Share | None:
    """The same by a gradient: of what was summed by a product with ones, say, or multiplied before.

    Args:
        share: What is known.
        edge: Of the number.
        n: Number of examples.

    Returns:
        The share as a sum, if each row counts as much as the others; ``None`` if not, or if there is nothing to find.
    """
    plain = share.before == 1.0 and bool(share.joins) and _join(edge.node) is edge.node
    last, given = edge, _given(edge.node)
    while len(given) == 1 and _is_linear(last.node) and last.output_nr not in metadata(last.node).get(KEY, {}):
        plain = plain and (share.joins == "mean" or kind_of(last.node) == "Mean" or _scales_all(last.node))
        last, given = given[0], _given(given[0].node)
    entries, of_both = _numel(last), min(map(_numel, given), default=0)
    in_product = kind_of(last.node) in _PRODUCTS and len(given) > 1 and entries % n and of_both % n == 0
    if not in_product and (plain or not entries or entries % n):
        return None
    (g,) = torch.autograd.grad(edge, last, ones_for(edge), retain_graph=True)
    if in_product:  # the examples were added up there, to one number or a few, as of pairs of classes
        return Share(share.factor * float(g.abs().mean()), "sum", of_both)
    rows = g.abs().reshape(n if g.shape[:1] == (n,) else entries, -1)
    counted = rows != 0
    values, each = rows[counted], counted.sum(1)
    alike = torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-6, atol=0.0)
    if not alike and (not share.joins or bool((each == each[0]).all())):  # of classes, say, one in each row
        alike = torch.allclose(values, values[:1].expand_as(values), rtol=1e-6, atol=0.0)
    if not alike or not len(values):
        return None
    return Share(share.factor * float(values.mean()), "sum", len(values))


def _given(node: Node) -> list[GradientEdge]:
    """What an operation was given, of what has a graph."""
    return [GradientEdge(before, number) for before, number in node.next_functions if before is not None]


def _numel(edge: GradientEdge) -> int:
    shape = shape_of(edge.node, edge.output_nr)
    return 0 if shape is None else shape.numel()


def _number(node: Node) -> float:
    """The number that a node multiplies with; 1 if it does something else, or if that is not known."""
    before = [one for one, _ in node.next_functions if one is not None]
    by = number_of(node) if kind_of(node) in ("Mul", "Div") and len(before) == 1 else None
    if by is None or (kind_of(node) == "Div" and not by):
        return 1.0
    return by if kind_of(node) == "Mul" else 1 / by


def _numbers_before(join: Node) -> float:
    """With which numbers all that a sum or mean joins was multiplied before: ``(losses / len(losses)).sum()``."""
    factor, node = 1.0, join
    for _ in range(_MOST if kind_of(join) in ("Sum", "Mean") else 0):
        before = [(one, at) for one, at in node.next_functions if one is not None]
        if len(before) != 1:
            break
        node, number = before[0]
        if kind_of(node) not in _LINEAR or number in metadata(node).get(KEY, {}):
            break
        factor *= _number(node)
    return factor


def _join(node: Node) -> Node:
    """Where the examples become one number, or one for each class, which are then joined themselves."""
    for _ in range(_MOST):
        if kind_of(node) not in ("Sum", "Mean") and not _passes(node):
            return node
        before = next((one for one, _ in node.next_functions if one is not None), None)
        if before is None or kind_of(before) not in ("Sum", "Mean"):
            return node
        shape = shape_of(*before.next_functions[0])
        if not shape or 0 not in dims_of(before, len(shape)):
            return node
        node = before
    return node


def _kind(node: Node) -> str:
    """Whether a node is a sum or a mean, as far as it tells."""
    return _JOINS.get(kind_of(node), loss_reduction_of(node) or "")
