"""What a tape has recorded it does again: views, writes in place, random numbers, each operation as often as needed."""

from __future__ import annotations

import dis

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from perexample import ConfigurationError
from perexample._looks import looking
from perexample._tape import Tape


def recorded(function, *inputs):
    tape = Tape()
    found = tape.record(lambda: function(*inputs), inputs)
    return tape.program, found


def calls(program):
    """How many operations a replay does."""
    return sum(name.startswith("f") for name in program._code.__globals__)


def both(function, *shapes):
    """The function of new inputs, by itself and replayed."""
    torch.manual_seed(0)
    program, _ = recorded(function, *(torch.randn(shape) for shape in shapes))
    for seed in (1, 2):
        torch.manual_seed(seed)
        inputs = [torch.randn(shape) for shape in shapes]
        wanted = function(*(t.clone() for t in inputs))
        found = program.replay([t.clone() for t in inputs])
        yield found, wanted


def in_place(x):
    y = x * 2
    view = y.view(-1)[::2]
    before = y.sum()
    view.add_(1)
    return {"y": y, "sums": (before, y.sum()), "again": y.view(-1)[::2] * 3}


def written_between(x):
    y = x.clone()
    a = y + 1
    y.mul_(3)
    return a, y + 1


def read_again(x):
    y = x.clone()
    first = (y + 1).sum()
    y.mul_(3)
    return first, (y + 1).sum()


def turned(x):
    y, z = x.clone(), x.exp()
    first = y.view(-1)
    y.t_().add_(1)
    z.unsqueeze_(1).squeeze_().transpose_(0, 1)
    return first.sum(), y @ x, y.t() * x, y.t_() + x, z.sum(0), z.t() * x


def made_again(x):
    a = x * 2
    a.add_(1)
    return a.sum(), (x * 2).sum()


def into(x):
    out = torch.empty(3, 3)
    torch.mm(x, x.T, out=out)
    first = out.clone()
    torch.mm(x * 2, x.T, out=out)
    return first, out


def lists(x):
    a, b = x.split(2)[:2]
    parts = torch.stack([a.sum(), b.sum(), *x.unbind(1)[0]])
    return [parts, torch.cat([a, b, a]), x.max(1)]


def constant(x):
    c = torch.tensor([1.0, 2.0])
    c += x.sum()
    return c


def left_out(x):
    y = x.sin()
    y.exp()
    return (y**2).sum()


FUNCTIONS = [in_place, written_between, read_again, made_again, turned, into, lists, constant, left_out]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_does_the_same_to_other_inputs(function):
    for found, wanted in both(function, (3, 4)):
        torch.testing.assert_close(found, wanted)


def test_what_nobody_uses_is_left_out():
    program, _ = recorded(left_out, torch.randn(3, 4))
    assert calls(program) == 3


def test_what_is_made_of_numbers_alone_is_made_once():
    def function(x):
        return x * torch.arange(4).view(1, 4).float() + torch.ones(3, 4).cumsum(1)

    program, _ = recorded(function, torch.randn(3, 4))
    assert calls(program) == 2
    for found, wanted in both(function, (3, 4)):
        torch.testing.assert_close(found, wanted)


def test_what_is_given_away_or_written_to_is_made_each_time():
    def function(x):
        steps, total = torch.arange(4.0), torch.zeros(4)
        total[1:] += x[0, 1:]
        return x + 1, steps, steps.view(2, 2).T, total.sum() + x

    program, _ = recorded(function, torch.randn(3, 4))
    x = torch.randn(3, 4)
    for _ in range(2):
        found = program.replay([x])
        torch.testing.assert_close(found, function(x))
        for t in found:
            t.fill_(7)


COUNT = iter(range(100))


@torch.library.custom_op("perexample_tests::counted", mutates_args=())
def counted() -> torch.Tensor:
    """An operation of somebody else that gives something else each time."""
    return torch.tensor(float(next(COUNT)))


def test_operations_of_others_are_done_as_often_as_they_were():
    program, first = recorded(lambda x: counted() + x - counted(), torch.zeros(1))
    assert first.item() == -1
    assert program.replay([torch.zeros(1)]).item() == -1
    assert next(COUNT) == 4


