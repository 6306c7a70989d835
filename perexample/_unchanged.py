"""What must not change between the recording of a step and its replays, which would not know of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .extension import Extension

_SETTINGS = frozenset({int, float, bool, str, type(None)})
_SettingKey = tuple[str, str, str]


def state_of(model: nn.Module, extensions: Sequence[Extension], device: torch.device) -> dict[_SettingKey, Any]:
    """All that a replay would not know of if it changed, by where it is; `described` says what that is."""
    found: dict[_SettingKey, Any] = {("", "autocast", ""): _autocast(device)}
    for path, module in model.named_modules():
        kind, own = type(module).__name__, vars(module)
        found[path, kind, ""] = id(module)
        found[path, kind, _HOOKS] = tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"]), own.get("forward")
        found[path, kind, _PARTS] = [
            _identity(t) for part in (own["_parameters"], own["_buffers"]) for t in part.values() if t is not None
        ]
        for name, value in own.items():
            if type(value) in _SETTINGS:
                found[path, kind, name] = value
            elif isinstance(value, Tensor) and value.is_leaf:  # else it is computed in each forward
                found[path, kind, name] = _identity(value)
    for extension in extensions:
        for name in ("clip", "groups"):
            value = getattr(extension, name, None)
            settings = repr(vars(value)) if hasattr(value, "__dict__") else ""
            copied = dict(value) if isinstance(value, Mapping) else id(value)
            found["", type(extension).__name__, name] = copied, settings
    return found


_HOOKS, _PARTS = "a hook or the forward", "a parameter or buffer"


def described(key: _SettingKey) -> str:
    """What a part of the state is, for a message."""
    path, kind, name = key
    if kind == "autocast":
        return "the precision of autocast"
    where = f"`{path}` ({kind})" if path else kind
    if not name:
        return where
    return f"{name if name in (_HOOKS, _PARTS) else f'`{name}`'} of {where}"


def _identity(t: Tensor) -> tuple[Any, ...]:
    place = t.data_ptr() if t.layout is torch.strided else 0
    return id(t), place, t.requires_grad, t.shape, t.stride() if place else ()


def _autocast(device: torch.device) -> Any:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None
