"""The images of the digits zoo: scikit-learn's bundled digits and 32 ways to change them.

Each way is a task: a fixed, information-preserving transform of the 8 x 8 images, distinct from
the others, under which the labels stay what they were. An expert learns to read one of them.
This module imports neither torch nor scikit-learn at its top, so that a configuration can list
the names in no time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from map_bo.errors import DataError
from map_bo.values import whole_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Images = NDArray[np.float32]
    Labels = NDArray[np.int64]

__all__ = ["BASE_TASKS", "TRANSFORM_NAMES", "digits_split", "transform", "transform_names"]

TRANSFORM_NAMES = (
    "rot90",
    "invert",
    "flip",
    "permute",
    "rot180",
    "transpose",
    "roll",
    "rows",
    "checkerboard",
    "columns",
    "rot270",
    "stripes",
    "shear",
    "scatter",
    "quadrants",
    "halves",
    "upside",
    "antitranspose",
    "slide",
    "tiles",
    "triangle",
    "frame",
    "blocks",
    "comb",
    "lean",
    "mixture",
    "cross",
    "swap",
    "bands",
    "weave",
    "spiral",
    "fold",
)
"""Names of the tasks, in the order in which a zoo of ``N`` experts takes them."""

BASE_TASKS = TRANSFORM_NAMES[:16]
"""The tasks that every base has seen a little of; later ones are new to it."""

TEST_EXAMPLES = 797
_SPLIT_SEED = 0


def transform_names(experts: int) -> tuple[str, ...]:
    """Return the names of the first ``experts`` tasks.

    Raises:
        DataError: When ``experts`` is not from 2 to 32.
    """
    most = len(TRANSFORM_NAMES)
    return TRANSFORM_NAMES[: whole_number("experts", experts, least=2, most=most, error=DataError)]


def transform(name: str, images: Images) -> Images:
    """Return ``images`` (``n x 8 x 8`` in [0, 1]) as the task ``name`` shows them.

    Raises:
        DataError: When no task has this name.
    """
    import numpy as np

    changes = _changes()
    if name not in changes:
        raise DataError(
            f"there is no digits task {name!r}", hint=f"tasks are {', '.join(TRANSFORM_NAMES)}"
        )
    return np.ascontiguousarray(changes[name](images), dtype=np.float32)


def _changes() -> dict[str, Callable[[Images], Images]]:
    import numpy as np

    row, column = np.indices((8, 8))

    def shuffled(images: Images, seed: int) -> Images:
        order = np.random.default_rng(seed).permutation(64)
        return images.reshape(-1, 64)[:, order].reshape(-1, 8, 8)

    def inverted(images: Images, where: NDArray[np.bool_]) -> Images:
        return np.where(where, 1 - images, images)

    def reordered(images: Images, at: tuple[NDArray[np.int_], NDArray[np.int_]]) -> Images:
        return images[:, at[0], at[1]]

    def quadrants(images: Images) -> Images:
        # Clockwise, so that it differs from every roll.
        a, b = images[:, :4, :4], images[:, :4, 4:]
        c, d = images[:, 4:, :4], images[:, 4:, 4:]
        return np.concatenate([np.concatenate([c, a], 2), np.concatenate([d, b], 2)], 1)

    return {
        "rot90": lambda images: np.rot90(images, 1, (1, 2)),
        "invert": lambda images: 1 - images,
        "flip": lambda images: images[:, :, ::-1],
        "permute": lambda images: shuffled(images, 1),
        "rot180": lambda images: np.rot90(images, 2, (1, 2)),
        "transpose": lambda images: images.transpose(0, 2, 1),
        "roll": lambda images: np.roll(images, (3, 4), (1, 2)),
        "rows": lambda images: images[:, np.random.default_rng(2).permutation(8)],
        "checkerboard": lambda images: inverted(images, (row + column) % 2 == 0),
        "columns": lambda images: images[:, :, np.random.default_rng(3).permutation(8)],
        "rot270": lambda images: np.rot90(images, 3, (1, 2)),
        "stripes": lambda images: inverted(images, row % 2 == 0),
        "shear": lambda images: images[:, row, (column + row) % 8],
        "scatter": lambda images: shuffled(images, 4),
        "quadrants": quadrants,
        "halves": lambda images: inverted(images, column < 4),
        "upside": lambda images: images[:, ::-1],
        "antitranspose": lambda images: images[:, ::-1, ::-1].transpose(0, 2, 1),
        "slide": lambda images: np.roll(images, (0, 4), (1, 2)),
        "tiles": lambda images: reordered(
            images, (row // 2 * 2 + column // 4, column % 4 * 2 + row % 2)
        ),
        "triangle": lambda images: inverted(images, row < column),
        "frame": lambda images: inverted(images, np.maximum(abs(row - 3.5), abs(column - 3.5)) > 2),
        "blocks": lambda images: inverted(images, (row // 2 + column // 2) % 2 == 0),
        "comb": lambda images: inverted(images, column % 2 == 0),
        "lean": lambda images: images[:, (row + column) % 8, column],
        "mixture": lambda images: shuffled(images, 5),
        "cross": lambda images: inverted(images, (row // 2 % 3 == 1) ^ (column // 2 % 3 == 1)),
        "swap": lambda images: images[:, (row + 4) % 8, column[:, ::-1]],
        "bands": lambda images: inverted(images, (row + column) % 8 < 4),
        "weave": lambda images: images[:, row, (column * 3) % 8],
        "spiral": lambda images: images[:, (row * 3) % 8, (column * 5 + row) % 8],
        "fold": lambda images: shuffled(images, 6),
    }


@cache
def digits_split() -> tuple[Images, Labels, Images, Labels]:
    """Return 1000 training and 797 test images (``n x 8 x 8`` in [0, 1]) with their labels.

    The split is stratified and the same for everyone, whatever the training seed.
    """
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_EXAMPLES, stratify=labels, random_state=_SPLIT_SEED
    )
    return train, train_labels, test, test_labels
