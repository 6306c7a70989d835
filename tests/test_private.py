"""Notice when a private name of torch, used in perexample/_private, changes its meaning."""

import ast
import inspect
import math
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools import ModTracker
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from perexample import _private

FOLDER = Path(_private.__file__).parent


def test_every_function_of_the_package_is_used_by_its_name_and_tested_here():
    trees = [ast.parse(path.read_text()) for path in FOLDER.glob("*.py")]
    functions = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions <= vars(_private).keys()
    here = ast.walk(ast.parse(Path(__file__).read_text()))
    tested = {node.attr for node in here if isinstance(node, ast.Attribute)}
    assert functions <= tested


def test_private_names_of_torch_are_used_there_only():
    """By their whole name, as ``torch._C``; attributes of objects are not seen so."""
    library = FOLDER.parent
    for path in [*library.rglob("*.py"), *Path(library.parent, "extensions").glob("*.py")]:
        if FOLDER not in path.parents:
            tree = ast.parse(path.read_text())
            names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            assert not [name for name in names if re.match(r"(torch|nn|F)(\.\w+)*\._[^_]", name)], path


def test_generators_of_the_system_differ():
    """test_noise.py tells the rest."""
    one, other = _private.system_generator(), _private.system_generator("cpu")
    assert not torch.equal(one.get_state(), other.get_state())


def test_the_default_generator_is_known_also_where_a_mode_sees_it():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(_private.is_default_generator(kwargs["generator"]))
            return func(*args, **kwargs)

    seen: list[bool] = []
    same = torch.Generator()
    same.set_state(torch.default_generator.get_state())
    for generator in (torch.default_generator, same, same.clone_state()):
        with Mode():
            torch.rand(3, generator=generator)
    assert seen == [True, False, False]


def test_all_of_a_seed_counts():
    seeds = [b"a", b"b", b"a" * 64 + b"a", b"a" * 64 + b"b"]
    drawn = [torch.randn(4, generator=_private.generator_of(seed)) for seed in seeds]
    assert torch.equal(drawn[0], torch.randn(4, generator=_private.generator_of(b"a")))
    assert len({tuple(t.tolist()) for t in drawn}) == len(seeds)
    state = _private.generator_of(b"a").get_state()
    assert len(state[_private.MT_STATE].view(-1, 8)[:, :4].unique(dim=0)) > 600  # of 624 words


def test_dispatch_modes_are_seen():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not _private.dispatch_modes_active()
    with Mode():
        assert _private.dispatch_modes_active()
    with torch.device("cpu"):
        assert not _private.dispatch_modes_active()


def test_operations_without_the_frame_of_a_python_function():
    add, x = torch.ops.aten.add.Tensor, torch.ones(2)
    assert type(add).__call__.__code__.co_names == ("_op",)
    assert _private.operation_without_frame(add)(x, x, alpha=2).tolist() == [3.0, 3.0]
    assert _private.operation_without_frame(torch.ops.higher_order.cond) is torch.ops.higher_order.cond


@pytest.mark.filterwarnings("ignore")  # of torch about its own parts
def test_modules_that_are_compiled_in_place():
    module = nn.Linear(2, 2)
    assert not _private.compiled_in_place(module)
    module.compile()
    assert _private.compiled_in_place(module)


def test_operations_are_told_from_functions():
    assert _private.is_operation(torch.ops.aten.add.Tensor)
    assert _private.is_operation(torch.ops.aten.add)
    assert not _private.is_operation(torch.add)


def test_hooks_on_all_modules():
    assert _private.global_hooks() == [[], [], [], []]
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert _private.global_hooks() == [[], [handle.id], [], []]
    handle.remove()


def test_what_torch_does_unseen_by_dispatch_modes():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__float__:
                seen.append(_private.dispatch_is_off())
            return func(*args, **(kwargs or {}))

    seen, one = [], torch.ones(())
    with Mode():
        float(one)
        torch.Tensor([one])
    assert seen == [False, True]


