"""Whether a collate function lets examples of a batch mix before the model sees them, as MixUp and CutMix do."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import CrossExampleError
from .containers import fresh, is_array, parts_of, with_parts

_SEEDS = 20  # with how many random numbers it is tried: mixing may be left to chance
_KEPT = 2 / 3  # share of the rows that stay as they are when the last of three examples is changed


def refuse_mixing(collate: Callable[[list[Any]], Any], dataset: Any) -> None:
    """Raise if what a batch has of one example depends on the others in it; it is tried on three examples.

    Args:
        collate: From a list of examples to a batch.
        dataset: Where they come from; nothing is done if it has fewer, if these hold no numbers that could be changed
            (images are numbers only when they are tensors), or if something fails.

    Raises:
        CrossExampleError: If examples are others when numbers of another one are changed, and nothing else.
    """
    mixes = False
    with suppress(Exception), _random_kept():  # what fails here fails in the training, where it says more
        examples = [dataset[i] for i in range(min(3, len(dataset)))]
        changed, count = _changed(examples[-1])
        if len(examples) == 3 and count:
            mixes = any(_mixes(collate, examples, [*examples[:2], changed], seed) for seed in range(_SEEDS))
    if mixes:
        raise CrossExampleError(
            "collate_fn mixes examples: what a batch has of dataset[0] or dataset[1] changes with the numbers in "
            "dataset[2] (MixUp, CutMix, statistics of the batch?). One example then changes several rows, each of "
            "which is clipped by itself, and the bound on its influence does not hold. Augment each example by itself."
        )


def _mixes(collate: Callable[[list[Any]], Any], one: list[Any], other: list[Any], seed: int) -> bool:
    """Whether more changes in a batch than the rows of its last example, which alone is another one."""
    alone, first, again, second = (_arrays(_batch(collate, e, seed)) for e in (one[:1], one, one, other))
    if not all(map(_same, first, again)):
        return False  # it has random numbers of its own
    for a, b, c in zip(alone, first, second, strict=True):
        axes = [axis for axis in range(b.dim()) if a.dim() == b.dim() and b.shape[axis] == 3 * a.shape[axis]]
        if b.shape != c.shape or len(axes) != 1:
            continue
        rows, others = b.unbind(axes[0]), c.unbind(axes[0])
        if sum(any(_same(row, old) for old in others) for row in rows) < _KEPT * len(rows):
            return True
    return False


def _changed(example: Any) -> tuple[Any, int]:
    """The example with other numbers of the same shapes, and how many arrays these were."""
    count = 0

    def other(value: Any) -> Any:
        nonlocal count
        if is_array(value):
            t = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
            if not t.is_floating_point() or not t.numel():
                return value
            count += 1
            new = 1.5 * t + 0.25
            return new if isinstance(value, torch.Tensor) else new.numpy().astype(value.dtype)
        parts = parts_of(value)
        return value if parts is None else with_parts(value, [other(child) for child in parts.values()])

    return other(example), count


def _batch(collate: Callable[[list[Any]], Any], examples: Sequence[Any], seed: int) -> Any:
    torch.default_generator.manual_seed(seed)  # and not those of GPUs
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return collate([fresh(example) for example in examples])


@contextmanager
def _random_kept() -> Iterator[None]:
    """Random numbers go on afterwards as if none had been drawn."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)


def _arrays(value: Any) -> list[torch.Tensor]:
    """Tensors and arrays of numbers in a batch, in order."""
    if is_array(value):
        with suppress(TypeError, ValueError, RuntimeError):  # texts and objects
            t = torch.as_tensor(value)
            return [t] if t.layout is torch.strided else []
        return []
    return [array for child in (parts_of(value) or {}).values() for array in _arrays(child)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


__all__ = ["refuse_mixing"]
