"""The registry: which rule is right for a module or a torch function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .._arguments import flag, shown
from .._private import hides, may_be_parametrized, own_parameters
from ..errors import ConfigurationError, RuleContractError
from .base import Rule
from .contract import reason, told

_REGISTRY: dict[type[nn.Module], Rule] = {}
_FUNCTIONS: dict[Any, Rule] = {}
_REFUSING: dict[type[nn.Module], list[Rule]] = {}  # a weak dictionary takes four times as long
_WITHOUT_RULE: dict[type[nn.Module], bool] = {}
_MOST_CLASSES = 4096
_HARMLESS = {
    "__init__", "__repr__", "__setstate__", "__getstate__", "__dir__", "extra_repr", "reset_parameters",
    "reset_running_stats", "flatten_parameters", "all_weights", "_apply", "_load_from_state_dict",
    "_save_to_state_dict", "_replicate_for_data_parallel", "_fill_padding_idx_with_zero",
}  # fmt: skip
R = TypeVar("R", bound=type[Rule])


def register_rule(*targets: Any, overwrite: bool = False) -> Callable[[R], R]:
    """Decorator: use a rule for modules of these classes, and subclasses that leave alone what ``forward`` calls.

    A rule may be registered for torch functions too, such as ``F.linear``; `Rule.bind` then says what takes the place
    of the module's inputs and parameters.

    Args:
        targets: Classes of `torch.nn.Module`, or torch functions.
        overwrite: Replace a rule that is registered already.

    Returns:
        The decorator, which hands back the rule class.

    Raises:
        ConfigurationError: If a target is neither, or has a rule already and ``overwrite`` is false.
        RuleContractError: If the rule defines no gradient.

    Example:
        >>> from perexample import Rule, register_rule
        >>> class Gain(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.gain
        >>> @register_rule(Gain)
        ... class GainRule(Rule):
        ...     def grad_batch(self, call, g):
        ...         return {"gain": (g * call.x).reshape(call.n, -1, 3).sum(1)}
    """
    _check_targets(targets)
    overwrite = flag("overwrite", overwrite)

    def decorate(rule_class: R) -> R:
        rule = _made(rule_class)
        for target in targets:
            known = _registry_of(target).get(target)
            if known is not None and not overwrite:
                raise ConfigurationError(
                    f"{target.__name__} has the rule {type(known).__name__} already; pass overwrite=True to replace it."
                )
        for target in targets:
            _registry_of(target)[target] = rule
        _REFUSING.clear()
        _WITHOUT_RULE.clear()
        return rule_class

    return decorate


def _registry_of(target: Any) -> dict[Any, Rule]:
    return _REGISTRY if isinstance(target, type) else _FUNCTIONS


def _check_targets(targets: tuple) -> None:
    """Refuse what calls are not seen of."""
    if not targets:
        raise ConfigurationError("register_rule needs at least one module class: @register_rule(MyModule).")
    for target in targets:
        if not (isinstance(target, type) and issubclass(target, nn.Module)) and not _is_torch_function(target):
            raise ConfigurationError(
                f"register_rule takes classes of torch.nn.Module, or torch functions; {target!r} is neither: "
                f"@register_rule(MyModule). A function of your own cannot be seen as a whole, and needs no rule: what "
                f"it calls is followed. Put a torch.autograd.Function into a module, and register a rule for that."
            )


def _made(rule_class: Any) -> Rule:
    """The one object of a rule class, for all modules."""
    if not (isinstance(rule_class, type) and issubclass(rule_class, Rule)):
        raise RuleContractError(
            f"{rule_class!r} is no class of rules; derive it from perexample.Rule. What a function computes from a "
            f"module, its input and a gradient (a grad sampler of Opacus) goes into grad_batch(self, call, g): it "
            f"has call.module and call.x, and returns a dict with the parameters' names."
        )
    try:
        rule = rule_class()
    except TypeError as error:
        raise RuleContractError(
            f"{rule_class.__name__} is made without arguments when it is registered, and {error}; keep what "
            f"differs between modules in the module, or make a subclass for each."
        ) from error
    if isinstance(rule.batched, str):  # a forgotten comma
        raise RuleContractError(
            f"{rule_class.__name__}.batched is the text {rule.batched!r}; it must be a tuple of names: "
            f"batched = ({rule.batched!r},)."
        )
    _check_methods(rule)
    if rule_class.grad_batch is Rule.grad_batch and rule_class.terms is Rule.terms:
        raise RuleContractError(
            f"{rule_class.__name__} must define grad_batch(self, call, g), or terms(self, call, g)."
        )
    return rule


def _check_methods(rule: Rule) -> None:
    """What overrides a method is one, and takes what it is called with."""
    for name, method in vars(Rule).items():
        if not inspect.isfunction(method) or getattr(type(rule), name) is method:
            continue
        own, arguments = getattr(rule, name), list(inspect.signature(method).parameters)
        called = f"{type(rule).__name__}.{name} is called as {name}({', '.join(arguments[1:])})"
        if not callable(own):
            raise RuleContractError(f"{called}, and is {shown(own)}; make it a method that returns this.")
        try:
            inspect.signature(own).bind(*arguments[1:])
        except TypeError as error:
            raise RuleContractError(f"{called}, and takes other arguments: {error}.") from error


def _is_torch_function(target: Any) -> bool:
    """Whether calls of it can be seen: a function of torch, a method of tensors, or one that dispatches as these do."""
    if not callable(target) or isinstance(target, type) or not hasattr(target, "__name__"):
        return False
    if isinstance(getattr(target, "__self__", None), type):  # torch.autograd.Function.apply
        return False
    code = getattr(inspect.unwrap(target), "__code__", None)
    return code is None or target.__module__.split(".")[0] == "torch" or "handle_torch_function" in code.co_names


def function_rule(function: Any) -> Rule | None:
    """The rule that is registered for a torch function."""
    return _FUNCTIONS.get(function)


def registered_functions() -> dict[Any, Rule]:
    """All rules by torch function, in the order of registration."""
    return dict(_FUNCTIONS)


def registered_rules() -> dict[type[nn.Module], Rule]:
    """All rules by module class, in the order of registration."""
    return dict(_REGISTRY)


def refusal(module: nn.Module) -> str | None:
    """Why this module can have no per-example gradients now, asked of the rules of all its base classes."""
    for rule in _refusing_rules(type(module)):
        if why := reason(rule, module):
            return why
    return None


def without_rule(cls: type[nn.Module]) -> bool:
    """Whether no rule is registered for a class or its bases."""
    known = _WITHOUT_RULE.get(cls)
    if known is None:
        if len(_WITHOUT_RULE) >= _MOST_CLASSES:
            _WITHOUT_RULE.clear()
        known = _WITHOUT_RULE[cls] = not _rules_of(cls)
    return known


def can_refuse(module: nn.Module) -> bool:
    """Whether some rule would look at this module before it is used."""
    return bool(_refusing_rules(type(module)))


def _rules_of(cls: type) -> list[Rule]:
    """The registered rules of a class and its bases, nearest first."""
    return [_REGISTRY[base] for base in cls.__mro__ if base in _REGISTRY]


def _refusing_rules(cls: type[nn.Module]) -> list[Rule]:
    found = _REFUSING.get(cls)
    if found is None:
        if len(_REFUSING) >= _MOST_CLASSES:  # some libraries make a class for each module
            _REFUSING.clear()
        found = _REFUSING[cls] = [rule for rule in _rules_of(cls) if type(rule).refuse is not Rule.refuse]
    return found


def rule_for(module: nn.Module) -> Rule | None:
    """The registered rule that is right for this very object, or ``None``.

    An object or a subclass has the rule of its class or base only if it computes the same: it leaves all methods alone
    that take part in ``forward``, owns no further parameters, shows those that it owns as they are, and is not
    parametrized.

    Returns:
        The rule object, shared by all modules of the class.
    """
    if may_be_parametrized(module) and parametrize.is_parametrized(module):
        return None
    cls = type(module)
    for base in cls.__mro__:
        rule = _REGISTRY.get(base)
        if rule is not None:
            same = not hides(module, _functions_of(base)) and (cls is base or _same_forward(module, cls, base))
            return rule if same and told(rule, "covers", cls.__name__, module) else None
    return None


def _same_forward(module: nn.Module, cls: type, base: type) -> bool:
    """Whether a subclass leaves all alone of its base that could take part in its forward, and its parameters."""
    names = _functions_of(base) | {"__getattr__", "__getattribute__", *own_parameters(module)}
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in names)


@cache
def _functions_of(base: type) -> frozenset[str]:
    """Names of what a registered class, and its bases below ``nn.Module``, could compute its forward with."""
    found = {
        name
        for part in base.__mro__ if part not in nn.Module.__mro__
        for name, value in vars(part).items() if callable(value) or isinstance(value, property)
    }  # fmt: skip
    return frozenset(found - _HARMLESS | {"forward"})
