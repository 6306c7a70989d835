"""Operations of a recorded computation, fused by torch.compile: what is done entry by entry becomes few loops."""

from __future__ import annotations

import keyword
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._calls import Call, Form, Pause, slots_of
from ._checks import checks_something_else
from ._graph import Graph, graph_of
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
_TOO_OLD = torch.__version__ < "2.13"  # it keeps digits that rounding to 16 bits takes away
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
    if _TOO_OLD:
        return f"torch {torch.__version__} rounds otherwise when it compiles, which takes torch 2.13"
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


class Halves:
    """Operations with a pause, each half compiled: a generator as that of `code_of`.

    Args:
        calls: The operations.
        forms: Of the tensors that they make, by their numbers.
        inputs: How many tensors are given, which have the first numbers.
        wanted: Numbers of the tensors that are returned.
        pause: Where they wait for some of the inputs, the last ones.
        example: Tensors that are given.

    Raises:
        ConfigurationError: As `Fused`.
        DoesNotHold: As `Fused`.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        forms: Sequence[Form],
        inputs: int,
        wanted: Sequence[int],
        pause: Pause,
        example: Sequence[Tensor],
    ) -> None:
        """Compile both."""
        first, second, early = calls[: pause.place], calls[pause.place :], range(inputs - len(pause.given))
        used = {*wanted, *(number for call in second for number in call.uses())}
        made = [number for call in first for number in call.results if number in used]
        self._again = [number for number in early if number in used]
        self._shown = len(pause.shown)
        self._first = Fused(graph_of(first, forms, early, [*pause.shown, *made]), example[: len(early)])
        given = [example[number] for number in self._again]
        given += [*self._first(*example[: len(early)])[self._shown :], *example[len(early) :]]
        self._second = Fused(graph_of(second, forms, [*self._again, *made, *pause.given], wanted), given)

    def __call__(self, *given: Tensor) -> Generator[list[Tensor], Any, tuple]:
        """Do the first, and the second when the rest is there."""
        found = list(self._first(*given))
        kept = [given[number] for number in self._again] + found[self._shown :]
        del found[self._shown :]
        rest = yield found
        return self._second(*kept, *rest)

    @property
    def fits(self) -> bool:
        """As of `Fused`."""
        return self._first.fits and self._second.fits


def through(program: Callable[..., Generator[Any, Any, tuple]], pause: Pause, *given: Tensor) -> tuple:
    """What a computation with a pause returns, when all that it is given is there."""
    early = len(given) - len(pause.given)
    under_way = program(*given[:early])
    next(under_way)
    try:
        under_way.send(given[early:])
    except StopIteration as end:
        return end.value
    raise AssertionError("there is one pause")


def writes_over_the_pause(calls: Sequence[Call], roots: Sequence[int], pause: Pause) -> bool:
    """Whether operations behind it write into what was there before."""
    before = {roots[number] for call in calls[: pause.place] for number in call.results if number >= 0}
    written = [slot for call in calls[pause.place :] for slot in slots_of(call.written())]
    return any(roots[slot.number] in before for slot in written if slot.number >= 0)


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
