"""Generators of random numbers."""

from __future__ import annotations

import hashlib
import os
from typing import Any, cast

import torch

MT_STATE = slice(24, 24 + 8 * 624)  # where the bytes of a CPU generator's state hold the Mersenne twister's 624 words


def is_default_generator(generator: torch.Generator) -> bool:
    """Whether numbers are drawn from this generator where none is given; dispatch modes are given another object."""
    kind, given = generator.device.type, cast("Any", generator)
    module: Any = torch if kind == "cpu" else torch.get_device_module(kind)
    if kind == "mps":
        defaults = [module._get_default_mps_generator()]
    else:
        defaults = [torch.default_generator] if kind == "cpu" else getattr(module, "default_generators", [])
    return any(given._cdata == default._cdata for default in defaults)


def system_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that nobody can repeat.

    Returns:
        A generator on the device.
    """
    return generator_of(os.urandom(64), device)


def generator_of(seed: bytes, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of some bytes, and of all of these.

    ``manual_seed`` uses 32 bits on CPU, so that all its streams can be tried; here the whole state is set.

    Args:
        seed: The bytes.
        device: Where it is to be.

    Returns:
        A generator on the device.
    """
    generator = torch.Generator(device)
    bits = hashlib.shake_256(seed).digest(4 * 624)
    generator.manual_seed(int.from_bytes(bits[:8], "little", signed=True))
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = torch.zeros(624, 8, dtype=torch.uint8, device="cpu")
        words[:, :4] = torch.frombuffer(bytearray(bits), dtype=torch.uint8).view(624, 4)
        state[MT_STATE] = words.flatten()
        generator.set_state(state)
    return generator
