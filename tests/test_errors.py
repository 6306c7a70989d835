"""Every wrong use is one of the library's own errors: it names the module, parameter or argument, and the remedy."""

import copy
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import harness
import naive
import pytest
import torch
import torch.nn.functional as F
from naive import Lambda, mse
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perexample import (
    DP_SGD,
    BatchAxisError,
    ConfigurationError,
    CrossExampleError,
    Extension,
    ExtensionError,
    GenericRule,
    LossError,
    PerExampleError,
    PrivacyBudgetError,
    RecordedModel,
    RecordedStep,
    Rule,
    RuleContractError,
    StaleGradientError,
    UncoveredParameterError,
    UnsupportedModuleError,
    check,
    extend,
    perex,
    plan,
    privatize,
    register_rule,
    unextend,
)
from perexample.extensions import BatchGrad, BatchL2Grad, Clip, ClippedGrad, Flat, Variance
from perexample.privacy import Ledger, Release

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("registry")


CASES = []


def case(error, message):
    """Add a function that does something wrong to the table, with the error and the pattern of its message."""

    def add(function):
        CASES.append(pytest.param(function, error, message, id=function.__name__.removeprefix("bad_")))
        return function

    return add


@pytest.mark.parametrize(("bad", "error", "message"), CASES)
def test_bad_use(bad, error, message):
    with pytest.raises(PerExampleError, match=message) as caught:
        bad()
    assert type(caught.value) is error


def backward(model, *extensions, loss=mse, batch=None, **settings):
    with perex(*(extensions or (BatchGrad(),)), **settings):
        loss(model, *(naive.batch() if batch is None else batch)).backward()


def ones(*shape):
    return torch.ones(*shape)


# ------------------------------------------------------------------------------------------------- modules, at extend


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("norm", "tail"),
    [(nn.BatchNorm1d, (4,)), (nn.BatchNorm2d, (4, 2, 2)), (nn.BatchNorm3d, (4, 2, 2, 2)), (nn.SyncBatchNorm, (4,))],
)
def test_batchnorm_in_training_mode(norm, tail, affine):
    model = nn.Sequential(nn.Identity(), norm(4, affine=affine), nn.Flatten(), nn.LazyLinear(2))
    model.eval()(ones(2, *tail))
    model.train()
    message = rf"`1` \({norm.__name__}\).*statistics of the whole batch.*GroupNorm.*\.eval\(\)"
    with pytest.raises(UnsupportedModuleError, match=message):
        extend(model)
    extend(model.eval()).train()  # later
    if norm is not nn.SyncBatchNorm:  # whose training forward needs a process group
        with perex(BatchGrad()), pytest.raises(UnsupportedModuleError, match=message):
            model(ones(2, *tail)).sum(1).mean().backward()


@case(UnsupportedModuleError, r"`0` \(BatchNorm1d\).*GroupNorm")
def bad_batchnorm_without_statistics_in_evaluation_mode():
    extend(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval())


@case(UnsupportedModuleError, r"`0` \(InstanceNorm1d\).*track_running_stats=False, or call \.eval\(\)")
def bad_instance_norm_that_tracks():
    extend(nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True)))


@case(UnsupportedModuleError, r"`0` \(InstanceNorm1d\).*track_running_stats=False")
def bad_instance_norm_that_tracks_later():
    model = extend(nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), nn.Conv1d(4, 2, 1)).eval())
    model.train()
    backward(model, loss=naive.mean, batch=(ones(2, 4, 3),))


@case(UnsupportedModuleError, r"`1` \(MyNorm\).*GroupNorm")
def bad_subclass_of_batchnorm():
    class MyNorm(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    extend(nn.Sequential(nn.Linear(5, 5), MyNorm(5)))


@case(UnsupportedModuleError, r"`0` \(Embedding\).*scale_grad_by_freq=False")
def bad_scale_grad_by_freq():
    extend(nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True)))


@case(UnsupportedModuleError, r"`0` \(Embedding\).*max_norm=None")
def bad_max_norm():
    extend(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)))


@case(UnsupportedModuleError, r"`0` \(Embedding\).*a frozen one too.*max_norm=None")
def bad_max_norm_of_a_frozen_table():
    extend(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0).requires_grad_(False), nn.Linear(4, 2)))


@case(UnsupportedModuleError, r"`table` \(Embedding\) has a parameter `weight` that the forward changes.*keep data out")
def bad_max_norm_of_a_function():
    def forward(m, i):
        return m.linear(F.embedding(i, m.table.weight, max_norm=1.0))

    model = extend(Lambda(forward, table=nn.Embedding(5, 4), linear=nn.Linear(4, 2)))
    with perex(BatchGrad()):
        model(torch.tensor([[1, 2], [3, 4]])).mean().backward()


@case(UncoveredParameterError, r"`embedding_bag` of ids in a row, in `Lambda`.*leave include_last_offset out")
def bad_offsets_with_the_end():
    def forward(m, ids, offsets):
        return m.a(F.embedding_bag(ids, m.e.weight, offsets, include_last_offset=True))

    model = extend(Lambda(forward, e=nn.Embedding(5, 4), a=nn.Linear(4, 2)))
    with perex(BatchGrad()):
        model(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 4])).mean().backward()


@case(CrossExampleError, r"`unique` in `Lambda`.*mixes examples.*go through all experts, range\(len\(experts\)\)")
def bad_experts_that_were_chosen():
    def forward(m, x):
        expert = x.argmax(1) % 2
        return sum((expert == k).unsqueeze(1) * m.experts[k](x) for k in expert.unique())

    model = extend(Lambda(forward, experts=nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])))
    with perex(BatchGrad()):
        model(torch.randn(6, 4)).mean().backward()


@case(UnsupportedModuleError, r"`bag` \(EmbeddingBag\).*max_norm=None")
def bad_max_norm_of_a_bag():
    extend(nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4, max_norm=1.0)}))


