"""The forward side: hooks that see every call of a module and leave taps in the graph."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize

from .._private import calls_under_way, global_forward_hooks, inside_functorch, kept_state, own_parameters, run_first
from .._tree import map_tensors, tensors_in
from ..errors import BatchAxisError
from ..rule import Rule, refusal, rule_for
from ..rules.generic import GenericRule, graded
from .probe import Places, explore, places_of, tensors_of
from .tap import Tap


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
_GENERIC = GenericRule()


class Record:
    """One outermost forward of an extended model.

    Attributes:
        module: The module that was called.
        root_name: How it is named in messages.
        batch_dim: Axis of the inputs that holds the examples.
        refused: Modules called in it that mix examples, with the reason.
        shapes: Shapes of the outputs of each tapped call.
        arguments: The inputs, kept as long as it is not known where the tapped calls hold the examples.
    """

    def __init__(self, module: nn.Module, name: str, batch_dim: int, args: tuple, kwargs: dict) -> None:
        """Note the sizes of the inputs along the batch axis."""
        self.module, self.root_name, self.batch_dim = module, name or type(module).__name__, batch_dim
        tensors = list(tensors_in((args, kwargs)))
        self.input_sizes, self.output_sizes = self._sizes(tensors), list[int]()
        self.output_axes: set[int] = set()
        self.listed = any(isinstance(a, list) and len(list(tensors_in(a))) > 1 for a in (*args, *kwargs.values()))
        self.flat_ids = bool(tensors) and tensors[0].dim() == 1 and not tensors[0].is_floating_point()
        self.signature = _signature((args, kwargs), module.training, batch_dim)
        self.refused: list[tuple[str, str]] = []
        self.shapes: dict[str, list[torch.Size]] = {}
        self.arguments: tuple[tuple, dict] | None = (args, kwargs)
        self.calls: dict[int, int] = {}

    def _sizes(self, tree: Any) -> list[int]:
        return [t.shape[self.batch_dim] for t in tensors_in(tree) if t.dim() > self.batch_dim]

    def finish(self, output: Any) -> None:
        """Note the sizes of the outputs too; let go of the inputs if they are not needed any more."""
        self.output_sizes = self._sizes(output)
        self.output_axes = {size for t in tensors_in(output) for size in t.shape}
        places = places_of(self)
        if all(places.known(call) for call in self.shapes):
            self.arguments = None

    def places(self) -> Places:
        """Where each tapped call holds the examples; runs the forward once more if that is not known yet."""
        places = places_of(self)
        if self.arguments is not None and not all(places.known(call) for call in self.shapes):
            explore(self, self.n, self._again)
        self.arguments = None
        return places

    def _again(self, args: tuple, kwargs: dict) -> dict[str, list[torch.Size]]:
        devices = {t.device for t in tensors_in((args, kwargs)) if t.device.type == "cuda"}
        buffers = [(b, b.clone()) for b in self.module.buffers()]
        shapes: dict[str, list[torch.Size]] = {}
        with torch.no_grad(), torch.random.fork_rng(devices), observing(shapes), kept_state(self.module):
            try:
                self.module(*args, **kwargs)
            finally:
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
        return shapes

    @property
    def n(self) -> int:
        """Number of examples: the size that the inputs share along the batch axis.

        Where they differ, that of the first input, if the output has an axis of this size too. A flat list of ids comes
        with offsets; then the output alone tells.

        Raises:
            BatchAxisError: If there is no such size, or it is in doubt.
        """
        sizes, outputs = set(self.input_sizes), set(self.output_sizes)
        if len(sizes) == 1 and (not self.listed or not outputs or sizes & outputs):
            return self.input_sizes[0]
        if len(sizes) > 1 and self.flat_ids and len(outputs) == 1:
            return self.output_sizes[0]
        if len(sizes) > 1 and not self.listed and self.input_sizes[0] in self.output_axes:
            return self.input_sizes[0]
        raise BatchAxisError(
            f"The number of examples in the call of `{self.root_name}` cannot be told: its input tensors have the "
            f"sizes {self.input_sizes} along axis {self.batch_dim}, its outputs {self.output_sizes}. Pass the data as "
            f"tensors with the examples on that axis, the data first, or name another axis with "
            f"extend(model, batch_dim=...)."
        )

    def call_name(self, module: nn.Module, name: str) -> str:
        """The module's path, with a number from its second call on."""
        count = self.calls[id(module)] = self.calls.get(id(module), 0) + 1
        name = name or type(module).__name__
        return name if count == 1 else f"{name}#{count}"


