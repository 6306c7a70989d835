"""A tap: one place where trainable parameters meet per-example data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._private import gradient_hooks, metadata, version, whole_base
from .._tree import map_tensors
from ..errors import BatchAxisError, StaleGradientError
from ..rule import Call, Rule, at_least_float32

if TYPE_CHECKING:
    from .backward import Backward
    from .record import Record

KEY = "perexample"  # under which a graph node's metadata names its taps


class _Saved(torch.autograd.Function):
    """A node beside the graph that saves tensors as autograd does: versions checked, hooks for offloading applied."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("this node is never part of a backward")


def _save(tensors: list[Tensor]) -> Any:
    anchor = torch.empty(0, requires_grad=True)
    return _Saved.apply(anchor, *(t.detach() for t in tensors)).grad_fn


class Tap:
    """One call of a ruled module in a forward.

    Attributes:
        name: Path of the module; from the second call in a forward on with the number of the call.
        rule: The rule that knows its derivatives.
        params: The module's parameters that need a gradient.
        record: The outermost forward that the call belongs to.
        outputs: Shape, dtype and device of each output that carries gradients.
        inputs: Edges of the graph at which the call's inputs hang.
        run: The backward that wants this tap's gradients, while there is one.
        axis: The axis that holds the examples, once a backward has found it out.
        place: Which of the call's output tensors is the first with gradients.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        module: nn.Module,
        params: Mapping[str, nn.Parameter],
        record: Record,
        saved: dict[str, Any],
    ) -> None:
        """Save what the rule asked for, through autograd."""
        self.name, self.rule, self.module, self.params, self.record = name, rule, module, dict(params), record
        self.outputs: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self.inputs: list[GradientEdge] = []
        self._hooks: list[tuple[weakref.ref[Any], int]] = []
        self.run: Backward | None = None
        self.place = 0
        self.axis = 0
        self._versions = {key: version(p) for key, p in params.items()} if rule.reads_parameters else {}
        tensors: list[Tensor] = []
        self._plan = map_tensors(lambda t: _Slot(tensors, t), saved)
        self._node = _save(tensors)

    def attach(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Hook the outputs and mark their graph nodes; remember where the inputs hang."""
        self.inputs = [get_gradient_edge(t) for t in inputs if t.requires_grad]
        for index, output in enumerate(outputs):
            # A linear layer may return a view of its product; what is written into it in place rewrites the view only.
            source = output if len(outputs) > 1 else _own_base(output, inputs)
            edge = get_gradient_edge(source)
            metadata(edge.node).setdefault(KEY, {})[edge.output_nr] = (self, index)
            self.outputs.append((output.shape, output.dtype, output.device))
            handle = source.register_hook(_Arrival(self, index))
            self._hooks.append((weakref.ref(gradient_hooks(source)), handle.id))

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

    def call(self, n: int) -> Call:
        """The call as the rule sees it: saved tensors back, in at least float32."""
        self._check_versions()
        tensors = self._unpacked()
        saved = map_tensors(lambda slot: at_least_float32(tensors[slot.index]), self._plan, _Slot)
        return Call(self.module, self.name, n, self.params, saved)

    def _unpacked(self) -> tuple[Tensor, ...]:
        try:
            return self._node.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise StaleGradientError(
                f"A tensor that `{self.name}` ({type(self.module).__name__}) needs for its gradient was changed in "
                f"place after its forward; do not write into its input or buffers before backward."
            ) from error

    def _check_versions(self) -> None:
        for key, old in self._versions.items():
            if version(self.params[key]) != old:
                raise StaleGradientError(
                    f"Parameter `{key}` of `{self.name}` was changed in place between forward and backward; "
                    f"step the optimizer after backward."
                )

    def batch_axis(self, n: int) -> int:
        """The axis of the inputs and outputs that holds the examples.

        Returns:
            The axis.

        Raises:
            BatchAxisError: If there is none, or it cannot be told from another of the same size.
        """
        fits = self._axes_of_size(n)
        places = self.record.places()
        seen = places.by_call.get(self.name, [])
        place = seen[self.place] if len(seen) > self.place else None
        if place is not None and place.shared:
            raise BatchAxisError(
                f"{self._called()} gives an output of shape {list(self.outputs[0][0])} whatever the number of "
                f"examples: one result is shared by all of them. Expand its input to the batch ([T] or [1, T] to "
                f"[N, T])."
            )
        if place is not None and place.axis in fits:
            return place.axis
        if not fits or place is not None:
            raise BatchAxisError(
                f"{self._called()} has an output of shape {list(self.outputs[0][0])}, in which no axis that can hold "
                f"the examples is one of N = {n}, the size of axis {self.record.batch_dim} of the inputs of "
                f"`{self.record.root_name}`. Do not fold other axes into the batch, and keep the examples on one axis."
            )
        if len(fits) > 1 and n > 1:
            raise BatchAxisError(
                f"{self._called()} has an output of shape {list(self.outputs[0][0])}, in which several axes have size "
                f"N = {n}, and `{self.record.root_name}` cannot be run on fewer examples to tell them apart. Use a "
                f"number of examples that no other axis has."
            )
        return fits[0]

    def _called(self) -> str:
        return f"`{self.name}` ({type(self.module).__name__})"

    def _axes_of_size(self, n: int) -> list[int]:
        """Axes that may hold n examples, in all batched inputs, or for a rule without such in the outputs."""
        shapes = [self._plan[name].shape for name in self.rule.batched] or [self.outputs[0][0]]
        axes: Iterable[int]
        if self.rule.own_axes:
            axes = self.rule.output_axes(self.module, self.outputs)[:1]
        else:
            features = self.rule.feature_axes(self.module)
            axes = range(min(1, len(shapes[0]))) if features is None else range(len(shapes[0]) - features)
        return [a for a in axes if all(len(s) > a and s[a] == n for s in shapes)]


def _own_base(output: Tensor, inputs: list[Tensor]) -> Tensor:
    """The tensor of which an output is a view, if the call made it."""
    base = whole_base(output)
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

    def __call__(self, g: Tensor | None) -> None:
        if self.tap.run is not None:
            self.tap.run.arrive(self.tap, self.index, g)
