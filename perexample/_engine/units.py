"""Modules whose calls are tapped as one: which calls these are, and the taps that they leave."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .._private import own_parameters
from .._tree import tensors_in, tensors_of
from ..place import Lost, Place
from ..rule import Rule, captured, told
from ..rules.generic import GenericRule, graded, is_own
from .follow import note_checkpoint
from .lost import is_sparse, lose, lost_if_sparse
from .operation import parted
from .record import Record
from .state import Frame
from .table import place_of, put
from .tap import Tap
from .walk import sees_through, tapped_only

GENERIC = GenericRule()


def may_be_opaque(module: nn.Module) -> bool:
    """Whether a module without a rule could do what operations do not show, and owns what it would do it with."""
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def unit_parameters(module: nn.Module, rule: Rule) -> dict[str, Tensor]:
    """The tensors a rule answers for that need a gradient, by their names in the module."""
    named = module.named_parameters() if isinstance(rule, GenericRule) else own_parameters(module).items()
    return {name: p for name, p in named if p is not None and p.requires_grad}


def depend_on_batch(tensors: Iterable[Tensor]) -> bool:
    for t in tensors:  # noqa: SIM110 - a generator takes twice as long
        if place_of(t) is not None:
            return True
    return False


def answers(
    rule: Rule, module: nn.Module, args: tuple, kwargs: dict, inputs: list[Tensor], record: Record | None
) -> bool:
    """Whether a call is to be tapped: parameters that do not depend on the batch meet data that does."""
    params = unit_parameters(module, rule)
    if not params or depend_on_batch(params.values()):
        return False
    tracked = False
    for t in inputs:
        if place_of(t) is not None:
            tracked = True
        elif t.requires_grad:
            return False  # parameters among the inputs: the operations inside are tapped one by one
    if kwargs:
        args, kwargs = _bound(module, args, kwargs)
    if not told(rule, "handles", type(module).__name__, module, args, kwargs):
        return False
    return tracked or (record is not None and rule.counts_rows)


def leave_opaque(frame: Frame, args: tuple, kwargs: dict, output: Any) -> Any:
    """Tap a leaf module as a whole where what it did could not be followed, as in a function of its own."""
    outputs = graded(output)
    edges = Tap.edges_of(list(tensors_in((args, kwargs))))
    if all(tapped_only(t, edges) if place_of(t) is not None else sees_through(t) for t in outputs):
        return output
    frame.rule = GENERIC
    return leave_call(GENERIC, frame, args, kwargs, output)


def leave_call(rule: Rule, frame: Frame, args: tuple, kwargs: dict, output: Any) -> Any:
    """Tap a module's outputs; returns the output to go on with."""
    module = frame.module
    inputs, results = tensors_of((args, kwargs) if kwargs else args), tensors_of(output)
    known = _known(rule, frame, args, inputs)
    if isinstance(known, Lost):
        lose(results, known)
        return output
    if kwargs:
        args, kwargs = _bound(module, args, kwargs)
    record = frame.record or known[0].space.record
    located = _located(rule, frame, args, kwargs, bool(known), results, record)
    if isinstance(located, str):
        lose(results, Lost(record, frame.called, located, "several examples" in located))
        return output
    place, places = located
    tapped = [is_own(t, inputs) for t in results]
    if not any(tapped):
        _put_all(results, places)
        return output
    saved = captured(rule, module, args, kwargs, output, frame.name, moved=bool(place.axis) or place.folded)
    if isinstance(rule, GenericRule):
        saved = saved | rule.after(module, frame.before)
    elif frame.before:
        saved = saved | frame.before
    if sum(tapped) > 1:
        output = parted(output)
        results = list(tensors_in(output))
    outputs = [t for t, own in zip(results, tapped, strict=True) if own]
    _put_all(results, places)
    note_checkpoint(record)
    kept = [p for own, p in zip(tapped, places, strict=True) if own and p is not None]
    tap = Tap(frame.name, rule, module, unit_parameters(module, rule), record, saved, place, kept)
    tap.attach(outputs, Tap.edges_of(inputs), inputs)
    if len(outputs) < len(results) and not isinstance(rule, GenericRule):
        shown = [p is not None and _may_require_grad(t) for t, p in zip(results, places, strict=True)]
        tap.leave_out([(t, own) for t, own, one in zip(results, tapped, shown, strict=True) if one])
    return output


def _known(rule: Rule, frame: Frame, args: tuple, inputs: list[Tensor]) -> list[Place] | Lost:
    """Where the inputs hold the examples; or what stands for the result of the call, as one of them does not tell."""
    known: list[Place] = []
    for t in inputs:
        place = place_of(t)
        if isinstance(place, Lost):
            if any(t is order for order in rule.orders(args)):
                continue
            return place
        if place is not None and is_sparse(t) and not isinstance(rule, GenericRule):
            return lost_if_sparse(frame.record or place.space.record, frame.called, t)
        if place is not None:
            known.append(place)
    return known


def _put_all(tensors: Any, places: Sequence[Place | None]) -> None:
    for t, place in zip(tensors, places, strict=True):
        if place is not None:
            put(t, place)


def _located(
    rule: Rule, frame: Frame, args: tuple, kwargs: dict, tracked: bool, outputs: list[Tensor], record: Record
) -> tuple[Place, Sequence[Place | None]] | str:
    """Where the call holds the rows, and that the outputs are of the sizes that this means."""
    if not tracked:  # bags of ids: one row of the output each
        if record.pending:
            record.settle(outputs[0].shape[0])
        if record.space.rows != outputs[0].shape[0]:
            return f"gives {outputs[0].shape[0]} rows for {record.space.rows} examples"
        rows = Place(record.space, 0)
        return rows, [rows] * len(outputs)
    located = rule.locate(frame.module, args, kwargs, outputs, place_of)
    if isinstance(located, str):
        return located
    for t, place in zip(outputs, located[1], strict=True):
        if place is None or (axis := place.axis) is None:
            continue
        if t.dim() <= axis or t.shape[axis] != place.size:
            return f"gives an output of shape {list(t.shape)}, in which axis {axis} does not hold the examples"
    return located


def _bound(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments in the order in which ``forward`` names them, however they were passed."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    return bound.args, bound.kwargs


def _may_require_grad(t: Tensor) -> bool:
    """Whether there could be a gradient, with other things frozen."""
    return t.is_floating_point() or t.is_complex()
