"""The table of module configurations and models that tests run over; rows are lambdas, so collection is cheap."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from perexample import GenericRule, Rule, register_rule


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


@dataclass(frozen=True)
class ModuleCase:
    """One configuration of one module.

    Attributes:
        id: Unique name.
        make: Builds the module.
        x: Builds the inputs, a tuple, for a number of examples.
        n: Number of examples.
        covers: Class that the row is about, by default that of the module.
        forward: How the model is called.
        batch_dim: Axis of the examples, for ``extend``.
        in_axes: The same for each input tensor, 0 by default; ``None`` for what all examples share.
        out_axes: The same for each output tensor.
        cut: Takes example n out of the inputs.
        same_size: Whether the inputs are valid for any n, and rows can be exchanged along ``in_axes``.
    """

    id: str
    make: Callable[[], nn.Module]
    x: Callable[[int], tuple]
    n: int = 5
    covers: type[nn.Module] | None = None
    forward: Callable[..., Any] | None = None
    batch_dim: int = 0
    in_axes: Sequence[int | None] | None = None
    out_axes: Sequence[int] | None = None
    cut: Callable[[tuple, int], tuple] | None = None
    prepare: Callable[[nn.Module], Any] = field(default=lambda model: None)

    def build(self, n: int | None = None) -> tuple[nn.Module, tuple]:
        """The module with random parameters and statistics in float64, and inputs."""
        torch.manual_seed(zlib.crc32(self.id.encode()))
        model = self.make().double()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.6)
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_()
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        self.prepare(model)
        return model, self.x(self.n if n is None else n)

    def run(self, model: nn.Module, inputs: tuple) -> Any:
        return model(*inputs) if self.forward is None else self.forward(model, *inputs)

    def losses(self, output: Any) -> Tensor:
        """Losses of the examples, ``[N]``."""
        outputs = reference.tensors(output)
        axes = [0] * len(outputs) if self.out_axes is None else self.out_axes
        total: Any = 0.0
        for number, (t, axis) in enumerate(zip(outputs, axes, strict=True)):
            t = t.movedim(axis, 0)
            flat = t.reshape(t.shape[0], t.shape[1:].numel())
            fixed = torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device).add(1 + number).mul(1.7).cos()
            total = total + (flat * fixed + flat**2 / 2).sum(1)
        return total

    def loss(self, model: nn.Module, inputs: tuple, reduction: str = "mean") -> Tensor:
        return getattr(self.losses(self.run(model, inputs)), reduction)()

    def reference(self, model: nn.Module, inputs: tuple, n: int | None = None) -> dict[str, Tensor]:
        """Gradients ``[N, *p.shape]`` from one backward per example."""
        cut = self.cut or (lambda inputs, i: reference.example(inputs, i, self.in_axes))
        n = self.n if n is None else n
        losses = lambda output, _: self.losses(output).sum()  # noqa: E731
        return reference.grad_batch(model, losses, inputs, n, cut=cut, forward=lambda _, *one: self.run(model, one))


class ModelCase(ModuleCase):
    """A small model in which parameters are shared, frozen, unused, or outputs changed in place."""


_SIZES = itertools.cycle((5, 2, 5, 1, 2))


def _n(n: int | None) -> int:
    return next(_SIZES) if n is None else n


def _name(options: dict[str, Any]) -> str:
    return "".join(f"-{key}={value}".replace(" ", "").replace("'", "") for key, value in options.items())


# ---------------------------------------------------------------------------------------------------------- linear


def linear(i: int, o: int, *extra: int, n: int | None = None, x: Callable | None = None, tag: str = "", **options: Any):
    n = _n(n)
    shape = "x".join(map(str, ("N", *extra, i)))
    return ModuleCase(
        f"linear-{shape}-{o}{_name(options)}{tag}-n{n}",
        lambda: nn.Linear(i, o, **options),
        x or (lambda n: (rand(n, *extra, i),)),
        n,
    )


def bilinear(i: int, j: int, o: int, *extra: int, n: int | None = None, **options: Any):
    n = _n(n)
    return ModuleCase(
        f"bilinear-{i}-{j}-{o}-extra{len(extra)}{_name(options)}-n{n}",
        lambda: nn.Bilinear(i, j, o, **options),
        lambda n: (rand(n, *extra, i), rand(n, *extra, j)),
        n,
    )


LINEAR = [
    linear(4, 3),
    linear(4, 3, n=0),
    linear(4, 3, n=1),
    linear(4, 3, bias=False),
    linear(4, 3, n=0, bias=False),
    linear(1, 3),
    linear(4, 1),
    linear(1, 1),
    linear(4, 3, 6),
    linear(4, 3, 6, bias=False),
    linear(4, 3, 6, n=0),
    linear(4, 3, 6, n=1),
    linear(4, 3, 1),
    linear(4, 3, 0, n=3),
    linear(4, 3, 2, 3),
    linear(4, 3, 2, 3, bias=False),
    linear(4, 3, 2, 3, n=0),
    linear(4, 3, 2, 2, 3),
    linear(4, 3, 2, 2, 3, bias=False),
    linear(4, 3, 5, n=5, tag="-square"),
    linear(3, 3, 3, n=3, tag="-cube"),
    linear(16, 16, 3, tag="-gram"),
    linear(24, 20, 2, bias=False, tag="-gram"),
    linear(8, 8, 3, tag="-blocks"),
    linear(3, 4, 20, tag="-kept"),
    linear(16, 16, 3, n=0, tag="-gram"),
    linear(4, 3, 6, tag="-transposed", x=lambda n: (rand(n, 4, 6).transpose(1, 2),)),
    linear(4, 3, tag="-strided", x=lambda n: (rand(n, 8)[:, ::2],)),
    linear(4, 3, 6, tag="-expanded", x=lambda n: (rand(n, 1, 4).expand(n, 6, 4),)),
    linear(4, 3, tag="-column-major", x=lambda n: (rand(4, n).T,)),
    bilinear(3, 4, 2),
    bilinear(3, 4, 2, n=0),
    bilinear(3, 4, 2, n=1),
    bilinear(3, 4, 2, bias=False),
    bilinear(3, 4, 2, 5),
    bilinear(3, 4, 2, 5, bias=False),
    bilinear(3, 4, 2, 2, 3),
    bilinear(3, 4, 2, 2, 3, n=0),
    bilinear(1, 4, 1),
    bilinear(4, 4, 9, 2),
]


# ----------------------------------------------------------------------------------------------------- convolutions

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda t: t.contiguous(memory_format=torch.channels_last_3d),
    "permuted": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "example-last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda t: torch.cat([t, t], -1)[..., ::2],
    "expanded": lambda t: t[:, :, :1].expand(t.shape),
}


def conv(
    channels: tuple[int, int], kernel: Any, size: int | tuple[int, ...], dims: int = 0, n: int | None = None,
    layout: str = "", transposed: bool = False, tag: str = "", **options: Any,
):  # fmt: skip
    n = _n(n)
    size = (size,) * dims if isinstance(size, int) else size
    cls = (_TRANSPOSED if transposed else _CONV)[len(size)]
    place = _LAYOUTS[layout] if layout else lambda t: t
    shape = "x".join(map(str, size))
    return ModuleCase(
        f"{cls.__name__.lower()}-{channels[0]}-{channels[1]}-k{kernel}-{shape}{_name(options)}-{layout}{tag}-n{n}".replace(
            " ", ""
        ),
        lambda: cls(*channels, kernel, **options),
        lambda n: (place(rand(n, channels[0], *size)),),
        n,
    )


def transposed(channels: tuple[int, int], kernel: Any, size: int | tuple[int, ...], dims: int = 0, **options: Any):
    return conv(channels, kernel, size, dims, transposed=True, **options)


CONV1D = [
    conv((2, 3), 3, 8, 1),
    conv((2, 3), 3, 8, 1, n=0),
    conv((2, 3), 3, 8, 1, n=1),
    conv((2, 3), 1, 8, 1),
    conv((2, 3), 8, 8, 1, tag="-one-window"),
    conv((2, 3), 3, 8, 1, bias=False),
    conv((2, 3), 3, 8, 1, stride=2),
    conv((2, 3), 3, 9, 1, stride=2, tag="-left-over"),
    conv((2, 3), 2, 9, 1, stride=4),
    conv((2, 3), 3, 8, 1, padding=2),
    conv((2, 3), 3, 8, 1, padding=1, stride=3),
    conv((2, 3), 3, 8, 1, dilation=2),
    conv((2, 3), 3, 11, 1, dilation=3, stride=2, padding=2),
    conv((4, 6), 3, 8, 1, groups=2),
    conv((4, 6), 3, 8, 1, n=0, groups=2),
    conv((4, 6), 3, 8, 1, groups=2, bias=False, stride=2),
    conv((4, 4), 3, 8, 1, groups=4),
    conv((3, 6), 3, 8, 1, groups=3),
    conv((2, 3), 3, 8, 1, padding="same"),
    conv((2, 3), 4, 8, 1, padding="same"),
    conv((2, 3), 2, 8, 1, padding="same", dilation=3),
    conv((2, 3), 3, 8, 1, padding="same", dilation=2),
    conv((2, 3), 4, 9, 1, padding="same", padding_mode="reflect"),
    conv((2, 3), 3, 8, 1, padding="valid"),
    conv((2, 3), 3, 8, 1, padding="valid", padding_mode="circular"),
    conv((2, 3), 3, 8, 1, padding=2, padding_mode="reflect"),
    conv((2, 3), 3, 8, 1, padding=2, padding_mode="replicate"),
    conv((2, 3), 3, 8, 1, padding=2, padding_mode="circular"),
    conv((2, 3), 3, 8, 1, n=0, padding=2, padding_mode="circular"),
    conv((2, 3), 3, 8, 1, layout="permuted"),
    conv((2, 3), 3, 8, 1, layout="example-last"),
    conv((2, 3), 3, 8, 1, layout="strided"),
    conv((2, 3), 3, 8, 1, layout="expanded"),
    conv((16, 16), 5, 80, 1, n=2, tag="-native"),
    conv((16, 32), 5, 150, 1, n=2, groups=2, stride=2, tag="-native"),
    conv((24, 24), 3, 5, 1, tag="-gram"),
    conv((32, 32), 3, 6, 1, groups=2, padding=1, stride=2, tag="-gram"),
]

CONV2D = [
    conv((2, 3), 3, 6, 2),
    conv((2, 3), 3, 6, 2, n=0),
    conv((2, 3), 3, 6, 2, n=1),
    conv((2, 3), 1, 6, 2),
    conv((2, 3), 6, 6, 2, tag="-one-window"),
    conv((2, 3), (2, 3), (5, 6)),
    conv((2, 3), (1, 4), (5, 6)),
    conv((2, 3), 3, 6, 2, bias=False),
    conv((2, 3), 3, 6, 2, stride=2),
    conv((2, 3), 3, 7, 2, stride=3, tag="-left-over"),
    conv((2, 3), 2, (6, 7), stride=(2, 3)),
    conv((2, 3), 3, 6, 2, padding=1),
    conv((2, 3), (3, 5), (6, 5), padding=(0, 2)),
    conv((2, 3), 3, (8, 9), dilation=(2, 3)),
    conv((2, 3), (3, 2), (8, 9), dilation=(2, 1), stride=(1, 2), padding=(2, 0)),
    conv((2, 3), 3, 6, 2, n=0, stride=2, padding=1, dilation=2),
    conv((4, 6), 3, 6, 2, groups=2),
    conv((4, 6), 3, 6, 2, n=0, groups=2),
    conv((4, 6), (3, 2), 6, 2, groups=2, stride=2, padding=1, bias=False),
    conv((4, 4), 3, 6, 2, groups=4),
    conv((4, 4), 3, 6, 2, groups=4, dilation=2, padding=2),
    conv((3, 6), 3, 6, 2, groups=3),
    conv((2, 8), 2, 5, 2, groups=2, stride=2),
    conv((2, 3), 3, 5, 2, padding="same"),
    conv((2, 3), 4, 5, 2, padding="same"),
    conv((2, 3), (2, 3), 5, 2, padding="same"),
    conv((2, 3), (2, 4), 6, 2, padding="same", dilation=(3, 1)),
    conv((2, 3), 3, 6, 2, padding="same", dilation=2),
    conv((4, 4), 2, 6, 2, padding="same", groups=2),
    conv((2, 3), 2, 6, 2, padding="same", padding_mode="replicate"),
    conv((2, 3), 3, 6, 2, padding="same", padding_mode="circular"),
    conv((2, 3), 3, 5, 2, padding="valid"),
    conv((2, 3), 3, 6, 2, padding=1, padding_mode="zeros"),
    conv((2, 3), 3, 6, 2, padding=(1, 2), padding_mode="reflect"),
    conv((2, 3), 3, 6, 2, padding=(1, 2), padding_mode="replicate"),
    conv((2, 3), 3, 6, 2, padding=(1, 2), padding_mode="circular"),
    conv((4, 4), 3, 6, 2, padding=(2, 0), padding_mode="reflect", groups=2, stride=2),
    conv((2, 3), 3, 6, 2, padding=1, padding_mode="circular", stride=2, dilation=2),
    conv((2, 3), 3, 6, 2, layout="channels_last"),
    conv((2, 3), 3, 6, 2, layout="channels_last", padding=1, stride=2),
    conv((4, 4), 3, 6, 2, layout="channels_last", groups=4),
    conv((2, 3), 3, 6, 2, layout="permuted"),
    conv((2, 3), 3, 6, 2, layout="example-last"),
    conv((2, 3), 3, 6, 2, layout="strided"),
    conv((2, 3), 3, 6, 2, layout="expanded"),
    conv((8, 16), 3, 10, 2, n=2, tag="-native"),
    conv((8, 16), 3, 20, 2, n=2, stride=2, padding=1, tag="-native"),
    conv((8, 32), 3, 9, 2, n=2, groups=2, padding=1, bias=False, tag="-native"),
    conv((8, 16), 3, 12, 2, n=2, dilation=2, layout="channels_last", tag="-native"),
    conv((8, 16), 3, 10, 2, n=2, padding="same", padding_mode="reflect", tag="-native"),
    conv((16, 16), 3, 4, 2, tag="-gram"),
    conv((16, 16), 3, 6, 2, stride=2, padding=1, bias=False, tag="-gram"),
    conv((32, 32), 3, 4, 2, groups=2, tag="-gram"),
    conv((16, 16), 3, 4, 2, n=0, tag="-gram"),
    conv((8, 8), 3, 4, 2, layout="channels_last", tag="-between"),
]

CONV3D = [
    conv((2, 3), 2, 4, 3),
    conv((2, 3), 2, 4, 3, n=0),
    conv((2, 3), 2, 4, 3, n=1),
    conv((2, 3), 1, 3, 3),
    conv((2, 3), 2, 4, 3, bias=False),
    conv((2, 3), (1, 2, 3), (3, 4, 5)),
    conv((2, 3), 2, 5, 3, stride=2),
    conv((2, 3), 2, (4, 5, 6), stride=(1, 2, 3)),
    conv((2, 3), 3, 3, 3, padding=1),
    conv((2, 3), (3, 2, 1), (3, 4, 4), padding=(2, 1, 0), stride=(2, 1, 2)),
    conv((2, 3), 2, 5, 3, dilation=(2, 1, 3)),
    conv((4, 6), 2, 4, 3, groups=2),
    conv((4, 4), 2, 4, 3, groups=4),
    conv((2, 6), 2, 4, 3, groups=2, stride=2),
    conv((2, 3), 3, 4, 3, padding="same"),
    conv((2, 3), 2, 4, 3, padding="same"),
    conv((2, 3), (2, 3, 2), 4, 3, padding="same", dilation=(1, 2, 3)),
    conv((2, 3), 2, 4, 3, padding="valid"),
    conv((2, 3), 2, 4, 3, padding=1, padding_mode="reflect"),
    conv((2, 3), 2, 4, 3, padding=(0, 1, 2), padding_mode="replicate"),
    conv((2, 3), 2, 4, 3, padding=(2, 1, 0), padding_mode="circular"),
    conv((2, 3), 2, 4, 3, layout="channels_last_3d"),
    conv((2, 3), 2, 4, 3, layout="channels_last_3d", stride=2, padding=1),
    conv((2, 3), 2, 4, 3, layout="permuted"),
    conv((2, 3), 2, 4, 3, layout="example-last"),
    conv((8, 16), 2, 5, 3, n=2, tag="-native"),
    conv((8, 16), 2, 8, 3, n=2, stride=2, padding=1, groups=1, tag="-native"),
    conv((8, 8), 3, 4, 3, tag="-gram"),
    conv((16, 16), 3, 4, 3, groups=2, tag="-gram", n=2),
]

TRANSPOSED = [
    transposed((2, 3), 3, 5, 1),
    transposed((2, 3), 3, 5, 1, n=0),
    transposed((2, 3), 3, 5, 1, n=1),
    transposed((2, 3), 3, 5, 1, bias=False),
    transposed((2, 3), 3, 5, 1, stride=2),
    transposed((2, 3), 2, 5, 1, stride=3),
    transposed((2, 3), 3, 5, 1, padding=1),
    transposed((2, 3), 3, 5, 1, stride=2, padding=1, output_padding=1),
    transposed((2, 3), 3, 5, 1, stride=3, output_padding=2),
    transposed((2, 3), 3, 5, 1, dilation=2),
    transposed((2, 3), 3, 5, 1, dilation=3, output_padding=2),
    transposed((2, 3), 2, 5, 1, dilation=3, stride=2, padding=2, output_padding=2),
    transposed((4, 6), 3, 5, 1, groups=2),
    transposed((4, 4), 3, 5, 1, groups=4, stride=2, output_padding=1),
    transposed((2, 6), 3, 5, 1, groups=2),
    transposed((2, 3), 3, 5, 1, layout="permuted"),
    transposed((16, 16), 5, 70, 1, n=2, tag="-native"),
    transposed((24, 24), 3, 4, 1, stride=2, output_padding=1, tag="-gram"),
    transposed((2, 3), 3, 4, 2),
    transposed((2, 3), 3, 4, 2, n=0),
    transposed((2, 3), 3, 4, 2, bias=False),
    transposed((2, 3), (2, 3), (4, 5), stride=(2, 1)),
    transposed((2, 3), 3, 4, 2, stride=2, padding=1),
    transposed((2, 3), 3, (4, 3), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
    transposed((2, 3), 2, 4, 2, dilation=(2, 3)),
    transposed((2, 3), 2, 4, 2, dilation=(2, 3), output_padding=(1, 2), n=0),
    transposed((2, 3), (3, 2), 4, 2, dilation=(2, 3), output_padding=(1, 2), stride=(1, 2), padding=(2, 0)),
    transposed((4, 6), 3, 4, 2, groups=2),
    transposed((4, 4), 3, 4, 2, groups=4, stride=2),
    transposed((3, 6), 2, 4, 2, groups=3, padding=1, bias=False),
    transposed((2, 3), 3, 4, 2, layout="channels_last"),
    transposed((2, 3), 3, 4, 2, layout="channels_last", stride=2, padding=1, output_padding=1),
    transposed((2, 3), 3, 4, 2, layout="permuted"),
    transposed((2, 3), 3, 4, 2, layout="strided"),
    transposed((16, 8), 3, 9, 2, n=2, stride=2, padding=1, output_padding=1, tag="-native"),
    transposed((16, 16), 3, 9, 2, n=2, groups=2, tag="-native"),
    transposed((16, 16), 3, 3, 2, tag="-gram"),
    ModuleCase(
        "convtranspose2d-output_size",
        lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1),
        lambda n: (rand(n, 2, 4, 4),),
        forward=lambda model, x: model(x, output_size=[8, 7]),
    ),
    transposed((2, 3), 2, 3, 3),
    transposed((2, 3), 2, 3, 3, n=0),
    transposed((2, 3), 2, 3, 3, bias=False),
    transposed((2, 3), (1, 2, 3), (3, 2, 3), stride=(1, 2, 3)),
    transposed((2, 3), 3, 3, 3, stride=2, padding=1, output_padding=1),
    transposed((2, 3), 2, 3, 3, dilation=(1, 2, 3), output_padding=(0, 1, 2)),
    transposed((2, 3), 2, 3, 3, dilation=2, stride=(1, 2, 1), padding=(0, 1, 2), output_padding=1),
    transposed((4, 6), 2, 3, 3, groups=2),
    transposed((4, 4), 2, 3, 3, groups=4, stride=2),
    transposed((2, 3), 2, 3, 3, layout="channels_last_3d"),
    transposed((2, 3), 2, 3, 3, layout="permuted"),
]


# -------------------------------------------------------------------------------------------------------- embeddings


def embedding(
    *positions: int, n: int | None = None, dtype: torch.dtype = torch.long, v: int = 6, tag: str = "", **options
):
    n = _n(n)
    return ModuleCase(
        f"embedding-{'x'.join(map(str, ('N', *positions)))}-v{v}{_name(options)}{tag}-n{n}",
        lambda: nn.Embedding(v, 3, **options),
        lambda n: (ids(v, n, *positions).to(dtype),),
        n,
    )


def bag(x: Callable[[int], tuple], tag: str, n: int | None = None, **options: Any):
    """A bag of a two-dimensional input, one row per example."""
    n = _n(n)
    return ModuleCase(f"embeddingbag-{tag}{_name(options)}-n{n}", lambda: nn.EmbeddingBag(6, 3, **options), x, n)


_LENGTHS = (3, 0, 1, 4, 0, 2)


def _offsets(n: int, last: bool = False) -> Tensor:
    ends = [0, *itertools.accumulate(_LENGTHS[:n])]
    return torch.tensor(ends if last else ends[:-1], dtype=torch.long)


def _ragged(n: int, high: int = 6) -> Tensor:
    return ids(high, sum(_LENGTHS[:n]))


def _cut_bags(inputs: tuple, i: int) -> tuple:
    """One bag out of ``(ids, offsets, *others)``; weights are cut as ids are, what has N rows by its row."""
    flat, offsets, *others = inputs
    ends = torch.cat([offsets, torch.tensor([len(flat)])])
    start, stop = int(ends[i]), int(ends[i + 1])
    rest = [t[start:stop] if t.dim() == 1 else t[i : i + 1] for t in others]
    return flat[start:stop], torch.tensor([0]), *rest


class BagByFunction(nn.Module):
    """A bag that is looked up by a function, in a table that may be frozen."""

    def __init__(self, frozen: bool = False, **options: Any) -> None:
        super().__init__()
        self.table, self.scale, self.options = nn.Embedding(6, 3), nn.Linear(3, 2), options
        self.table.requires_grad_(not frozen)

    def forward(self, flat: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
        weight = self.table.weight
        return self.scale(F.embedding_bag(flat, weight, offsets, per_sample_weights=weights, **self.options))


def offset_bag(
    tag: str,
    weighted: bool = False,
    high: int = 6,
    n: int = 5,
    ids_of: Callable | None = None,
    make: Callable = lambda **options: nn.EmbeddingBag(6, 3, **options),
    **options: Any,
):
    """A bag of one-dimensional ids with offsets, some bags empty."""

    def x(n: int) -> tuple:
        flat = ids_of(n) if ids_of else _ragged(n, high)
        return (flat, _offsets(n), rand(len(flat))) if weighted else (flat, _offsets(n))

    name = f"embeddingbag-offsets-{tag}{_name(options)}-n{n}"
    return ModuleCase(name, lambda: make(**options), x, n, covers=nn.EmbeddingBag, cut=_cut_bags)


class BagWithFeatures(nn.Module):
    """A bag whose offsets have one entry more than there are examples; dense features say how many there are."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 3, include_last_offset=True, **options)

    def forward(self, flat: Tensor, offsets: Tensor, features: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.bag(flat, offsets, weights) * features


def last_offset_bag(weighted: bool = False, n: int = 5, tail: int = 0, alone: bool = False, **options: Any):
    """Offsets that include the end; ``tail`` ids after it belong to no bag. ``alone``: nothing has a row for each."""

    def x(n: int) -> tuple:
        flat = torch.cat([_ragged(n), ids(6, tail)])
        inputs = (flat, _offsets(n, last=True), *(() if alone else (rand(n, 3),)))
        return (*inputs, rand(len(flat))) if weighted else inputs

    def cut(inputs: tuple, i: int) -> tuple:
        flat, offsets, *others = inputs
        start, stop = int(offsets[i]), int(offsets[i + 1])
        rest = [t[start:stop] if t.dim() == 1 else t[i : i + 1] for t in others]
        return flat[start:stop], torch.tensor([0, stop - start]), *rest

    name = f"embeddingbag-last-offset-{'weighted-' * weighted}{'alone-' * alone}tail{tail}{_name(options)}-n{n}"
    if not alone:
        return ModuleCase(name, lambda: BagWithFeatures(**options), x, n, nn.EmbeddingBag, cut=cut)
    make = lambda: nn.EmbeddingBag(6, 3, include_last_offset=True, **options)  # noqa: E731
    return ModuleCase(name, make, x, n, nn.EmbeddingBag, cut=cut)


def _repeated(n: int) -> Tensor:
    return torch.tensor([2, 2, 4])[ids(3, sum(_LENGTHS[:n]))]


EMBEDDING = [
    embedding(),
    embedding(n=0),
    embedding(n=1),
    embedding(4),
    embedding(4, n=0),
    embedding(0, n=3),
    embedding(2, 3),
    embedding(2, 3, n=0),
    embedding(4, padding_idx=2),
    embedding(4, padding_idx=0, n=5),
    embedding(4, padding_idx=-1),
    embedding(2, 3, padding_idx=-6),
    embedding(padding_idx=1, n=5),
    embedding(4, v=1, padding_idx=0, tag="-all-padding"),
    embedding(4, sparse=True),
    embedding(sparse=True, n=5),
    embedding(2, 3, sparse=True, padding_idx=3),
    embedding(4, sparse=True, n=0),
    embedding(4, dtype=torch.int32, tag="-int32"),
    embedding(4, dtype=torch.int32, padding_idx=2, tag="-int32"),
    embedding(8, v=2, n=5, tag="-repeated"),
    embedding(3, v=1, tag="-one-row"),
    embedding(5, n=5, tag="-square"),
    ModuleCase("embedding-transposed-ids", lambda: nn.Embedding(6, 3), lambda n: (ids(6, 4, n).T,)),
    ModuleCase("embedding-expanded-ids", lambda: nn.Embedding(6, 3), lambda n: (ids(6, n, 1).expand(n, 4),)),
    *(
        bag(x, tag, **options, **mode)
        for mode in ({"mode": "sum"}, {"mode": "mean"}, {"mode": "max"})
        for tag, x, options in (
            ("N4", lambda n: (ids(6, n, 4),), {}),
            ("N4-empty-batch", lambda n: (ids(6, n, 4),), {"n": 0}),
            ("N8-repeated", lambda n: (ids(2, n, 8),), {"n": 5}),
            ("N4-padding", lambda n: (ids(4, n, 4),), {"padding_idx": 2, "n": 5}),
            ("N2-all-padding", lambda n: (ids(2, n, 2),), {"padding_idx": -6, "n": 5}),
            ("N4-int32", lambda n: (ids(6, n, 4).int(),), {}),
        )
    ),
    bag(lambda n: (ids(6, n, 4), None, rand(n, 4)), "N4-weighted", mode="sum"),
    bag(lambda n: (ids(3, n, 4), None, rand(n, 4)), "N4-weighted", mode="sum", padding_idx=1, n=5),
    bag(lambda n: (ids(6, n, 4),), "N4", mode="sum", sparse=True),
    bag(lambda n: (ids(6, n, 4),), "N4", mode="mean", sparse=True, padding_idx=2),
    offset_bag("plain", mode="sum"),
    offset_bag("plain", mode="mean"),
    offset_bag("plain", mode="max"),
    offset_bag("repeated", mode="sum", ids_of=_repeated),
    offset_bag("repeated", mode="mean", ids_of=_repeated),
    offset_bag("repeated", mode="max", ids_of=_repeated),
    offset_bag("padding", mode="sum", high=3, padding_idx=1),
    offset_bag("padding", mode="mean", high=3, padding_idx=1),
    offset_bag("padding", mode="max", high=3, padding_idx=1),
    offset_bag("weighted", mode="sum", weighted=True),
    offset_bag("weighted", mode="sum", weighted=True, high=3, padding_idx=0),
    offset_bag("sparse", mode="sum", sparse=True),
    offset_bag("int32", mode="mean", ids_of=lambda n: _ragged(n).int(), n=1),
    *(
        offset_bag(f"by-function-{name}", n=n, make=BagByFunction, **options)
        for name, options in {
            "sum": {"mode": "sum"},
            "mean": {"mode": "mean", "padding_idx": -5, "high": 3},
            "max": {"mode": "max"},
            "weighted": {"mode": "sum", "weighted": True},
            "frozen": {"mode": "mean", "frozen": True},
        }.items()
        for n in (2, 5)
    ),
    last_offset_bag(mode="sum"),
    last_offset_bag(mode="mean"),
    last_offset_bag(mode="max"),
    last_offset_bag(mode="sum", alone=True),
    last_offset_bag(mode="mean", n=3, alone=True),  # as many offsets as ids
    last_offset_bag(mode="sum", n=3, alone=True, weighted=True),
    last_offset_bag(mode="sum", n=1, alone=True),
    last_offset_bag(mode="sum", weighted=True),
    last_offset_bag(mode="sum", padding_idx=3, weighted=True),
]


# ------------------------------------------------------------------------------------------------------------- norms


def layer_norm(cls: type[nn.Module], shape: tuple[int, ...], *extra: int, n: int | None = None, **options: Any):
    n = _n(n)
    return ModuleCase(
        f"{cls.__name__.lower()}-{shape}-extra{len(extra)}{_name(options)}-n{n}".replace(" ", ""),
        lambda: cls(shape, **options),
        lambda n: (rand(n, *extra, *shape),),
        n,
    )


def channel_norm(cls: type[nn.Module], channels: Any, *size: int, n: int | None = None, **options: Any):
    """GroupNorm, InstanceNorm and BatchNorm, these two in evaluation mode if they have statistics."""
    n = _n(n)
    c = channels[1] if isinstance(channels, tuple) else channels
    arguments = channels if isinstance(channels, tuple) else (channels,)
    return ModuleCase(
        f"{cls.__name__.lower()}-{channels}-{len(size)}d{_name(options)}-n{n}".replace(" ", ""),
        lambda: cls(*arguments, **options).eval(),
        lambda n: (rand(n, c, *size),),
        n,
    )


def before_linear(case_id: str, cls: type[nn.Module], make: Callable[[], nn.Module], *shape: int, n: int = 5):
    """A norm without parameters, followed by a layer that has some."""
    return ModuleCase(
        case_id, lambda: nn.Sequential(make(), nn.Linear(shape[-1], 2)).eval(), lambda n: (rand(n, *shape),), n, cls
    )


NORM = [
    layer_norm(nn.LayerNorm, (4,)),
    layer_norm(nn.LayerNorm, (4,), n=0),
    layer_norm(nn.LayerNorm, (4,), n=1),
    layer_norm(nn.LayerNorm, (4,), bias=False),
    layer_norm(nn.LayerNorm, (4,), 5),
    layer_norm(nn.LayerNorm, (4,), 5, n=0),
    layer_norm(nn.LayerNorm, (4,), 2, 3, bias=False),
    layer_norm(nn.LayerNorm, (4,), 2, 2, 3, n=2),
    layer_norm(nn.LayerNorm, (3, 4)),
    layer_norm(nn.LayerNorm, (3, 4), 2),
    layer_norm(nn.LayerNorm, (3, 4), 2, 2, eps=0.1),
    layer_norm(nn.LayerNorm, (2, 3, 4)),
    layer_norm(nn.LayerNorm, (2, 3, 4), 2, bias=False),
    layer_norm(nn.LayerNorm, (2, 3, 4), 2, n=0),
    before_linear("layernorm-no-affine", nn.LayerNorm, lambda: nn.LayerNorm(4, elementwise_affine=False), 3, 4),
    layer_norm(nn.RMSNorm, (4,)),
    layer_norm(nn.RMSNorm, (4,), n=0),
    layer_norm(nn.RMSNorm, (4,), n=1),
    layer_norm(nn.RMSNorm, (4,), 5, eps=0.1),
    layer_norm(nn.RMSNorm, (3, 4), eps=1e-3),
    layer_norm(nn.RMSNorm, (3, 4), 2, 2),
    layer_norm(nn.RMSNorm, (2, 3, 4), 2, eps=1e-5, n=2),
    before_linear("rmsnorm-no-affine", nn.RMSNorm, lambda: nn.RMSNorm(4, elementwise_affine=False), 3, 4),
    channel_norm(nn.GroupNorm, (2, 4)),
    channel_norm(nn.GroupNorm, (2, 4), n=0),
    channel_norm(nn.GroupNorm, (2, 4), 5),
    channel_norm(nn.GroupNorm, (1, 4), 5, n=1),
    channel_norm(nn.GroupNorm, (4, 4), 5, eps=0.1),
    channel_norm(nn.GroupNorm, (2, 4), 3, 3),
    channel_norm(nn.GroupNorm, (2, 4), 3, 3, n=0),
    channel_norm(nn.GroupNorm, (2, 6), 2, 2, 3),
    before_linear("groupnorm-no-affine", nn.GroupNorm, lambda: nn.GroupNorm(2, 4, affine=False), 4, 3),
    channel_norm(nn.InstanceNorm1d, 3, 5, affine=True),
    channel_norm(nn.InstanceNorm1d, 3, 5, affine=True, n=1),
    channel_norm(nn.InstanceNorm1d, 3, 5, affine=True, eps=0.1),
    channel_norm(nn.InstanceNorm1d, 3, 5, affine=True, track_running_stats=True),
    channel_norm(nn.InstanceNorm2d, 3, 4, 5, affine=True),
    channel_norm(nn.InstanceNorm2d, 3, 4, 5, affine=True, track_running_stats=True),
    channel_norm(nn.InstanceNorm2d, 3, 4, 5, affine=True, n=1),
    channel_norm(nn.InstanceNorm3d, 3, 2, 3, 2, affine=True),
    channel_norm(nn.InstanceNorm3d, 3, 2, 3, 2, affine=True, track_running_stats=True, n=5),
    before_linear("instancenorm1d-no-affine", nn.InstanceNorm1d, lambda: nn.InstanceNorm1d(3), 3, 5),
    before_linear("instancenorm2d-no-affine", nn.InstanceNorm2d, lambda: nn.InstanceNorm2d(3), 3, 2, 5),
    ModuleCase(
        "instancenorm1d-training", lambda: nn.InstanceNorm1d(3, affine=True).train(), lambda n: (rand(n, 3, 5),)
    ),
    channel_norm(nn.BatchNorm1d, 4),
    channel_norm(nn.BatchNorm1d, 4, n=0),
    channel_norm(nn.BatchNorm1d, 4, n=1),
    channel_norm(nn.BatchNorm1d, 4, 5),
    channel_norm(nn.BatchNorm1d, 4, 5, n=0),
    channel_norm(nn.BatchNorm1d, 4, 5, eps=0.1),
    channel_norm(nn.BatchNorm2d, 4, 3, 3),
    channel_norm(nn.BatchNorm2d, 4, 3, 3, n=0),
    channel_norm(nn.BatchNorm2d, 4, 3, 3, momentum=None, n=5),
    channel_norm(nn.BatchNorm3d, 4, 2, 3, 2),
    channel_norm(nn.BatchNorm3d, 4, 2, 3, 2, n=0),
    channel_norm(nn.SyncBatchNorm, 4),
    channel_norm(nn.SyncBatchNorm, 4, 5),
    channel_norm(nn.SyncBatchNorm, 4, 3, 3),
    before_linear("batchnorm1d-no-affine", nn.BatchNorm1d, lambda: nn.BatchNorm1d(4, affine=False), 4),
    before_linear("batchnorm1d-no-affine-3d", nn.BatchNorm1d, lambda: nn.BatchNorm1d(4, affine=False), 4, 5),
    before_linear("batchnorm2d-no-affine", nn.BatchNorm2d, lambda: nn.BatchNorm2d(4, affine=False), 4, 3, 3),
]


# ------------------------------------------------------------------------------------------------------------- prelu


def prelu(c: int, *shape: int, n: int | None = None):
    n = _n(n)
    return ModuleCase(f"prelu-{c}-{len(shape) + 1}d-n{n}", lambda: nn.PReLU(c), lambda n: (rand(n, *shape),), n)


PRELU = [
    prelu(1),
    prelu(1, n=0),
    prelu(1, 4),
    prelu(1, 4, n=1),
    prelu(1, 4, 5),
    prelu(1, 4, 5, n=0),
    prelu(1, 4, 3, 3),
    prelu(4, 4),
    prelu(4, 4, n=0),
    prelu(4, 4, 5),
    prelu(4, 4, 3, 3),
    prelu(4, 4, 2, 2, 3),
]


# --------------------------------------------------------------------------------------------------------- recurrent


def recurrent(
    cls: type[nn.Module], n: int | None = None, state: bool = False, out: int = 4, t: int = 3, **options: Any
):
    n = _n(n)
    axis = 0 if options.get("batch_first") else 1
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    states = 2 if cls is nn.LSTM else 1

    def x(n: int) -> tuple:
        sequence = rand(n, t, 3) if axis == 0 else rand(t, n, 3)
        sizes = (options.get("proj_size") or 4, 4)
        initial = tuple(rand(layers, n, size) for size in sizes[:states])
        return (sequence, initial if states == 2 else initial[0]) if state else (sequence,)

    return ModuleCase(
        f"{cls.__name__.lower()}{'-state' if state else ''}-t{t}{_name(options)}-n{n}",
        lambda: cls(3, 4, **options),
        x,
        n,
        batch_dim=axis,
        in_axes=(axis, *[1] * states) if state else (axis,),
        out_axes=(axis, *[1] * states),
    )


RECURRENT = [
    row
    for cls in (nn.RNN, nn.LSTM, nn.GRU)
    for row in (
        recurrent(cls),
        recurrent(cls, n=1),
        recurrent(cls, batch_first=True),
        recurrent(cls, batch_first=True, bias=False),
        recurrent(cls, bidirectional=True, n=2),
        recurrent(cls, bidirectional=True, batch_first=True, n=2),
        recurrent(cls, num_layers=2, n=2),
        recurrent(cls, num_layers=2, bidirectional=True, batch_first=True, n=2),
        recurrent(cls, state=True, n=5),
        recurrent(cls, state=True, batch_first=True, n=5),
        recurrent(cls, t=5, n=5),
        recurrent(cls, t=5, n=5, batch_first=True),
    )
] + [
    recurrent(nn.RNN, nonlinearity="relu", batch_first=True, n=2),
    recurrent(nn.LSTM, proj_size=2, batch_first=True, n=2),
    recurrent(nn.LSTM, proj_size=2, state=True, n=2),
]


def cell(cls: type[nn.Module], *, states: int = 1, state: bool = False, n: int = 3, **options: Any) -> ModuleCase:
    """One step of a recurrent cell, with or without an initial state."""

    def x(n: int) -> tuple:
        initial = tuple(rand(n, 4) for _ in range(states))
        return (rand(n, 3), initial if states == 2 else initial[0]) if state else (rand(n, 3),)

    name = f"{cls.__name__.lower()}{'-state' if state else ''}{_name(options)}-n{n}"
    return ModuleCase(name, lambda: cls(3, 4, **options), x, n)


RECURRENT += [
    row
    for cls, states in ((nn.RNNCell, 1), (nn.LSTMCell, 2), (nn.GRUCell, 1))
    for row in (
        cell(cls, states=states),
        cell(cls, states=states, state=True),
        cell(cls, states=states, state=True, bias=False, n=4),
        cell(cls, states=states, n=1),
    )
]


# --------------------------------------------------------------------------------------------------------- attention


def attention(
    tag: str, n: int, keys: int = 3, call: Callable | None = None, out_axes: Sequence[int] | None = None, **options: Any
):
    axis = 0 if options.get("batch_first") else 1
    sizes = (4, options.get("kdim") or 4, options.get("vdim") or 4)

    def x(n: int) -> tuple:
        lengths = (3, keys, keys)
        return tuple(
            rand(n, t, size) if axis == 0 else rand(t, n, size) for t, size in zip(lengths, sizes, strict=True)
        )

    return ModuleCase(
        f"attention-{tag}{_name(options)}-n{n}",
        lambda: nn.MultiheadAttention(4, 2, **options),
        x,
        n,
        forward=call or (lambda model, q, k, v: model(q, k, v, need_weights=False)[0]),
        batch_dim=axis,
        in_axes=(axis, axis, axis),
        out_axes=out_axes or (axis,),
    )


def _causal(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(3, 3).triu(1).bool()
    return model(q, q, value=q, attn_mask=mask, need_weights=False)[0]


def _padded(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[0 if model.batch_first else 1]
    mask = (torch.arange(k.shape[1 if model.batch_first else 0]) == 1).expand(n, -1)
    return model(q, k, v, key_padding_mask=mask, need_weights=False)[0]


ATTENTION = [
    attention("cross", 2),
    attention("cross", 5, keys=4, batch_first=True),
    attention("cross", 3, batch_first=True),  # as many examples as positions
    attention("no-bias", 2, bias=False, batch_first=True),
    attention("sizes", 2, kdim=3, vdim=5, batch_first=True),
    attention("bias-kv", 2, add_bias_kv=True),
    attention("zero", 2, add_zero_attn=True, batch_first=True),
    attention("causal", 5, call=_causal, batch_first=True),
    attention("causal", 3, call=_causal),
    attention("padded", 5, call=_padded, batch_first=True),
    attention("padded", 2, call=_padded),
    attention("weights", 2, call=lambda model, q, k, v: model(q, k, v), out_axes=(0, 0), batch_first=True),
    attention("weights", 2, call=lambda model, q, k, v: model(q, k, v), out_axes=(1, 0)),
    attention("one-example", 1, batch_first=True),
]


# ------------------------------------------------------------------------------------------------------ generic rule


class Gain(nn.Module):
    """A leaf without a rule."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.gain)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T, (x + self.shift).square().sum(-1)


class OneOutputOfTwo(nn.Module):
    """The loss depends on one of two outputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = TwoOutputs()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[1]


class KeywordInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, *, x: Tensor, power: int = 1, shift: Tensor | None = None) -> Tensor:
        y = (x * self.gain) ** power
        return y if shift is None else y + shift * self.gain


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Parameter(torch.ones(4, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("n...i,ij,nj->n...", a, self.form, b)


class DictInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["a"] * self.left + batch["b"] * self.right


class NestedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"first": x * self.gain, "rest": [(x.sum(-1) * self.gain[0],), {"norm": (x - self.gain).square()}]}


class ManyParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(2, 5))
        self.bias, self.scale = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.inner.T + self.bias) @ self.outer.T * self.scale


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain * self.mask + self.mask


class OtherForward(nn.Linear):
    """Inherits from Linear, but computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight**2, self.bias) * 2 + self.bias


class SameForward(nn.Linear):
    """Inherits Linear's forward and so its rule."""


class FurtherParameter(nn.Linear):
    """Owns a parameter that Linear's rule does not know."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Block(nn.Module):
    """A container, registered for the generic rule with all it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x)))) * self.gate


