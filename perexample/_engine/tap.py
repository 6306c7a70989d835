"""A tap: one place where trainable parameters meet per-example data."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._looks import holds
from .._private import gradient_hooks, memory_order, metadata, saves_otherwise, version, whole_base
from .._tree import map_tensors
from ..errors import StaleGradientError
from ..place import Place, reshaped
from ..rule import Call, Rule, Sizes, at_least_float32
from .table import put

if TYPE_CHECKING:
    from .backward import Backward
    from .record import Record

KEY = "perexample"  # under which a graph node's metadata names its taps
RETURNED = "perexample returned"  # the numbers of its outputs that an outermost forward has returned
SUMMED = "perexample summed"  # the same for a loss of torch that was told to add up: its name, and how many entries
LOST = "perexample lost"  # the same for an output in which the examples cannot be told apart


class _Saved(torch.autograd.Function):
    """A node beside the graph that saves tensors as autograd does: versions checked, hooks for offloading applied."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("this node is never part of a backward")


class _Kept:
    """Saved tensors with their versions, as autograd keeps them where no hooks ask for more."""

    __slots__ = ("_versions", "at_hand")

    def __init__(self, tensors: list[Tensor]) -> None:
        self.at_hand = tuple(t.detach() for t in tensors)
        self._versions = [version(t) for t in self.at_hand]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors, if nobody has written into them since."""
        if any(version(t) != count for t, count in zip(self.at_hand, self._versions, strict=True)):
            raise RuntimeError("a saved tensor has been modified by an inplace operation")
        return self.at_hand


class _Hooked:
    """Saved tensors that hooks have put elsewhere, as those of a checkpoint do."""

    __slots__ = ("_output",)

    def __init__(self, tensors: list[Tensor]) -> None:
        anchor = torch.empty(0, requires_grad=True, device="cpu")
        self._output = _Saved.apply(anchor, *(t.detach() for t in tensors))  # torch < 2.13 frees them with it

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors, back."""
        return self._output.grad_fn.saved_tensors


def _save(tensors: list[Tensor]) -> _Kept | _Hooked:
    return _Hooked(tensors) if saves_otherwise() else _Kept(tensors)


