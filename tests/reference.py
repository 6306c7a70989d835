"""Per-example gradients the slow and obvious way: one `torch.autograd.grad` per example, and what follows from them.

Nothing here is shared with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for part in tree for t in tensors(part)] if isinstance(tree, (tuple, list)) else []


def rebuilt(tree: Any, leaves: list[Tensor]) -> Any:
    """The same nesting with other tensors, taken from the front of ``leaves``."""
    if isinstance(tree, Tensor):
        return leaves.pop(0)
    if isinstance(tree, dict):
        return {key: rebuilt(value, leaves) for key, value in tree.items()}
    return type(tree)(rebuilt(part, leaves) for part in tree) if isinstance(tree, (tuple, list)) else tree


def example(inputs: tuple, n: int, axes: Sequence[int | None] | None = None) -> tuple:
    """Inputs of example n alone; examples lie on axis 0, or on ``axes``; ``None`` is for what all examples share."""
    leaves = tensors(inputs)
    axes = [0] * len(leaves) if axes is None else axes
    return rebuilt(inputs, [t if a is None else t.narrow(a, n, 1) for t, a in zip(leaves, axes, strict=True)])


def grad_batch(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    inputs: tuple,
    n: int,
    *,
    target: Any = None,
    cut: Callable[[tuple, int], tuple] = example,
    forward: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """``{name: [N, *p.shape]}``: row i is the gradient of ``loss(model(inputs of example i), target of example i)``.

    The loss reduces over the examples it is given; of a single one, the mean and the sum are the same.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_leaf}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(n):
        one = cut(inputs, i)
        output = model(*one) if forward is None else forward(model, *one)
        value = loss(output, None if target is None else target[i : i + 1])
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for (name, p), grad in zip(named.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if grad is None else grad.to_dense())
    return {name: torch.stack(rows[name]) if n else p.new_zeros(0, *p.shape) for name, p in named.items()}


def batch_l2(gradients: Tensor) -> Tensor:
    """Squared norms, ``[N]``."""
    return torch.stack([(row * row).sum() for row in gradients]) if len(gradients) else gradients.new_zeros(0)


def sum_grad_squared(gradients: Tensor) -> Tensor:
    """Elementwise sum of squares, ``[*p.shape]``."""
    return (gradients * gradients).sum(0)


def variance(gradients: Tensor) -> Tensor:
    """Elementwise variance divided by N; zeros for no example."""
    if not len(gradients):
        return gradients.new_zeros(gradients.shape[1:])
    mean = gradients.sum(0) / len(gradients)
    return ((gradients - mean) ** 2).sum(0) / len(gradients)


def batch_dot(gradients: Tensor) -> Tensor:
    """Inner products, ``[N, N]``."""
    out = gradients.new_zeros(len(gradients), len(gradients))
    for i, a in enumerate(gradients):
        for j, b in enumerate(gradients):
            out[i, j] = (a * b).sum()
    return out


def joint_norms(gradients: dict[str, Tensor], n: int) -> Tensor:
    """Norms over all parameters together, ``[N]``."""
    total = torch.zeros(n, dtype=torch.float64)
    for rows in gradients.values():
        total = total + batch_l2(rows).cpu()
    return total.sqrt()


def clipped_sum(gradients: dict[str, Tensor], n: int, bound: float) -> dict[str, Tensor]:
    """``sum_n min(1, C / ||g_n||) g_n`` with the joint norm."""
    factors = [min(1.0, bound / norm) if norm > 0 else 1.0 for norm in joint_norms(gradients, n).tolist()]
    sums = {name: rows.new_zeros(rows.shape[1:]) for name, rows in gradients.items()}
    for name, rows in gradients.items():
        for factor, row in zip(factors, rows, strict=True):
            sums[name] = sums[name] + factor * row
    return sums


def bound_near_median(gradients: dict[str, Tensor], n: int) -> float:
    """A clipping bound that shortens about half of the examples."""
    norms = joint_norms(gradients, n)
    return 0.9 * norms.median().item() if n and norms.median() > 0 else 1.0


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``max|a - b| / max(max|b|, 1e-12)``."""
    if not wanted.numel():
        return 0.0
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-12)).item()


def assert_close_report(found: Tensor, wanted: Tensor, tol: float, what: str = "") -> None:
    """Fail with the place, the values and the ratio of the worst entry where the relative error is above ``tol``."""
    assert found.shape == wanted.shape, f"{what}: shape {list(found.shape)} instead of {list(wanted.shape)}"
    error = relative_error(found, wanted)
    if error <= tol:
        return
    difference = (found.double() - wanted.double()).abs().nan_to_num(nan=float("inf"))
    worst = int(difference.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), wanted.shape)]
    a, b = found.flatten()[worst].item(), wanted.flatten()[worst].item()
    ratio = a / b if b else float("inf")
    wrong = int((difference > tol * wanted.double().abs().max().clamp_min(1e-12)).sum())
    raise AssertionError(
        f"{what}: relative error {error:.2e} > {tol:.0e}; {wrong} of {wanted.numel()} entries are off; worst at "
        f"{index}: found {a!r}, wanted {b!r}, ratio {ratio:.6g}"
    )
