"""The choice of method: of several exact ways to the same norms and sums, the fastest one that fits.

A `Term` offers `Method` objects. `choose` takes the one that was fastest for this shape on this device when all that
have a chance were tried once, on the real tensors; what it found is remembered for the rest of the process, for all
sizes nearby. With ``strategy="model"`` the estimates of a cost model decide, which are the same in every run.

Which of the ways is fastest is no matter of counting operations: a native weight gradient and a batched product differ
fourfold in either direction, depending on the shape (docs/performance). All of them are exact, they differ in rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._arguments import is_word, real, shown
from ._looks import blind
from .errors import ConfigurationError

if TYPE_CHECKING:
    from .terms import Term

STRATEGIES = ("measure", "model")
# By kind of device: multiply-adds in a second of a matrix product, numbers written and read again in a second, and the
# seconds that one call of an operation takes; on two CPU cores, and on a GPU.
_RATES = {"cpu": (7e10, 1.5e9, 8e-6), "gpu": (2e13, 5e11, 8e-6)}
_SHORT = 1e-4  # below these estimated seconds a measurement on a CPU is worth less than it takes
_CHANCE = 6.0  # a method estimated to take this many times the least one is not tried
_LONG = 0.1  # what takes this many seconds is tried once
_MOST = 4096  # choices remembered
ROOM = 1.6  # what is held for the sum may be this many times the least that could be, unless asked for otherwise


@dataclass(slots=True)
class Method:
    """One exact way to the squared norms of a term.

    Attributes:
        name: What it does, for `plan`.
        run: Does it; returns squared norms ``[N]`` in float64 (one that forms gradients: these), and the term to go on
            with for the sum.
        products: Multiply-adds of the norms and of the weighted sum.
        moved: Numbers written and read beside the factors.
        calls: How many operations it takes.
        held: Numbers that are held until the weights are known.
    """

    name: str
    run: Callable[[], tuple[Tensor, Term]]
    products: float = 0.0
    moved: float = 0.0
    calls: int = 1
    held: int = 0

    def seconds(self, device: torch.device) -> float:
        """The model's estimate. Only its order counts, so it does not know the machine."""
        rate, moved, call = _RATES["cpu" if device.type == "cpu" else "gpu"]
        return self.products / rate + self.moved / moved + self.calls * call


@dataclass(frozen=True)
class Choice:
    """How methods are chosen.

    Attributes:
        strategy: ``"measure"`` or ``"model"``.
        sums: Whether a weighted sum will be asked for after the norms.
        room: How many times the least memory may be held until the weights are known, if that is faster.
    """

    strategy: str = "measure"
    sums: bool = False
    room: float = ROOM

    def __post_init__(self) -> None:
        """Check what users pass."""
        if not is_word(self.strategy, STRATEGIES):
            known = ", ".join(map(repr, STRATEGIES))
            raise ConfigurationError(f"strategy must be one of {known}, not {shown(self.strategy)}.")
        real("room", self.room, "a finite number, 1 or more", lambda x: x >= 1)


def likeness(tensor: Tensor) -> tuple[Any, ...]:
    """Sizes in steps of a quarter octave, and the order of the axes in memory."""
    sizes = tuple(round(4 * math.log2(size)) if size else -1 for size in tensor.shape)
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    return sizes, order, 0 in strides, tensor.dtype, tensor.device


