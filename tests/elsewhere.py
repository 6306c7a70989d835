"""A device that is not the CPU, made of the CPU: what does not care where tensors lie fails on it.

It is built of ``elsewhere.cpp`` by the C++ compiler that `torch.compile` needs too, and stays for the whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch import nn
from torch.utils import cpp_extension

NAME = "elsewhere"
LIBRARY = "PEREX_ELSEWHERE"  # the variable that says where it is, in a process that is to have the device
SOURCE = Path(__file__).with_suffix(".cpp")


def compiler() -> str | None:
    """The C++ compiler, if there is one that makes libraries for Linux."""
    return shutil.which("c++") or shutil.which("g++") if sys.platform == "linux" else None


def build(folder: Path) -> Path:
    """Compile it, which takes some seconds."""
    library, found = folder / "elsewhere.so", compiler()
    assert found is not None
    torch_libraries = Path(torch.__file__).parent / "lib"
    flags = ["-shared", "-fPIC", "-O1", "-std=c++20"]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    links = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([found, *flags, *includes, str(SOURCE), "-o", str(library), *links], check=True)
    return library


def load(library: Path) -> None:
    """Make the device known; nothing takes that back."""
    torch.utils.rename_privateuse1_backend(NAME)
    calls = ctypes.CDLL(str(library))
    calls.begin()
    torch._register_device_module(NAME, _module(calls))


def moved(model: nn.Module) -> nn.Module:
    """The model, on the device; tied parameters, which torch would make new ones of, stay tied."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to(NAME)
    except RuntimeError:  # what weight_norm has computed holds its parameters
        torch.__future__.set_swap_module_params_on_conversion(False)
        return model.to(NAME)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def device() -> str:
    """Where tests that may run on any device are to run: here in a process that is to have it, else on a GPU."""
    if LIBRARY in os.environ:
        if not hasattr(torch, NAME):
            load(Path(os.environ[LIBRARY]))
        return NAME
    return "cuda" if torch.cuda.is_available() else "cpu"


def _module(calls: ctypes.CDLL) -> types.ModuleType:
    """What torch asks a device's module for."""
    module = types.ModuleType(f"torch.{NAME}")

    def state(device: object = 0) -> torch.Tensor:
        found = torch.empty_like(torch.get_rng_state())
        calls.random_state(ctypes.c_void_p(found.data_ptr()))
        return found

    def set_state(state: torch.Tensor, device: object = 0) -> None:
        calls.set_random_state(ctypes.c_void_p(state.contiguous().data_ptr()))

    module._initialized = True  # type: ignore[attr-defined]
    module.device = contextlib.nullcontext  # type: ignore[attr-defined]
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: 1  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: set_state(  # type: ignore[attr-defined]
        torch.Generator().manual_seed(seed).get_state()
    )
    module.get_rng_state = state  # type: ignore[attr-defined]
    module.set_rng_state = set_state  # type: ignore[attr-defined]
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
    return module
