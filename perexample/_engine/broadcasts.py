"""Losses in which every output meets the target of every example, because their shapes are not the same.

Outputs ``[N, 1]`` and targets ``[N]`` are broadcast to ``[N, N]`` by any operation that compares them. To the graph the
targets are constants, so that no derivative shows it. Nor does one where outputs are compared with as many constants as
there are examples, such as the detached outputs of a second model: batches of two sizes tell that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from ..errors import CrossExampleError
from ..place import widened
from .graph import EACH, kind_of, nodes_to_taps, shape_of
from .kinds import names

_COMPARES = names("MseLoss SmoothL1Loss HuberLoss")  # of what they have expanded to one shape
_MEETS = names("Mm Bmm Addmm Baddbmm Cdist EuclideanDist Expand")
_PICKS = names("Diagonal Trace")  # of such only what examples have of their own
_Square = tuple[int, torch.Size]  # a number of examples, and the shape of a product then
# Sizes that are no number of examples, as batches of others had them in the same operation.
_CONSTANT: WeakKeyDictionary[nn.Module, set[tuple[str, int]]] = WeakKeyDictionary()
# Of products in the loss what the first batch had; none where a later one has not followed the number of examples.
_SQUARES: WeakKeyDictionary[nn.Module, dict[tuple[str, int], _Square | None]] = WeakKeyDictionary()


def check_broadcasts(loss: Tensor, n: int, model: nn.Module | None) -> None:
    """Refuse losses in which outputs were broadcast along a second axis of examples.

    Args:
        loss: The loss.
        n: Number of examples.
        model: For which sizes are remembered that are the same in batches of other numbers.

    Raises:
        CrossExampleError: If outputs of one shape became such of two axes of examples, beside a constant; where it
            is a product, in the second batch of another number of examples.
    """
    if n < 2 or loss.grad_fn is None:
        return
    known = set() if model is None else _CONSTANT.setdefault(model, set())
    nodes = nodes_to_taps(GradientEdge(loss.grad_fn, loss.output_nr), behind_models=True)
    for node, before, after in _grown(nodes):
        sizes = {size for size, was in zip(after, widened(before, len(after)), strict=True) if size != was}
        twice = {size for size in sizes if size % n == 0 and size in before and (node.name(), size) not in known}
        if not twice:
            known.update((node.name(), size) for size in sizes if size % n)
            continue
        raise CrossExampleError(
            f"The loss compares outputs {list(before)} with something of another shape, which gives {list(after)} "
            f"({node.name()}): each output meets what belongs to other examples, as outputs [N, 1] meet targets [N]. "
            f"Give both the same shape, as by targets.unsqueeze(1). Where these {min(twice)} numbers are the same for "
            f"all examples, repeat the outputs for each of them: outputs.repeat(...)."
        )
    if model is not None:
        _check_squares(nodes, n, _SQUARES.setdefault(model, {}))


def _check_squares(nodes: Sequence[Node], n: int, known: dict[tuple[str, int], _Square | None]) -> None:
    """Refuse products with constants that have two axes of examples, by batches of different numbers of them."""
    picked = {one for node in nodes if kind_of(node) in _PICKS for one, _ in node.next_functions}
    products = [node for node in nodes if kind_of(node) in _MEETS and node not in picked]
    for number, node in enumerate(products):
        shape, key = shape_of(node, 0), (node.name(), number)
        if shape is None or sum(before is not None for before, _ in node.next_functions) > 1:
            continue  # where both have a graph, derivatives tell
        m, was = known.setdefault(key, (n, shape)) or (n, None)
        if was is None or (m == n and shape == was):
            continue
        pairs = zip(shape, was, strict=False)
        if m == n or len(shape) != len(was) or sum(a % n == 0 and a * m == b * n for a, b in pairs) < 2:
            known[key] = None  # it is something else that has as many entries
            continue
        raise CrossExampleError(
            f"The loss compares each output with as many others as there are examples, in batches of {m} and {n}: "
            f"{node.name()} gives {list(shape)}. So each meets what belongs to other examples, as in contrastive "
            f"losses whose other side has no gradient (detached, or of a frozen model). Compare it with what is its "
            f"own, or with something that is the same for all batches."
        )


def _grown(nodes: Sequence[Node]) -> Iterator[tuple[Node, torch.Size, torch.Size]]:
    """Functions of each entry, of tensors of one shape beside constants, whose results have more: the shapes."""
    by_torch = set(_expanded_by_torch(nodes))
    for node in nodes:
        given = {shape_of(*edge) for edge in node.next_functions if edge[0] is not None}
        if len(given) != 1 or not (kind_of(node) in EACH or node in by_torch):
            continue
        [before], after = given, shape_of(node, 0)
        if before is not None and after is not None and after.numel() > before.numel():
            yield node, before, after


def _expanded_by_torch(nodes: Sequence[Node]) -> Iterator[Node]:
    """What mse_loss and its kin, and l1_loss, have expanded to the shape of the target."""
    differences = [one for node in nodes if kind_of(node) == "Abs" for one, _ in node.next_functions]
    compare = [node for node in nodes if kind_of(node) in _COMPARES]
    for node in (*compare, *(one for one in differences if one is not None and kind_of(one) == "Sub")):
        yield from (one for one, _ in node.next_functions if one is not None and kind_of(one) == "Expand")
