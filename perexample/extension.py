"""Extensions: quantities computed for each parameter during backward.

An extension is one short class. It sees each parameter through a `ParameterView`, never a layer::

    class GradMean(Extension):
        field = "grad_mean"

        def compute(self, view):
            return view.grad_batch().mean(0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ._engine.view import ParameterView, Weights
from ._looks import holds
from .errors import ExtensionError


class Extension:
    """A quantity for each parameter, saved as an attribute of the parameter named ``field``.

    Override `compute` for what one parameter's gradients suffice for. A quantity that needs all parameters, such as
    a joint norm, sets ``joint = True`` and overrides `finish` too; views are then kept to the end of the backward.

    Attributes:
        field: Name of the attribute on each parameter.
        joint: Whether `finish` asks the views for more than `compute` did.
        looks_at_sums: Whether the extension itself looks at its sums over the examples for what is not finite, as an
            example with a loss of 0 may add: 0 times infinity. Otherwise a recorded step does.
        late_sums: Whether `finish` does with what `weighted_sum` returns nothing but hand it on; what it is to be added
            to is an argument. Then sums may be filled in after it, which ``perex(max_memory=...)`` needs.
    """

    field: ClassVar[str]
    joint: ClassVar[bool] = False
    late_sums: ClassVar[bool] = False
    looks_at_sums: ClassVar[bool] = False

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

    def recording(self) -> Extension:
        """What a `RecordedStep` asks in place of this; called once, before it records.

        Returns:
            By default this extension itself, if it remembers nothing; of one that does, another with the same field
            that does not, as steps that are tried and compared are no steps of yours.

        Raises:
            ExtensionError: If it does, and has not said what is to be asked.
        """
        if type(self).commit is not Extension.commit:
            raise ExtensionError(
                f"{type(self).__name__} remembers what its backwards have found (commit), and cannot be recorded; "
                f"override recording and replayed (docs/extending)."
            )
        return self

    def for_replay(self) -> Any:
        """Tensors that `replayed` needs beside the fields; asked of what `recording` returned.

        Returns:
            They, nested as may be, of all examples that the step was recorded with. Those that have the examples on the
            first axis are compared for fewer of them too, as fields are.
        """
        return {}

    def prepare(self, recording: Extension) -> None:
        """Called before a recorded step is replayed, whose fields may be overwritten then; see `recording`."""

    def replayed(
        self, found: Any, fields: Mapping[str, tuple[Tensor, Tensor]], n: int, size: int
    ) -> Mapping[str, Tensor]:
        """Called after it was replayed, and before `commit`.

        Args:
            found: What `for_replay` returned, as of this replay; what is kept of it must be copied (``clone()``).
            fields: By the names of the parameters: the parameter, and its field as it was recorded.
            n: How many examples there were.
            size: How many it was recorded with; the rest of them had losses of 0.

        Returns:
            The fields of these examples.

        Raises:
            ExtensionError: If there are fewer, and what that means for the field was not said.
        """
        if n == size:
            return {name: field for name, (_, field) in fields.items()}
        found = {name: self.of_first(field, n) for name, (_, field) in fields.items()}
        if any(field is None for field in found.values()):
            raise ExtensionError(
                f"{type(self).__name__} does not tell what its field is for {n} examples out of {size}; give a "
                f"recorded step as many as it was recorded with, take this batch without it (step.as_usual(*batch), or "
                f"the model in the place of a RecordedModel), or override of_first."
            )
        return {name: field for name, field in found.items() if field is not None}

    def of_first(self, field: Tensor, n: int) -> Tensor | None:
        """A field of the first n examples, of one that others have part in whose gradients are zero.

        One that is divided by the number of examples is told by `replayed` instead, which knows both numbers.

        Args:
            field: As it was recorded.
            n: How many examples.

        Returns:
            The field; ``None`` if it cannot be told from this one.
        """
        return None


__all__ = ["Extension", "ParameterView", "Weights", "holds"]
