"""What people do around a model: checkpointing, autocast, LoRA, compile, hooks, copies, interrupts.

The models here use parameters bare and functionally beside modules; test_faults.py does much of it with modules only.
"""

import copy
import gc
import pickle
import re
import subprocess
import sys
import threading
from collections import Counter, namedtuple
from contextlib import nullcontext
from dataclasses import dataclass

import harness
import pytest
import reference
import torch
import torch.nn.functional as F
from harness import Net, Problem, assert_exact, assert_exact_or_refused, assert_near, jittered, losses, par, rand
from naive import assert_bitwise, saved_whole
from torch import Tensor, distributions, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from perexample import (
    DP_SGD,
    BatchAxisError,
    CrossExampleError,
    NonFiniteExampleWarning,
    PerExampleError,
    check,
    extend,
    perex,
    plan,
    unextend,
)
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

N, T, D = 4, 3, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block with a bare gain, a functional weight and a module."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.gain, self.weight, self.linear = par(width), par(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.linear(F.gelu(x @ self.weight))


def kept(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False)


class Bare(nn.Module):
    """A class token, positions, blocks and a functional head; pickles, as all it holds is named."""

    def __init__(self, dropout: float = 0.0, blocks: int = 2, checkpointed: bool = False) -> None:
        super().__init__()
        self.token, self.places, self.head = par(1, 1, D), par(1, 9, D), par(5, D)
        self.blocks, self.dropout = nn.ModuleList(Block() for _ in range(blocks)), dropout
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places[:, : x.shape[1] + 1]
        h = F.dropout(h, self.dropout, self.training)
        for block in self.blocks:
            h = F.dropout(kept(block, h) if self.checkpointed else block(h), self.dropout, self.training)
        return F.linear(h[:, 0], self.head)


def bare(**options) -> Bare:
    return jittered(Bare(**options))


def batch(n: int = N) -> Tensor:
    return rand(n, T, D)


def grad_batch(model, *inputs, grad: bool = False, forward=None):
    """The field of one backward, by name."""
    extend(model)
    with perex(BatchGrad(), grad=grad):
        losses((forward or model)(*inputs)).mean().backward()
    return fields(model)


def fields(model, name: str = "grad_batch"):
    return {key: getattr(p, name) for key, p in harness.trainable(model).items()}


def wanted(model, *inputs, **settings):
    return harness.validated(Problem(model, inputs, **settings))


# ----------------------------------------------------------------------------------------------- checkpointing


def _checkpointed_nested(m, x):
    return kept(lambda h: m.b(kept(m.a, h * m.p)) + m.q, x)


def _checkpointed_in_a_loop(m, x):
    for _ in range(3):
        x = kept(lambda h: (m.a(h) * m.p).tanh(), x)
    return x


def _checkpointed_with_extras(m, x):
    """A computed weight goes in as an argument, and a tuple comes out."""
    a, b = kept(lambda h, w: (h @ w, h * m.p), x, m.q.view(D, 1) * m.p)
    return (a + b).tanh()


CHECKPOINTED = {
    "module": lambda m, x: m.b(kept(m.a, x)),
    "lambda": lambda m, x: kept(lambda h: (h * m.p).tanh() @ m.a.weight + m.q, m.b(x)),
    "lambda-first": lambda m, x: kept(lambda h: (h * m.p).tanh() + m.q, x) @ m.p,
    "method": lambda m, x: kept(m.a.forward, x * m.p),
    "nested": _checkpointed_nested,
    "loop": _checkpointed_in_a_loop,
    "arguments": _checkpointed_with_extras,
    "sequential": lambda m, x: checkpoint_sequential(m.s, 2, x, use_reentrant=False) * m.p,
    "all": lambda m, x: kept(lambda h: m.b(m.a(h) + m.q), x),
}


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing(name, outside):
    model = Net(CHECKPOINTED[name], a=nn.Linear(D, D), b=Block(), s=nn.Sequential(Block(), Block()), p=par(D), q=par(D))
    model, x = jittered(model), batch()
    if not outside:
        assert_exact(model, (x,))
        return
    expected = wanted(model, x)
    loss = losses(extend(model)(x)).mean()
    with perex(BatchGrad(), grad=False):
        loss.backward()
    assert_near(fields(model), expected, harness.TOLERANCE, "grad_batch")


def test_checkpointing_with_dropout():
    model = Net(
        lambda m, x: m.b(kept(lambda h: F.dropout(m.a(h) * m.p, 0.4), x)), a=nn.Linear(D, D), b=Block(), p=par(D)
    )
    assert_sums_to_the_gradient(jittered(model), batch())


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_checkpointing_of_a_hugging_face_model(attention):
    model = tiny_gpt2(attn_implementation=attention).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_exact(model, (words(),), loss=logits)


class Alive(TorchDispatchMode):
    """Notes every storage that a computation allocates, and can tell how many bytes of them are still held."""

    def __init__(self, model):
        super().__init__()
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.own:
                storage = t.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output

    def bytes(self):
        gc.collect()
        return sum(size for ref, size in self.storages.values() if not ref.expired())


def held(function, extended: bool) -> int:
    """Bytes held after a forward of four blocks of width 32, each called by ``function``."""
    model = Net(lambda m, x: _through(m.blocks, x, function), blocks=nn.ModuleList(Block(32) for _ in range(4)))
    model = jittered(model)
    if extended:
        extend(model)
        grad_of_first_call(model)
    with Alive(model) as alive:
        output = model(rand(64, T, 32))
        count = alive.bytes()
    assert output.requires_grad
    return count


def grad_of_first_call(model):
    """Let the library find out what it needs to know once."""
    with perex(BatchL2Grad()):
        model(rand(64, T, 32)).square().mean().backward()


def _through(blocks, x, function):
    for block in blocks:
        x = function(block, x)
    return x


