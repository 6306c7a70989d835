"""Seconds of steps beside plain steps, and peak memory of steps in processes of their own."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import report
import torch
from systems import SYSTEMS, Loop, Problem, System, disagreement
from tqdm import tqdm

TOLERANCE = 1e-3
MIB = 2**20
TURN = 0.05
# Memory that is freed goes back at once: every tensor of 64 KiB or more is a mapping of its own.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}  # fmt: skip
# Seconds are taken with freed memory kept by the process, as allocators for GPUs keep it. glibc's default gives blocks
# of some MiB back, or keeps them, by chance; the system clears what it hands out again, which takes as long as a layer.
# No mappings at all: a threshold for them has a limit of 32 MiB, and per-example gradients of a layer are larger.
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def keep_memory() -> None:
    """Start the script again in an environment in which freed memory is kept, if this is none (Linux)."""
    if sys.platform == "linux" and not KEEPING.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | KEEPING)


def options_of(
    script: str | None,
    models: Sequence[str],
    chosen: Sequence[str],
    repeats: int,
    seconds: float,
    more: Callable[[argparse.ArgumentParser], object] = id,
) -> argparse.Namespace:
    """The options of a script that times systems on models, whose text is its help; ``more`` adds its own."""
    parser = argparse.ArgumentParser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(chosen), metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"turns of each system (default: {repeats})")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"cap for one on a model (default: {seconds})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--n", type=int, help="examples (default: each model's own number); needs --out")
    parser.add_argument("--out", type=Path, help="write everything to this folder instead")
    more(parser)
    options = parser.parse_args()
    if options.n and not (options.out or getattr(options, "peak", None)):
        parser.error("numbers of other batches do not belong with the others: add --out")
    return options


def script(
    name: str,
    text: str | None,
    models: Sequence[str],
    measured: Callable[[argparse.Namespace], dict[str, dict]],
    shown: Callable[[dict], list[str]],
    tables: Callable[[dict, argparse.Namespace], None],
) -> None:
    """What a script does that times systems on models of the suite: options, numbers, tables.

    Numbers of models that are not asked for stay as they are.

    Args:
        name: Of the script and of its file of numbers.
        text: Its help.
        models: Those it can measure.
        measured: Measures those that are asked for.
        shown: The lines that it prints.
        tables: Writes the tables.
    """
    options = options_of(text, models, models, 15, 12.0)
    keep_memory()
    torch.set_num_threads(options.threads)
    path = (options.out or report.HERE) / f"{name}.json"
    data = report.load(path) or {"models": {}}
    command = f"python gallery/benchmarks/{name}.py"
    data |= {"system": report.system_info("cpu", options.threads), "command": command}
    data["models"] |= measured(options)
    report.save(path, data)
    print("\n".join(shown(report.rounded(data))))
    tables(report.rounded(data), options)


def reason(error: Exception) -> str:
    """The first line of what went wrong, with the kind of error."""
    lines = str(error).strip().splitlines()
    kind = "" if type(error).__name__ == "NotInstalledError" else f"{type(error).__name__}: "
    return f"{kind}{lines[0] if lines else 'no message'}"


def loop(problem: Problem) -> Loop:
    """One backward per example, done."""
    found = Loop(problem)
    found.step()
    return found


class Check:
    """What a system has found against one backward per example, in float32 or, should they differ, in float64."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.reference = problem, loop(problem)
        self.exact: Loop | None = None

    def worst(self, system: System) -> float:
        """The greatest relative difference, after a step."""
        worst = disagreement(system, self.reference)
        if worst <= TOLERANCE:
            return worst
        if self.exact is None:  # float32 of another order may take the other side of a ReLU or maximum
            self.exact = loop(self.problem.double())
        return min(worst, disagreement(system, self.exact))


def exact_in_double(kind: type[System], check: Check) -> bool:
    """Whether a system agrees with one backward per example in float64 to all digits that count."""
    problem = check.problem.double()
    with exact_products():
        reference, system = loop(problem), kind(problem)
        system.step()
        return disagreement(system, reference) <= 1e-9


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions on GPUs without TF32, in which two orders of computation may differ by more than the tolerance."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def make(
    problem: Problem, names: list[str], kinds: Mapping[str, type[System]] = SYSTEMS
) -> tuple[dict[str, System], dict[str, str]]:
    """The systems that can do the model, checked against the loop after one step; and why others cannot."""
    with exact_products():
        check = Check(problem)
    ready: dict[str, System] = {}
    failed: dict[str, str] = {}
    for name in tqdm(names, desc="checks", leave=False, disable=None):
        try:
            with exact_products():
                system = kinds[name](problem)
                system.step()
                worst = check.worst(system)
            if problem.x.is_cuda:  # as it is to be timed
                system.zero()
                system = kinds[name](problem)
                system.step()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer
            failed[name] = reason(error)
            continue
        system.zero()
        if TOLERANCE < worst <= 10 * TOLERANCE and exact_in_double(kinds[name], check):
            worst = 0.0  # float32 has taken other sides of ReLUs than the reference
        if not worst <= TOLERANCE:  # NaN is wrong too
            failed[name] = f"wrong: relative difference {worst:.1e} from one backward per example"
        else:
            ready[name] = system
    return ready, failed


