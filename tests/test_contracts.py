"""What rules and extensions of others are told when they are used in another way than they can be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from perexample import (
    BatchAxisError,
    Extension,
    ExtensionError,
    GenericRule,
    Rule,
    RuleContractError,
    StaleGradientError,
    UncoveredParameterError,
    check,
    extend,
    perex,
    register_rule,
    registered_rules,
)
from perexample.extension import Weights
from perexample.extensions import BatchGrad, ClippedGrad
from perexample.rule import Bound
from perexample.terms import Outer, Rows, positions

pytestmark = pytest.mark.usefixtures("registry")
N = 4


class LowRank(nn.Module):
    """``y = x u v``."""

    def __init__(self):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return x @ self.u @ self.v


def low_rank(positions=positions):
    @register_rule(LowRank, overwrite=True)
    class LowRankRule(Rule):
        def terms(self, call, g):
            u, v = call.module.u.to(g.dtype), call.module.v.to(g.dtype)
            factors = {"u": (call.x, g @ v.T), "v": (call.x @ u, g)}
            return {name: Outer(*map(positions, factors[name]), p.shape) for name, p in call.params.items()}


def backward(model, *extensions, x=None):
    with perex(*extensions):
        model(torch.randn(N, 3, 6) if x is None else x).square().mean().backward()


def squared(out, y):
    return (out - y).square().mean()


def test_a_rule_of_outer_products():
    low_rank()
    assert check(LowRank(), squared, torch.randn(N, 3, 6), torch.randn(N, 3, 6)).ok
    assert check(LowRank(), squared, torch.randn(N, 6), torch.randn(N, 6)).ok
    frozen = extend(LowRank())
    frozen.u.requires_grad_(False)
    backward(frozen, BatchGrad(), ClippedGrad(1.0))
    assert frozen.v.grad_batch.shape == (N, 2, 6)
    low = extend(LowRank().to(torch.bfloat16))
    backward(low, BatchGrad(), x=torch.randn(N, 3, 6, dtype=torch.bfloat16))


def test_factors_of_other_axes_are_told_so():
    low_rank(lambda t: t)
    model = extend(LowRank())
    with pytest.raises(RuleContractError, match=r"takes .*was given \[4, 3, 6\] and \[4, 3, 2\].*positions"):
        backward(model, ClippedGrad(1.0))
    with pytest.raises(RuleContractError, match="Outer takes factors"):
        Outer(torch.ones(4, 1, 3, 2), torch.ones(4, 1, 2, 2), torch.Size([2, 2]))


@pytest.mark.parametrize("shape", [(2, 6), (3, 4), (12,), (4, 3)], ids=str)
def test_factors_in_the_wrong_order_are_told_so(shape):
    """A gradient of as many entries would be in its place, transposed."""
    g, x = torch.randn(N, 1, 3, 6), torch.randn(N, 1, 3, 2)
    with pytest.raises(RuleContractError, match=r"given 6 left and 2 right factors for a parameter of shape \["):
        Outer(g, x, torch.Size(shape))
    assert Outer(g, x, torch.Size([2, 3, 2])).dense().shape == (N, 2, 3, 2)
    assert Outer(g, x[..., :1], torch.Size([6])).dense().shape == (N, 6)


def test_a_rule_that_forgets_the_dtype_is_told_it():
    @register_rule(LowRank, overwrite=True)
    class Forgets(Rule):
        def grad_batch(self, call, g):
            return {"u": call.x.mT @ (g @ call.module.v.T), "v": (call.x @ call.module.u).mT @ g}

    backward(extend(LowRank()), BatchGrad())
    with pytest.raises(RuleContractError, match=r"`u` is torch.bfloat16: use it as p.to\(g.dtype\)"):
        backward(extend(LowRank().to(torch.bfloat16)), BatchGrad(), x=torch.randn(N, 3, 6, dtype=torch.bfloat16))


@pytest.mark.parametrize(("of", "ids", "shape"), [([8], [4, 2], [6, 3]), ([7], [8], [6, 3]), ([8], [8], [6, 2])])
def test_rows_that_do_not_fit_the_table_are_told_so(of, ids, shape):
    example, ids = torch.zeros(of, dtype=torch.long), torch.zeros(ids, dtype=torch.long)
    with pytest.raises(RuleContractError, match=r"Rows takes example \[M\], ids \[M\] .* and was given \[.*flatten"):
        Rows(example, ids, torch.ones(8, 3), 4, torch.Size(shape))


def test_a_clipping_shows_its_settings_and_nothing_private():
    model, clipping = extend(nn.Linear(6, 2)), ClippedGrad(0.5, groups="per-module")
    backward(model, clipping)
    assert repr(clipping) == "ClippedGrad(max_norm=0.5, clip=Flat, groups='per-module')"
    assert repr(ClippedGrad({"a": 1.0}, clip=torch.sigmoid)) == (
        "ClippedGrad(max_norm={'a': 1.0}, clip=sigmoid, groups='all')"
    )


class Two(nn.Module):
    """Two inputs and two outputs, with the time first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x, y):
        return self.a * x, self.b * y


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.two = Two()

    def forward(self, x, y):
        a, b = self.two(x.transpose(0, 1), y.transpose(0, 1))
        return (a + b.tanh()).transpose(0, 1)


