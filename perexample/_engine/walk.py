"""One walk of the graph below a loss: which taps are live, which parameters are not covered, which leaves remain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .._private import metadata, reentrant_checkpoint
from ..errors import LossError
from .tap import KEY, Tap


@dataclass
class Walk:
    """What was found.

    Attributes:
        taps: Live taps, with the numbers of the outputs that the loss depends on.
        edges: The graph edges at which the gradients of live taps arrive.
        uncovered: Trainable parameters reached otherwise than through a tap of their own.
        leaves: Other leaves that need a gradient, such as an input.
        losses: Nodes of cross-entropy losses outside of all taps.
        compiled: Whether a compiled region was met, inside of which no taps can lie.
    """

    taps: dict[Tap, set[int]] = field(default_factory=dict)
    edges: list[GradientEdge] = field(default_factory=list)
    uncovered: dict[int, nn.Parameter] = field(default_factory=dict)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    losses: list[Node] = field(default_factory=list)
    compiled: bool = False


def walk(roots: Iterable[Tensor]) -> Walk:
    """Walk from the loss to the leaves, in at each tap's output and on from its inputs."""
    found = Walk()
    seen: set[tuple[Node, int] | Node] = set()
    stack = [(root.grad_fn, root.output_nr) for root in roots if root.grad_fn is not None]
    while stack:
        node, number = stack.pop()
        tapped = metadata(node).get(KEY)
        mark = (node, number) if tapped else node
        if mark in seen:
            continue
        seen.add(mark)
        if tapped and number in tapped:
            tap, index = tapped[number]
            _enter(found, tap, index, GradientEdge(node, number))
            stack.extend((edge.node, edge.output_nr) for edge in tap.inputs)
            continue
        _note(found, node)
        if node.name().startswith("NllLoss"):
            found.losses.append(node)
        stack.extend((after, index) for after, index in node.next_functions if after is not None)
    return found


def _enter(found: Walk, tap: Tap, index: int, edge: GradientEdge) -> None:
    """Note a live output, and look for parameters inside the call that the tap does not answer for."""
    found.taps.setdefault(tap, set()).add(index)
    found.edges.append(edge)
    own = {id(p) for p in tap.params.values()}
    borders = {edge.node for edge in tap.inputs}
    stack, seen = [edge.node], set()
    while stack:
        node = stack.pop()
        if node in seen or node in borders:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) not in own:
            _note(found, node)
        stack.extend(after for after, _ in node.next_functions if after is not None)


def _note(found: Walk, node: Node) -> None:
    """Note a leaf, and refuse what hides a graph of its own."""
    variable = getattr(node, "variable", None)
    if isinstance(variable, nn.Parameter):
        found.uncovered[id(variable)] = variable
    elif isinstance(variable, Tensor):
        found.leaves[id(variable)] = variable
    elif reentrant_checkpoint(node.name()):
        raise LossError(
            "The loss depends on a reentrant activation checkpoint, whose inner graph cannot be seen; "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    elif node.name().startswith("CompiledFunction"):
        found.compiled = True