class InExample(nn.Module):
    """Attention within each example, with a parameter that meets all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ self.query @ x.mT + self.bias, -1) @ x


class NoBatchingRule(nn.Module):
    """Uses the data's own values in Python, which vmap cannot, so that the plain loop runs."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row * self.gain if row[0].item() > 0 else row * self.gain**2 for row in x])


register_rule(Block)(GenericRule)


class Scale(nn.Module):
    """A leaf with a rule written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift


@register_rule(Scale)
class ScaleRule(Rule):
    """The least that a rule must have."""

    def grad_batch(self, call, g):
        gradients = {"gain": (g * call.x).reshape(call.n, -1, 4).sum(1), "shift": g.reshape(call.n, -1, 4).sum(1)}
        return {name: gradients[name] for name in call.params}


class FastScale(Scale):
    """As `Scale`, with a rule that knows everything by itself."""


@register_rule(FastScale)
class FastScaleRule(ScaleRule):
    """Overrides every quantity, none through `grad_batch`."""

    def _factors(self, call, g):
        g = g.reshape(call.n, -1, 4)
        x = call.x.reshape(call.n, -1, 4)
        return {name: {"gain": x, "shift": torch.ones_like(x)}[name] for name in call.params}, g

    def batch_l2(self, call, g):
        factors, g = self._factors(call, g)
        return {name: torch.einsum("nti,nti,nsi,nsi->n", g, x, g, x) for name, x in factors.items()}

    def weighted_sum(self, call, g, w):
        factors, g = self._factors(call, g)
        return {name: torch.einsum("n,nti,nti->i", w, g, x) for name, x in factors.items()}

    def batch_dot(self, call, g):
        factors, g = self._factors(call, g)
        return {name: torch.einsum("nti,nti,msi,msi->nm", g, x, g, x) for name, x in factors.items()}


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def generic(name: str, make: Callable[[], nn.Module], x: Callable[[int], tuple] | None = None, **options: Any):
    return ModuleCase(f"generic-{name}", make, x or (lambda n: (rand(n, 3, 4),)), **options)


GENERIC = [
    generic("gain", Gain),
    generic("gain-n0", Gain, n=0),
    generic("gain-n1", Gain, n=1),
    generic("gain-2d", Gain, lambda n: (rand(n, 4),), n=2),
    generic("gain-square", Gain, lambda n: (rand(n, n, 4),), n=4),
    generic("two-outputs", TwoOutputs, out_axes=(0, 0)),
    generic("two-outputs-n0", TwoOutputs, out_axes=(0, 0), n=0),
    generic("one-output-of-two", OneOutputOfTwo),
    generic("keyword-input", KeywordInput, forward=lambda model, x: model(x=x, power=3)),
    generic(
        "keyword-inputs",
        KeywordInput,
        lambda n: (rand(n, 4), rand(n, 4)),
        forward=lambda model, x, shift: model(shift=shift, x=x),
    ),
    generic("two-inputs", TwoInputs, lambda n: (rand(n, 4), rand(n, 3))),
    generic("two-inputs-square", TwoInputs, lambda n: (rand(n, n, 4), rand(n, 3)), n=3),
    generic("dict-input", DictInput, lambda n: ({"a": rand(n, 4), "b": rand(n, 4)},)),
    generic("dict-input-n0", DictInput, lambda n: ({"a": rand(n, 4), "b": rand(n, 4)},), n=0),
    generic("nested-output", NestedOutput),
    generic("many-parameters", ManyParameters),
    generic("many-parameters-n1", ManyParameters, n=1),
    generic("buffer", WithBuffer),
    generic("other-forward", lambda: OtherForward(4, 2)),
    generic("same-forward", lambda: SameForward(4, 2), covers=nn.Linear),
    generic("further-parameter", lambda: FurtherParameter(4, 2)),
    generic("container", Block),
    generic("container-n0", Block, n=0),
    generic("container-in-model", lambda: nn.Sequential(nn.Linear(4, 4), Block(), nn.ReLU(), Block()), covers=Block),
    generic("within-example", InExample),
    generic("no-batching-rule", NoBatchingRule, lambda n: (rand(n, 4),)),
    generic("weight-norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3))),
    generic("weight-norm-dim1", lambda: parametrizations.weight_norm(nn.Linear(4, 3), dim=1), n=2),
    generic("weight-norm-n0", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), n=0),
    generic("weight-norm-conv", lambda: parametrizations.weight_norm(nn.Conv1d(3, 2, 2)), n=2),
    generic("weight-norm-convtranspose", lambda: parametrizations.weight_norm(nn.ConvTranspose1d(3, 2, 2)), n=2),
    generic("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(4, 3)), n=2),
    generic("old-weight-norm", lambda: old_weight_norm(nn.Linear(4, 3))),
    generic("old-weight-norm-conv", lambda: old_weight_norm(nn.Conv1d(3, 2, 2)), n=2),
    generic("handwritten", Scale, covers=Scale),
    generic("handwritten-n0", Scale, n=0),
    generic("handwritten-fast", FastScale, covers=FastScale),
    generic("handwritten-fast-n1", FastScale, n=1),
]

_ROWS = [
    *LINEAR, *CONV1D, *CONV2D, *CONV3D, *TRANSPOSED, *EMBEDDING, *NORM, *PRELU, *RECURRENT, *ATTENTION, *GENERIC,
]  # fmt: skip
MODULE_CASES = list({case.id: case for case in _ROWS}.values())  # the cycle of sizes makes a few rows equal


# ------------------------------------------------------------------------------------------------------------ models


class Repeated(nn.Module):
    """One module called several times."""

    def __init__(self, module: nn.Module, times: int, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.module, self.times, self.activation = module, times, activation

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.activation(self.module(x))
        return x


class Tied(nn.Module):
    """Two modules in turn that share the parameter ``weight``."""

    def __init__(
        self, first: nn.Module, second: nn.Module, name: str = "weight", between: Callable = torch.tanh
    ) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between
        setattr(second, name, getattr(first, "weight", None))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class TwoNames(nn.Module):
    """One parameter under two names of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4))
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a + self.b.square()


