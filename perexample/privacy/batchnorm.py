"""BatchNorm replaced by GroupNorm, with which every example has a gradient of its own."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .._arguments import whole
from .._private import overridden_forward
from ..errors import ConfigurationError, UnsupportedModuleError
from ..model import is_extended

_FEATURES = 16  # least number of channels in a group of BatchNorm1d, which may have nothing else to normalise over
_LEAST = 3  # numbers to normalise over: of one nothing is left, of two a sign
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct")  # of timm: they have the parts `drop` and `act`
_WRAPPERS = {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel", "OptimizedModule", "ScriptModule"}


def replace_batchnorm(
    model: nn.Module, *, groups: int = 32, make: Callable[[int], nn.Module] | None = None
) -> nn.Module:
    """Replace every BatchNorm of a model by GroupNorm, in place.

    BatchNorm normalises with statistics of the whole batch, so that in training no example has a gradient of its own.
    GroupNorm takes mean and variance over groups of the channels of one example. `BatchNorm1d`, `BatchNorm2d`,
    `BatchNorm3d`, `SyncBatchNorm` and subclasses that only inherit are replaced, and timm's ``BatchNormAct2d`` with its
    activation kept. Weight and bias stay the same `Parameter` objects under the same names, so that values, dtype,
    device, frozen and tied parameters, and optimizers made before stay as they are. A module used in two places stays
    one module. Running statistics are dropped: load a checkpoint that has them before.

    GroupNorm is another function than BatchNorm was, so that a trained model needs more training. To keep the
    statistics of a model that was trained on public data, do without this function: BatchNorm in evaluation mode
    normalises with constants, and is accepted. Call ``.eval()`` on the BatchNorms after each ``model.train()``.

    The number of groups is the largest divisor of the number of channels that is at most ``groups``. If it is the
    number of channels, as for few or a prime number of them, that is instance normalisation; less ``groups`` avoid it.
    `BatchNorm1d` may be given ``[N, C]``, where a group has nothing but its channels to normalise over; so it gets at
    least 16 channels in a group, or one group. Where a group still has fewer than 3 numbers when the model runs, as on
    images of 1 x 1, no more than a sign of them could be left; the new module raises an error then.

    Args:
        model: The model, before `extend`.
        groups: Largest number of groups.
        make: Another norm, instead of ``groups``: a function from the number of channels to a new module. Where this
            has parameters ``weight`` and ``bias`` of one number for each channel, BatchNorm's take their place. With
            timm's activation it becomes a `Sequential` of ``norm``, ``drop`` and ``act``.

    Returns:
        The model, or the new module if the model is a BatchNorm itself.

    Raises:
        ConfigurationError: If the model is extended or wrapped already, or an argument has no meaning; from the forward
            of a new module, if there is too little to normalise over.
        UnsupportedModuleError: If a BatchNorm has no shape yet, or is more than one: own forward, hooks, further
            parameters or parts. The message names it; nothing is replaced then.

    References:
        Wu and He 2018, arXiv:1803.08494, equations 1 to 7, and table 3 (32 groups, or 16 channels in a group).

    Example:
        >>> from perexample import extend
        >>> from perexample.privacy import replace_batchnorm
        >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU())
        >>> norm = extend(replace_batchnorm(model))[1]
        >>> type(norm).__name__, norm.num_groups, norm.num_channels
        ('GroupNorm', 24, 48)
    """
    _check(model, groups, make)
    norms = {path or type(m).__name__: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    for name, module in norms.items():
        _refuse(name, module)
    make_norm = _GroupNorms(groups) if make is None else _Made(make)
    new = {id(module): make_norm(name, module) for name, module in norms.items()}
    for parent in list(model.modules()):
        for name, module in list(vars(parent)["_modules"].items()):  # named_children leaves out what is there twice
            if id(module) in new:
                parent.add_module(name, new[id(module)])
    return new.get(id(model), model)


def _check(model: Any, groups: Any, make: Any) -> None:
    """Arguments, and models that it is too late for."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"replace_batchnorm takes a torch.nn.Module, not {type(model).__name__}.")
    whole("groups", groups, "a whole number of 1 or more", 1)
    if make is not None and not callable(make):
        raise ConfigurationError(f"make must be a function from a number of channels to a module, not {make!r}.")
    for path, module in model.named_modules():
        name, kinds = path or type(module).__name__, {cls.__name__ for cls in type(module).__mro__}
        if is_extended(module):
            raise ConfigurationError(
                f"`{name}` is extended already, and perex would not see a module that is put into it now: call "
                f"replace_batchnorm first and extend after it (unextend undoes extend)."
            )
        if wrappers := kinds & _WRAPPERS:
            raise ConfigurationError(
                f"`{name}` is a {wrappers.pop()}, which keeps what it found in the model; call replace_batchnorm "
                f"before the model is wrapped, sharded or compiled."
            )


