"""How an operation treats the examples, found out by trying.

The operation is run on made-up values with the rows of few examples, and run again with the rows of some of them
changed: an entry of the result that changes belongs to them. What was found holds for all calls of the same form, so
each form is tried once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .._chance import drawing_devices, random_kept, seed
from .._looks import looking
from .._tree import PLAIN, map_tensors, tensors_in
from ..place import Place
from .kinds import base_name, names
from .table import place_of

_TRIALS = 4
_OWN = 2  # further trials on rows of the batch itself, for functions that are not defined everywhere
_FEW = (3, 5)  # rows; powers of two would hide rotations
_UNCHECKED = {"lstm"}  # reads beyond its states if these have fewer rows than its input: no other numbers of rows


# What an entry gives depends on which values there are, though most trials would not show it.
_AMONG_ALL = names("unique unique_consecutive _unique2")

_TRYING = threading.RLock()
_MIXES = "mixes examples: entries of its result depend on several of them"
_UNTRIED = "cannot be tried on other values"


def _entry_by_entry(*args: Any, **kwargs: Any) -> Tensor:
    """A function of the entries at the same place in all tensors."""
    return torch.stack(torch.broadcast_tensors(*tensors_in((args, kwargs)))).sum(0)


# Samplers that reject: how many random numbers an entry takes depends on its value, and so those of all that follow
# change with it. They are tried as functions of the same entries in which nothing is left to chance.
_WITHOUT_CHANCE: dict[str, Callable[..., Tensor]] = {
    "_standard_gamma": _entry_by_entry,
    "poisson": _entry_by_entry,
    "binomial": _entry_by_entry,
    "_sample_dirichlet": lambda *args, **kwargs: _entry_by_entry(*args, **kwargs).softmax(-1),
}


@dataclass(frozen=True)
class Form:
    """Where an output of an operation holds the rows.

    Attributes:
        axis: The axis, ``None`` if the output does not depend on the rows.
        outer: As in `Place`.
        inner: As in `Place`.
        why: What is wrong, if the rows cannot be told.
        mixes: Whether rows were seen to meet in one entry.
        unseen: Whether no trial showed any dependence at all.
    """

    axis: int | None = None
    outer: int = 1
    inner: int = 1
    why: str = ""
    mixes: bool = False
    unseen: bool = False


class _Made:
    """Made-up values in the shapes of an operation's arguments, with another number of rows."""

    def __init__(self, args: tuple, kwargs: dict, rows: int, trial: int) -> None:
        self.args, self.kwargs, self.rows = args, kwargs, rows
        self.trial, self.scale = trial, (1.0, 3.0)[trial % 2]
        self.real = trial >= 2  # at last with all that does not depend on the batch as it is
        self.generator = torch.Generator().manual_seed(rows + 1000 * trial)
        self.constants: dict[int, Tensor] = {}
        self.tracked = [t for t in tensors_in((args, kwargs)) if _has_rows(place_of(t))]
        self.own = (torch.arange(rows, device="cpu") * (trial - _TRIALS)) if trial > _TRIALS else None
        self.values = [self._values(t) for t in self.tracked]

    def _values(self, t: Tensor, old: Tensor | None = None) -> Tensor:
        """New values, other than the old ones where there are few to choose from."""
        place = place_of(t)
        assert isinstance(place, Place)
        shape = list(t.shape)
        if place.axis is not None:
            shape[place.axis] = place.outer * self.rows * place.inner
        if self.own is not None:
            return self._rows_of(t, place, self.own + (old is not None))
        if self.trial == _TRIALS and old is None:
            return t.detach().clone()
        if t.dtype == torch.bool:
            share = (0.5, 0.02, 0.98)[self.trial % 3]
            if old is not None:
                return ~old
            return (torch.rand(shape, generator=self.generator, device="cpu") < share).to(t.device)
        if not (t.is_floating_point() or t.is_complex()):
            low, high = (int(t.min()), int(t.max())) if t.numel() else (0, 0)
            if low < 0 and self.trial % 2 == 0:
                low, high = 0, max(high, 0)  # a negative target is one that is left out, as those of all may be
            low, high = min(low, 0), high + (low == high and self.trial % 2 == 0)
            if old is None or high == low:
                return torch.randint(low, high + 1, shape, generator=self.generator, device="cpu").to(t)
            step = torch.randint(1, high - low + 1, shape, generator=self.generator, device="cpu").to(t)
            return low + (old - low + step) % (high - low + 1)
        if t.is_complex():
            return torch.complex(self._numbers(shape), self._numbers(shape)).to(t)
        return self._numbers(shape).to(t)

    def _rows_of(self, t: Tensor, place: Place, numbers: Tensor) -> Tensor:
        """Rows of the batch, of all arguments the same ones."""
        if place.axis is None:
            return t.detach().clone()
        rows = t.detach().unflatten(place.axis, (place.outer, -1, place.inner))
        numbers = (numbers % rows.shape[place.axis + 1]).to(t.device)
        return rows.index_select(place.axis + 1, numbers).flatten(place.axis, place.axis + 2)

    def rolled(self, rows: Tensor) -> list[Tensor]:
        """The real values, with those of some rows replaced by their neighbours'."""
        return self._where(rows, lambda t, old, place, axis: old.roll(place.inner, axis))

    def _numbers(self, shape: Any) -> Tensor:
        made = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu") * self.scale
        return made.abs() if self.scale != 1 else made

    def changed(self, rows: Tensor) -> list[Tensor]:
        """The values with those of some rows exchanged; ``rows`` is a mask ``[rows]``."""
        return self._where(rows, lambda t, old, place, axis: self._values(t, old))

    def _where(self, rows: Tensor, other: Callable[[Tensor, Tensor, Place, int], Tensor]) -> list[Tensor]:
        """The values, others where the mask says so."""
        new = []
        for t, old in zip(self.tracked, self.values, strict=True):
            place = place_of(t)
            assert isinstance(place, Place)
            assert place.axis is not None
            mask = rows.view(1, -1, 1).expand(place.outer, -1, place.inner).reshape(-1).to(old.device)
            shape = [1] * old.dim()
            shape[place.axis] = -1
            new.append(torch.where(mask.view(shape), other(t, old, place, place.axis), old))
        return new

    def _seed(self) -> None:
        """Let a random function draw the same numbers each time."""
        seed(0, drawing_devices(self.tracked))

    def _constant(self, t: Tensor) -> Tensor:
        """What does not depend on the batch: in general, and not as it happens to be, since a zero would hide much."""
        if self.real or not (t.is_floating_point() or t.dtype == torch.bool):
            return t.detach().clone()
        if t.dtype == torch.bool:
            half = torch.rand(t.shape, generator=self.generator, device="cpu") < 0.5
            self.constants.setdefault(id(t), half.to(t.device))
        if id(t) not in self.constants:
            self.constants[id(t)] = self._numbers(t.shape).to(t)
        return self.constants[id(t)].clone()

    def call(self, func: Callable, values: list[Tensor]) -> list[Tensor]:
        """The outputs for these values; everything else is as it was, and kept from being written to."""
        chosen = {id(t): v for t, v in zip(self.tracked, values, strict=True)}
        copies: dict[int, Tensor] = {}

        def replaced(t: Tensor) -> Tensor:
            if id(t) not in copies:
                copies[id(t)] = chosen[id(t)].clone() if id(t) in chosen else self._constant(t)
            return copies[id(t)]

        args, kwargs = map_tensors(replaced, (self.args, self.kwargs))
        self._seed()
        result = func(*args, **kwargs)
        if base_name(func) == "__setitem__":
            result = args[0]
        return list(tensors_in(result)) or list(tensors_in(kwargs.get("out")))


