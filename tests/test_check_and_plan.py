"""`check` finds what is wrong and passes what is right; `plan` names the rule of every module."""

import pytest
import torch
from torch import nn

from perexample import (
    CheckFailedError,
    ConfigurationError,
    CrossExampleError,
    GenericRule,
    Rule,
    RuleContractError,
    check,
    extend,
    plan,
    register_rule,
)


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x):
        return x * self.gain


class BatchMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        h = self.linear(x)
        return h - h.mean(0)


def batch(n=4):
    torch.manual_seed(0)
    return torch.randn(n, 3), torch.randn(n, 2)


def test_a_right_model_passes_and_is_left_alone():
    model = nn.Sequential(Gain(), nn.Linear(3, 2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    report = check(model, nn.MSELoss(), *batch())
    assert report.ok
    assert max(row.error for row in report.rows) < 1e-12
    assert "all right" in str(report)
    assert "0.gain" in str(report)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_wrong_rule_fails_by_name(registry):
    @register_rule(Gain)
    class Wrong(Rule):
        def grad_batch(self, call, g):
            return {"gain": 2 * g * call.x}

    with pytest.raises(CheckFailedError, match=r"at `0\.gain`") as failure:
        check(nn.Sequential(Gain(), nn.Linear(3, 2)), nn.MSELoss(), *batch())
    assert [row.parameter for row in failure.value.report.wrong] == ["0.gain"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)).mean(1)


def _normalised():
    return nn.Sequential(nn.Conv1d(6, 4, 3), nn.GroupNorm(4, 4), nn.Flatten(), nn.Linear(24, 2))


@pytest.mark.parametrize(("make", "name"), [(Attention, "key.bias"), (_normalised, "0.bias")])
def test_a_gradient_that_is_zero_but_for_rounding_passes(make, name):
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 6, 8)
    report = check(model, nn.MSELoss(), x, torch.randn_like(model(x)))
    [row] = [row for row in report.rows if row.parameter == name]
    assert row.error < 1e-10


def test_a_wrong_rule_of_small_gradients_fails(registry):
    @register_rule(Gain)
    class Wrong(Rule):
        def grad_batch(self, call, g):
            return {"gain": 2 * g * call.x}

    def loss(out, y):
        return (1e-5 * out[0] + out[1] - y).square().mean()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = Gain(), nn.Linear(3, 3)

        def forward(self, x):
            return self.small(x), self.large(x)

    with pytest.raises(CheckFailedError, match=r"at `small\.gain`:"):
        check(Both(), loss, torch.randn(4, 3), torch.randn(4, 3))


@pytest.mark.parametrize("quantity", ["batch_l2", "weighted_sum"])
def test_a_wrong_fast_path_fails(registry, quantity):
    class Wrong(Rule):
        def grad_batch(self, call, g):
            return {"gain": g * call.x}

        def batch_l2(self, call, g):
            return {"gain": (g * call.x).square().sum(1) * (1 + (quantity == "batch_l2"))}

        def weighted_sum(self, call, g, w):
            return {"gain": torch.einsum("n,ni->i", w, g * call.x) * (1 + (quantity == "weighted_sum"))}

    register_rule(Gain)(Wrong)
    report = check(Gain(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3), raises=False)
    assert not report.ok
    (row,) = report.rows
    assert row.norm > 0.1 or quantity != "batch_l2"
    assert row.weighted_sum > 0.1 or quantity != "weighted_sum"


@pytest.mark.parametrize("quantity", ["weighted_sum", "batch_dot"])
def test_a_single_wrong_fast_path_fails(registry, quantity):
    """What is not asked for first may come from the gradients that are there already."""

    def right(self, call, g):
        return {"gain": g * call.x}

    def wrong(self, call, g, w=None):
        return {"gain": (g * call.x).sum(0) if quantity == "weighted_sum" else torch.zeros(call.n, call.n)}

    register_rule(Gain)(type("Wrong", (Rule,), {"grad_batch": right, quantity: wrong}))
    report = check(Gain(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3), raises=False)
    (row,) = report.rows
    assert row.gradient < 1e-12
    assert row.norm < 1e-12
    assert getattr(row, quantity) > 0.1
    assert not report.ok
    assert "FAIL" in str(report)


