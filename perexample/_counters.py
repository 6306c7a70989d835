"""Numbers that a forward itself moves on, such as a count of its calls, and compares, to do something else one day."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from types import CellType
from typing import Any, NamedTuple

from torch import nn

from .errors import ConfigurationError

_COMPARED = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__")
_COMPUTED = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__floordiv__", "__truediv__",
    "__neg__",
)  # fmt: skip


class _Variable(NamedTuple):
    """One that holds a number.

    Attributes:
        where: In what it is, for messages.
        name: What it is called.
        space: A mapping, or the cell of a variable around a function.
    """

    where: str
    name: Any
    space: MutableMapping[Any, Any] | CellType

    @property
    def value(self) -> Any:
        return self.space.cell_contents if isinstance(self.space, CellType) else self.space.get(self.name)

    def bind(self, value: Any) -> None:
        if isinstance(self.space, CellType):
            self.space.cell_contents = value
        else:
            self.space[self.name] = value


class Counters:
    """The numbers that a step may move: attributes of modules, entries of what these hold, variables around functions.

    A recorded step does not move them. That is nothing to a step that only counts, and wrong for one that goes another
    way from some call on.
    """

    def __init__(self, model: nn.Module, losses: Callable) -> None:
        """Note what they are.

        Args:
            model: The model.
            losses: The function of the step.
        """
        self._before = [(one, one.value) for one in _numbers(model, losses)]

    def refuse_compared(self, run: Callable[[], Any]) -> None:
        """Take the step once more, if it has moved some, with numbers in their place that note what is done with them.

        Args:
            run: Takes it.

        Raises:
            ConfigurationError: If one is compared with another number.
        """
        moved = [one for one, value in self._before if type(one.value) is type(value) and one.value != value]
        if not moved:
            return
        noted: list[_Variable] = []
        for one in moved:
            one.bind(_noting(type(one.value), lambda one=one: noted.append(one))(one.value))  # type: ignore[misc]
        try:
            run()
        finally:
            for one in moved:
                if isinstance(one.value, (int, float)) and type(one.value) not in (int, float, bool):
                    one.bind(one.value.__pos__())  # a plain number again
        if noted:
            raise ConfigurationError(
                f"This step cannot be recorded: it moves on `{noted[0].name}` of {noted[0].where} and compares it, as "
                f"to do something else after some calls, and a replay would not know of it. Let the training loop "
                f"count (what it sets in the model is looked at before each replay), or run it as usual."
            )


def _numbers(model: nn.Module, losses: Callable) -> Iterator[_Variable]:
    """All that hold one now, each once."""
    spaces: dict[int, tuple[str, dict]] = {}
    cells: dict[int, _Variable] = {}
    for module in model.modules():
        own = vars(module)
        held = [value if type(value) is dict else getattr(value, "__dict__", None) for value in own.values()]
        for space in (own, *(one for one in held if isinstance(one, dict))):
            spaces.setdefault(id(space), (type(module).__name__, space))
    for function in map(inspect.unwrap, (losses, *{type(module).forward for module in model.modules()})):
        code, module_name = getattr(function, "__code__", None), getattr(function, "__module__", None) or "torch"
        if code is None or module_name.partition(".")[0] in ("torch", "perexample"):
            continue
        space = getattr(function, "__globals__", {})
        spaces.setdefault(id(space), (f"module `{module_name}`", space))
        where = f"the variables around `{function.__qualname__}`"
        for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False):
            cells[id(cell)] = _Variable(where, name, cell)
    found = [_Variable(where, name, space) for where, space in spaces.values() for name in [*space]]
    yield from filter(_is_number, [*found, *cells.values()])


def _is_number(one: _Variable) -> bool:
    try:
        return type(one.value) in (int, float)
    except ValueError:  # a variable that is bound to nothing
        return False


def _noting(kind: type, note: Callable[[], None]) -> type:
    """A kind of number that calls a function where it, or what is computed from it, is compared."""

    def compared(name: str) -> Callable:
        def method(self: Any, *others: Any) -> Any:
            note()
            return getattr(kind, name)(self, *others)

        return method

    def computed(name: str) -> Callable:
        def method(self: Any, *others: Any) -> Any:
            value = getattr(kind, name)(self, *others)
            return _noting(type(value), note)(value) if type(value) in (int, float) else value

        return method

    methods = {name: compared(name) for name in _COMPARED} | {name: computed(name) for name in _COMPUTED}
    return type(kind.__name__, (kind,), {**methods, "__hash__": kind.__hash__, "__slots__": ()})


__all__ = ["Counters"]
