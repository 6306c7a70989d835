"""The step of a private optimizer: a hook before it that turns clipped sums into noisy gradients, and its state."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._arguments import real
from .._private import steps_under_way
from .._shards import is_sharded
from ..errors import ConfigurationError, PerExampleError, StaleGradientError
from .distributed import Processes
from .ledger import Ledger, Release, steps_of
from .noise import Noise
from .sampling import PhysicalBatches, PoissonBatchSampler

Sampling = PoissonBatchSampler | PhysicalBatches
SETTINGS = ("noise_multiplier", "expected_batch_size")
_KEY = "privacy"  # of what is added to the optimizer's state_dict


class Clipping(Protocol):
    """What a private optimizer asks of an extension such as `ClippedGrad`."""

    @property
    def examples(self) -> int:
        """Number of examples in the sums under way."""

    def sensitivity(self) -> float:
        """Bound on what one example adds to all sums together."""

    def noise_share(self, noise_multiplier: float) -> float:
        """Noise multiplier for the sums, if the step as a whole is to cost ``noise_multiplier``."""

    def consume(self, params: list[nn.Parameter]) -> list[Tensor]:
        """The sums, each for one step only."""

    def after_step(self, draw: Callable[[float], float], processes: Processes) -> None:
        """Prepare the next step; ``draw(std)`` is one Gaussian number."""

    def zero_grad(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Forget the sums so far."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""


class Privatizer:
    """The step pre-hook: writes ``p.grad = (clipped_sum + noise) / expected_batch_size``."""

    def __init__(
        self, clipping: Clipping, sampler: Sampling | None, ledger: Ledger, noise: Noise, processes: Processes
    ) -> None:
        """Keep the parts, which know nothing of each other."""
        self.clipping, self.sampler, self.ledger, self.noise = clipping, sampler, ledger, noise
        self.processes, self._compared = processes, False
        self._place = processes.rank, processes.size
        self._divisor: float | None = None  # of the first step
        self._saved = -1  # steps at the last state that was asked for
        self._loaded: Mapping[str, Any] | None = None  # of a state that torch has not loaded its part of yet
        self._steps = 0  # that the ledger had after the last one that was taken here
        self._left = 0  # examples in sums that this step has left to other optimizers
        self._watching: list[RemovableHandle] = []

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """One step: check, write down, then let go of what is private."""
        refuse_scaler(optimizer, kwargs)
        _refuse_closure(optimizer, args, kwargs)
        _refuse_inference(optimizer)
        if steps_under_way(optimizer) > 1 and self.clipping.examples == self._left:
            return  # the step of a base class, called by one that has made the gradients private before it began
        noise_multiplier, expected_batch_size = (_shared_setting(optimizer, name) for name in SETTINGS)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        frozen = [p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad]
        with self.processes.together():
            self._same_processes()
            self._refuse_counted(expected_batch_size)
            sums, std = self._taken(params, noise_multiplier)
            self._left = self.clipping.examples
        drawn = () if self.sampler is None else ("sample_rate", "data_size")
        self.processes.agree(
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            std=std,
            steps=self.ledger.steps,
            **{name: getattr(self.sampler, name) for name in drawn},
        )
        if not self._compared:
            self.processes.agree_on({f"parameter {i}": p.detach() for i, p in enumerate(params)})
            self._compared = True
        release = Release(noise_multiplier, None if self.sampler is None else self.sampler.sample_rate)
        with self.processes.together():
            self.ledger.record(release)
        self._steps = self.ledger.steps
        if self.processes.any(self._may_come_again()):
            self.noise.begin(struct.pack("d", std) + self.processes.content(sums))
        noised = (lambda t: self.noise.plus(t, std)) if noise_multiplier > 0 else None
        totals = self.processes.total(sums, noised)
        for p, total in zip(params, totals, strict=True):
            p.grad = torch.empty_like(p).copy_(total.div_(expected_batch_size))  # laid out as p, for the optimizer
        for p in frozen:
            p.grad = None
        self.clipping.after_step(self.noise.number, self.processes)
        self._watch(optimizer, params)

    def _watch(self, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        """What a backward adds to the gradients that were made private, while the step is under way, is an error."""
        self._unwatch()
        step, thread = type(optimizer).step, threading.get_ident()
        if getattr(step, "__module__", "").startswith("torch."):  # these run none
            return

        def refuse(_: Tensor) -> None:
            if steps_under_way(optimizer, thread):  # whatever thread autograd is in; else it has failed
                raise PerExampleError(
                    f"{type(optimizer).__name__}.step runs a backward of its own, whose gradients would be used "
                    f"without clipping and noise. Run it in perex(clipping, grad=False) and then the step of the base "
                    f"class, which is a private step of its own; or let the training loop do both."
                )

        self._watching = [p.register_post_accumulate_grad_hook(refuse) for p in params]

    def _unwatch(self) -> None:
        for handle in self._watching:
            handle.remove()
        self._watching.clear()

    def end(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The step post-hook; the step of a base class has one too."""
        if steps_under_way(optimizer) <= 1:
            self._unwatch()

    def _refuse_counted(self, expected_batch_size: float) -> None:
        """A divisor that follows the number of examples tells how many there are."""
        if self._divisor is None:
            self._divisor = expected_batch_size
        if expected_batch_size not in (self._divisor, 0) and expected_batch_size == self.clipping.examples:
            raise ConfigurationError(
                f"expected_batch_size was {self._divisor:g} in the first step, and is {expected_batch_size:g} now, as "
                f"many as this batch has examples, which is private. Leave it at the expected number of them."
            )

    def _may_come_again(self) -> bool:
        """Whether a training that is resumed, or begun again, has noise of this one, in steps that may be others."""
        return self.noise.given is not None and self.sampler is not None

    def _taken(self, params: list[nn.Parameter], noise_multiplier: float) -> tuple[list[Tensor], float]:
        """The sums of this process, which serve this step only, and the noise they need."""
        examples = self.clipping.examples
        share = self.clipping.noise_share(noise_multiplier)
        std = _deviation(share, self.clipping.sensitivity(), noise_multiplier)
        try:
            sums = self.clipping.consume(params)
        except StaleGradientError:
            if not self._nothing_due(examples) or any(map(is_sharded, params)):  # sums of shards are of all processes
                raise
            sums = self._zeros(params)
            std = _deviation(share, self._as_usual(params), noise_multiplier)
        if self.sampler is not None:
            self.sampler.take(examples)
        return sums, std

    def _as_usual(self, params: list[nn.Parameter]) -> float:
        """The sensitivity of a step on some examples, so that the noise does not tell that there were none."""
        expected = getattr(self.clipping, "sensitivity_of", None)
        return float(expected(params)) if callable(expected) else self.clipping.sensitivity()

    def _same_processes(self) -> None:
        """An example must be part of the sums of one process, and these of one total."""
        now = self.processes.rank, self.processes.size
        if now != self._place:
            raise ConfigurationError(
                f"The optimizer was made private in process {self._place[0]} of {self._place[1]}, and steps in process "
                f"{now[0]} of {now[1]}: each example would be drawn by several processes, or not be added up. Set up "
                f"torch.distributed (init_process_group, Accelerator, TrainingArguments) before make_private or "
                f"privatize, and keep it until the training is over."
            )

    def _nothing_due(self, examples: int) -> bool:
        """Whether the batch to step on is known to be empty; many models cannot be run on one."""
        return self.sampler is not None and self.sampler.due() == 0 and not examples

    def _zeros(self, params: list[nn.Parameter]) -> list[Tensor]:
        """What an empty batch gives, with a backward or without."""
        self.clipping.zero_grad(params)
        return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers and tensors."""
        self._saved = self._steps
        return {
            "ledger": self.ledger.state_dict(),
            "steps": self.ledger.steps,  # now; the ledger's own state goes on
            "noise": self.noise.state(),
            "clipping": self.clipping.state_dict(),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
        }

    def begin_load(self, state: Mapping[str, Any]) -> None:
        """Take over what a state knows of steps, before torch loads its part, which may fail."""
        missing = [name for name in ("ledger", "noise", "clipping", "sampler") if name not in state]
        if missing:
            raise ConfigurationError(
                f"The entry {_KEY!r} of the state_dict has no {', '.join(missing)}; load the whole state_dict() of a "
                f"private optimizer."
            )
        if (self.sampler is None) != (state["sampler"] is None):
            raise ConfigurationError(
                f"The state was saved {'without' if state['sampler'] is None else 'with'} a sampler, and this "
                f"optimizer was made {'without' if self.sampler is None else 'with'} one; privatize(sampler=...) must "
                f"be given in both runs or in none."
            )
        check = getattr(self.clipping, "check_state", None)
        if callable(check):
            check(state["clipping"])
        if self.sampler is not None:
            self.sampler.check_state(state["sampler"])
        self.ledger.load_state_dict(state["ledger"])
        self._loaded = state

    def end_load(self) -> None:
        """Continue from the state, and from its random numbers if both batches and noise have some.

        After a crash steps that were released may then be taken again just as they were. With one of the two alone
        they would not be: a batch that comes again with other noise is no new sample, as which it is accounted. Going
        back in a running process is for the sake of other steps (another learning rate), which get batches and noise of
        their own too.
        """
        state, self._loaded = self._loaded, None
        assert state is not None
        sampler = state["sampler"] or {}
        known = steps_of(state["ledger"])
        repeats = state["noise"] is not None and self.noise.given is not None
        repeats = repeats and self._steps <= known == state.get("steps", known)
        if self.sampler is None:  # only its own state of now, as loaded by what moves an optimizer to a device
            own = self._saved == self._steps == known
            repeats = repeats and own and self.noise.is_at(state["noise"])
        else:
            repeats = repeats and sampler.get("generator") is not None
        self.noise.renew()
        self.clipping.load_state_dict(state["clipping"])
        if self.sampler is not None:
            self.sampler.load_state_dict({**sampler, "generator": sampler.get("generator") if repeats else None})
            if not repeats:
                self.sampler.renew()
        if repeats:
            self.noise.set_state(state["noise"])


def _deviation(share: float, sensitivity: float, noise_multiplier: float) -> float:
    """Standard deviation of the noise; one that is no number above 0 must not pass for none."""
    std = share * sensitivity
    if not (0 < std < math.inf or (noise_multiplier == 0 and std == 0)):
        raise ConfigurationError(
            f"The noise would have the standard deviation {std}: noise_multiplier is {noise_multiplier:g}, and the "
            f"sums have the sensitivity {sensitivity}, which must be a finite number above 0. Set max_norm to one; it "
            f"is public, and must not be computed from the data."
        )
    return std


def _refuse_closure(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    given = [value for value in (*args[1:], *kwargs.values()) if value is not None]  # args[0] is the optimizer
    if any(isinstance(value, Tensor) for value in given):
        raise PerExampleError(
            f"{type(optimizer).__name__}.step got a tensor, as private-transformers and FastDP take a loss. Here a "
            f"step runs no backward: call losses.mean().backward() in perex(clipping), or in `with private:`, and then "
            f"step() without arguments. Without a step after them, several backwards add up (virtual_step)."
        )
    if given:
        raise PerExampleError(
            f"{type(optimizer).__name__}.step got a closure, which would compute gradients anew after the noise "
            f"was added; run the backward before, and call step() without arguments. Lightning's optimizers always "
            f"hand on a closure: call optimizer.optimizer.step() of them."
        )


def _refuse_inference(optimizer: torch.optim.Optimizer) -> None:
    if torch.is_inference_mode_enabled():
        raise ConfigurationError(
            f"{type(optimizer).__name__}.step was called in torch.inference_mode, where gradients and the optimizer's "
            f"state become tensors that no later step can use; call it outside of that block. It needs no "
            f"torch.no_grad either."
        )


def refuse_scaler(optimizer: torch.optim.Optimizer, kwargs: dict) -> None:
    """`GradScaler.step` leaves marks on optimizers that say they know of it, and calls them in any case."""
    marks = [name for name in ("grad_scale", "found_inf") if name in vars(optimizer)]
    for name in marks:
        delattr(optimizer, name)  # torch takes them back only after a step that succeeds
    if marks or "grad_scaler" in kwargs:
        raise PerExampleError(
            f"{type(optimizer).__name__} was stepped by a GradScaler, which skips steps and changes its scale as the "
            f"data have it; both tell of the data. Use a fixed scale instead: (1024.0 * loss).backward() in "
            f"perex(clipping, grad=False, loss_scale=1024.0), then optimizer.step(); or bfloat16, which needs none."
        )


def _shared_setting(optimizer: torch.optim.Optimizer, name: str) -> float:
    """One value for all groups: noise that differs between them would have no single privacy cost."""
    values = {group.get(name) for group in optimizer.param_groups}
    if len(values) != 1 or None in values:
        raise ConfigurationError(f"{name} must be the same in all param_groups of a private optimizer, not {values}.")
    return checked_setting(name, values.pop())


def checked_setting(name: str, value: Any) -> float:
    """One of `SETTINGS`, if it has a meaning."""
    least, wanted = (0.0, ">= 0") if name == "noise_multiplier" else (math.ulp(0.0), "> 0")
    remedy = "; it is public and must not be computed from the data"
    return real(name, value, f"a finite number {wanted}", lambda number: number >= least, remedy)


def keep_state(optimizer: torch.optim.Optimizer, privatizer: Privatizer) -> None:
    """Let ledger, noise and sampler travel in ``optimizer.state_dict()``."""

    def saved(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, _KEY: privatizer.state()}

    def loaded(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if _KEY not in state:
            raise StaleGradientError(
                f"The state_dict has no entry {_KEY!r}: it is not that of a private optimizer, or something on the way "
                f"has dropped it, and the steps taken before would not be accounted. Save optimizer.state_dict() "
                f"whole; to start anew from a public optimizer's state, load it before privatize."
            )
        privatizer.begin_load(state[_KEY])
        return {key: value for key, value in state.items() if key != _KEY}

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loaded)
    optimizer.register_load_state_dict_post_hook(lambda _: privatizer.end_load())
