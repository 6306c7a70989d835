"""Rules for recurrent layers and cells, by book-keeping through time.

The layers are run again from their saved input, and the gradient goes back through them by hand. Only the recurrence
goes step by step; whatever the steps have in common is done for all of them at once: the part of the gates that comes
from the inputs, the derivatives of the gates, the gradient of a layer's inputs. It yields the gradients of the
pre-activations ``W_ih x + b_ih`` and ``W_hh h + b_hh`` of every step, and the weights' gradients are sums of outer
products over T. No per-example gradient is formed.

References:
    Werbos 1990, doi:10.1109/5.58337 (backpropagation through time); Bu et al. 2022, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from .._private import kept_state, own_parameters, without_forward_hooks
from .._tree import map_tensors, tensors_in
from ..errors import UnsupportedModuleError
from ..place import Place, Space
from ..rule import Call, Rule, at_least_float32, only_parameters, register_rule
from ..terms import Dense, Outer, Term
from .generic import _only, autocast_state, random_state, restored

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
_through_sigmoid = torch.ops.aten.sigmoid_backward  # of a gradient and the output: g y (1 - y)
_through_tanh = torch.ops.aten.tanh_backward  # g (1 - y^2)


@dataclass
class _Layout:
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


class _Unrolled:
    """All steps of one layer in one direction, and how a gradient goes back through them.

    In step t the first ``sizes[t]`` examples take part; the state of the others stays as it is. So the forward
    direction leaves the state of a short example at its last step, and the reverse direction, in which the long ones
    come first, lets it wait with the initial state.

    Args:
        weights: The layer's parameters by kind (`_KINDS`).
        x: Inputs, ``[T, N, I]``.
        h: Initial hidden state, ``[N, O]``.
        c: Initial cell state of an LSTM, ``[N, H]``.
        active: Which examples take part in which step, ``[T, N]``, where not all do.
        reverse: Whether the steps are made from the last to the first.

    Attributes:
        a: Pre-activations that come from the input, ``[T, N, G]``, over which the steps write the gates.
        out: What the layer gave before any projection, ``[T, N, H]``.
        result: What it gave, ``[T, N, O]``.
        grads: After `pull`, gradients of the pre-activations in blocks of H, ``[T, N, blocks * H]``.
        projected: After `pull`, gradients of the results, ``[T, N, O]``.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        h: Tensor,
        c: Tensor,
        active: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        self.weights, self.x, self.h, self.c, self.active, self.reverse = weights, x, h, c, active, reverse
        self.sizes = [x.shape[1]] * x.shape[0] if active is None else active.sum(1).tolist()
        self.order = range(x.shape[0])[::-1] if reverse else range(x.shape[0])
        self.w_hh, self.w_hr = weights["weight_hh"], weights.get("weight_hr")
        self.from_h, self.size = self.w_hh.T, h.shape[1] if self.w_hr is None else self.w_hr.shape[1]
        self.a = F.linear(x, weights["weight_ih"], self._bias(weights))
        if active is not None:
            self.a.masked_fill_(~active[:, :, None], 0.0)
        self.out, *arrays = self._arrays()
        self.result = self.out if self.w_hr is None else x.new_zeros(*x.shape[:2], h.shape[1])
        self._run(h, self._each(self.out, *arrays), self._each(self.result))

    def _bias(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """What is part of all of `a`: both biases, unless a gate comes between them."""
        return weights["bias_ih"] + weights["bias_hh"] if "bias_ih" in weights else None

    def _each(self, *arrays: Tensor) -> list[tuple[Tensor, ...]]:
        """For each step, what these arrays ``[T, N, ...]`` hold for those who take part in it."""
        steps = zip(*(array.unbind(0) for array in arrays), strict=True)
        if self.active is None:
            return list(steps)
        return [tuple(part[:size] for part in step) for step, size in zip(steps, self.sizes, strict=True)]

    def _run(self, h: Tensor, views: Sequence[tuple[Tensor, ...]], results: Sequence[tuple[Tensor, ...]]) -> None:
        for t in self.order:
            new = self._step(_first(h, self.sizes[t]), *views[t])
            if self.w_hr is not None:
                new = torch.mm(new, self.w_hr.T, out=results[t][0])
            h = _replaced(h, new)

    def _arrays(self) -> list[Tensor]:
        """What the steps fill, `out` first, each ``[T, N, ...]`` and zero where nobody takes part."""
        raise NotImplementedError

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        """The output, written into the first of the views of `_arrays`, from the hidden state before, ``[n, O]``."""
        raise NotImplementedError

    def _slopes(self) -> tuple[Tensor, list[Tensor]]:
        """For all steps at once, derivatives of the output, or the cell state, by the pre-activations.

        Returns:
            These, ``[T, N, blocks * H]``, and whatever arrays of them and others `_back` needs.
        """
        raise NotImplementedError

    def previous(self, states: Tensor, first: Tensor) -> Tensor:
        """The state before each step, ``[T, N, H]``, from those after and the initial one."""
        if not self.reverse:
            return torch.cat([first[None], states[:-1]])
        later = states[1:] if self.active is None else torch.where(self.active[1:, :, None], states[1:], first)
        return torch.cat([later, first[None]])

    def pull(self, g: Tensor, d_h: Tensor, d_c: Tensor | None = None) -> None:
        """Go back through all steps.

        Args:
            g: Gradient of the results, ``[T, N, O]``.
            d_h: Gradient of the last hidden state, ``[N, O]``.
            d_c: Gradient of the last cell state, ``[N, H]``; none where it depends on no trainable parameter.
        """
        self.d_c = torch.zeros_like(self.out[0]) if d_c is None else d_c
        self.grads, arrays = self._slopes()
        if self.active is not None:
            self.grads.masked_fill_(~self.active[:, :, None], 0.0)
        self.projected = g if self.w_hr is None else torch.zeros_like(g)
        ends, views = self._each(g, self.projected, self.of_hidden()), self._each(*arrays)
        for t in reversed(self.order):
            above, projected, inner = ends[t]
            d = above + _first(d_h, self.sizes[t])
            if self.w_hr is not None:
                d = projected.copy_(d) @ self.w_hr
            past = self._back(d, *views[t])
            d_h = _replaced(d_h, inner @ self.w_hh if past is None else past.addmm_(inner, self.w_hh))

    def _back(self, d: Tensor, *views: Tensor) -> Tensor | None:
        """Turn the slopes of one step into gradients, from that of its output, ``[n, H]``.

        Returns:
            What goes to the hidden state before the step past ``W_hh``, if anything.
        """
        raise NotImplementedError

    def of_hidden(self) -> Tensor:
        """Gradients of ``W_hh h + b_hh``, ``[T, N, G]``."""
        return self.grads[:, :, : len(self.w_hh)]

    def of_input(self) -> Tensor:
        """Gradients of ``W_ih x + b_ih``, ``[T, N, G]``."""
        return self.grads


def _first(state: Tensor, size: int) -> Tensor:
    """The state of the first examples."""
    return state if len(state) == size else state[:size]


def _replaced(state: Tensor, new: Tensor) -> Tensor:
    """The state of all examples after the first of them have a new one."""
    return new if len(new) == len(state) else torch.cat([new, state[len(new) :]])


class _Tanh(_Unrolled):
    """``h' = tanh(a + b)``."""

    def _arrays(self) -> list[Tensor]:
        return [self.a]

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        return views[0].addmm_(h, self.from_h).tanh_()

    def _slopes(self) -> tuple[Tensor, list[Tensor]]:
        slopes = 1 - self.a.square()
        return slopes, [slopes]

    def _back(self, d: Tensor, *views: Tensor) -> None:
        views[0].mul_(d)


class _Relu(_Tanh):
    """``h' = max(a + b, 0)``."""

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        return views[0].addmm_(h, self.from_h).relu_()

    def _slopes(self) -> tuple[Tensor, list[Tensor]]:
        slopes = (self.a > 0).to(self.a.dtype)
        return slopes, [slopes]


class _LSTM(_Unrolled):
    """``c' = f c + i g`` and ``h' = o tanh(c')``; gates and blocks are i, f, g, o."""

    def _arrays(self) -> list[Tensor]:
        i, f, g, o = self.a.chunk(4, 2)
        out, self.cells, self.tanh_c = (torch.zeros_like(i) for _ in range(3))
        self.now_c = self.c
        return [out, self.a, self.a[:, :, : 2 * self.size], i, f, g, o, self.cells, self.tanh_c]

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        out, a, i_f, i, f, g, o, cell, tanh_c = views
        a.addmm_(h, self.from_h)
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.addcmul(i * g, f, _first(self.now_c, len(a)), out=cell)
        self.now_c = _replaced(self.now_c, cell)
        return torch.mul(o, torch.tanh(cell, out=tanh_c), out=out)

    def _slopes(self) -> tuple[Tensor, list[Tensor]]:
        i, f, g, o = self.a.chunk(4, 2)
        by_c = _through_tanh(o, self.tanh_c)  # of h' by c'
        of_i, of_f = _through_sigmoid(g, i), _through_sigmoid(self.previous(self.cells, self.c), f)
        slopes = torch.cat([of_i, of_f, _through_tanh(i, g), _through_sigmoid(self.tanh_c, o)], 2)
        blocks = slopes.unflatten(2, (4, -1))
        return slopes, [blocks[:, :, :3], blocks[:, :, 3], by_c, f]

    def _back(self, d: Tensor, *views: Tensor) -> None:
        of_c, of_o, by_c, f = views
        d_c = torch.addcmul(_first(self.d_c, len(d)), d, by_c)
        of_c.mul_(d_c.unsqueeze(1))
        of_o.mul_(d)
        self.d_c = _replaced(self.d_c, d_c.mul_(f))


class _GRU(_Unrolled):
    """``h' = (1 - z) n + z h`` with ``n = tanh(a + r b)``; gates are r, z, n, blocks r, z, b and a."""

    def _bias(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        return weights.get("bias_ih")

    def _arrays(self) -> list[Tensor]:
        self.b, self.b_hh = torch.zeros_like(self.a), self.weights.get("bias_hh", self.a.new_zeros(1))
        a_rz, b_rz = self.a[:, :, : 2 * self.size], self.b[:, :, : 2 * self.size]
        return [self.a.new_zeros(*self.a.shape[:2], self.size), a_rz, b_rz, *self.a.chunk(3, 2), self.b, self._b_n()]

    def _b_n(self) -> Tensor:
        return self.b[:, :, 2 * self.size :]

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        out, a_rz, b_rz, r, z, n, b, b_n = views
        torch.addmm(self.b_hh, h, self.from_h, out=b)
        a_rz.add_(b_rz).sigmoid_()
        n.addcmul_(r, b_n).tanh_()
        return torch.lerp(n, h, z, out=out)

    def _slopes(self) -> tuple[Tensor, list[Tensor]]:
        r, z, n = self.a.chunk(3, 2)
        by_a, by_z = _through_tanh(1 - z, n), _through_sigmoid(self.previous(self.out, self.h) - n, z)
        slopes = torch.cat([_through_sigmoid(by_a * self._b_n(), r), by_z, by_a * r, by_a], 2)
        return slopes, [slopes.unflatten(2, (4, -1)), z]

    def _back(self, d: Tensor, *views: Tensor) -> Tensor:
        slopes, z = views
        slopes.mul_(d.unsqueeze(1))
        return d.mul_(z)

    def of_input(self) -> Tensor:
        return torch.cat([self.grads[:, :, : 2 * self.size], self.grads[:, :, 3 * self.size :]], 2)


def _algebra(module: Any) -> type[_Unrolled]:
    """The algebra of a recurrent layer or cell."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return _LSTM
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _GRU
    return _Relu if module.nonlinearity == "relu" else _Tanh


def _weights(call: Call, suffix: str = "") -> dict[str, Tensor]:
    """The parameters of one layer in one direction by kind, in the dtype of the input."""
    found = {kind: getattr(call.module, kind + suffix, None) for kind in _KINDS}
    return {kind: p.detach().to(call.x.dtype) for kind, p in found.items() if p is not None}


def _terms(call: Call, run: _Unrolled, layout: _Layout, suffix: str = "") -> dict[str, Term]:
    """Outer products over the steps for the weights of one layer in one direction, sums over them for its biases."""
    wanted = {kind: kind + suffix for kind in _KINDS if kind + suffix in call.params}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    if wanted.keys() & {"weight_ih", "bias_ih"}:
        factors["ih"] = layout.examples(run.of_input()).contiguous(), layout.examples(run.x)
    if wanted.keys() & {"weight_hh", "bias_hh"}:
        shared = "ih" in factors and not isinstance(run, _GRU)
        g = factors["ih"][0] if shared else layout.examples(run.of_hidden()).contiguous()
        factors["hh"] = g, layout.examples(run.previous(run.result, run.h))
    if "weight_hr" in wanted:
        factors["hr"] = layout.examples(run.projected), layout.examples(run.out)
    terms: dict[str, Term] = {}
    for kind, name in wanted.items():
        g, x = factors[kind[-2:]]
        bias = kind.startswith("bias")
        terms[name] = Dense(g.sum(1)) if bias else Outer(g[:, None], x[:, None], call.params[name].shape)
    return terms


def _refuse_problem(call: Call) -> None:
    if problem := call.saved.get("problem"):
        raise UnsupportedModuleError(f"`{call.name}` ({type(call.module).__name__}) {problem}.")


@register_rule(nn.RNNCell, nn.LSTMCell, nn.GRUCell)
class RecurrentCellRule(Rule):
    """A single step, on ``[N, I]``: ``W_ih`` gets one outer product with x, ``W_hh`` one with the state before."""

    batched = ()
    own_axes = True

    def states(self, module: Any, args: tuple, kwargs: dict) -> list[tuple[Tensor, int]]:
        """``[N, H]``."""
        return [(t, 0) for t in tensors_in((*args, *kwargs.values(), None)[1]) if t.dim() == 2]

    def handles(self, module: Any, args: tuple, kwargs: dict) -> bool:
        """Not a single step without an axis of examples."""
        return args[0].dim() == 2

    def covers(self, module: nn.Module) -> bool:
        """Only weights and biases."""
        return only_parameters(module, *_KINDS[:4])

    def capture(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input and the state before."""
        x, hx = (*args, *kwargs.values(), None)[:2]
        if x.dim() == 1:
            return {"problem": "was called with [I], which has no axis of examples; pass [N, I]"}
        return {"x": x, "hx": hx}

    def terms(self, call: Call, g: Any) -> dict[str, Term]:
        """Outer products of one position each for weights, the gradients of the pre-activations for biases."""
        _refuse_problem(call)
        zeros = call.x.new_zeros(call.n, call.module.hidden_size)
        states = [state.to(call.x.dtype) for state in tensors_in(call.saved["hx"])] or [zeros]
        run = _algebra(call.module)(_weights(call), call.x[None], states[0], states[-1])
        d_h, *d_c = g if isinstance(g, tuple) else (g,)
        run.pull(torch.zeros_like(run.result), d_h, *d_c)
        return _terms(call, run, _Layout())


@register_rule(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentRule(Rule):
    """Recurrent layers in all their options; the states hold the examples on axis 1.

    Raises:
        UnsupportedModuleError: If there is no axis of examples, or the forward cannot be repeated.
    """

    batched = ()
    own_axes = True

    def covers(self, module: Any) -> bool:
        """Only the weights and biases of the layers."""
        return only_parameters(module, *module._flat_weights_names)

    def output_axes(self, module: Any, outputs: Sequence[Any]) -> list[int]:
        """The output in the layout of the input, then the states."""
        return [self.input_axis(module), *[1] * (len(outputs) - 1)]

    def input_axis(self, module: Any) -> int:
        """As ``batch_first`` says."""
        return 0 if module.batch_first else 1

    def states(self, module: Any, args: tuple, kwargs: dict) -> list[tuple[Tensor, int]]:
        """``[layers, N, H]``."""
        return [(t, 1) for t in tensors_in((*args, *kwargs.values(), None)[1]) if t.dim() == 3]

    def handles(self, module: Any, args: tuple, kwargs: dict) -> bool:
        """Not a single sequence without an axis of examples."""
        return isinstance(args[0], PackedSequence) or args[0].dim() == 3

    def positions(self, module: Any) -> bool:
        """Rows are sequences, as `locate` has counted them."""
        return True

    def locate(
        self, module: Any, args: tuple, kwargs: dict, outputs: Sequence[Tensor], place_of: Callable[[Tensor], Any]
    ) -> tuple[Place, list[Place]] | str:
        """The sequences; of a packed one those that its first steps belong to."""
        if not isinstance(args[0], PackedSequence):
            return super().locate(module, args, kwargs, outputs, place_of)
        data = place_of(args[0].data)
        owner = None if data is None else _owners_of_sequences(args[0], data)
        if owner is None:
            return "was called with a packed sequence in which it cannot be told which steps belong to which example"
        whole = data.space.record.space
        same = torch.equal(owner, torch.arange(whole.rows))
        space = whole if same else Space(data.space.record, owner.numel(), owner, data.space.made)
        return Place(space, 1), [data, *[Place(space, 1)] * (len(outputs) - 1)]

    def before(self, module: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The random state, if there is dropout between the layers."""
        return {"rng": random_state(list(tensors_in((args, kwargs))))} if _drops(module) else {}

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input and the initial states, and a fingerprint of the output by which a repetition is recognised."""
        x, hx = (*args, *kwargs.values(), None)[:2]
        packed = None
        if isinstance(x, PackedSequence):
            x, *packed = x
        elif x.dim() == 2:
            return {"problem": "was called with [T, I], which has no axis of examples; pass [N, T, I] or [T, N, I]"}
        out, dropout = next(tensors_in(output)), module.dropout if _drops(module) else 0.0
        how = {"dropout": dropout, "dtype": out.dtype, "autocast": autocast_state(out.device.type)}
        return {"x": x, "packed": packed, "hx": hx, "print": _fingerprint(out), **how}

    def terms(self, call: Call, g: Any) -> dict[str, Term]:
        """Outer products over the steps for weights, sums over them for biases."""
        _refuse_problem(call)
        stack = _Stack(call)
        upstream = g if isinstance(g, tuple) else (g,)
        if _same(stack.layout.as_given(stack.x), call):
            return stack.pulled(*upstream)
        return {name: Dense(rows) for name, rows in _one_by_one(call, stack.layout, upstream).items()}


def _owners_of_sequences(packed: PackedSequence, place: Place) -> Tensor | None:
    """Example of each sequence in the original order, if all steps of a sequence belong to it."""
    steps = place.owner_of_entry().cpu() if place.axis == 0 else place.space.owners().cpu().expand(len(packed.data))
    sequences = steps[: int(packed.batch_sizes[0])]
    expected = torch.cat([sequences[:count] for count in packed.batch_sizes.tolist()])
    if not torch.equal(steps, expected):
        return None
    back = packed.unsorted_indices
    return sequences if back is None else sequences[back.cpu()]


class _Stack:
    """A recurrent module, run again.

    Attributes:
        layout: Where the examples are.
        runs: The layers, for each its directions.
        noise: What dropout multiplied the output of each layer but the last with; empty without dropout.
        x: What the last layer gave, ``[T, N, F]``.
    """

    def __init__(self, call: Call) -> None:
        self.call, module = call, call.module
        sizes, order, back = call.saved["packed"] or (None, None, None)
        self.layout = _Layout(module.batch_first and sizes is None, sizes, order, back)
        self.active = self.layout.active(call.x.device)
        self.suffixes = ["", "_reverse"][: 1 + module.bidirectional]
        self.runs: list[list[_Unrolled]] = []
        self.noise: list[Tensor] = []
        self.x = self.layout.time_major(call.x)
        states = self._initial()
        with restored(call.saved["rng"], [call.x]) if call.saved["dropout"] else nullcontext():
            for layer in range(module.num_layers):
                if layer and call.saved["dropout"]:
                    self._drop(call.saved["dropout"])
                self._run(layer, states)

    def _initial(self) -> list[Tensor]:
        """The initial states, zeros by default, ``[layers and directions, N, H]``."""
        module, x = self.call.module, self.call.x
        given = [self.layout.sorted(state.to(x.dtype)) for state in tensors_in(self.call.saved["hx"])]
        shape = (module.num_layers * len(self.suffixes), self.x.shape[1])
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)
        return given or [x.new_zeros(*shape, size) for size in sizes]

    def _run(self, layer: int, states: list[Tensor]) -> None:
        algebra, runs = _algebra(self.call.module), []
        for direction, suffix in enumerate(self.suffixes):
            weights = _weights(self.call, f"_l{layer}{suffix}")
            h, c = states[0], states[-1]
            place = layer * len(self.suffixes) + direction
            runs.append(algebra(weights, self.x, h[place], c[place], self.active, bool(direction)))
        self.runs.append(runs)
        self.x = torch.cat([run.result for run in runs], 2) if len(runs) > 1 else runs[0].result

    def _drop(self, p: float) -> None:
        """Dropout with the numbers that the module drew, on a tensor of the shape and dtype that it had there."""
        shape = self.x.shape if self.active is None else self.layout.as_given(self.x).shape
        noise = F.dropout(torch.ones(shape, dtype=self.call.saved["dtype"], device=self.x.device), p, training=True)
        noise = noise.to(self.x.dtype)
        self.noise.append(noise if self.active is None else self.layout.time_major(noise))
        self.x = self.x * self.noise[-1]

    def pulled(self, g: Tensor, *d_states: Tensor) -> dict[str, Term]:
        """The terms of all layers, the last first; a layer is let go of as soon as its terms are there."""
        g, states = self.layout.time_major(g), [self.layout.sorted(state) for state in d_states]
        terms: dict[str, Term] = {}
        while True:
            runs = self.runs.pop()
            layer = len(self.runs)
            for direction, (run, d) in enumerate(zip(runs, g.chunk(len(runs), 2), strict=True)):
                run.pull(d, *(state[layer * len(runs) + direction] for state in states))
                terms |= _terms(self.call, run, self.layout, f"_l{layer}{self.suffixes[direction]}")
            if len(terms) == len(self.call.params):
                return terms
            g = sum((run.of_input() @ run.weights["weight_ih"] for run in runs), start=g.new_zeros(()))
            g = g * self.noise[layer - 1] if self.noise else g


def _drops(module: Any) -> bool:
    """Whether the forward draws random numbers, for dropout between its layers."""
    return module.training and module.dropout > 0 and module.num_layers > 1


def _fingerprint(out: Tensor) -> Tensor:
    """Two numbers for each position, ``[..., 2]``: a fixed projection of the output, and the sum of its sizes."""
    values = at_least_float32(out.detach())
    projection = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype).cos()
    # no matrix product, which autocast would round
    return torch.stack([(values * projection).sum(-1), values.abs().sum(-1)], -1)


def _same(out: Tensor, call: Call) -> bool:
    """Whether a repeated output is that of the forward up to the rounding of its dtype, where that is finite."""
    old, new, autocast = call.saved["print"], _fingerprint(out), call.saved["autocast"]
    dtypes = [call.saved["dtype"], *([autocast["dtype"]] if autocast["enabled"] else [])]
    if out.is_cuda and torch.float32 in dtypes:
        dtypes.append(torch.float16)  # cuDNN uses TF32 by default, which has as many digits
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    sizes = old[..., 1]
    finite = sizes.isfinite()
    close = (new - old).abs().amax(-1) <= eps ** (2 / 3) * (sizes + sizes[finite].mean())
    return bool((close | ~finite).all())


def _one_by_one(call: Call, layout: _Layout, upstream: Sequence[Tensor]) -> dict[str, Tensor]:
    """The module itself once more, as it was called, and one backward for each example.

    Meant for a forward that amplifies rounding errors so much that only itself repeats it, and for random numbers that
    a layer run by itself does not draw again.

    Returns:
        The gradients, ``{name: [N, *p.shape]}``.

    Raises:
        UnsupportedModuleError: If this does not give what the forward gave either.
    """
    module, packed = call.module, call.saved["packed"]
    state = {name: p.detach() for name, p in own_parameters(module).items() if p is not None}
    wanted = [state[name].requires_grad_() for name in call.params]
    x, hx = map_tensors(lambda t: t.to(wanted[0].dtype), (call.x, call.saved["hx"]))
    x = PackedSequence(x, *packed) if packed else x
    random = restored(call.saved["rng"], [call.x]) if call.saved["dropout"] else nullcontext()
    autocast = torch.autocast(**call.saved["autocast"])
    with torch.enable_grad(), random, autocast, kept_state(module), without_forward_hooks(module):
        output = functional_call(module, state, (x, hx), tie_weights=False)
    outputs = [t for t in tensors_in(output) if t.requires_grad]
    if not _same(outputs[0], call):
        raise UnsupportedModuleError(
            f"`{call.name}` ({type(module).__name__}) does not give the same output when its forward is repeated: its "
            f"parameters or settings were changed, or it drew random numbers that cannot be drawn again, as cuDNN's "
            f"dropout does. Use one module per layer, with nn.Dropout between them."
        )
    rows = []
    for n in range(call.n):
        pairs = zip(outputs, upstream, strict=True)
        masked = [layout.only(g, n, states=i > 0).to(out.dtype) for i, (out, g) in enumerate(pairs)]
        grads = torch.autograd.grad(outputs, wanted, masked, retain_graph=True, materialize_grads=True)
        rows.append([at_least_float32(grad) for grad in grads])
    return {name: torch.stack(column) for name, column in zip(call.params, zip(*rows, strict=True), strict=True)}
