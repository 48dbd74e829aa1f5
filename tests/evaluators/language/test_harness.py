from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.language.harness import (
    Column,
    Plan,
    Progress,
    Unit,
    draws,
    make_plan,
    outcome_of,
)
from tests.evaluators.harness_tasks import write_tasks

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.mark.parametrize(
    ("raw", "rule", "outcome"),
    [
        (True, "mean", 1),
        (-2.0, "log_mean", math.exp(2)),
        ((-6.0, 3), "log_ratio", math.exp(2)),
        ((-6.0, 3), "ratio", 2 / math.log(2)),
        ((1, [0.25, 0.75]), "brier", 0.125),
        (-1e6, "log_mean", math.inf),
    ],
)
def test_what_is_logged_becomes_one_number(raw: Any, rule: Any, outcome: float) -> None:
    assert outcome_of(raw, rule) == pytest.approx(outcome)


@pytest.mark.parametrize(
    ("raw", "rule"), [((1, 2), "mean"), ("no", "mean"), (1.0, "ratio"), ((-1.0, 0), "ratio")]
)
def test_what_is_no_number_is_refused(raw: Any, rule: Any) -> None:
    with pytest.raises(EvaluationError, match="which is not a number"):
        outcome_of(raw, rule)


@pytest.mark.parametrize(
    ("metric", "rule", "higher", "kind"),
    [
        ("acc_norm", "mean", True, "proportion"),
        ("exact_match", "mean", True, "proportion"),
        ("prompt_level_strict_acc", "mean", True, "proportion"),
        ("rougeL", "mean", True, "unbounded"),
        ("bits_per_byte", "ratio", False, "loss"),
    ],
)
def test_a_metric_has_a_kind(metric: str, rule: Any, higher: bool, kind: Any) -> None:
    direction: Any = "max" if higher else "min"
    assert Column(metric, "none", rule, higher).named("a") == Metric("a", direction, kind)


def test_names_say_no_more_than_they_have_to() -> None:
    acc = Column("acc", "none", "mean", True)
    strict, loose = (Column("em", one, "mean", True) for one in ("strict", "loose"))

    def names(*units: Unit) -> list[str]:
        return [metric.name for metric in Plan(None, units, ()).columns.values()]

    assert names(Unit("a", (acc,))) == ["acc"]
    assert names(Unit("a", (strict, loose))) == ["em_strict", "em_loose"]
    assert names(Unit("a", (strict,)), Unit("b", (acc,))) == ["a_em", "b_acc"]


def test_progress_counts_answers() -> None:
    heard: list[int] = []
    progress = Progress(heard.append)
    for _ in range(3):
        progress.add_partial("loglikelihood", (), 0.0)
    assert heard == [1, 2, 3]


@needs_harness
def test_tasks_are_found_without_reading_data(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        path.unlink()
    plan = make_plan(["choice", "by_task", "half_corpus"], {}, (folder,))
    assert [unit.name for unit in plan.units] == ["choice", "by_task", "half_corpus"]
    assert [unit.by_size for unit in plan.units] == [True, False, True]
    assert plan.units[2].dropped == ("mcc",)
    assert plan.wrong == ()
    wrong = make_plan(["corpus", "no_tasks"], {}, (folder,)).wrong
    assert [verdict for verdict, _ in wrong] == [
        "the group 'no_tasks' has no tasks",
        "no metric of 'corpus' can be measured (mcc are no means over documents)",
    ]


def test_a_request_that_draws_is_found_wherever_it_stands() -> None:
    greedy = [[[("a prompt", {"until": ["\n"], "do_sample": False})]]]
    assert not draws(greedy)
    assert draws([*greedy, [[("a prompt", {"do_sample": True, "temperature": 1.0})]]])
    assert not draws([[[("the context", " a continuation")]]])
