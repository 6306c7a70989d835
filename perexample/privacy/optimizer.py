"""Making an optimizer private: noise is added to clipped sums, and the optimizer itself does the step."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MethodType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .._arguments import real
from .._private import steps_under_way
from .._shards import is_sharded
from ..errors import ConfigurationError, PerExampleError, StaleGradientError
from .distributed import Processes
from .ledger import Ledger, Release, steps_of
from .noise import Noise
from .sampling import PhysicalBatches, PoissonBatchSampler

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741
Sampling = PoissonBatchSampler | PhysicalBatches
_SETTINGS = ("noise_multiplier", "expected_batch_size")
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

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """One step: check, write down, then let go of what is private."""
        _refuse_scaler(optimizer, kwargs)
        _refuse_closure(optimizer, args, kwargs)
        if steps_under_way(optimizer) > 1 and self.clipping.examples == self._left:
            return  # the step of a base class, called by one that has made the gradients private before it began
        noise_multiplier, expected_batch_size = (_shared_setting(optimizer, name) for name in _SETTINGS)
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
        noise = (lambda like: self.noise.like(like, std)) if noise_multiplier > 0 else None
        totals = self.processes.total(sums, noise)
        for p, total in zip(params, totals, strict=True):
            p.grad = (total / expected_batch_size).to(p.dtype)
        for p in frozen:
            p.grad = None
        self.clipping.after_step(self.noise.number, self.processes)

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


def _refuse_scaler(optimizer: torch.optim.Optimizer, kwargs: dict) -> None:
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
    return _check_setting(name, values.pop())


def _check_setting(name: str, value: Any) -> float:
    least, wanted = (0.0, ">= 0") if name == "noise_multiplier" else (math.ulp(0.0), "> 0")
    remedy = "; it is public and must not be computed from the data"
    return real(name, value, f"a finite number {wanted}", lambda number: number >= least, remedy)


def privatize(
    optimizer: O,
    *,
    clipping: Clipping,
    noise_multiplier: float,
    expected_batch_size: float,
    sampler: Sampling | None = None,
    ledger: Ledger | None = None,
    generator: torch.Generator | None = None,
    noise: str = "torch",
    processes: Processes | None = None,
) -> O:
    """Make any torch optimizer private: its steps use noisy clipped sums instead of ``p.grad``.

    Before each step ``p.grad = (p.clipped_sum + N(0, (noise_multiplier * C)^2)) / expected_batch_size`` is written for
    every trainable parameter, where C is ``clipping.sensitivity()``. The optimizer stays what it is: learning-rate
    schedulers, ``state_dict`` and param groups work as before, and the two settings become part of the param groups.

    Every step is written into a ledger before a parameter moves. With a `PoissonBatchSampler` it is written down as a
    Poisson sample, if the examples of the backward are as many as the sampler drew; without, as a step that saw every
    example (no amplification), which holds for any loader that chooses by index and gives an example at most once in a
    step, and for data sets of the same length: in one of them an example has no gradient, or is replaced.

    Args:
        optimizer: Any `torch.optim.Optimizer` whose step needs no closure.
        clipping: The `ClippedGrad` used in ``perex``.
        noise_multiplier: Standard deviation of the noise in units of C; 0 for none.
        expected_batch_size: What the sum is divided by: a public constant, such as sample rate times size of the data.
            With several processes that of all of them together.
        sampler: The `PoissonBatchSampler` or `PhysicalBatches` that the batches come from. With `PhysicalBatches`,
            ``step`` and ``zero_grad`` do nothing until the last piece of a batch.
        ledger: Where steps are written down; by default a new `Ledger`, see ``optimizer.ledger``.
        generator: Source of the noise. By default one seeded by the operating system that ``torch.manual_seed`` does
            not touch. A generator of your own makes noise repeatable, and with it the privacy void if it is known, or,
            without a sampler, if it serves two runs. With a sampler the noise is bound to the sums, to the last bit:
            the same sums have the same noise, others (of other batches or another learning rate, or rounded otherwise,
            as in other pieces) have other noise.
        noise: ``"torch"``, or ``"os"`` for the operating system's cryptographic source; see `Noise`.
        processes: The processes of ``torch.distributed`` that train together; by default all, where a process group
            is initialised. Sums are added up over them, and noise is added once.

    Returns:
        The same optimizer, with an attribute ``ledger``. Its ``state_dict`` holds ledger, sampler's position, and the
        state of a generator that was given, under ``"privacy"``.

    Raises:
        ConfigurationError: For values without meaning, and optimizers that cannot be private.
        StaleGradientError: From ``step``, if a clipped sum is missing or was used already, or the batch is not the
            sampler's.
        PrivacyBudgetError: From ``step``, if the ledger has a limit that is reached.
        PerExampleError: From ``step``, if it is given a closure.

    Guarantees:
        The noise is drawn once per step, in float64. It is not hardened against attacks on floating-point noise.

    References:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1.

    Example:
        >>> from perexample import extend, perex, privatize
        >>> from perexample.extensions import ClippedGrad
        >>> model, clipping = extend(nn.Linear(2, 1)), ClippedGrad(1.0)
        >>> adam = privatize(torch.optim.AdamW(model.parameters()), clipping=clipping,
        ...                  noise_multiplier=1.1, expected_batch_size=4)
        >>> with perex(clipping, grad=False):
        ...     model(torch.ones(4, 2)).mean().backward()
        >>> adam.step()
        >>> adam.ledger
        Ledger(1 steps of Release(noise_multiplier=1.1, sample_rate=None))
    """
    _check_optimizer(optimizer)
    _check_clipping(clipping)
    ledger, source = _check_ledger(ledger), Noise(generator, noise)
    settings = {"noise_multiplier": noise_multiplier, "expected_batch_size": expected_batch_size}
    settings = {name: _check_setting(name, value) for name, value in settings.items()}
    _check_divisor(clipping, settings["expected_batch_size"])
    clipping.noise_share(settings["noise_multiplier"])  # raises now, if it does so at all
    _check_groups(optimizer, settings)
    pieces = _Pieces(clipping, sampler) if isinstance(sampler, PhysicalBatches) else None
    processes = checked_processes(processes)
    if sampler is not None:
        _check_sampler(sampler)
        _check_shard(sampler, processes)
        sampler.claim(partial(_forget_batch, optimizer, clipping, pieces))
        if ledger.steps and generator is None:  # begun again: its batches would come a second time, with other noise
            sampler.renew()
    for name, value in settings.items():  # nothing can fail any more
        optimizer.defaults[name] = value
        for group in optimizer.param_groups:
            group[name] = value
    privatizer = Privatizer(clipping, sampler, ledger, source, processes)
    optimizer.register_step_pre_hook(privatizer)
    _keep_state(optimizer, privatizer)
    _clear_sums_too(optimizer, clipping, pieces)
    if pieces is not None:
        _step_on_the_last(optimizer, pieces)
    _refuse_copies(optimizer)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined] # GradScaler then calls it, to be refused
    optimizer.ledger = ledger  # type: ignore[attr-defined]
    return optimizer


def make_optimizer(cls: type[O]) -> type[O]:
    """A private form of an optimizer class.

    Its instances take what those of the class take, and by keyword what `privatize` takes.

    Args:
        cls: Any subclass of `torch.optim.Optimizer` whose step needs no closure.

    Returns:
        A subclass, named ``DP_`` and the name of the class.

    Raises:
        ConfigurationError: If it is no class of optimizers.

    Example:
        >>> from perexample import extend
        >>> from perexample.extensions import ClippedGrad
        >>> from perexample.privacy import make_optimizer
        >>> model = extend(nn.Linear(2, 1))
        >>> make_optimizer(torch.optim.Adam)(model.parameters(), lr=0.1, clipping=ClippedGrad(1.0),
        ...                                  noise_multiplier=1.1, expected_batch_size=32).__class__.__name__
        'DP_Adam'
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigurationError(f"make_optimizer takes a class of optimizers such as torch.optim.Adam, not {cls!r}.")

    def initialize(
        self: Any, *args: Any, clipping: Clipping, noise_multiplier: float, expected_batch_size: float, **options: Any
    ) -> None:
        private = {name: options.pop(name) for name in _OPTIONS & options.keys()}
        initialize_as(cls, self, *args, **options)
        privatize(
            self,
            clipping=clipping,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            **private,
        )

    return type(f"DP_{cls.__name__}", (cls,), {"__init__": initialize, "__doc__": f"Private `{cls.__name__}`."})


