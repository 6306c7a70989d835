"""Operations of a recorded computation, fused by torch.compile: what is done entry by entry becomes few loops."""

from __future__ import annotations

import keyword
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._calls import Call, Form, slots_of
from ._checks import checks_something_else
from ._graph import Graph
from ._indices import may_take_others
from ._private import dispatch_modes_active, undispatched
from .errors import ConfigurationError

_Options = dict[str, str | int | bool | Callable[..., Any]]
# Random numbers as without it; what is rounded to 16 bits stays so, and overflows, also between operations that are
# fused; layouts as in the recording, as others lead convolutions to slow ways; and no Python between the operations,
# which short ones would wait for.
OPTIONS: _Options = {
    "fallback_random": True, "emulate_precision_casts": True, "layout_optimization": False, "cpp_wrapper": True,
}  # fmt: skip
# Tensors are those of the recording, or lie as they did; other settings are looked at by `Fused`.
_UNGUARDED: _Options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
_INDICES = "may take indices, which compiled code must not be given where they are wrong"
_OTHERWISE = {"grid_sampler_2d", "grid_sampler_3d", "softshrink"}
_WRITES = 16  # into one tensor; each would become a copy of all of it
_TURNS, _SECONDS = 9, 10.0  # of each, in which they are timed


def why_not_fused(calls: Sequence[Call], roots: Sequence[int], forms: Sequence[Form]) -> str | None:
    """Why it is not to be tried, if it is not.

    Args:
        calls: The operations.
        roots: Of each tensor that they make the one whose memory it shows.
        forms: Of the same tensors.

    Returns:
        The reason: steps of a recurrent layer that are written into one tensor, or operations that would do otherwise.
    """
    for refused, why in (
        (lambda call: may_take_others(call, forms), _INDICES),
        (checks_something_else, "may raise, which compiled code would not"),
        (lambda call: call.name in _OTHERWISE, "may find numbers where there is NaN, when compiled"),
        (_cannot_be_written, "cannot be written as Python code by torch.compile"),
    ):
        names = sorted({call.name for call in calls if refused(call)})
        if names:
            return f"{' and '.join(names)} {why}"
    writes = Counter(
        roots[slot.number]
        for call in calls
        for slot in slots_of(call.written())
        if slot.number >= 0 and roots[slot.number] != slot.number
    )
    if max(writes.values(), default=0) > _WRITES:
        return f"more than {_WRITES} times results are written into parts of one tensor, as by recurrent layers"
    return None


def _cannot_be_written(call: Call) -> bool:
    """Whether an operation has a name like ``random_.from``, or is given a generator."""
    given = call.named().values()
    return keyword.iskeyword(call.function._overloadname) or any(isinstance(one, torch.Generator) for one in given)


class DoesNotHold(Exception):  # noqa: N818 - nothing is wrong yet
    """Something that operations look at is not as compiled code needs it: they are to be done one by one."""


class Fused:
    """Operations as one function, compiled.

    Args:
        graph: The operations, as of `graph_of`.
        example: Tensors that it is given.

    Raises:
        ConfigurationError: If torch.compile fails.
        DoesNotHold: If operations on the example have to be done one by one.
    """

    def __init__(self, graph: Graph, example: Sequence[Tensor]) -> None:
        """Compile it."""
        self._graph, self._constants = graph, [t.detach() for t in graph.constants]
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        try:
            module = fx.GraphModule(nn.Module(), graph.nodes)
            self._compiled: Any = torch.compile(module, fullgraph=True, dynamic=False, options=OPTIONS | _UNGUARDED)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch.compile about itself
                self(*example)
        except DoesNotHold:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise ConfigurationError(
                f"This step cannot be compiled: torch.compile failed ({type(error).__name__}: "
                f"{lines[0] if lines else 'no message'}). It needs a C++ compiler, and operations that it knows; leave "
                f"out compiled=True."
            ) from error

    def __call__(self, *given: Tensor) -> tuple:
        """Do it; random numbers are drawn also where something does not hold."""
        with undispatched():
            found = self._compiled(*given, *self._constants)
            if not self._graph.checked:
                return found
            if not found[-1].item():
                raise DoesNotHold
        return found[:-1]

    @property
    def fits(self) -> bool:
        """Whether nothing is to see operations one by one or wants others, and constants lie where they did."""
        if dispatch_modes_active() or self._deterministic != torch.are_deterministic_algorithms_enabled():
            return False
        with undispatched():
            return all(map(Tensor.is_set_to, self._graph.constants, self._constants))


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
