"""The backward side: the context that takes over ``backward``, and one such backward."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._private import has_hook, loss_reduction_of
from ..errors import (
    BatchAxisError,
    ConfigurationError,
    ExtensionError,
    LossError,
    PerExampleError,
    RuleContractError,
    StaleGradientError,
    UncoveredParameterError,
    UnsupportedModuleError,
)
from ..extension import Extension
from ..rule import Call, at_least_float32
from .record import ROOTS, Enter, forget_forwards, quiet
from .tap import Tap
from .view import ParameterView
from .walk import Walk, walk

_ACTIVE = threading.local()


class perex(TorchFunctionMode):  # noqa: N801 - named as a function is, like torch.no_grad
    """Context in which ``loss.backward()`` also computes per-example quantities.

    The forward may run inside or outside of it; it may stay open over many backwards. It holds for one thread.

    Args:
        extensions: What to compute, each saved in the parameters' attribute named by its ``field``.
        loss_reduction: How the loss joins the examples: ``"mean"``, or ``"sum"``. Quantities are always those of each
            example's OWN loss. (``"sum"`` on a mean loss gives quantities of ``loss_n / N``, as BackPACK does.)
        grad: Whether ``p.grad`` is computed too. ``False`` saves its cost; nothing unclipped is then left behind.
        loss_scale: A factor on the loss that is to be divided out again: a number, or a ``GradScaler``.

    Raises:
        ExtensionError: If an extension is no instance of `Extension`, two share a field, or contexts are nested.
        ConfigurationError: If another argument has no meaning.

    Example:
        >>> from perexample import extend, perex
        >>> from perexample.extensions import BatchGrad, BatchL2Grad
        >>> model = extend(nn.Linear(3, 2))
        >>> with perex(BatchGrad(), BatchL2Grad()):
        ...     model(torch.ones(5, 3)).square().sum(1).mean().backward()
        >>> model.weight.grad_batch.shape, model.weight.batch_l2.shape
        (torch.Size([5, 2, 3]), torch.Size([5]))
    """

    def __init__(
        self, *extensions: Extension, loss_reduction: str = "mean", grad: bool = True, loss_scale: Any = 1.0
    ) -> None:
        """Check the arguments; nothing else happens before ``with``."""
        super().__init__()
        _check_extensions(extensions)
        if loss_reduction not in ("mean", "sum"):
            raise ConfigurationError(f"loss_reduction must be 'mean' or 'sum', not {loss_reduction!r}.")
        self.extensions, self.loss_reduction, self.grad = extensions, loss_reduction, bool(grad)
        self._loss_scale = loss_scale

    @property
    def loss_scale(self) -> float:
        """The factor on the loss, now."""
        scale = self._loss_scale.get_scale() if hasattr(self._loss_scale, "get_scale") else self._loss_scale
        if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
            raise ConfigurationError(f"loss_scale must be a positive number or a GradScaler, not {scale!r}.")
        return float(scale)

    def __enter__(self) -> perex:
        """Take over ``backward`` in this thread."""
        if getattr(_ACTIVE, "context", None) is not None:
            raise ExtensionError(
                "perex is open already in this thread; contexts do not nest. Give all extensions to one: "
                "perex(BatchGrad(), ClippedGrad(1.0))."
            )
        forget_forwards()
        super().__enter__()
        _ACTIVE.context = self
        return self

    def __exit__(self, *exc: Any) -> None:
        """Give ``backward`` back."""
        _ACTIVE.context = None
        super().__exit__(*exc)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Let everything pass but ``backward``."""
        if func is torch.Tensor.backward:
            return self._backward(*args, **(kwargs or {}))
        if func is torch.autograd.backward:
            return self._autograd_backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _autograd_backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if len(losses) != 1:
            raise LossError(f"backward of {len(losses)} losses at once: add them up and call backward on the sum.")
        grads = grad_tensors if grad_tensors is not None else grad_variables
        gradient = grads[0] if isinstance(grads, Sequence) else grads
        self._backward(losses[0], gradient, retain_graph, create_graph, inputs)

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        _check_loss(loss, gradient, inputs, self.loss_reduction)
        forget_forwards()
        found = walk([loss])
        run = Backward(self, found)
        keep = create_graph if retain_graph is None else retain_graph
        run.execute(lambda inputs: torch.autograd.backward(loss, None, keep, create_graph, inputs=inputs), bool(keep))


def _check_extensions(extensions: Sequence[Any]) -> None:
    if not extensions:
        raise ExtensionError("perex needs at least one extension: perex(BatchGrad()).")
    for extension in extensions:
        if isinstance(extension, type):
            raise ExtensionError(
                f"perex got the class {extension.__name__}; pass an instance: {extension.__name__}(...)."
            )
        if not isinstance(extension, Extension):
            raise ExtensionError(f"perex got {extension!r}, which is not an instance of perexample.Extension.")
        name = getattr(extension, "field", None)
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.Parameter, name):
            raise ExtensionError(
                f"{type(extension).__name__}.field is {name!r}; it must be an attribute name that parameters do not "
                f"have."
            )
    fields = [extension.field for extension in extensions]
    for name in set(fields):
        if fields.count(name) > 1:
            raise ExtensionError(f"Two extensions write the field `{name}`; use one of them, or two contexts in turn.")


