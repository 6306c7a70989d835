"""Variables around functions, of modules, of functions that they were made in, of classes, which may be bound anew."""

from __future__ import annotations

import dis
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from functools import cache, partial
from numbers import Number
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._private import gradient_hooks, hooks_after_gradient
from .extension import Extension

_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME"}
_STORED = {"STORE_GLOBAL", "STORE_NAME", "STORE_DEREF"}
_MOST, _BYTES, _DEPTH = 64, 1 << 16, 3  # entries, bytes of an array, and objects inside of objects that are looked at
_PLAIN = (str, bytes, type(None), Number, Tensor)
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial)


class Entries(list):
    """Those of a mapping, or the attributes of an object: names, and what they hold."""


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


def variables_of(function: FunctionType, code: CodeType) -> Iterator[Variable]:
    """The variables around a function of the user's that it reads, and does not bind itself, if they may change."""
    module = str(function.__globals__.get("__name__"))  # of a decorator, what it decorates has another
    if _is_ours(module):
        return
    read, bound = set[str](), set[str]()
    inside = [code]
    for one in inside:
        steps = list(dis.get_instructions(one))
        read |= {step.argval for step in steps if step.opname in _GLOBALS}
        bound |= {step.argval for step in steps if step.opname in _STORED}
        inside += [part for part in one.co_consts if isinstance(part, CodeType)]
    space = function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    found = [Variable(f"module `{module}`", name, space) for name in sorted(read - bound) if name in space]
    around = f"the variables around `{function.__qualname__}`"
    found += [Variable(around, name, cell) for name, cell in cells if name not in bound and name != "__class__"]
    own, given = is_of_users(module), _given_to(function, code)
    found += [Variable(around, name, given) for name in given]
    yield from (one for one in found if (_may_change(one) if own else not _is_code(one.value)))


def _given_to(function: FunctionType, code: CodeType) -> dict[str, Any]:
    """The arguments of a function that it has by default."""
    names, own = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
    given = dict(zip(names[::-1], own[::-1], strict=False)) | (function.__kwdefaults__ or {})
    return {name: one for name, one in given.items() if not isinstance(one, _PLAIN)}  # which cannot be bound anew


def variables_of_partial(function: partial) -> Iterator[Variable]:
    """The arguments that a function has been given beforehand."""
    given: dict[str, Any] = {str(place): one for place, one in enumerate(function.args)} | function.keywords
    names = (name for name, one in given.items() if not isinstance(one, _PLAIN))
    yield from (Variable("the arguments of a partial", name, given) for name in names)


def _may_change(one: Variable) -> bool:
    """Whether a variable of the user's is more than the name of a function, class or module that it was made with."""
    value = one.value
    if isinstance(value, type):
        return is_of_users(value.__module__)
    if isinstance(value, ModuleType):
        return is_of_users(value.__name__)
    return not isinstance(value, (Extension, *_FUNCTIONS)) or getattr(value, "__name__", "") != one.name


def variables_of_class(kind: type, names: AbstractSet[Any]) -> Iterator[Variable]:
    """The variables of a class of the user's, and of those that it comes from, with one of these names."""
    for one in kind.__mro__:
        if not _is_ours(one.__module__):
            every = _named(f"class `{one.__name__}`", vars(one), names)
            yield from (one for one in every if not _is_code(one.value))


def variables_of_object(owner: Any, names: AbstractSet[Any]) -> Iterator[Variable]:
    """The attributes with one of these names of an object of the user's, a method of which is called."""
    kind = type(owner)
    if not isinstance(owner, (nn.Module, Extension, ModuleType, type)) and not _is_ours(kind.__module__):
        yield from _named(kind.__name__, getattr(owner, "__dict__", {}), names)


def _named(where: str, space: Mapping[str, Any], names: AbstractSet[Any]) -> Iterator[Variable]:
    own = sorted(name for name in names & space.keys() if not name.startswith("__"))
    yield from (Variable(where, name, space) for name in own)


