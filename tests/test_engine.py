"""The engine around the numbers: what it leaves alone, what it leaves behind, and what it survives."""

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref

import naive
import pytest
import torch
from naive import Lambda, assert_bitwise, assert_same, fields, mse, randn, saved_whole, tensors_alive
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef

from perexample import (
    DP_SGD,
    Extension,
    Rule,
    RuleContractError,
    StaleGradientError,
    extend,
    perex,
    register_rule,
    unextend,
)
from perexample._engine.tap import Tap
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad, Variance


def backward(model, *extensions, batch=None, **settings):
    with perex(*extensions, **settings):
        mse(model, *(naive.batch() if batch is None else batch)).backward()


def grad_batch(model, batch=None, **settings):
    backward(model, BatchGrad(), batch=batch, **settings)
    return fields(model, "grad_batch")


def attributes(model):
    """Names of all attributes of the modules and parameters, and how many hooks there are."""
    objects = [*model.modules(), *model.parameters()]
    found = [sorted(vars(o)) for o in objects]
    hooks = [
        len(v) for o in model.modules() for k, v in sorted(vars(o).items()) if "hook" in k and hasattr(v, "__len__")
    ]
    return found, hooks, [p._backward_hooks for p in model.parameters()]


# ------------------------------------------------------------------------------------------------- extend, unextend


