"""What the libraries that this one learns from can do, row by row.

The table "Comparative analysis" of Opacus' README on grad samples, where each approach lacks something, and the layers
of fastgc (Lee and Kifer) and of private_vision (Bu, Mao and Xu).
"""

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Net, Row, assert_exact, assert_exact_or_refused, jittered, losses, par, rand
from torch import Tensor, nn

from perexample import DP_SGD, Rule, UnsupportedModuleError, extend, perex, plan, register_rule
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

N, T, D = 4, 3, 6


def tokens(n: int) -> tuple:
    return (rand(n, T, D),)


def time_major(n: int) -> tuple:
    return (rand(T, n, D),)


def vectors(n: int) -> tuple:
    return (rand(n, D),)


def words(n: int) -> tuple:
    return (torch.randint(7, (n, T)),)


def signal(n: int) -> tuple:
    return (rand(n, D, 9),)


def image(n: int) -> tuple:
    return (rand(n, D, 7, 5),)


def volume(n: int) -> tuple:
    return (rand(n, D, 3, 5, 3),)


def ids(row):
    return row.id


def exact(row: Row, n: int = N) -> None:
    model, inputs = row.build(n)
    assert_exact(model, inputs, **row.settings())


def layer(name: str, make, inputs, **more) -> Row:
    """A layer by itself."""
    return Row(name, make, inputs, **more)


# ------------------------------------------------------------------------- "any DP-allowed layers" (Functorch only)


