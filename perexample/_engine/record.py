"""The forward side of modules: hooks that see every call and leave taps in the graph."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils.rnn import PackedSequence

from .._private import (
    calls_under_way,
    global_forward_hooks,
    has_backward_hooks,
    inside_functorch,
    is_bare,
    metadata,
    own_parameters,
    repeats_forward,
    run_first,
    runs_last,
    undispatched,
)
from .._tree import map_tensors, tensors_in, tensors_of
from ..errors import BatchAxisError
from ..place import Lost, Place, Space, from_owners
from ..rule import Rule, captured, refusal, rule_for, told, without_rule
from ..rules.generic import GenericRule, graded, is_own
from .follow import Follow, forget_followers, note_checkpoint, recognise
from .lost import is_sparse, lose, lost_if_sparse
from .operation import parted
from .owners import owners_of_steps
from .parts import tied
from .state import STATE, Frame
from .table import forget, forget_memory, place_of, put, put_on_edge
from .tap import LOST, RETURNED, Tap
from .walk import sees_through, source_of, tapped_only


class _Roots:
    """Every extended model that is alive; safe to read while another thread extends one."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, model: nn.Module) -> None:
        """Note a model."""
        if model not in self._models:
            with self._lock:
                self._models.add(model)

    def discard(self, model: nn.Module) -> None:
        """Forget a model."""
        with self._lock:
            self._models.discard(model)

    def __iter__(self) -> Iterator[nn.Module]:
        with self._lock:
            return iter(list(self._models))


