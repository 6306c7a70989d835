"""The courses a training of `train.py` can take: private with Poisson batches, or with shuffled ones, or plain."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from train_augment import MIRRORED, Changes, Copies, multiplied
from train_data import Data
from train_methods import BACKWARDS, Found, OwnSums, predicted

from perexample import extend, privatize, unextend
from perexample.extensions import AdaptiveClippedGrad, ClippedGrad
from perexample.privacy import (
    EmptyBatches,
    Ledger,
    PoissonBatchSampler,
    make_private,
    noise_multiplier_for,
    split_batch,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop,
}  # fmt: skip


class Course(ABC):
    """A training that is under way.

    Attributes:
        model: What is trained, and tested.
        network: The same, as it is trained: with several copies of an image.
        options: Of the command line.
        steps: Number of steps taken.
        planned: Number of steps to take.
        noise_multiplier: Standard deviation of the noise in units of C; nothing where there is none.
    """

    model: nn.Module
    network: nn.Module
    options: argparse.Namespace
    planned: int
    noise_multiplier: float | None = None
    _generator: tuple[int, torch.Generator] | None = None

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        self.network = Copies(model) if options.augmentation_multiplicity > 1 else model

    @property
    @abstractmethod
    def steps(self) -> int: ...

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, in pieces that fit into memory."""

    def learn(self, x: Tensor, y: Tensor) -> Found:
        """Forward and backward of a piece, with changed copies of its images if these were asked for."""
        count = self.options.augmentation_multiplicity
        if count > 1:
            changes = Changes(mirror=self.options.data in MIRRORED)
            x, y = multiplied(x, count, changes, self._copying()), y.unsqueeze(1).expand(-1, count)
        return self.backward(x, y)

    def _copying(self) -> torch.Generator | None:
        """Of the changes; in a deterministic run every step has its own, so that a resumed one goes on with it."""
        if not self.options.deterministic:
            return None
        if self._generator is None or self._generator[0] != self.steps:
            seed = self.options.seed * 1_000_003 + self.steps
            self._generator = self.steps, torch.Generator().manual_seed(seed)
        return self._generator[1]

    @abstractmethod
    def backward(self, x: Tensor, y: Tensor) -> Found:
        """Forward and backward; with changed copies ``[N, K, ...]`` and ``[N, K]``."""

    @abstractmethod
    def step(self) -> None:
        """Take the step, if the batch is complete."""

    @abstractmethod
    def epsilon(self) -> float | None:
        """Privacy spent."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


class Private(Course):
    """DP-SGD on Poisson batches, by `make_private`."""

    def __init__(self, model: nn.Module, data: Data, options: argparse.Namespace, folder: Path) -> None:
        super().__init__(model, options)
        self.clipping = make_clipping(options)
        generators = {}
        if options.deterministic:
            generators["sampling_generator"] = torch.Generator().manual_seed(2 * options.seed)
            generators["noise_generator"] = torch.Generator().manual_seed(2 * options.seed + 1)
        self.private = make_private(
            self.network,
            make_optimizer(model, options),
            data.train,
            target_epsilon=options.epsilon,
            target_delta=options.delta,
            noise_multiplier=options.noise_multiplier,
            epochs=options.epochs,
            batch_size=options.batch_size,
            physical_batch_size=options.physical_batch_size,
            public_size=options.public_size,
            clipping=self.clipping,
            ledger=folder / "ledger.jsonl",
            noise=options.noise,
            strategy="model" if options.deterministic else "measure",
            num_workers=options.workers,
            **generators,
        )
        self.planned = self.private.planned_steps
        self.noise_multiplier = self.private.noise_multiplier
        self.sums = make_backward(self.network, options)
        if options.record:
            backward = self.private.recorded(partial(predicted, self.network), compiled=options.compile)
            self.sums = lambda model, clipping, x, y: backward(x, y)

    @property
    def steps(self) -> int:
        return self.private.steps

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.private.loader

    def backward(self, x: Tensor, y: Tensor) -> Found:
        return self.sums(self.network, self.clipping, x, y)

    def step(self) -> None:
        self.private.step()

    def epsilon(self) -> float:
        return self.private.epsilon()

    def state_dict(self) -> dict[str, Any]:
        return self.private.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.private.load_state_dict(state)


class Whole(Course):
    """What has whole batches: each is cut into pieces here, and a step follows the last of them."""

    def __init__(self, model: nn.Module, data: Data, options: argparse.Namespace) -> None:
        super().__init__(model, options)
        self.data = data
        self.per_epoch = max(1, round(options.public_size / options.batch_size))
        self.planned = max(1, round(options.epochs * self.per_epoch))
        self.taken, self.last, self.size = 0, False, 0

    @property
    def steps(self) -> int:
        return self.taken

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = None
        if self.options.deterministic or self.options.method == "plain":
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
        collate, count = EmptyBatches(example=self.data.train[0]), len(self.data.train)
        if self.options.sampling == "poisson":
            rate = self.options.batch_size / self.options.public_size
            chosen: Any = {"batch_sampler": PoissonBatchSampler(count, rate, self.per_epoch, generator=generator)}
        else:
            size = min(self.options.batch_size, count)
            chosen = {"batch_size": size, "shuffle": True, "drop_last": True, "generator": generator}
        for batch in DataLoader(self.data.train, collate_fn=collate, num_workers=self.options.workers, **chosen):
            self.size = len(batch[0])
            pieces = split_batch(batch, self.options.physical_batch_size or max(1, self.size))
            for i, piece in enumerate(pieces):
                self.last = i == len(pieces) - 1
                yield piece

    def step(self) -> None:
        if self.last:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.taken += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.taken = state["steps"]

    optimizer: torch.optim.Optimizer


class Shuffled(Whole):
    """Noise and clipping as in DP-SGD, on shuffled batches: every step counts as one that saw all examples."""

    def __init__(self, model: nn.Module, data: Data, options: argparse.Namespace, folder: Path) -> None:
        super().__init__(model, data, options)
        self.clipping, self.ledger = make_clipping(options), Ledger(folder / "ledger.jsonl", self.planned)
        self.noise_multiplier = options.noise_multiplier
        if self.noise_multiplier is None:
            self.noise_multiplier = noise_multiplier_for(
                options.epsilon, options.delta, sample_rate=None, steps=self.planned
            )
        extend(self.network)
        seeded = options.deterministic
        self.optimizer = privatize(
            make_optimizer(model, options),
            clipping=self.clipping,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=options.batch_size,
            ledger=self.ledger,
            generator=torch.Generator().manual_seed(2 * options.seed + 1) if seeded else None,
            noise=options.noise,
        )
        self.sums = make_backward(self.network, options)

    @property
    def steps(self) -> int:
        return self.ledger.steps  # after a crash more than the checkpoint knows

    def backward(self, x: Tensor, y: Tensor) -> Found:
        return self.sums(self.network, self.clipping, x, y)

    def epsilon(self) -> float:
        return self.ledger.epsilon(self.options.delta)


class Plain(Whole):
    """Training without privacy."""

    def __init__(self, model: nn.Module, data: Data, options: argparse.Namespace, folder: Path) -> None:
        super().__init__(model, data, options)
        self.optimizer = make_optimizer(model, options)

    def backward(self, x: Tensor, y: Tensor) -> Found:
        losses, output = predicted(self.network, x, y)
        (losses.sum() / max(1, self.size)).backward()
        return losses.detach(), output.detach()

    def epsilon(self) -> None:
        return None


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that was asked for, of all parameters."""
    settings = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer in ("sgd", "rmsprop"):
        settings["momentum"] = options.momentum
    return OPTIMIZERS[options.optimizer](model.parameters(), **settings)


def make_clipping(options: argparse.Namespace) -> ClippedGrad:
    """What clips, as it was asked for."""
    if options.method != "clipped":
        return OwnSums(options.max_norm, clip=options.clip)
    if options.clip == "adaptive":
        return AdaptiveClippedGrad(
            options.max_norm, expected_batch_size=options.batch_size, quantile=options.quantile, bounds=(1e-3, 1e3)
        )
    return ClippedGrad(options.max_norm, clip=options.clip, groups=options.groups)


def make_backward(model: nn.Module, options: argparse.Namespace) -> Callable[..., Found]:
    """The way to the sums; the choice of methods by measured times is not the same in every run."""
    backward = BACKWARDS[options.method]
    if options.method in ("naive", "vmap"):
        unextend(model)  # they do without it, and should not pay for it
    return partial(backward, strategy="model") if options.deterministic and options.method == "clipped" else backward


def make_course(model: nn.Module, data: Data, options: argparse.Namespace, folder: Path) -> Course:
    """The course for these options."""
    if options.method == "plain":
        return Plain(model, data, options, folder)
    return (Private if options.sampling == "poisson" else Shuffled)(model, data, options, folder)
