"""What must hold before a backward starts: every trainable parameter is answered for, and N is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .._private import gradient_hooks, has_hook, laid_out_in_one, mean_is_over, named_parameters, ones_for, shards
from .._shards import is_sharded
from ..errors import (
    BatchAxisError,
    LossError,
    PerExampleError,
    StaleGradientError,
    UncoveredParameterError,
    UnsupportedModuleError,
)
from ..place import Place
from ..rules.generic import GenericRule
from .cuts import comes_from_rows
from .graph import examples_of, live_taps
from .hooks import ROOTS, Enter
from .state import STATE
from .table import place_of
from .tap import Tap
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
                _check_leaf(tap, name, p, given, names)
    return names


COMPUTES_WITH_PARTS = (
    "is a DTensor that fully_shard (FSDP2) has not made of an ordinary parameter of this model: tensor parallelism is "
    "not supported, and of a model that is kept in shards the whole has to be extended, not a part"
)


def _check_shards(name: str, whole: Tensor, own: Tensor) -> None:
    """What is computed with must be the whole parameter, on the device where its shard is."""
    if is_sharded(whole):
        raise UnsupportedModuleError(f"Parameter `{name}` {COMPUTES_WITH_PARTS}.")
    if whole.device != own.device:
        raise UnsupportedModuleError(
            f"Parameter `{name}` is kept on {own.device} and computed with on {whole.device}; leave "
            f"offload_policy=CPUOffloadPolicy() out of fully_shard."
        )


def _check_leaf(tap: Tap, name: str, p: Tensor, given: Tensor, names: dict[int, tuple[Tensor, str]]) -> None:
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
    if gradient_hooks(p):
        raise UnsupportedModuleError(
            f"Parameter `{names[id(p)][1]}` has a gradient hook (register_hook), which would change its "
            f"gradient but not those of the examples; remove the hook, or freeze the parameter."
        )
    if not p.requires_grad:
        raise StaleGradientError(
            f"Parameter `{names[id(p)][1]}` was frozen between forward and backward; freeze it before."
        )


def check_coverage(found: Walk, names: dict[int, tuple[Tensor, str]]) -> None:
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
        uncovered = list(found.uncovered.values())
        raise _uncovered(next(filter(is_sharded, uncovered), uncovered[0]), found)
    if not any(source.leaves for source in found.sources.values()):
        raise LossError(
            "The loss does not depend on the batch through any extended model: no call of a module with trainable "
            "parameters lies between. Call extend(model) before the forward."
        )


def _uncovered(p: nn.Parameter, found: Walk) -> PerExampleError:
    for model in ROOTS:
        _, owner = shards(model).get(id(p), (p, p))
        for path, module in model.named_modules():
            for name, own in module.named_parameters(recurse=False):
                if own is p or own is owner:
                    return _uncovered_at(path, name, module, found)
    return UncoveredParameterError(
        f"The loss depends on a trainable parameter of shape {list(p.shape)} that belongs to no extended model; call "
        f"extend() on the model it belongs to before the forward, or freeze it with requires_grad_(False)."
    )


def _uncovered_at(path: str, name: str, module: nn.Module, found: Walk) -> PerExampleError:
    where = f"Parameter `{path}.{name}`" if path else f"Parameter `{name}`"
    kind = type(module).__name__
    if is_sharded(module._parameters.get(name)):
        return UnsupportedModuleError(f"{where} {COMPUTES_WITH_PARTS}.")
    if found.compiled:
        return UncoveredParameterError(
            f"{where} ({kind}) is used inside or behind a compiled region, through which nothing can be followed; "
            f"run the extended model, and the functions that it calls, without torch.compile."
        )
    if not has_hook(module, Enter):
        return UncoveredParameterError(
            f"{where} belongs to a {kind} that was put into the model after extend(); call extend(model) again, before "
            f"the forward."
        )
    if not found.taps:
        return UncoveredParameterError(
            f"{where} ({kind}) reaches the loss, but no call of an extended module does that could be followed: the "
            f"forward ran before extend() or under torch.compile, a method was called in its place, the loss (a "
            f"penalty on weights?) does not depend on the batch, or the parameter is used by a torch.autograd.Function "
            f"in a module with children. Call the model (model(x)) again; put such a function into a module without "
            f"children, or register a rule for the module that uses it "
            f"(register_rule(ThatClass)(GenericRule)).{STATE.hinted()}"
        )
    tap = found.within.get(id(module._parameters[name]))
    if tap is not None and not isinstance(tap.rule, GenericRule):
        rule = type(tap.rule).__name__
        return UncoveredParameterError(
            f"{where} ({kind}) is used inside of `{tap.name}` ({tap.kind}), whose rule {rule} answers for "
            f"{sorted(tap.params)}, parameters that the module owns itself, and no others. Let {rule}.handles return "
            f"False for such a module, so that the operations inside are followed one by one, or register the generic "
            f"rule, which takes it as a whole: register_rule({tap.kind}, overwrite=True)(GenericRule)."
        )
    roots = {tap.record.root_name: tap.record.root() for tap in found.taps}
    if not any(module in root.modules() for root in roots.values() if root is not None):
        return UncoveredParameterError(
            f"{where} ({kind}) is used outside of any forward of its {kind}: by the loss function, a penalty, or a "
            f"method that is called by itself, where nothing is followed; the loss comes from the forward of "
            f"{', '.join(f'`{name}`' for name in roots)}. Let forward do what uses the parameter (it may return each "
            f"example's own loss), and call the model; add penalties in the optimizer (weight_decay)."
        )
    return UncoveredParameterError(
        f"{where} ({kind}) reaches the loss where no tap could be left: outside of the model's forward, as in the loss "
        f"function, in a penalty, in what the model returns beside data, in a factor of the loss when the examples are "
        f"joined already, in gradients (create_graph=True), or through an operation that could not be followed, such "
        f"as a torch.autograd.Function in a module with children. Let forward do what uses it (it may return each "
        f"example's own loss), add penalties in the optimizer (weight_decay), bring what is returned to the shape of "
        f"data (log_std.expand_as(mean)) and factors to each example's own loss inside the model, put such a function "
        f"into a module without children, register a rule for the module that uses it "
        f"(register_rule(ThatClass)(GenericRule)), or freeze the parameter with requires_grad_(False).{STATE.hinted()}"
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


def check_sums(loss: Tensor, found: Walk, n: int, factor: float) -> None:
    """Refuse sums that are divided by what all examples share; ``factor`` is that of an example's own loss."""
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
        if not math.isclose(actual, factor, rel_tol=1e-3):
            raise LossError(
                f"The loss is the sum of a cross-entropy ({node.name()}) times {actual:g}, and the {n} examples have "
                f"different numbers of targets that count ({total:g} of {targets.numel()}): a divisor that is computed "
                f"from them, as num_items_in_batch of transformers is, leaves none a loss of its own. Use "
                f"reduction='none', average over each example's own targets, then take the mean."
            )


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
