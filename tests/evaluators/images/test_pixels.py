from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.data import Data
from map_bo.evaluators.images import pixels as module
from map_bo.evaluators.images.pixels import Pixels, Resize, Steps, find_steps, read_pixels
from tests.evaluators.images.tiny import picture, write_images, write_processor


def read(data: Data, processor: str | Resize | None = None, **settings: Any) -> Pixels:
    examples = data.read(("image",))
    return read_pixels(examples, find_steps(processor), folder=Path(data.path).parent, **settings)


def folder_of(tmp_path: Path, *images: Any, ending: str = "png") -> Data:
    folder = tmp_path / "set" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i}.{ending}")
    return Data(path=str(tmp_path / "set"))


def of(image: Any, **settings: Any) -> Tensor:
    return Resize(**settings)([image])[0]


@pytest.mark.parametrize("size", [(14, 10), (9, 30), (8, 8), (31, 8)])
def test_numbers_are_those_of_the_processor_of_clip(tmp_path: Path, size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    steps = find_steps(write_processor(tmp_path))
    assert steps is not None
    image = picture((10, 100, 200), 0, size)
    wanted = steps.make([image])[0]
    found = of(image, size=8, mean=[0.5, 0.4, 0.3], std=[0.5, 0.25, 0.5])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_images_are_squashed_or_cut() -> None:
    image = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(2, 0) * 30)
    cut = of(image, size=2, grey=True)
    assert torch.equal(cut, torch.tensor([[[90.0, 120.0], [90.0, 120.0]]]) / 255)
    squashed = of(image, size=2, grey=True, fit="squash", resample="bilinear")
    assert squashed.shape == (1, 2, 2)
    assert float(squashed[0, 0, 0]) < float(cut[0, 0, 0])
    assert of(image, size=(2, 4), grey=True, flat=True).shape == (8,)
    assert of(image, grey=True, fit="none").shape == (1, 2, 8)


def test_an_odd_margin_is_rounded_as_told() -> None:
    image = Image.fromarray(np.arange(5, dtype=np.uint8)[None].repeat(2, 0) * 30)
    assert of(image, size=2, grey=True)[0, 0].mul(255 / 30).round().tolist() == [1, 2]
    wide = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(3, 0) * 30)
    assert of(wide, size=3, grey=True)[0, 0].mul(255 / 30).round().tolist() == [2, 3, 4]
    even = of(wide, size=3, grey=True, halves="even")
    assert even[0, 0].mul(255 / 30).round().tolist() == [2, 3, 4]
    longer = Image.fromarray(np.arange(10, dtype=np.uint8)[None].repeat(3, 0) * 20)
    assert of(longer, size=3, grey=True)[0, 0].mul(255 / 20).round().tolist() == [3, 4, 5]
    even = of(longer, size=3, grey=True, halves="even")
    assert even[0, 0].mul(255 / 20).round().tolist() == [4, 5, 6]


