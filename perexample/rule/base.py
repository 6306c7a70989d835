"""What a rule is, and a call as it sees it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn

from .._arguments import shown
from .._private import own_parameters, stands_in
from .._tree import tensors_of
from ..errors import RuleContractError
from ..methods import Method
from ..place import Place
from ..terms import Dense, Term
from .contract import asked, checked


@dataclass
class Bound:
    """A call of a torch function in the form of a module call, see `Rule.bind`.

    Attributes:
        module: Options, under the names that the module has for them.
        args: The inputs of the module.
        params: What takes the place of its parameters, by name; ``None`` where there is none.
    """

    module: Any
    args: tuple
    params: Mapping[str, Any]

    def __post_init__(self) -> None:
        """A forgotten comma would be seen far from here."""
        if not isinstance(self.args, (tuple, list)) or not isinstance(self.params, Mapping):
            raise RuleContractError(
                f"Bound(module, args, params) takes the inputs in a tuple, such as (x,), and what takes the place of "
                f"parameters in a dict by their names, not {shown(self.args)} and {shown(self.params)}."
            )


@dataclass
class Call:
    """One call of a module or function, as a rule sees it when the gradient of its output has arrived.

    Attributes:
        module: The module that was called; for a function its options (`Bound`), or the function itself.
        name: Its path and, from the second call on, the number of the call.
        n: Number of rows: the examples, or where several rows belong to one example, all rows.
        params: The parameters that need a gradient, or tensors computed from parameters alone, by name.
        saved: What `Rule.capture` asked for; batched tensors have the rows on axis 0.
    """

    module: Any
    name: str
    n: int
    params: Mapping[str, Tensor]
    saved: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """The module's input, ``[N, ...]``."""
        if "x" not in self.saved:
            raise RuleContractError(
                f"`call.x` of `{self.name}` ({type(self.module).__name__}) was asked for, and `capture` of its rule "
                f"has saved {sorted(self.saved)}; return the input as `x`, or take what was saved from `call.saved`."
            )
        return self.saved["x"]


@dataclass(frozen=True)
class Sizes:
    """What is known of a call before its gradient arrives, see `Rule.most_held`.

    Attributes:
        module: What was called.
        params: The parameters that need a gradient, by name.
        n: Number of rows.
        saved: How many numbers were captured.
        outputs: Shapes of the outputs.
        shared: Names of the parameters that have other calls too, with which their terms will be put together.
    """

    module: Any
    params: Mapping[str, Tensor]
    n: int
    saved: int
    outputs: Sequence[Size]
    shared: Collection[str] = ()

    @property
    def upstream(self) -> int:
        """Numbers in the gradients of the outputs."""
        return sum(map(Size.numel, self.outputs))

    @property
    def factors(self) -> int:
        """Numbers that were captured, and those in the gradients of the outputs."""
        return self.saved + self.upstream

    @property
    def gradients(self) -> int:
        """Numbers in the parameters' gradients of all rows."""
        return self.n * sum(p.numel() for p in self.params.values())

    @property
    def biases(self) -> int:
        """The same of parameters with one axis."""
        return self.n * sum(p.numel() for p in self.params.values() if p.dim() < 2)