def test_named_parameters_are_those_of_the_module():
    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner, nn.ModuleDict({"again": inner, "bare": nn.PReLU()}), nn.MultiheadAttention(4, 2))
    model[1]["bare"].register_parameter("none", None)
    model.register_parameter("tied", inner.weight)
    found = _private.named_parameters(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(found[name] is p for name, p in model.named_parameters())


class _Other(nn.Sequential):
    def named_parameters(self, *args, **kwargs):
        return super().named_parameters(*args, **kwargs)


@pytest.mark.parametrize("kind", [nn.Sequential, _Other])
def test_what_was_computed_is_no_parameter(kind):
    model = kind(nn.Linear(2, 2))
    model[0]._parameters["weight"] = model[0].weight * 2
    assert list(_private.named_parameters(model)) == ["0.bias"]


def test_parameters_have_the_names_that_a_model_gives_them():
    class Renamed(nn.Sequential):
        def named_parameters(self, *args, **kwargs):
            return ((f"my.{name}", p) for name, p in super().named_parameters(*args, **kwargs))

    assert list(_private.named_parameters(Renamed(nn.Linear(2, 2)))) == ["my.0.weight", "my.0.bias"]


def test_the_library_can_be_imported_in_inference_mode():
    code = "import torch\nwith torch.inference_mode():\n    import perexample"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_of_a_node_are_what_it_has_saved_beside_tensors():
    x = leaf(5, 4)
    assert _private.options_of(x.roll(2, 1).grad_fn) == [(1,), (2,)]
    assert _private.options_of((x * leaf(4)).grad_fn) == []
    assert _private.options_of(x.sum(1).grad_fn) == [(1,), False, (5, 4)]
    assert _private.options_of(x[torch.tensor([1])].grad_fn) == [(5, 4)]


def test_leaves_are_told_by_the_class_of_their_nodes():
    leaves = [leaf(2), nn.Parameter(torch.ones(2))]
    node = torch.mul(*leaves).grad_fn
    assert all(_private.leaf_of(n) is t for (n, _), t in zip(node.next_functions, leaves, strict=True))
    assert _private.leaf_of(node) is None


def leaf(*shape):
    return torch.ones(*shape, requires_grad=True)


def test_functorch_wrappers_are_recognised():
    seen = []
    torch.func.vmap(lambda x: seen.append(_private.inside_functorch(x)) or x)(torch.ones(2))
    assert seen == [True]
    assert not _private.inside_functorch(torch.ones(2))


def test_without_functorch_tells_what_a_wrapper_holds():
    seen, weight = [], torch.ones(2, requires_grad=True)

    def look(w):
        seen.append((w.requires_grad, _private.without_functorch(w).requires_grad))
        return w

    torch.func.vmap(torch.func.vmap(look))(weight[None])
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    assert seen == [(False, True), (True, False)]
    assert _private.without_functorch(weight) is weight


def test_version_counts_writes():
    x = torch.ones(2)
    before = _private.version(x)
    x.add_(1)
    assert _private.version(x) == before + 1


def test_bare_modules_have_no_tensors_of_their_own():
    assert all(map(_private.is_bare, (nn.ReLU(), nn.Sequential(nn.Linear(1, 1)))))
    norms = nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2)
    assert not any(map(_private.is_bare, (nn.Linear(2, 2), *norms)))


def test_own_parameters_keeps_one_parameter_under_two_names():
    module = nn.Module()
    module.a = module.b = nn.Parameter(torch.ones(1))
    assert list(_private.own_parameters(module)) == ["a", "b"]


def test_what_an_object_hides_of_its_class():
    module = nn.Conv2d(1, 1, 1)
    names = frozenset(["forward", "_conv_forward"])
    assert not _private.hides(module, names)
    module._conv_forward = module._conv_forward
    assert _private.hides(module, names)
    assert not _private.hides(module, frozenset(["forward"]))
    kind = type("Other", (nn.Conv2d,), {"norm": nn.LayerNorm})
    module = kind(1, 1, 1)
    module.norm = nn.RMSNorm  # a setting, of which the class has the default
    assert not _private.hides(module, names | {"norm"})


def test_what_stands_in_for_a_parameter():
    names = ("weight", "bias")
    module = nn.Linear(2, 2)
    assert not _private.stands_in(module, names)
    del module.weight
    assert not _private.stands_in(module, names)
    module.weight = torch.ones(2, 2)
    assert _private.stands_in(module, names)
    del module.weight
    module.register_buffer("weight", torch.ones(2, 2))
    assert not _private.stands_in(module, names)
    module.weight = torch.ones(2, 2, requires_grad=True)
    assert "weight" in module._buffers
    assert _private.stands_in(module, names)


def test_modules_that_drop_out():
    dropouts = [
        nn.Dropout(),
        nn.Dropout1d(),
        nn.Dropout2d(),
        nn.Dropout3d(),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
    ]
    assert all(map(_private.is_dropout, dropouts))
    assert not _private.is_dropout(nn.RReLU())


@pytest.mark.parametrize("module", [nn.LSTM(2, 3, 2, proj_size=1), nn.GRU(2, 3, bidirectional=True), nn.RNN(2, 2)])
def test_weights_of_recurrent_modules_have_names(module):
    assert _private.weight_names(module) == [name for name, _ in module.named_parameters()]


def test_overridden_forward():
    module = nn.Linear(1, 1)
    assert not _private.overridden_forward(module)
    module.forward = lambda x: x
    assert _private.overridden_forward(module)


