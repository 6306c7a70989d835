"""replace_batchnorm: what comes in BatchNorm's place, what stays, and what is refused."""

import copy
import importlib
import importlib.util
import pickle
import sys
import types

import naive
import pytest
import test_timm
import torch
import torch.nn.functional as F
from naive import assert_bitwise, randn
from torch import nn
from torch.nn.utils import parametrizations, prune

from perexample import (
    DP_SGD,
    ConfigurationError,
    CrossExampleError,
    PerExampleError,
    StaleGradientError,
    UnsupportedModuleError,
    check,
    extend,
    perex,
    unextend,
)
from perexample.extensions import ClippedGrad
from perexample.privacy import replace_batchnorm


class Block(nn.Module):
    """The residual block of He et al. 2016."""

    def __init__(self, wide, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)]
    model = nn.Sequential(*stem, Block(8, 8), Block(8, 12, 2), *head)
    for p in model.parameters():  # so that weights and biases of norms are not ones and zeros
        p.data += 0.1 * torch.randn_like(p)
    return model


def kinds(model):
    return {path: type(m) for path, m in model.named_modules() if "Norm" in type(m).__name__}


def shapes(model):
    return {path: m.num_groups for path, m in model.named_modules() if isinstance(m, nn.GroupNorm)}


# ------------------------------------------------------------------------------------------------ what comes in place


def test_a_resnet_is_exact_after_replacement():
    model = replace_batchnorm(resnet(), groups=4)
    norms = ["1", "3.bn1", "3.bn2", "3.short.1", "4.bn1", "4.bn2", "4.short.1", "8"]
    assert kinds(model) == dict.fromkeys(norms, nn.GroupNorm)
    assert shapes(model) == dict.fromkeys(norms[:-1], 4) | {"8": 1}
    batch = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    report = check(model, nn.CrossEntropyLoss(), *batch)
    assert {row.parameter for row in report.rows} == {name for name, _ in resnet().named_parameters()}
    before = resnet()
    with pytest.raises(PerExampleError):
        check(before, nn.CrossEntropyLoss(), *batch)


