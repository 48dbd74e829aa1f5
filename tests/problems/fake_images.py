"""Image sets of a few made-up images, written in the formats of the real ones."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from map_bo.problems.zoo.image_sets import IMAGE_SETS


def patterns(n: int, side: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return ``n`` noisy images of ten patterns that differ with the seed, and their classes."""
    generator = np.random.default_rng(seed)
    middles = generator.integers(0, 200, (10, side, side))
    labels = generator.permutation(np.arange(n) % 10)
    images = middles[labels] + generator.integers(0, 56, (n, side, side))
    return images.astype(np.uint8), labels


def idx(values: NDArray[Any]) -> bytes:
    """Return a gzipped idx file of bytes."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">i4").tobytes()
    return gzip.compress(header + values.astype(np.uint8).tobytes(), compresslevel=1)


def write_images(root: Path, *, train: int = 60, test: int = 40) -> Path:
    """Write all four sets, so many images each, into ``root``."""
    for seed, name in enumerate(IMAGE_SETS):
        folder = root / name
        folder.mkdir(parents=True)
        if name == "usps":
            images, labels = patterns(train + test, 16, seed)
            grey = (images.astype(np.int16) * 2000 // 255).astype(np.int16)
            np.savez(
                folder / "usps.npz",
                train_x2000=grey[:train],
                train_labels=labels[:train],
                test_x2000=grey[train:],
                test_labels=labels[train:],
            )
            continue
        total = 5 * max(test, -(-train // 4)) if name == "notmnist" else train + test
        images, labels = patterns(total, 28, seed)
        parts = (
            {"t10k": slice(None)}
            if name == "notmnist"
            else {
                "train": slice(None, train),
                "t10k": slice(train, None),
            }
        )
        for part, rows in parts.items():
            (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images[rows]))
            (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels[rows]))
    return root
