"""What is done between two models: example n of what the second is given has to be made of example n of the first.

It is not followed. Where it is more than functions of each entry, it is differentiated once for each form, and at the
second, the fourth, ... time: what rows of half of the examples owe to the outputs of the first model must be zero for
the other half. So samples ``[K, N, d]`` of an encoding are noticed, which a decoder takes for a batch of K examples,
where K is N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .._private import ones_for
from ..errors import CrossExampleError
from ..place import Place
from .graph import EACH, Near, Seldom, is_light, kind_of, live_taps, nodes_to_taps, shape_of
from .state import STATE
from .walk import Walk

_MOST = 4096  # nodes
_SEEN = Seldom()


def check_between(found: Walk, n: int) -> None:
    """Refuse inputs of a model in which the outputs of another hold rows of other examples.

    Args:
        found: The graph below the loss.
        n: Number of examples.

    Raises:
        CrossExampleError: If a row depends on what another example was given.
    """
    if n < 2 or STATE.once or STATE.opened is None:
        return
    for record in {tap.record: None for tap in found.taps}:
        for edge, place in record.given:
            near = live_taps(edge, found)
            nodes = nodes_to_taps(edge) if near else []
            if not near or not _is_doubtful(nodes, place, near) or not _SEEN.is_due(record.root(), _form(nodes, n)):
                continue
            if any(_meet(edge, place, near, bit, side) for bit in range((n - 1).bit_length()) for side in (0, 1)):
                shape, first = list(shape_of(edge.node, edge.output_nr) or ()), near[0][1].record.root_name
                raise CrossExampleError(
                    f"`{record.root_name}` was given a tensor of shape {shape} whose axis {record.batch_dim} does not "
                    f"hold the examples as `{first}` had them: what was done in between has mixed them, or moved them "
                    f"to another axis. Let example n be entry n on that axis, or join the two in one model, in which "
                    f"it is followed."
                )


def _is_doubtful(nodes: Sequence[Node], place: Place, near: Sequence[Near]) -> bool:
    """Whether rows may have met, and it can be seen."""
    if len(nodes) > _MOST or any(tap.record.opened is not STATE.opened for _, tap, _ in near):
        return False
    if not is_light(nodes):
        return False
    beside = all(tap.places[i].axis == place.axis and not tap.places[i].folded for _, tap, i in near)
    return not (beside and all(map(_of_each_entry, nodes)))


def _of_each_entry(node: Node) -> bool:
    """Whether an operation surely leaves all entries where they are."""
    shapes = {shape_of(before, number) for before, number in node.next_functions if before is not None}
    return kind_of(node) in EACH and shapes <= {shape_of(node, 0)}


def _form(nodes: Sequence[Node], n: int) -> int:
    shapes = [shape_of(node, 0) or () for node in nodes]
    return hash(tuple((node.name(), *(size % n for size in shape)) for node, shape in zip(nodes, shapes, strict=True)))


def _meet(edge: GradientEdge, place: Place, near: Sequence[Near], bit: int, side: int) -> bool:
    """Whether the rows of examples whose number has a bit, or has it not, depend on the others."""
    weights = ones_for(edge)
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(
        weights.device, weights.dtype
    )
    wanted = _has(place.owner_of_entry(weights.device), bit) == side
    shape = [1] * weights.dim()
    shape[place.axis or 0] = -1
    grads = torch.autograd.grad(
        edge, [at for at, _, _ in near], noise * wanted.view(shape), retain_graph=True, allow_unused=True
    )
    sizes = [_sizes(one, g, bit, side) for one, g in zip(near, grads, strict=True) if g is not None]
    own, others = (max((size[i] for size in sizes), default=0.0) for i in (0, 1))
    return others > torch.finfo(weights.dtype).eps ** 0.75 * own


def _sizes(one: Near, g: Tensor, bit: int, side: int) -> tuple[float, float]:
    """How large a gradient is at rows of the one half, and of the other; those that are not finite tell nothing."""
    _, tap, index = one
    place = tap.places[index]
    rows = place.rows_first(tap.in_shape(index, g)).unsqueeze(-1).flatten(1).abs().amax(1)
    owner = place.space.owners(g.device)
    known, half = rows.isfinite() & (owner >= 0), _has(owner, bit) == side
    own, others = (rows[known & chosen].tolist() for chosen in (half, ~half))
    return max(own, default=0.0), max(others, default=0.0)


def _has(owner: Tensor, bit: int) -> Tensor:
    return owner.bitwise_right_shift(bit) % 2