@case(UnsupportedModuleError, r"`1` \(LazyLinear\) has no shape yet \(`weight`\).*one forward before")
def bad_lazy():
    extend(nn.Sequential(nn.Linear(5, 5), nn.LazyLinear(3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_module():
    scripted = torch.jit.script(nn.Linear(5, 3))
    with pytest.raises(UnsupportedModuleError, match=r"`0` .*scripted.*extend the original"):
        extend(nn.Sequential(scripted))


@case(UnsupportedModuleError, r"compiled model; extend the model itself, without torch\.compile")
def bad_extend_after_compile():
    extend(torch.compile(naive.mlp(), backend="eager"))


@pytest.mark.parametrize("early", [True, False], ids=["compile-then-call", "call-extend-call"])
def test_compile_after_extend(early):
    """Taps cannot lie in a compiled region: exact all the same, or an error that says so; never an omission."""
    torch._dynamo.reset()
    model, (x, y) = naive.mlp(), naive.batch()
    wanted = naive.rows(model, mse, x, y)
    if early:
        compiled = torch.compile(extend(model), backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        extend(model)
    message = ""
    with perex(BatchGrad()):
        loss = (compiled(x) - y).square().mean()
        try:
            loss.backward()
        except PerExampleError as error:
            message = str(error)
    if message:
        assert "torch.compile" in message or "compiled" in message or "forward" in message
        assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    else:
        naive.assert_same(naive.fields(model, "grad_batch"), wanted)
    torch._dynamo.reset()


@case(UnsupportedModuleError, r"\(DataParallel\).*extend\(model\.module\)")
def bad_data_parallel():
    extend(nn.DataParallel(naive.mlp()))


@case(ConfigurationError, r"extend takes a torch\.nn\.Module, not function")
def bad_extend_a_function():
    extend(lambda x: x)


@case(ConfigurationError, "extend takes a torch.nn.Module, not type")
def bad_extend_a_class():
    extend(nn.Linear)


@case(ConfigurationError, "batch_dim")
def bad_batch_dim():
    extend(naive.mlp(), batch_dim=-1)


# ------------------------------------------------------------------------------------------------ the context's own


@case(ExtensionError, r"got the class BatchGrad; pass an instance: BatchGrad")
def bad_extension_class():
    perex(BatchGrad)


@case(ExtensionError, r"'batch_grad'.*not an instance of perexample\.Extension")
def bad_extension_text():
    perex("batch_grad")


@case(ExtensionError, r"needs at least one extension: perex\(BatchGrad\(\)\)")
def bad_no_extension():
    perex()


@case(ExtensionError, "Two extensions write the field `clipped_sum`")
def bad_two_of_one_field():
    perex(BatchGrad(), ClippedGrad(1.0), ClippedGrad(2.0))


def field(name):
    return type("Mine", (Extension,), {"field": name, "compute": lambda self, view: view.grad_batch().sum()})()


@pytest.mark.parametrize("name", ["grad", "data", "shape", "requires_grad", "not a name", "", None, 3, "_version"])
def test_fields_that_are_no_free_attribute(name):
    with pytest.raises(ExtensionError, match=r"Mine\.field is .*attribute name that parameters do not have"):
        perex(field(name))


def test_a_field_that_tensors_have_is_told_so():
    with pytest.raises(ExtensionError, match=r"'kron'; .*, and each tensor of torch has its own p\.kron\."):
        perex(field("kron"))


@case(ExtensionError, r"\.field is None")
def bad_no_field():
    perex(type("Mine", (Extension,), {"compute": lambda self, view: None})())


@case(ExtensionError, r"Mine has neither compute\(self, view\) nor finish\(self, views\).*override one")
def bad_extension_that_computes_nothing():
    perex(type("Mine", (Extension,), {"field": "mine", "Compute": lambda self, view: view.grad_batch()})())


def backward_with(**methods):
    extension = type("Mine", (Extension,), {"field": "mine", "joint": "finish" in methods, **methods})()
    model = extend(nn.Linear(3, 2))
    with perex(extension, BatchGrad()):
        model(torch.ones(4, 3)).square().mean().backward()


RETURNED = {
    "a number": ({"compute": lambda self, view: 1.0}, r"Mine\.compute returned float for `weight`.*None leaves it out"),
    "a list": ({"finish": lambda self, views: []}, r"Mine\.finish returned list; it must return a dictionary"),
    "nothing": ({"finish": lambda self, views: None}, r"Mine\.finish returned NoneType; it must return a dictionary"),
    "a name": ({"finish": lambda self, views: {"w": torch.ones(1)}}, r"a field for 'w', which no view is named"),
    "a text": (
        {"finish": lambda self, views: {view.name: "x" for view in views}},
        r"Mine\.finish returned str for `weight`",
    ),
    "norms in place": (
        {"compute": lambda self, view: view.batch_l2().sqrt_()},
        r"Mine\.compute wrote into what `batch_l2\(\)` of `(weight|bias)` returned.*`\.sqrt\(\)`",
    ),
    "gradients in place": (
        {"compute": lambda self, view: view.grad_batch().abs_().sum(0)},
        r"Mine\.compute wrote into what `grad_batch\(\)` of `(weight|bias)`",
    ),
    "in place at the end": (
        {"finish": lambda self, views: {view.name: view.grad_batch().mul_(2) for view in views}},
        r"Mine\.finish wrote into what `grad_batch\(\)`",
    ),
}


@pytest.mark.parametrize(("methods", "message"), RETURNED.values(), ids=RETURNED)
def test_what_an_extension_returns_and_writes_to(methods, message):
    with pytest.raises(ExtensionError, match=message):
        backward_with(**methods)


@case(ConfigurationError, "unextend takes a torch.nn.Module, not int")
def bad_unextend():
    unextend(1)


@case(ConfigurationError, "plan takes a torch.nn.Module, not int")
def bad_plan():
    plan(1)


@case(ConfigurationError, "check takes a torch.nn.Module, not int")
def bad_check():
    check(1, nn.MSELoss(), torch.ones(2, 3), torch.ones(2, 2))


def own_function(x):
    return x * 2


class OwnFunction(torch.autograd.Function):
    pass


@pytest.mark.parametrize("target", [own_function, OwnFunction.apply])
def test_rules_for_functions_that_cannot_be_seen(target):
    with pytest.raises(
        ConfigurationError, match=r"A function of your own cannot be seen as a whole, and needs no rule"
    ):
        register_rule(target)


def test_a_rule_is_a_class_of_rules():
    with pytest.raises(RuleContractError, match=r"NoRule.* is no class of rules; derive it from perexample\.Rule"):
        register_rule(nn.Softplus)(type("NoRule", (), {"grad_batch": lambda self, call, g: {}}))
    with pytest.raises(RuleContractError, match=r"grad sampler of Opacus\) goes into grad_batch\(self, call, g\)"):
        register_rule(nn.Softplus)(lambda layer, activations, backprops: {})


def test_gradients_under_parameters_in_place_of_names_are_not_written_out():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.gain

    @register_rule(Scaled)
    class Keyed(Rule):
        def grad_batch(self, call, g):
            return {call.module.gain: g * call.x}

    model = extend(nn.Sequential(Scaled()))
    with pytest.raises(RuleContractError, match=r"\['a tensor itself'\], but .* are \['gain'\]"), perex(BatchGrad()):
        model(torch.ones(2, 3)).sum(1).mean().backward()


@case(ExtensionError, r"open already in this thread; contexts do not nest.*perex\(BatchGrad\(\), ClippedGrad")
def bad_nested():
    with perex(BatchGrad()), perex(BatchL2Grad()):
        pass


@case(ExtensionError, r"A generator that was left in a context keeps it open until its close\(\)")
def bad_nested_in_a_generator():
    def steps():
        with perex(BatchGrad()):
            yield

    left = steps()
    next(left)
    try:
        with perex(BatchL2Grad()):
            pass
    finally:
        left.close()


def test_after_a_nested_context_all_is_as_before():
    with perex(BatchGrad()):
        with pytest.raises(ExtensionError), perex(Variance()):
            pass
        model = extend(naive.mlp())
        mse(model, *naive.batch()).backward()
    assert model[0].weight.grad_batch.shape == (6, 7, 5)
    with perex(Variance()):
        mse(model, *naive.batch()).backward()


@case(ExtensionError, r"open already")
def bad_entered_twice():
    context = perex(BatchGrad())
    with context, context:
        pass


@case(ConfigurationError, "loss_reduction must be 'mean' or 'sum', not 'avg'")
def bad_reduction():
    perex(BatchGrad(), loss_reduction="avg")


@case(ConfigurationError, "loss_scale must be a positive number or a GradScaler, not 'big'")
def bad_loss_scale():
    backward(extend(naive.mlp()), loss_scale="big")


# ---------------------------------------------------------------------------------------------------------- the loss


@case(UncoveredParameterError, r"`\d\.\w+`.*extend\(\)|extend\(model\)")
def bad_forward_before_extend():
    model = naive.mlp()
    loss = mse(model, *naive.batch())
    extend(model)
    with perex(BatchGrad()):
        loss.backward()


@case(LossError, r"torch\.no_grad\(\)")
def bad_no_grad():
    model = extend(naive.mlp())
    with torch.no_grad():
        loss = mse(model, *naive.batch())
    with perex(BatchGrad()):
        loss.backward()


@case(LossError, "everything frozen")
def bad_all_frozen():
    backward(extend(naive.mlp()).requires_grad_(False))


@case(LossError, r"shape \[6, 3\].*losses\.mean\(\)")
def bad_loss_not_scalar():
    backward(extend(naive.mlp()), loss=lambda m, x, y: m(x) - y)


@case(LossError, r"shape \[6\].*losses\.mean\(\).*loss_reduction='sum'")
def bad_losses_of_examples():
    backward(extend(naive.mlp()), loss=lambda m, x, y: (m(x) - y).square().mean(1))


@case(UncoveredParameterError, r"`0\.weight`.*penalty on weights.*does not depend on the batch")
def bad_penalty_alone():
    backward(extend(naive.mlp()), loss=lambda m, x, y: m[0].weight.square().sum())


@case(UncoveredParameterError, r"`2\.weight`.*penalties in the optimizer \(weight_decay\)")
def bad_penalty_added():
    backward(extend(naive.mlp()), loss=lambda m, x, y: mse(m, x, y) + m[2].weight.square().sum())


@case(UncoveredParameterError, r"extend\(\)")
def bad_model_not_extended():
    backward(naive.mlp())


@case(UncoveredParameterError, r"shape \[\d, \d\].*belongs to no extended model.*extend\(\)")
def bad_second_model_not_extended():
    a, b = extend(naive.mlp()), nn.Linear(3, 3).double()
    backward(a, loss=lambda m, x, y: mse(nn.Sequential(m, b), x, y))


@case(UncoveredParameterError, r"shape \[5, 2\] that belongs to no extended model.*detach\(\) what it has made")
def bad_generator_not_detached():
    critic, generator = extend(nn.Linear(5, 1)), nn.Linear(2, 5)
    with perex(ClippedGrad(1.0), grad=False):
        (critic(torch.randn(4, 5)) - critic(generator(torch.randn(4, 2)))).mean().backward()


@case(LossError, r"gradient=\.\.\.")
def bad_gradient():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        mse(model, *naive.batch()).backward(gradient=torch.tensor(2.0, dtype=torch.float64))


@case(LossError, r"inputs=\.\.\..*requires_grad_\(False\)")
def bad_inputs():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        mse(model, *naive.batch()).backward(inputs=[model[0].weight])


@case(LossError, r"backward of 2 losses.*add them up")
def bad_several_losses():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        torch.autograd.backward([mse(model, *naive.batch()), mse(model, *naive.batch())])


@case(LossError, r"used by an earlier backward.*retain_graph=True")
def bad_second_backward():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        loss = mse(model, *naive.batch())
        loss.backward()
        loss.backward()


@case(LossError, r"used by an earlier backward.*retain_graph=True")
def bad_second_backward_without_raw_gradients():
    model = extend(naive.mlp())
    with perex(BatchGrad(), grad=False):
        loss = mse(model, *naive.batch())
        loss.backward()
        loss.backward()


@case(LossError, r"MseLossBackward0.*loss_reduction='sum'")
def bad_mse_sum():
    backward(extend(naive.mlp()), loss=lambda m, x, y: F.mse_loss(m(x), y, reduction="sum"))


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@case(LossError, r"NllLossBackward0.*loss_reduction='sum'")
def bad_cross_entropy_sum():
    backward(extend(naive.mlp()), loss=lambda m, x, y: F.cross_entropy(m(x), LABELS, reduction="sum"))


@case(LossError, r"NllLossBackward0.*loss_reduction='sum'")
def bad_nll_sum():
    backward(extend(naive.mlp()), loss=lambda m, x, y: F.nll_loss(m(x).log_softmax(1), LABELS, reduction="sum"))


@case(LossError, r"BinaryCrossEntropyWithLogitsBackward0.*loss_reduction='sum'")
def bad_bce_sum():
    backward(
        extend(naive.mlp()),
        loss=lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), y.sigmoid(), reduction="sum"),
    )


# -------------------------------------------------------------------------------------------------------------- rules


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.gain


def scaled(result, extension=None, base=Rule, method="grad_batch"):
    methods = {method: lambda self, call, g, *w: result(call, g)}
    register_rule(Scale, overwrite=True)(type("ScaleRule", (base,), methods))
    model = extend(nn.Sequential(nn.Linear(5, 5), Scale()))
    backward(model, extension or BatchGrad(), loss=naive.mean, batch=(ones(6, 5),))


@case(RuleContractError, r"`ScaleRule\.grad_batch` for `1` \(Scale\).*\['weight'\].*\['gain'\] \(`call\.params`\)")
def bad_rule_names():
    scaled(lambda call, g: {"weight": g})


@case(RuleContractError, r"`ScaleRule\.grad_batch` for `1` \(Scale\) returned \[5\] for `gain`.*\[6, 5\]")
def bad_rule_shape():
    scaled(lambda call, g: {"gain": g.sum(0)})


@case(RuleContractError, r"`ScaleRule\.grad_batch` for `1` \(Scale\) returned Tensor; return a dict")
def bad_rule_tensor():
    scaled(lambda call, g: g)


@case(RuleContractError, r"`ScaleRule\.grad_batch` for `1` \(Scale\) returned NoneType; return a dict")
def bad_rule_nothing():
    scaled(lambda call, g: None)


@case(RuleContractError, r"`ScaleRule\.grad_batch` for `1` \(Scale\).*`gain`.*tensor of shape")
def bad_rule_numbers():
    scaled(lambda call, g: {"gain": [1.0] * 6})


@case(RuleContractError, r"`ScaleRule\.terms` for `1`.*\['weight'\].*\['gain'\]")
def bad_rule_terms_names():
    scaled(lambda call, g: {"weight": None}, method="terms")


@case(RuleContractError, r"`ScaleRule\.terms` for `1` \(Scale\)")
def bad_rule_terms_nothing():
    scaled(lambda call, g: None, method="terms")


@case(RuleContractError, r"`ScaleRule\.terms` for `1` \(Scale\).*`gain`")
def bad_rule_terms_tensor():
    scaled(lambda call, g: {"gain": g}, method="terms")


class HalfRule(Rule):
    def grad_batch(self, call, g):
        return {"gain": g * call.x}


class NormRule(HalfRule):
    def batch_l2(self, call, g):
        return {"gain": (g * call.x).square().sum(1)}


@case(RuleContractError, r"`ScaleRule\.batch_l2` for `1` \(Scale\) returned \[6, 5\] for `gain`; .*\[6\]")
def bad_rule_norms():
    scaled(lambda call, g: {"gain": g.square()}, BatchL2Grad(), HalfRule, "batch_l2")


@case(RuleContractError, r"`ScaleRule\.weighted_sum` for `1` \(Scale\) returned \[6, 5\] for `gain`; .*\[5\]")
def bad_rule_weighted_sum():
    scaled(lambda call, g: {"gain": g}, ClippedGrad(1.0), NormRule, "weighted_sum")


@case(RuleContractError, r"Empty must define grad_batch")
def bad_rule_without_gradient():
    @register_rule(Scale)
    class Empty(Rule):
        def batch_l2(self, call, g):
            return {}


@case(ConfigurationError, "Linear has the rule LinearRule already; pass overwrite=True")
def bad_register_twice():
    register_rule(nn.Linear)(HalfRule)


@case(ConfigurationError, r"@register_rule\(MyModule\)")
def bad_register_nothing():
    register_rule()


@case(ConfigurationError, r"takes classes of torch\.nn\.Module")
def bad_register_an_instance():
    register_rule(nn.Linear(2, 2))(HalfRule)


@case(ConfigurationError, r"takes classes of torch\.nn\.Module")
def bad_register_a_rule():
    @register_rule
    class MyRule(HalfRule):
        pass


def test_a_refused_rule_leaves_the_registry_alone():
    from perexample import registered_rules

    before = registered_rules()
    with pytest.raises(ConfigurationError):
        register_rule(Scale, nn.Linear)(HalfRule)
    assert registered_rules() == before


# --------------------------------------------------------------------------------- models that change, uncovered use


@case(StaleGradientError, r"`weight` of `2`.*replaced after the forward")
def bad_parameter_replaced_after_forward():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        loss = mse(model, *naive.batch())
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
        loss.backward()


@case(StaleGradientError, r"`0\.bias` was frozen between forward and backward; freeze it before")
def bad_frozen_in_between():
    model = extend(naive.mlp())
    with perex(BatchGrad()):
        loss = mse(model, *naive.batch())
        model[0].bias.requires_grad_(False)
        loss.backward()


@case(BatchAxisError, r"number of examples in the call of `Lambda`.*\[4, 3\] along axis 0.*batch_dim=")
def bad_unclear_n():
    model = Lambda(lambda self, x, y: self.a(x).sum(0) * self.a(y).sum(0), a=nn.Linear(5, 2))
    with perex(BatchGrad()):
        extend(model)(ones(4, 5), ones(3, 5)).sum().backward()


@case(UncoveredParameterError, r"`a\.weight` \(Linear\) reaches the loss where no tap could be left")
def bad_input_of_another_size():
    """With a scalar output the first input says how many examples there are; the second belongs to none of them."""
    model = Lambda(lambda self, x, y: self.a(x).sum() * self.a(y).sum(), a=nn.Linear(5, 2))
    with perex(BatchGrad()):
        extend(model)(ones(4, 5), ones(3, 5)).backward()


@case(UncoveredParameterError, r"In gradients \(torch\.autograd\.grad .*forward of a module that has the generic rule")
def bad_derivative_in_the_loss():
    model, x = extend(nn.Sequential(nn.Linear(5, 2), nn.Tanh())), torch.randn(4, 5, requires_grad=True)
    with perex(BatchGrad()):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().mean().backward()


class Coder(nn.Module):
    """A model whose parts are called by methods, as autoencoders' are."""

    def __init__(self):
        super().__init__()
        self.encoder, self.gain = nn.Linear(5, 2), nn.Parameter(ones(2))

    def encode(self, x):
        return self.encoder(x) * self.gain

    def scale(self, x):
        return x[:, :2] * self.gain

    def forward(self, x):
        return self.encode(x)


@case(UncoveredParameterError, r"`gain` \(Coder\) is used outside of any forward of its Coder.*method.*of `encoder`\.")
def bad_method_in_place_of_the_forward():
    model = extend(Coder())
    with perex(BatchGrad()):
        model.encode(ones(4, 5)).mean().backward()


@case(UncoveredParameterError, r"`gain` \(Coder\) reaches the loss, but no call.*a method was called in its place")
def bad_method_without_modules():
    model = extend(Coder())
    with perex(BatchGrad()):
        model.scale(ones(4, 5)).mean().backward()


@case(UncoveredParameterError, r"`gain` \(Coder\) reaches.* outside of the model's forward, as in the loss function")
def bad_parameter_in_the_loss():
    model = extend(Coder())
    with perex(BatchGrad()):
        (model(ones(4, 5)).square() * model.gain.exp()).mean().backward()


@case(
    CrossExampleError, r"in `a` \(MultiheadAttention\) mixes.*`a` has batch_first=False.*Make it with batch_first=True;"
)
def bad_attention_between_examples():
    """The layer's own default, with examples first."""
    model = Lambda(lambda self, x: self.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2))
    with perex(BatchGrad()):
        extend(model)(torch.randn(3, 5, 4)).mean().backward()


@case(BatchAxisError, r"`a` \(LSTM\) was called with the examples on axis 0.*extend\(model, batch_dim=1\)")
def bad_recurrent_layer_of_time_first():
    model = Lambda(lambda self, x: self.a(x)[0], a=nn.LSTM(4, 2))
    with perex(BatchGrad()):
        extend(model)(torch.randn(3, 5, 4)).mean().backward()


@case(CrossExampleError, r"`mean` in `Lambda` \(Lambda\) mixes.*loss of each example\.$")
def bad_mean_beside_a_layer_of_time_first():
    """Nothing is said of what has no part in it."""
    model = Lambda(lambda self, x: self.b(x) - self.b(x).mean(0), a=nn.LSTM(4, 2), b=nn.Linear(4, 2))
    with perex(BatchGrad()):
        extend(model)(torch.randn(3, 4)).mean().backward()


@case(ConfigurationError, "The loss has no value .*meta device.*real tensors")
def bad_meta_device():
    def forward(m, x):
        return m.a((x + m.p).cumsum(1))

    model = Lambda(forward, p=nn.Parameter(ones(3)), a=nn.Linear(3, 2)).to("meta")
    with perex(BatchGrad()):
        extend(model)(ones(4, 3).to("meta")).mean().backward()


@case(ConfigurationError, "The loss has no value .*FakeTensorMode")
def bad_fake_tensors():
    with FakeTensorMode(), perex(BatchGrad()):
        extend(nn.Linear(3, 2))(ones(4, 3)).mean().backward()


@case(UnsupportedModuleError, r"`Linear` is given a nested tensor.*padded data.*packed sequence")
def bad_nested_tensor():
    model = extend(nn.Linear(5, 2))
    with perex(BatchGrad()):
        rows = model(torch.nested.nested_tensor([ones(2, 5), ones(3, 5)], layout=torch.jagged)).unbind()
        torch.stack([row.mean() for row in rows]).mean().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_attention_names_itself_where_it_is_given_nested_tensors(layout, frozen):
    """Also under ``torch.no_grad``, as another path of torch's is taken where an extended model is followed."""

    def forward(m, rows):
        with torch.set_grad_enabled(not frozen):
            return m.encoder(torch.nested.nested_tensor(rows, layout=layout))

    model = extend(Lambda(forward, encoder=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval())
    with pytest.raises(UnsupportedModuleError, match=r"`encoder.self_attn` .* nested tensor.*padded data"):
        model([ones(2, 4), ones(3, 4)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_pass_through_an_extended_model(layout):
    model, rows = nn.Sequential(nn.Linear(5, 2), nn.ReLU()), [torch.randn(2, 5), torch.randn(3, 5)]
    wanted = [model(row) for row in rows]
    found = extend(model)(torch.nested.nested_tensor(rows, layout=layout)).unbind()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@case(LossError, r"shape \[4\].*where backward was given weights, \(weights \* losses\)\.sum\(\)")
def bad_backward_with_weights():
    model = extend(nn.Linear(5, 2))
    with perex(BatchGrad(), loss_reduction="sum"):
        model(ones(4, 5)).square().sum(1).backward(ones(4))


@case(BatchAxisError, r"number of examples in the call of `Lambda`")
def bad_no_tensor_input():
    model = Lambda(lambda self, n: self.a(ones(n, 5)), a=nn.Linear(5, 2))
    with perex(BatchGrad()):
        extend(model)(4).mean().backward()


@case(
    BatchAxisError,
    r"different numbers of examples: .* with 6.* with 4|different numbers of examples: .* with 4.* with 6",
)
def bad_different_n():
    model = extend(naive.mlp())
    backward(model, loss=lambda m, x, y: mse(m, x, y) + mse(m, x[:4], y[:4]))


@case(StaleGradientError, r"`0` \(Linear\).*changed in place after its forward; do not write")
def bad_input_modified():
    model, (x, y) = extend(naive.mlp()), naive.batch()
    with perex(BatchGrad(), grad=False):
        loss = mse(model, x, y)
        x.add_(1)
        loss.backward()


@case(StaleGradientError, r"`0` \(Linear\).*changed in place after its forward; do not write")
def bad_input_modified_with_raw_gradients():
    model, (x, y) = extend(naive.mlp()), naive.batch()
    with perex(BatchGrad(), grad=True):
        loss = mse(model, x, y)
        x.add_(1)
        loss.backward()


@case(StaleGradientError, r"`gain` of `0:mul`.*changed in place.*step the optimizer after backward")
def bad_parameter_modified():
    model = extend(nn.Sequential(Scale(), nn.Linear(5, 3)))
    with perex(BatchGrad()):
        loss = model(ones(2, 5)).mean()
        with torch.no_grad():
            model[0].gain.add_(1)
        loss.backward()


class Own(nn.Module):
    """A leaf with a parameter, whose forward is given."""

    def __init__(self, function):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))
        self.register_buffer("count", torch.zeros(()))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def own(function):
    model = extend(nn.Sequential(nn.Identity(), Own(function), nn.Linear(5, 3)).double())
    backward(model, loss=naive.mean, batch=(naive.batch()[0],))


@case(CrossExampleError, r"`mean` in `1` \(Own\) mixes examples.*each example by itself")
def bad_mean_over_the_batch():
    own(lambda self, x: (x - x.mean(0)) * self.gain)


@case(CrossExampleError, r"`softmax` in `1` \(Own\) mixes examples.*each example by itself")
def bad_softmax_over_the_batch():
    own(lambda self, x: (x * self.gain).softmax(0))


@case(CrossExampleError, r"returns the examples in another order")
def bad_roll():
    own(lambda self, x: x.roll(1, 0) * self.gain)


@case(CrossExampleError, r"`mean` in `1` \(Own\) mixes examples")
def bad_mean_and_random_numbers():
    own(lambda self, x: F.dropout(x - x.mean(0), 0.2) * self.gain)


@case(UnsupportedModuleError, r"`1` \(Own\) has a buffer `count`.*according to the data.*\.eval\(\)")
def bad_buffer_of_data():
    def forward(self, x):
        self.count += x.detach().sum()
        return x * self.gain

    own(forward)


@case(UnsupportedModuleError, r"`1` \(Own\) has a buffer `count`.*according to the data.*\.eval\(\)")
def bad_buffer_replaced():
    def forward(self, x):
        self.count = self.count + x.detach().sum()
        return x * self.gain

    own(forward)


def test_generic_rule_on_a_container():
    """The remedy that messages name works."""

    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x * self.gain) + self.gain.sum()

    register_rule(Container)(GenericRule)
    model, x = extend(Container().double()), naive.batch()[0]
    wanted = naive.rows(model, naive.mean, x)
    backward(model, loss=naive.mean, batch=(x,))
    naive.assert_same(naive.fields(model, "grad_batch"), wanted)


# ------------------------------------------------------------------------------------- uses that are no errors any more

EXACT = []


def exact(function):
    """Add a function that makes a model and its inputs to the table."""
    EXACT.append(pytest.param(function, id=function.__name__))
    return function


@pytest.mark.parametrize("make", EXACT)
@pytest.mark.parametrize("n", [4, 5])  # 5 is another size in most of the models
def test_exact_now(make, n):
    """All fields, with and without ``p.grad``, against one backward per example."""
    torch.manual_seed(0)
    model, *inputs = make(n)
    harness.assert_exact(harness.jittered(model), tuple(inputs), forward=lambda m, *x: m(*(t.clone() for t in x)))


def test_exact_where_a_module_was_replaced_after_extend():
    model, (x, y) = extend(naive.mlp()), naive.batch()
    model[2] = nn.Linear(7, 3).double()
    wanted = naive.rows(model, mse, x, y)
    bound = naive.norms(wanted).median().item()
    backward(model, BatchGrad(), BatchL2Grad(), ClippedGrad(bound))
    naive.assert_same(naive.fields(model, "grad_batch"), wanted)
    naive.assert_same(naive.fields(model, "batch_l2"), {k: g.flatten(1).square().sum(1) for k, g in wanted.items()})
    naive.assert_same(naive.fields(model, "clipped_sum"), naive.clipped(wanted, bound))


@exact
def bare_parameter(n):
    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x * self.gain)

    return Container(), harness.rand(n, 5)


