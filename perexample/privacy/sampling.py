"""Poisson samples of a data set: the only batches whose privacy cost may be amplified by sampling."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from .._arguments import real, whole
from .._private import MT_STATE, system_generator
from ..errors import ConfigurationError, StaleGradientError
from .noise import refuse_public_seed

_CHUNK = 1 << 20  # numbers drawn at once, so that a large data set needs no more memory than a small one
_CONFIGURATION = ("data_size", "sample_rate", "steps", "rank", "world_size")


class _Drawn(NamedTuple):
    """A logical batch that was drawn and is not done with, and the generator's state that gives it again."""

    size: int
    state: Tensor


class PoissonBatchSampler(Sampler[list[int]]):
    """Batches into which every example comes independently with probability ``sample_rate``.

    ``batch = {i : u_i < sample_rate}``, ``u_i`` uniform in float64, anew for every batch: sizes vary, with mean ``n q``
    and variance ``n q (1 - q)``, and may be 0. This is the sampling that privacy amplification is proven for; shuffled
    batches of one size, ``drop_last`` and `torch.utils.data.DistributedSampler` are not, and none of them can be
    combined with it: a `torch.utils.data.DataLoader` refuses them beside ``batch_sampler=``.

    With several processes each keeps every ``world_size``-th example of a sample of all, so that the union over the
    ranks is a Poisson sample whether their seeds are equal or not.

    Only the newest iteration is valid: one that began before raises an error when it is continued. A private optimizer
    that has claimed the sampler (``privatize(sampler=...)``) takes the batches one by one, in order; those that were
    drawn ahead (by workers of a loader, or before ``break``) and not taken are drawn again, alike, by the next
    iteration of the same sampler. Batches drawn ahead take 5 kB each.

    Args:
        data_size: Number of examples, ``len(dataset)``; 0 gives empty batches.
        sample_rate: q, with 0 < q <= 1: a public constant. Give one such as 256 / 50_000, not one computed from
            ``len(dataset)``.
        steps: Batches in an iteration; by default ``round(1 / sample_rate)``, about an epoch.
        generator: On CPU; by default one of its own, of which ``torch.manual_seed`` knows nothing and whose whole
            state comes from the operating system. From one of your own a generator for this sampler is made, once, so
            that samples are repeatable, whatever else uses yours later; if it is known, amplification is void.
        rank: Of this process, together with ``world_size``; by default that of `torch.distributed`, or 0 of 1.
        world_size: Number of processes.

    Attributes:
        pieces: False, since every batch is whole.

    Raises:
        ConfigurationError: For values without meaning.
        StaleGradientError: If an iteration is continued after a newer one began.

    Guarantees:
        Indices are ascending and distinct. Inclusions are independent of each other and between batches, with
        probability sample_rate up to 2^-53. The state of a generator of yours is in `state_dict`, which is as secret as
        the data.

    References:
        Mironov, Talwar and Zhang 2019, arXiv:1908.10530 (section 3.1); Zhu and Wang 2019 (Poisson subsampling).

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from perexample.privacy import EmptyBatches, PoissonBatchSampler
        >>> dataset = TensorDataset(torch.randn(100, 3))
        >>> sampler = PoissonBatchSampler(100, sample_rate=0.05)
        >>> loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=EmptyBatches(example=dataset[0]))
        >>> len(loader), next(iter(loader))[0].shape[1]
        (20, 3)
    """

    pieces = False

    def __init__(
        self,
        data_size: int,
        sample_rate: float,
        steps: int | None = None,
        *,
        generator: torch.Generator | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        self._data_size = _whole("data_size", data_size, 0, ". Give the length of the data set")
        self._rate = _checked_rate(sample_rate)
        self._steps = _checked_steps(steps, self._rate)
        self._shard = _checked_shard(rank, world_size)
        self._generator, self._repeatable = _own_generator(generator), generator is not None
        self._pending: deque[_Drawn] = deque()  # oldest first; of a sampler that nobody claimed at most one
        self._process = os.getpid()
        self._claimed = False
        self._forget: Callable[[], None] | None = None
        self._iteration = 0  # which of the iterations is valid
        self._position = 0  # batches of it that are done: taken, or without an optimizer handed out
        self._resume = 0  # where the next iteration begins

    # What a batch was drawn with is what its step costs, so none of it can be changed.

    @property
    def data_size(self) -> int:
        """Number of examples, n."""
        return self._data_size

    @property
    def sample_rate(self) -> float:
        """Probability with which a batch has an example, q."""
        return self._rate

    @property
    def steps(self) -> int:
        """Batches in an iteration, also its ``len()``."""
        return self._steps

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._shard[0]

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._shard[1]

    def __len__(self) -> int:
        """Number of batches in a whole iteration."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Begin an iteration; it ends those that began before."""
        return self._begin(None)

    def claim(self, forget: Callable[[], None] | None = None) -> None:
        """Bind the sampler to one private optimizer, which takes each of its batches.

        Args:
            forget: Called when a batch that was drawn is given up before the step on it, to be drawn again: what was
                summed of it must not count twice.

        Raises:
            ConfigurationError: If it is bound already.
        """
        if self._claimed:
            raise ConfigurationError(
                "The sampler belongs to another private optimizer already: one sample would be released twice and "
                "counted once. Make one sampler for each optimizer."
            )
        self._abandon()
        self._claimed, self._forget = True, forget

    def due(self) -> int | None:
        """Size of the batch that the optimizer has to step on next.

        Returns:
            Number of examples in the oldest batch that was drawn and not taken; None if there is none.
        """
        return self._pending[0].size if self._claimed and self._pending else None

    def take(self, examples: int) -> None:
        """Step on the oldest batch that was drawn.

        Args:
            examples: How many examples the gradients of the step come from.

        Raises:
            StaleGradientError: If the sampler drew no batch, or one of another size; nothing is taken then.
        """
        due = self.due()
        if due is None:
            raise StaleGradientError(
                "The batches did not come from this sampler: no batch of it is left to step on, so that the step's "
                "cost would be that of all data. Iterate over what make_private returned (for x, y in private), or "
                "hand the sampler to privatize(sampler=...) and to DataLoader(batch_sampler=...); and step once for "
                "each of its batches."
            )
        if examples != due:
            raise StaleGradientError(
                f"The sampler drew a batch of {due} examples, the backward saw {examples}: a step's gradients must be "
                f"those of one batch of the sampler, whole, and batches must be stepped on in their order. Do not drop "
                f"or repeat examples in dataset or collate_fn, skip no batch, do not give the loader to "
                f"accelerate.prepare with several processes (the sampler divides the examples among them itself), "
                f"leave DataLoader(in_order=True), and call zero_grad() after a backward that was not stepped on."
            )
        self._done()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs.

        With a generator of yours it draws exactly those batches that were not stepped on (without a private optimizer:
        not handed out; with one, if its noise has a generator of yours as well). Otherwise it draws new ones: after a
        crash, steps that were released and are taken again with other noise are accounted as independent samples, so
        they must be.

        Returns:
            Integers, a float and a byte tensor or None: ``position``, the number of batches done in the iteration under
            way; ``generator``; and the configuration. Each rank has a state of its own.
        """
        state = self._pending[0].state if self._pending else self._generator.get_state()
        configuration = {name: getattr(self, name) for name in _CONFIGURATION}
        generator = state.clone() if self._repeatable else None
        return {**configuration, "position": self._position % self.steps, "generator": generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state: the next iteration has what is left of the one under way, then whole ones follow.

        Args:
            state: From `state_dict` of a sampler made alike.

        Raises:
            ConfigurationError: If it is not such a state; nothing is changed then.
        """
        position, generator = self.check_state(state)
        self._iteration += 1
        self._pending.clear()
        if self._forget is not None:
            self._forget()
        if generator is not None:
            self._generator, self._repeatable = generator, True
        self._position = self._resume = position

    def check_state(self, state: Any) -> tuple[int, torch.Generator | None]:
        """Raise what `load_state_dict` would raise, and return position and generator."""
        return _checked_state(state, {name: getattr(self, name) for name in _CONFIGURATION})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "A PoissonBatchSampler cannot be copied or pickled: the copy would draw the same samples again, and the "
            "accountant takes all samples as independent. Make another sampler in its place; to continue this one's "
            "samples, load its state_dict() there."
        )

    @property
    def repeatable(self) -> bool:
        """Whether a state of it, or a generator of the same seed, gives its batches again."""
        return self._repeatable

    def renew(self) -> None:
        """Draw batches from now on that have nothing to do with those drawn before, if a generator was given."""
        if self._repeatable:
            self._generator = system_generator()

    def _begin(self, size: int | None) -> _Iteration:
        self._abandon()
        return _Iteration(self, size)

    def _abandon(self) -> None:
        """End the iteration under way; what it drew ahead is given back.

        Loaders call ``iter`` twice, or to look at one batch: only a batch that is done uses up ``_resume``.
        """
        self._iteration += 1
        if self._pending:
            self._generator.set_state(self._pending[0].state)
            self._pending.clear()
            if self._forget is not None:
                self._forget()
        self._position = self._resume

    def _draw(self) -> list[int]:
        """The next logical batch."""
        if not self._repeatable and self._process != os.getpid():  # a forked process draws batches of its own
            self._generator, self._process = system_generator(), os.getpid()
        before = self._generator.get_state()
        found = [torch.empty(0, dtype=torch.int64, device="cpu")]
        for start in range(0, self.data_size, _CHUNK):
            size = min(_CHUNK, self.data_size - start)
            drawn = torch.rand(size, dtype=torch.float64, device="cpu", generator=self._generator) < self.sample_rate
            indices = drawn.nonzero().flatten() + start
            found.append(indices[indices % self.world_size == self.rank])
        batch: list[int] = torch.cat(found).tolist()
        self._pending.append(_Drawn(len(batch), before))
        return batch

    def _done(self) -> None:
        """The oldest batch need never be drawn again."""
        self._pending.popleft()
        self._position += 1
        self._resume = 0


