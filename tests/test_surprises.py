"""Models and uses in which per-example gradients came out silently wrong once, or failed for no good reason."""

import collections
import contextlib
import copy
import dataclasses

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools import ModTracker
from torch.utils.flop_counter import FlopCounterMode

from perexample import (
    BatchAxisError,
    CrossExampleError,
    LossError,
    UncoveredParameterError,
    UnsupportedModuleError,
    extend,
    perex,
    register_rule,
)
from perexample._vjp import pulled_back
from perexample.extensions import BatchGrad, ClippedGrad
from perexample.rules.generic import GenericRule

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
    match = r"`weight` has a gradient hook \(register_hook, of test_surprises\)"
    with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=match):
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
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match=r"cannot be told.* \(pad_sequence\).* with a mask"):
        square(model, [torch.randn(7, 3) for _ in range(5)]).backward()


@pytest.mark.parametrize("given", ["with edges", "alone"])
def test_graphs_whose_nodes_lie_in_one_row_are_told_to_be_padded(given):
    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, nodes, graph, edges=None):
            h = self.linear(nodes)
            if edges is not None:
                h = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
            return torch.zeros(int(graph.max()) + 1, 4).index_add(0, graph, h)

    model, graph = extend(Graphs()), torch.tensor([0, 0, 0, 1, 1, 2])
    edges = () if given == "alone" else (torch.tensor([[0, 1, 3], [1, 2, 4]]),)
    with (
        perex(BatchGrad()),
        pytest.raises(BatchAxisError, match=r"nodes of graphs, are padded to \[N, parts, \.\.\.\]"),
    ):
        square(model, torch.randn(6, 3), graph, *edges).backward()


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


def test_operations_of_a_private_step_are_counted():
    """By torch's counter, which follows the modules with hooks on all of them, and the operations with a mode."""
    model, x = (
        extend(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))),
        torch.randn(5, 2, 6),
    )
    clipping, sums = ClippedGrad(1.0), []
    for counter in (contextlib.nullcontext(), ModTracker(), FlopCounterMode(display=False)):
        with counter, perex(clipping, grad=False):
            model(x).square().mean().backward()
        sums.append([p.clipped_sum.clone() for p in model.parameters()])
        clipping.zero_grad()
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(sums[0], sums[2])
    assert counter.get_total_flops() > 0


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


