from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.images.classification import ImageClassification
from map_bo.evaluators.images.pixels import Resize
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.images.tiny import SIDE, clip, draw, vit, write_images, write_processor

RESIZE = {"size": SIDE, "mean": 0.5, "std": 0.25}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    write_images(folder / "images")
    write_images(folder / "train", each=8)
    write_processor(folder / "model", kind="ViT")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAP_BO_CACHE", str(tmp_path / "cache"))


class Convolutions(nn.Module):
    """An encoder that returns maps, or a classifier on them."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, classes) if classes else None
        draw(self, 0)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.maps(images).tanh()
        return maps if self.head is None else self.head(maps.mean((-2, -1)))


def ready(model: nn.Module, place: Path, **settings: Any) -> ImageClassification:
    made = ImageClassification(**{"data": str(place / "images"), "processor": RESIZE} | settings)
    made.prepare(model)
    return made


class TestOwnHead(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, place: Path) -> ExampleEvaluator:
        return ImageClassification(
            data=str(place / "images"), processor=str(place / "model"), batch_size=5
        )

    @pytest.fixture
    def model(self) -> nn.Module:
        model: nn.Module = vit()
        return model


class TestFittedHead(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, place: Path) -> ExampleEvaluator:
        return ImageClassification(
            data=str(place / "images"),
            processor=RESIZE,
            head="fit",
            train=str(place / "train"),
            metrics=("accuracy", "loss", "probability"),
            batch_size=5,
        )

    @pytest.fixture
    def model(self) -> nn.Module:
        return Convolutions()


def test_a_classifier_of_transformers_gets_what_its_folder_says(place: Path) -> None:
    import transformers
    from PIL import Image

    model = vit()
    made = ready(model, place, processor=str(place / "model"), metrics="loss")
    processors: Any = transformers.AutoImageProcessor
    processor = processors.from_pretrained(str(place / "model"))
    paths = sorted((place / "images").glob("*/*.png"))
    pixels = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    labels = torch.arange(3).repeat_interleave(4)
    wanted = nn.functional.cross_entropy(model(pixels).logits, labels, reduction="none")
    found = made.score(model, torch.arange(12))
    torch.testing.assert_close(found, wanted.detach().double(), rtol=1e-4, atol=1e-5)


def test_any_module_is_called_with_the_images(place: Path) -> None:
    model = Convolutions(3)
    made = ready(model, place, metrics=["accuracy", "probability"])
    with torch.inference_mode():
        pixels = made.pixels(torch.arange(12), model)
        wanted = model(pixels).softmax(-1)
    found = made.score(model, torch.arange(12))
    labels = torch.arange(3).repeat_interleave(4)
    torch.testing.assert_close(found[:, 1], wanted[range(12), labels].double().clone())
    assert found[:, 0].tolist() == (wanted.argmax(-1) == labels).double().tolist()


@pytest.mark.parametrize("kind", ["convolutions", "vit", "clip"])
def test_a_head_is_fitted_on_the_base_and_kept(place: Path, kind: str) -> None:
    kinds: dict[str, Any] = {
        "convolutions": Convolutions,
        "vit": lambda: vit(head=False),
        "clip": clip,
    }
    make = kinds[kind]
    base = make()
    made = ready(base, place, head="fit", train=str(place / "train"))
    assert made(base)["accuracy"].value >= 0.75  # colours are easily told apart
    other = make()
    for tensor in other.parameters():
        nn.init.zeros_(tensor)
    digest = made.digest
    made.score(other, torch.arange(12))
    again = ready(base, place, head="fit", train=str(place / "train"))
    assert made.digest == digest == again.digest


def test_a_fitted_head_is_found_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Convolutions()
    first = ready(base, place, head="fit", train=str(place / "train"))

    def refuse(*given: object) -> None:
        raise AssertionError("it is fitted again")

    monkeypatch.setattr(ImageClassification, "_all_features", refuse)
    assert ready(base, place, head="fit", train=str(place / "train")).digest == first.digest


def test_a_head_from_a_file(place: Path, tmp_path: Path) -> None:
    base = Convolutions()
    weight = torch.randn(3, 6, generator=make_generator(0))
    file = tmp_path / "head.safetensors"
    save_file({"weight": weight, "bias": torch.zeros(3)}, str(file))
    made = ready(base, place, head=str(file), metrics="probability")
    with torch.inference_mode():
        features = base(made.pixels(torch.arange(12), base)).mean((-2, -1))
        wanted = (features @ weight.T).softmax(-1)
    labels = torch.arange(3).repeat_interleave(4)
    found = made.score(base, torch.arange(12))
    torch.testing.assert_close(found, wanted[range(12), labels].double().clone())


def test_pooling_of_hidden_states(place: Path) -> None:
    base = vit(head=False)
    digests = {
        ready(base, place, head="fit", train=str(place / "train"), pooling=pooling).digest
        for pooling in (None, "cls", "mean", "last")
    }
    assert len(digests) == 4


@pytest.mark.parametrize("head", [None, "fit"])
def test_models_of_half_precision_are_called_in_theirs(place: Path, head: str | None) -> None:
    model = Convolutions(0 if head else 3).bfloat16()
    train = {"train": str(place / "train")} if head else {}
    made = ready(model, place, head=head, metrics="loss", **train)
    wanted = ready(model.float(), place, head=head, metrics="loss", **train)
    found = made.score(model.bfloat16(), torch.arange(12))
    torch.testing.assert_close(
        found, wanted.score(model.float(), torch.arange(12)), rtol=0.1, atol=0.1
    )


def test_classes_are_matched_by_name(place: Path) -> None:
    model = vit()
    model.config.id2label = {0: "red", 1: "Green", 2: "dark_blue"}
    made = ready(model, place)
    assert made.labels(torch.tensor([0, 4, 8])).tolist() == [2, 1, 0]


def test_arrays_need_no_processor(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    np.savez(
        tmp_path / "set.npz",
        image=noise.normal(size=(6, 3, SIDE, SIDE)).astype(np.float32),
        label=np.arange(6) % 3,
    )
    model = Convolutions(3)
    made = ImageClassification(data=str(tmp_path / "set.npz"))
    made.prepare(model)
    with np.load(tmp_path / "set.npz") as file:
        wanted = model(torch.from_numpy(file["image"])).argmax(-1) == torch.arange(6) % 3
    assert made.score(model, torch.arange(6)).tolist() == wanted.double().tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": "acuracy"}, "no metric 'acuracy'"),
        ({"processor": {"sizes": 8}}, "no setting 'sizes'"),
        ({"processor": {"size": 0}}, "size must be"),
        ({"head": "fit"}, "needs the data"),
        ({"head": "fit", "train": "x", "fit": "ridge", "metrics": "loss"}, "needs probabilities"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_settings_that_are_not_possible(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageClassification(**{"data": "somewhere"} | dict(settings))


def test_a_head_of_the_wrong_width_is_refused(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(3, 7), "bias": torch.zeros(3)}, str(file))
    with pytest.raises(EvaluationError, match="is for 7 features, and Convolutions has 6"):
        ready(Convolutions(), place, head=str(file))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (lambda: vit(classes=2), {}, "3 classes, and the head of ViTForImageClassification has 2"),
        (lambda: vit(classes=1), {}, "1 output"),
        (lambda: Convolutions(), {}, "the logits of one image have shape"),
        (lambda: vit(), {"processor": {"size": 9}}, "cannot be called on images of 3 x 9 x 9"),
        (lambda: vit(), {"processor": None}, "nothing says how the images are prepared"),
        (lambda: vit(), {"processor": "/nowhere/at/all"}, "no folder /nowhere/at/all"),
        (lambda: Convolutions(), {"head": "nothing.safetensors"}, "no file nothing.safetensors"),
    ],
)
def test_what_does_not_fit_is_refused(
    place: Path, model: Any, settings: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        ready(model(), place, **settings)


def test_a_label_map_that_does_not_fit_the_head_is_refused(place: Path) -> None:
    model = vit()
    model.config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    with pytest.raises(EvaluationError, match=r"has the classes .*dark_blue.* lacks"):
        ready(model, place)
    data = {"path": str(place / "images"), "labels": {"red": 0, "green": 1, "dark_blue": 5}}
    with pytest.raises(EvaluationError, match="5"):
        ready(vit(), place, data=data)


def test_an_empty_folder_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "cats").mkdir(parents=True)
    with pytest.raises(EvaluationError, match="holds no images"):
        ready(vit(), place, data=str(tmp_path / "images"))


def test_a_class_without_training_images_is_refused(place: Path, tmp_path: Path) -> None:
    train = {"path": write_images(tmp_path / "few"), "limit": 1}
    with pytest.raises(EvaluationError, match="no example of the classes"):
        ready(Convolutions(), place, head="fit", train=train)


def test_merged_encoders_are_measured_under_their_heads(place: Path) -> None:
    base = Convolutions().state_dict()
    noise = make_generator(3)
    experts = {
        name: {k: v + 0.05 * torch.randn(v.shape, generator=noise) for k, v in base.items()}
        for name in ("a", "b")
    }
    task = ImageClassification(
        data=str(place / "images"),
        processor=Resize(size=SIDE, mean=0.5, std=0.25),
        head="fit",
        train=str(place / "train"),
        metrics=["accuracy", "loss"],
    )
    problem = MergedModelProblem(
        Convolutions(), base=base, experts=experts, evaluators={"colours": task}, check_base=False
    )
    assert [metric.name for metric in problem.metrics] == ["colours_accuracy", "colours_loss"]
    x = torch.tensor([0.5, 0.5]).double()
    seen = problem.evaluate(x[None], generator=make_generator(0))
    with problem.load(x) as model:
        wanted = task(model)
    assert seen.Y[0].tolist() == pytest.approx([one.value for one in wanted.values()])