def initialize_as(
    cls: type[torch.optim.Optimizer], optimizer: torch.optim.Optimizer, *args: Any, **options: Any
) -> None:
    """Call the ``__init__`` of torch's class, whose own errors do not name what is wrong.

    Args:
        cls: The class.
        optimizer: The object to initialize.
        args: Positional arguments of the class.
        options: Its keyword arguments.

    Raises:
        ConfigurationError: If the class refuses an argument.
    """
    try:
        cls.__init__(optimizer, *args, **options)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"No private {cls.__name__} can be made of these params and options: {error}. Give params as "
            f"model.parameters() or groups of parameters, each parameter once, and the options of "
            f"torch.optim.{cls.__name__} by their names."
        ) from error


_OPTIONS = {"sampler", "ledger", "generator", "noise", "processes"}


def _check_optimizer(optimizer: Any) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"privatize takes a torch.optim.Optimizer, not {kind}.")
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise ConfigurationError(
            f"{kind} cannot be private: it needs a closure or sparse gradients; use SGD, Adam, AdamW or RMSprop."
        )
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, torch.optim.Optimizer)]
    if inner:
        raise ConfigurationError(
            f"This {kind} has an optimizer of its own in `{inner[0]}`, whose steps would be taken past clipping and "
            f"noise; make that one private, before it is wrapped."
        )
    if any(name in optimizer.defaults for name in _SETTINGS):
        raise ConfigurationError(
            f"This {kind} is private already; make a new optimizer for other settings, or change those in its "
            f"param_groups."
        )


