"""Private training in one call: everything from a model, an optimizer and a dataset."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .._arguments import is_word, shown, whole
from ..errors import ConfigurationError
from ..methods import Choice
from ..model import extend
from .distributed import Processes
from .ledger import Ledger, Release
from .loading import check_data, loader_of
from .optimizer import checked_processes, privatize
from .planning import (
    book_of,
    budget,
    hold_to,
    noise_for,
    planned_steps,
    sample_rate,
    warn_of_delta,
    warn_of_steps_before,
)
from .private import Plan, Private
from .privatizer import Clipping
from .sampling import PhysicalBatches, PoissonBatchSampler


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    *,
    batch_size: float,
    public_size: int | None = None,
    max_norm: float | None = None,
    clipping: Clipping | None = None,
    target_epsilon: float | None = None,
    target_delta: float,
    noise_multiplier: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    physical_batch_size: int | None = None,
    accountant: str = "pld",
    loss_reduction: str = "mean",
    strategy: str = "measure",
    batch_dim: int = 0,
    collate_fn: Callable | None = None,
    ledger: str | os.PathLike[str] | Ledger | None = None,
    noise: str = "torch",
    sampling_generator: torch.Generator | None = None,
    noise_generator: torch.Generator | None = None,
    processes: Processes | None = None,
    **loader_options: Any,
) -> Private:
    """Everything that private training needs, from a model, an optimizer and a dataset.

    Extends the model, calibrates the noise to the budget, makes the optimizer private, and makes a loader of Poisson
    batches: every example is in a batch with probability ``batch_size / public_size``, by itself.

    Args:
        model: Any model without BatchNorm in training mode; see `replace_batchnorm`.
        optimizer: Any torch optimizer but LBFGS and SparseAdam, of the model's trainable parameters; it is made private
            in place.
        dataset: A dataset with ``__len__`` and ``__getitem__``, one example for each index.
        batch_size: Expected size of a batch, over all processes; also what noisy sums are divided by.
        public_size: Number of examples, as far as it may be known; must be given. Sample rate, steps and noise are
            computed from it and are public, so it is yours to say that ``len(dataset)`` is no secret, or to give a
            rough number.
        max_norm: The clipping bound C, for the norm of each example's gradient; or give ``clipping``.
        clipping: A `ClippedGrad`, for other clip functions, groups, or an adaptive C.
        target_epsilon: Epsilon of the budget for the whole training; or give ``noise_multiplier``.
        target_delta: Delta of the budget, with which `Private.epsilon` is computed; well below 1 / public_size.
        noise_multiplier: Standard deviation of the noise on a sum, in units of C.
        epochs: Passes over the data, on average; or give ``steps``.
        steps: Number of private steps, among them those that the ledger knows already.
        physical_batch_size: Batches are cut into pieces of at most so many examples, for memory; only the last piece
            of a batch takes a step. Per process.
        accountant: ``"pld"`` (tight) or ``"rdp"``.
        loss_reduction: How the loss joins the examples, as in ``perex``.
        strategy: As in ``perex``; with ``"model"`` a resumed run is the same to the last bit for layers of any size.
        batch_dim: Axis of the examples, as in ``extend``.
        collate_fn: Of the ``DataLoader``; it needs no case for empty batches.
        ledger: A file that every step is written to before it is taken, or a `Ledger`.
        noise: ``"torch"``, or ``"os"`` for the operating system's cryptographic source.
        sampling_generator: Makes the batches repeatable, for tests; not where the ledger has steps already, whose
            batches would come again, and there is no ``noise_generator``.
        noise_generator: Makes the noise repeatable, for tests, beside the same sums to the last bit.
        processes: As in ``privatize``.
        loader_options: Others of ``DataLoader``, such as ``num_workers``.

    Returns:
        One object with loader, context, ``step``, ``epsilon(delta)`` and state.

    Raises:
        ConfigurationError: For arguments without meaning, or that contradict each other.
        UnsupportedModuleError: For a module that mixes examples.
        CrossExampleError: For a ``collate_fn`` that does, as far as three examples show it.

    Guarantees:
        The training is (epsilon, delta)-differentially private for adding or removing one example, if the model that
        is released comes from its steps alone. Choices made by looking at the data (learning rate, C, when to stop)
        are not accounted.

    References:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1; accounting by privacy loss distributions: Koskela et al.
        2020, arXiv:1906.03049.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from perexample.privacy import make_private
        >>> model, data = nn.Linear(2, 2), TensorDataset(torch.randn(100, 2), torch.randint(0, 2, (100,)))
        >>> private = make_private(model, torch.optim.Adam(model.parameters()), data, target_epsilon=3.0,
        ...                        target_delta=1e-3, epochs=2, batch_size=20, public_size=100, max_norm=1.0)
        >>> for x, y in private:
        ...     with private:
        ...         nn.functional.cross_entropy(model(x), y).backward()
        ...     _ = private.step()
        >>> private.steps, private.epsilon() <= 3.0
        (10, True)
    """
    _check_options(loader_options)
    _check_model(model, loss_reduction, strategy)
    target_epsilon, target_delta = budget(target_epsilon, target_delta)
    _check_generators(sampling_generator=sampling_generator, noise_generator=noise_generator)
    physical_batch_size = _pieces(physical_batch_size)
    processes = checked_processes(processes)
    rate = sample_rate(batch_size, public_size)
    warn_of_delta(target_delta, float(public_size or math.inf))
    planned = planned_steps(epochs, steps, rate)
    clipping = _clipping(max_norm, clipping)
    _check_optimized(model, optimizer)
    check_data(dataset, loader_options)
    noise_multiplier = noise_for(target_epsilon, target_delta, noise_multiplier, rate, planned, accountant)
    sampler = _sampler(dataset, rate, sampling_generator, processes)
    batches = sampler if physical_batch_size is None else PhysicalBatches(sampler, physical_batch_size)
    loader = loader_of(dataset, batches, collate_fn, loader_options)
    extend(model, batch_dim=batch_dim)
    _tell_names(clipping, model)
    book = book_of(ledger, planned, processes)
    warn_of_steps_before(model, book)
    if target_epsilon is not None:
        hold_to(book, Release(noise_multiplier, rate))
    privatize(
        optimizer,
        clipping=clipping,
        noise_multiplier=noise_multiplier,
        expected_batch_size=batch_size,
        sampler=batches,
        ledger=book,
        generator=noise_generator,
        noise=noise,
        processes=processes,
    )
    return Private(
        model=model,
        optimizer=optimizer,
        loader=loader,
        sampler=sampler,
        clipping=clipping,
        ledger=book,
        plan=Plan(float(noise_multiplier), rate, float(batch_size), planned),
        delta=target_delta,
        accountant=accountant,
        settings={"loss_reduction": loss_reduction, "strategy": strategy},
    )


def _check_options(options: Mapping[str, Any]) -> None:
    """Names that nobody knows: before anything is missed that was given under them."""
    own = inspect.signature(make_private).parameters
    for name in sorted(options.keys() - inspect.signature(DataLoader).parameters.keys()):
        close = difflib.get_close_matches(name, own, 1)
        meant = f" Was {close[0]} meant, of make_private?" if close else ""
        raise ConfigurationError(
            f"make_private has no option {name!r}, and torch.utils.data.DataLoader, which is handed those that are not "
            f"its own, has none either.{meant} What takes the place of options of Opacus is listed in "
            f"docs/migration.rst."
        )


def _check_generators(**generators: Any) -> None:
    for name, generator in generators.items():
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ConfigurationError(f"{name} must be a torch.Generator or None, not {generator!r}.")


def _pieces(size: Any) -> int | None:
    return None if size is None else whole("physical_batch_size", size, "an integer >= 1, or None", 1)


def _sampler(dataset: Any, rate: float, generator: torch.Generator | None, processes: Processes) -> PoissonBatchSampler:
    """This process's part of the batches."""
    return PoissonBatchSampler(len(dataset), rate, generator=generator, rank=processes.rank, world_size=processes.size)