def test_hooks_are_found_and_removed_with_all_their_flags():
    class Hook:
        def __call__(self, *args):
            raise AssertionError("was removed")

    module = nn.Linear(1, 1)
    module.register_forward_pre_hook(Hook(), with_kwargs=True)
    module.register_forward_hook(Hook(), with_kwargs=True, always_call=True)
    assert _private.has_hook(module, Hook)
    assert isinstance(_private.hook_of(module, Hook), Hook)
    assert _private.hook_of(module, str) is None
    _private.remove_hooks(module, (Hook,))
    assert not _private.has_hook(module, Hook)
    module(torch.ones(1, 1))
    assert not any(getattr(module, name) for name in _private.hooks._HOOK_TABLES)


def test_metadata_of_a_node_is_a_dictionary_that_stays():
    y = torch.ones(1, requires_grad=True) * 2
    _private.metadata(y.grad_fn)["key"] = 1
    assert _private.metadata(y.grad_fn) == {"key": 1}


def test_reentrant_checkpoint_is_recognised():
    x = torch.ones(1, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
    assert _private.reentrant_checkpoint(y.grad_fn.name())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.NLLLoss, nn.MSELoss, nn.CrossEntropyLoss])
def test_losses_tell_their_reduction(loss, reduction):
    x = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2]) if loss in (nn.NLLLoss, nn.CrossEntropyLoss) else torch.rand(3, 4)
    node = loss(reduction=reduction)(x, target).grad_fn
    assert _private.loss_reduction_of(node) == reduction


def test_zeros_without_memory_are_brought_into_memory():
    x = leaf(2, 3)
    nothing = torch.autograd.grad(x.sgn(), x, torch.ones(2, 3))[0]
    assert _private.memory_of(nothing) == 0 != _private.memory_of(x)
    assert _private.in_memory(x) is x
    assert _private.memory_of(_private.in_memory(nothing)) != 0
    assert torch.equal(_private.in_memory(nothing), torch.zeros(2, 3))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 4.0])])
@pytest.mark.parametrize("tail", [(), (2,), (2, 3)])
def test_a_mean_cross_entropy_tells_its_divisor_and_what_it_ignores(tail, weight):
    x, target = leaf(4, 3, *tail), torch.arange(4 * math.prod(tail)).remainder(3).view(4, *tail)
    for ignore_index in (-100, 1):
        node = F.cross_entropy(x, target, weight, ignore_index=ignore_index).grad_fn
        total, targets, ignored = _private.mean_is_over(node)
        counts = torch.ones(3) if weight is None else weight
        assert total == float(torch.where(target == ignore_index, 0, counts[target]).sum())
        assert torch.equal(targets.reshape(target.shape), target)
        assert ignored == ignore_index


def test_other_losses_have_no_divisor_that_depends_on_targets():
    x, target = leaf(4, 3), torch.tensor([0, 1, 2, 0])
    assert _private.mean_is_over(F.cross_entropy(x, target, reduction="sum").grad_fn) is None
    assert _private.mean_is_over(F.cross_entropy(x, target, reduction="none").grad_fn) is None
    assert _private.mean_is_over(F.mse_loss(x, torch.zeros(4, 3)).grad_fn) is None
    assert _private.mean_is_over(x.mean().grad_fn) is None


