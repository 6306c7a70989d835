"""Per-example weight gradients of convolutions, and their norms, in several exact ways.

All of them take the input ``x`` ``[N, C_in, *S]``, padded already, and the gradient ``g`` ``[N, C_out, *L]`` of the
output, and a `Geometry`. ``G_n[k] = sum_l g_n[l] x_n[l stride + k dilation]`` within each group of channels.

References:
    Rochette et al. 2019, arXiv:1912.06015 (gradients of all examples as one grouped convolution); Bu et al. 2022,
    arXiv:2205.10683 (norms from unfolded inputs). That the Gram matrix of the windows is a sum of shifted blocks of
    that of the pixels, and that kernel offsets are slices of the flattened image, we have not found elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from ._norms import Inner, gram_block, gram_drift, joined, of_grams, short_sums

_WEIGHT_GRADIENT = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution.

    Attributes:
        shape: Shape of the weight, ``[C_out, C_in / groups, *K]``.
        stride: Step of the window, per axis.
        dilation: Distance of the kernel's taps, per axis.
        groups: Number of groups of channels.
    """

    shape: Size
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> Size:
        """Size of the kernel, per axis."""
        return self.shape[2:]

    def offsets(self) -> list[tuple[int, ...]]:
        """Where the kernel's taps lie, in the order of the weight."""
        return list(itertools.product(*(range(0, k * d, d) for k, d in zip(self.kernel, self.dilation, strict=True))))


def native(x: Tensor, g: Tensor, geometry: Geometry, padding: tuple[int, ...] | int = 0) -> Tensor:
    """The convolution's own weight gradient, summed over the examples given, ``[*shape]``."""
    return _WEIGHT_GRADIENT[x.dim() - 2](
        _plain(x), list(geometry.shape), _plain(g), stride=geometry.stride, padding=padding, dilation=geometry.dilation,
        groups=geometry.groups,
    )  # fmt: skip


def _plain(t: Tensor) -> Tensor:
    """Images of one entry with the strides of their shape: torch may take others for channels that come last."""
    return t.view(-1).view(t.shape) if t.stride(1) == 1 and t.is_contiguous() else t


def one_by_one(x: Tensor, g: Tensor, geometry: Geometry, padding: tuple[int, ...] | int = 0) -> Tensor:
    """One native call for each example, ``[N, *shape]``."""
    out = g.new_empty(len(x), *geometry.shape)
    for row, a, b in zip(out, x.split(1), g.split(1), strict=True):
        row.copy_(native(a, b, geometry, padding))
    return out


def examples_as_groups(x: Tensor, g: Tensor, geometry: Geometry, padding: tuple[int, ...] | int = 0) -> Tensor:
    """One native call in which each example is a group of channels of a single image, ``[N, *shape]``."""
    n, shape = len(x), geometry.shape
    wide = Geometry(Size((n * shape[0], *shape[1:])), geometry.stride, geometry.dilation, n * geometry.groups)
    return native(x.reshape(1, -1, *x.shape[2:]), g.reshape(1, -1, *g.shape[2:]), wide, padding).view(n, *shape)


_AT_ONCE = 1500  # positions over which one native call sums: what it adds is in float32, one after another


