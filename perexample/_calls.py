"""The operations of a recorded computation: what need not be done again is taken out, and the rest becomes code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._private import memory_of
from ._tree import map_tensors

WRITES_STATISTICS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm"}  # without a word
_OF_TORCH = {"aten", "prims"}
_LARGE = 2**20  # bytes; a tensor that is larger is made anew each time


@dataclass(slots=True)
class Slot:
    """Stands for a tensor.

    Attributes:
        number: Of one that an operation makes, or -1.
        tensor: One that was there before.
        lasting: Whether that is of this recording alone, and never written to.
    """

    number: int
    tensor: Tensor | None = None
    lasting: bool = False


class Form(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(slots=True)
class Call:
    """One operation.

    Attributes:
        function: What is called.
        args: With tensors as slots.
        kwargs: The same.
        results: Numbers of the tensors that it makes; -1 for what is left out, or one of the arguments.
        direct: What does the same in less time.
    """

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    results: list[int]
    direct: Callable[..., Any]

    def uses(self) -> Iterator[int]:
        """Numbers of the tensors that it is given."""
        return (slot.number for slot in slots_of((self.args, self.kwargs)) if slot.number >= 0)

    def named(self) -> dict[str, Any]:
        """What it is given, or takes by default, by the names of its arguments."""
        arguments = self.function._schema.arguments
        defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        return defaults | {a.name: value for a, value in zip(arguments, self.args, strict=False)} | self.kwargs

    def result(self, name: str) -> Slot:
        """One of the tensors that it makes, or writes to."""
        number = dict(zip((r.name for r in self.function._schema.returns), self.results, strict=False))[name]
        return Slot(number) if number >= 0 else self.named()[name]

    def written(self) -> list[Any]:
        """The arguments that it writes to."""
        return written_by(self.function, self.args, self.kwargs)

    @property
    def name(self) -> str:
        """That of the operation, without its space and overload."""
        name: str = self.function._schema.name
        return name.partition("::")[2]

    @property
    def of_torch(self) -> bool:
        """Whether it is one of torch's own."""
        return is_of_torch(self.function)

    @property
    def makes_several(self) -> bool:
        """Whether it returns a tuple or a list."""
        returns = self.function._schema.returns
        return len(returns) > 1 or "List" in str(returns[0].type if returns else "")

    @property
    def only_checks(self) -> bool:
        """Whether it makes and writes nothing, but may raise."""
        return not self.function._schema.returns and not self.function._schema.is_mutable

    @property
    def pure(self) -> bool:
        """Whether it does nothing but make its results, the same each time; those of others may do more."""
        if self.function._schema.is_mutable or self.name in WRITES_STATISTICS or not self.of_torch or self.only_checks:
            return False
        if self.named().get("check_errors"):  # it may raise
            return False
        return torch.Tag.nondeterministic_seeded not in self.function.tags


def is_of_torch(function: Any) -> bool:
    """Whether an operation is one of torch's own."""
    return function._schema.name.partition("::")[0] in _OF_TORCH


