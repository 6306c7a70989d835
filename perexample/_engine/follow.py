"""The forward side of operations: which tensors depend on the batch, where they hold the examples, and taps.

While the outermost forward of an extended model runs, every torch function outside of modules with a rule passes here.
A tensor that was computed from the inputs depends on the batch. One that needs a gradient and does not depend on the
batch was computed from parameters alone. A function that is given both is a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._private import (
    dispatched,
    follow_recomputation,
    function_modes,
    inside_functorch,
    saves_otherwise,
    undispatched,
    whole_arguments,
    whole_base,
    without_dispatch,
)
from .._tree import PLAIN, tensors_in
from ..place import Lost, Place, broadcast, entry_owners, from_owners, widened
from ..rule import function_rule
from .arithmetic import simple_place
from .kinds import HOOKING, LEAVING, TRAITS, Kind, Traits, traits_of
from .lost import where
from .operation import Operation
from .parts import PARTS
from .state import STATE, resumed
from .table import known_place, origin_of, place_of, put, put_all_on_edges, put_made, put_on_edge, put_origin

_OF_THE_FIRST = (Kind.SAME, Kind.RESHAPE, Kind.EXPAND, Kind.PERMUTE)  # other tensors only say to what shape or type
_FIRST = ("input", "x", "a", "x1")  # its names, torch's own and those of numpy
_BY_THE_FIRST = (*_OF_THE_FIRST, Kind.MOVE)  # the first argument is looked at by its position


class Follow(TorchFunctionMode):
    """Follows the operations of one outermost forward.

    Args:
        repeated: The forward a part of which a checkpoint runs again. Inside of another checkpoint its tensors come
            back as other objects, which are known by the memory or the place in the graph that they share.
    """

    ended = False

    def __init__(self, repeated: Any = None) -> None:
        """Nothing is under way yet."""
        super().__init__()
        self.repeated, self.alone = repeated, False

    def __enter__(self) -> Follow:
        """See whether the modes below only wait for a backward."""
        self.alone = all(getattr(mode, "waits_for_backward", False) for mode in function_modes())
        super().__enter__()
        return self

    def _run(self, func: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function, past the modes below if none of them has anything to do with it."""
        if not self.alone or TRAITS[func].operation or (types and any(kind is not Tensor for kind in types)):
            return func(*args, **kwargs)
        with undispatched():
            return func(*args, **kwargs)

    def _silent(self, func: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function inside of a module that a rule answers for, which may compute some functions itself."""
        rule = None if STATE.quiet else STATE.frames[-1].rule
        if rule is not None and rule.computes and func in rule.computes:
            with undispatched():
                note_checkpoint(STATE.frames[-1].record or self.repeated)
                out = rule.compute(func, args, kwargs)
            if out is not None:
                return out
        return self._run(func, types, args, kwargs)

    def _plainly(self, traits: Traits, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function that is given no tensors but those that hold rows, and writes nowhere.

        Returns:
            What it gave; ``None`` if it is another function.
        """
        with undispatched():
            tracked = _all_known(args, kwargs)
            if tracked is None:
                return None
            out = func(*args, **kwargs)
            if type(out) is Tensor and not inside_functorch(out):
                place = simple_place(traits, args, kwargs, tracked, out)
                if place is not None:
                    put(out, place)
                    return out
            return Operation(func, traits, args, kwargs, tracked).conclude(out)

    def leave(self) -> None:
        """End, also if something above on the stack of modes was not taken off by its owner."""
        self.ended = True
        forget_followers()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the function; note what its result depends on, and leave a tap where parameters meet data."""
        kwargs = whole_arguments(func, kwargs or {})
        traits = TRAITS.get(func) or traits_of(func)
        if not args and kwargs and traits.kind in _BY_THE_FIRST:
            kwargs = dict(kwargs)
            args = tuple(kwargs.pop(name) for name in _FIRST if name in kwargs)
        if traits.kind is Kind.IGNORED and traits.plain and not kwargs.get("requires_grad"):
            STATE.once |= func in HOOKING
            if func in LEAVING and args and known_place(args[0]) is not None:
                STATE.hints[f"`{traits.name}` of a tensor that holds examples, in {where()}"] = None
            return self._run(func, types, args, kwargs)
        if self.ended or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if traits.kind is Kind.IGNORED:
            out = func(*args, **kwargs)
            with undispatched():
                put_made(out if out is not None else args[0])
            return out
        if STATE.silent():
            return self._silent(func, types, args, kwargs)
        if traits.plain and self.alone:
            out = self._plainly(traits, func, args, kwargs)
            if out is not None:
                return out
        return self._followed(traits, func, types, args, kwargs)

    def _followed(self, traits: Traits, func: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function of anything."""
        kind = traits.kind
        with undispatched():
            if self.repeated is not None:
                _recognise((args, kwargs), self.repeated)
            tracked, targets = _scanned(kind, args, kwargs)
            zeros = _rows_of_base(kind, args[0], tracked) if tracked and targets and traits.in_place else None
            if zeros is not None:  # a tap where what is not written to is seen too
                self._followed(traits_of(Tensor.add_), Tensor.add_, types, (args[0]._base, zeros), {})
                tracked, targets = _scanned(kind, args, kwargs)
            if not tracked and _counts_rows(func, args, kwargs):
                tracked, targets = _scanned(kind, args, kwargs)
        if not tracked:
            out = self._run(func, types, args, kwargs)
            if isinstance(out, Tensor) and inside_functorch(out):
                STATE.hints[f"torch.func (vmap, grad, jacrev and others) in {where()}"] = None
            return _underived(out, traits, args, targets)
        if kind is Kind.COMPOSITE:
            with self:
                return (PARTS.get(func) or without_dispatch(func))(*args, **kwargs)
        if kind is Kind.SET:
            out = self._run(func, types, args, kwargs)
            put(args[0], tracked[0][1])
            return out
        with undispatched():
            call = Operation(func, traits, args, kwargs, tracked)
            if targets and torch.is_grad_enabled() and call.lost is None:
                note_checkpoint(call.record)
                call.meet(targets)
            call.prepare()
        out = self._run(func, types, args, kwargs)
        with undispatched():
            out = call.conclude(out)
            if call.record.checkpointed:  # a checkpoint inside of this one hands its inputs on as other objects
                for t in tensors_in(out):
                    put_on_edge(t)
        return out


def forget_followers() -> None:
    """Take ended followers off the stack of modes, as far as they are on top."""
    modes = function_modes()
    while modes and isinstance(modes[-1], Follow) and (modes[-1].ended or not STATE.frames):
        modes[-1].ended = True
        modes.pop().__exit__(None, None, None)
    for mode in modes:
        if isinstance(mode, Follow) and not STATE.frames:
            mode.ended = True


def _all_known(args: tuple, kwargs: dict) -> list[tuple[Tensor, Place]] | None:
    """The tensors among arguments with their places, if all hold rows, and all else are numbers and names."""
    tracked: list[tuple[Tensor, Place]] = []
    for value in args:
        kind = type(value)
        if kind is Tensor:
            place = known_place(value)
            if type(place) is not Place:
                return None
            tracked.append((value, place))
        elif kind not in PLAIN and not ((kind is tuple or kind is list) and PLAIN.issuperset(map(type, value))):
            return None
    if not tracked or (kwargs and not PLAIN.issuperset(map(type, kwargs.values()))):
        return None
    space = tracked[0][1].space
    return None if space.rows <= 1 or space.record.checkpointed else tracked


def _scanned(kind: Kind, args: tuple, kwargs: dict) -> tuple[list[tuple[Tensor, Any]], list[Tensor]]:
    """The arguments of a call that depend on the batch, and those computed from parameters."""
    tracked: list[tuple[Tensor, Any]] = []
    targets: list[Tensor] = []
    if kind in _OF_THE_FIRST:
        _scan(args[:1], tracked, targets)
    elif kind is Kind.FILL or kind is Kind.SET:
        _scan((*args[1:], *kwargs.values()), tracked, targets)
    else:
        _scan(args, tracked, targets)
        if kwargs:
            _scan(kwargs.values(), tracked, targets)
    if tracked and kind is not Kind.POINTWISE and kind is not Kind.FILL:
        tracked = [(t, place) for t, place in tracked if not _one_number(t, place)]
    return tracked, targets


def _counts_rows(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a function tells how many examples there are, as one that is given bags of ids: bag n is example n's."""
    record = STATE.frames[-1].record if STATE.frames else None
    rule = function_rule(func) if record is not None and (record.pending or record.settled) else None
    given = list(tensors_in((args, kwargs)))
    if record is None or rule is None or not rule.counts_rows or not any(map(record.was_given, given)):
        return False
    if record.pending:
        with torch.no_grad():
            record.settle(func(*args, **kwargs).shape[0])
    offsets = [t for t in given if t.shape == (record.space.rows,)]
    if len(offsets) == 1 and place_of(offsets[0]) is None:
        put(offsets[0], Place(record.space, 0))
    elif not any(place_of(t) is not None for t in given):
        STATE.hints[
            f"`{traits_of(func).name}` of ids in a row, in {where()}, by a function or of a frozen table, whose "
            f"offsets are not one for each of {record.space.rows} examples: leave include_last_offset out, and "
            f"the end of them"
        ] = None
    return True


def _rows_of_base(kind: Kind, part: Tensor, tracked: list[tuple[Tensor, Any]]) -> Tensor | None:
    """Zeros that hold the rows of the data that is about to be written into a part of what parameters gave."""
    base = part._base if isinstance(part, Tensor) else None
    if kind is not Kind.POINTWISE or base is None or whole_base(part) is base or not base.requires_grad:
        return None
    places = [(place, t.shape) for t, place in tracked if isinstance(place, Place)]
    if len(places) < len(tracked) or place_of(base) is not None or not torch.is_grad_enabled():
        return None
    place = broadcast(places, part.shape)
    if place is not None and place.axis is not None:
        owner = torch.empty_strided(base.shape, base.stride(), dtype=torch.long).fill_(-1)
        written = owner.as_strided(part.shape, part.stride(), part.storage_offset() - base.storage_offset())
        written.copy_(entry_owners(written, place))
        place = from_owners(owner, place.space.record.space, place.space.made, one_example=False)
    if place is None:
        return None
    zeros = base.new_zeros(()).expand(base.shape)
    put(zeros, place)
    return zeros


def _scan(values: Iterable[Any], tracked: list[tuple[Tensor, Any]], targets: list[Tensor]) -> None:
    """Sort tensors into those that depend on the batch, and those computed from parameters."""
    for value in values:
        if isinstance(value, Tensor):
            place = place_of(value)
            if place is not None:
                tracked.append((value, place))
            elif value.requires_grad and not any(value is t for t in targets):
                targets.append(value)
        elif isinstance(value, (tuple, list)):
            _scan(value, tracked, targets)
        elif isinstance(value, dict):
            _scan(value.values(), tracked, targets)


def _one_number(t: Tensor, place: Any) -> bool:
    """Whether a tensor is a single whole number found out from several examples, and as good as a Python number."""
    return isinstance(place, Lost) and t.numel() == 1 and not t.is_floating_point() and t.dtype != torch.bool


def _underived(out: Any, traits: Traits, args: tuple, targets: list[Tensor]) -> Any:
    """An operation without data; remember what only repeats a tensor, so that a gradient need not be spread."""
    if not targets:
        put_made(out)
    elif isinstance(out, Tensor) and out.requires_grad:
        source = args[0] if args else None
        if isinstance(source, Tensor) and (
            traits.kind is Kind.EXPAND
            or traits.name == "expand_as"
            or (traits.name == "repeat" and _only_ones(source, out))
        ):
            put_origin(out, origin_of(source))
    return out


def _only_ones(source: Tensor, out: Tensor) -> bool:
    """Whether only axes of size 1 were repeated, so that it is the same as expanding."""
    return all(a == b or a == 1 for a, b in zip(widened(source.shape, out.dim()), out.shape, strict=True))


def note_checkpoint(record: Any) -> None:
    """If a checkpoint is under way, see to it that what it runs again will be followed."""
    if saves_otherwise() and follow_recomputation(partial(repeating, record)) and not record.checkpointed:
        record.checkpointed = True
        put_all_on_edges()


@contextmanager
def repeating(record: Any) -> Iterator[None]:
    """Around what a checkpoint runs again: operations must save the same tensors as they did before."""
    with resumed(), dispatched(), Follow(record):
        yield


def recognise(tree: Any) -> None:
    """The same for the arguments of the first module that a checkpoint runs again."""
    for mode in reversed(function_modes()):
        if isinstance(mode, Follow) and mode.repeated is not None:
            _recognise(tree, mode.repeated)
            return


def _recognise(tree: Any, record: Any) -> None:
    """Find the inputs of a forward again."""
    for t in tensors_in(tree):
        if t.requires_grad or place_of(t) is not None:
            continue
        for known, place in record.inputs():
            if t is known or (t.data_ptr() == known.data_ptr() and t.shape == known.shape and t.dtype == known.dtype):
                put(t, place)