def _check_groups(optimizer: torch.optim.Optimizer, settings: Mapping[str, float]) -> None:
    """Param groups that have settings of their own, as from the state of another private optimizer."""
    for name, value in settings.items():
        for group in optimizer.param_groups:
            if name in group:
                raise ConfigurationError(
                    f"{name} is that of the private optimizer, {value:g}, and a group of this one has {group[name]!r} "
                    f"already. Leave it out of the groups; the state of a private optimizer is loaded after privatize "
                    f"or make_private (torch forgets the ledger else), that of a public one before."
                )


def _check_clipping(clipping: Any) -> None:
    parts = ("sensitivity", "consume", "zero_grad", "noise_share", "after_step")
    if isinstance(clipping, type) or not all(callable(getattr(clipping, name, None)) for name in parts):
        raise ConfigurationError(f"clipping must be an instance of ClippedGrad, not {clipping!r}.")


def _check_divisor(clipping: Any, expected: float) -> None:
    """An adaptive C counts in units of the batch too."""
    divisor = getattr(clipping, "expected_batch_size", expected)
    if divisor != expected:
        raise ConfigurationError(
            f"{type(clipping).__name__} was made for expected_batch_size={divisor:g}, and the private optimizer "
            f"divides by {expected:g}; give both the same, the expected number of examples in a batch."
        )


def checked_processes(processes: Any) -> Processes:
    """Those that were given, or all."""
    if processes is not None and not isinstance(processes, Processes):
        raise ConfigurationError(f"processes must be a perexample.privacy.Processes, or None, not {processes!r}.")
    return Processes() if processes is None else processes


def _check_ledger(ledger: Any) -> Ledger:
    if ledger is not None and not isinstance(ledger, Ledger):
        raise ConfigurationError(f"ledger must be a perexample.privacy.Ledger, not {ledger!r}.")
    return Ledger() if ledger is None else ledger


def _check_sampler(sampler: Any) -> None:
    if not isinstance(sampler, Sampling):
        raise ConfigurationError(
            f"sampler must be a PoissonBatchSampler or PhysicalBatches, not {type(sampler).__name__}: only these draw "
            f"every example by itself, which is what amplification of privacy by sampling needs. Leave it out for "
            f"other loaders; steps are then accounted without amplification."
        )


def _check_shard(sampler: Sampling, processes: Processes) -> None:
    """Every example is drawn by one process."""
    own = sampler.sampler if isinstance(sampler, PhysicalBatches) else sampler
    if (own.rank, own.world_size) != (processes.rank, processes.size):
        raise ConfigurationError(
            f"The sampler draws the examples of process {own.rank} of {own.world_size}, and the optimizer belongs to "
            f"process {processes.rank} of {processes.size}: an example could be drawn by several, and add more than C. "
            f"Make the sampler after torch.distributed is initialised, or with this rank and world_size."
        )


def _keep_state(optimizer: torch.optim.Optimizer, privatizer: Privatizer) -> None:
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


class _Pieces:
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


def _clear_sums_too(optimizer: torch.optim.Optimizer, clipping: Clipping, pieces: _Pieces | None) -> None:
    """Let ``zero_grad`` forget clipped sums; torch has hooks for ``step``, none for ``zero_grad``."""
    plain = optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        plain(set_to_none=set_to_none)
        if pieces is None or not (clipping.examples and pieces.incomplete()):
            clipping.zero_grad([p for group in optimizer.param_groups for p in group["params"]])

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def _forget_batch(optimizer: torch.optim.Optimizer, clipping: Clipping, pieces: _Pieces | None) -> None:
    """A batch that was begun will be drawn again: its pieces so far must not be added twice."""
    if clipping.examples:
        clipping.zero_grad([p for group in optimizer.param_groups for p in group["params"]])
    if pieces is not None:
        pieces.before = 0


def _step_on_the_last(optimizer: torch.optim.Optimizer, pieces: _Pieces) -> None:
    """Let ``step`` do nothing before the last piece; torch's hooks cannot call a step off."""
    plain = optimizer.step

    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        _refuse_scaler(self, kwargs)
        return None if pieces.wait() else plain(*args, **kwargs)

    if hasattr(plain, "_wrapped_by_lr_sched"):
        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign] # schedulers need a bound method


def _refuse_copies(optimizer: torch.optim.Optimizer) -> None:
    """A pickled or copied optimizer loses its hooks, and would step without clipping and noise."""
    kind = type(optimizer).__name__

    def refuse(*_: Any) -> Any:
        raise StaleGradientError(
            f"A private {kind} cannot be pickled or copied, since the copy would step without clipping and noise. Make "
            f"a new one, and load optimizer.state_dict() into it."
        )

    optimizer.__deepcopy__ = optimizer.__reduce_ex__ = refuse  # type: ignore[attr-defined, method-assign]