def test_what_is_large_is_made_each_time():
    program, _ = recorded(lambda x: torch.arange(2**18 + 1.0).sum() + x, torch.randn(3))
    assert calls(program) == 3
    program, _ = recorded(lambda x: torch.arange(2**18 + 0.0).sum() + x, torch.randn(3))
    assert calls(program) == 1


def test_views_that_show_the_same_are_one_and_so_are_operations_on_them():
    def function(x):
        y = x * 2
        return y.view(-1).exp().sum() + y.unsqueeze(0).view(12).exp().sum() + y.flatten().exp().sum()

    program, _ = recorded(function, torch.randn(3, 4))
    assert calls(program) == 6  # times two, a view, its exponential, a sum, and two additions
    for found, wanted in both(function, (3, 4)):
        torch.testing.assert_close(found, wanted)


def test_views_of_another_layout_are_not():
    def function(x):
        y = x * 2
        return y.T.contiguous(), y.view(4, 3) * 1, y[1:] + 0, y[:2] + 0

    for found, wanted in both(function, (3, 4)):
        torch.testing.assert_close(found, wanted)


def test_equal_results_are_tensors_of_their_own():
    program, _ = recorded(lambda x: (x + 1, x + 1), torch.randn(3))
    a, b = program.replay([torch.zeros(3)])
    a += 1
    assert b.tolist() == [1, 1, 1]


def test_random_numbers_are_drawn_anew_each_time():
    program, _ = recorded(lambda x: (F.dropout(x, 0.5), F.dropout(x, 0.5), torch.rand(4)), torch.ones(100))
    assert program.random
    torch.manual_seed(3)
    first = program.replay([torch.ones(100)])
    assert not torch.equal(first[0], first[1])
    again = program.replay([torch.ones(100)])
    assert not torch.equal(first[0], again[0])
    torch.manual_seed(3)
    torch.testing.assert_close(program.replay([torch.ones(100)]), first)
    assert not recorded(torch.sin, torch.ones(3))[0].random
    program, _ = recorded(lambda x: (torch.rand(9) - torch.rand(9)).abs().sum(), torch.ones(3))
    assert program.replay([torch.ones(3)]) > 0


def test_tensors_that_were_there_are_read_and_written_where_they_lie():
    weight, count = torch.ones(3), torch.zeros(())

    def function(x):
        count.add_(1)
        return x @ weight.view(3), weight.sum()

    program, _ = recorded(function, torch.ones(2, 3))
    assert calls(program) == 3  # the view of the weight is part of none
    assert count == 1
    weight.fill_(2.0)
    product, total = program.replay([torch.ones(2, 3)])
    assert (product.tolist(), total.item(), count.item()) == ([6.0, 6.0], 6.0, 2.0)


def test_parts_of_a_tensor_that_was_there_beside_the_whole():
    weight = torch.ones(4, 3, requires_grad=True)

    def function(x):
        a, b = weight.split(2)
        return torch.autograd.grad((x @ a.T).sum() + (x @ weight.T).exp().sum() + (x @ b.T).sin().sum(), weight)

    for found, wanted in both(function, (2, 3)):
        torch.testing.assert_close(found, wanted)


def test_forward_and_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.GELU(), nn.Flatten(), nn.Linear(75, 4))
    parameters = list(model.parameters())

    def function(x):
        return torch.autograd.grad(model(x).logsumexp(1).sum(), parameters)

    for found, wanted in both(function, (2, 2, 5, 5)):
        torch.testing.assert_close(found, wanted)
    program, _ = recorded(function, torch.randn(2, 2, 5, 5))
    with torch.no_grad():
        for p in parameters:
            p.mul_(1.5)
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(program.replay([x]), function(x))
    assert not any(t.requires_grad for t in program.replay([x]))


def test_tensors_are_let_go_when_nothing_needs_them():
    program, _ = recorded(lambda x: x.sin().cos().exp().sum(), torch.randn(3))
    let_go = [i.argval for i in dis.get_instructions(program._code) if i.opname == "DELETE_FAST"]
    assert let_go == ["t0", "t1", "t2", "t3"]


def test_nothing_of_the_recording_is_kept():
    found = []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.exp:
                found.append(result.untyped_storage()._weak_ref())
            return result

    with Seen():
        program, result = recorded(lambda x: torch.exp(x).sum(), torch.randn(1000))
    assert result is not None
    assert torch.UntypedStorage._expired(found[0])
    assert program.replay([torch.zeros(1000)]).item() == 1000