@exact
def parameter_list(n):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([torch.ones(5), torch.ones(5)])
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x * self.weights[0] + self.weights[1])

    return Listed(), harness.rand(n, 5)


@exact
def functional_and_module(n):
    return Lambda(lambda self, x: F.linear(self.a(x), self.a.weight), a=nn.Linear(5, 5)), harness.rand(n, 5)


@exact
def weight_as_input_of_another_module(n):
    model = Lambda(lambda self, x: self.b(x * self.a.weight), a=nn.Linear(5, 1), b=nn.Linear(5, 3))
    return model, harness.rand(n, 5)


@exact
def weight_alone_through_another_module(n):
    """What the module computes of the weight is the same for all examples."""
    return Lambda(lambda self, x: x * self.b(self.a.weight), a=nn.Linear(5, 1), b=nn.Linear(5, 5)), harness.rand(n, 5)


def positional(ids):
    return Lambda(
        lambda self, x: self.out(self.tokens(x) + self.places(ids(x))),
        tokens=nn.Embedding(9, 4),
        places=nn.Embedding(9, 4),
        out=nn.Linear(4, 2),
    )


@exact
def position_ids_1t(n):
    return positional(lambda x: torch.arange(5).view(1, 5)), torch.randint(9, (n, 5))


@exact
def position_ids_t(n):
    return positional(lambda x: torch.arange(5)), torch.randint(9, (n, 5))


