"""One comparison for all models: every field of one backward against one `torch.autograd.grad` per example."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from perexample import PerExampleError, extend, perex
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

TOLERANCE = 1e-10
Gradients = dict[str, Tensor]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def par(*shape: int) -> nn.Parameter:
    """A parameter of normal numbers."""
    return nn.Parameter(rand(*shape) * 0.6)


def pos(*shape: int) -> nn.Parameter:
    """A parameter of numbers between 1 and 2, fit to divide by."""
    return nn.Parameter(torch.rand(shape, dtype=torch.float64) + 1)


class Net(nn.Module):
    """Modules, parameters and buffers, and a forward given as a function of ``(self, *inputs)``.

    It has a child whatever else it has, so that it is a container and no leaf module.
    """

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function, self.child = function, nn.Identity()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Deep(nn.Module):
    """A model behind a linear layer on the last axis of its first input, so that it is differentiated to its inputs."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.model = nn.Linear(width, width), model

    def forward(self, x: Tensor, *inputs: Any) -> Any:
        return self.model(self.before(x), *inputs)


@dataclass(frozen=True)
class Row:
    """One model and its inputs.

    Attributes:
        id: Unique name.
        make: Builds the model.
        inputs: Builds the inputs, a tuple, for a number of examples.
        batch_dim: Axis of the examples, for ``extend``.
        axes: The same for each input tensor, by default ``batch_dim``; ``None`` for what all examples share.
        out_axis: The same for the outputs, by default ``batch_dim``.
        forward: How the model is called: a function of model and inputs.
        traps: Numbers of examples that equal another size in the model.
        empty: Whether the row is also run with no example at all.
        deep: Whether the model also runs behind a linear layer.
    """

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    batch_dim: int = 0
    axes: Sequence[int | None] | None = None
    out_axis: int | None = None
    forward: Callable[..., Any] | None = None
    traps: tuple[int, ...] = (3,)
    empty: bool = False
    deep: bool = True

    def build(self, n: int, deep: bool = False) -> tuple[nn.Module, tuple]:
        """Model and inputs, in float64, the same in each call."""
        torch.manual_seed(zlib.crc32(self.id.encode()))
        model, inputs = self.make(), self.inputs(n)
        if deep and self.deep and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
            model = Deep(model, inputs[0].shape[-1])
        return jittered(model), inputs

    def settings(self) -> dict[str, Any]:
        """Arguments of `assert_exact`."""
        return {
            "batch_dim": self.batch_dim,
            "axes": self.axes,
            "out_axis": self.out_axis,
            "forward": self.forward,
        }


def jittered(model: nn.Module) -> nn.Module:
    """The model in float64, with no parameter that is exactly zero or one."""
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def losses(output: Any, axis: int = 0) -> Tensor:
    """Losses of the examples, ``[N]``: a curved function of all tensors in the output."""
    total: Any = 0.0
    for number, t in enumerate(reference.tensors(output)):
        rows = t.movedim(axis, 0).flatten(1) if t.dim() > 1 else t.unsqueeze(1)
        fixed = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device).add(1 + number).mul(1.7).cos()
        total = total + (rows * fixed + rows**2 / 2).sum(1)
    return total


@dataclass(frozen=True)
class Problem:
    """A model, its inputs and how they are laid out; what the library computes and what it must be."""

    model: nn.Module
    inputs: tuple
    batch_dim: int = 0
    axes: Sequence[int | None] | None = None
    out_axis: int | None = None
    forward: Callable[..., Any] | None = None
    loss: Callable[[Any], Tensor] | None = None

    @property
    def input_axes(self) -> Sequence[int | None]:
        return [self.batch_dim] * len(reference.tensors(self.inputs)) if self.axes is None else self.axes

    @property
    def n(self) -> int:
        tensors = reference.tensors(self.inputs)
        return next(t.shape[a] for t, a in zip(tensors, self.input_axes, strict=True) if a is not None)

    def run(self, *inputs: Any) -> Tensor:
        """Losses of the examples, ``[N]``."""
        output = self.model(*inputs) if self.forward is None else self.forward(self.model, *inputs)
        axis = self.batch_dim if self.out_axis is None else self.out_axis
        return losses(output, axis) if self.loss is None else self.loss(output)

    def wanted(self) -> Gradients:
        """Gradients of the examples, one `torch.autograd.grad` after the other."""
        return reference.grad_batch(
            self.model,
            lambda values, _: values.sum(),
            self.inputs,
            self.n,
            cut=lambda inputs, i: reference.example(inputs, i, self.input_axes),
            forward=lambda _, *one: self.run(*one),
        )

    def plain(self) -> Gradients:
        """Gradients of the mean loss of the batch (of the sum where there is no example)."""
        named = trainable(self.model)
        values = self.run(*self.inputs)
        grads = torch.autograd.grad(values.mean() if self.n else values.sum(), list(named.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if grad is None else grad.to_dense()
            for (name, p), grad in zip(named.items(), grads, strict=True)
        }

    def found(self, bound: float, grad: bool) -> tuple[dict[str, Gradients], ClippedGrad]:
        """The fields that the library writes, by field and parameter."""
        for p in trainable(self.model).values():
            p.grad = None
        clipping = ClippedGrad(bound)
        extend(self.model, batch_dim=self.batch_dim)
        with perex(BatchGrad(), BatchL2Grad(), clipping, grad=grad, loss_reduction="mean" if self.n else "sum"):
            values = self.run(*self.inputs)
            (values.mean() if self.n else values.sum()).backward()
        fields = ("grad_batch", "batch_l2", "clipped_sum")
        return {f: {name: getattr(p, f) for name, p in trainable(self.model).items()} for f in fields}, clipping


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_leaf}


