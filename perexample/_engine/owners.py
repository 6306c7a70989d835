"""Operations that only move entries: run once more on the numbers of the examples that the entries belong to.

This is exact whatever indices, masks or orders the operation was given, and whether or not they depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._looks import blind, found_out, holds, looking
from .._tree import map_tensors, tensors_in
from ..place import Lost, Place, Space, entry_owners, from_owners
from .choosing import Index, index_of, own, read_by, written_by
from .kinds import base_name, names
from .table import place_of

# Positions of the arguments that hold values; all others are indices, masks and sizes. The default is the first.
_VALUES = {
    "__setitem__": (0, 2), "index_put": (0, 2), "index_put_": (0, 2), "index_add": (0, 3), "index_add_": (0, 3),
    "index_copy": (0, 3), "index_copy_": (0, 3), "scatter": (0, 3), "scatter_": (0, 3), "scatter_add": (0, 3),
    "scatter_add_": (0, 3), "masked_scatter": (0, 2), "masked_scatter_": (0, 2), "index_fill": (0, 3),
    "index_fill_": (0, 3), "scatter_reduce": (0, 3), "scatter_reduce_": (0, 3), "index_reduce": (0, 3),
    "index_reduce_": (0, 3), "put": (0, 2), "put_": (0, 2), "_pad_packed_sequence": (0, 3),
}  # fmt: skip
_OF_ALL = names("block_diag meshgrid")  # take tensors one by one
_FILLING = names("block_diag tril triu")  # with zeros
STRIDED = names("as_strided as_strided_copy")  # read memory, be it what other tensors show
_UNKNOWN = -2
INTO = frozenset(_VALUES) - {"_pad_packed_sequence"}
_NAMED = {0: ("input", "tensors"), 2: ("values", "source", "value"), 3: ("source", "src", "value", "padding_value")}
_ADDING = names(
    "index_add index_add_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_reduce index_reduce_"
)
_ACCUMULATING = names("index_put index_put_ put put_")  # if they are asked to
MOVERS = names(
    "__getitem__ cat concat concatenate stack hstack vstack dstack row_stack column_stack split split_with_sizes "
    "chunk tensor_split unbind select narrow movedim moveaxis transpose swapaxes swapdims permute tile repeat "
    "unfold diagonal pad take_along_dim index_select unsafe_chunk unsafe_split t T mT adjoint block_diag tril triu "
    "meshgrid pad_sequence"
)

FINDS = names("nonzero argwhere where")  # the last without what to take from


def owners_of_steps(packed: PackedSequence) -> Tensor:
    """Example of each step of a packed sequence, whose steps come in order of time, the longest example's first."""
    order = packed.sorted_indices
    order = torch.arange(int(packed.batch_sizes[0]), device="cpu") if order is None else order.cpu()
    return torch.cat([order[:count] for count in packed.batch_sizes.tolist()])


def value_positions(func: Any, args: tuple) -> Sequence[int]:
    """Positions of the arguments whose entries are moved."""
    name = base_name(func)
    return range(len(args)) if name in _OF_ALL else _VALUES.get(name, (0,))