def shown_by(value: Any, names: AbstractSet[Any], depth: int = _DEPTH) -> Any:
    """Something that is equal as long as a variable is, as far as functions read it that know these names."""
    if isinstance(value, (str, bytes, type(None))):
        return value
    if isinstance(value, Number):
        return repr(value)  # a NaN is what it was
    if isinstance(value, Tensor):
        return identity(value)
    if depth == 0 or isinstance(value, (nn.Module, Extension, *_FUNCTIONS)):
        return id(value)
    if isinstance(value, (set, frozenset)) and len(value) <= _MOST:
        return id(value), sorted(map(repr, value))
    if hasattr(type(value), "__array_interface__"):
        return id(value), value.tobytes() if value.nbytes <= _BYTES else b""
    inside = [(key, shown_by(one, names, depth - 1)) for key, one in held_by(value, names)]
    of_values = isinstance(value, (tuple, list))  # which may be bound anew to equal ones
    return type(value) if of_values else id(value), Entries(inside)


def holds_something(value: Any, names: AbstractSet[Any]) -> bool:
    """Whether a variable has to be looked at: not a class or module of functions alone, say."""
    return not isinstance(value, (type, ModuleType)) or any(not _is_code(one) for _, one in held_by(value, names))


def held_by(value: Any, names: AbstractSet[Any]) -> list[tuple[Any, Any]]:
    """What a value holds, by keys or names, as far as functions read it that know these names."""
    if isinstance(value, Mapping):
        if len(value) > _MOST and isinstance(value, dict):
            return [(key, value[key]) for key in names if key in value and _is_read(key, value[key], names)]
        plain = (Number, str) if names & {"items", "values"} else ()
        return [(key, one) for key, one in value.items() if _is_read(key, one, names) or isinstance(one, plain)]
    if isinstance(value, (tuple, list, deque)):
        return list(enumerate(value)) if len(value) <= _MOST else [(len(value), None)]
    if isinstance(value, type):
        spaces: list[Any] = [vars(one) for one in value.__mro__ if is_of_users(one.__module__)]
    elif isinstance(value, ModuleType):
        spaces = [vars(value)] if is_of_users(value.__name__) else []
    else:
        spaces = [getattr(value, "__dict__", None) or {}, _slots_of(value)]
    pairs = [(name, space[name]) for space in spaces for name in space if name in names and not name.startswith("__")]
    return [(name, one) for name, one in pairs if not isinstance(one, (property, classmethod, staticmethod))]


def reached_from(value: Any, names: AbstractSet[Any], depth: int = _DEPTH) -> Iterator[Any]:
    """A value, and what it holds, in turn, but for numbers, texts and tensors."""
    if isinstance(value, _PLAIN):
        return
    yield value
    if depth == 0 or isinstance(value, (Extension, *_FUNCTIONS)):
        return
    parts = parts_of(value, names) if isinstance(value, nn.Module) else []
    for _, one in held_by(value, names) + parts:
        yield from reached_from(one, names, depth - 1)


def parts_of(module: nn.Module, names: AbstractSet[Any]) -> list[tuple[str, nn.Module]]:
    """The modules inside of one that functions call which know these names."""
    return [(name, m) for name, m in module.named_children() if name in names or name.isdigit()]


def _is_read(key: Any, one: Any, names: AbstractSet[Any]) -> bool:
    """Whether an entry of a mapping may be read; what lies there by a number, and is none, may be that of a cache."""
    if isinstance(key, Enum):
        return key in names or key.name in names
    return key in names and (isinstance(key, str) or isinstance(one, (Number, str)))


def _slots_of(value: Any) -> dict[str, Any]:
    names = (name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ()))
    return {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}


def identity(t: Tensor) -> tuple[Any, ...]:
    """What of a tensor is the same as long as it lies where it was, whatever its values."""
    place = t.data_ptr() if t.layout is torch.strided else 0
    hooked = bool(gradient_hooks(t)) or bool(hooks_after_gradient(t))
    return id(t), place, t.requires_grad, t.shape, t.stride() if place else (), hooked


def _is_ours(module: str) -> bool:
    """Whether a module is one of torch or of this library, in which nothing is bound anew."""
    return module.partition(".")[0] in ("torch", "perexample")


@cache
def is_of_users(module: str) -> bool:
    """Whether a module is the user's own, and not one of Python or of a package that was installed."""
    first, path = module.partition(".")[0], getattr(sys.modules.get(module), "__file__", None) or ""
    installed = any(part in path for part in ("site-packages", "dist-packages"))
    return not (installed or _is_ours(module) or first in sys.stdlib_module_names)


def _is_code(value: Any) -> bool:
    """Whether it is something to be called, or looked at elsewhere."""
    return callable(value) or isinstance(value, (nn.Module, Extension, ModuleType, property, classmethod))
