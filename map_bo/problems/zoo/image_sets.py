"""Real image sets from a local folder: mnist, fashion_mnist, notmnist and usps.

The folder holds one folder a set, as they are published: gzipped idx files for the first three,
``usps.npz`` for the last. Nothing is downloaded. All sets have ten classes and come out as
28 x 28 grey images.
"""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from map_bo.errors import DataError, EvaluationError
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.images.pixels import Resize, find_steps, folder_of, read_pixels

__all__ = [
    "DATA_VARIABLE",
    "IMAGE_SETS",
    "ImageSet",
    "image_folder",
    "load_image_set",
    "read_image_set",
]

IMAGE_SETS = ("mnist", "fashion_mnist", "notmnist", "usps")
"""Names of the sets, in the order in which a zoo takes them."""

DATA_VARIABLE = "MAP_BO_DATA"

SIDE = 28
CLASSES = 10
_USPS_UNIT = 2000  # grey values are whole numbers from 0 to this
_IDX_BYTES = 8  # the idx code for unsigned bytes
_TEST_EVERY = 5  # notmnist comes in one part: the last row of every five is for testing

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One set, split.

    Attributes:
        name: One of ``IMAGE_SETS``, or that of a set of the user's own.
        train: ``n x 28 x 28`` grey images for training, 0 to 255.
        train_labels: ``n`` classes, 0 to 9.
        test: ``t x 28 x 28`` held-out images, none of which is, pixel by pixel, a training image.
        test_labels: ``t`` classes.
        dropped: How many held-out images were left out because they are training images too.
    """

    name: str
    train: Images
    train_labels: Labels
    test: Images
    test_labels: Labels
    dropped: int


def image_folder(root: str | Path | None = None) -> Path:
    """Return the folder of the image sets.

    Args:
        root: The folder itself, or one that has it as ``images``; otherwise the environment
            variable ``MAP_BO_DATA`` names one of the two.

    Raises:
        DataError: When none is given, or there is no such folder.
    """
    given = root or os.environ.get(DATA_VARIABLE)
    hint = (
        f"give the folder that holds {', '.join(IMAGE_SETS)}: problem.root=FOLDER, or the "
        f"environment variable {DATA_VARIABLE}; problem=digits needs no data"
    )
    if not given:
        raise DataError("no folder of image sets is given", hint=hint)
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} of image sets", hint=hint)
    inner = folder / "images"
    if not any((folder / name).is_dir() for name in IMAGE_SETS) and inner.is_dir():
        return inner
    return folder


def load_image_set(name: str, root: str | Path | None = None) -> ImageSet:
    """Read one set.

    The split is the published one; notmnist has none and gives every fifth row to testing. The
    16 x 16 images of usps are enlarged bilinearly.

    Args:
        name: One of ``IMAGE_SETS``.
        root: See :func:`image_folder`.

    Raises:
        DataError: When there is no such set, its files are not there, or they are damaged.
    """
    if name not in IMAGE_SETS:
        raise DataError(
            f"there is no image set {name!r}", hint=f"image sets are {', '.join(IMAGE_SETS)}"
        )
    folder = image_folder(root) / name
    if name == "usps":
        train, train_labels, test, test_labels = _usps(folder / "usps.npz")
    elif name == "notmnist":
        images, labels = _idx_pair(folder, "t10k")
        held = np.arange(len(images)) % _TEST_EVERY == _TEST_EVERY - 1
        train, train_labels, test, test_labels = (
            images[~held],
            labels[~held],
            images[held],
            labels[held],
        )
    else:
        train, train_labels = _idx_pair(folder, "train")
        test, test_labels = _idx_pair(folder, "t10k")
    return _split(name, (train, train_labels), (test, test_labels))


def read_image_set(name: str, train: Data, test: Data) -> ImageSet:
    """Read a set of the user's own by data blocks: any images of at most ten classes.

    They are scaled to 28 x 28 with their centre cut out, and made grey.

    Args:
        name: What to call it.
        train: The images for training, roles ``image`` and ``label``.
        test: The held-out images.

    Raises:
        DataError: When they cannot be read, have more than ten classes, or the classes of both
            parts have other names.
    """
    try:
        parts = [data.read(("image", "label")) for data in (train, test)]
        for part in parts:
            if max(part.classes()) >= CLASSES:
                raise DataError(
                    f"{part.where} has the class {max(part.classes())}, and heads of the image zoo "
                    f"tell {CLASSES} classes apart",
                    hint="leave classes out, or give them numbers from 0 to 9 with labels={...}",
                )
        if parts[0].label_names != parts[1].label_names:
            raise DataError(
                f"the classes of {parts[0].where} and of {parts[1].where} have other names",
                hint="give both the same label map: labels=[...]",
            )
        images = [_grey(data, part) for data, part in zip((train, test), parts, strict=True)]
    except EvaluationError as error:
        raise DataError(f"image set {name!r}: {error.message}", hint=error.hint) from error
    labels = [np.array(part.classes(), dtype=np.int64) for part in parts]
    return _split(name, (images[0], labels[0]), (images[1], labels[1]))


def _grey(data: Data, examples: Examples) -> Images:
    steps = find_steps(Resize(size=SIDE, grey=True))
    values = read_pixels(examples, steps, folder=folder_of(data)).values
    if values.shape[1:] != (1, SIDE, SIDE):
        raise DataError(
            f"{examples.where} holds arrays of {tuple(values.shape[1:])}, which are not images",
            hint="give files of images, or arrays of whole numbers from 0 to 255",
        )
    grey: Images = (values[:, 0] * 255).round().to(torch.uint8).numpy()
    return grey


def _split(name: str, train: tuple[Images, Labels], test: tuple[Images, Labels]) -> ImageSet:
    """Leave out held-out images that are training images too."""
    known = {image.tobytes() for image in train[0]}
    new = np.array([image.tobytes() not in known for image in test[0]], dtype=bool)
    return ImageSet(name, *train, test[0][new], test[1][new], int((~new).sum()))


def _idx_pair(folder: Path, part: str) -> tuple[Images, Labels]:
    images = _idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
    labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    return _check(images, labels, folder)


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read one gzipped idx file of bytes: a magic number, the sizes, the values."""

    def read() -> NDArray[np.uint8]:
        with gzip.open(path) as file:
            content = file.read()
        header = 4 + 4 * dimensions
        if content[:4] != bytes((0, 0, _IDX_BYTES, dimensions)) or len(content) < header:
            raise ValueError(f"no idx file of bytes in {dimensions} dimensions")
        shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">i4"))
        return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)

    return _reading(path, read)