class _Iteration(Iterator[list[int]]):
    """One pass over the batches, or over their pieces; an object, so that it can tell at any time that it is over."""

    def __init__(self, sampler: PoissonBatchSampler, size: int | None) -> None:
        self.sampler, self.size, self.number = sampler, size, sampler._iteration
        self.left = sampler.steps - sampler._position
        self.pieces: deque[list[int]] = deque()

    def __next__(self) -> list[int]:
        sampler = self.sampler
        if self.number != sampler._iteration:
            raise StaleGradientError(
                "A newer iteration over this sampler has begun (by iter(), privatize or load_state_dict), and only its "
                "batches count. Iterate over one loader at a time, and make a second sampler to look at the data."
            )
        if not self.pieces:
            if not self.left:
                raise StopIteration
            self.left -= 1
            batch = sampler._draw()
            size = self.size or max(len(batch), 1)
            self.pieces.extend(batch[start : start + size] for start in range(0, max(len(batch), 1), size))
        piece = self.pieces.popleft()
        if not self.pieces and not sampler._claimed:
            sampler._done()
        return piece


class PhysicalBatches(Sampler[list[int]]):
    """Cuts each logical batch of a sampler into pieces that fit into memory.

    A logical batch of 10 in pieces of at most 4 is 4, 4 and 2; an empty one is one empty piece. Clipped sums of the
    pieces add up, and the private optimizer steps with the last piece of a logical batch: those before are no steps.

    Args:
        sampler: Where the logical batches come from.
        size: Largest number of examples in a piece.

    Attributes:
        sampler: The same.
        size: The same.
        pieces: True, since an optimizer step takes several of these batches.

    Raises:
        ConfigurationError: For values without meaning.

    Guarantees:
        The pieces of a logical batch, one after the other, are that batch.

    Example:
        >>> from perexample.privacy import PhysicalBatches, PoissonBatchSampler
        >>> batches = PhysicalBatches(PoissonBatchSampler(10, sample_rate=1.0), size=4)
        >>> list(batches)
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    pieces = True

    def __init__(self, sampler: PoissonBatchSampler, size: int) -> None:
        """Check the arguments."""
        super().__init__()
        if not isinstance(sampler, PoissonBatchSampler):
            raise ConfigurationError(f"sampler must be a PoissonBatchSampler, not {sampler!r}.")
        self.sampler, self.size = sampler, _whole("size", size, 1)

    def __iter__(self) -> Iterator[list[int]]:
        """Begin an iteration; it ends those that began before."""
        return self.sampler._begin(self.size)

    def __len__(self) -> int:
        """Unknown.

        Raises:
            TypeError: Always; tools such as tqdm take it for an iterable whose length is not known.
        """
        raise TypeError(
            f"The number of pieces depends on the sizes of the batches that will be drawn. Use steps: {self.steps} "
            f"optimizer steps in an iteration."
        )

    @property
    def data_size(self) -> int:
        """Number of examples."""
        return self.sampler.data_size

    @property
    def sample_rate(self) -> float:
        """Probability with which a logical batch has an example."""
        return self.sampler.sample_rate

    @property
    def steps(self) -> int:
        """Logical batches, and steps, in an iteration."""
        return self.sampler.steps

    @property
    def repeatable(self) -> bool:
        """See `PoissonBatchSampler.repeatable`."""
        return self.sampler.repeatable

    def claim(self, forget: Callable[[], None] | None = None) -> None:
        """As `PoissonBatchSampler.claim`."""
        self.sampler.claim(forget)

    def due(self) -> int | None:
        """As `PoissonBatchSampler.due`: size of the logical batch."""
        return self.sampler.due()

    def take(self, examples: int) -> None:
        """As `PoissonBatchSampler.take`: all pieces of a logical batch."""
        self.sampler.take(examples)

    def state_dict(self) -> dict[str, Any]:
        """As `PoissonBatchSampler.state_dict`; a logical batch of which a piece is missing is drawn again, whole."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `PoissonBatchSampler.load_state_dict`; the size of the pieces may be another."""
        self.sampler.load_state_dict(state)

    def check_state(self, state: Any) -> None:
        """As `PoissonBatchSampler.check_state`."""
        self.sampler.check_state(state)

    def renew(self) -> None:
        """As `PoissonBatchSampler.renew`."""
        self.sampler.renew()


