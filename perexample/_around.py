"""Variables around functions, of modules, of functions that they were made in, of classes, which may be bound anew."""

from __future__ import annotations

import dis
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from numbers import Number
from types import CellType, CodeType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._private import gradient_hooks, hooks_after_gradient
from .extension import Extension

_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME"}
_STORED = {"STORE_GLOBAL", "STORE_NAME", "STORE_DEREF"}
_MOST, _DEPTH = 64, 3  # entries of a list, and objects inside of objects, that are looked at


class Variable(NamedTuple):
    """One of them.

    Attributes:
        where: Around what it is, for messages.
        name: What it is called.
        space: Where it is: the variables of a module or class, or a cell.
    """

    where: str
    name: str
    space: Mapping[str, Any] | CellType

    @property
    def value(self) -> Any:
        """What it is bound to now; ``None`` if to nothing."""
        if isinstance(self.space, Mapping):
            return self.space.get(self.name)
        try:
            return self.space.cell_contents
        except ValueError:
            return None


def variables_of(function: Any, code: CodeType) -> Iterator[Variable]:
    """The variables around a function of the user's that it reads, and does not bind itself, if they hold data."""
    module = str(getattr(function, "__module__", "torch"))
    if _is_of_others(module):
        return
    read, bound = set[str](), set[str]()
    inside = [code]
    for one in inside:
        steps = list(dis.get_instructions(one))
        read |= {step.argval for step in steps if step.opname in _GLOBALS}
        bound |= {step.argval for step in steps if step.opname in _STORED}
        inside += [part for part in one.co_consts if isinstance(part, CodeType)]
    space = getattr(function, "__globals__", {})
    cells = zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False)
    found = [Variable(f"module `{module}`", name, space) for name in sorted(read - bound) if name in space]
    around = f"the variables around `{getattr(function, '__qualname__', code.co_name)}`"
    found += [Variable(around, name, cell) for name, cell in cells if name not in bound]
    yield from (one for one in found if not _is_code(one.value))


def variables_of_class(kind: type, names: AbstractSet[str]) -> Iterator[Variable]:
    """The variables of a class of the user's, and of those that it comes from, with one of these names."""
    for one in kind.__mro__:
        if not _is_of_others(one.__module__):
            yield from _named(f"class `{one.__name__}`", vars(one), names)


def variables_of_object(owner: Any, names: AbstractSet[str]) -> Iterator[Variable]:
    """The attributes with one of these names of an object of the user's, a method of which is called."""
    kind = type(owner)
    if not isinstance(owner, (nn.Module, Extension, ModuleType, type)) and not _is_of_others(kind.__module__):
        yield from _named(kind.__name__, getattr(owner, "__dict__", {}), names)


def _named(where: str, space: Mapping[str, Any], names: AbstractSet[str]) -> Iterator[Variable]:
    own = sorted(name for name in names & space.keys() if not name.startswith("__"))
    yield from (Variable(where, name, space) for name in own if not _is_code(space[name]))


def shown_by(value: Any, names: Collection[str], depth: int = _DEPTH) -> Any:
    """Something that is equal as long as a variable is, as far as functions read it that know these names."""
    if isinstance(value, (str, bytes, type(None))):
        return value
    if isinstance(value, Number):
        return repr(value)  # a NaN is what it was
    if isinstance(value, Tensor):
        return identity(value)
    if depth == 0 or _is_code(value):
        return id(value)
    if isinstance(value, Mapping):
        own = [key for key in value if isinstance(key, str) and key in names]  # others may be those of caches
        return id(value), [(key, shown_by(value[key], names, depth - 1)) for key in own]
    if isinstance(value, (tuple, list)):
        return type(value), len(value) > _MOST or [shown_by(one, names, depth - 1) for one in value]
    held = getattr(value, "__dict__", None) or {}
    return id(value), [(name, shown_by(one, names, depth - 1)) for name, one in held.items() if name in names]


def identity(t: Tensor) -> tuple[Any, ...]:
    """What of a tensor is the same as long as it lies where it was, whatever its values."""
    place = t.data_ptr() if t.layout is torch.strided else 0
    hooked = bool(gradient_hooks(t)) or bool(hooks_after_gradient(t))
    return id(t), place, t.requires_grad, t.shape, t.stride() if place else (), hooked


def _is_of_others(module: str) -> bool:
    """Whether a module is one of torch or of this library, in which nothing is bound anew."""
    return module.partition(".")[0] in ("torch", "perexample")


def _is_code(value: Any) -> bool:
    """Whether it is something to be called, or looked at elsewhere."""
    return callable(value) or isinstance(value, (nn.Module, Extension, ModuleType, property, classmethod))
