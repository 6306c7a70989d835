"""Processes for test_distributed.py, and what runs in them.

The processes stay alive over many tests, since starting one takes seconds; each job makes a process group of its own.
"""

from __future__ import annotations

import datetime
import os
import traceback
import uuid
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from perexample import GenericRule, Rule, extend, perex, privatize, register_rule, unextend
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad
from perexample.privacy import PoissonBatchSampler, Processes

TIMEOUT = 120.0  # of a job; a process waits for the others half as long
_CONNECTIONS = 3  # that are tried


class _NotConnectedError(Exception):
    """The processes did not find each other, so that nothing of a job has run."""


class Pool:
    """A few processes that wait for jobs."""

    def __init__(self, folder: Path, size: int = 3) -> None:
        self.folder, self.size = folder, size
        self.workers: list[tuple[Any, Any]] = []

    def run(self, job: Callable[..., Any], size: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """What ``job(*args)`` returns in each of ``size`` processes; one that hangs is an error."""
        for _ in range(_CONNECTIONS - 1):  # on a busy machine Gloo fails to connect now and then
            try:
                return self._run(job, size, *args, timeout=timeout)
            except _NotConnectedError:
                continue
        return self._run(job, size, *args, timeout=timeout)

    def _run(self, job: Callable[..., Any], size: int, *args: Any, timeout: float) -> list[Any]:
        if not self.workers:
            self.workers = [self._start() for _ in range(self.size)]
            for _, pipe in self.workers:  # all have imported what they need, however busy the machine is
                assert pipe.poll(5 * TIMEOUT)
                assert pipe.recv() == "ready"
        store = self.folder / uuid.uuid4().hex
        for rank, (_, pipe) in enumerate(self.workers[:size]):
            pipe.send((job.__name__, rank, size, str(store), args))
        answers = []
        for rank, (_, pipe) in enumerate(self.workers[:size]):
            done, answer = _answer(pipe, timeout)
            if not done:
                connected = all(_answer(other, 1.0)[0] is not None for _, other in self.workers[rank + 1 : size])
                self.stop()
                kind = AssertionError if connected and done is False else _NotConnectedError
                raise kind(f"{job.__name__} in process {rank} of {size}: {answer}")
            answers.append(answer)
        return answers

    def _start(self) -> tuple[Any, Any]:
        context = torch.multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        return process, here

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []


def _answer(pipe: Any, timeout: float) -> tuple[bool | None, Any]:
    """Whether a process has done its job, ``None`` if it was not connected, and what it returned or raised."""
    try:
        return pipe.recv() if pipe.poll(timeout) else (False, f"no answer within {timeout} s")
    except EOFError:
        return False, "the process has died"


def _serve(pipe: Any) -> None:
    """Run jobs until the other end is closed."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    pipe.send("ready")
    while True:
        try:
            name, rank, size, store, args = pipe.recv()
        except EOFError:
            os._exit(0)
        answer: tuple[bool | None, Any] = None, ""
        try:
            seconds = datetime.timedelta(seconds=TIMEOUT / 2)
            dist.init_process_group("gloo", f"file://{store}", seconds, size, rank)
            answer = False, ""
            answer = True, globals()[name](*args)
        except Exception:  # noqa: BLE001 - told to the test
            answer = answer[0], traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)


def error_of(work: Callable[[], Any]) -> tuple[str, str]:
    """Class and text of the error that something raises."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - looked at by the test
        return type(error).__name__, str(error)
    return "no error", ""


def seed_of(rank: int, equal: bool) -> int:
    return 0 if equal else rank


# ---------------------------------------------------------------------------------------------------------- Processes


def identity() -> tuple[int, int]:
    processes = Processes()
    return processes.rank, processes.size


def agreement() -> list[tuple[str, str]]:
    """Values that are equal, that differ, and that one process does not have."""
    processes = Processes()
    rank = processes.rank
    processes.agree(noise_multiplier=1.0, nan=float("nan"), inf=float("inf"), steps=3)
    return [
        error_of(lambda: processes.agree(steps=3, noise_multiplier=1.0 + (rank == 1))),
        error_of(lambda: processes.agree(**({"steps": 3.0} if rank else {}))),
        error_of(lambda: processes.agree(tiny=1.0 + rank * 2.0**-52)),
        error_of(lambda: processes.agree(nan=float("nan") if rank else 0.0)),
    ]


def same_tensors() -> list[tuple[str, str]]:
    processes = Processes()
    rank = processes.rank
    same = {"weight": torch.arange(6.0).view(2, 3).t(), "nan": torch.tensor([float("nan")]), "none": torch.ones(0, 2)}
    processes.agree_on(same | {"half": torch.ones(3, dtype=torch.bfloat16), "number": torch.tensor(1)})
    last = processes.size - 1
    return [
        error_of(lambda: processes.agree_on(same | {"bias": torch.ones(2) + (rank == last) * 2.0**-23})),
        error_of(lambda: processes.agree_on({"weight": torch.zeros(2, 2 + (rank == last))})),
        error_of(lambda: processes.agree_on({"weight": torch.zeros(2)} if rank else {})),
        error_of(lambda: processes.agree_on({"zero": torch.tensor(-0.0 if rank == last else 0.0)})),
    ]


def failing_together() -> tuple[str, str]:
    """Work that fails in one process; afterwards the processes are still in step."""
    processes = Processes()

    def work() -> None:
        with processes.together():
            if processes.rank == 1:
                raise KeyError("no sum")

    found = error_of(work)
    with processes.together():
        pass
    processes.agree(still=1.0)
    return found


def out_of_step() -> tuple[str, str]:
    """One process takes a step while the others begin something else."""
    processes = Processes()
    if processes.rank == 0:
        return error_of(lambda: processes.agree(lr=1.0))
    return error_of(lambda: processes.total([torch.ones(2)], None))


def one_leaves() -> tuple[str, str]:
    """A process ends before the others have summed; one of these fails by itself meanwhile."""
    processes = Processes()
    if processes.rank == 1:
        dist.destroy_process_group()
        return "left", ""
    if processes.rank == 2:
        return error_of(lambda: processes.total([torch.ones(2)], None))

    def work() -> None:
        with processes.together():
            raise KeyError("own")

    return error_of(work)


def totals(shapes: list[tuple[int, ...]], bucket: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random summands in float32, and their totals."""
    from perexample.privacy import distributed

    processes, plain = Processes(), distributed._BUCKET
    source = torch.Generator().manual_seed(processes.rank)
    mine = [torch.randn(shape, generator=source).mul_(10.0 ** (3 * processes.rank)) for shape in shapes]
    before = [t.clone() for t in mine]
    distributed._BUCKET = bucket or plain
    try:
        found = processes.total(mine, None)
    finally:
        distributed._BUCKET = plain
    assert all(map(torch.equal, mine, before))
    return before, found


def unequal_sums() -> list[tuple[str, str]]:
    processes = Processes()
    rank = processes.rank
    return [
        error_of(lambda: processes.total([torch.ones(2)] * (1 + (rank == 1)), None)),
        error_of(lambda: processes.total([torch.ones(2, 3 + (rank == 1))], None)),
        error_of(lambda: processes.total([torch.ones(3)], _broken)),
        error_of(lambda: processes.agree(still=1.0)),
    ]


def _broken(t: torch.Tensor) -> torch.Tensor:
    raise ValueError("no entropy")


def noisy_totals(equal_seeds: bool, numbers: int) -> tuple[torch.Tensor, int]:
    """The noise of a total of zeros, and how often it was asked for here."""
    processes, calls = Processes(), []
    source = torch.Generator().manual_seed(seed_of(processes.rank, equal_seeds))

    def noise(t: torch.Tensor) -> torch.Tensor:
        calls.append(t.dtype)
        return torch.randn(t.shape, generator=source, dtype=torch.float64).mul_(3.0).add_(t)

    (found,) = processes.total([torch.zeros(numbers, dtype=torch.float32)], noise)
    assert all(dtype is torch.float32 for dtype in calls)
    assert found.dtype == torch.float64
    return found, len(calls)


def mixed_totals() -> tuple[list[torch.Tensor], list[tuple[str, str]]]:
    """Sums of the process beside sums in shards, one of which is empty in the last process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    processes = Processes()
    mesh = init_device_mesh("cpu", (processes.size,))
    shards = [distribute_tensor(t, mesh, [Shard(0)]) for t in (torch.ones(1, 4), torch.arange(21.0).view(7, 3))]
    sums = [torch.full((5,), float(processes.rank + 1)), shards[0], torch.ones(2), shards[1]]
    processes.agree_on({"in shards": shards[1]})
    found = processes.total(sums, None)
    assert all(t.dtype is torch.float64 for t in found)
    assert [type(t) for t in found] == [type(t) for t in sums]

    def noisy(seed: int) -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(seed)
        return processes.total(sums[2:], lambda t: t + torch.randn(t.shape, generator=source, dtype=torch.float64))

    moved = noisy(processes.rank)[1].full_tensor() - torch.arange(21.0).view(7, 3)
    return [whole(t) for t in [*found, moved]], [error_of(lambda: noisy(1))]


def two_groups() -> list[Any]:
    """Processes of pairs: 0 and 1 form one group, 2 is alone."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    rank = dist.get_rank()
    mine, other = groups[rank // 2], groups[1 - rank // 2]
    processes = Processes(mine)
    total = processes.total([torch.tensor(float(rank + 1))], lambda t: t.double() + 100.0)[0].item()
    return [processes.rank, processes.size, total, error_of(lambda: Processes(other))]


# -------------------------------------------------------------------------------------------------- training together

WRAPS = ("plain", "ddp", "ddp-unused", "ddp-static", "ddp-views")
SHARDS = ("whole", "layers", "layers-kept", "extended first", "copies", "other axis")


class Head(nn.Module):
    """Written out, for the generic rules: a scale, a leaf that cannot be followed, a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.leaf, self.twice, self.frozen, self.unused = Leaf(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.leaf(x) * self.scale
        return self.frozen(self.twice(torch.tanh(self.twice(x))))


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(lambda row: torch.tanh(self.weight @ row))(x)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain.exp()


class GainRule(Rule):
    """Norms and sums of its own, which read the parameter late."""

    def grad_batch(self, call: Any, g: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"gain": g * call.x * call.params["gain"].detach().exp()}

    def batch_l2(self, call: Any, g: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"gain": self.grad_batch(call, g)["gain"].square().sum(1)}

    def weighted_sum(self, call: Any, g: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"gain": w @ self.grad_batch(call, g)["gain"]}


class Rows(nn.Module):
    """The last position of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x.unflatten(1, (2, 6)))[0][:, -1].clone()  # torch warns of views that leave a sharded module


def network(kind: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    if kind == "wide":
        return nn.Sequential(nn.Linear(200, 200, bias=False)).double()
    if kind == "late":
        if dist.is_initialized():  # alone, operations are followed
            register_rule(Gain, overwrite=True)(GainRule)
        return nn.Sequential(nn.Linear(12, 6), Gain(), nn.Linear(6, 3)).double()
    return nn.Sequential(nn.Linear(12, 12), Rows(), nn.LayerNorm(6), Head(), nn.Linear(6, 3)).double()


def wrapped(how: str, model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The extended model, and what to call."""
    if how in SHARDS:
        return (sharded(how, model),) * 2
    extend(model)
    if how == "plain":
        return model, model
    names = {"unused": "find_unused_parameters", "static": "static_graph", "views": "gradient_as_bucket_view"}
    settings = {name: True for key, name in names.items() if how.endswith(key)}
    return model, nn.parallel.DistributedDataParallel(model, **settings)


def sharded(how: str, model: nn.Module) -> nn.Module:
    """FSDP2, as a whole or layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    size = dist.get_world_size()
    shape = (size, 1) if how == "copies" else (size,)  # copies of one shard each
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])}
    if how == "layers-kept":
        options["reshard_after_forward"] = False
    if how == "other axis":
        options["shard_placement_fn"] = lambda p: Shard(p.dim() - 1) if p.shape[-1] % size == 0 else None
    if how == "extended first":
        extend(model)
    if how != "whole":
        for layer in model.children():
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, **options)
    fully_shard(model, **options)
    return model if how == "extended first" else extend(model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def rows_of(step: int, start: int, stop: int, width: int = 12) -> torch.Tensor:
    source = torch.Generator().manual_seed(step)
    return torch.randn(64, width, generator=source, dtype=torch.float64)[start:stop]


def mean_loss(out: torch.Tensor) -> torch.Tensor:
    return (out.sin() + out.square()).sum(1).mean()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.5),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}
Sizes = list[list[list[int]]]  # of each piece of the batch, in each process, in each step


def trained(how: str, kind: str, optimizer: str, sizes: Sizes, noise: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """Train, alone on all examples or together; parameters and clipped sums after each step."""
    rank = dist.get_rank() if dist.is_initialized() else None
    model, called = wrapped(how, network(kind))
    clipping = ClippedGrad(0.5)
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    privatize(made, clipping=clipping, noise_multiplier=noise, expected_batch_size=4.0)
    states = []
    for step, row in enumerate(sizes):
        made.zero_grad()
        for start, stop in pieces_of(row, rank):
            with perex(clipping, grad=False):
                mean_loss(called(rows_of(step, start, stop))).backward()
        sums = {f"sum of {name}": p.clipped_sum for name, p in model.named_parameters() if p.requires_grad}
        made.step()
        whole_sums = sums if how in SHARDS or rank is None else {}  # others are of this process alone
        states.append({name: whole(t) for name, t in [*model.named_parameters(), *whole_sums.items()]})
    return states


def pieces_of(row: list[list[int]], rank: int | None) -> list[tuple[int, int]]:
    """Where the pieces of a process begin and end among the rows of all; alone, all of them."""
    start, found = 0, []
    for number, sizes in enumerate(row):
        for size in sizes:
            if rank in (None, number):
                found.append((start, start + size))
            start += size
    return found


def noise_alone(how: str, equal_seeds: bool, generator: str = "", steps: int = 1) -> list[dict[str, torch.Tensor]]:
    """Steps without examples, in which parameters move by the noise: standard deviation 3 * 0.5."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    model, called = wrapped(how, network("wide"))
    clipping, moved = ClippedGrad(0.5), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    source = torch.Generator().manual_seed(5 + rank * (generator == "unequal")) if generator else None
    settings: dict[str, Any] = {"noise_multiplier": 3.0, "expected_batch_size": 1.0, "generator": source}
    privatize(optimizer, clipping=clipping, **settings)
    torch.manual_seed(seed_of(rank, equal_seeds))
    for _ in range(steps):
        optimizer.zero_grad()
        with perex(clipping, grad=False):
            mean_loss(called(rows_of(0, 0, 0, 200))).backward()
        before = {name: whole(p) for name, p in model.named_parameters()}
        optimizer.step()
        moved.append({name: whole(p) - before[name] for name, p in model.named_parameters()})
    return moved


def equal_generators() -> list[tuple[str, str]]:
    return [error_of(partial(noise_alone, how, False, "equal")) for how in ("layers", "whole")]


def sampled(how: str) -> tuple[list[dict[str, torch.Tensor]], str]:
    """Poisson samples of 64 examples, cut between the processes."""
    model, called = wrapped(how, network())
    clipping, states, data = ClippedGrad(0.5), [], rows_of(0, 0, 64)
    sampler = PoissonBatchSampler(64, 0.05, steps=6, generator=torch.Generator().manual_seed(3))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    privatize(optimizer, clipping=clipping, noise_multiplier=0.0, expected_batch_size=3.2, sampler=sampler)
    for chosen in sampler:
        optimizer.zero_grad()
        with perex(clipping, grad=False):
            mean_loss(called(data[chosen])).backward()
        optimizer.step()
        states.append({name: whole(p) for name, p in model.named_parameters()})
    return states, repr(optimizer.ledger)


def all_fields() -> None:
    """Fields of parameters in shards but the clipped sum are those of this process's examples, of the whole shape."""
    model, reference = wrapped("layers", network())[0], extend(network())
    rank, size = dist.get_rank(), dist.get_world_size()
    x = [rows_of(0, 5 * number, 5 * number + 3 + number) for number in range(size)]
    for one, batches in [(model, [x[rank]]), (reference, x)]:
        for batch in batches:
            with perex(BatchGrad(), BatchL2Grad(), ClippedGrad(0.5)):
                mean_loss(one(batch)).backward()
    with perex(BatchGrad(), BatchL2Grad()):
        mean_loss(reference(x[rank])).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p.grad_batch, q.grad_batch, rtol=1e-12)
        assert torch.allclose(p.batch_l2, q.batch_l2, rtol=1e-12)
        assert p.clipped_sum.placements == p.placements
        assert p.clipped_sum.to_local().shape == p.to_local().shape
        assert p.grad.placements == p.placements  # torch's own mean over the processes
    unextend(model)
    assert not any(hasattr(p, field) for p in model.parameters() for field in ("grad_batch", "batch_l2", "clipped_sum"))


def wrong_steps() -> list[tuple[str, str]]:
    """What one process does otherwise than the other."""
    rank = dist.get_rank()
    alone = [dist.new_group([0]), dist.new_group([1])][rank]

    def step(
        how: str = "plain", noise: float = 1.0, run: bool = True, freeze: bool = False, group: Any = None, size: int = 0
    ) -> None:
        model, called = wrapped(how, network())
        if freeze:
            model[0].bias.requires_grad_(False)
        clipping, optimizer = ClippedGrad(0.5), torch.optim.SGD(model.parameters(), lr=1.0)
        settings: dict[str, Any] = {"noise_multiplier": noise, "expected_batch_size": 1.0}
        settings["sampler"] = sampler = PoissonBatchSampler(size, 1.0) if size else None
        privatize(optimizer, clipping=clipping, processes=group and Processes(group), **settings)
        drawn = [0, 1, 2] if sampler is None else next(iter(sampler))
        if run:
            with perex(clipping, grad=False):
                mean_loss(called(rows_of(0, 0, len(drawn)))).backward()
        optimizer.step()

    return [
        error_of(lambda: step(noise=1.0 + rank)),
        error_of(lambda: step(run=rank == 0)),
        error_of(lambda: step(freeze=rank == 1)),
        error_of(lambda: step("layers", group=alone)),
        error_of(lambda: step(size=6 + rank)),
        error_of(lambda: step(size=6)),
        error_of(lambda: step()),
    ]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Reshards(nn.Module):
    """Takes parameters away before their gradient is computed, or drops a part of it."""

    def __init__(self, drop: bool) -> None:
        super().__init__()
        self.pair, self.drop = Pair(), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.pair(x)
        if self.drop:
            return a + Dropped.apply(b)
        a.register_hook(lambda g: self.pair.reshard())
        return a + b


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12, 12))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x @ self.weight).tanh(), (x @ self.weight).sin()


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> None:
        return None