def largest(tensors: Gradients) -> float:
    return max((t.abs().max().item() for t in tensors.values() if t.numel()), default=0.0)


def assert_near(found: Gradients, wanted: Gradients, tolerance: float, what: str) -> None:
    """Equal shapes, and values relative to each parameter's largest entry.

    A gradient that is zero but for rounding, such as that of a bias of the keys of an attention, is measured by the
    largest entry of all parameters.
    """
    scale = 1e-4 * largest(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if found[name].shape == value.shape and value.numel() and value.abs().max() < scale:
            assert (found[name] - value).abs().max() <= tolerance * scale, f"{what} of {name}, which is nearly zero"
        else:
            reference.assert_close_report(found[name], value, tolerance, f"{what} of {name}")


def validated(problem: Problem) -> Gradients:
    """The reference, after comparing its mean with a plain backward: the examples do not mix."""
    wanted = problem.wanted()
    mean = {name: rows.sum(0) / max(problem.n, 1) for name, rows in wanted.items()}
    assert_near(mean, problem.plain(), TOLERANCE, "mean of the reference")
    return wanted


def assert_exact(
    model: nn.Module, inputs: tuple, *, grads: Sequence[bool] = (False, True), tolerance: float = TOLERANCE, **settings
) -> None:
    """Compare all fields, with and without ``p.grad``; settings are those of `Problem`."""
    problem = Problem(model, inputs, **settings)
    wanted = validated(problem)
    bound = reference.bound_near_median(wanted, problem.n)
    fields = {
        "grad_batch": wanted,
        "batch_l2": {name: reference.batch_l2(rows) for name, rows in wanted.items()},
        "clipped_sum": reference.clipped_sum(wanted, problem.n, bound),
    }
    for grad in grads:
        found, clipping = problem.found(bound, grad)
        for field, by_name in fields.items():
            assert_near(found[field], by_name, tolerance, f"{field} (grad={grad})")
        reference.assert_close_report(clipping.norms, reference.joint_norms(wanted, problem.n), tolerance, "norms")
        assert_gradients(problem, grad, tolerance)


def assert_gradients(problem: Problem, grad: bool, tolerance: float = TOLERANCE) -> None:
    """``p.grad`` is that of a plain backward, or is not there with ``grad=False``."""
    named = trainable(problem.model)
    if not grad:
        assert all(p.grad is None for p in named.values()), "grad=False leaves nothing behind"
    elif problem.n:
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for name, p in named.items()}
        assert_near(found, problem.plain(), tolerance, "p.grad")


def assert_exact_or_refused(model: nn.Module, inputs: tuple, match: str, **settings) -> None:
    """Exact, or an error of the library that names the place."""
    message = match
    try:
        assert_exact(model, inputs, **settings)
    except PerExampleError as error:
        message = str(error)
    assert message is match or re.search(match, message), message


def assert_refused(
    model: nn.Module, inputs: tuple, error: type[PerExampleError], match: str, extra: Callable | None = None, **settings
) -> None:
    """The forward or the backward raises an error that names the place; no field is written.

    ``extra`` is a term of the loss that does not come from the outputs, a function of the model.
    """
    problem = Problem(model, inputs, **settings)

    def backward(grad: bool) -> None:
        with perex(BatchGrad(), ClippedGrad(1.0), grad=grad):
            value = problem.run(*inputs).mean()
            (value if extra is None else value + extra(model)).backward()

    extend(model, batch_dim=problem.batch_dim)
    for grad in (False, True):
        with pytest.raises(error, match=match):
            backward(grad)
        assert not any(hasattr(p, "grad_batch") or hasattr(p, "clipped_sum") for p in model.parameters())
