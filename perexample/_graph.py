"""A recorded computation as a graph for torch.compile."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, ops

from ._calls import Call, Form, Slot, slots_of
from ._checks import Divisors, checks_of, divisors_of
from ._indices import Indices, indices_of
from ._tree import map_tensors

_aten = ops.aten


@dataclass(frozen=True)
class Graph:
    """Operations for torch.compile.

    Attributes:
        nodes: The operations, of tensors that are given and of constants.
        constants: These.
        checked: Whether the last of the results tells whether what operations look at is right.
    """

    nodes: fx.Graph
    constants: list[Tensor]
    checked: bool


def graph_of(calls: Sequence[Call], forms: Sequence[Form], inputs: Iterable[int], wanted: Sequence[int]) -> Graph:
    """The calls as a graph.

    Args:
        calls: The operations.
        forms: Of the tensors that they make, by their numbers.
        inputs: Numbers of the tensors that are given, in their order.
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

    def __init__(self, calls: Sequence[Call], forms: Sequence[Form], inputs: Iterable[int]) -> None:
        self.graph, self.forms = fx.Graph(), forms
        slots = [slot for call in calls for slot in slots_of((call.args, call.kwargs))]
        self.constants = {id(slot.tensor): slot.tensor for slot in slots if slot.tensor is not None}
        self.made = {number: self.graph.placeholder(f"t{number}") for number in inputs}
        self.there = {key: self.graph.placeholder(f"c{place}") for place, key in enumerate(self.constants)}
        self.right: list[fx.Node] = []  # whether it holds, of each thing that is checked
        self.checked: dict[Any, fx.Node] = {}  # what is right in any case, by what it stands for

    def add(self, call: Call) -> None:
        """One call."""
        numbers: list[Indices | Divisors] = [*indices_of(call, self.forms), *divisors_of(call, self.forms)]
        right = {id(one.slot): self._checked(one) for one in numbers}  # one tensor may be used for several axes
        if not call.only_checks or not call.of_torch:
            self._do(call, right)
        self.right += [check.held(self.graph, self._node(check.slot)) for check in checks_of(call, self.forms)]

    def _do(self, call: Call, instead: dict[int, fx.Node]) -> None:
        args, kwargs = map_tensors(
            lambda slot: instead[id(slot)] if id(slot) in instead else self._node(slot), (call.args, call.kwargs), Slot
        )
        if kwargs.get("check_errors"):  # told at the end, too
            kwargs["check_errors"] = False
        made = self._called(call.function, args, kwargs)
        if call.written():
            self.checked = {}  # what was written to may have been checked
        for place, number in enumerate(call.results):
            if number >= 0:
                one = self.graph.call_function(operator.getitem, (made, place)) if call.makes_several else made
                self.made[number] = one

    def finished(self, wanted: Sequence[int]) -> Graph:
        """The graph, which returns what is wanted, and whether all that is checked holds."""
        results = [self.made[number] for number in wanted]
        if self.right:
            every = [self.graph.call_function(_aten.all.default, (one,)) for one in self.right]
            together = self.graph.call_function(_aten.stack.default, (every,))
            results.append(self.graph.call_function(_aten.all.default, (together,)))
        self.graph.output(tuple(results))
        return Graph(self.graph, list(self.constants.values()), bool(self.right))

    def _node(self, slot: Slot) -> fx.Node:
        return self.made[slot.number] if slot.number >= 0 else self.there[id(slot.tensor)]

    def _checked(self, numbers: Indices | Divisors) -> fx.Node:
        """Numbers that are right in any case; whether they are those that were given is told at the end."""
        given = self._node(numbers.slot)
        key = given, numbers.limits
        if key not in self.checked:
            self.right.append(numbers.held(self.graph, given))
            wrong = self.graph.call_function(_aten.bitwise_not.default, (self.right[-1],))
            self.checked[key] = self.graph.call_function(_aten.masked_fill.Scalar, (given, wrong, numbers.instead))
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
