"""Operations of a recorded computation, fused by torch.compile: what is done entry by entry becomes few loops."""

from __future__ import annotations

import operator
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._calls import Call, Slot, slots_of
from ._private import dispatch_modes_active, undispatched
from ._tree import map_tensors
from .errors import ConfigurationError

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
        calls: The operations.
        inputs: How many tensors are given, which have the first numbers.
        wanted: Numbers of the tensors that are returned.
        example: Such tensors.

    Raises:
        ConfigurationError: If torch.compile fails.
    """

    def __init__(self, calls: Sequence[Call], inputs: int, wanted: Sequence[int], example: Sequence[Tensor]) -> None:
        """Compile it."""
        try:
            graph, self._constants = _graph_of(calls, inputs, wanted)
            self._compiled: Any = torch.compile(
                fx.GraphModule(nn.Module(), graph), fullgraph=True, dynamic=False, options=OPTIONS | _UNGUARDED
            )
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
        self._deterministic = torch.are_deterministic_algorithms_enabled()

    def __call__(self, *given: Tensor) -> tuple:
        """Do it."""
        with undispatched():
            return self._compiled(*given, *self._constants)

    @property
    def fits(self) -> bool:
        """Whether nothing is to see the operations one by one, or to have others."""
        return not dispatch_modes_active() and self._deterministic == torch.are_deterministic_algorithms_enabled()


def _graph_of(calls: Sequence[Call], inputs: int, wanted: Sequence[int]) -> tuple[fx.Graph, list[Tensor]]:
    """The calls as a graph, of the tensors that are given and of constants, and these."""
    graph = fx.Graph()
    known = {number: graph.placeholder(f"t{number}") for number in range(inputs)}
    tensors = [slot.tensor for call in calls for slot in slots_of((call.args, call.kwargs)) if slot.tensor is not None]
    constants = {id(t): t.detach() for t in tensors}
    places = {key: graph.placeholder(f"c{place}") for place, key in enumerate(constants)}

    def node(slot: Slot) -> fx.Node:
        return known[slot.number] if slot.number >= 0 else places[id(slot.tensor)]

    for call in calls:
        args, kwargs = map_tensors(node, (call.args, call.kwargs), Slot)
        made = _called(graph, call.function, args, kwargs)
        for place, number in enumerate(call.results):
            if number >= 0:
                known[number] = graph.call_function(operator.getitem, (made, place)) if call.makes_several else made
    graph.output(tuple(known[number] for number in wanted))
    return graph, list(constants.values())


def _called(graph: fx.Graph, function: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Node:
    """One call; a result that is to be written to a tensor is copied there, as torch.compile only knows whole ones."""
    outs = [argument.name for argument in function._schema.arguments if argument.is_out]
    instead = _returning(function) if len(outs) == 1 else None
    if instead is None:
        return graph.call_function(function, args, kwargs)
    target = kwargs.pop(outs[0])
    return graph.call_function(torch.ops.aten.copy_.default, (target, graph.call_function(instead, args, kwargs)))


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