class Calls(nn.Module):
    """A function of the data and some parameters."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, p in parameters.items():
            setattr(self, name, nn.Parameter(p))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def turned(m):
    return torch.polar(m.r.exp(), m.t)


COMPLEX = {
    "matmul": (lambda m, x: (torch.fft.fft(x) @ torch.view_as_complex(m.a)).abs(), {"a": (6, 3, 2)}),
    "linear": (lambda m, x: F.linear(torch.fft.fft(x), torch.view_as_complex(m.a)).abs(), {"a": (3, 6, 2)}),
    "addmm": (
        lambda m, x: torch.addmm(torch.view_as_complex(m.b), torch.fft.fft(x), torch.view_as_complex(m.a)).abs(),
        {"a": (6, 3, 2), "b": (3, 2)},
    ),
    "polar": (lambda m, x: (x.to(torch.cdouble) @ turned(m)).real, {"r": (6, 3), "t": (6, 3)}),
    "conv": (
        lambda m, x: F.conv1d(torch.fft.fft(x)[:, None], torch.view_as_complex(m.a)).abs(),
        {"a": (2, 1, 3, 2)},
    ),
}


@pytest.mark.parametrize(("function", "shapes"), COMPLEX.values(), ids=COMPLEX)
def test_complex_weights_that_are_made_of_real_parameters(function, shapes):
    exact(Calls(function, **{name: rand(*shape) for name, shape in shapes.items()}), square, rand(5, 6))


PUT = {
    "index_put": lambda h, i: torch.zeros_like(h).index_put((i,), h, accumulate=True),
    "index_put_": lambda h, i: torch.zeros_like(h).index_put_((i,), h, accumulate=True),
    "into its own": lambda h, i: h.index_put((i,), 2 * h, accumulate=True),
    "put": lambda h, i: torch.zeros_like(h).put(torch.arange(h.numel()).view_as(h), h, accumulate=True),
    "mask": lambda h, i: torch.zeros_like(h).index_put((i >= 0,), h, accumulate=True),
}


@pytest.mark.parametrize("put", PUT.values(), ids=PUT)
@pytest.mark.parametrize("weights", [[1.0, 1, 1, 1, 1], [0.0, 1, 2, 1, 0]])
def test_adding_into_rows_of_their_own(put, weights):
    net = Calls(lambda m, x, w: m.last(put(m.first(x), torch.arange(len(x)))) * w[:, None])
    net.first, net.last = nn.Linear(6, 4), nn.Linear(4, 2)
    exact(net, square, rand(5, 6), torch.tensor(weights, **DOUBLE))


@pytest.mark.parametrize("rest", [slice(None), slice(1, None)])
def test_adding_two_examples_into_one_row_is_refused(rest):
    net = Calls(lambda m, x: m.last(torch.zeros_like(x).index_put((torch.ones(len(x)).long(),), x, accumulate=True)))
    net.last = nn.Linear(6, 2)
    model = extend(net.double())
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match="index_put"):
        model(rand(4, 6))[rest].square().sum().div(4).backward()


NAMED = {
    "flatten": lambda x: torch.flatten(input=x, start_dim=1),
    "reshape": lambda x: torch.reshape(input=x, shape=(-1, 24)),
    "transpose": lambda x: torch.transpose(input=x, dim0=1, dim1=2),
    "permute": lambda x: torch.permute(input=x, dims=(0, 2, 1)),
    "unsqueeze": lambda x: torch.unsqueeze(input=x, dim=1),
    "squeeze": lambda x: torch.squeeze(input=x),
    "clone": lambda x: torch.clone(input=x),
    "nan_to_num": lambda x: torch.nan_to_num(input=x),
    "broadcast_to": lambda x: torch.broadcast_to(input=x, size=(2, *x.shape)).movedim(0, 1),
    "index_add": lambda x: torch.index_add(
        input=torch.zeros_like(x), dim=1, index=torch.tensor([0, 1, 1, 2]), source=x
    ),
    "scatter": lambda x: torch.scatter(
        input=torch.zeros_like(x), dim=1, index=torch.arange(4).view(1, 4, 1).expand(len(x), 4, 6), src=x
    ),
    "gather": lambda x: torch.gather(input=x, dim=1, index=torch.zeros(len(x), 1, 6, dtype=torch.long)),
}


@pytest.mark.parametrize("function", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("before", [False, True])
def test_the_first_argument_by_its_name(function, before):
    net = Calls(lambda m, x: (function(x * m.v if before else x) * m.w).sin(), w=rand(1), v=rand(6))
    net.v.requires_grad_(before)
    model = extend(net.double())
    x = rand(5, 4, 6)
    with perex(BatchGrad()):
        square(model, x).backward()
    for i in range(5):
        torch.testing.assert_close(model.w.grad_batch[i], torch.autograd.grad(square(model, x[i : i + 1]), model.w)[0])


def test_a_mean_over_the_batch_of_what_was_given_by_name_is_refused():
    def centred(m, x):
        h = torch.flatten(input=x, start_dim=1)
        return F.linear(h - h.mean(0), m.w)

    model = extend(Calls(centred, w=rand(2, 24)))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mean"):
        square(model, rand(5, 4, 6)).backward()


SHARED_FIRST = {
    "prototypes": (lambda m, p, x: m.layer(x) @ p.t(), (3, 6)),
    "temperature": (lambda m, t, x: m.layer(x) / t, (1,)),
}


@pytest.mark.parametrize(("function", "shape"), SHARED_FIRST.values(), ids=SHARED_FIRST)
def test_a_first_input_that_all_examples_share_leaves_a_doubt(function, shape):
    net = Calls(function)
    net.layer = nn.Linear(6, 6)
    model = extend(net.double())
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match="the data first"):
        square(model, rand(*shape), rand(5, 6)).backward()


def test_hooks_that_change_the_input_and_were_registered_after_ours():
    def net(hook):
        model = extend(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).double())
        model[1].register_forward_pre_hook(hook)
        return model

    for calls in range(2):  # the order is mended for the second call
        centred = net(lambda module, args: (args[0] - args[0].mean(0),))
        for _ in range(calls):
            centred(rand(5, 6))
        with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mean"):
            square(centred, rand(5, 6)).backward()
    scaled = net(lambda module, args: (args[0] * 3,))
    moved = net(lambda module, args: (args[0].transpose(0, 1),))
    moved[1].register_forward_hook(lambda module, args, out: out.transpose(0, 1))
    for _ in range(2):
        exact(scaled, square, rand(5, 6))
        exact(moved, square, rand(5, 5, 6))
        scaled.zero_grad()
        moved.zero_grad()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.InstanceNorm1d, (4, 6)),
        (nn.InstanceNorm1d, (4, 4)),
        (nn.InstanceNorm2d, (4, 4, 5)),
        (nn.InstanceNorm2d, (4, 6, 5)),
        (nn.InstanceNorm3d, (4, 4, 3, 2)),
    ],
)
def test_instance_norms_of_one_image_at_a_time(norm, shape):
    net = Calls(lambda m, x: torch.stack([m.norm(one).sin() for one in x]))
    net.norm = norm(4, affine=True)
    nn.init.normal_(net.norm.weight)
    exact(net, square, rand(3, *shape))


class Packs(nn.Module):
    """The usual classifier of sequences of different lengths."""

    def __init__(self, learned):
        super().__init__()
        self.layer, self.head = nn.GRU(6, 3, batch_first=True), nn.Linear(3, 2)
        self.start = nn.Parameter(torch.randn(1, 1, 3)) if learned else None

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        start = None if self.start is None else self.start.expand(-1, len(x), -1).contiguous()
        return self.head(self.layer(packed, start)[1][-1])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("lengths", [[3, 7, 2, 5, 1], [7, 5, 4, 2, 1], [4, 4, 4, 4, 4]])
def test_lengths_may_be_an_input_of_the_model(learned, lengths):
    exact(Packs(learned), square, rand(5, 7, 6), torch.tensor(lengths))


def test_a_lookup_of_ranks_among_the_examples_is_refused():
    """An order may come from all examples, but what is computed with it may not."""
    net = Calls(lambda m, x: m.table(x[:, 0].argsort()) + m.layer(x))
    net.table, net.layer = nn.Embedding(5, 2), nn.Linear(6, 2)
    model = extend(net.double())
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="argsort"):
        square(model, rand(5, 6)).backward()


def test_gradients_of_different_parameters_can_be_written_to():
    net = Calls(lambda m, x: (m.a(x) + m.skip(x)).sin())
    net.a, net.skip = nn.Linear(6, 3), nn.Linear(6, 3)
    model = extend(net.double())
    with perex(BatchGrad(), grad=False):
        square(model, rand(5, 6)).backward()
    before = model.skip.bias.grad_batch.clone()
    model.a.bias.grad_batch.mul_(2)
    torch.testing.assert_close(model.skip.bias.grad_batch, before)
    with perex(BatchGrad(), loss_reduction="sum"):
        model.a(rand(5, 6)).sum().backward()
    model.a.bias.grad_batch.mul_(2)
    torch.testing.assert_close(model.a.bias.grad_batch, torch.full((5, 3), 2.0, **DOUBLE))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


@dataclasses.dataclass
class Two:
    a: torch.Tensor
    b: torch.Tensor | None = dataclasses.field(init=False, default=None)


def test_containers_that_cannot_be_made_from_their_parts():
    def from_default(m, x):
        given = collections.defaultdict(list)
        given["x"] = x
        return m.leaf(given)

    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(rand(6))

        def forward(self, given):
            if isinstance(given, dict):
                return Product.apply(given["x"], self.w)
            out = Two(Product.apply(given, self.w))
            out.b = Product.apply(given.sin(), self.w)
            return out

    for function in (from_default, lambda m, x: m.leaf(x).a + m.leaf(x).b):
        net = Calls(function)
        net.leaf = Leaf()
        exact(net, square, rand(5, 6))


MADE = {
    "zeros_like": lambda h: torch.zeros_like(h).requires_grad_(),
    "by keyword": lambda h: torch.zeros_like(h, requires_grad=True),
    "zeros": lambda h: torch.zeros(4, **DOUBLE, requires_grad=True),
    "tensor": lambda h: torch.tensor([0.0] * 4, **DOUBLE, requires_grad=True),
    "computed": lambda h: torch.zeros(4, **DOUBLE, requires_grad=True) * 2,
    "set": lambda h: switched_on(torch.zeros(4, **DOUBLE)),
}


def switched_on(t):
    t.requires_grad = True
    return t


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("grad", [False, True])
def test_leaves_that_a_forward_makes_have_no_part_in_the_norm(make, grad):
    net = Calls(lambda m, x: m.last((m.first(x) + make(x[:, :1].expand(-1, 4))).tanh()))
    net.first, net.last = nn.Linear(3, 4), nn.Linear(4, 2)
    model, clipping = extend(net.double()), ClippedGrad(0.5)
    with perex(BatchGrad(), clipping, grad=grad):
        square(model, rand(5, 3)).backward()
    rows = torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1)
    torch.testing.assert_close(clipping.norms, rows.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("used", [False, True])
def test_a_loss_that_depends_on_such_a_leaf_only(used):
    net = Calls(lambda m, x: m.layer(x).detach() + torch.zeros(2, **DOUBLE, requires_grad=True), unused=rand(2))
    net.layer = nn.Linear(3, 2)
    net.layer.requires_grad_(used)
    model = extend(net.double())
    with perex(BatchGrad()), pytest.raises(LossError, match="does not depend on the batch through any extended"):
        square(model, rand(5, 3)).backward()


@pytest.mark.filterwarnings("ignore:The reduce argument")
def test_scatter_with_a_reduction_of_data():
    """Two examples that meet in a row are refused, each into its own row is exact."""
    index = torch.zeros(5, 6, dtype=torch.long)
    for rows in (torch.arange(5)[:, None] + index, index):
        net = Calls(lambda m, x, rows=rows: m.layer(torch.zeros_like(x).scatter(0, rows[: len(x)], x, reduce="add")))
        net.layer = nn.Linear(6, 2)
        if rows.any():
            exact(net, square, rand(5, 6))
            continue
        model = extend(net.double())
        with perex(BatchGrad()), pytest.raises((BatchAxisError, CrossExampleError), match="scatter"):
            square(model, rand(5, 6)).backward()


def test_a_distribution_with_a_learned_scale():
    """Mean and scale are broadcast together."""
    net = Calls(
        lambda m, x: -torch.distributions.Normal(m.mean(x), m.scale.exp()).log_prob(x[:, :2]).sum(1), scale=rand(2)
    )
    net.mean = nn.Linear(4, 2)
    exact(net, square, rand(5, 4))
    net = Calls(lambda m, x: torch.mul(*torch.broadcast_tensors(x, m.p)), p=rand(4))
    exact(net, square, rand(5, 4))


WRITES = {
    "add": lambda z, h: z.add_(h),
    "multiply": lambda z, h: z.mul_(h),
    "part": lambda z, h: written(z, (slice(None), 0), h[:, 0]),
    "rows": lambda z, h: written(z, (torch.arange(len(h)),), h),
    "index_add": lambda z, h: z.index_add_(0, torch.arange(len(h)), h),
}


def written(z, index, values):
    z[index] = values
    return z


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("made", ["sum", "copy"])
def test_data_is_written_into_what_parameters_gave(write, made):
    def forward(m, x):
        z = torch.zeros(len(x), 4, **DOUBLE) + m.p if made == "sum" else m.p.expand(len(x), 4).clone()
        return write(z, m.layer(x)).sin()

    net = Calls(forward, p=rand(4))
    net.layer = nn.Linear(4, 4)
    exact(net, square, rand(5, 4))


def added(part, values):
    part += values


def scaled(part, values):
    part *= values


def added_twice(part, values):
    part += values
    part.mul_(values)


MADE = {
    "repeated": lambda p, n: p.repeat(n, 3, 1),
    "expanded": lambda p, n: p.expand(n, 3, 4).clone(),
    "turned": lambda p, n: p.expand(3, n, 4).clone().transpose(0, 1),
    "computed": lambda p, n: torch.zeros(n, 3, 4, **DOUBLE) + p.exp(),
}


@pytest.mark.parametrize("write", [added, scaled, added_twice, lambda part, values: part.copy_(values)])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
@pytest.mark.parametrize("n", [1, 3, 4, 5])
def test_data_is_written_into_a_part_of_what_parameters_gave(write, made, n):
    def forward(m, x):
        z = made(m.p, len(x))
        write(z[:, 1], m.layer(x))
        return (z * (1 + torch.arange(12, **DOUBLE).view(3, 4))).sin().flatten(1)

    net = Calls(forward, p=rand(1, 1, 4))
    net.layer = nn.Linear(4, 4)
    exact(net, square, rand(n, 4))


def test_a_learned_kernel_for_the_channels_of_all_examples():
    """A grouped convolution of one image that holds all examples as channels."""

    def blur(m, x):
        n, c, *size = x.shape
        kernel = m.kernel.expand(n * c, 1, 3, 3)
        return F.conv2d(x.reshape(1, n * c, *size), kernel, padding=1, groups=n * c).view(n, c, *size).sin()

    exact(Calls(blur, kernel=rand(1, 1, 3, 3)), square, rand(4, 2, 5, 5))


def test_data_that_is_taken_to_be_shared_and_is_not_finite():
    """An input whose rows are not told apart: finite ones are exact, others would spoil all, so they are an error."""
    net = Calls(lambda m, a, b: (m.first(a) + m.second(b)).sin())
    net.first, net.second = nn.Linear(4, 3), nn.Linear(4, 3)
    exact(net, square, rand(4, 4), rand(4, 4))
    b = rand(4, 4)
    b[1] = torch.nan
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match=r"`second\.\w+` meets a tensor that all.*not finite"):
        square(net, rand(4, 4), b).backward()


def test_outputs_that_need_no_gradient_are_left_out():
    p, rows = rand(3).requires_grad_(), rand(2, 3)
    outputs, cotangents = [rand(3), p * 2], [rand(2, 3), rows]
    torch.testing.assert_close(pulled_back(outputs, [p], cotangents), [2 * rows])
    torch.testing.assert_close(pulled_back(outputs[:1], [p], cotangents[:1]), [torch.zeros(2, 3, **DOUBLE)])


SQUEEZED = {
    "squeeze_": lambda m, x: (x * 1.0)[None].clone().squeeze_(0) * m.w,
    "unsqueeze_": lambda m, x: (x.transpose(0, 1).clone().unsqueeze_(0)[0] * m.w).transpose(0, 1),
    "squeeze_ at the end": lambda m, x: (x * m.w).unsqueeze(-1).squeeze_(-1).sin(),
}


@pytest.mark.parametrize("function", SQUEEZED.values(), ids=SQUEEZED)
@pytest.mark.parametrize("length", [3, 5, 10])
def test_axes_that_come_and_go_in_place(function, length):
    exact(Calls(function, w=rand(6)), square, rand(5, length, 6))


def test_the_last_state_squeezed_in_place():
    net = Calls(lambda m, x: m.head(m.layer(x)[1].squeeze_(0)))
    net.layer, net.head = nn.GRU(6, 10, batch_first=True), nn.Linear(10, 2)
    exact(net, square, rand(5, 4, 6))


@pytest.mark.parametrize("name", ["x", "a", "x1"])
def test_numpy_names_of_the_first_argument(name):
    def centred(m, x):
        h = torch.flatten(**{name: x}, start_dim=1)
        return F.linear(torch.cat([h - h.mean(0), x[:, 0]], 1), m.w)

    model = extend(Calls(centred, w=rand(2, 30)))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mean"):
        square(model, rand(5, 4, 6)).backward()
    exact(Calls(lambda m, x: torch.flatten(**{name: x}, start_dim=1) * m.w, w=rand(24)), square, rand(5, 4, 6))


def test_an_axis_may_be_named_as_numpy_does():
    index = torch.tensor([0, 1, 1, 0])
    exact(Calls(lambda m, x: torch.index_add(x * m.w, index=index, source=x, axis=1), w=rand(6)), square, rand(5, 4, 6))
    exact(Calls(lambda m, x: torch.cat([x * m.w, x], axis=1), w=rand(6)), square, rand(5, 4, 6))


@torch.library.custom_op("perexample_tests::new_gelu", mutates_args=())
def new_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x)


def test_an_operator_of_a_library_by_whatever_name():
    def centred(m, x):
        h = new_gelu(x)
        return F.linear(torch.cat([h - h.mean(0), x], 1), m.w)

    model = extend(Calls(centred, w=rand(2, 12)))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mean"):
        square(model, rand(5, 6)).backward()


@torch.library.custom_op("perexample_tests::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    with torch.device("meta"):  # a function mode
        return x * (0.5 if torch.empty(1).is_meta else 1.0)


halved.register_autograd(lambda ctx, g: halved(g))


def test_an_operator_of_a_library_may_use_function_modes():
    x = rand(5, 6)
    assert extend(Calls(lambda m, x: halved(x * m.w), w=torch.ones(6).double()))(x).equal(0.5 * x)
    exact(Calls(lambda m, x: halved(x * m.w), w=rand(6)), square, x)


SECOND = {
    "an axis as a tensor": (lambda x: x.transpose(0, 1).cumsum(torch.tensor(0)).transpose(0, 1),
                            lambda x: x.transpose(0, 1).cumsum(torch.tensor(1)).transpose(0, 1)),
    "a function that changes": (lambda x: distances(x, False), lambda x: distances(x, True)),
}  # fmt: skip


class Distance:
    mixes = False

    def __call__(self, a, b):
        d = (a - b).square().sum(-1)
        return d + d.mean() if self.mixes else d


DISTANCE = Distance()


def distances(x, mixes):
    DISTANCE.mixes = mixes
    return F.triplet_margin_with_distance_loss(x, x * 2, x * 3, distance_function=DISTANCE, reduction="none")[:, None]


@pytest.mark.parametrize(("first", "second"), SECOND.values(), ids=SECOND)
def test_what_one_call_has_shown_is_not_taken_for_another(first, second):
    def net(function):
        model = Calls(lambda m, x: function(m.layer(x)))
        model.layer = nn.Linear(6, 5)
        return extend(model.double())

    one, other = net(first), net(second)
    with perex(BatchGrad()):
        square(one, rand(5, 6)).backward()
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mixes examples"):
        square(other, rand(5, 6)).backward()


def test_true_is_not_the_number_one():
    exact(Calls(lambda m, x: (x * m.w)[:, 1], w=rand(5)), square, rand(5, 3, 5))
    exact(Calls(lambda m, x: (x * m.w)[True][0], w=rand(5)), square, rand(5, 3, 5))


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_many_rows_of_one_entry_are_added_exactly(layer):
    """In float32 one after another they would come out too small."""
    length, torch_layer = 4096, layer(4, 1) if layer is nn.Embedding else layer(4, 1, mode="sum")
    model, clipping = extend(torch_layer), ClippedGrad(1e9)
    ids, scale = torch.ones(3, length, dtype=torch.long), torch.tensor([0.7, 0.1, 0.3])
    with perex(clipping, grad=False):
        out = model(ids)
        out = out.sum((1, 2)) if layer is nn.Embedding else out[:, 0]
        (out * scale).mean().backward()
    true = scale.double() * length
    assert ((true - clipping.norms) / true).max() < 1e-6
    torch.testing.assert_close(model.weight.clipped_sum[1, 0].double(), true.sum(), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:The reduce argument")
def test_data_is_added_up_in_place_by_scatter():
    index = torch.arange(5)[:, None].expand(5, 6)
    net = Calls(lambda m, x: m.layer(torch.zeros_like(x).scatter_(0, index[: len(x)], x, reduce="add")))
    net.layer = nn.Linear(6, 2)
    exact(net, square, rand(5, 6))


@pytest.mark.parametrize("length", [4096, 30_000])
@pytest.mark.parametrize("kind", ["weight", "ragged rows"])
def test_many_like_positions_are_added_exactly(length, kind):
    def forward(m, x):
        if kind == "ragged rows":  # of each example another number
            chosen = torch.arange(length) < length - torch.arange(3)[:, None] * 7
            return torch.zeros(3, length, 1).index_put((chosen,), m.layer(x[chosen]))
        return m.layer(x)

    net = Calls(forward)
    net.layer = nn.Linear(1, 1)
    model, clipping = extend(net), ClippedGrad(1e9)
    scale = torch.tensor([0.7, 0.1, 0.3])
    with perex(clipping, grad=False, strategy="model"):
        out = model(torch.ones(3, length, 1))[..., 0]
        (out.sum(1) * scale).mean().backward()
    counted = length - 7 * torch.arange(3).double() * (kind == "ragged rows")
    true = scale.double() * counted * 2**0.5  # of weight and bias
    assert ((true - clipping.norms) / true).max() < 1e-6


# ------------------------------------------------------------------------ what a third reader found, and stays whole


class Users(nn.Module):
    """The mean of what a user has, and zeros where there is nothing."""

    def __init__(self, by_mask=False):
        super().__init__()
        self.by_mask = by_mask
        self.item, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, history, counts):
        rows = [
            self.item(h[:k]).mean(0) if k else self.nothing(history)
            for h, k in zip(history, counts.tolist(), strict=True)
        ]
        out = self.head(torch.stack(rows))
        return (out, 2 * out) if self.by_mask else out

    def nothing(self, history):
        if self.by_mask:  # which shows nothing
            return torch.zeros(*history.shape, 4).double()[history > 99].sum(0)
        return torch.zeros(4).double()


@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize("counts", [[3, 0], [0, 2, 0], [0, 0, 0, 1], [1, 2, 0], [2, 2]])
def test_one_example_beside_constants(counts, by_mask):
    """Whose the constants are cannot be told where one example alone has data; it must not be that one's."""
    torch.manual_seed(0)
    model, n = extend(Users(by_mask).double()), len(counts)
    history, counts = torch.randint(9, (n, 5)), torch.tensor(counts)
    y = torch.arange(n) % 3

    def loss_of(*inputs, y=y):
        out = model(*inputs)
        return F.cross_entropy(out[0] if by_mask else out, y)

    if int((counts > 0).sum()) == 1:
        with (
            perex(BatchGrad()),
            pytest.raises(CrossExampleError, match=r"rows for \d examples that were computed from"),
        ):
            loss_of(history, counts).backward()
        return
    with perex(BatchGrad()):
        loss_of(history, counts).backward()
    for i in range(n):
        own = loss_of(history[i : i + 1], counts[i : i + 1], y=y[i : i + 1])
        wanted = torch.autograd.grad(own, model.head.weight)[0]
        torch.testing.assert_close(model.head.weight.grad_batch[i], wanted)


