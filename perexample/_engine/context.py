"""The context that takes over ``backward``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._arguments import flag, is_word, positive, real, shown
from .._private import loss_reduction_of, metadata, sums_losses, undispatched, whole_arguments
from ..errors import ConfigurationError, ExtensionError, LossError
from ..extension import Extension
from ..methods import ROOM, Choice
from .hooks import forget_forwards
from .kinds import HOOKING
from .replayed import backward_of
from .state import STATE
from .tap import SUMMED
from .walk import walk

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
        strategy: How the fastest of several exact methods is found for each use of a parameter: ``"measure"`` tries
            those that have a chance once for each shape; ``"model"`` goes by estimates, so that every run takes the
            same and gives the same bits. `plan` shows what is taken.
        max_memory: Bytes that may be held until the clip factors are known; without it there is no bound. Where a step
            may need more, nothing is held, and a second backward through the same graph forms the sums, in which hooks
            and custom functions run again; the graph and its activations stay until then. What it may need is told
            from shapes beforehand (`Rule.most_held`), and may be more than it does.
        room: How many times the least memory may be held for a parameter until the clip factors are known, if that is
            faster: 1.6 unless given. With a large one per-example gradients are kept, however large, wherever that
            is faster than to go on with the factors. With ``max_memory`` it is 1.

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

    waits_for_backward = True  # lets everything else pass

    def __init__(
        self,
        *extensions: Extension,
        loss_reduction: str = "mean",
        grad: bool = True,
        loss_scale: Any = 1.0,
        strategy: str = "measure",
        max_memory: float | None = None,
        room: float | None = None,
    ) -> None:
        """Check the arguments; nothing else happens before ``with``."""
        super().__init__()
        _check_extensions(extensions)
        if not is_word(loss_reduction, ("mean", "sum")):
            raise ConfigurationError(f"loss_reduction must be 'mean' or 'sum', not {shown(loss_reduction)}.")
        self.extensions, self.loss_reduction, self.grad = extensions, loss_reduction, flag("grad", grad)
        self._loss_scale, self.max_memory = loss_scale, _checked_memory(max_memory, extensions)
        choice = Choice(strategy, room=_room(room, max_memory))
        self.strategy, self.room = choice.strategy, choice.room

    @property
    def loss_scale(self) -> float:
        """The factor on the loss, now."""
        scale = self._loss_scale.get_scale() if hasattr(self._loss_scale, "get_scale") else self._loss_scale
        return positive("loss_scale", scale, "a positive number or a GradScaler")

    def __enter__(self) -> perex:
        """Take over ``backward`` in this thread."""
        if getattr(_ACTIVE, "context", None) is not None:
            raise ExtensionError(
                "perex is open already in this thread; contexts do not nest. Give all extensions to one: "
                "perex(BatchGrad(), ClippedGrad(1.0)). `with private:` opens one too; for more than its sums write "
                "perex(private.clipping, BatchL2Grad(), grad=False) in its place. A recording "
                "opens one as well: make it before. A generator that was left in a context keeps it open until its "
                "close()."
            )
        forget_forwards()
        super().__enter__()
        _ACTIVE.context = self
        STATE.opened, STATE.once = object(), False
        return self

    def __exit__(self, *exc: Any) -> None:
        """Give ``backward`` back."""
        forget_forwards()  # what an interrupt has left above this context would be taken off instead of it
        _ACTIVE.context = STATE.opened = None
        super().__exit__(*exc)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Let everything pass but ``backward``."""
        if func is torch.Tensor.backward:
            return self._backward(*args, **(kwargs or {}))
        if func is torch.autograd.backward:
            return self._autograd_backward(*args, **(kwargs or {}))
        if func in HOOKING:  # a user's hook is not called more than once
            STATE.once = True
        found = func(*args, **whole_arguments(func, kwargs or {}))
        if kwargs and kwargs.get("reduction") == "sum" and isinstance(found, Tensor) and found.grad_fn is not None:
            entries = next((t.numel() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), 0)
            metadata(found.grad_fn)[SUMMED] = func.__name__, entries  # what it is made of may not tell
        return found

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
        forget_forwards()
        with undispatched():
            _check_loss(loss, gradient, inputs, self.loss_reduction)
            run = backward_of(self, loss, walk([loss]))
        keep = create_graph if retain_graph is None else retain_graph

        def backward(inputs: Any, keep: bool) -> None:
            # A product, as a gradient that is passed in makes torch import what it needs for symbolic shapes.
            with torch.enable_grad():
                seeded = loss if run.seed == 1.0 else loss * run.seed
            torch.autograd.backward(seeded, None, keep, create_graph, inputs=inputs)

        run.execute(backward, bool(keep))


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
        if type(extension).compute is Extension.compute and type(extension).finish is Extension.finish:
            raise ExtensionError(
                f"{type(extension).__name__} has neither compute(self, view) nor finish(self, views), so nothing would "
                f"be computed; override one of them."
            )
        name = getattr(extension, "field", None)
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.Parameter, name):
            taken = isinstance(name, str) and hasattr(nn.Parameter, name)
            raise ExtensionError(
                f"{type(extension).__name__}.field is {name!r}; it must be an attribute name that parameters do not "
                f"have" + (f", and each tensor of torch has its own p.{name}." if taken else ".")
            )
    fields = [extension.field for extension in extensions]
    for name in set(fields):
        if fields.count(name) > 1:
            raise ExtensionError(f"Two extensions write the field `{name}`; use one of them, or two contexts in turn.")


def _checked_memory(max_memory: float | None, extensions: Sequence[Extension]) -> int | None:
    if max_memory is None:
        return None
    memory = real("max_memory", max_memory, "a number of bytes, 0 or more", lambda x: x >= 0)
    for extension in extensions:
        if extension.joint and not extension.late_sums:
            raise ConfigurationError(
                f"perex(max_memory=...) fills sums in after {type(extension).__name__}.finish, which may not be ready "
                f"for that; leave max_memory out, or set late_sums = True on the class (docs/extending)."
            )
    return int(memory)


def _room(room: float | None, max_memory: float | None) -> float:
    if room is not None and max_memory is not None:
        raise ConfigurationError("perex(max_memory=...) holds as little as it can; leave room out.")
    if room is None:
        return ROOM if max_memory is None else 1.0
    return room


def _check_loss(loss: Tensor, gradient: Any, inputs: Any, reduction: str) -> None:
    if loss.numel() != 1:
        raise LossError(
            f"backward was called on a tensor of shape {list(loss.shape)}; per-example gradients need a scalar loss. "
            f"Use losses.mean() (or losses.sum() with perex(..., loss_reduction='sum'); where backward was given "
            f"weights, (weights * losses).sum())."
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
    summed = loss_reduction_of(loss.grad_fn) == "sum" or sums_losses(loss.grad_fn) or SUMMED in metadata(loss.grad_fn)
    if summed and reduction == "mean":
        raise LossError(
            f"The loss ({loss.grad_fn.name()}) sums over its elements, but perex was told loss_reduction='mean'; "
            f"pass loss_reduction='sum', or use a mean."
        )