def test_extend_changes_neither_object_nor_class_nor_state():
    model = naive.mlp()
    state, classes, text = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()], repr(model)
    assert extend(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert repr(model) == text
    assert_bitwise(model.state_dict(), state)
    backward(model, BatchGrad(), ClippedGrad(1.0))
    assert_bitwise(model.state_dict(), state)
    assert naive.mlp(seed=1).load_state_dict(model.state_dict()).missing_keys == []


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_whole], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_copies_are_extended_and_independent(how, used):
    model = extend(naive.mlp())
    wanted = naive.rows(model, mse, *naive.batch())
    if used:
        backward(model, Variance(), ClippedGrad(1.0))
    twin = how(model)
    assert_same(grad_batch(twin), wanted)
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert_same(grad_batch(model), wanted)
    unextend(twin)
    assert_same(grad_batch(model), wanted)
    unextend(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


def test_copy_between_forward_and_backward():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        loss = mse(model, *naive.batch())
        twin = copy.deepcopy(model)
        loss.backward()
    assert_same(fields(model, "grad_batch"), naive.rows(model, mse, *naive.batch()))
    assert not any(hasattr(p, "grad_batch") for p in twin.parameters())


def test_unextend_restores_everything():
    model = naive.cnn()
    before = attributes(model)
    extend(model)
    batch = randn(3, 2, 6, 6), randn(3, 3)
    backward(model, BatchGrad(), BatchL2Grad(), ClippedGrad(1.0), batch=batch, grad=False)
    assert unextend(model) is model
    assert attributes(model) == before


def test_unextend_leaves_other_hooks_alone():
    model, calls = naive.mlp(), []
    model[0].register_forward_hook(lambda *args: calls.append("own"))
    unextend(extend(model))
    model(naive.batch()[0])
    assert calls == ["own"]
    unextend(nn.Linear(2, 2))  # never extended: nothing happens


def test_extend_twice_is_harmless():
    model = extend(naive.mlp())
    once = grad_batch(model)
    hooks = attributes(model)[1]
    extend(extend(model))
    assert attributes(model)[1] == hooks
    assert_bitwise(grad_batch(model), once)


def test_extend_a_part_and_the_whole():
    whole = nn.Sequential(naive.mlp(), nn.Linear(3, 2).double())
    extend(whole[0])
    extend(whole)
    batch = naive.batch()[0], randn(6, 2)
    assert_same(grad_batch(whole, batch), naive.rows(whole, mse, *batch))
    assert_same(grad_batch(whole[0]), naive.rows(whole[0], mse, *naive.batch()))


def test_a_plain_backward_of_an_extended_model_is_the_plain_backward():
    plain, extended = naive.cnn(), extend(naive.cnn())
    batch = randn(3, 2, 6, 6), randn(3, 3)
    for model in (plain, extended):
        mse(model, *batch).backward()
    assert_bitwise(fields(extended, "grad"), fields(plain, "grad"))
    assert all(list(vars(p)) == [] for p in extended.parameters())
    backward(extended, BatchGrad(), batch=batch)
    assert_bitwise(fields(extended, "grad"), {name: 2 * g for name, g in fields(plain, "grad").items()})


# ---------------------------------------------------------------------------------------------------------- contexts


def test_forward_inside_or_outside():
    model = extend(naive.mlp())
    inside = grad_batch(model)
    loss = mse(model, *naive.batch())
    with perex(BatchGrad()):
        loss.backward()
    assert_bitwise(fields(model, "grad_batch"), inside)


def test_a_context_open_over_many_backwards():
    model = extend(naive.mlp())
    with perex(BatchGrad(), BatchL2Grad()):
        for n in (6, 1, 3, 0, 5):
            model.zero_grad()
            mse(model, *naive.batch(n)).backward()
            assert_same(fields(model, "grad_batch"), naive.rows(model, mse, *naive.batch(n)))
            assert model[0].weight.batch_l2.shape == (n,)


def test_a_context_object_can_be_used_again():
    model, context = extend(naive.mlp()), perex(BatchGrad())
    for n in (3, 5):
        with context:
            mse(model, *naive.batch(n)).backward()
        assert model[0].weight.grad_batch.shape[0] == n


def test_outside_of_the_context_nothing_is_computed():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        pass
    mse(model, *naive.batch()).backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_batch_grad_is_overwritten_and_grad_accumulates():
    model = extend(naive.mlp())
    backward(model, BatchGrad(), BatchL2Grad())
    first = {name: g.clone() for name, g in fields(model, "grad").items()}
    backward(model, BatchGrad(), BatchL2Grad(), batch=naive.batch(4))
    wanted = naive.rows(model, mse, *naive.batch(4))
    assert_same(fields(model, "grad_batch"), wanted)
    assert_same(fields(model, "grad"), {name: first[name] + g.mean(0) for name, g in wanted.items()})


@pytest.mark.parametrize("reset", ["step", "zero_grad", "optimizer", "none"])
def test_clipped_sums_add_up_until_they_are_used(reset):
    model, clipping = extend(naive.mlp()), ClippedGrad(0.5)
    optimizer = DP_SGD(model.parameters(), lr=0.0, clipping=clipping, noise_multiplier=0.0, expected_batch_size=1)
    one = naive.clipped(naive.rows(model, mse, *naive.batch()), 0.5)
    two = naive.clipped(naive.rows(model, mse, *naive.batch(4, seed=2)), 0.5)
    backward(model, clipping, grad=False)
    backward(model, clipping, batch=naive.batch(4, seed=2), grad=False)
    both = {name: one[name] + two[name] for name in one}
    assert_same(fields(model, "clipped_sum"), both)
    if reset == "step":
        optimizer.step()
    elif reset == "zero_grad":
        clipping.zero_grad()
    elif reset == "optimizer":
        optimizer.zero_grad()
    backward(model, clipping, grad=False)
    assert_same(fields(model, "clipped_sum"), {n: both[n] + one[n] for n in one} if reset == "none" else one)


def test_zero_grad_removes_the_fields():
    model, clipping = extend(naive.mlp()), ClippedGrad(0.5)
    backward(model, clipping)
    clipping.zero_grad([model[0].weight])
    assert not hasattr(model[0].weight, "clipped_sum")
    assert hasattr(model[0].bias, "clipped_sum")
    clipping.zero_grad()
    assert not any(hasattr(p, "clipped_sum") for p in model.parameters())


def test_frozen_between_steps_loses_its_fields():
    model = extend(naive.mlp())
    grad_batch(model)
    model[0].weight.requires_grad_(False)
    wanted = naive.rows(model, mse, *naive.batch(4))
    assert_same(grad_batch(model, naive.batch(4)), wanted)
    assert not hasattr(model[0].weight, "grad_batch")
    model[0].weight.requires_grad_(True)
    assert_same(grad_batch(model), naive.rows(model, mse, *naive.batch()))


@pytest.mark.parametrize("grad", [True, False])
def test_unused_parameters_get_zeros(grad):
    layers = {"a": nn.Linear(5, 3), "b": nn.Linear(2, 2), "c": nn.Conv2d(1, 1, 1)}
    model = extend(Lambda(lambda self, x: self.a(x), **layers).double())
    backward(model, BatchGrad(), BatchL2Grad(), Variance(), ClippedGrad(1.0), grad=grad)
    for p in (*model.b.parameters(), *model.c.parameters()):
        assert torch.equal(p.grad_batch, torch.zeros(6, *p.shape).double())
        assert torch.equal(p.batch_l2, torch.zeros(6).double())
        assert torch.equal(p.variance, torch.zeros_like(p))
        assert torch.equal(p.clipped_sum, torch.zeros_like(p))


# -------------------------------------------------------------------------------------------------- forms of backward


@pytest.mark.parametrize("form", ["method", "function", "list", "tuple", "none", "keyword"])
def test_forms_of_backward(form):
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        loss = mse(model, *naive.batch())
        {
            "method": lambda: loss.backward(),
            "function": lambda: torch.autograd.backward(loss),
            "list": lambda: torch.autograd.backward([loss]),
            "tuple": lambda: torch.autograd.backward((loss,), (None,)),
            "none": lambda: loss.backward(None),
            "keyword": lambda: torch.autograd.backward(tensors=loss),
        }[form]()
    assert_same(fields(model, "grad_batch"), naive.rows(model, mse, *naive.batch()))


@pytest.mark.parametrize("grad", [True, False])
def test_an_input_that_requires_grad_gets_its_gradient(grad):
    model, (x, y) = extend(naive.mlp()), naive.batch()
    (wanted,) = torch.autograd.grad(mse(model, leaf := x.clone().requires_grad_(), y), leaf)
    x.requires_grad_()
    backward(model, BatchGrad(), batch=(x, y), grad=grad)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-12, atol=0)
    assert all((p.grad is not None) == grad for p in model.parameters())


