"""A private training that is under way."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._engine.context import perex
from .._warning import warn
from ..errors import ConfigurationError, StaleGradientError
from .checkpoint import load_file, save_file
from .ledger import ROUNDING, Ledger
from .sampling import PhysicalBatches, PoissonBatchSampler
from .steps import PrivateStep


@dataclass(frozen=True)
class Plan:
    """The public numbers that the noise was calibrated with."""

    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    planned_steps: int


class Private:
    """A model, its private optimizer, and the loader of its Poisson batches, from `make_private`.

    As a context it is ``perex(clipping, grad=False)``: run the backward in it. To iterate over it gives all batches
    of the plan; ``loader`` gives those of an epoch.

    Attributes:
        model: The extended model.
        optimizer: The private optimizer, the object that was given.
        loader: ``DataLoader`` of Poisson batches; one pass over it is one epoch on average.
        sampler: The `PoissonBatchSampler` behind it.
        clipping: The `ClippedGrad`.
        ledger: What the steps so far have cost.
        delta: Used by `epsilon` if it is given no other.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader,
        sampler: PoissonBatchSampler,
        clipping: Any,
        ledger: Ledger,
        plan: Plan,
        delta: float,
        accountant: str,
        settings: Mapping[str, Any],
    ) -> None:
        """Keep the parts; `make_private` makes them."""
        self.model, self.optimizer, self.loader, self.sampler = model, optimizer, loader, sampler
        self.clipping, self.ledger, self.delta = clipping, ledger, delta
        self._plan, self._accountant, self._settings = plan, accountant, dict(settings)
        self._contexts: list[perex] = []

    def __enter__(self) -> Private:
        """Open ``perex(clipping, grad=False)``."""
        context = perex(self.clipping, grad=False, **self._settings)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(self, *exc: Any) -> None:
        """Close it."""
        self._contexts.pop().__exit__(*exc)

    def __iter__(self) -> Iterator[Any]:
        """Batches of the loader, epoch after epoch, until the planned steps are taken.

        Yields:
            What ``collate_fn`` makes of a batch, or of a piece of one.

        Raises:
            StaleGradientError: If a batch was left out, or an epoch went by without a step.
        """
        if self.steps >= self.planned_steps:
            warn(
                f"All {self.planned_steps} planned steps have been taken, so this loop has no batch. One loop over a "
                f"Private runs through all epochs; `private.loader` gives the batches of one.",
            )
        while self.steps < self.planned_steps:
            before = self.steps
            for batch in self.loader:
                done = self.steps, self.clipping.examples
                yield batch
                if (self.steps, self.clipping.examples) == done:
                    raise StaleGradientError(
                        "A batch came, and no backward in `with private:` and no private.step() followed before the "
                        "next was asked for; that would take its place, and what is drawn would not be what is "
                        "accounted. Take the step of every batch, also of an empty one. To begin this one anew, as "
                        "after an error, begin a new loop over the Private. It cannot be unpacked: model, optimizer, "
                        "and loader are its attributes."
                    )
                if self.steps >= self.planned_steps:
                    return
            if self.steps == before:
                raise StaleGradientError(
                    "An epoch of batches went by, and no step was taken: run each backward in `with private:`, and "
                    "call private.step() after it."
                )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise in units of C, as planned; param groups have the one in use."""
        return self._plan.noise_multiplier

    @property
    def sample_rate(self) -> float:
        """Probability of every example to be in a batch."""
        return self._plan.sample_rate

    @property
    def expected_batch_size(self) -> float:
        """What noisy sums are divided by."""
        return self._plan.expected_batch_size

    @property
    def planned_steps(self) -> int:
        """Number of steps the noise was calibrated for; another is a `PrivacyBudgetError`."""
        return self._plan.planned_steps

    @property
    def steps(self) -> int:
        """Number of private steps taken."""
        return self.ledger.steps

    @property
    def physical_batch_size(self) -> int | None:
        """Most examples that the loader gives at a time; ``None`` if its batches are whole."""
        batches = self.loader.batch_sampler
        return batches.size if isinstance(batches, PhysicalBatches) else None

    @property
    def strategy(self) -> str:
        """How methods are chosen, as in ``perex``."""
        return self._settings["strategy"]

    def recorded(self, losses: Callable[..., Any], *, compiled: bool = False) -> PrivateStep:
        """Forward and backward without the time that Python takes: a `RecordedStep` made of the first batch.

        It takes the place of ``with private:`` and the backward in it. What it is and what it cannot do says
        `RecordedStep`; a batch with fewer examples costs as much as one of ``physical_batch_size``.

        Args:
            losses: Runs the model on what it is called with, and returns the loss of each example, ``[N]``, or a tuple
                of it and of other tensors with the examples on the first axis.
            compiled: As in `RecordedStep`: let `torch.compile` fuse what is recorded.

        Returns:
            What is called with each batch, and returns what ``losses`` returns, without a graph. Its attribute
            ``compiled`` tells whether fused operations are replayed.

        Raises:
            ConfigurationError: When it is called first, if the step cannot be recorded, or not be compiled.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> from perexample.privacy import make_private
            >>> model, data = nn.Linear(2, 2), TensorDataset(torch.randn(100, 2), torch.randint(0, 2, (100,)))
            >>> private = make_private(model, torch.optim.Adam(model.parameters()), data, noise_multiplier=1.0,
            ...                        target_delta=1e-3, epochs=2, batch_size=20, public_size=100, max_norm=1.0)
            >>> backward = private.recorded(lambda x, y: nn.functional.cross_entropy(model(x), y, reduction="none"))
            >>> for x, y in private:
            ...     losses = backward(x, y)
            ...     _ = private.step()
            >>> private.steps, losses.requires_grad
            (10, False)
        """
        return PrivateStep(self, losses, compiled=compiled)

    def step(self) -> bool:
        """Take the private step, if the batch is complete.

        Returns:
            Whether a step was taken; with a physical batch size, only the last piece of a batch takes one. Step
            learning-rate schedulers where it is true.
        """
        before = self.ledger.steps
        self.optimizer.step()
        return self.ledger.steps > before

    def zero_grad(self) -> None:
        """Forget the sums of a complete batch; needed only to throw one away, since a step uses its sums up."""
        self.optimizer.zero_grad()

    def epsilon(self, delta: float | None = None) -> float:
        """Privacy spent so far, by the steps that were taken.

        Args:
            delta: The delta of (epsilon, delta)-differential privacy; by default the target's.

        Returns:
            An upper bound on epsilon for adding or removing one example.
        """
        return self.ledger.epsilon(self.delta if delta is None else delta, accountant=self._accountant)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: model, optimizer, ledger, position of the sampler, torch's random numbers.

        A learning-rate scheduler has a state of its own.

        Returns:
            Copies: it stays what it was when training goes on, weights and ledger alike.
        """
        return copy.deepcopy(self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "plan": asdict(self._plan),
            "random": torch.get_rng_state(),
            "random of GPUs": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the plan must be the same.

        Args:
            state: From `state_dict`.

        Raises:
            ConfigurationError: If the state is of a run with another plan or model; it names what differs.
            StaleGradientError: If this run has taken steps that the state does not know, of another history.
        """
        missing = [name for name in ("model", "optimizer", "plan", "random") if name not in state]
        if missing:
            raise ConfigurationError(
                f"The state has no {', '.join(missing)}: it is not that of a Private. Load what private.state_dict() "
                f"or private.save(path) gave."
            )
        theirs = state["plan"]
        for name, value in asdict(self._plan).items():
            if not _alike(theirs.get(name), value):
                raise ConfigurationError(
                    f"The saved run has {name}={theirs.get(name)!r}, this one {value!r}; a run is resumed with the "
                    f"settings it was begun with, or its privacy would not be what was planned."
                )
        _check_tensors(self.model.state_dict(), state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        torch.set_rng_state(state["random"])
        for device, random in enumerate(state.get("random of GPUs", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(random, device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a file, whole or not at all.

        Args:
            path: The file; an older one is replaced when the new one is complete on the disk.

        Raises:
            ConfigurationError: If there is no such folder.
        """
        save_file(self._state(), Path(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file that `save` wrote.

        Args:
            path: The file.
        """
        self.load_state_dict(load_file(Path(path)))

    def __repr__(self) -> str:
        return (
            f"Private({type(self.optimizer).__name__}, noise_multiplier={self.noise_multiplier:.4g}, "
            f"sample_rate={self.sample_rate:.4g}, expected_batch_size={self.expected_batch_size:g}, "
            f"steps={self.steps} of {self.planned_steps})"
        )


def _alike(there: Any, here: Any) -> bool:
    """Whether two settings are the same; calibrated noise may differ in its last digits between two machines."""
    floats = isinstance(there, float) and isinstance(here, float)
    return math.isclose(there, here, rel_tol=ROUNDING) if floats else there == here


def _check_tensors(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Before anything is loaded: torch would load a part, and then fail."""
    for name in (*mine, *theirs):
        here, there = (_described(tensors, name) for tensors in (mine, theirs))
        if here != there:
            raise ConfigurationError(
                f"The saved model has {there} `{name}`, this one {here}; a run is resumed with a model like the one it "
                f"was begun with."
            )


def _described(tensors: Mapping[str, Any], name: str) -> str:
    if name not in tensors:
        return "no"
    return f"shape {list(tensors[name].shape)} of" if isinstance(tensors[name], Tensor) else "a"
