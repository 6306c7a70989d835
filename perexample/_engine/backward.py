"""One backward: autograd runs once, and what arrives at the taps becomes fields of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from ..extension import Extension
from ..rule import Call, at_least_float32, checked_terms
from .coverage import check_coverage, check_divisors, number_of_examples, parameter_names
from .record import quiet
from .tap import Tap
from .view import ParameterView
from .walk import Walk

FIELDS: set[str] = set()  # every field that was ever written, for `unextend`


class Context(Protocol):
    """What a backward needs to know of the context it runs in."""

    extensions: tuple[Extension, ...]
    loss_reduction: str
    grad: bool

    @property
    def loss_scale(self) -> float:
        """A factor on the loss that is divided out again."""


class Backward:
    """One backward: gradients arrive at live taps, views fill, extensions compute."""

    def __init__(self, context: Context, found: Walk) -> None:
        """Find out all that can be wrong before anything is computed."""
        self.context, self.found = context, found
        self.names = parameter_names(found)
        check_coverage(found, self.names)
        self.n = number_of_examples(found)
        if self.n:
            if context.loss_reduction == "mean":
                check_divisors(found, self.n)
            for tap in found.taps:
                tap.axis = tap.batch_axis(self.n)
        scale = (self.n if context.loss_reduction == "mean" else 1.0) / context.loss_scale
        forwards = frozenset(tap.record for tap in found.taps)
        trainable = [(p, name) for p, name in self.names.values() if p.requires_grad]
        self.views = {id(p): ParameterView(name, p, self.n, scale, forwards) for p, name in trainable}
        self.arrived: dict[Tap, dict[int, Tensor]] = {tap: {} for tap in found.taps}
        self.pending = dict.fromkeys(self.views, 0)
        for tap in found.taps:
            for key in {id(p) for p in tap.params.values()}:
                self.pending[key] += 1
        self.unreached = [key for key, taps in self.pending.items() if not taps]
        self.results: dict[str, dict[int, Tensor]] = {extension.field: {} for extension in context.extensions}
        self.joint = any(extension.joint for extension in context.extensions)

    def execute(self, backward: Callable[[Any], None], retain: bool) -> None:
        """Run autograd once, then finish; fields are written only if all of it succeeded."""
        views = list(self.views.values())
        for extension in self.context.extensions:
            extension.start(views)
        for tap in self.found.taps:
            tap.run = self
            tap.hook_last()
        inputs = None if self.context.grad else [*self.found.edges, *self.found.leaves.values()]
        try:
            backward(inputs)
            self._finish(views)
        finally:
            for tap in self.found.taps:
                tap.run = None
        if not retain:
            for tap in self.found.taps:
                tap.release()

    def arrive(self, tap: Tap, index: int, g: Tensor | None) -> None:
        """Take the gradient of a tap's output; when all live outputs are there, ask the rule."""
        gradients = self.arrived[tap]
        if g is not None:
            gradients[index] = g.detach().reshape(tap.outputs[index][0])
        if len(gradients) == len(self.found.taps[tap]):
            self._complete(tap)

    def _complete(self, tap: Tap) -> None:
        gradients = self.arrived.pop(tap)
        if self.n and gradients:
            call = tap.call(self.n)  # before _plain(): a checkpoint runs its forward again here, taps and all
            with self._plain():
                self._add_terms(tap, call, gradients)
        for key in {id(p) for p in tap.params.values()}:
            self.pending[key] -= 1
            if not self.pending[key]:
                self._compute(self.views[key])

    def _add_terms(self, tap: Tap, call: Call, gradients: dict[int, Tensor]) -> None:
        g: Any = _upstream(tap, gradients)
        if not tap.rule.own_axes:
            axis = tap.axis
            g = g.movedim(axis, 0)
            call.saved |= {name: call.saved[name].movedim(axis, 0) for name in tap.rule.batched}
        for name, term in checked_terms(tap.rule, call, tap.rule.terms(call, g)).items():
            self.views[id(tap.params[name])].add(term)

    def _plain(self) -> AbstractContextManager:
        """Rules and extensions compute without gradients, taps or lower precision."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(quiet())
        for kind in {view.param.device.type for view in self.views.values()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def _compute(self, view: ParameterView) -> None:
        with self._plain():
            for extension in self.context.extensions:
                result = extension.compute(view)
                if result is not None:
                    self.results[extension.field][id(view.param)] = result
        if not self.joint:
            view.drop()

    def _finish(self, views: list[ParameterView]) -> None:
        for tap in list(self.arrived):
            self._complete(tap)
        for key in self.unreached:
            self._compute(self.views[key])
        by_name = {view.name: view for view in views}
        with self._plain():
            for extension in self.context.extensions:
                for name, result in extension.finish(views).items():
                    self.results[extension.field][id(by_name[name].param)] = result
        self._write()
        for extension in self.context.extensions:
            extension.commit()

    def _write(self) -> None:
        FIELDS.update(self.results)
        for field, results in self.results.items():
            for p, _ in self.names.values():
                if id(p) in results:
                    setattr(p, field, results[id(p)])
                elif hasattr(p, field):
                    delattr(p, field)


def _upstream(tap: Tap, gradients: dict[int, Tensor]) -> Any:
    """Gradients of all outputs, zeros for those the loss does not depend on, in at least float32."""
    full = []
    for index, (shape, dtype, device) in enumerate(tap.outputs):
        g = gradients.get(index)
        full.append(at_least_float32(torch.zeros(shape, dtype=dtype, device=device) if g is None else g))
    return full[0] if len(full) == 1 else tuple(full)