def test_a_freed_graph_has_no_divisor():
    loss = F.cross_entropy(leaf(4, 3), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert _private.mean_is_over(loss.grad_fn) is None


def test_calls_under_way_are_counted():
    class Outer(nn.Module):
        def forward(self, depth):
            return self(depth - 1) if depth else _private.calls_under_way(self)

    assert Outer()(2) == 3
    assert _private.calls_under_way(Outer()) == 0


def test_steps_under_way_are_counted():
    class Base(torch.optim.SGD):
        def step(self):
            found.append((_private.steps_under_way(self), _private.steps_under_way(other)))
            elsewhere = threading.Thread(target=count, args=(self, threading.get_ident()))
            elsewhere.start()
            elsewhere.join()

    class Derived(Base):
        def step(self):
            super().step()
            Base.step(other)

    def count(optimizer, thread):
        seen.append((_private.steps_under_way(optimizer, thread), _private.steps_under_way(optimizer)))

    found, seen = [], []
    other = Base([torch.zeros(1)])  # torch hooks into the step of a class when it is first used
    one = Derived([torch.zeros(1)])
    assert _private.steps_under_way(one) == 0
    one.step()
    assert found == [(2, 0), (1, 1)]
    assert seen == [(2, 0), (1, 0)]
    assert not _private.steps_under_way(one, -1)  # a thread that is over


def test_global_forward_hooks_are_noticed():
    assert not _private.global_forward_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert _private.global_forward_hooks()
    handle.remove()
    for tracker in (ModuleTracker(), ModTracker()):
        with tracker:
            assert len(nn.modules.module._global_forward_hooks) == 1
            assert not _private.global_forward_hooks()


def test_gradient_hooks_are_listed_in_their_order():
    x = torch.ones(1, requires_grad=True)
    first, second = (x.register_hook(lambda g, k=k: g * k) for k in (2, 3))
    hooks = _private.gradient_hooks(x)
    assert list(hooks) == [first.id, second.id]
    hooks[first.id] = hooks.pop(first.id)
    order = []
    x.register_hook(lambda g: order.append(float(g)))
    (x * 1).backward()
    assert order == [6.0]


def test_hooks_that_wait_for_a_gradient_are_known():
    x = torch.ones(1, requires_grad=True)
    assert not _private.hooks_after_gradient(x)
    handle = x.register_post_accumulate_grad_hook(lambda x: None)
    assert list(_private.hooks_after_gradient(x)) == [handle.id]
    handle.remove()
    assert not _private.hooks_after_gradient(x)


def test_the_whole_base_of_a_view():
    base = leaf(2, 3) * 2
    assert _private.whole_base(base.view(3, 2)) is base
    assert _private.whole_base(base) is base
    part = base[:1]
    assert _private.whole_base(part) is part


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.permute(2, 0, 1),
        lambda base: base.transpose(0, 2),
        lambda base: base.view(6, 4).t(),
        lambda base: base.transpose(0, 1).unsqueeze(0),
        lambda base: base.unflatten(2, (2, 2)).movedim(3, 0),
    ],
)
def test_the_whole_base_of_a_view_in_another_order(view):
    base = leaf(2, 3, 4) * 2
    assert _private.whole_base(view(base)) is base


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[:, :2].transpose(0, 1),
        lambda base: base[..., ::2],
        lambda base: base[:1].expand(2, 3, 4),  # as many entries as the base
        lambda base: base.as_strided((2, 3, 4), (0, 4, 1)),
        lambda base: base.detach(),
        lambda base: base.clone(),
    ],
)
def test_the_whole_base_of_a_view_of_a_part_is_the_view(view):
    t = view(leaf(2, 3, 4) * 2)
    assert _private.whole_base(t) is t


def test_the_whole_base_of_a_view_of_a_leaf_is_the_view():
    """A leaf has no place in the graph of its own to hang a tap on."""
    view = leaf(2, 3).view(6)
    assert _private.whole_base(view) is view


def test_what_a_module_returns_may_be_a_view_of_what_it_computed():
    out = nn.Linear(3, 4)(torch.ones(2, 5, 3))
    base = _private.whole_base(out)
    assert base.numel() == out.numel()
    assert base.data_ptr() == out.data_ptr()
    assert base.grad_fn is not None


@pytest.mark.parametrize(
    ("t", "order"),
    [
        (torch.empty(2, 3, 4), [0, 1, 2]),
        (torch.empty(2, 3, 4).permute(2, 0, 1), [1, 2, 0]),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), [0, 2, 3, 1]),
        (torch.empty(2, 1, 4).transpose(0, 1), [1, 0, 2]),
        (torch.empty(()), []),
        (torch.empty(2, 3)[:, :2], None),
        (torch.empty(1, 3).expand(2, 3), None),
        (torch.empty(6).as_strided((2, 3), (2, 1)), None),
    ],
)
def test_the_order_of_axes_in_memory(t, order):
    found = _private.memory_order(t)
    if order is None:
        assert found is None
    else:
        assert [axis for axis in found if t.shape[axis] != 1] == [axis for axis in order if t.shape[axis] != 1]
        assert t.permute(found).is_contiguous()


def test_our_hook_is_brought_to_the_front():
    class Hook:
        def __call__(self, module, args, output):
            seen.append("ours")

    module, seen = nn.Linear(1, 1), []
    module.register_forward_hook(Hook())
    module.register_forward_hook(lambda *_: seen.append("other"), prepend=True)
    _private.run_first(module, Hook)
    module(torch.ones(1, 1))
    assert seen == ["ours", "other"]


def test_forward_hooks_are_silenced_and_come_back():
    module, seen = nn.Linear(1, 1), []
    module.register_forward_hook(lambda *_: seen.append(1))
    with _private.without_forward_hooks(module):
        module(torch.ones(1, 1))
    assert not seen
    module(torch.ones(1, 1))
    assert seen == [1]


def test_a_backward_under_way_is_noticed():
    seen = []
    x = leaf(2)
    y = x.sin()
    y.register_hook(lambda g: seen.append(_private.repeats_forward()))
    assert not _private.repeats_forward()
    y.sum().backward()
    assert seen == [True]
    assert not _private.repeats_forward()


