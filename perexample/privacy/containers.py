"""What batches and examples are made of: tensors and arrays, in containers of all kinds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def parts_of(value: Any) -> dict[str, Any] | None:
    """What a container holds, by how it is reached; None for anything else."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": child for key, child in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {f".{name}": child for name, child in zip(value._fields, value, strict=True)}
    if isinstance(value, (list, tuple)):
        return {f"[{i}]": child for i, child in enumerate(value)}
    return None


def with_parts(value: Any, parts: list[Any]) -> Any:
    """A container of the same kind that holds others."""
    if isinstance(value, Mapping):
        return _mapping(value, dict(zip(value, parts, strict=True)))
    if dataclasses.is_dataclass(value):
        result = copy.copy(value)
        for field, part in zip(dataclasses.fields(value), parts, strict=True):
            object.__setattr__(result, field.name, part)  # of frozen ones, too
        return result
    if hasattr(value, "_fields"):
        return type(value)(*parts)
    return type(value)(parts)


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:  # made of something else, as defaultdict is
        result: Any = copy.copy(value)
        result.update(items)
        return result


def is_array(value: Any) -> bool:
    """Whether it is a tensor or a numpy array, or behaves like one."""
    return isinstance(value, Tensor) or all(hasattr(value, name) for name in ("shape", "dtype", "__array__"))


def plain(array: Any) -> Any:
    """A copy that holds on to nothing else."""
    return array.detach().clone() if isinstance(array, Tensor) else copy.deepcopy(array)


def fresh(value: Any) -> Any:
    """A copy that shares no container and no array."""
    if is_array(value):
        return plain(value)
    parts = parts_of(value)
    return value if parts is None else with_parts(value, [fresh(child) for child in parts.values()])