def _usps(path: Path) -> tuple[Images, Labels, Images, Labels]:
    def read() -> tuple[Images, Labels, Images, Labels]:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            parts = [
                _check(_enlarge(file[f"{part}_x2000"]), file[f"{part}_labels"], path.parent)
                for part in ("train", "test")
            ]
        return *parts[0], *parts[1]

    return _reading(path, read)


def _enlarge(images: NDArray[np.int16]) -> Images:
    values = torch.from_numpy(images.astype(np.float32) / _USPS_UNIT).unsqueeze(1)
    large = F.interpolate(values, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    result: Images = (large[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return result


def _check(
    images: NDArray[np.uint8], labels: NDArray[np.integer], folder: Path
) -> tuple[Images, Labels]:
    classes = labels.astype(np.int64)
    if images.shape != (len(classes), SIDE, SIDE) or not np.isin(classes, range(10)).all():
        raise DataError(
            f"{folder} holds images of shape {images.shape} and {len(classes)} labels",
            hint=f"images are n x {SIDE} x {SIDE}, with one label from 0 to 9 each",
        )
    return images, classes


def _reading(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except FileNotFoundError as error:
        raise DataError(
            f"the image set has no file {path}",
            hint=f"problem.root (or {DATA_VARIABLE}) is the folder that holds "
            f"{', '.join(IMAGE_SETS)}; leave a set out with problem.sets=[...]",
        ) from error
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read: {error or type(error).__name__}",
            hint="it is damaged or of another format; fetch it again",
        ) from error
