"""The known faults of other libraries that depend on where a model has its parameters, with parameters anywhere.

test_faults.py has the same faults with modules that have rules. Here a small transformer uses most of its parameters
bare or functionally: a class token, a table of positions, a relative position bias that its layers share, a norm written
by hand, a head that is the embedding's table. What can be is tried on GPT-2 or ViT of transformers too.
"""

import copy
import gc
import re
import threading

import harness
import pytest
import reference
import torch
import torch.nn.functional as F
from harness import (
    Net,
    Problem,
    assert_exact,
    assert_exact_or_refused,
    assert_near,
    assert_refused,
    jittered,
    losses,
    par,
    rand,
    trainable,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from perexample import (
    DP_SGD,
    CheckFailedError,
    CrossExampleError,
    LossError,
    PerExampleError,
    Rule,
    RuleContractError,
    StaleGradientError,
    UncoveredParameterError,
    check,
    extend,
    perex,
    privatize,
    register_rule,
    unextend,
)
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

N, T, D, V, HEADS, LENGTH = 4, 5, 6, 11, 2, 9


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def registry(monkeypatch):
    """Rules registered in a test are gone after it."""
    from perexample import rule

    monkeypatch.setattr(rule, "_REGISTRY", dict(rule._REGISTRY))


# -------------------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """Written by hand, as most models do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    """Attention with a bias that is given, and a gated residual; one norm serves both halves."""

    def __init__(self, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, HEADS, dropout, batch_first=True)
        self.norm, self.gain, self.between, self.dropout = RMSNorm(), par(D), nn.Identity(), dropout
        self.wide, self.narrow = nn.Linear(D, 7), nn.Linear(7, D)

    def forward(self, x, bias):
        h = self.norm(x)
        h = self.attention(h, h, h, attn_mask=bias.repeat(len(x), 1, 1), need_weights=False)[0]
        x = self.between(x + F.dropout(h, self.dropout, self.training))
        h = F.dropout(F.gelu(self.wide(self.norm(x))), self.dropout, self.training)
        return x + self.gain * self.narrow(h)


def directly(function, *inputs):
    return function(*inputs)


def checkpointed(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False)


def reentrantly(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=True)


class Tiny(nn.Module):
    """Words to scores of words, ``[N, T]`` to ``[N, T + 1, V]``; the first position is that of the class token."""

    def __init__(self, layers=2, dropout=0.0, call=directly):
        super().__init__()
        self.words, self.token, self.places = nn.Embedding(V, D), par(1, 1, D), par(1, LENGTH, D)
        self.relative = par(HEADS, 2 * LENGTH - 1)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.lstm, self.norm = nn.LSTM(D, D, batch_first=True), RMSNorm()
        self.register_parameter("head", None)  # in place of the words
        self.dropout, self.call = dropout, call

    def embedded(self, ids):
        h = torch.cat([self.token.expand(len(ids), -1, -1), self.words(ids)], 1)
        return F.dropout(h + self.places[:, : h.shape[1]], self.dropout, self.training)

    def bias(self, t):
        steps = torch.arange(t)
        return self.relative[:, steps - steps.unsqueeze(1) + LENGTH - 1]

    def body(self, h):
        bias = self.bias(h.shape[1])
        for layer in self.layers:
            h = self.call(layer, h, bias)
        return h + self.call(lambda x: self.lstm(self.norm(x))[0], h)

    def forward(self, ids):
        return F.linear(self.body(self.embedded(ids)), self.words.weight if self.head is None else self.head)


def tiny(**options):
    return jittered(Tiny(**options))


def words(n=N, t=T):
    return torch.randint(V, (n, t))


def gpt2(dropout=0.0, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=LENGTH, n_embd=D, n_layer=2, n_head=HEADS, n_inner=7, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False, bos_token_id=0, eos_token_id=0, **options,
    )  # fmt: skip
    return jittered(transformers.GPT2LMHeadModel(config)).train()


def vit(dropout=0.0, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=7, image_size=4, patch_size=2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return jittered(transformers.ViTModel(config, **options)).train()


def of_logits(output):
    return losses(output.logits)


def of_hidden(output):
    return losses(output.last_hidden_state)


MODELS = {"tiny": (tiny, losses), "gpt2": (gpt2, of_logits)}


# ---------------------------------------------------------------------------------------------------------- helpers


def fields(model, name="grad_batch"):
    return {key: getattr(p, name) for key, p in trainable(model).items()}


def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def grad_batch(model, *inputs, loss=losses, grad=False, seed=3):
    extend(model)
    torch.manual_seed(seed)
    with perex(BatchGrad(), grad=grad):
        loss(model(*inputs)).mean().backward()
    return fields(model)


def clipped(model, *inputs, bound=0.5, loss=losses):
    with perex(ClippedGrad(bound), grad=False):
        loss(extend(model)(*inputs)).mean().backward()
    return fields(model, "clipped_sum")


def wanted(model, *inputs, **settings):
    """One forward and one backward for each example."""
    return harness.validated(Problem(unextend(copy.deepcopy(model)), inputs, **settings))


def rows_of_one_run(model, *inputs, loss=losses, seed=3):
    """One forward of all, one backward for each example: right also where the forward draws random numbers."""
    model = unextend(copy.deepcopy(model))
    named = trainable(model)
    torch.manual_seed(seed)
    values = loss(model(*inputs))
    rows = [torch.autograd.grad(v, list(named.values()), retain_graph=True, allow_unused=True) for v in values]
    return {
        name: torch.stack([torch.zeros_like(p) if row[i] is None else row[i] for row in rows])
        for i, (name, p) in enumerate(named.items())
    }


def assert_rows_of_one_run(model, *inputs, loss=losses):
    expected = rows_of_one_run(model, *inputs, loss=loss)
    for grad in (False, True):
        model.zero_grad()
        assert_near(grad_batch(model, *inputs, loss=loss, grad=grad), expected, 1e-9, f"grad_batch, grad={grad}")


def assert_bitwise(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def dp_sgd(params, clipping, noise=0.0, size=1.0, lr=1.0, seed=0):
    return DP_SGD(
        params,
        lr=lr,
        clipping=clipping,
        noise_multiplier=noise,
        expected_batch_size=size,
        generator=torch.Generator().manual_seed(seed),
    )


def assert_no_fields(model):
    assert not any(hasattr(p, name) for p in model.parameters() for name in ("grad_batch", "batch_l2", "clipped_sum"))


# ------------------------------------------------------------------------------------------- F6: tied weights


def _tie(owner, name, parameter):
    setattr(owner, name, parameter)


TIES = {
    "head": lambda m: None,
    "layers": lambda m: m.layers.__setitem__(1, m.layers[0]),
    "bare-and-norm": lambda m: _tie(m.norm, "weight", m.layers[0].gain),
    "norms": lambda m: _tie(m.layers[1].norm, "weight", m.norm.weight),
    "attentions": lambda m: _tie(m.layers[1].attention, "in_proj_weight", m.layers[0].attention.in_proj_weight),
    "attention-and-head": lambda m: _tie(m, "head", m.layers[0].attention.out_proj.weight),
    "lstm-with-itself": lambda m: _tie(m.lstm, "weight_hh_l0", m.lstm.weight_ih_l0),
    "lstm-and-head": lambda m: _tie(m, "head", m.lstm.weight_ih_l0),
    "linear-and-head": lambda m: _tie(m, "head", m.layers[1].wide.weight),
    "table-and-head": lambda m: _tie(m, "head", _matrix(m)),
}


def _matrix(model):
    """A table of positions that is also a matrix."""
    model.places = par(LENGTH, D)
    model.embedded = lambda ids: torch.cat([model.token.expand(len(ids), -1, -1), model.words(ids)], 1) + (
        model.places[: ids.shape[1] + 1]
    )
    return model.places


@pytest.mark.parametrize("tie", TIES)
def test_f06_tied_parameters(tie):
    model = tiny()
    count = len(list(model.parameters()))
    TIES[tie](model)
    assert len(list(model.parameters())) <= count
    assert_exact(model, (words(),))


def _untied(model):
    """A copy that computes the same, with a head of its own."""
    model = copy.deepcopy(model)
    head = nn.Parameter(model.get_input_embeddings().weight.detach().clone() if hasattr(model, "lm_head") else model.words.weight.detach().clone())
    setattr(*((model.lm_head, "weight") if hasattr(model, "lm_head") else (model, "head")), head)
    return model