LOSSES_INSIDE = {
    "in another order": lambda h, y: F.cross_entropy(h.flip(0), y),
    "neighbours": lambda h, y: F.l1_loss(h[1:], h[:-1]),
    "halves": lambda h, y: F.margin_ranking_loss(h[:3, 0], h[3:, 0], torch.ones(3)),
    "shuffled": lambda h, y: F.mse_loss(h[torch.tensor([3, 1, 0, 5, 4, 2])], h),
    "weights of the batch": lambda h, y: F.binary_cross_entropy_with_logits(
        h[:, :2], h.detach()[:, 2:].sigmoid(), pos_weight=y.bincount(minlength=2)[:2].float()
    ),
}
SCALED_INSIDE = {
    "by their accuracy": lambda h, y: (1.5 - (h.argmax(1) == y).float().mean()) * F.cross_entropy(h, y),
    "by its own size": lambda h, y: F.cross_entropy(h, y) * F.cross_entropy(h, y).detach().reciprocal(),
    "of each, by that of all": lambda h, y: sum(F.cross_entropy(h[i], y[i]) * h.detach().std() for i in range(6)) / 6,
}
OWN_INSIDE = {
    "times one over their number": lambda h, y: F.cross_entropy(h, y, reduction="sum") * (y > -1).float().sum() ** -1,
    "added up one by one": lambda h, y: sum(F.cross_entropy(a, b) for a, b in zip(h, y, strict=True)) / len(h),
    "added up in place": lambda h, y: added_up(h, y),
    "cross-entropy": lambda h, y: F.cross_entropy(h, y),
    "both in another order": lambda h, y: F.cross_entropy(h.flip(0), y.flip(0)),
    "parts of each": lambda h, y: F.l1_loss(h[:, 1:], h[:, :-1]),
    "weights": lambda h, y: F.cross_entropy(h, y, weight=torch.ones(4)),
    "beside zeros": lambda h, y: F.mse_loss(h, torch.zeros_like(h)),
    "a mask of a selection": lambda h, y: F.mse_loss(h.unflatten(1, (2, 2)), h.detach().unflatten(1, (2, 2)).exp()),
}


