"""Standard normal numbers in float64 of random bits, by the method of Box and Muller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

Bits = Callable[[Tensor], object]
PIECE = 1 << 15  # numbers; they stay in the cache, and torch splits no operation on them among threads of its own
_SHARE = 2 * PIECE  # what a thread must have to do at least
_ONE = 1 << 53


def plus_normal(tensor: Tensor, std: float, sources: Sequence[Bits]) -> Tensor:
    """A tensor plus independent Gaussian numbers ``std * z``, each of 106 random bits that two have in common.

    Torch's random bits are as fast as any, but its own numbers in float64 take one thread, and that for long.

    Args:
        tensor: Of one axis, on the CPU.
        std: Standard deviation.
        sources: Each fills an integer tensor with whole numbers from 0 to 2^53 - 1, all alike. With several of them
            threads draw at the same time; which draws what is the same each time.

    Returns:
        The sum in float64; ``|z|`` is at most 8.57.

    References:
        Box and Muller 1958, "A note on the generation of random normal deviates".
    """
    out = torch.empty(len(tensor), dtype=torch.float64, device="cpu")
    pieces = list(zip(out.split(PIECE), tensor.split(PIECE), strict=True)) if len(tensor) else []
    threads = max(1, min(len(sources), len(tensor) // _SHARE))

    def draw(number: int) -> None:
        spare = torch.empty(PIECE, dtype=torch.int64, device="cpu"), torch.empty(PIECE, dtype=out.dtype, device="cpu")
        for piece, other in pieces[number::threads]:
            _draw(piece, std, sources[number], *spare)
            piece.add_(other)  # while it is in the cache

    if threads == 1:
        draw(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, range(threads)))  # raises what was raised there
    return out


def _draw(piece: Tensor, std: float, source: Bits, bits: Tensor, numbers: Tensor) -> None:
    """Fill a piece; the other tensors are overwritten."""
    half = (len(piece) + 1) // 2
    whole = 2 * half == len(piece)
    bits = bits[: 2 * half]
    source(bits)
    uniform = (piece if whole else torch.empty_like(bits, dtype=piece.dtype)).copy_(bits).mul_(1 / _ONE)
    first, second = uniform.split(half)
    radius = first.neg_().log1p_().mul_(-2).sqrt_().mul_(std)  # log(1 - u): u is never 1, so the logarithm is finite
    angle = second.mul_(2 * math.pi)
    cosine = torch.cos(angle, out=numbers[:half])
    angle.sin_().mul_(radius)
    radius.mul_(cosine)
    if not whole:
        piece.copy_(uniform[: len(piece)])


def bits_of(generator: torch.Generator) -> Bits:
    """Random bits of one of torch's generators, on the CPU."""
    return lambda out: out.random_(0, _ONE, generator=generator)


def bits_of_bytes(draw: Callable[[int], bytes]) -> Bits:
    """Random bits of what gives so many random bytes."""

    def fill(out: Tensor) -> None:
        raw = torch.frombuffer(bytearray(draw(8 * len(out))), dtype=torch.int64)
        torch.bitwise_and(raw, _ONE - 1, out=out)

    return fill