def _refuse(name: str, module: nn.Module) -> None:
    """Raise for a BatchNorm that would not be the same without its own ways."""
    parts = {part for part, _ in module.named_children()}
    tensors = {key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    hooks = sorted(key for key, table in vars(module).items() if key.endswith("_hooks") and table)
    reason = None
    if isinstance(module, LazyModuleMixin):
        reason = "has no shape yet; run one forward before replace_batchnorm"
    elif overridden_forward(module) or not (type(module).forward in _FORWARDS or _has_activation(module)):
        reason = "has a forward of its own"
    elif more := (tensors - _TENSORS) | (parts - ({"drop", "act"} if _has_activation(module) else set())):
        reason = f"holds more than a BatchNorm does ({', '.join(f'`{key}`' for key in sorted(more))})"
    elif hooks:
        reason = f"has hooks ({', '.join(hooks)}), which its replacement would not have"
    elif "bias" in tensors and "weight" not in tensors:
        reason = "has a bias and no weight, for which torch's GroupNorm has no gradient"
    if reason is not None:
        raise UnsupportedModuleError(
            f"`{name}` ({type(module).__name__}) {reason}. Nothing was replaced; put another norm in its place "
            f"yourself, or remove what is special about it before."
        )


def _has_activation(module: nn.Module) -> bool:
    """Whether the forward is that of timm's BatchNorm with dropout and activation."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return owner.__module__.partition(".")[0] == "timm" and owner.__name__ in _WITH_ACTIVATION


class _GroupNorms:
    """Makes a GroupNorm in place of a BatchNorm."""

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def __call__(self, name: str, module: Any) -> nn.Module:
        count = _divisor(module.num_features, self.groups, _FEATURES if isinstance(module, nn.BatchNorm1d) else 1)
        norm = nn.GroupNorm(count, module.num_features, module.eps, affine=False)  # without parameters of its own
        if _has_activation(module):
            norm = _GroupNormAct(count, module.num_features, module.eps, affine=False)
            norm.drop, norm.act = _part(module, "drop"), _part(module, "act")
        norm.affine, norm.training = module.affine, module.training
        norm.register_parameter("weight", module.weight)
        norm.register_parameter("bias", module.bias)
        norm.register_forward_pre_hook(_EnoughNumbers(name), with_kwargs=True)
        return norm


class _Made:
    """Lets the user make a norm in place of a BatchNorm."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        self.make, self.made = make, list[nn.Module]()

    def __call__(self, name: str, module: Any) -> nn.Module:
        norm = self._new(name, module)
        like = next((t for t in (module.weight, module.bias, module.running_mean) if t is not None), None)
        if like is not None:
            norm.to(like.device, like.dtype)
        norm.train(module.training)
        own = dict(norm.named_parameters(recurse=False))
        for key in ("weight", "bias"):
            old = getattr(module, key)
            if old is not None and key in own and own[key].shape == old.shape:
                norm.register_parameter(key, old)
        if not _has_activation(module):
            return norm
        parts = nn.Sequential(OrderedDict(norm=norm, drop=_part(module, "drop"), act=_part(module, "act")))
        parts.training = module.training
        return parts

    def _new(self, name: str, module: Any) -> nn.Module:
        norm = self.make(module.num_features)
        if not isinstance(norm, nn.Module) or isinstance(norm, _BatchNorm):
            raise ConfigurationError(
                f"make must return a module other than BatchNorm, not {norm!r} (for `{name}`, which has "
                f"{module.num_features} channels)."
            )
        if any(norm is other for other in self.made):
            raise ConfigurationError(
                f"make returned one module twice (again for `{name}`), which would make one norm of two; let it make a "
                f"new one each time."
            )
        self.made.append(norm)
        return norm


class _GroupNormAct(nn.GroupNorm):
    """GroupNorm, dropout and activation in one module, as timm has them in one."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that GroupNorm has for it
        return self.act(self.drop(super().forward(input)))


class _EnoughNumbers:
    """Forward pre-hook of a new GroupNorm: normalising over one number gives zero, which nothing else would show."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        shape = (args[0] if args else kwargs["input"]).shape
        numbers = math.prod(shape[2:]) * (module.num_channels // module.num_groups)
        if numbers < _LEAST:
            raise ConfigurationError(
                f"`{self.name}`, a GroupNorm of {module.num_groups} groups in place of a BatchNorm, normalises over "
                f"{numbers} number(s) of its input of shape {list(shape)}, of which at most a sign is left. Use "
                f"replace_batchnorm(groups=...) with fewer groups, or make=... for another norm."
            )


def _divisor(channels: int, most: int, least: int) -> int:
    """The largest number of groups up to ``most`` that have the same number of channels, at least ``least``; or 1."""
    fits = (g for g in range(min(most, channels), 1, -1) if channels % g == 0 and channels // g >= least)
    return next(fits, 1)


def _part(module: nn.Module, name: str) -> nn.Module:
    """What timm does after the norm; nothing where it is missing."""
    return dict(module.named_children()).get(name, nn.Identity())