def test_a_rule_that_is_wrong_for_a_single_example_fails(registry):
    x = torch.randn(4, 3)
    twice = {"grad_batch": lambda self, call, g: {"gain": g * call.x * (1 if call.n > 1 else 2)}}
    register_rule(Gain)(type("Wrong", (Rule,), twice))
    report = check(Gain(), nn.MSELoss(), x, x.flip(0), raises=False)
    assert report.rows[0].gradient > 0.1
    assert not report.ok
    # Of one example no axis is known, so that it has one more.
    fixed = {"feature_axes": lambda *_: 1, "grad_batch": lambda self, call, g: {"gain": g * call.x}}
    register_rule(Gain, overwrite=True)(type("Wrong", (Rule,), fixed))
    with pytest.raises(RuleContractError, match=r"returned \[1, 1, 3\] for `gain`; .* for N = 1 examples"):
        check(Gain(), nn.MSELoss(), x, x.flip(0))


def test_gradients_of_whole_numbers_are_refused(registry):
    @register_rule(Gain)
    class Whole(Rule):
        def grad_batch(self, call, g):
            return {"gain": (g * call.x).long()}

    with pytest.raises(RuleContractError, match=r"torch\.int64 for `gain`; gradients are floating-point numbers"):
        check(Gain(), nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3))


@pytest.mark.parametrize("labels", [torch.arange(6) % 4, torch.arange(30).view(5, 6) % 4], ids=["[N]", "[T, N]"])
def test_examples_on_another_axis(labels):
    """Of a layer that takes the steps first, with labels of each example or of each step."""

    def loss(out, labels):
        logits = out[0][-1] if labels.dim() == 1 else out[0].mT
        return nn.functional.cross_entropy(logits, labels)

    x = torch.randn(5, 6, 3)
    assert check(nn.LSTM(3, 4), loss, x, labels, batch_dim=1).ok
    with pytest.raises(ConfigurationError, match=r"examples on axis 1 .* \[3, 6\]"):
        check(nn.LSTM(3, 4), loss, x[..., :3].movedim(1, 2), labels, batch_dim=1)
    with pytest.raises(CrossExampleError, match="moves the gradients of others"):
        check(
            nn.LSTM(3, 4),
            lambda out, _: (out[0] - out[0].detach().mean(1, True)).square().mean(),
            x,
            labels,
            batch_dim=1,
        )


@pytest.mark.parametrize("raises", [True, False])
def test_a_batch_mean_in_the_model_is_caught_by_the_name_of_the_operation(raises):
    """There are no gradients of examples that a report could compare."""
    with pytest.raises(CrossExampleError, match=r"`mean` in `BatchMean` \(BatchMean\) mixes examples"):
        check(BatchMean(), nn.MSELoss(), *batch(), raises=raises)


def test_a_batch_mean_in_the_loss_is_caught():
    def centred(out, y):
        return (out - out.mean(0) - y).square().mean()

    with pytest.raises(CrossExampleError, match=r"moves the gradients of others, at `weight`"):
        check(nn.Linear(3, 2), centred, *batch())
    report = check(nn.Linear(3, 2), centred, *batch(), raises=False)
    assert not report.ok
    assert "weight" in [row.parameter for row in report.mixed]
    assert "FAIL" in str(report)


def test_a_contrastive_loss_is_caught():
    def contrastive(out):
        return nn.functional.cross_entropy(out @ out.T, torch.arange(len(out)))

    with pytest.raises(CrossExampleError):
        check(nn.Linear(3, 2), contrastive, batch()[0])


def test_a_criterion_with_weights_of_its_own_is_left_as_it_is():
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 3.0]))
    x, y = batch()
    assert check(nn.Linear(3, 2), criterion, x, y.sigmoid()).ok
    assert criterion.pos_weight.dtype == torch.float32


@pytest.mark.parametrize("returned", [1.0, (torch.ones(()), None), None])
def test_what_is_no_loss_is_told_so(returned):
    with pytest.raises(ConfigurationError, match=r"loss_fn returned .*must return a tensor"):
        check(nn.Linear(3, 2), lambda out, y: returned, *batch())


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

    def forward(self, x):
        x.requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_computes_derivatives_is_checked(registry):
    register_rule(Slope)(GenericRule)
    assert check(Slope(), lambda out: out.square().mean(), torch.randn(4, 3)).ok


def test_a_model_whose_state_goes_on_with_each_forward_is_checked():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Tanh())
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.randn(3, 3))  # what it has found out is for another one
    assert check(model, nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3)).ok


