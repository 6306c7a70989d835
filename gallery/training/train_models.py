"""The networks of `train.py`, made for the data at hand; every parameter of them is trained."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_data import Data

from perexample.privacy import replace_batchnorm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU, "gelu": nn.GELU, "leaky-relu": nn.LeakyReLU, "mish": nn.Mish, "relu": nn.ReLU, "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "softplus": nn.Softplus, "tanh": nn.Tanh,
}  # fmt: skip
VGG = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}
RESNET = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
NAMES = [
    "linear", "mlp", "cnn", "rnn", "lstm", "gru", "transformer", "vit",
    *(f"resnet{depth}" for depth in RESNET), *(f"vgg{depth}" for depth in VGG), "wrn-16-4", "wrn-40-4", "wrn-28-10",
]  # fmt: skip


class ModelError(Exception):
    """A network that there is not, or that does not fit the data."""


@dataclass(frozen=True)
class Shape:
    """What a network may be told; each uses what means something for it."""

    hidden: tuple[int, ...] = (64,)
    channels: tuple[int, ...] = (16, 64)
    kernel: int = 3
    layers: int = 1
    heads: int = 4
    activation: str = "tanh"
    pretrained: bool = False


class Attention(nn.Module):
    """Self-attention from one joint projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.joint(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PreNorm(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer; class token and positions are bare parameters."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        channels, height, columns = shape
        patch = max(2, height // 8)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (height // patch) * (columns // patch), width) * 0.02)
        self.blocks = nn.Sequential(*(PreNorm(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        return self.head(self.norm(self.blocks(h))[:, 0])


class Rows(nn.Module):
    """An image as a sequence of its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Sequence(nn.Module):
    """Tokens of a text, or rows of an image, through a sequence model to the mean over what is no padding."""

    def __init__(self, data: Data, width: int, body: nn.Module, out: int) -> None:
        super().__init__()
        text = data.vocabulary is not None
        rows = 0 if text else data.shape[0] * data.shape[2]
        self.enter = (
            nn.Embedding(data.vocabulary, width, padding_idx=0)
            if text
            else nn.Sequential(Rows(), nn.Linear(rows, width))
        )
        self.body, self.head, self.text = body, nn.Linear(out, len(data.classes)), text

    def forward(self, x: Tensor) -> Tensor:
        padding = x == 0 if self.text else None
        h = self.enter(x)
        h = self.body(h)[0] if isinstance(self.body, nn.RNNBase) else self.body(h, padding)
        if padding is None:
            return self.head(h.mean(1))
        kept = (~padding).unsqueeze(2).to(h)
        return self.head((h * kept).sum(1) / kept.sum(1).clamp_min(1))


class Encoder(nn.Module):
    """Learned positions and Transformer encoder layers."""

    def __init__(self, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None:
            padding = padding & ~padding.all(1, keepdim=True)  # attention to nothing has no value
        return self.layers(x + self.positions, src_key_padding_mask=padding)


class Basic(nn.Module):
    """Two 3 x 3 convolutions and a way around them."""

    wider = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.around = _around(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a way around them."""

    wider = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = self.wider * width
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.around = _around(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x))


def _around(before: int, after: int, stride: int) -> nn.Module:
    if stride == 1 and before == after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


class PreActivation(nn.Module):
    """A block of wide residual networks: norm and activation before each convolution."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
        )  # fmt: skip
        same = stride == 1 and before == width
        self.around = None if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.body(h) + (x if self.around is None else self.around(h))


def cnn(data: Data, shape: Shape) -> nn.Module:
    """Convolutions with pooling, and a linear layer; each image is brought to mean 0 and variance 1 by itself."""
    layers: list[nn.Module] = [nn.LayerNorm(data.shape, elementwise_affine=False)]
    for before, after in itertools.pairwise((data.shape[0], *shape.channels)):
        layers += [nn.Conv2d(before, after, shape.kernel, padding=shape.kernel // 2)]
        layers += [ACTIVATIONS[shape.activation](), nn.MaxPool2d(2)]
    features = nn.Sequential(*layers, nn.Flatten())
    try:
        width = features(torch.zeros(1, *data.shape)).shape[1]
    except RuntimeError as error:
        raise ModelError(f"images of {data.shape} are too small for {len(shape.channels)} poolings") from error
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, len(data.classes)))


def mlp(data: Data, hidden: tuple[int, ...], activation: str) -> nn.Module:
    """Linear layers on the pixels, or on the mean of the tokens' vectors."""
    enter: list[nn.Module] = [nn.Flatten()]
    width = int(torch.tensor(data.shape).prod())
    if data.vocabulary is not None:
        width = hidden[0] if hidden else 64
        enter = [nn.EmbeddingBag(data.vocabulary, width, mode="mean", padding_idx=0)]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((width, *hidden)):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*enter, *layers, nn.Linear(hidden[-1] if hidden else width, len(data.classes)))


def recurrent(kind: str, data: Data, shape: Shape) -> nn.Module:
    """An RNN, LSTM or GRU."""
    width = shape.hidden[-1]
    body = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[kind](width, width, shape.layers, batch_first=True)
    return Sequence(data, width, body, width)


def transformer(data: Data, shape: Shape) -> nn.Module:
    """A Transformer encoder."""
    width = shape.hidden[-1]
    length = data.shape[0] if data.vocabulary is not None else data.shape[1]
    return Sequence(data, width, Encoder(width, shape.layers, shape.heads, length), width)


def vgg(depth: int, data: Data) -> nn.Module:
    """VGG for images of 32 x 32 pixels or more, without norms."""
    layers, before = _large_enough(data, 32), data.shape[0]
    for word in VGG[depth].split():
        if word == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, int(word), 3, padding=1), nn.ReLU()]
            before = int(word)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, len(data.classes)))


