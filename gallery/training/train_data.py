"""Where the examples of `train.py` come from: bundled sets, and folders in the formats that sets are published in.

Nothing here is computed from the data: values are scaled by constants, and words have numbers by a hash, so that
preparing the data costs no privacy.
"""

from __future__ import annotations

import gzip
import importlib
import io
import pickle
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

HERE = Path(__file__).parent
GRAY = (3.0, 0.0)  # from 0..1 to 0..3: the background of digits stays zero
COLOUR = (4.0, -2.0)  # to -2..2
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm"}


class DataError(Exception):
    """Data that are not there, or not in the format they should have."""


@dataclass(frozen=True)
class Data:
    """A training set and a test set.

    Attributes:
        name: As on the command line.
        train: Pairs of input and class.
        test: The same, for the accuracy.
        classes: Their names.
        shape: Of an input: ``(C, H, W)`` of an image, ``(T,)`` of a text.
        vocabulary: Number of different tokens of a text, with 0 for padding; nothing for images.
    """

    name: str
    train: Dataset
    test: Dataset
    classes: list[str]
    shape: tuple[int, ...]
    vocabulary: int | None = None


class Images(Dataset):
    """Images held in memory, ``[N, C, H, W]``, scaled as they are asked for."""

    def __init__(self, pixels: Tensor, labels: Tensor, full: int, scaling: tuple[float, float]) -> None:
        if len(pixels) != len(labels):
            raise DataError(f"there are {len(pixels)} images and {len(labels)} labels")
        self.pixels, self.labels, self.full, self.scaling = pixels, labels.long(), full, scaling

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """What a loader asks for if there is such a method; much faster than one by one."""
        factor, shift = self.scaling
        pixels = self.pixels[indices].float() * (factor / self.full) + shift
        return list(zip(pixels, self.labels[indices], strict=True))


class Files(Dataset):
    """Images read from files as they are asked for, cut to squares of one size."""

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, ImageOps

        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BILINEAR)
        except OSError as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error
        factor, shift = COLOUR
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() * (factor / 255) + shift, label


class Texts(Dataset):
    """Texts as numbers of tokens, ``[N, T]``, padded with 0."""

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """What a loader asks for if there is such a method."""
        return list(zip(self.tokens[indices].long(), self.labels[indices], strict=True))


def digits() -> Data:
    """1500 images of 8 x 8 pixels for training, 297 for the test, from scikit-learn."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=297, random_state=0, stratify=labels)
    images, y = torch.tensor(pixels).to(torch.uint8).reshape(-1, 1, 8, 8), torch.tensor(labels)
    sets = (Images(images[rows], y[rows], 16, GRAY) for rows in (train, test))
    return Data("digits", *sets, [str(digit) for digit in range(10)], (1, 8, 8))


def names(length: int = 32) -> Data:
    """Names of countries, languages and currencies, and the language they are written in; tokens are bytes."""
    rows = [line.split("\t") for line in (HERE / "names.tsv").read_text(encoding="utf-8").splitlines()]
    classes = sorted({language for language, _ in rows})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = _padded(([1 + byte for byte in rows[i][1].encode()] for i in order), length)
    labels = torch.tensor([classes.index(rows[i][0]) for i in order])
    test = len(rows) // 6
    sets = (Texts(tokens[rows], labels[rows]) for rows in (slice(test, None), slice(0, test)))
    return Data("names", *sets, classes, (length,), 257)


def idx_images(name: str, classes: list[str], folder: Path) -> Data:
    """MNIST and sets in its format: four files ``train-images-idx3-ubyte`` and so on, or these with ``.gz``."""
    sets = []
    for part in ("train", "t10k"):
        pixels = read_idx(_find(folder, f"{part}-images-idx3-ubyte", f"{part}-images.idx3-ubyte"), 3)
        labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte", f"{part}-labels.idx1-ubyte"), 1)
        sets.append(Images(pixels.unsqueeze(1), labels, 255, GRAY))
    return Data(name, *sets, classes, tuple(sets[0].pixels.shape[1:]))


def read_idx(path: Path, axes: int) -> Tensor:
    """A file of unsigned bytes in the IDX format: magic number, sizes, values."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    head = 4 * (1 + axes)
    if len(content) < head or content[:4] != bytes([0, 0, 8, axes]):
        raise DataError(f"{path} does not begin as an IDX file of bytes with {axes} axes does")
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, axes + 1)]
    values = np.frombuffer(content, np.uint8, offset=head)
    if values.size != np.prod(shape):
        raise DataError(f"{path} should hold {np.prod(shape)} values for {shape}, and holds {values.size}")
    return torch.from_numpy(values.reshape(shape).copy())


