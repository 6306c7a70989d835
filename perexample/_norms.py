"""Norms and products that hold in float32: no overflow, no underflow, no drift over long sums."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORT = 1024  # float32 squares added up at once: long sums drift
_FEW = 2**16  # elements whose squares are added up in float64 at once
BLOCK = 2**24  # elements formed at once where a norm alone is wanted


def norms_of(flat: Tensor) -> Tensor:
    """Norms along the last axis in float64, also where a float32 square would over- or underflow."""
    if flat.numel() <= _FEW:  # fewer calls are worth more than speed
        return torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)
    norms = _blockwise(flat)
    if flat.dtype == torch.float64:
        return norms
    least, most = torch.aminmax(norms)
    if not (least > 1e-17 and most < 1e18):
        doubtful = ~((norms > 1e-17) & (norms < 1e18))
        norms[doubtful] = torch.linalg.vector_norm(flat[doubtful].double(), dim=-1)
    return norms


def _blockwise(flat: Tensor) -> Tensor:
    """Norms along the last axis: in blocks in the tensor's dtype, whose sums stay short, then in float64."""
    size = flat.shape[-1]
    whole = size - size % _SHORT
    if whole <= _SHORT or flat.dtype == torch.float64:
        return torch.linalg.vector_norm(flat, dim=-1).double()
    blocks = flat[..., :whole].unflatten(-1, (-1, _SHORT))
    norms = torch.linalg.vector_norm(torch.linalg.vector_norm(blocks, dim=-1).double(), dim=-1)
    if whole == size:
        return norms
    return torch.hypot(norms, torch.linalg.vector_norm(flat[..., whole:], dim=-1).double())


def squared_norms(dense: Tensor) -> Tensor:
    """Squared norm of each row of ``[N, ...]``, in float64."""
    if dense.dim() != 2:
        dense = dense.reshape(dense.shape[0], -1) if dense.numel() else dense.new_zeros(dense.shape[0], 1)
    return norms_of(dense).square()


_SHORT_PRODUCT = 64  # float32 products added up at once in a matrix product: some kernels drift over more


def short_sums(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right`` for ``[B, O, T]`` and ``[B, T, I]``; in float32 no sum over T runs over many at once."""
    length = right.shape[1]
    if left.dtype == torch.float64 or length <= 2 * _SHORT_PRODUCT or not len(left):
        return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
    total = torch.bmm(left[:, :, :_SHORT_PRODUCT], right[:, :_SHORT_PRODUCT], out=out)
    for start in range(_SHORT_PRODUCT, length, _SHORT_PRODUCT):
        part = slice(start, start + _SHORT_PRODUCT)
        total.baddbmm_(left[:, :, part], right[:, part])
    return total


def summed_products(g: Tensor, x: Tensor) -> Tensor:
    """``sum_t g_t x_t^T`` for ``[N, groups, T, O]`` and ``[N, groups, T, I]``, as ``[N, groups, O, I]``."""
    return short_sums(g.transpose(2, 3).flatten(0, 1), x.flatten(0, 1)).unflatten(0, g.shape[:2])


def gram_norms(g: Tensor, x: Tensor) -> Tensor:
    """``sum_ts <g_t, g_s> <x_t, x_s>`` per example, the products in the factors' dtype, the sum in float64."""
    n, groups, positions, _ = g.shape
    block = max(1, BLOCK // max(1, groups * positions * positions))
    sums = []
    for start in range(0, n, block):
        a, b = g[start : start + block], x[start : start + block]
        sums.append((a @ a.mT).mul_(b @ b.mT).sum((1, 2, 3), dtype=torch.float64))
    return torch.cat(sums).clamp_min(0.0)
