"""`check`: compare a model's per-example gradients with one backward per example, and probe their independence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import flag, losses_of, real, shown
from ._engine.context import perex
from ._engine.state import once
from ._kept import buffers_kept
from ._private import is_dropout, named_parameters
from ._table import table
from ._tree import map_tensors, tensors_in
from .errors import CheckFailedError, ConfigurationError, CrossExampleError
from .extension import Extension, ParameterView
from .model import extend


@dataclass(frozen=True)
class CheckRow:
    """What was found for one parameter.

    Errors are relative to the parameter's largest value, or to 1e-4 of the largest of the whole model where that is
    more: a gradient that is zero in theory is not zero, but rounded.

    Attributes:
        parameter: Its name.
        shape: Its shape.
        gradient: Worst relative error of its per-example gradients, in the batch and in one of the first example alone.
        norm: Worst relative error of their squared norms.
        weighted_sum: Relative error of a weighted sum of them, asked for by itself and after the norms.
        batch_dot: Relative error of their inner products.
        independence: How much an example's gradient moved, relatively, when another example was exchanged.
    """

    parameter: str
    shape: tuple[int, ...]
    gradient: float
    norm: float
    weighted_sum: float
    batch_dot: float
    independence: float

    @property
    def error(self) -> float:
        """The worst error against the reference."""
        return max(self.gradient, self.norm, self.weighted_sum, self.batch_dot)


@dataclass(repr=False)
class CheckReport:
    """What `check` found; prints as a table.

    Attributes:
        rows: One for each trainable parameter.
        tolerance: Errors up to this pass.
        notes: What was done to the copy of the model that was checked.
    """

    rows: list[CheckRow]
    tolerance: float
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything agrees and no example moved another."""
        return not self.wrong and not self.mixed

    @property
    def wrong(self) -> list[CheckRow]:
        """Parameters that differ from the reference."""
        return [row for row in self.rows if not row.error <= self.tolerance]

    @property
    def mixed(self) -> list[CheckRow]:
        """Parameters where examples move each other's gradients."""
        return [row for row in self.rows if not row.independence <= self.tolerance]

    def __str__(self) -> str:
        """The rows as a table, and the verdict."""
        header = ("parameter", "shape", "grad_batch", "batch_l2", "weighted sum", "batch_dot", "independence", "")
        rows = [
            (
                row.parameter, str(list(row.shape)), f"{row.gradient:.0e}", f"{row.norm:.0e}",
                f"{row.weighted_sum:.0e}", f"{row.batch_dot:.0e}", f"{row.independence:.0e}",
                "FAIL" if row in self.wrong or row in self.mixed else "ok",
            )
            for row in self.rows
        ]  # fmt: skip
        verdict = f"{'all right' if self.ok else 'NOT right'}: relative errors in float64, tolerance {self.tolerance:g}"
        return "\n".join([table(header, rows), verdict, *self.notes])

    __repr__ = __str__


class _Asked(Extension):
    """One way in which a view can be asked; what is asked for by itself may be computed in another way."""

    field = "check_quantities"

    def __init__(self, ask: Callable[[ParameterView], Tensor]) -> None:
        self.ask, self.found = ask, dict[str, Tensor]()

    def compute(self, view: ParameterView) -> None:
        self.found[view.name] = self.ask(view)


def _sum_after_norms(view: ParameterView) -> Tensor:
    view.batch_l2()
    return view.weighted_sum(_weights(view.n))


_WAYS: dict[str, Callable[[ParameterView], Tensor]] = {
    "batch_l2": lambda view: view.batch_l2(),
    "weighted_sum": lambda view: view.weighted_sum(_weights(view.n)),
    "sum after norms": _sum_after_norms,
    "batch_dot": lambda view: view.batch_dot(),
}


_ROUNDED = 1e-4  # of the model's largest gradient; smaller ones may be rounding, which the tolerance is far above


def _weights(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64, device="cpu") / n


