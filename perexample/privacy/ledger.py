"""What every step has cost, written down before the step is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._arguments import real, shown, whole
from ..errors import ConfigurationError, PrivacyBudgetError, StaleGradientError
from .checkpoint import names_to_disk


@dataclass(frozen=True)
class Release:
    """The cost of one step.

    Attributes:
        noise_multiplier: Standard deviation of the noise in units of the sensitivity.
        sample_rate: Probability with which every example, by itself, was in the batch; ``None`` where that is not
            known, and the step counts as one that saw every example.
    """

    noise_multiplier: float
    sample_rate: float | None = None

    def __post_init__(self) -> None:
        """An entry that means nothing would be found out when the training is over; numpy's have no place in a file."""
        wanted = "a finite number >= 0"
        noise = real("Release(noise_multiplier=...)", self.noise_multiplier, wanted, lambda x: x >= 0)
        object.__setattr__(self, "noise_multiplier", noise)
        if self.sample_rate is not None:
            wanted = "a probability, or None for no amplification"
            rate = real("Release(sample_rate=...)", self.sample_rate, wanted, lambda x: 0 <= x <= 1)
            object.__setattr__(self, "sample_rate", rate)

    def costs_at_most(self, other: Release) -> bool:
        """Whether it has no less noise than another one, but for rounding, and no larger sample rate.

        Args:
            other: The other one.

        Returns:
            Whether a budget that was made for the other covers it.
        """
        rate, most = (1.0 if r.sample_rate is None else r.sample_rate for r in (self, other))
        return self.noise_multiplier >= other.noise_multiplier * (1 - ROUNDING) and rate <= most


ROUNDING = 1e-9  # in which two machines may differ when they calibrate noise
Runs = list[tuple[Release, int]]


