"""Recurrent layers step by step: their forward, and how a gradient goes back through it.

Only the recurrence goes step by step; whatever the steps have in common is done for all of them at once: the part of
the gates that comes from the inputs, the derivatives of the gates, the gradient of a layer's inputs.

A forward holds its gates as ``[T, blocks, N, H]``, so that one step is a batched product of its blocks, which is faster
than one product of all on a CPU, and pointwise functions that find each block in one piece. A backward holds the
gradients of the pre-activations as ``[T, N, blocks * H]``, in the order of the weights' rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .generic import _only

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_ROWS = 256  # of inputs that are multiplied at once
_ALL = slice(None)
_through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input  # of a gradient and the output: g y (1 - y)
_through_tanh = torch.ops.aten.tanh_backward.grad_input  # g (1 - y^2)


@dataclass
class Layout:
    """How a module's inputs and outputs hold N examples: padded in either order, or packed, longest first.

    Everything is computed on ``[T, N, F]``, the examples in the order in which they are packed.
    """

    batch_first: bool = False
    batch_sizes: Tensor | None = None
    order: Tensor | None = None  # of the packed examples
    back: Tensor | None = None  # from there to the original order

    def active(self, device: torch.device) -> Tensor | None:
        """Which examples take part in which step, ``[T, N]``, where not all do."""
        if self.batch_sizes is None:
            return None
        return (torch.arange(int(self.batch_sizes[0])) < self.batch_sizes[:, None]).to(device)

    def time_major(self, data: Tensor) -> Tensor:
        """``[T, N, F]``, zeros beyond the end of a sequence, from what the module takes or gives."""
        active = self.active(data.device)
        if active is None:
            return data.transpose(0, 1) if self.batch_first else data
        return data.new_zeros(*active.shape, data.shape[1]).masked_scatter(active[:, :, None], data)

    def as_given(self, sequence: Tensor) -> Tensor:
        """The reverse of `time_major`."""
        active = self.active(sequence.device)
        if active is None:
            return sequence.transpose(0, 1) if self.batch_first else sequence
        return sequence[active]

    def sorted(self, states: Tensor) -> Tensor:
        """States ``[..., N, H]`` in the order of the packed examples."""
        return states if self.order is None else states.index_select(-2, self.order)

    def examples(self, sequence: Tensor) -> Tensor:
        """``[N, T, F]`` in the original order."""
        return (sequence if self.back is None else sequence.index_select(1, self.back)).transpose(0, 1)

    def only(self, g: Tensor, n: int, states: bool) -> Tensor:
        """A gradient with all examples but one set to zero, be it of the output or of states ``[L, N, H]``."""
        if self.batch_sizes is not None and not states:
            place = n if self.back is None else int(self.back[n])
            return self.as_given(_only(self.time_major(g), 1, place))
        return _only(g, 0 if self.batch_first and not states else 1, n)


def _first(state: Tensor, size: int) -> Tensor:
    """The state of the first examples."""
    return state if len(state) == size else state[:size]


class _State:
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


class _Trace:
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
    hidden: _Trace
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
        state = _State(self.h, self.active is None)
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
                state = _first(d_h, self.sizes[t])
                d = state.add_(above)
                if self.w_hr is not None:
                    d = projected.copy_(d) @ self.w_hr
                if self._back(d, *views[t - place.start]):
                    state.addmm_(inner, self.w_hh)
                else:
                    torch.mm(inner, self.w_hh, out=state)
        self.of_input = self._inputs(slopes)
        self.of_initial = [d_h, self.d_c]

    def _traces(self) -> list[_Trace]:
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


class Tanh(Unrolled):
    """``h' = tanh(a + b)``."""

    gates = blocks = 1

    def _prepared(self) -> Tensor:
        self._keep()
        self.a = self.out.unsqueeze(1)
        return self.a

    def _views(self) -> list[tuple[Tensor, ...]]:
        return self._each(self.out)

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        return views[0].tanh_()

    def kept(self) -> list[Tensor]:
        """The outputs."""
        return [self.hidden.whole]

    def _restore(self, kept: Iterator[Tensor]) -> None:
        self._keep(next(kept))

    def _keep(self, whole: Tensor | None = None) -> None:
        self.hidden = _Trace(self, self.h, whole)
        self.out = self.hidden.after

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        return [_through_tanh(torch.ones_like(self.out[place]), self.out[place], grad_input=into[:, :, 0])]

    def _back(self, d: Tensor, *views: Tensor) -> bool:
        views[0].mul_(d)
        return False


class Relu(Tanh):
    """``h' = max(a + b, 0)``."""

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        return views[0].relu_()

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        return [into[:, :, 0].copy_(self.out[place] > 0)]


