"""One call of a torch function that is given data: what it writes to, and its tap where parameters meet data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .._arguments import shown
from .._looks import blind
from .._private import inside_functorch, own_parameters, version, whole_base, without_functorch
from .._tree import map_tensors, tensors_in
from ..errors import RuleContractError
from ..place import Lost, Place
from ..rule import Bound, Rule, captured, function_rule, told
from ..rules.function import JOINS, FunctionRule, JoinRule, PointwiseRule
from .kinds import Kind, names
from .lost import lose, where
from .placing import Placing
from .state import STATE, quiet
from .table import origin_of, place_of, put, wrote
from .tap import Tap

_POINTWISE, _JOIN, _FUNCTION = PointwiseRule(), JoinRule(), FunctionRule()
_TURNS = names("squeeze_ unsqueeze_ transpose_ swapaxes_ swapdims_ t_")  # only change how a tensor shows its memory
_STACKS = names("stack cat concat concatenate hstack")
_TIMES = names("mul rmul imul multiply")


class Operation(Placing):
    """A call, before and after it runs."""

    tap: Callable[[list[Tensor], list[Place], list[int]], None] | None = None
    inputs: list[Tensor]
    _places_early: Callable[[list[Tensor]], list[Any]] | None = None
    _before: Sequence[tuple[Tensor, Any]] = ()
    _counted: Sequence[tuple[Tensor, int]] = ()

    def prepare(self) -> None:
        """Note what the call may write to."""
        self._places_early = self._early()
        self._before = [(t, place_of(t)) for t in self._written()]
        self._counted = self._statistics()
        if self.in_place and self.kind is Kind.RESHAPE:
            self._shape = self.args[0].shape

    def _refuse_transformed(self) -> None:
        """What a transform makes of data and parameters comes out of it as if it were of parameters alone."""
        reason = (
            f"in {where()} is given data and what needs a gradient inside of torch.func (vmap, grad and others), where "
            f"nothing can be followed. Do without the transform, or register the generic rule for the module around "
            f"it, register_rule(ThatClass)(GenericRule)"
        )
        self.record.refused.append((self._shown, reason))
        STATE.hints[f"torch.func (vmap, grad, jacrev and others) in {where()}"] = None

    def conclude(self, out: Any) -> Any:
        """Note the places of what it gave, and leave its tap; returns what to go on with."""
        early, before = self._places_early, self._before
        for t, count in self._counted:
            if version(t) != count:
                self.record.wrote = True
                put(t, self._lost("writes into a tensor that all examples share", True))
        outputs = [self.args[0]] if self.name == "__setitem__" else list(tensors_in(out))
        outputs = outputs or list(tensors_in(self.kwargs.get("out")))  # of which several are not returned
        if not outputs:
            return out
        if any(inside_functorch(t) for t in outputs):
            if any(without_functorch(t).requires_grad for t in outputs):
                self._refuse_transformed()
            return out
        if self.lost is not None:
            handed_on = self._handed_on(outputs)
            self._conclude_lost(self.lost, [t for t in outputs if id(t) not in handed_on])
            return out
        places = self._unpacked(early(outputs) if early is not None else self._places(outputs), outputs)
        handed_on = self._handed_on(outputs)
        if handed_on:
            places = [place_of(t) if id(t) in handed_on else place for t, place in zip(outputs, places, strict=True)]
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
        if leave is not None:
            own = [t.requires_grad and t.grad_fn is not None and id(t) not in handed_on for t in outputs]
            chosen = [i for i, is_own in enumerate(own) if is_own]
            if any(isinstance(places[i], Lost) for i in chosen):
                return out
            if len(chosen) > 1:
                out = parted(out)
                outputs = list(tensors_in(out))
                for i in chosen:
                    put(outputs[i], places[i])
            if chosen:
                leave([outputs[i] for i in chosen], [places[i] for i in chosen], chosen)
        return out

    def _conclude_lost(self, lost: Lost, outputs: list[Tensor]) -> None:
        """What comes of lost arguments is lost too, where it is written to as well."""
        numbers = self._are_numbers()
        several = not numbers and any(isinstance(place, Lost) and t.numel() > 1 for t, place in self.tracked)
        if self._scales():
            lost = self._lost("mixes examples: it multiplies one number with another that all change", True)
            several = True
        put_beside = self.name in _STACKS or (self.kind is Kind.POINTWISE and lost.beside)
        beside = numbers and put_beside and not self._before
        lost = lost.whose_entries_are(beside) if beside != lost.beside else lost
        lose(outputs, lost, meets=several)
        for t, place in self._before:
            self.record.wrote |= place is None
            wrote(t, place, lost)

    def _are_numbers(self) -> bool:
        """Whether all that it is given are single numbers of a loss, or such that were put beside each other."""
        return all(
            isinstance(place, Lost) and t.requires_grad and (t.numel() == 1 or place.beside)
            for t, place in self.tracked
        )

    def _scales(self) -> bool:
        """Whether it multiplies a loss with a single number that was found out from several examples."""
        if self.name.strip("_") not in _TIMES or any(t.numel() != 1 for t in self.given) or blind():
            return False
        factors = [float(t) for t, place in self.tracked if isinstance(place, Lost) and not t.requires_grad]
        n = self.record.space.rows
        return len(factors) < len(self.given) and not all(f == 0 or f == 1 or _is_share(f, n) for f in factors)

    def _handed_on(self, outputs: list[Tensor]) -> set[int]:
        """The arguments that the call returns as they were, each for itself, as `torch.atleast_1d` does."""
        if self.kind is not Kind.OTHER or self.in_place or len(outputs) < 2:
            return set()
        return {id(t) for t in tensors_in(self.args)} & {id(t) for t in outputs}

    def _places(self, outputs: list[Tensor]) -> list[Any]:
        """Of a function whose rows no shape tells, as of bags of ids, those that its rule knows."""
        rule = function_rule(self.func)
        bound = self._in_module_form(rule) if rule is not None and rule.counts_rows else None
        if rule is None or bound is None:
            return super()._places(outputs)
        located = rule.locate(bound.module, bound.args, {}, outputs, place_of)
        if isinstance(located, str):
            return [self._lost(located, "several examples" in located)] * len(outputs)
        return list(located[1])

    def _statistics(self) -> list[tuple[Tensor, int]]:
        """Running statistics, and tables with a ``max_norm``, that the call may change; and how often they were."""
        table = self.name in ("embedding", "embedding_bag")
        if not table and self.name not in ("batch_norm", "instance_norm"):
            return []
        tensors = tensors_in((self.args[1:], self.kwargs))
        return [(t, version(t)) for t in tensors if (table or not t.requires_grad) and place_of(t) is None]

    def _written(self) -> list[Tensor]:
        """The tensors that the call writes into."""
        into = [self.args[0]] if self.in_place and self.args and self.name not in _TURNS else []
        return [t for t in tensors_in((into, self.kwargs.get("out"))) if t.layout == torch.strided]

    def _unpacked(self, places: list[Any], outputs: list[Tensor]) -> list[Any]:
        """The sizes that packing returns belong to nobody."""
        return places + [None] * (len(outputs) - len(places))

    def _early(self) -> Callable[[list[Tensor]], list[Any]] | None:
        """What moves entries into a tensor must be asked before it writes there."""
        if not (self.in_place and self.kind is Kind.MOVE) or self.lost is not None:
            return None
        if not self._moves_what_is_owned():
            return None
        args = (self.args[0].detach().clone(), *self.args[1:])
        known = place_of(self.args[0])
        if known is not None:
            put(args[0], known)
        places = self._moved(args, [args[0]])
        return lambda outputs: places

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
        called = f"{frame.name}:{self._shown}" if frame else self._shown
        name = self.record.numbered((called,), called)
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
        bound = self._in_module_form(rule)
        if bound is None:
            return None, rule
        params = [p for p in bound.params.values() if isinstance(p, Tensor)]
        fits_all = all(any(t is p for p in params) for t in targets)
        if not fits_all or any(place_of(p) is not None for p in params):
            return None, rule
        inputs = list(tensors_in(bound.args))
        if not any(place_of(t) is not None for t in inputs) or told(rule, "refuse", f"`{self.name}`", bound.module):
            return None, rule
        if any(t.is_complex() for t in (*params, *inputs)):  # rules are written for real numbers
            return None, rule
        return bound, rule

    def _in_module_form(self, rule: Rule) -> Bound | None:
        bound = told(rule, "bind", f"`{self.name}`", self.func, self.args, self.kwargs)
        if bound is not None and not isinstance(bound, Bound):
            raise RuleContractError(
                f"{type(rule).__name__}.bind for `{self.name}` returned {shown(bound)}; return a "
                f"Bound(options, inputs, params), or None for a call that has another form."
            )
        return bound

    def _leave_bound(
        self, rule: Rule, bound: Bound, name: str, edges: Any, targets: list[Tensor]
    ) -> Callable[[list[Tensor], list[Place], list[int]], None]:
        params = {key: p for key, p in bound.params.items() if isinstance(p, Tensor) and p.requires_grad}

        def leave(outputs: list[Tensor], places: list[Place], chosen: list[int]) -> None:
            located = rule.locate(bound.module, bound.args, {}, outputs, place_of)
            if isinstance(located, str):  # the examples are where this rule cannot have them
                self._leave_general(self._general(), name, edges, targets, None)(outputs, places, chosen)
                return
            place = located[0]
            elsewhere = bool(place.axis) or place.folded
            saved = captured(rule, bound.module, bound.args, {}, outputs[0], name, moved=elsewhere)
            kept = [p for p in located[1] if p is not None]
            tap = Tap(name, rule, bound.module, params, self.record, saved, place, kept)
            tap.attach(outputs, edges, self.inputs)

        return leave


def parted(output: Any) -> Any:
    """Outputs of their own: one may be computed from another inside of a call, which must not count as from outside."""
    # Copies, as a view would lose its place in the graph when it is written to.
    with quiet():
        return map_tensors(lambda t: t.clone() if t.requires_grad else t, output)


def _named(targets: list[Tensor]) -> dict[str, Tensor]:
    """Names of the tensors given for parameters: those in the module that runs, where it owns them."""
    own = own_parameters(STATE.frames[-1].module) if STATE.frames else {}
    names = {id(p): name for name, p in own.items() if p is not None}
    return {names.get(id(t), f"argument {number}"): t for number, t in enumerate(targets)}


def _is_share(factor: float, n: int) -> bool:
    """Whether a number is one over so many entries of each of n examples."""
    entries = round(1 / factor) if math.isfinite(1 / factor) else 0
    return entries > 0 and entries % n == 0 and math.isclose(1 / factor, entries, rel_tol=1e-6)
