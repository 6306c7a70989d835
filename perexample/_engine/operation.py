"""One call of a torch function that is given data: where its results hold the examples, and its tap.

Most places follow from shapes (`simple_place`). Where an operation moves entries as the data says, it is run on the
numbers of the rows; any other is tried out once (`forms_of`), and what was found is remembered for calls of one form.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._looks import blind
from .._private import dispatched, inside_functorch, metadata, own_parameters, version, whole_base
from .._tree import map_tensors, tensors_in
from ..errors import ConfigurationError, UnsupportedModuleError
from ..place import Lost, Place, Space, reshaped
from ..rule import Bound, Rule, function_rule
from ..rules.function import JOINS, FunctionRule, JoinRule, PointwiseRule
from .arithmetic import simple_place
from .choosing import index_of
from .kinds import Kind, Traits, names, traits_of
from .oracle import Form, fits, form_key, forms_of
from .owners import FINDS, INTO, MOVERS, ForeignError, moved, values_of
from .state import STATE, quiet
from .table import origin_of, place_of, put, wrote
from .tap import LOST, Tap

_POINTWISE, _JOIN, _FUNCTION = PointwiseRule(), JoinRule(), FunctionRule()
_FORMS: dict[Any, list[Form]] = {}
_REDUCED: set[Any] = set()  # forms of losses in which examples do not meet before they are joined
_MOST_FORMS = 20_000
_TIMES = names("mul rmul imul multiply")
_ADDS = names("add add_ sub sub_ rsub __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ sum subtract subtract_")


class Operation:
    """One call of a torch function that is given data."""

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
        self.tap: Callable[[list[Tensor], list[Place], list[int]], None] | None = None
        self.inputs: list[Tensor] = []
        self.any_rows = self.kind is Kind.POINTWISE  # whether the call does the same on any number of rows
        self._places_early: Callable[[list[Tensor]], list[Any]] | None = None
        self._before: list[tuple[Tensor, Any]] = []
        self._counted: list[tuple[Tensor, int]] = []
        self._shape: torch.Size | None = None  # of what is reshaped in place, before it is

    # -- running it ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Note what the call may write to."""
        self._places_early = self._early()
        self._before = [(t, place_of(t)) for t in self._written()]
        self._counted = self._statistics()
        if self.in_place and self.kind is Kind.RESHAPE:
            self._shape = self.args[0].shape

    def conclude(self, out: Any) -> Any:
        """Note the places of what it gave, and leave its tap; returns what to go on with."""
        early, before = self._places_early, self._before
        for t, count in self._counted:
            if version(t) != count:
                self.record.wrote = True
                put(t, self._lost("writes statistics of the examples into a buffer", True))
        outputs = [self.args[0]] if self.name == "__setitem__" else list(tensors_in(out))
        if not outputs:
            return out
        if any(inside_functorch(t) for t in outputs):
            return out
        if self.lost is not None:
            several = any(isinstance(place, Lost) and t.numel() > 1 for t, place in self.tracked)
            if self._scales():
                self.lost = self._lost("mixes examples: it multiplies one number with another that all change", True)
                several = True
            lose(outputs, self.lost, meets=several)
            for t, place in before:
                self.record.wrote |= place is None
                wrote(t, place, self.lost)
            return out
        places = self._unpacked(early(outputs) if early is not None else self._places(outputs), outputs)
        lost = [place for place in places if isinstance(place, Lost)]
        for t, place in zip(outputs, places, strict=True):
            if isinstance(place, Lost):
                lose([t], place)
            elif place is not None:
                put(t, place)
        for t, place in before:
            now = place_of(t)
            if now is not None:
                self.record.wrote |= place is None
                wrote(t, place, now)
        leave, self.tap = self.tap, None  # no cycle may keep the tensors
        if leave is not None and not lost:
            chosen = [i for i, t in enumerate(outputs) if t.requires_grad and t.grad_fn is not None]
            if len(chosen) > 1:
                out = parted(out)
                outputs = list(tensors_in(out))
                for t, place in zip(outputs, places, strict=True):
                    put(t, place)
            if chosen:
                leave([outputs[i] for i in chosen], [places[i] for i in chosen], chosen)
        return out

    def _scales(self) -> bool:
        """Whether it multiplies a loss with a single number that was found out from several examples."""
        if self.name.strip("_") not in _TIMES or any(t.numel() != 1 for t in self.given) or blind():
            return False
        factors = [float(t) for t, place in self.tracked if isinstance(place, Lost) and not t.requires_grad]
        n = self.record.space.rows
        return len(factors) < len(self.given) and not all(f == 0 or f == 1 or _is_share(f, n) for f in factors)

    def _statistics(self) -> list[tuple[Tensor, int]]:
        """Running statistics that the call may change, and how often they were written to."""
        if self.name not in ("batch_norm", "instance_norm"):
            return []
        tensors = tensors_in((self.args[1:], self.kwargs))
        return [(t, version(t)) for t in tensors if not t.requires_grad and place_of(t) is None]

    def _written(self) -> list[Tensor]:
        """The tensors that the call writes into."""
        into = [self.args[0]] if self.in_place and self.args else []
        return [t for t in tensors_in((into, self.kwargs.get("out"))) if t.layout == torch.strided]

    def _unpacked(self, places: list[Any], outputs: list[Tensor]) -> list[Any]:
        """The sizes that packing returns belong to nobody."""
        return places + [None] * (len(outputs) - len(places))

    def _early(self) -> Callable[[list[Tensor]], list[Any]] | None:
        """What moves entries into a tensor must be asked before it writes there."""
        if not (self.in_place and self.kind is Kind.MOVE) or self.lost is not None:
            return None
        if not any(place_of(t) is not None for t in values_of(self.func, self.args, self.kwargs)):
            return None
        args = (self.args[0].detach().clone(), *self.args[1:])
        known = place_of(self.args[0])
        if known is not None:
            put(args[0], known)
        places = self._moved(args, [args[0]])
        return lambda outputs: places

    # -- places -------------------------------------------------------------------------------------------------------

    def _places(self, outputs: list[Tensor]) -> list[Any]:
        if self.kind is Kind.FILL:
            return [self._lost("fills a tensor with what depends on examples", False)] * len(outputs)
        space = self._space()
        if space is None:
            return self._apart(outputs)
        if space.rows <= 1 and not self._fills():
            place = Place(self._beside_constants(space), None)
            return [place] * len(outputs)
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
        found = [Operation(self.func, self.traits, self.args, whole, self.tracked)._places([t]) for t in entries]
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
        return lost[:1] or Operation(self.func, self.traits, args, self.kwargs, tracked)._places(outputs)

    def _shown_by(self, mask: Tensor) -> tuple[Tensor, ...]:
        """The numbers of the entries that a mask shows."""
        with dispatched():
            numbers = mask.nonzero(as_tuple=True)
        place = place_of(mask)
        if place is not None:
            find = Operation(Tensor.nonzero, traits_of(Tensor.nonzero), (mask,), {"as_tuple": True}, [(mask, place)])
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
        if key is not None and self._for_all_calls(few):
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
            return self._lost(form.why, form.mixes)
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

    # -- taps ---------------------------------------------------------------------------------------------------------

    def meet(self, targets: list[Tensor]) -> None:
        """Prepare the tap of a call in which parameters meet data; before it runs, as it may write in place."""
        self.inputs = self.given
        edges = Tap.edges_of(self.inputs)
        view = self._part_written() if self.in_place else None
        base = None if view is None else view._base
        if base is not None:
            edges = Tap.edges_of([*self.inputs, base])
        frame = STATE.frames[-1] if STATE.frames else None
        where = f"{frame.name}:{self._shown}" if frame else self._shown
        name = self.record.numbered((where,), where)
        bound, rule = self._bound(targets)
        if bound is not None and view is None:
            self.tap = self._leave_bound(rule, bound, name, edges, targets)
        else:
            self.tap = self._leave_general(self._general() if view is None else _FUNCTION, name, edges, targets, view)

    def _leave_general(
        self, rule: FunctionRule, name: str, edges: Any, targets: list[Tensor], view: Tensor | None
    ) -> Callable[[list[Tensor], list[Place], list[int]], None]:
        """The tap of a call that is differentiated again."""
        saved, params = rule.prepare(
            self.func, self.args, self.kwargs, _named(targets), place_of, origin_of, self.in_place
        )
        base = None if view is None else view._base
        if view is not None:
            saved |= rule.part_of_base(view)

        def leave(outputs: list[Tensor], places: list[Place], chosen: list[int]) -> None:
            if base is not None:
                outputs, places = [base], [cast("Place", place_of(base))]
            saved.update(rule.conclude(saved, outputs, places, chosen), any_rows=self.any_rows)
            tap = Tap(name, rule, self.func, params, self.record, saved, places[0], places)
            tap.attach(outputs, edges, self.inputs)

        return leave

    def _part_written(self) -> Tensor | None:
        """The view that is written to, if it shows a part only; what comes later depends on the whole."""
        target = self.args[0]
        base = target._base if isinstance(target, Tensor) else None
        if base is None or whole_base(target) is base:
            return None
        return target if isinstance(place_of(base), Place) else None

    def _general(self) -> FunctionRule:
        if self.kind is Kind.POINTWISE and self.name != "__setitem__":
            return _POINTWISE
        return _JOIN if self.name in JOINS else _FUNCTION

    def _bound(self, targets: list[Tensor]) -> tuple[Bound | None, Rule]:
        """The call in the form of a module that has a rule, if it has one."""
        rule = function_rule(self.func)
        if rule is None:
            return None, _FUNCTION
        bound = rule.bind(self.func, self.args, self.kwargs)
        if bound is None:
            return None, rule
        params = [p for p in bound.params.values() if isinstance(p, Tensor)]
        fits_all = all(any(t is p for p in params) for t in targets)
        if not fits_all or any(place_of(p) is not None for p in params):
            return None, rule
        inputs = list(tensors_in(bound.args))
        if not any(place_of(t) is not None for t in inputs) or rule.refuse(bound.module):
            return None, rule
        if any(t.is_complex() for t in (*params, *inputs)):  # rules are written for real numbers
            return None, rule
        return bound, rule

    def _leave_bound(
        self, rule: Rule, bound: Bound, name: str, edges: Any, targets: list[Tensor]
    ) -> Callable[[list[Tensor], list[Place], list[int]], None]:
        params = {key: p for key, p in bound.params.items() if isinstance(p, Tensor) and p.requires_grad}

        def leave(outputs: list[Tensor], places: list[Place], chosen: list[int]) -> None:
            located = rule.locate(bound.module, bound.args, {}, outputs, place_of)
            if isinstance(located, str):  # the examples are where this rule cannot have them
                self._leave_general(self._general(), name, edges, targets, None)(outputs, places, chosen)
                return
            saved = rule.capture(bound.module, bound.args, {}, outputs[0])
            place, kept = located[0], [p for p in located[1] if p is not None]
            tap = Tap(name, rule, bound.module, params, self.record, saved, place, kept)
            tap.attach(outputs, edges, self.inputs)

        return leave


