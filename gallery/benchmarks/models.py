"""The models of the benchmark suite: each makes a model, a batch ``x``, targets ``y`` and a loss ``[N]``.

Everything is trainable and nothing has dropout or batch statistics, so that all systems compute the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(width: int = 512, depth: int = 2) -> nn.Module:
    """784-512-512-10 with ReLU."""
    widths = [784] + [width] * depth
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def seed_cnn() -> nn.Module:
    """The small CNN of DP-SGD tutorials for 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block of ResNet-18 with group norms."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, c_out)
        same = stride == 1 and c_in == c_out
        self.short = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.GroupNorm(8, c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.short(x))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for 32 x 32 images, with group norms."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
    before = width
    for times, stride in [(1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)]:
        layers.append(Block(before, times * width, stride))
        before = times * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


_VGG = {
    11: [64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0],
    19: [64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0],
}


def vgg(depth: int = 11) -> nn.Module:
    """VGG for 32 x 32 images, without norms."""
    layers: list[nn.Module] = []
    before = 3
    for width in _VGG[depth]:
        if width:
            layers += [nn.Conv2d(before, width, 3, 1, 1), nn.ReLU()]
            before = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def depthwise_cnn(width: int = 64) -> nn.Module:
    """A stem and six depthwise-separable blocks with group norms, for 32 x 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU()]
    before = width
    for times, stride in [(1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (4, 1)]:
        after = times * width
        layers += [nn.Conv2d(before, before, 3, stride, 1, groups=before), nn.GroupNorm(8, before), nn.ReLU()]
        layers += [nn.Conv2d(before, after, 1), nn.GroupNorm(8, after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Encoder(nn.Module):
    """Embedded tokens with positions, Transformer encoder layers, mean over time, a head."""

    def __init__(self, layers: int = 4, width: int = 256, length: int = 128, vocabulary: int = 1000) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()  # as Opacus wants it
        return self.head(self.layers(self.tokens(ids) + self.positions(where)).mean(1))


class Attention(nn.Module):
    """Self-attention from one joint projection."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.joint(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class PreNorm(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    """A GPT-2 of four layers whose output layer is its token embedding."""

    def __init__(self, layers: int = 4, width: int = 256, length: int = 128, vocabulary: int = 2000) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(PreNorm(width, 4, True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()  # as Opacus wants it
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(where))))


class ViT(nn.Module):
    """A small vision transformer; class token and positions are bare parameters."""

    def __init__(self, layers: int = 6, width: int = 192, patch: int = 4, size: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(PreNorm(width, 3, False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        return self.head(self.norm(self.blocks(h))[:, 0])


class LSTM(nn.Module):
    """Embedded tokens, an LSTM of two layers, a head on the last output."""

    def __init__(self, width: int = 256, layers: int = 2, vocabulary: int = 1000) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(ids))[0][:, -1])


def per_class(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example."""
    return F.cross_entropy(output, y, reduction="none")


def per_token(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of each example."""
    return F.cross_entropy(output.transpose(1, 2), y, reduction="none").mean(1)


@dataclass(frozen=True)
class Case:
    """One row of the suite.

    Attributes:
        name: How it is called in tables.
        make: Makes the model.
        batch: Makes ``x`` and ``y`` of N examples.
        n: Number of examples N.
        losses: Loss of each example, ``[N]``, of output and ``y``.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    n: int
    losses: Callable[[Tensor, Tensor], Tensor] = per_class


def images(channels: int, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random images with one of ten classes."""
    return lambda n: (torch.randn(n, channels, size, size), torch.randint(10, (n,)))


def vectors(width: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random vectors with one of ten classes."""
    return lambda n: (torch.randn(n, width), torch.randint(10, (n,)))


def tokens(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random tokens with one of ten classes."""
    return lambda n: (torch.randint(vocabulary, (n, length)), torch.randint(10, (n,)))


def text(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random tokens with the next ones as targets."""

    def batch(n: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(vocabulary, (n, length + 1))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    return batch


SUITE = {
    "mlp": Case("MLP 784-512-512-10, N=256", mlp, vectors(784), 256),
    "seed_cnn": Case("seed CNN, 28x28, N=64", seed_cnn, images(1, 28), 64),
    "resnet18": Case("ResNet-18 (GroupNorm), 32x32, N=32", resnet18, images(3, 32), 32),
    "vgg11": Case("VGG-11, 32x32, N=32", vgg, images(3, 32), 32),
    "depthwise": Case("depthwise-separable CNN, 32x32, N=32", depthwise_cnn, images(3, 32), 32),
    "transformer": Case("Transformer encoder, 4 layers, d=256, T=128, N=16", Encoder, tokens(128, 1000), 16),
    "gpt": Case("GPT-2-like, tied head, 4 layers, d=256, T=128, N=16", GPT, text(128, 2000), 16, per_token),
    "lstm": Case("LSTM, 2 layers, 256, T=64, N=32", LSTM, tokens(64, 1000), 32),
    "vit": Case("ViT, 6 layers, d=192, 65 tokens, N=32", ViT, images(3, 32), 32),
}