def _clipping(max_norm: float | None, clipping: Clipping | None) -> Clipping:
    if (max_norm is None) == (clipping is None):
        raise ConfigurationError("make_private needs one of max_norm and clipping.")
    if clipping is not None:
        return clipping
    from perexample.extensions import ClippedGrad  # type: ignore[import-not-found] # needs this package first

    return ClippedGrad(max_norm)


def _tell_names(clipping: Any, model: nn.Module) -> None:
    """Bounds and groups that go by the names of parameters are checked before the training, not in it."""
    know = getattr(clipping, "know", None)
    if callable(know) and not isinstance(clipping, type):
        know(model.named_parameters())


def _check_model(model: Any, loss_reduction: Any, strategy: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if not is_word(loss_reduction, ("mean", "sum")):
        raise ConfigurationError(f"loss_reduction must be 'mean' or 'sum', not {shown(loss_reduction)}.")
    Choice(strategy)  # raises what perex would, which opens after the training has begun


def _check_optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer must have the model's trainable parameters: all share one norm."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    held = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not names:
        raise ConfigurationError(
            "model has no trainable parameter; call requires_grad_() on those that are to be trained, before the "
            "optimizer is made."
        )
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ConfigurationError(
                f"Parameter `{name}` is on the meta device and has no values; give it some with "
                f"model.to_empty(device=...) and the model's own initialization, before make_private."
            )
    for key, name in names.items():
        if key not in held:
            raise ConfigurationError(
                f"Parameter `{name}` is trainable, and the optimizer does not have it: it would take part in the norms "
                f"and never be trained. Give it to the optimizer, or freeze it with requires_grad_(False)."
            )
    for key, p in held.items():
        if key not in names:
            raise ConfigurationError(
                f"The optimizer has a parameter of shape {list(p.shape)} that is not the model's; was the model copied "
                f"or converted after the optimizer was made?"
            )