@pytest.mark.parametrize("fails", [False, True])
def test_a_part_that_a_checkpoint_repeats_is_noticed(fails):
    seen = []

    def part(x):
        seen.append(_private.repeats_forward())
        if fails and len(seen) > 1:
            raise MemoryError
        return x.sin().cos()

    loss = checkpoint(part, leaf(2), use_reentrant=False).sum()
    if fails:
        with pytest.raises(MemoryError):
            loss.backward()
    else:
        loss.backward()
    assert seen == [False, True]
    assert not _private.repeats_forward()


def test_a_backward_in_another_thread_is_not_ours():
    """As of a forward that runs beside a backward."""
    seen = []
    y = leaf(2).sin()

    def other(g):
        thread = threading.Thread(target=lambda: seen.append(_private.repeats_forward()))
        thread.start()
        thread.join()

    y.register_hook(other)
    y.sum().backward()
    assert seen == [False]


class Noting(TorchFunctionMode):
    """Notes the functions that pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_function_modes_are_listed_outermost_first():
    first, second = Noting(), Noting()
    assert not _private.function_modes()
    with first, second:
        assert _private.function_modes() == [first, second]
        threads = []
        thread = threading.Thread(target=lambda: threads.append(_private.function_modes()))
        thread.start()
        thread.join()
        assert threads == [[]]
    assert not _private.function_modes()


def test_modes_are_given_all_arguments():
    """If the first of these holds no more, torch hands the weight on itself, and the function can go."""
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (F.l1_loss, F.mse_loss):
                seen.append((kwargs or {}, _private.whole_arguments(func, kwargs or {})))
            return func(*args, **(kwargs or {}))

    x, weight = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    with Mode():
        for function in (F.l1_loss, F.mse_loss):
            function(x, -x, weight=weight)
            function(x, -x, None, None, "sum")
    assert [("weight" in given, whole.get("weight") is weight) for given, whole in seen] == [
        (False, True),
        (False, False),
        (True, True),
        (True, False),
    ]
    assert all(whole["reduction"] == given["reduction"] for given, whole in seen)


def test_a_mode_can_be_taken_off_by_others():
    """As after an interrupt: the innermost one ends without its own ``with``."""
    first, second = Noting(), Noting()
    with first:
        second.__enter__()
        _private.function_modes()[-1].__exit__(None, None, None)
        assert _private.function_modes() == [first]
    assert not _private.function_modes()


def test_a_mode_does_not_see_what_it_calls_itself():
    with Noting() as outer, Noting() as inner:
        torch.ones(1)
    assert len(outer.seen) == len(inner.seen) == 1


def test_parts_of_a_python_function_are_seen_without_its_own_dispatch():
    """Of the one function that is followed in parts."""
    torch.manual_seed(0)
    function, x = F.multi_head_attention_forward, torch.randn(3, 2, 8)
    settings = {
        "embed_dim_to_check": 8, "num_heads": 2, "in_proj_weight": torch.randn(24, 8), "in_proj_bias": torch.randn(24),
        "bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": torch.randn(8, 8),
        "out_proj_bias": torch.randn(8), "need_weights": False,
    }  # fmt: skip
    with Noting() as whole:
        wanted = function(x, x, x, **settings)[0]
    with Noting() as parts:
        found = _private.without_dispatch(function)(x, x, x, **settings)[0]
    assert whole.seen == [function]
    assert function not in parts.seen
    assert {F.linear, F.scaled_dot_product_attention} <= set(parts.seen)
    assert torch.equal(found, wanted)
    assert _private.without_dispatch(function) is _private.without_dispatch(function)
    parameters = [inspect.signature(f).parameters for f in (_private.without_dispatch(function), function)]
    assert len({tuple((p.name, p.kind, p.default) for p in each.values()) for each in parameters}) == 1


def followed(part, x, times=1):
    """Run a part in a checkpoint, asked ``times`` in its forward to follow it; returns what happened."""
    seen = []

    @contextmanager
    def around():
        seen.append("enter")
        try:
            yield
        finally:
            seen.append("leave")

    def inside(x):
        if _private.repeats_forward():
            seen.append("again")
        else:
            seen.extend(_private.follow_recomputation(around) for _ in range(times))
        return part(x)

    checkpoint(inside, x, use_reentrant=False).sum().backward()
    return seen


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_the_recomputation_of_a_checkpoint_runs_in_a_context(early_stop, times):
    x, y = leaf(3), leaf(3)
    with set_checkpoint_early_stop(early_stop):
        seen = followed(lambda x: x.sin().cos() * x, x, times)
    assert seen == [True] * times + ["enter", "again", "leave"]
    (y.sin().cos() * y).sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_a_checkpoint_in_a_checkpoint_is_followed():
    """The outer one by itself, as its recomputation runs the inner one again."""
    seen = followed(lambda x: checkpoint(lambda x: x.sin().cos(), x, use_reentrant=False).sin(), leaf(3))
    assert seen[:2] == [True, "enter"]
    assert seen.count("enter") == seen.count("leave") == seen.count("again")


def test_no_checkpoint_is_under_way():
    """Nor one that keeps its frame elsewhere, nor other hooks on saved tensors."""

    def never():
        raise AssertionError("nothing is to be repeated")

    assert not _private.follow_recomputation(never)
    with torch.autograd.graph.save_on_cpu():
        assert not _private.follow_recomputation(never)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not _private.follow_recomputation(never)
    seen = []

    def reentrant(x):
        seen.append(_private.follow_recomputation(never))
        return x.sin()

    checkpoint(reentrant, leaf(2), use_reentrant=True)
    assert seen == [False]
    checkpoint(torch.sin, leaf(2), use_reentrant=False)
    assert not _private.follow_recomputation(never)


@pytest.mark.parametrize(
    "register",
    [
        lambda module, hook: module.register_full_backward_hook(hook),
        lambda module, hook: module.register_full_backward_pre_hook(hook),
        lambda module, hook: nn.modules.module.register_module_full_backward_hook(hook),
        lambda module, hook: nn.modules.module.register_module_full_backward_pre_hook(hook),
    ],
)
def test_backward_hooks_and_their_nodes_are_noticed(register):
    module, x = nn.Linear(2, 2), leaf(1, 2)
    assert not _private.has_backward_hooks(module)
    plain = module(x)
    handle = register(module, lambda *_: None)
    try:
        assert _private.has_backward_hooks(module)
        hooked = module(x)
    finally:
        handle.remove()
    assert not _private.has_backward_hooks(module)
    assert not _private.handed_through(plain.grad_fn)
    below, nodes = [hooked.grad_fn], []
    while below:
        node = below.pop()
        nodes.append(node)
        below.extend(after for after, _ in node.next_functions if after is not None)
    assert any(map(_private.handed_through, nodes))
    assert not all(map(_private.handed_through, nodes))


def test_state_of_a_module_is_put_back():
    module = nn.Linear(1, 1)
    with _private.kept_state(module):
        module.added, module.in_features = 1, 5
    assert not hasattr(module, "added")
    assert module.in_features == 1


def test_views_of_a_leaf_are_known():
    w = leaf(3, 4)
    assert _private.shown_by(w.t(), w)
    assert _private.shown_by(w[1:], w)
    assert not _private.shown_by(w * 1, w)
    assert not _private.shown_by(w.t(), leaf(3, 4))
    assert not _private.shown_by(leaf(3, 4).t(), w)
    turned = torch.ones(4, 3).t().requires_grad_()
    assert not _private.shown_by(turned[1:], turned)  # it has no gaps, but lies in another order
    c = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    assert _private.shown_by(c[1:], c)
    assert not _private.shown_by(c.conj(), c)
    assert not _private.shown_by(c.real, c)
    assert not _private.shown_by(c.conj().imag, c)
    shown = w[1:]
    w.data = torch.ones(3, 4)
    assert not _private.shown_by(shown, w)


def test_statistics_that_a_norm_layer_has_computed():
    x = torch.randn(3, 4, 5, requires_grad=True)
    mean, rstd = _private.norm_statistics(F.group_norm(x, 2, torch.ones(4)))
    parts = x.detach().view(3, 2, -1)
    assert torch.allclose(mean, parts.mean(2))
    assert torch.allclose(rstd, (parts.var(2, correction=0) + 1e-5).rsqrt())
    mean, rstd = _private.norm_statistics(F.layer_norm(x, (5,), torch.ones(5)))
    assert torch.allclose(mean, x.detach().mean(2, keepdim=True))
    assert torch.allclose(rstd, (x.detach().var(2, correction=0, keepdim=True) + 1e-5).rsqrt())
    assert _private.norm_statistics(x * 2) is None
    assert _private.norm_statistics(x.detach()) is None
    with torch.autograd.graph.save_on_cpu():
        assert _private.norm_statistics(F.layer_norm(x, (5,))) is None


def test_what_could_be_parametrized():
    module = nn.Linear(2, 2)
    assert not _private.may_be_parametrized(module)
    nn.utils.parametrizations.spectral_norm(module)
    assert nn.utils.parametrize.is_parametrized(module)
    assert _private.may_be_parametrized(module)


def test_what_a_node_has_looked_up():
    w, ids = leaf(5, 2), torch.tensor([4, 0, 4])
    none = [
        w[ids - 1], w[:, ids[1:2]], w[torch.arange(5) > 1], w[ids, ids % 2], w * 1, w[1:],
        w.index_select(1, ids[1:2]), F.embedding(ids, w, scale_grad_by_freq=True), torch.embedding(w, ids, -2),
    ]  # fmt: skip
    for number, t in enumerate(none):
        assert _private.looked_up(t.grad_fn) is None, number
    for t, padding in [
        (F.embedding(ids, w), -1), (F.embedding(ids, w, 4), 4), (F.embedding(ids, w, -1), 4),
        (F.embedding(ids.int(), w), -1),
        (torch.embedding(w, ids), -1), (F.embedding(ids, w, sparse=True), -1),
        (w[ids], -1), (w.index_select(0, ids), -1),
    ]:  # fmt: skip
        found, without = _private.looked_up(t.grad_fn)
        assert found.equal(ids)
        assert found.dtype == torch.long
        assert without == padding


def test_what_was_looked_up_is_not_asked_of_hooks_or_of_a_graph_that_is_gone():
    w, ids, nodes = leaf(5, 2), torch.tensor([4, 0]), []

    def looked_up(x):
        e = F.embedding(ids, w)
        nodes.append(e.grad_fn)
        return (x * e).sin()

    kept = checkpoint(looked_up, leaf(2, 2), use_reentrant=False)
    assert _private.looked_up(nodes[0]) is None
    kept.sum().backward()  # what may be asked for only once is still there
    with torch.autograd.graph.save_on_cpu():
        assert _private.looked_up(F.embedding(ids, w).grad_fn) is None
    gone = F.embedding(ids, w)
    gone.sum().backward()
    assert _private.looked_up(gone.grad_fn) is None
    written = ids.clone()
    e = F.embedding(written, w)
    written.zero_()
    assert _private.looked_up(e.grad_fn) is None


class Counting(TorchFunctionMode):
    """Counts what passes."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_function_modes_can_be_left_out_and_brought_back():
    t = leaf(2)
    with Counting() as mode:
        with _private.undispatched():
            _ = t + 1, t.requires_grad
            assert mode.count == 0
            with _private.dispatched():
                _ = t + 1
            assert mode.count == 1
            _ = t + 1
            assert mode.count == 1
        _ = t + 1
        assert mode.count == 2
    assert _private.function_modes() == []