@exact
def folded_batch(n):
    model = Lambda(lambda self, x: self.a(x.reshape(-1, 5)).reshape(-1, 3, 2), a=nn.Linear(5, 2))
    return model, harness.rand(n, 3, 5)


@exact
def folded_windows_of_a_convolution(n):
    model = Lambda(lambda self, x: self.a(x.flatten(0, 1)).reshape(len(x), 3, -1), a=nn.Conv1d(5, 2, 1))
    return model, harness.rand(n, 3, 5, 6)


@exact
def buffer_that_counts(n):
    def forward(self, x):
        self.count += 1
        return x * self.gain

    return nn.Sequential(nn.Identity(), Own(forward), nn.Linear(5, 3)), harness.rand(n, 5)


@exact
def input_changed_in_place(n):
    return nn.Sequential(Own(lambda self, x: x.mul_(2) * self.gain), nn.Linear(5, 3)), harness.rand(n, 5)


def test_an_input_of_the_user_changed_in_place():
    """Of `x` itself, not a copy of it: each field must be that of ``x`` as it was."""
    model, x = nn.Sequential(Own(lambda self, x: x.mul_(2) * self.gain), nn.Linear(5, 3)).double(), naive.batch()[0]
    wanted = naive.rows(model, lambda m, x: naive.mean(m, x.clone()), x)
    backward(extend(model), loss=naive.mean, batch=(x,))
    naive.assert_same(naive.fields(model, "grad_batch"), wanted)