def written_by(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a call of an operation writes to."""
    arguments = function._schema.arguments
    by_name = ((a, kwargs[a.name]) for a in arguments if a.name in kwargs)
    given = (*zip(arguments, args, strict=False), *by_name)
    return [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]


def is_view(function: Any) -> bool:
    """Whether an operation returns one tensor that shows what it is given."""
    returns = function._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def form_of(slot: Slot, forms: Sequence[Form]) -> Form:
    """Shape and dtype of a tensor, among the forms of those that operations make."""
    return forms[slot.number] if slot.tensor is None else Form(slot.tensor.shape, slot.tensor.dtype)


def any_of(numbers: Any) -> bool:
    """Whether a number, or one of several, is not 0."""
    return any(numbers) if isinstance(numbers, (list, tuple)) else bool(numbers)


def slots_of(tree: Any) -> list[Slot]:
    """The tensors in a structure."""
    found: list[Slot] = []
    map_tensors(found.append, tree, Slot)
    return found


def once(calls: list[Call], roots: list[int], written: set[int], wanted: set[int]) -> list[Call]:
    """The calls without those whose results others have already, of the same function of the same tensors."""
    known: dict[Any, list[int]] = {}
    instead: dict[int, int] = {}
    kept = []

    def renamed(slot: Slot) -> Slot:
        return Slot(instead.get(slot.number, slot.number), slot.tensor, slot.lasting)

    def unwritten(slot: Slot) -> bool:
        root = roots[slot.number] if slot.number >= 0 else -1 - memory_of(slot.tensor) if slot.tensor is not None else 0
        return root not in written

    for call in calls:
        call.args, call.kwargs = map_tensors(renamed, (call.args, call.kwargs), Slot)
        slots = slots_of((call.args, call.kwargs))
        made = [number for number in call.results if number >= 0]
        same = call.pure and made and not wanted.intersection(made)
        if same and all(map(unwritten, slots)) and not any(roots[number] in written for number in made):
            key = call.function, _frozen(call.args), _frozen(call.kwargs)
            if key in known:
                instead |= dict(zip(call.results, known[key], strict=True))
                continue
            known[key] = call.results
        kept.append(call)
    return kept


def _frozen(value: Any) -> Any:
    """Something hashable that tells arguments apart."""
    if isinstance(value, Slot):
        return ("slot", value.number) if value.number >= 0 else ("tensor", id(value.tensor))
    if isinstance(value, (tuple, list)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(one)) for key, one in value.items())
    return type(value), repr(value)


def needed(calls: list[Call], needed: set[int]) -> list[Call]:
    """The calls without those whose results nobody uses, and that do nothing else."""
    kept = []
    for call in reversed(calls):
        if not call.pure or needed.intersection(call.results):
            needed.update(call.uses())
            kept.append(call)
    return kept[::-1]


def folded(calls: list[Call], roots: list[int], written: set[int], wanted: set[int]) -> list[Call]:
    """The calls without those that make small tensors of numbers alone, as by arange, which are made here for good."""
    known: dict[int, Tensor] = {}
    kept = []
    given_away = written | {roots[number] for number in wanted}

    def value(slot: Slot) -> Tensor:
        return known[slot.number]

    def made(slot: Slot) -> Slot:
        return Slot(-1, known[slot.number], lasting=True) if slot.number in known else slot

    for call in calls:
        numbers = [number for number in call.results if number >= 0]
        lasting = not any(roots[number] in given_away for number in numbers)
        named = all(slot.number in known for slot in slots_of((call.args, call.kwargs)))
        if call.pure and lasting and named:
            args, kwargs = map_tensors(value, (call.args, call.kwargs), Slot)
            found = call.function(*args, **kwargs)
            results = found if isinstance(found, (tuple, list)) else [found]
            if all(t.numel() * t.element_size() <= _LARGE for t in results):
                known |= {number: t for number, t in zip(call.results, results, strict=True) if number >= 0}
                continue
        call.args, call.kwargs = map_tensors(made, (call.args, call.kwargs), Slot)
        kept.append(call)
    return kept


@dataclass(frozen=True)
class Pause:
    """Where a computation stops until the rest of its inputs is given.

    Attributes:
        place: How many calls come before.
        shown: Numbers of the tensors that are handed out there.
        given: Numbers of the inputs that are given there.
    """

    place: int
    shown: Sequence[int]
    given: Sequence[int]


def code_of(calls: list[Call], inputs: int, wanted: list[int], pause: Pause | None = None) -> Callable[..., Any]:
    """The calls as the code of one function.

    Args:
        calls: The operations.
        inputs: How many tensors are given, which have the first numbers.
        wanted: Numbers of the tensors that are returned.
        pause: Where to wait for some of the inputs.

    Returns:
        The function; with a pause a generator: it yields a list of what is shown, to be emptied, and is sent the rest.
    """
    kept, later = set(wanted), () if pause is None else pause.given
    last: dict[int, int] = {}
    for place, call in enumerate(calls):
        last |= dict.fromkeys([*call.uses(), *(number for number in call.results if number >= 0)], place)
    # What nobody needs after it is not held there: it would hold itself, as what is handed out holds what is to come.
    over = [] if pause is None else [slot for slot in pause.shown if last.get(slot, 0) < pause.place]
    last = {slot: place for slot, place in last.items() if slot not in over}
    gone: dict[int, list[int]] = {}
    for slot, place in last.items():
        if slot not in kept:
            gone.setdefault(place, []).append(slot)
    names: dict[str, Any] = {}
    lines = [f"def replay({', '.join(f't{slot}' for slot in range(inputs) if slot not in later)}):"]
    for place, call in enumerate(calls):
        if pause is not None and place == pause.place:
            lines.append(f"    shown = [{', '.join(f't{slot}' for slot in pause.shown)}]")
            lines += [f"    del t{slot}" for slot in dict.fromkeys(over)]
            lines.append(f"    {''.join(f't{slot}, ' for slot in later)}= yield shown")
        names[f"f{place}"] = call.direct
        given = [_source(a, names) for a in call.args] + [f"{k}={_source(v, names)}" for k, v in call.kwargs.items()]
        lines.append(f"    {_target(call)}f{place}({', '.join(given)})")
        if place in gone:
            lines.append(f"    del {', '.join(f't{slot}' for slot in gone[place])}")
    lines.append(f"    return ({''.join(f't{slot}, ' for slot in wanted)})")
    exec(compile("\n".join(lines), "<recorded step>", "exec"), names)  # of names and numbers made here
    return names["replay"]


def _target(call: Call) -> str:
    """What the results are assigned to."""
    if call.makes_several:
        return "".join(f"t{number}, " if number >= 0 else "_, " for number in call.results) + "= "
    return f"t{call.results[0]} = " if call.results and call.results[0] >= 0 else ""


def _source(value: Any, names: dict[str, Any]) -> str:
    """An argument as code; what is neither a number nor a tensor made here gets a name."""
    if isinstance(value, Slot) and value.number >= 0:
        return f"t{value.number}"
    if type(value) in (list, tuple):
        inner = "".join(f"{_source(one, names)}, " for one in value)
        return f"[{inner}]" if type(value) is list else f"({inner})"
    if type(value) in (int, bool, type(None)):
        return repr(value)
    name = f"c{len(names)}"
    names[name] = value.tensor if isinstance(value, Slot) else value
    return name
