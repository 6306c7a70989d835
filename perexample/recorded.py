"""Steps that are recorded once and replayed, so that a fast GPU does not wait for the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._engine.context import perex
from ._looks import noting
from ._precision import full_precision, reduced
from ._private import named_parameters
from ._shards import is_sharded
from ._tape import Tape
from ._tree import map_tensors, tensors_of
from .errors import BatchAxisError, ConfigurationError, LossError, StaleGradientError
from .extension import Extension


@dataclass
class _Found:
    """What a step has found.

    Attributes:
        held: Whether values were what they were taken for.
        losses: Of all examples.
        fields: By extension and parameter.
        more: What else the extensions have found.
    """

    held: Tensor
    losses: Tensor
    fields: list[dict[str, Tensor]]
    more: list[Any]


class RecordedStep:
    """A forward and a backward in a context, recorded once: a call replays them without what Python takes for them.

    On a GPU they become a CUDA graph: a step of a small or middle-sized model takes longer on the host, which launches
    hundreds of short operations, than on the GPU, and with per-example quantities there are two to three times as many;
    a graph is launched as one. On a CPU the operations are run again one by one, without the Python, the hooks and
    autograd around them. ``step(*batch)`` leaves what these lines leave, up to rounding::

        with perex(*extensions, loss_reduction="sum", grad=False):
            losses(*batch).sum().backward()

    Where that looks at values to choose how to go on (whether a norm can be trusted in float32, whether an example is
    finite, whether a sum has overflowed), a recorded step takes what mostly is, and one look at the end tells whether
    it was so; if it was not, these lines are run. So nothing is less exact, or less safe, than without it.

    Batches may have fewer examples than the step was recorded with, and none: it is filled up with the examples that it
    was recorded with, whose losses are multiplied by zero. What ``losses`` does on the host (Python numbers, ``if``,
    prints) is recorded as it was. The model must stay on its device, in its mode, with the same parameters trainable;
    what has changed is an error. Optimizers, schedules, and the bound of `ClippedGrad` may go on as usual.

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
        self._filled = self._counted = self.size
        self._read = tensors_of(self._batch)
        self._asked = [extension.recording() for extension in self.extensions]
        self._replay = self._recorded()
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
        found = self._replay()
        if not found.held.item():
            self.repeated += 1
            self._warn()
            return self._as_usual(batch)
        self._take_over(found, n)
        return found.losses[:n].clone()

    def _recorded(self) -> Callable[[], _Found]:
        """What replays the step, after some steps that leave nothing behind."""
        before = {name: b.clone() for name, b in self.model.named_buffers()}
        try:
            with self._fields_kept():
                return self._captured() if self._real.is_cuda else self._taped()
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

    def _taped(self) -> Callable[[], _Found]:
        self._warm_up()
        tape, own = Tape(), tensors_of(self._batch)
        _check_again(tape, tape.record(self._run, own), own)

        def replay() -> _Found:
            if not reduced(["cpu"]):
                return tape.replay(self._read)
            with full_precision():  # also of the model's own products, as they cannot be told apart
                return tape.replay(self._read)

        return replay

    def _captured(self) -> Callable[[], _Found]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._real.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                found = self._run()

        def replay() -> _Found:
            graph.replay()
            return found

        return replay

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

    def _run(self) -> _Found:
        """The step without a look at any value; what it was taken to be is noted."""
        with noting() as notes, self._context():
            self._summed().backward()
            held = notes.all_hold(self._real.device)
        fields = [
            {name: getattr(p, asked.field) for name, p in self._parameters.items() if hasattr(p, asked.field)}
            for asked in self._asked
        ]
        found = _Found(held, self._losses, fields, [asked.for_replay() for asked in self._asked])
        del self._losses
        self._forget()
        return found

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
        if n != self._counted:
            self._real[:n] = True
            self._real[n:] = False
            self._counted = n
        if n == self.size and not self._real.is_cuda and all(map(_lie_alike, new, own)):
            self._read = new  # no copy is needed
            return n
        self._read = own
        for a, b, c in zip(new, own, spare, strict=True):
            b[:n].copy_(a, non_blocking=True)
            if n < self._filled:
                b[n : self._filled].copy_(c[n : self._filled])
        self._filled = n
        return n

    def _take_over(self, found: _Found, n: int) -> None:
        """Leave the fields at the parameters, as a backward does."""
        for extension, fields, more in zip(self.extensions, found.fields, found.more, strict=True):
            known = {name: (self._parameters[name], field) for name, field in fields.items()}
            for name, field in extension.replayed(more, known, n, self.size).items():
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
        modules = list(self.model.modules())
        parts = [part for module in modules for part in (module._parameters, module._buffers)]
        tensors = [(id(t), t.data_ptr(), t.requires_grad) for part in parts for t in part.values() if t is not None]
        modes = [(id(module), module.training) for module in modules]
        settings = [(e.clip, e.groups) for e in self.extensions if hasattr(e, "clip") and hasattr(e, "groups")]
        return tensors, modes, settings

    def _refuse_changed(self) -> None:
        tensors, modes, _ = self._as_it_was
        now, modes_now, _ = self._state()
        what = "a module or its mode (train, eval)" if modes != modes_now else "the clip function or groups"
        if tensors != now:
            what = "a parameter or buffer, its memory, or whether it is trainable,"
        raise StaleGradientError(
            f"RecordedStep: {what} has changed since the step was recorded, and a replay would not know of it; make a "
            f"new RecordedStep."
        )


_OFTEN = 10


def _number(batch: Any) -> int:
    """The number of examples that all tensors agree on; -1 if they do not."""
    sizes = {t.shape[0] if t.dim() else -1 for t in tensors_of(batch)}
    return sizes.pop() if len(sizes) == 1 else -1


def _lie_alike(t: Tensor, other: Tensor) -> bool:
    return type(t) is Tensor and t.stride() == other.stride() and t.device == other.device and not t.requires_grad


def _check_again(tape: Tape, found: _Found, inputs: list[Tensor]) -> None:
    """Whether what was recorded can be done again, and gives the same, if nothing is drawn at random."""
    try:
        again = tape.replay(inputs)
    except Exception as error:
        raise ConfigurationError(
            f"This step cannot be recorded: an operation of it cannot be called by itself ({error}). Run it as usual."
        ) from error
    for a, b in zip(tensors_of(found), tensors_of(again), strict=True):
        if not tape.random and not torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ConfigurationError(
                "This step cannot be recorded: run again, it gives something else, as if the model counted its calls. "
                "Run it as usual."
            )


def _described(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{list(t.shape)} ({str(t.dtype).removeprefix('torch.')})" for t in tensors) or "no tensors"


__all__ = ["RecordedStep"]
