"""The term of a convolution: windows of the input times the gradient of the output.

References:
    Rochette et al. 2019, arXiv:1912.06015 (per-example gradients as a convolution); Bu et al. 2022, arXiv:2205.10683
    (norms from unfolded inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from .._conv import (
    Geometry,
    by_offsets,
    by_parts,
    by_products,
    by_rows,
    examples_as_groups,
    from_offsets,
    from_rows,
    has_rows,
    native,
    one_by_one,
    parts_of,
    pixel_gram,
    windows,
    windows_by_taps,
)
from .._norms import drift, gram_norms, joined, norms_of, short_drift, summed_products, unfold_block
from .._trust import TRUSTED, inner, unit_of_products
from ..methods import ROOM, Choice, Method, choose, sameness, taken
from .base import Formed, Term, blockwise, keeping, remembering
from .grouping import rows_together
from .outer import Outer

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ARRANGED = 2**20  # numbers of gradients that may be formed in another order first; with more, room is what takes time
_MOST_DRIFT = 9e-5  # share of a sum that a native call over many positions may be off by
_BY_PIXELS, _BY_WINDOWS = "Gram matrices of the pixels", "Gram matrices of the windows"
_DROPPED = "per-example gradients"
_SUM_NATIVE, _SUM_OF_WINDOWS = "native weight gradient", "product with the windows"
_FEW_POSITIONS = 64  # of the output, up to which a sum may be faster as a product with the windows
_OFFSETS, _UNFOLDED = f"{_DROPPED}, kernel offsets", f"{_DROPPED}, unfolded"
_ROWS, _PRODUCTS = f"{_DROPPED}, kernel rows", f"{_DROPPED}, products by kernel offset"
_ONE_BY_ONE, _AS_GROUPS = f"{_DROPPED}, one by one", f"{_DROPPED}, examples as groups"


class Windows(Term):
    """Gradient of a convolution weight: ``G_n[k] = sum_l g_n[l] x_n[l stride + k dilation]`` within each group.

    Args:
        x: Input, ``[N, C_in, *S]``.
        g: Gradient of the output, ``[N, C_out, *L]``.
        geometry: Shape of the weight, stride, dilation and groups.
        sides: What is added before and after each axis of ``x``.
        mode: With what.
        shape: Shape of the parameter, where that has fewer axes than the windows.
    """

    def __init__(
        self,
        x: Tensor,
        g: Tensor,
        geometry: Geometry,
        sides: list[tuple[int, int]] | None = None,
        mode: str = "zeros",
        shape: Size | None = None,
    ) -> None:
        """Keep the factors; nothing is padded or unfolded yet."""
        self.x, self.g, self.n, self.shape, self.geometry = x, g, x.shape[0], shape or geometry.shape, geometry
        self.sides, self.mode = sides or [(0, 0)] * (x.dim() - 2), mode
        self.strategy = "model"  # for the way of a sum

    def factors(self) -> list[Tensor]:
        """Both."""
        return [self.x, self.g]

    def form(self) -> tuple[Any, ...]:
        """With the geometry."""
        return (*super().form(), self.geometry, tuple(self.sides), self.mode)

    def _like(self, x: Tensor, g: Tensor) -> Windows:
        return Windows(x, g, self.geometry, self.sides, self.mode, self.shape)

    def regrouped(self, owner: Tensor, n: int) -> Term:
        """The images of an example become slices of one with an axis more, over which the kernel has length one."""
        together = rows_together(owner, n) if self.x.dim() < 5 else None
        if together is None:
            return super().regrouped(owner, n)
        x, g = (together(t).transpose(1, 2) for t in (self.x, self.g))
        old, one = self.geometry, (1,)
        shape = Size((*old.shape[:2], 1, *old.kernel))
        geometry = Geometry(shape, one + old.stride, one + old.dilation, old.groups)
        return Windows(x, g, geometry, [(0, 0), *self.sides], self.mode, self.shape)

    def select(self, rows: Tensor) -> Windows:
        """Some examples only."""
        rows = rows.to(self.x.device)
        return self._like(self.x[rows], self.g[rows])

    def double(self) -> Windows:
        """In float64."""
        return self._like(self.x.double(), self.g.double())

    def padded(self) -> Tensor:
        """The input as the windows meet it."""
        return pad(self.x, self.sides, self.mode)

    def _for_native(self) -> tuple[Tensor, tuple[int, ...]]:
        """The input, and what zeros a native call is to add on both sides of it."""
        if self.mode == "zeros" and all(a == b for a, b in self.sides):
            return self.x, tuple(a for a, _ in self.sides)
        return self.padded(), (0,) * len(self.sides)

    def unfolded(self) -> Outer:
        """The same as outer products of output gradients and input windows."""
        groups = self.geometry.groups
        x = windows(self.padded(), self.geometry, self.g.shape[2:])
        return Outer(self.g.unflatten(1, (groups, -1)).flatten(3).transpose(2, 3), x, self.shape)

    def dense(self) -> Tensor:
        """The gradients, by the method that the model holds for the fastest."""
        if not self.n:
            return self.g.new_zeros(0, *self.shape)
        return self._likeliest().form(self).dense()

    def formed(self, choice: Choice) -> Tensor:
        """The gradients, by the fastest way."""
        if not self.n:
            return self.dense()
        ways = self._ways()
        if self.n * self.shape.numel() > _ARRANGED:
            ways = [way for way in ways if way.form in (Windows._by_unfolding, Windows._one_by_one, Windows._as_groups)]
        return choose(self, Choice(choice.strategy), [way.forming(self) for way in ways]).run()[0]

    def _likeliest(self) -> _Way:
        """The way that the model holds for the fastest."""
        return min(self._ways(), key=lambda way: way.method.seconds(self.g.device))

    def methods(self) -> list[Method]:
        """Gram matrices of the pixels or windows, and several ways to form the gradients."""
        n, groups, length = self.n, self.geometry.groups, self.g.shape[2:].numel()
        outputs, entries = self.shape[0] // groups, self.shape[1:].numel()
        pixels = self._pixels()
        held, rows = self.x.numel() + self.g.numel(), n * groups * length
        of_g, of_sum = rows * length * outputs, rows * outputs * entries
        found = [way.method for way in self._ways()]
        if length * self.unit() < TRUSTED:
            by_pixels = n * groups * pixels * pixels * self.shape[1] + of_g + of_sum
            by_windows = rows * length * entries + of_g + of_sum
            kernel = self.geometry.kernel
            found += [
                Method(_BY_PIXELS, self._by_pixels, by_pixels,
                       n * groups * (self._added() + 3 * length**2 + pixels**2), sum(kernel) + 8, held),
                Method(_BY_WINDOWS, self._by_windows, by_windows,
                       rows * (3 * length + 3 * entries), 10, held),
            ]  # fmt: skip
        least = min(found, key=lambda method: method.seconds(self.g.device))
        if least.held > ROOM * held:
            moved = 2 * of_sum / max(1, length)
            found.append(Method(_DROPPED, self._dropped, 2 * of_sum, moved, 8, held))
        return found

    def _pixels(self) -> int:
        return math.prod(size + a + b for size, (a, b) in zip(self.x.shape[2:], self.sides, strict=True))

    def _added(self) -> int:
        """Numbers that are read to add up the shifted blocks of one example's Gram matrix, axis by axis."""
        sizes, read = [size + a + b for size, (a, b) in zip(self.x.shape[2:], self.sides, strict=True)], 0
        for axis, (k, positions) in enumerate(zip(self.geometry.kernel, self.g.shape[2:], strict=True)):
            sizes[axis] = positions
            read += 2 * k * math.prod(sizes) ** 2
        return read

    def unit(self) -> float:
        """By the lengths of the products."""
        outputs, entries = self.shape[0] // self.geometry.groups, self.shape[1:].numel()
        return unit_of_products(self.g.dtype, self.g.shape[2:].numel(), outputs, entries)

    def drift(self) -> float:
        """That of the way that `dense` takes."""
        return self._likeliest().drift if self.n else 0.0

    def sameness(self) -> Any:
        """The factors' sizes and how they lie, and the geometry."""
        if type(self).methods is not Windows.methods:
            return None
        return type(self), sameness(self.x), sameness(self.g), self.geometry, tuple(self.sides), self.mode, self.shape

    def run(self, name: str) -> tuple[Tensor, Term]:
        """One of the methods."""
        form = _FORMS.get(name)
        if form is not None:
            return keeping(self, form(self), self._drift_of(form))
        own = {_BY_PIXELS: self._by_pixels, _BY_WINDOWS: self._by_windows, _DROPPED: self._dropped}
        return own[name]() if name in own else super().run(name)

    def _ways(self) -> list[_Way]:
        """Several ways to form the gradients."""
        n, groups, length = self.n, self.geometry.groups, self.g.shape[2:].numel()
        size, taps = n * self.shape.numel(), self.geometry.kernel.numel()
        products = size * length
        grid = products * self._pixels() / max(1, length * math.prod(self.geometry.stride))
        unfolded = n * groups * length * self.shape[1:].numel()
        factors = self.x.numel() + self.g.numel()
        read = taps * (self.x.numel() + self.g.numel() * grid / max(1, products)) / 4  # by every tap, and not written
        ways = [
            _Way(self, _OFFSETS, grid, 2 * size + factors + read, 2 * taps),
            _Way(self, _UNFOLDED, products, 2 * size + 3 * unfolded, 8),
        ]
        if self.geometry.shape[1] == 1:
            ways.append(_Way(self, _PRODUCTS, 0, 2 * size + taps * (2 * factors + self.g.numel()), 3 * taps))
        if has_rows(self.geometry):
            steps = self.geometry.kernel[0] // self.geometry.stride[0]
            ways.append(_Way(self, _ROWS, products, 2 * size + self.x.numel() + 3 * unfolded / steps, 6 + steps))
        if self._drift_of(Windows._as_groups) < _MOST_DRIFT:
            small, (parts, _) = math.prod(self.geometry.kernel) * 50 / max(1, length), parts_of(self.g.shape[2:])
            ways += [
                _Way(self, _ONE_BY_ONE, products, 3 * size * parts, 4 * n * parts),
                _Way(self, _AS_GROUPS, products * (1 + small), 2 * size * parts, 3 * parts),
            ]
        return ways

    def _drift_of(self, form: Callable[[Windows], Formed]) -> float:
        """Share of a sum that a way to form the gradients may be off by."""
        dtype, length = self.g.dtype, self.g.shape[2:].numel()
        if form is Windows._by_offsets:
            return short_drift(self._pixels(), self.g)
        if form in (Windows._by_unfolding, Windows._by_rows, Windows._by_products):
            return short_drift(length, self.g)
        parts, rows = parts_of(self.g.shape[2:])
        return drift(rows * self.g.shape[3:].numel() + parts - 1, dtype)

    def _by_offsets(self) -> Formed:
        geometry, shape = self.geometry, self.shape
        value = by_offsets(self.padded(), self.g, geometry)
        value = value.view(len(value), self.n, -1)
        return Formed(value, self.shape, lambda v: from_offsets(v, geometry).view(v.shape[1], *shape))

    def _by_products(self) -> Formed:
        geometry, shape = self.geometry, self.shape
        value = self.g.new_empty(geometry.kernel.numel(), self.n, shape[0])
        several = unfold_block(self.x, self.g[:1].numel())
        for x, g, out in zip(self.x.split(several), self.g.split(several), value.split(several, dim=1), strict=True):
            by_products(pad(x, self.sides, self.mode), g, geometry, out)
        return Formed(value, shape, lambda v: from_offsets(v, geometry).view(v.shape[1], *shape))

    def _blocks(self) -> list[Windows]:
        """The same by a few examples each, so many as can be unfolded at once."""
        entries = self.g.shape[2:].numel() * self.geometry.groups * self.geometry.shape[1:].numel()
        several = unfold_block(self.x, entries)
        if self.n <= several:
            return [self]
        return [self._like(x, g) for x, g in zip(self.x.split(several), self.g.split(several), strict=True)]

    def _by_unfolding(self) -> Formed:
        blocks, value = self._blocks(), self.g.new_empty(self.n, *self.shape)
        for block, out in zip(blocks, value.split([block.n for block in blocks]), strict=True):
            unfolded = block.unfolded()
            summed_products(unfolded.g, unfolded.x, out)
        return Formed(value[None].flatten(2), self.shape)

    def _by_rows(self) -> Formed:
        geometry, shape = self.geometry, self.shape
        steps, groups = geometry.kernel[0] // geometry.stride[0], geometry.groups
        unfolded = self.x.shape[1] * geometry.kernel[1:].numel() * self.g.shape[2:].numel()
        several = unfold_block(self.x, unfolded)
        value = self.g.new_empty(steps, self.n * groups, shape[0] // groups, shape[1:].numel() // steps)
        images = zip(self.x.split(several), self.g.split(several), value.split(several * groups, dim=1), strict=True)
        for x, g, out in images:
            by_rows(pad(x, self.sides, self.mode), g, geometry, out)
        value = value.view(steps, self.n, -1)
        return Formed(value, shape, lambda v: from_rows(v, geometry).view(v.shape[1], *shape))

    def _one_by_one(self) -> Formed:
        x, padding = self._for_native()
        return Formed(by_parts(one_by_one, x, self.g, self.geometry, padding)[None].flatten(2), self.shape)

    def _as_groups(self) -> Formed:
        x, padding = self._for_native()
        value = by_parts(examples_as_groups, x, self.g, self.geometry, padding)
        return Formed(value[None].flatten(2), self.shape)

    def _by_pixels(self) -> tuple[Tensor, Term]:
        if self.mode == "zeros":
            return remembering(self, inner(self, pixel_gram(self.x, self.g, self.geometry, [a for a, _ in self.sides])))
        return remembering(self, inner(self, pixel_gram(self.padded(), self.g, self.geometry)))

    def _by_windows(self) -> tuple[Tensor, Term]:
        found = [gram_norms(unfolded.g, unfolded.x) for unfolded in (block.unfolded() for block in self._blocks())]
        return remembering(self, inner(self, joined(found, self.g)))

    def _dropped(self) -> tuple[Tensor, Term]:
        way = self._likeliest()
        return blockwise(self, lambda term: way.form(term).dense(), way.drift)

    def magnitude(self) -> Tensor:
        """``sum_l |g_n[l]| |window_n[l]|``; the windows' norms are a convolution of the squares with ones."""
        geometry = self.geometry
        x, g = (t.unflatten(1, (geometry.groups, -1)) for t in (self.padded(), self.g))
        squares = x.double().square().sum(2)  # [N, groups, *S]; in float32 those of small numbers are lost
        ones = squares.new_ones(geometry.groups, 1, *geometry.kernel)
        convolve = _CONVOLUTION[self.g.dim() - 2]
        found = convolve(squares, ones, stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups)
        return (found.clamp_min(0).sqrt() * torch.linalg.vector_norm(g, dim=2, dtype=torch.float64)).flatten(1).sum(1)

    def magnitude_bound(self) -> Tensor:
        """``sqrt(m) |x_n| |g_n|``, where no value of x is in more than m windows."""
        geometry = self.geometry
        steps = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
        most = math.prod(-(-k // s) if d == 1 else k for k, s, d in steps)
        x = self.x if self.mode == "zeros" else self.padded()
        return math.sqrt(most) * norms_of(x.flatten(1)) * norms_of(self.g.flatten(1))

    def settled(self, choice: Choice) -> tuple[Tensor, Term]:
        """By the method that was chosen; the way of a sum that follows is chosen alike."""
        self.strategy = choice.strategy
        return super().settled(choice)

    def weighted_sum(self, w: Tensor) -> Tensor:
        """One native weight gradient for the whole batch, of ``w_n g_n``, or its product with the unfolded inputs."""
        weighted = self._like(self.x, self.g * w.view(-1, *[1] * (self.g.dim() - 1)))
        return weighted._sum_of_windows() if weighted._way_of_sum(self.strategy) else weighted._sum_native()

    def _way_of_sum(self, strategy: str) -> str:
        """The faster way to the sum of all gradients, if it is not the native one."""
        few, same = self.g.shape[2:].numel() <= _FEW_POSITIONS, self.sameness()
        if not few or self.geometry.groups > 1 or not self.n or same is None:
            return ""
        choice = Choice(strategy)
        name = taken("sum", same, choice, lambda: choose(self, choice, self._sums()))
        return "" if name == _SUM_NATIVE else name

    def described(self, choice: Choice) -> str:
        """With the way of the sum, unless the gradients are formed."""
        norms = super().described(choice)
        way = "" if norms in _FORMS else self._way_of_sum(choice.strategy)
        return f"{norms}, then {way}" if way else norms

    def _sums(self) -> list[Method]:
        """Both ways."""
        length, size = self.g.shape[2:].numel(), self.shape.numel()
        products, unfolded = self.n * size * length, self.n * length * self.shape[1:].numel()
        return [
            Method(_SUM_NATIVE, lambda: (self._sum_native(), self), products * (1 + 11 / length)),
            Method(_SUM_OF_WINDOWS, lambda: (self._sum_of_windows(), self), products, unfolded + 2 * size, 8),
        ]

    def _sum_native(self) -> Tensor:
        x, padding = self._for_native()
        return native(x, self.g, self.geometry, padding).view(self.shape)

    def _sum_of_windows(self) -> Tensor:
        """One matrix product; native calls are slow for many channels over few positions."""
        geometry, total = self.geometry, None
        room = max(self.shape.numel(), self.x.numel() + self.g.numel())
        several = max(1, room // (self.g.shape[2:].numel() * self.shape[1:].numel()))
        for x, g in zip(self.x.split(several), self.g.split(several), strict=True):
            unfolded = windows_by_taps(pad(x, self.sides, self.mode), geometry, g.shape[2:])
            factors = g.flatten(2).transpose(0, 1).flatten(1), unfolded.flatten(0, 2)
            total = torch.mm(*factors) if total is None else total.addmm_(*factors)
        assert total is not None
        channels_last = total.view(geometry.shape[0], *geometry.kernel, geometry.shape[1])
        return channels_last.movedim(-1, 1).contiguous().view(self.shape)


class _Way:
    """One way to form the gradients of a convolution.

    Attributes:
        form: Forms them.
        drift: Share of a sum that it may be off by.
        method: The norms of what was formed.
    """

    def __init__(self, term: Windows, name: str, products: float, moved: float, calls: int) -> None:
        form, size = _FORMS[name], term.n * term.shape.numel()
        self.form, self.drift = form, term._drift_of(form)
        self.method = Method(name, lambda: term.run(name), products, moved + size, calls + 4, size)

    def forming(self, term: Windows) -> Method:
        """The gradients without their norms."""
        of, form = self.method, self.form
        return Method(
            f"{of.name}, formed", lambda: (form(term).dense(), term), of.products, of.moved, of.calls, of.held
        )


_FORMS: dict[str, Callable[[Windows], Formed]] = {
    _OFFSETS: Windows._by_offsets,
    _UNFOLDED: Windows._by_unfolding,
    _ROWS: Windows._by_rows,
    _PRODUCTS: Windows._by_products,
    _ONE_BY_ONE: Windows._one_by_one,
    _AS_GROUPS: Windows._as_groups,
}


def pad(x: Tensor, sides: list[tuple[int, int]], mode: str) -> Tensor:
    """So much before and after each axis, zeros or what a padding mode of torch puts there."""
    flat = [amount for before_after in reversed(sides) for amount in before_after]
    if not any(flat):
        return x
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)
