"""Faults of several processes: sums, noise and settings that are not the same everywhere."""

from __future__ import annotations

from .mutant import Body, Edit, mutant

PROCESSES = "perexample.privacy.distributed:Processes"
ONCE = "test_distributed.py::test_noise_is_drawn_once"
TOTALS = "test_distributed.py::test_totals_are_right_and_the_same_to_the_last_bit"

MUTANTS = (
    mutant(
        "F27-noise-of-each",
        "adds noise in each process, so that the total has too much",
        Edit(f"{PROCESSES}.total", ("noised if self.rank == 0 else None", "noised")),
        killers=f"{ONCE}[2-False]",
    ),
    mutant(
        "F27-a-share-of-each",
        "adds a share of the noise in each process, which equal seeds would make the same",
        Edit(
            f"{PROCESSES}.total",
            ("noised if self.rank == 0 else None", "noised and (lambda t: t + (noised(t) - t) / self.size**0.5)"),
        ),
        killers=[f"{ONCE}[2-True]", f"{ONCE}[2-False]"],
    ),
    mutant(
        "F27-not-sent",
        "leaves the total in the first process",
        Edit(f"{PROCESSES}._reduced", ("dist.broadcast(flat, first, group=self.group)", "pass")),
        killers=f"{TOTALS}[2-one bucket]",
    ),
    mutant(
        "F27-mean",
        "averages over processes, and so divides the noise as well",
        Edit(
            f"{PROCESSES}._reduced",
            (
                "dist.reduce(flat, first, group=self.group)",
                "dist.reduce(flat, first, group=self.group); flat /= self.size",
            ),
        ),
        killers=f"{TOTALS}[2-one bucket]",
    ),
    mutant(
        "F27-disagreement",
        "lets processes train with different settings",
        Body(f"{PROCESSES}.agree", "return None"),
        killers="test_distributed.py::test_values_that_differ_are_one_error_in_all_processes[2]",
    ),
    mutant(
        "F27-different-models",
        "lets processes begin with different parameters",
        Edit(f"{PROCESSES}._is_first", ("return torch.equal(bits, other)", "return True")),
        killers="test_distributed.py::test_tensors_that_differ_in_one_bit[2]",
    ),
)
