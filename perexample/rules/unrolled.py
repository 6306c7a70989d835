"""One recurrent layer step by step: its forward, and how a gradient goes back through it, for any kind of step.

Only the recurrence goes step by step; whatever the steps have in common is done for all of them at once: the part of
the gates that comes from the inputs, the derivatives of the gates, the gradient of a layer's inputs.

A forward holds its gates as ``[T, blocks, N, H]``, so that one step is a batched product of its blocks, which is faster
than one product of all on a CPU, and pointwise functions that find each block in one piece. A backward holds the
gradients of the pre-activations as ``[T, N, blocks * H]``, in the order of the weights' rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_ROWS = 256  # of inputs that are multiplied at once
_ALL = slice(None)


def first_of(state: Tensor, size: int) -> Tensor:
    """The state of the first examples."""
    return state if len(state) == size else state[:size]


class State:
    """The state of all examples during a forward, of which the first ones take part in a step."""

    def __init__(self, first: Tensor, whole: bool) -> None:
        self.now, self.whole = first if whole else first.clone(), whole

    def before(self, size: int) -> Tensor:
        """That of those who take part."""
        return self.now if self.whole else self.now[:size]

    def after(self, new: Tensor) -> None:
        """They have a new one; the others keep theirs."""
        if self.whole:
            self.now = new
        else:
            self.now[: len(new)].copy_(new)


class Trace:
    """The states before and after all steps.

    Where all examples take part in all steps, both lie in one piece of memory, and none has to be copied.

    Attributes:
        whole: The memory, ``[N, T + 1, H]`` or ``[N, T, H]``.
        after: The states after each step, ``[T, N, H]``; of packed examples zero where they take no part.
    """

    def __init__(self, run: Unrolled, first: Tensor, whole: Tensor | None = None) -> None:
        self.first, self.active, self.reverse = first, run.active, run.reverse  # no cycle may keep the tensors
        place = slice(None, -1) if run.reverse else slice(1, None)
        if run.active is not None:
            place = slice(None)
            whole = first.new_zeros(len(first), len(run.x), first.shape[1]) if whole is None else whole
        elif whole is None:
            whole = first.new_empty(len(first), len(run.x) + 1, first.shape[1])
            whole[:, -1 if run.reverse else 0] = first
        self.whole = whole
        self.after = whole[:, place].transpose(0, 1)

    def before(self) -> Tensor:
        """The states before each step, ``[T, N, H]``."""
        if self.active is None:
            return self.whole[:, slice(1, None) if self.reverse else slice(None, -1)].transpose(0, 1)
        first = self.first[:, None]
        if not self.reverse:
            return torch.cat([first, self.whole[:, :-1]], 1).transpose(0, 1)
        later = torch.where(self.active[1:].T[:, :, None], self.whole[:, 1:], first)
        return torch.cat([later, first], 1).transpose(0, 1)


class Unrolled:
    """All steps of one layer in one direction, and how a gradient goes back through them.

    In step t the first ``sizes[t]`` examples take part; the state of the others stays as it is. So the forward
    direction leaves the state of a short example at its last step, and the reverse direction, in which the long ones
    come first, lets it wait with the initial state.

    Args:
        weights: The layer's parameters by kind (`KINDS`).
        x: Inputs, ``[T, N, I]``.
        h: Initial hidden state, ``[N, O]``.
        c: Initial cell state of an LSTM, ``[N, H]``.
        active: Which examples take part in which step, ``[T, N]``, where not all do.
        reverse: Whether the steps are made from the last to the first.
        kept: Gives what `kept` gave after the steps, if they are not to be made again.

    Attributes:
        a: Blocks of pre-activations that the steps turn into the gates, ``[T, blocks, N, H]``.
        out: What the layer gave before any projection, ``[T, N, H]``.
        hidden: The hidden states, ``[T, N, O]``.
        last: After the steps, the hidden state ``[N, O]``, and the cell state ``[N, H]`` of an LSTM.
        of_input: After `pull`, gradients of ``W_ih x + b_ih``, ``[T, N, G]``.
        of_hidden: After `pull`, gradients of ``W_hh h + b_hh``, ``[T, N, G]``.
        of_initial: After `pull`, gradients of the initial states, as in ``last``.
        projected: After `pull`, gradients of the results, ``[T, N, O]``.
    """

    gates: int  # blocks of rows of the weights
    blocks: int  # of pre-activations that have gradients of their own
    a: Tensor
    out: Tensor
    hidden: Trace
    last: list[Tensor]

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        h: Tensor,
        c: Tensor,
        active: Tensor | None = None,
        reverse: bool = False,
        kept: Iterator[Tensor] | None = None,
    ) -> None:
        self.weights, self.x, self.h, self.c, self.active, self.reverse = weights, x, h, c, active, reverse
        self.sizes = [x.shape[1]] * x.shape[0] if active is None else active.sum(1).tolist()
        self.w_hh, self.w_hr = weights["weight_hh"], weights.get("weight_hr")
        self.size = len(self.w_hh) // self.gates
        if kept is not None:
            self._restore(kept)
            return
        self._run(self._prepared())

    @property
    def result(self) -> Tensor:
        """What the layer gave, ``[T, N, O]``."""
        return self.hidden.after

    def _bias(self) -> Tensor | None:
        """What is added to the part of the pre-activations that comes from the input: both biases."""
        return self.weights["bias_ih"] + self.weights["bias_hh"] if "bias_ih" in self.weights else None

    def _parts(self) -> list[tuple[slice, range]]:
        """The steps, several at a time, in order: what they have in common is still in the cache when they need it."""
        several = max(1, _ROWS // max(1, self.x.shape[1]))
        starts = range(0, len(self.x), several)
        parts = [range(start, min(start + several, len(self.x))) for start in starts]
        places = [slice(part.start, part.stop) for part in parts]
        if self.reverse:
            return [(place, part[::-1]) for place, part in zip(reversed(places), reversed(parts), strict=True)]
        return list(zip(places, parts, strict=True))

    def _put_inputs(self, into: Tensor, place: slice, bias: Tensor | None) -> None:
        """Compute what comes from the input of some steps into ``[T, gates, N, H]``."""
        a = F.linear(self.x[place].flatten(0, 1), self.weights["weight_ih"], bias)
        into[place] = a.view(-1, self.x.shape[1], self.gates, self.size).transpose(1, 2)
        if self.active is not None:
            self.a[place].masked_fill_(~self.active[place, None, :, None], 0.0)

    def _blocks(self, count: int) -> Tensor:
        """Room for pre-activations, ``[T, count, N, H]``."""
        return self.x.new_empty(self.x.shape[0], count, self.x.shape[1], self.size)

    def _each(self, *arrays: Tensor, axis: int = 0, place: slice = _ALL) -> list[tuple[Tensor, ...]]:
        """For each step in a place, what these arrays ``[t, ..., N, ...]`` hold for those who take part in it."""
        steps = zip(*(array.unbind(0) for array in arrays), strict=True)
        if self.active is None:
            return list(steps)
        sizes = self.sizes[place]
        return [tuple(part.narrow(axis, 0, size) for part in step) for step, size in zip(steps, sizes, strict=True)]

    def _filled(self) -> Tensor:
        """Room for something of all steps, ``[T, N, H]``, zero where nobody takes part."""
        shape = (self.x.shape[1], self.x.shape[0], self.size)
        return (self.x.new_empty(shape) if self.active is None else self.x.new_zeros(shape)).transpose(0, 1)

    def _run(self, into: Tensor) -> None:
        """Make the steps, given where the part from the input goes, ``[T, gates, N, H]``."""
        bias = self._bias()
        inner = self._inner().mT  # [gates, O, H]
        state = State(self.h, self.active is None)
        blocks = self._each(self.a[:, : self.gates], axis=1)
        views, results = self._views(), self._each(self.result)
        project = None if self.w_hr is None else self.w_hr.T
        for place, steps in self._parts():
            self._put_inputs(into, place, bias)
            for t in steps:
                h = state.before(self.sizes[t])
                blocks[t][0].baddbmm_(h.expand(self.gates, *h.shape), inner)
                new = self._step(h, *views[t])
                state.after(new if project is None else torch.mm(new, project, out=results[t][0]))
        self.last = [state.now]

    def _inner(self) -> Tensor:
        """``W_hh`` in the blocks that it adds to, the first ones of `a`, ``[gates, H, O]``."""
        return self.w_hh.unflatten(0, (self.gates, -1))

    def _prepared(self) -> Tensor:
        """Make room for the steps; returns where the part from the input goes, ``[T, gates, N, H]``."""
        raise NotImplementedError

    def _views(self) -> list[tuple[Tensor, ...]]:
        """For each step, what it needs and fills."""
        raise NotImplementedError

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        """The output before any projection, from the pre-activations and the hidden state before, ``[n, O]``."""
        raise NotImplementedError

    def kept(self) -> list[Tensor]:
        """What a backward needs beside the arguments."""
        raise NotImplementedError

    def _restore(self, kept: Iterator[Tensor]) -> None:
        """The reverse of `kept`."""
        raise NotImplementedError

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        """For some steps at once, derivatives of the output, or the cell state, by the pre-activations.

        Args:
            into: Where they go, ``[t, N, blocks, H]``.
            place: Which steps.

        Returns:
            Whatever arrays of them and others `_back` needs.
        """
        raise NotImplementedError

    def pull(self, g: Tensor, d_h: Tensor, d_c: Tensor | None = None) -> None:
        """Go back through all steps.

        Args:
            g: Gradient of the results, ``[T, N, O]``.
            d_h: Gradient of the last hidden state, ``[N, O]``.
            d_c: Gradient of the last cell state, ``[N, H]``; none where it depends on no trainable parameter.
        """
        d_h = d_h.clone(memory_format=torch.contiguous_format)
        self.d_c = torch.zeros_like(self.out[0]) if d_c is None else d_c.clone(memory_format=torch.contiguous_format)
        # Examples come first in memory, as the terms want them.
        slopes = g.new_empty(g.shape[1], g.shape[0], self.blocks, self.size).transpose(0, 1)
        self.of_hidden = slopes.flatten(2)[:, :, : len(self.w_hh)]
        self.projected = g if self.w_hr is None else torch.zeros_like(g)
        self.past = [trace.before() for trace in self._traces()]
        ends = self._each(g, self.projected, self.of_hidden)
        for place, steps in reversed(self._parts()):
            views = self._each(*self._slopes(slopes[place], place), place=place)
            if self.active is not None:
                slopes[place].masked_fill_(~self.active[place, :, None, None], 0.0)
            for t in reversed(steps):
                above, projected, inner = ends[t]
                state = first_of(d_h, self.sizes[t])
                d = state.add_(above)
                if self.w_hr is not None:
                    d = projected.copy_(d) @ self.w_hr
                if self._back(d, *views[t - place.start]):
                    state.addmm_(inner, self.w_hh)
                else:
                    torch.mm(inner, self.w_hh, out=state)
        self.of_input = self._inputs(slopes)
        self.of_initial = [d_h, self.d_c]

    def _traces(self) -> list[Trace]:
        """The states of which `_slopes` needs those before each step, in ``past``."""
        return []

    def _back(self, d: Tensor, *views: Tensor) -> bool:
        """Turn the slopes of one step into gradients, from that of its output, ``[n, H]``.

        Returns:
            Whether ``d`` was made what goes to the hidden state before the step past ``W_hh``; if not, nothing does.
        """
        raise NotImplementedError

    def _inputs(self, grads: Tensor) -> Tensor:
        """Gradients of what comes from the input, ``[T, N, G]``, from those of all blocks, ``[T, N, blocks, H]``."""
        return self.of_hidden

    def to_inputs(self) -> Tensor:
        """After `pull`, the gradient of the input, ``[T, N, I]``."""
        return (self.of_input.transpose(0, 1) @ self.weights["weight_ih"]).transpose(0, 1)  # as it lies in memory

    def gradient(self, kind: str) -> Tensor:
        """After `pull`, the gradient of a parameter."""
        g = {"ih": self.of_input, "hh": self.of_hidden, "hr": self.projected}[kind[-2:]].transpose(0, 1)
        if kind.startswith("bias"):
            return g.sum((0, 1))
        return g.flatten(0, 1).T @ self.factor(kind).transpose(0, 1).flatten(0, 1)

    def factor(self, kind: str) -> Tensor:
        """What a weight is multiplied with, ``[T, N, F]``."""
        if kind == "weight_ih":
            return self.x
        return self.out if kind == "weight_hr" else self.hidden.before()
