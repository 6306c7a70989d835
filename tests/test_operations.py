"""Parameters used bare, functionally or in folded layouts: exact for every row of operation_cases.py, or refused."""

import harness
import operation_cases
import pytest
import torch
from operation_cases import MIXED, ROWS

from perexample import check, plan

SIZES = (1, 2, 4)
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),  # of nn.Transformer, time-major
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def ids(row):
    return row.id


def runs():
    """Each row with every number of examples, alone (N = 2) and behind a linear layer."""
    return [
        pytest.param(row, n, id=f"{row.id}-n{n}{'-trap' if n in row.traps else ''}")
        for row in ROWS
        for n in sorted({*SIZES, *row.traps})
    ]


@pytest.mark.parametrize(("row", "n"), runs())
def test_exact(row, n):
    model, inputs = row.build(n, deep=n != 2)
    harness.assert_exact(model, inputs, **row.settings())


@pytest.mark.parametrize("row", [row for row in ROWS if row.empty], ids=ids)
def test_no_example_at_all(row):
    model, inputs = row.build(0, deep=True)
    harness.assert_exact(model, inputs, **row.settings())


@pytest.mark.parametrize("row", [row for row in MIXED if not row.exact_is_fine], ids=ids)
def test_refused(row):
    model, inputs = build(row)
    harness.assert_refused(model, inputs, row.error, row.match, row.extra)


@pytest.mark.parametrize("row", [row for row in MIXED if row.exact_is_fine], ids=ids)
def test_exact_or_refused(row):
    model, inputs = build(row)
    harness.assert_exact_or_refused(model, inputs, row.match)


def build(row):
    torch.manual_seed(0)
    model, inputs = row.make(), row.inputs(row.n)
    return harness.jittered(model), inputs


@pytest.mark.parametrize("row", [row for row in MIXED if row.error is operation_cases.CrossExampleError], ids=ids)
def test_the_refused_rows_do_mix_examples(row):
    """What the backward of the batch gives is not the mean of what the examples give alone."""
    problem = harness.Problem(*build(row))
    mean = {name: rows.mean(0) for name, rows in problem.wanted().items()}
    worst = max((mean[name] - grad).abs().max() for name, grad in problem.plain().items())
    assert (worst < 1e-10) == row.exact_is_fine


def test_every_row_has_a_name_of_its_own():
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert len({row.id for row in MIXED}) == len(MIXED)


@pytest.mark.parametrize("row", ROWS[:: len(ROWS) // 12], ids=ids)
def test_plan_lists_every_trainable_parameter(row):
    model, _ = row.build(2)
    listed = [name for row in plan(model) for name in row.parameters]
    assert len(listed) >= len({name.rpartition(".")[2] for name in harness.trainable(model)})


@pytest.mark.parametrize(
    "name", ["layer-scale", "cls-expand-cat-linear", "swin-masked", "x@W", "tied-head-functional", "time-major"]
)
def test_check_agrees(name):
    row = next(row for row in ROWS if row.id == name)
    assert check(*row.build(4)[:1], lambda output: harness.losses(output).mean(), *row.build(4)[1]).ok
