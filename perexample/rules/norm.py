"""Rules for normalisation layers: all are ``y = weight * normalised(x) + bias`` with per-example statistics.

Those whose statistics come from the batch are refused; evaluation-mode BatchNorm normalises with constants.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._looks import within
from .._private import norm_statistics
from ..rule import Bound, Call, Rule, Sizes, named_arguments, only_parameters, register_rule
from ..terms import Dense, Term


class _AffineRule(Rule):
    """Weight ``sum_t g_nt x^_nt``, bias ``sum_t g_nt``, where x^ is the normalised input."""

    reads_parameters = False

    def covers(self, module: nn.Module) -> bool:
        """Only weight and bias."""
        return only_parameters(module, "weight", "bias")

    def normalised(self, call: Call) -> Tensor:
        """The input after normalisation, before weight and bias, in a tensor that may be written to."""
        raise NotImplementedError

    def summed(self, call: Call, values: Tensor) -> Tensor:
        """``[N, ...]`` summed over all positions that share the parameter, ``[N, *p.shape]``."""
        raise NotImplementedError

    def most_held(self, sizes: Sizes) -> int:
        """Gradients of the parameters."""
        return sizes.gradients

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """Small tensors, formed at once."""
        terms: dict[str, Term] = {}
        if "weight" in call.params:
            normalised = self.normalised(call)  # a new tensor
            product = normalised.mul_(g) if normalised.dtype == g.dtype else normalised * g
            terms["weight"] = Dense(self.summed(call, product))
        if "bias" in call.params:
            terms["bias"] = Dense(self.summed(call, g))
        return terms


class _PerChannelRule(_AffineRule):
    """Parameters ``[C]`` of an input ``[N, C, *T]``."""

    def summed(self, call: Call, values: Tensor) -> Tensor:
        """Sum over all positions of a channel."""
        return values.flatten(2).sum(2) if values.dim() > 2 else values


@register_rule(nn.GroupNorm, F.group_norm, torch.group_norm)
class GroupNormRule(_PerChannelRule):
    """Statistics over each group of channels of one example; x is ``[N, C, *T]``."""

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.group_norm(input, num_groups, weight, bias, eps)``."""
        named = {"eps": 1e-5} | named_arguments("input num_groups weight bias eps", args, kwargs)
        return _bound(named, num_groups=named["num_groups"])

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input and its statistics."""
        return _with_statistics(super().capture(module, args, kwargs, output), output)

    def normalised(self, call: Call) -> Tensor:
        """Without weight and bias."""
        return F.group_norm(call.x, call.module.num_groups, eps=call.module.eps)

    def terms(self, call: Call, g: Tensor) -> dict[str, Term]:
        """Without the normalised input, where the statistics are known and no mean is large."""
        sums = _native_sums(call, g)
        if sums is None:
            return super().terms(call, g)
        if "weight" in call.params and (far := _far_from_zero(call)) is not None:
            normalised = F.group_norm(call.x[far], call.module.num_groups, eps=call.module.eps)
            sums["weight"][far] = self.summed(call, normalised.mul_(g[far]))
        return {name: Dense(sums[name]) for name in call.params}


def _with_statistics(saved: dict[str, Any], output: Tensor) -> dict[str, Any]:
    """What is saved, with the statistics of the input if they have its precision."""
    x = saved["x"]
    found = norm_statistics(output) if x.dtype in (torch.float32, torch.float64) else None
    if found is None or found[0].dtype != x.dtype:
        return saved
    return saved | {"mean": found[0], "rstd": found[1]}


_MOST_MEAN = 4.0  # deviations that a mean may be away from zero: more would cost digits
_AT_ONCE = 1024  # positions that are added up at once


def _native_sums(call: Call, g: Tensor) -> dict[str, Tensor] | None:
    """The sums for weight and bias by torch's own kernel, which takes all examples as groups of a single one."""
    x, mean, rstd = call.x, call.saved.get("mean"), call.saved.get("rstd")
    if mean is None or rstd is None or x.dtype != g.dtype or not x.numel():
        return None
    if not (x.is_contiguous() and g.is_contiguous()):
        return None
    n, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    least = -(-positions // _AT_ONCE)
    parts = next((k for k in range(least, 4 * least + 1) if positions % k == 0), 0)
    if not parts:
        return None
    rows = n * channels * parts  # each a channel: a group of an example is that many times more channels
    one = 1, rows, positions // parts  # a shape of which nobody can think that its channels are last
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        g.view(one), x.view(one), mean.reshape(1, -1), rstd.reshape(1, -1), x.new_ones(rows), *one, mean.numel(),
        [False, True, True],
    )  # fmt: skip
    if parts == 1:
        return {"weight": weight.view(n, channels), "bias": bias.view(n, channels)}
    return {"weight": weight.view(n, channels, parts).sum(2), "bias": bias.view(n, channels, parts).sum(2)}


