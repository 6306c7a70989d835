"""A private training that is killed where it is told to, for tests/test_crash.py.

As a program it waits for jobs, one JSON object a line, and runs each in a fork of itself, so that torch is imported
once; the fork shares nothing else with other runs. It answers with the signal that ended the fork, 0 for none.
"""

import hashlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from perexample import perex
from perexample.extensions import ClippedGrad
from perexample.privacy import Noise, Private, epsilon, ledger, make_private

N, RATE = 16, 0.25  # a Poisson sample of 4, which is empty in one of a hundred
PARAMETERS = 4  # with a noise vector each, unless `wide`
DEFAULTS: dict[str, Any] = {
    "seeded": True,  # generators of our own for samples and noise
    "physical": None,  # physical_batch_size
    "workers": 0,  # of the loader
    "every": 1,  # steps between checkpoints
    "steps": 8,  # of the optimizer
    "planned": 100,  # that the budget allows: steps that are taken again count again
    "kill": None,  # (phase, number of its occurrence)
    "after": None,  # seconds to a kill from outside
    "wide": False,  # layers so large that perex chooses the methods by measurements
    "strategy": None,  # of perex, instead of the context of `Private`
    "fastest": None,  # which method pretends to be: 1 for the first, -1 for the last that is tried
}


class Phases:
    """Counts how often each place is passed, and kills the process at one of them."""

    def __init__(self, kill: Any) -> None:
        self.kill = None if kill is None else tuple(kill)
        self.counts: Counter[str] = Counter()

    def __call__(self, phase: str) -> None:
        self.counts[phase] += 1
        if self.kill == (phase, self.counts[phase]):
            os.kill(os.getpid(), signal.SIGKILL)


