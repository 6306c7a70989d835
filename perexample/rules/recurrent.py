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

from collections.abc import Mapping, Sequence
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
from ..rule import Call, Rule, at_least_float32, only_parameters, register_rule
from ..terms import Dense, Outer, Term
from .generic import _only, random_state, restored

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
        out: What the layer gave before any projection, ``[T, N, H]``.
        result: What it gave, ``[T, N, O]``.
        grads: After `pull`, gradients of the pre-activations, ``[T, N, blocks, H]``.
        projected: After `pull`, gradients of the results, if they are projections.
    """

    gates = 1
    hidden = slice(None)  # those blocks of `grads` that are gradients of W_hh h + b_hh, in the order of its rows

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        x: Tensor,
        h: Tensor,
        c: Tensor | None = None,
        active: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        self.weights, self.x, self.h, self.c, self.active, self.reverse = weights, x, h, c, active, reverse
        steps, n = x.shape[:2]
        self.sizes = [n] * steps if active is None else active.sum(1).tolist()
        self.order = range(steps)[::-1] if reverse else range(steps)
        size = weights["weight_hh"].shape[0] // self.gates
        self.a = F.linear(x, weights["weight_ih"], weights.get("bias_ih")).unflatten(2, (self.gates, size))
        self.out = x.new_zeros(steps, n, size)
        self.result = x.new_zeros(steps, n, h.shape[1]) if "weight_hr" in weights else self.out
        self._run(h)

    def _run(self, h: Tensor) -> None:
        w_hh, b_hh, w_hr = self.weights["weight_hh"], self.weights.get("bias_hh"), self.weights.get("weight_hr")
        for t in self.order:
            now = slice(self.sizes[t])
            b = F.linear(h[now], w_hh, b_hh).unflatten(1, (self.gates, -1))
            new = self._step(t, now, self.a[t, now], b, h[now])
            self.out[t, now] = new
            if w_hr is not None:
                new = self.result[t, now] = F.linear(new, w_hr)
            h = _replaced(h, new)

    def _step(self, t: int, now: slice, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        """The output ``[n, H]``; writes the gates over ``a``.

        Args:
            t: The step.
            now: Those who take part in it.
            a: Pre-activations ``[n, gates, H]`` that come from the input.
            b: The same from the hidden state.
            h: Hidden state before the step, ``[n, O]``.
        """
        raise NotImplementedError

    def _slopes(self) -> Tensor:
        """Derivatives of the output, or the cell state, by the pre-activations, ``[T, N, blocks, H]``."""
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
        self.grads = self._slopes()
        self.d_c = torch.zeros_like(self.out[0]) if d_c is None else d_c
        if self.active is not None:
            self.grads.masked_fill_(~self.active[:, :, None, None], 0.0)
        w_hh, w_hr = self.weights["weight_hh"], self.weights.get("weight_hr")
        self.projected = torch.zeros_like(g) if w_hr is not None else g
        for t in reversed(self.order):
            now = slice(self.sizes[t])
            d = d_h[now] + g[t, now]
            if w_hr is not None:
                self.projected[t, now] = d
                d = d @ w_hr
            past = self._back(t, now, d)
            inner = self.grads[t, now, self.hidden].flatten(1)
            d_h = _replaced(d_h, inner @ w_hh if past is None else torch.addmm(past, inner, w_hh))

    def _back(self, t: int, now: slice, d: Tensor) -> Tensor | None:
        """Turn the slopes of one step into gradients, from that of its output.

        Returns:
            What goes to the hidden state before the step past ``W_hh``, if anything.
        """
        self.grads[t, now].mul_(d.unsqueeze(1))
        return None

    def of_hidden(self) -> Tensor:
        """Gradients of ``W_hh h + b_hh``, ``[T, N, G]``."""
        return self.grads[:, :, self.hidden].flatten(2)

    def of_input(self) -> Tensor:
        """Gradients of ``W_ih x + b_ih``, ``[T, N, G]``."""
        return self.grads.flatten(2)


def _replaced(state: Tensor, new: Tensor) -> Tensor:
    """The state of all examples after the first of them have a new one."""
    return new if len(new) == len(state) else torch.cat([new, state[len(new) :]])


class _Tanh(_Unrolled):
    """``h' = tanh(a + b)``."""

    def _step(self, t: int, now: slice, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        return a.add_(b).tanh_().squeeze(1)

    def _slopes(self) -> Tensor:
        return 1 - self.a.square()


class _Relu(_Unrolled):
    """``h' = max(a + b, 0)``."""

    def _step(self, t: int, now: slice, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        return a.add_(b).relu_().squeeze(1)

    def _slopes(self) -> Tensor:
        return (self.a > 0).to(self.a.dtype)


class _LSTM(_Unrolled):
    """``c' = f c + i g`` and ``h' = o tanh(c')``; gates and blocks are i, f, g, o."""

    gates = 4

    def _run(self, h: Tensor) -> None:
        assert self.c is not None
        self.first_c, self.cells, self.tanh_c = self.c, torch.zeros_like(self.out), torch.zeros_like(self.out)
        super()._run(h)

    def _step(self, t: int, now: slice, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        assert self.c is not None
        a.add_(b)
        a[:, :2].sigmoid_()
        a[:, 2].tanh_()
        a[:, 3].sigmoid_()
        i, f, g, o = a.unbind(1)
        c = torch.addcmul(i * g, f, self.c[now], out=self.cells[t, now])
        self.c = _replaced(self.c, c)
        return torch.tanh(c, out=self.tanh_c[t, now]) * o

    def _slopes(self) -> Tensor:
        slopes, (i, f, g, o) = torch.empty_like(self.a), self.a.unbind(2)
        slopes[:, :, 0] = _through_sigmoid(g, i)
        slopes[:, :, 1] = _through_sigmoid(self.previous(self.cells, self.first_c), f)
        slopes[:, :, 2] = _through_tanh(i, g)
        slopes[:, :, 3] = _through_sigmoid(self.tanh_c, o)
        self.by_c = _through_tanh(o, self.tanh_c)  # of the output by c'
        return slopes

    def _back(self, t: int, now: slice, d: Tensor) -> None:
        d_c = torch.addcmul(self.d_c[now], d, self.by_c[t, now])
        self.grads[t, now, :3].mul_(d_c.unsqueeze(1))
        self.grads[t, now, 3].mul_(d)
        self.d_c = _replaced(self.d_c, d_c.mul_(self.a[t, now, 1]))


class _GRU(_Unrolled):
    """``h' = (1 - z) n + z h`` with ``n = tanh(a + r b)``; gates are r, z, n, blocks r, z, b and a."""

    gates = 3
    hidden = slice(3)

    def _run(self, h: Tensor) -> None:
        self.b = torch.zeros_like(self.out)
        super()._run(h)

    def _step(self, t: int, now: slice, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        a[:, :2].add_(b[:, :2]).sigmoid_()
        self.b[t, now] = b[:, 2]
        r, z, n = a.unbind(1)
        n.addcmul_(r, b[:, 2]).tanh_()
        return torch.addcmul(n, z, h - n)

    def _slopes(self) -> Tensor:
        r, z, n = self.a.unbind(2)
        slopes = self.a.new_empty(*self.out.shape[:2], 4, self.out.shape[2])
        by_a = _through_tanh(1 - z, n)
        slopes[:, :, 0] = _through_sigmoid(by_a * self.b, r)
        slopes[:, :, 1] = _through_sigmoid(self.previous(self.out, self.h) - n, z)
        slopes[:, :, 2] = by_a * r
        slopes[:, :, 3] = by_a
        return slopes

    def _back(self, t: int, now: slice, d: Tensor) -> Tensor:
        super()._back(t, now, d)
        return d * self.a[t, now, 1]

    def of_input(self) -> Tensor:
        return torch.cat([self.grads[:, :, :2], self.grads[:, :, 3:]], 2).flatten(2)


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


@register_rule(nn.RNN, nn.LSTM, nn.GRU, overwrite=True)
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
        prints = {"print": _fingerprint(out), "dtype": out.dtype}
        return {"x": x, "packed": packed, "hx": hx, "dropout": dropout, **prints}

    def terms(self, call: Call, g: Any) -> dict[str, Term]:
        """Outer products over the steps for weights, sums over them for biases."""
        _refuse_problem(call)
        stack = _Stack(call)
        upstream = g if isinstance(g, tuple) else (g,)
        if _same(stack.layout.as_given(stack.x), call):
            return stack.pulled(*upstream)
        return {name: Dense(rows) for name, rows in _one_by_one(call, stack.layout, upstream).items()}


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
        self.x = torch.cat([run.result for run in runs], 2)

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
    return torch.stack([values @ projection, values.abs().sum(-1)], -1)


def _same(out: Tensor, call: Call) -> bool:
    """Whether a repeated output is that of the forward up to the rounding of its dtype, where that is finite."""
    old, new, dtype = call.saved["print"], _fingerprint(out), call.saved["dtype"]
    rough = out.is_cuda and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    eps = torch.finfo(torch.float16 if rough else dtype).eps
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
    with torch.enable_grad(), random, kept_state(module), without_forward_hooks(module):
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
