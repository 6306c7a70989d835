"""Ways to the clipped sum of per-example gradients, all for the same private optimizer.

``clipped`` is this library's: one backward, nothing of size N times the model. The others are what one would do
without it, and give the same numbers: ``naive`` runs one backward for each example, ``materialised`` makes all
per-example gradients and clips them, ``vmap`` does that by ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perexample import perex
from perexample.extensions import BatchGrad, ClippedGrad

Found = tuple[Tensor, Tensor]  # losses [N], outputs [N, classes]


class OwnSums(ClippedGrad):
    """Clipped sums that were made by other means; norms and factors are those of `ClippedGrad`."""

    def __init__(self, max_norm: float, *, clip: str = "flat") -> None:
        super().__init__(max_norm, clip=clip)
        self._own: dict[nn.Parameter, Tensor] = {}
        self._count = 0

    @property
    def examples(self) -> int:
        """Number of examples in the sums under way."""
        return self._count

    def add(self, params: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Clip per-example gradients ``[N, *p]`` jointly, and add them up."""
        norms = torch.stack([g.double().flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        finite = norms.isfinite()
        factors = self._weights(norms, finite, float(self.max_norm))
        for p, g in zip(params, gradients, strict=True):
            rows = torch.where(finite.view(-1, *[1] * p.dim()), g, 0.0)  # 0 times NaN is NaN
            total = torch.tensordot(factors.to(g), rows, 1)
            self._own[p] = self._own[p] + total if p in self._own else total
        self.norms, self.nonfinite = norms, int((~finite).sum())
        self._count += len(norms)

    def consume(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """The sums; without any, those of no examples."""
        sums = [self._own.get(p, torch.zeros_like(p)) for p in params]
        self.zero_grad()
        return sums

    def zero_grad(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Forget the sums so far."""
        self._own.clear()
        self._count = 0


def predicted(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Found:
    """Losses and outputs; of ``y`` ``[N, K]`` the mean loss over K, and the first of K outputs."""
    output = model(x)
    losses = F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
    return (losses, output) if y.dim() == 1 else (losses.mean(1), output[:, 0])


def clipped(model: nn.Module, clipping: ClippedGrad, x: Tensor, y: Tensor, strategy: str = "measure") -> Found:
    """One backward of the mean loss."""
    with perex(clipping, grad=False, strategy=strategy):
        losses, output = predicted(model, x, y)
        losses.mean().backward()
    return losses.detach(), output.detach()


def naive(model: nn.Module, clipping: OwnSums, x: Tensor, y: Tensor) -> Found:
    """One forward and one backward for each example."""
    params, losses, outputs = trainable(model), [], []
    for i in range(len(x)):
        loss, output = predicted(model, x[i : i + 1], y[i : i + 1])
        gradients = torch.autograd.grad(loss, params, materialize_grads=True)
        clipping.add(params, [g.unsqueeze(0) for g in gradients])
        losses.append(loss.detach()[0])
        outputs.append(output.detach()[0])
    return torch.stack(losses), torch.stack(outputs)


def materialised(model: nn.Module, clipping: OwnSums, x: Tensor, y: Tensor) -> Found:
    """One backward that leaves every per-example gradient."""
    with perex(BatchGrad(), grad=False):
        losses, output = predicted(model, x, y)
        losses.mean().backward()
    params = trainable(model)
    clipping.add(params, [p.grad_batch for p in params])
    for p in params:
        del p.grad_batch
    return losses.detach(), output.detach()


def vmap(model: nn.Module, clipping: OwnSums, x: Tensor, y: Tensor) -> Found:
    """``torch.func.grad`` over all examples at once."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of(values: dict[str, Tensor], one: Tensor, label: Tensor) -> tuple[Tensor, Found]:
        bound = partial(torch.func.functional_call, model, values)
        loss, output = predicted(bound, one.unsqueeze(0), label.unsqueeze(0))
        return loss[0], (loss.detach()[0], output.detach()[0])

    every = torch.func.vmap(torch.func.grad(loss_of, has_aux=True), (None, 0, 0), randomness="different")
    gradients, found = every(params, x, y)
    named = dict(model.named_parameters())
    clipping.add([named[name] for name in gradients], list(gradients.values()))
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


BACKWARDS = {"clipped": clipped, "naive": naive, "materialised": materialised, "vmap": vmap}
