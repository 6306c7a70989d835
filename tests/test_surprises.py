"""Models and uses in which per-example gradients came out silently wrong once, or failed for no good reason."""

import copy

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perexample import BatchAxisError, CrossExampleError, LossError, UnsupportedModuleError, extend, perex
from perexample.extensions import BatchGrad, ClippedGrad

DOUBLE = {"dtype": torch.float64}


def rand(*shape):
    return torch.randn(*shape, **DOUBLE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def exact(model, loss, *inputs):
    """Mean of the rows is ``p.grad`` and each row is the gradient of its example alone."""
    model = extend(model.double())
    with perex(BatchGrad()):
        loss(model, *inputs).backward()
    found = {name: (p.grad_batch, p.grad) for name, p in model.named_parameters()}
    for name, (rows, grad) in found.items():
        assert rows.shape[0] == len(inputs[0]), name
        torch.testing.assert_close(rows.mean(0), grad, rtol=1e-9, atol=1e-12)
    for i in range(len(inputs[0])):
        one = [x[i : i + 1] for x in inputs]
        grads = torch.autograd.grad(loss(model, *one), list(model.parameters()))
        for (name, (rows, _)), grad in zip(found.items(), grads, strict=True):
            torch.testing.assert_close(rows[i], grad, rtol=1e-8, atol=1e-12, msg=name)


def square(model, *inputs):
    return model(*inputs).square().mean()


def test_a_hook_on_the_output_that_changes_the_gradient():
    def loss(model, x):
        h = model(x)
        h.register_hook(lambda g: g * 0.25)
        return h.square().mean()

    exact(nn.Linear(4, 3), loss, rand(5, 4))


def test_a_forward_hook_in_front_of_ours():
    model = extend(nn.Linear(4, 3).double())
    model.register_forward_hook(lambda module, args, output: output * 2, prepend=True)
    x = rand(5, 4)
    with perex(BatchGrad()):
        square(model, x).backward()
    torch.testing.assert_close(model.weight.grad_batch.mean(0), model.weight.grad)


def test_a_hook_on_a_parameter_is_refused():
    model = extend(nn.Linear(4, 3))
    model.weight.register_hook(lambda g: g * 0)
    with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=r"`weight` has a gradient hook"):
        square(model, torch.randn(5, 4)).backward()


def test_arguments_by_name_in_any_order():
    exact(nn.Bilinear(3, 3, 2), lambda m, a, b: m(input2=b, input1=a).square().mean(), rand(5, 3), rand(5, 3))
    exact(
        nn.ConvTranspose2d(2, 3, 3, stride=2),
        lambda m, x: m(output_size=(8, 8), input=x).square().mean(),
        rand(4, 2, 3, 3),
    )


class TimeMajorOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x, times):
        return (self.linear(x) * times[None, :, None]).transpose(0, 1)


def test_the_first_input_says_how_many_examples():
    model, x, times = extend(TimeMajorOut().double()), rand(5, 7, 3), rand(7)
    with perex(BatchGrad()):
        model(x, times).square().mean().backward()
    assert model.linear.weight.grad_batch.shape == (5, 4, 3)
    torch.testing.assert_close(model.linear.weight.grad_batch.mean(0), model.linear.weight.grad)


def test_a_list_of_sequences_is_refused():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, sequences):
            return self.linear(torch.stack(sequences)).mean(1)

    model = extend(Stacked())
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match="cannot be told"):
        square(model, [torch.randn(7, 3) for _ in range(5)]).backward()


