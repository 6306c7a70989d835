"""torch's own lists of operations and modules, with its sample inputs: all that the tests use of `torch.testing`.

The lists are internal to torch, and need expecttest (extra ``test-torch``).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import get_testing_overrides

with mock.patch.object(torch.backends, "disable_global_flags"):  # which all tests after it would have to live with
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

# Left out: torch itself writes beyond its memory where numbers of rows differ, shows memory that is not that of the
# tensor, or differentiates with `vmap` otherwise than without.
LEFT_OUT = {"lu_unpack", "_segment_reduce", "as_strided_scatter", "native_group_norm"}
_AXES = {"dim", "dims", "dim0", "dim1", "dim2", "axis", "axis0", "axis1", "axes", "source", "destination"} | {
    "start_dim", "end_dim", "dimension",
}  # fmt: skip
_LARGEST = 400  # entries of an input
_SIGNATURES = get_testing_overrides()


@dataclass(frozen=True)
class Sample:
    """One call of an operation with the arguments of torch's own tests.

    Attributes:
        function: The operation.
        first: Its first argument.
        rest: Those that come in one list with it.
        args: Further ones.
        kwargs: Keyword arguments.
        only: What the result may be used for: what is well defined of it.
    """

    function: Callable[..., Any]
    first: Tensor
    rest: list[Tensor] | None
    args: tuple
    kwargs: dict[str, Any]
    only: Callable[[Any], Any]

    def __call__(self, first: Tensor, **more: Any) -> Any:
        """Call it with another first argument."""
        given = first if self.rest is None else [first, *self.rest]
        return self.only(self.function(given, *self.args, **self.kwargs, **more))

    def floats(self) -> dict[int | str, Tensor]:
        """The other arguments that may need a gradient."""
        found = {key: t for key, t in [*enumerate(self.args), *self.kwargs.items()] if _is_float(t)}
        return found if self.rest is None else {}

    def with_argument(self, key: int | str, t: Tensor) -> Sample:
        """The same with another tensor for one of these."""
        if isinstance(key, str):
            return replace(self, kwargs=self.kwargs | {key: t})
        return replace(self, args=(*self.args[:key], t, *self.args[key + 1 :]))

    def argument(self, key: int | str) -> Tensor:
        """One of these."""
        return self.kwargs[key] if isinstance(key, str) else self.args[key]

    def behind_a_new_axis(self) -> Sample | None:
        """The same for tensors with one more axis in front; ``None`` if it names no axes."""
        signature = _SIGNATURES.get(self.function, lambda *args: None)
        names = list(inspect.signature(signature).parameters)[1:]
        names += [""] * (len(self.args) - len(names))
        args = tuple(_moved(v) if name in _AXES else v for name, v in zip(names, self.args, strict=False))
        kwargs = {name: _moved(v) if name in _AXES else v for name, v in self.kwargs.items()}
        numbers = [[v for v in given if not isinstance(v, Tensor)] for given in (args, self.args)]
        keywords = [{k: v for k, v in given.items() if not isinstance(v, Tensor)} for given in (kwargs, self.kwargs)]
        return (
            None if numbers[0] == numbers[1] and keywords[0] == keywords[1] else replace(self, args=args, kwargs=kwargs)
        )


def _moved(axis: Any) -> Any:
    if isinstance(axis, (tuple, list)):
        return type(axis)(map(_moved, axis))
    return axis + 1 if isinstance(axis, int) and not isinstance(axis, bool) and axis >= 0 else axis


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dtype == torch.float64 and t.layout == torch.strided


class Operation:
    """An operation of torch's list."""

    def __init__(self, info: Any) -> None:
        self.info = info
        self.name = info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")
        self.inplace: Callable[..., Any] | None = info.inplace_variant
        self.has_out: bool = info.supports_out

    def samples(self, seed: int) -> list[Sample]:
        """Its samples; the same calls with other numbers for each seed."""
        torch.manual_seed(seed)
        random.seed(seed)
        return list(filter(None, map(self._sample, self.info.sample_inputs("cpu", torch.float64))))

    def _sample(self, given: Any) -> Sample | None:
        tensors = given.input if isinstance(given.input, (tuple, list)) else [given.input]
        if not tensors or not all(map(_is_float, tensors)) or not 0 < tensors[0].numel() <= _LARGEST:
            return None
        rest = None if isinstance(given.input, Tensor) else list(tensors[1:])
        function = self.info.op
        return Sample(function, tensors[0], rest, given.args, given.kwargs, given.output_process_fn_grad)


def operations() -> Iterator[Operation]:
    """Those that can be differentiated in float64."""
    for info in op_db:
        if info.supports_autograd and torch.float64 in info.supported_dtypes("cpu") and info.name not in LEFT_OUT:
            yield Operation(info)


@dataclass(frozen=True)
class Module:
    """A module of torch's list, as one of torch's own tests makes it."""

    name: str
    make: Callable[[], torch.nn.Module]
    args: tuple
    kwargs: dict[str, Any]
    training: bool


def modules(name: str, seed: int, training: bool) -> list[Module]:
    """A module in all ways in which torch's own tests make it; the same with other inputs for each seed."""
    found = []
    for info in module_db:
        if info.name == name:
            torch.manual_seed(seed)
            for given in info.module_inputs_func(info, "cpu", torch.float64, False, training):
                args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
                make = lambda cls=info.module_cls, args=args, kwargs=kwargs: cls(*args, **kwargs)  # noqa: E731
                found.append(Module(name, make, given.forward_input.args, given.forward_input.kwargs, training))
    return found


def module_names() -> list[str]:
    """The names of all of them, lazy ones left out."""
    return sorted({info.name for info in module_db if "Lazy" not in info.name})
