"""From folders of models and files of data to a merged model, without a line of Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from map_bo.app.build import build_problem
from map_bo.app.main import main
from map_bo.app.trust import recorded_configuration
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.kinds import evaluator_from
from map_bo.loop.reading import created_of, load_result
from map_bo.rng import make_generator
from tests.evaluators.tiny_language import tiny_decoder
from tests.integration.hf_models import CLASSES, save, write_classifiers, write_decoders

transformers = pytest.importorskip("transformers")
QUICK = [
    "surrogate=quadratic",
    "sampler=sobol",
    "solver.points=10",
    "loop.budget=6",
    "loop.verify=1",
    "progress=false",
    "tracking=none",
    "hydra.run.dir=run",
]
TASKS = ["--task", "cats=perplexity:cats.txt", "--task", "dogs=perplexity:dogs.txt,limit=16"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_decoders(folder)
    return folder


@pytest.fixture
def project(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in written.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def init(*more: str) -> int:
    return status("init", "base", "--expert", "cats", "--expert", "dogs", *more)


def scored(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Measurement]:
    """What a task measures of a model that transformers has loaded from a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    evaluator: Any = evaluator_from("t", settings, defaults={"tokenizer": str(folder)})
    evaluator.prepare(model)
    found: Mapping[str, Measurement] = evaluator(model)
    return found


