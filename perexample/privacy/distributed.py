"""Sums over the processes of data-parallel training, with noise that is drawn once for all of them."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .._arguments import shown
from .._shards import is_sharded
from ..errors import ConfigurationError, PerExampleError

_BUCKET = 2**22  # numbers that travel together, 32 MB


class Processes:
    """The processes that train one model together; one alone where ``torch.distributed`` is not in use.

    All methods are collective: every process of the group must call them, in the same order. What a process can find
    out by itself is exchanged before anything is summed, so that a process that fails makes all of them fail, rather
    than leave the others waiting.

    Args:
        group: Process group over which examples are spread; by default all processes. Processes that work on the same
            examples, as in tensor-parallel training, must not be in one group.

    Raises:
        ConfigurationError: If it is no group, or this process is not in it.

    Example:
        >>> from perexample.privacy import Processes
        >>> processes = Processes()
        >>> processes.rank, processes.size
        (0, 1)
        >>> processes.total([torch.ones(2)], noised=None)
        [tensor([1., 1.], dtype=torch.float64)]
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Remember the group; whether ``torch.distributed`` is in use is asked each time."""
        self.group = _checked_group(group)
        if self.rank < 0:
            raise ConfigurationError("Processes(group=...): this process is not in the group.")

    @property
    def rank(self) -> int:
        """Number of this process in the group."""
        return dist.get_rank(self.group) if _in_use() else 0

    @property
    def size(self) -> int:
        """Number of processes in the group."""
        return dist.get_world_size(self.group) if _in_use() else 1

    def agree(self, **values: float) -> None:
        """Make sure that every process has the same values; NaN is the same as NaN.

        Args:
            values: Numbers by name.

        Raises:
            ConfigurationError: In every process, if one differs; it shows the values of all.
        """
        everywhere = self._exchange("agree", {name: float(value) for name, value in values.items()})
        for name in sorted(set().union(*everywhere)):
            found = [have.get(name) for have in everywhere]
            if len(set(map(repr, found))) > 1:
                raise ConfigurationError(
                    f"{name} must be the same in all processes, but it is {_by_rank(found)}; processes that train one "
                    f"model together need the same settings, and call the same things."
                )

    def content(self, tensors: Sequence[Tensor]) -> bytes:
        """A digest of some tensors of each process, to the last bit.

        Args:
            tensors: Of this process; of those in shards (``DTensor``) its own part counts.

        Returns:
            The same bytes in all processes.
        """
        digest = hashlib.blake2b()
        for t in tensors:
            own = (cast(Any, t).to_local() if is_sharded(t) else t).detach().cpu().contiguous()
            digest.update((ctypes.c_char * own.nbytes).from_address(own.data_ptr()) if own.nbytes else b"")
        return b"".join(self._exchange("content", digest.digest()))

    def any(self, flag: bool) -> bool:
        """Whether something holds in at least one process.

        Args:
            flag: Whether it does in this one.

        Returns:
            The same in all processes.
        """
        return any(self._exchange("any", flag))

    def agree_on(self, tensors: Mapping[str, Tensor]) -> None:
        """Make sure that every process has the same tensors, to the last bit, as parameters must be before training.

        Args:
            tensors: Tensors by name, the same names in all processes. Those in shards (``DTensor``) are left out, of
                which each process has another part.

        Raises:
            ConfigurationError: In every process, if one differs; it names the first.
        """
        tensors = {name: t for name, t in tensors.items() if not is_sharded(t)}
        self._same_shapes("agree_on", list(tensors.values()), list(tensors))
        if self.size == 1:
            return
        differs = [name for name, t in tensors.items() if not self._is_first(t)]
        for rank, names in enumerate(self._exchange("agree_on", differs)):
            if names:
                raise ConfigurationError(
                    f"`{names[0]}` differs between the processes 0 and {rank}; processes that train one model together "
                    f"must start from the same parameters. Build the model from the same seed or checkpoint in all of "
                    f"them, or wrap it in DistributedDataParallel, which copies those of process 0."
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context for what each process does by itself, without collectives; if it fails in one, it fails in all.

        Raises:
            PerExampleError: If it failed in another process; where it failed, its own error goes on.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - raised again below, when the others know
            error = caught
        try:
            failures = self._exchange("together", None if error is None else f"{type(error).__name__}: {error}")
        except Exception as unheard:
            if error is not None:
                raise error from unheard
            raise
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise PerExampleError(f"Process {rank} failed, and so all do: {failure}")

    def total(self, sums: Sequence[Tensor], noised: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
        """Sum over all processes, plus noise that is drawn once: ``sum_r sums_r + noise``.

        The noise is added to the summand of process 0, by that process alone. Sums are formed in one process and sent
        to the others, so that the result is the same to the last bit everywhere.

        A ``DTensor`` is the sum of all processes already (`ParameterView.summed`), of which each has its shard. The
        noise of a shard is drawn by the process that has it, or the first of those that have copies of it.

        Args:
            sums: This process's summands, the same shapes in all processes; zeros where it had no examples.
            noised: Gives a sum with noise in it, a new tensor in float64; ``None`` for no noise.

        Returns:
            The totals in float64, each on the device of its sum.

        Raises:
            ConfigurationError: In every process, if they have different numbers or shapes of sums, if shards are those
                of other processes, or if two processes draw the same noise for their shards.
            PerExampleError: If the noise could not be drawn.
        """
        self._same_shapes("total", sums)
        with self.together():
            shards = [_Shard(t, self._ranks()) for t in sums if is_sharded(t)]
            for shard in shards:  # before all other noise, so that equal generators are noticed
                shard.add(noised)
            whole = [_plus(t, noised if self.rank == 0 else None) for t in sums if not is_sharded(t)]
        if shards and noised is not None:
            self._refuse_equal_noise(shards)
        if self.size > 1:
            _in_buckets(whole, self._reduced)
        totals, parts = iter(whole), iter(shards)
        return [next(parts).shared() if is_sharded(t) else next(totals) for t in sums]

    def _ranks(self) -> list[int]:
        """The numbers of the processes of this group among all processes."""
        return dist.get_process_group_ranks(self.group or dist.group.WORLD) if _in_use() else [0]

    def _refuse_equal_noise(self, shards: Sequence[_Shard]) -> None:
        """Generators that were given the same seed would give shards the same noise, which differences would undo."""
        samples = self._exchange("noise", next((shard.sample for shard in shards if shard.sample), None))
        for rank, sample in enumerate(samples):
            if sample is not None and sample in samples[:rank]:
                raise ConfigurationError(
                    f"The processes {samples.index(sample)} and {rank} draw the same noise for their shards of the "
                    f"parameters: their generators have the same seed. Give no generator, or one of another seed in "
                    f"each process."
                )

    def _reduced(self, flat: Tensor) -> None:
        """Sum in process 0, and send the result to all."""
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.reduce(flat, first, group=self.group)
        dist.broadcast(flat, first, group=self.group)

    def _is_first(self, tensor: Tensor) -> bool:
        """Whether a tensor has the bits that it has in process 0; NaN is equal to itself."""
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        other = bits.clone()
        dist.broadcast(other, first, group=self.group)
        return torch.equal(bits, other)

    def _same_shapes(self, kind: str, tensors: Iterable[Tensor], names: Sequence[str] | None = None) -> None:
        """A collective on tensors of different sizes would hang, or mix up their entries."""
        shapes = [(str(i) if names is None else names[i], _layout(t)) for i, t in enumerate(tensors)]
        everywhere = self._exchange(kind, shapes)
        for rank, other in enumerate(everywhere):
            if other != everywhere[0]:
                raise ConfigurationError(
                    f"The processes 0 and {rank} train different parameters: {_difference(everywhere[0], other)}. "
                    f"Freeze and unfreeze the same parameters in all processes."
                )

    def _exchange(self, kind: str, mine: Any) -> list[Any]:
        """What every process has to say, in their order; they must all be at the same point of the program."""
        if self.size == 1:
            return [mine]
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, (kind, mine), group=self.group)
        kinds = [kind for kind, _ in everywhere]
        if len(set(kinds)) > 1:
            raise PerExampleError(
                f"The processes have lost step with each other: they call {_by_rank(kinds)}. Every process must take "
                f"every step, with an empty batch if it has no examples, and construct the same objects in the same "
                f"order."
            )
        return [said for _, said in everywhere]


def _checked_group(group: Any) -> Any:
    """What ``new_group`` gives: to those outside of the group a number, which `dist.get_rank` knows."""
    kinds = (dist.ProcessGroup, type(None)) if dist.is_available() else (type(None),)
    if isinstance(group, kinds) or (_in_use() and group is dist.GroupMember.NON_GROUP_MEMBER):
        return group
    raise ConfigurationError(
        f"Processes(group=...) must be a torch.distributed.ProcessGroup, such as new_group gives, or None for all "
        f"processes, not {shown(group)}."
    )


def _in_use() -> bool:
    return dist.is_available() and dist.is_initialized()


def _by_rank(values: Sequence[Any]) -> str:
    return ", ".join(f"{'missing' if value is None else value} in process {rank}" for rank, value in enumerate(values))


def _difference(first: list, other: list) -> str:
    if len(first) != len(other):
        return f"{len(first)} and {len(other)} of them"
    a, b = next((a, b) for a, b in zip(first, other, strict=True) if a != b)
    return f"`{a[0]}` of {a[1]}, and `{b[0]}` of {b[1]}"


def _layout(t: Tensor) -> str:
    return f"shape {list(t.shape)}" + (f" as {getattr(t, 'placements', '')}" if is_sharded(t) else "")


def _plus(t: Tensor, noised: Callable[[Tensor], Tensor] | None) -> Tensor:
    """A copy in float64, with noise."""
    return t.detach().to(torch.float64, copy=True) if noised is None else noised(t)


class _Shard:
    """This process's part of a total in shards.

    Attributes:
        sample: A few numbers of its noise, empty if it drew none.
    """

    def __init__(self, total: Any, ranks: Sequence[int]) -> None:
        """Copy the part in float64."""
        self.total, self.mesh = total, total.device_mesh
        self.sample: list[float] = []
        if sorted(self.mesh.mesh.flatten().tolist()) != sorted(ranks):
            raise ConfigurationError(
                f"Parameters are kept in shards by the processes {self.mesh.mesh.tolist()}, but those that train "
                f"together are {list(ranks)}; pass privatize(processes=Processes(group)) with the group of the former."
            )
        self.local: Tensor = total.to_local().detach().to(torch.float64, copy=True)
        self.copied = [dim for dim, placement in enumerate(total.placements) if placement.is_replicate()]

    def add(self, noised: Callable[[Tensor], Tensor] | None) -> None:
        """Draw noise, in the first of the processes that have copies of the part."""
        coordinate = self.mesh.get_coordinate()
        if noised is not None and self.local.numel() and not any(coordinate[dim] for dim in self.copied):
            drawn = noised(torch.zeros_like(self.local))
            self.sample = drawn.flatten()[:4].tolist()
            self.local.add_(drawn)

    def shared(self) -> Tensor:
        """The total, the copies of each part the same to the last bit; collective."""
        from torch.distributed.tensor import DTensor

        for dim in self.copied:
            group = self.mesh.get_group(dim)
            dist.broadcast(self.local, dist.get_global_rank(group, 0), group=group)
        total = self.total
        return DTensor.from_local(
            self.local, self.mesh, total.placements, run_check=False, shape=total.shape, stride=total.stride()
        )


def _in_buckets(tensors: list[Tensor], work: Callable[[Tensor], None]) -> None:
    """Work in place on many tensors laid out in few, of which they become parts."""
    for device in {t.device: None for t in tensors}:
        numbers = [i for i, t in enumerate(tensors) if t.device == device]
        for bucket in _parted(numbers, [tensors[i].numel() for i in numbers]):
            flat = torch.cat([tensors[i].reshape(-1) for i in bucket])
            work(flat)
            parts = flat.split([tensors[i].numel() for i in bucket])
            for i, part in zip(bucket, parts, strict=True):
                tensors[i] = part.view(tensors[i].shape)


def _parted(numbers: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Runs of numbers whose sizes add up to a bucket, or all that remain."""
    bucket, size = list[int](), 0
    for i, more in zip(numbers, sizes, strict=True):
        bucket, size = [*bucket, i], size + more
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