class Ledger:
    """All steps that were taken, with what each cost.

    A private optimizer writes each entry BEFORE it moves a parameter, so that a crash can make it count too many steps,
    never too few. The ledger travels in ``optimizer.state_dict()``.

    Args:
        path: A file to which every entry is added, and forced to the disk, as well. With it, steps that were taken
            after the last checkpoint are still known after a crash. An existing file is continued.
        write: Whether this process adds to the file; of several processes one does, and all read it.
        limit: Number of steps that may be taken; the one after is an error. `make_private` sets it.

    Attributes:
        least_noise: Noise multiplier that each step must have, 0 unless `make_private` has calibrated it to a budget.
        most_rate: Sample rate that it may have at most, ``None`` without such a budget.

    Raises:
        ConfigurationError: If the file holds something else, or ``limit`` is no positive whole number.

    Example:
        >>> from perexample.privacy import Ledger, Release
        >>> ledger = Ledger()
        >>> for _ in range(3):
        ...     ledger.record(Release(noise_multiplier=1.1, sample_rate=0.01))
        >>> ledger.steps, ledger.runs
        (3, [(Release(noise_multiplier=1.1, sample_rate=0.01), 3)])
    """

    limit: int | None
    least_noise: float = 0.0
    most_rate: float | None = None

    def __init__(
        self, path: str | os.PathLike[str] | None = None, limit: int | None = None, *, write: bool = True
    ) -> None:
        """Continue the file, if there is one."""
        if path is not None and (not isinstance(path, (str, os.PathLike)) or Path(path).is_dir()):
            raise ConfigurationError(f"Ledger(path=...) must be the path of a file, or None, not {path!r}.")
        wanted = "a whole number of steps, 1 or more"
        self.limit = None if limit is None else whole("Ledger(limit=...)", limit, wanted, 1)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigurationError(f"Ledger(path={str(path)!r}): its folder does not exist; make it first.")
        self.runs: Runs = _read(Path(path)) if path is not None and Path(path).exists() else []
        self._file = Path(path).absolute() if path is not None and write else None
        self._state = self._rows(0)  # of `state_dict`
        if self._file is not None:
            _end_with_whole_line(self._file)
        self._size = _size(self._file)  # that this ledger has left the file with

    @property
    def steps(self) -> int:
        """Number of steps written down."""
        return sum(count for _, count in self.runs)

    def record(self, release: Release) -> None:
        """Write down a step that is about to be taken.

        Args:
            release: What it costs.

        Raises:
            PrivacyBudgetError: If the steps that were planned have all been taken.
            ConfigurationError: If it is no `Release`.
        """
        if not isinstance(release, Release):
            raise ConfigurationError(f"release must be a Release, such as Release(1.1, 0.01), not {release!r}.")
        if self.limit is not None and self.steps >= self.limit:
            raise PrivacyBudgetError(
                f"The {self.limit} steps that were planned have been taken; another would cost more than what was "
                f"planned. Stop here, or plan more steps (epochs) from the start; with a noise_multiplier of your own, "
                f"plan as many as there may be, and stop where epsilon() has reached your budget."
            )
        self._check(release)
        self._write([release])
        _add(self.runs, release, 1)
        self._state[self._shown() :] = self._rows(self._shown())

    def _write(self, releases: Iterable[Release]) -> None:
        """Add entries to the file, if there is one; nobody else may write to it before, nor at the same time."""
        if self._file is not None:
            self._refuse_others(self._file)
            self._size += _append(self._file, releases)
            self._refuse_others(self._file)

    def _refuse_others(self, path: Path) -> None:
        """What the file holds must be what this ledger knows."""
        if self.runs and not path.exists():
            raise StaleGradientError(
                f"The file of the ledger, {str(path)!r}, is gone, and with it {self.steps} steps that it had; what a "
                f"later run finds would be too little. Put it back."
            )
        if (size := _size(path)) != self._size:
            raise StaleGradientError(
                f"The file of the ledger, {str(path)!r}, was written to by somebody else: it has {size} bytes, and "
                f"this ledger left it with {self._size}. Another training that uses it takes steps that this one "
                f"does not count. Give each training a file of its own, or begin the second when the first is over."
            )

    def _check(self, release: Release) -> None:
        """A step, or one that a state brings, must be of the kind that the budget was calibrated for."""
        if release.noise_multiplier < self.least_noise * (1 - ROUNDING):
            raise PrivacyBudgetError(
                f"The step has noise_multiplier={release.noise_multiplier:g}, and the privacy budget needs "
                f"{self.least_noise:g} in each: the noise was lowered in the optimizer's param_groups after it was "
                f"calibrated. For a schedule of your own give make_private the noise_multiplier to begin with, and no "
                f"target_epsilon, and see what epsilon() says."
            )
        if self.most_rate is not None and (release.sample_rate is None or release.sample_rate > self.most_rate):
            raise PrivacyBudgetError(
                f"The step has sample_rate={release.sample_rate}, and the privacy budget was calibrated for "
                f"{self.most_rate:g}: the sampler was changed after make_private."
            )

    def epsilon(self, delta: float, *, accountant: str = "pld", neighbours: str = "add-or-remove") -> float:
        """Privacy spent by all steps so far.

        Args:
            delta: The delta of (epsilon, delta)-differential privacy.
            accountant: ``"pld"`` (tight) or ``"rdp"``.
            neighbours: ``"add-or-remove"`` one example, or ``"replace"`` it.

        Returns:
            An upper bound on epsilon; infinite if a step had no noise.
        """
        from .accounting import epsilon_of

        return epsilon_of(self.runs, delta, accountant=accountant, neighbours=neighbours)

    def state_dict(self) -> dict[str, Any]:
        """The entries as plain numbers, equal ones in a row together.

        Returns:
            As torch's own, of the present for ever: steps that are taken later are part of it, as the weights are that
            they have moved. Copy all of it together, or none.
        """
        self._state[:] = self._rows(0)
        return {"runs": self._state}

    def _shown(self) -> int:
        """How many entries a step that was taken has left as they were."""
        return max(0, min(len(self._state), len(self.runs)) - 1)

    def _rows(self, first: int) -> list[list[Any]]:
        return [[r.noise_multiplier, r.sample_rate, count] for r, count in self.runs[first:]]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; what this ledger knows beyond it is kept, since those steps were taken as well.

        Args:
            state: From `state_dict`.

        Raises:
            ConfigurationError: If it is no such state.
            StaleGradientError: If the entries of the two are not the same as far as both go.
        """
        if not isinstance(state, Mapping) or "runs" not in state:
            raise ConfigurationError("The state is not that of a Ledger, with 'runs'; load what state_dict() gave.")
        runs: Runs = []
        for noise_multiplier, sample_rate, count in _entries(state["runs"]):
            wanted = "a whole number of steps, 1 or more"
            _add(runs, Release(noise_multiplier, sample_rate), whole("count (of the state)", count, wanted, 1))
        for release, _ in runs:
            self._check(release)
        short, long = sorted((self.runs, runs), key=lambda entries: sum(count for _, count in entries))
        if not _begins_with(long, short):
            raise StaleGradientError(
                f"This ledger has {_count(self.runs)} steps, the state that is loaded has {_count(runs)}, and they are "
                f"of different runs: what was spent cannot be told. Load the state into a new optimizer with a ledger "
                f"of its own, or with the ledger file of the same run."
            )
        self._write(_expand(runs, _count(self.runs)))
        self.runs = list(long)
        self.state_dict()

    def knows(self, other: Ledger) -> bool:
        """Whether it begins with all steps of another, as one that continues its file."""
        return _begins_with(self.runs, other.runs)

    def __repr__(self) -> str:
        parts = [f"{count} steps of {release}" for release, count in self.runs]
        return f"Ledger({', '.join(parts) or 'no steps'})"


def _entries(runs: Any) -> list[tuple[Any, Any, Any]]:
    try:
        return [(noise_multiplier, sample_rate, count) for noise_multiplier, sample_rate, count in runs]
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"'runs' in the state of a Ledger must be triples of noise multiplier, sample rate and number of steps, "
            f"not {shown(runs)}; load what state_dict() gave."
        ) from error


def steps_of(state: Mapping[str, Any]) -> int:
    """How many steps the state of a ledger knows."""
    return sum(count for *_, count in state["runs"])


def _count(runs: Runs) -> int:
    return sum(count for _, count in runs)


def _add(runs: Runs, release: Release, count: int) -> None:
    """Join equal entries in a row."""
    if runs and runs[-1][0] == release:
        runs[-1] = (release, runs[-1][1] + count)
    elif count:
        runs.append((release, count))


def _expand(runs: Runs, skip: int) -> Iterable[Release]:
    """The single entries after the first ``skip``."""
    for release, count in runs:
        for _ in range(max(0, count - skip)):
            yield release
        skip = max(0, skip - count)


def _begins_with(long: Runs, short: Runs) -> bool:
    """Whether the first steps of ``long`` are those of ``short``."""
    whole, last = short[:-1], short[-1:]
    if long[: len(whole)] != whole:
        return False
    if not last:
        return True
    rest = long[len(whole) :]
    return bool(rest) and rest[0][0] == last[0][0] and rest[0][1] >= last[0][1]


def _append(path: Path, releases: Iterable[Release]) -> int:
    """One line for each, on the disk before this returns; if that fails, the file is as it was.

    Returns:
        The number of bytes.
    """
    entries = ({"noise_multiplier": r.noise_multiplier, "sample_rate": r.sample_rate} for r in releases)
    lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    before = path.stat().st_size if path.exists() else None
    try:
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # as Ctrl-C, which comes while the disk is waited for
        with suppress(OSError):  # what went wrong first is to be told
            os.truncate(path, before or 0)
        raise
    if before is None:
        names_to_disk(path.parent)
    return len(lines)


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def _end_with_whole_line(path: Path) -> None:
    """Take off a line that a crash has cut short; its step was never taken. One that lacks its end alone gets it."""
    content = path.read_bytes() if path.exists() else b""
    start = content.rfind(b"\n") + 1
    if start < len(content):
        last = content[start:].rstrip(b"\0")
        cut = _is_cut(last.decode(errors="replace"))
        os.truncate(path, start if cut else start + len(last))
        if not cut:
            with path.open("ab") as file:
                file.write(b"\n")


_BEGIN = '{"noise_multiplier": '


def _is_cut(line: str) -> bool:
    """Whether it is the beginning of an entry, or what a disk has in its place; what else has no end is not ours."""
    line = line.rstrip("\0")  # a whole entry without an end, as editors leave it, is one
    return not line.endswith("\n") and "}" not in line and _BEGIN.startswith(line[: len(_BEGIN)])


def _read(path: Path) -> Runs:
    """The entries of a file. A last one that is cut short is of a step that was never taken: a step waits for it."""
    runs: Runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        if _is_cut(line):
            break
        try:
            entry = json.loads(line.rstrip("\0"))
            release = Release(entry["noise_multiplier"], entry["sample_rate"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"Ledger({str(path)!r}): line {number} is no entry of a ledger: {line!r}. Give the file of an earlier "
                f"ledger, or a path where there is none yet."
            ) from error
        _add(runs, release, 1)
    return runs
