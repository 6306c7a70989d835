"""Where the results of one call of a torch function hold the examples.

Most places follow from shapes (`simple_place`). Where an operation moves entries as the data says, it is run on the
numbers of the rows; any other is tried out once (`forms_of`), and what was found is remembered for calls of one form.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._private import dispatched
from .._tree import tensors_in
from ..errors import ConfigurationError, UnsupportedModuleError
from ..place import Lost, Place, Space, reshaped
from ..rules.function import JOINS
from .arithmetic import simple_place
from .choosing import index_of
from .kinds import Kind, Traits, names, traits_of
from .lost import is_sparse, lost_if_sparse, where
from .oracle import Form, fits, form_key, forms_of
from .owners import FINDS, INTO, MOVERS, STRIDED, ForeignError, moved, values_of
from .state import quiet
from .table import place_of, put

_FORMS: dict[Any, list[Form]] = {}
_REDUCED: set[Any] = set()  # forms of losses in which examples do not meet before they are joined
_MOST_FORMS = 20_000
_ADDS = names("add add_ sub sub_ rsub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ sum subtract subtract_")


class Placing:
    """One call of a torch function that is given data, and the places of what it gives."""

    _shape: torch.Size | None = None  # of what is reshaped in place, before it is

    def __init__(
        self, func: Callable, traits: Traits, args: tuple, kwargs: dict, tracked: list[tuple[Tensor, Any]]
    ) -> None:
        self.func, self.traits, self.args, self.kwargs = func, traits, args, kwargs
        self.kind, self.name, self.in_place = traits.kind, traits.name, traits.in_place
        self.tracked = tracked
        if self.kind is Kind.MOVE or (self.name == "__getitem__" and _has_index(args[1])):
            values = values_of(func, args, kwargs)  # what indices choose is looked at
            indices = [(t, place) for t, place in tracked if not any(t is v for v in values)]
            counts = self.name == "_pack_padded_sequence"  # lengths, in order of size: whole numbers, as Python's are
            if counts or not any(_chooses_across(t, place, values) for t, place in indices):
                kept = [(t, place) for t, place in tracked if any(t is v for v in values)]
                tracked = self.tracked = kept or tracked
        self.flat_targets = False  # whether those of all examples come as one list
        if self.name == "ctc_loss" and len(tracked) > 1:
            self.tracked = _without_flat_targets(args, kwargs, tracked)
            self.flat_targets, tracked = len(self.tracked) < len(tracked), self.tracked
        self.given = [t for t, _ in tracked]
        if len(tracked) > 1:  # what was chosen for no example is as good as a constant
            tracked = self.tracked = [(t, place) for t, place in tracked if not _of_nobody(place)] or tracked
        self.lost = next((place for _, place in tracked if isinstance(place, Lost)), None)
        self.record = (self.lost or tracked[0][1].space).record
        if self.kind is Kind.DERIVED:
            self.lost = Lost(self.record, self._called(), "", False, self._unsupported(), meets=True)
        self.any_rows = self.kind is Kind.POINTWISE  # whether the call does the same on any number of rows

    def _places(self, outputs: list[Tensor]) -> list[Any]:
        if self.kind is Kind.FILL:
            return [self._lost("fills a tensor with what depends on examples", False)] * len(outputs)
        space = self._space()
        if space is None:
            return self._apart(outputs)
        if space.rows <= 1 and not self._fills() and self.name not in STRIDED:
            place = Place(self._beside_constants(space), None)
            called = self._called() if any(map(is_sparse, outputs)) else ""
            return [lost_if_sparse(self.record, called, t) if is_sparse(t) else place for t in outputs]
        if self._shape is not None:
            found = reshaped(self.tracked[0][1], self._shape, outputs[0].shape)
            return [found or self._lost("leaves no axis that tells the examples apart", False)]
        if self.flat_targets and outputs[0].dim() == 1:
            return [Place(space, 0)]
        if len(outputs) == 1:
            simple = simple_place(self.traits, self.args, self.kwargs, self.tracked, outputs[0])
            if simple is not None:
                return [simple]
        if self._moves_by_data() or self._finds():
            return self._moved(self.args, outputs)
        if self.name in INTO and index_of(self.func, self.args, self.kwargs) is not None:  # constants among constants
            places = self._moved(self.args, outputs)
            lost = [place for place in places if isinstance(place, Lost)]
            told = self._tried(outputs, space.rows) if lost else places  # that they meet, where a trial shows it
            return told if all(isinstance(place, Lost) for place in told) else places
        return self._at_what_masks_show(outputs) or self._met_before(outputs) or self._tried(outputs, space.rows)

    def _met_before(self, outputs: list[Tensor]) -> list[Any] | None:
        """Whether examples meet in what a loss function then reduces to one number."""
        whole = unreduced(self.func, self.args, self.kwargs) if [t.numel() for t in outputs] == [1] else None
        key = None if whole is None else form_key(self.func, self.args, whole)
        if whole is None or key is None or key in _REDUCED:
            return None
        try:
            with torch.no_grad(), quiet():
                entries = list(tensors_in(self.func(*self.args, **whole)))
        except Exception:  # noqa: BLE001 - whatever a function raises that is called in another way
            return None
        found = [Placing(self.func, self.traits, self.args, whole, self.tracked)._places([t]) for t in entries]
        lost = [place for places in found for place in places if isinstance(place, Lost) and place.mixes]
        if lost:
            lost[0].meets = True
            return [lost[0]]
        if len(_REDUCED) >= _MOST_FORMS:
            _REDUCED.clear()
        _REDUCED.add(key)
        return None

    def _beside_constants(self, space: Space) -> Space:
        """The space of one example; a note of it, if something that belongs to nobody was put beside it."""
        if space.beside or self.record.space.rows <= 1 or self.name not in JOINS:
            return space
        known = [place_of(t) for t in tensors_in((self.args, self.kwargs)) if t.numel()]
        others = any(place is None or _of_nobody(place) for place in known)
        return space.with_constants() if others else space

    def _fills(self) -> bool:
        """Whether one example's entries are written among what may become those of others."""
        into = self.kind is Kind.MOVE and self.name in INTO and self.record.space.rows > 1
        return into and place_of(self.args[0]) is None

    def _space(self) -> Space | None:
        """The rows that all arguments hold; ``None`` if they differ."""
        first = self.tracked[0][1].space
        return first if all(place.space.same(first) for _, place in self.tracked[1:]) else None

    def _apart(self, outputs: list[Tensor]) -> list[Any]:
        """Arguments that hold different rows can only be put beside each other."""
        if (self.kind is Kind.MOVE or self.name in MOVERS) and self._moves_what_is_owned():
            return self._moved(self.args, outputs)
        made = next((place.space.made for _, place in self.tracked if place.space.made), "")
        by = f" (from {made})" if made else ""
        why = f"mixes examples: it is given rows of different ones, or in different orders{by}"
        meets = not (
            self.name in _ADDS and all(t.numel() == 1 for t, _ in self.tracked)
        )  # as a loop over examples does
        return [Lost(self.record, self._called(), why, True, meets=meets)] * len(outputs)

    def _moves_by_data(self) -> bool:
        """Whether the entries' new order may differ from call to call."""
        if self.kind is not Kind.MOVE and not (self.name == "__getitem__" and _has_index(self.args[1])):
            return False
        return self._moves_what_is_owned()

    def _moves_what_is_owned(self) -> bool:
        """Whether any of the entries belong to examples, and not only what chooses them."""
        return any(place_of(t) is not None for t in values_of(self.func, self.args, self.kwargs))

    def _finds(self) -> bool:
        """Whether it gives the numbers of entries."""
        return self.name in FINDS and len(self.args) == 1 and not self.kwargs.keys() & {"input", "self", "other"}

    def _at_what_masks_show(self, outputs: list[Tensor]) -> list[Any] | None:
        """What masks choose of what belongs to nobody: tried with the numbers of the entries that they show."""
        if self.name != "__getitem__" or not _has_index(self.args[1]):
            return None
        indices = self.args[1] if isinstance(self.args[1], tuple) else (self.args[1],)
        if not any(_is_mask(index) for index in indices):
            return None
        numbers = [self._shown_by(index) if _is_mask(index) else (index,) for index in indices]
        args = self.args[0], tuple(one for found in numbers for one in found)
        tracked = [(t, place) for t in tensors_in(args[1]) if (place := place_of(t)) is not None]
        lost = [place for _, place in tracked if isinstance(place, Lost)]
        return lost[:1] or Placing(self.func, self.traits, args, self.kwargs, tracked)._places(outputs)

    def _shown_by(self, mask: Tensor) -> tuple[Tensor, ...]:
        """The numbers of the entries that a mask shows."""
        with dispatched():
            numbers = mask.nonzero(as_tuple=True)
        place = place_of(mask)
        if place is not None:
            find = Placing(Tensor.nonzero, traits_of(Tensor.nonzero), (mask,), {"as_tuple": True}, [(mask, place)])
            for one, found in zip(numbers, find._moved((mask,), list(numbers)), strict=True):
                put(one, found)
        return numbers

    def _moved(self, args: tuple, outputs: list[Tensor]) -> list[Any]:
        with torch.no_grad(), dispatched():
            try:
                places = moved(self.func, args, self.kwargs, outputs, self.record.space, self._called())
            except ConfigurationError:  # of a step that is recorded
                raise
            except ForeignError:
                why = "mixes examples: an index that belongs to one of them chooses what is another's"
                return [self._lost(why, True)] * len(outputs)
            except Exception:  # noqa: BLE001 - whatever an operation raises on integers
                places = [None] * len(outputs)
        return [p or self._lost("leaves no axis that tells the examples apart", False) for p in places]

    def _tried(self, outputs: list[Tensor], rows: int) -> list[Any]:
        sparse = next(filter(is_sparse, outputs), None)
        if sparse is not None:
            return [lost_if_sparse(self.record, self._called(), sparse)] * len(outputs)
        key = form_key(self.func, self.args, self.kwargs)
        for known in (key, (key, rows)):
            forms = _FORMS.get(known) if key is not None else None
            if forms and len(forms) == len(outputs) and all(map(fits, forms, outputs, [rows] * len(outputs))):
                self.any_rows = known is key
                return [self._from(form) for form in forms]
        movable = self.name in MOVERS
        with dispatched():  # a default device is such a mode
            forms, few = forms_of(self.func, self.args, self.kwargs, outputs, rows, only_few=movable)
        self.any_rows = few
        if movable and any(form.why or form.axis is None for form in forms):
            return self._moved(self.args, outputs)
        forms = [self._constant(form, t) for form, t in zip(forms, outputs, strict=True)]
        unseen = any(form.unseen and t.is_floating_point() for form, t in zip(forms, outputs, strict=True))
        if key is not None and not unseen and self._for_all_calls(few):
            if len(_FORMS) > _MOST_FORMS:
                _FORMS.clear()
            _FORMS[key if few else (key, rows)] = forms
        return [self._from(form) for form in forms]

    def _for_all_calls(self, few: bool) -> bool:
        """Whether what was found holds for all calls of the same form, and not for these indices or constants only."""
        others = [t for t in tensors_in((self.args, self.kwargs)) if place_of(t) is None and t.dim()]
        return not others if not few else all(t.is_floating_point() or t.dtype == torch.bool for t in others)

    def _constant(self, form: Form, out: Tensor) -> Form:
        """A result of the same shape that no trial could change, as a softmax over one entry, is where its input is."""
        x, place = self.tracked[0]
        if form.unseen and out.shape == x.shape and len(self.tracked) == 1:
            return Form(place.axis, place.outer, place.inner)
        return form

    def _from(self, form: Form) -> Any:
        if form.why:
            listed = " (go through all experts, range(len(experts)), in place of those that were chosen)"
            return self._lost(form.why + listed * ("unique" in self.name and form.mixes), form.mixes)
        if form.axis is None:
            return None
        return Place(self.tracked[0][1].space, form.axis, form.outer, form.inner)

    def _lost(self, why: str, mixes: bool) -> Lost:
        return Lost(self.record, self._called(), why, mixes)

    def _unsupported(self) -> UnsupportedModuleError:
        return UnsupportedModuleError(
            f"torch.autograd.grad in {where()}: derivatives that a forward computes cannot be followed, as parameters "
            f"meet data in them where no tap is. Register the generic rule for the module that computes them, "
            f"register_rule(ThatClass)(GenericRule), which differentiates all of its forward again."
        )

    def _called(self) -> str:
        return f"`{self._shown}` in {where()}"

    @property
    def _shown(self) -> str:
        """How the operation is called in names and messages."""
        return self.name.strip("_.") or "operation"