def _far_from_zero(call: Call) -> Tensor | None:
    """Examples of which the mean of a group is large, so that digits of the kernel's sums for the weight are lost."""
    deviations = call.saved["mean"] * call.saved["rstd"]
    if within(deviations.abs().sub_(_MOST_MEAN)):  # mostly so
        return None
    return ~(deviations.abs().amax(1) <= _MOST_MEAN)


_BATCHED_DIMS: dict[type[nn.Module], int] = {nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5}


@register_rule(*_BATCHED_DIMS)
class InstanceNormRule(_PerChannelRule):
    """Statistics over each channel of one example; with tracked statistics only in evaluation mode."""

    def handles(self, module: Any, args: tuple, kwargs: dict) -> bool:
        """Not a single image without an axis of examples."""
        x = (*args, *kwargs.values())[0]
        return x.dim() == next(dims for kind, dims in _BATCHED_DIMS.items() if isinstance(module, kind))

    def refuse(self, module: Any) -> str | None:
        """Tracked statistics would take data of all examples into the model without protection."""
        if module.training and module.track_running_stats:
            return (
                "tracks running statistics of the data in training mode, so examples reach the model past their "
                "gradients; build it with track_running_stats=False, or call .eval() on it"
            )
        return None

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input, and the running statistics if these were used."""
        saved = super().capture(module, args, kwargs, output)
        if module.running_mean is not None and not module.training:
            saved.update(mean=module.running_mean, var=module.running_var)
        return saved

    def normalised(self, call: Call) -> Tensor:
        """Without weight and bias."""
        mean, var = call.saved.get("mean"), call.saved.get("var")
        return F.instance_norm(call.x, mean, var, use_input_stats=mean is None, eps=call.module.eps)


def _bound(named: dict[str, Any], **options: Any) -> Bound:
    """A function of an input, weight and bias, in the form of its module."""
    module = SimpleNamespace(eps=named["eps"], **options)
    return Bound(module, (named["input"],), {"weight": named.get("weight"), "bias": named.get("bias")})


@register_rule(nn.LayerNorm, F.layer_norm, torch.layer_norm)
class LayerNormRule(_AffineRule):
    """Statistics over the trailing ``normalized_shape``; x is ``[N, *T, *normalized_shape]``."""

    batched = ("x", "mean", "rstd")

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.layer_norm(input, normalized_shape, weight, bias, eps)``."""
        named = {"eps": 1e-5} | named_arguments("input normalized_shape weight bias eps", args, kwargs)
        return _bound(named, normalized_shape=tuple(named["normalized_shape"]))

    def feature_axes(self, module: Any) -> int:
        """The normalised axes."""
        return len(module.normalized_shape)

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input and its statistics."""
        return _with_statistics(super().capture(module, args, kwargs, output), output)

    def normalised(self, call: Call) -> Tensor:
        """Without weight and bias."""
        if "rstd" not in call.saved:
            return F.layer_norm(call.x, call.module.normalized_shape, eps=call.module.eps)
        return torch.sub(call.x, call.saved["mean"]).mul_(call.saved["rstd"])

    def summed(self, call: Call, values: Tensor) -> Tensor:
        """Sum over all positions between the example and the normalised axes."""
        shape = tuple(call.module.normalized_shape)
        return values.reshape(call.n, -1, *shape).sum(1)


@register_rule(nn.RMSNorm, F.rms_norm, torch.rms_norm)
class RMSNormRule(LayerNormRule):
    """As LayerNorm, without mean and bias."""

    def bind(self, function: Any, args: tuple, kwargs: dict) -> Bound | None:
        """``F.rms_norm(input, normalized_shape, weight, eps)``."""
        named = {"eps": None} | named_arguments("input normalized_shape weight eps", args, kwargs)
        return _bound(named, normalized_shape=tuple(named["normalized_shape"]))

    def normalised(self, call: Call) -> Tensor:
        """In the precision of the rule, with the default ``eps`` of the precision that the module ran in."""
        eps = call.module.eps
        eps = torch.finfo(call.saved["dtype"]).eps if eps is None else eps
        return F.rms_norm(call.x, call.module.normalized_shape, eps=eps)

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input and its dtype, on which the default ``eps`` depends."""
        saved = super().capture(module, args, kwargs, output)
        return saved | {"dtype": saved["x"].dtype}


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormRule(_PerChannelRule):
    """Evaluation mode only: normalised with the running statistics, which are constants."""

    def refuse(self, module: Any) -> str | None:
        """Statistics of the batch mix the examples."""
        if module.training or module.running_mean is None:
            return (
                "normalises each example with statistics of the whole batch, so no example has a gradient of its own; "
                "replace it (privacy.replace_batchnorm puts GroupNorm in its place), or call .eval() on it if it has "
                "running statistics"
            )
        return None

    def capture(self, module: Any, args: tuple, kwargs: dict, output: Any) -> dict[str, Any]:
        """The input and the statistics."""
        saved = super().capture(module, args, kwargs, output)
        return saved | {"mean": module.running_mean, "var": module.running_var}

    def normalised(self, call: Call) -> Tensor:
        """Without weight and bias."""
        return F.batch_norm(call.x, call.saved["mean"], call.saved["var"], training=False, eps=call.module.eps)
