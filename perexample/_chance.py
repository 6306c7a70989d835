"""States of torch's random numbers, to be compared and set back."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def random_states(device: torch.device) -> list[bytes]:
    """Those of the CPU, and of a GPU."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [bytes(state.numpy()) for state in states]


def seed(number: int, device: torch.device) -> None:
    """Seed these, and no others."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def set_random_states(states: Sequence[bytes], device: torch.device) -> None:
    """Set them back."""
    first, *others = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states)
    torch.set_rng_state(first)
    for state in others:
        torch.cuda.set_rng_state(state, device)