def added_up(h, y):
    total = h.new_zeros(())
    for a, b in zip(h, y, strict=True):
        total += F.cross_entropy(a, b)
    return total / len(h)


class WithLoss(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.layer, self.loss = nn.Linear(3, 4), loss

    def forward(self, x, y):
        return self.loss(self.layer(x), y)


@pytest.mark.parametrize("name", SCALED_INSIDE)
def test_losses_inside_of_a_model_that_are_scaled_by_what_all_change(name):
    model = extend(WithLoss(SCALED_INSIDE[name]))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match=r"`mul` in .* another that all change"):
        model(torch.randn(6, 3), torch.arange(6) % 4).backward()


@pytest.mark.parametrize("name", LOSSES_INSIDE)
def test_losses_inside_of_a_model_in_which_examples_meet(name):
    model = extend(WithLoss(LOSSES_INSIDE[name]))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mixes examples"):
        model(torch.randn(6, 3), torch.arange(6) % 4).backward()


def test_nobody_is_warned_of_what_is_tried(recwarn):
    """Three rows of it beside seven of a constant, of which torch says that they may be meant to be as many."""
    model = extend(WithLoss(lambda h, y: F.mse_loss(h[:, :3], torch.zeros_like(h[:, :3]))))
    with perex(BatchGrad()):
        model(torch.randn(7, 3), torch.arange(7) % 4).backward()
    assert not recwarn.list


