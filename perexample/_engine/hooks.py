"""The forward side of modules: hooks that see every call of an extended model's modules."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._private import (
    calls_under_way,
    global_forward_hooks,
    has_backward_hooks,
    inside_functorch,
    is_bare,
    repeats_forward,
    run_first,
    runs_last,
    undispatched,
)
from .._tree import tensors_in, tensors_of
from ..errors import UnsupportedModuleError
from ..rule import Rule, refusal, rule_for, without_rule
from .follow import Follow, forget_followers, recognise
from .parts import has_no_states, with_tied_outputs, with_tied_states
from .record import NESTED, Record
from .state import STATE, Frame
from .table import put_on_edge
from .units import GENERIC, answers, depend_on_batch, leave_call, leave_opaque, may_be_opaque
from .written import refuse_written, touched


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


def forget_forwards() -> None:
    """Drop calls that an interrupt left behind; none can be under way where this is called."""
    STATE.frames.clear()
    forget_followers()


def owns_nothing(module: nn.Module) -> bool:
    """Whether only the operations inside of a module matter: most activations, dropout, and containers."""
    return is_bare(module) and without_rule(type(module)) and not has_backward_hooks(module)


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
        if isinstance(module, nn.MultiheadAttention) and (frames or torch.is_grad_enabled()):
            self._refuse_nested(args, kwargs)
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
        rule = rule_for(module) if runs_last(module, Enter) else None
        tied = None if rule is None or has_no_states(rule) else with_tied_states(rule, module, args, kwargs)
        frames.append(frame)
        args, kwargs = tied or (args, kwargs)
        inputs = tensors_of((args, kwargs) if kwargs else args)
        if has_backward_hooks(module):
            for t in inputs:
                put_on_edge(t)
        self._prepare(frame, rule, args, kwargs, inputs)
        return tied

    def _refuse_nested(self, args: tuple, kwargs: dict) -> None:
        """Attention takes them on a path without gradients and modes alone, and says that a mode is in the way."""
        if any(t.is_nested for t in tensors_in((args, kwargs))):
            raise UnsupportedModuleError(f"`{self.name or 'MultiheadAttention'}` (MultiheadAttention) {NESTED}.")

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
            if answers(rule, module, args, kwargs, inputs, frame.record):
                frame.rule, frame.before = rule, rule.before(module, args, kwargs)
        elif may_be_opaque(module) and depend_on_batch(inputs):
            frame.opaque, frame.before = True, GENERIC.before(module, args, kwargs)


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
                output = leave_opaque(frame, args, kwargs, output)
            if not frames:
                output = with_tied_outputs(frame, output)
        finally:
            _close(frame)
        if module._buffers or not frames or touched(module._parameters.values(), frame.parameters):
            refuse_written(frame, module if frames else None)
        checkpointed = frame.record is not None and frame.record.checkpointed
        if (checkpointed or has_backward_hooks(module)) and output is not None:
            for t in tensors_in(output):
                put_on_edge(t)
        if not frames and frame.record is not None:
            frame.record.finish(output)
        return output


def _close(frame: Frame) -> None:
    if frame.follow is not None:
        frame.follow.leave()
        frame.follow = None
