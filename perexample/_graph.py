"""A recorded computation as a graph for torch.compile."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, ops

from ._calls import Call, Form, Slot, slots_of
from ._indices import Indices, indices_of
from ._private import version
from ._tree import map_tensors

_aten = ops.aten


@dataclass(frozen=True)
class Graph:
    """Operations for torch.compile.

    Attributes:
        nodes: The operations, of tensors that are given and of constants.
        constants: These.
        checked: Whether the last of the results tells whether indices are right.
        indices: Constants that are indices and right, with the number of writes to them.
    """

    nodes: fx.Graph
    constants: list[Tensor]
    checked: bool
    indices: list[tuple[Tensor, int]]


def graph_of(calls: Sequence[Call], forms: Sequence[Form], inputs: int, wanted: Sequence[int]) -> Graph:
    """The calls as a graph.

    Args:
        calls: The operations.
        forms: Of the tensors that they make, by their numbers.
        inputs: How many tensors are given, which have the first numbers.
        wanted: Numbers of the tensors that are returned.

    Returns:
        The graph.
    """
    under_way = _UnderWay(calls, forms, inputs)
    for call in calls:
        under_way.add(call)
    return under_way.finished(wanted)


class _UnderWay:
    """A graph to which calls are added."""

    def __init__(self, calls: Sequence[Call], forms: Sequence[Form], inputs: int) -> None:
        self.graph, self.forms = fx.Graph(), forms
        slots = [slot for call in calls for slot in slots_of((call.args, call.kwargs))]
        self.constants = {id(slot.tensor): slot.tensor.detach() for slot in slots if slot.tensor is not None}
        self.made = {number: self.graph.placeholder(f"t{number}") for number in range(inputs)}
        self.there = {key: self.graph.placeholder(f"c{place}") for place, key in enumerate(self.constants)}
        self.right: list[fx.Node] = []  # whether indices are, of each tensor of them
        self.checked: dict[Any, fx.Node] = {}  # what is right in any case, by what it stands for
        self.lasting: dict[int, Tensor] = {}

    def add(self, call: Call) -> None:
        """One call."""
        right: dict[fx.Node, fx.Node] = {}
        for indices in indices_of(call, self.forms):
            tensor, node = indices.slot.tensor, self._node(indices.slot)
            if tensor is None:
                right[node] = self._checked(indices, right.get(node, node))  # one may be used for several axes
            else:
                self.lasting[id(tensor)] = tensor
        nodes = map_tensors(lambda slot: right.get(self._node(slot), self._node(slot)), (call.args, call.kwargs), Slot)
        made = self._called(call.function, *nodes)
        if call.written():
            self.checked = {}  # what was written to may have been indices
        for place, number in enumerate(call.results):
            if number >= 0:
                one = self.graph.call_function(operator.getitem, (made, place)) if call.makes_several else made
                self.made[number] = one

    def finished(self, wanted: Sequence[int]) -> Graph:
        """The graph, which returns what is wanted, and whether all indices are right."""
        results = [self.made[number] for number in wanted]
        if self.right:
            every = [self.graph.call_function(_aten.all.default, (one,)) for one in self.right]
            together = self.graph.call_function(_aten.stack.default, (every,))
            results.append(self.graph.call_function(_aten.all.default, (together,)))
        self.graph.output(tuple(results))
        indices = [(t, version(t)) for t in self.lasting.values() if not t.is_inference()]  # which count no writes
        return Graph(self.graph, list(self.constants.values()), bool(self.right), indices)

    def _node(self, slot: Slot) -> fx.Node:
        return self.made[slot.number] if slot.number >= 0 else self.there[id(slot.tensor)]

    def _checked(self, indices: Indices, given: fx.Node) -> fx.Node:
        """Indices that are right in any case; whether they are those that were given is told at the end."""
        key = given, indices.size, indices.wraps, indices.ignored
        if key not in self.checked:
            self.right.append(indices.held(self.graph, given))
            wrong = self.graph.call_function(_aten.bitwise_not.default, (self.right[-1],))
            self.checked[key] = self.graph.call_function(_aten.masked_fill.Scalar, (given, wrong, 0))
        return self.checked[key]

    def _called(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Node:
        """One call; a result that is to be written to a tensor is copied there, as only whole ones can be written."""
        outs = [argument.name for argument in function._schema.arguments if argument.is_out]
        instead = _returning(function) if len(outs) == 1 else None
        if instead is None:
            return self.graph.call_function(function, args, kwargs)
        target = kwargs.pop(outs[0])
        return self.graph.call_function(_aten.copy_.default, (target, self.graph.call_function(instead, args, kwargs)))


def _returning(function: Any) -> Any:
    """The form of an operation that returns what this one writes."""
    wanted = [(a.name, str(a.type)) for a in function._schema.arguments if not a.is_out]
    for name in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, name)
        if not other._schema.is_mutable and [(a.name, str(a.type)) for a in other._schema.arguments] == wanted:
            return other
    return None
