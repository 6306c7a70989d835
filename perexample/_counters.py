"""Numbers that a forward itself moves on, such as a count of its calls, and compares, to do something else one day."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CellType
from typing import Any, NamedTuple

from torch import nn

from .errors import ConfigurationError

_KINDS, _MOST = (int, float), 4096  # entries of a mapping or list that are looked at
_COMPARED = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__")
_COMPUTED = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__floordiv__", "__truediv__",
    "__neg__",
)  # fmt: skip


class _Variable(NamedTuple):
    """One that holds a number.

    Attributes:
        where: In what it is, for messages.
        name: What it is called there, or its index.
        space: A mapping, list or class, or the cell of a variable around a function.
    """

    where: str
    name: Any
    space: Any

    @property
    def value(self) -> Any:
        """What it is now; ``None`` if it is gone."""
        try:
            if isinstance(self.space, CellType):
                return self.space.cell_contents
            return (vars(self.space) if isinstance(self.space, type) else self.space)[self.name]
        except (LookupError, ValueError):
            return None

    def bind(self, value: Any) -> None:
        """Let it be another."""
        if isinstance(self.space, CellType):
            self.space.cell_contents = value
        elif isinstance(self.space, type):
            setattr(self.space, self.name, value)
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
                if isinstance(one.value, (int, float)) and type(one.value) not in (*_KINDS, bool):
                    one.bind(one.value.__pos__())  # a plain number again
        if noted:
            raise ConfigurationError(
                f"This step cannot be recorded: it moves on `{noted[0].name}` of {noted[0].where} and compares it, as "
                f"to do something else after some calls, and a replay would not know of it. Let the training loop "
                f"count (what it sets in the model is looked at before each replay), or run it as usual."
            )


def _numbers(model: nn.Module, losses: Callable) -> Iterator[_Variable]:
    """All that hold one now, each once."""
    spaces: dict[int, tuple[str, Any]] = {}
    for where, space in _spaces(model, losses):
        spaces.setdefault(id(space), (where, space))
    for where, space in spaces.values():
        names = range(len(space)) if isinstance(space, list) else vars(space) if isinstance(space, type) else space
        variables = (_Variable(where, name, space) for name in [*names][:_MOST])
        yield from (one for one in variables if type(one.value) in _KINDS)
    for function in _functions(model, losses):
        where = f"the variables around `{function.__qualname__}`"
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if type((one := _Variable(where, name, cell)).value) in _KINDS:
                yield one


def _spaces(model: nn.Module, losses: Callable) -> Iterator[tuple[str, Any]]:
    """Where variables are, and what that is."""
    others = (one for one in (losses, getattr(losses, "__self__", None)) if _is_of_the_user(type(one)))
    for owner in (*model.modules(), *others):
        where, own = type(owner).__name__, getattr(owner, "__dict__", {})
        yield where, own
        for value in own.values():
            held = value if isinstance(value, (dict, list)) else getattr(value, "__dict__", None)
            if isinstance(held, (dict, list)):
                yield where, held
        yield from ((f"class `{kind.__name__}`", kind) for kind in type(owner).__mro__ if _is_of_the_user(kind))
    for function in _functions(model, losses):
        yield f"module `{function.__module__}`", function.__globals__


def _functions(model: nn.Module, losses: Callable) -> Iterator[Any]:
    """What is run, as far as it was written by the user."""
    forwards = {type(module).forward for module in model.modules()}
    for one in (losses, inspect.getattr_static(type(losses), "__call__", None), *forwards):
        function = inspect.unwrap(getattr(one, "__func__", one))
        if inspect.isfunction(function) and _is_of_the_user(function):
            yield function


def _is_of_the_user(one: Any) -> bool:
    """Whether a class or function was not written here, in torch, or in Python itself."""
    return str(one.__module__).partition(".")[0] not in ("torch", "perexample", "builtins")


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
            return _noting(type(value), note)(value) if type(value) in _KINDS else value

        return method

    def plain(self: Any, _: Any) -> Any:
        """How one that a step has kept in a list, say, is copied and saved."""
        return kind, (+self,)

    methods = {name: compared(name) for name in _COMPARED} | {name: computed(name) for name in _COMPUTED}
    return type(kind.__name__, (kind,), {**methods, "__hash__": kind.__hash__, "__reduce_ex__": plain, "__slots__": ()})


__all__ = ["Counters"]
