from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.images.zero_shot import ZeroShot
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.images.tiny import (
    COLOURS,
    SIDE,
    WORDS,
    clip,
    draw,
    vit,
    write_images,
    write_processor,
    write_tokenizer,
)

TEMPLATES = ("a photo of a {}", "the {}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_images(folder / "images")
    write_tokenizer(folder / "model")
    write_processor(folder / "model")
    return folder


def settings(place: Path, **more: Any) -> dict[str, Any]:
    model = str(place / "model")
    given = {"data": str(place / "images"), "processor": model, "tokenizer": model}
    return {**given, "templates": TEMPLATES, **more}


def ready(place: Path, model: nn.Module, **more: Any) -> ZeroShot:
    made = ZeroShot(**settings(place, **more))
    made.prepare(model)
    return made


class TestContract(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, place: Path) -> ExampleEvaluator:
        return ZeroShot(**settings(place, metrics=["loss", "accuracy"], batch_size=5))

    @pytest.fixture
    def model(self) -> nn.Module:
        model: nn.Module = clip()
        return model


def by_transformers(model: Any, place: Path) -> tuple[Tensor, Tensor]:
    """Return the prototypes and the logits that transformers' own parts give."""
    import transformers
    from PIL import Image

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(place / "model"))
    processors: Any = transformers.AutoImageProcessor
    processor = processors.from_pretrained(str(place / "model"))
    found = []
    for name in sorted(COLOURS):
        texts = [one.replace("{}", name.replace("_", " ")) for one in TEMPLATES]
        each = [
            model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output[0]
            for text in texts
        ]
        mean = torch.stack([one / one.norm() for one in each]).mean(0)
        found.append(mean / mean.norm())
    prototypes = torch.stack(found)
    paths = [
        path for name in sorted(COLOURS) for path in sorted((place / "images" / name).iterdir())
    ]
    pixels = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    images = model.get_image_features(pixel_values=pixels).pooler_output
    images = images / images.norm(dim=-1, keepdim=True)
    return prototypes.detach(), (model.logit_scale.exp() * images @ prototypes.T).detach()


def test_logits_are_those_of_transformers_own_parts(place: Path) -> None:
    model = clip()
    made = ready(place, model)
    _, wanted = by_transformers(model, place)
    with torch.inference_mode():
        logits = made.classifier(model)(torch.arange(made.size))
    torch.testing.assert_close(logits.clone(), wanted, rtol=1e-4, atol=1e-4)
    labels = torch.arange(3).repeat_interleave(4)
    right = (wanted.argmax(-1) == labels).double()
    assert made.score(model, torch.arange(12)).tolist() == right.tolist()
    assert made.class_names == ("dark blue", "green", "red")


def merged(seed: int, *, text: bool) -> Any:
    """Return the model with another vision tower, and another text tower too where ``text``."""
    model, other = clip(), clip(seed)
    model.vision_model.load_state_dict(other.vision_model.state_dict())
    if text:
        model.text_model.load_state_dict(other.text_model.state_dict())
    return model


