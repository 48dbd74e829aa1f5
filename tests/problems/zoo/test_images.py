from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

from map_bo.app.build import build_problem
from map_bo.app.schema import register
from map_bo.errors import DataError
from map_bo.problems.problem import Problem
from map_bo.problems.zoo.image_training import ImageRecipe, encoder, select
from map_bo.problems.zoo.images import ImagesProblem, ImageZoo, head, images_problem
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract
from tests.problems.fake_images import write_images
from tests.problems.zoo.test_image_sets import real_images

PAIR = ("mnist", "usps")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def pair(images: Path) -> ImagesProblem:
    return images_problem(images, sets=PAIR, epochs=2, size=30)


class TestImagesContract(ProblemContract):
    @pytest.fixture
    def problem(self, pair: ImagesProblem) -> Problem:
        return pair


def test_one_coefficient_and_one_metric_a_set(pair: ImagesProblem) -> None:
    assert pair.space.names == PAIR
    assert tuple(metric.name for metric in pair.metrics) == PAIR
    seen = pair.evaluate(torch.zeros(1, 2), generator=make_generator(0))
    assert bool((seen.counts == 30).all())


def test_the_metric_is_the_accuracy_under_the_sets_own_head(
    pair: ImagesProblem, images: Path
) -> None:
    model = encoder(generator=make_generator(0))
    model.load_state_dict(load_file(pair.files["usps"]))
    seen = pair.evaluate(torch.tensor([[0.0, 1.0]]), generator=make_generator(0)).Y[0]
    heads = load_file(pair.files["heads"])
    for value, name in zip(seen, PAIR, strict=True):
        part = select(name, images)
        logits = head(heads, name)(model(part.test[:30]))
        right = (logits.argmax(-1) == part.test_labels[:30]).float().mean()
        assert float(value) == pytest.approx(float(right), abs=1e-6)


def test_images_are_scored_one_by_one(pair: ImagesProblem) -> None:
    x = torch.full((1, 2), 0.4, dtype=torch.float64)
    seen = pair.evaluate(x, generator=make_generator(0))
    items = torch.tensor([20, 3, 7])
    some = pair.on_examples({"mnist": items}).evaluate(x, generator=make_generator(0))
    for j, (name, sets) in enumerate(pair.example_sets.items()):
        assert (sets.size, sets.divisible) == (30, True)
        assert sets.strata is not None
        whole = seen.examples[0][name]
        assert (whole.complete, whole.means) == (True, (True,))
        with pair.load(x[0], metric=name) as model:
            assert pair.evaluator(name)(model).value == float(seen.Y[0, j])
    found = some.examples[0]["mnist"]
    assert torch.equal(found.values, seen.examples[0]["mnist"].values[[3, 7, 20]])
    assert some.counts.tolist() == [[3.0]]


def test_experts_learn_their_set_under_the_frozen_head(pair: ImagesProblem, images: Path) -> None:
    heads = load_file(pair.files["heads"])
    losses = {}
    for name in ("base", *PAIR):
        model = encoder(generator=make_generator(0))
        model.load_state_dict(load_file(pair.files[name]))  # the encoder alone
        for part in (select(own, images) for own in PAIR):
            logits = head(heads, part.name)(model(part.train))
            losses[name, part.name] = F.cross_entropy(logits, part.train_labels).item()
    for name in PAIR:
        assert losses[name, name] < losses["base", name] - 0.01


def test_trains_once_and_again_what_is_damaged(images: Path, tmp_path: Path) -> None:
    zoo = ImageZoo(ImageRecipe(PAIR, epochs=1), images)
    files = zoo.checkpoints(tmp_path)
    before = {name: path.read_bytes() for name, path in files.items()}
    stamps = {name: path.stat().st_mtime_ns for name, path in files.items()}
    assert zoo.checkpoints(tmp_path) == files
    assert {name: path.stat().st_mtime_ns for name, path in files.items()} == stamps
    files["heads"].write_bytes(before["heads"][:-10])
    files["usps"].unlink()
    zoo.checkpoints(tmp_path)
    assert {name: path.read_bytes() for name, path in files.items()} == before
    assert files["mnist"].stat().st_mtime_ns == stamps["mnist"]


