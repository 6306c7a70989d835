"""Rules for Embedding and EmbeddingBag: gradients that touch few rows, never spread over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from .._looks import blind, holds
from .._norms import squared_norms
from ..methods import Method
from ..place import Place, from_owners
from ..rule import Bound, Call, Rule, Sizes, named_arguments, only_parameters, register_rule
from ..terms import Rows, Term

_MAXIMUM = 2  # how torch.embedding_bag names the mode


class _TableRule(Rule):
    """What both kinds of table refuse."""

    def covers(self, module: nn.Module) -> bool:
        """Only the table."""
        return only_parameters(module, "weight")

    def refuse(self, module: Any) -> str | None:
        """Options that make one example's gradient, or the table itself, depend on the other examples."""
        if module.scale_grad_by_freq and module.weight.requires_grad:
            return (
                "has scale_grad_by_freq=True, which divides by how often an id occurs in the whole batch, so examples "
                "change each other's gradients; build it with scale_grad_by_freq=False"
            )
        if module.max_norm is not None:
            return (
                "has max_norm set, which rewrites rows of the table, a frozen one too, during the forward according to "
                "the data; build it with max_norm=None"
            )
        return None


@register_rule(nn.Embedding, F.embedding, Tensor.__getitem__)
class EmbeddingRule(_TableRule):
    """``y_t = W[id_t]``: weight ``G_n = sum_t e_{id_nt} g_nt^T``; ids are ``[N, *T]``; ``padding_idx`` gets nothing."""

    reads_parameters = False

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.embedding(ids, weight)``, or ``weight[ids]``."""
        if function is Tensor.__getitem__:
            weight, ids = args
            if not (isinstance(ids, Tensor) and ids.dtype in (torch.long, torch.int) and weight.dim() == 2):
                return None
            options: dict[str, Any] = {}
        else:
            options = named_arguments(
                "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs
            )
            ids, weight = options["input"], options["weight"]
        padding_idx = options.get("padding_idx")
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]
        module = SimpleNamespace(
            from_the_end=function is Tensor.__getitem__,  # an index may count from there
            weight=weight,
            padding_idx=padding_idx,
            scale_grad_by_freq=options.get("scale_grad_by_freq", False),
            max_norm=options.get("max_norm"),
        )
        return Bound(module, (ids,), {"weight": weight})

    def feature_axes(self, module: nn.Module) -> int:
        """Every axis of the ids is one of positions."""
        return 0

    def most_held(self, sizes: Sizes) -> int:
        """The upstream gradient."""
        return sizes.upstream

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """The rows that were looked up."""
        ids = call.x.reshape(-1).long()
        if getattr(call.module, "from_the_end", False):
            ids = ids.remainder(call.params["weight"].shape[0])
        rows = g.reshape(-1, g.shape[-1])
        each = ids.numel() // max(call.n, 1)
        example = torch.arange(call.n, device=ids.device).unsqueeze(1).expand(-1, each).reshape(-1)
        return {"weight": _rows(call, example, ids, rows)}


def _rows(call: Call, example: Tensor, ids: Tensor, rows: Tensor) -> Rows:
    """Entries without those of the padding index."""
    padding_idx = call.module.padding_idx
    if padding_idx is not None and blind():
        rows = rows.masked_fill((ids == padding_idx).unsqueeze(1), 0)
    elif padding_idx is not None:
        kept = ids != padding_idx
        example, ids, rows = example[kept], ids[kept], rows[kept]
    return Rows(example, ids, rows, call.n, call.params["weight"].shape)


@register_rule(nn.EmbeddingBag, F.embedding_bag)
class EmbeddingBagRule(_TableRule):
    """Sum, mean or maximum of the rows of each bag; one bag per example."""

    batched = ()
    counts_rows = True

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.embedding_bag(ids, weight, offsets)``."""
        names = "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights"
        options: dict[str, Any] = dict.fromkeys(("offsets", "max_norm", "per_sample_weights", "padding_idx"))
        options |= named_arguments(f"{names} include_last_offset padding_idx", args, kwargs)
        ids, weight, padding_idx = options["input"], options["weight"], options["padding_idx"]
        if ids.is_floating_point():  # the order of arguments in old code
            return None
        module = SimpleNamespace(
            weight=weight,
            padding_idx=padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + weight.shape[0],
            mode=options.get("mode", "mean"),
            include_last_offset=options.get("include_last_offset", False),
            scale_grad_by_freq=options.get("scale_grad_by_freq", False),
            max_norm=options["max_norm"],
        )
        return Bound(module, (ids, options["offsets"], options["per_sample_weights"]), {"weight": weight})

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """Ids, offsets and per-sample weights."""
        named = dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)) | kwargs
        return {"ids": named["input"], "offsets": named.get("offsets"), "weights": named.get("per_sample_weights")}

    def locate(
        self, module: Any, args: tuple, kwargs: dict, outputs: Sequence[Tensor], place_of: Callable[[Tensor], Any]
    ) -> tuple[Place, Sequence[Place | None]] | str:
        """Ids that lie in one row: each bag is a row, and of the example that its ids are of."""
        given = self.capture(module, args, kwargs, None)
        ids, offsets, weights = given["ids"], given["offsets"], given["weights"]
        place = place_of(ids)
        bags, by_bag = outputs[0].shape[0], None if offsets is None else place_of(offsets)
        if isinstance(by_bag, Place) and (by_bag.axis, by_bag.size) == (0, bags) and by_bag.space.record.was_given(ids):
            return by_bag.each(0, bags), [by_bag]  # that there are as many ids as bags says nothing of whose they are
        if ids.dim() == 2 or not isinstance(place, Place):
            return super().locate(module, args, kwargs, outputs, place_of)
        beside = [known for t in (offsets, weights) if t is not None and (known := place_of(t)) is not None]
        of_all = place.axis is None or by_bag is None
        if not of_all or not all(known.agrees(place) for known in beside):
            return "was called with inputs that hold the examples in different places"
        if place.axis is not None:
            owner, bag = place.owner_of_entry(ids.device), _bag_of_each(ids, offsets)
            top = torch.full((bags + 1,), -1, device=ids.device).scatter_reduce(0, bag, owner, "amax")
            if not holds((top[bag] == owner) | (bag == bags)):
                return "was given bags that hold ids of several examples"
            found = from_owners(top[:bags], place.space.record.space)
            assert found is not None  # there is just one axis
            place = found
        return place.each(0, bags), [place]

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """Rows scaled by their part in the bag, or single entries where the maximum was taken."""
        ids, bag = _bags(call)
        if call.module.mode == "max":
            return {"weight": self._maximum(call, ids, bag, g)}
        rows = g[bag]
        if call.saved["weights"] is not None:
            rows = rows * call.saved["weights"].reshape(-1, 1)
        if call.module.mode == "mean":
            rows = rows / self._counts(call, ids, bag)[bag].unsqueeze(1)
        return {"weight": _rows(call, bag, ids, rows)}

    def _counts(self, call: Call, ids: Tensor, bag: Tensor) -> Tensor:
        """Entries that the mean is over; padding does not count."""
        padding_idx = call.module.padding_idx
        counted = torch.ones_like(ids) if padding_idx is None else (ids != padding_idx).long()
        return torch.zeros(call.n, dtype=torch.long, device=ids.device).index_add_(0, bag, counted).clamp_min(1)

    def _maximum(self, call: Call, ids: Tensor, bag: Tensor, g: Tensor) -> Term:
        """The forward's own choice of the maximal row per feature, asked of torch again."""
        starts = torch.searchsorted(bag, torch.arange(call.n, device=ids.device))
        padding_idx = call.module.padding_idx
        # All by position: torch has the padding index in a second form of this function only.
        options = (False, _MAXIMUM, False, None, False, *([] if padding_idx is None else [padding_idx]))
        _, _, _, chosen = torch.embedding_bag(call.params["weight"].detach(), ids, starts, *options)
        kept = torch.zeros(call.n, dtype=torch.bool, device=ids.device)
        kept[bag if padding_idx is None else bag[ids != padding_idx]] = True
        return _Entries(chosen.reshape(g.shape).clamp_min(0), g * kept.unsqueeze(1), call.params["weight"].shape)