class Log:
    """Lines that a kill cannot take back when the call returns, with the process they are of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {event}\n")


def network(wide: bool) -> nn.Module:
    size = 256 if wide else 4
    more = (nn.Linear(size, size), nn.Tanh()) if wide else ()
    return nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Dropout(0.5), *more, nn.Linear(size, 2))


def data(wide: bool) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    shape = (N, 64, 3) if wide else (N, 3)
    return TensorDataset(torch.randn(shape, generator=g), torch.randint(0, 2, (N,), generator=g))


def make(job: dict[str, Any]) -> Private:
    torch.manual_seed(2)
    model = network(job["wide"])
    generators = {
        "sampling_generator": torch.Generator().manual_seed(3),
        "noise_generator": torch.Generator().manual_seed(4),
    }
    return make_private(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.1),
        data(job["wide"]),
        batch_size=RATE * N,
        public_size=N,
        max_norm=0.5,
        noise_multiplier=1.0,
        target_delta=1e-3,
        steps=job["planned"],
        physical_batch_size=job["physical"],
        ledger=Path(job["folder"], "ledger"),
        num_workers=job["workers"],
        **(generators if job["seeded"] else {}),
    )


def watch(private: Private, phases: Phases, log: Log) -> None:
    """Pass the phases where training passes them, and log what is released."""
    model, optimizer, book = private.model, private.optimizer, private.ledger
    plus, commit, append = Noise.plus, ClippedGrad.commit, ledger._append
    record, load, save, replace = book.record, book.load_state_dict, torch.save, os.replace

    def forward(module: nn.Module, args: Any, output: Tensor) -> None:
        phases("forward")
        if output.requires_grad:
            output.register_hook(lambda grad: phases("backward"))

    def committed(self: ClippedGrad) -> None:
        phases("sums formed")
        commit(self)

    def recorded(release: Any) -> None:
        phases("before the ledger")
        record(release)
        phases("after the ledger")

    def appended(path: Path, releases: Any) -> int:
        if phases.kill is not None and phases.kill[0] == "torn ledger":
            with path.open("a") as file:
                file.write('{"noise_mult')
                file.flush()
                os.fsync(file.fileno())
                phases("torn ledger")
                file.truncate(file.tell() - len('{"noise_mult'))
        else:
            phases("torn ledger")
        return append(path, releases)

    def noisy(self: Noise, tensor: Tensor, std: float) -> Tensor:
        noise = plus(self, torch.zeros_like(tensor, dtype=torch.float64), std)
        log(f"noise {hashlib.sha256(noise.numpy().tobytes()).hexdigest()}")
        phases("noise")
        return noise + tensor

    before: list[Tensor] = []

    def noised(*_: Any) -> None:
        phases("after the noise")
        before[:] = [p.detach().clone() for p in model.parameters()]

    def stepped(*_: Any) -> None:
        assert not all(map(torch.equal, before, model.parameters()))
        log("moved")
        phases("parameters moved")

    def saved(state: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(state, whole)
        content = whole.getvalue()
        file.write(content[: len(content) // 2])
        file.flush()
        phases("half saved")
        file.write(content[len(content) // 2 :])

    def replaced(source: Any, target: Any) -> None:
        phases("saved beside")
        replace(source, target)
        phases("saved")

    def loaded(state: Any) -> None:
        load(state)
        phases("ledger loaded")

    model[1].register_forward_hook(forward)
    ClippedGrad.commit, Noise.plus, ledger._append = committed, noisy, appended
    book.record, book.load_state_dict = recorded, loaded
    torch.save, os.replace = saved, replaced
    optimizer.register_step_pre_hook(noised)
    optimizer.register_step_post_hook(stepped)


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """How often the parameters that there are now have moved; the ledger may have counted steps that were lost."""
    return int(max((state["step"] for state in optimizer.state.values()), default=0))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out.mean(1) if out.dim() == 3 else out, y)


def train(job: dict[str, Any]) -> None:
    """From the checkpoint, if there is one, to the end."""
    folder = Path(job["folder"])
    private, phases = make(job), Phases(job["kill"])
    watch(private, phases, Log(folder / "events"))
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        private.load(checkpoint)
    while steps_taken(private.optimizer) < job["steps"]:
        for x, y in private.loader:
            given = job["strategy"]
            with private if given is None else perex(private.clipping, grad=False, strategy=given):
                loss_of(private.model, x, y).backward()
            if not private.step():
                phases("between pieces")
                continue
            phases("before the checkpoint")
            taken = steps_taken(private.optimizer)
            if taken % job["every"] == 0:
                private.save(checkpoint)
            if taken == job["steps"]:
                break
    result = {
        "model": private.model.state_dict(),
        "moments": private.optimizer.state_dict()["state"],
        "steps": private.steps,
        "epsilon": private.epsilon(),
        "random": torch.get_rng_state(),
    }
    torch.save = _SAVE
    torch.save(result, folder / "result")
    Path(folder, "counts").write_text(json.dumps(phases.counts))


_SAVE = torch.save


def pretend(fastest: int) -> None:
    """Let one method seem the fastest, as the noise of a clock may."""
    from perexample import methods

    times = iter(range(10**6, 0, -1) if fastest < 0 else range(10**6))
    methods._timed = lambda *args, **kwargs: methods.Timed(next(times), 0.0, False)


def forked(job: dict[str, Any]) -> None:
    """What a fork does."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # of the jobs and answers
        os.dup2(null, stream)
    status = 1
    try:
        if job["fastest"] is not None:
            pretend(job["fastest"])
        train(job)
        status = 0
    except BaseException:  # noqa: BLE001 - a fork must end here, whatever happens
        Path(job["folder"], "error").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fork; its exit status, and the signal that ended it."""
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        forked(job)
    if job["after"] is not None:
        time.sleep(job["after"])
        os.kill(pid, signal.SIGKILL)  # of a child that has not been waited for, so that the number is still its own
    _, status = os.waitpid(pid, 0)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": killed, "status": 0 if killed else os.WEXITSTATUS(status), "seconds": time.monotonic() - begin}


def main() -> None:
    torch.set_num_threads(1)
    epsilon(1e-3, noise_multiplier=1.0, sample_rate=0.1, steps=1)  # imports what accounting needs, once,
    torch.optim.AdamW(nn.Linear(1, 1).parameters())  # and what optimizers do; no backward, whose threads do not fork
    for line in sys.stdin:
        print(json.dumps(run(DEFAULTS | json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