# ----------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf"), True, "1.0", None, [1.0]])
def test_bounds_without_meaning(value):
    with pytest.raises(ConfigurationError, match="max_norm must be a finite number greater than 0"):
        ClippedGrad(value)


@case(ConfigurationError, r"clip must be one of 'flat', 'automatic', 'global'.*'flatt'")
def bad_clip_name():
    ClippedGrad(1.0, clip="flatt")


@case(ConfigurationError, r"clip is the class Flat; pass an instance: Flat\(\)")
def bad_clip_class():
    ClippedGrad(1.0, clip=Flat)


@case(ConfigurationError, r"groups must be 'all', 'per-parameter', 'per-module', or a mapping")
def bad_groups():
    ClippedGrad(1.0, groups="layers")


@case(ConfigurationError, r"groups=.*parameter `2\.weight` belongs to no group; name it, or a module that holds it")
def bad_group_mapping():
    backward(extend(naive.mlp()), ClippedGrad(1.0, groups={"0": "first", "2.bias": "second"}))


@case(ConfigurationError, r"max_norm=.*no bound for the group 'second'")
def bad_bounds_mapping():
    backward(extend(naive.mlp()), ClippedGrad({"first": 1.0}, groups={"0": "first", "2": "second"}))


@case(StaleGradientError, r"sensitivity.*known after the first backward")
def bad_sensitivity_unknown():
    ClippedGrad(1.0, groups="per-module").sensitivity()