def test_texts_are_embedded_once_where_their_tower_is_not_merged(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ready(place, clip())
    model = merged(1, text=False)

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("the texts are embedded again")

    monkeypatch.setattr(model, "get_text_features", refuse)
    wanted = by_transformers(merged(1, text=False), place)[1]
    with torch.inference_mode():
        logits = made.classifier(model)(torch.arange(12))
    torch.testing.assert_close(logits.clone(), wanted, rtol=1e-4, atol=1e-4)


def test_tasks_of_one_base_share_the_copy_of_its_text_tower(place: Path) -> None:
    first, second = ready(place, clip()), ready(place, clip(), templates="the {}")
    assert first._text is second._text
    assert ready(place, clip(1))._text is not first._text
    assert ready(place, clip(), prototypes="candidate")._text is None


@pytest.mark.parametrize("prototypes", ["auto", "candidate", "base"])
def test_whose_texts_are_used_where_their_tower_is_merged(place: Path, prototypes: str) -> None:
    base, model = clip(), merged(1, text=True)
    made = ready(place, base, prototypes=prototypes)
    with torch.inference_mode():
        logits = made.classifier(model)(torch.arange(12)).clone()
    # With the text tower of the base it is as if that had not been merged.
    wanted = by_transformers(merged(1, text=prototypes != "base"), place)[1]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    other = by_transformers(merged(1, text=prototypes == "base"), place)[1]
    assert not torch.allclose(logits, other, atol=1e-2)


def test_another_base_has_texts_of_its_own(place: Path) -> None:
    made, other = ready(place, clip(), prototypes="base"), clip(1)
    made.prepare(other)
    with torch.inference_mode():
        logits = made.classifier(other)(torch.arange(12)).clone()
    torch.testing.assert_close(logits, by_transformers(other, place)[1], rtol=1e-4, atol=1e-4)


def test_a_prepared_one_can_be_sent_to_other_processes(place: Path) -> None:
    model = clip()
    made = ready(place, model, metrics="loss")
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again.score(model, torch.arange(12)), made.score(model, torch.arange(12)))


def test_the_digest_is_of_images_and_texts(place: Path) -> None:
    model = clip()
    digests = [
        ready(place, model, **more).digest
        for more in (
            {},
            {},
            {"templates": "the {}"},
            {"classes": ["blue", "green", "red"]},
            {"metrics": "probability"},
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_entropy_takes_the_names_of_folders(place: Path, tmp_path: Path) -> None:
    model = clip()
    named = ready(place, model, metrics="entropy")
    assert named.class_names == ("dark blue", "green", "red")
    listed = ready(place, model, metrics="entropy", classes=list(named.class_names))
    items = torch.arange(named.size)
    assert torch.equal(named.score(model, items), listed.score(model, items))
    paths = [str(path) for path in sorted((place / "images").glob("*/*.png"))]
    (tmp_path / "images.csv").write_text("\n".join(["image", *paths]) + "\n")
    with pytest.raises(EvaluationError, match="no names in the data"):
        ready(place, model, metrics="entropy", data=str(tmp_path / "images.csv"))


def test_classes_can_be_named(place: Path) -> None:
    model = clip()
    as_listed = ready(place, model, classes=["blue", "green", "red"])
    assert as_listed.class_names == ("blue", "green", "red")
    as_mapped = ready(place, model, classes={"red": "red", "green": "dark", "dark_blue": "blue"})
    assert as_mapped.class_names == ("blue", "dark", "red")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"templates": ["a photo"]}, "template 'a photo' has no {}"),
        ({"templates": []}, "no templates"),
        ({"prototypes": "bse"}, "prototypes must be"),
        ({"classes": "red"}, "classes must be names"),
        ({"metrics": "acuracy"}, "no metric 'acuracy'"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"processor": {"sizes": 3}}, "no setting 'sizes'"),
    ],
)
def test_settings_that_are_not_possible(place: Path, more: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ZeroShot(**settings(place, **more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"classes": ["red", "green"]}, "2 names, and the data 3 classes"),
        ({"classes": {"red": "red"}}, "do not name"),
        ({"classes": ["red", "green", "red"]}, "'red' and 'red' have the same embedding"),
        ({"classes": ["lilac", "mauve", "red"]}, "'lilac' and 'mauve' have the same embedding"),
        ({"tokenizer": "/nowhere/at/all"}, "tokenizer of '/nowhere/at/all' cannot be used"),
        ({"tokenizer": None}, "no tokenizer was given"),
        ({"processor": None}, "nothing says how the images are prepared"),
        ({"processor": {"size": 9}}, "cannot be called on images of 3 x 9 x 9"),
    ],
)
def test_what_does_not_fit_is_refused(place: Path, more: Mapping[str, Any], message: str) -> None:
    made = ZeroShot(**settings(place, **more))
    for _ in range(2):  # also when it is asked again
        with pytest.raises(EvaluationError, match=message):
            made.prepare(clip())