def of_two(names, features=1):
    @register_rule(Two, overwrite=True)
    class TwoRule(Rule):
        batched = names

        def feature_axes(self, module):
            return features

        def capture(self, module, args, kwargs, output):
            return {"x": args[0], "y": args[1]}

        def grad_batch(self, call, g):
            both = {"a": g[0] * call.x, "b": g[1] * call.saved["y"]}
            return {name: both[name].flatten(1, -2).sum(1) for name in call.params}


@pytest.mark.parametrize("length", [3, N])
def test_a_rule_of_two_inputs_and_two_outputs_with_the_examples_on_another_axis(length):
    x, y, target = torch.randn(3, N, length, 6)
    of_two(("x", "y"))
    assert check(TimeFirst(), squared, x, y, target).ok
    of_two(("x",))
    with pytest.raises(RuleContractError, match=r"`y`, a tensor .* name it: batched = \('x', 'y'\)"):
        check(TimeFirst(), squared, x, y, target)
    assert check(Two(), lambda out, target: squared(sum(out), target), x, y, target).ok  # on axis 0 it is right


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6))
        self.register_buffer("ones", torch.ones(6))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.w


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_what_a_rule_computes_to_capture_it_must_be_named_too(nested, folded):
    """With as many steps as examples its rows would meet those of others without a word."""

    def of_unit(*names):
        @register_rule(Unit, overwrite=True)
        class UnitRule(Rule):
            batched = names

            def feature_axes(self, module):
                return 1

            def capture(self, module, args, kwargs, output):
                h = args[0] / args[0].norm(dim=-1, keepdim=True)
                return {"x": args[0], "h": [h] if nested else h, "eps": torch.tensor(1.0), "ones": module.ones}

            def grad_batch(self, call, g):
                h = call.saved["h"][0] if nested else call.saved["h"]
                return {"w": (g * h * call.saved["ones"]).reshape(call.n, -1, 6).sum(1)}

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = Unit()

        def forward(self, x):
            return self.unit(x.flatten(0, 1)).view_as(x) if folded else self.unit(x.transpose(0, 1)).transpose(0, 1)

    x, y = torch.randn(2, N, N, 6)
    of_unit("x", "h")
    assert check(Around(), squared, x, y).ok
    of_unit("x")
    with pytest.raises(RuleContractError, match=r"returned `h`, a tensor .* name it: batched = \('x', 'h'\)"):
        backward(extend(Around()), BatchGrad(), x=x)
    assert check(Unit(), squared, x, y).ok  # on axis 0 it is right


@pytest.mark.parametrize("model", [Two, TimeFirst])
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_rule_of_two_outputs_is_given_two_gradients_whatever_is_frozen(model, frozen):
    """With one output that needs a gradient g[0] would be that of the first example."""
    of_two(("x", "y"))
    model = model()
    getattr(model if isinstance(model, Two) else model.two, frozen).requires_grad_(False)
    outputs = squared if isinstance(model, TimeFirst) else lambda out, y: squared(sum(out), y)
    assert check(model, outputs, *torch.randn(3, N, N, 6)).ok