@case(ConfigurationError, r"clip=.*returned \[6, 1\] for norms of shape \[6\]")
def bad_clip_function_shape():
    backward(extend(naive.mlp()), ClippedGrad(1.0, clip=lambda norms: norms.unsqueeze(1)))


@case(ConfigurationError, r"clip=.*returned float for norms")
def bad_clip_function_number():
    backward(extend(naive.mlp()), ClippedGrad(1.0, clip=lambda norms: 1.0))


@case(CrossExampleError, r"clip=.*norm of its own example only")
def bad_clip_function_median():
    backward(extend(naive.mlp()), ClippedGrad(1.0, clip=lambda norms: (norms.median() / norms).clamp_max(1)))


@case(CrossExampleError, r"clip=.*norm of its own example only")
def bad_clip_function_largest():
    backward(extend(naive.mlp()), ClippedGrad(1.0, clip=lambda norms: norms / norms.max()))


@case(CrossExampleError, r"clip=.*norm of its own example only")
def bad_clip_function_neighbour():
    """Halves of the batch agree with the whole: each example takes the factor of its neighbour."""

    def swapped(norms):
        neighbour = (torch.arange(len(norms)) ^ 1).clamp_max(len(norms) - 1)
        return 1 / (1 + norms[neighbour])

    backward(extend(naive.mlp()), ClippedGrad(1.0, clip=swapped), batch=naive.batch(4))