@pytest.mark.parametrize("name", OWN_INSIDE)
def test_losses_inside_of_a_model_of_each_example(name):
    torch.manual_seed(0)
    model, x, y = extend(WithLoss(OWN_INSIDE[name]).double()), torch.randn(6, 3).double(), torch.arange(6) % 4
    if name == "weights":
        model.loss = lambda h, y: F.cross_entropy(h, y, weight=torch.ones(4, dtype=h.dtype))
    with perex(BatchGrad()):
        model(x, y).backward()
    for i in range(6):
        wanted = torch.autograd.grad(model(x[i : i + 1], y[i : i + 1]), model.layer.weight)[0]
        torch.testing.assert_close(model.layer.weight.grad_batch[i], wanted)


@pytest.mark.parametrize(
    "centres", [lambda x: torch.linspace(x.min(), x.max(), 4), lambda x: torch.arange(x.min(), x.min() + 3.5)]
)
def test_ranges_between_values_of_the_batch(centres):
    model = extend(naive.Lambda(lambda self, x: (self.a(x) - centres(x)).square(), a=nn.Linear(3, 4)))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mixes examples"):
        model(torch.randn(5, 3)).mean().backward()


def test_ranges_of_sizes():
    """A mask of lengths: how long it is depends on the batch, what it holds does not."""

    def masked(self, x, lengths):
        mask = torch.arange(lengths.max())[None] < lengths[:, None]
        return self.a(x[:, : mask.shape[1]] * mask[..., None]).sum(1)

    torch.manual_seed(0)
    model = extend(naive.Lambda(masked, a=nn.Linear(3, 4)).double())
    x, lengths = torch.randn(4, 5, 3).double(), torch.tensor([2, 4, 1, 3])
    with perex(BatchGrad()):
        model(x, lengths).square().sum(1).mean().backward()
    for i in range(4):
        mask = torch.zeros(4).double()
        mask[: lengths[i]] = 1
        own = model.a(x[i, :4] * mask[:, None]).sum(0).square().sum()
        torch.testing.assert_close(model.a.weight.grad_batch[i], torch.autograd.grad(own, model.a.weight)[0])


def positive(h):
    return h.unflatten(1, (2, 2)) @ h.unflatten(1, (2, 2)).mT + torch.eye(2, dtype=h.dtype)


DOMAINS = {
    "cholesky": lambda h: torch.linalg.cholesky(positive(h)).flatten(1),
    "normal": lambda h: torch.distributions.MultivariateNormal(h[:, :2], positive(h)).log_prob(
        h[:, 2:].detach()
    )[:, None],
    "cross-entropy": lambda h: F.binary_cross_entropy(h.sigmoid(), h.detach().tanh().abs(), reduction="none"),
    "logarithm of the determinant": lambda h: torch.logdet(positive(h))[:, None],
}  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("name", DOMAINS)
def test_functions_that_are_not_defined_everywhere(name, n):
    """They are tried on rows of the batch itself."""
    torch.manual_seed(0)
    model, x = (
        extend(naive.Lambda(lambda self, x: DOMAINS[name](self.a(x)), a=nn.Linear(3, 4)).double()),
        torch.randn(n, 3),
    )
    x = x.double()
    with perex(BatchGrad()):
        model(x).sum(1).mean().backward()
    for i in range(n):
        wanted = torch.autograd.grad(model(x[i : i + 1]).sum(), model.a.weight)[0]
        torch.testing.assert_close(model.a.weight.grad_batch[i], wanted)


def test_functions_with_a_domain_that_mix():
    """The batch's own rows show it too."""

    def mixed(self, x):
        return F.binary_cross_entropy(self.a(x).sigmoid(), (x @ x.T).sigmoid()[:, :4], reduction="none").cumsum(0)

    model = extend(naive.Lambda(mixed, a=nn.Linear(3, 4)))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mixes examples"):
        model(torch.randn(5, 3)).mean().backward()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_added_in_place_for_any_number_of_examples(n):
    """Poisson batches may have one, which then owns all entries."""

    def spread(self, x):
        h = self.a(x)
        out = h.new_zeros(len(x) * 3, 4)
        out.index_add_(0, torch.arange(len(x)) * 3 + 1, h)
        return out.unflatten(0, (-1, 3)).square().sum(1)

    torch.manual_seed(0)
    model, x = extend(naive.Lambda(spread, a=nn.Linear(3, 4)).double()), torch.randn(n, 3).double()
    with perex(BatchGrad()):
        model(x).sum(1).mean().backward()
    for i in range(n):
        wanted = torch.autograd.grad(model(x[i : i + 1]).sum(), model.a.weight)[0]
        torch.testing.assert_close(model.a.weight.grad_batch[i], wanted)


