"""A batch that lies where a recorded step reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._tree import PLAIN, map_tensors, tensors_of
from .errors import BatchAxisError, ConfigurationError


class StaticBatch:
    """As many examples as there may be at most; those that a batch does not have are the ones it was made with.

    Args:
        batch: Tensors in nested tuples, lists and mappings, with the examples on their first axis.
        device: Where the model is.
        name: Of what takes it, for messages.

    Attributes:
        size: How many examples there may be.
        real: Which are those of a batch, ``[size]``.
        read: The tensors that the step is to read.

    Raises:
        BatchAxisError: If there is no example, or the tensors have different numbers of them.
        ConfigurationError: If there is something else than tensors, numbers and texts in it.
    """

    def __init__(self, batch: tuple, device: torch.device, name: str) -> None:
        """Copy it twice."""
        self._name = name
        self._form = _form(batch)
        self.size = _number(batch)
        if self.size < 1:
            raise BatchAxisError(
                f"{name} needs a batch of one example or more to be recorded with, as many examples on the first axis "
                f"of each tensor, and was given {_described(batch)}. What all examples share, as positions or a mask, "
                f"make a buffer of the model, or expand it to the examples."
            )
        self.own = map_tensors(lambda t: t.detach().to(device, copy=True), batch)
        self._spare = map_tensors(lambda t: t.detach().to(device, copy=True), batch)
        self.real = torch.ones(self.size, dtype=torch.bool, device=device)
        self.read = tensors_of(self.own)
        self._filled = self._counted = self.size

    def fill(self, batch: tuple) -> int:
        """Let a batch be read.

        Args:
            batch: Of the same form, with at most as many examples.

        Returns:
            The number of examples.

        Raises:
            BatchAxisError: If it has another form, or more examples.
            ConfigurationError: If gradients of it are wanted.
        """
        n, new, own = self._checked(batch), tensors_of(batch), tensors_of(self.own)
        if n != self._counted:
            self.real[:n] = True
            self.real[n:] = False
            self._counted = n
        self.read = own
        if n == self.size and own[0].device.type != "cuda" and _are_apart(new) and all(map(_lie_alike, new, own)):
            self.read = new  # no copy is needed
            return n
        for a, b, c in zip(new, own, tensors_of(self._spare), strict=True):
            b[:n].copy_(a, non_blocking=True)
            if n < self._filled:
                b[n : self._filled].copy_(c[n : self._filled])
        self._filled = n
        return n

    def filled(self, batch: tuple) -> tuple[int, list[Tensor]]:
        """The number of examples of a batch, and tensors as `fill` lets them be read, which a later one leaves alone.

        Args:
            batch: As for `fill`, or the first parts of it.

        Returns:
            The number, and the tensors.

        Raises:
            BatchAxisError: As `fill`.
            ConfigurationError: As `fill`.
        """
        n, new = self._checked(batch, len(batch)), tensors_of(batch)
        parts = tensors_of(self.own[: len(batch)]), tensors_of(self._spare[: len(batch)])
        return n, [fitted(t, own, spare) for t, own, spare in zip(new, *parts, strict=True)]

    def _checked(self, batch: tuple, parts: int | None = None) -> int:
        """The number of examples of a batch, which must be of the form that was recorded, or of its first parts."""
        own, form = self.own[:parts], self._form[1][:parts]
        n, new = _number(batch), tensors_of(batch)
        if not 0 <= n <= self.size or _form(batch)[1] != form:
            was, called = _described(own), _described(batch)
            if was == called:
                was, called = _structure(own), _structure(batch)
            raise BatchAxisError(
                f"{self._name} was recorded with {was}, and was called with {called}; only the number of examples may "
                f"be another, at most {self.size}, and all that is no tensor must be the same. Record a step with the "
                f"largest batch."
            )
        if any(t.requires_grad for t in new):
            raise ConfigurationError(
                f"{self._name} leaves no gradients of its inputs; pass them without requires_grad (detach), or, where "
                f"their gradients are wanted, call the model itself."
            )
        return n

    def refill(self) -> None:
        """Let other ones of the examples that it was made with stand for those that the batch does not have."""
        for t, spare in zip(tensors_of(self.own), tensors_of(self._spare), strict=True):
            t[self._filled :].copy_(spare.roll(self._filled + 1, 0)[self._filled :])
        self._filled = self.size  # so that they are put back

    def others(self, n: int) -> tuple:
        """A batch of n of its own examples, in another order."""
        return map_tensors(lambda t: t.roll(1, 0)[:n].clone(), self._spare)


def fitted(t: Tensor, like: Tensor, rest: Tensor | None = None) -> Tensor:
    """A tensor as one of another's shape, device and layout: itself, if it is, else a copy.

    Args:
        t: With as many entries on the first axis, or fewer.
        like: The other one.
        rest: What the entries behind these are taken from, by their places; zeros if not given.

    Returns:
        The tensor.
    """
    n = len(t)
    if n == len(like) and _lie_alike(t, like):
        return t
    whole = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    whole[:n].copy_(t)
    if rest is None:
        whole[n:].zero_()
    else:
        whole[n:].copy_(rest[n:])
    return whole


def _number(batch: Any) -> int:
    """The number of examples that all tensors agree on; -1 if they do not."""
    sizes = {t.shape[0] if t.dim() else -1 for t in tensors_of(batch)}
    return sizes.pop() if len(sizes) == 1 else -1


def _form(tree: Any) -> Any:
    """Structure, shapes and types, and all that is no tensor."""
    if isinstance(tree, Tensor):
        if tree.layout is not torch.strided or tree.is_quantized or not tree.dim():
            kind = "a number" if not tree.dim() else "a quantized one" if tree.is_quantized else str(tree.layout)
            raise ConfigurationError(
                f"A recording takes batches of dense tensors with the examples on their first axis, and one is "
                f"{kind}; make it dense, expand what is for all of them, or keep it in the model."
            )
        return "tensor", tree.shape[1:], tree.dtype
    if isinstance(tree, Mapping):
        return type(tree), tuple((key, _form(value)) for key, value in tree.items())
    if isinstance(tree, (tuple, list)):
        return type(tree), tuple(map(_form, tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), tuple((field.name, _form(getattr(tree, field.name))) for field in dataclasses.fields(tree))
    if type(tree) in PLAIN:
        return type(tree), tree
    raise ConfigurationError(
        f"A recording takes batches of tensors, in tuples, lists, mappings and dataclasses; a {type(tree).__name__} "
        f"would be that of the recording for ever."
    )


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two of them share memory."""
    return len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def _lie_alike(t: Tensor, other: Tensor) -> bool:
    same = t.stride() == other.stride() and t.storage_offset() == other.storage_offset()
    return type(t) is Tensor and same and t.device == other.device and not t.is_neg() and not t.is_conj()


def _described(batch: Any) -> str:
    return ", ".join(map(_of_one, tensors_of(batch))) or "no tensors"


def _of_one(t: Tensor) -> str:
    return f"{list(t.shape)} ({str(t.dtype).removeprefix('torch.')})"


class _Text(str):
    """Shown as it is."""

    __repr__ = str.__str__


def _structure(batch: tuple) -> str:
    return repr(map_tensors(lambda t: _Text(_of_one(t)), batch))