def _check_loss(loss: Tensor, gradient: Any, inputs: Any, reduction: str) -> None:
    if loss.numel() != 1:
        raise LossError(
            f"backward was called on a tensor of shape {list(loss.shape)}; per-example gradients need a scalar loss. "
            f"Use losses.mean() (or losses.sum() with perex(..., loss_reduction='sum'))."
        )
    if gradient is not None:
        raise LossError("backward(gradient=...) would scale the examples' losses; multiply the loss, or leave it out.")
    if inputs is not None:
        raise LossError("backward(inputs=...) would leave out parameters; freeze them with requires_grad_(False).")
    if loss.grad_fn is None:
        raise LossError(
            "The loss has no graph: it does not depend on the batch through any trainable parameter. "
            "Was the forward run under torch.no_grad(), or is everything frozen?"
        )
    actual = loss_reduction_of(loss.grad_fn)
    if actual == "sum" and reduction == "mean":
        raise LossError(
            f"The loss ({loss.grad_fn.name()}) sums over its elements, but perex was told loss_reduction='mean'; "
            f"pass loss_reduction='sum', or use a mean."
        )


class Backward:
    """One backward: gradients arrive at live taps, views fill, extensions compute."""

    def __init__(self, context: perex, found: Walk) -> None:
        """Find out all that can be wrong before anything is computed."""
        self.context, self.found = context, found
        self.names = _parameter_names(found)
        _check_coverage(found, self.names)
        self.n = _number_of_examples(found)
        if self.n:
            for tap in found.taps:
                tap.axis = tap.batch_axis(self.n)
        scale = (self.n if context.loss_reduction == "mean" else 1.0) / context.loss_scale
        self.views = {
            id(p): ParameterView(name, p, self.n, scale) for p, name in self.names.values() if p.requires_grad
        }
        self.arrived: dict[Tap, dict[int, Tensor]] = {tap: {} for tap in found.taps}
        self.pending = dict.fromkeys(self.views, 0)
        for tap in found.taps:
            for key in {id(p) for p in tap.params.values()}:
                self.pending[key] += 1
        self.results: dict[str, dict[int, Tensor]] = {extension.field: {} for extension in context.extensions}
        self.joint = any(extension.joint for extension in context.extensions)

    def execute(self, backward: Callable[[Any], None], retain: bool) -> None:
        """Run autograd once, then finish; fields are written only if all of it succeeded."""
        views = list(self.views.values())
        for extension in self.context.extensions:
            extension.start(views)
        for tap in self.found.taps:
            tap.run = self
        inputs = None if self.context.grad else [*self.found.edges, *self.found.leaves.values()]
        try:
            backward(inputs)
            with torch.no_grad(), quiet():
                self._finish(views)
        finally:
            for tap in self.found.taps:
                tap.run = None
        if not retain:
            for tap in self.found.taps:
                tap.release()

    def arrive(self, tap: Tap, index: int, g: Tensor | None) -> None:
        """Take the gradient of a tap's output; when all live outputs are there, ask the rule."""
        gradients = self.arrived[tap]
        if g is not None:
            gradients[index] = g.detach()
        if len(gradients) == len(self.found.taps[tap]):
            self._complete(tap)

    def _complete(self, tap: Tap) -> None:
        gradients = self.arrived.pop(tap)
        if self.n and gradients:
            device = next(iter(gradients.values())).device.type
            call = tap.call(self.n)  # before quiet(): a checkpoint runs its forward again here, taps and all
            with torch.no_grad(), quiet(), torch.autocast(device, enabled=False):
                self._add_terms(tap, call, gradients)
        for key in {id(p) for p in tap.params.values()}:
            self.pending[key] -= 1
            if not self.pending[key]:
                self._compute(self.views[key])

    def _add_terms(self, tap: Tap, call: Call, gradients: dict[int, Tensor]) -> None:
        g: Any = _upstream(tap, gradients)
        if not tap.rule.own_axes:
            axis = tap.axis
            g = g.movedim(axis, 0)
            call.saved |= {name: call.saved[name].movedim(axis, 0) for name in tap.rule.batched}
        terms = tap.rule.terms(call, g)
        if set(terms) != set(call.params):
            raise RuleContractError(
                f"`{type(tap.rule).__name__}.terms` for `{call.name}` returned the names {sorted(terms)}, but the "
                f"parameters that need a gradient are {sorted(call.params)} (`call.params`)."
            )
        for name, term in terms.items():
            self.views[id(tap.params[name])].add(term)

    def _compute(self, view: ParameterView) -> None:
        with torch.no_grad(), quiet():
            for extension in self.context.extensions:
                result = extension.compute(view)
                if result is not None:
                    self.results[extension.field][id(view.param)] = result
        if not self.joint:
            view.drop()

    def _finish(self, views: list[ParameterView]) -> None:
        for tap in list(self.arrived):
            self._complete(tap)
        for key, view in self.views.items():
            if not any(id(p) == key for tap in self.found.taps for p in tap.params.values()):
                self._compute(view)
        by_name = {view.name: view for view in views}
        for extension in self.context.extensions:
            for name, result in extension.finish(views).items():
                self.results[extension.field][id(by_name[name].param)] = result
        self._write()

    def _write(self) -> None:
        for field, results in self.results.items():
            for p, _ in self.names.values():
                if id(p) in results:
                    setattr(p, field, results[id(p)])
                elif hasattr(p, field):
                    delattr(p, field)


