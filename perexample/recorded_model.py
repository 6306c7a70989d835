"""Models that are recorded once, and replayed in loops of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import shown
from ._chance import random_kept, random_states, set_random_states
from ._compared import Found
from ._engine.hooks import Enter
from ._engine.replayed import leave
from ._engine.state import STATE
from ._kept import buffers_kept
from ._looks import would_see_the_same
from ._private import dispatched, hook_of, memory_of, undispatched, version
from ._program import Program
from ._static import fitted
from ._tape import Tape
from ._tree import leaves, map_tensors, tensors_of
from ._unchanged import described, settings_of, state_of, what_differs
from ._warning import warn
from .errors import ConfigurationError, StaleGradientError
from .extension import Extension
from .recorded import OFTEN, RecordedStep


class RecordedModel:
    """An extended model that is recorded once: calls of it in a loop of one's own, and their backward, are replayed.

    It takes the place of the model where ``loss.backward()`` runs in `perex`, and leaves the same fields, without most
    of what Python, hooks and autograd take for them. The loss is computed as always, and may be any that examples have
    of their own::

        recorded = RecordedModel(model, x, extensions=clipping)
        for x, y in loader:
            with perex(clipping, grad=False):
                F.cross_entropy(recorded(x), y).backward()
            optimizer.step()

    A `RecordedStep` replays the loss too, which takes less time still; on a GPU it is a CUDA graph, and this is not:
    there operations are launched one by one.

    Before it is used the recording is compared with the model, on its examples in another order and on fewer. What a
    replay takes for granted (that norms can be trusted in float32, that examples are finite) is looked at after each,
    and if it was not so the batch is run again as usual. So are batches with more examples than it was recorded with.
    Those with fewer, or none, are filled up with these. Where the model looks at values (``item()``, ``if``), batches
    for which it would see others are run as usual, and so are those with fewer examples.

    The model must stay on its device, in its mode, with the same parameters, settings and hooks; what has changed is an
    error. Optimizers, schedules, and the bound of `ClippedGrad` may go on as usual. Without gradients
    (``torch.no_grad()``) a call is that of the model itself, in any mode.

    Args:
        model: The extended model.
        args: Arguments of a call, with as many examples as a batch is to have at most on the first axis of each tensor.
        extensions: One, or several: those that `perex` will have, the same objects.
        strategy: As in `perex`, which must have the same.
        room: As in `perex`, which must have the same.
        grad: As in `perex`, which must have the same: whether ``p.grad`` is wanted, that of this process alone.
        compiled: As in `RecordedStep`: let `torch.compile` fuse the operations of the forward, and of the rest.
        kwargs: Keyword arguments of the call.

    Attributes:
        model: The model.
        size: How many examples a replay may have.
        repeated: How many calls with gradients were run as usual.
        compiled: Whether fused operations are replayed.

    Raises:
        ConfigurationError: If the model cannot be recorded: outputs without the examples on the first axis, and as for
            `RecordedStep`.

    Example:
        >>> from perexample import RecordedModel, extend, perex
        >>> from perexample.extensions import ClippedGrad
        >>> model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(1.0)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> recorded = RecordedModel(model, x, extensions=clipping)
        >>> with perex(clipping, grad=False):
        ...     nn.functional.cross_entropy(recorded(x[:5]), y[:5]).backward()
        >>> model.weight.clipped_sum.shape, clipping.examples
        (torch.Size([2, 3]), 5)
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        extensions: Extension | Sequence[Extension],
        strategy: str = "measure",
        room: float | None = None,
        grad: bool = False,
        compiled: bool = False,
        **kwargs: Any,
    ) -> None:
        """Run the model a few times, record it, and compare."""
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"RecordedModel takes a torch.nn.Module, not {type(model).__name__}.")
        enter = hook_of(model, Enter)
        if enter is None:
            raise ConfigurationError("RecordedModel takes an extended model; call extend(model) before.")
        if not enter.root:
            raise ConfigurationError(
                f"RecordedModel takes the model that was extended as a whole, and this is `{enter.name}` of one."
            )
        if enter.batch_dim != 0:
            raise ConfigurationError(
                f"RecordedModel needs the examples on the first axis, and the model was extended with "
                f"batch_dim={enter.batch_dim}; call the model itself."
            )
        self.model = model
        self._step = _Step(model, args, kwargs, extensions, strategy, room, grad=grad, compiled=compiled)

    def __getattr__(self, name: str) -> Any:
        """Say where the rest of a model is."""
        raise AttributeError(f"A RecordedModel has no `{name}`; ask its model: recorded.model.{name}.")

    @property
    def size(self) -> int:
        """How many examples a replay may have."""
        return self._step.size

    @property
    def repeated(self) -> int:
        """How many calls with gradients were run as usual."""
        return self._step.repeated

    @property
    def compiled(self) -> bool:
        """Whether fused operations are replayed."""
        return self._step.compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            args: As it was recorded with, but for the number of examples.
            kwargs: The same.

        Returns:
            What the model returns.

        Raises:
            StaleGradientError: If the model is not as it was when it was recorded.
            BatchAxisError: If the arguments have another form.
            ConfigurationError: If gradients of the arguments are wanted, or it is called inside of another extended
                model.
        """
        if not torch.is_grad_enabled():
            return self.model(*args, **kwargs)
        if STATE.frames:
            raise ConfigurationError(
                "A RecordedModel cannot be called inside of another extended model; record the outer one."
            )
        with undispatched():  # perex is a function mode, and there is much to look at
            return self._step.outputs(args, kwargs)


class _Pending:
    """A call that waits for the gradients of its outputs."""

    name, expected = "RecordedModel", False

    def __init__(
        self,
        step: _Step,
        n: int,
        finish: Callable[[Sequence[Tensor]], Found],
        arguments: tuple,
        random: Sequence[Tensor] | None,
    ) -> None:
        self._step, self._n, self._finish, self._arguments, self._random = step, n, finish, arguments, random
        self._versions = step.versions()
        self.extensions, self.options = step.extensions, step.context_options

    def replay(self, gradients: Sequence[Tensor | None], factor: float) -> bool:
        with undispatched():
            self._step.refuse_written(self._versions, later=True)
            done = self._step.finish(self._finish, self._n, gradients, factor)
        if done:  # outputs may be kept, and this with them
            del self._finish, self._arguments, self._random
        return done

    def again(self) -> list[Tensor]:
        self._step.refuse_written(self._versions, later=False)
        self._step.count_repeated()
        (args, kwargs), random = self._arguments, self._random
        del self._finish, self._arguments, self._random
        with random_kept([self._step.home]), torch.enable_grad(), self._step.autocast():
            self._step.refuse_changed()
            if random is not None:
                set_random_states(random, [self._step.home])
            return self._step.with_gradients(self._step.model(*args, **kwargs))


class _Step(RecordedStep):
    """A step whose losses are products of outputs and given gradients, which stops for these."""

    _name = "RecordedModel"

    def __init__(
        self,
        model: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
        extensions: Extension | Sequence[Extension],
        strategy: str,
        room: float | None,
        *,
        grad: bool,
        compiled: bool,
    ) -> None:
        self.model = model
        self._carries: list[bool] = []
        self._same: Tensor | None = None
        self._largest = 0
        self._keys, self._any_order = [*kwargs], _by_name(model, kwargs)
        self.home = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._autocast = torch.is_autocast_enabled(self.home.type), torch.get_autocast_dtype(self.home.type)
        gradients = self._made_up(args, kwargs)
        super().__init__(
            model, self._products, args, kwargs, gradients, extensions=extensions, strategy=strategy, room=room,
            grad=grad, compiled=compiled,
        )  # fmt: skip
        self._batch.fill(self._batch.own)  # all of it is real, whatever was compared
        own = {memory_of(p) for p in self._parameters.values() if p.requires_grad}  # which the tap looks after
        behind = {memory_of(t) for t in self._program.constants(later=True)}
        fixed = [t for t in self._program.constants(later=False) if memory_of(t) not in own]
        self._fixed = sorted(fixed, key=lambda t: memory_of(t) not in behind)
        self._later = sum(memory_of(t) in behind for t in fixed)  # the first ones
        context = self._context()
        self.context_options = {key: getattr(context, key) for key in ("strategy", "room", "grad")}

    def autocast(self) -> AbstractContextManager:
        """As it was when the model was recorded; nothing that it casts may be that of another run."""
        enabled, dtype = self._autocast
        if not enabled and not torch.is_autocast_enabled(self.home.type):
            return nullcontext()
        return torch.autocast(self.home.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    @property
    def _on_graph(self) -> bool:
        return False

    def with_gradients(self, outputs: Any) -> list[Tensor]:
        """Those of a model's outputs that carry gradients."""
        return [t for t, carries in zip(tensors_of(outputs), self._carries, strict=True) if carries]

    def _made_up(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Gradients of the outputs of a call; whether they can be had."""
        device = self.home
        args, kwargs = map_tensors(lambda t: t.to(device), (args, kwargs))
        n = next((len(t) for t in tensors_of((args, kwargs)) if t.dim()), 0)
        kept = random_kept([device])
        with torch.inference_mode(False), torch.enable_grad(), buffers_kept(self.model), kept, self.autocast():
            returned = self.model(*args, **kwargs)
        outputs, others = tensors_of(returned), [one for one in leaves(returned) if not isinstance(one, Tensor)]
        if others:
            raise ConfigurationError(
                f"RecordedModel: the model returns {shown(others[0])}, which would be that of the recording for ever; "
                f"let it return tensors alone (for models of transformers: use_cache=False)."
            )
        self._carries = [t.requires_grad for t in outputs]
        carrying = [t for t in outputs if t.requires_grad]
        for t in outputs:
            if not t.dim() or len(t) != n or t.is_complex() or t.layout is not torch.strided:
                raise ConfigurationError(
                    f"RecordedModel: the model returns {shown(t.dtype)} of shape {list(t.shape)} for {n} examples; all "
                    f"tensors that it returns must be dense and real, with the examples on the first axis. Call the "
                    f"model itself, or use a RecordedStep."
                )
        if not carrying:
            raise ConfigurationError(
                "RecordedModel: no output of the model carries gradients; is everything frozen, or computed under "
                "torch.no_grad()?"
            )
        draws = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(t.shape, generator=draws, device="cpu").to(device, t.dtype).contiguous() for t in carrying
        )

    def _products(self, args: tuple, kwargs: dict[str, Any], gradients: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """For each example the sum of all products, whose gradients are those that are given; and the outputs."""
        with self.autocast():
            outputs = self.model(*args, **kwargs)
        self._same = would_see_the_same()
        sums = [
            (t * g).reshape(len(t), -1).sum(1) for t, g in zip(self.with_gradients(outputs), gradients, strict=True)
        ]
        total = sums[0]
        for more in sums[1:]:
            total = total + more
        return total, outputs

    def _collected(self, losses: Tensor, outputs: Any, held: Tensor) -> Found:
        """Without the products, that nobody asks for."""
        found = super()._collected(losses, outputs, held)
        found.losses = torch.zeros(len(losses), device=self._device)
        return found

    def _record(self, tape: Tape) -> None:
        own = tensors_of(self._batch.own)
        later = len(own) - len(tensors_of(self._batch.own[:2]))

        def run() -> tuple[Any, Found]:
            found = self._run()
            return (found.outputs, self._same), replace(found, outputs=None)

        tape.record(run, own, later)

    def _replayed(self, program: Program) -> Found:
        (outputs, _), found = program.replay(self._batch.read)
        return replace(found, outputs=outputs)

    def outputs(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The outputs of a call, which wait for their gradients."""
        self._refuse_changes()
        args, kwargs = map_tensors(lambda t: t.to(self._device), (args, kwargs))
        if self._any_order and kwargs.keys() == {*self._keys}:
            kwargs = {key: kwargs[key] for key in self._keys}
        n = next((len(t) for t in tensors_of((args, kwargs)) if t.dim()), 0)
        self._largest = max(self._largest, n)
        if n > self.size or (self._by_model and 0 < n < self.size):  # of all of which it may have found out something
            return self._called(args, kwargs)
        with torch.inference_mode(False):
            n, tensors = self._batch.filled((args, kwargs))
            random = random_states([self._device]) if self._seen.random else None
            try:
                with self._as_replayed():
                    (outputs, same), finish = self._program.begin(tensors)
                replayed = same is None or bool(same)
            except Exception:  # noqa: BLE001 - whatever an operation raises, the model says it better
                replayed = False
            if not replayed:
                if random is not None:
                    set_random_states(random, [self._device])
                return self._called(args, kwargs)
            [outputs] = outputs
            outputs = map_tensors(lambda t: t if n == self.size else t[:n].clone(), outputs)
            pending = _Pending(self, n, finish, (args, kwargs), random)
            left = iter(leave(self.model, args, kwargs, self.with_gradients(outputs), pending))
            carries = iter(self._carries)
            return map_tensors(lambda t: next(left) if next(carries) else t, outputs)

    def versions(self) -> list[int]:
        """How often each frozen parameter, buffer or other tensor that the forward reads was written to."""
        return [version(t) for t in self._fixed]

    def refuse_written(self, versions: Sequence[int], *, later: bool) -> None:
        """Raise if one was written to since; with ``later`` one that the backward needs."""
        fixed = self._fixed[: self._later] if later else self._fixed
        for t, count in zip(fixed, versions, strict=not later):
            if version(t) != count:
                named = [*self.model.named_parameters(), *self.model.named_buffers()]
                names = (f"`{name}`" for name, own in named if memory_of(own) == memory_of(t))
                what = next(names, f"a tensor of shape {list(t.shape)}")
                raise StaleGradientError(
                    f"{self._name}: {what} was changed in place between a forward and its backward, which needs it as "
                    f"it was; change it after the backward."
                )

    def refuse_changed(self) -> None:
        """Raise if a call cannot be run again, as the model is not as it was in the forward."""
        what = what_differs(state_of(self.model, self._device, self._read), self._model_was, self._left)
        if what is not None:
            raise StaleGradientError(
                f"{self._name}: {described(what)} has changed between a forward and its backward, which has to run the "
                f"model again, as values were not what they mostly are; change it after the backward."
            )

    def _called(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.count_repeated()
        with dispatched():
            return self.model(*args, **kwargs)

    def count_repeated(self) -> None:
        """Note that a call is run as usual."""
        self.repeated += 1
        self._warn()

    def _warn(self) -> None:
        if self.repeated == OFTEN and self._largest > self.size:
            warn(
                f"A {self._name} had to run {OFTEN} batches as usual so far, some of which had more examples than it "
                f"was recorded with: {self._largest} in place of {self.size}. Record it with more; batches with fewer "
                f"are filled up.",
            )
        else:
            super()._warn()

    def finish(
        self,
        finish: Callable[[Sequence[Tensor]], Found],
        n: int,
        gradients: Sequence[Tensor | None],
        factor: float,
    ) -> bool:
        """Replay the rest of a call; whether it holds, so that its fields were left at the parameters."""
        if what_differs(settings_of(self.extensions), self._settings_were) is not None:
            with self.autocast():  # as in the forward
                self._refuse_changes()
        for extension, asked in zip(self.extensions, self._asked, strict=True):
            extension.prepare(asked)
        own = self._batch.own[2]
        given = [
            torch.zeros_like(like) if g is None else fitted(g, like) for g, like in zip(gradients, own, strict=True)
        ]
        with torch.inference_mode(False), torch.enable_grad(), self._as_replayed():
            try:
                found = finish(given)
            except Exception:  # noqa: BLE001 - the model as usual says what is wrong, or nothing is
                found = None
        if found is None or not found.held.item():
            return False
        self._take_over(found, n, factor)
        return True


def _by_name(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a forward takes several arguments by their names, so that their order says nothing."""
    if len(kwargs) < 2:
        return False
    named = inspect.signature(model.forward).parameters.values()
    return kwargs.keys() <= {one.name for one in named if one.kind is not one.VAR_KEYWORD}