def test_hooks_that_save_tensors_otherwise_are_noticed():
    assert not _private.saves_otherwise()
    with torch.autograd.graph.save_on_cpu():
        assert _private.saves_otherwise()
    seen = []
    checkpoint(lambda x: seen.append(_private.saves_otherwise()) or x * 2, leaf(2), use_reentrant=False)
    assert seen == [True]
    assert not _private.saves_otherwise()


def test_the_backward_that_is_under_way_has_a_number():
    seen = []
    x = leaf(2)
    y = x * 2
    y.register_hook(lambda g: seen.append((_private.graph_task(), _private.repeats_forward())))
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert [inside for _, inside in seen] == [True, True]
    assert len({number for number, _ in seen} | {-1}) == 3
    assert _private.graph_task() == -1


def test_what_a_backward_wants_is_known_before():
    seen = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, g):
            a, b = ctx.saved_tensors
            seen.append([_private.will_be_executed(node) for node, _ in ctx.next_functions])
            return g * b, g * a, None

    first, b = leaf(2), leaf(2)
    a = first * 2
    out = Product.apply(a, b, torch.ones(1)).sum()
    out.backward(retain_graph=True)
    out.backward(retain_graph=True, inputs=[first])
    out.backward(retain_graph=True, inputs=[b])
    torch.autograd.grad(out, a, retain_graph=True)
    torch.autograd.grad(out, b)
    assert seen == [
        [True, True, False],
        [True, False, False],
        [False, True, False],
        [True, False, False],
        [False, True, False],
    ]


