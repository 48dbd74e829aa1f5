from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from map_bo.errors import DataError
from map_bo.evaluators.data import Data
from map_bo.problems.zoo.image_sets import IMAGE_SETS, image_folder, load_image_set, read_image_set
from tests.problems.fake_images import idx, patterns, write_images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


# --- the folder


def test_the_folder_comes_from_the_argument_or_the_environment(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAP_BO_DATA", str(tmp_path))
    assert image_folder() == tmp_path
    assert image_folder(root) == root
    (tmp_path / "images" / "usps").mkdir(parents=True)
    assert image_folder() == tmp_path / "images"


def test_no_folder_and_a_missing_folder_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAP_BO_DATA", raising=False)
    for given, message in ((None, "no folder of image sets"), (tmp_path / "no", "there is no")):
        with pytest.raises(DataError, match=message) as caught:
            image_folder(given)
        assert caught.value.hint is not None
        assert "problem.root=" in caught.value.hint
        assert "MAP_BO_DATA" in caught.value.hint


def test_unknown_sets_and_missing_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image set 'cifar'") as caught:
        load_image_set("cifar", tmp_path)
    assert caught.value.hint == f"image sets are {', '.join(IMAGE_SETS)}"
    for name in IMAGE_SETS:
        with pytest.raises(DataError, match=f"no file .*{name}") as caught:
            load_image_set(name, tmp_path)
        assert caught.value.hint is not None
        assert "problem.root" in caught.value.hint


# --- the sets


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_sets_are_read_as_they_were_written(name: str, root: Path) -> None:
    data = load_image_set(name, root)
    assert data.name == name
    assert data.train.dtype == data.test.dtype == np.uint8
    assert data.train.shape[1:] == data.test.shape[1:] == (28, 28)
    assert len(data.train) == len(data.train_labels) > len(data.test) == len(data.test_labels)
    assert set(data.train_labels) | set(data.test_labels) == set(range(10))
    assert data.dropped == 0


def test_the_bytes_are_those_of_the_file(root: Path) -> None:
    images, labels = patterns(100, 28, 0)
    data = load_image_set("mnist", root)
    np.testing.assert_array_equal(np.concatenate([data.train, data.test]), images)
    np.testing.assert_array_equal(np.concatenate([data.train_labels, data.test_labels]), labels)


def test_every_fifth_row_of_notmnist_is_for_testing(root: Path) -> None:
    images, _ = patterns(200, 28, IMAGE_SETS.index("notmnist"))
    data = load_image_set("notmnist", root)
    np.testing.assert_array_equal(data.test, images[4::5])
    assert len(data.train) == 160


def test_usps_is_enlarged_and_keeps_its_greys(tmp_path: Path) -> None:
    (tmp_path / "usps").mkdir()
    grey = np.zeros((10, 16, 16), dtype=np.int16)
    grey[:, :, 8:] = 2000
    labels = np.arange(10)
    arrays = {"train_x2000": grey, "train_labels": labels, "test_labels": labels}
    np.savez(tmp_path / "usps" / "usps.npz", **arrays, test_x2000=grey * 2 // 5)  # type: ignore[arg-type]
    data = load_image_set("usps", tmp_path)
    assert bool((data.train[:, :, :13] == 0).all())
    assert bool((data.train[:, :, 15:] == 255).all())
    assert bool((data.test[:, :, 15:] == 102).all())


def test_training_images_are_dropped_from_the_test_part(tmp_path: Path) -> None:
    write_images(tmp_path)
    images, labels = patterns(100, 28, 0)
    images[70] = images[3]
    images[99] = images[0]
    folder = tmp_path / "mnist"
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(idx(images[60:]))
    data = load_image_set("mnist", tmp_path)
    assert (data.dropped, len(data.test)) == (2, 38)
    np.testing.assert_array_equal(data.test_labels, np.delete(labels[60:], [10, 39]))


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "another kind", "fewer labels", "labels"]
)
def test_damaged_files_are_told(damage: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    images = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    labels = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    match damage:
        case "truncated":
            images.write_bytes(images.read_bytes()[:-500])
        case "garbage":
            images.write_bytes(b"no gzip")
        case "another kind":
            images.write_bytes(gzip.compress(b"\x00\x00\x0d\x03" + bytes(12)))
        case "fewer labels":
            labels.write_bytes(idx(np.zeros(59)))
        case _:
            labels.write_bytes(idx(np.full(60, 10)))
    with pytest.raises(DataError, match=r"cannot be read|holds images of shape") as caught:
        load_image_set("mnist", tmp_path)
    assert caught.value.hint is not None


@pytest.mark.parametrize("damage", ["garbage", "another array"])
def test_a_damaged_usps_file_is_told(damage: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "usps" / "usps.npz"
    if damage == "garbage":
        path.write_bytes(path.read_bytes()[:200])
    else:
        np.savez(path, pictures=np.zeros(3))
    with pytest.raises(DataError, match="cannot be read"):
        load_image_set("usps", tmp_path)


# --- the real ones


def real_images() -> Path | None:
    beside = Path(__file__).resolve().parents[4] / "shared" / "data" / "images"
    folder = Path(os.environ.get("MAP_BO_DATA", beside))
    return folder if folder.is_dir() else None


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "test", "dropped"),
    [
        ("mnist", 60000, 10000, 0),
        ("fashion_mnist", 60000, 10000, 0),
        ("notmnist", 8000, 1966, 34),
        ("usps", 7291, 2007, 0),
    ],
)
def test_the_real_sets_have_their_known_sizes(
    name: str, train: int, test: int, dropped: int
) -> None:
    folder = real_images()
    if folder is None:
        pytest.skip("no image sets: set MAP_BO_DATA to their folder")
    data = load_image_set(name, folder)
    assert (len(data.train), len(data.test), data.dropped) == (train, test, dropped)