class LSTM(Unrolled):
    """``c' = f c + i g`` and ``h' = o tanh(c')``; blocks are i, f, g, o."""

    gates = blocks = 4

    def _prepared(self) -> Tensor:
        self.a, self.cells, self.hidden = self._blocks(4), _Trace(self, self.c), _Trace(self, self.h)
        self.out = self.hidden.after if self.w_hr is None else self._filled()
        return self.a

    def _views(self) -> list[tuple[Tensor, ...]]:
        i, f, g, o = self.a.unbind(1)
        both = self._each(self.a[:, :2], axis=1)
        rest = self._each(i, f, g, o, self.cells.after, self.out)
        return [(*x, *y) for x, y in zip(both, rest, strict=True)]

    def _run(self, into: Tensor) -> None:
        self.state_c = _State(self.c, self.active is None)
        super()._run(into)
        self.last.append(self.state_c.now)

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        i_f, i, f, g, o, cell, out = views
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, self.state_c.before(len(f)), out=cell)
        cell.addcmul_(i, g)
        self.state_c.after(cell)
        return torch.mul(o, cell.tanh(), out=out)

    def _traces(self) -> list[_Trace]:
        return [self.cells]

    def kept(self) -> list[Tensor]:
        """Gates, cell states, results, and what was projected to these."""
        return [self.a, self.cells.whole, self.hidden.whole, *([] if self.w_hr is None else [self.out])]

    def _restore(self, kept: Iterator[Tensor]) -> None:
        self.a = next(kept)
        self.cells, self.hidden = _Trace(self, self.c, next(kept)), _Trace(self, self.h, next(kept))
        self.out = self.hidden.after if self.w_hr is None else next(kept)

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        i, f, g, o = self.a[place].unbind(1)
        of_i, of_f, of_g, of_o = into.unbind(2)
        tanh_c = self.cells.after[place].tanh()
        _through_sigmoid(g, i, grad_input=of_i)
        _through_sigmoid(self.past[0][place], f, grad_input=of_f)
        _through_tanh(i, g, grad_input=of_g)
        _through_sigmoid(tanh_c, o, grad_input=of_o)
        by_c = _through_tanh(o, tanh_c, grad_input=tanh_c)  # of h' by c'
        return [into[:, :, :3], of_o, by_c, f]

    def _back(self, d: Tensor, *views: Tensor) -> bool:
        of_c, of_o, by_c, f = views
        d_c = _first(self.d_c, len(d)).addcmul_(d, by_c)
        of_c.mul_(d_c.unsqueeze(1))
        of_o.mul_(d)
        d_c.mul_(f)
        return False


class GRU(Unrolled):
    """``h' = (1 - z) n + z h`` with ``n = tanh(a + r b)``; blocks are b, r, z and a, which becomes n.

    Their gradients are in the order r, z, b and a: the first three are those of ``W_hh h + b_hh``.
    """

    gates, blocks = 3, 4

    def _bias(self) -> Tensor | None:
        """All but the part of ``b_hh`` that is in b."""
        if "bias_ih" not in self.weights:
            return None
        return self.weights["bias_ih"] + F.pad(self.weights["bias_hh"][: 2 * self.size], (0, self.size))

    def _inner(self) -> Tensor:
        return super()._inner().roll(1, 0)

    def _prepared(self) -> Tensor:
        self.a, self.hidden = self._blocks(4), _Trace(self, self.h)
        self.out = self.hidden.after
        self.a[:, 0] = self.weights["bias_hh"][2 * self.size :] if "bias_hh" in self.weights else 0.0
        return self.a[:, 1:]

    def _views(self) -> list[tuple[Tensor, ...]]:
        both = self._each(self.a[:, 1:3], axis=1)
        rest = self._each(*self.a.unbind(1), self.out)
        return [(*x, *y) for x, y in zip(both, rest, strict=True)]

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        r_z, b, r, z, n, out = views
        r_z.sigmoid_()
        n.addcmul_(r, b).tanh_()
        return torch.lerp(n, h, z, out=out)

    def kept(self) -> list[Tensor]:
        """Gates and outputs."""
        return [self.a, self.hidden.whole]

    def _restore(self, kept: Iterator[Tensor]) -> None:
        self.a, self.hidden = next(kept), _Trace(self, self.h, next(kept))
        self.out = self.hidden.after

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        b, r, z, n = self.a[place].unbind(1)
        of_r, of_z, of_b, of_a = into.unbind(2)
        _through_tanh(1 - z, n, grad_input=of_a)
        _through_sigmoid(of_a * b, r, grad_input=of_r)
        _through_sigmoid(self.past[0][place] - n, z, grad_input=of_z)
        torch.mul(of_a, r, out=of_b)
        return [into, z]

    def _back(self, d: Tensor, *views: Tensor) -> bool:
        slopes, z = views
        slopes.mul_(d.unsqueeze(1))
        d.mul_(z)
        return True

    def _traces(self) -> list[_Trace]:
        return [self.hidden]

    def _inputs(self, grads: Tensor) -> Tensor:
        rows = grads.flatten(2).transpose(0, 1)
        return torch.cat([rows[:, :, : 2 * self.size], rows[:, :, 3 * self.size :]], 2).transpose(0, 1)


