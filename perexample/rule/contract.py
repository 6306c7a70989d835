"""What a rule returns is checked, and an error in it says whose code it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._arguments import shown
from .._private import version
from .._tree import tensors_of
from ..errors import PerExampleError, RuleContractError
from ..terms import Term

if TYPE_CHECKING:
    from .base import Call, Rule


_OURS = "perexample."  # rules in there write into nothing, which the tests see to: it is not looked at in each call


def asked(rule: Rule, kind: str, call: Call, g: Any, *args: Tensor) -> Any:
    """What a method of a rule returns; an error inside of it does not say whose code it was."""
    given = [] if type(rule).__module__.startswith(_OURS) else _given(call, g, args)
    counts = [version(t) for _, t in given]
    try:
        found = getattr(rule, kind)(call, g, *args)
    except (PerExampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        inputs = ", ".join(f"{name} {list(v.shape)}" for name, v in call.saved.items() if isinstance(v, Tensor))
        dtypes = {name: p.dtype for name, p in call.params.items() if p.dtype != tensors_of(g)[0].dtype}
        raise RuleContractError(
            f"{_where(rule, call, kind)} failed, {type(error).__name__}: {error}. It was given g of shape "
            f"{', '.join(str(list(t.shape)) for t in tensors_of(g))}"
            + (f" and {inputs}" if inputs else "")
            + "; a rule must serve every shape that the module's forward does"
            + "".join(f", and `{name}` is {dtype}: use it as p.to(g.dtype)" for name, dtype in dtypes.items())
            + "."
        ) from error
    for (name, t), count in zip(given, counts, strict=True):
        if version(t) != count:
            raise RuleContractError(
                f"{_where(rule, call, kind)} wrote into {name}, which others go on with: the gradients of other "
                f"modules, or data, are not what they were. Compute a new tensor (g * x for g.mul_(x))."
            )
    return found


def told(rule: Rule, kind: str, of: str, *args: Any) -> Any:
    """What a rule says of a module or call before the backward; an error inside of it says whose code it was."""
    try:
        return getattr(rule, kind)(*args)
    except (PerExampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuleContractError(
            f"`{type(rule).__name__}.{kind}` for {of} failed, {type(error).__name__}: {error}."
        ) from error


def reason(rule: Rule, module: Any) -> str | None:
    """Why a rule refuses a module, ``None`` if it does not."""
    found = told(rule, "refuse", type(module).__name__, module)
    if found and not isinstance(found, str):
        raise RuleContractError(
            f"`{type(rule).__name__}.refuse` for {type(module).__name__} returned {shown(found)}; return None, or the "
            f"reason, as it is to follow the module's name in an error: 'has an option set that ...; build it without'."
        )
    return found or None


def captured(
    rule: Rule, module: Any, args: tuple, kwargs: dict, output: Any, name: str, *, moved: bool
) -> dict[str, Any]:
    """What `Rule.capture` returned, after checking that it can be kept; ``moved``: its rows are brought to axis 0."""
    where = f"`{type(rule).__name__}.capture` for `{name}` ({type(module).__name__})"
    try:
        saved = rule.capture(module, args, kwargs, output)
    except (PerExampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuleContractError(
            f"{where} failed, {type(error).__name__}: {error}. It is called as capture(module, args, kwargs, output), "
            f"with what was passed by name in args too, in the order of forward."
        ) from error
    if not isinstance(saved, dict):
        raise RuleContractError(
            f"{where} returned {type(saved).__name__}; return a dict of what the backward needs, by names of your own."
        )
    if moved and not rule.own_axes:
        unnamed = {key: value for key, value in saved.items() if key not in rule.batched and tensors_of(value)}
        for key, t in [(key, t) for key, value in unnamed.items() for t in _not_of_module(module, value)]:
            raise RuleContractError(
                f"{where} returned `{key}`, a tensor of shape {list(t.shape)}, and `batched` does not name it, so that "
                f"its rows would not come on axis 0, and here they are elsewhere; name it: batched = "
                f"{(*rule.batched, key)}. Take what all examples share from call.module, or compute it when the "
                f"gradient is there."
            )
    return saved


def _not_of_module(module: Any, value: Any) -> list[Tensor]:
    """Tensors that may be data: all but single numbers and what a module keeps."""
    kept = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    own = {t.data_ptr() for t in kept if t.layout is torch.strided}
    return [t for t in tensors_of(value) if t.dim() and (t.layout is not torch.strided or t.data_ptr() not in own)]


def _given(call: Call, g: Any, args: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    """All tensors that a rule is given, by what they are called in it."""
    found = [("g", t) for t in tensors_of(g)] + [("w", w) for w in args]
    found += [(f"call.saved[{name!r}]", t) for name, value in call.saved.items() for t in tensors_of(value)]
    return found + [(f"the parameter `{name}`", p) for name, p in call.params.items()]


def checked_terms(rule: Rule, call: Call, terms: Any) -> dict[str, Term]:
    """What `Rule.terms` returned, after checking names and kinds."""
    _check_names(rule, call, terms, "terms")
    for name, term in terms.items():
        if not isinstance(term, Term) or (term.n, tuple(term.shape)) != (call.n, tuple(call.params[name].shape)):
            got = f"a Term of [{term.n}, {list(term.shape)}]" if isinstance(term, Term) else type(term).__name__
            raise RuleContractError(
                f"{_where(rule, call, 'terms')} returned {got} for `{name}`; it must be a Term (perexample.terms) of "
                f"N = {call.n} examples and the parameter's shape {list(call.params[name].shape)}."
            )
    return terms


def checked(rule: Rule, call: Call, result: Any, kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """One entry of what a rule returned, after checking names and shape."""
    _check_names(rule, call, result, kind)
    value = result[name]
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RuleContractError(
            f"{_where(rule, call, kind)} returned {got} for `{name}`; it must be a tensor of shape {list(shape)}, "
            f"for N = {call.n} examples and the parameter's shape {list(call.params[name].shape)}."
        )
    as_parameter = value.is_floating_point() or (value.is_complex() and call.params[name].is_complex())
    if not as_parameter or value.dtype.itemsize < 4:
        raise RuleContractError(
            f"{_where(rule, call, kind)} returned {value.dtype} for `{name}`; gradients are floating-point numbers, "
            f"real where the parameter is, and in at least float32, as `g` is."
        )
    if value.device != (device := call.params[name].device):
        raise RuleContractError(
            f"{_where(rule, call, kind)} returned `{name}` on {value.device}, and the parameter is on {device}; make "
            f"new tensors with device=g.device."
        )
    return value


def _check_names(rule: Rule, call: Call, result: Any, kind: str) -> None:
    if not isinstance(result, Mapping):
        raise RuleContractError(
            f"{_where(rule, call, kind)} returned {type(result).__name__}; return a dict with one entry for each "
            f"parameter name."
        )
    if result.keys() != call.params.keys():
        names = sorted("a tensor itself" if isinstance(name, Tensor) else str(name) for name in result)
        raise RuleContractError(
            f"{_where(rule, call, kind)} returned the names {names}, but the parameters that need a "
            f"gradient are {sorted(call.params)} (`call.params`); return exactly these."
        )


def _where(rule: Rule, call: Call, kind: str) -> str:
    return f"`{type(rule).__name__}.{kind}` for `{call.name}` ({type(call.module).__name__})"
