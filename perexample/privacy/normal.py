"""Standard normal numbers in float64 of random bits, by the method of Box and Muller."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Bits = Callable[[Tensor], object]
PIECE = 1 << 17  # numbers; they stay in the cache, and are enough for torch to split operations among threads
_ONE = 2.0**63


def plus_normal(tensor: Tensor, std: float, source: Bits) -> Tensor:
    """A tensor plus independent Gaussian numbers ``std * z``, each of 126 random bits that two have in common.

    Torch makes normal numbers in float64 one by one, in one thread; here operations on whole pieces do.

    Args:
        tensor: Of one axis, on the CPU.
        std: Standard deviation.
        source: Fills an integer tensor with whole numbers from 0 to 2^63 - 1, all alike.

    Returns:
        The sum in float64; ``|z|`` is at most 9.42.

    References:
        Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    out = torch.empty(len(tensor), dtype=torch.float64, device="cpu")
    most = min(PIECE, len(tensor) + 1)
    bits = torch.empty(most, dtype=torch.int64, device="cpu")
    spare = torch.empty((most + 1) // 2, dtype=torch.float64, device="cpu")
    for piece, other in zip(out.split(PIECE), tensor.split(PIECE), strict=True) if len(tensor) else ():
        even = len(piece) + len(piece) % 2
        source(bits[:even])
        numbers = piece if even == len(piece) else torch.empty(even, dtype=torch.float64, device="cpu")
        _to_normal(numbers.copy_(bits[:even]), std, spare[: even // 2])
        torch.add(numbers[: len(piece)], other, out=piece)  # while it is in the cache
    return out


def _to_normal(numbers: Tensor, std: float, spare: Tensor) -> None:
    """Make Gaussian numbers of an even number of whole ones, in place."""
    radius, angle = numbers.split(len(spare))
    radius.mul_(1 / _ONE).add_(0.5 / _ONE)  # above 0 and at most 1, so that the logarithm is finite
    radius.log_().mul_(-2).sqrt_().mul_(std)
    cosine = torch.cos(angle.mul_(2 * math.pi / _ONE), out=spare)
    angle.sin_().mul_(radius)
    radius.mul_(cosine)


def bits_of(generator: torch.Generator) -> Bits:
    """Random bits of one of torch's generators, on the CPU."""
    return lambda out: out.random_(generator=generator)


def bits_of_bytes(draw: Callable[[int], bytes]) -> Bits:
    """Random bits of what gives so many random bytes."""

    def fill(out: Tensor) -> None:
        raw = torch.frombuffer(bytearray(draw(8 * len(out))), dtype=torch.int64)
        torch.bitwise_and(raw, (1 << 63) - 1, out=out)

    return fill
