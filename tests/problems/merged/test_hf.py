from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import CheckpointError, ConfigError, EvaluationError, MergeError
from map_bo.evaluators.evaluator import Measurement
from map_bo.problems.merged.hf import hf_problem
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator

pytest.importorskip("transformers")
OWN = __name__
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 7,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}


class Width:
    """Measures how wide the head is, and refuses what the test says."""

    def __init__(
        self,
        *,
        names: Sequence[str] = ("width",),
        refuses: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.names, self.refuses, self.tokenizer = names, refuses, tokenizer
        self.metrics = tuple(Metric(name, kind="unbounded") for name in names)
        self.prepared = 0

    def prepare(self, model: nn.Module) -> None:
        self.prepared += 1
        if self.refuses is not None:
            raise EvaluationError(self.refuses, hint="choose another")

    def __call__(self, model: Any) -> dict[str, float | Measurement]:
        return {name: float(model.classifier.out_features) for name in self.names}


def write(folder: Path, *, width: int | None = None, seed: int = 0, **changes: Any) -> str:
    """Write a BERT, or a classifier with so many classes, and return its folder."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    settings = CONFIG | changes
    if width is None:
        model: Any = BertModel(BertConfig(**settings))
    else:
        labels = {i: f"class {i}" for i in range(width)}
        model = BertForSequenceClassification(BertConfig(**settings, id2label=labels))
    generator = make_generator(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if seed:
            generator = make_generator(seed)
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "base": write(folder / "base"),
        "sst2": write(folder / "sst2", width=2, seed=1),
        "trec": write(folder / "trec", width=6, seed=2),
        "wide": write(folder / "wide", width=2, seed=3, hidden_size=16),
    }


def build(models: dict[str, str], **changes: Any) -> MergedModelProblem:
    given: dict[str, Any] = {
        "base": models["base"],
        "experts": {"sst2": models["sst2"], "trec": models["trec"]},
        "tasks": {"sst2": {"kind": f"{OWN}:Width"}, "trec": {"kind": f"{OWN}:Width"}},
    }
    return hf_problem(**{**given, **changes})


def first(model: Any, items: Tensor) -> Tensor:
    """Return whether each of six texts of one token is of the first class."""
    found: Tensor = model(input_ids=items.unsqueeze(-1)).logits.argmax(-1) == 0
    return found


def test_a_task_may_be_a_function_of_examples(models: dict[str, str]) -> None:
    tasks = {
        "sst2": {"kind": "items", "score": f"{OWN}:first", "size": 6, "batch_size": 4},
        "trec": {"kind": f"{OWN}:Width"},
    }
    problem = build(models, tasks=tasks)
    seen = problem.evaluate(torch.tensor([[0.3, 0.2]]), generator=make_generator(0))
    outcomes = seen.examples[0]["sst2"]
    assert float(seen.Y[0, 0]) == float(outcomes.values.mean())
    part = problem.on_examples({"sst2": torch.tensor([5, 0])})
    some = part.evaluate(torch.tensor([[0.3, 0.2]]), generator=make_generator(0))
    assert torch.equal(some.examples[0]["sst2"].values, outcomes.values[[0, 5]])
    with pytest.raises(ConfigError, match=r"problem\.tasks\.sst2 has no setting 'sise'"):
        build(
            models, tasks={**tasks, "sst2": {"kind": "items", "score": f"{OWN}:first", "sise": 6}}
        )


def evaluators_of(problem: MergedModelProblem) -> dict[str, Any]:
    return dict(problem._evaluators)


def test_a_task_has_the_head_of_its_expert_and_the_tokenizer_of_the_base(
    models: dict[str, str],
) -> None:
    problem = build(models)
    found = problem.evaluate(torch.tensor([[0.3, 0.2]]), generator=make_generator(0))
    assert found.Y.tolist() == [[2.0, 6.0]]
    assert [metric.kind for metric in problem.metrics] == ["unbounded", "unbounded"]
    assert [e.tokenizer for e in evaluators_of(problem).values()] == [models["base"]] * 2
    own = {"kind": f"{OWN}:Width", "tokenizer": "own"}
    assert evaluators_of(build(models, tasks={"sst2": own}))["sst2"].tokenizer == "own"


def test_several_metrics_and_another_head(models: dict[str, str]) -> None:
    problem = build(
        models,
        tasks={"both": {"kind": f"{OWN}:Width", "names": ["a", "b"]}},
        heads={"both": "trec"},
        metrics={"both_b": {"direction": "min"}},
    )
    assert [(m.name, m.direction) for m in problem.metrics] == [
        ("both_a", "max"),
        ("both_b", "min"),
    ]
    found = problem.evaluate(torch.tensor([[0.3, 0.2]]), generator=make_generator(0))
    assert found.Y.tolist() == [[6.0, 6.0]]


def test_nothing_is_prepared_when_all_is_well(models: dict[str, str]) -> None:
    problem = build(models)
    assert [e.prepared for e in evaluators_of(problem).values()] == [0, 0]
    problem.prepare()
    assert [e.prepared for e in evaluators_of(problem).values()] == [1, 1]


def test_refusals_of_several_evaluators_come_together_before_anything_is_evaluated(
    models: dict[str, str],
) -> None:
    tasks = {
        name: {"kind": f"{OWN}:Width", "refuses": f"{name} has no column 'text'"}
        for name in ("sst2", "trec")
    }
    problem = build(models, tasks={**tasks, "fine": {"kind": f"{OWN}:Width"}})
    with pytest.raises(EvaluationError) as caught:
        problem.evaluate(torch.tensor([[0.3, 0.2]]), generator=make_generator(0))
    assert "2 evaluators cannot be used" in caught.value.message
    assert "'sst2': sst2 has no column 'text'" in caught.value.message
    assert "'trec': trec has no column 'text'" in caught.value.message


def test_all_that_is_wrong_is_said_at_once(models: dict[str, str], tmp_path: Path) -> None:
    experts = {
        "sst2": models["sst2"],
        "wide": models["wide"],
        "gone": str(tmp_path / "gone"),
    }
    tasks = {
        "sst2": {"kind": f"{OWN}:Width", "refuses": "the split is empty"},
        "wide": {"kind": f"{OWN}:Width", "refuses": "not asked: its head is lost"},
        "misspelt": {"kind": f"{OWN}:Width", "tokeniser": "x"},
        "unknown": {"kind": "no_such_kind"},
    }
    with pytest.raises(ConfigError) as caught:
        build(models, experts=experts, tasks=tasks)
    lines = caught.value.message.splitlines()
    assert lines[0] == "5 parts of the configuration cannot be used:"
    said = ["experts.gone:", "experts.wide:", "tasks.misspelt has", "unknown.kind", "the split is"]
    for line, part in zip(lines[1:], said, strict=True):
        assert part in line, lines
    assert "did you mean 'problem.tasks.misspelt.tokenizer'" in lines[3]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"experts": {}}, ConfigError, "the problem names no experts"),
        ({"tasks": {}}, ConfigError, "the problem names no tasks"),
        ({"base": "gone/base.safetensors"}, CheckpointError, "problem.base: "),
        ({"metrics": {"other": {}}}, ConfigError, "metrics without an evaluator: other"),
        ({"heads": {"sst2": "film"}}, MergeError, "the experts 'film' have no task head"),
    ],
)
def test_one_trouble_is_raised_as_it_is(
    changes: dict[str, Any], error: type[Exception], message: str, models: dict[str, str]
) -> None:
    with pytest.raises(error, match=message):
        build(models, **changes)


def test_experts_that_do_not_fit_each_other(models: dict[str, str], tmp_path: Path) -> None:
    """Where each fits the base alone, what is said of them together is kept."""
    folder = Path(write(tmp_path / "other", width=3, seed=4))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    with pytest.raises(MergeError, match=r"problem\.experts\.other: .*layer_norm_eps"):
        build(models, experts={"sst2": models["sst2"], "other": str(folder)})


def test_a_base_without_an_architecture(models: dict[str, str], tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "base.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        build(
            models,
            base=str(tmp_path / "base.safetensors"),
            experts={"one": str(tmp_path / "one.safetensors")},
        )


@pytest.mark.parametrize("base", [None, "gone/base"])
def test_data_are_looked_at_where_there_is_no_model_to_score(
    base: str | None, models: dict[str, str], tmp_path: Path
) -> None:
    """What is wrong with the task of a lost expert would else be found in the next run."""
    (tmp_path / "rows.csv").write_text("sentence,label\ngood,1\n")
    (tmp_path / "empty.csv").write_text("text,label\n")
    task = {"kind": "text_classification", "data": str(tmp_path / "rows.csv")}
    fitted = {
        "kind": "text_classification",
        "data": {"path": str(tmp_path / "rows.csv"), "columns": {"text": "sentence"}},
        "head": "fit",
        "train": str(tmp_path / "empty.csv"),
    }
    with pytest.raises(ConfigError) as caught:
        build(
            models,
            base=base or models["base"],
            experts={"wide": models["wide"], "gone": models["wide"]},
            tasks={"wide": task, "gone": fitted},
        )
    said = caught.value.message
    assert "problem.tasks.wide: " in said
    assert "has no column 'text'" in said
    assert "problem.tasks.gone: " in said
    assert "empty.csv is empty" in said
    assert ("problem.base: " in said) == (base is not None)


def architecture() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


def test_a_model_that_was_given_is_asked_for_with_the_rest(tmp_path: Path) -> None:
    """A base that is no folder of transformers would else be told to lack its configuration."""
    for name, value in (("base", 0.0), ("one", 1.0)):
        save_file({"weight": torch.full((1, 1), value)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError) as caught:
        hf_problem(
            base=str(tmp_path / "base.safetensors"),
            experts={"one": str(tmp_path / "one.safetensors"), "gone": str(tmp_path / "gone")},
            tasks={"task": {"kind": f"{OWN}:Width", "refuses": "the split is empty"}},
            model=f"{OWN}:architecture",
        )
    assert "the split is empty" in caught.value.message
    assert "config.json" not in caught.value.message


def test_a_root_that_holds_nothing_is_told_as_such(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "base": "org/base",
        "experts": {"x": "org/x@main"},
        "tasks": {"x": {"kind": "zero_shot", "data": {"path": "org/images", "split": "test"}}},
    }
    with pytest.raises(ConfigError, match="holds none of the 3 models and data sets") as caught:
        hf_problem(root=str(tmp_path), **given)
    assert str(tmp_path / "org" / "base") in str(caught.value.hint)
    with pytest.raises(ConfigError, match="which is not a folder"):
        hf_problem(root=str(tmp_path / "none"), **given)
    (tmp_path / "images").mkdir()  # one of them is there, so the others are told one by one
    with pytest.raises(ConfigError, match="parts of the configuration cannot be used"):
        hf_problem(root=str(tmp_path), **given)