@pytest.mark.parametrize("extended", [False, True], ids=["plain", "extended"])
def test_checkpointing_saves_memory(extended):
    assert held(kept, extended) < 0.5 * held(lambda block, x: block(x), extended)


def test_an_extended_model_holds_little_more_than_a_plain_one():
    plain = held(lambda block, x: block(x), extended=False)
    assert held(lambda block, x: block(x), extended=True) < 1.3 * plain


def test_nothing_is_held_after_backward():
    model = extend(bare())
    with Alive(model) as alive:
        with perex(BatchL2Grad(), grad=False):
            losses(model(batch(32))).mean().backward()
        fields_bytes = sum(p.batch_l2.nbytes for p in model.parameters())
        assert alive.bytes() <= 2 * fields_bytes + 1024


# ---------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_autocast(checkpointed):
    """Against float64 within what bfloat16 can do, against the gradient of the same run closely."""
    model, x = bare(checkpointed=checkpointed).float(), batch().float()
    exact = wanted(copy.deepcopy(model).double(), x.double())
    bound = reference.bound_near_median(exact, N)
    extend(model)
    with perex(BatchGrad(), BatchL2Grad(), ClippedGrad(bound)):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        losses(output.float()).mean().backward()
    for name in ("grad_batch", "batch_l2", "clipped_sum"):
        assert {value.dtype for value in fields(model, name).values()} <= {torch.float32, torch.float64}, name
    assert_loosely(fields(model), exact, 5e-2)
    mean = {name: rows.mean(0) for name, rows in fields(model).items()}
    assert_loosely(mean, {name: p.grad for name, p in model.named_parameters()}, 1e-2)
    assert_loosely(fields(model, "batch_l2"), {k: reference.batch_l2(v) for k, v in fields(model).items()}, 1e-4)
    norm = torch.cat([value.double().flatten() for value in fields(model, "clipped_sum").values()]).norm()
    assert norm <= N * bound * (1 + 1e-6)


def assert_loosely(found, expected, tolerance):
    """Relative to each parameter's largest entry, but to a tenth of the largest of all where it is smaller."""
    floor = harness.largest(expected) / 10
    for name, value in expected.items():
        scale = max(value.abs().max().item(), floor)
        assert (found[name].double() - value.double()).abs().max() <= tolerance * scale, name


# ---------------------------------------------------------------------------------------- steps of a training


def test_gradient_accumulation():
    model, x = bare(), batch(6)
    expected = wanted(model, x)
    bound = reference.bound_near_median(expected, 6)
    clipping = ClippedGrad(bound)
    extend(model)
    for part in x.split([1, 2, 3]):
        with perex(clipping, grad=False):
            losses(model(part)).mean().backward()
    assert_near(fields(model, "clipped_sum"), reference.clipped_sum(expected, 6, bound), 1e-10, "clipped_sum")


def test_plain_gradients_are_accumulated_too():
    model, x = bare(), batch(6)
    plain = copy.deepcopy(model)
    extend(model)
    for part in x.split([2, 4]):
        losses(plain(part)).mean().backward()
        with perex(BatchGrad()):
            losses(model(part)).mean().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert_near({name: p.grad for name, p in model.named_parameters()}, expected, 1e-12, "p.grad")


def test_steps_of_dp_sgd_without_noise():
    model, bound = extend(bare()), 0.5
    clipping = ClippedGrad(bound)
    optimizer = DP_SGD(
        model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=0.0, expected_batch_size=N, momentum=0.0
    )
    for _ in range(3):
        x = batch()
        sums = reference.clipped_sum(wanted(copy.deepcopy(model), x), N, bound)
        expected = {name: p.detach() - 0.1 * sums[name] / N for name, p in model.named_parameters()}
        optimizer.zero_grad()
        with perex(clipping, grad=False):
            losses(model(x)).mean().backward()
        optimizer.step()
        assert_near({name: p.detach() for name, p in model.named_parameters()}, expected, 1e-10, "step")


def test_parameters_that_some_steps_do_not_use():
    def forward(m, x, both):
        h = m.a(x) * m.p
        return h + m.b(h) * m.q if both else h

    def model():
        return jittered(Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, D), p=par(D), q=par(D)))

    for order in ((True, False, True), (False, True)):
        m = model()
        for both in order:
            assert_exact(m, (batch(),), forward=lambda model, x, both=both: model(x, both))
            assert both or not m.q.grad_batch.any()


def test_freezing_and_unfreezing_between_steps():
    model, x = bare(), batch()
    for name in ("token", "places", "blocks.0.gain", "blocks.0.weight", "head"):
        p = model.get_parameter(name)
        p.requires_grad_(False)
        assert_exact(model, (x,))
        assert not hasattr(p, "grad_batch"), "a frozen parameter keeps no old field"
        p.requires_grad_(True)
        assert_exact(model, (x,))
    model.requires_grad_(False)
    model.token.requires_grad_(True)
    assert_exact(model, (x,))


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(inplace=True),
        nn.SiLU(inplace=True),
        F.relu_,
        torch.tanh_,
        lambda h: F.leaky_relu_(h, 0.1),
        lambda h: F.dropout(h, 0.0, inplace=True),
        lambda h: h.mul_(2).add_(0.1).relu_(),
    ],
    ids=["ReLU", "SiLU", "relu_", "tanh_", "leaky_relu_", "dropout_", "chain"],
)
def test_activations_in_place(activation):
    def forward(m, x):
        h = activation(m.a(x) + m.p)
        return activation(F.linear(h, m.w) * 1.0) + activation(m.a(h))

    assert_exact(jittered(Net(forward, a=nn.Linear(D, D), p=par(D), w=par(D, D))), (batch(),))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reductions(reduction):
    model, x = bare(), batch()
    expected = wanted(model, x)
    extend(model)
    with perex(BatchGrad(), loss_reduction=reduction):
        getattr(losses(model(x)), reduction)().backward()
    assert_near(fields(model), expected, 1e-10, "grad_batch")