def parts_of(positions: Size) -> tuple[int, int]:
    """Into how many parts `by_parts` cuts the first axis, and of how many rows."""
    most = max(1, _AT_ONCE // max(1, positions[1:].numel()))
    parts = max(1, -(-positions[0] // most))
    return parts, max(1, -(-positions[0] // parts))


def by_parts(form: Callable[..., Tensor], x: Tensor, g: Tensor, geometry: Geometry, padding: tuple[int, ...]) -> Tensor:
    """A native way, on some rows of the output after others, and the results added up.

    Args:
        form: `one_by_one` or `examples_as_groups`.
        x: The input.
        g: Gradient of the output.
        geometry: Shape of the convolution.
        padding: What the native calls add on both sides.

    Returns:
        What ``form`` returns.
    """
    parts, rows = parts_of(g.shape[2:])
    if parts == 1:
        return form(x, g, geometry, padding)
    if padding[0]:
        x = F.pad(x, [0, 0] * (len(padding) - 1) + [padding[0]] * 2)
    step, reach = geometry.stride[0], (geometry.kernel[0] - 1) * geometry.dilation[0] + 1
    total: Tensor | None = None
    for start, part in zip(range(0, g.shape[2], rows), g.split(rows, 2), strict=True):
        met = x.narrow(2, start * step, (part.shape[2] - 1) * step + reach)
        found = form(met, part, geometry, (0, *padding[1:]))
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def windows(x: Tensor, geometry: Geometry, positions: Size) -> Tensor:
    """The unfolded input, ``[N, groups, L, C_in / groups * K]``."""
    if positions[-1] <= _FEW and x.device.type == "cpu":
        return _looked_up(x, geometry, positions)
    dims = x.dim() - 2
    x = _unfolded(x.unflatten(1, (geometry.groups, geometry.shape[1])), 3, geometry)  # [..., C_in / groups, *L, *K]
    order = (0, 1, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))  # rows of pixels are copied whole
    x = x.permute(order).reshape(len(x), geometry.groups, geometry.shape[1:].numel(), positions.numel())
    return x.transpose(2, 3)


def windows_by_taps(x: Tensor, geometry: Geometry, positions: Size) -> Tensor:
    """The same in another order, ``[N, groups, L, K * C_in / groups]``, in which all channels of a pixel are copied."""
    dims = x.dim() - 2
    x = x.unflatten(1, (geometry.groups, geometry.shape[1])).movedim(2, -1).contiguous()
    x = _unfolded(x, 2, geometry)  # [N, groups, *L, C_in / groups, *K]
    order = (0, 1, *range(2, 2 + dims), *range(3 + dims, 3 + 2 * dims), 2 + dims)
    return x.permute(order).reshape(len(x), geometry.groups, positions.numel(), geometry.shape[1:].numel())


def _unfolded(x: Tensor, first: int, geometry: Geometry) -> Tensor:
    """A view of the windows over the axes from ``first`` on, with the taps on axes behind all others."""
    behind = x.dim()
    for axis, (k, stride, dilation) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True), start=first
    ):
        x = x.unfold(axis, (k - 1) * dilation + 1, stride)
    for axis, step in enumerate(geometry.dilation, start=behind):
        x = x[(slice(None),) * axis + (slice(None, None, step),)]
    return x


_FEW = 8  # neighbours that are copied at once: with fewer, every entry is looked up by itself


def _looked_up(x: Tensor, geometry: Geometry, positions: Size) -> Tensor:
    """The same by the number of each entry in its channel."""
    few = geometry.kernel.numel() * positions.numel() <= _KEPT
    few = few and type(x) is Tensor and not torch.is_inference_mode_enabled()  # no tensors of other kinds are kept
    places = (_places_kept if few else _places)(x.shape[2:], geometry, positions)
    found = x.flatten(2).flatten(0, 1).index_select(1, places)
    return found.view(len(x), geometry.groups, geometry.shape[1:].numel(), positions.numel()).transpose(2, 3)


def _places(sizes: Size, geometry: Geometry, positions: Size) -> Tensor:
    """Number of each window's entries in a flattened channel, ``[K L]``."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    firsts = offsets = torch.zeros(1, dtype=torch.long, device="cpu")
    for axis, stride in enumerate(strides):
        step = stride * geometry.stride[axis]
        firsts = (firsts[:, None] + step * torch.arange(positions[axis], device="cpu")).flatten()
        taps = stride * geometry.dilation[axis] * torch.arange(geometry.kernel[axis], device="cpu")
        offsets = (offsets[:, None] + taps).flatten()
    return (offsets[:, None] + firsts).flatten()


_KEPT = 2**14  # numbers, which are computed in many small steps, that are kept for the next call
_places_kept = lru_cache(maxsize=64)(_places)


def by_offsets(x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    """One batched product for each tap of the kernel, ``[K, N groups, C_out / groups, C_in / groups]``; no unfolding.

    On the grid of the padded input, flattened, moving the window by an offset is moving it by a number: what a tap
    meets is a slice of each channel. For the positions between the rows ``g`` is filled up with zeros.

    Returns:
        The gradients, tap by tap; see `from_offsets`.
    """
    phases, grid = _phases(x, geometry)
    steps = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    size = sum((length - 1) * step for length, step in zip(g.shape[2:], steps, strict=True)) + 1
    filled = _onto(g, grid).unflatten(1, (geometry.groups, -1)).flatten(0, 1)[:, :, :size]
    inputs = phases.unflatten(2, (geometry.groups, -1)).flatten(1, 2)  # [phases, N groups, C_in / groups, grid]
    offsets = geometry.offsets()
    out = g.new_empty(len(offsets), *filled.shape[:2], inputs.shape[2])
    for tap, offset in zip(out, offsets, strict=True):
        phase, shift = 0, 0
        for o, s, step in zip(offset, geometry.stride, steps, strict=True):
            phase, shift = phase * s + o % s, shift + o // s * step
        short_sums(filled, inputs[phase, :, :, shift : shift + size].transpose(1, 2), out=tap)
    return out


def from_offsets(value: Tensor, geometry: Geometry) -> Tensor:
    """The result of `by_offsets`, as ``[K, N, groups C_out / groups C_in / groups]``, in the order ``[N, *shape]``."""
    taps, n, _ = value.shape
    value = value.view(taps, n, geometry.groups, -1, geometry.shape[1]).permute(1, 2, 3, 4, 0)
    return value.reshape(n, *geometry.shape)


def by_products(x: Tensor, g: Tensor, geometry: Geometry, out: Tensor) -> None:
    """One product of what each tap meets and ``g``, entry by entry, and its sums; for groups of one input channel.

    Args:
        x: The padded input.
        g: Gradient of the output.
        geometry: One with ``C_in / groups`` of 1.
        out: Where to write the gradients, tap by tap, ``[K, N, C_out]``; see `from_offsets`.
    """
    factor = g.unflatten(1, (geometry.groups, -1))
    for into, offset in zip(out, geometry.offsets(), strict=True):
        met = x
        for axis, (o, step, length) in enumerate(zip(offset, geometry.stride, g.shape[2:], strict=True), start=2):
            met = met[(slice(None),) * axis + (slice(o, o + (length - 1) * step + 1, step),)]
        torch.sum((met.unsqueeze(2) * factor).flatten(3), 3, out=into.view(factor.shape[:3]))


def has_rows(geometry: Geometry) -> bool:
    """Whether `by_rows` can be asked: several axes, no dilation, and kernels that strides divide."""
    divided = all(k % s == 0 for k, s in zip(geometry.kernel, geometry.stride, strict=True))
    return divided and len(geometry.kernel) > 1 and all(d == 1 for d in geometry.dilation)


def by_rows(x: Tensor, g: Tensor, geometry: Geometry, out: Tensor) -> None:
    """One batched product for each step of the kernel along its first axis.

    The pixels that a strided window meets at the same tap are channels of an image that is smaller by the stride, over
    which the kernel, smaller as well, moves by ones. Only its other axes are unfolded: along the first one, moving by
    a row is moving by a number, and what a step meets is a slice.

    Args:
        x: The padded input.
        g: Gradient of the output.
        geometry: One that `has_rows`.
        out: Where to write the gradients, step by step, ``[M, N groups, C_out / groups, F]``; see `from_rows`.
    """
    positions, steps = g.shape[2:], _steps(geometry)
    grid = [length + m - 1 for length, m in zip(positions, steps, strict=True)]
    phases = _split(x, geometry, grid)  # [N groups, C_in / groups * prod(stride), *grid]
    batch, channels, width = len(phases), phases.shape[1], positions[1:].numel()
    for axis, m in enumerate(steps[1:], start=3):
        phases = phases.unfold(axis, m, 1)  # [..., *grid, *steps after the first]
    dims = len(grid)
    order = (0, 1, *range(2 + dims, 1 + 2 * dims), *range(2, 2 + dims))
    rows = phases.permute(order).reshape(batch, channels * math.prod(steps[1:]), grid[0] * width)
    factor = g.unflatten(1, (geometry.groups, -1)).flatten(0, 1).flatten(2)
    for step, into in enumerate(out):
        short_sums(factor, rows[:, :, step * width : (step + positions[0]) * width].mT, out=into)


def from_rows(value: Tensor, geometry: Geometry) -> Tensor:
    """The result of `by_rows`, as ``[M, N, groups C_out / groups F]``, in the order ``[N, *shape]``."""
    steps, strides, dims = _steps(geometry), geometry.stride, len(geometry.stride)
    value = value.view(steps[0], value.shape[1], geometry.shape[0], geometry.shape[1], *strides, *steps[1:])
    order = [1, 2, 3, 0, 4]
    for axis in range(1, dims):
        order += [3 + dims + axis, 4 + axis]
    return value.permute(order).reshape(value.shape[1], *geometry.shape)


def _steps(geometry: Geometry) -> list[int]:
    """By how many ones the kernel of `by_rows` moves along each axis."""
    return [k // s for k, s in zip(geometry.kernel, geometry.stride, strict=True)]


def _split(x: Tensor, geometry: Geometry, grid: list[int]) -> Tensor:
    """The pixels of each phase of the stride side by side, as channels: ``[N groups, C_in / groups * S, *grid]``."""
    sizes = [size * s for size, s in zip(grid, geometry.stride, strict=True)]
    for axis, size in enumerate(sizes, start=2):
        x = x.narrow(axis, 0, size)  # pixels beyond are met by no window
    x = x.unflatten(1, (geometry.groups, -1)).flatten(0, 1)
    if all(s == 1 for s in geometry.stride):
        return x
    dims = len(grid)
    for axis, s in reversed(list(enumerate(geometry.stride, start=2))):
        x = x.unflatten(axis, (-1, s))
    order = (0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2))
    return x.permute(order).flatten(1, 1 + dims)


def _phases(x: Tensor, geometry: Geometry) -> tuple[Tensor, list[int]]:
    """The pixels that a strided window can meet at the same tap side by side: ``[prod(stride), N, C, grid]``."""
    sizes, strides = x.shape[2:], geometry.stride
    if all(s == 1 for s in strides):
        return x.flatten(2)[None], list(sizes)
    grid = [-(-size // s) for size, s in zip(sizes, strides, strict=True)]
    missing = [(0, a * s - size) for a, s, size in zip(grid, strides, sizes, strict=True)]
    x = F.pad(x, [amount for pair in reversed(missing) for amount in pair])
    for axis, s in reversed(list(enumerate(strides, start=2))):
        x = x.unflatten(axis, (-1, s))
    dims = len(strides)
    order = (*range(3, 3 + 2 * dims, 2), 0, 1, *range(2, 2 + 2 * dims, 2))
    return x.permute(order).flatten(0, dims - 1).flatten(3), grid


def _onto(g: Tensor, grid: list[int]) -> Tensor:
    """The gradient on the grid of the input, flattened: ``[N, C, ...]``."""
    missing = [(0, a - b) for a, b in zip(grid[1:], g.shape[3:], strict=True)]
    return F.pad(g, [amount for pair in reversed(missing) for amount in pair]).flatten(2)


def pixel_gram(x: Tensor, g: Tensor, geometry: Geometry, before: Sequence[int] | None = None) -> Inner:
    """Inner products of the positions, from the Gram matrix of the pixels.

    ``<window_t, window_s> = sum over offsets o of <x[t stride + o], x[s stride + o]>``: a sum of shifted blocks of one
    Gram matrix, which costs less by the size of the kernel than that of the windows. They are added axis by axis.

    Args:
        x: The input, which may be without what is padded with zeros: that has no share in any product.
        g: Gradient of the output.
        geometry: Shape of the convolution.
        before: How many zeros are thought to be before each axis of the input; behind it as many as are met.

    Returns:
        What `perexample._norms.gram_norms` returns of the windows.
    """
    before = before or [0] * len(geometry.kernel)
    per_example = geometry.groups * max(x.shape[2:].numel(), g.shape[2:].numel()) ** 2
    block = gram_block(x, per_example)
    return joined([_pixel_gram(a, b, geometry, before) for a, b in zip(x.split(block), g.split(block), strict=True)], x)


def _pixel_gram(x: Tensor, g: Tensor, geometry: Geometry, before: Sequence[int]) -> Inner:
    sizes, length = x.shape[2:], g.shape[2:]
    flat = x.unflatten(1, (geometry.groups, -1)).flatten(0, 1).flatten(2)
    total = (flat.mT @ flat).view(-1, *sizes, *sizes)
    for axis, positions in enumerate(length):
        total = _added_along(total, axis, positions, geometry, before[axis])
    factor = g.unflatten(1, (geometry.groups, -1)).flatten(0, 1).flatten(2)
    shape = (len(x), geometry.groups, length.numel(), length.numel())
    off = gram_drift(x.dtype, flat.shape[1] + sum(geometry.kernel), factor.shape[1])
    return of_grams(total.reshape(shape), (factor.mT @ factor).view(shape), off)


def _added_along(total: Tensor, axis: int, positions: int, geometry: Geometry, before: int) -> Tensor:
    """The sum over the offsets of one axis: axis by axis fewer numbers are added than for all offsets at once."""
    axes, step, blocks = (1 + axis, 1 + axis + len(geometry.kernel)), geometry.stride[axis], []
    for k in range(geometry.kernel[axis]):
        offset = k * geometry.dilation[axis] - before
        first = max(0, -(offset // step))  # what is before it, and from the last on, meets zeros
        last = min(positions, (total.shape[axes[0]] - 1 - offset) // step + 1)
        if first < last:
            reach = slice(first * step + offset, (last - 1) * step + offset + 1, step)
            blocks.append((_on(total, axes, reach), slice(first, last)))
    blocks.sort(key=lambda block: block[1].start - block[1].stop)  # those of all positions first
    whole = [block for block, at in blocks if at == slice(0, positions)]
    if len(whole) == len(blocks) == 1:
        return whole[0]
    if len(whole) > 1:
        added = torch.add(whole[0], whole[1])
    else:
        sizes = [positions if at in axes else size for at, size in enumerate(total.shape)]
        added = total.new_empty(sizes).copy_(whole[0]) if whole else total.new_zeros(sizes)
    for block, at in blocks[min(len(whole), 2) :]:
        _on(added, axes, at).add_(block)
    return added


def _on(t: Tensor, axes: tuple[int, int], reach: slice) -> Tensor:
    """A part of a tensor, the same on both axes."""
    index = [slice(None)] * t.dim()
    index[axes[0]] = index[axes[1]] = reach
    return t[tuple(index)]
