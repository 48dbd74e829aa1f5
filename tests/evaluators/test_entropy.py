from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.entropy import Entropy
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.kinds import evaluator_from
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.images.tiny import (
    clip,
    vit,
    write_images,
    write_processor,
    write_tokenizer,
)
from tests.evaluators.text.tiny_text import rows_file, tiny_classifier, word_tokenizer

X = torch.randn(9, 4, generator=make_generator(0))


def linear(classes: int = 3) -> nn.Linear:
    layer = nn.Linear(4, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, 4, generator=make_generator(1)))
        layer.bias.zero_()
    return layer


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X), batch_size=4)


def entropy(logits: Tensor) -> Tensor:
    chances = logits.detach().double().softmax(-1)
    return -(chances * chances.log()).sum(-1)


class TestContract(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        return Entropy(loader=loader(), classes=3)

    @pytest.fixture
    def model(self) -> nn.Module:
        return linear()


def test_it_is_the_mean_entropy_of_tensors() -> None:
    made = Entropy(loader=loader, classes=3)
    model = linear()
    made.prepare(model)
    wanted = entropy(model(X))
    torch.testing.assert_close(made.score(model, torch.arange(9)), wanted)
    seen = made(model)["entropy"]
    assert seen.value == pytest.approx(float(wanted.mean()))
    assert seen.variance == pytest.approx(float(wanted.var()) / 9)
    assert made.batch_size == 4


def test_the_logarithm_of_the_classes_bounds_it() -> None:
    assert Entropy(loader=loader(), classes=3).metrics == (
        Metric("entropy", "min", lower=0.0, upper=math.log(3)),
    )
    assert Entropy(loader=loader()).metrics == (Metric("entropy", "min", "loss"),)


def test_undecided_predictions_reach_the_bound() -> None:
    model = linear()
    made = Entropy(loader=loader(), classes=3)
    made.prepare(model)
    nn.init.zeros_(model.weight)
    assert made(model)["entropy"].value == pytest.approx(math.log(3))


def test_more_classes_than_were_told_are_refused() -> None:
    flat = linear(5)
    nn.init.zeros_(flat.weight)
    with pytest.raises(EvaluationError, match="3 classes have at most 1"):
        Entropy(loader=loader(), classes=3).prepare(flat)


def test_of_texts_without_labels(tmp_path: Path) -> None:
    texts = ["good film", "bad plot", "the plot is not very good"]
    data = rows_file(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    made = Entropy(of="text_classification", data=data, tokenizer=word_tokenizer())
    model = tiny_classifier()
    made.prepare(model)
    encoded = word_tokenizer()(texts, padding=True, return_tensors="pt")
    wanted = entropy(model(**encoded).logits)
    torch.testing.assert_close(made.score(model, torch.arange(3)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", ["images", "zero_shot"])
def test_of_images_without_labels(tmp_path: Path, of: str) -> None:
    write_images(tmp_path / "images")
    folder = write_processor(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    paths = sorted((tmp_path / "images").glob("*/*.png"))
    lines = ["image", *(str(path) for path in paths)]
    (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
    settings: dict[str, Any] = {"kind": "entropy", "of": of, "data": str(tmp_path / "images.csv")}
    if of == "zero_shot":
        settings |= {"classes": ["red", "green", "blue"], "templates": "a photo of a {}"}
    # As a configuration builds it: what the base's folder has is handed to both kinds.
    made = evaluator_from("task", settings, defaults={"tokenizer": folder, "processor": folder})
    assert isinstance(made, Entropy)
    model = clip() if of == "zero_shot" else vit()
    made.prepare(model)
    assert made.size == 12
    found = made.score(model, torch.arange(12))
    assert bool(((found >= 0) & (found <= math.log(3) + 1e-9)).all())
    if of == "images":
        with torch.inference_mode():
            pixels = made._task.pixels(torch.arange(12), model)  # type: ignore[attr-defined]
            torch.testing.assert_close(found, entropy(model(pixels).logits).clone())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "of must be one of"),
        ({"of": "zeroshot"}, "of must be one of"),
        ({"of": "torch"}, "needs loader"),
        ({"of": "images"}, "needs data"),
        ({"of": "images", "data": "x", "templates": "a {}"}, "images has no setting 'templates'"),
        ({"loader": loader, "data": "x"}, "torch has no setting 'data'"),
        ({"loader": loader, "classes": 1}, "classes must be"),
        ({"loader": loader, "classes": ["a", "b"]}, "classes must be their number"),
        ({"loader": loader, "batch_size": 0}, "batch_size must be"),
    ],
)
def test_settings_that_are_not_possible(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Entropy(**settings)


def test_it_is_a_metric_of_a_merged_model() -> None:
    base = linear().state_dict()
    expert = {name: 2 * tensor for name, tensor in base.items()}
    problem = MergedModelProblem(
        nn.Linear(4, 3),
        base=base,
        experts={"sharp": expert},
        evaluators={"sure": Entropy(loader=loader(), classes=3)},
        check_base=False,
    )
    seen = problem.evaluate(torch.tensor([[0.0], [1.0]]).double(), generator=make_generator(0))
    model = linear()
    assert float(seen.Y[0]) == pytest.approx(float(entropy(model(X)).mean()))
    assert float(seen.Y[1]) == pytest.approx(float(entropy(2 * model(X)).mean()))
    assert seen.metrics[0].name == "sure"
    assert seen.metrics[0].direction == "min"


def test_it_reads_the_head_that_its_kind_reads() -> None:
    """Else a task without an expert of its name would be scored under the head of no task."""
    assert Entropy(of="text_classification", data="x.csv").reads_head
    assert not Entropy(of="text_classification", data="x.csv", head="head.safetensors").reads_head
    assert Entropy(of="images", data="x").reads_head
    assert not Entropy(of="zero_shot", data="x").reads_head
    assert not Entropy(loader=loader()).reads_head