def test_retained_gradients_of_intermediates():
    """``retain_grad`` on activations inside the graph."""
    model, (x, y) = extend(naive.mlp()), naive.batch()
    with perex(BatchGrad()):
        h = model[1](model[0](x))
        h.retain_grad()
        (model[2](h) - y).square().mean().backward()
    assert h.grad is not None


def test_two_forwards_and_only_one_in_the_loss():
    model, (x, y) = extend(naive.mlp()), naive.batch()
    with perex(BatchGrad()):
        model(randn(3, 5))
        loss = mse(model, x, y)
        model(randn(2, 5))
        loss.backward()
    assert_same(fields(model, "grad_batch"), naive.rows(model, mse, x, y))


@pytest.mark.parametrize("grad", [True, False])
def test_retain_graph(grad):
    model, clipping = extend(naive.mlp()), ClippedGrad(0.5)
    wanted = naive.rows(model, mse, *naive.batch())
    with perex(BatchGrad(), clipping, grad=grad):
        loss = mse(model, *naive.batch())
        for count in (1, 2, 3):
            loss.backward(retain_graph=count < 3)
            assert_same(fields(model, "grad_batch"), wanted)
            sums = naive.clipped(wanted, 0.5)
            assert_same(fields(model, "clipped_sum"), {name: count * s for name, s in sums.items()})
            assert clipping.sensitivity() == count * 0.5, "each example is in the sum several times"
    clipping.zero_grad()
    assert clipping.sensitivity() == 0.5


def test_plain_backward_first_and_perex_after():
    model = extend(naive.mlp())
    loss = mse(model, *naive.batch())
    loss.backward(retain_graph=True)
    with perex(BatchGrad()):
        loss.backward()
    assert_same(fields(model, "grad_batch"), naive.rows(model, mse, *naive.batch()))


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_create_graph():
    model, plain = extend(naive.mlp()), naive.mlp()
    with perex(BatchGrad()):
        mse(model, *naive.batch()).backward(create_graph=True)
    mse(plain, *naive.batch()).backward(create_graph=True)
    second = [
        torch.autograd.grad(sum(p.grad.square().sum() for p in m.parameters()), list(m.parameters()))
        for m in (model, plain)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*second, strict=True))
    assert_same(fields(model, "grad_batch"), naive.rows(plain, mse, *naive.batch()))
    assert not any(g.requires_grad for g in fields(model, "grad_batch").values())
    for m in (model, plain):
        m.zero_grad()