def unsupported() -> dict[str, tuple[str, str]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    register_rule(Block, overwrite=True)(GenericRule)
    register_rule(Pair, overwrite=True)(GenericRule)

    def backward(model: nn.Module, called: nn.Module | None = None, **settings: Any) -> None:
        with perex(ClippedGrad(0.5), grad=False, **settings):
            mean_loss((called or model)(rows_of(0, 0, 3))).backward()

    def parallel(shard: bool, first: bool = False) -> None:
        model = nn.Sequential(nn.Linear(12, 4)).double()
        if first:
            extend(model)
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
        if shard:
            fully_shard(model, mesh=mesh["data"])
        backward(model if first else extend(model))

    def laid_out_in_one(inside: bool) -> None:
        model = extend(network())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        backward(model, whole) if inside else extend(whole)

    def nested() -> None:
        model = nn.Sequential(Block()).double()
        fully_shard(model[0].a)
        backward(extend(fully_shard(model)))

    def resharding(drop: bool, keep: bool = False) -> None:
        model = nn.Sequential(nn.Linear(12, 12), Reshards(drop)).double()
        fully_shard(model[1].pair)
        if keep:
            model[1].pair.set_reshard_after_backward(False)
        backward(extend(fully_shard(model)))

    return {
        "max_memory": error_of(lambda: backward(sharded("layers", network()), max_memory=0)),
        "part": error_of(lambda: extend(fully_shard(network())[0])),
        "tensor": error_of(lambda: parallel(False)),
        "tensor after": error_of(lambda: parallel(False, True)),
        "both": error_of(lambda: parallel(True)),
        "one": error_of(lambda: laid_out_in_one(False)),
        "one inside": error_of(lambda: laid_out_in_one(True)),
        "nested": error_of(nested),
        "gone": error_of(lambda: resharding(False)),
        "dropped": error_of(lambda: resharding(True)),
        "dropped but kept": error_of(lambda: resharding(True, True)),
    }
