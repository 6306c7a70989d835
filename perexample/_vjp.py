"""Many cotangents at once through one graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pulled_back(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of ``[M, ...]`` cotangents at once through a graph that stays; one by one where torch cannot."""
    live = [index for index, output in enumerate(outputs) if output.requires_grad]
    if not live:
        return [p.new_zeros(len(cotangents[0]), *p.shape) for p in inputs]
    outputs, cotangents = [outputs[index] for index in live], [cotangents[index] for index in live]

    def run(gs: Sequence[Tensor], batched: bool) -> list[Tensor]:
        lead = gs[0].shape[:1] if batched else ()
        with torch.enable_grad():
            grads = torch.autograd.grad(
                outputs, inputs, gs, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        pairs = zip(grads, inputs, strict=True)
        return [p.new_zeros(*lead, *p.shape) if grad is None else grad.to_dense() for grad, p in pairs]

    if len(cotangents[0]) == 1:
        return [grad.unsqueeze(0) for grad in run([g[0] for g in cotangents], False)]
    try:
        return run(cotangents, True)
    except RuntimeError:
        rows = [run([g[m] for g in cotangents], False) for m in range(len(cotangents[0]))]
        return [torch.stack(column) for column in zip(*rows, strict=True)]