class Matrix(nn.Module):
    """A leaf without a rule that uses a weight in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel.square()


class Branches(nn.Module):
    """Residual path, and two heads of which one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = h + self.left(h) * torch.sigmoid(self.right(h))
        self.unused(h)
        return self.used(h)


class TwoHeads(nn.Module):
    """Both heads are returned; what becomes of them is the loss's affair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.stem(x))
        return self.a(h), self.b(h)


class Unused(nn.Module):
    """Parameters that no forward touches: of a layer, of a leaf, and a bare one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.conv = nn.Linear(4, 3), nn.Linear(4, 3), nn.Conv1d(2, 2, 2)
        self.bare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class TimeMajor(nn.Module):
    """The middle part holds the examples on axis 1."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Linear(4, 4), middle, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.embed(x)).transpose(0, 1))
        h = h[0] if isinstance(h, tuple) else h
        return self.head(h.transpose(0, 1))


class TimeMajorIds(nn.Module):
    """Ids are transposed before they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4, padding_idx=1), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens.T))).transpose(0, 1)


class TokenGRU(nn.Module):
    """Embedding, recurrent layer, output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn, self.head = (
            nn.Embedding(6, 4),
            nn.GRU(4, 4, batch_first=True),
            nn.Linear(4, 6, bias=False),
        )
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(tokens))[0])


class InPlace(nn.Module):
    """An activation written over the output of a layer."""

    def __init__(self, layer: nn.Module, activation: Callable[[Tensor], Any], last: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation, self.last = layer, activation, last

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.activation(h)
        return self.last(h)


def frozen(*names: str) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        for name in names:
            (model.get_parameter(name)).requires_grad_(False)

    return freeze


def needs_grad(*shape: int) -> Callable[[int], tuple]:
    return lambda n: (rand(n, *shape).requires_grad_(),)


def tied_names(module: nn.Module, first: str, second: str) -> nn.Module:
    setattr(module, second, getattr(module, first))
    return module


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2, groups=2),
        nn.PReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def model(name: str, make: Callable[[], nn.Module], *shape: int, **options: Any) -> ModelCase:
    options.setdefault("x", lambda n: (rand(n, *shape),))
    return ModelCase(f"model-{name}", make, **options)


def tokens(*shape: int) -> Callable[[int], tuple]:
    return lambda n: (ids(6, n, *shape),)


MODEL_CASES = [
    model("mlp", mlp, 4),
    model("mlp-n0", mlp, 4, n=0),
    model("mlp-tokens", mlp, 3, 4),
    model("cnn", cnn, 2, 6, 6),
    model("cnn-n0", cnn, 2, 6, 6, n=0),
    # reuse
    model("reuse-linear-2", lambda: Repeated(nn.Linear(4, 4), 2), 4),
    model("reuse-linear-3-tokens", lambda: Repeated(nn.Linear(4, 4), 3), 3, 4),
    model("reuse-linear-n0", lambda: Repeated(nn.Linear(4, 4), 2), 4, n=0),
    model("reuse-linear-gram", lambda: Repeated(nn.Linear(24, 24), 4), 24),
    model("reuse-conv-2", lambda: Repeated(nn.Conv2d(2, 2, 3, padding=1), 2), 2, 5, 5),
    model("reuse-conv-3-shrinking", lambda: Repeated(nn.Conv1d(2, 2, 2, stride=1), 3), 2, 7),
    model("reuse-conv-grouped", lambda: Repeated(nn.Conv2d(4, 4, 3, padding=1, groups=2), 2), 4, 4, 4),
    model("reuse-conv-native", lambda: Repeated(nn.Conv2d(12, 12, 3, padding=1), 2), 12, 8, 8, n=2),
    model("reuse-transposed", lambda: Repeated(nn.ConvTranspose1d(2, 2, 3, stride=2), 2), 2, 4),
    model("reuse-layernorm-4", lambda: Repeated(nn.LayerNorm(4), 4), 3, 4),
    model("reuse-groupnorm", lambda: Repeated(nn.GroupNorm(2, 4), 2), 4, 3),
    model("reuse-prelu", lambda: Repeated(nn.PReLU(), 3), 4),
    model("reuse-generic", lambda: Repeated(Gain(), 2), 4),
    model("reuse-container", lambda: Repeated(Block(), 2), 3, 4),
    model("reuse-gru", lambda: TimeMajor(nn.GRU(4, 4)), 3, 4),
    # tying
    model(
        "tied-embedding-head", lambda: Tied(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)), x=tokens(3)
    ),
    model("tied-embedding-head-bias", lambda: Tied(nn.Embedding(6, 4), nn.Linear(4, 6)), x=tokens(3)),
    model("tied-embedding-head-n0", lambda: Tied(nn.Embedding(6, 4), nn.Linear(4, 6)), x=tokens(3), n=0),
    model("tied-embedding-head-1d", lambda: Tied(nn.Embedding(6, 4), nn.Linear(4, 6)), x=tokens()),
    model("tied-embedding-padding", lambda: Tied(nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 6)), x=tokens(2, 3)),
    model("tied-bag-head", lambda: Tied(nn.EmbeddingBag(6, 4, mode="mean"), nn.Linear(4, 6)), x=tokens(3)),
    model("tied-max-bag-head", lambda: Tied(nn.EmbeddingBag(6, 4, mode="max"), nn.Linear(4, 6)), x=tokens(3)),
    model("tied-gru-head", TokenGRU, x=tokens(3)),
    model("tied-linears", lambda: Tied(nn.Linear(4, 4), nn.Linear(4, 4)), 4),
    model("tied-linears-tokens", lambda: Tied(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)), 3, 4),
    model("tied-linear-pooled", lambda: Tied(nn.Linear(4, 4), nn.Linear(4, 4), between=lambda h: h.sum(1)), 3, 4),
    model("tied-linear-generic", lambda: Tied(nn.Linear(4, 4), Matrix(), "kernel"), 3, 4),
    model("tied-linear-bilinear-parts", lambda: nn.Sequential(Tied(nn.Linear(4, 4), Matrix(), "kernel"), Gain()), 4),
    model("tied-convs", lambda: Tied(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, stride=2)), 2, 5, 5),
    model("tied-conv-groups", lambda: Tied(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=2)), 2, 8),
    model("tied-conv-transposed", lambda: Tied(nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 2, 3)), 2, 5, 5),
    model("tied-norms", lambda: Tied(nn.LayerNorm(4), nn.RMSNorm(4)), 3, 4),
    model("two-names-generic", TwoNames, 3, 4),
    model("two-names-layernorm", lambda: tied_names(nn.LayerNorm(4), "weight", "bias"), 3, 4),
    model("two-names-rnn", lambda: TimeMajor(tied_names(nn.RNN(4, 4), "weight_ih_l0", "weight_hh_l0")), 3, 4),
    # frozen parts
    model("frozen-weight", mlp, 4, prepare=frozen("2.weight")),
    model("frozen-bias", mlp, 4, prepare=frozen("2.bias")),
    model("frozen-first", mlp, 4, prepare=frozen("0.weight", "0.bias")),
    model("frozen-middle", mlp, 3, 4, prepare=frozen("2.weight", "2.bias")),
    model("frozen-last", mlp, 4, prepare=frozen("4.weight", "4.bias")),
    model("frozen-conv-weight", cnn, 2, 6, 6, prepare=frozen("0.weight", "4.weight")),
    model("frozen-conv-bias", cnn, 2, 6, 6, prepare=frozen("0.bias", "4.bias")),
    model("frozen-norm-weight", cnn, 2, 6, 6, prepare=frozen("1.weight")),
    model("frozen-norm-bias", cnn, 2, 6, 6, prepare=frozen("1.bias", "5.weight")),
    model("frozen-transposed-weight", lambda: nn.ConvTranspose1d(2, 3, 2), 2, 4, prepare=frozen("weight")),
    model("frozen-bilinear-weight", lambda: nn.Bilinear(3, 4, 2), prepare=frozen("weight"),
          x=lambda n: (rand(n, 3), rand(n, 4))),
    model("frozen-bilinear-bias", lambda: nn.Bilinear(3, 4, 2), prepare=frozen("bias"),
          x=lambda n: (rand(n, 3), rand(n, 4))),
    model("frozen-embedding", lambda: nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2)), x=tokens(3),
          prepare=frozen("0.weight")),
    model("frozen-embedding-bag", lambda: nn.Sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 2)), x=tokens(3),
          prepare=frozen("0.weight")),
    model("frozen-layernorm-bias", lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), 3, 4, prepare=frozen("0.bias")),
    model("frozen-generic-part", ManyParameters, 4, prepare=frozen("inner", "scale")),
    model("frozen-handwritten-part", FastScale, 4, prepare=frozen("gain")),
    model("frozen-gru-part", lambda: TimeMajor(nn.GRU(4, 4)), 3, 4, prepare=frozen("middle.weight_hh_l0", "embed.bias")),
    model("frozen-part-of-weight-norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), 4,
          prepare=frozen("parametrizations.weight.original0")),
    # in-place activations
    model("in-place-module", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), 4),
    model("in-place-conv-module", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)), 2, 5, 5),
    model("in-place-relu-linear", lambda: InPlace(nn.Linear(4, 5), torch.relu_, nn.Linear(5, 2)), 3, 4),
    model("in-place-leaky-linear", lambda: InPlace(nn.Linear(4, 5), F.leaky_relu_, nn.Linear(5, 2)), 4),
    model("in-place-leaky-conv", lambda: InPlace(nn.Conv1d(2, 3, 2), F.leaky_relu_, nn.Conv1d(3, 2, 2)), 2, 6),
    model("in-place-leaky-norm", lambda: InPlace(nn.LayerNorm(4), F.leaky_relu_, nn.Linear(4, 2)), 3, 4),
    model("in-place-relu-groupnorm", lambda: InPlace(nn.GroupNorm(2, 4), torch.relu_, nn.Conv1d(4, 2, 2)), 4, 5),
    model("in-place-mul-embedding", lambda: InPlace(nn.Embedding(6, 4), lambda h: h.mul_(2.0), nn.Linear(4, 2)), x=tokens(3)),
    model("in-place-relu-transposed", lambda: InPlace(nn.ConvTranspose1d(2, 3, 2), torch.relu_, nn.Conv1d(3, 2, 2)), 2, 5),
    model("in-place-relu-generic", lambda: InPlace(ManyParameters(), torch.relu_, nn.Linear(2, 2)), 4),
    model("in-place-residual", lambda: Repeated(InPlace(nn.Linear(4, 4), torch.relu_, nn.LayerNorm(4)), 2), 4),
    # unused parameters and branches
    model("unused", Unused, 4),
    model("unused-n0", Unused, 4, n=0),
    model("branches", Branches, 4),
    model("branches-tokens", Branches, 3, 4),
    model("one-head-of-two", TwoHeads, 4, forward=lambda model, x: model(x)[0]),
    model("both-heads", TwoHeads, 4, out_axes=(0, 0)),
    # inputs and several calls
    model("input-needs-grad", mlp, x=needs_grad(4)),
    model("input-needs-grad-conv", cnn, x=needs_grad(2, 6, 6)),
    model("input-needs-grad-generic", ManyParameters, x=needs_grad(4)),
    model("siamese", mlp, x=lambda n: (rand(n, 4), rand(n, 4)),
          forward=lambda model, a, b: model(a) - torch.tanh(model(b))),
    model("siamese-conv", cnn, x=lambda n: (rand(n, 2, 6, 6), rand(n, 2, 6, 6)),
          forward=lambda model, a, b: model(a) * model(b)),
    model("siamese-same-input", Block, 3, 4, forward=lambda model, x: model(x) + model(x)),
    # the examples on axis 1 in the middle
    model("time-major-linear", lambda: TimeMajor(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), 3, 4),
    model("time-major-norm", lambda: TimeMajor(nn.LayerNorm(4)), 3, 4),
    model("time-major-prelu", lambda: TimeMajor(nn.Sequential(nn.PReLU(), nn.Linear(4, 4), nn.RMSNorm(4))), 3, 4),
    model("time-major-lstm", lambda: TimeMajor(nn.LSTM(4, 4)), 3, 4),
    model("time-major-square-gru", lambda: TimeMajor(nn.GRU(4, 4)), 5, 4),
    model("time-major-ids", TimeMajorIds, x=tokens(3)),
    model("time-major-one-example", lambda: TimeMajor(nn.Linear(4, 4)), 3, 4, n=1),
    model("time-major-n0", lambda: TimeMajor(nn.Linear(4, 4)), 3, 4, n=0),
]  # fmt: skip

CASES: list[ModuleCase] = [*MODULE_CASES, *MODEL_CASES]
