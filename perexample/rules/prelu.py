"""Rule for PReLU, the activation with a trainable slope."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..rule import Call, Rule, register_rule
from ..terms import Dense, Term


@register_rule(nn.PReLU)
class PReLURule(Rule):
    """``y = max(0, x) + a min(0, x)``: slope ``sum g min(0, x)``, per channel if there are several slopes."""

    reads_parameters = False

    def feature_axes(self, module: Any) -> int | None:
        """One slope for all leaves the axis of the examples free; one per channel binds the channels to axis 1."""
        return 0 if module.num_parameters == 1 else None

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """Small tensors, formed at once."""
        values = g * call.x.clamp_max(0)
        if call.module.num_parameters == 1:
            return {"weight": Dense(values.reshape(call.n, 1, -1).sum(2))}
        return {"weight": Dense(values.flatten(2).sum(2) if values.dim() > 2 else values)}