def _upstream(tap: Tap, gradients: dict[int, Tensor]) -> Any:
    """Gradients of all outputs, zeros for those the loss does not depend on, in at least float32."""
    full = []
    for index, (shape, dtype, device) in enumerate(tap.outputs):
        g = gradients.get(index)
        full.append(at_least_float32(torch.zeros(shape, dtype=dtype, device=device) if g is None else g))
    return full[0] if len(full) == 1 else tuple(full)


def _parameter_names(found: Walk) -> dict[int, tuple[nn.Parameter, str]]:
    """All parameters of the models that take part, by identity, with their names."""
    used = {id(p) for tap in found.taps for p in tap.params.values()}
    models = [dict(model.named_parameters()) for model in ROOTS]
    models.sort(key=len, reverse=True)  # of a model and a part of it, both extended, the model names the parameters
    names: dict[int, tuple[nn.Parameter, str]] = {}
    for model in models:
        if any(id(p) in used for p in model.values()):
            for name, p in model.items():
                names.setdefault(id(p), (p, name))
    for tap in found.taps:
        for name, p in tap.params.items():
            if id(p) not in names:
                raise StaleGradientError(
                    f"Parameter `{name}` of `{tap.name}` is no longer part of an extended model: it was replaced after "
                    f"the forward. Replace parameters before the forward, and call extend(model) for new modules."
                )
            if not p.requires_grad:
                raise StaleGradientError(
                    f"Parameter `{names[id(p)][1]}` was frozen between forward and backward; freeze it before."
                )
    return names


def _check_coverage(found: Walk, names: dict[int, tuple[nn.Parameter, str]]) -> None:
    """Errors for what the walk has found that no tap answers for."""
    for tap in found.taps:
        if tap.record.refused:
            name, reason = tap.record.refused[0]
            raise UnsupportedModuleError(f"`{name}` {reason}.")
        if tap.released:
            raise LossError(
                "The graph of this loss was used by an earlier backward and is gone; run the forward again, or pass "
                "backward(retain_graph=True) the first time."
            )
    if found.uncovered:
        p = next(iter(found.uncovered.values()))
        raise _uncovered(p, found)
    if not found.taps:
        raise LossError(
            "The loss does not depend on the batch through any extended model: no call of a module with trainable "
            "parameters lies between. Call extend(model) before the forward."
        )


def _uncovered(p: nn.Parameter, found: Walk) -> PerExampleError:
    for model in ROOTS:
        for path, module in model.named_modules():
            for name, own in module.named_parameters(recurse=False):
                if own is p:
                    return _uncovered_at(path, name, module, found)
    return UncoveredParameterError(
        f"The loss depends on a trainable parameter of shape {list(p.shape)} that belongs to no extended model; call "
        f"extend() on the model it belongs to before the forward, or freeze it with requires_grad_(False)."
    )


def _uncovered_at(path: str, name: str, module: nn.Module, found: Walk) -> PerExampleError:
    where = f"Parameter `{path}.{name}`" if path else f"Parameter `{name}`"
    kind = type(module).__name__
    if found.compiled:
        return UncoveredParameterError(
            f"{where} ({kind}) is used inside a compiled region, where no tap can lie; "
            f"run the extended model without torch.compile."
        )
    if not has_hook(module, Enter):
        return UncoveredParameterError(
            f"{where} belongs to a {kind} that was put into the model after extend(); call extend(model) again, before "
            f"the forward."
        )
    if not found.taps:
        return UncoveredParameterError(
            f"{where} ({kind}) reaches the loss, but no call of an extended module does: the forward ran before "
            f"extend() or under torch.compile, or the loss (a penalty on weights?) does not depend on the batch. Run "
            f"the forward again."
        )
    return UncoveredParameterError(
        f"{where} ({kind}) reaches the loss outside of any module call that has a rule: used as a bare parameter, by "
        f"another module, or in a penalty. Move its use into a module of its own, register the generic rule for the "
        f"module that uses it (register_rule({kind})(GenericRule)), add penalties in the optimizer (weight_decay), "
        f"or freeze it with requires_grad_(False)."
    )


def _number_of_examples(found: Walk) -> int:
    sizes = {tap.record: tap.record.n for tap in found.taps}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"`{record.root_name}` with {n}" for record, n in sizes.items())
        raise BatchAxisError(
            f"The loss joins forwards of different numbers of examples: {listed}. Call the model once for all, or "
            f"with the same number of examples, example n in row n."
        )
    return next(iter(sizes.values()))