@pytest.mark.parametrize("gate", [0.0, 1e-6, 1.0])
def test_a_gate_that_hides_what_it_multiplies(gate):
    """As many positions as examples, and outputs that do not show which is which."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.full((3,), gate))

        def forward(self, x, positions):
            return x + self.gate * positions

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()
            self.register_buffer("positions", torch.randn(5, 3))

        def forward(self, x):
            return self.gate(x, self.positions)

    exact(Model(), square, rand(5, 5, 3))


def test_mixing_under_a_zero_gate_is_refused():
    class ReZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.alpha * (x - x.mean(0)).square()

    model = extend(ReZero().double())
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match=r"`mean` in `ReZero` \(ReZero\) mixes examples"):
        (model(rand(5, 4)) ** 3).mean().backward()


def test_two_models_with_the_same_parameter_names():
    a, b, clipping = extend(nn.Linear(3, 3)), extend(nn.Linear(3, 3)), ClippedGrad(1.0, groups="per-parameter")
    with perex(BatchGrad(), clipping):
        b(a(torch.randn(5, 3))).square().mean().backward()
    for p in (*a.parameters(), *b.parameters()):
        torch.testing.assert_close(p.grad_batch.mean(0), p.grad)
        assert p.clipped_sum.shape == p.shape
    assert len(clipping.group_norms) == 4


def test_one_model_in_two_layouts():
    class Layout(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x, time_major=False):
            return self.linear(x.transpose(0, 1)).transpose(0, 1) if time_major else self.linear(x)

    model, x, found = extend(Layout().double()), rand(5, 5, 3), []
    for time_major in (False, True, False):
        with perex(BatchGrad()):
            model(x, time_major).square().mean().backward()
        found.append(model.linear.weight.grad_batch)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_model_that_calls_itself_without_gradients():
    class SelfConditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, condition=None):
            if condition is None:
                with torch.no_grad():
                    condition = self(x, torch.zeros_like(x))
            return self.linear((x + condition).transpose(0, 1)).transpose(0, 1)

    model = extend(SelfConditioned().double())
    with perex(BatchGrad()):
        square(model, rand(5, 7, 3)).backward()
    assert model.linear.weight.grad_batch.shape == (5, 3, 3)
    torch.testing.assert_close(model.linear.weight.grad_batch.mean(0), model.linear.weight.grad)


@pytest.mark.parametrize("more", [lambda loss: loss * 1.0, lambda loss: loss + 0.1 * loss, lambda loss: loss])
def test_a_common_divisor_anywhere_in_the_loss(more):
    model, y = extend(nn.Linear(4, 3)), torch.tensor([0, 1, -100, 2, -100])
    with perex(BatchGrad()), pytest.raises(LossError, match="divisor"):
        more(F.cross_entropy(model(torch.randn(5, 4)), y)).backward()


def test_state_that_a_model_keeps_for_itself():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.hidden, self.calls = nn.Linear(4, 3), 0.0, 0

        def forward(self, x):
            self.calls += 1
            output = self.linear(x) + self.hidden
            self.hidden = output[-1:].detach()
            return output

    model = Stateful()
    plain, x = copy.deepcopy(model), torch.randn(5, 4)
    extend(model)
    with perex(BatchGrad()):
        square(model, x).backward()
    plain(x)
    assert model.calls == 1
    torch.testing.assert_close(model.hidden, plain.hidden)


def test_a_leaf_that_keeps_a_tensor():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            self.last = x * self.weight
            return self.last

    model, x = extend(Keeps()), torch.randn(5, 4)
    with perex(BatchGrad()):
        square(model, x).backward()
    torch.testing.assert_close(model.last, x * model.weight)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_a_leaf_with_a_function_that_vmap_does_not_know():
    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return Doubled.apply(x * self.weight).tanh()

    exact(Leaf(), square, rand(5, 4))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.weight


HALF = {
    "leaf": Scale,
    "lstm": lambda: nn.LSTM(4, 4, batch_first=True),
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("name", HALF)
def test_the_generic_rule_in_bfloat16(name, autocast):
    if autocast and name == "lstm":
        naive.lstm_in_bfloat16()
    model, x = HALF[name](), torch.randn(5, 3, 4)
    exact_model = extend(copy.deepcopy(model).double())
    with perex(BatchGrad()):
        first(exact_model(x.double())).square().mean().backward()
    extend(model if autocast else model.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = first(model(x if autocast else x.bfloat16())).float().square().mean()
    with perex(BatchGrad()):
        loss.backward()
    scale = max(p.grad_batch.abs().max().item() for p in exact_model.parameters())
    for p, q in zip(model.parameters(), exact_model.parameters(), strict=True):
        assert p.grad_batch.dtype == torch.float32
        assert (p.grad_batch - q.grad_batch).abs().max() <= 0.1 * scale


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_clipped_gradients_of_a_million_parameters(value):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(10**6))

        def forward(self, x):
            return x * self.weight

    model = extend(Wide())
    with perex(ClippedGrad(1.0), grad=False):
        model(torch.full((1, 1), value)).sum().backward()
    assert model.weight.clipped_sum.double().norm() <= 1 + 1e-6


def test_factors_too_small_for_float32():
    model, clipping = extend(nn.Linear(8, 4)), ClippedGrad(1.0)
    with perex(clipping, grad=False):
        model(torch.randn(1, 8) * 8.9e21).square().mean().backward()
    norm = sum(p.clipped_sum.double().square().sum() for p in model.parameters()).sqrt()
    assert 1 - 1e-5 <= norm <= 1 + 1e-6


def test_a_bound_lowered_while_sums_are_under_way():
    model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(10.0)
    for bound in (10.0, 0.1):
        clipping.max_norm = bound
        with perex(clipping, grad=False):
            model(torch.ones(1, 3) * 50).sum().backward()
    assert clipping.sensitivity() == 10.0


def test_a_second_backward_names_the_remedy():
    model = extend(nn.Linear(4, 3))
    loss = F.mse_loss(model(torch.randn(5, 4)), torch.randn(5, 3))
    with perex(BatchGrad()):
        loss.backward()
        with pytest.raises(LossError, match="retain_graph=True"):
            loss.backward()


def test_a_global_forward_hook_is_refused():
    model = extend(nn.Linear(4, 3))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: output * 2)
    try:
        loss = square(model, torch.randn(5, 4))
    finally:
        handle.remove()
    with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=r"`Linear` .*global forward hook.*remove"):
        loss.backward()
    with perex(BatchGrad()):
        square(model, torch.randn(5, 4)).backward()


@pytest.mark.parametrize("inside", [True, False])
def test_the_forward_after_an_interrupt(inside):
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.interrupt = nn.Linear(4, 3), True

        def forward(self, x):
            y = self.linear(x)
            if self.interrupt:
                raise KeyboardInterrupt
            return y

    model, context = extend(Interrupted()), perex(BatchGrad())
    if inside:
        context.__enter__()
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(7, 4))
    model.interrupt = False
    loss = square(model, torch.randn(5, 4))
    if not inside:
        context.__enter__()
    loss.backward()
    context.__exit__(None, None, None)
    assert model.linear.weight.grad_batch.shape == (5, 3, 4)
