"""Modules: their tensors, and what replaces their forward."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from torch import Tensor, nn


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Parameters owned directly, by name; unlike ``named_parameters`` it keeps one parameter under two names."""
    return module._parameters


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What ``model.named_parameters()`` gives, which is asked for in every step and takes several times as long.

    What a forward has computed and put in a parameter's place, as DropConnect does, is none: an optimizer has what it
    was computed from.

    Returns:
        The leaves of the graph, by name.
    """
    if type(model).named_parameters is not nn.Module.named_parameters:  # wrappers may give other names
        return {name: p for name, p in model.named_parameters() if p.grad_fn is None}
    found: dict[str, Tensor] = {}
    seen = set[int]()
    for prefix, module in model.named_modules():
        for name, p in own_parameters(module).items():
            if p is not None and id(p) not in seen and p.grad_fn is None:
                seen.add(id(p))
                found[f"{prefix}.{name}" if prefix else name] = p
    return found


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is one of torch's dropouts, of any kind."""
    return isinstance(module, nn.modules.dropout._DropoutNd)


def weight_names(module: nn.RNNBase) -> list[str]:
    """Names of the weights and biases of a recurrent module's layers, in their order."""
    return module._flat_weights_names


def is_bare(module: nn.Module) -> bool:
    """Whether a module has no tensors of its own, be it with parts that have."""
    return not module._parameters and not module._buffers


def stands_in(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether an attribute, or a buffer that needs a gradient, is found where the module looks for its parameters."""
    own, buffers = module.__dict__, module._buffers
    for name in names:
        if isinstance(own.get(name), Tensor):
            return True
        if buffers and (buffer := buffers.get(name)) is not None and buffer.requires_grad:
            return True
    return False


def hides(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether this very object carries something that hides a function of its class with one of these names."""
    return any(isinstance(getattr(type(module), name), FunctionType) for name in module.__dict__.keys() & names)


def overridden_forward(module: nn.Module) -> bool:
    """Whether this very object carries its own ``forward``, as some offloading libraries install."""
    return "forward" in module.__dict__


def may_be_parametrized(module: nn.Module) -> bool:
    """Whether the module holds parametrizations, which a look at the attribute would tell much slower."""
    return "parametrizations" in module._modules


def compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, whose forward cannot be seen."""
    return module._compiled_call_impl is not None


@contextmanager
def kept_state(module: nn.Module) -> Iterator[None]:
    """Put back all attributes of a module and its parts, as a repeated forward may set some."""
    kept = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in kept:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


def shards(model: nn.Module) -> dict[int, tuple[Tensor, nn.Parameter]]:
    """Parameters that FSDP2 (``fully_shard``) keeps in shards: what is computed with, and what the optimizer holds.

    Returns:
        Both, by the identity of either, since the model shows now the one and now the other. Before the first forward
        they are the same.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not there yet: nothing is sharded
    kind: Any = getattr(fsdp, "FSDPModule", None)
    if kind is None or not kind.__subclasses__():  # which fully_shard makes
        return {}
    found: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, kind):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for kept in [kept for group in groups if group is not None for kept in group.fsdp_params]:
                own = kept.sharded_param
                whole = getattr(kept, "_unsharded_param", own)  # made in the first forward
                if not kept.is_dtensor:  # else not whole even then: tensor-parallel
                    found[id(whole)] = found[id(own)] = whole, own
    return found


def laid_out_in_one(param: Tensor) -> bool:
    """Whether a parameter is all those of a model in one, as FSDP1 (``FullyShardedDataParallel``) makes it."""
    return bool(getattr(param, "_is_flat_param", False))
