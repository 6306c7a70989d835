"""One walk of the graph below a loss: which taps are live, which parameters are not covered, which leaves remain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .._private import handed_through, leaf_of, metadata, reentrant_checkpoint
from ..errors import BatchAxisError, CrossExampleError, LossError
from ..place import Lost
from .state import STATE
from .table import made_inside, place_of
from .tap import KEY, LOST, Tap


@dataclass
class Walk:
    """What was found.

    Attributes:
        taps: Live taps, with the numbers of the outputs that the loss depends on.
        edges: The graph edges at which the gradients of live taps arrive.
        sources: Of each tensor that a live tap was given for a parameter, the parameters that it was computed from.
        uncovered: Trainable parameters reached otherwise than through a tap of their own.
        within: The taps inside of whose calls leaves were found that they do not answer for.
        leaves: Other leaves that need a gradient, such as an input.
        losses: Nodes of cross-entropy losses outside of all taps.
        compiled: Whether a compiled region was met, inside of which no taps can lie.
        lost: Where examples were mixed on the way to the loss, if they were.
    """

    taps: dict[Tap, set[int]] = field(default_factory=dict)
    edges: list[GradientEdge] = field(default_factory=list)
    sources: dict[int, Source] = field(default_factory=dict)
    uncovered: dict[int, nn.Parameter] = field(default_factory=dict)
    within: dict[int, Tap] = field(default_factory=dict)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    losses: list[Node] = field(default_factory=list)
    compiled: bool = False
    lost: Lost | None = None


@dataclass
class Source:
    """A tensor that a tap was given for a parameter, and the leaves of the graph that it was computed from.

    Attributes:
        tensor: The tensor; a parameter is its own only leaf.
        leaves: The leaves that need a gradient.
        problem: What depends on the batch in its graph, if anything does.
        opaque: Whether a function of the user's own was met, of which operations do not show what it computes.
    """

    tensor: Tensor
    leaves: list[Tensor] = field(default_factory=list)
    problem: str = ""
    opaque: bool = False


def walk(roots: Iterable[Tensor]) -> Walk:
    """Walk from the loss to the leaves, in at each tap's output and on from its inputs."""
    found = Walk()
    seen: set[tuple[Node, int] | Node] = set()
    stack = [(root.grad_fn, root.output_nr) for root in roots if root.grad_fn is not None]
    while stack:
        node, number = stack.pop()
        notes = metadata(node)
        tapped = notes.get(KEY)
        mark = (node, number) if tapped else node
        if mark in seen:
            continue
        seen.add(mark)
        found.lost = found.lost or notes.get(LOST)
        if tapped and number in tapped:
            tap, index = tapped[number]
            _enter(found, tap, index, GradientEdge(node, number))
            stack.extend((edge.node, edge.output_nr) for edge in tap.inputs)
            continue
        if _note(found, node).startswith("NllLoss"):
            found.losses.append(node)
        stack += [(after, index) for after, index in node.next_functions if after is not None]
    return found


