"""Private training in one call: everything from a model, an optimizer and a dataset."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .._arguments import is_word, positive, real, shown, whole
from .._private import system_generator
from ..errors import ConfigurationError, PrivacyBudgetError
from ..methods import Choice
from ..model import extend
from . import accounting
from .collate import EmptyBatches
from .distributed import Processes
from .ledger import Ledger, Release
from .mixing import refuse_mixing
from .optimizer import Clipping, checked_processes, privatize
from .private import Plan, Private
from .sampling import PhysicalBatches, PoissonBatchSampler

_LEDGERS: WeakKeyDictionary[nn.Module, Ledger] = WeakKeyDictionary()  # of the models' last trainings
_MOST_STEPS = 2**53  # what the accountant takes
_OURS = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "dataset", "collate_fn"}


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
        optimizer: Any torch optimizer of the model's trainable parameters; it is made private in place.
        dataset: A dataset with ``__len__`` and ``__getitem__``, one example for each index.
        batch_size: Expected size of a batch, over all processes; also what noisy sums are divided by.
        public_size: Number of examples, as far as it may be known; must be given. Sample rate, steps and noise are
            computed from it and are public, so it is yours to say that ``len(dataset)`` is no secret, or to give a
            rough number.
        max_norm: C, to which the gradient of each example is clipped; or give ``clipping``.
        clipping: A `ClippedGrad`, for other clip functions, groups, or an adaptive C.
        target_epsilon: Budget for the whole training; or give ``noise_multiplier``.
        target_delta: Its second part; well below 1 / public_size.
        noise_multiplier: Standard deviation of the noise in units of C.
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
    generators = {"sampling_generator": sampling_generator, "noise_generator": noise_generator}
    target_epsilon, target_delta = _budget(target_epsilon, target_delta)
    _check_generators(generators)
    if physical_batch_size is not None:
        wanted = "an integer >= 1, or None"
        physical_batch_size = whole("physical_batch_size", physical_batch_size, wanted, 1)
    processes = checked_processes(processes)
    rate = _rate(batch_size, public_size)
    _warn_of_delta(target_delta, float(public_size or math.inf))
    planned = _planned(epochs, steps, rate)
    clipping = _clipping(max_norm, clipping)
    _check_optimized(model, optimizer)
    _check_data(dataset, loader_options)
    noise_multiplier = _noise(target_epsilon, target_delta, noise_multiplier, rate, planned, accountant)
    shard = {"rank": processes.rank, "world_size": processes.size}
    sampler = PoissonBatchSampler(len(dataset), rate, generator=sampling_generator, **shard)  # type: ignore[arg-type]
    batches = sampler if physical_batch_size is None else PhysicalBatches(sampler, physical_batch_size)
    collate = EmptyBatches(collate_fn, example=_first(dataset))
    if collate_fn is not None:
        refuse_mixing(collate_fn, dataset)
    loader = _loader(dataset, batches, collate, loader_options)
    extend(model, batch_dim=batch_dim)
    know = getattr(clipping, "know", None)
    if callable(know) and not isinstance(clipping, type):
        know(model.named_parameters())
    book = _book(ledger, planned, processes)
    _warn_of_steps_before(model, book)
    if target_epsilon is not None:
        _hold_to(book, Release(float(noise_multiplier), rate))
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
    plan = Plan(float(noise_multiplier), rate, float(batch_size), planned)
    return Private(
        model=model,
        optimizer=optimizer,
        loader=loader,
        sampler=sampler,
        clipping=clipping,
        ledger=book,
        plan=plan,
        delta=target_delta,
        accountant=accountant,
        settings={"loss_reduction": loss_reduction, "strategy": strategy},
    )


def _noise(
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


def _budget(epsilon: Any, delta: Any) -> tuple[float | None, float]:
    """The two, which the accountant knows by other names."""
    wanted = "a number above 0 and below 1 (far below 1 / public_size)"
    delta = real("target_delta", delta, wanted, lambda x: 0 < x < 1)
    return None if epsilon is None else positive("target_epsilon", epsilon, "a finite number > 0"), delta


def _warn_of_delta(delta: float, public_size: float) -> None:
    if delta > 1 / public_size:
        warnings.warn(
            f"target_delta={delta:g} is more than 1 / public_size = {1 / public_size:g}: a training that publishes one "
            f"of the examples whole would be as private. Take one well below it.",
            stacklevel=3,
        )


def _check_generators(generators: Mapping[str, Any]) -> None:
    for name, generator in generators.items():
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ConfigurationError(f"{name} must be a torch.Generator or None, not {generator!r}.")


def _rate(batch_size: float, public_size: int | None) -> float:
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


def _planned(epochs: float | None, steps: int | None, rate: float) -> int:
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


def _book(ledger: Any, planned: int, processes: Processes) -> Ledger:
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


def _warn_of_steps_before(model: nn.Module, book: Ledger) -> None:
    """A model's privacy is that of all its private steps, and a new ledger knows those to come."""
    before = _LEDGERS.get(model)
    if before is not None and before is not book and before.steps and not book.knows(before):
        warnings.warn(
            f"This {type(model).__name__} has been trained by {before.steps} private steps that the new ledger does "
            f"not know: epsilon() will be that of the steps to come. To count all of them, give make_private the file "
            f"of the ledger before, or a new Ledger() that has loaded its state_dict(), with noise_multiplier in place "
            f"of target_epsilon, and the steps (or epochs) of both trainings together.",
            stacklevel=3,
        )
    _LEDGERS[model] = book


