"""Numbers of the data that operations use as indices, which compiled code must not be given where they are wrong.

Operations called one by one raise for an index beyond the end. Compiled loops do so inside of a parallel region, which
ends the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ._calls import Call, Slot

_aten = torch.ops.aten


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

    def held(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Whether each of them is right."""
        least = graph.call_function(_aten.ge.Scalar, (node, -self.size if self.wraps else 0))
        most = graph.call_function(_aten.lt.Scalar, (node, self.size))
        held = graph.call_function(_aten.bitwise_and.Tensor, (least, most))
        if self.ignored is not None:
            other = graph.call_function(_aten.eq.Scalar, (node, self.ignored))
            held = graph.call_function(_aten.bitwise_or.Tensor, (held, other))
        return held


def indices_of(call: Call, shapes: Sequence[torch.Size]) -> Iterator[Indices]:
    """The indices that an operation is given, but those that are made for good.

    Args:
        call: The operation.
        shapes: Of the tensors that operations make, by their numbers.

    Yields:
        Each tensor of them.
    """
    for found in _all(call, shapes):
        mask = found.slot.tensor is not None and found.slot.tensor.dtype in (torch.bool, torch.uint8)
        if not found.slot.lasting and not mask:
            yield found


def _all(call: Call, shapes: Sequence[torch.Size]) -> Iterator[Indices]:
    schema = call.function._schema
    given: dict[str, Any] = {a.name: value for a, value in zip(schema.arguments, call.args, strict=False)} | call.kwargs
    name = schema.name.partition("::")[2].rstrip("_")

    def shape_of(argument: str) -> torch.Size:
        slot = given[argument]
        return shapes[slot.number] if slot.tensor is None else slot.tensor.shape

    if name == "embedding":
        yield Indices(given["indices"], shape_of("weight")[0])
    elif name == "embedding_dense_backward":
        yield Indices(given["indices"], given["num_weights"])
    elif name.startswith("nll_loss"):
        shape = shape_of("self")
        yield Indices(given["target"], shape[1 if len(shape) > 1 else 0], ignored=given["ignore_index"])
    elif name in ("take", "put"):
        yield Indices(given["index"], math.prod(shape_of("self")), wraps=True)
    elif isinstance(given.get("indices"), (tuple, list)):
        for size, slot in zip(shape_of("self"), given["indices"], strict=False):
            if slot is not None:
                yield Indices(slot, size, wraps=True)
    elif isinstance(given.get("index"), Slot) and "dim" in given:
        yield Indices(given["index"], shape_of("self")[given["dim"]] if shape_of("self") else 1)