def test_a_scaled_loss():
    model, x = bare(), batch()
    expected = wanted(model, x)
    extend(model)
    with perex(BatchGrad(), loss_scale=1024.0, grad=False):
        (losses(model(x)).mean() * 1024).backward()
    assert_near(fields(model), expected, 1e-10, "grad_batch")


def test_a_nan_example_contributes_nothing():
    model, x = bare(), batch()
    x[1] = float("nan")
    rest = x[[0, 2, 3]]
    expected = reference.clipped_sum(wanted(model, rest), 3, 0.5)
    clipping = ClippedGrad(0.5)
    extend(model)
    with perex(clipping, grad=False), pytest.warns(NonFiniteExampleWarning, match="had a NaN"):
        losses(model(x)).mean().backward()
    assert_near(fields(model, "clipped_sum"), expected, 1e-10, "clipped_sum")
    assert clipping.nonfinite == 1


def test_inputs_that_need_a_gradient():
    model, x = bare(), batch().requires_grad_()
    losses(model(x)).mean().backward()
    expected, x.grad = x.grad, None
    assert_exact(model, (x,))
    x.grad = None
    with perex(BatchGrad(), grad=False):
        losses(model(x)).mean().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-12)


def test_parameters_changed_before_the_backward():
    """Torch raises for a product whose factor was changed; so does the library, or it is exact."""
    model = extend(jittered(Net(lambda m, x: (m.a(x) * m.p).tanh() * m.p, a=nn.Linear(D, D), p=par(D))))
    loss = losses(model(batch())).mean()
    with torch.no_grad():
        model.p.mul_(2)
    with perex(BatchGrad()), pytest.raises(RuntimeError):
        loss.backward()


# -------------------------------------------------------------------------------------------------- randomness


def assert_sums_to_the_gradient(model, *inputs):
    """With random masks in play, the free oracle: the mean of the rows is the gradient, also that of a plain run."""
    torch.manual_seed(3)
    losses(model(*inputs)).mean().backward()
    plain = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    for grad in (True, False):
        model.zero_grad()
        torch.manual_seed(3)
        found = grad_batch(model, *inputs, grad=grad)
        assert_near({name: rows.mean(0) for name, rows in found.items()}, plain, 1e-9, f"mean, grad={grad}")


def _sdpa_with_dropout(m, x):
    bias = m.bias.expand(len(x), T, T)
    return F.scaled_dot_product_attention(m.a(x), x, x * m.p, attn_mask=bias, dropout_p=0.3)