@case(ConfigurationError, r"clip=.*returned \[12\] for norms of shape \[6\]|Clip.*\[12\]")
def bad_clip_subclass_shape():
    class Twice(Clip):
        def __call__(self, norms, bound):
            return torch.cat([norms, norms])

    backward(extend(naive.mlp()), ClippedGrad(1.0, clip=Twice()))


# ---------------------------------------------------------------------------------------------------------- optimizers


def dp(model=None, **changes):
    settings = {"lr": 0.1, "clipping": ClippedGrad(1.0), "noise_multiplier": 1.0, "expected_batch_size": 4.0}
    return DP_SGD((naive.mlp() if model is None else model).parameters(), **(settings | changes))


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", None, True, torch.tensor(1.0)])
@pytest.mark.parametrize("name", ["noise_multiplier", "expected_batch_size"])
def test_settings_without_meaning(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} must be a finite number"):
        dp(**{name: value})


@case(ConfigurationError, "expected_batch_size must be a finite number > 0, not 0")
def bad_expected_batch_size_zero():
    dp(expected_batch_size=0)


@case(ConfigurationError, "noise_multiplier must be a finite number >= 0, not -2")
def bad_noise_set_later():
    model = extend(naive.mlp())
    optimizer = dp(model)
    optimizer.param_groups[0]["noise_multiplier"] = -2
    optimizer.step()


@case(ConfigurationError, "noise_multiplier must be the same in all param_groups")
def bad_settings_differ():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    groups = [{"params": list(m.parameters())} for m in (model[0], model[2])]
    optimizer = DP_SGD(groups, lr=0.1, clipping=clipping, noise_multiplier=1.0, expected_batch_size=4)
    optimizer.param_groups[1]["noise_multiplier"] = 0.5
    backward(model, clipping)
    optimizer.step()


@case(ConfigurationError, "expected_batch_size must be the same in all param_groups")
def bad_settings_differ_in_an_added_group():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = DP_SGD(model[0].parameters(), lr=0.1, clipping=clipping, noise_multiplier=1.0, expected_batch_size=4)
    optimizer.add_param_group({"params": list(model[2].parameters()), "expected_batch_size": 8})
    backward(model, clipping)
    optimizer.step()


@case(ConfigurationError, "noise_multiplier is that of the private optimizer")
def bad_settings_differ_from_the_start():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    groups = [
        {"params": list(model[0].parameters()), "noise_multiplier": 0.1},
        {"params": list(model[2].parameters())},
    ]
    optimizer = DP_SGD(groups, lr=0.1, clipping=clipping, noise_multiplier=1.0, expected_batch_size=4)
    backward(model, clipping)
    optimizer.step()


@case(PerExampleError, r"DP_SGD\.step got a closure.*step\(\) without arguments")
def bad_closure():
    dp().step(lambda: 0.0)


@case(PerExampleError, r"Adam\.step got a closure")
def bad_closure_by_name():
    optimizer = torch.optim.Adam(naive.mlp().parameters())
    privatize(optimizer, clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)
    optimizer.step(closure=lambda: 0.0)


@case(StaleGradientError, r"parameter 0 \(shape \[7, 5\]\) has no clipped sum.*perex\(clipping\)")
def bad_no_backward():
    dp().step()


@case(StaleGradientError, r"parameter 0 .*no backward ran in `with perex\(clipping\):`.*since the last zero_grad")
def bad_zero_grad_before_step():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = dp(model, clipping=clipping)
    backward(model, clipping)
    optimizer.zero_grad()
    optimizer.step()


