"""States of torch's random numbers on the CPU and on accelerators, to be compared and set back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ._looks import looking


def drawing_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The accelerators that these lie on, whose random numbers are their own."""
    found = {t.device for t in tensors if t.device.type != "cpu"}
    return [device for device, _ in _modules(sorted(found, key=str))] if found else []


def random_states(devices: Iterable[torch.device]) -> list[Tensor]:
    """The state of the CPU, and of each of these accelerators."""
    with looking():  # they have no part in a step that is recorded
        return [torch.get_rng_state(), *(module.get_rng_state(device) for device, module in _modules(devices))]


def set_random_states(states: Sequence[Tensor], devices: Iterable[torch.device]) -> None:
    """Set them back."""
    torch.set_rng_state(states[0])
    for (device, module), state in zip(_modules(devices), states[1:], strict=True):
        module.set_rng_state(state, device)


def random_bytes(device: torch.device) -> list[bytes]:
    """The states of the CPU and of this device, to be compared."""
    return [bytes(state.numpy()) for state in random_states([device])]


@contextmanager
def random_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """What is drawn inside leaves no trace."""
    devices = [*devices]
    states = random_states(devices)
    try:
        yield
    finally:
        set_random_states(states, devices)


def seed(number: int, devices: Iterable[torch.device]) -> None:
    """Seed the CPU and these accelerators, and no others."""
    torch.default_generator.manual_seed(number)
    for device, module in _modules(devices):
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        else:
            module.set_rng_state(torch.Generator(device).manual_seed(number).get_state(), device)


def _modules(devices: Iterable[torch.device]) -> list[tuple[torch.device, Any]]:
    """What torch has for each accelerator; the CPU, the meta device, and those that draw no numbers are left out."""
    modules = [(device, getattr(torch, device.type, None)) for device in devices if device.type != "cpu"]
    return [(device, module) for device, module in modules if hasattr(module, "get_rng_state")]


__all__ = ["drawing_devices", "random_bytes", "random_kept", "random_states", "seed", "set_random_states"]
