"""What the pages of the gallery share: real digit images, small networks, and a private training of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import train_data
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from perexample.privacy import Private, make_private

TRAIN_SIZE = 1500


@dataclass(frozen=True)
class Digits:
    """Images of 8x8 pixels with values from 0 to 3, and their labels; the split is the same in every run."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load_data() -> Digits:
    """Those of `train_data`, as four tensors."""
    data = train_data.digits()
    train, test = (default_collate([part[i] for i in range(len(part))]) for part in (data.train, data.test))
    return Digits(*train, *test)


def make_cnn() -> nn.Module:
    """Two small convolutions and a linear layer; tanh keeps gradients within bounds."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": make_cnn,
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
}


def make_model(name: str, seed: int) -> nn.Module:
    """One of `MODELS`, freshly initialised."""
    torch.manual_seed(seed)
    return MODELS[name]()


@dataclass
class History:
    """What happened in each step.

    The losses and norms come from the private data without noise: they are for teaching, not for release.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that are named rightly."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train_private(
    model: nn.Module, data: Digits, *, epsilon: float = 3.0, delta: float = 1e-4, epochs: float = 50, lr: float = 2.0
) -> tuple[History, Private]:
    """DP-SGD: Poisson samples, one backward for gradients' norms and clipped sums, noise in ``step``."""
    private = make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        TensorDataset(data.x, data.y),
        target_epsilon=epsilon,
        target_delta=delta,
        epochs=epochs,
        batch_size=750,
        public_size=TRAIN_SIZE,
        max_norm=1.0,
    )
    history = History()
    for x, y in private:
        with private:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        private.step()
        history.loss.append(loss.item())
        history.norms.append(private.clipping.norms)
        history.accuracy.append(accuracy(model, data.x_test, data.y_test))
    return history, private
