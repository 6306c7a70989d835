"""Products in full float32, also where a model's own may be faster in TF32 or bfloat16, which keep 3 of 7 digits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch

from ._private import float32_precision, set_float32_precision

_FULL = ("none", "ieee")
# By kind of device: torch's name of the library that computes, and for what.
_SETTINGS = {
    "cuda": (("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")),
    "cpu": (("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")),
}


class _Lowered:
    """What was set before, while products are in full precision; settings are those of the process, not of a thread."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.before: dict[tuple[str, str], str] = {}
        self.products: str | None = None

    def enter(self) -> None:
        """The first one raises what is low."""
        with self.lock:
            self.users += 1
            if self.users > 1:
                return
            every = [setting for settings in _SETTINGS.values() for setting in settings]
            self.before = {setting: float32_precision(*setting) for setting in every}
            low = {setting for setting in every if self.before[setting] not in _FULL}
            # By the older interface first, which refuses to tell what is set once the newer one alone was used.
            if any(what == "matmul" for _, what in low):
                with contextlib.suppress(RuntimeError):
                    self.products = torch.get_float32_matmul_precision()
                    torch.set_float32_matmul_precision("highest")
            if low & {("cuda", "conv"), ("cuda", "rnn")}:
                torch.backends.cudnn.allow_tf32 = False
            for setting in low:
                if float32_precision(*setting) not in _FULL:
                    set_float32_precision(*setting, "ieee")

    def leave(self) -> None:
        """The last one sets all back."""
        with self.lock:
            self.users -= 1
            if self.users:
                return
            if self.products is not None:
                torch.set_float32_matmul_precision(self.products)
                self.products = None
            if any(self.before["cuda", what] not in _FULL for what in ("conv", "rnn")):
                torch.backends.cudnn.allow_tf32 = True
            for setting, value in self.before.items():
                for tried in ("none", value):  # the former follows what is set for all
                    if float32_precision(*setting) != value:
                        set_float32_precision(*setting, tried)


_LOWERED = _Lowered()


class full_precision(contextlib.AbstractContextManager):  # noqa: N801 - named as a function is
    """Products and convolutions in full float32."""

    def __enter__(self) -> None:
        """Set what is lower."""
        _LOWERED.enter()

    def __exit__(self, *exc: object) -> None:
        """And back."""
        _LOWERED.leave()


def reduced(devices: Iterable[str]) -> bool:
    """Whether products may be in less than float32 on one of these kinds of devices, or just are not for a moment."""
    if _LOWERED.users:
        return True
    return any(float32_precision(*setting) not in _FULL for kind in devices for setting in _SETTINGS.get(kind, ()))


@contextlib.contextmanager
def without_autocast(devices: Iterable[str]) -> Iterator[None]:
    """Operations on these kinds of devices compute in the types that they are given."""
    with contextlib.ExitStack() as stack:
        for kind in devices:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
