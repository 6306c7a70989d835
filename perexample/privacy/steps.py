"""Steps of a private training that are recorded at its first batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._arguments import flag, losses_of
from .._returned import as_usual
from .._tree import map_tensors, tensors_of
from ..recorded import RecordedStep

if TYPE_CHECKING:
    from .private import Private

_SPREAD = 2.0  # standard deviations of a batch's size above its mean; larger ones are rare, and run as usual


class PrivateStep:
    """Forward and backward of a private training: a `RecordedStep` that is made of the first batch.

    Args:
        private: The training.
        losses: As in `RecordedStep`.
        compiled: As in `RecordedStep`.

    Attributes:
        size: As many examples are replayed at once: ``physical_batch_size``, or few more than a batch has on average.
            Larger batches are run as usual.
    """

    def __init__(self, private: Private, losses: Callable[..., Any], *, compiled: bool) -> None:
        """Nothing is recorded yet."""
        losses_of("losses", losses, "the loss of each example, [N]")
        self._private, self._losses, self._compiled = private, losses, flag("compiled", compiled)
        self._options = {"strategy": private.strategy, "room": None}
        self._step: RecordedStep | None = None
        self.size = _most(private)

    @property
    def compiled(self) -> bool:
        """Whether fused operations are replayed; false before the first batch."""
        return self._step is not None and self._step.compiled

    def __call__(self, *batch: Any) -> Any:
        """Run forward and backward of a batch, or of a piece of one; call ``private.step()`` after it.

        Args:
            batch: What ``losses`` takes.

        Returns:
            The losses ``[N]``, or the tuple that ``losses`` returns, without a graph; of an empty batch before anything
            is recorded the losses alone, if ``losses`` fails on it.
        """
        private, n = self._private, _number(batch)
        if self._step is None and n >= min(2, self.size):  # of one alone nothing can be told by comparison
            filled = _filled(batch, n, self.size)
            self._step = RecordedStep(
                private.model, self._losses, *filled, extensions=private.clipping, strategy=private.strategy,
                compiled=self._compiled,
            )  # fmt: skip
        if self._step is None:
            try:
                return as_usual(self._losses, batch, [private.clipping], self._options)
            except Exception:
                if n:
                    raise
                return torch.zeros(0)  # many models cannot be run on nothing, whose step needs no backward
        return self._step(*batch) if n <= self.size else self._step.as_usual(*batch)


def _most(private: Private) -> int:
    """How many examples are replayed at once."""
    sampler = private.sampler
    rows = -(-sampler.data_size // sampler.world_size)
    mean = rows * sampler.sample_rate
    usual = math.ceil(mean + _SPREAD * math.sqrt(mean * (1 - sampler.sample_rate)))
    return max(1, min(rows, usual, private.physical_batch_size or rows))


def _number(batch: tuple) -> int:
    """The number of examples; `RecordedStep` says what is wrong where it cannot be told."""
    first = next(iter(tensors_of(batch)), None)
    return len(first) if first is not None and first.dim() else 1


def _filled(batch: tuple, n: int, size: int) -> tuple:
    """A batch of ``size`` examples, made of those of this one again and again."""

    def repeated(t: Tensor) -> Tensor:
        return t if not t.dim() or len(t) != n else t[torch.arange(size, device=t.device) % n]

    return map_tensors(repeated, batch)