def test_autograd_grad_inside_the_context_is_left_alone():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        grads = torch.autograd.grad(mse(model, *naive.batch()), list(model.parameters()))
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    wanted = naive.rows(model, mse, *naive.batch())
    assert_same(dict(zip(wanted, grads, strict=True)), {name: g.mean(0) for name, g in wanted.items()})


def test_functional_transforms_of_an_extended_model():
    model, plain, (x, y) = extend(naive.mlp()), naive.mlp(), naive.batch()

    def gradients(m):
        params = {name: p.detach() for name, p in m.named_parameters()}

        def loss(params, x, y):
            return (torch.func.functional_call(m, params, (x.unsqueeze(0),)) - y).square().mean()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)

    assert_bitwise(gradients(model), gradients(plain))
    one = torch.func.grad(lambda v: model(v).sum())(x)
    assert torch.equal(one, torch.func.grad(lambda v: plain(v).sum())(x))
    jacobians = [torch.func.jacrev(m)(x[0]) for m in (model, plain)]
    assert torch.equal(*jacobians)
    with perex(BatchGrad()):
        assert_bitwise(gradients(model), gradients(plain))
        mse(model, x, y).backward()
    assert_same(fields(model, "grad_batch"), naive.rows(plain, mse, x, y))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_between(mode):
    model = extend(naive.mlp())
    wanted = grad_batch(model)
    with perex(BatchGrad()):
        loss = mse(model, *naive.batch())
        model.eval()
        with mode():
            model(randn(2, 5))
        model.train()
        loss.backward()
    assert_bitwise(fields(model, "grad_batch"), wanted)


# -------------------------------------------------------------------------------------------------------- exceptions


class Failing(Extension):
    """Raises where it is told to."""

    field = "failing"
    joint = True

    def __init__(self, where):
        self.where = where

    def _at(self, where):
        if self.where == where:
            raise KeyError(where)

    def start(self, views):
        self._at("start")

    def compute(self, view):
        self._at("compute")
        return view.batch_l2()

    def finish(self, views):
        self._at("finish")
        return {}


def fail_in_extension(where):
    def fail(model):
        with pytest.raises(KeyError, match=where):
            backward(model, BatchGrad(), Failing(where), Variance())

    return fail


def fail_in_rule(model):
    class Broken(Rule):
        def terms(self, call, g):
            raise KeyError("rule")

    from perexample.rule import registry

    kept = registry._REGISTRY[nn.Linear]
    register_rule(nn.Linear, overwrite=True)(Broken)
    try:
        with pytest.raises(RuleContractError, match=r"`2` .*failed, KeyError.*rule"):
            backward(model, BatchGrad(), Variance())
    finally:
        registry._REGISTRY[nn.Linear] = kept


def fail_in_capture(model):
    class Broken(Rule):
        def terms(self, call, g):
            return {}

        def capture(self, module, args, kwargs, output):
            raise KeyError("capture")

    from perexample.rule import registry

    kept = registry._REGISTRY[nn.Linear]
    register_rule(nn.Linear, overwrite=True)(Broken)
    try:
        with pytest.raises(RuleContractError, match=r"`0` .*failed, KeyError.*capture"):
            backward(model, BatchGrad())
    finally:
        registry._REGISTRY[nn.Linear] = kept


def fail_in_forward(model):
    def explode(module, args):
        raise KeyError("forward")

    handle = model[1].register_forward_pre_hook(explode)
    try:
        with pytest.raises(KeyError, match="forward"):
            backward(model, BatchGrad())
    finally:
        handle.remove()


def fail_by_interrupt(model):
    def explode(module, args):
        raise KeyboardInterrupt

    handle = model[2].register_forward_pre_hook(explode)
    try:
        with pytest.raises(KeyboardInterrupt):
            backward(model, BatchGrad())
    finally:
        handle.remove()


def fail_in_shape(model):
    with pytest.raises(RuntimeError, match="shape"):
        backward(model, BatchGrad(), batch=(randn(6, 4), randn(6, 3)))


def fail_in_backward(model):
    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyError("autograd")

    x, y = naive.batch()
    with pytest.raises(KeyError, match="autograd"), perex(BatchGrad()):
        (model[2](Bomb.apply(model[1](model[0](x)))) - y).square().mean().backward()


