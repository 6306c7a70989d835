"""Rules for convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor, nn

from .._conv import Geometry
from ..rule import Bound, Call, Rule, Sizes, named_arguments, only_parameters, register_rule
from ..terms import Dense, Term, Windows
from ..terms.windows import pad


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
        geometry = Geometry(call.params["weight"].shape, module.stride, module.dilation, module.groups)
        return Windows(call.x, g, geometry, _padding(module), module.padding_mode)

    def most_held(self, sizes: Sizes) -> int:
        """Input and upstream gradient; windows, where they are put together with those of other calls."""
        windows = sizes.params["weight"][0].numel() * sizes.upstream if "weight" in sizes.shared else 0
        return sizes.factors + windows + sizes.biases

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

    def most_held(self, sizes: Sizes) -> int:
        """Input and upstream gradient, which is padded."""
        [out], padding = sizes.outputs, sizes.module.padding
        spatial = [length + 2 * p for length, p in zip(out[2:], padding, strict=True)]
        return super().most_held(replace(sizes, outputs=[Size((*out[:2], *spatial))]))

    def windows(self, call: Call, g: Tensor) -> Term:
        """``g``, padded, is the input of the correlation and ``x`` the gradient; what no window reaches is cut off."""
        module, x = call.module, call.x
        padded = pad(g, [(p, p) for p in module.padding], "zeros")
        for axis, (length, k, s, d) in enumerate(
            zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True), start=2
        ):
            padded = padded.narrow(axis, 0, (length - 1) * s + (k - 1) * d + 1)
        return Windows(padded, x, Geometry(call.params["weight"].shape, module.stride, module.dilation, module.groups))


def _padding(module: Any) -> list[tuple[int, int]]:
    """What is added before and after each axis; ``'same'`` puts an odd one at the end."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in module.padding]


def _tuple(value: Any, dims: int) -> Any:
    """One number for each axis, or the name of a padding."""
    if isinstance(value, str):
        return value
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value
