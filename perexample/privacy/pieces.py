"""Logical batches that come in pieces: a step waits for the last one, and keeps the sums until then."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from ..errors import StaleGradientError
from .privatizer import Clipping, refuse_scaler
from .sampling import PhysicalBatches


class Pieces:
    """Tells the last piece of a logical batch: the one that brings the sum to the number of examples drawn."""

    def __init__(self, clipping: Clipping, sampler: PhysicalBatches) -> None:
        self.clipping, self.sampler, self.before = clipping, sampler, 0

    def incomplete(self) -> bool:
        """Whether the sum under way lacks examples of its logical batch."""
        due = self.sampler.due()
        return due is not None and self.clipping.examples < due

    def wait(self) -> bool:
        """Whether a step has to wait for more pieces.

        Returns:
            True before the last piece.

        Raises:
            StaleGradientError: If not just one piece came since it was asked last: in the place of one that is left
                out the first of another batch would count.
        """
        examples, due = self.clipping.examples, self.sampler.due()
        came, before, self.before = examples - self.before, self.before, examples
        if due is None or not due:
            self.before = 0
            return False
        piece = min(self.sampler.size, due - before)
        if came != piece:
            self.before = before
            raise StaleGradientError(
                f"step() was called, and {max(came, 0)} examples have come since the last call, where the next piece "
                f"has {piece}: {examples} of the {due} examples of this batch are in the sum. Run the backward of "
                f"every piece in perex(clipping), once, and call step() after it; to leave a batch out begin a new "
                f"iteration over the loader, which draws it again."
            )
        if examples < due:
            return True
        self.before = 0
        return False


def step_on_the_last(optimizer: torch.optim.Optimizer, pieces: Pieces) -> None:
    """Let ``step`` do nothing before the last piece; torch's hooks cannot call a step off."""
    plain = optimizer.step

    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        refuse_scaler(self, kwargs)
        return None if pieces.wait() else plain(*args, **kwargs)

    if hasattr(plain, "_wrapped_by_lr_sched"):
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign] # schedulers need a bound method


def clear_sums_too(optimizer: torch.optim.Optimizer, clipping: Clipping, pieces: Pieces | None) -> None:
    """Let ``zero_grad`` forget clipped sums; torch has hooks for ``step``, none for ``zero_grad``."""
    plain = optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        plain(set_to_none=set_to_none)
        if pieces is None or not (clipping.examples and pieces.incomplete()):
            clipping.zero_grad([p for group in optimizer.param_groups for p in group["params"]])

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def forget_batch(optimizer: torch.optim.Optimizer, clipping: Clipping, pieces: Pieces | None) -> None:
    """A batch that was begun will be drawn again: its pieces so far must not be added twice."""
    if clipping.examples:
        clipping.zero_grad([p for group in optimizer.param_groups for p in group["params"]])
    if pieces is not None:
        pieces.before = 0