FAILURES = {
    "start": fail_in_extension("start"),
    "compute": fail_in_extension("compute"),
    "finish": fail_in_extension("finish"),
    "rule": fail_in_rule,
    "capture": fail_in_capture,
    "forward": fail_in_forward,
    "interrupt": fail_by_interrupt,
    "shape": fail_in_shape,
    "backward": fail_in_backward,
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
@pytest.mark.usefixtures("registry")
def test_nothing_is_left_after_an_exception(fail):
    wanted = grad_batch(extend(naive.mlp()))
    model = extend(naive.mlp())
    before = attributes(model)
    fail(model)
    model.zero_grad()
    assert attributes(model) == before
    assert_bitwise(grad_batch(model), wanted)


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
@pytest.mark.usefixtures("registry")
def test_fields_of_an_earlier_backward_are_not_changed_by_one_that_fails(fail):
    model = extend(naive.mlp())
    kept = {name: g.clone() for name, g in grad_batch(model, naive.batch(4)).items()}
    fail(model)
    assert_bitwise(fields(model, "grad_batch"), kept)


@pytest.mark.parametrize("where", ["start", "compute", "finish"])
@pytest.mark.parametrize("first", [True, False])
def test_a_failed_backward_adds_nothing_to_clipped_sums(where, first):
    """And what was there before is used by the next step as if nothing had happened."""
    model, clipping = extend(naive.mlp()), ClippedGrad(0.5)
    optimizer = DP_SGD(model.parameters(), lr=0.0, clipping=clipping, noise_multiplier=0.0, expected_batch_size=1)
    backward(model, clipping)
    kept = {name: s.clone() for name, s in fields(model, "clipped_sum").items()}
    extensions = (clipping, Failing(where)) if first else (Failing(where), clipping)
    with pytest.raises(KeyError):
        backward(model, *extensions, batch=naive.batch(4))
    assert_bitwise(fields(model, "clipped_sum"), kept)
    backward(model, clipping)
    assert_same(fields(model, "clipped_sum"), {name: 2 * s for name, s in kept.items()})
    optimizer.step()


def test_a_failed_backward_without_earlier_sums_leaves_no_step_behind():
    model, clipping = extend(naive.mlp()), ClippedGrad(0.5)
    optimizer = DP_SGD(model.parameters(), lr=0.0, clipping=clipping, noise_multiplier=0.0, expected_batch_size=1)
    with pytest.raises(KeyError):
        backward(model, clipping, Failing("finish"))
    with pytest.raises(StaleGradientError):
        optimizer.step()


# ------------------------------------------------------------------------------------------------- threads and memory


def test_threads_with_models_of_their_own():
    def train(seed, out):
        model, clipping = extend(naive.mlp(seed=seed)), ClippedGrad(0.5)
        generator = torch.Generator().manual_seed(seed)
        optimizer = DP_SGD(
            model.parameters(),
            lr=0.1,
            clipping=clipping,
            noise_multiplier=1.0,
            expected_batch_size=6,
            generator=generator,
        )
        for step in range(50):
            optimizer.zero_grad()
            with perex(clipping, BatchL2Grad(), grad=False):
                mse(model, *naive.batch(seed=step)).backward()
            optimizer.step()
        out[seed] = {name: p.detach() for name, p in model.named_parameters()}

    alone, together, failures = {}, {}, []

    def guarded(seed):
        try:
            train(seed, together)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    # models are built one after the other: torch.manual_seed is global
    lock = threading.Lock()
    plain = naive.mlp
    try:
        naive.mlp = lambda *args, **kwargs: _locked(lock, plain, *args, **kwargs)
        for seed in range(4):
            train(seed, alone)
        threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        naive.mlp = plain
    assert failures == []
    for seed in range(4):
        assert_bitwise(together[seed], alone[seed])


def _locked(lock, function, *args, **kwargs):
    with lock:
        return function(*args, **kwargs)


def test_the_context_holds_for_one_thread():
    model, seen = extend(naive.mlp()), []

    def other():
        mse(model, *naive.batch()).backward()
        seen.append(any(hasattr(p, "grad_batch") for p in model.parameters()))

    with perex(BatchGrad()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [False]


def training(model, fail=False):
    clipping = ClippedGrad(0.5)
    optimizer = DP_SGD(model.parameters(), lr=0.01, clipping=clipping, noise_multiplier=1.0, expected_batch_size=6)

    def step():
        optimizer.zero_grad()
        if fail:
            with pytest.raises(KeyError), perex(clipping, Failing("finish"), grad=False):
                mse(model, *naive.batch()).backward()
            with pytest.raises(RuntimeError), perex(clipping, grad=False):
                mse(model, randn(6, 4), randn(6, 3)).backward()
            return
        with perex(clipping, grad=False):
            mse(model, *naive.batch()).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("fail", [False, True], ids=["training", "exceptions"])
def test_memory_does_not_grow(fail):
    step = training(extend(naive.mlp()), fail)
    for _ in range(50):
        step()
    alive = tensors_alive()
    tracemalloc.start()
    try:
        for _ in range(50):
            step()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(300 if fail else 1000):
            step()
        gc.collect()
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert growth < 2**20
    assert tensors_alive() <= alive


def test_resident_memory_does_not_grow():
    resource = pytest.importorskip("resource")
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)))
    x = torch.randn(32, 256)

    def step():
        with perex(BatchL2Grad(), grad=False):
            model(x).square().mean().backward()

    for _ in range(30):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # activations of one step: 130 KiB


