"""What the operations of a step do that decides whether and how it can be recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._calls import written_by
from ._looks import trying
from ._private import memory_of
from ._tree import tensors_of

_HALF = (torch.bfloat16, torch.float16)
_DRAWS = {
    "bernoulli", "rand", "randn", "randint", "normal", "uniform", "exponential", "cauchy", "log_normal", "geometric",
    "random", "multinomial", "poisson", "binomial",
}  # fmt: skip


class Watched(TorchDispatchMode):
    """Watches operations.

    Attributes:
        half: Whether something was computed in 16 bits.
        drew: Whether something was drawn, in this thread.
        written: The first tensor that was there before and was written to.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        super().__init__()
        self.half = self.drew = False
        self.written: Tensor | None = None
        self._made: set[int] = set()  # memory of what operations have made

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Let it pass."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if trying():  # that is not the step's own
            return found
        self.drew |= _draws(func._schema.name.partition("::")[2])
        if func._schema.is_mutable and self.written is None:
            self.written = next(filter(self._was_there, tensors_of(written_by(func, args, kwargs))), None)
        fresh = func._schema.name.startswith("aten::lift_fresh")  # of numbers that are written in the code
        given = set() if fresh else {_memory(t) for t in tensors_of((args, kwargs))}
        for t in tensors_of(found):
            self.half |= t.dtype in _HALF
            if (memory := _memory(t)) not in given:
                self._made.add(memory)
        return found

    def _was_there(self, t: Tensor) -> bool:
        return bool(t.numel()) and _memory(t) not in self._made


class without_chance(TorchDispatchMode):  # noqa: N801 - named as a function is
    """Random numbers are all the same, so that runs with other numbers of them can be compared."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Replace what is drawn; functions that only may draw, as attention with dropout, are left as they are."""
        found = func(*args, **(kwargs or {}))
        name = "" if trying() else func._schema.name.partition("::")[2]
        if name == "native_dropout":
            found[0].copy_(args[0] / (1 - args[1]) if args[1] < 1 else torch.zeros_like(args[0]))
            found[1].fill_(True)
        elif name == "randperm":
            found.copy_(torch.arange(len(found), device=found.device))
        elif _draws(name):
            found.fill_(0.5 if found.is_floating_point() else found.dtype == torch.bool)
        return found


def _draws(name: str) -> bool:
    return name in ("native_dropout", "randperm") or name.rstrip("_").removesuffix("_like") in _DRAWS


def _memory(t: Tensor) -> int:
    return memory_of(t) or id(t)
