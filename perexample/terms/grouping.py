"""The rows of each example, found by the examples that they belong to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._looks import holds, look

MANY = 64  # float32 rows of one entry of the table that are added one after another


def added(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """The rows of each example added up, ``[N, ...]``."""
    each = rows_in_order(owner, n)
    if each:
        return values.unflatten(0, (n, each)).sum(1)
    exact = values.double() if values.shape[0] > MANY else values  # one after another they would drift in float32
    return exact.new_zeros(n, *values.shape[1:]).index_add_(0, owner.to(values.device), exact).to(values.dtype)


def rows_in_order(owner: Tensor, n: int) -> int:
    """How many rows follow each other in each of N examples; 0 if that is not how they lie."""
    each, rest = divmod(owner.numel(), max(1, n))
    if rest or not each:
        return 0
    in_order = owner.view(n, each) == torch.arange(n, device=owner.device).unsqueeze(1)
    return each if holds(in_order) else 0


def rows_together(owner: Tensor, n: int) -> Callable[[Tensor], Tensor] | None:
    """What brings ``[M, ...]`` into ``[N, K, ...]``, the rows of each example side by side, zeros for those missing.

    Returns:
        It; ``None`` if that would fill up much.
    """
    each = rows_in_order(owner, n)
    if each:
        return lambda rows: rows.unflatten(0, (n, each))
    look("examples have different numbers of rows")
    kept = owner[owner >= 0]
    most = int(torch.bincount(kept).max()) if kept.numel() else 0
    if most * n > 4 * max(owner.numel(), 1) or not most:
        return None
    table = padded_rows(torch.where(owner >= 0, owner, n), n + 1)[:n, :most]

    def together(rows: Tensor) -> Tensor:
        at = table.to(rows.device)
        missing = (at < 0).view(n, most, *[1] * (rows.dim() - 1))
        return rows[at.clamp_min(0)].masked_fill(missing, 0)

    return together


def padded_rows(owner: Tensor, n: int) -> Tensor:
    """Rows of each example, ``[N, K]``, filled up with -1 to the largest number of them."""
    look("examples have different numbers of entries")
    counts = torch.bincount(owner, minlength=n)
    order = torch.argsort(owner, stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.arange(owner.numel(), device=owner.device) - starts[owner[order]]
    table = owner.new_full((n, int(counts.max()) if counts.numel() else 0), -1)
    table[owner[order], column] = order
    return table
