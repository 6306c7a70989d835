"""Numbers of the data that operations use as indices, which compiled code must not be given where they are wrong.

Operations called one by one raise for an index beyond the end. Compiled loops do so inside of a parallel region, which
ends the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ._calls import Call, Form, Slot, any_of, form_of, is_view, slots_of

_aten = torch.ops.aten
_MASKS = torch.bool, torch.uint8
# What takes integers for numbers beside pointwise functions, reductions and views, or indices of a forward's own.
_NO_INDICES = {
    "_to_copy", "_unsafe_view", "addmm", "argmax", "argmin", "argsort", "baddbmm", "bmm", "bucketize", "cat",
    "constant_pad_nd", "copy", "cumprod", "cumsum", "empty_like", "fill", "flip", "floor_divide", "full_like",
    "isin", "kthvalue", "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "mm", "new_empty",
    "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like", "randint_like",
    "randn_like", "repeat", "roll", "rot90", "searchsorted", "sort", "stack", "topk", "tril", "triu", "zero",
    "zeros_like",
}  # fmt: skip
_POOLS = "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward"


@dataclass(frozen=True)
class Indices:
    """A tensor of indices.

    Attributes:
        slot: The tensor.
        size: They must be below.
        wraps: Whether they may count from the end.
        ignored: Another number that may stand there.
    """

    slot: Slot
    size: int
    wraps: bool = False
    ignored: int | None = None

    @property
    def limits(self) -> tuple:
        """What is right."""
        return self.size, self.wraps, self.ignored

    @property
    def instead(self) -> int:
        """What is right in any case."""
        return 0

    def held(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Whether each of them is right."""
        least = graph.call_function(_aten.ge.Scalar, (node, -self.size if self.wraps else 0))
        most = graph.call_function(_aten.lt.Scalar, (node, self.size))
        held = graph.call_function(_aten.bitwise_and.Tensor, (least, most))
        if self.ignored is not None:
            other = graph.call_function(_aten.eq.Scalar, (node, self.ignored))
            held = graph.call_function(_aten.bitwise_or.Tensor, (held, other))
        return held


def indices_of(call: Call, forms: Sequence[Form]) -> Iterator[Indices]:
    """The indices that an operation is given, but those that are made for good.

    Args:
        call: The operation.
        forms: Of the tensors that operations make, by their numbers.

    Yields:
        Each tensor of them.
    """
    for found in _known(call, forms):
        if not found.slot.lasting and form_of(found.slot, forms).dtype not in _MASKS:
            yield found


def may_take_others(call: Call, forms: Sequence[Form]) -> bool:
    """Whether an operation is given integers that may be indices, of which `indices_of` does not know.

    Args:
        call: The operation.
        forms: Of the tensors that operations make, by their numbers.

    Returns:
        True unless they are known to be indices, or to be taken for what they are.
    """
    if not call.of_torch or call.only_checks:  # is called as it is, or not at all
        return False
    if call.name.rstrip("_") in _NO_INDICES or {torch.Tag.pointwise, torch.Tag.reduction} & set(call.function.tags):
        return False
    if is_view(call.function) or any(True for _ in _known(call, forms)):
        return False
    given = [form_of(slot, forms).dtype for slot in slots_of((call.args, call.kwargs)) if not slot.lasting]
    return any(not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool) for dtype in given)


def _known(call: Call, forms: Sequence[Form]) -> Iterator[Indices]:
    given, name = call.named(), call.name.rstrip("_")

    def shape_of(argument: str) -> torch.Size:
        return form_of(given[argument], forms).shape

    if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
        yield Indices(given["indices"], shape_of("weight")[0])
    elif name == "embedding_dense_backward":
        yield Indices(given["indices"], given["num_weights"])
    elif name.startswith("nll_loss"):
        shape = shape_of("self")
        yield Indices(given["target"], shape[1 if len(shape) > 1 else 0], ignored=given["ignore_index"])
    elif name in _POOLS and any_of(given["padding"]):  # where the entry that is found may be one of the padding
        yield Indices(given["indices"], math.prod(shape_of("self")[-3 if "3d" in name else -2 :]))
    elif name in ("take", "put"):
        yield Indices(given["index"], math.prod(shape_of("self")), wraps=True)
    elif isinstance(given.get("indices"), (tuple, list)):
        for size, slot in zip(shape_of("self"), given["indices"], strict=False):
            if slot is not None:
                yield Indices(slot, size, wraps=True)
    elif isinstance(given.get("index"), Slot) and "dim" in given:
        size = shape_of("self")[given["dim"]] if shape_of("self") else 1
        yield Indices(given["index"], size, wraps=name == "index_fill")
