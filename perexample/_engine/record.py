"""What is known of one outermost forward of an extended model: its inputs, its examples, and what went wrong in it."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils.rnn import PackedSequence

from .._private import metadata
from .._tree import tensors_in, tensors_of
from ..errors import BatchAxisError
from ..place import Lost, Place, Space, from_owners
from ..rule import rule_for
from .lost import lose
from .owners import owners_of_steps
from .state import STATE
from .table import forget, place_of, put
from .tap import LOST, RETURNED
from .walk import source_of

_MOST_SHARED = 100
NESTED = (
    "is given a nested tensor, in which examples are not followed; give it padded data (to_padded_tensor) with a mask "
    "or lengths, or a packed sequence"
)


class Record:
    """One outermost forward of an extended model.

    Attributes:
        root: A weak reference to the module that was called.
        root_name: How it is named in messages.
        batch_dim: Axis of the inputs that holds the examples.
        refused: Modules called in it that mix examples, with the reason.
        checkpointed: Whether a part of it will be run again.
        wrote: Whether data was written into a tensor that did not depend on the batch before.
        opened: Stands for the context that was open; ``None`` if none was.
        space: The examples; without rows as long as their number is not known.
        other_axes: Sizes of the first input along its other axes.
        given: Edges of the graph at which inputs hang that another model may have computed, and where they hold the
            examples.
    """

    def __init__(
        self, module: nn.Module, name: str, batch_dim: int, args: tuple, kwargs: dict, shared: set[tuple[int, int]]
    ) -> None:
        """Note the sizes of the inputs along the batch axis, and where they hold the examples.

        Args:
            module: The module that was called.
            name: Its path.
            batch_dim: The axis.
            args: Its arguments.
            kwargs: Its keyword arguments.
            shared: Numbers of inputs that were of another size than there were examples, and the sizes; goes on.
        """
        self._shared = shared
        self.root = weakref.ref(module)
        self.root_name, self.batch_dim = name or type(module).__name__, batch_dim
        tensors, packed = tensors_of((args, kwargs)), _packed((*args, *kwargs.values()))
        nested = any(t.is_nested for t in tensors)
        tensors = [t for t in tensors if not t.is_nested] if nested else tensors
        self.input_sizes = self._sizes((*args, *kwargs.values()) if packed else tensors)
        self.output_sizes: list[int] = []
        self.output_axes: set[int] = set()
        self.other_axes = {size for axis, size in enumerate(tensors[0].shape if tensors else ()) if axis != batch_dim}
        self.listed = any(isinstance(a, list) and len(list(tensors_in(a))) > 1 for a in (*args, *kwargs.values()))
        flat_ids = bool(tensors) and tensors[0].dim() == 1 and not tensors[0].is_floating_point() and not packed
        in_a_row = len(tensors) > 1 and all(t.dim() == 1 for t in tensors)
        in_doubt = len(set(self.input_sizes)) > 1 or (in_a_row and _has_ends(module))
        self.pending, self.settled = flat_ids and in_doubt and _has_bags(module), False
        self.refused: list[tuple[str, str]] = [(self.root_name, NESTED)] if nested else []
        self.calls: dict[Any, int] = {}
        self.checkpointed = self.wrote = False
        self.opened = STATE.opened
        self._inputs = [weakref.ref(t) for t in tensors]
        self._places: list[Place | None] = [None] * len(tensors)
        self.given: list[tuple[GradientEdge, Place]] = []
        self.space = Space(self, self.input_sizes[0] if self.input_sizes and not self.pending else 0)
        if self.input_sizes and not self.pending:
            self._place(tensors, packed)

    def _place(self, tensors: list[Tensor], packed: Sequence[PackedSequence] = ()) -> None:
        """Inputs of N entries on the batch axis hold the examples there.

        Behind the first of these, one of ``[N, N]`` without gradient might as well be a mask that all examples share.
        Nothing depends on knowing it, as long as it meets data of which more is known.
        """
        first, steps = not packed, {id(p.data): p for p in packed}
        apart = {id(t) for p in packed for t in tensors_of(tuple(p))}  # sizes and orders belong to nobody
        for number, t in enumerate(tensors):
            if id(t) in apart:
                self._place_steps(number, t, steps.get(id(t)))
                continue
            if t.dim() <= self.batch_dim or t.shape[self.batch_dim] != self.space.rows:
                if t.dim() > self.batch_dim and len(self._shared) < _MOST_SHARED:
                    self._shared.add((number, t.shape[self.batch_dim]))
                continue
            square = t.dim() == 2 and t.shape[0] == t.shape[1] == self.space.rows
            if first or not square or t.requires_grad or self.space.rows <= 1:
                as_long = t.dim() < tensors[0].dim() and self.space.rows in self.other_axes
                if not first and (as_long or (number, self.space.rows) in self._shared):
                    STATE.hints[
                        f"input {number + 1} of `{self.root_name}`, {list(t.shape)}, was taken to hold the "
                        f"{self.space.rows} examples: if all share it, as positions, make it a buffer of the model, or "
                        f"pass it once for each example"
                    ] = None
                first = False
                place = self._places[number] = Place(self.space, self.batch_dim)
                put(t, place)
                # That of a later one is a guess where another axis is as long.
                if t.grad_fn is not None and (number == 0 or list(t.shape).count(self.space.rows) == 1):
                    self.given.append((GradientEdge(t.grad_fn, t.output_nr), place))
            else:
                STATE.hints[
                    f"input {number + 1} of `{self.root_name}`, of as many rows as columns as there are examples "
                    f"({t.shape[0]}), was taken for a mask that all share: if its rows are examples, pass it first, or "
                    f"batches of another size"
                ] = None

    def _place_steps(self, number: int, t: Tensor, packed: PackedSequence | None) -> None:
        """Each step of a packed sequence is that of an example."""
        if packed is None or int(packed.batch_sizes[0]) != self.space.rows:
            return
        place = self._places[number] = from_owners(owners_of_steps(packed), self.space, "the packed sequence")
        if place is not None:
            put(t, place)
            if t.grad_fn is not None:
                self.given.append((GradientEdge(t.grad_fn, t.output_nr), place))

    def inputs(self) -> list[tuple[Tensor, Place]]:
        """Those of the inputs that hold the examples, as far as they are alive."""
        pairs = ((reference(), place) for reference, place in zip(self._inputs, self._places, strict=True))
        return [(t, place) for t, place in pairs if t is not None and place is not None]

    def was_given(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the inputs, as a table of the model's own may be."""
        return any(reference() is tensor for reference in self._inputs)

    def settle(self, n: int) -> None:
        """The number of examples has turned up: bags of ids come as one flat list."""
        self.pending, self.settled, self.space = False, True, Space(self, n)
        self._place([t for reference in self._inputs if (t := reference()) is not None])

    def _sizes(self, values: Any) -> list[int]:
        """Along the axis of the examples; of a packed sequence how many it holds."""
        if _packed(values):
            return [size for value in values for size in self._sizes_of(value)]
        return [t.shape[self.batch_dim] for t in tensors_in(values) if t.dim() > self.batch_dim and not t.is_nested]

    def _sizes_of(self, value: Any) -> list[int]:
        if isinstance(value, PackedSequence):
            return [int(value.batch_sizes[0])]
        return self._sizes(_parts(value) or (value,))

    def finish(self, output: Any) -> None:
        """Note the sizes of the outputs too; the user's own tensors are not known any more."""
        self.output_sizes = self._sizes(output if type(output) is tuple else (output,))
        self.output_axes = {size for t in tensors_in(output) if not t.is_nested for size in t.shape}
        self._judge(list(tensors_in(output)))
        self._hint(list(tensors_in(output)))
        for t in tensors_in(output):
            if t.grad_fn is not None:
                metadata(t.grad_fn).setdefault(RETURNED, set()).add(t.output_nr)
        for t, _ in self.inputs():
            if not t.requires_grad:
                forget(t)

    def repeats_for_each(self, t: Tensor) -> bool:
        """Whether an output was computed from parameters alone, and is the same for all examples."""
        if not self._beside(t):
            return False
        return self.space.rows <= 1 or t.stride(self.batch_dim) == 0

    def _beside(self, t: Tensor) -> bool:
        """Whether an output was computed from parameters alone, and is as long as there are examples."""
        if self.pending or t.grad_fn is None or t.layout != torch.strided or t.is_nested or place_of(t) is not None:
            return False
        fits = t.dim() > self.batch_dim and t.shape[self.batch_dim] == self.space.rows
        return fits and not source_of(t).problem  # it may have been computed from data where nothing is followed

    def _hint(self, outputs: list[Tensor]) -> None:
        for number, t in enumerate(outputs):
            if self._beside(t):
                STATE.hints[
                    f"output {number + 1} of `{self.root_name}`, of shape {list(t.shape)}, was computed from "
                    f"parameters alone, so that its rows belong to nobody; what is brought to the shape of data by "
                    f"expand_as(data) has a row for each example"
                ] = None

    def _judge(self, outputs: list[Tensor]) -> None:
        """Mark outputs for which it is clear now that no loss of theirs has per-example gradients."""
        lost = None
        try:
            _ = self.n
        except BatchAxisError as error:
            lost = Lost(self, "", "", False, error)
        for t in outputs:
            place = place_of(t)
            if lost is None and isinstance(place, Place) and self._reordered(place):
                where = f"`{self.root_name}`"
                by = f" (from {place.space.made})" if place.space.made else ""
                why = f"returns the examples in another order than it was given them{by}, so that targets do not fit"
                lose([t], Lost(self, where, why, True))
            elif lost is None and isinstance(place, Place) and self._of_one(place, t, alone=len(outputs) == 1):
                why = (
                    f"returns rows for {self.space.rows} examples that were computed from one of them, and constants "
                    f"beside it, which do not tell whose they are; compute what stands for an example without data "
                    f"from its own row of a batch (a mask times a default, torch.where)"
                )
                lose([t], Lost(self, f"`{self.root_name}`", why, True, meets=True))
            elif lost is not None and t.grad_fn is not None:
                metadata(t.grad_fn)[LOST] = lost

    def _of_one(self, place: Place, t: Tensor, *, alone: bool) -> bool:
        """Whether a tensor that should have a row for each has the data of a single one; several may have one each."""
        if place.axis is not None or place.space.rows != 1 or self.space.rows <= 1:
            return False
        if not (alone or place.space.beside):
            return False
        return t.dim() > self.batch_dim and t.shape[self.batch_dim] == self.space.rows

    def _reordered(self, place: Place) -> bool:
        """Whether rows are all examples, but each in another's place."""
        if place.axis is None or place.space.owner is None or place.space.rows != self.space.rows:
            return False
        return torch.equal(
            place.space.owner.sort().values, torch.arange(self.space.rows, device=place.space.owner.device)
        )

    @property
    def n(self) -> int:
        """Number of examples: the size that the inputs share along the batch axis.

        Where they differ, that of the first input, if the output has an axis of this size too. A flat list of ids comes
        with offsets; then the number of bags tells.

        Raises:
            BatchAxisError: If there is no such size, or it is in doubt.
        """
        sizes, outputs = set(self.input_sizes), set(self.output_sizes)
        if self.settled and self.space.rows != self.input_sizes[0]:
            return self.space.rows
        if len(sizes) == 1 and (not self.listed or not outputs or sizes & outputs):
            return self.input_sizes[0]
        if len(sizes) > 1 and not self.listed and self._first_counts(sizes, outputs):
            return self.input_sizes[0]
        if len(sizes) > 1 and not self.listed and not self.pending and not self.output_axes:
            return self.input_sizes[0]
        raise BatchAxisError(
            f"The number of examples in the call of `{self.root_name}` cannot be told: its input tensors have the "
            f"sizes {self.input_sizes} along axis {self.batch_dim}, its outputs {self.output_sizes}. Pass the data as "
            f"tensors with the examples on that axis, the data first (what all examples share behind it, or as a "
            f"buffer of the model), or name another axis with extend(model, batch_dim=...). A list of one tensor for "
            f"each example (pad_sequence), and parts of examples in one row, as nodes of graphs, are padded to "
            f"[N, parts, ...], with a mask."
        )

    def _first_counts(self, sizes: set[int], outputs: set[int]) -> bool:
        """Whether inputs of other sizes are shared by all examples of the first.

        That is in doubt where the outputs have another's size in the place of the examples, as of data that comes
        behind prototypes; if the first has an axis of this size too, they are positions, as in time-major outputs.

        Returns:
            Whether they are.
        """
        first = self.input_sizes[0]
        if first in outputs:
            return True
        return first in {*self.output_axes, 1} and sizes & outputs <= self.other_axes

    def numbered(self, key: Any, name: str) -> str:
        """The name, with a number from its second use on."""
        count = self.calls[key] = self.calls.get(key, 0) + 1
        return name if count == 1 else f"{name}#{count}"