HINTS = {
    "tolist": lambda self, x: self.b(torch.tensor(self.a(x).tolist())),
    "numpy": lambda self, x: self.b(torch.from_numpy(self.a(x).detach().numpy())),
    "torch.func": lambda self, x: self.b(torch.func.vmap(torch.tanh)(self.a(x))),
}


@pytest.mark.parametrize("name", HINTS)
def test_errors_name_what_cannot_be_followed(name):
    """Rather than the layer after it alone."""
    net = naive.Lambda(HINTS[name], a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    model = extend(net)
    with (
        perex(BatchGrad()),
        pytest.raises(UncoveredParameterError, match=rf"last forward there was: `?{name}.*`Lambda`"),
    ):
        model(torch.randn(5, 3)).sum(1).mean().backward()
    model.forward = lambda x: net.b(net.a(x))
    with perex(BatchGrad()):
        model(torch.randn(5, 3)).sum(1).mean().backward()


def test_an_input_that_all_shared_in_batches_of_other_sizes_is_named():
    """Prompts of classes, of which there are as many as examples in a batch now and then."""
    model = extend(naive.Lambda(lambda self, x, i: x @ self.e(i).mean(1).T, e=nn.Embedding(9, 3)))
    prompts = torch.randint(0, 9, (4, 7))
    with perex(BatchGrad()):
        model(torch.randn(5, 3), prompts).square().sum(1).mean().backward()
        with pytest.raises(CrossExampleError, match=r"matmul.*input 2 of `Lambda`, \[4, 7\].*buffer"):
            model(torch.randn(4, 3), prompts).square().sum(1).mean().backward()


def test_a_transform_around_the_model_is_named():
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
    with perex(BatchGrad()), pytest.raises(UncoveredParameterError, match=r"torch\.func \(.*around `Sequential`"):
        torch.vmap(model)(torch.randn(5, 3)).sum(1).mean().backward()


def test_an_input_that_may_be_a_mask_is_named():
    towers = extend(naive.Lambda(lambda self, x, y: (self.a(x), self.b(y)), a=nn.Linear(4, 3), b=nn.Linear(4, 3)))
    for n in (5, 4):
        x, y = torch.randn(2, n, 4)
        if n == 5:
            with perex(BatchGrad()):
                (torch.mul(*towers(x, y)).sum(1)).mean().backward()
        else:
            with (
                perex(BatchGrad()),
                pytest.raises(
                    UncoveredParameterError, match=r"input 2 of `Lambda`.*\(4\), was taken for a mask.*pass it first"
                ),
            ):
                (torch.mul(*towers(x, y)).sum(1)).mean().backward()


def test_an_input_that_all_may_share_is_named():
    """Positions [T] look like one entry for each example where there are as many of these."""
    net = naive.Lambda(lambda self, i, p: self.e(i) + self.p(p), e=nn.Embedding(9, 4), p=nn.Embedding(9, 4))
    model = extend(net)
    for n in (4, 5):
        ids = torch.randint(0, 9, (n, 5))
        if n == 5:
            with (
                perex(BatchGrad()),
                pytest.raises(CrossExampleError, match=r"input 2 of `Lambda`, \[5\], was taken .* buffer"),
            ):
                model(ids, torch.arange(5)).square().sum((1, 2)).mean().backward()
        else:
            with perex(BatchGrad()):
                model(ids, torch.arange(5)).square().sum((1, 2)).mean().backward()
    with perex(BatchGrad()):
        model(ids, torch.arange(5).repeat(5, 1)).square().sum((1, 2)).mean().backward()
    model.forward = lambda ids: net.e(ids) + net.e(ids).mean(0)
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match=r"loss of each example\.$"):
        model(ids).square().sum((1, 2)).mean().backward()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_time_in_front_of_the_data(n):
    """As solvers of differential equations pass it; data of as many features as examples is no mask then."""
    net = naive.Lambda(lambda self, t, y: torch.tanh(self.a(y)) * (-t).exp(), a=nn.Linear(3, 3))
    model, y = extend(net.double()), rand(n, 3)

    def steps(y):
        for k in range(3):
            y = y + 0.3 * model(torch.tensor(0.3 * k, **DOUBLE), y)
        return y.square().sum(1).mean()

    with perex(BatchGrad()):
        steps(y).backward()
    for i in range(n):
        wanted = torch.autograd.grad(steps(y[i : i + 1]), model.a.weight)[0]
        torch.testing.assert_close(model.a.weight.grad_batch[i], wanted)


PADDED = {
    "batch first": lambda parts: nn.utils.rnn.pad_sequence(parts, batch_first=True),
    "time first": lambda parts: nn.utils.rnn.pad_sequence(parts).transpose(0, 1),
    "with numbers": lambda parts: nn.utils.rnn.pad_sequence(parts, True, 2.0),
    "packed": lambda parts: nn.utils.rnn.pad_packed_sequence(
        nn.utils.rnn.pack_sequence(parts, enforce_sorted=False), batch_first=True
    )[0],
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("lengths", [[2, 5, 3, 4], [5, 5, 5, 5], [1, 1, 4, 1], [1, 2, 2, 1]])
def test_sequences_of_each_example_are_filled_up(name, lengths):
    def steps(m, x, lengths):
        h = m.layer(x)
        parts = [one[:count] for one, count in zip(h, lengths.tolist(), strict=True)]
        return (
            m.last(PADDED[name](parts).square()).sin()
            * (torch.arange(int(lengths.max())) < lengths[:, None])[..., None]
        )

    net = Calls(steps)
    net.layer, net.last = nn.Linear(6, 6), nn.Linear(6, 3)
    exact(net, lambda m, *d: m(*d).square().sum((1, 2)).mean(), rand(4, 5, 6), torch.tensor(lengths))


def test_sequences_that_change_places_are_refused():
    net = Calls(lambda m, x: nn.utils.rnn.pad_sequence([m.layer(x)[i] for i in (1, 0, 2)], batch_first=True))
    net.layer = nn.Linear(6, 2)
    model = extend(net)
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match=r"another order .*`pad_sequence`"):
        model(torch.randn(3, 4, 6)).square().sum((1, 2)).mean().backward()


class Forces(nn.Module):
    """A derivative by the data, of a sum over the examples or of each of them."""

    def __init__(self, of_sum):
        super().__init__()
        self.net, self.of_sum = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)), of_sum

    def forward(self, x):
        x = x.clone().requires_grad_()
        energy = self.net(x).squeeze(1)
        if self.of_sum:
            return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
        return torch.autograd.grad(energy, [x], grad_outputs=torch.ones_like(energy), create_graph=True)[0]