class Anything(nn.Module):
    """A layer that nobody has a rule for: bare, computed, indexed, shared and functional parameters at once."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale, self.mix, self.token = par(2 * T - 1, 1), par(1), par(D, D), par(D)
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        offsets = torch.arange(T)[:, None] - torch.arange(T) + T - 1
        scores = x @ self.inner(x).transpose(1, 2) * self.scale.exp() + self.table[offsets].squeeze(-1)
        h = torch.einsum("nqk,nkd,de->nqe", scores.softmax(-1), x, self.mix / self.mix.norm())
        h = torch.cat([self.token.expand(len(x), 1, D), h], 1)
        return F.layer_norm(h, (D,), self.token) @ self.inner.weight.T


@pytest.mark.parametrize("n", [0, 1, 3, 4])
def test_any_layer_that_does_not_mix_examples(n):
    exact(Row("anything", Anything, tokens), n)
    exact(Row("anything-among-others", lambda: nn.Sequential(nn.Linear(D, D), Anything(), nn.Tanh()), tokens), n)


def test_any_layer_as_a_leaf():
    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = par(D, D), par(D)

        def forward(self, x):
            for _ in range(2):
                x = (x @ self.a).relu() * self.b + x
            return x

    exact(Row("leaf", Leaf, tokens))


# -------------------------------------------------------------------------------------------- "most popular layers"

POPULAR = [
    layer("linear", lambda: nn.Linear(D, 5), vectors),
    layer("linear-positions", lambda: nn.Linear(D, 5, bias=False), tokens),
    layer("bilinear", lambda: nn.Bilinear(D, D, 5), lambda n: (rand(n, D), rand(n, D))),
    layer("conv1d", lambda: nn.Conv1d(D, 5, 3), signal),
    layer("conv2d", lambda: nn.Conv2d(D, 5, 3, stride=2, padding=1), image),
    layer("conv3d", lambda: nn.Conv3d(D, 5, 3, padding=1), volume),
    layer("conv-transpose1d", lambda: nn.ConvTranspose1d(D, 5, 3), signal),
    layer("conv-transpose2d", lambda: nn.ConvTranspose2d(D, 5, 3, stride=2), image),
    layer("conv-transpose3d", lambda: nn.ConvTranspose3d(D, 5, 2), volume),
    layer("embedding", lambda: nn.Embedding(7, D, padding_idx=0), words),
    layer("embedding-bag", lambda: nn.EmbeddingBag(7, D, mode="mean"), words),
    layer("layer-norm", lambda: nn.LayerNorm(D), tokens),
    layer("rms-norm", lambda: nn.RMSNorm(D), tokens),
    layer("group-norm", lambda: nn.GroupNorm(2, D), image),
    layer("instance-norm1d", lambda: nn.InstanceNorm1d(D, affine=True), signal),
    layer("instance-norm2d", lambda: nn.InstanceNorm2d(D, affine=True), image),
    layer("instance-norm3d", lambda: nn.InstanceNorm3d(D, affine=True), volume),
    layer("batch-norm-evaluated", lambda: nn.BatchNorm2d(D).eval(), image),
    layer("prelu", lambda: nn.PReLU(D), image),
    layer("rnn", lambda: nn.RNN(D, 5, batch_first=True), tokens, forward=lambda m, x: m(x)[0]),
    layer("lstm", lambda: nn.LSTM(D, 5, batch_first=True), tokens, forward=lambda m, x: m(x)[0]),
    layer("gru", lambda: nn.GRU(D, 5, batch_first=True), tokens, forward=lambda m, x: m(x)[0]),
    layer("lstm-cell", lambda: nn.LSTMCell(D, 5), vectors),
    layer(
        "attention",
        lambda: nn.MultiheadAttention(D, 3, batch_first=True),
        tokens,
        forward=lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    layer(
        "encoder-layer",
        lambda: nn.TransformerEncoderLayer(D, 3, 5, dropout=0.0, batch_first=True, norm_first=True),
        tokens,
    ),
]


@pytest.mark.parametrize("row", POPULAR, ids=ids)
def test_popular_layers(row):
    exact(row)


def test_popular_layers_in_one_model():
    model = nn.Sequential(
        nn.Conv2d(D, D, 3, padding=1), nn.GroupNorm(2, D), nn.PReLU(), nn.Flatten(2), nn.Linear(35, T), nn.LayerNorm(T)
    )  # fmt: skip
    exact(Row("popular-together", lambda: model, image))


# --------------------------------------------------------------------------------------------- "torchscripted models"


def _scripted(model: nn.Module) -> nn.Module:
    return torch.jit.script(model)


def _traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, rand(N, T, D))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("script", [_scripted, _traced])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "part"])
def test_scripted_models_are_exact_or_refused(script, whole):
    part = script(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 5)).double())
    model = part if whole else Net(lambda m, x: m.part(x * m.p), part=part, p=par(D))
    assert_exact_or_refused(model, tokens(N), r"script|trac")


# --------------------------------------------------------------------------------------- "client-provided grad sampler"


class Gain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = par(width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_rule_of_the_user():
    calls = []

    class Own(Gain):
        def forward(self, x):
            return x * self.gain

    @register_rule(Own)
    class OwnRule(Rule):
        def grad_batch(self, call, g):
            calls.append(call.name)
            return {"gain": (g * call.x).reshape(call.n, -1, D).sum(1)}

    model = nn.Sequential(nn.Linear(D, D), Own(D), nn.Tanh(), Gain(D))
    assert "OwnRule" in str(plan(model))
    exact(Row("own-rule", lambda: model, tokens))
    assert set(calls) == {"1"}


# -------------------------------------------------------------------------- "batch_first=False", "recurrent networks"


def recurrent(kind: type[nn.RNNBase], **options) -> list[Row]:
    """Both layouts, and a learned first state."""
    name = "-".join([kind.__name__, *(f"{key}={value}" for key, value in options.items())])
    return [
        layer(
            f"{name}-batch-first", lambda: kind(D, 5, batch_first=True, **options), tokens, forward=lambda m, x: m(x)[0]
        ),
        layer(
            f"{name}-time-major", lambda: kind(D, 5, **options), time_major, batch_dim=1, forward=lambda m, x: m(x)[0]
        ),
        layer(
            f"{name}-states",
            lambda: kind(D, 5, **options),
            time_major,
            batch_dim=1,
            forward=lambda m, x: _states(m(x)[1]),
        ),
    ]


def _states(state):
    return list(state) if isinstance(state, tuple) else state


RECURRENT = [
    row
    for rows in (
        recurrent(nn.RNN),
        recurrent(nn.RNN, nonlinearity="relu", bias=False),
        recurrent(nn.GRU),
        recurrent(nn.GRU, num_layers=2, bidirectional=True),
        recurrent(nn.LSTM),
        recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        recurrent(nn.LSTM, proj_size=2),
    )
    for row in rows
]


@pytest.mark.parametrize("row", RECURRENT, ids=ids)
def test_recurrent_networks(row):
    exact(row)


def _packed(m, x, lengths):
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True, total_length=T)[0] * m.p


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_packed_sequences_are_exact_or_refused(kind):
    model = jittered(Net(_packed, rnn=kind(D, 5, batch_first=True), p=par(5)))
    assert_exact_or_refused(model, (rand(N, T, D), torch.tensor([3, 1, 2, 3])), r"pack|`rnn|`p`|`\w+` in `")


TIME_MAJOR = [
    layer(
        "attention",
        lambda: nn.MultiheadAttention(D, 3),
        time_major,
        batch_dim=1,
        forward=lambda m, x: m(x, x, x, need_weights=False)[0],
    ),
    layer("encoder-layer", lambda: nn.TransformerEncoderLayer(D, 3, 5, dropout=0.0), time_major, batch_dim=1),
    layer("linear", lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)), time_major, batch_dim=1),
    layer(
        "lstm-inside",
        lambda: Net(lambda m, x: m.b(m.a(x.transpose(0, 1))[0].transpose(0, 1)), a=nn.LSTM(D, 5), b=nn.Linear(5, 2)),
        tokens,
    ),
    layer(
        "last-state-into-a-head",
        lambda: Net(lambda m, x: m.b(m.a(x)[1][-1]), a=nn.GRU(D, 5), b=nn.Linear(5, 2)),
        time_major,
        batch_dim=1,
        out_axis=0,
    ),
    layer(
        "positions", lambda: Net(lambda m, x: m.a(x + m.p), a=nn.Linear(D, D), p=par(T, 1, D)), time_major, batch_dim=1
    ),
]


@pytest.mark.parametrize("row", TIME_MAJOR, ids=ids)
@pytest.mark.parametrize("n", [1, T, N])
def test_the_batch_on_axis_1(row, n):
    exact(row, n)


# ---------------------------------------------------------------------------------------------- "padding same in Conv"

SAME = [
    layer("conv1d", lambda: nn.Conv1d(D, 5, 3, padding="same"), signal),
    layer("conv1d-dilated", lambda: nn.Conv1d(D, 5, 3, padding="same", dilation=2), signal),
    layer("conv2d", lambda: nn.Conv2d(D, 5, (3, 5), padding="same"), image),
    layer("conv2d-even-kernel", lambda: nn.Conv2d(D, 5, (2, 4), padding="same"), image),
    layer("conv2d-reflected", lambda: nn.Conv2d(D, 5, 3, padding="same", padding_mode="reflect"), image),
    layer("conv2d-groups", lambda: nn.Conv2d(D, D, 3, padding="same", groups=3), image),
    layer("conv3d", lambda: nn.Conv3d(D, 5, 3, padding="same"), volume),
    layer(
        "F.conv2d",
        lambda: Net(lambda m, x: F.conv2d(x, m.w, m.b, padding="same"), w=par(5, D, 3, 3), b=par(5)),
        image,
    ),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("row", SAME, ids=ids)
def test_padding_same(row):
    exact(row)


# ------------------------------------------------------------------------------------------- "empty Poisson batches"

# torch's own instance norm fails without examples
EMPTY = [*(row for row in POPULAR if not row.id.startswith("instance-norm")), layer("anything", Anything, tokens)]


@pytest.mark.parametrize("row", EMPTY, ids=ids)
def test_empty_batches(row):
    """Zeros, of the right shapes, after which a step with noise moves every parameter; no module fails on N = 0."""
    model, inputs = row.build(0)
    clipping = ClippedGrad(1.0)
    extend(model)
    settings = {"lr": 1.0, "clipping": clipping, "noise_multiplier": 1.0, "expected_batch_size": 8}
    optimizer = DP_SGD(model.parameters(), **settings)
    with perex(BatchGrad(), BatchL2Grad(), clipping, grad=False, loss_reduction="sum"):
        output = model(*inputs) if row.forward is None else row.forward(model, *inputs)
        losses(output).sum().backward()
    for p in model.parameters():
        assert p.grad_batch.shape == (0, *p.shape)
        assert p.batch_l2.shape == (0,)
        assert torch.equal(p.clipped_sum, torch.zeros_like(p))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.isfinite().all()
        assert (p != old).all()


def test_an_empty_batch_between_others():
    model = jittered(nn.Sequential(nn.Linear(D, D), Gain(D), nn.Linear(D, 2)))
    for n in (3, 0, 4):
        assert_exact(model, vectors(n))


# --------------------------------------------------------------------------------------------------- other libraries


def _first(m, x):
    return m(x)[0]


FASTGC = [
    layer("linear", lambda: nn.Sequential(nn.Linear(D, 5), nn.Sigmoid(), nn.Linear(5, 3)), vectors),
    layer("conv2d", lambda: nn.Sequential(nn.Conv2d(D, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(75, 3)), image),
    layer("conv2d-pooled", lambda: nn.Sequential(nn.Conv2d(D, 5, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)), image),
    layer("rnn", lambda: nn.RNN(D, 5, batch_first=True), tokens, forward=_first),
    layer("lstm", lambda: nn.LSTM(D, 5, batch_first=True), tokens, forward=_first),
    layer("layer-norm", lambda: nn.Sequential(nn.Linear(D, 5), nn.LayerNorm(5), nn.Linear(5, 3)), tokens),
    layer(
        "transformer-encoder",
        lambda: nn.Sequential(
            nn.Embedding(7, D),
            nn.TransformerEncoderLayer(D, 3, 5, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(T * D, 2),
        ),
        words,
    ),
]

PRIVATE_VISION = [
    layer("linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(210, 5)), image),
    layer("layer-norm", lambda: nn.Sequential(nn.LayerNorm((7, 5)), nn.Conv2d(D, 5, 1)), image),
    layer("group-norm", lambda: nn.Sequential(nn.Conv2d(D, D, 3), nn.GroupNorm(3, D), nn.ReLU()), image),
    layer("embedding", lambda: nn.Sequential(nn.Embedding(7, D), nn.Linear(D, 5)), words),
    layer("conv1d", lambda: nn.Conv1d(D, 5, 3, stride=2, bias=False), signal),
    layer("conv2d", lambda: nn.Conv2d(D, 5, 3, dilation=2), image),
    layer("conv3d", lambda: nn.Conv3d(D, 5, (1, 3, 1), padding=(0, 1, 0)), volume),
    layer("conv1d-groups", lambda: nn.Conv1d(D, 9, 3, groups=3), signal),
    layer("conv2d-depthwise", lambda: nn.Sequential(nn.Conv2d(D, D, 3, groups=D), nn.Conv2d(D, 5, 1)), image),
    layer("conv3d-groups", lambda: nn.Conv3d(D, 4, 3, groups=2, padding=1), volume),
]


@pytest.mark.parametrize("row", FASTGC, ids=ids)
@pytest.mark.parametrize("n", [1, N])
def test_layers_of_fastgc(row, n):
    exact(row, n)


@pytest.mark.parametrize("row", PRIVATE_VISION, ids=ids)
@pytest.mark.parametrize("n", [1, N])
def test_layers_of_private_vision(row, n):
    exact(row, n)


def test_layers_that_no_approach_allows():
    """Statistics of the batch: refused at once, by name."""
    model = nn.Sequential(nn.Conv2d(D, 5, 3), nn.BatchNorm2d(5))
    with pytest.raises(UnsupportedModuleError, match="`1`"):
        extend(model)
    model[1].eval()
    assert_exact(jittered(model), image(N))
    assert not harness.trainable(model.requires_grad_(False))
