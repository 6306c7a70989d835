"""The forward of a recurrent layer by the rule itself, whose backward and the rule's terms go back through it once.

torch's own backward on a CPU computes the gradients of the weights whether or not they are wanted, and shows nothing
of the gradients in between, so that the rule would have to run the layer again and go back through it again. Here the
steps are made one by one and their gates are kept. The gradients of the outputs reach the rule first; it goes back, and
leaves the gradients of the inputs for the node in the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._looks import holds
from .._private import graph_task, transforms_active, undispatched, version, will_be_executed
from .generic import random_state, restored
from .recurrent_stack import Kind, Layout, Stack
from .recurrent_steps import GRU, LSTM, Relu, Tanh
from .unrolled import KINDS, Unrolled

_ALGEBRAS: dict[Any, type[Unrolled]] = {torch.lstm: LSTM, torch.gru: GRU, torch.rnn_tanh: Tanh, torch.rnn_relu: Relu}
FUNCTIONS = frozenset(_ALGEBRAS)


class Passing:
    """What one forward leaves for its backward: the node in the graph, and gradients on their way to it."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.node: Callable[[], Any] = lambda: None
        self._kept: tuple[int, list[tuple[Tensor, int]], list[Tensor | None]] | None = None

    def leave(self, upstream: Sequence[Tensor], gradients: list[Tensor | None]) -> None:
        """Gradients of all inputs, computed from these of the outputs."""
        self._kept = graph_task(), [(t, version(t)) for t in upstream], gradients

    def take(self, upstream: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """What was left in this backward, if it was computed from the very same gradients of the outputs."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0] != graph_task():
            return None
        return kept[2] if all(_same(t, *before) for t, before in zip(upstream, kept[1], strict=True)) else None


def _same(t: Tensor | None, before: Tensor, count: int) -> bool:
    """Whether a gradient is one that was seen before, and that nobody has written into since."""
    if version(before) != count:
        return False
    if t is None:
        return holds(before == 0)
    return t.shape == before.shape and t.dtype == before.dtype and (_one_memory(t, before) or torch.equal(t, before))


def _one_memory(t: Tensor, other: Tensor) -> bool:
    return t.data_ptr() == other.data_ptr() and t.stride() == other.stride()


@dataclass(frozen=True)
class _Called:
    """A call of a torch function, without its tensors.

    Attributes:
        function: What was called.
        kind: What the layers are made of.
        layout: Where the examples are.
        kinds: The weights of each layer and direction, in their order.
        options: The arguments after the weights.
        rng: The random state before, if there is dropout.
        passing: What goes from the rule to the node.
    """

    function: Any
    kind: Kind
    layout: Layout
    kinds: tuple[str, ...]
    options: tuple
    rng: list[Tensor] | None
    passing: Passing

    @property
    def states(self) -> int:
        """How many initial states there are."""
        return 2 if self.kind.algebra is LSTM else 1

    @property
    def arguments(self) -> int:
        """How many tensors the function is given."""
        return 1 + self.states + len(self.kind.places()) * len(self.kinds)

    def stack(self, tensors: Sequence[Tensor]) -> Stack:
        """The layers, from the tensors that the function was given, and those that were kept if it has run."""
        x, states, count = tensors[0], tensors[1 : 1 + self.states], len(self.kinds)
        rest = tensors[1 + self.states : self.arguments]
        weights = [dict(zip(self.kinds, rest[i : i + count], strict=True)) for i in range(0, len(rest), count)]
        kept = tensors[self.arguments :] or None
        return Stack(self.kind, self.layout, self.layout.time_major(x), states, weights, x.dtype, kept)

    def again(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same by torch."""
        x, states, weights = tensors[0], tensors[1 : 1 + self.states], list(tensors[1 + self.states :])
        hx = tuple(states) if self.states > 1 else states[0]
        sizes = () if self.layout.batch_sizes is None else (self.layout.batch_sizes,)
        return self.function(x, *sizes, hx, weights, *self.options)


class _Recurrence(torch.autograd.Function):
    """The layers as a node in the graph."""

    @staticmethod
    def forward(ctx: Any, called: _Called, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.called = called
        ctx.set_materialize_grads(False)
        called.passing.node = weakref.ref(ctx)
        stack = called.stack(tensors)
        ctx.save_for_backward(*tensors, *stack.kept())
        out = called.layout.as_given(stack.x)
        return out.clone(memory_format=torch.contiguous_format), *stack.last()  # what is kept is nobody else's

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with undispatched():
            if torch.is_grad_enabled():
                return None, *_differentiable(ctx.called, ctx.saved_tensors, grads)
            found = ctx.called.passing.take(grads)
            if found is None:
                g, *states = grads
                found = gradients(ctx, g, states)
            return None, *found


def _differentiable(called: _Called, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients that can be differentiated again, by torch's own functions."""
    # One parameter may stand in several places: each gets a gradient of its own.
    inputs = [t.view_as(t) if t.requires_grad else t for t in tensors[: called.arguments]]
    with restored(called.rng, inputs) if called.rng else torch.enable_grad():
        outputs = called.again(inputs)
    pairs = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None and out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outs, upstream = zip(*pairs, strict=True)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(outs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in inputs]


def gradients(
    node: Any,
    g: Tensor | None,
    states: Sequence[Tensor | None],
    visit: Callable[[tuple[int, int], Unrolled], None] | None = None,
    lowest: int | None = None,
) -> list[Tensor | None]:
    """Go back through a forward.

    Args:
        node: Its node in the graph, in the backward that is under way.
        g: Gradient of the output; ``None`` for zeros.
        states: Gradients of the last states, in the order of the layout.
        visit: Is shown each layer and direction, after its own `Unrolled.pull`.
        lowest: The lowest layer that is to be shown.

    Returns:
        Gradients of all tensors that the function was given, where the backward wants them.
    """
    called: _Called = node.called
    tensors = node.saved_tensors
    stack = called.stack(tensors)
    wanted = [will_be_executed(edge[0]) for edge in node.next_functions]
    x, initial, weights = wanted[0], wanted[1 : 1 + called.states], wanted[1 + called.states :]
    if x or any(initial):
        lowest = 0
    for number in (i // len(called.kinds) for i, flag in enumerate(weights) if flag):
        layer = number // called.kind.directions
        lowest = layer if lowest is None else min(lowest, layer)
    found: list[Tensor | None] = [None] * len(wanted)
    if lowest is None:
        return found
    g = torch.zeros_like(stack.x) if g is None else called.layout.time_major(g)
    firsts = tensors[1 : 1 + called.states]
    last = [torch.zeros_like(first) if d is None else d for first, d in zip(firsts, states, strict=True)]
    for place, run in stack.pull(g, last, lowest, x):
        first = called.kind.places().index(place) * len(called.kinds)
        for i, kind in enumerate(called.kinds):
            if weights[first + i]:
                found[1 + called.states + first + i] = run.gradient(kind)
        if visit is not None:
            visit(place, run)
    if x:
        found[0] = called.layout.as_given(stack.of_input)
    for i, flag in enumerate(initial):
        if flag:
            found[1 + i] = torch.stack([stack.of_initial[place][i] for place in called.kind.places()])
    return found


def computed(function: Any, args: tuple, kwargs: dict) -> tuple[Tensor, ...] | None:
    """What ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu`` gives, up to rounding.

    Returns:
        The output and the last states; ``None`` where torch's own function is faster, or does more than this one.
    """
    found = None if kwargs else _parsed(function, args)
    if found is None or not _fitting(found[1]):
        return None
    return _Recurrence.apply(*found[:1], *found[1])


def _parsed(function: Any, args: tuple) -> tuple[_Called, list[Tensor]] | None:
    """A call, and its tensors."""
    packed = len(args) > 3 and not isinstance(args[3], bool)
    x, *args_after = args
    sizes = args_after.pop(0) if packed else None
    hx, flat, *options = args_after
    if len(options) != (5 if packed else 6) or x.dim() != (2 if packed else 3):
        return None
    has_bias, layers, dropout, train, bidirectional, *first = options
    states, directions = [hx] if isinstance(hx, Tensor) else list(hx), 2 if bidirectional else 1
    kinds = KINDS[: 4 if has_bias else 2]
    if len(flat) > layers * directions * len(kinds):
        kinds = (*kinds, KINDS[4])
    if len(flat) != layers * directions * len(kinds):
        return None
    kind = Kind(_ALGEBRAS[function], layers, directions, dropout if train and layers > 1 else 0.0)
    layout, tensors = Layout(bool(first and first[0]), sizes), [x, *states, *flat]
    rng = random_state(tensors) if kind.dropout else None
    return _Called(function, kind, layout, kinds, tuple(options), rng, Passing()), tensors


def _fitting(tensors: list[Tensor]) -> bool:
    """Whether steps from Python are worth it, and show all that torch's function would show."""
    # Not on a GPU, where one kernel makes all steps, nor in lower precision, nor for other derivatives.
    x = tensors[0]
    if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu") or transforms_active():
        return False
    if not torch.is_grad_enabled() or torch.jit.is_tracing() or not x.numel():
        return False
    return all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == x.dtype
        and t.layout == torch.strided and forward_ad.unpack_dual(t).tangent is None
        for t in tensors
    )  # fmt: skip


def passing_of(output: Tensor) -> Passing | None:
    """What the forward that gave an output has left, if it was this one."""
    called = getattr(output.grad_fn, "called", None)
    return called.passing if isinstance(called, _Called) else None
