"""What is lost: tensors in which the examples cannot be told apart, and where that happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._private import metadata
from ..errors import UnsupportedModuleError
from ..place import Lost
from .state import STATE
from .table import put
from .tap import LOST


def lose(outputs: Iterable[Tensor], lost: Lost, *, meets: bool = False) -> None:
    """Mark outputs in which the examples cannot be told apart.

    A single number is what a loss is made of, and joins the examples rightly, unless they met before; so do several
    beside each other, but anything else must not reach the loss.
    """
    for t in outputs:
        put(t, lost)
        if ((t.numel() > 1 and not lost.beside) or lost.meets or meets) and t.grad_fn is not None:
            metadata(t.grad_fn).setdefault(LOST, lost)


def is_sparse(t: Tensor) -> bool:
    """Whether a tensor leaves out its zeros, in any layout."""
    return t.layout is not torch.strided and str(t.layout).startswith("torch.sparse")


def lost_if_sparse(record: Any, where: str, t: Tensor) -> Lost:
    """What stands for the result of a call that gives, or is given, a sparse tensor."""
    why = (
        f"{where} gives or is given a sparse tensor ({t.layout}), in which examples are not followed: make it dense "
        f"(`to_dense`, `torch.mm` for `torch.sparse.mm`), which computes the same."
    )
    return Lost(record, where, "", False, UnsupportedModuleError(why), meets=True)


def where() -> str:
    """What runs now, for messages."""
    if not STATE.frames:
        return "a part that a checkpoint repeats"
    return STATE.frames[-1].called
