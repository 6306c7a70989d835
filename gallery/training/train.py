"""Train a network privately, or not, on images or texts; prints accuracy and epsilon, and writes every epoch down.

Without any option: a small CNN on scikit-learn's real digits, at epsilon 3, and the same without privacy beside it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))  # also for python -m gallery.training.train

import train_data
import train_models
from train_courses import OPTIMIZERS, Course, make_course
from train_data import Data, DataError, load_data
from train_methods import BACKWARDS
from train_models import ACTIVATIONS, ModelError, Shape, make_model
from train_report import Row, draw, peak_mib, save, write_rows

from perexample import PerExampleError

METHODS = {
    "clipped": "clipped sums of per-example gradients in one backward, by perexample",
    "materialised": "all per-example gradients are made, then clipped; much memory",
    "naive": "one backward for each example; slow",
    "vmap": "all per-example gradients by torch.func; much memory",
    "plain": "without privacy",
}
EXAMPLES = """
examples:
  train.py                                          digits, CNN, epsilon 3
  train.py --data names --model lstm                texts: which language is a name written in?
  train.py --model mlp --epsilon 1 --repeat 5       mean and range over five seeds
  train.py --data cifar10 --data-dir DIR --download --model wrn-16-4 --batch-size 4096 --physical-batch-size 64
  train.py --data imdb --data-dir aclImdb --model transformer --hidden 128 --layers 2 --optimizer adamw
  train.py --data images --data-dir LSUN --model timm:resnet26 --image-size 128 --epsilon 8
  train.py --epochs 50 --out runs/a, stopped, then the same with --resume

