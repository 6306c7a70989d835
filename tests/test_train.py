"""The training command line: its readers on small files in the published formats, its networks, its ways, its runs."""

import argparse
import csv
import gzip
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_timm
import torch
import torch.nn.functional as F
import train
import train_data
import train_models
from train_augment import Changes, Copies, multiplied
from train_data import DataError, load_data
from train_methods import BACKWARDS, OwnSums, clipped
from train_models import ModelError, Shape, make_model

from perexample import extend, unextend
from perexample.extensions import ClippedGrad

pytest.importorskip("sklearn")
pytest.importorskip("dp_accounting")
ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)


def idx(values: np.ndarray) -> bytes:
    """A file in the IDX format."""
    return bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def write_mnist(folder: Path, zipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Four files as MNIST's; returns the training images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    train_set = None
    for part, n in (("train", 12), ("t10k", 5)):
        images, labels = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8), RNG.integers(0, 10, n, dtype=np.uint8)
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            content = gzip.compress(idx(values)) if zipped else idx(values)
            (folder / (name + ".gz" * zipped)).write_bytes(content)
        train_set = train_set or (images, labels)
    return train_set


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "fmnist"])
def test_idx_files(tmp_path, name, zipped):
    images, labels = write_mnist(tmp_path, zipped)
    data = load_data(name, tmp_path)
    assert (len(data.train), len(data.test), data.shape, len(data.classes)) == (12, 5, (1, 28, 28), 10)
    x, y = data.train[3]
    np.testing.assert_allclose(x[0].numpy(), images[3] * (3 / 255), rtol=1e-6)
    assert y == labels[3]


