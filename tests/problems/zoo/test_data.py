from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from map_bo.errors import DataError
from map_bo.problems.zoo.data import TRANSFORM_NAMES, digits_split, transform, transform_names


def test_the_first_four_tasks_are_those_of_the_method() -> None:
    assert transform_names(4) == ("rot90", "invert", "flip", "permute")
    assert len(set(transform_names(32))) == 32


@pytest.mark.parametrize("experts", [1, 33, -2, True, 2.0, "4"])
def test_refuses_numbers_of_experts_that_there_are_not(experts: Any) -> None:
    with pytest.raises(DataError, match="experts must be a whole number from 2 to") as caught:
        transform_names(experts)
    assert caught.value.hint == "give a whole number from 2 to 32"


def test_every_transform_differs_from_the_others_and_loses_nothing() -> None:
    _, _, images, _ = digits_split()
    seen = [images, *(transform(name, images) for name in TRANSFORM_NAMES)]
    distinct = len(np.unique(images.reshape(-1, 64), axis=0))
    for i, changed in enumerate(seen):
        assert changed.shape == images.shape
        assert changed.dtype == np.float32
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert len(np.unique(changed.reshape(-1, 64), axis=0)) == distinct
        for other in seen[:i]:
            assert np.abs(changed - other).mean() > 0.05


def test_transforms_are_what_their_names_say() -> None:
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    assert np.array_equal(transform("flip", image)[0], image[0, :, ::-1])
    assert np.array_equal(transform("invert", image), 1 - image)
    assert np.array_equal(transform("rot180", image)[0], image[0, ::-1, ::-1])
    assert np.array_equal(transform("transpose", image)[0], image[0].T)
    assert transform("rot90", image)[0, 0, 0] == image[0, 0, 7]
    assert transform("roll", image)[0, 3, 4] == image[0, 0, 0]
    assert transform("quadrants", image)[0, 0, 4] == image[0, 0, 0]
    assert np.array_equal(transform("shear", image)[0, 2], np.roll(image[0, 2], -2))
    assert np.array_equal(np.sort(transform("permute", image).ravel()), image.ravel())


def test_refuses_an_unknown_transform() -> None:
    with pytest.raises(DataError, match="there is no digits task 'blur'"):
        transform("blur", np.zeros((1, 8, 8), dtype=np.float32))


def test_the_split_is_stratified_and_disjoint() -> None:
    train_images, train_labels, test_images, test_labels = digits_split()
    assert (len(train_images), len(test_images)) == (1000, 797)
    share = np.bincount(train_labels) / 1000 - np.bincount(test_labels) / 797
    assert np.abs(share).max() < 0.002
    both = np.concatenate([train_images, test_images]).reshape(-1, 64)
    assert len(np.unique(both, axis=0)) == 1797


def test_names_are_there_without_torch() -> None:
    code = (
        "import sys; from map_bo.problems.zoo.data import transform_names; "
        "print(transform_names(2), 'torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "('rot90', 'invert') False False", result.stderr
