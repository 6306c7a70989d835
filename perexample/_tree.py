"""Tensors inside the nested arguments of a module: tuples, lists, mappings (BatchEncoding too), dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

PLAIN = {int, float, bool, str, type(None)}


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a nested structure, in order."""
    return iter(tensors_of(tree))


def tensors_of(tree: Any) -> list[Tensor]:
    """The same as a list."""
    if type(tree) is Tensor:
        return [tree]
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    """Add the tensors of a structure; what comes in every call of every module is asked for first."""
    kind = type(tree)
    if kind is tuple or kind is list:
        for value in tree:
            if type(value) is Tensor:
                found.append(value)
            else:
                _collect(value, found)
    elif kind in PLAIN:
        return
    elif isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            _collect(value, found)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            _collect(value, found)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            _collect(getattr(tree, field.name), found)


def leaves(tree: Any) -> Iterator[Any]:
    """Everything that a nested structure holds but ``None``, in order."""
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    if isinstance(tree, (tuple, list)):
        for one in tree:
            yield from leaves(one)
    elif tree is not None:
        yield tree


def map_tensors(function: Callable[[Any], Any], tree: Any, kind: type = Tensor) -> Any:
    """Rebuild a nested structure with every tensor (or other ``kind`` of leaf) replaced by ``function(leaf)``."""
    if type(tree) is dict:
        return {key: map_tensors(function, value, kind) for key, value in tree.items()}
    if isinstance(tree, kind):
        return function(tree)
    if type(tree) in PLAIN:
        return tree
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value, kind) for key, value in tree.items()}
        if isinstance(tree, defaultdict):
            return type(tree)(tree.default_factory, mapped)
        return type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value, kind) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(function, value, kind) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = copy.copy(tree)  # as it is now, whatever its constructor takes
        for field in dataclasses.fields(tree):
            object.__setattr__(changed, field.name, map_tensors(function, getattr(tree, field.name), kind))
        return changed
    return tree