def cifar(hundred: bool, folder: Path) -> Data:
    """CIFAR-10 or CIFAR-100, in the version for Python or the binary one."""
    number = 100 if hundred else 10
    key, meta = ("fine_labels", "fine_label_names") if hundred else ("labels", "label_names")
    parts = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    places = [folder, folder / f"cifar-{number}-python", folder / f"cifar-{number}-binary"]
    places += [folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"] if not hundred else []
    for place in places:
        if all((place / part).is_file() for part in parts):
            read = [_cifar_python(place / part, key) for part in parts]
            described = place / ("meta" if hundred else "batches.meta")
            classes = (
                [str(name, "utf-8") for name in _unpickled(described)[meta.encode()]] if described.exists() else []
            )
            break
        if all((place / f"{part}.bin").is_file() for part in parts):
            read = [_cifar_binary(place / f"{part}.bin", 2 if hundred else 1) for part in parts]
            described = place / ("fine_label_names.txt" if hundred else "batches.meta.txt")
            classes = described.read_text(encoding="utf-8").split() if described.exists() else []
            break
    else:
        beside = ", ".join(place.name for place in places[1:])
        beside = ", ".join(place.name for place in places[1:])
        raise DataError(
            f"there is no CIFAR-{number} in {folder}: looked for {parts[0]} to {parts[-1]}, with .bin or without, "
            f"there and in {beside}. Unpack the published archive there, or pass --download"
        )
    *train, test = read
    sets = (
        Images(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group]), 255, COLOUR)
        for group in (train, [test])
    )
    return Data(f"cifar{number}", *sets, classes or [str(i) for i in range(number)], (3, 32, 32))


def _cifar_python(path: Path, key: str) -> tuple[Tensor, Tensor]:
    content = _unpickled(path)
    if not isinstance(content, dict) or not {b"data", key.encode()} <= content.keys():
        raise DataError(f"{path} has no entries `data` and `{key}`")
    pixels = np.asarray(content[b"data"], np.uint8)
    if pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise DataError(f"{path} has images of shape {pixels.shape[1:]}, not of 3 x 32 x 32 bytes")
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.tensor(content[key.encode()])


def _cifar_binary(path: Path, labels: int) -> tuple[Tensor, Tensor]:
    values = np.fromfile(path, np.uint8)
    if values.size == 0 or values.size % (labels + 3072):
        raise DataError(f"{path} has {values.size} bytes, which is no multiple of {labels} + 3 x 32 x 32")
    rows = torch.from_numpy(values).view(-1, labels + 3072)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return getattr(importlib.import_module(module), name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        raise DataError(f"the file wants to load {module}.{name}, which is no part of an array")


def _unpickled(path: Path) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path} is refused: {error}") from None
    except Exception as error:  # whatever a broken pickle raises
        raise DataError(f"{path} is no pickled batch of CIFAR: {type(error).__name__}: {error}") from error


def image_folder(size: int, folder: Path) -> Data:
    """Folders ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``, as of LSUN or ImageNet."""
    classes, (train, test) = _by_class(folder, PICTURES, "images")
    return Data("images", Files(train, size), Files(test, size), classes, (3, size, size))


def text_folder(length: int, vocabulary: int, folder: Path) -> Data:
    """Folders ``train/CLASS/*.txt`` and ``test/CLASS/*.txt``, as of IMDB's reviews; tokens are hashed words."""
    folder = folder / "aclImdb" if (folder / "aclImdb").is_dir() else folder
    classes, parts = _by_class(folder, {".txt"}, "texts")
    sets = []
    for files in parts:
        words = (_words(path.read_text(encoding="utf-8", errors="replace"), vocabulary) for path, _ in files)
        shown = tqdm(words, desc="reading", total=len(files), unit="text", leave=False, disable=None)
        sets.append(Texts(_padded(shown, length), torch.tensor([label for _, label in files])))
    return Data("texts", *sets, classes, (length,), vocabulary)