def test_sum_losses_dropout_and_nested_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

        def forward(self, inputs):
            return self.drop(self.linear(inputs["x"]))

    x, y = batch()
    report = check(Net(), nn.MSELoss(reduction="sum"), {"x": x}, y, loss_reduction="sum")
    assert report.ok
    assert "dropout" in str(report)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check(nn.Linear(3, 2), nn.MSELoss(), *batch(1)), "two or more examples"),
        (lambda: check(nn.Linear(3, 2), nn.MSELoss(), batch(3)[0], batch(4)[1]), "two or more examples"),
        (lambda: check(Noisy(), nn.MSELoss(), *batch()), "random numbers"),
    ],
)
def test_what_cannot_be_checked(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


class Noisy(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return nn.functional.dropout(super().forward(x))


def test_plan_lists_rules_frozen_refused_and_what_is_seen_through():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.inner = nn.Linear(3, 3)

    frozen = nn.Linear(3, 3).requires_grad_(False)
    rows = {row.path: row for row in plan(nn.Sequential(nn.Conv1d(1, 2, 3), Gain(), frozen, Bare(), nn.BatchNorm1d(3)))}
    assert rows["0"].rule == "ConvRule"
    assert rows["0"].parameters == {"weight": (2, 1, 3), "bias": (2,)}
    assert rows["1"].rule == rows["3"].rule == "operations"
    assert rows["1"].parameters == {"gain": (3,)}
    assert rows["3"].parameters == {"token": (3,)}
    assert "seen through" in rows["1"].note
    assert rows["2"].rule == "frozen"
    assert rows["3.inner"].rule == "LinearRule"
    assert rows["4"].rule == "refused"
    assert "whole batch" in rows["4"].note


def test_plan_takes_a_registered_container_as_one(registry):
    class Block(nn.Sequential):
        pass

    register_rule(Block)(GenericRule)
    rows = plan(nn.Sequential(Block(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), nn.Linear(2, 1)))
    assert [(row.path, row.rule) for row in rows] == [("0", "GenericRule"), ("1", "LinearRule")]
    assert list(rows[0].parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_plan_for_given_inputs_lists_every_tap_in_the_order_of_the_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gain, self.h = nn.Linear(3, 3), Gain(), nn.Linear(3, 2, bias=False)

        def forward(self, x):
            x = self.a(self.gain(self.a(x.flatten(0, 1)).unflatten(0, x.shape[:2])))
            return self.h(x.transpose(0, 1)).transpose(0, 1) @ self.h.weight

    model = Net()
    taps = plan(model, torch.randn(4, 5, 3))
    assert [(row.path, row.rule, row.axis) for row in taps] == [
        ("a", "LinearRule", "axis 0 [N x 5]"),
        ("gain:mul", "PointwiseRule", "axis 0"),
        ("a#2", "LinearRule", "axis 0"),
        ("h", "LinearRule", "axis 1"),
        ("Net:matmul", "MatmulRule", "axis 0"),
    ]
    assert taps[1].parameters == {"gain.gain": (3,)}
    assert all(row.path in str(taps) and row.norm in str(taps) for row in taps)
    assert plan(model, x=torch.randn(4, 5, 3)) == taps
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(hasattr(p, "grad_batch") or p.grad is not None for p in model.parameters())


def test_plan_for_given_inputs_raises_what_a_backward_would():
    with pytest.raises(CrossExampleError, match=r"`mean` in `BatchMean`"):
        plan(BatchMean(), batch()[0])
    with pytest.raises(ConfigurationError, match="no tensor with a gradient"):
        plan(nn.Linear(3, 2).requires_grad_(False), batch()[0])


def test_plan_prints_the_same_for_an_extended_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    before = str(plan(model))
    assert str(plan(extend(model))) == before


class Positions(nn.Module):
    """Tokens plus positions, the latter looked up once for all examples or once per example."""

    def __init__(self, expanded, time_major):
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 4), nn.Embedding(9, 4), nn.Linear(4, 3)
        self.mix = nn.Linear(4, 4)
        self.expanded, self.time_major = expanded, time_major

    def forward(self, ids):
        where = torch.arange(ids.shape[1])
        x = self.tokens(ids) + self.positions(where.expand(ids.shape) if self.expanded else where)
        x = self.mix(x.transpose(0, 1)).transpose(0, 1) if self.time_major else self.mix(x)
        return self.head(torch.tanh(x)).mean(1)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("n", [2, 5, 7])  # 7 examples of 7 positions: sizes alone cannot tell the axes apart
def test_the_axis_of_the_examples_is_found_where_sizes_are_equal(n, time_major):
    torch.manual_seed(0)
    ids, target = torch.randint(0, 11, (n, 7)), torch.randn(n, 3)
    assert check(Positions(expanded=True, time_major=time_major), nn.MSELoss(), ids, target).ok


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("n", [2, 5, 7])
def test_one_table_for_all_examples_where_sizes_are_equal_too(n, time_major):
    torch.manual_seed(0)
    ids, target = torch.randint(0, 11, (n, 7)), torch.randn(n, 3)
    report = check(Positions(expanded=False, time_major=time_major), nn.MSELoss(), ids, target)
    assert max(row.error for row in report.rows) <= 1e-10
    assert "positions.weight" in [row.parameter for row in report.rows]
