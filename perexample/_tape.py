"""A computation recorded operation by operation, and run again without Python, hooks or autograd around it.

`torch.cuda.graph` does this for GPUs. On a CPU an operation that takes microseconds is called from code that takes as
long, so that a small model's step is mostly that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._looks import model_looks, trying
from ._tree import map_tensors, tensors_of
from .errors import ConfigurationError

_SLOT = "_perexample_slot"  # attribute of a tensor that an operation has made: the tape, and its number
_CONSTANT = -2  # instead of the number of a view of a tensor that was there before
# What tells the host values, or makes tensors of sizes that depend on values.
_LOOKS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "allclose", "repeat_interleave",
}  # fmt: skip
_COMPARED = {"_local_scalar_dense", "equal"}  # of these, those that may be looked at with a note
_WRITES_STATISTICS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm"}  # without a word
_OTHER_SHAPE = {"set_", "resize_", "resize_as_", "t_", "transpose_", "unsqueeze_", "squeeze_", "as_strided_"}


@dataclass(slots=True)
class _Slot:
    """Stands for a tensor: the number of one that an operation makes, or -1 and the tensor itself."""

    number: int
    tensor: Tensor | None = None


@dataclass(slots=True)
class _Call:
    """One operation.

    Attributes:
        function: What is called.
        args: With tensors as slots.
        kwargs: The same.
        results: Numbers of the tensors that it makes; -1 for what is left out, or one of the arguments.
    """

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    results: list[int]

    def uses(self) -> Iterator[int]:
        """Numbers of the tensors that it is given."""
        return (slot.number for slot in _slots_of((self.args, self.kwargs)) if slot.number >= 0)

    @property
    def pure(self) -> bool:
        """Whether it does nothing but make its results, the same each time."""
        schema = self.function._schema
        if schema.is_mutable or schema.name.partition("::")[2] in _WRITES_STATISTICS:
            return False
        return torch.Tag.nondeterministic_seeded not in self.function.tags


class Tape(TorchDispatchMode):
    """Records what a function does, once, and does it again.

    Tensors that were there before are the same in each replay, and are read and written to where they lie; all others
    are made anew, and let go when nothing needs them any more. Views that show the same, and operations on the same
    tensors, are done once.
    """

    def __init__(self) -> None:
        """Nothing recorded yet."""
        super().__init__()
        self._calls: list[_Call] = []
        self._roots: list[int] = []  # of each slot the memory, as the slot that made it, or the address of a constant
        self._written: set[int] = set()  # memory that an operation writes to
        self._shown: dict[Any, int] = {}  # views by memory and layout
        self._kept: list[Tensor] = []  # constants, whose addresses stand for them
        self._wanted: Any = None
        self._code: Callable[..., tuple] | None = None
        self.random = False
        self._memories: set[int] = set()  # of all that operations have made
        self._changing: set[int] = set()  # memory that may hold other values in a replay
        self._of_batch: set[int] = set()  # the same, if they come from the inputs or by chance

    def record(self, function: Callable[[], Any], inputs: Sequence[Tensor] = ()) -> Any:
        """Call a function and record what it does.

        Args:
            function: Returns tensors in nested tuples, lists and dictionaries.
            inputs: Tensors that it reads, in whose place others are given in a replay.

        Returns:
            What it returns.

        Raises:
            ConfigurationError: If it looks at values.
        """
        for t in inputs:
            self._of_batch.add(self._number(t))
        try:
            with self:
                found = function()
        finally:
            for t in inputs:
                delattr(t, _SLOT)
        self._wanted = map_tensors(self._named, found)
        wanted = [slot.number for slot in _slots_of(self._wanted) if slot.number >= 0]
        calls = _needed(_once(self._calls, self._roots, self._written, set(wanted)), set(wanted))
        self.random = any(torch.Tag.nondeterministic_seeded in call.function.tags for call in calls)
        self._code = _compiled(calls, len(inputs), wanted)
        self._calls, self._shown, self._kept = [], {}, []
        return found

    def replay(self, inputs: Sequence[Tensor] = ()) -> Any:
        """Do it again.

        Args:
            inputs: As many as it was recorded with, of the same shapes, strides and types.

        Returns:
            What the function returned, new tensors.
        """
        assert self._code is not None
        with torch.no_grad():
            values = iter(self._code(*inputs))
        return map_tensors(lambda slot: next(values) if slot.number >= 0 else slot.tensor, self._wanted, _Slot)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note an operation."""
        kwargs = kwargs or {}
        if trying():
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given = tensors_of((args, kwargs))
        if any(self._may_change(t) for t in given):
            if name in _COMPARED and self._looked(name, args, found := func(*args, **kwargs)):
                return found
            _refuse_looks(name, args)
        found = func(*args, **kwargs)
        if name.startswith("lift_fresh"):  # a constant that may be written to afterwards
            copy = torch.ops.aten.clone.default
            self._calls.append(_Call(copy, (_Slot(-1, found.clone()),), {}, [self._number(found)]))
            return found
        if self._shows(func, found, given) and self._is_known(found, given[0]):
            return found
        own_args, own_kwargs = map_tensors(self._named, (args, kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._written.update(map(self._root, tensors_of(value)))
        self._written.update(self._root(value) for value in _written_by_name(func, kwargs))
        if name in _WRITES_STATISTICS:
            self._written.update(self._root(t) for t in given[1:])
        known = {id(t) for t in given}
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        of_numbers = not given and not name.startswith("empty")
        results = [
            -1 if not isinstance(t, Tensor) or id(t) in known else self._number(t, given, of_numbers=of_numbers)
            for t in (found if isinstance(found, (tuple, list)) else [found])
        ]
        roots = {self._roots[number] for number in results if number >= 0}
        if func._schema.is_mutable:
            roots.update(map(self._root, given))
        if drawn or (func._schema.is_mutable and any(self._may_change(t) for t in given)):
            self._changing.update(roots)
        if drawn or any(self._comes_from_batch(t) for t in given):
            self._of_batch.update(roots)
        self._calls.append(_Call(func, own_args, own_kwargs, results))
        return found

    def _looked(self, name: str, args: tuple, found: Any) -> bool:
        """Whether it was noted that a look must find the same in a replay."""

        def same() -> Tensor:
            with self:
                if name == "equal":
                    alike = args[0].shape == args[1].shape
                    equal = (args[0] == args[1]).all() if alike else torch.zeros((), dtype=torch.bool)
                    return equal if found else ~equal
                return (args[0] == found).all()

        return model_looks(same, at_batch=any(map(self._comes_from_batch, tensors_of(args))))

    def _is_known(self, view: Tensor, of: Tensor) -> bool:
        """Whether a view shows what another tensor shows, which then stands for it; those of constants are constant."""
        if self._slot(of) is None:
            self._named(of)  # raises if it is not what it seems
            setattr(view, _SLOT, (self, _CONSTANT))
            return True
        root = self._root(of)
        key = root, view.shape, view.stride(), view.storage_offset(), view.dtype, view.is_conj(), view.is_neg()
        slot = self._shown.get(key)
        if slot is None:
            self._shown[key] = len(self._roots)  # the number that it is about to get
            return False
        setattr(view, _SLOT, (self, slot))
        return True

    def _number(self, t: Tensor, given: Sequence[Tensor] = (), *, of_numbers: bool = False) -> int:
        """Give a tensor a number."""
        number, memory = len(self._roots), _memory(t)
        shared = next((other for other in given if _memory(other) == memory), None) if memory else None
        root = number if shared is None else self._root(shared)
        if not of_numbers and (not given or any(self._may_change(other) for other in given)):
            self._changing.add(root)
        self._roots.append(root)
        setattr(t, _SLOT, (self, number))
        if shared is None and memory:
            self._memories.add(memory)
            key = number, t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_conj(), t.is_neg()
            self._shown[key] = number
        return number

    def _root(self, t: Tensor) -> int:
        slot = self._slot(t)
        if slot is not None:
            return self._roots[slot]
        self._kept.append(t)
        return -1 - _memory(t)

    def _slot(self, t: Tensor) -> int | None:
        """The number of a tensor that an operation on this tape has made."""
        tape, number = getattr(t, _SLOT, (None, _CONSTANT))
        return number if tape is self and number != _CONSTANT else None

    def _may_change(self, t: Tensor) -> bool:
        """Whether a tensor may hold other values in a replay: all but what is made of numbers alone, as by arange."""
        number = self._slot(t)
        return number is None or self._roots[number] in self._changing

    def _comes_from_batch(self, t: Tensor) -> bool:
        number = self._slot(t)
        return number is not None and self._roots[number] in self._of_batch

    def _named(self, t: Tensor) -> _Slot:
        number = self._slot(t)
        if number is not None:
            return _Slot(number)
        view_of_constant = getattr(t, _SLOT, (None,))[0] is self
        if not view_of_constant and (not t.is_leaf or ((memory := _memory(t)) in self._memories and memory)):
            raise ConfigurationError(
                f"This step cannot be recorded: a tensor of shape {list(t.shape)} was made in a way that operations do "
                f"not show (as_subclass, nn.Parameter of a result), or before the recording. Run it as usual."
            )
        return _Slot(-1, t)

    @staticmethod
    def _shows(func: Any, found: Any, given: Sequence[Tensor]) -> bool:
        """Whether a tensor is a view of the first that is given; where autograd is off some functions may copy."""
        if not isinstance(found, Tensor) or not given or not _is_view(func):
            return False
        return _memory(found) != 0 and _memory(found) == _memory(given[0])


def _refuse_looks(name: str, args: tuple) -> None:
    masked = name in ("index", "index_put", "index_put_") and any(
        t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
    )
    if name in _LOOKS or masked:
        raise ConfigurationError(
            f"This step cannot be recorded: the model or its loss looks at values ({name}), as by item(), if, or a "
            f"mask as an index. Run it as usual."
        )
    if name in _OTHER_SHAPE:
        raise ConfigurationError(
            f"This step cannot be recorded: the model or its loss gives a tensor another shape or memory in place "
            f"({name}). Run it as usual."
        )


def _memory(t: Tensor) -> int:
    """Where a tensor lies; 0 if that cannot be told."""
    return t.untyped_storage().data_ptr() if t.layout is torch.strided else 0


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _written_by_name(func: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors that are given to be written to, by keyword."""
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [t for name in written if name in kwargs for t in tensors_of(kwargs[name])]


def _slots_of(tree: Any) -> list[_Slot]:
    found: list[_Slot] = []
    map_tensors(found.append, tree, _Slot)
    return found


def _once(calls: list[_Call], roots: list[int], written: set[int], wanted: set[int]) -> list[_Call]:
    """The calls without those whose results others have already, of the same function of the same tensors."""
    known: dict[Any, list[int]] = {}
    instead: dict[int, int] = {}
    kept = []

    def renamed(slot: _Slot) -> _Slot:
        return _Slot(instead.get(slot.number, slot.number), slot.tensor)

    def unwritten(slot: _Slot) -> bool:
        root = roots[slot.number] if slot.number >= 0 else -1 - _memory(slot.tensor) if slot.tensor is not None else 0
        return root not in written

    for call in calls:
        call.args, call.kwargs = map_tensors(renamed, (call.args, call.kwargs), _Slot)
        slots = _slots_of((call.args, call.kwargs))
        made = [number for number in call.results if number >= 0]
        same = call.pure and made and not wanted.intersection(made)
        if same and all(map(unwritten, slots)) and not any(roots[number] in written for number in made):
            key = call.function, _frozen(call.args), _frozen(call.kwargs)
            if key in known:
                instead |= dict(zip(call.results, known[key], strict=True))
                continue
            known[key] = call.results
        kept.append(call)
    return kept


def _frozen(value: Any) -> Any:
    """Something hashable that tells arguments apart."""
    if isinstance(value, _Slot):
        return ("slot", value.number) if value.number >= 0 else ("tensor", id(value.tensor))
    if isinstance(value, (tuple, list)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(one)) for key, one in value.items())
    return type(value), repr(value)


def _needed(calls: list[_Call], needed: set[int]) -> list[_Call]:
    """The calls without those whose results nobody uses, and that do nothing else."""
    kept = []
    for call in reversed(calls):
        if not call.pure or needed.intersection(call.results):
            needed.update(call.uses())
            kept.append(call)
    return kept[::-1]


def _compiled(calls: list[_Call], inputs: int, wanted: list[int]) -> Callable[..., tuple]:
    """The calls as the code of one function."""
    kept = set(wanted)
    last: dict[int, int] = {}
    for place, call in enumerate(calls):
        last |= dict.fromkeys([*call.uses(), *(number for number in call.results if number >= 0)], place)
    gone: dict[int, list[int]] = {}
    for slot, place in last.items():
        if slot not in kept:
            gone.setdefault(place, []).append(slot)
    names: dict[str, Any] = {}
    lines = [f"def replay({', '.join(f't{slot}' for slot in range(inputs))}):"]
    for place, call in enumerate(calls):
        names[f"f{place}"] = call.function
        given = [_source(a, names) for a in call.args] + [f"{k}={_source(v, names)}" for k, v in call.kwargs.items()]
        lines.append(f"    {_target(call)}f{place}({', '.join(given)})")
        if place in gone:
            lines.append(f"    del {', '.join(f't{slot}' for slot in gone[place])}")
    lines.append(f"    return ({''.join(f't{slot}, ' for slot in wanted)})")
    exec(compile("\n".join(lines), "<recorded step>", "exec"), names)  # of names and numbers made here
    return names["replay"]


def _target(call: _Call) -> str:
    """What the results are assigned to."""
    returns = call.function._schema.returns
    if len(returns) > 1 or "List" in str(returns[0].type if returns else ""):
        return "".join(f"t{number}, " if number >= 0 else "_, " for number in call.results) + "= "
    return f"t{call.results[0]} = " if call.results and call.results[0] >= 0 else ""


def _source(value: Any, names: dict[str, Any]) -> str:
    """An argument as code; what is neither a number nor a tensor made here gets a name."""
    if isinstance(value, _Slot) and value.number >= 0:
        return f"t{value.number}"
    if type(value) in (list, tuple):
        inner = "".join(f"{_source(one, names)}, " for one in value)
        return f"[{inner}]" if type(value) is list else f"({inner})"
    if type(value) in (int, bool, type(None)):
        return repr(value)
    name = f"c{len(names)}"
    names[name] = value.tensor if isinstance(value, _Slot) else value
    return name
