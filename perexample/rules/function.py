"""Rules for torch functions that are given parameters, or tensors computed from parameters alone, besides data.

The generic one differentiates the single call again: row by row where a row of the result depends on that row of the
data only, else on the whole batch with the gradient of the result masked to one row at a time, which assumes nothing
but the rows of the result. Functions that act elementwise, or put tensors beside each other, have cheaper ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Size, Tensor
from torch.func import vjp, vmap

from .._looks import holds
from .._norms import BLOCK
from .._tree import map_tensors, tensors_in
from .._vjp import pulled_back
from ..place import Place, widened
from ..rule import Call, Rule, at_least_float32
from ..terms import Dense, Term, combine
from ..terms.placed import Placed, merged
from .generic import autocast_state, drew, random_state, restored, rows_instead, spoiled_rows, unspoiled

JOINS = frozenset(("cat", "concat", "concatenate", "stack"))
_ADDS = frozenset(
    ("add", "add_", "sub", "sub_", "subtract", "subtract_", "__iadd__", "__isub__", "__add__", "__radd__", "__sub__")
)


class Slot:
    """Stands for a parameter in the saved arguments of a call."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        """The name by which `Call.params` has it."""
        self.name = name


class FunctionRule(Rule):
    """Any torch function: the one call is differentiated again, for each row."""

    batched = ()
    own_axes = True

    def positions(self, module: Any) -> bool:
        """What is folded around the rows belongs to them."""
        return True

    def prepare(
        self,
        function: Callable,
        args: tuple,
        kwargs: dict,
        targets: Mapping[str, Tensor],
        place_of: Callable[[Tensor], Any],
        origin_of: Callable[[Tensor], Tensor],
        in_place: bool,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is to be saved of a call, before it runs.

        Args:
            function: The function.
            args: Its arguments.
            kwargs: Its keyword arguments.
            targets: The tensors among them whose gradients are wanted, by name.
            place_of: Gives the `Place` of a tensor.
            origin_of: Gives the tensor that one is expanded from, if it is.
            in_place: Whether the function writes into its first argument.

        Returns:
            What to save, and the tensors whose gradients are wanted by name.
        """
        names = {id(t): name for name, t in targets.items()}
        into = args[0] if in_place and args else None  # its place in the graph will be that of the result
        params = {name: t.clone() if t is into else self.target(t, origin_of) for name, t in targets.items()}
        first = next(iter(tensors_in(args)), None) if in_place and self.keeps_values(function, args, kwargs) else None

        def part(t: Tensor) -> Any:
            if id(t) in names:
                return Slot(names[id(t)])
            if not self.keeps_values(function, args, kwargs):
                return t.new_empty(0)
            return t.detach().clone() if t is first else t

        known = [place_of(t) for t in tensors_in((args, kwargs)) if id(t) not in names]
        saved: dict[str, Any] = {"arguments": map_tensors(part, (args, kwargs)), "places": known, "in_place": in_place}
        saved["before"] = self.random_state(args, kwargs)
        return saved, params

    def part_of_base(self, view: Tensor) -> dict[str, Any]:
        """What to save of a view that shows a part of its base, and is written to: the base, and which part it is."""
        base = view._base
        assert base is not None
        part = (list(view.shape), list(view.stride()), view.storage_offset() - base.storage_offset())
        return {"base": base.detach().clone(memory_format=torch.preserve_format), "part": part}

    def target(self, t: Tensor, origin_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The tensor whose gradient is computed for one of the arguments."""
        return t

    def keeps_values(self, function: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether the data is needed, and not only its shape."""
        return True

    def random_state(self, args: tuple, kwargs: dict) -> Any:
        """State of the random generators before the call."""
        return random_state(list(tensors_in((args, kwargs))))

    def conclude(
        self, saved: Mapping[str, Any], outputs: Sequence[Tensor], places: Sequence[Place], chosen: Sequence[int]
    ) -> dict[str, Any]:
        """What is to be saved after the call: the rows of its outputs, and the random state if it drew numbers."""
        before = saved["before"]
        after = self.random_state((list(outputs),), {}) if before else before
        redrawn = bool(before) and drew(before, after)
        kind = outputs[0].device.type
        return {
            "before": None, "rng": before if redrawn else None, "out_places": list(places), "chosen": list(chosen),
            "shapes": [t.shape for t in outputs], "autocast": autocast_state(kind),
        }  # fmt: skip

    def grad_batch(self, call: Call, g: Any) -> dict[str, Tensor]:
        """Row by row if that is the same, else masked."""
        upstream = list(g) if isinstance(g, tuple) else [g]
        if call.n > 1 and call.saved["any_rows"] and not call.saved["in_place"] and not call.saved["rng"]:
            try:
                return self._sliced(call, upstream)
            except Exception:  # noqa: BLE001 - vmap refuses some functions, others need the whole batch: masks are exact
                pass
        return self._masked(call, upstream)

    def _run(self, call: Call, params: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The graded outputs of the call for other tensors."""
        remaining = iter(tensors)
        filled = map_tensors(lambda _: next(remaining), call.saved["arguments"])
        args, kwargs = map_tensors(lambda slot: params[slot.name], filled, Slot)
        if "part" in call.saved:
            base = call.saved["base"].clone()
            args = (base.as_strided(*call.saved["part"]), *args[1:])
        elif call.saved["in_place"]:
            args = (map_tensors(torch.clone, args[0]), *args[1:])
        with torch.autocast(**call.saved["autocast"]):
            result = call.module(*args, **kwargs)
        if "part" in call.saved:
            return [base]
        outputs = list(tensors_in(args[0] if result is None else result))
        return [outputs[i] for i in call.saved["chosen"]]

    def _sliced(self, call: Call, upstream: list[Tensor]) -> dict[str, Tensor]:
        """One vmap over the rows of the call's vjp."""
        tensors, places = list(tensors_in(call.saved["arguments"])), call.saved["places"]
        rows = [t if place is None else place.sliced(t) for t, place in zip(tensors, places, strict=True)]
        cotangents = [p.sliced(g) for p, g in zip(call.saved["out_places"], upstream, strict=True)]
        params = {name: at_least_float32(b.detach()) for name, b in call.params.items()}

        def one(row: tuple[Tensor, ...], gs: tuple[Tensor, ...]) -> dict[str, Tensor]:
            outputs, pull = vjp(lambda p: tuple(self._run(call, p, row)), params)[:2]
            if [o.shape for o in outputs] != [g.shape for g in gs]:
                raise ValueError("one row gives something else than its part of the batch")
            return pull(tuple(g.to(o.dtype) for g, o in zip(gs, outputs, strict=True)))[0]

        dims = (tuple(None if place is None else 0 for place in places), 0)
        with torch.enable_grad():
            return vmap(one, in_dims=dims, randomness="error")(tuple(rows), tuple(cotangents))

    def _masked(self, call: Call, upstream: list[Tensor]) -> dict[str, Tensor]:
        """The whole batch once more, pulled back with the gradient of all rows but one set to zero."""
        tensors = list(tensors_in(call.saved["arguments"]))
        outputs, found = self._one_at_a_time(call, upstream, tensors)
        if all(holds(rows.isfinite()) for rows in found.values()):
            return found
        pairs = list(zip(call.saved["places"], tensors, strict=True))
        pairs += zip(call.saved["out_places"] * 2, [*outputs, *upstream], strict=True)
        spoiled = spoiled_rows([p.sliced(t) for p, t in pairs if isinstance(p, Place)])
        if spoiled.all() or not spoiled.any():
            return found
        rows = rows_instead(spoiled)
        mended = [_with_rows(t, p, rows) for p, t in zip(call.saved["places"], tensors, strict=True)]
        return unspoiled(found, self._one_at_a_time(call, upstream, mended)[1], spoiled)

    def _one_at_a_time(
        self, call: Call, upstream: list[Tensor], tensors: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What the call gives for these tensors, and each row's gradients."""
        params = {name: at_least_float32(b.detach()).requires_grad_() for name, b in call.params.items()}
        rng = call.saved["rng"]
        with torch.enable_grad(), restored(rng, tensors) if rng else nullcontext():
            outputs = self._run(call, params, tensors)
        gs = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        masks = [row_mask(place, g) for place, g in zip(call.saved["out_places"], gs, strict=True)]
        block = max(1, BLOCK // max(1, sum(g.numel() for g in gs)))
        parts: dict[str, list[Tensor]] = {name: [] for name in params}
        for start in range(0, call.n, block):
            some = [torch.where(m[start : start + block], g, 0) for m, g in zip(masks, gs, strict=True)]
            grads = pulled_back(outputs, list(params.values()), some)
            for name, grad in zip(params, grads, strict=True):
                parts[name].append(grad)
        return [t.detach() for t in outputs], {name: torch.cat(rows) for name, rows in parts.items()}


def _with_rows(t: Tensor, place: Any, rows: Tensor) -> Tensor:
    """A tensor with these rows in the place of its own, as long as it holds any."""
    if not isinstance(place, Place) or place.axis is None:
        return t
    entries = torch.arange(place.size, device=t.device).view(place.outer, -1, place.inner)
    return t.index_select(place.axis, entries[:, rows.to(t.device)].flatten())


def row_mask(place: Place, g: Tensor) -> Tensor:
    """``[M, ...]``, broadcastable to ``[M, *g.shape]``: where row m is."""
    if place.axis is None:
        return torch.ones([1] * (g.dim() + 1), dtype=torch.bool, device=g.device)
    rows = torch.arange(place.space.rows, device=g.device)
    shape = [place.space.rows] + [1] * g.dim()
    shape[place.axis + 1] = place.size
    return (rows.unsqueeze(1) == place.row_of_entry(g.device)).view(shape)


def rows_of(values: Tensor, place: Place, shape: Size) -> Term:
    """Per row the sum over the entries that share one of a tensor that was broadcast.

    Args:
        values: A gradient per entry, in the shape of the result.
        place: Where the result holds the rows.
        shape: Shape of the tensor before it was broadcast.

    Returns:
        A term of M rows; one row's own entries where the tensor has the rows itself.
    """
    padded = widened(shape, values.dim())
    shared = [axis for axis, (a, b) in enumerate(zip(padded, values.shape, strict=True)) if a == 1 and b != 1]
    if place.axis is None or padded[place.axis] != 1:
        shared_sum = values.sum(shared, keepdim=True) if shared else values
        if place.axis is None:
            return Dense(shared_sum.reshape(1, *shape))
        axis = place.axis - (values.dim() - len(shape))
        return Placed(shared_sum.reshape(shape), axis, place.row_of_entry(values.device), place.space.rows)
    split = values.unflatten(place.axis, (place.outer, place.space.rows, place.inner)).movedim(place.axis + 1, 0)
    folded = [place.axis + 1, place.axis + 2]  # outer and inner lie where the axis was
    sums = folded + [axis + 1 + (axis > place.axis) for axis in shared if axis != place.axis]
    return Dense(split.sum(sums).reshape(place.space.rows, *shape))


class PointwiseRule(FunctionRule):
    """Functions that act elementwise on arguments broadcast against each other."""

    def target(self, t: Tensor, origin_of: Callable[[Tensor], Tensor]) -> Tensor:
        """An expanded tensor by what it repeats, as broadcasting is all that was done to it."""
        return origin_of(t)

    def keeps_values(self, function: Callable, args: tuple, kwargs: dict) -> bool:
        """Sums pass gradients on as they are."""
        return not self._adds(function, args)

    def _adds(self, function: Any, args: tuple) -> bool:
        return function.__name__ in _ADDS and len(args) == 2 and all(isinstance(a, (Tensor, Slot)) for a in args)

    def random_state(self, args: tuple, kwargs: dict) -> Any:
        """Nothing is drawn."""
        return None

    def terms(self, call: Call, g: Any) -> dict[str, Term]:
        """Elementwise gradients, summed over what shares an entry of the parameter."""
        place = call.saved["out_places"][0]
        if isinstance(g, tuple) or not self._broadcasts(call, g):
            return super().terms(call, g)
        try:
            adds = self._adds(call.module, call.saved["arguments"][0])
            gradients = self._signed(call, g) if adds else self._local(call, g)
        except RuntimeError:  # a function that does not broadcast what it was given here
            return super().terms(call, g)
        real = {name: _real(gradients[name], b) for name, b in call.params.items()}
        return {name: rows_of(real[name], place, b.shape) for name, b in call.params.items()}

    def _broadcasts(self, call: Call, g: Tensor) -> bool:
        try:
            return all(torch.broadcast_shapes(b.shape, g.shape) == g.shape for b in call.params.values())
        except RuntimeError:
            return False

    def _signed(self, call: Call, g: Tensor) -> dict[str, Tensor]:
        """Of ``a + alpha b`` or ``a - alpha b``."""
        args, kwargs = call.saved["arguments"]
        gradients: dict[str, Tensor] = {}
        for position, a in enumerate(args):
            if isinstance(a, Slot):
                factor = (
                    1.0 if position == 0 else kwargs.get("alpha", 1) * (-1.0 if "sub" in call.module.__name__ else 1.0)
                )
                own, before = g if factor == 1 else factor * g, gradients.get(a.name)
                gradients[a.name] = own if before is None else before + own
        return gradients

    def _local(self, call: Call, g: Tensor) -> dict[str, Tensor]:
        """One gradient per entry of the result."""
        params = {
            name: at_least_float32(b.detach()).expand(g.shape).clone().requires_grad_()
            for name, b in call.params.items()
        }
        with torch.enable_grad():
            outputs = self._run(call, params, list(tensors_in(call.saved["arguments"])))
        grads = torch.autograd.grad(outputs, list(params.values()), [g.to(outputs[0].dtype)], allow_unused=True)
        return {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(params.items(), grads, strict=True)
        }


class JoinRule(FunctionRule):
    """``cat`` and ``stack``: each tensor's gradient is its part of that of the result."""

    def target(self, t: Tensor, origin_of: Callable[[Tensor], Tensor]) -> Tensor:
        """An expanded tensor by what it repeats."""
        return origin_of(t)

    def keeps_values(self, function: Callable, args: tuple, kwargs: dict) -> bool:
        """Only shapes count."""
        return False

    def prepare(self, function: Callable, args: tuple, kwargs: dict, *rest: Any) -> Any:
        """Where each tensor stands in the result."""
        saved, params = super().prepare(function, args, kwargs, *rest)
        tensors = list(args[0] if args else kwargs.get("tensors", ()))
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        return saved | {
            "sizes": [t.shape for t in tensors],
            "dim": dim,
            "targets": dict(rest[0]),
            "of": tensors,
        }, params

    def conclude(
        self, saved: Mapping[str, Any], outputs: Sequence[Tensor], places: Sequence[Place], chosen: Sequence[int]
    ) -> dict[str, Any]:
        """Which part of the result belongs to which parameter."""
        stacked = len(outputs[0].shape) > len(saved["sizes"][0])
        dim, start, parts = saved["dim"] % outputs[0].dim(), 0, []
        for t in saved["of"]:
            length = 1 if stacked else (t.shape[dim] if t.dim() == outputs[0].dim() else 0)
            parts += [(name, start, length) for name, b in saved["targets"].items() if b is t]
            start += length
        cut = {"of": None, "targets": None, "parts": parts, "dim": dim, "stacked": stacked}
        return super().conclude(saved, outputs, places, chosen) | cut

    def random_state(self, args: tuple, kwargs: dict) -> Any:
        """Nothing is drawn."""
        return None

    def terms(self, call: Call, g: Any) -> dict[str, Term]:
        """Parts of the gradient, summed over what was expanded."""
        place, dim = call.saved["out_places"][0], call.saved["dim"]
        parts: dict[str, list[Term]] = {name: [] for name in call.params}
        for name, start, length in call.saved["parts"]:
            b = call.params[name]
            if place.axis == dim:  # the tensor stands among the rows, and only those of its own entries count
                kept = torch.where(row_mask(place, g), g, 0).narrow(dim + 1, start, length)
                kept = kept.squeeze(dim + 1) if call.saved["stacked"] else kept
                kept = _real(kept, b)
                one = torch.stack([row.sum_to_size(widened(b.shape, row.dim())).reshape(b.shape) for row in kept])
                parts[name].append(Dense(one))
            else:
                part = _real(g, b).narrow(dim, start, length)
                if call.saved["stacked"]:
                    part = part.squeeze(dim)
                    moved = place if place.axis is None or place.axis < dim else place.at(place.axis - 1)
                else:
                    moved = place
                parts[name].append(rows_of(part, moved, b.shape))
        return {name: combine(merged(of_one)) for name, of_one in parts.items()}


def _real(gradient: Tensor, param: Tensor) -> Tensor:
    """The gradient of a real parameter in a complex result."""
    return gradient.real if gradient.is_complex() and not param.is_complex() else gradient


__all__ = ["JOINS", "FunctionRule", "JoinRule", "PointwiseRule"]
