"""Notice when a private name of torch, used in perexample/_private.py, changes its meaning."""

import pytest
import torch
from torch import nn

from perexample import _private


def test_functorch_wrappers_are_recognised():
    seen = []
    torch.func.vmap(lambda x: seen.append(_private.inside_functorch(x)) or x)(torch.ones(2))
    assert seen == [True]
    assert not _private.inside_functorch(torch.ones(2))


def test_version_counts_writes():
    x = torch.ones(2)
    before = _private.version(x)
    x.add_(1)
    assert _private.version(x) == before + 1


def test_own_parameters_keeps_one_parameter_under_two_names():
    module = nn.Module()
    module.a = module.b = nn.Parameter(torch.ones(1))
    assert list(_private.own_parameters(module)) == ["a", "b"]


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
    _private.remove_hooks(module, (Hook,))
    assert not _private.has_hook(module, Hook)
    module(torch.ones(1, 1))
    assert not any(getattr(module, name) for name in _private._HOOK_TABLES)


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


def test_calls_under_way_are_counted():
    class Outer(nn.Module):
        def forward(self, depth):
            return self(depth - 1) if depth else _private.calls_under_way(self)

    assert Outer()(2) == 3
    assert _private.calls_under_way(Outer()) == 0


def test_global_forward_hooks_are_noticed():
    assert not _private.global_forward_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert _private.global_forward_hooks()
    handle.remove()


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


def test_the_whole_base_of_a_view():
    base = torch.ones(2, 3, requires_grad=True) * 2
    assert _private.whole_base(base.view(3, 2)) is base
    assert _private.whole_base(base) is base
    part = base[:1]
    assert _private.whole_base(part) is part


def test_state_of_a_module_is_put_back():
    module = nn.Linear(1, 1)
    with _private.kept_state(module):
        module.added, module.in_features = 1, 5
    assert not hasattr(module, "added")
    assert module.in_features == 1