# --- sets of the user's own


def as_files(root: Path, folder: Path) -> Path:
    """Write the first images of mnist as files, one folder per class, split in two."""
    data = load_image_set("mnist", root)
    parts = (("train", data.train, data.train_labels), ("test", data.test, data.test_labels))
    for part, images, labels in parts:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / part / f"digit_{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:03}.png")
    return folder


def test_a_set_of_files_is_that_of_the_idx_files(root: Path, tmp_path: Path) -> None:
    folder = as_files(root, tmp_path)
    train, test = (Data(path=str(folder), split=part) for part in ("train", "test"))
    read, known = read_image_set("mine", train, test), load_image_set("mnist", root)
    assert read.name == "mine"
    for own, there in ((read.train, known.train), (read.test, known.test)):
        assert own.dtype == np.uint8
        order = np.lexsort(own.reshape(len(own), -1).T), np.lexsort(there.reshape(len(own), -1).T)
        np.testing.assert_array_equal(own[order[0]], there[order[1]])
    assert sorted(read.train_labels) == sorted(known.train_labels)


def test_idx_files_are_read_by_a_data_block(root: Path) -> None:
    train, test = (Data(path=str(root / "mnist"), split=part) for part in ("train", "t10k"))
    read, known = read_image_set("mine", train, test), load_image_set("mnist", root)
    np.testing.assert_array_equal(read.train, known.train)
    np.testing.assert_array_equal(read.test_labels, known.test_labels)


def test_sets_that_do_not_fit_the_zoo_are_refused(root: Path, tmp_path: Path) -> None:
    train = Data(path=str(root / "mnist"), split="train")
    many = Data(path=str(root / "mnist"), split="t10k", labels={str(i): i + 3 for i in range(10)})
    with pytest.raises(DataError, match="has the class 12"):
        read_image_set("mine", train, many)
    named = Data(path=str(as_files(root, tmp_path / "files")), split="test")
    with pytest.raises(DataError, match="have other names"):
        read_image_set("mine", train, named)
    with pytest.raises(DataError, match="image set 'mine': there is no file"):
        read_image_set("mine", train, Data(path=str(tmp_path / "nothing")))
    np.savez(tmp_path / "set.npz", image=np.zeros((3, 2), np.float32), label=np.arange(3))
    with pytest.raises(DataError, match="which are not images"):
        read_image_set("mine", Data(path=str(tmp_path / "set.npz")), train)