def _has_bags(module: nn.Module) -> bool:
    """Whether a layer in it, or a function that its code names, may be given the ids of all examples in one row."""
    return any(map(_takes_bags, module.modules()))


def _has_ends(module: nn.Module) -> bool:
    """Whether a layer in it is given an offset more than there are bags, and so as many as ids, by chance."""
    return any(getattr(part, "include_last_offset", False) for part in module.modules())


def _takes_bags(module: nn.Module) -> bool:
    rule = rule_for(module)
    return (rule is not None and rule.counts_rows) or any("embedding_bag" in _names(f) for f in _functions_of(module))


def _functions_of(module: nn.Module) -> Iterator[Any]:
    """The methods of a module, functions among its attributes, and those outside of it that these name."""
    kinds = type(module).__mro__
    for values in (vars(module), *map(vars, kinds[: kinds.index(nn.Module)])):
        for function in values.values():
            yield function
            yield from (function.__globals__.get(name) for name in _names(function) if inspect.isfunction(function))


def _names(function: Any) -> Collection[str]:
    """Of what the code of a function speaks."""
    return function.__code__.co_names if inspect.isfunction(function) else ()


def _packed(values: Iterable[Any]) -> list[PackedSequence]:
    """Packed sequences, in mappings and lists too."""
    found: list[PackedSequence] = []
    for value in values:
        found += [value] if isinstance(value, PackedSequence) else _packed(_parts(value))
    return found


def _parts(value: Any) -> Collection[Any]:
    """What a mapping, list or tuple holds; nothing of anything else."""
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
