"""What a function of losses returns, and a step that is taken as usual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ._arguments import shown
from ._engine.context import perex
from ._tree import leaves, map_tensors, tensors_of
from .errors import LossError
from .extension import Extension


def check_returned(losses: Any, outputs: Any, size: int) -> None:
    """Raise unless there is the loss of each example, and tensors with the examples on the first axis behind them."""
    if not isinstance(losses, Tensor) or losses.shape != (size,):
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(
            f"RecordedStep: losses returned {got} for {size} examples; it must return the loss of each, "
            f"[{size}], as with reduction='none'."
        )
    others = [t for t in leaves(outputs) if not isinstance(t, Tensor)]
    if others:
        raise LossError(
            f"RecordedStep: losses returned {shown(others[0])} behind the losses, which would be that of the "
            f"recording for ever; return tensors with the examples on the first axis."
        )
    for t in tensors_of(outputs):
        if not t.dim() or len(t) != size:
            raise LossError(
                f"RecordedStep: losses returned {list(t.shape)} behind the losses of {size} examples; such a "
                f"tensor must have the examples on its first axis, as there may be fewer in another batch."
            )


def as_usual(
    losses: Callable,
    batch: tuple,
    extensions: Sequence[Extension],
    options: dict[str, Any],
    *,
    grad: bool = False,
    mean: bool = False,
) -> Any:
    """Take a step that is not recorded, and return what a recorded one returns."""
    with perex(*extensions, loss_reduction="mean" if mean else "sum", grad=grad, **options):
        of_each, outputs = parted(losses(*batch))
        (of_each.mean() if mean else of_each.sum()).backward()
    return joined(*map_tensors(lambda t: t.detach().clone(), (of_each, outputs)))


def parted(returned: Any) -> tuple[Any, Any]:
    """The losses, and a tuple of what was returned behind them, if it was."""
    return (returned[0], returned[1:]) if isinstance(returned, tuple) and returned else (returned, None)


def joined(losses: Tensor, outputs: Any) -> Any:
    """What was returned, of both."""
    return losses if outputs is None else (losses, *outputs)


__all__ = ["as_usual", "check_returned", "joined", "parted"]