def test_a_tokenizer_of_another_vocabulary_is_refused(place: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path, (*(f"word{i}" for i in range(20)), *WORDS))
    with pytest.raises(EvaluationError, match="the model embeds 12"):
        ready(place, clip(), tokenizer=other)


def test_a_model_without_a_text_tower_is_refused(place: Path) -> None:
    with pytest.raises(EvaluationError, match="ViTForImageClassification, which has no image and"):
        ready(place, vit())


def test_two_merged_experts_are_measured(place: Path) -> None:
    base = clip().state_dict()
    experts = {}
    for name, seed in (("colours", 1), ("again", 2)):
        other = clip()
        draw(other.vision_model, seed, 0.05)
        experts[name] = {
            key: base[key] + 0.1 * value if key.startswith("vision_model") else base[key]
            for key, value in other.state_dict().items()
        }
    problem = MergedModelProblem(
        clip(5),
        base=base,
        experts=experts,
        evaluators={
            "colours": ZeroShot(**settings(place)),
            "loss": ZeroShot(**settings(place, metrics="loss")),
        },
        check_base=False,
    )
    assert [metric.kind for metric in problem.metrics] == ["proportion", "loss"]
    x = torch.tensor([0.6, 0.3]).double()
    seen = problem.evaluate(x[None], generator=make_generator(0))
    assert not any(seen.failures or ())
    with problem.load(x) as model:
        wanted = by_transformers(model, place)[1]
    labels = torch.arange(3).repeat_interleave(4)
    assert float(seen.Y[0, 0]) == pytest.approx(
        float((wanted.argmax(-1) == labels).double().mean())
    )
    loss = torch.nn.functional.cross_entropy(wanted, labels)
    assert float(seen.Y[0, 1]) == pytest.approx(float(loss), rel=1e-4)


def open_clip_model() -> Any:
    """Return a tiny model of open_clip with open_clip's own vocabulary."""
    try:
        model = pytest.importorskip("open_clip.model", exc_type=ImportError)
    except RuntimeError as error:  # of a torchvision that was built for another torch
        pytest.skip(f"open_clip cannot be imported: {error}")
    made = model.CLIP(
        embed_dim=8,
        vision_cfg={"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": SIDE},
        text_cfg={"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    ).eval()
    draw(made, 0)
    return made


class TestOpenClip(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, place: Path) -> ExampleEvaluator:
        return ZeroShot(data=str(place / "images"), templates=TEMPLATES, batch_size=5)

    @pytest.fixture
    def model(self) -> nn.Module:
        model: nn.Module = open_clip_model()
        return model


def test_a_model_of_open_clip_needs_nothing_else(place: Path) -> None:
    model = open_clip_model()
    import open_clip
    from PIL import Image

    made = ZeroShot(data=str(place / "images"), templates=TEMPLATES)
    made.prepare(model)
    tokenize = open_clip.SimpleTokenizer(context_length=12)
    prototypes = []
    for name in ("dark blue", "green", "red"):
        each = model.encode_text(tokenize([one.replace("{}", name) for one in TEMPLATES]))
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
        prototypes.append(mean / mean.norm())
    prepare = open_clip.image_transform(SIDE, is_train=False)
    paths = sorted((place / "images").glob("*/*.png"))
    pixels = torch.stack([prepare(Image.open(path)) for path in paths])
    images = model.encode_image(pixels)
    images = images / images.norm(dim=-1, keepdim=True)
    wanted = model.logit_scale.exp() * images @ torch.stack(prototypes).T
    with torch.inference_mode():
        logits = made.classifier(model)(torch.arange(12))
    torch.testing.assert_close(logits.clone(), wanted.detach(), rtol=1e-3, atol=1e-3)


def test_open_clip_takes_a_tokenizer_of_a_folder(place: Path) -> None:
    model = open_clip_model()
    made = ZeroShot(**settings(place))
    made.prepare(model)  # with the words of this folder, which are fewer
    assert made.size == 12