def test_mean_and_deviation_are_by_channel() -> None:
    image = Image.new("RGB", (2, 2), (255, 0, 51))
    found = of(image, size=2, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.1))
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (1, 2, 3)}, "size must be one number or"),
        ({"size": 0}, "size must be"),
        ({"fit": "crp"}, "fit must be one of"),
        ({"resample": "cubic"}, "resample must be one of"),
        ({"mean": [0.5, 0.5]}, "mean has 2 numbers"),
        ({"std": 0.0}, "std must be"),
        ({"grey": True, "std": [1.0, 1.0, 1.0]}, "std has 3 numbers, and an image 1 channels"),
        ({"flat": "no"}, "flat must be true or false"),
    ],
)
def test_settings_that_are_not_possible(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Resize(**settings)


def test_images_of_all_modes_come_out_alike(tmp_path: Path) -> None:
    colour = Image.new("RGB", (4, 4), (204, 204, 204))  # of the web palette
    sixteen = Image.fromarray(np.full((4, 4), 204 * 257, dtype=np.uint16))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    modes = [colour, *(colour.convert(mode) for mode in ("L", "P", "LA", "RGBA")), sixteen, clear]
    found = read(folder_of(tmp_path, *modes), Resize(size=4)).values * 255
    assert found.shape == (7, 3, 4, 4)
    torch.testing.assert_close(found[:6], torch.full((6, 3, 4, 4), 204.0), rtol=0, atol=1)
    assert found[6].min() == 255  # what is transparent is white
    assert of(colour.convert("CMYK").convert("RGB"), size=4).shape == (3, 4, 4)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    about = image.getexif()
    about[0x0112] = 6  # turned by a quarter
    content = io.BytesIO()
    image.save(content, "PNG", exif=about)
    (tmp_path / "set" / "one").mkdir(parents=True)
    (tmp_path / "set" / "one" / "a.png").write_bytes(content.getvalue())
    data = Data(path=str(tmp_path / "set"))
    found = read(data, Resize(fit="none", grey=True)).values
    assert found[0, 0].tolist() == [[0.0], [1.0]]


def test_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
    np.savez(tmp_path / "set.npz", image=numbers)
    data = Data(path=str(tmp_path / "set.npz"))
    assert torch.equal(read(data).values, torch.from_numpy(numbers))
    assert torch.equal(read(data, Resize(size=4)).values, torch.from_numpy(numbers))


def test_arrays_of_bytes_are_images(tmp_path: Path) -> None:
    numbers = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    wanted = torch.from_numpy(numbers).permute(0, 3, 1, 2).float() / 255
    for name, array in (("last", numbers), ("first", numbers.transpose(0, 3, 1, 2))):
        np.savez(tmp_path / f"{name}.npz", image=array)
        data = Data(path=str(tmp_path / f"{name}.npz"))
        torch.testing.assert_close(read(data).values, wanted)
        torch.testing.assert_close(read(data, Resize(fit="none")).values, wanted)
    np.savez(tmp_path / "grey.npz", image=numbers[..., 0])
    found = read(Data(path=str(tmp_path / "grey.npz"))).values
    torch.testing.assert_close(found, wanted[:, :1])


def test_paths_in_a_table_are_relative_to_it(tmp_path: Path) -> None:
    picture((9, 9, 9), 0).save(tmp_path / "a.png")
    (tmp_path / "set.csv").write_text("image,label\na.png,1\na.png,0\n")
    found = read(Data(path=str(tmp_path / "set.csv")), Resize(size=4)).values
    assert found.shape == (2, 3, 4, 4)
    (tmp_path / "set.csv").write_text("image,label\nb.png,1\n")
    with pytest.raises(EvaluationError, match=r"no image .*b\.png"):
        read(Data(path=str(tmp_path / "set.csv")), Resize(size=4))


def test_images_that_a_table_names_are_told_apart_by_what_they_show(tmp_path: Path) -> None:
    tables = []
    for name, grey in (("first", 10), ("second", 200)):
        (tmp_path / name).mkdir()
        picture((9, 9, 9), grey).save(tmp_path / name / "a.png")
        tables.append(Data(path=str(tmp_path / name / "set.csv")))
        Path(tables[-1].path).write_text("image\na.png\n")
    first, second = (read(table, Resize(size=4)) for table in tables)
    assert first.digest != second.digest
    assert not torch.equal(first.values, second.values)
    (tmp_path / "second" / "a.png").rename(tmp_path / "first" / "a.png")
    again = read(tables[0], Resize(size=4))
    assert torch.equal(again.values, second.values)


def test_images_are_prepared_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def make(images: Sequence[Any]) -> Tensor:
        calls.append(len(images))
        return torch.zeros(len(images), 3)

    examples = Data(path=write_images(tmp_path / "set")).read(("image",))
    steps = Steps(make, "zeros")
    first = read_pixels(examples, steps, folder=tmp_path)
    assert read_pixels(examples, steps, folder=tmp_path) is first
    assert calls == [12]
    other = read_pixels(examples, Steps(make, "others"), folder=tmp_path)
    assert other.digest != first.digest


def test_many_images_are_mapped_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(path=write_images(tmp_path / "set"))
    wanted = read(data, Resize(size=4)).values.clone()
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    monkeypatch.setattr(module, "_CHUNK", 5)
    found = read(data, Resize(size=4, mean=0.0), cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "pixels").iterdir()
    assert torch.equal(found.values, wanted)
    assert np.load(file).shape == (12, 3, 4, 4)
    sent = pickle.dumps(found)
    assert len(sent) < 1000  # other processes map it too
    assert torch.equal(pickle.loads(sent).values, wanted)
    del found
    before = file.stat().st_mtime_ns
    read(data, Resize(size=4, mean=0.0), cache_dir=tmp_path / "cache")
    assert file.stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(path=write_images(tmp_path / "set"))
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(EvaluationError, match="images cannot be kept in"):
        read(data, Resize(size=4), cache_dir=tmp_path / "cache")


def test_an_open_clip_folder_says_how(tmp_path: Path) -> None:
    about = {
        "model_cfg": {"vision_cfg": {"image_size": 6}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    steps = find_steps(str(tmp_path))
    assert steps is not None
    assert steps.make == Resize(size=6, fit="squash", mean=[0.1, 0.2, 0.3], halves="even")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(EvaluationError, match="does not say how images are prepared"):
        find_steps(str(tmp_path))


def test_a_folder_that_says_nothing(tmp_path: Path) -> None:
    assert find_steps(str(tmp_path)) is None
    with pytest.raises(EvaluationError, match="no folder"):
        find_steps(str(tmp_path / "nothing"))


def test_a_damaged_processor_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        find_steps(str(tmp_path))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    data = folder_of(tmp_path, picture((9, 9, 9), 0))
    (tmp_path / "set" / "one" / "1.png").write_bytes(b"not an image")
    with pytest.raises(EvaluationError, match=r"1\.png cannot be read as an image"):
        read(data, Resize(size=4))
    whole = (tmp_path / "set" / "one" / "0.png").read_bytes()
    (tmp_path / "set" / "one" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvaluationError, match=r"1\.png cannot be read as an image"):
        read(data, Resize(size=4))


def test_images_of_several_shapes_are_refused(tmp_path: Path) -> None:
    data = folder_of(tmp_path, picture((9, 9, 9), 0, (4, 4)), picture((9, 9, 9), 0, (5, 4)))
    with pytest.raises(EvaluationError, match="cannot be prepared") as found:
        read(data, Resize(fit="none"))
    assert "from (4, 4) to (5, 4)" in (found.value.hint or "")
    with pytest.raises(EvaluationError, match="nothing says how the images are prepared"):
        read(data)
