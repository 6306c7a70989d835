"""Single tensors: their memory, versions and views, and the precision of their products."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place."""
    return tensor._version


def gradient_hooks(tensor: Tensor) -> dict | None:
    """The tensor's gradient hooks, which run in their order and may change the gradient."""
    return tensor._backward_hooks


def hooks_after_gradient(tensor: Tensor) -> dict | None:
    """The tensor's hooks that are called when its gradient was added to ``grad``."""
    return tensor._post_accumulate_grad_hooks


def memory_order(tensor: Tensor) -> list[int] | None:
    """The axes in the order in which they lie in memory; ``None`` if there are gaps or entries shown twice."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    return order if tensor.permute(order).is_contiguous() else None


def whole_base(tensor: Tensor) -> Tensor:
    """The tensor that this one shows entirely, if it is a view, be it in another order of axes; else the tensor itself.

    A view that is written to gets a new place in the graph, its base keeps its own.

    Returns:
        The base, or the tensor.
    """
    base = tensor._base
    if base is None or base.grad_fn is None or base.numel() != tensor.numel():
        return tensor
    return base if base.is_contiguous() and memory_order(tensor) is not None else tensor


def shown_by(tensor: Tensor, leaf: Tensor) -> bool:
    """Whether a tensor is a view of this leaf as it lies now, which has no gaps, and shows its entries as they are."""
    same = tensor._base is leaf and tensor.dtype == leaf.dtype and leaf.is_contiguous()
    if not same or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()  # its data may have been replaced


def is_python_number(scalar: Tensor) -> bool:
    """Whether a tensor without axes stands for a number that was given as such: it yields to all other types."""
    other = torch.int8 if scalar.dtype != torch.int8 else torch.uint8
    if scalar.is_floating_point() or scalar.is_complex():
        other = torch.float16 if scalar.dtype != torch.float16 else torch.bfloat16
    return scalar.dim() == 0 and torch.result_type(torch.zeros((), dtype=other, device=scalar.device), scalar) == other


def in_memory(t: Tensor) -> Tensor:
    """A tensor, as a new one if it is a zero of autograd's without memory, as the gradient of ``torch.sgn`` is."""
    return t.clone() if t._is_zerotensor() else t


def memory_of(t: Tensor) -> int:
    """Where a tensor lies; 0 if that cannot be told."""
    return 0 if t.layout is not torch.strided or t._is_zerotensor() else t.untyped_storage().data_ptr()


def value_of(scalar: Tensor) -> float:
    """The number that a tensor of one entry holds; dispatch modes cannot be asked for that of a Python number."""
    hidden = torch._C._DisableTorchDispatch() if type(scalar) is Tensor else nullcontext()
    with hidden:
        return float(scalar)


def added_up(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``left[k] + right[k]`` for all k, new tensors, in few calls for many small ones, as torch's optimizers do it."""
    return list(torch._foreach_add(list(left), list(right))) if left else []


def float32_precision(library: str, what: str) -> str:
    """What float32 products are rounded to, ``"tf32"`` or ``"bf16"``; ``"ieee"`` or ``"none"`` if to nothing less.

    The properties of ``torch.backends`` tell the same, in ten times the time.

    Args:
        library: ``"cuda"`` or ``"mkldnn"``.
        what: ``"matmul"``, ``"conv"`` or ``"rnn"``.

    Returns:
        The name.
    """
    return torch._C._get_fp32_precision_getter(library, what)


def set_float32_precision(library: str, what: str, value: str) -> None:
    """Set what `float32_precision` tells."""
    torch._C._set_fp32_precision_setter(library, what, value)
