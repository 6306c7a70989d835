"""Private optimizers: noise is added to clipped sums, and an ordinary torch optimizer does the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .errors import ConfigurationError, PerExampleError, StaleGradientError

O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741
_SETTINGS = ("noise_multiplier", "expected_batch_size")


class Clipping(Protocol):
    """What a private optimizer asks of an extension such as `ClippedGrad`."""

    def sensitivity(self) -> float:
        """Bound on what one example adds to all sums together."""

    def consume(self, params: list[nn.Parameter]) -> list[Tensor]:
        """The sums, each for one step only."""

    def zero_grad(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Forget the sums so far."""


class _Noise:
    """Gaussian noise in float64 from a generator of its own, so that ``torch.manual_seed`` does not reveal it."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.given = generator
        self.generators: dict[torch.device, torch.Generator] = {}

    def like(self, tensor: Tensor, std: float) -> Tensor:
        generator = self.given if self.given is not None else self._own(tensor.device)
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device=generator.device)
        return noise.to(tensor.device).mul_(std)

    def _own(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
            self.generators[device].seed()  # from the operating system
        return self.generators[device]


class _Privatizer:
    """The step pre-hook: writes ``p.grad = (clipped_sum + noise) / expected_batch_size``."""

    def __init__(self, clipping: Clipping, generator: torch.Generator | None) -> None:
        self.clipping, self.noise = clipping, _Noise(generator)

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise PerExampleError(
                f"{type(optimizer).__name__}.step got a closure, which would compute gradients anew after the noise "
                f"was added; run the backward before, and call step() without arguments."
            )
        noise_multiplier, expected_batch_size = (_shared_setting(optimizer, name) for name in _SETTINGS)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        frozen = [p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad]
        sums = self.clipping.consume(params)
        std = noise_multiplier * self.clipping.sensitivity()
        for p, clipped in zip(params, sums, strict=True):
            total = clipped.double()
            if std > 0:
                total = total + self.noise.like(total, std)
            p.grad = (total / expected_batch_size).to(p.dtype)
        for p in frozen:
            p.grad = None


def _shared_setting(optimizer: torch.optim.Optimizer, name: str) -> float:
    """One value for all groups: noise that differs between them would have no single privacy cost."""
    values = {group.get(name) for group in optimizer.param_groups}
    if len(values) != 1 or None in values:
        raise ConfigurationError(f"{name} must be the same in all param_groups of a private optimizer, not {values}.")
    return _check_setting(name, values.pop())


def _check_setting(name: str, value: Any) -> float:
    least = 0 if name == "noise_multiplier" else math.ulp(0.0)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
        raise ConfigurationError(
            f"{name} must be a finite number {'>= 0' if least == 0 else '> 0'}, not {value!r}; it is public and must "
            f"not be computed from the data."
        )
    return float(value)


def privatize(
    optimizer: O,
    *,
    clipping: Clipping,
    noise_multiplier: float,
    expected_batch_size: float,
    generator: torch.Generator | None = None,
) -> O:
    """Make any torch optimizer private: its steps use noisy clipped sums instead of ``p.grad``.

    Before each step ``p.grad = (p.clipped_sum + N(0, (noise_multiplier * C)^2)) / expected_batch_size`` is written for
    every trainable parameter, where C is ``clipping.sensitivity()``. The optimizer stays what it is: learning-rate
    schedulers, ``state_dict`` and param groups work as before, and the two settings become part of the param groups.

    Args:
        optimizer: Any `torch.optim.Optimizer` whose step needs no closure.
        clipping: The `ClippedGrad` used in ``perex``.
        noise_multiplier: Standard deviation of the noise in units of C; 0 for none.
        expected_batch_size: What the sum is divided by: a public constant, such as sample rate times size of the data.
        generator: Source of the noise. By default one seeded by the operating system that ``torch.manual_seed`` does
            not touch. A generator of your own makes noise repeatable, and with it the privacy void if it is known.

    Returns:
        The same optimizer.

    Raises:
        ConfigurationError: For values without meaning, and optimizers that cannot be private.
        StaleGradientError: From ``step``, if a clipped sum is missing or was used already.
        PerExampleError: From ``step``, if it is given a closure.

    Guarantees:
        The noise is drawn once per step, in float64. It is not hardened against attacks on floating-point noise.

    References:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1.

    Example:
        >>> from perexample import extend, perex, privatize
        >>> from perexample.extensions import ClippedGrad
        >>> model, clipping = extend(nn.Linear(2, 1)), ClippedGrad(1.0)
        >>> adam = privatize(torch.optim.AdamW(model.parameters()), clipping=clipping,
        ...                  noise_multiplier=1.1, expected_batch_size=4)
        >>> with perex(clipping, grad=False):
        ...     model(torch.ones(4, 2)).mean().backward()
        >>> adam.step()
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(f"privatize takes a torch.optim.Optimizer, not {kind}.")
    if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise ConfigurationError(
            f"{kind} cannot be private: it needs a closure or sparse gradients; use SGD, Adam, AdamW or RMSprop."
        )
    parts = ("sensitivity", "consume", "zero_grad")
    if isinstance(clipping, type) or not all(callable(getattr(clipping, name, None)) for name in parts):
        raise ConfigurationError(f"clipping must be an instance of ClippedGrad, not {clipping!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigurationError(f"generator must be a torch.Generator or None, not {generator!r}.")
    if any(name in optimizer.defaults for name in _SETTINGS):
        raise ConfigurationError(f"This {kind} is private already.")
    settings = {"noise_multiplier": noise_multiplier, "expected_batch_size": expected_batch_size}
    for name, value in settings.items():
        optimizer.defaults[name] = _check_setting(name, value)
        for group in optimizer.param_groups:
            group.setdefault(name, value)
        _shared_setting(optimizer, name)
    optimizer.register_step_pre_hook(_Privatizer(clipping, generator))
    _clear_sums_too(optimizer, clipping)
    _refuse_copies(optimizer)
    return optimizer


def _clear_sums_too(optimizer: torch.optim.Optimizer, clipping: Clipping) -> None:
    """Let ``zero_grad`` forget clipped sums; torch has hooks for ``step``, none for ``zero_grad``."""
    plain = optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        plain(set_to_none=set_to_none)
        clipping.zero_grad([p for group in optimizer.param_groups for p in group["params"]])

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def _refuse_copies(optimizer: torch.optim.Optimizer) -> None:
    """A pickled or copied optimizer loses its hooks, and would step without clipping and noise."""
    kind = type(optimizer).__name__

    def refuse(*_: Any) -> Any:
        raise StaleGradientError(
            f"A private {kind} cannot be pickled or copied, since the copy would step without clipping and noise. Make "
            f"a new one, and load optimizer.state_dict() into it."
        )

    optimizer.__deepcopy__ = optimizer.__reduce_ex__ = refuse  # type: ignore[attr-defined, method-assign]


class DP_SGD(torch.optim.SGD):  # noqa: N801 - the field's name for it
    """Differentially private stochastic gradient descent.

    ``torch.optim.SGD`` on ``(sum of clipped gradients + noise) / expected_batch_size``; see `privatize`, which makes
    the same of any other optimizer. Momentum, weight decay, param groups, schedulers and ``state_dict`` are SGD's.

    Args:
        params: Parameters, or param groups, of an extended model.
        lr: Learning rate.
        clipping: The `ClippedGrad` used in ``perex``; holds C.
        noise_multiplier: Standard deviation of the noise in units of C.
        expected_batch_size: What the sum is divided by; a public constant.
        generator: Source of the noise; see `privatize`.
        momentum: As in SGD.
        dampening: As in SGD.
        weight_decay: As in SGD.
        nesterov: As in SGD.
        maximize: As in SGD.

    Raises:
        ConfigurationError: For values without meaning.
        StaleGradientError: From ``step``, if a clipped sum is missing or was used already.

    References:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1.

    Example:
        >>> from perexample import DP_SGD, extend, perex
        >>> from perexample.extensions import ClippedGrad
        >>> model, clipping = extend(nn.Linear(2, 1)), ClippedGrad(1.0)
        >>> optimizer = DP_SGD(model.parameters(), lr=0.5, clipping=clipping, noise_multiplier=1.1,
        ...                    expected_batch_size=4)
        >>> with perex(clipping, grad=False):
        ...     model(torch.ones(4, 2)).mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        clipping: Clipping,
        noise_multiplier: float,
        expected_batch_size: float,
        generator: torch.Generator | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        """Make an SGD optimizer private."""
        super().__init__(
            params,
            lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        privatize(
            self,
            clipping=clipping,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            generator=generator,
        )
