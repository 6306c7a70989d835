"""Steps that are recorded once and replayed, so that a fast GPU does not wait for the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._arguments import flag, losses_of, shown
from ._chance import random_kept, random_states, seed, set_random_states
from ._compared import SEED, Comparison, Found, refuse_memory
from ._counters import Counters
from ._engine.context import perex
from ._engine.fields import checked_fields
from ._first_run import Seen, first_run, refuse_remembering
from ._host_reads import no_host_reads
from ._kept import buffers_kept, fields_kept, without_grads
from ._looks import holds, noting
from ._precision import full_precision, reduced, without_autocast
from ._private import hooks_after_gradient, named_parameters
from ._program import Program
from ._returned import as_usual, check_returned, joined, parted
from ._shards import is_sharded
from ._static import StaticBatch
from ._tape import Tape
from ._tree import map_tensors, tensors_of
from ._unchanged import (
    Read,
    described,
    may_be_a_tensor,
    settings_of,
    state_of,
    what_differs,
    what_is_left,
    what_is_read,
)
from ._warning import warn
from .errors import ConfigurationError, ExtensionError, StaleGradientError
from .extension import Extension


class RecordedStep:
    """A forward and a backward in a context, recorded once: a call replays them without what Python takes for them.

    With CUDA they become a graph: a step of a small or middle-sized model takes longer on the host, which launches
    hundreds of short operations, than on the GPU, and with per-example quantities there are two to three times as many;
    a graph is launched as one. On a CPU, and on any other device, the operations are run again one by one, without the
    Python, the hooks and autograd around them. ``step(*batch)`` leaves what these lines leave, up to rounding::

        with perex(*extensions, loss_reduction="sum", grad=False):
            losses(*batch).sum().backward()

    With ``grad=True`` it adds to ``p.grad`` too, as a backward does, so that a training without privacy can have norms
    beside its gradients; with ``loss_reduction="mean"`` those of the mean of the losses.

    Before it is used a recorded step is compared with these lines, on its examples in another order and on one alone.

    Where that looks at values to choose how to go on (whether a norm can be trusted in float32, whether an example is
    finite, whether a sum has overflowed), a recorded step takes what mostly is, and one look at the end tells whether
    it was so; if it was not, these lines are run. So nothing is less exact, or less safe, than without it, but for
    norms below 1e-10, which may be rounded up to that.

    Batches may have fewer examples than the step was recorded with, and none: it is filled up with the examples that it
    was recorded with, whose losses count as zero. Indices may move entries as the data say, as long as these stay with
    their examples.

    What ``losses`` does on the host is not done again: prints, hooks, what it puts into lists. That variables around
    it, and settings of the model, which it reads are bound to other numbers or tensors is an error. Where it looks at
    values (``item()``, ``if``), a batch for which it would see others is run as usual, and
    so is one with fewer examples; on a GPU it cannot. It must not write into tensors that were there before. The model
    must stay on its device, in its
    mode, with the same parameters, settings and hooks; what has changed is an error. Optimizers, schedules, and the
    bound of `ClippedGrad` may go on as usual. Autocast belongs inside of ``losses``.

    Args:
        model: The extended model.
        losses: Runs the model on a batch, and returns the loss of each example, ``[N]``. Or a tuple of it and of what
            else is wanted of the forward, such as the outputs: tensors with the examples on the first axis.
        batch: As many examples as a batch may have at most, on the first axis of each tensor; values are real ones.
        extensions: One, or several.
        strategy: As in `perex`.
        room: As in `perex`.
        grad: Whether ``p.grad`` is wanted: that of this process, as `torch.nn.parallel.DistributedDataParallel` does
            not see replays.
        loss_reduction: What ``p.grad`` is the gradient of: ``"sum"`` or ``"mean"`` of the losses. Fields are those of
            each example's own loss either way.
        compiled: Let `torch.compile` fuse the operations, which takes seconds to minutes once. It is for CPUs, needs a
            C++ compiler and torch 2.13, and is used where it is faster, or always if ``strategy`` is not ``"measure"``;
            where it is not used a warning says why.

    Attributes:
        size: How many examples a batch may have.
        repeated: How many calls had to be run as usual.
        compiled: Whether fused operations are replayed.

    Raises:
        ConfigurationError: If the step cannot be recorded: sizes that depend on values (packed sequences, ids that are
            left out, masks as indices), random numbers of a generator of its own, or parameters in shards.
        LossError: If ``losses`` returns something else.

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

    _name = "RecordedStep"  # for messages

    def __init__(
        self,
        model: nn.Module,
        losses: Callable[..., Any],
        *batch: Any,
        extensions: Extension | Sequence[Extension],
        strategy: str = "measure",
        room: float | None = None,
        grad: bool = False,
        loss_reduction: str = "sum",
        compiled: bool = False,
    ) -> None:
        """Run the step a few times, record it, and compare."""
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"{self._name} takes a torch.nn.Module, not {type(model).__name__}.")
        losses_of("losses", losses, "the loss of each example, [N]")
        self.model, self.losses, self.compiled = model, losses, flag("compiled", compiled)
        self.options: dict[str, Any] = {"strategy": strategy, "room": room}
        self.extensions: list[Extension] = [*extensions] if isinstance(extensions, Sequence) else [extensions]
        self.grad, self.loss_reduction = flag("grad", grad), loss_reduction
        self.repeated = 0
        self._before: list[Any] | None = None  # what the run before has found out
        self._by_model = False  # whether the model looks at values
        self._seen, self._read = Seen(), Read(frozenset())
        perex(*self.extensions, loss_reduction=loss_reduction, **self.options)  # raises what is wrong with them
        self._parameters = named_parameters(model)
        self._refuse_parameters()
        if self.grad:
            self._warn_of_processes()
        self._device = self._only_device()
        self._batch = StaticBatch(batch, self._device, self._name)
        self._asked = [_stand_in(extension) for extension in self.extensions]
        before = state_of(self.model, self._device, None)
        kept = random_kept([self._device])
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            buffers_kept(model),
            fields_kept(self._parameters, self._asked),
            kept,
        ):
            self._replay = self._captured() if self._on_graph else self._taped()
            self._compare()
        before |= self._around_was
        self._model_was = state_of(self.model, self._device, self._read)
        self._settings_were = settings_of(self.extensions)
        self._left = what_is_left(self._model_was, before)

    def _refuse_parameters(self) -> None:
        for name, p in self._parameters.items():
            if is_sharded(p):
                raise ConfigurationError(f"Parameter `{name}` is kept in shards (FSDP2); run such a step as usual.")
            if self.grad and hooks_after_gradient(p):
                raise ConfigurationError(
                    f"Parameter `{name}` has a hook that is called when its gradient is complete "
                    f"(register_post_accumulate_grad_hook), which a replay would not call; remove it, or run the step "
                    f"as usual."
                )

    def _warn_of_processes(self) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warn(
                f"{self._name}(grad=True): p.grad is that of this process alone, as DistributedDataParallel does not "
                f"see replays; average it over the processes before each step of the optimizer (all_reduce).",
            )

    @property
    def _on_graph(self) -> bool:
        """Whether it becomes a CUDA graph."""
        return self._device.type == "cuda"

    def _only_device(self) -> torch.device:
        devices = {p.device for p in self._parameters.values()}
        if len(devices) != 1:
            where = " and ".join(sorted(map(str, devices))) or "none: it has no parameters"
            raise ConfigurationError(
                f"{self._name} needs a model on one device; this one is on {where}. Run such a step as usual."
            )
        [device] = devices
        if self.compiled and device.type != "cpu":
            raise ConfigurationError(
                f"{self._name}(compiled=True) is for models on a CPU, and this one is on {device}; leave it out."
            )
        return device

    @property
    def size(self) -> int:
        """How many examples a batch may have."""
        return self._batch.size

    def __call__(self, *batch: Any) -> Any:
        """Take the step.

        Args:
            batch: At most `size` examples, in the form of those that the step was recorded with.

        Returns:
            Their losses, ``[N]``; the tuple, if ``losses`` returns one. New tensors, without a graph.

        Raises:
            StaleGradientError: If the model is not as it was when the step was recorded.
            BatchAxisError: If the batch has another form, or too many examples.
            ConfigurationError: If gradients of the batch are wanted.
        """
        self._refuse_changes()
        with torch.inference_mode(False), torch.enable_grad():
            n = self._batch.fill(batch)
            for extension, asked in zip(self.extensions, self._asked, strict=True):
                extension.prepare(asked)
            # What a model looks at may say something of the whole batch, and would not if that is filled up.
            random = random_states([self._device]) if self._seen.random else None
            found = None if self._by_model and 0 < n < self.size else self._replayed_if_it_can()
            if found is None or not found.held.item():
                self.repeated += 1
                self._warn()
                if random is not None:  # or what happens to be drawn would decide whether it is drawn again
                    set_random_states(random, [self._device])
                return self.as_usual(*batch)
            self._take_over(found, n, 1.0 if self.loss_reduction == "sum" else 1.0 / max(n, 1))
            return joined(*map_tensors(lambda t: t[:n].clone(), (found.losses, found.outputs)))

    def __reduce__(self) -> Any:
        """Refuse to be copied or saved, as what is replayed reads the tensors of this model."""
        raise ConfigurationError(
            f"A {self._name} cannot be copied or saved, as it reads the tensors of its model where they lie; copy or "
            f"save the model (state_dict), and make another {self._name} of it."
        )

    def _replayed_if_it_can(self) -> Found | None:
        """What a replay finds; nothing where it fails, as the step as usual says what is wrong, or nothing is."""
        if self._on_graph:
            return self._replay()
        try:
            return self._replay()
        except Exception:  # noqa: BLE001 - whatever an operation raises on other values
            return None

    def _captured(self) -> Callable[[], Found]:
        """The step as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                found = self._run()

        def replay() -> Found:
            graph.replay()
            return found

        return replay

    def _taped(self) -> Callable[[], Found]:
        """The step as a tape."""
        self._warm_up()
        tape = Tape()
        with no_host_reads():
            self._record(tape)
        program = self._program = tape.program
        if self.compiled:
            with self._as_replayed():
                why = program.fuse(self._batch.read, always=self.options["strategy"] != "measure")
            if why is not None:
                self._not_compiled(why)

        def replay() -> Found:
            with self._as_replayed():
                return self._replayed(program)

        return replay

    def _record(self, tape: Tape) -> None:
        tape.record(self._run, tensors_of(self._batch.own))

    def _replayed(self, program: Program) -> Found:
        return cast(Found, program.replay(self._batch.read))

    def _compare(self) -> None:
        """Whether replays do what the step does as usual; if they do not as compiled, whether they do without."""
        comparison = Comparison(
            self._batch, self.extensions, self._again, self._usual, self._seen, self._device, graph=self._on_graph
        )
        try:
            comparison.refuse_differences(whole=self._by_model)
        except ConfigurationError:
            if not self.compiled:
                raise
            self._program.unfuse()
            comparison.refuse_differences(whole=self._by_model)
            self._not_compiled("compiled they give something else than as usual")

    def _not_compiled(self, why: str) -> None:
        self.compiled = False
        warn(f"{self._name}: its operations are replayed as they are, not compiled: {why}.")

    @contextmanager
    def _as_replayed(self) -> Iterator[None]:
        """What autocast does is on the tape; products are in full, also the model's own, which cannot be told apart."""
        full = full_precision() if reduced([self._device.type]) else nullcontext()
        with full, without_autocast({"cpu", self._device.type}):
            yield

    def _warm_up(self) -> None:
        """What is measured and looked at once, and what a loss is looked at for twice."""
        own, device, found = self._batch.own, self._device, list[Found]()

        def run(*more: Extension) -> None:
            found.append(cast(Found, self._usual(own, *more)))

        seed(SEED, [device])
        self._seen = first_run(run, self.model, self._parameters, own, device)
        self._read = what_is_read(self.losses, self.model, self._seen.called)
        self._around_was = self._read.values()
        seed(SEED, [device])
        for asked, fields in zip(self._asked, found[0].fields, strict=True):  # as they are in a training
            for name, field in fields.items():
                setattr(self._parameters[name], asked.field, field)
        extensions = [*zip(self.extensions, self._asked, strict=True)]
        counters = Counters(self.model, self.losses)  # after a first run, which may set up things
        refuse_remembering(run, [asked for extension, asked in extensions if asked is extension])
        refuse_memory(found[0], found[1], extensions, coarse=self._seen.half or reduced([device.type]))
        counters.refuse_compared(run)
        # What a run leaves to the next one is marked by a tape of its own.
        for rehearsal in (nullcontext(), nullcontext() if self._on_graph else Tape()):
            self._before = None
            with rehearsal:
                self._run()

    def _again(self) -> Found:
        try:
            return self._replay()
        except Exception as error:
            raise ConfigurationError(
                f"This step cannot be recorded: an operation of it cannot be called by itself ({error}). Run it as "
                f"usual."
            ) from error

    def _usual(self, batch: tuple, *more: Extension) -> Found | None:
        """The step on a batch as usual, which leaves nothing behind; ``None`` if it fails on a single example."""
        try:
            with self._context(*more):
                losses, outputs = parted(self.losses(*batch))
                if batch is self._batch.own:
                    check_returned(losses, outputs, self.size)
                losses.sum().backward()
        except Exception:
            if batch is self._batch.own:
                raise
            return None
        return self._collected(losses, outputs, torch.ones((), dtype=torch.bool, device="cpu"))

    def _context(self, *more: Extension) -> perex:
        return perex(*self._asked, *more, loss_reduction="sum", grad=self.grad, **self.options)

    def _run(self) -> Found:
        """The step without a look at any value; what it was taken to be is noted."""
        with noting(everywhere=self._device.type != "cpu", before=self._before) as notes, self._context():
            losses, outputs = parted(self.losses(*self._batch.own))
            check_returned(losses, outputs, self.size)
            torch.where(self._batch.real, losses, torch.zeros_like(losses)).sum().backward()
            found = self._collected(losses, outputs, losses)
            self._note_sums(found)
            found.held = notes.all_hold(self._device)
        self._before, self._by_model = notes.found, notes.by_model
        return found

    def _note_sums(self, found: Found) -> None:
        """A loss of 0 may have a gradient that is none: 0 times infinity."""
        for extension, fields in zip(self.extensions, found.fields, strict=True):
            told = type(extension).replayed is not Extension.replayed
            for field in fields.values() if self.size > 1 and not extension.looks_at_sums else ():
                first = extension.of_first(field, 1)
                if told if first is None else first.shape == field.shape:
                    holds(field.sum().abs() < math.inf)
        for gradient in found.grads.values() if self.size > 1 else ():
            holds(gradient.sum().abs() < math.inf)

    def _collected(self, losses: Tensor, outputs: Any, held: Tensor) -> Found:
        """What a backward has left at the parameters, taken off them."""
        fields = [
            {name: getattr(p, asked.field) for name, p in self._parameters.items() if hasattr(p, asked.field)}
            for asked in self._asked
        ]
        losses, outputs = map_tensors(Tensor.detach, (losses, outputs))
        grads = {name: p.grad for name, p in self._parameters.items() if self.grad and p.grad is not None}
        found = Found(held, losses, outputs, fields, [asked.for_replay() for asked in self._asked], grads)
        without_grads(self._parameters)
        for asked in self._asked:
            if hasattr(asked, "zero_grad"):
                asked.zero_grad()
            for p in self._parameters.values():
                if hasattr(p, asked.field):
                    delattr(p, asked.field)
        return found

    def _take_over(self, found: Found, n: int, factor: float) -> None:
        """Leave the fields at the parameters, as a backward does, and add the gradients, times a factor."""
        results = []
        for extension, fields, more in zip(self.extensions, found.fields, found.more, strict=True):
            known = {name: (self._parameters[name], field) for name, field in fields.items()}
            results.append(checked_fields(extension, extension.replayed(more, known, n, self.size), known, "replayed"))
        for extension, result in zip(self.extensions, results, strict=True):  # when nothing can fail any more
            for name, p in self._parameters.items():
                if name in result:
                    setattr(p, extension.field, result[name])
                elif hasattr(p, extension.field):
                    delattr(p, extension.field)
            extension.commit()
        with torch.no_grad():
            for name, gradient in found.grads.items():
                p = self._parameters[name]
                if p.grad is None:
                    p.grad = gradient * factor  # new, as the next replay may overwrite what it has found
                else:
                    p.grad.add_(gradient, alpha=factor)

    def as_usual(self, *batch: Any) -> Any:
        """Take a step without the recording, with any number of examples."""
        self._refuse_changes()
        batch = map_tensors(lambda t: t.to(self._device), batch)
        mean = self.loss_reduction == "mean"
        found = as_usual(self.losses, batch, self.extensions, self.options, grad=self.grad, mean=mean)
        self._model_was = state_of(self.model, self._device, self._read)  # a model may count its forwards
        return found

    def _warn(self) -> None:
        if self.repeated == OFTEN:
            warn(
                f"A {self._name} had to run {OFTEN} batches as usual so far, as values were not what they mostly are: "
                f"examples that are not finite, positions whose gradients cancel, or, where the model or its loss "
                f"looks at values (item(), if), others than in the recording, or fewer examples. That takes the time "
                f"of both; run the step without it if this goes on.",
            )

    def _refuse_changes(self) -> None:
        what = what_differs(state_of(self.model, self._device, self._read), self._model_was, self._left)
        instead = what is not None and may_be_a_tensor(what)
        what = what or what_differs(settings_of(self.extensions), self._settings_were)
        if what is not None:
            raise StaleGradientError(
                f"{self._name}: {described(what)} has changed since the step was recorded, and a replay would not know "
                f"of it; make a new {self._name}"
                f"{', or keep it in a tensor that is written to in place (fill_)' if instead else ''}."
            )


def _stand_in(extension: Extension) -> Extension:
    """What is asked in an extension's place."""
    asked = extension.recording()
    if not isinstance(asked, Extension) or asked.field != extension.field:
        raise ExtensionError(
            f"{type(extension).__name__}.recording returned {shown(asked)}; it must return an extension for the same "
            f"field, `{extension.field}`, that remembers nothing."
        )
    if asked is extension and type(extension).commit is not Extension.commit:
        raise ExtensionError(
            f"{type(extension).__name__}.recording returned itself, and would remember what is tried to record a step "
            f"(commit); return another extension for `{extension.field}`, which remembers nothing."
        )
    if type(extension).commit is not Extension.commit and type(extension).replayed is Extension.replayed:
        raise ExtensionError(
            f"{type(extension).__name__} remembers what its backwards have found (commit), and is not told what a "
            f"replay has found; override replayed, after which commit is called."
        )
    return asked


OFTEN = 10
__all__ = ["OFTEN", "RecordedStep"]
