"""Recorded operations are called by torch's own functions, where those are seen to do the same and nothing else."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from perexample._direct import direct
from perexample._tape import Tape

A = torch.ops.aten
X = torch.randn(3, 4)
SAME = {
    "add": (A.add.Tensor, (X, X), {"alpha": 2}, torch.add),
    "mul": (A.mul.Tensor, (X, X), {}, torch.mul),
    "in place": (A.mul_.Tensor, (X, X), {}, Tensor.mul_),
    "out": (A.mm.out, (X, X.T), {"out": torch.empty(3, 3)}, torch.mm),
    "method": (A.view.default, (X, [12]), {}, Tensor.view),
    "list": (A.sum.dim_IntList, (X, [0], True), {}, torch.sum),
    "type": (A._to_copy.default, (X,), {"dtype": torch.float64}, Tensor.to),
    "functional": (A.gelu.default, (X,), {"approximate": "tanh"}, F.gelu),
    "linalg": (A.linalg_vector_norm.default, (X, 2, [1]), {}, torch.linalg.vector_norm),
    "made": (A.full.default, ([2], 1.5), {"device": torch.device("cpu"), "pin_memory": False}, torch.full),
    "several": (A.unbind.int, (X, 1), {}, torch.unbind),
}
OTHER = {
    "another overload": (A.mul.Scalar, (X, 2.0), {}, torch.mul),
    "copied though of this type": (A._to_copy.default, (X,), {"dtype": torch.float32}, Tensor.to),
    "written in Python": (A.split.Tensor, (X, 2), {}, torch.split),
    "of no function": (A.threshold_backward.default, (X, X, 0), {}, None),
}


@pytest.mark.parametrize("name", SAME)
def test_torchs_own_function_is_found(name):
    operation, args, kwargs, function = SAME[name]
    assert direct(operation, args, kwargs) == function


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_the_same_is_not_taken(name):
    operation, args, kwargs, function = OTHER[name]
    found = direct(operation, args, kwargs)
    assert found != function
    assert found(*args, **kwargs)[0].equal(operation(*args, **kwargs)[0])


def test_nothing_is_done_to_find_out():
    x, state = torch.ones(3), torch.get_rng_state()
    assert direct(A.mul_.Tensor, (x, x + 1), {}) == Tensor.mul_
    assert direct(A.bernoulli_.float, (x, 0.25), {}) == Tensor.bernoulli_
    assert x.equal(torch.ones(3))
    assert torch.get_rng_state().equal(state)


def test_no_function_mode_sees_a_replay():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    tape, x = Tape(), torch.ones(2)
    tape.record(lambda: torch.full((2,), 2.0) + x.relu(), [x])
    with torch.device("meta"), Mode():
        found = tape.program.replay([x])
    assert found.tolist() == [3.0, 3.0]


@torch.library.custom_op("perexample_tests::set_num_threads", mutates_args=())
def named_alike(number: int) -> Tensor:
    """Of numbers alone, and of a name and with arguments that a function of torch has, which does something else."""
    return torch.full((2,), float(number))


def test_a_function_of_torch_named_like_an_operation_of_others_is_not_called():
    tape, x, before = Tape(), torch.ones(2), torch.get_num_threads()
    tape.record(lambda: x * named_alike(before + 1))
    assert torch.get_num_threads() == before
    assert tape.program.replay().tolist() == [before + 1.0] * 2


class Added(Tensor):
    """A subclass whose relu is another."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found + 1 if func is torch.relu else found


@torch.library.custom_op("perexample_tests::with_a_mode_inside", mutates_args=())
def with_a_mode_inside(x: Tensor) -> Tensor:
    """Written in Python with a device context, which is a function mode, and with a subclass."""
    with torch.device("meta"):
        factor = 2.0 if torch.empty(1).is_meta else 1.0
    return factor * torch.relu(x.as_subclass(Added)).as_subclass(Tensor)


def test_operations_of_others_may_use_function_modes_and_subclasses():
    tape, x = Tape(), torch.randn(5)
    first = tape.record(lambda: with_a_mode_inside(x) + 1, [x])
    assert tape.program.replay([x]).equal(first)


def test_no_operation_is_a_python_function_call():
    tape, x = Tape(), torch.randn(4, 4, requires_grad=True)

    def step():
        return torch.autograd.grad((F.threshold(x @ x, 0.1, 0.0).split(2)[0] * 2.0).logsumexp(1).sum(), x)

    tape.record(step)
    program, called = tape.program, []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        program._code()
    finally:
        sys.setprofile(None)
    assert called == ["replay"]