def _whole(name: str, value: Any, least: int, remedy: str = "") -> int:
    return whole(name, value, f"an integer >= {least}", least, remedy=remedy)


def _checked_rate(sample_rate: Any) -> float:
    wanted = "a number with 0 < sample_rate <= 1"
    remedy = (
        "; it is the probability with which a batch has an example: the expected size of a batch divided by the size "
        "of the data"
    )
    return real("sample_rate", sample_rate, wanted, lambda rate: 0 < rate <= 1, remedy)


def _checked_steps(steps: Any, sample_rate: float) -> int:
    if steps is not None:
        return _whole("steps", steps, 1)
    if not math.isfinite(1 / sample_rate):
        raise ConfigurationError(f"steps must be given, since 1 / sample_rate is not finite for {sample_rate!r}.")
    return round(1 / sample_rate)


def _checked_shard(rank: Any, world_size: Any) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ConfigurationError(
            f"rank and world_size must be given together, not rank={rank!r} and world_size={world_size!r}; or neither, "
            f"and torch.distributed tells them."
        )
    if world_size is None:
        several = dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    world_size, rank = _whole("world_size", world_size, 1), _whole("rank", rank, 0)
    if rank >= world_size:
        raise ConfigurationError(f"rank must be less than world_size, not {rank} of {world_size}.")
    return rank, world_size