def test_where_torchvision_puts_files(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw", False)
    assert len(load_data("mnist", tmp_path).train) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin as"),
        (b"PK\x03\x04" + bytes(20), "does not begin as"),
        (idx(np.zeros((2, 3, 3), np.uint8))[:-1], "should hold 18"),
    ],
)
def test_broken_idx_files(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        train_data.read_idx(path, 3)
    assert str(path) in str(error.value)


def pickled(content: dict, protocol: int = 2) -> bytes:
    """As the published files are: pickled by Python 2, where texts are bytes."""
    return pickle.dumps({key.encode(): value for key, value in content.items()}, protocol)


def batch(n: int, number: int) -> tuple[np.ndarray, list[int]]:
    return RNG.integers(0, 256, (n, 3072), dtype=np.uint8), [int(y) for y in RNG.integers(0, number, n)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("number", [10, 100])
def test_cifar_files(tmp_path, number, binary, nested):
    folder = tmp_path
    if nested:
        kind = {(10, False): "cifar-10-batches-py", (10, True): "cifar-10-batches-bin"}
        folder = tmp_path / kind.get((number, binary), f"cifar-100-{'binary' if binary else 'python'}")
        folder.mkdir()
    names = [f"class {i}" for i in range(number)]
    parts = [f"data_batch_{i}" for i in range(1, 6)] if number == 10 else ["train"]
    written = {}
    for part in [*parts, "test_batch" if number == 10 else "test"]:
        pixels, labels = written[part] = batch(3, number)
        if binary:
            coarse = [[0]] * 3 if number == 100 else [[]] * 3
            rows = [bytes([*c, y]) + row.tobytes() for c, y, row in zip(coarse, labels, pixels, strict=True)]
            (folder / f"{part}.bin").write_bytes(b"".join(rows))
        else:
            content = {"data": pixels, ("labels" if number == 10 else "fine_labels"): labels}
            (folder / part).write_bytes(pickled(content))
    if not binary:
        key = "label_names" if number == 10 else "fine_label_names"
        (folder / ("batches.meta" if number == 10 else "meta")).write_bytes(pickled({key: [n.encode() for n in names]}))
    data = load_data(f"cifar{number}", tmp_path)
    assert (len(data.train), len(data.test), data.shape) == (3 * len(parts), 3, (3, 32, 32))
    assert data.classes == (names if not binary else [str(i) for i in range(number)])
    pixels, labels = written[parts[-1]]
    x, y = data.train[len(data.train) - 1]
    assert y == labels[-1]
    np.testing.assert_allclose(x.numpy().reshape(-1), pixels[-1] * (4 / 255) - 2, rtol=1e-5, atol=1e-6)


def test_pickles_that_would_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    (tmp_path / "test_batch").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match="data_batch_1 is refused: the file wants to load pathlib"):
        load_data("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_image_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part, counts in (("train", {"cat": 3, "dog": 2}), ("test", {"dog": 1})):
        for name, count in counts.items():
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                colour = (255, 0, 0) if name == "cat" else (0, 0, 255)
                image.new("RGB", (40, 20 + i), colour).save(tmp_path / part / name / f"{i}.png")
    data = load_data("images", tmp_path, image_size=16)
    assert (len(data.train), len(data.test), data.shape, data.classes) == (5, 1, (3, 16, 16), ["cat", "dog"])
    x, y = data.train[4]
    assert y == 1
    torch.testing.assert_close(x, torch.tensor([-2.0, -2.0, 2.0]).view(3, 1, 1).expand(3, 16, 16))
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        data.train[0]


def test_text_folders(tmp_path):
    for part in ("train", "test"):
        for name, text in (("neg", "Bad. <br />Bad film!"), ("pos", "good"), ("unsup", "unknown")):
            (tmp_path / "aclImdb" / part / name).mkdir(parents=True)
            (tmp_path / "aclImdb" / part / name / "0_1.txt").write_text(text, encoding="utf-8")
    data = load_data("imdb", tmp_path, length=8, vocabulary=1000)
    assert (len(data.train), data.shape, data.vocabulary, data.classes) == (2, (8,), 1000, ["neg", "pos"])
    (bad, zero), (good, one) = data.train[0], data.train[1]
    assert (zero, one) == (0, 1)
    assert bad[0] == bad[2] != bad[1]
    assert (bad > 0).tolist() == [True] * 5 + [False] * 3
    assert (good > 0).sum() == 1
    assert bad.max() < 1000


def test_bundled_sets():
    digits, names = load_data("digits"), load_data("names")
    assert (len(digits.train), len(digits.test), digits.shape) == (1500, 297, (1, 8, 8))
    assert len(names.train) > 5 * len(names.test) - 10
    assert len(names.classes) == 10
    train_rows = {tuple(x.tolist()) for x, _ in (names.train[i] for i in range(len(names.train)))}
    test_rows = {tuple(x.tolist()) for x, _ in (names.test[i] for i in range(len(names.test)))}
    assert len(train_rows & test_rows) <= 5  # nothing of the test was trained on, but what is equal when cut
    assert names.vocabulary > max(max(row) for row in train_rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "mnist"}, "--data-dir FOLDER"),
        ({"name": "mnist", "folder": "nowhere"}, "is no folder"),
        ({"name": "mnist", "folder": "."}, "there is no train-images-idx3-ubyte"),
        ({"name": "cifar10", "folder": "."}, r"looked for data_batch_1 to test_batch.*--download"),
        ({"name": "images", "folder": "."}, "has no folder `train`"),
        ({"name": "texts", "folder": ".", "download": True}, "does not know texts"),
    ],
)
def test_data_that_are_not_there(tmp_path, call, message):
    call = {**call, "folder": tmp_path / call["folder"]} if "folder" in call else call
    with pytest.raises(DataError, match=message):
        load_data(**call)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def names():
    return load_data("names")


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The table of a run."""
    with (folder / "run.csv").open() as file:
        return list(csv.DictReader(file))


TINY = ["--steps", "2", "--batch-size", "24", "--noise-multiplier", "1", "--no-baseline", "--epochs", "0.1"]


def run(tmp_path: Path, *options: str) -> dict:
    """A run by the command line; the last row of its main method."""
    return next(iter(train.main([*options, "--out", str(tmp_path / "out")]).values()))[-1]


LARGE = {"resnet101", "wrn-28-10", "wrn-40-4", "vgg19", "resnet50", "vgg16", "vgg13", "resnet34"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in train_models.NAMES]
)
def test_every_network_trains_privately_on_images(tmp_path, name):
    size = ["--batch-size", "3"] if name in LARGE | {"resnet18", "wrn-16-4", "vgg11"} else []
    row = run(tmp_path, "--model", name, *TINY, *size, "--physical-batch-size", "8")
    assert row["steps"] == 2
    assert np.isfinite(row["test_loss"])
    assert row["epsilon"] > 0


@pytest.mark.parametrize("name", ["linear", "mlp", "rnn", "lstm", "gru", "transformer"])
def test_networks_train_privately_on_texts(tmp_path, name):
    row = run(tmp_path, "--data", "names", "--model", name, *TINY)
    assert row["steps"] == 2
    assert np.isfinite(row["test_loss"])


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vit_tiny_patch16_224", "timm:convnext_atto"])
def test_networks_of_timm(tmp_path, name):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with test_timm._torchvision():
        importlib.import_module("timm.models")
    row = run(tmp_path, "--model", name, *TINY, "--batch-size", "2", "--steps", "1")
    assert row["steps"] == 1


def test_networks_of_torchvision(tmp_path):
    pytest.importorskip("torchvision")
    assert run(tmp_path, "--model", "torchvision:resnet18", *TINY, "--batch-size", "2")["steps"] == 2


@pytest.mark.parametrize("name", ["resnet18", "wrn-16-4", "cnn", "vit"])
def test_nothing_is_frozen_and_no_batchnorm_is_left(digits, name):
    model = make_model(name, digits)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("BatchNorm" in type(m).__name__ for m in model.modules())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "there is no model 'resnet19'; there are linear, mlp"),
        ("wrn-17-2", "6 k [+] 4"),
        ("timm:no_such", "timm could not make no_such|needs the package timm"),
        ("torchvision:no_such", "torchvision could not make no_such|needs the package torchvision"),
    ],
)
def test_networks_that_there_are_not(digits, name, message):
    with pytest.raises(ModelError, match=message):
        make_model(name, digits)


def test_networks_that_do_not_fit(digits, names):
    with pytest.raises(ModelError, match="cnn is for images, and names are texts"):
        make_model("cnn", names)
    with pytest.raises(ModelError, match="too small for 5 poolings"):
        make_model("cnn", digits, Shape(channels=(4, 4, 4, 4, 4)))
    with pytest.raises(ModelError, match="64 cannot be shared by 5 heads"):
        make_model("vit", digits, Shape(heads=5))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap and LSTM
@pytest.mark.parametrize("clip", ["flat", "automatic", "global"])
@pytest.mark.parametrize("kind", ["cnn", "lstm", "transformer"])
def test_all_ways_to_the_sums_agree(digits, names, kind, clip):
    data = digits if kind == "cnn" else names
    x, y = (torch.stack(list(part)) for part in zip(*(data.train[i] for i in range(6)), strict=True))
    y = torch.as_tensor(y)
    torch.manual_seed(0)
    model = extend(make_model(kind, data))
    params = list(model.parameters())
    clipping = ClippedGrad(0.5, clip=clip)
    losses, output = clipped(model, clipping, x, y)
    wanted = clipping.consume(params)
    assert any(bool(t.abs().max() > 0) for t in wanted) or clip == "global"
    for name in ("naive", "materialised", "vmap"):
        own = OwnSums(0.5, clip=clip)
        (extend if name == "materialised" else unextend)(model)
        found = BACKWARDS[name](model, own, x, y)
        assert own.examples == 6
        torch.testing.assert_close(found[0], losses)
        torch.testing.assert_close(found[1], output)
        for a, b in zip(own.consume(params), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert own.examples == 0


def test_all_ways_to_the_sums_agree_with_changed_copies(digits):
    """Three images of each example, whose gradients are averaged before they are clipped; the reference one by one."""
    x, y = (torch.stack(list(part)) for part in zip(*(digits.train[i] for i in range(5)), strict=True))
    x, y = multiplied(x, 3, Changes()), y.unsqueeze(1).expand(-1, 3)
    torch.manual_seed(0)
    model = Copies(make_model("cnn", digits))
    params, wanted = list(model.parameters()), None
    for images, labels in zip(x, y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model.network(images), labels), params)
        factor = min(1.0, 0.5 / torch.stack([g.norm() for g in gradients]).norm().item())
        row = [factor * g for g in gradients]
        wanted = row if wanted is None else [a + b for a, b in zip(wanted, row, strict=True)]
    for name, backward in BACKWARDS.items():
        (extend if name in ("materialised", "clipped") else unextend)(model)
        own = ClippedGrad(0.5) if name == "clipped" else OwnSums(0.5)
        losses, output = backward(model, own, x, y)
        assert own.examples == 5
        torch.testing.assert_close(losses[0], F.cross_entropy(model.network(x[0]), y[0]).detach())
        torch.testing.assert_close(output, model.network(x[:, 0]).detach())
        for a, b in zip(own.consume(params), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_changed_copies():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 12, 12)
    x = multiplied(images, 5, Changes(), torch.Generator().manual_seed(1))
    assert x.shape == (4, 5, 3, 12, 12)
    assert torch.equal(x[:, 0], images)
    flat = x.flatten(0, 1).flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(1).min() > 0.1  # no two are the same
    assert torch.equal(x, multiplied(images, 5, Changes(), torch.Generator().manual_seed(1)))
    assert torch.equal(multiplied(images, 1, Changes())[:, 0], images)
    still = Changes(0, 0, 0, 0)
    torch.testing.assert_close(multiplied(images, 3, still), images.unsqueeze(1).expand(-1, 3, -1, -1, -1))
    mirrored = multiplied(images, 9, Changes(0, 0, 0, 0, mirror=True))
    for image, copies in zip(images, mirrored[:, 1:], strict=True):
        as_it_was = (copies - image).flatten(1).norm(dim=1) < 1e-4
        turned_round = (copies - image.flip(2)).flatten(1).norm(dim=1) < 1e-4
        assert (as_it_was ^ turned_round).all()
    assert multiplied(images[:0], 3, Changes()).shape == (0, 3, 3, 12, 12)


def test_a_move_is_one_of_as_many_pixels():
    class Fixed(Changes):
        def maps(self, count, generator):
            return torch.tensor([[1.0, 0, 0.25], [0, 1, 0]]).expand(count, 2, 3)  # an eighth of the width

    image = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(multiplied(image, 2, Fixed())[0, 1, 0, :, :7], image[0, 0, :, 1:])


@pytest.mark.parametrize(
    "options", [["--physical-batch-size", "20"], ["--method", "plain"], ["--sampling", "shuffled"]]
)
def test_copies_of_an_image_are_one_example_of_the_batch(tmp_path, options):
    """Also in pieces: make_private counts the examples of each step, and refuses another number than was drawn."""
    out = [*options, "--augmentation-multiplicity", "3", "--steps", "2", "--out", str(tmp_path / "out")]
    (row,) = next(iter(train.main([*SAME, *out]).values()))
    assert row["steps"] == 2


def test_an_example_that_is_not_finite_counts_zero_in_every_way(digits):
    x, y = (torch.stack(list(part)) for part in zip(*(digits.train[i] for i in range(4)), strict=True))
    x[2, 0, 0, 0] = float("nan")
    model = extend(make_model("linear", digits))
    params = list(model.parameters())
    keep = torch.tensor([0, 1, 3])
    for name in ("naive", "materialised", "vmap"):
        own = OwnSums(0.5)
        (extend if name == "materialised" else unextend)(model)
        BACKWARDS[name](model, own, x, y)
        assert own.nonfinite == (0 if name == "naive" else 1)  # of the last example, or of all
        sums = own.consume(params)
        BACKWARDS[name](model, own, x[keep], y[keep])
        for a, b in zip(sums, own.consume(params), strict=True):
            torch.testing.assert_close(a, b)


COMPILE = pytest.param(["--compile"], marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="needs torch 2.13"))


@pytest.mark.usefixtures("noise_of_any_sums")
@pytest.mark.parametrize("options", [[], ["--physical-batch-size", "7"], ["--clip", "adaptive"], COMPILE])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_recorded_run_is_the_same(tmp_path, model, options):
    common = [option for option in options if option != "--compile"]
    usual, recorded = (run(tmp_path / name, *SAME, "--model", model, *more) for name, more in
                       (("a", common), ("b", ["--record", *options])))  # fmt: skip
    for key in ("test_loss", "train_loss", "train_accuracy", "epsilon", "steps"):
        assert recorded[key] == pytest.approx(usual[key], rel=1e-4), key


SAME = ["--deterministic", "--epochs", "0.2", "--batch-size", "60", "--no-baseline"]


@pytest.mark.parametrize(
    "options",
    [[], ["--method", "plain"], ["--record"], COMPILE],
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SAME, "--epochs", "3", *options]
    train.main([*options, "--out", str(whole)])
    train.main([*options, "--out", str(parts), "--steps", "25"])
    train.main([*options, "--out", str(parts), "--resume"])
    first, second = (torch.load(folder / "state.pt", weights_only=True) for folder in (whole, parts))
    for one, other in ((first["course"]["model"], second["course"]["model"]), (first["average"], second["average"])):
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
    assert (first["average"]["n_averaged"] > 0) == ("plain" not in options)
    tables = [rows_of(folder) for folder in (whole, parts)]
    assert [row["test_loss"] for row in tables[0]] == [row["test_loss"] for row in tables[1]]
    assert [row["epoch"] for row in tables[1]] == ["1", "2", "3"]


def test_a_resumed_run_without_a_sampler_has_noise_of_its_own(tmp_path):
    """Nothing says that its batches are the same."""
    options = [*SAME, "--epochs", "3", "--sampling", "shuffled", "--noise-multiplier", "2"]
    train.main([*options, "--out", str(tmp_path / "whole")])
    train.main([*options, "--out", str(tmp_path / "parts"), "--steps", "25"])
    train.main([*options, "--out", str(tmp_path / "parts"), "--resume"])
    whole, parts = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
    assert [row["steps"] for row in whole] == [row["steps"] for row in parts]
    assert [a["test_loss"] == b["test_loss"] for a, b in zip(whole, parts, strict=True)] == [True, False, False]


def test_a_run_is_resumed_as_it_was_begun(tmp_path):
    options = [*SAME, "--epochs", "2", "--out", str(tmp_path)]
    train.main([*options, "--steps", "25"])
    with pytest.raises(train.DataError, match="was begun with --deterministic"):
        train.main([*(option for option in options if option != "--deterministic"), "--resume"])


@pytest.mark.parametrize("size", [900, 899, 1000, 2000])
def test_the_number_of_private_examples_is_in_no_setting(size):
    def settings(count):
        data = argparse.Namespace(train=range(count), vocabulary=None)
        options = train.parse_arguments(["--data", "names", "--public-size", str(size)])
        return vars(train.filled(options, data))

    assert settings(size) == settings(size + 1) == settings(3 * size)
    assert settings(5)["delta"] < 1 / size


@pytest.mark.parametrize("options", [[], ["--sampling", "shuffled", "--noise-multiplier", "2"]])
def test_a_step_that_a_crash_left_in_the_ledger_alone_counts(tmp_path, options):
    options = [*SAME, "--epochs", "2", *options, "--out", str(tmp_path / "out")]
    train.main([*options, "--steps", "25"])
    ledger = tmp_path / "out" / "ledger.jsonl"
    with ledger.open("a") as file:
        file.write(ledger.read_text().splitlines()[-1] + "\n")  # written before the parameters moved
    row = train.main([*options, "--resume"])["clipped"][-1]
    assert row["steps"] == len(ledger.read_text().splitlines()) == 50


def test_a_deterministic_run_is_the_same_again_and_says_that_it_is_not_private(tmp_path, capsys):
    first, second = (run(tmp_path / name, *SAME)["test_loss"] for name in "ab")
    assert first == second
    assert "NOT private" in capsys.readouterr().out


def test_a_run_without_seeds_has_other_noise(tmp_path):
    options = [option for option in SAME if option != "--deterministic"]
    first, second = (run(tmp_path / name, *options)["test_loss"] for name in "ab")
    assert first != second


def test_what_is_written(tmp_path):
    out = tmp_path / "out"
    train.main(["--epochs", "1", "--batch-size", "300", "--model", "mlp", "--out", str(out)])
    rows = rows_of(out)
    assert list(rows[0]) == [
        "epoch",
        "steps",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "seconds",
        "peak_mib",
        "epsilon",
    ]
    assert float(rows[-1]["epsilon"]) <= 3
    assert len((out / "ledger.jsonl").read_text().splitlines()) == 5
    assert (out / "run.png").read_bytes()[:4] == b"\x89PNG"
    baseline = rows_of(out / "plain")
    assert baseline[-1]["epsilon"] == ""


def test_epsilon_is_that_of_the_ledger_and_shuffling_costs_more(tmp_path):
    options = ["--epochs", "1", "--batch-size", "300", "--noise-multiplier", "1", "--no-baseline", "--model", "linear"]
    poisson = run(tmp_path / "a", *options)["epsilon"]
    shuffled = run(tmp_path / "b", *options, "--sampling", "shuffled")["epsilon"]
    assert 3 * poisson < shuffled


def test_repeated_runs(tmp_path, capsys):
    results = train.main([*TINY, "--repeat", "2", "--model", "linear", "--out", str(tmp_path / "out")])
    assert len(results["clipped"]) == 2
    assert (tmp_path / "out" / "seed-1" / "run.csv").exists()
    assert "2 runs: test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("clip", [["--clip", "automatic"], ["--clip", "adaptive"], ["--groups", "per-module"]])
def test_optimizers_and_clip_functions(tmp_path, optimizer, clip):
    assert run(tmp_path, *TINY, "--model", "mlp", "--optimizer", optimizer, *clip)["steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epsilon", "3", "--noise-multiplier", "1"], "give one"),
        (["--method", "plain", "--epsilon", "3"], "plain has no privacy"),
        (["--method", "vmap", "--clip", "adaptive"], "are of --method clipped"),
        (["--groups", "per-module", "--clip", "adaptive"], "leave out --groups"),
        (["--resume"], "name its folder with --out"),
        (["--record", "--method", "vmap"], "--record and --compile are of --method clipped"),
        (["--compile", "--method", "vmap"], "--record and --compile are of --method clipped"),
        (["--record", "--sampling", "shuffled"], "--record and --compile are of --method clipped"),
        (["--epsilon", "-1"], "must be greater than 0"),
        (["--delta", "1"], "less than 1"),
        (["--batch-size", "0"], "must be greater than 0"),
        (["--hidden", "8,x"], "invalid list of whole numbers"),
        (["--hidden", "8,0"], "at least 1"),
        (["--lr", "fast"], "invalid number value"),
        (["--data", "nist"], "invalid choice"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_arguments(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet19"], "there is no model"),
        (["--data", "mnist"], "say where with --data-dir"),
        (["--batch-size", "2000"], "more than the 1500 examples"),
        (["--data", "names", "--augmentation-multiplicity", "2"], "of images, and the data are texts"),
        (["--out", "{full}"], "has a run already"),
        (["--out", "{empty}", "--resume"], "no state.pt to resume from"),
    ],
)
def test_errors_are_one_line(tmp_path, options, message, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.csv").touch()
    options = [o.format(full=tmp_path / "full", empty=tmp_path / "empty") for o in options]
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    assert train.command([*options, *out]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("train.py: error: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.parse_arguments(["--help"])
    text = capsys.readouterr().out
    for option in vars(train.parse_arguments([])):
        assert f"--{option.replace('_', '-')}" in text
    assert "examples:" in text


@pytest.mark.parametrize("how", [["gallery/training/train.py"], ["-m", "gallery.training.train"]])
def test_it_runs_as_a_script_and_as_a_module(tmp_path, how):
    command = [sys.executable, *how, *TINY, "--model", "linear", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "private:" in done.stdout


def test_digits_reach_their_accuracy_in_time(tmp_path):
    """README has the mean of twenty runs; that of four is within 1.5 per cent of it: one has a spread of one."""
    results = train.main(["--repeat", "4", "--no-baseline", "--out", str(tmp_path / "out")])["clipped"]
    assert np.mean([row["test_accuracy"] for row in results]) >= 0.932
    assert max(row["epsilon"] for row in results) <= 3
    assert max(row["total_seconds"] for row in results) < 60


def test_defaults_are_filled_by_the_data(digits):
    options = train.filled(train.parse_arguments([]), digits)
    assert isinstance(options, argparse.Namespace)
    assert (options.epsilon, options.delta, options.public_size) == (3.0, 1e-4, 1500)
    plain = train.filled(train.parse_arguments(["--method", "plain"]), digits)
    assert (plain.epsilon, plain.momentum) == (None, 0.9)
