"""What operations look at when they are called one by one, and compiled code does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from ._calls import Call, Form, Slot, any_of, form_of

_aten = torch.ops.aten
_CHECKS = {"_assert_async", "_linalg_check_errors"}
_DIVISIONS = {"floor_divide", "fmod", "remainder"}  # beside those that are told how to round


class Check(NamedTuple):
    """What must hold of each entry of a tensor.

    Attributes:
        slot: The tensor.
        compared: How its entries are compared.
        number: With what.
    """

    slot: Slot
    compared: Any
    number: float

    def held(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Whether it holds of each of them."""
        return graph.call_function(self.compared, (node, self.number))


@dataclass(frozen=True)
class Divisors:
    """Integers that others are divided by: 0 ends the process, and so does -1 for the least number that there is.

    Attributes:
        slot: The tensor.
        limits: As of `Indices`, none.
        instead: What is right in any case.
    """

    slot: Slot
    limits: tuple = ()
    instead: int = 1

    def held(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Whether each of them is none of these."""
        some, positive = (graph.call_function(_aten.ne.Scalar, (node, number)) for number in (0, -1))
        return graph.call_function(_aten.bitwise_and.Tensor, (some, positive))


def checks_something_else(call: Call) -> bool:
    """Whether an operation only checks something, of which `checks_of` does not know."""
    return call.only_checks and call.of_torch and call.name not in _CHECKS


def checks_of(call: Call, forms: Sequence[Form]) -> Iterator[Check]:
    """What must hold of what an operation is given, or has made.

    Args:
        call: The operation.
        forms: Of the tensors that operations make, by their numbers.

    Yields:
        Each condition.
    """
    given = call.named()
    if call.name == "_assert_async":
        yield Check(given["self"], _aten.ne.Scalar, 0)
    elif call.name == "_linalg_check_errors":
        yield Check(given["info"], _aten.eq.Scalar, 0)
    elif given.get("check_errors"):
        yield Check(call.result("info"), _aten.eq.Scalar, 0)
    elif call.name in ("binary_cross_entropy", "bernoulli"):
        if isinstance(chances := given.get("p", given["self"]), Slot):
            yield Check(chances, _aten.ge.Scalar, 0)
            yield Check(chances, _aten.le.Scalar, 1)
    elif call.name in ("max_pool2d_with_indices", "max_pool3d_with_indices") and any_of(given["padding"]):
        # Where a window has nothing else the entry that is found may be one of the padding.
        of = forms[call.results[0]].dtype
        least = -math.inf if of.is_floating_point else torch.iinfo(of).min
        yield Check(Slot(call.results[0]), _aten.ne.Scalar, least)


def divisors_of(call: Call, forms: Sequence[Form]) -> Iterator[Divisors]:
    """The integers that an operation divides integers by, but those that are made for good."""
    given = call.named()
    if call.name.rstrip("_") not in _DIVISIONS and given.get("rounding_mode") is None:
        return
    other = given.get("other")
    whole = not any(_is_real(given.get(name), forms) for name in ("self", "other"))
    if whole and isinstance(other, Slot) and not other.lasting:
        yield Divisors(other)


def _is_real(value: Any, forms: Sequence[Form]) -> bool:
    return form_of(value, forms).dtype.is_floating_point if isinstance(value, Slot) else isinstance(value, float)
