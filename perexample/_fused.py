"""Operations of a recorded computation, fused by torch.compile: what is done entry by entry becomes few loops."""

from __future__ import annotations

import operator
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._calls import Call, Slot, slots_of
from ._indices import indices_of
from ._private import dispatch_modes_active, undispatched, version
from ._tree import map_tensors
from .errors import ConfigurationError

_aten = torch.ops.aten
_Options = dict[str, str | int | bool | Callable[..., Any]]
# Random numbers as without it; layouts as in the recording, as others lead convolutions to slow ways; and no Python
# between the operations, which short ones would wait for.
OPTIONS: _Options = {"fallback_random": True, "layout_optimization": False, "cpp_wrapper": True}
# Tensors are those of the recording, or lie as they did; other settings are looked at by `Fused`.
_UNGUARDED: _Options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
_WRITES = 16  # into one tensor; each would become a copy of all of it
_TURNS, _SECONDS = 9, 10.0  # of each, in which they are timed


def slow_to_fuse(calls: Sequence[Call], roots: Sequence[int]) -> str | None:
    """Why it is not worth trying, if it is not: steps of a recurrent layer that are written into one tensor."""
    writes = Counter(
        roots[slot.number]
        for call in calls
        for slot in slots_of(call.written())
        if slot.number >= 0 and roots[slot.number] != slot.number
    )
    if max(writes.values(), default=0) > _WRITES:
        return f"more than {_WRITES} times results are written into parts of one tensor, as by recurrent layers"
    return None


class Fused:
    """Operations as one function, compiled.

    Args:
        graph: The operations, as of `graph_of`.
        usual: Does the same one by one.
        example: Tensors that it is given.

    Raises:
        ConfigurationError: If torch.compile fails.
    """

    def __init__(self, graph: Graph, usual: Callable[..., tuple], example: Sequence[Tensor]) -> None:
        """Compile it."""
        self._graph, self._usual = graph, usual
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        try:
            module = fx.GraphModule(nn.Module(), graph.nodes)
            self._compiled: Any = torch.compile(module, fullgraph=True, dynamic=False, options=OPTIONS | _UNGUARDED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.compile about itself
                self(*example)
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise ConfigurationError(
                f"This step cannot be compiled: torch.compile failed ({type(error).__name__}: "
                f"{lines[0] if lines else 'no message'}). It needs a C++ compiler, and operations that it knows; leave "
                f"out compiled=True."
            ) from error

    def __call__(self, *given: Tensor) -> tuple:
        """Do it; one by one if an index is wrong, which raises what it raises."""
        with undispatched():
            found = self._compiled(*given, *self._graph.constants)
        if not self._graph.checked:
            return found
        return found[:-1] if found[-1].item() else self._usual(*given)

    @property
    def fits(self) -> bool:
        """Whether nothing is to see operations one by one or wants others, and constant indices are as they were."""
        if dispatch_modes_active() or self._deterministic != torch.are_deterministic_algorithms_enabled():
            return False
        return all(version(t) == writes for t, writes in self._graph.indices)


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


def graph_of(calls: Sequence[Call], shapes: Sequence[torch.Size], inputs: int, wanted: Sequence[int]) -> Graph:
    """The calls as a graph.

    Args:
        calls: The operations.
        shapes: Of the tensors that they make, by their numbers.
        inputs: How many tensors are given, which have the first numbers.
        wanted: Numbers of the tensors that are returned.

    Returns:
        The graph.
    """
    graph = fx.Graph()
    known = {number: graph.placeholder(f"t{number}") for number in range(inputs)}
    tensors = [slot.tensor for call in calls for slot in slots_of((call.args, call.kwargs)) if slot.tensor is not None]
    constants = {id(t): t.detach() for t in tensors}
    places = {key: graph.placeholder(f"c{place}") for place, key in enumerate(constants)}
    held: list[fx.Node] = []
    checked: dict[Any, fx.Node] = {}
    lasting: dict[int, Tensor] = {}

    def node(slot: Slot) -> fx.Node:
        return known[slot.number] if slot.number >= 0 else places[id(slot.tensor)]

    for call in calls:
        right: dict[fx.Node, fx.Node] = {}
        for indices in indices_of(call, shapes):
            if indices.slot.tensor is not None:
                lasting[id(indices.slot.tensor)] = indices.slot.tensor
                continue
            given = node(indices.slot)
            key = given, indices.size, indices.wraps, indices.ignored
            if key not in checked:
                held.append(indices.held(graph, given))
                wrong = graph.call_function(_aten.bitwise_not.default, (held[-1],))
                checked[key] = graph.call_function(_aten.masked_fill.Scalar, (given, wrong, 0))
            right[given] = checked[key]
        args, kwargs = map_tensors(lambda slot: right.get(node(slot), node(slot)), (call.args, call.kwargs), Slot)  # noqa: B023
        made = _called(graph, call.function, args, kwargs)
        if call.written():
            checked = {}  # what was written to may have been indices
        for place, number in enumerate(call.results):
            if number >= 0:
                known[number] = graph.call_function(operator.getitem, (made, place)) if call.makes_several else made
    results = [known[number] for number in wanted]
    if held:
        every = [graph.call_function(_aten.all.default, (one,)) for one in held]
        together = graph.call_function(_aten.stack.default, (every,))
        results.append(graph.call_function(_aten.all.default, (together,)))
    graph.output(tuple(results))
    right_indices = [(t, version(t)) for t in lasting.values() if not t.is_inference()]  # which count no writes
    return Graph(graph, list(constants.values()), bool(held), right_indices)


def _called(graph: fx.Graph, function: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Node:
    """One call; a result that is to be written to a tensor is copied there, as torch.compile only knows whole ones."""
    outs = [argument.name for argument in function._schema.arguments if argument.is_out]
    instead = _returning(function) if len(outs) == 1 else None
    if instead is None:
        return graph.call_function(function, args, kwargs)
    target = kwargs.pop(outs[0])
    return graph.call_function(_aten.copy_.default, (target, graph.call_function(instead, args, kwargs)))


def _returning(function: Any) -> Any:
    """The form of an operation that returns what this one writes."""
    wanted = [(a.name, str(a.type)) for a in function._schema.arguments if not a.is_out]
    for name in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, name)
        if not other._schema.is_mutable and [(a.name, str(a.type)) for a in other._schema.arguments] == wanted:
            return other
    return None


def is_faster(one: Callable[..., tuple], other: Callable[..., tuple], inputs: Sequence[Tensor]) -> bool:
    """Whether a function takes less time than another, by turns."""
    seconds: dict[Callable, list[float]] = {one: [], other: []}
    begin = time.perf_counter()
    for _ in range(_TURNS):
        for function, taken in seconds.items():
            start = time.perf_counter()
            function(*inputs)
            taken.append(time.perf_counter() - start)
        if time.perf_counter() - begin > _SECONDS:
            break
    return statistics.median(seconds[one]) <= statistics.median(seconds[other])
