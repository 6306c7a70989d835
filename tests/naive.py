"""A reference that shares no code with the library: one ``torch.autograd.grad`` per example; and what tests share."""

import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def rows(model: nn.Module, loss: Callable[..., Tensor], *batch: Tensor, dim: int = 0) -> dict[str, Tensor]:
    """Gradient of each example's own loss, by parameter name, ``[N, *p.shape]``."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for n in range(batch[0].shape[dim]):
        one = [t.narrow(dim if t.dim() > dim else 0, n, 1) for t in batch]
        grads = torch.autograd.grad(loss(model, *one), list(named.values()), allow_unused=True)
        for (name, p), grad in zip(named.items(), grads, strict=True):
            found[name].append(torch.zeros_like(p) if grad is None else grad.to_dense())
    return {
        name: torch.stack(grads) if grads else torch.zeros(0, *named[name].shape, dtype=named[name].dtype)
        for name, grads in found.items()
    }


def norms(grads: dict[str, Tensor]) -> Tensor:
    """Joint norms, ``[N]``, in float64."""
    return sum(g.double().flatten(1).square().sum(1) for g in grads.values()).sqrt()


def clipped(grads: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Sums of the gradients clipped jointly to ``bound``."""
    factors = (bound / norms(grads)).clamp_max(1.0)
    return {name: torch.tensordot(factors, g.double(), dims=1) for name, g in grads.items()}


def fields(model: nn.Module, field: str) -> dict[str, Tensor]:
    """A field of all trainable parameters, by name."""
    return {name: getattr(p, field) for name, p in model.named_parameters() if p.requires_grad}


def vector(tensors: dict[str, Tensor]) -> Tensor:
    """All tensors in one, float64."""
    return torch.cat([t.detach().double().flatten() for t in tensors.values()])


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal names and shapes, and values up to a relative error per parameter."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, (name, found[name].shape, value.shape)
        if value.numel():
            scale = max(value.abs().max().item(), 1e-12)
            error = (found[name].double() - value.double()).abs().max().item() / scale
            assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_bitwise(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Half-free squared error, the mean over examples of a mean over the rest."""
    return (model(x) - y).square().mean()


def mean(model: nn.Module, *inputs: Tensor) -> Tensor:
    """A loss without target: the mean over examples of a curved function of the output."""
    out = model(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    return (out.sin() + out.square()).flatten(1).sum(1).mean()


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Linear, Tanh, Linear: 5 -> 7 -> 3."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def cnn(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A small convolutional network on ``[N, 2, 6, 6]``."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).to(dtype)


def batch(n: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs ``[n, 5]`` and targets ``[n, 3]`` for `mlp`; some examples are much longer than others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), (y * torch.arange(1, n + 1).double().unsqueeze(1)).to(dtype)


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Lambda(nn.Module):
    """Any modules, and a forward given as a function of ``(self, *inputs)``."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def lstm_in_bfloat16() -> None:
    """Skip where torch itself has no LSTM for bfloat16 autocast, which depends on the processor."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(2, 2)(torch.ones(1, 1, 2))
    except RuntimeError as error:
        pytest.skip(f"torch has no bfloat16 LSTM on this processor: {error}")


def values(model):
    """Copies of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved_whole(model):
    """What torch.load gives of the model that torch.save has written."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def tensors_alive():
    """How many tensors there are."""
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
