"""Rules for Linear and Bilinear.

References:
    Goodfellow 2015, arXiv:1510.01799, section 4 (norms); Bu et al. 2022, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rule import Bound, Call, Rule, Sizes, named_arguments, only_parameters, register_rule
from ..terms import Dense, Outer, Term, positions


def bias_term(g: Tensor) -> Dense:
    """``sum_t g_nt`` for a bias added at every position, from ``[N, *T, O]``."""
    return Dense(g if g.dim() == 2 else g.flatten(1, -2).sum(1))


def _is_full(bias: Any, outputs: int) -> bool:
    """Whether a bias, if there is one, has an entry for each output; torch broadcasts others."""
    return bias is None or tuple(bias.shape) == (outputs,)


@register_rule(nn.Linear, F.linear)
class LinearRule(Rule):
    """``y = x W^T + b``: weight ``G_n = sum_t g_nt x_nt^T``, bias ``sum_t g_nt``; x is ``[N, *T, I]``."""

    reads_parameters = False
    flattens = True

    def feature_axes(self, module: nn.Module) -> int:
        """The last axis holds the features."""
        return 1

    def covers(self, module: Any) -> bool:
        """Only weight and bias."""
        return only_parameters(module, "weight", "bias") and _is_full(module.bias, module.weight.shape[0])

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.linear(input, weight, bias)``."""
        named = named_arguments("input weight bias", args, kwargs)
        weight, params = named["weight"], {"weight": named["weight"], "bias": named.get("bias")}
        if weight.dim() != 2 or not _is_full(params["bias"], weight.shape[0]):
            return None
        return Bound(SimpleNamespace(weight=weight), (named["input"],), params)

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input; its values are not kept where the weight is frozen."""
        x = super().capture(module, args, kwargs, output)["x"]
        return {"x": x if module.weight.requires_grad else x.new_empty(*x.shape[:-1], 0)}

    def most_held(self, sizes: Sizes) -> int:
        """Input and upstream gradient."""
        return sizes.factors + sizes.biases

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """An outer product per position for the weight, a sum for the bias."""
        terms: dict[str, Term] = {}
        if "weight" in call.params:
            terms["weight"] = Outer(positions(g), positions(call.x), call.params["weight"].shape)
        if "bias" in call.params:
            terms["bias"] = bias_term(g)
        return terms


@register_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.addmm, Tensor.addmm)
class MatmulRule(Rule):
    """``y = x W``, with a bias for ``addmm``: weight ``G_n = sum_t x_nt g_nt^T``; x is ``[N, *T, I]``."""

    reads_parameters = False
    flattens = True

    def feature_axes(self, module: Any) -> int:
        """The last axis holds the features."""
        return 1

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``matmul(input, weight)``, or ``addmm(bias, input, weight)`` without factors."""
        if function.__name__ != "addmm":
            named = named_arguments("input other", args, kwargs)
            x, bias = named["input"], None
            weight: Tensor = named["other"] if "other" in named else named["mat2"]
        else:
            named = named_arguments("input mat1 mat2", args, kwargs)
            bias, x, weight = named["input"], named["mat1"], named["mat2"]
            if named.get("beta", 1) != 1 or named.get("alpha", 1) != 1 or not _is_full(bias, weight.shape[-1]):
                return None
        if x.dim() < 2 or weight.dim() != 2:
            return None
        return Bound(SimpleNamespace(), (x,), {"weight": weight, "bias": bias})

    def most_held(self, sizes: Sizes) -> int:
        """Input and upstream gradient."""
        return sizes.factors + sizes.biases

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """An outer product per position for the weight, a sum for the bias."""
        terms: dict[str, Term] = {}
        if "weight" in call.params:
            terms["weight"] = Outer(positions(call.x), positions(g), call.params["weight"].shape)
        if "bias" in call.params:
            terms["bias"] = bias_term(g)
        return terms


@register_rule(nn.Bilinear)
class BilinearRule(Rule):
    """``y_o = x1^T W_o x2 + b_o``: weight ``G_n = sum_t g_nt (x1_nt x2_nt^T)``, an outer product of g and x1 x2^T."""

    reads_parameters = False

    batched = ("x1", "x2")

    def feature_axes(self, module: nn.Module) -> int:
        """The last axis holds the features."""
        return 1

    def covers(self, module: nn.Module) -> bool:
        """Only weight and bias."""
        return only_parameters(module, "weight", "bias")

    def capture(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """Both inputs."""
        return dict(zip(("x1", "x2"), (*args, *kwargs.values()), strict=True))

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """The product of the inputs takes the place of a linear layer's input."""
        terms: dict[str, Term] = {}
        if "weight" in call.params:
            both = torch.einsum("n...i,n...j->n...ij", call.saved["x1"], call.saved["x2"]).flatten(-2)
            terms["weight"] = Outer(positions(g), positions(both), call.params["weight"].shape)
        if "bias" in call.params:
            terms["bias"] = bias_term(g)
        return terms
