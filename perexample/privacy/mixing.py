"""Whether a collate function lets examples of a batch mix before the model sees them, as MixUp and CutMix do."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import CrossExampleError
from .collate import _children, _fresh, _is_array

_SEEDS = 3  # with how many random numbers it is tried: mixing may be left to chance


def refuse_mixing(collate: Callable[[list[Any]], Any], dataset: Any) -> None:
    """Raise if what a batch has of one example depends on the others in it; it is tried on three examples.

    Args:
        collate: From a list of examples to a batch.
        dataset: Where they come from; nothing is done if it has fewer, or fails.

    Raises:
        CrossExampleError: If the same example is another one beside others.
    """
    if len(dataset) < 3:
        return
    with suppress(Exception), _random_kept():  # what fails here fails in the training, where it says more
        first, *others = (dataset[i] for i in range(3))
        for seed in range(_SEEDS):
            one, again, other = (_batch(collate, [first, b], seed) for b in (others[0], others[0], others[1]))
            if not all(map(_same, _arrays(one), _arrays(again))):
                return  # it has random numbers of its own
            parts = list(zip(_arrays(one), _arrays(other), strict=True))
            mixed = [a for a, b in parts if a.shape == b.shape and len(a.shape) and len(a) == 2 and not _shares(a, b)]
            if mixed:
                break
        else:
            return
    if mixed:
        raise CrossExampleError(
            "collate_fn mixes examples: what a batch has of dataset[0] is another beside dataset[1] than beside "
            "dataset[2] (MixUp, CutMix, statistics of the batch?). One example then changes several rows, each of "
            "which is clipped by itself, and the bound on its influence does not hold. Augment each example by itself."
        )


def _batch(collate: Callable[[list[Any]], Any], examples: Sequence[Any], seed: int) -> Any:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return collate([_fresh(example) for example in examples])


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


def _arrays(value: Any) -> list[Any]:
    """Tensors and arrays of a batch, in order."""
    if _is_array(value):
        return [torch.as_tensor(value)]
    return [array for child in (_children(value) or {}).values() for array in _arrays(child)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two batches have a row in common, wherever it is."""
    return any(_same(one, other) for one in a for other in b)


__all__ = ["refuse_mixing"]
