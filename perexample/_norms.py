"""Norms and products that hold in float32: no overflow, no underflow, no drift over long sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._looks import blind, not_large

_SHORT = 1024  # float32 squares added up at once: long sums drift
_FEW, _FEW_ON_GPU = 2**16, 2**22  # elements whose squares are added up in float64 at once
BLOCK = 2**24  # elements formed at once where a norm alone is wanted
_CACHED = 2**20  # the same of Gram matrices on a CPU
_UNFOLDED = 2**21  # and of unfolded images


def norms_of(flat: Tensor) -> Tensor:
    """Norms along the last axis in float64, also where a float32 square would over- or underflow."""
    if flat.numel() <= (_FEW if flat.device.type == "cpu" else _FEW_ON_GPU):  # fewer calls are worth more than speed
        return torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64)
    norms = _blockwise(flat)
    if flat.dtype == torch.float64 or (blind() and not_large(norms)):  # there what is too small counts as nothing
        return norms
    least, most = torch.aminmax(norms)
    if not (least.item() > 1e-17 and most.item() < 1e18):
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


def norms_of_each(t: Tensor) -> Tensor:
    """Norm of each of ``[N, ..., F]`` over all its axes, in float64; no copy, however the axes lie in memory."""
    if t.is_contiguous():
        return norms_of(t.flatten(1))
    return torch.linalg.vector_norm(norms_of(t).flatten(1), dim=1)


# Float32 products added up at once in a matrix product, as kernels drift over more; on GPUs short ones take longer.
_SHORT_PRODUCT, _SHORT_ON_GPU = 128, 512
_LONG = 2**13  # and in float32 at all


def drift(length: int, dtype: torch.dtype) -> float:
    """Share of a sum of so many products of one sign that rounding may take off, if they are added one after another.

    That is a unit of rounding for each, half of the precision of the dtype: small numbers that are added to a large one
    may all be lost. Of like ones it is a fifth of that, with the kernels that were seen.

    Args:
        length: Number of products.
        dtype: In which they are added.

    Returns:
        The share.
    """
    return length * torch.finfo(dtype).eps / 2


def _piece(device: torch.device) -> int:
    return _SHORT_PRODUCT if device.type == "cpu" else _SHORT_ON_GPU


def short_drift(length: int, like: Tensor) -> float:
    """`drift` of `short_sums` of tensors like this one."""
    piece = _piece(like.device)
    if length <= 2 * piece:
        return drift(length, like.dtype)
    return drift(piece + min(length, _LONG) // piece, like.dtype)


@torch.no_grad()  # values only: what writes into tensors at hand cannot be differentiated again
def short_sums(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right`` for ``[B, O, T]`` and ``[B, T, I]``; in float32 no sum over T runs over many at once."""
    length = right.shape[1]
    if length > _LONG and left.dtype == torch.float32:
        summed = left.new_zeros(len(left), left.shape[1], right.shape[2], dtype=torch.float64)
        for a, b in zip(left.split(_LONG, 2), right.split(_LONG, 1), strict=True):
            summed += short_sums(a, b)
        return summed.float() if out is None else out.copy_(summed)
    piece = _piece(left.device)
    if left.dtype == torch.float64 or length <= 2 * piece or not len(left):
        return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)
    parts = list(zip(left.split(piece, 2), right.split(piece, 1), strict=True))
    total = torch.bmm(*parts[0], out=out)
    product = torch.empty_like(total)
    for part in parts[1:]:  # baddbmm would go on from the total, one product after another, where one factor is a row
        total += torch.bmm(*part, out=product)
    return total


