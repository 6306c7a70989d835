"""States of torch's random numbers on the CPU and on accelerators, to be compared and set back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor


def drawing_devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The accelerators that these lie on, whose random numbers are their own."""
    found = {t.device for t in tensors if t.device.type != "cpu"}
    return [device for device in sorted(found, key=str) if _module(device) is not None] if found else []


def random_states(devices: Iterable[torch.device]) -> list[Tensor]:
    """The state of the CPU, and of each of these accelerators."""
    modules = [(device, _module(device)) for device in devices]
    return [torch.get_rng_state(), *(module.get_rng_state(device) for device, module in modules if module is not None)]


def set_random_states(states: Sequence[Tensor], devices: Iterable[torch.device]) -> None:
    """Set them back."""
    torch.set_rng_state(states[0])
    modules = [(device, _module(device)) for device in devices]
    present = [(device, module) for device, module in modules if module is not None]
    for (device, module), state in zip(present, states[1:], strict=True):
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
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        elif (module := _module(device)) is not None:
            module.set_rng_state(torch.Generator(device).manual_seed(number).get_state(), device)


def _module(device: torch.device) -> ModuleType | None:
    """What torch has for an accelerator; none for the CPU, the meta device, and those that draw no numbers."""
    if device.type in ("cpu", "meta"):
        return None
    module: ModuleType = torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None


__all__ = ["drawing_devices", "random_bytes", "random_kept", "random_states", "seed", "set_random_states"]