def test_transforms_are_noticed_whatever_their_tensors_are():
    seen = []
    torch.func.vmap(lambda x: seen.append(_private.transforms_active()) or x)(torch.ones(2))
    assert seen == [True]
    assert not _private.transforms_active()


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_parameters_in_shards_are_found_with_what_is_computed_with(process_group):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert _private.shards(model) == {}
    fully_shard(model[1])
    fully_shard(model)
    held = list(model.parameters())
    assert {key: (id(whole), id(own)) for key, (whole, own) in _private.shards(model).items()} == {
        id(p): (id(p), id(p)) for p in held
    }
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda layer, *_: seen.extend(layer.parameters()), prepend=True)
    model(torch.ones(1, 2))
    found = _private.shards(model)
    assert all(whole is not own for whole, own in zip(seen, held, strict=True))
    for whole, own in zip(seen, held, strict=True):
        assert all(a is b for a, b in zip(found[id(whole)], (whole, own), strict=True))
        assert all(a is b for a, b in zip(found[id(own)], (whole, own), strict=True))


@pytest.mark.filterwarnings("ignore")  # torch recommends its successor
def test_parameters_laid_out_in_one_are_recognised(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    (p,) = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")).parameters()
    assert _private.laid_out_in_one(p)
    assert not _private.laid_out_in_one(nn.Parameter(torch.ones(2)))


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_nodes_of_torch_that_are_named_by_their_kind():
    z = torch.randn(4, 3, requires_grad=True)
    written = z * 1
    written[0] = z[1]
    others = [z.exp(), z.mean().log(), torch.nn.functional.mse_loss(z, z.detach())]
    assert all(_private.is_named_by_kind(t.grad_fn) for t in others)
    assert len({type(t.grad_fn) for t in others}) == 3
    assert not _private.is_named_by_kind(written.grad_fn)
    assert not _private.is_named_by_kind(_Twice.apply(z).grad_fn)
    assert not _private.is_named_by_kind(z.exp().grad_fn.next_functions[0][0])


def test_what_graph_nodes_tell_of_what_they_gave():
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    parts = z.split(2)
    assert [_private.output_shape(parts[0].grad_fn, i) for i in range(3)] == [torch.Size([2, 3])] * 2 + [None]
    ones = _private.ones_for(torch.autograd.graph.GradientEdge(parts[1].grad_fn, 1))
    assert (ones.shape, ones.dtype) == (torch.Size([2, 3]), torch.float64)
    assert _private.output_shape(z.square().mean().grad_fn, 0) == torch.Size([])
    assert _private.saved((z.mean() ** 3).grad_fn, "exponent") == 3
    assert _private.saved(z.mean().grad_fn, "exponent") is None
    loss = (z / z.detach()).sum()
    divided = loss.grad_fn.next_functions[0][0]
    assert torch.equal(_private.saved(divided, "other"), z.detach())
    loss.backward()
    assert _private.saved(divided, "other") is None


@pytest.mark.parametrize("number", [4, 4.5, -7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_numbers_of_python_and_tensors_of_one_entry_are_told_apart(number, dtype):
    loss = torch.ones((), dtype=dtype, requires_grad=True)
    assert _private.is_python_number(_private.saved((loss / number).grad_fn, "other"))
    for tensor in (torch.tensor(number), torch.tensor(float(number)), torch.tensor(float(number), dtype=dtype)):
        assert not _private.is_python_number(_private.saved((loss / tensor).grad_fn, "other"))
    assert not _private.is_python_number(torch.ones(1))


@pytest.mark.parametrize("number", [3, 0.5, torch.tensor(3), torch.tensor([0.5])])
def test_value_of(number):
    """Also where a dispatch mode looks on, which is given Python numbers in the place of tensors that hold them."""
    loss = torch.ones(2, requires_grad=True).sum()
    for node in ((loss * number).grad_fn, (loss / number).grad_fn):
        scalar = _private.saved(node, "other")
        with FlopCounterMode(display=False):
            assert _private.value_of(scalar) == float(number)


def test_plain_sums_of_losses_are_told_from_weighted_ones():
    z, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    losses = F.cross_entropy(z, y, reduction="none")
    assert _private.sums_losses(losses.sum().grad_fn)
    assert _private.sums_losses(F.mse_loss(z, torch.zeros(4, 3), reduction="none").sum().grad_fn)
    assert not _private.sums_losses((losses / 4).sum().grad_fn)
    assert not _private.sums_losses(losses.mean().grad_fn)
    assert not _private.sums_losses(z.sum().grad_fn)


def test_a_hook_is_brought_behind_all_others():
    class Hook:
        def __call__(self, module, args):
            order.append("ours")

    order = []
    module = nn.Linear(1, 1)
    assert _private.runs_last(module, Hook)
    module.register_forward_pre_hook(Hook())
    assert _private.runs_last(module, Hook)
    module.register_forward_pre_hook(lambda module, args: order.append("theirs"))
    assert not _private.runs_last(module, Hook)
    assert _private.runs_last(module, Hook)
    module(torch.ones(1, 1))
    assert order == ["theirs", "ours"]


@pytest.mark.parametrize("what", ["matmul", "conv", "rnn"])
@pytest.mark.parametrize("library", ["cuda", "mkldnn"])
def test_float32_precision_is_what_torch_backends_tells(library, what):
    module = {"cuda": torch.backends.cudnn, "mkldnn": torch.backends.mkldnn}[library]
    shown = torch.backends.cuda.matmul if (library, what) == ("cuda", "matmul") else getattr(module, what)
    before = _private.float32_precision(library, what)
    try:
        for value in ("tf32", "ieee"):
            _private.set_float32_precision(library, what, value)
            assert _private.float32_precision(library, what) == shown.fp32_precision == value
    finally:
        _private.set_float32_precision(library, what, before)


def test_several_sums_at_once():
    left, right = [torch.ones(2, 3), torch.arange(4.0)], [torch.full((2, 3), 2.0), torch.ones(4)]
    found = _private.added_up(left, right)
    assert [t.tolist() for t in found] == [(a + b).tolist() for a, b in zip(left, right, strict=True)]
    assert left[0].eq(1).all()
    assert _private.added_up([], []) == []