def _enter(found: Walk, tap: Tap, index: int, edge: GradientEdge) -> None:
    """Note a live output, and look for parameters inside the call that the tap does not answer for."""
    found.taps.setdefault(tap, set()).add(index)
    found.edges.append(edge)
    for p in tap.params.values():
        if id(p) not in found.sources:
            found.sources[id(p)] = source_of(p)
    if not isinstance(tap.module, nn.Module):
        return  # a function uses what it was given
    own = {id(p) for p in tap.params.values()}
    seen = {edge.node for edge in tap.inputs} | {p.grad_fn for p in tap.params.values() if p.grad_fn is not None}
    stack = [edge.node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = leaf_of(node)
        if id(leaf) in own:
            continue
        if leaf is not None:
            found.within.setdefault(id(leaf), tap)
        _note(found, node)
        stack += [after for after, _ in node.next_functions if after is not None]


def source_of(tensor: Tensor) -> Source:
    """What a tensor was computed from."""
    source = Source(tensor)
    if tensor.grad_fn is None:
        if not made_inside(tensor):
            source.leaves.append(tensor)
        return source
    stack: list[tuple[Node, int]] = [(tensor.grad_fn, tensor.output_nr)]
    seen: set[Node] = set()
    while stack:
        node, number = stack.pop()
        if number in metadata(node).get(KEY, {}):
            source.problem = source.problem or metadata(node)[KEY][number][0].name
        if node in seen:
            continue
        seen.add(node)
        if (leaf := leaf_of(node)) is not None:
            _add_leaf(source, leaf)
        elif isinstance(node, torch.autograd.function.BackwardCFunction) and not handed_through(node):
            source.opaque = True
        stack.extend((after, index) for after, index in node.next_functions if after is not None)
    return source


def _add_leaf(source: Source, leaf: Tensor) -> None:
    if place_of(leaf) is not None:
        source.problem = source.problem or "an input"
    elif leaf.requires_grad and not made_inside(leaf):
        source.leaves.append(leaf)


def sees_through(tensor: Tensor) -> bool:
    """Whether operations have shown all that a tensor was computed from, and it is parameters alone."""
    source = source_of(tensor)
    return not source.problem and not source.opaque


def tapped_only(tensor: Tensor, edges: list[GradientEdge]) -> bool:
    """Whether no parameter is reached from an output, on the way to the inputs of a call, but through taps."""
    borders = {edge.node for edge in edges}
    stack = [(tensor.grad_fn, tensor.output_nr)]
    seen: set[Node] = set()
    while stack:
        node, number = stack.pop()
        if node is None or node in borders or node in seen:
            continue
        tapped = metadata(node).get(KEY, {}).get(number)
        if tapped is not None:
            stack.extend((edge.node, edge.output_nr) for edge in tapped[0].inputs)
            continue
        seen.add(node)
        if isinstance(leaf_of(node), nn.Parameter):
            return False
        stack.extend(node.next_functions)
    return True


def refuse_lost(found: Walk) -> None:
    """Raise if examples cannot be told apart on the way from the parameters to the loss."""
    lost = found.lost
    if lost is not None and lost.error is not None:
        raise lost.error
    if lost is not None and lost.mixes:
        raise CrossExampleError(
            f"{lost.where} {lost.why}, so no example has a gradient of its own. Use operations that treat each example "
            f"by itself, or move this one behind the loss of each example.{_of_time_first(lost)}{STATE.hinted()}"
        )
    if lost is not None:
        raise BatchAxisError(
            f"{lost.where} {lost.why}, so it cannot be known which of its entries belong to which example. Keep the "
            f"examples on one axis there (parts of examples in one row, as nodes of graphs, are padded to "
            f"[N, parts, ...]), or register a rule for the module around it (@register_rule, docs/extending)."
            f"{_of_time_first(lost)}"
        )
    for tap in found.taps:
        for name, p in tap.params.items():
            source = found.sources[id(p)]
            if source.problem:
                raise BatchAxisError(
                    f"`{tap.name}` was given a tensor (`{name}`, shape {list(p.shape)}) that depends on "
                    f"`{source.problem}` through an operation that could not be followed, such as a "
                    f"torch.autograd.Function, torch.func or a compiled part. Put that operation into a module without "
                    f"children, or register a rule for the module around it (@register_rule, docs/extending)."
                )


def _of_time_first(lost: Lost) -> str:
    """What is most often wrong where a layer that takes time first is given the examples there, as torch's do."""
    root = lost.record.root()
    for path, module in root.named_modules() if root is not None else ():
        name = path or type(module).__name__
        if getattr(module, "batch_first", None) is False and f"`{name}`" in lost.where:
            return (
                f" `{name}` has batch_first=False: it takes time on axis 0 and the examples on axis 1. Make it "
                f"with batch_first=True; or, if the model is given them on axis 1, extend(model, batch_dim=1)."
            )
    return ""


def _note(found: Walk, node: Node) -> str:
    """Note a leaf, and refuse what hides a graph of its own; returns the node's name."""
    name = node.name()
    if (leaf := leaf_of(node)) is not None:
        if isinstance(leaf, nn.Parameter):
            found.uncovered[id(leaf)] = leaf
        else:
            found.leaves[id(leaf)] = leaf
    elif reentrant_checkpoint(name):
        raise LossError(
            "The loss depends on a reentrant activation checkpoint, whose inner graph cannot be seen; "
            "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    elif name.startswith("CompiledFunction"):
        found.compiled = True
    return name