def check(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    *batch: Any,
    named: Mapping[str, Any] | None = None,
    loss_reduction: str = "mean",
    tolerance: float = 1e-9,
    raises: bool = True,
    batch_dim: int = 0,
) -> CheckReport:
    """Compare with one ``torch.autograd.grad`` per example, in float64, for every parameter.

    The loss is ``loss_fn(model(*inputs, **named), target)`` with the last of ``batch`` as target, or
    ``loss_fn(model(x))`` if there is only one. Then, example by example, one is exchanged, and no other's gradient may
    move. A batch of a single example, of which no axis can be known, is compared too. A copy of the model is used, with
    dropout off; yours is left as it is.

    Args:
        model: The model; it need not be extended.
        loss_fn: Returns a scalar loss. It is given float64; of a module, as ``nn.BCEWithLogitsLoss`` is, a copy in
            float64 is used, and a function of your own must not bring tensors in float32.
        batch: Inputs and target, tensors or nested structures of them, of two or more examples.
        named: Inputs by name, such as a ``BatchEncoding``; then ``batch`` may hold the target alone, or nothing.
        loss_reduction: How the loss joins the examples, as for `perex`.
        tolerance: Largest relative error that passes.
        raises: Raise an error if something is wrong; otherwise only the report tells.
        batch_dim: Axis that holds the examples, as for `extend`; of tensors that have no such axis, as labels ``[N]``
            beside inputs ``[T, N, F]``, it is the first.

    Returns:
        A report that prints as a table.

    Raises:
        CheckFailedError: If a gradient, norm or sum differs from the reference; holds the report.
        CrossExampleError: If examples move each other's gradients, as a mean over the batch makes them.
        ConfigurationError: If the batch cannot be cut into examples, the model is random, or an argument has no
            meaning.

    Example:
        >>> from perexample import check
        >>> report = check(nn.Linear(3, 2), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2))
        >>> report.ok
        True
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"check takes a torch.nn.Module, not {type(model).__name__}.")
    losses_of("loss_fn", loss_fn, "a scalar loss")
    tolerance, raises = real("tolerance", tolerance, "a finite number >= 0", lambda x: x >= 0), flag("raises", raises)
    if named is not None and not isinstance(named, Mapping):
        raise ConfigurationError(f"named must be a mapping from names of inputs to them, not {shown(named)}.")
    model, notes = _prepared(model, batch_dim)
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).double()  # it may have weights of its own, such as those of classes
    by_name = {key: map_tensors(_double, part) for key, part in (named or {}).items()}
    batch = (by_name, *(map_tensors(_double, part) for part in batch))
    n = _size(batch, batch_dim)
    _refuse_random(model, loss_fn, batch)
    found = _measured(model, loss_fn, batch, loss_reduction)
    others = {way: _measured(model, loss_fn, batch, loss_reduction, ask) for way, ask in _WAYS.items()}
    moved = _moved(model, loss_fn, batch, n, loss_reduction, found, batch_dim)
    alone = {name: gradients[:1] for name, gradients in found.items()}
    try:
        wanted = _reference(model, loss_fn, batch, n, batch_dim)
        if max(moved.values()) <= tolerance:
            alone = _measured(model, loss_fn, _one(batch, 0, batch_dim), loss_reduction)
    except CrossExampleError:
        if max(moved.values()) <= tolerance:
            raise
        wanted = {name: torch.full_like(gradients, torch.nan) for name, gradients in found.items()}
    least = _least(wanted)
    rows = [
        _compare(
            name, wanted[name], found[name], alone[name], {way: of[name] for way, of in others.items()}, moved[name],
            least,
        )
        for name in wanted
    ]  # fmt: skip
    report = CheckReport(rows, tolerance, notes)
    if raises and report.mixed:
        names = ", ".join(f"`{row.parameter}`" for row in report.mixed)
        raise CrossExampleError(f"Exchanging one example moves the gradients of others, at {names}:\n{report}")
    if raises and report.wrong:
        names = ", ".join(f"`{row.parameter}`" for row in report.wrong)
        raise CheckFailedError(f"Per-example gradients differ from the reference, at {names}:\n{report}", report)
    return report


def _prepared(model: nn.Module, batch_dim: int) -> tuple[nn.Module, list[str]]:
    """An extended float64 copy without dropout."""
    model = copy.deepcopy(model).double()
    dropouts = [m for m in model.modules() if is_dropout(m) and m.training and m.p]
    for module in dropouts:
        module.eval()
    notes = [f"{len(dropouts)} dropout modules were switched off for the comparison"] if dropouts else []
    return extend(model, batch_dim=batch_dim), notes


def _double(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t.detach()


def _axis(t: Tensor, batch_dim: int) -> int:
    """The axis of a tensor that holds the examples."""
    return batch_dim if t.dim() > batch_dim else 0


def _size(batch: tuple, batch_dim: int) -> int:
    sizes = {t.shape[_axis(t, batch_dim)] if t.dim() else 0 for t in tensors_in(batch)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ConfigurationError(
            f"check needs a batch of two or more examples on axis {batch_dim} of every tensor; the sizes there are "
            f"{sorted(sizes)}."
        )
    return sizes.pop()


def _loss(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple) -> Tensor:
    by_name, *rest = batch
    alone = len(rest) == 1 and not by_name
    inputs, target = (rest, []) if alone or not rest else (rest[:-1], rest[-1:])
    return loss_fn(model(*inputs, **by_name), *target)


def _refuse_random(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple) -> None:
    losses = []
    for _ in range(2):  # with gradients, as a forward may ask for some
        with buffers_kept(model):
            losses.append(_loss(model, loss_fn, batch))
    first, second = losses
    if not isinstance(first, Tensor):
        raise ConfigurationError(f"loss_fn returned {shown(first)}; it must return a tensor, the loss of the batch.")
    if not torch.equal(first, second) and bool(first.isfinite().all()):
        raise ConfigurationError(
            "The model draws random numbers (functional dropout?), so no two forwards can be compared; "
            "call model.eval() before check."
        )


def _measured(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: tuple,
    reduction: str,
    ask: Callable[[ParameterView], Tensor] = ParameterView.grad_batch,
) -> dict[str, Tensor]:
    asked = _Asked(ask)
    with perex(asked, loss_reduction=reduction, grad=False), once(), buffers_kept(model):
        _loss(model, loss_fn, batch).backward()
    return asked.found


def _reference(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple, n: int, batch_dim: int
) -> dict[str, Tensor]:
    named = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(n):
        with buffers_kept(model):
            grads = torch.autograd.grad(
                _alone(model, loss_fn, _one(batch, i, batch_dim), i), list(named.values()), allow_unused=True
            )
        for (name, p), grad in zip(named.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if grad is None else grad.to_dense())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def _one(batch: tuple, i: int, batch_dim: int) -> tuple:
    """A batch of example i alone."""
    return tuple(map_tensors(lambda t: t.narrow(_axis(t, batch_dim), i, 1), part) for part in batch)


def _alone(model: nn.Module, loss_fn: Callable[..., Tensor], one: tuple, i: int) -> Tensor:
    """The loss of one example, which must exist without the others."""
    try:
        return _loss(model, loss_fn, one)
    except Exception as error:
        raise CrossExampleError(
            f"Model or loss fail on example {i} alone, so it has no loss of its own: {error} Use per-example "
            f"operations only (GroupNorm for BatchNorm, no statistics of the batch)."
        ) from error


def _moved(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: tuple,
    n: int,
    reduction: str,
    found: dict[str, Any],
    batch_dim: int,
) -> dict[str, float]:
    """Exchange one example after the other (up to 8) for its neighbour, and see what else moves."""
    moved, least = dict.fromkeys(found, 0.0), _least(found)
    for j in range(0, n, max(1, n // 8)):
        other = tuple(map_tensors(partial(_exchanged, j=j, batch_dim=batch_dim), part) for part in batch)
        for name, gradients in _measured(model, loss_fn, other, reduction).items():
            rest = torch.arange(n, device="cpu") != j
            moved[name] = max(moved[name], _relative(gradients[rest], found[name][rest], least))
    return moved


def _exchanged(t: Tensor, j: int, batch_dim: int) -> Tensor:
    t = t.clone()
    rows = t.movedim(_axis(t, batch_dim), 0)
    rows[j] = rows[(j + 1) % len(rows)] * (1.5 if t.is_floating_point() else 1)
    return t


def _compare(
    name: str,
    wanted: Tensor,
    gradients: Tensor,
    alone: Tensor,
    others: Mapping[str, Tensor],
    moved: float,
    least: float,
) -> CheckRow:
    total = torch.tensordot(_weights(len(wanted)).to(wanted.device), wanted, dims=1)
    rows = wanted.reshape(len(wanted), -1)
    return CheckRow(
        parameter=name,
        shape=tuple(wanted.shape[1:]),
        gradient=max(_relative(gradients, wanted, least), _relative(alone, wanted[:1], least)),
        norm=_relative(others["batch_l2"], rows.square().sum(1), least**2),
        weighted_sum=max(_relative(others[way], total, least) for way in ("weighted_sum", "sum after norms")),
        batch_dot=_relative(others["batch_dot"], rows @ rows.T, least**2),
        independence=moved,
    )


def _least(gradients: Mapping[str, Tensor]) -> float:
    """What gradients are compared with at least, as rounding is all there is to some.

    The bias of a key in attention has such ones, and one before a normalisation.

    Returns:
        The size of a gradient that may be rounding, as the others of the model tell.
    """
    largest = [t.nan_to_num(0.0, 0.0, 0.0).abs().max().item() for t in gradients.values() if t.numel()]
    return _ROUNDED * max(largest, default=0.0)


def _relative(found: Tensor, wanted: Tensor, least: float) -> float:
    """Largest difference over the largest value wanted."""
    if not wanted.numel():
        return 0.0
    scale = max(wanted.abs().max().item(), least)
    difference = (found - wanted).abs().max().item()
    return difference if scale == 0 else difference / scale