what is written to --out: run.csv (a row for each epoch), run.png, state.pt (for --resume), ledger.jsonl (every private
step, before it is taken). Training loss and accuracy in them come from the private data without noise: do not
publish them.
"""
# What is known to work: SGD's learning rate, expected batch size, epochs. Other optimizers have a rate of their own.
RECIPES = {"digits": (3.0, 750, 50.0), "names": (2.0, 1000, 30.0)}
OTHERS, PLAIN_LR, ADAPTIVE_LR = (1.0, 1000, 20.0), 0.1, 2e-3


def _number(kind: type, least: float, strict: bool = True, most: float = math.inf) -> Callable[[str], Any]:
    """A parser of numbers within bounds."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > least if strict else value >= least) or not value < most:
            above = f"{'greater than' if strict else 'at least'} {least:g}"
            raise argparse.ArgumentTypeError(
                f"{text} must be {above}" + (f" and less than {most:g}" * (most < math.inf))
            )
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def _list(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: every width must be at least 1")
    return values


_list.__name__ = "list of whole numbers"


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    real, whole = _number(float, 0), _number(int, 0)
    ways = "; ".join(f"{name}: {text}" for name, text in METHODS.items())
    add = parser.add_argument_group("what to train").add_argument
    add("--method", choices=list(METHODS), default="clipped", help=f"{ways} (default: clipped)")
    add("--model", metavar="NAME", help=f"{', '.join(train_models.NAMES)}, wrn-DEPTH-FACTOR, timm:NAME, "
        "torchvision:NAME; BatchNorm is replaced by GroupNorm, and every parameter is trained (default: cnn for "
        "images, lstm for texts)")  # fmt: skip
    names = [*train_data.NAMES, *train_data.ALIASES]
    add("--data", choices=names, default="digits", metavar="NAME", help="digits and names are bundled; mnist, "
        "fashion-mnist (fmnist), cifar10, cifar100 are read in the formats they are published in; images (lsun) are "
        "folders train/CLASS and test/CLASS of pictures, texts (imdb) of .txt (default: digits)")  # fmt: skip
    add("--data-dir", type=Path, metavar="DIR", help="where the files are, for all that is not bundled")
    add("--download", action="store_true", help="let torchvision fetch the data to --data-dir first")

    add = parser.add_argument_group("privacy").add_argument
    add("--epsilon", type=real, help="budget for the whole training; the noise is calibrated to it (default: 3)")
    add("--noise-multiplier", type=_number(float, 0, False), help="noise in units of C, instead of --epsilon")
    add("--delta", type=_number(float, 0, most=1), help="delta of (epsilon, delta)-differential privacy (default: the "
        "power of ten below 1 / number of examples)")  # fmt: skip
    add("--max-norm", type=real, default=1.0, help="C, to which each example's gradient is clipped (default: 1)")
    add("--clip", choices=["flat", "automatic", "global", "adaptive"], default="flat", help="flat: min(1, C / norm); "
        "automatic: C / (norm + 0.01); global: 1, or 0 beyond C; adaptive: C follows --quantile, privately "
        "(default: flat)")  # fmt: skip
    add("--quantile", type=_number(float, 0, most=1), default=0.5, help="for --clip adaptive (default: 0.5)")
    add("--groups", choices=["all", "per-module", "per-parameter"], default="all", help="what is clipped jointly; the "
        "noise grows with the root of the number of groups (default: all)")  # fmt: skip
    add("--sampling", choices=["poisson", "shuffled"], default="poisson", help="poisson: every example is in a batch "
        "with the same probability, by itself, which the accounting needs; shuffled: accounted without amplification, "
        "at a far larger epsilon that is for data sets of one length (default: poisson)")  # fmt: skip
    add("--public-size", type=whole, help="number of training examples as far as it may be known (default: that of the "
        "set, which says that it is no secret)")  # fmt: skip
    add("--noise", choices=["torch", "os"], default="torch", help="os draws noise from the system's cryptographic "
        "source (default: torch)")  # fmt: skip

    add = parser.add_argument_group("optimization").add_argument
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="(default: sgd)")
    add("--lr", type=real, help="learning rate (default: one known to work for the bundled data)")
    add("--momentum", type=_number(float, 0, False, 1), help="of sgd and rmsprop (default: 0, plain 0.9)")
    share = _number(float, 0, False, math.nextafter(1, 2))
    add("--average", type=share, metavar="SHARE", help="the network that is tested is the mean of the weights after "
        "the last steps, this share of all; 0 for the last ones alone (default: 0.2, plain 0)")  # fmt: skip
    add("--weight-decay", type=_number(float, 0, False), default=0.0, help="(default: 0)")
    add("--epochs", type=real, help="passes over the data, on average (default: 50 for digits, 30 for names, else 20)")
    add("--batch-size", type=whole, help="expected number of examples of a step (default: 750 for digits, else 1000)")
    add("--physical-batch-size", type=whole, help="most examples at a time, for memory (default: all)")

    add("--augmentation-multiplicity", type=whole, metavar="K", help="images that each becomes in a step: itself and "
        "K - 1 that are turned, moved, stretched, and mirrored unless they are digits; their gradients are averaged "
        "before the example is clipped (default: 2 for the cnn on digits, else 1)")  # fmt: skip

    add = parser.add_argument_group("networks").add_argument
    add("--hidden", type=_list, default=(64,), metavar="W,...", help="widths of linear layers; the last is that of "
        "rnn, lstm, gru, transformer and vit (default: 64)")  # fmt: skip
    add("--channels", type=_list, default=(16, 64), metavar="C,...", help="of cnn (default: 16,64)")
    add("--kernel-size", type=whole, default=3, help="of cnn (default: 3)")
    add("--layers", type=whole, default=1, help="of rnn, lstm, gru, transformer and vit (default: 1)")
    add("--heads", type=whole, default=4, help="of transformer and vit (default: 4)")
    add("--activation", choices=list(ACTIVATIONS), default="tanh", help="of mlp and cnn (default: tanh)")
    add("--pretrained", action="store_true", help="begin with published weights, for timm: and torchvision:")
    add("--image-size", type=whole, default=64, help="to which --data images are cut (default: 64)")
    add("--length", type=whole, default=256, help="words of a text of --data texts (default: 256)")
    add("--vocabulary", type=_number(int, 1), default=10000, help="numbers that words are hashed to (default: 10000)")

    add = parser.add_argument_group("runs").add_argument
    add("--seed", type=int, default=0, help="of weights and plain batches; private batches and noise have none "
        "(default: 0)")  # fmt: skip
    add("--repeat", type=whole, default=1, help="so many runs with seeds that follow (default: 1)")
    add("--record", action="store_true", help="record forward and backward once and replay them, on a GPU as a CUDA "
        "graph; faster where a step is short")  # fmt: skip
    add("--compile", action="store_true", help="the same, and torch.compile fuses what is recorded: seconds to minutes "
        "once, steps are faster (CPUs)")  # fmt: skip
    add("--deterministic", action="store_true", help="the same numbers in every run: noise and batches are seeded, "
        "so that the result is NOT private; for tests")  # fmt: skip
    add("--baseline", action=argparse.BooleanOptionalAction, help="train the same network without privacy, too "
        "(default: for bundled data, if the run is new)")  # fmt: skip
    add("--steps", type=whole, help="stop after so many steps, to see that it runs")
    add("--out", type=Path, metavar="DIR", help="folder for what is written (default: a new one in runs/)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    add("--threads", type=whole, help="CPU threads (default: torch's)")
    add("--workers", type=_number(int, 0, False), default=0, help="processes that load data (default: 0)")
    add("--verbose", action="store_true", help="print a line for each epoch")
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line, checked for contradictions."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    plain = options.method == "plain"
    if options.epsilon is not None and options.noise_multiplier is not None:
        parser.error("--epsilon and --noise-multiplier: give one, the other follows from it")
    if plain and (options.epsilon is not None or options.noise_multiplier is not None):
        parser.error("--method plain has no privacy: leave out --epsilon and --noise-multiplier")
    if options.method != "clipped" and (options.clip == "adaptive" or options.groups != "all"):
        parser.error(f"--clip adaptive and --groups are of --method clipped, not of {options.method}")
    if options.clip == "adaptive" and options.groups != "all":
        parser.error("--clip adaptive bounds the joint norm: leave out --groups")
    options.record |= options.compile
    if options.record and (options.method != "clipped" or options.sampling != "poisson"):
        parser.error("--record and --compile are of --method clipped and --sampling poisson")
    if options.resume and (options.out is None or options.repeat > 1):
        parser.error("--resume continues one run: name its folder with --out, without --repeat")
    return options


def filled(options: argparse.Namespace, data: Data) -> argparse.Namespace:
    """The options with defaults that depend on the data."""
    options = argparse.Namespace(**vars(options))
    lr, batch_size, epochs = RECIPES.get(options.data, OTHERS)
    plain, count = options.method == "plain", options.public_size or len(data.train)  # type: ignore[arg-type]
    usual = (PLAIN_LR if plain else lr) if options.optimizer == "sgd" else ADAPTIVE_LR
    defaults = {
        "lr": usual,
        "batch_size": min(batch_size, count),
        "epochs": epochs,
        "momentum": 0.9 if plain else 0.0,
        "average": 0.0 if plain else 0.2,
        "augmentation_multiplicity": 2 if (options.data, options.model) == ("digits", "cnn") else 1,
        "public_size": count,
        "delta": 10.0 ** -(math.floor(math.log10(count)) + 1),
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not plain and options.noise_multiplier is None and options.epsilon is None:
        options.epsilon = 3.0
    if options.augmentation_multiplicity > 1 and data.vocabulary is not None:
        raise DataError("--augmentation-multiplicity is of images, and the data are texts")
    if options.batch_size > options.public_size:
        raise DataError(f"--batch-size {options.batch_size} is more than the {options.public_size} examples")
    return options


def evaluated(model: nn.Module, dataset: Dataset, device: str) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for x, y in DataLoader(dataset, batch_size=500):
            output, y = model(x.to(device)), y.to(device)
            loss += F.cross_entropy(output, y, reduction="sum").item()
            right, count = right + int((output.argmax(1) == y).sum()), count + len(y)
    model.train()
    return loss / count, right / count


def run(options: argparse.Namespace, data: Data, folder: Path) -> Row:
    """One training; returns the last row of its table."""
    table, state = folder / "run.csv", folder / "state.pt"
    if not options.resume and any(path.exists() for path in (table, state, folder / "ledger.jsonl")):
        raise DataError(f"{folder} has a run already: take another --out, or --resume it")
    if options.resume and not state.exists():
        raise DataError(f"{folder} has no state.pt to resume from; one is written after every epoch")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(options.deterministic)
    if "cuda" in options.device and not options.resume:
        torch.cuda.reset_peak_memory_stats()
    shape = Shape(
        options.hidden, options.channels, options.kernel_size, options.layers, options.heads, options.activation,
        options.pretrained,
    )  # fmt: skip
    model = make_model(options.model, data, shape).to(options.device)
    average = AveragedModel(model)
    course = make_course(model, data, options, folder)
    rows: list[Row] = []
    if options.resume:
        saved = torch.load(state, map_location="cpu", weights_only=True)
        if saved["deterministic"] != options.deterministic:
            raise DataError(
                f"{folder}: the run was begun with{'' if saved['deterministic'] else 'out'} --deterministic"
            )
        course.load_state_dict(saved["course"])
        average.load_state_dict(saved["average"])
        rows = saved["rows"]
    last = min(course.planned, options.steps or course.planned)
    label = "not private" if options.method == "plain" else "private"
    with tqdm(total=last, initial=course.steps, desc=f"{label:11}", unit="step", leave=False, disable=None) as bar:
        while course.steps < last:
            row = one_epoch(course, average, data, options, len(rows), last, bar)
            rows.append(row)
            save(
                {
                    "course": course.state_dict(),
                    "average": average.state_dict(),
                    "rows": rows,
                    "deterministic": options.deterministic,
                },
                state,
            )
            write_rows(table, rows)
            bar.set_postfix(accuracy=f"{row['test_accuracy']:.1%}")
            if options.verbose:
                tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None))
    if not rows:
        raise DataError(f"{folder}: the run has no epoch, and nothing to go on with")
    draw(rows, folder / "run.png", f"{options.data}, {options.model}, {options.method}")
    return {**rows[-1], "noise_multiplier": course.noise_multiplier, "total_seconds": sum(r["seconds"] for r in rows)}


def one_epoch(
    course: Course, average: AveragedModel, data: Data, options: argparse.Namespace, epoch: int, last: int, bar: tqdm
) -> Row:
    """Train for an epoch, or to the last step; the row of it."""
    begin = (1 - options.average) * course.planned  # of the average; that of noisy weights costs no privacy
    loss, right, count, seconds, start = 0.0, 0, 0, 0.0, time.perf_counter()
    for x, y in course.batches(epoch):
        if len(x):  # a Poisson batch may be empty: its step is noise alone
            losses, output = course.learn(x.to(options.device), y.to(options.device))
            loss += float(losses.sum())
            right, count = right + int((output.argmax(1) == y.to(output.device)).sum()), count + len(x)
        before = course.steps
        course.step()
        bar.update(course.steps - before)
        if course.steps > max(before, begin):
            average.update_parameters(course.model)
        if course.steps >= last:
            break
    seconds = time.perf_counter() - start
    shown = average if average.n_averaged else course.model
    test_loss, test_accuracy = evaluated(shown, data.test, options.device)
    return {
        "epoch": epoch + 1,
        "steps": course.steps,
        "train_loss": loss / max(1, count),
        "train_accuracy": right / max(1, count),
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "seconds": seconds,
        "peak_mib": peak_mib(options.device),
        "epsilon": course.epsilon(),
    }


def describe(options: argparse.Namespace, result: Row) -> str:
    """What is printed of a run."""
    name = "not private" if options.method == "plain" else "private"
    text = f"{name + ':':12} test accuracy {result['test_accuracy']:.1%}"
    if result["epsilon"] is not None:
        text += f" at epsilon {result['epsilon']:.2f}, delta {options.delta:g}"
        text += " (NOT private: --deterministic seeds the noise)" if options.deterministic else ""
    return f"{text}, {int(result['steps'] or 0)} steps in {result['total_seconds']:.1f} s"


def repeated(options: argparse.Namespace, data: Data, folder: Path) -> list[Row]:
    """All runs of the seeds asked for, printed one by one."""
    results = []
    for seed in range(options.seed, options.seed + options.repeat):
        place = folder if options.repeat == 1 else folder / f"seed-{seed}"
        results.append(run(argparse.Namespace(**{**vars(options), "seed": seed}), data, place))
        prefix = "" if options.repeat == 1 else f"seed {seed}: "
        print(prefix + describe(options, results[-1]), flush=True)
    if options.repeat > 1:
        found = [result["test_accuracy"] for result in results]
        print(
            f"{options.repeat} runs: test accuracy {statistics.mean(found):.1%} on average, "
            f"{min(found):.1%} to {max(found):.1%}"
        )
    return results


def main(arguments: list[str] | None = None) -> dict[str, list[Row]]:
    """Train as the command line says; returns the last rows of all runs by method."""
    asked = parse_arguments(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    data = load_data(
        asked.data,
        asked.data_dir,
        download=asked.download,
        image_size=asked.image_size,
        length=asked.length,
        vocabulary=asked.vocabulary,
    )
    if asked.model is None:
        asked.model = "cnn" if data.vocabulary is None else "lstm"
    options = filled(asked, data)
    name = f"{options.data}-{options.model}-{datetime.now():%Y%m%d-%H%M%S}".replace(":", "-").replace("/", "-")
    folder = options.out or Path("runs") / name
    print(f"{options.data}: {len(data.train)} examples for training, {len(data.test)} for the test", flush=True)  # type: ignore[arg-type]
    results = {options.method: repeated(options, data, folder)}
    baseline = options.data in train_data.BUNDLED if options.baseline is None else options.baseline
    if baseline and options.method != "plain" and not options.resume:
        same = {"method": "plain", "noise_multiplier": None, "epsilon": None, "clip": "flat", "groups": "all"}
        plain = argparse.Namespace(**{**vars(asked), **same, "lr": None, "momentum": None, "average": None})
        results["plain"] = repeated(filled(plain, data), data, folder / "plain")
    print(f"written to {folder}")
    return results


def command(arguments: list[str] | None = None) -> int:
    """The command line, with one line for each error."""
    try:
        main(arguments)
    except (DataError, ModelError, PerExampleError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped; the last whole epoch is in --out, go on with --resume", file=sys.stderr)
        return 130
    return 0


assert METHODS.keys() - {"plain"} == BACKWARDS.keys()

if __name__ == "__main__":
    sys.exit(command())
