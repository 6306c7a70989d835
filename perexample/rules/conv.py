"""Rules for convolutions and transposed convolutions in one, two and three dimensions.

References:
    Rochette et al. 2019, arXiv:1912.06015 (per-example gradients as a convolution); Bu et al. 2022, arXiv:2205.10683
    (norms from unfolded inputs).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .._norms import BLOCK, norms_of, squared_norms
from ..rule import Bound, Call, Rule, named_arguments, only_parameters, register_rule
from ..terms import Dense, Outer, Term, keeps, mended

_WEIGHT_GRADIENT = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}
_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Windows(Term):
    """Gradient of a convolution weight: ``G_n[k] = sum_l g_n[l] x_n[l stride + k dilation]`` within each group.

    Args:
        x: Input, padded already, ``[N, C_in, *S]``.
        g: Gradient of the output, ``[N, C_out, *L]``.
        shape: ``[C_out, C_in / groups, *K]``.
        stride: Step of the window, per axis.
        dilation: Distance of the kernel's taps, per axis.
        groups: Number of groups of channels.
    """

    def __init__(
        self, x: Tensor, g: Tensor, shape: Size, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
    ) -> None:
        """Keep the factors; nothing is unfolded yet."""
        self.x, self.g, self.n, self.shape = x, g, x.shape[0], shape
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self._dense: Tensor | None = None

    def _like(self, x: Tensor, g: Tensor) -> Windows:
        return Windows(x, g, self.shape, self.stride, self.dilation, self.groups)

    def select(self, rows: Tensor) -> Windows:
        """Some examples only."""
        rows = rows.to(self.x.device)
        return self._like(self.x[rows], self.g[rows])

    def double(self) -> Windows:
        """In float64."""
        return self._like(self.x.double(), self.g.double())

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Output positions L, and per group the outputs O and the window's entries K."""
        return self.g.shape[2:].numel(), self.shape[0] // self.groups, self.shape[1:].numel()

    def unfolded(self) -> Outer:
        """The same as outer products of output gradients and input windows."""
        n, groups, dims = self.n, self.groups, self.g.dim() - 2
        windows = self.x
        for axis in range(2, 2 + dims):
            reach = (self.shape[axis] - 1) * self.dilation[axis - 2] + 1
            windows = windows.unfold(axis, reach, self.stride[axis - 2])
        for axis, step in enumerate(self.dilation, start=2 + dims):
            windows = windows[(slice(None),) * axis + (slice(None, None, step),)]
        windows = windows.unflatten(1, (groups, self.shape[1]))  # [N, groups, C_in/groups, *L, *K]
        order = (0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        positions, outputs, entries = self._sizes
        x = windows.permute(order).reshape(n, groups, positions, entries)
        g = self.g.reshape(n, groups, outputs, positions).transpose(2, 3)
        return Outer(g, x, self.shape)

    def _native(self, x: Tensor, g: Tensor) -> Tensor:
        """The convolution's own weight gradient, summed over the examples given."""
        gradient = _WEIGHT_GRADIENT[x.dim() - 2]
        return gradient(x, list(self.shape), g, stride=self.stride, dilation=self.dilation, groups=self.groups)

    def dense(self) -> Tensor:
        """The gradients: a native call per example where unfolding would copy much, one batched product elsewhere."""
        if self._dense is not None:
            return self._dense
        if not self._unfolding_copies_much():
            return self.unfolded().dense()
        return torch.stack([self._native(x[None], g[None]) for x, g in zip(self.x, self.g, strict=True)])

    def _few_windows(self) -> bool:
        positions, outputs, entries = self._sizes
        return 2 * positions * (outputs + entries) < outputs * entries

    def norm_method(self) -> str:
        """By the number of windows."""
        return "Gram matrices of the windows" if self._few_windows() else "per-example gradients"

    def batch_l2(self) -> Tensor:
        """Squared norms, by the Gram matrices of the windows where these are few, else by the gradients."""
        positions, _, _ = self._sizes
        if self._few_windows():
            return self.unfolded().batch_l2()
        if keeps(self.shape.numel(), self.x[0].numel() + self.g[0].numel()):
            self._dense = self.dense()
            return mended(self, squared_norms(self._dense), positions)
        if not self._unfolding_copies_much():
            return self.unfolded().batch_l2()
        block = max(1, BLOCK // max(1, self.shape.numel()))
        parts = [self._like(self.x[i : i + block], self.g[i : i + block]) for i in range(0, self.n, block)]
        return mended(self, torch.cat([squared_norms(part.dense()) for part in parts]), positions)

    def _unfolding_copies_much(self) -> bool:
        positions, _, entries = self._sizes
        return positions * entries > 150_000  # where one call per example became faster, on CPU

    def magnitude(self) -> Tensor:
        """``sum_l |g_n[l]| |window_n[l]|``; the windows' norms are a convolution of the squares with ones."""
        x, g = (t.unflatten(1, (self.groups, -1)) for t in (self.x, self.g))
        squares = x.square().sum(2)  # [N, groups, *S]
        ones = squares.new_ones(self.groups, 1, *self.shape[2:])
        convolve = _CONVOLUTION[self.g.dim() - 2]
        windows = convolve(squares, ones, stride=self.stride, dilation=self.dilation, groups=self.groups)
        return (windows.clamp_min(0).sqrt() * torch.linalg.vector_norm(g, dim=2)).flatten(1).sum(1, dtype=torch.float64)

    def magnitude_bound(self) -> Tensor:
        """``sqrt(m) |x_n| |g_n|``, where no value of x is in more than m windows."""
        steps = zip(self.shape[2:], self.stride, self.dilation, strict=True)
        windows = math.prod(-(-k // s) if d == 1 else k for k, s, d in steps)
        return math.sqrt(windows) * norms_of(self.x.flatten(1)) * norms_of(self.g.flatten(1))

    def weighted_sum(self, w: Tensor) -> Tensor:
        """One native weight gradient for the whole batch, of ``w_n g_n``."""
        if self._dense is not None:
            return super().weighted_sum(w)
        return self._native(self.x, self.g * w.view(-1, *[1] * (self.g.dim() - 1)))


def _padding(module: Any) -> list[tuple[int, int]]:
    """What is added before and after each axis; ``'same'`` puts an odd one at the end."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in module.padding]


def _pad(x: Tensor, sides: list[tuple[int, int]], mode: str) -> Tensor:
    flat = [amount for before_after in reversed(sides) for amount in before_after]
    if not any(flat):
        return x
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)


def _tuple(value: Any, dims: int) -> Any:
    """One number for each axis, or the name of a padding."""
    if isinstance(value, str):
        return value
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d)
class ConvRule(Rule):
    """``y = conv(pad(x), W) + b``: the weight's gradient correlates input windows with g, the bias's sums g."""

    reads_parameters = False

    def covers(self, module: nn.Module) -> bool:
        """Only weight and bias."""
        return only_parameters(module, "weight", "bias")

    names = "input weight bias stride padding dilation groups"

    def handles(self, module: Any, args: tuple, kwargs: dict) -> bool:
        """Not a single image without an axis of examples."""
        x = (*args, *kwargs.values())[0]
        return x.dim() == len(module.kernel_size) + 2

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.conv*`` and ``F.conv_transpose*``, batched."""
        named = named_arguments(self.names, args, kwargs)
        x, weight = named["input"], named["weight"]
        if x.dim() != weight.dim():
            return None
        dims = weight.dim() - 2
        options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | named
        module = SimpleNamespace(
            weight=weight, kernel_size=tuple(weight.shape[2:]), padding_mode="zeros", groups=options["groups"]
        )
        for name in ("stride", "padding", "dilation"):
            setattr(module, name, _tuple(options[name], dims))
        return Bound(module, (x,), {"weight": weight, "bias": named.get("bias")})

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input; its values are not kept where the weight is frozen."""
        x = super().capture(module, args, kwargs, output)["x"]
        return {"x": x if module.weight.requires_grad else x.new_empty(x.shape[0], 0)}

    def windows(self, call: Call, g: Tensor) -> Term:
        """The weight's gradient as a correlation of the padded input with ``g``."""
        module = call.module
        x = _pad(call.x, _padding(module), module.padding_mode)
        return Windows(x, g, call.params["weight"].shape, module.stride, module.dilation, module.groups)

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """Windows for the weight, a sum over positions for the bias."""
        terms: dict[str, Term] = {}
        if "weight" in call.params:
            terms["weight"] = self.windows(call, g)
        if "bias" in call.params:
            terms["bias"] = Dense(g.flatten(2).sum(2))
        return terms


@register_rule(
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
class ConvTransposeRule(ConvRule):
    """The transpose of a convolution from output to input: the same correlation with x and g in exchanged roles."""

    names = "input weight bias stride padding output_padding groups dilation"

    def windows(self, call: Call, g: Tensor) -> Term:
        """``g``, padded, is the input of the correlation and ``x`` the gradient; what no window reaches is cut off."""
        module, x = call.module, call.x
        padded = _pad(g, [(p, p) for p in module.padding], "zeros")
        for axis, (length, k, s, d) in enumerate(
            zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True), start=2
        ):
            padded = padded.narrow(axis, 0, (length - 1) * s + (k - 1) * d + 1)
        return Windows(padded, x, call.params["weight"].shape, module.stride, module.dilation, module.groups)


__all__ = ["ConvRule", "ConvTransposeRule", "Windows"]
