"""Hooks of modules: which there are, and in which order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

H = TypeVar("H")
_LOOK_ON = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")


def global_hooks() -> list[list[int]]:
    """The numbers of the hooks on all modules, by their kinds."""
    every = torch.nn.modules.module
    kinds = (
        every._global_forward_hooks, every._global_forward_pre_hooks, every._global_backward_hooks,
        every._global_backward_pre_hooks,
    )  # fmt: skip
    return [list(hooks) for hooks in kinds]


def global_forward_hooks() -> bool:
    """Whether hooks on all modules are registered; they run before any module's own.

    Those of torch's own trackers (of ``FlopCounterMode``, ``ModTracker``) only look on.

    Returns:
        Whether there are others.
    """
    hooks = torch.nn.modules.module._global_forward_hooks.values()
    return any(getattr(hook, "__module__", "") not in _LOOK_ON for hook in hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether torch hands the module's inputs and outputs through a node of its own, for full backward hooks."""
    everywhere = torch.nn.modules.module
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def has_hook(module: nn.Module, kind: type) -> bool:
    """Whether a forward pre-hook of this kind is registered."""
    return hook_of(module, kind) is not None


def hook_of(module: nn.Module, kind: type[H]) -> H | None:
    """The first forward pre-hook of this kind, if one is registered."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kind)), None)


def run_first(module: nn.Module, kind: type) -> None:
    """Bring the forward hook of this kind before those that were registered in front of it later."""
    hooks = cast("OrderedDict[int, Any]", module._forward_hooks)
    if hooks and not isinstance(next(iter(hooks.values())), kind):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            hooks.move_to_end(key, last=False)


def runs_last(module: nn.Module, kind: type) -> bool:
    """Whether no forward pre-hook comes after that of this kind; if one does, that is changed for the next call."""
    hooks = cast("OrderedDict[int, Any]", module._forward_pre_hooks)
    if not hooks or isinstance(hooks[next(reversed(hooks))], kind):
        return True
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        hooks.move_to_end(key)
    return False


@contextmanager
def without_forward_hooks(module: nn.Module) -> Iterator[None]:
    """Silence a module's own forward hooks, which see real calls only."""
    hooks, module._forward_hooks = module._forward_hooks, OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks = hooks


_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def remove_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Remove all forward hooks of these kinds, also from copies, whose handles nobody has."""
    ids = [
        key
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in table.items()
        if isinstance(hook, kinds)
    ]
    for name in _HOOK_TABLES:
        for key in ids:
            getattr(module, name).pop(key, None)
