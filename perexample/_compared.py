"""Whether replays of a recorded step give what the step gives as usual, before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._chance import random_bytes, seed
from ._first_run import Seen
from ._precision import reduced
from ._static import StaticBatch
from ._tree import map_tensors, tensors_of
from ._watched import without_chance
from .errors import ConfigurationError, ExtensionError
from .extension import Extension


@dataclass
class Found:
    """What a step has found.

    Attributes:
        held: Whether values were what they were taken for.
        losses: Of all examples.
        outputs: What the function of the losses has returned behind them.
        fields: By extension and parameter.
        more: What else the extensions have found.
        grads: Gradients of the sum of all losses, by parameter, where they are wanted.
    """

    held: Tensor
    losses: Tensor
    outputs: Any
    fields: list[dict[str, Tensor]]
    more: list[Any]
    grads: dict[str, Tensor]


class Comparison:
    """Compares replays with usual steps, and with each other.

    Args:
        batch: Where replays read their examples.
        extensions: Whose fields are compared.
        replay: Replays the step on what is there.
        usual: Takes the step as usual on a batch; ``None`` if it cannot be taken.
        seen: What was seen of the first run.
        device: Where the model is.
        graph: Whether replays are those of a CUDA graph.
    """

    def __init__(
        self,
        batch: StaticBatch,
        extensions: Sequence[Extension],
        replay: Callable[[], Found],
        usual: Callable[[tuple], Found | None],
        seen: Seen,
        device: torch.device,
        *,
        graph: bool,
    ) -> None:
        """Nothing is compared yet."""
        self.graph = graph
        self.batch, self.extensions, self.replay, self.usual = batch, extensions, replay, usual
        self.random, self.drew, self.device = seen.random, seen.drew, device
        self._like = _COARSE if seen.half or reduced([device.type]) else _ROUNDED

    def refuse_differences(self, *, whole: bool) -> None:
        """Compare on other examples, on fewer, and on the same beside others.

        Args:
            whole: Whether replays are only of whole batches.

        Raises:
            ConfigurationError: If results differ by more than rounding.
        """
        size = self.batch.size
        if not (self.graph and self.random):  # a CUDA graph draws other numbers, which cannot be replaced
            self._with_usual(size, nullcontext, whole=whole)
        if whole:
            return
        for n in sorted({size - 1, 1} - {size, 0}, reverse=True) if not (self.graph and self.random) else ():
            self._with_usual(n, without_chance if self.random else nullcontext)
        if size > 1:
            self._fillers((size + 1) // 2)

    def _with_usual(self, n: int, context: Callable[[], Any], *, whole: bool = False) -> None:
        batch = self.batch.others(n)
        with context():
            seed(SEED, [self.device])
            self.batch.fill(batch)
            found = self.replay()
            drawn = random_bytes(self.device)
            seed(SEED, [self.device])
            wanted = self.usual(batch)
            alike = n < self.batch.size or not self.drew or drawn == random_bytes(self.device)
        held = bool(found.held.item())
        if wanted is None or (whole and not held):  # it may have seen others
            return
        compared = self._difference if held else self._forward_differs  # which is right whatever cannot be trusted
        differs = compared(found, wanted, n) if alike else "random numbers"
        if differs:
            _refuse("examples" if n == self.batch.size else "numbers of examples", differs)

    def _fillers(self, n: int) -> None:
        """Whether the examples that a batch is filled up with have no part in what is found of the others."""
        found = []
        for fill in (lambda: self.batch.fill(self.batch.others(n)), self.batch.refill):
            fill()
            seed(SEED, [self.device])
            found.append(map_tensors(Tensor.clone, self.replay()))
        one, other = found
        if not (one.held.item() and other.held.item()):
            return
        if differs := self._difference(one, self._of_first(other, n), n, _SAME):
            _refuse("examples", differs)

    def _of_first(self, found: Found, n: int) -> Found:
        """What was found of the first n examples, as far as extensions tell; but for `Found.more`."""
        fields = [
            {name: own for name, field in every.items() if (own := extension.of_first(field, n)) is not None}
            for extension, every in zip(self.extensions, found.fields, strict=True)
        ]
        losses, outputs = map_tensors(lambda t: t[:n], (found.losses, found.outputs))
        return Found(found.held, losses, outputs, fields, found.more, found.grads)

    def _forward_differs(self, found: Found, wanted: Found, n: int) -> str:
        """The same of losses and outputs alone."""
        pairs = zip(tensors_of((found.losses, found.outputs)), tensors_of((wanted.losses, wanted.outputs)), strict=True)
        return "" if all(near([a[:n]], [b], self._like) for a, b in pairs) else "losses or outputs"

    def _difference(self, found: Found, wanted: Found, n: int, like: tuple[float, float] | None = None) -> str:
        """What a replay has found of n examples otherwise than it was found of them alone, but for rounding."""
        whole, like = n == self.batch.size, like or self._like
        own = found if whole else self._of_first(found, n)
        if not near([own.losses], [wanted.losses], like):
            return "losses"
        for extension, fields, others in zip(self.extensions, own.fields, wanted.fields, strict=True):
            same = not whole or fields.keys() == others.keys()
            if not same or not near(list(fields.values()), [others[name] for name in fields], like):
                return f"`{extension.field}`" + ("" if whole else _UNLESS_TOLD.format(type(extension).__name__))
        if own.grads.keys() != wanted.grads.keys() or not near([*own.grads.values()], [*wanted.grads.values()], like):
            return "gradients of the loss"
        pairs = zip(tensors_of(own.outputs), tensors_of(wanted.outputs), strict=True)
        if not all(near([a], [b], like) for a, b in pairs):
            return "outputs"
        pairs = zip(tensors_of(found.more), tensors_of(wanted.more), strict=True)
        return "" if all(self._more_alike(a, b, n, like) for a, b in pairs) else "values of what for_replay returns"

    def _more_alike(self, a: Tensor, b: Tensor, n: int, like: tuple[float, float]) -> bool:
        """Whether something else that was found is the same, as far as it can be if there are fewer examples."""
        size = self.batch.size
        same_rows = a.dim() == b.dim() != 0 and len(a) == size
        if n < size and like is not _SAME and not (same_rows and len(b) == n):
            return True  # only `replayed` can tell what it is for fewer
        return near([a[:n]], [b[:n]], like) if same_rows else near([a], [b], like)


def refuse_memory(
    first: Found, again: Found, extensions: Sequence[tuple[Extension, Extension]], *, coarse: bool
) -> None:
    """Whether two runs on the same batch, with the same random numbers, give the same.

    Args:
        first: Of the one.
        again: Of the other, at whose begin the fields of the first were still there.
        extensions: Those whose fields they are, and what was asked in their place.
        coarse: Whether something is computed in less than float32.

    Raises:
        ConfigurationError: If the losses are not the same.
        ExtensionError: If what an extension has found is not.
    """
    like = _COARSE if coarse else _REPEATED
    pairs = (tensors_of((run.losses, run.outputs)) for run in (again, first))
    if not all(near([a], [b], like) for a, b in zip(*pairs, strict=True)):
        raise ConfigurationError(
            "This step cannot be recorded: the same batch has other losses in a second run, or other outputs. The "
            "model or its loss goes on with what a run before has left (counters, schedules, states), which would be "
            "that of the recording for ever. Give it with the batch, or run the step as usual."
        )
    for number, (extension, asked) in enumerate(extensions):
        found, before = (tensors_of((run.fields[number], run.more[number])) for run in (again, first))
        if len(found) != len(before) or not near(found, before, _COARSE if coarse else _ROUNDED):
            name = type(extension).__name__
            by = "" if asked is extension else f" ({type(asked).__name__}, which its recording returned)"
            raise ExtensionError(
                f"{name}{by} cannot be recorded: in a second run on the same batch it finds something else, as it goes "
                f"on with what the run before has left, in itself or at the parameters. What is asked in a recording "
                f"must remember nothing; add up in {name}.commit (docs/extending)."
            )


_UNLESS_TOLD = " (see whether {}.of_first is right)"


def _refuse(what: str, differs: str) -> NoReturn:
    raise ConfigurationError(
        f"This step cannot be recorded: for other {what} it gives something else than as usual, other {differs}. The "
        f"model or its loss depends on Python or NumPy (lists of numbers, counters), on seeds, on dropout in a part "
        f"that a checkpoint runs again, on how many examples there are (divide no loss by their number), or on what is "
        f"computed from all of them together. Run it as usual."
    )


SEED = 0x5EED0F7E57  # one that no model is likely to set itself
# Relative to the largest entry of a tensor, and to that of all. Other numbers of examples are rounded otherwise, and
# take other sides of some kinks; in 16 bits, or with products in less than float32, much so.
_ROUNDED, _COARSE, _SAME, _REPEATED = (1e-2, 1e-4), (3e-2, 3e-2), (1e-4, 1e-6), (1e-5, 0.0)


def near(found: Sequence[Tensor], wanted: Sequence[Tensor], like: tuple[float, float]) -> bool:
    """Whether tensors are the same up to rounding."""
    found, wanted = ([t.to_dense() for t in several] for several in (found, wanted))
    sizes = [_size(t) for t in wanted]
    least = like[1] * max(sizes, default=0.0)
    return all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), 0.0, like[0] * size + least, equal_nan=True)
        for a, b, size in zip(found, wanted, sizes, strict=True)
    )


def _size(t: Tensor) -> float:
    """The largest entry that is finite."""
    entries = t.double().abs()
    finite = entries[entries.isfinite()]
    return finite.max().item() if finite.numel() else 0.0