def seconds_of(action: Callable[[], None], device: str) -> float:
    """How long it takes."""
    if device == "cpu":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def timed(system: System, device: str, count: int = 1) -> float:
    """Seconds of a step and of letting its results go, the mean of some."""

    def action() -> None:
        for _ in range(count):
            system.step()
            system.zero()

    return seconds_of(action, device) / count


def warmed(system: System, device: str) -> int:
    """How many steps make up a turn, from some that warm up: the first, or the second, may take many times more."""
    seconds = timed(system, device)
    for _ in range(3):
        if seconds < 20 * TURN:
            seconds = min(seconds, timed(system, device))
    return min(20, max(1, round(TURN / seconds)))


def quartiles(values: list[float]) -> list[float]:
    """The first, the median and the third."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def compare(
    systems: dict[str, System], plain: System, repeats: int, cap: float, device: str = "cpu"
) -> dict[str, dict[str, object]]:
    """Quartiles of seconds, and of ratios to the plain step beside each.

    Systems take turns, each time beginning with another one; plain steps are right before or right after, in turns.
    A turn is as many steps as take `TURN` seconds. A system that has used up its seconds stops after three turns.
    """
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    names = list(systems)
    counts = dict.fromkeys(names, 1) if repeats == 1 else {name: warmed(systems[name], device) for name in names}
    beside_count = 1 if repeats == 1 else warmed(plain, device)
    gc.collect()
    for number in tqdm(range(repeats), desc="steps", leave=False, disable=None):
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if len(pairs[name]) >= 3 and counts[name] * sum(s for _, s in pairs[name]) > cap:
                continue
            if number % 2:
                own = timed(systems[name], device, counts[name])
                beside = timed(plain, device, beside_count)
            else:
                beside = timed(plain, device, beside_count)
                own = timed(systems[name], device, counts[name])
            pairs[name].append((beside, own))
    results: dict[str, dict[str, object]] = {}
    for name, found in pairs.items():
        ratios = quartiles([own / beside for beside, own in found])
        results[name] = {"seconds": quartiles([own for _, own in found]), "ratio": ratios, "repeats": len(found)}
    return results


def timings(
    problem: Problem,
    names: list[str],
    repeats: int,
    cap: float,
    device: str = "cpu",
    kinds: Mapping[str, type[System]] = SYSTEMS,
) -> dict[str, dict[str, object]]:
    """Check the systems and time those that are right; the others' entries say why they are not."""
    ready, failed = make(problem, [name for name in names if name != "plain"], kinds)
    results: dict[str, dict[str, object]] = {}
    plain = System(problem)
    if "plain" in names:
        ready = {"plain": System(problem), **ready}  # against itself, which shows the noise
    results.update(compare(ready, plain, repeats, cap, device))
    for name, system in ready.items():
        if system.note:
            results[name]["note"] = system.note
    results.update({name: {"failed": why} for name, why in failed.items()})
    return results


def trim() -> None:
    """Give freed memory back to the system, where that can be asked for."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> float:
    """A figure of the process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_over_base(action: Callable[[], None], device: str = "cpu") -> float:
    """Peak memory in MiB while it runs, over what there was before.

    On the CPU that is resident memory of the whole process, after its record of the peak was set back.

    Raises:
        NotImplementedError: On the CPU of systems other than Linux.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - base) / MIB
    if not Path("/proc/self/clear_refs").exists():
        raise NotImplementedError("peak memory on the CPU is measured on Linux only")
    trim()
    Path("/proc/self/clear_refs").write_text("5")
    base = _status("VmRSS")
    action()
    return _status("VmHWM") - base


def peak_of(system: System, device: str = "cpu", warm: int = 2, steps: int = 3) -> float:
    """Peak memory of some steps over that between steps, in MiB."""
    if system.own_peak is not None:
        return system.own_peak
    for _ in range(warm):
        system.step()
    system.zero()

    def action() -> None:
        for _ in range(steps):
            system.step()

    return peak_over_base(action, device)


def peaks(problem: Problem, names: list[str], device: str = "cpu", **counts: int) -> dict[str, float | str]:
    """Peak memory of each system one after the other in this process, or why there is none."""
    found: dict[str, float | str] = {}
    for name in names:
        try:
            found[name] = round(peak_of(SYSTEMS[name](problem), device, **counts), 2)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer
            found[name] = reason(error)
    return found


def in_process(script: Path, *arguments: str, limit: float = 600.0) -> dict[str, float | str]:
    """What a script prints as JSON on its last line, run by itself with memory that goes back when freed."""
    command = [sys.executable, str(script), *arguments]
    try:
        run = subprocess.run(
            command, env=os.environ | MALLOC, capture_output=True, text=True, check=True, timeout=limit
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"ended with {error.returncode}"}
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {limit:.0f} seconds"}
    return json.loads(run.stdout.strip().splitlines()[-1])


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(statistics.fmean(math.log(value) for value in values))
