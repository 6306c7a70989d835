"""Runs tests with faults put in: one process that has imported and collected everything, and a fork of it for each run.

Run as ``python -m faults.server <requests> <answers> <tests...>``, where the first two are open file descriptors. Each
request is a line of JSON, ``{"mutant": <id or null>, "tests": [...]}``; each answer one as well.

Nothing here may run a backward before it forks: torch does not let a process use autograd if its parent has.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

import pytest

import faults

from .mutant import remember

SECONDS = 120.0  # that a run may take
BROKEN = ("NameError", "UnboundLocalError", "TypeError", "AttributeError", "faults.mutant.FaultError")  # of a fault


class Runs:
    """Plugin that takes the place of the ordinary loop over the tests."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers = os.fdopen(requests), os.fdopen(answers, "w")
        self.reports: list[pytest.TestReport] = []

    def pytest_sessionstart(self) -> None:
        """Import what takes long, before tests are collected; pytest's plugins must be there before."""
        _prepare()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what is reported."""
        self.reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Answer requests until there are no more."""
        if session.testsfailed:
            raise session.Interrupted("not all of the tests can be collected")
        for line in self.requests:
            request = json.loads(line)
            print(json.dumps(self._forked(session, request)), file=self.answers, flush=True)
        return True

    def _forked(self, session: pytest.Session, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a fork; one that does not answer in time is ended with all that it has started."""
        here, there = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.close(here)
            self._run(session, request, there)
        os.close(there)
        parts: list[bytes] = []
        end = time.monotonic() + SECONDS
        while select.select([here], [], [], max(0.0, end - time.monotonic()))[0] and (part := os.read(here, 1 << 16)):
            parts.append(part)
            if part.endswith(b"\n"):
                break
        os.close(here)
        try:
            os.killpg(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return json.loads(b"".join(parts) or json.dumps({"error": f"no answer within {SECONDS:.0f} s, or a crash"}))

    def _run(self, session: pytest.Session, request: dict[str, Any], pipe: int) -> None:
        """In the fork: put the fault in, run the tests, tell, and end without anything of the parent's."""
        try:
            os.setsid()
            for file in (self.requests, self.answers):
                os.close(file.fileno())
            faulthandler.dump_traceback_later(SECONDS - 5, file=sys.__stderr__)
            _fork_workers()
            answer = self._tested(session, request)
        except BaseException:  # noqa: BLE001 - told to who has asked
            answer = {"error": traceback.format_exc()}
        try:
            os.write(pipe, json.dumps(answer).encode() + b"\n")
        finally:
            os._exit(0)

    def _tested(self, session: pytest.Session, request: dict[str, Any]) -> dict[str, Any]:
        """Outcomes; with a fault in, up to the first test that fails."""
        name, tests = request["mutant"], request["tests"]
        patch = pytest.MonkeyPatch()
        if name is not None:
            faults.by_id(name).apply(patch)
        passed: list[str] = []
        items = [item for test in tests for item in session.items if matches(item.nodeid, test)]
        for item in dict.fromkeys(items):
            self.reports.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            failed = [report for report in self.reports if report.failed]
            if failed:
                message, when = _message(failed[0]), failed[0].when
                answer = {"failed": item.nodeid, "passed": passed, "message": message, "when": when}
                if name is None or (when == "call" and not message.startswith(BROKEN)):
                    return answer
                return {"error": f"{item.nodeid} fails in its {when}, not as a test should: {message}"}
            if all(report.passed for report in self.reports):
                passed.append(item.nodeid)
        return {"failed": None, "passed": passed}


def matches(nodeid: str, test: str) -> bool:
    """Whether a test is the one that was named, one of its cases, or in the file of this name."""
    names = (nodeid, nodeid.partition("[")[0], nodeid.partition("::")[0])
    return any(name == test or name.endswith(f"/{test}") for name in names)


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr)[-2000:] if crash is None else crash.message[:2000]


def _fork_workers() -> None:
    """Processes that tests start by ``spawn`` would import the library anew, without the fault."""
    import torch

    get_context = torch.multiprocessing.get_context
    torch.multiprocessing.get_context = lambda method=None: get_context("fork")


def _prepare() -> None:
    """Import what takes long, so that no fork has to."""
    import hypothesis
    import torch._dynamo  # torch.optim imports it when the first optimizer is made

    for name in ("perexample.extensions", "perexample.privacy"):
        importlib.import_module(name)
    remember()
    for name in ("dp_accounting.pld.privacy_loss_distribution", "dp_accounting.rdp", "scipy.stats"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch.set_num_threads(1)
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure needs not be made small
    hypothesis.settings.register_profile("faults", database=None, phases=phases, deadline=None)
    hypothesis.settings.load_profile("faults")


def main() -> int:
    """Collect the tests, then serve."""
    requests, answers, base, *tests = sys.argv[1:]
    options = ["-q", "-s", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly", f"--basetemp={base}"]
    return int(pytest.main([*options, *tests], plugins=[Runs(int(requests), int(answers))]))


if __name__ == "__main__":
    sys.exit(main())