def test_the_folder_names_everything_that_weights_depend_on(images: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", train=70)
    zoos = [
        ImageZoo(ImageRecipe(PAIR), images),
        ImageZoo(ImageRecipe(PAIR, seed=1), images),
        ImageZoo(ImageRecipe(PAIR, epochs=1), images),
        ImageZoo(ImageRecipe(("mnist", "notmnist")), images),
        ImageZoo(ImageRecipe(PAIR), other),
    ]
    assert len({zoo.folder(tmp_path) for zoo in zoos}) == len(zoos)
    moved = write_images(tmp_path / "moved")
    assert ImageZoo(ImageRecipe(PAIR), moved).folder(tmp_path) == zoos[0].folder(tmp_path)


def test_the_description_says_the_zoo_and_the_examples(images: Path, pair: ImagesProblem) -> None:
    described = pair.describe()
    assert described["kind"] == "images"
    assert described["zoo"]["examples"] == 30
    other = images_problem(images, sets=PAIR, epochs=2, size=31).describe()
    assert json.dumps(other, sort_keys=True) != json.dumps(described, sort_keys=True)


def test_a_set_of_the_users_own_is_one_more_expert(images: Path) -> None:
    own = {
        part: {"path": str(images / "mnist"), "split": s}
        for part, s in (("train", "train"), ("test", "t10k"))
    }
    problem = images_problem(images, sets=("usps",), data={"mine": own}, epochs=2, size=20)
    assert problem.zoo.names == ("usps", "mine")
    known = images_problem(images, sets=("mnist", "usps"), epochs=2, size=20).zoo.data[0]
    mine = problem.zoo.data[1]
    assert sorted(mine.train_labels.tolist()) == sorted(known.train_labels.tolist())
    seen = problem.evaluate(torch.tensor([[0.0, 0.0]]).double(), generator=make_generator(0))
    assert not any(seen.failures)
    assert [metric.name for metric in seen.metrics] == ["usps", "mine"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mine": {"train": "x"}}, "must have train and test"),
        ({"mine": "x"}, "must have train and test"),
        ({"my set": {"train": "x", "test": "x"}}, "must be letters"),
    ],
)
def test_data_that_make_no_set_are_refused(images: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        images_problem(images, data=data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sets": ("mnist",)}, "two or more different ones, got mnist"),
        ({"sets": ("mnist", "mnist")}, "two or more different ones, got mnist, mnist"),
        ({"sets": ("mnist", "cifar")}, "no image set 'cifar'"),
        ({"epochs": 0}, "epochs must .* got 0"),
        ({"size": 0}, "size must .* got 0"),
        ({"size": 41}, "size must .* got 41"),
        ({"size": True}, "size must .* got True"),
    ],
)
def test_refuses_what_cannot_be(settings: dict[str, Any], message: str, images: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        images_problem(images, **{"sets": PAIR, "epochs": 1, **settings})
    assert caught.value.hint


def test_the_configuration_builds_it_and_tells_what_is_missing(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAP_BO_DATA", raising=False)
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        small = ["problem=images", "problem.sets=[mnist,usps]", "problem.epochs=2"]
        with pytest.raises(DataError, match="no folder of image sets"):
            build_problem(compose("config", overrides=small))
        full = [*small, f"problem.root={images}", "problem.size=30"]
        assert build_problem(compose("config", overrides=full)).space.names == PAIR
        old = [*full[:-1], "problem.examples=30"]
        with pytest.warns(DeprecationWarning, match=r"images_problem\(size="):
            by_old_name: Any = build_problem(compose("config", overrides=old))
        assert by_old_name.size == 30


@pytest.mark.data
def test_real_experts_are_good_at_their_set_and_conflict_mildly() -> None:
    folder = real_images()
    if folder is None:
        pytest.skip("no image sets: set MAP_BO_DATA to their folder")
    problem = images_problem(folder)
    anchors = problem.space.anchors()
    seen = problem.evaluate(anchors.X, generator=make_generator(0))
    base, experts, blend = seen.Y[0], seen.Y[1:5], seen.Y[5]
    own = experts.diagonal()
    others = experts[~torch.eye(4, dtype=torch.bool)].view(4, 3)
    assert bool((own > 0.8).all())
    assert bool((own > base + 0.05).all())
    assert bool((others.amax(-1) < own - 0.05).all())
    assert bool((blend > experts.amin(0) + 0.1).all())
    assert bool((blend < own).all())