RANDOM = {
    "dropout": lambda m, x: F.dropout(m.a(x) * m.p, 0.4) @ m.w,
    "dropout-of-the-parameter": lambda m, x: m.a(x) * F.dropout(m.p, 0.4) @ m.w,
    "dropout-of-the-weight": lambda m, x: F.linear(x, F.dropout(m.w, 0.4)) + m.a(x) * m.p,
    "noise-times-parameter": lambda m, x: m.a(x) + torch.randn_like(x) * m.p @ m.w,
    "shared-noise": lambda m, x: m.a(x) * (m.p + torch.randn(T, D, dtype=x.dtype)) @ m.w,
    "bernoulli-where": lambda m, x: torch.where(torch.rand_like(x) < 0.5, m.a(x), m.p) @ m.w,
    "sdpa": _sdpa_with_dropout,
    "stochastic-depth": lambda m, x: x + (torch.rand(len(x), 1, 1) < 0.5) * (m.a(x) * m.p) @ m.w,
    "reparametrised": lambda m, x: m.a(x) @ (m.w + torch.randn_like(m.w) * m.p.exp()),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations(name):
    model = Net(RANDOM[name], a=nn.Linear(D, D), p=par(D), w=par(D, D), bias=par(1, T, T))
    assert_sums_to_the_gradient(jittered(model), batch())


SAMPLED = {
    "laplace": lambda h: distributions.Laplace(h, torch.ones_like(h)),
    "exponential": lambda h: distributions.Exponential(h.exp()),
    "cauchy": lambda h: distributions.Cauchy(h, torch.ones_like(h)),
    "gamma": lambda h: distributions.Gamma(h.exp(), torch.ones_like(h)),
    "beta": lambda h: distributions.Beta(h.exp(), torch.ones_like(h)),
    "dirichlet": lambda h: distributions.Dirichlet(h.exp()),
    "student": lambda h: distributions.StudentT(3 + h.exp()),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_with_gradients(name):
    """Also of samplers that reject, which take more or fewer random numbers according to the data."""
    model = Net(lambda m, x: SAMPLED[name](m.a(x) * m.p).rsample() @ m.w, a=nn.Linear(D, D), p=par(D), w=par(D, D))
    assert_sums_to_the_gradient(jittered(model), batch())


COUNTED = {
    "poisson": lambda h: torch.poisson(h.exp()),
    "by name, with a generator": lambda h: torch.poisson(input=h.exp(), generator=torch.Generator().manual_seed(0)),
    "by place": lambda h: torch.poisson(h.exp(), torch.Generator().manual_seed(0)),
    "binomial": lambda h: distributions.Binomial(10, logits=h).sample(),
    "uninitialised": lambda h: h + h.new(len(h), T, D).zero_() + h.new(h.shape).fill_(1.0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_samples_without_gradients(name):
    model = Net(lambda m, x: m.a(COUNTED[name](x)) * m.p, a=nn.Linear(D, D), p=par(D))
    assert_sums_to_the_gradient(jittered(model), batch())


def test_a_sample_over_the_examples_is_refused():
    model = extend(
        Net(
            lambda m, x: m.a(x) * distributions.Dirichlet(x.exp().movedim(0, 2)).sample().movedim(2, 0),
            a=nn.Linear(D, D),
        )
    )
    with perex(BatchGrad()), pytest.raises(CrossExampleError, match=r"`sample_dirichlet`.* mixes examples"):
        model.double()(batch()).square().sum((1, 2)).mean().backward()


def test_a_tensor_made_of_data_is_refused():
    """What `new` makes of sizes depends on nothing, but of values it does."""
    model = extend(Net(lambda m, x: m.a(x + x.new(x.detach())), a=nn.Linear(D, D)))
    with perex(BatchGrad()), pytest.raises(BatchAxisError, match=r"`new`.* fills a tensor"):
        model(batch().float()).square().sum((1, 2)).mean().backward()


def test_dropout_in_training():
    assert_sums_to_the_gradient(bare(dropout=0.3), batch())


def test_dropout_in_transformers():
    layer = nn.TransformerEncoderLayer(D, 3, 7, dropout=0.3, batch_first=True)
    assert_sums_to_the_gradient(jittered(Net(lambda m, x: m.layer(x + m.p), layer=layer, p=par(T, D))), batch())


def test_the_random_state_is_left_as_a_plain_run_leaves_it():
    model, x = bare(dropout=0.3), batch()
    torch.manual_seed(3)
    losses(model(x)).mean().backward()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    grad_batch(model, x)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- other libraries


def tiny_gpt2(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=9, n_embd=12, n_layer=2, n_head=3, n_inner=7, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, use_cache=False, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return jittered(transformers.GPT2LMHeadModel(config))


def words(n: int = N) -> Tensor:
    return torch.randint(11, (n, 5))


def logits(output):
    return losses(output.logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2(attention):
    assert_exact(tiny_gpt2(attn_implementation=attention), (words(),), loss=logits)


LORA = {
    "lora": {},
    "scaled": {"use_rslora": True, "lora_alpha": 7},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("name", LORA)
def test_lora_of_linear_modules(name):
    peft = pytest.importorskip("peft")
    model = Net(lambda m, x: m.b(m.a(x).tanh() * m.p), a=nn.Linear(D, 7), b=nn.Linear(7, D), p=par(7)).double()
    config = peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False, **LORA[name])
    assert_exact(jittered(peft.get_peft_model(model, config)), (batch(),))


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", LORA)
def test_lora_of_gpt2(name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False, **LORA[name]
    )
    model = jittered(peft.get_peft_model(tiny_gpt2(), config))
    assert 0 < len(harness.trainable(model)) < len(list(model.parameters()))
    assert_exact(model, (words(),), forward=lambda m, ids: m(input_ids=ids), loss=logits)


def test_lora_with_modules_to_save_and_a_second_adapter():
    peft = pytest.importorskip("peft")
    model = Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(D, 7), b=nn.Linear(7, D)).double()
    config = peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert_exact(jittered(model), (batch(),))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_the_old_style():
    model = Net(lambda m, x: m.a(x * m.p).tanh() @ m.a.weight, a=nn.utils.weight_norm(nn.Linear(D, D)), p=par(D))
    assert_exact(jittered(model), (batch(),))


def test_spectral_norm_of_the_old_style():
    model = Net(lambda m, x: m.a(x * m.p), a=nn.utils.spectral_norm(nn.Linear(D, D)), p=par(D))
    assert_exact(jittered(model).eval(), (batch(),))


def test_a_parametrisation_put_on_and_taken_off():
    model, x = bare(), batch()
    assert_exact(model, (x,))
    nn.utils.parametrizations.weight_norm(model.blocks[0].linear)
    assert_exact(model, (x,))
    nn.utils.parametrize.remove_parametrizations(model.blocks[0].linear, "weight")
    assert_exact(model, (x,))


# -------------------------------------------------------------------------------------- functional calls


def test_functional_call_with_the_models_own_parameters():
    model = bare()
    own = dict(model.named_parameters())
    assert_exact(model, (batch(),), forward=lambda m, x: torch.func.functional_call(m, own, (x,)))


def test_functional_call_with_computed_parameters():
    """Each parameter is doubled first; the fields are the parameters'."""

    def forward(m, x):
        return torch.func.functional_call(m, {name: 2 * p for name, p in m.named_parameters()}, (x,))

    assert_exact_or_refused(bare(), (batch(),), r"`[\w.]+`", forward=forward)


def test_functional_call_with_other_leaves():
    """The fields land on the tensors that were put in, or an error names one of them."""
    model, x = bare(), batch()
    expected = wanted(model, x)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    extend(model)
    message = None
    try:
        with perex(BatchGrad(), grad=False):
            losses(torch.func.functional_call(model, leaves, (x,))).mean().backward()
    except PerExampleError as error:
        message = str(error)
    if message is None:
        assert_near({name: leaf.grad_batch for name, leaf in leaves.items()}, expected, 1e-10, "grad_batch")
    else:
        assert re.search(r"`[\w.]+`|functional_call", message), message
    assert not any(hasattr(p, "grad_batch") and p.grad_batch.any() for p in model.parameters())
    assert_exact(model, (x,))


# ------------------------------------------------------------------------------------ calls, inputs, outputs


def test_several_calls_in_one_loss():
    assert_exact(bare(), (batch(), rand(N, 5, D)), forward=lambda m, x, y: (m(x) - m(y)).square() + m(x) * m(y))


def test_a_model_called_on_its_own_output():
    def forward(m, x):
        for _ in range(3):
            x = m(x)
        return x

    assert_exact(jittered(Net(lambda m, x: m.block(x) * m.p, block=Block(), p=par(D))), (batch(),), forward=forward)


@dataclass
class Output:
    scores: Tensor
    hidden: Tensor


Pair = namedtuple("Pair", ["scores", "hidden"])


def _inner(m, x, mask):
    h = torch.where(mask.unsqueeze(-1), m.p, m.a(x))
    return h @ m.w, h


def _mapping():
    batch_encoding = pytest.importorskip("transformers").BatchEncoding
    return lambda **data: batch_encoding(data)


CALLS = {
    "positional": (lambda m, x, mask: _inner(m, x, mask), lambda m, x, mask: m(x, mask)),
    "dict": (lambda m, d: _inner(m, d["x"], d["mask"]), lambda m, x, mask: m({"mask": mask, "x": x})),
    "tuple": (lambda m, d: _inner(m, *d), lambda m, x, mask: m((x, mask))),
    "named-tuple": (lambda m, d: _inner(m, d.scores, d.hidden), lambda m, x, mask: m(Pair(x, mask))),
    "extras": (lambda m, x, mask, *_: _inner(m, x, mask), lambda m, x, mask: m(x, mask, None, 3, "mean")),
    "encoding": (lambda m, d: _inner(m, d["x"], d["mask"]), lambda m, x, mask: m(_mapping()(x=x, mask=mask))),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_of_every_kind(name):
    function, forward = CALLS[name]
    model = jittered(Net(function, a=nn.Linear(D, D), p=par(D), w=par(D, 5)))
    assert_exact(model, (batch(), torch.rand(N, T) < 0.5), forward=forward)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.p, self.w = nn.Linear(D, D), par(D), par(D, 5)

    def forward(self, *, mask=None, x=None, output=tuple):
        return output(_inner(self, x, mask))


@pytest.mark.parametrize("unpacked", [False, True], ids=["keywords", "encoding"])
def test_inputs_by_keyword(unpacked):
    def forward(m, x, mask):
        return m(**_mapping()(x=x, mask=mask)) if unpacked else m(mask=mask, x=x)

    assert_exact(jittered(Keyword()), (batch(), torch.rand(N, T) < 0.5), forward=forward)


def _of_hugging_face(pair):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    return outputs.BaseModelOutputWithPooling(last_hidden_state=pair[1], pooler_output=pair[0])


OUTPUTS = {
    "tuple": (tuple, lambda out: out),
    "list": (list, lambda out: out),
    "dict": (
        lambda pair: {"scores": pair[0], "hidden": pair[1], "step": 3},
        lambda out: (out["scores"], out["hidden"]),
    ),
    "dataclass": (lambda pair: Output(*pair), lambda out: (out.scores, out.hidden)),
    "named-tuple": (lambda pair: Pair(*pair), tuple),
    "hugging-face": (_of_hugging_face, lambda out: (out.pooler_output, out.last_hidden_state)),
    "one-of-two": (tuple, lambda out: out[0]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_kind(name):
    pack, unpack = OUTPUTS[name]
    assert_exact(
        jittered(Keyword()),
        (batch(), torch.rand(N, T) < 0.5),
        forward=lambda m, x, mask: unpack(m(x=x, mask=mask, output=pack)),
    )


def _last(m, steps):
    return m.head(m.rnn(steps)[1][-1])


def _filled_up(m, steps):
    """Steps that are computed one by one, and a mean over each example's own."""
    inner = PackedSequence(m.each(steps.data).tanh() * m.p, *steps[1:])
    out, lengths = pad_packed_sequence(m.rnn(inner)[0], batch_first=True)
    return m.head(out.sum(1) / lengths.unsqueeze(1))


def _beside(m, steps, context):
    return _last(m, steps) + m.each(context)


LENGTHS = {
    "any": (2, 5, 1, 4),
    "sorted": (5, 3, 3, 1),
    "equal": (3, 3, 3, 3),
    "as-many-steps": (4, 1, 4, 2),
    "one": (3,),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("function", [_last, _filled_up, _beside])
@pytest.mark.parametrize("cls", [nn.GRU, nn.RNN])
def test_packed_sequences_that_a_model_is_given(cls, function, lengths):
    """Packed outside of it: steps of all examples, longest first, and sizes and orders that belong to nobody."""
    model = Net(
        function, rnn=cls(D, D), head=nn.Linear(D, 5), each=nn.Linear(D, 5 if function is _beside else D), p=par(D)
    )
    context = (rand(len(lengths), D),) if function is _beside else ()

    def forward(m, x, lengths, *context):
        is_sorted = lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        return m(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted), *context)

    unused = {_last: "each p", _filled_up: "", _beside: "p"}[function].split()
    for name in unused:
        getattr(model, name).requires_grad_(False)
    assert_exact(jittered(model), (rand(len(lengths), 5, D), torch.tensor(lengths), *context), forward=forward)


def test_packed_ids_and_layers_that_are_models_themselves():
    """An LSTM that is given states too, whose other axes are not taken for examples; lists of ids."""
    lengths, states = torch.tensor(LENGTHS["any"]), rand(2, 2, N, D).unbind()
    model, x = jittered(nn.LSTM(D, D, num_layers=2)), rand(N, 5, D)

    def forward(m, x, lengths, *states):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, (h, _) = m(packed, tuple(s.transpose(0, 1).contiguous() for s in states))
        return pad_packed_sequence(out, batch_first=True, total_length=5)[0], h[-1]

    assert_exact(model, (x, lengths, *(s.transpose(0, 1) for s in states)), forward=forward)
    ids = torch.randint(0, 9, (N, 5))

    def embedded(m, steps):
        return m.head(m.rnn(PackedSequence(m.table(steps.data), *steps[1:]))[1][-1])

    assert_exact(
        jittered(Net(embedded, table=nn.Embedding(9, D), rnn=nn.GRU(D, D), head=nn.Linear(D, 5))),
        (ids, lengths),
        forward=lambda m, ids, lengths: m(pack_padded_sequence(ids, lengths, batch_first=True, enforce_sorted=False)),
    )


@pytest.mark.parametrize("lengths", [LENGTHS["any"], LENGTHS["one"]])
def test_packed_sequences_in_a_mapping(lengths):
    """That of a single example, too, which has as many rows as steps."""
    model = Net(lambda m, batch: m.each(batch["steps"].data) * m.p, each=nn.Linear(D, D), p=par(D))

    def forward(m, x, lengths):
        steps = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=len(lengths) == 1)
        out = m({"steps": steps, "name": "a"})
        return pad_packed_sequence(PackedSequence(out, *steps[1:]), batch_first=True, total_length=5)[0]

    assert_exact(jittered(model), (rand(len(lengths), 5, D), torch.tensor(lengths)), forward=forward)


def test_a_mean_over_all_steps_of_a_packed_sequence_mixes():
    model = extend(Net(lambda m, steps: m.each(steps.data)[:N] + m.each(steps.data).mean(0), each=nn.Linear(D, 5)))
    steps = pack_padded_sequence(torch.randn(N, 5, D), torch.tensor(LENGTHS["any"]), True, enforce_sorted=False)
    with pytest.raises(CrossExampleError, match="`mean` in `Net`"), perex(BatchGrad()):
        model(steps).square().sum(1).mean().backward()


def _with_candidates(m, users, candidates):
    return m.users(users) @ m.items(candidates).T + m.p


def _against_negatives(m, words, near, negatives):
    own = (m.users(words) * m.items(near)).sum(1, keepdim=True)
    return torch.cat([own, m.users(words) @ m.items(negatives).T], 1) * m.p


@pytest.mark.parametrize("function", [_with_candidates, _against_negatives])
def test_ids_beside_others_that_all_examples_share(function):
    """Two lists of ids of different length are no bags where no layer takes any."""
    count = 5 if function is _with_candidates else 1
    model = Net(function, users=nn.Embedding(9, D), items=nn.Embedding(7, D), p=par(count))
    own = (torch.randint(0, 7, (N,)),) * (function is _against_negatives)
    inputs = (torch.randint(0, 9, (N,)), *own, torch.randint(0, 7, (5,)))
    assert_exact(jittered(model), inputs, axes=(*[0] * (len(inputs) - 1), None))


def test_the_forward_outside_of_the_context():
    model, x = bare(), batch()
    expected = wanted(model, x)
    extend(model)
    loss = losses(model(x)).mean()
    with perex(BatchGrad()):
        loss.backward()
    assert_near(fields(model), expected, 1e-10, "grad_batch")


@pytest.mark.parametrize("grads", [(True, True), (False, False), (True, False)])
def test_two_backwards_through_one_graph(grads):
    model, x = bare(), batch()
    expected = wanted(model, x)
    extend(model)
    loss = losses(model(x)).mean()
    for number, grad in enumerate(grads):
        with perex(BatchGrad(), grad=grad):
            loss.backward(retain_graph=number == 0)
        assert_near(fields(model), expected, 1e-10, "grad_batch")


def test_two_losses_of_one_forward():
    model, x = bare(), batch()
    squares = wanted(model, x, loss=lambda out: out.square().sum(1))
    extend(model)
    output = model(x)
    with perex(BatchGrad()):
        output.sin().sum(1).mean().backward(retain_graph=True)
        output.square().sum(1).mean().backward()
    assert_near(fields(model), squares, 1e-10, "grad_batch of the second loss")


def test_a_second_backward_through_a_freed_graph():
    model = extend(bare())
    loss = losses(model(batch())).mean()
    with perex(BatchGrad()):
        loss.backward()
        with pytest.raises(RuntimeError, match=r"retain_graph|second time"):
            loss.backward()


def test_plain_backwards_in_between():
    model, x = bare(), batch()
    expected = wanted(model, x)
    extend(model)
    losses(model(x)).mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_near(plain, {name: rows.mean(0) for name, rows in expected.items()}, 1e-10, "p.grad of an extended model")
    assert_exact(model, (x,))


# ----------------------------------------------------------------------------------------------------- compile


def _compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extended_first", [False, True])
def test_a_compiled_model(extended_first, fresh_dynamo):
    model = bare()
    if extended_first:
        extend(model)
    compiled = _compiled(model)
    assert_exact_or_refused(model, (batch(),), "compile", forward=lambda m, x: compiled(x))


@pytest.mark.filterwarnings("ignore")
def test_extend_of_a_compiled_model(fresh_dynamo):
    assert_exact_or_refused(_compiled(bare()), (batch(),), "compile")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_submodule(inplace, fresh_dynamo):
    model = bare()
    if inplace:
        model.blocks[0].compile(backend="eager")
    else:
        model.blocks[0] = _compiled(model.blocks[0])
    assert_exact_or_refused(model, (batch(),), r"compile|`blocks\.0")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_of_a_bare_parameter(fresh_dynamo):
    scale = torch.compile(lambda x, p: (x * p).tanh(), backend="eager")
    model = jittered(Net(lambda m, x: scale(m.a(x), m.p) + m.p, a=nn.Linear(D, D), p=par(D)))
    assert_exact_or_refused(model, (batch(),), "compile|`p`")


# ---------------------------------------------------------------------------------- copies, contexts, threads


def _copied(model):
    return copy.deepcopy(model)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("after", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("copied", [_copied, _pickled, saved_whole])
def test_copies_of_extended_models(copied, after):
    model, x = extend(bare()), batch()
    if after:
        grad_batch(model, x)
    other = copied(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    expected = wanted(other, x)
    with perex(BatchGrad()):
        losses(other(x)).mean().backward()
    assert_near(fields(other), expected, 1e-10, "grad_batch of the copy")
    assert_exact(model, (x,))


def test_state_dicts_are_untouched():
    plain, model = bare(), bare()
    model.load_state_dict(plain.state_dict())
    grad_batch(model, batch())
    assert_bitwise(model.state_dict(), plain.state_dict())
    bare().load_state_dict(model.state_dict())


class Stumbling(nn.Module):
    """Raises in the middle of its forward, if told to."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.gain, self.error = Block(), Block(), par(D), None

    def forward(self, x):
        h = self.first(x) * self.gain
        if self.error is not None:
            raise self.error
        return self.last(h) + self.gain


@pytest.mark.parametrize("error", [ValueError("stumbled"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_a_step_after_an_exception_in_the_forward(error, inside):
    model, x = jittered(Stumbling()), batch()
    expected = grad_batch(copy.deepcopy(model), x)
    extend(model)
    model.error = error
    with pytest.raises(type(error)):
        _stumble(model, x, inside)
    if inside or isinstance(error, Exception):  # torch runs no hook of ours after an interrupt; the next step cleans up
        assert not torch._C._len_torch_function_stack()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    model.error = None
    expected_again = grad_batch(model, x)
    assert not torch._C._len_torch_function_stack()
    assert_bitwise(expected_again, expected)
    assert_bitwise(grad_batch(model, x), expected)


def _stumble(model, x, inside):
    if inside:
        with perex(BatchGrad()):
            model(x)
    model(x)


def test_a_step_after_an_exception_in_the_backward():
    model, x = bare(), batch()
    expected = grad_batch(copy.deepcopy(model), x)
    extend(model)

    def stumble(gradient):
        raise ValueError("stumbled")

    def backward():
        with perex(BatchGrad()):
            output = model(x)
            output.register_hook(stumble)
            losses(output).mean().backward()

    with pytest.raises(ValueError, match="stumbled"):
        backward()
    assert not torch._C._len_torch_function_stack()
    model.zero_grad()
    assert_bitwise(grad_batch(model, x), expected)


@pytest.mark.parametrize("between", ["no_grad", "inference_mode", "eval", "training", "other-model"])
def test_forwards_between_forward_and_backward(between):
    model, x = bare(), batch()
    expected = grad_batch(copy.deepcopy(model), x)
    other = extend(bare())
    extend(model)
    with perex(BatchGrad(), grad=False):
        loss = losses(model(x)).mean()
        if between == "no_grad":
            with torch.no_grad():
                model(batch(7))
        elif between == "inference_mode":
            with torch.inference_mode():
                model(batch(7))
        elif between == "eval":
            model.eval()(batch(7))
            model.train()
        else:
            (model if between == "training" else other)(batch(7))
        loss.backward()
    assert_bitwise(fields(model), expected)


def test_two_models_in_two_threads():
    models, inputs = [bare(), jittered(Stumbling())], [batch(4), batch(6)]
    expected = [wanted(model, x) for model, x in zip(models, inputs, strict=True)]
    problems, start = [], threading.Barrier(2)

    def work(number):
        try:
            start.wait(timeout=10)
            for _ in range(15):
                found = grad_batch(models[number], inputs[number], grad=number == 0)
                assert_near(found, expected[number], 1e-10, f"grad_batch in thread {number}")
        except BaseException as error:  # noqa: BLE001 - reported in the main thread
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not problems, problems
    assert not any(thread.is_alive() for thread in threads)


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count, self.functions = 0, Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.functions[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [Counting, lambda: torch.device("cpu"), torch.autograd.graph.save_on_cpu])
def test_other_contexts_around_the_forward(make):
    def forward(m, x):
        with make():
            return m(x)

    assert_exact(bare(), (batch(),), forward=forward)


def test_another_context_around_everything():
    model, x = bare(), batch()
    expected = wanted(model, x)
    with Counting() as counting:
        found = grad_batch(model, x)
    assert counting.count
    assert_near(found, expected, 1e-10, "grad_batch")


def test_what_a_context_sees_inside_is_what_it_sees_of_the_plain_model():
    """Followed operations run past the library's own modes, and past no other."""

    def seen(inside):
        model = extend(bare()) if inside else bare()
        with Counting() as counting, perex(BatchGrad()) if inside else nullcontext():
            model(batch())
        return counting.functions

    assert sum(seen(False).values()) > 5
    assert seen(True) >= seen(False)


def test_a_first_backward_imports_nothing_large():
    """torch imports sympy where a backward is given a gradient to begin with."""
    code = """
import sys, torch
from torch import nn
from perexample import extend, perex
from perexample.extensions import ClippedGrad
before = "sympy" in sys.modules
with perex(ClippedGrad(1.0), grad=False):
    extend(nn.Linear(2, 2))(torch.ones(3, 2)).sum(1).mean().backward()
assert before or "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nested_extended_models():
    """A part that is extended by itself, before or after the whole."""
    model, x = bare(), batch()
    extend(model.blocks[0])
    assert_exact(model, (x,))
    extend(model.blocks[1])
    assert_exact(model, (x,))
    assert_exact(model.blocks[0], (x,))
    assert_exact(model, (x,))


def test_a_frozen_extended_model_in_front():
    front, model, x = bare(), jittered(Net(lambda m, h: h * m.p, p=par(5))), batch()
    extend(front).requires_grad_(False)
    assert_exact(model, (x,), forward=lambda m, x: m(front(x)))


def test_two_extended_models_one_after_the_other():
    first, second, x = jittered(Stumbling()), bare(), batch()
    whole = nn.ModuleList([first, second])
    expected = wanted(whole, x, forward=lambda m, x: m[1](m[0](x)))
    extend(first)
    extend(second)
    with perex(BatchGrad()):
        losses(second(first(x))).mean().backward()
    assert_near(fields(whole), expected, 1e-10, "grad_batch")


# ------------------------------------------------------------------------------------------------ users' hooks


def _doubled(module, args, output):
    return output * 2


def _squashed(module, args):
    return (args[0].tanh(), *args[1:])


HOOKS = {
    "output": lambda m: m.blocks[0].register_forward_hook(_doubled),
    "output-of-a-leaf": lambda m: m.blocks[0].linear.register_forward_hook(_doubled),
    "output-first": lambda m: m.blocks[1].linear.register_forward_hook(_doubled, prepend=True),
    "output-of-the-model": lambda m: m.register_forward_hook(_doubled),
    "input": lambda m: m.blocks[0].linear.register_forward_pre_hook(_squashed),
    "input-of-the-model": lambda m: m.register_forward_pre_hook(_squashed),
    "with-a-parameter": lambda m: m.blocks[0].register_forward_hook(lambda _, args, output: output * m.blocks[1].gain),
    "gradient": lambda m: m.blocks[0].register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("extended_first", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_user(name, extended_first):
    model = bare()
    if extended_first:
        extend(model)
    HOOKS[name](model)
    assert_exact(model, (batch(),))


def test_hooks_on_tensors():
    def forward(m, x):
        h = m.a(x) * m.p
        if h.requires_grad:
            h.register_hook(lambda g: g * 0.5)
        return (h + m.q).tanh()

    assert_exact(jittered(Net(forward, a=nn.Linear(D, D), p=par(D), q=par(D))), (batch(),))


def test_activations_kept_by_a_hook():
    model, x, seen = bare(), batch(), []
    handle = model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert_exact(model, (x,))
    handle.remove()
    assert all(not vars(t) for t in seen)


# -------------------------------------------------------------------------------------- nothing is left behind


DOCUMENTED = {"grad_batch", "batch_l2", "clipped_sum"}


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_left_behind(grad):
    model, x = extend(bare()), batch()
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    with perex(BatchGrad(), BatchL2Grad(), ClippedGrad(1.0), grad=grad):
        output = model(x)
        loss = losses(output).mean()
        loss.backward()
    assert not torch._C._len_torch_function_stack()
    for name, p in model.named_parameters():
        assert set(vars(p)) <= DOCUMENTED, name
        assert type(p) is nn.Parameter
        assert not p._backward_hooks, name
        assert not getattr(p, "_post_accumulate_grad_hooks", None), name
    for t in (x, output, loss):
        assert type(t) is Tensor
        assert not vars(t)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_no_mode_stays_on_the_stack_after_a_forward():
    model = extend(bare())
    model(batch())
    assert not torch._C._len_torch_function_stack()
    with perex(BatchGrad()):
        model(batch())
        assert torch._C._len_torch_function_stack() == 1
    assert not torch._C._len_torch_function_stack()


def test_unextend_takes_everything_back():
    model, x = bare(), batch()
    plain = copy.deepcopy(model)
    before = {name: {k: repr(v) for k, v in vars(m).items()} for name, m in model.named_modules()}
    grad_batch(model, x)
    unextend(model)
    assert {name: {k: repr(v) for k, v in vars(m).items()} for name, m in model.named_modules()} == before
    assert not any(vars(p) for p in model.parameters())
    assert torch.equal(model(x), plain(x))
    with perex(BatchGrad()), pytest.raises(PerExampleError):
        losses(model(x)).mean().backward()


def test_the_output_is_the_same_to_the_last_bit():
    model, x = bare(), batch()
    plain = model(x)
    assert torch.equal(extend(model)(x), plain)
    with perex(BatchGrad()):
        assert torch.equal(model(x), plain)


def test_plan_names_bare_parameters_and_check_agrees():
    model = bare()
    text = str(plan(model))
    for name in ("token", "places", "head", "gain", "weight"):
        assert name in text
    assert check(model, lambda output: losses(output).mean(), batch()).ok


@pytest.mark.parametrize("n", [2, 3])
def test_rounding_is_not_taken_for_mixing(n):
    """Sums of 256 products that nearly cancel differ in their last digits with what lies beside them in memory."""
    torch.manual_seed(0)
    model = extend(nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True))
    with perex(BatchGrad(), grad=False):
        model(torch.randn(n, 128, 256)).square().mean((1, 2)).mean().backward()
    assert model.linear1.weight.grad_batch.shape == (n, 512, 256)


def _through_a_buffer(m, x):
    buffer = torch.zeros_like(x)
    part = buffer[:, :2]
    torch.abs(x, out=buffer)
    return part * m.gain


def _side_by_side(m, x):
    h = m.linear(x)
    return torch.cat([m.token.expand(len(x), -1), h, x], -1) * m.wide


def test_a_pointwise_operation_that_writes_into_what_has_views():
    assert_exact(Net(_through_a_buffer, gain=par(2)), (rand(5, 4),))


def test_tensors_beside_each_other():
    """On another axis than that of the examples, with what belongs to none."""
    model = Net(_side_by_side, linear=nn.Linear(4, 4), token=par(1, 3), wide=par(11))
    assert_exact(jittered(model), (rand(4, 4),))


def _one_after_the_other(m, x):
    first, second = torch.cat([m.linear(x), x]).chunk(2)
    return first * m.gain + second


def test_tensors_put_after_each_other_on_the_axis_of_the_examples():
    assert_exact(jittered(Net(_one_after_the_other, linear=nn.Linear(4, 4), gain=par(4))), (rand(5, 4),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_trained_model_is_traced_as_it_is_and_not_scripted():
    """With gradients recorded too: torch runs it twice, and compares what it has written down."""
    model, x = extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), torch.randn(5, 3)
    with perex(BatchGrad()):
        model(x).square().sum(1).mean().backward()
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x[:2]), model(x[:2]))
    with pytest.raises(AttributeError, match=r"cannot be scripted.*perexample\.unextend\(model\) before"):
        torch.jit.script(model)
    torch.jit.script(unextend(model))
