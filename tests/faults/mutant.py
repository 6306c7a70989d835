"""Faults that are put into the library on purpose, as changes of single functions and values.

A change names what it is made to by its exact path, and a piece of its text that must be there once; if either is gone,
`apply` fails, so that a fault cannot quietly become none; and if it uses a name that is not known there, which any test
would notice. Code is changed in the function object itself, so that every name under which the function was imported
sees the change.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import dis
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Protocol

import pytest


class FaultError(Exception):
    """A fault that cannot be put in: what it changes is no longer there."""


class Change(Protocol):
    """One change of the library."""

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it, until ``monkeypatch`` is undone."""


def found(path: str) -> tuple[Any, str, Any]:
    """What a path ``module:Class.attribute`` names: its owner, its name there, and itself."""
    module, _, names = path.partition(":")
    owner: Any = None
    value: Any = importlib.import_module(module)
    for name in names.split("."):
        owner = value
        if name not in vars(owner):
            raise FaultError(f"{path}: there is no `{name}` any more.")
        value = vars(owner)[name]
    return owner, name, value


def function(path: str) -> FunctionType:
    """The plain function at a path: behind a property, a class method or a context manager, too."""
    value = found(path)[2]
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    value = inspect.unwrap(value)
    if not isinstance(value, FunctionType):
        raise FaultError(f"{path}: is {value!r}, no function.")
    return value


_FILES: dict[str, list[str]] = {}


def remember() -> None:
    """Read the library's files now, so that what is done to them later cannot be mixed up with what was imported."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] == "perexample" and file is not None:
            _FILES[file] = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)


def source_of(target: FunctionType) -> str:
    """Source of a function, with its decorators."""
    file = target.__code__.co_filename
    if file not in _FILES:
        remember()
    return textwrap.dedent("".join(inspect.getblock(_FILES[file][target.__code__.co_firstlineno - 1 :])))


class Edit:
    """Other text in a function.

    Args:
        path: ``module:function`` or ``module:Class.method``.
        changes: Pairs of text that occurs once in the source, and what takes its place.
    """

    def __init__(self, path: str, *changes: tuple[str, str]) -> None:
        self.path, self.changes = path, changes

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give the function other code."""
        target = function(self.path)
        source = source_of(target)
        for old, new in self.changes:
            if source.count(old) != 1:
                raise FaultError(f"{self.path}: {old!r} occurs {source.count(old)} times, not once.")
            source = source.replace(old, new)
        monkeypatch.setattr(target, "__code__", _compiled(source, target))


class Body(Edit):
    """Another body of a function.

    Args:
        path: As for `Edit`.
        body: Statements; the arguments have their names.
    """

    def __init__(self, path: str, body: str) -> None:
        super().__init__(path)
        self.body = textwrap.dedent(body)

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give the function other code."""
        target = function(self.path)
        monkeypatch.setattr(target, "__code__", _compiled(source_of(target), target, self.body))


class Put:
    """Another value in a place, and in all modules of the library that have imported it by its name.

    Args:
        path: ``module:name`` or ``module:Class.name``.
        make: Gives the new value from the old one.
    """

    def __init__(self, path: str, make: Callable[[Any], Any]) -> None:
        self.path, self.make = path, make

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the value in."""
        owner, name, old = found(self.path)
        new = self.make(old)
        monkeypatch.setattr(owner, name, new)
        for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == "perexample"]:
            if vars(module).get(name) is old:
                monkeypatch.setattr(module, name, new)


def _compiled(source: str, target: FunctionType, body: str | None = None) -> CodeType:
    """Code for a function with the names that it takes from outside, such as that of its class for ``super()``."""
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    if body is not None:
        definition.body = ast.parse(body).body
    outer = ast.parse(f"def outer({', '.join(target.__code__.co_freevars)}): return {definition.name}").body[0]
    assert isinstance(outer, ast.FunctionDef)
    ast.increment_lineno(definition, target.__code__.co_firstlineno - 1)
    outer.body.insert(0, definition)
    tree = ast.fix_missing_locations(ast.Module([outer], []))
    flags = __future__.annotations.compiler_flag
    made: dict[str, Any] = {}
    exec(compile(tree, f"{target.__code__.co_filename} with a fault", "exec", flags, dont_inherit=True), made)
    code = made["outer"](*[None] * len(target.__code__.co_freevars)).__code__
    unknown = _globals_of(code) - target.__globals__.keys() - vars(builtins).keys()
    if unknown:
        raise FaultError(f"{target.__module__}:{target.__qualname__}: the fault uses {sorted(unknown)}, unknown there.")
    return code


def _globals_of(code: CodeType) -> set[str]:
    """The names that code takes from its module, and the functions in it."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return own.union(*map(_globals_of, inner))


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that must fail because of it.

    Attributes:
        id: The entry of the list of faults, and a name.
        description: What goes wrong.
        changes: What is changed in the library.
        killers: Tests, as ``file::test`` or ``file::test[case]`` below the folder ``tests``; at least one must fail.
        slow: Whether it is left to the nightly set though it is the first of its entry.
    """

    id: str
    description: str
    changes: tuple[Change, ...]
    killers: tuple[str, ...]

    @property
    def entry(self) -> str:
        """``F1`` to ``F50``."""
        return self.id.partition("-")[0]

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the fault in.

        Raises:
            FaultError: If what it changes is not there any more.
        """
        for change in self.changes:
            change.apply(monkeypatch)


def mutant(id: str, description: str, *changes: Change, killers: tuple[str, ...] | list[str] | str) -> Mutant:  # noqa: A002
    """A fault from its changes; a single killer may be given as it is."""
    return Mutant(id, description, changes, (killers,) if isinstance(killers, str) else tuple(killers))
