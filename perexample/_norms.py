"""Norms of rows that hold in float32: no overflow, no underflow, no drift over long sums."""

from __future__ import annotations

import torch
from torch import Tensor

_SHORT = 1024  # float32 squares added up at once: long sums drift
BLOCK = 2**24  # elements formed at once where a norm alone is wanted


def norms_of(flat: Tensor) -> Tensor:
    """Norms along the last axis in float64, also where a float32 square would over- or underflow."""
    if flat.shape[-1] == 0:
        return flat.new_zeros(flat.shape[:-1], dtype=torch.float64)
    norms = _blockwise(flat)
    doubtful = ~((norms > 1e-17) & (norms < 1e18))
    if flat.dtype != torch.float64 and doubtful.any():
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
    return norms_of(dense.reshape(dense.shape[0], -1) if dense.numel() else dense.new_zeros(dense.shape[0], 1)).square()


_SHORT_PRODUCT = 64  # float32 products added up at once in a matrix product: some kernels drift over more


def summed_products(g: Tensor, x: Tensor) -> Tensor:
    """``sum_t g_t x_t^T`` for ``[N, groups, T, O]`` and ``[N, groups, T, I]``, in short sums if in float32."""
    positions = x.shape[2]
    if g.dtype == torch.float64 or positions <= 2 * _SHORT_PRODUCT or not g.shape[0]:
        return torch.matmul(g.transpose(2, 3), x)
    left, right = g.transpose(2, 3).flatten(0, 1), x.flatten(0, 1)
    total = torch.bmm(left[:, :, :_SHORT_PRODUCT], right[:, :_SHORT_PRODUCT])
    for start in range(_SHORT_PRODUCT, positions, _SHORT_PRODUCT):
        part = slice(start, start + _SHORT_PRODUCT)
        total.baddbmm_(left[:, :, part], right[:, part])
    return total.unflatten(0, g.shape[:2])


def gram_norms(g: Tensor, x: Tensor) -> Tensor:
    """``sum_ts <g_t, g_s> <x_t, x_s>`` per example, the products in the factors' dtype, the sum in float64."""
    n, groups, positions, _ = g.shape
    block = max(1, BLOCK // max(1, groups * positions * positions))
    sums = []
    for start in range(0, n, block):
        a, b = g[start : start + block], x[start : start + block]
        sums.append(((a @ a.mT) * (b @ b.mT)).sum((1, 2, 3), dtype=torch.float64))
    return torch.cat(sums).clamp_min(0.0)