@pytest.mark.parametrize("grad", [True, False])
def test_only_the_documented_fields_outlive_the_context(grad):
    model, (x, y) = extend(naive.mlp()), naive.batch()
    for _ in range(3):  # what torch and the library keep once and for all, and what tests before have left
        backward(model, BatchGrad(), grad=grad)
        before = tensors_alive()
    with perex(BatchGrad(), BatchL2Grad(), grad=grad):
        loss = mse(model, x, y)
        loss.backward()
    del loss
    parameters = len(list(model.parameters()))
    assert tensors_alive() == before + parameters  # one new field for each: batch_l2
    assert {name for p in model.parameters() for name in vars(p)} == {"grad_batch", "batch_l2"}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("extension", "arguments"),
    [(BatchGrad, {}), (lambda: ClippedGrad(1.0), {}), (lambda: ClippedGrad(1.0), {"max_memory": 0})],
    ids=["each by itself", "joint", "second backward"],
)
@pytest.mark.parametrize("make", [naive.mlp, naive.cnn])
def test_saved_tensors_go_with_the_backward_though_the_loss_stays(make, extension, arguments, grad):
    """The memory itself: taps save detached tensors, so that a tensor may go and what it holds stay."""
    model, extension, memory = extend(make()), extension(), []
    for module in model:
        module.register_forward_pre_hook(lambda _, inputs: memory.append(StorageWeakRef(inputs[0].untyped_storage())))
    x = naive.batch()[0].clone() if make is naive.mlp else randn(4, 2, 6, 6)
    with perex(extension, grad=grad, **arguments):
        loss = model(x).square().mean()
        assert not any(kept.expired() for kept in (memory[0], memory[-1]))  # inputs of layers, which need them
        loss.backward()
    del x
    gc.collect()
    assert loss.requires_grad
    assert len(memory) == len(model)
    assert all(kept.expired() for kept in memory)


@pytest.mark.parametrize("used", [False, True])
def test_a_model_that_is_deleted_goes(used):
    model = extend(naive.mlp())
    clipping = ClippedGrad(1.0)
    if used:
        backward(model, BatchGrad(), clipping)
    parameter, module = weakref.ref(model[0].weight), weakref.ref(model)
    del model
    gc.collect()
    assert module() is None
    assert parameter() is None


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_edges_of_inputs_are_torchs_own():
    """A node of a Python function does not live by being looked at; torch keeps it with a token."""
    x = torch.ones(2, requires_grad=True)
    for t in (x, x * 2, (x * 2).unbind(0)[1], _Doubled.apply(x)):
        (edge,) = Tap.edges_of([t, torch.ones(2)])
        wanted = get_gradient_edge(t)
        assert edge[:2] == wanted[:2]
        assert (edge.ownership_token is None) == (wanted.ownership_token is None)
    assert edge.ownership_token is not None
