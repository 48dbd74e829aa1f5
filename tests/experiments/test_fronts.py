"""The comparison on the zoos, at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments import fronts
from experiments.fronts import Kept, compare, main, plot, words
from experiments.record_numbers import FIRST, LAST
from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.zoo.decoder import decoder_problem
from map_bo.problems.zoo.expert_training import TunedProblem
from map_bo.problems.zoo.images import images_problem
from map_bo.problems.zoo.text import text_problem
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic
from tests.problems.fake_images import write_images
from tests.problems.fake_texts import tiny_decoder, tiny_encoder, write_texts

ROOT = Path(__file__).parents[2]
STUDIES = ("text", "lm", "vision")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> TunedProblem:
    folder = tmp_path_factory.mktemp("decoder")
    model = tiny_decoder(folder / "model")
    texts = write_texts(folder / "texts")
    return decoder_problem(
        texts, model=model, tuning="full", epochs=4, size=8, cache_dir=folder / "cache"
    )


def test_evaluations_are_kept_and_not_made_again(
    decoder: TunedProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = torch.tensor([[0.0, 0.5], [1.0, 0.25]], dtype=torch.float64)
    first = Kept(decoder, tmp_path).evaluate(X, generator=make_generator(0))
    (file,) = tmp_path.glob("evaluations-*.jsonl")
    file.write_text(file.read_text() + '{"X": [0.1, ')  # cut by a kill

    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(decoder, "evaluate", fail)
    again = Kept(decoder, tmp_path).evaluate(X.flip(0), generator=make_generator(1))
    assert torch.equal(again.Y, first.Y.flip(0))
    assert torch.equal(again.Yvar, first.Yvar.flip(0))
    with pytest.raises(AssertionError, match="measured again"):
        Kept(decoder, tmp_path).evaluate(X + 1e-3, generator=make_generator(0))


@pytest.mark.slow
def test_the_comparison_goes_on_and_gives_the_same_numbers(
    decoder: TunedProblem, tmp_path: Path
) -> None:
    quick = partial(
        compare,
        decoder,
        tmp_path,
        seeds=[0],
        budget=8,
        say=lambda text: None,
        sampler=Sobol(),
        surrogate=Quadratic(),
        solver=GradientSolver(points=10, starts=2, steps=20),
    )
    one, _ = quick(export=False)
    (file,) = tmp_path.glob("evaluations-*")
    before = file.read_text()
    two, found = quick()
    assert file.read_text() == before
    assert one["hypervolume"] == two["hypervolume"]
    volumes = two["hypervolume"]
    assert volumes["all points"] >= max(*volumes["run"], *volumes["random"], volumes["grid"])
    assert volumes["run"][0] >= volumes["uniform blend"]  # the blend is among its evaluations
    assert len(two["curves"]["run"][0]) == 8
    assert two["curves"]["run"][0] == sorted(two["curves"]["run"][0])
    assert len(two["exports"]) == 3
    for row in two["exports"]:
        assert row["loaded"] == pytest.approx(row["live"], abs=1e-5)
    text = words(two, "the command")
    assert "| run | 8 |" in text
    assert "3 chosen points were exported" in text
    plot(two, found, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000
    assert json.loads(json.dumps(two))["budget"] == 8


@pytest.mark.slow
def test_text_and_images_are_compared_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "texts")
    images = write_images(tmp_path / "images")
    encoder = tiny_encoder(tmp_path / "encoder")
    problems: dict[str, Callable[..., object]] = {
        "text": lambda root, **given: text_problem(root, model=encoder, **given),
        "vision": lambda root, **given: images_problem(root, epochs=1, **given),
    }
    monkeypatch.setattr(fronts, "PROBLEMS", problems)
    pairs = {"text": (texts, ["sst2", "snips"]), "vision": (images, ["mnist", "usps"])}
    for name, (root, sets) in pairs.items():
        out = tmp_path / "study" / name
        words = [name, "--root", str(root), "--sets", *sets, "--seeds", "1", "--budget", "8"]
        main([*words, "--size", "12", "--out", str(out), "--work", str(tmp_path / "work" / name)])
        page = (out / "README.md").read_text()
        assert f"`python -m experiments.fronts {name} --seeds 1 --budget 8 --size 12" in page
        numbers = json.loads((out / "numbers.json").read_text())
        main([*words[:3], *words[3:6], "--out", str(out), "--time"])
        again = json.loads((out / "numbers.json").read_text())
        assert again["seconds"] != numbers["seconds"]
        assert {**again, "seconds": numbers["seconds"]} == numbers
        assert (out / "README.md").read_text().partition("One evaluation")[0] == (
            page.partition("One evaluation")[0]
        )
        for row in numbers["exports"]:
            assert row["loaded"] == pytest.approx(row["live"], abs=1e-6)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_claim_command_and_numbers(name: str) -> None:
    text = (ROOT / "experiments" / name / "README.md").read_text()
    assert "Claim:" in text
    recorded = text.partition(FIRST)[2].partition(LAST)[0]
    assert f"`python -m experiments.fronts {name} " in recorded
    assert (ROOT / "experiments" / name / "numbers.json").exists()