class Rule:
    """Per-example gradients of the parameters of one kind of module.

    Override `grad_batch`, or `terms`; everything else has a default derived from it. All methods get the `Call` and
    ``g``, the gradient of the loss with respect to the module's output, examples on axis 0, in at least float32; of
    several outputs a tuple, one for each that is of floating-point numbers, whatever is frozen.
    Nothing here knows of the loss's reduction: a rule is linear in ``g``.

    Attributes:
        batched: Names of tensors that hold the rows on one of their axes, the same for all, where they are captured.
        own_axes: Whether the rule finds the rows itself; otherwise they are brought to axis 0 for it. All inputs that
            depend on the batch must hold the same rows, on the same axis where ``states`` does not name another.
        counts_rows: Whether the outputs have one row per example even if no input shows it, as bags of ids do.
        reads_parameters: Whether the values of parameters are used, so that they must not change before backward.
        computes: Torch functions called in the module's forward that `compute` can take the place of.
        flattens: Whether autograd itself puts the positions of the upstream gradient side by side, as for a matrix
            product, and copies it where they do not lie so; then it is copied before, once for all who need it so.
    """

    batched: tuple[str, ...] = ("x",)
    own_axes: bool = False
    counts_rows: bool = False
    reads_parameters: bool = True
    computes: Collection[Any] = ()
    flattens: bool = False

    def refuse(self, module: nn.Module) -> str | None:
        """The reason why a module cannot have per-example gradients in its present state, or ``None``."""
        return None

    def feature_axes(self, module: nn.Module) -> int | None:
        """How many trailing input axes can never hold the examples; ``None`` if these are always on axis 0."""
        return None

    def positions(self, module: nn.Module) -> bool:
        """Whether what is folded into the axis of the rows becomes positions of a row, or else rows of its own."""
        return self.feature_axes(module) is not None

    def output_axes(self, module: nn.Module, outputs: Sequence[Any]) -> list[int]:
        """For a rule with ``own_axes``: the axis that holds the rows, for each output tensor."""
        return [0] * len(outputs)

    def input_axis(self, module: nn.Module) -> int:
        """For a rule with ``own_axes``: the axis of the first input that holds the rows."""
        return 0

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """A call of a torch function that this rule is registered for, as a call of its module.

        Returns:
            The call; ``None`` if this one cannot be seen so, and is left to the generic rule.
        """
        return None

    def locate(
        self, module: Any, args: tuple, kwargs: dict, outputs: Sequence[Tensor], place_of: Callable[[Tensor], Any]
    ) -> tuple[Place, Sequence[Place | None]] | str:
        """Where a call holds the rows: for the rule's methods, and in each output tensor.

        Args:
            module: What was called.
            args: Its arguments.
            kwargs: Its keyword arguments.
            outputs: Its output tensors.
            place_of: Gives the `Place` of an argument, ``None`` if it does not depend on the batch.

        Returns:
            The place of the first input, which counts the rows that the rule sees, and those of the outputs, ``None``
            for one that belongs to nobody; or what is wrong.
        """
        tensors = tensors_of((args, kwargs) if kwargs else args)
        found = [(t, place) for t in tensors if (place := place_of(t)) is not None]
        x, first = found[0]
        if self.own_axes:
            return self._located_by_itself(module, found, self.row_axes(module, args, kwargs), outputs)
        features = self.feature_axes(module)
        for t, place in found:
            if place is not first and (place.axis != first.axis or not place.agrees(first)):
                return "was called with inputs that hold the examples in different places"
            if place.axis is not None and place.axis >= (1 if features is None else t.dim() - features):
                takes = "takes them on axis 0" if features is None else f"takes the last {features} for features"
                return (
                    f"was called with an input of shape {list(t.shape)} that holds the examples on axis {place.axis}, "
                    f"where {type(self).__name__} {takes} (move them; a rule of your own tells by `feature_axes` which "
                    f"axes can never hold them)"
                )
        rows = first if features is not None else first.each(0, x.shape[0])
        return rows, [first] * len(outputs)

    def _located_by_itself(
        self, module: Any, found: list[tuple[Tensor, Place]], axes: Mapping[int, int], outputs: Sequence[Tensor]
    ) -> tuple[Place, list[Place]] | str:
        axis = self.input_axis(module)
        out = self.output_axes(module, outputs)
        x, first = found[0]
        given = axes.get(id(x), axis)
        if first.axis is not None and first.axis != given:
            return f"was called with the examples on axis {first.axis} of its input, but takes them on axis {given}"
        if problem := misplaced(found[1:], first, axes, axis):
            return problem
        return first.at(axis).each(axis, outputs[0].shape[out[0]]), [first.at(a) for a in out]

    def row_axes(self, module: Any, args: tuple, kwargs: dict) -> dict[int, int]:
        """For a rule with ``own_axes``: axes of the inputs that hold the rows elsewhere than the first, by identity."""
        return {id(t): axis for t, axis in self.states(module, args, kwargs)}

    def handles(self, module: Any, args: tuple, kwargs: dict) -> bool:
        """Whether this call is one that the rule knows; otherwise the operations inside are tapped one by one."""
        return True

    def states(self, module: Any, args: tuple, kwargs: dict) -> list[tuple[Tensor, int]]:
        """Arguments beside the first that hold a row for each of its rows, and on which axis, as initial states do."""
        return []

    def orders(self, args: tuple) -> Sequence[Tensor]:
        """Arguments that say in which order the rows stand, and no more; that may depend on all examples."""
        return ()

    def before(self, module: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
        """State before the module's forward that `capture` cannot know any more; becomes part of what is saved."""
        return {}

    def covers(self, module: nn.Module) -> bool:
        """Whether this rule knows all parameters that the module owns."""
        return True

    def compute(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """What one of the functions in ``computes`` gives, so that it helps `terms`; ``None`` to leave it to torch."""
        return None

    def capture(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """What the backward will need; called right after the module's forward. Default: the first argument.

        Args:
            module: What was called.
            args: Its arguments, also those that were passed by name, in the order of its forward.
            kwargs: Those that can be passed by name only.
            output: What it has returned.

        Returns:
            Tensors, nested as may be, and other values, by names of your own.

        Raises:
            RuleContractError: By default, if the first argument holds no tensor.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        if not tensors_of(x):
            raise RuleContractError(
                f"{type(self).__name__} saves the first argument of {type(module).__name__} as its input, which is "
                f"{shown(x)}; override capture(module, args, kwargs, output) to return what it is: {{'x': args[1]}}."
            )
        return {"x": x}

    def most_held(self, sizes: Sizes) -> int:
        """At most how many numbers the terms of a call hold for the weighted sum, for ``perex(max_memory=...)``.

        Args:
            sizes: What is known of the call before its gradient arrives.

        Returns:
            By default all that was captured, the gradients of the outputs, and those of the parameters for each row.
        """
        return sizes.factors + sizes.gradients

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """The gradients in unevaluated form, by parameter name. Default: through the methods below."""
        shared: dict[str, Any] = {}
        return {name: _RuleTerm(self, call, g, name, shared) for name in call.params}

    def grad_batch(self, call: Call, g: Tensor) -> dict[str, Tensor]:
        """Gradient of each example, ``{name: [N, *p.shape]}``."""
        return {name: term.dense() for name, term in self.terms(call, g).items()}

    def batch_l2(self, call: Call, g: Tensor) -> dict[str, Tensor]:
        """Squared L2 norm of each example's gradient, ``{name: [N]}``. Default: from `grad_batch`."""
        return {name: Dense(G).batch_l2() for name, G in self.grad_batch(call, g).items()}

    def weighted_sum(self, call: Call, g: Tensor, w: Tensor) -> dict[str, Tensor]:
        """``sum_n w_n G_n`` for weights ``[N]``, ``{name: [*p.shape]}``. Default: from `grad_batch`."""
        return {name: Dense(G).weighted_sum(w) for name, G in self.grad_batch(call, g).items()}

    def batch_dot(self, call: Call, g: Tensor) -> dict[str, Tensor]:
        """Inner products of the examples' gradients, ``{name: [N, N]}``. Default: from `grad_batch`."""
        return {name: Dense(G).batch_dot() for name, G in self.grad_batch(call, g).items()}


class _RuleTerm(Term):
    """The term of a rule written with `Rule.grad_batch`; every quantity is computed once for all parameters."""

    def __init__(self, rule: Rule, call: Call, g: Tensor, name: str, shared: dict[str, Any]) -> None:
        self.rule, self.call, self.g, self.name, self.shared = rule, call, g, name, shared
        self.n, self.shape = call.n, call.params[name].shape

    def _quantity(self, kind: str, shape: tuple[int, ...], *args: Tensor) -> Tensor:
        if kind not in self.shared or args:
            self.shared[kind] = asked(self.rule, kind, self.call, self.g, *args)
        return checked(self.rule, self.call, self.shared[kind], kind, self.name, shape)

    def _overridden(self, kind: str) -> bool:
        return getattr(type(self.rule), kind) is not getattr(Rule, kind) and "grad_batch" not in self.shared

    def dense(self) -> Tensor:
        return self._quantity("grad_batch", (self.n, *self.shape))

    def factors(self) -> list[Tensor]:
        return [*tensors_of(self.g), *self.shared.get("grad_batch", {}).values()]

    def methods(self) -> list[Method]:
        if not self._overridden("batch_l2"):
            return super().methods()
        return [Method("the rule's own norms", lambda: (self._quantity("batch_l2", (self.n,)).double(), self))]

    def weighted_sum(self, w: Tensor) -> Tensor:
        if not self._overridden("weighted_sum"):
            return Dense(self.dense()).weighted_sum(w)
        return self._quantity("weighted_sum", tuple(self.shape), w)

    def batch_dot(self) -> Tensor:
        if not self._overridden("batch_dot"):
            return Dense(self.dense()).batch_dot()
        return self._quantity("batch_dot", (self.n, self.n))

    def select(self, rows: Tensor) -> Term:
        return Dense(self.dense()).select(rows)

    def double(self) -> Term:
        return Dense(self.dense()).double()


def evaluate(terms: Mapping[str, Term]) -> None:
    """Let rules compute gradients now that would be asked for them later, when parameters may be gone."""
    for term in terms.values():
        if isinstance(term, _RuleTerm):
            term.dense()


def misplaced(inputs: Sequence[tuple[Tensor, Place]], first: Place, axes: Mapping[int, int], axis: int) -> str | None:
    """What is wrong with inputs that a rule takes row by row beside the first.

    Args:
        inputs: Them, and where they hold the examples.
        first: Where the first one does.
        axes: On which axes they are taken, by identity.
        axis: On which axis all others are.

    Returns:
        The reason; ``None`` if row n is of the same example in all.
    """
    for t, place in inputs:
        if not isinstance(place, Place):
            continue  # the whole call will be lost for this reason
        wanted = axes.get(id(t), axis)
        if place.axis not in (None, wanted) and id(t) in axes and _as_given(t, place, wanted):
            place = place.at(wanted)
        if place.axis not in (None, wanted):
            return (
                f"was called with a tensor of shape {list(t.shape)} that holds the examples on axis {place.axis}, but "
                f"takes them on axis {wanted} there (if they are, and axis {place.axis} is as long by chance, pass "
                f"batches of another size)"
            )
        if not _same_rows(place, first):
            return f"was called with a tensor of shape {list(t.shape)} that holds rows of other examples than its input"
    return None


def _as_given(t: Tensor, place: Place, axis: int) -> bool:
    """Whether the model was given this tensor, so that only its sizes tell where it holds the examples: not which."""
    return place.space.record.was_given(t) and t.dim() > axis and t.shape[axis] == place.size


def _same_rows(place: Place, first: Place) -> bool:
    """Whether two places count rows of the same examples, however these are folded."""
    if place.axis is None or first.axis is None:
        return place.axis is first.axis and place.space.same(first.space)
    if place.agrees(first):
        return True
    return place.each(place.axis, place.size).space.same(first.each(first.axis, first.size).space)


def named_arguments(names: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a function by name.

    Args:
        names: Of the positional ones, in one string.
        args: Positional arguments.
        kwargs: The others.

    Returns:
        Those that were given.

    Example:
        >>> from perexample.rule import named_arguments
        >>> named_arguments("input weight bias", (1, 2), {"bias": 3})
        {'input': 1, 'weight': 2, 'bias': 3}
    """
    return dict(zip(names.split(), args, strict=False)) | dict(kwargs)


def only_parameters(module: nn.Module, *names: str) -> bool:
    """Whether the module owns no parameters but these, and nothing was put where its forward looks for them.

    Old-style ``weight_norm`` has others, and a parent may set what it has computed as an attribute.

    Returns:
        Whether it has no others.
    """
    own = {name for name, p in own_parameters(module).items() if p is not None}
    return own <= set(names) and not stands_in(module, names)


def at_least_float32(tensor: Any) -> Any:
    """Half-precision tensors as float32; anything else as it is."""
    if isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor
