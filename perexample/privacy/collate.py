"""Batches without examples, and batches cut into pieces, in the structure that collating gave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch.utils.data import default_collate

from .._arguments import whole
from ..errors import ConfigurationError
from .containers import fresh, is_array, parts_of, plain, with_parts


class EmptyBatches:
    """Collates as another function does, and a batch of no examples to zero rows of the same structure.

    A Poisson sample may be empty, and its step is a step like others: noise is added and the cost counted. For ``[]``
    most functions fail. Which axis of which part counts examples is found by collating the given example once and
    twice: tensors and numpy arrays, in tuples, namedtuples, lists, dicts, other mappings (`BatchEncoding` of
    transformers) and dataclasses, get size 0 along the axis that doubles; lists that double become empty; what is the
    same for both is kept. Where that does not tell, as for packed sequences and graphs, the function is asked for
    ``[]`` itself: it may give ``None`` there, for a loop that runs no forward then. A data set with ``__getitems__`` is
    asked for no examples too; `make_private` sees to that.

    Args:
        collate_fn: From a list of examples to a batch; by default that of torch. For workers that are spawned it has
            to be picklable, as everywhere.
        example: Any item of the data set, such as ``dataset[0]``. Only its collated structure is kept.

    Attributes:
        collate_fn: The same.

    Raises:
        ConfigurationError: If ``collate_fn`` fails, or it cannot be told what no examples would give.

    Example:
        >>> from perexample.privacy import EmptyBatches
        >>> collate = EmptyBatches(example={"x": torch.ones(3), "label": 1, "text": "a"})
        >>> collate([])
        {'x': tensor([], size=(0, 3)), 'label': tensor([], dtype=torch.int64), 'text': []}
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any] | None = None, *, example: Any) -> None:
        """Find the structure."""
        if collate_fn is not None and not callable(collate_fn):
            raise ConfigurationError(f"collate_fn must be callable or None, not {collate_fn!r}.")
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        one, two = self._collated(example, 1), self._collated(example, 2)
        try:
            self._empty = _none_of(one, two, "batch")
        except ConfigurationError as unclear:
            self._empty = self._of_none(unclear)

    def __call__(self, examples: list[Any]) -> Any:
        """Collate.

        Args:
            examples: Items of the data set; may be empty.

        Returns:
            The batch.
        """
        return self.collate_fn(examples) if len(examples) else fresh(self._empty)

    def _of_none(self, unclear: ConfigurationError) -> Any:
        """What the function itself makes of no examples, where the structure does not tell."""
        try:
            return self.collate_fn([])
        except Exception as error:
            raise ConfigurationError(
                f"{unclear} Let collate_fn itself handle [], for which it failed: {type(error).__name__}: {error}."
            ) from error

    def _collated(self, example: Any, times: int) -> Any:
        try:
            return self.collate_fn([fresh(example) for _ in range(times)])  # some functions take parts out of examples
        except Exception as error:
            raise ConfigurationError(
                f"collate_fn failed for {times} x the given example, so that the structure of an empty batch is not "
                f"known: {type(error).__name__}: {error}. Give an example as the data set gives it."
            ) from error


def split_batch(batch: Any, size: int) -> list[Any]:
    """Cut a collated batch into pieces of at most ``size`` examples.

    `PhysicalBatches` does this before collating and needs no such rules: the first axis of every tensor and numpy array
    counts examples; lists and tuples that hold some are structure (as torch's collate function makes it), those of
    other things have an entry for each example; tensors without axes, numbers and texts belong to every piece.

    Args:
        batch: Tensors and arrays, in tuples, namedtuples, lists, mappings and dataclasses.
        size: Largest number of examples in a piece.

    Returns:
        The pieces, views of the same memory, in order; one if there are no examples.

    Raises:
        ConfigurationError: If parts differ in their number of examples, or it cannot be told.

    Example:
        >>> from perexample.privacy import split_batch
        >>> [len(piece["x"]) for piece in split_batch({"x": torch.ones(5, 3), "y": torch.ones(5)}, 2)]
        [2, 2, 1]
    """
    size = whole("size", size, "an integer >= 1", 1)
    rows = _rows(batch, "batch")
    if not rows:
        raise ConfigurationError("batch has no tensor, array or list that tells the number of examples.")
    path, examples = next(iter(rows.items()))
    for other, count in rows.items():
        if count != examples:
            raise ConfigurationError(
                f"{path} is for {examples} examples and {other} for {count}: the first axis must count examples in all "
                f"parts of the batch. Cut it before it is collated, with PhysicalBatches."
            )
    if examples <= size:
        return [batch]
    return [_cut(batch, start, start + size, examples, "batch") for start in range(0, examples, size)]