class Adapted(nn.Module):
    """One step of descent of what is each example's own."""

    def __init__(self):
        super().__init__()
        self.w, self.rate = nn.Parameter(torch.randn(6)), nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        w = self.w.expand(len(x), 6).clone()
        g = torch.autograd.grad((x * w).sum(1).square().sum(), w, create_graph=True)[0]
        return (w - self.rate * g) * x


@pytest.mark.parametrize("make", [lambda: Forces(True), lambda: Forces(False), Adapted])
@pytest.mark.parametrize("n", [1, 4])
def test_derivatives_inside_of_a_forward_are_refused(make, n):
    inner = make()
    model = extend(nn.Sequential(nn.Linear(6, 6), inner))
    with (
        perex(BatchGrad()),
        pytest.raises(UnsupportedModuleError, match=rf"autograd.grad in `1` \({type(inner).__name__}\).*GenericRule"),
    ):
        model(torch.randn(n, 6)).square().sum(1).mean().backward()


def test_derivatives_inside_of_a_module_that_the_generic_rule_takes_as_a_whole():
    class Whole(Forces):
        pass

    register_rule(Whole)(GenericRule)
    exact(nn.Sequential(nn.Linear(6, 6), Whole(True)), square, rand(4, 6))


class Ensemble(nn.Module):
    """Several networks at once, by ``vmap`` over their stacked parameters; perhaps with the mean over a batch."""

    def __init__(self, *, centred, beside):
        super().__init__()
        self.base = [nn.Linear(6, 3).double()]  # not a part: it gives its form alone
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 6)), nn.Parameter(torch.randn(4, 3))
        self.centred, self.beside = centred, nn.Linear(6, 3) if beside else None

    def forward(self, x):
        def one(weight, bias):
            out = torch.func.functional_call(self.base[0], {"weight": weight, "bias": bias}, (x,))
            return out - out.mean(0) if self.centred else out

        out = torch.func.vmap(one)(self.weight, self.bias).tanh().mean(0)
        return out if self.beside is None else out + self.beside(x)


def test_an_ensemble_by_vmap_is_taken_by_the_generic_rule():
    class Whole(Ensemble):
        pass

    register_rule(Whole)(GenericRule)
    for beside in (True, False):
        exact(nn.Sequential(nn.Linear(6, 6), Whole(centred=False, beside=beside)), square, rand(4, 6))


@pytest.mark.parametrize("centred", [False, True])
def test_parameters_that_meet_data_in_a_transform_are_refused(centred):
    """What comes out would be taken for what was computed from parameters alone, row by row, whatever was mixed."""
    model = extend(Ensemble(centred=centred, beside=True).double())
    wanted = r"`linear` in `Ensemble` \(Ensemble\) is given data and what needs .* of torch.func .*GenericRule"
    with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=wanted):
        square(model, rand(4, 6)).backward()
    model = extend(Ensemble(centred=centred, beside=False).double())
    with (
        perex(BatchGrad()),
        pytest.raises(UncoveredParameterError, match=r"GenericRule.*torch\.func \(vmap, .* in `Ensemble`"),
    ):
        square(model, rand(4, 6)).backward()


def test_a_gradient_that_a_transform_takes_over_the_batch_is_refused():
    def forward(self, x):
        return self.layer(x + torch.func.grad(lambda w: (x * w).square().mean())(self.w))

    model = extend(naive.Lambda(forward, layer=nn.Linear(6, 3), w=nn.Parameter(torch.randn(6))).double())
    with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=r"`mul` in `Lambda` .* inside of torch\.func"):
        square(model, rand(4, 6)).backward()


def test_the_generic_rule_where_a_forward_lets_its_input_need_a_gradient():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))

        def forward(self, x):
            if not x.requires_grad:
                x.requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    register_rule(Slope)(GenericRule)
    exact(Slope(), square, rand(4, 6))


def as_list(x):
    at = x.nonzero().t()
    return torch.sparse_coo_tensor(at, x[at[0], at[1]], x.shape)


SPARSE = {
    "to_sparse": lambda m, x: torch.sparse.mm(x.to_sparse(), m.w),
    "to_sparse of each": lambda m, x: torch.stack([(row * m.w[:, 0]).to_sparse() for row in x]).to_dense(),
    "to_sparse_csr": lambda m, x: torch.sparse.mm(x.to_sparse_csr(), m.w),
    "sparse_coo_tensor": lambda m, x: as_list(x) @ m.w,
    "layer": lambda m, x: m.layer(x.to_sparse() if x.layout is torch.strided else x),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_tensors_are_refused_by_name(name):
    net = Calls(SPARSE[name], w=rand(6, 3))
    net.layer = nn.Linear(6, 3)
    model, x = extend(net.double()), rand(4, 6).relu()
    where = "to_sparse" if name == "layer" else name.split()[0]
    with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=rf"`{where}`.* sparse tensor .*make it dense"):
        model(x).square().sum(1).mean().backward()
    if name == "layer":
        with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=r"`layer` \(Linear\) .*make it dense"):
            model(x.to_sparse()).square().sum(1).mean().backward()


def test_sparse_inputs_of_a_product():
    def product(m, x):
        return torch.sparse.mm(x, m.w) if m.sparse else torch.mm(x.to_dense(), m.w)

    for sparse in (True, False):
        net = Calls(product, w=rand(6, 3))
        net.sparse = sparse
        model, x = extend(net.double()), rand(4, 6).relu()
        with perex(BatchGrad()):
            model(x.to_sparse()).square().sum(1).mean().backward()
        for i in range(4):
            wanted = torch.autograd.grad((x[i] @ net.w).square().sum(), net.w)[0]
            torch.testing.assert_close(net.w.grad_batch[i], wanted)


class Sorted(nn.Module):
    """A mixture of experts whose tokens are brought into the order of their experts, and back."""

    def __init__(self, k, experts=3):
        super().__init__()
        self.gate, self.k, self.out = nn.Linear(6, experts), k, nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(self.k, -1)
        order = chosen.flatten().argsort()
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = tokens[order // self.k].split(counts)
        found = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        found = found * weights.flatten()[order].unsqueeze(1)
        together = torch.zeros_like(tokens).index_add(0, order // self.k, found)
        return self.out(together.view_as(x).mean(1))


def as_each_alone(model, x):
    """Rows are the gradients of each example by itself."""
    for i in range(len(x)):
        for name, p in model.named_parameters():
            own = torch.autograd.grad(square(model, x[i : i + 1]), p, allow_unused=True)[0]
            wanted = torch.zeros_like(p) if own is None else own
            torch.testing.assert_close(p.grad_batch[i], wanted, msg=name)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("k", [1, 2])
def test_experts_by_sorting(n, k):
    torch.manual_seed(0)
    model, x = extend(Sorted(k).double()), torch.randn(n, 7, 6).double()
    with perex(BatchGrad()):
        square(model, x).backward()
    as_each_alone(model, x)


def by_where(out, x, chosen, expert):
    rows, nth = torch.where(chosen)
    out[rows] += expert(x[rows]) * (1 + nth[:, None])


def by_counts(out, x, chosen, expert):
    if chosen.any():
        rows, _ = torch.where(chosen)
        out[rows] = out[rows] + expert(x[rows])


def by_mask(out, x, chosen, expert):
    mask = chosen.any(1)
    out[mask] += expert(x[mask])


def by_nonzero(out, x, chosen, expert):
    rows = chosen.any(1).nonzero().squeeze(1)
    out[rows] += expert(x[rows])


def by_tuples(out, x, chosen, expert):
    rows = chosen.any(1).nonzero(as_tuple=True)
    out[rows] += expert(x[rows])


def by_argwhere(out, x, chosen, expert):
    rows = torch.argwhere(chosen)[:, 0]
    out.index_add_(0, rows, expert(x[rows]))


def by_part_of_a_mask(out, x, chosen, expert):
    mask = chosen.any(1)
    out[mask, :3] += expert(x[mask])[:, :3]


ROUTES = [by_where, by_counts, by_mask, by_nonzero, by_tuples, by_argwhere, by_part_of_a_mask]


class Routed(nn.Module):
    """Experts that add to what is there, as those of Mistral and DeepSeek do."""

    def __init__(self, route, experts):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, experts), nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))
        self.route, self.out = route, nn.Linear(6, 2)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen, together = self.gate(tokens).topk(2).indices, torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            self.route(together, tokens, chosen == number, expert)
        return self.out(together.view_as(x).mean(1))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("n", "length", "experts"), [(1, 4, 3), (2, 1, 7), (3, 3, 3), (5, 3, 20), (6, 6, 2)])