def _has_rows(place: Any) -> bool:
    """Whether a tensor has an axis of rows; one without has an example of its own, or none, beside those that have."""
    return isinstance(place, Place) and place.axis is not None


def forms_of(
    func: Callable, args: tuple, kwargs: dict, outputs: list[Tensor], rows: int, *, only_few: bool
) -> tuple[list[Form], bool]:
    """Where each output holds the rows: tried on few rows, or where sizes are written into the call, on all.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        outputs: What it gave.
        rows: Number of rows of the arguments, at least 2.
        only_few: Leave it at few rows.

    Returns:
        A form for each output, and whether what few rows have shown holds for any number of them.
    """
    if base_name(func) in _AMONG_ALL:
        return [Form(why=_MIXES, mixes=True)] * len(outputs), False
    func = _WITHOUT_CHANCE.get(base_name(func), func)
    with looking(), _silent():
        return _forms_of(func, args, kwargs, outputs, rows, only_few=only_few)


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings, which would be about made-up values; one thread at a time, as what is put back is all threads'."""
    with _TRYING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _forms_of(
    func: Callable, args: tuple, kwargs: dict, outputs: list[Tensor], rows: int, *, only_few: bool
) -> tuple[list[Form], bool]:
    if base_name(func) in _UNCHECKED:
        return _over_trials(func, args, kwargs, outputs, rows, rows), False
    few, more = (_over_trials(func, args, kwargs, outputs, rows, count) for count in _FEW)
    if few == more or any(form.mixes for form in more):
        forms, any_rows = more, not any(form.why for form in more) and rows not in _FEW
    else:  # a number in the call happens to suit one of the counts
        forms, any_rows = [Form(why="does something else on another number of rows")] * len(outputs), False
    if not only_few and any(form.why and not form.mixes for form in forms):
        forms = _over_trials(func, args, kwargs, outputs, rows, rows)
    if all(not form.why for form in forms) and not _confirmed(func, args, kwargs, forms, rows):
        forms, any_rows = (
            [Form(why="mixes examples with the values that it was given", mixes=True)] * len(outputs),
            False,
        )
    return forms, any_rows


