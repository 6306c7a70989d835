"""Rule for PReLU, the activation with a trainable slope."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..rule import Bound, Call, Rule, register_rule
from ..terms import Dense, Term


@register_rule(nn.PReLU, F.prelu)
class PReLURule(Rule):
    """``y = max(0, x) + a min(0, x)``: slope ``sum g min(0, x)``, per channel if there are several slopes."""

    reads_parameters = False

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.prelu(input, weight)``."""
        if len(args) != 2 or args[1].dim() != 1:
            return None
        return Bound(SimpleNamespace(num_parameters=args[1].numel()), args[:1], {"weight": args[1]})

    def feature_axes(self, module: Any) -> int | None:
        """One slope for all leaves the axis of the examples free; one per channel binds the channels to axis 1."""
        return 0 if module.num_parameters == 1 else None

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """Small tensors, formed at once."""
        values = g * call.x.clamp_max(0)
        if call.module.num_parameters == 1:
            return {"weight": Dense(values.reshape(call.n, 1, -1).sum(2))}
        return {"weight": Dense(values.flatten(2).sum(2) if values.dim() > 2 else values)}