def _by_class(folder: Path, suffixes: set[str], what: str) -> tuple[list[str], list[list[tuple[Path, int]]]]:
    """The files of each part with the number of their class; classes are the folders in ``train`` that hold any."""
    found: list[dict[str, list[Path]]] = []
    for names in (("train",), ("test", "val")):
        place = next((folder / name for name in names if (folder / name).is_dir()), None)
        if place is None:
            raise DataError(f"{folder} has no folder `{names[0]}` with a folder of {what} for each class")
        classes = (entry for entry in sorted(place.iterdir()) if entry.is_dir() and entry.name != "unsup")
        files = {c.name: sorted(f for f in c.rglob("*") if f.suffix.lower() in suffixes) for c in classes}
        found.append({name: of_class for name, of_class in files.items() if of_class})
        if not found[-1]:
            raise DataError(f"{place} has no folder with {what} ({', '.join(sorted(suffixes))})")
    train, test = found
    if strange := sorted(test.keys() - train.keys()):
        raise DataError(f"class {strange[0]!r} of {folder} is in the test and not in the training set")
    labels = {name: i for i, name in enumerate(train)}
    return list(train), [[(f, labels[name]) for name in part for f in part[name]] for part in found]


def _words(text: str, vocabulary: int) -> list[int]:
    """Numbers from 1 to vocabulary - 1; a table of the words that occur would be made from private data."""
    words = re.findall(r"[\w']+|[.,!?]", re.sub(r"<br\s*/?>", " ", text.lower()))
    return [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words]


def _padded(texts: Iterable[list[int]], length: int) -> Tensor:
    """``[N, T]``; what is longer is cut."""
    rows = [(text[:length] + [0] * (length - len(text))) for text in texts]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, length)


def _find(folder: Path, *names: str) -> Path:
    places = [folder, *(folder / kind / "raw" for kind in ("MNIST", "FashionMNIST"))]
    for place in places:
        for name in (*names, *(f"{name}.gz" for name in names)):
            if (place / name).is_file():
                return place / name
    raise DataError(f"there is no {names[0]} (or .gz) in {folder}. Put the published files there, or pass --download")


def _download(name: str, folder: Path) -> None:
    """Have torchvision fetch a set."""
    kind = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}.get(name)
    if kind is None:
        raise DataError(f"--download does not know {name}; it can fetch mnist, fashion-mnist, cifar10 and cifar100")
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise DataError(f"--download needs torchvision, which cannot be imported: {error}") from error
    try:
        for train in (True, False):
            getattr(datasets, kind)(str(folder), train=train, download=True)
    except Exception as error:  # torchvision raises what its connection raises
        raise DataError(f"torchvision could not download {kind}: {' '.join(str(error).split())}") from error


CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
ALIASES = {"fmnist": "fashion-mnist", "lsun": "images", "imdb": "texts"}
BUNDLED: dict[str, Callable[[], Data]] = {"digits": digits, "names": names}
NAMES = [*BUNDLED, "mnist", "fashion-mnist", "cifar10", "cifar100", "images", "texts"]


def load_data(
    name: str,
    folder: Path | None = None,
    *,
    download: bool = False,
    image_size: int = 64,
    length: int = 256,
    vocabulary: int = 10000,
) -> Data:
    """The set of a name of the command line.

    Args:
        name: One of `NAMES` or `ALIASES`.
        folder: Where the files are, for all that is not bundled.
        download: Whether to let torchvision fetch it first.
        image_size: Of images that are read from folders.
        length: Number of tokens of a text that is read from a folder.
        vocabulary: Number of different tokens of these.

    Returns:
        Training and test set.

    Raises:
        DataError: If there are no such data.
    """
    name = ALIASES.get(name, name)
    if name in BUNDLED:
        return BUNDLED[name]()
    if folder is None:
        raise DataError(f"--data {name} is read from files: say where with --data-dir FOLDER")
    if download:
        _download(name, folder)
    if not folder.is_dir():
        raise DataError(f"--data-dir {folder} is no folder")
    readers: dict[str, Callable[[Path], Data]] = {
        "mnist": partial(idx_images, name, [str(digit) for digit in range(10)]),
        "fashion-mnist": partial(idx_images, name, CLOTHES),
        "cifar10": partial(cifar, False),
        "cifar100": partial(cifar, True),
        "images": partial(image_folder, image_size),
        "texts": partial(text_folder, length, vocabulary),
    }
    return readers[name](folder)