ROOTS = _Roots()
_MOST_SHARED = 100
NESTED = (
    "is given a nested tensor, in which examples are not followed; give it padded data (to_padded_tensor) with a mask "
    "or lengths, or a packed sequence"
)
_GENERIC = GenericRule()


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
        self.pending, self.settled = flat_ids and len(set(self.input_sizes)) > 1 and _has_bags(module), False
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
        if len(sizes) == 1 and (not self.listed or not outputs or sizes & outputs):
            return self.input_sizes[0]
        if len(sizes) > 1 and self.space.rows != self.input_sizes[0] and not self.pending:
            return self.space.rows
        if len(sizes) > 1 and not self.listed and self._first_counts(sizes, outputs):
            return self.input_sizes[0]
        if len(sizes) > 1 and not self.listed and not self.pending and not self.output_axes:
            return self.input_sizes[0]
        raise BatchAxisError(
            f"The number of examples in the call of `{self.root_name}` cannot be told: its input tensors have the "
            f"sizes {self.input_sizes} along axis {self.batch_dim}, its outputs {self.output_sizes}. Pass the data as "
            f"tensors with the examples on that axis, the data first (what all examples share behind it, or as a "
            f"buffer of the model), or name another axis with extend(model, batch_dim=...)."
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
    """Whether a layer in it, or a function that a forward names, may be given the ids of all examples in one row."""
    return any(map(_takes_bags, module.modules()))


def _takes_bags(module: nn.Module) -> bool:
    rule = rule_for(module)
    codes = [getattr(function, "__code__", None) for function in (type(module).forward, *vars(module).values())]
    named = any("embedding_bag" in getattr(code, "co_names", ()) for code in codes)
    return named or (rule is not None and rule.counts_rows)


def _packed(values: Iterable[Any]) -> list[PackedSequence]:
    """Packed sequences, in mappings and lists too."""
    found: list[PackedSequence] = []
    for value in values:
        found += [value] if isinstance(value, PackedSequence) else _packed(_parts(value))
    return found


def _parts(value: Any) -> Collection[Any]:
    """What a mapping, list or tuple holds; nothing of anything else."""
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()


def forget_forwards() -> None:
    """Drop calls that an interrupt left behind; none can be under way where this is called."""
    STATE.frames.clear()
    forget_followers()


def unit_rule(module: nn.Module) -> Rule | None:
    """The rule of a module whose parameters are handled as one, ``None`` for one that is seen through."""
    return rule_for(module)


def may_be_opaque(module: nn.Module) -> bool:
    """Whether a module without a rule could do what operations do not show, and owns what it would do it with."""
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def owns_nothing(module: nn.Module) -> bool:
    """Whether only the operations inside of a module matter: most activations, dropout, and containers."""
    return is_bare(module) and without_rule(type(module)) and not has_backward_hooks(module)


def unit_parameters(module: nn.Module, rule: Rule) -> dict[str, Tensor]:
    """The tensors a rule answers for that need a gradient, by their names in the module."""
    named = module.named_parameters() if isinstance(rule, GenericRule) else own_parameters(module).items()
    return {name: p for name, p in named if p is not None and p.requires_grad}


class Enter:
    """Forward pre-hook: opens a frame, and with the outermost one a record."""

    def __init__(self, name: str, batch_dim: int, root: bool) -> None:
        """Hooks hold no reference to any module, so copies and pickles of a model stay whole."""
        self.name, self.batch_dim, self.root = name, batch_dim, root
        self.shared: set[tuple[int, int]] = set()  # of inputs, see `Record`

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Note what is called, and whether a tap is to be left; returns other arguments if some are to be tapped."""
        if STATE.quiet or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if STATE.frames and not self.root and owns_nothing(module):
            frame = self._inner(module)
            frame.named = True
            STATE.frames.append(frame)
            return None
        with undispatched():
            return self._enter(module, args, kwargs)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        frames = STATE.frames
        if self.root and frames and calls_under_way(frames[0].module) <= (frames[0].module is module):
            forget_forwards()  # an interrupt has left them behind
        if not torch.is_grad_enabled():
            if frames:  # so that the call's end does not take another frame for its own
                frames.append(Frame(module, frames[-1].record, self.name, inside=frames[-1].inside))
            return None
        run_first(module, Exit)
        if not frames and repeats_forward():
            recognise((args, kwargs))
            frame = self._inner(module)
        else:
            frame = self._inner(module) if frames else self._outermost(module, args, kwargs)
        if frame.inside:
            frames.append(frame)
            return None
        frame.parameters = tuple(module._parameters.values())
        # What a hook behind this one does to the arguments is followed, as the operations inside are then.
        rule = unit_rule(module) if runs_last(module, Enter) else None
        tied = None if rule is None or _no_states(rule) else _with_tied_states(rule, module, args, kwargs)
        frames.append(frame)
        args, kwargs = tied or (args, kwargs)
        inputs = tensors_of((args, kwargs) if kwargs else args)
        if has_backward_hooks(module):
            for t in inputs:
                put_on_edge(t)
        self._prepare(frame, rule, args, kwargs, inputs)
        return tied

    def _inner(self, module: nn.Module) -> Frame:
        frames, name = STATE.frames, self.name or type(module).__name__
        if not frames:
            return Frame(module, None, name, inside=False)
        record, inside = frames[-1].record, frames[-1].inside or frames[-1].rule is not None
        return Frame(module, record, record.numbered(id(module), name) if record else name, inside)

    def _outermost(self, module: nn.Module, args: tuple, kwargs: dict) -> Frame:
        if self.root:
            ROOTS.add(module)
        STATE.hints.clear()
        record = Record(module, self.name, self.batch_dim, args, kwargs, self.shared)
        if global_forward_hooks():
            record.refused.append(
                (
                    record.root_name,
                    "runs with a global forward hook (register_module_forward_hook), which may change outputs before "
                    "they are seen; remove the hook, or register it on modules",
                )
            )
        transformed = any(inside_functorch(t) for t in tensors_in((args, kwargs)))
        if transformed:
            STATE.hints[f"torch.func (vmap, grad, jacrev and others) around `{record.root_name}`"] = None
        frame = Frame(module, record, record.numbered(id(module), self.name or type(module).__name__), transformed)
        frame.follow = Follow()
        frame.follow.__enter__()
        return frame

    def _prepare(self, frame: Frame, rule: Rule | None, args: tuple, kwargs: dict, inputs: list[Tensor]) -> None:
        """Find the rule that answers for the call, or note why there can be none."""
        module = frame.module
        if (reason := refusal(module)) and frame.record:
            frame.record.refused.append((self.name or type(module).__name__, f"({type(module).__name__}) {reason}"))
        if rule is not None:
            if _answers(rule, module, args, kwargs, inputs, frame.record):
                frame.rule, frame.before = rule, rule.before(module, args, kwargs)
        elif may_be_opaque(module) and _tracked(inputs):
            frame.opaque, frame.before = True, _GENERIC.before(module, args, kwargs)


def _no_states(rule: Rule) -> bool:
    return type(rule).states is Rule.states


def _with_tied_states(rule: Rule, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The arguments with learned states brought to the rows of the data, by an addition of zeros that is tapped."""
    states = rule.states(module, args, kwargs)
    learned = {id(t): axis for t, axis in states if t.requires_grad and place_of(t) is None}
    if not learned:
        return None
    x = next(tensors_in((args, kwargs)))
    located = rule.locate(module, args, kwargs, [x], place_of) if isinstance(place_of(x), Place) else ""
    if isinstance(located, str):
        return None
    place = located[0]

    def in_rows(t: Tensor) -> Tensor:
        axis = learned.get(id(t))
        if axis is None or t.shape[axis] != place.size:
            return t
        return tied(t, place.at(axis))

    return map_tensors(in_rows, args), map_tensors(in_rows, kwargs)


def _with_tied_outputs(frame: Frame, output: Any) -> Any:
    """The output of a model with what only repeats parameters for each example brought to the rows of these."""
    record = frame.record
    if record is None or frame.rule is not None or frame.inside:
        return output
    repeated = {id(t) for t in tensors_in(output) if record.repeats_for_each(t)}
    if not repeated:
        return output
    STATE.frames.append(frame)  # so that the addition is named
    try:
        place = Place(record.space, record.batch_dim)
        return map_tensors(lambda t: tied(t, place) if id(t) in repeated else t, output)
    finally:
        STATE.frames.pop()


def _tracked(tensors: Iterable[Tensor]) -> bool:
    for t in tensors:  # noqa: SIM110 - a generator takes twice as long
        if place_of(t) is not None:
            return True
    return False


def _answers(
    rule: Rule, module: nn.Module, args: tuple, kwargs: dict, inputs: list[Tensor], record: Record | None
) -> bool:
    """Whether a call is to be tapped: parameters that do not depend on the batch meet data that does."""
    params = unit_parameters(module, rule)
    if not params or _tracked(params.values()):
        return False
    tracked = False
    for t in inputs:
        if place_of(t) is not None:
            tracked = True
        elif t.requires_grad:
            return False  # parameters among the inputs: the operations inside are tapped one by one
    if kwargs:
        args, kwargs = _bound(module, args, kwargs)
    if not told(rule, "handles", type(module).__name__, module, args, kwargs):
        return False
    return tracked or (record is not None and rule.counts_rows)


class Exit:
    """Forward hook: closes the frame and leaves the tap; runs after a failed forward too."""

    @property
    def __name__(self) -> str:
        """What `torch.jit.script` asks a hook for, before it would compile it."""
        raise AttributeError(
            "An extended model cannot be scripted, as its hooks would be compiled with it: call "
            "perexample.unextend(model) before, and extend(model) to train it again."
        )

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Leave a tap if a rule answers for this module and its output carries gradients."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        frames = STATE.frames
        if STATE.quiet or not frames:
            return None
        top = frames[-1]
        if top.module is not module and not any(frame.module is module for frame in frames):
            return None
        if top.named and top.module is module and is_bare(module):
            frames.pop()
            return None
        with undispatched():
            return self._leave(module, args, kwargs, output)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        frames = STATE.frames
        while (frame := frames.pop()).module is not module:
            _close(frame)  # calls that ended without their hook
        try:
            if frame.rule is not None and output is not None:
                output = leave_call(frame.rule, frame, args, kwargs, output)
            elif frame.opaque and output is not None:
                output = _leave_opaque(frame, args, kwargs, output)
            if not frames:
                output = _with_tied_outputs(frame, output)
        finally:
            _close(frame)
        if module._buffers or not frames or _touched(module._parameters.values(), frame.parameters):
            _refuse_written(frame, module if frames else None)
        checkpointed = frame.record is not None and frame.record.checkpointed
        if (checkpointed or has_backward_hooks(module)) and output is not None:
            for t in tensors_in(output):
                put_on_edge(t)
        if not frames and frame.record is not None:
            frame.record.finish(output)
        return output


def _refuse_written(frame: Frame, inner: nn.Module | None) -> None:
    """Data that a forward writes into a buffer or parameter reaches the model past all gradients.

    Most modules write their own; all others are looked at when the outermost call ends, if data was written.
    """
    record = frame.record
    if record is None or not (inner is None and record.wrote):
        named = [(frame.name, frame.module)]
    else:
        named = [(path or frame.name, module) for path, module in frame.module.named_modules()]
    for path, module in named:
        written = [
            (name, "buffer", t) for name, t in module._buffers.items() if t is not None and place_of(t) is not None
        ]
        for name, p in module._parameters.items():  # in a functional call there is something else in its place
            if isinstance(p, nn.Parameter) and place_of(p) is not None:
                written.append((name, "parameter", p))
        for name, what, t in written:
            if record is not None and record.was_given(t):
                continue
            forget_memory(t)
            if record is not None:
                reason = (
                    f"({type(module).__name__}) has a {what} `{name}` that the forward changes according to the data, "
                    f"past all gradients; keep data out of buffers and parameters, or call .eval() if they are then "
                    f"left alone"
                )
                record.refused.append((path, reason))
    if record is not None:
        _refuse_replaced(frame, record)


def _touched(now: Collection[Any], before: tuple[Any, ...]) -> bool:
    """Whether a parameter is another one, or holds data; asked of every module that has some."""
    if len(now) != len(before):
        return True
    for p, old in zip(now, before, strict=True):  # noqa: SIM110 - a generator takes twice as long
        if p is not old or (p is not None and place_of(p) is not None):
            return True
    return False


def _refuse_replaced(frame: Frame, record: Record) -> None:
    """A parameter that a forward makes anew may be made of data, which is not seen."""
    own = frame.module._parameters
    if len(own) != len(frame.parameters):
        return  # it has got or lost some, which the optimizer does not know
    for (name, now), before in zip(own.items(), frame.parameters, strict=True):
        if now is before or not isinstance(now, nn.Parameter) or not isinstance(before, nn.Parameter):
            continue
        root = STATE.frames[0].module if STATE.frames else frame.module
        others = (p for m in root.modules() for key, p in m._parameters.items() if (m, key) != (frame.module, name))
        if not any(now is p for p in others):  # else it was tied to another one
            reason = (
                f"({type(frame.module).__name__}) has a parameter `{name}` that the forward replaces by a new one, "
                f"which may be made of the data, past all gradients; keep the parameter, and compute what is to be "
                f"used instead in the forward"
            )
            record.refused.append((frame.name, reason))


def _close(frame: Frame) -> None:
    if frame.follow is not None:
        frame.follow.leave()
        frame.follow = None


def _leave_opaque(frame: Frame, args: tuple, kwargs: dict, output: Any) -> Any:
    """Tap a leaf module as a whole where what it did could not be followed, as in a function of its own."""
    outputs = graded(output)
    edges = Tap.edges_of(list(tensors_in((args, kwargs))))
    if all(tapped_only(t, edges) if place_of(t) is not None else sees_through(t) for t in outputs):
        return output
    frame.rule = _GENERIC
    return leave_call(_GENERIC, frame, args, kwargs, output)


def leave_call(rule: Rule, frame: Frame, args: tuple, kwargs: dict, output: Any) -> Any:
    """Tap a module's outputs; returns the output to go on with."""
    module = frame.module
    inputs, results = tensors_of((args, kwargs) if kwargs else args), tensors_of(output)
    known: list[Place] = []
    for t in inputs:
        place = place_of(t)
        if isinstance(place, Lost):
            if any(t is order for order in rule.orders(args)):
                continue
            lose(results, place)
            return output
        if place is not None and is_sparse(t) and not isinstance(rule, GenericRule):
            where = f"`{frame.name}` ({type(module).__name__})"
            lose(results, lost_if_sparse(frame.record or place.space.record, where, t))
            return output
        if place is not None:
            known.append(place)
    if kwargs:
        args, kwargs = _bound(module, args, kwargs)
    record = frame.record or known[0].space.record
    located = _located(rule, frame, args, kwargs, bool(known), results, record)
    if isinstance(located, str):
        where = f"`{frame.name}` ({type(module).__name__})"
        mixes = "several examples" in located
        lose(results, Lost(record, where, located, mixes))
        return output
    place, places = located
    tapped = [is_own(t, inputs) for t in results]
    if not any(tapped):
        _put_all(results, places)
        return output
    saved = captured(rule, module, args, kwargs, output, frame.name, moved=bool(place.axis) or place.folded)
    if isinstance(rule, GenericRule):
        saved = saved | rule.after(module, frame.before)
    elif frame.before:
        saved = saved | frame.before
    if sum(tapped) > 1:
        output = parted(output)
        results = list(tensors_in(output))
    outputs = [t for t, own in zip(results, tapped, strict=True) if own]
    _put_all(results, places)
    note_checkpoint(record)
    kept = [p for own, p in zip(tapped, places, strict=True) if own and p is not None]
    tap = Tap(frame.name, rule, module, unit_parameters(module, rule), record, saved, place, kept)
    tap.attach(outputs, Tap.edges_of(inputs), inputs)
    if len(outputs) < len(results) and not isinstance(rule, GenericRule):
        shown = [p is not None and _may_require_grad(t) for t, p in zip(results, places, strict=True)]
        tap.leave_out([(t, own) for t, own, one in zip(results, tapped, shown, strict=True) if one])
    return output


def _put_all(tensors: Any, places: Sequence[Place | None]) -> None:
    for t, place in zip(tensors, places, strict=True):
        if place is not None:
            put(t, place)


def _located(
    rule: Rule, frame: Frame, args: tuple, kwargs: dict, tracked: bool, outputs: list[Tensor], record: Record
) -> tuple[Place, Sequence[Place | None]] | str:
    """Where the call holds the rows, and that the outputs are of the sizes that this means."""
    if not tracked:  # bags of ids: one row of the output each
        if record.pending:
            record.settle(outputs[0].shape[0])
        if record.space.rows != outputs[0].shape[0]:
            return f"gives {outputs[0].shape[0]} rows for {record.space.rows} examples"
        rows = Place(record.space, 0)
        return rows, [rows] * len(outputs)
    located = rule.locate(frame.module, args, kwargs, outputs, place_of)
    if isinstance(located, str):
        return located
    for t, place in zip(outputs, located[1], strict=True):
        if place is None or (axis := place.axis) is None:
            continue
        if t.dim() <= axis or t.shape[axis] != place.size:
            return f"gives an output of shape {list(t.shape)}, in which axis {axis} does not hold the examples"
    return located


def _bound(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments in the order in which ``forward`` names them, however they were passed."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    return bound.args, bound.kwargs


def _may_require_grad(t: Tensor) -> bool:
    """Whether there could be a gradient, with other things frozen."""
    return t.is_floating_point() or t.is_complex()
