"""Operations of a recorded computation, fused by torch.compile: what is done entry by entry becomes few loops."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._calls import Call, Form, slots_of
from ._graph import Graph
from ._indices import may_take_others
from ._private import dispatch_modes_active, undispatched, version
from .errors import ConfigurationError

_Options = dict[str, str | int | bool | Callable[..., Any]]
# Random numbers as without it; layouts as in the recording, as others lead convolutions to slow ways; and no Python
# between the operations, which short ones would wait for.
OPTIONS: _Options = {"fallback_random": True, "layout_optimization": False, "cpp_wrapper": True}
# Tensors are those of the recording, or lie as they did; other settings are looked at by `Fused`.
_UNGUARDED: _Options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
_WRITES = 16  # into one tensor; each would become a copy of all of it
_TURNS, _SECONDS = 9, 10.0  # of each, in which they are timed


def why_not_fused(calls: Sequence[Call], roots: Sequence[int], forms: Sequence[Form]) -> str | None:
    """Why it is not to be tried, if it is not.

    Args:
        calls: The operations.
        roots: Of each tensor that they make the one whose memory it shows.
        forms: Of the same tensors.

    Returns:
        The reason: steps of a recurrent layer that are written into one tensor, or indices that cannot be checked.
    """
    unknown = sorted({call.name for call in calls if may_take_others(call, forms)})
    if unknown:
        return f"{' and '.join(unknown)} may take indices, which compiled code must not be given where they are wrong"
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
