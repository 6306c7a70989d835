"""The loader of a private training: Poisson batches, among them empty ones, from any dataset with indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .._private import system_generator
from ..errors import ConfigurationError
from .collate import EmptyBatches
from .containers import is_array
from .mixing import refuse_mixing

_OURS = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "dataset", "collate_fn"}


def check_data(dataset: Any, loader_options: Mapping[str, Any]) -> None:
    """Refuse what cannot be drawn from by Poisson sampling, and options that would undo it."""
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, (IterableDataset, DataLoader, Mapping)) or not sized:
        given = " Give loader.dataset, and batch_size and collate_fn here." if isinstance(dataset, DataLoader) else ""
        raise ConfigurationError(
            f"dataset must have __len__ and __getitem__, and {type(dataset).__name__} is no such thing; Poisson "
            f"sampling draws every example by its index.{given}"
        )
    if isinstance(dataset, tuple) and dataset and all(map(is_array, dataset)):
        raise ConfigurationError(
            f"dataset is a tuple of {len(dataset)} arrays, which would be taken for {len(dataset)} examples. Give "
            f"torch.utils.data.TensorDataset(*tensors), whose examples are their rows; if each is an example, a list."
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


def loader_of(dataset: Any, batches: Any, collate_fn: Callable | None, options: Mapping[str, Any]) -> DataLoader:
    """The loader of these batches.

    Args:
        dataset: What `check_data` lets pass.
        batches: The sampler of batches.
        collate_fn: The user's, which must not mix examples.
        options: Others of the ``DataLoader``.

    Returns:
        A loader whose batches may be empty.

    Raises:
        ConfigurationError: If the dataset gives no first item, or the ``DataLoader`` refuses an option.
    """
    collate = EmptyBatches(collate_fn, example=_first(dataset))
    if collate_fn is not None:
        refuse_mixing(collate_fn, dataset)
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


def _first(dataset: Any) -> Any:
    """An item, which tells the form of all."""
    try:
        return dataset[0]
    except Exception as error:
        raise ConfigurationError(
            f"dataset[0] failed: {type(error).__name__}: {error}. A dataset must give an item for each of the indices "
            f"0, ..., len(dataset) - 1."
        ) from error


class _Loader(DataLoader):
    """Batches in which none may be missing."""

    def __iter__(self) -> Any:
        """Begin; a batch that was begun is drawn again."""
        with torch.device("cpu"):  # where the generator is, from which a number is drawn
            return _Once(super().__iter__())


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

    def __getattr__(self, name: str) -> Any:
        """All else is that dataset's own, as the names of its classes; but for what copies and pickles ask for."""
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _cannot_give_none(dataset: Any) -> bool:
    try:
        return callable(getattr(dataset, "__getitems__", None)) and bool(dataset.__getitems__([]))
    except Exception:  # noqa: BLE001 - as where nothing is stacked
        return True