def test_a_resnet_trains_privately():
    """Through the optimizer, which was made before."""
    model = resnet()
    clipping = ClippedGrad(1.0)
    optimizer = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=0.0, expected_batch_size=4)
    extend(replace_batchnorm(model))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])

    def loss(model, x, y):
        return F.cross_entropy(model(x), y)

    wanted = naive.clipped(naive.rows(model, loss, x, y), 1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with perex(clipping, grad=False):
        loss(model, x, y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), (0.1 * wanted[name] / 4).float(), rtol=1e-3, atol=1e-6)
        assert before[name].ne(p).any()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(32), (2, 32)),
        (nn.BatchNorm1d(6), (2, 6, 5)),
        (nn.BatchNorm2d(6), (2, 6, 5, 4)),
        (nn.BatchNorm3d(6), (2, 6, 3, 2, 2)),
        (nn.SyncBatchNorm(6), (2, 6, 5, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_the_new_module_computes_group_norm(norm, shape, eps):
    """Against the formula: each group of channels of each example is normalised by itself."""
    norm = copy.deepcopy(norm).double()
    norm.eps, norm.weight.data, norm.bias.data = eps, randn(shape[1]), randn(shape[1], seed=2)
    x = randn(*shape)
    groups = {(32,): 2, (6, 5): 1}.get(shape[1:], 3)  # of 16 channels at least for BatchNorm1d
    rows = x.reshape(shape[0], groups, -1)
    normal = (rows - rows.mean(2, keepdim=True)) / (rows.var(2, unbiased=False, keepdim=True) + eps).sqrt()
    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    wanted = normal.reshape(shape) * norm.weight.reshape(per_channel) + norm.bias.reshape(per_channel)
    new = replace_batchnorm(norm, groups=5)
    assert type(new) is nn.GroupNorm
    torch.testing.assert_close(new(x), wanted)


@pytest.mark.parametrize(
    ("norm", "most", "groups"),
    [
        (nn.BatchNorm2d(64), 32, 32),
        (nn.BatchNorm2d(48), 32, 24),
        (nn.BatchNorm2d(16), 32, 16),
        (nn.BatchNorm2d(1), 32, 1),
        (nn.BatchNorm2d(7), 32, 7),
        (nn.BatchNorm2d(37), 32, 1),
        (nn.BatchNorm2d(64), 1, 1),
        (nn.BatchNorm2d(60), 7, 6),
        (nn.BatchNorm3d(512), 32, 32),
        (nn.SyncBatchNorm(96), 32, 32),
        (nn.BatchNorm1d(512), 32, 32),
        (nn.BatchNorm1d(64), 32, 4),
        (nn.BatchNorm1d(31), 32, 1),
        (nn.BatchNorm1d(32), 32, 2),
        (nn.BatchNorm1d(480), 32, 30),
        (nn.BatchNorm1d(480), 8, 8),
        (nn.BatchNorm1d(1), 32, 1),
    ],
    ids=repr,
)
def test_the_number_of_groups(norm, most, groups):
    new = replace_batchnorm(nn.Sequential(norm), groups=most)[0]
    assert (new.num_groups, new.num_channels) == (groups, norm.num_features)


@pytest.mark.parametrize("channels", [16, 17, 32, 64, 100])
def test_vectors_do_not_become_zeros(channels):
    """GroupNorm of one channel in each group makes zeros of [N, C], and of two no more than signs."""
    new = replace_batchnorm(nn.BatchNorm1d(channels))
    x = randn(5, channels, dtype=torch.float32)
    assert new(x).abs().std() > 0.1
    assert torch.linalg.matrix_rank(new(x)) == 5
    torch.testing.assert_close(new(3 * x[:1]), new(x[:1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("norm", "shape", "numbers"),
    [
        (nn.BatchNorm1d(1), (4, 1), 1),
        (nn.BatchNorm1d(2), (4, 2), 2),
        (nn.BatchNorm2d(32), (4, 32, 1, 1), 1),
        (nn.BatchNorm2d(64), (4, 64, 1, 1), 2),
        (nn.BatchNorm3d(8), (4, 8, 1, 1, 2), 2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("extended", [False, True])
def test_too_little_to_normalise_over_is_an_error_of_the_forward(norm, shape, numbers, extended):
    model = replace_batchnorm(nn.Sequential(nn.Identity(), nn.Sequential(norm)))
    model = copy.deepcopy(extend(model) if extended else model)
    text = rf"`1\.0`, a GroupNorm of \d+ groups .* normalises over {numbers} number.* replace_batchnorm\(groups=...\)"
    for n in (shape[0], 1, 0):
        with pytest.raises(ConfigurationError, match=text):
            model(torch.randn(n, *shape[1:]))
    enough = (4, shape[1], *(s + 2 for s in shape[2:])) if len(shape) > 2 else (*shape, 3)
    model(torch.randn(enough)).sum().backward()  # and nothing is left behind
    with pytest.raises(ConfigurationError, match=text):
        model[1][0](input=torch.randn(shape))


def test_fewer_groups_make_enough_to_normalise_over():
    norm = replace_batchnorm(nn.BatchNorm2d(32), groups=2)
    assert norm(torch.randn(2, 32, 1, 1)).abs().min() > 0


# --------------------------------------------------------------------------------------------------------- what stays


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_stay_the_same_objects(dtype):
    model = resnet().to(dtype)
    model[3].bn1.weight.requires_grad_(False)
    model[4].bn2.weight = model[4].bn1.weight  # tied
    named, values = dict(model.named_parameters(remove_duplicate=False)), copy.deepcopy(model.state_dict())
    assert replace_batchnorm(model) is model
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(named)
    assert all(after[name] is p for name, p in named.items())
    assert not model[3].bn1.weight.requires_grad
    assert model[4].bn2.weight is model[4].bn1.weight
    dropped = ("running_mean", "running_var", "num_batches_tracked")
    assert_bitwise(model.state_dict(), {key: v for key, v in values.items() if not key.endswith(dropped)})
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_frozen_and_tied_ones_are_exact():
    model = resnet()
    model[3].bn1.weight.requires_grad_(False)
    model[4].bn2.weight = model[4].bn1.weight
    report = check(replace_batchnorm(model), nn.CrossEntropyLoss(), torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))
    names = {row.parameter for row in report.rows}
    assert "3.bn1.weight" not in names
    assert "4.bn1.weight" in names
    assert "4.bn2.weight" not in names


def test_an_optimizer_made_before_moves_the_model():
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    replace_batchnorm(model)
    before = model[1].weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert model[1].weight.ne(before).all()


def test_settings_stay():
    norm = nn.BatchNorm2d(6, eps=0.25).eval()
    model = replace_batchnorm(nn.Sequential(norm, nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)))
    assert [m.eps for m in model] == [0.25, 1e-5, 1e-5]
    assert [m.training for m in model] == [False, True, True]
    assert [m.affine for m in model] == [True, True, False]
    assert model[2].weight is None
    assert model[2].bias is None
    assert len(list(model.parameters())) == 4


def biasless():
    norm = nn.BatchNorm2d(6)
    norm.register_parameter("bias", None)
    return norm


def weightless():
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("weight", None)
    return norm


def test_a_missing_bias_stays_missing():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), biasless(), nn.Flatten(), nn.Linear(24, 2))
    replace_batchnorm(model, groups=2)
    assert model[1].bias is None
    check(model, nn.MSELoss(), torch.randn(3, 2, 2, 2), torch.randn(3, 2))


def test_untracked_statistics_and_meta_devices():
    model = nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm1d(6, affine=False, device="meta"))
    replace_batchnorm(model)
    assert shapes(model) == {"0": 6, "1": 1}
    with torch.device("meta"):
        model = replace_batchnorm(nn.Sequential(nn.BatchNorm2d(6)))
    assert model[0].weight.is_meta


def test_a_module_in_two_places_stays_one():
    norm = nn.BatchNorm1d(6)
    model = nn.ModuleDict({"a": nn.ModuleList([norm, nn.Linear(6, 6), norm]), "b": norm, "c": nn.BatchNorm1d(6)})
    replace_batchnorm(model)
    assert type(model["b"]) is nn.GroupNorm
    assert model["a"][0] is model["a"][2] is model["b"] is not model["c"]
    chain = nn.Sequential(model["a"][0], model["a"][1], model["a"][2])
    check(chain, nn.MSELoss(), torch.randn(3, 6), torch.randn(3, 6))


def test_parts_that_are_shared():
    """The same branch at two places holds one norm."""
    branch = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = replace_batchnorm(nn.Sequential(branch, nn.Tanh(), branch))
    assert kinds(model) == {"0.1": nn.GroupNorm}
    assert model[0] is model[2] is branch


def test_a_part_that_holds_the_whole():
    """Modules in a circle, as an attribute that names the parent makes them."""
    model = nn.Sequential(nn.Linear(4, 20), nn.Sequential(nn.BatchNorm1d(20)))
    model[1].parent = model
    assert kinds(replace_batchnorm(model)) == {"1.0": nn.GroupNorm}


def test_other_norms_and_models_without_any_stay():
    parts = [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LocalResponseNorm(2)]
    model = nn.Sequential(*parts)
    assert replace_batchnorm(model) is model
    assert all(a is b for a, b in zip(model, parts, strict=True))
    linear = nn.Linear(2, 2)
    assert replace_batchnorm(linear) is linear


def test_calling_it_again_changes_nothing():
    model = replace_batchnorm(resnet())
    modules = list(model.modules())
    assert all(a is b for a, b in zip(replace_batchnorm(model).modules(), modules, strict=True))


def test_the_model_may_be_a_batchnorm_itself():
    norm = nn.BatchNorm2d(6)
    new = replace_batchnorm(norm)
    assert type(new) is nn.GroupNorm
    assert new.weight is norm.weight
    with pytest.raises(ConfigurationError, match="`BatchNorm2d`, a GroupNorm of 6"):
        new(torch.randn(2, 6, 1, 1))


def test_copies_and_pickles_of_the_result():
    model = replace_batchnorm(resnet())
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        with pytest.raises(ConfigurationError, match="`1`, a GroupNorm of 8 groups"):
            other[1](torch.randn(2, 8, 1, 1))


def test_nothing_is_printed_and_no_random_number_drawn(capsys):
    model = resnet()
    state = torch.get_rng_state()
    replace_batchnorm(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


class Named(nn.BatchNorm2d):
    """A subclass with another name and constructor, and the same forward."""

    def __init__(self):
        super().__init__(4, eps=0.1)
        self.note = "mine"


def test_subclasses_that_inherit_the_forward():
    model = replace_batchnorm(nn.Sequential(Named()))
    assert type(model[0]) is nn.GroupNorm
    assert model[0].eps == 0.1


# ---------------------------------------------------------------------------------------------------------- own norms


def test_make_another_norm():
    asked = []

    def make(channels):
        asked.append(channels)
        return nn.InstanceNorm2d(channels, affine=True) if channels != 16 else nn.LayerNorm(channels)

    model = resnet().double()
    named = dict(model.named_parameters())
    replace_batchnorm(model, make=make)
    assert sorted(asked) == [8, 8, 8, 8, 12, 12, 12, 16]
    assert set(kinds(model).values()) == {nn.InstanceNorm2d, nn.LayerNorm}
    assert all(p is named[name] for name, p in model.named_parameters())
    check(model, nn.CrossEntropyLoss(), torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))


def test_make_gets_dtype_device_mode_and_only_parameters_that_fit():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.extra = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight

    norm = nn.BatchNorm2d(6).double().eval()
    new = replace_batchnorm(nn.Sequential(norm), make=lambda channels: Scaled())[0]
    assert new.weight is not norm.weight
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    assert not new.training


def test_a_parameter_that_make_leaves_out_is_told_by_the_optimizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    clipping = ClippedGrad(1.0)
    optimizer = DP_SGD(model.parameters(), clipping=clipping, noise_multiplier=1.0, expected_batch_size=2)
    extend(replace_batchnorm(model, make=lambda channels: nn.Identity()))
    with perex(clipping, grad=False):
        model(torch.randn(2, 4)).square().mean().backward()
    with pytest.raises(StaleGradientError, match=r"parameter 2 \(shape \[4\]\) has no clipped sum"):
        optimizer.step()


# -------------------------------------------------------------------------------------------------------- what is not


class Own(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own."""

    def forward(self, x):
        return super().forward(x).relu()


class OwnInit(nn.BatchNorm2d):
    """With a parameter, a part and a buffer that the forward, which is inherited, does not use."""

    def __init__(self):
        super().__init__(4)
        self.gain = nn.Parameter(torch.ones(1))
        self.part = nn.Identity()
        self.register_buffer("seen", torch.zeros(1))


def hooked(register):
    norm = nn.BatchNorm2d(4)
    getattr(norm, register)(lambda *_: None)
    return norm


def rebound():
    norm = nn.BatchNorm2d(4)
    norm.forward = types.MethodType(lambda self, x: x, norm)
    return norm


def pruned():
    norm = nn.BatchNorm2d(4)
    prune.l1_unstructured(norm, "weight", 0.5)
    return norm


REFUSED = {
    "own-forward": (Own, 4, r"\(Own\) has a forward of its own"),
    "own-forward-of-the-object": (rebound, None, r"\(BatchNorm2d\) has a forward of its own"),
    "more-in-it": (OwnInit, None, r"holds more than a BatchNorm does \(`gain`, `part`, `seen`\)"),
    "lazy": (nn.LazyBatchNorm2d, None, r"\(LazyBatchNorm2d\) has no shape yet; run one forward before"),
    "forward-hook": (hooked, "register_forward_hook", r"has hooks \(_forward_hooks\), which its replacement"),
    "pre-hook": (hooked, "register_forward_pre_hook", r"has hooks \(_forward_pre_hooks\)"),
    "backward-hook": (hooked, "register_full_backward_hook", r"has hooks \(_backward_hooks\)"),
    "backward-pre-hook": (hooked, "register_full_backward_pre_hook", r"has hooks \(_backward_pre_hooks\)"),
    "state-hook": (hooked, "register_state_dict_post_hook", r"has hooks \(_state_dict_hooks\)"),
    "load-hook": (hooked, "register_load_state_dict_post_hook", r"has hooks \(_load_state_dict_post_hooks\)"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None),
        None,
        r"holds more than a BatchNorm does \(`parametrizations`\)",
    ),
    "bias-alone": (weightless, None, r"has a bias and no weight, for which torch's GroupNorm has no gradient"),
    "pruned": (pruned, None, r"holds more than a BatchNorm does \(`weight_mask`, `weight_orig`\)"),
}


@pytest.mark.parametrize(("make", "argument", "text"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("root", [False, True])
def test_what_is_more_than_a_batchnorm_is_named_and_nothing_is_replaced(make, argument, text, root):
    special = make() if argument is None else make(argument)
    model = special if root else nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.Sequential(nn.ReLU(), special)})
    before = list(model.modules())
    path = type(special).__name__ if root else r"b\.1"
    with pytest.raises(UnsupportedModuleError, match=rf"`{path}` .*{text}.*Nothing was replaced"):
        replace_batchnorm(model)
    with pytest.raises(UnsupportedModuleError, match=text):
        replace_batchnorm(model, make=nn.Identity)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_a_lazy_batchnorm_is_one_after_its_first_forward():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 64, 3, 3))
    assert shapes(replace_batchnorm(model)) == {"0": 32}


ONE = [nn.Identity()] * 4
ARGUMENTS = {
    "class": (lambda: replace_batchnorm(nn.Linear), r"replace_batchnorm takes a torch\.nn\.Module, not type"),
    "tensor": (lambda: replace_batchnorm(torch.ones(2)), r"takes a torch\.nn\.Module, not Tensor"),
    "groups-0": (lambda: replace_batchnorm(nn.Linear(1, 1), groups=0), r"groups must be a whole number .* not 0"),
    "groups-true": (lambda: replace_batchnorm(nn.Linear(1, 1), groups=True), r"groups must be .* not True"),
    "groups-2.0": (lambda: replace_batchnorm(nn.Linear(1, 1), groups=2.0), r"groups must be .* not 2\.0"),
    "groups-none": (lambda: replace_batchnorm(nn.Linear(1, 1), groups=None), r"groups must be .* not None"),
    "make": (lambda: replace_batchnorm(nn.Linear(1, 1), make="group"), r"make must be a function .* not 'group'"),
    "make-none": (
        lambda: replace_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), make=lambda channels: None),
        r"make must return a module other than BatchNorm, not None \(for `0`, which has 3 channels\)",
    ),
    "make-class": (
        lambda: replace_batchnorm(nn.BatchNorm2d(3), make=lambda channels: nn.GroupNorm),
        r"make must return a module other than BatchNorm, not <class .*GroupNorm",
    ),
    "make-batchnorm": (
        lambda: replace_batchnorm(nn.BatchNorm2d(3), make=nn.BatchNorm2d),
        r"make must return a module other than BatchNorm, not BatchNorm2d",
    ),
    "make-the-same": (
        lambda: replace_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)), make=ONE.__getitem__),
        r"make returned one module twice \(again for `\d`\)",
    ),
}


@pytest.mark.parametrize(("call", "text"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_without_meaning(call, text):
    with pytest.raises(ConfigurationError, match=text):
        call()


def test_a_make_that_fails_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(4))
    before, weight = list(model), model[0].weight
    with pytest.raises(ValueError, match="divisible"):
        replace_batchnorm(model, make=lambda channels: nn.GroupNorm(3, channels))
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert model[0].weight is weight


@pytest.mark.parametrize("part", ["model", "inner", "outer"])
def test_extended_models_are_refused(part):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4).eval()))
    extend({"model": model, "inner": model[0], "outer": nn.Sequential(model)}[part])
    with pytest.raises(ConfigurationError, match=r"is extended already.*replace_batchnorm first and extend after it"):
        replace_batchnorm(model)
    assert type(model[1][0]) is nn.BatchNorm1d
    for whole in (model, model[0]):
        unextend(whole)
    assert type(replace_batchnorm(model)[1][0]) is nn.GroupNorm


def test_an_extended_model_without_batchnorm_is_refused_too():
    with pytest.raises(ConfigurationError, match="`0` is extended already"):
        replace_batchnorm(nn.Sequential(extend(nn.Linear(2, 2))))


def test_wrapped_models_are_refused():
    model = resnet()
    with pytest.raises(ConfigurationError, match="`OptimizedModule` is a OptimizedModule, which keeps"):
        replace_batchnorm(torch.compile(model, backend="eager"))
    sharded = type("FSDPSequential", (type("FSDPModule", (), {}), nn.Sequential), {})(nn.BatchNorm1d(3))
    with pytest.raises(ConfigurationError, match="`0` is a FSDPModule, which keeps"):
        replace_batchnorm(nn.Sequential(sharded))


def test_an_alias_outside_of_the_modules_is_told_by_the_library():
    """A list that still holds the old norm is not a part of the module; its use is seen all the same."""

    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.hidden = [self.norm]

        def forward(self, x):
            return self.hidden[0](self.linear(x))

    model = extend(replace_batchnorm(Aliased()))
    with pytest.raises(CrossExampleError), perex(ClippedGrad(1.0), grad=False):
        model(torch.randn(3, 4)).square().mean().backward()


# --------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def timm():
    """timm with stubs for what it imports of torchvision, taken out again so that its own tests begin anew."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the models are those of timm, which is not installed")
    before = set(sys.modules)
    with test_timm._torchvision():
        try:
            yield importlib.import_module("timm")
        except ImportError as error:
            pytest.skip(f"timm cannot be imported beside this torch: {error!r}")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "timm":
            del sys.modules[name]


def densenet():
    return importlib.import_module("timm.models.densenet").DenseNet(growth_rate=4, block_config=(2, 1), num_classes=3)


def regnet():
    module = importlib.import_module("timm.models.regnet")
    return module.RegNet(module.RegNetCfg(depth=4, w0=8, wa=10.0, wm=1.5, group_size=4, se_ratio=0.25), num_classes=3)


def efficientnet():
    module = importlib.import_module("timm.models.efficientnet")
    blocks = module.decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k3_s2_e2_c12_se0.25"]])
    return module.EfficientNet(blocks, num_classes=3, num_features=16, stem_size=8)


def plain_resnet():
    return test_timm.resnet()()


TIMM = {"densenet": densenet, "regnet": regnet, "efficientnet": efficientnet, "resnet": plain_resnet}


@pytest.mark.parametrize("make", TIMM.values(), ids=TIMM)
@pytest.mark.parametrize("own", [False, True])
def test_models_of_timm_are_exact_after_replacement(timm, make, own):
    torch.manual_seed(0)
    model = make()
    count = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    names = [name for name, _ in model.named_parameters()]
    replace_batchnorm(model, **({"make": lambda channels: nn.GroupNorm(1, channels)} if own else {"groups": 4}))
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == count > 5
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if not own:
        assert [name for name, _ in model.named_parameters()] == names
    check(model, nn.CrossEntropyLoss(), torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("sync", [False, True])
def test_the_activation_of_timm_is_kept(timm, own, sync):
    layers = importlib.import_module("timm.layers")
    old = layers.BatchNormAct2d(6, act_layer=nn.SiLU, drop_layer=nn.Identity).double().eval()
    old.weight.data, old.bias.data = randn(6), randn(6, seed=2)
    before = nn.Sequential(layers.convert_sync_batchnorm(old) if sync else old)
    act, drop = before[0].act, before[0].drop
    model = replace_batchnorm(before, groups=3, make=(lambda channels: nn.GroupNorm(3, channels)) if own else None)
    x = randn(2, 6, 4, 4)
    torch.testing.assert_close(model(x), F.silu(F.group_norm(x, 3, old.weight, old.bias)))
    assert model[0].act is act
    assert model[0].drop is drop
    assert not model[0].training
    assert "SiLU" in repr(model)


def test_a_batchnorm_of_timm_with_another_forward_is_named(timm):
    split = importlib.import_module("timm.layers").SplitBatchNorm2d
    with pytest.raises(UnsupportedModuleError, match=r"`0` \(SplitBatchNorm2d\) has a forward of its own"):
        replace_batchnorm(nn.Sequential(split(4)))


def test_a_subclass_of_the_norm_with_activation_that_holds_more_is_named(timm):
    norm = importlib.import_module("timm.layers").BatchNormAct2d(4)
    norm.add_module("gate", nn.Linear(1, 1))
    with pytest.raises(UnsupportedModuleError, match=r"holds more than a BatchNorm does \(`gate`\)"):
        replace_batchnorm(nn.Sequential(norm))
