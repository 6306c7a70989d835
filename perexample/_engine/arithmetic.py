"""Where the results of common operations hold the rows, by arithmetic on shapes, where that needs no trial."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..place import Place, broadcast, reshaped
from .kinds import Kind, Traits


def simple_place(
    traits: Traits, args: tuple, kwargs: dict, tracked: list[tuple[Tensor, Any]], out: Tensor
) -> Place | None:
    """The place of an operation's only result, where that needs no trial."""
    if traits.name in _BESIDE:
        return _beside(args, kwargs, tracked, out)
    kind = traits.kind
    x, place = tracked[0]
    if kind is Kind.POINTWISE:
        if len(tracked) == 1 and x.shape == out.shape:
            return place
        return broadcast([(known, t.shape) for t, known in tracked], out.shape)
    if not args or x is not args[0]:
        return None
    if kind is Kind.SAME:
        return place if x.shape == out.shape else None
    if kind is Kind.RESHAPE:
        return reshaped(place, x.shape, out.shape) if out.numel() == x.numel() else None
    if kind is Kind.PERMUTE:
        return place.at(_permuted_axis(traits.name, args, kwargs, place.axis))
    if kind is Kind.EXPAND:
        axis = place.axis + out.dim() - x.dim()
        return place.at(axis) if out.shape[axis] == place.size else None
    return None


_BESIDE = ("cat", "concat", "concatenate")


def _beside(args: tuple, kwargs: dict, tracked: list[tuple[Tensor, Any]], out: Tensor) -> Place | None:
    """Tensors that hold the same rows on the same axis, put beside each other along another one."""
    first = tracked[0][1]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    alike = all(place.axis == first.axis and place.agrees(first) for _, place in tracked)
    if not alike or not isinstance(dim, int) or dim % out.dim() == first.axis:
        return None
    return first if all(t.dim() == out.dim() for t, _ in tracked) else None


def _permuted_axis(name: str, args: tuple, kwargs: dict, axis: int) -> int:
    """Where an axis of the first argument goes when axes change places."""
    t, rest = args[0], args[1:]
    if name == "permute":
        order = kwargs.get("dims") or (rest[0] if isinstance(rest[0], (tuple, list)) else rest)
        return [a % t.dim() for a in order].index(axis)
    if name in (".mT", "adjoint"):
        pair: Any = (-2, -1)
    elif name in ("t", ".T"):
        return t.dim() - 1 - axis if name == ".T" or t.dim() == 2 else axis
    else:
        names = (("dim0", "axis0"), ("dim1", "axis1"))
        pair = [rest[i] if i < len(rest) else next(kwargs[n] for n in names[i] if n in kwargs) for i in (0, 1)]
    first, second = (a % t.dim() for a in pair)
    return {first: second, second: first}.get(axis, axis)