def values_of(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors whose entries are moved."""
    chosen: list[Any] = []
    for position in value_positions(func, args):
        if position < len(args):
            chosen.append(args[position])
        else:
            chosen += [kwargs[name] for name in _NAMED.get(position, ()) if name in kwargs]
    return list(tensors_in(chosen))


class ForeignError(Exception):
    """An index of one example has chosen what is another's."""


def moved(
    func: Callable, args: tuple, kwargs: dict, outputs: list[Tensor], space: Space, made: str
) -> list[Place | None]:
    """Run the operation on the owners of its values.

    Args:
        func: The operation.
        args: Its arguments; what it wrote in place must not have been written yet.
        kwargs: Its keyword arguments.
        outputs: What it gave.
        space: The space of all examples.
        made: How the operation is called in messages.

    Returns:
        The place of each output, ``None`` where the entries of one example cannot be told by one axis.

    Raises:
        ForeignError: If an example has chosen what is another's.
    """
    recorded, index = blind(), index_of(func, args, kwargs)
    if index is not None and not any(place_of(t) is not None for t in values_of(func, args, kwargs)):
        after = partial(written_by if base_name(func) in INTO else read_by, index, args[0], space.rows)
    else:
        after = partial(owners_after, func, args, kwargs)

    def found() -> tuple[list[Tensor], list[Tensor]]:
        results = after()
        return results, [t.cpu() for t in results] if recorded else results

    owners, on_host = found_out(found)
    shapes = [t.shape for t in outputs][: len(owners)]
    if not owners or [t.shape for t in owners] != shapes:
        return [None] * len(outputs)
    if index is not None and not _own(func, args, kwargs, index, owners, space):
        raise ForeignError
    with looking():
        into = base_name(func) in INTO
        stays = _stays(args[0], on_host[0]) if into else None
        places: list[Place | None] = [stays]
        if stays is None:
            places = [from_owners(one, space, made, one_example=not into) for one in on_host]
    if recorded:
        for again, before, place in zip(after(), owners, places, strict=True):
            holds(_at(again, before, place))
    return places


def _own(func: Callable, args: tuple, kwargs: dict, index: Index, owners: list[Tensor], space: Space) -> bool:
    """Whether what an index chooses, to be read or written, is of those that choose it."""
    places = [(t, place_of(t)) for t in values_of(func, args, kwargs)]
    sizes = {t.shape[p.axis] for t, p in places if isinstance(p, Place) and p.axis is not None}
    known = places[0][1]
    tables = [entry_owners(places[0][0], known if isinstance(known, Place) else None)]
    tables += owners[:1] if base_name(func) in INTO else []
    return own(index, tables, space.rows, sizes)


def _at(again: Tensor, before: Tensor, place: Place | None) -> Tensor:
    """Whether entries of these owners are at the place that was found of others, as `from_owners` would find too."""
    if place is None or place.axis is None or not again.numel():
        return again == before
    known = entry_owners(torch.empty((), device=again.device).expand(again.shape), place)
    rows = [t.movedim(place.axis, 0).reshape(t.shape[place.axis], -1).amax(1) for t in (again, before)]
    return ((again < 0) | (again == known)).all() & (rows[0] == rows[1]).all()


def _stays(target: Any, owner: Tensor) -> Place | None:
    """The place of a tensor that was written to, if only constants or entries of the same examples were."""
    place = place_of(target) if isinstance(target, Tensor) else None
    if not isinstance(place, Place) or owner.shape != target.shape:
        return None
    known = entry_owners(torch.empty((), device=owner.device).expand(target.shape), place)
    return place if bool(((owner < 0) | (owner == known)).all()) else None


def owners_after(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The owners of the entries of each output; empty if examples meet in one entry."""
    name = base_name(func)
    shift = int(name in _FILLING)  # what fills up is nobody's, and not the first example's

    def owner(t: Tensor) -> Tensor:
        place = place_of(t)
        return entry_owners(t, None if isinstance(place, Lost) else place) + shift

    new_args, new_kwargs = list(args), {key: value for key, value in kwargs.items() if key != "out"}
    for position in value_positions(func, args):
        if position < len(args):
            new_args[position] = _replaced(args[position], owner)
        else:
            for given in _NAMED.get(position, ()):
                if given in kwargs:
                    new_kwargs[given] = _replaced(kwargs[given], owner)
    if name in FINDS:
        return _found(func, args[0], kwargs)
    if name in _ADDING or (name in ("scatter", "scatter_") and _argument(new_args, new_kwargs, 4, "reduce")):
        return _added(new_args, new_kwargs, func)
    if name in _ACCUMULATING and _argument(new_args, new_kwargs, 3, "accumulate"):
        return _accumulated(new_args, new_kwargs, name)
    if name == "pad":
        new_args, new_kwargs = _padding_with_nobody(new_args, new_kwargs)
    if name == "pad_sequence":  # as torch.nn.utils.rnn calls it; what fills up belongs to no example
        new_args[2] = -1
    if name in STRIDED:
        new_args, new_kwargs = _strided_alike(args, new_args, new_kwargs)
        read = func(*new_args, **new_kwargs)
        return [read] if holds(read != _UNKNOWN) else []
    if name == "__setitem__" or name.endswith("_"):
        new_args[0] = new_args[0].clone()
    result = func(*new_args, **new_kwargs)
    results = tensors_in(new_args[0] if name == "__setitem__" else result)
    return [t - shift if shift else t for t in results][: _outputs_that_move(name)]


def _found(func: Callable, t: Tensor, kwargs: dict) -> list[Tensor]:
    """The numbers of an entry that is not zero belong to whom the entry belongs to."""
    place = place_of(t)
    owner = entry_owners(t, None if isinstance(place, Lost) else place)[t != 0]
    numbers = tensors_in(func(t, **kwargs))
    return [owner.view(-1, *[1] * (one.dim() - 1)).expand(one.shape) for one in numbers]


def _outputs_that_move(name: str) -> int | None:
    """Packing returns the sizes of its batches beside the data, and unpacking the lengths."""
    return 1 if name in ("_pack_padded_sequence", "_pad_packed_sequence") else None


def _replaced(value: Any, owner: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (int, float, bool)):
        return -1
    return map_tensors(owner, value)


def _argument(args: list, kwargs: dict, position: int, *names: str) -> Any:
    """An argument by its position, or one of its names; ``None`` if it was left out."""
    if position < len(args):
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _added(args: list, kwargs: dict, func: Callable) -> list[Tensor]:
    """Adding into a tensor along an axis."""
    target, dim, index = args[0], _argument(args, kwargs, 1, "dim", "axis"), _argument(args, kwargs, 2, "index")
    source = _argument(args, kwargs, 3, "source", "src", "value")
    if not isinstance(source, Tensor):  # a constant
        source = torch.full_like(index, -1)
    if "index_" in func.__name__:
        shape = [1] * source.dim()
        shape[dim] = -1
        index = index.view(shape).expand(source.shape)
    return _met(target, dim, index, source[tuple(map(slice, index.shape))])


def _accumulated(args: list, kwargs: dict, name: str) -> list[Tensor]:
    """Adding into entries that are chosen by indices of several axes, or by their number."""
    target, chosen = args[0], _argument(args, kwargs, 1, "indices", "index")
    values = _argument(args, kwargs, 2, "values", "source")
    if name.startswith("index_put"):
        numbers = torch.arange(target.numel(), device=target.device).view(target.shape)
        chosen = numbers[tuple(slice(None) if index is None else index for index in chosen)]
        values = values.expand(chosen.shape)
    flat = _met(target.flatten(), 0, chosen.flatten() % max(1, target.numel()), values.flatten())
    return [owner.view(target.shape) for owner in flat]


def _met(target: Tensor, dim: int, index: Tensor, source: Tensor) -> list[Tensor]:
    """The largest owner that meets in an entry, if the smallest is the same."""
    top = target.scatter_reduce(dim, index, source, "amax")
    known = torch.where(source < 0, torch.iinfo(source.dtype).max, source)
    before = torch.where(target < 0, torch.iinfo(source.dtype).max, target)
    bottom = before.scatter_reduce(dim, index, known, "amin")
    return [top] if holds((top < 0) | (top == bottom)) else []


def _strided_alike(args: tuple, new_args: list, kwargs: dict) -> tuple[list, dict]:
    """Owners that lie in memory as the values do, counted from where these begin; what lies between is unknown."""
    t, begin = args[0], args[0].storage_offset()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    memory = torch.full((reach,), _UNKNOWN, device=t.device)
    alike = memory.as_strided(t.shape, t.stride()).copy_(new_args[0])
    rest = list(new_args[1:])
    if len(rest) > 2 and rest[2] is not None:
        rest[2] -= begin
    offset = kwargs.get("storage_offset")
    return [alike, *rest], kwargs | ({} if offset is None else {"storage_offset": offset - begin})


def _padding_with_nobody(args: list, kwargs: dict) -> tuple[list, dict]:
    """Constant padding belongs to no example."""
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
    if mode == "constant":
        args, kwargs = args[:3], {k: v for k, v in kwargs.items() if k != "value"} | {"value": -1}
    return args, kwargs
