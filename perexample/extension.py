"""Extensions: quantities computed for each parameter during backward.

An extension is one short class. It sees each parameter through a `ParameterView`, never a layer::

    class GradMean(Extension):
        field = "grad_mean"

        def compute(self, view):
            return view.grad_batch().mean(0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ._engine.view import ParameterView, Weights


class Extension:
    """A quantity for each parameter, saved as an attribute of the parameter named ``field``.

    Override `compute` for what one parameter's gradients suffice for. A quantity that needs all parameters, such as
    a joint norm, sets ``joint = True`` and overrides `finish` too; views are then kept to the end of the backward.

    Attributes:
        field: Name of the attribute on each parameter.
        joint: Whether `finish` asks the views for more than `compute` did.
        late_sums: Whether `finish` does with what `weighted_sum` returns nothing but hand it on; what it is to be added
            to is an argument. Then sums may be filled in after it, which ``perex(max_memory=...)`` needs.
    """

    field: ClassVar[str]
    joint: ClassVar[bool] = False
    late_sums: ClassVar[bool] = False

    def start(self, views: Sequence[ParameterView]) -> None:
        """Called before the backward with the views of all trainable parameters; raise here what can be known."""

    def compute(self, view: ParameterView) -> Tensor | None:
        """Called once for each parameter, as soon as its gradients are complete; the result becomes the field."""
        return None

    def finish(self, views: Sequence[ParameterView]) -> Mapping[str, Tensor]:
        """Called after the backward; fields by parameter name, beside those that `compute` returned."""
        return {}

    def commit(self) -> None:
        """Called when all fields are written: the place to change what the extension itself remembers."""


__all__ = ["Extension", "ParameterView", "Weights"]