class Handing(nn.Module):
    """Its input, and what else a module may return beside what it computes."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x, x * self.w, x.argmax(-1), (x * self.v).detach(), (x * self.v).tanh()


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("frozen", [None, "w", "v"])
@pytest.mark.parametrize("generic", [False, True])
def test_a_module_may_hand_its_input_through(time_first, frozen, generic):
    class HandingRule(Rule):
        def feature_axes(self, module):
            return 1

        def grad_batch(self, call, g):
            _, of_w, _, of_v = g
            both = {"w": of_w * call.x, "v": of_v * (1 - (call.x * call.module.v).tanh().square()) * call.x}
            return {name: both[name].flatten(1, -2).sum(1) for name in call.params}

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.handing = nn.Linear(6, 6), Handing()

        def forward(self, x):
            h = self.before(x)
            outputs = self.handing(h.transpose(0, 1) if time_first else h)
            return sum(t.transpose(0, 1) if time_first else t for t in outputs if t.is_floating_point())

    if generic and time_first:
        pytest.skip("the generic rule for modules takes the examples on axis 0")
    register_rule(Handing)(GenericRule if generic else HandingRule)
    model = Around()
    if frozen is not None:
        getattr(model.handing, frozen).requires_grad_(False)
    assert check(model, squared, *torch.randn(2, N, 3, 6)).ok


def test_a_rule_for_axis_0_is_told_where_the_examples_are():
    of_two(("x", "y"), None)
    with pytest.raises(BatchAxisError, match=r"on axis 1, where TwoRule takes them on axis 0 .*`feature_axes`"):
        check(TimeFirst(), squared, *torch.randn(3, N, 3, 6))
    with pytest.raises(BatchAxisError, match=r"on axis 1, where LinearRule takes the last 1 for features"):
        backward(extend(nn.Linear(6, 2), batch_dim=1), BatchGrad(), x=torch.randn(N, 6))


def _products(call, g):
    u, v = call.module.u.to(g.dtype), call.module.v.to(g.dtype)
    return {"u": call.saved["x"].mT @ (g @ v.mT), "v": (call.saved["x"] @ u).mT @ g}


def _after(write):
    def grad_batch(self, call, g):
        found = _products(call, g)
        write(call, g)
        return found

    return grad_batch


def _raising(self, call, g):
    raise KeyError("h")


def _returning(change):
    return lambda self, call, g: {name: change(rows) for name, rows in _products(call, g).items()}


MISTAKES = {
    "g": ({"grad_batch": _after(lambda call, g: g.mul_(2))}, "grad_batch.* wrote into g,.*Compute a new tensor"),
    "x": ({"grad_batch": _after(lambda call, g: call.x.relu_())}, r"wrote into call.saved\['x'\], which others"),
    "parameter": ({"grad_batch": _after(lambda call, g: call.params["u"].zero_())}, "wrote into the parameter `u`"),
    "terms": ({"terms": _raising}, r"`Mine.terms` for `1` \(LowRank\) failed, KeyError: 'h'"),
    "half": ({"grad_batch": _returning(torch.Tensor.half)}, "returned torch.float16 for `u`.*at least float32"),
    "complex": ({"grad_batch": _returning(lambda t: t + 0j)}, "returned torch.complex64 for `u`.*real"),
    "device": ({"grad_batch": _returning(lambda t: t.to("meta"))}, "`u` on meta, and the parameter is on cpu"),
    "no x": ({"capture": lambda *_: {"y": 1}, "grad_batch": lambda self, call, g: call.x}, r"has saved \['y'\]"),
    "no capture": (
        {"capture": lambda *_: None},
        r"`Mine.capture` for `1` \(LowRank\) returned NoneType; return a dict",
    ),
    "a tensor": ({"capture": lambda self, module, args, *_: args[0]}, "capture.* returned Tensor; return a dict"),
    "keywords": (
        {"capture": lambda self, module, args, kwargs, output: kwargs["x"]},
        "capture.* failed, KeyError: 'x'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_rules_are_named(name):
    own, message = MISTAKES[name]
    kept = torch.randn(N, 3, 6)
    x = kept.clone()
    register_rule(LowRank)(type("Mine", (Rule,), {"grad_batch": lambda self, call, g: _products(call, g)} | own))
    model = extend(nn.Sequential(nn.Linear(6, 6), LowRank()))
    with pytest.raises(RuleContractError, match=message):
        backward(model, BatchGrad(), x=x)
    assert not hasattr(model[0].weight, "grad_batch")


class Scaled(nn.Module):
    """The first argument is a number."""

    def __init__(self, inner):
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(6)), inner

    def forward(self, scale, x):
        return self.inner(x * self.w * scale)


class Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.scaled = Scaled(inner)

    def forward(self, x):
        return self.scaled(0.5, x)


def of_scaled(**own):
    def grad_batch(self, call, g):
        return {"w": 0.5 * (g * call.x).sum(1)}

    return register_rule(Scaled, overwrite=True)(type("Mine", (Rule,), {"grad_batch": grad_batch} | own))


def test_an_input_that_is_not_the_first_argument_has_to_be_named():
    of_scaled()
    model = extend(Halved(nn.Identity()))
    with pytest.raises(RuleContractError, match=r"Mine saves the first argument of Scaled .* is 0.5; override capture"):
        backward(model, BatchGrad())
    of_scaled(capture=lambda self, module, args, kwargs, output: {"x": args[1]})
    assert check(Halved(nn.Identity()), squared, torch.randn(N, 3, 6), torch.randn(N, 3, 6)).ok


def test_parameters_of_modules_inside_of_one_with_a_rule():
    own = {"capture": lambda self, module, args, kwargs, output: {"x": args[1]}}
    of_scaled(**own)
    with pytest.raises(
        UncoveredParameterError,
        match=r"`scaled.inner.weight` .* inside of `scaled` \(Scaled\), whose rule Mine answers for \['w'\].*handles",
    ):
        backward(extend(Halved(nn.Linear(6, 6))), BatchGrad())
    of_scaled(**own, handles=lambda self, module, args, kwargs: not [*module.inner.parameters()])
    assert check(Halved(nn.Linear(6, 6)), squared, torch.randn(N, 3, 6), torch.randn(N, 3, 6)).ok
    register_rule(Scaled, overwrite=True)(GenericRule)
    assert check(Halved(nn.Linear(6, 6)), squared, torch.randn(N, 3, 6), torch.randn(N, 3, 6)).ok


def test_what_bind_may_return():
    own = {"grad_batch": lambda *_: {}, "bind": lambda self, function, args, kwargs: (args[:1], {"u": args[1]})}
    register_rule(torch.matmul, overwrite=True)(type("Mine", (Rule,), own))
    register_rule(torch.Tensor.__matmul__, torch.Tensor.matmul, overwrite=True)(type("Mine", (Rule,), own))
    with pytest.raises(RuleContractError, match=r"Mine.bind for `.*matmul.*` returned .*; return a Bound"):
        backward(extend(LowRank()), BatchGrad())


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        (lambda self, function, args, kwargs: kwargs["w"], r"`Mine.bind` for `.*matmul.*` failed, KeyError: 'w'"),
        (
            lambda self, function, args, kwargs: Bound(None, args[0], {"u": args[1]}),
            r"inputs in a tuple, such as \(x,\)",
        ),
        (lambda self, function, args, kwargs: Bound(None, args[:1], args[1:]), "a dict by their names"),
    ],
)
def test_a_wrong_bind_is_named(bind, message):
    own = {"grad_batch": lambda *_: {}, "bind": bind}
    register_rule(torch.matmul, torch.Tensor.__matmul__, torch.Tensor.matmul, overwrite=True)(
        type("Mine", (Rule,), own)
    )
    with pytest.raises(RuleContractError, match=message):
        backward(extend(LowRank()), BatchGrad())


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"refuse": lambda self, module: True}, r"`Mine.refuse` for Scaled returned True; return None, or the reason"),
        ({"refuse": lambda self, module: {}["by"]}, r"`Mine.refuse` for Scaled failed, KeyError: 'by'"),
        ({"covers": lambda self, module: {}["by"]}, r"`Mine.covers` for Scaled failed, KeyError: 'by'"),
        ({"handles": lambda self, *_: {}["by"]}, r"`Mine.handles` for Scaled failed, KeyError: 'by'"),
    ],
)
def test_what_a_rule_says_before_the_backward(own, message):
    of_scaled(**own)
    with pytest.raises(RuleContractError, match=message):
        backward(extend(Halved(nn.Identity())), BatchGrad())


def test_names_of_what_holds_the_examples_are_a_tuple():
    with pytest.raises(RuleContractError, match=r"Mine.batched is the text 'code'.*batched = \('code',\)"):
        register_rule(LowRank)(type("Mine", (Rule,), {"batched": ("code"), "grad_batch": None}))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"feature_axes": 1}, r"Mine\.feature_axes is called as feature_axes\(module\), and is 1; make it a method"),
        ({"input_axis": lambda self: 1}, r"input_axis\(module\), and takes other arguments: too many positional"),
        ({"grad_batch": lambda self, call: {}}, r"grad_batch\(call, g\), and takes other arguments"),
        ({"capture": lambda self, module, x: {"x": x}}, r"as capture\(module, args, kwargs, output\), and takes other"),
    ],
    ids=lambda of: next(iter(of), "") if isinstance(of, dict) else "",
)
def test_methods_of_rules_are_methods(own, message):
    with pytest.raises(RuleContractError, match=message):
        register_rule(LowRank)(type("Mine", (Rule,), {"grad_batch": lambda self, call, g: {}, **own}))
    assert LowRank not in registered_rules()


def test_rules_are_made_without_arguments():
    with pytest.raises(RuleContractError, match=r"Scaled is made without arguments when it is registered, and .*'by'"):

        @register_rule(LowRank)
        class Scaled(Rule):
            def __init__(self, by):
                self.by = by

            def grad_batch(self, call, g):
                return {}


WRONG_WEIGHTS = [
    [1.0] * N, torch.ones(N + 1), torch.ones(1), torch.ones(()), torch.ones(N, 1), torch.ones(N, dtype=torch.complex64),
]  # fmt: skip


@pytest.mark.parametrize("w", WRONG_WEIGHTS, ids=repr)
@pytest.mark.parametrize("model", [nn.Linear(6, 2), nn.Embedding(6, 2)], ids=["linear", "embedding"])
def test_weights_are_one_for_each_example(w, model):
    class Weighted(Extension):
        field = "weighted"

        def compute(self, view):
            return view.weighted_sum(w)

    x = torch.randn(N, 6) if isinstance(model, nn.Linear) else torch.randint(6, (N, 3))
    with pytest.raises(ExtensionError, match="weighted_sum of `weight` takes"):
        backward(extend(model), Weighted(), x=x)


@pytest.mark.parametrize(
    "w", [torch.tensor([True, False, True, False]), torch.tensor([2, 0, -1, 3])], ids=["mask", "counts"]
)
def test_weights_may_say_which_examples_or_how_often(w):
    class Chosen(Extension):
        field = "chosen"

        def compute(self, view):
            return torch.stack([view.weighted_sum(w), view.weighted_sum(Weights(w))])

    model = extend(nn.Linear(6, 2))
    backward(model, BatchGrad(), Chosen())
    wanted = torch.einsum("n,n...->...", w.float(), model.weight.grad_batch)
    torch.testing.assert_close(model.weight.chosen, torch.stack([wanted, wanted]))


@pytest.mark.parametrize("w", [torch.ones(N, dtype=torch.complex64), [1.0] * N], ids=["complex", "list"])
def test_weights_are_real_numbers(w):
    with pytest.raises(ExtensionError, match=r"Weights takes a tensor of real numbers.*not (torch.complex64|list)"):
        Weights(w)


@pytest.mark.parametrize("what", ["grad_batch", "batch_l2", "batch_dot", "weighted_sum"])
@pytest.mark.parametrize("when", ["start", "compute"])
def test_a_view_that_is_not_complete_tells_nothing(what, when):
    class Early(Extension):
        """Asks for what is found of the first layer while the last one is computed with, and gets no zeros for it."""

        field = "early"

        def start(self, views):
            self.first = views[0]
            if when == "start":
                self.ask()

        def compute(self, view):
            return self.ask()

        def ask(self):
            return getattr(self.first, what)(*([torch.ones(N)] if what == "weighted_sum" else []))

    with pytest.raises(ExtensionError, match=rf"`{what}` of `0.weight` was asked for too early.*`compute`.*`finish`"):
        backward(extend(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))), Early())


def test_none_leaves_a_field_out():
    class Matrices(Extension):
        field, joint = "of_matrices", True

        def finish(self, views):
            return {view.name: view.batch_l2() if view.param.dim() > 1 else None for view in views}

    model = extend(nn.Linear(6, 2))
    model.bias.of_matrices = torch.ones(N)  # of an earlier backward
    backward(model, Matrices())
    assert model.weight.of_matrices.shape == (N,)
    assert not hasattr(model.bias, "of_matrices")


def test_fields_by_parameter_are_told_apart():
    class ByParameter(Extension):
        field, joint = "by", True

        def finish(self, views):
            return {view.param: view.batch_l2() for view in views}

    with pytest.raises(ExtensionError, match="returned a field for a Parameter, which no view is named"):
        backward(extend(nn.Linear(6, 2)), ByParameter())


def test_parameters_of_ones_own_in_a_functional_call():
    model, x = extend(nn.Linear(4, 3)), torch.randn(6, 4)
    own = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def run(tensors):
        with perex(BatchGrad(), grad=False):
            torch.func.functional_call(model, tensors, (x,)).square().mean().backward()

    with pytest.raises(StaleGradientError, match=r"or given to functional_call.*no nn\.Parameter"):
        run({name: nn.Parameter(t) for name, t in own.items()})
    leaves = {name: t.requires_grad_() for name, t in own.items()}
    run(leaves)
    assert leaves["weight"].grad_batch.shape == (6, 3, 4)


def test_parameters_that_are_one_number_are_checked():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gain = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.gain * self.linear(x)

    assert check(Scaled(), squared, torch.randn(N, 4), torch.randn(N, 3)).ok
