"""`plan`: which rule answers for what, and for given inputs every tap that the forward leaves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ._engine.context import perex
from ._engine.state import listening
from ._engine.tap import Tap
from ._engine.units import unit_parameters
from ._private import own_parameters
from ._table import table
from ._tree import tensors_in
from .errors import ConfigurationError
from .extension import Extension, ParameterView
from .methods import ROOM, Choice
from .model import extend
from .rule import Rule, refusal, rule_for
from .terms import Term


@dataclass(frozen=True)
class PlanRow:
    """One module that has parameters, or is refused; or with inputs, one tap.

    Attributes:
        path: Path of the module, empty for the model itself; of a tap its name, ``path:function`` for a function.
        module: Name of its class, or ``"function"``.
        rule: Name of its rule, ``"frozen"``, ``"operations"`` or ``"refused"``.
        parameters: Its trainable parameters and their shapes.
        note: Why it is refused, or what will happen.
        axis: Of a tap, where it holds the examples: ``axis 0``, ``axis 1 [2 x N x 4]`` if others are folded into it.
        norm: Of a tap, how the norms of its gradients will be taken; and their sum, where that has ways of its own.
    """

    path: str
    module: str
    rule: str
    parameters: dict[str, tuple[int, ...]]
    note: str = ""
    axis: str = ""
    norm: str = ""


class Plan(list[PlanRow]):
    """The rows of `plan`; prints as a table."""

    def __str__(self) -> str:
        """The rows as a table."""
        if any(row.axis for row in self):
            header = ("tap", "class", "rule", "trainable", "examples", "norm")
            taps = [(row.path, row.module, row.rule, _parameters(row), row.axis, row.norm) for row in self]
            return table(header, taps)
        rows = [(row.path or "(model)", row.module, row.rule, _parameters(row), row.note) for row in self]
        return table(("module", "class", "rule", "trainable", "note"), rows)

    __repr__ = __str__


def _parameters(row: PlanRow) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in row.parameters.items())


def plan(
    model: nn.Module, *inputs: Any, batch_dim: int = 0, strategy: str = "measure", room: float = ROOM, **named: Any
) -> Plan:
    """List which rule will differentiate what.

    Without inputs: the modules of the model that hold parameters. A module without a rule is seen through: each torch
    function in it that is given its parameters is tapped. With inputs: one forward and backward of a copy of the model
    shows every tap, where it holds the examples, and how the norms of its gradients are taken for these shapes.

    Args:
        model: Any model; it need not be extended.
        inputs: Inputs of the model, one batch.
        batch_dim: Axis of the inputs that holds the examples, as for `extend`.
        strategy: How methods are chosen, as for `perex`.
        room: How much memory they may hold, as for `perex`; 1 shows what ``perex(max_memory=...)`` takes.
        named: Inputs by name.

    Returns:
        Rows with path, class, rule and parameters; ``print`` shows them as a table.

    Raises:
        ConfigurationError: If ``model`` is no module, or another argument has no meaning.
        PerExampleError: With inputs, what a backward would raise; the message names the place.

    Example:
        >>> from perexample import plan
        >>> print(plan(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.PReLU())))
        module | class  | rule       | trainable               | note
        -------+--------+------------+-------------------------+-----
        0      | Linear | LinearRule | weight [3, 4], bias [3] |
        2      | PReLU  | PReLURule  | weight [1]              |
        >>> print(plan(nn.Linear(4, 3, bias=False), torch.ones(8, 50, 4)))
        tap    | class  | rule       | trainable     | examples | norm
        -------+--------+------------+---------------+----------+----------------------------
        Linear | Linear | LinearRule | weight [3, 4] | axis 0   | per-example gradients, kept
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"plan takes a torch.nn.Module, not {type(model).__name__}.")
    choice = Choice(strategy, sums=True, room=room)
    return _taps(model, inputs, named, batch_dim, choice) if inputs or named else _modules(model)


def _modules(model: nn.Module) -> Plan:
    rows, inside = Plan(), ""
    for path, module in model.named_modules():
        if inside and (path + ".").startswith(inside):
            continue  # its parameters are those of the module above
        row = _row(path, module)
        if row is not None:
            rows.append(row)
            if row.rule not in ("operations", "refused", "frozen") and next(module.children(), None) is not None:
                inside = path + "."
    return rows


def _row(path: str, module: nn.Module) -> PlanRow | None:
    kind = type(module).__name__
    if reason := refusal(module):
        return PlanRow(path, kind, "refused", {}, reason)
    rule = rule_for(module)
    if rule is None:
        own = {n: tuple(p.shape) for n, p in own_parameters(module).items() if p is not None and p.requires_grad}
        return PlanRow(path, kind, "operations", own, "seen through: each use of them is tapped") if own else None
    if next(module.parameters(), None) is None:
        return None
    params = {name: tuple(p.shape) for name, p in unit_parameters(module, rule).items()}
    return PlanRow(path, kind, type(rule).__name__ if params else "frozen", params)


class _Nothing(Extension):
    """Asks for nothing, so that only the taps are filled."""

    field = "plan_nothing"

    def compute(self, view: ParameterView) -> None:
        return None


def _taps(model: nn.Module, inputs: tuple, named: dict[str, Any], batch_dim: int, choice: Choice) -> Plan:
    model = extend(copy.deepcopy(model), batch_dim=batch_dim)
    rows = Plan()

    def note(tap: Tap, rule: Rule, terms: dict[str, Term]) -> None:
        shapes = {_described(tap, name, p): tuple(p.shape) for name, p in tap.params.items()}
        norms = _norms(terms, choice)
        rows.append(PlanRow(tap.name, tap.kind, type(rule).__name__, shapes, "", repr(tap.places[0]), norms))

    with listening(note), perex(_Nothing(), loss_reduction="sum", grad=False):
        outputs = [t for t in tensors_in(_outputs(model(*inputs, **named))) if t.requires_grad]
        if not outputs:
            raise ConfigurationError(
                "The model gives no tensor with a gradient for these inputs, so there are no taps."
            )
        _total(outputs).backward()
    rows.reverse()  # the backward begins at the end
    return rows


def _described(tap: Tap, name: str, given: Tensor) -> str:
    """A parameter by its name; what was computed from parameters, by theirs."""
    if tap.run is None:
        return name
    if given.grad_fn is None:
        return tap.run.names[id(given)][1] if tap.kind == "function" else name
    leaves = tap.run.found.sources[id(given)].leaves
    return f"{name} from {' and '.join(tap.run.names[id(p)][1] for p in leaves if id(p) in tap.run.names)}"


def _norms(terms: dict[str, Term], choice: Choice) -> str:
    """How norms are taken; which parameter's is said only where they differ."""
    methods: dict[str, list[str]] = {}
    for name, term in terms.items():
        methods.setdefault(term.described(choice), []).append(name)
    if len(methods) == 1:
        return next(iter(methods))
    return "; ".join(f"{', '.join(names)}: {method}" for method, names in methods.items())


def _outputs(output: Any) -> Any:
    return output if list(tensors_in(output)) else vars(output) if hasattr(output, "__dict__") else output


def _total(outputs: list[Tensor]) -> Tensor:
    total = outputs[0].sum()
    for t in outputs[1:]:
        total = total + t.sum()
    return total
