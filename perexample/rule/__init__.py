"""Rules: the derivative algebra of one kind of module, and the registry that finds them.

A rule is one class. It gives ``grad_batch``, and where it knows something cheaper than forming ``[N, *p.shape]`` also
``batch_l2``, ``weighted_sum``, ``batch_dot``, or ``terms``, from which all of these follow::

    @register_rule(Scale)
    class ScaleRule(Rule):
        def grad_batch(self, call, g):
            return {"gain": reduce(g * call.x, "n ... d -> n d", "sum")}  # of einops
"""

from .base import Bound, Call, Rule, Sizes, at_least_float32, evaluate, misplaced, named_arguments, only_parameters
from .contract import asked, captured, checked_terms, told
from .registry import (
    can_refuse,
    function_rule,
    refusal,
    register_rule,
    registered_functions,
    registered_rules,
    rule_for,
    without_rule,
)

__all__ = [
    "Bound",
    "Call",
    "Rule",
    "Sizes",
    "asked",
    "at_least_float32",
    "can_refuse",
    "captured",
    "checked_terms",
    "evaluate",
    "function_rule",
    "misplaced",
    "named_arguments",
    "only_parameters",
    "refusal",
    "register_rule",
    "registered_functions",
    "registered_rules",
    "rule_for",
    "told",
    "without_rule",
]
