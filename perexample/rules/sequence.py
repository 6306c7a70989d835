"""Rules for recurrent and attention layers: the generic one, told where these layers hold the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..rule import Call, register_rule
from .generic import GenericRule

_ATTENTION_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")


@register_rule(nn.RNN, nn.LSTM, nn.GRU)
class RecurrentRule(GenericRule):
    """Recurrent layers in either layout; the states hold the examples on axis 1."""

    def _axis(self, module: Any) -> int:
        return 0 if module.batch_first else 1

    def axes(self, call: Call, tensors: Sequence[Tensor]) -> list[int | None]:
        """The sequence first, then the states."""
        return [self._axis(call.module), *[1] * (len(tensors) - 1)]

    def input_axis(self, module: Any) -> int:
        """As `batch_first` says."""
        return self._axis(module)

    def output_axes(self, module: Any, outputs: Sequence[Any]) -> list[int]:
        """The same."""
        return [self._axis(module), *[1] * (len(outputs) - 1)]

    def capture(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """As for any module, but packed sequences have no axis of examples."""
        if isinstance((*args, *kwargs.values())[0], nn.utils.rnn.PackedSequence):
            return {"problem": "was called with a packed sequence, which has no axis of examples; pass it padded"}
        return super().capture(module, args, kwargs, output)