@dataclass(frozen=True)
class Kind:
    """What a stack of recurrent layers is made of.

    Attributes:
        algebra: What one layer computes.
        layers: How many there are.
        directions: 1 or 2.
        dropout: Probability of the dropout between layers, 0 if nothing is dropped.
    """

    algebra: type[Unrolled]
    layers: int
    directions: int
    dropout: float

    def places(self) -> list[tuple[int, int]]:
        """Layer and direction of each row of the states, in order."""
        return [(layer, direction) for layer in range(self.layers) for direction in range(self.directions)]


class Stack:
    """The layers of a recurrent module, run.

    Args:
        kind: What they are made of.
        layout: Where the examples are.
        x: The input, ``[T, N, I]``.
        states: Initial states, ``[layers * directions, N, H]``, in the order of the layout.
        weights: The parameters of each layer and direction by kind.
        dtype: In what dtype random numbers are drawn.
        kept: What `kept` gave after the forward, if it is not to be run again.

    Attributes:
        runs: The layers, for each its directions.
        noise: What dropout multiplied the output of each layer but the last with; empty without dropout.
        x: What the last layer gave, ``[T, N, F]``.
        of_input: After `pull`, the gradient of the input, ``[T, N, I]``, where it was wanted.
        of_initial: After `pull`, those of the initial states, by layer and direction.
    """

    of_input: Tensor

    def __init__(
        self,
        kind: Kind,
        layout: Layout,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Mapping[str, Tensor]],
        dtype: torch.dtype,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        self.kind, self.layout, self.x, self.dtype = kind, layout, x, dtype
        self.active = layout.active(x.device)
        self.runs: list[list[Unrolled]] = []
        self.noise: list[Tensor] = []
        self.of_initial: dict[tuple[int, int], list[Tensor]] = {}
        parts = None if kept is None else iter(kept)
        for layer in range(kind.layers):
            if layer and kind.dropout:
                self.noise.append(self._drawn() if parts is None else next(parts))
                self.x = self.x * self.noise[-1]
            self._run(layer, states, weights, parts)

    def _run(
        self,
        layer: int,
        states: Sequence[Tensor],
        weights: Sequence[Mapping[str, Tensor]],
        parts: Iterator[Tensor] | None,
    ) -> None:
        runs = []
        for direction in range(self.kind.directions):
            place = layer * self.kind.directions + direction
            h, c = states[0][place], states[-1][place]
            runs.append(self.kind.algebra(weights[place], self.x, h, c, self.active, bool(direction), parts))
        self.runs.append(runs)
        self.x = torch.cat([run.result for run in runs], 2) if len(runs) > 1 else runs[0].result

    def kept(self) -> list[Tensor]:
        """What a backward needs beside the arguments: random numbers and what each layer keeps, as they come."""
        parts: list[Tensor] = []
        for layer, runs in enumerate(self.runs):
            parts += self.noise[layer - 1 : layer] if layer else []
            parts += [t for run in runs for t in run.kept()]
        return parts

    def last(self) -> list[Tensor]:
        """The states after the last step, ``[layers * directions, N, H]``."""
        return [torch.stack(states) for states in zip(*(run.last for runs in self.runs for run in runs), strict=True)]

    def _drawn(self) -> Tensor:
        """The factors of a dropout, drawn as the module does: on a tensor of the shape and dtype that it has there."""
        shape = self.x.shape if self.active is None else (int(self.active.sum()), self.x.shape[2])
        noise = F.dropout(torch.ones(shape, dtype=self.dtype, device=self.x.device), self.kind.dropout, training=True)
        noise = noise.to(self.x.dtype)
        return noise if self.active is None else self.layout.time_major(noise)

    def pull(
        self, g: Tensor, states: Sequence[Tensor], lowest: int = 0, inputs: bool = False
    ) -> Iterator[tuple[tuple[int, int], Unrolled]]:
        """Go back through the layers, the last first; a layer is let go of when the next one is asked for.

        Args:
            g: Gradient of the output, ``[T, N, F]``.
            states: Those of the last states, in the order of the layout.
            lowest: The layer at which to stop.
            inputs: Whether the gradient of its input is wanted too.

        Yields:
            Layer and direction, and the layer after its own `Unrolled.pull`.
        """
        for layer in range(self.kind.layers - 1, lowest - 1, -1):
            runs = self.runs.pop()
            for direction, (run, d) in enumerate(zip(runs, g.chunk(len(runs), 2), strict=True)):
                run.pull(d, *(state[layer * len(runs) + direction] for state in states))
                self.of_initial[layer, direction] = run.of_initial
                yield (layer, direction), run
            if layer > lowest or inputs:
                g = reduce(torch.add, (run.to_inputs() for run in runs))
                g = g * self.noise[layer - 1] if layer and self.noise else g
        self.of_input = g