def test_from_init_to_a_merge_that_scores_the_same(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(*TASKS, "--examples", "5") == 0
    said = capsys.readouterr().out
    assert "5 of 24" in said
    assert "5 of 16" in said
    assert "One evaluation takes about" in said
    assert "Peak resident memory" in said
    assert said.rstrip().endswith("map-bo run map_bo.yaml")
    assert "note:" not in said
    assert sorted(path.name for path in project.iterdir() if not path.is_symlink()) == [
        "map_bo.yaml"
    ]
    assert status("run", "map_bo.yaml", *QUICK) == 0
    said = capsys.readouterr().out
    assert "map-bo merge run --prefer cats=2 --out merged\n" in said  # nothing to trust
    row = ["run", "--prefer", "cats=2"]
    assert status("choose", *row, "--json") == 0
    assert status("merge", *row, "--out", "merged") == 0
    capsys.readouterr()
    assert status("choose", "run", "--at-least", "cats=0.9", "--normalised", "--json") == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["normalised"]["cats"] >= 0.9
    assert status("choose", "run", "--at-least", "cats=0.9", "--normalised") == 0
    assert "Where less is better (cats, dogs)" in capsys.readouterr().out
    assert status("report", "run", "--normalised") == 0
    assert "normalised:cats" in Path("run/front.csv").read_text()
    capsys.readouterr()
    tasks = yaml.safe_load(Path("map_bo.yaml").read_text())["problem"]["tasks"]
    recipe = yaml.safe_load(Path("merged/recipe.yaml").read_text())
    again = [value_of(scored(Path("merged"), tasks[name])) for name in tasks]
    problem = problem_of("run")
    x = torch.tensor([[recipe["coefficients"][name] for name in problem.space.names]])
    live = problem.evaluate(x.double(), generator=make_generator(0))
    assert live.Y[0].tolist() == pytest.approx(again, rel=1e-5)
    choice = load_result("run").choose({"cats": 2})
    assert dict(zip(problem.space.names, choice.x.tolist(), strict=True)) == pytest.approx(
        recipe["coefficients"], rel=1e-6
    )


def test_experts_with_heads_of_their_own(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classifiers(project)
    tasks = [part for name in CLASSES for part in ("--task", f"{name}={name}.jsonl")]
    experts = ["--expert", "film", "--expert", "topic"]
    given = ["--kind", "text_classification", "--limit", "20"]
    assert status("init", "bert", *experts, *tasks, *given) == 0
    assert "20 of 20" in capsys.readouterr().out
    assert status("run", "map_bo.yaml", *QUICK) == 0
    chosen = ["run", "--point", "3", "--task", "topic"]
    assert status("merge", *chosen, "--out", "merged") == 0
    recipe = yaml.safe_load(Path("merged/recipe.yaml").read_text())
    problem = problem_of("run")
    x = torch.tensor([[recipe["coefficients"][name] for name in problem.space.names]])
    live = problem.evaluate(x.double(), generator=make_generator(0))
    model = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    assert model.config.id2label == dict(enumerate(CLASSES["topic"]))
    settings = yaml.safe_load(Path("map_bo.yaml").read_text())["problem"]["tasks"]["topic"]
    evaluator: Any = evaluator_from("t", settings, defaults={"tokenizer": "bert"})
    evaluator.prepare(model)
    assert value_of(evaluator(model)) == live.Y[0, 1].item()


def test_a_refusal_after_warnings_leaves_nothing_either(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the alignment of experts says goes to the log of the run."""
    write_classifiers(project)
    given = ["--expert", "film", "--expert", "topic", "--kind", "text_classification"]
    assert status("init", "bert", *given, "--task", "film=topic.jsonl", "--no-check") == 0
    before = sorted(project.iterdir())
    quick = [part for part in QUICK if not part.startswith("hydra")]
    assert status("run", "map_bo.yaml", *quick) == 2
    assert "evaluator 'film' cannot be used" in capsys.readouterr().err
    assert sorted(project.iterdir()) == before


def value_of(found: Mapping[str, Measurement]) -> float:
    (one,) = found.values()
    return one.value


def problem_of(run: str) -> Any:
    """The problem of a run's record, built again without trust."""
    with recorded_configuration(run, created_of(run).get("config")) as config:
        return build_problem(config)


def test_a_run_is_refused_for_all_reasons_at_once_and_leaves_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(*TASKS, "--no-check") == 0
    config = tiny_decoder(60, seed=3)
    save(config, project / "wider")
    (project / "empty.txt").write_text("")
    before = sorted(project.iterdir())
    capsys.readouterr()
    wrong = [
        "+problem.experts.wider=wider",
        "+problem.experts.gone=gone",
        "problem.tasks.cats.data.path=empty.txt",
        "+problem.tasks.dogs.data.columns={text: body}",
        "+problem.tasks.more={kind: perplexty, data: cats.txt}",
        "+problem.tasks.cats.bach_size=3",
    ]
    assert status("run", "map_bo.yaml", *QUICK, *wrong) == 2
    said = capsys.readouterr().err
    for part in ("experts.wider: ", "experts.gone: ", "no setting 'bach_size'", "'perplexty' is"):
        assert part in said, said
    assert "has no column 'body'" in said
    assert sorted(project.iterdir()) == before
    assert status("run", "map_bo.yaml", *QUICK, *wrong[2:4]) == 2
    said = capsys.readouterr().err
    assert "2 evaluators cannot be used" in said
    assert "empty.txt is empty" in said
    assert "has no column 'body'" in said
    assert sorted(project.iterdir()) == before


def test_what_init_refuses_is_tried_again_after_a_correction(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init("--task", "cats=perplexity:cats.txt,columns.text=body") == 2
    said = capsys.readouterr().err
    assert "has no column 'body'" in said
    assert "hint: correct map_bo.yaml, then try it out with `map-bo init map_bo.yaml`" in said
    file = project / "map_bo.yaml"
    file.write_text(file.read_text().replace("text: body", "text: line"))
    assert status("init", "map_bo.yaml", "--examples", "3") == 0
    assert "3 of 24" in capsys.readouterr().out
    assert status("init", "map_bo.yaml", "--expert", "cats") == 2
    assert "is a configuration, and experts or tasks" in capsys.readouterr().err


def test_an_expert_that_is_no_better_is_noticed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = ["--task", "cats=perplexity:cats.txt", "--task", "other=perplexity:cats.txt"]
    turned = ["--set", "problem.metrics={cats: {direction: max}}"]
    assert init(*swapped, *turned, "--examples", "6") == 0
    said = capsys.readouterr().out
    assert "no expert is called 'other'" in said
    assert "note: expert 'cats' does not beat the base on 'cats' on the 6 examples" in said
