"""Nodes of autograd's graph, and what they have saved."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .._looks import holds
from .backward import saves_otherwise

with torch.inference_mode(False), torch.enable_grad():  # whatever holds where this is imported
    _LEAF: Any = type(get_gradient_edge(torch.empty(0, requires_grad=True, device="cpu")).node)


def leaf_of(node: Any) -> Tensor | None:
    """The leaf at which a graph node adds up gradients; ``None`` for any other node."""
    return node.variable if type(node) is _LEAF else None


def metadata(node: Node) -> dict[str, Any]:
    """The dictionary that a graph node carries; public, but typed as a method."""
    return node.metadata  # type: ignore[return-value]


def is_named_by_kind(node: Node) -> bool:
    """Whether a graph node is of torch's own, and all nodes of its class have the same name."""
    kind = type(node)
    return kind.__module__ == "builtins" and kind.__name__ == node.name()


def output_shape(node: Node, number: int) -> torch.Size | None:
    """Shape of what a graph node gave, of several the one of this number; ``None`` where it does not tell."""
    known = getattr(node, "_input_metadata", ())
    return torch.Size(known[number].shape) if number < len(known) else None


def ones_for(edge: GradientEdge) -> Tensor:
    """Ones in the form of what a graph node gave."""
    known = edge.node._input_metadata[edge.output_nr]
    return torch.ones(torch.Size(known.shape), dtype=known.dtype, device=known.device)


def saved(node: Node, name: str) -> Any:
    """What a graph node has saved under a name; ``None`` where it has nothing, or the graph is freed."""
    try:
        return getattr(node, f"_saved_{name}", None)
    except RuntimeError:
        return None


_OPTIONS: dict[type, list[str]] = {}


def options_of(node: Node) -> list[Any]:
    """What a graph node has saved that is no tensor: axes, sizes, numbers; without names."""
    if type(node) not in _OPTIONS:
        names = [name for name in dir(node) if name.startswith("_saved_")]
        _OPTIONS[type(node)] = [name for name in names if not hasattr(type(node), f"_raw{name}")]
    return [saved(node, name.removeprefix("_saved_")) for name in _OPTIONS[type(node)]]


def looked_up(node: Node) -> tuple[Tensor, int] | None:
    """What a graph node has looked up along the first axis of one tensor.

    Returns:
        Which entries, none of them negative, and the one that gets no gradient, -1 if there is none; ``None`` if the
        node does something else, or does not tell without being asked only once, as under an activation checkpoint.
    """
    notes: Any = node
    try:
        if node.name() == "EmbeddingBackward0":
            raw, ids, padding = notes._raw_saved_indices, lambda: notes._saved_indices, notes._saved_padding_idx
            if notes._saved_scale_grad_by_freq or (padding >= 2**63 and padding != 2**64 - 1):
                return None
            padding = -1 if padding >= 2**63 else padding
        elif node.name() == "IndexSelectBackward0" and notes._saved_dim == 0:
            raw, ids, padding = notes._raw_saved_index, lambda: notes._saved_index, -1
        elif node.name() == "IndexBackward0" and len(notes._raw_saved_indices) == 1:
            raw, ids, padding = notes._raw_saved_indices[0], lambda: notes._saved_indices[0], -1
        else:
            return None
        if not isinstance(raw.data, Tensor):  # kept by a hook
            return None
        found = ids()
    except (AttributeError, RuntimeError):  # an older torch; a graph that is gone, or ids that were written to
        return None
    if found.dtype not in (torch.long, torch.int) or not holds(found >= 0):
        return None
    return found.long(), padding


def norm_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Means and inverse deviations that a group or layer norm has computed for its output, where it kept them."""
    node = output.grad_fn
    if node is None or node.name() not in ("NativeGroupNormBackward0", "NativeLayerNormBackward0") or saves_otherwise():
        return None
    saved = cast("Any", node)
    return saved._saved_result1, saved._saved_result2


# Losses whose graph node keeps the reduction it was called with; 1 is "mean" and 2 is "sum" in ATen.
_REDUCTION = {1: "mean", 2: "sum"}


def loss_reduction_of(node: object) -> str | None:
    """The reduction that a loss node was called with, where the node remembers it."""
    return _REDUCTION.get(getattr(node, "_saved_reduction", -1))


def sums_losses(node: Node) -> bool:
    """Whether a node is the plain sum of losses that were not reduced."""
    before = node.next_functions[0][0] if node.name() == "SumBackward0" else None
    return before is not None and getattr(before, "_saved_reduction", -1) == 0


def mean_is_over(node: object, reduction: str = "mean") -> tuple[float, Tensor, int] | None:
    """What a mean cross-entropy divided by (a sum: would have), its targets, and the one ignored, where it is known."""
    if loss_reduction_of(node) != reduction:
        return None
    try:
        total, target = getattr(node, "_saved_total_weight", None), getattr(node, "_saved_target", None)
    except RuntimeError:  # the graph is freed
        return None
    if total is None or target is None:
        return None
    ignored = getattr(node, "_saved_ignore_index", -100)  # without its sign
    return float(total), target, ignored - 2**64 if ignored >= 2**63 else ignored


def handed_through(node: Node) -> bool:
    """Whether a node only hands tensors through, for full backward hooks."""
    return node.name() == "BackwardHookFunctionBackward"


def reentrant_checkpoint(node_name: str) -> bool:
    """Whether a graph node is a reentrant activation checkpoint, whose inner graph cannot be seen."""
    return node_name == "CheckpointFunctionBackward"
