"""What must hold before a backward starts: every trainable parameter is answered for, and N is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .._private import gradient_hooks, laid_out_in_one, mean_is_over, named_parameters, ones_for, shards
from .._shards import COMPUTES_WITH_PARTS, is_sharded
from ..errors import (
    BatchAxisError,
    LossError,
    StaleGradientError,
    UnsupportedModuleError,
)
from ..place import Place
from .cuts import comes_from_rows
from .graph import examples_of, kind_of, live_taps, number_of
from .hooks import ROOTS
from .joins import single_numbers
from .table import place_of
from .tap import Tap
from .uncovered import uncovered
from .walk import Walk, refuse_lost


def parameter_names(found: Walk) -> dict[int, tuple[Tensor, str]]:
    """All parameters of the models that take part, with their names.

    Returns:
        Them by the identity of what is computed with, another tensor where parameters are kept in shards.
    """
    used = {id(p): p for source in found.sources.values() for p in source.leaves}
    models = [(named_parameters(model), shards(model)) for model in ROOTS]
    models.sort(key=lambda pair: len(pair[0]), reverse=True)  # of a model and a part of it, the model names both
    names: dict[int, tuple[Tensor, str]] = {}
    for model, sharded in models:
        pairs = {name: sharded.get(id(p), (p, p)) for name, p in model.items()}
        if any(id(whole) in used for whole, _ in pairs.values()):
            taken = {name for _, name in names.values()}
            for name, (whole, own) in pairs.items():
                while name in taken:
                    name += "'"  # a parameter of another model with the same name
                if id(own) not in sharded or whole is not own:
                    _check_shards(name, whole, own)
                names.setdefault(id(whole), (own, name))
    for tap in found.taps:
        for name, given in tap.params.items():
            for p in found.sources[id(given)].leaves:
                _check_leaf(tap, name, p, names)
    return names


def _check_shards(name: str, whole: Tensor, own: Tensor) -> None:
    """What is computed with must be the whole parameter, on the device where its shard is."""
    if is_sharded(whole):
        raise UnsupportedModuleError(f"Parameter `{name}` {COMPUTES_WITH_PARTS}.")
    if whole.device != own.device:
        raise UnsupportedModuleError(
            f"Parameter `{name}` is kept on {own.device} and computed with on {whole.device}; leave "
            f"offload_policy=CPUOffloadPolicy() out of fully_shard."
        )


def _check_leaf(tap: Tap, name: str, p: Tensor, names: dict[int, tuple[Tensor, str]]) -> None:
    """What must hold of a leaf that a tap answers for; one that took a parameter's place gets a name."""
    if laid_out_in_one(p):
        raise UnsupportedModuleError(
            f"`{tap.name}` uses parameters that FullyShardedDataParallel has laid out in one; use "
            f"torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if id(p) not in names and is_sharded(p):
        raise UnsupportedModuleError(
            f"`{tap.name}` ({tap.kind}) is handled as a whole, by repeating its forward, but its parameter `{name}` is "
            f"kept in shards by a module inside of it; call fully_shard on `{tap.name}`, and not on its parts."
        )
    if id(p) not in names and isinstance(p, nn.Parameter):
        raise StaleGradientError(
            f"Parameter `{name}` of `{tap.name}` is not part of an extended model: it was replaced after the forward, "
            f"or given to functional_call. Replace parameters before the forward, call extend(model) for new modules, "
            f"extend the whole model that fully_shard was given, and give functional_call tensors that are no "
            f"nn.Parameter, which get the fields then."
        )
    if id(p) not in names:  # it took a parameter's place, as by torch.func.functional_call
        name = f"{tap.name}.{name}"
        while name in {taken for _, taken in names.values()}:
            name += "'"
        names[id(p)] = (p, name)
    if hooks := gradient_hooks(p):
        of = getattr([*hooks.values()][-1], "__module__", "another")  # of a tool, say, as torch's MemTracker
        raise UnsupportedModuleError(
            f"Parameter `{names[id(p)][1]}` has a gradient hook (register_hook, of {of}), which would change its "
            f"gradient but not those of the examples; remove the hook, or freeze the parameter."
        )
    if not p.requires_grad:
        raise StaleGradientError(
            f"Parameter `{names[id(p)][1]}` was frozen between forward and backward; freeze it before."
        )


def check_coverage(found: Walk) -> None:
    """Errors for what the walk has found that no tap answers for."""
    records = [tap.record for tap in found.taps] + ([found.lost.record] if found.lost else [])
    for record in records:
        if record.refused:
            name, reason = record.refused[0]
            raise UnsupportedModuleError(f"`{name}` {reason}.")
        _ = record.n  # raises if it cannot be told
    for tap in found.taps:
        if tap.released:
            raise LossError(
                "The graph of this loss was used by an earlier backward and is gone; run the forward again, or pass "
                "backward(retain_graph=True) the first time."
            )
    refuse_lost(found)
    if found.uncovered:
        parameters = list(found.uncovered.values())
        raise uncovered(next(filter(is_sharded, parameters), parameters[0]), found)
    if not any(source.leaves for source in found.sources.values()):
        raise LossError(
            "The loss does not depend on the batch through any extended model: no call of a module with trainable "
            "parameters lies between. Call extend(model) before the forward."
        )


def check_divisors(found: Walk, n: int) -> None:
    """Refuse means whose divisor depends on which targets the other examples have."""
    for node in found.losses:
        over = mean_is_over(node)
        if over is None:
            continue
        total, targets, ignored = over
        if targets.numel() < n or total == targets.numel() or _as_many_each(total, targets, ignored, n):
            continue
        if not _is_of_one_example(node, found):
            raise LossError(
                f"The loss ({node.name()}) is a mean with the divisor {total:g} over {targets.numel()} targets "
                f"(ignored targets or class weights), which all examples share, so none has a loss of its own. Use "
                f"reduction='none', average over each example's own targets, then take the mean."
            )


def check_sums(loss: Tensor, found: Walk, n: int, scale: float, *, mean: bool) -> None:
    """Refuse sums that are divided by what all examples share.

    Args:
        loss: The loss.
        found: The graph below it.
        n: Number of examples.
        scale: What the loss was said to be multiplied with.
        mean: Whether it was said to be a mean of the examples' own.

    Raises:
        LossError: If the examples have different numbers of targets that count, and nothing shows a constant divisor.
    """
    for node in found.losses:
        over = mean_is_over(node, "sum")
        if over is None:
            continue
        total, targets, ignored = over
        if targets.numel() < n or total == targets.numel() or _as_many_each(total, targets, ignored, n):
            continue
        if _is_of_one_example(node, found):
            continue
        actual = float(torch.autograd.grad(loss, GradientEdge(node, 0), retain_graph=True)[0])
        if mean and _is_divided(loss, node, (n, targets.numel())):
            continue
        if not math.isclose(actual, scale / n if mean else scale, rel_tol=1e-3):
            raise LossError(
                f"The loss is the sum of a cross-entropy ({node.name()}) times {actual:g}, and the {n} examples have "
                f"different numbers of targets that count ({total:g} of {targets.numel()}): a divisor that is computed "
                f"from them, as num_items_in_batch of transformers is, leaves none a loss of its own. Use "
                f"reduction='none', average over each example's own targets, then take the mean."
            )


def _is_divided(loss: Tensor, node: Node, by: tuple[int, int]) -> bool:
    """Whether a sum is divided by one of these numbers on the way to the loss, whatever it is multiplied with."""
    for one in single_numbers(loss):
        if kind_of(one) == "Div" and number_of(one) in by:
            edges = GradientEdge(one, 0), GradientEdge(node, 0)
            (g,) = torch.autograd.grad(*edges, ones_for(edges[0]), retain_graph=True, allow_unused=True)
            if g is not None:
                return True
    return False


def _is_of_one_example(node: Node, found: Walk) -> bool:
    """Whether a loss is that of one example's own rows, as in a loop over the examples."""
    before, number = node.next_functions[0]
    assert before is not None
    edge = GradientEdge(before, number)
    spaces = [tap.places[index].space for _, tap, index in live_taps(edge, found)]
    alone = all(space.rows == 1 and space.owner is not None for space in spaces)
    if not (alone or comes_from_rows(edge)):
        return False
    ones = ones_for(edge)
    unlike = ones.cumsum(-1).cos()  # the gradient of a plain sum of log-probabilities is zero where all are the same
    return examples_of(edge, found, unlike) < 2


def _as_many_each(total: float, targets: Tensor, ignored: int, n: int) -> bool:
    """Whether each example has the same number of targets that count, and they all count alike."""
    counted = targets != ignored
    if targets.numel() % n or total != int(counted.sum()):
        return False
    place = place_of(targets)
    if isinstance(place, Place) and place.axis is not None:
        each = torch.zeros(n, dtype=torch.long, device="cpu").index_add_(
            0, place.owner_of_entry().cpu(), counted.flatten().long().cpu()
        )
        return bool((each == each[0]).all()) if targets.dim() == 1 else False
    each = counted.reshape(n, -1).sum(1)
    return bool((each == each[0]).all())


def number_of_examples(found: Walk) -> int:
    """The number that all forwards of the loss share."""
    sizes = {tap.record: tap.record.n for tap in found.taps}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"`{record.root_name}` with {n}" for record, n in sizes.items())
        raise BatchAxisError(
            f"The loss joins forwards of different numbers of examples: {listed}. Call the model once for all, or "
            f"with the same number of examples, example n in row n."
        )
    return next(iter(sizes.values()))
