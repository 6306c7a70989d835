"""`plan`: which rule answers for which module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ._engine.record import unit_parameters, unit_rule
from ._private import own_parameters
from ._table import table
from .rule import refusal, rule_for


@dataclass(frozen=True)
class PlanRow:
    """One module that has parameters, or is refused.

    Attributes:
        path: Path of the module; empty for the model itself.
        module: Name of its class.
        rule: Name of its rule, ``"frozen"``, ``"none"`` or ``"refused"``.
        parameters: Its trainable parameters and their shapes.
        note: Why it is refused, or what will happen.
    """

    path: str
    module: str
    rule: str
    parameters: dict[str, tuple[int, ...]]
    note: str = ""


class Plan(list[PlanRow]):
    """The rows of `plan`; prints as a table."""

    def __str__(self) -> str:
        """The rows as a table."""
        rows = [(row.path or "(model)", row.module, row.rule, _parameters(row), row.note) for row in self]
        return table(("module", "class", "rule", "trainable", "note"), rows)

    __repr__ = __str__


def _parameters(row: PlanRow) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in row.parameters.items())


def plan(model: nn.Module) -> Plan:
    """List the modules of a model that hold parameters, with the rule that will differentiate each.

    Args:
        model: Any model; it need not be extended.

    Returns:
        Rows with path, class, rule and parameters; ``print`` shows them as a table.

    Example:
        >>> print(plan(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.PReLU())))
        module | class  | rule       | trainable               | note
        -------+--------+------------+-------------------------+-----
        0      | Linear | LinearRule | weight [3, 4], bias [3] |
        2      | PReLU  | PReLURule  | weight [1]              |
    """
    rows, inside = Plan(), ""
    for path, module in model.named_modules():
        if inside and (path + ".").startswith(inside):
            continue  # its parameters are those of the module above
        row = _row(path, module)
        if row is not None:
            rows.append(row)
            if row.rule not in ("none", "refused", "frozen") and next(module.children(), None) is not None:
                inside = path + "."
    return rows


def _row(path: str, module: nn.Module) -> PlanRow | None:
    kind = type(module).__name__
    if reason := refusal(module):
        return PlanRow(path, kind, "refused", {}, reason)
    rule = unit_rule(module)
    if rule is None:
        own = {n: tuple(p.shape) for n, p in own_parameters(module).items() if p is not None and p.requires_grad}
        return PlanRow(path, kind, "none", own, "bare parameters: using one is an error that names it") if own else None
    if next(module.parameters(), None) is None:
        return None
    params = {name: tuple(p.shape) for name, p in unit_parameters(module, rule).items()}
    if not params:
        return PlanRow(path, kind, "frozen", {})
    note = "" if rule_for(module) is rule else "no rule of its own: the forward is repeated example by example"
    return PlanRow(path, kind, type(rule).__name__, params, note)