def summed_products(g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``sum_t g_t x_t^T`` for ``[N, groups, T, O]`` and ``[N, groups, T, I]``, as ``[N, groups, O, I]``.

    Args:
        g: The left factors.
        x: The right factors.
        out: Where to write them, with as many elements in this order.

    Returns:
        The products.
    """
    flat = None if out is None else out.view(-1, g.shape[3], x.shape[3])
    return short_sums(g.transpose(2, 3).flatten(0, 1), x.flatten(0, 1), flat).unflatten(0, g.shape[:2])


@dataclass(frozen=True)
class Inner:
    """What Gram matrices tell of each example, in float64.

    Attributes:
        l2: ``sum_ts <g_t, g_s> <x_t, x_s>``, ``[N]``.
        magnitude: ``sum_t |g_t| |x_t|`` from their diagonals, ``[N]``; what is too small for a square is raised.
        products: How many products were added up for each.
        drift: Share of ``l2`` by which it may be too small where nothing cancels.
    """

    l2: Tensor
    magnitude: Tensor
    products: int
    drift: float = 0.0


_BLOCKED = 512  # products that a kernel for matrices adds one after another, before it begins anew


def gram_drift(dtype: torch.dtype, *lengths: int) -> float:
    """`Inner.drift` of products of Gram matrices whose entries are sums of so many products."""
    longest = sum(min(length, _BLOCKED) + length // _BLOCKED for length in lengths)
    return 25 * torch.finfo(dtype).eps + drift(longest, dtype)


def gram_norms(g: Tensor, x: Tensor, of_x: Tensor | None = None) -> Inner:
    """Inner products of the positions of ``[N, groups, T, O]`` and ``[N, groups, T, I]``, in the factors' dtype.

    Args:
        g: The one factor.
        x: The other one.
        of_x: Its Gram matrices, where they are known.

    Returns:
        What they tell.
    """
    block, off = gram_block(g, g.shape[1:3].numel() * g.shape[2]), gram_drift(g.dtype, g.shape[3], x.shape[3])

    def cut(t: Tensor) -> Sequence[Tensor]:
        return (t,) if block >= len(t) else t.split(block)

    if of_x is not None:
        found = [of_grams(b, a @ a.mT, off) for a, b in zip(cut(g), cut(of_x), strict=True)]
    else:
        found = [of_grams(a @ a.mT, b @ b.mT, off) for a, b in zip(cut(g), cut(x), strict=True)]
    return joined(found, g)


def gram_block(like: Tensor, entries: int) -> int:
    """Of how many examples Gram matrices are formed at once: on a CPU of so many as stay in its cache."""
    return max(1, (_CACHED if like.device.type == "cpu" else BLOCK) // max(1, entries))


def unfold_block(like: Tensor, entries: int) -> int:
    """The same of images that are unfolded; as many for each thread, between which they are shared out."""
    if like.device.type != "cpu":
        return max(1, BLOCK // max(1, entries))
    threads = torch.get_num_threads()
    return threads * max(1, -(-_UNFOLDED // max(1, entries * threads)))


def of_grams(left: Tensor, right: Tensor, off: float) -> Inner:
    """The same of Gram matrices ``[N, groups, T, T]``, the second of which is written to, with their `gram_drift`."""
    least = 1e-13 if left.dtype == torch.float32 else 1e-145  # below that products of squares of parts are lost
    norms = [t.diagonal(dim1=2, dim2=3).sqrt().clamp_min_(least) for t in (left, right)]
    magnitude = norms[0].mul_(norms[1]).sum((1, 2), dtype=torch.float64)
    return Inner(_sum(right.mul_(left)), magnitude, left.shape[1:].numel(), off)


_SEVERAL = 32  # numbers in a row of which torch adds several at a time, so that errors average out


def _sum(products: Tensor) -> Tensor:
    """Sum of each ``[groups, T, T]`` in float64; rows of some length before that as they are, which takes no copy."""
    if products.shape[3] < _SEVERAL or products.dtype == torch.float64:
        return products.sum((1, 2, 3), dtype=torch.float64)
    return products.sum(3).sum((1, 2), dtype=torch.float64)


def joined(parts: Sequence[Inner], like: Tensor) -> Inner:
    """Of several blocks of examples, there may be none."""
    if len(parts) == 1:
        return Inner(parts[0].l2.clamp_min_(0.0), parts[0].magnitude, parts[0].products, parts[0].drift)
    if not parts:
        none = like.new_zeros(0, dtype=torch.float64)
        return Inner(none, none, 0)
    l2, magnitude = torch.cat([part.l2 for part in parts]), torch.cat([part.magnitude for part in parts])
    return Inner(l2.clamp_min_(0.0), magnitude, parts[0].products, parts[0].drift)
