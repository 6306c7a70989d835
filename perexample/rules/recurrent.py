"""Rules for recurrent layers and cells, by book-keeping through time.

The gradient goes back through the steps by hand (`recurrent_stack`, `unrolled`, `recurrent_steps`). It yields the
gradients of the pre-activations ``W_ih x + b_ih`` and ``W_hh h + b_hh`` of every step, and the weights' gradients are
sums of outer products over T. No per-example gradient is formed. On a CPU the rule makes the forward's steps too
(`recurrent_forward`), whose outputs are those of torch up to rounding; elsewhere the layers are run again from their
saved input.

References:
    Werbos 1990, doi:10.1109/5.58337 (backpropagation through time); Bu et al. 2022, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from .._looks import holds
from .._norms import BLOCK, Inner, gram_drift, gram_norms, joined, norms_of, of_grams
from .._private import kept_state, own_parameters, repeats_forward, weight_names, without_forward_hooks
from .._tree import map_tensors, tensors_in, tensors_of
from .._trust import inner
from ..errors import UnsupportedModuleError
from ..place import Place, Space
from ..rule import Call, Rule, Sizes, at_least_float32, misplaced, only_parameters, register_rule
from ..terms import Dense, Outer, Term, remembering
from .generic import autocast_state, random_state, restored
from .recurrent_forward import FUNCTIONS, Passing, computed, gradients, passing_of
from .recurrent_stack import Kind, Layout, Stack
from .recurrent_steps import GRU, LSTM, Relu, Tanh
from .unrolled import KINDS, Unrolled


def _algebra(module: Any) -> type[Unrolled]:
    """The algebra of a recurrent layer or cell."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return LSTM
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return GRU
    return Relu if module.nonlinearity == "relu" else Tanh


def _weights(call: Call, suffix: str = "") -> dict[str, Tensor]:
    """The parameters of one layer in one direction by kind, in the dtype of the input."""
    found = {kind: getattr(call.module, kind + suffix, None) for kind in KINDS}
    return {kind: p.detach().to(call.x.dtype) for kind, p in found.items() if p is not None}


class _Left:
    """Left factors of several terms, ``[N, 1, T, G]``, whose norms and products are computed once."""

    def __init__(self, g: Tensor) -> None:
        self.g = g
        self._norms: Tensor | None = None
        self._products: Tensor | None = None

    def norms(self) -> Tensor:
        """``|g_n|``, ``[N]``."""
        if self._norms is None:
            self._norms = norms_of(self.g.flatten(1))
        return self._norms

    def gram_norms(self, x: Tensor) -> Inner:
        """See `perexample._norms.gram_norms`."""
        if len(x) * x.shape[2] ** 2 > BLOCK:
            return gram_norms(self.g, x)
        if self._products is None:
            self._products = self.g @ self.g.mT
        off = gram_drift(x.dtype, self.g.shape[3], x.shape[3])
        return joined([of_grams(self._products, x @ x.mT, off)], x)


class _Steps(Outer):
    """Outer products over the steps, whose left factors are those of another weight too."""

    def __init__(self, left: _Left, x: Tensor, shape: torch.Size) -> None:
        super().__init__(left.g, x, shape)
        self.left = left

    def magnitude_bound(self) -> Tensor:
        return self.left.norms() * norms_of(self.x.flatten(1))

    def _by_gram(self) -> tuple[Tensor, Term]:
        return remembering(self, inner(self, self.left.gram_norms(self.x)))


def _terms(call: Call, run: Unrolled, layout: Layout, suffix: str = "") -> dict[str, Term]:
    """Outer products over the steps for the weights of one layer in one direction, sums over them for its biases."""
    wanted = {kind: kind + suffix for kind in KINDS if kind + suffix in call.params}
    upstream: dict[str, Tensor] = {}
    if wanted.keys() & {"weight_ih", "bias_ih"}:
        upstream["ih"] = layout.examples(run.of_input).contiguous()
    if wanted.keys() & {"weight_hh", "bias_hh"}:
        shared = "ih" in upstream and run.of_hidden is run.of_input
        upstream["hh"] = upstream["ih"] if shared else layout.examples(run.of_hidden).contiguous()
    if "weight_hr" in wanted:
        upstream["hr"] = layout.examples(run.projected)
    sums: dict[int, Tensor] = {}
    lefts = {id(g): _Left(g[:, None]) for g in upstream.values()}
    terms: dict[str, Term] = {}
    for kind, name in wanted.items():
        g = upstream[kind[-2:]]
        if kind.startswith("weight"):
            terms[name] = _Steps(lefts[id(g)], layout.examples(run.factor(kind))[:, None], call.params[name].shape)
            continue
        if id(g) not in sums:
            sums[id(g)] = g.sum(1)
        terms[name] = Dense(sums[id(g)])
    return terms