@case(StaleGradientError, r"`0\.weight` was used by an earlier step already; run another backward in perex\(clipping\)")
def bad_used_twice():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = dp(model, clipping=clipping)
    backward(model, clipping)
    optimizer.step()
    optimizer.step()


@case(StaleGradientError, r"parameter 0 .*no clipped sum of this ClippedGrad")
def bad_other_clipping():
    model = extend(naive.mlp())
    optimizer = dp(model, clipping=ClippedGrad(1.0))
    backward(model, ClippedGrad(1.0))
    optimizer.step()


@case(StaleGradientError, r"parameter 0 .*not part of the extended model")
def bad_optimizer_over_other_parameters():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = dp(copy.deepcopy(model), clipping=clipping)
    backward(model, clipping)
    optimizer.step()


@case(StaleGradientError, r"parameter 2 \(shape \[3, 7\]\).*was it replaced after the optimizer was made")
def bad_parameter_replaced_after_the_optimizer():
    model, clipping = extend(naive.mlp()), ClippedGrad(1.0)
    optimizer = dp(model, clipping=clipping)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    backward(model, clipping)
    optimizer.step()


@case(ConfigurationError, "LBFGS cannot be private.*use SGD")
def bad_lbfgs():
    optimizer = torch.optim.LBFGS(naive.mlp().parameters())
    privatize(optimizer, clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)


@case(ConfigurationError, "SparseAdam cannot be private")
def bad_sparse_adam():
    optimizer = torch.optim.SparseAdam(list(naive.mlp().parameters()))
    privatize(optimizer, clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)


@case(ConfigurationError, r"privatize takes a torch\.optim\.Optimizer, not Sequential")
def bad_privatize_a_model():
    privatize(naive.mlp(), clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)


@case(ConfigurationError, "DP_SGD is private already")
def bad_private_twice():
    privatize(dp(), clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)


@case(ConfigurationError, "clipping must be an instance of ClippedGrad, not 1.0")
def bad_clipping_number():
    dp(clipping=1.0)


@case(ConfigurationError, "clipping must be an instance of ClippedGrad")
def bad_clipping_class():
    dp(clipping=ClippedGrad)


@case(ConfigurationError, "generator must be a torch.Generator or None, not 0")
def bad_generator():
    dp(generator=0)


@case(StaleGradientError, r"cannot be pickled or copied.*optimizer\.state_dict\(\)")
def bad_optimizer_pickled():
    pickle.loads(pickle.dumps(dp()))


@case(StaleGradientError, r"cannot be pickled or copied.*optimizer\.state_dict\(\)")
def bad_optimizer_copied():
    copy.deepcopy(dp())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_of_a_privatized_optimizer_never_steps_without_noise(how):
    """Refused when it is copied, or when the copy steps; else the copy must be private too."""
    model, clipping = extend(naive.mlp()), ClippedGrad(1e-3)
    optimizer = torch.optim.Adam(model.parameters())
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=4)
    backward(model, clipping)  # leaves raw gradients too, which the copy would use
    with pytest.raises(PerExampleError):
        how(optimizer).step()


# --------------------------------------------------------------------------------------------------------------- check


@case(ConfigurationError, r"check needs a batch of two or more examples.*\[1\]")
def bad_check_one_example():
    check(naive.mlp(), nn.MSELoss(), *naive.batch(1))


@case(ConfigurationError, r"check needs a batch.*\[4, 6\]")
def bad_check_sizes():
    check(naive.mlp(), nn.MSELoss(), naive.batch(6)[0], naive.batch(4)[1])


@case(ConfigurationError, r"draws random numbers.*model\.eval\(\) before check")
def bad_check_random():
    check(Lambda(lambda self, x: self.a(F.dropout(x)), a=nn.Linear(5, 3)), nn.MSELoss(), *naive.batch())


@case(CrossExampleError, r"moves the gradients of others, at `0\.weight`")
def bad_check_mixed():
    check(naive.mlp(), lambda z, y: (z - z.mean(0) - y).square().mean(), *naive.batch())


@case(PrivacyBudgetError, "The 1 steps that were planned have been taken")
def bad_step_beyond_the_plan():
    ledger = Ledger(limit=1)
    for _ in range(2):
        ledger.record(Release(1.0))


# ----------------------------------------------------------------------------------------------------------- imports


def test_the_folder_extensions_cannot_be_imported_by_itself():
    command = [sys.executable, "-c", "import extensions"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: Import perexample.extensions instead of extensions")


def test_every_message_is_one_error_of_the_library():
    """The table above covers each public error class."""
    import perexample

    errors = {
        value for value in vars(perexample).values() if isinstance(value, type) and issubclass(value, PerExampleError)
    }
    assert errors - {perexample.CheckFailedError} == {parameter.values[1] for parameter in CASES}


def test_an_error_inside_of_a_rule_names_the_rule_and_the_shapes():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.gain * x

    @register_rule(Gain)
    class GainRule(Rule):
        def grad_batch(self, call, g):
            return {"gain": (g * call.x).flatten(1, -2).sum(1)}  # for [N, T, features] only

    model = extend(nn.Sequential(nn.Linear(3, 4), Gain()))
    match = r"`GainRule.grad_batch` for `1` \(Gain\) failed, RuntimeError: flatten.*g of shape \[5, 4\] and x \[5, 4\]"
    with perex(BatchGrad()), pytest.raises(RuleContractError, match=match):
        model(torch.randn(5, 3)).square().sum(1).mean().backward()


def not_finite(call):
    model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(1.0)
    x = torch.randn(4, 3)
    called = call(model, x, clipping)
    x[0] = math.nan
    return lambda: called(x)


def by_backward(model, x, clipping):
    def step(x):
        with perex(clipping, grad=False):
            model(x).sum(1).mean().backward()

    return step


def by_model(model, x, clipping):
    return by_backward(RecordedModel(model, x, extensions=clipping), x, clipping)


def by_step(model, x, clipping):
    return RecordedStep(model, lambda x: model(x).sum(1), x, extensions=clipping)


@pytest.mark.parametrize("call", [by_backward, by_model, by_step])
def test_warnings_name_the_line_of_the_user(call):
    step = not_finite(call)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(10):
            step()
    assert len(found) == (1 if call is by_backward else 2)  # the second says that recordings help little here
    assert {warning.filename for warning in found} == {__file__}
