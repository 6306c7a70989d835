"""The error for a trainable parameter on which the loss depends, and that no tap answers for: why that is."""

from __future__ import annotations

from torch import nn

from .._private import has_hook, shards
from .._shards import COMPUTES_WITH_PARTS, is_sharded
from ..errors import PerExampleError, UncoveredParameterError, UnsupportedModuleError
from ..rules.generic import GenericRule
from .hooks import ROOTS, Enter
from .state import STATE
from .walk import Walk


def uncovered(p: nn.Parameter, found: Walk) -> PerExampleError:
    """The error for a parameter that the walk has found."""
    for model in ROOTS:
        _, owner = shards(model).get(id(p), (p, p))
        for path, module in model.named_modules():
            for name, own in module.named_parameters(recurse=False):
                if own is p or own is owner:
                    return _uncovered_at(path, name, module, found)
    return UncoveredParameterError(
        f"The loss depends on a trainable parameter of shape {list(p.shape)} that belongs to no extended model; call "
        f"extend() on the model it belongs to before the forward, or freeze it with requires_grad_(False). If this "
        f"loss is not to train it, as that of a discriminator does not train the generator, detach() what it has made."
    )


def _uncovered_at(path: str, name: str, module: nn.Module, found: Walk) -> PerExampleError:
    where, kind = f"Parameter `{path}.{name}`" if path else f"Parameter `{name}`", type(module).__name__
    if is_sharded(module._parameters.get(name)):
        return UnsupportedModuleError(f"{where} {COMPUTES_WITH_PARTS}.")
    if not has_hook(module, Enter) and not found.compiled:
        return UncoveredParameterError(
            f"{where} belongs to a {kind} that was put into the model after extend(); call extend(model) again, before "
            f"the forward."
        )
    why = _nothing_followed(found) or _in_a_tap(name, module, found) or _in_no_forward(module, found) or _in_the_loss()
    return UncoveredParameterError(f"{where} ({kind}) {why}")


def _nothing_followed(found: Walk) -> str | None:
    """Whether the model's forward was not seen at all."""
    if found.compiled:
        return (
            "is used inside or behind a compiled region, through which nothing can be followed; run the extended "
            "model, and the functions that it calls, without torch.compile."
        )
    if not found.taps:
        return (
            f"reaches the loss, but no call of an extended module does that could be followed: the forward ran before "
            f"extend() or under torch.compile, a method was called in its place, the loss (a penalty on weights?) does "
            f"not depend on the batch, or the parameter is used by a torch.autograd.Function in a module with "
            f"children. Call the model (model(x)) again; put such a function into a module without children, or "
            f"register a rule for the module that uses it (register_rule(ThatClass)(GenericRule)).{STATE.hinted()}"
        )
    return None


def _in_a_tap(name: str, module: nn.Module, found: Walk) -> str | None:
    """Whether a rule has answered for a module around this one, and leaves it out."""
    tap = found.within.get(id(module._parameters[name]))
    if tap is None or isinstance(tap.rule, GenericRule):
        return None
    rule = type(tap.rule).__name__
    return (
        f"is used inside of `{tap.name}` ({tap.kind}), whose rule {rule} answers for {sorted(tap.params)}, parameters "
        f"that the module owns itself, and no others. Let {rule}.handles return False for such a module, so that the "
        f"operations inside are followed one by one, or register the generic rule, which takes it as a whole: "
        f"register_rule({tap.kind}, overwrite=True)(GenericRule)."
    )


def _in_no_forward(module: nn.Module, found: Walk) -> str | None:
    """Whether the loss comes from forwards of other modules only."""
    roots = {tap.record.root_name: tap.record.root() for tap in found.taps}
    if any(module in root.modules() for root in roots.values() if root is not None):
        return None
    return (
        f"is used outside of any forward of its {type(module).__name__}: by the loss function, a penalty, or a method "
        f"that is called by itself, where nothing is followed; the loss comes from the forward of "
        f"{', '.join(f'`{name}`' for name in roots)}. Let forward do what uses the parameter (it may return each "
        f"example's own loss), and call the model; add penalties in the optimizer (weight_decay)."
    )


def _in_the_loss() -> str:
    return (
        f"reaches the loss where no tap could be left. If it is used outside of the model's forward, as in the loss "
        f"function: let forward do that, which may return each example's own loss. In a penalty: add penalties in the "
        f"optimizer (weight_decay). In what the model returns beside data: bring that to the shape of data "
        f"(log_std.expand_as(mean)). In a factor of the loss when the examples are joined already: multiply each "
        f"example's own loss inside the model. In gradients (torch.autograd.grad with create_graph=True): compute them "
        f"in the forward of a module that has the generic rule, register_rule(ThatClass)(GenericRule). In an operation "
        f"that could not be followed, such as a torch.autograd.Function in a module with children: put that into a "
        f"module without children, or register the generic rule for the module. Or freeze the parameter with "
        f"requires_grad_(False).{STATE.hinted()}"
    )