def _most_held(sizes: Sizes, steps: int) -> int:
    """How many numbers the terms of all weights and biases hold, given the steps of all examples together."""
    return sum(steps * sum(p.shape) for p in sizes.params.values() if p.dim() == 2) + sizes.biases


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
        return only_parameters(module, *KINDS[:4])

    def capture(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input and the state before."""
        x, hx = (*args, *kwargs.values(), None)[:2]
        if x.dim() == 1:
            return {"problem": "was called with [I], which has no axis of examples; pass [N, I]"}
        return {"x": x, "hx": hx}

    def most_held(self, sizes: Sizes) -> int:
        """What weights are multiplied with, and the gradients of the gates."""
        return _most_held(sizes, sizes.n)

    def terms(self, call: Call, g: Any) -> dict[str, Term]:
        """Outer products of one position each for weights, the gradients of the pre-activations for biases."""
        _refuse_problem(call)
        zeros = call.x.new_zeros(call.n, call.module.hidden_size)
        states = [state.to(call.x.dtype) for state in tensors_in(call.saved["hx"])] or [zeros]
        run = _algebra(call.module)(_weights(call), call.x[None], states[0], states[-1])
        d_h, *d_c = g if isinstance(g, tuple) else (g,)
        run.pull(torch.zeros_like(run.result), d_h, *d_c)
        return _terms(call, run, Layout())


@register_rule(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentRule(Rule):
    """Recurrent layers in all their options; the states hold the examples on axis 1.

    Raises:
        UnsupportedModuleError: If there is no axis of examples, or the forward cannot be repeated.
    """

    batched = ()
    own_axes = True
    computes = FUNCTIONS

    def compute(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """On a CPU the steps are made here, so that a backward goes back through them once."""
        return computed(function, args, kwargs)

    def covers(self, module: Any) -> bool:
        """Only the weights and biases of the layers."""
        return only_parameters(module, *weight_names(module))

    def output_axes(self, module: Any, outputs: Sequence[Any]) -> list[int]:
        """The output in the layout of the input, then the states."""
        return [self.input_axis(module), *[1] * (len(outputs) - 1)]

    def input_axis(self, module: Any) -> int:
        """As ``batch_first`` says."""
        return 0 if module.batch_first else 1

    def states(self, module: Any, args: tuple, kwargs: dict) -> list[tuple[Tensor, int]]:
        """``[layers, N, H]``."""
        return [(t, 1) for t in tensors_in((*args, *kwargs.values(), None)[1]) if t.dim() == 3]

    def orders(self, args: tuple) -> Sequence[Tensor]:
        """Those of a packed sequence."""
        return tensors_of(tuple(args[0][2:])) if isinstance(args[0], PackedSequence) else ()

    def handles(self, module: Any, args: tuple, kwargs: dict) -> bool:
        """Not a single sequence without an axis of examples."""
        return isinstance(args[0], PackedSequence) or args[0].dim() == 3

    def positions(self, module: Any) -> bool:
        """Rows are sequences, as `locate` has counted them."""
        return True

    def locate(
        self, module: Any, args: tuple, kwargs: dict, outputs: Sequence[Tensor], place_of: Callable[[Tensor], Any]
    ) -> tuple[Place, Sequence[Place | None]] | str:
        """The sequences; of a packed one those that its first steps belong to."""
        if not isinstance(args[0], PackedSequence):
            return super().locate(module, args, kwargs, outputs, place_of)
        data = place_of(args[0].data)
        owner = None if data is None else _owners_of_sequences(args[0], data)
        if owner is None:
            return "was called with a packed sequence in which it cannot be told which steps belong to which example"
        whole = data.space.record.space
        same = torch.equal(owner, torch.arange(whole.rows, device="cpu"))
        space = whole if same else Space(data.space.record, owner.numel(), owner, data.space.made)
        state = Place(space, 1)  # sizes and orders of the packed sequence belong to nobody
        states = [(t, known) for t, _ in self.states(module, args, kwargs) if (known := place_of(t)) is not None]
        if problem := misplaced(states, state, self.row_axes(module, args, kwargs), 1):
            return problem
        return state, [data, *(state if t.is_floating_point() else None for t in outputs[1:])]

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
        passing = passing_of(out)
        return {"x": x, "packed": packed, "hx": hx, "passing": passing, "print": _print(out, passing), **how}

    def most_held(self, sizes: Sizes) -> int:
        """What weights are multiplied with, and the gradients of the gates."""
        out = sizes.outputs[0]
        steps = out[:-1].numel()
        return _most_held(sizes, steps if len(out) == 3 else steps * sizes.n)  # a packed one is filled up

    def terms(self, call: Call, g: Any) -> dict[str, Term]:
        """Outer products over the steps for weights, sums over them for biases."""
        _refuse_problem(call)
        upstream = g if isinstance(g, tuple) else (g,)
        passing, layout = call.saved.get("passing"), _layout(call)
        if passing is not None and repeats_forward():
            return _shared(call, passing, layout, upstream)
        stack = _repeated(call, layout)
        if passing is not None or _same(layout.as_given(stack.x), call):
            return _pulled(call, stack, upstream)
        return {name: Dense(rows) for name, rows in _one_by_one(call, layout, upstream).items()}


def _owners_of_sequences(packed: PackedSequence, place: Place) -> Tensor | None:
    """Example of each sequence in the original order, if all steps of a sequence belong to it."""
    steps = place.owner_of_entry().cpu() if place.axis == 0 else place.space.owners().cpu().expand(len(packed.data))
    sequences = steps[: int(packed.batch_sizes[0])]
    expected = torch.cat([sequences[:count] for count in packed.batch_sizes.tolist()])
    if not torch.equal(steps, expected):
        return None
    back = packed.unsorted_indices
    return sequences if back is None else sequences[back.cpu()]


def _layout(call: Call) -> Layout:
    """Where a call holds the examples."""
    sizes, order, back = call.saved["packed"] or (None, None, None)
    return Layout(call.module.batch_first and sizes is None, sizes, order, back)


def _suffix(place: tuple[int, int]) -> str:
    """How the names of the parameters of a layer and direction end."""
    return f"_l{place[0]}{'_reverse' if place[1] else ''}"


def _places(module: Any) -> list[tuple[int, int]]:
    """Layers and directions, in the order in which states hold them."""
    return [(layer, direction) for layer in range(module.num_layers) for direction in range(1 + module.bidirectional)]


def _lowest(call: Call) -> int:
    """The first layer with parameters that need a gradient."""
    return next(
        layer for layer, direction in _places(call.module)
        if any(kind + _suffix((layer, direction)) in call.params for kind in KINDS)
    )  # fmt: skip


def _shared(call: Call, passing: Passing, layout: Layout, upstream: Sequence[Tensor]) -> dict[str, Term]:
    """The terms of a forward that was made here; the gradients of its inputs are left for its node in the graph."""
    terms: dict[str, Term] = {}
    node, states = passing.node(), [layout.sorted(state) for state in upstream[1:]]

    def visit(place: tuple[int, int], run: Unrolled) -> None:
        terms.update(_terms(call, run, layout, _suffix(place)))

    found = gradients(node, upstream[0], states, visit, _lowest(call))
    if any(t is not None for t in found):
        passing.leave([upstream[0], *states], found)
    return terms


def _repeated(call: Call, layout: Layout) -> Stack:
    """The layers, run again."""
    module, x, dropout = call.module, layout.time_major(call.x), call.saved["dropout"]
    places = _places(module)
    given = [layout.sorted(state.to(x.dtype)) for state in tensors_in(call.saved["hx"])]
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    states = given or [x.new_zeros(len(places), x.shape[1], size) for size in sizes]
    weights = [_weights(call, _suffix(place)) for place in places]
    kind = Kind(_algebra(module), module.num_layers, 1 + module.bidirectional, dropout)
    with restored(call.saved["rng"], [call.x]) if dropout else nullcontext():
        return Stack(kind, layout, x, states, weights, call.saved["dtype"])


def _pulled(call: Call, stack: Stack, upstream: Sequence[Tensor]) -> dict[str, Term]:
    """The terms of layers that were run again."""
    g, layout = stack.layout.time_major(upstream[0]), stack.layout
    states = [layout.sorted(state) for state in upstream[1:]]
    terms: dict[str, Term] = {}
    for place, run in stack.pull(g, states, _lowest(call)):
        terms |= _terms(call, run, layout, _suffix(place))
    return terms


def _drops(module: Any) -> bool:
    """Whether the forward draws random numbers, for dropout between its layers."""
    return module.training and module.dropout > 0 and module.num_layers > 1


def _fingerprint(out: Tensor) -> Tensor:
    """Two numbers for each position, ``[..., 2]``: a fixed projection of the output, and the sum of its sizes."""
    values = at_least_float32(out.detach())
    projection = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype).cos()
    # no matrix product, which autocast would round
    return torch.stack([(values * projection).sum(-1), values.abs().sum(-1)], -1)


def _print(out: Tensor, passing: Passing | None) -> Tensor | None:
    """A fingerprint, if the forward was made by others."""
    return _fingerprint(out) if passing is None else None


def _same(out: Tensor, call: Call) -> bool:
    """Whether a repeated output is that of the forward up to the rounding of its dtype, where that is finite."""
    old, new, autocast = call.saved["print"], _fingerprint(out), call.saved["autocast"]
    dtypes = [call.saved["dtype"], *([autocast["dtype"]] if autocast["enabled"] else [])]
    if out.is_cuda and torch.float32 in dtypes:
        dtypes.append(torch.float16)  # cuDNN uses TF32 by default, which has as many digits
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    sizes = old[..., 1]
    finite = sizes.isfinite()
    mean = torch.where(finite, sizes, 0).sum() / finite.sum()
    close = (new - old).abs().amax(-1) <= eps ** (2 / 3) * (sizes + mean)
    return holds(close | ~finite)


def _one_by_one(call: Call, layout: Layout, upstream: Sequence[Tensor]) -> dict[str, Tensor]:
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
