"""Making an optimizer private: arguments are checked and hooks are put on; the optimizer itself does the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from ..errors import ConfigurationError, StaleGradientError
from .distributed import Processes
from .ledger import Ledger
from .noise import Noise
from .pieces import Pieces, clear_sums_too, forget_batch, step_on_the_last
from .privatizer import SETTINGS, Clipping, Privatizer, Sampling, checked_setting, keep_state
from .sampling import PhysicalBatches

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741


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
    """Make a torch optimizer private: its steps use noisy clipped sums instead of ``p.grad``.

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
        >>> model, clipping = extend(torch.nn.Linear(2, 1)), ClippedGrad(1.0)
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
    settings = {name: checked_setting(name, value) for name, value in settings.items()}
    _check_divisor(clipping, settings["expected_batch_size"])
    clipping.noise_share(settings["noise_multiplier"])  # raises now, if it does so at all
    _check_groups(optimizer, settings)
    pieces = Pieces(clipping, sampler) if isinstance(sampler, PhysicalBatches) else None
    processes = checked_processes(processes)
    if sampler is not None:
        _check_sampler(sampler)
        _check_shard(sampler, processes)
        sampler.claim(partial(forget_batch, optimizer, clipping, pieces))
        if ledger.steps and generator is None:  # begun again: its batches would come a second time, with other noise
            sampler.renew()
    for name, value in settings.items():  # nothing can fail any more
        optimizer.defaults[name] = value
        for group in optimizer.param_groups:
            group[name] = value
    privatizer = Privatizer(clipping, sampler, ledger, source, processes)
    optimizer.register_step_pre_hook(privatizer)
    optimizer.register_step_post_hook(privatizer.end)
    keep_state(optimizer, privatizer)
    clear_sums_too(optimizer, clipping, pieces)
    if pieces is not None:
        step_on_the_last(optimizer, pieces)
    _refuse_copies(optimizer)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined] # GradScaler then calls it, to be refused
    optimizer.ledger = ledger  # type: ignore[attr-defined]
    return optimizer


def make_optimizer(cls: type[O]) -> Callable[..., O]:
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
        >>> model = extend(torch.nn.Linear(2, 1))
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
    if any(name in optimizer.defaults for name in SETTINGS):
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


def _refuse_copies(optimizer: torch.optim.Optimizer) -> None:
    """A pickled or copied optimizer loses its hooks, and would step without clipping and noise."""
    kind = type(optimizer).__name__

    def refuse(*_: Any) -> Any:
        raise StaleGradientError(
            f"A private {kind} cannot be pickled or copied, since the copy would step without clipping and noise. Make "
            f"a new one, and load optimizer.state_dict() into it."
        )

    optimizer.__deepcopy__ = optimizer.__reduce_ex__ = refuse  # type: ignore[attr-defined, method-assign]