def _signature(arguments: Any, training: bool, batch_dim: int) -> Any:
    """What may decide how a forward arranges its axes: ranks of tensors, switches, names, the mode."""

    def part(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return tuple((str(key), part(value)) for key, value in tree.items())
        if isinstance(tree, (tuple, list)):
            return tuple(part(value) for value in tree)
        if isinstance(tree, Tensor):
            return tree.dim()
        return tree if isinstance(tree, (bool, str)) else type(tree)

    return part(arguments), training, batch_dim


@dataclass
class _Frame:
    """A module call under way."""

    module: nn.Module
    record: Record
    name: str
    inside: bool  # below a tap, or where hooks must stay silent
    rule: Rule | None = None
    before: dict[str, Any] = field(default_factory=dict)


class _State(threading.local):
    """What is under way in this thread."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.quiet = 0
        self.observed: dict[str, list[torch.Size]] | None = None


_STATE = _State()


@contextmanager
def quiet() -> Iterator[None]:
    """Rules may call modules: no taps then."""
    _STATE.quiet += 1
    try:
        yield
    finally:
        _STATE.quiet -= 1


@contextmanager
def observing(shapes: dict[str, list[torch.Size]]) -> Iterator[None]:
    """Note the shapes of the outputs of all calls, and leave no taps."""
    kept, _STATE.frames, _STATE.observed = _STATE.frames, [], shapes
    try:
        yield
    finally:
        _STATE.frames, _STATE.observed = kept, None


def forget_forwards() -> None:
    """Drop calls that an interrupt left behind; none can be under way where this is called."""
    _STATE.frames.clear()


def unit_rule(module: nn.Module) -> Rule | None:
    """The rule of a module whose parameters are handled as one, ``None`` for one that only contains others."""
    rule = rule_for(module)
    if rule is not None:
        return rule
    leaf = next(module.children(), None) is None
    return _GENERIC if leaf or parametrize.is_parametrized(module) else None


def unit_parameters(module: nn.Module, rule: Rule) -> dict[str, nn.Parameter]:
    """The parameters a rule answers for that need a gradient, by their names in the module."""
    named = module.named_parameters() if isinstance(rule, GenericRule) else own_parameters(module).items()
    return {name: p for name, p in named if p is not None and p.requires_grad}


class Enter:
    """Forward pre-hook: opens a frame, and with the outermost one a record."""

    def __init__(self, name: str, batch_dim: int, root: bool) -> None:
        """Hooks hold no reference to any module, so copies and pickles of a model stay whole."""
        self.name, self.batch_dim, self.root = name, batch_dim, root

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what is called, and whether a tap is to be left."""
        if _STATE.quiet or torch.compiler.is_compiling():
            return
        observed, frames = _STATE.observed is not None, _STATE.frames
        if self.root and frames and calls_under_way(frames[0].module) <= (frames[0].module is module):
            frames.clear()  # an interrupt has left them behind
        if not observed and not torch.is_grad_enabled():
            if frames:  # so that the call's end does not take another frame for its own
                frames.append(_Frame(module, frames[-1].record, self.name, inside=True))
            return
        run_first(module, Exit)
        if frames:
            record, inside = frames[-1].record, frames[-1].inside or frames[-1].rule is not None
        else:
            record, inside = self._open(module, args, kwargs)
        frame = _Frame(module, record, record.call_name(module, self.name), inside)
        frames.append(frame)
        if not inside and not observed:
            self._prepare(frame, args, kwargs)

    def _prepare(self, frame: _Frame, args: tuple, kwargs: dict) -> None:
        """Find the rule that answers for the call, or note why there can be none."""
        module = frame.module
        if reason := refusal(module):
            frame.record.refused.append((self.name or type(module).__name__, f"({type(module).__name__}) {reason}"))
        rule = unit_rule(module)
        if rule is not None and unit_parameters(module, rule):
            frame.rule = rule
            if isinstance(rule, GenericRule):
                frame.before = rule.before(module, args, kwargs)

    def _open(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[Record, bool]:
        if self.root:
            ROOTS.add(module)
        record = Record(module, self.name, self.batch_dim, args, kwargs)
        if global_forward_hooks():
            record.refused.append(
                (
                    record.root_name,
                    "runs with a global forward hook (register_module_forward_hook), which may change outputs before "
                    "they are seen; remove the hook, or register it on modules",
                )
            )
        transformed = any(inside_functorch(t) for t in tensors_in((args, kwargs)))
        return record, transformed


class Exit:
    """Forward hook: closes the frame and leaves the tap; runs after a failed forward too."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Leave a tap if a rule answers for this module and its output carries gradients."""
        frames = _STATE.frames
        if _STATE.quiet or not any(frame.module is module for frame in frames):
            return None
        while (frame := frames.pop()).module is not module:
            pass  # frames of calls that ended without their hook
        if _STATE.observed is not None:
            _STATE.observed[frame.name] = tensors_of(output)
            return None
        if frame.rule is not None and output is not None:
            output = _leave_tap(frame, args, kwargs, output)
        if not frames:
            frame.record.finish(output)
        return output


def _leave_tap(frame: _Frame, args: tuple, kwargs: dict, output: Any) -> Any:
    """Tap the outputs; returns the output to go on with."""
    module, rule, record = frame.module, frame.rule, frame.record
    assert rule is not None
    inputs = list(tensors_in((args, kwargs)))
    outputs = [t for t in graded(output) if t.grad_fn is not None and not _is_input(t, inputs)]
    if not outputs or len(outputs) != len(graded(output)):
        return output
    args, kwargs = _bound(module, args, kwargs)
    saved = rule.capture(module, args, kwargs, output)
    if isinstance(rule, GenericRule):
        saved |= rule.after(module, frame.before)
    if len(outputs) > 1:
        # One output may be computed from another inside the module. Views part what arrives from outside from that.
        output = map_tensors(lambda t: t.view_as(t) if t.requires_grad else t, output)
        outputs = graded(output)
    record.shapes[frame.name] = tensors_of(output)
    tap = Tap(frame.name, rule, module, unit_parameters(module, rule), record, saved)
    tap.place = next(i for i, t in enumerate(tensors_in(output)) if t is outputs[0])
    tap.attach(outputs, inputs)
    return output


def _bound(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments in the order in which ``forward`` names them, however they were passed."""
    if not kwargs:
        return args, kwargs
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    return bound.args, bound.kwargs


def _is_input(output: Tensor, inputs: list[Tensor]) -> bool:
    """Whether a module hands an input through, so that its parameters took no part."""
    edge = get_gradient_edge(output)
    return any(t.grad_fn is edge.node and t.output_nr == edge.output_nr for t in inputs)
