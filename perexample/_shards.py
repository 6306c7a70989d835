"""Parameters that several processes keep in shards, as FSDP2 (``fully_shard``) does."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor

COMPUTES_WITH_PARTS = (
    "is a DTensor that fully_shard (FSDP2) has not made of an ordinary parameter of this model: tensor parallelism is "
    "not supported, and of a model that is kept in shards the whole has to be extended, not a part"
)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``, of which each process holds a part."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # not there yet: there are none
    return kind is not None and isinstance(tensor, kind)


def summed_into_shards(whole: Tensor, like: Tensor) -> Tensor:
    """Sum over processes, of which each keeps the part that it has of another tensor; collective.

    Args:
        whole: This process's summand, of the whole shape.
        like: A ``DTensor``.

    Returns:
        A ``DTensor`` laid out as ``like``.
    """
    from torch.distributed.tensor import DTensor, Partial

    sharded = cast("DTensor", like)
    summands = [Partial() for _ in range(sharded.device_mesh.ndim)]
    return DTensor.from_local(whole, sharded.device_mesh, summands, run_check=False).redistribute(
        placements=sharded.placements
    )


def freed(tensor: Tensor) -> bool:
    """Whether a tensor's memory was taken away, as that of parameters is between their uses."""
    return type(tensor) is torch.nn.Parameter and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0