def resnet(depth: int, data: Data) -> nn.Module:
    """ResNet; small images get a stem that keeps their size."""
    block = Basic if depth < 50 else Bottleneck
    stem: list[nn.Module] = [nn.Conv2d(data.shape[0], 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    stem += [nn.MaxPool2d(3, 2, 1)]
    if data.shape[1] <= 64:
        stem = [nn.Conv2d(data.shape[0], 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers, before = [*_large_enough(data, 32), *stem], 64
    for stage, count in enumerate(RESNET[depth]):
        for i in range(count):
            layers.append(block(before, 64 * 2**stage, 2 if i == 0 and stage else 1))
            before = 64 * 2**stage * block.wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, len(data.classes)))


def wide_resnet(depth: int, factor: int, data: Data) -> nn.Module:
    """Wide residual network of ``depth`` layers; its blocks are ``factor`` times as wide as the first ones were."""
    if depth < 10 or (depth - 4) % 6 or factor < 1:
        raise ModelError(f"wrn-{depth}-{factor}: the depth must be 6 k + 4, such as 16, 28 or 40")
    layers: list[nn.Module] = [*_large_enough(data, 32), nn.Conv2d(data.shape[0], 16, 3, padding=1, bias=False)]
    before = 16
    for stage in range(3):
        for i in range((depth - 4) // 6):
            layers.append(PreActivation(before, 16 * factor * 2**stage, 2 if i == 0 and stage else 1))
            before = 16 * factor * 2**stage
    layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(before, len(data.classes)))


def _large_enough(data: Data, size: int) -> list[nn.Module]:
    """What scales small images up."""
    return [nn.Upsample((size, size), mode="bilinear")] if min(data.shape[1:]) < size else []


class Channels(nn.Module):
    """A gray image as one of three colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def from_library(library: str, name: str, data: Data, pretrained: bool) -> nn.Module:
    """A network of timm or torchvision, for images of the size it was made for."""
    try:
        package: Any = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError as error:
        raise ModelError(f"{library}:{name} needs the package {library}, which cannot be imported: {error}") from error
    classes, (channels, height, width) = len(data.classes), data.shape
    try:
        if library == "torchvision":
            model = package.get_model(name, weights="DEFAULT" if pretrained else None, num_classes=classes)
            size = max(height, 32)
        else:
            model = package.create_model(name, pretrained=pretrained, num_classes=classes)
            size = model.default_cfg["input_size"][1] if model.default_cfg.get("fixed_input_size") else max(height, 32)
    except Exception as error:  # each has its own errors for unknown names and options
        raise ModelError(f"{library} could not make {name}: {type(error).__name__}: {error}") from error
    scale = [nn.Upsample((size, size), mode="bilinear")] if (size, size) != (height, width) else []
    return nn.Sequential(*scale, *([Channels()] if channels == 1 else []), model)


def make_model(name: str, data: Data, shape: Shape | None = None) -> nn.Module:
    """A network for some data, with every BatchNorm replaced and every parameter trainable.

    Args:
        name: One of `NAMES`, ``wrn-DEPTH-FACTOR``, ``timm:NAME`` or ``torchvision:NAME``.
        data: Gives input shape and classes.
        shape: Widths, depth and activation.

    Returns:
        The network.

    Raises:
        ModelError: If there is no such network, or it cannot be used on such data.
    """
    shape = Shape() if shape is None else shape
    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: mlp(data, (), shape.activation),
        "mlp": lambda: mlp(data, shape.hidden, shape.activation),
        **{kind: lambda kind=kind: recurrent(kind, data, shape) for kind in ("rnn", "lstm", "gru")},
        "transformer": lambda: transformer(data, shape),
    }
    pictures: dict[str, Callable[[], nn.Module]] = {
        "cnn": lambda: cnn(data, shape),
        "vit": lambda: ViT(data.shape, len(data.classes), shape.hidden[-1], shape.layers, shape.heads),
        **{f"resnet{depth}": lambda depth=depth: resnet(depth, data) for depth in RESNET},
        **{f"vgg{depth}": lambda depth=depth: vgg(depth, data) for depth in VGG},
    }
    if wide := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        pictures[name] = lambda: wide_resnet(int(wide[1]), int(wide[2]), data)
    if library := re.fullmatch(r"(timm|torchvision):(.+)", name):
        pictures[name] = lambda: from_library(library[1], library[2], data, shape.pretrained)
    if name not in makers and name not in pictures:
        raise ModelError(f"there is no model {name!r}; there are {', '.join(NAMES)}, timm:NAME and torchvision:NAME")
    if name in pictures and data.vocabulary is not None:
        raise ModelError(f"{name} is for images, and {data.name} are texts; take {', '.join(makers)}")
    if name in ("transformer", "vit") and shape.hidden[-1] % shape.heads:
        raise ModelError(f"a width of {shape.hidden[-1]} cannot be shared by {shape.heads} heads")
    model = replace_batchnorm((makers | pictures)[name]())
    return model.requires_grad_(True)
