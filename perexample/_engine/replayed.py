"""A backward through one call of a model that was recorded: autograd runs to its outputs, and the rest is replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._private import named_parameters, undispatched
from .._tree import tensors_of
from ..errors import ConfigurationError, StaleGradientError
from ..extension import Extension
from ..place import Place
from ..rule import Rule, at_least_float32
from .backward import Backward, Context
from .record import Record
from .table import put
from .tap import Tap
from .walk import Walk, walk


class Pending(Protocol):
    """A call that waits for the gradients of its outputs.

    Attributes:
        name: Of what has recorded it, for messages.
        extensions: Those that it was recorded with.
        options: Options of the context that it was recorded with, by their names.
        expected: Whether the backward that is under way is one of these.
    """

    name: str
    extensions: list[Extension]
    options: dict[str, Any]
    expected: bool

    def replay(self, gradients: Sequence[Tensor | None], factor: float) -> bool:
        """Leave what a backward leaves.

        Args:
            gradients: Of the examples' own losses, for each output that carries gradients.
            factor: What gradients of the sum of these are to be multiplied with, to be those of the loss.

        Returns:
            Whether it could be done; else nothing has changed.
        """

    def again(self) -> list[Tensor]:
        """The outputs that carry gradients of the same call as usual."""


class Whole(Rule):
    """Stands for a model as a whole: the gradients of its parameters come from a replay, not from terms."""

    def __init__(self, pending: Pending) -> None:
        """Of one call."""
        self.pending = pending

    def terms(self, call: Any, g: Any) -> Any:
        """Never asked."""
        raise AssertionError("a call that is replayed has no terms")


class _Outputs(torch.autograd.Function):
    """Gives outputs that were computed without autograd a place in the graph."""

    @staticmethod
    def forward(ctx: Any, pending: Pending, outputs: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.pending, ctx.given = pending, 2 + len(parameters)  # all of them, as any may be asked for its gradient
        return tuple(t.data for t in outputs)  # no views, which could not be written to

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.pending.expected:  # torch calls it also where the gradients of the outputs alone are wanted
            return (None,) * ctx.given
        raise ConfigurationError(
            f"A backward has reached the outputs of a {ctx.pending.name}, which knows the gradients of its parameters "
            f"in perex alone: `with perex(clipping, grad=False): loss.backward()`. For other gradients of them, as by "
            f"torch.autograd.grad, call the model itself."
        )


def leave(model: nn.Module, args: tuple, kwargs: dict, outputs: list[Tensor], pending: Pending) -> list[Tensor]:
    """Note a call of a model whose outputs were computed without autograd.

    Args:
        model: The model.
        args: Its arguments, with the examples on the first axis of each tensor.
        kwargs: Its keyword arguments, in the same way.
        outputs: Those that carry gradients.
        pending: What waits for these.

    Returns:
        The outputs to go on with.
    """
    with undispatched():  # a context would take our hooks for the user's
        return _left(model, args, kwargs, outputs, pending)


def _left(model: nn.Module, args: tuple, kwargs: dict, outputs: list[Tensor], pending: Pending) -> list[Tensor]:
    params = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    record = Record(model, type(model).__name__, 0, args, kwargs, set())
    place = Place(record.space, 0)
    outputs = list(_Outputs.apply(pending, outputs, *params.values()))
    for t in outputs:
        put(t, place)
    saved = {"inputs": tensors_of((args, kwargs))}
    tap = Tap(record.root_name, Whole(pending), model, params, record, saved, place, [place] * len(outputs))
    tap.attach(outputs, [], [])
    record.finish(outputs)
    return outputs


def backward_of(context: Context, loss: Tensor, found: Walk) -> Backward:
    """The backward of a loss: of a call that was recorded, or of any others."""
    replayed = any(type(tap.rule) is Whole for tap in found.taps)
    return Replayed(context, loss, found) if replayed else Backward(context, loss, found)


class Replayed(Backward):
    """A backward through a call that was recorded."""

    call: Pending

    def _prepare(self) -> None:
        """See whether it is what was recorded."""
        whole = [tap for tap in self.found.taps if isinstance(tap.rule, Whole)]
        assert isinstance(whole[0].rule, Whole)
        self.tap, self.call = whole[0], whole[0].rule.pending
        name, context = self.call.name, self.context
        if len(self.found.taps) > 1:
            what = f"several calls of a {name}" if len(whole) > 1 else f"a call of a {name} and other extended models"
            raise ConfigurationError(
                f"The loss depends on {what}, and the gradients of each example would have to be added up over them. "
                f"Extend and record a model whose forward makes all these calls, or call the model itself."
            )
        if context.grad and not self.call.options["grad"]:
            raise ConfigurationError(
                f"A {name} was recorded without p.grad: leave it out (perex(..., grad=False)), or record another one "
                f"with grad=True."
            )
        same = len(context.extensions) == len(self.call.extensions)
        if not same or any(a is not b for a, b in zip(context.extensions, self.call.extensions, strict=True)):
            kinds = ", ".join(type(extension).__name__ for extension in self.call.extensions)
            raise ConfigurationError(
                f"A {name} was recorded with other extensions than perex has now: give perex the same objects in the "
                f"same order ({kinds}), or record another one."
            )
        known = {id(p) for p in self.tap.params.values()}
        for key, (p, own) in self.names.items():
            if p.requires_grad and key not in known:
                raise StaleGradientError(
                    f"Parameter `{own}` is trainable, and was not when the {name} was made, or is not of its model but "
                    f"of another extended one that shares parameters with it, so that its field would be missing. "
                    f"Unfreeze it before, record a model that holds it, or call the model itself."
                )
        if context.max_memory is not None:
            raise ConfigurationError(f"A {name} does not keep to perex(max_memory=...); call the model itself.")
        other = [key for key, value in self.call.options.items() if getattr(context, key) != value]
        if other:
            raise ConfigurationError(
                f"A {name} was recorded with {other[0]}={self.call.options[other[0]]!r}, and perex has "
                f"{getattr(context, other[0])!r}; give both the same."
            )

    def execute(self, backward: Callable[[Any, bool], None], retain: bool) -> None:
        """Run autograd to the outputs, then the replay; if that cannot be used, the call again as usual."""
        if retain:
            raise ConfigurationError(
                f"The outputs of a {self.call.name} can be differentiated once: leave retain_graph and create_graph "
                f"out, and add up the losses."
            )
        tap = self.tap
        self.gradients: list[Tensor | None] = [None] * len(tap.outputs)
        tap.run, self.call.expected = self, True
        tap.hook_last()
        try:
            inputs = None if self.context.grad else [*self.found.edges, *self.found.leaves.values()]
            backward(inputs, False)
        finally:
            tap.run, self.call.expected = None, False
        tap.refuse_changes()
        tap.release()
        # What is rounded to 16 bits would be rounded again where a factor on the loss is divided out.
        exact = self.scale == 1.0 or all(g is None or g.dtype.itemsize > 2 for g in self.gradients)
        own = [g if g is None or self.scale == 1.0 else g * self.scale for g in self.gradients]
        factor = 1 / self.scale if self.scale else 1.0  # of no examples the gradients are zero
        if not exact or not self.call.replay(own, factor):
            self._as_usual(factor)

    def arrive(self, tap: Tap, index: int, g: Tensor | None) -> None:
        """Take the gradient of an output."""
        if g is not None:
            self.gradients[index] = tap.in_shape(index, g.detach())

    def _as_usual(self, factor: float) -> None:
        """The same gradients of the outputs, with the call as any other."""
        outputs = self.call.again()
        pairs = [(t, g) for t, g in zip(outputs, self.gradients, strict=True) if g is not None]
        with torch.enable_grad():
            loss = reduce(torch.add, [at_least_float32((t * g).sum()) for t, g in pairs])
        of = self.context
        context = _Sum(of.extensions, factor, of.strategy, of.room, of.grad)
        run = Backward(context, loss, walk([loss]))
        run.execute(lambda inputs, keep: torch.autograd.backward(loss, None, keep, inputs=inputs), False)


@dataclass
class _Sum:
    """The context of a loss that is the sum of the examples' own, times a factor."""

    extensions: tuple[Extension, ...]
    loss_scale: float
    strategy: str
    room: float
    grad: bool
    loss_reduction: str = "sum"
    max_memory: int | None = None
