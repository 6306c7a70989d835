"""What extensions return: fields of parameters, as far as it is what they may return."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .._arguments import shown
from ..errors import ExtensionError
from ..extension import Extension
from .view import ParameterView

FIELDS: set[str] = set()  # every field that was ever written, for `unextend`


def of_its_own(result: Any, p: Tensor, shown: set[int]) -> Any:
    """A field that may be written to: the gradients of two biases can be one tensor, or that of one repeat an entry."""
    if type(result) is not Tensor or result.dim() <= p.dim():
        return result
    memory = result.untyped_storage().data_ptr()
    repeats = any(step == 0 and size > 1 for size, step in zip(result.shape, result.stride(), strict=True))
    own = result.clone(memory_format=torch.contiguous_format) if repeats or memory in shown else result
    shown.add(memory)
    return own


def check_written(extension: Extension, view: ParameterView, method: str) -> None:
    """What a view returns is shared by all extensions."""
    if what := view.written():
        raise ExtensionError(
            f"{type(extension).__name__}.{method} wrote into what `{what}()` of `{view.name}` returned, which all "
            f"extensions share; compute a new tensor instead (`.sqrt()` for `.sqrt_()`), or write into a `.clone()`."
        )


def checked_fields(extension: Extension, results: Any, names: Collection[str], method: str) -> dict[str, Tensor]:
    """Fields by the names of the parameters, as an extension has returned them; None leaves one out."""
    unknown = [name for name in results if name not in names] if isinstance(results, Mapping) else None
    if unknown or unknown is None:
        got = f"a field for {shown(unknown[0])}, which no view is named" if unknown else type(results).__name__
        raise ExtensionError(
            f"{type(extension).__name__}.{method} returned {got}; it must return a dictionary of tensors by the names "
            f"of the views ({{view.name: ...}}), empty if there is nothing."
        )
    return {name: checked(extension, name, one, method) for name, one in results.items() if one is not None}


def checked(extension: Extension, name: str, result: Any, method: str) -> Tensor:
    """A field is a tensor."""
    if isinstance(result, Tensor):
        return result
    raise ExtensionError(
        f"{type(extension).__name__}.{method} returned {type(result).__name__} for `{name}`; a field must be a tensor, "
        f"None leaves it out."
    )


def check_late(extension: Extension, view: ParameterView, before: int, result: Tensor | None) -> None:
    """What was computed from a sum that is not there yet was computed from zeros, and no field may show it."""
    late = view.late[before:]
    if late and any(one.out is not result for one in late):
        raise ExtensionError(
            f"{type(extension).__name__}.finish returned for `{view.name}` something else than what `weighted_sum` "
            f"gave, which perex(max_memory=...) fills in later; return that alone (pass what is to be added as "
            f"weighted_sum(w, onto=...)), or set late_sums = False."
        )