def test_what_is_tried_may_lie_where_something_that_was_let_go_lay():
    tape, x = Tape(), torch.ones(5, 3)

    def function():
        with looking():
            tried = torch.ones(3, 5).t()
        tape._memories.add(tried.data_ptr())  # as if an operation had been given that memory before
        return x * tried

    torch.testing.assert_close(tape.record(function, [x]), x)
    torch.testing.assert_close(tape.program.replay([x + 1]), x + 1)


LOOKS = {
    "item": lambda x: x * x.sum().item(),
    "if": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "unique": lambda x: x.unique(),
    "equal": lambda x: x * torch.equal(x, x),
    "resize": lambda x: x.clone().resize_(2),
    "transposed in place": lambda x: BEFORE.view(1, 3).t_() * x.sum(),
}


def test_what_is_made_of_numbers_alone_may_be_looked_at():
    def function(x):
        positions = torch.arange(x.shape[1]).add(1)
        if (positions.diff() != 1).any() or torch.zeros(3)[1].item():
            return x
        chosen = positions[positions > 2]
        return x[:, : len(chosen)] * chosen

    for found, wanted in both(function, (3, 4)):
        torch.testing.assert_close(found, wanted)


NUMBERS = {
    "written to": lambda x: x if torch.zeros(3).copy_(x[0, :3]).sum() > 0 else -x,
    "a view that was written to": lambda x: x if _with_a_row(x).sum() > 0 else -x,
    "drawn": lambda x: x if torch.rand(()) > 0.5 else -x,
    "there before": lambda x: x if BEFORE.sum() > 0 else -x,
}
BEFORE = torch.ones(3)


def _with_a_row(x):
    made = torch.zeros(2, 4)
    made[0].add_(x[0])
    return made


@pytest.mark.parametrize("name", NUMBERS)
def test_what_may_change_may_not(name):
    with pytest.raises(ConfigurationError, match="looks at values"):
        recorded(NUMBERS[name], torch.randn(3, 4))


@pytest.mark.parametrize("name", LOOKS)
def test_what_cannot_be_recorded(name):
    with pytest.raises(ConfigurationError, match="cannot be recorded"):
        recorded(LOOKS[name], torch.randn(3, 4))
    x = torch.randn(3)
    assert not vars(x)
    torch.testing.assert_close(recorded(torch.sin, x)[1], x.sin())
    assert not vars(x)


# Raise for a negative number, and do nothing else.
RAISING = {
    "_assert_async": lambda x: torch._assert_async(x.min() >= 0),
    "cholesky": lambda x: torch.linalg.cholesky(x * torch.eye(4)),
    "inv_ex": lambda x: torch.linalg.inv_ex((x + 1) * torch.eye(4), check_errors=True),
}


@pytest.mark.parametrize("name", RAISING)
def test_checks_are_made_again(name):
    def function(x):
        RAISING[name](x)
        return x + 1

    program, _ = recorded(function, torch.ones(4))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(program.replay([x]), x + 1)
    x[2] = -1
    for run in (function, lambda x: program.replay([x])):
        with pytest.raises(RuntimeError):
            run(x)


def test_what_finds_errors_without_raising_is_left_out_where_nobody_uses_it():
    program, _ = recorded(lambda x: (torch.linalg.inv_ex(x * torch.eye(4)), x + 1)[1], torch.ones(4))
    assert calls(program) == 1


def test_generators_that_are_not_the_default_one():
    own = torch.Generator()
    for draw in (
        lambda x: x + torch.rand(4, generator=own),
        lambda x: x + torch.empty(4).normal_(generator=own),
        lambda x: x * torch.bernoulli(x, generator=own),
    ):
        with pytest.raises(ConfigurationError, match="draws random numbers from a generator of its own"):
            recorded(draw, torch.ones(4))
    program, _ = recorded(lambda x: x + torch.rand(4, generator=torch.default_generator), torch.ones(4))
    torch.manual_seed(0)
    found = program.replay([torch.zeros(4)])
    torch.manual_seed(0)
    torch.testing.assert_close(found, torch.rand(4))
