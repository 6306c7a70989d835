"""The public numbers of a private training: sample rate, steps and noise; and the ledger that is held to them."""

from __future__ import annotations

import os
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .._arguments import positive, real
from .._warning import warn
from ..errors import ConfigurationError, PrivacyBudgetError
from . import accounting
from .distributed import Processes
from .ledger import Ledger, Release

_LEDGERS: WeakKeyDictionary[nn.Module, Ledger] = WeakKeyDictionary()  # of the models' last trainings
_MOST_STEPS = 2**53  # what the accountant takes


def budget(epsilon: Any, delta: Any) -> tuple[float | None, float]:
    """The two, which the accountant knows by other names."""
    wanted = "a number above 0 and below 1 (far below 1 / public_size)"
    delta = real("target_delta", delta, wanted, lambda x: 0 < x < 1)
    return None if epsilon is None else positive("target_epsilon", epsilon, "a finite number > 0"), delta


def warn_of_delta(delta: float, public_size: float) -> None:
    """A delta that says nothing is most likely an oversight."""
    if delta > 1 / public_size:
        warn(
            f"target_delta={delta:g} is more than 1 / public_size = {1 / public_size:g}: a training that publishes one "
            f"of the examples whole would be as private. Take one well below it.",
        )


def sample_rate(batch_size: float, public_size: int | None) -> float:
    """Sample rate of two public numbers."""
    if public_size is None:
        raise ConfigurationError(
            "make_private needs public_size, the number of examples as far as it may be known: sample rate, number of "
            "steps and noise are computed from it, and a number read from the data would tell whether one example is "
            "among them. If it is no secret, pass public_size=len(dataset); else a rough number."
        )
    expected, size = positive("batch_size", batch_size), positive("public_size", public_size)
    if expected > size:
        raise ConfigurationError(
            f"batch_size={batch_size} is more than public_size={public_size}; it is the expected number of examples in "
            f"a batch, of all that there are."
        )
    if expected / size < 1 / _MOST_STEPS:
        raise ConfigurationError(
            f"batch_size={expected:g} is too little for public_size={size:g}: an epoch would have more than 2^53 steps."
        )
    return expected / size


def planned_steps(epochs: float | None, steps: int | None, rate: float) -> int:
    """Number of steps; an epoch has ``round(1 / rate)``, as one iteration of the sampler."""
    if (epochs is None) == (steps is None):
        raise ConfigurationError("make_private needs one of epochs and steps.")
    if epochs is None:
        wanted = "a whole number from 1 to 2^53"
        return int(real("steps", steps, wanted, lambda x: 1 <= x <= _MOST_STEPS and x.is_integer()))
    per_epoch = round(1 / rate)
    wanted = "a finite number greater than 0, of at most 2^53 steps"
    epochs = real("epochs", epochs, wanted, lambda x: 0 < x <= _MOST_STEPS / per_epoch)
    return max(1, round(epochs * per_epoch))


def noise_for(
    epsilon: float | None, delta: float, noise_multiplier: float | None, rate: float, steps: int, accountant: str
) -> float:
    """The noise multiplier, given or calibrated."""
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigurationError("make_private needs one of target_epsilon and noise_multiplier.")
    if epsilon is not None:
        return accounting.noise_multiplier_for(epsilon, delta, sample_rate=rate, steps=steps, accountant=accountant)
    accounting.epsilon(
        delta,
        noise_multiplier=1.0,
        sample_rate=None,
        steps=1,
        accountant=accountant,
        # Errors of delta and accountant come before the training, not after it.
    )
    assert noise_multiplier is not None
    return noise_multiplier


def book_of(ledger: Any, planned: int, processes: Processes) -> Ledger:
    """The ledger, held to the plan; one that was given may know steps already, which count."""
    if not isinstance(ledger, Ledger):
        if not isinstance(ledger, (str, os.PathLike, type(None))):
            raise ConfigurationError(f"ledger must be a path of a file, or a Ledger, not {ledger!r}.")
        return Ledger(ledger, planned, write=processes.rank == 0)
    if ledger.limit is not None and ledger.limit < planned:
        raise ConfigurationError(
            f"The ledger is held to {ledger.limit} steps, by Ledger(limit=...) or the training that it was made for, "
            f"and {planned} are planned, those that it knows already among them. Plan no more; or, for a further "
            f"training, give the file of that ledger, or a new Ledger() that has loaded its state_dict()."
        )
    ledger.limit = planned
    return ledger


def warn_of_steps_before(model: nn.Module, book: Ledger) -> None:
    """A model's privacy is that of all its private steps, and a new ledger knows those to come."""
    before = _LEDGERS.get(model)
    if before is not None and before is not book and before.steps and not book.knows(before):
        warn(
            f"This {type(model).__name__} has been trained by {before.steps} private steps that the new ledger does "
            f"not know: epsilon() will be that of the steps to come. To count all of them, give make_private the file "
            f"of the ledger before, or a new Ledger() that has loaded its state_dict(), with noise_multiplier in place "
            f"of target_epsilon, and the steps (or epochs) of both trainings together.",
        )
    _LEDGERS[model] = book


def hold_to(book: Ledger, planned: Release) -> None:
    """The budget is for steps of this kind: those that the ledger knows, and those to come."""
    if book.most_rate is not None and (book.least_noise, book.most_rate) != (
        planned.noise_multiplier,
        planned.sample_rate,
    ):
        raise PrivacyBudgetError(
            "The ledger belongs to another training that was calibrated to a budget, and the steps of both would be "
            "written into it. Give each training a ledger of its own."
        )
    others = sum(count for release, count in book.runs if not release.costs_at_most(planned))
    if others:
        raise PrivacyBudgetError(
            f"The ledger knows {others} steps with less noise or a larger sample rate than the {planned} that the "
            f"budget was calibrated for, and what they cost is not part of target_epsilon. Give each training a ledger "
            f"of its own, or noise_multiplier in place of target_epsilon, and see what epsilon() says."
        )
    book.least_noise, book.most_rate = planned.noise_multiplier, planned.sample_rate