def _chooses_across(index: Tensor, place: Any, values: list[Tensor]) -> bool:
    """Whether what an index chooses of one example depends on others; the order of all, equally often, may."""
    if not (isinstance(place, Lost) and place.mixes):
        return False
    if index.dtype == torch.bool or index.is_floating_point() or not values:
        return True
    chosen = index.flatten().sort().values
    for size in set(values[0].shape) - {0}:
        times, rest = divmod(index.numel(), size)
        if not rest and torch.equal(chosen, torch.arange(size, device=index.device).repeat_interleave(times)):
            return False
    return True


def _of_nobody(place: Any) -> bool:
    """Whether a tensor has rows of no example, as of an expert that no token was sent to."""
    space = place.space if isinstance(place, Place) else None
    return space is not None and space.rows == 1 and space.owner is not None and bool(space.owner[0] < 0)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _without_flat_targets(args: tuple, kwargs: dict, tracked: list[tuple[Tensor, Any]]) -> list[tuple[Tensor, Any]]:
    """The arguments of a CTC loss without targets that come as one list, if each example's are its own."""
    named = dict(zip(("log_probs", "targets", "input_lengths", "target_lengths"), args, strict=False)) | kwargs
    targets, lengths = named.get("targets"), named.get("target_lengths")
    place = next((place for t, place in tracked if t is targets), None)
    first = next((place for t, place in tracked if t is named.get("log_probs")), None)
    if not isinstance(place, Place) or not isinstance(first, Place) or targets is None or targets.dim() != 1:
        return tracked
    lengths = torch.as_tensor(lengths).cpu()
    owners = first.space.owners(torch.device("cpu"))
    if len(owners) == len(lengths) and torch.equal(
        place.owner_of_entry(torch.device("cpu")), owners.repeat_interleave(lengths)
    ):
        return [(t, known) for t, known in tracked if t is not targets]
    return tracked


def unreduced(func: Callable, args: tuple, kwargs: dict) -> dict[str, Any] | None:
    """The keyword arguments with which a loss function gives what it else reduces; ``None`` if there are none."""
    place = _place_of_reduction(func)
    if place is None or len(args) > place or kwargs.get("reduction", "mean") == "none":
        return None
    legacy = dict.fromkeys(kwargs.keys() & {"size_average", "reduce"})
    return kwargs | legacy | {"reduction": "none"}


@functools.cache
def _place_of_reduction(func: Callable) -> int | None:
    """The number of the argument that says how a loss function of torch's reduces what it gives."""
    if getattr(func, "__module__", "") != F.__name__:
        return None
    names = list(inspect.signature(func).parameters)
    return names.index("reduction") if "reduction" in names else None


def _has_index(index: Any) -> bool:
    """Whether an index chooses entries one by one, rather than by slices and numbers."""
    if isinstance(index, tuple):
        return any(_has_index(part) for part in index)
    return isinstance(index, (Tensor, list))
