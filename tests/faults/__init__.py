"""Faults of the library itself, one or more for every entry of the list of known ways to lose privacy.

The entries F1 to F50 are failures that were published of other systems, or measured there. For each that applies here a
fault of that kind is put into the library, and tests of the suite must fail because of it. `test_fault_injection.py`
runs them. A fault that is added gets a place in one of the modules below.
"""

from __future__ import annotations

from . import accounting, clipping, engine, gradients, optimizer, processes, sampling
from .mutant import Mutant

ENTRIES = tuple(f"F{number}" for number in range(1, 51))

# Entries that cannot go wrong here, and why; all others have a fault.
NOT_APPLICABLE: dict[str, str] = {}

MUTANTS: tuple[Mutant, ...] = tuple(
    sorted(
        (
            *clipping.MUTANTS,
            *gradients.MUTANTS,
            *engine.MUTANTS,
            *optimizer.MUTANTS,
            *sampling.MUTANTS,
            *accounting.MUTANTS,
            *processes.MUTANTS,
        ),
        key=lambda mutant: int(mutant.entry[1:]),
    )
)


def by_id(name: str) -> Mutant:
    """The fault of this name."""
    return next(mutant for mutant in MUTANTS if mutant.id == name)


def ordinary() -> set[str]:
    """Names of one fault for each entry: the first."""
    first: dict[str, str] = {}
    for mutant in MUTANTS:
        first.setdefault(mutant.entry, mutant.id)
    return set(first.values())
