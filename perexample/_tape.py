"""A computation recorded operation by operation, and run again without Python, hooks or autograd around it.

`torch.cuda.graph` does this for GPUs. On a CPU an operation that takes microseconds is called from code that takes as
long, so that a small model's step is mostly that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._calls import (
    WRITES_STATISTICS,
    Call,
    Form,
    Slot,
    folded,
    is_view,
    needed,
    once,
    slots_of,
    written_by,
)
from ._direct import direct
from ._looks import model_looks, trying
from ._precision import without_autocast
from ._private import is_default_generator, memory_of
from ._program import Program, numbers_of
from ._tree import map_tensors, tensors_of
from .errors import ConfigurationError

_SLOT = "_perexample_slot"  # attribute of a tensor that an operation has made: the tape, and its number
_CONSTANT = -2  # instead of the number of a view of a tensor that was there before
_TRIED = object()  # instead of the tape, of what was made where something is tried
# What tells the host values, or makes tensors of sizes that depend on values.
_LOOKS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "allclose", "repeat_interleave",
}  # fmt: skip
_COMPARED = {"_local_scalar_dense", "equal"}  # of these, those that may be looked at with a note
_VIEWS: dict[str, Callable[..., Tensor]] = {
    "t_": torch.t, "transpose_": torch.transpose, "unsqueeze_": torch.unsqueeze, "squeeze_": torch.squeeze,
    "as_strided_": torch.as_strided,  # as pooling to one pixel does, where channels come last
}  # fmt: skip
_FULL = {"ones_like": 1, "zeros_like": 0}
_OTHER_SHAPE = {"set_", "resize_", "resize_as_", *_VIEWS}


class Tape(TorchDispatchMode):
    """Records what a function does, once, and does it again.

    A run of the function with another tape around it, just before, shows what one run leaves to the next.

    Tensors that were there before are the same in each replay, and are read and written to where they lie; all others
    are made anew, and let go when nothing needs them any more. Views that show the same, and operations on the same
    tensors, are done once.
    """

    def __init__(self) -> None:
        """Nothing recorded yet."""
        super().__init__()
        self._calls: list[Call] = []
        self._roots: list[int] = []  # of each slot the memory, as the slot that made it, or the address of a constant
        self._forms: list[Form] = []  # of each slot
        self._written: set[int] = set()  # memory that an operation writes to
        self._shown: dict[Any, int] = {}  # views by memory and layout
        self._kept: list[Tensor] = []  # constants, whose addresses stand for them
        self._left: set[int] = set()  # memory of those that were made on another tape
        self._program: Program | None = None
        self._memories: set[int] = set()  # of all that operations have made
        self._changing: set[int] = set()  # memory that may hold other values in a replay
        self._of_batch: set[int] = set()  # the same, if they come from the inputs or by chance

    def record(
        self,
        function: Callable[[], Any],
        inputs: Sequence[Tensor] = (),
        later: int = 0,
    ) -> Any:
        """Call a function and record what it does.

        Args:
            function: Returns tensors in nested tuples, lists and dictionaries.
            inputs: Tensors that it reads, in whose place others are given in a replay.
            later: How many of these, the last ones, are given when the computation has gone as far as it can without.
                Then the function returns a pair: what is handed out at that point, and what at the end.

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
        named = map_tensors(self._named, found)
        wanted = numbers_of(named)
        calls = needed(once(self._calls, self._roots, self._written, set(wanted)), set(wanted))
        self._refuse_left(calls)
        with torch.no_grad(), without_autocast({"cpu", *(t.device.type for t in inputs)}):
            calls = folded(calls, self._roots, self._written, set(wanted))
        self._program = Program(calls, self._roots, self._forms, len(inputs), named, later)
        self._calls, self._shown, self._kept = [], {}, []
        return found

    @property
    def program(self) -> Program:
        """What was recorded."""
        assert self._program is not None
        return self._program

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note an operation."""
        kwargs = kwargs or {}
        if trying():
            return _tried(func(*args, **kwargs), tensors_of((args, kwargs)))
        name = func._schema.name.partition("::")[2]
        given = tensors_of((args, kwargs))
        if name in _VIEWS and self._slot(args[0]) is not None:
            with self:
                view = _VIEWS[name](*args, **kwargs)
            setattr(args[0], _SLOT, getattr(view, _SLOT))  # it shows from now on what that shows
            return func(*args, **kwargs)
        if any(self._may_change(t) for t in given):
            if name in _COMPARED and self._looked(name, args, found := func(*args, **kwargs)):
                return found
            _refuse_looks(name, args)
        _refuse_generators((*args, *kwargs.values()))
        found = func(*args, **kwargs)
        if name in _FULL and not found.dim():  # which takes a number's shape alone, and needs not wait for it
            func, args, given = torch.ops.aten.full.default, ([], _FULL[name]), []
            kwargs = {"dtype": found.dtype, "device": found.device}
        if name.startswith("lift_fresh"):  # a constant that may be written to afterwards
            copy = torch.ops.aten.clone.default
            self._calls.append(
                Call(copy, (Slot(-1, found.clone()),), {}, [self._number(found)], direct(copy, (found,), {}))
            )
            return found
        if self._shows(func, found, given) and self._is_known(found, given[0]):
            return found
        own_args, own_kwargs = map_tensors(self._named, (args, kwargs))
        self._written.update(map(self._root, tensors_of(written_by(func, args, kwargs))))
        if name in WRITES_STATISTICS:
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
        self._calls.append(Call(func, own_args, own_kwargs, results, direct(func, args, kwargs)))
        return found

    def _looked(self, name: str, args: tuple, found: Any) -> bool:
        """Whether it was noted that a look must find the same in a replay."""

        def same() -> Tensor:
            with self:
                if name == "equal":
                    alike = args[0].shape == args[1].shape
                    equal = (
                        (args[0] == args[1]).all()
                        if alike
                        else torch.zeros((), dtype=torch.bool, device=args[0].device)
                    )
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
        key = _layout(root, view)
        slot = self._shown.get(key)
        if slot is None:
            self._shown[key] = len(self._roots)  # the number that it is about to get
            return False
        setattr(view, _SLOT, (self, slot))
        return True

    def _number(self, t: Tensor, given: Sequence[Tensor] = (), *, of_numbers: bool = False) -> int:
        """Give a tensor a number."""
        number, memory = len(self._roots), memory_of(t)
        shared = next((other for other in given if memory_of(other) == memory), None) if memory else None
        root = number if shared is None else self._root(shared)
        if not of_numbers and (not given or any(self._may_change(other) for other in given)):
            self._changing.add(root)
        self._roots.append(root)
        self._forms.append(Form(t.shape, t.dtype))
        setattr(t, _SLOT, (self, number))
        if memory:
            self._shown.setdefault(_layout(root, t), number)
        if shared is None and memory:
            self._memories.add(memory)
        return number

    def _root(self, t: Tensor) -> int:
        slot = self._slot(t)
        if slot is not None:
            return self._roots[slot]
        self._kept.append(t)
        return -1 - memory_of(t)

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

    def _named(self, t: Tensor) -> Slot:
        number = self._slot(t)
        if number is not None:
            return Slot(number)
        tape, number = getattr(t, _SLOT, (None, _CONSTANT))
        memory = 0 if tape is _TRIED else memory_of(t)
        if tape is not self and (not t.is_leaf or (memory and memory in self._memories)):
            raise ConfigurationError(
                f"This step cannot be recorded: a tensor of shape {list(t.shape)} was made in a way that operations do "
                f"not show (as_subclass, nn.Parameter of a result), or before the recording. Run it as usual."
            )
        if tape is not self and number != _CONSTANT:
            self._left.add(memory_of(t))
            self._kept.append(t)
        return Slot(-1, t)

    def _refuse_left(self, calls: Sequence[Call]) -> None:
        """What the run before has made would be made anew by each run."""
        for slot in slots_of([(call.args, call.kwargs) for call in calls]):
            if slot.tensor is not None and memory_of(slot.tensor) in self._left:
                raise ConfigurationError(
                    f"This step cannot be recorded: it reads a tensor of shape {list(slot.tensor.shape)} that the run "
                    f"before has left, which would be that of the recording for ever. Give such a state with the "
                    f"batch, or run the step as usual."
                )

    @staticmethod
    def _shows(func: Any, found: Any, given: Sequence[Tensor]) -> bool:
        """Whether a tensor is a view of the first that is given; where autograd is off some functions may copy."""
        if not isinstance(found, Tensor) or not given or not is_view(func):
            return False
        return memory_of(found) != 0 and memory_of(found) == memory_of(given[0])


def _layout(root: int, t: Tensor) -> Any:
    """All that tells tensors apart that show the same memory."""
    return root, t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_conj(), t.is_neg()


def _tried(found: Any, given: Sequence[Tensor]) -> Any:
    """What was made there is a constant, also where it lies in memory that an operation on the tape had and let go."""
    shared = {memory_of(t) for t in given if getattr(t, _SLOT, (None,))[0] is not _TRIED}
    for t in tensors_of(found):
        if memory_of(t) not in shared:
            setattr(t, _SLOT, (_TRIED, _CONSTANT))
    return found


def _refuse_generators(given: Sequence[Any]) -> None:
    """A batch for which a replay is not used is run as usual, from where the default generator was before."""
    if any(isinstance(one, torch.Generator) and not is_default_generator(one) for one in given):
        raise ConfigurationError(
            "This step cannot be recorded: it draws random numbers from a generator of its own, which would be moved "
            "twice for some batches. Leave generator= out, draw them before and give them with the batch, or run the "
            "step as usual."
        )


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