def parted(output: Any) -> Any:
    """Outputs of their own: one may be computed from another inside of a call, which must not count as from outside."""
    # Copies, as a view would lose its place in the graph when it is written to.
    with quiet():
        return map_tensors(lambda t: t.clone() if t.requires_grad else t, output)


def lose(outputs: Iterable[Tensor], lost: Lost, *, meets: bool = False) -> None:
    """Mark outputs in which the examples cannot be told apart.

    A single number is what a loss is made of, and joins the examples rightly, unless they met before; anything else
    must not reach the loss.
    """
    for t in outputs:
        put(t, lost)
        if (t.numel() > 1 or lost.meets or meets) and t.grad_fn is not None:
            metadata(t.grad_fn).setdefault(LOST, lost)


def is_sparse(t: Tensor) -> bool:
    """Whether a tensor leaves out its zeros, in any layout."""
    return t.layout is not torch.strided and str(t.layout).startswith("torch.sparse")


def lost_if_sparse(record: Any, where: str, t: Tensor) -> Lost:
    """What stands for the result of a call that gives, or is given, a sparse tensor."""
    why = (
        f"{where} gives or is given a sparse tensor ({t.layout}), in which examples are not followed: make it dense "
        f"(`to_dense`, `torch.mm` for `torch.sparse.mm`), which computes the same."
    )
    return Lost(record, where, "", False, UnsupportedModuleError(why), meets=True)


def where() -> str:
    """What runs now, for messages."""
    if not STATE.frames:
        return "a part that a checkpoint repeats"
    frame = STATE.frames[-1]
    return f"`{frame.name}` ({type(frame.module).__name__})"


def _named(targets: list[Tensor]) -> dict[str, Tensor]:
    """Names of the tensors given for parameters: those in the module that runs, where it owns them."""
    own = own_parameters(STATE.frames[-1].module) if STATE.frames else {}
    names = {id(p): name for name, p in own.items() if p is not None}
    return {names.get(id(t), f"argument {number}"): t for number, t in enumerate(targets)}


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


def _is_share(factor: float, n: int) -> bool:
    """Whether a number is one over so many entries of each of n examples."""
    entries = round(1 / factor) if math.isfinite(1 / factor) else 0
    return entries > 0 and entries % n == 0 and math.isclose(1 / factor, entries, rel_tol=1e-6)


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
