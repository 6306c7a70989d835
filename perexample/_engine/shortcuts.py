"""Ways from a tensor that is one step away from a parameter to the parameter itself, without the graph.

Each entry of a tensor that was looked up in a table, or that shows a part of a parameter, is an entry of the parameter.
Its gradients only have to be counted to these: no product with the graph is needed, which would spread those of all
examples first. Only what is one step away is known: of a tensor in between nobody can say whether its gradient has a
hook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._looks import holds
from .._private import gradient_hooks, looked_up, memory_order, shown_by
from ..terms import Dense, Outer, Rows, Term
from ..terms.placed import Placed
from .walk import Source

Way = Callable[[Tensor, Tensor], "Callable[[Term], Term] | None"]


def shortcut(source: Source, terms: Sequence[Term]) -> dict[Tensor, list[Term]] | None:
    """From the gradients of a tensor to those of the parameters that it was computed from.

    Args:
        source: The tensor.
        terms: Its gradients, to be added.

    Returns:
        Terms of each parameter; ``None`` if only the graph knows.
    """
    tensor, node = source.tensor, source.tensor.grad_fn
    if node is None or source.opaque or len(source.leaves) != 1 or gradient_hooks(tensor):
        return None
    leaf, way = source.leaves[0], _WAYS.get(node.name())
    before = [getattr(after, "variable", None) for after, _ in node.next_functions]
    if way is None or len(before) != 1 or before[0] is not leaf:
        return None
    step = way(tensor, leaf)
    return None if step is None else {leaf: [step(term) for term in terms]}


def _lookup(tensor: Tensor, table: Tensor) -> Callable[[Term], Term] | None:
    """Rows of a table by their numbers."""
    node = tensor.grad_fn
    found = None if node is None or table.dim() != 2 else looked_up(node)
    if found is None or tensor.shape != (*found[0].shape, table.shape[1]):
        return None
    ids, padding_idx = found[0].to(table.device), found[1]  # which a table on a GPU may be given on the CPU

    def rows(term: Term) -> Term:
        if isinstance(term, Placed) and term.axis < ids.dim():
            value, entries = term.value, ids
            along = [-1 if axis == term.axis else 1 for axis in range(ids.dim())]
            example = term.owner.view(along).expand(ids.shape)
        else:  # each example looks up all
            value, entries = term.dense(), ids.expand(term.n, *ids.shape)
            example = torch.arange(term.n, device=ids.device).view(-1, *[1] * ids.dim()).expand(entries.shape)
        example, entries = example.reshape(-1), entries.reshape(-1)
        kept, value = (example >= 0) & (entries != padding_idx), value.reshape(-1, table.shape[1])
        if not holds(kept):
            example, entries, value = example[kept], entries[kept], value[kept]
        return Rows(example, entries, value, term.n, table.shape)

    return rows


def _view(tensor: Tensor, leaf: Tensor) -> Callable[[Term], Term] | None:
    """What shows entries of a parameter in another order or shape, some of them, or some several times."""
    if not shown_by(tensor, leaf):
        return None
    repeated = [axis for axis, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
                if size > 1 and step == 0]  # fmt: skip
    part = tensor.detach()
    for axis in repeated:
        part = part.narrow(axis, 0, 1)

    def spread(term: Term) -> Term:
        if isinstance(term, Outer) and _transposes(tensor, leaf) and term.g.shape[1] == 1:
            return Outer(term.x, term.g, leaf.shape)
        value = term.dense()
        if repeated:
            value = value.sum([axis + 1 for axis in repeated], keepdim=True)
        order = memory_order(part) if part.numel() == leaf.numel() else None
        if order is not None:  # nothing is left out
            return Dense(value.permute(0, *(axis + 1 for axis in order)).reshape(-1, *leaf.shape))
        out = value.new_zeros(term.n, *leaf.shape)
        offset = tensor.storage_offset() - leaf.storage_offset()
        out.as_strided(value.shape, (leaf.numel(), *part.stride()), offset).copy_(value)
        return Dense(out)

    return spread


def _transposes(tensor: Tensor, leaf: Tensor) -> bool:
    """Whether a matrix shows another one transposed."""
    turned = tensor.dim() == leaf.dim() == 2 and tensor.shape == leaf.shape[::-1]
    return turned and tensor.stride() == leaf.stride()[::-1]


_LOOKUPS = ("EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0")
_VIEWS = (
    "TBackward0", "TransposeBackward0", "PermuteBackward0", "SliceBackward0", "SelectBackward0", "UnsqueezeBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "ViewBackward0", "ExpandBackward0", "SplitBackward0",
    "UnbindBackward0",
)  # fmt: skip
_WAYS: dict[str, Way] = {**dict.fromkeys(_LOOKUPS, _lookup), **dict.fromkeys(_VIEWS, _view)}
