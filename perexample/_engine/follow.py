"""The forward side of operations: which tensors depend on the batch, where they hold the examples, and taps.

While the outermost forward of an extended model runs, every torch function outside of modules with a rule passes here.
A tensor that was computed from the inputs depends on the batch. One that needs a gradient and does not depend on the
batch was computed from parameters alone. A function that is given both is a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._private import (
    dispatched,
    follow_recomputation,
    function_modes,
    inside_functorch,
    metadata,
    own_parameters,
    saves_otherwise,
    undispatched,
    version,
    whole_base,
    without_dispatch,
)
from .._tree import PLAIN, map_tensors, tensors_in
from ..place import Lost, Place, Space, broadcast, reshaped
from ..rule import Bound, Rule, function_rule
from ..rules.function import JOINS, FunctionRule, JoinRule, PointwiseRule
from .kinds import TRAITS, Kind, Traits, permuted_axis, traits_of
from .oracle import Form, fits, form_key, forms_of
from .owners import INTO, MOVERS, moved, values_of
from .state import STATE, quiet, resumed
from .table import known_place, origin_of, place_of, put, put_all_on_edges, put_on_edge, put_origin, wrote
from .tap import LOST, Tap

_POINTWISE, _JOIN, _FUNCTION = PointwiseRule(), JoinRule(), FunctionRule()
_FORMS: dict[Any, list[Form]] = {}
_MOST_FORMS = 20_000


_OF_THE_FIRST = (Kind.SAME, Kind.RESHAPE, Kind.EXPAND, Kind.PERMUTE)  # other tensors only say to what shape or type


class Follow(TorchFunctionMode):
    """Follows the operations of one outermost forward.

    Args:
        repeated: The forward a part of which a checkpoint runs again. Inside of another checkpoint its tensors come
            back as other objects, which are known by the memory or the place in the graph that they share.
    """

    ended = False

    def __init__(self, repeated: Any = None) -> None:
        """Nothing is under way yet."""
        super().__init__()
        self.repeated, self.alone = repeated, False

    def __enter__(self) -> Follow:
        """See whether the modes below only wait for a backward."""
        self.alone = all(getattr(mode, "waits_for_backward", False) for mode in function_modes())
        super().__enter__()
        return self

    def _run(self, func: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function, past the modes below if none of them has anything to do with it."""
        if not self.alone or (types and any(kind is not Tensor for kind in types)):
            return func(*args, **kwargs)
        with undispatched():
            return func(*args, **kwargs)

    def _silent(self, func: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function inside of a module that a rule answers for, which may compute some functions itself."""
        rule = None if STATE.quiet else STATE.frames[-1].rule
        if rule is not None and rule.computes and func in rule.computes:
            with undispatched():
                note_checkpoint(STATE.frames[-1].record or self.repeated)
                out = rule.compute(func, args, kwargs)
            if out is not None:
                return out
        return self._run(func, types, args, kwargs)

    def _plainly(self, traits: Traits, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function that is given no tensors but those that hold rows, and writes nowhere.

        Returns:
            What it gave; ``None`` if it is another function.
        """
        with undispatched():
            tracked = _all_known(args, kwargs)
            if tracked is None:
                return None
            out = func(*args, **kwargs)
            if type(out) is Tensor and not inside_functorch(out):
                place = simple_place(traits, args, kwargs, tracked, out)
                if place is not None:
                    put(out, place)
                    return out
            return _Operation(func, traits, args, kwargs, tracked).conclude(out)

    def leave(self) -> None:
        """End, also if something above on the stack of modes was not taken off by its owner."""
        self.ended = True
        forget_followers()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the function; note what its result depends on, and leave a tap where parameters meet data."""
        kwargs = kwargs or {}
        traits = TRAITS.get(func) or traits_of(func)
        if traits.kind is Kind.IGNORED and traits.plain:
            return self._run(func, types, args, kwargs)
        if self.ended or traits.kind is Kind.IGNORED or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if STATE.silent():
            return self._silent(func, types, args, kwargs)
        if traits.plain and self.alone:
            out = self._plainly(traits, func, args, kwargs)
            if out is not None:
                return out
        return self._followed(traits, func, types, args, kwargs)

    def _followed(self, traits: Traits, func: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        """Run a function of anything."""
        kind = traits.kind
        with undispatched():
            if self.repeated is not None:
                _recognise((args, kwargs), self.repeated)
            tracked, targets = _scanned(kind, args, kwargs)
        if not tracked:
            return _underived(self._run(func, types, args, kwargs), traits, args, targets)
        if kind is Kind.COMPOSITE:
            with self:
                return without_dispatch(func)(*args, **kwargs)
        if kind is Kind.SET:
            out = self._run(func, types, args, kwargs)
            put(args[0], tracked[0][1])
            return out
        with undispatched():
            call = _Operation(func, traits, args, kwargs, tracked)
            if targets and torch.is_grad_enabled():
                call.meet(targets)
            call.prepare()
        out = self._run(func, types, args, kwargs)
        with undispatched():
            out = call.conclude(out)
            if call.record.checkpointed:  # a checkpoint inside of this one hands its inputs on as other objects
                for t in tensors_in(out):
                    put_on_edge(t)
        return out


def forget_followers() -> None:
    """Take ended followers off the stack of modes, as far as they are on top."""
    modes = function_modes()
    while modes and isinstance(modes[-1], Follow) and (modes[-1].ended or not STATE.frames):
        modes[-1].ended = True
        modes.pop().__exit__(None, None, None)
    for mode in modes:
        if isinstance(mode, Follow) and not STATE.frames:
            mode.ended = True


def _all_known(args: tuple, kwargs: dict) -> list[tuple[Tensor, Place]] | None:
    """The tensors among arguments with their places, if all hold rows, and all else are numbers and names."""
    tracked: list[tuple[Tensor, Place]] = []
    for value in args:
        kind = type(value)
        if kind is Tensor:
            place = known_place(value)
            if type(place) is not Place:
                return None
            tracked.append((value, place))
        elif kind not in PLAIN and not ((kind is tuple or kind is list) and PLAIN.issuperset(map(type, value))):
            return None
    if not tracked or (kwargs and not PLAIN.issuperset(map(type, kwargs.values()))):
        return None
    space = tracked[0][1].space
    return None if space.rows <= 1 or space.record.checkpointed else tracked


def _scanned(kind: Kind, args: tuple, kwargs: dict) -> tuple[list[tuple[Tensor, Any]], list[Tensor]]:
    """The arguments of a call that depend on the batch, and those computed from parameters."""
    tracked: list[tuple[Tensor, Any]] = []
    targets: list[Tensor] = []
    if kind in _OF_THE_FIRST:
        _scan(args[:1], tracked, targets)
    elif kind is Kind.FILL or kind is Kind.SET:
        _scan((*args[1:], *kwargs.values()), tracked, targets)
    else:
        _scan(args, tracked, targets)
        if kwargs:
            _scan(kwargs.values(), tracked, targets)
    if tracked and kind is not Kind.POINTWISE and kind is not Kind.FILL:
        tracked = [(t, place) for t, place in tracked if not _one_number(t, place)]
    return tracked, targets


def _scan(values: Iterable[Any], tracked: list[tuple[Tensor, Any]], targets: list[Tensor]) -> None:
    """Sort tensors into those that depend on the batch, and those computed from parameters."""
    for value in values:
        if isinstance(value, Tensor):
            place = place_of(value)
            if place is not None:
                tracked.append((value, place))
            elif value.requires_grad and not any(value is t for t in targets):
                targets.append(value)
        elif isinstance(value, (tuple, list)):
            _scan(value, tracked, targets)
        elif isinstance(value, dict):
            _scan(value.values(), tracked, targets)


def _underived(out: Any, traits: Traits, args: tuple, targets: list[Tensor]) -> Any:
    """An operation without data; remember what only repeats a tensor, so that a gradient need not be spread."""
    if targets and isinstance(out, Tensor) and out.requires_grad:
        source = args[0] if args else None
        if isinstance(source, Tensor) and (
            traits.kind is Kind.EXPAND or (traits.name == "repeat" and _only_ones(source, out))
        ):
            put_origin(out, origin_of(source))
    return out


def _only_ones(source: Tensor, out: Tensor) -> bool:
    """Whether only axes of size 1 were repeated, so that it is the same as expanding."""
    padded = (1,) * (out.dim() - source.dim()) + tuple(source.shape)
    return all(a == b or a == 1 for a, b in zip(padded, out.shape, strict=True))


def parted(output: Any) -> Any:
    """Outputs of their own: one may be computed from another inside of a call, which must not count as from outside."""
    # Copies, as a view would lose its place in the graph when it is written to.
    with quiet():
        return map_tensors(lambda t: t.clone() if t.requires_grad else t, output)


def lose(outputs: Iterable[Tensor], lost: Lost) -> None:
    """Mark outputs in which the examples cannot be told apart.

    A single number is what a loss is made of, and joins the examples rightly; anything else must not reach the loss.
    """
    for t in outputs:
        put(t, lost)
        if t.numel() > 1 and t.grad_fn is not None:
            metadata(t.grad_fn).setdefault(LOST, lost)


def _where() -> str:
    if not STATE.frames:
        return "a part that a checkpoint repeats"
    frame = STATE.frames[-1]
    return f"`{frame.name}` ({type(frame.module).__name__})"


def simple_place(
    traits: Traits, args: tuple, kwargs: dict, tracked: list[tuple[Tensor, Any]], out: Tensor
) -> Place | None:
    """The place of an operation's only result, where that needs no trial."""
    if traits.name in _BESIDE:
        return _beside(args, kwargs, tracked, out)
    kind = traits.kind
    x, place = tracked[0]
    if kind is Kind.POINTWISE:
        if len(tracked) == 1 and x.shape == out.shape:
            return place
        return broadcast([(known, t.shape) for t, known in tracked], out.shape)
    if not args or x is not args[0]:
        return None
    if kind is Kind.SAME:
        return place if x.shape == out.shape else None
    if kind is Kind.RESHAPE:
        return reshaped(place, x.shape, out.shape) if out.numel() == x.numel() else None
    if kind is Kind.PERMUTE:
        return place.at(permuted_axis(traits.name, args, kwargs, place.axis))
    if kind is Kind.EXPAND:
        axis = place.axis + out.dim() - x.dim()
        return place.at(axis) if out.shape[axis] == place.size else None
    return None


_BESIDE = ("cat", "concat", "concatenate")


def _beside(args: tuple, kwargs: dict, tracked: list[tuple[Tensor, Any]], out: Tensor) -> Place | None:
    """Tensors that hold the same rows on the same axis, put beside each other along another one."""
    first = tracked[0][1]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    alike = all(place.axis == first.axis and place.agrees(first) for _, place in tracked)
    if not alike or not isinstance(dim, int) or dim % out.dim() == first.axis:
        return None
    return first if all(t.dim() == out.dim() for t, _ in tracked) else None


class _Operation:
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
            if not any(_chooses_across(t, place, values) for t, place in indices):
                kept = [(t, place) for t, place in tracked if any(t is v for v in values)]
                tracked = self.tracked = kept or tracked
        self.lost = next((place for _, place in tracked if isinstance(place, Lost)), None)
        self.record = (self.lost or tracked[0][1].space).record
        self.tap: Callable[[list[Tensor], list[Place], list[int]], None] | None = None
        self.inputs: list[Tensor] = []
        self.any_rows = self.kind is Kind.POINTWISE  # whether the call does the same on any number of rows
        self._places_early: Callable[[list[Tensor]], list[Any]] | None = None
        self._before: list[tuple[Tensor, Any]] = []
        self._counted: list[tuple[Tensor, int]] = []

    # -- running it ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Note what the call may write to."""
        self._places_early = self._early()
        self._before = [(t, place_of(t)) for t in self._written()]
        self._counted = self._statistics()

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
            lose(outputs, self.lost)
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
            place = Place(space, None)
            return [place] * len(outputs)
        if len(outputs) == 1:
            simple = simple_place(self.traits, self.args, self.kwargs, self.tracked, outputs[0])
            if simple is not None:
                return [simple]
        if self._moves_by_data():
            return self._moved(self.args, outputs)
        return self._tried(outputs, space.rows)

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
        if self.kind is Kind.MOVE or self.name in MOVERS:
            return self._moved(self.args, outputs)
        made = next((place.space.made for _, place in self.tracked if place.space.made), "")
        by = f" (from {made})" if made else ""
        why = f"mixes examples: it is given rows of different ones, or in different orders{by}"
        return [self._lost(why, True)] * len(outputs)

    def _moves_by_data(self) -> bool:
        """Whether the entries' new order may differ from call to call."""
        if self.kind is not Kind.MOVE and not (self.name == "__getitem__" and _has_index(self.args[1])):
            return False
        return any(place_of(t) is not None for t in values_of(self.func, self.args, self.kwargs))

    def _moved(self, args: tuple, outputs: list[Tensor]) -> list[Any]:
        with torch.no_grad(), dispatched():
            try:
                places = moved(self.func, args, self.kwargs, outputs, self.record.space, self._called())
            except Exception:  # noqa: BLE001 - whatever an operation raises on integers
                places = [None] * len(outputs)
        return [p or self._lost("leaves no axis that tells the examples apart", False) for p in places]

    def _tried(self, outputs: list[Tensor], rows: int) -> list[Any]:
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

    def _called(self) -> str:
        return f"`{self._shown}` in {_where()}"

    @property
    def _shown(self) -> str:
        """How the operation is called in names and messages."""
        return self.name.strip("_.") or "operation"

    # -- taps ---------------------------------------------------------------------------------------------------------

    def meet(self, targets: list[Tensor]) -> None:
        """Prepare the tap of a call in which parameters meet data; before it runs, as it may write in place."""
        if self.lost is not None:
            return
        self.inputs = [t for t, _ in self.tracked]
        edges = Tap.edges_of(self.inputs)
        view = self._part_written() if self.in_place else None
        base = None if view is None else view._base
        if base is not None:
            edges = Tap.edges_of([*self.inputs, base])
        frame = STATE.frames[-1] if STATE.frames else None
        where = f"{frame.name}:{self._shown}" if frame else self._shown
        name = self.record.numbered((where,), where)
        note_checkpoint(self.record)
        bound, rule = self._bound(targets)
        if bound is not None and view is None:
            self.tap = self._leave_bound(rule, bound, name, edges)
            return
        rule = self._general() if view is None else _FUNCTION
        saved, params = rule.prepare(
            self.func, self.args, self.kwargs, _named(targets), place_of, origin_of, self.in_place
        )
        if view is not None:
            saved |= rule.part_of_base(view)

        def leave(outputs: list[Tensor], places: list[Place], chosen: list[int]) -> None:
            if base is not None:
                outputs, places = [base], [cast("Place", place_of(base))]
            saved.update(rule.conclude(saved, outputs, places, chosen), any_rows=self.any_rows)
            tap = Tap(name, rule, self.func, params, self.record, saved, places[0], places)
            tap.attach(outputs, edges, self.inputs)

        self.tap = leave

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
        return bound, rule

    def _leave_bound(
        self, rule: Rule, bound: Bound, name: str, edges: Any
    ) -> Callable[[list[Tensor], list[Place], list[int]], None]:
        params = {key: p for key, p in bound.params.items() if isinstance(p, Tensor) and p.requires_grad}

        def leave(outputs: list[Tensor], places: list[Place], chosen: list[int]) -> None:
            located = rule.locate(bound.module, bound.args, {}, outputs, place_of)
            if isinstance(located, str):
                lose(outputs, self._lost(located, False))
                return
            saved = rule.capture(bound.module, bound.args, {}, outputs[0])
            place, kept = located[0], [p for p in located[1] if p is not None]
            tap = Tap(name, rule, bound.module, params, self.record, saved, place, kept)
            tap.attach(outputs, edges, self.inputs)

        return leave


def note_checkpoint(record: Any) -> None:
    """If a checkpoint is under way, see to it that what it runs again will be followed."""
    if saves_otherwise() and follow_recomputation(partial(repeating, record)) and not record.checkpointed:
        record.checkpointed = True
        put_all_on_edges()


@contextmanager
def repeating(record: Any) -> Iterator[None]:
    """Around what a checkpoint runs again: operations must save the same tensors as they did before."""
    with resumed(), dispatched(), Follow(record):
        yield


def _recognise(tree: Any, record: Any) -> None:
    """Find the inputs of a forward again."""
    for t in tensors_in(tree):
        if t.requires_grad or place_of(t) is not None:
            continue
        for known, place in record.inputs():
            if t is known or (t.data_ptr() == known.data_ptr() and t.shape == known.shape and t.dtype == known.dtype):
                put(t, place)


def _named(targets: list[Tensor]) -> dict[str, Tensor]:
    """Names of the tensors given for parameters: those in the module that runs, where it owns them."""
    own = own_parameters(STATE.frames[-1].module) if STATE.frames else {}
    names = {id(p): name for name, p in own.items() if p is not None}
    return {names.get(id(t), f"argument {number}"): t for number, t in enumerate(targets)}


def _one_number(t: Tensor, place: Any) -> bool:
    """Whether a tensor is a single whole number found out from several examples, and as good as a Python number."""
    return isinstance(place, Lost) and t.numel() == 1 and not t.is_floating_point() and t.dtype != torch.bool


def _chooses_across(index: Tensor, place: Any, values: list[Tensor]) -> bool:
    """Whether what an index chooses of one example depends on others; the order of all entries may."""
    if not (isinstance(place, Lost) and place.mixes):
        return False
    if index.dtype == torch.bool or index.is_floating_point() or not values:
        return True
    everything = torch.arange(index.numel(), device=index.device)
    return index.numel() not in values[0].shape or not torch.equal(index.flatten().sort().values, everything)


def _has_index(index: Any) -> bool:
    """Whether an index chooses entries one by one, rather than by slices and numbers."""
    if isinstance(index, tuple):
        return any(_has_index(part) for part in index)
    return isinstance(index, (Tensor, list))