def _over_trials(func: Callable, args: tuple, kwargs: dict, outputs: list[Tensor], rows: int, count: int) -> list[Form]:
    """What the trials on one number of rows show together."""
    forms: list[Form] = []
    for trial in (*range(_TRIALS), *range(_TRIALS + 1, _TRIALS + 1 + _OWN)):
        if trial > _TRIALS and not any(form.why.startswith(_UNTRIED) for form in forms):
            break
        found = _judged(func, args, kwargs, outputs, rows, (count, trial))
        forms = [
            old if old is not None and not (old.why or new.mixes) else new for old, new in zip_longest(forms, found)
        ]
        if all(not form.why for form in forms) or any(form.mixes for form in found):
            return forms
    return forms


def _confirmed(func: Callable, args: tuple, kwargs: dict, forms: list[Form], rows: int) -> bool:
    """Whether it holds for the real values too: with half of the rows exchanged among each other, the others stay."""
    with torch.no_grad(), random_kept(drawing_devices(tensors_in((args, kwargs)))):
        made = _Made(args, kwargs, rows, _TRIALS)
        exchanged = torch.arange(rows, device="cpu") % 2 == 0
        try:
            base, after = made.call(func, made.values), made.call(func, made.rolled(exchanged))
        except Exception:  # noqa: BLE001 - in place on what has been changed since, for one
            return True
        for form, a, b in zip(forms, base, after, strict=False):
            if form.axis is None or a.shape != b.shape:
                continue
            pattern = (~exchanged).view(1, -1, 1).expand(form.outer, -1, form.inner).reshape(-1).to(a.device)
            if pattern.numel() != a.shape[form.axis]:
                return False
            if bool(_differs(a, b).movedim(form.axis, 0)[pattern].any()):
                return False
    return True


def _judged(
    func: Callable, args: tuple, kwargs: dict, outputs: list[Tensor], rows: int, trial: tuple[int, int]
) -> list[Form]:
    """One trial, compared with the shapes of the real outputs."""
    try:
        forms = _tried(func, args, kwargs, *trial)
    except Exception as error:  # noqa: BLE001 - whatever an operation raises on other values or sizes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [Form(why=f"{_UNTRIED} ({reason})")] * len(outputs)
    if len(forms) != len(outputs):
        return [Form(why="gives a number of results that depends on the examples")] * len(outputs)
    return [
        form if form.why or fits(form, t, rows) else Form(why=_unclear(t))
        for form, t in zip(forms, outputs, strict=True)
    ]


def _unclear(t: Tensor) -> str:
    return f"has a result of shape {list(t.shape)}, no axis of which was seen to follow the examples"


