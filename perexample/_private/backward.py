"""The backward that is under way, and what saves tensors for it otherwise, as activation checkpoints do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import Node


def graph_task() -> int:
    """The number of the backward that is under way in this thread, -1 if there is none."""
    return torch._C._current_graph_task_id()


def repeats_forward() -> bool:
    """Whether a backward is under way in this thread, in which a checkpoint runs a part of the forward again."""
    return graph_task() != -1


def will_be_executed(node: Node | None) -> bool:
    """Whether the backward that is under way wants the gradient that arrives at a node."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad was asked for
        return True


def saves_otherwise() -> bool:
    """Whether hooks are in force that save tensors in another way, such as on the CPU, or not at all."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def follow_recomputation(around: Callable[[], AbstractContextManager]) -> bool:
    """If an activation checkpoint is under way in this forward, run it again inside of a context.

    Its frame is found through the hook that packs saved tensors now.

    Returns:
        Whether there is one.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    if getattr(pack, "__closure__", None) is None or not pack.__qualname__.startswith("_checkpoint_hook"):
        return False
    frame = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))["frame"].cell_contents
    recompute = frame.recompute_fn
    if getattr(recompute, "perexample", False):
        return True

    def followed(*args: Any) -> None:
        with around():
            recompute(*args)

    followed.perexample = True  # type: ignore[attr-defined]
    frame.recompute_fn = followed
    return True