def _hold_to(book: Ledger, planned: Release) -> None:
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


def _clipping(max_norm: float | None, clipping: Clipping | None) -> Clipping:
    if (max_norm is None) == (clipping is None):
        raise ConfigurationError("make_private needs one of max_norm and clipping.")
    if clipping is not None:
        return clipping
    from perexample.extensions import ClippedGrad  # type: ignore[import-not-found] # needs this package first

    return ClippedGrad(max_norm)


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


def _first(dataset: Any) -> Any:
    """An item, which tells the form of all."""
    try:
        return dataset[0]
    except Exception as error:
        raise ConfigurationError(
            f"dataset[0] failed: {type(error).__name__}: {error}. A dataset must give an item for each of the indices "
            f"0, ..., len(dataset) - 1."
        ) from error


class _Once(Iterator[Any]):
    """An iteration that is over when it fails: what follows would be taken for what could not be read."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches: Iterator[Any] | None = batches

    def __next__(self) -> Any:
        if self._batches is None:
            raise StopIteration
        try:
            return next(self._batches)
        except BaseException:
            self._batches = None
            raise


class _NeverAskedForNone(Dataset):
    """A dataset that gives several examples at once, and cannot give none; it is not asked for these."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return self.dataset.__getitems__(indices) if indices else []


def _cannot_give_none(dataset: Any) -> bool:
    try:
        return callable(getattr(dataset, "__getitems__", None)) and bool(dataset.__getitems__([]))
    except Exception:  # noqa: BLE001 - as where nothing is stacked
        return True


class _Loader(DataLoader):
    """Batches in which none may be missing."""

    def __iter__(self) -> Any:
        """Begin; a batch that was begun is drawn again."""
        with torch.device("cpu"):  # where the generator is, from which a number is drawn
            return _Once(super().__iter__())


def _loader(dataset: Any, batches: Any, collate: EmptyBatches, options: Mapping[str, Any]) -> DataLoader:
    # A loader draws a number when an iteration begins: not from the stream that a resumed run continues.
    options = {"generator": system_generator(), **options}
    dataset = _NeverAskedForNone(dataset) if _cannot_give_none(dataset) else dataset
    try:
        return _Loader(dataset, batch_sampler=batches, collate_fn=collate, **options)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"make_private hands all options that are not its own to torch.utils.data.DataLoader, and it failed: "
            f"{error}. See there for their values."
        ) from error


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


def _check_data(dataset: Any, loader_options: Mapping[str, Any]) -> None:
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, (IterableDataset, DataLoader, Mapping)) or not sized:
        given = " Give loader.dataset, and batch_size and collate_fn here." if isinstance(dataset, DataLoader) else ""
        raise ConfigurationError(
            f"dataset must have __len__ and __getitem__, and {type(dataset).__name__} is no such thing; Poisson "
            f"sampling draws every example by its index.{given}"
        )
    if len(dataset) == 0:
        raise ConfigurationError("dataset is empty; give one with an example, from which the form of a batch is known.")
    if loader_options.get("in_order") is False:
        raise ConfigurationError(
            "make_private got in_order=False: batches have to come in the order in which they were drawn, or pieces of "
            "two would make one step. Leave it out."
        )
    for name in sorted(_OURS & loader_options.keys()):
        raise ConfigurationError(
            f"make_private got the DataLoader option {name!r}, which it sets itself: batches are Poisson samples of "
            f"the expected size batch_size, in pieces of physical_batch_size."
        )