def _bags(call: Call) -> tuple[Tensor, Tensor]:
    """All ids in one row, and the bag of each."""
    ids, offsets = call.saved["ids"], call.saved["offsets"]
    if ids.dim() == 2:
        bag = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1])
        return ids.reshape(-1).long(), bag
    bag = _bag_of_each(ids, offsets)
    if call.module.include_last_offset:
        within = torch.arange(ids.shape[0], device=ids.device) < offsets[-1]
        return ids[within].long(), bag[within]
    return ids.long(), bag


def _bag_of_each(ids: Tensor, offsets: Tensor) -> Tensor:
    """The bag of each id in a row; what comes after the last offset, if that is no bag's, has one more."""
    return torch.searchsorted(offsets.long(), torch.arange(ids.shape[0], device=ids.device), right=True) - 1


class _Entries(Term):
    """One entry of the table per example and feature: ``G_n[chosen[n, e], e] = values[n, e]``."""

    def __init__(self, chosen: Tensor, values: Tensor, shape: Size) -> None:
        self.chosen, self.values, self.n, self.shape = chosen, values, chosen.shape[0], shape

    def dense(self) -> Tensor:
        out = self.values.new_zeros(self.n, *self.shape)
        return out.scatter_add_(1, self.chosen.unsqueeze(1), self.values.unsqueeze(1))

    def select(self, rows: Tensor) -> Term:
        rows = rows.to(self.values.device)
        return _Entries(self.chosen[rows], self.values[rows], self.shape)

    def double(self) -> Term:
        return _Entries(self.chosen, self.values.double(), self.shape)

    def factors(self) -> list[Tensor]:
        return [self.values]

    def methods(self) -> list[Method]:
        return [Method("entries that were chosen", lambda: (squared_norms(self.values), self))]

    def weighted_sum(self, w: Tensor) -> Tensor:
        return self.values.new_zeros(self.shape).scatter_add_(0, self.chosen, self.values * w.unsqueeze(1))