def _none_of(one: Any, two: Any, path: str) -> Any:
    """What no examples give, if one example gives ``one`` and two of them ``two``."""
    if type(one) is not type(two):
        _cannot_tell(path, one, two)
    if is_array(one):
        return _no_rows(one, two, path)
    if isinstance(one, (list, tuple)) and one and len(two) == 2 * len(one):
        return type(one)()
    parts, others = parts_of(one), parts_of(two)
    if parts is None or others is None:
        return one if _equal(one, two) else _cannot_tell(path, one, two)
    if list(parts) != list(others):
        _cannot_tell(path, one, two)
    return with_parts(one, [_none_of(part, others[key], path + key) for key, part in parts.items()])


def _no_rows(one: Any, two: Any, path: str) -> Any:
    before, after = tuple(one.shape), tuple(two.shape)
    differing = [axis for axis, size in enumerate(before) if (size,) != after[axis : axis + 1]]
    if len(before) != len(after) or len(differing) > 1:
        _cannot_tell(path, one, two)
    if not differing:
        return plain(one) if bool((one == two).all()) else _cannot_tell(path, one, two)
    axis = differing[0]
    if after[axis] != 2 * before[axis]:
        _cannot_tell(path, one, two)
    return plain(one[(slice(None),) * axis + (slice(0),)])


def _equal(one: Any, two: Any) -> bool:
    try:
        return bool(one is two or one == two)
    except (RuntimeError, TypeError, ValueError):  # things that compare in ways of their own
        return False


def _cannot_tell(path: str, one: Any, two: Any) -> NoReturn:
    first, second = (f"shape {list(v.shape)}" if is_array(v) else f"a {type(v).__name__}" for v in (one, two))
    raise ConfigurationError(
        f"What {path} is for a batch of no examples cannot be told: it is {first} for one example and {second} for two "
        f"that are equal, which differ otherwise than by twice as many rows."
    )


def _holds_arrays(value: Any) -> bool:
    return is_array(value) or any(_holds_arrays(child) for child in (parts_of(value) or {}).values())


def _is_list_of_examples(value: Any) -> bool:
    """Whether it is a list of things that are not tensors, such as texts."""
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and not _holds_arrays(value)


def _rows(value: Any, path: str) -> dict[str, int]:
    """Number of examples according to each part that tells it."""
    if is_array(value):
        return {path: value.shape[0]} if len(value.shape) else {}
    if _is_list_of_examples(value):
        return {path: len(value)}
    found: dict[str, int] = {}
    for key, child in (parts_of(value) or {}).items():
        found |= _rows(child, path + key)
    return found


def _cut(value: Any, start: int, stop: int, examples: int, path: str) -> Any:
    if is_array(value):
        return value[start:stop] if len(value.shape) else value
    if _is_list_of_examples(value):
        return value[start:stop]
    parts = parts_of(value)
    if parts is None:
        return value
    if path != "batch" and isinstance(value, list) and len(value) == examples:
        raise ConfigurationError(
            f"{path} is a list of {examples} parts with tensors in a batch of {examples} examples: it cannot be told "
            f"whether each part is of one example or of all. Cut the batch before it is collated, with PhysicalBatches."
        )
    return with_parts(value, [_cut(child, start, stop, examples, path + key) for key, child in parts.items()])