def _own_generator(given: torch.Generator | None) -> torch.Generator:
    """A generator that nobody else advances; of one that was given it has all the randomness (a seed has 32 bits)."""
    if given is None:
        return system_generator()
    if not isinstance(given, torch.Generator):
        raise ConfigurationError(f"generator must be a torch.Generator or None, not {given!r}.")
    if given.device.type != "cpu":
        raise ConfigurationError(f"generator must be on the CPU, where indices are drawn, not on {given.device}.")
    refuse_public_seed(given)
    generator = torch.Generator("cpu").manual_seed(0)
    state = generator.get_state()
    state[MT_STATE] = torch.randint(1 << 32, (624,), device="cpu", generator=given).view(torch.uint8)
    generator.set_state(state)
    return generator


def _checked_state(state: Any, expected: dict[str, Any]) -> tuple[int, torch.Generator | None]:
    """Position and generator, if the state is one of a sampler of the expected configuration."""
    names = [*_CONFIGURATION, "position", "generator"]
    if not isinstance(state, Mapping) or any(name not in state for name in names):
        missing = [name for name in names if name not in state] if isinstance(state, Mapping) else names
        raise ConfigurationError(f"The state is not one of a PoissonBatchSampler: it has no {', '.join(missing)}.")
    same = {name: type(state[name]) is type(expected[name]) and state[name] == expected[name] for name in expected}
    differing = [f"{name} is {state[name]!r} there and {expected[name]!r} here" for name in expected if not same[name]]
    if differing:
        remedy = "Each rank loads the state of the same rank. " if not same["rank"] else ""
        raise ConfigurationError(
            f"The state is one of another sampler: {'; '.join(differing)}. {remedy}Make the sampler as it was, or "
            f"begin without a state."
        )
    position = _whole("position (of the state)", state["position"], 0)
    if position >= expected["steps"]:
        raise ConfigurationError(f"position (of the state) must be less than steps, not {position}.")
    return position, None if state["generator"] is None else _restored(state["generator"])


def _restored(state: Any) -> torch.Generator:
    generator = torch.Generator("cpu")
    try:
        generator.set_state(state.cpu())
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ConfigurationError(f"generator (of the state) is not the state of a torch.Generator: {error}") from error
    return generator
