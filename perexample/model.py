"""`extend` and `unextend`: make a model known to `perex`."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ._arguments import whole
from ._engine.fields import FIELDS
from ._engine.hooks import ROOTS, Enter, Exit
from ._private import compiled_in_place, has_hook, remove_hooks, shards
from ._shards import COMPUTES_WITH_PARTS, is_sharded
from .errors import ConfigurationError, UnsupportedModuleError
from .rule import can_refuse, refusal

M = TypeVar("M", bound=nn.Module)


def extend(model: M, *, batch_dim: int = 0) -> M:
    """Register the rules of a model's modules, so that `perex` can see their calls.

    The same object is returned: same class, same ``state_dict``, no wrapper. Copies and pickles of it are extended
    too. Modules put into the model later need another call; calling it again is harmless.

    Args:
        model: Any `torch.nn.Module`; also one that is part of another.
        batch_dim: Axis of the model's inputs that holds the examples.

    Returns:
        The model.

    Raises:
        UnsupportedModuleError: If a module can never have per-example gradients, such as BatchNorm in training mode;
            the message names it.
        ConfigurationError: If ``model`` or ``batch_dim`` is not what it must be.

    Example:
        >>> from perexample import extend
        >>> model = extend(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"extend takes a torch.nn.Module, not {type(model).__name__}.")
    batch_dim = whole("batch_dim", batch_dim, "an axis number 0, 1, ...")
    named = list(model.named_modules())
    managed = shards(model)
    for path, module in named:
        _refuse(path or type(module).__name__, module)
        for name, p in module.named_parameters(recurse=False):
            if is_sharded(p) and id(p) not in managed:
                raise UnsupportedModuleError(f"`{path}` ({type(module).__name__}): `{name}` {COMPUTES_WITH_PARTS}.")
    for path, module in named:
        remove_hooks(module, (Enter, Exit))
        if next(module.parameters(), None) is not None or can_refuse(module):
            module.register_forward_pre_hook(Enter(path, batch_dim, module is model), with_kwargs=True)
            module.register_forward_hook(Exit(), prepend=True, with_kwargs=True, always_call=True)
    ROOTS.add(model)
    return model


def unextend(model: M) -> M:
    """Undo `extend`: remove its hooks and the fields that extensions left on the parameters.

    Args:
        model: A model given to `extend` before; nothing happens to any other.

    Returns:
        The model.

    Raises:
        ConfigurationError: If ``model`` is no module.

    Example:
        >>> from perexample import extend, unextend
        >>> model = unextend(extend(nn.Linear(4, 2)))
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"unextend takes a torch.nn.Module, not {type(model).__name__}.")
    for module in model.modules():
        remove_hooks(module, (Enter, Exit))
    for p in model.parameters():
        for name in FIELDS & vars(p).keys():
            delattr(p, name)
    ROOTS.discard(model)
    return model


def _refuse(path: str, module: Any) -> None:
    """Raise for what can never be per-example, naming the module."""
    kind = type(module).__name__
    if reason := refusal(module):
        raise UnsupportedModuleError(f"`{path}` ({kind}) {reason}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModuleError(
            f"`{path}` ({kind}) is scripted, so its forward cannot be seen; extend the original."
        )
    if kind == "OptimizedModule" or compiled_in_place(module):
        raise UnsupportedModuleError(f"`{path}` is a compiled model; extend the model itself, without torch.compile.")
    if kind == "FullyShardedDataParallel":
        raise UnsupportedModuleError(
            f"`{path}` ({kind}) lays all parameters out in one, which no longer shows them; use "
            f"torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedModuleError(
            f"`{path}` ({kind}) copies or reduces gradients itself; call extend(model.module)."
        )
    for name, p in module.named_parameters(recurse=False):
        if p.is_complex():
            raise UnsupportedModuleError(
                f"`{path}` ({kind}) has a complex parameter (`{name}`); only real ones are supported. Make "
                f"torch.view_as_real({name}) the parameter, and take torch.view_as_complex of it in the forward."
            )
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnsupportedModuleError(
                f"`{path}` ({kind}) has no shape yet (`{name}`); run one forward before extend()."
            )


def is_extended(module: nn.Module) -> bool:
    """Whether `extend` has registered its hooks on this very module."""
    return has_hook(module, Enter)