def test_experts_that_add_in_place(route, n, length, experts):
    torch.manual_seed(1)
    model, x = extend(Routed(route, experts).double()), torch.randn(n, length, 6).double()
    with perex(BatchGrad()):
        square(model, x).backward()
    as_each_alone(model, x)


@pytest.mark.parametrize(
    "route",
    [
        lambda out, x, chosen, expert: by_where(out, x.flip(0), chosen, expert),
        lambda out, x, chosen, expert: by_mask(out, x.roll(1, 0), chosen, expert),
        lambda out, x, chosen, expert: by_where(out, x, chosen, lambda h: expert(h).cumsum(0)),
    ],
    ids=["turned", "of neighbours", "added up"],
)
def test_experts_that_add_to_the_tokens_of_others_are_refused(route):
    torch.manual_seed(1)
    model = extend(Routed(route, 2))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mixes examples"):
        square(model, torch.randn(3, 3, 6)).backward()


def test_a_mask_of_the_data_shows_what_all_share():
    """Rows of a parameter that are chosen as those of the data are belong to the examples then."""

    def shown(m, x):
        mask = x[:, :, 0] > 0
        chosen = m.layer(x)[mask] * m.w.expand_as(x)[mask]
        return torch.zeros_like(x).masked_scatter(mask.unsqueeze(2), chosen)

    net = Calls(shown, w=rand(6))
    net.layer = nn.Linear(6, 6)
    exact(net, square, rand(4, 5, 6))


def test_a_choice_of_some_tokens_by_all_is_refused():
    """How often an entry is taken depends on the others."""

    def first(self, x):
        order = self.a(x).flatten().argsort()
        return self.b(x).index_add(0, order // 2 * 2 % len(x), torch.ones(len(x), 4))

    model = extend(naive.Lambda(first, a=nn.Linear(3, 1), b=nn.Linear(3, 4)))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mixes examples"):
        model(torch.randn(5, 3)).sum(1).mean().backward()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_outputs_of_each_example_may_be_as_long_as_the_batch(n):
    """A list of them, or of those of a loop."""
    model = extend(naive.Lambda(lambda self, x: [self.a(row) for row in x], a=nn.Linear(3, 2)).double())
    x = rand(n, n, 3)
    with perex(BatchGrad()):
        (torch.stack([row.square().sum() for row in model(x)]).mean()).backward()
    for i in range(n):
        wanted = torch.autograd.grad(model(x[i : i + 1])[0].square().sum(), model.a.weight)[0]
        torch.testing.assert_close(model.a.weight.grad_batch[i], wanted)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ctc_with_flat_targets(reduction):
    """As models of speech have it inside: the targets of each example, one behind the other."""

    def loss(self, x, targets, lengths):
        steps = self.a(x).log_softmax(-1).transpose(0, 1)
        flat = targets.masked_select(torch.arange(targets.shape[1]) < lengths[:, None])
        return F.ctc_loss(steps, flat, (x.shape[1],) * len(x), tuple(lengths.tolist()), reduction=reduction)

    model = extend(naive.Lambda(loss, a=nn.Linear(3, 5)).double())
    x, targets, lengths = rand(4, 6, 3), torch.randint(1, 5, (4, 3)), torch.tensor([2, 3, 1, 2])
    joined = {"none": lambda t: t.mean(), "mean": lambda t: t, "sum": lambda t: t}[reduction]
    with perex(BatchGrad(), loss_reduction="sum" if reduction == "sum" else "mean"):
        joined(model(x, targets, lengths)).backward()
    for i in range(4):
        own = joined(model(x[i : i + 1], targets[i : i + 1], lengths[i : i + 1]))
        wanted = torch.autograd.grad(own, model.a.weight)[0]
        torch.testing.assert_close(model.a.weight.grad_batch[i], wanted)


def test_a_frozen_table_may_be_given_to_the_model():
    net = naive.Lambda(lambda self, x: self.a(x), a=nn.Linear(3, 2))
    net.z = nn.Parameter(torch.randn(4, 3), requires_grad=False)
    model = extend(net)
    with perex(BatchGrad()):
        model(model.z).sum(1).mean().backward()
    assert model.a.weight.grad_batch.shape == (4, 2, 3)


def test_mixing_that_a_later_trial_shows_is_not_forgotten():
    """Of two outputs one is clear only when the other one's trial has gone by."""

    @torch.library.custom_op("perexample_tests::two", mutates_args=())
    def two(x: torch.Tensor) -> list[torch.Tensor]:
        return [2 * x + torch.where(x > 3.2, x, 0.0).mean(0, keepdim=True), torch.zeros_like(x)]

    two.register_autograd(lambda ctx, g: (2 * g[0],))
    model = extend(naive.Lambda(lambda self, x: self.b(two(self.a(x))[0]), a=nn.Linear(3, 4), b=nn.Linear(4, 2)))
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match="mixes examples"):
        model(0.1 * torch.randn(5, 3)).sum(1).mean().backward()


def test_padding_of_one_example_is_not_that_of_the_next_one():
    """Whose rows would fit behind it."""

    def padded(self, x, lengths):
        rows = []
        for row, k in zip(x, lengths, strict=True):
            buffer = row.new_zeros(4, 4)
            buffer[:k] = row[:k]
            rows.append(self.a(buffer))
        return rows

    torch.manual_seed(0)
    model = extend(naive.Lambda(padded, a=nn.Linear(4, 3)).double())
    x, y = rand(2, 4, 4), torch.randint(3, (2, 4))
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match="rows that belong to no example"):
        sum(F.cross_entropy(o, t) for o, t in zip(model(x, [2, 4]), y, strict=True)).div(2).backward()