def sameness(tensor: Tensor) -> tuple[Any, ...]:
    """All that methods may go by, but for the values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


_FOUND: dict[Any, str] = {}
_TAKEN: dict[Any, str] = {}  # by what is wholly the same, where methods need not be asked what they would take


def forget_choices() -> None:
    """Forget what was measured, as when another number of threads is to be tried."""
    _FOUND.clear()
    _TAKEN.clear()


def settled(term: Term, choice: Choice) -> tuple[Tensor, Term]:
    """Squared norms by the method that was chosen, and the term to go on with."""
    same = term.sameness()
    if same is None:
        return choose(term, choice).run()
    return term.run(taken("norms", same, choice, lambda: choose(term, choice)))


def taken(what: str, same: Any, choice: Choice, choosing: Callable[[], Method]) -> str:
    """The name of the method that is chosen, or that was for what is wholly the same.

    Args:
        what: What it is chosen for.
        same: `Term.sameness` of the term.
        choice: How it is chosen.
        choosing: Chooses it.

    Returns:
        The name.
    """
    key = what, same, choice.strategy, choice.sums, choice.room, torch.get_num_threads(), _for_a_graph()
    name = _TAKEN.get(key)
    if name is None:
        name = choosing().name
        if len(_TAKEN) >= _MOST:
            _TAKEN.clear()
        _TAKEN[key] = name
    return name


def choose(term: Term, choice: Choice, methods: list[Method] | None = None) -> Method:
    """The method to take for a term.

    Args:
        term: The term.
        choice: How to choose.
        methods: Of which; by default ``term.methods()``.

    Returns:
        One of them, the same for all terms of one form as long as nothing is forgotten.
    """
    methods = term.methods() if methods is None else methods
    methods = _that_fit(methods, choice) if len(methods) > 1 else methods
    if len(methods) == 1:
        return methods[0]
    device = term.device
    methods.sort(key=lambda method: method.seconds(device))
    if choice.strategy == "model" or (device.type == "cpu" and methods[0].seconds(device) < _SHORT):
        return methods[0]
    names = frozenset(method.name for method in methods)  # what fits may differ between the sizes of one form
    key = (*term.form(), names, choice, torch.get_num_threads(), _for_a_graph())
    name = _FOUND.get(key)
    if name is None:
        if len(_FOUND) >= _MOST:
            _FOUND.clear()
        name = _FOUND[key] = _measured(term, methods, choice)
    return next(method for method in methods if method.name == name)


def _that_fit(methods: list[Method], choice: Choice) -> list[Method]:
    """Those that hold little until the weights are known; nothing is held where no sum will follow."""
    if not choice.sums:
        return methods
    least = min(method.held for method in methods)
    return [method for method in methods if method.held <= least * choice.room]


def _measured(term: Term, methods: list[Method], choice: Choice) -> str:
    """The name of the fastest of those that have a chance."""
    most = _CHANCE * methods[0].seconds(term.device)
    likely = [method for method in methods if method.seconds(term.device) <= most]
    if len(likely) == 1:
        return likely[0].name
    w = torch.ones(term.n, dtype=term.dtype, device=term.device)
    if choice.sums:
        term.weighted_sum(w)  # which may have to find out how itself
    grams, term.grams = term.grams, None  # what others have formed already would come for nothing
    times = [_timed(method, term, w, sums=choice.sums) for method in likely]
    term.grams = grams
    # Methods that hold the same factors form the same sum: only their norms are to be compared.
    of_factors = min((time.sum for time in times if time.of_factors), default=0.0)
    seconds = [time.norms + (of_factors if time.of_factors else time.sum) for time in times]
    return likely[seconds.index(min(seconds))].name


@dataclass(slots=True)
class Timed:
    """Least seconds that a method took; infinity if there is no memory for it.

    Attributes:
        norms: For the norms.
        sum: For the sum that follows, 0 if none does.
        of_factors: Whether that is formed of the factors, as they were.
    """

    norms: float = float("inf")
    sum: float = float("inf")
    of_factors: bool = False


def _timed(method: Method, term: Term, w: Tensor, *, sums: bool) -> Timed:
    """How long a method takes, with the sum that follows, if one does."""
    least = Timed()
    clock = _GpuClock(w.device) if w.is_cuda and _for_a_graph() else _Clock(w.device)
    for _ in range(3):
        found: Any = None  # what the run before has formed goes first
        clock.start()
        try:
            found = method.run()
            clock.mark()
            if sums:
                found[1].weighted_sum(w)
        except torch.OutOfMemoryError:
            return Timed()
        (norms, total), of_factors = clock.stop(), found[1] is term
        least = Timed(min(least.norms, norms), min(least.sum, total - norms) if sums else 0.0, of_factors)
        if total > _LONG:
            break
    return least


def _for_a_graph() -> bool:
    """Whether a step is recorded as a CUDA graph, for which the time of the host does not count."""
    return blind(everywhere=True)


class _Clock:
    """Seconds until all work that was begun is done, from a start to a mark and to a stop."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [0.0, 0.0]

    def start(self) -> None:
        """Begin."""
        self.times[0] = _now(self.device)

    def mark(self) -> None:
        """In between."""
        self.times[1] = _now(self.device)

    def stop(self) -> tuple[float, float]:
        """The seconds to the mark, and to now."""
        return self.times[1] - self.times[0], _now(self.device) - self.times[0]


def _now(device: torch.device) -> float:
    """The time when all work that was begun is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class _GpuClock:
    """The same without what the host takes to launch operations, which a step that is recorded does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self.busy = torch.zeros(4096, 4096, device=device)

    def start(self) -> None:
        """Give the GPU something to do for some milliseconds, in which the host gets ahead."""
        torch.mm(self.busy, self.busy)
        self.events[0].record()

    def mark(self) -> None:
        """In between."""
        self.events[1].record()

    def stop(self) -> tuple[float, float]:
        """The seconds to the mark, and to now."""
        self.events[2].record()
        self.events[2].synchronize()
        norms, total = (self.events[0].elapsed_time(event) / 1e3 for event in self.events[1:])
        return norms, total