def fits(form: Form, t: Tensor, rows: int) -> bool:
    """Whether the size of the axis is what the form says."""
    if form.axis is None:
        return True
    return t.dim() > form.axis and t.shape[form.axis] == form.outer * rows * form.inner


def _tried(func: Callable, args: tuple, kwargs: dict, rows: int, trial: int) -> list[Form]:
    with torch.no_grad(), random_kept(drawing_devices(tensors_in((args, kwargs)))):
        made = _Made(args, kwargs, rows, trial)
        base = made.call(func, made.values)
        numbers = torch.arange(rows, device="cpu")
        found = [[torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in base] for _ in range(2)]
        owner = [torch.zeros(t.shape, dtype=torch.long, device=t.device) for t in base]
        told = [torch.ones(t.shape, dtype=torch.bool, device=t.device) for t in base]
        mixed = [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in base]
        for bit in range(max(1, (rows - 1).bit_length())):
            for value in (0, 1):
                after = made.call(func, made.changed((numbers >> bit & 1) == value))
                found[value] = [_differs(a, b) for a, b in zip(base, after, strict=True)]
            for i, (zero, one) in enumerate(zip(*found, strict=True)):
                mixed[i] |= zero & one
                told[i] &= zero ^ one
                owner[i] += one.long() << bit
    return [_form(o.masked_fill(~t, -1), m, rows) for o, t, m in zip(owner, told, mixed, strict=True)]


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Where two results differ, beyond what a kernel's order of summation may change."""
    if a.shape != b.shape:
        raise ValueError("the shape of its result depends on the values")
    if not (a.is_floating_point() or a.is_complex()):
        return a != b
    finite = a.abs().masked_fill(~a.isfinite(), 0)
    rounding = 4 * torch.finfo(a.dtype).eps * (finite.max() if a.numel() else 0)  # of sums that cancel
    close = (a - b).abs() <= 1e-6 * (a.abs() + b.abs()) + rounding
    return ~(close | (a == b) | (a.isnan() & b.isnan()))


def _form(owner: Tensor, mixed: Tensor, rows: int) -> Form:
    """The one way of counting the rows along an axis that agrees with all owners that were seen."""
    if bool(mixed.any()):
        return Form(why=_MIXES, mixes=True)
    seen = owner >= 0
    if not bool(seen.any()):
        return Form(why="has a result that no trial could change", unseen=True)
    candidates = []
    for axis in range(owner.dim()):
        size = owner.shape[axis]
        if size % rows:
            continue
        for inner in (i for i in range(1, size // rows + 1) if size // rows % i == 0):
            pattern = torch.arange(rows, device=owner.device).view(1, -1, 1)
            pattern = pattern.expand(size // rows // inner, -1, inner).reshape(-1)
            shape = [1] * owner.dim()
            shape[axis] = -1
            if bool(((owner == pattern.view(shape)) | ~seen).all()):
                candidates.append(Form(axis, size // rows // inner, inner))
    if len(candidates) != 1:
        return Form(why="has a result in which the axis of the examples cannot be told")
    return candidates[0]


def form_key(func: Any, args: tuple, kwargs: dict) -> Any:
    """What decides how an operation treats the examples: shapes, up to the number of rows, and all other arguments.

    Returns:
        Something hashable; ``None`` if an argument is not.
    """

    def part(value: Any) -> Any:
        if type(value) in PLAIN:
            return type(value), value  # True is 1
        if isinstance(value, Tensor):
            place = place_of(value)
            if not isinstance(place, Place):
                number = value.item() if not value.dim() and not value.is_floating_point() else None  # an axis
                return tuple(value.shape), value.dtype, number
            shape = tuple(-1 if axis == place.axis else size for axis, size in enumerate(value.shape))
            return shape, value.dtype, place.axis, place.outer, place.inner
        if isinstance(value, (tuple, list)):
            return tuple(part(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, part(v)) for k, v in value.items())
        if isinstance(value, slice):
            return "slice", value.start, value.stop, value.step
        return [] if callable(value) and not isinstance(value, type) else value  # may do something else next time

    key = func, part(args), part(kwargs)
    try:
        hash(key)
    except TypeError:
        return None
    return key
