"""Run the tests of private training, and write what they measured into the README.

``python tests/scorecard.py`` takes the sets that every run takes; ``--slow`` the large ones; ``--table`` writes the
table of the last run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, NUMBERS = ROOT / "README.md", ROOT / "tests" / "scores.json"
TWO_STEPS = "two steps"  # a score that is not tight, see test_audit.py
START, END = "<!-- scores:start -->", "<!-- scores:end -->"
FILES = [
    "test_sensitivity",
    "test_audit",
    "test_fault_injection",
    "test_crash",
    "test_bad_input",
    "test_leaks",
]


def measured(slow: bool) -> dict[str, Any]:
    """Run them; what they left."""
    with tempfile.TemporaryDirectory() as folder:
        files = [f"tests/{name}.py" for name in FILES]
        command = [sys.executable, "-m", "pytest", *files, "-m", "not cuda" if slow else "not slow and not cuda"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PEREXAMPLE_SCORES": folder}, check=False)
        if done.returncode:
            raise SystemExit("Tests failed, so that there is no score.")
        scores = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
        return {
            "slow": slow,
            "torch": version(),
            "python": platform.python_version(),
            **scores,
        }


def version() -> str:
    """Torch's, without the build."""
    import torch

    return torch.__version__.partition("+")[0]


def excess(ratio: float) -> str:
    """A ratio to a bound, as what it is above 1."""
    return f"1 + {ratio - 1:.0e}" if ratio > 1 else f"{ratio:.6f}".rstrip("0").rstrip(".")


def rows(scores: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Claim, figure, and the file of tests."""
    sense, audit, faults, crash, bad = (
        scores[name] for name in ("sensitivity", "audit", "faults", "crash", "bad_input")
    )
    kills, accounted = (crash[name] + crash[f"secure_{name}"] for name in ("kills", "accounted"))
    bounds = [case["epsilon"] for name, case in audit["correct"].items() if name != TWO_STEPS]
    seen = sum(case["violates"] for case in audit["faults"].values())
    return [
        (
            "One example more, less or other moves the clipped sums by at most the sensitivity",
            f"{sense['cases']} random models and data; worst ratio {excess(sense['worst_float32'])} in float32, "
            f"{excess(sense['worst_float64'])} in float64, {excess(sense['worst_bf16'])} under bf16 autocast, beside "
            f"the rounding of the sum",
            "test_sensitivity",
        ),
        (
            f"A step is as private as claimed: epsilon {audit['claimed_epsilon']:.2f} at delta 1e-5",
            f"audited through the real path in {len(bounds)} ways, {audit['trials']} trials each: at least "
            f"{min(bounds):.2f} to {max(bounds):.2f} (99%); of {len(audit['faults'])} injected faults {seen} exceed "
            f"the claim, the others are seen in the noise",
            "test_audit",
        ),
        (
            "Faults put into the library are found by its tests",
            f"{faults['caught']} of {faults['total']}",
            "test_fault_injection",
        ),
        (
            "A run that is killed is resumed to the same bits, and counts every step",
            f"{kills} kills: {crash['bitwise']} of {crash['kills']} bitwise with "
            f"seeded noise, {accounted} of {kills} accounted in full; "
            f"{crash['repeated_noise']} of {crash['noise_vectors']} noise vectors came twice",
            "test_crash",
        ),
        (
            "Bad input gives one error that names it and says what to do",
            f"{bad['clear']} of {bad['cases']} cases",
            "test_bad_input",
        ),
    ]


def table(scores: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| claim | measured | tests |", "|---|---|---|"]
    lines += [f"| {claim} | {figure} | [{name}](tests/{name}.py) |" for claim, figure, name in rows(scores)]
    command = "python tests/scorecard.py" + (" --slow" if scores["slow"] else "")
    lines += ["", f"Written by `{command}` with torch {scores['torch']} and Python {scores['python']}."]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="the large sets too")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    scores = json.loads(NUMBERS.read_text()) if options.table else measured(options.slow)
    NUMBERS.write_text(json.dumps(scores, indent=1) + "\n")
    before, _, rest = README.read_text().partition(START)
    README.write_text(f"{before}{START}\n{table(scores)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
