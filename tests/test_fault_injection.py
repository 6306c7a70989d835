"""Faults that are put into the library are found by the suite: each of `faults` by a test that it names.

One process imports everything and collects the tests once; each fault is put into a fork of it, which runs the tests
that must find it until one fails. Without a fault that test passes, in another fork. One fault for each entry of the
list is run in every run, all others with ``-m slow``.

With the environment variable ``PEREXAMPLE_SCORES`` the outcome is left in that folder as ``faults.json``, with the test
that has found each fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import faults
import pytest
from audit import save_scores
from faults.mutant import Body, Edit, FaultError, Put
from faults.server import SECONDS

TESTS = Path(__file__).resolve().parent
ORDINARY = faults.ordinary()
PARAMETERS = [
    pytest.param(mutant, id=mutant.id, marks=[] if mutant.id in ORDINARY else [pytest.mark.slow])
    for mutant in faults.MUTANTS
]


class Server:
    """The process that runs tests with faults put in."""

    def __init__(self, tests: list[str], folder: Path) -> None:
        requests, answers = os.pipe(), os.pipe()
        self.log = folder / "log"
        command = [sys.executable, "-m", "faults.server", str(requests[0]), str(answers[1]), str(folder / "base")]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **threads}
        environment.pop("PEREXAMPLE_SCORES", None)  # what tests measure of a faulty library is no score
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *tests], cwd=TESTS, env=environment, pass_fds=(requests[0], answers[1]),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        os.close(requests[0])
        os.close(answers[1])
        self.requests, self.answers = os.fdopen(requests[1], "w"), os.fdopen(answers[0])
        self.sound: dict[str, dict[str, Any]] = {}

    def without_fault(self, test: str) -> dict[str, Any]:
        """Outcome of a single test as it is; each is run once."""
        if test not in self.sound:
            self.sound[test] = self.run(None, [test])
        return self.sound[test]

    def run(self, mutant: str | None, tests: list[str]) -> dict[str, Any]:
        """Outcome of these tests with a fault, or without any."""
        try:
            print(json.dumps({"mutant": mutant, "tests": tests}), file=self.requests, flush=True)
            ready, _, _ = select.select([self.answers], [], [], 2 * SECONDS)
            answer = self.answers.readline() if ready else ""
        except BrokenPipeError:
            answer = ""
        if not answer:
            pytest.fail(f"The process that runs the tests has ended, or hangs:\n{self.log.read_text()[-3000:]}")
        outcome = json.loads(answer)
        if "error" in outcome:
            pytest.fail(outcome["error"])
        return outcome

    def stop(self) -> None:
        """End it."""
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.answers.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    """With the tests of all faults that this run is about."""
    items = request.session.items
    mutants = [item.callspec.params["mutant"] for item in items if item.function is test_a_fault_is_found]
    tests = sorted({test for mutant in mutants for test in mutant.killers})
    server = Server(tests, tmp_path_factory.mktemp("faults"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def score():
    """What was found by which test, left for a scorecard."""
    total: list[str] = []
    by: dict[str, str] = {}
    yield total, by
    save_scores("faults", {"caught": len(by), "total": len(total), "by": by})


@pytest.mark.parametrize("mutant", PARAMETERS)
def test_a_fault_is_found(mutant, server, score):
    total, by = score
    total.append(mutant.id)
    outcome = server.run(mutant.id, list(mutant.killers))
    assert outcome["failed"] is not None, f"{mutant.id} ({mutant.description}) survives {outcome['passed']}"
    sound = server.without_fault(outcome["failed"])
    assert sound["passed"] == [outcome["failed"]], f"fails without the fault, too: {sound}"
    by[mutant.id] = outcome["failed"]


def test_every_entry_has_a_fault_or_a_reason():
    mutated = {mutant.entry for mutant in faults.MUTANTS}
    assert mutated | faults.NOT_APPLICABLE.keys() == set(faults.ENTRIES)
    assert not mutated & faults.NOT_APPLICABLE.keys()
    names = [mutant.id for mutant in faults.MUTANTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("mutant", faults.MUTANTS, ids=lambda mutant: mutant.id)
def test_what_a_fault_changes_is_there(mutant):
    """And is there again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        mutant.apply(patch)


GONE = {
    "no such text": lambda: Edit("perexample.privacy.noise:Noise.plus", ("randint", "randn")),
    "text that occurs twice": lambda: Edit("perexample.privacy.noise:Noise.plus", ("std", "2 * std")),
    "no such method": lambda: Edit("perexample.privacy.noise:Noise.unlike", ("std", "2 * std")),
    "no such class": lambda: Put("perexample.privacy.noise:Silence", lambda old: None),
    "a name that is unknown there": lambda: Body("perexample.privacy.noise:Noise.plus", "return draw(tensor)"),
    "no function": lambda: Edit("perexample.privacy.noise:_PIECE", ("1", "2")),
}


@pytest.mark.parametrize("change", GONE.values(), ids=GONE)
def test_a_fault_that_changes_nothing_any_more_is_an_error(change, monkeypatch):
    with pytest.raises(FaultError):
        change().apply(monkeypatch)
