"""Train a small network privately on real digit images, and the same one without privacy beside it.

The data are scikit-learn's 1797 handwritten digits (8x8 pixels, bundled with it); 1500 are for training, 297 for the
test. Every step takes a Poisson sample: each image by itself with the same probability. The noise is calibrated to
the epsilon and delta asked for; what is printed in the end is computed again from the steps that were taken.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from perexample.privacy import PoissonBatchSampler, Private, make_private

TRAIN_SIZE, TEST_SIZE = 1500, 297


@dataclass(frozen=True)
class Digits:
    """Images of 8x8 pixels with values from 0 to 3, and their labels; the split is the same in every run."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load_data() -> Digits:
    """The bundled digits."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) * (3 / 16)
    y = torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(y)), test_size=TEST_SIZE, random_state=0, stratify=labels)
    return Digits(images[train], y[train], images[test], y[test])


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


def make_large_kernel_cnn(
    outputs: int = 10, channels: tuple[int, int] = (16, 32), features: int = 32, kernels: tuple[int, int] = (8, 4)
) -> nn.Module:
    """The small CNN of BackPACK's DP-SGD example, for 28x28 pixels, with the images scaled up to these and tanh."""
    return nn.Sequential(
        nn.Upsample((28, 28), mode="bilinear"),
        nn.ZeroPad2d((3, 4, 3, 4)),
        nn.Conv2d(1, channels[0], kernels[0], stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(channels[0], channels[1], kernels[1], stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(channels[1] * 4 * 4, features),
        nn.Tanh(),
        nn.Linear(features, outputs),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": make_cnn,
    "cnn28": make_large_kernel_cnn,
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
    seconds: float = 0.0


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that are named rightly."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def train_private(model: nn.Module, data: Digits, options: argparse.Namespace) -> tuple[History, Private]:
    """DP-SGD: Poisson samples, one backward for gradients' norms and clipped sums, noise in ``step``."""
    private = make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum),
        TensorDataset(data.x, data.y),
        target_epsilon=options.epsilon,
        target_delta=options.delta,
        steps=planned_steps(options),
        batch_size=options.batch_size,
        public_size=TRAIN_SIZE,
        max_norm=options.max_norm,
        sampling_generator=torch.Generator().manual_seed(options.seed),
    )
    history, started = History(), time.perf_counter()
    for x, y in tqdm(private, total=private.planned_steps, desc="private    ", unit="step", leave=False, disable=None):
        with private:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        private.step()
        history.loss.append(loss.item())
        history.norms.append(private.clipping.norms)
        history.accuracy.append(accuracy(model, data.x_test, data.y_test))
    history.seconds = time.perf_counter() - started
    return history, private


def planned_steps(options: argparse.Namespace) -> int:
    """How many steps the epochs take, on average."""
    return max(1, round(options.epochs * (0.1 if options.quick else 1) * TRAIN_SIZE / options.batch_size))


def train_plain(model: nn.Module, data: Digits, options: argparse.Namespace) -> History:
    """The same batches without clipping and noise; without these, a smaller learning rate is the right one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history, started = History(), time.perf_counter()
    generator, steps = torch.Generator().manual_seed(options.seed), planned_steps(options)
    batches = PoissonBatchSampler(len(data.x), options.batch_size / TRAIN_SIZE, steps, generator=generator)
    for rows in tqdm(batches, total=steps, desc="not private", unit="step", leave=False, disable=None):
        if not rows:
            continue
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.x[rows]), data.y[rows])
        loss.backward()
        optimizer.step()
        history.loss.append(loss.item())
        history.accuracy.append(accuracy(model, data.x_test, data.y_test))
    history.seconds = time.perf_counter() - started
    return history


def _positive(kind: type) -> object:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    real, whole = _positive(float), _positive(int)
    parser.add_argument("--epsilon", type=real, default=3.0, help="privacy budget; smaller is more private")
    parser.add_argument("--delta", type=real, default=1e-4, help="its second part; well below 1 / number of images")
    parser.add_argument("--epochs", type=real, default=50.0, help="passes over the data, on average")
    parser.add_argument("--batch-size", type=whole, default=750, help="expected number of images in a step")
    parser.add_argument("--lr", type=real, default=2.0, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.0, help="of the optimizer")
    parser.add_argument("--max-norm", type=real, default=1.0, help="C, to which each image's gradient is clipped")
    parser.add_argument("--model", choices=tuple(MODELS), default="cnn", help="network")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sampling; the noise has none")
    parser.add_argument("--no-baseline", action="store_true", help="leave out the training without privacy")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, to see that it runs")
    options = parser.parse_args(arguments)
    if options.delta >= 1:
        parser.error("--delta must be less than 1")
    if not 0 <= options.momentum < 1:
        parser.error("--momentum must be at least 0 and less than 1")
    return options


def run(options: argparse.Namespace) -> dict[str, float]:
    """Calibrate, train, print; returns what was printed."""
    if options.batch_size > TRAIN_SIZE:
        raise SystemExit(f"--batch-size {options.batch_size} is more than the {TRAIN_SIZE} training images")
    data = load_data()
    model = make_model(options.model, options.seed)
    history, private = train_private(model, data, options)
    result = {
        "accuracy": accuracy(model, data.x_test, data.y_test),
        "epsilon": private.epsilon(),
        "seconds": history.seconds,
    }
    print(
        f"{TRAIN_SIZE} images, {private.steps} steps with sample rate {private.sample_rate:.3g}, "
        f"noise multiplier {private.noise_multiplier:.3f}"
    )
    print(
        f"private:     test accuracy {result['accuracy']:.1%} at epsilon {result['epsilon']:.2f}, "
        f"delta {options.delta:g}, in {history.seconds:.1f} s"
    )
    if not options.no_baseline:
        model = make_model(options.model, options.seed)
        history = train_plain(model, data, options)
        result["plain_accuracy"] = accuracy(model, data.x_test, data.y_test)
        result["plain_seconds"] = history.seconds
        print(f"not private: test accuracy {result['plain_accuracy']:.1%} in {history.seconds:.1f} s")
    return result


if __name__ == "__main__":
    run(parse_arguments())
