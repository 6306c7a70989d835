"""Steps that are recorded once and replayed, so that a fast GPU does not wait for the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._engine.context import perex
from ._looks import noting
from ._private import named_parameters
from ._shards import is_sharded
from ._tree import map_tensors, tensors_of
from .errors import BatchAxisError, ConfigurationError, LossError, StaleGradientError
from .extension import Extension


class RecordedStep:
    """A forward and a backward in a context, recorded as a CUDA graph: a call replays them in the time the GPU takes.

    On a fast GPU a step of a small or middle-sized model takes longer on the host, which launches hundreds of short
    operations, than on the GPU; with per-example quantities there are two to three times as many. A graph is launched
    as one. ``step(*batch)`` leaves what these lines leave, up to rounding::

        with perex(*extensions, loss_reduction="sum", grad=False):
            losses(*batch).sum().backward()

    Where that looks at values to choose how to go on (whether a norm can be trusted in float32, whether an example is
    finite, whether a sum has overflowed), a recorded step takes what mostly is, and one look at the end tells whether
    it was so; if it was not, these lines are run. So nothing is less exact, or less safe, than without it.

    Batches may have fewer examples than the step was recorded with, and none: it is filled up with the examples that it
    was recorded with, whose losses are multiplied by zero. What ``losses`` does on the host (Python numbers, ``if``,
    prints) is recorded as it was. The model must stay on its device, in its mode, with the same parameters trainable;
    what has changed is an error. Optimizers, schedules, and the bound of `ClippedGrad` may go on as usual.

    On a CPU nothing is recorded; the same steps are run, so that a program runs there too.

    Args:
        model: The extended model.
        losses: Runs the model on a batch, and returns the loss of each example, ``[N]``.
        batch: As many examples as a batch may have at most, on the first axis of each tensor; values are real ones.
        extensions: One, or several.
        options: ``strategy`` and ``room`` of `perex`.

    Attributes:
        size: How many examples a batch may have.
        repeated: How many calls had to be run as usual.

    Raises:
        ConfigurationError: If the step cannot be recorded: sizes that depend on values (packed sequences, ids that are
            left out), or parameters in shards.
        LossError: If ``losses`` returns something else than ``[N]``.

    Example:
        >>> from perexample import RecordedStep, extend
        >>> from perexample.extensions import ClippedGrad
        >>> model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(1.0)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> losses = lambda x, y: nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> step = RecordedStep(model, losses, x, y, extensions=clipping)
        >>> step(x[:5], y[:5]).shape, model.weight.clipped_sum.shape, clipping.examples
        (torch.Size([5]), torch.Size([2, 3]), 5)
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[..., Tensor],
        *batch: Any,
        extensions: Extension | Sequence[Extension],
        **options: Any,
    ) -> None:
        """Run the step a few times, then record it."""
        self.model, self.losses, self.options = model, losses, options
        self.extensions = [extensions] if isinstance(extensions, Extension) else list(extensions)
        self.size, self.repeated = _number(batch), 0
        perex(*self.extensions, **options)  # raises what is wrong with them
        if self.size < 1:
            raise BatchAxisError(
                "RecordedStep needs a batch of one example or more to be recorded with, as many examples on the first "
                "axis of each tensor."
            )
        self._parameters = named_parameters(model)
        for name, p in self._parameters.items():
            if is_sharded(p):
                raise ConfigurationError(f"Parameter `{name}` is kept in shards (FSDP2); run such a step as usual.")
        self._batch = map_tensors(lambda t: t.detach().clone(), batch)
        self._spare = map_tensors(lambda t: t.detach().clone(), batch)
        self._real = torch.ones(self.size, dtype=torch.bool, device=next(iter(self._parameters.values())).device)
        self._filled = self.size
        self._asked = [extension.recording() for extension in self.extensions]
        self._fields: list[dict[str, Tensor]] = []
        self._graph = self._recorded()
        self._as_it_was = self._state()

    def __call__(self, *batch: Any) -> Tensor:
        """Take the step.

        Args:
            batch: At most `size` examples, in the form of those that the step was recorded with.

        Returns:
            Their losses, ``[N]``.

        Raises:
            StaleGradientError: If the model is not as it was when the step was recorded.
            BatchAxisError: If the batch has another form, or too many examples.
        """
        if self._state() != self._as_it_was:
            self._refuse_changed()
        n = self._fill(batch)
        for extension, asked in zip(self.extensions, self._asked, strict=True):
            extension.prepare(asked)
        if self._graph is not None:
            self._graph.replay()
        else:
            with self._fields_kept():
                self._run()
        if not self._held.item():
            self.repeated += 1
            self._warn()
            return self._as_usual(batch)
        self._take_over(n)
        return self._losses[:n].clone()

    def _recorded(self) -> Any:
        """The graph, after some steps that leave nothing behind; ``None`` on a CPU."""
        before = {name: b.clone() for name, b in self.model.named_buffers()}
        try:
            with self._fields_kept():
                if self._real.is_cuda:
                    return self._captured()
                self._warm_up()
            return None
        finally:
            for name, b in self.model.named_buffers():
                b.copy_(before[name])

    @contextmanager
    def _fields_kept(self) -> Iterator[None]:
        """What is at the parameters stays there."""
        kept = [(p, e.field, getattr(p, e.field, None)) for p in self._parameters.values() for e in self._asked]
        try:
            yield
        finally:
            for p, field, value in kept:
                if value is not None:
                    setattr(p, field, value)
                elif hasattr(p, field):
                    delattr(p, field)

    def _warm_up(self) -> None:
        for _ in range(2):  # what is measured and looked at once, and what a loss is looked at for twice
            with self._context():
                self._summed().backward()
            self._forget()
        for _ in range(2):
            self._run()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._real.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                self._run()
        return graph

    def _context(self) -> perex:
        return perex(*self._asked, loss_reduction="sum", grad=False, **self.options)

    def _summed(self) -> Tensor:
        """The sum of the losses of those examples that are in the batch."""
        losses = self.losses(*self._batch)
        if not isinstance(losses, Tensor) or losses.shape != (self.size,):
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise LossError(
                f"RecordedStep: losses returned {got} for {self.size} examples; it must return the loss of each, "
                f"[{self.size}], as with reduction='none'."
            )
        self._losses = losses.detach()
        return torch.where(self._real, losses, torch.zeros_like(losses)).sum()

    def _run(self) -> None:
        """The step without a look at any value; what it was taken to be is noted."""
        with noting() as notes, self._context():
            self._summed().backward()
            self._held = notes.all_hold(self._real.device)
        self._fields = [
            {name: getattr(p, asked.field) for name, p in self._parameters.items() if hasattr(p, asked.field)}
            for asked in self._asked
        ]
        self._forget()

    def _forget(self) -> None:
        """Take off what the backward has left at the parameters."""
        for asked in self._asked:
            if hasattr(asked, "zero_grad"):
                asked.zero_grad()
            for p in self._parameters.values():
                if hasattr(p, asked.field):
                    delattr(p, asked.field)

    def _fill(self, batch: tuple) -> int:
        """Copy a batch to where the recorded step reads it; returns the number of examples."""
        new, own, spare = tensors_of(batch), tensors_of(self._batch), tensors_of(self._spare)
        n, forms = _number(batch), [[(t.shape[1:], t.dtype) for t in tensors] for tensors in (new, own)]
        if not 0 <= n <= self.size or forms[0] != forms[1]:
            raise BatchAxisError(
                f"RecordedStep was recorded with {_described(own)}, and was called with {_described(new)}; only the "
                f"number of examples may be another, at most {self.size}. Record a step with the largest batch."
            )
        for a, b, c in zip(new, own, spare, strict=True):
            b[:n].copy_(a, non_blocking=True)
            if n < self._filled:
                b[n : self._filled].copy_(c[n : self._filled])
        if n != self._filled:
            self._real[:n] = True
            self._real[n:] = False
            self._filled = n
        return n

    def _take_over(self, n: int) -> None:
        """Leave the fields at the parameters, as a backward does."""
        for extension, asked, fields in zip(self.extensions, self._asked, self._fields, strict=True):
            known = {name: (self._parameters[name], field) for name, field in fields.items()}
            for name, field in extension.replayed(asked, known, n, self.size).items():
                setattr(self._parameters[name], extension.field, field)
        for extension in self.extensions:
            extension.commit()

    def _as_usual(self, batch: tuple) -> Tensor:
        batch = map_tensors(lambda t: t.to(self._real.device), batch)
        with perex(*self.extensions, loss_reduction="sum", grad=False, **self.options):
            losses = self.losses(*batch)
            losses.sum().backward()
        return losses.detach()

    def _warn(self) -> None:
        if self.repeated == _OFTEN:
            warnings.warn(
                f"A RecordedStep had to run {_OFTEN} batches as usual so far, as values were not what they mostly are: "
                f"examples that are not finite, or positions whose gradients cancel. That takes the time of both; run "
                f"the step without it if this goes on.",
                stacklevel=3,
            )

    def _state(self) -> tuple[Any, ...]:
        """All that must stay as it was."""
        tensors = [(t.data_ptr(), t.requires_grad) for t in (*self._parameters.values(), *self.model.buffers())]
        modes = [module.training for module in self.model.modules()]
        settings = [(e.clip, e.groups) for e in self.extensions if hasattr(e, "clip") and hasattr(e, "groups")]
        return tensors, modes, settings

    def _refuse_changed(self) -> None:
        tensors, modes, _ = self._as_it_was
        now, modes_now, _ = self._state()
        what = "the mode of a module (train, eval)" if modes != modes_now else "the clip function or groups"
        if tensors != now:
            what = "the memory of a parameter or buffer, or whether it is trainable"
        raise StaleGradientError(
            f"RecordedStep: {what} has changed since the step was recorded, and a replay would not know of it; make a "
            f"new RecordedStep."
        )


_OFTEN = 10


def _number(batch: Any) -> int:
    """The number of examples that all tensors agree on; -1 if they do not."""
    sizes = {t.shape[0] if t.dim() else -1 for t in tensors_of(batch)}
    return sizes.pop() if len(sizes) == 1 else -1


def _described(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{list(t.shape)} ({str(t.dtype).removeprefix('torch.')})" for t in tensors) or "no tensors"


__all__ = ["RecordedStep"]
