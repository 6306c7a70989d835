"""Per-example gradients, norms and clipped sums during ``loss.backward()``, and private training on top."""

from . import rules as rules  # registers the rules
from ._engine.context import perex
from .check import CheckReport, check
from .errors import (
    BatchAxisError,
    CheckFailedError,
    ConfigurationError,
    CrossExampleError,
    ExtensionError,
    LossError,
    MemoryBoundWarning,
    NonFiniteExampleWarning,
    PerExampleError,
    PrivacyBudgetError,
    RuleContractError,
    StaleGradientError,
    UncoveredParameterError,
    UnsupportedModuleError,
)
from .extension import Extension, ParameterView
from .model import extend, unextend
from .optim import DP_SGD, privatize
from .plan import Plan, plan
from .recorded import RecordedStep
from .recorded_model import RecordedModel
from .rule import Bound, Call, Rule, Sizes, register_rule, registered_functions, registered_rules
from .rules import GenericRule

__version__ = "0.1.0"

__all__ = [
    "DP_SGD",
    "BatchAxisError",
    "Bound",
    "Call",
    "CheckFailedError",
    "CheckReport",
    "ConfigurationError",
    "CrossExampleError",
    "Extension",
    "ExtensionError",
    "GenericRule",
    "LossError",
    "MemoryBoundWarning",
    "NonFiniteExampleWarning",
    "ParameterView",
    "PerExampleError",
    "Plan",
    "PrivacyBudgetError",
    "RecordedModel",
    "RecordedStep",
    "Rule",
    "RuleContractError",
    "Sizes",
    "StaleGradientError",
    "UncoveredParameterError",
    "UnsupportedModuleError",
    "check",
    "extend",
    "perex",
    "plan",
    "privatize",
    "register_rule",
    "registered_functions",
    "registered_rules",
    "unextend",
]