class Tap:
    """One call of a module or a torch function in a forward.

    Attributes:
        name: Path of the module, and the function; from the second call in a forward on with the number of the call.
        rule: The rule that knows its derivatives.
        module: The module, or what takes its place in a call of a function.
        params: The parameters that need a gradient, or tensors computed from parameters alone, by name.
        record: The outermost forward that the call belongs to.
        place: Where the call holds the rows.
        places: Where each output does.
        outputs: Shape, dtype and device of each output that carries gradients.
        beside: The same of others that a rule is given gradients of, zeros, by their number among all these.
        inputs: Edges of the graph at which the call's inputs hang.
        run: The backward that wants this tap's gradients, while there is one.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        module: Any,
        params: Mapping[str, Tensor],
        record: Record,
        saved: dict[str, Any],
        place: Place,
        places: list[Place],
    ) -> None:
        """Save what the rule asked for, through autograd."""
        self.name, self.rule, self.module, self.params, self.record = name, rule, module, dict(params), record
        self.outputs: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self.beside: list[tuple[int, tuple[torch.Size, torch.dtype, torch.device]]] = []
        self.inputs: list[GradientEdge] = []
        self._hooks: list[tuple[weakref.ref[Any], int]] = []
        self._orders: dict[int, list[int]] = {}
        self.run: Backward | None = None
        self.place, self.places = place, places
        self._versions = {key: version(p) for key, p in params.items()} if rule.reads_parameters else {}
        tensors: list[Tensor] = []
        self._plan = {
            key: _Slot(tensors, value) if type(value) is Tensor else map_tensors(lambda t: _Slot(tensors, t), value)
            for key, value in saved.items()
        }
        self._node: _Kept | _Hooked | None = _save(tensors)

    @staticmethod
    def edges_of(inputs: list[Tensor]) -> list[GradientEdge]:
        """Where inputs hang in the graph; to be asked before a function writes into them."""
        return [_edge(t) for t in inputs if t.requires_grad]

    def attach(self, outputs: list[Tensor], edges: list[GradientEdge], inputs: list[Tensor]) -> None:
        """Hook the outputs and mark their graph nodes; remember where the inputs hang."""
        self.inputs = edges
        for index, output in enumerate(outputs):
            # A linear layer may return a view of its product; what is written into it in place rewrites the view only.
            source = output if len(outputs) > 1 else _own_base(output, inputs)
            if source is not output:
                self._put(index, output, source)
            node = source.grad_fn
            assert node is not None
            metadata(node).setdefault(KEY, {})[source.output_nr] = (self, index)
            self.outputs.append((output.shape, output.dtype, output.device))
            handle = source.register_hook(_Arrival(self, index))
            self._hooks.append((weakref.ref(gradient_hooks(source)), handle.id))

    def leave_out(self, shown: list[tuple[Tensor, bool]]) -> None:
        """Remember outputs that the rule knows, and that have no gradient of this call: those that are marked False."""
        self.beside = [(i, (t.shape, t.dtype, t.device)) for i, (t, own) in enumerate(shown) if not own]

    def _put(self, index: int, output: Tensor, source: Tensor) -> None:
        """Views of parts of an output are views of what the output is a view of, which is therefore known too."""
        place, shape = self.places[index], output.shape
        if not output.is_contiguous():
            order = memory_order(output)
            if order is None:
                return
            self._orders[index] = order
            shape = torch.Size([shape[axis] for axis in order])
            place = place if place.axis is None else place.at(order.index(place.axis))
        known = reshaped(place, shape, source.shape)
        if known is not None:
            put(source, known)

    def in_shape(self, index: int, g: Tensor) -> Tensor:
        """The gradient that arrived for an output, in the output's shape."""
        shape, order = self.outputs[index][0], self._orders.get(index)
        if order is None:
            return g if g.shape == shape else g.reshape(shape)
        back = [order.index(axis) for axis in range(len(order))]
        return g.reshape([shape[axis] for axis in order]).permute(back)

    def laid_out(self, g: Tensor) -> Tensor:
        """The gradient of an output with its positions side by side, if the backward is about to copy it to that."""
        if not self.rule.flattens or g.dim() < 3 or g.is_contiguous() or g.requires_grad:
            return g
        flat = g.reshape(-1, g.shape[-1])
        return g if flat.data_ptr() == g.data_ptr() else flat.view(g.shape)

    def hook_last(self) -> None:
        """Let the hooks that were put on the outputs after this tap change the gradient first."""
        for reference, key in self._hooks:
            hooks = reference()
            if hooks is not None and key in hooks:
                hooks[key] = hooks.pop(key)

    @property
    def released(self) -> bool:
        """Whether the saved tensors are gone."""
        return self._node is None

    def release(self) -> None:
        """Let go of the saved tensors."""
        self._node = None

    def kept(self) -> tuple[Tensor, ...]:
        """The saved tensors, where they are at hand as they are."""
        return self._node.at_hand if isinstance(self._node, _Kept) else ()

    def call(self) -> Call:
        """The call as the rule sees it: saved tensors back, in at least float32."""
        self._check_versions()
        tensors: Sequence[Tensor] = self._unpacked()
        tensors = [at_least_float32(t) for t in tensors]
        saved = {
            key: tensors[slot.index]
            if type(slot) is _Slot
            else map_tensors(lambda slot: tensors[slot.index], slot, _Slot)
            for key, slot in self._plan.items()
        }
        return Call(self.module, self.name, self.place.space.rows, self.params, saved)

    def refuse_changes(self) -> None:
        """Raise if the saved tensors, or parameters that the rule needs, are not as they were."""
        self._check_versions()
        self._unpacked()

    def most_held(self, n: int, shared: Collection[int]) -> int:
        """At most how many bytes the terms of this call hold for the weighted sum.

        Args:
            n: Number of examples.
            shared: Which parameters have other calls too.

        Returns:
            The bytes.
        """
        saved: list[int] = []
        map_tensors(lambda slot: saved.append(slot.shape.numel()), self._plan, _Slot)
        shapes, dtypes, _ = zip(*self.outputs, strict=True)
        names = {name for name, p in self.params.items() if id(p) in shared}
        sizes = Sizes(self.module, self.params, max(n, self.place.space.rows), sum(saved), shapes, names)
        several = 1 if self.owner is None else 4  # rows that are put beside each other may be filled up
        return self.rule.most_held(sizes) * several * max(4, *(dtype.itemsize for dtype in dtypes))

    def to_rows(self, t: Tensor) -> Tensor:
        """A tensor with the rows on axis 0, for a rule that wants them there."""
        if self.rule.positions(self.module):
            return self.place.rows_first(t)
        return t

    def of_nobody(self, gradients: Mapping[int, Tensor]) -> bool:
        """Whether a gradient arrives at entries that belong to no example."""
        for index, g in gradients.items():
            place = self.places[index]
            owner = place.space.owner
            if owner is None or holds(owner >= 0):
                continue
            entries = place.owner_of_entry(g.device) < 0
            part = g if place.axis is None else g.movedim(place.axis, 0)[entries]
            if bool((part != 0).any()):
                return True
        return False

    @property
    def owner(self) -> Tensor | None:
        """Example of each row that the rule sees; ``None`` if row n is example n."""
        return self.place.space.owner

    def _unpacked(self) -> tuple[Tensor, ...]:
        assert self._node is not None
        try:
            return self._node.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise StaleGradientError(
                f"A tensor that `{self.name}` ({self.kind}) needs for its gradient was changed in "
                f"place after its forward; do not write into its input or buffers before backward."
            ) from error

    @property
    def kind(self) -> str:
        """What was called, for messages."""
        return type(self.module).__name__ if isinstance(self.module, nn.Module) else "function"

    def _check_versions(self) -> None:
        for key, old in self._versions.items():
            if version(self.params[key]) != old:
                raise StaleGradientError(
                    f"Parameter `{key}` of `{self.name}` was changed in place between forward and backward; "
                    f"step the optimizer after backward."
                )


def _edge(tensor: Tensor) -> GradientEdge:
    """What torch's function returns, which takes longer; nodes of Python functions need what it does for them."""
    node = tensor.grad_fn
    if node is None or isinstance(node, BackwardCFunction):
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def _own_base(output: Tensor, inputs: list[Tensor]) -> Tensor:
    """The tensor of which an output is a view, if the call made it, or wrote into it."""
    base = whole_base(output)
    if base is output or any(output is t for t in inputs):
        return base
    return output if any(base is whole_base(t) or base is t for t in inputs) else base


class _Slot:
    """Stands for a saved tensor in the structure that the rule captured."""

    __slots__ = ("index", "shape")

    def __init__(self, tensors: list[Tensor], tensor: Tensor) -> None:
        self.index, self.shape = len(tensors), tensor.shape
        tensors.append(tensor)


class _Arrival:
    """The tensor hook on an output: hands the gradient to the backward that wants it, if there is one."""

    __slots__ = ("index", "tap")

    def __init__(self, tap: Tap, index: int) -> None:
        self.tap, self.index = tap, index

    def __call__(self, g: Tensor | None) -> Tensor | None:
        if self.tap.run is None:
            return None
        laid = None if g is None else self.tap.laid_out(g)
        self.tap.run.arrive(self.tap, self.index, laid)
        return None if laid is g else laid
